//! `error`: a bdev that fails or stalls I/O of the one below it when told to, for tests and rehearsals of bad days.
//!
//! An [`Injection`] says which I/O (kind, range), what befalls it, and how often. A failed one never reaches the base. A
//! stalled one does, but its completion is withheld until [`ErrorBdev::clear`]: the work is done and the answer is missing,
//! which is what a hung path to a working disk looks like. (SPDK's error bdev keeps a pending I/O from the base and fails
//! it at last; then a rehearsal of a hang always ends in an error that the real thing need not have.)
//!
//! Injections are shared with channels on any reactor through a fixed table of atomics. A cell's `word` holds its generation
//! and how many I/Os it is still good for; a channel reads the cell and takes one from the word by compare-and-exchange, which
//! fails if the cell was changed meanwhile. So no channel ever acts on half of one injection and half of another, and
//! nobody waits for anybody.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use resilver_reactor::{Armed, Context, Nanos};
use resilver_sys::{BufferSlice, Mapping, WaitSet};

use crate::channel::{CompletionBatch, IoChannel, Limits};
use crate::device::{Bdev, BdevError, Detail, Geometry};
use crate::io::{BdevIo, Completion, IoError, IoKind, Tag};
use crate::ledger::Ledger;
use crate::slots::Slots;
use crate::stats::IoStats;

/// Injections that can be armed at once.
pub const INJECTIONS_MAX: usize = 16;
/// Completions taken from the base in one poll.
const BATCH: usize = 64;
/// How soon a sleeping reactor looks whether stalls were cleared.
const LOOK_AGAIN: Nanos = Nanos::from_millis(1);

/// What befalls an I/O.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// It ends with this error and never reaches the base.
    Fail(IoError),
    /// The base carries it out; its completion is withheld until the injections are cleared.
    Stall,
}

/// Which I/O is to go wrong, how and how often.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Injection {
    /// This kind only; none for all.
    pub kind: Option<IoKind>,
    /// What befalls it.
    pub effect: Effect,
    /// How many I/Os; [`FOREVER`] or more for all until cleared.
    pub count: u64,
    /// Only I/O that touches this range, in bytes (offset, length); none for all. A flush touches no range.
    pub range: Option<(u64, u64)>,
}

/// A [`Injection::count`] that is never used up.
pub const FOREVER: u64 = (1 << COUNT_BITS) - 1;
/// Bits of a cell's word that count; the rest are the generation.
const COUNT_BITS: u32 = 48;

/// One injection as channels see it. The fields are meaningful while the word's count is not zero.
#[derive(Debug, Default)]
struct Cell {
    word: AtomicU64,
    /// A control thread is filling the cell.
    claimed: AtomicBool,
    /// The kind's discriminant, or [`ANY_KIND`].
    kind: AtomicU64,
    /// The errno of a failure, or zero for a stall.
    errno: AtomicU64,
    start: AtomicU64,
    /// One behind the last byte; [`u64::MAX`] from 0 stands for no range at all.
    end: AtomicU64,
}

const ANY_KIND: u64 = u64::MAX;

/// What the bdev and its channels share.
#[derive(Debug, Default)]
struct Shared {
    cells: [Cell; INJECTIONS_MAX],
    /// Times the injections were cleared: stalls older than the last are over.
    clears: AtomicU64,
    /// I/Os that were failed or stalled.
    injected: AtomicU64,
}

impl Shared {
    /// What befalls this I/O, taking one from the injection that says so.
    fn strike(&self, io: &BdevIo) -> Option<Effect> {
        self.cells.iter().find_map(|cell| cell.strike(io)).inspect(|_| {
            self.injected.fetch_add(1, Ordering::Relaxed);
        })
    }
}

