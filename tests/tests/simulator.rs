//! The simulator as CI runs it: fixed seeds, then fresh ones for a while.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use resilver_bdev::mirror::Rows;
use resilver_tests::sim::{STEPS, run};

/// How long fresh seeds are tried.
const FRESH_FOR: Duration = Duration::from_secs(20);

#[test]
fn the_same_seed_gives_the_same_trace() {
    for seed in [3, 14, 159] {
        let (_, first) = run(seed, STEPS, 0);
        let (_, again) = run(seed, STEPS, 0);
        assert_eq!(first.unwrap(), again.unwrap());
    }
    let (one, other) = (run(1, STEPS, 0).0.hash(), run(2, STEPS, 0).0.hash());
    assert_ne!(one, other, "the trace says nothing");
}

#[test]
fn fixed_seeds_find_nothing_and_visit_every_row_of_the_tables() {
    let mut rows = Rows::default();
    for seed in 1..=200 {
        match run(seed, STEPS, 0).1 {
            Ok(summary) => rows.merge(summary.rows),
            Err(failure) => panic!("{failure}"),
        }
    }
    assert_eq!(rows, Rows::ALL, "the simulator no longer gets everywhere");
}

#[test]
fn fresh_seeds_find_nothing() {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let first = since_1970.as_nanos() as u64;
    let begun = Instant::now();
    let mut seed = first;
    while begun.elapsed() < FRESH_FOR {
        if let (_, Err(failure)) = run(seed, STEPS, 0) {
            panic!("{failure}");
        }
        seed = seed.wrapping_add(1);
    }
    println!("{} fresh seeds from {first} on", seed.wrapping_sub(first));
}
