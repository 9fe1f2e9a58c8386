//! Tasks of the project, called as `cargo xtask TASK`: the benchmark against peers, the measurements of many exports, of
//! jobs, of the monitor and of what people wait for, and the bare server that is the benchmark's floor. It runs programs and looks at them from outside; no crate of the product is
//! linked in, so that it can measure any binary.

// Counts become figures for people here; that a 64-bit count loses its last bits in a quotient is of no consequence.
#![allow(clippy::cast_precision_loss)]

mod bare;
mod bench;
mod cli;
mod contender;
mod daemon;
mod error;
mod fio;
mod guest;
mod image;
mod jobs;
mod line_up;
mod machine;
mod monitor;
mod mounts;
mod paired;
mod people;
mod plan;
mod qmp;
mod qsd11;
mod report;
mod run;
mod scale;
mod signals;
mod stats;
mod usage;

use std::process::ExitCode;

use clap::Parser;

use crate::cli::{Cli, Task};
use crate::error::Error;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let outcome = signals::install().and_then(|()| match &cli.task {
        Task::Bench(options) => bench::run(options),
        Task::Exports(options) => scale::run(options),
        Task::Jobs(options) => jobs::run(options),
        Task::Monitor(options) => monitor::run(options),
        Task::People(options) => people::run(options),
        Task::BareServer(options) => bare::run(options),
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        // As a shell reports a program that ^C ended.
        Err(Error::Interrupted) => {
            eprintln!("xtask: interrupted");
            ExitCode::from(130)
        }
        Err(error) => {
            eprintln!("xtask: {error}");
            ExitCode::FAILURE
        }
    }
}
