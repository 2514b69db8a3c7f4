//! The bounce pool, and what the legs are told of it.

use std::sync::atomic::{AtomicU32, Ordering};

use super::*;
use crate::channel::Limits;

/// A leg's channel that notes how many pools it has been told of, and still expects.
struct Told {
    base: Box<dyn IoChannel>,
    pools: Arc<AtomicU32>,
}

impl IoChannel for Told {
    fn limits(&self) -> &Limits {
        self.base.limits()
    }

    fn free(&self, kind: IoKind) -> u32 {
        self.base.free(kind)
    }

    fn submit(&mut self, cx: &Context<'_>, io: BdevIo, payload: &[BufferSlice]) {
        self.base.submit(cx, io, payload);
    }

    fn commit(&mut self, cx: &Context<'_>) {
        self.base.commit(cx);
    }

    fn poll(&mut self, cx: &Context<'_>, done: &mut CompletionBatch) {
        self.base.poll(cx, done);
    }

    fn in_flight(&self) -> u32 {
        self.base.in_flight()
    }

    fn attach(&mut self, cx: &Context<'_>) {
        self.base.attach(cx);
    }

    fn expect_pool(&mut self, pool: &Arc<Mapping>, length: usize) {
        assert!(length > 0 && length <= pool.len());
        self.pools.fetch_add(1, Ordering::Relaxed);
    }

    fn forget_pool(&mut self) {
        self.pools.fetch_sub(1, Ordering::Relaxed);
    }
}

#[test]
fn each_leg_is_told_of_the_bounce_pool_once_and_that_it_goes() {
    let pools = [0; 2].map(|_| Arc::new(AtomicU32::new(0)));
    let of =
        |pools: &[Arc<AtomicU32>; 2]| [0, 1].map(|leg: usize| pools[leg].load(Ordering::Relaxed));
    let mut bench = Bench::over(MirrorConfig::default(), |leg, base| {
        Box::new(Told { base, pools: Arc::clone(&pools[leg as usize]) })
    });
    bench.with(|mirror, _| mirror.prepare());
    assert_eq!(of(&pools), [1, 1]);
    bench.with(|mirror, cx| {
        mirror.attach(cx);
        mirror.scanned(cx, ScanReport::Done);
    });
    bench.commit();
    let end = bench.dissolve();
    assert_eq!((end.side, of(&pools)), (Side::Target, [0, 0]));
}
