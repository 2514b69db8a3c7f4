//! The `virtio` bdev before back ends that die, lie, change and come back. That it is a disk as any other says
//! `conformance.rs`.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use resilver_bdev::{Bdev, BdevError, Detail, IoError, IoKind};
use resilver_reactor::Armed;
use resilver_sys::WaitSet;
use resilver_tests::driver::{Driver, pattern};
use resilver_tests::e2e::StorageDaemon;
use resilver_tests::fake_back_end::{Face, FakeBackEnd, FakeRing};
use resilver_tests::served::wait_until;
use resilver_vhost::bdev_virtio::{Virtio, VirtioConfig};
use resilver_vhost::protocol::{blk_type, features, protocol_features};
use rustix::process::Signal;

const SECTORS: u64 = 2048;
const MIB: u64 = 1 << 20;

struct Scratch {
    directory: tempfile::TempDir,
    socket: PathBuf,
}

impl Scratch {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("socket");
        Self { directory, socket }
    }

    fn listen(&self, face: Face) -> FakeBackEnd {
        FakeBackEnd::listen(&self.socket, face)
    }

    fn connect(&self, change: impl FnOnce(&mut VirtioConfig)) -> Result<Virtio, BdevError> {
        let mut config = VirtioConfig {
            name: "remote".to_owned(),
            socket: self.socket.clone(),
            num_queues: None,
            reconnect_timeout: None,
        };
        change(&mut config);
        Virtio::connect(config)
    }
}

fn plain() -> Face {
    Face::of_sectors(SECTORS)
}

fn recording() -> Face {
    plain().and(0, protocol_features::INFLIGHT_SHMFD)
}

fn detail(bdev: &Virtio, name: &str) -> String {
    let found = bdev.details().into_iter().find(|(known, _)| *known == name);
    match found {
        Some((_, Detail::Text(text))) => text,
        Some((_, Detail::Number(number))) => number.to_string(),
        Some((_, Detail::Flag(flag))) => flag.to_string(),
        None => String::new(),
    }
}

/// Turns until the back end has got a request.
fn turn_until_taken(
    driver: &mut Driver,
    ring: &mut FakeRing,
) -> resilver_tests::fake_back_end::FakeRequest {
    let begun = Instant::now();
    loop {
        driver.turn();
        if let Some(request) = ring.take() {
            return request;
        }
        assert!(begun.elapsed() < Duration::from_secs(30), "no request came");
        std::thread::yield_now();
    }
}

/// Turns until the back end has been connected to so many times and serves the ring again.
fn turn_until_served(
    driver: &mut Driver,
    back_end: &FakeBackEnd,
    connection: usize,
    index: usize,
) -> FakeRing {
    let begun = Instant::now();
    loop {
        driver.turn();
        if let Some(ring) = back_end.started(connection, index) {
            return ring;
        }
        assert!(begun.elapsed() < Duration::from_secs(30), "it does not come back");
        std::thread::yield_now();
    }
}

#[test]
fn an_answer_that_is_no_success_is_an_error_of_that_request_alone() {
    let scratch = Scratch::new();
    let back_end = scratch.listen(plain());
    let bdev = scratch.connect(|_| ()).unwrap();
    let mut driver = Driver::new(&bdev, 8);
    let mut ring = back_end.ring(1, 0);
    for (status, expected) in [
        (Some(1), Err(IoError::IO)),
        (Some(2), Err(IoError::NOT_SUPPORTED)),
        (Some(3), Err(IoError::IO)),
        (Some(255), Err(IoError::IO)),
        (None, Err(IoError::IO)),
        (Some(0), Ok(())),
    ] {
        let payload = [driver.slice(0, 4096)];
        let tag = driver.submit(IoKind::Write, 0, 4096, &payload);
        let request = turn_until_taken(&mut driver, &mut ring);
        match status {
            Some(status) => ring.complete(&request, status),
            None => ring.use_up(u32::from(request.head), u32::MAX),
        }
        assert_eq!(driver.drain().remove(&tag), Some(expected), "{status:?}");
    }
    assert_eq!(back_end.connections(), 1);
}

