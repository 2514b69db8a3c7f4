//! Constants of the vhost-user protocol and of virtio-blk, with where they are written down.
//!
//! "vhost-user" is QEMU's `docs/interop/vhost-user.rst`; "virtio" is the OASIS virtio specification 1.3. Nothing here has
//! behaviour: what a message means is in [`crate::message`] and [`crate::session`], what a request does in [`crate::blk`].

/// Bytes of a message header (vhost-user, "Header").
pub const HEADER_BYTES: usize = 12;
/// The longest message body taken. The longest that the protocol knows is a memory table of 8 regions.
pub const BODY_BYTES_MAX: usize = 4096;
/// The most descriptors with one message (vhost-user, "Memory regions description": 8 regions).
pub const FDS_MAX: usize = 8;
/// The most regions of one SET_MEM_TABLE.
pub const TABLE_REGIONS_MAX: usize = 8;
/// Memory slots offered with CONFIGURE_MEM_SLOTS: what QEMU's own back ends offer, and all that x86 guests have.
pub const MEMORY_SLOTS_MAX: usize = 509;
/// The most virtqueues of a device: a kick message names the ring in 8 bits.
pub const QUEUES_MAX: u16 = 256;
/// The longest ring (virtio 2.7, "Split Virtqueues").
pub const RING_SIZE_MAX: u16 = 32768;
/// The longest configuration space (vhost-user, "Virtio device config space").
pub const CONFIG_BYTES_MAX: usize = 256;

/// Header flags (vhost-user, "Header").
pub mod flags {
    /// Bits that carry the version.
    pub const VERSION_MASK: u32 = 0x3;
    /// The one version.
    pub const VERSION: u32 = 0x1;
    /// The message is a reply.
    pub const REPLY: u32 = 1 << 2;
    /// The sender wants a reply even where the message has none of its own (REPLY_ACK).
    pub const NEED_REPLY: u32 = 1 << 3;
}

/// In kick, call and error messages: the bits that name the ring, and the bit that says there is no descriptor.
pub mod vring_fd {
    /// The ring.
    pub const INDEX_MASK: u64 = 0xff;
    /// No descriptor: poll.
    pub const NO_FD: u64 = 1 << 8;
}

/// Flags of SET_VRING_ADDR (vhost-user, "A vring address description").
pub mod vring_flags {
    /// Writes to the used ring are logged, at the guest address that is given.
    pub const LOG: u32 = 1 << 0;
}

/// Virtio feature bits (virtio 6 "Reserved Feature Bits", 5.2.3 "Block Device / Feature bits").
pub mod features {
    /// The longest segment is in the configuration space.
    pub const SIZE_MAX: u64 = 1 << 1;
    /// Most segments of a request are in the configuration space.
    pub const SEG_MAX: u64 = 1 << 2;
    /// The disk is read-only.
    pub const RO: u64 = 1 << 5;
    /// The block size is in the configuration space.
    pub const BLK_SIZE: u64 = 1 << 6;
    /// The cache can be flushed.
    pub const FLUSH: u64 = 1 << 9;
    /// The topology is in the configuration space.
    pub const TOPOLOGY: u64 = 1 << 10;
    /// The cache mode can be read and set.
    pub const CONFIG_WCE: u64 = 1 << 11;
    /// Several request queues.
    pub const MQ: u64 = 1 << 12;
    /// Discard.
    pub const DISCARD: u64 = 1 << 13;
    /// Write zeroes.
    pub const WRITE_ZEROES: u64 = 1 << 14;
    /// What the device writes to guest memory is logged (vhost-user's `VHOST_F_LOG_ALL`, never passed on to the guest).
    pub const LOG_ALL: u64 = 1 << 26;
    /// Indirect descriptors.
    pub const RING_INDIRECT_DESC: u64 = 1 << 28;
    /// Event indexes.
    pub const RING_EVENT_IDX: u64 = 1 << 29;
    /// vhost-user protocol features can be negotiated (never passed on to the guest).
    pub const PROTOCOL_FEATURES: u64 = 1 << 30;
    /// Virtio 1.0 and later: little-endian, no legacy layout.
    pub const VERSION_1: u64 = 1 << 32;
    /// Packed rings.
    pub const RING_PACKED: u64 = 1 << 34;
}

