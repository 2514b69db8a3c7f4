//! Sequences of messages that are legal and awkward: changes under a running ring, and a front end that goes in the middle.

// A test may fail by panicking.
#![allow(clippy::unwrap_used)]

use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use resilver_bdev::error::{Effect, ErrorBdev, FOREVER, Injection};
use resilver_bdev::malloc::Malloc;
use resilver_bdev::{Bdev, IoKind, Limits};
use resilver_tests::raw_guest::{DATA, MEMORY, RawGuest, memory_file};
use resilver_tests::served::{PATIENCE, Served, wait_until};
use resilver_vhost::message::{FdPresence, Header, Message, Reply};
use resilver_vhost::protocol::backend_request::CONFIG_CHANGE_MSG;
use resilver_vhost::protocol::blk_type;

const BLOCK: u32 = 4096;
const BLOCKS: u64 = 1024;

fn malloc() -> Arc<dyn Bdev> {
    Arc::new(Malloc::new("malloc0", BLOCK, BLOCKS).unwrap())
}

fn connect(served: &Served) -> RawGuest {
    let guest = RawGuest::connect(&served.socket(), memory_file(MEMORY));
    guest.negotiate(0);
    guest
}

fn limits(blocks: u64) -> Limits {
    *Malloc::new("size", BLOCK, blocks).unwrap().open_channel(1).unwrap().limits()
}

/// Gives a front end another back channel; its own end of it.
fn back_channel(guest: &RawGuest) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().unwrap();
    guest.tell(&Message::SetBackendReqFd, &[theirs.as_fd()]);
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    ours
}

fn is_told(mut channel: &UnixStream) {
    let mut notice = [0; 12];
    channel.read_exact(&mut notice).unwrap();
    assert_eq!(Header::decode(&notice), Ok(Header::new(CONFIG_CHANGE_MSG, 0, 0)));
}

fn is_closed(mut channel: &UnixStream) -> bool {
    matches!(channel.read(&mut [0; 1]), Ok(0))
}

#[test]
fn two_resizes_back_to_back_are_both_told_and_the_last_one_is_seen() {
    let served = Served::new(&*malloc());
    let guest = connect(&served);
    let channel = back_channel(&guest);
    let (first, second) = (limits(2 * BLOCKS), limits(3 * BLOCKS));
    served.ask(move |controller| {
        controller.resize(first);
        controller.resize(second);
    });
    is_told(&channel);
    is_told(&channel);
    assert_eq!(guest.capacity(), 3 * BLOCKS * u64::from(BLOCK));
}

#[test]
fn a_back_channel_is_replaced_in_a_session_and_by_the_next_one() {
    let served = Served::new(&*malloc());
    let guest = connect(&served);
    let (first, second) = (back_channel(&guest), back_channel(&guest));
    assert!(is_closed(&first), "the one before is let go");
    let bigger = limits(2 * BLOCKS);
    served.ask(move |controller| controller.resize(bigger));
    is_told(&second);
    drop(guest);
    let guest = connect(&served);
    let third = back_channel(&guest);
    assert!(is_closed(&second));
    served.ask(move |controller| controller.resize(bigger));
    is_told(&third);
}

#[test]
fn a_front_end_that_does_not_read_its_back_channel_keeps_nobody_waiting() {
    let served = Served::new(&*malloc());
    let mut guest = connect(&served);
    guest.start(0, false);
    let _unread = back_channel(&guest);
    let bigger = limits(2 * BLOCKS);
    served.ask(move |controller| (0..10_000).for_each(|_| controller.resize(bigger)));
    assert_eq!(guest.run(blk_type::IN, 0, DATA, BLOCK), 0);
}

#[test]
fn a_memory_table_without_the_memory_of_a_running_ring_is_refused_and_the_ring_goes_on() {
    let served = Served::new(&*malloc());
    let mut guest = connect(&served);
    guest.start(0, false);
    let elsewhere = memory_file(MEMORY);
    let mut region = guest.region();
    (region.guest_address, region.user_address) = (1 << 32, 1 << 40);
    for (message, fds) in [
        (Message::SetMemTable(vec![region]), vec![elsewhere.as_fd()]),
        (Message::SetMemTable(Vec::new()), Vec::new()),
        (Message::RemMemReg(guest.region()), Vec::new()),
    ] {
        assert_eq!(guest.ask(&message, &fds), Some(Reply::U64(1)), "{message:?}");
        assert_eq!(guest.run(blk_type::IN, 0, DATA, BLOCK), 0, "{message:?}");
    }
    let base = guest.stop();
    guest.tell(&Message::RemMemReg(guest.region()), &[]);
    assert_eq!(guest.ask(&RawGuest::kick(), &[]), Some(Reply::U64(1)), "no memory, no ring");
    guest.share();
    guest.start(base, false);
    assert_eq!(guest.run(blk_type::IN, 0, DATA, BLOCK), 0);
}

