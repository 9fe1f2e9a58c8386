//! What the tests of jobs share: images on a real file system in a graph, guests that write them as exports do, with a model
//! of what they wrote, and jobs whose events are kept. Every wait has a limit.

#![allow(dead_code)]

#[path = "../../../qcow2/tests/support/cases.rs"]
pub mod cases;
pub mod faulty;
pub mod guest;
#[path = "../../../qcow2/tests/support/rng.rs"]
pub mod rng;

use std::future::Future;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use diskfuse_block::drivers::{Discard, FileConfig, open_file};
use diskfuse_block::graph::ChildRole;
use diskfuse_block::{Graph, Node, Result, io};
use diskfuse_jobs::{BackupConfig, Job, JobEvent, Jobs, MirrorConfig, Status, backup, mirror};
use diskfuse_qcow2::node::{Children, Qcow2Config, Qcow2Node};
use diskfuse_ring::{Buf, Config, Ring, sleep};
use guest::Guest;
use rng::Rng;

pub const KIB: u64 = 1 << 10;
pub const MIB: u64 = 1 << 20;

/// Longer than anything here takes.
pub const LIMIT: Duration = Duration::from_secs(60);

/// Runs a future on a ring of its own, for [`LIMIT`] at most.
pub fn run<F: Future>(future: F) -> F::Output {
    let ring = Ring::new(&Config::default()).unwrap();
    ring.block_on(async {
        let mut future = std::pin::pin!(future);
        let mut late = std::pin::pin!(sleep(LIMIT));
        std::future::poll_fn(|cx| {
            assert!(late.as_mut().poll(cx).is_pending(), "it takes too long");
            future.as_mut().poll(cx)
        })
        .await
    })
}

