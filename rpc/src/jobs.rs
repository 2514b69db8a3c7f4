//! Jobs as control keeps them: what they say, what they are told, and how the graph follows their end.
//!
//! The job itself lives on its disk's reactor ([`resilver_bdev::BlockJob`]); here is what it cannot do there: the durable
//! record of a switch-over, the list, the events. A job's numbers are asked of the reactor whenever somebody wants them and
//! are never older than the question.
//!
//! A switch-over as control sees it: the job asks for the record ([`JobEvent::CommitRequest`]), control writes it and says so,
//! the disk exchanges its root, `Target::job_ended` makes the graph follow. A record that was written for a switch that
//! is then undone is taken back ([`JobEvent::RetractRequest`]) before any write is acknowledged that only the source has.

use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;

use resilver_bdev::job::{Commit, IoStatus, JobFailure, JobWants, Scan, Side};
use resilver_bdev::mirror::{BitmapMode, ObserverPolicy, SyncMode};
use resilver_bdev::{Bdev, DiskCommand, JobEvent, JobInfo, JobStatus, JobVerb, VerbError};
use serde_json::{Value, json};

use crate::disks::{DiskId, ask, send};
use crate::error::RpcError;
use crate::events::{qemu, unix_seconds};
use crate::holds::Holds;
use crate::mirror::Origin;
use crate::state::StateError;
use crate::target::{Target, files_of};

/// What kind of job a mirror is, as QEMU calls it.
const TYPE: &str = "mirror";

/// Jobs that have ended, kept for whoever asks later.
pub const HISTORY_MAX: usize = 64;

/// Where a job is in its life. One that has ended holds nothing open.
pub(crate) enum Stage {
    /// It can still do something to its disks.
    Live {
        source: Arc<dyn Bdev>,
        target: Arc<dyn Bdev>,
        /// The scan of the source's holes.
        scan: Scan,
    },
    /// Concluded and not dismissed.
    Ended {
        /// The leg that its disk goes on with.
        side: Side,
        /// When, in seconds since 1970.
        time: f64,
    },
}

/// A job as control keeps it.
pub(crate) struct Job {
    pub(crate) id: String,
    pub(crate) source: String,
    pub(crate) target: String,
    pub(crate) stage: Stage,
    pub(crate) origin: Origin,
    /// The name that the mirror goes by in the bdev namespace.
    pub(crate) mirror: String,
    pub(crate) disk: DiskId,
    pub(crate) auto_finalize: bool,
    /// What it brings over.
    pub(crate) sync: SyncMode,
    /// The bitmap that it works by, and what becomes of that.
    pub(crate) bitmap: Option<(String, BitmapMode)>,
    /// Who waits for a target that only observes.
    pub(crate) observer: ObserverPolicy,
    pub(crate) auto_dismiss: bool,
    pub(crate) holds: Holds,
    /// The last that is known of it; asked anew where it matters.
    pub(crate) info: JobInfo,
    pub(crate) warnings: Vec<String>,
    pub(crate) started: f64,
    /// When it was ready for the first time.
    pub(crate) ready: Option<f64>,
}

/// The last jobs that were dismissed, oldest first.
pub(crate) type Ended = VecDeque<Value>;

/// The phases of Cloud Hypervisor's block mirror.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Copying.
    Running,
    /// In sync.
    Ready,
    /// Switching over.
    Completing,
    /// Ended as it was asked to.
    Completed,
    /// Giving up because it was told to; also once that is done, for which Cloud Hypervisor has no phase.
    Cancelling,
    /// Ended, or about to, for an error.
    Failed,
}

