//! The data side of a `virtio` bdev: requests in slots, one ring to a channel.
//!
//! The back end sees no memory but what is shared with it, so every payload goes through a pool there: a write is copied when
//! it is put into the ring, a read when it has ended. A request waits in line until the ring and the pool have room for it.
//! A range without data is cut to what the back end takes at once; zeroes that it cannot make are written.
//!
//! While the back end is polling, nothing here makes a system call; where it wants to be kicked, one write for a batch.
//!
//! Fault model: the back end may go at any moment; requests in flight stay where they are until another one has carried them
//! out (see [`super`]). A status that says failure, or nothing that virtio knows, is the request's I/O error. A back end that
//! breaks the rules of the ring loses the connection, not its requests. Payload whose memory is gone is `EFAULT`.

use std::collections::VecDeque;
use std::sync::Arc;

use resilver_bdev::bounce::{CHUNKS_MAX, Chunks};
use resilver_bdev::channel::YOUNG;
use resilver_bdev::ledger::Ledger;
use resilver_bdev::slots::Slots;
use resilver_bdev::{
    BdevIo, CompletionBatch, IoChannel, IoError, IoKind, Limits, SEGMENTS_MAX, Tag,
};
use resilver_reactor::{Armed, Context, Nanos};
use resilver_sys::{BufferSlice, RegionTable, Slices, WaitSet};

use super::device::Device;
use super::ring_state::Phase;
use super::seat::{Lent, Seat};
use crate::front_end::{DataBuffer, Request as Order, RequestError};

/// What a request is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// Nothing: the slot is free.
    Idle,
    /// A read or write of all of it, through the pool.
    Transfer,
    /// A flush.
    Flush,
    /// A discard of what is left of it, as far as one request reaches.
    Discard,
    /// The same with zeroes that the back end makes.
    Zeroes,
    /// The same with zeroes that are written.
    Fill,
}

/// One I/O of the parent.
struct Request {
    io: BdevIo,
    step: Step,
    /// Bytes of a range that are done, and that are in the ring.
    done: u64,
    asked: u64,
    chunks: Chunks,
}

impl Request {
    fn new() -> Self {
        let io =
            BdevIo { tag: Tag(0), kind: IoKind::Flush, may_unmap: false, offset: 0, length: 0 };
        Self { io, step: Step::Idle, done: 0, asked: 0, chunks: Chunks::NONE }
    }
}

/// What an I/O begins with; none for what is done as soon as it is asked.
fn first_step(device: &Device, io: &BdevIo) -> Option<Step> {
    match io.kind {
        IoKind::Flush => device.flush.then_some(Step::Flush),
        _ if io.length == 0 => None,
        IoKind::Read | IoKind::Write => Some(Step::Transfer),
        // A hint, and nobody there to take it.
        IoKind::Unmap => (device.discard_max > 0).then_some(Step::Discard),
        IoKind::WriteZeroes if device.zeroes_max > 0 => Some(Step::Zeroes),
        IoKind::WriteZeroes => Some(Step::Fill),
    }
}

/// What follows a request's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// The I/O has ended.
    Ended(Result<(), IoError>),
    /// The rest of the range is next, by this step.
    Onward(Step),
}

/// Decides what follows a step from how it went. `left` counts the bytes after those that it was about.
fn judge(step: Step, result: Result<(), RequestError>, left: u64) -> Verdict {
    match (step, result) {
        // It offered the feature, and cannot for this range after all.
        (Step::Discard, Err(RequestError::Unsupported)) => Verdict::Ended(Ok(())),
        (Step::Zeroes, Err(RequestError::Unsupported)) => Verdict::Onward(Step::Fill),
        (_, Err(RequestError::Unsupported)) => Verdict::Ended(Err(IoError::NOT_SUPPORTED)),
        (_, Err(RequestError::Io | RequestError::NoStatus | RequestError::UnknownStatus(_))) => {
            Verdict::Ended(Err(IoError::IO))
        }
        (Step::Discard | Step::Zeroes | Step::Fill, Ok(())) if left > 0 => Verdict::Onward(step),
        (_, Ok(())) => Verdict::Ended(Ok(())),
    }
}

