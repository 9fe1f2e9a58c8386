//! The size of a file changes while somebody writes it: what was answered is there, and the size is the file's.

#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use common::{BACKENDS, buffer, directory, file_config, image, pattern, run};
use diskfuse_block::drivers::{FileConfig, FileNode, open_file};
use diskfuse_block::{Aio, Node, Resize, io};
use diskfuse_ring::{Choice, spawn, yield_now};

/// Longer than the kernel takes for a small write.
const A_WHILE: Duration = Duration::from_millis(200);

fn each_way(path: &Path, test: impl Fn(Choice, Arc<FileNode>)) {
    let bytes = std::fs::read(path).unwrap();
    for choice in BACKENDS {
        for (direct, aio) in [
            (false, Aio::IoUring),
            (false, Aio::Threads),
            (true, Aio::IoUring),
        ] {
            std::fs::write(path, &bytes).unwrap();
            let config = FileConfig {
                direct,
                aio,
                ..file_config(path)
            };
            test(choice, open_file(&config).unwrap());
        }
    }
}

/// Writes, and lets another thread change the size when the kernel has done that and this thread has not seen it.
fn write_while_resized(
    choice: Choice,
    node: &Arc<FileNode>,
    (at, data): (u64, &[u8]),
    size: u64,
    how: Resize,
) {
    let (writer, other) = (Arc::clone(node), Arc::clone(node));
    let buf = buffer(data, 0);
    let resized: JoinHandle<()> = run(choice, async {
        let write = spawn(async move { io::write(&*writer, at, buf).await.0 });
        yield_now().await;
        let resized = std::thread::spawn(move || {
            std::thread::sleep(A_WHILE / 2);
            run(choice, other.resize(size, how, false)).unwrap();
        });
        std::thread::sleep(A_WHILE);
        write.await.unwrap();
        resized
    });
    resized.join().unwrap();
}

#[test]
fn a_write_into_the_last_part_of_a_sector_survives_growth() {
    let dir = directory();
    let path = image(&dir, "ragged.raw", &pattern(1000, 1));
    each_way(&path, |choice, node| {
        assert_eq!(node.size(), 1024);
        let data = [0xab; 512];
        write_while_resized(choice, &node, (512, &data), 8192, Resize::AtLeast);
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(bytes.len(), 8192);
        let lost = bytes[512..1024].iter().filter(|&&b| b != 0xab).count();
        assert_eq!(lost, 0, "{choice:?}");
    });
}

#[test]
fn a_file_that_is_cut_while_it_is_written_has_the_size_that_it_was_cut_to() {
    let dir = directory();
    let path = image(&dir, "whole.raw", &pattern(1 << 20, 1));
    each_way(&path, |choice, node| {
        let data = [0xab; 4096];
        write_while_resized(choice, &node, (512 << 10, &data), 4096, Resize::Exactly);
        assert_eq!(node.size(), 4096, "{choice:?}");
        assert_eq!(path.metadata().unwrap().len(), 4096);
        run(choice, async {
            node.resize(16384, Resize::AtLeast, false).await.unwrap();
            let (read, buf) = io::read(&*node, 8192, buffer(&[1; 4096], 0)).await;
            read.unwrap();
            assert!(buf.as_slice().iter().all(|&byte| byte == 0));
        });
    });
}