impl Phase {
    /// The phase of a job in a state, for a cause: the rows of the table.
    ///
    /// | | states | cause | phase | |
    /// | --- | --- | --- | --- | --- |
    /// | a | undefined, created, running, paused | any | running | a pause is no phase there |
    /// | b | ready, standby | any | ready | a switch that was undone leaves its reason, and the job ready |
    /// | c | waiting, pending | any | completing | |
    /// | d | aborting, concluded, null | cancelled, by the operator or a guest's reset | cancelling | |
    /// | e | aborting, concluded, null | an error | failed | |
    /// | f | aborting | none yet | cancelling | an error is set before the state |
    /// | g | concluded, null | none | completed | |
    #[must_use]
    pub fn of(status: JobStatus, failure: Option<JobFailure>) -> Self {
        use JobStatus::{
            Aborting, Concluded, Created, Null, Paused, Pending, Ready, Running, Standby,
            Undefined, Waiting,
        };
        match (status, failure) {
            (Undefined | Created | Running | Paused, _) => Self::Running,
            (Ready | Standby, _) => Self::Ready,
            (Waiting | Pending, _) => Self::Completing,
            (Aborting | Concluded | Null, Some(JobFailure::Cancelled | JobFailure::GuestReset))
            | (Aborting, None) => Self::Cancelling,
            (Aborting | Concluded | Null, Some(_)) => Self::Failed,
            (Concluded | Null, None) => Self::Completed,
        }
    }

    /// The word for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Ready => "ready",
            Self::Completing => "completing",
            Self::Completed => "completed",
            Self::Cancelling => "cancelling",
            Self::Failed => "failed",
        }
    }
}

/// What an operator can do about a failure, beginning with a separator; empty where there is nothing.
fn way_out(failure: JobFailure, info: &JobInfo, id: &str) -> String {
    let standing = matches!(info.status, JobStatus::Paused | JobStatus::Standby);
    match failure {
        JobFailure::Io { side, error, .. } if error.is_no_space() && standing => format!(
            "; no space is left on the {}: make room there, then job_resume '{id}' goes on where it stopped",
            side.name()
        ),
        JobFailure::Io { side, .. } if standing => {
            format!("; repair the {}, then job_resume '{id}' goes on where it stopped", side.name())
        }
        JobFailure::Differs { .. } if info.status.is_live() => format!(
            "; the guest runs on from the source; repair the target or mirror to another one, then job_complete '{id}' \
             tries again"
        ),
        JobFailure::HoldTimedOut { .. } | JobFailure::CommitRecord if info.status.is_live() => {
            format!("; the guest runs on from the source; job_complete '{id}' tries again")
        }
        JobFailure::Io { .. }
        | JobFailure::Cancelled
        | JobFailure::HoldTimedOut { .. }
        | JobFailure::CommitRecord
        | JobFailure::Differs { .. }
        | JobFailure::GuestReset => String::new(),
    }
}

impl Job {
    /// Whether it can still do something to its disks.
    pub(crate) fn is_live(&self) -> bool {
        matches!(self.stage, Stage::Live { .. })
    }

    /// Both legs, while it is live.
    pub(crate) fn legs(&self) -> Option<(Arc<dyn Bdev>, Arc<dyn Bdev>)> {
        match &self.stage {
            Stage::Live { source, target, .. } => Some((Arc::clone(source), Arc::clone(target))),
            Stage::Ended { .. } => None,
        }
    }

    /// Stops the scan of the source's holes.
    pub(crate) fn stop_scan(&self) {
        if let Stage::Live { scan, .. } = &self.stage {
            scan.stop();
        }
    }

    /// Why it failed or stands still, and what to do about it.
    pub(crate) fn error(&self) -> Option<String> {
        let failure = self.info.failure?;
        Some(format!("{failure}{}", way_out(failure, &self.info, &self.id)))
    }

    /// Its state, as events tell it.
    pub(crate) fn status_facts(&self) -> Value {
        let status = self.info.status;
        json!({ "status": status.name(), "phase": Phase::of(status, self.info.failure).name() })
    }

    /// How far it is, as QEMU's events tell it.
    fn progress_facts(&self) -> Value {
        let info = &self.info;
        let left = info.dirty_bytes.saturating_add(info.in_flight_bytes);
        let (len, offset) = (info.total_bytes, info.total_bytes.saturating_sub(left));
        json!({ "type": TYPE, "len": len, "offset": offset, "speed": info.speed })
    }

