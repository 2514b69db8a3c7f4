//! A guest whose every request is counted: `instructions DISK OP DEPTH ROUNDS` gives a disk `ROUNDS` times `DEPTH` requests of
//! 4 KiB on a split ring, each an indirect table of three descriptors as Linux makes them, and steps the reactor by hand until
//! they are done. `scripts/bench/instructions` runs it under callgrind, which counts the instructions of [`counted_turn`] and of
//! nothing else: what serving costs, without the guest, exactly the same each time.
//!
//! Everything is in one thread, so a count has no luck in it: no request comes a turn later because a core was far away. The guest
//! writes its memory through the file, by system calls, which no counter sees. `idle` as the operation counts turns in which
//! there is nothing to do. `mirror` as the disk is `null` mirrored to another `null`, in sync.
#![allow(clippy::print_stdout, clippy::unwrap_used)]

use std::fs::File;
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::sync::mpsc::channel;

use resilver_bdev::disk::HOLD_DEADLINE;
use resilver_bdev::job::{CopyMode, Scan, ScanReport};
use resilver_bdev::malloc::Malloc;
use resilver_bdev::mirror::{COPY_DEPTH, Mirror, MirrorChannels, MirrorConfig, TARGET_DEPTH};
use resilver_bdev::null::Null;
use resilver_bdev::{
    Bdev, ConsumerId, DISK_DEPTH, Disk, DiskCommand, DiskHandle, JobStatus, StartJob,
};
use resilver_reactor::{Context, Doorbell, Nanos, Poller as _};
use resilver_sys::{EventFd, RegionTable};
use resilver_vhost::blk::{CacheMode, Serial};
use resilver_vhost::blk_session::{BlkSession, Command, Enabled, SessionConfig};
use resilver_vhost::chain::Indirect;
use resilver_vhost::memory::{GuestMemory, GuestRegion};
use resilver_vhost::message::{RegionDescription, RingAddresses};
use resilver_vhost::protocol::blk_type;
use resilver_vhost::queue::LiveQueue;
use resilver_vhost::ring::{EventMode, Format, Ring, RingAreas};
use rustix::fs::{MemfdFlags, memfd_create};

/// Entries of the ring: one a request.
const RING: u16 = 256;
const DEPTH_MAX: u16 = RING / 2;
/// Descriptors of a request.
const PARTS: u16 = 3;
/// Bytes of a request, and blocks of the disk.
const LENGTH: u32 = 4096;
const BLOCKS: u64 = 32768;
/// Where things are in the guest's memory.
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const HEADERS: u64 = 0x5000;
const STATUS: u64 = 0x7000;
const TABLES: u64 = 0x8000;
const DATA: u64 = 0x1_0000;
const MEMORY: u64 = 0x20_0000;
/// Flags of a descriptor (virtio 2.7.5).
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// Rounds before the first that counts.
const WARM_UP: u64 = 16;
/// Turns that a round may take.
const PATIENCE: u32 = 1000;

struct World {
    memory: File,
    table: RegionTable,
    disk: Disk,
    handle: DiskHandle,
    now: u64,
    /// Where the driver stands in its ring.
    offered: u16,
}