/// Whatever it does to the ring: the next back end gets the request, and it ends once.
#[test]
fn a_back_end_that_breaks_the_ring_loses_the_connection_and_no_request() {
    type Breach = fn(&mut FakeRing, u16);
    let breaches: [Breach; 4] = [
        |ring, head| ring.use_up(u32::from(head) + 1, 1),
        |ring, _| ring.use_up(u32::MAX, 0),
        |ring, _| ring.set_used(7),
        |ring, head| {
            ring.use_up(u32::from(head), 1);
            ring.use_up(u32::from(head), 1);
        },
    ];
    for face in [plain(), recording()] {
        for (number, breach) in breaches.iter().enumerate() {
            let scratch = Scratch::new();
            let back_end = scratch.listen(face.clone());
            let bdev = scratch.connect(|_| ()).unwrap();
            let mut driver = Driver::new(&bdev, 8);
            let mut ring = back_end.ring(1, 0);
            let payload = [driver.slice(0, 4096), driver.slice(8192, 4096)];
            driver.fill(&payload, 5);
            driver.submit(IoKind::Write, 4096, 8192, &payload);
            let request = turn_until_taken(&mut driver, &mut ring);
            breach(&mut ring, request.head);
            let mut ring = turn_until_served(&mut driver, &back_end, 2, 0);
            assert_eq!(driver.in_flight(), 1, "breach {number}");
            let request = turn_until_taken(&mut driver, &mut ring);
            assert_eq!((request.kind, request.sector), (blk_type::OUT, 8));
            let mut bytes = vec![0; 8192];
            ring.read(request.data[0].0, &mut bytes);
            assert!(bytes == pattern(5, 8192));
            ring.complete(&request, 0);
            assert!(driver.drain().values().all(Result::is_ok), "breach {number}");
        }
    }
}

#[test]
fn an_export_that_is_no_disk_is_refused_when_the_bdev_is_made() {
    let mut odd_blocks = plain().and(features::BLK_SIZE, 0);
    odd_blocks.config[20..24].copy_from_slice(&520u32.to_le_bytes());
    let mut nothing = plain();
    nothing.features &= !features::VERSION_1;
    let mut no_rings = plain().and(0, protocol_features::MQ);
    no_rings.queues = 0;
    for (face, reason) in [
        (Face::of_sectors(0), "0 bytes"),
        (Face::of_sectors(u64::MAX), "bytes at most"),
        (odd_blocks, "520 bytes"),
        (nothing, "VIRTIO_F_VERSION_1"),
        (no_rings, "at least one ring"),
    ] {
        let scratch = Scratch::new();
        let _back_end = scratch.listen(face);
        let refused = scratch.connect(|_| ()).unwrap_err();
        assert!(matches!(refused, BdevError::Export { .. }), "{refused:?}");
        assert!(refused.to_string().contains(reason), "{refused}");
    }
    let scratch = Scratch::new();
    let _back_end = scratch.listen(plain());
    for asked in [0, 2, 300] {
        let refused = scratch.connect(|config| config.num_queues = Some(asked)).unwrap_err();
        let message = refused.to_string();
        assert!(message.contains("num_queues is") && message.contains("from 1 to"), "{message}");
    }
}

