//! `resilver bench`: how fast and how even a vhost-user-blk back end answers: ours, SPDK's, QEMU's, any; and what the same load
//! on a file makes without one.
//!
//! A *cell* is one combination of pattern, block size, depth and queues. Each cell is run on every disk in turn, again
//! and again, in changing order, so that what a machine does meanwhile falls on all of them alike; what is compared is the
//! pairs of one round. A run that others disturbed is not thrown away: how much of the time of client and server was taken
//! is shown beside it.

use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use bytesize::ByteSize;
use clap::{Args, ValueEnum};
use resilver_vhost::front_end::ConnectionConfig;

use crate::interrupt::{self, Interrupt};
use crate::{Interrupted, Session, output};

mod client;
mod disk;
mod file;
mod life;
mod machine;
mod plot;
mod report;
mod socket;

use client::{Client, Run};
use file::BareFile;
use machine::{Paused, Server};
use report::{Cell, Report, Target};
use socket::Socket;

const EXAMPLES: &str = "\
Examples:
  resilver bench --socket /run/resilver/vm1 --rw randread --iodepth 1,32
  resilver bench --socket ours=/run/resilver/a --socket qemu=/tmp/qsd.sock --rw randread,randwrite --overwrite \\
      --iodepth 1,32,128 --repeat 10 --markdown out.md --plot out.svg
  resilver bench --socket /run/resilver/vm1 --job randread:4k:1 --job randrw:128k:32:4 --overwrite
  resilver bench --socket /run/resilver/vm1 --rw randwrite --overwrite --iodepth 32 --mirror vm1 --mirror-target /mnt/b/vm1.raw \
      --plot life.svg
  resilver bench --socket /run/resilver/vm1 --file /srv/scratch.raw --iodepth 1,32,128 --repeat 10 --core 3 --file-core 2 --pause-others

With --mirror the disk's whole move is one timeline: before, copying, in sync, switching over, after.
With --file the same load runs on a file or block device by io_uring, without a server: what the sockets are compared with.
Back ends serve one front end at a time: a disk must not be in use by a machine while it is measured.";

/// The most requests in flight.
const DEPTH_MAX: u16 = 4096;
/// The most queues.
const QUEUES_MAX: u16 = 64;
/// The largest request.
const BLOCK_MAX: u64 = 1 << 20;

/// What requests do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Pattern {
    /// Sequential reads.
    Read,
    /// Sequential writes.
    Write,
    /// Reads at random places.
    Randread,
    /// Writes at random places.
    Randwrite,
    /// Reads and writes at random places; see --rwmixread.
    Randrw,
}

impl Pattern {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Randread => "randread",
            Self::Randwrite => "randwrite",
            Self::Randrw => "randrw",
        }
    }

    /// Whether places are drawn.
    pub(crate) fn is_random(self) -> bool {
        matches!(self, Self::Randread | Self::Randwrite | Self::Randrw)
    }

    /// Of a hundred requests, so many read.
    pub(crate) fn read_percent(self, mix: u8) -> u64 {
        match self {
            Self::Read | Self::Randread => 100,
            Self::Write | Self::Randwrite => 0,
            Self::Randrw => u64::from(mix),
        }
    }
}

