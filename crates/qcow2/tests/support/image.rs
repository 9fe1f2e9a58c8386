//! Random images, made by the real `qemu-img` and `qemu-io` over the whole space of options, with a recipe of all the
//! commands for whoever has to find out what went wrong.

use std::path::{Path, PathBuf};

use super::rng::Rng;
use super::tools::{self, qemu_img, text};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
pub const SECTOR: u64 = 512;

/// What `qemu-img create` is told about one image.
#[derive(Clone, Debug)]
pub struct Options {
    pub cluster_size: u64,
    pub v3: bool,
    pub refcount_bits: u32,
    pub extended_l2: bool,
    pub lazy_refcounts: bool,
    pub zstd: bool,
    pub preallocation: &'static str,
    /// An external data file; true if it must stay valid as a raw image.
    pub data_file: Option<bool>,
}

/// One image of a chain. `options` is `None` for a raw one.
#[derive(Clone, Debug)]
pub struct Layer {
    pub path: PathBuf,
    pub options: Option<Options>,
    pub data_file: Option<PathBuf>,
    pub size: u64,
}

/// What kind of images are wanted.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// Layers at most.
    pub depth: u64,
    /// Internal snapshots may be there.
    pub snapshots: bool,
    /// Persistent bitmaps may be there.
    pub bitmaps: bool,
    /// Compressed clusters may be there.
    pub compressed: bool,
    /// Commands of qemu-io per batch at most.
    pub commands: u64,
    /// A sparse disk of about a TiB.
    pub huge: bool,
    /// Bytes of a disk at most, unless it is huge.
    pub most: u64,
}

/// An internal snapshot.
#[derive(Clone)]
pub struct Snapshot {
    pub name: String,
    /// Bytes of the disk when it was taken.
    pub size: u64,
}

/// A chain of images in a directory of its own, the base first. The directory goes with it.
pub struct Image {
    pub dir: tempfile::TempDir,
    pub layers: Vec<Layer>,
    pub snapshots: Vec<Snapshot>,
    pub recipe: Vec<String>,
    noise: PathBuf,
    /// QEMU could not do what it should.
    spoiled: bool,
}

impl Image {
    pub fn top(&self) -> &Layer {
        self.layers.last().unwrap()
    }

    pub fn path(&self) -> &Path {
        &self.top().path
    }

    pub fn options(&self) -> &Options {
        self.top().options.as_ref().unwrap()
    }

    /// A random one, sound as QEMU sees it. QEMU 10 now and then spoils an image itself, by overwriting compressed
    /// clusters that a snapshot shares or with very narrow refcounts; those are thrown away.
    pub fn random(rng: &mut Rng, wanted: Wanted) -> Self {
        for _ in 0..20 {
            let image = Self::attempt(rng, wanted);
            if !image.spoiled && image.is_sound() {
                return image;
            }
        }
        panic!("20 images in a row were bad as made by QEMU");
    }

    fn is_sound(&self) -> bool {
        let path = text(self.path());
        let (clean, _) = tools::try_qemu_img(&["check", "-f", "qcow2", path]);
        // The check does not mind that QEMU has marked the image as corrupt.
        let told = tools::qemu_img(&["info", "--output=json", "-f", "qcow2", path]);
        let told: serde_json::Value = serde_json::from_str(&told).unwrap();
        let corrupt = &told["format-specific"]["data"]["corrupt"];
        clean && corrupt != true && tools::try_convert(self.path(), &self.raw(), None).is_ok()
    }

    /// What QEMU reads.
    pub fn raw(&self) -> PathBuf {
        self.file("raw")
    }