#[test]
fn what_is_in_flight_when_a_back_end_dies_is_carried_out_by_the_next_and_answered_once() {
    let scratch = Scratch::new();
    let back_end = scratch.listen(plain());
    let bdev = scratch.connect(|_| ()).unwrap();
    let mut driver = Driver::new(&bdev, 8);
    let mut ring = back_end.ring(1, 0);
    let payload = [driver.slice(0, 4096)];
    let tags: Vec<_> =
        (0..3).map(|at| driver.submit(IoKind::Write, at * 4096, 4096, &payload)).collect();
    let requests: Vec<_> = (0..3).map(|_| turn_until_taken(&mut driver, &mut ring)).collect();
    // Completed, and the back end dies before anybody has looked.
    ring.complete(&requests[1], 0);
    back_end.hang_up();
    wait_until("the loss is seen", || detail(&bdev, "state") == "reconnecting");
    let read = driver.submit(IoKind::Read, 0, 4096, &payload);

    let mut ring = turn_until_served(&mut driver, &back_end, 2, 0);
    let sectors: Vec<_> = (0..4).map(|_| turn_until_taken(&mut driver, &mut ring)).collect();
    let mut order: Vec<_> = sectors.iter().map(|it| (it.kind, it.sector)).collect();
    order.sort_unstable();
    // Everything again, also what was completed and not seen: without a record there is no telling.
    let out = blk_type::OUT;
    assert_eq!(order, [(blk_type::IN, 0), (out, 0), (out, 8), (out, 16)]);
    for request in &sectors {
        ring.complete(request, 0);
    }
    let results = driver.drain();
    assert_eq!(results.len(), 4);
    assert!(tags.iter().chain([&read]).all(|tag| results[tag] == Ok(())));
    assert_eq!(
        (detail(&bdev, "state").as_str(), detail(&bdev, "reconnects").as_str()),
        ("connected", "1")
    );
}

#[test]
fn a_back_end_that_keeps_a_record_is_followed_by_one_that_has_it() {
    let scratch = Scratch::new();
    let back_end = scratch.listen(recording());
    let bdev = scratch.connect(|_| ()).unwrap();
    assert_eq!(detail(&bdev, "inflight_recorded"), "true");
    let mut driver = Driver::new(&bdev, 8);
    let mut ring = back_end.ring(1, 0);
    let record = back_end.inflight_inode().unwrap();
    let payload = [driver.slice(0, 4096)];
    for at in 0..2 {
        driver.submit(IoKind::Write, at * 4096, 4096, &payload);
    }
    let requests: Vec<_> = (0..2).map(|_| turn_until_taken(&mut driver, &mut ring)).collect();
    ring.complete(&requests[0], 0);
    back_end.hang_up();
    let mut ring = turn_until_served(&mut driver, &back_end, 2, 0);
    assert_eq!(back_end.inflight_inode(), Some(record));
    // The ring is as it was; what the record says is in flight is the back end's to carry out.
    assert_eq!((ring.taken(), ring.used(), ring.available()), (1, 1, 2));
    ring.complete(&requests[1], 0);
    let results = driver.drain();
    assert!(driver.in_flight() == 0 && results.values().all(Result::is_ok));
}

/// The owner of a ring may not look while one back end goes and another comes and goes: what that one has recorded has nothing of
/// this ring in it.
#[test]
fn a_ring_whose_owner_sleeps_through_two_back_ends_is_offered_whole_to_the_third() {
    let scratch = Scratch::new();
    let mut face = recording().and(features::MQ, protocol_features::MQ);
    face.queues = 2;
    let back_end = scratch.listen(face);
    let bdev = scratch.connect(|_| ()).unwrap();
    let (mut awake, mut asleep) = (Driver::new(&bdev, 8), Driver::new(&bdev, 8));
    let (mut broken, mut ring) = (back_end.ring(1, 0), back_end.ring(1, 1));
    let payload = [asleep.slice(0, 4096)];
    let tags = [0, 4096].map(|at| asleep.submit(IoKind::Write, at, 4096, &payload));
    let requests = [(); 2].map(|()| turn_until_taken(&mut asleep, &mut ring));
    // The younger one ends, so where the ring stands does not say what is left in it.
    ring.complete(&requests[1], 0);
    while asleep.in_flight() > 1 {
        asleep.turn();
    }

    let payload = [awake.slice(0, 4096)];
    awake.submit(IoKind::Write, 8192, 4096, &payload);
    turn_until_taken(&mut awake, &mut broken);
    broken.use_up(u32::MAX, 0);
    turn_until_served(&mut awake, &back_end, 2, 0);
    back_end.hang_up();
    turn_until_served(&mut awake, &back_end, 3, 0);

    let mut ring = turn_until_served(&mut asleep, &back_end, 3, 1);
    let request = turn_until_taken(&mut asleep, &mut ring);
    assert_eq!((request.kind, request.sector), (blk_type::OUT, 0), "the one that has not ended");
    ring.complete(&request, 0);
    let results = asleep.drain();
    assert!(results[&tags[0]] == Ok(()) && asleep.in_flight() == 0);
}

