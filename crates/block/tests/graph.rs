//! The graph: names, conflicts with both parties named, and drains that stop exactly those they should.

#![allow(clippy::unwrap_used)]

mod common;

use std::cell::Cell;
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Weak};
use std::time::Duration;

use common::{BACKENDS, message, run};
use diskfuse_block::drivers::{NullConfig, RawConfig, open_null, open_raw};
use diskfuse_block::graph::{DrainHook, User};
use diskfuse_block::{Graph, Kind, LocalFuture, Node, Permissions};
use diskfuse_ring::{sleep, spawn};

fn user(name: &str, perm: Permissions, shared: Permissions) -> User {
    User {
        name: name.to_owned(),
        perm,
        shared,
        drain: None,
        follows: true,
    }
}

fn exporting(name: &str, writable: bool) -> User {
    let perm = if writable {
        Permissions::WRITER
    } else {
        Permissions::READER
    };
    user(name, perm, Permissions::ALL)
}

fn null() -> Arc<dyn Node> {
    open_null(&NullConfig::default()).unwrap()
}

/// `r` over `f`, and `other` beside them.
fn graph() -> Graph {
    let graph = Graph::new();
    let file = null();
    graph.insert(Some("f"), Arc::clone(&file), &[]).unwrap();
    let raw = open_raw(file, &RawConfig::default()).unwrap();
    graph.insert(Some("r"), raw, &["f"]).unwrap();
    graph.insert(Some("other"), null(), &[]).unwrap();
    graph
}

#[test]
fn names_are_unique_and_a_wrong_one_gets_a_hint() {
    let graph = graph();
    let twice = graph.insert(Some("r"), null(), &[]);
    assert_eq!(message(twice), "Duplicate nodes with node-name='r'");
    let said = message(graph.get("othre"));
    assert!(
        said.starts_with("Failed to find node with node-name='othre'"),
        "{said}"
    );
    assert!(said.ends_with("(did you mean 'other'?)"), "{said}");
    assert_eq!(
        graph.insert(Some("1x"), null(), &[]).unwrap_err().kind(),
        Kind::Invalid
    );
    assert_eq!(
        graph.insert(Some("x"), null(), &["y"]).unwrap_err().kind(),
        Kind::NotFound
    );
    assert_eq!(graph.names(), ["f", "r", "other"]);
}

#[test]
fn a_node_in_use_stays_and_says_by_whom() {
    let graph = graph();
    assert_eq!(message(graph.remove("f")), "Node f is in use by node 'r'");
    let export = graph.attach("r", exporting("export 'e0'", false)).unwrap();
    assert_eq!(
        message(graph.remove("r")),
        "Node r is in use by export 'e0'"
    );
    drop(export);
    graph.remove("r").unwrap();
    graph.remove("f").unwrap();
    assert_eq!(graph.names(), ["other"]);
}

#[test]
fn a_child_without_a_name_goes_with_its_last_parent() {
    let graph = Graph::new();
    let child = graph.insert(None, null(), &[]).unwrap();
    assert!(child.starts_with("#block"), "{child}");
    graph.insert(Some("a"), null(), &[&child]).unwrap();
    graph.insert(Some("b"), null(), &[&child]).unwrap();
    graph.remove("a").unwrap();
    assert_eq!(graph.names(), ["b", &child]);
    graph.remove("b").unwrap();
    assert_eq!(graph.names(), [""; 0]);
}

#[test]
fn exports_share_a_node_also_when_both_write() {
    let graph = graph();
    let _a = graph.attach("r", exporting("export 'a'", true)).unwrap();
    let _b = graph.attach("r", exporting("export 'b'", true)).unwrap();
    let _c = graph.attach("f", exporting("export 'c'", true)).unwrap();
    assert_eq!(graph.users("r").unwrap(), ["export 'a'", "export 'b'"]);
}

#[test]
fn conflicts_name_both_parties_whoever_comes_first() {
    let graph = graph();
    let job = || {
        let shared = Permissions::CONSISTENT_READ | Permissions::WRITE_UNCHANGED;
        user("job 'commit'", Permissions::CONSISTENT_READ, shared)
    };
    let export = graph.attach("r", exporting("export 'e'", true)).unwrap();
    // The permissions of a user above reach the node below.
    let said = message(graph.attach("f", job()));
    let expected = "Permission conflict on node 'f': permissions 'write, resize' are both required by export 'e' and unshared by job 'commit'";
    assert_eq!(said, expected);
    drop(export);
    let _job = graph.attach("f", job()).unwrap();
    let said = message(graph.attach("r", exporting("export 'e'", true)));
    let expected = "Permission conflict on node 'f': permissions 'write, resize' are both required by export 'e' and unshared by job 'commit'";
    assert_eq!(said, expected);
    let _reader = graph.attach("r", exporting("export 'e'", false)).unwrap();
    let _beside = graph
        .attach("other", exporting("export 'o'", true))
        .unwrap();
}

