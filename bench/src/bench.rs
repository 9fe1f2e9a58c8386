//! The benchmark from its options to its written reports. The order of what it owns matters: daemons end before the chroot's
//! bind mount, and that before the work directory.

use std::fs;
use std::path::Path;

use crate::cli::Bench;
use crate::contender::{Contender, Ground, Role};
use crate::error::{At, Error, Result};
use crate::image::Images;
use crate::line_up;
use crate::machine::Machine;
use crate::plan::{self, Cell, Target};
use crate::report::{self, Entrant, Report, Settings};
use crate::run::Session;

/// Runs the benchmark. An interrupted run is reported as far as it came, and is an error all the same.
pub fn run(options: &Bench) -> Result<()> {
    let cells = plan::cells(&options.filter());
    if cells.is_empty() {
        return Err(Error::Usage(
            "no row has all that is asked for; see --rows".to_owned(),
        ));
    }
    let out = line_up::out(&options.select)?;
    let work = line_up::work(&options.select)?;
    let machine = Machine::look(work.path(), &line_up::tree())?;
    let mut contenders = line_up::contenders(
        &options.select,
        &options.queues,
        &[false, true],
        work.path(),
    )?;
    if options.floor {
        contenders.extend(line_up::floor(&options.queues)?);
    }
    contenders.push(Contender::bare());
    refuse_equal_names(&contenders)?;
    let targets = targets(&cells);
    contenders.retain(|contender| targets.iter().any(|target| contender.runs(*target)));

    let image = if targets == [Target::Null] {
        None
    } else {
        eprintln!("writing images of {} MiB", options.image_size);
        Some(Images::create(work.path(), options.image_size, &targets)?)
    };
    let time = options.time();
    let mut session = Session {
        ground: Ground {
            work: work.path(),
            size: options.image_size << 20,
            read_zeroes: options.read_zeroes,
        },
        images: image.as_ref(),
        warm: time / 8,
        time,
        rounds: options.rounds(),
        next: 0,
    };
    let contenders = session.rehearse(contenders, &targets)?;
    if contenders.is_empty() {
        return Err(Error::Usage("nobody is left to be measured".to_owned()));
    }
    let results = session.run(&cells, &contenders);
    let summary = report::summarise(&cells, &contenders, &results.measurements);
    let entrants = entrants(&contenders, &machine, work.path());
    let report = Report {
        machine,
        settings: settings(options),
        entrants,
        cells,
        results,
        summary,
    };
    write(&report, &out, options.markdown)?;
    conclude(&report)
}

fn refuse_equal_names(contenders: &[Contender]) -> Result<()> {
    let mut labels: Vec<String> = contenders.iter().map(Contender::label).collect();
    labels.sort();
    match labels.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(Error::Usage(format!(
            "two contenders are called {}: give one another name",
            pair[0]
        ))),
        None => Ok(()),
    }
}

fn targets(cells: &[Cell]) -> Vec<Target> {
    let mut targets: Vec<Target> = cells.iter().map(|cell| cell.target).collect();
    targets.dedup();
    targets
}

fn entrants(contenders: &[Contender], machine: &Machine, work: &Path) -> Vec<Entrant> {
    let entrant = |contender: &Contender| Entrant {
        label: contender.label(),
        family: contender.family.clone(),
        role: contender.role,
        queues: contender.queues,
        version: match contender.role {
            Role::Bare => machine.fio.clone(),
            Role::Floor => format!("xtask of {}", machine.commit),
            _ => contender
                .version(work)
                .unwrap_or_else(|| "unknown".to_owned()),
        },
        description: contender.describe(),
    };
    contenders.iter().map(entrant).collect()
}

fn settings(options: &Bench) -> Settings {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let time = options.time().as_secs_f64();
    Settings {
        rounds: options.rounds(),
        seconds: time,
        warm_seconds: time / 8.0,
        size_mib: options.image_size,
        command: format!("cargo xtask {}", arguments.join(" ")),
    }
}

fn write(report: &Report, out: &Path, markdown: bool) -> Result<()> {
    let text = report::text::render(report);
    print!("{text}");
    let mut files = vec![
        ("bench.txt", text),
        ("bench.json", report::json::render(report)?),
        ("bench.svg", report::svg::render(report)),
    ];
    if markdown {
        files.push((
            "BENCHMARKS.md",
            report::markdown::render(report, "bench.svg"),
        ));
    }
    for (name, content) in files {
        let path = out.join(name);
        fs::write(&path, content).at("write", &path)?;
        println!("written: {}", path.display());
    }
    Ok(())
}

/// The exit code tells of an interruption and of failures of ours; those of peers are only told in the report.
fn conclude(report: &Report) -> Result<()> {
    if report.results.interrupted {
        return Err(Error::Interrupted);
    }
    let ours = |role: Role| role != Role::Peer;
    match report
        .results
        .failures
        .iter()
        .filter(|failure| ours(report.entrants[failure.contender].role))
        .count()
    {
        0 => Ok(()),
        failed => Err(Error::Usage(format!("{failed} measurements failed"))),
    }
}