/// What `resilver bench` is told.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct BenchArgs {
    /// A back end's socket, with a name for the report if wanted; several are compared with the first.
    #[arg(long = "socket", value_name = "[NAME=]PATH", required_unless_present = "files", value_parser = named_path)]
    sockets: Vec<(String, PathBuf)>,
    /// A file or block device to put the same load on without a server; sockets are compared with the first of these.
    #[arg(long = "file", value_name = "[NAME=]PATH", value_parser = named_path)]
    files: Vec<(String, PathBuf)>,
    /// Measure files though others have them locked, as a server has those that it serves.
    #[arg(long, requires = "files")]
    force_share: bool,
    /// What requests do.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "randread")]
    rw: Vec<Pattern>,
    /// Reads among a hundred requests of randrw.
    #[arg(long, default_value_t = 70, value_parser = clap::value_parser!(u8).range(0..=100))]
    rwmixread: u8,
    /// Bytes of a request; k and m are powers of 1024, as fio has them.
    #[arg(long, value_delimiter = ',', default_value = "4k", value_parser = block_size)]
    bs: Vec<ByteSize>,
    /// Requests in flight, over all queues together.
    #[arg(long, value_delimiter = ',', default_value = "1,32", value_parser = clap::value_parser!(u16).range(1..=i64::from(DEPTH_MAX)))]
    iodepth: Vec<u16>,
    /// Queues.
    #[arg(long, value_delimiter = ',', default_value = "1", value_parser = clap::value_parser!(u16).range(1..=i64::from(QUEUES_MAX)))]
    queues: Vec<u16>,
    /// One cell instead of all combinations: pattern, block size, depth, and queues if not 1; may be repeated.
    #[arg(long = "job", value_name = "RW:BS:DEPTH[:QUEUES]", value_parser = job_words,
        conflicts_with_all = ["rw", "bs", "iodepth", "queues"])]
    cells: Vec<JobWords>,
    /// How long one run is measured, and until a request has ended.
    #[arg(long, default_value = "3s", value_parser = humantime::parse_duration)]
    time: Duration,
    /// How long a run goes on before it is measured.
    #[arg(long, default_value = "500ms", value_parser = humantime::parse_duration)]
    warmup: Duration,
    /// Runs of each cell on each disk; from 6 on, ratios have an interval.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    repeat: u32,
    /// Sleep for interrupts instead of polling, as an ordinary guest does.
    #[arg(long)]
    interrupts: bool,
    /// Pin the client to this core; give it one that no reactor uses.
    #[arg(long, value_name = "N")]
    core: Option<usize>,
    /// Pin the client to this core while it measures files: the servers' own, to have the same work done in the same place.
    #[arg(long, value_name = "N", requires_all = ["files", "core"])]
    file_core: Option<usize>,
    /// Stop the servers of the other sockets while one is measured (SIGSTOP): for servers that poll when nobody asks anything.
    #[arg(long)]
    pause_others: bool,
    /// The disk's content may be destroyed: needed for whatever writes.
    #[arg(long)]
    overwrite: bool,
    /// Mirror this bdev to --mirror-target and switch over meanwhile: one timeline of the first cell.
    #[arg(long, value_name = "BDEV", requires = "mirror_target", conflicts_with_all = ["repeat", "interrupts", "files"])]
    mirror: Option<String>,
    /// The file to mirror to, which is made, or a block device.
    #[arg(long, value_name = "FILE", requires = "mirror")]
    mirror_target: Option<PathBuf>,
    /// The guest's 99th percentile that the mirror is to keep under, by copying less.
    #[arg(long, value_name = "TIME", requires = "mirror", value_parser = humantime::parse_duration)]
    latency_ceiling: Option<Duration>,
    /// How guest writes reach the target meanwhile.
    #[arg(long, value_name = "MODE", default_value = "write-blocking", value_parser = ["background", "write-blocking"])]
    copy_mode: String,
    /// Write the report as JSON into a file.
    #[arg(long, value_name = "FILE")]
    json_file: Option<PathBuf>,
    /// Write the report as a Markdown table into a file.
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// Draw the latency distributions into an SVG file.
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
}

/// One cell: what is asked of every back end alike.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Job {
    pub(crate) pattern: Pattern,
    pub(crate) read_percent: u64,
    /// Bytes of a request.
    pub(crate) block: u32,
    pub(crate) depth: u16,
    pub(crate) queues: u16,
    pub(crate) interrupts: bool,
    pub(crate) warmup: Duration,
    pub(crate) time: Duration,
}

impl Job {
    /// Requests in flight in the fullest queue.
    fn per_queue(&self) -> u16 {
        self.depth.div_ceil(self.queues)
    }
}

/// Where a disk is.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    /// Behind the socket of a server.
    Socket(PathBuf),
    /// A file or block device, without one.
    File(PathBuf),
}

impl BenchArgs {
    /// What is measured, by name. Files come first: they are what a server is compared with.
    fn disks(&self) -> Vec<(String, Place)> {
        let files = self.files.iter().map(|(name, path)| (name.clone(), Place::File(path.clone())));
        let sockets =
            self.sockets.iter().map(|(name, path)| (name.clone(), Place::Socket(path.clone())));
        files.chain(sockets).collect()
    }

    /// Writes the files that were asked for.
    fn write(&self, json: &str, markdown: &str, svg: &str) -> anyhow::Result<()> {
        let files = [(&self.json_file, json), (&self.markdown, markdown), (&self.plot, svg)];
        for (path, text) in files {
            if let Some(path) = path {
                std::fs::write(path, text)
                    .with_context(|| format!("cannot write {}", path.display()))?;
            }
        }
        Ok(())
    }

    /// The cells that are named, or every combination.
    fn jobs(&self) -> anyhow::Result<Vec<Job>> {
        if !self.cells.is_empty() {
            return self.cells.iter().map(|words| self.job(*words)).collect();
        }
        let mut jobs = Vec::new();
        for pattern in &self.rw {
            for block in &self.bs {
                for depth in &self.iodepth {
                    for queues in &self.queues {
                        jobs.push(self.job((*pattern, *block, *depth, *queues))?);
                    }
                }
            }
        }
        Ok(jobs)
    }

