//! `resilver mirror`: mirrors as an operator runs them, in the manner of `virsh blockcopy`.
//!
//! A command that waits is in [`crate::watch`].

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use bytesize::ByteSize;
use clap::{Args, Subcommand, ValueEnum};
use resilver_rpc::Client;
use serde_json::{Map, Value, json};

use crate::output;
use crate::watch::{Then, WaitFor, Watch};
use crate::{Session, cmd_method};

const EXAMPLES: &str = "\
Examples:
  resilver mirror start vm1 /mnt/new/vm1.raw --create --wait --verbose --pivot
  resilver mirror start vm1 /mnt/new/vm1.raw --create --bandwidth 200MiB
  resilver mirror start vm1 /mnt/new/vm1.raw --create --latency-ceiling 2ms --verify --verbose --pivot
  resilver mirror status
  resilver mirror verify vm1 --sample 10
  resilver mirror complete vm1";

/// How long an answer may take.
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
    /// Wait for a mirror that runs already; of one that has ended, say how.
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
    /// Compare source and target beside the guest, as a job of its own; what differs is copied again.
    Verify {
        /// The mirror's job.
        job: String,
        /// How many of a hundred chunks are compared.
        #[arg(long, value_name = "PERCENT", default_value_t = 100, value_parser = clap::value_parser!(u8).range(1..=100))]
        sample: u8,
        /// Bytes of the disk that are compared in a second at most, such as 200MiB.
        #[arg(long, value_name = "RATE")]
        bandwidth: Option<ByteSize>,
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
    /// Hold the copier back so that 99 of 100 guest requests take no longer than this, such as 2ms.
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    latency_ceiling: Option<Duration>,
    /// Go over from background to write-blocking where background copying does not get ahead of the guest.
    #[arg(long)]
    auto_converge: bool,
    /// Within a file system: share extents between the files while no guest is at work, instead of copying.
    #[arg(long)]
    copy_offload: bool,
    /// Compare source and target whole before a switch-over.
    #[arg(long)]
    verify: bool,
    /// Keep the job when it has ended, until `resilver job dismiss`.
    #[arg(long)]
    keep_job: bool,
    #[command(flatten)]
    wait: WaitArgs,
}

#[derive(Debug, Clone, Args)]
struct WaitArgs {
    /// Wait until the mirror is in sync, or has ended if --pivot or --finish is given. With `start`, Ctrl-C cancels it.
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
    /// Do not wait for the end of a mirror that was told to end: by --pivot or --finish, an interrupt or the time-out.
    #[arg(long = "async")]
    asynchronous: bool,
}

impl WaitArgs {
    fn waits(&self) -> bool {
        self.wait || self.verbose || self.pivot || self.finish || self.timeout.is_some()
    }

    /// What is waited for, and what is done then.
    fn what(&self) -> WaitFor {
        WaitFor {
            verbose: self.verbose,
            then: match (self.pivot, self.finish) {
                (true, _) => Then::Pivot,
                (false, true) => Then::Finish,
                (false, false) => Then::Leave,
            },
            timeout: self.timeout,
            asynchronous: self.asynchronous,
        }
    }
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
        MirrorVerb::Wait { job, wait } => Watch::of_any(client, job)?.run(session, &wait.what()),
        MirrorVerb::Status { job } => status(session, client, job.as_deref()),
        MirrorVerb::Pause { job } => tell("job_pause", job),
        MirrorVerb::Resume { job } => tell("job_resume", job),
        MirrorVerb::Complete { job } => tell("job_complete", job),
        MirrorVerb::Finish { job } => tell("bdev_mirror_finish", job),
        MirrorVerb::Cancel { job } => tell("job_cancel", job),
        MirrorVerb::Verify { job, sample, bandwidth } => {
            verify(session, client, job, *sample, *bandwidth)
        }
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

/// Starts a comparison of a mirror's legs.
fn verify(
    session: &Session,
    mut client: Client,
    job: &str,
    sample: u8,
    bandwidth: Option<ByteSize>,
) -> anyhow::Result<()> {
    let jobs = client.call("job_get_list", json!({ "job_id": job }))?.result;
    let mirror = jobs.get(0).with_context(|| format!("there is no job '{job}'"))?;
    let params = json!({
        "source": mirror["source"], "target": mirror["target"],
        "sample_percent": sample, "speed": bandwidth.map_or(0, |rate| rate.0),
    });
    let answer = client.call("bdev_verify_start", params)?.result;
    if session.json {
        output::json(&answer);
    } else {
        output::say(answer["job_id"].as_str().unwrap_or_default());
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
        let ceiling =
            self.latency_ceiling.map(|it| u64::try_from(it.as_micros()).unwrap_or(u64::MAX));
        set("latency_ceiling_us", ceiling.map(Value::from));
        set("auto_converge", self.auto_converge.then_some(true.into()));
        set("copy_offload", self.copy_offload.then_some(true.into()));
        set("verify_before_complete", self.verify.then_some(true.into()));
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
        let seen = before["sequence"].as_u64().unwrap_or(0);
        return Watch::of_new(client, &job, seen).run(session, &args.wait.what());
    }
    if session.json {
        output::json(&answer);
    } else {
        output::say(&job);
    }
    Ok(())
}
