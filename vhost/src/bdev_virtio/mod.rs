//! `virtio`: an export of another process as a bdev. Any vhost-user-blk back end will do: a storage daemon, a target with a
//! user-space NVMe driver, another Resilver.
//!
//! It stands in this crate and not among the other modules because it is a user of the [front end](crate::front_end), which
//! `bdev` does not know. The control side ([`Virtio`]) connects; a keeper, a thread of its own, stays connected; each channel has
//! one of the export's rings to itself, so that nothing on the data side is shared. Rings are shared memory that both sides poll:
//! between two pinned reactors a request costs no system call.
//!
//! **Rings are the capacity.** A channel without a ring is refused. A disk that is served takes one, a mirror's target one,
//! a mirror's source two and one more for a moment while the mirror starts. Channels that share a ring were rejected: they may be on
//! different reactors, and a lock between those is what this design does without.
//!
//! **Memory.** The back end sees the rings and a bounce pool for each, in one sealed memory descriptor, and nothing else: a guest's
//! memory is not handed on. That costs one copy for each request and keeps a guest's memory out of the reach of a second
//! process. It is of huge pages where the host has them, which SPDK needs.
//!
//! **When the back end goes**, requests in flight stay where they are and the keeper connects again, with growing pauses, for
//! ever. A back end that records what is in flight is given its record and carries on; to any other all that was not
//! completed is offered again. Either way a request may be carried out twice and is answered once. With a reconnect timeout
//! requests fail with `EIO` once an outage has lasted that long, until a back end is there again.
//!
//! Fault model: whatever the back end does is an I/O error or a lost connection. It can return wrong data, as any disk can.

mod channel;
mod device;
mod keeper;
mod pool;
mod ring_state;
mod seat;
mod shared;

use std::fmt;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use resilver_bdev::bounce::{Bounce, POOL_BYTES};
use resilver_bdev::device::Link;
use resilver_bdev::stable_hash::fnv1a;
use resilver_bdev::{Bdev, BdevError, Detail, FileIdentity, Geometry, IoChannel, IoStats};

use channel::VirtioChannel;
use device::Device;
use keeper::{Contact, Keeper, StatusCell};
use ring_state::{Event, RingState};
use seat::{Lent, Seat};
use shared::Shared;

use crate::blk::Serial;
use crate::front_end::{Connection, ConnectionConfig, DriverQueue};
use crate::protocol::QUEUES_MAX;
use crate::ring::Format;

/// Rings that are set up where no number is given, if the export has as many.
const QUEUES: u16 = 4;
/// Entries of a ring: requests that the export has at once. A channel may have more, which wait.
const QUEUE_SIZE: u16 = 512;
/// How long an export may take to answer a message.
const DEADLINE: Duration = Duration::from_secs(5);

/// How a `virtio` bdev is made.
#[derive(Debug, Clone)]
pub struct VirtioConfig {
    /// Its name.
    pub name: String,
    /// The export's socket.
    pub socket: PathBuf,
    /// Rings to set up: all of them must be there. None takes up to 4.
    pub num_queues: Option<u16>,
    /// How long an outage lasts before requests fail; none waits for ever.
    pub reconnect_timeout: Option<Duration>,
}

/// The control side.
pub struct Virtio {
    config: VirtioConfig,
    device: Device,
    shared: Arc<Shared>,
    status: StatusCell,
    records_inflight: bool,
    serial: Option<Serial>,
    format: Format,
    /// The memory that the export sees is of huge pages.
    huge_pages: bool,
    export: FileIdentity,
    /// Blocks of the disk: the export may have grown further.
    num_blocks: AtomicU64,
    stats: Arc<IoStats>,
}

