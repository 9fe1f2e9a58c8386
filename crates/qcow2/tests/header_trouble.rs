//! The flush behind a change of the header fails once, as with O_DIRECT, and life goes on: what is flushed later is there when the
//! image is opened again, whichever header had reached the disk.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::pedantic)]

mod common;

use std::sync::atomic::{AtomicBool, Ordering};

use common::disk::Disk;
use common::log::Op;
use common::made::{filled, image, open};
use common::run::on_ring;
use diskfuse_block::{Node, Resize, io};
use diskfuse_qcow2::node::Qcow2Config;

/// Tries to resize a disk of 16 MiB, and then writes at 12 MiB.
fn resized_in_vain(size: u64) {
    const AT: u64 = 12 << 20;
    let file = Disk::quiet(image("cluster_size=512", "16M"));
    on_ring(async {
        let node = open(file.clone(), &Qcow2Config::default()).await;
        let put = async |at, byte| {
            node.write(at, filled(4096, byte)).await.0.unwrap();
            node.flush().await.unwrap();
        };
        put(0, 1).await;
        let header = AtomicBool::new(false);
        file.fail(move |op| match op {
            Op::Write { offset: 0, .. } => {
                header.store(true, Ordering::SeqCst);
                None
            }
            Op::Flush if header.swap(false, Ordering::SeqCst) => Some(libc::EIO),
            _ => None,
        });
        let resized = node.resize(size, Resize::Exactly, false).await;
        assert!(resized.is_err());
        assert_eq!(node.size(), 16 << 20);
        file.heal();
        put(AT, 7).await;
        // The process ends here.
        let later = open(Disk::quiet(file.bytes()), &Qcow2Config::default()).await;
        assert_eq!(later.size(), 16 << 20);
        let (result, buf) = io::read(&*later, AT, filled(4096, 0)).await;
        result.unwrap();
        let there = buf.as_slice().iter().all(|&byte| byte == 7);
        assert!(there, "what was flushed is gone");
    });
}

#[test]
fn after_growth_in_vain_what_is_flushed_is_there() {
    resized_in_vain(1 << 30);
}

#[test]
fn after_a_cut_in_vain_what_is_flushed_is_there() {
    resized_in_vain(4 << 20);
}
