//! Block jobs through the monitor, while four writers work on four queues: what was acknowledged is there, copies are the disk
//! of one moment, and nobody is kept waiting.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use diskfuse_e2e::{
    Bed, Stage, Tool, Writers, as_raw, check_background, check_image, everywhere, once,
};
use serde_json::{Value, json};

/// A disk with a background, exported and under load; and its image.
fn under_load(stage: &mut Stage<'_>, node: &str) -> Writers {
    let mountpoint = stage.export(node);
    stage.fill(&mountpoint);
    stage.load(&mountpoint)
}

/// Puts an image on top of what a node's users see.
fn put_on_top(stage: &mut Stage<'_>, node: &str, overlay: &str) -> PathBuf {
    let path = stage.add_qcow2(overlay);
    stage.run(
        "blockdev-snapshot",
        json!({"node": node, "overlay": overlay}),
    );
    path
}

/// What an image says of the file below it.
fn backing_of(image: &Path) -> Value {
    let info = Tool::new("qemu-img")
        .args(["info", "-U", "--output=json"])
        .arg(image)
        .run();
    let info: Value = serde_json::from_str(&info.stdout).unwrap();
    info["backing-filename"].clone()
}

/// The node that an export shows.
fn shown(stage: &mut Stage<'_>) -> Value {
    stage.run("query-block-exports", json!({}))[0]["node-name"].take()
}

#[test]
fn a_chain_grows_and_is_committed_again() {
    everywhere(|bed| {
        let mut stage = Stage::start(bed);
        let base = stage.add_qcow2("base");
        let writers = under_load(&mut stage, "base");
        for (node, overlay) in [("base", "one"), ("one", "two"), ("two", "three")] {
            put_on_top(&mut stage, node, overlay);
            assert_eq!(shown(&mut stage), overlay);
            stage.pause_was_short(&writers, "blockdev-snapshot");
        }
        // In the middle: the image above stands on the base afterwards.
        let below =
            json!({"job-id": "j", "device": "three", "top-node": "one", "base-node": "base"});
        stage.run("block-commit", below);
        stage.job_ends("j");
        stage.pause_was_short(&writers, "block-commit in the middle");
        assert_eq!(backing_of(&bed.path("two")), base.to_str().unwrap());
        stage.run("blockdev-del", json!({"node-name": "one"}));
        // All of it: the base takes the place of the image in use.
        stage.run("block-commit", json!({"job-id": "j", "device": "three"}));
        stage.complete("j");
        stage.pause_was_short(&writers, "block-commit of the active image");
        assert_eq!(shown(&mut stage), "base");
        for overlay in ["three", "two"] {
            stage.run("blockdev-del", json!({"node-name": overlay}));
        }
        stage.finish(writers, "base", &base, "qcow2");
    });
}

#[test]
fn a_chain_is_streamed_away() {
    everywhere(|bed| {
        let mut stage = Stage::start(bed);
        let base = stage.add_raw("base");
        let writers = under_load(&mut stage, "base");
        for (node, overlay) in [("base", "one"), ("one", "two")] {
            put_on_top(&mut stage, node, overlay);
            writers.go_on(20);
        }
        let two = bed.path("two");
        writers.latencies();
        let to_base = json!({"job-id": "j", "device": "two", "base-node": "base"});
        stage.run("block-stream", to_base);
        stage.job_ends("j");
        stage.pause_was_short(&writers, "block-stream to a base");
        assert_eq!(backing_of(&two), base.to_str().unwrap());
        stage.run("blockdev-del", json!({"node-name": "one"}));
        stage.run("block-stream", json!({"job-id": "j", "device": "two"}));
        stage.job_ends("j");
        stage.pause_was_short(&writers, "block-stream of everything");
        assert_eq!(backing_of(&two), Value::Null);
        stage.run("blockdev-del", json!({"node-name": "base"}));
        stage.finish(writers, "base", &two, "qcow2");
    });
}

