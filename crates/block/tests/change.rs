//! Changing the graph while it is in use: all or nothing, only under those who are stopped, and everybody told.

#![allow(clippy::unwrap_used)]

mod common;

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, Weak};

use common::{message, run};
use diskfuse_block::drivers::{FileConfig, NullConfig, RawConfig, open_file, open_null, open_raw};
use diskfuse_block::graph::{Change, ChildRole, DrainHook, User};
use diskfuse_block::{
    Access, BlockStatus, Extent, Graph, Kind, Limits, LocalFuture, Node, Permissions, Resize,
    Result, Wrap, Zeroes,
};
use diskfuse_ring::{Buf, Choice};

/// An export that notes which nodes it was given, and whether it stands still.
#[derive(Default)]
struct Fake {
    given: Mutex<Vec<Arc<dyn Node>>>,
    immovable: bool,
    stopped: AtomicBool,
}

impl DrainHook for Fake {
    fn quiesce(&self) -> LocalFuture<'_, ()> {
        self.stopped.store(true, SeqCst);
        Box::pin(std::future::ready(()))
    }

    fn resume(&self) {
        self.stopped.store(false, SeqCst);
    }

    fn switch(&self, node: Arc<dyn Node>) {
        self.given.lock().unwrap().push(node);
    }

    fn immovable(&self) -> Option<String> {
        self.immovable.then(|| "it is nailed down".to_owned())
    }
}

impl Fake {
    fn user(self: &Arc<Self>, perm: Permissions) -> User {
        let hook: Arc<dyn DrainHook> = Arc::<Self>::clone(self);
        User {
            name: "export 'e'".to_owned(),
            perm,
            shared: Permissions::ALL,
            drain: Some(Arc::downgrade(&hook) as Weak<dyn DrainHook>),
            follows: true,
        }
    }

    fn sizes(&self) -> Vec<u64> {
        self.given
            .lock()
            .unwrap()
            .iter()
            .map(|n| n.size())
            .collect()
    }
}

fn null(size: u64) -> Arc<dyn Node> {
    let config = NullConfig {
        size,
        ..NullConfig::default()
    };
    open_null(&config).unwrap()
}

/// `raw` over `a` (1 MiB), and `b` (2 MiB).
fn graph() -> Graph {
    let graph = Graph::new();
    let a = null(1 << 20);
    graph.insert(Some("a"), Arc::clone(&a), &[]).unwrap();
    let raw = open_raw(a, &RawConfig::default()).unwrap();
    graph.insert(Some("raw"), raw, &["a"]).unwrap();
    graph.insert(Some("b"), null(2 << 20), &[]).unwrap();
    graph
}

fn drained<T>(graph: &Graph, name: &str, work: impl FnOnce() -> T) -> T {
    let graph = graph.clone();
    let name = name.to_owned();
    run(common::BACKENDS[0], async move {
        let _drained = graph.drain(&name).await.unwrap();
        work()
    })
}

/// Halves the size of what it is put around.
struct Half;

struct Halved(Arc<dyn Node>);

impl Wrap for Half {
    fn over(&self, node: Arc<dyn Node>) -> Arc<dyn Node> {
        Arc::new(Halved(node))
    }
}

impl Node for Halved {
    fn driver(&self) -> &'static str {
        "half"
    }
    fn size(&self) -> u64 {
        self.0.size() / 2
    }
    fn read_only(&self) -> bool {
        self.0.read_only()
    }
    fn limits(&self) -> Limits {
        self.0.limits()
    }
    fn allocated(&self) -> u64 {
        self.0.allocated()
    }
    fn filename(&self) -> Option<String> {
        self.0.filename()
    }
    fn resolve(&self, access: Access, offset: u64, len: u64) -> Extent<'_> {
        self.0.resolve(access, offset, len)
    }
    fn read(&self, offset: u64, buf: Buf) -> LocalFuture<'_, (Result<()>, Buf)> {
        self.0.read(offset, buf)
    }
    fn write(&self, offset: u64, buf: Buf) -> LocalFuture<'_, (Result<()>, Buf)> {
        self.0.write(offset, buf)
    }
    fn write_zeroes(&self, offset: u64, len: u64, how: Zeroes) -> LocalFuture<'_, Result<()>> {
        self.0.write_zeroes(offset, len, how)
    }
    fn discard(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<()>> {
        self.0.discard(offset, len)
    }
    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        self.0.flush()
    }
    fn resize(&self, size: u64, how: Resize, preallocate: bool) -> LocalFuture<'_, Result<()>> {
        self.0.resize(size, how, preallocate)
    }
    fn block_status(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<BlockStatus>> {
        self.0.block_status(offset, len)
    }
}

