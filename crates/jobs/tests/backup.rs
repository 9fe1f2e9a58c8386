//! Backups of disks that are written meanwhile: the copy is what the disk was when the job began, to the byte.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use diskfuse_block::bitmap::Recorder;
use diskfuse_block::drivers::{ThrottleGroup, ThrottleLimits, open_throttle};
use diskfuse_block::graph::Change;
use diskfuse_block::{DirtyBitmap, Resize, Zeroes};
use diskfuse_jobs::{
    BackupConfig, BackupSync, BitmapMode, Job, JobConfig, OnCbwError, OnError, Status, backup,
};
use support::faulty::Faulty;
use support::guest::Guest;
use support::rng::Rng;
use support::{
    KIB, Lab, MIB, assert_same, begin_backup as begin, busy, cases, must, open_raw_file, reaches,
    run,
};

/// A disk with data and holes.
async fn source(lab: &Lab, rng: &mut Rng, size: u64) -> Vec<u8> {
    match rng.below(3) {
        0 => lab.raw("src", size),
        1 => lab.qcow2("src", size, "cluster_size=4096", None).await,
        _ => {
            lab.raw("base", size);
            scatter(lab, rng, "base", size).await;
            lab.qcow2("src", size, "", Some("base")).await;
        }
    }
    scatter(lab, rng, "src", size).await;
    lab.contents("src").await
}

async fn scatter(lab: &Lab, rng: &mut Rng, name: &str, size: u64) {
    for _ in 0..12 {
        let len = rng.length(512, size / 8);
        let at = rng.below((size - len) / 512 + 1) * 512;
        let mut bytes = vec![0; len as usize];
        rng.fill(&mut bytes);
        lab.fill(name, at, &bytes).await;
    }
}

#[test]
fn a_backup_is_what_the_disk_was_when_it_began() {
    cases::run("backup", 8, |seed| {
        run(async {
            let mut rng = Rng::new(seed);
            let size = rng.within(3..20) * MIB + rng.below(64) * 4 * KIB;
            let lab = Lab::new();
            let model = source(&lab, &mut rng, size).await;
            match rng.chance(50) {
                true => lab.raw("dst", size),
                false => lab.qcow2("dst", size, "", None).await,
            }
            if rng.chance(30) {
                scatter(&lab, &mut rng, "dst", size).await;
            }
            let mut guest = Guest::start(&lab.graph, "src", model, 2, seed);
            busy(&guest, 50).await;
            let mut config = BackupConfig::new(JobConfig::new("b"), "src", "dst");
            if rng.chance(50) {
                // So slow that most is copied because of the guest.
                config.job.speed = 4 * MIB;
            }
            let (job, expected) = begin(&lab, &guest, config).await;
            busy(&guest, 200).await;
            if rng.chance(50) && job.pause().is_ok() {
                busy(&guest, 100).await;
                // It may have been done before it could pause.
                let _ = job.resume();
            }
            let _ = job.set_speed(0);
            job.over().await.unwrap();
            busy(&guest, 50).await;
            guest.stop();
            assert_same(&lab.contents("dst").await, &expected, "the backup");
            assert_same(&lab.contents("src").await, &guest.model(), "the disk");
        });
    });
}

#[test]
fn zeroes_are_not_written_to_a_fresh_target() {
    run(async {
        let lab = Lab::new();
        lab.qcow2("src", 64 * MIB, "", None).await;
        lab.fill("src", 20 * MIB, &vec![5; 1 << 20]).await;
        lab.qcow2("dst", 64 * MIB, "", None).await;
        let config = BackupConfig::new(JobConfig::new("b"), "src", "dst");
        let start = backup(&lab.jobs, &lab.graph, config).unwrap();
        start.begin(&lab.jobs).await.unwrap().over().await.unwrap();
        let allocated = lab.graph.get("dst").unwrap().allocated();
        assert!(allocated < 2 * MIB, "{allocated}");
        assert_same(
            &lab.contents("dst").await,
            &lab.contents("src").await,
            "the backup",
        );
        lab.assert_sound("dst").await;
    });
}

