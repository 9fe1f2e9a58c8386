#![allow(clippy::unwrap_used)]

use std::future::poll_fn;
use std::pin::pin;
use std::sync::atomic::AtomicBool;

use diskfuse_block::drivers::{
    NullConfig, Rate, Rates, ThrottleGroup, ThrottleLimits, open_null, open_throttle,
};
use diskfuse_block::io;
use diskfuse_ring::{Buf, Config, Ring, spawn};

use super::*;
use crate::event::Outbox;
use crate::job::JobConfig;
use crate::status::JobType;

const LIMIT: Duration = Duration::from_secs(20);

/// A graph of `source` and `target`, the latter behind a throttle that lets a byte through in a second, but for the first request.
fn graph() -> Graph {
    let graph = Graph::new();
    let disk = || open_null(&NullConfig::default()).unwrap();
    graph.insert(Some("source"), disk(), &[]).unwrap();
    graph.insert(Some("below"), disk(), &[]).unwrap();
    let rate = Rate {
        average: 1,
        ..Rate::default()
    };
    let limits = ThrottleLimits {
        bytes: Rates {
            total: rate,
            ..Rates::default()
        },
        ..ThrottleLimits::default()
    };
    let below = graph.get("below").unwrap();
    let target = open_throttle(below, &ThrottleGroup::new(limits), false);
    graph.insert(Some("target"), target, &["below"]).unwrap();
    graph
}

fn job() -> Arc<Job> {
    let outbox = Arc::new(Outbox::new(Box::new(|_| ())));
    Job::new(JobType::Mirror, JobConfig::new("j"), outbox)
}

fn seat(graph: &Graph, job: &Arc<Job>, name: &str) -> Arc<Seat> {
    let rights = Rights {
        perm: Permissions::CONSISTENT_READ,
        shared: Permissions::ALL,
    };
    Arc::new(Seat::take(graph, job, name, rights, None).unwrap())
}

/// Runs a future on a ring of its own, for [`LIMIT`] at most.
fn run<F: Future>(future: F) -> F::Output {
    let ring = Ring::new(&Config::default()).unwrap();
    ring.block_on(async {
        let mut future = pin!(future);
        let mut late = pin!(sleep(LIMIT));
        poll_fn(|cx| {
            assert!(late.as_mut().poll(cx).is_pending(), "it takes too long");
            future.as_mut().poll(cx)
        })
        .await
    })
}

async fn until(done: impl Fn() -> bool) {
    while !done() {
        sleep(Duration::from_millis(1)).await;
    }
}

#[test]
fn nobody_holds_still_while_another_node_of_the_job_is_drained() {
    run(async {
        let (graph, job) = (graph(), job());
        let (source, _target) = (seat(&graph, &job, "source"), seat(&graph, &job, "target"));
        let drained = graph.drain("target").await.unwrap();
        let held = Arc::new(AtomicBool::new(false));
        let task = {
            let (job, held) = (Arc::clone(&job), Arc::clone(&held));
            spawn(async move {
                let still = source.hold_still(&job, "source").await.unwrap();
                held.store(true, Ordering::SeqCst);
                sleep(Duration::from_millis(100)).await;
                held.store(false, Ordering::SeqCst);
                drop(still);
            })
        };
        sleep(Duration::from_millis(100)).await;
        assert!(!held.load(Ordering::SeqCst), "the target is drained");
        drop(drained);
        until(|| held.load(Ordering::SeqCst)).await;
        // And the other way round.
        let drained = graph.drain("target").await.unwrap();
        assert!(!held.load(Ordering::SeqCst), "the job still works");
        drop(drained);
        task.await;
        assert_eq!(job.drained_places(), 0);
    });
}

#[test]
fn a_drain_does_not_wait_for_a_throttle_below_another_node_of_the_job() {
    run(async {
        let (graph, job) = (graph(), job());
        let (_source, target) = (seat(&graph, &job, "source"), seat(&graph, &job, "target"));
        let written = Arc::new(AtomicUsize::new(0));
        let task = {
            let (job, written) = (Arc::clone(&job), Arc::clone(&written));
            spawn(async move {
                // The first fills the bucket, the second waits.
                for _ in 0..2 {
                    let _pass = job.force_pass();
                    let buf = Buf::new(4096).unwrap().with_window(0..4096);
                    io::write(&*target.node(), 0, buf).await.0.unwrap();
                    written.fetch_add(1, Ordering::SeqCst);
                }
            })
        };
        until(|| written.load(Ordering::SeqCst) == 1).await;
        sleep(Duration::from_millis(50)).await;
        assert_eq!(written.load(Ordering::SeqCst), 1, "it is held back");
        // It would wait for an hour.
        drop(graph.drain("source").await.unwrap());
        task.await;
        assert_eq!(written.load(Ordering::SeqCst), 2);
    });
}
