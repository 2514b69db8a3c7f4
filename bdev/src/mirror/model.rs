//! Every interleaving of a small world over the bare core.
//!
//! A disk of two chunks of two blocks; a guest with two requests; one or two verbs; one fault; control that may refuse.
//! From the first state on, every event that could come next is tried, states seen before are cut off, and after each
//! event the promises are checked:
//! * a clean chunk with nothing in flight there is equal on both legs;
//! * every request is answered exactly once, and fails only if the source failed it;
//! * while a record of the switch-over may exist, what is acknowledged is on the target;
//! * READY means that what the guest has not written since is on the target and durable there;
//! * the target survives only if both legs are equal;
//! * when nothing more can come, every request has been answered and the job stands where it may stand.
//!
//! The world is unkind where it may be: a failed write leaves garbage, a failed flush loses everything written since the
//! last good one, a discard leaves garbage, a hole is reported at any later time.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};

use resilver_reactor::Nanos;

use super::copier::CopyState;
use super::core::{Action, Core, CoreConfig, Slot};
use super::durable::Line;
use super::life::{Ending, Record, Stage};
use super::scope::{ObserverPolicy, SyncMode};
use crate::bitmap::Grid;
use crate::io::{BdevIo, IoError, IoKind, Tag};
use crate::job::{
    Commit, CopyMode, JobEvent, JobStatus, JobVerb, JobWants, OnError, ScanReport, Side,
};

const BLOCK: u64 = 512;
const BLOCKS: usize = 4;
const CHUNK_BLOCKS: usize = 2;
const COPIES: usize = 2;
const OPS: usize = 3;
const TIMEOUT: Nanos = Nanos::from_millis(100);

type Medium = [u8; BLOCKS];

/// What a guest asks, in blocks.
#[derive(Debug, Clone, Copy)]
struct Ask(IoKind, usize, usize);

/// What may go wrong once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Fault {
    /// Nothing.
    None,
    /// One I/O of this leg fails.
    Fails(Side),
    /// What the target has in flight at some moment times out and lands later.
    TimesOut,
    /// The same, and one I/O of the target fails after it: that may be one that was given up.
    TimesOutThenFails,
    /// From some moment on the target answers no more.
    Hangs,
}

impl Fault {
    fn times_out(self) -> bool {
        matches!(self, Self::TimesOut | Self::TimesOutThenFails)
    }
}

/// What its legs are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    /// Devices.
    Devices,
    /// The reactor does the work: a background copy lets writes trail.
    Inline,
    /// Somebody holds both who copies without reading and writing.
    Offload,
}

/// One world to explore.
#[derive(Debug, Clone, Copy)]
struct Scenario {
    mode: CopyMode,
    how: How,
    policy: OnError,
    asks: &'static [Ask],
    verbs: &'static [JobVerb],
    fault: Fault,
    /// The record may fail, and then be there or not.
    control_refuses: bool,
    /// The last chunk, which reads zero at first, is reported as a hole at some moment.
    hole: bool,
}

/// An I/O on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Io {
    Guest(Side, Slot, IoKind),
    Flush(Side),
    Read(u16, usize, usize),
    Write(u16, usize, usize),
    Zero(u16, usize, usize),
    Offload(u16, usize, usize),
}

impl Io {
    fn side(self) -> Side {
        match self {
            Self::Guest(side, ..) | Self::Flush(side) => side,
            Self::Read(..) => Side::Source,
            Self::Write(..) | Self::Zero(..) | Self::Offload(..) => Side::Target,
        }
    }
}

/// What may come next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Event {
    Ask,
    Verb,
    Ends(Io),
    Fails(Io),
    TimeOut,
    Hang,
    Hole,
    Committed(Commit),
    Retracted(bool),
    Tick,
}

