//! Every CI run replays what the fuzzers know: the corpus in the tree, then mutations of it from fixed seeds. A bug that a
//! long run found has its input in the corpus, so it cannot come back unseen.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

use resilver_tests::fuzz::{Mutator, TARGETS};

/// Mutations of each target's corpus, and when there is no time for more of them.
const MUTATIONS: u64 = 20_000;
const TIME: Duration = Duration::from_secs(4);

fn corpus(target: &str) -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target);
    let mut inputs: Vec<_> = fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.display().to_string(), fs::read(&path).unwrap()))
        .collect();
    inputs.sort();
    inputs
}

/// Runs one input; what fails is written where it can be run again.
fn run(name: &str, target: fn(&[u8]), what: &str, input: &[u8]) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| target(input))) {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-failed"));
        fs::write(&path, input).unwrap();
        eprintln!(
            "target {name}, {what}: run it again with scripts/fuzz {name} {}",
            path.display()
        );
        std::panic::resume_unwind(panic);
    }
}

fn smoke(name: &str) {
    let (_, target) = TARGETS.into_iter().find(|(target, _)| *target == name).unwrap();
    let corpus = corpus(name);
    assert!(!corpus.is_empty(), "the corpus of {name} has gone");
    for (path, input) in &corpus {
        run(name, target, path, input);
    }
    let corpus: Vec<_> = corpus.into_iter().map(|(_, input)| input).collect();
    let (begin, mut count) = (Instant::now(), 0);
    while count < MUTATIONS && begin.elapsed() < TIME {
        let input = Mutator::new(count).mutate(&corpus);
        run(name, target, &format!("seed {count}"), &input);
        count += 1;
    }
    println!("{name}: {} inputs of the corpus and {count} mutations", corpus.len());
}

#[test]
fn back_end() {
    smoke("back_end");
}

#[test]
fn connection() {
    smoke("connection");
}

#[test]
fn messages() {
    smoke("messages");
}

#[test]
fn ring() {
    smoke("ring");
}

#[test]
fn rpc() {
    smoke("rpc");
}

#[test]
fn state() {
    smoke("state");
}

#[test]
fn every_target_is_replayed_and_can_be_fuzzed() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let manifest = fs::read_to_string(root.join("fuzz/Cargo.toml")).unwrap();
    for (name, _) in TARGETS {
        assert!(
            include_str!("fuzz_smoke.rs").contains(&format!("smoke(\"{name}\")")),
            "{name} is not replayed"
        );
        assert!(manifest.contains(&format!("name = \"{name}\"")), "{name} has no binary");
        assert!(root.join(format!("fuzz/fuzz_targets/{name}.rs")).exists(), "{name} has no source");
    }
}
