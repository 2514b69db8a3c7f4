//! Persistent bitmaps in the state directory, one file each.
//!
//! A line of JSON says which file's bitmap it is, then come its words, little-endian. While a bitmap is in use its file says
//! so and has no words; what is found like that after a crash is inconsistent, for nobody knows what was written since.

use std::fs;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::path::{Path, PathBuf};

use resilver_bdev::bitmap::Grid;
use resilver_bdev::{DirtyBitmap, FileIdentity};
use serde::{Deserialize, Serialize};

use crate::state::{DiskFile, StateError, StateStore, io_error, replace_file};

/// The subdirectory.
const DIR: &str = "bitmaps";
/// The format that this version writes and reads.
const VERSION: u32 = 1;

/// The first line of a file.
#[derive(Debug, Serialize, Deserialize)]
struct Header {
    version: u32,
    file: DiskFile,
    name: String,
    granularity: u32,
    size: u64,
    recording: bool,
    in_use: bool,
}

/// A bitmap as it was found.
pub(crate) struct StoredBitmap {
    pub(crate) name: String,
    pub(crate) bitmap: DirtyBitmap,
    /// It was in use, or cannot be read, or its file has another size now.
    pub(crate) inconsistent: bool,
}

fn read(path: &Path, size: u64) -> Option<(Header, StoredBitmap)> {
    let bytes = fs::read(path).ok()?;
    let end = bytes.iter().position(|byte| *byte == b'\n')?;
    let header: Header = serde_json::from_slice(&bytes[..end]).ok()?;
    let sane = header.version == VERSION
        && header.granularity.is_power_of_two()
        && header.granularity >= 512;
    if !sane {
        return None;
    }
    let bitmap = DirtyBitmap::new(Grid::new(size, header.granularity), header.recording);
    let (words, rest) = bytes[end + 1..].as_chunks::<8>();
    let complete = bitmap.set_words(words.iter().map(|word| u64::from_le_bytes(*word)));
    let inconsistent = header.in_use || !complete || !rest.is_empty() || header.size != size;
    if inconsistent {
        bitmap.clear();
        bitmap.set_recording(false);
    }
    let name = header.name.clone();
    Some((header, StoredBitmap { name, bitmap, inconsistent }))
}

impl StateStore {
    fn bitmap_path(&self, file: &FileIdentity, name: &str) -> Option<PathBuf> {
        let dir = self.path()?.join(DIR);
        let mut hasher = DefaultHasher::new();
        (&file.path, name).hash(&mut hasher);
        Some(dir.join(format!("{:016x}.bitmap", hasher.finish())))
    }

    /// Stores a bitmap of a file, or that it is in use; durable when it returns.
    pub(crate) fn store_bitmap(
        &self,
        file: &FileIdentity,
        name: &str,
        bitmap: &DirtyBitmap,
        in_use: bool,
    ) -> Result<(), StateError> {
        let Some(path) = self.bitmap_path(file, name) else { return Ok(()) };
        let grid = bitmap.grid();
        let header = Header {
            version: VERSION,
            file: file.into(),
            name: name.to_owned(),
            #[allow(clippy::cast_possible_truncation)] // made from 32 bits
            granularity: grid.granularity() as u32,
            size: grid.size(),
            recording: bitmap.recording(),
            in_use,
        };
        let mut bytes = serde_json::to_vec(&header)
            .map_err(|error| io_error("encoding", &path)(std::io::Error::other(error)))?;
        bytes.push(b'\n');
        if !in_use {
            bytes.extend(bitmap.words().flat_map(u64::to_le_bytes));
        }
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir).map_err(io_error("making", dir))?;
        }
        replace_file(&path, &bytes).map_err(io_error("replacing", &path))
    }

    /// The bitmaps that were stored for a file, which has so many bytes now.
    pub(crate) fn load_bitmaps(&self, file: &FileIdentity, size: u64) -> Vec<StoredBitmap> {
        let Some(dir) = self.path().map(|path| path.join(DIR)) else { return Vec::new() };
        let files = fs::read_dir(dir).into_iter().flatten().flatten();
        let found = files.filter_map(|entry| read(&entry.path(), size));
        found.filter(|(header, _)| header.file.is(file)).map(|(_, stored)| stored).collect()
    }

    /// Removes what was stored of a bitmap.
    pub(crate) fn forget_bitmap(&self, file: &FileIdentity, name: &str) {
        let Some(dir) = self.path().map(|path| path.join(DIR)) else { return };
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            let ours = read(&entry.path(), 0)
                .is_some_and(|(header, _)| header.file.is(file) && header.name == name);
            if ours && let Err(error) = fs::remove_file(entry.path()) {
                tracing::error!(bitmap = name, %error, "a stored bitmap cannot be removed");
            }
        }
    }
}
