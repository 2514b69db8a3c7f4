//! Named scenarios: what a mirror owes in situations that matter, each told from top to bottom on the simulator's world.

use resilver_bdev::job::{CopyMode, IoStatus, JobFailure, OnError};
use resilver_bdev::mirror::{ChunkState, MirrorConfig, SyncMode};
use resilver_bdev::{IoError, IoKind, JobStatus, JobVerb};
use resilver_reactor::Nanos;
use resilver_tests::sim::control::{MirrorPlan, Operator};
use resilver_tests::sim::disk::Effect;
use resilver_tests::sim::guest::{Ask, GuestOptions, Transport};
use resilver_tests::sim::rng::Rng;
use resilver_tests::sim::sector::{SECTOR, Sector};
use resilver_tests::sim::swarm::{Swarm, calm_disk};
use resilver_tests::sim::trace::Trace;
use resilver_tests::sim::world::World;

const SOON: Nanos = Nanos::from_secs(5);
/// Sectors of a calm disk.
const SECTORS: usize = 128;
/// Bytes of a chunk in these stories: four sectors.
const CHUNK: u64 = 4 * SECTOR as u64;

/// A guest that writes, reads and flushes everywhere.
fn busy() -> GuestOptions {
    GuestOptions {
        transport: Transport::Port,
        depth: 16,
        weights: [2, 6, 1, 1, 1],
        rate_per_mille: 300,
        longest: 16,
        hot_per_mille: 500,
        hot: 16..48,
        scribble_per_mille: 0,
        zero_per_mille: 0,
    }
}

/// A world in which nothing happens by itself.
fn quiet_world() -> World {
    let world = world_with(busy());
    world.seats[0].guest.set_active(false);
    world
}

fn world_with(guest: GuestOptions) -> World {
    let mut world = World::new(Swarm::calm(guest), Rng::new(1), Trace::new(0));
    world.control.operator = Operator::Quiet;
    world.step();
    world
}

fn plan() -> MirrorPlan {
    let config = MirrorConfig {
        job_id: "m".to_owned(),
        copy_mode: CopyMode::WriteBlocking,
        granularity: CHUNK as u32,
        buf_size: 0,
        speed: 0,
        on_source_error: OnError::Report,
        on_target_error: OnError::Report,
        target_timeout: None,
        unmap: true,
        target_is_zero: false,
        auto_finalize: true,
        ..MirrorConfig::default()
    };
    MirrorPlan { target: calm_disk(), config, offloads: false }
}

/// Starts a mirror whose hole scan has nothing to say.
fn start(world: &mut World, plan: &MirrorPlan) {
    start_unscanned(world, plan);
    world.give_up_scan();
    while world.report_scan() {}
}

fn start_unscanned(world: &mut World, plan: &MirrorPlan) {
    world.start_mirror(plan).unwrap();
    until(world, "the mirror runs", |world| world.job_status().is_some());
}

fn until(world: &mut World, what: &str, reached: impl Fn(&World) -> bool) {
    if let Err(wrong) = world.run_until(what, SOON, reached) {
        panic!("{}\n{wrong}", world.trace.tail().join("\n"));
    }
}

fn until_status(world: &mut World, status: JobStatus) {
    until(world, status.name(), |world| world.job_status() == Some(status));
}

fn until_switched(world: &mut World) {
    until(world, "the job ends on its target", |world| world.control.reached.switched == 1);
    world.check_medium();
    world.verdict().unwrap();
}

fn for_a_while(world: &mut World, span: Nanos) {
    let end = world.now + span;
    until(world, "time passes", |world| world.now >= end);
}

/// Asks for a write and gives its number.
fn write(world: &World, sector: usize, count: usize) -> usize {
    world.seats[0].guest.ask(Ask { kind: IoKind::Write, sector, count })
}

fn flush(world: &World) -> usize {
    world.seats[0].guest.ask(Ask { kind: IoKind::Flush, sector: 0, count: 0 })
}

fn answered(world: &mut World, number: usize) -> Result<(), IoError> {
    until(world, "the guest is answered", |world| world.seats[0].guest.answer(number).is_some());
    world.seats[0].guest.answer(number).unwrap().result
}

fn chunk(world: &World, index: u64) -> ChunkState {
    world.control.job().unwrap().probe.chunk_state(index).unwrap()
}

fn info(world: &World) -> resilver_bdev::JobInfo {
    world.control.job().unwrap().probe.look(world.now).unwrap()
}

fn in_sync(world: &World) -> bool {
    let info = info(world);
    info.dirty_bytes == 0 && info.in_flight_bytes == 0
}

