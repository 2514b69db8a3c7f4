//! Named dirty bitmaps and transactions, from outside.

#![allow(clippy::unwrap_used)] // a test may panic; clippy knows that only of functions it sees as tests

mod common;

use std::fs::File;
use std::path::PathBuf;

use common::{MIB, Served, served};
use resilver_rpc::error::code;
use serde_json::{Value, json};

fn on(bdev: &str, bitmap: &str) -> Value {
    json!({ "name": bdev, "bitmap": bitmap })
}

fn with(mut params: Value, more: Value) -> Value {
    params.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    params
}

fn bitmaps(target: &mut Served, bdev: &str) -> Value {
    target.call("bdev_dirty_bitmap_get", json!({ "name": bdev }))
}

#[test]
fn bitmaps_are_added_changed_and_removed_with_qemus_refusals() {
    let (_dir, mut target) = served();
    target.malloc("disk", 4);
    let add = "bdev_dirty_bitmap_add";
    target.call(add, on("disk", "a"));
    let list = bitmaps(&mut target, "disk");
    let expected = json!([{ "name": "a", "recording": true, "persistent": false, "busy": false, "granularity": 65536, "count": 0 }]);
    assert_eq!(list, expected);
    let again = target.refused(add, on("disk", "a"));
    assert_eq!((again.code, again.message.as_str()), (code::EXISTS, "Bitmap already exists: a"));
    assert!(target.refused(add, on("disk", "")).message.contains("Bitmap name cannot be empty"));
    let long = on("disk", &"x".repeat(1024));
    assert!(target.refused(add, long).message.contains("Bitmap name too long"));
    for granularity in [0, 256, 1000] {
        let odd = with(on("disk", "b"), json!({ "granularity": granularity }));
        let refused = target.refused(add, odd).message;
        assert!(refused.contains("must be power of 2 and at least 512"), "{refused}");
    }
    assert_eq!(target.refused(add, on("nobody", "a")).code, code::NO_DEVICE);
    let kept = with(on("disk", "b"), json!({ "persistent": true }));
    assert!(target.refused(add, kept).message.contains("a file or a device"));
    let none = target.refused("bdev_dirty_bitmap_clear", on("disk", "none")).message;
    assert!(none.contains("Dirty bitmap 'none' not found"), "{none}");

    target.call("bdev_dirty_bitmap_disable", on("disk", "a"));
    assert_eq!(bitmaps(&mut target, "disk")[0]["recording"], false);
    let start = json!({ "source": "disk", "target": "disk", "bitmap": "a" });
    target.malloc("copy", 4);
    let start = with(start, json!({ "target": "copy" }));
    let refused = target.refused("bdev_mirror_start", start.clone()).message;
    assert!(refused.contains("Bitmap 'a' is not enabled"), "{refused}");
    target.call("bdev_dirty_bitmap_enable", on("disk", "a"));
    for (more, words) in [
        (json!({ "sync": "none" }), "Sync mode 'none' not supported with bitmap."),
        (json!({ "granularity": 65536 }), "Granularity and bitmap cannot both be set"),
        (json!({ "bitmap": "b" }), "Dirty bitmap 'b' not found"),
        (json!({ "sync": "incremental", "bitmap_mode": "never" }), "must be 'on-success'"),
    ] {
        let refused = target.refused("bdev_mirror_start", with(start.clone(), more)).message;
        assert!(refused.contains(words), "{refused}");
    }
    let nothing = json!({ "source": "disk", "target": "copy", "sync": "incremental" });
    let refused = target.refused("bdev_mirror_start", nothing).message;
    assert!(refused.contains("must provide a valid bitmap name for 'incremental'"), "{refused}");

    // While a job works by it, it is the job's.
    target.call("bdev_mirror_start", with(start, json!({ "job_id": "delta" })));
    target.wait_for_status("delta", "ready");
    let job = &target.call("job_get_list", json!({ "job_id": "delta" }))[0];
    assert_eq!((&job["bitmap"], &job["bitmap_mode"]), (&json!("a"), &json!("always")));
    assert_eq!(job["total_bytes"], 0, "an empty bitmap has nothing to copy");
    for method in ["remove", "clear", "enable", "disable"] {
        let busy = target.refused(&format!("bdev_dirty_bitmap_{method}"), on("disk", "a"));
        assert_eq!(busy.code, code::BUSY);
        assert!(busy.message.contains("in use by another operation"), "{busy}");
        assert!(busy.message.contains("job 'delta'"), "{busy}");
    }
    target.call("bdev_mirror_finish", json!({ "job_id": "delta" }));
    target.wait_for("delta", |event| event["event"] == "job_completed");
    target.call("bdev_dirty_bitmap_remove", on("disk", "a"));
    assert_eq!(bitmaps(&mut target, "disk"), json!([]));
}

