//! Holds: a virtual-machine manager's word that a job stays as it is while the manager does something of its own, such as
//! taking a snapshot or migrating the machine.
//!
//! While a job is held, the verbs that end it or switch its disk are refused ([`GATED`]); all else goes on. A hold lasts
//! until it is released or runs out, so that a manager that dies blocks nobody for longer than it asked for. It is a
//! courtesy among managers and nothing depends on it for its correctness: an error policy, a guest's reset under
//! `on_guest_reset: cancel` and the end of the target itself end a job all the same.
//!
//! A hold and a gated verb both engage the job's name, and a hold asks the disk for the job's state before it is granted:
//! a switch-over that was accepted earlier, even one that waits for a resume, is never behind a hold.

use std::collections::BTreeMap;
use std::rc::{Rc, Weak};
use std::time::Duration;

use resilver_bdev::{JobStatus, JobVerb, VerbError};
use serde_json::{Value, json};
use tokio::task::AbortHandle;
use tokio::time::Instant;

use crate::error::{RpcError, code};
use crate::jobs::Job;
use crate::target::{Engaged, Space, Target, check_name};

/// The longest that a hold lasts before it must be renewed, milliseconds.
pub(crate) const TTL_MS_MAX: u64 = 24 * 60 * 60 * 1000;
/// The most holders that a job has at one time.
const HOLDERS_MAX: usize = 64;

/// The verbs that a held job refuses.
const GATED: [JobVerb; 4] =
    [JobVerb::Complete, JobVerb::Finish, JobVerb::Finalize, JobVerb::Cancel];

/// One hold; its timer goes with it.
struct Hold {
    until: Instant,
    timer: AbortHandle,
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.timer.abort();
    }
}

/// The holds of one job, by holder.
#[derive(Default)]
pub(crate) struct Holds(BTreeMap<String, Hold>);

impl Holds {
    /// Those that have not run out, with the time that they have left.
    fn standing(&self) -> impl Iterator<Item = (&str, Duration)> {
        let now = Instant::now();
        let left = move |hold: &Hold| hold.until.saturating_duration_since(now);
        let all = self.0.iter().map(move |(holder, hold)| (holder.as_str(), left(hold)));
        all.filter(|(_, left)| !left.is_zero())
    }

    /// As `job_get_list` shows them.
    pub(crate) fn to_json(&self) -> Value {
        let left = |left: Duration| u64::try_from(left.as_millis()).unwrap_or(TTL_MS_MAX);
        self.standing().map(|(who, time)| json!({ "holder": who, "ttl_ms": left(time) })).collect()
    }

    /// Refuses a verb that the holds exclude.
    fn check(&self, job: &str, verb: JobVerb) -> Result<(), RpcError> {
        let holders: Vec<String> = self
            .standing()
            .map(|(holder, left)| format!("'{holder}' for another {:.1} s", left.as_secs_f64()))
            .collect();
        if holders.is_empty() || !GATED.contains(&verb) {
            return Ok(());
        }
        let message = format!(
            "Job '{job}' is held by {} and accepts no '{}' before job_release, or before that has run out",
            holders.join(", by "),
            verb.name()
        );
        let facts = json!({ "job_id": job, "verb": verb.name(), "holds": self.to_json() });
        Err(RpcError::new(code::BUSY, "job_held", message, facts))
    }
}

/// Whether a job can be held: not once it does what a hold is to keep it from.
fn may_hold(job: &Job) -> bool {
    use JobStatus::{Created, Paused, Pending, Ready, Running, Standby};
    let early = matches!(job.info.status, Created | Running | Paused | Ready | Standby | Pending);
    early && job.info.asked.is_none()
}

impl Target {
    /// Lets a verb pass, or says who holds the job. What is given back keeps new holds off until the disk has answered.
    pub(crate) fn pass_holds(
        self: &Rc<Self>,
        id: &str,
        verb: JobVerb,
    ) -> Result<Option<Engaged>, RpcError> {
        if !GATED.contains(&verb) {
            return Ok(None);
        }
        let engaged = self.engage(Space::Job, id)?;
        self.graph().job(id)?.holds.check(id, verb)?;
        Ok(Some(engaged))
    }

