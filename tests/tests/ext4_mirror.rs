//! A real ext4 file system with real files, driven by a driver that is not ours, mirrored under load to another file
//! system and switched over: clean to e2fsck, and equal byte for byte to what the guest was told is written.

use std::fs::File;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;

use resilver_tests::e2e::driver::BLOCK;
use resilver_tests::e2e::guest::{GuestConfig, Written, assert_holds, fill, generation_of};
use resilver_tests::e2e::tools::{first_difference, missing};
use resilver_tests::e2e::{Guest, GuestReport, Server, Stage};
use resilver_tests::mounts::{self, Mount, run};
use resilver_tests::skip;
use serde_json::json;

const MIB: u64 = 1 << 20;
/// The image, most of it never written.
const IMAGE: u64 = 1280 * MIB;
/// The file in the image whose contents the guest changes. Its place on the disk does not change, so that the file system
/// stays consistent at every moment.
const LOAD_FILE: u64 = 320 * MIB;
/// A file that nobody changes.
const OTHER_FILE: u64 = 96 * MIB;
const DEPTH: usize = 32;

/// Makes the image; gives the disk's blocks of the file that the guest changes, in the file's order.
fn make_image(scratch: &Path, image: &Path) -> Vec<u64> {
    let tree = scratch.join("tree");
    std::fs::create_dir(&tree).unwrap();
    // Small real files: the sources of this workspace.
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    for folder in ["docs", "bdev/src", "vhost/src"] {
        let copy = tree.join(folder.replace('/', "-"));
        run("cp", &["-r", root.join(folder).to_str().unwrap(), copy.to_str().unwrap()]);
    }
    for (name, size, generation) in [("load.bin", LOAD_FILE, 0), ("other.bin", OTHER_FILE, 99)] {
        let file = File::create(tree.join(name)).unwrap();
        let mut bytes = vec![0; MIB as usize];
        for at in (0..size).step_by(MIB as usize) {
            for (index, block) in bytes.chunks_exact_mut(BLOCK).enumerate() {
                fill(block, (at / BLOCK as u64) as usize + index, generation);
            }
            file.write_all_at(&bytes, at).unwrap();
        }
    }
    File::create(image).unwrap().set_len(IMAGE).unwrap();
    let (tree, image) = (tree.to_str().unwrap(), image.to_str().unwrap());
    run("mkfs.ext4", &["-q", "-F", "-b", "4096", "-d", tree, image]);
    std::fs::remove_dir_all(tree).unwrap();
    let extents = run("debugfs", &["-R", "dump_extents -l /load.bin", image]);
    let blocks: Vec<u64> = extents.lines().filter_map(extent).flatten().collect();
    assert_eq!(blocks.len() as u64, LOAD_FILE / BLOCK as u64, "{extents}");
    blocks
}

/// The physical blocks of a line of debugfs: `level/ depth entry/ entries logical - logical physical - physical length`.
fn extent(line: &str) -> Option<std::ops::RangeInclusive<u64>> {
    let numbers: Vec<u64> =
        line.split(|c: char| !c.is_ascii_digit()).filter_map(|word| word.parse().ok()).collect();
    let [_, _, _, _, _, _, first, last, _] = numbers[..] else { return None };
    Some(first..=last)
}

/// Writes that were submitted before the switch-over and acknowledged after it: they are not on the source, and were
/// submitted before the first of those that are not on the source was acknowledged.
fn across_the_hold(source: &Path, blocks: &[u64], report: &GuestReport) -> usize {
    let disk = File::open(source).unwrap();
    let mut bytes = vec![0; BLOCK];
    let mut on_source = |number: usize| {
        disk.read_exact_at(&mut bytes, blocks[number] * BLOCK as u64).unwrap();
        generation_of(&bytes, number)
            .unwrap_or_else(|| panic!("block {number} of the source is torn"))
    };
    let (missing, present): (Vec<Written>, Vec<Written>) =
        report.log.iter().copied().partition(|write| on_source(write.number) < write.generation);
    let first_after = missing.iter().map(|write| write.completed).min().expect("writes after it");
    // The source is the disk of one instant: nothing that is missing was acknowledged before something that is there was
    // even submitted.
    let last_before = present.iter().map(|write| write.submitted).max().expect("writes before it");
    assert!(last_before < first_after, "the source is not the disk of one instant");
    missing.iter().filter(|write| write.submitted < first_after).count()
}

