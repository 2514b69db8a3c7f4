//! What the command line of a benchmark takes, and one small benchmark told in every form.

use clap::Parser;
use resilver_sys::Ring;
use resilver_tests::e2e::StorageDaemon;

use super::life::{Life, Slice};
use super::*;
use crate::load::Phase;

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
fn a_file_is_measured_beside_a_server_and_told_in_every_form() {
    // In memory where that knows direct I/O: a disk that is busy can be silent for longer than a round.
    let directory = if Ring::works_inline() {
        tempfile::tempdir_in("/dev/shm").unwrap()
    } else {
        tempfile::tempdir().unwrap()
    };
    let path = |name: &str| directory.path().join(name);
    for name in ["disk", "file"] {
        std::fs::File::create(path(name)).unwrap().set_len(8 << 20).unwrap();
    }
    let (disk, socket) = (path("disk"), path("sock"));
    let Some(_daemon) = StorageDaemon::serve("bench", &disk, &socket, ",num-queues=2") else {
        return;
    };
    let file = path("file");
    let (socket, file) = (socket.to_str().unwrap(), file.to_str().unwrap());
    let jobs = ["--job", "randread:4k:8:2", "--job", "randwrite:8k:4", "--overwrite"];
    let rounds = ["--time", "30ms", "--warmup", "5ms", "--repeat", "6"];
    let disks = ["--socket", socket, "--file", file];
    let args = args(&[disks.as_slice(), &jobs, &rounds].concat());
    let mut bench = Bench::new(&args, None, Interrupt::default()).unwrap();
    let cells = args.jobs().unwrap().iter().map(|job| bench.measure(job).unwrap()).collect();
    let report = bench.report(cells);
    let json = report.to_json();
    for cell in 0..2 {
        let [bare, served] = [0, 1].map(|at| &json["cells"][cell]["targets"][at]);
        assert_eq!((bare["name"].as_str(), served["name"].as_str()), (Some("file"), Some("sock")));
        assert_eq!((bare["direct"].as_bool(), served["direct"].as_bool()), (Some(true), None));
        for run in bare["runs"].as_array().unwrap() {
            assert!(run["requests"].as_u64() > Some(0), "{run}");
            assert_eq!(run["machine"]["server_known"], true);
        }
        let ratio = &served["iops_to_first"];
        // Of six pairs the ends.
        assert_eq!(ratio["interval_95"], serde_json::json!([ratio["min"], ratio["max"]]));
    }
    assert_eq!(report.to_markdown().matches("| file |").count(), 2);
    assert_eq!(plot::distributions(&report).matches("<path").count(), 4);
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
    let mut bench = Bench::new(&args, None, Interrupt::default()).unwrap();
    let cells = args.jobs().unwrap().iter().map(|job| bench.measure(job).unwrap()).collect();
    let report = bench.report(cells);
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
fn an_interval_of_the_median_leaves_out_what_a_coin_allows() {
    let of = |count: u32| report::interval((1..=count).map(f64::from));
    // By the table of the sign test at 5%, as any book of statistics has it: none left out on either side up to 8, one up to 11,
    // two up to 14.
    assert_eq!((of(0), of(1), of(5)), (None, None, None));
    assert_eq!((of(6), of(8)), (Some((1.0, 6.0)), Some((1.0, 8.0))));
    assert_eq!((of(9), of(10), of(11)), (Some((2.0, 8.0)), Some((2.0, 9.0)), Some((2.0, 10.0))));
    assert_eq!((of(12), of(25)), (Some((3.0, 10.0)), Some((8.0, 18.0))));
    let (low, high) = of(1000).unwrap();
    assert_eq!((low, high), (469.0, 532.0));
}

#[test]
fn a_file_needs_no_socket_and_is_what_sockets_are_compared_with() {
    let both = args(&["--socket", "vm1", "--file", "bare=/srv/f", "--socket", "vm2"]);
    let names: Vec<String> = both.disks().into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["bare", "vm1", "vm2"]);
    assert_eq!(args(&["--file", "f"]).disks(), [("f".to_owned(), Place::File("f".into()))]);
    for wrong in [
        // Nothing to measure, nothing to share, nothing to pin, and no mirror of what is not served.
        [].as_slice(),
        &["--socket", "s", "--force-share"],
        &["--socket", "s", "--core", "1", "--file-core", "0"],
        &["--file", "f", "--mirror", "vm1", "--mirror-target", "t"],
    ] {
        assert!(Line::try_parse_from([&["bench"], wrong].concat()).is_err(), "{wrong:?}");
    }
}

