//! What must not happen to disks that are changed while they are in use: nodes taken away from under somebody, two who change
//! one node at a time, and jobs whose daemon, export or disk is gone in the middle.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use diskfuse_e2e::{
    Bed, Qmp, Stage, Tool, as_raw, await_let_go, check_background, check_image, everywhere, mounts,
    once, wait_until,
};
use rustix::process::Signal;
use serde_json::{Value, json};

/// What `blockdev-backup` is told of a job that takes minutes.
fn slow_backup(target: &str) -> Value {
    json!({"job-id": "j", "device": "disk", "target": target, "sync": "full", "speed": 64 << 10})
}

#[test]
fn what_a_job_works_on_is_left_to_it() {
    once(|bed| {
        let mut stage = Stage::start(bed);
        let disk = stage.add_qcow2("disk");
        let mountpoint = stage.export("disk");
        stage.fill(&mountpoint);
        let writers = stage.load(&mountpoint);
        stage.add_qcow2("copy");
        stage.add_qcow2("top");
        stage.run("blockdev-backup", slow_backup("copy"));
        let busy = "Node 'disk' is busy: block device is in use by block job: backup";
        let size = json!({"node-name": "disk", "size": 2 * Stage::SIZE});
        let snapshot = json!({"node": "disk", "overlay": "top"});
        let inside = json!({"device": "disk", "name": "s"});
        let mirror = json!({"job-id": "m", "device": "disk", "target": "top", "sync": "full"});
        let image =
            json!({"driver": "qcow2", "node-name": "disk", "file": "disk-file", "backing": null});
        let action = json!({"type": "blockdev-snapshot", "data": snapshot});
        for (command, arguments) in [
            ("block_resize", size),
            ("blockdev-snapshot", snapshot),
            ("blockdev-snapshot-internal-sync", inside.clone()),
            ("blockdev-snapshot-delete-internal-sync", inside),
            ("blockdev-mirror", mirror),
            ("blockdev-reopen", json!({"options": [image]})),
            ("blockdev-del", json!({"node-name": "disk"})),
            ("transaction", json!({"actions": [action]})),
        ] {
            stage.refused(command, arguments, busy);
        }
        let words = "Node 'copy' is busy: block device is in use by block job: backup";
        stage.refused("blockdev-del", json!({"node-name": "copy"}), words);
        let onto = stage.export_options("onto", "copy", &["t0"]);
        bed.mountpoint("onto.m");
        stage.refused("block-export-add", onto, "copy");
        assert!(mounts::at(&bed.path("onto.m")).is_none());
        stage.pause_was_short(&writers, "commands that a job forbids");
        stage.run("job-cancel", json!({"id": "j"}));
        stage.qmp.event("BLOCK_JOB_CANCELLED");
        let words = "Node disk is in use by export 'disk'";
        stage.refused("blockdev-del", json!({"node-name": "disk"}), words);
        let words = "Node disk-file is in use by node 'disk'";
        stage.refused("blockdev-del", json!({"node-name": "disk-file"}), words);
        let words = "Failed to find node with node-name='nil'";
        stage.refused("blockdev-del", json!({"node-name": "nil"}), words);
        stage.finish(writers, "disk", &disk, "qcow2");
    });
}

#[test]
fn images_in_use_are_neither_overwritten_nor_committed_to() {
    once(|bed| {
        let mut stage = Stage::start(bed);
        let disk = stage.add_qcow2("disk");
        let mountpoint = stage.export("disk");
        stage.fill(&mountpoint);
        let writers = stage.load(&mountpoint);
        let create = |options: Value| json!({"job-id": "c", "options": options});
        let image = create(json!({"driver": "qcow2", "file": "disk-file", "size": 1 << 20}));
        let file = create(json!({"driver": "file", "filename": disk, "size": 0}));
        let locked = "Is another process using the image";
        let conflict = "Permission conflict on node 'disk-file'";
        for (options, words) in [(image, conflict), (file, locked)] {
            stage.run("blockdev-create", options);
            stage.qmp.job_is("c", "concluded");
            let job = stage.qmp.job("c").unwrap();
            let why = job["error"].as_str().unwrap_or_default();
            assert!(why.contains(words), "{job}");
            stage.run("job-dismiss", json!({"id": "c"}));
        }
        stage.pause_was_short(&writers, "blockdev-create of what is in use");

        // Two chains, perhaps of two processes, on one image.
        add_overlay(&mut stage, "top", &disk);
        stage.run(
            "blockdev-snapshot",
            json!({"node": "disk", "overlay": "top"}),
        );
        stage.run("blockdev-reopen", json!({"options": [
            {"driver": "file", "node-name": "disk-file", "filename": disk, "read-only": true},
            {"driver": "qcow2", "node-name": "disk", "file": "disk-file", "backing": null, "read-only": true},
        ]}));
        let other = json!({
            "driver": "qcow2", "node-name": "other", "read-only": true,
            "file": {"driver": "file", "filename": disk, "read-only": true},
        });
        stage.run("blockdev-add", other);
        let mut reader = stage.export_options("other", "other", &["t0"]);
        reader["writable"] = json!(false);
        let second = bed.mountpoint("other.m");
        stage.run("block-export-add", reader);
        let words = "lock";
        stage.refused(
            "block-commit",
            json!({"job-id": "j", "device": "top"}),
            words,
        );
        stage.pause_was_short(&writers, "block-commit, refused");
        check_background(&second);
        check_background(&mountpoint);
        stage.run("block-export-del", json!({"id": "other", "mode": "hard"}));
        stage.qmp.event("BLOCK_EXPORT_DELETED");
        stage.run("blockdev-del", json!({"node-name": "other"}));
        stage.run("block-commit", json!({"job-id": "j", "device": "top"}));
        stage.complete("j");
        stage.pause_was_short(&writers, "block-commit to what was read-only");
        stage.finish(writers, "disk", &disk, "qcow2");
    });
}

