//! Commands that must be refused, given to our daemon and to the `qemu-storage-daemon` that is installed: the class of each error is
//! the same, and so are the words, but for a hint in parentheses behind ours. What succeeds succeeds on both.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::Path;
use std::time::Duration;

use diskfuse_e2e::{Bed, Qmp, Tool, once, wait_until};
use serde_json::{Value, json};

/// How long a job may take to end.
const LIMIT: Duration = Duration::from_secs(20);

/// Both daemons, each with a folder of its own in which the same files are.
struct Both {
    ours: Qmp,
    theirs: Qmp,
}

/// The images that both find in the folder that they start in.
fn fill(folder: &Path) {
    std::fs::create_dir_all(folder.join("folder")).unwrap();
    for (name, size) in [
        ("a", 1 << 20),
        ("b", 1 << 20),
        ("big", 2 << 20),
        ("odd", 100),
    ] {
        let file = std::fs::File::create(folder.join(name)).unwrap();
        file.set_len(size).unwrap();
    }
    std::fs::File::create(folder.join("m")).unwrap();
    let fifo = Tool::new("mkfifo").arg(folder.join("fifo"));
    fifo.run();
    let create = |name: &str, more: &[&str]| {
        let tool = Tool::new("qemu-img").args(["create", "-q", "-f", "qcow2"]);
        tool.args(more).arg(folder.join(name)).arg("1M").run();
    };
    create("base", &[]);
    create("mid", &["-u", "-b", "base", "-F", "qcow2"]);
    create("top", &["-u", "-b", "mid", "-F", "qcow2"]);
    create("new", &[]);
}

/// QEMU greets whoever comes while it starts a second time.
fn connect(socket: &Path) -> Qmp {
    let mut client = Qmp::silent(socket);
    client.send("{'execute': 'qmp_capabilities'}");
    loop {
        let message = client.answer();
        if message.get("QMP").is_none() {
            assert!(message.get("return").is_some(), "{message}");
            return client;
        }
    }
}

/// Starts both and runs `test`; ends both.
fn side_by_side(bed: &Bed, test: impl Fn(&mut Both)) {
    let start = |name: &str, tool: Tool| {
        let folder = bed.path(name);
        fill(&folder);
        let socket = folder.join("qmp");
        let chardev = format!("socket,id=c,path={},server=on,wait=off", socket.display());
        let tool = tool.args(["--chardev", &chardev, "--monitor", "c"]);
        let daemon = bed.start(tool.current_dir(&folder), Vec::new());
        (daemon, connect(&socket))
    };
    let (our_daemon, ours) = start("ours", bed.tool(["qsd"]));
    let (their_daemon, theirs) = start("theirs", Tool::new("qemu-storage-daemon"));
    let mut both = Both { ours, theirs };
    test(&mut both);
    our_daemon.stop();
    their_daemon.stop();
}

impl Both {
    /// Gives a command to both, and fails unless both answer the same.
    #[track_caller]
    fn ask(&mut self, command: &str, arguments: &Value) {
        let ours = self.ours.ask(command, arguments.clone());
        let theirs = self.theirs.ask(command, arguments.clone());
        let call = format!("{command} {arguments}");
        match (ours.get("error"), theirs.get("error")) {
            (None, None) => {}
            (Some(ours), Some(theirs)) => {
                assert_eq!(ours["class"], theirs["class"], "{call}: {ours} {theirs}");
                same_words(&call, &ours["desc"], &theirs["desc"]);
            }
            _ => panic!("{call}: ours {ours}, theirs {theirs}"),
        }
    }

    /// Gives several commands.
    #[track_caller]
    fn all(&mut self, command: &str, all: &[Value]) {
        for arguments in all {
            self.ask(command, arguments);
        }
    }

