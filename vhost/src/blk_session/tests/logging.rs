//! The dirty log under load: whatever page of guest memory the device changes is marked when its turn is over.

use super::*;
use crate::dirty_log::{DirtyLog, LOG_PAGE};
use crate::protocol::vring_flags;

/// Bytes of the log: a bit for each page up to the end of guest memory.
const LOG_BYTES: usize = ((BASE + MEMORY) / LOG_PAGE / 8) as usize;

/// What happens before a turn.
#[derive(Debug, Clone)]
enum Step {
    /// A request of this type, at this sector, with its data and its status there.
    Request { kind: u32, sector: u64, data: u64, sectors: u32, status: u64 },
    /// The disk answers, or no longer.
    Answers(bool),
    /// What it answers.
    Fails(bool),
    /// Another mapping of the same memory, under requests in flight.
    Memory,
    /// The reactor sleeps and wakes.
    Sleep,
    /// The front end has read the log and taken its bits.
    Taken,
    /// Logging is switched off and on.
    Toggle,
}

fn step() -> impl Strategy<Value = Step> {
    let kinds = vec![blk_type::IN, blk_type::OUT, blk_type::GET_ID, blk_type::FLUSH, 77];
    let request = (
        proptest::sample::select(kinds),
        0u64..520,
        DATA..MEMORY - 0x4000,
        prop_oneof![0u32..4, 16u32..30],
        DATA..MEMORY,
    );
    let request = request.prop_map(|(kind, sector, data, sectors, status)| Step::Request {
        kind,
        sector,
        data,
        sectors,
        status,
    });
    prop_oneof![
        12 => request,
        2 => any::<bool>().prop_map(Step::Answers),
        1 => any::<bool>().prop_map(Step::Fails),
        1 => Just(Step::Memory),
        1 => Just(Step::Sleep),
        2 => Just(Step::Taken),
        1 => Just(Step::Toggle),
    ]
}

/// The answer to a change of memory.
type Changed = Result<Box<GuestMemory>, (TableFull, Box<GuestMemory>)>;

struct Logged {
    bench: Bench,
    file: OwnedFd,
    log: DirtyLog,
    requests: u16,
    changed: Option<Inbox<Changed>>,
}

impl Logged {
    fn new(events: EventMode) -> Self {
        let file = rustix::fs::memfd_create("log", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, LOG_BYTES as u64).unwrap();
        let log = DirtyLog::map(file.as_fd(), 0, LOG_BYTES as u64).unwrap();
        let mut bench = Bench::with(LIMITS, events);
        let kick = Some(Arc::new(EventFd::new().unwrap()));
        let which = Notifier::Kick;
        bench.ask(|reply| Command::SetNotifier { queue: 0, which, event: kick, reply }).unwrap();
        Self { bench, file, log, requests: 0, changed: None }
    }

    /// The ring's parts in a mapping, with the used ring logged at its guest address.
    fn areas(&self, memory: &GuestMemory) -> RingAreas {
        let addresses = RingAddresses {
            flags: vring_flags::LOG,
            descriptors: BASE + TABLE,
            used: BASE + USED,
            available: BASE + AVAILABLE,
            log: BASE + USED,
        };
        RingAreas::resolve(memory, Format::Split, SIZE, &addresses).unwrap()
    }

    fn set_log(&mut self, log: bool) {
        let log = log.then(|| Box::new(self.log.clone()));
        self.bench.ask(|reply| Command::SetLog(log, reply)).unwrap();
    }

    fn begin(&mut self) {
        let areas = self.areas(&self.bench.memory());
        self.bench.ask(|reply| Command::MoveRing { queue: 0, areas, reply }).unwrap();
        self.set_log(true);
    }

    fn read(file: &OwnedFd, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        assert_eq!(rustix::io::pread(file, &mut bytes, 0).unwrap(), length);
        bytes
    }

    fn take_bits(&self) {
        rustix::io::pwrite(&self.file, &[0; LOG_BYTES], 0).unwrap();
    }

    fn request(&mut self, kind: u32, sector: u64, data: u64, length: u32, status: u64) {
        if self.requests - self.bench.used_index() >= SIZE / 3 {
            return;
        }
        // Descriptors are used again only when those before must have ended.
        let first = self.requests % (SIZE / 3) * 3;
        let at = HEADER + 0x10 * u64::from(first);
        self.bench.put(at, &kind.to_le_bytes());
        self.bench.put(at + 8, &sector.to_le_bytes());
        let direction = if kind == blk_type::OUT { 0 } else { WRITE };
        self.bench.descriptor(first, at, 16, NEXT, first + 1);
        self.bench.descriptor(first + 1, data, length, NEXT | direction, first + 2);
        self.bench.descriptor(first + 2, status, 1, WRITE, 0);
        self.bench.offer(first);
        self.requests += 1;
    }

