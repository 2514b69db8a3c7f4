//! The performer: carries out what the core decides, and tells it what came of it.
//!
//! It holds the channels and the memory. Reads of the guest go straight to the source and are none of the core's business.
//! The payload of a write to both legs is copied once into bounce memory, from where both legs take it: a guest may change
//! its buffer in flight, and two legs that read it at different moments would differ for good.

use std::collections::VecDeque;
use std::sync::Arc;

use resilver_reactor::{Armed, Context, Nanos};
use resilver_sys::{BadSlice, BufferSlice, Mapping, RegionId, Slices, WaitSet, usize_from};

use super::bugs::{Bug, planted};
use super::core::{Action, BOUNCE_UNIT, BOUNCE_UNITS_MAX, Core, CoreConfig, Leg, OpState, Slot};
use super::life::Refused;
use super::pieces::{UNITS as ZERO_UNITS, UNITS_U32 as ZERO_UNITS_U32, UnitMap};
use super::verify::CHECKS;
use super::{
    COPIES, MirrorChannels, MirrorConfig, QUARANTINE, UNAWAITED, WorkingBitmap, combined_limits,
    validate,
};
use crate::bitmap::Grid;
use crate::channel::{CompletionBatch, IoChannel, Limits};
use crate::device::BdevError;
use crate::disk::DISK_DEPTH;
use crate::io::{BdevIo, Completion, IoKind, Tag};
use crate::job::{
    BlockJob, Commit, Dissolved, JobEvent, JobInfo, JobStatus, JobVerb, JobWants, ScanReport, Side,
    VerbError,
};

/// Slots for requests: those of the guest, and as many as may not have ended though nobody waits for them.
const OPS: u32 = 2 * DISK_DEPTH + UNAWAITED as u32;
/// Units of bounce memory: one for each request of an ordinary size in flight, twice over.
const UNITS: u32 = 2 * DISK_DEPTH;
/// Bytes of the first of them, which the legs' kernel queues keep pinned. They are taken first, so a guest with few writes in flight
/// uses no others.
const PINNED: usize = 64 * BOUNCE_UNIT as usize;
/// Bytes of a copy's buffer, where `buf_size` does not say less.
const WINDOW: u32 = 1 << 20;
/// The most bytes of one copy inside a hole, where the target deallocates them. Where it writes zeroes out, a hole costs as
/// much as data, and a guest's write into it waits as long.
const HOLE_RUN: u64 = 16 << 20;
/// The most bytes of one copy that takes no reading and no writing, but a change of metadata (0.2 ms of it on an XFS), for which a guest
/// that comes back may have to wait.
const OFFLOAD_RUN: u64 = 16 << 20;
/// Completions taken from a leg in one turn.
const BATCH: usize = 256;

const NO_COPY_TO_SWITCH_TO: &str = "it mirrors new writes only (sync 'none'), so its target is no copy of the disk; end \
     it with bdev_mirror_finish or job_cancel";
const NO_COPY_TO_VERIFY: &str = "it mirrors new writes only (sync 'none'), so its target differs from its source wherever nothing was written";
const OBSERVER_IN_BACKGROUND: &str = "its observer policy gives the target writes as they are made; start another mirror for \
     background copies";

/// In a tag: a read of the guest, on the source.
const READ: u32 = 1 << 16;
/// In a tag: a write of the copier, on the target.
const COPY: u32 = 1 << 17;
/// In a tag: a read of the comparison, on either leg.
const CHECK: u32 = 1 << 19;
/// The tag of a flush.
const FLUSH: Tag = Tag(1 << 18);

/// What a chunk is, for tests that compare the legs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ChunkState {
    /// Equal on both legs.
    Clean,
    /// To be copied.
    Dirty,
    /// A copy of it is in flight.
    Copying,
    /// A guest's request is in flight there, or waits.
    Writing,
    /// A target I/O that was given up may still land there.
    Shut,
}

/// A request as it came, and where its payload was copied to.
#[derive(Clone, Copy)]
struct Held {
    io: BdevIo,
    /// Where its payload is in bounce memory: a slice for each unit, from the unit's beginning.
    bounced: [BufferSlice; BOUNCE_UNITS_MAX as usize],
    units: usize,
}

