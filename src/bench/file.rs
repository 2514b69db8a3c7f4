//! A file or block device without a server: the load that what a server adds is measured against.
//!
//! It is what the `uring` bdev does by default, and nothing else: direct I/O, io_uring with the file registered, what a turn
//! submits told with one system call (of a file in memory a turn's share, which is carried out within it), completions taken
//! from the ring as they appear there. The buffers are not registered, because a guest's memory is not; nor is the ring polled
//! in the kernel (`IOPOLL`), which few disks can. They lie in memory of the kind that the client shares with a server, for a
//! request of many small pages costs the kernel more than one of a huge page. One ring for each queue, and one thread for all,
//! as a reactor has it.
//!
//! Invariants: a file that is written is locked against everybody, one that is read against those who write, unless the
//! operator has it otherwise; so nobody measures by accident what a server serves.

use std::collections::VecDeque;
use std::io;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use resilver_bdev::uring::{Uring, UringConfig};
use resilver_bdev::{Bdev as _, BdevError};
use resilver_sys::uring::SLOTS_MAX;
use resilver_sys::{
    BufferSlice, Direction, PAGE_SIZE, RegionId, RegionTable, Ring, RingMode, WaitSet, usize_from,
};
use resilver_vhost::front_end::SharedMemory;
use rustix::io::Errno;

use super::disk::{Access, Disk, Shape, fill};
use super::{DEPTH_MAX, Job};

const _: () = assert!(DEPTH_MAX as u32 <= SLOTS_MAX);

/// An open file.
pub(crate) struct BareFile {
    rings: Vec<Ring>,
    memory: RegionTable,
    region: RegionId,
    /// Slots whose requests have ended and that were not handed out yet, by queue.
    ended: Vec<VecDeque<usize>>,
    shape: Shape,
    /// Bytes of a request, and of the room that each has: whole pages, which any file takes.
    block: u32,
    room: u64,
}

impl BareFile {
    /// Opens a file, with room for the job; for writing if the job writes. `shared`: though others may have it.
    pub(crate) fn open(path: &Path, job: &Job, seed: u64, shared: bool) -> anyhow::Result<Self> {
        let (bdev, direct) = open(path, job.read_percent == 100, shared)?;
        let geometry = bdev.geometry();
        let shape = Shape {
            capacity: geometry.size(),
            block_size: geometry.block_size,
            read_only: bdev.read_only(),
            direct: Some(direct),
        };
        let room = job.block.next_multiple_of(u32::try_from(PAGE_SIZE)?);
        let length = usize::from(job.depth) * usize_from(u64::from(room));
        let buffers = SharedMemory::new(length, 0)?;
        fill(buffers.mapping(), length, seed)?;
        let memory = RegionTable::with_capacity(1);
        let region = memory.insert(Arc::clone(buffers.mapping()))?;
        let per_queue = job.per_queue();
        let rings = (0..job.queues).map(|_| {
            let mut ring = Ring::new(bdev.file(), u32::from(per_queue), bdev.ring_mode())?;
            ring.keep_workers_off_this_core();
            Ok(ring)
        });
        let rings: io::Result<Vec<Ring>> = rings.collect();
        let rings = rings.context(
            "io_uring cannot be had; it needs Linux 5.19 and must not be switched off (sysctl kernel.io_uring_disabled)",
        )?;
        let ended = (0..job.queues).map(|_| VecDeque::with_capacity(per_queue.into())).collect();
        Ok(Self { rings, memory, region, ended, shape, block: job.block, room: room.into() })
    }

    /// Takes what has ended from a queue's ring.
    fn reap(&mut self, queue: usize) -> anyhow::Result<()> {
        let queues = self.rings.len();
        let (ended, block, mut failed) = (&mut self.ended[queue], self.block, None);
        self.rings[queue].reap(&self.memory, |place, result| {
            ended.push_back(place as usize * queues + queue);
            if u32::try_from(result) != Ok(block) {
                failed = Some(result);
            }
        });
        match failed {
            None => Ok(()),
            Some(result) if result < 0 => {
                Err(io::Error::from_raw_os_error(-result)).context("a request failed")
            }
            Some(result) => {
                bail!("a request moved {result} bytes of {block}: the file has become shorter")
            }
        }
    }
}