    fn job(&self, (pattern, block, depth, queues): JobWords) -> anyhow::Result<Job> {
        let read_percent = pattern.read_percent(self.rwmixread);
        if read_percent < 100 && !self.overwrite {
            bail!(
                "{} destroys what is on the disk; say --overwrite if that is wanted",
                pattern.name()
            );
        }
        let bytes = block.as_u64();
        ensure!(
            bytes > 0 && bytes.is_multiple_of(512) && bytes <= BLOCK_MAX,
            "--bs {block}: a request is a multiple of 512 bytes, at most {}",
            ByteSize(BLOCK_MAX)
        );
        Ok(Job {
            pattern,
            read_percent,
            block: u32::try_from(bytes)?,
            depth,
            queues,
            interrupts: self.interrupts,
            warmup: self.warmup,
            time: self.time,
        })
    }
}

/// Measures, and reports.
pub(crate) fn run(session: &Session, args: &BenchArgs) -> anyhow::Result<()> {
    let interrupt = Interrupt::watch(interrupt::ANY, machine::resume_all)?;
    // A signal ends whatever waits, in its own words.
    measure(session, args, &interrupt).map_err(|error| {
        if interrupt.is_there() { Interrupted("interrupted".to_owned()).into() } else { error }
    })
}

fn measure(session: &Session, args: &BenchArgs, interrupt: &Interrupt) -> anyhow::Result<()> {
    let json = session.json;
    let jobs = args.jobs()?;
    // Before this thread is pinned: then it sees its own core only.
    let other_core = other_core(args);
    pin(args.core)?;
    if let (Some(source), Some(target)) = (&args.mirror, &args.mirror_target) {
        return run_life(session, args, &jobs, source, target, interrupt);
    }
    let mut bench = Bench::new(args, other_core, interrupt.clone())?;
    let mut cells = Vec::new();
    for job in &jobs {
        let cell = bench.measure(job)?;
        if !json {
            cell.lines().iter().for_each(|line| output::say(line));
        }
        cells.push(cell);
    }
    let report = bench.report(cells);
    if !json {
        report.machine().iter().for_each(|line| output::say(line));
    }
    if json {
        output::json(&report.to_json());
    }
    args.write(
        &format!("{:#}\n", report.to_json()),
        &report.to_markdown(),
        &plot::distributions(&report),
    )
}

/// Pins this thread, which is the client's, if a core was named.
fn pin(core: Option<usize>) -> anyhow::Result<()> {
    let Some(id) = core else { return Ok(()) };
    ensure!(
        core_affinity::set_for_current(core_affinity::CoreId { id }),
        "the client cannot be pinned to core {id}"
    );
    Ok(())
}

/// Takes the timeline of a mirror.
fn run_life(
    session: &Session,
    args: &BenchArgs,
    jobs: &[Job],
    source: &str,
    target: &Path,
    interrupt: &Interrupt,
) -> anyhow::Result<()> {
    let ([job], [(_, socket)]) = (jobs, args.sockets.as_slice()) else {
        bail!(
            "a timeline is of one cell on one socket; name one --iodepth, --bs, --rw and --socket"
        );
    };
    let (copy_mode, interlude) = (args.copy_mode.as_str(), args.time);
    let on_device = std::fs::metadata(target).is_ok_and(|it| it.file_type().is_block_device());
    ensure!(
        args.overwrite || !on_device,
        "the mirror destroys what is on {}; say --overwrite if that is wanted",
        target.display()
    );
    let ceiling = args.latency_ceiling;
    let plan = life::Plan { source, target, on_device, copy_mode, ceiling, interlude };
    let life = life::run(socket, job, &plan, session.connect()?, interrupt)?;
    life.show(session.json);
    args.write(&format!("{:#}\n", life.to_json()), &life.to_markdown(), &plot::timeline(&life))
}

/// A core that a server may be on, to look how far from it the client is; none unless both are free meanwhile.
fn other_core(args: &BenchArgs) -> Option<usize> {
    let core = args.core.filter(|_| args.pause_others)?;
    core_affinity::get_core_ids()?.into_iter().map(|it| it.id).find(|id| *id != core)
}

/// A comparison under way.
struct Bench<'a> {
    args: &'a BenchArgs,
    disks: Vec<(String, Place)>,
    /// Who is behind each disk.
    servers: Vec<Server>,
    other_core: Option<usize>,
    round_trips: Vec<f64>,
    interrupt: Interrupt,
}