#[test]
fn a_front_end_that_goes_while_its_ring_waits_for_a_stuck_disk_does_not_keep_its_seat() {
    let error = Arc::new(ErrorBdev::new("error0", malloc()));
    let served = Served::new(&*error);
    let (kind, effect) = (Some(IoKind::Write), Effect::Stall);
    error.inject(Injection { kind, effect, count: FOREVER, range: None }).unwrap();
    let mut guest = connect(&served);
    guest.start(0, false);
    guest.offer(blk_type::OUT, 0, DATA, BLOCK);
    wait_until("the write hangs", || error.injected() == 1);
    guest.say(&Message::GetVringBase { index: 0 }, &[]);
    // The answer is owed until the write ends; nothing says that the front end waits for it.
    std::thread::sleep(Duration::from_millis(50));
    drop(guest);
    wait_until("the session is over", || served.ask(|it| it.info().sessions.is_empty()));
    wait_until("its write is left", || served.ask(|it| it.info().left_in_flight) == 1);
    error.clear();
    wait_until("the write has landed", || served.ask(|it| it.info().left_in_flight == 0));
    let mut guest = connect(&served);
    guest.start(0, false);
    assert_eq!(guest.run(blk_type::IN, 0, DATA, BLOCK), 0);
}

#[test]
fn reset_owner_means_nothing() {
    let served = Served::new(&*malloc());
    let mut guest = connect(&served);
    guest.start(0, false);
    guest.tell(&Message::ResetOwner, &[]);
    assert_eq!(guest.run(blk_type::IN, 0, DATA, BLOCK), 0);
}

#[test]
fn a_front_end_whose_descriptor_for_interrupts_blocks_stops_nobody_else() {
    let served = Served::new(&*malloc());
    let mut guest = connect(&served);
    let flags = rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK;
    let call = rustix::event::eventfd(0, flags).unwrap();
    guest.tell(&Message::SetVringCall { index: 0, fd: FdPresence::Attached }, &[call.as_fd()]);
    guest.start(0, false);
    assert_eq!(guest.run(blk_type::IN, 0, DATA, BLOCK), 0);
    // A full counter, and the flag taken away that both sides share.
    // Interrupts of what was answered already may still be on their way.
    wait_until("the counter is filled", || {
        let _count = rustix::io::read(&call, &mut [0; 8]);
        rustix::io::write(&call, &(u64::MAX - 1).to_ne_bytes()).is_ok()
    });
    rustix::fs::fcntl_setfl(&call, rustix::fs::OFlags::RDWR).unwrap();
    guest.offer(blk_type::IN, 0, DATA, BLOCK);
    let (stats, mut turns) = (served.reactor().stats(), 0);
    wait_until("the reactor is stuck", || {
        let before = std::mem::replace(&mut turns, stats.turns.get());
        std::thread::sleep(Duration::from_millis(100));
        before == stats.turns.get() && !served.reactor().doorbell().is_asleep()
    });
    wait_until("the reactor is nudged out", || {
        turns = served.reactor().nudge_if_stuck(turns);
        std::thread::sleep(Duration::from_millis(10));
        turns < stats.turns.get()
    });
    assert!(guest.is_closed(), "the front end loses its connection");
    let mut other = connect(&served);
    other.start(0, false);
    assert_eq!(other.run(blk_type::IN, 0, DATA, BLOCK), 0);
}

#[test]
fn front_ends_that_connect_and_hang_up_again_and_again_take_few_descriptors() {
    let served = Served::new(&*malloc());
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let before = descriptors();
    let mut most = 0;
    for _ in 0..400 {
        drop(UnixStream::connect(served.socket()).unwrap());
        most = most.max(descriptors());
    }
    // Tests beside this one have some, too.
    assert!(most < before + 150, "{before} before, {most} at most");
    wait_until("they are let go of", || served.ask(|it| it.info().sessions.is_empty()));
    wait_until("a guest is served", || {
        let Ok(stream) = UnixStream::connect(served.socket()) else { return false };
        let guest = RawGuest::over(stream, memory_file(MEMORY));
        guest.ask(&Message::GetFeatures, &[]).is_some()
    });
}
