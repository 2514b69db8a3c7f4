//! What a live migration of a guest asks of its disk: the dirty log while the guest runs, and a second session for where it
//! goes.

// A test may fail by panicking.
#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use resilver_bdev::error::{Effect, ErrorBdev, FOREVER, Injection};
use resilver_bdev::malloc::Malloc;
use resilver_bdev::{Bdev, IoKind};
use resilver_tests::raw_guest::{BASE, DATA, MEMORY, RawGuest, memory_file};
use resilver_tests::served::{Served, wait_until};
use resilver_vhost::message::{ConfigPiece, Message, Reply};
use resilver_vhost::protocol::{blk_type, config_flags, device_state, features};

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
    // And a log that does not cover what there is, however often it is asked for.
    let all = features::VERSION_1 | features::PROTOCOL_FEATURES | features::LOG_ALL;
    for _ in 0..2 {
        assert_eq!(guest.ask(&Message::SetFeatures(all), &[]), Some(Reply::U64(1)));
    }
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
    guest.offer(blk_type::IN, 0, DATA, BLOCK);
    assert!(guest.is_closed());
    assert!(!guest.is_idle(), "what could not be logged is not given back");
    drop(guest);
    let mut guest = RawGuest::connect(&served.socket(), memory_file(MEMORY));
    guest.negotiate(0);
    guest.start(0, false);
    assert_eq!(guest.run(blk_type::IN, 0, DATA, BLOCK), 0);
}

fn connect(served: &Served) -> RawGuest {
    RawGuest::connect(&served.socket(), memory_file(MEMORY))
}

fn connected(served: &Served, sessions: usize) {
    wait_until("they are connected", || served.ask(|it| it.info().sessions.len()) == sessions);
}

/// Copies pages of one guest's memory to the other's, as a monitor does.
fn copy(from: &RawGuest, to: &RawGuest, pages: &[u64]) {
    for page in pages {
        to.put(*page, &from.bytes(*page, usize::try_from(PAGE).unwrap()));
    }
}

#[test]
fn a_guest_moves_to_another_monitor_while_it_runs() {
    let served = Served::new(&*malloc());
    let mut source = connect(&served);
    let (wanted, log) = (features::FLUSH, Log::new());
    source.negotiate(wanted);
    source.start(0, false);
    for block in 0..8u8 {
        source.put(DATA, &[block + 1; BLOCK as usize]);
        assert_eq!(source.run(blk_type::OUT, 8 * u64::from(block), DATA, BLOCK), 0);
    }
    // The destination comes while the source runs, and may ask and describe what it likes.
    let mut destination = connect(&served);
    destination.negotiate(wanted);
    assert_eq!(destination.capacity(), 1024 * u64::from(BLOCK));
    connected(&served, 2);
    // Logging begins, all of memory is copied, and then what was dirtied, again and again.
    source.tell(&Log::message(), &[log.0.as_fd()]);
    source.set_features(wanted | features::LOG_ALL);
    source.tell(&source.addresses(true), &[]);
    copy(&source, &destination, &(0..MEMORY / PAGE).map(|page| page * PAGE).collect::<Vec<_>>());
    for block in 0..8u64 {
        let data = DATA + (block + 1) * PAGE;
        assert_eq!(source.run(blk_type::IN, 8 * block, data, BLOCK), 0);
        let dirty = log.take();
        assert!(dirty.contains(&data), "{dirty:x?}");
        copy(&source, &destination, &dirty);
        // What a guest writes by itself, its monitor sees without us.
        copy(&source, &destination, &[0, 0x2000, 0x4000]);
    }
    let base = source.stop();
    copy(&source, &destination, &log.take());
    let all = usize::try_from(MEMORY).unwrap();
    assert!(source.bytes(0, all) == destination.bytes(0, all), "no page was lost");
    destination.arrive();
    destination.start(base, false);
    let data = DATA + 0x10000;
    assert_eq!(destination.run(blk_type::IN, 8 * 7, data, BLOCK), 0);
    assert_eq!(destination.bytes(data, BLOCK as usize), [8; BLOCK as usize]);
    drop(source);
    connected(&served, 1);
    assert_eq!(destination.run(blk_type::FLUSH, 0, DATA, 0), 0);
}