#[derive(Clone)]
struct World {
    scenario: Scenario,
    core: Core,
    now: Nanos,
    media: [Medium; 2],
    /// What of the target would survive a crash, and what the flush in flight will have made so.
    durable: Medium,
    flushing: Option<Medium>,
    buffers: [Medium; COPIES],
    flying: Vec<Io>,
    asked: usize,
    slots: [usize; OPS],
    answers: Vec<Option<bool>>,
    /// Of each flush: what every block was, of which a write had been answered when it was asked for.
    owed: Vec<[Option<u8>; BLOCKS]>,
    /// Whether the source failed the request.
    may_fail: Vec<bool>,
    verbs: usize,
    fault: Fault,
    hung: bool,
    hole: bool,
    commit_asked: bool,
    retract_asked: bool,
    /// Once, which is enough: it is asked for again.
    retraction_refused: bool,
}

impl World {
    fn new(scenario: Scenario) -> Self {
        let chunk = CHUNK_BLOCKS as u64 * BLOCK;
        let mut core = Core::new(CoreConfig {
            grid: Grid::new(BLOCKS as u64 * BLOCK, u32::try_from(chunk).unwrap()),
            copy_mode: scenario.mode,
            on_error: [scenario.policy; 2],
            target_timeout: scenario.fault.times_out().then_some(TIMEOUT),
            unmap: true,
            target_is_zero: false,
            auto_finalize: true,
            cancel_on_guest_reset: false,
            verify_before_complete: false,
            latency_ceiling: None,
            auto_converge: false,
            sync: SyncMode::Full,
            by_bitmap: false,
            observer: ObserverPolicy::Block,
            diff: false,
            speed: 0,
            zeroes_unmap: false,
            ops: u16::try_from(OPS).unwrap(),
            quarantine: 2,
            unawaited: 2,
            units: 2,
            copies: u16::try_from(COPIES).unwrap(),
            run: chunk,
            hole_run: chunk,
            window: u32::try_from(chunk).unwrap(),
            inline: scenario.how == How::Inline,
            offload_run: (scenario.how == How::Offload).then_some(chunk),
            zero_unit: u32::try_from(BLOCK).unwrap(),
            max_zeroes: 1 << 20,
        });
        core.inserted();
        core.scanned(ScanReport::Done);
        let mut world = Self {
            scenario,
            core,
            now: Nanos::from_secs(1),
            media: [[1, 2, 0, 0], [7; BLOCKS]],
            durable: [7; BLOCKS],
            flushing: None,
            buffers: [[0; BLOCKS]; COPIES],
            flying: Vec::new(),
            asked: 0,
            slots: [usize::MAX; OPS],
            answers: vec![None; scenario.asks.len()],
            owed: vec![[None; BLOCKS]; scenario.asks.len()],
            may_fail: vec![false; scenario.asks.len()],
            verbs: 0,
            fault: scenario.fault,
            hung: false,
            hole: scenario.hole,
            commit_asked: false,
            retract_asked: false,
            retraction_refused: false,
        };
        world.settle();
        world
    }

    /// Everything that could come next.
    fn events(&self) -> Vec<Event> {
        let mut events = Vec::new();
        if self.core.wants() == JobWants::Dissolve && self.core.guest_live == 0 {
            return events; // The disk dissolves the job now: checked in `check_end`.
        }
        if self.asked < self.scenario.asks.len() && self.core.free_slots() > 0 {
            events.push(Event::Ask);
        }
        let verb = self.scenario.verbs.get(self.verbs);
        if verb.is_some_and(|verb| verb.legal_in(self.core.status())) {
            events.push(Event::Verb);
        }
        for io in &self.flying {
            if self.hung && io.side() == Side::Target {
                continue;
            }
            events.push(Event::Ends(*io));
            if self.fault == Fault::Fails(io.side()) {
                events.push(Event::Fails(*io));
            }
        }
        if self.flying.iter().any(|io| io.side() == Side::Target) {
            match self.fault {
                Fault::TimesOut | Fault::TimesOutThenFails => events.push(Event::TimeOut),
                Fault::Hangs => events.push(Event::Hang),
                Fault::None | Fault::Fails(_) => {}
            }
        }
        if self.hole {
            events.push(Event::Hole);
        }
        let ends = [Commit::Written, Commit::Absent, Commit::Unknown];
        let ends = if self.scenario.control_refuses { &ends[..] } else { &ends[..1] };
        if self.commit_asked {
            events.extend(ends.iter().map(|record| Event::Committed(*record)));
        }
        if self.retract_asked {
            events.push(Event::Retracted(true));
            if self.scenario.control_refuses && !self.retraction_refused {
                events.push(Event::Retracted(false));
            }
        }
        events
    }

