//! Runs seeds of the simulator by hand: see `--help`.

#![allow(clippy::print_stdout)] // a program for a terminal

use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use clap::Parser;
use resilver_bdev::mirror::{RowSet, Rows};
use resilver_tests::sim::{STEPS, run};

/// Runs the simulator: the mirror and a target around it on one thread, with faults, all of it drawn from a seed. The same seed gives
/// the same run. Stops at the first seed that finds something, and prints how to run it again.
#[derive(Parser)]
struct Options {
    /// The first seed
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Seeds to run, from that one on
    #[arg(long, default_value_t = 1)]
    runs: u64,
    /// For so many seconds, seeds that nobody has tried
    #[arg(long, value_name = "SECONDS", conflicts_with_all = ["seed", "runs"])]
    fresh: Option<u64>,
    /// Turns of a run
    #[arg(long, default_value_t = STEPS)]
    steps: u32,
    /// Prints every line of the runs
    #[arg(long)]
    trace: bool,
}

impl Options {
    /// The seeds, and how long they are tried.
    fn seeds(&self) -> (std::ops::Range<u64>, Duration) {
        let Some(seconds) = self.fresh else {
            return (self.seed..self.seed.saturating_add(self.runs), Duration::MAX);
        };
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        // The lowest digits, so that a seed can be typed again.
        let first = since_1970.as_micros() as u64 % 1_000_000_000_000;
        (first..u64::MAX, Duration::from_secs(seconds))
    }
}

fn main() -> ExitCode {
    let options = Options::parse();
    let (seeds, time) = options.seeds();
    let first = seeds.start;
    let keep = if options.trace { usize::MAX } else { 0 };
    let (mut requests, mut rows, mut runs) = (0, Rows::default(), 0_u64);
    let begun = Instant::now();
    for seed in seeds.take_while(|_| begun.elapsed() < time) {
        runs += 1;
        let (trace, result) = run(seed, options.steps, keep);
        match result {
            Ok(summary) => {
                requests += summary.requests;
                rows.merge(summary.rows);
                if options.trace {
                    println!("{}", trace.tail().join("\n"));
                }
                if options.runs == 1 && options.fresh.is_none() {
                    println!("seed {seed}: {summary:x?}");
                }
            }
            Err(failure) => {
                println!("{failure}");
                return ExitCode::FAILURE;
            }
        }
    }
    let Rows { write, failure, hang } = rows;
    let visited = [write, failure, hang].map(RowSet::letters).join(", ");
    println!("{runs} seeds from {first}, {requests} guest requests, rows {visited}, nothing found");
    ExitCode::SUCCESS
}