#[test]
fn a_migration_that_is_given_up_leaves_the_source_running() {
    let served = Served::new(&*malloc());
    let mut source = connect(&served);
    source.negotiate(0);
    source.start(0, false);
    let destination = connect(&served);
    destination.negotiate(0);
    connected(&served, 2);
    let base = source.stop();
    drop(destination);
    source.start(base, false);
    assert_eq!(source.run(blk_type::IN, 0, DATA, BLOCK), 0);
    connected(&served, 1);
}

#[test]
fn rings_of_one_session_run_at_a_time() {
    let served = Served::new(&*malloc());
    let mut one = connect(&served);
    one.negotiate(0);
    one.start(0, false);
    let mut two = connect(&served);
    two.negotiate(0);
    two.describe(0, false);
    assert_eq!(two.ask(&RawGuest::kick(), &[]), Some(Reply::U64(1)), "refused");
    assert_eq!(one.run(blk_type::IN, 0, DATA, BLOCK), 0);
    let base = one.stop();
    two.start(0, false);
    one.describe(base, false);
    assert_eq!(one.ask(&RawGuest::kick(), &[]), Some(Reply::U64(1)), "refused in its turn");
    assert_eq!(two.run(blk_type::IN, 0, DATA, BLOCK), 0);
    // A session that ends makes room, whether it has stopped its rings or not.
    drop(two);
    one.start(base, false);
    assert_eq!(one.run(blk_type::IN, 0, DATA, BLOCK), 0);
}

#[test]
fn a_third_front_end_is_refused() {
    let served = Served::new(&*malloc());
    let (one, two) = (connect(&served), connect(&served));
    connected(&served, 2);
    assert!(connect(&served).is_closed());
    drop(one);
    let three = connect(&served);
    three.negotiate(0);
    two.negotiate(0);
}

#[test]
fn a_ring_waits_for_late_writes_of_a_session_that_was_killed_beside_it() {
    let error = Arc::new(ErrorBdev::new("error0", malloc()));
    let served = Served::new(&*error);
    let (kind, effect) = (Some(IoKind::Write), Effect::Stall);
    error.inject(Injection { kind, effect, count: FOREVER, range: None }).unwrap();
    let mut source = connect(&served);
    source.negotiate(0);
    source.start(0, false);
    let mut destination = connect(&served);
    destination.negotiate(0);
    destination.describe(0, false);
    source.offer(blk_type::OUT, 0, DATA, BLOCK);
    wait_until("the write hangs", || error.injected() == 1);
    drop(source);
    assert_eq!(destination.ask(&RawGuest::kick(), &[]), Some(Reply::U64(1)), "refused");
    assert_eq!(served.ask(|it| it.info().left_in_flight), 1);
    error.clear();
    wait_until("the write has landed", || served.ask(|it| it.info().left_in_flight == 0));
    destination.start(0, false);
    assert_eq!(destination.run(blk_type::IN, 0, DATA, BLOCK), 0);
}

#[test]
fn a_monitor_that_comes_again_at_once_finds_its_rings_free() {
    let served = Served::new(&*malloc());
    for _ in 0..20 {
        let mut guest = connect(&served);
        guest.negotiate(0);
        guest.start(0, false);
        assert_eq!(guest.run(blk_type::IN, 0, DATA, BLOCK), 0);
    }
    assert_eq!(served.stats().sessions.get(), 20);
}

#[test]
fn the_cache_mode_goes_with_the_guest() {
    let served = Served::new(&*malloc());
    let wanted = features::FLUSH | features::CONFIG_WCE;
    let (source, destination) = (connect(&served), connect(&served));
    source.negotiate(wanted);
    destination.negotiate(wanted);
    assert_eq!((source.writeback(), destination.writeback()), (1, 1));
    let through = ConfigPiece { offset: 32, flags: config_flags::WRITABLE, bytes: vec![0] };
    source.tell(&Message::SetConfig(through), &[]);
    assert_eq!((source.writeback(), destination.writeback()), (0, 0));
}

fn pipe() -> (OwnedFd, OwnedFd) {
    rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap()
}

fn transfer(direction: u32) -> Message {
    Message::SetDeviceStateFd { direction, phase: device_state::STOPPED }
}