#[test]
fn a_timeline_is_asked_for_with_both_ends_of_the_move() {
    let one = Line::try_parse_from(["bench", "--socket", "s", "--mirror", "a"]);
    assert!(one.is_err());
    let both = args(&["--socket", "s", "--mirror", "a", "--mirror-target", "b"]);
    assert_eq!(both.copy_mode, "write-blocking");
}

/// A run of so many requests a second whose latencies are one of each microsecond up to `most`.
fn made_up(iops: u64, most: u64) -> Run {
    let mut latency = hdrhistogram::Histogram::new_with_bounds(1, 60_000_000_000, 3).unwrap();
    (1..=most).for_each(|micros| latency.record(micros * 1000).unwrap());
    let time = Duration::from_secs(1);
    let disturbance = Default::default();
    Run { requests: iops, bytes: iops * 4096, time, latency, disturbance, direct: None }
}

/// Two servers, the second twice as fast; the first has a name that XML would misread.
fn made_up_report() -> Report {
    let args = args(&["--socket", "s", "--job", "randread:4k:8:2"]);
    let job = args.jobs().unwrap()[0];
    let (mut one, mut other) = (Target::new("<a & b>".to_owned()), Target::new("b".to_owned()));
    for round in 1..=3 {
        one.add(made_up(1000 * round, 10_000));
        other.add(made_up(2000 * round, 1000));
    }
    Report::new(vec![Cell::new(job, vec![one, other])], vec![90.0, 450.0, 100.0])
}

#[test]
fn percentiles_ratios_and_rates_are_those_of_the_runs() {
    let json = made_up_report().to_json();
    let [one, other] = [0, 1].map(|at| json["cells"][0]["targets"][at].clone());
    let near = |value: &serde_json::Value, wanted: f64| {
        let value = value.as_f64().unwrap();
        // Three significant digits, and the next of a thousand values where a rank is rounded up.
        assert!((value / wanted - 1.0).abs() < 0.002, "{value} is not {wanted}");
    };
    for (name, micros) in
        [("p50", 5000.0), ("p90", 9000.0), ("p99", 9900.0), ("p99.9", 9990.0), ("max", 10_000.0)]
    {
        near(&one["latency_ns"][name], micros * 1000.0);
        near(&other["latency_ns"][name], micros * 100.0);
    }
    near(&one["iops"]["median"], 2000.0);
    near(&one["iops"]["max"], 3000.0);
    near(&other["iops_to_first"]["median"], 2.0);
    assert_eq!(other["iops_to_first"]["interval_95"], serde_json::json!(null), "of three pairs");
    near(&json["round_trip_ns"]["median"], 100.0);
}

#[test]
fn a_job_is_named_by_its_words() {
    let words = ["--job", "randread:512:1", "--job", "randrw:128k:32:4"];
    let named = [["--socket", "s"].as_slice(), &words, &["--overwrite"]].concat();
    let jobs = args(&named).jobs().unwrap();
    let told: Vec<_> = jobs.iter().map(|job| (job.block, job.depth, job.queues)).collect();
    assert_eq!(told, [(512, 1, 1), (131_072, 32, 4)]);
    // The same rules as for lists, and no lists beside them.
    assert!(args(&["--socket", "s", "--job", "write:4k:1"]).jobs().is_err());
    for wrong in [
        "randread",
        "randread:4k",
        "none:4k:1",
        "read:4k:0",
        "read:4k:1:65",
        "read:x:1",
        "read:4k:1:1:1",
    ] {
        let refused = Line::try_parse_from(["bench", "--socket", "s", "--job", wrong]);
        assert!(refused.is_err(), "{wrong}");
    }
    let both = ["bench", "--socket", "s", "--job", "read:4k:1", "--iodepth", "2"];
    assert!(Line::try_parse_from(both).is_err());
}

#[test]
fn a_table_has_a_row_for_each_server_and_says_what_the_machine_did() {
    let markdown = made_up_report().to_markdown();
    let rows: Vec<&str> = markdown.lines().filter(|line| line.starts_with('|')).collect();
    assert_eq!(rows.len(), 4, "{markdown}");
    let columns = |row: &str| row.matches('|').count();
    assert!(rows.iter().all(|row| columns(row) == columns(rows[0])), "{markdown}");
    assert!(rows[3].contains("2.00 (2.00-2.00)"), "{markdown}");
    assert!(markdown.contains("This machine was"), "{markdown}");
    assert!(markdown.contains("100 ns (90 to 450)"), "{markdown}");
}

