//! Mirrors of disks that are written meanwhile: the copy becomes the same, takes the place of the disk without a request
//! lost, or stays as it was at one moment.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use diskfuse_block::drivers::{RawConfig, ThrottleGroup, ThrottleLimits, open_raw, open_throttle};
use diskfuse_block::{Kind, Resize, Zeroes};
use diskfuse_jobs::{
    CopyMode, Job, JobConfig, JobEvent, MirrorConfig, MirrorSync, OnError, Status, mirror,
};
use diskfuse_ring::{JoinHandle, sleep, spawn};
use support::faulty::Faulty;
use support::guest::Guest;
use support::rng::Rng;
use support::{
    KIB, Lab, MIB, assert_same, begin_mirror as begin, busy, cases, open_raw_file, reaches, run,
    scatter,
};

/// `src` and `dst`, of which the latter may hold anything.
async fn disks(lab: &Lab, rng: &mut Rng, size: u64) -> Vec<u8> {
    match rng.chance(50) {
        true => lab.raw("src", size),
        false => lab.qcow2("src", size, "cluster_size=4096", None).await,
    }
    scatter(lab, rng, "src", size).await;
    match rng.chance(50) {
        true => lab.raw("dst", size),
        false => lab.qcow2("dst", size, "", None).await,
    }
    if rng.chance(40) {
        scatter(lab, rng, "dst", size).await;
    }
    lab.contents("src").await
}

/// Drains one of the nodes again and again, as somebody would who changes the graph, until the job is over.
fn disturb(lab: &Lab, job: &Arc<Job>, node: &'static str) -> JoinHandle<u64> {
    let (graph, job) = (lab.graph.clone(), Arc::clone(job));
    spawn(async move {
        let mut drains = 0;
        while !job.status().is_over() {
            let drained = graph.drain(node).await.unwrap();
            sleep(Duration::from_millis(2)).await;
            drop(drained);
            drains += 1;
            sleep(Duration::from_millis(10)).await;
        }
        drains
    })
}

fn random_config(rng: &mut Rng) -> MirrorConfig {
    MirrorConfig {
        copy_mode: rng.pick(&[CopyMode::Background, CopyMode::WriteBlocking]),
        granularity: rng.pick(&[None, Some(4 * KIB), Some(256 * KIB)]),
        ..MirrorConfig::new(JobConfig::new("m"), "src", "dst")
    }
}

#[test]
fn the_copy_takes_the_place_of_the_disk_under_load() {
    cases::run("mirror", 8, |seed| {
        run(async {
            let mut rng = Rng::new(seed);
            let size = rng.within(3..20) * MIB + rng.below(64) * 4 * KIB;
            let lab = Lab::new();
            let model = disks(&lab, &mut rng, size).await;
            let mut guest = Guest::start(&lab.graph, "src", model, 2, seed);
            let mut config = random_config(&mut rng);
            if rng.chance(30) {
                config.job.speed = 8 * MIB;
            }
            let job = begin(&lab, config).await;
            let disturbed = match rng.below(3) {
                0 => None,
                1 => Some(disturb(&lab, &job, "src")),
                _ => Some(disturb(&lab, &job, "dst")),
            };
            busy(&guest, 20).await;
            if rng.chance(30) && job.pause().is_ok() {
                busy(&guest, 50).await;
                job.resume().unwrap();
            }
            // The guest may be faster than that.
            let _ = job.set_speed(0);
            reaches(&job, &[Status::Ready]).await;
            busy(&guest, 100).await;
            job.complete().unwrap();
            job.over().await.unwrap();
            if let Some(disturbed) = disturbed {
                assert!(disturbed.await > 0);
            }
            assert_eq!(guest.node(), "dst");
            let frozen = lab.contents("src").await;
            busy(&guest, 100).await;
            guest.stop();
            assert_same(&lab.contents("dst").await, &guest.model(), "the copy");
            assert_same(
                &lab.contents("src").await,
                &frozen,
                "the disk that was left",
            );
            let told = lab.told();
            let tail = ["waiting", "pending", "COMPLETED", "concluded"];
            assert_eq!(told.iter().filter(|e| *e == "READY").count(), 1);
            assert!(told.windows(4).any(|w| w == tail), "{told:?}");
            drop(guest);
            lab.graph.remove("src").unwrap();
        });
    });
}

