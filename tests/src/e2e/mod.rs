//! End to end: the real binary, real files and file systems, and a driver that is not ours.

pub mod driver;
pub mod guest;
pub mod process;
pub mod server;
pub mod storage_daemon;
pub mod tools;

pub use guest::{Guest, GuestReport, Stage};
pub use process::GuestProcess;
pub use server::{RpcError, Server};
pub use storage_daemon::StorageDaemon;