pub fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// Runs a tool, which must succeed.
pub fn must(program: &str, args: &[&str]) -> String {
    let output = Command::new("timeout")
        .arg("60")
        .arg(program)
        .args(args)
        .output();
    let output = output.unwrap_or_else(|e| panic!("cannot run timeout(1): {e}"));
    let missing = output.status.code() == Some(127);
    assert!(!missing, "{program} is missing: install it, see the README");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{program} {args:?}: {said}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A graph of images in a directory that goes with it.
pub struct Lab {
    pub dir: tempfile::TempDir,
    pub graph: Graph,
    pub jobs: Jobs,
    pub events: Arc<Mutex<Vec<JobEvent>>>,
}

impl Lab {
    pub fn new() -> Self {
        let events = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&events);
        Self {
            dir: directory(),
            graph: Graph::new(),
            jobs: Jobs::new(move |event| kept.lock().unwrap().push(event)),
            events,
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A raw image of this name, of the file `name.img`.
    pub fn raw(&self, name: &str, size: u64) {
        let path = self.path(&format!("{name}.img"));
        std::fs::File::create(&path).unwrap().set_len(size).unwrap();
        self.graph
            .insert(Some(name), open_raw_file(&path), &[])
            .unwrap();
    }

    /// A qcow2 image of this name, of the file `name.qcow2`, above another node or none; it can be written.
    pub async fn qcow2(&self, name: &str, size: u64, options: &str, backing: Option<&str>) {
        let path = self.path(&format!("{name}.qcow2"));
        let size = size.to_string();
        let mut args = vec!["create", "-q", "-f", "qcow2"];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        let below = backing.map(|b| self.graph.get(b).unwrap());
        let below_path = below.as_ref().map(|b| b.filename().unwrap());
        if let (Some(below), Some(path)) = (&below, &below_path) {
            let format = if below.driver() == "file" {
                "raw"
            } else {
                "qcow2"
            };
            args.extend(["-u", "-b", path, "-F", format]);
        }
        args.extend([path.to_str().unwrap(), &size]);
        must("qemu-img", &args);
        self.open_qcow2(name, &path, backing).await;
    }

    pub async fn open_qcow2(&self, name: &str, path: &Path, backing: Option<&str>) {
        let file_name = format!("{name}-file");
        let file = open_raw_file(path);
        self.graph.insert(Some(&file_name), file, &[]).unwrap();
        let children = Children {
            file: self.graph.get(&file_name).unwrap(),
            data_file: None,
            backing: backing.map(|b| self.graph.get(b).unwrap()),
        };
        let config = Qcow2Config {
            discard: true,
            ..Qcow2Config::default()
        };
        let node = Qcow2Node::open(children, &config).await.unwrap();
        let mut edges = vec![(&*file_name, ChildRole::File)];
        edges.extend(backing.map(|b| (b, ChildRole::Backing)));
        self.graph.insert_above(Some(name), node, &edges).unwrap();
    }

    /// What a node shows.
    pub async fn contents(&self, name: &str) -> Vec<u8> {
        let node = self.graph.get(name).unwrap();
        read(&*node, 0, node.size()).await.unwrap()
    }

    pub async fn fill(&self, name: &str, offset: u64, bytes: &[u8]) {
        write(&*self.graph.get(name).unwrap(), offset, bytes)
            .await
            .unwrap();
    }

    /// Nothing is wrong with the image of a qcow2 node; it is closed for that.
    pub async fn assert_sound(&self, name: &str) {
        self.graph.get(name).unwrap().close().await.unwrap();
        let path = self.path(&format!("{name}.qcow2"));
        must(
            "qemu-img",
            &["check", "-U", "-f", "qcow2", path.to_str().unwrap()],
        );
    }

    pub fn info(&self, name: &str) -> String {
        let path = self.path(&format!("{name}.qcow2"));
        must("qemu-img", &["info", "-U", path.to_str().unwrap()])
    }

    /// Names of events and states, in order.
    pub fn told(&self) -> Vec<String> {
        let events = self.events.lock().unwrap();
        events.iter().map(told).collect()
    }
}

fn told(event: &JobEvent) -> String {
    match event {
        JobEvent::StatusChange { status, .. } => status.name().to_owned(),
        JobEvent::Ready(_) => "READY".to_owned(),
        JobEvent::Completed { error: None, .. } => "COMPLETED".to_owned(),
        JobEvent::Completed { .. } => "FAILED".to_owned(),
        JobEvent::Cancelled(_) => "CANCELLED".to_owned(),
        JobEvent::Pending { .. } => "PENDING".to_owned(),
        JobEvent::Error {
            operation, action, ..
        } => format!("ERROR {} {}", operation.name(), action.name()),
    }
}

/// Resolves when the job is in one of these states.
pub async fn reaches(job: &Job, wanted: &[Status]) -> Status {
    let start = Instant::now();
    loop {
        let status = job.status();
        if wanted.contains(&status) {
            return status;
        }
        let late = start.elapsed() > LIMIT;
        assert!(!late, "{:?} does not reach {wanted:?}", job.info());
        let over = status.is_over();
        assert!(!over, "{:?} is over and was not {wanted:?}", job.info());
        sleep(Duration::from_millis(1)).await;
    }
}

pub fn open_raw_file(path: &Path) -> Arc<dyn Node> {
    let config = FileConfig {
        filename: path.to_owned(),
        discard: Discard::Unmap,
        ..FileConfig::default()
    };
    open_file(&config).unwrap()
}

pub async fn write(node: &dyn Node, offset: u64, bytes: &[u8]) -> Result<()> {
    let mut buf = Buf::new(bytes.len()).unwrap().with_window(0..bytes.len());
    buf.as_mut_slice().copy_from_slice(bytes);
    io::write(node, offset, buf).await.0
}

pub async fn read(node: &dyn Node, offset: u64, len: u64) -> Result<Vec<u8>> {
    let mut buf = Buf::new(len as usize).unwrap().with_window(0..len as usize);
    // What was in the buffer before must not show.
    buf.as_mut_slice().fill(0xEE);
    let (result, buf) = io::read(node, offset, buf).await;
    result.map(|()| buf.as_slice().to_vec())
}

/// Panics with the first difference rather than with megabytes.
pub fn assert_same(ours: &[u8], theirs: &[u8], what: &str) {
    assert_eq!(ours.len(), theirs.len(), "{what}: the sizes");
    if let Some(at) = (0..ours.len()).find(|&at| ours[at] != theirs[at]) {
        let (a, b) = (ours[at], theirs[at]);
        panic!("{what}: byte {at} ({at:#x}) is {a:#x} and should be {b:#x}");
    }
}

/// Waits until the guest has done some more.
pub async fn busy(guest: &Guest, operations: u64) {
    let until = guest.operations() + operations;
    while guest.operations() < until {
        sleep(Duration::from_millis(1)).await;
    }
}

/// Random data at random places of a disk.
pub async fn scatter(lab: &Lab, rng: &mut Rng, name: &str, size: u64) {
    for _ in 0..12 {
        let len = rng.length(512, size / 8);
        let at = rng.below((size - len) / 512 + 1) * 512;
        let mut bytes = vec![0; len as usize];
        rng.fill(&mut bytes);
        lab.fill(name, at, &bytes).await;
    }
}

/// Begins a backup while the guest stands still; returns what there was then.
pub async fn begin_backup(lab: &Lab, guest: &Guest, config: BackupConfig) -> (Arc<Job>, Vec<u8>) {
    let mut start = backup(&lab.jobs, &lab.graph, config).unwrap();
    let mut drained = Vec::new();
    for node in start.nodes() {
        drained.push(lab.graph.drain(node).await.unwrap());
    }
    lab.graph.change(&start.changes()).unwrap();
    let model = guest.model();
    (start.launch(&lab.jobs).unwrap(), model)
}

/// Begins a mirror.
pub async fn begin_mirror(lab: &Lab, config: MirrorConfig) -> Arc<Job> {
    let start = mirror(&lab.jobs, &lab.graph, config).unwrap();
    start.begin(&lab.jobs).await.unwrap()
}
