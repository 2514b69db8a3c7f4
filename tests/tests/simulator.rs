//! The simulator as CI runs it: fixed seeds, so that the same tree gives the same answer. Fresh ones: `scripts/ci soak`.

use resilver_bdev::mirror::Rows;
use resilver_tests::sim::{STEPS, run};

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
    for seed in 1..=800 {
        match run(seed, STEPS, 0).1 {
            Ok(summary) => rows.merge(summary.rows),
            Err(failure) => panic!("{failure}"),
        }
    }
    assert_eq!(rows, Rows::ALL, "the simulator no longer gets everywhere");
}
