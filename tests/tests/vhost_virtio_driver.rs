//! The back end under a driver that is not ours: the crate `virtio-driver`, which libblkio is made of. It shares memory by
//! slots only, kicks and waits by blocking event descriptors, and uses no indirect tables.

// A test may fail by panicking.
#![allow(clippy::unwrap_used)]

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use resilver_bdev::malloc::Malloc;
use resilver_bdev::{Bdev, IoKind};
use resilver_sys::foreign::leak_shared;
use resilver_tests::e2e::driver::{BLOCK, Driver};
use resilver_tests::served::{PATIENCE, Served};
use virtio_driver::{VhostUser, VirtioBlkQueue, VirtioBlkTransport, VirtioFeatureFlags};

const BLOCKS: u64 = 1024;
/// Told of events by flags and by index. Not packed rings: the crate says of a fresh one that it stands in the wrong lap.
const RINGS: [VirtioFeatureFlags; 2] =
    [VirtioFeatureFlags::empty(), VirtioFeatureFlags::RING_EVENT_IDX];

fn malloc() -> Arc<dyn Bdev> {
    Arc::new(Malloc::new("malloc0", 4096, BLOCKS).unwrap())
}

/// What block `block` holds after its `generation`th write.
fn pattern(block: u64, generation: u64) -> [u8; BLOCK] {
    let mut bytes = [generation as u8; BLOCK];
    bytes[..8].copy_from_slice(&block.to_le_bytes());
    bytes[8..16].copy_from_slice(&generation.to_le_bytes());
    bytes
}

/// Polls until `count` requests have ended well.
fn collect(driver: &mut Driver, count: usize) {
    let (mut ended, start) = (0, Instant::now());
    while ended < count {
        for (slot, result) in driver.completions() {
            assert_eq!(result, 0, "slot {slot}");
            ended += 1;
        }
        assert!(start.elapsed() < PATIENCE, "{ended} of {count} requests ended");
    }
}

#[test]
fn a_stranger_reads_back_what_it_wrote_at_depth_32() {
    for ring in RINGS {
        reads_back(ring);
    }
}

fn reads_back(ring: VirtioFeatureFlags) {
    const DEPTH: usize = 32;
    let served = Served::new(&*malloc());
    let mut driver = Driver::connect_with(&served.socket(), DEPTH, ring).unwrap();
    assert_eq!(driver.capacity(), BLOCKS * BLOCK as u64);
    for generation in 0..8 {
        for first in (0..BLOCKS).step_by(DEPTH) {
            for (slot, block) in (first..first + DEPTH as u64).enumerate() {
                driver.buffer(slot).copy_from_slice(&pattern(block, generation));
                driver.write(slot, block).unwrap();
            }
            driver.notify().unwrap();
            collect(&mut driver, DEPTH);
        }
        for first in (0..BLOCKS).step_by(DEPTH) {
            for (slot, block) in (first..first + DEPTH as u64).enumerate() {
                driver.buffer(slot).fill(0xee);
                driver.read(slot, block).unwrap();
            }
            driver.notify().unwrap();
            collect(&mut driver, DEPTH);
            for (slot, block) in (first..first + DEPTH as u64).enumerate() {
                assert_eq!(driver.buffer(slot), pattern(block, generation), "block {block}");
            }
        }
    }
    assert_eq!(served.io_stats().of(IoKind::Write).ops.get(), 8 * BLOCKS);
}

/// A shared buffer for the driver, and the descriptor behind it.
fn buffer(length: usize) -> (OwnedFd, &'static mut [u8]) {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let fd = rustix::fs::memfd_create(c"resilver-driver", flags).unwrap();
    rustix::fs::ftruncate(&fd, length as u64).unwrap();
    let bytes = leak_shared(fd.as_fd(), length as u64).unwrap();
    (fd, bytes)
}

#[test]
fn a_stranger_sleeps_for_interrupts_and_adds_and_removes_memory_meanwhile() {
    for ring in RINGS {
        let features = (VirtioFeatureFlags::VERSION_1 | ring).bits();
        let served = Served::new(&*malloc());
        let path = served.socket();
        let mut transport: Box<VirtioBlkTransport> =
            Box::new(VhostUser::new(path.to_str().unwrap(), features).unwrap());
        assert_eq!(transport.max_mem_regions(), 509);
        let mut queues = VirtioBlkQueue::<u32>::setup_queues(&mut *transport, 1, 16).unwrap();
        let notifier = transport.get_submission_notifier(0);
        let interrupt = transport.get_completion_fd(0);
        let queue = &mut queues[0];
        queue.set_used_notif_enabled(true);
        let finish = |queue: &mut VirtioBlkQueue<'_, u32>| {
            if queue.avail_notif_needed() {
                notifier.notify().unwrap();
            }
            loop {
                if let Some(ended) = queue.completions().next() {
                    return ended.ret;
                }
                interrupt.read().unwrap();
            }
        };
        for round in 1..=20u8 {
            // A region whose length is no multiple of a page.
            let (fd, bytes) = buffer(8192 + 512);
            transport
                .map_mem_region(bytes.as_ptr() as usize, bytes.len(), fd.as_raw_fd(), 0)
                .unwrap();
            let (one, two) = bytes.split_at_mut(4096);
            one.fill(round);
            queue.write(4096, one, 1).unwrap();
            assert_eq!(finish(queue), 0);
            queue.read(4096, &mut two[..4096], 2).unwrap();
            assert_eq!(finish(queue), 0);
            assert_eq!(one, &two[..4096]);
            queue.write_zeroes(4096, 4096, true, 3).unwrap();
            assert_eq!(finish(queue), 0);
            queue.discard(8192, 4096, 4).unwrap();
            assert_eq!(finish(queue), 0);
            queue.flush(5).unwrap();
            assert_eq!(finish(queue), 0);
            queue.read(4096, &mut two[..4096], 6).unwrap();
            assert_eq!(finish(queue), 0);
            assert!(two[..4096].iter().all(|byte| *byte == 0));
            let (address, length) = (one.as_ptr() as usize, 8192 + 512);
            transport.unmap_mem_region(address, length).unwrap();
            if round == 20 {
                // That memory is no longer ours to name: the request fails and nothing else.
                queue.write(4096, one, 7).unwrap();
                assert_eq!(finish(queue), -rustix::io::Errno::IO.raw_os_error());
            }
        }
    }
}