/// vhost-user protocol feature bits (vhost-user, "Protocol features").
pub mod protocol_features {
    /// Several queues.
    pub const MQ: u64 = 1 << 0;
    /// The dirty log is shared memory that comes with SET_LOG_BASE.
    pub const LOG_SHMFD: u64 = 1 << 1;
    /// Replies on demand.
    pub const REPLY_ACK: u64 = 1 << 3;
    /// A channel on which the back end sends.
    pub const BACKEND_REQ: u64 = 1 << 5;
    /// Guest memory may arrive while the guest runs: post-copy.
    pub const PAGEFAULT: u64 = 1 << 8;
    /// The configuration space is served by the back end.
    pub const CONFIG: u64 = 1 << 9;
    /// Requests in flight are tracked in shared memory.
    pub const INFLIGHT_SHMFD: u64 = 1 << 12;
    /// RESET_DEVICE.
    pub const RESET_DEVICE: u64 = 1 << 13;
    /// Memory is added and removed slot by slot.
    pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    /// The virtio status is sent.
    pub const STATUS: u64 = 1 << 16;
    /// What the device is besides rings and disk can be saved and loaded.
    pub const DEVICE_STATE: u64 = 1 << 19;
}

/// Requests from the front end (vhost-user, "Front-end message types").
pub mod request {
    /// No request: QEMU's acknowledgement of memory in post-copy, where nothing had changed.
    pub const NONE: u32 = 0;
    /// Which virtio features there are.
    pub const GET_FEATURES: u32 = 1;
    /// Which are used.
    pub const SET_FEATURES: u32 = 2;
    /// The sender owns the session.
    pub const SET_OWNER: u32 = 3;
    /// Deprecated.
    pub const RESET_OWNER: u32 = 4;
    /// The whole memory table.
    pub const SET_MEM_TABLE: u32 = 5;
    /// The dirty log.
    pub const SET_LOG_BASE: u32 = 6;
    /// The descriptor that tells of dirtied pages.
    pub const SET_LOG_FD: u32 = 7;
    /// Entries of a ring.
    pub const SET_VRING_NUM: u32 = 8;
    /// Addresses of a ring.
    pub const SET_VRING_ADDR: u32 = 9;
    /// Where a ring goes on.
    pub const SET_VRING_BASE: u32 = 10;
    /// Stop a ring and say where it stands.
    pub const GET_VRING_BASE: u32 = 11;
    /// The descriptor a guest kicks.
    pub const SET_VRING_KICK: u32 = 12;
    /// The descriptor that interrupts the guest.
    pub const SET_VRING_CALL: u32 = 13;
    /// The descriptor that tells of errors.
    pub const SET_VRING_ERR: u32 = 14;
    /// Which protocol features there are.
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    /// Which are used.
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    /// The most queues.
    pub const GET_QUEUE_NUM: u32 = 17;
    /// Enable or disable a ring.
    pub const SET_VRING_ENABLE: u32 = 18;
    /// The channel on which the back end sends.
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    /// Read the configuration space.
    pub const GET_CONFIG: u32 = 24;
    /// Write it.
    pub const SET_CONFIG: u32 = 25;
    /// A migration has begun that may become post-copy: a userfaultfd is wanted.
    pub const POSTCOPY_ADVISE: u32 = 28;
    /// It has become post-copy: memory that is shared from now on arrives later.
    pub const POSTCOPY_LISTEN: u32 = 29;
    /// All of memory has arrived.
    pub const POSTCOPY_END: u32 = 30;
    /// Make memory in which requests in flight are tracked.
    pub const GET_INFLIGHT_FD: u32 = 31;
    /// Track them there.
    pub const SET_INFLIGHT_FD: u32 = 32;
    /// Reset the device.
    pub const RESET_DEVICE: u32 = 34;
    /// The most memory slots.
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    /// Add a slot.
    pub const ADD_MEM_REG: u32 = 37;
    /// Remove one.
    pub const REM_MEM_REG: u32 = 38;
    /// The virtio status.
    pub const SET_STATUS: u32 = 39;
    /// Read it back.
    pub const GET_STATUS: u32 = 40;
    /// A pipe to save the device's state to, or to load it from.
    pub const SET_DEVICE_STATE_FD: u32 = 42;
    /// How that went.
    pub const CHECK_DEVICE_STATE: u32 = 43;
}

