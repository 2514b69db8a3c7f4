//! Waiting for a mirror, in the manner of `virsh blockcopy --wait`: its progress, what is done once it is in sync, its end.
//!
//! The job's events are followed, so that the end of a job that is dismissed at once is seen too. Whoever started the job and
//! waits for it owns it: an interrupt (Ctrl-C) cancels it, as a time-out does. Whoever waits for a job of somebody else's only
//! watches: interrupted, it is left running.

use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use anyhow::bail;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use resilver_rpc::error::code;
use resilver_rpc::{Client, ClientError};
use serde_json::{Value, json};

use crate::interrupt::{self, Interrupt};
use crate::output::{self, bytes};
use crate::{Interrupted, Session, TimedOut};

/// How long one look at the events lasts.
const LOOK_MS: u64 = 250;
/// How long the end of a cancelled job is waited for.
const CLEAN_UP: Duration = Duration::from_secs(30);

/// What is done with a mirror that is in sync.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Then {
    Leave,
    Pivot,
    Finish,
}

/// What is waited for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct WaitFor {
    /// Whether progress is shown.
    pub(crate) verbose: bool,
    /// What is done once it is in sync.
    pub(crate) then: Then,
    /// When it is cancelled.
    pub(crate) timeout: Option<Duration>,
    /// Whether the end of a job that was told to end is not waited for.
    pub(crate) asynchronous: bool,
}

/// Follows one job.
pub(crate) struct Watch {
    client: Client,
    job: String,
    /// The last event that was seen.
    seen: u64,
    progress: Progress,
    /// The last error that was told.
    told: String,
    /// Set by Ctrl-C, where that is taken for a cancel.
    interrupted: Option<Interrupt>,
    /// How it ended, if it had before.
    ended: Option<Value>,
}

/// How progress is shown.
enum Progress {
    /// Not.
    Hidden,
    /// A bar on a terminal.
    Bar(ProgressBar),
    /// A line whenever something has changed: the last one.
    Lines(String),
}

/// How a job that was followed came out.
enum Outcome {
    /// In sync, and left so.
    InSync,
    /// Told to switch over or to finish; the end was not to be waited for.
    Told,
    /// Over; the disk goes on with this leg.
    Ended(String),
}

impl Watch {
    /// Follows a job that was just started, from an event on.
    pub(crate) fn of_new(client: Client, job: &str, seen: u64) -> Self {
        // Where the system refuses, Ctrl-C ends the process, as if nobody had asked.
        let interrupted = Interrupt::watch(interrupt::CTRL_C, || ()).ok();
        Self { interrupted, ..Self::from_event(client, job, seen) }
    }

    fn from_event(client: Client, job: &str, seen: u64) -> Self {
        Self {
            client,
            job: job.to_owned(),
            seen,
            progress: Progress::Hidden,
            told: String::new(),
            interrupted: None,
            ended: None,
        }
    }

    /// Follows a job that is there, or tells of one that has ended.
    pub(crate) fn of_any(mut client: Client, job: &str) -> anyhow::Result<Self> {
        // In this order: what ends after the look at the events is told by them.
        let page = client.call("job_get_events", json!({ "after": u64::MAX }))?.result;
        let seen = page["sequence"].as_u64().unwrap_or(0);
        let mut watch = Self::from_event(client, job, seen);
        match watch.last_words()? {
            Value::Null => {
                // As the target says it.
                watch.client.call("job_get_list", json!({ "job_id": job }))?;
            }
            words if words["status"] == "concluded" => watch.ended = Some(words),
            _ => {}
        }
        Ok(watch)
    }

