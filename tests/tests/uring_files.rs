//! What can be wrong with a file or a block device, and what `uring` says and does about it. Real file systems throughout.

#![allow(clippy::cast_possible_truncation)]

use std::fs::{self, File, OpenOptions, Permissions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use resilver_bdev::uring::{self, Engine, Uring, UringConfig};
use resilver_bdev::{Bdev, BdevError, Detail, Extent, IoError, IoKind};
use resilver_sys::{Ring, RingMode, SubmissionThread};
use resilver_tests::driver::{Driver, pattern};
use resilver_tests::mounts::{self, LoopDevice, Mount};

const MIB: u64 = 1 << 20;

fn config(path: &Path) -> UringConfig {
    UringConfig {
        name: "disk".to_owned(),
        path: path.to_owned(),
        block_size: None,
        read_only: false,
        direct: true,
        mode: RingMode::Enter,
        engine: None,
    }
}

/// A scratch file of `size` bytes, and the directory that holds it.
fn scratch(size: u64) -> (tempfile::TempDir, PathBuf) {
    scratch_in(&std::env::temp_dir(), size)
}

fn scratch_in(parent: &Path, size: u64) -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir_in(parent).unwrap();
    let path = directory.path().join("disk.raw");
    uring::create(&path, size).unwrap();
    (directory, path)
}

/// A scratch file on a disk and one in memory, which another engine serves.
fn scratches(size: u64) -> [(tempfile::TempDir, PathBuf); 2] {
    [scratch(size), scratch_in(Path::new("/dev/shm"), size)]
}

fn detail(bdev: &dyn Bdev, name: &str) -> Detail {
    bdev.details().into_iter().find(|(known, _)| *known == name).unwrap().1
}

/// Bytes that the file system has allocated for a file.
fn allocated(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

#[test]
fn a_new_file_is_sparse_and_an_existing_one_is_not_overwritten() {
    let (_directory, path) = scratch(64 * MIB);
    assert_eq!((fs::metadata(&path).unwrap().len(), allocated(&path)), (64 * MIB, 0));
    let error = uring::create(&path, MIB).unwrap_err().to_string();
    assert!(error.contains("creating '") && error.contains("choose another path"), "{error}");
    assert_eq!(fs::metadata(&path).unwrap().len(), 64 * MIB);
}

#[test]
fn a_file_that_cannot_be_made_leaves_nothing_behind() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.raw");
    assert!(uring::create(&path, u64::MAX).is_err());
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    assert!(uring::create(&directory.path().join("no/such/disk.raw"), MIB).is_err());
}

#[test]
fn a_missing_file_a_directory_and_a_device_that_is_no_disk_are_refused_in_words() {
    let directory = tempfile::tempdir().unwrap();
    let missing = directory.path().join("missing.raw");
    let error = Uring::open(config(&missing)).unwrap_err().to_string();
    assert!(error.contains("missing.raw") && error.contains("No such file"), "{error}");
    for path in [directory.path(), Path::new("/dev/null")] {
        let error = Uring::open(config(path)).unwrap_err().to_string();
        assert!(error.contains("a regular file or a block device was expected"), "{error}");
    }
}

#[test]
fn a_size_that_is_no_multiple_of_the_block_is_refused_with_both_sizes() {
    let (_directory, path) = scratch(MIB);
    OpenOptions::new().write(true).open(&path).unwrap().set_len(MIB + 100).unwrap();
    let error = Uring::open(config(&path)).unwrap_err().to_string();
    assert!(error.contains("1048676 bytes") && error.contains("512"), "{error}");
    assert!(error.contains("truncate -s 1049088"), "{error}");
    File::create(&path).unwrap();
    assert!(Uring::open(config(&path)).is_err());
}

#[test]
fn a_second_opener_is_refused_and_told_who_has_the_file() {
    let (_directory, path) = scratch(MIB);
    let first = Uring::open(config(&path)).unwrap();
    let error = Uring::open(config(&path)).unwrap_err();
    assert!(matches!(error, BdevError::Locked { .. }), "{error}");
    assert!(error.to_string().contains(&std::process::id().to_string()), "{error}");
    let reader = UringConfig { read_only: true, ..config(&path) };
    assert!(matches!(Uring::open(reader.clone()), Err(BdevError::Locked { .. })));
    drop(first);
    let readers = [Uring::open(reader.clone()).unwrap(), Uring::open(reader).unwrap()];
    assert!(matches!(Uring::open(config(&path)), Err(BdevError::Locked { .. })));
    assert_eq!(detail(&readers[0], "lock"), Detail::Text("shared".to_owned()));
}