    fn attempt(rng: &mut Rng, wanted: Wanted) -> Self {
        let mut image = Self::empty();
        image.make_noise(rng);
        let depth = if rng.chance(50) {
            1
        } else {
            rng.within(1..wanted.depth + 1)
        };
        let mut size = disk_size(rng, wanted);
        for level in 0..depth {
            if level > 0 && rng.chance(40) && !wanted.huge {
                size = disk_size(rng, wanted);
            }
            let raw = level == 0 && depth > 1 && rng.chance(30) && !wanted.huge;
            if raw {
                image.add_raw(rng, size);
            } else {
                image.add_qcow2(rng, size, wanted);
            }
        }
        image
    }

    pub fn empty() -> Self {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        Self {
            noise: dir.path().join("noise"),
            dir,
            layers: Vec::new(),
            snapshots: Vec::new(),
            recipe: Vec::new(),
            spoiled: false,
        }
    }

    /// A file to write from whose clusters compress well, badly, or not at all.
    fn make_noise(&self, rng: &mut Rng) {
        let mut bytes = vec![0; 192 * KIB as usize];
        for chunk in bytes.chunks_mut(8 * KIB as usize) {
            let random = rng.below(chunk.len() as u64 + 1) as usize;
            rng.fill(&mut chunk[..random]);
            chunk[random..].fill(rng.next() as u8);
        }
        std::fs::write(&self.noise, bytes).unwrap();
    }

    fn add_raw(&mut self, rng: &mut Rng, size: u64) {
        let path = self.dir.path().join("base.raw");
        let mut bytes = vec![0; size as usize];
        for _ in 0..rng.below(12) {
            let at = rng.below(size) as usize;
            let len = (rng.length(1, 256 * KIB) as usize).min(bytes.len() - at);
            bytes[at..at + len].fill(rng.next() as u8);
        }
        // Now and then not whole sectors: the rest of the last one reads as zeroes.
        let cut = if rng.chance(20) { rng.below(SECTOR) } else { 0 };
        bytes.truncate((size - cut) as usize);
        write_sparse(&path, &bytes);
        self.recipe
            .push(format!("# base.raw: {} bytes", bytes.len()));
        self.layers.push(Layer {
            path,
            options: None,
            data_file: None,
            size,
        });
    }

    fn add_qcow2(&mut self, rng: &mut Rng, size: u64, wanted: Wanted) {
        let options = Options::random(rng, size, !self.layers.is_empty(), wanted);
        self.create(&options, size);
        // Those of the top only are read.
        self.snapshots.clear();
        self.fill(rng, wanted);
    }

    /// An empty image above those that are there.
    pub fn create(&mut self, options: &Options, size: u64) {
        let level = self.layers.len();
        let path = self.dir.path().join(format!("layer{level}.qcow2"));
        let data_file = self.dir.path().join(format!("layer{level}.data"));
        let data_file = options.data_file.map(|_| data_file);
        let settings = options.settings(data_file.as_deref());
        let size_text = size.to_string();
        let mut args = vec!["create", "-q", "-f", "qcow2", "-o", &settings];
        let backing = self.layers.last().cloned();
        if let Some(backing) = &backing {
            let format = if backing.options.is_some() {
                "qcow2"
            } else {
                "raw"
            };
            args.extend(["-b", text(&backing.path), "-F", format]);
        }
        args.extend([text(&path), &size_text]);
        self.command(&args);
        self.layers.push(Layer {
            path,
            options: Some(options.clone()),
            data_file,
            size,
        });
    }