    fn apply(&mut self, event: Event) {
        match event {
            Event::Ask => self.ask(),
            Event::Verb => {
                let verb = self.scenario.verbs[self.verbs];
                self.verbs += 1;
                // A pause or resume may come when it changes nothing; it is refused then.
                let _ = self.core.verb(verb, self.now);
            }
            Event::Ends(io) => self.end(io, Ok(())),
            Event::Fails(io) => {
                self.fault = Fault::None;
                self.end(io, Err(IoError::IO));
            }
            Event::TimeOut => {
                let fails = self.fault == Fault::TimesOutThenFails;
                self.fault = if fails { Fault::Fails(Side::Target) } else { Fault::None };
                self.now = self.now + TIMEOUT + TIMEOUT;
            }
            Event::Hang => {
                self.fault = Fault::None;
                self.hung = true;
            }
            Event::Hole => {
                self.hole = false;
                let chunk = CHUNK_BLOCKS as u64 * BLOCK;
                self.core.scanned(ScanReport::Hole { offset: chunk, length: chunk });
            }
            Event::Committed(record) => {
                self.commit_asked = false;
                self.core.committed(record, self.now);
            }
            Event::Retracted(done) => {
                self.retract_asked = false;
                self.retraction_refused |= !done;
                self.core.retracted(done, self.now);
            }
            Event::Tick => {
                self.now = self.core.deadline().expect("a tick has a deadline");
            }
        }
        self.settle();
    }

    fn ask(&mut self) {
        let Ask(kind, start, end) = self.scenario.asks[self.asked];
        if kind == IoKind::Flush {
            for (earlier, Ask(kind, start, end)) in
                self.scenario.asks[..self.asked].iter().enumerate()
            {
                if *kind == IoKind::Write && self.answers[earlier] == Some(true) {
                    self.owed[self.asked][*start..*end].fill(Some(Self::value(earlier, *kind)));
                }
            }
        }
        let io = BdevIo {
            tag: Tag(u32::try_from(self.asked).unwrap()),
            kind,
            may_unmap: true,
            offset: start as u64 * BLOCK,
            length: (end - start) as u64 * BLOCK,
        };
        let slot = self.core.guest(&io, self.now, self.now);
        self.slots[usize::from(slot)] = self.asked;
        self.asked += 1;
    }

    /// What a request's blocks read afterwards.
    fn value(asked: usize, sent: IoKind) -> u8 {
        match sent {
            IoKind::WriteZeroes => 0,
            IoKind::Unmap => 99,
            _ => 10 + u8::try_from(asked).unwrap(),
        }
    }