impl<'a> Bench<'a> {
    fn new(
        args: &'a BenchArgs,
        other_core: Option<usize>,
        interrupt: Interrupt,
    ) -> anyhow::Result<Self> {
        let patience = ConnectionConfig::default().deadline;
        let disks = args.disks();
        let servers = disks.iter().map(|(_, place)| match place {
            Place::Socket(path) => Server::of(path, patience),
            Place::File(_) => Ok(Server::Nobody),
        });
        let servers = servers.collect::<Result<_, _>>()?;
        Ok(Self { args, disks, servers, other_core, round_trips: Vec::new(), interrupt })
    }

    /// Runs one cell on every disk, as often as was asked for. Each round begins with another disk.
    fn measure(&mut self, job: &Job) -> anyhow::Result<Cell> {
        let mut targets: Vec<Target> =
            self.disks.iter().map(|(name, _)| Target::new(name.clone())).collect();
        for round in 0..self.args.repeat as usize {
            self.look_at_cores()?;
            for turn in 0..targets.len() {
                let at = (round + turn) % targets.len();
                let run = self
                    .run(at, job, round as u64 + 1)
                    .with_context(|| format!("{}, {}", self.disks[at].0, report::heading(job)))?;
                targets[at].add(run);
            }
        }
        Ok(Cell::new(*job, targets))
    }

    fn run(&self, at: usize, job: &Job, seed: u64) -> anyhow::Result<Run> {
        let server = self.servers[at];
        let _paused = self.pause(Some(server))?;
        match &self.disks[at].1 {
            Place::Socket(path) => {
                let disk = Socket::connect(path, job, seed)?;
                Client::new(disk, job, seed, &self.interrupt)?.run(server)
            }
            Place::File(path) => {
                pin(self.args.file_core)?;
                let disk = BareFile::open(path, job, seed, self.args.force_share)?;
                let run = Client::new(disk, job, seed, &self.interrupt)?.run(server);
                pin(self.args.file_core.and(self.args.core))?;
                run
            }
        }
    }

    fn pause(&self, measured: Option<Server>) -> anyhow::Result<Paused> {
        if self.args.pause_others {
            Paused::all_but(&self.servers, measured)
        } else {
            Ok(Paused::default())
        }
    }

    fn look_at_cores(&mut self) -> anyhow::Result<()> {
        if let Some(core) = self.other_core {
            let _paused = self.pause(None)?;
            self.round_trips.extend(machine::round_trip(core));
        }
        Ok(())
    }

    fn report(self, cells: Vec<Cell>) -> Report {
        Report::new(cells, self.round_trips)
    }
}

/// What makes a cell: pattern, bytes of a request, requests in flight, queues.
type JobWords = (Pattern, ByteSize, u16, u16);

/// Reads `RW:BS:DEPTH[:QUEUES]`.
fn job_words(text: &str) -> Result<JobWords, String> {
    let words: Vec<&str> = text.split(':').collect();
    let (pattern, block, depth, queues) = match words.as_slice() {
        [pattern, block, depth] => (*pattern, *block, *depth, "1"),
        [pattern, block, depth, queues] => (*pattern, *block, *depth, *queues),
        _ => return Err("a job is RW:BS:DEPTH or RW:BS:DEPTH:QUEUES".to_owned()),
    };
    let number = |what: &str, word: &str, most: u16| match word.parse() {
        Ok(number) if (1..=most).contains(&number) => Ok(number),
        _ => Err(format!("{what} is 1 to {most}, not '{word}'")),
    };
    Ok((
        Pattern::from_str(pattern, false)?,
        block_size(block)?,
        number("the depth", depth, DEPTH_MAX)?,
        number("the number of queues", queues, QUEUES_MAX)?,
    ))
}

/// Reads a size as fio does, where bare letters mean powers of 1024, or with its unit written out.
fn block_size(text: &str) -> Result<ByteSize, String> {
    let bare = text.ends_with(['k', 'K', 'm', 'M']);
    if bare { format!("{text}iB").parse() } else { text.parse() }
}

/// Reads `NAME=PATH` or `PATH`.
fn named_path(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((name, path)) if !name.is_empty() && !name.contains('/') && !path.is_empty() => {
            Ok((name.to_owned(), PathBuf::from(path)))
        }
        _ if text.is_empty() => Err("a path is missing".to_owned()),
        _ => {
            let path = PathBuf::from(text);
            let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
            Ok((name.unwrap_or_else(|| text.to_owned()), path))
        }
    }
}

#[cfg(test)]
mod tests;