#[test]
fn a_node_below_another_is_replaced_and_the_users_above_see_it() {
    let graph = graph();
    let fake = Arc::new(Fake::default());
    let export = graph.attach("raw", fake.user(Permissions::WRITER)).unwrap();
    let change = [Change::Replace {
        from: "a".to_owned(),
        to: "b".to_owned(),
    }];
    let said = message(graph.change(&change).map(drop));
    assert_eq!(said, "export 'e' is not drained");
    assert_eq!(graph.get("raw").unwrap().size(), 1 << 20, "nothing changed");
    drained(&graph, "a", || graph.change(&change).map(drop)).unwrap();
    assert_eq!(fake.sizes(), [2 << 20]);
    assert_eq!(graph.children("raw").unwrap(), ["b"]);
    assert_eq!(export.node().unwrap().size(), 2 << 20);
    graph.remove("a").unwrap();
    assert_eq!(message(graph.remove("b")), "Node b is in use by node 'raw'");
}

#[test]
fn users_follow_to_the_other_node_and_leave_it_by_the_same_attachment() {
    let graph = graph();
    let (fake, job) = (Arc::new(Fake::default()), Arc::new(Fake::default()));
    let export = graph.attach("a", fake.user(Permissions::WRITER)).unwrap();
    let stays = User {
        follows: false,
        ..job.user(Permissions::READER)
    };
    let job_right = graph.attach("a", stays).unwrap();
    let change = [Change::Replace {
        from: "a".to_owned(),
        to: "b".to_owned(),
    }];
    drained(&graph, "a", || graph.change(&change).map(drop)).unwrap();
    assert_eq!((fake.sizes(), job.sizes()), (vec![2 << 20], vec![]));
    let names = (export.node_name(), job_right.node_name());
    assert_eq!(names, ("b".to_owned(), "a".to_owned()));
    drop(export);
    assert_eq!(graph.users("b").unwrap(), [""; 0]);
}

#[test]
fn wraps_are_seen_from_above_only_and_survive_changes_below() {
    let graph = graph();
    let fake = Arc::new(Fake::default());
    let _export = graph.attach("raw", fake.user(Permissions::READER)).unwrap();
    let half: Arc<dyn Wrap> = Arc::new(Half);
    let on = |node: &str| Change::Wrap {
        node: node.to_owned(),
        wrap: Arc::clone(&half),
    };
    drained(&graph, "a", || {
        graph.change(&[on("a"), on("raw")]).map(drop)
    })
    .unwrap();
    assert_eq!(fake.sizes(), [1 << 18]);
    assert_eq!(graph.bare("a").unwrap().size(), 1 << 20);
    assert_eq!(graph.bare("raw").unwrap().size(), 1 << 19);
    let replace = Change::Replace {
        from: "a".to_owned(),
        to: "b".to_owned(),
    };
    drained(&graph, "a", || graph.change(&[replace]).map(drop)).unwrap();
    let off = Change::Unwrap {
        node: "raw".to_owned(),
        wrap: half,
    };
    drained(&graph, "raw", || graph.change(&[off]).map(drop)).unwrap();
    assert_eq!(fake.sizes(), [1 << 18, 1 << 20, 2 << 20]);
}

#[test]
fn who_cannot_move_is_neither_drained_nor_changed() {
    let graph = graph();
    let fake = Arc::new(Fake {
        immovable: true,
        ..Fake::default()
    });
    let _export = graph.attach("raw", fake.user(Permissions::READER)).unwrap();
    let refused = run(common::BACKENDS[0], {
        let graph = graph.clone();
        async move { graph.drain("a").await.map(drop) }
    });
    let expected = "Node 'a' cannot be drained: it is nailed down";
    assert_eq!(message(refused), expected);
    drop(graph.attach("a", fake.user(Permissions::READER)).unwrap());
}

