//! External programs: run with a time limit, output captured. A missing one is a failure that names its package.

use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::fs::File;
use std::io::{Read, Seek};
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, kill_process_group};

use crate::terminal::Terminal;

/// How long a tool may take unless the test says otherwise.
const LIMIT: Duration = Duration::from_secs(30);
/// How long a killed process may take to be gone: one that waits for a FUSE request may take for ever.
const REAP: Duration = Duration::from_secs(2);
/// How often a wait looks again.
const TICK: Duration = Duration::from_millis(2);

/// Debian's packages of the tools.
const PACKAGES: &[(&str, &str)] = &[
    ("qemu-img", "qemu-utils"),
    ("qemu-io", "qemu-utils"),
    (
        "qemu-storage-daemon",
        "qemu-utils (Debian 12) or qemu-system-common",
    ),
    ("fio", "fio"),
    ("strace", "strace"),
    ("mkfs.ext4", "e2fsprogs"),
    ("fsck.ext4", "e2fsprogs"),
    ("mkfs.vfat", "dosfstools"),
    ("sfdisk", "fdisk"),
    ("losetup", "mount"),
    ("mount", "mount"),
    ("umount", "mount"),
    ("setpriv", "util-linux"),
    ("prlimit", "util-linux"),
    ("unshare", "util-linux"),
    ("fusermount3", "fuse3"),
    ("nsenter", "util-linux"),
    ("useradd", "passwd"),
    ("userdel", "passwd"),
    ("taskset", "util-linux"),
    ("socat", "socat"),
    ("curl", "curl"),
    ("script", "bsdutils"),
    ("setsid", "util-linux"),
    ("swtpm", "swtpm"),
    ("swtpm_ioctl", "swtpm-tools"),
    ("tpm2_nvdefine", "tpm2-tools"),
    ("tpm2_nvread", "tpm2-tools"),
    ("tpm2_nvwrite", "tpm2-tools"),
];

/// A program to be run.
pub struct Tool {
    command: Command,
    limit: Duration,
    /// What it has as its standard streams.
    terminal: Option<OwnedFd>,
}

/// What an ended program left.
#[derive(Debug)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
    /// The command, for messages.
    pub shown: String,
}

/// A program that runs. Dropping it kills it.
pub struct Running {
    child: Child,
    stdout: File,
    stderr: File,
    shown: String,
}

impl Tool {
    /// The program `name`, looked for in PATH if it has no slash.
    pub fn new(name: impl AsRef<OsStr>) -> Self {
        let mut command = Command::new(name.as_ref());
        // System tools are not in every user's PATH.
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{path}:/usr/sbin:/sbin"));
        command.env("LC_ALL", "C");
        Self {
            command,
            limit: LIMIT,
            terminal: None,
        }
    }

    /// Runs the program `name` on a terminal, which is its controlling one.
    pub fn on_terminal(terminal: &Terminal, name: impl AsRef<OsStr>) -> Self {
        let mut tool = Self::new("setsid").args(["--ctty".as_ref(), name.as_ref()]);
        tool.command.env("TERM", "xterm");
        tool.terminal = Some(terminal.inside());
        tool
    }

