//! A controller that connects to its front end instead of the other way round.

// A test may fail by panicking.
#![allow(clippy::unwrap_used)]

use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use resilver_bdev::malloc::Malloc;
use resilver_reactor::ReactorConfig;
use resilver_tests::raw_guest::{DATA, MEMORY, RawGuest, memory_file};
use resilver_tests::served::{Served, wait_until};
use resilver_vhost::protocol::blk_type;
use resilver_vhost::server::Role;

const BLOCK: u32 = 4096;

/// A controller that looks for a front end, and where.
fn looking() -> (tempfile::TempDir, PathBuf, Served) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("monitor.sock");
    let (bdev, socket) = (Malloc::new("malloc0", BLOCK, 1024).unwrap(), path.clone());
    let served = Served::with(&bdev, ReactorConfig::default(), move |config| {
        config.role = Role::Connect;
        config.socket_path = socket;
    });
    (directory, path, served)
}

fn accept(listener: &UnixListener) -> UnixStream {
    listener.accept().unwrap().0
}

/// A guest whose monitor has been found reads a block.
fn reads(stream: UnixStream) -> RawGuest {
    let mut guest = RawGuest::over(stream, memory_file(MEMORY));
    guest.negotiate(0);
    guest.start(0, false);
    assert_eq!(guest.run(blk_type::IN, 0, DATA, BLOCK), 0);
    guest
}

#[test]
fn a_front_end_is_found_when_it_listens_and_again_when_it_was_lost() {
    let (_directory, path, mut served) = looking();
    std::thread::sleep(Duration::from_millis(100));
    let listener = UnixListener::bind(&path).unwrap();
    for _ in 0..3 {
        drop(reads(accept(&listener)));
    }
    // A monitor that dies takes its listener along; the next one makes another.
    let guest = reads(accept(&listener));
    drop((guest, listener));
    std::fs::remove_file(&path).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    let listener = UnixListener::bind(&path).unwrap();
    let mut guest = reads(accept(&listener));
    assert_eq!(served.ask(|it| it.info().sessions.len()), 1);
    assert_eq!(guest.run(blk_type::FLUSH, 0, DATA, 0), 0);
    served.stop().unwrap();
    assert!(guest.is_closed());
    assert!(path.exists(), "the socket is the front end's");
}

#[test]
fn a_front_end_that_hangs_up_is_not_called_without_end() {
    let (_directory, path, served) = looking();
    let listener = UnixListener::bind(&path).unwrap();
    let (begin, mut calls) = (Instant::now(), 0);
    while begin.elapsed() < Duration::from_secs(2) {
        drop(accept(&listener));
        calls += 1;
    }
    assert!(calls < 12, "called {calls} times in two seconds");
    drop(reads(accept(&listener)));
    assert!(served.stats().sessions.get() > 0);
}

#[test]
fn a_controller_that_looks_for_its_front_end_can_be_stopped_at_any_moment() {
    // Nobody listens.
    let (_directory, _path, mut served) = looking();
    served.stop().unwrap();
    // Between two tries.
    let (_directory, _path, mut served) = looking();
    std::thread::sleep(Duration::from_millis(200));
    served.stop().unwrap();
    // Somebody listens who does not accept, and somebody who does not speak.
    for speaks in [false, true] {
        let (_directory, path, mut served) = looking();
        let listener = UnixListener::bind(&path).unwrap();
        wait_until("it has connected", || served.ask(|it| it.info().sessions.len()) == 1);
        let _stream = speaks.then(|| accept(&listener));
        let begin = Instant::now();
        served.stop().unwrap();
        assert!(begin.elapsed() < Duration::from_secs(5));
    }
}
