//! Disks of 512 and of 4096-byte blocks mirrored to each other under a guest that is connected all the time: it keeps the
//! block size it was told, and its data.

#![allow(clippy::unwrap_used)] // a test may panic; clippy knows that only of functions it sees as tests

mod common;

use std::path::Path;
use std::time::Instant;

use resilver_sys::{BufferSlice, RegionId, RegionTable};
use resilver_vhost::front_end::{Connection, ConnectionConfig, DataBuffer, DriverQueue, Request};
use serde_json::{Value, json};

use common::{DEADLINE, MIB, Served, served};

/// Bytes of every disk here.
const DISK: u64 = 2 * MIB;
/// The most bytes of a request.
const MOST: u64 = 65536;

/// A guest that remembers what it wrote.
struct Guest {
    connection: Connection,
    queues: Vec<DriverQueue>,
    table: RegionTable,
    region: RegionId,
    block: u64,
    model: Vec<u8>,
    state: u64,
}

impl Guest {
    fn connect(socket: &Path) -> Self {
        let config = ConnectionConfig { data_bytes: 1 << 20, ..ConnectionConfig::default() };
        let (connection, queues) = Connection::connect(socket, config).unwrap();
        let table = RegionTable::with_capacity(1);
        let region = table.insert(connection.memory().mapping().clone()).unwrap();
        let block = u64::from(connection.device().block_size);
        let size = usize::try_from(connection.device().capacity).unwrap();
        Self { connection, queues, table, region, block, model: vec![0; size], state: 1 }
    }

    fn next(&mut self, bound: u64) -> u64 {
        self.state = self.state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (self.state >> 33) % bound
    }

    fn run(&mut self, request: Request, data: &[DataBuffer]) {
        self.queues[0].submit(request, data, 0).unwrap();
        self.queues[0].publish();
        let begun = Instant::now();
        loop {
            if let Some(finished) = self.queues[0].pop().unwrap() {
                assert_eq!(finished.result, Ok(()), "{request:?}");
                return;
            }
            assert!(begun.elapsed() < DEADLINE, "{request:?} never ends");
            std::thread::yield_now();
        }
    }

    fn slice(&self, buffer: DataBuffer) -> BufferSlice {
        BufferSlice { region: self.region, offset: buffer.offset, length: buffer.length }
    }

    /// Writes or zeroes a few blocks somewhere.
    fn change(&mut self) {
        let longest = [1, 1, 9][usize::try_from(self.next(3)).unwrap()];
        let length = (1 + self.next(longest)) * self.block;
        let offset = self.next((DISK - length) / self.block) * self.block;
        let at = usize::try_from(offset).unwrap();
        let range = at..at + usize::try_from(length).unwrap();
        if self.next(8) == 0 {
            self.run(Request::WriteZeroes { offset, length, may_unmap: true }, &[]);
            self.model[range].fill(0);
            return;
        }
        let byte = u8::try_from(1 + self.next(255)).unwrap();
        self.model[range.clone()].fill(byte);
        let buffer = DataBuffer { offset: 0, length: u32::try_from(length).unwrap() };
        self.table.write(self.slice(buffer), &self.model[range]).unwrap();
        self.run(Request::Write { offset }, &[buffer]);
    }

    /// Reads all of the disk and compares it; and asks again what a block is.
    fn check(&mut self) {
        for offset in (0..DISK).step_by(usize::try_from(MOST).unwrap()) {
            let buffer = DataBuffer { offset: 0, length: u32::try_from(MOST).unwrap() };
            self.run(Request::Read { offset }, &[buffer]);
            let mut bytes = vec![0; usize::try_from(MOST).unwrap()];
            self.table.read(self.slice(buffer), &mut bytes).unwrap();
            let at = usize::try_from(offset).unwrap();
            assert!(bytes == self.model[at..at + bytes.len()], "the disk differs at {offset}");
        }
        let now = self.connection.read_config().unwrap();
        assert_eq!((u64::from(now.block_size), now.capacity), (self.block, DISK));
    }
}

fn malloc(target: &mut Served, name: &str, block: u64) {
    let params = json!({ "name": name, "num_blocks": DISK / block, "block_size": block });
    target.call("bdev_malloc_create", params);
}

fn bdev(target: &mut Served, name: &str) -> Value {
    target.call("bdev_get_bdevs", json!({ "name": name }))[0].clone()
}

/// Block size and blocks with which a saved configuration makes a bdev again.
fn made_with(target: &mut Served, name: &str) -> (Value, Value) {
    let saved = target.call("save_config", json!({}));
    let subsystems = saved["subsystems"].as_array().unwrap();
    let calls = subsystems.iter().flat_map(|it| it["config"].as_array().unwrap());
    let call = calls.map(|call| &call["params"]).find(|params| params["name"] == name).unwrap();
    (call["block_size"].clone(), call["num_blocks"].clone())
}

