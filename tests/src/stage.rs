//! A storage daemon with a monitor and four iothreads, for tests of what is changed while it serves: nodes, exports and jobs by
//! command, and what must be true of images afterwards.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{major, minor};
use serde_json::{Value, json};

use crate::bed::Bed;
use crate::daemon::Daemon;
use crate::qmp::Qmp;
use crate::raw_io::pattern;
use crate::tool::Tool;
use crate::wait_until;
use crate::writers::Writers;

/// The iothreads that there are.
const THREADS: [&str; 4] = ["t0", "t1", "t2", "t3"];
/// From one place of the writers to the next.
const STEP: u64 = 256 << 10;
/// Where between two of them lies what nobody writes any more.
const STILL: u64 = 96 << 10;
/// How many bytes of it.
const STILL_LEN: usize = 20 << 10;
/// How many such places there are.
const PLACES: u64 = Stage::SIZE / STEP;
/// No request may be kept waiting longer by whatever is changed. It takes some milliseconds, and whatever the disk takes for a
/// flush, which can be seconds if others keep it busy.
const PAUSE: Duration = Duration::from_secs(5);

/// See the head of this file.
pub struct Stage<'b> {
    /// Where it stands.
    pub bed: &'b Bed,
    /// The daemon.
    pub daemon: Daemon,
    /// A monitor of it.
    pub qmp: Qmp,
}

impl<'b> Stage<'b> {
    /// The size of the disks.
    pub const SIZE: u64 = Writers::scattered_space(STEP);

    /// A daemon with nothing but iothreads and two monitors.
    #[track_caller]
    pub fn start(bed: &'b Bed) -> Self {
        let objects = THREADS.map(|id| format!("iothread,id={id}"));
        let mut arguments: Vec<String> = Vec::new();
        for object in objects {
            arguments.extend(["--object".to_owned(), object]);
        }
        for id in ["c", "d"] {
            let socket = bed.path(id);
            let chardev = format!(
                "socket,id={id},path={},server=on,wait=off",
                socket.display()
            );
            arguments.extend(["--chardev".to_owned(), chardev]);
            arguments.extend(["--monitor".to_owned(), id.to_owned()]);
        }
        let daemon = bed.qsd(&arguments, &[]);
        let qmp = Qmp::connect(&bed.path("c"));
        Self { bed, daemon, qmp }
    }

    /// Another client, of another monitor.
    #[track_caller]
    pub fn second_client(&self) -> Qmp {
        Qmp::connect(&self.bed.path("d"))
    }

    /// What is said of a node.
    #[track_caller]
    pub fn node(&mut self, name: &str) -> Value {
        let all = self.run("query-named-block-nodes", json!({}));
        let mut all = all.as_array().expect("a list").iter();
        let found = all.find(|node| node["node-name"] == name);
        found.expect("the node is there").clone()
    }

    /// A command that must succeed.
    #[track_caller]
    pub fn run(&mut self, command: &str, arguments: Value) -> Value {
        self.qmp.run(command, arguments)
    }

    /// A command that must fail with an error that has these words.
    #[track_caller]
    pub fn refused(&mut self, command: &str, arguments: Value, words: &str) {
        let said = self.qmp.refused(command, arguments);
        assert!(said.contains(words), "{command}: no '{words}' in: {said}");
    }

    /// A new raw image as node `name`.
    #[track_caller]
    pub fn add_raw(&mut self, name: &str) -> PathBuf {
        let path = self.bed.sparse(name, Self::SIZE);
        self.run(
            "blockdev-add",
            json!({"driver": "file", "node-name": name, "filename": path, "discard": "unmap"}),
        );
        path
    }

    /// A new qcow2 image as node `name` without a backing node, on node `name-file`, all made by command.
    #[track_caller]
    pub fn add_qcow2(&mut self, name: &str) -> PathBuf {
        self.add_qcow2_of(name, Self::SIZE)
    }

    /// The same, of `size` bytes.
    #[track_caller]
    pub fn add_qcow2_of(&mut self, name: &str, size: u64) -> PathBuf {
        let path = self.bed.path(name);
        let file = format!("{name}-file");
        self.create(&json!({"driver": "file", "filename": path, "size": 0}));
        self.run(
            "blockdev-add",
            json!({"driver": "file", "node-name": file, "filename": path, "discard": "unmap"}),
        );
        self.create(&json!({"driver": "qcow2", "file": file, "size": size}));
        self.run(
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": name, "file": file, "backing": null, "discard": "unmap"}),
        );
        path
    }

    #[track_caller]
    fn create(&mut self, options: &Value) {
        self.run(
            "blockdev-create",
            json!({"job-id": "create", "options": options}),
        );
        self.qmp.job_is("create", "concluded");
        let job = self
            .qmp
            .job("create")
            .expect("a job that waits to be dismissed");
        assert!(job.get("error").is_none(), "{job}");
        self.run("job-dismiss", json!({"id": "create"}));
    }

    /// An export of a node on all iothreads; its id is that of the node.
    #[track_caller]
    pub fn export(&mut self, node: &str) -> PathBuf {
        self.export_as(node, node, &THREADS)
    }

    /// An export of a node under another id, on some iothreads.
    #[track_caller]
    pub fn export_as(&mut self, id: &str, node: &str, threads: &[&str]) -> PathBuf {
        let mountpoint = self.bed.mountpoint(&format!("{id}.m"));
        self.run("block-export-add", self.export_options(id, node, threads));
        mountpoint
    }

    /// What `block-export-add` is told.
    pub fn export_options(&self, id: &str, node: &str, threads: &[&str]) -> Value {
        let mountpoint = self.bed.path(&format!("{id}.m"));
        json!({
            "type": "fuse", "id": id, "node-name": node, "mountpoint": mountpoint, "writable": true,
            "iothread": threads, "transport": self.bed.ground.transport.name(),
        })
    }

