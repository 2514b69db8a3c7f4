//! Who holds a lock on a file, for the message that refuses to open it.
//!
//! The kernel does not name the holder of an open-file-description lock (its process number reads -1), but it lists the
//! locks of each descriptor in `/proc/PID/fdinfo`. Best effort: processes of other users may be hidden.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Whoever holds a lock on `file`, in words.
pub(super) fn describe(file: &File) -> String {
    let Ok(metadata) = file.metadata() else { return "somebody has it locked".to_owned() };
    let inode = format!(":{} ", metadata.ino());
    let holders: Vec<String> = processes().filter(|pid| holds(*pid, &inode)).map(name).collect();
    if holders.is_empty() {
        "it is locked, and no process that can be seen has it open: if its user was killed, requests it left in the kernel \
         hold the lock until they end"
            .to_owned()
    } else {
        format!("locked by {}", holders.join(", "))
    }
}

fn processes() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// Whether one of the process's descriptors has a lock on the inode.
fn holds(pid: u32, inode: &str) -> bool {
    let descriptors = fs::read_dir(format!("/proc/{pid}/fdinfo")).into_iter().flatten().flatten();
    descriptors.map(|entry| entry.path()).any(|path| has_lock(&path, inode))
}

/// Lock lines read `lock: 1: OFDLCK  ADVISORY  WRITE -1 fe:00:1234 0 EOF`.
fn has_lock(fdinfo: &Path, inode: &str) -> bool {
    let Ok(text) = fs::read_to_string(fdinfo) else { return false };
    text.lines().any(|line| line.starts_with("lock:") && line.contains(inode))
}

fn name(pid: u32) -> String {
    let command = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    if pid == std::process::id() {
        return format!("this process ({pid}), as another bdev");
    }
    format!("process {pid} ({})", command.trim())
}

#[cfg(test)]
mod tests {
    use super::*;
    use resilver_sys::file::{Lock, try_lock};
    use std::os::fd::AsFd;

    #[test]
    fn the_process_that_holds_a_lock_is_named() {
        let scratch = tempfile::NamedTempFile::new().unwrap();
        let (holder, other) = (scratch.reopen().unwrap(), scratch.reopen().unwrap());
        assert!(describe(&other).contains("no process"));
        try_lock(holder.as_fd(), Lock::Exclusive).unwrap();
        assert!(describe(&other).contains(&std::process::id().to_string()));
    }
}
