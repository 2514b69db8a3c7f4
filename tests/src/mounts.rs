//! Real file systems and block devices of a test's own, undone when dropped. They need root; [`available`] says so aloud.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::skip;

/// Whether this process may mount things; if not, `test` is skipped aloud.
#[must_use]
pub fn available(test: &str) -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        skip(test, "mounting needs root", "run the tests as root");
    }
    root
}

/// Runs a command to its end.
///
/// # Panics
/// If it cannot be run, or fails: with what it said.
pub fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("{program} cannot be run: {error}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?} failed: {said}");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// A loop device over a new sparse file.
pub struct LoopDevice {
    device: PathBuf,
    directory: tempfile::TempDir,
}

impl LoopDevice {
    /// A device of `size` bytes in sectors of `sector` bytes.
    ///
    /// # Panics
    /// If losetup fails.
    #[must_use]
    pub fn new(size: u64, sector: u32) -> Self {
        let directory = tempfile::tempdir().expect("a scratch directory");
        let file = directory.path().join("medium");
        let made = std::fs::File::create(&file).and_then(|file| file.set_len(size));
        made.expect("a scratch file");
        let file = file.to_str().expect("a path in UTF-8");
        let device = run("losetup", &["-f", "--show", "-b", &sector.to_string(), file]);
        Self { device: PathBuf::from(device), directory }
    }

    /// `/dev/loopN`.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.device
    }

    /// The file behind the device.
    #[must_use]
    pub fn medium(&self) -> PathBuf {
        self.directory.path().join("medium")
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.device).status();
    }
}

/// A mounted file system.
pub struct Mount {
    directory: tempfile::TempDir,
    /// Undone after the mount.
    _device: Option<LoopDevice>,
}

impl Mount {
    /// An ext4 of `size` bytes.
    ///
    /// # Panics
    /// If mkfs or mount fails.
    #[must_use]
    pub fn ext4(size: u64) -> Self {
        let device = LoopDevice::new(size, 512);
        let path = device.path().to_str().expect("a path in UTF-8");
        run("mkfs.ext4", &["-q", "-O", "^has_journal", "-m", "0", path]);
        let directory = tempfile::tempdir().expect("a scratch directory");
        run("mount", &[path, directory.path().to_str().expect("a path in UTF-8")]);
        Self { directory, _device: Some(device) }
    }

    /// An XFS of `size` bytes, at least 300 MiB, whose files can share extents or not.
    ///
    /// # Panics
    /// If mkfs or mount fails.
    #[must_use]
    pub fn xfs(size: u64, shares: bool) -> Self {
        let device = LoopDevice::new(size, 512);
        let path = device.path().to_str().expect("a path in UTF-8");
        let reflink = format!("reflink={}", u8::from(shares));
        run("mkfs.xfs", &["-q", "-m", &reflink, path]);
        let directory = tempfile::tempdir().expect("a scratch directory");
        run("mount", &[path, directory.path().to_str().expect("a path in UTF-8")]);
        Self { directory, _device: Some(device) }
    }

    /// A tmpfs of `size` bytes.
    ///
    /// # Panics
    /// If mount fails.
    #[must_use]
    pub fn tmpfs(size: u64) -> Self {
        let directory = tempfile::tempdir().expect("a scratch directory");
        let place = directory.path().to_str().expect("a path in UTF-8");
        run("mount", &["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs", place]);
        Self { directory, _device: None }
    }

    /// A ramfs, which has no direct I/O.
    ///
    /// # Panics
    /// If mount fails.
    #[must_use]
    pub fn ramfs() -> Self {
        let directory = tempfile::tempdir().expect("a scratch directory");
        run(
            "mount",
            &["-t", "ramfs", "ramfs", directory.path().to_str().expect("a path in UTF-8")],
        );
        Self { directory, _device: None }
    }

    /// Where it is mounted.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.directory.path()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // Lazily: a test that failed may still have a file open there.
        let _ = Command::new("umount").arg("-l").arg(self.directory.path()).status();
    }
}

/// A file system whose writes hang until this is dropped: a hung disk as real as they come.
pub struct Frozen(PathBuf);

impl Frozen {
    /// Freezes the file system at `place`. Drop it before the mount.
    ///
    /// # Panics
    /// If fsfreeze fails.
    #[must_use]
    pub fn new(place: &Path) -> Self {
        run("fsfreeze", &["-f", place.to_str().expect("a path in UTF-8")]);
        Self(place.to_owned())
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let _ = Command::new("fsfreeze").arg("-u").arg(&self.0).status();
    }
}