    /// The job as `job_get_list` shows it.
    pub(crate) fn to_json(&self) -> Value {
        let info = &self.info;
        let mut json = json!({
            "id": self.id,
            "type": TYPE,
            "status": info.status.name(),
            "phase": Phase::of(info.status, info.failure).name(),
            "source": self.source,
            "target": self.target,
            "mirror": self.mirror,
            "sync": self.sync.name(),
            "copy_mode": info.copy_mode.name(),
            "speed": info.speed,
            "total_bytes": info.total_bytes,
            "copied_bytes": info.copied_bytes,
            "zero_bytes": info.zero_bytes,
            "skipped_bytes": info.skipped_bytes,
            "mirrored_bytes": info.mirrored_bytes,
            "dirty_bytes": info.dirty_bytes,
            "in_flight_bytes": info.in_flight_bytes,
            "copy_bytes_per_second": info.copy_bytes_per_second,
            "guest_write_bytes_per_second": info.guest_write_bytes_per_second,
            "converging": info.converging,
            "actively_synced": info.actively_synced,
            "target_undurable_bytes": info.target_undurable_bytes,
            "io_status": info.io_status.name(),
            "paused_by_operator": info.paused_by_operator,
            "writes_dirty": info.writes.dirty,
            "writes_copying": info.writes.copying,
            "writes_clean": info.writes.clean,
            "auto_finalize": self.auto_finalize,
            "auto_dismiss": self.auto_dismiss,
            "started": self.started,
            "holds": self.holds.to_json(),
        });
        if let Some((name, mode)) = &self.bitmap {
            json["bitmap"] = name.as_str().into();
            json["bitmap_mode"] = mode.name().into();
        }
        if let Some(p99) = info.guest_p99 {
            json["guest_p99_us"] = (p99.0 / 1000).into();
        }
        if let Some(throttle) = info.throttle {
            json["throttle_bytes_per_second"] = throttle.into();
        }
        if info.offloaded_bytes > 0 {
            json["offloaded_bytes"] = info.offloaded_bytes.into();
        }
        if info.auto_converged {
            json["auto_converged"] = true.into();
        }
        if self.sync == SyncMode::None {
            json["observer_policy"] = self.observer.name().into();
            json["dropped_writes"] = info.dropped_writes.into();
            json["dropped_bytes"] = info.dropped_bytes.into();
        }
        if info.verify.pass > 0 {
            json["verify"] = crate::verify::numbers(&info.verify);
        }
        if let Some((eta, confidence)) = info.eta {
            json["eta_seconds"] = eta.as_secs_f64().into();
            json["eta_confidence"] = confidence.name().into();
        }
        if let Some(asked) = info.asked {
            json["asked"] = asked.name().into();
        }
        if let Some(error) = self.error() {
            json["error"] = error.into();
        }
        if !self.warnings.is_empty() {
            json["warnings"] = self.warnings.clone().into();
        }
        if let Some(ready) = self.ready {
            json["ready"] = ready.into();
        }
        if let Stage::Ended { side, time } = self.stage {
            json["goes_on_with"] = side.name().into();
            json["ended"] = time.into();
        }
        json
    }
}

impl Target {
    /// Asks a live job for its numbers.
    pub(crate) async fn refresh_job(&self, id: &str) -> Result<(), RpcError> {
        let handle = {
            let graph = self.graph();
            let job = graph.job(id)?;
            let disk = graph.disks.get(&job.disk).filter(|_| job.is_live());
            disk.map(|disk| disk.handle.clone())
        };
        let Some(handle) = handle else { return Ok(()) };
        let Ok(answer) = ask(&handle, DiskCommand::Query).await else {
            // The disk went while the question was on its way: the job has ended, and its last word is known.
            return self.graph().job(id).map(|_| ());
        };
        if let Some(info) = answer {
            // It may have ended, even been replaced on its disk, while the answer was on its way.
            if let Some(job) = self.graph_mut().jobs.get_mut(id).filter(|job| job.is_live()) {
                job.info = info;
            }
        }
        Ok(())
    }