#[test]
fn a_timed_out_write_that_lands_late_spoils_nothing() {
    let mut world = quiet_world();
    let mut plan = plan();
    plan.config.on_target_error = OnError::Ignore;
    plan.config.target_timeout = Some(Nanos::from_millis(2));
    start(&mut world, &plan);
    until_status(&mut world, JobStatus::Ready);
    let target = world.control.job().unwrap().target.clone();

    // The target takes the write and does not answer; the guest hears the source's success after the time-out.
    target.plan(IoKind::Write, Effect::Stall);
    let old = write(&world, 8, 4);
    assert_eq!(answered(&mut world, old), Ok(()));
    assert_eq!(target.stalled(), 1);

    // The guest writes there again. The target must not get this while the old write may still land on it.
    let new = write(&world, 8, 4);
    assert_eq!(answered(&mut world, new), Ok(()));
    for_a_while(&mut world, Nanos::from_millis(300));
    assert_eq!(chunk(&world, 2), ChunkState::Shut);
    assert!(info(&world).dirty_bytes > 0);

    // It lands. Only now is the range copied, and what was written last is what both legs have.
    target.release_stalled(world.now);
    until(&mut world, "both legs are equal", in_sync);
    assert_eq!(world.source.first_difference(&target, 0..SECTORS), None);
    world.tell(JobVerb::Complete);
    until_switched(&mut world);
}

#[test]
fn a_full_target_pauses_the_job_and_room_lets_it_go_on_where_it_was() {
    let mut world = quiet_world();
    let mut plan = plan();
    plan.config.on_target_error = OnError::Enospc;
    plan.config.target_is_zero = true;
    plan.config.buf_size = CHUNK;
    plan.config.speed = 1 << 20;
    start(&mut world, &plan);
    let target = world.control.job().unwrap().target.clone();
    until(&mut world, "half is copied", |world| info(world).copied_bytes >= 32 << 10);

    target.change_faults(|faults| faults.full = true);
    until_status(&mut world, JobStatus::Paused);
    assert_eq!(info(&world).io_status, IoStatus::Nospace);
    let number = write(&world, 100, 8);
    assert_eq!(answered(&mut world, number), Ok(()), "the guest does not feel it");

    target.change_faults(|faults| faults.full = false);
    world.tell(JobVerb::Resume);
    until_status(&mut world, JobStatus::Ready);
    let info = info(&world);
    assert_eq!(info.io_status, IoStatus::Ok);
    assert!(info.copied_bytes <= (64 << 10) + 2 * 4096, "no second full copy: {info:?}");
    world.tell(JobVerb::Complete);
    until_switched(&mut world);
}

#[test]
fn cancel_frees_the_guest_at_once_though_the_target_hangs() {
    let mut world = quiet_world();
    start(&mut world, &plan());
    until_status(&mut world, JobStatus::Ready);
    let target = world.control.job().unwrap().target.clone();
    target.plan(IoKind::Write, Effect::Stall);
    let hung = write(&world, 0, 8);
    for_a_while(&mut world, Nanos::from_millis(100));
    assert!(world.seats[0].guest.answer(hung).is_none(), "both legs must have it");

    let told = world.now;
    world.tell(JobVerb::Cancel);
    assert_eq!(answered(&mut world, hung), Ok(()));
    until(&mut world, "the job ends", |world| world.control.reached.failed == 1);
    assert!(world.now - told < Nanos::from_millis(100), "{} passed", world.now - told);
    assert_eq!(world.control.releasing(), 1, "the target's channel is still busy");

    target.release_stalled(world.now);
    until(&mut world, "the target is let go", |world| world.control.releasing() == 0);
}

#[test]
fn a_switch_over_whose_record_fails_is_undone_and_tried_again_under_load() {
    let mut world = world_with(busy());
    start(&mut world, &plan());
    until_status(&mut world, JobStatus::Ready);
    world.control.records_to_fail = 1;
    world.tell(JobVerb::Complete);
    until(&mut world, "the switch is undone", |world| world.control.reached.undone == 1);
    until_status(&mut world, JobStatus::Ready);
    assert_eq!(info(&world).failure, Some(JobFailure::CommitRecord));

    world.tell(JobVerb::Complete);
    until_switched(&mut world);
    let ended = world.ended();
    until(&mut world, "the guest goes on", |world| world.ended() > ended + 1000);
    world.check_medium();
    world.verdict().unwrap();
}

#[test]
fn overlapping_writes_land_in_one_order_on_both_legs() {
    let mut world = quiet_world();
    start(&mut world, &plan());
    until_status(&mut world, JobStatus::Ready);
    for round in 0..50 {
        let at = round % 3;
        let numbers = [
            write(&world, 8 + at, 8),
            write(&world, 10, 8),
            write(&world, 4, 16 - at),
            write(&world, 12, 1),
        ];
        for number in numbers {
            assert_eq!(answered(&mut world, number), Ok(()));
        }
        let target = &world.control.job().unwrap().target;
        assert_eq!(world.source.first_difference(target, 0..SECTORS), None, "round {round}");
    }
}