    /// Waits, and says how it came out.
    pub(crate) fn run(mut self, session: &Session, what: &WaitFor) -> anyhow::Result<()> {
        if what.verbose {
            self.progress = Progress::shown(&self.job)?;
        }
        let outcome = match self.ended.take() {
            Some(words) => self.how_it_ended(&words)?,
            None => self.follow(what)?,
        };
        self.progress.clear();
        let line = match &outcome {
            Outcome::InSync => format!("{} is in sync", self.job),
            Outcome::Told => format!(
                "{} was told to end; `resilver mirror wait {}` sees it through",
                self.job, self.job
            ),
            Outcome::Ended(leg) if leg == "target" => {
                format!("{} switched over to its target", self.job)
            }
            Outcome::Ended(_) => format!("{} ended; its target is a copy of one moment", self.job),
        };
        if session.json {
            output::json(&self.last_words()?);
        } else {
            output::say(&line);
        }
        Ok(())
    }

    /// What the job says about itself, or said last.
    fn last_words(&mut self) -> anyhow::Result<Value> {
        for method in ["job_get_list", "job_get_history"] {
            let jobs = self.client.call(method, json!({}))?.result;
            let found = jobs.as_array().into_iter().flatten().rfind(|it| it["id"] == *self.job);
            if let Some(job) = found {
                return Ok(job.clone());
            }
        }
        Ok(Value::Null)
    }

    fn follow(&mut self, what: &WaitFor) -> anyhow::Result<Outcome> {
        let begun = Instant::now();
        let mut then = Some(what.then);
        loop {
            if let Some(outcome) = self.look()? {
                return Ok(outcome);
            }
            if self.is_in_sync()? {
                let method = match then.take() {
                    Some(Then::Leave) => return Ok(Outcome::InSync),
                    Some(Then::Pivot) => Some("job_complete"),
                    Some(Then::Finish) => Some("bdev_mirror_finish"),
                    // It was told already and is about to go.
                    None => None,
                };
                if let Some(method) = method {
                    self.tell(method)?;
                    if what.asynchronous {
                        return Ok(Outcome::Told);
                    }
                }
            }
            if self.interrupted.as_ref().is_some_and(Interrupt::is_there) {
                let end = self.cancel(what.asynchronous)?;
                return Err(Interrupted(format!("interrupted: {end}")).into());
            }
            if what.timeout.is_some_and(|timeout| begun.elapsed() > timeout) {
                let end = self.cancel(what.asynchronous)?;
                return Err(TimedOut(format!("not done in time: {end}")).into());
            }
        }
    }

    /// Takes the events of the next moment.
    fn look(&mut self) -> anyhow::Result<Option<Outcome>> {
        let params = json!({ "after": self.seen, "timeout_ms": LOOK_MS, "job_id": self.job });
        let page = self.client.call("job_get_events", params)?.result;
        self.seen = page["sequence"].as_u64().unwrap_or(self.seen);
        for event in page["events"].as_array().into_iter().flatten() {
            if let Some(outcome) = self.heard(event)? {
                return Ok(Some(outcome));
            }
        }
        Ok(None)
    }

    /// Cancels the job and, if that is wanted, waits for its end; says what became of it.
    fn cancel(&mut self, asynchronous: bool) -> anyhow::Result<String> {
        self.progress.clear();
        match self.client.call("job_cancel", json!({ "job_id": self.job })) {
            Ok(_) => {}
            Err(ClientError::Rpc(error)) if error.code == code::NOT_FOUND => {
                return Ok(format!("{} had just ended", self.job));
            }
            Err(error) => return Err(error.into()),
        }
        if asynchronous {
            return Ok(format!("{} was told to cancel", self.job));
        }
        let begun = Instant::now();
        while begun.elapsed() < CLEAN_UP {
            let params = json!({ "after": self.seen, "timeout_ms": LOOK_MS, "job_id": self.job });
            let page = self.client.call("job_get_events", params)?.result;
            self.seen = page["sequence"].as_u64().unwrap_or(self.seen);
            let mut events = page["events"].as_array().into_iter().flatten();
            if events.any(|event| event["event"] == "job_completed") {
                return Ok(format!("{} was cancelled; the disk stays on its source", self.job));
            }
        }
        Ok(format!("{} was told to cancel and has not ended yet", self.job))
    }

    fn tell(&mut self, method: &str) -> anyhow::Result<()> {
        let answer = self.client.call(method, json!({ "job_id": self.job }))?;
        self.progress.aside(|| output::warn(answer.warning.as_deref()));
        Ok(())
    }

