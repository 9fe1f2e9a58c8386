//! What the monitor's jobs cost a guest: how long a copy or a shorter chain takes while somebody reads and writes the disk, what
//! that does to the guest's latencies, and how soon the monitor answers meanwhile. Every contender runs right after the other in
//! each round, with fresh images that none of them has made.

mod chain;

use std::time::{Duration, Instant};

use serde::Serialize;

use crate::cli::Jobs;
use crate::contender::{Contender, Role};
use crate::daemon::{Daemon, Messages};
use crate::error::{Error, Result};
use crate::guest::{Guest, Latencies, Load};
use crate::line_up;
use crate::machine::Machine;
use crate::paired::{self, Column};
use crate::qmp::Qmp;
use crate::stats;
pub use chain::Kind;

use chain::Chain;

/// How long the guest runs before the job begins; fio leaves that time out of its figures.
const RAMP: Duration = Duration::from_secs(1);
/// How long the guest runs where there is no job.
const ALONE: Duration = Duration::from_secs(5);
/// How long a job may take.
const LIMIT: Duration = Duration::from_secs(180);
/// What the guest wants.
const GUEST: Load = Load { jobs: 1, depth: 4 };
/// The time between two questions to the monitor.
const PAUSE: Duration = Duration::from_millis(5);

/// One job of one contender in one round.
#[derive(Debug, Clone, Serialize)]
struct Run {
    round: u32,
    contender: String,
    peer: bool,
    kind: Kind,
    /// From the command until the job was concluded, or ready.
    seconds: f64,
    reads: Latencies,
    writes: Latencies,
    /// Round trips of `query-jobs`, median and 99th percentile, in ms.
    answer_p50_ms: f64,
    answer_p99_ms: f64,
}

impl paired::Run for Run {
    fn subject(&self) -> &str {
        self.kind.name()
    }

    fn contender(&self) -> &str {
        &self.contender
    }

    fn is_peer(&self) -> bool {
        self.peer
    }

    fn round(&self) -> u32 {
        self.round
    }
}

const COLUMNS: [Column<Run>; 9] = [
    column("seconds", |run| run.seconds, false),
    column("reads/s", |run| run.reads.iops, false),
    column("writes/s", |run| run.writes.iops, false),
    column("r p99 ms", |run| run.reads.p99_ms, false),
    column("w p99 ms", |run| run.writes.p99_ms, false),
    column("r max ms", |run| run.reads.max_ms, false),
    column("w max ms", |run| run.writes.max_ms, false),
    column("QMP ms", |run| run.answer_p50_ms, false),
    column("QMP p99", |run| run.answer_p99_ms, false),
];

const fn column(name: &'static str, value: fn(&Run) -> f64, worst: bool) -> Column<Run> {
    Column { name, value, worst }
}

#[derive(Serialize)]
struct Document<'a> {
    machine: &'a Machine,
    mebibytes: u64,
    runs: &'a [Run],
}

/// Runs the measurement and prints its table; the raw figures go to `jobs.json`.
pub fn run(options: &Jobs) -> Result<()> {
    let work = line_up::work(&options.select)?;
    let out = line_up::out(&options.select)?;
    let machine = Machine::look(work.path(), &line_up::tree())?;
    let chain = Chain::create(work.path(), options.image_size)?;
    let queues = [options.iothreads];
    let contenders = line_up::contenders(&options.select, &queues, &[false, true], work.path())?;
    let mut runs = Vec::new();
    let mut number = 0;
    for round in 0..options.rounds {
        for &kind in &options.only {
            for contender in &contenders {
                eprintln!(
                    "round {}: {}, {}",
                    round + 1,
                    kind.name(),
                    contender.label()
                );
                number += 1;
                match one(contender, &chain, kind, round, number) {
                    Ok(run) => runs.push(run),
                    Err(Error::Interrupted) => return Err(Error::Interrupted),
                    // QEMU refuses some jobs on what is exported.
                    Err(error) if contender.role == Role::Peer => {
                        println!("failed {}, {}: {error}", contender.label(), kind.name());
                    }
                    Err(error) => return Err(error),
                }
            }
        }
    }
    print!("{}", paired::table("job", &COLUMNS, &runs));
    let document = Document {
        machine: &machine,
        mebibytes: options.image_size,
        runs: &runs,
    };
    line_up::write(&out, "jobs.json", &document)
}

fn one(contender: &Contender, chain: &Chain, kind: Kind, round: u32, number: u64) -> Result<Run> {
    chain.lay_out(kind)?;
    let (launch, monitor) = chain.launch(contender, kind, number)?;
    let point = launch.mountpoints[0].clone();
    let (mut daemon, _) = Daemon::start(launch, Messages::Drop)?;
    let mut guest = Guest::start(&point, chain.size(), GUEST, RAMP, chain.report())?;
    let limit = RAMP + LIMIT + ALONE;
    let job = daemon.call("finish the job", limit, move |_| job(&monitor, kind))??;
    let (reads, writes) = guest.stop().map_err(|error| daemon.blame(error))?;
    let ending = daemon.stop();
    if !ending.clean {
        eprintln!("{}: SIGTERM did not end it cleanly", contender.label());
    }
    let percentile = |at| stats::percentile(&job.answers, at).unwrap_or(f64::NAN);
    Ok(Run {
        round,
        contender: contender.label(),
        peer: contender.role == Role::Peer,
        kind,
        seconds: job.time.as_secs_f64(),
        reads,
        writes,
        answer_p50_ms: percentile(0.5),
        answer_p99_ms: percentile(0.99),
    })
}

/// A job that has run.
struct Done {
    time: Duration,
    /// Round trips in ms.
    answers: Vec<f64>,
}

/// Runs the job of `kind` to its end, asking for its state all the while.
fn job(monitor: &std::path::Path, kind: Kind) -> Result<Done> {
    let mut qmp = Qmp::connect(monitor)?;
    std::thread::sleep(RAMP);
    let began = Instant::now();
    let limit = match kind.command() {
        Some(command) => {
            qmp.run(&command)?;
            LIMIT
        }
        None => ALONE,
    };
    let question = serde_json::json!({"execute": "query-jobs"});
    let mut answers = Vec::new();
    while began.elapsed() < limit {
        let asked = Instant::now();
        let jobs = qmp.run(&question)?;
        answers.push(asked.elapsed().as_secs_f64() * 1000.0);
        let state = jobs[0]["status"].as_str();
        let error = jobs[0]["error"].as_str();
        if let Some(error) = error {
            return Err(Error::Usage(format!("{} failed: {error}", kind.name())));
        }
        match (kind, state) {
            (Kind::None, _) => {}
            (_, Some("concluded")) | (Kind::Mirror, Some("ready")) => break,
            (_, None) => return Err(Error::Usage(format!("the {} is lost", kind.name()))),
            _ => {}
        }
        std::thread::sleep(PAUSE);
    }
    let time = began.elapsed();
    if time >= limit && kind != Kind::None {
        return Err(Error::Usage(format!(
            "no end of {} in {LIMIT:?}",
            kind.name()
        )));
    }
    Ok(Done { time, answers })
}
