//! Copies that a file system makes by itself, from one file to another.
//!
//! Where both legs of a mirror are files of one file system that lets files share extents (XFS, btrfs and others), a copy is a change of
//! metadata; a file server may copy what its client never sees. The calls wait, so a thread makes them, one at a time: two would wait for
//! each other's locks in the file system.
//!
//! [`between`] makes a channel to that thread. It is a queue pair as every channel, whose only I/O are **writes without payload**:
//! the bytes of the range are to be those of the source at the same place. What fails says nothing of the disks, only that these
//! two cannot be copied so: the parent copies by itself then, and meets what is wrong with them there.
//!
//! Invariants: the thread keeps both files open, and so locked, until its last call has returned, also when the channel has gone; it
//! is never waited for, for a call may hang with its file server.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::Thread;

use crossbeam::queue::ArrayQueue;
use resilver_reactor::{Armed, Context};
use resilver_sys::file::clone_range;
use resilver_sys::{BufferSlice, EventFd, WaitSet};
use rustix::io::Errno;

use crate::channel::{CompletionBatch, IoChannel, Limits};
use crate::device::Bdev;
use crate::io::{BdevIo, Completion, IoError, IoKind};

/// I/Os in flight at most.
const DEPTH: usize = 64;
/// What ranges have to be multiples of, bytes: the block of all of these file systems as they are made by default.
pub(crate) const BLOCK: u32 = 4096;

/// How a file system copies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Method {
    /// Files share extents (ioctl_ficlonerange(2)).
    Share,
    /// A server copies (copy_file_range(2)).
    Server,
}

impl Method {
    /// In the order in which they are tried; none for a file system that is known to copy through memory. That a file system
    /// is named here does not mean that it can: it may have been made without, and its server may be an old one.
    fn of(magic: u64) -> &'static [Self] {
        const XFS: u64 = 0x5846_5342;
        const BTRFS: u64 = 0x9123_683e;
        const BCACHEFS: u64 = 0xca45_1a4e;
        const OCFS2: u64 = 0x7461_636f;
        const ZFS: u64 = 0x2fc1_2fc1;
        const NFS: u64 = 0x6969;
        const SMB2: u64 = 0xfe53_4d42;
        const CIFS: u64 = 0xff53_4d42;
        match magic {
            XFS | BTRFS | BCACHEFS | OCFS2 | ZFS => &[Self::Share],
            NFS | SMB2 | CIFS => &[Self::Share, Self::Server],
            _ => &[],
        }
    }

    fn copy(self, files: &[Arc<OwnedFd>; 2], offset: u64, length: u64) -> Result<(), IoError> {
        let [source, target] = files;
        let error = |error: &std::io::Error| IoError::from_errno(error.raw_os_error().unwrap_or(0));
        match self {
            Self::Share => clone_range(source.as_fd(), target.as_fd(), offset, length)
                .map_err(|reason| error(&reason)),
            Self::Server => {
                let (mut from, mut to) = (offset, offset);
                while to < offset + length {
                    let left = usize::try_from(offset + length - to).unwrap_or(usize::MAX);
                    let copied = rustix::fs::copy_file_range(
                        source,
                        Some(&mut from),
                        target,
                        Some(&mut to),
                        left,
                    );
                    match copied {
                        Ok(0) => return Err(IoError::IO), // the source was shortened
                        Ok(_) | Err(Errno::INTR) => {}
                        Err(reason) => return Err(error(&reason.into())),
                    }
                }
                Ok(())
            }
        }
    }
}

/// A channel to a thread that copies from one bdev to the other; none where they are not files of one file system that can.
#[must_use]
pub fn between(source: &dyn Bdev, target: &dyn Bdev) -> Option<Box<dyn IoChannel>> {
    let device = |bdev: &dyn Bdev| bdev.identity().map(|file| file.device);
    if device(source).is_none() || device(source) != device(target) {
        return None;
    }
    let files = [Arc::clone(source.regular_file()?), Arc::clone(target.regular_file()?)];
    #[allow(clippy::cast_sign_loss)] // a magic number
    let magic = rustix::fs::fstatfs(&files[0]).ok()?.f_type as u64;
    let methods = Method::of(magic & u64::from(u32::MAX));
    if methods.is_empty() {
        return None;
    }
    start(files, methods, target).ok()
}