#[test]
fn the_lock_lives_as_long_as_a_channel_does_and_no_longer() {
    let thread = SubmissionThread::start(0).unwrap();
    let modes = [RingMode::Enter, RingMode::SubmissionThread(thread)];
    let [on_disk, in_memory] = scratches(MIB);
    for ((_directory, path), mode) in [(&on_disk, 0), (&on_disk, 1), (&in_memory, 0)] {
        let config = UringConfig { mode: modes[mode].clone(), ..config(path) };
        let bdev = Uring::open(config.clone()).unwrap();
        let mut driver = Driver::new(&bdev, 4);
        drop(bdev);
        assert!(matches!(Uring::open(config.clone()), Err(BdevError::Locked { .. })));
        let payload = [driver.slice(0, 4096)];
        assert_eq!(driver.write(0, &payload), Ok(()));
        assert_eq!(driver.run(IoKind::Flush, 0, 0, &[]), Ok(()));
        drop(driver);
        Uring::open(config).unwrap();
    }
}

#[test]
fn a_read_only_bdev_refuses_what_changes_it_and_reads_on() {
    for (_directory, path) in scratches(MIB) {
        File::options().write(true).open(&path).unwrap().write_all_at(b"kept", 0).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o400)).unwrap();
        let bdev = Uring::open(UringConfig { read_only: true, ..config(&path) }).unwrap();
        assert!(bdev.read_only() && bdev.resize(2 * MIB).is_err());
        let mut driver = Driver::new(&bdev, 4);
        assert!(driver.limits().read_only);
        let payload = [driver.slice(0, 4096)];
        driver.fill(&payload, 1);
        assert_eq!(driver.write(0, &payload), Err(IoError::READ_ONLY));
        assert_eq!(driver.run(IoKind::Unmap, 0, 4096, &[]), Err(IoError::READ_ONLY));
        assert_eq!(driver.run(IoKind::WriteZeroes, 0, 4096, &[]), Err(IoError::READ_ONLY));
        assert_eq!(driver.run(IoKind::Flush, 0, 0, &[]), Ok(()));
        assert_eq!(driver.read(0, &payload), Ok(()));
        assert_eq!(&driver.bytes(&payload)[..4], b"kept");
    }
}

#[test]
fn a_file_whose_directory_vanished_serves_on() {
    for (directory, path) in scratches(MIB) {
        let bdev = Uring::open(config(&path)).unwrap();
        let mut driver = Driver::new(&bdev, 4);
        drop(directory);
        assert!(!path.exists());
        let payload = [driver.slice(0, 4096)];
        driver.fill(&payload, 1);
        assert_eq!(driver.write(0, &payload), Ok(()));
        assert_eq!(driver.run(IoKind::Flush, 0, 0, &[]), Ok(()));
        driver.clear(&payload);
        assert_eq!(driver.read(0, &payload), Ok(()));
        assert_eq!(driver.bytes(&payload), pattern(1, 4096));
    }
}

#[test]
fn reads_behind_the_end_of_a_shortened_file_fail_and_others_do_not() {
    for direct in [true, false] {
        for odd in [0, 512, 700] {
            for (_directory, path) in scratches(4 * MIB) {
                let bdev = Uring::open(UringConfig { direct, ..config(&path) }).unwrap();
                let mut driver = Driver::new(&bdev, 4);
                OpenOptions::new().write(true).open(&path).unwrap().set_len(MIB + odd).unwrap();
                let payload = [driver.slice(0, 65536)];
                assert_eq!(driver.read(0, &payload), Ok(()));
                assert_eq!(driver.read(2 * MIB, &payload), Err(IoError::IO), "{direct} {odd}");
                assert_eq!(driver.read(MIB - 4096, &payload), Err(IoError::IO), "{direct} {odd}");
                let unaligned = [driver.slice(7, 65536)];
                assert_eq!(driver.read(MIB - 4096, &unaligned), Err(IoError::IO), "{direct} {odd}");
            }
        }
    }
}

