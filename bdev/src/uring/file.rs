//! Opening the file or block device behind a `uring` bdev: its kind, size, alignment and lock.
//!
//! Everything here runs on control threads and may block for as long as an `open` does. What is refused is refused here, in
//! words, so that the data side meets only what a file can do to a well-formed request.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use resilver_sys::PAGE_SIZE;
use resilver_sys::file::{Lock, try_lock};
use rustix::fs::{AtFlags, FallocateFlags, OFlags, SeekFrom, StatxFlags};
use rustix::io::Errno;

use crate::device::{BLOCK_SIZE_MAX, BLOCK_SIZE_MIN, BdevError};
use crate::identity::FileIdentity;

/// How long a lock is waited for. A submission thread lets go of the file of a closed ring a few milliseconds later, so a
/// bdev that is deleted and made again would otherwise find its own lock; whoever really has the file keeps it longer.
const LOCK_GRACE: Duration = Duration::from_millis(200);
/// Between two tries.
const LOCK_STEP: Duration = Duration::from_millis(5);

/// What kind of file it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FileKind {
    Regular,
    BlockDevice,
}

/// What transfers have to be multiples of, bytes; powers of two. All ones for a buffered file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Alignment {
    /// Of each buffer in memory.
    pub(super) memory: u32,
    /// Of offset and length in the file, and of each buffer's length.
    pub(super) offset: u32,
}

impl Alignment {
    const NONE: Self = Self { memory: 1, offset: 1 };
}

/// A file that is open, locked and understood.
#[derive(Debug)]
pub(super) struct OpenFile {
    pub(super) fd: Arc<OwnedFd>,
    pub(super) kind: FileKind,
    /// Bytes when it was opened.
    pub(super) size: u64,
    pub(super) alignment: Alignment,
    /// Whether deallocating works: tried, or asked of the device.
    pub(super) deallocates: bool,
    /// Whether its data is in the host's memory, so that no read or write waits for a device.
    pub(super) in_memory: bool,
    /// What it is locked with, if at all.
    pub(super) lock: Option<Lock>,
    pub(super) identity: FileIdentity,
}

/// Who else may have the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Others {
    /// Nobody who writes, and nobody at all beside a writer: it is locked.
    KeptOut,
    /// Anybody: it is not locked, and a lock of theirs is not minded.
    LetBe,
}

/// Opens, locks and examines.
pub(super) fn open(
    path: &Path,
    read_only: bool,
    direct: bool,
    others: Others,
) -> Result<OpenFile, BdevError> {
    let failed = |action, source: io::Error| {
        let hint = hint(&source, read_only, direct).to_owned();
        BdevError::File { action, path: path.to_owned(), source, hint }
    };
    let canonical = path.canonicalize().map_err(|error| failed("opening", error))?;
    // Looked at before it is opened: opening a pipe or a terminal would wait.
    let kind = kind_of(&canonical).map_err(|error| failed("opening", error))?.ok_or_else(|| {
        BdevError::Invalid {
            parameter: "filename",
            value: path.display().to_string(),
            expected: "a regular file or a block device was expected".to_owned(),
        }
    })?;
    let mut flags = OFlags::empty();
    flags.set(OFlags::DIRECT, direct);
    // On a block device O_EXCL asks the kernel that nobody has it mounted or otherwise claimed (open(2)).
    let claimed = kind == FileKind::BlockDevice && !read_only && others == Others::KeptOut;
    flags.set(OFlags::EXCL, claimed);
    let file = OpenOptions::new()
        .read(true)
        .write(!read_only)
        .custom_flags(flags.bits().cast_signed())
        .open(&canonical)
        .map_err(|error| failed("opening", error))?;

    let lock = match others {
        Others::LetBe => None,
        Others::KeptOut if read_only => Some(Lock::Shared),
        Others::KeptOut => Some(Lock::Exclusive),
    };
    lock.map_or(Ok(()), |lock| lock_soon(file.as_fd(), lock)).map_err(|error| {
        match error.kind() {
            io::ErrorKind::WouldBlock => {
                BdevError::Locked { path: path.to_owned(), holder: super::holder::describe(&file) }
            }
            _ => failed("locking", error),
        }
    })?;

    let size = rustix::fs::seek(&file, SeekFrom::End(0))
        .map_err(|error| failed("finding the size of", error.into()))?;
    let alignment = if direct {
        alignment(file.as_fd(), kind).map_err(|error| failed("asking the alignment of", error))?
    } else {
        Alignment::NONE
    };
    let metadata = file.metadata().map_err(|error| failed("examining", error))?;
    let identity = FileIdentity::of(&metadata, canonical);
    let deallocates = !read_only && deallocates(&file, kind, size);
    let in_memory = kind == FileKind::Regular
        && in_memory(&file).map_err(|error| failed("examining", error))?;
    let fd = Arc::new(file.into());
    Ok(OpenFile { fd, kind, size, alignment, deallocates, in_memory, lock, identity })
}

/// Takes the lock, now or within [`LOCK_GRACE`].
fn lock_soon(fd: BorrowedFd<'_>, lock: Lock) -> io::Result<()> {
    let start = Instant::now();
    loop {
        match try_lock(fd, lock) {
            Err(error)
                if error.kind() == io::ErrorKind::WouldBlock && start.elapsed() < LOCK_GRACE =>
            {
                std::thread::sleep(LOCK_STEP);
            }
            result => return result,
        }
    }
}

