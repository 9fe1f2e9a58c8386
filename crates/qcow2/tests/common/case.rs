//! Random images to begin with, made by `qemu-img`, and how the engine opens them. Each knows what its guest sees.

use std::path::Path;

use diskfuse_qcow2::node::Qcow2Config;
use tempfile::TempDir;

use super::SECTOR;
use super::model::{Version, stamp};
use super::rng::Rng;
use super::tools::{qemu_img, text};

const KIB: u64 = 1 << 10;

/// The version of what the image holds in the beginning, and of its backing file.
const IN_IMAGE: Version = 1;
const IN_BACKING: Version = 2;

/// What an image is like and how it is used.
#[derive(Clone, Debug)]
pub struct Case {
    pub seed: u64,
    /// Bytes of the disk.
    pub size: u64,
    pub cluster_size: u64,
    pub refcount_bits: u64,
    pub v3: bool,
    pub extended_l2: bool,
    pub lazy_refcounts: bool,
    pub backing: bool,
    pub compressed: bool,
    pub snapshot: bool,
    pub data_file: bool,
    /// It has persistent bitmaps, one that records and one that does not.
    pub bitmaps: bool,
    /// How much of the disk the image holds in the beginning, in percent.
    pub filled: u64,
    /// Only the first part of the disk is written to, so that clusters are freed and used again.
    pub hot: u64,
    /// Bytes of a request at most.
    pub most: u64,
    /// Whether the disk is made smaller and larger beside the rest.
    pub resizes: bool,
    /// Threads with a ring each.
    pub threads: u64,
    /// Guests on each.
    pub guests: u64,
    /// Requests of each.
    pub requests: u64,
    /// In percent of all requests.
    pub flushes: u64,
    pub discards: u64,
    pub zeroes: u64,
    /// The disk is closed in the end.
    pub closes: bool,
    /// See [`Manners`](super::disk::Manners).
    pub patience: u64,
    pub discarded: u8,
    /// How many states `qemu-img check` looks at as well, in percent.
    pub second_opinions: u64,
    pub config: Qcow2Config,
}

impl Case {
    /// Any.
    pub fn random(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let rng = &mut rng;
        let extended_l2 = rng.chance(20);
        let cluster_size = match extended_l2 {
            true => rng.pick(&[16 * KIB, 64 * KIB]),
            false => rng.pick(&[512, 512, 1024, 4 * KIB, 4 * KIB, 16 * KIB, 64 * KIB]),
        };
        let v3 = extended_l2 || rng.chance(85);
        let clusters = rng.within(40..2000);
        let size = (clusters * cluster_size).clamp(256 * KIB, 12 << 20);
        let backing = rng.chance(30);
        let compressed = rng.chance(20);
        let data_file = v3 && !compressed && rng.chance(8);
        let threads = rng.pick(&[1, 1, 1, 1, 2, 3]);
        let tiny = rng.chance(40);
        let cache = |tiny_size: u64| tiny.then_some(tiny_size);
        let refcount_bits = match v3 {
            true => rng.pick(&[16, 16, 16, 8, 64, 32, 4, 2]),
            false => 16,
        };
        // Compressed clusters share theirs, and a snapshot doubles all references.
        let counts_enough = !compressed || refcount_bits > 4;
        let snapshot = !data_file && counts_enough && rng.chance(25);
        let config = Qcow2Config {
            discard: rng.chance(75),
            discard_no_unref: rng.chance(10),
            compress: !data_file && rng.chance(10),
            pass_discard_other: rng.chance(30),
            l2_cache_size: cache(rng.pick(&[1, 2 * cluster_size, 8 * KIB])),
            refcount_cache_size: cache(rng.pick(&[1, 4 * cluster_size])),
            ..Qcow2Config::default()
        };
        Self {
            seed,
            size,
            cluster_size,
            refcount_bits,
            v3,
            extended_l2,
            lazy_refcounts: v3 && rng.chance(20),
            backing,
            compressed,
            snapshot,
            data_file,
            bitmaps: false,
            filled: rng.pick(&[0, 0, 20, 60, 100]),
            hot: rng
                .pick(&[size, size, size / 4, 8 * cluster_size])
                .max(cluster_size * 2)
                .min(size),
            most: rng.pick(&[4, 16, 64, 128]) * KIB,
            // An old image with snapshots cannot be resized.
            resizes: rng.chance(12) && (v3 || !snapshot),
            threads,
            guests: rng.pick(&[1, 2, 4, 8]),
            requests: rng.within(10..60),
            flushes: rng.pick(&[2, 8, 20]),
            discards: rng.pick(&[0, 8, 20]),
            zeroes: rng.pick(&[0, 8, 20]),
            closes: rng.chance(60),
            patience: rng.pick(&[0, 3, 10]),
            discarded: rng.pick(&[0, 0xDD]),
            second_opinions: 3,
            config,
        }
    }

