//! `resilver demo`: the whole story on a scratch disk, checked to the last byte.
//!
//! A target as `resilver serve` runs it, on threads of this process, is driven through its JSON-RPC socket exactly as an
//! operator would: a disk is served, a load runs on it, it is mirrored to another file and switched over under that load.
//! Then the server is stopped and both files are read: the target must hold what was acknowledged in the end, the source
//! what was acknowledged at one single instant of the switch-over ([`crate::cut`]).

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use bytesize::ByteSize;
use resilver_vhost::front_end::{Connection, ConnectionConfig};
use serde_json::{Value, json};

use crate::content::{BLOCK, Content};
use crate::cut::Cut;
use crate::load::{self, Load, LoadReport, Phase};
use crate::output;

mod report;
mod server;

use report::Summary;
use server::Server;

/// How long the load runs before the mirror, in sync and after the switch-over.
const INTERLUDE: Duration = Duration::from_secs(2);
/// How often a job is asked how it is.
const ASK_EVERY: Duration = Duration::from_millis(5);
/// How long a job may take for anything.
const PATIENCE: Duration = Duration::from_secs(600);
/// Blocks that are compared at once.
const COMPARE: u64 = 256;
/// The smallest disk that the load can use.
const SMALLEST: u64 = 1 << 20;
/// Names of the demo's disk and job.
const DISK: &str = "demo";

/// What `resilver demo` is told.
#[derive(Debug, clap::Args)]
pub(crate) struct DemoArgs {
    /// Size of the scratch disk.
    #[arg(long, default_value = "1GiB", conflicts_with = "source")]
    size: ByteSize,
    /// Requests that the guest keeps in flight.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=64))]
    depth: u16,
    /// Where to put the disks: a directory is made in it, and removed again.
    #[arg(long, value_name = "DIR", default_value_os_t = std::env::temp_dir())]
    dir: PathBuf,
    /// Use a copy of this raw image instead of a made-up disk. It is only read.
    #[arg(long, value_name = "IMAGE")]
    source: Option<PathBuf>,
    /// The same seed, the same disk and the same requests.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Leave the disks where they are.
    #[arg(long)]
    keep: bool,
}

/// Runs the demo. An error is a disk that is not as it must be, or a story that could not be told to the end.
pub(crate) fn run(args: &DemoArgs, json: bool) -> anyhow::Result<()> {
    let say = if json { |_: &str| () } else { output::say };
    let scratch = Scratch::new(&args.dir, args.keep)?;
    let content = Arc::new(match &args.source {
        Some(image) => Content::of_image(args.seed, image)
            .with_context(|| format!("cannot read the image {}", image.display()))?,
        None => Content::generate(args.seed, args.size.as_u64() / BLOCK as u64),
    });
    ensure!(
        content.size() >= SMALLEST,
        "a disk of {} is too small for the demo: it takes {} at least",
        ByteSize(content.size()),
        ByteSize(SMALLEST),
    );
    let (source, target) = (scratch.path("source.raw"), scratch.path("target.raw"));
    content.create(&source).with_context(|| format!("cannot make {}", source.display()))?;
    say(&format!("a disk of {} in {}", ByteSize(content.size()), source.display()));

    let mut server = Server::start(&scratch)?;
    server.call("bdev_uring_create", json!({ "name": "source", "filename": source }))?;
    server.call("vhost_create_blk_controller", json!({ "ctrlr": DISK, "dev_name": "source" }))?;
    let config = ConnectionConfig {
        queue_size: 256,
        data_bytes: load::data_bytes(args.depth),
        ..ConnectionConfig::default()
    };
    let (connection, mut queues) = Connection::connect(&server.controller(DISK), config)?;
    let queue = queues.pop().context("the connection has no ring")?;
    say(&format!("served; a guest reads and writes it, {} requests at a time", args.depth));
    let load = Load::start(connection, queue, Arc::clone(&content), args.seed, args.depth)?;

    let story = tell(say, &mut server, &load, &target);
    let report = load.finish();
    // A load that failed explains a story that broke off.
    let report = report.context("the load failed")?;
    let story = story?;
    server.stop()?;

    let checked = check(&content, &report, &source, &target)?;
    let summary = Summary::new(&report, &story, &checked, &source, &target)?;
    if json {
        output::json(&serde_json::to_value(&summary)?);
    } else {
        output::say(&summary.to_string());
    }
    Ok(())
}

/// What was seen while the story was told.
struct Story {
    /// By [`Phase::ALL`].
    lengths: [Duration; Phase::ALL.len()],
    /// The job when it was ready, and when it was over.
    ready: Value,
    concluded: Value,
}