impl Held {
    const NONE: Self = Self {
        io: BdevIo { tag: Tag(0), kind: IoKind::Flush, may_unmap: false, offset: 0, length: 0 },
        bounced: [BufferSlice::EMPTY; BOUNCE_UNITS_MAX as usize],
        units: 0,
    };
}

/// A piece of our own memory, cut into equal parts.
struct Pool {
    mapping: Arc<Mapping>,
    region: RegionId,
    part: u32,
}

impl Pool {
    fn new(parts: u32, part: u32) -> Result<Self, BdevError> {
        let bytes = u64::from(parts) * u64::from(part);
        let mapping = Mapping::anonymous(usize_from(bytes)).map_err(|error| {
            BdevError::Resources { name: "mirror".to_owned(), reason: error.to_string() }
        })?;
        Ok(Self { mapping, region: RegionId::NONE, part })
    }

    /// Bytes of one part.
    fn slice(&self, index: u16, skip: u32, length: u32) -> BufferSlice {
        let offset = u64::from(index) * u64::from(self.part) + u64::from(skip);
        BufferSlice { region: self.region, length, offset }
    }
}

/// A live mirror: what a disk polls in place of its source.
pub struct Mirror {
    job_id: String,
    bitmap: Option<WorkingBitmap>,
    core: Core,
    limits: Limits,
    source: Box<dyn IoChannel>,
    copy_source: Box<dyn IoChannel>,
    target: Box<dyn IoChannel>,
    offload: Option<Box<dyn IoChannel>>,
    held: Box<[Held]>,
    /// What each of them carries.
    payloads: Box<[Slices]>,
    /// The guest's tags, and when its reads came, at the earliest.
    reads: Box<[(Tag, Nanos)]>,
    free_reads: Vec<u16>,
    bounce: Pool,
    free_units: Vec<u16>,
    buffers: Pool,
    zero_unit: u32,
    /// Answered, and not handed over.
    answers: VecDeque<Completion>,
    done: CompletionBatch,
    /// Something was submitted to a leg since the last commit.
    uncommitted: bool,
    /// The guest had something in flight in this turn.
    busy: bool,
    /// When the guest's requests were last taken; none after a sleep, which the next one ends.
    taken: Option<Nanos>,
}

impl Mirror {
    /// A mirror that is not yet above its disk.
    ///
    /// # Errors
    /// A parameter out of range, a target that does not fit, channels without the depth that is needed, no memory.
    pub fn new(config: MirrorConfig, channels: MirrorChannels) -> Result<Self, BdevError> {
        validate(&config, &channels)?;
        let limits = combined_limits(channels.source.limits(), channels.target.limits());
        let core = core_config(&config, &limits, &channels);
        let MirrorChannels { source, copy_source, target, offload } = channels;
        let (window, zero_unit, copies) = (core.window, core.zero_unit, u32::from(core.copies));
        #[allow(clippy::cast_possible_truncation)] // constants below u16::MAX
        Ok(Self {
            job_id: config.job_id,
            bitmap: config.bitmap,
            held: vec![Held::NONE; usize::from(core.ops)].into_boxed_slice(),
            payloads: Slices::array(usize::from(core.ops)),
            core: Core::new(core),
            limits,
            source,
            copy_source,
            target,
            offload,
            reads: vec![(Tag(0), Nanos::ZERO); DISK_DEPTH as usize].into_boxed_slice(),
            free_reads: (0..DISK_DEPTH as u16).rev().collect(),
            bounce: Pool::new(UNITS, BOUNCE_UNIT)?,
            free_units: (0..UNITS as u16).rev().collect(),
            buffers: Pool::new(copies + 2 * u32::from(CHECKS), window)?,
            zero_unit,
            answers: VecDeque::with_capacity(OPS as usize + DISK_DEPTH as usize),
            done: CompletionBatch::with_capacity(BATCH),
            uncommitted: false,
            busy: false,
            taken: None,
        })
    }