#[test]
fn a_mirror_takes_the_place_of_its_source_or_is_left_as_it_was_at_one_moment() {
    everywhere(|bed| {
        let mut stage = Stage::start(bed);
        stage.add_raw("disk");
        let writers = under_load(&mut stage, "disk");
        let mirror = |target: &str, mode: &str| {
            json!({
                "job-id": "j", "device": "disk", "target": target, "sync": "full",
                "copy-mode": mode,
            })
        };
        for (copy, mode) in [("left", "background"), ("left2", "write-blocking")] {
            let image = stage.add_qcow2(copy);
            stage.run("blockdev-mirror", mirror(copy, mode));
            stage.qmp.job_is("j", "ready");
            writers.go_on(50);
            let from = writers.acknowledged();
            stage.run("block-job-cancel", json!({"device": "j"}));
            stage.job_ends("j");
            let to = writers.acknowledged();
            stage.run("blockdev-del", json!({"node-name": copy}));
            let raw = as_raw(bed, &image, "qcow2");
            writers.check_moment(&raw, &from, &to);
            check_background(&raw);
            stage.pause_was_short(&writers, &format!("blockdev-mirror {mode}, left"));
        }
        let image = stage.add_qcow2("pivot");
        stage.run("blockdev-mirror", mirror("pivot", "background"));
        stage.complete("j");
        stage.pause_was_short(&writers, "blockdev-mirror, completed");
        assert_eq!(shown(&mut stage), "pivot");
        stage.run("blockdev-del", json!({"node-name": "disk"}));
        stage.finish(writers, "disk", &image, "qcow2");
    });
}

#[test]
fn a_backup_is_the_disk_of_one_moment_and_the_next_one_holds_what_changed() {
    everywhere(|bed| {
        let mut stage = Stage::start(bed);
        let disk = stage.add_qcow2("disk");
        let writers = under_load(&mut stage, "disk");
        let full = stage.add_qcow2("full");
        let from = writers.acknowledged();
        let actions = json!([
            {"type": "block-dirty-bitmap-add", "data": {"node": "disk", "name": "b"}},
            {"type": "blockdev-backup", "data":
                {"job-id": "j", "device": "disk", "target": "full", "sync": "full"}},
        ]);
        stage.run("transaction", json!({"actions": actions}));
        let to = writers.acknowledged();
        stage.job_ends("j");
        stage.pause_was_short(&writers, "blockdev-backup");
        stage.run("blockdev-del", json!({"node-name": "full"}));
        let raw = as_raw(bed, &full, "qcow2");
        writers.check_moment(&raw, &from, &to);
        check_background(&raw);
        for round in 0..2 {
            // Onto the same image: together they are the disk of a later moment.
            stage.run(
                "blockdev-add",
                json!({"driver": "qcow2", "node-name": "full", "file": "full-file", "discard": "unmap"}),
            );
            let from = writers.acknowledged();
            stage.run(
                "blockdev-backup",
                json!({"job-id": "j", "device": "disk", "target": "full", "sync": "incremental", "bitmap": "b"}),
            );
            let to = writers.acknowledged();
            stage.job_ends("j");
            stage.pause_was_short(&writers, "blockdev-backup, incremental");
            stage.run("blockdev-del", json!({"node-name": "full"}));
            let raw = as_raw(bed, &full, "qcow2");
            writers.check_moment(&raw, &from, &to);
            check_background(&raw);
            println!("round {round}");
        }
        stage.finish(writers, "disk", &disk, "qcow2");
    });
}

/// An overlay on a node, opened with that below it.
fn add_overlay(stage: &mut Stage<'_>, name: &str, below: &str) -> PathBuf {
    let path = stage.add_qcow2(name);
    stage.run("blockdev-del", json!({"node-name": name}));
    let file = format!("{name}-file");
    stage.run(
        "blockdev-add",
        json!({"driver": "qcow2", "node-name": name, "file": file, "backing": below}),
    );
    path
}

