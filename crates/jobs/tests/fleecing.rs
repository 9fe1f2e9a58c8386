//! Fleecing: an overlay on the disk that a backup saves to shows the disk as it was when the job began, to everybody, to the byte,
//! while the disk is written.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use diskfuse_block::Kind;
use diskfuse_block::graph::ChildRole;
use diskfuse_jobs::{BackupConfig, BackupSync, Job, JobConfig, OnCbwError, Status, backup};
use diskfuse_qcow2::node::{Children, Qcow2Config, Qcow2Node};
use diskfuse_ring::{sleep, spawn};
use support::faulty::Faulty;
use support::guest::Guest;
use support::rng::Rng;
use support::{
    KIB, Lab, MIB, assert_same, begin_backup as begin, busy, cases, open_raw_file, reaches, read,
    run, scatter,
};

fn fleecing(sync: BackupSync) -> BackupConfig {
    BackupConfig {
        sync,
        ..BackupConfig::new(JobConfig::new("f"), "src", "dst")
    }
}

async fn cancel(job: &Job) {
    reaches(job, &[Status::Running]).await;
    job.cancel(true).unwrap();
    job.over().await.unwrap_err();
}

/// The overlay goes, and nothing keeps it.
async fn remove(lab: &Lab) {
    let node = Arc::downgrade(&lab.graph.bare("dst").unwrap());
    lab.graph.get("dst").unwrap().close().await.unwrap();
    lab.graph.remove("dst").unwrap();
    assert!(node.upgrade().is_none(), "somebody still has the overlay");
}

#[test]
fn the_overlay_shows_the_disk_as_it_was_while_four_write_it() {
    cases::run("fleecing", 12, |seed| {
        run(async {
            let mut rng = Rng::new(seed);
            let size = rng.within(3..20) * MIB + rng.below(64) * 4 * KIB;
            let lab = Lab::new();
            match rng.chance(50) {
                true => lab.raw("src", size),
                false => lab.qcow2("src", size, "cluster_size=4096", None).await,
            }
            scatter(&lab, &mut rng, "src", size).await;
            let options = [
                "",
                "cluster_size=4096",
                "cluster_size=1M",
                "compat=0.10",
                "extended_l2=on",
            ];
            lab.qcow2("dst", size, rng.pick(&options), Some("src"))
                .await;
            let model = lab.contents("src").await;
            let mut guest = Guest::start(&lab.graph, "src", model, 2, seed);
            busy(&guest, 50).await;
            let sync = rng.pick(&[0, 0, 0, 1, 2]);
            let sync = [BackupSync::None, BackupSync::Full, BackupSync::Top][sync].clone();
            let mut config = fleecing(sync);
            // So slow that most is copied because of the guest.
            config.job.speed = MIB;
            let (job, expected) = begin(&lab, &guest, config).await;
            let mut reader = Guest::reading(&lab.graph, "dst", expected.clone(), 1, seed);
            // Whoever drains either stops both, and lets both go on.
            let graph = lab.graph.clone();
            let disturbed = spawn(async move {
                for node in ["dst", "src", "dst", "src"] {
                    drop(graph.drain(node).await.unwrap());
                    sleep(Duration::from_millis(3)).await;
                }
            });
            busy(&guest, 300).await;
            busy(&reader, 100).await;
            disturbed.await;
            assert_same(&lab.contents("dst").await, &expected, "under load");
            reader.stop();
            drop(reader);
            // All of it may have been saved by now, which is the end of some.
            let _ = job.cancel(true);
            let _ = job.over().await;
            busy(&guest, 20).await;
            guest.stop();
            assert_same(&lab.contents("src").await, &guest.model(), "the disk");
            lab.assert_sound("dst").await;
            remove(&lab).await;
        });
    });
}

