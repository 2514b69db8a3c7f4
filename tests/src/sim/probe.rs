//! The probe: a mirror that can be looked into while a disk owns it.
//!
//! It passes every call on and adds two judgements: verbs are refused where the table says so, and at the instant a mirror is dissolved to its target, its legs are equal.

use std::sync::{Arc, Mutex};

use resilver_bdev::job::{BlockJob, Commit, Dissolved, JobWants, ScanReport, Side};
use resilver_bdev::mirror::{ChunkState, Mirror, Rows};
use resilver_bdev::{
    BdevIo, CompletionBatch, IoChannel, IoKind, JobEvent, JobInfo, JobStatus, JobVerb, Limits,
    VerbError,
};
use resilver_reactor::{Armed, Context, Nanos};
use resilver_sys::{BufferSlice, WaitSet};

use super::disk::SimDisk;
use super::lock;
use super::trace::Trace;

/// A mirror and a window into it; clones show the same mirror.
#[derive(Clone)]
pub struct Probe {
    /// None once it has been dissolved.
    mirror: Arc<Mutex<Option<Box<Mirror>>>>,
    limits: Limits,
    source: SimDisk,
    target: SimDisk,
    trace: Trace,
}

impl Probe {
    /// A window into `mirror`, whose legs are these.
    #[must_use]
    pub fn new(mirror: Mirror, source: &SimDisk, target: &SimDisk, trace: &Trace) -> Self {
        Self {
            limits: *mirror.limits(),
            mirror: Arc::new(Mutex::new(Some(Box::new(mirror)))),
            source: source.clone(),
            target: target.clone(),
            trace: trace.clone(),
        }
    }

    /// What the mirror says of itself, while it lives.
    #[must_use]
    pub fn look(&self, now: Nanos) -> Option<JobInfo> {
        lock(&self.mirror).as_ref().map(|mirror| mirror.info(now))
    }

    /// The state of a chunk, while the mirror lives.
    #[must_use]
    pub fn chunk_state(&self, chunk: u64) -> Option<ChunkState> {
        lock(&self.mirror).as_ref().map(|mirror| mirror.chunk_state(chunk))
    }

    /// Whether a chunk is to be copied, while the mirror lives.
    #[must_use]
    pub fn is_dirty(&self, chunk: u64) -> bool {
        lock(&self.mirror).as_ref().is_some_and(|mirror| mirror.is_dirty(chunk))
    }

    fn with<T>(&self, ask: impl FnOnce(&mut Mirror) -> T) -> T {
        ask(lock(&self.mirror).as_mut().expect("a mirror that is asked has not been dissolved"))
    }

    fn take(&self) -> Box<Mirror> {
        lock(&self.mirror).take().expect("a mirror is dissolved once")
    }

    /// A verb is refused where the table says so, and only there.
    fn judge_verb(&self, verb: JobVerb, status: JobStatus, result: &Result<(), VerbError>) {
        let legal = verb.legal_in(status);
        let fits = match result {
            Ok(()) => legal,
            // A pending job takes one finalize, and none if it finalizes by itself.
            Err(VerbError::State { .. }) => !legal || verb == JobVerb::Finalize,
            Err(VerbError::AlreadyPaused) => verb == JobVerb::Pause,
            Err(VerbError::NotPaused) => verb == JobVerb::Resume,
            Err(VerbError::AlreadyVerifying { .. }) => matches!(verb, JobVerb::Verify(_)),
            Err(VerbError::NotVerifying { .. }) => verb == JobVerb::StopVerify,
            Err(VerbError::NotSupported { .. } | VerbError::NotFound { .. }) => true,
        };
        if !fits {
            self.trace.finding(format_args!("{verb:?} in state {status}: {result:?}"));
        }
    }