#[test]
fn extents_tell_data_from_holes_to_the_end_of_the_disk() {
    for (_directory, path) in scratches(8 * MIB) {
        let bdev = Uring::open(config(&path)).unwrap();
        let hole = |offset, length| Extent { offset, length, hole: true };
        assert_eq!(bdev.extent(0).unwrap(), hole(0, 8 * MIB));
        let mut driver = Driver::new(&bdev, 4);
        let payload = [driver.slice(0, 65536)];
        assert_eq!(driver.write(2 * MIB, &payload), Ok(()));
        assert_eq!(bdev.extent(0).unwrap(), hole(0, 2 * MIB));
        let data = Extent { offset: 2 * MIB, length: 65536, hole: false };
        assert_eq!(bdev.extent(2 * MIB).unwrap(), data);
        assert_eq!(bdev.extent(2 * MIB + 65536).unwrap(), hole(2 * MIB + 65536, 6 * MIB - 65536));
        assert_eq!(bdev.extent(MIB).unwrap(), hole(MIB, MIB));
    }
}

#[test]
fn data_in_memory_is_told_in_steps_and_ends_where_it_ends() {
    const SIZE: u64 = 16 * MIB;
    for (_directory, path) in scratches(SIZE) {
        let bdev = Uring::open(config(&path)).unwrap();
        let steps = detail(&bdev, "engine") != Detail::Text("io_uring".to_owned());
        let mut driver = Driver::new(&bdev, 4);
        let payload = [driver.slice(0, 65536)];
        // Five steps and a half, with a small hole that no step meets.
        for at in (MIB..13 * MIB / 2).step_by(65536).filter(|at| *at != 5 * MIB / 2) {
            assert_eq!(driver.write(at, &payload), Ok(()));
        }
        let (mut at, mut holes) = (0, Vec::new());
        while at < SIZE {
            let extent = bdev.extent(at).unwrap();
            assert_eq!(extent.offset, at);
            at += extent.length;
            if extent.hole {
                holes.push((extent.offset, extent.length));
            }
        }
        let mut expected =
            vec![(0, MIB), (5 * MIB / 2, 65536), (13 * MIB / 2, SIZE - 13 * MIB / 2)];
        if steps {
            expected.remove(1);
        }
        assert_eq!((at, holes), (SIZE, expected), "in memory: {steps}");
    }
}

#[test]
fn an_unmap_and_zeroes_that_may_unmap_give_room_back_and_other_zeroes_do_not() {
    for (_directory, path) in scratches(4 * MIB) {
        let bdev = Uring::open(config(&path)).unwrap();
        let mut driver = Driver::new(&bdev, 4);
        assert!(driver.limits().unmap && driver.limits().zeroes_unmap);
        let payload = [driver.slice(0, 1 << 20)];
        driver.fill(&payload, 1);
        for offset in [0, MIB, 2 * MIB] {
            assert_eq!(driver.write(offset, &payload), Ok(()));
        }
        let full = allocated(&path);
        assert!(full >= 3 * MIB);
        driver.submit_zeroes(0, MIB, false);
        driver.drain();
        assert_eq!(allocated(&path), full);
        driver.submit_zeroes(0, MIB, true);
        driver.drain();
        assert_eq!(allocated(&path), full - MIB);
        assert_eq!(driver.run(IoKind::Unmap, MIB, MIB, &[]), Ok(()));
        assert_eq!(allocated(&path), full - 2 * MIB);
    }
}

#[test]
fn a_grown_disk_keeps_its_content_and_is_never_shrunk() {
    for (_directory, path) in scratches(MIB) {
        let bdev = Uring::open(config(&path)).unwrap();
        let mut driver = Driver::new(&bdev, 4);
        let payload = [driver.slice(0, 4096)];
        driver.fill(&payload, 1);
        assert_eq!(driver.write(0, &payload), Ok(()));
        bdev.resize(2 * MIB).unwrap();
        assert_eq!((bdev.geometry().size(), driver.limits().size()), (2 * MIB, MIB));
        let mut grown = Driver::new(&bdev, 4);
        let payload = [grown.slice(0, 4096)];
        assert_eq!(grown.read(0, &payload), Ok(()));
        assert_eq!(grown.bytes(&payload), pattern(1, 4096));
        assert_eq!(grown.write(2 * MIB - 4096, &payload), Ok(()));
        for size in [MIB, 2 * MIB + 1] {
            assert!(bdev.resize(size).is_err());
        }
        assert_eq!(fs::metadata(&path).unwrap().len(), 2 * MIB);
    }
}

