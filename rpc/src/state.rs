//! The state directory: which disk was superseded by which, so that nobody serves old data after a switch-over.
//!
//! One file, `superseded.json`, holds all records. It changes as a whole: a new file is written beside it, made durable,
//! renamed over it, and the directory made durable. A crash between any two of these leaves the old records or the new
//! ones, never less. What cannot be read stops the start: to go on without would be to forget which copy is good. One file
//! for each record was rejected, because a switch back writes one record and takes another away, and the two must happen
//! at once. A lock keeps a second target from the directory.
//!
//! Without a directory the records hold for the life of the process; [`StateStore::is_durable`] tells.
//!
//! A record is found by what a block device is known by ([`resilver_bdev::identity`]), or, where that does not say, by the file's
//! canonical path or its device and inode.

use std::cell::RefCell;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use resilver_bdev::identity::same_device;
use resilver_bdev::{BdevError, FileIdentity};
use serde::{Deserialize, Serialize};

/// The file of records.
const RECORDS: &str = "superseded.json";
/// What a target locks.
const LOCK: &str = "lock";
/// The format that this version writes and reads.
const VERSION: u32 = 1;

/// One file as a record names it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskFile {
    /// Its canonical path.
    pub path: PathBuf,
    /// The device number of its file system, or its own.
    pub device: u64,
    /// Its inode number; zero for a block device.
    pub inode: u64,
    /// What a block device is known by after a reboot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub known_by: Option<String>,
}

impl DiskFile {
    pub(crate) fn is(&self, file: &FileIdentity) -> bool {
        self.is_device(file).unwrap_or_else(|| {
            self.path == file.path || (self.device == file.device && self.inode == file.inode)
        })
    }

    /// Whether it is this one beyond doubt: what a record may be taken away for. Who opens a file is refused in doubt; if what
    /// protects another were given up in doubt, that other would be served.
    fn is_surely(&self, file: &FileIdentity) -> bool {
        let both_known = self.known_by.is_some() && file.known_by.is_some();
        if both_known { self.is_device(file) == Some(true) } else { self.is(file) }
    }

    /// Whether it is this block device, whatever its number; none if nobody can say.
    pub(crate) fn is_device(&self, file: &FileIdentity) -> Option<bool> {
        same_device(self.known_by.as_deref(), file.known_by.as_deref())
    }
}

impl From<&FileIdentity> for DiskFile {
    fn from(file: &FileIdentity) -> Self {
        let FileIdentity { path, device, inode, known_by } = file.clone();
        Self { path, device, inode, known_by }
    }
}

/// A disk that holds old data since a switch-over.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// The disk that holds old data.
    pub superseded: DiskFile,
    /// The disk that has taken over.
    pub by: DiskFile,
    /// Counts the switch-overs that led here: one more than the record of the disk that was superseded had.
    pub generation: u64,
    /// The job that switched.
    pub job_id: String,
    /// When, in whole seconds since 1970: a fraction would not come back from JSON bit by bit.
    pub time: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Records {
    version: u32,
    records: Vec<Record>,
}

impl Default for Records {
    fn default() -> Self {
        Self { version: VERSION, records: Vec::new() }
    }
}

/// Why the state directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// A file or directory could not be read or written.
    #[error("state directory: {action} '{path}' failed: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The path.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// The records could neither be replaced nor put back for certain.
    #[error("{0}; whether the records are the new ones or the old is not known")]
    Uncertain(Box<StateError>),
    /// The records make no sense.
    #[error(
        "'{path}' cannot be read ({reason}): without it there is no telling which disks hold old data; restore it, or move \
         it away if you know that none was superseded"
    )]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Another target uses the directory.
    #[error("state directory '{0}' is used by another target; stop it or name another directory")]
    InUse(PathBuf),
}

/// Attaches what was tried to an error of the operating system.
pub(crate) fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StateError {
    let path = path.to_owned();
    move |source| StateError::Io { action, path, source }
}

/// The directory, locked.
#[derive(Debug)]
struct StateDir {
    path: PathBuf,
    /// Held for the life of the store.
    lock: File,
    /// Makes a renaming in it durable.
    sync: SyncDir,
}

