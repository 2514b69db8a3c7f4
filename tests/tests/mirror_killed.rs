//! The target is killed, or told to stop, at any moment of a mirror's life, and started again with the same state directory
//! and the configuration from before: one disk is accepted, the other is refused where it holds old data, and no
//! acknowledged write is lost.

#![allow(clippy::unwrap_used)] // a test may panic

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

use resilver_tests::e2e::driver::BLOCK;
use resilver_tests::e2e::guest::fill;
use resilver_tests::e2e::{GuestProcess, Server};
use rustix::process::Signal;
use serde_json::{Value, json};

const PROGRAM: &str = env!("CARGO_BIN_EXE_guest");
const BLOCKS: u64 = 2048;
const SIZE: u64 = BLOCKS * BLOCK as u64;
/// ESTALE: the disk holds old data.
const SUPERSEDED: i64 = -116;

/// Which disk has every acknowledged write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Leg {
    Source,
    Target,
}

/// A server whose disk, behind a switch for faults, a guest process writes; and a mirror of it.
struct Rig {
    server: Server,
    guest: GuestProcess,
    seed: u64,
}

impl Rig {
    fn start(more: &Value) -> Self {
        let mut server = Server::start();
        let source = server.path("source.raw");
        let disk = File::create(&source).unwrap();
        let mut bytes = vec![0; BLOCK];
        for number in 0..BLOCKS {
            fill(&mut bytes, number as usize, 0);
            disk.write_all_at(&bytes, number * BLOCK as u64).unwrap();
        }
        server.call("bdev_uring_create", json!({ "name": "disk", "filename": source }));
        server.call("bdev_error_create", json!({ "base_name": "disk" }));
        let vm = json!({ "ctrlr": "vm", "dev_name": "EE_disk" });
        server.call("vhost_create_blk_controller", vm);
        let config = server.call("save_config", json!({}));
        std::fs::write(server.path("config.json"), config.to_string()).unwrap();
        let guest = start_guest(&server, 1);
        let mut params = json!({
            "source": "EE_disk", "target_path": server.path("target.raw"), "target_mode": "create", "job_id": "move",
            "target_name": "new", "auto_dismiss": false,
        });
        params.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        server.start_mirror(&params);
        Self { server, guest, seed: 1 }
    }

    fn ready(more: &Value) -> Self {
        let mut rig = Self::start(more);
        rig.server.wait_for_status("move", "ready");
        rig
    }

    fn verb(&mut self, verb: &str) {
        self.server.call(verb, json!({ "job_id": "move" }));
    }

    /// Has the source's reads hang, and waits until one of the guest does: a disk that nobody reads drains at once.
    fn stall_reads(&mut self) {
        let stall = json!({ "name": "EE_disk", "io_type": "read", "error_type": "pending" });
        self.server.call("bdev_error_inject_error", stall);
        let begun = Instant::now();
        loop {
            let bdevs = self.server.call("bdev_get_bdevs", json!({ "name": "EE_disk" }));
            if bdevs[0]["driver_specific"]["error"]["injected"].as_u64() > Some(0) {
                return;
            }
            assert!(begun.elapsed() < Duration::from_secs(30), "nobody reads: {bdevs}");
        }
    }

    fn records(&mut self) -> usize {
        self.server.call("state_get_records", json!({}))["records"].as_array().unwrap().len()
    }

    /// Ends the server by a signal, starts it again, and finds out which disk it accepts: the configuration knows only the
    /// source. A guest then finds on it every write that was acknowledged.
    fn end_and_start(self, signal: Signal) -> Leg {
        let Self { mut server, guest, seed } = self;
        let status = server.restart(signal);
        assert_eq!(status.success(), signal == Signal::TERM, "{status}");
        guest.kill();
        let controllers = server.call("vhost_get_controllers", json!({}));
        let leg = match controllers.as_array().unwrap().len() {
            1 => Leg::Source,
            _ => Leg::Target,
        };
        let (source, target) = (server.path("source.raw"), server.path("target.raw"));
        if leg == Leg::Target {
            let old = json!({ "name": "old", "filename": source });
            let refused = server.try_call("bdev_uring_create", old).unwrap_err();
            assert_eq!(refused.code, SUPERSEDED, "{refused}");
            assert!(refused.message.contains("target.raw"), "{refused}");
            server.serve_file("new", &target, "vm");
        }
        start_guest(&server, seed + 1).finish();
        if leg == Leg::Source {
            // Nothing is left of the mirror that would keep another from beginning.
            let again = json!({ "source": "EE_disk", "target_path": target, "job_id": "again" });
            server.start_mirror(&again);
            server.wait_for_status("again", "ready");
        }
        let _files = server.stop();
        leg
    }
}

