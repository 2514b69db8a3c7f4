//! The guest of the end-to-end tests, against a back end that is not ours: it must notice what they rely on it to notice.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;

use resilver_tests::e2e::driver::BLOCK;
use resilver_tests::e2e::guest::{GuestConfig, assert_holds, fill, table_generations};
use resilver_tests::e2e::{Guest, Stage, StorageDaemon};

const BLOCKS: u64 = 256;

struct Scratch {
    directory: tempfile::TempDir,
}

impl Scratch {
    fn new() -> Self {
        let scratch = Self { directory: tempfile::tempdir().unwrap() };
        let disk = File::create(scratch.path("disk")).unwrap();
        let mut bytes = vec![0; BLOCK];
        for number in 0..BLOCKS {
            fill(&mut bytes, number as usize, 0);
            disk.write_all_at(&bytes, number * BLOCK as u64).unwrap();
        }
        scratch
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn serve(&self) -> Option<StorageDaemon> {
        StorageDaemon::serve("e2e_guest", &self.path("disk"), &self.path("sock"), "")
    }

    fn guest(&self, seed: u64) -> Guest {
        Guest::start(GuestConfig {
            socket: self.path("sock"),
            blocks: (0..BLOCKS).collect(),
            depth: 16,
            seed,
            table: Some(self.path("table")),
        })
    }
}

#[test]
fn a_guest_takes_over_from_another_and_the_disk_holds_what_the_table_says() {
    let scratch = Scratch::new();
    let Some(_daemon) = scratch.serve() else { return };
    let first = scratch.guest(1);
    first.run_for(1000);
    let first = first.finish();
    let second = scratch.guest(2);
    second.enter(Stage::Logging);
    second.run_for(1000);
    let second = second.finish();
    assert!(second.log.len() >= 1000 && second.log.iter().all(|w| w.submitted < w.completed));
    assert!(first.generations.iter().sum::<u32>() >= 1000);
    assert_eq!(table_generations(&scratch.path("table")), second.generations);
    assert_holds(&scratch.path("disk"), &(0..BLOCKS).collect::<Vec<_>>(), &second.generations);
}

#[test]
fn a_lost_write_is_found_by_who_takes_over_and_by_who_reads() {
    let scratch = Scratch::new();
    let Some(_daemon) = scratch.serve() else { return };
    let guest = scratch.guest(1);
    guest.run_for(2000);
    let report = guest.finish();
    // Every block goes back by one write: each is a whole block of its own past.
    let disk = File::options().write(true).open(scratch.path("disk")).unwrap();
    let mut bytes = vec![0; BLOCK];
    for (number, generation) in report.generations.iter().enumerate() {
        fill(&mut bytes, number, generation.saturating_sub(1));
        disk.write_all_at(&bytes, (number * BLOCK) as u64).unwrap();
    }
    let successor = scratch.guest(2);
    let found = catch_unwind(AssertUnwindSafe(|| successor.finish()));
    let message = *found.unwrap_err().downcast::<String>().unwrap();
    assert!(message.contains("is not in"), "{message}");
}
