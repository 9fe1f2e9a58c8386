//! Nodes that are to be opened anew for a change, and cannot be: the change is refused with a reason, and whoever uses the disk
//! goes on as before.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use diskfuse_e2e::{Bed, Stage, Tool, once};
use serde_json::{Value, json};

/// A qcow2 image on node `name`, above a `blkdebug` node `name-debug` with these rules, above node `name-file`.
fn add_above(stage: &mut Stage<'_>, name: &str, rules: Value) -> PathBuf {
    let path = stage.bed.path(name);
    Tool::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(&path)
        .arg(Stage::SIZE.to_string())
        .run();
    let file = format!("{name}-file");
    let debug = format!("{name}-debug");
    let mut rules = rules;
    rules["driver"] = json!("blkdebug");
    rules["node-name"] = json!(debug);
    rules["image"] = json!(file);
    for node in [
        json!({"driver": "file", "node-name": file, "filename": path}),
        rules,
        json!({"driver": "qcow2", "node-name": name, "file": debug, "backing": null}),
    ] {
        stage.run("blockdev-add", node);
    }
    path
}

/// Once something was written in the data of the image, the next read of its header fails.
fn header_unreadable_once() -> Value {
    json!({
        "set-state": [{"event": "write_aio", "state": 1, "new_state": 2}],
        "inject-error": [{"event": "read_aio", "state": 2, "sector": 0, "once": true, "iotype": "read"}],
    })
}

/// Ends the daemon, which must have said this and nothing else.
fn stop_saying(stage: Stage<'_>, words: &str) {
    let Stage { bed, daemon, qmp } = stage;
    drop(qmp);
    let ended = daemon.stop();
    let said: Vec<&str> = ended.output.stderr.lines().collect();
    assert!(
        !said.is_empty() && said.iter().all(|line| line.contains(words)),
        "no '{words}' alone in: {}",
        ended.output
    );
    bed.nothing_mounted();
}

#[test]
fn a_file_that_a_commit_writes_is_not_opened_for_reading_only() {
    once(|bed| {
        let mut stage = Stage::start(bed);
        let base = stage.add_qcow2("base");
        let top = bed.path("top");
        Tool::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2"])
            .arg(&top)
            .arg(Stage::SIZE.to_string())
            .run();
        Tool::new("qemu-io")
            .args(["-f", "qcow2", "-c", "write -P 7 0 8M"])
            .arg(&top)
            .run();
        let node = json!({
            "driver": "qcow2", "node-name": "top", "backing": "base",
            "file": {"driver": "file", "filename": top},
        });
        stage.run("blockdev-add", node);
        // Held back, so that it is not done before it is asked.
        let commit = json!({"job-id": "j", "device": "top", "base-node": "base", "speed": 1 << 20});
        stage.run("block-commit", commit);
        let file = json!({
            "driver": "file", "node-name": "base-file", "filename": base, "discard": "unmap",
            "read-only": true,
        });
        let reopen = json!({"options": [file]});
        stage.refused("blockdev-reopen", reopen, "read-only");
        stage.run("block-job-set-speed", json!({"device": "j", "speed": 0}));
        stage.complete("j");
        stage.stop();
        std::fs::remove_file(&top).unwrap();
    });
}

#[test]
fn a_disk_whose_image_cannot_be_opened_with_other_options_goes_on() {
    once(|bed| {
        let mut stage = Stage::start(bed);
        let disk = add_above(&mut stage, "disk", header_unreadable_once());
        let mountpoint = stage.export("disk");
        stage.fill(&mountpoint);
        let writers = stage.load(&mountpoint);
        let options = json!({"options": [{
            "driver": "qcow2", "node-name": "disk", "file": "disk-debug", "backing": null, "lazy-refcounts": true,
        }]});
        stage.refused("blockdev-reopen", options.clone(), "Input/output error");
        stage.pause_was_short(&writers, "blockdev-reopen, refused");
        // Beside one that cannot be had.
        let both = json!({"options": [
            options["options"][0],
            {"driver": "qcow2", "node-name": "nil", "file": "disk-debug"},
        ]});
        stage.refused("blockdev-reopen", both, "nil");
        stage.pause_was_short(&writers, "blockdev-reopen of several, refused");
        stage.run("blockdev-reopen", options);
        stage.pause_was_short(&writers, "blockdev-reopen");
        stage.finish(writers, "disk", &disk, "qcow2");
    });
}

#[test]
fn an_image_below_a_snapshot_that_cannot_be_opened_for_reading_only_is_read_and_committed_to() {
    once(|bed| {
        let mut stage = Stage::start(bed);
        let disk = add_above(&mut stage, "disk", header_unreadable_once());
        let mountpoint = stage.export("disk");
        stage.fill(&mountpoint);
        let writers = stage.load(&mountpoint);
        let top = stage.add_qcow2("top");
        stage.run(
            "blockdev-snapshot",
            json!({"node": "disk", "overlay": "top"}),
        );
        stage.pause_was_short(&writers, "blockdev-snapshot of what cannot be sealed");
        stage.run("block-commit", json!({"job-id": "j", "device": "top"}));
        stage.complete("j");
        stage.pause_was_short(&writers, "block-commit to what was not sealed");
        let mut writers = writers;
        let ends = writers.stop();
        assert!(ends.iter().all(|end| end == "told to"), "{ends:?}");
        writers.check(&mountpoint);
        stage.run("block-export-del", json!({"id": "disk"}));
        stage.qmp.event("BLOCK_EXPORT_DELETED");
        stop_saying(stage, "node 'disk' stays open for writing");
        for image in [&disk, &top] {
            diskfuse_e2e::check_image(image);
        }
        writers.check(&diskfuse_e2e::as_raw(bed, &disk, "qcow2"));
    });
}

