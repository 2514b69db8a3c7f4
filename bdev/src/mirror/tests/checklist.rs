//! Statements of QEMU's and Cloud Hypervisor's mirrors that stand in `docs/mirror.md`, each by itself.

use super::*;

fn with_policy(on_source_error: OnError, on_target_error: OnError) -> MirrorConfig {
    MirrorConfig { on_source_error, on_target_error, ..blocking() }
}

#[test]
fn reads_are_the_sources_and_wait_for_nobody() {
    let mut bench = Bench::new(blocking());
    bench.fill_source(0, &[7; 4096]);
    bench.with(|mirror, cx| mirror.attach(cx));
    bench.with(|mirror, cx| mirror.scanned(cx, ScanReport::Done));
    bench.reach(JobStatus::Ready);
    bench.inject(Side::Target, IoKind::Write, Effect::Stall, FOREVER);
    bench.inject(Side::Target, IoKind::Read, Effect::Stall, FOREVER);
    bench.write(1, 0, &[8; 512]);
    bench.turns(10);
    bench.submit(2, IoKind::Read, 0, 512);
    bench.turns(10);
    assert_eq!(bench.done, [Completion { tag: Tag(2), result: Ok(()) }]);
}

#[test]
fn a_source_error_reaches_the_guest_and_its_range_is_copied_again() {
    let mut bench = Bench::started(with_policy(OnError::Ignore, OnError::Report));
    bench.reach(JobStatus::Ready);
    bench.inject(Side::Source, IoKind::Write, Effect::Fail(IoError::IO), 1);
    bench.write(1, 8192, &[9; 512]);
    bench.drain();
    assert_eq!(bench.done, [Completion { tag: Tag(1), result: Err(IoError::IO) }]);
    let copied = bench.info().copied_bytes + bench.info().skipped_bytes + bench.info().zero_bytes;
    bench.turns_until("in sync", |bench| bench.info().actively_synced);
    let info = bench.info();
    assert!(info.copied_bytes + info.skipped_bytes + info.zero_bytes > copied, "{info:?}");
    assert_eq!(bench.contents(Side::Source), bench.contents(Side::Target));
}

#[test]
fn the_first_reason_of_a_failure_stays_and_the_target_gets_nothing_more() {
    let mut bench = Bench::started(with_policy(OnError::Report, OnError::Report));
    bench.reach(JobStatus::Ready);
    bench.inject(Side::Target, IoKind::Write, Effect::Fail(IoError::IO), 1);
    bench.write(1, 0, &[1; 512]);
    bench.drain();
    let first = bench.info().failure;
    let expected = JobFailure::Io {
        side: Side::Target,
        operation: IoKind::Write,
        offset: 0,
        error: IoError::IO,
    };
    assert_eq!((first, bench.status()), (Some(expected), JobStatus::Aborting));

    bench.inject(Side::Source, IoKind::Write, Effect::Fail(IoError::NO_SPACE), 1);
    let before = bench.contents(Side::Target);
    bench.write(2, 4096, &[2; 512]);
    bench.write(3, 8192, &[3; 512]);
    bench.drain();
    assert_eq!(bench.info().failure, first);
    assert!(bench.contents(Side::Target) == before, "the target is still written");
    assert_eq!(bench.contents(Side::Source)[8192..8704], [3; 512]);
}

#[test]
fn the_target_is_flushed_before_the_job_is_ready() {
    let mut bench = Bench::new(blocking());
    bench.inject(Side::Target, IoKind::Flush, Effect::Stall, FOREVER);
    bench.with(|mirror, cx| mirror.attach(cx));
    bench.with(|mirror, cx| mirror.scanned(cx, ScanReport::Done));
    bench.turns_until("copied", |bench| bench.info().dirty_bytes == 0);
    bench.turns(200);
    assert_eq!(bench.status(), JobStatus::Running);
    bench.legs[1].clear();
    bench.reach(JobStatus::Ready);
    assert_eq!(bench.info().target_undurable_bytes, 0);
}

#[test]
fn a_guests_flush_waits_for_the_target_where_its_writes_do() {
    for (copy_mode, waits) in [(CopyMode::WriteBlocking, true), (CopyMode::Background, false)] {
        let mut bench = Bench::started(MirrorConfig { copy_mode, ..blocking() });
        bench.reach(JobStatus::Ready);
        bench.inject(Side::Target, IoKind::Flush, Effect::Stall, FOREVER);
        bench.submit(1, IoKind::Flush, 0, 0);
        bench.turns(100);
        assert_eq!(bench.done.is_empty(), waits, "{copy_mode:?}");
        bench.legs[1].clear();
        bench.drain();
        assert_eq!(bench.done, [Completion { tag: Tag(1), result: Ok(()) }]);
    }
}