/// The file as a bdev has it, for its checks and its words, and whether I/O on it is direct: a file system that has none says so
/// when the file is opened (EINVAL of open(2)), and is measured with its cache.
fn open(path: &Path, read_only: bool, shared: bool) -> Result<(Uring, bool), BdevError> {
    let with = |direct| {
        let config = UringConfig {
            name: path.display().to_string(),
            path: path.to_owned(),
            block_size: None,
            read_only,
            direct,
            mode: RingMode::Enter,
            engine: None,
        };
        let opened = if shared { Uring::open_unlocked(config) } else { Uring::open(config) };
        opened.map(|bdev| (bdev, direct))
    };
    match with(true) {
        Err(BdevError::File { action: "opening", source, .. })
            if Errno::from_io_error(&source) == Some(Errno::INVAL) =>
        {
            with(false)
        }
        opened => opened,
    }
}

impl Disk for BareFile {
    fn shape(&self) -> Shape {
        self.shape
    }

    fn queues(&self) -> usize {
        self.rings.len()
    }

    fn submit(&mut self, queue: usize, access: Access) -> anyhow::Result<()> {
        let direction = if access.reads { Direction::Read } else { Direction::Write };
        let buffer = BufferSlice {
            region: self.region,
            length: self.block,
            offset: access.slot as u64 * self.room,
        };
        let place = u32::try_from(access.slot / self.rings.len())?;
        let ring = &mut self.rings[queue];
        Ok(ring.push_transfer(&self.memory, place, direction, access.offset, &[buffer])?)
    }

    fn publish(&mut self) {
        self.rings.iter_mut().for_each(Ring::commit);
    }

    fn pop(&mut self, queue: usize) -> anyhow::Result<Option<usize>> {
        let ring = &mut self.rings[queue];
        if self.ended[queue].is_empty() {
            // What has ended may wait for a commit, but what a turn submits goes together.
            if !ring.has_unsubmitted() {
                ring.commit();
            }
            if ring.has_completions() {
                self.reap(queue)?;
            }
        }
        Ok(self.ended[queue].pop_front())
    }

    fn in_flight(&self) -> usize {
        self.rings.iter().map(|ring| ring.in_flight() as usize).sum()
    }

    /// What the kernel could not take at once it is told of again.
    fn look(&mut self) -> anyhow::Result<()> {
        self.publish();
        Ok(())
    }

    fn arm(&mut self, set: &mut WaitSet) -> bool {
        let mut quiet = true;
        for ring in &mut self.rings {
            // Readable from the moment a completion is there, also one that came in since we looked.
            quiet &= !ring.has_completions();
            set.add(&*ring);
        }
        quiet
    }

    fn disarm(&mut self) {}
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt as _;
    use std::path::PathBuf;
    use std::time::Duration;

    use resilver_sys::file::{Lock, try_lock};

    use super::super::Pattern;
    use super::super::client::{Client, Run};
    use super::super::machine::Server;
    use super::*;
    use crate::interrupt::Interrupt;

    const SIZE: u64 = 1 << 20;

    fn job(pattern: Pattern, block: u32, depth: u16, queues: u16) -> Job {
        Job {
            pattern,
            read_percent: pattern.read_percent(50),
            block,
            depth,
            queues,
            interrupts: false,
            warmup: Duration::from_millis(2),
            time: Duration::from_millis(20),
        }
    }

    fn measure(path: &Path, job: &Job, shared: bool) -> anyhow::Result<Run> {
        let disk = BareFile::open(path, job, 1, shared)?;
        Client::new(disk, job, 1, &Interrupt::default())?.run(Server::Nobody)
    }

