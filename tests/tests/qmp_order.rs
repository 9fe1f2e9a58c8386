//! What clients of the monitor hear, in which order, and what they wait for: the last events of exports and jobs, and commands
//! about nodes that somebody drains.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

use diskfuse_e2e::{Qmp, Stage, once};
use serde_json::{Value, json};

/// A disk of this many bytes that holds nothing, whose requests take so long.
fn add_null(stage: &mut Stage<'_>, name: &str, size: u64, latency: Duration) {
    let latency = u64::try_from(latency.as_nanos()).unwrap();
    let node = json!({"driver": "null-co", "node-name": name, "size": size, "latency-ns": latency});
    stage.run("blockdev-add", node);
}

/// A job that takes hours.
fn slow(id: &str, device: &str, target: &str) -> Value {
    json!({"job-id": id, "device": device, "target": target, "sync": "full", "speed": 64 << 10})
}

/// An event as `NAME id status`.
fn in_short(event: &Value) -> String {
    let data = &event["data"];
    let id = data["id"].as_str().or(data["device"].as_str());
    let words = [event["event"].as_str(), id, data["status"].as_str()];
    words.into_iter().flatten().collect::<Vec<_>>().join(" ")
}

/// Everything that comes until the answer of `quit`.
fn last_words(qmp: &mut Qmp) -> Vec<String> {
    qmp.events.clear();
    qmp.send("{'execute': 'quit'}");
    let answer = qmp.answer();
    assert_eq!(answer, json!({"return": {}}));
    assert_eq!(qmp.try_message(), None);
    qmp.events.iter().map(in_short).collect()
}

#[test]
fn at_the_end_clients_hear_of_the_exports_first_and_then_of_each_job_the_youngest_first() {
    once(|bed| {
        let mut stage = Stage::start(bed);
        for name in ["one", "two", "copy", "copy2"] {
            add_null(&mut stage, name, 1 << 30, Duration::ZERO);
        }
        stage.export_as("first", "one", &["t0"]);
        stage.export_as("second", "one", &["t1"]);
        stage.export_as("third", "two", &["t2"]);
        stage.run("block-export-del", json!({"id": "second"}));
        stage.qmp.event("BLOCK_EXPORT_DELETED");
        stage.export_as("second", "one", &["t1"]);
        stage.run("blockdev-backup", slow("paused", "one", "copy"));
        stage.run("job-pause", json!({"id": "paused"}));
        stage.qmp.job_is("paused", "paused");
        let file = json!({"driver": "file", "filename": bed.path("made"), "size": 4096});
        let create = json!({"job-id": "done", "options": file});
        stage.run("blockdev-create", create);
        stage.qmp.job_is("done", "concluded");
        let mut mirror = slow("running", "two", "copy2");
        mirror["auto-dismiss"] = json!(false);
        stage.run("blockdev-mirror", mirror);
        stage.qmp.job_is("running", "running");

        let ids = |list: Value| -> Vec<String> {
            let list = list.as_array().unwrap().iter();
            let id = |one: &Value| {
                one["id"]
                    .as_str()
                    .or(one["device"].as_str())
                    .map(str::to_owned)
            };
            list.map(|one| id(one).unwrap()).collect()
        };
        let exports = stage.run("query-block-exports", json!({}));
        assert_eq!(ids(exports), ["second", "third", "first"]);
        let jobs = stage.run("query-jobs", json!({}));
        assert_eq!(ids(jobs), ["running", "done", "paused"]);
        let jobs = stage.run("query-block-jobs", json!({}));
        assert_eq!(ids(jobs), ["running", "paused"]);

        let heard = last_words(&mut stage.qmp);
        let expected = [
            "BLOCK_EXPORT_DELETED second",
            "BLOCK_EXPORT_DELETED third",
            "BLOCK_EXPORT_DELETED first",
            "JOB_STATUS_CHANGE running aborting",
            "BLOCK_JOB_CANCELLED running",
            "JOB_STATUS_CHANGE running concluded",
            "JOB_STATUS_CHANGE running null",
            "JOB_STATUS_CHANGE done null",
            "JOB_STATUS_CHANGE paused running",
            "JOB_STATUS_CHANGE paused aborting",
            "BLOCK_JOB_CANCELLED paused",
            "JOB_STATUS_CHANGE paused concluded",
            "JOB_STATUS_CHANGE paused null",
        ];
        assert_eq!(heard, expected);
        assert!(stage.daemon.ends().status().success());
    });
}

