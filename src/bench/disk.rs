//! What a client sends its requests to: a disk behind a socket ([`socket`](super::socket)) or a file without a server
//! ([`file`](super::file)). The client above is the same code for both, so that what differs between them is theirs.

use std::sync::Arc;

use resilver_sys::{BufferSlice, Mapping, RegionTable, WaitSet};

use crate::content::Random;

/// What requests have to keep to.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    /// Bytes of the disk.
    pub(crate) capacity: u64,
    /// What offset and length of a request are multiples of, bytes.
    pub(crate) block_size: u32,
    pub(crate) read_only: bool,
    /// Whether the page cache is bypassed; what is behind a socket is its server's to know.
    pub(crate) direct: Option<bool>,
}

/// One request, as the client numbers them: a slot has a buffer of one block of the job, and one request at a time.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Access {
    pub(crate) slot: usize,
    pub(crate) reads: bool,
    /// Where on the disk, bytes.
    pub(crate) offset: u64,
}

/// A disk with some queues. Nothing here waits.
pub(crate) trait Disk {
    fn shape(&self) -> Shape;

    /// How many queues it has.
    fn queues(&self) -> usize;

    /// Takes a request, to be told of with [`Disk::publish`].
    fn submit(&mut self, queue: usize, access: Access) -> anyhow::Result<()>;

    /// Tells of all that was submitted.
    fn publish(&mut self);

    /// The slot of a request of this queue that has ended well, if there is one; an error if one has not.
    fn pop(&mut self, queue: usize) -> anyhow::Result<Option<usize>>;

    /// Requests that have not ended.
    fn in_flight(&self) -> usize;

    /// Looks, now and then, whether it is still there.
    fn look(&mut self) -> anyhow::Result<()>;

    /// Asks to be woken, and adds what wakes. False if something has ended meanwhile: then nobody sleeps.
    fn arm(&mut self, set: &mut WaitSet) -> bool;

    /// Asks for no more.
    fn disarm(&mut self);
}

/// Fills the first `length` bytes with what nobody can compress or leave out: zeroes would be skipped by a copier, and make
/// holes.
pub(crate) fn fill(mapping: &Arc<Mapping>, length: usize, seed: u64) -> anyhow::Result<()> {
    /// Bytes that are written at once.
    const PART: usize = 4096;
    let table = RegionTable::with_capacity(1);
    let region = table.insert(Arc::clone(mapping))?;
    let mut random = Random::new(seed);
    let mut bytes = [0; PART];
    for offset in (0..length).step_by(PART) {
        bytes.chunks_exact_mut(8).for_each(|it| it.copy_from_slice(&random.next().to_le_bytes()));
        let part = &bytes[..PART.min(length - offset)];
        let length = u32::try_from(part.len())?;
        table.write(BufferSlice { region, length, offset: offset as u64 }, part)?;
    }
    Ok(())
}
