//! What the end-to-end tests ask of the machine: programs, and the comparison of files.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

/// The first of the programs that is not installed.
pub fn missing<'a>(programs: &[&'a str]) -> Option<&'a str> {
    let found = |program: &&str| {
        let paths = std::env::var_os("PATH").unwrap_or_default();
        let extra = ["/sbin", "/usr/sbin"].map(PathBuf::from);
        std::env::split_paths(&paths).chain(extra).any(|path| path.join(program).exists())
    };
    programs.iter().copied().find(|program| !found(program))
}

/// The first byte at which two files differ, their lengths included.
///
/// # Panics
/// If one cannot be read.
pub fn first_difference(one: &Path, other: &Path) -> Option<u64> {
    const CHUNK: usize = 1 << 20;
    let open = |path: &Path| {
        File::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    };
    let (one, other) = (open(one), open(other));
    let (length, other_length) = (one.metadata().unwrap().len(), other.metadata().unwrap().len());
    let (mut left, mut right) = (vec![0; CHUNK], vec![0; CHUNK]);
    let mut at = 0;
    while at < length.min(other_length) {
        let count = (length.min(other_length) - at).min(CHUNK as u64) as usize;
        one.read_exact_at(&mut left[..count], at).unwrap();
        other.read_exact_at(&mut right[..count], at).unwrap();
        if left[..count] != right[..count] {
            let differs = left.iter().zip(&right).position(|(left, right)| left != right);
            return Some(at + differs.unwrap_or(0) as u64);
        }
        at += count as u64;
    }
    (length != other_length).then_some(at)
}