    /// Starts a job on both, which must end with the same error, or with none.
    #[track_caller]
    fn create(&mut self, options: &Value) {
        self.ask(
            "blockdev-create",
            &json!({"job-id": "j", "options": options}),
        );
        let error = |qmp: &mut Qmp| {
            let mut found = None;
            wait_until("the job's end", LIMIT, || {
                found = qmp.job("j").filter(|job| job["status"] == "concluded");
                found.is_some()
            });
            qmp.run("job-dismiss", json!({"id": "j"}));
            found.unwrap()["error"].take()
        };
        let (ours, theirs) = (error(&mut self.ours), error(&mut self.theirs));
        if !(ours.is_null() && theirs.is_null()) {
            same_words(&options.to_string(), &ours, &theirs);
        }
    }
}

/// That ours says what theirs says, and then at most a hint.
#[track_caller]
fn same_words(call: &str, ours: &Value, theirs: &Value) {
    let (ours, theirs) = (ours.as_str().unwrap_or(""), theirs.as_str().unwrap_or(""));
    let hint = ours.strip_prefix(theirs);
    let is_hint = |hint: &str| hint.is_empty() || hint.starts_with(" (") && hint.ends_with(')');
    assert!(
        hint.is_some_and(is_hint),
        "{call}\n  ours: {ours}\ntheirs: {theirs}"
    );
}

/// A command's arguments with others in the place of some.
fn with(base: &Value, more: Value) -> Value {
    let mut all = base.clone();
    let Value::Object(more) = more else {
        panic!("no members")
    };
    all.as_object_mut().unwrap().extend(more);
    all
}

#[test]
fn wrong_nodes_are_refused_in_the_same_words() {
    once(|bed| {
        side_by_side(bed, |both| {
            let file = json!({"driver": "file", "node-name": "n", "filename": "a"});
            both.all(
                "blockdev-add",
                &[
                    with(&file, json!({"filename": "folder"})),
                    with(&file, json!({"filename": "fifo"})),
                    with(&file, json!({"filename": "/dev/null"})),
                    with(&file, json!({"filename": ""})),
                    with(&file, json!({"driver": "host_device"})),
                    with(&file, json!({"driver": "host_device", "filename": ""})),
                    file.clone(),
                    file.clone(),
                    with(
                        &file,
                        json!({"node-name": "ro", "read-only": true, "filename": "b"}),
                    ),
                ],
            );
            let raw = json!({"driver": "raw", "node-name": "r", "file": "n"});
            both.all(
                "blockdev-add",
                &[
                    with(&raw, json!({"offset": 2 << 20})),
                    with(&raw, json!({"size": 2 << 20})),
                    with(&raw, json!({"offset": 512, "size": 1 << 20})),
                    with(&raw, json!({"size": 1})),
                    with(&raw, json!({"offset": 1024, "size": i64::MAX - 511})),
                    with(&raw, json!({"offset": -1})),
                    with(&raw, json!({"file": "nobody"})),
                    with(&raw, json!({"file": 5})),
                ],
            );
            both.all(
                "block_resize",
                &[
                    json!({"node-name": "nobody", "size": 1}),
                    json!({"node-name": "nobody", "size": -1}),
                    json!({"node-name": "n", "size": -1}),
                    json!({"node-name": "n", "size": 1u64 << 62}),
                    json!({"size": 1}),
                ],
            );
            both.all(
                "object-add",
                &[json!({"qom-type": "throttle-group", "id": "g"})],
            );
            both.all(
                "blockdev-add",
                &[json!({"driver": "throttle", "node-name": "t", "throttle-group": "g", "file": "n"})],
            );
            for path in ["", "/", "objects", "/objects", "object", "objects/nobody"] {
                both.ask("qom-list", &json!({"path": path}));
            }
            for path in ["/", "objects", "/objects", "object"] {
                both.ask("qom-get", &json!({"path": path, "property": "type"}));
            }
            let threshold = |value: Value| json!({"node-name": "nobody", "write-threshold": value});
            both.all(
                "block-set-write-threshold",
                &[
                    threshold(json!("1")),
                    threshold(json!(-1)),
                    threshold(json!(1.5)),
                ],
            );
            both.ask("qmp_capabilities", &json!({"enable": 5}));
            both.ask("qmp_capabilities", &json!({}));
        });
    });
}

