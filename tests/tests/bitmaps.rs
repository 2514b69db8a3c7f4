//! Mirrors by bitmap under a guest that never rests: the difference to an earlier copy, and a mirror that was cancelled and goes
//! on where it stopped.

use std::fs::File;
use std::os::unix::fs::FileExt as _;

use resilver_tests::e2e::driver::BLOCK;
use resilver_tests::e2e::guest::{GuestConfig, assert_holds, fill};
use resilver_tests::e2e::{Guest, Server};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
const BLOCKS: u64 = 64 * MIB / BLOCK as u64;
/// The guest writes to a part of its disk only, so that a difference is less than the whole.
const WRITTEN: u64 = BLOCKS / 8;

fn copied(job: &Value) -> u64 {
    ["copied_bytes", "zero_bytes"].iter().map(|name| job[name].as_u64().unwrap()).sum()
}

#[test]
fn the_difference_to_an_earlier_copy_is_all_that_a_mirror_by_bitmap_copies() {
    let mut server = Server::start();
    let (source, target) = (server.path("source.raw"), server.path("target.raw"));
    let disk = File::create(&source).unwrap();
    let mut bytes = vec![0; BLOCK];
    for number in 0..BLOCKS {
        fill(&mut bytes, number as usize, 0);
        disk.write_all_at(&bytes, number * BLOCK as u64).unwrap();
    }
    drop(disk);
    server.serve_file("vm", &source, "vm.sock");
    let blocks: Vec<u64> = (0..WRITTEN).collect();
    let guest = Guest::start(GuestConfig {
        socket: server.controller("vm.sock"),
        blocks: blocks.clone(),
        depth: 8,
        seed: 2,
        table: None,
    });
    guest.run_for(100);

    // A whole copy. The bitmap is there before it is cut off, so that it has all that the copy lacks.
    let mirror = |more: Value| {
        let mut params = json!({
            "source": "vm", "target_path": target, "job_id": "copy", "auto_dismiss": false,
        });
        params.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        params
    };
    server.start_mirror(&mirror(json!({ "target_mode": "create" })));
    let whole = copied(&server.wait_for_status("copy", "ready"));
    let bitmap = json!({ "name": "vm", "bitmap": "lacks", "granularity": 65536 });
    server.call("bdev_dirty_bitmap_add", bitmap);
    server.call("bdev_mirror_finish", json!({ "job_id": "copy" }));
    server.wait_for_status("copy", "concluded");
    server.call("job_dismiss", json!({ "job_id": "copy" }));
    guest.run_for(500);

    // The difference, cancelled, and begun again where it stopped.
    let delta = json!({ "bitmap": "lacks", "sync": "bitmap", "bitmap_mode": "always" });
    server.start_mirror(&mirror(delta.clone()));
    guest.run_for(100);
    server.call("job_cancel", json!({ "job_id": "copy" }));
    let first = copied(&server.wait_for_status("copy", "concluded"));
    server.call("job_dismiss", json!({ "job_id": "copy" }));
    guest.run_for(100);
    server.start_mirror(&mirror(delta));
    let second = copied(&server.wait_for_status("copy", "ready"));
    assert!(first + second < whole / 2, "{first} and {second} of {whole} were copied again");
    let listed = server.call("bdev_dirty_bitmap_get", json!({ "name": "vm" }));
    assert_eq!((&listed[0]["busy"], &listed[0]["job_id"]), (&json!(true), &json!("copy")));

    server.call("job_complete", json!({ "job_id": "copy" }));
    server.wait_for_status("copy", "concluded");
    guest.run_for(500);
    let report = guest.finish();
    let listed = server.call("bdev_dirty_bitmap_get", json!({ "name": "vm" }));
    assert_eq!((&listed[0]["busy"], &listed[0]["count"]), (&json!(false), &json!(0)));
    let _files = server.stop();
    assert_holds(&target, &blocks, &report.generations);
    // And what nobody wrote is as it was.
    let disk = File::open(&target).unwrap();
    let mut expected = vec![0; BLOCK];
    for number in WRITTEN..BLOCKS {
        fill(&mut expected, number as usize, 0);
        disk.read_exact_at(&mut bytes, number * BLOCK as u64).unwrap();
        assert_eq!(bytes, expected, "block {number}");
    }
}
