//! Jobs whose targets come back to their sources: they are refused, and whatever is asked next is answered.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use diskfuse_e2e::{Bed, Stage, Tool, once};
use serde_json::{Value, json};

fn copy(id: &str, from: &str, to: &str, sync: &str) -> Value {
    json!({"job-id": id, "device": from, "target": to, "sync": sync})
}

fn busy(node: &str) -> String {
    format!("Node '{node}' is busy: block device is in use by block job: backup")
}

/// A filter that shows `below`.
fn add_filter(stage: &mut Stage<'_>, name: &str, below: &str) {
    if stage.qmp.ask("qom-list", json!({"path": "/objects/g"}))["error"].is_object() {
        let group = json!({"qom-type": "throttle-group", "id": "g"});
        stage.run("object-add", group);
    }
    stage.run("blockdev-add", filter(name, below));
}

fn filter(name: &str, below: &str) -> Value {
    json!({"driver": "throttle", "node-name": name, "throttle-group": "g", "file": below})
}

/// An overlay of `below` as node `name`.
fn add_overlay(stage: &mut Stage<'_>, name: &str, below: &str) {
    stage.add_qcow2(name);
    stage.run("blockdev-del", json!({"node-name": name}));
    stage.run("blockdev-add", overlay(name, &json!(below)));
}

fn overlay(name: &str, below: &Value) -> Value {
    let file = format!("{name}-file");
    json!({"driver": "qcow2", "node-name": name, "file": file, "backing": below})
}

/// Takes a job back that runs for as long as it is let.
fn cancel(stage: &mut Stage<'_>, id: &str) {
    stage.run("job-cancel", json!({"id": id}));
    stage.job_is_gone(id);
}

/// Waits until a job has ended well and its id is free.
fn ends(stage: &mut Stage<'_>, id: &str) {
    stage.job_ends(id);
    stage.job_is_gone(id);
}

