//! A guest's memory in the hands of a test: one memory file, read and written by offset, from which regions are mapped as a
//! front end would have them mapped.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use resilver_vhost::memory::GuestRegion;
use resilver_vhost::message::RegionDescription;
use rustix::fs::{MemfdFlags, memfd_create};

/// A descriptor of a split ring (virtio 2.7.5) as a driver writes it.
#[must_use]
pub fn descriptor(address: u64, length: u32, flags: u16, next: u16) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&address.to_le_bytes());
    bytes[8..12].copy_from_slice(&length.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    bytes
}

/// The file. What is written to it shows in every mapping of it at once.
pub struct MemoryFile {
    file: File,
    size: u64,
}

impl MemoryFile {
    /// `size` bytes of zeroes.
    ///
    /// # Panics
    /// If there is no memory; as everything here, because it is a test's.
    #[must_use]
    pub fn new(size: u64) -> Self {
        let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).expect("a memory file"));
        file.set_len(size).expect("its size");
        Self { file, size }
    }

    /// A file that somebody else has made.
    ///
    /// # Panics
    /// If its size cannot be had.
    #[must_use]
    pub fn of(fd: OwnedFd) -> Self {
        let file = File::from(fd);
        let size = file.metadata().expect("its size").len();
        Self { file, size }
    }

    /// The descriptor that a front end would send.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Another descriptor of the same file.
    ///
    /// # Panics
    /// If the process is out of descriptors.
    #[must_use]
    pub fn file(&self) -> File {
        self.file.try_clone().expect("another descriptor")
    }

    /// Bytes of the file.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The `size` bytes at `file_offset` as the region at `address`, for guest and front end alike.
    ///
    /// # Panics
    /// If they cannot be mapped.
    #[must_use]
    pub fn region(&self, address: u64, size: u64, file_offset: u64) -> GuestRegion {
        let (guest_address, user_address) = (address, address);
        let region = RegionDescription { guest_address, size, user_address, file_offset };
        GuestRegion::map(&region, self.fd()).expect("a mapping of the region")
    }

    /// Writes bytes at an offset of the file.
    ///
    /// # Panics
    /// If the file cannot be written.
    pub fn put(&self, at: u64, bytes: &[u8]) {
        self.file.write_all_at(bytes, at).expect("a write");
    }

    /// Reads bytes at an offset of the file.
    ///
    /// # Panics
    /// If they are not all there.
    #[must_use]
    pub fn get(&self, at: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.file.read_exact_at(&mut bytes, at).expect("a read");
        bytes
    }

    /// Writes a little-endian 16-bit word.
    pub fn put_word(&self, at: u64, value: u16) {
        self.put(at, &value.to_le_bytes());
    }

    /// Reads a little-endian 16-bit word.
    #[must_use]
    pub fn word(&self, at: u64) -> u16 {
        let bytes = self.get(at, 2);
        u16::from_le_bytes([bytes[0], bytes[1]])
    }
}
