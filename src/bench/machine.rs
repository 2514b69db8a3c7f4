//! What the machine did beside a benchmark: who else used it, and what that took from the two who were measured.
//!
//! A figure means what it says only if client and server had their cores to themselves. Nothing here makes a machine quiet;
//! it says how quiet it was. The kernel keeps account: `/proc/stat` of all CPUs in ticks (proc_stat(5)), `schedstat` of each
//! thread in nanoseconds, running and waiting for a core (Documentation/scheduler/sched-stats.rst). Whose socket it is, the
//! socket says (SO_PEERCRED, unix(7)).
//!
//! A server that polls while nobody asks it anything takes its core from the one that is measured next: [`Paused`]
//! stops the others meanwhile. Whatever ends the benchmark, they go on: also an interrupt, which drops nothing.

use std::ffi::OsString;
use std::io::ErrorKind;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

/// A share of one CPU that others may use before a machine is called busy, and of a measured thread's time that it may wait.
const FOREIGN_BUSY: f64 = 0.05;
const WAITED_BUSY: f64 = 0.01;
/// A tick of `/proc/stat`, milliseconds: USER_HZ is 100 in the kernel's interface, whatever it runs at itself.
const TICK_MS: u64 = 10;
/// How often a socket that is not there yet is looked for.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// Turns of one look at how far two cores are from each other.
const BOUNCES: u32 = 2_000;

/// Who is behind a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Server {
    /// The process behind a socket.
    Process(Pid),
    /// The client itself, as with a file, and the threads that the kernel gives it for its requests.
    Nobody,
    /// A process that cannot be told.
    Unknown,
}

impl Server {
    /// Asks the socket, by a connection that says nothing. One that is not there yet is waited for, as the client waits.
    pub(crate) fn of(socket: &Path, patience: Duration) -> anyhow::Result<Self> {
        let begun = Instant::now();
        let stream = loop {
            match UnixStream::connect(socket) {
                Err(error)
                    if matches!(
                        error.kind(),
                        ErrorKind::NotFound | ErrorKind::ConnectionRefused
                    ) && begun.elapsed() < patience =>
                {
                    std::thread::sleep(LOOK_EVERY);
                }
                connected => break connected,
            }
        };
        let stream = stream.with_context(|| format!("cannot connect to {}", socket.display()))?;
        let credentials = rustix::net::sockopt::socket_peercred(&stream)?;
        // A server in our own process, as in tests, is nobody whom one could stop.
        let ours = credentials.pid == rustix::process::getpid();
        Ok(if ours { Self::Unknown } else { Self::Process(credentials.pid) })
    }

    /// Stops it (SIGSTOP) until it is resumed.
    fn pause(self) -> anyhow::Result<()> {
        match self {
            Self::Process(pid) => kill_process(pid, Signal::STOP).context("cannot pause a server"),
            Self::Nobody => Ok(()),
            Self::Unknown => bail!("a server whose process is unknown cannot be paused"),
        }
    }

    fn resume(self) {
        if let Self::Process(pid) = self {
            // One that is gone says so by its socket.
            let _ = kill_process(pid, Signal::CONT);
        }
    }

    /// The directories of its threads below `/proc`, without the calling one.
    fn threads(self) -> Vec<PathBuf> {
        let (tasks, own) = match self {
            Self::Process(pid) => (format!("/proc/{}/task", pid.as_raw_nonzero()), None),
            Self::Nobody => ("/proc/self/task".to_owned(), own_thread()),
            Self::Unknown => return Vec::new(),
        };
        let all = std::fs::read_dir(tasks).into_iter().flatten().filter_map(Result::ok);
        all.filter(|it| own.as_ref() != Some(&it.file_name())).map(|it| it.path()).collect()
    }
}

/// The number of the calling thread: where `/proc/thread-self` points is `PID/task/TID` (proc_thread-self(5)).
fn own_thread() -> Option<OsString> {
    Some(std::fs::read_link("/proc/thread-self").ok()?.file_name()?.to_owned())
}

/// Servers that are stopped; they go on when this ends.
#[derive(Debug, Default)]
pub(crate) struct Paused(Vec<Server>);