fn start(
    files: [Arc<OwnedFd>; 2],
    methods: &'static [Method],
    target: &dyn Bdev,
) -> std::io::Result<Box<dyn IoChannel>> {
    let shared = Arc::new(Shared {
        asked: ArrayQueue::new(DEPTH),
        done: ArrayQueue::new(DEPTH),
        wake: EventFd::new()?,
        gone: AtomicBool::new(false),
    });
    let thread = std::thread::Builder::new().name("offload".to_owned()).spawn({
        let shared = Arc::clone(&shared);
        move || serve(&shared, &files, methods)
    })?;
    let geometry = target.geometry();
    let limits = Limits {
        block_size: BLOCK.max(geometry.block_size),
        num_blocks: geometry.size() / u64::from(BLOCK.max(geometry.block_size)),
        max_transfer: u32::MAX,
        max_segments: 0,
        max_unmap: 0,
        unmap: false,
        zeroes_unmap: false,
        optimal_io: BLOCK,
        read_only: false,
    };
    Ok(Box::new(OffloadChannel {
        limits,
        shared,
        thread: thread.thread().clone(),
        in_flight: 0,
        uncommitted: false,
    }))
}

/// What the channel and its thread share.
struct Shared {
    asked: ArrayQueue<BdevIo>,
    done: ArrayQueue<Completion>,
    /// Wakes a reactor that sleeps.
    wake: EventFd,
    /// The channel has gone.
    gone: AtomicBool,
}

/// The thread. A method that cannot be used here is not tried again.
fn serve(shared: &Shared, files: &[Arc<OwnedFd>; 2], mut methods: &[Method]) {
    while !shared.gone.load(Ordering::Acquire) {
        let Some(io) = shared.asked.pop() else {
            std::thread::park();
            continue;
        };
        let mut result = Err(IoError::NOT_SUPPORTED);
        while let Some((method, others)) = methods.split_first() {
            result = method.copy(files, io.offset, io.length);
            if result.is_ok() {
                break;
            }
            methods = others;
        }
        // There is room for all that may be in flight.
        let _ = shared.done.push(Completion { tag: io.tag, result });
        shared.wake.signal();
    }
}

struct OffloadChannel {
    limits: Limits,
    shared: Arc<Shared>,
    thread: Thread,
    in_flight: u32,
    uncommitted: bool,
}

impl IoChannel for OffloadChannel {
    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn free(&self, kind: IoKind) -> u32 {
        #[allow(clippy::cast_possible_truncation)] // a small constant
        let depth = DEPTH as u32;
        if kind == IoKind::Write { depth - self.in_flight } else { 0 }
    }

    fn submit(&mut self, _cx: &Context<'_>, io: BdevIo, _payload: &[BufferSlice]) {
        let taken = self.shared.asked.push(io);
        debug_assert!(taken.is_ok(), "free() was asked before");
        self.in_flight += u32::from(taken.is_ok());
        self.uncommitted = true;
    }

    /// A system call if the thread sleeps.
    fn commit(&mut self, _cx: &Context<'_>) {
        if std::mem::take(&mut self.uncommitted) {
            self.thread.unpark();
        }
    }

    fn poll(&mut self, _cx: &Context<'_>, done: &mut CompletionBatch) {
        while self.in_flight > 0 && done.room() > 0 {
            let Some(completion) = self.shared.done.pop() else { return };
            self.in_flight -= 1;
            done.push(completion);
        }
    }

    fn in_flight(&self) -> u32 {
        self.in_flight
    }

    fn arm(&mut self, _cx: &Context<'_>, set: &mut WaitSet) -> Armed {
        if self.uncommitted || !self.shared.done.is_empty() {
            return Armed::Ready;
        }
        set.add(&self.shared.wake);
        Armed::Until(None)
    }

    fn disarm(&mut self, _cx: &Context<'_>) {
        self.shared.wake.drain();
    }
}

