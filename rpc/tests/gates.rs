//! What is refused while a mirror runs, at once and with the reason, and what works again when it is over.

#![allow(clippy::unwrap_used)] // a test may panic; clippy knows that only of functions it sees as tests

mod common;

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use resilver_rpc::RpcError;
use resilver_rpc::error::code;
use resilver_vhost::front_end::{Connection, ConnectionConfig, DataBuffer, Request};
use serde_json::{Value, json};

use common::{MIB, Served, served};

fn null(target: &mut Served, name: &str) {
    let params = json!({ "name": name, "num_blocks": 2048, "block_size": 512 });
    target.call("bdev_null_create", params);
}

/// The refusal says which job is in the way.
fn names_job(error: &RpcError, job: &str) {
    assert!(error.message.contains(&format!("job '{job}'")), "{error}");
}

#[test]
fn what_a_mirror_is_about_stays_until_it_is_over() {
    let (_dir, mut target) = served();
    for name in ["a", "b", "c"] {
        null(&mut target, name);
    }
    target.call("vhost_create_blk_controller", json!({ "ctrlr": "vm", "dev_name": "a" }));
    target.call("bdev_mirror_start", json!({ "source": "a", "target": "b", "job_id": "job" }));
    target.wait_for_status("job", "ready");
    let gone = target.refused("vhost_delete_controller", json!({ "ctrlr": "vm" }));
    assert_eq!((gone.code, &gone.data.unwrap()["job_id"]), (code::BUSY, &json!("job")));
    let mut busy = |method: &str, params: Value| {
        let error = target.refused(method, params);
        assert_eq!(error.code, code::BUSY, "{error}");
        names_job(&error, "job");
    };
    for name in ["b", "mirror-job"] {
        for readonly in [false, true] {
            let export = json!({ "ctrlr": "x", "dev_name": name, "readonly": readonly });
            busy("vhost_create_blk_controller", export);
        }
    }
    for name in ["a", "b", "mirror-job"] {
        for pair in [(name, "c"), ("c", name)] {
            busy("bdev_mirror_start", json!({ "source": pair.0, "target": pair.1, "job_id": "j" }));
            busy("bdev_mirror_start", json!({ "source": pair.0, "target": pair.1 }));
        }
        busy("bdev_null_delete", json!({ "name": name }));
        busy("bdev_null_resize", json!({ "name": name, "new_size": 2 }));
        busy("bdev_passthru_create", json!({ "name": "over", "base_bdev_name": name }));
    }
    let again = json!({ "source": "a", "target": "c", "job_id": "job" });
    assert_eq!(target.refused("bdev_mirror_start", again).code, code::EXISTS);

    target.call("job_cancel", json!({ "job_id": "job" }));
    target.wait_for("job", |event| event["event"] == "job_completed");
    target.call("vhost_delete_controller", json!({ "ctrlr": "vm" }));
    target.call("bdev_mirror_start", json!({ "source": "a", "target": "c" }));
}

#[test]
fn the_same_file_by_another_path_is_no_target() {
    let (dir, mut target) = served();
    let path = target.file("disk", 4);
    let at = |name: &str| dir.path().join(name);
    symlink(&path, at("symlink")).unwrap();
    symlink("symlink", at("symlink-to-symlink")).unwrap();
    std::fs::hard_link(&path, at("hard-link")).unwrap();
    let here = std::env::current_dir().unwrap();
    let up: PathBuf = here.components().skip(1).map(|_| "..").collect();
    let relative = up.join(path.strip_prefix("/").unwrap());
    let dotted = dir.path().join("vhost/..").join("disk.raw");
    let others: [&Path; 6] =
        [&path, &at("symlink"), &at("symlink-to-symlink"), &at("hard-link"), &relative, &dotted];
    for other in others {
        let start = json!({ "source": "disk", "target_path": other });
        let refused = target.refused("bdev_mirror_start", start);
        assert!(refused.message.contains("bdev 'disk' of this target"), "{refused}");
        let again = json!({ "name": "again", "filename": other });
        assert_eq!(target.refused("bdev_uring_create", again).code, code::BUSY);
    }
    // Stacked on each other, in both directions.
    target.call("bdev_passthru_create", json!({ "name": "over", "base_bdev_name": "disk" }));
    for (source, leg) in [("disk", "over"), ("over", "disk")] {
        let start = json!({ "source": source, "target": leg });
        assert_eq!(target.refused("bdev_mirror_start", start).code, code::BUSY);
    }
    let start = json!({ "source": "over", "target_path": at("hard-link") });
    assert_eq!(target.refused("bdev_mirror_start", start).code, code::BUSY);
    assert_eq!(target.call("job_get_list", json!({})), json!([]));
}

#[test]
fn a_file_that_somebody_else_has_locked_is_no_target() {
    let (dir, mut target) = served();
    target.malloc("disk", 4);
    let (_elsewhere, mut other) = served();
    let theirs = other.file("theirs", 4);
    let before = std::fs::read(&theirs).unwrap();
    let link = dir.path().join("link");
    symlink(&theirs, &link).unwrap();
    let refused =
        target.refused("bdev_mirror_start", json!({ "source": "disk", "target_path": link }));
    assert_eq!((refused.code, &refused.data.unwrap()["kind"]), (code::BUSY, &json!("locked")));
    assert_eq!(target.call("job_get_list", json!({})), json!([]));
    assert!(std::fs::read(&theirs).unwrap() == before);
}