#[test]
fn an_image_that_cannot_be_opened_after_a_snapshot_inside_is_read_and_can_be_opened_later() {
    once(|bed| {
        let mut stage = Stage::start(bed);
        // The snapshot reads the header, and so does whoever looks whether there is one of this name.
        let rules = json!({
            "set-state": [{"event": "write_aio", "state": 1, "new_state": 2}],
            "inject-error": [{"event": "read_aio", "state": 2, "sector": 0, "iotype": "read"}],
        });
        let disk = add_above(&mut stage, "disk", json!({}));
        let mountpoint = stage.export("disk");
        stage.fill(&mountpoint);
        let snapshot = |name: &str| json!({"device": "disk", "name": name});
        stage.run("blockdev-snapshot-internal-sync", snapshot("a"));
        let mut debug = rules;
        debug["driver"] = json!("blkdebug");
        debug["node-name"] = json!("disk-debug");
        debug["image"] = json!("disk-file");
        let image =
            json!({"driver": "qcow2", "node-name": "disk", "file": "disk-debug", "backing": null});
        stage.run("blockdev-reopen", json!({"options": [debug, image]}));
        // No header is read for what is refused before.
        let words = "Node 'disk' could not be opened again and takes no writes until it is";
        stage.refused("blockdev-snapshot-internal-sync", snapshot("b"), words);
        let file = File::options().read(true).write(true).open(&mountpoint);
        let file = file.unwrap();
        let mut first = vec![0; 4096];
        file.read_exact_at(&mut first, 96 << 10).unwrap();
        // A write is told, and not kept waiting.
        let told = file.write_at(&[7; 4096], 0).unwrap_err();
        assert_eq!(told.raw_os_error(), Some(5), "{told}");
        let well = json!({"driver": "blkdebug", "node-name": "disk-debug", "image": "disk-file"});
        let image =
            json!({"driver": "qcow2", "node-name": "disk", "file": "disk-debug", "backing": null});
        stage.run("blockdev-reopen", json!({"options": [well, image]}));
        file.write_all_at(&[7; 4096], 0).unwrap();
        file.sync_all().unwrap();
        drop(file);
        diskfuse_e2e::check_background(&mountpoint);
        stage.run("block-export-del", json!({"id": "disk"}));
        stage.qmp.event("BLOCK_EXPORT_DELETED");
        stop_saying(stage, "is closed");
        diskfuse_e2e::check_image(&disk);
    });
}

/// A process that has an image open for reading and lets nobody write it, until it is dropped.
struct Reader(Child);

impl Reader {
    fn of(bed: &Bed, image: &Path) -> Self {
        let ready = bed.path("reader.pid");
        let child = Command::new("qemu-storage-daemon")
            .arg("--blockdev")
            .arg(format!(
                "driver=qcow2,node-name=n,read-only=on,file.driver=file,file.read-only=on,file.filename={}",
                image.display()
            ))
            .arg("--pidfile")
            .arg(&ready)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let end = Instant::now() + Duration::from_secs(20);
        while !ready.exists() {
            assert!(Instant::now() < end, "nobody reads the image");
            std::thread::sleep(Duration::from_millis(5));
        }
        Self(child)
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_base_that_cannot_be_opened_for_writing_refuses_the_job_and_nothing_else() {
    once(|bed| {
        let mut stage = Stage::start(bed);
        let disk = stage.add_qcow2("disk");
        let mountpoint = stage.export("disk");
        stage.fill(&mountpoint);
        let writers = stage.load(&mountpoint);
        stage.add_qcow2("top");
        stage.run(
            "blockdev-snapshot",
            json!({"node": "disk", "overlay": "top"}),
        );
        let nodes = json!({"options": [
            {"driver": "file", "node-name": "disk-file", "filename": disk, "read-only": true},
            {"driver": "qcow2", "node-name": "disk", "file": "disk-file", "backing": null, "read-only": true},
        ]});
        stage.run("blockdev-reopen", nodes);
        let commit = json!({"job-id": "j", "device": "top"});

        // Its file is gone, or another one has its name.
        let elsewhere = bed.path("elsewhere");
        std::fs::rename(&disk, &elsewhere).unwrap();
        stage.refused("block-commit", commit.clone(), "No such file or directory");
        std::fs::write(&disk, [0; 512]).unwrap();
        let words = "is not the file any more that it was opened as";
        stage.refused("block-commit", commit.clone(), words);
        std::fs::rename(&elsewhere, &disk).unwrap();

        // Nobody may write it.
        Tool::new("chattr").arg("+i").arg(&disk).run();
        let refused = stage.qmp.ask("block-commit", commit.clone());
        Tool::new("chattr").arg("-i").arg(&disk).run();
        let said = refused["error"]["desc"].as_str().unwrap_or_default();
        assert!(said.contains("Operation not permitted"), "{refused}");

        // Another process reads it, and bears with no writer.
        let reader = Reader::of(bed, &disk);
        stage.refused(
            "block-commit",
            commit.clone(),
            "Failed to get \"write\" lock",
        );
        drop(reader);

        stage.pause_was_short(&writers, "block-commit, refused four times");
        stage.run("block-commit", commit);
        stage.complete("j");
        stage.pause_was_short(&writers, "block-commit");
        stage.finish(writers, "disk", &disk, "qcow2");
    });
}
