//! The target is killed under a front end's load and started again: with the in-flight region no request is lost, none ends
//! twice, and the disk holds what was acknowledged.

#![allow(clippy::unwrap_used)] // a test may panic

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

use resilver_sys::{BufferSlice, RegionId, RegionTable};
use resilver_tests::e2e::Server;
use resilver_tests::e2e::driver::BLOCK;
use resilver_tests::e2e::guest::{fill, generation_of};
use resilver_tests::sim::rng::Rng;
use resilver_vhost::front_end::{Connection, ConnectionConfig, DataBuffer, DriverQueue, Request};
use rustix::process::Signal;
use serde_json::json;

const BLOCKS: usize = 256;
const DEPTH: usize = 32;
/// How long anything may take before it counts as lost.
const PATIENCE: Duration = Duration::from_secs(20);

/// A front end that writes blocks, one generation after another, and keeps count.
struct Load {
    connection: Connection,
    queues: Vec<DriverQueue>,
    table: RegionTable,
    region: RegionId,
    rng: Rng,
    /// Per slot, the block that it writes.
    writing: Vec<Option<usize>>,
    /// Per block, the generation that was submitted last, and the one that was acknowledged last.
    submitted: Vec<u32>,
    acknowledged: Vec<u32>,
    ended: u64,
}

impl Load {
    fn connect(server: &Server, accept: u64) -> Self {
        let config = ConnectionConfig {
            accept,
            inflight: true,
            data_bytes: DEPTH * BLOCK,
            queue_size: 128,
            ..ConnectionConfig::default()
        };
        let (connection, queues) = Connection::connect(&server.controller("vm"), config).unwrap();
        assert!(connection.records_inflight());
        let table = RegionTable::with_capacity(1);
        let region = table.insert(connection.memory().mapping().clone()).unwrap();
        Self {
            connection,
            queues,
            table,
            region,
            rng: Rng::new(7),
            writing: vec![None; DEPTH],
            submitted: vec![0; BLOCKS],
            acknowledged: vec![0; BLOCKS],
            ended: 0,
        }
    }

    /// Fills every free slot with a write of a block that nobody writes.
    fn submit(&mut self) {
        let mut bytes = vec![0; BLOCK];
        for slot in 0..DEPTH {
            if self.writing[slot].is_some() {
                continue;
            }
            let mut block = self.rng.below(BLOCKS as u64) as usize;
            while self.writing.contains(&Some(block)) {
                block = (block + 1) % BLOCKS;
            }
            self.submitted[block] += 1;
            fill(&mut bytes, block, self.submitted[block]);
            let (offset, length) = ((slot * BLOCK) as u64, BLOCK as u32);
            let buffer = BufferSlice { region: self.region, offset, length };
            self.table.write(buffer, &bytes).unwrap();
            let write = Request::Write { offset: (block * BLOCK) as u64 };
            let queue = &mut self.queues[0];
            queue.submit(write, &[DataBuffer { offset, length }], slot as u64).unwrap();
            self.writing[slot] = Some(block);
        }
        self.queues[0].publish();
    }

    /// Takes what has ended. One that was not in flight, a second end of one for example, is the queue's error.
    fn take(&mut self) {
        while let Some(finished) = self.queues[0].pop().unwrap() {
            let block = self.writing[finished.tag as usize].take().expect("ends once");
            assert_eq!(finished.result, Ok(()), "block {block}");
            self.acknowledged[block] = self.submitted[block];
            self.ended += 1;
        }
    }

    fn run_until(&mut self, what: &str, done: impl Fn(&Self) -> bool) {
        let begun = Instant::now();
        while !done(self) {
            self.take();
            if what != "all ended" {
                self.submit();
            }
            let lost: Vec<_> = self.writing.iter().flatten().collect();
            assert!(begun.elapsed() < PATIENCE, "not {what}; in flight: {lost:?}");
        }
    }

    fn in_flight(&self) -> usize {
        self.writing.iter().flatten().count()
    }
}

/// A server with a file as its disk, each of whose requests takes so long; its configuration is kept for the next.
fn served(delay_us: u64) -> Server {
    let mut server = Server::start();
    let file = server.path("disk.raw");
    File::create(&file).unwrap().set_len((BLOCKS * BLOCK) as u64).unwrap();
    server.call("bdev_uring_create", json!({ "name": "file", "filename": file }));
    let delay = json!({
        "name": "disk", "base_bdev_name": "file", "avg_read_latency": delay_us, "p99_read_latency": delay_us,
        "avg_write_latency": delay_us, "p99_write_latency": delay_us,
    });
    server.call("bdev_delay_create", delay);
    server.call(
        "vhost_create_blk_controller",
        json!({ "ctrlr": "vm", "dev_name": "disk", "packed_ring": true }),
    );
    let config = server.call("save_config", json!({}));
    std::fs::write(server.path("config.json"), config.to_string()).unwrap();
    server
}

fn kill(server: &mut Server, load: &mut Load) {
    let status = server.restart(Signal::KILL);
    assert!(!status.success());
    load.connection.reconnect(&mut load.queues).unwrap();
}

fn assert_disk(server: Server, load: &Load) {
    let path = server.path("disk.raw");
    let _files = server.stop();
    let disk = File::open(path).unwrap();
    let mut bytes = vec![0; BLOCK];
    for block in 0..BLOCKS {
        disk.read_exact_at(&mut bytes, (block * BLOCK) as u64).unwrap();
        if load.acknowledged[block] > 0 {
            let found = generation_of(&bytes, block);
            assert_eq!(found, Some(load.acknowledged[block]), "block {block}");
        }
    }
}

/// A front end with split rings, and one with packed ones.
const FORMATS: [u64; 2] = [ConnectionConfig::WITHOUT_PACKED, u64::MAX];

#[test]
fn killed_under_load_again_and_again_it_loses_and_repeats_nothing() {
    FORMATS.into_iter().for_each(killed_under_load);
}

fn killed_under_load(accept: u64) {
    let mut server = served(200);
    let mut load = Load::connect(&server, accept);
    for round in 1..=8 {
        // Not at a round number of anything.
        let target = load.ended + 400 + load.rng.below(300);
        load.run_until("as many ended as wanted", |load| load.ended >= target);
        load.submit();
        assert_eq!(load.in_flight(), DEPTH, "round {round}");
        kill(&mut server, &mut load);
    }
    load.run_until("all ended", |load| load.in_flight() == 0);
    assert_disk(server, &load);
}

#[test]
fn killed_before_anything_has_ended_its_successor_executes_all_of_it() {
    FORMATS.into_iter().for_each(killed_before_the_first_end);
}

fn killed_before_the_first_end(accept: u64) {
    let mut server = served(1_000_000);
    let mut load = Load::connect(&server, accept);
    load.submit();
    assert_eq!(load.in_flight(), DEPTH);
    // Long enough to be taken from the ring, and far from their ends.
    std::thread::sleep(Duration::from_millis(100));
    load.take();
    assert_eq!(load.ended, 0);
    kill(&mut server, &mut load);
    load.run_until("all ended", |load| load.in_flight() == 0);
    let log = server.log();
    assert!(log.contains("32 requests that were in flight are executed again"), "{log}");
    assert_disk(server, &load);
}
