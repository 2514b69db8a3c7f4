//! All that an operator talks to: JSON-RPC, events, jobs, configuration, metrics.
//!
//! One control thread runs everything here; reactors are reached by messages. [`Target`] is what is being served,
//! [`methods::METHODS`] what can be asked of it, [`server`] how, [`client`] from where.
//!
//! Invariants:
//! * Whatever can be refused is refused in the reply, with a stable code and a message that says what to do.
//! * The graph's `RefCell` is never borrowed across an `await`.
//! * A record that a disk was superseded is durable before the switch-over it speaks of.

mod bitmaps;
pub mod client;
pub mod config;
mod controllers;
mod disks;
pub mod error;
mod events;
mod files;
mod holds;
pub mod jobs;
pub mod jsonrpc;
pub mod methods;
pub mod metrics;
mod metrics_http;
mod mirror;
mod modules;
pub mod reactors;
pub mod reference;
pub mod serve;
pub mod server;
pub mod state;
mod stored_bitmaps;
mod subscriptions;
mod target;
mod verify;

pub use client::{Client, ClientError};
pub use error::RpcError;
pub use target::{Target, TargetConfig};
