//! What is told of a job: the exact sequences, in QEMU's words, and what a reader gets who is late or slow.

#![allow(clippy::unwrap_used)] // a test may panic; clippy knows that only of functions it sees as tests

mod common;

use resilver_rpc::Client;
use serde_json::{Value, json};

use common::{DEADLINE, MIB, Served, served};

/// What happened to a job, as QEMU tells it: states in small letters, other events by name.
fn told(target: &mut Served, job: &str) -> Vec<String> {
    let page = target.call("job_get_events", json!({ "job_id": job }));
    let events = page["events"].as_array().unwrap().clone();
    let word = |event: &Value| match event["qemu_event"].as_str().unwrap() {
        "JOB_STATUS_CHANGE" => event["status"].as_str().unwrap().to_owned(),
        other => other.trim_start_matches("BLOCK_JOB_").to_owned(),
    };
    events.iter().map(word).collect()
}

/// Starts job `job` from `a` to `b`, both of 1 MiB.
fn start(target: &mut Served, more: Value) {
    target.malloc("a", 1);
    target.malloc("b", 1);
    let mut params = json!({ "source": "a", "target": "b", "job_id": "job" });
    params.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    target.call("bdev_mirror_start", params);
}

/// Ends the job by a verb once it is in this state; gives its last event and all that was told.
fn end(target: &mut Served, status: &str, verb: &str) -> (Value, Vec<String>) {
    target.wait_for_status("job", status);
    target.call(verb, json!({ "job_id": "job" }));
    let ended = target.wait_for("job", |event| event["event"] == "job_completed");
    target.wait_for_status("job", "null");
    (ended, told(target, "job"))
}

#[test]
fn a_job_cancelled_before_it_is_ready() {
    let (_dir, mut target) = served();
    target.file("file", 64);
    target.malloc("b", 64);
    let slow = json!({ "source": "file", "target": "b", "job_id": "job", "speed": 4096 });
    target.call("bdev_mirror_start", slow);
    let (ended, told) = end(&mut target, "running", "job_cancel");
    assert_eq!(told, ["created", "running", "aborting", "CANCELLED", "concluded", "null"]);
    assert_eq!((&ended["error"], &ended["type"]), (&json!("Operation canceled"), &json!("mirror")));
    assert_eq!((&ended["len"], &ended["speed"]), (&json!(64 * MIB), &json!(4096)));
    assert!(ended["offset"].as_u64().unwrap() < 64 * MIB);
}

#[test]
fn a_job_cancelled_when_it_is_ready() {
    let (_dir, mut target) = served();
    start(&mut target, json!({}));
    let (ended, told) = end(&mut target, "ready", "job_cancel");
    let expected =
        ["created", "running", "ready", "READY", "aborting", "CANCELLED", "concluded", "null"];
    assert_eq!(told, expected);
    assert_eq!((&ended["goes_on_with"], &ended["phase"]), (&json!("source"), &json!("cancelling")));
}

#[test]
fn a_job_finished_when_it_is_ready() {
    let (_dir, mut target) = served();
    start(&mut target, json!({}));
    let (ended, told) = end(&mut target, "ready", "bdev_mirror_finish");
    let expected = [
        "created",
        "running",
        "ready",
        "READY",
        "waiting",
        "pending",
        "COMPLETED",
        "concluded",
        "null",
    ];
    assert_eq!(told, expected);
    assert_eq!((&ended["goes_on_with"], &ended["error"]), (&json!("source"), &Value::Null));
}

#[test]
fn a_job_completed_that_finalizes_itself() {
    let (_dir, mut target) = served();
    start(&mut target, json!({}));
    let (ended, told) = end(&mut target, "ready", "job_complete");
    let expected = [
        "created",
        "running",
        "ready",
        "READY",
        "waiting",
        "pending",
        "COMPLETED",
        "concluded",
        "null",
    ];
    assert_eq!(told, expected);
    assert_eq!((&ended["goes_on_with"], &ended["error"]), (&json!("target"), &Value::Null));
    assert_eq!((&ended["len"], &ended["offset"]), (&json!(MIB), &json!(MIB)));
}

#[test]
fn a_job_completed_from_standby_and_finalized_and_dismissed_by_hand() {
    let (_dir, mut target) = served();
    start(&mut target, json!({ "auto_finalize": false, "auto_dismiss": false }));
    let job = json!({ "job_id": "job" });
    target.wait_for_status("job", "ready");
    target.call("job_pause", job.clone());
    target.call("job_complete", job.clone());
    target.call("job_resume", job.clone());
    target.wait_for("job", |event| event["event"] == "job_pending");
    target.call("job_finalize", job.clone());
    target.wait_for_status("job", "concluded");
    let kept = target.call("job_get_list", job.clone())[0].clone();
    assert_eq!((&kept["status"], &kept["goes_on_with"]), (&json!("concluded"), &json!("target")));
    let time = |name: &str| kept[name].as_f64().unwrap();
    assert!(time("started") <= time("ready") && time("ready") <= time("ended"));
    assert_eq!(target.call("job_get_history", json!({})), json!([]));
    target.call("job_dismiss", job);
    let expected = [
        "created",
        "running",
        "ready",
        "READY",
        "standby",
        "ready",
        "waiting",
        "pending",
        "PENDING",
        "COMPLETED",
        "concluded",
        "null",
    ];
    assert_eq!(told(&mut target, "job"), expected);
    let history = target.call("job_get_history", json!({}));
    assert_eq!(
        (&history[0]["ended"], &history[0]["copied_bytes"]),
        (&kept["ended"], &kept["copied_bytes"])
    );
}

