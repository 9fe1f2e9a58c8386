//! Load: fio, and writers that know what was acknowledged.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use serde_json::Value;

use crate::raw_io::pattern;
use crate::tool::{Output, Running, Tool};
use crate::wait_until;

/// A run of fio on one file.
pub struct Fio(Tool);

impl Fio {
    /// Job `name` on `file`, with further options as the command line has them.
    pub fn new(name: &str, file: &Path, options: &[&str]) -> Self {
        let tool = Tool::new("fio")
            // Jobs are threads: as processes they would outlive a fio that is killed.
            .args(["--output-format=json", "--group_reporting", "--thread"])
            .arg(format!("--name={name}"))
            .arg(format!("--filename={}", file.display()))
            // A job must not make or enlarge the file that is there, nor leave state files around.
            .args(["--allow_file_create=0", "--verify_state_save=0"])
            .current_dir(std::env::temp_dir())
            .args(options);
        Self(tool.limit(Duration::from_secs(60)))
    }

    /// Runs it to its end.
    #[track_caller]
    pub fn output(self) -> Output {
        self.0.output()
    }

    /// Runs it to its end and fails unless it is content.
    #[track_caller]
    pub fn run(self) -> Output {
        self.0.run()
    }

    /// Starts it.
    pub fn start(self) -> Running {
        self.0.start()
    }
}

/// The first job of fio's JSON report: what was asked for with `--output-format=json`.
pub fn fio_report(output: &Output) -> Value {
    // fio may print warnings in front.
    let json = output.stdout.find('{').map(|start| &output.stdout[start..]);
    let report: Value = serde_json::from_str(json.unwrap_or_default())
        .unwrap_or_else(|error| panic!("no JSON from fio ({error}): {output}"));
    report["jobs"][0].clone()
}

/// Bytes of one write.
const BLOCK: usize = 4096;
/// Blocks that each writer goes through, again and again.
const BLOCKS: u64 = 64;

/// Threads that write generation after generation, each to its own part of a file, and note what was acknowledged.
/// What was acknowledged must be in the image afterwards, or something newer that was under way.
pub struct Writers {
    stop: Arc<AtomicBool>,
    acknowledged: Vec<Arc<AtomicU64>>,
    threads: Vec<JoinHandle<String>>,
}

impl Writers {
    /// `count` of them, from byte 0 of `file`.
    pub fn start(file: &Path, count: u64) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let acknowledged: Vec<Arc<AtomicU64>> = (0..count).map(|_| Arc::default()).collect();
        let threads = (0..count)
            .zip(&acknowledged)
            .map(|(writer, done)| {
                let file = File::options()
                    .write(true)
                    .open(file)
                    .expect("a usable export");
                let (stop, done) = (Arc::clone(&stop), Arc::clone(done));
                std::thread::spawn(move || write(&file, writer, &stop, &done))
            })
            .collect();
        Self {
            stop,
            acknowledged,
            threads,
        }
    }

    /// Bytes that a file needs for `count` writers.
    pub fn space(count: u64) -> u64 {
        count * BLOCKS * BLOCK as u64
    }

    /// Waits until every writer has been acknowledged at least `writes` times.
    pub fn wait_for(&self, writes: u64) {
        let all = || {
            self.acknowledged
                .iter()
                .all(|done| done.load(Ordering::SeqCst) >= writes)
        };
        wait_until("the writers have got going", Duration::from_secs(20), all);
    }

    /// Waits until the writers have stopped, each because it was told to or because of an error, which is returned.
    /// Nobody who writes to a mount that is gone may hang.
    pub fn finish(mut self, image: &Path) -> Vec<String> {
        self.stop.store(true, Ordering::SeqCst);
        let threads = std::mem::take(&mut self.threads);
        let over = || threads.iter().all(JoinHandle::is_finished);
        wait_until("all writers are answered", Duration::from_secs(10), over);
        let ends = threads
            .into_iter()
            .map(|thread| thread.join().expect("a writer"));
        let ends = ends.collect();
        self.check(image);
        ends
    }

    /// Whether some writer has ended.
    pub fn any_ended(&self) -> bool {
        self.threads.iter().any(JoinHandle::is_finished)
    }

    fn check(&self, image: &Path) {
        let image = File::open(image).expect("the image");
        for (writer, done) in (0..).zip(&self.acknowledged) {
            let done = done.load(Ordering::SeqCst);
            for block in 0..BLOCKS {
                let mut there = vec![0; BLOCK];
                let read = image.read_exact_at(&mut there, place(writer, block));
                read.expect("the image is whole");
                let newest = (done > block).then(|| done - 1 - (done - 1 - block) % BLOCKS);
                let is_newest = match newest {
                    Some(write) => there == content(writer, write),
                    None => there.iter().all(|&byte| byte == 0),
                };
                let was_under_way = done % BLOCKS == block && there == content(writer, done);
                assert!(
                    is_newest || was_under_way,
                    "writer {writer}, block {block}: not what was acknowledged ({done} writes)"
                );
            }
        }
    }
}

impl Drop for Writers {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
    }
}

fn place(writer: u64, write: u64) -> u64 {
    (writer * BLOCKS + write % BLOCKS) * BLOCK as u64
}

fn content(writer: u64, write: u64) -> Vec<u8> {
    pattern(BLOCK, (writer << 40) + write + 1)
}

/// Why it ended.
fn write(file: &File, writer: u64, stop: &AtomicBool, done: &AtomicU64) -> String {
    for write in 0.. {
        if stop.load(Ordering::SeqCst) {
            break;
        }
        match file.write_at(&content(writer, write), place(writer, write)) {
            Ok(BLOCK) => done.store(write + 1, Ordering::SeqCst),
            Ok(short) => return format!("a short write of {short} bytes"),
            Err(error) => return error.to_string(),
        }
    }
    "told to".to_owned()
}
