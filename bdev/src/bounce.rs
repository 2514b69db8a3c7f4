//! The bounce pool: memory for buffers that a medium cannot use where they are, because of their alignment (direct I/O) or
//! because it sees other memory only (a back end in another process).
//!
//! The pool is cut into chunks, and a request takes as many as its length needs, anywhere in the pool: nothing fragments. One
//! chunk more stays zero for ever; it is what a medium gets written that cannot zero a range by itself.

use std::sync::Arc;

use resilver_sys::{BufferSlice, Mapping, MappingError, RegionId, RegionTable};

/// Bytes of a chunk.
pub const CHUNK: u32 = 64 << 10;
/// The most chunks of one request.
pub const CHUNKS_MAX: usize = 16;
/// Chunks of a pool: eight of the largest requests at once, or many small ones.
const POOL_CHUNKS: u16 = 128;
/// Bytes of a pool, with its chunk of zeroes.
pub const POOL_BYTES: usize = CHUNK as usize * (POOL_CHUNKS as usize + 1);

/// The chunks that one request holds.
#[derive(Debug, Clone, Copy)]
pub struct Chunks {
    count: usize,
    indexes: [u16; CHUNKS_MAX],
}

impl Chunks {
    /// No chunks.
    pub const NONE: Self = Self { count: 0, indexes: [0; CHUNKS_MAX] };
}

/// The pool of one channel.
#[derive(Debug)]
pub struct Bounce {
    mapping: Arc<Mapping>,
    /// Where the pool begins in the mapping: with the chunk of zeroes.
    start: u64,
    chunks: u16,
    region: RegionId,
    free: Vec<u16>,
}

/// Whether a pool is wanted, or only its zero chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pool {
    /// Direct I/O: buffers may need it.
    Full,
    /// Buffered I/O: never.
    ZeroesOnly,
}

impl Bounce {
    /// A pool in memory of its own.
    ///
    /// # Errors
    /// The memory could not be had.
    pub fn new(pool: Pool) -> Result<Self, MappingError> {
        let chunks = match pool {
            Pool::Full => POOL_CHUNKS,
            Pool::ZeroesOnly => 0,
        };
        let mapping = Mapping::anonymous(CHUNK as usize * (usize::from(chunks) + 1))?;
        Ok(Self::cut(mapping, 0, chunks))
    }

    /// A full pool in the [`POOL_BYTES`] at `start` of memory that others see too, zeroed so far.
    #[must_use]
    pub fn within(mapping: Arc<Mapping>, start: u64) -> Self {
        Self::cut(mapping, start, POOL_CHUNKS)
    }

    fn cut(mapping: Arc<Mapping>, start: u64, chunks: u16) -> Self {
        let free = (1..=chunks).rev().collect();
        Self { mapping, start, chunks, region: RegionId::NONE, free }
    }

    /// Enters the pool in the reactor's table. A full table leaves it unnamed; what needs it fails then.
    pub fn attach(&mut self, memory: &RegionTable) {
        self.region = memory.insert(Arc::clone(&self.mapping)).unwrap_or(RegionId::NONE);
    }

    /// Takes it out again.
    pub fn detach(&mut self, memory: &RegionTable) {
        memory.remove(self.region);
        self.region = RegionId::NONE;
    }

    /// Chunks for `length` bytes, at most [`CHUNKS_MAX`] of them; none if the pool has too few free.
    pub fn take(&mut self, length: u32) -> Option<Chunks> {
        let count = length.div_ceil(CHUNK) as usize;
        if count > CHUNKS_MAX || count > self.free.len() {
            return None;
        }
        let mut chunks = Chunks { count, ..Chunks::NONE };
        for index in &mut chunks.indexes[..count] {
            *index = self.free.pop()?;
        }
        Some(chunks)
    }

    /// Gives chunks back.
    pub fn give_back(&mut self, chunks: Chunks) {
        self.free.extend_from_slice(&chunks.indexes[..chunks.count]);
    }

    /// Takes all chunks back, whoever holds them: their holder has gone.
    pub fn reclaim(&mut self) {
        self.free.clear();
        self.free.extend((1..=self.chunks).rev());
    }

    /// The slice of the pool that holds bytes `position..` of a request, to the end of their chunk.
    fn slice(&self, chunks: &Chunks, position: u32) -> BufferSlice {
        let index = chunks.indexes[(position / CHUNK) as usize];
        let within = position % CHUNK;
        BufferSlice {
            region: self.region,
            length: CHUNK - within,
            offset: self.start + u64::from(index) * u64::from(CHUNK) + u64::from(within),
        }
    }

    /// Bytes `from..to` of a request as slices of the pool; how many there are.
    pub fn gather(&self, chunks: &Chunks, from: u32, to: u32, into: &mut [BufferSlice]) -> usize {
        let (mut position, mut count) = (from, 0);
        while position < to && count < into.len() {
            let mut slice = self.slice(chunks, position);
            slice.length = slice.length.min(to - position);
            position += slice.length;
            into[count] = slice;
            count += 1;
        }
        count
    }

