//! Mirrors between files of one file system: where it lets files share extents, and is asked to, the copy is its own affair; where it
//! cannot, or is not asked, the copy is made as between any two disks.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use resilver_tests::e2e::Server;
use resilver_tests::e2e::driver::BLOCK;
use resilver_tests::e2e::guest::fill;
use resilver_tests::e2e::tools::{first_difference, missing};
use resilver_tests::mounts::{self, Mount};
use resilver_tests::skip;
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
/// The disk: blocks of data, then a hole, then a part of a chunk.
const DATA: u64 = 192 * MIB;
const DISK: u64 = 256 * MIB + 4608;

/// Whether there can be an XFS.
fn available(test: &str) -> bool {
    if let Some(program) = missing(&["mkfs.xfs", "mount", "losetup"]) {
        skip(test, &format!("{program} is not installed"), "apt-get install xfsprogs mount");
        return false;
    }
    mounts::available(test)
}

fn make_disk(path: &Path) {
    let disk = File::create(path).unwrap();
    let mut bytes = vec![0; MIB as usize];
    for at in (0..DATA).step_by(MIB as usize) {
        for (index, block) in bytes.chunks_exact_mut(BLOCK).enumerate() {
            fill(block, (at / BLOCK as u64) as usize + index, 0);
        }
        disk.write_all_at(&bytes, at).unwrap();
    }
    disk.set_len(DISK).unwrap();
    disk.write_all_at(b"the end", DISK - 512).unwrap();
    disk.sync_all().unwrap();
}

/// Moves a disk that nobody uses from one file of a file system to another, with these parameters besides. Answers with the job
/// as it ended and the bytes that the target takes, when that has been found equal to what the source was.
fn move_within(place: &Path, direct: bool, parameters: &Value) -> (Value, u64) {
    let mut server = Server::start();
    let (source, target) = (place.join("source.raw"), place.join("target.raw"));
    make_disk(&source);
    let room = free(place);
    server.call(
        "bdev_uring_create",
        json!({ "name": "vm", "filename": source, "block_size": 512, "direct": direct }),
    );
    let mut start = json!({
        "source": "vm", "target_path": target, "target_mode": "create", "job_id": "move", "auto_dismiss": false,
    });
    for (name, value) in parameters.as_object().unwrap() {
        start[name] = value.clone();
    }
    server.start_mirror(&start);
    server.wait_for_status("move", "ready");
    server.call("job_complete", json!({ "job_id": "move" }));
    let job = server.wait_for_status("move", "concluded");
    assert!(job.get("error").is_none_or(Value::is_null), "{job}");
    let _files = server.stop();
    assert_eq!(first_difference(&source, &target), None);
    (job, room.saturating_sub(free(place)))
}

fn offloaded(job: &Value) -> u64 {
    job["offloaded_bytes"].as_u64().unwrap_or(0)
}

#[test]
fn a_disk_is_copied_by_a_file_system_whose_files_share_extents() {
    if !available("a_disk_is_copied_by_a_file_system_whose_files_share_extents") {
        return;
    }
    for direct in [true, false] {
        let xfs = Mount::xfs(1024 * MIB, true);
        let (job, room) = move_within(xfs.path(), direct, &json!({ "copy_offload": true }));
        assert_eq!(offloaded(&job), DATA, "{job}");
        assert!(room < 16 * MIB, "the target takes {room} bytes");
    }
}

#[test]
fn where_files_share_no_extents_or_are_not_to_all_is_read_and_written() {
    if !available("where_files_share_no_extents_or_are_not_to_all_is_read_and_written") {
        return;
    }
    for (shares, parameters) in [(false, json!({ "copy_offload": true })), (true, json!({}))] {
        let xfs = Mount::xfs(1024 * MIB, shares);
        let (job, room) = move_within(xfs.path(), true, &parameters);
        assert_eq!(offloaded(&job), 0, "{job}");
        assert!(job["copied_bytes"].as_u64() >= Some(DATA) && room >= DATA, "{room}: {job}");
    }
}

/// Bytes that are free in a file system.
fn free(place: &Path) -> u64 {
    let stat = rustix::fs::statvfs(place).unwrap();
    stat.f_bfree * stat.f_frsize
}
