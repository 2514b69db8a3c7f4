//! Mirrors that bring over less than everything, and observers that lag.

use super::*;

fn new_writes(copy_mode: CopyMode, observer: ObserverPolicy) -> MirrorConfig {
    MirrorConfig { copy_mode, sync: SyncMode::None, observer, ..blocking() }
}

fn observed(observer: ObserverPolicy) -> Bench {
    let mut bench = Bench::new(new_writes(CopyMode::WriteBlocking, observer));
    bench.fill_source(0, &[7; 16384]);
    bench.with(|mirror, cx| mirror.attach(cx));
    bench.reach(JobStatus::Ready);
    bench
}

/// Writes that all must be answered while the target hangs.
fn write_beside_a_hung_target(bench: &mut Bench, writes: u32) {
    bench.inject(Side::Target, IoKind::Write, Effect::Stall, FOREVER);
    for tag in 0..writes {
        bench.write(tag, u64::from(tag % 200) * 4096, &[3; 512]);
        bench.turns_until("answered", |bench| bench.done.len() == tag as usize + 1);
    }
    assert!(bench.done.iter().all(|done| done.result.is_ok()));
}

#[test]
fn without_a_copy_it_is_ready_at_once_and_has_new_writes_only() {
    let mut bench = observed(ObserverPolicy::Block);
    assert_eq!((bench.info().total_bytes, bench.info().dirty_bytes), (0, 0));
    bench.write(1, 8192, &[5; 512]);
    bench.drain();
    let target = bench.contents(Side::Target);
    assert_eq!(target[8192..8704], [5; 512]);
    assert!(target[..8192].iter().chain(&target[8704..]).all(|byte| *byte == 0), "copied more");
    let info = bench.info();
    assert_eq!((info.mirrored_bytes, info.copied_bytes, info.actively_synced), (512, 0, true));
}

#[test]
fn what_is_no_copy_is_neither_switched_to_nor_verified_but_can_be_finished() {
    let mut bench = observed(ObserverPolicy::Block);
    let refused = bench.verb(JobVerb::Complete).unwrap_err().to_string();
    assert!(refused.contains("bdev_mirror_finish"), "{refused}");
    let verify = JobVerb::Verify(crate::VerifyRequest::default());
    let refused = bench.verb(verify).unwrap_err().to_string();
    assert!(refused.contains("new writes only"), "{refused}");
    bench.write(1, 0, &[5; 512]);
    bench.drain();
    bench.verb(JobVerb::Finish).unwrap();
    bench.turns_until("over", |bench| bench.with(|mirror, _| mirror.wants()) == JobWants::Dissolve);
    let end = bench.dissolve();
    assert_eq!((end.side, end.info.failure), (Side::Source, None));
    assert_eq!(bench.contents(Side::Target)[..512], [5; 512]);
}

#[test]
fn in_background_new_writes_are_copied_later() {
    let mut bench = Bench::new(new_writes(CopyMode::Background, ObserverPolicy::Block));
    bench.fill_source(0, &[7; 16384]);
    bench.with(|mirror, cx| mirror.attach(cx));
    bench.reach(JobStatus::Ready);
    bench.write(1, 4096, &[5; 512]);
    bench.drain();
    bench.turns_until("copied", |bench| bench.info().copied_bytes == 4096);
    bench.turns(2);
    let target = bench.contents(Side::Target);
    assert_eq!((&target[..4096], &target[4096..4608]), (&[0; 4096][..], &[5; 512][..]));
    assert_eq!(target[4608..8192], [7; 3584], "a chunk is copied whole");
}

#[test]
fn a_hung_observer_holds_up_neither_writes_nor_flushes_and_gets_all_of_it_later() {
    let mut bench = observed(ObserverPolicy::Track);
    write_beside_a_hung_target(&mut bench, 500);
    bench.submit(1000, IoKind::Flush, 0, 0);
    bench.drain();
    let info = bench.info();
    assert!(info.dirty_bytes > 0 && !info.actively_synced, "{info:?}");
    assert_eq!(info.dropped_writes, 0);
    bench.legs[Side::Target as usize].clear();
    bench.turns_until("caught up", |bench| {
        bench.info().dirty_bytes == 0 && bench.info().actively_synced
    });
    let (source, target) = (bench.contents(Side::Source), bench.contents(Side::Target));
    for chunk in 0..200 {
        assert_eq!(source[chunk * 4096..][..512], target[chunk * 4096..][..512], "chunk {chunk}");
    }
}

#[test]
fn what_a_hung_observer_misses_is_counted_and_forgotten_where_that_is_the_policy() {
    let mut bench = observed(ObserverPolicy::Drop);
    write_beside_a_hung_target(&mut bench, 500);
    let info = bench.info();
    assert!(info.dropped_writes >= 300, "{info:?}");
    assert_eq!(info.dropped_bytes, 512 * info.dropped_writes);
    assert_eq!((info.dirty_bytes, info.status), (0, JobStatus::Ready));
    bench.legs[Side::Target as usize].clear();
    bench.turns(100);
    let after = bench.info();
    assert_eq!((after.copied_bytes, after.dropped_writes), (0, info.dropped_writes));
    assert_eq!(after.mirrored_bytes, 512 * (500 - info.dropped_writes));
}

#[test]
fn an_observer_that_fails_a_write_loses_that_write_and_the_job_goes_on() {
    let mut bench = observed(ObserverPolicy::Drop);
    bench.inject(Side::Target, IoKind::Write, Effect::Fail(IoError::IO), 1);
    bench.write(1, 0, &[5; 512]);
    bench.drain();
    bench.turns(10);
    let info = bench.info();
    assert_eq!((info.status, info.failure), (JobStatus::Ready, None));
    assert_eq!((info.dropped_writes, info.dirty_bytes, info.copied_bytes), (1, 0, 0));
    let ignored = |event: &JobEvent| {
        matches!(event, JobEvent::Error { action: ErrorAction::Ignore, side: Side::Target, .. })
    };
    assert!(bench.events.iter().any(ignored), "{:?}", bench.events);
}