    /// Takes an event; says how it came out if it is the last.
    fn heard(&mut self, event: &Value) -> anyhow::Result<Option<Outcome>> {
        match event["event"].as_str() {
            Some("job_completed") => self.how_it_ended(event).map(Some),
            Some("job_switch_undone") => {
                self.progress.clear();
                let error = event["error"].as_str().unwrap_or("no reason given");
                bail!(
                    "{}: {error}; it is still in sync, try again with: resilver mirror complete {}",
                    self.job,
                    self.job
                )
            }
            _ => Ok(None),
        }
    }

    /// How the job ended, by its last event or its entry in the history.
    fn how_it_ended(&mut self, words: &Value) -> anyhow::Result<Outcome> {
        match words["error"].as_str() {
            None => {
                Ok(Outcome::Ended(words["goes_on_with"].as_str().unwrap_or_default().to_owned()))
            }
            Some(error) => {
                self.progress.clear();
                bail!("{} failed: {error}; the guest runs on from the source", self.job)
            }
        }
    }

    /// Shows the job's progress; says whether it is in sync. A job that is gone is not: its last event tells.
    fn is_in_sync(&mut self) -> anyhow::Result<bool> {
        let jobs = self.client.call("job_get_list", json!({}))?.result;
        let Some(job) = jobs.as_array().into_iter().flatten().find(|it| it["id"] == *self.job)
        else {
            return Ok(false);
        };
        self.progress.show(&self.job, job);
        let standing = job["io_status"] != "ok" || job["status"] == "paused";
        if let Some(error) = job["error"].as_str().filter(|error| standing && *error != self.told) {
            self.told = error.to_owned();
            self.progress.aside(|| output::warn(Some(error)));
        }
        Ok(job["status"] == "ready")
    }
}

impl Progress {
    fn shown(job: &str) -> anyhow::Result<Self> {
        if !std::io::stderr().is_terminal() {
            return Ok(Self::Lines(String::new()));
        }
        let style = ProgressStyle::with_template(
            "{prefix} [{bar:30}] {percent:>3}% {bytes}/{total_bytes} {msg}",
        )?;
        let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
        let bar = bar.with_style(style.progress_chars("=> ")).with_prefix(job.to_owned());
        Ok(Self::Bar(bar))
    }

    fn show(&mut self, id: &str, job: &Value) {
        let number = |name: &str| job[name].as_u64().unwrap_or(0);
        let (total, left) = (number("total_bytes"), number("dirty_bytes"));
        let done = total.saturating_sub(left);
        match self {
            Self::Hidden => {}
            Self::Bar(bar) => {
                bar.set_length(total);
                bar.set_position(done);
                bar.set_message(message(job));
            }
            Self::Lines(last) => {
                // By the percent: a log is no terminal.
                let percent = done.saturating_mul(100).checked_div(total).unwrap_or(100);
                let status = job["status"].as_str().unwrap_or_default();
                let now = format!("{id}: {percent} %, {status}");
                if *last != now {
                    output::note(&format!("{id}: {percent} %, {}", message(job)));
                    *last = now;
                }
            }
        }
    }

    /// Prints something else meanwhile.
    fn aside(&self, print: impl FnOnce()) {
        match self {
            Self::Bar(bar) => bar.suspend(print),
            Self::Hidden | Self::Lines(_) => print(),
        }
    }

    fn clear(&self) {
        if let Self::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }
}

/// What stands behind the bar.
fn message(job: &Value) -> String {
    let rate = bytes(job["copy_bytes_per_second"].as_u64().unwrap_or(0));
    let status = job["status"].as_str().unwrap_or_default();
    let eta = job["eta_seconds"].as_f64().map(|eta| format!(", {eta:.0} s left"));
    let slower = status == "running" && job["converging"] == false;
    let note = if slower { ", the guest writes faster than is copied" } else { "" };
    format!("{status}, {rate}/s{}{note}", eta.unwrap_or_default())
}