#[test]
fn images_that_cannot_be_made_fail_in_the_same_words() {
    once(|bed| {
        side_by_side(bed, |both| {
            let file = json!({"driver": "file", "filename": "made", "size": 4096});
            both.create(&file);
            both.create(&with(&file, json!({"filename": "folder"})));
            both.create(&with(&file, json!({"filename": "nowhere/made"})));
            let large = with(&file, json!({"size": 1u64 << 62}));
            both.create(&large);
            both.create(&with(&large, json!({"preallocation": "falloc"})));
            both.create(&with(&file, json!({"size": -1})));
            both.create(&with(&file, json!({"preallocation": "metadata"})));
            for (name, file) in [("target", "a"), ("ro", "b"), ("data", "big")] {
                let node = json!({"driver": "file", "node-name": name, "filename": file, "read-only": name == "ro"});
                both.ask("blockdev-add", &node);
            }
            let image = json!({"driver": "qcow2", "file": "target", "size": 1 << 20});
            for more in [
                json!({"size": 513}),
                json!({"size": -1}),
                json!({"file": "ro"}),
                json!({"file": "nobody"}),
                json!({"cluster-size": 0}),
                json!({"cluster-size": 1000}),
                json!({"cluster-size": 4 << 20}),
                json!({"version": "v2", "lazy-refcounts": true}),
                json!({"version": "v2", "refcount-bits": 1}),
                json!({"version": "v2", "extended-l2": true}),
                json!({"version": "v2", "compression-type": "zstd"}),
                json!({"version": "v2", "data-file": "data"}),
                json!({"extended-l2": true, "cluster-size": 8192}),
                json!({"refcount-bits": 0}),
                json!({"refcount-bits": 3}),
                json!({"refcount-bits": 128}),
                json!({"refcount-bits": -1}),
                json!({"backing-fmt": "raw"}),
                json!({"backing-file": "a", "backing-fmt": "raw", "preallocation": "metadata"}),
                json!({"data-file-raw": true}),
                json!({"data-file": "data", "data-file-raw": true, "backing-file": "a", "backing-fmt": "raw"}),
                json!({"data-file": "nobody"}),
                json!({}),
            ] {
                both.create(&with(&image, more));
            }
            for size in [json!("1M"), json!(1.5), json!(null)] {
                let options = with(&image, json!({"size": size}));
                both.ask(
                    "blockdev-create",
                    &json!({"job-id": "j", "options": options}),
                );
            }
        });
    });
}

/// The chain `top`, `mid`, `base`, each a node of that name.
fn add_chain(both: &mut Both) {
    for (name, backing) in [
        ("base", Value::Null),
        ("mid", json!("base")),
        ("top", json!("mid")),
    ] {
        let image = json!({
            "driver": "qcow2", "node-name": name, "backing": backing,
            "file": {"driver": "file", "node-name": format!("{name}-file"), "filename": name},
        });
        both.ask("blockdev-add", &image);
    }
}

#[test]
fn what_is_not_done_to_chains_is_refused_in_the_same_words() {
    once(|bed| {
        side_by_side(bed, |both| {
            add_chain(both);
            let new = json!({
                "driver": "qcow2", "node-name": "new", "backing": null,
                "file": {"driver": "file", "node-name": "new-file", "filename": "new"},
            });
            both.ask("blockdev-add", &new);
            let snapshot = |node: &str, overlay: &str| json!({"node": node, "overlay": overlay});
            let snapshots = [
                snapshot("mid", "new"),
                snapshot("base", "new"),
                snapshot("top", "nobody"),
                snapshot("nobody", "new"),
                snapshot("new", "new"),
                snapshot("top", "mid"),
            ];
            both.all("blockdev-snapshot", &snapshots);
            let action = json!({"type": "blockdev-snapshot", "data": snapshot("mid", "new")});
            both.ask("transaction", &json!({"actions": [action]}));
            let grouped =
                json!({"actions": [action], "properties": {"completion-mode": "grouped"}});
            both.ask("transaction", &grouped);
            let sync = json!({"snapshot-file": "s", "snapshot-node-name": "s"});
            both.all(
                "blockdev-snapshot-sync",
                &[
                    with(&sync, json!({"node-name": "mid"})),
                    with(&sync, json!({"node-name": "nobody"})),
                    sync,
                ],
            );
            both.ask(
                "block_resize",
                &json!({"node-name": "mid", "size": 2 << 20}),
            );
            both.ask("blockdev-del", &json!({"node-name": "base"}));
            let reopen = |more: Value| {
                let image = json!({"driver": "qcow2", "node-name": "top", "file": "top-file"});
                json!({"options": [with(&image, more)]})
            };
            both.all(
                "blockdev-reopen",
                &[
                    reopen(json!({})),
                    reopen(json!({"backing": "nobody"})),
                    reopen(json!({"backing": "top"})),
                    json!({"options": [{"driver": "qcow2", "file": "top-file"}]}),
                    reopen(json!({"backing": "mid"})),
                ],
            );
            let image = |device: &str, image: &str| json!({"device": device, "image-node-name": image, "backing-file": "x"});
            both.all(
                "change-backing-file",
                &[
                    image("nobody", "top"),
                    image("top", "new"),
                    image("top", "base"),
                ],
            );
        });
    });
}