    /// Has the memory cleared that a guest at work uses at once, for its writes and for the one copy that is made beside them, and the
    /// former pinned: what a reactor touches first, it clears while the guest waits. A mirror works without, and slower. Steps aside
    /// meanwhile: not for a reactor. At most once.
    pub fn prepare(&mut self) {
        self.bounce.mapping.populate(PINNED);
        for leg in [&mut self.source, &mut self.target] {
            leg.expect_pool(&self.bounce.mapping, PINNED);
        }
        self.buffers.mapping.populate(self.buffers.part as usize);
    }

    /// Chunks of the disk.
    #[must_use]
    pub fn chunks(&self) -> u64 {
        self.core.grid.chunks()
    }

    /// Bytes of a chunk.
    #[must_use]
    pub fn granularity(&self) -> u64 {
        self.core.grid.granularity()
    }

    /// The rows of the tables that it has come to: for tests, which want them all.
    #[must_use]
    pub fn rows(&self) -> super::Rows {
        self.core.rows
    }

    /// Whether a chunk is to be copied: for tests, which add them up.
    #[must_use]
    pub fn is_dirty(&self, index: u64) -> bool {
        self.core.maps.dirty.get(index)
    }

    /// What a chunk is now: for tests, which compare the legs where it is clean.
    #[must_use]
    pub fn chunk_state(&self, index: u64) -> ChunkState {
        let core = &self.core;
        let meets = |chunks: std::ops::Range<u64>| chunks.contains(&index);
        let live = |op: &&super::core::Op| {
            !matches!(op.state, OpState::Free | OpState::Answered) && op.kind.mutates()
        };
        if core.shuts(&core.grid.bytes(&(index..index + 1))) {
            ChunkState::Shut
        } else if core.copies.iter().any(|copy| {
            copy.is_at_work() && meets(core.grid.touched(copy.start, copy.end - copy.start))
        }) {
            ChunkState::Copying
        } else if core
            .ops
            .iter()
            .filter(live)
            .any(|op| meets(core.grid.touched(op.offset, op.length)))
        {
            ChunkState::Writing
        } else if core.maps.dirty.get(index) {
            ChunkState::Dirty
        } else {
            ChunkState::Clean
        }
    }

    /// Carries out what the core has decided.
    fn perform(&mut self, cx: &Context<'_>) {
        while let Some(action) = self.core.next_action() {
            match action {
                Action::Source { op, sent } => self.send_source(cx, op, sent),
                Action::Both { op, sent, units } => self.send_both(cx, op, sent, units),
                Action::Answer { tag, result } => {
                    self.answers.push_back(Completion { tag, result })
                }
                Action::Release { op } => {
                    let held = &mut self.held[usize::from(op)];
                    for slice in &held.bounced[..held.units] {
                        #[allow(clippy::cast_possible_truncation)] // there are fewer units
                        let unit = (slice.offset / u64::from(BOUNCE_UNIT)) as u16;
                        self.free_units.push(unit);
                    }
                    held.units = 0;
                }
                Action::Flush(side) => {
                    let io = flush(FLUSH);
                    self.leg(side).submit(cx, io, &[]);
                    self.uncommitted = true;
                }
                Action::CopyRead { copy, offset, length } => {
                    let io = transfer(Tag(u32::from(copy)), IoKind::Read, offset, length);
                    let buffer = self.buffers.slice(copy, 0, length);
                    self.copy_source.submit(cx, io, &[buffer]);
                    self.uncommitted = true;
                }
                Action::CheckRead { check, side, offset, length } => {
                    let tag = Tag(CHECK | u32::from(check));
                    let buffer = self.check_buffer(check, side, 0, length);
                    let leg = match side {
                        Side::Source => &mut self.copy_source,
                        Side::Target => &mut self.target,
                    };
                    leg.submit(cx, transfer(tag, IoKind::Read, offset, length), &[buffer]);
                    self.uncommitted = true;
                }
                Action::Compare { check, offset, length } => {
                    self.compare(cx, check, offset, length);
                }
                Action::CopyWrite { copy, offset, length, skip } => {
                    let io = transfer(Tag(COPY | u32::from(copy)), IoKind::Write, offset, length);
                    let buffer = self.buffers.slice(copy, skip, length);
                    self.target.submit(cx, io, &[buffer]);
                    self.uncommitted = true;
                }
                Action::CopyZero { copy, offset, length } => {
                    let (tag, may_unmap) = (Tag(COPY | u32::from(copy)), self.core.config.unmap);
                    let io = BdevIo { tag, kind: IoKind::WriteZeroes, may_unmap, offset, length };
                    self.target.submit(cx, io, &[]);
                    self.uncommitted = true;
                }
                Action::CopyOffload { copy, offset, length } => {
                    let io = transfer(Tag(u32::from(copy)), IoKind::Write, offset, length);
                    let offload =
                        self.offload.as_mut().expect("the core knows whether there is one");
                    offload.submit(cx, io, &[]);
                    self.uncommitted = true;
                }
            }
        }
    }

