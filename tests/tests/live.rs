//! Disks changed while four writers work on them on four queues: every change is complete when it is answered, or not made at
//! all; nobody loses what was acknowledged, and nobody is kept waiting.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use diskfuse_e2e::{
    Stage, Tool, check_background, check_image, everywhere, mounts, once, pattern, process,
};
use serde_json::{Value, json};

fn len(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().len()
}

#[test]
fn snapshots_inside_an_image_come_and_go() {
    everywhere(|bed| {
        let mut stage = Stage::start(bed);
        let disk = stage.add_qcow2("disk");
        let mountpoint = stage.export("disk");
        stage.fill(&mountpoint);
        let writers = stage.load(&mountpoint);
        let snapshot = |name: &str| json!({"device": "disk", "name": name});
        stage.run("blockdev-snapshot-internal-sync", snapshot("gone"));
        stage.pause_was_short(&writers, "blockdev-snapshot-internal-sync");
        let words = "Snapshot with name 'gone' already exists on device 'disk'";
        stage.refused("blockdev-snapshot-internal-sync", snapshot("gone"), words);
        let from = writers.acknowledged();
        stage.run("blockdev-snapshot-internal-sync", snapshot("kept"));
        let to = writers.acknowledged();
        writers.go_on(100);
        writers.latencies();
        let info = stage.run("blockdev-snapshot-delete-internal-sync", snapshot("gone"));
        assert_eq!(info["name"], "gone");
        stage.pause_was_short(&writers, "blockdev-snapshot-delete-internal-sync");
        let words = "Snapshot with id 'null' and name 'gone' does not exist on device 'disk'";
        let command = "blockdev-snapshot-delete-internal-sync";
        stage.refused(command, snapshot("gone"), words);
        let words = "Cannot find device='nil' nor node-name='nil'";
        let nil = json!({"device": "nil", "name": "x"});
        stage.refused("blockdev-snapshot-internal-sync", nil, words);
        let writers = stage.finish(writers, "disk", &disk, "qcow2");
        let kept = bed.path("kept");
        Tool::new("qemu-img")
            .args([
                "convert",
                "-f",
                "qcow2",
                "-O",
                "raw",
                "-l",
                "snapshot.name=kept",
            ])
            .args([&disk, &kept])
            .run();
        writers.check_moment(&kept, &from, &to);
        check_background(&kept);
    });
}

#[test]
fn a_disk_grows_and_shrinks() {
    everywhere(|bed| {
        for format in ["raw", "qcow2"] {
            let mut stage = Stage::start(bed);
            let disk = match format {
                "raw" => stage.add_raw("disk"),
                _ => stage.add_qcow2("disk"),
            };
            let mountpoint = stage.export("disk");
            stage.fill(&mountpoint);
            let writers = stage.load(&mountpoint);
            for more in [1 << 20, 64 << 20, 4096, 0] {
                let size = Stage::SIZE + more;
                stage.run("block_resize", json!({"node-name": "disk", "size": size}));
                assert_eq!(len(&mountpoint), size);
                stage.pause_was_short(&writers, &format!("block_resize of {format}"));
            }
            let size = |size: i64| json!({"node-name": "disk", "size": size});
            stage.refused(
                "block_resize",
                size(-1),
                "Parameter 'size' expects a >0 size",
            );
            if format == "qcow2" {
                let words = "The new size must be a multiple of 512";
                stage.refused("block_resize", size(1000), words);
            }
            stage.finish(writers, "disk", &disk, format);
            std::fs::remove_file(disk).unwrap();
        }
    });
}

#[test]
fn a_snapshot_may_be_larger_than_what_is_below() {
    everywhere(|bed| {
        let mut stage = Stage::start(bed);
        stage.add_qcow2("disk");
        let mountpoint = stage.export("disk");
        stage.fill(&mountpoint);
        let writers = stage.load(&mountpoint);
        let top = stage.add_qcow2_of("top", 2 * Stage::SIZE);
        stage.run(
            "blockdev-snapshot",
            json!({"node": "disk", "overlay": "top"}),
        );
        assert_eq!(len(&mountpoint), 2 * Stage::SIZE);
        stage.pause_was_short(&writers, "blockdev-snapshot, larger");
        let mut there = vec![1; 4096];
        let file = File::open(&mountpoint).unwrap();
        file.read_exact_at(&mut there, Stage::SIZE).unwrap();
        assert_eq!(there, vec![0; 4096]);
        drop(file);
        stage.run("block-stream", json!({"job-id": "j", "device": "top"}));
        stage.job_ends("j");
        stage.finish(writers, "disk", &top, "qcow2");
    });
}

