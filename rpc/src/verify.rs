//! Verification of a mirror as control keeps it.

use resilver_bdev::VerifyInfo;
use serde_json::{Value, json};

/// The numbers of a pass, as a mirror shows them.
pub(crate) fn numbers(info: &VerifyInfo) -> Value {
    json!({
        "pass": info.pass,
        "state": info.state.name(),
        "speed": info.speed,
        "total_bytes": info.total_bytes,
        "checked_bytes": info.checked_bytes,
        "skipped_bytes": info.skipped_bytes,
        "mismatched_bytes": info.mismatched_bytes,
    })
}