/// The same for a process that ends without dropping anything.
static STOPPED: Mutex<Vec<Server>> = Mutex::new(Vec::new());

/// Lets all go on that are stopped. Only for a process that is about to end.
pub(crate) fn resume_all() {
    STOPPED.lock().unwrap_or_else(PoisonError::into_inner).iter().for_each(|it| it.resume());
}

impl Paused {
    /// Stops all servers but one; `None` for all.
    ///
    /// # Errors
    /// A server is unknown, or is not ours to stop. Those that were stopped go on.
    pub(crate) fn all_but(servers: &[Server], measured: Option<Server>) -> anyhow::Result<Self> {
        let mut paused = Self::default();
        for server in servers.iter().filter(|server| Some(**server) != measured) {
            let mut stopped = STOPPED.lock().unwrap_or_else(PoisonError::into_inner);
            server.pause()?;
            stopped.push(*server);
            paused.0.push(*server);
        }
        Ok(paused)
    }
}

impl Drop for Paused {
    fn drop(&mut self) {
        let mut stopped = STOPPED.lock().unwrap_or_else(PoisonError::into_inner);
        self.0.iter().for_each(|server| server.resume());
        stopped.retain(|server| !self.0.contains(server));
    }
}

/// What the kernel's accounts say at one moment.
#[derive(Debug, Clone, Copy, Default)]
struct Accounts {
    /// Time that all CPUs together were busy, and that the hypervisor gave to somebody else.
    busy: Duration,
    stolen: Duration,
    client: Threads,
    server: Threads,
}

/// Time of some threads on a core and, though they could run, off it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Threads {
    ran: Duration,
    waited: Duration,
}

impl Accounts {
    /// The caller is the client. What cannot be read counts as nothing.
    fn read(server: Server) -> Self {
        let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
        let (busy, stolen) = all_cpus(&stat);
        let of = |path: &Path| std::fs::read_to_string(path).unwrap_or_default();
        let client = Threads::parse(&of(Path::new("/proc/thread-self/schedstat")));
        let server = server
            .threads()
            .iter()
            .map(|thread| Threads::parse(&of(&thread.join("schedstat"))))
            .fold(Threads::default(), Threads::plus);
        Self { busy, stolen, client, server }
    }
}

impl Threads {
    /// Reads a `schedstat`: nanoseconds run, nanoseconds waited, time slices.
    fn parse(schedstat: &str) -> Self {
        let mut fields =
            schedstat.split_whitespace().map(|it| Duration::from_nanos(it.parse().unwrap_or(0)));
        let mut next = || fields.next().unwrap_or_default();
        Self { ran: next(), waited: next() }
    }

    fn plus(self, other: Self) -> Self {
        Self { ran: self.ran + other.ran, waited: self.waited + other.waited }
    }

    /// Threads that ended meanwhile took their account with them.
    fn since(self, earlier: Self) -> Self {
        Self {
            ran: self.ran.saturating_sub(earlier.ran),
            waited: self.waited.saturating_sub(earlier.waited),
        }
    }
}

/// Busy and stolen time of all CPUs. The first line is `cpu user nice system idle iowait irq softirq steal …`.
fn all_cpus(stat: &str) -> (Duration, Duration) {
    let line = stat.lines().next().unwrap_or_default();
    let fields: Vec<u64> =
        line.split_whitespace().skip(1).map(|it| it.parse().unwrap_or(0)).collect();
    let ticks = |at: &[usize]| -> Duration {
        let sum: u64 = at.iter().filter_map(|at| fields.get(*at)).sum();
        Duration::from_millis(sum.saturating_mul(TICK_MS))
    };
    (ticks(&[0, 1, 2, 5, 6]), ticks(&[7]))
}

/// Takes accounts before and after a run.
#[derive(Debug)]
pub(crate) struct Watch {
    server: Server,
    begun: Instant,
    before: Accounts,
}

impl Watch {
    pub(crate) fn begin(server: Server) -> Self {
        Self { server, begun: Instant::now(), before: Accounts::read(server) }
    }

