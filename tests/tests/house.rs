//! The shape of the house as a test: which crate may know which, where unsafe may stand, what the data plane may not use,
//! how long a file may be. A rule that nobody checks is a wish.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use cargo_metadata::{DependencyKind, MetadataCommand};

/// Each crate and those of ours it may depend on: one direction only.
const MAY_DEPEND_ON: [(&str, &[&str]); 7] = [
    ("resilver-sys", &[]),
    ("resilver-reactor", &["resilver-sys"]),
    ("resilver-bdev", &["resilver-sys", "resilver-reactor"]),
    ("resilver-vhost", &["resilver-sys", "resilver-reactor", "resilver-bdev"]),
    ("resilver-rpc", &["resilver-sys", "resilver-reactor", "resilver-bdev", "resilver-vhost"]),
    (
        "resilver",
        &["resilver-sys", "resilver-reactor", "resilver-bdev", "resilver-vhost", "resilver-rpc"],
    ),
    (
        "resilver-tests",
        &["resilver-sys", "resilver-reactor", "resilver-bdev", "resilver-vhost", "resilver-rpc"],
    ),
];

/// Outside crates that only these of ours may use: who knows JSON, who talks to the kernel.
const RESERVED: [(&str, &[&str]); 6] = [
    ("serde_json", &["resilver-rpc", "resilver", "resilver-tests"]),
    ("serde", &["resilver-rpc", "resilver", "resilver-tests"]),
    ("io-uring", &["resilver-sys"]),
    ("libc", &["resilver-sys"]),
    ("hugepage-rs", &["resilver-sys"]),
    ("axum", &["resilver-rpc"]),
];

/// Words that the data plane may not use, and what to use instead.
const BANNED: [(&str, &str); 10] = [
    ("HashMap", "an array indexed by slot"),
    ("BTreeMap", "an array indexed by slot"),
    ("Rc<", "ownership, or Arc where control shares it"),
    ("RefCell", "ownership"),
    ("Mutex", "a mailbox"),
    ("RwLock", "a mailbox"),
    ("Instant::now", "Context::now"),
    ("SystemTime", "Context::now"),
    ("thread::sleep", "a deadline in arm()"),
    ("tracing::", "an event to control"),
];

/// Files of the data-plane crates that run on control threads only, and so may use what is banned.
const CONTROL_SIDE: [&str; 11] = [
    "bdev/src/uring/file.rs",
    "vhost/src/server.rs",
    "vhost/src/sessions.rs",
    "vhost/src/connection.rs",
    "vhost/src/connection/",
    "vhost/src/socket.rs",
    "vhost/src/front_end/connection.rs",
    "vhost/src/front_end/link.rs",
    "vhost/src/front_end/identity.rs",
    "vhost/src/bdev_virtio/keeper.rs",
    "reactor/src/time.rs",
];

/// Lines of code (before the first test module) that a file may have.
const FILE_LINES_MAX: usize = 900;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_path_buf()
}

fn sources(under: &[&str]) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut folders: Vec<PathBuf> = under.iter().map(|folder| root().join(folder)).collect();
    while let Some(folder) = folders.pop() {
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        for entry in entries {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned();
                found.push((name, fs::read_to_string(&path).unwrap()));
            }
        }
    }
    assert!(!found.is_empty(), "no sources under {under:?}");
    found
}

/// The lines of a source before its test module, without comments, numbered from 1.
fn code(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines()
        .enumerate()
        .take_while(|(_, line)| {
            !line.starts_with("#[cfg(test)]") && !line.starts_with("#[cfg(all(test")
        })
        .map(|(at, line)| (at + 1, line.split("//").next().unwrap_or("")))
}

#[test]
fn dependencies_run_one_way() {
    let metadata = MetadataCommand::new()
        .manifest_path(root().join("Cargo.toml"))
        .no_deps()
        .other_options(vec!["--offline".to_owned()])
        .exec()
        .unwrap();
    let may: BTreeMap<_, _> = MAY_DEPEND_ON.into_iter().collect();
    let mut seen = 0;
    for package in &metadata.packages {
        let name = package.name.as_str();
        let allowed = may.get(name).unwrap_or_else(|| panic!("{name} has no place in the house"));
        for dependency in &package.dependencies {
            let other = dependency.name.as_str();
            // The binary's own tests skip aloud as all do; in nothing else do they reach around the layers.
            let for_tests = name != "resilver" || other == "resilver-tests";
            if dependency.kind == DependencyKind::Development && for_tests {
                continue;
            }
            assert!(
                !other.starts_with("resilver") || allowed.contains(&other),
                "{name} must not depend on {other}"
            );
            for (reserved, users) in RESERVED {
                assert!(
                    other != reserved || users.contains(&name),
                    "{name} must not use {reserved}: only {users:?} may"
                );
            }
        }
        seen += 1;
    }
    assert_eq!(seen, MAY_DEPEND_ON.len());
}