/// Why a request is not in the ring yet.
enum Refusal {
    /// No room: later.
    Full,
    /// It ends so.
    Ends(IoError),
}

/// The data side.
pub(super) struct VirtioChannel {
    device: Device,
    limits: Limits,
    ledger: Ledger,
    requests: Slots<Request>,
    /// What each request carries, by its slot.
    payloads: Box<[Slices]>,
    /// Requests that wait for room, oldest first.
    waiting: VecDeque<u32>,
    seat: Lent,
    /// When the last I/O came in.
    youngest: Nanos,
    /// What the buffers of one request are made of: room made once.
    gathered: [BufferSlice; CHUNKS_MAX],
    buffers: Box<[DataBuffer; SEGMENTS_MAX]>,
}

impl VirtioChannel {
    /// A channel for `depth` I/Os of each kind, on a ring of the export.
    pub(super) fn new(depth: u32, device: Device, seat: Lent) -> Self {
        let slots = Ledger::slots(depth);
        Self {
            device,
            limits: device.limits(),
            ledger: Ledger::new(depth),
            requests: Slots::new(slots, Request::new),
            payloads: Slices::array(slots),
            waiting: VecDeque::with_capacity(slots),
            seat,
            youngest: Nanos::ZERO,
            gathered: [BufferSlice::EMPTY; CHUNKS_MAX],
            buffers: Box::new([DataBuffer { offset: 0, length: 0 }; SEGMENTS_MAX]),
        }
    }

    /// Puts those that wait into the ring, in their order, as far as there is room.
    fn serve_waiting(&mut self, memory: &RegionTable) {
        // What is about to fail goes into no ring: it would stay there.
        if matches!(self.seat.state.phase(), Phase::GivenUp | Phase::Failing) {
            return;
        }
        while let Some(slot) = self.waiting.front().copied() {
            match self.put(memory, slot) {
                Ok(()) => {}
                Err(Refusal::Full) => break,
                Err(Refusal::Ends(error)) => self.end(slot, Err(error)),
            }
            self.waiting.pop_front();
        }
    }

    /// Puts a request, or the next part of it, into the ring.
    fn put(&mut self, memory: &RegionTable, slot: u32) -> Result<(), Refusal> {
        let Seat { queue, pool, .. } = &mut *self.seat;
        let request = &mut self.requests[slot];
        let (io, left) = (request.io, request.io.length.saturating_sub(request.done));
        let offset = io.offset.saturating_add(request.done);
        // What is longest is asked first, so that nothing has to be taken back.
        if !queue.has_room(usize::from(self.device.segments)) {
            return Err(Refusal::Full);
        }
        let mut gathered = 0;
        let order = match request.step {
            Step::Idle => return Ok(()),
            Step::Flush => Order::Flush,
            Step::Discard => {
                request.asked = left.min(self.device.discard_max);
                Order::Discard { offset, length: request.asked }
            }
            Step::Zeroes => {
                request.asked = left.min(self.device.zeroes_max);
                let may_unmap = io.may_unmap;
                Order::WriteZeroes { offset, length: request.asked, may_unmap }
            }
            Step::Fill => {
                request.asked = left.min(u64::from(self.device.max_transfer));
                gathered = pool.zeroes(request.asked, &mut self.gathered);
                Order::Write { offset }
            }
            Step::Transfer => {
                // At most the largest transfer, which fits.
                let length = u32::try_from(io.length).unwrap_or(u32::MAX);
                request.chunks = pool.take(length).ok_or(Refusal::Full)?;
                gathered = pool.gather(&request.chunks, 0, length, &mut self.gathered);
                if io.kind == IoKind::Read {
                    Order::Read { offset }
                } else {
                    let copied = pool.pair(
                        &request.chunks,
                        self.payloads[slot as usize].as_slice(),
                        |from, to| memory.copy(to, from),
                    );
                    copied.map_err(|_| Refusal::Ends(IoError::FAULT))?;
                    Order::Write { offset }
                }
            }
        };
        let gathered = &self.gathered[..gathered];
        let count = cut(gathered, self.device.segment_bytes, self.buffers.as_mut_slice());
        // Nothing can be wrong with it: limits and room were checked.
        let put = queue.submit(order, &self.buffers[..count], u64::from(slot));
        put.map_err(|_| Refusal::Ends(IoError::INVALID))
    }

