//! Simulated disks: a medium in memory that behaves as badly as real ones may.
//!
//! Fault model. An I/O begins when its channel is committed, lands on the medium at one moment and is reported at a later
//! one; both are drawn from the seed, so I/Os overtake one another and overlapping ones land in any order. The payload is
//! read from memory at submission, at landing, or half and half. A failed write may have landed in part. A stalled I/O
//! lands and ends when the stall does, however long everybody has stopped waiting. A full disk refuses writes to sectors
//! it has not allocated. What was not flushed may be lost with the power, sector by sector, in any combination.
//!
//! The medium also checks its users: an I/O outside the limits, with a bad payload, beyond the free slots or dropped in
//! flight is a finding.

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use resilver_bdev::{
    Bdev, BdevError, BdevIo, Completion, CompletionBatch, Geometry, IoChannel, IoError, IoKind,
    IoStats, Limits,
};
use resilver_reactor::{Armed, Context, Nanos};
use resilver_sys::{BufferSlice, RegionTable, WaitSet};

use super::lock;
use super::rng::Rng;
use super::sector::{SECTOR, Sector, Stamp};
use super::trace::Trace;

/// The number of stamps that nobody has written: what a disk holds before the simulator gives it a content.
const GARBAGE: u32 = u32::MAX;

/// What a disk makes of an unmapped range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnmapResult {
    /// It reads zero.
    Zero,
    /// It reads as before.
    Keep,
    /// It reads as something nobody wrote.
    Garbage,
}

/// When the bytes of a write are read from memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sampling {
    /// When the I/O begins.
    Early,
    /// When it lands.
    Late,
    /// The first half of each sector at one moment, the second at the other.
    Torn,
}

/// What a flush that fails does to what it was to make durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailedFlush {
    /// The next one can still make it durable.
    Keeps,
    /// Some of it never becomes durable unless it is written again: Linux reports a lost page once and calls it clean. A
    /// mirror must live with that on its target; a guest whose own disk does it is told by the failure.
    Loses,
}

/// How a disk is, for its whole life.
#[derive(Debug, Clone, Copy)]
pub struct DiskOptions {
    /// Its limits; the size is in here.
    pub limits: Limits,
    /// What unmap does.
    pub unmap: UnmapResult,
    /// The shortest and longest time an I/O takes when nothing is wrong.
    pub latency: (Nanos, Nanos),
    /// I/Os in a thousand that take twenty times as long.
    pub slow_per_mille: u32,
    /// It says that it works inline. It does not: whoever believes it must be right all the same.
    pub inline: bool,
}

/// What is wrong with a disk now.
#[derive(Debug, Clone, Default)]
pub struct Faults {
    /// I/Os in a thousand that fail.
    pub error_per_mille: u32,
    /// Flushes in a thousand that fail besides.
    pub flush_error_per_mille: u32,
    /// I/Os in a thousand that stall.
    pub stall_per_mille: u32,
    /// The longest stall.
    pub stall_max: Nanos,
    /// No unallocated sector can be written.
    pub full: bool,
    /// Sectors on which I/Os of these kinds fail until the fault is gone.
    pub bad: Option<(Range<usize>, &'static [IoKind])>,
}

/// What a scenario does to one I/O.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// It fails.
    Fail(IoError),
    /// It stalls until [`SimDisk::release_stalled`].
    Stall,
}

/// A fault that waits for its I/O.
#[derive(Debug, Clone, Copy)]
struct Plan {
    kind: IoKind,
    effect: Effect,
}

/// Where an I/O is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Submitted, and not yet published by a commit.
    Submitted,
    /// On its way to the medium.
    Started,
    /// On the medium; the channel has yet to report it.
    Landed,
}

struct Op {
    channel: u32,
    io: BdevIo,
    slices: Vec<BufferSlice>,
    /// The payload as it was when the I/O began.
    early: Vec<u8>,
    sampling: Sampling,
    phase: Phase,
    land_at: Nanos,
    done_at: Nanos,
    stalled: bool,
    result: Result<(), IoError>,
    /// A flush makes durable what had landed before this.
    flush_upto: u64,
    /// What is written comes from there.
    from: Option<Arc<Mutex<Medium>>>,
}