#[test]
fn nodes_are_opened_anew_or_stay_as_they_are() {
    everywhere(|bed| {
        let mut stage = Stage::start(bed);
        let disk = stage.add_qcow2("disk");
        let mountpoint = stage.export("disk");
        stage.fill(&mountpoint);
        let writers = stage.load(&mountpoint);
        let file = |direct: bool, discard: &str| {
            json!({
                "driver": "file", "node-name": "disk-file", "filename": disk, "discard": discard,
                "cache": {"direct": direct},
            })
        };
        let image = |more: &[(&str, Value)]| {
            let mut image = json!({
                "driver": "qcow2", "node-name": "disk", "file": "disk-file", "backing": null,
            });
            for (key, value) in more {
                image[*key] = value.clone();
            }
            image
        };
        for options in [
            json!([file(true, "unmap")]),
            json!([
                file(false, "ignore"),
                image(&[("detect-zeroes", json!("on"))])
            ]),
            json!([image(&[
                ("discard", json!("unmap")),
                ("lazy-refcounts", json!(true))
            ])]),
            json!([image(&[("discard", json!("unmap"))]), file(false, "unmap")]),
        ] {
            stage.run("blockdev-reopen", json!({"options": options}));
            stage.pause_was_short(&writers, "blockdev-reopen");
        }
        let before = (stage.node("disk"), stage.node("disk-file"));
        let mut other = file(false, "unmap");
        other["filename"] = json!(bed.path("other"));
        let mut raw = image(&[]);
        raw["driver"] = json!("raw");
        raw.as_object_mut().unwrap().remove("backing");
        for (options, words) in [
            (
                json!([file(true, "unmap"), raw]),
                "Cannot change the option 'driver'",
            ),
            (
                json!([image(&[]), other]),
                "Cannot change the option 'filename'",
            ),
            (
                json!([file(true, "unmap"), file(false, "unmap")]),
                "is named twice",
            ),
            (json!([image(&[("read-only", json!(true))])]), "read-only"),
            (json!([image(&[("backing", json!("nil"))])]), "nil"),
            (json!([image(&[("node-name", json!("nil"))])]), "nil"),
            (json!([image(&[("backing", json!("disk"))])]), "disk"),
        ] {
            stage.refused("blockdev-reopen", json!({"options": options}), words);
            stage.pause_was_short(&writers, "blockdev-reopen, refused");
            let after = (stage.node("disk"), stage.node("disk-file"));
            assert_eq!(after, before, "{options}");
        }
        stage.finish(writers, "disk", &disk, "qcow2");
    });
}

#[test]
fn an_image_is_put_on_another_one_below() {
    once(|bed| {
        let mut stage = Stage::start(bed);
        let disk = stage.add_qcow2("disk");
        let below = bed.image("below", 1 << 20);
        stage.run(
            "blockdev-add",
            json!({"driver": "file", "node-name": "below", "filename": below, "read-only": true}),
        );
        let mountpoint = stage.export("disk");
        let writers = stage.load(&mountpoint);
        // Where no writer is.
        let read = || {
            let mut there = vec![0; 4096];
            let file = File::open(&mountpoint).unwrap();
            file.read_exact_at(&mut there, 128 << 10).unwrap();
            there
        };
        assert_eq!(read(), vec![0; 4096]);
        let with = |backing: Value| {
            let image = json!({
                "driver": "qcow2", "node-name": "disk", "file": "disk-file", "backing": backing,
            });
            json!({"options": [image]})
        };
        stage.run("blockdev-reopen", with(json!("below")));
        stage.pause_was_short(&writers, "blockdev-reopen with another backing node");
        assert_eq!(read(), pattern(1 << 20, 1)[128 << 10..][..4096]);
        let words = "Node 'below' is busy: node is used as backing hd of 'disk'";
        stage.refused("blockdev-del", json!({"node-name": "below"}), words);
        stage.run("blockdev-reopen", with(Value::Null));
        assert_eq!(read(), vec![0; 4096]);
        stage.run("blockdev-del", json!({"node-name": "below"}));
        stage.fill(&mountpoint);
        stage.finish(writers, "disk", &disk, "qcow2");
    });
}

