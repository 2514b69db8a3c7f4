//! The control side of a block device.

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use crate::channel::IoChannel;
use crate::identity::FileIdentity;
use crate::stats::IoStats;

/// Size of a bdev.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes of a block.
    pub block_size: u32,
    /// Blocks.
    pub num_blocks: u64,
}

/// Smallest block, bytes: virtio's sector.
pub const BLOCK_SIZE_MIN: u32 = 512;
/// Largest block, bytes.
pub const BLOCK_SIZE_MAX: u32 = 65536;
/// Largest bdev, bytes: file offsets are signed, and rounding one up must not overflow.
pub const SIZE_MAX: u64 = 1 << 62;

impl Geometry {
    /// A size, checked.
    ///
    /// # Errors
    /// A block that is not a power of two from [`BLOCK_SIZE_MIN`] to [`BLOCK_SIZE_MAX`], no blocks, or more than
    /// [`SIZE_MAX`] bytes.
    pub fn new(block_size: u32, num_blocks: u64) -> Result<Self, BdevError> {
        if !block_size.is_power_of_two() || !(BLOCK_SIZE_MIN..=BLOCK_SIZE_MAX).contains(&block_size)
        {
            return Err(BdevError::Invalid {
                parameter: "block_size",
                value: block_size.to_string(),
                expected: format!(
                    "a power of two from {BLOCK_SIZE_MIN} to {BLOCK_SIZE_MAX} bytes was expected"
                ),
            });
        }
        let size = num_blocks.checked_mul(u64::from(block_size));
        if !size.is_some_and(|size| (1..=SIZE_MAX).contains(&size)) {
            return Err(BdevError::Invalid {
                parameter: "num_blocks",
                value: num_blocks.to_string(),
                expected: format!(
                    "from 1 to {} blocks of {block_size} bytes were expected",
                    SIZE_MAX / u64::from(block_size)
                ),
            });
        }
        Ok(Self { block_size, num_blocks })
    }

    /// The geometry of `size` bytes in blocks of `block_size`.
    ///
    /// # Errors
    /// As [`Geometry::new`], and a size that is not a multiple of the block.
    pub fn of_size(block_size: u32, size: u64) -> Result<Self, BdevError> {
        let block = u64::from(block_size.max(1));
        if !size.is_multiple_of(block) {
            return Err(BdevError::Invalid {
                parameter: "size",
                value: size.to_string(),
                expected: format!(
                    "a multiple of the block size was expected: {} or {} bytes in blocks of {block_size}",
                    size - size % block,
                    (size - size % block).saturating_add(block)
                ),
            });
        }
        Self::new(block_size, size / block)
    }

    /// Bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.num_blocks.saturating_mul(u64::from(self.block_size))
    }
}

/// A piece of a disk that is all data or all hole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// Whether it is known to read zero because nothing is allocated there.
    pub hole: bool,
}

/// One fact that a module wants an operator to see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Detail {
    /// A word or a path.
    Text(String),
    /// A count or size.
    Number(u64),
    /// Yes or no.
    Flag(bool),
}

/// How a bdev stands with the other process that is its medium.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Link {
    /// Whether that is there.
    pub connected: bool,
    /// Connections after the first.
    pub reconnects: u64,
}