#[test]
fn a_guest_that_changes_its_buffers_in_flight_gives_both_legs_the_same_bytes() {
    let mut world = world_with(GuestOptions { scribble_per_mille: 1000, ..busy() });
    start(&mut world, &plan());
    until_status(&mut world, JobStatus::Ready);
    let ended = world.ended();
    until(&mut world, "many writes are mirrored", |world| world.ended() > ended + 2000);
    world.tell(JobVerb::Complete);
    until_switched(&mut world);
}

#[test]
fn a_hole_that_the_guest_wrote_to_before_its_report_came_is_data() {
    let mut world = quiet_world();
    for sector in 0..SECTORS {
        world.source.preset(sector, None);
    }
    world.forget_content();
    let mut plan = plan();
    plan.config.copy_mode = CopyMode::Background;
    start_unscanned(&mut world, &plan);
    world.look_for_holes(SECTORS);
    let number = write(&world, 40, 4);
    assert_eq!(answered(&mut world, number), Ok(()));
    while world.report_scan() {}
    until_status(&mut world, JobStatus::Ready);

    let target = world.control.job().unwrap().target.clone();
    assert_eq!(world.source.first_difference(&target, 0..SECTORS), None);
    assert_ne!(target.content(40), Sector::zero());
    assert_eq!(info(&world).copied_bytes, CHUNK, "the holes were not read");
}

#[test]
fn a_hole_that_an_ended_jobs_scan_found_is_no_news_to_the_next_job() {
    let mut world = quiet_world();
    for sector in 0..SECTORS {
        world.source.preset(sector, None);
    }
    world.forget_content();
    start_unscanned(&mut world, &plan());
    world.look_for_holes(SECTORS);
    world.tell(JobVerb::Cancel);
    until(&mut world, "the job is over", |world| world.control.job().is_none());
    let number = write(&world, 40, 4);
    assert_eq!(answered(&mut world, number), Ok(()));
    start_unscanned(&mut world, &plan());
    assert!(world.report_late(), "the hole");
    world.give_up_scan();
    while world.report_scan() {}
    until_status(&mut world, JobStatus::Ready);

    let target = world.control.job().unwrap().target.clone();
    assert_eq!(world.source.first_difference(&target, 0..SECTORS), None);
    assert_ne!(target.content(40), Sector::zero());
}

#[test]
fn a_failed_flush_of_the_target_is_the_jobs_affair_and_nothing_is_forgotten() {
    let mut world = quiet_world();
    let mut plan = plan();
    plan.config.on_target_error = OnError::Ignore;
    start(&mut world, &plan);
    until_status(&mut world, JobStatus::Ready);
    let target = world.control.job().unwrap().target.clone();
    let number = write(&world, 20, 2);
    assert_eq!(answered(&mut world, number), Ok(()));
    assert!(in_sync(&world));

    target.plan(IoKind::Flush, Effect::Fail(IoError::IO));
    let number = flush(&world);
    assert_eq!(answered(&mut world, number), Ok(()), "the source is durable");
    assert!(info(&world).errors.counts.iter().flatten().sum::<u64>() > 0);

    // What the failed flush may have lost is copied again before a switch-over believes in it.
    let copied = info(&world).copied_bytes;
    world.tell(JobVerb::Complete);
    until(&mut world, "it is copied again", |world| {
        world.control.job().is_none_or(|_| info(world).copied_bytes > copied)
    });
    world.control.operator = Operator::Wants(JobVerb::Complete);
    until_switched(&mut world);
}

#[test]
fn a_target_write_that_fails_after_the_commit_takes_the_record_back_before_the_guest_hears() {
    let mut world = quiet_world();
    let mut plan = plan();
    plan.config.on_target_error = OnError::Ignore;
    plan.config.target_timeout = Some(Nanos::from_millis(20));
    plan.config.auto_finalize = false;
    world.control.record_takes = Nanos(1);
    start(&mut world, &plan);
    until_status(&mut world, JobStatus::Ready);
    world.tell(JobVerb::Complete);
    until_status(&mut world, JobStatus::Pending);

    let target = world.control.job().unwrap().target.clone();
    target.plan(IoKind::Write, Effect::Stall);
    let number = write(&world, 60, 4);
    until(&mut world, "the target hangs", |_| target.stalled() == 1);
    world.tell(JobVerb::Finalize);
    until(&mut world, "the record is taken back", |world| world.control.reached.retracted == 1);
    assert_eq!(world.control.job().unwrap().authoritative(), (true, false));
    assert_eq!(answered(&mut world, number), Ok(()));
    until_status(&mut world, JobStatus::Ready);

    target.release_stalled(world.now);
    world.control.operator = Operator::Wants(JobVerb::Complete);
    until_switched(&mut world);
}

