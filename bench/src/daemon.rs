//! A storage daemon's life: started by pid, waited for, ended, its mounts taken away. Every wait has a time limit. Never
//! ends a process that it did not start, and never touches a mount that its own daemon did not make.

use std::fs;
use std::io::Read;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use std::os::unix::process::CommandExt;

use rustix::process::{Pid, Signal, kill_process};

use crate::error::{At, Error, Result};
use crate::usage::{self, Usage};
use crate::{mounts, signals};

/// How long a daemon may take to show all its exports.
const START_LIMIT: Duration = Duration::from_secs(30);
/// How long a daemon may take to end after SIGTERM, and again after SIGKILL.
const STOP_LIMIT: Duration = Duration::from_secs(5);
/// How often a wait looks again.
const TICK: Duration = Duration::from_millis(5);
/// How much of a daemon's messages is shown.
const MESSAGE_LIMIT: u64 = 2048;

/// What is to be started.
pub struct Launch {
    /// Label for messages.
    pub name: String,
    /// The program with its arguments; after `exec`s of its own it must be the daemon, under the same pid.
    pub command: Command,
    /// Mountpoints, as this process sees them.
    pub mountpoints: Vec<PathBuf>,
    /// Size in bytes that each export shows once it is usable. Not 0: that is what the file below shows.
    pub size: u64,
}

/// What becomes of a daemon's messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Messages {
    /// Kept for the error of a failed start. Only for short lives: a daemon that prints much would block.
    Keep,
    /// To `/dev/null`.
    Drop,
}

/// A running daemon. Dropping it ends it and unmounts what it left.
pub struct Daemon {
    name: String,
    child: Child,
    mountpoints: Vec<PathBuf>,
    ended: bool,
}

/// How a daemon ended.
#[derive(Debug, Clone, Copy)]
pub struct Ending {
    /// From SIGTERM until the process was gone.
    pub time: Duration,
    /// Whether SIGTERM alone made it exit with code 0.
    pub clean: bool,
}

impl Daemon {
    /// Starts a daemon and returns once all its exports are usable, with the time that took.
    pub fn start(launch: Launch, messages: Messages) -> Result<(Self, Duration)> {
        for point in &launch.mountpoints {
            fs::write(point, b"").at("create the mountpoint", point)?;
        }
        let shown = launch.mountpoints.clone();
        Self::start_showing(launch, shown, messages)
    }

