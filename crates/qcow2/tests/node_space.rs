//! Space that is given up and space that is not there: a place is not used again while somebody moves its bytes, and a
//! full disk is an error that passes.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::pedantic)]

mod node_support;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use diskfuse_block::{
    Access, BlockStatus, Error, Extent, Limits, LocalFuture, Node, Resize, Result, Zeroes,
};
use diskfuse_qcow2::node::{Children, Qcow2Config, Qcow2Node};
use diskfuse_ring::Buf;
use node_support::*;

#[test]
fn a_discarded_cluster_is_not_reused_while_a_reader_is_at_it() {
    let dir = directory();
    let path = create(&dir, "image.qcow2", "", 32 * MIB);
    let config = Qcow2Config {
        discard: true,
        pass_discard_request: Some(false),
        ..Qcow2Config::default()
    };
    run(async {
        let node = open_with(&path, &config).await;
        write(&*node, 0, &vec![7; MIB as usize]).await.unwrap();
        node.flush().await.unwrap();
        let Extent::Host {
            file,
            offset,
            len,
            hold,
        } = node.resolve(Access::Read, 0, MIB)
        else {
            panic!("it is work");
        };
        assert_eq!(len, MIB);
        node.discard(0, MIB).await.unwrap();
        node.flush().await.unwrap();
        write(&*node, 4 * MIB, &vec![8; 4 * MIB as usize])
            .await
            .unwrap();
        node.flush().await.unwrap();
        write(&*node, 8 * MIB, &vec![8; 4 * MIB as usize])
            .await
            .unwrap();
        let (result, buf) = file.read(offset, buffer(&vec![0; MIB as usize])).await;
        result.unwrap();
        assert!(
            buf.as_slice().iter().all(|&byte| byte == 7),
            "it was overwritten"
        );
        let place = offset;
        drop(hold);
        // Now it is free, after a flush or two: the file does not grow for as much.
        node.flush().await.unwrap();
        node.flush().await.unwrap();
        let mut reused = false;
        for at in (12..20).map(|n| n * MIB) {
            write(&*node, at, &vec![9; MIB as usize]).await.unwrap();
            let status = node.layer_status(at, MIB).await.unwrap();
            let host = status.host_offset.unwrap();
            reused |= (place..place + MIB).contains(&host);
        }
        assert!(reused, "it was never used again");
        node.close().await.unwrap();
    });
    assert_clean(&path);
}

/// A file that cannot grow past a limit.
struct Bounded {
    below: Arc<dyn Node>,
    limit: AtomicU64,
}

impl Node for Bounded {
    fn driver(&self) -> &'static str {
        "bounded"
    }

    fn size(&self) -> u64 {
        self.below.size()
    }

    fn read_only(&self) -> bool {
        false
    }

    fn limits(&self) -> Limits {
        self.below.limits()
    }

    fn allocated(&self) -> u64 {
        self.below.allocated()
    }

    fn filename(&self) -> Option<String> {
        self.below.filename()
    }

    fn resolve(&self, access: Access, offset: u64, len: u64) -> Extent<'_> {
        self.below.resolve(access, offset, len)
    }

    fn read(&self, offset: u64, buf: Buf) -> LocalFuture<'_, (Result<()>, Buf)> {
        self.below.read(offset, buf)
    }

    fn write(&self, offset: u64, buf: Buf) -> LocalFuture<'_, (Result<()>, Buf)> {
        self.below.write(offset, buf)
    }

    fn write_zeroes(&self, offset: u64, len: u64, how: Zeroes) -> LocalFuture<'_, Result<()>> {
        self.below.write_zeroes(offset, len, how)
    }

    fn discard(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<()>> {
        self.below.discard(offset, len)
    }

    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        self.below.flush()
    }

    fn resize(&self, size: u64, how: Resize, preallocate: bool) -> LocalFuture<'_, Result<()>> {
        if size > self.limit.load(Ordering::SeqCst) && size > self.size() {
            let full = std::io::Error::from_raw_os_error(28);
            let error = Error::os("resize the bounded file", full);
            return Box::pin(std::future::ready(Err(error)));
        }
        self.below.resize(size, how, preallocate)
    }

    fn block_status(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<BlockStatus>> {
        self.below.block_status(offset, len)
    }
}

