//! Images made by the real tools, over the whole space of options, read by us: byte for byte what `qemu-img convert`
//! reads, also of each snapshot, and what `qemu-img map` says of where it is.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::pedantic)]

mod support;

use std::fs::File;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use diskfuse_block::Node;
use diskfuse_qcow2::node::Qcow2Config;
use support::engine::{self, Below};
use support::image::{Image, SECTOR, Snapshot, Wanted};
use support::model::read_at;
use support::rng::Rng;
use support::tools::MapEntry;
use support::{cases, tools};

const WANTED: Wanted = Wanted {
    depth: 4,
    snapshots: true,
    bitmaps: true,
    compressed: true,
    commands: 24,
    huge: false,
    most: 32 << 20,
};

#[test]
fn random_images_read_as_qemu_reads_them() {
    cases::run("read", 150, |seed| case(seed, WANTED));
}

#[test]
fn huge_sparse_images_read_as_qemu_reads_them() {
    let wanted = Wanted {
        huge: true,
        ..WANTED
    };
    cases::run("read a huge disk", 4, |seed| case(seed, wanted));
}

fn case(seed: u64, wanted: Wanted) {
    let mut rng = Rng::new(seed);
    let image = Image::random(&mut rng, wanted);
    let cluster_size = image.options().cluster_size;
    let below = Below {
        direct: rng.chance(20),
        read_only: true,
    };
    let config = Qcow2Config {
        read_only: true,
        l2_cache_size: rng.chance(50).then_some(2 * cluster_size),
        ..Qcow2Config::default()
    };
    let map = tools::map(image.path());
    let choice = engine::random_choice(&mut rng);
    let result = engine::run(choice, async {
        let node = engine::open(&image.layers, &config, below).await;
        let node = node.map_err(|e| format!("open: {e}"))?;
        let disk: Arc<dyn Node> = node.clone();
        same_contents(&mut rng, &disk, image.top().size, &image.raw(), &map).await?;
        same_map(&mut rng, &image, &*disk, &map).await?;
        node.close().await.map_err(|e| format!("close: {e}"))
    });
    if let Err(wrong) = result {
        panic!("{wrong}\n{config:?} {below:?}\n{}", image.story());
    }
    for Snapshot { name, size } in &image.snapshots {
        let raw = image.file("snapshot.raw");
        if let Err(said) = tools::try_convert(image.path(), &raw, Some(name)) {
            // QEMU does not read every snapshot that it has made: then there is nothing to compare with.
            eprintln!("not compared: {said}");
            continue;
        }
        let config = Qcow2Config {
            snapshot: Some(name.clone()),
            ..config.clone()
        };
        let result = engine::run(choice, async {
            let node = engine::open(&image.layers, &config, below).await;
            let disk: Arc<dyn Node> = node.map_err(|e| format!("open: {e}"))?;
            let all = everything(&raw);
            same_contents(&mut rng, &disk, *size, &raw, &all).await
        });
        if let Err(wrong) = result {
            panic!("snapshot {name}: {wrong}\n{}", image.story());
        }
    }
}

/// A map that says that there may be data everywhere in the file.
fn everything(raw: &Path) -> Vec<MapEntry> {
    let file = File::open(raw).unwrap();
    let size = file.metadata().unwrap().len();
    let data = support::model::data_extents(&file, size);
    let entry = |(start, length)| MapEntry {
        start,
        length,
        depth: 0,
        present: true,
        zero: false,
        data: true,
        compressed: false,
        offset: None,
    };
    data.into_iter().map(entry).collect()
}