#[test]
fn requests_fail_when_an_outage_lasts_too_long_and_succeed_when_it_is_over() {
    for face in [plain(), recording()] {
        let scratch = Scratch::new();
        let back_end = scratch.listen(face.clone());
        let timeout = Some(Duration::from_millis(50));
        let bdev = scratch.connect(|config| config.reconnect_timeout = timeout).unwrap();
        let mut driver = Driver::new(&bdev, 8);
        let mut ring = back_end.ring(1, 0);
        let payload = [driver.slice(0, 4096)];
        driver.submit(IoKind::Write, 0, 4096, &payload);
        turn_until_taken(&mut driver, &mut ring);
        // Nobody is to come back: the one that answers has another disk.
        let half = Face::of_sectors(SECTORS / 2).config;
        back_end.set_face(Face { config: half, ..face.clone() });
        back_end.hang_up();
        assert!(driver.drain().values().all(|result| *result == Err(IoError::IO)));
        wait_until("it is said", || detail(&bdev, "state") == "failing");
        assert_eq!(driver.write(0, &payload), Err(IoError::IO), "and at once");
        assert_eq!(driver.run(IoKind::Flush, 0, 0, &[]), Err(IoError::IO));
        wait_until("the reason is told", || {
            detail(&bdev, "reason").contains("has 524288 bytes now, and had 1048576")
        });
        // Nor one that has the size but is another.
        back_end.set_face(Face { serial: [b'x'; 20], ..face.clone() });
        wait_until("the reason is told", || {
            detail(&bdev, "reason").contains(&format!("'{}', and was 'fake'", "x".repeat(20)))
        });
        assert!(detail(&bdev, "attempts").parse::<u64>().unwrap() > 0);

        back_end.set_face(face);
        wait_until("it is there again", || {
            driver.turn();
            detail(&bdev, "state") == "connected"
        });
        let connection = back_end.connections();
        let mut ring = turn_until_served(&mut driver, &back_end, connection, 0);
        // Nothing of what has failed is carried out after all.
        assert_eq!((ring.available(), ring.used()), (0, 0));
        driver.submit(IoKind::Read, 512, 4096, &payload);
        let request = turn_until_taken(&mut driver, &mut ring);
        assert_eq!((request.kind, request.sector), (blk_type::IN, 1));
        ring.write(request.data[0].0, &pattern(8, 4096));
        ring.complete(&request, 0);
        assert!(driver.drain().values().all(Result::is_ok));
        assert!(driver.bytes(&payload) == pattern(8, 4096));
    }
}

