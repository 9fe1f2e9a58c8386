//! What the monitor is like for whoever drives it: how soon it answers, and how soon an export that was added can be read,
//! while nobody else wants anything and while guests keep all threads busy. Every contender runs right after the other in each
//! round.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::ValueEnum;
use serde::Serialize;
use serde_json::json;

use crate::cli::Monitor;
use crate::contender::{Contender, Role};
use crate::daemon::{Daemon, Launch, Messages};
use crate::error::{At, Error, Result};
use crate::guest::{Guest, Load};
use crate::line_up;
use crate::machine::Machine;
use crate::paired::{self, Column};
use crate::qmp::Qmp;
use crate::stats;

/// Bytes of the disk that guests use.
const DISK: u64 = 1 << 30;
/// Bytes of the disk whose exports come and go.
const OTHER: u64 = 64 << 20;
/// What guests want: more than the threads can give.
const GUESTS: Load = Load { jobs: 4, depth: 32 };
/// How long the guests run before anything is measured; fio leaves that time out of its figures.
const RAMP: Duration = Duration::from_secs(1);
/// How long all of one measurement may take.
const LIMIT: Duration = Duration::from_secs(60);
/// How long an export may take to go.
const GONE: Duration = Duration::from_secs(10);

/// Who else uses the daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Beside {
    /// Nobody.
    Nobody,
    /// Guests: four processes with 32 requests in flight each, on an export of a null disk.
    Guests,
}

impl Beside {
    fn name(self) -> &'static str {
        match self {
            Self::Nobody => "nobody",
            Self::Guests => "guests",
        }
    }
}

/// Times in ms.
#[derive(Debug, Clone, Copy, Serialize)]
struct Times {
    p50: f64,
    p99: f64,
    max: f64,
}

impl Times {
    fn of(times: &[f64]) -> Self {
        let at = |share| stats::percentile(times, share).unwrap_or(f64::NAN);
        Self {
            p50: at(0.5),
            p99: at(0.99),
            max: at(1.0),
        }
    }
}

/// One contender in one round.
#[derive(Debug, Clone, Serialize)]
struct Run {
    round: u32,
    contender: String,
    peer: bool,
    beside: Beside,
    /// Round trips of `query-block-exports`.
    answer: Times,
    /// From `block-export-add` until the first bytes of the file are read.
    add: Times,
    /// From `block-export-del` until the export is not listed any more.
    del: Times,
    /// The guests' requests per second.
    iops: Option<f64>,
}

impl paired::Run for Run {
    fn subject(&self) -> &str {
        self.beside.name()
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
    column("answer ms", |run| run.answer.p50, false),
    column("p99", |run| run.answer.p99, false),
    column("worst", |run| run.answer.max, true),
    column("add ms", |run| run.add.p50, false),
    column("p99", |run| run.add.p99, false),
    column("worst", |run| run.add.max, true),
    column("del ms", |run| run.del.p50, false),
    column("worst", |run| run.del.max, true),
    column("guests/s", |run| run.iops.unwrap_or(f64::NAN), false),
];

const fn column(name: &'static str, value: fn(&Run) -> f64, worst: bool) -> Column<Run> {
    Column { name, value, worst }
}

#[derive(Serialize)]
struct Document<'a> {
    machine: &'a Machine,
    count: u32,
    runs: &'a [Run],
}

/// Runs the measurement and prints its table; the raw figures go to `monitor.json`.
pub fn run(options: &Monitor) -> Result<()> {
    let work = line_up::work(&options.select)?;
    let out = line_up::out(&options.select)?;
    let machine = Machine::look(work.path(), &line_up::tree())?;
    let queues = [options.iothreads];
    let contenders = line_up::contenders(&options.select, &queues, &[false, true], work.path())?;
    let mut runs = Vec::new();
    let mut number = 0;
    for round in 0..options.rounds {
        for &beside in &options.beside {
            for contender in &contenders {
                let (label, with) = (contender.label(), beside.name());
                eprintln!("round {}: {label}, beside {with}", round + 1);
                number += 1;
                let place = Place::new(work.path(), number);
                match one(contender, &place, beside, round, options.count) {
                    Ok(run) => runs.push(run),
                    Err(Error::Interrupted) => return Err(Error::Interrupted),
                    Err(error) if contender.role == Role::Peer => {
                        println!("failed {label}, beside {with}: {error}");
                    }
                    Err(error) => return Err(error),
                }
            }
        }
    }
    print!("{}", paired::table("beside", &COLUMNS, &runs));
    let document = Document {
        machine: &machine,
        count: options.count,
        runs: &runs,
    };
    line_up::write(&out, "monitor.json", &document)
}

/// The names of one run's files, all in the work directory.
struct Place {
    folder: PathBuf,
    socket: String,
    shown: String,
    added: String,
}