#[test]
fn a_mirror_that_is_left_is_what_the_disk_was_at_one_moment() {
    cases::run("leave", 6, |seed| {
        run(async {
            let mut rng = Rng::new(seed);
            let size = 8 * MIB;
            let lab = Lab::new();
            let model = disks(&lab, &mut rng, size).await;
            let mut guest = Guest::start(&lab.graph, "src", model, 2, seed);
            let job = begin(&lab, random_config(&mut rng)).await;
            reaches(&job, &[Status::Ready]).await;
            busy(&guest, 50).await;
            let (during, at) = match rng.chance(50) {
                true => (true, Vec::new()),
                false => {
                    guest.stop();
                    (false, guest.model())
                }
            };
            job.cancel(false).unwrap();
            job.over().await.unwrap();
            let copy = lab.contents("dst").await;
            if during {
                busy(&guest, 50).await;
                guest.stop();
                assert_same(&lab.contents("dst").await, &copy, "the copy later");
            } else {
                assert_same(&copy, &at, "the copy");
            }
            assert_eq!(guest.node(), "src");
            assert_same(&lab.contents("src").await, &guest.model(), "the disk");
            assert!(lab.told().contains(&"COMPLETED".to_owned()));
        });
    });
}

#[test]
fn a_mirror_can_be_given_up_at_any_time() {
    cases::run("give up", 6, |seed| {
        run(async {
            let mut rng = Rng::new(seed);
            let lab = Lab::new();
            let model = disks(&lab, &mut rng, 8 * MIB).await;
            let mut guest = Guest::start(&lab.graph, "src", model, 2, seed);
            let job = begin(&lab, random_config(&mut rng)).await;
            busy(&guest, rng.below(200)).await;
            job.cancel(true).unwrap();
            assert_eq!(job.over().await.unwrap_err(), "Operation canceled");
            busy(&guest, 50).await;
            guest.stop();
            assert_same(&lab.contents("src").await, &guest.model(), "the disk");
            assert!(lab.told().contains(&"CANCELLED".to_owned()));
            drop(guest);
            lab.graph.remove("dst").unwrap();
        });
    });
}

#[test]
fn a_ready_mirror_pauses_to_standby() {
    run(async {
        let lab = Lab::new();
        lab.raw("src", MIB);
        lab.raw("dst", MIB);
        let job = begin(&lab, MirrorConfig::new(JobConfig::new("m"), "src", "dst")).await;
        reaches(&job, &[Status::Ready]).await;
        job.pause().unwrap();
        reaches(&job, &[Status::Standby]).await;
        // As QEMU: it is completed when it is resumed.
        job.complete().unwrap();
        sleep(Duration::from_millis(100)).await;
        assert_eq!(job.status(), Status::Standby);
        job.resume().unwrap();
        job.over().await.unwrap();
        let expected = [
            "created",
            "running",
            "ready",
            "READY",
            "standby",
            "ready",
            "waiting",
            "pending",
            "COMPLETED",
            "concluded",
        ];
        assert_eq!(lab.told()[..10], expected);
    });
}

#[test]
fn the_size_cannot_change_under_a_mirror() {
    run(async {
        let lab = Lab::new();
        lab.raw("src", MIB);
        lab.raw("dst", MIB);
        let job = begin(&lab, MirrorConfig::new(JobConfig::new("m"), "src", "dst")).await;
        let node = lab.graph.get("src").unwrap();
        let error = node
            .resize(2 * MIB, Resize::Exactly, false)
            .await
            .unwrap_err();
        assert_eq!(error.kind(), Kind::Busy);
        node.resize(MIB, Resize::Exactly, false).await.unwrap();
        reaches(&job, &[Status::Ready]).await;
        job.complete().unwrap();
        job.over().await.unwrap();
    });
}

