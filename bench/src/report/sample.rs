//! Small runs for the tests of the reports. Nothing was measured for them.

use crate::cli::Transport;
use crate::contender::Program;
use crate::plan::{Filter, Mode, Rows, Target, cells};
use crate::report::*;

fn contender(family: &str, role: Role, queues: u32) -> Contender {
    Contender {
        family: family.to_owned(),
        role,
        queues,
        program: Program::None,
    }
}

fn with(program: Program, contender: Contender) -> Contender {
    Contender {
        program,
        ..contender
    }
}

/// Ours with 1 and 4 queues, a peer with 1 and 4 threads, the bare file.
pub fn contenders() -> Vec<Contender> {
    vec![
        contender("diskfuse", Role::Ours, 1),
        contender("diskfuse", Role::Ours, 4),
        contender("qemu", Role::Peer, 1),
        contender("qemu", Role::Peer, 4),
        Contender::bare(),
    ]
}

/// Ours with whatever transport and with io_uring, a peer, both bare servers.
fn floor_contenders() -> Vec<Contender> {
    let ours = Program::Ours {
        binary: "diskfuse".into(),
        extra: "transport=uring".to_owned(),
    };
    let floor = |transport| Program::Floor {
        binary: "xtask".into(),
        transport,
    };
    vec![
        contender("diskfuse", Role::Ours, 1),
        with(ours, contender("uring", Role::Ours, 1)),
        contender("qemu", Role::Peer, 1),
        with(
            floor(Transport::Device),
            contender("bare-device", Role::Floor, 1),
        ),
        with(
            floor(Transport::Uring),
            contender("bare-uring", Role::Floor, 1),
        ),
    ]
}

fn measurement(round: u32, cell: usize, contender: usize, kiops: f64, p99_us: f64) -> Measurement {
    let cost = Cost {
        cpu_us_per_request: 2.5,
        switches_per_request: 0.5,
        resident_idle: 10 << 20,
        resident_peak: 20 << 20,
        start_ms: 30.0,
        clean_stop: true,
    };
    Measurement {
        round,
        cell,
        contender,
        iops: kiops * 1000.0,
        mib_per_second: kiops * 4.0,
        p50_us: 100.0,
        p99_us,
        p999_us: 2.0 * p99_us,
        requests: 1000,
        cost: Some(cost),
    }
}

/// Four file cells, three rounds in each of which the machine is slower than before. In the first cell ours with one
/// queue is 1.5 times the best peer and with four queues 0.75 times; in the others all is well.
pub fn report() -> Report {
    let first = [1.5, 0.75, 1.0, 0.5, 2.0];
    let others = [2.0, 3.0, 1.0, 0.5, 2.5];
    make(Target::File, &contenders(), [first, others], [900.0; 5])
}

/// Four null cells in which the floor of io_uring is the best: ours is 0.5 times of it, and with io_uring 0.75 times. Ours
/// with io_uring has a 99th percentile 1.5 times as high as the peer's.
pub fn floor_report() -> Report {
    let scores = [2.0, 3.0, 1.0, 2.5, 4.0];
    let tails = [600.0, 1200.0, 800.0, 100.0, 50.0];
    make(Target::Null, &floor_contenders(), [scores, scores], tails)
}

/// Scores are those of the first cell and of the others.
fn make(
    target: Target,
    contenders: &[Contender],
    scores: [[f64; 5]; 2],
    tails: [f64; 5],
) -> Report {
    let filter = Filter {
        rows: vec![Rows::Small],
        targets: vec![target],
        modes: vec![Mode::Aio],
        jobs: vec![1],
        ..Filter::default()
    };
    let cells = cells(&filter);
    let mut measurements = Vec::new();
    for cell in 0..cells.len() {
        for round in 0..3 {
            let speed = 100.0 / f64::from(round + 1);
            for (number, one) in contenders.iter().enumerate() {
                let score = scores[cell.min(1)][number] * speed;
                let mut made = measurement(round, cell, number, score, tails[number]);
                made.cost = made.cost.filter(|_| one.role != Role::Bare);
                measurements.push(made);
            }
        }
    }
    let summary = summarise(&cells, contenders, &measurements);
    Report {
        machine: Machine {
            cpu: "Some <CPU> & more".to_owned(),
            cores: 2,
            memory_mib: 4096,
            kernel: "6.18".to_owned(),
            file_system: "ext4".to_owned(),
            fio: "fio-3.33".to_owned(),
            date: "2026-11-23 00:00 UTC".to_owned(),
            commit: "none".to_owned(),
        },
        settings: Settings {
            rounds: 3,
            seconds: 2.0,
            warm_seconds: 0.25,
            size_mib: 1024,
            command: "cargo xtask bench".to_owned(),
        },
        entrants: contenders
            .iter()
            .map(|contender| Entrant {
                label: contender.label(),
                family: contender.family.clone(),
                role: contender.role,
                queues: contender.queues,
                version: "1.0".to_owned(),
                description: contender.describe(),
            })
            .collect(),
        cells,
        results: Results {
            measurements,
            failures: Vec::new(),
            interrupted: false,
        },
        summary,
    }
}