impl World {
    /// A guest of one queue, connected to the disk.
    fn new(bdev: &dyn Bdev) -> Self {
        let memory = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        memory.set_len(MEMORY).unwrap();
        let doorbell = Arc::new(Doorbell::new().unwrap());
        let channel_to_bdev = bdev.open_channel(DISK_DEPTH).unwrap();
        let (disk, handle) =
            Disk::new(channel_to_bdev, Arc::default(), Arc::clone(&doorbell), || ());
        let config = SessionConfig {
            num_queues: 1,
            read_only: false,
            serial: Serial::new("instructions"),
            stats: Arc::default(),
            on_fault: Box::new(|fault| panic!("{fault}")),
        };
        let (session, commands) = BlkSession::new(config, doorbell);
        let table = RegionTable::with_capacity(8);
        let mut world = Self { memory, table, disk, handle, now: 0, offered: 0 };
        let cx = Context { now: Nanos(0), memory: &world.table };
        world.disk.started(&cx);
        let (sender, added) = channel();
        let reply = Box::new(move |added| drop(sender.send(added)));
        let add = DiskCommand::AddConsumer(ConsumerId(1), Box::new(session), reply);
        assert!(world.handle.send(add).is_ok());
        world.turn();
        assert!(added.try_recv().unwrap().is_ok());

        let region =
            RegionDescription { guest_address: 0, size: MEMORY, user_address: 0, file_offset: 0 };
        let region = GuestRegion::map(&region, world.memory.as_fd()).unwrap();
        let guest = Box::new(GuestMemory::new(vec![region]).unwrap());
        let addresses =
            RingAddresses { flags: 0, descriptors: 0, used: USED, available: AVAILABLE, log: 0 };
        let areas = RingAreas::resolve(&guest, Format::Split, RING, &addresses).unwrap();
        let ring = Ring::new(Format::Split, areas, RING, 0, EventMode::Index).unwrap();
        let reply = Box::new(|changed: Result<_, _>| assert!(changed.is_ok()));
        assert!(commands.send(Command::SetMemory { memory: guest, rings: vec![], reply }).is_ok());
        world.turn();
        let event = || EventFd::new().ok().map(Arc::new);
        let live = LiveQueue::new(ring, Box::default(), Indirect::Allowed, event(), event());
        let reply = Box::new(|started: Result<_, _>| assert!(started.is_ok()));
        let (live, enabled) = (Box::new(live), Enabled::Yes);
        assert!(commands.send(Command::Start { queue: 0, live, enabled, reply }).is_ok());
        world.turn();
        // As Linux negotiates it: else every write would be two requests, the second a flush.
        let cache = Command::SetCache(CacheMode::WriteBack, Box::new(|()| ()));
        assert!(commands.send(cache).is_ok());
        world.turn();
        world
    }

    /// Mirrors the disk, which is `source`, to `target`, and waits until they are in sync.
    fn mirror(&mut self, source: &dyn Bdev, target: &dyn Bdev) {
        let config = MirrorConfig { copy_mode: CopyMode::WriteBlocking, ..MirrorConfig::default() };
        let channels = MirrorChannels {
            source: source.open_channel(DISK_DEPTH).unwrap(),
            copy_source: source.open_channel(COPY_DEPTH).unwrap(),
            target: target.open_channel(TARGET_DEPTH).unwrap(),
            offload: None,
        };
        let scan = Scan::default();
        let start = StartJob {
            job: Box::new(Mirror::new(config, channels).unwrap()),
            target_stats: Arc::default(),
            target_bitmaps: Vec::new(),
            scan: scan.clone(),
            deadline: HOLD_DEADLINE,
            reply: Box::new(|started| assert!(started.is_ok())),
        };
        for command in [DiskCommand::StartJob(start), DiskCommand::Scanned(scan, ScanReport::Done)]
        {
            assert!(self.handle.send(command).is_ok());
            self.turn();
            self.turn();
        }
        let ready = (0..PATIENCE).any(|_| {
            let (sender, info) = channel();
            let reply = Box::new(move |info| assert!(sender.send(info).is_ok()));
            assert!(self.handle.send(DiskCommand::Query(reply)).is_ok());
            self.turn();
            info.try_recv().unwrap().is_some_and(|info| info.status == JobStatus::Ready)
        });
        assert!(ready, "a mirror that is never in sync");
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        self.memory.write_all_at(bytes, at).unwrap();
    }

    fn put_descriptor(&self, at: u64, address: u64, length: u32, flags: u16, next: u16) {
        let mut descriptor = [0; 16];
        descriptor[..8].copy_from_slice(&address.to_le_bytes());
        descriptor[8..12].copy_from_slice(&length.to_le_bytes());
        descriptor[12..14].copy_from_slice(&flags.to_le_bytes());
        descriptor[14..].copy_from_slice(&next.to_le_bytes());
        self.put(at, &descriptor);
    }

    fn word(&self, at: u64) -> u16 {
        let mut bytes = [0; 2];
        self.memory.read_exact_at(&mut bytes, at).unwrap();
        u16::from_le_bytes(bytes)
    }