#[test]
fn what_grows_before_the_job_begins_is_not_mirrored_into_what_is_too_small() {
    run(async {
        let lab = Lab::new();
        lab.raw("src", MIB);
        lab.raw("dst", MIB);
        let config = MirrorConfig::new(JobConfig::new("m"), "src", "dst");
        let start = mirror(&lab.jobs, &lab.graph, config.clone()).unwrap();
        let node = lab.graph.get("src").unwrap();
        node.resize(MIB + 4 * KIB, Resize::AtLeast, false)
            .await
            .unwrap();
        lab.fill("src", MIB, &[7; 4096]).await;
        let error = start.begin(&lab.jobs).await.unwrap_err();
        let words = "Source and target image have different sizes";
        assert_eq!(error.to_string(), words);
        // It is in nobody's way now.
        let node = lab.graph.get("src").unwrap();
        node.resize(2 * MIB, Resize::AtLeast, false).await.unwrap();
        let target = lab.graph.get("dst").unwrap();
        target
            .resize(2 * MIB, Resize::AtLeast, false)
            .await
            .unwrap();
        let job = begin(&lab, config).await;
        reaches(&job, &[Status::Ready]).await;
        job.complete().unwrap();
        job.over().await.unwrap();
        let model = lab.contents("src").await;
        assert_eq!(model[MIB as usize..][..4096], [7; 4096]);
        assert_same(&lab.contents("dst").await, &model, "the copy");
    });
}

/// A filter above `src`.
fn add_filter(lab: &Lab) {
    let group = ThrottleGroup::new(ThrottleLimits::default());
    let filter = open_throttle(lab.graph.get("src").unwrap(), &group, false);
    lab.graph.insert(Some("filter"), filter, &["src"]).unwrap();
}

#[test]
fn the_copy_takes_the_place_of_the_node_that_is_named() {
    for (source, replaces, at) in [("filter", "src", "filter"), ("src", "filter", "dst")] {
        run(async {
            let lab = Lab::new();
            let size = 4 * MIB;
            lab.raw("src", size);
            lab.raw("dst", size);
            add_filter(&lab);
            let model = vec![0; size as usize];
            let mut guest = Guest::start(&lab.graph, "filter", model, 2, 5);
            let config = MirrorConfig {
                replaces: Some(replaces.to_owned()),
                ..MirrorConfig::new(JobConfig::new("m"), source, "dst")
            };
            let job = begin(&lab, config).await;
            reaches(&job, &[Status::Ready]).await;
            busy(&guest, 50).await;
            job.complete().unwrap();
            job.over().await.unwrap();
            assert_eq!(guest.node(), at);
            busy(&guest, 50).await;
            guest.stop();
            assert_same(&lab.contents("dst").await, &guest.model(), "the copy");
            drop(guest);
            if at == "filter" {
                assert_eq!(lab.graph.children("filter").unwrap(), ["dst"]);
                lab.graph.remove("src").unwrap();
            }
        });
    }
}

#[test]
fn a_node_that_shows_something_else_is_not_replaced() {
    run(async {
        let lab = Lab::new();
        for name in ["src", "dst", "other"] {
            lab.raw(name, MIB);
        }
        lab.raw("half", MIB / 2);
        let config = RawConfig {
            size: Some(MIB / 2),
            ..RawConfig::default()
        };
        let part = open_raw(lab.graph.get("src").unwrap(), &config).unwrap();
        lab.graph.insert(Some("part"), part, &["src"]).unwrap();
        for (source, target, replaces, expected) in [
            (
                "src",
                "dst",
                "none",
                "Failed to find node with node-name='none'",
            ),
            (
                "src",
                "dst",
                "other",
                "Cannot replace 'other' by a node mirrored from 'src', because it cannot be guaranteed that doing so would not lead to an abrupt change of visible data",
            ),
            (
                "part",
                "half",
                "src",
                "cannot replace image with a mirror image of different size",
            ),
        ] {
            let config = MirrorConfig {
                replaces: Some(replaces.to_owned()),
                ..MirrorConfig::new(JobConfig::new("m"), source, target)
            };
            let error = mirror(&lab.jobs, &lab.graph, config).unwrap_err();
            assert_eq!(error.to_string(), expected);
        }
        assert!(lab.jobs.list().is_empty());
    });
}

