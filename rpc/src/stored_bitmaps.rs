//! Persistent bitmaps in the state directory, one file each.
//!
//! A line of JSON says which file's bitmap it is, then come its words, little-endian. While a bitmap is in use its file says
//! so and has no words; what is found like that after a crash is inconsistent, for nobody knows what was written since.
//!
//! A file is named by a hash of the disk's path and the bitmap's name, the same in every version of this program; what it is about
//! is in the header. A disk that was renamed is known by its inode, and its bitmaps are renamed with it when they are loaded. A
//! path that has another inode than before is another disk in the old one's place: what was stored says nothing about it. Two
//! files about one bitmap cannot both be right, so the bitmap is inconsistent. One that is found so is marked as in use, too: its
//! disk is written without it, and what made it so (another size, a second file) may be gone at the next start.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use resilver_bdev::bitmap::Grid;
use resilver_bdev::dirty_bitmap::BITMAP_GRANULARITY_MIN;
use resilver_bdev::stable_hash::fnv1a;
use resilver_bdev::{DirtyBitmap, FileIdentity};
use rustix::fs::{CWD, RenameFlags, rename, renameat_with};
use serde::{Deserialize, Serialize};

use crate::state::{DiskFile, StateError, StateStore, io_error, replace_file};

/// The subdirectory.
const DIR: &str = "bitmaps";
/// What the names of files end with.
const EXTENSION: &str = "bitmap";
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

/// What a bitmap that was found says of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Finding {
    /// What was written to it.
    Whole,
    /// Nothing: it was in use, or is not whole, or not the only one, or its disk has another size now.
    Nothing,
    /// Nothing, and it may be about another disk, whose name or number this one has now. It is left as it is for that one.
    MaybeAnothers,
}

/// A bitmap as it was found.
pub(crate) struct StoredBitmap {
    pub(crate) name: String,
    /// Where it was found.
    path: PathBuf,
    /// Empty, and of no disk, so that it takes no room, but for a whole one.
    pub(crate) bitmap: DirtyBitmap,
    pub(crate) finding: Finding,
}

/// A file of the directory; its bitmap if that is whole.
struct BitmapFile {
    path: PathBuf,
    header: Header,
    bitmap: Option<DirtyBitmap>,
    maybe_anothers: bool,
}

/// Reads a stored bitmap, for a disk that has so many bytes now.
fn read(path: &Path, size: u64) -> Result<(Header, Option<DirtyBitmap>), String> {
    let bytes = fs::read(path).map_err(|error| error.to_string())?;
    let end = bytes.iter().position(|byte| *byte == b'\n').ok_or("it has no header")?;
    let (header, words) = bytes.split_at(end);
    let header: Header = serde_json::from_slice(header).map_err(|error| error.to_string())?;
    if header.version != VERSION {
        return Err(format!("its version is {}, this program reads {VERSION}", header.version));
    }
    if !header.granularity.is_power_of_two() || header.granularity < BITMAP_GRANULARITY_MIN {
        return Err(format!("its granularity is {}", header.granularity));
    }
    if header.in_use || header.size != size {
        return Ok((header, None));
    }
    let grid = Grid::new(size, header.granularity);
    grid.check().map_err(|expected| format!("its granularity should be {expected}"))?;
    let bitmap = DirtyBitmap::new(grid, header.recording);
    let (words, rest) = words.get(1..).unwrap_or_default().as_chunks::<8>();
    let complete = bitmap.set_words(words.iter().map(|word| u64::from_le_bytes(*word)));
    Ok((header, (complete && rest.is_empty()).then_some(bitmap)))
}

impl StateStore {
    fn bitmap_dir(&self) -> Option<PathBuf> {
        Some(self.path()?.join(DIR))
    }

    /// Where a bitmap of this file is stored. Two volumes may have exchanged their paths since a reboot, so a device goes by what it
    /// is known by.
    fn bitmap_path(&self, file: &FileIdentity, name: &str) -> Option<PathBuf> {
        let known = file.known_by.as_deref().map(str::as_bytes);
        let disk = known.unwrap_or(file.path.as_os_str().as_bytes()).iter().copied();
        let hash = fnv1a(disk.chain([0]).chain(name.bytes()));
        Some(self.bitmap_dir()?.join(format!("{hash:016x}.{EXTENSION}")))
    }

