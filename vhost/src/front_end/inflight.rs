//! The record of requests in flight that a back end keeps in memory of the front end's keeping (vhost-user, "Inflight I/O
//! tracking"). What is in it is the back end's affair; here it is only kept from one connection to the next.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::message::InflightDescription;

/// The record of one device.
#[derive(Debug)]
pub(super) struct Inflight {
    fd: OwnedFd,
    description: InflightDescription,
}

impl Inflight {
    /// What a back end answered. None where it has no record to keep.
    pub(super) fn new(fd: OwnedFd, description: InflightDescription) -> Option<Self> {
        (description.mmap_size > 0).then_some(Self { fd, description })
    }

    /// What is sent to the next back end.
    pub(super) fn description(&self) -> InflightDescription {
        self.description
    }

    /// The descriptor that goes with it.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