    fn leg(&mut self, side: Side) -> &mut dyn IoChannel {
        match side {
            Side::Source => self.source.as_mut(),
            Side::Target => self.target.as_mut(),
        }
    }

    fn send_source(&mut self, cx: &Context<'_>, op: Slot, sent: IoKind) {
        let held = &self.held[usize::from(op)];
        let io = BdevIo { tag: Tag(u32::from(op)), kind: sent, ..held.io };
        self.source.submit(cx, io, self.payloads[usize::from(op)].as_slice());
        self.uncommitted = true;
    }

    /// Sends a request to both legs, its payload from bounce memory.
    fn send_both(&mut self, cx: &Context<'_>, op: Slot, sent: IoKind, units: u16) {
        let held = &mut self.held[usize::from(op)];
        held.units = usize::from(units);
        let mut left = held.io.length;
        for slice in &mut held.bounced[..held.units] {
            let unit = self.free_units.pop().expect("the core counts units");
            #[allow(clippy::cast_possible_truncation)] // at most a unit
            let length = left.min(u64::from(BOUNCE_UNIT)) as u32;
            *slice = self.bounce.slice(unit, 0, length);
            left -= u64::from(length);
        }
        let bounced = &held.bounced[..held.units];
        let copied = if planted(Bug::NoBounceCopy) {
            Ok(())
        } else {
            copy_slices(cx, bounced, self.payloads[usize::from(op)].as_slice())
        };
        if copied.is_err() {
            return self.core.payload_gone(op, cx.now);
        }
        let payload = if planted(Bug::NoBounceCopy) {
            self.payloads[usize::from(op)].as_slice()
        } else {
            bounced
        };
        // A discard is sent as zeroes that may be deallocated; to the target only as far as the operator lets it.
        let may_unmap = held.io.may_unmap || held.io.kind == IoKind::Unmap;
        let io = BdevIo { tag: Tag(u32::from(op)), kind: sent, may_unmap, ..held.io };
        self.source.submit(cx, io, payload);
        let may_unmap = may_unmap && self.core.config.unmap;
        self.target.submit(cx, BdevIo { may_unmap, ..io }, payload);
        self.uncommitted = true;
    }

    /// Takes what the source has completed.
    fn poll_source(&mut self, cx: &Context<'_>) {
        self.done.clear();
        self.source.poll(cx, &mut self.done);
        let mut at = 0;
        while let Some(Completion { tag, result }) = self.done.get(at) {
            at += 1;
            if tag == FLUSH {
                self.core.flush_done(Side::Source, result, cx.now);
            } else if tag.0 & READ != 0 {
                let slot = slot_of(tag);
                let (tag, came) = self.reads[usize::from(slot)];
                self.core.guest_answered(cx.now - came);
                self.answers.push_back(Completion { tag, result });
                self.free_reads.push(slot);
            } else {
                self.core.leg_done(slot_of(tag), Side::Source, result, cx.now);
            }
        }
        self.perform(cx);
    }

