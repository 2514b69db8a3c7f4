//! Whatever numbers, names and paths the methods are called with, in whatever order, the target answers and goes on.

#![allow(clippy::unwrap_used)] // a test may panic; clippy knows that only of functions it sees as tests

use std::fs::{self, File};

use resilver_rpc::methods::{METHODS, Method};
use resilver_tests::e2e::Server;
use resilver_tests::sim::rng::Rng;
use serde_json::{Map, Value, json};

const SEEDS: u64 = 4;
/// Of each seed, on a target of its own.
const CALLS: u32 = 4000;

/// The first two wait, for an export and for events, and the others end the target, or the connection's use for calls.
const LEFT_OUT: [&str; 4] =
    ["bdev_virtio_create", "job_get_events", "spdk_kill_instance", "job_subscribe"];

/// Few names, so that calls meet.
const NAMES: [&str; 3] = ["a", "b", "c"];

/// What a size, a count or a time may be, with the ends of what its type has.
const NUMBERS: [i128; 13] = [
    -(1 << 63),
    -1,
    0,
    1,
    8,
    512,
    4096,
    65536,
    1 << 40,
    1 << 53,
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 1,
];

/// What is of no use anywhere.
fn nonsense(rng: &mut Rng) -> Value {
    [json!(null), json!([]), json!({}), json!(""), json!(0.5), json!("\0")][rng.below(6) as usize]
        .clone()
}

/// A value like this one.
fn like(example: &Value, files: &[String], rng: &mut Rng) -> Value {
    if rng.chance(40) {
        return nonsense(rng);
    }
    match example {
        Value::Object(fields) => {
            let fields = fields.iter().map(|(name, it)| (name.clone(), like(it, files, rng)));
            Value::Object(fields.collect())
        }
        Value::Array(items) => items.iter().map(|it| like(it, files, rng)).collect(),
        Value::Bool(_) => json!(rng.chance(500)),
        Value::Number(_) if rng.chance(300) => example.clone(),
        Value::Number(_) => json!(rng.pick(&NUMBERS)),
        Value::String(text) if text.starts_with('/') => {
            json!(files[rng.below(files.len() as u64) as usize])
        }
        Value::String(_) if rng.chance(800) => json!(rng.pick(&NAMES)),
        Value::String(_) | Value::Null => example.clone(),
    }
}

/// Parameters of a method: most of those that its example has, and some of the others.
fn parameters(method: &Method, files: &[String], rng: &mut Rng) -> Value {
    let example: Map<String, Value> = serde_json::from_str(method.example).unwrap();
    let mut some: Map<String, Value> = example.into_iter().filter(|_| !rng.chance(60)).collect();
    let schema = method.schema()["properties"].as_object();
    for (name, property) in schema.into_iter().flatten() {
        if !some.contains_key(name) && rng.chance(150) {
            let kind = property["type"].as_str().or(property["type"][0].as_str());
            let value = match kind {
                Some("integer" | "number") => json!(0),
                Some("boolean") => json!(true),
                _ => json!("a"),
            };
            some.insert(name.clone(), value);
        }
    }
    // They would be waited for.
    some.retain(|name, _| !name.contains("timeout"));
    like(&Value::Object(some), files, rng)
}

#[test]
fn the_target_answers_whatever_it_is_asked() {
    let mut done = 0;
    for seed in 0..SEEDS {
        let (mut server, mut rng) = (Server::start(), Rng::new(seed));
        // All exist, so that no copy of a disk of any size fills this machine's.
        let files = NAMES.map(|name| server.path(name).to_str().unwrap().to_owned());
        File::create(&files[0]).unwrap().set_len(16 << 20).unwrap();
        File::create(&files[1]).unwrap().set_len(8 << 20).unwrap();
        fs::create_dir(&files[2]).unwrap();
        for _ in 0..CALLS {
            let method = &METHODS[rng.below(METHODS.len() as u64) as usize];
            // There should be something to ask.
            let ends = ["delete", "remove", "cancel"].iter().any(|it| method.name.contains(it));
            let left_out = LEFT_OUT.contains(&method.name) || ends && rng.chance(700);
            if !left_out {
                let params = parameters(method, &files, &mut rng);
                eprintln!("seed {seed}: {} {params}", method.name);
                done += u32::from(server.try_call(method.name, params).is_ok());
            }
        }
        let log = server.log();
        assert!(!log.contains("panicked"), "seed {seed}: {log}");
    }
    assert!(
        done > SEEDS as u32 * CALLS / 20,
        "only {done} calls were carried out: nothing was asked"
    );
}