    /// Puts bytes on a disk that stay as they are, between the places of [`Stage::load`].
    pub fn fill(&self, file: &Path) {
        let file = File::options().write(true).open(file);
        let file = file.expect("a usable export");
        for place in 0..PLACES {
            let wrote = file.write_all_at(&pattern(STILL_LEN, place), place * STEP + STILL);
            wrote.expect("room on the disk");
        }
    }

    /// Four writers that are under way when this returns.
    #[track_caller]
    pub fn load(&self, file: &Path) -> Writers {
        let writers = Writers::scattered(file, 4, STEP);
        writers.wait_for(100);
        writers.latencies();
        writers
    }

    /// Fails unless nobody was kept waiting for too long since this was asked last, and they still write; `what` has happened.
    #[track_caller]
    pub fn pause_was_short(&self, writers: &Writers, what: &str) {
        writers.go_on(20);
        let took = writers.latencies();
        println!(
            "{what} ({}): {} requests, p99 {:?}, slowest {:?}",
            self.bed.ground, took.count, took.p99, took.max
        );
        assert!(took.max < PAUSE, "{what}: {took:?}");
    }

    /// Waits until a block job has ended well.
    #[track_caller]
    pub fn job_ends(&mut self, id: &str) {
        let about = |data: &Value| data["device"] == id;
        let event = self.qmp.event_of("BLOCK_JOB_COMPLETED", about);
        assert!(event["data"].get("error").is_none(), "{event}");
        self.qmp.job_is(id, "null");
    }

    /// Waits until a job is ready, and completes it.
    #[track_caller]
    pub fn complete(&mut self, id: &str) {
        self.qmp.job_is(id, "ready");
        self.run("job-complete", json!({"id": id}));
        self.job_ends(id);
    }

    /// Ends the writers, takes the export away, and looks at its disk in the image `name` of `format`, on which nobody must be
    /// working any more. The writers can still be asked.
    #[track_caller]
    pub fn finish(
        mut self,
        mut writers: Writers,
        export: &str,
        image: &Path,
        format: &str,
    ) -> Writers {
        let ends = writers.stop();
        assert!(ends.iter().all(|end| end == "told to"), "{ends:?}");
        let mountpoint = self.bed.path(&format!("{export}.m"));
        writers.check(&mountpoint);
        check_background(&mountpoint);
        self.run("block-export-del", json!({"id": export}));
        self.qmp
            .event_of("BLOCK_EXPORT_DELETED", |data| data["id"] == export);
        let bed = self.stop();
        let raw = as_raw(bed, image, format);
        writers.check(&raw);
        check_background(&raw);
        writers
    }

    /// Ends the daemon, which must leave nothing, and be silent but for errors of jobs.
    #[track_caller]
    pub fn stop(self) -> &'b Bed {
        let Self { bed, daemon, qmp } = self;
        drop(qmp);
        let ended = daemon.stop();
        // An error that a job, or who reads what it did not save, was made to meet is told.
        let expected = ["a job met an error", "were not saved before block job"];
        let mut said = ended.output.stderr.lines();
        let unexpected = said.find(|line| !expected.iter().any(|words| line.contains(words)));
        assert_eq!(unexpected, None, "{}", ended.output);
        bed.nothing_mounted();
        bed
    }

    /// Waits until nobody says that there is a job of this id.
    #[track_caller]
    pub fn job_is_gone(&mut self, id: &str) {
        let end = Instant::now() + Duration::from_secs(20);
        while self.qmp.job(id).is_some() {
            assert!(Instant::now() < end, "job '{id}' is still there");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Fails unless a disk has what [`Stage::fill`] has put there.
#[track_caller]
pub fn check_background(disk: &Path) {
    let file = File::open(disk).expect("a disk");
    for place in 0..PLACES {
        let mut there = vec![0; STILL_LEN];
        let read = file.read_exact_at(&mut there, place * STEP + STILL);
        read.expect("the disk is whole");
        let right = there == pattern(STILL_LEN, place);
        assert!(right, "{}: place {place} is not as it was", disk.display());
    }
}

/// A raw copy of what `image` of `format` shows, after a check of all images of its chain that can be checked.
#[track_caller]
pub fn as_raw(bed: &Bed, image: &Path, format: &str) -> PathBuf {
    if format == "qcow2" {
        check_image(image);
    }
    let raw = bed.path("raw-copy");
    Tool::new("qemu-img")
        .args(["convert", "-f", format, "-O", "raw"])
        .args([image, &raw])
        .run();
    raw
}

/// Waits until nobody holds a lock on `image`. What a killed process had in flight on a ring holds the file for some
/// milliseconds more, after the process itself is gone.
///
/// Source: proc_locks(5).
#[track_caller]
pub fn await_let_go(image: &Path) {
    let about = image.metadata().expect("the image");
    let (major, minor) = (major(about.dev()), minor(about.dev()));
    // With the device: other tests have file systems of their own, whose few files have the same small numbers.
    let image = format!("{major:02x}:{minor:02x}:{}", about.ino());
    wait_until("the image is let go of", Duration::from_secs(10), || {
        let locks = std::fs::read_to_string("/proc/locks").expect("the kernel tells of locks");
        !locks.split_whitespace().any(|field| field == image)
    });
}

/// Fails unless `qemu-img check` is content with a qcow2 image.
#[track_caller]
pub fn check_image(image: &Path) {
    Tool::new("qemu-img")
        .args(["check", "-f", "qcow2"])
        .arg(image)
        .run();
}