impl fmt::Debug for Virtio {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Virtio").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Virtio {
    /// Connects to an export and starts its rings. Blocks, for seconds if the export does not answer.
    ///
    /// # Errors
    /// [`BdevError::Export`] with the reason; [`BdevError::Invalid`] for a number of rings that it does not have.
    pub fn connect(config: VirtioConfig) -> Result<Self, BdevError> {
        let refused = |reason: String| BdevError::Export { path: config.socket.clone(), reason };
        if config.num_queues.is_some_and(|queues| !(1..=QUEUES_MAX).contains(&queues)) {
            return Err(no_such_rings(&config, QUEUES_MAX));
        }
        let mut device = Err("it did not describe itself".to_owned());
        let mut rings = 0;
        let wanted = ConnectionConfig {
            queue_size: QUEUE_SIZE,
            inflight: true,
            back_channel: true,
            identify: true,
            deadline: DEADLINE,
            ..ConnectionConfig::default()
        };
        let opened = Connection::open(&config.socket, wanted, |described, wanted| {
            device = Device::new(described);
            rings = described.queues;
            wanted.queues = config.num_queues.unwrap_or(QUEUES.min(rings));
            wanted.segments = device.as_ref().map_or(1, |device| device.segments);
            wanted.data_bytes = POOL_BYTES * usize::from(wanted.queues);
        });
        if let Some(asked) = config.num_queues.filter(|asked| rings > 0 && *asked > rings) {
            debug_assert!(opened.is_err(), "{asked} rings of {rings}");
            return Err(no_such_rings(&config, rings));
        }
        let (connection, queues) = opened.map_err(|error| refused(error.to_string()))?;
        let device = device.map_err(refused)?;
        let (records_inflight, serial) = (connection.records_inflight(), connection.serial());
        let (format, huge_pages) = (connection.format(), connection.memory().huge_pages());
        let seats = seats(&connection, queues);
        let kept = seats.iter().map(|seat| (seat.queue.handle().clone(), Arc::clone(&seat.state)));
        let kept = kept.collect();
        let shared = Shared::new(seats, device.geometry.size())
            .map_err(|error| refused(error.to_string()))?;
        let shared = Arc::new(shared);
        let (name, patience) = (config.name.clone(), config.reconnect_timeout);
        let mut keeper = Keeper::new(name, connection, device, kept, Arc::clone(&shared), patience);
        keeper.start_rings().map_err(|error| refused(error.to_string()))?;
        let status = keeper.status();
        let thread = std::thread::Builder::new().name(format!("virtio-{}", config.name));
        thread.spawn(move || keeper.run()).map_err(|error| refused(error.to_string()))?;
        Ok(Self {
            export: export_at(&config.socket),
            config,
            num_blocks: AtomicU64::new(device.geometry.num_blocks),
            device,
            shared,
            status,
            records_inflight,
            serial,
            format,
            huge_pages,
            stats: Arc::default(),
        })
    }

    /// Has `told` called, on a thread of the bdev's own, with the size in bytes whenever the export has grown;
    /// [`Bdev::resize`] to that size takes it on. There is one watcher: the first.
    pub fn watch_size(&self, told: impl Fn(u64) + Send + Sync + 'static) {
        self.shared.watch(Box::new(told));
    }

    fn export_size(&self) -> u64 {
        let size = self.shared.capacity();
        size - size % u64::from(self.device.geometry.block_size)
    }
}

/// The rings of a fresh connection, each with its part of the shared memory.
fn seats(connection: &Connection, queues: Vec<DriverQueue>) -> Vec<Seat> {
    let starts = (0u64..).step_by(POOL_BYTES);
    let seat = |(queue, start)| Seat {
        queue,
        pool: Bounce::within(Arc::clone(connection.memory().mapping()), start),
        state: Arc::new(RingState::new()),
    };
    queues.into_iter().zip(starts).map(seat).collect()
}

/// The export that listens at a path, in records of switch-overs: known by the path alone, for the socket itself is another
/// each time that its process starts. No file has this device number. Records outlive this version of the program, so the
/// number made of the path is the same for ever.
#[must_use]
pub fn export_at(socket: &Path) -> FileIdentity {
    let path = std::fs::canonicalize(socket).unwrap_or_else(|_| socket.to_owned());
    let inode = fnv1a(path.as_os_str().as_bytes().iter().copied());
    FileIdentity { device: u64::MAX, inode, path, known_by: None }
}

fn no_such_rings(config: &VirtioConfig, most: u16) -> BdevError {
    BdevError::Invalid {
        parameter: "num_queues",
        value: config.num_queues.unwrap_or(0).to_string(),
        expected: format!("from 1 to {most}, as many rings as the export may have, were expected"),
    }
}

impl Drop for Virtio {
    fn drop(&mut self) {
        self.shared.quit();
    }
}