impl Cell {
    fn strike(&self, io: &BdevIo) -> Option<Effect> {
        let mut word = self.word.load(Ordering::Acquire);
        loop {
            let count = word & FOREVER;
            if count == 0 || !self.covers(io) {
                return None;
            }
            let errno = self.errno.load(Ordering::Relaxed);
            let left = if count == FOREVER { word } else { word - 1 };
            // Acquire keeps the loads above before the next round's; a word that is still the same says that they all
            // belonged to it, since a change of the cell goes through a word of count zero and another generation.
            match self.word.compare_exchange(word, left, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => {
                    return Some(match i32::try_from(errno) {
                        Ok(0) => Effect::Stall,
                        Ok(errno) => Effect::Fail(IoError::from_errno(errno)),
                        Err(_) => Effect::Fail(IoError::IO),
                    });
                }
                Err(now) => word = now,
            }
        }
    }

    fn covers(&self, io: &BdevIo) -> bool {
        let kind = self.kind.load(Ordering::Relaxed);
        let (start, end) = (self.start.load(Ordering::Relaxed), self.end.load(Ordering::Relaxed));
        let everywhere = start == 0 && end == u64::MAX;
        let touches = io.kind != IoKind::Flush
            && io.offset < end
            && io.offset.saturating_add(io.length) > start;
        (kind == ANY_KIND || kind == io.kind as u64) && (everywhere || touches)
    }

    /// Arms the cell, unless it is armed or somebody is about to; whether it did.
    fn arm(&self, injection: &Injection) -> bool {
        if self.claimed.swap(true, Ordering::AcqRel) {
            return false;
        }
        let free = !self.is_armed();
        if free {
            self.fill(injection);
        }
        self.claimed.store(false, Ordering::Release);
        free
    }

    /// Writes the cell, which is claimed and whose count is zero.
    fn fill(&self, injection: &Injection) {
        let generation = (self.word.load(Ordering::Relaxed) >> COUNT_BITS).wrapping_add(1);
        let errno = match injection.effect {
            Effect::Fail(error) => u64::try_from(error.errno()).unwrap_or(0),
            Effect::Stall => 0,
        };
        let (start, end) = injection
            .range
            .map_or((0, u64::MAX), |(offset, length)| (offset, offset.saturating_add(length)));
        self.kind.store(injection.kind.map_or(ANY_KIND, |kind| kind as u64), Ordering::Relaxed);
        self.errno.store(errno, Ordering::Relaxed);
        self.start.store(start, Ordering::Relaxed);
        self.end.store(end, Ordering::Relaxed);
        let count = injection.count.min(FOREVER);
        self.word.store(generation << COUNT_BITS | count, Ordering::Release);
    }

    fn disarm(&self) {
        self.word.fetch_and(!FOREVER, Ordering::AcqRel);
    }

    fn is_armed(&self) -> bool {
        self.word.load(Ordering::Acquire) & FOREVER != 0
    }
}

/// The control side.
pub struct ErrorBdev {
    name: String,
    base: Arc<dyn Bdev>,
    shared: Arc<Shared>,
    stats: Arc<IoStats>,
}

impl ErrorBdev {
    /// A bdev over `base` that lets everything pass until told otherwise.
    #[must_use]
    pub fn new(name: &str, base: Arc<dyn Bdev>) -> Self {
        Self { name: name.to_owned(), base, shared: Arc::default(), stats: Arc::default() }
    }

    /// Arms an injection, for channels open now and later. Where several fit an I/O, one of them strikes.
    ///
    /// # Errors
    /// [`INJECTIONS_MAX`] are armed already, or the injection can never strike.
    pub fn inject(&self, injection: Injection) -> Result<(), BdevError> {
        if injection.count == 0 || injection.range.is_some_and(|(_, length)| length == 0) {
            return Err(BdevError::Invalid {
                parameter: if injection.count == 0 { "num" } else { "length" },
                value: "0".to_owned(),
                expected: "at least 1 was expected".to_owned(),
            });
        }
        if self.shared.cells.iter().any(|cell| cell.arm(&injection)) {
            return Ok(());
        }
        Err(BdevError::Busy {
            name: self.name.clone(),
            by: format!("{INJECTIONS_MAX} injections are armed; clear them first"),
        })
    }

