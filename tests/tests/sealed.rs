//! Images below others in a chain: whoever wants to read them beside the daemon may, as soon as nobody writes them any more, and
//! nobody else may while a job does.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::Path;

use diskfuse_e2e::{Stage, Tool, everywhere, once};
use serde_json::{Value, json};

/// What QEMU says to opening an image, for reading or writing; nothing if it may.
fn refusal(image: &Path, format: &str, how: &[&str]) -> String {
    let tool = Tool::new("qemu-io").args(["-f", format, "-c", "quit"]);
    tool.args(how).arg(image).output().stderr
}

#[track_caller]
fn is_written(image: &Path, format: &str) {
    let said = refusal(image, format, &["-r"]);
    let words = "Failed to get shared \"write\" lock";
    assert!(said.contains(words), "{}: {said}", image.display());
}

/// Others may read it, and not write it.
#[track_caller]
fn is_read(image: &Path, format: &str) {
    assert_eq!(refusal(image, format, &["-r"]), "", "{}", image.display());
    let said = refusal(image, format, &[]);
    let words = "Failed to get \"write\" lock";
    assert!(said.contains(words), "{}: {said}", image.display());
}

/// Whether nodes are said to be read-only; the main thread has done what it had to do before.
fn read_only(stage: &mut Stage<'_>, names: &[&str]) -> Vec<bool> {
    let all = stage.run("query-named-block-nodes", json!({"flat": true}));
    let all = all.as_array().unwrap();
    let of = |name: &&str| all.iter().find(|node| node["node-name"] == *name).unwrap();
    let read_only = names
        .iter()
        .map(of)
        .map(|node| node["ro"].as_bool().unwrap());
    read_only.collect()
}

/// An image on top of what a node's users see.
fn put_on_top(stage: &mut Stage<'_>, node: &str, overlay: &str) -> std::path::PathBuf {
    let path = stage.add_qcow2(overlay);
    let arguments = json!({"node": node, "overlay": overlay});
    stage.run("blockdev-snapshot", arguments);
    path
}

#[test]
fn what_is_below_a_snapshot_may_be_read_by_others() {
    everywhere(|bed| {
        for format in ["raw", "qcow2"] {
            let mut stage = Stage::start(bed);
            let base = match format {
                "raw" => stage.add_raw("base"),
                _ => stage.add_qcow2("base"),
            };
            let mountpoint = stage.export("base");
            stage.fill(&mountpoint);
            let writers = stage.load(&mountpoint);
            is_written_by_us(&base, format);
            let one = put_on_top(&mut stage, "base", "one");
            stage.pause_was_short(&writers, &format!("blockdev-snapshot on {format}"));
            is_read(&base, format);
            is_written(&one, "qcow2");
            assert_eq!(read_only(&mut stage, &["base", "one"]), [true, false]);
            // The same as an action among others, and one that is taken back.
            let two = stage.add_qcow2("two");
            let snapshot =
                json!({"type": "blockdev-snapshot", "data": {"node": "one", "overlay": "two"}});
            let aborted = json!({"actions": [snapshot, {"type": "abort", "data": {}}]});
            stage.refused("transaction", aborted, "aborted using Abort action");
            assert_eq!(read_only(&mut stage, &["one"]), [false]);
            stage.pause_was_short(&writers, "transaction, aborted");
            is_written(&one, "qcow2");
            stage.run("transaction", json!({"actions": [snapshot]}));
            stage.pause_was_short(&writers, "transaction");
            is_read(&one, "qcow2");
            // It can be written again by whoever says so.
            stage.run("block-commit", json!({"job-id": "j", "device": "two"}));
            stage.complete("j");
            stage.pause_was_short(&writers, "block-commit of the active image");
            assert_eq!(read_only(&mut stage, &["base"]), [false]);
            is_written_by_us(&base, format);
            stage.finish(writers, "base", &base, format);
            for image in [base, one, two] {
                std::fs::remove_file(image).unwrap();
            }
        }
    });
}

/// Others may not write it; a raw image they may read, as we write nothing there that they would take for tables.
#[track_caller]
fn is_written_by_us(image: &Path, format: &str) {
    match format {
        "raw" => is_read(image, format),
        _ => is_written(image, format),
    }
}

#[test]
fn what_a_job_opens_for_writing_it_closes_again() {
    everywhere(|bed| {
        let mut stage = Stage::start(bed);
        let base = stage.add_qcow2("base");
        let mountpoint = stage.export("base");
        stage.fill(&mountpoint);
        let writers = stage.load(&mountpoint);
        let mut images = Vec::new();
        for (node, overlay) in [("base", "one"), ("one", "two"), ("two", "three")] {
            images.push(put_on_top(&mut stage, node, overlay));
            writers.go_on(50);
        }
        let [one, two, three] = &images[..] else {
            panic!("three images")
        };
        let below = ["base", "one", "two"];
        let all_closed = |stage: &mut Stage<'_>, names: &[&str]| {
            assert_eq!(read_only(stage, names), vec![true; names.len()]);
        };
        all_closed(&mut stage, &below);
        let commit = |speed: u64| {
            json!({
                "job-id": "j", "device": "three", "top-node": "one", "base-node": "base", "speed": speed,
            })
        };
        // Cancelled: nothing is left of it.
        stage.run("block-commit", commit(4096));
        is_written(&base, "qcow2");
        is_written(two, "qcow2");
        assert_eq!(read_only(&mut stage, &below), [false, true, false]);
        stage.run("job-cancel", json!({"id": "j"}));
        stage.qmp.job_is("j", "null");
        all_closed(&mut stage, &below);
        is_read(&base, "qcow2");
        is_read(two, "qcow2");
        stage.pause_was_short(&writers, "block-commit, cancelled");
        // To its end.
        stage.run("block-commit", commit(0));
        stage.job_ends("j");
        all_closed(&mut stage, &["base", "two"]);
        is_read(&base, "qcow2");
        is_read(two, "qcow2");
        is_written(three, "qcow2");
        stage.pause_was_short(&writers, "block-commit");
        stage.run("blockdev-del", json!({"node-name": "one"}));
        assert_eq!(refusal(one, "qcow2", &[]), "");
        // An image in the middle takes what is below it.
        stage.run("block-stream", json!({"job-id": "j", "device": "two"}));
        stage.job_ends("j");
        all_closed(&mut stage, &["two"]);
        is_read(two, "qcow2");
        stage.pause_was_short(&writers, "block-stream in the middle");
        stage.run("blockdev-del", json!({"node-name": "base"}));
        // So that all of the disk is in the image by itself.
        stage.run("block-stream", json!({"job-id": "j", "device": "three"}));
        stage.job_ends("j");
        stage.finish(writers, "base", three, "qcow2");
    });
}

#[test]
fn the_name_of_what_is_below_can_be_changed_in_an_image_that_is_not_written() {
    once(|bed| {
        let mut stage = Stage::start(bed);
        let base = stage.add_raw("base");
        stage.export("base");
        let one = put_on_top(&mut stage, "base", "one");
        put_on_top(&mut stage, "one", "two");
        let name = base.with_file_name(".").join("base");
        let change = json!({"image-node-name": "one", "device": "two", "backing-file": name});
        stage.run("change-backing-file", change);
        assert_eq!(read_only(&mut stage, &["one"]), [true]);
        is_read(&one, "qcow2");
        let info = Tool::new("qemu-img").args(["info", "-U", "--output=json"]);
        let info: Value = serde_json::from_str(&info.arg(&one).run().stdout).unwrap();
        assert_eq!(info["backing-filename"], json!(name));
        stage.stop();
    });
}