impl Bdev for Virtio {
    fn name(&self) -> &str {
        &self.config.name
    }

    fn module(&self) -> &'static str {
        "virtio"
    }

    fn geometry(&self) -> Geometry {
        Geometry { num_blocks: self.num_blocks.load(Ordering::Relaxed), ..self.device.geometry }
    }

    fn read_only(&self) -> bool {
        self.device.read_only
    }

    fn open_channel(&self, depth: u32) -> Result<Box<dyn IoChannel>, BdevError> {
        let Some(mut seat) = self.shared.take_seat() else {
            let (rings, _) = self.shared.seats();
            return Err(BdevError::Resources {
                name: self.config.name.clone(),
                reason: format!(
                    "its export has {rings} rings here and all are in use; a disk and a mirror's target take one, a mirror's \
                     source three: give the export more, and the bdev a num_queues of as many"
                ),
            });
        };
        // What happened to the ring while nobody had it.
        seat.clear(&self.shared);
        if self.status.get().contact == Contact::Connected {
            seat.state.apply(Event::Resume);
            self.shared.wake();
        }
        let seat = Lent::new(seat, Arc::clone(&self.shared));
        let device = Device { geometry: self.geometry(), ..self.device };
        Ok(Box::new(VirtioChannel::new(depth, device, seat)))
    }

    /// Takes on what the export has grown by; it cannot be made to grow from here.
    fn resize(&self, size: u64) -> Result<(), BdevError> {
        let geometry = Geometry::of_size(self.device.geometry.block_size, size)?;
        let (least, most) = (self.geometry().size(), self.export_size());
        if !(least..=most).contains(&size) {
            return Err(BdevError::Invalid {
                parameter: "size",
                value: size.to_string(),
                expected: format!(
                    "from {least} to {most} bytes were expected, as many as the export has: resize it where it is made"
                ),
            });
        }
        self.num_blocks.store(geometry.num_blocks, Ordering::Relaxed);
        Ok(())
    }

    fn recorded_as(&self) -> Option<FileIdentity> {
        Some(self.export.clone())
    }

    fn link(&self) -> Option<Link> {
        let status = self.status.get();
        let connected = status.contact == Contact::Connected;
        Some(Link { connected, reconnects: status.reconnects })
    }

    fn details(&self) -> Vec<(&'static str, Detail)> {
        let status = self.status.get();
        let number = |number: usize| Detail::Number(number as u64);
        let (rings, free) = self.shared.seats();
        let mut details = vec![
            ("socket", Detail::Text(self.config.socket.display().to_string())),
            ("state", Detail::Text(status.contact.name().to_owned())),
            ("since_seconds", Detail::Number(status.since.elapsed().as_secs())),
            ("reconnects", Detail::Number(status.reconnects)),
            ("num_queues", number(rings)),
            ("free_queues", number(free)),
            ("packed_ring", Detail::Flag(self.format == Format::Packed)),
            ("huge_pages", Detail::Flag(self.huge_pages)),
            ("inflight_recorded", Detail::Flag(self.records_inflight)),
            ("flush", Detail::Flag(self.device.flush)),
            ("unmap", Detail::Flag(self.device.discard_max > 0)),
            ("write_zeroes", Detail::Flag(self.device.zeroes_max > 0)),
            ("max_transfer", Detail::Number(u64::from(self.device.max_transfer))),
        ];
        if let Some(serial) = self.serial {
            details.push(("serial", Detail::Text(serial.to_string())));
        }
        if self.export_size() != self.geometry().size() {
            details.push(("export_size", Detail::Number(self.export_size())));
        }
        if status.contact != Contact::Connected {
            details.push(("attempts", Detail::Number(status.attempts)));
        }
        if !status.reason.is_empty() {
            details.push(("reason", Detail::Text(status.reason)));
        }
        details
    }

    fn stats(&self) -> &Arc<IoStats> {
        &self.stats
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_export_is_recorded_as_the_same_by_every_version() {
        let path = PathBuf::from("/run/resilver-no-such-directory/export.sock");
        let expected = FileIdentity {
            device: u64::MAX,
            inode: 0xa104_1d41_d8aa_0245,
            path: path.clone(),
            known_by: None,
        };
        assert_eq!(export_at(&path), expected);
    }
}