#[test]
fn a_circle_is_refused_and_a_conflict_leaves_all_as_it_was() {
    let graph = graph();
    let circle = Change::SetChild {
        parent: "raw".to_owned(),
        role: ChildRole::Filtered,
        child: Some("raw".to_owned()),
    };
    let error = graph.change(&[circle]).map(drop).unwrap_err();
    assert_eq!(error.kind(), Kind::Invalid, "{error}");

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    std::fs::write(&path, vec![0; 4096]).unwrap();
    let open = |read_only| {
        let config = FileConfig {
            filename: path.clone(),
            read_only,
            ..FileConfig::default()
        };
        open_file(&config).unwrap()
    };
    graph.insert(Some("ro"), open(true), &[]).unwrap();
    let fake = Arc::new(Fake::default());
    let _export = graph.attach("a", fake.user(Permissions::WRITER)).unwrap();
    let replace = Change::Replace {
        from: "a".to_owned(),
        to: "ro".to_owned(),
    };
    let refused = drained(&graph, "a", || graph.change(&[replace]));
    assert_eq!(refused.map(drop).unwrap_err().kind(), Kind::ReadOnly);
    assert_eq!(graph.users("a").unwrap(), ["export 'e'"]);
    assert_eq!(fake.sizes(), [0; 0]);
}

#[test]
fn nameless_nodes_that_nothing_stands_on_any_more_are_handed_out() {
    let graph = Graph::new();
    let below = graph.insert(None, null(1 << 20), &[]).unwrap();
    let raw = open_raw(graph.get(&below).unwrap(), &RawConfig::default()).unwrap();
    graph.insert(Some("raw"), raw, &[&below]).unwrap();
    graph.insert(Some("b"), null(2 << 20), &[]).unwrap();
    let replace = Change::SetChild {
        parent: "raw".to_owned(),
        role: ChildRole::Filtered,
        child: Some("b".to_owned()),
    };
    let removed = graph.change(&[replace]).unwrap();
    assert_eq!(removed.len(), 1);
    assert_eq!(removed[0].size(), 1 << 20);
    assert_eq!(graph.names(), ["b", "raw"]);
}

#[test]
fn above_a_drained_node_nobody_comes_however_it_got_there() {
    let graph = graph();
    let late = Arc::new(Fake::default());
    run(Choice::Epoll, async {
        let drained = graph.drain("b").await.unwrap();
        let over = open_raw(graph.get("b").unwrap(), &RawConfig::default()).unwrap();
        graph.insert(Some("over"), over, &["b"]).unwrap();
        let attached = graph.attach("over", late.user(Permissions::WRITER));
        assert!(message(attached).contains("'over' is being drained"));
        let put = |child: &str| Change::SetChild {
            parent: "raw".into(),
            role: ChildRole::Filtered,
            child: Some(child.into()),
        };
        graph.change(&[put("b")]).unwrap();
        let attached = graph.attach("raw", late.user(Permissions::WRITER));
        assert!(message(attached).contains("'raw' is being drained"));
        graph.change(&[put("a")]).unwrap();
        drop(graph.attach("raw", late.user(Permissions::WRITER)).unwrap());
        drop(drained);
        drop(
            graph
                .attach("over", late.user(Permissions::WRITER))
                .unwrap(),
        );
    });
}

#[test]
fn whoever_is_put_on_a_node_that_another_drains_stands_still_until_that_is_over() {
    let graph = graph();
    let export = Arc::new(Fake::default());
    let _there = graph.attach("a", export.user(Permissions::WRITER)).unwrap();
    run(Choice::Epoll, async {
        let others = graph.drain("b").await.unwrap();
        let mine = graph.drain("a").await.unwrap();
        let (from, to) = ("a".into(), "b".into());
        graph.change(&[Change::Replace { from, to }]).unwrap();
        drop(mine);
        assert!(export.stopped.load(SeqCst), "'b' is drained");
        drop(others);
        assert!(!export.stopped.load(SeqCst), "nobody drains it");
    });
    assert_eq!(export.sizes(), [2 << 20]);
}

#[test]
fn who_is_on_its_way_out_is_in_no_change_s_way() {
    let graph = graph();
    let export = Arc::new(Fake::default());
    let there = graph.attach("a", export.user(Permissions::WRITER)).unwrap();
    drop(export);
    let (from, to) = ("a".into(), "b".into());
    graph.change(&[Change::Replace { from, to }]).unwrap();
    assert_eq!(there.node_name(), "b");
}