/// Makes what was changed in a directory durable.
type SyncDir = fn(&Path) -> io::Result<()>;

fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

impl Drop for StateDir {
    /// Closing is not enough: whoever looks at this process's descriptors in `/proc` at that moment, as the search for a
    /// file's holder does, keeps the open file and with it the lock for a moment longer.
    fn drop(&mut self) {
        // If it fails the close that follows releases it.
        let _ = self.lock.unlock();
    }
}

/// The records, in memory and, with a directory, on disk. What is in memory is what is on disk.
#[derive(Debug, Default)]
pub struct StateStore {
    dir: Option<Arc<StateDir>>,
    records: RefCell<Records>,
    /// Held from reading the records to having written them: two jobs may switch at one time.
    changing: tokio::sync::Mutex<()>,
    /// What [`StateStore::retract`] goes back to.
    undos: RefCell<Vec<Undo>>,
}

/// How a job's records are taken back.
#[derive(Debug, Clone)]
struct Undo {
    job_id: String,
    before: Records,
    sources: Vec<FileIdentity>,
    targets: Vec<FileIdentity>,
}

impl StateStore {
    /// Opens a directory, making it if need be.
    ///
    /// # Errors
    /// It cannot be made, locked or read, or its records make no sense.
    pub fn open(path: &Path) -> Result<Self, StateError> {
        Self::open_with(path, sync_dir)
    }

    fn open_with(path: &Path, sync: SyncDir) -> Result<Self, StateError> {
        fs::create_dir_all(path).map_err(io_error("making", path))?;
        let path = fs::canonicalize(path).map_err(io_error("finding", path))?;
        let lock_path = path.join(LOCK);
        let lock = File::options().create(true).truncate(false).write(true).open(&lock_path);
        let lock = lock.map_err(io_error("opening", &lock_path))?;
        lock.try_lock().map_err(|error| match error {
            fs::TryLockError::WouldBlock => StateError::InUse(path.clone()),
            fs::TryLockError::Error(error) => io_error("locking", &lock_path)(error),
        })?;
        let records = read_records(&path.join(RECORDS))?;
        let dir = Arc::new(StateDir { path, lock, sync });
        Ok(Self { dir: Some(dir), records: records.into(), ..Self::default() })
    }

    /// The directory, if there is one.
    pub(crate) fn path(&self) -> Option<&Path> {
        self.dir.as_ref().map(|dir| dir.path.as_path())
    }

    /// Whether records outlive the process.
    #[must_use]
    pub fn is_durable(&self) -> bool {
        self.dir.is_some()
    }

    /// All records.
    #[must_use]
    pub fn records(&self) -> Vec<Record> {
        self.records.borrow().records.clone()
    }

    /// Refuses a file that was superseded.
    ///
    /// # Errors
    /// It was.
    pub fn check(&self, file: &FileIdentity) -> Result<(), BdevError> {
        match self.records.borrow().records.iter().find(|record| record.superseded.is(file)) {
            None => Ok(()),
            Some(record) => Err(BdevError::Superseded {
                path: file.path.clone(),
                by: record.by.path.clone(),
                generation: record.generation,
            }),
        }
    }

