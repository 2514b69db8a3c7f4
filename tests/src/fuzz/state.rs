//! Files that somebody else may have written: a configuration, the records of a state directory, the state of a device.
//!
//! Properties: what cannot be read is refused with a reason; what can be read says the same when it is written and read again;
//! records that were taken are all there, and the disks they speak of are refused; a device state with a changed byte is
//! refused.

use std::cell::OnceCell;
use std::fs;
use std::os::fd::AsRawFd as _;
use std::path::Path;

use resilver_bdev::FileIdentity;
use resilver_rpc::config::{Config, Item};
use resilver_rpc::methods::Method;
use resilver_rpc::state::{DiskFile, StateStore};

use resilver_vhost::blk::{BlkDevice, CacheMode, Serial};
use resilver_vhost::device_state::{DeviceState, STATE_BYTES};
use resilver_vhost::protocol::SERIAL_BYTES;

use super::Input;
use super::bench::LIMITS;
use crate::guest_memory::MemoryFile;

const DEVICE: BlkDevice = BlkDevice {
    limits: LIMITS,
    read_only: false,
    num_queues: 1,
    packed_ring: false,
    postcopy: false,
};

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
        let DiskFile { path, device, inode, known_by } = record.superseded.clone();
        let identity = FileIdentity { path, device, inode, known_by };
        assert!(store.check(&identity).is_err(), "{record:?} does not hold");
    }
}

fn device(text: &[u8]) {
    if let Err(error) = DeviceState::decode(text) {
        assert!(!error.to_string().is_empty());
    }
    // No input guesses a checksum: what the bytes would say, they say in a state that is whole.
    let mut input = Input::new(text);
    let (at, change) = (usize::from(input.u8()) % STATE_BYTES, input.u8());
    let mut serial = Serial([0; SERIAL_BYTES]);
    let given = input.bytes(SERIAL_BYTES);
    serial.0[..given.len()].copy_from_slice(given);
    let state = DeviceState {
        block_size: input.u32(),
        capacity: input.u64(),
        features: input.u64(),
        serial,
        status: input.u8(),
        writeback: input.pick(&[CacheMode::WriteBack, CacheMode::WriteThrough]),
    };
    let mut bytes = state.encode();
    let read = DeviceState::decode(&bytes).expect("our own state");
    assert_eq!(read.encode(), bytes);
    assert!((read.capacity, read.serial) == (state.capacity, state.serial));
    if let Err(error) = read.fits(&DEVICE, Serial([0; SERIAL_BYTES])) {
        assert!(!error.to_string().is_empty());
    } else {
        assert_eq!(read.capacity, LIMITS.size());
    }
    bytes[at] ^= change;
    assert_eq!(
        DeviceState::decode(&bytes).is_ok(),
        change == 0,
        "byte {at} changed by {change:#x}"
    );
}

/// Reads one file. The first byte says which.
pub fn state(data: &[u8]) {
    let mut input = Input::new(data);
    let which = input.u8();
    let text = input.bytes(usize::MAX);
    match which % 3 {
        0 => return config(text),
        2 => return device(text),
        _ => {}
    }
    DIRECTORY.with(|directory| {
        let directory = directory.get_or_init(|| tempfile::tempdir().expect("a directory"));
        records(text, directory.path());
    });
}
