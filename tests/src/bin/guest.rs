//! A guest in a process of its own, so that a test can kill it: `guest SOCKET TABLE BLOCKS SEED`. It takes over where the
//! table says that a predecessor ended, prints `running` when it has compared every block, and stops in peace when its
//! standard input ends. `guest fill FILE BLOCKS` gives a disk what a first guest expects. `guest idle SOCKET...` is many guests
//! that do nothing: it starts a ring on each socket, prints `connected`, and lets them be until its standard input ends.

use std::fs::File;
use std::io::{BufWriter, Read as _, Write as _};
use std::path::{Path, PathBuf};

use resilver_vhost::front_end::{Connection, ConnectionConfig};

use resilver_tests::e2e::driver::BLOCK;
use resilver_tests::e2e::guest::{self, Guest, GuestConfig};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["fill", file, blocks] => {
            return fill(file, blocks.parse().expect("a number of blocks"))
                .expect("the disk is filled");
        }
        ["idle", sockets @ ..] => return idle(sockets),
        _ => {}
    }
    let [socket, table, blocks, seed] = arguments.as_slice() else {
        eprintln!(
            "usage: guest SOCKET TABLE BLOCKS SEED, guest fill FILE BLOCKS, or guest idle SOCKET..."
        );
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
    until_told();
    let report = guest.finish();
    println!("verified {}", report.verified);
}

/// Keeps a connection with a started ring on each of the sockets.
fn idle(sockets: &[&str]) {
    let connect = |socket: &&str| {
        let config = ConnectionConfig { queue_size: 16, ..ConnectionConfig::default() };
        Connection::connect(Path::new(socket), config).expect("a back end")
    };
    let connections: Vec<_> = sockets.iter().map(connect).collect();
    println!("connected");
    until_told();
    drop(connections);
}

/// Waits until standard input ends.
fn until_told() {
    let mut rest = Vec::new();
    std::io::stdin().read_to_end(&mut rest).expect("standard input");
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