#[test]
fn after_a_switch_over_the_new_disk_grows_under_the_guest_and_the_old_one_is_free() {
    let (dir, mut target) = served();
    target.file("disk", 4);
    target.call("bdev_passthru_create", json!({ "name": "over", "base_bdev_name": "disk" }));
    target.call("vhost_create_blk_controller", json!({ "ctrlr": "vm", "dev_name": "over" }));
    let socket = target.dir.join("vhost/vm");
    let (mut guest, _queues) = Connection::connect(&socket, ConnectionConfig::default()).unwrap();
    let new = dir.path().join("new.raw");
    target.call(
        "bdev_mirror_start",
        json!({ "source": "over", "target_path": new, "target_mode": "create", "job_id": "job" }),
    );
    target.wait_for_status("job", "ready");
    target.call("job_complete", json!({ "job_id": "job" }));
    target.wait_for("job", |event| event["event"] == "job_completed");

    target.call("bdev_uring_resize", json!({ "name": "job-target", "new_size": 8 * MIB }));
    assert_eq!(guest.read_config().unwrap().capacity, 8 * MIB);
    // What was recorded is the file below the bdev that was mirrored.
    let records = target.call("state_get_records", json!({}))["records"].clone();
    assert_eq!(records[0]["superseded"]["path"], json!(dir.path().join("disk.raw")));
    target.wait_until_free("over");
    target.call("bdev_passthru_delete", json!({ "name": "over" }));
    target.call("bdev_uring_delete", json!({ "name": "disk" }));
}

#[test]
fn a_hung_disk_remembers_its_dead_guest_when_its_controller_is_made_again() {
    let (_dir, mut target) = served();
    target.malloc("disk", 4);
    target.call("bdev_error_create", json!({ "base_name": "disk" }));
    let create = json!({ "ctrlr": "vm", "dev_name": "EE_disk" });
    target.call("vhost_create_blk_controller", create.clone());
    let stall = json!({ "name": "EE_disk", "io_type": "write", "error_type": "pending", "num": 9 });
    target.call("bdev_error_inject_error", stall);
    let socket = target.dir.join("vhost/vm");
    let connect = || Connection::connect(&socket, ConnectionConfig::default());
    let (guest, mut queues) = connect().unwrap();
    let data = [DataBuffer { offset: 0, length: 4096 }];
    queues[0].submit(Request::Write { offset: 0 }, &data, 1).unwrap();
    queues[0].publish();
    // The flush behind it says that the disk has the write.
    queues[0].submit(Request::Flush, &[], 2).unwrap();
    queues[0].publish();
    while queues[0].pop().unwrap().is_none() {}
    drop((guest, queues));

    let hung = target.refused("vhost_delete_controller", json!({ "ctrlr": "vm" }));
    assert_eq!(hung.data.unwrap()["kind"], "still_in_flight");
    let delete = target.refused("bdev_error_delete", json!({ "name": "EE_disk" }));
    assert_eq!(delete.code, code::BUSY);
    assert!(delete.message.contains("a guest that has gone"), "{delete}");
    target.call("vhost_create_blk_controller", create);
    let controllers = target.call("vhost_get_controllers", json!({}));
    assert_eq!(controllers[0]["left_in_flight"], 1);
    assert!(connect().is_err(), "its write could land on top of one of the next guest");

    let clear = json!({ "name": "EE_disk", "io_type": "clear" });
    target.call("bdev_error_inject_error", clear);
    let begin = Instant::now();
    while let Err(error) = connect() {
        assert!(begin.elapsed() < Duration::from_secs(30), "{error}");
    }
    target.call("vhost_delete_controller", json!({ "ctrlr": "vm" }));
    target.call("bdev_error_delete", json!({ "name": "EE_disk" }));
}

#[test]
fn a_hung_disk_that_nobody_serves_any_more_is_free_when_it_answers() {
    let (_dir, mut target) = served();
    target.malloc("disk", 4);
    target.call("bdev_error_create", json!({ "base_name": "disk" }));
    target.call("vhost_create_blk_controller", json!({ "ctrlr": "vm", "dev_name": "EE_disk" }));
    let stall = json!({ "name": "EE_disk", "io_type": "flush", "error_type": "pending", "num": 1 });
    target.call("bdev_error_inject_error", stall);
    let socket = target.dir.join("vhost/vm");
    let (guest, mut queues) = Connection::connect(&socket, ConnectionConfig::default()).unwrap();
    queues[0].submit(Request::Flush, &[], 1).unwrap();
    queues[0].publish();
    let data = [DataBuffer { offset: 0, length: 4096 }];
    queues[0].submit(Request::Read { offset: 0 }, &data, 2).unwrap();
    queues[0].publish();
    while queues[0].pop().unwrap().is_none() {}
    let hung = target.refused("vhost_delete_controller", json!({ "ctrlr": "vm" }));
    assert_eq!(hung.data.unwrap()["kind"], "still_in_flight");
    drop((guest, queues));
    let clear = json!({ "name": "EE_disk", "io_type": "clear" });
    target.call("bdev_error_inject_error", clear);
    target.wait_until_free("EE_disk");
    target.call("bdev_error_delete", json!({ "name": "EE_disk" }));
}
