//! What an operator reads when something is refused: QEMU's words where it has them, the name of the parameter everywhere.

#![allow(clippy::unwrap_used)] // a test may panic; clippy knows that only of functions it sees as tests

mod common;

use std::fs::File;

use resilver_rpc::error::code;
use serde_json::{Value, json};

use common::{MIB, Served, served};

/// The verbs: method, what else it takes, QEMU's name.
const VERBS: [(&str, &str, &str); 9] = [
    ("job_pause", "{}", "pause"),
    ("job_resume", "{}", "resume"),
    ("job_set_speed", r#"{"speed":1}"#, "set-speed"),
    ("job_change", r#"{"copy_mode":"background"}"#, "change"),
    ("job_complete", "{}", "complete"),
    ("bdev_mirror_finish", "{}", "finish"),
    ("job_finalize", "{}", "finalize"),
    ("job_cancel", "{}", "cancel"),
    ("job_dismiss", "{}", "dismiss"),
];

/// What is legal in each state (QEMU's JobVerbTable; finish is its cancel of a job that is ready).
const LEGAL: [(&str, &[&str]); 6] = [
    ("running", &["pause", "resume", "set-speed", "change", "cancel"]),
    ("paused", &["pause", "resume", "set-speed", "change", "cancel"]),
    ("ready", &["pause", "resume", "set-speed", "change", "complete", "finish", "cancel"]),
    ("standby", &["pause", "resume", "set-speed", "change", "complete", "finish", "cancel"]),
    ("pending", &["finalize", "cancel"]),
    ("concluded", &["dismiss"]),
];

/// A job `m` brought into a state in which it stays.
fn job_in(target: &mut Served, state: &str) {
    let slow = matches!(state, "running" | "paused");
    target.call(
        "bdev_mirror_start",
        json!({
            "source": "disk", "target": "other", "job_id": "m", "speed": if slow { 4096 } else { 0 },
            "auto_finalize": false, "auto_dismiss": false,
        }),
    );
    let path: &[&str] = match state {
        "paused" => &["job_pause"],
        "standby" => &["ready", "job_pause"],
        "pending" => &["ready", "job_complete"],
        "concluded" => &["job_cancel"],
        _ => &[],
    };
    for step in path {
        if *step == "ready" {
            wait(target, "ready");
        } else {
            target.call(step, json!({ "job_id": "m" }));
        }
    }
    wait(target, state);
}

fn wait(target: &mut Served, state: &str) {
    while target.call("job_get_list", json!({ "job_id": "m" }))[0]["status"] != state {
        std::thread::yield_now();
    }
}

#[test]
fn each_verb_in_each_state_is_accepted_or_refused_in_qemus_words() {
    let (_dir, mut target) = served();
    target.file("disk", 16);
    target.malloc("other", 16);
    for (state, legal) in LEGAL {
        for (method, more, verb) in VERBS {
            job_in(&mut target, state);
            let mut params: Value = serde_json::from_str(more).unwrap();
            params["job_id"] = "m".into();
            let answer = target.client.call(method, params);
            let expected = match (legal.contains(&verb), verb, state) {
                (true, "pause", "paused" | "standby") => Some("Job is already paused".to_owned()),
                (true, "resume", "running" | "ready") => {
                    Some("Can't resume a job that was not paused".to_owned())
                }
                (true, _, _) => None,
                (false, _, _) => {
                    Some(format!("Job 'm' in state '{state}' cannot accept command verb '{verb}'"))
                }
            };
            let refused = answer.err().map(|error| error.to_string());
            assert_eq!(refused, expected, "{verb} in {state}");
            // It ends, one way or another, and makes room for the next.
            let params = json!({ "job_id": "m" });
            let _ = target.client.call("job_cancel", params.clone());
            while let Ok(answer) = target.client.call("job_get_list", params.clone()) {
                if answer.result[0]["status"] == "concluded" {
                    target.call("job_dismiss", params.clone());
                }
            }
            target.wait_until_free("other");
            target.wait_until_free("disk");
        }
    }
}

#[test]
fn a_refusal_names_the_callers_parameter_and_its_value_once() {
    let (dir, mut target) = served();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let source = target.file("disk", 4);
    for (name, size) in [("odd", 1000), ("small", 4096), ("good", 4 * MIB)] {
        File::create(path(name)).unwrap().set_len(size).unwrap();
    }
    let blocks = json!({ "name": "blocks", "num_blocks": 4096, "block_size": 4096 });
    target.call("bdev_null_create", blocks);
    target.call("bdev_null_create", json!({ "name": "null", "num_blocks": 8, "block_size": 512 }));
    let mirror = |more: Value| {
        let mut params = json!({ "source": "disk", "job_id": "job" });
        params.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        ("bdev_mirror_start", params)
    };
    let open = |file: String| ("bdev_uring_create", json!({ "name": "new", "filename": file }));
    let cases = [
        (mirror(json!({})), "target", Value::Null),
        (mirror(json!({ "target": "null", "target_path": "/x" })), "target_path", json!("/x")),
        (mirror(json!({ "target": "null" })), "target", json!("null")),
        (mirror(json!({ "target": "disk" })), "target", json!("disk")),
        (mirror(json!({ "target_path": path("small") })), "target_path", json!(path("small"))),
        (mirror(json!({ "target_path": path("odd") })), "target_path", json!(path("odd"))),
        (mirror(json!({ "target_path": path("") })), "target_path", json!(path(""))),
        (
            mirror(json!({ "target_path": path("good"), "target_name": "a b" })),
            "target_name",
            json!("a b"),
        ),
        (
            mirror(json!({ "target_path": path("good"), "granularity": 513 })),
            "granularity",
            json!(513),
        ),
        (open(path("odd")), "filename", json!(path("odd"))),
        (open("/dev/null".to_owned()), "filename", json!("/dev/null")),
        (
            ("bdev_uring_resize", json!({ "name": "disk", "new_size": 1000 })),
            "new_size",
            json!(1000),
        ),
        (("bdev_uring_resize", json!({ "name": "disk", "new_size": 0 })), "new_size", json!(0)),
        (("bdev_uring_resize", json!({ "name": "disk", "new_size": 512 })), "new_size", json!(512)),
        (("bdev_null_resize", json!({ "name": "null", "new_size": 0 })), "new_size", json!(0)),
        (
            (
                "vhost_create_blk_controller",
                json!({ "ctrlr": "c", "dev_name": "disk", "num_queues": 0 }),
            ),
            "num_queues",
            json!(0),
        ),
    ];
    for ((method, params), parameter, value) in cases {
        let error = target.refused(method, params.clone());
        let data = error.data.clone().unwrap();
        assert_eq!((&data["parameter"], &data["value"]), (&json!(parameter), &value), "{error}");
        assert_eq!(error.code, code::INVALID_PARAMS, "{error}");
        let begin = match &value {
            Value::Null => format!("parameter '{parameter}' is missing: "),
            value => format!("parameter '{parameter}' is {value}: "),
        };
        assert!(error.message.starts_with(&begin), "{error}");
        if let Some(text) = value.as_str().filter(|text| text.contains('/')) {
            assert_eq!(error.message.matches(text).count(), 1, "{error}");
        }
    }
    // The two ways to name a target are told whenever neither or both were used.
    for (_, params) in [mirror(json!({})), mirror(json!({ "target": "null", "target_path": "/x" }))]
    {
        let error = target.refused("bdev_mirror_start", params);
        assert!(error.message.contains("'target', the name of a bdev"), "{error}");
        assert!(error.message.contains("'target_path', a file"), "{error}");
    }
    assert_eq!(target.call("job_get_list", json!({})), json!([]));
    assert!(source.exists());
}