/// From the first request on the source to the last on the target.
fn tell(say: fn(&str), server: &mut Server, load: &Load, target: &Path) -> anyhow::Result<Story> {
    let mut lengths = [Duration::ZERO; Phase::ALL.len()];
    let mut begun = Instant::now();
    let mut enter = |phase: Phase, lengths: &mut [Duration]| {
        load.enter(phase);
        let now = Instant::now();
        lengths[phase as usize - 1] = now - begun;
        begun = now;
    };
    interlude(load)?;

    enter(Phase::Copying, &mut lengths);
    server.call(
        "bdev_mirror_start",
        json!({
            "source": "source", "target_path": target, "target_mode": "create", "target_format": "raw",
            "job_id": DISK, "sync": "full", "copy_mode": "write-blocking", "auto_dismiss": false,
        }),
    )?;
    let bar = report::Bar::new();
    let ready = wait_for(server, load, "ready", |job| bar.show(job))?;
    bar.finish();
    enter(Phase::InSync, &mut lengths);
    say(&format!("in sync after {:.1?}", lengths[Phase::Copying as usize]));
    interlude(load)?;

    enter(Phase::Switching, &mut lengths);
    server.call("job_complete", json!({ "job_id": DISK }))?;
    let concluded = wait_for(server, load, "concluded", |_| ())?;
    enter(Phase::After, &mut lengths);
    if let Some(error) = concluded.get("error") {
        bail!("the mirror failed: {error}");
    }
    server.call("job_dismiss", json!({ "job_id": DISK }))?;
    say(&format!("switched over in {:.1?}", lengths[Phase::Switching as usize]));
    interlude(load)?;
    lengths[Phase::After as usize] = begun.elapsed();
    Ok(Story { lengths, ready, concluded })
}

/// Lets the load run for a while.
fn interlude(load: &Load) -> anyhow::Result<()> {
    let begun = Instant::now();
    while begun.elapsed() < INTERLUDE {
        ensure!(!load.has_ended(), "the load broke off");
        std::thread::sleep(ASK_EVERY);
    }
    ensure!(load.done() > 0, "the load does nothing");
    Ok(())
}

/// Asks for the job until it has the status.
fn wait_for(
    server: &mut Server,
    load: &Load,
    status: &str,
    mut each: impl FnMut(&Value),
) -> anyhow::Result<Value> {
    let begun = Instant::now();
    loop {
        let jobs = server.call("job_get_list", json!({ "job_id": DISK }))?;
        let job = jobs.get(0).cloned().context("the job is gone")?;
        each(&job);
        let now = job["status"].as_str().unwrap_or_default();
        if now == status {
            return Ok(job);
        }
        ensure!(now != "concluded", "the mirror failed: {}", job["error"]);
        ensure!(!load.has_ended(), "the load broke off while the mirror was {now}");
        ensure!(begun.elapsed() < PATIENCE, "the mirror is {now} for too long: {job}");
        std::thread::sleep(ASK_EVERY);
    }
}

/// A directory for the disks and sockets, gone with the demo unless it is to be kept.
struct Scratch {
    directory: PathBuf,
    keep: bool,
}

impl Scratch {
    fn new(parent: &Path, keep: bool) -> anyhow::Result<Self> {
        let directory = parent.join(format!("resilver-demo-{}", std::process::id()));
        std::fs::create_dir(&directory)
            .with_context(|| format!("cannot make the directory {}", directory.display()))?;
        Ok(Self { directory, keep })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if !self.keep
            && let Err(error) = std::fs::remove_dir_all(&self.directory)
        {
            tracing::warn!("cannot remove {}: {error}", self.directory.display());
        }
    }
}

/// What the comparison found.
#[derive(Debug)]
struct Checked {
    blocks: u64,
    /// Blocks written at all, and after the switch-over began.
    written: u64,
    written_since: u64,
    /// Event numbers that remain possible for the instant of the switch-over.
    cut_width: u64,
}

/// Compares both files with what they must hold.
fn check(
    content: &Content,
    report: &LoadReport,
    source: &Path,
    target: &Path,
) -> anyhow::Result<Checked> {
    let mut cut = Cut::new(&report.log, report.switch.0, report.switch.1);
    let mut checked =
        Checked { blocks: content.blocks(), written: 0, written_since: 0, cut_width: 0 };
    let mut expected = vec![0; BLOCK];
    each_block(target, content.blocks(), |block, found| {
        let generation = report.generations[resilver_sys::usize_from(block)];
        content.fill(block, generation, &mut expected)?;
        checked.written += u64::from(generation > 0);
        ensure!(
            found == expected,
            "the target is wrong: block {block} must be generation {generation}, what is there claims to be {}",
            content.generation_of(block, found)
        );
        Ok(())
    })?;
    each_block(source, content.blocks(), |block, found| {
        let number = resilver_sys::usize_from(block);
        let generation = content.generation_of(block, found);
        content.fill(block, generation, &mut expected)?;
        ensure!(
            found == expected,
            "the source is wrong: block {block} has no content of any generation; at the switch-over it had generation {}",
            report.at_switch[number]
        );
        checked.written_since += u64::from(report.generations[number] > generation);
        cut.observe(block, generation, report.at_switch[number]).context("the source is wrong")
    })?;
    checked.cut_width = cut.width();
    Ok(checked)
}