/// An I/O that the disk failed.
#[derive(Debug, Clone, Copy)]
pub struct Failed {
    /// When it was reported.
    pub at: Nanos,
    /// The I/O.
    pub io: BdevIo,
}

/// One sector of the medium.
#[derive(Debug, Clone)]
struct Cell {
    /// What a read returns.
    content: Sector,
    /// What is left after a power loss, unless one of `unflushed` is.
    durable: Sector,
    /// What has landed since the last flush, with the landing's number.
    unflushed: Vec<(u64, Sector)>,
    allocated: bool,
    /// It has rotted: what it holds was never written there.
    rotten: bool,
    /// What the base shows where a difference image has nothing.
    base: Option<Sector>,
}

struct Medium {
    name: String,
    options: DiskOptions,
    faults: Faults,
    /// It is a difference image without its base, with clusters of so many sectors.
    cluster: Option<usize>,
    failed_flush: FailedFlush,
    plans: Vec<Plan>,
    cells: Vec<Cell>,
    ops: Vec<Op>,
    failed: Vec<Failed>,
    channels: u32,
    landings: u64,
    rng: Rng,
    trace: Trace,
}

/// A simulated disk; clones are the same disk.
#[derive(Clone)]
pub struct SimDisk {
    medium: Arc<Mutex<Medium>>,
    name: String,
    stats: Arc<IoStats>,
    limits: Limits,
}

impl fmt::Debug for SimDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimDisk").field("name", &self.name).finish_non_exhaustive()
    }
}

/// The sectors of an I/O.
#[must_use]
pub fn sectors_of(io: &BdevIo) -> Range<usize> {
    let first = io.offset as usize / SECTOR;
    first..first + io.length as usize / SECTOR
}

/// Whether two ranges share a sector.
#[must_use]
pub fn overlap(one: &Range<usize>, two: &Range<usize>) -> bool {
    one.start < two.end && two.start < one.end
}

impl SimDisk {
    /// A disk that holds bytes nobody wrote, all allocated and durable.
    #[must_use]
    pub fn new(name: &str, options: DiskOptions, rng: Rng, trace: &Trace) -> Self {
        let sectors = options.limits.size() as usize / SECTOR;
        let cell = |sector: usize| {
            let stamp = Stamp { write: GARBAGE, sector: sector as u16, version: 0 };
            let content = Sector::filled(stamp.word());
            Cell {
                durable: content.clone(),
                content,
                unflushed: Vec::new(),
                allocated: true,
                rotten: false,
                base: None,
            }
        };
        let medium = Medium {
            name: name.to_owned(),
            options,
            faults: Faults::default(),
            cluster: None,
            failed_flush: FailedFlush::Keeps,
            plans: Vec::new(),
            cells: (0..sectors).map(cell).collect(),
            ops: Vec::new(),
            failed: Vec::new(),
            channels: 0,
            landings: 0,
            rng,
            trace: trace.clone(),
        };
        Self {
            medium: Arc::new(Mutex::new(medium)),
            name: name.to_owned(),
            stats: Arc::default(),
            limits: options.limits,
        }
    }

    /// What its channels accept.
    #[must_use]
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Its sectors.
    #[must_use]
    pub fn sectors(&self) -> usize {
        self.limits.size() as usize / SECTOR
    }

    /// Gives a sector its first content: a hole where there is none.
    pub fn preset(&self, sector: usize, content: Option<Sector>) {
        let cell = &mut lock(&self.medium).cells[sector];
        cell.allocated = content.is_some();
        cell.content = content.unwrap_or_else(Sector::zero);
        cell.durable = cell.content.clone();
    }

