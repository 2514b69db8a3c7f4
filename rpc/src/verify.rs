//! Verification of mirrors as control keeps it: a job beside the mirror's own.
//!
//! The work is the mirror's, done where its legs are ([`resilver_bdev::verify`]); the job here is a name for one pass of
//! it, so that it is listed, cancelled and remembered as other jobs are. It rests while its mirror is paused or switches
//! over, and ends with it. A pass that a switch-over demands has no job: it is part of the mirror's.

use std::rc::Rc;

use resilver_bdev::{
    DiskCommand, JobStatus, JobVerb, VerbError, VerifyInfo, VerifyRequest, VerifyState,
};
use serde_json::{Value, json};

use crate::disks::ask;
use crate::error::{RpcError, code};
use crate::events::unix_seconds;
use crate::jobs::HISTORY_MAX;
use crate::mirror::check_job_id;
use crate::target::{Graph, Space, Target};

/// A verification to be started.
pub(crate) struct VerifyStart {
    pub(crate) source: String,
    pub(crate) target: String,
    pub(crate) job_id: Option<String>,
    pub(crate) request: VerifyRequest,
    pub(crate) auto_dismiss: bool,
}

/// One pass over the legs of a mirror.
pub(crate) struct VerifyJob {
    id: String,
    /// The mirror's job.
    mirror: String,
    source: String,
    target: String,
    sample_percent: u8,
    auto_dismiss: bool,
    started: f64,
    /// The last that is known of the pass.
    info: VerifyInfo,
}

impl VerifyJob {
    fn is_live(&self) -> bool {
        self.info.state == VerifyState::Running
    }

    fn status(&self, graph: &Graph) -> JobStatus {
        let mirror = graph.jobs.get(&self.mirror).map(|job| job.info.status);
        match (self.is_live(), mirror) {
            (false, _) => JobStatus::Concluded,
            (true, Some(JobStatus::Running | JobStatus::Ready)) => JobStatus::Running,
            (true, _) => JobStatus::Paused,
        }
    }

    /// The phase that Cloud Hypervisor's words have for it.
    fn phase(&self) -> &'static str {
        match self.info.state {
            VerifyState::None | VerifyState::Running => "running",
            VerifyState::Completed => "completed",
            VerifyState::Cancelled => "cancelling",
        }
    }

    fn error(&self) -> Option<&'static str> {
        (self.info.state == VerifyState::Cancelled)
            .then_some("Operation canceled, or over with its mirror, before all was compared")
    }

    fn to_json(&self, status: JobStatus) -> Value {
        let mut json = json!({
            "id": self.id,
            "type": "verify",
            "status": status.name(),
            "phase": self.phase(),
            "source": self.source,
            "target": self.target,
            "mirror_job": self.mirror,
            "sample_percent": self.sample_percent,
            "auto_dismiss": self.auto_dismiss,
            "started": self.started,
        });
        if let (Value::Object(json), Value::Object(numbers)) = (&mut json, numbers(&self.info)) {
            json.extend(numbers);
        }
        if let Some(error) = self.error() {
            json["error"] = error.into();
        }
        json
    }
}

/// The numbers of a pass.
pub(crate) fn numbers(info: &VerifyInfo) -> Value {
    json!({
        "pass": info.pass,
        "state": info.state.name(),
        "speed": info.speed,
        "total_bytes": info.total_bytes,
        "checked_bytes": info.checked_bytes,
        "skipped_bytes": info.skipped_bytes,
        "mismatched_bytes": info.mismatched_bytes,
    })
}

impl Target {
    /// Starts to compare the legs of a live mirror; answers with the job's name.
    pub(crate) async fn start_verify(
        self: &Rc<Self>,
        start: VerifyStart,
    ) -> Result<String, RpcError> {
        let (mirror, handle) = {
            let graph = self.graph();
            let legs = |job: &&crate::jobs::Job| {
                job.is_live() && job.source == start.source && job.target == start.target
            };
            let job = graph.jobs.values().find(legs);
            let found = job.and_then(|job| Some((job.id.clone(), graph.disks.get(&job.disk)?)));
            let (mirror, disk) = found.ok_or_else(|| no_mirror(&start))?;
            (mirror, disk.handle.clone())
        };
        let id = start.job_id.unwrap_or_else(|| format!("verify-{mirror}"));
        check_job_id(&id)?;
        let _engaged = self.engage(Space::Job, &id)?;
        if self.graph().jobs.contains_key(&id) || self.graph().verifies.contains_key(&id) {
            return Err(RpcError::job_exists(&id));
        }
        let verb = JobVerb::Verify(start.request);
        self.mirror_verb(&mirror, verb).await?;
        let info = ask(&handle, DiskCommand::Query).await?.map(|info| info.verify);
        let job = VerifyJob {
            id: id.clone(),
            mirror,
            source: start.source,
            target: start.target,
            sample_percent: start.request.sample_percent,
            auto_dismiss: start.auto_dismiss,
            started: unix_seconds(),
            // The mirror may have ended in between, and its pass with it.
            info: info
                .unwrap_or(VerifyInfo { state: VerifyState::Cancelled, ..VerifyInfo::default() }),
        };
        let over = !job.is_live();
        self.graph_mut().verifies.insert(id.clone(), job);
        let status = JobStatus::Running.name();
        self.events.add("job_status_change", &id, json!({ "status": status, "phase": "running" }));
        if over {
            self.conclude_verify(&id);
        }
        Ok(id)
    }