#[test]
fn a_transaction_is_done_whole_or_not_at_all() {
    let (_dir, mut target) = served();
    for name in ["one", "two"] {
        target.malloc(name, 4);
        target.call("vhost_create_blk_controller", json!({ "ctrlr": name, "dev_name": name }));
        target.call("bdev_dirty_bitmap_add", on(name, "a"));
    }
    let action = |method: &str, params: Value| json!({ "method": format!("bdev_dirty_bitmap_{method}"), "params": params });
    let merge = with(on("one", "b"), json!({ "bitmaps": ["a", { "name": "two", "bitmap": "a" }] }));
    let actions = json!([
        action("add", with(on("one", "b"), json!({ "granularity": 512, "disabled": true }))),
        action("merge", merge),
        action("disable", on("two", "a")),
    ]);
    let before = (bitmaps(&mut target, "one"), bitmaps(&mut target, "two"));
    let mut failing = actions.clone();
    failing.as_array_mut().unwrap().push(action("clear", on("two", "none")));
    let refused = target.refused("transaction", json!({ "actions": failing }));
    assert_eq!(refused.data.as_ref().unwrap()["action"], 3);
    assert!(refused.message.contains("nothing was done"), "{refused}");
    assert_eq!((bitmaps(&mut target, "one"), bitmaps(&mut target, "two")), before);

    assert_eq!(
        target.call("transaction", json!({ "actions": actions })),
        json!([true, true, true])
    );
    assert_eq!(bitmaps(&mut target, "one")[1]["granularity"], 512);
    assert_eq!(bitmaps(&mut target, "two")[0]["recording"], false);
    let other = json!([{ "method": "bdev_malloc_delete", "params": { "name": "one" } }]);
    let refused = target.refused("transaction", json!({ "actions": other }));
    assert_eq!(refused.data.unwrap()["kind"], "not_supported_yet");
}

#[test]
fn a_persistent_bitmap_survives_a_stop_and_not_a_crash() {
    let (dir, mut target) = served();
    let path = target.file("disk", 16);
    let add = with(on("disk", "kept"), json!({ "persistent": true, "granularity": 4096 }));
    target.call("bdev_dirty_bitmap_add", add);
    target.call("bdev_dirty_bitmap_add", on("disk", "lost"));
    target.call("bdev_dirty_bitmap_disable", on("disk", "kept"));
    drop(target);

    let restart = || Served::start(dir.path(), Some(dir.path().join("state")));
    let disk = json!({ "name": "disk", "filename": path });
    let mut target = restart();
    target.call("bdev_uring_create", disk.clone());
    let list = bitmaps(&mut target, "disk");
    let expected = json!([{ "name": "kept", "recording": false, "persistent": true, "busy": false, "granularity": 4096, "count": 0 }]);
    assert_eq!(list, expected, "and the other is gone");
    // What a crash leaves: the state directory as it is while the target runs.
    let (state, crashed) = (dir.path().join("state/bitmaps"), dir.path().join("crashed"));
    std::fs::create_dir(&crashed).unwrap();
    for file in std::fs::read_dir(&state).unwrap().flatten() {
        std::fs::copy(file.path(), crashed.join(file.file_name())).unwrap();
    }
    drop(target);
    for file in std::fs::read_dir(&crashed).unwrap().flatten() {
        std::fs::copy(file.path(), state.join(file.file_name())).unwrap();
    }
    let mut target = restart();
    target.call("bdev_uring_create", disk.clone());
    let found = &bitmaps(&mut target, "disk")[0];
    assert_eq!((&found["inconsistent"], &found["count"]), (&json!(true), &json!(0)));
    for method in ["clear", "enable", "disable"] {
        let refused = target.refused(&format!("bdev_dirty_bitmap_{method}"), on("disk", "kept"));
        assert!(refused.message.contains("is inconsistent and cannot be used"), "{refused}");
    }
    target.call("bdev_dirty_bitmap_remove", on("disk", "kept"));
    drop(target);
    let mut target = restart();
    target.call("bdev_uring_create", disk);
    assert_eq!(bitmaps(&mut target, "disk"), json!([]));
}