#[test]
fn bitmaps_count_what_is_written() {
    once(|bed| {
        let mut stage = Stage::start(bed);
        stage.add_raw("disk");
        let mountpoint = stage.export("disk");
        let file = File::options().write(true).open(&mountpoint).unwrap();
        let add = |name: &str| json!({"node": "disk", "name": name, "granularity": 65536});
        let which = |name: &str| json!({"node": "disk", "name": name});
        let count = |stage: &mut Stage<'_>, name: &str| {
            let node = stage.node("disk");
            let bitmaps = node["dirty-bitmaps"].as_array().unwrap().clone();
            let bitmap = bitmaps.into_iter().find(|bitmap| bitmap["name"] == name);
            bitmap.expect("the bitmap is there")["count"]
                .as_u64()
                .unwrap()
        };
        stage.run("block-dirty-bitmap-add", add("a"));
        stage.refused(
            "block-dirty-bitmap-add",
            add("a"),
            "Bitmap already exists: a",
        );
        file.write_all_at(&[1; 4096], 0).unwrap();
        file.write_all_at(&[1; 4096], (1 << 20) - 1).unwrap();
        assert_eq!(count(&mut stage, "a"), 3 * 65536);
        stage.run("block-dirty-bitmap-disable", which("a"));
        file.write_all_at(&[1; 4096], 4 << 20).unwrap();
        assert_eq!(count(&mut stage, "a"), 3 * 65536);
        stage.run("block-dirty-bitmap-enable", which("a"));
        stage.run("block-dirty-bitmap-add", add("b"));
        file.write_all_at(&[1; 4096], 5 << 20).unwrap();
        assert_eq!(count(&mut stage, "a"), 4 * 65536);
        assert_eq!(count(&mut stage, "b"), 65536);
        stage.run("block-dirty-bitmap-clear", which("a"));
        assert_eq!(count(&mut stage, "a"), 0);
        file.write_all_at(&[1; 4096], 6 << 20).unwrap();
        stage.run("block-dirty-bitmap-clear", which("b"));
        let merge = json!({"node": "disk", "target": "b", "bitmaps": ["a"]});
        stage.run("block-dirty-bitmap-merge", merge);
        assert_eq!(count(&mut stage, "b"), 65536);
        let words = "Dirty bitmap 'nil' not found";
        for command in ["remove", "clear", "enable", "disable"] {
            stage.refused(
                &format!("block-dirty-bitmap-{command}"),
                which("nil"),
                words,
            );
        }
        stage.run("block-dirty-bitmap-remove", which("a"));
        stage.run("block-dirty-bitmap-remove", which("b"));
        assert_eq!(stage.node("disk").get("dirty-bitmaps"), None);
        stage.run("block-export-del", json!({"id": "disk", "mode": "hard"}));
        stage.qmp.event("BLOCK_EXPORT_DELETED");
        stage.stop();
    });
}