/// Reads a disk from end to end.
fn each_block(
    path: &Path,
    blocks: u64,
    mut check: impl FnMut(u64, &[u8]) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let size = file.metadata()?.len();
    ensure!(
        size == blocks * BLOCK as u64,
        "{} has {size} bytes instead of {}",
        path.display(),
        blocks * BLOCK as u64
    );
    let mut bytes = vec![0; resilver_sys::usize_from(COMPARE) * BLOCK];
    for first in (0..blocks).step_by(resilver_sys::usize_from(COMPARE)) {
        let count = COMPARE.min(blocks - first);
        let part = &mut bytes[..resilver_sys::usize_from(count) * BLOCK];
        file.read_exact_at(part, first * BLOCK as u64)?;
        for (block, found) in (first..).zip(part.chunks_exact(BLOCK)) {
            check(block, found)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cut::LoggedWrite;

    const BLOCKS: u64 = 600;

    /// Two disks on which the guest wrote block 3 before the switch-over and block 5 after it.
    struct Told {
        directory: tempfile::TempDir,
        content: Content,
        report: LoadReport,
    }

    impl Told {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let content = Content::generate(1, BLOCKS);
            let mut generations = vec![0; resilver_sys::usize_from(BLOCKS)];
            let at_switch = generations.clone();
            (generations[3], generations[5]) = (1, 1);
            let write = |block, submitted, completed| LoggedWrite {
                block,
                generation: 1,
                submitted,
                completed,
            };
            let log = vec![write(3, 11, 12), write(5, 13, 14)];
            let report =
                LoadReport { phases: Vec::new(), generations, at_switch, log, switch: (10, 15) };
            let told = Self { directory, content, report };
            for (name, written) in [("source", vec![3]), ("target", vec![3, 5])] {
                told.content.create(&told.path(name)).unwrap();
                for block in written {
                    told.put(name, block, 1);
                }
            }
            told
        }

        fn path(&self, name: &str) -> PathBuf {
            self.directory.path().join(name)
        }

        fn put(&self, name: &str, block: u64, generation: u32) {
            let mut bytes = vec![0; BLOCK];
            self.content.fill(block, generation, &mut bytes).unwrap();
            self.write(name, block * BLOCK as u64, &bytes);
        }

        fn write(&self, name: &str, offset: u64, bytes: &[u8]) {
            let disk = File::options().write(true).open(self.path(name)).unwrap();
            disk.write_all_at(bytes, offset).unwrap();
        }

        fn verdict(&self) -> Result<Checked, String> {
            let (source, target) = (self.path("source"), self.path("target"));
            check(&self.content, &self.report, &source, &target)
                .map_err(|error| format!("{error:#}"))
        }
    }

    #[test]
    fn two_disks_as_they_must_be_are_accepted() {
        let checked = Told::new().verdict().unwrap();
        assert_eq!((checked.blocks, checked.written, checked.written_since), (BLOCKS, 2, 1));
        // After the submission of 3 and before the completion of 5.
        assert_eq!(checked.cut_width, 3);
    }

    #[test]
    fn one_wrong_byte_on_either_disk_is_found() {
        for name in ["source", "target"] {
            for offset in [0, 3 * BLOCK as u64 + 77, BLOCKS * BLOCK as u64 - 1] {
                let told = Told::new();
                let mut byte = [0];
                File::open(told.path(name)).unwrap().read_exact_at(&mut byte, offset).unwrap();
                told.write(name, offset, &[byte[0] ^ 1]);
                let verdict = told.verdict().err();
                let found = verdict.as_ref().is_some_and(|text| text.contains(name));
                assert!(found, "byte {offset} of the {name}: {verdict:?}");
            }
        }
    }

    #[test]
    fn a_lost_write_and_a_source_of_no_instant_are_found() {
        let lost = Told::new();
        lost.put("target", 5, 0);
        assert!(lost.verdict().is_err_and(|text| text.contains("the target is wrong: block 5")));

        let torn = Told::new();
        torn.put("source", 3, 0);
        torn.put("source", 5, 1);
        assert!(torn.verdict().is_err_and(|text| text.contains("different moments")));

        let short = Told::new();
        File::options().write(true).open(short.path("target")).unwrap().set_len(4096).unwrap();
        assert!(short.verdict().is_err_and(|text| text.contains("instead of")));
    }
}