    /// Makes the image with the tools of QEMU.
    pub fn make(&self) -> Start {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let path = |name: &str| dir.path().join(name);
        let (raw, image, base, data) = (path("raw"), path("image"), path("base"), path("data"));
        let mut rng = Rng::new(self.seed ^ 0x5EED);
        let sectors = (self.size / SECTOR) as usize;

        let mut versions = vec![0; sectors];
        let mut below = vec![0; sectors];
        let grain = (self.cluster_size / SECTOR).max(1) as usize;
        for cluster in versions.chunks_mut(grain) {
            let version = if rng.chance(self.filled) { IN_IMAGE } else { 0 };
            cluster.fill(version);
        }
        // The backing file may be shorter than the disk, and begins anywhere with data or none.
        let reach = sectors - rng.below(sectors as u64 / 2) as usize;
        for some in below[..reach].chunks_mut(rng.within(1..64) as usize) {
            let version = if rng.chance(60) { IN_BACKING } else { 0 };
            some.fill(version);
        }

        write_stamped(&raw, &versions);
        let mut options = vec![
            format!("cluster_size={}", self.cluster_size),
            format!("compat={}", if self.v3 { "1.1" } else { "0.10" }),
            format!("refcount_bits={}", self.refcount_bits),
        ];
        if self.v3 {
            let switch = |on| if on { "on" } else { "off" };
            options.push(format!("lazy_refcounts={}", switch(self.lazy_refcounts)));
            options.push(format!("extended_l2={}", switch(self.extended_l2)));
        }
        if self.data_file {
            options.push(format!("data_file={}", text(&data)));
        }
        let options = options.join(",");
        let mut convert = vec![
            "convert", "-S", "512", "-f", "raw", "-O", "qcow2", "-o", &options,
        ];
        if self.compressed {
            convert.push("-c");
        }
        convert.extend([text(&raw), text(&image)]);
        qemu_img(&convert);

        let mut initial = versions.clone();
        if self.backing {
            write_stamped(&base, &below[..reach]);
            let args = [
                "rebase",
                "-u",
                "-f",
                "qcow2",
                "-b",
                text(&base),
                "-F",
                "raw",
                text(&image),
            ];
            qemu_img(&args);
            // What the image does not hold shows its backing file.
            for (version, below) in initial.iter_mut().zip(&below) {
                if *version == 0 {
                    *version = *below;
                }
            }
        }
        if self.snapshot {
            qemu_img(&["snapshot", "-c", SNAPSHOT, text(&image)]);
        }
        if self.bitmaps {
            let granularity = BITMAPS_GRANULARITY.to_string();
            for (name, switch) in [(RECORDING, "--enable"), (STILL, "--disable")] {
                let args = [
                    "bitmap",
                    "--add",
                    "-g",
                    &granularity,
                    switch,
                    text(&image),
                    name,
                ];
                qemu_img(&args);
            }
        }
        let read = |path: &Path| std::fs::read(path).unwrap();
        Start {
            image: read(&image),
            data_file: self.data_file.then(|| read(&data)),
            backing: self.backing.then(|| read(&base)),
            initial,
            dir,
        }
    }
}

/// The name of the internal snapshot.
pub const SNAPSHOT: &str = "before";

/// The bitmaps, one of which records what is written, and the bytes of their units.
pub const RECORDING: &str = "recording";
pub const STILL: &str = "still";
pub const BITMAPS_GRANULARITY: u64 = 512;

/// What a run begins with.
pub struct Start {
    pub image: Vec<u8>,
    pub data_file: Option<Vec<u8>>,
    pub backing: Option<Vec<u8>>,
    /// What the guest sees, one version for each sector.
    pub initial: Vec<Version>,
    /// Where the image was made, with what it names.
    pub dir: TempDir,
}

fn write_stamped(path: &Path, versions: &[Version]) {
    let mut bytes = vec![0; versions.len() * SECTOR as usize];
    for ((number, &version), sector) in (0..).zip(versions).zip(bytes.chunks_mut(SECTOR as usize)) {
        stamp(number, version, sector);
    }
    std::fs::write(path, bytes).unwrap();
}