    /// The jobs, with numbers of this moment.
    pub(crate) async fn job_list(&self, id: Option<&str>) -> Result<Vec<Value>, RpcError> {
        let verifies = self.verify_list(id).await;
        let ids: Vec<String> = match id {
            Some(_) if !verifies.is_empty() => vec![],
            Some(id) => vec![self.graph().job(id)?.id.clone()],
            None => self.graph().jobs.keys().cloned().collect(),
        };
        let mut list = Vec::with_capacity(ids.len());
        for id in ids {
            // One that ended in between is no longer in the list.
            if self.refresh_job(&id).await.is_ok() {
                list.extend(self.graph().jobs.get(&id).map(Job::to_json));
            }
        }
        list.extend(verifies);
        Ok(list)
    }

    /// Tells a job what an operator wants of it.
    pub(crate) async fn job_verb(self: &Rc<Self>, id: &str, verb: JobVerb) -> Result<(), RpcError> {
        if let Some(answer) = self.verify_verb(id, verb).await {
            return answer;
        }
        let _engaged = self.pass_holds(id, verb)?;
        self.mirror_verb(id, verb).await
    }

    /// Tells a mirror something.
    pub(crate) async fn mirror_verb(&self, id: &str, verb: JobVerb) -> Result<(), RpcError> {
        let (handle, status, live) = {
            let graph = self.graph();
            let job = graph.job(id)?;
            let disk = graph.disks.get(&job.disk).map(|disk| disk.handle.clone());
            (disk, job.info.status, job.is_live())
        };
        match (live, verb, handle) {
            (false, JobVerb::Dismiss, _) => {
                self.dismiss(id);
                Ok(())
            }
            (true, _, Some(handle)) => {
                let Ok(answer) = ask(&handle, |reply| DiskCommand::Verb(verb, reply)).await else {
                    // The disk went while the verb was on its way: the job has ended.
                    let status = self.graph().job(id)?.info.status;
                    return Err(
                        VerbError::State { job: id.to_owned(), status, verb: verb.name() }.into()
                    );
                };
                answer.map_err(|error| match error {
                    // The disk knows no names: the job ended while the verb was on its way.
                    VerbError::NotFound { .. } => RpcError::no_job(id),
                    other => other.into(),
                })
            }
            (false, _, _) | (true, _, None) => {
                Err(VerbError::State { job: id.to_owned(), status, verb: verb.name() }.into())
            }
        }
    }

    /// What an operator should know before the switch-over that they just asked for.
    pub(crate) fn switch_warning(&self, id: &str) -> Option<String> {
        let mut graph = self.graph_mut();
        let job = graph.jobs.get_mut(id)?;
        let (source, _) = job.legs()?;
        if self.state.is_durable() || files_of(source.as_ref()).is_empty() {
            return None;
        }
        let warning = format!(
            "the target runs without --state-dir: that '{}' holds old data after the switch-over is not recorded durably, \
             and a restart with the old configuration would serve it again; update the configuration (save_config)",
            job.source
        );
        if !job.warnings.contains(&warning) {
            job.warnings.push(warning.clone());
        }
        Some(warning)
    }