#[test]
fn jobs_that_cannot_be_are_refused_in_the_same_words() {
    once(|bed| {
        side_by_side(bed, |both| {
            add_chain(both);
            let commit = json!({"device": "top", "job-id": "j"});
            both.all(
                "block-commit",
                &[
                    with(&commit, json!({"device": "nobody"})),
                    with(&commit, json!({"device": ""})),
                    with(&commit, json!({"top-node": "nobody"})),
                    with(&commit, json!({"base-node": "nobody"})),
                    with(&commit, json!({"top": "nothing"})),
                    with(&commit, json!({"base": "nothing"})),
                    with(&commit, json!({"top-node": "base", "base-node": "mid"})),
                    with(&commit, json!({"top-node": "mid", "base-node": "mid"})),
                    with(&commit, json!({"backing-file": "x"})),
                    with(&commit, json!({"filter-node-name": "a b"})),
                    with(&commit, json!({"filter-node-name": "top"})),
                ],
            );
            let stream = json!({"device": "top", "job-id": "j"});
            both.all(
                "block-stream",
                &[
                    with(&stream, json!({"device": "nobody"})),
                    with(&stream, json!({"base-node": "nobody"})),
                    with(&stream, json!({"bottom": "nobody"})),
                    with(&stream, json!({"base": "x", "base-node": "base"})),
                    with(&stream, json!({"bottom": "mid", "base-node": "base"})),
                    with(&stream, json!({"base": "x", "bottom": "mid"})),
                    with(&stream, json!({"backing-file": "x"})),
                    with(&stream, json!({"bottom": "base", "backing-file": "x"})),
                ],
            );
            for (name, file) in [("a", "a"), ("ro", "b")] {
                let node = json!({"driver": "file", "node-name": name, "filename": file, "read-only": name == "ro"});
                both.ask("blockdev-add", &node);
            }
            let copy = json!({"device": "top", "target": "a", "sync": "full", "job-id": "j"});
            let both_ways = [
                json!({"target": "ro"}),
                json!({"sync": "incremental"}),
                json!({"target": "nobody"}),
                json!({"filter-node-name": "a b"}),
                json!({"filter-node-name": "top"}),
            ];
            for more in &both_ways {
                both.ask("blockdev-mirror", &with(&copy, more.clone()));
                both.ask("blockdev-backup", &with(&copy, more.clone()));
            }
            both.all(
                "blockdev-mirror",
                &[
                    with(&copy, json!({"sync": "bitmap"})),
                    with(&copy, json!({"buf-size": -1})),
                    with(&copy, json!({"granularity": -1})),
                    with(&copy, json!({"granularity": 1u64 << 40})),
                    with(&copy, json!({"granularity": "1"})),
                    with(&copy, json!({"granularity": 1000})),
                ],
            );
            both.all(
                "blockdev-backup",
                &[
                    with(&copy, json!({"sync": "bitmap", "bitmap": "x"})),
                    with(
                        &copy,
                        json!({"sync": "none", "bitmap": "x", "bitmap-mode": "always"}),
                    ),
                ],
            );
            for command in [
                "block-job-dismiss",
                "block-job-finalize",
                "job-dismiss",
                "job-finalize",
            ] {
                both.ask(command, &json!({"id": "nobody"}));
            }
        });
    });
}

