//! A guest and its monitor in the hands of a test: every message is said one by one, the ring is written by hand, and guest
//! memory is a file that another monitor can go on with.
//!
//! For what a well-behaved front end never does, or does only in the middle of a live migration. One ring; requests go through
//! it one at a time.

use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use resilver_sys::{Area, Mapping};
use resilver_vhost::message::{
    ConfigPiece, FdPresence, Header, Message, RegionDescription, Reply, RingAddresses,
};
use resilver_vhost::protocol::{SECTOR, blk_type, descriptor_flags, features, flags, vring_flags};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use crate::served::PATIENCE;

/// Bytes of guest memory.
pub const MEMORY: u64 = 1 << 20;
/// Where guest memory begins for the guest.
pub const BASE: u64 = 0x10_0000;
/// Where data may be, counted from there; everything before is the ring's and the requests'.
pub const DATA: u64 = 0x1_0000;
/// Where guest memory begins for the monitor.
const USER: u64 = 0x7000_0000_0000;
const SIZE: u16 = 64;
const TABLE: u64 = 0;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const HEADER: u64 = 0x4000;
const STATUS: u64 = 0x5000;

/// A file for guest memory, or for a dirty log.
///
/// # Panics
/// If there is none to be had; as everything here, because it is a test's.
#[must_use]
pub fn memory_file(size: u64) -> OwnedFd {
    let file =
        rustix::fs::memfd_create(c"guest", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd");
    rustix::fs::ftruncate(&file, size).expect("memory");
    file
}

/// Sends raw bytes with descriptors beside them.
///
/// # Errors
/// The socket's, most likely because the other side has closed it.
///
/// # Panics
/// If there are more descriptors than fit.
pub fn send(stream: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> std::io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)), "too many descriptors");
    }
    rustix::net::sendmsg(stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// A monitor with its guest.
pub struct RawGuest {
    stream: UnixStream,
    memory: Area,
    file: OwnedFd,
    /// Requests that were made available on the ring, by whatever monitor.
    offered: u16,
}

impl RawGuest {
    /// Connects a monitor whose guest has its memory in `file`, of [`MEMORY`] bytes.
    ///
    /// # Panics
    /// If nobody listens.
    #[must_use]
    pub fn connect(socket: &Path, file: OwnedFd) -> Self {
        Self::over(UnixStream::connect(socket).expect("somebody listens"), file)
    }

    /// The same over a connection that there is already.
    ///
    /// # Panics
    /// If the memory cannot be mapped.
    #[must_use]
    pub fn over(stream: UnixStream, file: OwnedFd) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).expect("a time limit");
        let mapping = Mapping::shared(file.as_fd(), 0, MEMORY).expect("guest memory");
        let memory = area(&mapping);
        let offered = u16::from_le(memory.load_u16(at(AVAILABLE + 2), Ordering::Relaxed));
        Self { stream, memory, file, offered }
    }

    /// Says something.
    ///
    /// # Panics
    /// If nobody is there to hear it.
    pub fn say(&self, message: &Message, fds: &[BorrowedFd<'_>]) {
        send(&self.stream, &message.encode(0), fds).expect("the back end listens");
    }

    /// Says something and waits for the answer; none if the back end closes the connection over it.
    #[must_use]
    pub fn ask(&self, message: &Message, fds: &[BorrowedFd<'_>]) -> Option<Reply> {
        send(&self.stream, &message.encode(flags::NEED_REPLY), fds).ok()?;
        self.reply()
    }

    /// The next answer; none if the back end has closed the connection.
    #[must_use]
    pub fn reply(&self) -> Option<Reply> {
        let mut header = [0; 12];
        (&self.stream).read_exact(&mut header).ok()?;
        let header = Header::decode(&header).ok()?;
        let mut body = vec![0; header.size as usize];
        (&self.stream).read_exact(&mut body).ok()?;
        Reply::decode(header.request, &body).ok()
    }

    /// Asks for a number.
    ///
    /// # Panics
    /// If the answer is none.
    #[must_use]
    pub fn number(&self, message: &Message) -> u64 {
        match self.ask(message, &[]) {
            Some(Reply::U64(number)) => number,
            other => panic!("{message:?} is answered with {other:?}"),
        }
    }

    /// Says something and insists that it is done.
    ///
    /// # Panics
    /// If it is refused.
    pub fn tell(&self, message: &Message, fds: &[BorrowedFd<'_>]) {
        assert_eq!(self.ask(message, fds), Some(Reply::U64(0)), "{message:?}");
    }

    /// Agrees on all protocol features and on VERSION_1 with `extra`, and shares the guest's memory.
    ///
    /// # Panics
    /// If something is refused.
    pub fn negotiate(&self, extra: u64) {
        self.say(&Message::SetOwner, &[]);
        let offered = self.number(&Message::GetProtocolFeatures);
        self.say(&Message::SetProtocolFeatures(offered), &[]);
        self.set_features(extra);
        self.share();
    }

    /// Shares the guest's memory.
    ///
    /// # Panics
    /// If it is refused.
    pub fn share(&self) {
        self.tell(&Message::SetMemTable(vec![self.region()]), &[self.file.as_fd()]);
    }

    /// SET_FEATURES with VERSION_1 and `extra`.
    ///
    /// # Panics
    /// If they are refused.
    pub fn set_features(&self, extra: u64) {
        let wanted = features::VERSION_1 | features::PROTOCOL_FEATURES | extra;
        self.tell(&Message::SetFeatures(wanted), &[]);
    }

    /// The guest's memory, as it is described to the back end.
    #[must_use]
    pub fn region(&self) -> RegionDescription {
        RegionDescription { guest_address: BASE, size: MEMORY, user_address: USER, file_offset: 0 }
    }

    /// SET_VRING_ADDR, with the used ring logged or not.
    #[must_use]
    pub fn addresses(&self, logged: bool) -> Message {
        let addresses = RingAddresses {
            flags: if logged { vring_flags::LOG } else { 0 },
            descriptors: USER + TABLE,
            used: USER + USED,
            available: USER + AVAILABLE,
            log: BASE + USED,
        };
        Message::SetVringAddr { index: 0, addresses }
    }

    /// Describes the ring, which goes on at `base`, and starts and enables it.
    ///
    /// # Panics
    /// If something is refused.
    pub fn start(&self, base: u16, logged: bool) {
        self.describe(base, logged);
        self.tell(&Self::kick(), &[]);
        self.tell(&Message::SetVringEnable { index: 0, enable: 1 }, &[]);
    }

    /// The message that starts the ring: polled, no descriptor.
    #[must_use]
    pub fn kick() -> Message {
        Message::SetVringKick { index: 0, fd: FdPresence::Absent }
    }

    /// Describes the ring, which is to go on at `base`.
    ///
    /// # Panics
    /// If something is refused.
    pub fn describe(&self, base: u16, logged: bool) {
        self.tell(&Message::SetVringNum { index: 0, num: u32::from(SIZE) }, &[]);
        self.tell(&Message::SetVringBase { index: 0, base: u32::from(base) }, &[]);
        self.tell(&self.addresses(logged), &[]);
    }

    fn config(&self, offset: u32, length: usize) -> Vec<u8> {
        let piece = ConfigPiece { offset, flags: 0, bytes: vec![0; length] };
        match self.ask(&Message::GetConfig(piece), &[]) {
            Some(Reply::Config(piece)) => piece.bytes,
            other => panic!("GET_CONFIG is answered with {other:?}"),
        }
    }

    /// What the disk's configuration space says of its size, in bytes.
    ///
    /// # Panics
    /// If it is not answered.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        let sectors = self.config(0, 8).try_into().expect("eight bytes");
        u64::from_le_bytes(sectors) * SECTOR
    }

    /// Its `writeback` field.
    ///
    /// # Panics
    /// If it is not answered.
    #[must_use]
    pub fn writeback(&self) -> u8 {
        self.config(32, 1)[0]
    }

    /// Stops the ring and says where it stands.
    ///
    /// # Panics
    /// If it is not answered.
    #[must_use]
    pub fn stop(&self) -> u16 {
        match self.ask(&Message::GetVringBase { index: 0 }, &[]) {
            Some(Reply::Vring { index: 0, base }) => {
                u16::try_from(base).expect("a split ring's base")
            }
            other => panic!("GET_VRING_BASE is answered with {other:?}"),
        }
    }

    /// Whether the back end closes the connection, or has.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        matches!((&self.stream).read(&mut [0; 1]), Ok(0) | Err(_))
    }

    /// Guest memory, as a monitor copies it to another one.
    ///
    /// # Panics
    /// If it cannot be read.
    #[must_use]
    pub fn bytes(&self, offset: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        assert_eq!(rustix::io::pread(&self.file, &mut bytes, offset).expect("memory"), length);
        bytes
    }

    /// What was made available is what is in memory: for a monitor whose guest's memory has just arrived.
    pub fn arrive(&mut self) {
        self.offered = u16::from_le(self.memory.load_u16(at(AVAILABLE + 2), Ordering::Acquire));
    }

    /// Writes guest memory.
    ///
    /// # Panics
    /// If it cannot be written.
    pub fn put(&self, offset: u64, bytes: &[u8]) {
        assert_eq!(rustix::io::pwrite(&self.file, bytes, offset).expect("memory"), bytes.len());
    }

    fn descriptor(&self, index: u64, address: u64, length: u32, flags: u16) {
        let mut bytes = (BASE + address).to_le_bytes().to_vec();
        bytes.extend(length.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(u16::try_from(index + 1).expect("a small index").to_le_bytes());
        self.put(TABLE + 16 * index, &bytes);
    }

    /// Makes a request available: its data is `length` bytes at `data` of guest memory.
    pub fn offer(&mut self, kind: u32, sector: u64, data: u64, length: u32) {
        let mut header = u64::from(kind).to_le_bytes().to_vec();
        header.extend(sector.to_le_bytes());
        self.put(HEADER, &header);
        self.put(STATUS, &[0xff]);
        let writable = if kind == blk_type::OUT { 0 } else { descriptor_flags::WRITE };
        self.descriptor(0, HEADER, 16, descriptor_flags::NEXT);
        self.descriptor(1, data, length, descriptor_flags::NEXT | writable);
        self.descriptor(2, STATUS, 1, descriptor_flags::WRITE);
        let slot = AVAILABLE + 4 + 2 * u64::from(self.offered % SIZE);
        self.memory.store_u16(at(slot), 0, Ordering::Relaxed);
        self.offered = self.offered.wrapping_add(1);
        self.memory.store_u16(at(AVAILABLE + 2), self.offered.to_le(), Ordering::Release);
    }

    /// Whether all that was made available has ended.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        u16::from_le(self.memory.load_u16(at(USED + 2), Ordering::Acquire)) == self.offered
    }

    /// Makes one request and waits for its status.
    ///
    /// # Panics
    /// If it does not end.
    pub fn run(&mut self, kind: u32, sector: u64, data: u64, length: u32) -> u8 {
        self.offer(kind, sector, data, length);
        let start = Instant::now();
        while !self.is_idle() {
            assert!(start.elapsed() < PATIENCE, "request {kind} does not end");
            std::thread::yield_now();
        }
        self.memory.load_u8(at(STATUS), Ordering::Relaxed)
    }
}

fn area(mapping: &Arc<Mapping>) -> Area {
    Area::new(mapping, 0, mapping.len(), 4096).expect("whole pages")
}

fn at(offset: u64) -> usize {
    usize::try_from(offset).expect("64 bits")
}
