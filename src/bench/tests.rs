//! What the command line of a benchmark takes, and one small benchmark told in every form.

use clap::Parser;
use resilver_tests::e2e::StorageDaemon;

use super::*;

#[derive(Debug, Parser)]
struct Line {
    #[command(flatten)]
    bench: BenchArgs,
}

fn args(words: &[&str]) -> BenchArgs {
    Line::try_parse_from(std::iter::once(&"bench").chain(words)).unwrap().bench
}

#[test]
fn sockets_go_by_the_name_that_they_are_given_or_by_their_file() {
    let args = args(&["--socket", "/run/a.sock", "--socket", "qemu=/tmp/q", "--socket", "b=c/d=e"]);
    let names: Vec<&str> = args.sockets.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["a.sock", "qemu", "b"]);
    assert_eq!(args.sockets[2].1, PathBuf::from("c/d=e"));
}

#[test]
fn what_writes_must_be_asked_for_by_name() {
    let refused = args(&["--socket", "s", "--rw", "randread,randwrite"]).jobs().unwrap_err();
    assert!(refused.to_string().contains("--overwrite"), "{refused}");
    let lists = [
        "--socket",
        "s",
        "--rw",
        "read,randrw",
        "--overwrite",
        "--bs",
        "512,4k",
        "--iodepth",
        "1,2,3",
    ];
    let jobs = args(&lists).jobs().unwrap();
    assert_eq!(jobs.len(), 12);
    assert_eq!((jobs[0].read_percent, jobs[11].read_percent), (100, 70));
    assert!(args(&["--socket", "s", "--bs", "1000"]).jobs().is_err());
}

#[test]
fn two_back_ends_are_measured_in_turn_and_told_in_every_form() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let file = std::fs::File::create(path("disk")).unwrap();
    file.set_len(8 << 20).unwrap();
    let Some(_daemon) = StorageDaemon::serve("bench", &path("disk"), &path("sock"), "") else {
        return;
    };
    let socket = path("sock");
    let (one, other) = (format!("one={}", socket.display()), format!("other={}", socket.display()));
    let args = args(&[
        "--socket",
        &one,
        "--socket",
        &other,
        "--rw",
        "randread,randwrite",
        "--overwrite",
        "--iodepth",
        "4",
        "--time",
        "100ms",
        "--warmup",
        "10ms",
        "--repeat",
        "2",
    ]);
    let cells = args.jobs().unwrap().iter().map(|job| measure(&args, job).unwrap()).collect();
    let report = Report::new(cells);
    let json = report.to_json();
    for cell in 0..2 {
        for target in 0..2 {
            let target = &json["cells"][cell]["targets"][target];
            assert!(target["iops"]["median"].as_f64().unwrap() > 100.0, "{target}");
            assert_eq!(target["runs"].as_array().unwrap().len(), 2);
            let latency = |name: &str| target["latency_ns"][name].as_u64().unwrap();
            assert!(latency("p50") > 0 && latency("p50") <= latency("p99.99"));
            assert!(latency("p99.99") <= latency("max"));
        }
    }
    let markdown = report.to_markdown();
    assert_eq!(markdown.matches("| one |").count() + markdown.matches("| other |").count(), 4);
    let svg = plot::distributions(&report);
    assert_eq!(svg.matches("<path").count(), 4);
    assert!(svg.ends_with("</svg>\n"));
}

#[test]
fn a_spread_is_the_middle_and_the_ends() {
    let spread = report::Spread::of([3.0, 1.0, 2.0, 10.0]).unwrap();
    assert_eq!((spread.median, spread.min, spread.max), (2.5, 1.0, 10.0));
    assert_eq!(report::Spread::of([]), None);
}

#[test]
fn a_timeline_is_asked_for_with_both_ends_of_the_move() {
    let one = Line::try_parse_from(["bench", "--socket", "s", "--mirror", "a"]);
    assert!(one.is_err());
    let both = args(&["--socket", "s", "--mirror", "a", "--mirror-target", "b"]);
    assert_eq!(both.copy_mode, "write-blocking");
}
