//! What a scratch disk contains: for every block and generation exactly one content, computed and never stored.
//!
//! Generation 0 is the disk as it was made: a layout of data, zeroes that occupy space, and holes; or an image that is read,
//! never written. Every write of the load makes the next generation of its blocks. A block of data begins with its own
//! name (seed, number, generation), so that a wrong block says where it came from.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

/// Bytes of a block: what the load writes and counts in.
pub(crate) const BLOCK: usize = 4096;
/// Bytes at the beginning of a block that name it: magic, number, generation.
const NAME: usize = 24;

/// A small generator of numbers that look random (SplitMix64): the same seed, the same numbers.
#[derive(Debug, Clone)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `bound`, which is not 0.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

/// What a stretch of a new scratch disk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stretch {
    /// Bytes that differ from block to block.
    Data,
    /// Zeroes that were written: allocated, and found to be zero only by reading.
    WrittenZeroes,
    /// Never written.
    Hole,
}

/// What generation 0 is.
#[derive(Debug)]
pub(crate) enum Origin {
    /// Made by [`Content::create`]: (first block, what), ascending.
    Layout(Vec<(u64, Stretch)>),
    /// Copied from an image, which stays as it is.
    Image(File),
}

/// The content of every block in every generation.
#[derive(Debug)]
pub(crate) struct Content {
    seed: u64,
    blocks: u64,
    origin: Origin,
}

impl Content {
    /// Lays out a disk of `blocks` blocks, about half of it data.
    pub(crate) fn generate(seed: u64, blocks: u64) -> Self {
        let mut random = Random::new(seed);
        let (mut layout, mut at) = (Vec::new(), 0);
        while at < blocks {
            let what = match random.below(8) {
                0..4 => Stretch::Data,
                4 => Stretch::WrittenZeroes,
                _ => Stretch::Hole,
            };
            layout.push((at, what));
            // From 64 KiB to 8 MiB.
            at += 16 << random.below(8);
        }
        Self { seed, blocks, origin: Origin::Layout(layout) }
    }

    /// The content of `image`, of which whole blocks are used.
    pub(crate) fn of_image(seed: u64, image: &Path) -> io::Result<Self> {
        let file = File::open(image)?;
        let blocks = file.metadata()?.len() / BLOCK as u64;
        Ok(Self { seed, blocks, origin: Origin::Image(file) })
    }

    /// Blocks of the disk.
    pub(crate) fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Bytes of the disk.
    pub(crate) fn size(&self) -> u64 {
        self.blocks * BLOCK as u64
    }

    /// Writes generation 0 to an empty file. Holes stay holes, those of an image included as far as whole zero blocks tell.
    pub(crate) fn create(&self, path: &Path) -> io::Result<()> {
        let file = File::options().write(true).create_new(true).open(path)?;
        file.set_len(self.size())?;
        let mut run = vec![0; 256 * BLOCK];
        let mut first = 0;
        while first < self.blocks {
            let count = (self.blocks - first).min(256);
            let mut written = 0..0;
            for (index, block) in (first..first + count).enumerate() {
                let bytes = &mut run[index * BLOCK..(index + 1) * BLOCK];
                self.fill(block, 0, bytes)?;
                if self.is_hole(block, bytes) {
                    Self::put(&file, &run, first, &written)?;
                    written = index + 1..index + 1;
                } else {
                    written.end = index + 1;
                }
            }
            Self::put(&file, &run, first, &written)?;
            first += count;
        }
        file.sync_all()
    }

    fn put(file: &File, run: &[u8], first: u64, blocks: &std::ops::Range<usize>) -> io::Result<()> {
        let bytes = &run[blocks.start * BLOCK..blocks.end * BLOCK];
        file.write_all_at(bytes, (first + blocks.start as u64) * BLOCK as u64)
    }