    /// Disarms all injections. What is stalled goes on.
    pub fn clear(&self) {
        for cell in &self.shared.cells {
            cell.disarm();
        }
        self.shared.clears.fetch_add(1, Ordering::Release);
    }

    /// I/Os that were failed or stalled so far.
    #[must_use]
    pub fn injected(&self) -> u64 {
        self.shared.injected.load(Ordering::Relaxed)
    }
}

impl Bdev for ErrorBdev {
    fn name(&self) -> &str {
        &self.name
    }

    fn module(&self) -> &'static str {
        "error"
    }

    fn geometry(&self) -> Geometry {
        self.base.geometry()
    }

    fn open_channel(&self, depth: u32) -> Result<Box<dyn IoChannel>, BdevError> {
        let base = self.base.open_channel(depth)?;
        Ok(Box::new(ErrorChannel::new(base, depth, Arc::clone(&self.shared))))
    }

    fn base(&self) -> Option<&Arc<dyn Bdev>> {
        Some(&self.base)
    }

    fn details(&self) -> Vec<(&'static str, Detail)> {
        let armed = self.shared.cells.iter().filter(|cell| cell.is_armed()).count();
        vec![
            ("base_bdev_name", Detail::Text(self.base.name().to_owned())),
            ("injections", Detail::Number(armed as u64)),
            ("injected", Detail::Number(self.injected())),
        ]
    }

    fn stats(&self) -> &Arc<IoStats> {
        &self.stats
    }
}

/// What must be known of an I/O that the base has.
#[derive(Debug, Clone, Copy)]
struct Below {
    tag: Tag,
    kind: IoKind,
    /// If it is to stall: the clears that had been when it was struck.
    stalled: Option<u64>,
}

/// The data side.
struct ErrorChannel {
    base: Box<dyn IoChannel>,
    ledger: Ledger,
    below: Slots<Below>,
    shared: Arc<Shared>,
    /// Completions that are withheld, all since the same clear.
    withheld: Vec<(IoKind, Completion)>,
    /// Clears that this channel knows of.
    clears: u64,
    batch: CompletionBatch,
}

impl ErrorChannel {
    fn new(base: Box<dyn IoChannel>, depth: u32, shared: Arc<Shared>) -> Self {
        let slots = Ledger::slots(depth);
        let unused = Below { tag: Tag(0), kind: IoKind::Flush, stalled: None };
        Self {
            base,
            ledger: Ledger::new(depth),
            below: Slots::new(slots, || unused),
            clears: shared.clears.load(Ordering::Acquire),
            shared,
            withheld: Vec::with_capacity(slots),
            batch: CompletionBatch::with_capacity(BATCH),
        }
    }
}

impl IoChannel for ErrorChannel {
    fn limits(&self) -> &Limits {
        self.base.limits()
    }

    fn free(&self, kind: IoKind) -> u32 {
        self.ledger.free(kind).min(self.base.free(kind))
    }

    fn submit(&mut self, cx: &Context<'_>, io: BdevIo, payload: &[BufferSlice]) {
        self.ledger.admit(io.kind);
        // Read before the strike: a clear that comes between the two ends this stall too.
        let clears = self.shared.clears.load(Ordering::Acquire);
        let stalled = match self.shared.strike(&io) {
            Some(Effect::Fail(error)) => return self.ledger.finish(io.kind, io.tag, Err(error)),
            Some(Effect::Stall) => Some(clears),
            None => None,
        };
        // The ledger admits no more than there are slots.
        let Some(slot) = self.below.claim() else {
            return self.ledger.finish(io.kind, io.tag, Err(IoError::IO));
        };
        self.below[slot] = Below { tag: io.tag, kind: io.kind, stalled };
        self.base.submit(cx, BdevIo { tag: Tag(slot), ..io }, payload);
    }

    fn commit(&mut self, cx: &Context<'_>) {
        self.base.commit(cx);
    }

