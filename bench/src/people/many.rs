//! Many images with partitions in one process: how long until all files are there, and what they take.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::partition;
use super::served::Served;
use crate::cli::People;
use crate::error::{At, Error, Result};
use crate::report::{mebibytes, short};
use crate::stats;

const COUNTS: [u32; 3] = [1, 10, 100];
const PARTITIONS: u32 = 9;
/// Size of each image in MiB.
const IMAGE: u64 = 20;

/// One process with many images, from start to end.
#[derive(Debug, Clone, Serialize)]
pub struct Life {
    round: u32,
    images: u32,
    files: u32,
    mount_ms: f64,
    read_ms: f64,
    stop_ms: f64,
    resident: u64,
    threads: u64,
}

/// Mounts each number of images once in each round.
pub fn run(binary: &Path, work: &Path, options: &People) -> Result<Vec<Life>> {
    let folder = work.join("images");
    fs::create_dir(&folder).at("create", &folder)?;
    let names: Vec<String> = (0..100).map(|number| format!("{number}.img")).collect();
    let first = folder.join(&names[0]);
    let file = File::create(&first).at("create", &first)?;
    file.set_len(IMAGE << 20).at("extend", &first)?;
    partition(&first, IMAGE, PARTITIONS)?;
    for name in &names[1..] {
        let image = folder.join(name);
        fs::copy(&first, &image).at("copy to", &image)?;
    }
    let mut lives = Vec::new();
    for round in 0..options.rounds {
        for images in COUNTS {
            eprintln!("round {}: {images} images", round + 1);
            lives.push(live(binary, &folder, &names[..images as usize], round)?);
        }
    }
    Ok(lives)
}

fn live(binary: &Path, folder: &Path, names: &[String], round: u32) -> Result<Life> {
    let into = folder.join("into");
    let mut arguments = ["mount", "--dir", "-w", "--threads", "2", "--into"]
        .map(str::to_owned)
        .to_vec();
    arguments.push(into.display().to_string());
    arguments.extend(
        names
            .iter()
            .map(|name| folder.join(name).display().to_string()),
    );
    let points: Vec<_> = names
        .iter()
        .map(|name| into.join(format!("{name}.d")))
        .collect();
    let (served, mount) = Served::start(binary, &arguments, points.clone())?;
    let began = Instant::now();
    let mut files = 0;
    let mut block = [0; 4096];
    for point in &points {
        for name in (1..=PARTITIONS).map(|number| format!("p{number}")) {
            let path = point.join(name);
            let file = File::open(&path).at("open", &path)?;
            file.read_exact_at(&mut block, 0).at("read", &path)?;
            files += 1;
        }
        let disk = point.join("disk");
        let size = fs::metadata(&disk).at("look at", &disk)?.len();
        if size != IMAGE << 20 {
            return Err(Error::Usage(format!("{} has {size} bytes", disk.display())));
        }
        files += 1;
    }
    let read = began.elapsed();
    let used = served.usage()?;
    let stop = served.stop()?;
    Ok(Life {
        round,
        images: names.len() as u32,
        files,
        mount_ms: milliseconds(mount),
        read_ms: milliseconds(read),
        stop_ms: milliseconds(stop),
        resident: used.resident,
        threads: used.threads,
    })
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// Medians over the rounds, and what one more image costs.
pub fn table(lives: &[Life]) -> String {
    let mut text = format!(
        "{:>6} {:>6} {:>9} {:>9} {:>9} {:>8} {:>8} {:>10} {:>9}\n",
        "images",
        "files",
        "mount ms",
        "read ms",
        "stop ms",
        "threads",
        "RSS MiB",
        "KiB/image",
        "ms/image"
    );
    let of = |value: &dyn Fn(&Life) -> f64, images: u32| {
        let rounds = lives.iter().filter(|life| life.images == images);
        stats::median(&rounds.map(value).collect::<Vec<_>>()).unwrap_or(f64::NAN)
    };
    for images in COUNTS {
        let more = |value: &dyn Fn(&Life) -> f64| match images {
            1 => "-".to_owned(),
            _ => short((of(value, images) - of(value, 1)) / f64::from(images - 1)),
        };
        let _ = writeln!(
            text,
            "{images:>6} {:>6} {:>9} {:>9} {:>9} {:>8} {:>8} {:>10} {:>9}",
            of(&|life| f64::from(life.files), images),
            short(of(&|life| life.mount_ms, images)),
            short(of(&|life| life.read_ms, images)),
            short(of(&|life| life.stop_ms, images)),
            of(&|life| life.threads as f64, images),
            short(of(&|life| mebibytes(life.resident), images)),
            more(&|life| life.resident as f64 / 1024.0),
            more(&|life| life.mount_ms),
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_more_costs_leaves_the_first_one_out() {
        let life = |images, mount_ms, resident| Life {
            round: 0,
            images,
            files: images * 10,
            mount_ms,
            read_ms: 1.0,
            stop_ms: 1.0,
            resident,
            threads: 5,
        };
        let table = table(&[
            life(1, 10.0, 8 << 20),
            life(10, 19.0, 17 << 20),
            life(100, 208.0, 8 << 20),
        ]);
        let fields: Vec<&str> = table
            .lines()
            .nth(2)
            .unwrap()
            .split_whitespace()
            .rev()
            .take(2)
            .collect();
        assert_eq!(fields, ["1.00", "1024"]);
    }
}
