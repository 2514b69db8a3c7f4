//! One virtqueue at work: its ring, its requests in flight, and those that wait for room on the disk.
//!
//! Slots are preallocated, one for each ring entry up to [`SLOTS_MAX`]; a head is only taken from the ring while a slot is
//! free, and what the disk has no room for waits in a list by kind, so that stuck writes do not keep reads back.

use std::sync::Arc;

use resilver_bdev::{IoKind, IoStats, Port, SEGMENTS_MAX, Tag};
use resilver_reactor::{Armed, Context, Watch};
use resilver_sys::{BufferSlice, EventFd, WaitSet};

use crate::blk::{Ask, CacheMode, RequestError, Serial, parse};
use crate::blk_session::MemoryReply;
use crate::chain::{AllThere, Chain, Gather, Indirect};
use crate::dirty_log::DirtyLog;
use crate::memory::GuestMemory;
use crate::protocol::blk_status;
use crate::request::{NO_SLOT, Request, Rest};
use crate::ring::{ChainFault, Notify, Ring, RingAreas, RingFault, Taken};
use crate::stats::VhostStats;

pub(crate) use ahead::Ahead;
use ahead::Near;
use arriving::Arriving;

mod ahead;
mod arriving;

/// The most requests of one queue that are in flight at a time.
pub const SLOTS_MAX: u16 = 1024;
/// The fewest and the most requests that a turn takes from one ring, of those that are there; see [`LiveQueue::fetch`].
const PER_TURN: (u16, u16) = (4, 32);
/// The most from a packed ring.
const PACKED_PER_TURN: u16 = 16;
/// Where the queue's index begins in a tag.
pub(crate) const QUEUE_SHIFT: u32 = 16;

/// What all queues of a session share on the reactor.
pub(crate) struct Shared {
    pub(crate) memory: Box<GuestMemory>,
    /// The map before, while it is still used.
    pub(crate) retiring: Option<Retiring>,
    /// Where to log what is written to guest memory, while the front end wants that.
    pub(crate) log: Option<Box<DirtyLog>>,
    /// Counts the memory maps; a request remembers under which it was translated.
    pub(crate) epoch: u32,
    pub(crate) cache: CacheMode,
    pub(crate) read_only: bool,
    pub(crate) serial: Serial,
    pub(crate) stats: Arc<VhostStats>,
    pub(crate) chain: Chain,
    pub(crate) ahead: Ahead,
    pub(crate) scratch: Box<[BufferSlice; SEGMENTS_MAX]>,
}

/// A map that was replaced, and has requests in flight that were translated under it.
pub(crate) struct Retiring {
    pub(crate) memory: Box<GuestMemory>,
    /// How many.
    pub(crate) requests: u32,
    /// Who waits for it to be given up.
    pub(crate) reply: MemoryReply,
}

/// Where requests come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// The ring.
    Ring,
    /// What an earlier session had taken from it, which is owed first.
    Owed,
}

/// What was found where requests come from.
enum Next {
    /// A request, whose chain has been gathered.
    Taken(Taken),
    /// Nothing.
    Nothing,
    /// One that names pages which are missing: it stays where it is.
    Missing,
}

/// Slots in the order in which they came.
#[derive(Debug, Clone, Copy)]
struct List {
    head: u16,
    tail: u16,
}

impl List {
    const EMPTY: Self = Self { head: NO_SLOT, tail: NO_SLOT };
}

/// Whether the guest has been asked for kicks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kicks {
    Suppressed,
    Wanted,
}

/// A started virtqueue. Built on the control side, lives on the reactor, comes back when it is stopped.
#[derive(Debug)]
pub struct LiveQueue {
    ring: Ring,
    /// What an earlier session had in flight, in order, and how many of that have been begun again.
    again: Box<[Taken]>,
    begun: usize,
    indirect: Indirect,
    slots: Box<[Request]>,
    free: u16,
    in_use: u16,
    waiting: [List; IoKind::ALL.len()],
    kick: Option<Arc<EventFd>>,
    call: Option<Arc<EventFd>>,
    kicks: Kicks,
    /// While the guest's memory is on its way.
    arriving: Arriving,
}