    /// Writes that the files of `sources` are superseded by those of `targets`, and that the latter, should any have been
    /// superseded before, hold the newest data now: one record for each file of the source, which names the first of the
    /// target. Durable when it returns, where there is a directory.
    ///
    /// Disks without files (memory) leave nothing behind that a restart could serve by mistake: there is nothing to write
    /// if either side has none.
    ///
    /// # Errors
    /// The records could not be written; nothing has changed, unless that is [uncertain](StateError::Uncertain): then they are to be
    /// retracted.
    pub async fn supersede(
        &self,
        sources: &[FileIdentity],
        targets: &[FileIdentity],
        job_id: &str,
    ) -> Result<(), StateError> {
        let (Some(by), false) = (targets.first(), sources.is_empty()) else { return Ok(()) };
        let _changing = self.changing.lock().await;
        let before = self.records.borrow().clone();
        let mut after = before.clone();
        let among = |disk: &DiskFile, files: &[FileIdentity]| files.iter().any(|it| disk.is(it));
        let known = before
            .records
            .iter()
            .filter(|it| among(&it.by, sources) || among(&it.superseded, targets));
        let generation = known.map(|it| it.generation).max().unwrap_or(0) + 1;
        let surely =
            |disk: &DiskFile, files: &[FileIdentity]| files.iter().any(|it| disk.is_surely(it));
        after
            .records
            .retain(|it| !surely(&it.superseded, targets) && !surely(&it.superseded, sources));
        let time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        after.records.extend(sources.iter().map(|source| Record {
            superseded: source.into(),
            by: by.into(),
            generation,
            job_id: job_id.to_owned(),
            time,
        }));
        let written = self.replace(after.clone()).await;
        match &written {
            Ok(()) => {}
            // Who asks meanwhile is refused a disk that need not be.
            Err(StateError::Uncertain(_)) => *self.records.borrow_mut() = after,
            Err(_) => return written,
        }
        let undo = Undo {
            job_id: job_id.to_owned(),
            before,
            sources: sources.to_vec(),
            targets: targets.to_vec(),
        };
        self.settled(job_id);
        self.undos.borrow_mut().push(undo);
        written
    }

    /// Takes back what [`StateStore::supersede`] wrote for this job, and brings back what it took away.
    ///
    /// # Errors
    /// The records could not be written; nothing has changed.
    pub async fn retract(&self, job_id: &str) -> Result<(), StateError> {
        let _changing = self.changing.lock().await;
        let found = self.undos.borrow().iter().find(|undo| undo.job_id == job_id).cloned();
        let Some(Undo { before, sources, targets, .. }) = found else { return Ok(()) };
        let mut after = self.records.borrow().clone();
        let superseded = |record: &Record, files: &[FileIdentity]| {
            files.iter().any(|file| record.superseded.is_surely(file))
        };
        let count = after.records.len();
        after.records.retain(|it| it.job_id != job_id || !superseded(it, &sources));
        if after.records.len() == count {
            return Ok(());
        }
        // Other jobs may have switched meanwhile: only what this one took away comes back.
        let ours = |old: &&Record| superseded(old, &sources) || superseded(old, &targets);
        after.records.extend(before.records.iter().filter(ours).cloned());
        self.replace(after).await?;
        self.settled(job_id);
        Ok(())
    }

    /// The job has ended: its record stands.
    pub fn settled(&self, job_id: &str) {
        self.undos.borrow_mut().retain(|undo| undo.job_id != job_id);
    }

    /// Removes the record that a disk was superseded; false if there was none. `path` may be spelled in any way, and the file may be gone.
    ///
    /// # Errors
    /// The records could not be written; nothing has changed.
    pub async fn forget(&self, path: &Path) -> Result<bool, StateError> {
        let identity = identify(path).ok();
        let _changing = self.changing.lock().await;
        let mut after = self.records.borrow().clone();
        let count = after.records.len();
        after.records.retain(|record| {
            let same = identity.as_ref().is_some_and(|file| record.superseded.is(file));
            // What was called so when it was superseded may be called otherwise now, and another device so.
            let known = identity.as_ref().is_some_and(|file| file.known_by.is_some());
            !same && (known || record.superseded.path != path)
        });
        if after.records.len() == count {
            return Ok(false);
        }
        self.replace(after).await?;
        Ok(true)
    }

    async fn replace(&self, records: Records) -> Result<(), StateError> {
        if let Some(dir) = self.dir.clone() {
            let (old, new) = (self.records.borrow().clone(), records.clone());
            let write = tokio::task::spawn_blocking(move || {
                let (renamed, error) = match write_records(&dir, &new) {
                    Ok(()) => return Ok(()),
                    Err(failed) => failed,
                };
                // Of a write that failed after its renaming, the new records may be what a crash leaves: put the old ones back.
                let certain = !renamed || write_records(&dir, &old).is_ok();
                Err(if certain { error } else { StateError::Uncertain(Box::new(error)) })
            });
            write.await.unwrap_or_else(|_| {
                let stopping = io::Error::other("the process is stopping");
                let error = io_error("writing", Path::new(RECORDS))(stopping);
                Err(StateError::Uncertain(Box::new(error)))
            })?;
        }
        *self.records.borrow_mut() = records;
        Ok(())
    }
}