#[test]
fn a_file_in_memory_is_served_within_the_call_unless_it_is_asked_otherwise_and_no_other_is() {
    let by = |path: &Path, engine| Uring::open(UringConfig { engine, ..config(path) });
    let told = |path: &Path, engine| detail(&by(path, engine).unwrap(), "engine");
    let (name, [on_disk, in_memory]) = (|name: &str| Detail::Text(name.to_owned()), scratches(MIB));
    assert_eq!(told(&on_disk.1, None), name("io_uring"));
    let best = if Ring::works_inline() { "inline" } else { "aio" };
    assert_eq!(told(&in_memory.1, None), name(best));
    assert_eq!(told(&in_memory.1, Some(Engine::Aio)), name("aio"));
    if best == "inline" {
        let thread = SubmissionThread::start(0).unwrap();
        let beside =
            UringConfig { mode: RingMode::SubmissionThread(thread), ..config(&in_memory.1) };
        let mode = detail(&Uring::open(beside).unwrap(), "mode");
        assert_eq!(mode, name("enter"), "what is done within a call is no other thread's");
    }
    assert_eq!(told(&in_memory.1, Some(Engine::IoUring)), name("io_uring"));
    for engine in [Engine::Aio, Engine::Inline] {
        let error = by(&on_disk.1, Some(engine)).unwrap_err().to_string();
        assert!(error.contains("not on tmpfs") && error.contains("use io_uring"), "{error}");
    }
    let buffered = |engine| UringConfig {
        direct: false,
        block_size: Some(512),
        engine,
        ..config(&in_memory.1)
    };
    let opened = Uring::open(buffered(None)).unwrap();
    assert_eq!(detail(&opened, "engine"), name("aio"), "only direct I/O is done within the call");
    drop(opened);
    let error = Uring::open(buffered(Some(Engine::Inline))).unwrap_err().to_string();
    assert!(error.contains("direct I/O") && error.contains("use aio"), "{error}");
}

#[test]
fn the_same_file_by_another_path_has_the_same_identity() {
    let (directory, path) = scratch(MIB);
    let link = directory.path().join("link.raw");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    let by_name = Uring::open(UringConfig { read_only: true, ..config(&path) }).unwrap();
    let by_link = Uring::open(UringConfig { read_only: true, ..config(&link) }).unwrap();
    assert!(by_name.identity().unwrap().same_file(&by_link.identity().unwrap()));
    assert_eq!(by_name.identity().unwrap().path, by_link.identity().unwrap().path);
}

/// Fills a disk until the file system says it is full; the offsets whose writes succeeded.
fn fill_up(driver: &mut Driver, size: u64) -> Vec<u64> {
    let payload = [driver.slice(0, 65536)];
    let mut written = Vec::new();
    for offset in (0..size).step_by(65536) {
        driver.fill(&payload, offset);
        match driver.write(offset, &payload) {
            Ok(()) => written.push(offset),
            Err(error) => assert_eq!(error, IoError::NO_SPACE),
        }
    }
    written
}

fn a_full_file_system_answers_no_space_and_goes_on_when_there_is_room(
    mount: &Mount,
    engine: Option<Engine>,
) {
    let (ballast, path) = (mount.path().join("ballast"), mount.path().join("disk.raw"));
    fs::write(&ballast, vec![1; 4 << 20]).unwrap();
    uring::create(&path, 32 * MIB).unwrap();
    let bdev = Uring::open(UringConfig { engine, ..config(&path) }).unwrap();
    let mut driver = Driver::new(&bdev, 4);
    let written = fill_up(&mut driver, 32 * MIB);
    assert!(!written.is_empty() && written.len() < 512, "{} of 512", written.len());
    let payload = [driver.slice(0, 65536)];
    for offset in &written {
        assert_eq!(driver.read(*offset, &payload), Ok(()));
        assert!(driver.bytes(&payload) == pattern(*offset, 65536), "at {offset}");
    }
    fs::remove_file(&ballast).unwrap();
    assert!(fill_up(&mut driver, 32 * MIB).len() > written.len());
}

#[test]
fn a_full_ext4_answers_no_space_and_goes_on_when_there_is_room() {
    if mounts::available("a_full_ext4_answers_no_space_and_goes_on_when_there_is_room") {
        let mount = Mount::ext4(16 * MIB);
        a_full_file_system_answers_no_space_and_goes_on_when_there_is_room(&mount, None);
    }
}