#[test]
fn a_job_that_fails() {
    let (_dir, mut target) = served();
    target.malloc("a", 1);
    target.malloc("below", 1);
    target.call("bdev_error_create", json!({ "base_name": "below" }));
    let inject =
        json!({ "name": "EE_below", "io_type": "write", "error_type": "failure", "num": 1 });
    target.call("bdev_error_inject_error", inject.clone());
    let inject_zeroes =
        json!({ "name": "EE_below", "io_type": "write_zeroes", "error_type": "failure", "num": 1 });
    target.call("bdev_error_inject_error", inject_zeroes);
    let params = json!({ "source": "a", "target": "EE_below", "job_id": "job", "on_target_error": "report" });
    target.call("bdev_mirror_start", params);
    let ended = target.wait_for("job", |event| event["event"] == "job_completed");
    target.wait_for_status("job", "null");
    assert_eq!(
        told(&mut target, "job"),
        ["created", "running", "ERROR", "aborting", "COMPLETED", "concluded", "null"]
    );
    assert!(ended["error"].as_str().unwrap().starts_with("target write"), "{ended}");
    assert_eq!(ended["phase"], "failed");
    let error = target.wait_for("job", |event| event["event"] == "job_error");
    assert_eq!((&error["side"], &error["action"]), (&json!("target"), &json!("report")));
    assert!(error["operation"].as_str().unwrap().starts_with("write"), "{error}");
    assert_eq!(error["count"], 1);
    let history = target.call("job_get_history", json!({}));
    assert_eq!((&history[0]["error"], &history[0]["phase"]), (&ended["error"], &json!("failed")));
}

#[test]
fn the_history_keeps_the_last_jobs_and_no_more() {
    let (_dir, mut target) = served();
    target.malloc("a", 1);
    target.malloc("b", 1);
    for number in 0..70 {
        let id = format!("job{number}");
        target.call("bdev_mirror_start", json!({ "source": "a", "target": "b", "job_id": id }));
        target.call("job_cancel", json!({ "job_id": id }));
        target.wait_for_status(&id, "null");
        target.wait_until_free("b");
    }
    let history = target.call("job_get_history", json!({}));
    let ids: Vec<&str> =
        history.as_array().unwrap().iter().map(|job| job["id"].as_str().unwrap()).collect();
    assert_eq!((ids.len(), ids[0], ids[63]), (64, "job6", "job69"));
}

#[test]
fn who_waits_for_an_event_gets_it_when_it_comes_and_nothing_when_it_does_not() {
    let (_dir, mut target) = served();
    let mut other = Client::connect(&target.dir.join("rpc.sock")).unwrap();
    let nothing = target.call("job_get_events", json!({ "timeout_ms": 10 }));
    assert_eq!(nothing, json!({ "sequence": 0, "missed": 0, "events": [] }));
    let waiting = std::thread::spawn(move || {
        let params = json!({ "job_id": "job", "timeout_ms": 60_000 });
        other.call("job_get_events", params).unwrap().result
    });
    start(&mut target, json!({}));
    let page = waiting.join().unwrap();
    assert_eq!(page["events"][0]["status"], "created", "{page}");
}

#[test]
fn a_slow_subscriber_misses_events_and_is_told_how_many() {
    let (_dir, mut target) = served();
    start(&mut target, json!({}));
    target.wait_for_status("job", "ready");
    let before =
        target.call("job_get_events", json!({ "after": u64::MAX }))["sequence"].as_u64().unwrap();
    let mut subscriber = Client::connect(&target.dir.join("rpc.sock")).unwrap();
    subscriber.set_timeout(Some(DEADLINE)).unwrap();
    subscriber.call("job_subscribe", json!({})).unwrap();
    // It does not read. What does not fit its socket, the queue and the log is dropped.
    let holder = "h".repeat(64);
    for _ in 0..6000 {
        target.call("job_hold", json!({ "job_id": "job", "holder": holder, "ttl_ms": 60_000 }));
        target.call("job_release", json!({ "job_id": "job", "holder": holder }));
    }
    let last = before + 12_000;
    let (mut seen, mut missed) = (before, 0);
    while seen < last {
        let event = subscriber.next_notification().unwrap();
        match event["event"].as_str().unwrap() {
            "events_missed" => {
                let count = event["count"].as_u64().unwrap();
                (seen, missed) = (seen + count, missed + count);
            }
            _ => {
                seen += 1;
                assert_eq!(event["sequence"], seen, "no event is lost in silence");
            }
        }
    }
    assert!(missed > 0, "the subscriber was not slow enough");
    // It hears of what comes next.
    target.call("job_cancel", json!({ "job_id": "job" }));
    assert_eq!(subscriber.next_notification().unwrap()["status"], "aborting");

    for _ in 1..16 {
        subscriber.call("job_subscribe", json!({})).unwrap();
    }
    let error = subscriber.call("job_subscribe", json!({})).unwrap_err();
    assert!(error.to_string().contains("16 subscriptions"), "{error}");
}
