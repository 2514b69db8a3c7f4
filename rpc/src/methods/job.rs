//! The generic verbs of jobs, their list and their events.

use std::rc::Rc;
use std::time::Duration;

use resilver_bdev::JobVerb;
use resilver_bdev::job::CopyMode;
use resilver_reactor::Nanos;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Answer, Caller, Rpc};
use crate::error::RpcError;
use crate::events::EVENTS_MAX;

/// The longest that `job_get_events` waits, milliseconds.
const WAIT_MS_MAX: u64 = 60_000;

/// How guest writes reach the target while a mirror copies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum CopyModeName {
    /// Guest writes go to the source and are copied later.
    Background,
    /// Guest writes go to both at once.
    #[default]
    WriteBlocking,
}

impl From<CopyModeName> for CopyMode {
    fn from(name: CopyModeName) -> Self {
        match name {
            CopyModeName::Background => Self::Background,
            CopyModeName::WriteBlocking => Self::WriteBlocking,
        }
    }
}

/// Lists jobs with their state and progress: the live ones, and concluded ones that were not dismissed.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct JobGetList {
    /// One job; all if not given.
    #[serde(default)]
    job_id: Option<String>,
}

impl Rpc for JobGetList {
    const NAME: &'static str = "job_get_list";
    const EXAMPLE: &'static str = r#"{"job_id":"disk0"}"#;
    const RESULT: &'static str = "an array of objects: id, type, status (QEMU's states), phase, source, target, the byte counts, \
         rates a second, eta_seconds and error where there is one, io_status, warnings";

    async fn call(self, caller: Caller) -> Result<Answer, RpcError> {
        Ok(Answer::new(caller.target.job_list(self.job_id.as_deref()).await?))
    }
}

/// Lists the last jobs that ended and were dismissed, oldest first, as `job_get_list` would have shown them.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct JobGetHistory {}

impl Rpc for JobGetHistory {
    const NAME: &'static str = "job_get_history";
    const EXAMPLE: &'static str = "{}";
    const RESULT: &'static str = "an array as of job_get_list";

    async fn call(self, caller: Caller) -> Result<Answer, RpcError> {
        let graph = caller.target.graph();
        Ok(Answer::new(graph.ended.iter().cloned().collect::<Vec<_>>()))
    }
}

/// Defines a method that is one verb of a job.
macro_rules! verb {
    ($(#[$doc:meta])* $method:ident, $name:literal, $verb:expr) => {
        $(#[$doc])*
        #[derive(Debug, Deserialize, JsonSchema)]
        pub(super) struct $method {
            /// The job.
            job_id: String,
        }

        impl Rpc for $method {
            const NAME: &'static str = $name;
            const EXAMPLE: &'static str = r#"{"job_id":"disk0"}"#;
            const RESULT: &'static str = "true";

            async fn call(self, caller: Caller) -> Result<Answer, RpcError> {
                caller.target.job_verb(&self.job_id, $verb).await?;
                Ok(Answer::done())
            }
        }
    };
}

verb!(
    /// Lets a pending job change the graph (QEMU's job-finalize). For jobs started with `auto_finalize` false.
    JobFinalize,
    "job_finalize",
    JobVerb::Finalize
);
verb!(
    /// Pauses a job: no new copies are begun, those in flight end first. Guest writes go on as the copy mode says.
    JobPause,
    "job_pause",
    JobVerb::Pause
);
verb!(
    /// Goes on with a job that the operator or an error paused.
    JobResume,
    "job_resume",
    JobVerb::Resume
);
verb!(
    /// Gives a job up at once; what the target holds is not promised (QEMU's job-cancel). `bdev_mirror_finish` ends a mirror
    /// with a good copy.
    JobCancel,
    "job_cancel",
    JobVerb::Cancel
);
verb!(
    /// Forgets a concluded job. For jobs started with `auto_dismiss` false.
    JobDismiss,
    "job_dismiss",
    JobVerb::Dismiss
);

/// Switches over to the target (QEMU's job-complete). Answers at once; `job_get_list` and the events tell how it goes. The
/// guest runs on and is held only for the exchange itself. If it cannot be done the job is ready again, with the reason.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct JobComplete {
    /// The job.
    job_id: String,
}

impl Rpc for JobComplete {
    const NAME: &'static str = "job_complete";
    const EXAMPLE: &'static str = r#"{"job_id":"disk0"}"#;
    const RESULT: &'static str =
        "true; the response has a member `warning` beside it if the target keeps no durable state";

    async fn call(self, caller: Caller) -> Result<Answer, RpcError> {
        caller.target.job_verb(&self.job_id, JobVerb::Complete).await?;
        let warning = caller.target.switch_warning(&self.job_id);
        Ok(Answer { warning, ..Answer::done() })
    }
}

/// Keeps a job as it is for a while: `job_complete`, `bdev_mirror_finish`, `job_finalize` and `job_cancel` are refused with
/// the holder's name until it releases the job or its time has run out. Called again by the same holder, the time begins
/// anew. Several may hold a job; all must let go. Errors, a guest's reset and the end of the target are not held up.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct JobHold {
    /// The job.
    job_id: String,
    /// Who holds it: any name, chosen by the caller.
    holder: String,
    /// How long the hold lasts unless it is renewed, milliseconds: 1 to 86400000.
    ttl_ms: u64,
}

impl Rpc for JobHold {
    const NAME: &'static str = "job_hold";
    const EXAMPLE: &'static str = r#"{"job_id":"disk0","holder":"vmm-7","ttl_ms":30000}"#;
    const RESULT: &'static str = "true";

