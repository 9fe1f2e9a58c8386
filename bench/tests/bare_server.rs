//! The bare server on a real mount: what is read, what a write does, how it ends. Needs root and `/dev/fuse`.

// A test stops at its first failure.
#![allow(clippy::unwrap_used)]

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::process::{Pid, Signal, kill_process};

const SIZE: u64 = 10 << 20;
const LIMIT: Duration = Duration::from_secs(20);

/// A server that is killed, and its mount taken away, whatever happens to the test.
struct Server<'a> {
    child: Child,
    point: &'a Path,
}

impl<'a> Server<'a> {
    fn start(transport: &str, threads: u32, point: &'a Path) -> Self {
        fs::write(point, b"below").unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_xtask"))
            .args(["bare-server", "--transport", transport])
            .args(["--threads", &threads.to_string()])
            .args(["--size", &SIZE.to_string()])
            .arg("--mountpoint")
            .arg(point)
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        Self { child, point }
    }

    fn wait_until_usable(&mut self) {
        let deadline = Instant::now() + LIMIT;
        while fs::metadata(self.point).map_or(0, |metadata| metadata.len()) != SIZE {
            assert!(Instant::now() < deadline, "not usable within {LIMIT:?}");
            assert!(self.child.try_wait().unwrap().is_none(), "it has ended");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn end(&mut self) -> ExitStatus {
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "no end within {LIMIT:?}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn terminate(&mut self) -> ExitStatus {
        kill_process(Pid::from_child(&self.child), Signal::TERM).unwrap();
        self.end()
    }
}

impl Drop for Server<'_> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = rustix::mount::unmount(self.point, rustix::mount::UnmountFlags::DETACH);
    }
}

/// Several callers at once, each with reads and writes of all sizes, then the ends of the file.
fn use_it(point: &Path) {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(point)
        .unwrap();
    std::thread::scope(|scope| {
        for caller in 0..4u64 {
            let file = &file;
            scope.spawn(move || {
                for number in 0..200u64 {
                    let length = 512usize << (number % 12);
                    let offset = (caller * 200 + number) * 4096;
                    let mut buffer = vec![0x55; length];
                    assert_eq!(file.write_at(&buffer, offset).unwrap(), length);
                    assert_eq!(file.read_at(&mut buffer, offset).unwrap(), length);
                }
            });
        }
    });
    file.sync_all().unwrap();
    let mut buffer = [0; 8192];
    assert_eq!(file.read_at(&mut buffer, SIZE - 100).unwrap(), 100);
    assert_eq!(file.read_at(&mut buffer, SIZE).unwrap(), 0);
}

fn serves_and_ends_by_sigterm(transport: &str) {
    let directory = tempfile::tempdir().unwrap();
    let point = directory.path().join("export");
    for threads in [1, 3] {
        let mut server = Server::start(transport, threads, &point);
        server.wait_until_usable();
        use_it(&point);
        // Open while it ends: the file must then fail, and not hang.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let open = rustix::fs::openat(CWD, &point, flags, Mode::empty()).unwrap();
        assert!(server.terminate().success());
        assert!(rustix::io::pread(&open, &mut [0; 512], 0).is_err());
        assert_eq!(fs::read(&point).unwrap(), b"below", "still mounted");
    }
}

#[test]
fn the_device_serves_and_ends_by_sigterm() {
    serves_and_ends_by_sigterm("device");
}

/// Where FUSE over io_uring is switched off (a setting of the whole machine, which a test must not change), the server has
/// to say how to switch it on.
#[test]
fn io_uring_serves_and_ends_by_sigterm_or_says_what_it_needs() {
    let switch = "/sys/module/fuse/parameters/enable_uring";
    if fs::read_to_string(switch).is_ok_and(|value| value.trim() == "Y") {
        return serves_and_ends_by_sigterm("uring");
    }
    let directory = tempfile::tempdir().unwrap();
    let point = directory.path().join("export");
    fs::write(&point, b"below").unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(["bare-server", "--transport", "uring", "--size", "4096"])
        .arg("--mountpoint")
        .arg(&point)
        .output()
        .unwrap();
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && message.contains(switch),
        "{message}"
    );
    assert_eq!(fs::read(&point).unwrap(), b"below", "still mounted");
}

#[test]
fn it_ends_when_somebody_else_unmounts() {
    let directory = tempfile::tempdir().unwrap();
    let point = directory.path().join("export");
    let mut server = Server::start("device", 2, &point);
    server.wait_until_usable();
    rustix::mount::unmount(&point, rustix::mount::UnmountFlags::empty()).unwrap();
    assert!(server.end().success());
}

#[test]
fn a_directory_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(["bare-server", "--transport", "device", "--size", "4096"])
        .arg("--mountpoint")
        .arg(directory.path())
        .output()
        .unwrap();
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(message.contains("not a regular file"), "{message}");
}
