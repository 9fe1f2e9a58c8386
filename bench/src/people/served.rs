//! What `diskfuse mount` has put into the background: found by what the program itself tells, and ended by its id. Dropping it
//! ends it, and takes away what it left.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::Value;

use super::LIMIT;
use crate::error::{At, Error, Result};
use crate::mounts;
use crate::usage::{self, Usage};

/// A daemon in the background.
pub struct Served {
    pid: Pid,
    /// Becomes readable at its end.
    process: OwnedFd,
    mountpoints: Vec<PathBuf>,
}

impl Served {
    /// Runs `binary` with `arguments`, which mount in the background, and returns the time until that said that all is
    /// usable. `mountpoints` are what it mounts on; absolute.
    pub fn start(
        binary: &Path,
        arguments: &[String],
        mountpoints: Vec<PathBuf>,
    ) -> Result<(Self, Duration)> {
        let began = Instant::now();
        let status = Command::new(binary)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .status()
            .at("run", binary)?;
        let time = began.elapsed();
        if !status.success() {
            take_away(&mountpoints);
            return Err(failed(format!("{arguments:?}: {status}")));
        }
        let pid = mountpoints.first().and_then(|first| listed(binary, first));
        let pid = pid.ok_or_else(|| failed("a mount that is not listed".to_owned()))?;
        let process = pidfd_open(pid, PidfdFlags::empty()).at("watch", binary)?;
        let served = Self {
            pid,
            process,
            mountpoints,
        };
        Ok((served, time))
    }

    /// What it has used so far.
    pub fn usage(&self) -> Result<Usage> {
        usage::of(self.pid.as_raw_nonzero().get().cast_unsigned())
    }

    /// Ends it; the time until the process is gone.
    pub fn stop(self) -> Result<Duration> {
        let began = Instant::now();
        match self.end() {
            true => Ok(began.elapsed()),
            false => Err(failed(format!("still there {LIMIT:?} after SIGTERM"))),
        }
    }

    /// Whether it has ended. Asking again does no harm.
    fn end(&self) -> bool {
        let _ = pidfd_send_signal(&self.process, Signal::TERM);
        let limit = Timespec {
            tv_sec: LIMIT.as_secs().cast_signed(),
            tv_nsec: 0,
        };
        let mut ended = [PollFd::new(&self.process, PollFlags::IN)];
        matches!(poll(&mut ended, Some(&limit)), Ok(1))
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        if !self.end() {
            let _ = pidfd_send_signal(&self.process, Signal::KILL);
        }
        take_away(&self.mountpoints);
    }
}

fn take_away(mountpoints: &[PathBuf]) {
    for point in mountpoints {
        mounts::detach(point);
    }
}

/// The process that serves `mountpoint`.
fn listed(binary: &Path, mountpoint: &Path) -> Option<Pid> {
    let output = Command::new(binary)
        .args(["list", "--json"])
        .output()
        .ok()?;
    let list: Value = serde_json::from_slice(&output.stdout).ok()?;
    let ours = list
        .as_array()?
        .iter()
        .find(|export| export["mountpoint"].as_str().map(Path::new) == Some(mountpoint))?;
    Pid::from_raw(i32::try_from(ours["pid"].as_i64()?).ok()?)
}

fn failed(reason: String) -> Error {
    Error::Daemon {
        name: "diskfuse mount".to_owned(),
        reason,
    }
}
