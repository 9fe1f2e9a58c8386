//! The measuring loop: for each round, for each cell, every contender right after the other, each with a fresh daemon.
//! Never reports: it fills [`Results`].

use std::path::Path;
use std::time::Duration;

use serde::Serialize;

use crate::contender::{Contender, Ground, Role};
use crate::daemon::{Daemon, Messages};
use crate::error::{Error, Result};
use crate::fio::{self, Figures, Load};
use crate::image::{self, Images};
use crate::plan::{self, Cell, Target};
use crate::usage::Usage;

/// What the daemon of one measurement used.
#[derive(Debug, Clone, Serialize)]
pub struct Cost {
    /// CPU time of the daemon per request in µs.
    pub cpu_us_per_request: f64,
    /// Voluntary context switches of the daemon per request.
    pub switches_per_request: f64,
    /// Resident size before the first request in bytes.
    pub resident_idle: u64,
    /// Largest resident size in bytes.
    pub resident_peak: u64,
    /// From exec to a usable export in ms.
    pub start_ms: f64,
    /// Whether it ended by SIGTERM with exit code 0.
    pub clean_stop: bool,
}

/// One contender in one cell in one round.
#[derive(Debug, Clone, Serialize)]
pub struct Measurement {
    /// Round, from 0.
    pub round: u32,
    /// Index into the cells; reports write its name.
    #[serde(skip)]
    pub cell: usize,
    /// Index into the contenders; reports write its label.
    #[serde(skip)]
    pub contender: usize,
    /// Requests per second.
    pub iops: f64,
    /// MiB per second.
    pub mib_per_second: f64,
    /// Median completion latency in µs.
    pub p50_us: f64,
    /// 99th percentile of the completion latency in µs.
    pub p99_us: f64,
    /// 99.9th percentile of the completion latency in µs.
    pub p999_us: f64,
    /// Requests, those of the warm-up included.
    pub requests: u64,
    /// What the daemon used; nothing for the bare file.
    pub cost: Option<Cost>,
}

/// A measurement that could not be made.
#[derive(Debug, Clone, Serialize)]
pub struct Failure {
    /// Round, from 0.
    pub round: u32,
    /// Index into the cells; reports write its name.
    #[serde(skip)]
    pub cell: usize,
    /// Index into the contenders; reports write its label.
    #[serde(skip)]
    pub contender: usize,
    /// What happened.
    pub reason: String,
}

/// Everything that was measured.
#[derive(Debug, Default)]
pub struct Results {
    /// Measurements in the order in which they were made.
    pub measurements: Vec<Measurement>,
    /// What failed.
    pub failures: Vec<Failure>,
    /// Whether the user ended the run early.
    pub interrupted: bool,
}

/// Which measurement it is: round, index of the cell, index of the contender.
#[derive(Clone, Copy)]
struct Place {
    round: u32,
    cell: usize,
    contender: usize,
}

impl Results {
    fn note(
        &mut self,
        place: Place,
        outcome: Result<(Figures, Option<Cost>)>,
        cell: &Cell,
        contender: &Contender,
    ) {
        match outcome {
            Ok((figures, cost)) => {
                // Its figures stand, but a daemon that crashes on its way out must not go unseen.
                if cost.as_ref().is_some_and(|cost| !cost.clean_stop) {
                    self.fail(
                        place,
                        contender,
                        "SIGTERM did not end it with exit code 0".to_owned(),
                    );
                }
                let measurement = record(place, figures, cost);
                eprintln!("  {}", progress(contender, cell, &measurement));
                self.measurements.push(measurement);
            }
            // Its name is in the record already.
            Err(Error::Daemon { reason, .. }) => self.fail(place, contender, reason),
            Err(error) => self.fail(place, contender, error.to_string()),
        }
    }

    fn fail(&mut self, place: Place, contender: &Contender, reason: String) {
        eprintln!("  {:<16} FAILED: {reason}", contender.label());
        let Place {
            round,
            cell,
            contender,
        } = place;
        self.failures.push(Failure {
            round,
            cell,
            contender,
            reason,
        });
    }
}

/// What a run needs besides cells and contenders.
pub struct Session<'a> {
    /// Where the files are.
    pub ground: Ground<'a>,
    /// The images, when a cell uses one.
    pub images: Option<&'a Images>,
    /// Time of the warm-up.
    pub warm: Duration,
    /// Time of one measurement.
    pub time: Duration,
    /// Number of rounds.
    pub rounds: u32,
    /// Number of the next mountpoint: each is used once, so that none can show what another daemon left.
    pub next: u64,
}

