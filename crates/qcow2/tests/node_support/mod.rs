//! What the tests of the data path share: rings, temporary images on a real file system, QEMU's tools, and a model of a
//! disk. Everything is undone also when a test fails.

#![allow(dead_code)]

use std::future::Future;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::Duration;

use diskfuse_block::drivers::{Discard, FileConfig, open_file};
use diskfuse_block::{Node, Result, io};
use diskfuse_qcow2::node::{Children, Qcow2Config, Qcow2Node};
use diskfuse_ring::{Buf, Choice, Config, IoThread, Polling, Reply, Ring};

/// Longer than anything here takes.
pub const LIMIT: Duration = Duration::from_secs(120);

pub const KIB: u64 = 1 << 10;
pub const MIB: u64 = 1 << 20;

pub fn config() -> Config {
    Config {
        choice: Choice::Uring,
        polling: Polling::OFF,
    }
}

/// Runs a future on a ring of its own.
pub fn run<F: Future>(future: F) -> F::Output {
    Ring::new(&config()).unwrap().block_on(future)
}

pub fn threads(count: usize) -> Vec<IoThread> {
    let spawn = |n| IoThread::spawn(&format!("test-{n}"), config()).unwrap();
    (0..count).map(spawn).collect()
}

pub fn wait<T>(reply: Reply<T>) -> T {
    let Ok(answer) = reply.wait_for(LIMIT) else {
        panic!("no answer in {LIMIT:?}");
    };
    answer.unwrap()
}

/// A directory on the file system that the build is on.
pub fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// A host file as a node, direct or through the page cache.
pub fn file(path: &Path, direct: bool) -> Arc<dyn Node> {
    let config = FileConfig {
        filename: path.to_owned(),
        direct,
        discard: Discard::Unmap,
        ..FileConfig::default()
    };
    open_file(&config).unwrap()
}

pub fn children(path: &Path) -> Children {
    Children {
        file: file(path, false),
        data_file: None,
        backing: None,
    }
}

pub async fn open(path: &Path) -> Arc<Qcow2Node> {
    open_with(path, &Qcow2Config::default()).await
}

pub async fn open_with(path: &Path, config: &Qcow2Config) -> Arc<Qcow2Node> {
    Qcow2Node::open(children(path), config).await.unwrap()
}

/// Opens an overlay on a raw or qcow2 backing node.
pub async fn open_over(
    path: &Path,
    backing: Arc<dyn Node>,
    config: &Qcow2Config,
) -> Arc<Qcow2Node> {
    let children = Children {
        backing: Some(backing),
        ..children(path)
    };
    Qcow2Node::open(children, config).await.unwrap()
}

/// A buffer whose window holds `bytes`.
pub fn buffer(bytes: &[u8]) -> Buf {
    let mut buf = Buf::new(bytes.len().max(1)).unwrap();
    buf.set_window(0..bytes.len());
    buf.as_mut_slice().copy_from_slice(bytes);
    buf
}

pub async fn write(node: &dyn Node, offset: u64, bytes: &[u8]) -> Result<()> {
    io::write(node, offset, buffer(bytes)).await.0
}

pub async fn read(node: &dyn Node, offset: u64, len: usize) -> Result<Vec<u8>> {
    // What was in the buffer before must not show.
    let (result, buf) = io::read(node, offset, buffer(&vec![0xEE; len])).await;
    result.map(|()| buf.as_slice().to_vec())
}

/// The whole disk, read in pieces of `piece` bytes.
pub async fn contents(node: &dyn Node, piece: usize) -> Vec<u8> {
    let mut all = Vec::new();
    while (all.len() as u64) < node.size() {
        let left = (node.size() - all.len() as u64) as usize;
        all.extend(read(node, all.len() as u64, piece.min(left)).await.unwrap());
    }
    all
}

/// Runs a tool, which must be there.
pub fn tool(program: &str, args: &[&str]) -> Output {
    let output = Command::new("timeout")
        .arg("60")
        .arg(program)
        .args(args)
        .output();
    let output = output.unwrap_or_else(|e| panic!("cannot run timeout(1): {e}"));
    let missing = output.status.code() == Some(127);
    assert!(!missing, "{program} is missing: install it, see the README");
    output
}

/// Runs a tool, which must succeed, and returns what it printed.
pub fn must(program: &str, args: &[&str]) -> String {
    let output = tool(program, args);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{program} {args:?}: {said}");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Makes an image with `qemu-img create`.
pub fn create(dir: &tempfile::TempDir, name: &str, options: &str, size: u64) -> PathBuf {
    let path = dir.path().join(name);
    let mut args = vec!["create", "-q", "-f", "qcow2"];
    if !options.is_empty() {
        args.extend(["-o", options]);
    }
    let size = size.to_string();
    args.extend([text(&path), &size]);
    must("qemu-img", &args);
    path
}

/// Runs commands of qemu-io on an image, all of which must work.
pub fn qemu_io(path: &Path, format: &str, commands: &[String]) {
    let mut args = vec!["-f", format];
    for command in commands {
        args.extend(["-c", command]);
    }
    args.push(text(path));
    let output = tool("qemu-io", &args);
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    let failed = said.contains("failed") || said.contains("rror");
    assert!(output.status.success() && !failed, "{commands:?}: {said}");
}

/// What qemu-img takes the image's disk for.
pub fn converted(path: &Path) -> Vec<u8> {
    let raw = path.with_extension("raw-copy");
    must(
        "qemu-img",
        &[
            "convert",
            "-f",
            "qcow2",
            "-O",
            "raw",
            text(path),
            text(&raw),
        ],
    );
    let bytes = std::fs::read(&raw).unwrap();
    std::fs::remove_file(&raw).unwrap();
    bytes
}

/// Nothing wrong with the image, and nothing leaked.
pub fn assert_clean(path: &Path) {
    let output = tool("qemu-img", &["check", "-f", "qcow2", text(path)]);
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    assert!(output.status.success(), "qemu-img check: {said}");
}

/// Panics with the first difference rather than with megabytes.
pub fn assert_same(ours: &[u8], theirs: &[u8], what: &str) {
    assert_eq!(ours.len(), theirs.len(), "{what}: the sizes");
    if let Some(at) = (0..ours.len()).find(|&at| ours[at] != theirs[at]) {
        let (a, b) = (ours[at], theirs[at]);
        panic!("{what}: byte {at} ({at:#x}) is {a:#x} and should be {b:#x}");
    }
}

/// A sequence of numbers that is the same for the same seed.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        println!("seed {seed}");
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 16
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// A range of a disk: often aligned, mostly short.
    pub fn range(&mut self, size: u64, most: u64) -> (u64, u64) {
        let unit = [1, 512, 4096, 65536][self.below(4) as usize].min(size);
        let offset = self.below(size) / unit * unit;
        let len = (1 + self.below(most)).next_multiple_of(unit);
        (offset, len.min(size - offset))
    }
}

/// Bytes that differ from place to place and from seed to seed, and can be compressed.
pub fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut random = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let byte = (random >> 32) as u8;
        bytes.extend(std::iter::repeat_n(byte | 1, 1 + (random >> 60) as usize));
    }
    bytes.truncate(len);
    bytes
}