#[test]
fn a_read_only_node_has_no_writers() {
    let graph = Graph::new();
    let config = NullConfig {
        read_only: true,
        ..NullConfig::default()
    };
    graph
        .insert(Some("n"), open_null(&config).unwrap(), &[])
        .unwrap();
    let error = graph
        .attach("n", exporting("export 'e'", true))
        .unwrap_err();
    assert_eq!(error.kind(), Kind::ReadOnly);
}

/// An export with requests in flight.
#[derive(Default)]
struct Fake {
    quiesced: AtomicUsize,
    resumed: AtomicUsize,
    switched: AtomicUsize,
    takes: Duration,
}

impl DrainHook for Fake {
    fn quiesce(&self) -> LocalFuture<'_, ()> {
        Box::pin(async {
            sleep(self.takes).await;
            self.quiesced.fetch_add(1, SeqCst);
        })
    }

    fn resume(&self) {
        self.resumed.fetch_add(1, SeqCst);
    }

    fn switch(&self, _: Arc<dyn Node>) {
        self.switched.fetch_add(1, SeqCst);
    }
}

impl Fake {
    fn new(milliseconds: u64) -> Arc<Self> {
        Arc::new(Self {
            takes: Duration::from_millis(milliseconds),
            ..Self::default()
        })
    }

    fn user(self: &Arc<Self>, name: &str) -> User {
        let hook: Arc<dyn DrainHook> = Arc::<Self>::clone(self);
        User {
            drain: Some(Arc::downgrade(&hook) as Weak<dyn DrainHook>),
            ..exporting(name, true)
        }
    }

    fn counts(&self) -> (usize, usize) {
        (self.quiesced.load(SeqCst), self.resumed.load(SeqCst))
    }
}

#[test]
fn a_drain_stops_users_of_the_node_and_above_and_nobody_else() {
    for choice in BACKENDS {
        let graph = graph();
        let [low, high, beside] = [0; 3].map(Fake::new);
        let _low = graph.attach("f", low.user("low")).unwrap();
        let _high = graph.attach("r", high.user("high")).unwrap();
        let _beside = graph.attach("other", beside.user("beside")).unwrap();
        run(choice, async {
            let drained = graph.drain("f").await.unwrap();
            assert_eq!((low.counts(), high.counts()), ((1, 0), (1, 0)));
            let refused = graph.attach("r", exporting("late", false)).unwrap_err();
            assert_eq!(refused.kind(), Kind::Drained);
            drop(drained);
            assert_eq!((low.counts(), high.counts()), ((1, 1), (1, 1)));
            let _late = graph.attach("r", exporting("late", false)).unwrap();
            // Draining what is above leaves the users below alone.
            drop(graph.drain("r").await.unwrap());
            assert_eq!((low.counts(), high.counts()), ((1, 1), (2, 2)));
            assert_eq!(
                graph.drain("nosuch").await.unwrap_err().kind(),
                Kind::NotFound
            );
        });
        assert_eq!(beside.counts(), (0, 0));
    }
}

#[test]
fn overlapping_drains_resume_once_after_the_last() {
    for choice in BACKENDS {
        let graph = graph();
        let fake = Fake::new(20);
        let _user = graph.attach("r", fake.user("e")).unwrap();
        run(choice, async {
            let second_done = Rc::new(Cell::new(false));
            let task = spawn({
                let (graph, done) = (graph.clone(), Rc::clone(&second_done));
                async move {
                    let drained = graph.drain("r").await.unwrap();
                    done.set(true);
                    drained
                }
            });
            let first = graph.drain("f").await.unwrap();
            let second = task.await;
            assert!(second_done.get());
            drop(first);
            assert_eq!(fake.counts().1, 0, "the second still holds it");
            drop(second);
            assert_eq!(fake.counts().1, 1);
            // A drain that is given up lets go as well.
            {
                let given_up = std::pin::pin!(graph.drain("r"));
                let mut context = std::task::Context::from_waker(std::task::Waker::noop());
                assert!(given_up.poll(&mut context).is_pending());
            }
            assert_eq!(fake.counts().1, 2);
            graph
                .attach("r", exporting("late", false))
                .map(drop)
                .unwrap();
        });
    }
}
