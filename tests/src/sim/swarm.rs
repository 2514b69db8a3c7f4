//! Swarm options: what a seed turns on.
//!
//! Each run draws a random subset of what may go wrong and how the guests behave (Groce and others, "Swarm testing", 2012): a
//! run in which everything happens at once hides what only shows when one thing happens often.

use resilver_bdev::{IoKind, Limits};
use resilver_reactor::Nanos;

use super::disk::{DiskOptions, Faults, UnmapResult};
use resilver_vhost::ring::Format;

use super::guest::{GuestOptions, Transport};
use super::rng::Rng;
use super::sector::SECTOR;

/// The options of one run.
#[derive(Debug, Clone)]
pub struct Swarm {
    /// Turns of the safety phase.
    pub steps: u32,
    /// The disk that the guests begin with.
    pub source: DiskOptions,
    /// What may go wrong with it.
    pub source_faults: Faults,
    /// What may go wrong with the target of a mirror.
    pub target_faults: Faults,
    /// The guests: usually one, two as during a live migration.
    pub guests: Vec<GuestOptions>,
    /// Turns in a thousand in which a guest resets, leaves or comes back.
    pub upheaval_per_mille: u32,
    /// Turns in a thousand in which faults come and go.
    pub weather_per_mille: u32,
    /// Turns in a thousand in which the operator changes a bitmap.
    pub bitmap_per_mille: u32,
    /// Sectors in a thousand that are holes at first.
    pub hole_per_mille: u32,
    /// Sessions in a thousand to which a guest comes by post-copy.
    pub arrives_per_mille: u32,
}

impl Swarm {
    /// What `seed` turns on, for about so many steps.
    #[must_use]
    pub fn new(rng: &mut Rng, steps: u32) -> Self {
        let source = disk(rng, None);
        let guests = if rng.chance(150) { 2 } else { 1 };
        Self {
            steps,
            source,
            source_faults: if rng.chance(300) { faults(rng) } else { Faults::default() },
            target_faults: if rng.chance(600) { faults(rng) } else { Faults::default() },
            guests: (0..guests).map(|_| guest(rng, &source.limits)).collect(),
            upheaval_per_mille: rng.pick(&[0, 0, 2, 10]),
            bitmap_per_mille: rng.pick(&[0, 0, 2, 10]),
            weather_per_mille: rng.pick(&[0, 5, 20]),
            hole_per_mille: rng.pick(&[0, 200, 500, 900]),
            arrives_per_mille: rng.clone().fork().pick(&[0, 0, 300, 1000]),
        }
    }
}

impl Swarm {
    /// A calm world for a scenario, in which only that happens which the scenario does: one guest with this behaviour, and
    /// disks of 128 sectors on which nothing fails.
    #[must_use]
    pub fn calm(guest: GuestOptions) -> Self {
        Self {
            steps: 0,
            source: calm_disk(),
            source_faults: Faults::default(),
            target_faults: Faults::default(),
            guests: vec![guest],
            upheaval_per_mille: 0,
            bitmap_per_mille: 0,
            weather_per_mille: 0,
            hole_per_mille: 0,
            arrives_per_mille: 0,
        }
    }
}

/// The disk of a calm world.
#[must_use]
pub fn calm_disk() -> DiskOptions {
    let limits = Limits {
        block_size: SECTOR as u32,
        num_blocks: 128,
        max_transfer: 64 << 10,
        max_segments: 128,
        max_unmap: 1 << 30,
        unmap: true,
        zeroes_unmap: true,
        optimal_io: 4096,
        read_only: false,
    };
    let latency = (Nanos::from_micros(10), Nanos::from_micros(50));
    DiskOptions { limits, unmap: UnmapResult::Zero, latency, slow_per_mille: 0, inline: false }
}

