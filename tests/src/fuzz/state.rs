//! Files that somebody else may have written: a configuration, and the records of a state directory.
//!
//! Properties: what cannot be read is refused with a reason; what can be read says the same when it is written and read again;
//! records that were taken are all there, and the disks they speak of are refused.

use std::cell::OnceCell;
use std::fs;
use std::os::fd::AsRawFd as _;
use std::path::Path;

use resilver_bdev::FileIdentity;
use resilver_rpc::config::{Config, Item};
use resilver_rpc::methods::Method;
use resilver_rpc::state::StateStore;

use super::Input;
use crate::guest_memory::MemoryFile;

thread_local! {
    /// A state directory of this thread's, made once: making one takes longer than all the rest.
    static DIRECTORY: OnceCell<tempfile::TempDir> = const { OnceCell::new() };
}

fn config(text: &[u8]) {
    // A file of the kernel's own, which needs no directory and no cleaning up.
    let file = MemoryFile::new(0);
    file.put(0, text);
    let path = format!("/proc/self/fd/{}", file.fd().as_raw_fd());
    let config = match Config::read(Path::new(&path)) {
        Ok(config) => config,
        Err(error) => return assert!(!error.message.is_empty()),
    };
    let again = serde_json::to_vec(&config).expect("a configuration is JSON");
    let again: Config = serde_json::from_slice(&again).expect("what was one is one");
    assert_eq!(again, config);
    for item in config.subsystems.iter().flat_map(|it| it.config.iter().flatten()) {
        let calls = match item {
            Item::Call(call) => std::slice::from_ref(call),
            Item::Batch(calls) => calls.as_slice(),
        };
        for call in calls {
            if let Some(method) = Method::find(&call.method) {
                let _ = method.check(call.params.clone());
            }
        }
    }
}

fn records(text: &[u8], directory: &Path) {
    fs::write(directory.join("superseded.json"), text).expect("a file in our own directory");
    let store = match StateStore::open(directory) {
        Ok(store) => store,
        Err(error) => return assert!(!error.to_string().is_empty()),
    };
    for record in store.records() {
        let file = &record.superseded;
        let identity =
            FileIdentity { path: file.path.clone(), device: file.device, inode: file.inode };
        assert!(store.check(&identity).is_err(), "{record:?} does not hold");
    }
}

/// Reads one file. The first byte says which.
pub fn state(data: &[u8]) {
    let mut input = Input::new(data);
    let which = input.u8();
    let text = input.bytes(usize::MAX);
    if which & 1 == 0 {
        return config(text);
    }
    DIRECTORY.with(|directory| {
        let directory = directory.get_or_init(|| tempfile::tempdir().expect("a directory"));
        records(text, directory.path());
    });
}