    /// From now on it is a difference image without its base: what it holds is the base's until it is written, and a write to
    /// a part of a cluster spoils the rest of that.
    pub fn be_a_difference(&self, cluster: usize) {
        let medium = &mut *lock(&self.medium);
        medium.cluster = Some(cluster);
        for cell in &mut medium.cells {
            cell.base = Some(cell.content.clone());
        }
    }

    /// Its base has been opened under it.
    pub fn find_base(&self) {
        lock(&self.medium).cluster = None;
    }

    /// Rots a sector: from now on it holds something else, and no I/O says so.
    pub fn rot(&self, sector: usize) {
        let medium = &mut *lock(&self.medium);
        let version = (medium.landings as u8).wrapping_add(3);
        let stamp = Stamp { write: GARBAGE, sector: sector as u16, version };
        let cell = &mut medium.cells[sector];
        cell.content = Sector::filled(stamp.word());
        cell.durable = cell.content.clone();
        cell.unflushed.clear();
        cell.rotten = true;
    }

    /// Whether a sector has rotted and was not written since.
    #[must_use]
    pub fn is_rotten(&self, sector: usize) -> bool {
        lock(&self.medium).cells[sector].rotten
    }

    /// What a read of the sector would return now.
    #[must_use]
    pub fn content(&self, sector: usize) -> Sector {
        lock(&self.medium).cells[sector].content.clone()
    }

    /// Everything that the sector may hold after a power loss now.
    #[must_use]
    pub fn after_power_loss(&self, sector: usize) -> Vec<Sector> {
        let cell = &lock(&self.medium).cells[sector];
        let unflushed = cell.unflushed.iter().map(|(_, content)| content.clone());
        std::iter::once(cell.durable.clone()).chain(unflushed).collect()
    }

    /// Whether nothing is allocated for the sector.
    #[must_use]
    pub fn is_hole(&self, sector: usize) -> bool {
        !lock(&self.medium).cells[sector].allocated
    }

    /// The first of the sectors in which the two disks differ, if any.
    #[must_use]
    pub fn first_difference(&self, other: &Self, sectors: Range<usize>) -> Option<usize> {
        let (one, two) = (lock(&self.medium), lock(&other.medium));
        sectors.into_iter().find(|sector| one.cells[*sector].content != two.cells[*sector].content)
    }

    /// Whether an I/O that changes one of the sectors is in flight.
    #[must_use]
    pub fn changing(&self, sectors: &Range<usize>) -> bool {
        let medium = lock(&self.medium);
        medium.ops.iter().any(|op| op.io.kind.mutates() && overlap(&sectors_of(&op.io), sectors))
    }

    /// Whether it failed an I/O since then that explains why this one failed. A failed flush explains a failed write too: a
    /// guest that wants its writes stable gets a flush with each.
    #[must_use]
    pub fn failed_since(&self, since: Nanos, io: &BdevIo) -> bool {
        let edges = self.limits.block_size as usize > SECTOR;
        lock(&self.medium).failed.iter().any(|failed| {
            let explains = match (failed.io.kind, io.kind) {
                (IoKind::Flush, kind) => kind != IoKind::Read,
                (_, IoKind::Flush) => false,
                (failed_kind, kind) => {
                    // A write of a part of a block reads the rest first.
                    let edge = edges && failed_kind == IoKind::Read;
                    (edge || failed_kind.mutates() == kind.mutates())
                        && overlap(&sectors_of(&failed.io), &sectors_of(io))
                }
            };
            failed.at >= since && explains
        })
    }

