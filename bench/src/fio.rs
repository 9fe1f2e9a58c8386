//! Runs fio and reads its JSON. Never starts a daemon and never looks at one: it sees a file.
//!
//! One run of fio holds two groups of jobs of the same shape, one after the other: a short `warm` whose figures are dropped
//! and the `run` that counts. Both groups' requests are known, so that the CPU time that a daemon spent during the whole
//! run can be divided by all the requests it served.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};
use serde::Deserialize;

use crate::error::{At, Error, Result};
use crate::plan::{Cell, Direction, Mode, Pattern};
use crate::signals;

/// How long beyond its own running time fio may take before it is given up: opening, laying out statistics, draining.
const GRACE: Duration = Duration::from_secs(20);

/// Figures of one run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Figures {
    /// Requests per second.
    pub iops: f64,
    /// Bytes per second.
    pub bytes_per_second: f64,
    /// Median completion latency in µs.
    pub p50_us: f64,
    /// 99th percentile of the completion latency in µs.
    pub p99_us: f64,
    /// 99.9th percentile of the completion latency in µs.
    pub p999_us: f64,
    /// Requests of the measured and the warm-up phase together.
    pub total_requests: u64,
}

/// How a cell is to be run on a file.
#[derive(Debug, Clone, Copy)]
pub struct Load<'a> {
    /// The workload.
    pub cell: &'a Cell,
    /// The file that is read or written.
    pub file: &'a Path,
    /// Its size in bytes.
    pub size: u64,
    /// Whether to open it with `O_DIRECT`.
    pub direct: bool,
    /// Time of the warm-up.
    pub warm: Duration,
    /// Time that is measured.
    pub time: Duration,
}