    /// The same for mountpoints that are there, and are usable when all of `shown` have the size: files, or what is in
    /// directories.
    pub fn start_showing(
        launch: Launch,
        shown: Vec<PathBuf>,
        messages: Messages,
    ) -> Result<(Self, Duration)> {
        let Launch {
            name,
            mut command,
            mountpoints,
            size,
        } = launch;
        let stderr = if messages == Messages::Keep {
            Stdio::piped()
        } else {
            Stdio::null()
        };
        // A group of its own: ^C at the terminal must not reach it before we have ended what uses it.
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr)
            .process_group(0);
        let began = Instant::now();
        let program = PathBuf::from(command.get_program());
        let child = command.spawn().at("run", &program)?;
        let mut daemon = Self {
            name,
            child,
            mountpoints,
            ended: false,
        };
        match daemon.wait_until_usable(shown, size) {
            Ok(()) => Ok((daemon, began.elapsed())),
            Err(Error::Daemon { name, reason }) => {
                daemon.stop();
                Err(Error::Daemon {
                    name,
                    reason: format!("{reason}{}", daemon.printed()),
                })
            }
            Err(error) => Err(error),
        }
    }

    /// Process id of the daemon.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has used so far.
    pub fn usage(&self) -> Result<Usage> {
        usage::of(self.pid())
    }

    /// The reason behind `error`, which came while this daemon was used: that the daemon has ended, if it has.
    pub fn blame(&mut self, error: Error) -> Error {
        match self.child.try_wait() {
            Ok(Some(status)) if !matches!(error, Error::Interrupted) => Error::Daemon {
                name: self.name.clone(),
                reason: format!("ended with {status} under load ({error})"),
            },
            _ => error,
        }
    }

    fn wait_until_usable(&mut self, points: Vec<PathBuf>, size: u64) -> Result<()> {
        self.call("become usable", START_LIMIT, move |stop| {
            for point in &points {
                while fs::metadata(point).map_or(0, |metadata| metadata.len()) != size {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    std::thread::sleep(Duration::from_micros(500));
                }
            }
        })
    }

    /// Runs `work`, which uses the exports, on a thread of its own, because a request to a daemon that hangs does not come
    /// back. Fails when the daemon ends, when `limit` has passed or when the user interrupts; `work` should end when the
    /// flag it is given becomes true.
    pub fn call<T, F>(&mut self, what: &str, limit: Duration, work: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&AtomicBool) -> T + Send + 'static,
    {
        let stop = Arc::new(AtomicBool::new(false));
        let (sender, receiver) = mpsc::channel();
        let flag = Arc::clone(&stop);
        std::thread::spawn(move || {
            let _ = sender.send(work(&flag));
        });
        let result = self.await_reply(what, limit, &receiver);
        stop.store(true, Ordering::Relaxed);
        result
    }

    fn await_reply<T>(
        &mut self,
        what: &str,
        limit: Duration,
        receiver: &mpsc::Receiver<T>,
    ) -> Result<T> {
        let failed = |name: &str, reason: String| {
            Err(Error::Daemon {
                name: name.to_owned(),
                reason,
            })
        };
        let deadline = Instant::now() + limit;
        loop {
            match receiver.recv_timeout(TICK) {
                Ok(reply) => return Ok(reply),
                Err(RecvTimeoutError::Disconnected) => {
                    return failed(&self.name, format!("could not {what}"));
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
            if let Ok(Some(status)) = self.child.try_wait() {
                return failed(
                    &self.name,
                    format!("ended with {status} before it could {what}"),
                );
            }
            if Instant::now() > deadline {
                return failed(&self.name, format!("did not {what} within {limit:?}"));
            }
            signals::check()?;
        }
    }

    /// Ends the daemon: SIGTERM first, so that it unmounts itself (a QEMU whose file is unmounted by others spins), then
    /// SIGKILL, then the mounts that it left.
    pub fn stop(&mut self) -> Ending {
        let began = Instant::now();
        if self.ended {
            return Ending {
                time: Duration::ZERO,
                clean: true,
            };
        }
        self.ended = true;
        let clean = self.end_by(Signal::TERM) == Some(true);
        let time = began.elapsed();
        if !matches!(self.child.try_wait(), Ok(Some(_))) {
            eprintln!(
                "{}: still there {STOP_LIMIT:?} after SIGTERM, killed",
                self.name
            );
            self.end_by(Signal::KILL);
        }
        for point in &self.mountpoints {
            mounts::detach(point);
        }
        Ending { time, clean }
    }

    /// Whether it exited with code 0; nothing when it is still there after the time limit.
    fn end_by(&mut self, signal: Signal) -> Option<bool> {
        if let (Ok(None), Some(pid)) =
            (self.child.try_wait(), Pid::from_raw(self.child.id() as i32))
        {
            let _ = kill_process(pid, signal);
        }
        let deadline = Instant::now() + STOP_LIMIT;
        while Instant::now() < deadline {
            if let Ok(Some(status)) = self.child.try_wait() {
                return Some(status.success());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        None
    }

    /// The beginning of what an ended daemon printed, on one line, if it was kept.
    fn printed(&mut self) -> String {
        let mut text = Vec::new();
        if let Some(stderr) = self.child.stderr.take() {
            let _ = stderr.take(MESSAGE_LIMIT).read_to_end(&mut text);
        }
        let text = String::from_utf8_lossy(&text);
        let line = text
            .lines()
            .find(|line| !line.trim().is_empty())
            .unwrap_or_default();
        if line.is_empty() {
            String::new()
        } else {
            format!(": {line}")
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.stop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn launch(directory: &std::path::Path, script: &str) -> Launch {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Launch {
            name: "test".to_owned(),
            command,
            mountpoints: vec![directory.join("export")],
            size: 4096,
        }
    }

    #[test]
    fn a_daemon_that_ends_at_once_is_reported_with_what_it_printed() {
        let directory = tempfile::tempdir().unwrap();
        let launch = launch(directory.path(), "echo 'no such option' >&2; exit 1");
        let error = Daemon::start(launch, Messages::Keep)
            .err()
            .unwrap()
            .to_string();
        assert!(
            error.contains("exit status: 1") && error.ends_with(": no such option"),
            "{error}"
        );
    }

    #[test]
    fn a_daemon_is_usable_when_its_file_has_the_size_and_ends_by_sigterm() {
        let directory = tempfile::tempdir().unwrap();
        let point = directory.path().join("export");
        let script = format!(
            "trap 'exit 0' TERM; sleep 0.1; truncate -s 4096 {}; while :; do sleep 0.01; done",
            point.display()
        );
        let (mut daemon, time) =
            Daemon::start(launch(directory.path(), &script), Messages::Drop).unwrap();
        assert!(time >= Duration::from_millis(100));
        assert!(daemon.usage().unwrap().threads >= 1);
        let ending = daemon.stop();
        assert!(ending.clean && ending.time < STOP_LIMIT);
        assert!(daemon.usage().is_err(), "the process must be gone");
    }

    #[test]
    fn a_call_that_hangs_is_given_up_at_its_limit() {
        let directory = tempfile::tempdir().unwrap();
        let script = format!(
            "truncate -s 4096 {}/export; exec sleep 60",
            directory.path().display()
        );
        let (mut daemon, _) =
            Daemon::start(launch(directory.path(), &script), Messages::Drop).unwrap();
        let outcome = daemon.call("answer", Duration::from_millis(50), |stop| {
            while !stop.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        assert!(
            outcome
                .unwrap_err()
                .to_string()
                .contains("did not answer within 50ms")
        );
    }

    #[test]
    fn a_daemon_that_died_under_load_is_blamed_and_a_living_one_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let script = format!(
            "truncate -s 4096 {}/export; exec sleep 60",
            directory.path().display()
        );
        let (mut daemon, _) =
            Daemon::start(launch(directory.path(), &script), Messages::Drop).unwrap();
        let error = || Error::Fio("job run ended with errno 107".to_owned());
        assert!(matches!(daemon.blame(error()), Error::Fio(_)));
        daemon.child.kill().unwrap();
        daemon.child.wait().unwrap();
        let blamed = daemon.blame(error()).to_string();
        assert!(
            blamed.contains("SIGKILL") && blamed.contains("errno 107"),
            "{blamed}"
        );
        assert!(matches!(
            daemon.blame(Error::Interrupted),
            Error::Interrupted
        ));
    }
}