    /// One more argument.
    #[must_use]
    pub fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.command.arg(argument);
        self
    }

    /// More arguments.
    #[must_use]
    pub fn args(mut self, arguments: impl IntoIterator<Item: AsRef<OsStr>>) -> Self {
        self.command.args(arguments);
        self
    }

    /// A time limit of its own.
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Another working directory.
    #[must_use]
    pub fn current_dir(mut self, folder: impl AsRef<std::path::Path>) -> Self {
        self.command.current_dir(folder);
        self
    }

    /// Runs it to its end; fails when that takes longer than the limit.
    #[track_caller]
    pub fn output(self) -> Output {
        let limit = self.limit;
        self.start().finish(limit)
    }

    /// Runs it to its end and fails unless that is success.
    #[track_caller]
    pub fn run(self) -> Output {
        let output = self.output();
        assert!(output.status.success(), "{output}");
        output
    }

    /// Starts it.
    #[track_caller]
    pub fn start(mut self) -> Running {
        let shown = std::iter::once(self.command.get_program())
            .chain(self.command.get_args())
            .map(OsStr::to_owned)
            .collect::<Vec<OsString>>()
            .join(OsStr::new(" "))
            .to_string_lossy()
            .into_owned();
        // Files, because a daemon that the program leaves behind would keep a pipe open.
        let file = || tempfile::tempfile().expect("a temporary file");
        let (stdout, stderr) = (file(), file());
        let command = &mut self.command;
        match self.terminal {
            None => command
                .stdin(Stdio::null())
                .stdout(stdout.try_clone().unwrap())
                .stderr(stderr.try_clone().unwrap())
                .process_group(0),
            // It makes a session of its own, and with it a group.
            Some(terminal) => command
                .stdin(terminal.try_clone().unwrap())
                .stdout(terminal.try_clone().unwrap())
                .stderr(terminal),
        };
        let child = command.spawn();
        let child = child.unwrap_or_else(|error| {
            let name = self.command.get_program().to_string_lossy();
            let package = PACKAGES.iter().find(|(tool, _)| *tool == name);
            let package = package.map_or("the package that holds it", |(_, package)| package);
            panic!("cannot run '{name}' ({error}): apt-get install {package}")
        });
        Running {
            child,
            stdout,
            stderr,
            shown,
        }
    }
}

impl Running {
    /// Its process id, which is also that of its group.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it has not ended.
    pub fn is_alive(&mut self) -> bool {
        self.child.try_wait().expect("wait for a child").is_none()
    }

    /// What it has printed on standard error so far.
    pub fn stderr(&self) -> String {
        read(&self.stderr)
    }

    /// Sends it a signal.
    pub fn signal(&mut self, signal: Signal) {
        if self.is_alive() {
            kill_process(pid_of(&self.child), signal).expect("a signal to our own child");
        }
    }

    /// Waits for its end; fails when that takes longer than `limit`.
    #[track_caller]
    pub fn finish(mut self, limit: Duration) -> Output {
        let Some(status) = self.wait(limit) else {
            let (stdout, stderr) = (read(&self.stdout), read(&self.stderr));
            let shown = self.shown.clone();
            panic!("not done after {limit:?}: {shown}\n{stdout}\n{stderr}");
        };
        Output {
            status,
            stdout: read(&self.stdout),
            stderr: read(&self.stderr),
            shown: self.shown.clone(),
        }
    }

    /// Waits for its end at most for `limit`.
    pub fn wait(&mut self, limit: Duration) -> Option<ExitStatus> {
        let end = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait().expect("wait for a child") {
                return Some(status);
            }
            if Instant::now() > end {
                return None;
            }
            std::thread::sleep(TICK);
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = kill_process_group(pid_of(&self.child), Signal::KILL);
            let _ = self.wait(REAP);
        }
    }
}

impl Output {
    /// Its exit code; fails if a signal ended it.
    #[track_caller]
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or_else(|| panic!("{self}"))
    }

    /// Fails unless it failed with `code` and said each of `words` on standard error.
    #[track_caller]
    pub fn refused(&self, code: i32, words: &[&str]) {
        assert_eq!(self.status.code(), Some(code), "{self}");
        for word in words {
            assert!(self.stderr.contains(word), "no {word:?} in: {self}");
        }
    }
}

impl std::fmt::Display for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut text = format!("`{}` ended with {}", self.shown, self.status);
        if let Some(signal) = self.status.signal() {
            write!(text, " (signal {signal})")?;
        }
        write!(
            f,
            "{text}\nstdout: {}\nstderr: {}",
            self.stdout, self.stderr
        )
    }
}

fn pid_of(child: &Child) -> Pid {
    Pid::from_child(child)
}

/// Reads the whole file without moving the place where the child writes: both share it.
fn read(file: &File) -> String {
    let same = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(file));
    let mut own = File::open(same).expect("our own file");
    own.rewind().expect("a regular file");
    let mut text = Vec::new();
    own.read_to_end(&mut text).expect("a regular file");
    String::from_utf8_lossy(&text).into_owned()
}
