//! The crate `virtio-driver` as a disk's driver: requests of one block, polled.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::Path;

use resilver_sys::foreign::leak_shared;
use rustix::fs::MemfdFlags;
use virtio_driver::{
    QueueNotifier, VhostUser, VirtioBlkQueue, VirtioBlkTransport, VirtioFeatureFlags,
};

/// Bytes of a block.
pub const BLOCK: usize = 4096;
/// VIRTIO_BLK_F_FLUSH, which the crate does not name.
const FLUSH: u64 = 1 << 9;

/// A connected disk with `depth` slots.
pub struct Driver {
    queue: VirtioBlkQueue<'static, usize>,
    notifier: Box<dyn QueueNotifier>,
    buffers: Vec<&'static mut [u8]>,
    capacity: u64,
    transport: Box<VirtioBlkTransport>,
    _memory: OwnedFd,
    /// Memory that no request names: address, length, and its descriptor, which the crate sends along when it goes.
    spare: Option<(usize, usize, OwnedFd)>,
}

impl Driver {
    /// Connects to a controller's socket.
    ///
    /// # Errors
    /// The crate's.
    pub fn connect(socket: &Path, depth: usize) -> io::Result<Self> {
        Self::connect_with(socket, depth, VirtioFeatureFlags::RING_EVENT_IDX)
    }

    /// The same, with these ring features.
    ///
    /// # Errors
    /// The crate's.
    pub fn connect_with(
        socket: &Path,
        depth: usize,
        features: VirtioFeatureFlags,
    ) -> io::Result<Self> {
        let features = VirtioFeatureFlags::VERSION_1 | features;
        let path = socket.to_str().expect("a UTF-8 path");
        let mut transport: Box<VirtioBlkTransport> =
            Box::new(VhostUser::new(path, features.bits() | FLUSH)?);
        let memory = rustix::fs::memfd_create(c"resilver-driver", MemfdFlags::CLOEXEC)?;
        let length = depth * BLOCK;
        rustix::fs::ftruncate(&memory, length as u64)?;
        let buffer = leak_shared(memory.as_fd(), length as u64).map_err(io::Error::other)?;
        transport.map_mem_region(buffer.as_ptr() as usize, length, memory.as_raw_fd(), 0)?;
        let capacity = u64::from(transport.get_config()?.capacity) * 512;
        // A request takes three descriptors.
        let size = (4 * depth).next_power_of_two().try_into().expect("a small depth");
        let mut queues = VirtioBlkQueue::setup_queues(&mut *transport, 1, size)?;
        let mut queue = queues.pop().expect("one queue");
        queue.set_used_notif_enabled(false);
        let notifier = transport.get_submission_notifier(0);
        let buffers = buffer.chunks_exact_mut(BLOCK).collect();
        Ok(Self { queue, notifier, buffers, capacity, transport, _memory: memory, spare: None })
    }

    /// Changes the memory table, as hot-plug does: another region comes, the one that came so before goes. What is in flight
    /// stays.
    ///
    /// # Errors
    /// The crate's.
    pub fn change_memory(&mut self) -> io::Result<()> {
        let memory = rustix::fs::memfd_create(c"resilver-spare", MemfdFlags::CLOEXEC)?;
        rustix::fs::ftruncate(&memory, BLOCK as u64)?;
        let mapped = leak_shared(memory.as_fd(), BLOCK as u64).map_err(io::Error::other)?;
        let (address, length) = (mapped.as_ptr() as usize, mapped.len());
        self.transport.map_mem_region(address, length, memory.as_raw_fd(), 0)?;
        match self.spare.replace((address, length, memory)) {
            Some((address, length, _memory)) => {
                Ok(self.transport.unmap_mem_region(address, length)?)
            }
            None => Ok(()),
        }
    }

    /// Bytes of the disk.
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// The block of a slot that is not in flight.
    pub fn buffer(&mut self, slot: usize) -> &mut [u8] {
        self.buffers[slot]
    }

    /// Writes the slot's block to the disk.
    ///
    /// # Errors
    /// The crate's.
    pub fn write(&mut self, slot: usize, block: u64) -> io::Result<()> {
        self.queue.write(block * BLOCK as u64, self.buffers[slot], slot)
    }

    /// Reads a block of the disk into the slot.
    ///
    /// # Errors
    /// The crate's.
    pub fn read(&mut self, slot: usize, block: u64) -> io::Result<()> {
        self.queue.read(block * BLOCK as u64, self.buffers[slot], slot)
    }

    /// Flushes, under the name of a slot.
    ///
    /// # Errors
    /// The crate's.
    pub fn flush(&mut self, slot: usize) -> io::Result<()> {
        self.queue.flush(slot)
    }

    /// Kicks the device if it wants that.
    ///
    /// # Errors
    /// The kernel's.
    pub fn notify(&mut self) -> io::Result<()> {
        if self.queue.avail_notif_needed() { self.notifier.notify() } else { Ok(()) }
    }

    /// Slots whose requests have ended, and how: 0 or a negative errno.
    pub fn completions(&mut self) -> Vec<(usize, i32)> {
        self.queue.completions().map(|ended| (ended.context, ended.ret)).collect()
    }
}