    /// Does what a job's event asks for.
    pub(crate) async fn job_event(self: &Rc<Self>, disk: DiskId, event: JobEvent) {
        let Some(id) = self.graph().job_on(disk).map(|job| job.id.clone()) else { return };
        match event {
            JobEvent::Status(status) => {
                if matches!(status, JobStatus::Ready | JobStatus::Aborting) {
                    // For its numbers, and its reason; without an answer the event has the last that are known.
                    let _ = self.refresh_job(&id).await;
                }
                self.job_status(&id, status);
            }
            JobEvent::Error { side, operation, action, error, count } => {
                let facts = json!({
                    "side": side.name(), "operation": operation.name(), "action": action.name(),
                    "error": error.to_string(), "errno": error.errno(), "count": count,
                });
                tracing::warn!(job = id, side = side.name(), %error, action = action.name(), count, "I/O error");
                self.events.add("job_error", &id, facts);
            }
            JobEvent::CommitRequest => self.commit(disk, &id).await,
            JobEvent::RetractRequest => self.retract(disk, &id).await,
            JobEvent::SwitchUndone(failure) => {
                tracing::warn!(job = id, %failure, "the switch-over was undone");
                self.events.add("job_switch_undone", &id, json!({ "error": failure.to_string() }));
            }
            JobEvent::AutoConverged => {
                tracing::info!(
                    job = id,
                    "background copying does not converge: write-blocking from now on"
                );
                let facts = json!({ "copy_mode": "write-blocking" });
                self.events.add("job_auto_converged", &id, facts);
            }
            JobEvent::VerifyMismatch { offset, chunks } => {
                tracing::warn!(
                    job = id,
                    offset,
                    chunks,
                    "the legs differed; what differs is copied again"
                );
                let facts = json!({ "offset": offset, "chunks": chunks });
                self.events.add("verify_mismatch", &id, facts);
            }
            JobEvent::VerifyEnded { pass, state } => {
                let facts = json!({ "pass": pass, "state": state.name() });
                self.events.add("verify_ended", &id, facts);
                self.verify_ended(&id, pass, state).await;
            }
        }
    }

    fn job_status(&self, id: &str, status: JobStatus) {
        let mut graph = self.graph_mut();
        let Some(job) = graph.jobs.get_mut(id) else { return };
        job.info.status = status;
        tracing::info!(job = id, status = status.name(), "job status");
        self.events.add("job_status_change", id, job.status_facts());
        if status == JobStatus::Ready && job.ready.is_none() {
            // Once, as QEMU does: what the guest writes on does not take it back.
            job.ready = Some(unix_seconds());
            self.events.add("job_ready", id, job.progress_facts());
        }
        if status == JobStatus::Pending && !job.auto_finalize {
            self.events.add("job_pending", id, json!({ "type": TYPE }));
        }
    }

    /// Writes the record of a switch-over and tells the job how that went.
    async fn commit(&self, disk: DiskId, id: &str) {
        let legs = self.graph().jobs.get(id).and_then(Job::legs);
        let Some((source, target)) = legs else { return };
        let (sources, targets) = (files_of(source.as_ref()), files_of(target.as_ref()));
        let written = self.state.supersede(&sources, &targets, id).await;
        let record = match &written {
            Ok(()) => Commit::Written,
            Err(StateError::Uncertain(_)) => Commit::Unknown,
            Err(_) => Commit::Absent,
        };
        if let Err(error) = &written {
            tracing::error!(job = id, %error, "the record of the switch-over could not be written");
            if let Some(job) = self.graph_mut().jobs.get_mut(id) {
                job.warnings.push(error.to_string());
            }
        }
        self.tell(disk, || DiskCommand::Committed(record)).await;
    }

    async fn retract(&self, disk: DiskId, id: &str) {
        let done = self.state.retract(id).await;
        if let Err(error) = &done {
            tracing::error!(job = id, %error, "the record of an undone switch-over could not be taken back");
        }
        self.tell(disk, || DiskCommand::Retracted(done.is_ok())).await;
    }

    /// Answers a job. What it waits for must reach it, so a full mailbox is tried again for as long as the disk lives.
    async fn tell(&self, disk: DiskId, command: impl Fn() -> DiskCommand) {
        loop {
            let handle = self.graph().disks.get(&disk).map(|disk| disk.handle.clone());
            let Some(handle) = handle else { return };
            match send(&handle, command()).await {
                Ok(()) => return,
                Err(error) => tracing::error!(%error, "a job could not be answered yet"),
            }
        }
    }

