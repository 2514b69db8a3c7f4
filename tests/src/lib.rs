//! What the tests of several packages share: the simulator, end-to-end support, and skipping aloud.

pub mod arriving_guest;
pub mod driver;
pub mod e2e;
pub mod fake_back_end;
pub mod fuzz;
pub mod guest_memory;
pub mod huge_pages;
pub mod mounts;
pub mod raw_guest;
pub mod served;
pub mod sim;
pub mod watched;

use std::fs::OpenOptions;
use std::io::Write as _;

/// Says that a test cannot run here and why, and how to make it run. `scripts/ci` counts these: the environment variable
/// `RESILVER_SKIP_LOG` names the file they are noted in, because a test runner swallows what a passing test prints.
///
/// # Panics
/// If the log cannot be written: a skip that nobody would see.
pub fn skip(test: &str, reason: &str, remedy: &str) {
    let line = format!("SKIPPED: {test}: {reason}; {remedy}");
    eprintln!("{line}");
    if let Some(path) = std::env::var_os("RESILVER_SKIP_LOG") {
        let log = OpenOptions::new().create(true).append(true).open(path);
        let written = log.and_then(|mut log| writeln!(log, "{line}"));
        assert!(written.is_ok(), "the skip log cannot be written");
    }
}