    fn poll(&mut self, cx: &Context<'_>, done: &mut CompletionBatch) {
        let clears = self.shared.clears.load(Ordering::Acquire);
        if clears != self.clears {
            self.clears = clears;
            for (kind, completion) in self.withheld.drain(..) {
                self.ledger.finish(kind, completion.tag, completion.result);
            }
        }
        self.batch.clear();
        self.base.poll(cx, &mut self.batch);
        for completion in self.batch.as_slice() {
            let Below { tag, kind, stalled } = self.below[completion.tag.0];
            self.below.release(completion.tag.0);
            let completion = Completion { tag, result: completion.result };
            match stalled {
                Some(since) if since == clears => self.withheld.push((kind, completion)),
                Some(_) | None => self.ledger.finish(kind, tag, completion.result),
            }
        }
        self.ledger.hand_over(done);
    }

    fn in_flight(&self) -> u32 {
        self.ledger.in_flight()
    }

    fn expect_pool(&mut self, pool: &Arc<Mapping>, length: usize) {
        self.base.expect_pool(pool, length);
    }

    fn forget_pool(&mut self) {
        self.base.forget_pool();
    }

    fn attach(&mut self, cx: &Context<'_>) {
        self.base.attach(cx);
    }

    fn detach(&mut self, cx: &Context<'_>) {
        self.base.detach(cx);
    }

    fn arm(&mut self, cx: &Context<'_>, set: &mut WaitSet) -> Armed {
        if self.ledger.has_finished() {
            return Armed::Ready;
        }
        let look = (!self.withheld.is_empty()).then(|| cx.now + LOOK_AGAIN);
        self.base.arm(cx, set).and(Armed::Until(look))
    }