/// Requests from the back end (vhost-user, "Back-end message types").
pub mod backend_request {
    /// The configuration space has changed.
    pub const CONFIG_CHANGE_MSG: u32 = 2;
}

/// SET_DEVICE_STATE_FD (vhost-user, "Device state transfer parameters").
pub mod device_state {
    /// The back end writes its state.
    pub const SAVE: u32 = 0;
    /// It reads one.
    pub const LOAD: u32 = 1;
    /// All rings are stopped: the one phase of a migration that there is.
    pub const STOPPED: u32 = 0;
    /// In the answer: it comes with no descriptor, the one that was given is used.
    pub const NO_FD: u64 = 1 << 8;
    /// In the answer, in bits 0 to 7: it failed.
    pub const FAILED: u64 = 1;
}

/// Bits of the virtio status (virtio 2.1).
pub mod device_status {
    /// The driver is ready to use the device.
    pub const DRIVER_OK: u8 = 4;
}

/// Flags of SET_CONFIG (vhost-user, "Virtio device config space").
pub mod config_flags {
    /// A guest has written a writable field.
    pub const WRITABLE: u32 = 0;
    /// The whole space is restored on the destination of a live migration.
    pub const LIVE_MIGRATION: u32 = 1;
}

/// Descriptor flags (virtio 2.7.5).
pub mod descriptor_flags {
    /// Another descriptor follows.
    pub const NEXT: u16 = 1;
    /// The device writes the buffer.
    pub const WRITE: u16 = 2;
    /// The buffer holds a table of descriptors.
    pub const INDIRECT: u16 = 4;
    /// Packed rings: the driver's mark (virtio 2.8.1).
    pub const AVAIL: u16 = 1 << 7;
    /// Packed rings: the device's mark.
    pub const USED: u16 = 1 << 15;
}

/// virtio-blk request types (virtio 5.2.6).
pub mod blk_type {
    /// Read.
    pub const IN: u32 = 0;
    /// Write.
    pub const OUT: u32 = 1;
    /// Flush.
    pub const FLUSH: u32 = 4;
    /// Identify.
    pub const GET_ID: u32 = 8;
    /// Discard.
    pub const DISCARD: u32 = 11;
    /// Write zeroes.
    pub const WRITE_ZEROES: u32 = 13;
}

/// virtio-blk status bytes (virtio 5.2.6).
pub mod blk_status {
    /// Done.
    pub const OK: u8 = 0;
    /// Failed.
    pub const IOERR: u8 = 1;
    /// Not known, or with a flag not known.
    pub const UNSUPP: u8 = 2;
}

/// Bytes of a sector: the unit of every virtio-blk request, whatever the block size (virtio 5.2.6).
pub const SECTOR: u64 = 512;
/// Bytes of a virtio-blk request header.
pub const BLK_HEADER_BYTES: usize = 16;
/// Bytes of one discard or write-zeroes segment.
pub const BLK_RANGE_BYTES: usize = 16;
/// Bytes that GET_ID answers (virtio 5.2.6: a serial, NUL-padded, not necessarily terminated).
pub const SERIAL_BYTES: usize = 20;
