//! The way of a request through this crate allocates nothing once it is warm. (The epoll loop hands file I/O to other
//! threads through queues that do allocate; that is its price, and not of this crate.)

#![allow(clippy::unwrap_used)]
#![allow(unsafe_code)]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use common::{directory, file_config, image, pattern, run};
use diskfuse_block::drivers::{FileConfig, RawConfig, open_file, open_raw};
use diskfuse_block::{Access, Extent, Node};
use diskfuse_ring::{Buf, Choice};

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: everything is the system allocator's; the counter is a plain cell without a destructor.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: as the caller promised.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: as the caller promised.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

async fn requests(node: &dyn Node, mut buf: Buf, count: u64) -> Buf {
    for n in 0..count {
        let (offset, access) = match n % 2 {
            0 => (n % 16 * 4096, Access::Read),
            _ => (n % 16 * 4096, Access::Write),
        };
        let Extent::Host {
            file, offset, len, ..
        } = node.resolve(access, offset, 4096)
        else {
            panic!("it is not plain");
        };
        assert_eq!(len, 4096);
        let result;
        (result, buf) = match access {
            Access::Read => file.read(offset, buf).await,
            Access::Write => file.write(offset, buf).await,
        };
        result.unwrap();
    }
    buf
}

#[test]
fn plain_reads_and_writes_allocate_nothing() {
    let dir = directory();
    let path = image(&dir, "hot.raw", &pattern(1 << 17, 1));
    for direct in [false, true] {
        let config = FileConfig {
            direct,
            ..file_config(&path)
        };
        let file = open_file(&config).unwrap();
        let part = RawConfig {
            offset: 4096,
            ..RawConfig::default()
        };
        let raw = open_raw(file, &part).unwrap();
        run(Choice::Uring, async {
            let buf = Buf::new(4096).unwrap();
            let buf = requests(&*raw, buf, 100).await;
            let before = ALLOCATIONS.get();
            assert!(before > 0, "nothing is counted");
            let buf = requests(&*raw, buf, 1000).await;
            assert_eq!(ALLOCATIONS.get(), before, "direct={direct}");
            drop(buf);
        });
    }
}
