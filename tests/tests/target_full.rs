//! The target's file system fills up: the guest sees nothing of it, the job says so and how to go on, and goes on once there
//! is room.

use std::fs::File;
use std::os::unix::fs::FileExt as _;

use resilver_tests::e2e::driver::BLOCK;
use resilver_tests::e2e::guest::{GuestConfig, assert_holds, fill};
use resilver_tests::e2e::tools::missing;
use resilver_tests::e2e::{Guest, Server};
use resilver_tests::mounts::{self, Mount};
use resilver_tests::skip;
use serde_json::json;

const MIB: u64 = 1 << 20;
const BLOCKS: u64 = 128 * MIB / BLOCK as u64;

#[test]
fn a_full_target_pauses_the_mirror_and_room_lets_it_go_on_without_a_guest_error() {
    if let Some(program) = missing(&["mkfs.ext4", "mount", "losetup"]) {
        let reason = format!("{program} is not installed");
        return skip("target_full", &reason, "apt-get install e2fsprogs mount");
    }
    if !mounts::available("target_full") {
        return;
    }
    let mounted = Mount::ext4(256 * MIB);
    // Leaves room for about half of the disk.
    let filler = mounted.path().join("filler");
    let in_the_way = File::create(&filler).unwrap();
    rustix::fs::fallocate(&in_the_way, rustix::fs::FallocateFlags::empty(), 0, 160 * MIB).unwrap();
    drop(in_the_way);

    let mut server = Server::start();
    let source = server.path("source.raw");
    let target = mounted.path().join("target.raw");
    let disk = File::create(&source).unwrap();
    let mut bytes = vec![0; BLOCK];
    for number in 0..BLOCKS {
        fill(&mut bytes, number as usize, 0);
        disk.write_all_at(&bytes, number * BLOCK as u64).unwrap();
    }
    drop(disk);
    server.serve_file("vm", &source, "vm.sock");
    let blocks: Vec<u64> = (0..BLOCKS).collect();
    let guest = Guest::start(GuestConfig {
        socket: server.controller("vm.sock"),
        blocks: blocks.clone(),
        depth: 16,
        seed: 1,
        table: None,
    });
    guest.run_for(100);

    server.start_mirror(&json!({
        "source": "vm", "target_path": target, "target_mode": "create", "target_format": "raw",
        "job_id": "move", "sync": "full", "copy_mode": "write-blocking",
        "on_target_error": "enospc", "auto_dismiss": false,
    }));
    let full = |job: &serde_json::Value| job["io_status"] == "nospace";
    let job = server.wait_for_job("move", "out of room", full);
    let copied_before = job["copied_bytes"].as_u64().unwrap();
    assert!(copied_before > 16 * MIB, "{job}");
    // In QEMU's words a job that an error stopped is paused.
    let job = server.wait_for_status("move", "paused");
    let error = job["error"].to_string();
    assert!(error.contains("No space left on device"), "{job}");
    assert!(error.contains("job_resume"), "it must say how to go on: {job}");

    // The guest feels nothing: thousands of writes while there is no room.
    guest.run_for(5000);
    let job = server.job("move");
    assert_eq!(job["status"], "paused", "{job}");
    let refused = server.try_call("job_complete", json!({ "job_id": "move" })).unwrap_err();
    assert!(refused.message.contains("cannot accept command verb 'complete'"), "{refused}");

    // Resumed without room it stops again, and still nobody is hurt.
    server.call("job_resume", json!({ "job_id": "move" }));
    server.wait_for_job("move", "stopped again", |job| job["status"] == "paused" && full(job));
    guest.run_for(1000);

    std::fs::remove_file(&filler).unwrap();
    server.call("job_resume", json!({ "job_id": "move" }));
    let job = server.wait_for_status("move", "ready");
    assert_eq!(job["io_status"], "ok", "{job}");
    let copied = job["copied_bytes"].as_u64().unwrap();
    assert!(copied < 2 * BLOCKS * BLOCK as u64, "it began again from the start: {job}");
    guest.run_for(1000);
    server.call("job_complete", json!({ "job_id": "move" }));
    server.wait_for_status("move", "concluded");
    guest.run_for(1000);
    let report = guest.finish();
    assert!(report.verified > 1000);

    assert_eq!(server.served_bdev("vm.sock"), "move-target");
    let _files = server.stop();
    assert_holds(&target, &blocks, &report.generations);
}
