//! Scenarios of verification: a target that changes behind the mirror's back, under a guest that goes on.

use super::*;
use crate::job::OnError;
use crate::verify::{VerifyInfo, VerifyRequest, VerifyState};

const CHUNK: u64 = 4096;

fn verify(bench: &mut Bench, request: VerifyRequest) -> VerifyInfo {
    bench.verb(JobVerb::Verify(request)).unwrap();
    assert_eq!(bench.info().verify.state, VerifyState::Running);
    bench.turns_until("verified", |bench| bench.info().verify.state != VerifyState::Running);
    bench.info().verify
}

fn background() -> MirrorConfig {
    MirrorConfig { copy_mode: CopyMode::Background, ..blocking() }
}

/// A ready mirror over two equal disks with something on them.
fn ready(config: MirrorConfig) -> Bench {
    let mut bench = Bench::new(config);
    bench.fill_source(0, &[7; 64 << 10]);
    bench.fill_source(SIZE - 512, &[9; 512]);
    bench.with(|mirror, cx| {
        mirror.attach(cx);
        mirror.scanned(cx, ScanReport::Done);
    });
    bench.reach(JobStatus::Ready);
    bench
}

#[test]
fn equal_legs_are_found_equal_to_the_last_byte() {
    let mut bench = ready(blocking());
    let info = verify(&mut bench, VerifyRequest::default());
    assert_eq!((info.pass, info.state), (1, VerifyState::Completed));
    assert_eq!((info.total_bytes, info.checked_bytes), (SIZE, SIZE));
    assert_eq!((info.skipped_bytes, info.mismatched_bytes), (0, 0));
    let ended = JobEvent::VerifyEnded { pass: 1, state: VerifyState::Completed };
    assert_eq!(bench.events.last(), Some(&ended));
}

#[test]
fn what_changed_behind_our_back_is_found_exactly_and_repaired() {
    for config in [blocking(), background()] {
        let mut bench = ready(config);
        // In data, in zeroes that the mirror knows of, and in the short last chunk.
        for offset in [8192, 512 << 10, SIZE - 512] {
            bench.fill(Side::Target, offset, &[0xee; 512]);
        }
        let copied = bench.info().copied_bytes + bench.info().zero_bytes;
        let info = verify(&mut bench, VerifyRequest::default());
        assert_eq!(info.mismatched_bytes, 2 * CHUNK + 512);
        assert_eq!(info.mismatches_ever, 3);
        let found = |event: &JobEvent| match event {
            JobEvent::VerifyMismatch { chunks, .. } => *chunks,
            _ => 0,
        };
        assert_eq!(bench.events.iter().map(found).sum::<u64>(), 3);
        bench.turns_until("repaired", |bench| bench.info().dirty_bytes == 0);
        bench.turns(4);
        assert_eq!(bench.contents(Side::Source), bench.contents(Side::Target));
        let more = bench.info().copied_bytes + bench.info().zero_bytes - copied;
        assert_eq!(more, 2 * CHUNK + 512, "only what differed is copied again");
        assert_eq!(verify(&mut bench, VerifyRequest::default()).mismatched_bytes, 0);
    }
}

#[test]
fn a_sample_compares_what_it_says_and_finds_what_is_in_it() {
    let mut bench = ready(blocking());
    for chunk in 0..SIZE.div_ceil(CHUNK) {
        bench.fill(Side::Target, chunk * CHUNK, &[0xee; 512]);
    }
    let request = VerifyRequest { sample_percent: 10, seed: 3, speed: 0 };
    let info = verify(&mut bench, request);
    let chunks = SIZE.div_ceil(CHUNK);
    assert_eq!(info.mismatches_ever, (chunks * 10).div_ceil(100));
    assert_eq!(info.checked_bytes, info.total_bytes);
}

#[test]
fn a_guest_that_writes_all_the_time_raises_no_false_alarm() {
    for config in [blocking(), background()] {
        let mut bench = ready(config);
        bench.verb(JobVerb::Verify(VerifyRequest::default())).unwrap();
        let mut writes = 0;
        while bench.info().verify.state == VerifyState::Running {
            let offset = u64::from(writes % 250) * CHUNK;
            bench.write(writes, offset, &[(writes % 251).to_le_bytes()[0]; 4096]);
            bench.turn();
            writes += 1;
            assert!(writes < 5000, "the pass does not end");
        }
        bench.drain();
        assert!(writes > 1);
        assert_eq!(bench.info().verify.mismatched_bytes, 0);
    }
}

#[test]
fn a_speed_limits_what_is_compared_in_a_second() {
    let mut bench = ready(blocking());
    let request = VerifyRequest { speed: 1 << 20, ..VerifyRequest::default() };
    bench.verb(JobVerb::Verify(request)).unwrap();
    let start = bench.now;
    while bench.info().verify.state == VerifyState::Running {
        if let Armed::Until(Some(deadline)) = bench.arm() {
            bench.now = bench.now.max(deadline);
        }
        bench.turn();
    }
    let took = bench.now - start;
    assert!(took > Nanos::from_millis(800) && took < Nanos::from_millis(1200), "{took}");
}

#[test]
fn a_pass_rests_with_its_mirror_and_can_be_given_up() {
    let mut bench = ready(blocking());
    bench.verb(JobVerb::Pause).unwrap();
    bench.verb(JobVerb::Verify(VerifyRequest::default())).unwrap();
    bench.turns(50);
    assert_eq!(bench.info().verify.checked_bytes, 0);
    let again = bench.verb(JobVerb::Verify(VerifyRequest::default())).unwrap_err();
    assert!(again.to_string().contains("is verifying already"), "{again}");
    bench.verb(JobVerb::Resume).unwrap();
    bench.turns_until("resumed", |bench| bench.info().verify.checked_bytes > 0);
    bench.verb(JobVerb::StopVerify).unwrap();
    assert_eq!(bench.info().verify.state, VerifyState::Cancelled);
    assert!(bench.verb(JobVerb::StopVerify).is_err());
}

