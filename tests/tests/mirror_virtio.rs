//! Disks moved to and from somebody else's exports, which are killed while it goes on.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use resilver_tests::e2e::driver::BLOCK;
use resilver_tests::e2e::guest::{GuestConfig, assert_holds, fill};
use resilver_tests::e2e::{Guest, Server, StorageDaemon};
use resilver_vhost::front_end::{Connection, ConnectionConfig};
use rustix::process::Signal;
use serde_json::{Value, json};

/// One test at a time: each has three or four processes that poll.
static ALONE: Mutex<()> = Mutex::new(());
const BLOCKS: u64 = 8192;
const SIZE: u64 = BLOCKS * BLOCK as u64;

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A disk that holds what a guest expects at first.
fn fill_file(path: &Path) {
    let disk = File::create(path).unwrap();
    let mut bytes = vec![0; BLOCK];
    for number in 0..BLOCKS {
        fill(&mut bytes, number as usize, 0);
        disk.write_all_at(&bytes, number * BLOCK as u64).unwrap();
    }
}

fn start_guest(server: &Server) -> Guest {
    Guest::start(GuestConfig {
        socket: server.controller("vm"),
        blocks: blocks(),
        depth: 16,
        seed: 3,
        table: None,
    })
}

fn blocks() -> Vec<u64> {
    (0..BLOCKS).collect()
}

/// A storage daemon's export of a file, which can be killed and started again.
struct Export {
    daemon: Option<StorageDaemon>,
    file: PathBuf,
    socket: PathBuf,
}

impl Export {
    /// None, said aloud, where no storage daemon is installed.
    fn start(file: PathBuf, socket: PathBuf) -> Option<Self> {
        let daemon = StorageDaemon::serve("mirror_virtio", &file, &socket, ",num-queues=4")?;
        Some(Self { daemon: Some(daemon), file, socket })
    }

    /// With what it has in flight: it is stopped first, so that there is something.
    fn kill(&mut self) {
        let daemon = self.daemon.take().unwrap();
        rustix::process::kill_process(daemon.process(), Signal::STOP).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(50));
        drop(daemon);
        std::fs::remove_file(&self.socket).unwrap();
    }

    fn start_again(&mut self) {
        self.daemon =
            StorageDaemon::serve("mirror_virtio", &self.file, &self.socket, ",num-queues=4");
        assert!(self.daemon.is_some());
    }
}

fn state_of(server: &mut Server, bdev: &str) -> Value {
    let mut bdevs = server.call("bdev_get_bdevs", json!({ "name": bdev }));
    bdevs[0]["driver_specific"]["virtio"].take()
}