fn start_guest(server: &Server, seed: u64) -> GuestProcess {
    GuestProcess::start(PROGRAM, &server.controller("vm"), &server.path("table"), BLOCKS, seed)
}

const SIGNALS: [Signal; 2] = [Signal::KILL, Signal::TERM];

#[test]
fn ended_while_it_copies_or_is_ready_or_pending_the_source_is_the_disk() {
    for signal in SIGNALS {
        let mut rig = Rig::start(&json!({ "speed": SIZE / 8 }));
        let part = |job: &Value| job["copied_bytes"].as_u64() > Some(0);
        rig.server.wait_for_job("move", "part copied", part);
        assert_eq!(rig.end_and_start(signal), Leg::Source, "while it copies, {signal:?}");

        let rig = Rig::ready(&json!({}));
        assert_eq!(rig.end_and_start(signal), Leg::Source, "ready, {signal:?}");

        let mut rig = Rig::ready(&json!({ "auto_finalize": false }));
        rig.verb("job_complete");
        rig.server.wait_for_status("move", "pending");
        assert_eq!(rig.end_and_start(signal), Leg::Source, "pending, {signal:?}");
    }
}

#[test]
fn ended_after_the_switch_over_the_target_is_the_disk() {
    for signal in SIGNALS {
        let mut rig = Rig::ready(&json!({}));
        rig.verb("job_complete");
        rig.server.wait_for_status("move", "concluded");
        assert_eq!(rig.end_and_start(signal), Leg::Target, "{signal:?}");
    }
}

/// Between the record and the exchange: a read of the source that does not end keeps the disk from draining.
#[test]
fn ended_between_the_record_and_the_exchange_either_disk_has_everything() {
    for (signal, expected) in [(Signal::KILL, Some(Leg::Target)), (Signal::TERM, None)] {
        let mut rig = Rig::ready(&json!({}));
        rig.stall_reads();
        rig.verb("job_complete");
        let begun = Instant::now();
        while rig.records() == 0 {
            assert!(begun.elapsed() < Duration::from_secs(30), "no record is written");
        }
        let leg = rig.end_and_start(signal);
        // Told to stop, it gives the switch-over up, and may or may not get to take the record back.
        assert!(expected.is_none_or(|expected| leg == expected), "{leg:?}, {signal:?}");
    }
}

/// A switch-over that was undone has taken its record back: the source is the disk.
#[test]
fn ended_after_a_switch_over_was_undone_the_source_is_the_disk() {
    let mut rig = Rig::ready(&json!({}));
    rig.stall_reads();
    rig.verb("job_complete");
    rig.server
        .wait_for_job("move", "undone", |job| job["status"] == "ready" && job["error"].is_string());
    let clear = json!({ "name": "EE_disk", "io_type": "clear" });
    rig.server.call("bdev_error_inject_error", clear);
    assert_eq!(rig.end_and_start(Signal::KILL), Leg::Source);
}

#[test]
fn killed_at_any_moment_of_a_switch_over_one_disk_is_accepted_and_has_everything() {
    let mut seen = Vec::new();
    for delay_ms in [0, 1, 2, 4, 8, 16, 32, 64] {
        let mut rig = Rig::ready(&json!({}));
        rig.verb("job_complete");
        std::thread::sleep(Duration::from_millis(delay_ms));
        seen.push(rig.end_and_start(Signal::KILL));
    }
    println!("the disk after each kill: {seen:?}");
}
