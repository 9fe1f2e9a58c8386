//! Dirty bitmaps that qcow2 images keep: known to QEMU and to the next daemon, marked as in use until then, and gone when they were
//! removed.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use diskfuse_e2e::{
    Bed, SmallFs, Stage, Tool, as_raw, await_let_go, check_image, everywhere, once,
};
use rustix::process::Signal;
use serde_json::{Value, json};

/// What is said of the bitmaps of a node.
fn bitmaps(stage: &mut Stage<'_>, node: &str) -> Vec<Value> {
    let all = stage.node(node)["dirty-bitmaps"].take();
    all.as_array().cloned().unwrap_or_default()
}

fn bitmap(stage: &mut Stage<'_>, node: &str, name: &str) -> Value {
    let all = bitmaps(stage, node);
    let found = all.iter().find(|one| one["name"] == name);
    found.expect("the bitmap is there").clone()
}

/// Names and flags, as QEMU finds them in an image.
fn flags(image: &Path) -> Vec<(String, Vec<String>)> {
    let info = Tool::new("qemu-img")
        .args(["info", "-U", "--output=json"])
        .arg(image)
        .run();
    let info: Value = serde_json::from_str(&info.stdout).unwrap();
    let all = info["format-specific"]["data"]["bitmaps"].as_array();
    let word = |value: &Value| value.as_str().unwrap().to_owned();
    let one = |one: &Value| {
        let flags = one["flags"].as_array().unwrap().iter();
        (word(&one["name"]), flags.map(word).collect())
    };
    all.map_or(Vec::new(), |all| all.iter().map(one).collect())
}

fn is(image: &Path, expected: &[(&str, &[&str])]) {
    let expected: Vec<(String, Vec<String>)> = expected
        .iter()
        .map(|(name, flags)| {
            let flags = flags.iter().map(|&flag| flag.to_owned()).collect();
            ((*name).to_owned(), flags)
        })
        .collect();
    assert_eq!(flags(image), expected, "{}", image.display());
}

fn add(stage: &mut Stage<'_>, node: &str, name: &str) {
    let new = json!({"node": node, "name": name, "persistent": true});
    stage.run("block-dirty-bitmap-add", new);
}

/// An image that is there, as node `name` on node `name-file`.
fn open(stage: &mut Stage<'_>, name: &str, image: &Path, read_only: bool) {
    let file = format!("{name}-file");
    stage.run(
        "blockdev-add",
        json!({"driver": "file", "node-name": file, "filename": image, "read-only": read_only}),
    );
    stage.run(
        "blockdev-add",
        json!({"driver": "qcow2", "node-name": name, "file": file, "read-only": read_only}),
    );
}

fn made(bed: &Bed, name: &str, options: &[&str]) -> PathBuf {
    let image = bed.path(name);
    Tool::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .args(options)
        .arg(&image)
        .arg("16M")
        .run();
    image
}

fn qemu_bitmap(arguments: &[&str], image: &Path, name: &str) {
    Tool::new("qemu-img")
        .arg("bitmap")
        .args(arguments)
        .arg(image)
        .arg(name)
        .run();
}

fn write(file: &Path, offset: u64, bytes: &[u8]) {
    let file = std::fs::File::options().write(true).open(file).unwrap();
    file.write_all_at(bytes, offset).unwrap();
    file.sync_all().unwrap();
}

