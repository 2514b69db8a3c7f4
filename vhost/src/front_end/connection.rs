//! The control side of a front end: the conversation on the vhost-user socket.
//!
//! Calls block, each until the connection's deadline at most: a back end that does not answer is an error, not a wait.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use resilver_sys::MappingError;
use resilver_sys::area::AreaError;

use super::back_channel::BackChannel;
use super::identity;
use super::inflight::Inflight;
use super::link::{self, Link, PROTOCOL};
use super::memory::SharedMemory;
use super::queue::{self, DriverQueue};
use super::ring::RingHandle;
use crate::blk::Serial;
use crate::protocol::{RING_SIZE_MAX, features, protocol_features};
use crate::ring::Format;

/// How a front end connects.
#[derive(Debug, Clone)]
pub struct ConnectionConfig {
    /// Rings to set up, at most what the device has.
    pub queues: u16,
    /// Entries of each ring: a power of two, at most 32768.
    pub queue_size: u16,
    /// Buffers of one request, at most what the device says; 1 or more.
    pub segments: u16,
    /// Bytes of shared memory for the caller's data.
    pub data_bytes: usize,
    /// Virtio features that the driver accepts: all that it knows, unless bits are taken away.
    pub accept: u64,
    /// Let the back end record what is in flight, if it can: after its death its successor resubmits it.
    pub inflight: bool,
    /// Ask the disk for its serial at each connect: [`Connection::serial`].
    pub identify: bool,
    /// Let the back end say when its configuration space changes, if it can: [`Connection::config_changed`].
    pub back_channel: bool,
    /// How long connecting, and any one call, may take.
    pub deadline: Duration,
}

impl Default for ConnectionConfig {
    fn default() -> Self {
        Self {
            queues: 1,
            queue_size: 128,
            segments: 16,
            data_bytes: 1 << 20,
            accept: u64::MAX,
            inflight: false,
            identify: false,
            back_channel: false,
            deadline: Duration::from_secs(5),
        }
    }
}

impl ConnectionConfig {
    /// [`ConnectionConfig::accept`] without the event index.
    pub const WITHOUT_EVENT_INDEX: u64 = !features::RING_EVENT_IDX;
    /// [`ConnectionConfig::accept`] without packed rings.
    pub const WITHOUT_PACKED: u64 = !features::RING_PACKED;
    /// [`ConnectionConfig::accept`] without indirect descriptors, and so without packed rings.
    pub const WITHOUT_INDIRECT: u64 = !features::RING_INDIRECT_DESC;

    fn protocol(&self) -> u64 {
        let wanted = [
            (self.inflight, protocol_features::INFLIGHT_SHMFD),
            (self.back_channel, protocol_features::BACKEND_REQ),
        ];
        wanted.into_iter().fold(PROTOCOL, |all, (wanted, bit)| if wanted { all | bit } else { all })
    }

    /// Whether a device that describes itself so has what is asked for.
    fn check(&self, device: &BlkConfig) -> Result<(), FrontEndError> {
        if !self.queue_size.is_power_of_two() || self.queue_size > RING_SIZE_MAX {
            return Err(FrontEndError::Config(
                "a ring has a power of two of entries, at most 32768",
            ));
        }
        if self.queues == 0 || self.segments == 0 {
            return Err(FrontEndError::Config(
                "a front end has at least one ring and one buffer to a request",
            ));
        }
        if self.queues > device.queues {
            return Err(FrontEndError::Config("the device has fewer rings than were asked for"));
        }
        if device.segments_max.is_some_and(|most| u32::from(self.segments) > most) {
            return Err(FrontEndError::Config(
                "the device takes fewer buffers to a request than were asked for",
            ));
        }
        Ok(())
    }
}