    /// Takes what has ended from the ring.
    fn take_ended(&mut self, memory: &RegionTable) {
        loop {
            match self.seat.queue.pop() {
                Ok(Some(finished)) => {
                    // The tag is ours: it was never in the shared memory.
                    let slot = u32::try_from(finished.tag).unwrap_or(0);
                    self.advance(memory, slot, finished.result);
                }
                Ok(None) => break,
                Err(error) => {
                    let shared = self.seat.shared();
                    self.seat.broke(shared, error);
                    break;
                }
            }
        }
        self.serve_waiting(memory);
    }

    /// A request has come back from the ring.
    fn advance(&mut self, memory: &RegionTable, slot: u32, result: Result<(), RequestError>) {
        let request = &mut self.requests[slot];
        if result.is_ok() {
            request.done += std::mem::take(&mut request.asked);
        }
        let left = request.io.length.saturating_sub(request.done);
        match judge(request.step, result, left) {
            Verdict::Onward(step) => {
                request.step = step;
                self.waiting.push_back(slot);
            }
            Verdict::Ended(Ok(())) if request.io.kind == IoKind::Read => {
                let pool = &self.seat.pool;
                let copied = pool.pair(
                    &request.chunks,
                    self.payloads[slot as usize].as_slice(),
                    |to, from| memory.copy(to, from),
                );
                self.end(slot, copied.map_err(|_| IoError::FAULT));
            }
            Verdict::Ended(result) => self.end(slot, result),
        }
    }

    /// The I/O has ended: what it held goes back, and its completion waits to be handed over.
    fn end(&mut self, slot: u32, result: Result<(), IoError>) {
        let request = &mut self.requests[slot];
        self.seat.pool.give_back(std::mem::replace(&mut request.chunks, Chunks::NONE));
        request.step = Step::Idle;
        let (kind, tag) = (request.io.kind, request.io.tag);
        self.requests.release(slot);
        self.ledger.finish(kind, tag, result);
    }

    /// Fails everything.
    fn fail_all(&mut self) {
        self.waiting.clear();
        for slot in self.requests.numbers() {
            if self.requests[slot].step != Step::Idle {
                self.end(slot, Err(IoError::IO));
            }
        }
    }

    /// Does what the ring's phase asks of its owner.
    fn follow(&mut self, memory: &RegionTable) {
        match self.seat.state.phase() {
            Phase::Running | Phase::Stopped => self.take_ended(memory),
            Phase::Recorded => {
                self.take_ended(memory);
                self.seat.taken(self.seat.shared());
            }
            Phase::Lost => {
                let shared = Arc::clone(self.seat.shared());
                self.seat.restart(&shared);
            }
            Phase::GivenUp => {
                let shared = Arc::clone(self.seat.shared());
                self.fail_all();
                self.seat.empty(&shared);
            }
            Phase::Broken => {}
            Phase::Failing => self.fail_all(),
        }
    }
}

/// Cuts slices of the pool into buffers of at most `most` bytes; how many there are.
fn cut(slices: &[BufferSlice], most: u32, into: &mut [DataBuffer]) -> usize {
    let mut count = 0;
    for slice in slices {
        let mut done = 0;
        while done < slice.length && count < into.len() {
            let length = most.min(slice.length - done);
            into[count] = DataBuffer { offset: slice.offset + u64::from(done), length };
            (done, count) = (done + length, count + 1);
        }
    }
    count
}

impl IoChannel for VirtioChannel {
    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn free(&self, kind: IoKind) -> u32 {
        self.ledger.free(kind)
    }