fn read_records(path: &Path) -> Result<Records, StateError> {
    let corrupt = |reason: String| StateError::Corrupt { path: path.to_owned(), reason };
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Records::default()),
        Err(error) => return Err(io_error("reading", path)(error)),
    };
    let records: Records =
        serde_json::from_slice(&text).map_err(|error| corrupt(error.to_string()))?;
    if records.version == VERSION {
        Ok(records)
    } else {
        Err(corrupt(format!("its version is {}, this program reads {VERSION}", records.version)))
    }
}

/// Replaces the records on disk, durably. Of a failure also says whether the new ones are there all the same, for now.
fn write_records(dir: &StateDir, records: &Records) -> Result<(), (bool, StateError)> {
    let path = dir.path.join(RECORDS);
    let mut text = serde_json::to_vec_pretty(records)
        .map_err(|error| (false, io_error("encoding", &path)(io::Error::other(error))))?;
    text.push(b'\n');
    replace(&path, &text, dir.sync)
        .map_err(|(renamed, error)| (renamed, io_error("replacing", &path)(error)))
}

/// Replaces a file as a whole, durably: what was there before, or all of `text`, survives a crash.
///
/// # Errors
/// The file system's.
pub(crate) fn replace_file(path: &Path, text: &[u8]) -> io::Result<()> {
    replace(path, text, sync_dir).map_err(|(_, error)| error)
}

/// The same; says of a failure whether `text` is there already, though not durably.
fn replace(path: &Path, text: &[u8], sync: SyncDir) -> Result<(), (bool, io::Error)> {
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    let prepare = || {
        let mut file = File::create(&new)?;
        file.write_all(text)?;
        file.sync_all()?;
        fs::rename(&new, path)
    };
    prepare().map_err(|error| {
        // On a disk that is full it would keep the next attempt from its room.
        let _ = fs::remove_file(&new);
        (false, error)
    })?;
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    sync(dir).map_err(|error| (true, error))
}