    fn end(&mut self, io: Io, result: Result<(), IoError>) {
        let at = self.flying.iter().position(|flying| *flying == io).expect("it flies");
        self.flying.swap_remove(at);
        let garbage = 97;
        match io {
            Io::Guest(side, slot, sent) => {
                let asked = self.slots[usize::from(slot)];
                let Ask(_, start, end) = self.scenario.asks[asked];
                let value = if result.is_ok() { Self::value(asked, sent) } else { garbage };
                self.media[side as usize][start..end].fill(value);
                self.may_fail[asked] |= side == Side::Source && result.is_err();
                self.core.leg_done(slot, side, result, self.now);
            }
            Io::Flush(side) => {
                if side == Side::Source && result.is_err() {
                    let flushes = self.scenario.asks.iter().map(|ask| ask.0 == IoKind::Flush);
                    for (may_fail, flush) in self.may_fail.iter_mut().zip(flushes) {
                        *may_fail |= flush;
                    }
                }
                if side == Side::Target {
                    let snapshot = self.flushing.take().expect("a flush flies");
                    match result {
                        Ok(()) => self.durable = snapshot,
                        Err(_) => self.media[Side::Target as usize] = self.durable,
                    }
                }
                self.core.flush_done(side, result, self.now);
            }
            Io::Read(copy, start, end) => {
                let source = self.media[Side::Source as usize];
                self.buffers[usize::from(copy)][start..end].copy_from_slice(&source[start..end]);
                let mut zeroes = super::pieces::UnitMap::default();
                for (unit, value) in source[start..end].iter().enumerate() {
                    zeroes[0] |= u64::from(*value == 0) << unit;
                }
                self.core.read_done(copy, result.map(|()| zeroes), self.now);
            }
            Io::Write(copy, start, end) => {
                let mut data = self.buffers[usize::from(copy)];
                if result.is_err() {
                    data = [garbage; BLOCKS];
                }
                self.media[Side::Target as usize][start..end].copy_from_slice(&data[start..end]);
                self.core.write_done(copy, result, self.now);
            }
            Io::Zero(copy, start, end) => {
                let value = if result.is_ok() { 0 } else { garbage };
                self.media[Side::Target as usize][start..end].fill(value);
                self.core.write_done(copy, result, self.now);
            }
            Io::Offload(copy, start, end) => {
                let [source, target] = &mut self.media;
                match result {
                    Ok(()) => target[start..end].copy_from_slice(&source[start..end]),
                    Err(_) => target[start..end].fill(garbage),
                }
                self.core.write_done(copy, result, self.now);
            }
        }
    }

    /// A turn of the reactor: performs what the core decides until it decides nothing more.
    fn settle(&mut self) {
        self.perform();
        self.core.turn(false, self.now);
        self.perform();
        while let Some(event) = self.core.events.pop_front() {
            match event {
                JobEvent::CommitRequest => self.commit_asked = true,
                JobEvent::RetractRequest => self.retract_asked = true,
                JobEvent::Status(JobStatus::Ready) => self.check_ready(),
                JobEvent::Status(_)
                | JobEvent::Error { .. }
                | JobEvent::SwitchUndone(_)
                | JobEvent::AutoConverged
                | JobEvent::VerifyMismatch { .. }
                | JobEvent::VerifyEnded { .. } => {}
            }
        }
        self.check();
    }

    fn perform(&mut self) {
        let block = |offset: u64| usize::try_from(offset / BLOCK).unwrap();
        while let Some(action) = self.core.next_action() {
            match action {
                Action::Source { op, sent } => self.flying.push(Io::Guest(Side::Source, op, sent)),
                Action::Both { op, sent, .. } => {
                    self.flying.push(Io::Guest(Side::Source, op, sent));
                    self.flying.push(Io::Guest(Side::Target, op, sent));
                }
                Action::Answer { tag, result } => self.answered(tag, result.is_ok()),
                Action::Release { .. } => {}
                Action::Flush(side) => {
                    if side == Side::Target {
                        assert!(self.flushing.is_none(), "two flushes of the target at once");
                        self.flushing = Some(self.media[Side::Target as usize]);
                    }
                    self.flying.push(Io::Flush(side));
                }
                Action::CopyRead { copy, offset, length } => {
                    let (start, end) = (block(offset), block(offset + u64::from(length)));
                    self.flying.push(Io::Read(copy, start, end));
                }
                Action::CopyWrite { copy, offset, length, .. } => {
                    let (start, end) = (block(offset), block(offset + u64::from(length)));
                    self.flying.push(Io::Write(copy, start, end));
                }
                Action::CheckRead { .. } | Action::Compare { .. } => {
                    panic!("nobody asked for a comparison")
                }
                Action::CopyZero { copy, offset, length } => {
                    self.flying.push(Io::Zero(copy, block(offset), block(offset + length)));
                }
                Action::CopyOffload { copy, offset, length } => {
                    self.flying.push(Io::Offload(copy, block(offset), block(offset + length)));
                }
            }
        }
    }