    /// Batches of writes with what only qemu-img does in between.
    fn fill(&mut self, rng: &mut Rng, wanted: Wanted) {
        let top = self.top().clone();
        let options = self.options().clone();
        let own_data = options.data_file.is_some();
        for _ in 0..rng.within(1..4) {
            let script = self.script(rng, wanted);
            self.io(&script);
            let may = wanted.snapshots && !own_data && options.refcount_bits > 1;
            if may && rng.chance(25) && self.snapshots.len() < 2 {
                let name = format!("snap{}", self.snapshots.len());
                let args = ["snapshot", "-c", &name, text(&top.path)];
                let (worked, _) = tools::try_qemu_img(&args);
                self.recipe.push(format!("qemu-img {}", args.join(" ")));
                self.spoiled |= !worked;
                let size = self.top().size;
                self.snapshots.push(Snapshot { name, size });
            } else if rng.chance(12) && !wanted.huge {
                let size = disk_size(rng, wanted).min(64 * MIB).to_string();
                let (worked, _) = tools::try_qemu_img(&[
                    "resize",
                    "-q",
                    "-f",
                    "qcow2",
                    "--shrink",
                    text(&top.path),
                    &size,
                ]);
                if worked {
                    self.recipe.push(format!("qemu-img resize {size}"));
                    self.layers.last_mut().unwrap().size = size.parse().unwrap();
                }
            }
        }
        if wanted.bitmaps && options.v3 && rng.chance(20) {
            let args = ["bitmap", "--add", "-f", "qcow2", text(&top.path), "dirty"];
            let (worked, _) = tools::try_qemu_img(&args);
            self.recipe.push(format!("qemu-img {}", args.join(" ")));
            self.spoiled |= !worked;
            let script = self.script(rng, wanted);
            self.io(&script);
        }
    }

    /// More commands of qemu-io on the top; nothing that QEMU is known to spoil images with.
    pub fn more(&mut self, rng: &mut Rng, wanted: Wanted) {
        let script = self.script(
            rng,
            Wanted {
                compressed: false,
                ..wanted
            },
        );
        self.io(&script);
        assert!(!self.spoiled, "QEMU failed\n{}", self.story());
    }

    /// How it was made.
    pub fn story(&self) -> String {
        self.recipe.join("\n")
    }

    /// Random commands for qemu-io.
    fn script(&self, rng: &mut Rng, wanted: Wanted) -> String {
        let options = self.options();
        let size = self.top().size;
        let cluster = options.cluster_size;
        let mut script = String::new();
        let noise = text(&self.noise);
        // In a huge disk the places must be few, or there is nothing but holes between them.
        let may_compress = wanted.compressed && options.data_file.is_none();
        let mostly_compressed = may_compress && rng.chance(25);
        let places: Vec<u64> = (0..4).map(|_| rng.below(size)).collect();
        for _ in 0..rng.below(wanted.commands + 1) {
            let unit = if rng.chance(40) { cluster } else { SECTOR };
            let most = MIB.max(2 * cluster).min(size);
            let len = rng.length(unit, most).min(size);
            let at = if wanted.huge {
                (rng.pick(&places) + rng.below(4 * MIB)).min(size - len)
            } else {
                rng.below(size - len + 1)
            };
            let at = at / unit * unit;
            let byte = rng.within(1..256);
            let what = if mostly_compressed && rng.chance(60) {
                60
            } else {
                rng.below(100)
            };
            let line = match what {
                0..45 => format!("write -q -P {byte} {at} {len}\n"),
                45..52 => format!("write -q -s {noise} {at} {}\n", len.min(512 * KIB)),
                52..65 if may_compress => {
                    let at = at / cluster * cluster;
                    let len = rng.length(cluster, 4 * cluster).min(size - at);
                    if rng.chance(50) {
                        format!("write -q -c -s {noise} {at} {len}\n")
                    } else {
                        format!("write -q -c -P {byte} {at} {len}\n")
                    }
                }
                52..75 => format!("write -q -z {at} {len}\n"),
                75..85 => format!("write -q -z -u {at} {len}\n"),
                85..95 => format!("discard -q {at} {len}\n"),
                _ => "flush\n".to_owned(),
            };
            script.push_str(&line);
        }
        script
    }

    fn io(&mut self, script: &str) {
        let path = self.path().to_owned();
        self.recipe
            .push(format!("qemu-io {}:\n{script}", path.display()));
        // A v2 image cannot discard above a backing file and says so.
        let said = tools::try_qemu_io(&path, script);
        // Nor does QEMU compress what is allocated already.
        let expected = |line: &str| {
            line.contains("not supported") || line.contains("write failed: Input/output error")
        };
        let bad = |line: &&str| line.contains("failed") && !expected(line);
        self.spoiled |= said.lines().any(|line| bad(&line));
    }