fn with_nodes(names: &[&str], test: impl Fn(&mut Stage<'_>)) {
    once(|bed| {
        let mut stage = Stage::start(bed);
        for name in names {
            stage.add_raw(name);
        }
        test(&mut stage);
        assert_eq!(stage.run("query-jobs", json!({})), json!([]));
        stage.stop();
    });
}

#[test]
fn what_a_backup_writes_no_other_job_copies() {
    with_nodes(&["a", "b", "e"], |stage| {
        stage.run("blockdev-backup", copy("j", "a", "b", "none"));
        for (from, to, node) in [
            ("b", "a", "b"),
            ("b", "e", "b"),
            ("e", "b", "b"),
            ("e", "a", "a"),
        ] {
            for sync in ["none", "full"] {
                let other = copy("k", from, to, sync);
                stage.refused("blockdev-backup", other.clone(), &busy(node));
                stage.refused("blockdev-mirror", other, &busy(node));
            }
        }
        // Two copies of one disk are no trouble.
        stage.run("blockdev-backup", copy("k", "a", "e", "full"));
        ends(stage, "k");
        cancel(stage, "j");
        stage.run("blockdev-backup", copy("j", "b", "a", "full"));
        ends(stage, "j");
    });
}

#[test]
fn backups_of_one_transaction_are_not_each_others_targets() {
    with_nodes(&["a", "b", "e"], |stage| {
        add_filter(stage, "t", "a");
        let action = |data: Value| json!({"type": "blockdev-backup", "data": data});
        let two = |one: Value, other: Value| json!({"actions": [action(one), action(other)]});
        let crossed = two(copy("j", "a", "b", "none"), copy("k", "b", "a", "none"));
        stage.refused("transaction", crossed, &busy("b"));
        let through_filter = two(copy("j", "b", "t", "none"), copy("k", "a", "e", "none"));
        let words = "Node 'a' cannot be copied while the copy of node 'b' is written to it, by way of node 't'";
        stage.refused("transaction", through_filter, words);
        for id in ["j", "k"] {
            stage.job_is_gone(id);
        }
        // Neither has left anything behind.
        let apart = two(copy("j", "a", "b", "full"), copy("k", "a", "e", "full"));
        stage.run("transaction", apart);
        ends(stage, "j");
        stage.job_is_gone("k");
    });
}

#[test]
fn a_copy_that_comes_to_a_source_through_other_nodes_is_refused() {
    with_nodes(&["a", "b", "e"], |stage| {
        for name in ["a", "b", "e"] {
            add_filter(stage, &format!("t{name}"), name);
        }
        let again = |node: &str, of: &str, by: &str| {
            format!(
                "Node '{node}' cannot be copied while the copy of node '{of}' is written to it, by way of node '{by}'"
            )
        };
        stage.run("blockdev-backup", copy("j", "a", "tb", "none"));
        let back = copy("k", "b", "ta", "full");
        for command in ["blockdev-backup", "blockdev-mirror"] {
            stage.refused(command, back.clone(), &again("a", "b", "ta"));
        }
        // Around three corners, from either side.
        for (from, to, words) in [
            ("b", "te", again("b", "a", "tb")),
            ("e", "ta", again("a", "e", "ta")),
        ] {
            stage.refused("blockdev-backup", copy("k", from, to, "none"), &words);
        }
        cancel(stage, "j");
    });
}

#[test]
fn two_disks_are_not_copied_to_overlays_of_each_other() {
    with_nodes(&["a", "b"], |stage| {
        add_overlay(stage, "oa", "a");
        add_overlay(stage, "ob", "b");
        stage.run("blockdev-backup", copy("j", "a", "ob", "none"));
        let words = "Node 'a' cannot be copied to node 'ob', which stands on nodes that are copied to what stands on 'a'";
        stage.refused("blockdev-backup", copy("k", "b", "oa", "none"), words);
        // Whoever drains is not kept waiting.
        stage.run(
            "blockdev-reopen",
            json!({"options": [overlay("oa", &Value::Null)]}),
        );
        cancel(stage, "j");
        stage.run("blockdev-backup", copy("k", "b", "oa", "none"));
        cancel(stage, "k");
    });
}

#[test]
fn a_filter_is_not_put_on_a_source_while_a_copy_is_written_to_it() {
    with_nodes(&["a", "b", "e", "f"], |stage| {
        add_filter(stage, "low", "e");
        add_filter(stage, "high", "low");
        stage.run("blockdev-backup", copy("j", "a", "high", "none"));
        stage.run("blockdev-backup", copy("k", "b", "f", "none"));
        for (below, words) in [
            (
                "a",
                "Node 'a' cannot be copied to itself, by way of node 'high'",
            ),
            (
                "b",
                "Node 'b' cannot be copied while the copy of node 'a' is written to it, by way of node 'high'",
            ),
        ] {
            let reopen = json!({"options": [filter("low", below)]});
            stage.refused("blockdev-reopen", reopen, words);
        }
        for id in ["j", "k"] {
            cancel(stage, id);
        }
    });
}

#[test]
fn source_and_target_are_not_the_same_storage() {
    with_nodes(&["a", "b"], |stage| {
        add_filter(stage, "t", "a");
        add_filter(stage, "u", "a");
        for (from, to) in [("a", "t"), ("t", "a"), ("t", "u")] {
            for sync in ["full", "top", "none"] {
                let words = format!(
                    "Source and target cannot be the same: writes to '{from}' and to '{to}' both come to node 'a'"
                );
                stage.refused("blockdev-backup", copy("j", from, to, sync), &words);
                let words = match (from, to) {
                    ("a", _) => "Need a root block node",
                    _ => "Can't mirror node into itself",
                };
                stage.refused("blockdev-mirror", copy("j", from, to, sync), words);
            }
        }
        stage.run("blockdev-mirror", copy("j", "t", "b", "full"));
        stage.complete("j");
    });
}

#[test]
fn a_disk_whose_data_are_in_the_source_is_no_target() {
    with_nodes(&["data"], |stage| {
        stage.add_qcow2("image");
        stage.run("blockdev-del", json!({"node-name": "image"}));
        let options = json!({
            "driver": "qcow2", "file": "image-file", "data-file": "data", "size": Stage::SIZE,
        });
        stage.run(
            "blockdev-create",
            json!({"job-id": "create", "options": options}),
        );
        stage.qmp.job_is("create", "concluded");
        stage.run("job-dismiss", json!({"id": "create"}));
        let mut image = overlay("image", &Value::Null);
        image["data-file"] = json!("data");
        stage.run("blockdev-add", image);
        let words = "Source and target cannot be the same";
        for (from, to) in [("data", "image"), ("image", "data")] {
            stage.refused("blockdev-backup", copy("j", from, to, "none"), words);
        }
    });
}

#[test]
fn an_overlay_takes_a_backup_of_its_backing_node_but_no_mirror() {
    with_nodes(&["a"], |stage| {
        add_overlay(stage, "o", "a");
        add_filter(stage, "t", "o");
        for target in ["o", "t"] {
            for sync in ["full", "top", "none"] {
                let onto = copy("j", "a", target, sync);
                stage.refused("blockdev-mirror", onto.clone(), "Need a root block node");
                stage.run("blockdev-backup", onto);
                match sync {
                    "none" => cancel(stage, "j"),
                    _ => ends(stage, "j"),
                }
            }
        }
    });
}

#[test]
fn a_mirror_whose_target_was_put_on_its_source_meanwhile_fails_and_ends() {
    with_nodes(&["a"], |stage| {
        stage.add_qcow2("o");
        add_filter(stage, "t", "o");
        stage.run("blockdev-mirror", copy("j", "a", "t", "full"));
        stage.qmp.job_is("j", "ready");
        let reopen = |below: Value| json!({"options": [overlay("o", &below)]});
        stage.run("blockdev-reopen", reopen(json!("a")));
        stage.run("job-complete", json!({"id": "j"}));
        let event = stage.qmp.event("BLOCK_JOB_COMPLETED");
        let words = "Node 't' stands on node 'a', so block job 'j' cannot end";
        assert_eq!(event["data"]["error"], words, "{event}");
        stage.job_is_gone("j");
        stage.run("blockdev-reopen", reopen(Value::Null));
        stage.run("blockdev-mirror", copy("j", "a", "t", "full"));
        stage.complete("j");
    });
}

#[test]
fn a_backup_of_the_topmost_image_counts_what_that_holds() {
    once(|bed: &Bed| {
        let mut stage = Stage::start(bed);
        stage.add_raw("a");
        add_overlay(&mut stage, "o", "a");
        add_overlay(&mut stage, "copy", "a");
        stage.run("blockdev-del", json!({"node-name": "o"}));
        stage.run("blockdev-del", json!({"node-name": "o-file"}));
        let image = bed.path("o");
        let write = ["write 1M 200k", "write 3M 64k"];
        Tool::new("qemu-io")
            .args(["-c", write[0], "-c", write[1]])
            .arg(&image)
            .run();
        let file = json!({"driver": "file", "node-name": "o-file", "filename": image});
        stage.run("blockdev-add", file);
        stage.run("blockdev-add", overlay("o", &json!("a")));
        let mut slow = copy("j", "o", "copy", "top");
        slow["speed"] = json!(1 << 16);
        stage.run("blockdev-backup", slow);
        let counted = |stage: &mut Stage<'_>| {
            let job = stage.qmp.job("j").expect("there it is");
            job["total-progress"].as_u64().expect("a number")
        };
        diskfuse_e2e::wait_until(
            "all to be counted",
            std::time::Duration::from_secs(20),
            || counted(&mut stage) == 5 << 16,
        );
        stage.run("block-job-set-speed", json!({"device": "j", "speed": 0}));
        let event = stage.qmp.event("BLOCK_JOB_COMPLETED");
        let ends = (&event["data"]["len"], &event["data"]["offset"]);
        assert_eq!(ends, (&json!(5 << 16), &json!(5 << 16)), "{event}");
        stage.job_is_gone("j");
        stage.stop();
    });
}