/// Nobody gets anything from such a one, however often it answers.
#[test]
fn a_back_end_that_refuses_a_ring_does_not_end_the_outage() {
    let scratch = Scratch::new();
    let mut face = plain().and(features::MQ, protocol_features::MQ);
    face.queues = 2;
    let back_end = scratch.listen(face.clone());
    // Longer than the longest pause between two attempts.
    let timeout = Some(Duration::from_millis(1500));
    let bdev = scratch.connect(|config| config.reconnect_timeout = timeout).unwrap();
    let (_idle, mut driver) = (Driver::new(&bdev, 8), Driver::new(&bdev, 8));
    let mut ring = back_end.ring(1, 1);
    let payload = [driver.slice(0, 4096)];
    driver.submit(IoKind::Write, 0, 4096, &payload);
    turn_until_taken(&mut driver, &mut ring);
    back_end.set_face(Face { refuses: Some(1), ..face.clone() });
    back_end.hang_up();
    assert!(driver.drain().values().all(|result| *result == Err(IoError::IO)));
    wait_until("the reason is told", || detail(&bdev, "reason").contains("refused"));
    assert_eq!(detail(&bdev, "reconnects"), "0");

    back_end.set_face(face);
    wait_until("it is there again", || {
        driver.turn();
        detail(&bdev, "state") == "connected"
    });
    let connection = back_end.connections();
    let mut ring = turn_until_served(&mut driver, &back_end, connection, 1);
    let tag = driver.submit(IoKind::Write, 0, 4096, &payload);
    let request = turn_until_taken(&mut driver, &mut ring);
    ring.complete(&request, 0);
    assert_eq!(driver.drain().remove(&tag), Some(Ok(())));
}

#[test]
fn a_channel_has_a_ring_to_itself_and_the_one_too_many_is_refused() {
    let scratch = Scratch::new();
    let mut face = plain().and(features::MQ, protocol_features::MQ);
    face.queues = 2;
    let back_end = scratch.listen(face);
    let bdev = scratch.connect(|_| ()).unwrap();
    let one = Driver::new(&bdev, 4);
    let mut two = Driver::new(&bdev, 4);
    let refused = bdev.open_channel(4).err().unwrap().to_string();
    assert!(refused.contains("2 rings") && refused.contains("num_queues"), "{refused}");
    drop(one);
    drop(Driver::new(&bdev, 4));

    // One that goes with a request in flight takes its ring with it until that has ended.
    let mut ring = back_end.ring(1, 1);
    let payload = [two.slice(0, 4096)];
    two.submit(IoKind::Write, 0, 4096, &payload);
    let request = turn_until_taken(&mut two, &mut ring);
    drop(two);
    let _one = Driver::new(&bdev, 4);
    assert!(bdev.open_channel(4).is_err());
    ring.complete(&request, 0);
    wait_until("the ring is free", || detail(&bdev, "free_queues") == "1");
    let mut two = Driver::new(&bdev, 4);
    two.submit(IoKind::Write, 0, 4096, &payload);
    let request = turn_until_taken(&mut two, &mut ring);
    ring.complete(&request, 0);
    assert!(two.drain().values().all(Result::is_ok));
}

/// Some serve none before they have all.
#[test]
fn a_ring_that_no_channel_has_is_shown_to_the_next_back_end_like_the_others() {
    for face in [plain(), recording()] {
        let scratch = Scratch::new();
        let mut face = face.and(features::MQ, protocol_features::MQ);
        face.queues = 3;
        let back_end = scratch.listen(face);
        let bdev = scratch.connect(|_| ()).unwrap();
        // The first ring has had a channel, the second has one, the third never had any.
        let first = Driver::new(&bdev, 4);
        let mut second = Driver::new(&bdev, 4);
        drop(first);
        for connection in 2..4 {
            back_end.hang_up();
            turn_until_served(&mut second, &back_end, connection, 1);
            let _free = [back_end.ring(connection, 0), back_end.ring(connection, 2)];
        }
    }
}