#[test]
fn top_copies_what_the_overlay_holds_itself() {
    run(async {
        let lab = Lab::new();
        let size = 8 * MIB;
        lab.raw("base", size);
        lab.fill("base", 0, &vec![1; size as usize]).await;
        lab.qcow2("src", size, "cluster_size=4096", Some("base"))
            .await;
        lab.fill("src", MIB + 4096, &[2; 4096]).await;
        lab.fill("src", 5 * MIB, &vec![3; 300_032]).await;
        lab.qcow2("dst", size, "", Some("base")).await;
        let config = BackupConfig {
            sync: BackupSync::Top,
            ..BackupConfig::new(JobConfig::new("b"), "src", "dst")
        };
        let start = backup(&lab.jobs, &lab.graph, config).unwrap();
        let job = start.begin(&lab.jobs).await.unwrap();
        job.over().await.unwrap();
        assert_same(
            &lab.contents("dst").await,
            &lab.contents("src").await,
            "the backup",
        );
        let allocated = lab.graph.get("dst").unwrap().allocated();
        assert!(allocated < MIB, "{allocated}");
    });
}

/// A target that names its backing file and is opened without, as it is usual: what became zero is held by it, and not only shown
/// for as long as nothing is below.
#[test]
fn zeroes_stay_when_the_target_gets_its_backing_file() {
    run(async {
        for options in ["", "compat=0.10", "extended_l2=on", "cluster_size=4096"] {
            // Also one that does not name it yet.
            for (sync, below) in [
                (BackupSync::Top, Some("base")),
                (BackupSync::Bitmap, Some("base")),
                (BackupSync::Bitmap, None),
            ] {
                let lab = Lab::new();
                let size = 4 * MIB + 4096;
                lab.raw("base", size);
                lab.fill("base", 0, &vec![1; size as usize]).await;
                lab.qcow2("src", size, "", Some("base")).await;
                let bitmap = record(&lab).await;
                let src = lab.graph.get("src").unwrap();
                src.write_zeroes(MIB, MIB, Zeroes::MayUnmap).await.unwrap();
                src.write_zeroes(3 * MIB + 512, 1024, Zeroes::Keep)
                    .await
                    .unwrap();
                src.write_zeroes(4 * MIB, 4096, Zeroes::MayUnmap)
                    .await
                    .unwrap();
                lab.fill("src", 2 * MIB, &[2; 4096]).await;
                lab.qcow2("dst", size, options, below).await;
                let path = lab.path("dst.qcow2");
                close(&lab, "dst").await;
                lab.open_qcow2("alone", &path, None).await;
                let bitmap = (sync == BackupSync::Bitmap).then_some(bitmap);
                let config = BackupConfig {
                    sync,
                    bitmap: bitmap.map(|bitmap| (bitmap, BitmapMode::OnSuccess)),
                    ..BackupConfig::new(JobConfig::new("b"), "src", "alone")
                };
                let start = backup(&lab.jobs, &lab.graph, config).unwrap();
                start.begin(&lab.jobs).await.unwrap().over().await.unwrap();
                close(&lab, "alone").await;
                lab.open_qcow2("whole", &path, Some("base")).await;
                let (shown, expected) = (lab.contents("whole").await, lab.contents("src").await);
                assert_same(&shown, &expected, &format!("the backup, {options}"));
            }
        }
    });
}

/// What a guest does to an image that names a backing file and is opened without one stays when it has it.
#[test]
fn what_a_guest_zeroes_stays_when_the_disk_gets_its_backing_file() {
    run(async {
        for options in ["", "extended_l2=on", "cluster_size=4096"] {
            let lab = Lab::new();
            lab.raw("base", 8 * MIB);
            lab.fill("base", 0, &vec![1; 8 << 20]).await;
            lab.qcow2("disk", 4 * MIB, options, Some("base")).await;
            close(&lab, "disk").await;
            let path = lab.path("disk.qcow2");
            lab.open_qcow2("alone", &path, None).await;
            let node = lab.graph.get("alone").unwrap();
            lab.fill("alone", 0, &vec![2; 1 << 20]).await;
            node.discard(0, 512 << 10).await.unwrap();
            node.write_zeroes(2 * MIB, MIB, Zeroes::MayUnmap)
                .await
                .unwrap();
            node.resize(8 * MIB, Resize::Exactly, false).await.unwrap();
            close(&lab, "alone").await;
            lab.open_qcow2("whole", &path, Some("base")).await;
            let mut expected = vec![1; 8 << 20];
            for (range, byte) in [(0..1, 0), (1..2, 2), (4..6, 0), (8..16, 0)] {
                expected[range.start << 19..range.end << 19].fill(byte);
            }
            assert_same(&lab.contents("whole").await, &expected, options);
            lab.graph.get("whole").unwrap().close().await.unwrap();
            let checked = ["check", "-U", "-f", "qcow2", path.to_str().unwrap()];
            must("qemu-img", &checked);
        }
    });
}