#[test]
fn jobs_of_a_transaction_that_fails_are_told_of_as_far_as_it_came() {
    once(|bed| {
        let mut stage = Stage::start(bed);
        for name in ["one", "two", "copy", "copy2"] {
            add_null(&mut stage, name, 1 << 20, Duration::ZERO);
        }
        let backup = |id: &str, device: &str, target: &str| json!({"type": "blockdev-backup", "data": slow(id, device, target)});
        let both = [backup("a", "one", "copy"), backup("b", "two", "copy2")];
        let abort = json!({"type": "abort", "data": {}});
        let life = |id: &str, statuses: &[&str]| -> Vec<String> {
            let event = |status: &&str| format!("JOB_STATUS_CHANGE {id} {status}");
            statuses.iter().map(event).collect()
        };
        let mut failed = |actions: Value, words: &str| -> Vec<String> {
            stage.qmp.events.clear();
            stage.refused("transaction", json!({"actions": actions}), words);
            assert_eq!(stage.run("query-jobs", json!({})), json!([]));
            stage.qmp.events.iter().map(in_short).collect()
        };
        let aborted = "Transaction aborted using Abort action";
        let [a, b] = &both;
        let all = ["created", "aborting", "concluded", "null"];
        assert_eq!(failed(json!([a, abort, b]), aborted), life("a", &all));
        assert_eq!(failed(json!([abort, a]), aborted), [""; 0]);
        let ends = &all[1..];
        let in_order = [
            life("a", &["created"]),
            life("b", &["created"]),
            life("b", ends),
            life("a", ends),
        ];
        assert_eq!(failed(json!([a, b, abort]), aborted), in_order.concat());
        let nobody = backup("c", "two", "nobody");
        let words = "Cannot find device='nobody' nor node-name='nobody'";
        assert_eq!(failed(json!([a, nobody]), words), life("a", &all));
        let words =
            "Action 'abort' does not support transaction property completion-mode = grouped";
        let grouped = json!({"actions": [a, abort], "properties": {"completion-mode": "grouped"}});
        stage.refused("transaction", grouped, words);
        // Nothing of them is in the way of others.
        stage.run("transaction", json!({"actions": both}));
        stage.stop();
    });
}

/// How long the disk takes that a mirror waits for at last, while its source is drained.
const PAUSE: Duration = Duration::from_secs(4);

#[test]
fn a_command_about_a_node_that_a_job_drains_waits_and_holds_nobody_else_up() {
    once(|bed| {
        let mut stage = Stage::start(bed);
        let size = 64 << 10;
        for (name, latency) in [
            ("disk", Duration::ZERO),
            ("copy", PAUSE),
            ("other", Duration::ZERO),
        ] {
            add_null(&mut stage, name, size, latency);
        }
        let over = json!({"driver": "raw", "node-name": "over", "file": "disk"});
        stage.run("blockdev-add", over);
        let mirror = json!({"job-id": "m", "device": "disk", "target": "copy", "sync": "none"});
        stage.run("blockdev-mirror", mirror);
        stage.qmp.job_is("m", "ready");
        // Flushes the copy, and once more while the disk is drained.
        stage.run("job-complete", json!({"id": "m"}));
        std::thread::sleep(PAUSE + PAUSE / 4);
        let mut second = stage.second_client();
        let began = Instant::now();
        let backup = json!({
            "execute": "blockdev-backup",
            "arguments": {"job-id": "b", "device": "over", "target": "other", "sync": "full"},
        });
        second.send(backup.to_string());
        for _ in 0..10 {
            stage.run("query-block-exports", json!({}));
        }
        assert!(began.elapsed() < PAUSE / 4, "{:?}", began.elapsed());
        assert!(stage.qmp.job("b").is_none(), "nobody drains the disk");
        assert_eq!(second.answer(), json!({"return": {}}));
        assert!(began.elapsed() > PAUSE / 4, "{:?}", began.elapsed());
        stage.job_is_gone("m");
        stage.qmp.job_is("b", "null");
        stage.stop();
    });
}

