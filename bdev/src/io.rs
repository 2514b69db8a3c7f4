//! One I/O: what it asks, how it is named, how it ends.

use std::fmt;

/// What an I/O does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum IoKind {
    /// Disk to memory.
    Read,
    /// Memory to disk.
    Write,
    /// Make all completed writes durable.
    Flush,
    /// The range is no longer needed; what it reads afterwards is not promised (virtio's discard).
    Unmap,
    /// The range reads zero afterwards; it may be deallocated for that if [`BdevIo::may_unmap`] says so.
    WriteZeroes,
}

impl IoKind {
    /// All kinds, in the order of their discriminants.
    pub const ALL: [Self; 5] =
        [Self::Read, Self::Write, Self::Flush, Self::Unmap, Self::WriteZeroes];

    /// Whether the disk's content may differ afterwards.
    #[must_use]
    pub fn mutates(self) -> bool {
        matches!(self, Self::Write | Self::Unmap | Self::WriteZeroes)
    }

    /// Whether the I/O carries buffers.
    #[must_use]
    pub fn has_payload(self) -> bool {
        matches!(self, Self::Read | Self::Write)
    }

    /// The name that metrics and RPCs use.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Unmap => "unmap",
            Self::WriteZeroes => "write_zeroes",
        }
    }
}

/// How a parent names an I/O to its child: opaque to the child, given back in the completion.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tag(pub u32);

/// One I/O. Offset and length are bytes and multiples of the channel's block size; a flush has neither.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BdevIo {
    /// The parent's name for it.
    pub tag: Tag,
    /// What to do.
    pub kind: IoKind,
    /// [`IoKind::WriteZeroes`] only: the range may be deallocated.
    pub may_unmap: bool,
    /// First byte on the disk.
    pub offset: u64,
    /// Bytes; for reads and writes the sum of the payload's lengths.
    pub length: u64,
}

/// Why an I/O failed: a positive `errno`.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct IoError(i32);

impl IoError {
    /// Input/output error.
    pub const IO: Self = Self(5);
    /// The file system is full.
    pub const NO_SPACE: Self = Self(28);
    /// The request does not fit the device.
    pub const INVALID: Self = Self(22);
    /// The device is read-only.
    pub const READ_ONLY: Self = Self(30);
    /// The device cannot do that.
    pub const NOT_SUPPORTED: Self = Self(95);
    /// The device did not answer in time.
    pub const TIMED_OUT: Self = Self(110);
    /// A guest's buffer is not in its memory.
    pub const FAULT: Self = Self(14);
    /// The operation was cancelled.
    pub const CANCELED: Self = Self(125);

    /// The error of a positive `errno`; anything else counts as [`IoError::IO`].
    #[must_use]
    pub fn from_errno(errno: i32) -> Self {
        if errno > 0 { Self(errno) } else { Self::IO }
    }

    /// The `errno`.
    #[must_use]
    pub fn errno(self) -> i32 {
        self.0
    }

    /// Whether the error says that room ran out: on the file system, in the quota.
    #[must_use]
    pub fn is_no_space(self) -> bool {
        const QUOTA: i32 = 122;
        self == Self::NO_SPACE || self.0 == QUOTA
    }
}

impl fmt::Display for IoError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        std::io::Error::from_raw_os_error(self.0).fmt(f)
    }
}

impl fmt::Debug for IoError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IoError({self})")
    }
}

impl std::error::Error for IoError {}

/// The end of an I/O.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Completion {
    /// The parent's name for it.
    pub tag: Tag,
    /// How it went.
    pub result: Result<(), IoError>,
}