/// A raw copy of what a file shows.
fn copied(bed: &Bed, shown: &Path) -> PathBuf {
    let raw = bed.path("copied");
    Tool::new("qemu-img")
        .args(["convert", "-f", "raw", "-O", "raw"])
        .args([shown, &raw])
        .run();
    raw
}

#[test]
fn an_overlay_that_is_fleeced_into_shows_the_disk_of_one_moment() {
    everywhere(|bed| {
        let mut stage = Stage::start(bed);
        let disk = stage.add_qcow2("disk");
        let writers = under_load(&mut stage, "disk");
        add_overlay(&mut stage, "fleece", "disk");
        let from = writers.acknowledged();
        let actions = json!([
            {"type": "block-dirty-bitmap-add", "data": {"node": "disk", "name": "b"}},
            {"type": "blockdev-backup", "data":
                {"job-id": "j", "device": "disk", "target": "fleece", "sync": "none"}},
        ]);
        stage.run("transaction", json!({"actions": actions}));
        let to = writers.acknowledged();
        let mut export = stage.export_options("fleece", "fleece", &["t0", "t1"]);
        export["writable"] = json!(false);
        let shown = bed.mountpoint("fleece.m");
        stage.run("block-export-add", export);
        for _ in 0..3 {
            writers.go_on(50);
            let raw = copied(bed, &shown);
            writers.check_moment(&raw, &from, &to);
            check_background(&raw);
            Tool::new("qemu-img")
                .args(["compare", "-f", "raw", "-F", "raw"])
                .args([&raw, &shown])
                .run();
        }
        stage.pause_was_short(&writers, "blockdev-backup, fleecing");
        let in_use = json!({"node-name": "fleece"});
        let words = "Node 'fleece' is busy: block device is in use by block job: backup";
        stage.refused("blockdev-del", in_use.clone(), words);
        stage.run("block-export-del", json!({"id": "fleece"}));
        stage
            .qmp
            .event_of("BLOCK_EXPORT_DELETED", |data| data["id"] == "fleece");
        stage.run("job-cancel", json!({"id": "j"}));
        let event = stage.qmp.event("BLOCK_JOB_CANCELLED");
        assert_eq!(event["data"]["device"], "j");
        stage.job_is_gone("j");
        stage.pause_was_short(&writers, "blockdev-backup, fleecing, cancelled");
        stage.run("blockdev-del", in_use);
        check_image(&bed.path("fleece"));
        stage.finish(writers, "disk", &disk, "qcow2");
    });
}

#[test]
fn what_is_read_where_nothing_was_saved_is_an_error_when_fleecing_is_over() {
    once(|bed| {
        let mut stage = Stage::start(bed);
        let disk = stage.add_raw("disk");
        let writers = under_load(&mut stage, "disk");
        add_overlay(&mut stage, "fleece", "disk");
        let backup = json!({"job-id": "j", "device": "disk", "target": "fleece", "sync": "none"});
        stage.run("blockdev-backup", backup);
        let mut export = stage.export_options("fleece", "fleece", &["t0"]);
        export["writable"] = json!(false);
        let shown = bed.mountpoint("fleece.m");
        stage.run("block-export-add", export);
        let file = File::open(&shown).unwrap();
        let mut byte = [0];
        let unsaved = 128 << 10;
        file.read_exact_at(&mut byte, unsaved).unwrap();
        // Once around all places of each, and what was under way.
        writers.go_on(65);
        stage.run("job-cancel", json!({"id": "j"}));
        stage.job_is_gone("j");
        file.read_exact_at(&mut byte, 0).unwrap();
        let far = File::open(&shown).unwrap();
        let error = far
            .read_exact_at(&mut byte, unsaved + (1 << 20))
            .unwrap_err();
        assert_eq!(error.raw_os_error(), Some(5));
        drop((file, far));
        stage.run("block-export-del", json!({"id": "fleece"}));
        stage
            .qmp
            .event_of("BLOCK_EXPORT_DELETED", |data| data["id"] == "fleece");
        stage.run("blockdev-del", json!({"node-name": "fleece"}));
        stage.finish(writers, "disk", &disk, "raw");
    });
}