    /// The files that have a bitmap of a disk which has so many bytes now. Where one is about it for sure, none of that name that may
    /// be another disk's.
    fn bitmap_files(&self, file: &FileIdentity, size: u64) -> Vec<BitmapFile> {
        let dir = self.bitmap_dir().and_then(|dir| fs::read_dir(dir).ok());
        let paths = dir.into_iter().flatten().flatten().map(|entry| entry.path());
        let stored = paths.filter(|path| path.extension().is_some_and(|it| it == EXTENSION));
        let about_it = stored.filter_map(|path| match read(&path, size) {
            Ok((header, bitmap)) => {
                // By its number alone a device may be another one since a reboot.
                let is_device = header.file.is_device(file) == Some(true);
                let maybe_anothers =
                    !is_device && (file.inode == 0 || header.file.inode != file.inode);
                let is = header.file.is(file);
                is.then_some(BitmapFile { path, header, bitmap, maybe_anothers })
            }
            Err(reason) => {
                tracing::warn!(path = %path.display(), reason, "a stored bitmap cannot be read");
                None
            }
        });
        let (others, mut own): (Vec<_>, Vec<_>) = about_it.partition(|it| it.maybe_anothers);
        for other in others {
            if !own.iter().any(|it| !it.maybe_anothers && it.header.name == other.header.name) {
                own.push(other);
            }
        }
        own
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
        let mut found: BTreeMap<String, StoredBitmap> = BTreeMap::new();
        for BitmapFile { path, header, bitmap, maybe_anothers } in self.bitmap_files(file, size) {
            let name = header.name;
            let finding = match (maybe_anothers, &bitmap) {
                (true, _) => Finding::MaybeAnothers,
                (false, Some(_)) if !found.contains_key(&name) => Finding::Whole,
                (false, _) => Finding::Nothing,
            };
            let bitmap = bitmap
                .filter(|_| finding == Finding::Whole)
                .unwrap_or_else(|| DirtyBitmap::new(Grid::new(0, header.granularity), false));
            let stored = StoredBitmap { name: name.clone(), path, bitmap, finding };
            found.insert(name, stored);
        }
        found.into_values().collect()
    }

    /// Names a stored bitmap after what its disk is now, so that what is stored next takes its place. What has that name, a disk's
    /// with which this one has exchanged its own, gets the old one in exchange, and is found under it.
    pub(crate) fn adopt_bitmap(
        &self,
        file: &FileIdentity,
        stored: &StoredBitmap,
    ) -> Result<(), StateError> {
        let Some(path) = self.bitmap_path(file, &stored.name) else { return Ok(()) };
        if path == stored.path {
            return Ok(());
        }
        // Nobody else is in this directory, and NFS renames without flags only.
        let renamed = match path.exists() {
            true => renameat_with(CWD, &stored.path, CWD, &path, RenameFlags::EXCHANGE),
            false => rename(&stored.path, &path),
        };
        renamed.map_err(|error| io_error("renaming", &stored.path)(error.into()))
    }

