//! Who a back end is: the serial of its disk, asked on a connection of its own.
//!
//! A front end that reconnects must find its disk again and not another one that happens to listen there. The configuration space
//! tells sizes only; the serial is asked for by a request, and requests need a ring. To run one on the connection that
//! follows was tried and is wrong: a ring that was stopped there is one of which nothing is in flight, whatever the record
//! says that the back end is given after that.

use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use resilver_sys::{Area, WaitSet};

use super::FrontEndError;
use super::link::{Link, PROTOCOL};
use super::memory::{DataBuffer, SharedMemory};
use super::queue::{self, DriverQueue, Request};
use crate::blk::Serial;
use crate::protocol::SERIAL_BYTES;

/// Entries of the ring: header, answer and status of one request.
const SIZE: u16 = 4;
/// The answer.
const ANSWER: DataBuffer = DataBuffer { offset: 0, length: 20 };
const _: () = assert!(ANSWER.length as usize == SERIAL_BYTES);
/// What errors call the request.
const NAME: &str = "GET_ID";
/// The longest sleep before another look, nanoseconds: a back end may close the connection without a word.
const LOOK_AGAIN: u64 = 50_000_000;

/// Asks whoever listens at `path`; none where the device has no serial to tell. Waits for the socket while patience lasts, and
/// for each answer until the deadline.
pub(super) fn ask(
    path: &Path,
    patience: Duration,
    deadline: Duration,
) -> Result<Option<Serial>, FrontEndError> {
    let mut link = Link::open(path, patience, deadline)?;
    let negotiated = link.negotiate(u64::MAX, PROTOCOL)?;
    let ring_bytes = queue::bytes_needed(SIZE, 1, &negotiated);
    let mut memory = SharedMemory::new(SERIAL_BYTES, ring_bytes)?;
    let mut queue = DriverQueue::new(0, SIZE, 1, &negotiated, &mut memory)?;
    let answer = Area::new(memory.mapping(), ANSWER.offset, SERIAL_BYTES, 1)?;
    let malformed = |what| FrontEndError::Malformed { message: NAME, what };
    queue
        .submit(Request::GetId, &[ANSWER], 0)
        .map_err(|_| malformed("the question does not fit its ring"))?;
    queue.publish();
    link.share(&negotiated, &memory)?;
    link.start(&negotiated, queue.handle(), queue.handle().base())?;
    let begun = Instant::now();
    let mut set = WaitSet::with_capacity(2);
    let finished = loop {
        match queue.pop() {
            Ok(Some(finished)) => break finished,
            Ok(None) => {}
            Err(_) => return Err(malformed("it broke the rules of the ring")),
        }
        if link.is_closed() {
            let source = io::ErrorKind::UnexpectedEof.into();
            return Err(FrontEndError::Lost { message: NAME, source });
        }
        if begun.elapsed() >= deadline {
            return Err(FrontEndError::Deadline { message: NAME, deadline });
        }
        if queue.arm() {
            set.clear();
            set.add(queue.call_fd());
            set.add(link.socket.as_fd());
            set.sleep(Some(LOOK_AGAIN));
        }
    };
    link.stop(0)?;
    let byte = |at| answer.load_u8(at, Ordering::Relaxed);
    Ok(finished.result.is_ok().then(|| Serial::answered(std::array::from_fn(byte))))
}