    fn answered(&mut self, tag: Tag, ok: bool) {
        let asked = tag.0 as usize;
        assert_eq!(self.answers[asked], None, "request {asked} is answered twice");
        self.answers[asked] = Some(ok);
        assert!(ok || self.may_fail[asked], "request {asked} fails though the source did not");
        let Ask(kind, start, end) = self.scenario.asks[asked];
        if ok && kind == IoKind::Flush && self.core.record.may_exist() {
            self.check_durable(asked);
        }
        if !ok || kind == IoKind::Flush || kind == IoKind::Unmap {
            return;
        }
        let mut allowed = vec![Self::value(asked, kind)];
        allowed.extend(
            (asked + 1..self.asked).map(|later| Self::value(later, self.scenario.asks[later].0)),
        );
        let on = |side: Side| {
            let medium = &self.media[side as usize][start..end];
            medium.iter().all(|value| allowed.contains(value))
        };
        assert!(
            on(Side::Source) || self.may_fail.contains(&true),
            "acknowledged, not on the source"
        );
        if self.core.record.may_exist() {
            assert!(on(Side::Target), "acknowledged under a record, not on the target");
        }
    }

    /// A crash now would go on with the target, so what a flush has answered for is durable there.
    fn check_durable(&self, flush: usize) {
        for (block, owed) in self.owed[flush].iter().enumerate() {
            let Some(owed) = *owed else { continue };
            let writes = |ask: &Ask| (ask.1..ask.2).contains(&block);
            let wrote_again =
                self.scenario.asks[..self.asked].iter().filter(|ask| writes(ask)).count() > 1;
            let durable = self.durable[block];
            assert!(
                wrote_again || durable == owed,
                "a flush is answered under a record, and block {block} is not durable"
            );
        }
    }

    fn check_ready(&self) {
        // Once READY the operator may have seen it; back from an undone switch-over it promises nothing new.
        if self.verbs > 0 {
            return;
        }
        let wrote = |block: usize| {
            self.scenario.asks[..self.asked].iter().any(|ask| (ask.1..ask.2).contains(&block))
        };
        for block in (0..BLOCKS).filter(|block| !wrote(*block)) {
            assert_eq!(
                self.durable[block], self.media[0][block],
                "READY, and block {block} is not durable"
            );
        }
        if self.scenario.mode == CopyMode::WriteBlocking {
            assert_eq!(self.core.maps.dirty.count(), 0, "READY with dirty chunks");
        }
    }

    /// Whether anything is in flight that touches a chunk.
    fn busy(&self, chunk: usize) -> bool {
        let blocks = chunk * CHUNK_BLOCKS..(chunk + 1) * CHUNK_BLOCKS;
        let meets = |start: usize, end: usize| start < blocks.end && blocks.start < end;
        let io = self.flying.iter().any(|io| match *io {
            Io::Guest(_, slot, _) => {
                let Ask(_, start, end) = self.scenario.asks[self.slots[usize::from(slot)]];
                meets(start, end)
            }
            Io::Flush(_) => false,
            Io::Read(_, start, end)
            | Io::Write(_, start, end)
            | Io::Zero(_, start, end)
            | Io::Offload(_, start, end) => meets(start, end),
        });
        io || (0..self.asked).any(|asked| {
            let Ask(_, start, end) = self.scenario.asks[asked];
            self.answers[asked].is_none() && meets(start, end)
        })
    }