    /// The verifications as `job_get_list` shows them: all, or one.
    pub(crate) async fn verify_list(&self, id: Option<&str>) -> Vec<Value> {
        let mirrors: Vec<(String, String)> = {
            let graph = self.graph();
            let chosen = graph.verifies.values().filter(|job| id.is_none_or(|id| job.id == id));
            chosen.map(|job| (job.id.clone(), job.mirror.clone())).collect()
        };
        let mut list = Vec::with_capacity(mirrors.len());
        for (id, mirror) in mirrors {
            // Without an answer the last known numbers are shown.
            if self.refresh_job(&mirror).await.is_ok() {
                self.note_pass(&mirror);
            }
            let graph = self.graph();
            list.extend(graph.verifies.get(&id).map(|job| job.to_json(job.status(&graph))));
        }
        list
    }

    /// Brings a running verification up to what its mirror last said.
    fn note_pass(&self, mirror: &str) {
        let graph = &mut *self.graph_mut();
        let Some(info) = graph.jobs.get(mirror).map(|job| job.info.verify) else { return };
        let mut jobs = graph.verifies.values_mut();
        let found = jobs.find(|job| job.mirror == mirror && job.info.pass == info.pass);
        // Its end is told by an event, which comes after the last mismatch's.
        if let Some(job) = found.filter(|job| job.is_live()) {
            job.info = VerifyInfo { state: VerifyState::Running, ..info };
        }
    }

    /// A pass of a mirror has ended.
    pub(crate) async fn verify_ended(&self, mirror: &str, pass: u64, state: VerifyState) {
        if self.refresh_job(mirror).await.is_ok() {
            self.note_pass(mirror);
        }
        let id = {
            let mut graph = self.graph_mut();
            let mut jobs = graph.verifies.values_mut();
            let found =
                jobs.find(|job| job.mirror == mirror && job.info.pass == pass && job.is_live());
            let Some(job) = found else { return };
            job.info.state = state;
            job.id.clone()
        };
        self.conclude_verify(&id);
    }

    /// A mirror has ended, and with it what was left of its verification.
    pub(crate) fn verify_mirror_ended(&self, mirror: &str) {
        self.note_pass(mirror);
        let id = {
            let mut graph = self.graph_mut();
            let mut jobs = graph.verifies.values_mut();
            let found = jobs.find(|job| job.mirror == mirror && job.is_live());
            let Some(job) = found else { return };
            job.info.state = VerifyState::Cancelled;
            job.id.clone()
        };
        self.conclude_verify(&id);
    }

    fn conclude_verify(&self, id: &str) {
        let facts = {
            let graph = self.graph();
            let Some(job) = graph.verifies.get(id) else { return };
            let (status, phase) = (JobStatus::Concluded.name(), job.phase());
            self.events.add("job_status_change", id, json!({ "status": status, "phase": phase }));
            json!({
                "phase": phase,
                "error": job.error(),
                "checked_bytes": job.info.checked_bytes,
                "mismatched_bytes": job.info.mismatched_bytes,
            })
        };
        tracing::info!(job = id, %facts, "verification ended");
        self.events.add("job_completed", id, facts);
        if self.graph().verifies.get(id).is_some_and(|job| job.auto_dismiss) {
            self.dismiss_verify(id);
        }
    }

    fn dismiss_verify(&self, id: &str) {
        let mut graph = self.graph_mut();
        let Some(job) = graph.verifies.remove(id) else { return };
        let mut json = job.to_json(JobStatus::Concluded);
        json["ended"] = unix_seconds().into();
        graph.ended.push_back(json);
        if graph.ended.len() > HISTORY_MAX {
            graph.ended.pop_front();
        }
        self.events.add("job_status_change", id, json!({ "status": JobStatus::Null.name() }));
    }

    /// Tells a verification something; the mirror's job if there is none of this name.
    pub(crate) async fn verify_verb(
        &self,
        id: &str,
        verb: JobVerb,
    ) -> Option<Result<(), RpcError>> {
        let (live, status, mirror) = {
            let graph = self.graph();
            let job = graph.verifies.get(id)?;
            (job.is_live(), job.status(&graph), job.mirror.clone())
        };
        let job = id.to_owned();
        Some(match (verb, live) {
            (JobVerb::Dismiss, false) => {
                self.dismiss_verify(id);
                Ok(())
            }
            (JobVerb::Cancel, true) => self.mirror_verb(&mirror, JobVerb::StopVerify).await,
            (JobVerb::Pause | JobVerb::Resume | JobVerb::SetSpeed(_), true) => {
                let reason = format!(
                    "it rests while its mirror is paused; pause or resume '{mirror}', or cancel it and start another one"
                );
                Err(VerbError::NotSupported { job, verb: verb.name(), reason }.into())
            }
            (_, _) => Err(VerbError::State { job, status, verb: verb.name() }.into()),
        })
    }
}

/// There is no mirror whose legs could be compared.
fn no_mirror(start: &VerifyStart) -> RpcError {
    let VerifyStart { source, target, .. } = start;
    let message = format!(
        "no mirror from '{source}' to '{target}' is running, and only the legs of one are compared; start one with \
         bdev_mirror_start (source '{source}', target '{target}'), then verify it when it is ready"
    );
    RpcError::new(
        code::NOT_FOUND,
        "mirror_not_found",
        message,
        json!({ "source": source, "target": target }),
    )
}