#[test]
fn an_ext4_file_system_mirrored_and_switched_over_under_load_is_clean_and_equal() {
    if let Some(program) = missing(&["mkfs.ext4", "e2fsck", "debugfs", "mount", "losetup"]) {
        let reason = format!("{program} is not installed");
        return skip("ext4_mirror", &reason, "apt-get install e2fsprogs mount");
    }
    if !mounts::available("ext4_mirror") {
        return;
    }
    let mut server = Server::start();
    let elsewhere = Mount::ext4(2048 * MIB);
    let (source, expected) = (server.path("source.img"), server.path("expected.img"));
    let target = elsewhere.path().join("target.img");
    let blocks = make_image(&server.path("."), &source);
    assert_holds(&source, &blocks, &vec![0; blocks.len()]);
    run("cp", &["--sparse=always", source.to_str().unwrap(), expected.to_str().unwrap()]);
    server.serve_file("vm", &source, "vm.sock");
    let guest = Guest::start(GuestConfig {
        socket: server.controller("vm.sock"),
        blocks: blocks.clone(),
        depth: DEPTH,
        seed: 7,
        table: None,
    });
    guest.run_for(2000);

    // Slow enough that the guest meets chunks of every kind.
    server.start_mirror(&json!({
        "source": "vm", "target_path": target, "target_mode": "create", "target_format": "raw",
        "job_id": "move", "sync": "full", "copy_mode": "write-blocking", "speed": 160 * MIB,
        "auto_dismiss": false,
    }));
    server.wait_for_status("move", "ready");
    guest.run_for(2000);

    guest.enter(Stage::Logging);
    guest.run_for(1000);
    server.call("job_complete", json!({ "job_id": "move" }));
    let job = server.wait_for_status("move", "concluded");
    guest.run_for(2000);
    let report = guest.finish();
    assert!(job.get("error").is_none_or(serde_json::Value::is_null), "{job}");
    assert_eq!(server.served_bdev("vm.sock"), "move-target");
    let _files = server.stop();

    let across = across_the_hold(&source, &blocks, &report);
    let counts = ["writes_dirty", "writes_copying", "writes_clean"].map(|field| {
        let count = job[field].as_u64().unwrap_or_else(|| panic!("{field}: {job}"));
        assert!(count > 0, "no write was counted as {field}: {job}");
        count
    });
    assert!(across > 0, "no write was in flight at the switch-over");
    println!("writes to dirty, copying, clean chunks: {counts:?}; across the hold: {across}");
    assert!(report.verified > 1000);

    // e2fsck exits with 0 only if it found nothing to say.
    for disk in [&source, &target] {
        run("e2fsck", &["-fn", disk.to_str().unwrap()]);
    }
    let disk = File::options().write(true).open(&expected).unwrap();
    let mut bytes = vec![0; BLOCK];
    for (number, (block, generation)) in blocks.iter().zip(&report.generations).enumerate() {
        fill(&mut bytes, number, *generation);
        disk.write_all_at(&bytes, block * BLOCK as u64).unwrap();
    }
    assert_eq!(first_difference(&expected, &target), None, "the target differs");
    let allocated = |path: &Path| std::fs::metadata(path).unwrap().blocks() * 512;
    assert!(allocated(&target) < IMAGE / 2 + 64 * MIB, "holes were filled: {}", allocated(&target));
}