fn wait_for_state(server: &mut Server, bdev: &str, state: &str) {
    let begun = std::time::Instant::now();
    while state_of(server, bdev)["state"] != state {
        assert!(begun.elapsed().as_secs() < 30, "not {state}: {}", state_of(server, bdev));
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

/// Has the job switch over, and sees that it went well.
fn complete(server: &mut Server) {
    server.call("job_complete", json!({ "job_id": "move" }));
    let job = server.wait_for_status("move", "concluded");
    assert!(job.get("error").is_none_or(Value::is_null), "{job}");
}

/// The guest stops, then the targets; the file holds what the guest has written.
fn end<const N: usize>(guest: Guest, servers: [Server; N], file: &Path) {
    let generations = guest.finish().generations;
    let _files = servers.map(Server::stop);
    assert_holds(file, &blocks(), &generations);
}

/// Which disk was superseded by which.
fn superseded(server: &mut Server) -> Vec<(PathBuf, PathBuf)> {
    let answer = server.call("state_get_records", json!({}));
    let path = |disk: &Value| PathBuf::from(disk["path"].as_str().unwrap());
    let records = answer["records"].as_array().unwrap();
    records.iter().map(|it| (path(&it["superseded"]), path(&it["by"]))).collect()
}

#[test]
fn a_disk_moves_to_an_export_that_is_killed_in_mid_copy_and_again_as_the_disk() {
    let _alone = alone();
    let mut server = Server::start();
    let (source, target) = (server.path("source.raw"), server.path("target.raw"));
    fill_file(&source);
    File::create(&target).unwrap().set_len(SIZE).unwrap();
    let Some(mut export) = Export::start(target.clone(), server.path("export")) else { return };
    server.serve_file("disk", &source, "vm");
    server.call("bdev_virtio_create", json!({ "name": "remote", "socket": export.socket }));
    let guest = start_guest(&server);
    guest.run_for(100);
    server.start_mirror(&json!({ "source": "disk", "target": "remote", "job_id": "move", "speed": SIZE / 4, "auto_dismiss": false }));
    let part = |job: &Value| job["copied_bytes"].as_u64() > Some(SIZE / 8);
    server.wait_for_job("move", "part copied", part);
    export.kill();
    wait_for_state(&mut server, "remote", "reconnecting");
    let copied = server.job("move")["copied_bytes"].clone();
    export.start_again();
    wait_for_state(&mut server, "remote", "connected");
    let further = |job: &Value| job["copied_bytes"].as_u64() > copied.as_u64();
    server.wait_for_job("move", "further", further);
    server.call("job_set_speed", json!({ "job_id": "move", "speed": 0 }));
    server.wait_for_status("move", "ready");
    guest.run_for(1000);
    complete(&mut server);
    assert_eq!(server.served_bdev("vm"), "remote");
    guest.run_for(100);
    assert_eq!(superseded(&mut server), [(source, export.socket.clone())]);

    // Now it is the guest's disk.
    export.kill();
    wait_for_state(&mut server, "remote", "reconnecting");
    export.start_again();
    guest.run_for(1000);
    assert_eq!(state_of(&mut server, "remote")["reconnects"], 2);
    end(guest, [server], &target);
}

#[test]
fn a_disk_moves_from_an_export_to_a_file() {
    let _alone = alone();
    let mut server = Server::start();
    let (source, target) = (server.path("source.raw"), server.path("target.raw"));
    fill_file(&source);
    let Some(mut export) = Export::start(source, server.path("export")) else { return };
    server.call("bdev_virtio_create", json!({ "name": "remote", "socket": export.socket }));
    server.call("vhost_create_blk_controller", json!({ "ctrlr": "vm", "dev_name": "remote" }));
    let guest = start_guest(&server);
    guest.run_for(100);
    let start = json!({
        "source": "remote", "target_path": target, "target_mode": "create", "job_id": "move", "speed": SIZE / 4,
        "auto_dismiss": false,
    });
    server.start_mirror(&start);
    let part = |job: &Value| job["copied_bytes"].as_u64() > Some(SIZE / 8);
    server.wait_for_job("move", "part copied", part);
    export.kill();
    wait_for_state(&mut server, "remote", "reconnecting");
    export.start_again();
    server.call("job_set_speed", json!({ "job_id": "move", "speed": 0 }));
    server.wait_for_status("move", "ready");
    guest.run_for(1000);
    complete(&mut server);
    assert_eq!(superseded(&mut server), [(export.socket.clone(), target.clone())]);
    // The export is left alone, and may go.
    export.kill();
    guest.run_for(1000);
    server.call("bdev_virtio_delete", json!({ "name": "remote" }));
    // When it is there again it holds old data.
    export.start_again();
    let again = json!({ "name": "again", "socket": export.socket });
    let refused = server.try_call("bdev_virtio_create", again).unwrap_err();
    assert!(refused.message.contains("was superseded by"), "{refused}");
    end(guest, [server], &target);
}

#[test]
fn a_guest_sees_that_its_disks_export_has_grown() {
    let _alone = alone();
    let (mut server, mut other) = (Server::start(), Server::start());
    let file = other.path("disk.raw");
    File::create(&file).unwrap().set_len(SIZE).unwrap();
    other.serve_file("disk", &file, "export");
    let socket = other.controller("export");
    server.call("bdev_virtio_create", json!({ "name": "remote", "socket": socket }));
    server.call("vhost_create_blk_controller", json!({ "ctrlr": "vm", "dev_name": "remote" }));
    let (mut guest, _queues) =
        Connection::connect(&server.controller("vm"), ConnectionConfig::default()).unwrap();
    assert_eq!(guest.device().capacity, SIZE);
    let twice = json!({ "name": "twice", "socket": socket });
    let refused = server.try_call("bdev_virtio_create", twice).unwrap_err();
    assert!(refused.message.contains("bdev 'remote' of this target"), "{refused}");
    let serial = state_of(&mut server, "remote")["serial"].clone();
    assert_eq!(serial, "export", "the other target calls its disk so");
    other.call("bdev_uring_resize", json!({ "name": "disk", "new_size": 2 * SIZE }));
    let begun = std::time::Instant::now();
    while guest.read_config().unwrap().capacity != 2 * SIZE {
        assert!(
            begun.elapsed().as_secs() < 30,
            "{}\n{}",
            state_of(&mut server, "remote"),
            server.log()
        );
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    drop(guest);
    let _files = (server.stop(), other.stop());
}

/// The other side is a target of our own, which is killed and started again with its configuration.
#[test]
fn a_disk_of_another_target_of_ours_survives_that_targets_death() {
    let _alone = alone();
    for packed in [false, true] {
        survives_its_targets_death(packed);
    }
}

fn survives_its_targets_death(packed: bool) {
    let (mut server, mut other) = (Server::start(), Server::start());
    let file = other.path("disk.raw");
    fill_file(&file);
    other.call("bdev_uring_create", json!({ "name": "disk", "filename": file }));
    let export = json!({ "ctrlr": "export", "dev_name": "disk", "packed_ring": packed });
    other.call("vhost_create_blk_controller", export);
    let config = other.call("save_config", json!({}));
    std::fs::write(other.path("config.json"), config.to_string()).unwrap();
    let socket = other.controller("export");
    server.call("bdev_virtio_create", json!({ "name": "remote", "socket": socket }));
    server.call("vhost_create_blk_controller", json!({ "ctrlr": "vm", "dev_name": "remote" }));
    let told = state_of(&mut server, "remote");
    assert_eq!((&told["packed_ring"], &told["inflight_recorded"]), (&json!(packed), &json!(true)));
    let guest = start_guest(&server);
    for round in 1..=3 {
        guest.run_for(500);
        other.restart(Signal::KILL);
        wait_for_state(&mut server, "remote", "connected");
        guest.run_for(500);
        assert!(state_of(&mut server, "remote")["reconnects"].as_u64() >= Some(round));
    }
    // What it takes to make it again is in the configuration.
    let config = server.call("save_config", json!({}));
    assert!(config.to_string().contains("bdev_virtio_create"), "{config}");
    end(guest, [server, other], &file);
}

#[test]
fn an_export_that_does_not_exist_is_refused_with_its_name_and_the_reason() {
    let _alone = alone();
    let mut server = Server::start();
    let socket = server.path("nobody");
    let create = json!({ "name": "remote", "socket": socket });
    let refused = server.try_call("bdev_virtio_create", create).unwrap_err();
    assert!(
        refused.message.contains("nobody' cannot be used as a disk: cannot connect"),
        "{refused}"
    );
    let _files = server.stop();
}
