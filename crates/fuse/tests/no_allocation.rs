//! The hot path allocates nothing: from the read of a request to the write of its reply, over a real mount. Needs root.
#![allow(missing_docs, unsafe_code, clippy::unwrap_used)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use diskfuse_block::drivers::{FileConfig, NullConfig, open_file, open_null};
use diskfuse_block::{Graph, Node};
use diskfuse_fuse::{
    AllowOther, DEFAULT_MAX_BACKGROUND, Export, ExportOptions, Passthrough, Transport,
    TransportOptions,
};
use diskfuse_ring::{Choice, Config, IoThread, Polling};

/// Counts every allocation of the process.
struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: everything is handed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promises are the system allocator's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

const SIZE: u64 = 4 << 20;

/// How often the work is repeated. What a loop sets up once, when a load turns out to be worth it (see `awake` in the
/// ring), may fall into any one repetition; what a request allocates is in all of them.
const ROUNDS: usize = 5;

/// Serves `node` with one queue, runs `work` on the open file, and returns the least that a repetition allocated.
fn allocations(node: Arc<dyn Node>, transport: Transport, work: impl Fn(&File)) -> u64 {
    let folder = tempfile::tempdir().unwrap();
    let mountpoint = folder.path().join("file");
    File::create(&mountpoint).unwrap();
    let graph = Graph::new();
    graph.insert(Some("node"), node, &[]).unwrap();
    let polling = Polling::DEFAULT;
    let config = Config {
        choice: Choice::Uring,
        polling,
    };
    let thread = IoThread::spawn("queue0", config).unwrap();
    let options = ExportOptions {
        id: "export".into(),
        mountpoint: mountpoint.clone(),
        writable: true,
        growable: false,
        allow_other: AllowOther::Off,
        max_background: DEFAULT_MAX_BACKGROUND,
        transport: TransportOptions {
            transport,
            ..TransportOptions::default()
        },
        passthrough: Passthrough::Off,
        on_error: None,
    };
    let mailboxes = [thread.mailbox().clone()];
    // Dropped at the end, also of a failure: then nothing stays mounted.
    let export = Export::start(options, &graph, "node", &mailboxes, Box::new(|_| ())).unwrap();
    let file = File::options()
        .read(true)
        .write(true)
        .open(&mountpoint)
        .unwrap();
    work(&file);
    let rounds = (0..ROUNDS).map(|_| {
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        work(&file);
        ALLOCATIONS.load(Ordering::Relaxed) - before
    });
    let least = rounds.min();
    drop(file);
    export.stop().unwrap();
    least.unwrap()
}

fn reads_and_writes(file: &File) {
    let mut page = [7u8; 4096];
    for n in 0..3000u64 {
        let at = n * 37 % (SIZE / 4096) * 4096;
        assert_eq!(file.read_at(&mut page, at).unwrap(), page.len());
        assert_eq!(file.write_at(&page, at).unwrap(), page.len());
    }
}

// One test, as the counter is the process's.
#[test]
fn reads_and_writes_over_a_mount_allocate_nothing() {
    std::fs::write("/sys/module/fuse/parameters/enable_uring", "Y").unwrap();
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(SIZE).unwrap();
    for transport in [Transport::Device, Transport::Uring] {
        let null = NullConfig {
            size: SIZE,
            ..NullConfig::default()
        };
        let node = open_null(&null).unwrap();
        let allocated = allocations(node, transport, reads_and_writes);
        assert_eq!(allocated, 0, "null, {transport:?}");
        for direct in [false, true] {
            let config = FileConfig {
                filename: image.path().to_owned(),
                direct,
                ..FileConfig::default()
            };
            let node = open_file(&config).unwrap();
            let allocated = allocations(node, transport, reads_and_writes);
            assert_eq!(allocated, 0, "file, cache.direct={direct}, {transport:?}");
        }
    }
}
