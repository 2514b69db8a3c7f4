//! The back channel: the socket on which a back end sends (SET_BACKEND_REQ_FD).

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use rustix::net::SendFlags;

use crate::message::backend_notice;
use crate::protocol::backend_request;

/// A back channel.
#[derive(Debug)]
pub(crate) struct BackChannel(UnixStream);

impl BackChannel {
    pub(crate) fn new(fd: OwnedFd) -> Self {
        Self(UnixStream::from(fd))
    }

    /// Says that the configuration space has changed. Never waits: a front end that does not read its channel misses it.
    pub(crate) fn config_changed(&self) -> io::Result<()> {
        let notice = backend_notice(backend_request::CONFIG_CHANGE_MSG);
        rustix::net::send(&self.0, &notice, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)?;
        Ok(())
    }
}