#[test]
fn a_target_that_cannot_be_read_follows_its_policy_and_is_copied_again() {
    let mut bench = ready(MirrorConfig { on_target_error: OnError::Ignore, ..blocking() });
    let fails = Effect::Fail(IoError::IO);
    bench.inject(Side::Target, IoKind::Read, fails, 1);
    let info = verify(&mut bench, VerifyRequest::default());
    assert_eq!((info.state, info.mismatched_bytes), (VerifyState::Completed, 0));
    assert_eq!(info.checked_bytes + info.skipped_bytes, SIZE);
    assert!(info.skipped_bytes > 0);
    assert_eq!(bench.info().errors.counts[Side::Target as usize][ErrorAction::Ignore as usize], 1);
    bench.turns_until("copied", |bench| bench.info().dirty_bytes == 0);

    let mut bench = ready(MirrorConfig { on_target_error: OnError::Stop, ..blocking() });
    bench.inject(Side::Target, IoKind::Read, fails, 1);
    bench.verb(JobVerb::Verify(VerifyRequest::default())).unwrap();
    bench.reach(JobStatus::Standby);
    assert_eq!(bench.info().verify.state, VerifyState::Running);
    bench.verb(JobVerb::Resume).unwrap();
    bench.turns_until("done", |bench| bench.info().verify.state == VerifyState::Completed);
}

#[test]
fn a_hung_read_of_the_target_holds_up_no_cancel_and_times_out() {
    let mut bench = ready(blocking());
    bench.inject(Side::Target, IoKind::Read, Effect::Stall, FOREVER);
    bench.verb(JobVerb::Verify(VerifyRequest::default())).unwrap();
    bench.turns(5);
    bench.write(1, 0, &[1; 512]);
    bench.turns(5);
    bench.verb(JobVerb::Cancel).unwrap();
    bench.drain();
    assert_eq!(bench.dissolve().side, Side::Source);

    let timeout = Some(Nanos::from_millis(1));
    let mut bench = ready(MirrorConfig {
        target_timeout: timeout,
        on_target_error: OnError::Ignore,
        ..blocking()
    });
    bench.inject(Side::Target, IoKind::Read, Effect::Stall, FOREVER);
    bench.verb(JobVerb::Verify(VerifyRequest::default())).unwrap();
    bench.turns(5);
    bench.write(1, 0, &[1; 512]);
    bench.drain();
    assert_eq!(bench.done.last().unwrap().result, Ok(()));
}

#[test]
fn a_switch_over_that_demands_it_repairs_the_target_first() {
    let mut bench = ready(MirrorConfig { verify_before_complete: true, ..blocking() });
    bench.fill(Side::Target, 8192, &[0xee; 512]);
    bench.commit();
    let info = bench.info().verify;
    assert_eq!((info.state, info.mismatched_bytes), (VerifyState::Completed, CHUNK));
    assert_eq!(info.checked_bytes, SIZE + CHUNK, "what differed is compared again");
    bench.turns(4);
    assert_eq!(bench.dissolve().side, Side::Target);
    assert_eq!(bench.contents(Side::Source), bench.contents(Side::Target));
}

#[test]
fn a_target_that_loses_what_it_is_given_is_not_switched_to() {
    let mut bench = ready(MirrorConfig { verify_before_complete: true, ..blocking() });
    bench.fill(Side::Target, 8192, &[0xee; 512]);
    bench.inject(Side::Target, IoKind::Write, Effect::Stall, 1);
    bench.verb(JobVerb::Complete).unwrap();
    bench.turns(50);
    // As soon as it is copied it is wrong again.
    bench.fill(Side::Target, 8192, &[0xee; 512]);
    bench.legs[Side::Target as usize].clear();
    bench.turns_until("given up", |bench| bench.info().failure.is_some());
    let info = bench.info();
    assert_eq!(info.status, JobStatus::Ready);
    assert_eq!(info.failure, Some(JobFailure::Differs { offset: 8192 }));
    assert!(!bench.events.contains(&JobEvent::CommitRequest));
    // Once the target keeps what it gets the next attempt goes through.
    bench.commit();
}

#[test]
fn a_verification_demanded_by_a_switch_over_is_cancelled_with_it() {
    let mut bench = ready(MirrorConfig { verify_before_complete: true, ..blocking() });
    bench.inject(Side::Target, IoKind::Read, Effect::Stall, FOREVER);
    bench.verb(JobVerb::Complete).unwrap();
    bench.turns(20);
    assert_eq!(bench.status(), JobStatus::Waiting);
    bench.verb(JobVerb::Cancel).unwrap();
    assert_eq!(bench.dissolve().side, Side::Source);
}

#[test]
fn what_was_compared_before_a_switch_over_is_flushed_before_its_record() {
    let mut bench = ready(MirrorConfig { verify_before_complete: true, ..blocking() });
    bench.verb(JobVerb::Complete).unwrap();
    bench.turns_until("the pass runs", |bench| bench.info().verify.state == VerifyState::Running);
    bench.inject(Side::Target, IoKind::Flush, Effect::Stall, FOREVER);
    bench.turns_until("compared", |bench| bench.info().verify.state == VerifyState::Completed);
    bench.turns(200);
    assert_eq!(bench.status(), JobStatus::Waiting);
    bench.legs[1].clear();
    bench.turns_until("asked", |bench| bench.events.contains(&JobEvent::CommitRequest));
}
