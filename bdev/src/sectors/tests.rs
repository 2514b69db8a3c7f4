//! A disk of large blocks seen in small ones, against a plain array of bytes.

#![allow(clippy::cast_possible_truncation)] // small numbers, and bytes that are patterns

use resilver_reactor::Nanos;
use resilver_sys::RegionTable;

use super::*;
use crate::delay::{Delay, DelayConfig};
use crate::error::{Effect, ErrorBdev, Injection};
use crate::malloc::Malloc;

const LARGE: u32 = 4096;
const SMALL: u64 = 512;
const SIZE: u64 = 64 * 4096;

struct Bench {
    memory: RegionTable,
    region: RegionId,
    channel: Box<dyn IoChannel>,
    now: Nanos,
    done: Vec<(u32, Result<(), IoError>)>,
}

impl Bench {
    fn over(base: Arc<dyn Bdev>) -> Self {
        let view = Sectors::new(base, 512).unwrap();
        assert_eq!(view.geometry(), Geometry { block_size: 512, num_blocks: SIZE / SMALL });
        let memory = RegionTable::with_capacity(16);
        let region = memory.insert(Mapping::anonymous(1 << 20).unwrap()).unwrap();
        let mut channel = view.open_channel(64).unwrap();
        channel.attach(&Context { now: Nanos::ZERO, memory: &memory });
        Self { memory, region, channel, now: Nanos::ZERO, done: Vec::new() }
    }

    fn submit(&mut self, tag: u32, kind: IoKind, offset: u64, length: u64, buffer: u64) {
        let cx = Context { now: self.now, memory: &self.memory };
        let io = BdevIo { tag: Tag(tag), kind, may_unmap: true, offset, length };
        // Two slices, cut where no block ends.
        let first = (length / 3) as u32;
        let slice = |offset, length| BufferSlice { region: self.region, length, offset };
        let both = [slice(buffer, first), slice(buffer + u64::from(first), length as u32 - first)];
        let payload = if kind.has_payload() { &both[..] } else { &[] };
        assert!(self.channel.free(kind) > 0);
        self.channel.submit(&cx, io, payload);
    }

    fn turn(&mut self) {
        self.now = self.now + Nanos::from_micros(20);
        let cx = Context { now: self.now, memory: &self.memory };
        let mut done = CompletionBatch::with_capacity(16);
        self.channel.commit(&cx);
        self.channel.poll(&cx, &mut done);
        self.done.extend(done.as_slice().iter().map(|it| (it.tag.0, it.result)));
    }

    fn drain(&mut self) {
        for _ in 0..10_000 {
            if self.channel.in_flight() == 0 {
                return;
            }
            self.turn();
        }
        panic!("{} I/Os do not end", self.channel.in_flight());
    }

    fn fill(&self, buffer: u64, bytes: &[u8]) {
        let length = u32::try_from(bytes.len()).unwrap();
        let slice = BufferSlice { region: self.region, length, offset: buffer };
        self.memory.write(slice, bytes).unwrap();
    }

    fn bytes(&self, buffer: u64, length: u64) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(length).unwrap()];
        let slice = BufferSlice { region: self.region, length: length as u32, offset: buffer };
        self.memory.read(slice, &mut bytes).unwrap();
        bytes
    }
}

fn malloc() -> Arc<Malloc> {
    Arc::new(Malloc::new("disk", LARGE, SIZE / u64::from(LARGE)).unwrap())
}

