//! A guest that writes what it likes, when it likes, to rings, tables and buffers, over a disk that hangs, fails and fills up,
//! under a front end that moves, stops, takes away what it gave, goes without a word and comes again.
//!
//! Properties ([`Bench`] asserts them): no panic, no turn without end; nothing is written outside the guest's regions, and
//! nothing at all after the guest has been abandoned; an I/O's memory stays until it has ended; what is asked of the disk
//! fits it. Every request that was taken from a ring, or taken over from an earlier session, ends exactly once, but for one
//! that breaks its ring. What the device has written is marked in the dirty log. Everything is given back in the end.

use std::sync::Arc;

use resilver_bdev::{IoError, IoKind};
use resilver_sys::EventFd;
use resilver_vhost::blk::CacheMode;
use resilver_vhost::blk_session::{Command, Enabled, Notifier};
use resilver_vhost::chain::Indirect;
use resilver_vhost::protocol::descriptor_flags::{INDIRECT, NEXT, WRITE};
use resilver_vhost::protocol::{blk_type, descriptor_flags};
use resilver_vhost::ring::{EventMode, Format};

use super::Input;
use super::bench::{AVAILABLE, BASE, Bench, END, FIRST, QUEUES, Setup, USED, begin, in_file};
use super::disk::lock;
use crate::guest_memory::descriptor;

/// Beside the rings, from where a queue's parts begin: an indirect table, headers, status bytes, data.
const TABLE: u64 = 0xc00;
const HEADERS: u64 = 0x1000;
const STATUS: u64 = 0x1400;
const DATA: u64 = 0x2000;
/// Steps of one program. With the heads of a turn they stay below the 65536 after which indexes repeat.
const STEPS: usize = 256;

/// Where a driver stands in a ring.
#[derive(Clone, Copy)]
pub(super) struct Cursor {
    pub(super) format: Format,
    pub(super) size: u16,
    /// Split: the available index. Packed: the next descriptor, and the wrap counter in the highest bit.
    pub(super) at: u16,
}

/// The wrap counter in a packed ring's position.
const WRAP: u16 = 1 << 15;

impl Cursor {
    pub(super) fn new(format: Format, size: u16) -> Self {
        Self { format, size, at: if format == Format::Packed { WRAP } else { 0 } }
    }

    /// So many entries on.
    fn ahead(self, entries: u16) -> Self {
        let at = match self.format {
            Format::Split => self.at.wrapping_add(entries),
            Format::Packed => {
                let (index, wrap) = (u32::from(self.at & !WRAP), self.at & WRAP);
                let (index, size) = (index + u32::from(entries), u32::from(self.size));
                let laps = if index / size % 2 == 1 { WRAP } else { 0 };
                (index % size) as u16 | (wrap ^ laps)
            }
        };
        Self { at, ..self }
    }

    /// What a front end would say to have a device go on here.
    pub(super) fn base(self) -> u32 {
        match self.format {
            Format::Split => u32::from(self.at),
            Format::Packed => u32::from(self.at) | u32::from(self.at) << 16,
        }
    }

    /// Which entry this is.
    fn index(self) -> u16 {
        (self.at & if self.format == Format::Packed { !WRAP } else { u16::MAX }) % self.size
    }

    /// The flags that make a packed descriptor here available.
    fn available(self) -> u16 {
        if self.at & WRAP != 0 { descriptor_flags::AVAIL } else { descriptor_flags::USED }
    }
}

/// The guest: where it stands in each queue.
struct Guest {
    bench: Bench,
    cursors: [Cursor; QUEUES as usize],
}

impl Guest {
    fn step(&mut self, input: &mut Input<'_>) {
        let queue = u16::from(input.u8()) % QUEUES;
        let begin = begin(queue);
        match input.u8() % 22 {
            0..=2 => self.bench.turn(),
            3 | 4 => self.descriptor(begin, input),
            5 => self.descriptor(begin + TABLE, input),
            6 | 7 => self.request(queue, input),
            8 => {
                let head = u16::from(input.u8());
                self.offer(queue, head);
            }
            9 => {
                let cursor = &mut self.cursors[usize::from(queue)];
                *cursor = cursor.ahead(input.u16());
                if cursor.format == Format::Split {
                    self.bench.write(begin + AVAILABLE + 2, &cursor.at.to_le_bytes());
                }
            }
            10 => {
                let (at, bytes) = scribble(input);
                self.bench.write(BASE + at, bytes);
            }
            11 => {
                let (at, bytes) = scribble(input);
                let at = in_file(BASE + at, bytes.len());
                lock(&self.bench.conduct).ambush = at.map(|at| (at, bytes.to_vec()));
            }
            12 => {
                let (at, bytes) = scribble(input);
                self.bench.write_inflight(at % 2048, bytes);
            }
            13 => self.misbehave(input),
            14 => self.bench.nap(),
            15 => {
                // Where the driver stands, where the front end last knew it to be, or anywhere.
                let here = self.cursors.map(Cursor::base);
                let bases = input.pick(&[here, [0, 0x8000_8000], [u32::MAX, 3]]);
                self.bench.reconnect(bases);
            }
            command => {
                if self.bench.is_idle() {
                    self.command(command, queue, input);
                }
            }
        }
    }

