//! The seeded simulator: the real disk poller and the real mirror in a world where everything else is made up.
//!
//! A seed determines a run wholly: the disks, their faults, the guests, the operator and the clock. The same seed gives the
//! same trace hash, so a failure is a seed, and a seed is a bug report. A run is a safety phase, in which anything may go
//! wrong and nothing may be lost, and a liveness phase, in which nothing goes wrong and everything must end (the scheme
//! is that of TigerBeetle's VOPR).
//!
//! What is real: everything in `resilver-bdev`. What is simulated: time ([`world`]), disks ([`disk`]), guests ([`guest`]). What
//! judges: the [`oracle`], and the checks that each part makes of its neighbours.

mod bitmap;
pub mod control;
pub mod disk;
pub mod guest;
pub mod oracle;
pub mod probe;
pub mod ring;
pub mod rng;
mod scope;
pub mod sector;
pub mod session;
pub mod swarm;
pub mod trace;
pub mod verify;
pub mod world;

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, MutexGuard, PoisonError};

use control::Reached;
use resilver_bdev::mirror::Rows;
use rng::Rng;
use swarm::Swarm;
use trace::Trace;
use world::World;

/// Turns of a run unless somebody says otherwise.
pub const STEPS: u32 = 1500;

/// What a run did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Summary {
    /// The hash of its trace.
    pub hash: u64,
    /// Guest requests that ended.
    pub requests: u64,
    /// What became of its mirrors.
    pub reached: Reached,
    /// Rows of the mirror's tables that it visited.
    pub rows: Rows,
}

/// A run that found something.
#[derive(Debug)]
pub struct Failure {
    /// The seed.
    pub seed: u64,
    /// Turns of its safety phase.
    pub steps: u32,
    /// What was found.
    pub finding: String,
    /// The end of its trace.
    pub tail: Vec<String>,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for line in &self.tail {
            writeln!(f, "{line}")?;
        }
        let Self { seed, steps, finding, .. } = self;
        writeln!(f, "seed {seed}: {finding}")?;
        write!(
            f,
            "again with: cargo run -p resilver-tests --bin sim -- --seed {seed} --steps {steps}"
        )
    }
}

/// Runs one seed. `keep` lines of the trace are kept.
///
/// # Errors
/// What was found, a panic included.
pub fn run(seed: u64, steps: u32, keep: usize) -> (Trace, Result<Summary, Box<Failure>>) {
    let trace = Trace::new(keep);
    let world_trace = trace.clone();
    let result = catch_unwind(AssertUnwindSafe(|| {
        let mut rng = Rng::new(seed);
        let swarm = Swarm::new(&mut rng, steps);
        let mut world = World::new(swarm, rng, world_trace);
        world.be_safe()?;
        world.be_live()?;
        Ok(Summary {
            hash: world.trace.hash(),
            requests: world.ended(),
            reached: world.control.reached,
            rows: world.trace.rows(),
        })
    }));
    let result = result.unwrap_or_else(|panic| Err(words_of(panic.as_ref())));
    let result = result
        .map_err(|finding: String| Box::new(Failure { seed, steps, finding, tail: trace.tail() }));
    (trace, result)
}

/// What a panic said.
fn words_of(panic: &(dyn std::any::Any + Send)) -> String {
    let words = panic.downcast_ref::<String>().map(String::as_str);
    let words = words.or_else(|| panic.downcast_ref::<&str>().copied());
    format!("panic: {}", words.unwrap_or("without words"))
}

/// The value behind a lock. The simulator has one thread; a poisoned lock means that a panic is being reported.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