#[test]
fn incremental_backups_go_on_after_the_daemon_was_started_again() {
    everywhere(|bed| {
        let mut stage = Stage::start(bed);
        let disk = stage.add_qcow2("disk");
        let mountpoint = stage.export("disk");
        stage.fill(&mountpoint);
        let writers = stage.load(&mountpoint);
        let full = stage.add_qcow2("full");
        let actions = json!([
            {"type": "block-dirty-bitmap-add", "data":
                {"node": "disk", "name": "b", "persistent": true}},
            {"type": "blockdev-backup", "data":
                {"job-id": "j", "device": "disk", "target": "full", "sync": "full"}},
        ]);
        stage.run("transaction", json!({"actions": actions}));
        stage.job_ends("j");
        writers.go_on(50);
        stage.run("blockdev-del", json!({"node-name": "full"}));
        stage.finish(writers, "disk", &disk, "qcow2");
        is(&disk, &[("b", &["auto"])]);

        let mut stage = Stage::start(bed);
        open(&mut stage, "disk", &disk, false);
        let there = bitmap(&mut stage, "disk", "b");
        assert_eq!(there["persistent"], true, "{there}");
        assert_eq!(there["recording"], true, "{there}");
        assert!(there["count"].as_u64().unwrap() > 0, "{there}");
        let mountpoint = stage.export("disk");
        let writers = stage.load(&mountpoint);
        is(&disk, &[("b", &["in-use", "auto"])]);
        open(&mut stage, "full", &full, false);
        let again = json!({"job-id": "j", "device": "disk", "target": "full", "sync": "incremental", "bitmap": "b"});
        stage.run("blockdev-backup", again.clone());
        stage.job_ends("j");
        writers.go_on(50);
        stage.run("blockdev-del", json!({"node-name": "full"}));
        stage.finish(writers, "disk", &disk, "qcow2");

        // Nobody writes any more: together all copies are the disk.
        let mut stage = Stage::start(bed);
        open(&mut stage, "disk", &disk, false);
        open(&mut stage, "full", &full, false);
        stage.run("blockdev-backup", again);
        stage.job_ends("j");
        let there = bitmap(&mut stage, "disk", "b");
        assert_eq!(there["count"], 0, "{there}");
        stage.stop();
        is(&disk, &[("b", &["auto"])]);
        let copy = std::fs::read(as_raw(bed, &full, "qcow2")).unwrap();
        let original = std::fs::read(as_raw(bed, &disk, "qcow2")).unwrap();
        assert!(copy == original, "the copies are not the disk");
    });
}

#[test]
fn bitmaps_are_made_changed_and_removed_in_the_image() {
    once(|bed| {
        let image = made(bed, "image", &[]);
        qemu_bitmap(&["--add"], &image, "theirs");
        qemu_bitmap(&["--add", "--disable"], &image, "still");
        let mut stage = Stage::start(bed);
        open(&mut stage, "disk", &image, false);
        let names = |stage: &mut Stage<'_>| -> Vec<String> {
            let all = bitmaps(stage, "disk");
            let name = |one: &Value| one["name"].as_str().unwrap().to_owned();
            all.iter().map(name).collect()
        };
        assert_eq!(names(&mut stage), ["theirs", "still"]);
        assert_eq!(bitmap(&mut stage, "disk", "still")["recording"], false);
        let words = "Bitmap already exists: theirs";
        let add_theirs = json!({"node": "disk", "name": "theirs"});
        stage.refused("block-dirty-bitmap-add", add_theirs.clone(), words);
        add(&mut stage, "disk", "ours");
        stage.run(
            "block-dirty-bitmap-add",
            json!({"node": "disk", "name": "fleeting"}),
        );
        let mountpoint = stage.export("disk");
        write(&mountpoint, 1 << 20, &[1; 4096]);
        is(
            &image,
            &[("theirs", &["in-use", "auto"]), ("still", &["in-use"])],
        );
        for name in ["theirs", "ours", "fleeting"] {
            assert_eq!(bitmap(&mut stage, "disk", name)["count"], 65536, "{name}");
        }
        assert_eq!(bitmap(&mut stage, "disk", "still")["count"], 0);
        stage.run(
            "block-dirty-bitmap-merge",
            json!({"node": "disk", "target": "still", "bitmaps": ["ours"]}),
        );
        stage.run("block-dirty-bitmap-clear", add_theirs.clone());
        stage.run("block-dirty-bitmap-disable", add_theirs.clone());

        // What a transaction did is undone with it.
        let data = |name: &str| json!({"node": "disk", "name": name, "persistent": true});
        let gone = json!({"node": "disk", "name": "theirs"});
        let actions = json!([
            {"type": "block-dirty-bitmap-add", "data": data("never")},
            {"type": "block-dirty-bitmap-remove", "data": gone},
            {"type": "block-dirty-bitmap-clear", "data": {"node": "disk", "name": "still"}},
            {"type": "abort", "data": {}},
        ]);
        stage.refused(
            "transaction",
            json!({"actions": actions}),
            "Transaction aborted",
        );
        let mut there = names(&mut stage);
        there.sort();
        assert_eq!(there, ["fleeting", "ours", "still", "theirs"]);
        assert_eq!(bitmap(&mut stage, "disk", "still")["count"], 65536);
        let actions = json!([
            {"type": "block-dirty-bitmap-add", "data": data("always")},
            {"type": "block-dirty-bitmap-remove", "data": gone},
        ]);
        stage.run("transaction", json!({"actions": actions}));
        // What was removed is gone at once.
        is(&image, &[("still", &["in-use"])]);
        stage.run(
            "block-dirty-bitmap-remove",
            json!({"node": "disk", "name": "still"}),
        );
        is(&image, &[]);
        write(&mountpoint, 2 << 20, &[2; 4096]);
        stage.run("block-export-del", json!({"id": "disk"}));
        stage.qmp.event("BLOCK_EXPORT_DELETED");
        stage.run("blockdev-del", json!({"node-name": "disk"}));
        is(&image, &[("ours", &["auto"]), ("always", &["auto"])]);
        check_image(&image);

        open(&mut stage, "again", &image, false);
        assert_eq!(bitmap(&mut stage, "again", "ours")["count"], 2 * 65536);
        assert_eq!(bitmap(&mut stage, "again", "always")["count"], 65536);
        stage.run(
            "block_resize",
            json!({"node-name": "again", "size": 32 << 20}),
        );
        stage.run(
            "block_resize",
            json!({"node-name": "again", "size": 1 << 20}),
        );
        assert_eq!(bitmap(&mut stage, "again", "ours")["count"], 0);
        stage.stop();
        is(&image, &[("ours", &["auto"]), ("always", &["auto"])]);
        check_image(&image);
    });
}

