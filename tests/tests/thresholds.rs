//! `block-set-write-threshold`: the first write that goes beyond a byte is told of, whatever node it is a byte of, and no other.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs::File;
use std::os::unix::fs::FileExt;

use diskfuse_e2e::{Stage, everywhere, once};
use rustix::fs::FallocateFlags;
use serde_json::{Value, json};

fn set(stage: &mut Stage<'_>, node: &str, threshold: u64) {
    let arguments = json!({"node-name": node, "write-threshold": threshold});
    stage.run("block-set-write-threshold", arguments);
}

/// What is said of a node's threshold.
fn shown(stage: &mut Stage<'_>, name: &str) -> i64 {
    let all = stage.run("query-named-block-nodes", json!({"flat": true}));
    let mut all = all.as_array().unwrap().iter();
    let found = all.find(|node| node["node-name"] == name).unwrap();
    found["write_threshold"].as_i64().unwrap()
}

/// The events that have come when a command is answered.
fn told(stage: &mut Stage<'_>) -> Vec<Value> {
    stage.run("query-version", json!({}));
    let all = std::mem::take(&mut stage.qmp.events).into_iter();
    let of_name = all.filter(|event| event["event"] == "BLOCK_WRITE_THRESHOLD");
    of_name.map(|event| event["data"].clone()).collect()
}

fn exceeded(node: &str, threshold: u64, amount: u64) -> Value {
    json!({"node-name": node, "write-threshold": threshold, "amount-exceeded": amount})
}

#[test]
fn the_first_write_beyond_is_told_of_once() {
    everywhere(|bed| {
        let mut stage = Stage::start(bed);
        stage.add_raw("disk");
        let mountpoint = stage.export("disk");
        let file = File::options().write(true).open(&mountpoint).unwrap();
        let write = |offset: u64, len: usize| file.write_all_at(&vec![1; len], offset).unwrap();
        set(&mut stage, "disk", 8192);
        write(0, 8192);
        assert_eq!(told(&mut stage), [json!(null); 0]);
        assert_eq!(shown(&mut stage, "disk"), 8192);
        write(4096, 4608);
        write(0, 65536);
        assert_eq!(told(&mut stage), [exceeded("disk", 8192, 512)]);
        assert_eq!(shown(&mut stage, "disk"), 0);
        // Whatever changes bytes is a write, and a new size is none.
        let (zero, hole) = (FallocateFlags::ZERO_RANGE, FallocateFlags::PUNCH_HOLE);
        for mode in [zero, hole | FallocateFlags::KEEP_SIZE] {
            set(&mut stage, "disk", 8192);
            rustix::fs::fallocate(&file, mode, 65536, 65536).unwrap();
            assert_eq!(told(&mut stage), [exceeded("disk", 8192, 122_880)]);
        }
        set(&mut stage, "disk", Stage::SIZE);
        let larger = json!({"node-name": "disk", "size": 2 * Stage::SIZE});
        stage.run("block_resize", larger);
        assert_eq!(told(&mut stage), [json!(null); 0]);
        set(&mut stage, "disk", 0);
        write(Stage::SIZE, 4096);
        assert_eq!(told(&mut stage), [json!(null); 0]);
        // As QEMU shows it.
        set(&mut stage, "disk", u64::MAX);
        assert_eq!(shown(&mut stage, "disk"), -1);
        // It stays when the node is opened anew.
        set(&mut stage, "disk", 4096);
        let anew = json!({
            "driver": "file", "node-name": "disk", "filename": bed.path("disk"), "cache": {"direct": true},
        });
        stage.run("blockdev-reopen", json!({"options": [anew]}));
        write(4096, 4096);
        assert_eq!(told(&mut stage), [exceeded("disk", 4096, 4096)]);
        drop(file);
        stage.stop();
    });
}

#[test]
fn each_node_has_a_threshold_of_its_own() {
    everywhere(|bed| {
        let mut stage = Stage::start(bed);
        stage.add_qcow2("image");
        let group = json!({"qom-type": "throttle-group", "id": "g"});
        stage.run("object-add", group);
        let slow = json!({
            "driver": "throttle", "node-name": "slow", "throttle-group": "g", "file": "image",
        });
        stage.run("blockdev-add", slow);
        let mountpoint = stage.export("slow");
        let file = File::options().write(true).open(&mountpoint).unwrap();
        for (node, threshold) in [
            ("slow", 1 << 20),
            ("image", 2 << 20),
            ("image-file", 1 << 20),
        ] {
            set(&mut stage, node, threshold);
        }
        let data = vec![1; 65536];
        // Much further on in the disk than in the file.
        file.write_all_at(&data, 3 << 20).unwrap();
        file.sync_all().unwrap();
        let first = told(&mut stage);
        let (above, below) = ((2 << 20) + 65536, (1 << 20) + 65536);
        let expected = [
            exceeded("slow", 1 << 20, above),
            exceeded("image", 2 << 20, below),
        ];
        assert_eq!(first, expected);
        assert_eq!(shown(&mut stage, "image-file"), 1 << 20);
        for place in 0..20 {
            file.write_all_at(&data, (4 << 20) + place * 65536).unwrap();
        }
        let then = told(&mut stage);
        assert_eq!(then.len(), 1, "{then:?}");
        assert_eq!(then[0]["node-name"], "image-file");
        drop(file);
        let nil = json!({"node-name": "nil", "write-threshold": 1});
        let error = &stage.qmp.ask("block-set-write-threshold", nil)["error"];
        let expected = json!({"class": "GenericError", "desc": "Device 'nil' not found"});
        assert_eq!(*error, expected);
        stage.stop();
    });
}

#[test]
fn what_an_open_image_stands_on_can_be_refused() {
    once(|bed| {
        let mut stage = Stage::start(bed);
        stage.add_qcow2("image");
        stage.run("blockdev-del", json!({"node-name": "image"}));
        let raw = json!({"driver": "raw", "node-name": "raw", "file": "image-file"});
        stage.run("blockdev-add", raw);
        let image = json!({"driver": "qcow2", "node-name": "image", "file": "raw"});
        stage.run("blockdev-add", image);
        let what = json!({"node-name": "raw", "write-threshold": 1});
        let words = "is open and cannot be put on another file";
        stage.refused("block-set-write-threshold", what, words);
        assert_eq!(shown(&mut stage, "raw"), 0);
        set(&mut stage, "image-file", 1);
        stage.stop();
    });
}

#[test]
fn four_writers_exceed_it_once() {
    everywhere(|bed| {
        let mut stage = Stage::start(bed);
        let disk = stage.add_qcow2("disk");
        let mountpoint = stage.export("disk");
        stage.fill(&mountpoint);
        let writers = stage.load(&mountpoint);
        for round in 0..50 {
            for (node, threshold) in [("disk", 512 + round), ("disk-file", 4096 + round)] {
                set(&mut stage, node, threshold);
                let about = |data: &Value| data["node-name"] == node;
                let event = stage.qmp.event_of("BLOCK_WRITE_THRESHOLD", about);
                assert_eq!(event["data"]["write-threshold"], threshold, "{event}");
            }
        }
        stage.pause_was_short(&writers, "block-set-write-threshold");
        assert_eq!(told(&mut stage), [json!(null); 0]);
        stage.finish(writers, "disk", &disk, "qcow2");
    });
}
