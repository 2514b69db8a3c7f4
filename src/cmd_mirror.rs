//! `resilver mirror`: mirrors as an operator runs them, in the manner of `virsh blockcopy`.
//!
//! A command that waits follows the job's events, so that it sees the end of a job that is dismissed at once. It only
//! watches: interrupted, it leaves the job running.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use bytesize::ByteSize;
use clap::{Args, Subcommand, ValueEnum};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use resilver_rpc::Client;
use serde_json::{Map, Value, json};

use crate::output::{self, bytes};
use crate::{Session, TimedOut, cmd_method};

const EXAMPLES: &str = "\
Examples:
  resilver mirror start vm1 /mnt/new/vm1.raw --create --wait --verbose --pivot
  resilver mirror start vm1 /mnt/new/vm1.raw --create --bandwidth 200MiB
  resilver mirror status
  resilver mirror complete vm1";

/// How long one look at the events lasts.
const LOOK_MS: u64 = 250;
/// How long an answer may take beyond that.
const ANSWER_DEADLINE: Duration = Duration::from_secs(30);

/// Arguments of `mirror`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct MirrorArgs {
    #[command(subcommand)]
    verb: MirrorVerb,
}

#[derive(Debug, Subcommand)]
enum MirrorVerb {
    /// Start to mirror a disk.
    #[command(after_help = EXAMPLES)]
    Start(Box<StartArgs>),
    /// Show mirrors and their progress.
    Status {
        /// One job; all if not given.
        job: Option<String>,
    },
    /// Wait for a mirror that runs already.
    Wait {
        /// The job.
        job: String,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Rest: no new copies are begun. Guest writes go on as the copy mode says.
    Pause {
        /// The job.
        job: String,
    },
    /// Go on after a pause, or after an error that stopped the mirror.
    Resume {
        /// The job.
        job: String,
    },
    /// Switch over to the target.
    Complete {
        /// The job.
        job: String,
    },
    /// Leave the target as a point-in-time copy and stay on the source.
    Finish {
        /// The job.
        job: String,
    },
    /// Give up at once; what the target holds is not promised.
    Cancel {
        /// The job.
        job: String,
    },
    /// Change the rate limit.
    SetSpeed {
        /// The job.
        job: String,
        /// Bytes a second, such as 200MiB; 0 for no limit.
        rate: ByteSize,
    },
}

/// How guest writes reach the target meanwhile.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum CopyModeArg {
    /// Guest writes go to the source and are copied later.
    Background,
    /// Guest writes go to both at once.
    WriteBlocking,
}

/// What is done about an error.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum OnErrorArg {
    /// The mirror fails; the guest runs on from the source.
    Report,
    /// Try again, ever more slowly.
    Ignore,
    /// Pause until resumed.
    Stop,
    /// Pause if room ran out, else fail.
    Enospc,
}

#[derive(Debug, Args)]
struct StartArgs {
    /// The disk: a bdev, or a controller whose disk is meant.
    source: String,
    /// Where to: a path of a file, or the name of a bdev.
    target: String,
    /// Make the file, with the source's size.
    #[arg(long)]
    create: bool,
    /// Name of the job; the source's name if not given.
    #[arg(long, value_name = "ID")]
    job_id: Option<String>,
    /// How guest writes reach the target meanwhile.
    #[arg(long, value_enum, default_value = "write-blocking")]
    copy_mode: CopyModeArg,
    /// Bytes a second that are copied at most, such as 200MiB; guest writes are not limited.
    #[arg(long, value_name = "RATE")]
    bandwidth: Option<ByteSize>,
    /// Bytes of a chunk, a power of two from 512 to 64MiB.
    #[arg(long, value_name = "SIZE")]
    granularity: Option<ByteSize>,
    /// What is done about errors of the source.
    #[arg(long, value_enum)]
    on_source_error: Option<OnErrorArg>,
    /// What is done about errors of the target.
    #[arg(long, value_enum)]
    on_target_error: Option<OnErrorArg>,
    /// Target I/O that takes longer counts as failed, such as 30s.
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    target_timeout: Option<Duration>,
    /// Keep the job when it has ended, until `resilver job dismiss`.
    #[arg(long)]
    keep_job: bool,
    #[command(flatten)]
    wait: WaitArgs,
}

#[derive(Debug, Clone, Args)]
struct WaitArgs {
    /// Wait until the mirror is in sync, or has ended if --pivot or --finish is given.
    #[arg(long)]
    wait: bool,
    /// Show progress; waits.
    #[arg(long)]
    verbose: bool,
    /// Switch over once in sync; waits.
    #[arg(long, conflicts_with = "finish")]
    pivot: bool,
    /// Leave a point-in-time copy once in sync; waits.
    #[arg(long)]
    finish: bool,
    /// Cancel the mirror if that takes longer, such as 10m; waits.
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    timeout: Option<Duration>,
}

impl WaitArgs {
    fn waits(&self) -> bool {
        self.wait || self.verbose || self.pivot || self.finish || self.timeout.is_some()
    }