#[test]
fn what_cannot_store_a_bitmap_says_so() {
    once(|bed| {
        let old = made(bed, "old", &["-o", "compat=0.10"]);
        let image = made(bed, "image", &[]);
        qemu_bitmap(&["--add"], &image, "b");
        let mut stage = Stage::start(bed);
        stage.add_raw("raw");
        open(&mut stage, "old", &old, false);
        open(&mut stage, "sealed", &image, true);
        let new = |node: &str, name: &str| json!({"node": node, "name": name, "persistent": true});
        let command = "block-dirty-bitmap-add";
        let words = "Can't store persistent bitmaps to raw: Operation not supported";
        stage.refused(command, new("raw", "x"), words);
        let words = "Can't make bitmap 'x' persistent in 'old': Cannot store dirty bitmaps in qcow2 v2 files";
        stage.refused(command, new("old", "x"), words);
        let words = "Can't make bitmap 'x' persistent in 'sealed'";
        stage.refused(command, new("sealed", "x"), words);
        let long = "n".repeat(1024);
        let words = "Name length exceeds maximum (1023 characters)";
        stage.refused(command, new("sealed", &long), words);

        // What is only read is as it is.
        let there = bitmap(&mut stage, "sealed", "b");
        assert_eq!(there["persistent"], true, "{there}");
        let words = "Bitmap 'b' is readonly and cannot be modified";
        let which = json!({"node": "sealed", "name": "b"});
        stage.refused("block-dirty-bitmap-clear", which.clone(), words);
        stage.refused("block-dirty-bitmap-remove", which, words);
        let merge = json!({"node": "sealed", "target": "b", "bitmaps": []});
        stage.refused("block-dirty-bitmap-merge", merge, words);
        stage.run(command, json!({"node": "sealed", "name": "copy"}));
        let merge = json!({"node": "sealed", "target": "copy", "bitmaps": ["b"]});
        stage.run("block-dirty-bitmap-merge", merge);
        stage.stop();
        is(&image, &[("b", &["auto"])]);
    });
}

