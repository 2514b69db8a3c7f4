//! What a live migration of a guest asks of its disk: the dirty log while the guest runs.

// A test may fail by panicking.
#![allow(clippy::unwrap_used)]

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use resilver_bdev::Bdev;
use resilver_bdev::malloc::Malloc;
use resilver_tests::raw_guest::{BASE, DATA, MEMORY, RawGuest, memory_file};
use resilver_tests::served::Served;
use resilver_vhost::message::{Message, Reply};
use resilver_vhost::protocol::{blk_type, features};

const BLOCK: u32 = 4096;
const PAGE: u64 = 4096;
/// A bit for each page up to the end of guest memory.
const LOG_BYTES: u64 = (BASE + MEMORY) / PAGE / 8;

fn malloc() -> Arc<dyn Bdev> {
    Arc::new(Malloc::new("malloc0", BLOCK, 1024).unwrap())
}

/// A dirty log as a monitor keeps it.
struct Log(OwnedFd);

impl Log {
    fn new() -> Self {
        Self(memory_file(LOG_BYTES))
    }

    fn message() -> Message {
        Message::SetLogBase { size: LOG_BYTES, offset: 0 }
    }

    /// The pages of guest memory that are marked, and no longer then.
    fn take(&self) -> Vec<u64> {
        let mut bits = vec![0; usize::try_from(LOG_BYTES).unwrap()];
        rustix::io::pread(&self.0, &mut bits, 0).unwrap();
        rustix::io::pwrite(&self.0, &vec![0; bits.len()], 0).unwrap();
        let marked = |page: &u64| bits[usize::try_from(page / 8).unwrap()] >> (page % 8) & 1 == 1;
        (0..LOG_BYTES * 8).filter(marked).map(|page| page * PAGE - BASE).collect()
    }
}

#[test]
fn what_a_running_device_writes_is_logged_from_the_message_on() {
    let served = Served::new(&*malloc());
    let mut guest = RawGuest::connect(&served.socket(), memory_file(MEMORY));
    guest.negotiate(features::FLUSH);
    guest.start(0, false);
    assert_eq!(guest.run(blk_type::IN, 0, DATA, BLOCK), 0);
    let log = Log::new();
    guest.tell(&Log::message(), &[log.0.as_fd()]);
    assert_eq!(guest.run(blk_type::IN, 0, DATA, BLOCK), 0);
    assert_eq!(log.take(), Vec::<u64>::new(), "nobody has asked for it yet");
    guest.set_features(features::FLUSH | features::LOG_ALL);
    guest.tell(&guest.addresses(true), &[]);
    assert_eq!(guest.run(blk_type::IN, 0, DATA + PAGE, 2 * BLOCK), 0);
    assert_eq!(guest.stop(), 3);
    let mut marked = log.take();
    // The status byte and the used ring, then the two pages of data.
    assert_eq!(marked.split_off(2), [DATA + PAGE, DATA + 2 * PAGE]);
    guest.set_features(features::FLUSH);
    guest.start(3, false);
    assert_eq!(guest.run(blk_type::IN, 0, DATA, BLOCK), 0);
    assert_eq!(log.take(), Vec::<u64>::new(), "logging was switched off");
}

#[test]
fn the_log_is_answered_without_being_asked_and_exchanged_under_load() {
    let served = Served::new(&*malloc());
    let mut guest = RawGuest::connect(&served.socket(), memory_file(MEMORY));
    guest.negotiate(features::LOG_ALL);
    guest.start(0, true);
    let logs: Vec<Log> = (0..20).map(|_| Log::new()).collect();
    for log in &logs {
        guest.offer(blk_type::IN, 0, DATA, BLOCK);
        // As QEMU sends it: no flag that asks for an answer, and an answer waited for.
        guest.say(&Log::message(), &[log.0.as_fd()]);
        assert_eq!(guest.reply(), Some(Reply::U64(0)));
        assert_eq!(guest.run(blk_type::IN, 0, DATA, BLOCK), 0);
    }
    assert_eq!(guest.stop(), 40);
    assert!(logs.iter().all(|log| log.take().contains(&DATA)));
}

#[test]
fn a_log_that_is_too_small_or_is_none_is_refused_and_the_guest_runs_on() {
    let served = Served::new(&*malloc());
    let mut guest = RawGuest::connect(&served.socket(), memory_file(MEMORY));
    guest.negotiate(0);
    guest.start(0, false);
    let log = Log::new();
    let null = std::fs::File::open("/dev/null").unwrap();
    for (size, offset, fd) in [
        (LOG_BYTES - 1, 0, log.0.as_fd()),
        (LOG_BYTES, 1, log.0.as_fd()),
        (0, 0, log.0.as_fd()),
        (u64::MAX, 1, log.0.as_fd()),
        (LOG_BYTES, 0, null.as_fd()),
    ] {
        let message = Message::SetLogBase { size, offset };
        assert_eq!(guest.ask(&message, &[fd]), Some(Reply::U64(1)), "{message:?}");
        assert_eq!(guest.run(blk_type::IN, 0, DATA, BLOCK), 0);
    }
    // Memory that grows beyond a log that is in use.
    guest.tell(&Log::message(), &[log.0.as_fd()]);
    guest.set_features(features::LOG_ALL);
    let more = memory_file(PAGE);
    let mut region = guest.region();
    (region.guest_address, region.user_address, region.size) = (1 << 32, 1 << 32, PAGE);
    let add = Message::AddMemReg(region);
    assert_eq!(guest.ask(&add, &[more.as_fd()]), Some(Reply::U64(1)));
    guest.set_features(0);
    guest.tell(&add, &[more.as_fd()]);
    assert_eq!(guest.run(blk_type::IN, 0, DATA, BLOCK), 0);
}

#[test]
fn a_log_that_is_shortened_under_us_ends_its_session_and_nothing_else() {
    let served = Served::new(&*malloc());
    let mut guest = RawGuest::connect(&served.socket(), memory_file(MEMORY));
    guest.negotiate(features::LOG_ALL);
    guest.start(0, true);
    let log = Log::new();
    guest.tell(&Log::message(), &[log.0.as_fd()]);
    rustix::fs::ftruncate(&log.0, 0).unwrap();
    assert_eq!(guest.run(blk_type::IN, 0, DATA, BLOCK), 0);
    assert!(guest.is_closed());
    drop(guest);
    let mut guest = RawGuest::connect(&served.socket(), memory_file(MEMORY));
    guest.negotiate(0);
    guest.start(0, false);
    assert_eq!(guest.run(blk_type::IN, 0, DATA, BLOCK), 0);
}