#[test]
fn a_full_disk_is_told_and_writing_goes_on_when_there_is_room() {
    let dir = directory();
    for options in ["", "cluster_size=4k", "extended_l2=on"] {
        let path = create(&dir, "image.qcow2", options, 32 * MIB);
        let bounded = Arc::new(Bounded {
            below: file(&path, false),
            limit: AtomicU64::new(5 * MIB),
        });
        let children = Children {
            file: Arc::clone(&bounded) as Arc<dyn Node>,
            data_file: None,
            backing: None,
        };
        let config = Qcow2Config {
            discard: true,
            ..Qcow2Config::default()
        };
        let mut model = vec![0; 32 * MIB as usize];
        run(async {
            let node = Qcow2Node::open(children, &config).await.unwrap();
            let mut failed = 0;
            for n in 0..16 {
                let bytes = vec![n + 1; MIB as usize];
                let at = u64::from(n) * 2 * MIB + 1000;
                match write(&*node, at, &bytes).await {
                    Ok(()) => model[at as usize..][..bytes.len()].copy_from_slice(&bytes),
                    Err(error) => {
                        assert_eq!(error.errno(), 28, "{error}");
                        failed += 1;
                        // Some of it may be there.
                        let now = read(&*node, at, bytes.len()).await.unwrap();
                        assert!(now.iter().all(|&byte| byte == 0 || byte == n + 1));
                        model[at as usize..][..bytes.len()].copy_from_slice(&now);
                    }
                }
            }
            assert!((8..16).contains(&failed), "{failed} writes failed");
            node.flush().await.unwrap();
            assert_same(&contents(&*node, 65536).await, &model, "while it is full");
            // What is given up makes room, in the file as it is.
            node.discard(0, 2 * MIB).await.unwrap();
            model[..2 * MIB as usize].fill(0);
            node.flush().await.unwrap();
            node.flush().await.unwrap();
            write(&*node, 30 * MIB, &vec![99; 65536]).await.unwrap();
            model[30 * MIB as usize..][..65536].fill(99);
            // And so does a larger disk.
            bounded.limit.store(64 * MIB, Ordering::SeqCst);
            write(&*node, 20 * MIB, &vec![98; 3 * MIB as usize])
                .await
                .unwrap();
            model[20 * MIB as usize..][..3 * MIB as usize].fill(98);
            assert_same(&contents(&*node, 65536).await, &model, "with room");
            node.close().await.unwrap();
        });
        assert_clean(&path);
        assert_same(&converted(&path), &model, "read by QEMU");
    }
}

#[test]
fn a_small_write_to_an_empty_image_writes_little() {
    let dir = directory();
    let path = create(&dir, "image.qcow2", "", 1024 * MIB);
    run(async {
        let node = open(&path).await;
        for n in 0..64u64 {
            write(&*node, n * 8 * MIB + 4096, &[7; 4096]).await.unwrap();
        }
        node.flush().await.unwrap();
        let used = node.allocated();
        assert!(
            used < 64 * 3 * 4096 + 512 * KIB,
            "{used} bytes for 64 pages"
        );
        node.close().await.unwrap();
    });
    assert_clean(&path);
}

#[test]
fn a_disk_of_a_terabyte_is_discarded_at_once() {
    let dir = directory();
    let path = create(&dir, "image.qcow2", "", 1 << 40);
    let config = Qcow2Config {
        discard: true,
        ..Qcow2Config::default()
    };
    run(async {
        let node = open_with(&path, &config).await;
        write(&*node, 1 << 39, &vec![7; 65536]).await.unwrap();
        let start = std::time::Instant::now();
        node.discard(0, 1 << 40).await.unwrap();
        node.write_zeroes(0, 1 << 40, Zeroes::MayUnmap)
            .await
            .unwrap();
        assert!(start.elapsed().as_secs() < 5, "{:?}", start.elapsed());
        assert_eq!(read(&*node, 1 << 39, 512).await.unwrap(), [0; 512]);
        node.close().await.unwrap();
    });
    assert_clean(&path);
}
