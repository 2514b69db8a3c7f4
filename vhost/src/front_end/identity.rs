//! Who a back end is: the serial of its disk, asked over a ring of its own before any other is started.
//!
//! A front end that reconnects must find its disk again and not another one that happens to listen there. The configuration space
//! tells sizes only; the serial is asked for by a request, and requests need a ring. The ring of the question takes the number
//! of the first one, is stopped when it has done its duty, and is unknown to the record of what is in flight, which is given
//! to the back end after that.

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::time::Instant;

use resilver_sys::WaitSet;

use super::FrontEndError;
use super::connection::Negotiated;
use super::link::Link;
use super::memory::{Carved, SharedMemory};
use super::queue::{self, DriverQueue, Request};
use crate::protocol::SERIAL_BYTES;

/// Entries of the ring: header, answer and status of one request.
const SIZE: u16 = 4;
/// What errors call the request.
const NAME: &str = "GET_ID";
/// The longest sleep before another look, nanoseconds: a back end may close the connection without a word.
const LOOK_AGAIN: u64 = 50_000_000;

/// A disk's serial as the device says it: NUL-padded, not necessarily text.
pub(super) type Serial = [u8; SERIAL_BYTES];

/// The ring of the question, and where the answer goes.
#[derive(Debug)]
pub(super) struct Identity {
    queue: DriverQueue,
    answer: Carved,
}

impl Identity {
    /// Bytes of shared memory that it takes.
    pub(super) fn bytes_needed(negotiated: &Negotiated) -> usize {
        queue::bytes_needed(SIZE, 1, negotiated) + 2 * SERIAL_BYTES.next_power_of_two()
    }

    /// A ring in `memory`.
    pub(super) fn new(
        negotiated: &Negotiated,
        memory: &mut SharedMemory,
    ) -> Result<Self, FrontEndError> {
        let answer = memory.carve(SERIAL_BYTES, SERIAL_BYTES.next_power_of_two())?;
        let mut queue = DriverQueue::new(0, SIZE, 1, negotiated, memory)?;
        queue.reach(memory);
        Ok(Self { queue, answer })
    }

    /// Asks; none where the device has no serial to tell.
    pub(super) fn ask(
        &mut self,
        link: &mut Link,
        negotiated: &Negotiated,
    ) -> Result<Option<Serial>, FrontEndError> {
        let malformed = |what| FrontEndError::Malformed { message: NAME, what };
        self.queue.forget();
        let submitted = self.queue.submit(Request::GetId, &[self.answer.buffer()], 0);
        submitted.map_err(|_| malformed("the question does not fit its ring"))?;
        self.queue.publish();
        link.start(negotiated, self.queue.handle(), 0)?;
        let begun = Instant::now();
        let mut set = WaitSet::with_capacity(2);
        let finished = loop {
            match self.queue.pop() {
                Ok(Some(finished)) => break finished,
                Ok(None) => {}
                Err(_) => return Err(malformed("it broke the rules of the ring")),
            }
            if link.is_closed() {
                let source = io::ErrorKind::UnexpectedEof.into();
                return Err(FrontEndError::Lost { message: NAME, source });
            }
            if begun.elapsed() >= link.deadline {
                return Err(FrontEndError::Deadline { message: NAME, deadline: link.deadline });
            }
            if self.queue.arm() {
                set.clear();
                set.add(self.queue.call_fd());
                set.add(link.socket.as_fd());
                set.sleep(Some(LOOK_AGAIN));
            }
        };
        link.stop(0)?;
        let byte = |at| self.answer.area.load_u8(at, Ordering::Relaxed);
        Ok(finished.result.is_ok().then(|| std::array::from_fn(byte)))
    }
}
