//! Which file or device a bdev stands for, now and after a reboot.
//!
//! A file is known by its canonical path and by its numbers: the path survives a reboot that numbers devices anew, the numbers
//! survive another spelling or a rename. A block device has neither: its canonical path is made of its number (`/dev/dm-3`,
//! `/dev/sdb`), and both are given out in the order in which devices are found. What it is known by says the kernel in sysfs,
//! if anybody does:
//!
//! | device | known by |
//! | --- | --- |
//! | device mapper (LVM, multipath, dm-crypt) | `dm/uuid` |
//! | md | `md/uuid` |
//! | loop | the path of the file behind it and where in it it begins |
//! | NVMe, SCSI | `wwid`, `device/wwid` |
//! | virtio | `serial`, which its host has given it |
//! | a partition | its disk, and its number |
//!
//! Rejected: file system labels and UUIDs, which belong to a disk's content and go with every copy of it.

use std::fs::{self, Metadata};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{major, minor};

/// Where the kernel describes block devices by their numbers.
const BLOCK_DEVICES: &str = "/sys/dev/block";

/// What file a bdev stands for, however it is spelled: the test for "the same file by another path".
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileIdentity {
    /// Device number of the file system, or of the block device itself for a block special file.
    pub device: u64,
    /// Inode number; zero for a block special file.
    pub inode: u64,
    /// The canonical path it was opened by.
    pub path: PathBuf,
    /// What a block device is known by after a reboot, `KIND:VALUE`; none if nobody says.
    pub known_by: Option<String>,
}

impl FileIdentity {
    /// That of the file at a canonical path.
    #[must_use]
    pub fn of(metadata: &Metadata, path: PathBuf) -> Self {
        if metadata.file_type().is_block_device() {
            let device = metadata.rdev();
            let number = format!("{}:{}", major(device), minor(device));
            let known_by = known_by(&Path::new(BLOCK_DEVICES).join(number));
            return Self { device, inode: 0, path, known_by };
        }
        Self { device: metadata.dev(), inode: metadata.ino(), path, known_by: None }
    }

    /// Whether both name one file now.
    #[must_use]
    pub fn same_file(&self, other: &Self) -> bool {
        self.device == other.device && self.inode == other.inode
    }
}

/// Whether two block devices, seen at different times, are one by what they are known by. None: that does not say.
#[must_use]
pub fn same_device(one: Option<&str>, other: Option<&str>) -> Option<bool> {
    let ((kind, one), (other_kind, other)) = (one?.split_once(':')?, other?.split_once(':')?);
    // Only a uuid stays what it is: a file behind a loop device may be moved, a serial given anew, and kernels have changed what they
    // make of the same disk's wwid.
    let certain = kind == other_kind && (one == other || matches!(kind, "dm" | "md"));
    certain.then_some(one == other)
}

/// What the block device that sysfs describes there is known by.
fn known_by(device: &Path) -> Option<String> {
    let read = |name: &str| {
        let text = fs::read_to_string(device.join(name)).ok()?;
        Some(text.trim().to_owned()).filter(|text| !text.is_empty())
    };
    if let Some(number) = read("partition") {
        let disk = fs::canonicalize(device).ok()?;
        let known = known_by(disk.parent()?)?;
        let (kind, value) = known.split_once(':')?;
        return Some(format!("{kind}-{number}:{value}"));
    }
    let file = || Some(format!("{} {}", read("loop/offset")?, read("loop/backing_file")?));
    let (kind, value) = None
        .or_else(|| Some(("dm", read("dm/uuid")?)))
        .or_else(|| Some(("md", read("md/uuid")?)))
        .or_else(|| Some(("loop", file()?)))
        .or_else(|| Some(("wwid", read("wwid").or_else(|| read("device/wwid"))?)))
        .or_else(|| Some(("serial", read("serial")?)))?;
    Some(format!("{kind}:{value}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_known_by_what_outlives_its_number() {
        let dir = tempfile::tempdir().unwrap();
        let put = |path: &str, text: &str| {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        put("dm-3/dm/uuid", "LVM-abc\n");
        put("dm-4/dm/uuid", "\n");
        put("md0/md/uuid", "1:2\n");
        put("loop0/loop/offset", "0\n");
        put("loop0/loop/backing_file", "/disks/a b\n");
        put("nvme0n1/wwid", "eui.0025\n");
        put("nvme0n1/nvme0n1p2/partition", "2\n");
        put("sda/device/wwid", "naa.5\n");
        put("vdb/serial", "vol-1\n");
        put("vda/serial", "");
        put("vda/vda1/partition", "1\n");
        let known = |name: &str| known_by(&dir.path().join(name));
        for (name, by) in [
            ("dm-3", "dm:LVM-abc"),
            ("md0", "md:1:2"),
            ("loop0", "loop:0 /disks/a b"),
            ("nvme0n1", "wwid:eui.0025"),
            ("nvme0n1/nvme0n1p2", "wwid-2:eui.0025"),
            ("sda", "wwid:naa.5"),
            ("vdb", "serial:vol-1"),
        ] {
            assert_eq!(known(name).as_deref(), Some(by));
        }
        for nameless in ["dm-4", "vda", "vda/vda1", "none"] {
            assert_eq!(known(nameless), None, "{nameless}");
        }
    }

    #[test]
    fn what_is_known_in_different_ways_is_not_compared() {
        let same = |one: &str, other: &str| same_device(Some(one), Some(other));
        assert_eq!(same("dm:a", "dm:a"), Some(true));
        assert_eq!(same("dm:a", "dm:b"), Some(false));
        assert_eq!(same("wwid-1:a", "wwid-2:a"), None);
        assert_eq!(
            (same("wwid:eui.1", "wwid:eui.1"), same("wwid:eui.1", "wwid:nvme.2")),
            (Some(true), None)
        );
        assert_eq!(same("serial:a", "wwid:a"), None);
        assert_eq!(same("loop:0 /a", "loop:0 /a"), Some(true));
        assert_eq!(same("loop:0 /a", "loop:0 /b"), None);
        assert_eq!((same("a", "a"), same_device(None, Some("dm:a"))), (None, None));
    }
}