    fn disarm(&mut self, cx: &Context<'_>) {
        self.base.disarm(cx);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::null::Null;
    use resilver_sys::RegionTable;

    struct Rig {
        bdev: ErrorBdev,
        channel: Box<dyn IoChannel>,
        memory: RegionTable,
        done: CompletionBatch,
    }

    fn rig() -> Rig {
        let base = Arc::new(Null::new("base", 512, 2048).unwrap());
        let bdev = ErrorBdev::new("bad", base);
        let channel = bdev.open_channel(8).unwrap();
        let memory = RegionTable::with_capacity(1);
        Rig { bdev, channel, memory, done: CompletionBatch::with_capacity(8) }
    }

    impl Rig {
        /// Unmaps, which need no payload, stand for any I/O.
        fn submit(&mut self, tag: u32, kind: IoKind, offset: u64) {
            let length = if kind == IoKind::Flush { 0 } else { 512 };
            let io = BdevIo { tag: Tag(tag), kind, may_unmap: false, offset, length };
            let cx = Context { now: Nanos::ZERO, memory: &self.memory };
            self.channel.submit(&cx, io, &[]);
        }

        fn poll(&mut self) -> Vec<(u32, Result<(), IoError>)> {
            self.done.clear();
            let cx = Context { now: Nanos::ZERO, memory: &self.memory };
            self.channel.poll(&cx, &mut self.done);
            self.done.as_slice().iter().map(|done| (done.tag.0, done.result)).collect()
        }
    }

    fn failing(kind: Option<IoKind>, count: u64, range: Option<(u64, u64)>) -> Injection {
        Injection { kind, effect: Effect::Fail(IoError::NO_SPACE), count, range }
    }

    #[test]
    fn an_injection_strikes_its_kind_and_range_as_often_as_it_says() {
        let mut rig = rig();
        rig.bdev.inject(failing(Some(IoKind::Unmap), 2, Some((1024, 512)))).unwrap();
        let tries = [
            (IoKind::WriteZeroes, 1024),
            (IoKind::Unmap, 512),
            (IoKind::Unmap, 1536),
            (IoKind::Unmap, 1024),
            (IoKind::Unmap, 1024),
            (IoKind::Unmap, 1024),
            (IoKind::Flush, 0),
        ];
        let mut results = Vec::new();
        for (tag, (kind, offset)) in (0..).zip(tries) {
            rig.submit(tag, kind, offset);
            results.extend(rig.poll());
        }
        let failed: Vec<u32> =
            results.iter().filter(|(_, result)| result.is_err()).map(|(tag, _)| *tag).collect();
        assert_eq!((failed, results.len()), (vec![3, 4], tries.len()));
        assert_eq!(results[3].1, Err(IoError::NO_SPACE));
        assert_eq!(rig.bdev.injected(), 2);
    }

    #[test]
    fn an_injection_for_ever_ends_when_it_is_cleared() {
        let mut rig = rig();
        rig.bdev.inject(failing(None, FOREVER, None)).unwrap();
        for tag in 0..100 {
            rig.submit(tag, IoKind::Flush, 0);
            assert_eq!(rig.poll(), [(tag, Err(IoError::NO_SPACE))]);
        }
        rig.bdev.clear();
        rig.submit(100, IoKind::Flush, 0);
        assert_eq!(rig.poll(), [(100, Ok(()))]);
    }

    #[test]
    fn a_stalled_request_ends_when_the_injections_are_cleared_and_others_pass_it() {
        let mut rig = rig();
        let stall =
            Injection { kind: Some(IoKind::Unmap), effect: Effect::Stall, count: 1, range: None };
        rig.bdev.inject(stall).unwrap();
        rig.submit(1, IoKind::Unmap, 0);
        rig.submit(2, IoKind::Unmap, 0);
        assert_eq!(rig.poll(), [(2, Ok(()))]);
        assert_eq!(rig.poll(), []);
        assert_eq!((rig.channel.in_flight(), rig.channel.free(IoKind::Write)), (1, 7));
        let cx = Context { now: Nanos(5), memory: &rig.memory };
        let armed = rig.channel.arm(&cx, &mut WaitSet::default());
        assert_eq!(armed, Armed::Until(Some(Nanos(5) + LOOK_AGAIN)));
        rig.bdev.clear();
        assert_eq!(rig.poll(), [(1, Ok(()))]);
        assert_eq!(rig.channel.in_flight(), 0);
    }

    #[test]
    fn a_cell_is_used_again_and_too_many_are_refused() {
        let rig = rig();
        for _ in 0..INJECTIONS_MAX {
            rig.bdev.inject(failing(None, 1, None)).unwrap();
        }
        assert!(matches!(rig.bdev.inject(failing(None, 1, None)), Err(BdevError::Busy { .. })));
        rig.bdev.clear();
        rig.bdev.inject(failing(None, 1, None)).unwrap();
        assert!(rig.bdev.inject(failing(None, 0, None)).is_err());
    }

    /// Two injections take turns in one cell while another thread strikes; each names its own kind, place and error.
    #[test]
    fn a_channel_never_acts_on_halves_of_two_injections() {
        const ROUNDS: u32 = 20_000;
        let cases = [(IoKind::Unmap, 0, IoError::NO_SPACE), (IoKind::Write, 4096, IoError::IO)];
        let cell = Arc::new(Cell::default());
        let writer = std::thread::spawn({
            let cell = Arc::clone(&cell);
            move || {
                for round in 0..ROUNDS {
                    let (kind, offset, error) = cases[round as usize % 2];
                    let range = Some((offset, 512));
                    let effect = Effect::Fail(error);
                    assert!(cell.arm(&Injection { kind: Some(kind), effect, count: 3, range }));
                    std::thread::yield_now();
                    cell.disarm();
                }
            }
        });
        while !writer.is_finished() {
            for (kind, _, error) in cases {
                for (right_kind, offset, _) in cases {
                    let io = BdevIo { tag: Tag(0), kind, may_unmap: false, offset, length: 512 };
                    let effect = cell.strike(&io);
                    let right = kind == right_kind && effect == Some(Effect::Fail(error));
                    assert!(effect.is_none() || right, "{kind:?} at {offset}: {effect:?}");
                }
            }
        }
        writer.join().unwrap();
    }
}
