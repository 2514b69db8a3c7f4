//! `uring`: a file or block device, through io_uring; one in memory within its call, or by Linux AIO where the kernel cannot.
//!
//! The control side ([`Uring`]) opens the file, takes its lock for life and finds what alignment direct I/O really needs;
//! the data side (`channel`) keeps requests in slots. Direct I/O is the default: the guest has a page cache of its own, and
//! what it believes durable after a flush must not hang on ours.
//!
//! A lock is waited for only as long as our own closed rings take to let go. A target that was killed may have left requests in the kernel that hold its lock for a while;
//! whoever opens again after [`BdevError::Locked`] decides how long to go on trying.

mod channel;
mod engine;
mod file;
mod holder;
mod ranges;

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use resilver_sys::RingMode;
use resilver_sys::file::Lock;
use rustix::fs::SeekFrom;
use rustix::io::Errno;

use channel::{MAX_RANGE, MAX_TRANSFER, Parts, UringChannel};
use engine::Queues;
use file::{FileKind, OpenFile, Others};

pub use engine::Engine;
pub use file::create;

use crate::bounce::{Bounce, Pool};
use crate::channel::{IoChannel, Limits};
use crate::device::{BLOCK_SIZE_MIN, Bdev, BdevError, Detail, Extent, Geometry};
use crate::identity::FileIdentity;
use crate::ledger::Ledger;
use crate::sectors::Sectors;
use crate::stats::IoStats;

/// What a guest's file system uses as a page anyway.
const OPTIMAL_IO_MIN: u32 = 4096;

/// How far apart a file in memory is asked whether it has data, bytes: seldom enough to cost nothing beside the copy of so much.
const DATA_STEP: u64 = 1 << 20;

/// How a `uring` bdev is made.
#[derive(Debug, Clone)]
pub struct UringConfig {
    /// Its name.
    pub name: String,
    /// The file or block device.
    pub path: PathBuf,
    /// Bytes of a block; none takes what direct I/O needs, at least 512.
    pub block_size: Option<u32>,
    /// Refuse writes, and share the file with other readers.
    pub read_only: bool,
    /// Bypass the host's page cache.
    pub direct: bool,
    /// How requests reach the kernel, but for those of [`Engine::Inline`], and reads and writes by [`Engine::Aio`].
    pub mode: RingMode,
    /// What carries out reads and writes; none chooses by the file system.
    pub engine: Option<Engine>,
}

/// The control side.
pub struct Uring {
    config: UringConfig,
    file: OpenFile,
    engine: Engine,
    block_size: u32,
    num_blocks: AtomicU64,
    stats: Arc<IoStats>,
}