/// Who has looked up that the overlay has nothing reads the disk when that has been overwritten already.
#[test]
fn a_read_that_a_write_overtakes_shows_what_was_there() {
    run(async {
        let lab = Lab::new();
        let path = lab.path("src.img");
        std::fs::write(&path, vec![1; 4 << 20]).unwrap();
        let disk = Faulty::new(open_raw_file(&path));
        let node: Arc<Faulty> = Arc::clone(&disk);
        lab.graph.insert(Some("src"), node, &[]).unwrap();
        lab.qcow2("dst", 4 * MIB, "", Some("src")).await;
        let start = backup(&lab.jobs, &lab.graph, fleecing(BackupSync::None)).unwrap();
        let job = start.begin(&lab.jobs).await.unwrap();
        let overlay = lab.graph.get("dst").unwrap();
        disk.stall.store(true, SeqCst);
        let slow = spawn(async move { read(&*overlay, MIB, 128 * KIB).await.unwrap() });
        while !disk.stalled.load(SeqCst) {
            sleep(Duration::from_millis(1)).await;
        }
        // Nobody waits for the reader.
        lab.fill("src", MIB + 64 * KIB, &[2; 4096]).await;
        disk.stalled.store(false, SeqCst);
        assert_same(&slow.await, &vec![1; 128 << 10], "what was read");
        cancel(&job).await;
        remove(&lab).await;
    });
}

#[test]
fn old_zeroes_are_held() {
    run(async {
        for options in ["", "compat=0.10", "extended_l2=on", "cluster_size=4096"] {
            for sync in [BackupSync::None, BackupSync::Full] {
                let lab = Lab::new();
                lab.raw("src", 4 * MIB);
                lab.qcow2("dst", 4 * MIB, options, Some("src")).await;
                let mut config = fleecing(sync);
                config.job.speed = 1;
                let start = backup(&lab.jobs, &lab.graph, config).unwrap();
                let job = start.begin(&lab.jobs).await.unwrap();
                sleep(Duration::from_millis(20)).await;
                lab.fill("src", MIB, &vec![1; 2 << 20]).await;
                let shown = lab.contents("dst").await;
                assert_same(&shown, &vec![0; 4 << 20], options);
                cancel(&job).await;
            }
        }
    });
}

#[test]
fn who_reads_on_after_the_end_gets_errors_and_no_mixture() {
    run(async {
        let lab = Lab::new();
        lab.raw("src", 4 * MIB);
        lab.fill("src", 0, &vec![1; 4 << 20]).await;
        lab.qcow2("dst", 4 * MIB, "", Some("src")).await;
        let start = backup(&lab.jobs, &lab.graph, fleecing(BackupSync::None)).unwrap();
        let job = start.begin(&lab.jobs).await.unwrap();
        // It writes some of it, and stays as an export that could write more.
        let mut guest = Guest::start(&lab.graph, "src", vec![1; 4 << 20], 1, 1);
        busy(&guest, 20).await;
        guest.stop();
        let guest_model = guest.model();
        let saved = guest_model.chunks(64 << 10);
        let saved: Vec<bool> = saved.map(|piece| piece.iter().any(|b| *b != 1)).collect();
        let mut reader = Guest::reading(&lab.graph, "dst", vec![1; 4 << 20], 1, 1);
        busy(&reader, 20).await;
        // It goes on as an export that nobody reads.
        reader.stop();
        cancel(&job).await;
        for (piece, saved) in (0..).zip(&saved) {
            let node = lab.graph.get("dst").unwrap();
            let (at, len) = (piece * 64 * KIB, 64 * KIB);
            let found = read(&*node, at, len).await;
            let status = node.block_status(at, len).await.unwrap();
            assert!(!status.zero);
            match (saved, found) {
                (true, found) => assert_same(&found.unwrap(), &vec![1; 64 << 10], "saved"),
                (false, Ok(found)) => {
                    // The guest may have written ones to what looks untouched.
                    assert_same(&found, &vec![1; 64 << 10], "saved");
                }
                (false, Err(error)) => {
                    assert_eq!(error.errno(), libc::EIO);
                    let words = "were not saved before block job 'f' ended";
                    assert!(error.to_string().contains(words), "{error}");
                }
            }
        }
        drop(reader);
        remove(&lab).await;
    });
}

#[test]
fn nobody_who_writes_below_means_that_the_overlay_stays_whole() {
    run(async {
        let lab = Lab::new();
        lab.raw("src", 4 * MIB);
        lab.fill("src", 0, &vec![1; 4 << 20]).await;
        lab.qcow2("dst", 4 * MIB, "", Some("src")).await;
        let start = backup(&lab.jobs, &lab.graph, fleecing(BackupSync::None)).unwrap();
        let job = start.begin(&lab.jobs).await.unwrap();
        lab.fill("src", MIB, &vec![2; 4096]).await;
        let mut reader = Guest::reading(&lab.graph, "dst", vec![1; 4 << 20], 1, 1);
        cancel(&job).await;
        busy(&reader, 50).await;
        reader.stop();
        assert_same(&lab.contents("dst").await, &vec![1; 4 << 20], "the overlay");
        drop(reader);
        remove(&lab).await;
    });
}

