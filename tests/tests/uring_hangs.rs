//! A disk that hangs, with a frozen file system for the disk: what goes on, what wakes up, and what a killed process leaves.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use resilver_bdev::uring::{self, Uring, UringConfig};
use resilver_bdev::{BdevError, IoKind};
use resilver_reactor::{Armed, Context, Nanos};
use resilver_sys::{RingMode, WaitSet};
use resilver_tests::driver::{Driver, pattern};
use resilver_tests::mounts::{self, Frozen, Mount};

const MIB: u64 = 1 << 20;
/// Names the file that a child process is to write to and hang on.
const CHILD: &str = "RESILVER_HANGING_CHILD";

fn open(path: &Path) -> Result<Uring, BdevError> {
    Uring::open(UringConfig {
        name: "disk".to_owned(),
        path: path.to_owned(),
        block_size: None,
        read_only: false,
        direct: true,
        mode: RingMode::Enter,
        engine: None,
    })
}

/// A disk with content on an ext4 of its own.
fn disk() -> (Mount, PathBuf) {
    let mount = Mount::ext4(32 * MIB);
    let path = mount.path().join("disk.raw");
    uring::create(&path, 8 * MIB).unwrap();
    let bdev = open(&path).unwrap();
    let mut driver = Driver::new(&bdev, 4);
    let payload = [driver.slice(0, 65536)];
    driver.fill(&payload, 1);
    assert_eq!(driver.write(0, &payload), Ok(()));
    assert_eq!(driver.run(IoKind::Flush, 0, 0, &[]), Ok(()));
    (mount, path)
}

#[test]
fn a_hung_write_lets_reads_pass_and_its_end_wakes_a_sleeper() {
    if !mounts::available("a_hung_write_lets_reads_pass_and_its_end_wakes_a_sleeper") {
        return;
    }
    let (mount, path) = disk();
    let bdev = open(&path).unwrap();
    let mut driver = Driver::new(&bdev, 4);
    let frozen = Frozen::new(mount.path());

    // All the slots of writes hang, and reads have theirs still.
    while driver.free(IoKind::Write) > 0 {
        let payload = [driver.slice(MIB, 4096)];
        driver.submit(IoKind::Write, 4 * MIB, 4096, &payload);
    }
    let payload = [driver.slice(0, 65536)];
    let read = driver.submit(IoKind::Read, 0, 65536, &payload);
    let start = Instant::now();
    while driver.in_flight() > 4 {
        driver.turn();
        assert!(start.elapsed() < Duration::from_secs(30), "a read waits for hung writes");
    }
    assert_eq!(driver.take_results().remove(&read), Some(Ok(())));
    assert_eq!(driver.bytes(&payload), pattern(1, 65536));
    assert_eq!(driver.leases(), 4);

    // Young, they are polled for; old, they may be slept on.
    let mut set = WaitSet::with_capacity(4);
    let now = driver.now();
    let (channel, cx) = driver.channel();
    let later = Context { now: now + Nanos::from_millis(5), ..cx };
    assert_eq!(channel.arm(&later, &mut set), Armed::Until(None));
    let thaw = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        drop(frozen);
    });
    let start = Instant::now();
    set.sleep(Some(30_000_000_000));
    assert!(start.elapsed() < Duration::from_secs(20), "the completion did not wake the sleeper");
    thaw.join().unwrap();
    assert!(driver.drain().values().all(Result::is_ok));
    assert_eq!(driver.leases(), 0);
}

/// Run by the test below in a process of its own, which is killed.
#[test]
fn child_that_hangs_in_a_write() {
    let Some(path) = std::env::var_os(CHILD) else { return };
    let bdev = open(Path::new(&path)).unwrap();
    let mut driver = Driver::new(&bdev, 4);
    println!("open");
    std::io::stdout().flush().unwrap();
    // The parent freezes the file system now, and says so.
    std::io::stdin().read_line(&mut String::new()).unwrap();
    let payload = [driver.slice(0, 4096)];
    driver.fill(&payload, 2);
    driver.submit(IoKind::Write, 0, 4096, &payload);
    driver.turn();
    println!("hanging");
    std::io::stdout().flush().unwrap();
    loop {
        std::thread::sleep(Duration::from_secs(1));
    }
}

#[test]
fn a_file_stays_locked_until_the_last_write_of_a_killed_process_has_landed() {
    let name = "a_file_stays_locked_until_the_last_write_of_a_killed_process_has_landed";
    if !mounts::available(name) {
        return;
    }
    let (mount, path) = disk();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child_that_hangs_in_a_write", "--nocapture", "--test-threads=1"])
        .env(CHILD, &path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut wait_for = |word: &str| {
        assert!(said.any(|line| line.unwrap().ends_with(word)), "the child never said '{word}'");
    };
    wait_for("open");
    let frozen = Frozen::new(mount.path());
    child.stdin.take().unwrap().write_all(b"frozen\n").unwrap();
    wait_for("hanging");
    child.kill().unwrap();

    for _ in 0..3 {
        assert!(matches!(open(&path), Err(BdevError::Locked { .. })), "two writers at once");
    }
    drop(frozen);
    child.wait().unwrap();
    let start = Instant::now();
    let bdev = loop {
        match open(&path) {
            Ok(bdev) => break bdev,
            Err(BdevError::Locked { .. }) => {
                assert!(start.elapsed() < Duration::from_secs(30), "the lock was never released");
            }
            Err(error) => panic!("{error}"),
        }
    };
    // Whether it landed is the killed writer's luck; it is whole, and nothing lands any more.
    let mut driver = Driver::new(&bdev, 4);
    let payload = [driver.slice(0, 4096)];
    assert_eq!(driver.read(0, &payload), Ok(()));
    let bytes = driver.bytes(&payload);
    assert!(bytes == pattern(2, 4096) || bytes == pattern(1, 65536)[..4096]);
}
