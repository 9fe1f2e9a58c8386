//! A daemon in the foreground: started, waited for, ended, its mounts taken away. Every wait has a limit.

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::mounts;
use crate::tool::{Output, Running, Tool};

/// How long it may take until everything is mounted.
const START: Duration = Duration::from_secs(20);
/// How long it may take to end after SIGTERM. Each end flushes the image, which beside a heavy writer on the same disk takes
/// long; what users are promised of an end is asserted where that is tested.
const STOP: Duration = Duration::from_secs(20);
/// How often a wait looks again.
const TICK: Duration = Duration::from_millis(1);

/// What is to be started.
pub(crate) struct Launch {
    pub(crate) tool: Tool,
    pub(crate) mountpoints: Vec<PathBuf>,
}

/// A running daemon. Dropping it ends it and takes away what it left mounted.
pub struct Daemon {
    running: Option<Running>,
    mountpoints: Vec<PathBuf>,
    /// From exec until everything was mounted.
    pub started_in: Duration,
}

/// How a daemon ended.
#[derive(Debug)]
pub struct Ended {
    /// Its exit code and its words.
    pub output: Output,
    /// From the signal until it was gone.
    pub time: Duration,
}

impl Daemon {
    #[track_caller]
    pub(crate) fn start(launch: Launch) -> Self {
        let Launch { tool, mountpoints } = launch;
        let began = Instant::now();
        let mut daemon = Self {
            running: Some(tool.start()),
            mountpoints,
            started_in: Duration::ZERO,
        };
        daemon.wait_until_mounted(began);
        daemon.started_in = began.elapsed();
        daemon
    }

    /// Requests wait in the kernel from the moment when the mount is there, so that is enough.
    #[track_caller]
    fn wait_until_mounted(&mut self, began: Instant) {
        let is_ours = |path: &PathBuf| mounts::at(path).is_some_and(|m| m.kind == "fuse.diskfuse");
        while !self.mountpoints.iter().all(is_ours) {
            if !self.running().is_alive() {
                let output = self.running.take().expect("running").finish(STOP);
                panic!("the daemon ended before it was usable: {output}");
            }
            let said = self.running().stderr();
            assert!(
                began.elapsed() < START,
                "not mounted after {START:?}: {said}"
            );
            std::thread::sleep(TICK);
        }
    }

    fn running(&mut self) -> &mut Running {
        self.running
            .as_mut()
            .expect("the daemon was not ended by the test")
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.running
            .as_ref()
            .expect("the daemon was not ended")
            .pid()
    }

    /// The first file that it shows.
    pub fn file(&self) -> &Path {
        self.mountpoints.first().expect("a mountpoint")
    }

    /// Opens the first file that it shows for reading and writing.
    #[track_caller]
    pub fn open(&self) -> File {
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).open(self.file());
        file.expect("a usable export")
    }

    /// Opens it for reading.
    #[track_caller]
    pub fn open_read_only(&self) -> File {
        File::open(self.file()).expect("a usable export")
    }

    /// What it has said on standard error so far.
    pub fn said(&self) -> String {
        self.running
            .as_ref()
            .expect("the daemon was not ended")
            .stderr()
    }

    /// Whether it still runs.
    pub fn is_alive(&mut self) -> bool {
        self.running().is_alive()
    }

    /// Sends it a signal.
    pub fn signal(&mut self, signal: Signal) {
        self.running().signal(signal);
    }

    /// SIGTERM, and waits for its end. Fails if it does not exit with 0 or leaves something mounted.
    #[track_caller]
    pub fn stop(self) -> Ended {
        let mountpoints = self.mountpoints.clone();
        let ended = self.end_by(Signal::TERM);
        assert!(ended.output.status.success(), "{}", ended.output);
        for path in mountpoints {
            let left = mounts::at(&path);
            assert!(left.is_none(), "left behind: {left:?}");
        }
        ended
    }

    /// A signal, and waits for its end, with whatever exit code.
    #[track_caller]
    pub fn end_by(mut self, signal: Signal) -> Ended {
        let began = Instant::now();
        self.signal(signal);
        self.ends_by_itself(began)
    }

    /// Waits for an end that comes without a signal.
    #[track_caller]
    pub fn ends(self) -> Ended {
        self.ends_by_itself(Instant::now())
    }

    #[track_caller]
    fn ends_by_itself(mut self, began: Instant) -> Ended {
        let over = self.running().wait(STOP).is_some();
        let said = self.said();
        assert!(
            over,
            "the daemon is still there after {STOP:?}; it said: {said}"
        );
        let time = began.elapsed();
        let output = self.running.take().expect("running").finish(STOP);
        Ended { output, time }
    }
}

impl Ended {
    /// How it ended.
    pub fn status(&self) -> ExitStatus {
        self.output.status
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let Some(mut running) = self.running.take() else {
            return;
        };
        running.signal(Signal::TERM);
        if running.wait(STOP).is_none() {
            let said = running.stderr();
            eprintln!("the daemon did not end within {STOP:?} of SIGTERM; it said: {said}");
        } else if std::thread::panicking() {
            eprintln!("the daemon said: {}", running.stderr());
        }
        // Kills it if it is still there.
        drop(running);
        for path in &self.mountpoints {
            if let Some(mount) = mounts::at(path).filter(|m| m.kind == "fuse.diskfuse") {
                mounts::abort(&mount);
                let _ = rustix::mount::unmount(path, rustix::mount::UnmountFlags::DETACH);
            }
        }
    }
}