    /// Removes what was stored of a bitmap.
    pub(crate) fn forget_bitmap(&self, file: &FileIdentity, name: &str) {
        let files = self.bitmap_files(file, 0);
        for BitmapFile { path, .. } in files.into_iter().filter(|it| it.header.name == name) {
            let removed = fs::remove_file(&path).and_then(|()| match path.parent() {
                Some(dir) => File::open(dir)?.sync_all(),
                None => Ok(()),
            });
            if let Err(error) = removed {
                tracing::error!(path = %path.display(), bitmap = name, %error, "a stored bitmap cannot be removed; do so before the next start, which would believe it");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 1 << 20;

    fn file(path: &str, inode: u64) -> FileIdentity {
        FileIdentity { device: 1, inode, path: path.into(), known_by: None }
    }

    fn bitmap() -> DirtyBitmap {
        let bitmap = DirtyBitmap::new(Grid::new(SIZE, 4096), true);
        bitmap.mark(8192, 4096);
        bitmap
    }

    fn store() -> (tempfile::TempDir, StateStore) {
        let dir = tempfile::tempdir().unwrap();
        let store = StateStore::open(dir.path()).unwrap();
        (dir, store)
    }

    /// Name, dirty bytes, recording and inconsistent of what is found.
    fn found(
        store: &StateStore,
        file: &FileIdentity,
        size: u64,
    ) -> Vec<(String, u64, bool, Finding)> {
        let loaded = store.load_bitmaps(file, size).into_iter();
        loaded
            .map(|it| (it.name, it.bitmap.count_bytes(), it.bitmap.recording(), it.finding))
            .collect()
    }

    #[test]
    fn what_was_stored_comes_back_for_the_same_file_whatever_it_is_called_now() {
        let (_dir, store) = store();
        let disk = file("/disks/a", 7);
        store.store_bitmap(&disk, "b", &bitmap(), false).unwrap();
        let good = vec![("b".to_owned(), 4096, true, Finding::Whole)];
        assert_eq!(found(&store, &disk, SIZE), good);
        assert_eq!(found(&store, &file("/disks/other", 8), SIZE), vec![]);
        let renumbered = FileIdentity { device: 2, ..disk.clone() };
        assert_eq!(found(&store, &renumbered, SIZE), good, "devices are numbered anew at a boot");
        let renamed = file("/disks/moved", 7);
        let loaded = store.load_bitmaps(&renamed, SIZE);
        store.adopt_bitmap(&renamed, &loaded[0]).unwrap();
        store.store_bitmap(&renamed, "b", &bitmap(), true).unwrap();
        let lost = vec![("b".to_owned(), 0, false, Finding::Nothing)];
        assert_eq!(found(&store, &renamed, SIZE), lost, "in use, and under one name only");
        store.forget_bitmap(&renamed, "b");
        assert_eq!(found(&store, &disk, SIZE), vec![]);
    }

    #[test]
    fn a_bitmap_of_a_device_is_good_where_that_is_known_to_be_the_same() {
        let (_dir, store) = store();
        let volume = |uuid: &str, number: u64| {
            let known_by = Some(format!("lvm:{uuid}"));
            FileIdentity { device: number, known_by, ..file(&format!("/dev/dm-{number}"), 0) }
        };
        store.store_bitmap(&volume("a", 3), "b", &bitmap(), false).unwrap();
        assert_eq!(
            found(&store, &volume("a", 4), SIZE),
            [("b".to_owned(), 4096, true, Finding::Whole)]
        );
        assert_eq!(found(&store, &volume("other", 3), SIZE), []);
        let nameless = FileIdentity { known_by: None, ..volume("", 3) };
        assert_eq!(
            found(&store, &nameless, SIZE),
            [("b".to_owned(), 0, false, Finding::MaybeAnothers)]
        );
        // They have exchanged their numbers.
        store.store_bitmap(&volume("other", 4), "b", &bitmap(), false).unwrap();
        for (uuid, number) in [("a", 4), ("other", 3)] {
            let now = volume(uuid, number);
            store.adopt_bitmap(&now, &store.load_bitmaps(&now, SIZE)[0]).unwrap();
            store.store_bitmap(&now, "b", &bitmap(), false).unwrap();
        }
        for (uuid, number) in [("a", 4), ("other", 3)] {
            let one = [("b".to_owned(), 4096, true, Finding::Whole)];
            assert_eq!(found(&store, &volume(uuid, number), SIZE), one, "{uuid}");
        }
    }

    #[test]
    fn what_may_be_about_another_disk_or_another_time_is_inconsistent() {
        let (dir, store) = store();
        let nothing = |finding| vec![("b".to_owned(), 0, false, finding)];
        let (disk, lost) = (file("/disks/a", 7), nothing(Finding::Nothing));
        store.store_bitmap(&disk, "b", &bitmap(), false).unwrap();
        assert_eq!(found(&store, &disk, SIZE * 2), lost, "its size has changed meanwhile");
        let another = found(&store, &file("/disks/a", 8), SIZE);
        assert_eq!(another, nothing(Finding::MaybeAnothers), "a new file in its place");
        let path = store.bitmap_path(&disk, "b").unwrap();
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..bytes.len() - 3]).unwrap();
        assert_eq!(found(&store, &disk, SIZE), lost, "cut short");
        fs::write(&path, &bytes).unwrap();
        fs::write(dir.path().join(DIR).join("0.bitmap"), &bytes).unwrap();
        assert_eq!(found(&store, &disk, SIZE), lost, "two say what it is");
        // Which stays so: the one that is loaded does not take the other's place and is believed at the next start.
        store.adopt_bitmap(&disk, &store.load_bitmaps(&disk, SIZE)[0]).unwrap();
        assert_eq!(found(&store, &disk, SIZE), lost, "they are still two");
        fs::write(&path, "not a header").unwrap();
        let found = found(&store, &disk, SIZE);
        assert_eq!(
            (found.len(), found[0].3),
            (1, Finding::Whole),
            "what cannot be read is nobody's"
        );
    }

    #[test]
    fn disks_that_exchange_their_names_keep_their_bitmaps() {
        let (_dir, store) = store();
        store.store_bitmap(&file("/disks/a", 7), "b", &bitmap(), false).unwrap();
        store.store_bitmap(&file("/disks/c", 8), "b", &bitmap(), false).unwrap();
        let good = [("b".to_owned(), 4096, true, Finding::Whole)];
        let (a, c) = (file("/disks/a", 8), file("/disks/c", 7));
        for disk in [&a, &c, &a] {
            assert_eq!(found(&store, disk, SIZE), good);
            store.adopt_bitmap(disk, &store.load_bitmaps(disk, SIZE)[0]).unwrap();
            store.store_bitmap(disk, "b", &bitmap(), false).unwrap();
        }
        store.forget_bitmap(&a, "b");
        assert_eq!(found(&store, &c, SIZE), good, "the other's is not forgotten with it");
    }

    #[test]
    fn a_granularity_that_no_bitmap_has_room_for_is_not_believed() {
        let (_dir, store) = store();
        let (disk, size) = (file("/disks/a", 7), 1 << 60);
        store.store_bitmap(&disk, "b", &bitmap(), false).unwrap();
        let path = store.bitmap_path(&disk, "b").unwrap();
        let text = String::from_utf8(fs::read(&path).unwrap()).unwrap();
        fs::write(&path, text.replace(&SIZE.to_string(), &size.to_string())).unwrap();
        assert_eq!(found(&store, &disk, size), []);
    }

    #[test]
    fn files_are_named_the_same_in_every_version() {
        let (dir, store) = store();
        let path = store.bitmap_path(&file("/disks/a", 7), "b").unwrap();
        assert_eq!(path, dir.path().join(DIR).join("74bba0020bb432b2.bitmap"));
    }
}