    fn is_hole(&self, block: u64, bytes: &[u8]) -> bool {
        match &self.origin {
            Origin::Layout(layout) => stretch(layout, block) == Stretch::Hole,
            Origin::Image(_) => is_zero(bytes),
        }
    }

    /// Computes one block.
    pub(crate) fn fill(&self, block: u64, generation: u32, into: &mut [u8]) -> io::Result<()> {
        match (&self.origin, generation) {
            (Origin::Image(file), 0) => {
                return file.read_exact_at(into, block * BLOCK as u64);
            }
            (Origin::Layout(layout), 0) if stretch(layout, block) != Stretch::Data => into.fill(0),
            _ => {
                let name = self.name(block, generation);
                let mut random = Random::new(name[0] ^ name[1].rotate_left(32) ^ name[2]);
                for (index, word) in into.chunks_exact_mut(8).enumerate() {
                    let value = name.get(index).copied().unwrap_or_else(|| random.next());
                    word.copy_from_slice(&value.to_le_bytes());
                }
            }
        }
        Ok(())
    }

    /// The generation that a block found on a disk claims to be; 0 where it does not bear its name.
    pub(crate) fn generation_of(&self, block: u64, bytes: &[u8]) -> u32 {
        let Some(name) = bytes.get(..NAME) else { return 0 };
        let word = |at: usize| name.get(at..).and_then(|rest| rest.first_chunk()).copied();
        let [magic, number, generation] =
            [0, 8, 16].map(|at| word(at).map_or(0, u64::from_le_bytes));
        let generation = u32::try_from(generation).unwrap_or(0);
        if [magic, number] == self.name(block, generation)[..2] { generation } else { 0 }
    }

    fn name(&self, block: u64, generation: u32) -> [u64; 3] {
        [0x7265_7369_6c76_6572 ^ self.seed, block, u64::from(generation)]
    }
}

/// What the layout says about a block.
fn stretch(layout: &[(u64, Stretch)], block: u64) -> Stretch {
    let after = layout.partition_point(|(first, _)| *first <= block);
    after.checked_sub(1).and_then(|at| layout.get(at)).map_or(Stretch::Hole, |(_, what)| *what)
}

/// Whether all bytes are zero.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt as _;

    #[test]
    fn a_block_bears_its_name_and_no_two_generations_are_equal() {
        let content = Content::generate(7, 1024);
        let (mut one, mut two) = ([0; BLOCK], [0; BLOCK]);
        content.fill(5, 3, &mut one).unwrap();
        content.fill(5, 4, &mut two).unwrap();
        assert!(one != two);
        assert_eq!(content.generation_of(5, &one), 3);
        assert_eq!(content.generation_of(6, &one), 0);
        assert_eq!(Content::generate(8, 1024).generation_of(5, &one), 0);
    }

    #[test]
    fn the_disk_that_is_made_has_the_content_and_holes() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.raw");
        let content = Content::generate(1, 4096);
        content.create(&path).unwrap();
        let file = File::open(&path).unwrap();
        let metadata = file.metadata().unwrap();
        assert_eq!(metadata.len(), content.size());
        assert!(metadata.blocks() * 512 < content.size());
        let (mut found, mut expected) = ([0; BLOCK], [0; BLOCK]);
        let mut data = 0;
        for block in 0..content.blocks() {
            file.read_exact_at(&mut found, block * BLOCK as u64).unwrap();
            content.fill(block, 0, &mut expected).unwrap();
            assert!(found == expected, "block {block}");
            data += u64::from(!is_zero(&found));
        }
        assert!(data > 0 && data < content.blocks());

        // An image's copy has its bytes, and is not larger.
        let copy = directory.path().join("copy.raw");
        Content::of_image(1, &path).unwrap().create(&copy).unwrap();
        assert!(std::fs::read(&path).unwrap() == std::fs::read(&copy).unwrap());
        assert!(std::fs::metadata(&copy).unwrap().blocks() <= metadata.blocks());
    }
}