#[test]
fn a_job_changes_its_copy_mode_both_ways() {
    let mut bench = Bench::started(MirrorConfig { granularity: 4096, ..MirrorConfig::default() });
    bench.reach(JobStatus::Ready);
    assert!(!bench.info().actively_synced);
    bench.verb(JobVerb::Change(CopyMode::WriteBlocking)).unwrap();
    bench.write(1, 0, &[1; 512]);
    bench.drain();
    let info = bench.info();
    assert_eq!((info.dirty_bytes, info.actively_synced), (0, true));

    bench.verb(JobVerb::Change(CopyMode::Background)).unwrap();
    bench.inject(Side::Target, IoKind::Write, Effect::Stall, FOREVER);
    bench.write(2, 4096, &[2; 512]);
    bench.drain();
    assert_eq!(bench.done.len(), 2, "a hung target is not waited for any more");
    assert!(!bench.info().actively_synced);
}

#[test]
fn a_switch_asked_for_in_standby_waits_for_the_resume() {
    let mut bench = Bench::started(blocking());
    bench.reach(JobStatus::Ready);
    bench.verb(JobVerb::Pause).unwrap();
    bench.verb(JobVerb::Complete).unwrap();
    bench.turns(200);
    assert_eq!(bench.status(), JobStatus::Standby);
    assert!(!bench.events.contains(&JobEvent::CommitRequest));
    bench.verb(JobVerb::Resume).unwrap();
    bench.turns_until("asked", |bench| bench.events.contains(&JobEvent::CommitRequest));
}

#[test]
fn a_job_that_stands_by_shows_what_the_guest_dirties() {
    let mut bench = Bench::started(MirrorConfig { granularity: 4096, ..MirrorConfig::default() });
    bench.reach(JobStatus::Ready);
    bench.verb(JobVerb::Pause).unwrap();
    assert_eq!(bench.info().dirty_bytes, 0);
    bench.write(1, 4096, &[1; 4096]);
    bench.write(2, 16384 + 512, &[2; 512]);
    bench.drain();
    bench.turns(100);
    assert_eq!((bench.status(), bench.info().dirty_bytes), (JobStatus::Standby, 8192));
}

#[test]
fn no_speed_limit_holds_up_a_guests_write() {
    let mut bench = Bench::new(MirrorConfig { speed: 1, ..blocking() });
    bench.fill_source(0, &[7; 1 << 16]);
    bench.with(|mirror, cx| mirror.attach(cx));
    bench.with(|mirror, cx| mirror.scanned(cx, ScanReport::Done));
    bench.turns(100);
    let begun = bench.now;
    for tag in 1..=64 {
        bench.write(tag, u64::from(tag) * 8192, &[1; 8192]);
        bench.drain();
    }
    assert!(bench.now - begun < Nanos::from_millis(10), "half a megabyte at a byte a second");
    assert_eq!(bench.status(), JobStatus::Running);
}

#[test]
fn a_bad_spot_holds_up_nothing_but_itself() {
    let mut bench = Bench::new(with_policy(OnError::Ignore, OnError::Report));
    bench.fill_source(0, &[7; 1 << 20]);
    let bad = Injection {
        kind: Some(IoKind::Read),
        effect: Effect::Fail(IoError::IO),
        count: FOREVER,
        range: Some((40960, 512)),
    };
    bench.legs[Side::Source as usize].inject(bad).unwrap();
    bench.with(|mirror, cx| mirror.attach(cx));
    bench.with(|mirror, cx| mirror.scanned(cx, ScanReport::Done));
    bench.turns_until("all but the bad chunk", |bench| {
        let info = bench.info();
        info.dirty_bytes == 4096 && info.in_flight_bytes == 0
    });
    assert!(bench.now < Nanos::from_millis(100), "the rest waited: {}", bench.now);
    bench.legs[Side::Source as usize].clear();
    bench.now = bench.now + Nanos::from_secs(6);
    bench.reach(JobStatus::Ready);
    assert_eq!(bench.contents(Side::Source), bench.contents(Side::Target));
}

/// A guest that makes more dirty than a limited background copier copies, for so long.
fn losing_race(auto_converge: bool) -> Bench {
    let config =
        MirrorConfig { auto_converge, speed: 65536, granularity: 4096, ..MirrorConfig::default() };
    let mut bench = Bench::new(config);
    bench.fill_source(0, &[7; 1 << 20]);
    bench.with(|mirror, cx| mirror.attach(cx));
    bench.with(|mirror, cx| mirror.scanned(cx, ScanReport::Done));
    for tag in 0..8000 {
        bench.now = bench.now + Nanos::from_millis(1);
        bench.write(tag, u64::from(tag * 37 % 256) * 4096, &[8; 512]);
        bench.turns(2);
    }
    bench
}

