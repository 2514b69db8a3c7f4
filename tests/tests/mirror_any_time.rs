//! What a guest and its machine may do at any time, done in the middle of a mirror: a reset, another front end, a change of
//! the memory table, a pause of the machine.

#![allow(clippy::unwrap_used)] // a test may panic

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use resilver_sys::{BufferSlice, RegionTable};
use resilver_tests::e2e::driver::BLOCK;
use resilver_tests::e2e::guest::{GuestConfig, assert_holds, fill, table_generations};
use resilver_tests::e2e::{Guest, Server};
use resilver_vhost::front_end::{Connection, ConnectionConfig, DataBuffer, DriverQueue, Request};
use resilver_vhost::message::Message;
use serde_json::{Value, json};

const BLOCKS: u64 = 2048;
const SIZE: u64 = BLOCKS * BLOCK as u64;

/// A server with a disk that holds generation 0, as controller `vm`.
fn served() -> Server {
    let mut server = Server::start();
    let source = server.path("source.raw");
    let disk = File::create(&source).unwrap();
    let mut bytes = vec![0; BLOCK];
    for number in 0..BLOCKS {
        fill(&mut bytes, number as usize, 0);
        disk.write_all_at(&bytes, number * BLOCK as u64).unwrap();
    }
    server.serve_file("disk", &source, "vm");
    server
}

fn guest(server: &Server, seed: u64) -> Guest {
    Guest::start(GuestConfig {
        socket: server.controller("vm"),
        blocks: (0..BLOCKS).collect(),
        depth: 16,
        seed,
        table: Some(server.path("table")),
    })
}

/// Starts a mirror that would take seconds.
fn mirror(server: &mut Server, more: Value) {
    let mut params = json!({
        "source": "disk", "target_path": server.path("target.raw"), "target_mode": "create", "job_id": "move",
        "speed": SIZE / 8, "auto_dismiss": false,
    });
    params.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    server.start_mirror(&params);
    server.wait_for_job("move", "part copied", |job| job["copied_bytes"].as_u64() > Some(0));
}

/// Lets the mirror end on its target.
fn switch_over(server: &mut Server) {
    server.call("job_set_speed", json!({ "job_id": "move", "speed": 0 }));
    server.wait_for_status("move", "ready");
    server.call("job_complete", json!({ "job_id": "move" }));
    let job = server.wait_for_status("move", "concluded");
    assert_eq!((&job["goes_on_with"], job.get("error")), (&json!("target"), None), "{job}");
}

/// The file holds what the guests were told is written.
fn assert_file(server: Server, file: &str) {
    let (file, table) = (server.path(file), server.path("table"));
    let _files = server.stop();
    assert_holds(&file, &(0..BLOCKS).collect::<Vec<_>>(), &table_generations(&table));
}

/// A front end that sets a device up and resets it, as firmware and a kernel that boots do; twice.
fn reset(socket: &Path) {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let mut tell = |message: Message| {
        std::io::Write::write_all(&mut stream, &message.encode(0)).unwrap();
    };
    tell(Message::SetOwner);
    tell(Message::SetFeatures(1 << 32));
    for status in [15, 0, 15, 0] {
        tell(Message::SetStatus(status));
    }
    // The answer to this comes when the resets have been carried out.
    tell(Message::GetFeatures);
    stream.read_exact(&mut [0; 20]).unwrap();
}

#[test]
fn a_guest_that_resets_its_device_keeps_the_mirror_unless_the_operator_wants_otherwise() {
    for policy in [None, Some("keep"), Some("cancel")] {
        let mut server = served();
        let first = guest(&server, 1);
        mirror(&mut server, policy.map_or_else(|| json!({}), |it| json!({ "on_guest_reset": it })));
        first.run_for(500);
        first.finish();
        assert_eq!(server.job("move")["status"], "running", "a front end that goes is no reset");
        reset(&server.controller("vm"));
        if policy == Some("cancel") {
            let job = server.wait_for_status("move", "concluded");
            assert_eq!(job["error"], "the guest reset the device", "{job}");
            assert_eq!(
                (&job["goes_on_with"], &job["phase"]),
                (&json!("source"), &json!("cancelling"))
            );
        } else {
            assert_eq!(server.job("move")["status"], "running");
        }
        // The machine comes up again and finds its disk.
        let second = guest(&server, 2);
        second.run_for(500);
        if policy == Some("cancel") {
            second.finish();
            assert_file(server, "source.raw");
        } else {
            switch_over(&mut server);
            second.run_for(500);
            second.finish();
            assert_file(server, "target.raw");
        }
    }
}