    /// Takes what the copier has read.
    fn poll_copy_source(&mut self, cx: &Context<'_>) {
        self.done.clear();
        self.copy_source.poll(cx, &mut self.done);
        let mut at = 0;
        while let Some(Completion { tag, result }) = self.done.get(at) {
            at += 1;
            let copy = slot_of(tag);
            if tag.0 & CHECK != 0 {
                self.core.check_read_done(copy, Side::Source, result, cx.now);
            } else {
                let zeroes = result.map(|()| self.zero_map(cx, copy));
                self.core.read_done(copy, zeroes, cx.now);
            }
        }
        self.perform(cx);
    }

    /// Takes what the target has completed.
    fn poll_target(&mut self, cx: &Context<'_>) {
        self.done.clear();
        self.target.poll(cx, &mut self.done);
        let mut at = 0;
        while let Some(Completion { tag, result }) = self.done.get(at) {
            at += 1;
            if tag == FLUSH {
                self.core.flush_done(Side::Target, result, cx.now);
            } else if tag.0 & CHECK != 0 {
                self.core.check_read_done(slot_of(tag), Side::Target, result, cx.now);
            } else if tag.0 & COPY != 0 {
                self.core.write_done(slot_of(tag), result, cx.now);
            } else {
                self.core.leg_done(slot_of(tag), Side::Target, result, cx.now);
            }
        }
        self.perform(cx);
    }

    /// Takes what was brought over by whoever holds both legs.
    fn poll_offload(&mut self, cx: &Context<'_>) {
        let Some(offload) = &mut self.offload else { return };
        self.done.clear();
        offload.poll(cx, &mut self.done);
        let mut at = 0;
        while let Some(Completion { tag, result }) = self.done.get(at) {
            at += 1;
            self.core.write_done(slot_of(tag), result, cx.now);
        }
        self.perform(cx);
    }

    /// A part of the buffer that a check reads a leg into: those of the checks come behind those of the copies.
    fn check_buffer(&self, check: u16, side: Side, skip: u32, length: u32) -> BufferSlice {
        let part = self.core.config.copies + 2 * check + side as u16;
        self.buffers.slice(part, skip, length)
    }

    /// Compares what both legs gave for a window, chunk by chunk.
    fn compare(&mut self, cx: &Context<'_>, check: u16, offset: u64, length: u32) {
        let window = offset..offset + u64::from(length);
        for chunk in self.core.grid.touched(offset, u64::from(length)) {
            let bytes = self.core.grid.bytes(&(chunk..chunk + 1));
            let (start, end) = (bytes.start.max(window.start), bytes.end.min(window.end));
            #[allow(clippy::cast_possible_truncation)] // within a window
            let (skip, part) = ((start - offset) as u32, (end - start) as u32);
            let side = |side| self.check_buffer(check, side, skip, part);
            if cx.memory.equal(side(Side::Source), side(Side::Target)) != Ok(true) {
                self.core.chunk_differs(chunk);
            }
        }
        self.core.compared(check, cx.now);
    }

    /// Looks which units of a window are zero.
    fn zero_map(&self, cx: &Context<'_>, copy: u16) -> UnitMap {
        let mut zeroes = UnitMap::default();
        let (_, length) = self.core.copies[usize::from(copy)].window();
        let mut at = 0;
        for index in 0..ZERO_UNITS {
            if at >= length {
                break;
            }
            let mut unit = self.zero_unit.min(length - at);
            if planted(Bug::ZeroDetectionShort) {
                unit -= unit.min(512);
            }
            if cx.memory.is_zero(self.buffers.slice(copy, at, unit)) == Ok(true) {
                zeroes[index / 64] |= 1 << (index % 64);
            }
            at += self.zero_unit;
        }
        zeroes
    }

    fn cannot(&self, verb: JobVerb, reason: &str) -> VerbError {
        let (job, reason) = (self.job_id.clone(), reason.to_owned());
        VerbError::NotSupported { job, verb: verb.name(), reason }
    }

    fn guest_busy(&self) -> bool {
        self.core.guest_live > 0 || self.free_reads.len() < self.reads.len()
    }

