//! A guest that knows what it has written: random reads and writes of whole blocks through [`Driver`], every read checked.
//!
//! What a block holds is a function of its number and its generation. The generations may be kept in a table on disk, so
//! that a guest that was killed is succeeded by one that knows what the disk owes: at least what was acknowledged, at most
//! what was submitted.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::driver::{BLOCK, Driver};
use crate::sim::rng::Rng;

/// Bytes of a table's entry: the generation submitted, the generation acknowledged.
const ENTRY: usize = 8;
/// A request that takes longer is lost: far more than one takes in an emulated machine on a busy one.
const LOST_AFTER: Duration = Duration::from_secs(120);
/// What stands at the beginning of a block, mixed with its number.
const MAGIC: u64 = 0x6775_6573_7477_726f;

/// How a guest is set up.
#[derive(Debug, Clone)]
pub struct GuestConfig {
    /// The controller's socket.
    pub socket: PathBuf,
    /// Which blocks of the disk it uses; the number of a block is its place here.
    pub blocks: Vec<u64>,
    /// Requests in flight.
    pub depth: usize,
    /// What it does.
    pub seed: u64,
    /// Where generations are kept, if they are.
    pub table: Option<PathBuf>,
}

/// What goes on, as far as the guest counts by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Stage {
    /// Nothing of note.
    Running,
    /// Writes are logged from here on.
    Logging,
}

/// A write that was acknowledged while writes were logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    /// Number of the block.
    pub number: usize,
    /// What it became.
    pub generation: u32,
    /// When it was submitted: events are counted.
    pub submitted: u64,
    /// When it was acknowledged.
    pub completed: u64,
}

/// What a guest tells in the end.
#[derive(Debug)]
pub struct GuestReport {
    /// What every block holds.
    pub generations: Vec<u32>,
    /// Writes since [`Stage::Logging`].
    pub log: Vec<Written>,
    /// Reads that were compared.
    pub verified: u64,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    ended: AtomicBool,
    stage: AtomicU8,
    heard: AtomicU8,
    written: AtomicU64,
    /// Changes of the memory table that are wanted, and those that were made.
    memory_wanted: AtomicU64,
    memory_changed: AtomicU64,
}

/// A running guest.
pub struct Guest {
    shared: Arc<Shared>,
    thread: JoinHandle<GuestReport>,
}

/// What block `number` holds in `generation`.
pub fn fill(bytes: &mut [u8], number: usize, generation: u32) {
    let first = MAGIC ^ number as u64;
    let mut rng = Rng::new(first ^ u64::from(generation).rotate_left(32));
    for (at, word) in bytes.chunks_exact_mut(8).enumerate() {
        let value = match at {
            0 => first,
            1 => u64::from(generation),
            _ => rng.draw(),
        };
        word.copy_from_slice(&value.to_le_bytes());
    }
}

/// The generation of block `number`; none if it is not that block whole.
pub fn generation_of(bytes: &[u8], number: usize) -> Option<u32> {
    let word = u64::from_le_bytes(*bytes.get(8..)?.first_chunk()?);
    let generation = u32::try_from(word).ok()?;
    let mut expected = vec![0; bytes.len()];
    fill(&mut expected, number, generation);
    (bytes == expected).then_some(generation)
}

/// Asserts that a file holds these generations.
///
/// # Panics
/// If it does not.
pub fn assert_holds(file: &Path, blocks: &[u64], generations: &[u32]) {
    let disk = File::open(file).unwrap();
    let mut bytes = vec![0; BLOCK];
    for (number, (block, generation)) in blocks.iter().zip(generations).enumerate() {
        disk.read_exact_at(&mut bytes, block * BLOCK as u64).unwrap();
        let found = generation_of(&bytes, number);
        assert_eq!(found, Some(*generation), "block {block} of {}", file.display());
    }
}

impl Guest {
    /// Connects and starts.
    pub fn start(config: GuestConfig) -> Self {
        let shared = Arc::new(Shared::default());
        let its_shared = Arc::clone(&shared);
        let thread = thread::spawn(move || {
            // Whoever waits for the guest hears of a panic too.
            let _ended = Ended(Arc::clone(&its_shared));
            Worker::connect(&config, its_shared).run()
        });
        Self { shared, thread }
    }

    /// Writes acknowledged.
    pub fn written(&self) -> u64 {
        self.shared.written.load(Ordering::Relaxed)
    }

