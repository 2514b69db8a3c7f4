//! The vhost-user-blk back end and front end: protocol, virtqueues, virtio-blk.

pub mod front_end;