/// Reads in pieces of all sizes, four at a time, of which many begin and end within sectors. The disk must have `size`
/// bytes; `raw` may be longer or shorter, as QEMU gives snapshots the size that the disk has now.
async fn same_contents(
    rng: &mut Rng,
    disk: &Arc<dyn Node>,
    size: u64,
    raw: &Path,
    map: &[MapEntry],
) -> Result<(), String> {
    if disk.size() != size {
        return Err(format!("{} bytes instead of {size}", disk.size()));
    }
    let size = size.min(std::fs::metadata(raw).unwrap().len());
    let mut pieces = Vec::new();
    let whole = size <= WANTED.most;
    let data = map.iter().filter(|e| e.data).map(|e| (e.start, e.length));
    let spans = if whole {
        vec![(0, size)]
    } else {
        data.collect()
    };
    for (start, len) in spans {
        let mut at = start;
        let end = (start + len).min(size);
        while at < end {
            let unit = if rng.chance(30) { 1 } else { SECTOR };
            let piece = rng.length(unit, 512 << 10).min(end - at);
            pieces.push((at, piece));
            at += piece;
        }
    }
    for _ in 0..20 {
        let at = rng.below(size);
        pieces.push((at, rng.length(1, 128 << 10).min(size - at)));
    }
    let raw = Rc::new(File::open(raw).unwrap());
    let pieces = Rc::new(pieces);
    let tasks: Vec<_> = (0..4)
        .map(|first| {
            let (disk, raw, pieces) = (Arc::clone(disk), Rc::clone(&raw), Rc::clone(&pieces));
            diskfuse_ring::spawn(async move {
                for &(at, len) in pieces.iter().skip(first).step_by(4) {
                    same_piece(&*disk, &raw, at, len).await?;
                }
                Ok::<(), String>(())
            })
        })
        .collect();
    for task in tasks {
        task.await?;
    }
    Ok(())
}

async fn same_piece(disk: &dyn Node, raw: &File, at: u64, len: u64) -> Result<(), String> {
    let found = engine::read(disk, at, len).await;
    let found = found.map_err(|e| format!("read {len} at {at}: {e}"))?;
    let expected = read_at(raw, at, len);
    let differs = found.iter().zip(&expected).position(|(a, b)| a != b);
    match differs {
        None => Ok(()),
        Some(n) => Err(format!(
            "read {len} at {at}: byte {} is {:#04x}, not {:#04x}",
            at + n as u64,
            found[n],
            expected[n]
        )),
    }
}

/// Walks over the status of the whole disk. What we call zeroes QEMU must call zeroes, or they are; where QEMU knows of
/// zeroes in a qcow2 layer, so do we; where QEMU finds data in the image file we find them at the same place.
async fn same_map(
    rng: &mut Rng,
    image: &Image,
    disk: &dyn Node,
    map: &[MapEntry],
) -> Result<(), String> {
    let raw = File::open(image.raw()).unwrap();
    for entry in map {
        let end = entry.start + entry.length;
        let mut at = entry.start;
        while at < end {
            let most = if rng.chance(50) {
                end - at
            } else {
                rng.length(SECTOR, end - at).min(end - at)
            };
            let status = disk.block_status(at, most).await;
            let status = status.map_err(|e| format!("status of {most} at {at}: {e}"))?;
            let wrong = |what: &str| {
                Err(format!(
                    "{what} at {at}: {status:?}, but QEMU says {entry:?}"
                ))
            };
            if status.len == 0 || status.len > most {
                return wrong("an impossible length");
            }
            if status.zero && !entry.zero && !is_zero(&raw, at, status.len) {
                return wrong("zeroes that are none");
            }
            let layer = image.layers.len().checked_sub(1 + entry.depth as usize);
            let of_qcow2 = layer.is_some_and(|n| image.layers[n].options.is_some());
            if entry.zero && !entry.data && of_qcow2 && !status.zero {
                return wrong("zeroes that we do not know of");
            }
            let here = entry.offset.map(|offset| offset + at - entry.start);
            let plain = entry.data && !entry.zero && entry.depth == 0 && !entry.compressed;
            if plain && status.host_offset != here {
                return wrong("another place");
            }
            if entry.compressed && entry.depth == 0 && status.host_offset.is_some() {
                return wrong("a place of compressed data");
            }
            at += status.len;
        }
    }
    Ok(())
}

fn is_zero(raw: &File, at: u64, len: u64) -> bool {
    let pieces = (at..at + len).step_by(1 << 20);
    let zero = |piece: u64| {
        let len = (at + len - piece).min(1 << 20);
        read_at(raw, piece, len).iter().all(|&b| b == 0)
    };
    pieces.into_iter().all(zero)
}