    /// A directory with a file of so many zeroes.
    fn scratch(size: u64) -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        File::create(&path).unwrap().set_len(size).unwrap();
        (directory, path)
    }

    #[test]
    fn every_queue_has_its_ring_and_every_request_ends_there() {
        let (_directory, path) = scratch(SIZE);
        // As many queues as requests, fewer, more; requests smaller and larger than a page.
        for (block, depth, queues) in [(4096, 1, 1), (512, 6, 4), (65536, 4, 4), (4096, 2, 3)] {
            for pattern in [Pattern::Read, Pattern::Randread] {
                let run = measure(&path, &job(pattern, block, depth, queues), false).unwrap();
                assert!(run.requests > 0 && run.bytes == run.requests * u64::from(block));
                assert_eq!(run.latency.len(), run.requests);
            }
        }
        let sleeps = Job { interrupts: true, ..job(Pattern::Randread, 4096, 8, 2) };
        assert!(measure(&path, &sleeps, false).unwrap().requests > 0);
    }

    #[test]
    fn writes_write_and_reads_leave_everything_as_it_is() {
        // As many places as requests in flight: a run writes all of them, however short it is.
        let (_directory, path) = scratch(4 * 65536);
        let content = || std::fs::read(&path).unwrap();
        measure(&path, &job(Pattern::Randread, 4096, 4, 1), false).unwrap();
        assert!(content().iter().all(|byte| *byte == 0));
        measure(&path, &job(Pattern::Write, 65536, 4, 2), false).unwrap();
        let written = content();
        assert_eq!(written.len(), 4 * 65536);
        // No sector has been left out, and the buffers of two slots differ.
        assert!(written.chunks(512).all(|sector| sector.iter().any(|byte| *byte != 0)));
        assert!(written.chunks(65536).any(|block| block != &written[..65536]));
    }

    #[test]
    fn what_cannot_be_measured_is_refused_in_words() {
        let (directory, path) = scratch(SIZE);
        let refused = |path: &Path, block: u32| {
            let refused = measure(path, &job(Pattern::Randread, block, 1, 1), false).unwrap_err();
            format!("{refused:#}")
        };
        let says = |text: String, wanted: &str| assert!(text.contains(wanted), "{text}");
        says(refused(&directory.path().join("none"), 4096), "No such file");
        says(refused(directory.path(), 4096), "a regular file or a block device was expected");
        says(refused(Path::new("/dev/null"), 4096), "a regular file or a block device");
        let file = File::options().write(true).open(&path).unwrap();
        file.set_len(SIZE + 100).unwrap();
        says(refused(&path, 4096), "must be a multiple of the block size");
        file.set_len(0).unwrap();
        says(refused(&path, 4096), "and not zero");
        file.set_len(1024).unwrap();
        says(refused(&path, 4096), "smaller than one request");
        assert!(measure(&path, &job(Pattern::Randread, 1024, 1, 1), false).is_ok());
    }

    #[test]
    fn what_others_have_locked_is_measured_only_if_that_is_wanted() {
        let (_directory, path) = scratch(SIZE);
        let (reads, writes) =
            (job(Pattern::Randread, 4096, 2, 1), job(Pattern::Randwrite, 4096, 2, 1));
        let holder = File::options().read(true).write(true).open(&path).unwrap();
        try_lock(std::os::fd::AsFd::as_fd(&holder), Lock::Exclusive).unwrap();
        for job in [&reads, &writes] {
            let refused = measure(&path, job, false).unwrap_err().to_string();
            assert!(refused.contains("is in use"), "{refused}");
            assert!(measure(&path, job, true).is_ok());
        }
        // Readers do not mind each other.
        try_lock(std::os::fd::AsFd::as_fd(&holder), Lock::Shared).unwrap();
        assert!(measure(&path, &reads, false).is_ok());
        assert!(measure(&path, &writes, false).is_err());
    }

    #[test]
    fn a_file_that_becomes_shorter_ends_the_run_with_a_reason() {
        let (_directory, path) = scratch(SIZE);
        let reads = job(Pattern::Randread, 4096, 4, 1);
        let disk = BareFile::open(&path, &reads, 1, false).unwrap();
        let client = Client::new(disk, &reads, 1, &Interrupt::default()).unwrap();
        File::options().write(true).open(&path).unwrap().set_len(0).unwrap();
        let failed = format!("{:#}", client.run(Server::Nobody).unwrap_err());
        assert!(failed.contains("shorter"), "{failed}");
    }

    #[test]
    fn a_file_system_without_direct_io_is_measured_with_its_cache() {
        if !resilver_tests::mounts::available("bench file without direct I/O") {
            return;
        }
        let mount = resilver_tests::mounts::Mount::ramfs();
        let path = mount.path().join("file");
        File::create(&path).unwrap().write_all_at(&[1; 1 << 16], 0).unwrap();
        let run = measure(&path, &job(Pattern::Randread, 4096, 2, 1), false).unwrap();
        assert_eq!(run.direct, Some(false));
        assert!(run.requests > 0);
    }
}