    /// A job has ended: the graph follows.
    pub(crate) fn job_ended(&self, disk: DiskId, side: Side, info: JobInfo, releasing: usize) {
        let mut graph = self.graph_mut();
        let Some(id) = graph.job_on(disk).map(|job| job.id.clone()) else { return };
        let Some(job) = graph.jobs.get_mut(&id) else { return };
        let Some((source, target)) = job.legs() else { return };
        job.stage = Stage::Ended { side, time: unix_seconds() };
        job.holds = Holds::default();
        job.info = info;
        let (dismiss, error, origin) = (job.auto_dismiss, job.error(), job.origin);
        let (concluded, mut ended) = (job.status_facts(), job.progress_facts());
        ended["goes_on_with"] = side.name().into();
        ended["phase"] = concluded["phase"].clone();
        ended["error"] = error.clone().into();
        let cancelled = Phase::of(info.status, info.failure) == Phase::Cancelling;
        ended["qemu_event"] = if cancelled { qemu::CANCELLED } else { qemu::COMPLETED }.into();
        if let Some(known) = graph.disks.get(&disk).map(|entry| entry.limits.block_size)
            && side == Side::Target
        {
            graph.goes_on_as(&target, known);
        }
        if let Some(entry) = graph.disks.get_mut(&disk) {
            // The leg that the disk does not go on with stays claimed while I/O is in flight on it; what was made for the
            // job goes with it.
            let (leg, origin) = match side {
                Side::Source => (target, origin),
                Side::Target => (std::mem::replace(&mut entry.bdev, target), Origin::Given),
            };
            entry.releasing.add(releasing, leg.name(), origin);
        }
        graph.free_bitmaps(&id);
        drop(graph);
        self.close_released(disk);
        self.verify_mirror_ended(&id);
        self.state.settled(&id);
        tracing::info!(
            job = id,
            source = source.name(),
            goes_on_with = side.name(),
            error,
            "job ended"
        );
        self.events.add("job_completed", &id, ended);
        self.events.add("job_status_change", &id, concluded);
        if dismiss {
            self.dismiss(&id);
        }
    }

    /// Forgets a job that has ended, but for the history.
    fn dismiss(&self, id: &str) {
        let mut graph = self.graph_mut();
        let Some(job) = graph.jobs.remove(id) else { return };
        let json = job.to_json();
        graph.ended.push_back(json);
        if graph.ended.len() > HISTORY_MAX {
            graph.ended.pop_front();
        }
        self.events.add("job_status_change", id, json!({ "status": JobStatus::Null.name() }));
    }
}

/// What a job that has not been asked yet says about itself.
pub(crate) fn untouched(job: &dyn resilver_bdev::BlockJob) -> JobInfo {
    debug_assert!(job.wants() == JobWants::Nothing);
    let info = job.info(resilver_reactor::Nanos::ZERO);
    debug_assert!(info.io_status == IoStatus::Ok);
    info
}

#[cfg(test)]
mod tests {
    use super::*;
    use resilver_bdev::{IoError, IoKind};

    #[test]
    fn every_state_and_cause_has_a_phase_and_live_jobs_are_never_over() {
        let io = JobFailure::Io {
            side: Side::Target,
            operation: IoKind::Write,
            offset: 0,
            error: IoError::NO_SPACE,
        };
        for status in JobStatus::ALL {
            for failure in
                [None, Some(io), Some(JobFailure::Cancelled), Some(JobFailure::CommitRecord)]
            {
                let phase = Phase::of(status, failure);
                let over = matches!(phase, Phase::Completed | Phase::Failed);
                let may_be_over =
                    matches!(status, JobStatus::Aborting | JobStatus::Concluded | JobStatus::Null);
                assert!(!over || may_be_over, "{status} {failure:?} is {}", phase.name());
            }
        }
        assert_eq!(Phase::of(JobStatus::Paused, Some(io)), Phase::Running);
        assert_eq!(Phase::of(JobStatus::Concluded, Some(io)), Phase::Failed);
        assert_eq!(Phase::of(JobStatus::Concluded, None), Phase::Completed);
        assert_eq!(Phase::of(JobStatus::Concluded, Some(JobFailure::Cancelled)), Phase::Cancelling);
    }
}