    fn end(self: Box<Self>, side: Side, now: Nanos) -> Dissolved {
        let mut mirror = *self;
        if let Some(working) = &mirror.bitmap {
            mirror.core.give_back(working, side);
        }
        let mut info = mirror.core.info(now);
        info.status = JobStatus::Concluded;
        mirror.source.forget_pool();
        mirror.target.forget_pool();
        let (survivor, other) = match side {
            Side::Source => (mirror.source, mirror.target),
            Side::Target => (mirror.target, mirror.source),
        };
        Dissolved {
            survivor,
            released: [mirror.copy_source, other].into_iter().chain(mirror.offload).collect(),
            regions: vec![mirror.bounce.region, mirror.buffers.region],
            side,
            info,
        }
    }
}

/// What the core is made for, from what the operator says and the channels accept. `limits` are those of the mirror.
fn core_config(config: &MirrorConfig, limits: &Limits, channels: &MirrorChannels) -> CoreConfig {
    let MirrorChannels { copy_source, target, offload, .. } = channels;
    let grid = Grid::new(limits.size(), config.granularity);
    let diff = config.diff_cluster.is_some();
    let zero_unit = limits.block_size.max(4096);
    let most =
        limits.max_transfer.max(zero_unit).min(copy_source.limits().max_transfer).min(WINDOW);
    let buf_size = if config.buf_size == 0 { u64::MAX } else { config.buf_size };
    let window = u32::try_from(buf_size).unwrap_or(u32::MAX).min(most);
    // A window is whole units of zero detection, and no more of them than their map has.
    let window = (window / zero_unit).clamp(1, ZERO_UNITS_U32) * zero_unit;
    let copies = (buf_size / u64::from(window)).clamp(1, u64::from(COPIES));
    // Where a difference image has nothing its base shows.
    let unmap = config.unmap && !diff;
    // All chunks must be made of his blocks; and where a difference image has a part of a cluster, a copy must be of data.
    let offloads = offload.as_ref().is_some_and(|offload| {
        !diff && grid.granularity().is_multiple_of(offload.limits().block_size.into())
    });
    #[allow(clippy::cast_possible_truncation)] // small constants, and clamped above
    CoreConfig {
        grid,
        copy_mode: config.copy_mode,
        on_error: [config.on_source_error, config.on_target_error],
        target_timeout: config.target_timeout,
        unmap,
        target_is_zero: config.target_is_zero,
        auto_finalize: config.auto_finalize,
        cancel_on_guest_reset: config.cancel_on_guest_reset,
        verify_before_complete: config.verify_before_complete,
        latency_ceiling: config.latency_ceiling,
        auto_converge: config.auto_converge,
        sync: config.sync,
        by_bitmap: config.bitmap.is_some(),
        observer: config.observer,
        diff,
        speed: config.speed,
        zeroes_unmap: limits.zeroes_unmap && unmap,
        ops: OPS as u16,
        quarantine: u32::from(QUARANTINE),
        unawaited: u32::from(UNAWAITED),
        units: UNITS,
        copies: copies as u16,
        run: u64::from(window),
        hole_run: if target.limits().zeroes_unmap && unmap { HOLE_RUN } else { u64::from(window) },
        window,
        inline: copy_source.works_inline() && target.works_inline(),
        offload_run: offloads.then_some(OFFLOAD_RUN),
        zero_unit,
        max_zeroes: target.limits().max_unmap.max(u64::from(limits.block_size)),
    }
}

/// The slot that a tag names, whatever else it says.
fn slot_of(tag: Tag) -> u16 {
    #[allow(clippy::cast_possible_truncation)] // the low half is the slot
    let slot = tag.0 as u16;
    slot
}

fn flush(tag: Tag) -> BdevIo {
    BdevIo { tag, kind: IoKind::Flush, may_unmap: false, offset: 0, length: 0 }
}

fn transfer(tag: Tag, kind: IoKind, offset: u64, length: impl Into<u64>) -> BdevIo {
    BdevIo { tag, kind, may_unmap: false, offset, length: length.into() }
}

