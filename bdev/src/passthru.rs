//! `passthru`: a bdev that does nothing but hand everything to the bdev below it.
//!
//! Why: it costs exactly what a layer costs, and it is the module to copy for a new stacked bdev. The control side has a
//! [`Bdev::base`], and the trait's defaults ask that for all it does not answer itself. The data side owns a channel of the
//! base: it submits to it and polls it, and nothing ever calls back. Capacity comes from below, so nothing can be "busy".
//!
//! This one can pass tags and completions through as they are. A layer that changes or delays I/O gives the base tags of
//! its own, numbers of [`crate::slots::Slots`], and keeps what it needs to know in the slot: see `delay.rs`.
//!
//! Fault model: the base's.

use std::sync::Arc;

use resilver_reactor::{Armed, Context};
use resilver_sys::{BufferSlice, Mapping, WaitSet};

use crate::channel::{CompletionBatch, IoChannel, Limits};
use crate::device::{Bdev, BdevError, Detail, Geometry};
use crate::io::{BdevIo, IoKind};
use crate::stats::IoStats;

/// The control side.
pub struct Passthru {
    name: String,
    base: Arc<dyn Bdev>,
    stats: Arc<IoStats>,
}

impl Passthru {
    /// A bdev over `base`.
    #[must_use]
    pub fn new(name: &str, base: Arc<dyn Bdev>) -> Self {
        Self { name: name.to_owned(), base, stats: Arc::default() }
    }
}

impl Bdev for Passthru {
    fn name(&self) -> &str {
        &self.name
    }

    fn module(&self) -> &'static str {
        "passthru"
    }

    fn geometry(&self) -> Geometry {
        self.base.geometry()
    }

    fn open_channel(&self, depth: u32) -> Result<Box<dyn IoChannel>, BdevError> {
        Ok(Box::new(PassthruChannel { base: self.base.open_channel(depth)? }))
    }

    fn base(&self) -> Option<&Arc<dyn Bdev>> {
        Some(&self.base)
    }

    fn details(&self) -> Vec<(&'static str, Detail)> {
        vec![("base_bdev_name", Detail::Text(self.base.name().to_owned()))]
    }

    fn stats(&self) -> &Arc<IoStats> {
        &self.stats
    }
}

/// The data side.
struct PassthruChannel {
    base: Box<dyn IoChannel>,
}

impl IoChannel for PassthruChannel {
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

    fn works_inline(&self) -> bool {
        self.base.works_inline()
    }

    fn is_passive(&self) -> bool {
        self.base.is_passive()
    }

    fn expect_pool(&mut self, pool: &Arc<Mapping>, length: usize) {
        self.base.expect_pool(pool, length);
    }

    fn forget_pool(&mut self) {
        self.base.forget_pool();
    }

    fn attach(&mut self, cx: &Context<'_>) {
        self.base.attach(cx);
    }

    fn detach(&mut self, cx: &Context<'_>) {
        self.base.detach(cx);
    }

    fn arm(&mut self, cx: &Context<'_>, set: &mut WaitSet) -> Armed {
        self.base.arm(cx, set)
    }

    fn disarm(&mut self, cx: &Context<'_>) {
        self.base.disarm(cx);
    }
}