    pub(crate) fn end(self) -> Disturbance {
        let after = Accounts::read(self.server);
        let client = after.client.since(self.before.client);
        let server = after.server.since(self.before.server);
        let ours = client.plus(server).ran;
        Disturbance {
            time: self.begun.elapsed(),
            server_known: self.server != Server::Unknown,
            foreign: after.busy.saturating_sub(self.before.busy).saturating_sub(ours),
            stolen: after.stolen.saturating_sub(self.before.stolen),
            waited: client.plus(server).waited,
            server_ran: server.ran,
        }
    }
}

/// What a run had to share.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Disturbance {
    time: Duration,
    /// Whose process the server is: otherwise its time counts as foreign.
    server_known: bool,
    /// CPU time of everybody else, interrupts included.
    foreign: Duration,
    /// CPU time that the hypervisor gave to other machines.
    stolen: Duration,
    /// Time that threads of client and server could run and had no core: more than the run's if several waited.
    waited: Duration,
    /// CPU time of the server.
    server_ran: Duration,
}

impl Disturbance {
    pub(crate) fn plus(self, other: Self) -> Self {
        Self {
            time: self.time + other.time,
            server_known: other.server_known && (self.server_known || self.time.is_zero()),
            foreign: self.foreign + other.foreign,
            stolen: self.stolen + other.stolen,
            waited: self.waited + other.waited,
            server_ran: self.server_ran + other.server_ran,
        }
    }

    /// A time as a share of the run's.
    fn share(self, part: Duration) -> f64 {
        if self.time.is_zero() { 0.0 } else { part.as_secs_f64() / self.time.as_secs_f64() }
    }

    /// What was taken from client and server: the time they waited, and what was stolen.
    pub(crate) fn taken(self) -> f64 {
        self.share(self.waited + self.stolen)
    }

    fn is_busy(self) -> bool {
        self.taken() > WAITED_BUSY || (self.server_known && self.share(self.foreign) > FOREIGN_BUSY)
    }

    /// One sentence for the head of a report.
    pub(crate) fn verdict(self) -> String {
        let others = if self.server_known { "others" } else { "the server and others" };
        let facts = format!(
            "{others} used {:.2} CPUs, client and server waited for a core {:.1}% of the time, {:.1}% of a CPU was stolen",
            self.share(self.foreign),
            self.share(self.waited) * 100.0,
            self.share(self.stolen) * 100.0,
        );
        if self.is_busy() {
            format!(
                "This machine was busy: {facts}. The figures are of the machine as much as of the servers."
            )
        } else {
            format!("This machine was quiet: {facts}.")
        }
    }

    pub(crate) fn to_json(self) -> Value {
        json!({
            "busy": self.is_busy(), "server_known": self.server_known,
            "foreign_cpus": self.share(self.foreign), "stolen_cpus": self.share(self.stolen),
            "waited": self.share(self.waited), "server_cpus": self.share(self.server_ran),
        })
    }
}

