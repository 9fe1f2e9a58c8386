//! Nodes that are written inside others, and have names, as host managers write them: they come and go with what they were
//! written in, and chains are found by the names that images have for each other.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use diskfuse_e2e::{Bed, Daemon, Qmp, Tool, once};
use serde_json::{Value, json};

fn start(bed: &Bed) -> (Daemon, Qmp) {
    let socket = bed.path("qmp");
    let chardev = format!("socket,id=c,path={},server=on,wait=off", socket.display());
    let daemon = bed.qsd(&["--chardev", &chardev, "--monitor", "c"], &[]);
    (daemon, Qmp::connect(&socket))
}

fn create(bed: &Bed, name: &str, options: &[&str]) {
    let tool = Tool::new("qemu-img").args(["create", "-q", "-f", "qcow2"]);
    tool.args(options).arg(bed.path(name)).arg("16M").run();
}

/// A qcow2 node over a file node with a name.
fn image(bed: &Bed, file: &str, name: &str) -> Value {
    json!({
        "driver": "qcow2",
        "node-name": name,
        "file": {
            "driver": "file",
            "node-name": format!("{name}-file"),
            "filename": bed.path(file),
        },
    })
}

#[test]
fn what_is_written_inside_a_node_goes_with_it_whatever_its_name() {
    once(|bed| {
        create(bed, "i", &[]);
        let (daemon, mut qmp) = start(bed);
        for _ in 0..3 {
            qmp.run("blockdev-add", image(bed, "i", "q"));
            let words = "Node q-file is not owned by the monitor";
            let name = json!({"node-name": "q-file"});
            assert_eq!(qmp.refused("blockdev-del", name), words);
            qmp.run("blockdev-del", json!({"node-name": "q"}));
            let nodes = qmp.run("query-named-block-nodes", json!({}));
            assert_eq!(nodes, json!([]));
        }
        // Somebody else stands on it as well: it stays until he goes.
        qmp.run("blockdev-add", image(bed, "i", "q"));
        let raw = json!({"driver": "raw", "node-name": "r", "file": "q-file", "read-only": true});
        qmp.run("blockdev-add", raw);
        qmp.run("blockdev-del", json!({"node-name": "q"}));
        qmp.run("blockdev-del", json!({"node-name": "r"}));
        qmp.run("blockdev-add", image(bed, "i", "q"));
        daemon.stop();
    });
}

#[test]
fn a_transaction_goes_on_with_a_bitmap_across_a_snapshot() {
    once(|bed| {
        create(bed, "i", &[]);
        create(bed, "o", &[]);
        let (daemon, mut qmp) = start(bed);
        qmp.run("blockdev-add", image(bed, "i", "q"));
        let mut overlay = image(bed, "o", "o");
        overlay["backing"] = Value::Null;
        qmp.run("blockdev-add", overlay);
        let actions = json!([
            {"type": "blockdev-snapshot", "data": {"node": "q", "overlay": "o"}},
            {"type": "block-dirty-bitmap-add", "data": {"node": "o", "name": "b"}},
        ]);
        qmp.run("transaction", json!({"actions": actions}));
        daemon.stop();
    });
}

#[test]
fn a_chain_is_known_by_the_names_that_its_images_have_for_each_other() {
    once(|bed| {
        create(bed, "base", &[]);
        create(bed, "mid", &["-b", "base", "-F", "qcow2"]);
        create(bed, "top", &["-b", "mid", "-F", "qcow2"]);
        let (daemon, mut qmp) = start(bed);
        qmp.run("blockdev-add", image(bed, "top", "t"));
        let stream = json!({"job-id": "s", "device": "t", "base": "elsewhere"});
        let words = qmp.refused("block-stream", stream);
        assert_eq!(words, "Can't find 'elsewhere' in the backing chain");
        let stream = json!({"job-id": "s", "device": "t", "base": "base"});
        qmp.run("block-stream", stream);
        qmp.event("BLOCK_JOB_COMPLETED");
        let commit = json!({"job-id": "c", "device": "t", "top": bed.path("top"), "base": "base"});
        qmp.run("block-commit", commit);
        qmp.event("BLOCK_JOB_READY");
        qmp.run("job-complete", json!({"id": "c"}));
        qmp.event("BLOCK_JOB_COMPLETED");
        daemon.stop();
    });
}

#[test]
fn a_commit_reaches_a_raw_base_that_was_opened_for_reading() {
    once(|bed| {
        std::fs::write(bed.path("base"), vec![0; 16 << 20]).unwrap();
        create(bed, "top", &["-b", "base", "-F", "raw"]);
        let write = Tool::new("qemu-io").args(["-c", "write -q -P 7 1M 64k"]);
        write.arg(bed.path("top")).run();
        let (daemon, mut qmp) = start(bed);
        let base = json!({
            "driver": "raw",
            "node-name": "base",
            "read-only": true,
            "file": {"driver": "file", "filename": bed.path("base"), "read-only": true},
        });
        qmp.run("blockdev-add", base);
        let mut top = image(bed, "top", "t");
        top["backing"] = "base".into();
        qmp.run("blockdev-add", top);
        qmp.run("block-commit", json!({"job-id": "c", "device": "t"}));
        qmp.event("BLOCK_JOB_READY");
        qmp.run("job-complete", json!({"id": "c"}));
        qmp.event("BLOCK_JOB_COMPLETED");
        daemon.stop();
        let bytes = std::fs::read(bed.path("base")).unwrap();
        let (before, rest) = bytes.split_at(1 << 20);
        let (there, behind) = rest.split_at(64 << 10);
        assert!(there.iter().all(|&byte| byte == 7));
        assert!([before, behind].concat().iter().all(|&byte| byte == 0));
    });
}
