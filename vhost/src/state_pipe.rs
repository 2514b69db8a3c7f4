//! The pipe through which a device state goes, in the background of its connection (vhost-user, "VHOST_USER_SET_DEVICE_STATE_FD").
//!
//! A front end hands over one end, is answered at once, reads or writes the other end until the pipe is closed, and then asks
//! how it went (CHECK_DEVICE_STATE).
//!
//! Fault model: the front end may hand over anything, may never read or write, and may write without end. So only pipes are
//! taken, no call waits, no more is read than a state can have, and a transfer that is not over when it is asked about
//! gets a moment and is given up. The connection's other messages go on meanwhile; its end ends the transfer.

use std::future::Future;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::fs::{FileType, OFlags};
use rustix::io::{Errno, ReadWriteFlags};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::device_state::{DeviceState, STATE_BYTES, StateError};

/// How long a front end that asks how a transfer went waits for its end.
const PATIENCE: Duration = Duration::from_secs(1);
/// How often an end that has nothing to read, or no room, is tried again.
const LOOK: Duration = Duration::from_millis(2);
/// The most bytes that are read: more is no state, of whatever version.
const BYTES_MAX: usize = 4096;
/// A pipe has no position.
const CURRENT_POSITION: u64 = u64::MAX;

/// Why a transfer failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TransferError {
    /// Not a pipe.
    #[error("the descriptor for the device state is not a pipe")]
    NotAPipe,
    /// The pipe failed.
    #[error("the pipe for the device state failed: {0}")]
    Pipe(#[from] io::Error),
    /// Nobody has read, or nobody has closed the pipe.
    #[error(
        "the device state was not transferred within {PATIENCE:?}: the other end of the pipe is not read, or not closed"
    )]
    TimedOut,
    /// More than a state.
    #[error("more than {BYTES_MAX} bytes came as a device state")]
    TooLong,
    /// What came is no state of this device.
    #[error(transparent)]
    State(#[from] StateError),
    /// Nothing was transferred.
    #[error("no device state was transferred")]
    Nothing,
}

/// A transfer under way.
#[derive(Debug)]
pub(crate) enum Transfer {
    /// A state is written.
    Saving(Task<()>),
    /// One is read.
    Loading(Task<Vec<u8>>),
}

impl Transfer {
    /// Writes a state to the pipe and closes it.
    pub(crate) fn save(fd: OwnedFd, state: &DeviceState) -> Result<Self, TransferError> {
        let (pipe, bytes) = (Pipe::new(fd)?, state.encode());
        Ok(Self::Saving(Task::spawn(async move { pipe.write(&bytes).await })))
    }

    /// Reads a state until the pipe is closed.
    pub(crate) fn load(fd: OwnedFd) -> Result<Self, TransferError> {
        let pipe = Pipe::new(fd)?;
        Ok(Self::Loading(Task::spawn(async move { pipe.read().await })))
    }

    /// How it went: the state that came, if one was to come.
    pub(crate) async fn finish(self) -> Result<Option<DeviceState>, TransferError> {
        match self {
            Self::Saving(task) => task.finish().await.map(|()| None),
            Self::Loading(task) => Ok(Some(DeviceState::decode(&task.finish().await?)?)),
        }
    }
}

/// A task that ends with its owner.
#[derive(Debug)]
pub(crate) struct Task<T>(JoinHandle<Result<T, TransferError>>);

impl<T: 'static> Task<T> {
    fn spawn(work: impl Future<Output = Result<T, TransferError>> + 'static) -> Self {
        Self(tokio::task::spawn_local(work))
    }

    async fn finish(mut self) -> Result<T, TransferError> {
        let ended = timeout(PATIENCE, &mut self.0).await.map_err(|_| TransferError::TimedOut)?;
        ended.map_err(|error| TransferError::Pipe(error.into()))?
    }
}

impl<T> Drop for Task<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// One end of a pipe, looked at again and again: for a few bytes once in a migration that is simpler than to be told.
struct Pipe(OwnedFd);

impl Pipe {
    fn new(fd: OwnedFd) -> Result<Self, TransferError> {
        let stat = rustix::fs::fstat(&fd).map_err(io::Error::from)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::Fifo {
            return Err(TransferError::NotAPipe);
        }
        // The flag is this end's alone, which the front end has given away.
        let flags = rustix::fs::fcntl_getfl(&fd).map_err(io::Error::from)?;
        rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK).map_err(io::Error::from)?;
        Ok(Self(fd))
    }

    async fn write(&self, bytes: &[u8]) -> Result<(), TransferError> {
        let mut rest = bytes;
        while !rest.is_empty() {
            let count = when_ready(|| write_now(&self.0, rest)).await?;
            rest = rest.get(count..).unwrap_or_default();
        }
        Ok(())
    }

    async fn read(&self) -> Result<Vec<u8>, TransferError> {
        let (mut all, mut piece) = (Vec::with_capacity(STATE_BYTES), [0; BYTES_MAX]);
        loop {
            let count = when_ready(|| read_now(&self.0, &mut piece)).await?;
            if count == 0 {
                return Ok(all);
            }
            all.extend_from_slice(piece.get(..count).unwrap_or_default());
            if all.len() > BYTES_MAX {
                return Err(TransferError::TooLong);
            }
        }
    }
}