impl LiveQueue {
    /// A queue over `ring` that is kicked and notified by these descriptors. Without a kick descriptor it is polled for good;
    /// without a call descriptor the guest polls.
    #[must_use]
    pub fn new(
        ring: Ring,
        again: Box<[Taken]>,
        indirect: Indirect,
        kick: Option<Arc<EventFd>>,
        call: Option<Arc<EventFd>>,
    ) -> Self {
        let count = ring.size().min(SLOTS_MAX);
        let next = |slot: u16| if slot + 1 < count { slot + 1 } else { NO_SLOT };
        Self {
            ring,
            again,
            begun: 0,
            indirect,
            slots: (0..count).map(|slot| Request::free(next(slot))).collect(),
            free: 0,
            in_use: 0,
            waiting: [List::EMPTY; IoKind::ALL.len()],
            kick,
            call,
            kicks: Kicks::Suppressed,
            arriving: Arriving::default(),
        }
    }

    /// Where the ring stands: what GET_VRING_BASE answers.
    #[must_use]
    pub fn base(&self) -> u32 {
        self.ring.base()
    }

    /// Requests taken from the ring and not finished.
    #[must_use]
    pub(crate) fn in_use(&self) -> u16 {
        self.in_use
    }

    /// Requests of an earlier session that have not been begun again.
    #[must_use]
    pub(crate) fn owed(&self) -> usize {
        self.again.len() - self.begun
    }

    /// The ring is broken: nothing is begun any more.
    pub(crate) fn break_off(&mut self) {
        self.begun = self.again.len();
    }

    /// Parts that the disk has.
    pub(crate) fn outstanding(&self) -> u32 {
        if self.in_use == 0 { 0 } else { self.slots.iter().map(|slot| slot.outstanding).sum() }
    }

    /// Goes on with the ring at other addresses.
    pub(crate) fn move_to(&mut self, areas: RingAreas, log: Option<&DirtyLog>) {
        self.ring.move_to(areas, log);
    }

    /// The ring is served from now on. The guest is interrupted once: the last interrupt before a reconnect may be lost.
    pub(crate) fn start(&mut self, log: Option<&DirtyLog>) {
        self.ring.disarm(log);
        self.interrupt();
    }

    /// Changes the kick descriptor; answers the old one.
    pub(crate) fn set_kick(&mut self, kick: Option<Arc<EventFd>>) -> Option<Arc<EventFd>> {
        std::mem::replace(&mut self.kick, kick)
    }

    /// Changes the call descriptor; answers the old one. The new one is signalled at once, since an interrupt may have gone
    /// to the old one that nobody listened to any more.
    pub(crate) fn set_call(&mut self, call: Option<Arc<EventFd>>) -> Option<Arc<EventFd>> {
        let old = std::mem::replace(&mut self.call, call);
        self.interrupt();
        old
    }

    /// Whether interrupting the guest has made us wait.
    pub(crate) fn is_stuck(&self) -> bool {
        self.call.as_ref().is_some_and(|call| call.is_stuck())
    }

    /// Interrupts the guest, wanted or not.
    fn interrupt(&self) {
        if let Some(call) = &self.call {
            call.signal();
        }
    }

    /// Submits what waits, as far as the disk has room. Answers how many requests moved.
    pub(crate) fn pump(
        &mut self,
        cx: &Context<'_>,
        shared: &mut Shared,
        port: &mut Port<'_>,
        queue: u32,
    ) -> usize {
        let mut moved = 0;
        for kind in IoKind::ALL {
            while let Some(waiting) = self.waiting.get(kind as usize)
                && let Some(request) = self.slots.get(usize::from(waiting.head))
            {
                if request.result.is_ok() && port.free(kind) == 0 {
                    break;
                }
                let slot = waiting.head;
                self.submit_parts(cx, shared, port, queue, slot);
                let Some(request) = self.slots.get_mut(usize::from(slot)) else { break };
                if request.rest != Rest::Nothing {
                    break;
                }
                let next = request.next;
                if let Some(waiting) = self.waiting.get_mut(kind as usize) {
                    waiting.head = next;
                }
                moved += 1;
                self.settle(cx, shared, slot);
            }
        }
        moved
    }