/// Copies one payload into another of the same length, wherever their slices are cut.
fn copy_slices(cx: &Context<'_>, to: &[BufferSlice], from: &[BufferSlice]) -> Result<(), BadSlice> {
    let mut targets = to.iter().copied();
    let mut room = BufferSlice::EMPTY;
    for slice in from {
        let mut at = 0;
        while at < slice.length {
            if room.length == 0 {
                room = targets.next().ok_or(BadSlice::LengthMismatch)?;
            }
            let length = room.length.min(slice.length - at);
            let source = slice.part(at, length).ok_or(BadSlice::OutOfBounds)?;
            let target = room.part(0, length).ok_or(BadSlice::OutOfBounds)?;
            cx.memory.copy(target, source)?;
            room = room.part(length, room.length - length).ok_or(BadSlice::OutOfBounds)?;
            at += length;
        }
    }
    Ok(())
}

impl IoChannel for Mirror {
    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn free(&self, kind: IoKind) -> u32 {
        if kind == IoKind::Read {
            let free = u32::try_from(self.free_reads.len()).unwrap_or(u32::MAX);
            return free.min(self.source.free(kind));
        }
        let free = u32::try_from(self.core.free_slots()).unwrap_or(u32::MAX);
        free.min(DISK_DEPTH.saturating_sub(self.core.guest_live)).min(self.source.free(kind))
    }

    fn submit(&mut self, cx: &Context<'_>, io: BdevIo, payload: &[BufferSlice]) {
        // It may have come right after the last were taken, and have waited for what the reactor did since: for a copy, too.
        let came = self.taken.unwrap_or(cx.now);
        if io.kind == IoKind::Read {
            let slot = self.free_reads.pop().expect("free() was asked before");
            self.reads[usize::from(slot)] = (io.tag, came);
            self.core.guest_asks(&io);
            self.source.submit(cx, BdevIo { tag: Tag(READ | u32::from(slot)), ..io }, payload);
            self.uncommitted = true;
            return;
        }
        let slot = self.core.guest(&io, came, cx.now);
        let held = &mut self.held[usize::from(slot)];
        held.io = io;
        self.payloads[usize::from(slot)].set(payload);
        self.perform(cx);
    }

    fn commit(&mut self, cx: &Context<'_>) {
        self.source.commit(cx);
        self.copy_source.commit(cx);
        self.target.commit(cx);
        if let Some(offload) = &mut self.offload {
            offload.commit(cx);
        }
        self.uncommitted = false;
    }

    fn poll(&mut self, cx: &Context<'_>, done: &mut CompletionBatch) {
        self.taken = Some(cx.now);
        // A guest on memory has its answers within the turn, and is at work all the same.
        let was_busy = self.guest_busy();
        // The target first: a write that both have taken is then answered at once, and never trails.
        self.poll_target(cx);
        self.poll_source(cx);
        self.busy = was_busy || self.guest_busy();
        while done.room() > 0 {
            let Some(answer) = self.answers.pop_front() else { break };
            done.push(answer);
        }
    }

    fn in_flight(&self) -> u32 {
        let reads = self.reads.len() - self.free_reads.len();
        let more = u32::try_from(reads + self.answers.len()).unwrap_or(u32::MAX);
        self.core.guest_live + more
    }

    fn attach(&mut self, cx: &Context<'_>) {
        self.source.attach(cx);
        self.copy_source.attach(cx);
        self.target.attach(cx);
        if let Some(offload) = &mut self.offload {
            offload.attach(cx);
        }
        for pool in [&mut self.bounce, &mut self.buffers] {
            match cx.memory.insert(Arc::clone(&pool.mapping)) {
                Ok(region) => pool.region = region,
                Err(_) => self.core.no_memory(cx.now),
            }
        }
        if let Some(working) = &self.bitmap {
            self.core.work_by(working);
        }
        self.core.inserted();
    }

    fn detach(&mut self, cx: &Context<'_>) {
        for pool in [&mut self.bounce, &mut self.buffers] {
            cx.memory.remove(pool.region);
            pool.region = RegionId::NONE;
        }
        self.source.detach(cx);
        self.copy_source.detach(cx);
        self.target.detach(cx);
        if let Some(offload) = &mut self.offload {
            offload.detach(cx);
        }
    }