    /// Makes so many requests available at once, each of its own place on the disk.
    fn offer(&mut self, kind: u32, depth: u16) {
        for slot in 0..depth {
            let step = u64::from(slot);
            let (table, bytes) = (TABLES + 64 * step, 16 * u32::from(PARTS));
            let turn = u64::from(self.offered.wrapping_add(slot));
            let sector = turn.wrapping_mul(2_654_435_761) % (BLOCKS / 8) * 8;
            let mut header = [0; 16];
            header[..4].copy_from_slice(&kind.to_le_bytes());
            header[8..].copy_from_slice(&sector.to_le_bytes());
            self.put(HEADERS + 16 * step, &header);
            self.put(STATUS + step, &[0xff]);
            let data = if kind == blk_type::IN { NEXT | WRITE } else { NEXT };
            let buffers = [
                (HEADERS + 16 * step, 16, NEXT),
                (DATA + u64::from(LENGTH) * step, LENGTH, data),
                (STATUS + step, 1, WRITE),
            ];
            for (part, (address, length, flags)) in (0..PARTS).zip(buffers) {
                let at = table + 16 * u64::from(part);
                self.put_descriptor(at, address, length, flags, part + 1);
            }
            self.put_descriptor(16 * step, table, bytes, INDIRECT, 0);
            let place = u64::from(self.offered.wrapping_add(slot) % RING);
            self.put(AVAILABLE + 4 + 2 * place, &slot.to_le_bytes());
        }
        self.offered = self.offered.wrapping_add(depth);
        self.put(AVAILABLE + 2, &self.offered.to_le_bytes());
        // No interrupts, as a driver that polls: the event index behind what was used already (virtio 2.7.7).
        self.put(
            AVAILABLE + 4 + 2 * u64::from(RING),
            &self.offered.wrapping_sub(depth + 1).to_le_bytes(),
        );
    }

    fn turn(&mut self) {
        self.now += 1000;
        let cx = Context { now: Nanos(self.now), memory: &self.table };
        self.disk.poll(&cx);
    }

    /// One round: all of them made, served by `turn`, and found good.
    fn round(&mut self, kind: u32, depth: u16, turn: fn(&mut Self)) {
        self.offer(kind, depth);
        let done = (0..PATIENCE).any(|_| {
            turn(self);
            self.word(USED + 2) == self.offered
        });
        assert!(done, "requests that never end");
        for slot in 0..depth {
            let mut status = [0xff];
            self.memory.read_exact_at(&mut status, STATUS + u64::from(slot)).unwrap();
            assert_eq!(status, [0], "a request failed");
        }
    }
}

/// What callgrind counts. By this name: it must not be inlined.
#[inline(never)]
fn counted_turn(world: &mut World) {
    world.turn();
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let [disk, operation, depth, rounds] = words.as_slice() else {
        panic!("usage: instructions null|malloc|mirror read|write|idle DEPTH ROUNDS");
    };
    let bdev: Box<dyn Bdev> = match *disk {
        "null" | "mirror" => Box::new(Null::new("null", 512, BLOCKS).unwrap()),
        "malloc" => Box::new(Malloc::new("malloc", 512, BLOCKS).unwrap()),
        other => panic!("no such disk: {other}"),
    };
    let (depth, rounds): (u16, u64) = (depth.parse().unwrap(), rounds.parse().unwrap());
    assert!((1..=DEPTH_MAX).contains(&depth), "the depth is 1 to {DEPTH_MAX}");
    let mut world = World::new(bdev.as_ref());
    if *disk == "mirror" {
        world.mirror(bdev.as_ref(), &Null::new("target", 512, BLOCKS).unwrap());
    }
    let kind = match *operation {
        "read" | "idle" => blk_type::IN,
        "write" => blk_type::OUT,
        other => panic!("no such operation: {other}"),
    };
    for _ in 0..WARM_UP {
        world.round(kind, depth, World::turn);
    }
    for _ in 0..rounds {
        if *operation == "idle" {
            counted_turn(&mut world);
        } else {
            world.round(kind, depth, counted_turn);
        }
    }
    println!("{rounds} rounds of {depth}");
}