/// A disk of some kind; for a target, one that fits the source.
pub fn disk(rng: &mut Rng, source: Option<&Limits>) -> DiskOptions {
    let block_size = match source {
        None => rng.pick(&[512, 512, 512, 4096]),
        Some(_) if rng.chance(200) => 512,
        Some(_) if rng.chance(200) => 4096,
        Some(source) => source.block_size,
    };
    let mut size = match source {
        None => rng.between(48, 200) * u64::from(block_size),
        Some(source) => source.size(),
    };
    if source.is_some() && rng.chance(100) {
        size += rng.between(1, 16) * u64::from(block_size);
    }
    size = size.next_multiple_of(u64::from(block_size));
    // A view in smaller blocks needs room for its edges.
    let viewed = source.is_some_and(|source| source.block_size < block_size);
    let unmap =
        rng.pick(&[UnmapResult::Zero, UnmapResult::Zero, UnmapResult::Keep, UnmapResult::Garbage]);
    let limits = Limits {
        block_size,
        num_blocks: size / u64::from(block_size),
        max_transfer: rng.pick(&[8 << 10, 32 << 10, 128 << 10, 1 << 20]).max(if viewed {
            32 << 10
        } else {
            0
        }),
        max_segments: rng.pick(&[1, 4, 128]).max(if viewed { 4 } else { 1 }),
        max_unmap: rng.pick(&[16 << 10, 1 << 20, 1 << 30]),
        unmap: unmap != UnmapResult::Keep,
        zeroes_unmap: rng.chance(700),
        optimal_io: block_size,
        read_only: false,
    };
    let latency = rng.pick(&[
        (Nanos(100), Nanos(1_000)),
        (Nanos(1_000), Nanos(100_000)),
        (Nanos(10_000), Nanos(1_000_000)),
    ]);
    DiskOptions {
        limits,
        unmap,
        latency,
        slow_per_mille: rng.pick(&[0, 10, 100]),
        inline: rng.chance(600),
    }
}

/// A subset of what may go wrong with a disk.
fn faults(rng: &mut Rng) -> Faults {
    Faults {
        error_per_mille: rng.pick(&[0, 0, 3, 30]),
        flush_error_per_mille: rng.pick(&[0, 0, 0, 200]),
        stall_per_mille: rng.pick(&[0, 0, 3, 30]),
        stall_max: rng.pick(&[Nanos::from_millis(3), Nanos::from_millis(300), Nanos::from_secs(5)]),
        ..Faults::default()
    }
}

/// Lasting faults come and go.
pub fn change_weather(rng: &mut Rng, faults: &mut Faults, sectors: usize) {
    const KINDS: [&[IoKind]; 4] = [
        &[IoKind::Write],
        &[IoKind::Flush],
        &[IoKind::Read],
        &[IoKind::Write, IoKind::WriteZeroes, IoKind::Unmap],
    ];
    if rng.chance(500) {
        (faults.full, faults.bad) = (false, None);
    } else if rng.chance(500) {
        faults.full = true;
    } else {
        let start = rng.below(sectors as u64) as usize;
        faults.bad = Some((start..start + 8, rng.pick(&KINDS)));
    }
}

fn guest(rng: &mut Rng, limits: &Limits) -> GuestOptions {
    let sectors = limits.size() / SECTOR as u64;
    let hot = rng.below(sectors);
    let weight = |rng: &mut Rng| rng.pick(&[0, 1, 1, 4]);
    GuestOptions {
        transport: if rng.chance(500) {
            Transport::Port
        } else {
            let format = rng.pick(&[Format::Split, Format::Packed]);
            Transport::Ring { format, tracked: rng.chance(500) }
        },
        depth: rng.pick(&[1, 4, 16, 32]),
        weights: [
            rng.pick(&[1, 4, 10]),
            rng.pick(&[1, 4, 10, 30]),
            weight(rng),
            weight(rng),
            weight(rng),
        ],
        rate_per_mille: rng.pick(&[20, 100, 400, 800]),
        longest: rng.pick(&[1, 8, 32, 64]),
        hot_per_mille: rng.pick(&[0, 500, 900]),
        hot: hot..(hot + rng.between(8, 32)).min(sectors),
        scribble_per_mille: rng.pick(&[0, 0, 200, 800]),
        zero_per_mille: rng.pick(&[0, 100, 500]),
    }
}