    fn check(&self) {
        for chunk in 0..BLOCKS / CHUNK_BLOCKS {
            let blocks = chunk * CHUNK_BLOCKS..(chunk + 1) * CHUNK_BLOCKS;
            if self.core.maps.dirty.get(chunk as u64) || self.busy(chunk) {
                continue;
            }
            let [source, target] = self.media.map(|medium| medium[blocks.clone()].to_vec());
            // After a finish the target is a point in time; what came since is dirty, so this holds there too.
            assert_eq!(source, target, "chunk {chunk} is clean and differs");
        }
    }

    /// Nothing more can come: everything must have found its end.
    fn check_end(&self) {
        let unanswered = self.answers[..self.asked].iter().position(Option::is_none);
        let hung_without_cancel = self.hung && !matches!(self.core.stage, Stage::Leaving(_));
        if hung_without_cancel {
            return;
        }
        assert_eq!(unanswered, None, "a request was never answered");
        match (self.core.wants(), self.core.survivor()) {
            (JobWants::Dissolve, Some(Side::Target)) => {
                assert_eq!(self.media[0], self.media[1], "switched over to something else");
            }
            (JobWants::Dissolve, _) => {
                if self.core.stage == Stage::Leaving(Ending::Finished) {
                    let clean = self.core.maps.dirty.count() == 0;
                    assert!(!clean || self.durable == self.media[0], "finished, not durable");
                }
            }
            (JobWants::Nothing, _) => {
                let status = self.core.status();
                let rests =
                    matches!(status, JobStatus::Ready | JobStatus::Standby | JobStatus::Paused);
                assert!(rests, "stuck in state {status}: {:?}", self.core.stage);
                if status == JobStatus::Ready {
                    assert_eq!(self.media[0], self.media[1], "READY, at rest, and different");
                }
            }
        }
    }

    /// What decides the future, and nothing else.
    fn fingerprint(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        let core = &self.core;
        let age = |since: Nanos| self.now - since;
        for op in &core.ops {
            (op.state, op.tag, op.legs, op.tickets, op.error, op.bits).hash(&mut hasher);
            (op.tainted, op.units, age(op.since)).hash(&mut hasher);
        }
        for copy in &core.copies {
            let mut copy = *copy;
            let writes = copy.state == CopyState::Writing;
            copy.since = if writes { age(copy.since) } else { Nanos::ZERO };
            copy.hash(&mut hasher);
        }
        for line in &core.lines {
            let line_age = match line.line {
                Line::Flying { since, next } => Some((age(since), next)),
                Line::Idle | Line::Lost => None,
            };
            (line_age, line.line == Line::Lost, &line.undurable, &line.flushing, line.whole)
                .hash(&mut hasher);
        }
        let maps = &core.maps;
        (&maps.dirty, &maps.target_zero, &maps.hole, &maps.guest_wrote).hash(&mut hasher);
        core.ranges.fingerprint(&mut hasher);
        let record = match core.record {
            Record::RetractAt(at) => Record::RetractAt(at - self.now),
            other => other,
        };
        (core.stage, record, core.job_flush, core.wish, core.cursor).hash(&mut hasher);
        (core.config.copy_mode == CopyMode::Background).hash(&mut hasher);
        (core.asked, core.config.offload_run).hash(&mut hasher);
        core.bad.seen_at(self.now).hash(&mut hasher);
        let mut flying = self.flying.clone();
        flying.sort_unstable_by_key(|io| format!("{io:?}"));
        flying.hash(&mut hasher);
        (self.media, self.durable, self.flushing, self.buffers, self.asked).hash(&mut hasher);
        (&self.answers, &self.owed, &self.may_fail, self.verbs, self.fault, self.hung, self.hole)
            .hash(&mut hasher);
        (self.commit_asked, self.retract_asked, self.retraction_refused).hash(&mut hasher);
        hasher.finish()
    }
}