#[test]
fn a_daemon_that_is_killed_leaves_bitmaps_that_say_so() {
    everywhere(|bed| {
        let image = made(bed, "image", &[]);
        qemu_bitmap(&["--add"], &image, "b");
        let mut stage = Stage::start(bed);
        open(&mut stage, "disk", &image, false);
        let mountpoint = stage.export("disk");
        write(&mountpoint, 1 << 20, &[1; 4096]);
        let Stage { daemon, qmp, .. } = stage;
        drop(qmp);
        daemon.end_by(Signal::KILL);
        Tool::new("umount").arg("-l").arg(&mountpoint).output();
        await_let_go(&image);
        is(&image, &[("b", &["in-use", "auto"])]);
        let check = Tool::new("qemu-img")
            .args(["check", "-f", "qcow2"])
            .arg(&image)
            .output();
        // Leaks are what may be.
        assert!([0, 3].contains(&check.code()), "{check}");

        for name in ["c", "d"] {
            let _ = std::fs::remove_file(bed.path(name));
        }
        let mut stage = Stage::start(bed);
        open(&mut stage, "disk", &image, false);
        let there = bitmap(&mut stage, "disk", "b");
        assert_eq!(there["inconsistent"], true, "{there}");
        assert_eq!(there["recording"], false, "{there}");
        let which = json!({"node": "disk", "name": "b"});
        let words = "Bitmap 'b' is inconsistent and cannot be used";
        stage.refused("block-dirty-bitmap-clear", which.clone(), words);
        let resize = json!({"node-name": "disk", "size": 32 << 20});
        stage.refused("block_resize", resize, words);
        // Put back after it was stored without, it is of as little use as before.
        not_removed_after_all(&mut stage, "disk", "b");
        assert_eq!(bitmap(&mut stage, "disk", "b")["inconsistent"], true);
        let reopen = json!({"driver": "qcow2", "node-name": "disk", "file": "disk-file"});
        stage.run("blockdev-reopen", json!({"options": [reopen]}));
        assert_eq!(bitmap(&mut stage, "disk", "b")["inconsistent"], true);
        stage.run("block-dirty-bitmap-remove", which);
        add(&mut stage, "disk", "b");
        stage.stop();
        is(&image, &[("b", &["auto"])]);
    });
}

#[test]
fn the_image_below_a_snapshot_has_its_bitmaps_and_a_commit_is_recorded_there() {
    once(|bed| {
        let mut stage = Stage::start(bed);
        let base = stage.add_qcow2("base");
        add(&mut stage, "base", "b");
        let mountpoint = stage.export("base");
        write(&mountpoint, 1 << 20, &[1; 4096]);
        stage.add_qcow2("top");
        stage.run(
            "blockdev-snapshot",
            json!({"node": "base", "overlay": "top"}),
        );
        // It is only read from now on.
        is(&base, &[("b", &["auto"])]);
        add(&mut stage, "top", "t");
        write(&mountpoint, 5 << 20, &[2; 4096]);
        assert_eq!(bitmap(&mut stage, "base", "b")["count"], 65536);
        assert_eq!(bitmap(&mut stage, "top", "t")["count"], 65536);
        stage.run(
            "blockdev-snapshot-internal-sync",
            json!({"device": "top", "name": "s"}),
        );
        assert_eq!(bitmap(&mut stage, "top", "t")["count"], 65536);
        stage.run(
            "blockdev-snapshot-delete-internal-sync",
            json!({"device": "top", "name": "s"}),
        );
        stage.run("block-commit", json!({"job-id": "j", "device": "top"}));
        stage.complete("j");
        assert_eq!(bitmap(&mut stage, "base", "b")["count"], 2 * 65536);
        write(&mountpoint, 9 << 20, &[3; 4096]);
        assert_eq!(bitmap(&mut stage, "base", "b")["count"], 3 * 65536);
        stage.run("blockdev-del", json!({"node-name": "top"}));
        is(&bed.path("top"), &[("t", &["auto"])]);
        stage.stop();
        is(&base, &[("b", &["auto"])]);
        check_image(&base);
    });
}

#[test]
fn a_mounted_image_keeps_its_bitmaps() {
    once(|bed| {
        let image = made(bed, "image", &[]);
        qemu_bitmap(&["--add"], &image, "b");
        let mounted = bed.mount(&image, &["-w"]);
        write(mounted.file(), 3 << 20, &[1; 4096]);
        is(&image, &[("b", &["in-use", "auto"])]);
        mounted.stop();
        is(&image, &[("b", &["auto"])]);
        check_image(&image);
        let mut stage = Stage::start(bed);
        open(&mut stage, "disk", &image, true);
        assert_eq!(bitmap(&mut stage, "disk", "b")["count"], 65536);
        stage.stop();
    });
}

