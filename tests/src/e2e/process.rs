//! A guest in a process of its own, so that it can be killed: the program `guest`.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// A guest process, killed with the test.
pub struct GuestProcess(Child);

impl GuestProcess {
    /// Starts the program and waits until it has compared the whole disk of `blocks` blocks with the table and writes again.
    ///
    /// # Panics
    /// If the disk does not hold what the table says, or the program does not start.
    pub fn start(program: &str, socket: &Path, table: &Path, blocks: u64, seed: u64) -> Self {
        let mut child = Command::new(program)
            .args([socket, table])
            .args([blocks.to_string(), seed.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        let process = Self(child);
        assert_eq!(line, "running\n", "the guest did not start");
        process
    }

    /// Kills it with what it has in flight.
    ///
    /// # Panics
    /// If it cannot be killed.
    pub fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }

    /// Lets what is in flight end, and stops.
    ///
    /// # Panics
    /// If a request failed, or a read was wrong.
    pub fn finish(mut self) {
        drop(self.0.stdin.take());
        assert!(self.0.wait().unwrap().success(), "the guest found an error");
    }
}

impl Drop for GuestProcess {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