    /// What is done once the mirror is in sync.
    fn then(&self) -> Then {
        match (self.pivot, self.finish) {
            (true, _) => Then::Pivot,
            (false, true) => Then::Finish,
            (false, false) => Then::Leave,
        }
    }
}

/// What is done with a mirror that is in sync.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    Leave,
    Pivot,
    Finish,
}

pub(crate) fn run(session: &Session, args: &MirrorArgs) -> anyhow::Result<()> {
    let mut client = session.connect()?;
    client.set_timeout(Some(ANSWER_DEADLINE))?;
    let mut tell = |method: &str, job: &str| -> anyhow::Result<()> {
        let answer = client.call(method, json!({ "job_id": job }))?;
        output::warn(answer.warning.as_deref());
        Ok(())
    };
    match &args.verb {
        MirrorVerb::Start(args) => start(session, client, args),
        MirrorVerb::Wait { job, wait } => Watch::new(client, job, 0)?.run(session, wait),
        MirrorVerb::Status { job } => status(session, client, job.as_deref()),
        MirrorVerb::Pause { job } => tell("job_pause", job),
        MirrorVerb::Resume { job } => tell("job_resume", job),
        MirrorVerb::Complete { job } => tell("job_complete", job),
        MirrorVerb::Finish { job } => tell("bdev_mirror_finish", job),
        MirrorVerb::Cancel { job } => tell("job_cancel", job),
        MirrorVerb::SetSpeed { job, rate } => {
            client.call("job_set_speed", json!({ "job_id": job, "speed": rate.0 }))?;
            Ok(())
        }
    }
}

fn status(session: &Session, mut client: Client, job: Option<&str>) -> anyhow::Result<()> {
    let params = job.map_or_else(|| json!({}), |job| json!({ "job_id": job }));
    let jobs = client.call("job_get_list", params)?.result;
    if session.json {
        output::json(&jobs);
    } else {
        output::table(cmd_method::JOB_COLUMNS, jobs.as_array().map_or(&[], Vec::as_slice));
    }
    Ok(())
}

/// The bdev that an operator means: by its own name, or by that of a controller over it.
fn resolve(client: &mut Client, name: &str) -> anyhow::Result<String> {
    let bdevs = client.call("bdev_get_bdevs", json!({}))?.result;
    if bdevs.as_array().is_some_and(|bdevs| bdevs.iter().any(|bdev| bdev["name"] == name)) {
        return Ok(name.to_owned());
    }
    let controllers = client.call("vhost_get_controllers", json!({}))?.result;
    let found = controllers.as_array().into_iter().flatten().find(|it| it["ctrlr"] == name);
    let bdev = found.and_then(|it| it["backend_specific"]["block"]["bdev"].as_str());
    bdev.map(str::to_owned).with_context(|| {
        format!("there is no bdev or controller '{name}'; see `resilver bdev list` and `resilver vhost list`")
    })
}

impl StartArgs {
    fn params(&self, source: &str) -> anyhow::Result<Map<String, Value>> {
        let word = |value: &dyn Fn() -> Option<clap::builder::PossibleValue>| {
            value().map_or(Value::Null, |it| it.get_name().into())
        };
        let on_error =
            |policy: Option<OnErrorArg>| policy.map(|policy| word(&|| policy.to_possible_value()));
        let mut params = Map::new();
        let mut set = |name: &str, value: Option<Value>| {
            if let Some(value) = value {
                params.insert(name.to_owned(), value);
            }
        };
        set("source", Some(source.into()));
        if self.create || self.target.contains('/') {
            let path = std::path::absolute(PathBuf::from(&self.target))?;
            set("target_path", Some(path.to_string_lossy().into()));
            set("target_mode", Some(if self.create { "create" } else { "existing" }.into()));
        } else {
            set("target", Some(self.target.clone().into()));
        }
        set("job_id", self.job_id.clone().map(Value::from));
        set("copy_mode", Some(word(&|| self.copy_mode.to_possible_value())));
        set("speed", self.bandwidth.map(|rate| rate.0.into()));
        set("granularity", self.granularity.map(|size| size.0.into()));
        set("on_source_error", on_error(self.on_source_error));
        set("on_target_error", on_error(self.on_target_error));
        let timeout =
            self.target_timeout.map(|it| u64::try_from(it.as_millis()).unwrap_or(u64::MAX));
        set("target_timeout_ms", timeout.map(Value::from));
        set("auto_dismiss", Some((!self.keep_job).into()));
        Ok(params)
    }
}

fn start(session: &Session, mut client: Client, args: &StartArgs) -> anyhow::Result<()> {
    let source = resolve(&mut client, &args.source)?;
    // Events from here on are the new job's; older ones may be of another job of the same name.
    let before = client.call("job_get_events", json!({ "after": u64::MAX }))?.result;
    let answer = client.call("bdev_mirror_start", args.params(&source)?.into())?.result;
    let job = answer["job_id"].as_str().context("the target's answer names no job")?.to_owned();
    if args.wait.waits() {
        return Watch::new(client, &job, before["sequence"].as_u64().unwrap_or(0))?
            .run(session, &args.wait);
    }
    if session.json {
        output::json(&answer);
    } else {
        output::say(&job);
    }
    Ok(())
}

