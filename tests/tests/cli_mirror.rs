//! `resilver mirror` as a script or an operator runs it: what it prints, how it ends, and what Ctrl-C does.

#![allow(clippy::unwrap_used)] // a test may panic

use std::fs::File;
use std::process::{Child, Command, Output, Stdio};

use resilver_tests::e2e::Server;
use resilver_tests::e2e::server::binary;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
/// So slow that the mirror is never ready.
const SLOW: [&str; 2] = ["--bandwidth", "4KiB"];

/// A server with a disk of data, `disk`.
fn served() -> Server {
    let mut server = Server::start();
    let path = server.path("disk.raw");
    std::fs::write(&path, vec![7; 8 * MIB as usize]).unwrap();
    server.serve_file("disk", &path, "vm");
    server
}

/// Interrupts reach it even where whoever started the tests has them ignored, as a shell has for what it puts in the background.
fn mirror(server: &Server, arguments: &[&str]) -> Child {
    let mut command = Command::new("env");
    command
        .arg("--default-signal=INT")
        .arg(binary())
        .arg("--rpc-socket")
        .arg(server.path("rpc.sock"))
        .arg("mirror")
        .args(arguments);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Starts a mirror to a new file of this name.
fn start(server: &Server, target: &str, more: &[&str]) -> Child {
    let path = server.path(target).display().to_string();
    let arguments = [&["start", "disk", &path, "--create", "--job-id", "job"], more].concat();
    mirror(server, &arguments)
}

/// Exit code, standard output, standard error.
fn ended(child: Child) -> (i32, String, String) {
    let Output { status, stdout, stderr } = child.wait_with_output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap().trim().to_owned();
    (status.code().unwrap_or(-1), text(stdout), text(stderr))
}

/// The job's last words.
fn history(server: &mut Server) -> Value {
    let history = server.call("job_get_history", json!({}));
    history.as_array().unwrap().last().unwrap().clone()
}

#[test]
fn a_script_sees_a_switch_over_through_and_may_ask_again_afterwards() {
    let mut server = served();
    let (code, said, shown) = ended(start(&server, "new.raw", &["--wait", "--verbose", "--pivot"]));
    assert_eq!((code, said.as_str()), (0, "job switched over to its target"), "{shown}");
    // Without a terminal progress comes in lines.
    assert!(shown.lines().all(|line| line.starts_with("job: ")), "{shown}");
    assert!(shown.contains("job: 100 %, "), "{shown}");
    assert_eq!(server.served_bdev("vm"), "job-target");

    let (code, said, _) = ended(mirror(&server, &["wait", "job"]));
    assert_eq!((code, said.as_str()), (0, "job switched over to its target"));
    let (code, _, why) = ended(mirror(&server, &["wait", "nobody"]));
    assert_eq!((code, why.as_str()), (1, "resilver: Job 'nobody' not found"));
    assert_eq!(history(&mut server)["phase"], "completed");
}

#[test]
fn a_mirror_that_takes_too_long_is_cancelled_and_says_so_afterwards() {
    let mut server = served();
    let timeout = ["--wait", "--timeout", "200ms"];
    let (code, _, why) = ended(start(&server, "a.raw", &[&SLOW[..], &timeout].concat()));
    assert_eq!(code, 4, "{why}");
    assert!(why.contains("not done in time: job was cancelled"), "{why}");
    assert_eq!(history(&mut server)["error"], "Operation canceled");
    let (code, _, why) = ended(mirror(&server, &["wait", "job"]));
    assert_eq!(code, 1);
    assert!(why.contains("job failed: Operation canceled"), "{why}");

    // Kept until it is dismissed, it is told from the list.
    let keep = [&SLOW[..], &timeout, &["--keep-job", "--async"]].concat();
    let (code, _, why) = ended(start(&server, "b.raw", &keep));
    assert_eq!(code, 4, "{why}");
    server.wait_for_status("job", "concluded");
    let (code, _, why) = ended(mirror(&server, &["wait", "job"]));
    assert_eq!(code, 1, "{why}");
}

#[test]
fn an_interrupt_cancels_the_mirror_that_was_started_and_leaves_one_that_is_watched() {
    let mut server = served();
    let started = start(&server, "a.raw", &[&SLOW[..], &["--verbose", "--pivot"]].concat());
    while server.call("job_get_list", json!({})) == json!([]) {
        std::thread::yield_now();
    }
    let watching = mirror(&server, &["wait", "job"]);
    // Both are surely waiting when their first look at the events is over.
    std::thread::sleep(std::time::Duration::from_secs(1));
    for (child, cancels) in [(watching, false), (started, true)] {
        kill_process(Pid::from_child(&child), Signal::INT).unwrap();
        let (code, _, why) = ended(child);
        if cancels {
            assert_eq!(code, 130, "{why}");
            assert!(why.contains("interrupted: job was cancelled"), "{why}");
            assert_eq!(history(&mut server)["error"], "Operation canceled");
        } else {
            assert_eq!(server.job("job")["status"], "running");
        }
    }
}

#[test]
fn with_async_the_end_is_not_waited_for() {
    let mut server = served();
    let (code, said, why) = ended(start(&server, "a.raw", &["--finish", "--async"]));
    assert_eq!(code, 0, "{why}");
    assert!(said.contains("job was told to end"), "{said}");
    let (code, said, _) = ended(mirror(&server, &["wait", "job", "--finish"]));
    assert_eq!((code, said.as_str()), (0, "job ended; its target is a copy of one moment"));
    assert_eq!(server.served_bdev("vm"), "disk");
    let copy = File::open(server.path("a.raw")).unwrap();
    assert_eq!(copy.metadata().unwrap().len(), 8 * MIB);
}

#[test]
fn a_mirror_is_held_to_a_ceiling_and_compared_on_the_way() {
    let mut server = served();
    let options = ["--latency-ceiling", "2ms", "--auto-converge", "--verify", "--wait"];
    let (code, _, shown) = ended(start(&server, "new.raw", &options));
    assert_eq!(code, 0, "{shown}");
    let (code, said, shown) = ended(mirror(&server, &["verify", "job", "--sample", "50"]));
    assert_eq!((code, said.as_str()), (0, "verify-job"), "{shown}");
    assert_eq!(ended(mirror(&server, &["verify", "nothing"])).0, 1);
    assert_eq!(ended(mirror(&server, &["complete", "job"])).0, 0);
    let (code, said, shown) = ended(mirror(&server, &["wait", "job", "--wait"]));
    assert_eq!((code, said.as_str()), (0, "job switched over to its target"), "{shown}");
    let history = server.call("job_get_history", json!({}));
    let jobs: Vec<_> = history.as_array().unwrap().iter().map(|job| job["id"].clone()).collect();
    assert!(jobs.contains(&json!("verify-job")), "{history}");
}
