//! Mirrors and those who are faster or slower than they: a guest that outruns the copy, a mode that is changed, a disk that grows
//! where the job does not see it.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::time::{Duration, Instant};

use diskfuse_block::Resize;
use diskfuse_block::drivers::{Rate, Rates, ThrottleGroup, ThrottleLimits, open_throttle};
use diskfuse_jobs::{CopyMode, JobConfig, MirrorConfig, Status};
use diskfuse_ring::sleep;
use support::guest::Guest;
use support::{Lab, MIB, assert_same, begin_mirror as begin, reaches, run};

/// What lets `megabytes` through in a second.
fn slow(lab: &Lab, name: &str, below: &str, megabytes: u64) {
    let rate = Rate {
        average: megabytes * MIB,
        ..Rate::default()
    };
    let limits = ThrottleLimits {
        bytes: Rates {
            total: rate,
            ..Rates::default()
        },
        ..ThrottleLimits::default()
    };
    let below_node = lab.graph.get(below).unwrap();
    let node = open_throttle(below_node, &ThrottleGroup::new(limits), false);
    lab.graph.insert(Some(name), node, &[below]).unwrap();
}

#[test]
fn a_guest_that_outruns_the_target_waits_for_it_until_the_job_is_ready() {
    run(async {
        let lab = Lab::new();
        let size = 32 * MIB;
        lab.raw("src", size);
        lab.fill("src", 0, &vec![1; size as usize]).await;
        lab.raw("below", size);
        slow(&lab, "dst", "below", 24);
        let mut guest = Guest::start(&lab.graph, "src", vec![1; size as usize], 2, 1);
        let begun = Instant::now();
        let job = begin(&lab, MirrorConfig::new(JobConfig::new("m"), "src", "dst")).await;
        reaches(&job, &[Status::Ready]).await;
        // It stays what was asked for, once the job is ready: everything is soon dirty again, and that is not waited for.
        let before = guest.operations();
        sleep(Duration::from_secs(1)).await;
        let meanwhile = guest.operations() - before;
        job.complete().unwrap();
        job.over().await.unwrap();
        let took = begun.elapsed();
        assert!(took < Duration::from_secs(20), "{took:?}");
        assert!(meanwhile > 500, "{meanwhile}");
        assert_eq!(guest.node(), "dst");
        guest.stop();
        assert_same(&lab.contents("below").await, &guest.model(), "the disk");
    });
}

#[test]
fn a_mirror_is_changed_to_write_to_both_sides_and_not_back() {
    run(async {
        let lab = Lab::new();
        lab.raw("src", 4 * MIB);
        lab.raw("dst", 4 * MIB);
        let job = begin(&lab, MirrorConfig::new(JobConfig::new("m"), "src", "dst")).await;
        reaches(&job, &[Status::Ready]).await;
        job.change_copy_mode(CopyMode::Background).unwrap();
        job.change_copy_mode(CopyMode::WriteBlocking).unwrap();
        job.pause().unwrap();
        reaches(&job, &[Status::Standby]).await;
        // Nobody but the guest copies it.
        lab.fill("src", MIB, &[3; 4096]).await;
        assert_same(
            &lab.contents("dst").await[1 << 20..][..4096],
            &[3; 4096],
            "the copy",
        );
        let error = job.change_copy_mode(CopyMode::Background).unwrap_err();
        let words = "Change to copy mode 'background' is not implemented";
        assert_eq!(error.to_string(), words);
        job.resume().unwrap();
        job.complete().unwrap();
        job.over().await.unwrap();
        job.change_copy_mode(CopyMode::WriteBlocking).unwrap_err();
    });
}

#[test]
fn what_grows_below_a_filter_ends_its_mirror_at_once() {
    run(async {
        let lab = Lab::new();
        lab.raw("src", 4 * MIB);
        lab.fill("src", 0, &vec![1; 4 << 20]).await;
        lab.raw("dst", 4 * MIB);
        slow(&lab, "filter", "src", 1024);
        let mut config = MirrorConfig::new(JobConfig::new("m"), "filter", "dst");
        config.job.speed = MIB;
        let job = begin(&lab, config).await;
        reaches(&job, &[Status::Running]).await;
        let node = lab.graph.get("src").unwrap();
        node.resize(5 * MIB, Resize::AtLeast, false).await.unwrap();
        let error = job.over().await.unwrap_err();
        let words = "The disk has 5242880 bytes now and had 4194304 when block job 'm' began";
        assert!(error.contains(words), "{error}");
        assert!(job.info().current_progress < 4 * MIB, "{:?}", job.info());
    });
}