#[test]
fn a_full_tmpfs_answers_no_space_and_goes_on_when_there_is_room() {
    if mounts::available("a_full_tmpfs_answers_no_space_and_goes_on_when_there_is_room") {
        let inline = Ring::works_inline().then_some(Engine::Inline);
        for engine in [Engine::IoUring, Engine::Aio].into_iter().chain(inline) {
            let mount = Mount::tmpfs(16 * MIB);
            a_full_file_system_answers_no_space_and_goes_on_when_there_is_room(
                &mount,
                Some(engine),
            );
        }
    }
}

#[test]
fn a_block_device_of_large_sectors_sets_the_block_size_and_discards() {
    if !mounts::available("a_block_device_of_large_sectors_sets_the_block_size_and_discards") {
        return;
    }
    let device = LoopDevice::new(16 * MIB, 4096);
    let small = UringConfig { block_size: Some(512), ..config(device.path()) };
    let error = Uring::open(small).unwrap_err().to_string();
    assert!(error.contains("block_size=4096") && error.contains("direct=false"), "{error}");

    let bdev = Uring::open(config(device.path())).unwrap();
    assert_eq!((bdev.geometry().block_size, bdev.geometry().size()), (4096, 16 * MIB));
    assert_eq!(detail(&bdev, "block_device"), Detail::Flag(true));
    assert_eq!(bdev.extent(4096).unwrap().length, 16 * MIB - 4096);
    assert!(bdev.resize(32 * MIB).is_err());

    let mut driver = Driver::new(&bdev, 4);
    assert!(driver.limits().unmap);
    let payload = [driver.slice(1, 1 << 20)];
    driver.fill(&payload, 1);
    assert_eq!(driver.write(MIB, &payload), Ok(()));
    assert_eq!(driver.write(4 * MIB, &payload), Ok(()));
    assert_eq!(driver.run(IoKind::Flush, 0, 0, &[]), Ok(()));
    let full = allocated(&device.medium());
    assert_eq!(driver.run(IoKind::Unmap, MIB, MIB, &[]), Ok(()));
    driver.submit_zeroes(4 * MIB, 65536, false);
    assert!(driver.drain().values().all(Result::is_ok));
    driver.clear(&payload);
    assert_eq!(driver.read(4 * MIB, &payload), Ok(()));
    let bytes = driver.bytes(&payload);
    assert!(bytes[..65536].iter().all(|byte| *byte == 0));
    assert!(bytes[65536..] == pattern(1, 1 << 20)[65536..]);
    assert!(allocated(&device.medium()) <= full - MIB, "the discard reached the medium");
}

#[test]
fn a_mounted_block_device_is_refused_for_writing() {
    if !mounts::available("a_mounted_block_device_is_refused_for_writing") {
        return;
    }
    let mount = Mount::ext4(16 * MIB);
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    let place = mount.path().to_str().unwrap();
    let line = mounts.lines().find(|line| line.contains(place)).unwrap();
    let device = Path::new(line.split(' ').next().unwrap());
    let error = Uring::open(config(device)).unwrap_err().to_string();
    assert!(error.contains("mounted or otherwise used"), "{error}");
}

#[test]
fn a_block_device_that_shrinks_under_us_answers_errors_and_serves_the_rest() {
    let name = "a_block_device_that_shrinks_under_us_answers_errors_and_serves_the_rest";
    if !mounts::available(name) {
        return;
    }
    let device = LoopDevice::new(8 * MIB, 512);
    let bdev = Uring::open(config(device.path())).unwrap();
    let mut driver = Driver::new(&bdev, 4);
    let payload = [driver.slice(0, 4096)];
    assert_eq!(driver.write(6 * MIB, &payload), Ok(()));
    OpenOptions::new().write(true).open(device.medium()).unwrap().set_len(4 * MIB).unwrap();
    mounts::run("losetup", &["-c", device.path().to_str().unwrap()]);
    assert!(driver.read(6 * MIB, &payload).is_err());
    assert!(driver.write(6 * MIB, &payload).is_err());
    assert_eq!(driver.write(MIB, &payload), Ok(()));
    assert_eq!(driver.read(MIB, &payload), Ok(()));
}