impl Drop for OffloadChannel {
    fn drop(&mut self) {
        self.shared.gone.store(true, Ordering::Release);
        self.thread.unpark();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::fs::FileExt;
    use std::time::{Duration, Instant};

    use resilver_reactor::Nanos;
    use resilver_sys::RegionTable;

    use crate::io::Tag;
    use crate::malloc::Malloc;

    const SIZE: usize = 1 << 20;

    fn files() -> [std::fs::File; 2] {
        let mut source = tempfile::tempfile().unwrap();
        source.write_all(&vec![7; SIZE]).unwrap();
        let target = tempfile::tempfile().unwrap();
        target.set_len(SIZE as u64).unwrap();
        [source, target]
    }

    fn channel(files: &[std::fs::File; 2], methods: &'static [Method]) -> Box<dyn IoChannel> {
        let fds = files.each_ref().map(|file| Arc::new(OwnedFd::from(file.try_clone().unwrap())));
        let like = Malloc::new("target", 512, SIZE as u64 / 512).unwrap();
        start(fds, methods, &like).unwrap()
    }

    /// Asks for these ranges at once and for how each ends, by its number.
    fn ask(channel: &mut dyn IoChannel, ranges: &[(u64, u64)]) -> Vec<(Tag, Result<(), IoError>)> {
        let memory = RegionTable::with_capacity(1);
        let cx = Context { now: Nanos::ZERO, memory: &memory };
        for (number, (offset, length)) in (0..).zip(ranges) {
            let (tag, kind) = (Tag(number), IoKind::Write);
            let io = BdevIo { tag, kind, may_unmap: false, offset: *offset, length: *length };
            channel.submit(&cx, io, &[]);
        }
        channel.commit(&cx);
        let (mut ended, begun) = (Vec::new(), Instant::now());
        let mut done = CompletionBatch::with_capacity(2);
        while channel.in_flight() > 0 {
            assert!(begun.elapsed() < Duration::from_secs(20), "{ended:?}");
            let mut set = WaitSet::with_capacity(1);
            if matches!(channel.arm(&cx, &mut set), Armed::Until(None)) {
                set.sleep(Some(1_000_000_000));
            }
            channel.disarm(&cx);
            done.clear();
            channel.poll(&cx, &mut done);
            ended.extend(done.as_slice().iter().map(|done| (done.tag, done.result)));
        }
        ended
    }

    #[test]
    fn ranges_are_copied_and_nothing_beside_them() {
        let files = files();
        let mut channel = channel(&files, &[Method::Server]);
        let ended =
            ask(channel.as_mut(), &[(4096, 8192), (65536, 4096), (SIZE as u64 - 4096, 4096)]);
        assert_eq!(ended, [0, 1, 2].map(|number| (Tag(number), Ok(()))));
        let mut target = vec![0; SIZE];
        files[1].read_exact_at(&mut target, 0).unwrap();
        let copied = |at: usize| {
            (4096..12288).contains(&at) || (65536..69632).contains(&at) || at >= SIZE - 4096
        };
        assert!(target.iter().enumerate().all(|(at, byte)| *byte == 7 * u8::from(copied(at))));
    }

    #[test]
    fn a_method_that_cannot_be_used_gives_way_to_the_next_and_to_none() {
        let files = files();
        // A memory file system shares no extents.
        let [source, target] = files
            .each_ref()
            .map(|_| rustix::fs::memfd_create("file", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        rustix::fs::ftruncate(&source, SIZE as u64).unwrap();
        rustix::fs::ftruncate(&target, SIZE as u64).unwrap();
        let memory = [source, target].map(std::fs::File::from);
        let mut both = channel(&memory, &[Method::Share, Method::Server]);
        assert_eq!(ask(both.as_mut(), &[(0, 4096)]), [(Tag(0), Ok(()))]);
        let mut one = channel(&memory, &[Method::Share]);
        let failed = ask(one.as_mut(), &[(0, 4096), (4096, 4096)]);
        assert!(failed[0].1.is_err() && failed[1].1 == Err(IoError::NOT_SUPPORTED), "{failed:?}");
        // Beyond the source's end there is nothing to copy.
        let mut beyond = channel(&files, &[Method::Server]);
        assert_eq!(ask(beyond.as_mut(), &[(SIZE as u64, 4096)])[0].1, Err(IoError::IO));
    }

    #[test]
    fn what_is_no_file_of_such_a_file_system_has_none() {
        let malloc = Malloc::new("memory", 512, 8).unwrap();
        assert!(between(&malloc, &malloc).is_none());
        assert!(Method::of(0xef53).is_empty(), "ext4 copies through memory");
    }
}