/// Which file a path means.
///
/// # Errors
/// It cannot be found.
pub fn identify(path: &Path) -> io::Result<FileIdentity> {
    let path = fs::canonicalize(path)?;
    let metadata = fs::metadata(&path)?;
    Ok(FileIdentity::of(&metadata, path))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    /// Where a write prepares the records.
    const RECORDS_NEW: &str = "superseded.json.new";

    fn file(number: u64) -> FileIdentity {
        let path = format!("/disks/{number}").into();
        FileIdentity { device: 1, inode: number, path, known_by: None }
    }

    /// A logical volume, whose number and path are those that it has got at this boot.
    fn volume(uuid: &str, number: u64) -> FileIdentity {
        let (path, known_by) = (format!("/dev/dm-{number}").into(), Some(format!("lvm:{uuid}")));
        FileIdentity { device: 253 << 8 | number, inode: 0, path, known_by }
    }

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
    }

    fn generation(store: &StateStore, number: u64) -> Option<u64> {
        match store.check(&file(number)) {
            Err(BdevError::Superseded { generation, .. }) => Some(generation),
            Err(other) => panic!("{other}"),
            Ok(()) => None,
        }
    }

    #[test]
    fn a_superseded_disk_is_refused_after_a_restart_by_path_and_by_number() {
        let dir = tempfile::tempdir().unwrap();
        let store = StateStore::open(dir.path()).unwrap();
        block_on(store.supersede(&[file(1)], &[file(2)], "job")).unwrap();
        drop(store);
        let store = StateStore::open(dir.path()).unwrap();
        assert_eq!((generation(&store, 1), generation(&store, 2)), (Some(1), None));
        let renamed = FileIdentity { path: "/elsewhere".into(), ..file(1) };
        let renumbered = FileIdentity { device: 9, inode: 9, ..file(1) };
        assert!(store.check(&renamed).is_err());
        assert!(store.check(&renumbered).is_err());
    }

    #[test]
    fn records_that_may_be_there_are_there_until_they_are_taken_back() {
        static FAILS: AtomicBool = AtomicBool::new(true);
        fn sync(_: &Path) -> io::Result<()> {
            if FAILS.load(Ordering::Relaxed) { Err(io::Error::other("read-only")) } else { Ok(()) }
        }
        let dir = tempfile::tempdir().unwrap();
        let store = StateStore::open_with(dir.path(), sync).unwrap();
        let written = block_on(store.supersede(&[file(1)], &[file(2)], "job"));
        assert!(matches!(written, Err(StateError::Uncertain(_))), "{written:?}");
        assert_eq!(generation(&store, 1), Some(1));
        for _ in 0..2 {
            assert!(block_on(store.retract("job")).is_err());
            assert_eq!(generation(&store, 1), Some(1), "it is asked for again");
        }
        FAILS.store(false, Ordering::Relaxed);
        block_on(store.retract("job")).unwrap();
        assert_eq!(generation(&store, 1), None);
        drop(store);
        assert_eq!(generation(&StateStore::open(dir.path()).unwrap(), 1), None);
    }

    #[test]
    fn a_record_is_taken_away_only_for_what_is_certainly_its_disk() {
        let dir = tempfile::tempdir().unwrap();
        let store = StateStore::open(dir.path()).unwrap();
        // The order in which disks are found has changed, and the target has the place that the other disk had.
        let sdb = |wwid: &str| FileIdentity {
            path: "/dev/sdb".into(),
            device: 8,
            inode: 0,
            known_by: Some(format!("wwid:{wwid}")),
        };
        let moved = FileIdentity { path: "/dev/sdd".into(), device: 9, ..sdb("old") };
        block_on(store.supersede(&[sdb("old")], &[file(1)], "first")).unwrap();
        block_on(store.supersede(&[file(2)], &[sdb("new")], "second")).unwrap();
        assert!(store.check(&moved).is_err());
        block_on(store.retract("second")).unwrap();
        assert_eq!(store.records().len(), 1);
        block_on(store.supersede(&[file(2)], std::slice::from_ref(&moved), "third")).unwrap();
        assert!(store.check(&moved).is_ok());
    }

    #[test]
    fn a_superseded_device_is_refused_whatever_its_number_and_no_other_that_has_it_now() {
        let dir = tempfile::tempdir().unwrap();
        let store = StateStore::open(dir.path()).unwrap();
        block_on(store.supersede(&[volume("old", 3)], &[volume("new", 7)], "job")).unwrap();
        drop(store);
        let store = StateStore::open(dir.path()).unwrap();
        assert!(store.check(&volume("old", 5)).is_err());
        assert!(store.check(&volume("new", 3)).is_ok() && store.check(&volume("other", 3)).is_ok());
        // One that nobody knows by anything else is refused where it might be.
        assert!(store.check(&FileIdentity { known_by: None, ..volume("", 3) }).is_err());
    }

    #[test]
    fn a_switch_back_takes_the_old_record_away_and_counts_on() {
        let store = StateStore::default();
        block_on(store.supersede(&[file(1)], &[file(2)], "there")).unwrap();
        block_on(store.supersede(&[file(2)], &[file(1)], "back")).unwrap();
        assert_eq!((generation(&store, 1), generation(&store, 2)), (None, Some(2)));
    }

    #[test]
    fn every_file_below_the_old_disk_is_recorded_and_every_one_below_the_new_is_cleared() {
        let store = StateStore::default();
        block_on(store.supersede(&[file(1)], &[file(9)], "first")).unwrap();
        store.settled("first");
        let before = store.records();
        block_on(store.supersede(&[file(3), file(4)], &[file(2), file(1)], "job")).unwrap();
        let now = [1, 2, 3, 4].map(|number| generation(&store, number));
        assert_eq!(now, [None, None, Some(2), Some(2)]);
        block_on(store.retract("job")).unwrap();
        assert_eq!(store.records(), before);
        block_on(store.supersede(&[file(3)], &[], "memory")).unwrap();
        assert_eq!(store.records(), before);
    }

    #[test]
    fn a_retracted_switch_leaves_what_was_before() {
        let dir = tempfile::tempdir().unwrap();
        let store = StateStore::open(dir.path()).unwrap();
        block_on(store.supersede(&[file(1)], &[file(2)], "there")).unwrap();
        store.settled("there");
        let before = store.records();
        block_on(store.supersede(&[file(2)], &[file(1)], "back")).unwrap();
        block_on(store.supersede(&[file(7)], &[file(8)], "other")).unwrap();
        block_on(store.retract("back")).unwrap();
        block_on(store.retract("back")).unwrap();
        block_on(store.retract("other")).unwrap();
        assert_eq!(store.records(), before);
        drop(store);
        assert_eq!(StateStore::open(dir.path()).unwrap().records(), before);
    }

    #[test]
    fn forgetting_takes_any_spelling_and_a_file_that_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        fs::write(&path, "").unwrap();
        let store = StateStore::default();
        block_on(store.supersede(&[identify(&path).unwrap()], &[file(2)], "job")).unwrap();
        let spelled = dir.path().join(".").join("..").join(dir.path()).join("disk");
        assert!(block_on(store.forget(&spelled)).unwrap());
        assert!(!block_on(store.forget(&spelled)).unwrap());
        block_on(store.supersede(&[file(1)], &[file(2)], "job")).unwrap();
        assert!(block_on(store.forget(Path::new("/disks/1"))).unwrap());
    }

    /// The steps of a write, each cut off at every byte where it writes: what a start finds afterwards is the old records
    /// or the new.
    #[test]
    fn a_crash_between_any_two_steps_of_a_write_leaves_the_old_records_or_the_new() {
        let dir = tempfile::tempdir().unwrap();
        let open = || StateStore::open(dir.path()).map(|store| store.records());
        let store = StateStore::open(dir.path()).unwrap();
        block_on(store.supersede(&[file(1)], &[file(2)], "first")).unwrap();
        let (old, old_text) = (store.records(), fs::read(dir.path().join(RECORDS)).unwrap());
        block_on(store.supersede(&[file(3)], &[file(4)], "second")).unwrap();
        let (new, new_text) = (store.records(), fs::read(dir.path().join(RECORDS)).unwrap());
        drop(store);
        for written in 0..=new_text.len() {
            fs::write(dir.path().join(RECORDS), &old_text).unwrap();
            fs::write(dir.path().join(RECORDS_NEW), &new_text[..written]).unwrap();
            assert_eq!(open().unwrap(), old, "cut off after {written} bytes");
        }
        fs::rename(dir.path().join(RECORDS_NEW), dir.path().join(RECORDS)).unwrap();
        assert_eq!(open().unwrap(), new);
    }

    #[test]
    fn records_that_make_no_sense_stop_the_start() {
        let dir = tempfile::tempdir().unwrap();
        for text in ["", "{", r#"{"version":2,"records":[]}"#] {
            fs::write(dir.path().join(RECORDS), text).unwrap();
            assert!(
                matches!(StateStore::open(dir.path()), Err(StateError::Corrupt { .. })),
                "{text}"
            );
        }
    }

    #[test]
    fn a_second_target_is_kept_out() {
        let dir = tempfile::tempdir().unwrap();
        let first = StateStore::open(dir.path()).unwrap();
        assert!(matches!(StateStore::open(dir.path()), Err(StateError::InUse(_))));
        drop(first);
        assert!(StateStore::open(dir.path()).is_ok());
    }

    #[test]
    fn the_directory_is_free_at_once_even_while_somebody_looks_at_the_open_lock() {
        let dir = tempfile::tempdir().unwrap();
        let store = StateStore::open(dir.path()).unwrap();
        let looked_at = store.dir.as_ref().unwrap().lock.try_clone().unwrap();
        drop(store);
        assert!(StateStore::open(dir.path()).is_ok());
        drop(looked_at);
    }

    #[test]
    fn a_record_that_cannot_be_written_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let store = StateStore::open(dir.path()).unwrap();
        fs::create_dir(dir.path().join(RECORDS_NEW)).unwrap();
        assert!(block_on(store.supersede(&[file(1)], &[file(2)], "job")).is_err());
        assert_eq!(generation(&store, 1), None);
    }
}
