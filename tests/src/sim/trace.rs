//! What happened in a run: a hash of everything, the last lines in words, and what was found wrong.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex};

use resilver_bdev::mirror::Rows;
use resilver_reactor::Nanos;

use super::lock;

/// Lines that a failure shows.
const TAIL: usize = 60;

#[derive(Debug, Default)]
struct State {
    now: Nanos,
    hash: u64,
    lines: u64,
    tail: VecDeque<String>,
    keep: usize,
    findings: Vec<String>,
    rows: Rows,
}

/// The record of a run, shared by all parts of its world.
#[derive(Debug, Clone, Default)]
pub struct Trace(Arc<Mutex<State>>);

impl Trace {
    /// An empty record that keeps its last `keep` lines, or as many as a failure shows.
    #[must_use]
    pub fn new(keep: usize) -> Self {
        Self(Arc::new(Mutex::new(State { keep: keep.max(TAIL), ..State::default() })))
    }

    /// The time that lines carry from now on.
    pub fn set_now(&self, now: Nanos) {
        lock(&self.0).now = now;
    }

    /// Adds a line.
    pub fn line(&self, text: impl fmt::Display) {
        let mut state = lock(&self.0);
        let line = format!("{:>12} ns  {text}", state.now.0);
        // FNV-1a: the hash need only tell two runs apart, the same on every machine.
        state.hash = line.bytes().fold(state.hash ^ 0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        state.lines += 1;
        if state.tail.len() == state.keep {
            state.tail.pop_front();
        }
        state.tail.push_back(line);
    }

    /// Adds something that must not be: the run has failed.
    pub fn finding(&self, text: impl fmt::Display) {
        self.line(format_args!("FOUND {text}"));
        lock(&self.0).findings.push(text.to_string());
    }

    /// Remembers rows of the mirror's tables that were visited.
    pub fn visited(&self, rows: Rows) {
        lock(&self.0).rows.merge(rows);
    }

    /// The rows visited so far.
    #[must_use]
    pub fn rows(&self) -> Rows {
        lock(&self.0).rows
    }

    /// The first thing found wrong.
    #[must_use]
    pub fn first_finding(&self) -> Option<String> {
        lock(&self.0).findings.first().cloned()
    }

    /// The hash of all lines so far.
    #[must_use]
    pub fn hash(&self) -> u64 {
        lock(&self.0).hash
    }

    /// The lines kept.
    #[must_use]
    pub fn tail(&self) -> Vec<String> {
        lock(&self.0).tail.iter().cloned().collect()
    }
}
