//! The least that a mirrored write takes where both legs are memory: `bounce_loop MS MIB [FILE FILE]` copies 4 KiB of a guest's into
//! one bounce buffer and writes that, scattered over so many MiB, to two files, one `pwrite` each, or to two arrays; for so many
//! milliseconds, by one thread. Prints how many such writes that makes a second. No ring, no queue, no state: `scripts/bench/mirror`
//! holds a mirror in sync against it.
#![allow(clippy::print_stdout, clippy::unwrap_used)]

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

const BLOCK: usize = 4096;
/// Buffers of a guest at depth 32.
const BUFFERS: usize = 32;
/// Writes between two looks at the clock.
const ROUND: u32 = 256;

/// Where a leg's blocks are.
enum Leg {
    File(File),
    Memory(Vec<u8>),
}

impl Leg {
    /// One of so many bytes, all of them written, for the first touch of a page is no mirror's.
    fn new(path: Option<&str>, bytes: usize) -> Self {
        let Some(path) = path else { return Self::Memory(vec![1; bytes]) };
        let file = File::options().write(true).create(true).truncate(false).open(path).unwrap();
        if file.metadata().unwrap().len() != bytes as u64 {
            file.write_all_at(&vec![1; bytes], 0).unwrap();
        }
        Self::File(file)
    }

    fn write(&mut self, at: usize, block: &[u8]) {
        match self {
            Self::File(file) => file.write_all_at(block, at as u64).unwrap(),
            Self::Memory(bytes) => bytes[at..at + BLOCK].copy_from_slice(block),
        }
    }
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (time, bytes, paths) = match args.as_slice() {
        [ms, mib] => (ms, mib, [None, None]),
        [ms, mib, one, two] => (ms, mib, [Some(one.as_str()), Some(two.as_str())]),
        _ => panic!("bounce_loop MS MIB [FILE FILE]"),
    };
    let (time, bytes) =
        (Duration::from_millis(time.parse().unwrap()), bytes.parse::<usize>().unwrap() << 20);
    let blocks = bytes / BLOCK;
    // Odd, so of a power of two every block's turn comes, and far from the one before: the golden section of them.
    let step = (blocks * 618 / 1000) | 1;
    let mut legs = paths.map(|path| Leg::new(path, bytes));
    let guest = vec![2; BUFFERS * BLOCK];
    let mut bounce = [0; BLOCK];
    let (mut block, mut written, begun) = (0, 0_u64, Instant::now());
    while begun.elapsed() < time {
        for buffer in (0..ROUND as usize).map(|write| write % BUFFERS * BLOCK) {
            bounce.copy_from_slice(&guest[buffer..buffer + BLOCK]);
            for leg in &mut legs {
                leg.write(block * BLOCK, &bounce);
            }
            block = (block + step) % blocks;
        }
        written += u64::from(ROUND);
    }
    let time = begun.elapsed();
    // Nobody reads the arrays: without this they need not be written.
    std::hint::black_box(&legs);
    #[allow(clippy::cast_precision_loss)] // far below 2^52
    let rate = written as f64 / time.as_secs_f64();
    println!("{rate:.0}");
}