#[test]
fn a_backup_is_compressed_and_a_mirror_is_changed_on_the_way() {
    once(|bed| {
        let mut stage = Stage::start(bed);
        let disk = stage.add_raw("disk");
        let shown = stage.export("disk");
        let file = File::options().write(true).open(&shown).unwrap();
        file.write_all_at(&vec![7; 4 << 20], 1 << 20).unwrap();
        drop(file);
        let small = stage.add_qcow2("small");
        let mut backup = json!({
            "job-id": "j", "device": "disk", "target": "small", "sync": "full", "compress": true,
            "on-cbw-error": "break-snapshot",
        });
        stage.run("blockdev-backup", backup.clone());
        stage.job_ends("j");
        backup["target"] = json!("raw");
        stage.add_raw("raw");
        let words = "Compression is not supported for this drive raw";
        stage.refused("blockdev-backup", backup, words);
        stage.run("blockdev-del", json!({"node-name": "small"}));
        check_image(&small);
        let bytes = small.metadata().unwrap().len();
        assert!(bytes < 1 << 20, "{bytes}");

        let mirror = json!({"job-id": "m", "device": "disk", "target": "raw", "sync": "full"});
        stage.run("blockdev-mirror", mirror);
        stage.qmp.job_is("m", "ready");
        let change = |mode: &str| json!({"id": "m", "type": "mirror", "copy-mode": mode});
        stage.run("block-job-change", change("write-blocking"));
        let words = "Change to copy mode 'background' is not implemented";
        stage.refused("block-job-change", change("background"), words);
        let other = json!({"id": "m", "type": "backup"});
        stage.refused(
            "block-job-change",
            other,
            "Job type does not support change",
        );
        stage.run("block-job-cancel", json!({"device": "m"}));
        stage.job_ends("m");
        stage.run("block-export-del", json!({"id": "disk"}));
        stage
            .qmp
            .event_of("BLOCK_EXPORT_DELETED", |data| data["id"] == "disk");
        let bed = stage.stop();
        for (copy, format) in [(&small, "qcow2"), (&bed.path("raw"), "raw")] {
            Tool::new("qemu-img")
                .args(["compare", "-f", "raw", "-F", format])
                .args([&disk, copy])
                .run();
        }
    });
}

/// What a bitmap of a node is said to have.
fn count(stage: &mut Stage<'_>, node: &str, bitmap: &str) -> Value {
    let nodes = stage.run("query-named-block-nodes", json!({}));
    let mut nodes = nodes.as_array().unwrap().iter();
    let node = nodes.find(|there| there["node-name"] == node).unwrap();
    let mut bitmaps = node["dirty-bitmaps"].as_array().unwrap().iter();
    let bitmap = bitmaps.find(|there| there["name"] == bitmap).unwrap();
    bitmap["count"].clone()
}

#[test]
fn a_bitmap_that_a_backup_uses_is_not_merged_into_another() {
    once(|bed| {
        let mut stage = Stage::start(bed);
        stage.add_raw("disk");
        stage.add_raw("copy");
        let bitmap = |name: &str, disabled: bool| json!({"node": "disk", "name": name, "disabled": disabled});
        stage.run("block-dirty-bitmap-add", bitmap("used", false));
        stage.run("block-dirty-bitmap-add", bitmap("other", true));
        let file = File::options().write(true).open(stage.export("disk"));
        file.unwrap().write_all_at(&vec![1; 2 << 20], 0).unwrap();
        let slow = json!({
            "job-id": "j", "device": "disk", "target": "copy", "sync": "incremental",
            "bitmap": "used", "speed": 65536,
        });
        stage.run("blockdev-backup", slow);
        let merge = json!({"node": "disk", "target": "other", "bitmaps": ["used"]});
        let words = "Bitmap 'used' is currently in use by another operation and cannot be used";
        stage.refused("block-dirty-bitmap-merge", merge.clone(), words);
        assert_eq!(count(&mut stage, "disk", "used"), 2 << 20);
        stage.run("job-cancel", json!({"id": "j"}));
        stage.job_is_gone("j");
        assert_eq!(count(&mut stage, "disk", "used"), 2 << 20);
        stage.run("block-dirty-bitmap-merge", merge);
        assert_eq!(count(&mut stage, "disk", "other"), 2 << 20);
        stage.run("block-export-del", json!({"id": "disk", "mode": "hard"}));
        stage.qmp.event("BLOCK_EXPORT_DELETED");
        stage.stop();
    });
}

