//! A guest in a process of its own, so that a test can kill it: `guest SOCKET TABLE BLOCKS SEED`. It takes over where the
//! table says that a predecessor ended, prints `running` when it has compared every block, and stops in peace when its
//! standard input ends.

use std::io::Read as _;
use std::path::PathBuf;

use resilver_tests::e2e::guest::{Guest, GuestConfig};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [socket, table, blocks, seed] = arguments.as_slice() else {
        eprintln!("usage: guest SOCKET TABLE BLOCKS SEED");
        std::process::exit(2);
    };
    let guest = Guest::start(GuestConfig {
        socket: PathBuf::from(socket),
        blocks: (0..blocks.parse().expect("a number of blocks")).collect(),
        depth: 16,
        seed: seed.parse().expect("a seed"),
        table: Some(PathBuf::from(table)),
    });
    guest.run_for(1);
    println!("running");
    let mut rest = Vec::new();
    std::io::stdin().read_to_end(&mut rest).expect("standard input");
    let report = guest.finish();
    println!("verified {}", report.verified);
}