/// A step of the exploration: how a state was reached.
struct Trail {
    before: usize,
    event: Option<Event>,
}

/// Goes through every reachable state; answers with how many there are, or with the events that broke a promise.
fn explore(scenario: Scenario) -> Result<usize, String> {
    let first = World::new(scenario);
    let mut seen = HashSet::from([first.fingerprint()]);
    let mut trails = vec![Trail { before: 0, event: None }];
    let mut open = vec![(first, 0)];
    while let Some((world, at)) = open.pop() {
        let mut events = world.events();
        if events.is_empty() && world.core.wants() == JobWants::Nothing {
            // Time passes only when nothing else can happen: a rest after an error, a retraction to be asked again.
            if world.core.deadline().is_some_and(|deadline| deadline > world.now) {
                events.push(Event::Tick);
            }
        }
        if events.is_empty() {
            checked(&trails, at, scenario, || world.check_end())?;
        }
        for event in events {
            let mut next = world.clone();
            trails.push(Trail { before: at, event: Some(event) });
            let here = trails.len() - 1;
            checked(&trails, here, scenario, || next.apply(event))?;
            if seen.insert(next.fingerprint()) {
                open.push((next, here));
            } else {
                trails.pop();
            }
        }
    }
    Ok(seen.len())
}

/// Runs a step; a broken promise comes back with the events that led there.
fn checked(
    trails: &[Trail],
    at: usize,
    scenario: Scenario,
    step: impl FnOnce(),
) -> Result<(), String> {
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(step));
    outcome.map_err(|reason| {
        let text = reason
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| reason.downcast_ref::<&str>().map(ToString::to_string))
            .unwrap_or_default();
        let mut events = Vec::new();
        let mut at = at;
        while let Some(event) = trails[at].event {
            events.push(format!("  {event:?}"));
            at = trails[at].before;
        }
        events.reverse();
        format!("{scenario:?}\n{}\n{text}", events.join("\n"))
    })
}

const PARTS: &[Ask] = &[Ask(IoKind::Write, 1, 2), Ask(IoKind::Write, 0, 3)];
const WHOLE: &[Ask] = &[Ask(IoKind::Write, 0, 2), Ask(IoKind::Write, 1, 2)];
const NEIGHBOURS: &[Ask] = &[Ask(IoKind::Write, 0, 1), Ask(IoKind::Write, 1, 2)];
const LATER: &[Ask] = &[Ask(IoKind::Write, 2, 3), Ask(IoKind::Write, 2, 4)];
const FLUSHED: &[Ask] = &[Ask(IoKind::Write, 1, 2), Ask(IoKind::Flush, 0, 0)];
const FLUSHED_AGAIN: &[Ask] =
    &[Ask(IoKind::Write, 1, 2), Ask(IoKind::Flush, 0, 0), Ask(IoKind::Flush, 0, 0)];
const ZEROED: &[Ask] = &[Ask(IoKind::WriteZeroes, 2, 4), Ask(IoKind::Write, 1, 3)];
const DISCARDED: &[Ask] = &[Ask(IoKind::Unmap, 0, 4), Ask(IoKind::Write, 1, 2)];

const SCRIPTS: [&[Ask]; 8] =
    [PARTS, WHOLE, NEIGHBOURS, LATER, FLUSHED, FLUSHED_AGAIN, ZEROED, DISCARDED];
const MODES: [(CopyMode, How); 5] = [
    (CopyMode::Background, How::Devices),
    (CopyMode::Background, How::Inline),
    (CopyMode::Background, How::Offload),
    (CopyMode::WriteBlocking, How::Devices),
    (CopyMode::WriteBlocking, How::Offload),
];
const PAUSED: &[JobVerb] = &[JobVerb::Pause, JobVerb::Resume];
const CANCELLED: &[JobVerb] = &[JobVerb::Cancel];
const COMPLETED: &[JobVerb] = &[JobVerb::Complete];
const FINISHED: &[JobVerb] = &[JobVerb::Finish];
const CHANGED: &[JobVerb] =
    &[JobVerb::Change(CopyMode::WriteBlocking), JobVerb::Change(CopyMode::Background)];
