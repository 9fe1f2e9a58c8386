//! Bad images from good ones: single bits, fields with interesting values, tables that point at each other, clusters in
//! the wrong place, ends that are missing.

use super::atlas::{Atlas, Kind, be32, be64, put};
use super::rng::Rng;

/// Where fields of the header are, and how many bytes they have.
const HEADER: [(u64, usize); 20] = [
    (0, 4),
    (4, 4),
    (8, 8),
    (16, 4),
    (20, 4),
    (24, 8),
    (32, 4),
    (36, 4),
    (40, 8),
    (48, 8),
    (56, 4),
    (60, 4),
    (64, 8),
    (72, 8),
    (80, 8),
    (88, 8),
    (96, 4),
    (100, 4),
    (104, 4),
    (108, 4),
];

/// Changes an image in one to four places; says how.
pub fn mutate(rng: &mut Rng, bytes: &mut Vec<u8>) -> Vec<String> {
    let times = rng.within(1..5);
    (0..times).map(|_| once(rng, bytes)).collect()
}

fn once(rng: &mut Rng, bytes: &mut Vec<u8>) -> String {
    let atlas = Atlas::of(bytes);
    match rng.below(100) {
        0..20 => {
            let (at, width) = rng.pick(&HEADER);
            field(rng, &atlas, bytes, at, width)
        }
        20..70 => {
            let (at, width) = entry(rng, &atlas, bytes);
            field(rng, &atlas, bytes, at, width)
        }
        70..78 => {
            let at = rng.below(bytes.len() as u64);
            let bit = rng.below(8);
            bytes[at as usize] ^= 1 << bit;
            format!("bit {bit} of byte {at}")
        }
        78..84 => {
            // In the header's extensions, the snapshot table and the like.
            let at = metadata(rng, &atlas, bytes);
            let byte = rng.next() as u8;
            bytes[at as usize] = byte;
            format!("byte {at} = {byte:#x}")
        }
        84..90 => {
            let unit = rng.pick(&[1, 512, atlas.cluster]);
            let len = rng.below(bytes.len() as u64) / unit * unit;
            bytes.truncate(len.max(104) as usize);
            format!("truncated to {}", bytes.len())
        }
        90..96 => copy_cluster(rng, &atlas, bytes),
        _ => swap_entries(rng, &atlas, bytes),
    }
}

/// A byte of some metadata.
fn metadata(rng: &mut Rng, atlas: &Atlas, bytes: &[u8]) -> u64 {
    let region = &atlas.regions[rng.below(atlas.regions.len() as u64) as usize].1;
    let most = if region.start == 0 { 1024 } else { u64::MAX };
    let end = region.end.min(bytes.len() as u64).min(most);
    if region.start >= end {
        return rng.below(bytes.len() as u64);
    }
    rng.within(region.start..end)
}

/// An entry of a table: mostly one that is in use.
fn entry(rng: &mut Rng, atlas: &Atlas, bytes: &[u8]) -> (u64, usize) {
    let mut at = 0;
    for _ in 0..20 {
        at = metadata(rng, atlas, bytes) / 8 * 8;
        if be64(bytes, at) != 0 {
            break;
        }
    }
    let width = rng.pick(&[8, 8, 8, 4, 2]);
    (at, width)
}

/// Puts something interesting into a field.
fn field(rng: &mut Rng, atlas: &Atlas, bytes: &mut [u8], at: u64, width: usize) -> String {
    let now = match width {
        8 => be64(bytes, at),
        4 => be32(bytes, at),
        _ => be32(bytes, at) >> 16,
    };
    let end = bytes.len() as u64;
    let region = &atlas.regions[rng.below(atlas.regions.len() as u64) as usize].1;
    let flags = rng.pick(&[0, 1, 1 << 63, 1 << 62, 1 << 63 | 1, 3 << 62]);
    let value = match rng.below(16) {
        0 => 0,
        1 => u64::MAX,
        2 => 1 << rng.below(64),
        3 => now ^ 1 << rng.below(8 * width as u64),
        4 => now.wrapping_add(1),
        5 => now.wrapping_sub(1),
        6 => now ^ flags,
        7 => (end / atlas.cluster * atlas.cluster) | flags,
        8 => end + atlas.cluster,
        9 => now.wrapping_add(rng.pick(&[512, atlas.cluster, atlas.cluster / 2])),
        10 => now.wrapping_sub(atlas.cluster),
        11 => rng.pick(&[7, 8, 9, 21, 22, 63, 64, 104, 112, 0x7FFF_FFFF, 0x8000_0000]),
        12 => rng.next(),
        _ => region.start | flags,
    };
    put(bytes, at, width, value);
    format!("{width} bytes at {at}: {now:#x} became {value:#x}")
}

fn copy_cluster(rng: &mut Rng, atlas: &Atlas, bytes: &mut [u8]) -> String {
    let clusters = bytes.len() as u64 / atlas.cluster;
    if clusters < 2 {
        return "nothing".to_owned();
    }
    let from = rng.below(clusters) * atlas.cluster;
    // Rarely over the header, which would be the end of it.
    let first = u64::from(rng.chance(90));
    let to = rng.within(first..clusters) * atlas.cluster;
    let range = from as usize..(from + atlas.cluster) as usize;
    bytes.copy_within(range, to as usize);
    format!("cluster at {from} copied to {to}")
}

fn swap_entries(rng: &mut Rng, atlas: &Atlas, bytes: &mut [u8]) -> String {
    let kind = rng.pick(&[Kind::L1, Kind::L2, Kind::RefcountTable, Kind::L2]);
    let tables: Vec<_> = atlas.all(kind).cloned().collect();
    if tables.is_empty() {
        return "nothing".to_owned();
    }
    let mut place = || {
        let table = &tables[rng.below(tables.len() as u64) as usize];
        table.start + rng.below((table.end - table.start) / 8) * 8
    };
    let (a, b) = (place(), place());
    let (of_a, of_b) = (be64(bytes, a), be64(bytes, b));
    put(bytes, a, 8, of_b);
    put(bytes, b, 8, of_a);
    format!("entries at {a} and {b} swapped")
}
