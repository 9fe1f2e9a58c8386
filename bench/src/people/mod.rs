//! What people wait for who mount by `diskfuse mount`: the time until a large image is usable, a partition's speed beside the whole
//! disk's, what the sandbox costs, and many images in one process. Everything that is compared runs alternately in each round.

mod many;
mod pairs;
mod served;
mod start;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use clap::ValueEnum;
use serde::Serialize;

use crate::cli::People;
use crate::error::{At, Result};
use crate::image::tool;
use crate::line_up;
use crate::machine::Machine;

/// How long one command may take.
const LIMIT: Duration = Duration::from_secs(30);

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Subject {
    /// Time from the command to a usable file, for a qcow2 image of 100 GiB.
    Start,
    /// A partition's file beside the whole disk's.
    Partition,
    /// The same disk with and without the sandbox.
    Sandbox,
    /// 1, 10 and 100 images with nine partitions each, in one process.
    Many,
}

#[derive(Serialize)]
struct Document<'a> {
    machine: &'a Machine,
    starts: &'a [start::Start],
    pairs: &'a [pairs::Run],
    many: &'a [many::Life],
}

/// Runs the measurements and prints their tables; the raw figures go to `people.json`.
pub fn run(options: &People) -> Result<()> {
    let binary = line_up::build()?;
    let work = line_up::work(&options.select)?;
    let out = line_up::out(&options.select)?;
    let machine = Machine::look(work.path(), &line_up::tree())?;
    let (mut starts, mut runs, mut lives) = (Vec::new(), Vec::new(), Vec::new());
    for subject in &options.only {
        match subject {
            Subject::Start => {
                starts = start::run(&binary, work.path(), options)?;
                print!("{}", start::table(&starts));
            }
            Subject::Partition | Subject::Sandbox => {
                let new = pairs::run(&binary, *subject, work.path(), options)?;
                print!("{}", pairs::table(&new));
                runs.extend(new);
            }
            Subject::Many => {
                lives = many::run(&binary, work.path(), options)?;
                print!("{}", many::table(&lives));
            }
        }
    }
    let document = Document {
        machine: &machine,
        starts: &starts,
        pairs: &runs,
        many: &lives,
    };
    line_up::write(&out, "people.json", &document)
}

/// Gives the raw image `path` of `mebibytes` MiB, which is there, a GPT with `count` partitions that fill it.
fn partition(path: &Path, mebibytes: u64, count: u32) -> Result<()> {
    let each = (mebibytes - 2) / u64::from(count);
    let lines = format!("size={each}M\n").repeat(count as usize);
    let script = path.with_extension("sfdisk");
    fs::write(&script, format!("label: gpt\n{lines}")).at("write", &script)?;
    let input = fs::File::open(&script).at("open", &script)?;
    let mut sfdisk = Command::new("sfdisk");
    sfdisk
        .args(["-q", "--no-tell-kernel"])
        .arg(path)
        .stdin(input);
    tool("sfdisk", "apt-get install fdisk", sfdisk)
}

/// `path` with something appended to its name.
fn beside(path: &Path, end: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(end);
    name.into()
}
