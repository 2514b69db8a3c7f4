//! Runs seeds of the simulator by hand.
//!
//! `sim --seed N [--runs K] [--steps M] [--trace]`: K seeds from N on, M turns each; with `--trace` every line of the run.
//! `sim --fresh SECONDS`: seeds that nobody has tried, for so long.

#![allow(clippy::print_stdout)] // a program for a terminal

use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use resilver_bdev::mirror::{RowSet, Rows};
use resilver_tests::sim::{STEPS, run};

/// What the command line says.
struct Options {
    seed: u64,
    runs: u64,
    /// Seeds after these are tried no longer than that.
    fresh: Option<Duration>,
    steps: u32,
    trace: bool,
}

fn options() -> Result<Options, String> {
    let mut options = Options { seed: 1, runs: 1, fresh: None, steps: STEPS, trace: false };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut number = || {
            let value = words.next().unwrap_or_default();
            value.parse::<u64>().map_err(|_| format!("{word} takes a number, not '{value}'"))
        };
        match word.as_str() {
            "--seed" => options.seed = number()?,
            "--runs" => options.runs = number()?,
            "--steps" => options.steps = u32::try_from(number()?).map_err(|e| e.to_string())?,
            "--fresh" => {
                options.fresh = Some(Duration::from_secs(number()?));
                let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH);
                // The lowest digits, so that a seed can be typed again.
                options.seed =
                    since_1970.map_err(|e| e.to_string())?.as_micros() as u64 % 1_000_000_000_000;
                options.runs = u64::MAX;
            }
            "--trace" => options.trace = true,
            _ => {
                return Err(format!(
                    "'{word}'? sim --seed N [--runs K] [--steps M] [--trace] | --fresh SECONDS"
                ));
            }
        }
    }
    Ok(options)
}

fn main() -> ExitCode {
    let options = match options() {
        Ok(options) => options,
        Err(wrong) => {
            println!("{wrong}");
            return ExitCode::FAILURE;
        }
    };
    let keep = if options.trace { usize::MAX } else { 0 };
    let (mut requests, mut rows, mut runs) = (0, Rows::default(), 0_u64);
    let begun = Instant::now();
    for seed in options.seed..options.seed.saturating_add(options.runs) {
        if options.fresh.is_some_and(|long| begun.elapsed() >= long) {
            break;
        }
        runs += 1;
        let (trace, result) = run(seed, options.steps, keep);
        match result {
            Ok(summary) => {
                requests += summary.requests;
                rows.merge(summary.rows);
                if options.trace {
                    println!("{}", trace.tail().join("\n"));
                }
                if options.runs == 1 {
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
    let first = options.seed;
    println!("{runs} seeds from {first}, {requests} guest requests, rows {visited}, nothing found");
    ExitCode::SUCCESS
}
