//! A drain under load, on every transport: while it lasts nothing is served and nothing is in flight, whatever callers
//! ask for; when it is over, everything that waited is served. Needs root.
#![allow(missing_docs, clippy::unwrap_used)]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use diskfuse_block::Graph;
use diskfuse_block::drivers::{NullConfig, open_null};
use diskfuse_fuse::{
    AllowOther, DEFAULT_MAX_BACKGROUND, Export, ExportOptions, Ownership, Passthrough, Transport,
    TransportOptions,
};
use diskfuse_ring::{Config, IoThread, Polling, Ring};

const SIZE: u64 = 4 << 20;
const CALLERS: u64 = 6;

fn export(
    transport: Transport,
    mountpoint: &std::path::Path,
    graph: &Graph,
    threads: &[IoThread],
) -> Arc<Export> {
    let options = ExportOptions {
        id: "export".into(),
        mountpoint: mountpoint.to_owned(),
        writable: true,
        growable: false,
        allow_other: AllowOther::Off,
        ownership: Ownership::default(),
        max_background: DEFAULT_MAX_BACKGROUND,
        transport: TransportOptions {
            transport,
            ..TransportOptions::default()
        },
        passthrough: Passthrough::Off,
    };
    let mailboxes: Vec<_> = threads.iter().map(|t| t.mailbox().clone()).collect();
    Export::start(options, graph, "node", &mailboxes, Box::new(|_| ())).unwrap()
}

/// Waits until the number has grown by `more`.
fn grows(done: &AtomicU64, more: u64) {
    let from = done.load(Ordering::SeqCst);
    let begun = Instant::now();
    while done.load(Ordering::SeqCst) < from + more {
        assert!(
            begun.elapsed() < Duration::from_secs(10),
            "nobody is served"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn drains(transport: Transport, latency: Duration) {
    let folder = tempfile::tempdir().unwrap();
    let mountpoint = folder.path().join("file");
    File::create(&mountpoint).unwrap();
    let graph = Graph::new();
    let null = NullConfig {
        size: SIZE,
        latency,
        ..NullConfig::default()
    };
    graph
        .insert(Some("node"), open_null(&null).unwrap(), &[])
        .unwrap();
    let config = Config {
        polling: Polling::DEFAULT,
        ..Config::default()
    };
    let thread = |n| IoThread::spawn(&format!("queue{n}"), config).unwrap();
    let threads: Vec<IoThread> = (0..2).map(thread).collect();
    let export = export(transport, &mountpoint, &graph, &threads);
    let (done, over) = (AtomicU64::new(0), AtomicBool::new(false));
    let ring = Ring::new(&Config::default()).unwrap();
    std::thread::scope(|scope| {
        for caller in 0..CALLERS {
            let (file, done, over) = (
                File::options().read(true).write(true).open(&mountpoint),
                &done,
                &over,
            );
            let file = file.unwrap();
            scope.spawn(move || {
                let mut page = [0; 4096];
                while !over.load(Ordering::SeqCst) {
                    file.read_exact_at(&mut page, caller * 4096).unwrap();
                    file.write_all_at(&page, caller * 4096).unwrap();
                    done.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        for _ in 0..30 {
            grows(&done, 20);
            let drained = ring.block_on(graph.drain("node")).unwrap();
            let before = export.stats();
            assert_eq!(before.in_flight, 0);
            std::thread::sleep(Duration::from_millis(5));
            assert_eq!(export.stats(), before, "something was served meanwhile");
            drop(drained);
        }
        grows(&done, 20);
        over.store(true, Ordering::SeqCst);
    });
    assert_eq!(export.stats().uring, transport == Transport::Uring);
    export.stop().unwrap();
}

#[test]
fn nothing_is_served_while_a_node_is_drained_and_everything_afterwards() {
    std::fs::write("/sys/module/fuse/parameters/enable_uring", "Y").unwrap();
    for transport in [Transport::Device, Transport::Uring] {
        for latency in [Duration::ZERO, Duration::from_micros(200)] {
            drains(transport, latency);
        }
    }
}
