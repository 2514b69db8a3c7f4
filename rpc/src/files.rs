//! Files as bdevs: opening them, and waiting for the lock that a predecessor may have left.
//!
//! Requests that a killed target left in the kernel hold its files open and so locked. Whoever opens such a file waits for
//! [`LOCK_PATIENCE`], with a message, before the refusal stands.

use std::sync::Arc;
use std::time::Duration;

use resilver_bdev::uring::{Uring, UringConfig};
use resilver_bdev::{Bdev, BdevError};

use crate::error::RpcError;

/// How long a lock is waited for.
const LOCK_PATIENCE: Duration = Duration::from_secs(3);
/// How often it is tried.
const LOCK_AGAIN: Duration = Duration::from_millis(100);

/// Opens a file, on a blocking thread: a share that hangs must not stop control.
pub(crate) async fn open(config: UringConfig) -> Result<Arc<dyn Bdev>, RpcError> {
    let begun = tokio::time::Instant::now();
    let mut told = false;
    loop {
        let attempt = config.clone();
        let opened = tokio::task::spawn_blocking(move || Uring::open_in_sectors(attempt)).await;
        match opened.map_err(|_| RpcError::gone())? {
            Ok(bdev) => return Ok(bdev),
            Err(error @ BdevError::Locked { .. }) if begun.elapsed() < LOCK_PATIENCE => {
                if !std::mem::replace(&mut told, true) {
                    tracing::warn!(%error, patience = ?LOCK_PATIENCE, "waiting for a file's lock");
                }
                tokio::time::sleep(LOCK_AGAIN).await;
            }
            Err(error) => return Err(error.into()),
        }
    }
}
