//! A front end's socket: whole messages with their descriptors in, bytes out.
//!
//! Descriptors arrive with the first byte of the message that they belong to. They are owned from the moment they arrive, so
//! whatever a message turns out to be, nothing leaks.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use tokio::io::Interest;
use tokio::net::UnixStream;

use crate::message::{DecodeError, Header};
use crate::protocol::{FDS_MAX, HEADER_BYTES};

/// A message as it came.
#[derive(Debug)]
pub(crate) struct Received {
    pub(crate) header: Header,
    pub(crate) body: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
}

/// Why nothing could be received.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SocketError {
    /// The socket failed.
    #[error("the socket failed: {0}")]
    Io(#[from] io::Error),
    /// The peer went away within a message.
    #[error("the front end went away in the middle of a message")]
    Truncated,
    /// Not a message.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// More descriptors than any message has.
    #[error("a message came with more than {FDS_MAX} file descriptors")]
    TooManyDescriptors,
}

/// Closing a socket that a front end has sent must not wait for who does not read from it; and it may be closed anywhere.
fn never_linger(fd: &OwnedFd) {
    // Most are no sockets.
    let _ = rustix::net::sockopt::set_socket_linger(fd, None);
}

/// The back end's end of a connection.
#[derive(Debug)]
pub(crate) struct Socket(UnixStream);

impl Socket {
    pub(crate) fn new(stream: UnixStream) -> Self {
        Self(stream)
    }

    /// The next message; none when the front end has closed the connection between two.
    pub(crate) async fn receive(&self) -> Result<Option<Received>, SocketError> {
        let (mut header, mut fds) = ([0; HEADER_BYTES], Vec::new());
        match self.fill(&mut header, &mut fds).await? {
            0 => return Ok(None),
            HEADER_BYTES => {}
            _ => return Err(SocketError::Truncated),
        }
        let header = Header::decode(&header)?;
        let mut body = vec![0; header.size as usize];
        if self.fill(&mut body, &mut fds).await? != body.len() {
            return Err(SocketError::Truncated);
        }
        Ok(Some(Received { header, body, fds }))
    }

    /// Reads until `into` is full or the peer has closed; answers how many bytes came.
    async fn fill(&self, into: &mut [u8], fds: &mut Vec<OwnedFd>) -> Result<usize, SocketError> {
        let mut filled = 0;
        while let Some(rest) = into.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            let read = || receive_some(&self.0, rest);
            let (count, mut came, flags) = self.0.async_io(Interest::READABLE, read).await?;
            came.iter().for_each(never_linger);
            fds.append(&mut came);
            if flags.contains(ReturnFlags::CTRUNC) || fds.len() > FDS_MAX {
                return Err(SocketError::TooManyDescriptors);
            }
            if count == 0 {
                break;
            }
            filled += count;
        }
        Ok(filled)
    }

    /// Sends all of `bytes`, and beside the first of them a descriptor.
    pub(crate) async fn send(&self, bytes: &[u8], fd: Option<OwnedFd>) -> io::Result<()> {
        let mut sent = 0;
        if let Some(fd) = fd {
            let write = || send_with(&self.0, bytes, &fd);
            sent = self.0.async_io(Interest::WRITABLE, write).await?;
        }
        while let Some(rest) = bytes.get(sent..).filter(|rest| !rest.is_empty()) {
            let write = || Ok(rustix::net::send(&self.0, rest, SendFlags::NOSIGNAL)?);
            sent += self.0.async_io(Interest::WRITABLE, write).await?;
        }
        Ok(())
    }

    /// Ends the connection for both sides, whoever still holds it here.
    pub(crate) fn close(&self) {
        // One that the front end has ended already is no error.
        let _ = rustix::net::shutdown(&self.0, rustix::net::Shutdown::Both);
    }

    /// Whether the front end has closed its end, whatever it may have sent before that.
    pub(crate) fn is_closed(&self) -> bool {
        let mut fds = [PollFd::new(&self.0, PollFlags::RDHUP)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        rustix::event::poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
    }
}

/// One `sendmsg` of bytes and a descriptor: how many bytes went.
fn send_with(stream: &UnixStream, bytes: &[u8], fd: &OwnedFd) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [fd.as_fd()];
    // There is room for exactly this one.
    let _ = control.push(SendAncillaryMessage::ScmRights(&fds));
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    Ok(rustix::net::sendmsg(stream, &[IoSlice::new(bytes)], &mut control, flags)?)
}

/// One `recvmsg`: how many bytes, the descriptors that came with them, and whether there were more of those.
fn receive_some(
    stream: &UnixStream,
    into: &mut [u8],
) -> io::Result<(usize, Vec<OwnedFd>, ReturnFlags)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = [IoSliceMut::new(into)];
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let message = rustix::net::recvmsg(stream, &mut bytes, &mut control, flags)?;
    let mut fds = Vec::new();
    for control in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = control {
            fds.extend(rights);
        }
    }
    Ok((message.bytes, fds, message.flags))
}
