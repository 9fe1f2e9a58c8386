//! Snapshots whose image is made for them (`blockdev-snapshot-sync`), under load.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use diskfuse_e2e::{Stage, Tool, as_raw, everywhere, once};
use serde_json::{Value, json};

#[test]
fn a_snapshot_whose_image_is_made_for_it() {
    everywhere(|bed| {
        let mut stage = Stage::start(bed);
        let disk = stage.add_qcow2("disk");
        let mountpoint = stage.export("disk");
        stage.fill(&mountpoint);
        let writers = stage.load(&mountpoint);
        let top = bed.path("top");
        let snapshot = |overlay: &str, file: &Path| json!({"node-name": "disk", "snapshot-file": file, "snapshot-node-name": overlay});
        let command = "blockdev-snapshot-sync";
        let mut nameless = snapshot("top", &top);
        nameless
            .as_object_mut()
            .unwrap()
            .remove("snapshot-node-name");
        stage.refused(command, nameless, "New overlay node-name missing");
        let words = "New overlay node-name already in use";
        stage.refused(command, snapshot("disk-file", &top), words);
        stage.refused(
            command,
            snapshot("top", &disk),
            "in use by node 'disk-file'",
        );
        let raw = json!({"node-name": "disk", "snapshot-file": top, "snapshot-node-name": "top", "format": "raw"});
        let words = "Backing file not supported for file format 'raw'";
        stage.refused(command, raw, words);
        let nil = json!({"node-name": "nil", "snapshot-file": top, "snapshot-node-name": "top"});
        stage.refused(command, nil, "Cannot find device='' nor node-name='nil'");
        assert!(!top.exists(), "what was refused left an image");

        let from = writers.acknowledged();
        stage.run(command, snapshot("top", &top));
        let to = writers.acknowledged();
        stage.pause_was_short(&writers, command);
        let said = Tool::new("qemu-img")
            .args(["info", "-U", "--output=json"])
            .arg(&top)
            .run();
        let said: Value = serde_json::from_str(&said.stdout).unwrap();
        assert_eq!(said["backing-filename"], json!(disk));
        assert_eq!(said["backing-filename-format"], "qcow2");
        // One that is there already, with what it is to stand on in its header.
        let second = bed.path("second");
        Tool::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-u", "-b"])
            .args([&top, &second])
            .arg(Stage::SIZE.to_string())
            .run();
        let mut existing = snapshot("second", &second);
        existing["node-name"] = json!("top");
        existing["mode"] = json!("existing");
        stage.run(command, existing);
        stage.pause_was_short(&writers, "blockdev-snapshot-sync, existing");
        let writers = stage.finish(writers, "disk", &second, "qcow2");
        writers.check_moment(&as_raw(bed, &disk, "qcow2"), &from, &to);
        for image in [&top, &second] {
            std::fs::remove_file(image).unwrap();
        }
    });
}

/// An image that was made while the disk still grew would cut off what was answered since.
#[test]
fn what_a_guest_appends_meanwhile_is_kept() {
    once(|bed| {
        let mut stage = Stage::start(bed);
        stage.add_qcow2("disk");
        let mut export = stage.export_options("e", "disk", &["t0", "t1"]);
        export["growable"] = json!(true);
        let mountpoint = bed.mountpoint("grows");
        export["mountpoint"] = json!(mountpoint);
        stage.run("block-export-add", export);
        let over = AtomicBool::new(false);
        let appended = std::thread::scope(|scope| {
            let guest = scope.spawn(|| {
                let file = File::options().write(true).open(&mountpoint).unwrap();
                let mut at = Stage::SIZE;
                // Also if the test fails meanwhile.
                let end = Instant::now() + Duration::from_secs(30);
                for number in 1_u64.. {
                    if over.load(Ordering::SeqCst) || Instant::now() > end {
                        break;
                    }
                    let mut block = [0; 4096];
                    block[..8].copy_from_slice(&number.to_le_bytes());
                    file.write_all_at(&block, at).unwrap();
                    at += 4096;
                }
                at
            });
            let mut top = "disk".to_owned();
            for number in 0..20 {
                let overlay = format!("overlay{number}");
                let what = json!({
                    "node-name": top, "snapshot-file": bed.path(&overlay), "snapshot-node-name": overlay,
                });
                match number % 2 {
                    0 => stage.run("blockdev-snapshot-sync", what),
                    _ => stage.run(
                        "transaction",
                        json!({"actions": [{"type": "blockdev-snapshot-sync", "data": what}]}),
                    ),
                };
                top = overlay;
            }
            over.store(true, Ordering::SeqCst);
            guest.join().unwrap()
        });
        let file = File::open(&mountpoint).unwrap();
        assert!(file.metadata().unwrap().len() >= appended, "{appended}");
        let mut block = [0; 4096];
        let offsets = (Stage::SIZE..appended).step_by(4096);
        for (number, at) in (1_u64..).zip(offsets) {
            file.read_exact_at(&mut block, at).unwrap();
            let found = u64::from_le_bytes(block[..8].try_into().unwrap());
            assert_eq!(found, number, "at {at} of {appended}");
        }
        drop(file);
        stage.stop();
        for number in 0..20 {
            std::fs::remove_file(bed.path(&format!("overlay{number}"))).unwrap();
        }
    });
}

#[test]
fn images_made_for_snapshots_go_with_a_transaction_that_fails() {
    once(|bed| {
        let mut stage = Stage::start(bed);
        let disk = stage.add_raw("disk");
        let mountpoint = stage.export("disk");
        stage.fill(&mountpoint);
        let writers = stage.load(&mountpoint);
        let top = bed.path("top");
        let action = json!({
            "type": "blockdev-snapshot-sync",
            "data": {"node-name": "disk", "snapshot-file": top, "snapshot-node-name": "top"},
        });
        let abort = json!({"type": "abort", "data": {}});
        // Also if another action is about the new node, and would drain it.
        let on_top =
            json!({"type": "block-dirty-bitmap-clear", "data": {"node": "top", "name": "no"}});
        let actions = json!({"actions": [action, on_top]});
        stage.refused("transaction", actions, "Dirty bitmap 'no' not found");
        let actions = json!({"actions": [action, abort]});
        stage.refused(
            "transaction",
            actions,
            "Transaction aborted using Abort action",
        );
        assert!(
            !top.exists(),
            "the image of a snapshot that was taken back is still there"
        );
        let nodes = stage.run("query-named-block-nodes", json!({}));
        let mut nodes = nodes.as_array().unwrap().iter();
        assert!(nodes.all(|node| node["node-name"] != "top"));
        let bitmap =
            json!({"type": "block-dirty-bitmap-add", "data": {"node": "disk", "name": "b"}});
        stage.run("transaction", json!({"actions": [bitmap, action]}));
        stage.pause_was_short(&writers, "a transaction with blockdev-snapshot-sync");
        assert_eq!(
            stage.node("top")["image"]["backing-image"]["format"],
            "file"
        );
        stage.finish(writers, "disk", &top, "qcow2");
        let said = Tool::new("qemu-img")
            .args(["info", "--output=json"])
            .arg(&top)
            .run();
        let said: Value = serde_json::from_str(&said.stdout).unwrap();
        assert_eq!(said["backing-filename"], json!(disk));
        assert_eq!(said["backing-filename-format"], "raw");
    });
}
