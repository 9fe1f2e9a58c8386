//! What the monitor's queries say of nodes and jobs, member by member, as QEMU's storage daemon says it.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use diskfuse_e2e::{Stage, Tool, once};
use serde_json::{Value, json};

/// What file systems and their disks like: the same on every machine where the cache is used.
fn limits(minimal_memory: u32, more: &Value) -> Value {
    let mut all = json!({
        "request-alignment": 1, "max-iov": 1024,
        "min-mem-alignment": minimal_memory, "opt-mem-alignment": 4096,
    });
    all.as_object_mut()
        .unwrap()
        .extend(more.as_object().unwrap().clone());
    all
}

#[test]
fn nodes_are_told_with_their_children_their_limits_and_names_that_open_them() {
    once(|bed| {
        let mut stage = Stage::start(bed);
        let file = stage.add_raw("file");
        let image = stage.add_qcow2("image");
        let (file, image) = (file.to_str().unwrap(), image.to_str().unwrap());
        for node in [
            json!({"driver": "null-co", "node-name": "null", "size": 1 << 20}),
            json!({"driver": "null-co", "node-name": "plain"}),
            json!({"driver": "raw", "node-name": "raw", "file": "file"}),
            json!({"driver": "raw", "node-name": "part", "file": "file", "offset": 4096, "size": 8192}),
            json!({"driver": "blkdebug", "node-name": "debug", "image": "image", "align": 4096,
                "inject-error": [{"event": "none", "iotype": "write", "errno": 28}]}),
            json!({"driver": "raw", "node-name": "top", "file": "debug"}),
        ] {
            stage.run("blockdev-add", node);
        }
        stage.run(
            "object-add",
            json!({"qom-type": "throttle-group", "id": "g"}),
        );
        let slow = json!({"driver": "throttle", "node-name": "slow", "throttle-group": "g", "file": "null"});
        stage.run("blockdev-add", slow);

        let of_file = stage.node("file");
        assert_eq!(of_file["children"], json!([]));
        assert_eq!(
            of_file["image"]["format-specific"],
            json!({"type": "file", "data": {}})
        );
        assert_eq!(of_file["image"]["limits"], limits(1, &json!({})));
        let raw = stage.node("raw");
        assert_eq!(
            raw["children"],
            json!([{"child": "file", "node-name": "file"}])
        );
        assert_eq!(
            (&raw["file"], &raw["image"]["filename"]),
            (&json!(file), &json!(file))
        );
        assert_eq!(raw["backing_file_depth"], 0);

        let of_image = stage.node("image");
        let cluster = json!({"discard-alignment": 65536, "write-zeroes-alignment": 65536});
        assert_eq!(of_image["image"]["limits"], limits(1, &cluster));
        assert_eq!(of_image["file"], image);
        let debug = stage.node("debug");
        assert_eq!(
            debug["children"],
            json!([{"child": "image", "node-name": "image"}])
        );
        assert_eq!(debug["image"]["limits"]["request-alignment"], 4096);
        assert_eq!(debug["image"]["limits"]["discard-alignment"], 65536);
        assert_eq!(debug["image"]["cluster-size"], 65536);
        assert_eq!(debug["image"]["backing-image"], of_image["image"]);
        assert_eq!(debug["backing_file_depth"], 1);
        assert!(debug["image"].get("actual-size").is_none());
        let name = json_name(&stage.node("top"));
        let below = json!({"driver": "qcow2", "file": {"driver": "file", "filename": image}});
        let debug = json!({
            "driver": "blkdebug", "align": 4096, "inject-error.0.event": "none",
            "inject-error.0.iotype": "write", "inject-error.0.errno": 28, "image": below,
        });
        assert_eq!(name, json!({"driver": "raw", "file": debug}));

        let empty = json!({"driver": "null-co", "size": 1 << 20});
        assert_eq!(json_name(&stage.node("null")), empty);
        assert_eq!(stage.node("plain")["file"], "null-co://");
        let slow = stage.node("slow");
        let expected = json!({"driver": "throttle", "throttle-group": "g", "file": empty});
        assert_eq!(json_name(&slow), expected);
        assert_eq!(slow["image"]["limits"], limits(512, &json!({})));
        assert!(slow["image"].get("dirty-flag").is_none() && slow.get("group").is_none());
        let part = json!({
            "driver": "raw", "offset": 4096, "size": 8192,
            "file": {"driver": "file", "filename": file},
        });
        assert_eq!(json_name(&stage.node("part")), part);
        stage.stop();
    });
}