    async fn call(self, caller: Caller) -> Result<Answer, RpcError> {
        caller.target.hold_job(&self.job_id, &self.holder, self.ttl_ms).await?;
        Ok(Answer::done())
    }
}

/// Ends a hold before its time has run out. The job can be ended again once no other holder is left.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct JobRelease {
    /// The job.
    job_id: String,
    /// Who held it.
    holder: String,
}

impl Rpc for JobRelease {
    const NAME: &'static str = "job_release";
    const EXAMPLE: &'static str = r#"{"job_id":"disk0","holder":"vmm-7"}"#;
    const RESULT: &'static str = "true";

    async fn call(self, caller: Caller) -> Result<Answer, RpcError> {
        caller.target.release_job(&self.job_id, &self.holder)?;
        Ok(Answer::done())
    }
}

/// Changes the rate limit of a job.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct JobSetSpeed {
    /// The job.
    job_id: String,
    /// Bytes a second that are copied at most; 0 for no limit. Guest writes are not limited.
    speed: u64,
}

impl Rpc for JobSetSpeed {
    const NAME: &'static str = "job_set_speed";
    const EXAMPLE: &'static str = r#"{"job_id":"disk0","speed":104857600}"#;
    const RESULT: &'static str = "true";

    async fn call(self, caller: Caller) -> Result<Answer, RpcError> {
        caller.target.job_verb(&self.job_id, JobVerb::SetSpeed(self.speed)).await?;
        Ok(Answer::done())
    }
}

/// Changes how a mirror works, while it does: its copy mode, both ways, and the latency that it leaves the guest. What is not
/// given stays as it is.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct JobChange {
    /// The job.
    job_id: String,
    /// The new copy mode.
    #[serde(default)]
    copy_mode: Option<CopyModeName>,
    /// The new ceiling of the guest's latency (as of `bdev_mirror_start`), microseconds; 0 for none.
    #[serde(default)]
    latency_ceiling_us: Option<u64>,
}

impl Rpc for JobChange {
    const NAME: &'static str = "job_change";
    const EXAMPLE: &'static str = r#"{"job_id":"disk0","copy_mode":"write-blocking"}"#;
    const RESULT: &'static str = "true";

    async fn call(self, caller: Caller) -> Result<Answer, RpcError> {
        let (target, id) = (&caller.target, &self.job_id);
        if self.copy_mode.is_none() && self.latency_ceiling_us.is_none() {
            let expected = "copy_mode or latency_ceiling_us was expected";
            return Err(RpcError::parameter("copy_mode", "nothing", expected));
        }
        if let Some(mode) = self.copy_mode {
            target.job_verb(id, JobVerb::Change(mode.into())).await?;
        }
        if let Some(micros) = self.latency_ceiling_us {
            let ceiling = (micros > 0).then(|| Nanos::from_micros(micros));
            target.job_verb(id, JobVerb::SetCeiling(ceiling)).await?;
        }
        Ok(Answer::done())
    }
}

/// Reads the events of jobs: state changes, errors, ends. With `timeout_ms` it waits for the first one; calls that follow on
/// the same connection wait with it.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct JobGetEvents {
    /// Only events after this sequence number; 0 or nothing for all that are kept.
    #[serde(default)]
    after: u64,
    /// How long to wait for an event if there is none yet, milliseconds; at most a minute.
    #[serde(default)]
    timeout_ms: u64,
    /// Only events of this job.
    #[serde(default)]
    job_id: Option<String>,
}

impl Rpc for JobGetEvents {
    const NAME: &'static str = "job_get_events";
    const EXAMPLE: &'static str = r#"{"after":17,"timeout_ms":1000}"#;
    const RESULT: &'static str = "an object: sequence (to be given as `after` next time), missed (events that were dropped before \
         they could be read), events";

    async fn call(self, caller: Caller) -> Result<Answer, RpcError> {
        let (events, job_id) = (&caller.target.events, self.job_id.as_deref());
        let wait = Duration::from_millis(self.timeout_ms.min(WAIT_MS_MAX));
        let waited = tokio::time::timeout(wait, events.wait(self.after, job_id, EVENTS_MAX)).await;
        let page = waited.unwrap_or_else(|_| events.page(self.after, job_id, EVENTS_MAX));
        Ok(Answer::new(page.to_json()))
    }
}

/// As `job_get_events` without waiting; from then on every event comes as a notification `job_event` on this connection. A
/// subscriber that reads too slowly is told how many events it missed, in an event `events_missed` with a `count`.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct JobSubscribe {
    /// Only events after this sequence number; none before the call if not given.
    #[serde(default)]
    after: Option<u64>,
    /// Only events of this job.
    #[serde(default)]
    job_id: Option<String>,
}

impl Rpc for JobSubscribe {
    const NAME: &'static str = "job_subscribe";
    const EXAMPLE: &'static str = r#"{"after":17}"#;
    const RESULT: &'static str = "as of job_get_events";

    async fn call(self, caller: Caller) -> Result<Answer, RpcError> {
        let events = &caller.target.events;
        let after = self.after.unwrap_or_else(|| events.newest());
        let first = events.page(after, self.job_id.as_deref(), EVENTS_MAX);
        if let Some(notifications) = &caller.notifications {
            let subscription = notifications.subscribe()?;
            let target = Rc::clone(&caller.target);
            tokio::task::spawn_local(subscription.feed(target, first.sequence, self.job_id));
        }
        Ok(Answer::new(first.to_json()))
    }
}