    /// Takes requests from their source and submits them. Answers how many.
    ///
    /// Of what is in the ring it takes half, and of a deep one no more than [`PER_TURN`]. What a turn takes of a disk that is memory
    /// it gives back together; if that were all, the guest would wait while the reactor serves its requests, and the reactor while the
    /// guest makes new ones. That is so of a disk's rings together, so half is left of a few requests, too: they may be a deep guest's
    /// share in one of many rings.
    ///
    /// # Errors
    /// The driver broke the ring, or the chains that are owed.
    #[inline]
    pub(crate) fn fetch(
        &mut self,
        cx: &Context<'_>,
        shared: &mut Shared,
        port: &mut Port<'_>,
        queue: u32,
        source: Source,
    ) -> Result<usize, RingFault> {
        let (fewest, most) = PER_TURN;
        let batch = match (&mut self.ring, source) {
            (_, Source::Owed) => most,
            (Ring::Split(ring), Source::Ring) => {
                let available = ring.available()?;
                if available == 0 {
                    return Ok(0);
                }
                (available - available / 2).clamp(fewest, most)
            }
            // How many there are only each of them tells.
            (Ring::Packed(_), Source::Ring) => PACKED_PER_TURN,
        };
        let free = self.slots.len() - usize::from(self.in_use);
        let batch = batch.min(u16::try_from(free).unwrap_or(u16::MAX));
        let mut count = 0;
        shared.ahead.clear();
        while count < batch {
            if let (Ring::Split(ring), Source::Ring) = (&mut self.ring, source)
                && shared.ahead.is_empty()
            {
                shared.ahead.look(cx, &shared.memory, ring, self.indirect, batch - count)?;
                if shared.ahead.is_empty() {
                    break;
                }
            }
            let next = match source {
                Source::Ring => self.take::<AllThere>(cx, shared)?,
                Source::Owed => self.take_again::<AllThere>(cx, shared)?,
            };
            let Next::Taken(taken) = next else { break };
            self.begin(cx, shared, port, queue, taken);
            count += 1;
        }
        Ok(usize::from(count))
    }

    /// Takes the next request from the ring and gathers its chain.
    #[inline(always)]
    fn take<G: Gather>(
        &mut self,
        cx: &Context<'_>,
        shared: &mut Shared,
    ) -> Result<Next, RingFault> {
        let Shared { chain, memory, ahead, .. } = shared;
        let bad = |head| move |what| RingFault::BadChain { head, what };
        match &mut self.ring {
            Ring::Split(ring) => {
                let near = if G::AHEAD { ahead.next() } else { None };
                let head = match &near {
                    Some(near) => {
                        ring.pop_known(near.head)?;
                        near.head
                    }
                    None => match ring.pop()? {
                        Some(head) => head,
                        None => return Ok(Next::Nothing),
                    },
                };
                let gathered = match near {
                    Some(Near { table, begun: true, .. }) => {
                        chain.gather_table(cx, memory, table).map(|()| true)
                    }
                    Some(_) | None => {
                        let gathered =
                            G::gather(chain, cx, memory, ring.chain(head), self.indirect);
                        gathered.map(|extent| extent.is_some())
                    }
                };
                if !gathered.map_err(bad(head))? {
                    ring.put_back();
                    return Ok(Next::Missing);
                }
                ring.take(head);
                Ok(Next::Taken(Taken { id: head, entries: 1, record: head }))
            }
            Ring::Packed(ring) => {
                if !ring.has_next() {
                    return Ok(Next::Nothing);
                }
                let at = ring.next_index();
                let gathered = G::gather(chain, cx, memory, ring.chain(), self.indirect);
                let Some(extent) = gathered.map_err(bad(at))? else { return Ok(Next::Missing) };
                let (id, entries) = (extent.last_link, extent.entries);
                let record = ring.take(entries)?;
                Ok(Next::Taken(Taken { id, entries, record }))
            }
        }
    }

    /// Takes the next request that an earlier session had taken and gathers its chain.
    fn take_again<G: Gather>(
        &mut self,
        cx: &Context<'_>,
        shared: &mut Shared,
    ) -> Result<Next, RingFault> {
        let Some(taken) = self.again.get(self.begun).copied() else { return Ok(Next::Nothing) };
        let Shared { chain, memory, .. } = shared;
        let gathered = match &self.ring {
            Ring::Split(ring) => G::gather(chain, cx, memory, ring.chain(taken.id), self.indirect),
            // The ring's own descriptors may have been overwritten since.
            Ring::Packed(ring) => match ring.recorded(taken) {
                Some(recorded) => G::gather(chain, cx, memory, recorded, self.indirect),
                None => Err(ChainFault::NextOutside),
            },
        };
        if gathered.map_err(|what| RingFault::BadChain { head: taken.id, what })?.is_none() {
            return Ok(Next::Missing);
        }
        self.begun += 1;
        shared.stats.resubmitted.add(1);
        Ok(Next::Taken(taken))
    }