/// Why something cannot be done with a bdev. Every message says what is wrong and, where there is one, the way out.
#[derive(Debug, thiserror::Error)]
pub enum BdevError {
    /// No bdev has this name.
    #[error("there is no bdev named '{0}'; bdev_get_bdevs lists them")]
    NotFound(String),
    /// The name is taken.
    #[error("a bdev named '{0}' exists already; choose another name")]
    Exists(String),
    /// A parameter is out of range.
    #[error("{parameter} is {value}: {expected}")]
    Invalid {
        /// The parameter's name.
        parameter: &'static str,
        /// What was given.
        value: String,
        /// What would have been accepted.
        expected: String,
    },
    /// The file or device could not be opened, locked or asked.
    #[error("{action} '{path}' failed: {source}{hint}")]
    File {
        /// What was tried.
        action: &'static str,
        /// The path.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
        /// What to do about it, beginning with a separator; empty where there is nothing to add.
        hint: String,
    },
    /// Another process's export cannot be used, or not as what it is.
    #[error("the export at '{path}' cannot be used as a disk: {reason}")]
    Export {
        /// Its socket.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// Somebody has it locked.
    #[error("'{path}' is in use: {holder}; stop that user first")]
    Locked {
        /// The path.
        path: PathBuf,
        /// Who holds the lock, as far as can be told.
        holder: String,
    },
    /// The bdev is used in a way that excludes what was asked.
    #[error("bdev '{name}' is in use: {by}")]
    Busy {
        /// The bdev.
        name: String,
        /// By what.
        by: String,
    },
    /// The module cannot do that.
    #[error("bdev '{name}' ({module}) cannot {operation}")]
    NotSupported {
        /// The bdev.
        name: String,
        /// Its module.
        module: &'static str,
        /// What was asked.
        operation: &'static str,
    },
    /// The disk was superseded by a switch-over.
    #[error(
        "'{path}' was superseded by '{by}' in a switch-over (generation {generation}): it holds old data; use '{by}', or \
         remove the record with state_forget if that is really what you want"
    )]
    Superseded {
        /// The old disk.
        path: PathBuf,
        /// The disk that took over.
        by: PathBuf,
        /// Counts the switch-overs of this disk.
        generation: u64,
    },
    /// Memory, descriptors or a ring could not be had.
    #[error("cannot open a channel to bdev '{name}': {reason}")]
    Resources {
        /// The bdev.
        name: String,
        /// What was missing.
        reason: String,
    },
}

/// The control side of a block device. Lives on control threads; what reactors use comes from
/// [`Bdev::open_channel`].
pub trait Bdev: Send + Sync {
    /// Its name, unique in a target.
    fn name(&self) -> &str;

    /// The module's name: `null`, `malloc`, `uring`...
    fn module(&self) -> &'static str;

    /// Its size now.
    fn geometry(&self) -> Geometry;

    /// The bdev that a stacked one stands on. Most of what is asked of a stacked bdev is its base's to answer, and the
    /// defaults below ask it.
    fn base(&self) -> Option<&Arc<dyn Bdev>> {
        None
    }

    /// Whether it refuses writes.
    fn read_only(&self) -> bool {
        self.base().is_some_and(|base| base.read_only())
    }

    /// A new channel for up to `depth` I/Os of each kind at once. May be called again while other channels are open.
    ///
    /// # Errors
    /// What could not be had.
    fn open_channel(&self, depth: u32) -> Result<Box<dyn IoChannel>, BdevError>;

    /// The first extent at or after `offset`, which may be asked from any thread and may block: which parts are holes. A hole may
    /// be told as data, never the other way round. The default knows of none, unless the base does.
    ///
    /// # Errors
    /// The file system's.
    fn extent(&self, offset: u64) -> io::Result<Extent> {
        if let Some(base) = self.base() {
            return base.extent(offset);
        }
        let size = self.geometry().size();
        Ok(Extent { offset, length: size.saturating_sub(offset), hole: false })
    }

    /// Changes the size, in bytes. Channels opened before keep the old one.
    ///
    /// # Errors
    /// The module cannot, or the size is not acceptable.
    fn resize(&self, size: u64) -> Result<(), BdevError> {
        if let Some(base) = self.base() {
            return base.resize(size);
        }
        Err(BdevError::NotSupported {
            name: self.name().to_owned(),
            module: self.module(),
            operation: "be resized",
        })
    }

    /// The bdevs it is stacked on.
    fn children(&self) -> Vec<Arc<dyn Bdev>> {
        self.base().cloned().into_iter().collect()
    }

    /// The regular file that it is, byte for byte, if it is one: for what only the kernel can do between two of them.
    fn regular_file(&self) -> Option<&Arc<OwnedFd>> {
        None
    }

    /// The file it stands for, if any.
    fn identity(&self) -> Option<FileIdentity> {
        self.base()?.identity()
    }

    /// What stands for it in the records of switch-overs: its file, or the export that it is.
    fn recorded_as(&self) -> Option<FileIdentity> {
        self.identity().or_else(|| self.base()?.recorded_as())
    }

    /// How it stands with the other process that is its medium; none where it is no other process.
    fn link(&self) -> Option<Link> {
        None
    }

    /// What an operator wants to know about it, in display order.
    fn details(&self) -> Vec<(&'static str, Detail)> {
        Vec::new()
    }

    /// What has been counted of it.
    fn stats(&self) -> &Arc<IoStats>;
}