#[test]
fn a_back_end_that_cannot_zero_is_written_zeroes_and_one_that_cannot_discard_is_not_asked() {
    let scratch = Scratch::new();
    let back_end = scratch.listen(plain());
    let bdev = scratch.connect(|_| ()).unwrap();
    let mut driver = Driver::new(&bdev, 4);
    let mut ring = back_end.ring(1, 0);
    assert!(!driver.limits().unmap);
    assert_eq!(driver.run(IoKind::Unmap, 0, 4096, &[]), Ok(()));
    assert_eq!(ring.take(), None);
    // It takes one buffer to a request, and so 64 KiB.
    driver.submit_zeroes(4096, 150 * 512, true);
    let mut at = 8;
    for length in [65536u32, 11264] {
        let request = turn_until_taken(&mut driver, &mut ring);
        assert_eq!((request.kind, request.sector), (blk_type::OUT, at));
        let mut bytes = vec![1; length as usize];
        assert_eq!(request.data[0].1, length);
        ring.read(request.data[0].0, &mut bytes);
        assert!(bytes.iter().all(|byte| *byte == 0));
        ring.complete(&request, 0);
        at += u64::from(length) / 512;
    }
    assert!(driver.drain().values().all(Result::is_ok));
}

#[test]
fn a_range_is_cut_to_what_the_back_end_takes_at_once() {
    let mut face = plain().and(features::DISCARD | features::WRITE_ZEROES, 0);
    face.config[36..40].copy_from_slice(&8u32.to_le_bytes());
    face.config[48..52].copy_from_slice(&16u32.to_le_bytes());
    let scratch = Scratch::new();
    let back_end = scratch.listen(face);
    let bdev = scratch.connect(|_| ()).unwrap();
    let mut driver = Driver::new(&bdev, 4);
    let mut ring = back_end.ring(1, 0);
    for (kind, asked, pieces) in
        [(IoKind::Unmap, blk_type::DISCARD, 3), (IoKind::WriteZeroes, blk_type::WRITE_ZEROES, 2)]
    {
        driver.submit(kind, 0, 20 * 512, &[]);
        for _ in 0..pieces {
            let request = turn_until_taken(&mut driver, &mut ring);
            assert_eq!(request.kind, asked);
            ring.complete(&request, 0);
        }
        assert!(driver.drain().values().all(Result::is_ok));
        assert_eq!(ring.take(), None, "{kind:?}");
    }
}

#[test]
fn an_export_that_grows_says_so_and_is_larger() {
    let scratch = Scratch::new();
    let back_end = scratch.listen(plain().and(0, protocol_features::BACKEND_REQ));
    let bdev = scratch.connect(|_| ()).unwrap();
    let grown = Arc::new(Mutex::new(Vec::new()));
    let told = Arc::clone(&grown);
    bdev.watch_size(move |size| told.lock().unwrap().push(size));
    back_end.grow(4096);
    back_end.say_config_changed();
    wait_until("it is larger", || detail(&bdev, "export_size") == (2 * MIB).to_string());
    assert_eq!(*grown.lock().unwrap(), [2 * MIB]);
    // Whoever uses it decides when: what is above has to follow.
    assert_eq!(bdev.geometry().size(), MIB);
    let refused = bdev.resize(3 * MIB).unwrap_err().to_string();
    assert!(refused.contains("from 1048576 to 2097152 bytes"), "{refused}");
    bdev.resize(2 * MIB).unwrap();
    let mut driver = Driver::new(&bdev, 4);
    assert_eq!(driver.limits().num_blocks, 4096);
    let mut ring = back_end.ring(1, 0);
    let payload = [driver.slice(0, 512)];
    driver.submit(IoKind::Write, 2 * MIB - 512, 512, &payload);
    let request = turn_until_taken(&mut driver, &mut ring);
    assert_eq!(request.sector, 4095);
    ring.complete(&request, 0);
    assert!(driver.drain().values().all(Result::is_ok));
}