#[test]
fn a_background_copy_that_does_not_converge_goes_over_to_write_blocking_where_it_may() {
    let mut bench = losing_race(false);
    assert_eq!(
        (bench.info().copy_mode, bench.info().auto_converged),
        (CopyMode::Background, false)
    );

    let mut bench = losing_race(true);
    assert_eq!(
        (bench.info().copy_mode, bench.info().auto_converged),
        (CopyMode::WriteBlocking, true)
    );
    let told = bench.events.iter().filter(|event| **event == JobEvent::AutoConverged).count();
    assert_eq!(told, 1);
    // Once: an operator who changes it back is right.
    bench.verb(JobVerb::Change(CopyMode::Background)).unwrap();
    for tag in 0..8000 {
        bench.now = bench.now + Nanos::from_millis(1);
        bench.write(tag, u64::from(tag * 37 % 256) * 4096, &[8; 512]);
        bench.turns(2);
    }
    assert_eq!(bench.info().copy_mode, CopyMode::Background);
}

#[test]
fn a_long_copy_beside_a_guest_is_not_taken_for_one_that_does_not_converge() {
    let config = MirrorConfig {
        auto_converge: true,
        speed: 32768,
        granularity: 4096,
        ..MirrorConfig::default()
    };
    let mut bench = Bench::new(config);
    bench.fill_source(0, &[7; 1 << 20]);
    bench.with(|mirror, cx| mirror.attach(cx));
    bench.with(|mirror, cx| mirror.scanned(cx, ScanReport::Done));
    for tag in 0..10_000 {
        bench.now = bench.now + Nanos::from_millis(1);
        bench.write(tag, 4096 * u64::from(tag % 4), &[8; 512]);
        bench.turns(2);
    }
    let info = bench.info();
    assert!(info.dirty_bytes > SIZE / 2, "it takes half a minute: {info:?}");
    assert_eq!((info.copy_mode, info.auto_converged), (CopyMode::Background, false));
}

#[test]
fn a_job_that_is_paused_estimates_nothing() {
    let config = MirrorConfig { speed: 65536, granularity: 4096, ..MirrorConfig::default() };
    let mut bench = Bench::new(config);
    bench.fill_source(0, &[7; 1 << 20]);
    bench.with(|mirror, cx| mirror.attach(cx));
    bench.with(|mirror, cx| mirror.scanned(cx, ScanReport::Done));
    for _ in 0..3000 {
        bench.now = bench.now + Nanos::from_millis(1);
        bench.turn();
    }
    let info = bench.info();
    assert!(info.eta.is_some() && info.converging, "{info:?}");
    bench.verb(JobVerb::Pause).unwrap();
    let info = bench.info();
    assert!(info.eta.is_none() && !info.converging && info.dirty_bytes > 0, "{info:?}");
    bench.verb(JobVerb::Resume).unwrap();
    assert!(bench.info().eta.is_some());
}

#[test]
fn under_a_ceiling_that_no_device_keeps_the_copy_goes_on_at_its_floor() {
    let config = MirrorConfig { latency_ceiling: Some(Nanos(1)), ..blocking() };
    let mut bench = Bench::new(config);
    bench.fill_source(0, &[7; 1 << 20]);
    bench.with(|mirror, cx| mirror.attach(cx));
    bench.with(|mirror, cx| mirror.scanned(cx, ScanReport::Done));
    for tag in 0..4000 {
        bench.now = bench.now + Nanos::from_millis(1);
        bench.write(tag, SIZE - 512, &[8; 512]);
        bench.turns(2);
    }
    let info = bench.info();
    assert_eq!(info.throttle, Some(1 << 20), "{info:?}");
    assert!(info.guest_p99.is_some() && info.status == JobStatus::Ready, "{info:?}");
    // A guest that rests is no reason to hold back.
    assert_eq!(bench.contents(Side::Source), bench.contents(Side::Target));
}