/// Tries until there is something to be had.
async fn when_ready(mut what: impl FnMut() -> rustix::io::Result<usize>) -> io::Result<usize> {
    loop {
        match what() {
            Err(Errno::AGAIN | Errno::INTR) => tokio::time::sleep(LOOK).await,
            other => return Ok(other?),
        }
    }
}

/// Reads what there is. Does not wait even if the front end, which may have kept a copy of this end, takes the non-blocking
/// flag away; kernels before 6.4 cannot promise that of a pipe, and there the flag has to do.
fn read_now(fd: &OwnedFd, into: &mut [u8]) -> rustix::io::Result<usize> {
    let mut into = [IoSliceMut::new(into)];
    match rustix::io::preadv2(fd, &mut into, CURRENT_POSITION, ReadWriteFlags::NOWAIT) {
        Err(Errno::OPNOTSUPP) => rustix::io::readv(fd, &mut into),
        other => other,
    }
}

/// Writes what there is room for, as [`read_now`] reads.
fn write_now(fd: &OwnedFd, from: &[u8]) -> rustix::io::Result<usize> {
    let from = [IoSlice::new(from)];
    match rustix::io::pwritev2(fd, &from, CURRENT_POSITION, ReadWriteFlags::NOWAIT) {
        Err(Errno::OPNOTSUPP) => rustix::io::writev(fd, &from),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::time::Instant;

    use crate::blk::CacheMode;
    use crate::blk::Serial;

    const STATE: DeviceState = DeviceState {
        block_size: 512,
        capacity: 1 << 20,
        features: 1 << 32,
        serial: Serial([b'x'; 20]),
        status: 15,
        writeback: CacheMode::WriteBack,
    };

    fn run<T>(future: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        tokio::task::LocalSet::new().block_on(&runtime, future)
    }

    fn pipe() -> (OwnedFd, OwnedFd) {
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap()
    }

    #[test]
    fn a_state_goes_through_a_pipe_and_back() {
        run(async {
            let (reading, writing) = pipe();
            let saving = Transfer::save(writing, &STATE).unwrap();
            assert_eq!(saving.finish().await.unwrap(), None);
            let loading = Transfer::load(reading).unwrap();
            assert_eq!(loading.finish().await.unwrap(), Some(STATE), "the pipe was closed");
        });
    }

    #[test]
    fn a_front_end_that_does_not_close_or_read_is_not_waited_for() {
        run(async {
            let begin = Instant::now();
            let (reading, mut writing) = pipe();
            rustix::io::write(&mut writing, &STATE.encode()).unwrap();
            let loading = Transfer::load(reading).unwrap();
            assert!(matches!(loading.finish().await, Err(TransferError::TimedOut)));
            // A full pipe.
            let (_reading, writing) = pipe();
            let mut file = std::fs::File::from(writing.try_clone().unwrap());
            let size = rustix::pipe::fcntl_getpipe_size(&writing).unwrap();
            file.write_all(&vec![0; size]).unwrap();
            let saving = Transfer::save(writing, &STATE).unwrap();
            assert!(matches!(saving.finish().await, Err(TransferError::TimedOut)));
            assert!(begin.elapsed() < Duration::from_secs(20));
        });
    }

    #[test]
    fn a_flag_that_is_taken_away_makes_nobody_wait() {
        let (reading, _writing) = pipe();
        let begin = Instant::now();
        let probe = read_now(&reading, &mut [0; 16]);
        // The descriptor blocks. A kernel that knows the other way says that there is nothing.
        assert_eq!(probe, Err(Errno::AGAIN));
        assert!(begin.elapsed() < Duration::from_secs(5));
    }

    #[test]
    fn a_state_without_end_is_given_up() {
        run(async {
            let (reading, writing) = pipe();
            let mut file = std::fs::File::from(writing);
            file.write_all(&[0; BYTES_MAX + 1]).unwrap();
            let loading = Transfer::load(reading).unwrap();
            assert!(matches!(loading.finish().await, Err(TransferError::TooLong)));
        });
    }

    #[test]
    fn what_is_no_pipe_is_refused_and_one_that_nobody_reads_is_an_error() {
        run(async {
            let null = std::fs::File::open("/dev/null").unwrap();
            let null = null.as_fd().try_clone_to_owned().unwrap();
            assert!(matches!(Transfer::load(null), Err(TransferError::NotAPipe)));
            let (reading, writing) = pipe();
            drop(reading);
            let saving = Transfer::save(writing, &STATE).unwrap();
            assert!(matches!(saving.finish().await, Err(TransferError::Pipe(_))));
            let (reading, writing) = pipe();
            let wrong_end = Transfer::load(writing).unwrap();
            assert!(wrong_end.finish().await.is_err());
            drop(reading);
        });
        let (reading, writing) = pipe();
        let dropped = run(async { Transfer::save(writing, &STATE).map(drop) });
        assert!(dropped.is_ok());
        let mut rest = Vec::new();
        std::fs::File::from(reading).read_to_end(&mut rest).unwrap();
        assert!(rest.is_empty() || rest == STATE.encode(), "closed with its owner");
    }
}