    /// I/O in flight, of all channels.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        lock(&self.medium).ops.len()
    }

    /// I/O in flight that stalls.
    #[must_use]
    pub fn stalled(&self) -> usize {
        lock(&self.medium).ops.iter().filter(|op| op.stalled).count()
    }

    /// When the next I/O lands or ends by itself.
    #[must_use]
    pub fn next_event(&self) -> Option<Nanos> {
        let medium = lock(&self.medium);
        let next = |op: &Op| match op.phase {
            Phase::Submitted => None,
            Phase::Started => Some(op.land_at),
            Phase::Landed => Some(op.done_at),
        };
        medium.ops.iter().filter_map(next).filter(|at| *at != Nanos::MAX).min()
    }

    /// Replaces what is wrong with the disk.
    pub fn set_faults(&self, faults: Faults) {
        lock(&self.medium).faults = faults;
    }

    /// Nothing is wrong any more, and no I/O takes longer than the longest latency: else one could outlive every time-out.
    pub fn heal(&self) {
        let mut medium = lock(&self.medium);
        medium.faults = Faults::default();
        medium.options.slow_per_mille = 0;
    }

    /// Changes what is wrong with the disk.
    pub fn change_faults(&self, change: impl FnOnce(&mut Faults)) {
        change(&mut lock(&self.medium).faults);
    }

    /// What failed flushes do from now on.
    pub fn set_failed_flush(&self, failed_flush: FailedFlush) {
        lock(&self.medium).failed_flush = failed_flush;
    }

    /// Does this to the next I/O of this kind that begins.
    pub fn plan(&self, kind: IoKind, effect: Effect) {
        lock(&self.medium).plans.push(Plan { kind, effect });
    }

    /// Ends all stalls: what stalled lands and ends at `now`.
    pub fn release_stalled(&self, now: Nanos) {
        for op in lock(&self.medium).ops.iter_mut().filter(|op| op.stalled) {
            op.stalled = false;
            op.done_at = now;
            if op.phase == Phase::Started {
                op.land_at = now;
            }
        }
    }

    /// Lands what is due.
    pub fn advance(&self, now: Nanos, memory: &RegionTable) {
        lock(&self.medium).advance(now, memory);
    }
}

impl SimDisk {
    /// Copies from `source` to this disk by whoever holds both.
    #[must_use]
    pub fn offload(&self, source: &Self, depth: u32) -> Box<dyn IoChannel> {
        let mut medium = lock(&self.medium);
        medium.channels += 1;
        Box::new(SimChannel {
            medium: Arc::clone(&self.medium),
            from: Some(Arc::clone(&source.medium)),
            id: medium.channels,
            limits: Limits { max_transfer: u32::MAX, ..self.limits },
            depth,
            in_flight: [0; IoKind::ALL.len()],
        })
    }
}

impl Bdev for SimDisk {
    fn name(&self) -> &str {
        &self.name
    }

    fn module(&self) -> &'static str {
        "sim"
    }

    fn geometry(&self) -> Geometry {
        Geometry { block_size: self.limits.block_size, num_blocks: self.limits.num_blocks }
    }

    fn open_channel(&self, depth: u32) -> Result<Box<dyn IoChannel>, BdevError> {
        let mut medium = lock(&self.medium);
        medium.channels += 1;
        Ok(Box::new(SimChannel {
            medium: Arc::clone(&self.medium),
            from: None,
            id: medium.channels,
            limits: self.limits,
            depth,
            in_flight: [0; IoKind::ALL.len()],
        }))
    }

    fn stats(&self) -> &Arc<IoStats> {
        &self.stats
    }
}

impl Medium {
    /// Decides what will become of an I/O that begins now.
    fn start(&mut self, index: usize, now: Nanos) {
        let io = self.ops[index].io;
        let (low, high) = self.options.latency;
        let mut length = self.rng.between(low.0.max(1), high.0.max(1));
        if self.rng.chance(self.options.slow_per_mille) {
            length *= 20;
        }
        let landing = self.rng.between(0, length);
        let sampling = self.rng.pick(&[Sampling::Early, Sampling::Late, Sampling::Torn]);
        let stall = self.rng.chance(self.faults.stall_per_mille);
        let stall_length = self.rng.below(self.faults.stall_max.0.max(1));
        let flush_errors =
            if io.kind == IoKind::Flush { self.faults.flush_error_per_mille } else { 0 };
        let fails = self.rng.chance(self.faults.error_per_mille + flush_errors)
            || self.faults.bad.as_ref().is_some_and(|(sectors, kinds)| {
                kinds.contains(&io.kind) && overlap(&sectors_of(&io), sectors)
            });
        let plan = self.plans.iter().position(|plan| plan.kind == io.kind);
        let plan = plan.map(|at| self.plans.remove(at).effect);

        let flush_upto = self.landings;
        let op = &mut self.ops[index];
        op.phase = Phase::Started;
        op.sampling = sampling;
        op.flush_upto = flush_upto;
        op.land_at = now + Nanos(landing);
        op.done_at = now + Nanos(length);
        if stall {
            op.stalled = true;
            op.done_at = now + Nanos(stall_length.max(length));
            op.land_at = op.done_at;
        }
        if fails {
            op.result = Err(IoError::IO);
        }
        match plan {
            Some(Effect::Fail(error)) => op.result = Err(error),
            Some(Effect::Stall) => {
                op.stalled = true;
                (op.land_at, op.done_at) = (Nanos::MAX, Nanos::MAX);
            }
            None => {}
        }
    }

