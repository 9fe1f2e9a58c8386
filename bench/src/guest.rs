//! A guest that reads and writes a disk for as long as somebody else is measured: fio, ended by a signal.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use serde::Serialize;
use serde_json::Value;

use crate::error::{At, Error, Result};

/// How long fio may take to report.
const GRACE: Duration = Duration::from_secs(30);

/// One direction of the guest's requests.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Latencies {
    /// Requests per second.
    pub iops: f64,
    /// 99th percentile from submission to completion, in ms.
    pub p99_ms: f64,
    /// The slowest request, in ms.
    pub max_ms: f64,
}

/// How much the guest wants at the same time.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    /// Processes.
    pub jobs: u32,
    /// Requests in flight of each of them.
    pub depth: u32,
}

/// fio at work. Dropping it ends it.
pub struct Guest {
    child: Child,
    report: PathBuf,
}

impl Guest {
    /// Starts it on `file`, which has `size` bytes: 4 KiB at random, half of them reads, around the page cache.
    /// What it does in the first `ramp` is not counted; `report` is a file that may be overwritten.
    pub fn start(
        file: &Path,
        size: u64,
        load: Load,
        ramp: Duration,
        report: PathBuf,
    ) -> Result<Self> {
        let child = Command::new("fio")
            .args(["--name=guest", "--rw=randrw", "--bs=4k", "--direct=1"])
            .args(["--ioengine=libaio", "--norandommap", "--group_reporting"])
            .arg(format!("--iodepth={}", load.depth))
            .arg(format!("--numjobs={}", load.jobs))
            .args(["--time_based", "--runtime=1h", "--allow_file_create=0"])
            .args(["--output-format=json", "--fallocate=none"])
            .arg(format!("--ramp_time={}ms", ramp.as_millis()))
            .arg(format!("--output={}", report.display()))
            .arg(format!("--size={size}"))
            .arg(format!("--filename={}", file.display()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .at("run", Path::new("fio"))?;
        Ok(Self { child, report })
    }

    /// Ends it; reads and writes as it saw them.
    pub fn stop(&mut self) -> Result<(Latencies, Latencies)> {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, Signal::INT).at("end", Path::new("fio"))?;
        let deadline = Instant::now() + GRACE;
        while self
            .child
            .try_wait()
            .at("wait for", Path::new("fio"))?
            .is_none()
        {
            if Instant::now() > deadline {
                return Err(Error::Fio(format!("no report within {GRACE:?}")));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let text = fs::read_to_string(&self.report).at("read", &self.report)?;
        parse(&text)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if !matches!(self.child.try_wait(), Ok(Some(_))) {
            let _ = kill_process_group(Pid::from_child(&self.child), Signal::KILL);
        }
    }
}

fn parse(text: &str) -> Result<(Latencies, Latencies)> {
    let start = text.find('{').unwrap_or(0);
    let report: Value = serde_json::from_str(&text[start..])
        .map_err(|error| Error::Fio(format!("unexpected report: {error}")))?;
    let job = &report["jobs"][0];
    // It was interrupted, which is no error of the disk's.
    match job["error"].as_i64() {
        Some(0 | 4) => {}
        other => return Err(Error::Fio(format!("the guest met errno {other:?}"))),
    }
    let side = |name: &str| {
        let side = &job[name];
        let ms = |value: &Value| value.as_f64().map(|ns| ns / 1e6);
        let latencies = &side["clat_ns"];
        let figures = || {
            Some(Latencies {
                iops: side["iops"].as_f64()?,
                p99_ms: ms(&latencies["percentile"]["99.000000"])?,
                max_ms: ms(&latencies["max"])?,
            })
        };
        figures().ok_or_else(|| Error::Fio(format!("the guest made no {name}s")))
    };
    Ok((side("read")?, side("write")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_directions_are_read_and_a_guest_that_met_an_error_is_not() {
        let report = |error: u32| {
            let side = r#"{"iops": 50.0, "clat_ns": {"max": 9000000, "percentile": {"99.000000": 3000000}}}"#;
            format!(r#"note {{"jobs": [{{"error": {error}, "read": {side}, "write": {side}}}]}}"#)
        };
        let (reads, writes) = parse(&report(0)).unwrap();
        assert_eq!((reads.iops, reads.p99_ms, writes.max_ms), (50.0, 3.0, 9.0));
        assert!(parse(&report(5)).is_err());
        assert!(parse(r#"{"jobs": [{"error": 0}]}"#).is_err());
    }
}