    /// `length` bytes of zeroes as slices, as far as `into` has room; how many slices and bytes there are.
    pub fn zeroes(&self, length: u64, into: &mut [BufferSlice]) -> usize {
        let mut left = length;
        let mut count = 0;
        while left > 0 && count < into.len() {
            let part = u32::try_from(left).unwrap_or(u32::MAX).min(CHUNK);
            into[count] = BufferSlice { region: self.region, length: part, offset: self.start };
            left -= u64::from(part);
            count += 1;
        }
        count
    }

    /// Calls `copy` with (part of a payload slice, its place in the pool) until the payload is through or it says no.
    ///
    /// # Errors
    /// What `copy` said.
    pub fn pair<E>(
        &self,
        chunks: &Chunks,
        payload: &[BufferSlice],
        mut copy: impl FnMut(BufferSlice, BufferSlice) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut position = 0;
        for slice in payload {
            let mut skip = 0;
            while skip < slice.length {
                let mut pool = self.slice(chunks, position);
                pool.length = pool.length.min(slice.length - skip);
                let Some(part) = slice.part(skip, pool.length) else { break };
                copy(part, pool)?;
                skip += pool.length;
                position += pool.length;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool() -> (RegionTable, Bounce) {
        let memory = RegionTable::with_capacity(2);
        let mut bounce = Bounce::new(Pool::Full).unwrap();
        bounce.attach(&memory);
        (memory, bounce)
    }

    #[test]
    fn a_request_gets_all_its_chunks_or_none() {
        let (_memory, mut bounce) = pool();
        let mut held = Vec::new();
        while let Some(chunks) = bounce.take(CHUNK * 16) {
            held.push(chunks);
        }
        assert_eq!(held.len(), usize::from(POOL_CHUNKS) / CHUNKS_MAX);
        assert!(bounce.take(1).is_none());
        bounce.give_back(held.pop().unwrap());
        let one = bounce.take(1).unwrap();
        assert!(bounce.take(CHUNK * 16).is_none());
        bounce.give_back(one);
        assert!(bounce.take(CHUNK * 16).is_some());
        bounce.reclaim();
        let all = std::iter::from_fn(|| bounce.take(1)).count();
        assert_eq!(all, usize::from(POOL_CHUNKS));
    }

    #[test]
    fn gathered_slices_cover_a_range_across_chunks() {
        let (memory, mut bounce) = pool();
        let chunks = bounce.take(3 * CHUNK).unwrap();
        let mut slices = [BufferSlice::EMPTY; CHUNKS_MAX];
        let count = bounce.gather(&chunks, CHUNK - 512, 2 * CHUNK + 1024, &mut slices);
        let lengths: Vec<u32> = slices[..count].iter().map(|slice| slice.length).collect();
        assert_eq!(lengths, [512, CHUNK, 1024]);
        assert!(slices[..count].iter().all(|slice| memory.check(*slice).is_ok()));
    }

    #[test]
    fn bytes_of_odd_slices_go_through_the_pool_unchanged() {
        let (memory, mut bounce) = pool();
        let region = memory.insert(Mapping::anonymous(1 << 20).unwrap()).unwrap();
        let lengths = [1u32, 511, CHUNK, 7, 70_000];
        let mut payload = Vec::new();
        let mut offset = 3;
        for length in lengths {
            payload.push(BufferSlice { region, length, offset });
            let bytes: Vec<u8> = (0..length).map(|i| (i % 251) as u8).collect();
            memory.write(*payload.last().unwrap(), &bytes).unwrap();
            offset += u64::from(length) + 13;
        }
        let chunks = bounce.take(lengths.iter().sum()).unwrap();
        bounce.pair(&chunks, &payload, |guest, pool| memory.copy(pool, guest)).unwrap();
        for slice in &payload {
            memory.fill_zero(*slice).unwrap();
        }
        bounce.pair(&chunks, &payload, |guest, pool| memory.copy(guest, pool)).unwrap();
        for slice in &payload {
            let mut bytes = vec![0; slice.length as usize];
            memory.read(*slice, &mut bytes).unwrap();
            assert!(bytes.iter().enumerate().all(|(i, byte)| usize::from(*byte) == i % 251));
        }
    }

    #[test]
    fn the_zero_chunk_is_never_given_away() {
        let (_memory, mut bounce) = pool();
        let mut slices = [BufferSlice::EMPTY; CHUNKS_MAX];
        assert_eq!(bounce.zeroes(u64::from(CHUNK) + 1, &mut slices), 2);
        let zero = slices[0].offset;
        while let Some(chunks) = bounce.take(1) {
            let mut taken = [BufferSlice::EMPTY; 1];
            bounce.gather(&chunks, 0, 1, &mut taken);
            assert_ne!(taken[0].offset, zero);
        }
    }
}