    /// What control does on the front end's behalf.
    fn command(&mut self, command: u8, queue: u16, input: &mut Input<'_>) {
        let bench = &mut self.bench;
        match command {
            16 => {
                let mode = input.pick(&[CacheMode::WriteBack, CacheMode::WriteThrough]);
                bench.ask(|reply| Command::SetCache(mode, reply));
            }
            17 => bench.set_memory(input.flag()),
            18 if bench.is_started(queue) => bench.stop(queue),
            18 => {
                let here = self.cursors[usize::from(queue)].base();
                bench.start(queue, input.pick(&[here, 0, 0x8000_8000, 0x0001_8000, u32::MAX]));
            }
            19 => {
                let enabled = input.pick(&[Enabled::No, Enabled::Yes]);
                bench.ask(|reply| Command::Enable { queue, enabled, reply });
            }
            20 => {
                let which = input.pick(&[Notifier::Kick, Notifier::Call]);
                let event = if input.flag() { EventFd::new().ok().map(Arc::new) } else { None };
                bench.ask(|reply| Command::SetNotifier { queue, which, event, reply });
            }
            _ => bench.move_ring(queue),
        }
    }

    fn descriptor(&self, table: u64, input: &mut Input<'_>) {
        let begin = begin(u16::from(table >= begin(1)));
        let at = u64::from(input.u8() % 64);
        let places = [
            begin + HEADERS,
            begin + STATUS,
            begin + DATA,
            begin + TABLE,
            begin,
            begin + AVAILABLE,
            begin + USED,
            BASE + FIRST - 512,
            END - 16,
            END,
            BASE - 16,
            u64::MAX - 15,
        ];
        let address = match input.u8() {
            255 => input.u64(),
            place => {
                let offset = u64::from(input.u8() % 16);
                places[usize::from(place) % places.len()].wrapping_add(offset)
            }
        };
        let lengths = [0, 1, 15, 16, 17, 32, 512, 513, 1024, 4096, 65536, u32::MAX];
        let length = match input.u8() {
            255 => input.u32(),
            length => lengths[usize::from(length) % lengths.len()],
        };
        let (flags, next) = (u16::from(input.u8()), u16::from(input.u8()));
        let bytes = match self.cursors[0].format {
            Format::Split => descriptor(address, length, flags, next),
            // Flags stand last; the highest bit is one of the two that say whose it is.
            Format::Packed => descriptor(address, length, next, flags | (next & 0x80) << 8),
        };
        self.bench.write(table + 16 * at, &bytes);
    }

    fn request(&mut self, queue: u16, input: &mut Input<'_>) {
        let (bench, cursor) = (&self.bench, &mut self.cursors[usize::from(queue)]);
        request(input, queue, cursor, |at, bytes| bench.write(at, bytes));
    }

    /// Makes a head available that may be anything; in a packed ring, whatever is in the next descriptor.
    fn offer(&mut self, queue: u16, head: u16) {
        let (bench, cursor) = (&self.bench, &mut self.cursors[usize::from(queue)]);
        match cursor.format {
            Format::Split => offer(queue, head, cursor, |at, bytes| bench.write(at, bytes)),
            Format::Packed => {
                let flags = cursor.available() | head & 7;
                let at = begin(queue) + 16 * u64::from(cursor.index()) + 14;
                bench.write(at, &flags.to_le_bytes());
                *cursor = cursor.ahead(1);
            }
        }
    }

    fn misbehave(&self, input: &mut Input<'_>) {
        let mut conduct = lock(&self.bench.conduct);
        conduct.answers = input.pick(&[usize::MAX, 0, 1, 2]);
        conduct.backwards = input.flag();
        let full = [None, None, Some(IoKind::Read), Some(IoKind::Write), Some(IoKind::Flush)];
        conduct.full = input.pick(&full);
        let results = [Ok(()), Ok(()), Ok(()), Err(IoError::IO), Err(IoError::NOT_SUPPORTED)];
        conduct.result = input.pick(&results);
    }
}

