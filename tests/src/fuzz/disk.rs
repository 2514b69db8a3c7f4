//! The disk under a fuzzed guest: it answers when and as it is told to, and holds whoever uses it to the contract of
//! [`IoChannel`].

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use resilver_bdev::{BdevIo, Completion, CompletionBatch, IoChannel, IoError, IoKind, Limits};
use resilver_reactor::Context;
use resilver_sys::{BufferSlice, usize_from};

use crate::guest_memory::MemoryFile;

/// I/Os of each kind that the disk takes.
const DEPTH: u32 = 8;

/// How the disk behaves, and what it has seen.
pub(super) struct Conduct {
    /// I/Os that end in a turn.
    pub(super) answers: usize,
    /// The last one taken ends first.
    pub(super) backwards: bool,
    /// No room for I/O of this kind.
    pub(super) full: Option<IoKind>,
    /// How I/O ends.
    pub(super) result: Result<(), IoError>,
    /// What the guest writes to its memory at the moment when the disk gets an I/O: at this offset, these bytes.
    pub(super) ambush: Option<(u64, Vec<u8>)>,
}

impl Default for Conduct {
    fn default() -> Self {
        Self { answers: usize::MAX, backwards: false, full: None, result: Ok(()), ambush: None }
    }
}

/// The disk, and the fuzzer's hand on it.
pub(super) struct FuzzedDisk {
    limits: Limits,
    medium: Vec<u8>,
    pending: Vec<(BdevIo, Vec<BufferSlice>)>,
    conduct: Arc<Mutex<Conduct>>,
    /// The guest's memory, and what shadows it.
    guest: [Arc<MemoryFile>; 2],
}

impl FuzzedDisk {
    pub(super) fn new(
        limits: Limits,
        conduct: Arc<Mutex<Conduct>>,
        guest: [Arc<MemoryFile>; 2],
    ) -> Self {
        let medium = vec![0x5a; usize_from(limits.size())];
        Self { limits, medium, pending: Vec::new(), conduct, guest }
    }

    /// Moves the bytes, as a disk would.
    fn carry_out(&mut self, cx: &Context<'_>, io: &BdevIo, payload: &[BufferSlice]) {
        let mut at = usize_from(io.offset);
        match io.kind {
            IoKind::Flush => {}
            IoKind::Unmap | IoKind::WriteZeroes => {
                self.medium[at..at + usize_from(io.length)].fill(0);
            }
            IoKind::Read | IoKind::Write => {
                for slice in payload {
                    let part = &mut self.medium[at..at + slice.length as usize];
                    let moved = if io.kind == IoKind::Read {
                        cx.memory.write(*slice, part)
                    } else {
                        cx.memory.read(*slice, part)
                    };
                    moved.expect("memory that an I/O names stays until it has ended");
                    at += part.len();
                }
            }
        }
    }
}

/// The conduct; no panic that unwinds through here is of interest afterwards.
pub(super) fn lock(conduct: &Mutex<Conduct>) -> MutexGuard<'_, Conduct> {
    conduct.lock().unwrap_or_else(PoisonError::into_inner)
}

impl IoChannel for FuzzedDisk {
    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn free(&self, kind: IoKind) -> u32 {
        let taken = self.pending.iter().filter(|(io, _)| io.kind == kind).count();
        let taken = u32::try_from(taken).unwrap_or(DEPTH);
        if lock(&self.conduct).full == Some(kind) { 0 } else { DEPTH.saturating_sub(taken) }
    }

    fn submit(&mut self, _cx: &Context<'_>, io: BdevIo, payload: &[BufferSlice]) {
        assert!(self.free(io.kind) > 0, "{io:?} without room for it");
        assert_eq!(self.limits.check(&io, payload), Ok(()), "{io:?} {payload:?}");
        self.pending.push((io, payload.to_vec()));
        if let Some((at, bytes)) = lock(&self.conduct).ambush.take() {
            for memory in &self.guest {
                memory.put(at, &bytes);
            }
        }
    }

    fn commit(&mut self, _cx: &Context<'_>) {}

    fn poll(&mut self, cx: &Context<'_>, done: &mut CompletionBatch) {
        let (answers, backwards, result) = {
            let conduct = lock(&self.conduct);
            (conduct.answers, conduct.backwards, conduct.result)
        };
        for _ in 0..answers.min(self.pending.len()) {
            let at = if backwards { self.pending.len() - 1 } else { 0 };
            let (io, payload) = self.pending.remove(at);
            if result.is_ok() {
                self.carry_out(cx, &io, &payload);
            }
            done.push(Completion { tag: io.tag, result });
        }
        for (io, payload) in &self.pending {
            for slice in payload {
                assert!(cx.memory.check(*slice).is_ok(), "{io:?} has lost its memory");
            }
        }
    }

    fn is_passive(&self) -> bool {
        true
    }

    fn in_flight(&self) -> u32 {
        u32::try_from(self.pending.len()).unwrap_or(u32::MAX)
    }
}