#[test]
fn a_trailing_write_that_times_out_is_dirty_for_an_observer_that_is_tracked() {
    let config = MirrorConfig {
        target_timeout: Some(Nanos::from_millis(1)),
        on_target_error: OnError::Ignore,
        ..new_writes(CopyMode::WriteBlocking, ObserverPolicy::Track)
    };
    let mut bench = Bench::started(config);
    bench.reach(JobStatus::Ready);
    bench.inject(Side::Target, IoKind::Write, Effect::Stall, 1);
    bench.write(1, 0, &[5; 512]);
    bench.drain();
    assert_eq!(bench.info().dirty_bytes, 0, "it trails");
    bench.turns_until("given up", |bench| bench.info().dirty_bytes == 4096);
    bench.legs[Side::Target as usize].clear();
    bench.turns_until("copied", |bench| bench.info().dirty_bytes == 0);
    bench.turns(10);
    assert_eq!(bench.contents(Side::Target)[..512], [5; 512]);
}

#[test]
fn an_observer_that_nobody_waits_for_is_not_copied_to_in_background() {
    let mut bench = observed(ObserverPolicy::Track);
    let refused = bench.verb(JobVerb::Change(CopyMode::Background)).unwrap_err().to_string();
    assert!(refused.contains("observer policy"), "{refused}");
    bench.verb(JobVerb::Change(CopyMode::WriteBlocking)).unwrap();
}

fn top(diff_cluster: Option<u32>) -> Bench {
    let config = MirrorConfig { sync: SyncMode::Top, diff_cluster, ..blocking() };
    let mut bench = Bench::new(config);
    bench.fill_source(0, &[7; 16384]);
    bench.with(|mirror, cx| mirror.attach(cx));
    bench
}

#[test]
fn of_a_chain_only_the_top_is_copied_and_ready_waits_for_the_whole_scan() {
    let mut bench = top(None);
    bench.turns(50);
    assert_eq!(bench.status(), JobStatus::Running, "ready, and nobody knows what is allocated");
    bench.with(|mirror, cx| {
        mirror.scanned(cx, ScanReport::Allocated { offset: 4096, length: 4096 });
        mirror.scanned(cx, ScanReport::Upto(SIZE));
    });
    bench.turns_until("copied", |bench| bench.info().copied_bytes == 4096);
    bench.turns(50);
    assert_eq!(bench.status(), JobStatus::Running);
    bench.with(|mirror, cx| mirror.scanned(cx, ScanReport::Done));
    bench.reach(JobStatus::Ready);
    let target = bench.contents(Side::Target);
    assert_eq!((&target[..4096], &target[4096..8192]), (&[0; 4096][..], &[7; 4096][..]));
    assert_eq!(bench.info().total_bytes, 4096);
}

#[test]
fn a_part_of_a_cluster_is_written_to_a_difference_image_only_with_the_rest_of_it() {
    let mut bench = top(Some(4096));
    bench.with(|mirror, cx| mirror.scanned(cx, ScanReport::Done));
    bench.reach(JobStatus::Ready);
    bench.write(1, 8192 + 512, &[5; 512]);
    bench.write(2, 0, &[6; 4096]);
    bench.drain();
    assert_eq!(bench.contents(Side::Target)[8192..12288], [0; 4096], "a part of it was written");
    assert_eq!(bench.contents(Side::Target)[..4096], [6; 4096], "all of it may be");
    bench.turns_until("filled", |bench| bench.info().copied_bytes == 4096);
    bench.turns(2);
    let (source, target) = (bench.contents(Side::Source), bench.contents(Side::Target));
    assert_eq!(target[8192..12288], source[8192..12288]);
    // From now on a part may be written.
    bench.write(3, 8192, &[8; 512]);
    bench.drain();
    assert_eq!(bench.contents(Side::Target)[8192..8704], [8; 512]);
    assert_eq!(bench.info().dirty_bytes, 0);
}

#[test]
fn combinations_that_make_no_sense_are_refused() {
    let refused = |config: MirrorConfig| {
        let disk = Malloc::new("disk", BLOCK, 64).unwrap();
        let open = |depth| disk.open_channel(depth).unwrap();
        let (source, copy_source) = (open(DISK_DEPTH), open(COPY_DEPTH));
        let channels =
            MirrorChannels { source, copy_source, target: open(TARGET_DEPTH), offload: None };
        Mirror::new(config, channels).err().expect("a refusal").to_string()
    };
    let track = ObserverPolicy::Track;
    for config in
        [MirrorConfig { observer: track, ..blocking() }, new_writes(CopyMode::Background, track)]
    {
        assert!(refused(config).contains("sync 'none' and copy_mode 'write-blocking'"));
    }
    let cluster = MirrorConfig {
        sync: SyncMode::Top,
        granularity: 32768,
        diff_cluster: Some(65536),
        ..blocking()
    };
    let text = refused(cluster);
    let qemu =
        "Bitmap granularity 32768 is not a multiple of the target image's cluster size 65536";
    assert!(text.contains(qemu), "{text}");
    let zero = MirrorConfig { sync: SyncMode::Top, target_is_zero: true, ..blocking() };
    assert!(refused(zero).contains("target_is_zero"));
    let verify = MirrorConfig {
        verify_before_complete: true,
        ..new_writes(CopyMode::Background, ObserverPolicy::Block)
    };
    assert!(refused(verify).contains("verify_before_complete"));
}