/// Has a monitor fetch the state of its device.
fn save(guest: &RawGuest) -> Vec<u8> {
    let (reading, writing) = pipe();
    let answer = guest.ask(&transfer(device_state::SAVE), &[writing.as_fd()]);
    assert_eq!(answer, Some(Reply::U64(device_state::NO_FD)));
    drop(writing);
    let mut state = Vec::new();
    std::fs::File::from(reading).read_to_end(&mut state).unwrap();
    assert_eq!(guest.number(&Message::CheckDeviceState), 0);
    state
}

/// Has a monitor give its device a state; what the device makes of it.
fn load(guest: &RawGuest, state: &[u8]) -> u64 {
    let (reading, writing) = pipe();
    let answer = guest.ask(&transfer(device_state::LOAD), &[reading.as_fd()]);
    assert_eq!(answer, Some(Reply::U64(device_state::NO_FD)));
    drop(reading);
    std::fs::File::from(writing).write_all(state).unwrap();
    guest.number(&Message::CheckDeviceState)
}

#[test]
fn what_a_device_is_goes_with_its_guest_to_another_host() {
    let (here, there) = (Served::new(&*malloc()), Served::new(&*malloc()));
    let wanted = features::FLUSH | features::CONFIG_WCE;
    let (source, mut destination) = (connect(&here), connect(&there));
    source.negotiate(wanted);
    source.start(0, false);
    let through = ConfigPiece { offset: 32, flags: config_flags::WRITABLE, bytes: vec![0] };
    source.tell(&Message::SetConfig(through), &[]);
    source.tell(&Message::SetStatus(15), &[]);
    let (_reading, writing) = pipe();
    let early = source.ask(&transfer(device_state::SAVE), &[writing.as_fd()]);
    let failed = Some(Reply::U64(device_state::NO_FD | device_state::FAILED));
    assert_eq!(early, failed, "a ring is running");
    assert_eq!(source.stop(), 0);
    let state = save(&source);
    destination.negotiate(wanted);
    assert_eq!(destination.writeback(), 1);
    assert_eq!(load(&destination, &state), 0);
    assert_eq!((destination.writeback(), destination.number(&Message::GetStatus)), (0, 15));
    assert_eq!(save(&destination), state);
    destination.start(0, false);
    assert_eq!(destination.run(blk_type::IN, 0, DATA, BLOCK), 0);
}

#[test]
fn a_state_that_is_damaged_or_of_another_disk_is_refused_and_changes_nothing() {
    let bigger: Arc<dyn Bdev> = Arc::new(Malloc::new("bigger", BLOCK, 2048).unwrap());
    let (served, other) = (Served::new(&*malloc()), Served::new(&*bigger));
    let (guest, stranger) = (connect(&served), connect(&other));
    guest.negotiate(features::CONFIG_WCE | features::FLUSH);
    stranger.negotiate(0);
    let state = save(&guest);
    let before = (guest.writeback(), guest.number(&Message::GetStatus));
    assert_ne!(load(&guest, &save(&stranger)), 0, "another disk");
    assert_ne!(load(&guest, &state[..30]), 0, "half of it");
    assert_ne!(load(&guest, &[]), 0, "nothing");
    assert_ne!(load(&guest, &vec![0xff; 60_000]), 0, "too much");
    let mut damaged = state.clone();
    damaged[53] ^= 1;
    assert_ne!(load(&guest, &damaged), 0, "another cache mode, but not its checksum");
    assert_ne!(guest.number(&Message::CheckDeviceState), 0, "nothing was transferred");
    let null = std::fs::File::open("/dev/null").unwrap();
    let failed = Some(Reply::U64(device_state::NO_FD | device_state::FAILED));
    assert_eq!(guest.ask(&transfer(device_state::LOAD), &[null.as_fd()]), failed, "no pipe");
    // A front end that never closes its end is given up, and the session goes on.
    let (reading, _writing) = pipe();
    let answer = guest.ask(&transfer(device_state::LOAD), &[reading.as_fd()]);
    assert_eq!(answer, Some(Reply::U64(device_state::NO_FD)));
    assert_ne!(guest.number(&Message::CheckDeviceState), 0, "never closed");
    assert_eq!((guest.writeback(), guest.number(&Message::GetStatus)), before);
    assert_eq!(load(&guest, &state), 0, "its own");
}