#[test]
fn top_and_none_copy_what_they_say() {
    run(async {
        for sync in [MirrorSync::Top, MirrorSync::None] {
            let lab = Lab::new();
            let size = 4 * MIB;
            lab.raw("base", size);
            lab.fill("base", 0, &vec![1; size as usize]).await;
            lab.qcow2("src", size, "", Some("base")).await;
            lab.fill("src", MIB, &vec![2; 65536]).await;
            lab.qcow2("dst", size, "", Some("base")).await;
            let config = MirrorConfig {
                sync,
                ..MirrorConfig::new(JobConfig::new("m"), "src", "dst")
            };
            let job = begin(&lab, config).await;
            reaches(&job, &[Status::Ready]).await;
            lab.fill("src", 3 * MIB, &vec![3; 65536]).await;
            job.cancel(false).unwrap();
            job.over().await.unwrap();
            let mut expected = lab.contents("src").await;
            if sync == MirrorSync::None {
                expected[1 << 20..(1 << 20) + 65536].fill(1);
            }
            assert_same(&lab.contents("dst").await, &expected, "the copy");
            assert!(lab.graph.get("dst").unwrap().allocated() < MIB);
        }
    });
}

#[test]
fn a_target_that_fails_does_not_harm_the_guest() {
    run(async {
        for mode in [CopyMode::Background, CopyMode::WriteBlocking] {
            let lab = Lab::new();
            let size = 4 * MIB;
            lab.raw("src", size);
            std::fs::File::create(lab.path("dst.img"))
                .unwrap()
                .set_len(size)
                .unwrap();
            let faulty = Faulty::new(open_raw_file(&lab.path("dst.img")));
            lab.graph
                .insert(Some("dst"), Arc::<Faulty>::clone(&faulty), &[])
                .unwrap();
            let mut guest = Guest::start(&lab.graph, "src", vec![0; size as usize], 2, 3);
            let config = MirrorConfig {
                copy_mode: mode,
                on_target_error: OnError::Stop,
                ..MirrorConfig::new(JobConfig::new("m"), "src", "dst")
            };
            let job = begin(&lab, config).await;
            reaches(&job, &[Status::Ready]).await;
            faulty.write_errno.store(libc::EIO, SeqCst);
            reaches(&job, &[Status::Standby]).await;
            busy(&guest, 50).await;
            faulty.write_errno.store(0, SeqCst);
            job.complete().unwrap();
            while !job.status().is_over() {
                // What was in flight may have failed once more.
                let _ = job.resume();
                sleep(Duration::from_millis(1)).await;
            }
            job.over().await.unwrap();
            busy(&guest, 50).await;
            guest.stop();
            assert_same(&lab.contents("dst").await, &guest.model(), "the copy");
        }
    });
}

#[test]
fn a_target_that_fails_for_good_fails_the_job() {
    run(async {
        let lab = Lab::new();
        lab.raw("src", MIB);
        lab.fill("src", 0, &[1; 4096]).await;
        lab.raw("below", MIB);
        let faulty = Faulty::new(lab.graph.get("below").unwrap());
        faulty.write_errno.store(libc::EIO, SeqCst);
        lab.graph.insert(Some("dst"), faulty, &["below"]).unwrap();
        let job = begin(&lab, MirrorConfig::new(JobConfig::new("m"), "src", "dst")).await;
        let error = job.over().await.unwrap_err();
        assert_eq!(error, "Input/output error (faulty)");
        let mut guest = Guest::start(&lab.graph, "src", lab.contents("src").await, 1, 1);
        busy(&guest, 10).await;
        guest.stop();
    });
}