#[test]
fn a_failed_flush_takes_back_a_seconds_work_and_not_the_whole_copy() {
    let config = MirrorConfig {
        speed: 128 << 10,
        on_target_error: OnError::Enospc,
        granularity: 4096,
        ..MirrorConfig::default()
    };
    let mut bench = Bench::new(config);
    bench.fill_source(0, &[7; 1 << 20]);
    bench.with(|mirror, cx| mirror.attach(cx));
    bench.with(|mirror, cx| mirror.scanned(cx, ScanReport::Done));
    let run = |bench: &mut Bench, millis| {
        for _ in 0..millis {
            bench.now = bench.now + Nanos::from_millis(1);
            bench.turn();
        }
    };
    run(&mut bench, 5000);
    let copied = bench.info().copied_bytes;
    assert!(copied > 512 << 10, "{copied}");
    bench.inject(Side::Target, IoKind::Flush, Effect::Fail(IoError::NO_SPACE), 1);
    run(&mut bench, 1500);
    let info = bench.info();
    assert_eq!((info.status, info.io_status), (JobStatus::Paused, IoStatus::Nospace));
    assert!(info.dirty_bytes < SIZE - copied + (300 << 10), "{info:?}");
    bench.verb(JobVerb::Resume).unwrap();
    bench.verb(JobVerb::SetSpeed(0)).unwrap();
    bench.reach(JobStatus::Ready);
    assert!(bench.info().copied_bytes < 3 << 19, "a second full copy: {:?}", bench.info());
    assert_eq!(bench.contents(Side::Source), bench.contents(Side::Target));
}

/// Bytes that reach the target beside one copy of the disk while a guest writes `length` bytes at random places: ours, and what
/// they would be if only writes behind the copy were mirrored.
fn beside_the_copy(length: u32) -> (u64, u64) {
    let mut bench = Bench::new(MirrorConfig { speed: 4 << 20, granularity: 16384, ..blocking() });
    bench.fill_source(0, &[7; 1 << 20]);
    bench.with(|mirror, cx| mirror.attach(cx));
    bench.with(|mirror, cx| mirror.scanned(cx, ScanReport::Done));
    let (mut behind, mut tag) = (0, 0u32);
    let bytes = vec![8; length as usize];
    while bench.status() == JobStatus::Running {
        let offset = u64::from(tag.wrapping_mul(2_654_435_761) >> 8) % (1 << 20);
        let offset = offset / u64::from(length) * u64::from(length);
        if !bench.with(|mirror, _| mirror.is_dirty(offset / 16384)) {
            behind += u64::from(length);
        }
        bench.write(tag, offset, &bytes);
        bench.drain();
        bench.now = bench.now + Nanos::from_millis(1);
        bench.turn();
        tag += 1;
    }
    let info = bench.info();
    assert!(tag > 50 && info.copied_bytes <= SIZE, "{tag} writes, {info:?}");
    let done = info.copied_bytes + info.zero_bytes;
    (info.mirrored_bytes + done, behind + SIZE)
}

#[test]
fn write_blocking_sends_the_target_what_a_cursor_would() {
    // A write to a part of a chunk that is still to be copied is left to the copy, as a cursor would.
    let (ours, cursor) = beside_the_copy(4096);
    assert_eq!(ours, cursor);
    // A write of a whole one goes to both legs at once, and the copy is spared that chunk.
    let (ours, cursor) = beside_the_copy(16384);
    assert!(ours.abs_diff(cursor) < cursor / 4, "{ours} and {cursor}");
}

#[test]
fn a_disk_of_more_chunks_than_a_bitmap_has_is_refused_before_there_is_memory_for_them() {
    // 16 TiB in chunks of 512 bytes: ten bitmaps of 4 GiB each.
    let huge = || crate::null::Null::new("huge", 512, 1 << 35).unwrap();
    let open = |depth| huge().open_channel(depth).unwrap();
    let channels = MirrorChannels {
        source: open(DISK_DEPTH),
        copy_source: open(COPY_DEPTH),
        target: open(TARGET_DEPTH),
        offload: None,
    };
    let config = MirrorConfig { granularity: 512, ..MirrorConfig::default() };
    let refused = Mirror::new(config, channels).err().expect("a refusal").to_string();
    assert!(refused.contains("granularity") && refused.contains("a larger one"), "{refused}");
}

#[test]
fn a_flush_that_came_before_the_switch_over_and_ends_late_does_not_undo_it() {
    let mut bench = Bench::started(MirrorConfig::default());
    bench.fill_source(0, &[3; 512]);
    bench.reach(JobStatus::Ready);
    bench.inject(Side::Source, IoKind::Flush, Effect::Stall, 1);
    bench.submit(1, IoKind::Flush, 0, 0);
    bench.commit();
    bench.legs[0].clear();
    bench.drain();
    assert_eq!(bench.done, [Completion { tag: Tag(1), result: Ok(()) }]);
    assert_eq!(bench.with(|mirror, _| mirror.wants()), JobWants::Dissolve);
    assert_eq!(bench.dissolve().side, Side::Target);
}