const STOOD_BY: &[JobVerb] = &[JobVerb::Pause, JobVerb::Complete, JobVerb::Resume];
const GIVEN_UP: &[JobVerb] = &[JobVerb::Complete, JobVerb::Cancel];

/// The worlds that are explored: each guest script alone against each fault, and against the verbs.
fn scenarios() -> Vec<Scenario> {
    let mut all = Vec::new();
    for asks in SCRIPTS {
        for (mode, how) in MODES {
            let base = Scenario {
                mode,
                how,
                policy: OnError::Ignore,
                asks,
                verbs: &[],
                fault: Fault::None,
                control_refuses: false,
                hole: false,
            };
            for fault in [Fault::Fails(Side::Source), Fault::Fails(Side::Target), Fault::TimesOut] {
                all.push(Scenario { fault, ..base });
                all.push(Scenario { fault, policy: OnError::Report, ..base });
            }
            all.push(Scenario { hole: true, ..base });
            all.push(Scenario { verbs: CANCELLED, fault: Fault::Hangs, ..base });
            all.push(Scenario { verbs: COMPLETED, control_refuses: true, ..base });
            let failing = Scenario { fault: Fault::Fails(Side::Target), ..base };
            all.push(Scenario { verbs: COMPLETED, ..failing });
            all.push(Scenario { verbs: FINISHED, ..failing });
            all.push(Scenario { verbs: PAUSED, policy: OnError::Stop, ..failing });
            all.push(Scenario { verbs: CHANGED, ..base });
            all.push(Scenario { verbs: GIVEN_UP, ..base });
            all.push(Scenario { verbs: COMPLETED, fault: Fault::TimesOut, ..base });
            all.push(Scenario { verbs: COMPLETED, fault: Fault::TimesOutThenFails, ..base });
            all.push(Scenario { verbs: COMPLETED, fault: Fault::Fails(Side::Source), ..base });
            all.push(Scenario { verbs: GIVEN_UP, fault: Fault::Hangs, ..base });
            all.push(Scenario { verbs: STOOD_BY, ..failing });
            all.push(Scenario { hole: true, ..failing });
        }
    }
    all
}

#[test]
fn every_interleaving_of_a_small_world_keeps_the_promises() {
    let (mut states, mut worlds) = (0, 0);
    for scenario in scenarios() {
        states += explore(scenario).unwrap_or_else(|broken| panic!("{broken}"));
        worlds += 1;
    }
    println!("{states} states of {worlds} worlds");
    assert!(
        states > 100_000,
        "only {states} states: the worlds have become too small to prove anything"
    );
}

/// The model is worth what it can find: each planted bug that concerns decisions, not bytes, breaks a promise in some world.
#[cfg(feature = "planted-bugs")]
#[test]
fn the_model_finds_planted_bugs() {
    use super::bugs::{Bug, plant};
    // What these are about is not in its worlds: the bytes of buffers, comparisons, difference images, working bitmaps. The simulator
    // finds them.
    let elsewhere = [
        Bug::NoBounceCopy,
        Bug::ZeroDetectionShort,
        Bug::VerifyTakesNoRange,
        Bug::ClusterNotFilled,
        Bug::BitmapNotHandedBack,
    ];
    for bug in Bug::ALL.into_iter().filter(|bug| !elsewhere.contains(bug)) {
        plant(Some(bug));
        let found = scenarios().into_iter().find_map(|scenario| explore(scenario).err());
        plant(None);
        let broken = found.unwrap_or_else(|| panic!("{bug:?} breaks nothing"));
        println!("{bug:?}: {}", broken.lines().last().unwrap_or_default());
    }
}