#[test]
fn a_write_that_went_first_is_an_error_to_who_reads_there() {
    run(async {
        let lab = Lab::new();
        lab.raw("src", 4 * MIB);
        lab.fill("src", 0, &vec![1; 4 << 20]).await;
        let faulty = overlay_on_a_faulty_file(&lab).await;
        let config = BackupConfig {
            on_cbw_error: OnCbwError::BreakSnapshot,
            ..fleecing(BackupSync::None)
        };
        let start = backup(&lab.jobs, &lab.graph, config).unwrap();
        let job = start.begin(&lab.jobs).await.unwrap();
        reaches(&job, &[Status::Running]).await;
        lab.fill("src", 0, &vec![2; 4096]).await;
        faulty.write_errno.store(libc::EIO, SeqCst);
        // The place of the first cluster is known; the others need one.
        lab.fill("src", MIB, &vec![2; 4096]).await;
        // Also later, and though nobody read it then.
        for over in [false, true] {
            if over {
                job.over().await.unwrap_err();
            }
            let node = lab.graph.get("dst").unwrap();
            let errno = read(&*node, MIB, 4 * KIB)
                .await
                .map_or_else(|e| e.errno(), |_| 0);
            assert_eq!(errno, libc::EIO, "{over}");
            let saved = read(&*node, 0, 64 * KIB).await.unwrap();
            assert_same(&saved, &vec![1; 64 << 10], "what was saved");
        }
        faulty.write_errno.store(0, SeqCst);
    });
}

/// `dst` above `src`, in a file whose writes can be made to fail.
async fn overlay_on_a_faulty_file(lab: &Lab) -> Arc<Faulty> {
    lab.qcow2("made", 4 * MIB, "", Some("src")).await;
    let path = lab.path("made.qcow2");
    lab.graph.get("made").unwrap().close().await.unwrap();
    lab.graph.remove("made").unwrap();
    lab.graph.remove("made-file").unwrap();
    let faulty = Faulty::new(open_raw_file(&path));
    let file: Arc<Faulty> = Arc::clone(&faulty);
    lab.graph.insert(Some("dst-file"), file, &[]).unwrap();
    let children = Children {
        file: lab.graph.get("dst-file").unwrap(),
        data_file: None,
        backing: Some(lab.graph.get("src").unwrap()),
    };
    let config = Qcow2Config::default();
    let node = Qcow2Node::open(children, &config).await.unwrap();
    let edges = [("dst-file", ChildRole::File), ("src", ChildRole::Backing)];
    lab.graph.insert_above(Some("dst"), node, &edges).unwrap();
    faulty
}

#[test]
fn nobody_else_writes_the_overlay_or_changes_a_size() {
    run(async {
        let lab = Lab::new();
        lab.raw("src", 4 * MIB);
        lab.qcow2("dst", 4 * MIB, "", Some("src")).await;
        let start = backup(&lab.jobs, &lab.graph, fleecing(BackupSync::None)).unwrap();
        let job = start.begin(&lab.jobs).await.unwrap();
        for (name, perm) in [
            ("dst", diskfuse_block::Permissions::WRITE),
            ("src", diskfuse_block::Permissions::RESIZE),
        ] {
            let user = diskfuse_block::graph::User {
                name: "export 'other'".to_owned(),
                perm,
                shared: diskfuse_block::Permissions::ALL,
                drain: None,
                follows: true,
            };
            let error = match name {
                "src" => {
                    // Somebody reads the overlay.
                    let reader = Guest::reading(&lab.graph, "dst", vec![0; 4 << 20], 1, 1);
                    let error = lab.graph.attach(name, user).unwrap_err();
                    drop(reader);
                    error
                }
                _ => lab.graph.attach(name, user).unwrap_err(),
            };
            assert_eq!(error.kind(), Kind::Busy, "{error}");
        }
        cancel(&job).await;
        remove(&lab).await;
    });
}