/// A request as a good driver makes it, up to what it asks for: header, data, status; direct or in a table.
pub(super) fn request(
    input: &mut Input<'_>,
    queue: u16,
    cursor: &mut Cursor,
    write: impl Fn(u64, &[u8]),
) {
    let begin = begin(queue);
    let known = [
        blk_type::IN,
        blk_type::OUT,
        blk_type::FLUSH,
        blk_type::GET_ID,
        blk_type::DISCARD,
        blk_type::WRITE_ZEROES,
        77,
    ];
    let (kind, sector) = (input.pick(&known), u64::from(input.u8()));
    let slot = u64::from(input.u8() % 16);
    let length = input.pick(&[512u32, 1024, 4096, 16384, 20, 16, 32, 513, 0]);
    let data = input.pick(&[begin + DATA, BASE + FIRST - 512, BASE + FIRST, END - 512]);
    let head = u16::from(input.u8()) % cursor.size;
    let indirect = input.flag();
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    write(begin + HEADERS + 16 * slot, &header);
    let writes = if matches!(kind, blk_type::IN | blk_type::GET_ID) { WRITE } else { 0 };
    let buffers = [
        (begin + HEADERS + 16 * slot, 16, NEXT),
        (data, length, NEXT | writes),
        (begin + STATUS + slot, 1, WRITE),
    ];
    match cursor.format {
        Format::Split => {
            let at = |step: u16| if indirect { step } else { (head + step) % cursor.size };
            let table = if indirect { begin + TABLE } else { begin };
            for (step, (address, length, flags)) in (0..).zip(buffers) {
                let entry = table + 16 * u64::from(at(step));
                write(entry, &descriptor(address, length, flags, at(step + 1)));
            }
            if indirect {
                let entry = begin + 16 * u64::from(head);
                write(entry, &descriptor(begin + TABLE, 48, INDIRECT, 0));
            }
            offer(queue, head, cursor, write);
        }
        Format::Packed => {
            let entry = |cursor: Cursor| begin + 16 * u64::from(cursor.index());
            if indirect {
                for (step, (address, length, flags)) in (0..).zip(buffers) {
                    let flags = flags & !NEXT;
                    write(begin + TABLE + 16 * step, &descriptor(address, length, 0, flags));
                }
                let flags = INDIRECT | cursor.available();
                write(entry(*cursor), &descriptor(begin + TABLE, 48, head, flags));
                *cursor = cursor.ahead(1);
                return;
            }
            for (step, (address, length, flags)) in (0..).zip(buffers) {
                let here = cursor.ahead(step);
                let flags = flags | here.available();
                write(entry(here), &descriptor(address, length, head, flags));
            }
            *cursor = cursor.ahead(3);
        }
    }
}

/// Makes a head of a split ring available.
fn offer(queue: u16, head: u16, cursor: &mut Cursor, write: impl Fn(u64, &[u8])) {
    let slot = u64::from(cursor.index());
    *cursor = cursor.ahead(1);
    let available = begin(queue) + AVAILABLE;
    write(available + 4 + 2 * slot, &head.to_le_bytes());
    write(available + 2, &cursor.at.to_le_bytes());
}

/// A place, and a few bytes to write there.
fn scribble<'a>(input: &mut Input<'a>) -> (u64, &'a [u8]) {
    let (at, length) = (u64::from(input.u16()), usize::from(input.u8() % 32));
    (at, input.bytes(length))
}

/// Runs one program.
pub fn ring(data: &[u8]) {
    let mut input = Input::new(data);
    let flags = input.u8();
    let setup = Setup {
        logged: flags & 1 != 0,
        tracked: flags & 2 != 0,
        events: if flags & 4 != 0 { EventMode::Index } else { EventMode::Flags },
        indirect: if flags & 0x30 == 0x30 { Indirect::Refused } else { Indirect::Allowed },
        read_only: flags & 0xc0 == 0xc0,
        format: if flags & 8 != 0 { Format::Packed } else { Format::Split },
        size: 1 << (input.u8() % 7),
    };
    let cursors = [Cursor::new(setup.format, setup.size); QUEUES as usize];
    let mut guest = Guest { bench: Bench::new(setup), cursors };
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        guest.step(&mut input);
    }
    guest.bench.finish();
}