    fn advance(&mut self, now: Nanos, memory: &RegionTable) {
        let due = |op: &Op| op.phase == Phase::Started && op.land_at <= now;
        loop {
            let ops = self.ops.iter().enumerate().filter(|(_, op)| due(op));
            let Some((index, _)) = ops.min_by_key(|(_, op)| op.land_at) else { break };
            let mut op = self.ops.swap_remove(index);
            op.phase = Phase::Landed;
            self.land(&mut op, memory);
            self.ops.push(op);
        }
    }

    /// The moment at which an I/O meets the medium.
    fn land(&mut self, op: &mut Op, memory: &RegionTable) {
        match op.io.kind {
            IoKind::Read => self.land_read(op, memory),
            IoKind::Flush => {
                if op.result.is_ok() {
                    self.make_durable(op.flush_upto);
                } else if self.failed_flush == FailedFlush::Loses {
                    self.lose();
                }
            }
            IoKind::Write | IoKind::Unmap | IoKind::WriteZeroes => self.land_change(op, memory),
        }
    }

    fn land_read(&mut self, op: &mut Op, memory: &RegionTable) {
        let mut bytes = Vec::with_capacity(op.io.length as usize);
        for sector in sectors_of(&op.io) {
            // A failed read may have filled the buffer in part.
            let bad = op.result.is_err() && self.rng.chance(500);
            let word = Stamp { write: GARBAGE, sector: sector as u16, version: 1 }.word();
            let content = &self.cells[sector].content;
            bytes.extend_from_slice(
                if bad { Sector::filled(word) } else { content.clone() }.bytes(),
            );
        }
        let mut rest = bytes.as_slice();
        for slice in &op.slices {
            let (part, after) = rest.split_at(slice.length as usize);
            rest = after;
            // A region that has gone stays leased for a real disk; nobody looks at it any more, so it is not written here.
            let _ = memory.write(*slice, part);
        }
    }

    /// Clusters of a difference image that this I/O writes for the first time are its own: what it does not write is spoilt.
    fn take_clusters(&mut self, io: &BdevIo) {
        let Some(size) = self.cluster else { return };
        let written = sectors_of(io);
        for cluster in written.start / size..written.end.div_ceil(size) {
            let end = ((cluster + 1) * size).min(self.cells.len());
            for sector in cluster * size..end {
                let cell = &mut self.cells[sector];
                if cell.base.take().is_some() && !written.contains(&sector) {
                    let stamp = Stamp { write: GARBAGE, sector: sector as u16, version: 4 };
                    cell.content = Sector::filled(stamp.word());
                    cell.durable = cell.content.clone();
                }
            }
        }
    }

