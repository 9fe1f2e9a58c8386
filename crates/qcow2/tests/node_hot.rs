//! The hot path resolves without allocating, and says what is in place and what is work.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::pedantic)]
#![allow(unsafe_code)]

mod node_support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use diskfuse_block::{Access, Extent, Node};
use node_support::*;

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

#[test]
fn a_hot_range_is_resolved_without_allocating() {
    let dir = directory();
    for options in ["", "extended_l2=on"] {
        let path = create(&dir, "hot.qcow2", options, 64 * MIB);
        qemu_io(&path, "qcow2", &["write -P 7 0 64M".to_owned()]);
        run(async {
            let node = open(&path).await;
            // Loads the tables and makes the image ready.
            contents(&*node, MIB as usize).await;
            write(&*node, 0, &[7; 4096]).await.unwrap();
            let before = ALLOCATIONS.get();
            assert!(before > 0, "nothing is counted");
            for n in 0..10_000u64 {
                let at = n * 7919 % 16384 * 4096;
                let access = [Access::Read, Access::Write][(n % 2) as usize];
                let Extent::Host { len, hold, .. } = node.resolve(access, at, 4096) else {
                    let status = node.layer_status(at, 4096).await;
                    panic!("{options}: {access:?} at {at} is work: {status:?}");
                };
                assert_eq!(len, 4096);
                assert!(!hold.is_none());
            }
            assert_eq!(ALLOCATIONS.get(), before, "{options}");
        });
    }
}

#[test]
fn neighbours_are_one_range() {
    let dir = directory();
    let path = create(&dir, "hot.qcow2", "preallocation=metadata", 64 * MIB);
    run(async {
        let node = open(&path).await;
        contents(&*node, MIB as usize).await;
        let Extent::Host { len, .. } = node.resolve(Access::Read, 4096, 32 * MIB) else {
            panic!("it is work");
        };
        assert_eq!(len, 32 * MIB);
        // The first write makes the image ready, so it is work.
        assert!(matches!(
            node.resolve(Access::Write, 0, 4096),
            Extent::Work { len: 4096 }
        ));
        write(&*node, 0, &[7; 512]).await.unwrap();
        assert!(matches!(
            node.resolve(Access::Write, 0, 4096),
            Extent::Host { len: 4096, .. }
        ));
    });
}