#[test]
fn unsafe_stands_in_sys_alone_and_each_block_is_argued() {
    let mut blocks = 0;
    for (name, text) in sources(&["sys", "reactor", "bdev", "vhost", "rpc", "src", "tests"]) {
        if name == "tests/tests/house.rs" {
            continue;
        }
        let lines: Vec<&str> = text.lines().collect();
        for (at, line) in lines.iter().enumerate() {
            let code = line.split("//").next().unwrap_or("");
            let has_unsafe = ["unsafe {", "unsafe fn", "unsafe impl", "unsafe extern"]
                .iter()
                .any(|word| code.contains(word));
            if !has_unsafe {
                continue;
            }
            assert!(name.starts_with("sys/"), "{name}:{} is unsafe outside sys", at + 1);
            let argued = lines[at.saturating_sub(12)..=at]
                .iter()
                .any(|line| line.contains("SAFETY:") || line.contains("# Safety"));
            assert!(argued, "{name}:{} has no SAFETY argument", at + 1);
            blocks += 1;
        }
    }
    assert!(blocks > 10, "the search finds nothing any more");
}

#[test]
fn the_data_plane_uses_nothing_that_locks_allocates_or_asks_the_time() {
    let mut checked = 0;
    for (name, text) in sources(&["reactor/src", "bdev/src", "vhost/src"]) {
        let control_side = CONTROL_SIDE.iter().any(|exempt| name.starts_with(exempt));
        if control_side || name.ends_with("tests.rs") || name.contains("/tests/") {
            continue;
        }
        checked += 1;
        for (line, text) in code(&text) {
            for (word, instead) in BANNED {
                assert!(!text.contains(word), "{name}:{line} uses {word}; use {instead}");
            }
        }
    }
    assert!(checked > 12, "the search finds nothing any more");
}

#[test]
fn no_file_grows_beyond_what_one_sitting_can_read() {
    for (name, text) in sources(&["sys", "reactor", "bdev", "vhost", "rpc", "src", "tests"]) {
        let lines = code(&text).count();
        assert!(lines <= FILE_LINES_MAX, "{name} has {lines} lines; split it by concept");
    }
}

#[test]
fn every_file_opens_with_its_story() {
    for (name, text) in sources(&["sys", "reactor", "bdev", "vhost", "rpc", "src", "tests"]) {
        assert!(text.starts_with("//!"), "{name} does not say what it is");
    }
}

#[test]
fn nothing_is_left_unfinished_or_switched_off() {
    let words = ["todo!(", "unimplemented!(", "FIXME", "XXX", "#[ignore"];
    for (name, text) in sources(&["sys", "reactor", "bdev", "vhost", "rpc", "src", "tests"]) {
        if name == "tests/tests/house.rs" {
            continue;
        }
        for word in words {
            assert!(!text.contains(word), "{name} contains {word}");
        }
    }
}

#[test]
fn every_dependency_stands_in_one_table_with_its_reason() {
    let manifest = fs::read_to_string(root().join("Cargo.toml")).unwrap();
    let table = manifest.split("[workspace.dependencies]").nth(1).unwrap();
    let table = table.split("\n[").next().unwrap();
    for line in table.lines().filter(|line| line.contains(" = ")) {
        assert!(line.contains("path = ") || line.contains(" # "), "no reason beside: {line}");
    }
    for folder in ["sys", "reactor", "bdev", "vhost", "rpc", "tests"] {
        let text = fs::read_to_string(root().join(folder).join("Cargo.toml")).unwrap();
        assert!(!text.contains("version = \""), "{folder}/Cargo.toml names a version of its own");
    }
}

/// Names in a page that can only be tests: long, in code quotes, in lower case with underscores.
fn tests_named_in(page: &str) -> impl Iterator<Item = &str> {
    page.split('`').skip(1).step_by(2).filter(|word| {
        word.matches('_').count() > 2
            && word.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
    })
}

#[test]
fn a_page_that_names_a_test_names_one_that_exists() {
    let sources = sources(&["sys", "reactor", "bdev", "vhost", "rpc", "src", "tests"]);
    let known = |word: &str| {
        let word = format!("{word}(");
        sources.iter().any(|(_, text)| text.contains(&format!("fn {word}")))
    };
    let page = fs::read_to_string(root().join("docs/mirror.md")).unwrap();
    let shown: Vec<&str> =
        page.lines().filter(|line| line.starts_with('|')).flat_map(tests_named_in).collect();
    assert!(shown.len() > 60, "the tables of the page have gone");
    let not_tests = ["bdev_mirror_finish", "bdev_mirror_start", "target_undurable_bytes"];
    for word in shown.into_iter().filter(|word| !not_tests.contains(word)) {
        assert!(
            known(word),
            "docs/mirror.md says that {word} shows something; there is no such test"
        );
    }
}
