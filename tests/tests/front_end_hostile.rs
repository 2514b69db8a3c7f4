//! The front end before back ends that mean harm or hang: what they would stop for good if they were trusted to answer, to
//! accept, or to leave a descriptor's flags alone. What they can do to a ring, `bdev_virtio.rs` has.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc::channel;
use std::time::Duration;

use resilver_bdev::{Bdev, IoKind};
use resilver_tests::driver::Driver;
use resilver_tests::fake_back_end::{Face, FakeBackEnd, Twist};
use resilver_tests::served::wait_until;
use resilver_vhost::bdev_virtio::{Virtio, VirtioConfig};
use resilver_vhost::front_end::{Connection, ConnectionConfig, FrontEndError};
use resilver_vhost::protocol::{features, protocol_features};

const SECTORS: u64 = 2048;
const DEADLINE: Duration = Duration::from_millis(200);
/// Far more than the deadline, on a busy machine.
const HANGS: Duration = Duration::from_secs(20);

fn scratch() -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("socket");
    (directory, socket)
}

fn config() -> ConnectionConfig {
    ConnectionConfig { deadline: DEADLINE, ..ConnectionConfig::default() }
}

/// Calls on a thread of its own, so that one that never returns is a failed test.
fn in_time<T: Send + 'static>(call: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, result) = channel();
    std::thread::spawn(move || drop(sender.send(call())));
    result.recv_timeout(HANGS).expect("it hangs")
}

/// A bdev of the export at `socket` that waits for it for ever.
fn remote(socket: PathBuf) -> Virtio {
    let name = "remote".to_owned();
    Virtio::connect(VirtioConfig { name, socket, num_queues: None, reconnect_timeout: None })
        .unwrap()
}

#[test]
fn an_answer_that_comes_byte_by_byte_is_late() {
    let (_directory, socket) = scratch();
    let back_end = FakeBackEnd::listen(&socket, Face::of_sectors(SECTORS));
    // Each byte in time, the twenty of them not.
    back_end.twist([Twist::None, Twist::Slowly(DEADLINE / 4)]);
    let refused = Connection::connect(&socket, config()).err();
    let late = Some("GET_PROTOCOL_FEATURES");
    assert!(
        matches!(&refused, Some(FrontEndError::Deadline { message, .. }) if Some(*message) == late),
        "{refused:?}"
    );
}

/// SPDK dies of memory that is not of huge pages.
#[test]
fn who_loses_a_back_end_over_ordinary_memory_is_told_of_huge_pages() {
    let (_directory, socket) = scratch();
    let back_end = FakeBackEnd::listen(&socket, Face::of_sectors(SECTORS));
    // Two queries, two acknowledgements, one query about the disk; then the memory.
    let mut twists = vec![Twist::None; 5];
    twists.push(Twist::Cut(0));
    back_end.twist(twists);
    let refused = Connection::connect(&socket, config()).err().unwrap();
    let told = refused.to_string();
    assert!(told.contains("lost at SET_MEM_TABLE"), "{told}");
    if matches!(refused, FrontEndError::OrdinaryPages { .. }) {
        assert!(told.contains("2 MiB") && told.contains("nr_hugepages"), "{told}");
    }
}

#[test]
fn a_socket_whose_queue_is_full_is_an_error_and_no_wait() {
    let (_directory, socket) = scratch();
    let flags = rustix::net::SocketFlags::CLOEXEC;
    let (family, kind) = (rustix::net::AddressFamily::UNIX, rustix::net::SocketType::STREAM);
    let listener = rustix::net::socket_with(family, kind, flags, None).unwrap();
    rustix::net::bind(&listener, &rustix::net::SocketAddrUnix::new(&socket).unwrap()).unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let _first = UnixStream::connect(&socket).unwrap();
    let refused = in_time(move || Connection::connect(&socket, config()).err());
    assert!(matches!(refused, Some(FrontEndError::Connect { .. })), "{refused:?}");
}

#[test]
fn a_kick_descriptor_that_is_full_and_blocks_stops_nobody() {
    let (_directory, socket) = scratch();
    let mut face = Face::of_sectors(SECTORS);
    face.jams = true;
    let _back_end = FakeBackEnd::listen(&socket, face);
    let connected = in_time(move || Connection::connect(&socket, config()).map(drop));
    assert!(connected.is_ok(), "{connected:?}");
}

#[test]
fn a_device_that_takes_no_buffers_to_a_request_takes_one() {
    let (_directory, socket) = scratch();
    let _back_end =
        FakeBackEnd::listen(&socket, Face::of_sectors(SECTORS).and(features::SEG_MAX, 0));
    let bdev = remote(socket);
    assert_eq!(Driver::new(&bdev, 1).limits().max_transfer, 65536);
}

/// The owner of a ring is slow: before it has made its ring ready another back end comes and goes, and the ring was never shown
/// to that one. So that one's record of what is in flight says nothing about it.
#[test]
fn a_ring_that_no_back_end_was_shown_is_in_no_record() {
    let (_directory, socket) = scratch();
    let face = Face::of_sectors(SECTORS).and(0, protocol_features::INFLIGHT_SHMFD);
    let back_end = FakeBackEnd::listen(&socket, face);
    let bdev = remote(socket);
    let mut driver = Driver::new(&bdev, 8);
    let mut ring = back_end.ring(1, 0);
    let payload = [driver.slice(0, 4096)];
    for at in 0..3 {
        driver.submit(IoKind::Write, at * 4096, 4096, &payload);
    }
    driver.turn();
    let requests: Vec<_> = (0..3).map(|_| ring.wait()).collect();
    ring.complete(&requests[1], 0);
    driver.turn();
    ring.use_up(u32::MAX, 0);
    driver.turn();
    let reconnects = |bdev: &Virtio| bdev.link().map_or(0, |link| link.reconnects);
    wait_until("another back end comes", || reconnects(&bdev) == 1);
    back_end.hang_up();
    wait_until("and another", || reconnects(&bdev) == 2);
    wait_until("which is shown the ring", || {
        driver.turn();
        back_end.started(3, 0).is_some()
    });
    let mut ring = back_end.ring(3, 0);
    // Anew, and what has ended is not in it.
    assert_eq!((ring.taken(), ring.used(), ring.available()), (0, 0, 2));
    for sector in [0, 16] {
        let request = ring.wait();
        assert_eq!(request.sector, sector);
        ring.complete(&request, 0);
    }
    assert!(driver.drain().values().all(Result::is_ok));
}