    fn land_change(&mut self, op: &mut Op, memory: &RegionTable) {
        let deallocates = op.io.kind == IoKind::Unmap
            || op.io.kind == IoKind::WriteZeroes
                && op.io.may_unmap
                && self.options.limits.zeroes_unmap;
        if deallocates && self.cluster.is_some() {
            self.trace.finding(format_args!("{}: the base shows through: {:?}", self.name, op.io));
        }
        self.take_clusters(&op.io);
        if let Some(from) = &op.from {
            let from = lock(from);
            let contents = from.cells[sectors_of(&op.io)].iter().map(|cell| cell.content.bytes());
            op.early = contents.collect::<Vec<_>>().concat();
            op.sampling = Sampling::Early;
        }
        let late = gather(&op.slices, memory).filter(|late| late.len() == op.early.len());
        let late = late.unwrap_or_else(|| op.early.clone());
        for (at, sector) in sectors_of(&op.io).enumerate() {
            let unwritable = self.faults.full
                && !self.cells[sector].allocated
                && (op.io.kind == IoKind::Write
                    || op.io.kind == IoKind::WriteZeroes && !op.io.may_unmap);
            if unwritable {
                op.result = Err(IoError::NO_SPACE);
            }
            // What a failed write leaves behind is anybody's guess.
            if unwritable || op.result.is_err() && self.rng.chance(500) {
                continue;
            }
            let bytes = at * SECTOR..(at + 1) * SECTOR;
            let (content, allocated) = match op.io.kind {
                IoKind::Write => {
                    let early = Sector::of_bytes(&op.early[bytes.clone()]);
                    let late = Sector::of_bytes(&late[bytes]);
                    let content = match op.sampling {
                        Sampling::Early => early,
                        Sampling::Late => late,
                        Sampling::Torn => Sector::torn(&early, &late),
                    };
                    (content, true)
                }
                IoKind::WriteZeroes => {
                    (Sector::zero(), !(op.io.may_unmap && self.options.limits.zeroes_unmap))
                }
                IoKind::Unmap | IoKind::Read | IoKind::Flush => match self.options.unmap {
                    UnmapResult::Zero => (Sector::zero(), false),
                    UnmapResult::Keep => continue,
                    UnmapResult::Garbage => {
                        let version = (self.landings as u8).wrapping_add(2);
                        let stamp = Stamp { write: GARBAGE, sector: sector as u16, version };
                        (Sector::filled(stamp.word()), true)
                    }
                },
            };
            self.landings += 1;
            let cell = &mut self.cells[sector];
            cell.unflushed.push((self.landings, content.clone()));
            // Rot that is read as the edge of a block and written back is rot.
            cell.rotten &= cell.content == content;
            cell.content = content;
            cell.allocated = allocated;
        }
    }

    fn make_durable(&mut self, upto: u64) {
        for cell in &mut self.cells {
            let covered = cell.unflushed.partition_point(|(number, _)| *number <= upto);
            if let Some((_, content)) = cell.unflushed.drain(..covered).next_back() {
                cell.durable = content;
            }
        }
    }

    /// A flush has failed, and taken some of what it was to write with it.
    fn lose(&mut self) {
        for cell in &mut self.cells {
            if self.rng.chance(500) {
                cell.unflushed.clear();
            }
        }
    }
}

/// The bytes of a payload; none if a region is gone.
fn gather(slices: &[BufferSlice], memory: &RegionTable) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    for slice in slices {
        let start = bytes.len();
        bytes.resize(start + slice.length as usize, 0);
        memory.read(*slice, &mut bytes[start..]).ok()?;
    }
    Some(bytes)
}

/// A queue pair to a simulated disk.
struct SimChannel {
    medium: Arc<Mutex<Medium>>,
    /// Its writes have no payload: what they write is what this disk holds there.
    from: Option<Arc<Mutex<Medium>>>,
    id: u32,
    limits: Limits,
    depth: u32,
    in_flight: [u32; IoKind::ALL.len()],
}