/// The version line of the installed fio; an error that says how to install it when there is none.
pub fn version() -> Result<String> {
    let output = Command::new("fio")
        .arg("--version")
        .output()
        .map_err(|_| Error::Missing {
            program: "fio",
            install: "apt-get install fio",
        })?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Command-line arguments of fio for `load`, its report going to `report`.
pub fn arguments(load: &Load<'_>, report: &Path) -> Vec<String> {
    let Load {
        cell,
        file,
        size,
        direct,
        warm,
        time,
    } = *load;
    let rw = match (cell.pattern, cell.direction) {
        (Pattern::Seq, Direction::Read) => "read",
        (Pattern::Seq, Direction::Write) => "write",
        (Pattern::Rand, Direction::Read) => "randread",
        (Pattern::Rand, Direction::Write) => "randwrite",
    };
    let mut arguments = vec![
        "--output-format=json".to_owned(),
        format!("--output={}", report.display()),
        format!("--filename={}", file.display()),
        format!("--rw={rw}"),
        format!("--bs={}", cell.block_size),
        format!("--direct={}", u8::from(direct)),
        format!("--numjobs={}", cell.jobs),
        "--group_reporting".to_owned(),
        "--time_based".to_owned(),
        "--allow_file_create=0".to_owned(),
        "--fallocate=none".to_owned(),
        // Whoever lays the image out decides what is cached.
        "--invalidate=0".to_owned(),
    ];
    match cell.mode {
        Mode::Aio => arguments.extend([
            "--ioengine=libaio".to_owned(),
            format!("--iodepth={}", cell.depth),
        ]),
        Mode::Sync => arguments.push("--ioengine=psync".to_owned()),
    }
    if cell.fsync > 0 {
        arguments.push(format!("--fsync={}", cell.fsync));
    }
    match cell.pattern {
        Pattern::Seq => {
            let region = region(size, cell.jobs, cell.block_size);
            arguments.extend([
                format!("--size={region}"),
                format!("--offset_increment={region}"),
            ]);
        }
        // Without a map of visited blocks: its upkeep would be the load generator's cost, not the daemon's.
        Pattern::Rand => arguments.extend([format!("--size={size}"), "--norandommap".to_owned()]),
    }
    arguments.extend([
        "--name=warm".to_owned(),
        format!("--runtime={}ms", warm.as_millis()),
        "--name=run".to_owned(),
        "--stonewall".to_owned(),
        format!("--runtime={}ms", time.as_millis()),
    ]);
    arguments
}

/// Bytes of one job's own region: an equal part of the file, in whole requests.
fn region(size: u64, jobs: u32, block_size: u32) -> u64 {
    let block = u64::from(block_size.max(1));
    (size / u64::from(jobs.max(1)) / block * block).max(block)
}

/// Runs `load`; `report` is a file that fio may overwrite. Ends fio when it overruns or when the user interrupts.
pub fn run(load: &Load<'_>, report: &Path) -> Result<Figures> {
    let child = Command::new("fio")
        .args(arguments(load, report))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
        .at("run", Path::new("fio"))?;
    let mut guard = Group { child };
    let deadline = Instant::now() + load.warm + load.time + GRACE;
    let status = loop {
        if let Some(status) = guard.child.try_wait().at("wait for", Path::new("fio"))? {
            break status;
        }
        signals::check()?;
        if Instant::now() > deadline {
            return Err(Error::Fio(format!(
                "no end within {GRACE:?} after its time on {}",
                load.file.display()
            )));
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let text = fs::read_to_string(report).at("read", report)?;
    let figures = parse(&text, load.cell.direction)?;
    if !status.success() {
        return Err(Error::Fio(format!("{status} on {}", load.file.display())));
    }
    Ok(figures)
}

/// fio with the processes of its jobs. They are its own process group, and all end with this value.
struct Group {
    child: Child,
}

impl Drop for Group {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(Some(_))) {
            return;
        }
        // Not waited for: a job may hang in a request of a daemon that has yet to be ended.
        if let Some(pid) = Pid::from_raw(self.child.id() as i32) {
            let _ = kill_process_group(pid, Signal::KILL);
        }
    }
}

#[derive(Deserialize)]
struct Report {
    jobs: Vec<Job>,
}

#[derive(Deserialize)]
struct Job {
    jobname: String,
    error: i32,
    read: Side,
    write: Side,
}

#[derive(Clone, Deserialize)]
struct Side {
    iops: f64,
    bw_bytes: f64,
    total_ios: u64,
    clat_ns: Latency,
}

#[derive(Clone, Deserialize)]
struct Latency {
    #[serde(default)]
    percentile: serde_json::Map<String, serde_json::Value>,
}

impl Latency {
    fn us(&self, percentile: &str) -> Result<f64> {
        self.percentile
            .get(percentile)
            .and_then(serde_json::Value::as_f64)
            .map(|ns| ns / 1000.0)
            .ok_or_else(|| Error::Fio(format!("its report has no {percentile} percentile")))
    }
}

/// Reads a report (fio 3's `--output-format=json`; notes before the first brace are skipped).
pub fn parse(text: &str, direction: Direction) -> Result<Figures> {
    let start = text.find('{').unwrap_or(0);
    let report: Report = serde_json::from_str(&text[start..])
        .map_err(|error| Error::Fio(format!("unexpected report: {error}")))?;
    if let Some(job) = report.jobs.iter().find(|job| job.error != 0) {
        return Err(Error::Fio(format!(
            "job {} ended with errno {}",
            job.jobname, job.error
        )));
    }
    let side = |job: &Job| match direction {
        Direction::Read => job.read.clone(),
        Direction::Write => job.write.clone(),
    };
    let total_requests = report.jobs.iter().map(|job| side(job).total_ios).sum();
    let run = report
        .jobs
        .iter()
        .find(|job| job.jobname == "run")
        .map(side)
        .ok_or_else(|| Error::Fio("its report has no job \"run\"".to_owned()))?;
    if run.total_ios == 0 {
        return Err(Error::Fio("not one request was completed".to_owned()));
    }
    Ok(Figures {
        iops: run.iops,
        bytes_per_second: run.bw_bytes,
        p50_us: run.clat_ns.us("50.000000")?,
        p99_us: run.clat_ns.us("99.000000")?,
        p999_us: run.clat_ns.us("99.900000")?,
        total_requests,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Target;

    /// `fio-3.33 … --rw=randread --numjobs=4 --group_reporting`, two phases, as it was printed.
    const SAMPLE: &str = include_str!("../testdata/fio-3.33-randread-4jobs.json");

    fn cell(direction: Direction, pattern: Pattern, mode: Mode, jobs: u32) -> Cell {
        Cell {
            target: Target::Null,
            direction,
            pattern,
            mode,
            depth: 64,
            jobs,
            block_size: 4096,
            fsync: 0,
        }
    }

    fn arguments_for(cell: &Cell) -> Vec<String> {
        let load = Load {
            cell,
            file: Path::new("/w/export"),
            size: 1 << 30,
            direct: true,
            warm: Duration::from_millis(250),
            time: Duration::from_secs(2),
        };
        arguments(&load, Path::new("report.json"))
    }

    #[test]
    fn a_recorded_report_gives_the_measured_phase_and_counts_both_phases() {
        let figures = parse(SAMPLE, Direction::Read).unwrap();
        assert!((figures.iops - 77_376.984_127).abs() < 1e-6);
        assert!((figures.bytes_per_second - 316_936_126.0).abs() < 1e-6);
        assert!((figures.p50_us - 3194.880).abs() < 1e-6);
        assert!((figures.p99_us - 7831.552).abs() < 1e-6);
        assert!((figures.p999_us - 10_158.080).abs() < 1e-6);
        assert_eq!(figures.total_requests, 14_866 + 38_998);
    }

    #[test]
    fn notes_before_the_report_are_skipped() {
        let noisy =
            format!("note: both iodepth >= 1 and synchronous I/O engine are selected\n{SAMPLE}");
        assert_eq!(
            parse(&noisy, Direction::Read).unwrap(),
            parse(SAMPLE, Direction::Read).unwrap()
        );
    }

    #[test]
    fn a_report_without_requests_in_the_wanted_direction_is_refused() {
        assert!(matches!(
            parse(SAMPLE, Direction::Write),
            Err(Error::Fio(_))
        ));
    }

    #[test]
    fn a_job_that_failed_is_an_error_that_names_its_errno() {
        let failed = SAMPLE.replacen("\"error\" : 0", "\"error\" : 5", 1);
        let message = parse(&failed, Direction::Read).unwrap_err().to_string();
        assert!(message.contains("errno 5"), "{message}");
    }

    #[test]
    fn a_truncated_report_is_an_error() {
        assert!(parse(&SAMPLE[..SAMPLE.len() / 2], Direction::Read).is_err());
        assert!(parse("", Direction::Read).is_err());
    }

    #[test]
    fn sequential_jobs_have_disjoint_regions_that_fill_the_file() {
        let arguments = arguments_for(&cell(Direction::Write, Pattern::Seq, Mode::Aio, 4));
        for expected in [
            "--rw=write",
            "--size=268435456",
            "--offset_increment=268435456",
            "--iodepth=64",
        ] {
            assert!(
                arguments.iter().any(|argument| argument == expected),
                "{expected} in {arguments:?}"
            );
        }
    }

    #[test]
    fn random_jobs_cover_the_whole_file_and_sync_jobs_use_psync() {
        let arguments = arguments_for(&cell(Direction::Read, Pattern::Rand, Mode::Sync, 1));
        for expected in [
            "--rw=randread",
            "--size=1073741824",
            "--ioengine=psync",
            "--direct=1",
        ] {
            assert!(
                arguments.iter().any(|argument| argument == expected),
                "{expected} in {arguments:?}"
            );
        }
        assert!(
            !arguments
                .iter()
                .any(|argument| argument.starts_with("--iodepth"))
        );
    }

    #[test]
    fn the_measured_phase_waits_for_the_end_of_the_warm_up() {
        let arguments = arguments_for(&cell(Direction::Read, Pattern::Seq, Mode::Aio, 1));
        let tail: Vec<&str> = arguments
            .iter()
            .rev()
            .take(5)
            .rev()
            .map(String::as_str)
            .collect();
        assert_eq!(
            tail,
            [
                "--name=warm",
                "--runtime=250ms",
                "--name=run",
                "--stonewall",
                "--runtime=2000ms"
            ]
        );
    }

    #[test]
    fn a_region_is_whole_requests_and_never_empty() {
        assert_eq!(region(10_000, 2, 4096), 4096);
        assert_eq!(region(100, 4, 4096), 4096);
        assert_eq!(region(0, 0, 0), 1);
    }
}
