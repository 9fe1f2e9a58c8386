//! A tree over a real mount: what it shows, how it changes while it is in use, and that a drain of one file's node holds. Needs
//! root.
#![allow(missing_docs, clippy::unwrap_used)]

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use diskfuse_block::drivers::{NullConfig, open_null};
use diskfuse_block::{Graph, LocalFuture};
use diskfuse_fuse::{
    AllowOther, DEFAULT_MAX_BACKGROUND, Entry, Export, ExportOptions, Ownership, Passthrough,
    Refresh, Transport, TransportOptions, Tree, Watch, When,
};
use diskfuse_ring::{Config, IoThread, Ring};

const SIZES: [u64; 3] = [1 << 20, 2 << 20, 4 << 20];

/// Shows node `nN` as `a` after N refreshes, and a directory of many links.
#[derive(Default)]
struct Counting(AtomicU64);

fn root(round: u64) -> Vec<(OsString, Entry)> {
    let node = |round: u64, writable| Entry::Node {
        node: format!("n{round}"),
        writable,
        watch: Some(Watch::new(When::Synced, std::iter::once(0..512).collect())),
    };
    let link = |n: u64| (format!("link{n}").into(), Entry::Link("../a".into()));
    let mut root: Vec<(OsString, Entry)> = vec![
        ("a".into(), node(round, true)),
        ("fixed".into(), node(0, false)),
        (
            "links".into(),
            Entry::Directory((0..500).map(link).collect()),
        ),
        (
            "text".into(),
            Entry::Text(format!("round {round}\n").into_bytes()),
        ),
    ];
    if round == 0 {
        root.push(("first".into(), node(0, true)));
    }
    root
}

impl Refresh for Counting {
    fn refresh<'a>(&'a self, tree: &'a Tree) -> LocalFuture<'a, diskfuse_fuse::Result<()>> {
        let round = (self.0.fetch_add(1, Ordering::SeqCst) + 1).min(2);
        Box::pin(std::future::ready(tree.replace(root(round))))
    }
}

fn with_tree(transport: Transport, test: impl FnOnce(&Path, &Graph, &Counting)) {
    std::fs::write("/sys/module/fuse/parameters/enable_uring", "Y").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let graph = Graph::new();
    for (n, size) in SIZES.into_iter().enumerate() {
        let null = NullConfig {
            size,
            ..NullConfig::default()
        };
        let node = open_null(&null).unwrap();
        graph.insert(Some(&format!("n{n}")), node, &[]).unwrap();
    }
    let threads: Vec<IoThread> = (0..2)
        .map(|n| IoThread::spawn(&format!("queue{n}"), Config::default()).unwrap())
        .collect();
    let mailboxes: Vec<_> = threads.iter().map(|t| t.mailbox().clone()).collect();
    let options = ExportOptions {
        ownership: Ownership::default(),
        id: "export".into(),
        mountpoint: folder.path().to_owned(),
        writable: true,
        growable: false,
        allow_other: AllowOther::Off,
        max_background: DEFAULT_MAX_BACKGROUND,
        transport: TransportOptions {
            transport,
            ..TransportOptions::default()
        },
        passthrough: Passthrough::Off,
    };
    let counting = Arc::new(Counting::default());
    let refresh: Arc<dyn Refresh> = Arc::<Counting>::clone(&counting);
    let on_end = Box::new(|_| ());
    // Dropped at the end, also of a failure: then nothing stays mounted.
    let export = Export::start_tree(options, &graph, root(0), Some(refresh), &mailboxes, on_end);
    let export = export.unwrap();
    test(folder.path(), &graph, &counting);
    export.stop().unwrap();
    for n in 0..SIZES.len() {
        assert!(graph.users(&format!("n{n}")).unwrap().is_empty());
    }
}

#[test]
fn a_tree_shows_its_entries_and_changes() {
    for transport in [Transport::Device, Transport::Uring] {
        with_tree(transport, |m, _, counting| {
            let names = |path: &Path| {
                let entries = std::fs::read_dir(path).unwrap();
                let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name()).collect();
                names.sort();
                names
            };
            assert_eq!(names(m), ["a", "first", "fixed", "links", "text"]);
            assert_eq!(names(&m.join("links")).len(), 500);
            let link = m.join("links/link499");
            assert_eq!(std::fs::read_link(&link).unwrap(), Path::new("../a"));
            assert_eq!(link.metadata().unwrap().len(), SIZES[0]);
            assert_eq!(std::fs::read(m.join("text")).unwrap(), b"round 0\n");
            for path in ["fixed", "text"] {
                assert!(
                    File::options().write(true).open(m.join(path)).is_err(),
                    "{path}"
                );
            }
            for path in ["no", "a/x", "links/no", &"x".repeat(300)] {
                assert!(m.join(path).symlink_metadata().is_err(), "{path}");
            }
            assert!(File::create(m.join("new")).is_err());
            let ino = m.join("a").metadata().unwrap().ino();

            // A write elsewhere is nobody's business; one that is watched is, once.
            let first = File::options()
                .read(true)
                .write(true)
                .open(m.join("first"))
                .unwrap();
            first.write_all_at(&[1; 512], 512).unwrap();
            first.sync_all().unwrap();
            assert_eq!(counting.0.load(Ordering::SeqCst), 0);
            first.write_all_at(&[1; 512], 0).unwrap();
            first.sync_all().unwrap();
            assert_eq!(counting.0.load(Ordering::SeqCst), 1);
            assert_eq!(m.join("a").metadata().unwrap().len(), SIZES[1]);
            assert_eq!(m.join("a").metadata().unwrap().ino(), ino);
            // It is not in the list any more, but open; when it is closed the tree catches up.
            first.read_exact_at(&mut [0; 512], 0).unwrap();
            drop(first);
            let gone = || m.join("first").symlink_metadata().is_err();
            for _ in 0..1000 {
                if gone() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(5));
            }
            assert!(gone());
            assert_eq!(m.join("a").metadata().unwrap().len(), SIZES[2]);
            assert_eq!(std::fs::read(m.join("text")).unwrap(), b"round 2\n");
        });
    }
}

#[test]
fn a_drain_of_one_files_node_holds_requests() {
    for transport in [Transport::Device, Transport::Uring] {
        with_tree(transport, |m, graph, _| {
            let file = File::open(m.join("fixed")).unwrap();
            let ring = Ring::new(&Config::default()).unwrap();
            let drained = ring.block_on(graph.drain("n0")).unwrap();
            let reader = std::thread::spawn(move || file.read_exact_at(&mut [1; 512], 0));
            std::thread::sleep(Duration::from_millis(100));
            assert!(!reader.is_finished(), "{transport:?}");
            drop(drained);
            reader.join().unwrap().unwrap();
        });
    }
}
