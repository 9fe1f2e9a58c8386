//! What the tests of check and snapshots share: images by `qemu-img` and `qemu-io`, a look into their bytes, and both
//! checks side by side. Files are removed also when a test fails.

#![allow(dead_code)]

use std::future::Future;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use diskfuse_block::drivers::{FileConfig, FileNode, open_file};
use diskfuse_qcow2::check::{CheckResult, Repair, check};
use diskfuse_ring::{Config, Polling, Ring};

/// Runs a future on a ring of its own.
pub fn run<F: Future>(future: F) -> F::Output {
    let config = Config {
        polling: Polling::OFF,
        ..Config::default()
    };
    Ring::new(&config).unwrap().block_on(future)
}

pub fn tool(program: &str, args: &[&str]) -> Output {
    let output = Command::new("timeout")
        .arg("60")
        .arg(program)
        .args(args)
        .output();
    let output = output.unwrap_or_else(|e| panic!("cannot run timeout(1): {e}"));
    let missing = output.status.code() == Some(127);
    assert!(!missing, "{program} is missing: install it, see the README");
    output
}

/// Runs a tool, which must succeed, and returns what it printed.
pub fn must(program: &str, args: &[&str]) -> String {
    let output = tool(program, args);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{program} {args:?}: {said}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// An image in a directory of its own.
pub struct Image {
    pub dir: tempfile::TempDir,
    pub path: PathBuf,
}

impl Image {
    pub fn new(options: &str, size: &str) -> Self {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let path = dir.path().join("disk.qcow2");
        let image = Self { dir, path };
        let options = options.replace("DIR", image.dir.path().to_str().unwrap());
        let mut args = vec!["create", "-q", "-f", "qcow2"];
        if !options.is_empty() {
            args.extend(["-o", &options]);
        }
        args.extend([image.name(), size]);
        must("qemu-img", &args);
        image
    }

    pub fn name(&self) -> &str {
        self.path.to_str().unwrap()
    }

    pub fn io(&self, commands: &[&str]) {
        let mut args = vec!["-f", "qcow2"];
        for command in commands {
            args.extend(["-c", *command]);
        }
        args.push(self.name());
        let said = must("qemu-io", &args);
        assert!(!said.contains("failed"), "{commands:?}: {said}");
    }

    pub fn snapshot(&self, option: &str, name: &str) {
        must("qemu-img", &["snapshot", option, name, self.name()]);
    }

    pub fn node(&self) -> Arc<FileNode> {
        open(&self.path)
    }

    pub fn check(&self, repair: Repair) -> diskfuse_block::Result<CheckResult> {
        let node = self.node();
        run(check(&*node, repair, &mut |done, total| {
            assert!(done <= total)
        }))
    }

    /// What `qemu-img check` says.
    pub fn qemu_check(&self) -> Qemu {
        let output = tool(
            "qemu-img",
            &["check", "-f", "qcow2", "--output=json", self.name()],
        );
        let json = String::from_utf8_lossy(&output.stdout).into_owned();
        Qemu {
            code: output.status.code(),
            json: serde_json::from_str(&json).unwrap_or_default(),
            said: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Both checks find nothing wrong and say the same numbers.
    pub fn assert_clean(&self, what: &str) {
        let qemu = self.qemu_check();
        assert_eq!(qemu.code, Some(0), "{what}: {}", qemu.said);
        let ours = self.check(Repair::None).unwrap();
        assert!(ours.is_clean(), "{what}: {:?}", ours.messages);
        assert_same(&ours, &qemu, what);
    }

    pub fn bytes(&self) -> Vec<u8> {
        std::fs::read(&self.path).unwrap()
    }

    pub fn u64(&self, offset: u64) -> u64 {
        let mut bytes = [0; 8];
        let file = std::fs::File::open(&self.path).unwrap();
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, offset).unwrap();
        u64::from_be_bytes(bytes)
    }

    pub fn put(&self, offset: u64, bytes: &[u8]) {
        let file = std::fs::OpenOptions::new()
            .write(true)
            .open(&self.path)
            .unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, bytes, offset).unwrap();
    }

    pub fn put_u64(&self, offset: u64, value: u64) {
        self.put(offset, &value.to_be_bytes());
    }

    pub fn l1(&self) -> u64 {
        self.u64(40)
    }

    /// The L2 table of the active L1 entry.
    pub fn l2(&self, index: u64) -> u64 {
        self.u64(self.l1() + 8 * index) & 0x00ff_ffff_ffff_fe00
    }

    pub fn refcount_block(&self, index: u64) -> u64 {
        self.u64(self.u64(48) + 8 * index)
    }

    /// The disk's bytes, or those of a snapshot (by name), as QEMU sees them.
    pub fn contents(&self, snapshot: Option<&str>) -> Vec<u8> {
        let raw = self.dir.path().join("contents.raw");
        let raw = raw.to_str().unwrap();
        let mut args = vec!["convert", "-O", "raw", "-f", "qcow2"];
        let name = snapshot.map(|s| format!("snapshot.name={s}"));
        if let Some(name) = &name {
            args.extend(["-l", name]);
        }
        args.extend([self.name(), raw]);
        must("qemu-img", &args);
        std::fs::read(raw).unwrap()
    }
}

pub fn open(path: &Path) -> Arc<FileNode> {
    open_file(&FileConfig {
        filename: path.to_owned(),
        ..FileConfig::default()
    })
    .unwrap()
}

pub struct Qemu {
    pub code: Option<i32>,
    pub json: serde_json::Value,
    pub said: String,
}

impl Qemu {
    pub fn number(&self, key: &str) -> u64 {
        self.json
            .get(key)
            .and_then(serde_json::Value::as_u64)
            .unwrap_or(0)
    }
}

/// The JSON of both has the same keys and numbers.
pub fn assert_same(ours: &CheckResult, qemu: &Qemu, what: &str) {
    let serde_json::Value::Object(ours) = serde_json::to_value(ours).unwrap() else {
        panic!("no object")
    };
    let serde_json::Value::Object(mut theirs) = qemu.json.clone() else {
        panic!("{what}: {}", qemu.said)
    };
    theirs.remove("filename");
    theirs.remove("format");
    let sorted = |map: serde_json::Map<String, serde_json::Value>| {
        let mut all: Vec<_> = map.into_iter().map(|(k, v)| (k, v.as_u64())).collect();
        all.sort();
        all
    };
    assert_eq!(sorted(ours), sorted(theirs), "{what}: {}", qemu.said);
}

/// Numbers that can be had again from their seed.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }

    pub fn pick<'t, T>(&mut self, of: &'t [T]) -> &'t T {
        &of[self.below(of.len() as u64) as usize]
    }
}
