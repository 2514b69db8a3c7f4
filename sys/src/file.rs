//! File locks that belong to the open file: what keeps two writers off one disk image. And extents that two files share.
//!
//! Open-file-description locks (fcntl(2), Linux) are used because they have the lifetime that matters. A process-wide
//! POSIX lock goes as soon as *any* descriptor of the file is closed; an OFD lock goes when the last reference to the open
//! file goes, and a request that a killed process left in the kernel is such a reference. So a restarted target cannot get
//! the lock before the old one's last write has landed. Image locks of QEMU are of the same kind and conflict with ours,
//! which span the whole file.
//!
//! `rustix` has process-wide locks only, and clones whole files only; hence this file.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// What a lock allows its holder, and others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lock {
    /// Readers may share it; no writer beside them.
    Shared,
    /// Nobody beside the holder.
    Exclusive,
}

impl Lock {
    fn raw(self) -> libc::flock {
        // SAFETY: a zeroed flock is a valid value: from the start (SEEK_SET is 0), to the end of any length, pid 0 as OFD
        // locks demand.
        let mut lock: libc::flock = unsafe { std::mem::zeroed() };
        let kind = match self {
            Self::Shared => libc::F_RDLCK,
            Self::Exclusive => libc::F_WRLCK,
        };
        #[allow(clippy::cast_possible_truncation)] // the constants are 0 to 2
        let kind = kind as libc::c_short;
        lock.l_type = kind;
        lock
    }
}

/// Locks the whole file for as long as the open file lives. Taking a lock again changes its kind. Does not wait.
///
/// # Errors
/// [`io::ErrorKind::WouldBlock`] if somebody has it, or what the file system says: some know no locks.
pub fn try_lock(fd: BorrowedFd<'_>, lock: Lock) -> io::Result<()> {
    let raw = lock.raw();
    // SAFETY: the descriptor is open for the borrow and `raw` outlives the call.
    let result = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_SETLK, &raw const raw) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Makes a range of `target` share the extents of the same range of `source` (ioctl_ficlonerange(2)): both read the same afterwards,
/// and whichever is written gets an extent of its own. Offset and length are bytes, multiples of the file system's block.
///
/// # Errors
/// What the kernel says: `EOPNOTSUPP`, `EXDEV` or `EINVAL` where it cannot be done.
pub fn clone_range(
    source: BorrowedFd<'_>,
    target: BorrowedFd<'_>,
    offset: u64,
    length: u64,
) -> io::Result<()> {
    let range = libc::file_clone_range {
        src_fd: source.as_raw_fd().into(),
        src_offset: offset,
        src_length: length,
        dest_offset: offset,
    };
    // SAFETY: both descriptors are open for their borrows, and `range` is read only, during the call.
    let result = unsafe { libc::ioctl(target.as_raw_fd(), libc::FICLONERANGE, &raw const range) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::AsFd;

    fn open_twice() -> (File, File) {
        let file = tempfile::NamedTempFile::new().unwrap();
        (file.reopen().unwrap(), file.reopen().unwrap())
    }

    #[test]
    fn an_exclusive_lock_keeps_the_same_process_out_too() {
        let (one, two) = open_twice();
        try_lock(one.as_fd(), Lock::Exclusive).unwrap();
        for lock in [Lock::Shared, Lock::Exclusive] {
            let error = try_lock(two.as_fd(), lock).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        }
        drop(one);
        try_lock(two.as_fd(), Lock::Exclusive).unwrap();
    }

    #[test]
    fn readers_share_and_a_copied_descriptor_keeps_the_lock() {
        let (one, two) = open_twice();
        try_lock(one.as_fd(), Lock::Shared).unwrap();
        try_lock(two.as_fd(), Lock::Shared).unwrap();
        let copy = one.try_clone().unwrap();
        drop(one);
        assert!(try_lock(two.as_fd(), Lock::Exclusive).is_err());
        drop(copy);
        try_lock(two.as_fd(), Lock::Exclusive).unwrap();
    }
}