    fn submit(&mut self, cx: &Context<'_>, io: BdevIo, payload: &[BufferSlice]) {
        self.ledger.admit(io.kind);
        if let Err(error) = self.limits.check(&io, payload) {
            return self.ledger.finish(io.kind, io.tag, Err(error));
        }
        let step = first_step(&self.device, &io);
        let Some((step, slot)) = step.and_then(|step| Some((step, self.requests.claim()?))) else {
            // There are as many slots as the ledger admits: it was nothing to do.
            return self.ledger.finish(io.kind, io.tag, Ok(()));
        };
        let request = &mut self.requests[slot];
        (request.io, request.step, request.done, request.asked) = (io, step, 0, 0);
        self.payloads[slot as usize].set(payload);
        self.youngest = cx.now;
        self.waiting.push_back(slot);
        self.serve_waiting(cx.memory);
    }

    fn commit(&mut self, _cx: &Context<'_>) {
        self.seat.queue.publish();
    }

    fn poll(&mut self, cx: &Context<'_>, done: &mut CompletionBatch) {
        self.follow(cx.memory);
        self.ledger.hand_over(done);
    }

    fn in_flight(&self) -> u32 {
        self.ledger.in_flight()
    }

    fn attach(&mut self, cx: &Context<'_>) {
        self.seat.pool.attach(cx.memory);
    }

    fn detach(&mut self, cx: &Context<'_>) {
        self.seat.pool.detach(cx.memory);
    }

    fn arm(&mut self, cx: &Context<'_>, set: &mut WaitSet) -> Armed {
        let in_flight = self.ledger.in_flight() > 0;
        let young = in_flight && cx.now - self.youngest < YOUNG;
        let seat = &mut *self.seat;
        if young || self.ledger.has_finished() || seat.queue.has_unpublished() || !seat.queue.arm()
        {
            return Armed::Ready;
        }
        // After the ring has been armed: a keeper that changes the phase later than this look wakes the sleep.
        match seat.state.phase() {
            Phase::Recorded | Phase::Lost | Phase::GivenUp => return Armed::Ready,
            Phase::Failing if in_flight => return Armed::Ready,
            Phase::Stopped | Phase::Running | Phase::Broken | Phase::Failing => {}
        }
        set.add(seat.queue.call_fd());
        Armed::Until(None)
    }

    fn disarm(&mut self, _cx: &Context<'_>) {
        self.seat.queue.disarm();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_that_is_no_success_is_an_error_of_the_request() {
        let io = Verdict::Ended(Err(IoError::IO));
        for step in [Step::Transfer, Step::Flush, Step::Discard, Step::Zeroes, Step::Fill] {
            for error in [RequestError::Io, RequestError::NoStatus, RequestError::UnknownStatus(77)]
            {
                assert_eq!(judge(step, Err(error), 0), io, "{step:?}");
            }
            assert_eq!(judge(step, Ok(()), 0), Verdict::Ended(Ok(())));
        }
        let unsupported = |step| judge(step, Err(RequestError::Unsupported), 512);
        let refused = Verdict::Ended(Err(IoError::NOT_SUPPORTED));
        assert_eq!(unsupported(Step::Transfer), refused);
        assert_eq!(unsupported(Step::Flush), refused);
        assert_eq!(unsupported(Step::Fill), refused);
        assert_eq!(unsupported(Step::Discard), Verdict::Ended(Ok(())), "a hint");
        assert_eq!(unsupported(Step::Zeroes), Verdict::Onward(Step::Fill));
    }

    #[test]
    fn a_range_goes_on_until_it_is_done() {
        for step in [Step::Discard, Step::Zeroes, Step::Fill] {
            assert_eq!(judge(step, Ok(()), 512), Verdict::Onward(step));
        }
    }

    #[test]
    fn slices_are_cut_to_what_one_buffer_may_have() {
        let slice = |offset, length| BufferSlice { length, offset, ..BufferSlice::EMPTY };
        let mut into = [DataBuffer { offset: 0, length: 0 }; 8];
        let count = cut(&[slice(0, 65536), slice(131_072, 512)], 40_000, &mut into);
        let expected = [(0, 40_000), (40_000, 25_536), (131_072, 512)];
        assert_eq!(
            into[..count].iter().map(|it| (it.offset, it.length)).collect::<Vec<_>>(),
            expected
        );
    }
}
