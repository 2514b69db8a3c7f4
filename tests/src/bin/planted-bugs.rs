//! The proof that the simulator can fail: plants one bug after the other in the mirror and looks for a seed that finds it.
//!
//! Prints a table of the bugs with the seed and the finding; fails if one is not found. The bugs that only the exhaustive model
//! comes to are not planted here.

#![allow(clippy::print_stdout)] // a program for a terminal

use std::process::ExitCode;
use std::time::Instant;

use resilver_bdev::mirror::bugs::{Bug, plant};
use resilver_tests::sim::{STEPS, run};

/// A write must trail for longer than a flush, a record and a drain take; a flush must time out and fail after a copy: a seed in many
/// thousands.
const OF_THE_MODEL: [Bug; 2] = [Bug::TrailingNotAwaited, Bug::LateFlushErrorForgotten];
/// Seeds tried for one bug.
const SEEDS: u64 = 1000;
/// Columns of the finding that the table shows.
const COLUMNS: usize = 90;

fn main() -> ExitCode {
    // Many bugs end in an assertion of the mirror's own; what it says is in the table.
    std::panic::set_hook(Box::new(|_| {}));
    let (mut planted, mut missed) = (0, 0);
    for bug in Bug::ALL.into_iter().filter(|bug| !OF_THE_MODEL.contains(bug)) {
        planted += 1;
        plant(Some(bug));
        let begun = Instant::now();
        let found = (1..=SEEDS).find_map(|seed| run(seed, STEPS, 0).1.err());
        plant(None);
        let took = begun.elapsed().as_secs_f64();
        let name = format!("{bug:?}");
        match found {
            Some(failure) => {
                let finding: String = failure.finding.chars().take(COLUMNS).collect();
                println!("{name:<28} seed {:>4}  {took:>5.1} s  {finding}", failure.seed);
            }
            None => {
                missed += 1;
                println!("{name:<28} NOT FOUND in {SEEDS} seeds, {took:.1} s");
            }
        }
    }
    println!("{planted} bugs planted, {missed} missed");
    if missed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