/// Every tag is closed in its turn, every attribute is quoted, and nothing stands bare that XML would read otherwise (XML 1.0, 2.1).
fn assert_well_formed(svg: &str) {
    let mut open = Vec::new();
    let mut rest = svg;
    while let Some(begin) = rest.find('<') {
        let text = &rest[..begin];
        assert!(!text.contains('>'), "{text}");
        let bare = text.replace("&amp;", "").replace("&lt;", "").replace("&gt;", "");
        assert!(!bare.contains('&'), "{text}");
        let end = begin + rest[begin..].find('>').expect("a tag that ends");
        let tag = &rest[begin + 1..end];
        assert!(!tag.contains('<') && tag.matches('"').count().is_multiple_of(2), "{tag}");
        assert!(!tag.contains("NaN") && !tag.contains("inf"), "{tag}");
        let name = tag.trim_matches('/').split_whitespace().next().expect("a name");
        if tag.starts_with('/') {
            assert_eq!(open.pop(), Some(name));
        } else if !tag.ends_with('/') {
            open.push(name);
        }
        rest = &rest[end + 1..];
    }
    assert!(open.is_empty() && rest.trim().is_empty(), "{open:?}");
}

#[test]
fn pictures_are_xml_whatever_a_socket_is_called() {
    let svg = plot::distributions(&made_up_report());
    assert_well_formed(&svg);
    assert!(svg.contains("&lt;a &amp; b&gt;"), "{svg}");
    assert_well_formed(&plot::distributions(&Report::new(Vec::new(), Vec::new())));
}

/// A life of five phases of a tenth of a second; while it switches over nothing ends for two slices.
fn made_up_life() -> Life {
    let mut quiet = vec![Slice { requests: 100, longest: 20_000 }; 50];
    quiet[31..33].fill(Slice::default());
    quiet[33].longest = 20_000_000;
    Life {
        job: args(&["--socket", "s", "--job", "randwrite:4k:32", "--overwrite"]).jobs().unwrap()[0],
        slices: quiet,
        phases: (0..5).map(|phase| made_up(1000, 10 * (phase + 1)).latency).collect(),
        ends: (1..=5).map(|end| Duration::from_millis(100 * end)).collect(),
        job_info: serde_json::json!({ "status": "concluded" }),
        disturbance: Default::default(),
    }
}

#[test]
fn a_timeline_is_a_picture_with_the_names_of_the_mirrors_states() {
    let svg = plot::timeline(&made_up_life());
    assert_well_formed(&svg);
    for phase in Phase::ALL {
        assert!(svg.contains(&format!(">{}</text>", phase.name())), "{} in {svg}", phase.name());
    }
    // A line of what was done, and one of the longest latency, which has a gap where nothing ended.
    let curves: Vec<&str> = svg.lines().filter(|line| line.starts_with("<path")).collect();
    assert_eq!(curves.len(), 2, "{svg}");
    let strokes = |curve: &str| curve.matches('M').count();
    assert_eq!((strokes(curves[0]), strokes(curves[1])), (1, 2), "{curves:?}");
    // One that broke off before it began is a picture too.
    let nothing = Life { slices: Vec::new(), ends: Vec::new(), ..made_up_life() };
    assert_well_formed(&plot::timeline(&nothing));
}

#[test]
fn a_life_tells_each_phase_by_what_was_done_in_it() {
    let json = made_up_life().to_json();
    let phases = json["phases"].as_array().unwrap();
    assert_eq!(phases.len(), 5);
    for (index, phase) in phases.iter().enumerate() {
        assert_eq!(phase["phase"], Phase::ALL[index].name());
        let (seconds, requests) = (phase["seconds"].as_f64().unwrap(), phase["requests"].as_u64());
        assert!((seconds - 0.1).abs() < 1e-9, "{phase}");
        assert_eq!(requests, Some(10 * (index as u64 + 1)));
        let iops = phase["iops"].as_f64().unwrap();
        assert!((iops - 100.0 * (index as f64 + 1.0)).abs() < 1e-6, "{phase}");
    }
    assert_eq!(json["slices_requests_and_longest_ns"][33], serde_json::json!([100, 20_000_000]));
}
