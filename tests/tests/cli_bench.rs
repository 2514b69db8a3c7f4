//! `resilver bench` as somebody at a terminal runs it: what it stops goes on, however it ends; what a server adds to a file is told,
//! and a file that a server has is left alone.

#![allow(clippy::unwrap_used)] // a test may panic

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use resilver_tests::e2e::Server;
use resilver_tests::e2e::server::binary;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

const PATIENCE: Duration = Duration::from_secs(60);

fn served() -> Server {
    let mut server = Server::start();
    server
        .call("bdev_null_create", json!({ "name": "null", "num_blocks": 2048, "block_size": 512 }));
    server.call("vhost_create_blk_controller", json!({ "ctrlr": "vm", "dev_name": "null" }));
    server
}

/// Longer than any test: it is to be interrupted.
fn bench(servers: &[Server]) -> Child {
    // Signals reach it even where whoever started the tests has them ignored.
    let mut command = Command::new("env");
    command.args(["--default-signal=INT,TERM,HUP"]).arg(binary()).arg("bench");
    for server in servers {
        command.arg("--socket").arg(server.controller("vm"));
    }
    command.args(["--pause-others", "--time", "1h", "--warmup", "1ms", "--iodepth", "1"]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

fn is_stopped(server: &Server) -> bool {
    let pid = server.process().as_raw_nonzero();
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    stat.rsplit(") ").next().unwrap().starts_with('T')
}

fn wait_until(what: &str, is: impl Fn() -> bool) {
    let begun = Instant::now();
    while !is() {
        assert!(begun.elapsed() < PATIENCE, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn an_interrupted_comparison_leaves_no_server_stopped() {
    let mut servers = [served(), served()];
    let once_or_twice: [&[Signal]; 4] =
        [&[Signal::INT], &[Signal::TERM], &[Signal::HUP], &[Signal::INT, Signal::INT]];
    for signals in once_or_twice {
        let child = bench(&servers);
        wait_until("one server is stopped", || servers.iter().any(is_stopped));
        for signal in signals {
            // The second may find nobody.
            let _ = kill_process(Pid::from_child(&child), *signal);
        }
        let ended = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&ended.stderr);
        assert_eq!(ended.status.code(), Some(130), "{signals:?}: {said}");
        wait_until("both servers run", || !servers.iter().any(is_stopped));
    }
    for server in &mut servers {
        server.call("rpc_get_methods", json!({}));
    }
}

#[test]
fn a_served_file_is_compared_with_itself_only_if_that_is_wanted() {
    let mut server = Server::start();
    let file = server.path("vm.raw");
    std::fs::File::create(&file).unwrap().set_len(8 << 20).unwrap();
    server.serve_file("disk", &file, "vm");
    let run = |more: &[&str]| {
        let mut command = Command::new(binary());
        command.args(["--json", "bench", "--iodepth", "1,8", "--time", "30ms", "--warmup", "2ms"]);
        command.arg("--socket").arg(server.controller("vm")).arg("--file").arg(&file);
        command.args(more).output().unwrap()
    };
    let refused = run(&[]);
    let said = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(1), "{said}");
    assert!(said.contains("is in use: locked by process"), "{said}");

    let told = run(&["--force-share", "--repeat", "6"]);
    let said = String::from_utf8_lossy(&told.stderr);
    assert!(told.status.success(), "{said}");
    let report: serde_json::Value = serde_json::from_slice(&told.stdout).unwrap();
    for cell in report["cells"].as_array().unwrap() {
        let [bare, served] = [0, 1].map(|at| &cell["targets"][at]);
        assert_eq!((bare["name"].as_str(), served["name"].as_str()), (Some("vm.raw"), Some("vm")));
        assert!(bare["iops"]["min"].as_f64() > Some(0.0), "{bare}");
        let interval = served["iops_to_first"]["interval_95"].as_array().unwrap();
        assert!(interval[0].as_f64() <= interval[1].as_f64(), "{interval:?}");
    }
}
