//! How long until an image of 100 GiB is usable, all of whose metadata is there: by `diskfuse mount` in the background, with and
//! without the sandbox, and by QEMU's daemon.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::time::Duration;

use serde::Serialize;

use super::served::Served;
use crate::cli::People;
use crate::contender::{Contender, Role};
use crate::daemon::{Daemon, Launch, Messages};
use crate::error::{At, Error, Result};
use crate::image::qemu_img;
use crate::line_up;
use crate::report::short;
use crate::stats;

/// Bytes of the disk.
const SIZE: u64 = 100 << 30;

/// One start.
#[derive(Debug, Clone, Serialize)]
pub struct Start {
    round: u32,
    contender: String,
    milliseconds: f64,
    resident: u64,
}

/// Starts everyone once in each round.
pub fn run(binary: &Path, work: &Path, options: &People) -> Result<Vec<Start>> {
    let image = work.join("large.qcow2");
    let size = SIZE.to_string();
    let create = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "preallocation=metadata",
    ];
    let paths: [&OsStr; 2] = [image.as_ref(), size.as_ref()];
    qemu_img(&[&create.map(OsStr::new)[..], &paths[..]].concat())?;
    let file = fs::File::open(&image).at("open", &image)?;
    file.sync_all().at("sync", &image)?;
    let peers = line_up::contenders(&options.select, &[1], &[false], work)?;
    let peers: Vec<_> = peers
        .into_iter()
        .filter(|contender| contender.role == Role::Peer)
        .collect();
    let mut starts = Vec::new();
    for round in 0..options.rounds {
        for (name, sandbox) in [("diskfuse mount", "on"), ("  --sandbox off", "off")] {
            let (time, resident) = ours(binary, &image, sandbox)?;
            starts.push(start(round, name, time, resident));
        }
        for peer in &peers {
            let number = u64::from(round);
            let (mut daemon, time) = Daemon::start(launch(peer, work, number)?, Messages::Keep)?;
            let resident = daemon.usage()?.resident;
            daemon.stop();
            starts.push(start(round, &peer.label(), time, resident));
        }
    }
    Ok(starts)
}

fn start(round: u32, contender: &str, time: Duration, resident: u64) -> Start {
    Start {
        round,
        contender: contender.to_owned(),
        milliseconds: time.as_secs_f64() * 1000.0,
        resident,
    }
}

/// The time until the command returned, by when the file has its size, and the daemon's resident bytes.
fn ours(binary: &Path, image: &Path, sandbox: &str) -> Result<(Duration, u64)> {
    let point = super::beside(image, ".raw");
    let words = ["mount", "-w", "--sandbox", sandbox].map(str::to_owned);
    let paths = [image, &point].map(|path| path.display().to_string());
    let (served, time) =
        Served::start(binary, &[&words[..], &paths].concat(), vec![point.clone()])?;
    let seen = fs::metadata(&point).at("look at", &point)?.len();
    if seen != SIZE {
        return Err(Error::Usage(format!("{seen} bytes are shown of {SIZE}")));
    }
    let resident = served.usage()?.resident;
    served.stop()?;
    Ok((time, resident))
}

fn launch(peer: &Contender, work: &Path, number: u64) -> Result<Launch> {
    let nothing = || Error::Usage(format!("{} is not a daemon", peer.label()));
    let (mut command, inside, outside) = peer.program.open(work).ok_or_else(nothing)?;
    let file = inside.join("large.qcow2").display().to_string();
    let node = format!("qcow2,node-name=n,file.driver=file,file.filename={file}");
    command.args(["--blockdev", &node]);
    let name = format!("start-{number}");
    peer.export(&mut command, "n", &inside.join(&name));
    Ok(Launch {
        name: peer.label(),
        command,
        mountpoints: vec![outside.join(name)],
        size: SIZE,
    })
}

/// Medians over the rounds, and the median of one round's quotients to `diskfuse mount`.
pub fn table(starts: &[Start]) -> String {
    let mut text = format!(
        "{:<22} {:>10} {:>10} {:>10} {:>9}\n",
        "until 100 GiB is usable", "median ms", "largest", "to ours", "RSS MiB"
    );
    let mut names: Vec<&str> = Vec::new();
    for start in starts {
        if !names.contains(&start.contender.as_str()) {
            names.push(&start.contender);
        }
    }
    let of = |name: &str| -> Vec<(u32, f64)> {
        let rounds = starts.iter().filter(|start| start.contender == name);
        rounds
            .map(|start| (start.round, start.milliseconds))
            .collect()
    };
    for name in &names {
        let times: Vec<f64> = of(name).into_iter().map(|(_, value)| value).collect();
        let spread = stats::spread(&times);
        let ratio = stats::paired_ratio(&of(name), &of(names[0])).unwrap_or(f64::NAN);
        let resident = starts.iter().filter(|start| start.contender == *name);
        let resident: Vec<f64> = resident.map(|start| start.resident as f64).collect();
        let _ = writeln!(
            text,
            "{name:<23} {:>10} {:>10} {ratio:>9.2}× {:>9}",
            spread.map_or_else(String::new, |spread| short(spread.median)),
            spread.map_or_else(String::new, |spread| short(spread.max)),
            short(stats::median(&resident).unwrap_or(f64::NAN) / f64::from(1 << 20)),
        );
    }
    text
}