#[test]
fn a_bitmap_follows_its_disks_size_and_goes_with_its_bdev() {
    let (_dir, mut target) = served();
    target.file("disk", 16);
    target.call("bdev_dirty_bitmap_add", on("disk", "a"));
    target.call("bdev_uring_resize", json!({ "name": "disk", "new_size": 32 * MIB }));
    target.malloc("other", 32);
    target.call("bdev_dirty_bitmap_add", on("other", "a"));
    let merge =
        json!({ "name": "disk", "bitmap": "a", "bitmaps": [{ "name": "other", "bitmap": "a" }] });
    target.call("bdev_dirty_bitmap_merge", merge);
    target.call("bdev_malloc_delete", json!({ "name": "other" }));
    target.malloc("other", 32);
    assert_eq!(bitmaps(&mut target, "other"), json!([]));
    let watched = json!({ "source": "other", "target": "disk", "job_id": "move" });
    let refused = target.refused("bdev_mirror_start", watched).message;
    assert!(refused.contains("a dirty bitmap records its writes"), "{refused}");
}

/// Files of stored bitmaps, of one disk or another.
fn stored(target: &Served) -> usize {
    std::fs::read_dir(target.dir.join("state/bitmaps")).map_or(0, Iterator::count)
}

#[test]
fn the_bitmaps_of_a_mirrors_target_stay_as_they_are_until_it_ends() {
    let (_dir, mut target) = served();
    for name in ["disk", "base"] {
        target.malloc(name, 4);
    }
    let stacked = json!({ "base_bdev_name": "base", "name": "copy" });
    target.call("bdev_passthru_create", stacked);
    let disabled = with(on("base", "a"), json!({ "disabled": true }));
    target.call("bdev_dirty_bitmap_add", disabled);
    let start = json!({ "source": "disk", "target": "copy", "job_id": "move" });
    target.call("bdev_mirror_start", start);
    target.wait_for_status("move", "ready");
    for (method, name) in [("enable", "a"), ("clear", "a"), ("remove", "a"), ("add", "b")] {
        let refused =
            target.refused(&format!("bdev_dirty_bitmap_{method}"), on("base", name)).message;
        assert!(refused.contains("it is the target of mirror job 'move'"), "{refused}");
    }
    // It may be merged from, and the source's are free.
    target.call("bdev_dirty_bitmap_add", on("disk", "b"));
    let merge = with(on("disk", "b"), json!({ "bitmaps": [{ "name": "base", "bitmap": "a" }] }));
    target.call("bdev_dirty_bitmap_merge", merge);
    target.call("job_complete", json!({ "job_id": "move" }));
    target.wait_for("move", |event| event["event"] == "job_completed");
    target.call("bdev_dirty_bitmap_enable", on("base", "a"));
    assert_eq!(bitmaps(&mut target, "base")[0]["recording"], true);
}

