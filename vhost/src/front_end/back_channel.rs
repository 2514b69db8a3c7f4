//! The back channel: a socket on which the back end sends and the front end answers (vhost-user, "Back-end communication").
//!
//! A block device says one thing there: its configuration space has changed. It may say so often; what counts is that it did.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use super::FrontEndError;
use crate::message::{Header, Reply};
use crate::protocol::{HEADER_BYTES, backend_request};

/// Messages that are taken at once: one that talks without end is listened to again after other things were seen to.
const MESSAGES_MAX: usize = 64;
/// What errors call it.
const NAME: &str = "the back channel";

/// Our end.
#[derive(Debug)]
pub(super) struct BackChannel {
    socket: UnixStream,
    /// The beginning of a message of which the rest has not come.
    header: [u8; HEADER_BYTES],
    filled: usize,
}

impl BackChannel {
    /// Our end, and the one for the back end.
    pub(super) fn new() -> Result<(Self, UnixStream), FrontEndError> {
        let make = || {
            let (socket, theirs) = UnixStream::pair()?;
            socket.set_nonblocking(true)?;
            Ok((Self { socket, header: [0; HEADER_BYTES], filled: 0 }, theirs))
        };
        make().map_err(|source| FrontEndError::Os { what: "make a back channel", source })
    }

    /// Takes what was said, up to so many messages; whether the configuration space has changed.
    pub(super) fn config_changed(&mut self) -> Result<bool, FrontEndError> {
        let (mut changed, mut messages) = (false, 0);
        while messages < MESSAGES_MAX {
            match self.socket.read(&mut self.header[self.filled..]) {
                Ok(0) => return Err(lost(io::ErrorKind::UnexpectedEof.into())),
                Ok(count) => self.filled += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(changed),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(lost(error)),
            }
            if self.filled == HEADER_BYTES {
                self.filled = 0;
                self.take()?;
                (changed, messages) = (true, messages + 1);
            }
        }
        Ok(changed)
    }

    /// Takes one message: there is but one, and it has no body.
    fn take(&mut self) -> Result<(), FrontEndError> {
        let malformed = |what| FrontEndError::Malformed { message: NAME, what };
        let header = Header::decode(&self.header).map_err(|_| malformed("not a header"))?;
        if header.request != backend_request::CONFIG_CHANGE_MSG || header.size != 0 {
            return Err(malformed("a block device says CONFIG_CHANGE_MSG there and nothing else"));
        }
        if header.needs_reply() {
            self.socket.write_all(&Reply::U64(0).encode(header.request)).map_err(lost)?;
        }
        Ok(())
    }
}

impl AsFd for BackChannel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn lost(source: io::Error) -> FrontEndError {
    FrontEndError::Lost { message: NAME, source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::backend_notice;

    #[test]
    fn one_that_talks_without_end_is_interrupted_and_not_forgotten() {
        let (mut channel, mut theirs) = BackChannel::new().unwrap();
        let notices = 3 * MESSAGES_MAX / 2;
        let notice = backend_notice(backend_request::CONFIG_CHANGE_MSG);
        theirs.write_all(&notice.repeat(notices)).unwrap();
        assert!(channel.config_changed().unwrap());
        assert!(channel.config_changed().unwrap(), "there was more");
        assert!(!channel.config_changed().unwrap());
    }
}