#[test]
fn a_memory_table_that_changes_in_mid_mirror_and_mid_switch_loses_nothing() {
    let mut server = served();
    let guest = guest(&server, 1);
    guest.change_memory();
    mirror(&mut server, json!({ "auto_finalize": false }));
    for _ in 0..20 {
        guest.change_memory();
        guest.run_for(50);
    }
    assert_eq!(server.job("move")["status"], "running");
    server.call("job_set_speed", json!({ "job_id": "move", "speed": 0 }));
    server.wait_for_status("move", "ready");
    guest.change_memory();
    server.call("job_complete", json!({ "job_id": "move" }));
    server.wait_for_status("move", "pending");
    guest.change_memory();
    server.call("job_finalize", json!({ "job_id": "move" }));
    // Some of these fall into the switch-over itself.
    for _ in 0..20 {
        guest.change_memory();
    }
    let job = server.wait_for_status("move", "concluded");
    assert_eq!(job["goes_on_with"], "target", "{job}");
    guest.run_for(500);
    guest.finish();
    assert_file(server, "target.raw");
}

/// Carries a request out and waits for it.
fn run(queue: &mut DriverQueue, request: Request, data: &[DataBuffer]) {
    queue.submit(request, data, 1).unwrap();
    queue.publish();
    let begun = Instant::now();
    loop {
        if let Some(finished) = queue.pop().unwrap() {
            return assert_eq!(finished.result, Ok(()), "{request:?}");
        }
        assert!(begun.elapsed() < Duration::from_secs(30), "{request:?} does not end");
        std::thread::yield_now();
    }
}

#[test]
fn a_machine_that_is_paused_meanwhile_finds_its_disk_moved_and_whole() {
    let mut server = served();
    let config = ConnectionConfig { queue_size: 32, ..ConnectionConfig::default() };
    let socket = server.controller("vm");
    let (mut connection, mut queues) = Connection::connect(&socket, config).unwrap();
    let queue = &mut queues[0];
    let table = RegionTable::with_capacity(1);
    let region = table.insert(connection.memory().mapping().clone()).unwrap();
    let data = DataBuffer { offset: 0, length: BLOCK as u32 };
    let slice = BufferSlice { region, offset: 0, length: BLOCK as u32 };
    let mut bytes = vec![0; BLOCK];
    let mut write = |queue: &mut DriverQueue, number: u64, generation| {
        fill(&mut bytes, number as usize, generation);
        table.write(slice, &bytes).unwrap();
        run(queue, Request::Write { offset: number * BLOCK as u64 }, &[data]);
    };

    mirror(&mut server, json!({}));
    for number in 0..100 {
        write(queue, number, 1);
    }
    // A pause stops the rings; the copy goes on, to the switch-over and beyond.
    let base = connection.stop(queue).unwrap();
    assert_eq!(base, 100);
    switch_over(&mut server);
    connection.resume(queue, base).unwrap();
    for number in 50..150 {
        write(queue, number, 2);
    }
    let mut expected = vec![0; BLOCK];
    for number in 0..BLOCKS {
        let generation = match number {
            0..50 => 1,
            50..150 => 2,
            _ => 0,
        };
        fill(&mut expected, number as usize, generation);
        let mut seen = vec![0; BLOCK];
        run(queue, Request::Read { offset: number * BLOCK as u64 }, &[data]);
        table.read(slice, &mut seen).unwrap();
        assert!(seen == expected, "block {number}");
    }
    drop(server.stop());
}