    /// Begins the request that was gathered last.
    #[inline(always)]
    fn begin(
        &mut self,
        cx: &Context<'_>,
        shared: &mut Shared,
        port: &mut Port<'_>,
        queue: u32,
        taken: Taken,
    ) {
        let slot = self.free;
        let Some(request) = self.slots.get_mut(usize::from(slot)) else { return };
        self.free = request.next;
        self.in_use += 1;
        request.taken = taken;
        request.started = cx.now;
        request.status = shared.chain.status();
        request.epoch = shared.epoch;
        request.result = Ok(());
        request.next = NO_SLOT;
        request.device_writes = 0;
        let limits = port.limits();
        let read_only = shared.read_only || limits.read_only;
        match parse(cx, &mut shared.chain, limits, read_only, request.ranges_mut()) {
            Ok(ask) => {
                request.fill(ask, &shared.chain, shared.cache);
                if ask == Ask::Identify {
                    match shared.chain.write(cx, &shared.serial.0) {
                        Some(written) => request.written = written,
                        None => request.fail(RequestError::WildBuffer),
                    }
                    return self.finish(cx, shared, slot);
                }
            }
            Err(error) => {
                request.fail(error);
                return self.finish(cx, shared, slot);
            }
        }
        let kind = request.next_kind();
        let idle = self.waiting.get(kind as usize).is_none_or(|list| list.head == NO_SLOT);
        if idle {
            self.submit_parts(cx, shared, port, queue, slot);
        }
        self.settle(cx, shared, slot);
    }

    /// Submits parts of one request while there are parts and room.
    #[inline(always)]
    fn submit_parts(
        &mut self,
        cx: &Context<'_>,
        shared: &mut Shared,
        port: &mut Port<'_>,
        queue: u32,
        slot: u16,
    ) {
        let Some(request) = self.slots.get_mut(usize::from(slot)) else { return };
        if request.result.is_err() {
            request.rest = Rest::Nothing;
        }
        let (kind, tag) = (request.next_kind(), Tag(queue << QUEUE_SHIFT | u32::from(slot)));
        while request.rest != Rest::Nothing && port.free(kind) > 0 {
            request.submit_part(cx, port, tag, &mut shared.scratch);
        }
    }

    /// Finishes a request that has ended, and lets one wait that has more to submit. Not for one that waits already.
    #[inline]
    fn settle(&mut self, cx: &Context<'_>, shared: &mut Shared, slot: u16) {
        let Some(request) = self.slots.get_mut(usize::from(slot)) else { return };
        if request.has_ended() {
            self.finish(cx, shared, slot);
        } else if request.rest != Rest::Nothing {
            self.wait(slot);
        }
    }

    /// Appends a request to those that wait for room of its next part's kind.
    fn wait(&mut self, slot: u16) {
        let Some(request) = self.slots.get_mut(usize::from(slot)) else { return };
        request.next = NO_SLOT;
        let kind = request.next_kind();
        let Some(list) = self.waiting.get_mut(kind as usize) else { return };
        let tail = std::mem::replace(&mut list.tail, slot);
        if list.head == NO_SLOT {
            list.head = slot;
        } else if let Some(last) = self.slots.get_mut(usize::from(tail)) {
            last.next = slot;
        }
    }

    /// One part has ended.
    #[inline]
    pub(crate) fn complete(
        &mut self,
        cx: &Context<'_>,
        shared: &mut Shared,
        slot: u16,
        result: Result<(), RequestError>,
        stats: &IoStats,
    ) {
        let Some(request) = self.slots.get_mut(usize::from(slot)) else { return };
        request.outstanding = request.outstanding.saturating_sub(1);
        let (waits, failed) = (request.rest != Rest::Nothing, request.result.is_err());
        if !failed {
            // After an error nothing more is submitted; a request that waits leaves its list when its turn comes.
            request.result = result;
        }
        let ends = if waits { result.is_err() && !failed } else { request.has_ended() };
        if ends {
            let latency = cx.now - request.started;
            stats.record(request.kind, request.length, latency, request.result.is_ok());
        }
        match (waits, ends) {
            (false, true) => self.finish(cx, shared, slot),
            (false, false) if request.rest != Rest::Nothing => self.wait(slot),
            (false | true, _) => {}
        }
    }

