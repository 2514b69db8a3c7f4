//! The front end is killed in mid-mirror: the mirror belongs to the disk, so it goes on, and who connects next finds every
//! acknowledged write.

use std::fs::File;
use std::os::unix::fs::FileExt as _;

use resilver_tests::e2e::driver::BLOCK;
use resilver_tests::e2e::guest::{assert_holds, fill, table_generations};
use resilver_tests::e2e::tools::first_difference;
use resilver_tests::e2e::{GuestProcess, Server};
use serde_json::{Value, json};

const PROGRAM: &str = env!("CARGO_BIN_EXE_guest");
const BLOCKS: u64 = 32 * 1024;
const SIZE: u64 = BLOCKS * BLOCK as u64;

#[test]
fn a_front_end_killed_in_mid_mirror_reconnects_and_the_mirror_finishes() {
    let mut server = Server::start();
    let (source, target) = (server.path("source.raw"), server.path("target.raw"));
    let table = server.path("table");
    let disk = File::create(&source).unwrap();
    let mut bytes = vec![0; BLOCK];
    for number in 0..BLOCKS {
        fill(&mut bytes, number as usize, 0);
        disk.write_all_at(&bytes, number * BLOCK as u64).unwrap();
    }
    drop(disk);
    server.serve_file("vm", &source, "vm.sock");
    let socket = server.controller("vm.sock");
    let start = |seed| GuestProcess::start(PROGRAM, &socket, &table, BLOCKS, seed);
    let guest = start(1);

    server.start_mirror(&json!({
        "source": "vm", "target_path": target, "target_mode": "create", "target_format": "raw",
        "job_id": "move", "sync": "full", "copy_mode": "write-blocking", "speed": SIZE / 4,
        "auto_dismiss": false,
    }));
    let mut guest = guest;
    for (seed, percent) in [(2, 10), (3, 40)] {
        let copied = |job: &Value| {
            let done = SIZE - job["dirty_bytes"].as_u64().unwrap();
            done * 100 / SIZE >= percent
        };
        server.wait_for_job("move", "part copied", copied);
        // It still copies while the successor reads the whole disk, but does not come to an end.
        server.call("job_set_speed", json!({ "job_id": "move", "speed": SIZE / 512 }));
        guest.kill();
        let job = server.job("move");
        assert_eq!(job["status"], "running", "the mirror does not need a guest: {job}");
        guest = start(seed);
        let job = server.job("move");
        assert_eq!(job["status"], "running", "the kill must be in mid-mirror: {job}");
        server.call("job_set_speed", json!({ "job_id": "move", "speed": SIZE / 4 }));
    }
    server.call("job_set_speed", json!({ "job_id": "move", "speed": 0 }));
    server.wait_for_status("move", "ready");

    // Once more while both legs are equal, and across the switch-over.
    guest.kill();
    let guest = start(4);
    server.call("job_complete", json!({ "job_id": "move" }));
    let job = server.wait_for_status("move", "concluded");
    assert!(job.get("error").is_none_or(Value::is_null), "{job}");
    guest.kill();
    let guest = start(5);
    guest.finish();

    assert_eq!(server.served_bdev("vm.sock"), "move-target");
    let _files = server.stop();
    let blocks: Vec<u64> = (0..BLOCKS).collect();
    assert_holds(&target, &blocks, &table_generations(&table));
    assert!(first_difference(&source, &target).is_some(), "the source went on being written");
}