/// Why a front end and its back end do not come together.
#[derive(Debug, thiserror::Error)]
pub enum FrontEndError {
    /// Nobody answers on the socket.
    #[error("cannot connect to {}: {source}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// The back end did not answer in time.
    #[error("the back end did not answer {message} within {deadline:?}")]
    Deadline {
        /// The vhost-user message.
        message: &'static str,
        /// How long was waited.
        deadline: Duration,
    },
    /// The back end closed the connection, or the socket failed.
    #[error("the connection was lost at {message}: {source}")]
    Lost {
        /// The vhost-user message.
        message: &'static str,
        /// The kernel's reason.
        source: io::Error,
    },
    /// The back end went when it was given memory of ordinary pages, which is what kills SPDK.
    #[error(
        "the connection was lost at SET_MEM_TABLE: {source}; SPDK needs memory of huge pages, and {} MiB of those are not free \
         here: reserve more (/proc/sys/vm/nr_hugepages)",
        bytes.div_ceil(1 << 20)
    )]
    OrdinaryPages {
        /// Bytes of memory that the front end shares.
        bytes: usize,
        /// The kernel's reason.
        source: io::Error,
    },
    /// The answer is not what the protocol says.
    #[error("the back end's answer to {message} is malformed: {what}")]
    Malformed {
        /// The vhost-user message.
        message: &'static str,
        /// What is wrong with it.
        what: &'static str,
    },
    /// The back end says that it could not do it.
    #[error("the back end refused {message} with {code}")]
    Refused {
        /// The vhost-user message.
        message: &'static str,
        /// Its reply.
        code: u64,
    },
    /// A feature without which this front end cannot work, or that it relied on before a reconnect.
    #[error("the back end does not offer {0}")]
    Missing(&'static str),
    /// The configuration asks for what cannot be.
    #[error("{0}")]
    Config(&'static str),
    /// Shared memory could not be had.
    #[error("cannot share memory: {0}")]
    Memory(#[from] MappingError),
    /// A ring does not fit the memory.
    #[error("cannot lay out a ring: {0}")]
    Layout(#[from] AreaError),
    /// The kernel refused.
    #[error("cannot {what}: {source}")]
    Os {
        /// What was tried.
        what: &'static str,
        /// Its reason.
        source: io::Error,
    },
}

/// What both sides agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Negotiated {
    /// All virtio features.
    pub(super) features: u64,
    /// All protocol features.
    pub(super) protocol: u64,
    /// Indirect descriptors.
    pub(super) indirect: bool,
    /// The event index.
    pub(super) event_index: bool,
    /// How rings are laid out.
    pub(super) format: Format,
}

impl Negotiated {
    /// What these features mean for a ring.
    pub(super) fn new(features: u64, protocol: u64) -> Self {
        Self {
            features,
            protocol,
            indirect: features & features::RING_INDIRECT_DESC != 0,
            event_index: features & features::RING_EVENT_IDX != 0,
            format: match features & features::RING_PACKED {
                0 => Format::Split,
                _ => Format::Packed,
            },
        }
    }
}

/// What the device says of itself (virtio 1.2 §5.2.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlkConfig {
    /// Bytes of the disk.
    pub capacity: u64,
    /// Bytes of a block: the alignment that requests should have.
    pub block_size: u32,
    /// Most buffers of one request; none where the device does not say, or says 0.
    pub segments_max: Option<u32>,
    /// Bytes of the longest buffer; none where the device does not say, or says 0.
    pub segment_bytes_max: Option<u32>,
    /// Rings that the device has.
    pub queues: u16,
    /// Writes are refused.
    pub read_only: bool,
    /// Flush is understood.
    pub flush: bool,
    /// Largest discard, bytes; none where it is not understood.
    pub discard_max: Option<u64>,
    /// Largest write-zeroes, bytes; none where it is not understood.
    pub write_zeroes_max: Option<u64>,
    /// A write-zeroes that may unmap does so.
    pub zeroes_unmap: bool,
}

/// A connected back end.
#[derive(Debug)]
pub struct Connection {
    path: PathBuf,
    config: ConnectionConfig,
    socket: UnixStream,
    negotiated: Negotiated,
    memory: SharedMemory,
    inflight: Option<Inflight>,
    back_channel: Option<BackChannel>,
    serial: Option<Serial>,
    device: BlkConfig,
}

impl Connection {
    /// Connects to the socket at `path`, waiting for it within the deadline, and sets up the rings. They may be used at once.
    ///
    /// # Errors
    /// See [`FrontEndError`].
    pub fn connect(
        path: &Path,
        config: ConnectionConfig,
    ) -> Result<(Self, Vec<DriverQueue>), FrontEndError> {
        let (mut connection, queues) = Self::open(path, config, |_, _| ())?;
        queues.iter().try_for_each(|queue| connection.start(queue.handle()))?;
        Ok((connection, queues))
    }

    /// Connects and shares memory; no ring is served until [`Connection::start`]. `fit` may fit the configuration to the device
    /// once that has described itself.
    ///
    /// # Errors
    /// See [`FrontEndError`].
    pub fn open(
        path: &Path,
        mut config: ConnectionConfig,
        fit: impl FnOnce(&BlkConfig, &mut ConnectionConfig),
    ) -> Result<(Self, Vec<DriverQueue>), FrontEndError> {
        let serial = identify(&config, path, config.deadline)?;
        let mut link = Link::open(path, config.deadline, config.deadline)?;
        let negotiated = link.negotiate(config.accept, config.protocol())?;
        let device = link.read_config(&negotiated)?;
        fit(&device, &mut config);
        config.check(&device)?;
        let ring_bytes = queue::bytes_needed(config.queue_size, config.segments, &negotiated)
            * usize::from(config.queues);
        let mut memory = SharedMemory::new(config.data_bytes, ring_bytes)?;
        let queues = (0..config.queues)
            .map(|index| {
                DriverQueue::new(
                    index,
                    config.queue_size,
                    config.segments,
                    &negotiated,
                    &mut memory,
                )
            })
            .collect::<Result<Vec<_>, _>>()?;
        let path = path.to_owned();
        let Link { socket, .. } = link;
        let mut connection = Self {
            path,
            config,
            socket,
            negotiated,
            memory,
            inflight: None,
            back_channel: None,
            serial,
            device,
        };
        connection.share()?;
        Ok((connection, queues))
    }

    /// Connects again after the back end died or closed, and has the requests in flight carried out by the new one. All rings
    /// of the connection must be given. The old back end must be gone, or it could still write to the shared memory.
    ///
    /// # Errors
    /// As [`Connection::connect`]; also where the new back end offers less than the old one did. May be tried again.
    pub fn reconnect(&mut self, queues: &mut [DriverQueue]) -> Result<(), FrontEndError> {
        if queues.len() != usize::from(self.config.queues) {
            return Err(FrontEndError::Config(
                "all rings of the connection come along in a reconnect",
            ));
        }
        let recovers = self.records_inflight();
        self.reopen(self.config.deadline)?;
        for queue in queues {
            if !recovers {
                queue.restart();
            }
            self.start(queue.handle())?;
        }
        Ok(())
    }

    /// Connects again, waiting so long for the socket; no ring is served until [`Connection::start`]. Where
    /// [`Connection::records_inflight`] said no before, each ring has to be [restarted](DriverQueue::restart) first.
    ///
    /// # Errors
    /// As [`Connection::reconnect`].
    pub fn reopen(&mut self, patience: Duration) -> Result<(), FrontEndError> {
        // The old end goes first: a back end that serves one front end at a time waits for that.
        self.hang_up();
        self.serial = identify(&self.config, &self.path, patience)?;
        let mut link = Link::open(&self.path, patience, self.config.deadline)?;
        let negotiated = link.negotiate(self.negotiated.features, self.negotiated.protocol)?;
        if negotiated != self.negotiated {
            return Err(FrontEndError::Missing("a feature that it offered before"));
        }
        self.device = link.read_config(&negotiated)?;
        self.socket = link.socket;
        self.share()
    }

    /// Gives the back end what it works on: the memory, and the record of what is in flight.
    fn share(&mut self) -> Result<(), FrontEndError> {
        let mut link = self.link()?;
        let has = |bit: u64| self.negotiated.protocol & bit != 0;
        if has(protocol_features::BACKEND_REQ) {
            let (channel, theirs) = BackChannel::new()?;
            link.give_back_channel(&self.negotiated, theirs.as_fd())?;
            self.back_channel = Some(channel);
        }
        link.share(&self.negotiated, &self.memory).map_err(|error| match error {
            FrontEndError::Lost { source, .. } if !self.memory.huge_pages() => {
                FrontEndError::OrdinaryPages { bytes: self.memory.mapping().len(), source }
            }
            error => error,
        })?;
        if has(protocol_features::INFLIGHT_SHMFD) && self.inflight.is_none() {
            self.inflight = link.make_inflight(self.config.queues, self.config.queue_size)?;
        }
        if let Some(inflight) = &self.inflight {
            link.give_inflight(&self.negotiated, inflight)?;
        }
        Ok(())
    }

    /// The disk's serial; none if it was not asked for, or the disk has none.
    #[must_use]
    pub fn serial(&self) -> Option<Serial> {
        self.serial
    }

    /// Whether the back end records what is in flight, so that its successor resubmits it.
    #[must_use]
    pub fn records_inflight(&self) -> bool {
        self.inflight.is_some()
    }

    /// Forgets the record: nothing of what it says is wanted any more, and the next back end makes another.
    pub fn forget_inflight(&mut self) {
        self.inflight = None;
    }

    /// Has the back end serve a ring that it does not serve: a new one, one that was restarted, or one whose last back end
    /// has gone and recorded what was in flight.
    ///
    /// # Errors
    /// The connection is lost, or the back end refuses.
    pub fn start(&mut self, ring: &RingHandle) -> Result<(), FrontEndError> {
        let negotiated = self.negotiated;
        self.link()?.start(&negotiated, ring, ring.base())
    }

    /// The shared memory, whose first [`SharedMemory::data_bytes`] are the caller's.
    #[must_use]
    pub fn memory(&self) -> &SharedMemory {
        &self.memory
    }

    /// The device as it described itself when it was connected.
    #[must_use]
    pub fn device(&self) -> &BlkConfig {
        &self.device
    }

    /// Asks the device to describe itself again, after a resize.
    ///
    /// # Errors
    /// The connection is lost, or the answer malformed.
    pub fn read_config(&mut self) -> Result<BlkConfig, FrontEndError> {
        let mut link = self.link()?;
        self.device = link.read_config(&self.negotiated)?;
        Ok(self.device)
    }

    /// What becomes readable when [`Connection::config_changed`] has something to say; none without a back channel.
    #[must_use]
    pub fn back_channel_fd(&self) -> Option<BorrowedFd<'_>> {
        self.back_channel.as_ref().map(AsFd::as_fd)
    }

    /// Whether the back end has said that its configuration space changed, since this was asked last: then
    /// [`Connection::read_config`]. Does not wait.
    ///
    /// # Errors
    /// It said what a block device does not say, or its end of the back channel is gone.
    pub fn config_changed(&mut self) -> Result<bool, FrontEndError> {
        self.back_channel.as_mut().map_or(Ok(false), BackChannel::config_changed)
    }

    /// Hangs up. [`Connection::reopen`] begins anew.
    pub fn hang_up(&mut self) {
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
        self.back_channel = None;
    }

    /// Whether the back end has closed the connection, or says what nobody has asked for: it is of no use then.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        link::is_closed(&self.socket)
    }

    /// Stops a ring: the back end completes what it has taken and answers with where the ring stands (vhost-user, "Vring descriptor
    /// index/indices").
    ///
    /// # Errors
    /// The connection is lost, or the back end does not stop in time.
    pub fn stop(&mut self, queue: &DriverQueue) -> Result<u32, FrontEndError> {
        self.link()?.stop(queue.index())
    }

    /// Starts a stopped ring again where it stopped, as a machine does that was paused.
    ///
    /// # Errors
    /// The connection is lost, or the back end refuses.
    pub fn resume(&mut self, queue: &DriverQueue, base: u32) -> Result<(), FrontEndError> {
        let negotiated = self.negotiated;
        self.link()?.start(&negotiated, queue.handle(), base)
    }

    /// How the rings are laid out.
    #[must_use]
    pub fn format(&self) -> Format {
        self.negotiated.format
    }

    fn link(&self) -> Result<Link, FrontEndError> {
        let socket = self
            .socket
            .try_clone()
            .map_err(|source| FrontEndError::Os { what: "duplicate the socket", source })?;
        Ok(Link { socket, deadline: self.config.deadline })
    }
}

/// The serial of the disk at a path, if that is wanted.
fn identify(
    config: &ConnectionConfig,
    path: &Path,
    patience: Duration,
) -> Result<Option<Serial>, FrontEndError> {
    if config.identify { identity::ask(path, patience, config.deadline) } else { Ok(None) }
}

impl AsFd for Connection {
    /// What becomes readable when the back end has closed the connection.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