    /// Runs qemu-img and writes it down.
    pub fn command(&mut self, args: &[&str]) {
        self.recipe.push(format!("qemu-img {}", args.join(" ")));
        qemu_img(args);
    }

    /// A path in the image's directory.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

impl Options {
    /// Those of `qemu-img create` without any.
    pub fn plain() -> Self {
        Self {
            cluster_size: 64 * KIB,
            v3: true,
            refcount_bits: 16,
            extended_l2: false,
            lazy_refcounts: false,
            zstd: false,
            preallocation: "off",
            data_file: None,
        }
    }

    fn random(rng: &mut Rng, size: u64, has_backing: bool, wanted: Wanted) -> Self {
        let bits = match (wanted.huge, rng.chance(40)) {
            (true, _) => rng.within(16..22),
            (false, true) => 16,
            (false, false) => rng.within(9..22),
        };
        let v3 = rng.chance(85);
        let extended_l2 = v3 && bits >= 14 && rng.chance(30);
        // QEMU writes all tables of a disk whose data file is raw: 256 MiB for a huge one, minutes on a slow disk.
        let may_be_raw = !has_backing && !wanted.huge;
        let data_file = (v3 && rng.chance(15)).then(|| may_be_raw && rng.chance(50));
        let small = size <= 8 * MIB;
        let preallocation = match rng.below(10) {
            _ if wanted.huge || (has_backing && !extended_l2) => "off",
            0 | 1 => "metadata",
            2 => "falloc",
            3 if small => "full",
            _ => "off",
        };
        Self {
            cluster_size: 1 << bits,
            v3,
            refcount_bits: if v3 && rng.chance(50) {
                1 << rng.below(7)
            } else {
                16
            },
            extended_l2,
            lazy_refcounts: v3 && rng.chance(20),
            zstd: v3 && rng.chance(40),
            preallocation,
            data_file,
        }
    }

    fn settings(&self, data_file: Option<&Path>) -> String {
        let mut all = format!(
            "cluster_size={},compat={},preallocation={}",
            self.cluster_size,
            if self.v3 { "1.1" } else { "0.10" },
            self.preallocation
        );
        if self.v3 {
            let more = format!(
                ",refcount_bits={},extended_l2={},lazy_refcounts={},compression_type={}",
                self.refcount_bits,
                on(self.extended_l2),
                on(self.lazy_refcounts),
                if self.zstd { "zstd" } else { "zlib" }
            );
            all.push_str(&more);
        }
        if let (Some(raw), Some(path)) = (self.data_file, data_file) {
            all.push_str(&format!(
                ",data_file={},data_file_raw={}",
                text(path),
                on(raw)
            ));
        }
        all
    }
}

fn on(is: bool) -> &'static str {
    if is { "on" } else { "off" }
}

fn disk_size(rng: &mut Rng, wanted: Wanted) -> u64 {
    if wanted.huge {
        return (1 << 40) + rng.below(1 << 20) * SECTOR;
    }
    let size = rng.length(SECTOR, wanted.most).max(128 * KIB);
    if rng.chance(50) {
        size.next_multiple_of(MIB).min(wanted.most)
    } else {
        size
    }
}

/// Writes what is not zero only.
fn write_sparse(path: &Path, bytes: &[u8]) {
    use std::os::unix::fs::FileExt as _;
    let file = std::fs::File::create(path).unwrap();
    file.set_len(bytes.len() as u64).unwrap();
    for (n, chunk) in bytes.chunks(4096).enumerate() {
        if chunk.iter().any(|&b| b != 0) {
            file.write_all_at(chunk, n as u64 * 4096).unwrap();
        }
    }
}