    fn sleep(&mut self) {
        let cx = Context { now: Nanos(self.bench.now), memory: &self.bench.table };
        let _ = self.bench.disk.arm(&cx, &mut WaitSet::with_capacity(4));
        self.bench.disk.disarm(&cx);
    }

    fn take(&mut self, step: &Step, round: u8) {
        match *step {
            Step::Request { kind, sector, data, sectors, status } => {
                self.request(kind, sector, data, sectors * 512, status);
            }
            Step::Answers(answers) => self.bench.medium.lock().unwrap().answers = answers,
            Step::Fails(fails) => {
                self.bench.medium.lock().unwrap().fails = fails.then_some(IoError::IO);
            }
            Step::Memory => {
                if self.changed.as_ref().is_some_and(|changed| changed.try_recv().is_err()) {
                    return;
                }
                let memory = self.bench.memory();
                let rings = vec![(0, self.areas(&memory))];
                self.changed =
                    Some(self.bench.tell(|reply| Command::SetMemory { memory, rings, reply }));
            }
            Step::Taken => self.take_bits(),
            Step::Toggle => {
                self.set_log(false);
                self.take_bits();
                self.set_log(true);
            }
            Step::Sleep => {}
        }
        self.bench.medium.lock().unwrap().bytes.fill(round);
    }

    /// One turn of the device. Answers the pages that it changed and did not mark.
    fn turn(&mut self, sleeps: bool) -> Vec<usize> {
        let before = Self::read(&self.bench.file, MEMORY as usize);
        self.bench.turn();
        if sleeps {
            self.sleep();
        }
        let after = Self::read(&self.bench.file, MEMORY as usize);
        let bits = Self::read(&self.file, LOG_BYTES);
        let page = LOG_PAGE as usize;
        let first = (BASE / LOG_PAGE) as usize;
        let marked = |at: usize| bits[(first + at) / 8] >> ((first + at) % 8) & 1 == 1;
        let changed = |at: &usize| before[at * page..][..page] != after[at * page..][..page];
        (0..MEMORY as usize / page).filter(changed).filter(|at| !marked(*at)).collect()
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// The log is switched on in the middle of a load, with requests in flight.
    #[test]
    fn every_page_that_the_device_changes_is_marked(
        steps in proptest::collection::vec(step(), 1..60),
        begin in 0usize..20,
        indexes in any::<bool>(),
    ) {
        let mut logged = Logged::new(if indexes { EventMode::Index } else { EventMode::Flags });
        for (round, step) in steps.iter().enumerate() {
            if round == begin {
                logged.begin();
                logged.take_bits();
            }
            if round < begin && matches!(step, Step::Toggle) {
                continue;
            }
            logged.take(step, round as u8 + 1);
            let lost = logged.turn(matches!(step, Step::Sleep));
            if round >= begin {
                prop_assert_eq!(lost, Vec::<usize>::new(), "after {:?}", step);
            }
        }
    }
}

#[test]
fn a_log_that_is_off_or_was_exchanged_is_written_to_no_more() {
    let mut logged = Logged::new(EventMode::Flags);
    logged.begin();
    logged.request(blk_type::IN, 0, DATA, 512, STATUS);
    logged.bench.turn();
    assert_ne!(Logged::read(&logged.file, LOG_BYTES), vec![0; LOG_BYTES]);
    logged.set_log(false);
    logged.take_bits();
    logged.request(blk_type::IN, 0, DATA, 512, STATUS);
    logged.bench.turn();
    logged.sleep();
    assert_eq!(logged.bench.used_index(), 2);
    assert_eq!(Logged::read(&logged.file, LOG_BYTES), vec![0; LOG_BYTES]);
}

#[test]
fn only_what_was_written_is_marked() {
    let mut logged = Logged::new(EventMode::Flags);
    logged.begin();
    logged.take_bits();
    logged.request(blk_type::OUT, 0, DATA, 8192, STATUS);
    logged.bench.turn();
    let bits = Logged::read(&logged.file, LOG_BYTES);
    let marked: Vec<u64> = (0..LOG_BYTES as u64 * 8)
        .filter(|page| bits[(page / 8) as usize] >> (page % 8) & 1 == 1)
        .map(|page| page * LOG_PAGE - BASE)
        .collect();
    assert_eq!(marked, [USED, STATUS], "a write changes its status byte and the used ring");
}