async fn close(lab: &Lab, name: &str) {
    lab.graph.get(name).unwrap().close().await.unwrap();
    lab.graph.remove(name).unwrap();
    lab.graph.remove(&format!("{name}-file")).unwrap();
}

/// A bitmap around `src` that notes what is written.
async fn record(lab: &Lab) -> Arc<DirtyBitmap> {
    record_at(lab, "src").await
}

async fn record_at(lab: &Lab, node: &str) -> Arc<DirtyBitmap> {
    let size = lab.graph.get(node).unwrap().size();
    let bitmap = Arc::new(DirtyBitmap::new(size, 64 * KIB).unwrap());
    let _drained = lab.graph.drain(node).await.unwrap();
    let change = Change::Wrap {
        node: node.to_owned(),
        wrap: Arc::new(Recorder(Arc::clone(&bitmap))),
    };
    lab.graph.change(&[change]).unwrap();
    bitmap
}

#[test]
fn incremental_backups_on_top_of_each_other_are_the_disk() {
    cases::run("incremental", 4, |seed| {
        run(async {
            let mut rng = Rng::new(seed);
            let size = 12 * MIB;
            let lab = Lab::new();
            let model = source(&lab, &mut rng, size).await;
            lab.raw("dst", size);
            let mut guest = Guest::start(&lab.graph, "src", model, 2, seed);
            let bitmap = record(&lab).await;
            let config = BackupConfig {
                bitmap: Some((Arc::clone(&bitmap), BitmapMode::OnSuccess)),
                ..BackupConfig::new(JobConfig::new("full"), "src", "dst")
            };
            let (job, mut expected) = begin(&lab, &guest, config).await;
            job.over().await.unwrap();
            for round in 0..3 {
                busy(&guest, 30).await;
                let mut config = BackupConfig {
                    sync: BackupSync::Bitmap,
                    bitmap: Some((Arc::clone(&bitmap), BitmapMode::OnSuccess)),
                    ..BackupConfig::new(JobConfig::new(format!("i{round}")), "src", "dst")
                };
                if round == 1 {
                    // One that is given up: what it should have copied must come with the next.
                    config.job.speed = 64 * KIB;
                    let (job, _) = begin(&lab, &guest, config).await;
                    let told = bitmap.info();
                    assert!(told.busy && told.count > 0);
                    busy(&guest, 30).await;
                    assert_eq!(bitmap.info().count, told.count);
                    let _ = job.cancel(true);
                    let _ = job.over().await;
                    continue;
                }
                let job;
                (job, expected) = begin(&lab, &guest, config).await;
                busy(&guest, 30).await;
                job.over().await.unwrap();
                assert!(!bitmap.info().busy);
            }
            guest.stop();
            assert_same(
                &lab.contents("dst").await,
                &expected,
                "the chain of backups",
            );
        });
    });
}

