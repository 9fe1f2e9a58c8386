//! The life of a job: states, commands, events, speed, errors and transactions.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use diskfuse_block::{Error, Kind};
use diskfuse_jobs::{
    BackupConfig, IoStatus, Job, JobConfig, JobType, OnError, Status, Transaction, backup,
    run as run_job,
};
use diskfuse_ring::sleep;
use support::faulty::Faulty;
use support::{Lab, MIB, assert_same, open_raw_file, reaches, run};

fn by_hand(id: &str) -> JobConfig {
    JobConfig {
        auto_finalize: false,
        auto_dismiss: false,
        ..JobConfig::new(id)
    }
}

fn message<T>(result: diskfuse_block::Result<T>) -> String {
    match result {
        Ok(_) => panic!("it worked"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn a_create_job_goes_through_all_states_and_waits_to_be_dismissed() {
    run(async {
        let lab = Lab::new();
        let config = JobConfig {
            auto_dismiss: false,
            ..JobConfig::new("c0")
        };
        let work = || async {
            sleep(Duration::from_millis(5)).await;
            Ok(())
        };
        let job = run_job(&lab.jobs, JobType::Create, config, work).unwrap();
        job.over().await.unwrap();
        let expected = ["created", "running", "waiting", "pending", "concluded"];
        assert_eq!(lab.told(), expected);
        let info = lab.jobs.find("c0").unwrap().info();
        assert_eq!((info.current_progress, info.total_progress), (1, 1));
        assert!(job.block_info().is_none());
        let error = message(lab.jobs.find_block_job("c0"));
        assert_eq!(error, "Block job 'c0' not found");
        let again = run_job(&lab.jobs, JobType::Create, JobConfig::new("c0"), || async {
            Ok(())
        });
        assert_eq!(message(again), "Job ID 'c0' already in use");
        job.dismiss().unwrap();
        while !lab.jobs.list().is_empty() {
            sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(message(lab.jobs.find("c0")), "Job not found");
        assert_eq!(lab.told().last().unwrap(), "null");
    });
}

#[test]
fn a_job_that_fails_says_why() {
    run(async {
        let lab = Lab::new();
        let config = JobConfig {
            auto_dismiss: false,
            ..JobConfig::new("c1")
        };
        let work = || async { Err(Error::new(Kind::Invalid, "no such format")) };
        let job = run_job(&lab.jobs, JobType::Create, config, work).unwrap();
        assert_eq!(job.over().await.unwrap_err(), "no such format");
        assert_eq!(lab.told(), ["created", "running", "aborting", "concluded"]);
        assert_eq!(job.info().error.as_deref(), Some("no such format"));
        let error = message(job.cancel(true));
        let expected = "Job 'c1' in state 'concluded' cannot accept command verb 'cancel'";
        assert_eq!(error, expected);
    });
}

#[test]
fn ids_must_be_well_formed() {
    let lab = Lab::new();
    for id in ["", "1a", "a b", "ä"] {
        let job = run_job(&lab.jobs, JobType::Create, JobConfig::new(id), || async {
            Ok(())
        });
        assert_eq!(message(job), format!("Invalid job ID '{id}'"));
    }
}

/// `src` with data, `dst` and a way to make it fail.
fn two(lab: &Lab, size: u64) -> Arc<Faulty> {
    lab.raw("src", size);
    std::fs::write(lab.path("src.img"), vec![7; size as usize]).unwrap();
    let path = lab.path("dst.img");
    std::fs::File::create(&path).unwrap().set_len(size).unwrap();
    let faulty = Faulty::new(open_raw_file(&path));
    lab.graph
        .insert(Some("dst"), Arc::<Faulty>::clone(&faulty), &[])
        .unwrap();
    faulty
}

async fn begin(lab: &Lab, config: BackupConfig) -> Arc<Job> {
    let start = backup(&lab.jobs, &lab.graph, config).unwrap();
    start.begin(&lab.jobs).await.unwrap()
}

#[test]
fn pause_stops_a_job_between_two_pieces_and_resume_lets_it_go_on() {
    run(async {
        let lab = Lab::new();
        let target = two(&lab, 16 * MIB);
        let mut config = BackupConfig::new(by_hand("b"), "src", "dst");
        config.job.speed = 4 * MIB;
        let job = begin(&lab, config).await;
        job.pause().unwrap();
        reaches(&job, &[Status::Paused]).await;
        assert_eq!(message(job.pause()), "Job is already paused");
        assert_eq!(
            message(job.cancel(false)),
            "The block job for device 'b' is currently paused"
        );
        assert!(job.block_info().unwrap().paused);
        let written = target.written.load(SeqCst);
        sleep(Duration::from_millis(400)).await;
        assert_eq!(
            target.written.load(SeqCst),
            written,
            "it moved while it was paused"
        );
        assert_eq!(
            message(job.complete()),
            "Job 'b' in state 'paused' cannot accept command verb 'complete'"
        );
        job.resume().unwrap();
        assert_eq!(
            message(job.resume()),
            "Can't resume a job that was not paused"
        );
        job.set_speed(0).unwrap();
        reaches(&job, &[Status::Pending]).await;
        assert_eq!(
            message(job.pause()),
            "Job 'b' in state 'pending' cannot accept command verb 'pause'"
        );
        job.finalize().unwrap();
        job.over().await.unwrap();
        let expected = [
            "created",
            "running",
            "paused",
            "running",
            "waiting",
            "pending",
            "PENDING",
            "COMPLETED",
            "concluded",
        ];
        assert_eq!(lab.told(), expected);
        let data = job.block_info().unwrap().job;
        assert_eq!((data.offset, data.len), (16 * MIB, 16 * MIB));
        assert_same(&lab.contents("dst").await, &vec![7; 16 << 20], "the copy");
    });
}

#[test]
fn the_speed_is_kept_and_a_cancel_does_not_wait_for_it() {
    run(async {
        let lab = Lab::new();
        let target = two(&lab, 16 * MIB);
        let mut config = BackupConfig::new(by_hand("b"), "src", "dst");
        config.job.speed = 2 * MIB;
        let start = Instant::now();
        let job = begin(&lab, config).await;
        sleep(Duration::from_secs(1)).await;
        // On a busy machine that may have been too short for anything.
        while target.written.load(SeqCst) <= MIB {
            assert!(start.elapsed() < Duration::from_secs(20), "it stands still");
            sleep(Duration::from_millis(10)).await;
        }
        let written = target.written.load(SeqCst);
        let most = u128::from(2 * MIB) * (start.elapsed().as_millis() + 300) / 1000;
        assert!(
            u128::from(written) < most,
            "{written} in {:?}",
            start.elapsed()
        );
        // Now a piece takes half an hour.
        job.set_speed(32).unwrap();
        sleep(Duration::from_millis(50)).await;
        let asked = Instant::now();
        job.cancel(true).unwrap();
        assert_eq!(job.over().await.unwrap_err(), "Operation canceled");
        assert!(asked.elapsed() < Duration::from_secs(10));
        assert_eq!(
            lab.told(),
            ["created", "running", "aborting", "CANCELLED", "concluded"]
        );
    });
}

#[test]
fn a_create_job_is_cancelled_in_the_middle_of_its_work() {
    run(async {
        let lab = Lab::new();
        let held = Arc::new(());
        let kept = Arc::clone(&held);
        let work = || async move {
            sleep(Duration::from_secs(3600)).await;
            drop(kept);
            Ok(())
        };
        let job = run_job(&lab.jobs, JobType::Create, by_hand("c"), work).unwrap();
        reaches(&job, &[Status::Running]).await;
        assert_eq!(Arc::strong_count(&held), 2);
        lab.jobs.quit().await;
        assert_eq!(job.over().await.unwrap_err(), "Operation canceled");
        assert_eq!(Arc::strong_count(&held), 1);
        assert_eq!(job.info().current_progress, 0);
        // Nobody could dismiss it any more.
        assert_eq!(
            lab.told(),
            ["created", "running", "aborting", "concluded", "null"]
        );
    });
}

#[test]
fn the_speed_does_not_hold_up_what_is_done() {
    run(async {
        let lab = Lab::new();
        lab.raw("src", 64 << 10);
        lab.fill("src", 0, &vec![7; 64 << 10]).await;
        lab.raw("dst", 64 << 10);
        let mut config = BackupConfig::new(JobConfig::new("b"), "src", "dst");
        // One piece, after which another one would have to wait for most of a day.
        config.job.speed = 1;
        let job = begin(&lab, config).await;
        job.over().await.unwrap();
        assert_same(&lab.contents("dst").await, &vec![7; 64 << 10], "the copy");
    });
}

#[test]
fn errors_of_the_target_are_met_as_the_policy_says() {
    run(async {
        for (policy, errno, stops) in [
            (OnError::Report, libc::ENOSPC, false),
            (OnError::Enospc, libc::EIO, false),
            (OnError::Enospc, libc::ENOSPC, true),
            (OnError::Auto, libc::ENOSPC, true),
            (OnError::Stop, libc::EIO, true),
        ] {
            let lab = Lab::new();
            let target = two(&lab, 4 * MIB);
            target.write_errno.store(errno, SeqCst);
            let config = BackupConfig {
                on_target_error: policy,
                ..BackupConfig::new(by_hand("b"), "src", "dst")
            };
            let job = begin(&lab, config).await;
            if !stops {
                let error = job.over().await.unwrap_err();
                assert!(error.contains("faulty"), "{error}");
                assert!(lab.told().contains(&"ERROR write report".to_owned()));
                assert!(lab.told().contains(&"FAILED".to_owned()));
                continue;
            }
            reaches(&job, &[Status::Paused]).await;
            let expected = match errno {
                libc::ENOSPC => IoStatus::NoSpace,
                _ => IoStatus::Failed,
            };
            assert_eq!(job.block_info().unwrap().io_status, expected);
            target.write_errno.store(0, SeqCst);
            job.resume().unwrap();
            reaches(&job, &[Status::Pending]).await;
            assert_eq!(job.block_info().unwrap().io_status, IoStatus::Ok);
            job.finalize().unwrap();
            job.over().await.unwrap();
            assert_same(&lab.contents("dst").await, &vec![7; 4 << 20], "the copy");
        }
    });
}

#[test]
fn errors_that_are_ignored_are_tried_again() {
    run(async {
        let lab = Lab::new();
        let target = two(&lab, 4 * MIB);
        target.write_errno.store(libc::EIO, SeqCst);
        let config = BackupConfig {
            on_target_error: OnError::Ignore,
            ..BackupConfig::new(JobConfig::new("b"), "src", "dst")
        };
        let job = begin(&lab, config).await;
        sleep(Duration::from_millis(300)).await;
        assert_eq!(job.status(), Status::Running);
        target.write_errno.store(0, SeqCst);
        job.over().await.unwrap();
        assert_same(&lab.contents("dst").await, &vec![7; 4 << 20], "the copy");
    });
}

#[test]
fn jobs_of_a_transaction_succeed_together_or_not_at_all() {
    for fails in [false, true] {
        run(async {
            let lab = Lab::new();
            let target = two(&lab, MIB);
            lab.raw("other", MIB);
            let group = Transaction::new();
            let grouped = |id: &str| JobConfig {
                transaction: Some(Arc::clone(&group)),
                auto_dismiss: false,
                ..JobConfig::new(id)
            };
            let first = BackupConfig::new(grouped("a"), "src", "other");
            let second = BackupConfig {
                on_target_error: OnError::Stop,
                ..BackupConfig::new(grouped("b"), "src", "dst")
            };
            target.write_errno.store(libc::EIO, SeqCst);
            let first = backup(&lab.jobs, &lab.graph, first).unwrap();
            let second = backup(&lab.jobs, &lab.graph, second).unwrap();
            let first = first.begin(&lab.jobs).await.unwrap();
            let second = second.begin(&lab.jobs).await.unwrap();
            // The first is done, and must wait for the second.
            reaches(&first, &[Status::Waiting]).await;
            reaches(&second, &[Status::Paused]).await;
            sleep(Duration::from_millis(50)).await;
            assert_eq!(first.status(), Status::Waiting);
            match fails {
                false => {
                    target.write_errno.store(0, SeqCst);
                    second.resume().unwrap();
                    first.over().await.unwrap();
                    second.over().await.unwrap();
                }
                true => {
                    second.cancel(true).unwrap();
                    first.over().await.unwrap_err();
                    second.over().await.unwrap_err();
                }
            }
        });
    }
}

#[test]
fn a_job_keeps_others_from_its_nodes_until_it_is_over() {
    run(async {
        let lab = Lab::new();
        two(&lab, 4 * MIB);
        let mut config = BackupConfig::new(JobConfig::new("b"), "src", "dst");
        config.job.speed = MIB;
        let job = begin(&lab, config).await;
        assert_eq!(
            message(lab.graph.remove("src")),
            "Node src is in use by block job 'b'"
        );
        let mirror = diskfuse_jobs::MirrorConfig::new(JobConfig::new("m"), "src", "dst");
        assert_eq!(
            message(diskfuse_jobs::mirror(&lab.jobs, &lab.graph, mirror)),
            "Node 'src' is busy: block device is in use by block job: backup"
        );
        lab.jobs.quit().await;
        job.over().await.unwrap_err();
        lab.graph.remove("src").unwrap();
        lab.graph.remove("dst").unwrap();
    });
}

#[test]
fn what_does_not_begin_leaves_nothing_behind() {
    run(async {
        let lab = Lab::new();
        two(&lab, MIB);
        lab.raw("small", MIB / 2);
        for (source, target, expected) in [
            ("src", "src", "Source and target cannot be the same"),
            (
                "src",
                "small",
                "Source and target image have different sizes",
            ),
        ] {
            let config = BackupConfig::new(JobConfig::new("b"), source, target);
            assert_eq!(message(backup(&lab.jobs, &lab.graph, config)), expected);
        }
        let config = BackupConfig::new(JobConfig::new("b"), "src", "dst");
        let start = backup(&lab.jobs, &lab.graph, config.clone()).unwrap();
        drop(start);
        assert!(lab.jobs.list().is_empty() && lab.told().is_empty());
        // Also when it was as far as that its changes were made.
        let mut start = backup(&lab.jobs, &lab.graph, config.clone()).unwrap();
        let drained = lab.graph.drain("src").await.unwrap();
        let before = lab.graph.get("src").unwrap();
        lab.graph.change(&start.changes()).unwrap();
        assert!(!Arc::ptr_eq(&before, &lab.graph.get("src").unwrap()));
        drop(start);
        assert!(Arc::ptr_eq(&before, &lab.graph.get("src").unwrap()));
        drop(drained);
        let job = begin(&lab, config).await;
        job.over().await.unwrap();
    });
}

#[test]
fn a_job_that_nobody_needs_to_dismiss_is_gone_in_one_step() {
    run(async {
        let lab = Lab::new();
        for _ in 0..500 {
            let at_once = || async { Ok(()) };
            let config = JobConfig::new("j");
            let job = run_job(&lab.jobs, JobType::Create, config, at_once).unwrap();
            let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
            let impatient = {
                let (job, stop) = (Arc::clone(&job), Arc::clone(&stop));
                std::thread::spawn(move || {
                    while !stop.load(SeqCst) {
                        job.dismiss().unwrap_err();
                    }
                })
            };
            job.over().await.unwrap();
            stop.store(true, SeqCst);
            assert_eq!(job.status(), Status::Null);
            impatient.join().unwrap();
        }
        while !lab.jobs.list().is_empty() {
            sleep(Duration::from_millis(1)).await;
        }
        let told = lab.told();
        let count = |wanted: &str| told.iter().filter(|word| *word == wanted).count();
        assert_eq!((count("created"), count("null")), (500, 500));
    });
}
