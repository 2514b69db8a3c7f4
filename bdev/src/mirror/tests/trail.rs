//! A background copy that its guest outruns: writes are sent along, and the guest still waits for nobody.

use super::*;

const CHUNK: u64 = 64 << 10;
const CHUNKS: u64 = 16;

fn in_background() -> MirrorConfig {
    MirrorConfig { copy_mode: CopyMode::Background, ..MirrorConfig::default() }
}

impl Bench {
    /// The guest writes a block into every chunk, again and again, for half a second at least and until this is so. The
    /// mirror looks twice a second at whether there is less to do.
    fn outrun_until(&mut self, what: &str, mut reached: impl FnMut(&JobInfo) -> bool) {
        for round in 0..10_000u64 {
            self.now = self.now + Nanos::from_millis(1);
            for chunk in 0..CHUNKS {
                let free = self.with(|mirror, _| mirror.free(IoKind::Write) > 0);
                if free {
                    let value = u8::try_from(round % 251).unwrap();
                    self.write(0, chunk * CHUNK + round % 128 * 512, &[value; 512]);
                }
            }
            self.turn();
            let info = self.info();
            if round > 600 && reached(&info) {
                return;
            }
        }
        panic!("not reached: {what}: {:?}", self.info());
    }

    /// Both legs have the same bytes.
    fn equal(&self) -> bool {
        self.contents(Side::Source) == self.contents(Side::Target)
    }
}

/// Outrun, and in sync but for what trails.
fn outrun(config: MirrorConfig) -> Bench {
    let mut bench = Bench::new(config);
    bench.fill_source(0, &[9; 1 << 20]);
    bench.with(|mirror, cx| {
        mirror.attach(cx);
        mirror.scanned(cx, ScanReport::Done);
    });
    bench.outrun_until("sent along", |info| info.mirrored_bytes > 0);
    bench
}

#[test]
fn a_background_copy_that_is_outrun_sends_writes_along_and_is_ready() {
    let mut bench = outrun(in_background());
    bench.outrun_until("ready", |info| info.status == JobStatus::Ready);
    bench.drain();
    bench
        .turns_until("still", |bench| bench.info().dirty_bytes + bench.info().in_flight_bytes == 0);
    bench.turns(100);
    assert!(bench.equal());
    assert!(!bench.info().actively_synced, "it is a background copy");
}

#[test]
fn a_copy_that_gets_on_sends_nothing_along() {
    let mut bench = Bench::started(in_background());
    bench.reach(JobStatus::Ready);
    for round in 0..2000u32 {
        bench.now = bench.now + Nanos::from_millis(1);
        bench.write(round, 0, &[3; 512]);
        bench.turns(8);
    }
    assert_eq!(bench.info().mirrored_bytes, 0);
}

#[test]
fn a_job_with_a_speed_keeps_to_it_and_sends_nothing_along() {
    let config = MirrorConfig { speed: 1 << 20, ..in_background() };
    let mut bench = Bench::started(config);
    let until = Nanos::from_secs(3);
    let mut now = Nanos::ZERO;
    bench.outrun_until("three seconds", |_| {
        now = now + Nanos::from_millis(1);
        now > until
    });
    assert_eq!(bench.info().mirrored_bytes, 0);
    // Once it may do what it can, it does.
    bench.verb(JobVerb::SetSpeed(0)).unwrap();
    bench.outrun_until("sent along", |info| info.mirrored_bytes > 0);
}

#[test]
fn a_target_that_hangs_holds_up_no_guest_that_writes_trail_for() {
    let mut bench = outrun(in_background());
    bench.drain();
    bench
        .turns_until("clean", |bench| bench.info().dirty_bytes + bench.info().in_flight_bytes == 0);
    bench.done.clear();
    bench.inject(Side::Target, IoKind::Write, Effect::Stall, FOREVER);
    for tag in 0..500 {
        bench.write(tag, u64::from(tag) % CHUNKS * CHUNK + 4096, &[3; 512]);
        bench.turns_until("answered", |bench| bench.done.len() == tag as usize + 1);
    }
    assert!(bench.done.iter().all(|done| done.result.is_ok()));
    bench.legs[Side::Target as usize].clear();
    bench
        .turns_until("clean", |bench| bench.info().dirty_bytes + bench.info().in_flight_bytes == 0);
    bench.turns(100);
    assert!(bench.equal());
}

#[test]
fn as_many_writes_trail_as_a_guest_has_in_flight() {
    let mut bench = outrun(in_background());
    bench.drain();
    bench
        .turns_until("clean", |bench| bench.info().dirty_bytes + bench.info().in_flight_bytes == 0);
    bench.inject(Side::Target, IoKind::Write, Effect::Stall, FOREVER);
    bench.done.clear();
    let write = |bench: &mut Bench, tag: u32| {
        let (chunk, block) = (u64::from(tag) % CHUNKS, u64::from(tag) / CHUNKS);
        bench.write(tag, chunk * CHUNK + block * 512, &[3; 512]);
        bench.turns_until("answered", |bench| bench.done.len() == tag as usize + 1);
    };
    (0..DISK_DEPTH).for_each(|tag| write(&mut bench, tag));
    assert_eq!(bench.info().dirty_bytes, 0, "what trails makes nothing to copy");
    write(&mut bench, DISK_DEPTH);
    assert_eq!(bench.info().dirty_bytes, CHUNK, "and has an end");
}

#[test]
fn a_switch_over_waits_for_what_trails() {
    let mut bench = outrun(in_background());
    bench.drain();
    bench.reach(JobStatus::Ready);
    bench
        .turns_until("clean", |bench| bench.info().dirty_bytes + bench.info().in_flight_bytes == 0);
    bench.turns(100);
    bench.inject(Side::Target, IoKind::Write, Effect::Stall, 1);
    bench.done.clear();
    bench.write(1, 4096, &[3; 512]);
    bench.turns_until("answered", |bench| bench.done.len() == 1);
    bench.verb(JobVerb::Complete).unwrap();
    bench.turns(200);
    assert_eq!(bench.status(), JobStatus::Waiting, "a write has not landed");
    bench.legs[Side::Target as usize].clear();
    bench.turns_until("asked", |bench| bench.events.contains(&JobEvent::CommitRequest));
    assert!(bench.equal());
}

#[test]
fn a_write_that_trails_and_fails_is_copied_again() {
    let config = MirrorConfig { on_target_error: OnError::Ignore, ..in_background() };
    let mut bench = outrun(config);
    bench.drain();
    bench
        .turns_until("clean", |bench| bench.info().dirty_bytes + bench.info().in_flight_bytes == 0);
    bench.inject(Side::Target, IoKind::Write, Effect::Fail(IoError::IO), 1);
    bench.done.clear();
    bench.write(1, 4096, &[3; 512]);
    bench.turns_until("answered", |bench| bench.done.len() == 1);
    assert_eq!(bench.done[0].result, Ok(()), "the target never fails the guest");
    let copied = bench.info().copied_bytes;
    bench.turns_until("copied", |bench| bench.info().copied_bytes == copied + CHUNK);
    bench.turns(100);
    assert!(bench.equal());
}