#[test]
fn what_grows_before_the_job_begins_is_not_cut_off() {
    run(async {
        let lab = Lab::new();
        lab.raw("src", MIB);
        lab.raw("dst", MIB);
        let bitmap = record(&lab).await;
        lab.fill("src", 0, &[1; 4096]).await;
        let config = BackupConfig {
            sync: BackupSync::Bitmap,
            bitmap: Some((Arc::clone(&bitmap), BitmapMode::Always)),
            ..BackupConfig::new(JobConfig::new("b"), "src", "dst")
        };
        let start = backup(&lab.jobs, &lab.graph, config).unwrap();
        let node = lab.graph.get("src").unwrap();
        node.resize(2 * MIB, Resize::AtLeast, false).await.unwrap();
        let error = start.begin(&lab.jobs).await.unwrap_err();
        let words = "Source and target image have different sizes";
        assert_eq!(error.to_string(), words);
        // Nothing of what the next one needs is gone, and nothing is in the way of the disk's users.
        assert!(!bitmap.info().busy && bitmap.is_dirty(0, 4096));
        lab.fill("src", MIB, &[2; 4096]).await;
        assert_eq!(lab.contents("dst").await, vec![0; MIB as usize]);
    });
}

#[test]
fn what_grows_below_the_node_of_a_bitmap_is_in_the_next_backup() {
    run(async {
        let lab = Lab::new();
        lab.raw("src", MIB);
        lab.raw("dst", 2 * MIB);
        let group = ThrottleGroup::new(ThrottleLimits::default());
        let filter = open_throttle(lab.graph.get("src").unwrap(), &group, false);
        lab.graph.insert(Some("filter"), filter, &["src"]).unwrap();
        let bitmap = record_at(&lab, "filter").await;
        let node = lab.graph.get("src").unwrap();
        node.resize(2 * MIB, Resize::AtLeast, false).await.unwrap();
        lab.fill("filter", MIB + MIB / 2, &[5; 4096]).await;
        let config = BackupConfig {
            sync: BackupSync::Bitmap,
            bitmap: Some((Arc::clone(&bitmap), BitmapMode::OnSuccess)),
            ..BackupConfig::new(JobConfig::new("b"), "filter", "dst")
        };
        let start = backup(&lab.jobs, &lab.graph, config).unwrap();
        let job = start.begin(&lab.jobs).await.unwrap();
        job.over().await.unwrap();
        let model = lab.contents("filter").await;
        assert_eq!(model.len() as u64, 2 * MIB);
        assert_same(&lab.contents("dst").await, &model, "the backup");
        assert_eq!(bitmap.dirty_bytes(), 0);
    });
}

#[test]
fn without_sync_only_what_is_overwritten_is_saved() {
    run(async {
        let lab = Lab::new();
        lab.raw("src", 4 * MIB);
        lab.fill("src", 0, &vec![1; 4 << 20]).await;
        lab.raw("dst", 4 * MIB);
        let config = BackupConfig {
            sync: BackupSync::None,
            ..BackupConfig::new(JobConfig::new("b"), "src", "dst")
        };
        let start = backup(&lab.jobs, &lab.graph, config).unwrap();
        let job = start.begin(&lab.jobs).await.unwrap();
        reaches(&job, &[Status::Running]).await;
        lab.fill("src", MIB + 512, &[2; 512]).await;
        job.cancel(true).unwrap();
        job.over().await.unwrap_err();
        let mut expected = vec![0; 4 << 20];
        expected[1 << 20..(1 << 20) + (64 << 10)].fill(1);
        assert_same(&lab.contents("dst").await, &expected, "what was saved");
    });
}

/// How many clusters of `name` are compressed.
fn compressed_clusters(lab: &Lab, name: &str) -> u64 {
    let path = lab.path(&format!("{name}.qcow2"));
    let path = path.to_str().unwrap();
    let check = ["check", "-U", "-f", "qcow2", "--output=json", path];
    let said = must("qemu-img", &check);
    let mut lines = said.lines();
    let line = lines.find(|line| line.contains("\"compressed-clusters\""));
    let number = line.and_then(|line| line.split(':').nth(1));
    number.map_or(0, |n| n.trim().trim_end_matches(',').parse().unwrap())
}