    /// A mirror that ends on its target has equal legs now.
    fn judge_end(&self, end: &Dissolved) {
        let differs = self.source.first_difference(&self.target, 0..self.source.sectors());
        if let (Side::Target, Some(sector)) = (end.side, differs) {
            self.trace.finding(format_args!(
                "switched over, but sector {sector} is {:?} on the source and {:?} on the target",
                self.source.content(sector),
                self.target.content(sector)
            ));
        }
        if end.survivor.in_flight() > 0 {
            self.trace.finding("the survivor has I/O in flight");
        }
    }
}

impl IoChannel for Probe {
    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn free(&self, kind: IoKind) -> u32 {
        self.with(|mirror| mirror.free(kind))
    }

    fn submit(&mut self, cx: &Context<'_>, io: BdevIo, payload: &[BufferSlice]) {
        self.with(|mirror| mirror.submit(cx, io, payload));
    }

    fn commit(&mut self, cx: &Context<'_>) {
        self.with(|mirror| mirror.commit(cx));
    }

    fn poll(&mut self, cx: &Context<'_>, done: &mut CompletionBatch) {
        self.with(|mirror| mirror.poll(cx, done));
        self.trace.visited(self.with(|mirror| mirror.rows()));
    }

    fn in_flight(&self) -> u32 {
        self.with(|mirror| mirror.in_flight())
    }

    fn attach(&mut self, cx: &Context<'_>) {
        self.with(|mirror| mirror.attach(cx));
    }

    fn detach(&mut self, cx: &Context<'_>) {
        self.with(|mirror| mirror.detach(cx));
    }

    fn arm(&mut self, cx: &Context<'_>, set: &mut WaitSet) -> Armed {
        self.with(|mirror| mirror.arm(cx, set))
    }

    fn disarm(&mut self, cx: &Context<'_>) {
        self.with(|mirror| mirror.disarm(cx));
    }
}

impl BlockJob for Probe {
    fn verb(&mut self, cx: &Context<'_>, verb: JobVerb) -> Result<(), VerbError> {
        let status = self.info(cx.now).status;
        for (hung, leg) in [(Side::Source, &self.source), (Side::Target, &self.target)] {
            if verb.legal_in(status) && leg.stalled() > 0 {
                let mut rows = Rows::default();
                rows.visit_hang(verb, hung);
                self.trace.visited(rows);
            }
        }
        let result = self.with(|mirror| mirror.verb(cx, verb));
        self.judge_verb(verb, status, &result);
        result
    }

    fn turn(&mut self, cx: &Context<'_>) {
        self.with(|mirror| mirror.turn(cx));
    }

    fn info(&self, now: Nanos) -> JobInfo {
        self.with(|mirror| mirror.info(now))
    }

    fn take_event(&mut self) -> Option<JobEvent> {
        self.with(Mirror::take_event)
    }

    fn wants(&self) -> JobWants {
        self.with(|mirror| mirror.wants())
    }

    fn scanned(&mut self, cx: &Context<'_>, report: ScanReport) {
        self.with(|mirror| mirror.scanned(cx, report));
    }

    fn committed(&mut self, cx: &Context<'_>, record: Commit) {
        self.with(|mirror| mirror.committed(cx, record));
    }

    fn retracted(&mut self, cx: &Context<'_>, done: bool) {
        self.with(|mirror| mirror.retracted(cx, done));
    }

    fn hold_failed(&mut self, cx: &Context<'_>, in_flight: u32) {
        self.with(|mirror| mirror.hold_failed(cx, in_flight));
    }

    fn guest_reset(&mut self, cx: &Context<'_>) {
        self.with(|mirror| mirror.guest_reset(cx));
    }

    fn dissolve(self: Box<Self>, cx: &Context<'_>) -> Dissolved {
        let end = self.take().dissolve(cx);
        self.judge_end(&end);
        end
    }

    fn abandon(self: Box<Self>, cx: &Context<'_>) -> Dissolved {
        self.take().abandon(cx)
    }

    fn as_channel(&mut self) -> &mut dyn IoChannel {
        self
    }
}