/// A target that is opened without the backing file that it gets later, whether it names it or not: zeroes of the source's topmost image are held by it, those that were
/// there and those that a guest writes meanwhile.
#[test]
fn zeroes_stay_when_the_target_gets_its_backing_file() {
    run(async {
        for (copy_mode, below) in [
            (CopyMode::Background, Some("base")),
            (CopyMode::Background, None),
            (CopyMode::WriteBlocking, None),
        ] {
            let lab = Lab::new();
            let size = 4 * MIB;
            lab.raw("base", size);
            lab.fill("base", 0, &vec![1; size as usize]).await;
            lab.qcow2("src", size, "", Some("base")).await;
            let src = lab.graph.get("src").unwrap();
            src.write_zeroes(MIB, MIB, Zeroes::MayUnmap).await.unwrap();
            lab.qcow2("dst", size, "", below).await;
            let path = lab.path("dst.qcow2");
            close(&lab, "dst").await;
            lab.open_qcow2("alone", &path, None).await;
            let config = MirrorConfig {
                sync: MirrorSync::Top,
                copy_mode,
                ..MirrorConfig::new(JobConfig::new("m"), "src", "alone")
            };
            let job = begin(&lab, config).await;
            reaches(&job, &[Status::Ready]).await;
            let src = lab.graph.get("src").unwrap();
            src.write_zeroes(3 * MIB, 65536, Zeroes::MayUnmap)
                .await
                .unwrap();
            let expected = lab.contents("src").await;
            // Without a pivot the target is what the source was.
            job.cancel(false).unwrap();
            job.over().await.unwrap();
            close(&lab, "alone").await;
            lab.open_qcow2("whole", &path, Some("base")).await;
            assert_same(&lab.contents("whole").await, &expected, "the mirror");
        }
    });
}

async fn close(lab: &Lab, name: &str) {
    lab.graph.get(name).unwrap().close().await.unwrap();
    lab.graph.remove(name).unwrap();
    lab.graph.remove(&format!("{name}-file")).unwrap();
}

/// A ready mirror that a client has let go cannot be completed, so nobody believes that the copy has taken the place of the
/// disk; one that was completed first does take it.
#[test]
fn what_was_said_first_of_a_ready_mirror_counts() {
    run(async {
        for (complete_first, force) in [(false, false), (false, true), (true, false)] {
            let lab = Lab::new();
            lab.raw("src", MIB);
            lab.raw("dst", MIB);
            let config = MirrorConfig::new(
                JobConfig {
                    auto_dismiss: false,
                    ..JobConfig::new("m")
                },
                "src",
                "dst",
            );
            let job = begin(&lab, config).await;
            reaches(&job, &[Status::Ready]).await;
            if complete_first {
                job.complete().unwrap();
                // Accepted, if it comes in time, and without effect.
                let _ = job.cancel(force);
                job.over().await.unwrap();
            } else {
                job.cancel(force).unwrap();
                let error = job.complete().unwrap_err().to_string();
                // The job may have gone on by then.
                let refused = error == "The active block job 'm' cannot be completed"
                    || error.ends_with("cannot accept command verb 'complete'");
                assert!(refused, "{error}");
                assert_eq!(job.over().await.is_ok(), !force);
            }
            let completed = lab.told().contains(&"COMPLETED".to_owned());
            assert_eq!(completed, !force);
        }
    });
}

/// A piece that met an error is copied before the mirror says that it is ready, and then all that there was is done.
#[test]
fn a_mirror_is_ready_when_what_failed_was_copied() {
    run(async {
        let lab = Lab::new();
        let size = 2 * MIB;
        lab.raw("src", size);
        lab.fill("src", 0, &vec![5; size as usize]).await;
        lab.raw("below", size);
        let faulty = Faulty::new(lab.graph.get("below").unwrap());
        faulty.write_errno.store(libc::ENOSPC, SeqCst);
        lab.graph
            .insert(Some("dst"), Arc::<Faulty>::clone(&faulty), &["below"])
            .unwrap();
        let config = MirrorConfig {
            on_target_error: OnError::Enospc,
            ..MirrorConfig::new(JobConfig::new("m"), "src", "dst")
        };
        let job = begin(&lab, config).await;
        reaches(&job, &[Status::Paused]).await;
        faulty.write_errno.store(0, SeqCst);
        job.resume().unwrap();
        reaches(&job, &[Status::Ready]).await;
        assert_eq!(faulty.written.load(SeqCst), size);
        let events = lab.events.lock().unwrap().clone();
        let ready = events.iter().find_map(|event| match event {
            JobEvent::Ready(data) => Some((data.offset, data.len)),
            _ => None,
        });
        assert_eq!(ready, Some((size, size)));
        job.cancel(true).unwrap();
        job.over().await.unwrap_err();
    });
}