#[test]
fn transactions_are_carried_out_whole_or_not_at_all() {
    everywhere(|bed| {
        let mut stage = Stage::start(bed);
        let disk = stage.add_qcow2("disk");
        let mountpoint = stage.export("disk");
        stage.fill(&mountpoint);
        let writers = stage.load(&mountpoint);
        stage.add_qcow2("top");
        stage.add_qcow2("copy");
        let bitmap = json!({"node": "disk", "name": "b"});
        stage.run("block-dirty-bitmap-add", bitmap.clone());
        writers.go_on(20);
        let counted =
            |stage: &mut Stage<'_>| stage.node("disk")["dirty-bitmaps"][0]["count"].as_u64();
        let dirty = counted(&mut stage);
        assert!(dirty > Some(0));
        let snapshot =
            json!({"type": "blockdev-snapshot", "data": {"node": "disk", "overlay": "top"}});
        let actions = json!([
            {"type": "block-dirty-bitmap-clear", "data": bitmap},
            {"type": "block-dirty-bitmap-add", "data": {"node": "disk", "name": "c"}},
            {"type": "blockdev-snapshot-internal-sync", "data": {"device": "disk", "name": "s"}},
            {"type": "blockdev-backup", "data": {"job-id": "j", "device": "disk", "target": "copy", "sync": "full"}},
            snapshot,
            {"type": "abort", "data": {}},
        ]);
        let words = "Transaction aborted using Abort action";
        stage.refused("transaction", json!({"actions": actions}), words);
        stage.pause_was_short(&writers, "transaction, aborted");
        assert_eq!(stage.run("query-jobs", json!({})), json!([]));
        assert_eq!(
            stage.run("query-block-exports", json!({}))[0]["node-name"],
            "disk"
        );
        let there = stage.node("disk");
        assert_eq!(there["dirty-bitmaps"].as_array().unwrap().len(), 1);
        assert!(counted(&mut stage) >= dirty);
        assert!(there["image"].get("snapshots").is_none(), "{there}");
        // The same without the end that fails.
        let mut actions = actions;
        actions.as_array_mut().unwrap().pop();
        let actions = json!({"actions": actions});
        stage.run("transaction", actions);
        stage.job_ends("j");
        stage.pause_was_short(&writers, "transaction");
        assert_eq!(
            stage.run("query-block-exports", json!({}))[0]["node-name"],
            "top"
        );
        let there = stage.node("disk");
        assert_eq!(there["image"]["snapshots"][0]["name"], "s");
        // Nothing has been written below since.
        assert_eq!(counted(&mut stage), Some(0));
        stage.run("block-commit", json!({"job-id": "j", "device": "top"}));
        stage.complete("j");
        stage.finish(writers, "disk", &disk, "qcow2");
        check_image(&bed.path("copy"));
    });
}

/// What a process has open, and the threads that it runs.
fn holdings(pid: u32) -> Vec<String> {
    let folder = |name: &str| {
        std::fs::read_dir(format!("/proc/{pid}/{name}"))
            .unwrap()
            .flatten()
    };
    let open = folder("fd").filter_map(|entry| std::fs::read_link(entry.path()).ok());
    let threads = folder("task").filter_map(|entry| std::fs::read(entry.path().join("comm")).ok());
    // But for threads that come and go with the load, and those that take exports away.
    let passing = ["iou-", "diskfuse-worker", "diskfuse-awake", "stop"].map(str::as_bytes);
    let threads = threads.filter(|name| !passing.iter().any(|start| name.starts_with(start)));
    let names = threads.map(|name| String::from_utf8_lossy(&name).trim_end().to_owned());
    let mut all: Vec<String> = open
        .map(|to| to.display().to_string())
        .chain(names)
        .collect();
    all.sort();
    all
}

/// Adds and deletes an export again and again while another one serves; the slowest time until a new one was usable.
fn come_and_go(stage: &mut Stage<'_>, rounds: u32) -> Duration {
    let mut slowest = Duration::ZERO;
    let options = stage.export_options("other", "disk", &["t0", "t1", "t2", "t3"]);
    let mountpoint = stage.bed.mountpoint("other.m");
    for _ in 0..rounds {
        let began = Instant::now();
        stage.run("block-export-add", options.clone());
        let file = File::open(&mountpoint).unwrap();
        file.read_exact_at(&mut [0; 512], 0).unwrap();
        slowest = slowest.max(began.elapsed());
        drop(file);
        stage.run("block-export-del", json!({"id": "other", "mode": "hard"}));
        let event = stage.qmp.event("BLOCK_EXPORT_DELETED");
        assert_eq!(event["data"]["id"], "other");
    }
    assert!(mounts::at(&mountpoint).is_none());
    slowest
}

