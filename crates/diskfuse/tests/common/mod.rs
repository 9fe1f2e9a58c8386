//! Runs the program, with a limit on how long it may take. Nothing here mounts anything.

#![allow(clippy::expect_used, reason = "helpers of tests")]

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// No command of these tests takes a hundredth of it.
const LIMIT: Duration = Duration::from_secs(20);

/// What the program said and how it ended.
#[derive(Debug)]
pub struct Ran {
    /// The exit code.
    pub code: Option<i32>,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

/// A folder of its own for one test, and the program to run in it.
pub struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    /// An empty folder.
    pub fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        Self { folder }
    }

    /// A path in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Makes a file of zeroes.
    pub fn file(&self, name: &str, size: u64) -> PathBuf {
        let path = self.path(name);
        let file = std::fs::File::create(&path).expect("a new file");
        file.set_len(size).expect("its size");
        path
    }

    /// Every name in the folder, sorted.
    pub fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.folder.path()).expect("the folder");
        let name = |entry: std::io::Result<std::fs::DirEntry>| {
            entry
                .expect("an entry")
                .file_name()
                .into_string()
                .expect("a name")
        };
        let mut names: Vec<String> = entries.map(name).collect();
        names.sort();
        names
    }

    /// `diskfuse ARGUMENTS`, with the folder as working directory.
    pub fn diskfuse(&self, arguments: &[&str]) -> Ran {
        self.run("diskfuse", arguments)
    }

    /// The same program, called by another name.
    pub fn run(&self, name: &str, arguments: &[&str]) -> Ran {
        let mut command = Command::new(env!("CARGO_BIN_EXE_diskfuse"));
        command
            .arg0(name)
            .args(arguments)
            .current_dir(self.folder.path())
            .env_remove("DISKFUSE_LOG")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().expect("the program runs");
        let start = Instant::now();
        while child.try_wait().expect("it can be waited for").is_none() {
            if start.elapsed() > LIMIT {
                child.kill().expect("it can be ended");
                panic!("{name} {arguments:?} did not end");
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        let Output {
            status,
            stdout,
            stderr,
        } = child.wait_with_output().expect("its output");
        Ran {
            code: status.code(),
            out: String::from_utf8(stdout).expect("text"),
            err: String::from_utf8(stderr).expect("text"),
        }
    }

    /// Nothing may be mounted anywhere in the folder.
    pub fn assert_nothing_mounted(&self) {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").expect("the list of mounts");
        let folder: &Path = self.folder.path();
        assert!(
            !mounts.contains(folder.to_str().expect("a path of text")),
            "{mounts}"
        );
    }
}