#[test]
fn a_compressed_backup_is_the_disk_and_small() {
    for (options, cluster) in [
        ("", 64 * KIB),
        ("cluster_size=4096", 4 * KIB),
        ("cluster_size=1M", MIB),
        ("extended_l2=on", 64 * KIB),
    ] {
        run(async {
            let mut rng = Rng::new(7);
            let size = 12 * MIB + 4 * KIB;
            let lab = Lab::new();
            lab.raw("src", size);
            lab.fill("src", 0, &vec![5; 5 << 20]).await;
            // Zeroes, data that get no smaller, and data in a part of a cluster.
            let mut noise = vec![0; 1 << 20];
            rng.fill(&mut noise);
            lab.fill("src", 8 * MIB, &noise).await;
            lab.fill("src", 10 * MIB + 8 * KIB, &[6; 4096]).await;
            lab.qcow2("dst", size, options, None).await;
            let model = lab.contents("src").await;
            let mut guest = Guest::start(&lab.graph, "src", model, 1, 1);
            let mut config = BackupConfig {
                compress: true,
                ..BackupConfig::new(JobConfig::new("b"), "src", "dst")
            };
            config.job.speed = 16 * MIB;
            let (job, expected) = begin(&lab, &guest, config).await;
            job.over().await.unwrap();
            guest.stop();
            assert_same(&lab.contents("dst").await, &expected, options);
            lab.assert_sound("dst").await;
            let compressed = compressed_clusters(&lab, "dst");
            assert!(compressed * cluster > 5 * MIB, "{options}: {compressed}");
        });
    }
}

#[test]
fn what_cannot_be_compressed_is_refused() {
    run(async {
        let lab = Lab::new();
        lab.raw("src", MIB);
        lab.raw("dst", MIB);
        let config = BackupConfig {
            compress: true,
            ..BackupConfig::new(JobConfig::new("b"), "src", "dst")
        };
        let error = backup(&lab.jobs, &lab.graph, config).unwrap_err();
        let words = "Compression is not supported for this drive dst";
        assert_eq!(error.to_string(), words);
    });
}

/// A slow backup to a target that fails.
async fn to_a_broken_target(lab: &Lab, on_cbw_error: OnCbwError) -> (Arc<Job>, Arc<Faulty>) {
    let size = 16 * MIB;
    lab.raw("src", size);
    lab.fill("src", 0, &vec![1; size as usize]).await;
    std::fs::File::create(lab.path("dst.img"))
        .unwrap()
        .set_len(size)
        .unwrap();
    let faulty = Faulty::new(open_raw_file(&lab.path("dst.img")));
    lab.graph
        .insert(Some("dst"), Arc::<Faulty>::clone(&faulty), &[])
        .unwrap();
    let mut config = BackupConfig {
        on_cbw_error,
        on_target_error: OnError::Ignore,
        ..BackupConfig::new(JobConfig::new("b"), "src", "dst")
    };
    config.job.speed = MIB;
    faulty.write_errno.store(libc::EIO, SeqCst);
    let start = backup(&lab.jobs, &lab.graph, config).unwrap();
    (start.begin(&lab.jobs).await.unwrap(), faulty)
}

#[test]
fn a_write_that_cannot_wait_for_its_copy_fails_and_the_backup_stays_whole() {
    run(async {
        let lab = Lab::new();
        let (job, faulty) = to_a_broken_target(&lab, OnCbwError::BreakGuestWrite).await;
        let size = 16 * MIB;
        let model = vec![1; size as usize];
        let mut guest = Guest::forgiving(&lab.graph, "src", model.clone(), 1, 1);
        busy(&guest, 30).await;
        assert!(guest.failures() > 0, "no write failed");
        faulty.write_errno.store(0, SeqCst);
        job.set_speed(0).unwrap();
        job.over().await.unwrap();
        guest.stop();
        assert_same(&lab.contents("dst").await, &model, "the backup");
        assert_same(&lab.contents("src").await, &guest.model(), "the disk");
    });
}

#[test]
fn or_the_write_is_made_and_the_backup_fails() {
    run(async {
        let lab = Lab::new();
        let (job, _faulty) = to_a_broken_target(&lab, OnCbwError::BreakSnapshot).await;
        let model = vec![1; 16 << 20];
        let mut guest = Guest::start(&lab.graph, "src", model, 1, 1);
        let error = job.over().await.unwrap_err();
        assert!(error.contains("faulty"), "{error}");
        busy(&guest, 30).await;
        guest.stop();
        assert_same(&lab.contents("src").await, &guest.model(), "the disk");
    });
}