#[test]
fn a_flush_is_not_acknowledged_while_a_record_stands_for_a_target_that_has_lost_data() {
    let mut world = quiet_world();
    let mut plan = plan();
    plan.config.on_target_error = OnError::Ignore;
    plan.config.auto_finalize = false;
    world.control.record_takes = Nanos(1);
    start(&mut world, &plan);
    until_status(&mut world, JobStatus::Ready);
    world.tell(JobVerb::Complete);
    until_status(&mut world, JobStatus::Pending);

    // A read hangs, so the disk does not drain and the job outlives its record, which cannot be taken back at first.
    world.source.plan(IoKind::Read, Effect::Stall);
    world.seats[0].guest.ask(Ask { kind: IoKind::Read, sector: 0, count: 1 });
    until(&mut world, "the read hangs", |world| world.source.stalled() == 1);
    world.tell(JobVerb::Finalize);
    until(&mut world, "the record is written", |world| {
        world.control.job().unwrap().authoritative() == (false, true)
    });
    world.control.records_to_fail = 1;
    world.tell(JobVerb::Cancel);
    until_status(&mut world, JobStatus::Aborting);

    // The target loses an acknowledged write in a flush that fails. The flush after that goes well, and proves nothing while the copy
    // of what was lost is on its way, nor where it comes in before the flush has ended.
    let number = write(&world, 40, 4);
    assert_eq!(answered(&mut world, number), Ok(()));
    let target = world.control.job().unwrap().target.clone();
    target.plan(IoKind::Flush, Effect::Fail(IoError::IO));
    target.plan(IoKind::Write, Effect::Stall);
    let first = flush(&world);
    until(&mut world, "it is copied again", |_| target.stalled() == 1);
    let second = flush(&world);
    for_a_while(&mut world, Nanos::from_millis(100));
    target.plan(IoKind::Flush, Effect::Stall);
    let third = flush(&world);
    until(&mut world, "the third flush hangs", |_| target.stalled() == 2);
    target.release_stalled(world.now);
    for_a_while(&mut world, Nanos::from_millis(100));
    for number in [first, second, third] {
        let answer = world.seats[0].guest.answer(number);
        assert!(answer.is_none(), "a power loss would lose the write");
    }

    // One that was sent when the copy had come in is good, though the record still stands.
    let fourth = flush(&world);
    assert_eq!(answered(&mut world, fourth), Ok(()));
    assert_eq!(world.control.reached.retracted, 0);
    assert_eq!(target.after_power_loss(40), [world.source.content(40)]);

    world.source.release_stalled(world.now);
    assert_eq!(answered(&mut world, first), Ok(()));
    assert_eq!(answered(&mut world, second), Ok(()));
    assert_eq!(answered(&mut world, third), Ok(()));
    assert_eq!(world.control.reached.retracted, 1);
}

#[test]
fn what_is_copied_while_a_switch_over_waits_to_be_finalized_is_flushed_before_its_record() {
    let mut world = quiet_world();
    // Older values everywhere, durably, in the base of what will be a difference image.
    let older = write(&world, 0, SECTORS);
    let durable = flush(&world);
    assert_eq!((answered(&mut world, older), answered(&mut world, durable)), (Ok(()), Ok(())));
    let mut plan = plan();
    plan.config.sync = SyncMode::Top;
    plan.config.diff_cluster = Some(CHUNK as u32);
    plan.config.auto_finalize = false;
    start(&mut world, &plan);
    until_status(&mut world, JobStatus::Ready);
    world.tell(JobVerb::Complete);
    until_status(&mut world, JobStatus::Pending);

    // A part of a cluster that the difference image lacks goes to the source alone, and the guest flushes before it is copied.
    world.source.plan(IoKind::Read, Effect::Stall);
    let copies = |world: &World| world.source.stalled() == 1;
    for sector in (0..SECTORS).step_by(4) {
        if !copies(&world) {
            let number = write(&world, sector, 1);
            assert_eq!(answered(&mut world, number), Ok(()));
            for_a_while(&mut world, Nanos::from_micros(100));
        }
    }
    assert!(copies(&world), "nothing is copied while the job waits");
    let number = flush(&world);
    assert_eq!(answered(&mut world, number), Ok(()));
    world.source.release_stalled(world.now);
    until(&mut world, "both legs are equal again", in_sync);
    world.tell(JobVerb::Finalize);
    until_switched(&mut world);
}