impl fmt::Debug for Uring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Uring").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Uring {
    /// Opens, locks and examines the file.
    ///
    /// # Errors
    /// [`BdevError::Locked`] if somebody uses it; otherwise what is wrong with it and what to do.
    pub fn open(config: UringConfig) -> Result<Self, BdevError> {
        let file = file::open(&config.path, config.read_only, config.direct, Others::KeptOut)?;
        Self::over(config, file)
    }

    /// The same for whoever measures a file beside those who use it: it is not locked, and no lock of theirs is minded. Never for
    /// what a guest keeps its data on.
    ///
    /// # Errors
    /// As [`Uring::open`], but for the lock.
    pub fn open_unlocked(config: UringConfig) -> Result<Self, BdevError> {
        let file = file::open(&config.path, config.read_only, config.direct, Others::LetBe)?;
        Self::over(config, file)
    }

    /// How a ring for the file works.
    #[must_use]
    pub fn ring_mode(&self) -> RingMode {
        self.engine.ring_mode(self.config.mode.clone())
    }

    /// The open file, for whoever does without a channel. It keeps its lock until the last of its owners has let go.
    #[must_use]
    pub fn file(&self) -> &Arc<OwnedFd> {
        &self.file.fd
    }

    /// The same with the block size that is asked for whatever direct I/O needs: where that needs larger ones, through a view
    /// of smaller sectors. A guest that was told its block size keeps it wherever its disk goes.
    ///
    /// # Errors
    /// As [`Uring::open`].
    pub fn open_in_sectors(mut config: UringConfig) -> Result<Arc<dyn Bdev>, BdevError> {
        let file = file::open(&config.path, config.read_only, config.direct, Others::KeptOut)?;
        let asked = config.block_size;
        config.block_size = asked.map(|asked| asked.max(file.alignment.offset));
        let bdev = Arc::new(Self::over(config, file)?);
        match asked {
            Some(asked) => Sectors::at_most(bdev, asked),
            None => Ok(bdev),
        }
    }

    fn over(config: UringConfig, file: OpenFile) -> Result<Self, BdevError> {
        let block_size = block_size(&config, file.alignment.offset)?;
        let geometry = geometry(&config, file.size, block_size)?;
        let engine = Engine::of(&file, config.direct, config.engine, &config.path)?;
        Ok(Self {
            config,
            file,
            engine,
            block_size,
            num_blocks: AtomicU64::new(geometry.num_blocks),
            stats: Arc::default(),
        })
    }

    /// The last place from `offset` on, in steps, up to which every step has data. Looking for the end of data by `SEEK_HOLE`
    /// walks all of its pages on tmpfs, 10 ms a gigabyte in one call, with the file's lock, for which every write waits, and on a
    /// core that may be a reactor's. A hole between two steps goes unseen, and is found when it is read.
    fn data_seen_upto(&self, offset: u64, size: u64) -> io::Result<u64> {
        let mut at = offset;
        while size - at > DATA_STEP {
            match rustix::fs::seek(&self.file.fd, SeekFrom::Data(at + DATA_STEP)) {
                Ok(data) if data == at + DATA_STEP => at = data,
                Ok(_) | Err(Errno::NXIO) => break,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(at)
    }

    fn os_error(&self, action: &'static str, source: io::Error) -> BdevError {
        let path = self.config.path.clone();
        BdevError::File { action, path, source, hint: String::new() }
    }
}

/// The block size asked for, if the file allows it, or the smallest that it allows.
fn block_size(config: &UringConfig, granule: u32) -> Result<u32, BdevError> {
    let smallest = granule.max(BLOCK_SIZE_MIN);
    match config.block_size {
        None => Ok(smallest),
        Some(asked) if asked >= granule => Ok(asked),
        Some(asked) => Err(BdevError::Invalid {
            parameter: "block_size",
            value: asked.to_string(),
            expected: format!(
                "direct I/O on '{}' needs blocks of at least {smallest} bytes: give block_size={smallest}, or open it with \
                 direct=false",
                config.path.display()
            ),
        }),
    }
}

/// The file's geometry, if its size is one.
fn geometry(config: &UringConfig, size: u64, block_size: u32) -> Result<Geometry, BdevError> {
    let block = u64::from(block_size);
    if size > 0 && size.is_multiple_of(block) {
        return Geometry::new(block_size, size / block);
    }
    let fitting = size.next_multiple_of(block).max(block);
    Err(BdevError::Invalid {
        parameter: "filename",
        value: config.path.display().to_string(),
        expected: format!(
            "its size is {size} bytes and must be a multiple of the block size of {block_size} bytes, and not zero; `truncate -s {fitting}` would \
             make it one"
        ),
    })
}

impl Bdev for Uring {
    fn name(&self) -> &str {
        &self.config.name
    }

    fn module(&self) -> &'static str {
        "uring"
    }

    fn geometry(&self) -> Geometry {
        Geometry {
            block_size: self.block_size,
            num_blocks: self.num_blocks.load(Ordering::Relaxed),
        }
    }

    fn read_only(&self) -> bool {
        self.config.read_only
    }

    fn open_channel(&self, depth: u32) -> Result<Box<dyn IoChannel>, BdevError> {
        let resources =
            |reason: String| BdevError::Resources { name: self.config.name.clone(), reason };
        let slots = u32::try_from(Ledger::slots(depth)).unwrap_or(u32::MAX);
        let queues = Queues::new(self.engine, &self.file.fd, slots, self.config.mode.clone())
            .map_err(resources)?;
        let pool = if self.config.direct { Pool::Full } else { Pool::ZeroesOnly };
        let bounce = Bounce::new(pool).map_err(|error| resources(error.to_string()))?;
        let limits = Limits {
            block_size: self.block_size,
            num_blocks: self.num_blocks.load(Ordering::Relaxed),
            max_transfer: MAX_TRANSFER,
            max_segments: crate::SEGMENTS_MAX_U32,
            max_unmap: MAX_RANGE,
            unmap: self.file.deallocates,
            zeroes_unmap: self.file.deallocates,
            optimal_io: self.block_size.max(OPTIMAL_IO_MIN),
            read_only: self.config.read_only,
        };
        let parts =
            Parts { limits, queues, bounce, alignment: self.file.alignment, file: self.file.kind };
        Ok(Box::new(UringChannel::new(depth, parts)))
    }

    fn extent(&self, offset: u64) -> io::Result<Extent> {
        let size = self.geometry().size();
        let rest = size.saturating_sub(offset);
        let all_data = Extent { offset, length: rest, hole: false };
        let data = match rustix::fs::seek(&self.file.fd, SeekFrom::Data(offset)) {
            Ok(data) => data.min(size),
            Err(Errno::NXIO) => return Ok(Extent { offset, length: rest, hole: true }),
            // Block devices and some file systems do not tell holes.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(all_data),
            Err(error) => return Err(error.into()),
        };
        if data > offset {
            return Ok(Extent { offset, length: data - offset, hole: true });
        }
        let from = if self.file.in_memory { self.data_seen_upto(offset, size)? } else { offset };
        let hole = rustix::fs::seek(&self.file.fd, SeekFrom::Hole(from))?.clamp(offset, size);
        Ok(Extent { offset, length: hole - offset, hole: false })
    }

    fn resize(&self, size: u64) -> Result<(), BdevError> {
        if self.file.kind == FileKind::BlockDevice || self.config.read_only {
            return Err(BdevError::NotSupported {
                name: self.config.name.clone(),
                module: self.module(),
                operation: "be resized: only a writable regular file can",
            });
        }
        let geometry = Geometry::of_size(self.block_size, size)?;
        let now = self.geometry();
        if geometry.num_blocks < now.num_blocks {
            return Err(BdevError::Invalid {
                parameter: "size",
                value: size.to_string(),
                expected: format!(
                    "at least the present {} bytes were expected: shrinking would cut off data",
                    now.size()
                ),
            });
        }
        rustix::fs::ftruncate(&self.file.fd, size)
            .and_then(|()| rustix::fs::fsync(&self.file.fd))
            .map_err(|error| self.os_error("growing", error.into()))?;
        self.num_blocks.store(geometry.num_blocks, Ordering::Relaxed);
        Ok(())
    }

    fn regular_file(&self) -> Option<&Arc<OwnedFd>> {
        (self.file.kind == FileKind::Regular).then_some(&self.file.fd)
    }

    fn identity(&self) -> Option<FileIdentity> {
        Some(self.file.identity.clone())
    }

    fn details(&self) -> Vec<(&'static str, Detail)> {
        let text = |text: &str| Detail::Text(text.to_owned());
        let mode = match self.ring_mode() {
            RingMode::Enter | RingMode::Inline => "enter",
            RingMode::SubmissionThread(_) => "sqpoll",
        };
        let lock = match self.file.lock {
            Some(Lock::Shared) => "shared",
            Some(Lock::Exclusive) => "exclusive",
            None => "none",
        };
        let number = |number: u32| Detail::Number(u64::from(number));
        vec![
            ("filename", Detail::Text(self.config.path.display().to_string())),
            ("direct", Detail::Flag(self.config.direct)),
            ("memory_alignment", number(self.file.alignment.memory)),
            ("offset_alignment", number(self.file.alignment.offset)),
            ("engine", text(self.engine.name())),
            ("mode", text(mode)),
            ("lock", text(lock)),
            ("block_device", Detail::Flag(self.file.kind == FileKind::BlockDevice)),
        ]
    }

    fn stats(&self) -> &Arc<IoStats> {
        &self.stats
    }
}