#[test]
fn a_bitmap_follows_its_disk_through_a_reopen() {
    once(|bed| {
        let mut stage = Stage::start(bed);
        stage.add_raw("file");
        stage.add_raw("copy");
        let part = |name: &str, file: &str, size: u64| json!({"driver": "raw", "node-name": name, "file": file, "size": size});
        stage.run("blockdev-add", part("disk", "file", 1 << 20));
        stage.run("blockdev-add", part("target", "copy", 2 << 20));
        for name in ["b", "idle"] {
            let disabled = name == "idle";
            let bitmap = json!({"node": "disk", "name": name, "disabled": disabled});
            stage.run("block-dirty-bitmap-add", bitmap);
        }
        let options = json!({"options": [part("disk", "file", 2 << 20)]});
        stage.run("blockdev-reopen", options);
        assert_eq!(count(&mut stage, "disk", "b"), 1 << 20);
        assert_eq!(count(&mut stage, "disk", "idle"), 0);
        let file = File::options().write(true).open(stage.export("disk"));
        file.unwrap()
            .write_all_at(&vec![6; 65536], 3 << 19)
            .unwrap();
        let backup = json!({
            "job-id": "j", "device": "disk", "target": "target", "sync": "incremental", "bitmap": "b",
        });
        stage.run("blockdev-backup", backup);
        stage.job_ends("j");
        let mut saved = vec![0; 65536];
        let file = File::open(stage.export("target")).unwrap();
        file.read_exact_at(&mut saved, 3 << 19).unwrap();
        assert!(saved.iter().all(|byte| *byte == 6), "not in the backup");
        drop(file);
        for id in ["disk", "target"] {
            stage.run("block-export-del", json!({"id": id, "mode": "hard"}));
            stage.qmp.event("BLOCK_EXPORT_DELETED");
        }
        stage.stop();
    });
}

/// The backups of two disks in one transaction, the second onto `target`.
fn backups_together(target: &str) -> Value {
    let backup = |id: &str, device: &str, target: &str| {
        let data = json!({"job-id": id, "device": device, "target": target, "sync": "full"});
        json!({"type": "blockdev-backup", "data": data})
    };
    json!({
        "actions": [backup("j", "disk", "copy"), backup("k", "more", target)],
        "properties": {"completion-mode": "grouped"},
    })
}

