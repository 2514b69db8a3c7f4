//! Front ends that take memory away, or make the reactor wait.

use std::time::Duration;

use resilver_sys::Nudge;
use rustix::fs::{OFlags, fcntl_setfl, ftruncate};

use super::*;

#[test]
fn a_guest_whose_memory_is_taken_away_is_not_told_that_its_data_are_there() {
    for retired in [false, true] {
        let mut bench = Bench::new();
        bench.medium.lock().unwrap().answers = false;
        bench.request(0, blk_type::IN, 1, DATA, 4096);
        bench.turn();
        if retired {
            // The request goes into the map of before.
            let (memory, rings) = (bench.memory(), Vec::new());
            assert!(bench.ask(|reply| Command::SetMemory { memory, rings, reply }).is_none());
        }
        // The ring, the header and the status byte stay.
        ftruncate(&bench.file, DATA).unwrap();
        bench.medium.lock().unwrap().answers = true;
        bench.turn();
        assert_eq!(bench.fault.try_recv(), Ok(SessionFault::MemoryShrunk));
        assert_eq!((bench.used_index(), bench.log()), (0, vec![IoKind::Read]));
        // Nothing is taken from the ring any more, and the disk is free.
        bench.request(3, blk_type::FLUSH, 0, DATA, 0);
        bench.turn();
        assert_eq!((bench.used_index(), bench.log().len()), (0, 1));
        bench.disconnect();
    }
}

#[test]
fn memory_that_was_taken_away_before_it_came_is_not_used() {
    let mut bench = Bench::new();
    let (memory, rings) = (bench.memory(), Vec::new());
    ftruncate(&bench.file, DATA).unwrap();
    // Control has looked into it.
    let data = memory.area("descriptor table", BASE + DATA, 8, 8).unwrap();
    assert_eq!(data.load_u64(0, Ordering::Relaxed), 0);
    bench.turn();
    bench.tell(|reply| Command::SetMemory { memory, rings, reply });
    bench.turn();
    assert_eq!(bench.fault.try_recv(), Ok(SessionFault::MemoryShrunk));
}

/// Of the calls that come before the next look, each would hide the descriptor that made the reactor wait.
#[test]
fn a_front_end_makes_the_reactor_wait_once() {
    for meanwhile in [Meanwhile::Nothing, Meanwhile::AnotherCall, Meanwhile::StopsBefore] {
        waits_once(meanwhile);
    }
}

#[derive(PartialEq)]
enum Meanwhile {
    Nothing,
    AnotherCall,
    StopsBefore,
}

fn waits_once(meanwhile: Meanwhile) {
    let mut bench = Bench::new();
    rustix::io::write(&bench.call, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    fcntl_setfl(&bench.call, OFlags::RDWR).unwrap();
    let (done, is_done) = channel::<()>();
    let nudge = Nudge::current().unwrap();
    let nudger = std::thread::spawn(move || {
        while is_done.recv_timeout(Duration::from_millis(1)).is_err() {
            nudge.nudge();
        }
    });
    bench.request(0, blk_type::FLUSH, 0, DATA, 0);
    if meanwhile == Meanwhile::StopsBefore {
        bench.medium.lock().unwrap().answers = false;
        bench.turn();
        bench.tell(|reply| Command::Stop { queue: 0, reply });
        bench.medium.lock().unwrap().answers = true;
    }
    bench.turn();
    assert_eq!(bench.used_index(), 1);
    if meanwhile == Meanwhile::AnotherCall {
        let event = Some(Arc::new(EventFd::new().unwrap()));
        bench.tell(|reply| Command::SetNotifier { queue: 0, which: Notifier::Call, event, reply });
    }
    bench.turn();
    done.send(()).unwrap();
    nudger.join().unwrap();
    assert_eq!(bench.fault.try_recv(), Ok(SessionFault::InterruptStuck(0)));
    // Neither a descriptor that is new nor a ring that goes on helps: nobody interrupts.
    bench.request(3, blk_type::FLUSH, 0, DATA, 0);
    bench.turn();
    assert_eq!(bench.used_index(), 1);
}