    /// Writes the status, stores the used element and frees the slot.
    #[inline]
    fn finish(&mut self, cx: &Context<'_>, shared: &mut Shared, slot: u16) {
        let Some(request) = self.slots.get_mut(usize::from(slot)) else { return };
        let (status, written) = match request.result {
            Ok(()) => (blk_status::OK, request.written.saturating_add(1)),
            Err(error) => (error.status(), 1),
        };
        // A status byte whose memory has gone meanwhile has nobody to read it.
        let _ = cx.memory.write(request.status, &[status]);
        shared.log_request(request);
        self.ring.push_used(request.taken, written);
        shared.stats.requests.add(1);
        self.release(shared, slot);
    }

    /// Frees a slot.
    #[inline]
    fn release(&mut self, shared: &mut Shared, slot: u16) {
        let Some(request) = self.slots.get_mut(usize::from(slot)) else { return };
        if request.epoch != shared.epoch
            && let Some(retiring) = &mut shared.retiring
        {
            retiring.requests = retiring.requests.saturating_sub(1);
        }
        request.next = self.free;
        request.rest = Rest::Nothing;
        self.free = slot;
        self.in_use -= 1;
    }

    /// Makes finished requests visible and interrupts the guest if it wants that: once a turn.
    #[inline]
    pub(crate) fn publish(&mut self, shared: &Shared) {
        if self.ring.publish(shared.log.as_deref()) == Notify::Yes
            && let Some(call) = &self.call
        {
            call.signal();
            shared.stats.interrupts.add(1);
        }
    }

    /// What could give it work, where nothing is under way: the driver.
    pub(crate) fn watch(&self, watch: &mut Watch) {
        if self.owed() > 0 {
            return watch.give_up();
        }
        self.ring.watch(watch);
    }

    /// The reactor is about to sleep.
    pub(crate) fn arm(&mut self, shared: &Shared, set: &mut WaitSet) -> Armed {
        if self.arriving.is_waiting() {
            // Who fetches the pages rings the doorbell.
            return Armed::Until(None);
        }
        if self.owed() > 0 {
            return Armed::Ready;
        }
        if self.free == NO_SLOT {
            // Nothing could be taken from the ring: the completions to come will wake us.
            return Armed::Until(None);
        }
        let Some(kick) = &self.kick else { return Armed::Ready };
        self.kicks = Kicks::Wanted;
        if !self.ring.arm(shared.log.as_deref()) {
            return Armed::Ready;
        }
        set.add(kick.as_ref());
        Armed::Until(None)
    }

    /// The sleep is over.
    pub(crate) fn disarm(&mut self, shared: &Shared) {
        if self.kicks == Kicks::Suppressed {
            return;
        }
        self.kicks = Kicks::Suppressed;
        self.ring.disarm(shared.log.as_deref());
        if self.kick.as_ref().is_some_and(|kick| kick.drain()) {
            shared.stats.kicks.add(1);
        }
    }

    /// The guest is gone: requests that the disk does not have are dropped, nothing is written to guest memory any more.
    pub(crate) fn abandon(&mut self, shared: &mut Shared) {
        for kind in IoKind::ALL {
            let Some(list) = self.waiting.get_mut(kind as usize) else { continue };
            let mut slot = std::mem::replace(list, List::EMPTY).head;
            while let Some(request) = self.slots.get_mut(usize::from(slot)) {
                let next = request.next;
                request.rest = Rest::Nothing;
                if request.outstanding == 0 {
                    self.release(shared, slot);
                }
                slot = next;
            }
        }
    }

    /// One part of an abandoned queue has ended.
    pub(crate) fn complete_abandoned(&mut self, shared: &mut Shared, slot: u16) {
        let Some(request) = self.slots.get_mut(usize::from(slot)) else { return };
        request.outstanding = request.outstanding.saturating_sub(1);
        if request.outstanding == 0 {
            self.release(shared, slot);
        }
    }
}