/// Both give a command at the same time; how many of them were carried out, and what the other was told.
fn race(
    stage: &mut Stage<'_>,
    other: &mut Qmp,
    command: &str,
    arguments: [Value; 2],
) -> Vec<String> {
    let [mine, theirs] = arguments;
    let answers = std::thread::scope(|scope| {
        let other = scope.spawn(move || other.ask(command, theirs));
        [stage.qmp.ask(command, mine), other.join().unwrap()]
    });
    let errors = answers
        .iter()
        .filter_map(|answer| answer["error"]["desc"].as_str());
    errors.map(str::to_owned).collect()
}

#[test]
fn of_two_who_change_one_node_one_is_told_why_not() {
    once(|bed| {
        let mut stage = Stage::start(bed);
        let disk = stage.add_qcow2("disk");
        let mountpoint = stage.export("disk");
        stage.fill(&mountpoint);
        let writers = stage.load(&mountpoint);
        let mut other = stage.second_client();
        let both = |value: Value| [value.clone(), value];
        for _ in 0..5 {
            let node = json!({"driver": "null-co", "node-name": "n", "size": Stage::SIZE});
            let told = race(&mut stage, &mut other, "blockdev-add", both(node));
            assert_eq!(told, ["Duplicate nodes with node-name='n'"]);
            let node = json!({"driver": "null-co", "node-name": "n2", "size": Stage::SIZE});
            stage.run("blockdev-add", node);
            let backup = |id: &str| json!({"job-id": id, "device": "disk", "target": "n", "sync": "full", "speed": 65536});
            let told = race(
                &mut stage,
                &mut other,
                "blockdev-backup",
                [backup("a"), backup("b")],
            );
            assert_eq!(told.len(), 1, "{told:?}");
            let jobs = stage.run("query-jobs", json!({}));
            let id = jobs[0]["id"].clone();
            let told = race(
                &mut stage,
                &mut other,
                "job-cancel",
                both(json!({"id": id})),
            );
            assert!(told.len() <= 1, "{told:?}");
            stage.job_is_gone(id.as_str().unwrap());
            let mirror = |target: &str| json!({"job-id": target, "device": "disk", "target": target, "sync": "full"});
            let told = race(
                &mut stage,
                &mut other,
                "blockdev-mirror",
                [mirror("n"), mirror("n2")],
            );
            let busy = "Node 'disk' is busy: block device is in use by block job: mirror";
            assert_eq!(told, [busy]);
            let jobs = stage.run("query-jobs", json!({}));
            let id = jobs[0]["id"].clone();
            stage.run("job-cancel", json!({"id": id}));
            stage.job_is_gone(id.as_str().unwrap());
            let gone = both(json!({"node-name": "n"}));
            let told = race(&mut stage, &mut other, "blockdev-del", gone);
            assert_eq!(told, ["Failed to find node with node-name='n'"]);
            stage.run("blockdev-del", json!({"node-name": "n2"}));
        }
        stage.pause_was_short(&writers, "races");
        drop(other);
        stage.finish(writers, "disk", &disk, "qcow2");
    });
}

#[test]
fn a_job_goes_on_when_the_export_of_its_disk_is_gone() {
    everywhere(|bed| {
        let mut stage = Stage::start(bed);
        let disk = stage.add_qcow2("disk");
        let mountpoint = stage.export("disk");
        stage.fill(&mountpoint);
        let mut writers = stage.load(&mountpoint);
        let copy = stage.add_qcow2("copy");
        let mirror = json!({"job-id": "j", "device": "disk", "target": "copy", "sync": "full"});
        stage.run("blockdev-mirror", mirror);
        stage.qmp.job_is("j", "ready");
        Tool::new("umount").arg("-l").arg(&mountpoint).run();
        writers.stop();
        let event = stage.qmp.event("BLOCK_EXPORT_DELETED");
        assert_eq!(event["data"]["id"], "disk");
        stage.run("job-complete", json!({"id": "j"}));
        stage.job_ends("j");
        for node in ["disk", "copy"] {
            stage.run("blockdev-del", json!({"node-name": node}));
        }
        for image in [&disk, &copy] {
            let raw = as_raw(bed, image, "qcow2");
            writers.check(&raw);
            check_background(&raw);
        }
        stage.run("quit", json!({}));
        assert!(stage.daemon.ends().status().success());
    });
}

