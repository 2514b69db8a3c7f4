//! Which file or device a bdev stands for, now and after a reboot.
//!
//! A file is known by its canonical path and by its numbers: the path survives a reboot that numbers devices anew, the numbers
//! survive another spelling or a rename. A block device has neither: its canonical path is made of its number (`/dev/dm-3`,
//! `/dev/sdb`), and both are given out in the order in which devices are found. What it is known by says the kernel in sysfs,
//! if anybody does:
//!
//! | device | known by |
//! | --- | --- |
//! | LVM | the second half of `dm/uuid`, which is the volume's; the first is its group's, and volumes move between groups |
//! | other device mapper (multipath, LUKS) | `dm/uuid` |
//! | md | `md/uuid`, where its metadata are md's own: others leave it zero, or make one up |
//! | loop | the file behind it, by path and inode, and where in it it begins |
//! | NVMe, SCSI | `wwid`, `device/wwid` |
//! | virtio | `serial`, which its host has given it |
//! | a partition | its disk, and its number |
//!
//! Rejected: file system labels and UUIDs, which belong to a disk's content and go with every copy of it; the `dm/uuid` of plain
//! dm-crypt, which is the name that its operator gave it.

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
    // make of the same disk's wwid, which is multipath's uuid, too. That of LUKS has the name in it.
    let certain = kind == other_kind && (one == other || matches!(kind, "lvm" | "md"));
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
    let mapped = || mapped_by(&read("dm/uuid")?);
    let array = || {
        let own = read("md/metadata_version")?.starts_with(|it: char| it.is_ascii_digit());
        read("md/uuid")
            .filter(|uuid| own && uuid.contains(|it: char| it.is_ascii_hexdigit() && it != '0'))
    };
    let file = || {
        let path = read("loop/backing_file")?;
        let inode = fs::metadata(&path).ok()?.ino();
        Some(format!("{} {inode} {path}", read("loop/offset")?))
    };
    let (kind, value) = None
        .or_else(mapped)
        .or_else(|| Some(("md", array()?)))
        .or_else(|| Some(("loop", file()?)))
        .or_else(|| Some(("wwid", read("wwid").or_else(|| read("device/wwid"))?)))
        .or_else(|| Some(("serial", read("serial")?)))?;
    Some(format!("{kind}:{value}"))
}

/// Characters of LVM's uuid of a volume group, behind `LVM-`; that of the volume follows.
const GROUP: usize = 32;

/// Kind and value of what device mapper knows a device by.
fn mapped_by(uuid: &str) -> Option<(&'static str, String)> {
    if uuid.starts_with("CRYPT-PLAIN-") || uuid.starts_with("CRYPT-TEMP-") {
        return None;
    }
    match uuid.strip_prefix("LVM-").and_then(|uuid| uuid.get(GROUP..)) {
        Some(volume) if !volume.is_empty() => Some(("lvm", volume.to_owned())),
        Some(_) | None => Some(("dm", uuid.to_owned())),
    }
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
        put("dm-3/dm/uuid", &format!("LVM-{}abc-real\n", "g".repeat(GROUP)));
        put("dm-4/dm/uuid", "\n");
        put("dm-5/dm/uuid", "CRYPT-LUKS2-0123-vm\n");
        put("dm-6/dm/uuid", "CRYPT-PLAIN-vm\n");
        put("dm-7/dm/uuid", "LVM-short\n");
        for (array, format, uuid) in [
            ("md0", "1.2", "00000000-0000-0000-0000-00000000000a"),
            ("md1", "external:imsm", "00000000-0000-0000-0000-00000000000a"),
            ("md2", "1.2", "00000000-0000-0000-0000-000000000000"),
            ("md3", "none", "00000000-0000-0000-0000-00000000000a"),
        ] {
            put(&format!("{array}/md/metadata_version"), format);
            put(&format!("{array}/md/uuid"), uuid);
        }
        let file = dir.path().join("a b");
        fs::write(&file, "").unwrap();
        let inode = fs::metadata(&file).unwrap().ino();
        for (device, file) in [("loop0", file.to_str().unwrap()), ("loop1", "/gone (deleted)")] {
            put(&format!("{device}/loop/offset"), "0\n");
            put(&format!("{device}/loop/backing_file"), file);
        }
        put("nvme0n1/wwid", "eui.0025\n");
        put("nvme0n1/nvme0n1p2/partition", "2\n");
        put("sda/device/wwid", "naa.5\n");
        put("vdb/serial", "vol-1\n");
        put("vda/serial", "");
        put("vda/vda1/partition", "1\n");
        let known = |name: &str| known_by(&dir.path().join(name));
        for (name, by) in [
            ("dm-3", "lvm:abc-real"),
            ("dm-5", "dm:CRYPT-LUKS2-0123-vm"),
            ("dm-7", "dm:LVM-short"),
            ("md0", "md:00000000-0000-0000-0000-00000000000a"),
            ("loop0", &format!("loop:0 {inode} {}", file.display())),
            ("nvme0n1", "wwid:eui.0025"),
            ("nvme0n1/nvme0n1p2", "wwid-2:eui.0025"),
            ("sda", "wwid:naa.5"),
            ("vdb", "serial:vol-1"),
        ] {
            assert_eq!(known(name).as_deref(), Some(by));
        }
        for nameless in ["dm-4", "dm-6", "md1", "md2", "md3", "loop1", "vda", "vda/vda1", "none"] {
            assert_eq!(known(nameless), None, "{nameless}");
        }
    }

    #[test]
    fn what_is_known_in_different_ways_is_not_compared() {
        let same = |one: &str, other: &str| same_device(Some(one), Some(other));
        assert_eq!(same("dm:a", "dm:a"), Some(true));
        assert_eq!((same("lvm:a", "lvm:b"), same("md:a", "md:b")), (Some(false), Some(false)));
        assert_eq!(same("dm:CRYPT-LUKS2-u-a", "dm:CRYPT-LUKS2-u-b"), None);
        assert_eq!(same("dm:mpath-1", "dm:mpath-2"), None);
        assert_eq!(same("wwid-1:a", "wwid-2:a"), None);
        assert_eq!(
            (same("wwid:eui.1", "wwid:eui.1"), same("wwid:eui.1", "wwid:nvme.2")),
            (Some(true), None)
        );
        assert_eq!(same("serial:a", "wwid:a"), None);
        assert_eq!(same("loop:0 /a", "loop:0 /a"), Some(true));
        assert_eq!(same("loop:0 /a", "loop:0 /b"), None);
        assert_eq!((same("a", "a"), same_device(None, Some("lvm:a"))), (None, None));
    }
}
