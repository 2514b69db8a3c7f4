//! Mirrors that work by a bitmap.

use super::*;
use crate::bitmap::Grid;
use crate::dirty_bitmap::DirtyBitmap;

/// A target that has an earlier copy of all but two chunks, and the bitmap that says so.
fn by_bitmap(mode: BitmapMode) -> (Bench, Arc<DirtyBitmap>) {
    by_bitmap_as(mode, blocking())
}

fn by_bitmap_as(mode: BitmapMode, config: MirrorConfig) -> (Bench, Arc<DirtyBitmap>) {
    let bitmap = Arc::new(DirtyBitmap::new(Grid::new(SIZE, 4096), true));
    bitmap.mark(4096, 1);
    bitmap.mark(12288, 1);
    let working = WorkingBitmap { bitmap: Arc::clone(&bitmap), mode };
    let mut bench = Bench::new(MirrorConfig { bitmap: Some(working), ..config });
    bench.fill_source(0, &[7; 16384]);
    bench.with(|mirror, cx| {
        mirror.attach(cx);
        mirror.scanned(cx, ScanReport::Done);
    });
    (bench, bitmap)
}

fn end(mut bench: Bench) -> Dissolved {
    bench.turns_until("over", |bench| bench.with(|mirror, _| mirror.wants()) == JobWants::Dissolve);
    bench.dissolve()
}

#[test]
fn a_mirror_by_bitmap_brings_over_what_it_says_and_nothing_else() {
    let (mut bench, _bitmap) = by_bitmap(BitmapMode::Always);
    assert_eq!(bench.info().total_bytes, 8192);
    bench.reach(JobStatus::Ready);
    let target = bench.contents(Side::Target);
    for (chunk, byte) in [(0, 0), (1, 7), (2, 0), (3, 7)] {
        assert_eq!(target[chunk * 4096..][..4096], [byte; 4096], "chunk {chunk}");
    }
    assert_eq!(bench.info().copied_bytes, 8192);
}

#[test]
fn after_a_failure_the_bitmap_is_where_to_go_on_or_what_it_was() {
    for (mode, left) in
        [(BitmapMode::Always, 4096), (BitmapMode::Never, 8192), (BitmapMode::OnSuccess, 8192)]
    {
        let (mut bench, bitmap) = by_bitmap(mode);
        bench.reach(JobStatus::Ready);
        bench.verb(JobVerb::Cancel).unwrap();
        // What the guest writes now the target lacks.
        bench.write(1, 0, &[1; 512]);
        bench.drain();
        assert!(end(bench).info.failure.is_some());
        assert_eq!(bitmap.count_bytes(), left, "{mode:?}");
        bitmap.mark(20480, 4096);
        assert_eq!(bitmap.count_bytes(), left + 4096, "it records again");
    }
}

#[test]
fn after_a_good_end_the_bitmap_is_clean_unless_the_mirror_was_not_to_touch_it() {
    for (mode, left) in
        [(BitmapMode::Always, 0), (BitmapMode::Never, 8192), (BitmapMode::OnSuccess, 0)]
    {
        let (mut bench, bitmap) = by_bitmap(mode);
        bench.reach(JobStatus::Ready);
        bench.verb(JobVerb::Finish).unwrap();
        assert_eq!(end(bench).info.failure, None);
        assert_eq!(bitmap.count_bytes(), left, "{mode:?}");
    }
}

#[test]
fn what_a_flush_that_has_not_ended_was_to_make_durable_goes_back_into_the_bitmap() {
    let time_out = Nanos::from_millis(5);
    for (target_timeout, left) in [(None, 8192), (Some(time_out), 8192 + 4096)] {
        let config =
            MirrorConfig { on_target_error: OnError::Ignore, target_timeout, ..blocking() };
        let (mut bench, bitmap) = by_bitmap_as(BitmapMode::Always, config);
        bench.inject(Side::Target, IoKind::Flush, Effect::Stall, FOREVER);
        bench.turns_until("copied", |bench| bench.info().copied_bytes == 8192);
        bench.turns(10);
        if target_timeout.is_some() {
            // It is given up; what it was to cover is copied again, and the guest goes on.
            bench.turns_until("copied again", |bench| bench.info().copied_bytes == 2 * 8192);
            bench.write(1, 20480, &[1; 512]);
            bench.drain();
        }
        bench.verb(JobVerb::Cancel).unwrap();
        end(bench);
        assert_eq!(bitmap.count_bytes(), left, "{target_timeout:?}");
    }
}