#[test]
fn a_full_file_system_costs_the_bitmaps_and_nothing_else() {
    once(|bed| {
        let small = SmallFs::new(bed, "small", 16 << 20);
        let image = made(bed, "small/image", &[]);
        qemu_bitmap(&["--add"], &image, "b");
        let mounted = bed.mount(&image, &["-w"]);
        write(mounted.file(), 3 << 20, &vec![7; 65536]);
        let ballast = std::fs::File::create(small.folder().join("ballast")).unwrap();
        let mut at = 0;
        for piece in [1 << 20, 4096] {
            let bytes = vec![1; piece];
            while ballast.write_all_at(&bytes, at).is_ok() {
                at += piece as u64;
                assert!(at < 64 << 20, "there should be no room for this");
            }
            // What was not written yet may find none.
            let _ = ballast.sync_all();
        }
        let ended = mounted.end_by(Signal::TERM);
        assert_eq!(ended.output.code(), 0, "{}", ended.output);
        let said = &ended.output.stderr;
        let words = "its dirty bitmaps could not be stored";
        assert!(said.contains(words), "no '{words}' in: {said}");
        is(&image, &[("b", &["in-use", "auto"])]);
        let check = Tool::new("qemu-img")
            .args(["check", "-f", "qcow2"])
            .arg(&image)
            .output();
        assert!([0, 3].contains(&check.code()), "{check}");
        let raw = bed.path("raw");
        Tool::new("qemu-img")
            .args(["convert", "-f", "qcow2", "-O", "raw"])
            .args([&image, &raw])
            .run();
        let raw = std::fs::read(raw).unwrap();
        assert!(
            raw[3 << 20..(3 << 20) + 65536]
                .iter()
                .all(|&byte| byte == 7)
        );
    });
}

/// A transaction that removes a bitmap, and has the image stored without it, fails.
fn not_removed_after_all(stage: &mut Stage<'_>, node: &str, name: &str) {
    let actions = json!([
        {"type": "block-dirty-bitmap-remove", "data": {"node": node, "name": name}},
        {"type": "blockdev-snapshot-internal-sync", "data": {"device": node, "name": "never"}},
        {"type": "abort", "data": {}},
    ]);
    let words = "Transaction aborted";
    stage.refused("transaction", json!({"actions": actions}), words);
}

#[test]
fn what_a_removed_bitmap_had_in_the_file_is_freed_once_although_it_comes_back() {
    everywhere(|bed| {
        let image = made(bed, "image", &[]);
        let mut stage = Stage::start(bed);
        open(&mut stage, "disk", &image, false);
        let mountpoint = stage.export("disk");
        add(&mut stage, "disk", "b");
        let snapshot = |name: &str| json!({"device": "disk", "name": name});
        let command = "blockdev-snapshot-internal-sync";
        // Each row of blocks takes clusters that are free, and has a number of its own.
        let row = |n: u8| (u64::from(n) << 18, vec![n + 1; 256 << 10]);
        let rows = 24;
        for n in 0..rows {
            let (at, bytes) = row(n);
            write(&mountpoint, at, &bytes);
            match n % 4 {
                0 => drop(stage.run(command, snapshot(&n.to_string()))),
                1 => not_removed_after_all(&mut stage, "disk", "b"),
                _ => {}
            }
        }
        let count = bitmap(&mut stage, "disk", "b")["count"].clone();
        assert_eq!(count, u64::from(rows) << 18);
        let disk = std::fs::read(&mountpoint).unwrap();
        for n in 0..rows {
            let (at, bytes) = row(n);
            let at = at as usize;
            assert!(disk[at..at + bytes.len()] == bytes, "row {n}");
        }
        stage.stop();
        check_image(&image);
        is(&image, &[("b", &["auto"])]);
    });
}

/// Storing its bitmaps makes the file longer while it is opened for reading only.
#[test]
fn an_image_below_a_snapshot_lets_others_read_it_and_its_new_bitmap() {
    once(|bed| {
        let image = made(bed, "image", &[]);
        let mut stage = Stage::start(bed);
        let file = json!({"driver": "file", "filename": image});
        let node = json!({"driver": "qcow2", "node-name": "disk", "file": file});
        stage.run("blockdev-add", node);
        let mountpoint = stage.export("disk");
        write(&mountpoint, 1 << 20, &[1; 4096]);
        add(&mut stage, "disk", "b");
        stage.add_qcow2("top");
        let snapshot = json!({"node": "disk", "overlay": "top"});
        stage.run("blockdev-snapshot", snapshot);
        let raw = bed.path("raw");
        Tool::new("qemu-img")
            .args(["convert", "-O", "raw"])
            .args([&image, &raw])
            .run();
        is(&image, &[("b", &["auto"])]);
        assert_eq!(bitmap(&mut stage, "disk", "b")["persistent"], true);
        let read = std::fs::read(&mountpoint).unwrap();
        assert!(read == std::fs::read(&raw).unwrap());
        stage.stop();
        check_image(&image);
    });
}