/// A small generator of numbers (xorshift, Marsaglia 2003).
fn next(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// Batches of writes, zeroes and reads that do not overlap in bytes, but in blocks, in any order of the base.
fn compare(base: Arc<dyn Bdev>, seed: u64) {
    let mut bench = Bench::over(base);
    let mut model = vec![0u8; usize::try_from(SIZE).unwrap()];
    let mut state = seed;
    for round in 0..200u64 {
        let mut at = next(&mut state) % 64 * SMALL;
        let mut reads = Vec::new();
        for tag in 0..48u32 {
            let length = (1 + next(&mut state) % 20) * SMALL;
            if at + length > SIZE {
                break;
            }
            let (range, buffer) = (at as usize..(at + length) as usize, u64::from(tag) * 16384);
            match next(&mut state) % 4 {
                0 | 1 => {
                    let bytes: Vec<u8> =
                        (0..length).map(|byte| (byte + round + u64::from(tag)) as u8 | 1).collect();
                    bench.fill(buffer, &bytes);
                    model[range].copy_from_slice(&bytes);
                    bench.submit(tag, IoKind::Write, at, length, buffer);
                }
                2 => {
                    model[range].fill(0);
                    bench.submit(tag, IoKind::WriteZeroes, at, length, 0);
                }
                _ => {
                    reads.push((range, buffer, length));
                    bench.submit(tag, IoKind::Read, at, length, buffer);
                }
            }
            at += length;
        }
        bench.drain();
        assert!(bench.done.iter().all(|(_, result)| result.is_ok()), "{:?}", bench.done);
        bench.done.clear();
        for (range, buffer, length) in reads {
            assert_eq!(
                bench.bytes(buffer, length),
                model[range.clone()],
                "round {round}, {range:?}"
            );
        }
    }
    bench.submit(0, IoKind::Read, 512, SIZE - 1024, 0);
    bench.drain();
    assert!(bench.bytes(0, SIZE - 1024) == model[512..model.len() - 512], "the whole disk");
}

#[test]
fn parts_of_blocks_are_written_and_read_as_on_a_disk_of_small_ones() {
    compare(malloc(), 7);
}

#[test]
fn neighbours_in_one_block_are_not_lost_whatever_the_order() {
    for seed in 1..6 {
        let latency =
            DelayConfig { avg_read_us: 90, p99_read_us: 900, avg_write_us: 50, p99_write_us: 700 };
        compare(Arc::new(Delay::new("slow", malloc(), latency).unwrap()), seed);
    }
}

#[test]
fn overlapping_writes_of_one_block_end_in_the_order_in_which_they_came() {
    let mut bench = Bench::over(malloc());
    for tag in 0..60u32 {
        bench.fill(u64::from(tag) * 1024, &[tag as u8 + 1; 1024]);
        bench.submit(tag, IoKind::Write, 512, 1024, u64::from(tag) * 1024);
    }
    bench.drain();
    bench.submit(0, IoKind::Read, 0, 4096, 0);
    bench.drain();
    let bytes = bench.bytes(0, 4096);
    assert_eq!((&bytes[..512], &bytes[512..1536]), (&[0; 512][..], &[60; 1024][..]));
    assert_eq!(bytes[1536..], [0; 2560]);
}

#[test]
fn a_failed_edge_fails_its_write_and_nothing_was_written() {
    let disk = malloc();
    let faulty = Arc::new(ErrorBdev::new("faulty", Arc::clone(&disk) as _));
    let mut bench = Bench::over(Arc::clone(&faulty) as _);
    bench.fill(0, &[9; 8192]);
    bench.submit(0, IoKind::Write, 0, 8192, 0);
    bench.drain();
    let effect = Effect::Fail(IoError::IO);
    faulty.inject(Injection { kind: Some(IoKind::Read), effect, count: 1, range: None }).unwrap();
    bench.fill(0, &[5; 512]);
    bench.submit(1, IoKind::Write, 512, 512, 0);
    // Behind it in line, and not hurt by it.
    bench.submit(2, IoKind::Write, 1024, 512, 0);
    bench.drain();
    bench.done.sort_by_key(|(tag, _)| *tag);
    assert_eq!(bench.done, [(0, Ok(())), (1, Err(IoError::IO)), (2, Ok(()))]);
    bench.submit(3, IoKind::Read, 0, 2048, 0);
    bench.drain();
    let bytes = bench.bytes(0, 2048);
    assert_eq!((&bytes[512..1024], &bytes[1024..1536]), (&[9; 512][..], &[5; 512][..]));
}

#[test]
fn a_discard_leaves_the_edges_alone_and_a_flush_passes() {
    let mut bench = Bench::over(malloc());
    bench.fill(0, &[9; 16384]);
    bench.submit(0, IoKind::Write, 0, 16384, 0);
    bench.submit(1, IoKind::Flush, 0, 0, 0);
    bench.drain();
    bench.submit(2, IoKind::Unmap, 512, 512, 0);
    bench.submit(3, IoKind::Unmap, 2048, 8192, 0);
    bench.drain();
    assert!(bench.done.iter().all(|(_, result)| result.is_ok()));
    bench.submit(4, IoKind::Read, 0, 16384, 0);
    bench.drain();
    let bytes = bench.bytes(0, 16384);
    assert_eq!((&bytes[..4096], &bytes[4096..8192]), (&[9; 4096][..], &[0; 4096][..]));
    assert_eq!(bytes[8192..], [9; 8192]);
}

#[test]
fn only_a_divisor_of_the_block_is_a_view_of_it() {
    assert!(Sectors::new(malloc(), 8192).is_err());
    assert!(Sectors::new(malloc(), 1024).is_ok());
}