/// Mirrors a disk and switches over, while the guest goes on writing; compares the legs on the way.
fn move_disk(target: &mut Served, guest: &mut Guest, from: &str, to: &str) {
    let start = json!({
        "source": from, "target": to, "job_id": "move", "copy_mode": "write-blocking",
        "granularity": 4096, "verify_before_complete": true,
    });
    target.call("bdev_mirror_start", start);
    let begun = Instant::now();
    while target.call("job_get_list", json!({ "job_id": "move" }))[0]["status"] != "ready" {
        (0..20).for_each(|_| guest.change());
        assert!(begun.elapsed() < DEADLINE, "the mirror is never ready");
    }
    (0..200).for_each(|_| guest.change());
    target.call("job_complete", json!({ "job_id": "move" }));
    while target.call("vhost_get_controllers", json!({}))[0]["backend_specific"]["block"]["bdev"]
        != to
    {
        (0..20).for_each(|_| guest.change());
        assert!(begun.elapsed() < DEADLINE, "the disk is never switched over");
    }
    let history = target.call("job_get_history", json!({}));
    assert_eq!(history.as_array().unwrap().last().unwrap()["goes_on_with"], "target");
    (0..100).for_each(|_| guest.change());
    guest.check();
}

#[test]
fn a_guest_of_small_blocks_moves_to_large_ones_and_back_and_keeps_its_block_size() {
    let (_dir, mut target) = served();
    malloc(&mut target, "small", 512);
    malloc(&mut target, "large", 4096);
    target.call("vhost_create_blk_controller", json!({ "ctrlr": "vm", "dev_name": "small" }));
    let mut guest = Guest::connect(&target.dir.join("vhost/vm"));
    assert_eq!(guest.block, 512);
    move_disk(&mut target, &mut guest, "small", "large");
    let large = bdev(&mut target, "large");
    assert_eq!((&large["block_size"], &large["num_blocks"]), (&json!(512), &json!(DISK / 512)));
    assert_eq!(large["driver_specific"]["malloc"]["physical_block_size"], 4096);
    assert_eq!(made_with(&mut target, "large"), (json!(512), json!(DISK / 512)));

    move_disk(&mut target, &mut guest, "large", "small");
    target.wait_until_free("large");
    target.call("bdev_malloc_delete", json!({ "name": "large" }));
}

#[test]
fn a_guest_of_large_blocks_moves_to_small_ones_and_back_and_keeps_its_block_size() {
    let (_dir, mut target) = served();
    malloc(&mut target, "small", 512);
    malloc(&mut target, "large", 4096);
    target.call("vhost_create_blk_controller", json!({ "ctrlr": "vm", "dev_name": "large" }));
    let mut guest = Guest::connect(&target.dir.join("vhost/vm"));
    assert_eq!(guest.block, 4096);
    move_disk(&mut target, &mut guest, "large", "small");
    assert_eq!(made_with(&mut target, "small"), (json!(4096), json!(DISK / 4096)));
    move_disk(&mut target, &mut guest, "small", "large");
    assert_eq!(made_with(&mut target, "large"), (json!(4096), json!(DISK / 4096)));
}

/// A file with blocks of `block` bytes under a controller, and a guest at it.
fn serve_file(target: &mut Served, name: &str, block: u64) -> Guest {
    let path = target.dir.join(format!("{name}.raw"));
    std::fs::File::create(&path).unwrap().set_len(DISK).unwrap();
    let open = json!({ "name": name, "filename": path, "block_size": block });
    target.call("bdev_uring_create", open);
    target.call("vhost_create_blk_controller", json!({ "ctrlr": "vm", "dev_name": name }));
    Guest::connect(&target.dir.join("vhost/vm"))
}

#[test]
fn a_resize_after_the_move_leaves_the_block_size_alone() {
    for (own, other) in [(512, 4096), (4096, 512)] {
        let (_dir, mut target) = served();
        let mut guest = serve_file(&mut target, "disk", own);
        let path = target.dir.join("other.raw");
        std::fs::File::create(&path).unwrap().set_len(DISK).unwrap();
        let open = json!({ "name": "other", "filename": path, "block_size": other });
        target.call("bdev_uring_create", open);
        move_disk(&mut target, &mut guest, "disk", "other");
        assert_eq!(made_with(&mut target, "other").0, json!(own));
        target.call("bdev_uring_resize", json!({ "name": "other", "new_size": 2 * DISK }));
        let now = guest.connection.read_config().unwrap();
        assert_eq!((u64::from(now.block_size), now.capacity), (own, 2 * DISK));
        let end = DataBuffer { offset: 0, length: u32::try_from(own).unwrap() };
        guest.run(Request::Write { offset: 2 * DISK - own }, &[end]);
    }
}