#[test]
fn a_sleeping_channel_is_woken_by_an_answer_and_by_the_loss_of_the_connection() {
    let scratch = Scratch::new();
    let back_end = scratch.listen(plain());
    let bdev = scratch.connect(|_| ()).unwrap();
    let mut driver = Driver::new(&bdev, 4);
    let mut ring = back_end.ring(1, 0);
    assert!(!ring.wants_interrupts(), "while we poll");
    let payload = [driver.slice(0, 4096)];
    driver.submit(IoKind::Write, 0, 4096, &payload);
    let request = turn_until_taken(&mut driver, &mut ring);
    // No longer young.
    std::thread::sleep(Duration::from_millis(2));
    let mut set = WaitSet::with_capacity(1);
    let arm = |driver: &mut Driver, set: &mut WaitSet| {
        let (channel, cx) = driver.channel();
        set.clear();
        channel.arm(&cx, set)
    };
    let slept = |set: &mut WaitSet| {
        let begun = Instant::now();
        set.sleep(Some(20_000_000_000));
        begun.elapsed() < Duration::from_secs(10)
    };
    assert_eq!(arm(&mut driver, &mut set), Armed::Until(None));
    assert!(ring.wants_interrupts());
    let answer = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(20));
        ring.complete(&request, 0);
        ring
    });
    assert!(slept(&mut set), "nothing woke it");
    let ring = answer.join().unwrap();
    assert_eq!(arm(&mut driver, &mut set), Armed::Ready, "what has come is seen without a sleep");
    let (channel, cx) = driver.channel();
    channel.disarm(&cx);
    assert!(!ring.wants_interrupts());
    assert!(driver.drain().values().all(Result::is_ok));

    assert_eq!(arm(&mut driver, &mut set), Armed::Until(None), "idle");
    back_end.hang_up();
    assert!(slept(&mut set), "nothing woke it");
    let mut ring = turn_until_served(&mut driver, &back_end, 2, 0);
    driver.submit(IoKind::Read, 0, 4096, &payload);
    let request = turn_until_taken(&mut driver, &mut ring);
    ring.complete(&request, 0);
    assert!(driver.drain().values().all(Result::is_ok));
}

/// With a daemon that is killed again and again under load: every request ends well, and the file holds the last of each.
#[test]
fn a_storage_daemon_killed_under_load_costs_time_and_nothing_else() {
    const BLOCKS: u64 = 64;
    let scratch = Scratch::new();
    let file = scratch.directory.path().join("disk");
    std::fs::File::create(&file).unwrap().set_len(4 * MIB).unwrap();
    let serve = || {
        let _ = std::fs::remove_file(&scratch.socket);
        StorageDaemon::serve("bdev_virtio", &file, &scratch.socket, ",num-queues=2")
    };
    let Some(mut daemon) = serve() else { return };
    let bdev = scratch.connect(|_| ()).unwrap();
    let mut driver = Driver::new(&bdev, 16);
    let mut generation = 0;
    for _round in 0..4 {
        let begun = Instant::now();
        let mut stopped = false;
        while begun.elapsed() < Duration::from_millis(300) {
            generation += 1;
            for block in 0..16 {
                let payload = [driver.slice(block * 4096, 4096)];
                driver.fill(&payload, generation * BLOCKS + block);
                driver.submit(IoKind::Write, block * 4096, 4096, &payload);
            }
            driver.turn();
            if begun.elapsed() > Duration::from_millis(150) && !stopped {
                // Stopped first, so that requests are surely in flight when it is killed.
                rustix::process::kill_process(daemon.process(), Signal::STOP).unwrap();
                driver.turn();
                drop(daemon);
                daemon = serve().unwrap();
                stopped = true;
            }
            assert!(driver.drain().values().all(Result::is_ok));
        }
        assert!(stopped);
    }
    // The last one is counted when its rings have been started, and they may have done all there was to do by then.
    wait_until("every reconnect is counted", || {
        detail(&bdev, "reconnects").parse::<u64>().unwrap() >= 4
    });
    assert_eq!(driver.run(IoKind::Flush, 0, 0, &[]), Ok(()));
    let bytes = std::fs::read(&file).unwrap();
    for block in 0..16u64 {
        let expected = pattern(generation * BLOCKS + block, 4096);
        assert!(bytes[block as usize * 4096..][..4096] == expected, "block {block}");
    }
}