/// Bitmap commands about a node and a bitmap that are not there, are there twice, have no name, or do not fit.
#[test]
fn bitmap_commands_are_refused_with_the_same_words() {
    once(|bed| {
        side_by_side(bed, |both| {
            let file = json!({"driver": "file", "filename": "new"});
            let new = json!({"driver": "qcow2", "node-name": "new", "file": file});
            let raw = json!({"driver": "file", "node-name": "a", "filename": "a"});
            let big = json!({"driver": "file", "node-name": "big", "filename": "big"});
            for node in [new, raw, big] {
                both.ask("blockdev-add", &node);
            }
            let on = |node: &str, name: &str| json!({"node": node, "name": name});
            let adds = [
                on("new", "b"),
                on("new", "b"),
                on("new", ""),
                on("nobody", "b"),
                on("nobody", ""),
                on("", "b"),
                with(&on("new", "c"), json!({"granularity": 1000})),
                with(&on("new", "c"), json!({"granularity": 1})),
                with(&on("new", "c"), json!({"granularity": 0})),
                with(&on("new", "c"), json!({"granularity": -512})),
                with(&on("new", "b"), json!({"granularity": 1000})),
                with(&on("nobody", "b"), json!({"granularity": 1000})),
                with(&on("new", "c"), json!({"granularity": 1u64 << 32})),
                with(&on("new", "c"), json!({"granularity": 1u64 << 40})),
                with(&on("a", "c"), json!({"persistent": true})),
                with(&on("a", "c"), json!({"persistent": 1})),
                with(
                    &on("new", "x"),
                    json!({"persistent": true, "granularity": 512}),
                ),
                with(
                    &on("new", "y"),
                    json!({"persistent": true, "disabled": true}),
                ),
                with(&on("new", &"z".repeat(1024)), json!({"persistent": true})),
                on("new", &"z".repeat(1024)),
                on("new", &"z".repeat(1023)),
                on("a", "of-a"),
                on("big", "of-big"),
            ];
            both.all("block-dirty-bitmap-add", &adds);
            for verb in ["enable", "disable", "clear"] {
                let command = format!("block-dirty-bitmap-{verb}");
                for (node, name) in [
                    ("nobody", "b"),
                    ("nobody", ""),
                    ("", "b"),
                    ("new", "none"),
                    ("new", ""),
                    ("a", "b"),
                    ("new", "b"),
                    ("new", "x"),
                ] {
                    both.ask(&command, &on(node, name));
                }
            }
            let merge = |node: &str, target: &str, from: Value| json!({"node": node, "target": target, "bitmaps": from});
            // Not of nothing, nor of a number: QEMU 10 crashes, and names no place.
            let merges = [
                merge("nobody", "b", json!([])),
                merge("nobody", "b", json!(["none"])),
                merge("new", "none", json!([])),
                merge("new", "none", json!(["none"])),
                merge("new", "b", json!(["none"])),
                merge("new", "b", json!(["x", "none"])),
                merge("new", "b", json!([on("nobody", "x")])),
                merge("new", "b", json!([on("new", "none")])),
                merge("new", "b", json!([on("a", "of-a")])),
                merge("new", "b", json!([on("big", "of-big")])),
                merge("new", "b", json!(["b", "b"])),
                merge("new", "b", json!([{"node": "new"}])),
                merge("new", "b", json!("x")),
            ];
            both.all("block-dirty-bitmap-merge", &merges);
            for (node, name) in [("nobody", "b"), ("new", "none"), ("new", "b"), ("new", "b")] {
                let data = on(node, name);
                let actions = json!([{"type": "block-dirty-bitmap-clear", "data": data}]);
                both.ask("transaction", &json!({"actions": actions}));
                both.ask("block-dirty-bitmap-remove", &data);
            }
        });
    });
}