impl Session<'_> {
    /// Starts everyone once on each target and leaves out, with a printed line, peers and floors that cannot do it.
    pub fn rehearse(
        &mut self,
        contenders: Vec<Contender>,
        targets: &[Target],
    ) -> Result<Vec<Contender>> {
        let mut able = Vec::new();
        for contender in contenders {
            match self.try_targets(&contender, targets) {
                Ok(()) => able.push(contender),
                Err(Error::Daemon { name, reason })
                    if matches!(contender.role, Role::Peer | Role::Floor) =>
                {
                    println!("skipped {name}: {reason}");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(able)
    }

    fn try_targets(&mut self, contender: &Contender, targets: &[Target]) -> Result<()> {
        for &target in targets.iter().filter(|target| contender.runs(**target)) {
            self.next += 1;
            if let Some(launch) = contender.launch(target, &self.ground, self.next) {
                Daemon::start(launch, Messages::Keep)?;
            }
        }
        Ok(())
    }

    /// Measures. An interruption or a failed measurement is part of the results, not an error.
    pub fn run(&mut self, cells: &[Cell], contenders: &[Contender]) -> Results {
        let mut results = Results::default();
        for round in 0..self.rounds {
            for (index, cell) in cells.iter().enumerate() {
                eprintln!(
                    "round {}/{}, cell {}/{}: {}",
                    round + 1,
                    self.rounds,
                    index + 1,
                    cells.len(),
                    cell.name()
                );
                for number in plan::order(contenders.len(), round) {
                    let contender = &contenders[number];
                    if !contender.runs(cell.target) {
                        continue;
                    }
                    let place = Place {
                        round,
                        cell: index,
                        contender: number,
                    };
                    let outcome = self.measure(cell, contender);
                    results.interrupted = matches!(outcome, Err(Error::Interrupted));
                    if results.interrupted {
                        return results;
                    }
                    results.note(place, outcome, cell, contender);
                }
            }
        }
        results
    }

    fn measure(&mut self, cell: &Cell, contender: &Contender) -> Result<(Figures, Option<Cost>)> {
        if let Some(images) = self.images {
            images.settle(cell.target)?;
        }
        self.next += 1;
        let Some(launch) = contender.launch(cell.target, &self.ground, self.next) else {
            let name = image::name(cell.target).unwrap_or_default();
            let file = self.ground.work.join(name);
            return Ok((self.load(cell, &file, cell.target.is_direct())?, None));
        };
        let file = launch.mountpoints[0].clone();
        let (mut daemon, start) = Daemon::start(launch, Messages::Drop)?;
        let before = daemon.usage()?;
        let load = self.load(cell, &file, true);
        let figures = load.map_err(|error| daemon.blame(error))?;
        let after = daemon.usage()?;
        let mut cost = cost(&before, &after, figures.total_requests, start);
        cost.clean_stop = daemon.stop().clean;
        Ok((figures, Some(cost)))
    }

    fn load(&self, cell: &Cell, file: &Path, direct: bool) -> Result<Figures> {
        let load = Load {
            cell,
            file,
            size: cell.target.size(self.ground.size),
            direct,
            warm: self.warm,
            time: self.time,
        };
        fio::run(&load, &self.ground.work.join("fio.json"))
    }
}

fn cost(before: &Usage, after: &Usage, requests: u64, start: Duration) -> Cost {
    let per_request = |count: u64| count as f64 / requests.max(1) as f64;
    Cost {
        cpu_us_per_request: per_request(after.cpu_ns.saturating_sub(before.cpu_ns)) / 1000.0,
        switches_per_request: per_request(
            after
                .voluntary_switches
                .saturating_sub(before.voluntary_switches),
        ),
        resident_idle: before.resident,
        resident_peak: after.peak_resident,
        start_ms: start.as_secs_f64() * 1000.0,
        clean_stop: true,
    }
}

fn record(place: Place, figures: Figures, cost: Option<Cost>) -> Measurement {
    let Place {
        round,
        cell,
        contender,
    } = place;
    Measurement {
        round,
        cell,
        contender,
        iops: figures.iops,
        mib_per_second: figures.bytes_per_second / f64::from(1 << 20),
        p50_us: figures.p50_us,
        p99_us: figures.p99_us,
        p999_us: figures.p999_us,
        requests: figures.total_requests,
        cost,
    }
}

impl Measurement {
    /// The figure that counts in `cell`, in its unit.
    pub fn score(&self, cell: &Cell) -> f64 {
        if cell.in_bytes() {
            self.mib_per_second
        } else {
            self.iops / 1000.0
        }
    }
}

fn progress(contender: &Contender, cell: &Cell, measurement: &Measurement) -> String {
    let cpu = measurement.cost.as_ref().map_or(String::new(), |cost| {
        format!(", {:.2} µs CPU", cost.cpu_us_per_request)
    });
    format!(
        "{:<16} {:>8.1} {}{cpu}",
        contender.label(),
        measurement.score(cell),
        cell.unit()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cost_is_the_difference_of_two_readings_per_request() {
        let reading = |cpu_ns, voluntary_switches, resident| Usage {
            cpu_ns,
            voluntary_switches,
            resident,
            peak_resident: resident,
            threads: 1,
        };
        let cost = cost(
            &reading(1_000_000, 10, 4096),
            &reading(9_000_000, 30, 8192),
            4000,
            Duration::from_millis(20),
        );
        assert!((cost.cpu_us_per_request - 2.0).abs() < 1e-9);
        assert!((cost.switches_per_request - 0.005).abs() < 1e-9);
        assert_eq!((cost.resident_idle, cost.resident_peak), (4096, 8192));
    }

    #[test]
    fn a_daemon_that_does_not_end_cleanly_keeps_its_figures_and_is_a_failure_too() {
        let figures = Figures {
            iops: 1.0,
            bytes_per_second: 4096.0,
            p50_us: 1.0,
            p99_us: 1.0,
            p999_us: 1.0,
            total_requests: 1,
        };
        let usage = Usage::default();
        let mut cost = cost(&usage, &usage, 1, Duration::ZERO);
        cost.clean_stop = false;
        let filter = plan::Filter::default();
        let (cells, bare) = (plan::cells(&filter), Contender::bare());
        let mut results = Results::default();
        let place = Place {
            round: 2,
            cell: 1,
            contender: 0,
        };
        results.note(place, Ok((figures, Some(cost))), &cells[1], &bare);
        assert_eq!((results.measurements.len(), results.failures.len()), (1, 1));
        assert_eq!(
            (results.failures[0].round, results.failures[0].cell),
            (2, 1)
        );
    }
}
