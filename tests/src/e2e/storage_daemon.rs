//! QEMU's storage daemon as a back end that is not ours.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::skip;

/// A storage daemon that serves one file, killed with its owner.
pub struct StorageDaemon(Child);

impl StorageDaemon {
    /// Starts one; none, said aloud for `test`, where it is not installed. `export` is added to the export's options.
    pub fn serve(test: &str, file: &Path, socket: &Path, export: &str) -> Option<Self> {
        let blockdev = format!("driver=file,node-name=f,discard=unmap,filename={}", file.display());
        let export = format!(
            "type=vhost-user-blk,id=e,node-name=f,addr.type=unix,addr.path={},writable=on{export}",
            socket.display()
        );
        let spawned = Command::new("qemu-storage-daemon")
            .args(["--blockdev", &blockdev, "--export", &export])
            .stdin(Stdio::null())
            .spawn();
        match spawned {
            Ok(child) => Some(Self(child)),
            Err(error) => {
                let reason = format!("qemu-storage-daemon does not start: {error}");
                skip(test, &reason, "apt-get install qemu-utils");
                None
            }
        }
    }

    /// Its process.
    pub fn process(&self) -> rustix::process::Pid {
        rustix::process::Pid::from_child(&self.0)
    }
}

impl Drop for StorageDaemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