    /// Holds a job for a while, or for longer; says whether the holder held it already.
    pub(crate) async fn hold_job(
        self: &Rc<Self>,
        id: &str,
        holder: &str,
        ttl_ms: u64,
    ) -> Result<bool, RpcError> {
        check_name("holder", holder)?;
        if !(1..=TTL_MS_MAX).contains(&ttl_ms) {
            let expected = format!("1 to {TTL_MS_MAX} milliseconds; a hold can be renewed");
            return Err(RpcError::parameter("ttl_ms", ttl_ms, expected));
        }
        if self.graph().verifies.contains_key(id) {
            let reason = "a verification changes nothing; hold the job of its mirror".to_owned();
            let (job, verb) = (id.to_owned(), "hold");
            return Err(VerbError::NotSupported { job, verb, reason }.into());
        }
        let _engaged = self.engage(Space::Job, id)?;
        self.refresh_job(id).await?;
        let mut graph = self.graph_mut();
        let job = graph.jobs.get_mut(id).ok_or_else(|| RpcError::no_job(id))?;
        if !may_hold(job) {
            return Err(too_late(job));
        }
        if job.holds.0.len() >= HOLDERS_MAX && !job.holds.0.contains_key(holder) {
            let expected = format!("one of the {HOLDERS_MAX} holders that the job has already");
            return Err(RpcError::parameter("holder", holder, expected));
        }
        let until = Instant::now() + Duration::from_millis(ttl_ms);
        let end = expire(Rc::downgrade(self), id.to_owned(), holder.to_owned(), until);
        let timer = tokio::task::spawn_local(end).abort_handle();
        let renewed = job.holds.0.insert(holder.to_owned(), Hold { until, timer }).is_some();
        drop(graph);
        let facts = json!({ "holder": holder, "ttl_ms": ttl_ms, "renewed": renewed });
        self.events.add("job_held", id, facts);
        Ok(renewed)
    }

    /// Ends a hold.
    pub(crate) fn release_job(&self, id: &str, holder: &str) -> Result<(), RpcError> {
        let mut graph = self.graph_mut();
        let job = graph.jobs.get_mut(id).ok_or_else(|| RpcError::no_job(id))?;
        if job.holds.0.remove(holder).is_none() {
            let message = format!("Job '{id}' is not held by '{holder}'; it may have run out");
            let facts = json!({ "job_id": id, "holder": holder, "holds": job.holds.to_json() });
            return Err(RpcError::new(code::NOT_FOUND, "not_held", message, facts));
        }
        drop(graph);
        self.events.add("job_released", id, json!({ "holder": holder }));
        Ok(())
    }
}

/// A job that has begun to end, or is to.
fn too_late(job: &Job) -> RpcError {
    let (id, status) = (job.id.clone(), job.info.status);
    match job.info.asked {
        Some(asked) => RpcError::new(
            code::STATE,
            "job_state",
            format!("Job '{id}' cannot be held: '{}' was accepted before", asked.name()),
            json!({ "job_id": id, "status": status.name(), "verb": "hold" }),
        ),
        None => VerbError::State { job: id, status, verb: "hold" }.into(),
    }
}

/// Ends a hold that nobody renewed in time.
async fn expire(target: Weak<Target>, id: String, holder: String, until: Instant) {
    tokio::time::sleep_until(until).await;
    let Some(target) = target.upgrade() else { return };
    let gone = {
        let mut graph = target.graph_mut();
        graph.jobs.get_mut(&id).and_then(|job| job.holds.0.remove(&holder))
    };
    if gone.is_some() {
        tracing::warn!(job = id, holder, "a hold ran out");
        target.events.add("job_hold_expired", &id, json!({ "holder": holder }));
    }
}
