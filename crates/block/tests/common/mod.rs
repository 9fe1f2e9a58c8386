//! What the tests of disks share: rings of both kinds, temporary images on a real file system, loop devices, and the
//! tools of QEMU. Everything is undone also when a test fails.

#![allow(dead_code)]

use std::future::Future;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::{Duration, Instant};

use diskfuse_block::drivers::{FileConfig, FileNode, open_file};
use diskfuse_block::{Node, Result, io};
use diskfuse_ring::{Buf, Choice, Config, IoThread, Polling, Reply, Ring};

/// Both ways to the kernel.
pub const BACKENDS: [Choice; 2] = [Choice::Uring, Choice::Epoll];

/// Longer than anything here takes.
pub const LIMIT: Duration = Duration::from_secs(60);

pub fn config(choice: Choice) -> Config {
    Config {
        choice,
        polling: Polling::OFF,
    }
}

/// Runs a future on a ring of its own.
pub fn run<F: Future>(choice: Choice, future: F) -> F::Output {
    Ring::new(&config(choice)).unwrap().block_on(future)
}

pub fn threads(choice: Choice, count: usize) -> Vec<IoThread> {
    let spawn = |n| IoThread::spawn(&format!("test-{n}"), config(choice)).unwrap();
    (0..count).map(spawn).collect()
}

pub fn wait<T>(reply: Reply<T>) -> T {
    let Ok(answer) = reply.wait_for(LIMIT) else {
        panic!("no answer in {LIMIT:?}");
    };
    answer.unwrap()
}

/// A directory on the file system that the build is on (a disk, not memory).
pub fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

pub fn image(dir: &tempfile::TempDir, name: &str, bytes: &[u8]) -> PathBuf {
    let path = dir.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

pub fn file_config(path: &Path) -> FileConfig {
    FileConfig {
        filename: path.to_owned(),
        ..FileConfig::default()
    }
}

pub fn open(path: &Path) -> Arc<FileNode> {
    open_file(&file_config(path)).unwrap()
}

/// The message of something that must fail.
pub fn message<T>(result: Result<T>) -> String {
    match result {
        Ok(_) => panic!("it worked"),
        Err(error) => error.to_string(),
    }
}

/// A buffer whose window holds `bytes`, its first byte `skew` bytes into a page.
pub fn buffer(bytes: &[u8], skew: usize) -> Buf {
    let mut buf = Buf::new(skew + bytes.len().max(1)).unwrap();
    buf.set_window(skew..skew + bytes.len());
    buf.as_mut_slice().copy_from_slice(bytes);
    buf
}

pub async fn write(node: &dyn Node, offset: u64, bytes: &[u8]) -> Result<()> {
    io::write(node, offset, buffer(bytes, 0)).await.0
}

pub async fn read(node: &dyn Node, offset: u64, len: usize) -> Result<Vec<u8>> {
    // What was in the buffer before must not show.
    let (result, buf) = io::read(node, offset, buffer(&vec![0xEE; len], 0)).await;
    result.map(|()| buf.as_slice().to_vec())
}

/// Runs a tool, which must be there.
pub fn tool(program: &str, args: &[&str]) -> Output {
    let output = Command::new("timeout")
        .arg("30")
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

/// Runs qemu-io on a raw image: whether it worked, and all that it said.
pub fn qemu_io(path: &Path, args: &[&str]) -> (bool, String) {
    let path = path.to_str().unwrap();
    let output = tool("qemu-io", &[&["-f", "raw"], args, &[path]].concat());
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    let failed = said.contains("Failed") || said.contains("rror");
    (output.status.success() && !failed, said)
}

/// A loop device over a file; detached when it goes.
pub struct Loop(pub PathBuf);

impl Loop {
    pub fn new(file: &Path, sector: u32) -> Self {
        let sector = sector.to_string();
        let file = file.to_str().unwrap();
        let args = ["--find", "--show", "--sector-size", &sector, file];
        Self(must("losetup", &args).into())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.0).status();
    }
}

/// A small ext4 of its own; unmounted when it goes.
pub struct SmallDisk {
    pub mountpoint: PathBuf,
    _device: Loop,
}

impl SmallDisk {
    pub fn new(dir: &tempfile::TempDir, bytes: u64) -> Self {
        let file = dir.path().join("small.ext4");
        std::fs::File::create(&file)
            .unwrap()
            .set_len(bytes)
            .unwrap();
        must(
            "mkfs.ext4",
            &["-q", "-F", "-m", "0", file.to_str().unwrap()],
        );
        let mountpoint = dir.path().join("small");
        std::fs::create_dir(&mountpoint).unwrap();
        let device = Loop::new(&file, 512);
        let from = device.0.to_str().unwrap().to_owned();
        must("mount", &[&from, mountpoint.to_str().unwrap()]);
        Self {
            mountpoint,
            _device: device,
        }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount")
            .arg("-l")
            .arg(&self.mountpoint)
            .status();
    }
}

/// Bytes that differ from place to place and from seed to seed.
pub fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..len).map(|_| next()).collect()
}

/// The bytes of the file that are locked, by anybody, as the kernel tells.
pub fn locked(path: &Path) -> Vec<u64> {
    let inode = format!(":{}", std::fs::metadata(path).unwrap().ino());
    let locks = std::fs::read_to_string("/proc/locks").unwrap();
    let mut bytes = Vec::new();
    for line in locks.lines() {
        let fields: Vec<_> = line.split_whitespace().collect();
        if fields[1] == "OFDLCK" && fields[5].ends_with(&inode) {
            assert_eq!(fields[3], "READ");
            let (first, last): (u64, u64) =
                (fields[6].parse().unwrap(), fields[7].parse().unwrap());
            bytes.extend(first..=last);
        }
    }
    bytes.sort_unstable();
    bytes
}

/// Waits until exactly these are locked. At once, but for a child of another test that has not reached its exec yet:
/// until then it has a copy of every descriptor, and keeps the locks of a file that was closed here.
pub fn expect_locked(path: &Path, expected: &[u64], when: &str) {
    let start = Instant::now();
    while locked(path) != expected {
        let found = locked(path);
        let late = start.elapsed() > Duration::from_secs(20);
        assert!(!late, "{when}: {found:?} are locked, not {expected:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