/// The options that a node's name consists of.
fn json_name(node: &Value) -> Value {
    assert_eq!(node["file"], node["image"]["filename"]);
    let name = node["file"].as_str().unwrap();
    let options = name.strip_prefix("json:");
    serde_json::from_str(options.unwrap_or_else(|| panic!("{name}"))).unwrap()
}

#[test]
fn a_chain_is_told_as_a_whole_unless_it_is_to_be_flat() {
    once(|bed| {
        let mut stage = Stage::start(bed);
        stage.add_qcow2("base");
        stage.add_qcow2("top");
        stage.run(
            "blockdev-snapshot",
            json!({"node": "base", "overlay": "top"}),
        );
        let flat = stage.run("query-named-block-nodes", json!({"flat": true}));
        let flat: Vec<&Value> = flat
            .as_array()
            .unwrap()
            .iter()
            .filter(|n| n["node-name"] == "top")
            .collect();
        assert_eq!(flat[0]["backing_file_depth"], 0);
        assert!(flat[0]["image"].get("backing-image").is_none());
        let top = stage.node("top");
        assert_eq!(top["backing_file_depth"], 1);
        assert_eq!(top["image"]["backing-image"], stage.node("base")["image"]);
        let children = json!([
            {"child": "backing", "node-name": "base"}, {"child": "file", "node-name": "top-file"},
        ]);
        assert_eq!(top["children"], children);
        stage.stop();
    });
}

#[test]
fn of_a_mirror_it_is_said_whether_each_write_reaches_both_sides() {
    once(|bed| {
        let mut stage = Stage::start(bed);
        for name in ["disk", "copy", "other"] {
            stage.add_raw(name);
        }
        let backup = json!({"job-id": "b", "device": "disk", "target": "other", "sync": "none"});
        stage.run("blockdev-backup", backup);
        let jobs = stage.run("query-block-jobs", json!({}));
        assert!(jobs[0].get("actively-synced").is_none(), "{jobs}");
        stage.run("job-cancel", json!({"id": "b"}));
        stage.job_is_gone("b");
        for (mode, synced) in [("background", false), ("write-blocking", true)] {
            let mirror = json!({
                "job-id": "m", "device": "disk", "target": "copy", "sync": "full", "copy-mode": mode,
            });
            stage.run("blockdev-mirror", mirror);
            stage.qmp.job_is("m", "ready");
            let jobs = stage.run("query-block-jobs", json!({}));
            assert_eq!(jobs[0]["actively-synced"], synced, "{mode}: {jobs}");
            stage.run("job-cancel", json!({"id": "m"}));
            stage.job_is_gone("m");
        }
        stage.stop();
    });
}

/// Each node's name holds the options of all that is below it; to look again at what is below for each would take for ever.
#[test]
fn long_chains_that_need_options_are_told_at_once() {
    once(|bed| {
        let mut stage = Stage::start(bed);
        let bottom = json!({"driver": "null-co", "node-name": "n0", "size": 1 << 20});
        stage.run("blockdev-add", bottom);
        for number in 1..=40 {
            let path = bed.path(&format!("i{number}"));
            Tool::new("qemu-img")
                .args(["create", "-q", "-f", "qcow2"])
                .arg(&path)
                .arg("1M")
                .run();
            let node = json!({
                "driver": "qcow2", "node-name": format!("n{number}"), "backing": format!("n{}", number - 1),
                "file": {"driver": "file", "filename": path},
            });
            stage.run("blockdev-add", node);
        }
        let nodes = stage.run("query-named-block-nodes", json!({"flat": true}));
        let nodes = nodes.as_array().unwrap();
        let top = nodes.iter().find(|node| node["node-name"] == "n40");
        let mut options = json_name(top.unwrap());
        for _ in 0..40 {
            assert_eq!(options["driver"], "qcow2");
            options = options["backing"].take();
        }
        assert_eq!(options, json!({"driver": "null-co", "size": 1 << 20}));
        stage.stop();
    });
}