#[test]
fn exports_come_and_go_beside_one_that_is_busy() {
    // How many more times, for people who look for leaks.
    let more = std::env::var("DISKFUSE_CYCLES").ok();
    let rounds: u32 = more.map_or(30, |rounds| rounds.parse().unwrap());
    everywhere(|bed| {
        let mut stage = Stage::start(bed);
        let disk = stage.add_raw("disk");
        let mountpoint = stage.export("disk");
        stage.fill(&mountpoint);
        let writers = stage.load(&mountpoint);
        come_and_go(&mut stage, 5);
        let pid = stage.daemon.pid();
        let (before, memory) = (holdings(pid), process::memory(pid, "VmRSS"));
        let slowest = come_and_go(&mut stage, rounds);
        stage.pause_was_short(&writers, "block-export-add and -del");
        println!("usable after {slowest:?} at most");
        // The thread that has taken an export away may be on its way out.
        assert_eq!(holdings(pid), before);
        let grown = process::memory(pid, "VmRSS").saturating_sub(memory);
        println!("grown by {} KiB", grown >> 10);
        assert!(grown < 1 << 20, "grown by {grown}");
        stage.finish(writers, "disk", &disk, "raw");
    });
}

#[test]
fn iothreads_come_and_go() {
    everywhere(|bed| {
        let mut stage = Stage::start(bed);
        let disk = stage.add_raw("disk");
        let mountpoint = stage.export("disk");
        stage.fill(&mountpoint);
        let writers = stage.load(&mountpoint);
        let threads = |stage: &mut Stage<'_>| {
            let all = stage.run("query-iothreads", json!({}));
            all.as_array().unwrap().len()
        };
        for round in 0..3 {
            let new = json!({"qom-type": "iothread", "id": "new", "poll-max-ns": 1000 * round});
            stage.run("object-add", new);
            assert_eq!(threads(&mut stage), 5);
            let words = "attempt to add duplicate property 'new' to object";
            let again = json!({"qom-type": "iothread", "id": "new"});
            stage.refused("object-add", again, words);
            stage.export_as("other", "disk", &["new", "t1"]);
            let words = "object 'new' is in use, can not be deleted";
            stage.refused("object-del", json!({"id": "new"}), words);
            let set = json!({"path": "/objects/new", "property": "poll-max-ns", "value": 4000});
            stage.run("qom-set", set);
            stage.run("block-export-del", json!({"id": "other", "mode": "hard"}));
            stage.qmp.event("BLOCK_EXPORT_DELETED");
            stage.run("object-del", json!({"id": "new"}));
            assert_eq!(threads(&mut stage), 4);
            stage.pause_was_short(&writers, "object-add and object-del");
        }
        let words = "object 'nil' not found";
        stage.refused("object-del", json!({"id": "nil"}), words);
        let words = "object 't0' is in use, can not be deleted";
        stage.refused("object-del", json!({"id": "t0"}), words);
        stage.finish(writers, "disk", &disk, "raw");
    });
}

#[test]
fn limits_of_a_group_change_while_they_are_in_force() {
    once(|bed| {
        let mut stage = Stage::start(bed);
        let disk = stage.add_raw("disk");
        stage.run(
            "object-add",
            json!({"qom-type": "throttle-group", "id": "g"}),
        );
        let throttle = json!({
            "driver": "throttle", "node-name": "slow", "throttle-group": "g", "file": "disk",
        });
        stage.run("blockdev-add", throttle);
        let mountpoint = stage.export("slow");
        stage.fill(&mountpoint);
        let writers = stage.load(&mountpoint);
        stage.pause_was_short(&writers, "no limit");
        let limits = |stage: &mut Stage<'_>, iops: u64| {
            let value = json!({"iops-total": iops});
            let set = json!({"path": "/objects/g", "property": "limits", "value": value});
            stage.run("qom-set", set);
        };
        limits(&mut stage, 100);
        // What the bucket holds may pass first.
        std::thread::sleep(Duration::from_millis(200));
        writers.latencies();
        let began = Instant::now();
        std::thread::sleep(Duration::from_secs(1));
        let passed = writers.latencies().count;
        // On a busy machine the sleep is longer than it was told to be.
        let time = began.elapsed();
        let expected = usize::try_from(time.as_millis()).unwrap() / 10;
        assert!(
            (expected / 2..=expected * 8 / 5).contains(&passed),
            "{passed} requests in {time:?} instead of {expected}"
        );
        limits(&mut stage, 0);
        writers.go_on(500);
        writers.latencies();
        stage.pause_was_short(&writers, "no limit again");
        let group = json!({"id": "g"});
        stage.refused(
            "object-del",
            group,
            "Cannot delete throttle group 'g' with active references",
        );
        stage.finish(writers, "slow", &disk, "raw");
    });
}