/// Follows one job.
struct Watch {
    client: Client,
    job: String,
    /// The last event that was seen.
    seen: u64,
    bar: ProgressBar,
    /// The last error that was told.
    told: String,
}

/// How a job that was followed came out.
enum Outcome {
    /// In sync, and left so.
    InSync,
    /// Over; the disk goes on with this leg.
    Ended(String),
}

impl Watch {
    /// Follows a job from an event on; from now on if it is 0.
    fn new(mut client: Client, job: &str, after: u64) -> anyhow::Result<Self> {
        let mut seen = after;
        if after == 0 {
            // It must be there to be waited for.
            client.call("job_get_list", json!({ "job_id": job }))?;
            let page = client.call("job_get_events", json!({ "after": u64::MAX }))?.result;
            seen = page["sequence"].as_u64().unwrap_or(0);
        }
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden());
        Ok(Self { client, job: job.to_owned(), seen, bar, told: String::new() })
    }

    fn run(mut self, session: &Session, args: &WaitArgs) -> anyhow::Result<()> {
        if args.verbose {
            let style = ProgressStyle::with_template(
                "{prefix} [{bar:30}] {percent:>3}% {bytes}/{total_bytes} {msg}",
            )?;
            self.bar = ProgressBar::new(0)
                .with_style(style.progress_chars("=> "))
                .with_prefix(self.job.clone());
        }
        let outcome = self.follow(args)?;
        self.bar.finish_and_clear();
        let line = match &outcome {
            Outcome::InSync => format!("{} is in sync", self.job),
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

    fn follow(&mut self, args: &WaitArgs) -> anyhow::Result<Outcome> {
        let begun = Instant::now();
        let mut then = args.then();
        loop {
            let params = json!({ "after": self.seen, "timeout_ms": LOOK_MS, "job_id": self.job });
            let page = self.client.call("job_get_events", params)?.result;
            self.seen = page["sequence"].as_u64().unwrap_or(self.seen);
            for event in page["events"].as_array().into_iter().flatten() {
                if let Some(outcome) = self.heard(event)? {
                    return Ok(outcome);
                }
            }
            if self.is_in_sync()? {
                match std::mem::replace(&mut then, Then::Leave) {
                    Then::Pivot => self.tell("job_complete")?,
                    Then::Finish => self.tell("bdev_mirror_finish")?,
                    Then::Leave if args.then() == Then::Leave => return Ok(Outcome::InSync),
                    // It was told already and is about to go.
                    Then::Leave => {}
                }
            }
            if args.timeout.is_some_and(|timeout| begun.elapsed() > timeout) {
                self.bar.abandon();
                // If it ended just now there is nothing to cancel.
                let _ = self.client.call("job_cancel", json!({ "job_id": self.job }));
                return Err(TimedOut(format!(
                    "{} was not done in time and was cancelled",
                    self.job
                ))
                .into());
            }
        }
    }

    fn tell(&mut self, method: &str) -> anyhow::Result<()> {
        let answer = self.client.call(method, json!({ "job_id": self.job }))?;
        self.bar.suspend(|| output::warn(answer.warning.as_deref()));
        Ok(())
    }

    /// Takes an event; says how it came out if it is the last.
    fn heard(&mut self, event: &Value) -> anyhow::Result<Option<Outcome>> {
        let error = event["error"].as_str();
        match (event["event"].as_str(), error) {
            (Some("job_completed"), None) => {
                let leg = event["goes_on_with"].as_str().unwrap_or_default().to_owned();
                Ok(Some(Outcome::Ended(leg)))
            }
            (Some("job_completed"), Some(error)) => {
                self.bar.abandon();
                bail!("{} failed: {error}; the guest runs on from the source", self.job)
            }
            (Some("job_switch_undone"), error) => {
                self.bar.abandon();
                let error = error.unwrap_or("no reason given");
                bail!(
                    "{}: {error}; it is still in sync, try again with: resilver mirror complete {}",
                    self.job,
                    self.job
                )
            }
            _ => Ok(None),
        }
    }

    /// Shows the job's progress; says whether it is in sync. A job that is gone is not: its last event tells.
    fn is_in_sync(&mut self) -> anyhow::Result<bool> {
        let jobs = self.client.call("job_get_list", json!({}))?.result;
        let Some(job) = jobs.as_array().into_iter().flatten().find(|it| it["id"] == *self.job)
        else {
            return Ok(false);
        };
        let number = |name: &str| job[name].as_u64().unwrap_or(0);
        self.bar.set_length(number("total_bytes"));
        self.bar.set_position(number("total_bytes").saturating_sub(number("dirty_bytes")));
        self.bar.set_message(message(job));
        let standing = job["io_status"] != "ok" || job["status"] == "paused";
        if let Some(error) = job["error"].as_str().filter(|error| standing && *error != self.told) {
            self.told = error.to_owned();
            self.bar.suspend(|| output::warn(Some(error)));
        }
        Ok(job["status"] == "ready")
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