/// How long a cache line takes to another core and back, nanoseconds. Between virtual cores that the hypervisor moves about
/// it changes by a factor of five, and polled figures at depth 1 with it. Both cores must be free: whoever spins on one of
/// them is measured instead.
pub(crate) fn round_trip(other: usize) -> Option<f64> {
    let other = core_affinity::CoreId { id: other };
    let word = AtomicU32::new(0);
    let await_value = |value: u32| {
        while word.load(Ordering::Acquire) != value {
            std::hint::spin_loop();
        }
    };
    std::thread::scope(|scope| {
        let echo = scope.spawn(|| {
            core_affinity::set_for_current(other);
            for turn in 0..=BOUNCES {
                await_value(2 * turn + 1);
                word.store(2 * turn + 2, Ordering::Release);
            }
        });
        // The first turn waits for the other thread to be there.
        word.store(1, Ordering::Release);
        await_value(2);
        let begun = Instant::now();
        for turn in 1..=BOUNCES {
            word.store(2 * turn + 1, Ordering::Release);
            await_value(2 * turn + 2);
        }
        let time = begun.elapsed();
        echo.join().ok()?;
        Some(time.as_secs_f64() * 1e9 / f64::from(BOUNCES))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_accounts_are_read_by_their_documents() {
        let stat = "cpu  100 20 30 4000 50 6 7 8 9 10\ncpu0 1 2 3 4 5 6 7 8 9 10\n";
        let (busy, stolen) = all_cpus(stat);
        assert_eq!((busy, stolen), (Duration::from_millis(1630), Duration::from_millis(80)));
        assert_eq!(all_cpus(""), Default::default());
        let threads = Threads::parse("1500 20 3\n");
        assert_eq!(
            threads,
            Threads { ran: Duration::from_nanos(1500), waited: Duration::from_nanos(20) }
        );
        assert_eq!(Threads::parse(""), Threads::default());
    }

    #[test]
    fn a_machine_is_called_busy_for_what_was_taken_or_for_what_others_used() {
        let second = Duration::from_secs(1);
        let quiet = Disturbance { time: second, server_known: true, ..Disturbance::default() };
        assert!(quiet.verdict().starts_with("This machine was quiet"), "{}", quiet.verdict());
        let foreign = Disturbance { foreign: second / 10, ..quiet };
        let waited = Disturbance { waited: second / 50, ..quiet };
        let stolen = Disturbance { stolen: second / 50, ..quiet };
        for busy in [foreign, waited, stolen] {
            assert!(busy.verdict().starts_with("This machine was busy"), "{}", busy.verdict());
        }
        // Whose time it is, is not known: no reason to cry.
        assert!(!Disturbance { server_known: false, ..foreign }.is_busy());
        let two = Disturbance::default().plus(quiet).plus(foreign);
        assert!(two.server_known);
        assert!((two.share(two.foreign) - 0.05).abs() < 1e-9);
    }

    #[test]
    fn what_others_used_is_no_more_than_there_was() {
        let watch = Watch::begin(Server::Unknown);
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_millis(100) {
            std::hint::spin_loop();
        }
        let found = watch.end();
        let all = found.time
            * u32::try_from(std::thread::available_parallelism().unwrap().get()).unwrap();
        assert!(found.foreign <= all + Duration::from_millis(100), "{found:?}");
        assert!(found.time >= Duration::from_millis(100));
    }

    #[test]
    fn without_a_server_the_threads_beside_the_client_are_the_servers() {
        let stop = std::sync::atomic::AtomicBool::new(false);
        let worked = std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
            let watch = Watch::begin(Server::Nobody);
            std::thread::sleep(Duration::from_millis(100));
            let found = watch.end();
            stop.store(true, Ordering::Relaxed);
            found
        });
        assert!(worked.server_known);
        assert!(worked.server_ran >= Duration::from_millis(20), "{worked:?}");
        // Nobody is there to be stopped, and nothing is lost by it.
        let paused = Paused::all_but(&[Server::Nobody], None).unwrap();
        drop(paused);
    }

    #[test]
    fn a_socket_says_whose_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sock");
        // It comes a moment later.
        let late = path.clone();
        let binder = std::thread::spawn(move || {
            std::thread::sleep(3 * LOOK_EVERY);
            std::os::unix::net::UnixListener::bind(late).unwrap()
        });
        // Ours: nobody pauses himself.
        let server = Server::of(&path, Duration::from_secs(30)).unwrap();
        let listener = binder.join().unwrap();
        assert_eq!(server, Server::Unknown);
        assert!(server.pause().is_err());
        drop(listener);
        assert!(Server::of(&path, Duration::ZERO).is_err());
    }

    #[test]
    fn a_server_is_stopped_while_another_is_measured_and_goes_on_afterwards() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = Pid::from_child(&child);
        let state = || {
            let stat =
                std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).unwrap();
            stat.rsplit(") ").next().unwrap().chars().next().unwrap()
        };
        let becomes = |wanted: &str| {
            let begun = Instant::now();
            while !wanted.contains(state()) {
                assert!(begun.elapsed() < Duration::from_secs(10), "{}", state());
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        let (one, other) = (Server::Process(pid), Server::Unknown);
        let paused = Paused::all_but(&[one], Some(other)).unwrap();
        becomes("T");
        drop(paused);
        becomes("SR");
        let none = Paused::all_but(&[one], Some(one)).unwrap();
        assert!(none.0.is_empty());
        assert!(Paused::all_but(&[one, other], None).is_err(), "one that is unknown");
        becomes("SR");
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
