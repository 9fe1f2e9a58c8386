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
    AllowOther, DEFAULT_MAX_BACKGROUND, Entry, Export, ExportOptions, Ownership, Passthrough,
    Transport, TransportOptions, Watch, When,
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

/// What is mounted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shape {
    File,
    /// A file in a directory.
    Tree,
}

/// Serves `node` with one queue, runs `work` on the open file, and returns the least that a repetition allocated.
fn allocations(
    node: Arc<dyn Node>,
    transport: Transport,
    shape: Shape,
    work: impl Fn(&File),
) -> u64 {
    let folder = tempfile::tempdir().unwrap();
    let mountpoint = folder.path().join("mountpoint");
    match shape {
        Shape::File => drop(File::create(&mountpoint).unwrap()),
        Shape::Tree => std::fs::create_dir(&mountpoint).unwrap(),
    }
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
        ownership: Ownership::default(),
        max_background: DEFAULT_MAX_BACKGROUND,
        transport: TransportOptions {
            transport,
            ..TransportOptions::default()
        },
        passthrough: Passthrough::Off,
    };
    let mailboxes = [thread.mailbox().clone()];
    // Dropped at the end, also of a failure: then nothing stays mounted.
    let on_end = Box::new(|_| ());
    let export = match shape {
        Shape::File => Export::start(options, &graph, "node", &mailboxes, on_end),
        Shape::Tree => {
            let entry = Entry::Node {
                node: "node".into(),
                writable: true,
                watch: Some(Watch::new(When::Synced, vec![0..512, SIZE - 512..SIZE])),
            };
            let root = vec![("p1".into(), entry)];
            Export::start_tree(options, &graph, root, None, &mailboxes, on_end)
        }
    };
    let export = export.unwrap();
    let path = match shape {
        Shape::File => mountpoint.clone(),
        Shape::Tree => mountpoint.join("p1"),
    };
    let file = File::options().read(true).write(true).open(&path).unwrap();
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
    let on = [Transport::Device, Transport::Uring];
    let shapes = [Shape::File, Shape::Tree];
    for (transport, shape) in on.iter().flat_map(|&t| shapes.map(|shape| (t, shape))) {
        let null = NullConfig {
            size: SIZE,
            ..NullConfig::default()
        };
        let node = open_null(&null).unwrap();
        let allocated = allocations(node, transport, shape, reads_and_writes);
        assert_eq!(allocated, 0, "null, {transport:?}, {shape:?}");
        for direct in [false, true] {
            let config = FileConfig {
                filename: image.path().to_owned(),
                direct,
                ..FileConfig::default()
            };
            let node = open_file(&config).unwrap();
            let allocated = allocations(node, transport, shape, reads_and_writes);
            assert_eq!(
                allocated, 0,
                "file, cache.direct={direct}, {transport:?}, {shape:?}"
            );
        }
    }
}
