//! A user that is put on a node while another thread begins to drain that node must go on when both have let go of it.

#![allow(clippy::unwrap_used)]

mod common;

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use common::run;
use diskfuse_block::drivers::{NullConfig, open_null};
use diskfuse_block::graph::{Change, DrainHook, User};
use diskfuse_block::{Graph, LocalFuture, Node, Permissions};
use diskfuse_ring::Choice;

#[derive(Default)]
struct Fake(AtomicBool);

impl DrainHook for Fake {
    fn quiesce(&self) -> LocalFuture<'_, ()> {
        self.0.store(true, SeqCst);
        Box::pin(std::future::ready(()))
    }
    fn resume(&self) {
        self.0.store(false, SeqCst);
    }
    fn switch(&self, _: Arc<dyn Node>) {}
}

#[test]
fn nobody_is_left_standing() {
    let graph = Graph::new();
    for name in ["a", "b"] {
        let config = NullConfig {
            size: 1 << 20,
            ..NullConfig::default()
        };
        graph
            .insert(Some(name), open_null(&config).unwrap(), &[])
            .unwrap();
    }
    let export = Arc::new(Fake::default());
    let hook: Arc<dyn DrainHook> = Arc::<Fake>::clone(&export);
    let user = User {
        name: "export 'e'".to_owned(),
        perm: Permissions::WRITER,
        shared: Permissions::ALL,
        drain: Some(Arc::downgrade(&hook) as Weak<dyn DrainHook>),
        follows: true,
    };
    let _there = graph.attach("a", user).unwrap();
    let stop = AtomicBool::new(false);
    let end = Instant::now() + Duration::from_secs(3);
    let (mut moves, mut stuck) = (0_u64, None);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                run(Choice::Epoll, async {
                    while !stop.load(SeqCst) {
                        drop(graph.drain("b").await.unwrap());
                    }
                });
            });
        }
        run(Choice::Epoll, async {
            while Instant::now() < end {
                for (from, to) in [("a", "b"), ("b", "a")] {
                    let drained = graph.drain(from).await.unwrap();
                    let (from, to) = (from.into(), to.into());
                    graph.change(&[Change::Replace { from, to }]).unwrap();
                    drop(drained);
                }
                moves += 1;
                // On 'a', which nobody else drains: those of 'b' let go within moments.
                let patience = Instant::now() + Duration::from_secs(5);
                while export.0.load(SeqCst) && Instant::now() < patience {
                    std::thread::yield_now();
                }
                if export.0.load(SeqCst) {
                    stuck = Some(moves);
                    break;
                }
            }
        });
        stop.store(true, SeqCst);
    });
    std::thread::sleep(Duration::from_millis(200));

    assert!(
        !export.0.load(SeqCst),
        "nobody drains anything, and the export stands still (move {stuck:?})"
    );
}
