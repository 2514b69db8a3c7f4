//! A guest in a process of its own, so that a test can kill it: `guest SOCKET TABLE BLOCKS SEED`. It takes over where the
//! table says that a predecessor ended, prints `running` when it has compared every block, and stops in peace when its
//! standard input ends. `guest fill FILE BLOCKS` gives a disk what a first guest expects.

use std::fs::File;
use std::io::{BufWriter, Read as _, Write as _};
use std::path::PathBuf;

use resilver_tests::e2e::driver::BLOCK;
use resilver_tests::e2e::guest::{self, Guest, GuestConfig};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let ["fill", file, blocks] =
        arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice()
    {
        return fill(file, blocks.parse().expect("a number of blocks"))
            .expect("the disk is filled");
    }
    let [socket, table, blocks, seed] = arguments.as_slice() else {
        eprintln!("usage: guest SOCKET TABLE BLOCKS SEED, or guest fill FILE BLOCKS");
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

/// Writes what every block holds at first.
fn fill(file: &str, blocks: usize) -> std::io::Result<()> {
    let mut disk = BufWriter::with_capacity(1 << 20, File::create(file)?);
    let mut bytes = vec![0; BLOCK];
    for number in 0..blocks {
        guest::fill(&mut bytes, number, 0);
        disk.write_all(&bytes)?;
    }
    disk.into_inner()?.sync_all()
}