#[test]
fn a_file_that_a_mirror_opens_keeps_its_stored_bitmaps() {
    let (dir, mut target) = served();
    target.file("disk", 16);
    let path = target.file("copy", 16);
    let kept = with(on("copy", "kept"), json!({ "persistent": true }));
    target.call("bdev_dirty_bitmap_add", kept);
    target.call("bdev_uring_delete", json!({ "name": "copy" }));
    let start = |job: &str| json!({ "source": "disk", "job_id": job, "target_name": "it", "target_path": path });
    let refused = target.refused("bdev_mirror_start", start("first")).message;
    assert!(refused.contains("its stored dirty bitmap 'kept' records its writes"), "{refused}");
    let copy = json!({ "name": "copy", "filename": path });
    target.call("bdev_uring_create", copy.clone());
    target.call("bdev_dirty_bitmap_disable", on("copy", "kept"));
    target.call("bdev_uring_delete", json!({ "name": "copy" }));

    target.call("bdev_mirror_start", start("second"));
    target.wait_for_status("second", "ready");
    assert_eq!(bitmaps(&mut target, "it")[0]["name"], "kept");
    target.call("job_cancel", json!({ "job_id": "second" }));
    target.wait_for("second", |event| event["event"] == "job_completed");
    target.wait_until_free("disk");
    // Another file under the same name does not inherit it, and the file has it still.
    let other = json!({ "source": "disk", "job_id": "third", "target_name": "it", "target_mode": "create",
        "target_path": dir.path().join("other.raw") });
    target.call("bdev_mirror_start", other);
    assert_eq!(bitmaps(&mut target, "it"), json!([]));
    target.call("bdev_uring_create", copy);
    let found = bitmaps(&mut target, "copy");
    assert_eq!((found[0]["name"].as_str(), found[0].get("inconsistent")), (Some("kept"), None));
}

#[test]
fn a_stop_under_a_mirror_by_bitmap_stores_the_bitmap() {
    let (dir, mut target) = served();
    let path = target.file("disk", 16);
    target.call("vhost_create_blk_controller", json!({ "ctrlr": "vm", "dev_name": "disk" }));
    target.malloc("copy", 16);
    let kept = with(on("disk", "kept"), json!({ "persistent": true }));
    target.call("bdev_dirty_bitmap_add", kept);
    let start = json!({ "source": "disk", "target": "copy", "job_id": "delta", "sync": "bitmap", "bitmap": "kept" });
    target.call("bdev_mirror_start", start);
    drop(target);
    let mut target = Served::start(dir.path(), Some(dir.path().join("state")));
    target.call("bdev_uring_create", json!({ "name": "disk", "filename": path }));
    let found = bitmaps(&mut target, "disk");
    let state = (&found[0]["recording"], &found[0]["busy"], found[0].get("inconsistent"));
    assert_eq!(state, (&json!(true), &json!(false), None));
}

#[test]
fn what_is_stored_follows_what_there_is() {
    let (_dir, mut target) = served();
    target.file("disk", 16);
    let persistent = json!({ "persistent": true });
    let action = |method: &str, params: Value| json!({ "method": format!("bdev_dirty_bitmap_{method}"), "params": params });
    // A transaction that fails leaves nothing behind.
    let failing = json!([
        action("add", with(on("disk", "a"), persistent.clone())),
        action("clear", on("disk", "none")),
    ]);
    target.refused("transaction", json!({ "actions": failing }));
    assert_eq!(stored(&target), 0);
    target.call("bdev_dirty_bitmap_add", with(on("disk", "a"), persistent.clone()));
    assert_eq!(stored(&target), 1, "it is marked as in use at once");
    // One of the same name takes the place of it, and is not kept.
    let exchange = json!([action("remove", on("disk", "a")), action("add", on("disk", "a"))]);
    target.call("transaction", json!({ "actions": exchange }));
    assert_eq!(stored(&target), 0);
    let exchange = json!([
        action("remove", on("disk", "a")),
        action("add", with(on("disk", "a"), persistent)),
    ]);
    target.call("transaction", json!({ "actions": exchange }));
    assert_eq!(stored(&target), 1);
}