#[test]
fn quit_in_the_middle_of_everything_is_orderly() {
    everywhere(|bed| {
        let mut stage = Stage::start(bed);
        let disk = stage.add_qcow2("disk");
        let mountpoint = stage.export("disk");
        stage.fill(&mountpoint);
        let mut writers = stage.load(&mountpoint);
        let targets = ["one", "two"].map(|name| stage.add_qcow2(name));
        let mut backup = slow_backup("one");
        stage.run("blockdev-backup", backup.clone());
        backup["job-id"] = json!("k");
        backup["target"] = json!("two");
        stage.run("blockdev-backup", backup);
        let raw = stage.add_raw("raw");
        let other = stage.export("raw");
        let more = stage.load(&other);
        let mirror = json!({"job-id": "m", "device": "raw", "target": "n", "sync": "full"});
        let node = json!({"driver": "null-co", "node-name": "n", "size": Stage::SIZE});
        stage.run("blockdev-add", node);
        stage.run("blockdev-mirror", mirror);
        writers.go_on(20);
        assert_eq!(stage.run("quit", json!({})), json!({}));
        for id in ["j", "k", "m"] {
            let about = |data: &Value| data["device"] == id;
            assert!(
                stage
                    .qmp
                    .events
                    .iter()
                    .any(|event| about(&event["data"]) && event["event"] == "BLOCK_JOB_CANCELLED")
            );
        }
        let Stage { daemon, .. } = stage;
        let ended = daemon.ends();
        assert!(ended.status().success(), "{}", ended.output);
        bed.nothing_mounted();
        writers.stop();
        let copy = as_raw(bed, &disk, "qcow2");
        writers.check(&copy);
        check_background(&copy);
        for image in &targets {
            check_image(image);
        }
        more.finish(&raw);
    });
}

/// A new qcow2 image that says what it stands on, as node `name` without a backing node.
fn add_overlay(stage: &mut Stage<'_>, name: &str, below: &Path) {
    let path = stage.bed.path(name);
    Tool::new("qemu-img")
        .args(["create", "-f", "qcow2", "-F", "qcow2", "-b"])
        .args([below, &path])
        .run();
    let node = json!({
        "driver": "qcow2", "node-name": name, "backing": null,
        "file": {"driver": "file", "node-name": format!("{name}-file"), "filename": path},
    });
    stage.run("blockdev-add", node);
}

/// Kills the daemon in the middle of what `job` does; `top` must be what was acknowledged, and each image sound.
fn killed_in(bed: &Bed, job: &str, arguments: Value, patience: Duration) {
    let mut stage = Stage::start(bed);
    let disk = stage.add_qcow2("disk");
    let mountpoint = stage.export("disk");
    stage.fill(&mountpoint);
    let mut writers = stage.load(&mountpoint);
    add_overlay(&mut stage, "top", &disk);
    stage.run(
        "blockdev-snapshot",
        json!({"node": "disk", "overlay": "top"}),
    );
    writers.go_on(50);
    let copy = stage.add_qcow2("copy");
    let synced = writers.acknowledged();
    File::open(&mountpoint).unwrap().sync_all().unwrap();
    stage.run(job, arguments);
    // On a busy disk it may take a while to begin.
    wait_until("the job has begun", Duration::from_secs(20), || {
        let there = stage.qmp.job("j").expect("the job is under way");
        there["current-progress"].as_u64() > Some(0)
    });
    std::thread::sleep(patience);
    assert!(stage.qmp.job("j").is_some(), "the job is under way");
    let Stage { daemon, .. } = stage;
    daemon.end_by(Signal::KILL);
    writers.stop();
    Tool::new("umount").arg("-l").arg(&mountpoint).run();
    let top = bed.path("top");
    for image in [&disk, &top, &copy] {
        await_let_go(image);
        let output = Tool::new("qemu-img").arg("check").arg(image).output();
        // Clusters that are counted and not used are no harm.
        assert!([0, 3].contains(&output.code()), "{output}");
    }
    let raw = bed.path("raw-copy");
    Tool::new("qemu-img")
        .args(["convert", "-f", "qcow2", "-O", "raw"])
        .args([&top, &raw])
        .run();
    writers.check_after_crash(&raw, &synced);
    check_background(&raw);
    for image in [&disk, &top, &copy] {
        std::fs::remove_file(image).unwrap();
    }
}

#[test]
fn a_daemon_killed_in_the_middle_of_a_job_leaves_what_was_synced() {
    once(|bed| {
        for patience in [40, 400].map(Duration::from_millis) {
            let stream = json!({"job-id": "j", "device": "top", "speed": 4 << 20});
            killed_in(bed, "block-stream", stream, patience);
            let commit = json!({"job-id": "j", "device": "top", "speed": 4 << 20});
            killed_in(bed, "block-commit", commit, patience);
            let mirror = json!({
                "job-id": "j", "device": "top", "target": "copy", "sync": "full", "speed": 4 << 20,
            });
            killed_in(bed, "blockdev-mirror", mirror, patience);
        }
    });
}