impl Place {
    fn new(folder: &Path, number: u64) -> Self {
        Self {
            folder: folder.to_owned(),
            socket: format!("monitor-{number}.sock"),
            shown: format!("export-{number}"),
            added: format!("added-{number}"),
        }
    }
}

/// An export that comes and goes: where the daemon mounts it, and where we find it.
struct Added {
    inside: PathBuf,
    outside: PathBuf,
}

fn launch(contender: &Contender, place: &Place) -> Result<(Launch, Added)> {
    let nothing = || Error::Usage(format!("{} is not a daemon", contender.label()));
    let (mut command, inside, outside) =
        contender.program.open(&place.folder).ok_or_else(nothing)?;
    let socket = inside.join(&place.socket).display().to_string();
    command
        .args([
            "--chardev",
            &format!("socket,id=qmp,path={socket},server=on,wait=off"),
        ])
        .args(["--monitor", "qmp"]);
    for (name, size) in [("disk", DISK), ("other", OTHER)] {
        let node =
            json!({"driver": "null-co", "node-name": name, "size": size, "read-zeroes": true});
        command.args(["--blockdev", &node.to_string()]);
    }
    contender.export(&mut command, "disk", &inside.join(&place.shown));
    let added = Added {
        inside: inside.join(&place.added),
        outside: outside.join(&place.added),
    };
    // What is added is taken away with the rest, should the daemon leave it.
    let mountpoints = vec![outside.join(&place.shown), added.outside.clone()];
    for point in &mountpoints {
        fs::write(point, b"").at("create the mountpoint", point)?;
    }
    let launch = Launch {
        name: contender.label(),
        command,
        mountpoints,
        size: DISK,
    };
    Ok((launch, added))
}

fn one(
    contender: &Contender,
    place: &Place,
    beside: Beside,
    round: u32,
    count: u32,
) -> Result<Run> {
    let (launch, added) = launch(contender, place)?;
    let shown = launch.mountpoints[0].clone();
    let (mut daemon, _) = Daemon::start_showing(launch, vec![shown.clone()], Messages::Drop)?;
    let report = place.folder.join("guest.json");
    let mut guests = match beside {
        Beside::Nobody => None,
        Beside::Guests => Some(Guest::start(&shown, DISK, GUESTS, RAMP, report)?),
    };
    let socket = place.folder.join(&place.socket);
    let limit = RAMP + LIMIT;
    let times = daemon.call("answer to the end", limit, move |stop| {
        std::thread::sleep(RAMP);
        let began = Instant::now();
        let times = measure(&socket, &added, count, stop);
        // fio has something to tell of.
        std::thread::sleep(RAMP.saturating_sub(began.elapsed()));
        times
    })??;
    let iops = match &mut guests {
        Some(guests) => {
            let (reads, writes) = guests.stop().map_err(|error| daemon.blame(error))?;
            Some(reads.iops + writes.iops)
        }
        None => None,
    };
    if !daemon.stop().clean {
        eprintln!("{}: SIGTERM did not end it cleanly", contender.label());
    }
    let [answer, add, del] = times;
    Ok(Run {
        round,
        contender: contender.label(),
        peer: contender.role == Role::Peer,
        beside,
        answer,
        add,
        del,
        iops,
    })
}

/// The times of answers, of exports that come, and of exports that go.
fn measure(socket: &Path, added: &Added, count: u32, stop: &AtomicBool) -> Result<[Times; 3]> {
    let mut qmp = Qmp::connect(socket)?;
    let (mut answers, mut adds, mut dels) = (Vec::new(), Vec::new(), Vec::new());
    let question = json!({"execute": "query-block-exports"});
    for _ in 0..count {
        let asked = Instant::now();
        qmp.run(&question)?;
        answers.push(ms(asked));
    }
    let mut first = [0; 4096];
    for number in 0..count {
        if stop.load(Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        let id = format!("added-{number}");
        let began = Instant::now();
        qmp.run(&json!({"execute": "block-export-add", "arguments": {
            "type": "fuse", "id": id, "node-name": "other", "writable": true, "mountpoint": added.inside,
        }}))?;
        File::open(&added.outside)
            .and_then(|file| file.read_exact_at(&mut first, 0))
            .at("read", &added.outside)?;
        adds.push(ms(began));
        let began = Instant::now();
        qmp.run(&json!({"execute": "block-export-del", "arguments": {"id": id, "mode": "hard"}}))?;
        let is_there = |list: &serde_json::Value| {
            let all = list.as_array().into_iter().flatten();
            all.clone().any(|export| export["id"] == id.as_str())
        };
        while is_there(&qmp.run(&question)?) {
            if began.elapsed() > GONE {
                return Err(Error::Usage(format!("export '{id}' does not go")));
            }
        }
        dels.push(ms(began));
    }
    Ok([answers, adds, dels].map(|times| Times::of(&times)))
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}