#[test]
fn jobs_of_a_group_succeed_or_fail_together() {
    everywhere(|bed| {
        let mut stage = Stage::start(bed);
        let disk = stage.add_qcow2("disk");
        let writers = under_load(&mut stage, "disk");
        stage.add_raw("more");
        let more = stage.export("more");
        stage.fill(&more);
        let copies = [stage.add_qcow2("copy"), stage.add_qcow2("copy2")];
        let broken = json!({
            "driver": "blkdebug", "node-name": "broken",
            "image": {"driver": "null-co", "size": Stage::SIZE},
            "inject-error": [{"event": "none", "iotype": "write", "errno": 5}],
        });
        stage.run("blockdev-add", broken);
        stage.run("transaction", backups_together("broken"));
        let failed = |data: &Value| data["device"] == "k" && data.get("error").is_some();
        let event = stage.qmp.event_of("BLOCK_JOB_COMPLETED", failed);
        let why = event["data"]["error"].as_str().unwrap();
        assert!(why.starts_with("Input/output error ("), "{event}");
        for id in ["j", "k"] {
            stage.job_is_gone(id);
        }
        let cancelled = stage.qmp.event("BLOCK_JOB_CANCELLED");
        assert_eq!(cancelled["data"]["device"], "j");
        stage.pause_was_short(&writers, "transaction, grouped and failed");

        let other = stage.load(&more);
        let from = (writers.acknowledged(), other.acknowledged());
        stage.run("transaction", backups_together("copy2"));
        let to = (writers.acknowledged(), other.acknowledged());
        for _ in 0..2 {
            let event = stage.qmp.event("BLOCK_JOB_COMPLETED");
            assert!(event["data"].get("error").is_none(), "{event}");
        }
        for id in ["j", "k"] {
            stage.job_is_gone(id);
        }
        stage.pause_was_short(&writers, "transaction, grouped");
        for copy in ["copy", "copy2"] {
            stage.run("blockdev-del", json!({"node-name": copy}));
        }
        writers.check_moment(&as_raw(bed, &copies[0], "qcow2"), &from.0, &to.0);
        other.check_moment(&as_raw(bed, &copies[1], "qcow2"), &from.1, &to.1);
        let raw = bed.path("more");
        let ends = other.finish(&raw);
        assert!(ends.iter().all(|end| end == "told to"), "{ends:?}");
        stage.finish(writers, "disk", &disk, "qcow2");
    });
}

#[test]
fn jobs_are_steered() {
    once(|bed: &Bed| {
        let mut stage = Stage::start(bed);
        let disk = stage.add_raw("disk");
        let writers = under_load(&mut stage, "disk");
        stage.add_qcow2("copy");
        let backup = json!({
            "job-id": "j", "device": "disk", "target": "copy", "sync": "full", "speed": 1 << 20,
            "auto-finalize": false, "auto-dismiss": false,
        });
        stage.run("blockdev-backup", backup.clone());
        for status in ["created", "running"] {
            stage.qmp.job_is("j", status);
        }
        let again = "Job ID 'j' already in use";
        stage.refused("blockdev-backup", backup, again);
        stage.run("job-pause", json!({"id": "j"}));
        stage.qmp.job_is("j", "paused");
        stage.refused("job-pause", json!({"id": "j"}), "Job is already paused");
        // What the guest is about to overwrite is saved all the same.
        writers.go_on(100);
        let job = stage.qmp.job("j").expect("there it is");
        assert_eq!(job["status"], "paused", "{job}");
        assert!(
            job["current-progress"].as_u64().unwrap() < Stage::SIZE,
            "{job}"
        );
        let words = "Job 'j' in state 'paused' cannot accept command verb 'finalize'";
        stage.refused("job-finalize", json!({"id": "j"}), words);
        stage.run("job-resume", json!({"id": "j"}));
        stage.qmp.job_is("j", "running");
        stage.run("block-job-set-speed", json!({"device": "j", "speed": 0}));
        stage.qmp.job_is("j", "pending");
        let event = stage.qmp.event("BLOCK_JOB_PENDING");
        assert_eq!(event["data"], json!({"type": "backup", "id": "j"}));
        stage.run("job-finalize", json!({"id": "j"}));
        stage.qmp.job_is("j", "concluded");
        let job = stage.qmp.job("j").expect("it waits to be dismissed");
        assert_eq!(job["status"], "concluded", "{job}");
        stage.run("job-dismiss", json!({"id": "j"}));
        stage.refused("job-dismiss", json!({"id": "j"}), "Job not found");

        // Cancelled in the middle: the source is free again.
        let slow = json!({"job-id": "k", "device": "disk", "target": "copy", "sync": "full", "speed": 4096});
        stage.run("blockdev-backup", slow);
        writers.go_on(50);
        stage.run("job-cancel", json!({"id": "k"}));
        let event = stage.qmp.event("BLOCK_JOB_CANCELLED");
        assert_eq!(event["data"]["device"], "k");
        stage.job_is_gone("k");
        stage.run("blockdev-del", json!({"node-name": "copy"}));
        stage.finish(writers, "disk", &disk, "raw");
    });
}