#[test]
fn a_bitmap_that_would_take_all_memory_is_refused() {
    let (_dir, mut target) = served();
    let huge = json!({ "name": "huge", "num_blocks": 1_u64 << 40, "block_size": 512 });
    target.call("bdev_null_create", huge);
    let fine = with(on("huge", "a"), json!({ "granularity": 512 }));
    let refused = target.refused("bdev_dirty_bitmap_add", fine).message;
    assert!(refused.contains("a bitmap has at most 1073741824"), "{refused}");
    target.call("bdev_dirty_bitmap_add", with(on("huge", "a"), json!({ "granularity": 1 << 30 })));
    target.malloc("other", 4);
    target.call("bdev_dirty_bitmap_add", on("other", "a"));
    let merge = with(on("other", "a"), json!({ "bitmaps": [{ "name": "huge", "bitmap": "a" }] }));
    let refused = target.refused("bdev_dirty_bitmap_merge", merge).message;
    assert!(refused.contains("Bitmaps are of different sizes"), "{refused}");
}

#[test]
fn a_disk_does_not_outgrow_its_bitmaps() {
    let (_dir, mut target) = served();
    target.call("bdev_null_create", json!({ "name": "n", "num_blocks": 2048, "block_size": 512 }));
    target.call("bdev_dirty_bitmap_add", with(on("n", "a"), json!({ "granularity": 512 })));
    let grow = |mib: u64| json!({ "name": "n", "new_size": mib });
    let refused = target.refused("bdev_null_resize", grow(1 << 40)).message;
    assert!(refused.contains("bitmap 'a' would have 2251799813685248 chunks"), "{refused}");
    target.call("bdev_null_resize", grow(2));
    target.call("bdev_dirty_bitmap_remove", on("n", "a"));
    target.call("bdev_null_resize", grow(1 << 40));
}

#[test]
fn a_bitmap_that_missed_writes_is_never_believed_again() {
    let (dir, mut target) = served();
    let path = target.file("disk", 16);
    let kept = with(on("disk", "kept"), json!({ "persistent": true }));
    target.call("bdev_dirty_bitmap_add", kept);
    drop(target);

    // The disk has grown while nobody served it, is written so, and has its old size again.
    let file = File::options().write(true).open(&path).unwrap();
    for mib in [32, 16] {
        file.set_len(mib * MIB).unwrap();
        let mut target = Served::start(dir.path(), Some(dir.path().join("state")));
        target.call("bdev_uring_create", json!({ "name": "disk", "filename": path }));
        let found = bitmaps(&mut target, "disk");
        assert_eq!(found[0]["inconsistent"], true, "{found} of {mib} MiB");
    }
}

#[test]
fn a_bitmap_that_cannot_be_marked_as_in_use_is_given_up() {
    let (dir, mut target) = served();
    let path = target.file("disk", 16);
    let kept = with(on("disk", "kept"), json!({ "persistent": true }));
    target.call("bdev_dirty_bitmap_add", kept);
    drop(target);

    let disk = json!({ "name": "disk", "filename": path });
    let stored = std::fs::read_dir(dir.path().join("state/bitmaps")).unwrap().flatten();
    // In the way of the new file that is to take the stored one's place.
    let new: Vec<PathBuf> = stored.map(|it| it.path().with_extension("bitmap.new")).collect();
    new.iter().for_each(|path| std::fs::create_dir(path).unwrap());
    let mut target = Served::start(dir.path(), Some(dir.path().join("state")));
    target.call("bdev_uring_create", disk.clone());
    assert_eq!(bitmaps(&mut target, "disk")[0]["inconsistent"], true);
    drop(target);
    new.iter().for_each(|path| std::fs::remove_dir(path).unwrap());
    let mut target = Served::start(dir.path(), Some(dir.path().join("state")));
    target.call("bdev_uring_create", disk);
    assert_eq!(bitmaps(&mut target, "disk"), json!([]), "what it says is old");
}

#[test]
fn without_a_state_directory_nothing_is_kept_and_that_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let mut target = Served::start(dir.path(), None);
    target.file("disk", 16);
    let kept = with(on("disk", "kept"), json!({ "persistent": true }));
    let refused = target.refused("bdev_dirty_bitmap_add", kept).message;
    assert!(refused.contains("--state-dir"), "{refused}");
    assert_eq!(bitmaps(&mut target, "disk"), json!([]));
}