/// Makes a new sparse file of `size` bytes, durably: after a crash it is there, whole, or not at all.
///
/// # Errors
/// The path exists, or the file system refuses; nothing is left behind.
pub fn create(path: &Path, size: u64) -> Result<(), BdevError> {
    let failed = |source: io::Error| {
        let hint = match source.kind() {
            io::ErrorKind::AlreadyExists => {
                "; choose another path, or use the file as it is (target_mode existing)"
            }
            _ => hint(&source, false, false),
        };
        let hint = hint.to_owned();
        BdevError::File { action: "creating", path: path.to_owned(), source, hint }
    };
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(failed)?;
    let durable = file.set_len(size).and_then(|()| file.sync_all()).and_then(|()| {
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
    });
    durable.map_err(|error| {
        // Ours, made a moment ago; if it cannot be removed either, the first error is the one to tell.
        let _ = std::fs::remove_file(path);
        failed(error)
    })
}

/// What to do about an error, beginning with a separator.
fn hint(error: &io::Error, read_only: bool, direct: bool) -> &'static str {
    match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::INVAL) if direct => {
            "; if its file system cannot do direct I/O, open it with direct=false"
        }
        Some(Errno::BUSY) => "; it is mounted or otherwise used by this host: release it first",
        Some(Errno::ROFS | Errno::ACCESS | Errno::PERM) if !read_only => {
            "; make it writable for this process, or open it with readonly=true"
        }
        Some(Errno::NOLCK | Errno::OPNOTSUPP) => {
            "; its file system offers no locks, and an unlocked disk could get two writers"
        }
        _ => "",
    }
}

fn kind_of(path: &Path) -> io::Result<Option<FileKind>> {
    let file_type = std::fs::metadata(path)?.file_type();
    Ok(if file_type.is_file() {
        Some(FileKind::Regular)
    } else if file_type.is_block_device() {
        Some(FileKind::BlockDevice)
    } else {
        None
    })
}

/// Whether the file system is tmpfs or ramfs. Their names are asked for, not what they can do: a read that may not wait
/// (`RWF_NOWAIT`) is refused alike by file systems that cannot say and by those that wait for a network.
fn in_memory(file: &File) -> io::Result<bool> {
    /// linux/magic.h.
    const TMPFS: i64 = 0x0102_1994;
    const RAMFS: i64 = 0x8584_58f6;
    Ok(matches!(rustix::fs::fstatfs(file)?.f_type, TMPFS | RAMFS))
}

/// What direct I/O has to be aligned to. Asked of the file system (statx), else of the device, else tried.
fn alignment(fd: BorrowedFd<'_>, kind: FileKind) -> io::Result<Alignment> {
    let status = rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)?;
    let told = StatxFlags::from_bits_retain(status.stx_mask).contains(StatxFlags::DIOALIGN);
    let (memory, offset) = (status.stx_dio_mem_align, status.stx_dio_offset_align);
    if told && memory.is_power_of_two() && offset.is_power_of_two() {
        return Ok(Alignment { memory, offset });
    }
    let offset = match kind {
        FileKind::BlockDevice => rustix::fs::ioctl_blksszget(fd)?,
        FileKind::Regular => tried_alignment(fd)?,
    };
    Ok(Alignment { memory: offset, offset })
}

/// The smallest read that the file system takes (btrfs and tmpfs do not tell). Reads behind the end of a file are not
/// refused by all, so a file too short to try is taken to want pages.
fn tried_alignment(fd: BorrowedFd<'_>) -> io::Result<u32> {
    #[allow(clippy::cast_possible_truncation)] // 4096
    const PAGE: u32 = PAGE_SIZE as u32;
    if rustix::fs::seek(fd, SeekFrom::End(0))? < 2 * u64::from(BLOCK_SIZE_MAX) {
        return Ok(PAGE);
    }
    let mut room = vec![0; 2 * BLOCK_SIZE_MAX as usize];
    let start = room.as_ptr().align_offset(BLOCK_SIZE_MAX as usize);
    let mut offset = BLOCK_SIZE_MIN;
    while offset <= BLOCK_SIZE_MAX {
        let buffer = &mut room[start..start + offset as usize];
        match rustix::io::pread(fd, buffer, u64::from(offset)) {
            Ok(_) => return Ok(offset),
            Err(Errno::INVAL) => offset *= 2,
            Err(error) => return Err(error.into()),
        }
    }
    Err(Errno::INVAL.into())
}

/// Whether ranges can be deallocated.
fn deallocates(file: &File, kind: FileKind, size: u64) -> bool {
    match kind {
        // A hole behind the end of the file changes nothing.
        FileKind::Regular => rustix::fs::fallocate(
            file,
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            size,
            u64::from(BLOCK_SIZE_MAX),
        )
        .is_ok(),
        FileKind::BlockDevice => device_discards(file).unwrap_or(true),
    }
}

/// What the device says; a partition's queue is its disk's.
fn device_discards(file: &File) -> io::Result<bool> {
    let device = file.metadata()?.rdev();
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let directory = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
    let limit = std::fs::read_to_string(directory.join("queue/discard_max_bytes"))
        .or_else(|_| std::fs::read_to_string(directory.join("../queue/discard_max_bytes")))?;
    Ok(limit.trim() != "0")
}
