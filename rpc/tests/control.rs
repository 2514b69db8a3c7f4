//! The control plane from outside: a target on a thread, calls through its socket.

#![allow(clippy::unwrap_used)] // a test may panic; clippy knows that only of functions it sees as tests

mod common;

use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Instant;

use resilver_rpc::Client;
use resilver_rpc::error::code;
use serde_json::{Value, json};

use common::{DEADLINE, MIB, Served, served};

#[test]
fn bdevs_are_made_listed_resized_and_deleted_with_spdks_codes() {
    let (_dir, mut target) = served();
    target.call("bdev_null_create", json!({ "name": "n", "num_blocks": 2048, "block_size": 512 }));
    target.malloc("m", 1);
    let list = target.call("bdev_get_bdevs", json!({}));
    let names: Vec<&str> =
        list.as_array().unwrap().iter().map(|it| it["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["n", "m"]);
    assert_eq!((&list[1]["num_blocks"], &list[1]["claimed"]), (&json!(2048), &json!(false)));
    target.call("bdev_null_resize", json!({ "name": "n", "new_size": 2 }));
    assert_eq!(target.call("bdev_get_bdevs", json!({ "name": "n" }))[0]["num_blocks"], 4096);

    let again = json!({ "name": "n", "num_blocks": 1, "block_size": 512 });
    assert_eq!(target.refused("bdev_null_create", again).code, code::EXISTS);
    assert_eq!(target.refused("bdev_null_delete", json!({ "name": "x" })).code, code::NO_DEVICE);
    assert_eq!(
        target.refused("bdev_null_delete", json!({ "name": "m" })).code,
        code::INVALID_PARAMS
    );
    assert_eq!(target.refused("bdev_nil_delete", json!({})).code, code::METHOD_NOT_FOUND);
    target.call("bdev_null_delete", json!({ "name": "n" }));
    assert_eq!(target.refused("bdev_get_bdevs", json!({ "name": "n" })).code, code::NO_DEVICE);
}

#[test]
fn what_is_in_use_is_neither_deleted_nor_taken_twice() {
    let (_dir, mut target) = served();
    target.malloc("base", 1);
    target.call("bdev_passthru_create", json!({ "name": "top", "base_bdev_name": "base" }));
    let busy = target.refused("bdev_malloc_delete", json!({ "name": "base" }));
    assert_eq!(busy.code, code::BUSY);
    assert!(busy.message.contains("bdev 'top' is stacked on it"), "{busy}");
    let second = json!({ "name": "other", "base_bdev_name": "base" });
    assert_eq!(target.refused("bdev_passthru_create", second).code, code::BUSY);
    let below = json!({ "ctrlr": "c0", "dev_name": "base" });
    assert_eq!(target.refused("vhost_create_blk_controller", below).code, code::BUSY);

    target.call("vhost_create_blk_controller", json!({ "ctrlr": "c1", "dev_name": "top" }));
    assert_eq!(target.refused("bdev_passthru_delete", json!({ "name": "top" })).code, code::BUSY);
    let same = json!({ "ctrlr": "c1", "dev_name": "top" });
    assert_eq!(target.refused("vhost_create_blk_controller", same).code, code::EXISTS);
    let mask = json!({ "ctrlr": "c2", "dev_name": "top", "cpumask": "0x80" });
    assert_eq!(target.refused("vhost_create_blk_controller", mask).code, code::INVALID_PARAMS);
    let list = target.call("vhost_get_controllers", json!({}));
    assert_eq!(list[0]["backend_specific"]["block"]["bdev"], "top");
    assert!(target.dir.join("vhost/c1").exists());
    target.call("vhost_delete_controller", json!({ "ctrlr": "c1" }));
    assert!(!target.dir.join("vhost/c1").exists());
    target.call("bdev_passthru_delete", json!({ "name": "top" }));
    target.call("bdev_malloc_delete", json!({ "name": "base" }));
}

#[test]
fn a_mirror_is_refused_in_the_reply_for_whatever_is_wrong_with_it() {
    let (_dir, mut target) = served();
    target.malloc("source", 4);
    target.malloc("small", 2);
    target.malloc("target", 4);
    let path = target.file("file", 4);
    let mut refused = |params: Value| target.refused("bdev_mirror_start", params);
    let start = |target: &str| json!({ "source": "source", "target": target });
    assert_eq!(refused(start("nobody")).code, code::NO_DEVICE);
    assert!(refused(start("source")).message.contains("Can't mirror node into itself"));
    assert!(refused(start("small")).message.contains("at least the source's size"));
    let twice = json!({ "source": "source", "target_path": path });
    assert_eq!(refused(twice).code, code::BUSY);
    let there = json!({ "source": "source", "target_path": path, "target_mode": "create" });
    assert_eq!(refused(there).code, code::BUSY);
    let id = json!({ "source": "source", "target": "target", "job_id": "9bad" });
    assert!(refused(id).message.contains("Invalid job ID '9bad'"));
    let never = json!({ "source": "source", "target": "target", "target_timeout_ms": 0 });
    assert_eq!(refused(never).data.unwrap()["parameter"], "target_timeout_ms");
    let odd = json!({ "source": "source", "target": "target", "granularity": 1000 });
    assert!(refused(odd).message.contains("expects a power of 2"));
    let alone = json!({ "source": "source", "target": "target", "observer_policy": "drop" });
    assert_eq!(refused(alone).data.unwrap()["parameter"], "observer_policy");
    let never = json!({ "source": "source", "target": "target", "sync": "none", "verify_before_complete": true });
    assert_eq!(refused(never).data.unwrap()["parameter"], "verify_before_complete");
    let later = json!({ "source": "source", "target": "target", "keep_source": "track" });
    assert_eq!(refused(later).data.unwrap()["kind"], "not_supported_yet");
    let neither = json!({ "source": "source" });
    assert_eq!(refused(neither).code, code::INVALID_PARAMS);
    // Nothing of all that left anything behind.
    assert_eq!(target.call("job_get_list", json!({})), json!([]));
    for name in ["source", "small", "target"] {
        target.call("bdev_malloc_delete", json!({ "name": name }));
    }
}

#[test]
fn a_target_that_only_observes_is_finished_and_never_switched_to() {
    let (_dir, mut target) = served();
    target.malloc("disk", 4);
    target.malloc("watcher", 4);
    let start = json!({ "source": "disk", "target": "watcher", "job_id": "watch", "sync": "none", "observer_policy": "drop" });
    target.call("bdev_mirror_start", start);
    target.wait_for_status("watch", "ready");
    let job = &target.call("job_get_list", json!({ "job_id": "watch" }))[0];
    assert_eq!((&job["sync"], &job["observer_policy"]), (&json!("none"), &json!("drop")));
    assert_eq!((&job["total_bytes"], &job["dropped_writes"]), (&json!(0), &json!(0)));
    let complete = target.refused("job_complete", json!({ "job_id": "watch" }));
    assert!(complete.message.contains("bdev_mirror_finish"), "{complete}");
    let change = json!({ "job_id": "watch", "copy_mode": "background" });
    assert!(target.refused("job_change", change).message.contains("observer policy"));
    let verify = json!({ "source": "disk", "target": "watcher" });
    assert!(target.refused("bdev_verify_start", verify).message.contains("new writes only"));
    target.call("bdev_mirror_finish", json!({ "job_id": "watch" }));
    target.wait_for("watch", |event| event["event"] == "job_completed");
    target.call("bdev_malloc_delete", json!({ "name": "watcher" }));
}

#[test]
fn who_hears_of_a_jobs_end_may_go_on_with_its_legs_at_once() {
    let (_dir, mut target) = served();
    target.file("disk", 4);
    target.malloc("below", 4);
    let slow = json!({
        "name": "slow", "base_bdev_name": "below", "avg_read_latency": 0, "p99_read_latency": 0,
        "avg_write_latency": 300_000, "p99_write_latency": 300_000,
    });
    target.call("bdev_delay_create", slow);
    // The second start finds the legs as the first job has left them.
    for job in ["first", "second"] {
        let start = json!({ "source": "disk", "target": "slow", "job_id": job });
        target.call("bdev_mirror_start", start);
        let begun = Instant::now();
        while target.call("job_get_list", json!({ "job_id": job }))[0]["in_flight_bytes"] == 0 {
            assert!(begun.elapsed() < DEADLINE, "nothing is copied");
        }
        target.call("job_cancel", json!({ "job_id": job }));
        target.wait_for(job, |event| event["event"] == "job_completed");
    }
    target.call("bdev_delay_delete", json!({ "name": "slow" }));
}

#[test]
fn a_disk_is_mirrored_switched_over_and_the_old_one_refused_after_a_restart() {
    let (dir, mut target) = served();
    let old = target.file("disk", 16);
    let new = dir.path().join("new.raw");
    target.call("vhost_create_blk_controller", json!({ "ctrlr": "vm", "dev_name": "disk" }));
    let start =
        json!({ "source": "disk", "target_path": new, "target_mode": "create", "job_id": "move" });
    assert_eq!(target.call("bdev_mirror_start", start.clone()), json!({ "job_id": "move" }));
    assert_eq!(target.refused("bdev_mirror_start", start).code, code::EXISTS);
    target.wait_for_status("move", "ready");

    let job = &target.call("job_get_list", json!({ "job_id": "move" }))[0];
    assert_eq!((&job["total_bytes"], &job["dirty_bytes"]), (&json!(16 * MIB), &json!(0)));
    assert_eq!(job["phase"], "ready");
    let resize = json!({ "name": "disk", "new_size": 32 * MIB });
    assert_eq!(target.refused("bdev_uring_resize", resize).code, code::BUSY);
    assert_eq!(target.refused("bdev_uring_delete", json!({ "name": "disk" })).code, code::BUSY);
    assert_eq!(target.refused("job_finalize", json!({ "job_id": "move" })).code, code::STATE);
    let mirror = target.call("bdev_get_bdevs", json!({ "name": "mirror-move" }));
    assert_eq!(mirror[0]["driver_specific"]["mirror"]["target"], "move-target");

    let answer = target.client.call("job_complete", json!({ "job_id": "move" })).unwrap();
    assert_eq!((answer.result, answer.warning), (json!(true), None));
    let ended = target.wait_for("move", |event| event["event"] == "job_completed");
    assert_eq!((&ended["goes_on_with"], &ended["error"]), (&json!("target"), &Value::Null));
    let controllers = target.call("vhost_get_controllers", json!({}));
    assert_eq!(controllers[0]["backend_specific"]["block"]["bdev"], "move-target");
    assert_eq!(target.call("job_get_history", json!({}))[0]["id"], "move");
    assert!(std::fs::read(&old).unwrap() == std::fs::read(&new).unwrap(), "the disks differ");

    // The old disk is open still, and is not served again all the same.
    let stale = json!({ "ctrlr": "old", "dev_name": "disk" });
    assert_eq!(target.refused("vhost_create_blk_controller", stale).code, code::SUPERSEDED);
    let config = target.call("save_config", json!({}));
    drop(target);

    let mut target = Served::start(dir.path(), Some(dir.path().join("state")));
    let open = json!({ "name": "disk", "filename": old });
    let refused = target.refused("bdev_uring_create", open.clone());
    assert_eq!((refused.code, &refused.data.unwrap()["generation"]), (code::SUPERSEDED, &json!(1)));
    assert_eq!(target.call("load_config", config), 2);
    let controllers = target.call("vhost_get_controllers", json!({}));
    assert_eq!(controllers[0]["backend_specific"]["block"]["bdev"], "move-target");
    target.call("state_forget", json!({ "path": old }));
    target.call("bdev_uring_create", open);
}

#[test]
fn a_configuration_from_before_the_switch_serves_everything_but_the_superseded_disk() {
    let (dir, mut target) = served();
    target.file("moved", 4);
    target.file("stays", 4);
    for disk in ["moved", "stays"] {
        target.call(
            "vhost_create_blk_controller",
            json!({ "ctrlr": format!("{disk}.sock"), "dev_name": disk }),
        );
    }
    let before = target.call("save_config", json!({}));
    let new = dir.path().join("new.raw");
    target.call(
        "bdev_mirror_start",
        json!({ "source": "moved", "target_path": new, "target_mode": "create" }),
    );
    target.wait_for_status("moved", "ready");
    target.call("job_complete", json!({ "job_id": "moved" }));
    target.wait_for("moved", |event| event["event"] == "job_completed");
    drop(target);

    let mut target = Served::start(dir.path(), Some(dir.path().join("state")));
    let failed = target.refused("load_config", before);
    let failures = failed.data.unwrap()["failures"].clone();
    assert_eq!(failures.as_array().unwrap().len(), 2, "{failures}");
    assert_eq!(failures[0]["error"]["data"]["kind"], "superseded");
    assert!(failures[0]["error"]["message"].as_str().unwrap().contains("new.raw"));
    let controllers = target.call("vhost_get_controllers", json!({}));
    assert_eq!(controllers.as_array().unwrap().len(), 1);
    assert_eq!(controllers[0]["ctrlr"], "stays.sock");
}

#[test]
fn without_a_state_directory_completing_warns() {
    let dir = tempfile::tempdir().unwrap();
    let mut target = Served::start(dir.path(), None);
    target.file("disk", 4);
    let new = dir.path().join("new.raw");
    let start = json!({
        "source": "disk", "target_path": new, "target_mode": "create", "auto_dismiss": false, "auto_finalize": false,
    });
    target.call("bdev_mirror_start", start);
    target.wait_for_status("disk", "ready");
    let answer = target.client.call("job_complete", json!({ "job_id": "disk" })).unwrap();
    assert_eq!(answer.result, true);
    assert!(answer.warning.unwrap().contains("--state-dir"));
    target.wait_for_status("disk", "pending");
    target.call("job_finalize", json!({ "job_id": "disk" }));
    target.wait_for("disk", |event| event["event"] == "job_completed");
    let job = &target.call("job_get_list", json!({ "job_id": "disk" }))[0];
    assert_eq!((&job["status"], &job["phase"]), (&json!("concluded"), &json!("completed")));
    assert_eq!(job["warnings"].as_array().unwrap().len(), 1);
    assert_eq!(target.refused("job_pause", json!({ "job_id": "disk" })).code, code::STATE);
    target.call("job_dismiss", json!({ "job_id": "disk" }));
    assert_eq!(target.refused("job_dismiss", json!({ "job_id": "disk" })).code, code::NOT_FOUND);
}

#[test]
fn a_cancelled_mirror_leaves_the_source_and_closes_what_was_made_for_it() {
    let (dir, mut target) = served();
    target.file("disk", 64);
    let new = dir.path().join("new.raw");
    let start =
        json!({ "source": "disk", "target_path": new, "target_mode": "create", "speed": 4096 });
    target.call("bdev_mirror_start", start);
    let early = target.refused("job_complete", json!({ "job_id": "disk" }));
    assert!(early.message.contains("cannot accept command verb 'complete'"), "{early}");
    target.call("job_cancel", json!({ "job_id": "disk" }));
    let ended = target.wait_for("disk", |event| event["event"] == "job_completed");
    assert_eq!(
        (&ended["goes_on_with"], &ended["error"]),
        (&json!("source"), &json!("Operation canceled"))
    );
    // Its channels may take a moment to come back.
    let begun = Instant::now();
    while target.client.call("bdev_get_bdevs", json!({ "name": "disk-target" })).is_ok() {
        assert!(begun.elapsed() < DEADLINE, "the target stays open");
    }
    target.call("bdev_uring_create", json!({ "name": "mine", "filename": new }));
    target.call("bdev_uring_delete", json!({ "name": "disk" }));
}

#[test]
fn pipelined_requests_batches_and_nonsense_are_answered_as_json_rpc_has_it() {
    let (_dir, target) = served();
    let socket = target.dir.join("rpc.sock");
    assert_eq!(std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    let exchange = |request: &str| {
        let mut stream = UnixStream::connect(&socket).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let values = serde_json::Deserializer::from_str(&text).into_iter::<Value>();
        values.map(Result::unwrap).collect::<Vec<_>>()
    };
    let call = |id: u64| format!(r#"{{"jsonrpc":"2.0","id":{id},"method":"spdk_get_version"}}"#);
    let answers = exchange(&format!("{}{}\n{}", call(1), call(2), call(3)));
    assert_eq!(answers.iter().map(|it| it["id"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 2, 3]);
    let batch = exchange(&format!(
        r#"[{},{{"jsonrpc":"2.0","method":"framework_start_init"}},{{"jsonrpc":"2.0","id":9,"method":"x"}}]"#,
        call(7)
    ));
    assert_eq!(batch.len(), 1);
    assert_eq!((&batch[0][0]["id"], &batch[0][1]["error"]["code"]), (&json!(7), &json!(-32601)));
    assert_eq!(batch[0].as_array().unwrap().len(), 2);
    assert_eq!(exchange("[]")[0]["error"]["code"], code::INVALID_REQUEST);
    let many = exchange(&format!("[{}1]", "1,".repeat(1024)));
    assert_eq!((many.len(), &many[0]["error"]["code"]), (1, &json!(code::INVALID_REQUEST)));
    assert_eq!(exchange("{\"a\":}")[0]["error"]["code"], code::PARSE);
    assert_eq!(exchange("hello")[0]["error"]["code"], code::PARSE);
    let positional = r#"{"jsonrpc":"2.0","id":1,"method":"bdev_get_bdevs","params":["a"]}"#;
    assert_eq!(exchange(positional)[0]["error"]["code"], code::INVALID_PARAMS);
    assert!(exchange(r#"{"jsonrpc":"2.0","method":"spdk_get_version"}"#).is_empty());
    // As much as is read at once: the end is there already when the request has been answered.
    let padded = call(1) + &" ".repeat((64 << 10) - call(1).len());
    for _ in 0..50 {
        assert_eq!(exchange(&padded).len(), 1, "who asks no more is answered");
    }
}

#[test]
fn a_subscriber_hears_of_every_change() {
    let (_dir, mut target) = served();
    target.malloc("a", 1);
    target.malloc("b", 1);
    let mut subscriber = Client::connect(&target.dir.join("rpc.sock")).unwrap();
    subscriber.set_timeout(Some(DEADLINE)).unwrap();
    subscriber.call("job_subscribe", json!({})).unwrap();
    target.call("bdev_mirror_start", json!({ "source": "a", "target": "b" }));
    let mut sequence = 0;
    loop {
        let event = subscriber.next_notification().unwrap();
        let next = event["sequence"].as_u64().unwrap();
        assert_eq!(next, sequence + 1);
        sequence = next;
        if event["status"] == "ready" {
            break;
        }
    }
}

#[test]
fn a_held_job_is_not_ended_before_all_holders_let_go() {
    let (_dir, mut target) = served();
    target.malloc("a", 1);
    target.malloc("b", 1);
    let start = json!({ "source": "a", "target": "b", "job_id": "job", "auto_finalize": false });
    target.call("bdev_mirror_start", start);
    target.wait_for_status("job", "ready");
    let hold =
        |holder: &str, ttl_ms: u64| json!({ "job_id": "job", "holder": holder, "ttl_ms": ttl_ms });
    let release = |holder: &str| json!({ "job_id": "job", "holder": holder });
    for bad in [hold("vmm", 0), hold("", 1000), hold("a b", 1000), hold("vmm", u64::MAX)] {
        assert_eq!(target.refused("job_hold", bad).code, code::INVALID_PARAMS);
    }
    target.call("job_hold", hold("vmm", 30_000));
    target.call("job_hold", hold("backup", 60_000));
    let job = json!({ "job_id": "job" });
    for verb in ["job_complete", "bdev_mirror_finish", "job_cancel"] {
        let held = target.refused(verb, job.clone());
        assert!(held.message.contains("held by 'backup' for another "), "{held}");
        assert!(held.message.contains("by 'vmm' for another "), "{held}");
        assert_eq!((held.code, &held.data.unwrap()["kind"]), (code::BUSY, &json!("job_held")));
    }
    // Only what would end it is held up.
    target.call("job_set_speed", json!({ "job_id": "job", "speed": 1 }));
    target.call("job_pause", job.clone());
    target.call("job_resume", job.clone());
    let holds = target.call("job_get_list", job.clone())[0]["holds"].clone();
    assert_eq!((&holds[0]["holder"], &holds[1]["holder"]), (&json!("backup"), &json!("vmm")));
    assert!(holds[1]["ttl_ms"].as_u64().unwrap() <= 30_000);

    target.call("job_release", release("vmm"));
    assert_eq!(target.refused("job_release", release("vmm")).data.unwrap()["kind"], "not_held");
    let held = target.refused("job_complete", job.clone());
    assert!(!held.message.contains("vmm"), "{held}");
    // The last hold is made shorter and runs out by itself.
    target.call("job_hold", hold("backup", 1));
    let expired = target.wait_for("job", |event| event["event"] == "job_hold_expired");
    assert_eq!(expired["holder"], "backup");
    target.call("job_complete", job.clone());
    target.wait_for_status("job", "pending");
    target.call("job_hold", hold("vmm", 30_000));
    assert_eq!(target.refused("job_finalize", job.clone()).code, code::BUSY);
    target.call("job_release", release("vmm"));
    target.call("job_finalize", job.clone());
    target.wait_for("job", |event| event["event"] == "job_completed");
    let events = target.call("job_get_events", json!({}))["events"].clone();
    let of_holds: Vec<(&str, &str, bool)> = events
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|it| {
            Some((it["event"].as_str()?, it["holder"].as_str()?, it["renewed"] == true))
        })
        .collect();
    let expected = [
        ("job_held", "vmm", false),
        ("job_held", "backup", false),
        ("job_released", "vmm", false),
        ("job_held", "backup", true),
        ("job_hold_expired", "backup", false),
        ("job_held", "vmm", false),
        ("job_released", "vmm", false),
    ];
    assert_eq!(of_holds, expected);
}

#[test]
fn a_hold_comes_too_late_for_a_switch_that_was_accepted_and_never_keeps_the_target_from_stopping() {
    let (_dir, mut target) = served();
    target.malloc("a", 1);
    target.malloc("b", 1);
    let start = json!({ "source": "a", "target": "b", "job_id": "job" });
    target.call("bdev_mirror_start", start.clone());
    target.wait_for_status("job", "ready");
    let hold = json!({ "job_id": "job", "holder": "vmm", "ttl_ms": 60_000 });
    let job = json!({ "job_id": "job" });
    target.call("job_pause", job.clone());
    target.call("job_complete", job.clone());
    let late = target.refused("job_hold", hold.clone());
    assert_eq!(late.message, "Job 'job' cannot be held: 'complete' was accepted before");
    target.call("job_resume", job.clone());
    target.wait_for("job", |event| event["event"] == "job_completed");
    assert_eq!(target.refused("job_hold", hold.clone()).code, code::NOT_FOUND);

    target.wait_until_free("a");
    let back = json!({ "source": "b", "target": "a", "job_id": "job" });
    target.call("bdev_mirror_start", back);
    target.call("job_hold", hold);
    // Dropping the target waits for its end.
}

#[test]
fn metrics_are_scraped_while_a_mirror_runs() {
    let (_dir, mut target) = served();
    target.malloc("a", 8);
    target.malloc("b", 8);
    target.call("vhost_create_blk_controller", json!({ "ctrlr": "vm", "dev_name": "a" }));
    target.call("bdev_mirror_start", json!({ "source": "a", "target": "b", "job_id": "job" }));
    target.wait_for_status("job", "ready");
    let mut stream = std::net::TcpStream::connect(target.metrics.unwrap()).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    for line in [
        r#"resilver_mirror_state{job="job",state="ready"} 1"#,
        r#"resilver_mirror_state{job="job",state="running"} 0"#,
        r#"resilver_mirror_size_bytes{job="job"} 8388608"#,
        r#"resilver_mirror_dirty_bytes{job="job"} 0"#,
        r#"resilver_bdev_read_ops_total{bdev="a"} 0"#,
        r#"resilver_vhost_requests_total{ctrlr="vm"} 0"#,
        r#"resilver_reactor_busy_seconds_total{core="0"}"#,
    ] {
        assert!(text.contains(line), "{line} is missing in {text}");
    }
}

#[test]
fn a_mirror_is_verified_by_a_job_of_its_own_that_ends_by_itself() {
    let (_dir, mut target) = served();
    target.malloc("a", 8);
    target.malloc("b", 8);
    let legs = json!({ "source": "a", "target": "b", "auto_dismiss": false });
    let refused = target.refused("bdev_verify_start", legs.clone());
    assert!(refused.message.contains("start one with bdev_mirror_start"), "{}", refused.message);
    target.call("bdev_mirror_start", json!({ "source": "a", "target": "b", "job_id": "job" }));
    target.wait_for_status("job", "ready");
    assert_eq!(target.call("bdev_verify_start", legs), json!({ "job_id": "verify-job" }));
    target.wait_for_status("verify-job", "concluded");
    let job = target.call("job_get_list", json!({ "job_id": "verify-job" }))[0].clone();
    assert_eq!((&job["type"], &job["phase"]), (&json!("verify"), &json!("completed")));
    assert_eq!((&job["checked_bytes"], &job["mismatched_bytes"]), (&json!(8 * MIB), &json!(0)));
    target.call("job_dismiss", json!({ "job_id": "verify-job" }));
    let history = target.call("job_get_history", json!({}));
    assert_eq!(history[0]["id"], "verify-job");
}

#[test]
fn a_controller_can_connect_to_where_its_front_end_listens() {
    let (dir, mut target) = served();
    target.malloc("m", 1);
    let mut create = json!({ "ctrlr": "vm", "dev_name": "m", "connect": "vm.sock" });
    let refused = target.refused("vhost_create_blk_controller", create.clone());
    assert!(refused.message.contains("absolute"), "{refused}");
    let path = dir.path().join("monitor.sock");
    create["connect"] = json!(path);
    target.call("vhost_create_blk_controller", create);
    let controllers = target.call("vhost_get_controllers", json!({}));
    assert_eq!(
        (&controllers[0]["socket"], &controllers[0]["connects"]),
        (&json!(path), &json!(true))
    );
    let config = target.call("save_config", json!({})).to_string();
    assert!(config.contains("\"connect\""), "{config}");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let (_stream, _) = listener.accept().unwrap();
    target.call("vhost_delete_controller", json!({ "ctrlr": "vm" }));
    assert!(path.exists(), "the socket is the front end's");
}

#[test]
fn a_configuration_is_a_file_that_fits_in_memory() {
    let (dir, mut target) = served();
    let long = dir.path().join("long.json");
    std::fs::File::create(&long).unwrap().set_len(65 * MIB).unwrap();
    let refused = target.refused("load_config", json!({ "filename": long })).message;
    assert!(refused.contains("more than 67108864 bytes"), "{refused}");
    // A pipe would be waited for, a device read for ever, or replaced.
    let pipe = dir.path().join("pipe");
    let mode = rustix::fs::Mode::from(0o600);
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    for path in [pipe, dir.path().to_owned(), PathBuf::new()] {
        for method in ["load_config", "save_config"] {
            let refused = target.refused(method, json!({ "filename": path })).message;
            assert!(refused.contains("a regular file"), "{refused}");
        }
    }
}
