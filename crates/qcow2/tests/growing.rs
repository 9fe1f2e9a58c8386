//! A disk becomes larger while it is used: what is written meanwhile, where the file grows and where the disk ended, is there
//! afterwards.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::pedantic)]

mod common;

use std::process::Command;

use common::disk::{Disk, Manners};
use common::log::{Op, Recorder};
use common::made::{filled, image, open};
use common::run::on_ring;
use diskfuse_block::{Node, Resize, Zeroes, io};
use diskfuse_qcow2::node::Qcow2Config;
use diskfuse_ring::{spawn, yield_now};

/// The L1 table of the larger disk needs a place behind everything, planned before the file is long enough. Meanwhile others
/// need a refcount block at the same place.
#[test]
fn what_is_written_while_the_l1_table_grows_is_there() {
    const LEN: u64 = 32 << 10;
    let manners = Manners {
        patience: 2,
        discarded: 0,
        read_only: false,
    };
    let bytes = image("cluster_size=512", "16M");
    let file = Disk::new(&Recorder::default(), 0, bytes, 1, manners);
    on_ring(async {
        let node = open(file.clone(), &Qcow2Config::default()).await;
        let put = async |n: u64| {
            let (result, _) = node.write(n * LEN, filled(LEN, n as u8 + 1)).await;
            result.unwrap();
        };
        put(0).await;
        // The disk of the host is slow to make the file longer.
        file.hold(|op| matches!(op, Op::Resize { .. }));
        let grown = spawn({
            let node = node.clone();
            async move { node.resize(8 << 30, Resize::Exactly, false).await }
        });
        while file.holding() == 0 {
            yield_now().await;
        }
        // There is room for these in the file as it is.
        for n in 1..20 {
            put(n).await;
        }
        file.release();
        grown.await.unwrap();
        for n in 20..200 {
            put(n).await;
        }
        node.flush().await.unwrap();
        for n in 0..200 {
            let (result, buf) = io::read(&*node, n * LEN, filled(LEN, 0)).await;
            result.unwrap();
            let same = buf.as_slice().iter().all(|&byte| byte == n as u8 + 1);
            assert!(same, "piece {n} is something else");
        }
        node.close().await.unwrap();
    });
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("i");
    std::fs::write(&path, file.bytes()).unwrap();
    let check = Command::new("qemu-img").arg("check").arg(&path).output();
    let check = check.unwrap();
    assert!(check.status.success(), "{check:?}");
}

/// The last cluster counts as whole when the disk ends in it, and does not any more when it ends later.
fn emptied_while_it_grows(discard: bool) {
    let file = Disk::quiet(image("compat=1.1", "1073745920"));
    on_ring(async {
        let config = Qcow2Config {
            discard: true,
            ..Qcow2Config::default()
        };
        let node = open(file, &config).await;
        let old = node.size();
        // Some of it has data, so that there is something to do.
        for at in [0, 1 << 29, old - 4096] {
            node.write(at, filled(4096, 1)).await.0.unwrap();
        }
        let emptied = spawn({
            let node = node.clone();
            async move {
                match discard {
                    true => node.discard(0, old).await,
                    false => node.write_zeroes(0, old, Zeroes::Keep).await,
                }
            }
        });
        yield_now().await;
        let grown = node.resize(old + 8192, Resize::Exactly, false).await;
        grown.unwrap();
        node.write(old, filled(4096, 7)).await.0.unwrap();
        node.flush().await.unwrap();
        emptied.await.unwrap();
        let (result, buf) = io::read(&*node, old, filled(4096, 0)).await;
        result.unwrap();
        let there = buf.as_slice().iter().all(|&byte| byte == 7);
        assert!(there, "what was flushed past the range is gone");
    });
}

#[test]
fn zeroes_end_where_they_were_told_to() {
    emptied_while_it_grows(false);
}

#[test]
fn a_discard_ends_where_it_was_told_to() {
    emptied_while_it_grows(true);
}

/// On a disk that ends within a cluster what is left is emptied by the tables, without writing.
#[test]
fn the_last_cluster_of_a_disk_counts_as_whole() {
    let file = Disk::quiet(image("compat=1.1", "1073745920"));
    on_ring(async {
        let config = Qcow2Config {
            discard: true,
            ..Qcow2Config::default()
        };
        let node = open(file, &config).await;
        let size = node.size();
        let cluster = size / 65536 * 65536;
        node.write(cluster, filled(size - cluster, 1))
            .await
            .0
            .unwrap();
        let zeroed = node
            .write_zeroes(cluster, size - cluster, Zeroes::MayUnmap)
            .await;
        zeroed.unwrap();
        let status = node.layer_status(cluster, size - cluster).await.unwrap();
        assert_eq!(status.host_offset, None, "it has a place");
    });
}