    /// Waits until so many more writes were acknowledged.
    ///
    /// # Panics
    /// If the guest stands still.
    pub fn run_for(&self, writes: u64) {
        let (begun, goal) = (Instant::now(), self.written() + writes);
        while self.written() < goal {
            assert!(!self.has_ended(), "the guest has ended");
            assert!(begun.elapsed() < LOST_AFTER, "the guest stands still");
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// Enters a stage, and returns when the guest counts by it.
    pub fn enter(&self, stage: Stage) {
        self.shared.stage.store(stage as u8, Ordering::Release);
        while self.shared.heard.load(Ordering::Acquire) != stage as u8 && !self.has_ended() {
            thread::yield_now();
        }
    }

    /// Changes the memory table while requests are in flight.
    ///
    /// # Panics
    /// If the guest stands still.
    pub fn change_memory(&self) {
        let goal = self.shared.memory_wanted.fetch_add(1, Ordering::AcqRel) + 1;
        let begun = Instant::now();
        while self.shared.memory_changed.load(Ordering::Acquire) < goal {
            assert!(!self.has_ended(), "the guest has ended");
            assert!(begun.elapsed() < LOST_AFTER, "the guest stands still");
            thread::yield_now();
        }
    }

    fn has_ended(&self) -> bool {
        self.shared.ended.load(Ordering::Acquire)
    }

    /// Lets what is in flight end, and stops.
    ///
    /// # Panics
    /// As the guest did: a request failed, or a read was wrong.
    pub fn finish(self) -> GuestReport {
        self.shared.stop.store(true, Ordering::Release);
        match self.thread.join() {
            Ok(report) => report,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

/// Connects, for as long as a back end may need to start, or to see that the front end before this one is gone.
fn connect(socket: &Path, depth: usize) -> Driver {
    let begun = Instant::now();
    loop {
        match Driver::connect(socket, depth) {
            Ok(driver) => return driver,
            Err(error) if begun.elapsed() > LOST_AFTER => panic!("{}: {error}", socket.display()),
            Err(_) => thread::sleep(Duration::from_millis(10)),
        }
    }
}

struct Ended(Arc<Shared>);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.ended.store(true, Ordering::Release);
    }
}

#[derive(Clone, Copy)]
enum Op {
    Read,
    Write,
}

struct Worker {
    driver: Driver,
    blocks: Vec<u64>,
    rng: Rng,
    shared: Arc<Shared>,
    table: Option<File>,
    /// By slot: what, block number, event of submission, when.
    slots: Vec<Option<(Op, usize, u64, Instant)>>,
    /// Blocks that a request in flight names.
    busy: Vec<bool>,
    events: u64,
    log_from: Option<u64>,
    report: GuestReport,
}

impl Worker {
    fn connect(config: &GuestConfig, shared: Arc<Shared>) -> Self {
        let driver = connect(&config.socket, config.depth);
        let count = config.blocks.len();
        let known = config.table.as_ref().is_some_and(|path| path.exists());
        let table = config.table.as_ref().map(|path| {
            let file =
                File::options().read(true).write(true).create(true).truncate(false).open(path);
            let file = file.unwrap();
            file.set_len((count * ENTRY) as u64).unwrap();
            file
        });
        let mut worker = Self {
            driver,
            blocks: config.blocks.clone(),
            rng: Rng::new(config.seed),
            shared,
            table,
            slots: vec![None; config.depth],
            busy: vec![false; count],
            events: 0,
            log_from: None,
            report: GuestReport { generations: vec![0; count], log: Vec::new(), verified: 0 },
        };
        if known {
            worker.take_over();
        }
        worker
    }

    fn run(mut self) -> GuestReport {
        loop {
            let stage = self.shared.stage.load(Ordering::Acquire);
            if self.log_from.is_none() && stage == Stage::Logging as u8 {
                self.log_from = Some(self.events);
            }
            self.shared.heard.store(stage, Ordering::Release);
            let stopping = self.shared.stop.load(Ordering::Acquire);
            if stopping && self.slots.iter().all(Option::is_none) {
                return self.report;
            }
            if !stopping {
                self.fill_slots();
            }
            let wanted = self.shared.memory_wanted.load(Ordering::Acquire);
            if self.shared.memory_changed.load(Ordering::Acquire) < wanted {
                self.driver.change_memory().unwrap();
                self.shared.memory_changed.fetch_add(1, Ordering::AcqRel);
            }
            if !self.reap() {
                let lost = |(_, _, _, at): &(Op, usize, u64, Instant)| at.elapsed() > LOST_AFTER;
                assert!(!self.slots.iter().flatten().any(lost), "a request did not end");
                thread::yield_now();
            }
        }
    }

    fn fill_slots(&mut self) {
        for slot in 0..self.slots.len() {
            if self.slots[slot].is_some() {
                continue;
            }
            let number = self.rng.below(self.blocks.len() as u64) as usize;
            if self.busy[number] {
                continue;
            }
            // Three of four requests write: it is writes that a mirror may lose.
            let op = if self.rng.below(4) == 0 { Op::Read } else { Op::Write };
            match op {
                Op::Read => self.driver.read(slot, self.blocks[number]).unwrap(),
                Op::Write => {
                    let generation = self.report.generations[number] + 1;
                    fill(self.driver.buffer(slot), number, generation);
                    self.note(number, 0, generation);
                    self.driver.write(slot, self.blocks[number]).unwrap();
                }
            }
            self.events += 1;
            self.busy[number] = true;
            self.slots[slot] = Some((op, number, self.events, Instant::now()));
        }
        self.driver.notify().unwrap();
    }

    fn reap(&mut self) -> bool {
        let ended = self.driver.completions();
        for (slot, result) in &ended {
            let (op, number, submitted, _) = self.slots[*slot].take().expect("a request in flight");
            self.events += 1;
            self.busy[number] = false;
            assert_eq!(*result, 0, "a request on block {} failed", self.blocks[number]);
            match op {
                Op::Read => {
                    let found = generation_of(self.driver.buffer(*slot), number);
                    assert_eq!(found, Some(self.report.generations[number]), "block {number}");
                    self.report.verified += 1;
                }
                Op::Write => self.acknowledge(number, submitted),
            }
        }
        !ended.is_empty()
    }

    fn acknowledge(&mut self, number: usize, submitted: u64) {
        self.report.generations[number] += 1;
        let generation = self.report.generations[number];
        self.note(number, 4, generation);
        self.shared.written.fetch_add(1, Ordering::Relaxed);
        if self.log_from.is_some() {
            let completed = self.events;
            self.report.log.push(Written { number, generation, submitted, completed });
        }
    }

    /// Keeps a generation where a kill does not reach it: the page cache.
    fn note(&self, number: usize, at: usize, generation: u32) {
        if let Some(table) = &self.table {
            let offset = (number * ENTRY + at) as u64;
            table.write_all_at(&generation.to_le_bytes(), offset).unwrap();
        }
    }

    /// Reads every block and compares it with what a predecessor noted.
    fn take_over(&mut self) {
        let mut entries = vec![0; self.blocks.len() * ENTRY];
        self.table.as_ref().expect("a table").read_exact_at(&mut entries, 0).unwrap();
        let numbers: Vec<usize> = (0..self.blocks.len()).collect();
        for numbers in numbers.chunks(self.slots.len()) {
            for (slot, number) in numbers.iter().enumerate() {
                self.driver.read(slot, self.blocks[*number]).unwrap();
            }
            self.driver.notify().unwrap();
            let (begun, mut ended) = (Instant::now(), 0);
            while ended < numbers.len() {
                let completions = self.driver.completions();
                assert!(completions.iter().all(|(_, result)| *result == 0), "a read failed");
                ended += completions.len();
                assert!(begun.elapsed() < LOST_AFTER, "a read did not end");
                thread::yield_now();
            }
            for (slot, number) in numbers.iter().enumerate() {
                let entry = &entries[number * ENTRY..][..ENTRY];
                self.take_over_block(slot, *number, entry);
            }
        }
    }

    /// Takes the block that was read into the slot as it is, if that is what the predecessor owed.
    fn take_over_block(&mut self, slot: usize, number: usize, entry: &[u8]) {
        let [submitted, acknowledged] = generations(entry);
        let found = generation_of(self.driver.buffer(slot), number);
        let owed = acknowledged..=submitted;
        let Some(found) = found.filter(|found| owed.contains(found)) else {
            panic!("block {number} is not in {owed:?}: {found:?}")
        };
        self.report.generations[number] = found;
        self.report.verified += 1;
        self.note(number, 0, found);
        self.note(number, 4, found);
    }
}

/// What an entry of a table says: the generation submitted, the generation acknowledged.
fn generations(entry: &[u8]) -> [u32; 2] {
    [0, 4].map(|at| u32::from_le_bytes(entry[at..at + 4].try_into().expect("four bytes")))
}

/// What a table says that every block holds, after a guest that ended in peace.
///
/// # Panics
/// If something was in flight.
pub fn table_generations(path: &Path) -> Vec<u32> {
    let bytes = std::fs::read(path).unwrap();
    let entries = bytes.chunks_exact(ENTRY).map(|entry| {
        let [submitted, acknowledged] = generations(entry);
        assert_eq!(submitted, acknowledged, "a write was in flight");
        acknowledged
    });
    entries.collect()
}