/// As in QEMU, whose callers go on with the mountpoint at once.
#[test]
fn a_removal_is_answered_when_the_export_is_gone_or_when_that_takes_long() {
    once(|bed| {
        let mut stage = Stage::start(bed);
        add_null(&mut stage, "fast", 1 << 20, Duration::ZERO);
        add_null(&mut stage, "slow", 1 << 20, Duration::from_secs(5));
        for _ in 0..20 {
            let mountpoint = stage.export_as("e", "fast", &["t0"]);
            assert_eq!(std::fs::read(&mountpoint).unwrap().len(), 1 << 20);
            stage.qmp.events.clear();
            stage.run("block-export-del", json!({"id": "e"}));
            let events: Vec<_> = stage.qmp.events.iter().map(in_short).collect();
            assert_eq!(events, ["BLOCK_EXPORT_DELETED e"]);
            assert_eq!(std::fs::metadata(&mountpoint).unwrap().len(), 0);
        }
        let mountpoint = stage.export_as("late", "slow", &["t1"]);
        let file = File::open(&mountpoint).unwrap();
        let reading = std::thread::spawn(move || file.read_exact_at(&mut [0; 512], 0));
        std::thread::sleep(Duration::from_secs(1));
        stage.qmp.events.clear();
        let began = Instant::now();
        stage.run("block-export-del", json!({"id": "late", "mode": "hard"}));
        assert!(
            began.elapsed() < Duration::from_secs(4),
            "it waits for the disk"
        );
        assert_eq!(stage.qmp.events, Vec::<Value>::new());
        stage.qmp.event("BLOCK_EXPORT_DELETED");
        reading.join().unwrap().unwrap();
        let Stage { daemon, .. } = stage;
        let ended = daemon.stop();
        // The read and the flush together take longer than it waits in silence.
        let words = "still waiting for the disk";
        assert!(ended.output.stderr.contains(words), "{}", ended.output);
        bed.nothing_mounted();
    });
}

/// The ways of a client that is in a hurry: it dismisses whatever it hears of, while others take the same id again.
#[test]
fn a_job_is_gone_once() {
    once(|bed| {
        let mut stage = Stage::start(bed);
        for name in ["a", "b"] {
            let null = json!({"driver": "null-co", "node-name": name, "size": 65536});
            stage.run("blockdev-add", null);
        }
        let mut other = stage.second_client();
        let (stop, begun) = (AtomicBool::new(false), Instant::now());
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(SeqCst) && begun.elapsed() < Duration::from_secs(60) {
                    other.refused("job-dismiss", json!({"id": "j"}));
                }
            });
            let backup = json!({"job-id": "j", "device": "a", "target": "b", "sync": "full"});
            for _ in 0..300 {
                stage.run("blockdev-backup", backup.clone());
                stage.qmp.job_is("j", "created");
                stage.qmp.job_is("j", "concluded");
                let next = stage.qmp.event("JOB_STATUS_CHANGE");
                assert_eq!(next["data"]["status"], "null");
            }
            stop.store(true, SeqCst);
        });
        let rest = stage.qmp.events.iter();
        assert_eq!(rest.filter(|e| e["data"]["status"] == "null").count(), 0);
        for name in ["a", "b"] {
            stage.run("blockdev-del", json!({"node-name": name}));
        }
        stage.stop();
    });
}