impl SimChannel {
    /// What is wrong with an I/O that the parent wants to submit.
    fn objection(&self, io: &BdevIo, payload: &[BufferSlice]) -> Option<&'static str> {
        let bytes: u64 = payload.iter().map(|slice| u64::from(slice.length)).sum();
        let longest = match io.kind {
            IoKind::Read | IoKind::Write => u64::from(self.limits.max_transfer),
            IoKind::Unmap | IoKind::WriteZeroes => self.limits.max_unmap,
            IoKind::Flush => 0,
        };
        if self.free(io.kind) == 0 {
            Some("beyond the free slots")
        } else if !self.limits.admits(io) {
            Some("outside the device")
        } else if io.kind != IoKind::Flush && (io.length == 0 || io.length > longest) {
            Some("longer than the limit, or empty")
        } else if io.kind.has_payload() && bytes != io.length && self.from.is_none() {
            Some("with a payload of another length")
        } else if payload.len() > self.limits.max_segments as usize {
            Some("with too many segments")
        } else {
            None
        }
    }
}

impl IoChannel for SimChannel {
    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn free(&self, kind: IoKind) -> u32 {
        self.depth - self.in_flight[kind as usize]
    }

    fn submit(&mut self, cx: &Context<'_>, io: BdevIo, payload: &[BufferSlice]) {
        let objection = self.objection(&io, payload);
        let mut medium = lock(&self.medium);
        let early = if io.kind.has_payload() { gather(payload, cx.memory) } else { Some(vec![]) };
        if early.is_none() || objection.is_some() {
            let why = objection.unwrap_or("with a payload outside its region");
            medium.trace.finding(format_args!("{}: {io:?} submitted {why}", medium.name));
            return;
        }
        self.in_flight[io.kind as usize] += 1;
        medium.ops.push(Op {
            channel: self.id,
            io,
            slices: payload.to_vec(),
            early: early.unwrap_or_default(),
            sampling: Sampling::Early,
            phase: Phase::Submitted,
            land_at: Nanos::MAX,
            done_at: Nanos::MAX,
            stalled: false,
            result: Ok(()),
            flush_upto: 0,
            from: self.from.clone(),
        });
    }

    fn is_passive(&self) -> bool {
        true
    }

    fn works_inline(&self) -> bool {
        lock(&self.medium).options.inline
    }

    fn commit(&mut self, cx: &Context<'_>) {
        let mut medium = lock(&self.medium);
        for index in 0..medium.ops.len() {
            let op = &medium.ops[index];
            if op.channel == self.id && op.phase == Phase::Submitted {
                medium.start(index, cx.now);
            }
        }
    }

    fn poll(&mut self, cx: &Context<'_>, done: &mut CompletionBatch) {
        let mut medium = lock(&self.medium);
        medium.advance(cx.now, cx.memory);
        while done.room() > 0 {
            let due = |op: &Op| {
                op.channel == self.id && op.phase == Phase::Landed && op.done_at <= cx.now
            };
            let due: Vec<usize> =
                (0..medium.ops.len()).filter(|index| due(&medium.ops[*index])).collect();
            if due.is_empty() {
                break;
            }
            let index = medium.rng.pick(&due);
            let Op { io, result, .. } = medium.ops.swap_remove(index);
            self.in_flight[io.kind as usize] -= 1;
            if result.is_err() {
                medium.failed.push(Failed { at: cx.now, io });
            }
            let BdevIo { kind, offset, length, .. } = io;
            let name = &medium.name;
            medium.trace.line(format_args!("{name} {} {offset}+{length} {result:?}", kind.name()));
            done.push(Completion { tag: io.tag, result });
        }
    }

    fn in_flight(&self) -> u32 {
        self.in_flight.iter().sum()
    }

    fn arm(&mut self, cx: &Context<'_>, set: &mut WaitSet) -> Armed {
        // Completions of a real disk wake the sleeper through a descriptor; here the world does it at the disk's next event.
        let _ = (cx, set);
        Armed::Until(None)
    }
}

impl Drop for SimChannel {
    fn drop(&mut self) {
        let in_flight = self.in_flight();
        if in_flight > 0 && !std::thread::panicking() {
            let medium = lock(&self.medium);
            medium.trace.finding(format_args!(
                "a channel of {} was dropped with {in_flight} I/Os in flight",
                medium.name
            ));
        }
    }
}
