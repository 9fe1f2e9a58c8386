//! Images as `qemu-img` makes them, opened on a disk of the test's.

use std::process::Command;
use std::sync::Arc;

use diskfuse_qcow2::node::{Children, Qcow2Config, Qcow2Node};
use diskfuse_ring::Buf;

use super::disk::Disk;

/// The bytes of an image as it is when it was made.
pub fn image(options: &str, size: &str) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("i");
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-o", options])
        .arg(&path)
        .arg(size)
        .status();
    let made = made.expect("qemu-img cannot be run: install qemu-utils");
    assert!(made.success());
    std::fs::read(&path).unwrap()
}

/// The image on a disk, which nothing is below.
pub async fn open(file: Arc<Disk>, config: &Qcow2Config) -> Arc<Qcow2Node> {
    let children = Children {
        file,
        data_file: None,
        backing: None,
    };
    Qcow2Node::open(children, config).await.unwrap()
}

/// A buffer of one byte over and over.
pub fn filled(len: u64, byte: u8) -> Buf {
    let mut buf = Buf::new(len as usize).unwrap();
    buf.as_mut_slice().fill(byte);
    buf
}