    fn arm(&mut self, cx: &Context<'_>, set: &mut WaitSet) -> Armed {
        self.taken = None;
        if self.uncommitted || !self.answers.is_empty() {
            return Armed::Ready;
        }
        let deadline = self.core.deadline();
        if deadline.is_some_and(|deadline| deadline <= cx.now) {
            return Armed::Ready;
        }
        let legs = [&mut self.source, &mut self.copy_source, &mut self.target];
        let all = legs.into_iter().chain(&mut self.offload);
        all.fold(Armed::Until(deadline), |armed, leg| armed.and(leg.arm(cx, set)))
    }

    fn disarm(&mut self, cx: &Context<'_>) {
        self.source.disarm(cx);
        self.copy_source.disarm(cx);
        self.target.disarm(cx);
        if let Some(offload) = &mut self.offload {
            offload.disarm(cx);
        }
    }
}

impl BlockJob for Mirror {
    fn verb(&mut self, cx: &Context<'_>, verb: JobVerb) -> Result<(), VerbError> {
        let done = self.core.verb(verb, cx.now);
        self.perform(cx);
        done.map_err(|refused| match refused {
            Refused::State(status) => {
                VerbError::State { job: self.job_id.clone(), status, verb: verb.name() }
            }
            Refused::AlreadyPaused => VerbError::AlreadyPaused,
            Refused::NotPaused => VerbError::NotPaused,
            Refused::AlreadyVerifying => VerbError::AlreadyVerifying { job: self.job_id.clone() },
            Refused::NotVerifying => VerbError::NotVerifying { job: self.job_id.clone() },
            Refused::NoCopyToSwitchTo => self.cannot(verb, NO_COPY_TO_SWITCH_TO),
            Refused::NoCopyToVerify => self.cannot(verb, NO_COPY_TO_VERIFY),
            Refused::ObserverInBackground => self.cannot(verb, OBSERVER_IN_BACKGROUND),
        })
    }

    /// The copier's turn. Where the reactor does the work it is done here, in the time that the guest takes for its answers, and not
    /// between its next requests and theirs.
    fn turn(&mut self, cx: &Context<'_>) {
        self.poll_copy_source(cx);
        self.poll_offload(cx);
        self.core.turn(self.busy, cx.now);
        self.perform(cx);
        if self.core.config.inline && self.uncommitted {
            self.commit(cx);
        }
    }

    fn info(&self, now: Nanos) -> JobInfo {
        self.core.info(now)
    }

    fn take_event(&mut self) -> Option<JobEvent> {
        self.core.events.pop_front()
    }

    fn wants(&self) -> JobWants {
        self.core.wants()
    }

    fn scanned(&mut self, _cx: &Context<'_>, report: ScanReport) {
        self.core.scanned(report);
    }

    fn committed(&mut self, cx: &Context<'_>, record: Commit) {
        self.core.committed(record, cx.now);
        self.perform(cx);
    }

    fn retracted(&mut self, cx: &Context<'_>, done: bool) {
        self.core.retracted(done, cx.now);
        self.perform(cx);
    }

    fn hold_failed(&mut self, cx: &Context<'_>, in_flight: u32) {
        self.core.hold_failed(in_flight, cx.now);
        self.perform(cx);
    }

    fn guest_reset(&mut self, cx: &Context<'_>) {
        self.core.guest_reset(cx.now);
        self.perform(cx);
    }

    fn dissolve(self: Box<Self>, cx: &Context<'_>) -> Dissolved {
        debug_assert_eq!(self.in_flight(), 0, "a mirror is dissolved under its guest");
        debug_assert!(self.core.ops.iter().all(|op| op.leg(Side::Source) != Leg::Flying));
        // Should the disk hold for a reason that has passed, the source is always a safe answer.
        let side = self.core.survivor().unwrap_or(Side::Source);
        debug_assert!(side == Side::Source || self.core.in_sync());
        self.end(side, cx.now)
    }

    fn abandon(self: Box<Self>, cx: &Context<'_>) -> Dissolved {
        self.end(Side::Source, cx.now)
    }

    fn as_channel(&mut self) -> &mut dyn IoChannel {
        self
    }
}
