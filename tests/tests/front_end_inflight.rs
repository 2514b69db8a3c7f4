//! A front end whose back end records what is in flight: the record is kept, and comes back to whoever serves next.

use std::path::{Path, PathBuf};

use resilver_tests::fake_back_end::{Face, FakeBackEnd};
use resilver_vhost::front_end::{
    Connection, ConnectionConfig, DataBuffer, DriverQueue, FrontEndError, Request,
};
use resilver_vhost::message::{InflightDescription, Message};
use resilver_vhost::protocol::protocol_features;

const SECTORS: u64 = 2048;
const BUFFER: DataBuffer = DataBuffer { offset: 0, length: 4096 };

fn scratch() -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("socket");
    (directory, socket)
}

fn recording() -> Face {
    Face::of_sectors(SECTORS).and(0, protocol_features::INFLIGHT_SHMFD)
}

fn connect(socket: &Path, inflight: bool) -> (Connection, Vec<DriverQueue>) {
    let config = ConnectionConfig { queue_size: 16, inflight, ..ConnectionConfig::default() };
    Connection::connect(socket, config).unwrap()
}

fn submit(queue: &mut DriverQueue, tags: std::ops::Range<u64>) {
    for tag in tags {
        queue.submit(Request::Write { offset: tag * 4096 }, &[BUFFER], tag).unwrap();
    }
    queue.publish();
}

/// Where a ring was said to go on, in the order in which that was said.
fn bases(back_end: &FakeBackEnd) -> Vec<u32> {
    let base = |message| match message {
        Message::SetVringBase { base, .. } => Some(base),
        _ => None,
    };
    back_end.heard().into_iter().filter_map(base).collect()
}

#[test]
fn the_record_goes_from_one_back_end_to_the_next_and_the_ring_stays_as_it_is() {
    let (_directory, socket) = scratch();
    let back_end = FakeBackEnd::listen(&socket, recording());
    let (mut connection, mut queues) = connect(&socket, true);
    assert!(connection.records_inflight());
    let heard = back_end.heard();
    let wanted =
        InflightDescription { mmap_size: 0, mmap_offset: 0, num_queues: 1, queue_size: 16 };
    assert!(heard.contains(&Message::GetInflightFd(wanted)));
    let given = Message::SetInflightFd(InflightDescription { mmap_size: 4096, ..wanted });
    let position = |wanted: &Message| heard.iter().position(|message| message == wanted);
    let enabled = Message::SetVringEnable { index: 0, enable: 1 };
    assert!(position(&given).unwrap() < position(&enabled).unwrap(), "{heard:?}");
    let record = back_end.inflight_inode().unwrap();

    // Three are taken; one is completed and seen, one completed and not seen, one not completed.
    let mut ring = back_end.ring(1, 0);
    submit(&mut queues[0], 0..3);
    let requests: Vec<_> = (0..3).map(|_| ring.wait()).collect();
    ring.complete(&requests[0], 0);
    assert_eq!(queues[0].pop().unwrap().unwrap().tag, 0);
    ring.complete(&requests[2], 0);
    back_end.hang_up();
    while !connection.is_closed() {
        std::thread::yield_now();
    }
    // What is submitted while nobody serves waits in the ring.
    submit(&mut queues[0], 3..4);

    connection.reconnect(&mut queues).unwrap();
    assert_eq!(back_end.inflight_inode(), Some(record));
    assert!(back_end.heard().contains(&given));
    assert_eq!(bases(&back_end), [2], "it goes on behind what is completed");
    let mut ring = back_end.ring(2, 0);
    assert!(ring.was_kicked());
    assert_eq!((ring.used(), ring.available()), (2, 4), "the ring is as it was");
    assert_eq!(queues[0].pop().unwrap().unwrap().tag, 2, "what was completed is not lost");
    // A back end that recovers begins with what its record says is in flight: here the second request.
    ring.complete(&requests[1], 0);
    assert_eq!(queues[0].pop().unwrap().unwrap().tag, 1);
    assert_eq!(queues[0].in_flight(), 1);
}

#[test]
fn without_a_record_what_is_in_flight_is_offered_again() {
    for (face, asks) in [(recording(), false), (Face::of_sectors(SECTORS), true)] {
        let (_directory, socket) = scratch();
        let back_end = FakeBackEnd::listen(&socket, face);
        let (mut connection, mut queues) = connect(&socket, asks);
        assert!(!connection.records_inflight());
        let mut ring = back_end.ring(1, 0);
        submit(&mut queues[0], 0..3);
        let requests: Vec<_> = (0..3).map(|_| ring.wait()).collect();
        ring.complete(&requests[1], 0);
        assert_eq!(queues[0].pop().unwrap().unwrap().tag, 1);
        back_end.hang_up();
        connection.reconnect(&mut queues).unwrap();
        assert_eq!(bases(&back_end), [0]);
        let mut ring = back_end.ring(2, 0);
        let again = [ring.wait(), ring.wait()];
        assert_eq!(again, [requests[0].clone(), requests[2].clone()]);
        assert_eq!(ring.take(), None);
    }
}

#[test]
fn a_successor_that_keeps_no_record_is_refused() {
    let (_directory, socket) = scratch();
    let back_end = FakeBackEnd::listen(&socket, recording());
    let (mut connection, mut queues) = connect(&socket, true);
    back_end.set_face(Face::of_sectors(SECTORS));
    back_end.hang_up();
    let refused = connection.reconnect(&mut queues);
    assert!(matches!(refused, Err(FrontEndError::Missing(_))), "{refused:?}");
    // It may be tried again.
    back_end.set_face(recording());
    back_end.hang_up();
    connection.reconnect(&mut queues).unwrap();
}
