//! A test's bed: its folder, its event loop, the daemons that it starts, and the watchdog that ends it when it hangs.

use std::cell::{Cell, RefCell};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::daemon::{Daemon, Launch};
use crate::raw_io::pattern;
use crate::tool::{Output, Tool};
use crate::{binary, mounts, process, wait_until};

/// How long a test may take on one ground unless it says otherwise.
const LIMIT: Duration = Duration::from_secs(60);
/// How long a test may take to fail after its mounts were taken away.
const GRACE: Duration = Duration::from_secs(40);

/// What the daemon waits for events with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventLoop {
    /// io_uring.
    Uring,
    /// epoll and worker threads.
    Epoll,
}

impl EventLoop {
    /// As the command line has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Uring => "io_uring",
            Self::Epoll => "epoll",
        }
    }
}

/// How the daemon's requests come from the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// Through /dev/fuse.
    Device,
    /// By FUSE over io_uring.
    Uring,
}

impl Transport {
    /// As the command line has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Device => "device",
            Self::Uring => "uring",
        }
    }
}

/// What a test's daemons stand on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ground {
    /// What they wait for events with.
    pub event_loop: EventLoop,
    /// How their requests come.
    pub transport: Transport,
}

impl Ground {
    /// All that there are: FUSE over io_uring needs a loop that stands on io_uring.
    const ALL: [Self; 3] = [
        Self::new(EventLoop::Uring, Transport::Device),
        Self::new(EventLoop::Uring, Transport::Uring),
        Self::new(EventLoop::Epoll, Transport::Device),
    ];

    /// As the command line of `diskfuse mount` has it.
    pub fn words(self) -> [&'static str; 4] {
        let (event_loop, transport) = (self.event_loop.name(), self.transport.name());
        ["--event-loop", event_loop, "--transport", transport]
    }

    const fn new(event_loop: EventLoop, transport: Transport) -> Self {
        Self {
            event_loop,
            transport,
        }
    }
}

impl std::fmt::Display for Ground {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.words().join(" "))
    }
}

/// Runs a test on every ground, with a bed of its own each time. All run even if one fails, so that it can be told which
/// of them does not keep the promise.
pub fn everywhere(test: impl Fn(&Bed)) {
    on_each(LIMIT, test);
}

/// Like [`everywhere`], with another time limit for each run.
pub fn on_each(limit: Duration, test: impl Fn(&Bed)) {
    let broken = Ground::ALL
        .into_iter()
        .filter(|&ground| !attempt(ground, limit, &test));
    let failed: Vec<String> = broken.map(|ground| ground.to_string()).collect();
    assert!(failed.is_empty(), "broken with {}", failed.join(" and "));
}

/// Lets the kernel use FUSE over io_uring, which most have switched off.
#[track_caller]
pub fn enable_uring(on: bool) {
    const PARAMETER: &str = "/sys/module/fuse/parameters/enable_uring";
    let value = if on { "Y" } else { "N" };
    let set = std::fs::write(PARAMETER, value);
    set.expect("root, and a kernel with FUSE over io_uring (Linux 6.14)");
}

/// Runs a test once, for what has nothing to do with event loops: command lines that are refused.
pub fn once(test: impl Fn(&Bed)) {
    once_within(LIMIT, test);
}

/// Like [`once`], with another time limit.
pub fn once_within(limit: Duration, test: impl Fn(&Bed)) {
    let ground = Ground::new(EventLoop::Uring, Transport::Device);
    assert!(attempt(ground, limit, &test), "broken");
}

/// True if the test passed. What it panicked with has been printed.
fn attempt(ground: Ground, limit: Duration, test: &impl Fn(&Bed)) -> bool {
    // Building it takes longer than any test may.
    binary::diskfuse();
    if ground.transport == Transport::Uring {
        enable_uring(true);
        mounts::show_connections();
    }
    let bed = Bed::new(ground);
    let dog = Watchdog::start(bed.root.clone(), ground, limit);
    let passed = catch_unwind(AssertUnwindSafe(|| test(&bed))).is_ok();
    drop(bed);
    drop(dog);
    passed
}

/// Aborts the mounts of a test that hangs, so that it fails instead; if even that does not help, ends the whole run.
struct Watchdog {
    /// Dropped when the test is over.
    #[expect(dead_code, reason = "its end is the message")]
    over: Sender<()>,
}

impl Watchdog {
    fn start(folder: PathBuf, ground: Ground, limit: Duration) -> Self {
        let (over, waits) = channel::<()>();
        let name = std::thread::current().name().unwrap_or("a test").to_owned();
        std::thread::spawn(move || {
            if waits.recv_timeout(limit) != Err(RecvTimeoutError::Timeout) {
                return;
            }
            tell(&format!(
                "{name} ({ground}) hangs: not done after {limit:?}; its mounts are aborted"
            ));
            mounts::sweep(&folder);
            if waits.recv_timeout(GRACE) == Err(RecvTimeoutError::Timeout) {
                tell(&format!(
                    "{name} ({ground}) hangs for good: the test run is ended"
                ));
                std::process::abort();
            }
        });
        Self { over }
    }
}

/// Says it at once: what a test prints is held back until it ends, and this one may never do.
fn tell(line: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}

/// What a test lives in. Dropping it ends what the test left: daemons, mounts, files.
pub struct Bed {
    /// What daemons of this test stand on.
    pub ground: Ground,
    /// Free of links, as mountinfo shows it.
    root: PathBuf,
    folder: Option<TempDir>,
    /// Daemons in the background that are not children of this process.
    strays: RefCell<Vec<u32>>,
    daemons: Cell<u32>,
}

impl Bed {
    fn new(ground: Ground) -> Self {
        let folder = tempfile::Builder::new().prefix("diskfuse-e2e-").tempdir();
        let folder = folder.expect("a temporary folder");
        // Other users take part in some tests.
        let open = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(folder.path(), open).expect("our own folder");
        Self {
            ground,
            root: folder.path().canonicalize().expect("our own folder"),
            folder: Some(folder),
            strays: RefCell::default(),
            daemons: Cell::new(0),
        }
    }

    /// The test's folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// A path in the test's folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// A new file of `size` bytes that nobody would guess; see [`pattern`].
    pub fn image(&self, name: &str, size: usize) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, pattern(size, 1)).expect("room for an image");
        path
    }

    /// A new file of `size` bytes that takes no space.
    pub fn sparse(&self, name: &str, size: u64) -> PathBuf {
        let path = self.path(name);
        let file = File::create(&path).expect("a new file");
        file.set_len(size).expect("a sparse file");
        path
    }

    /// A new sparse file of `size` bytes with data at some places.
    pub fn patchy(&self, name: &str, size: u64, data: &[(u64, usize)]) -> PathBuf {
        let path = self.sparse(name, size);
        let file = File::options()
            .write(true)
            .open(&path)
            .expect("our own file");
        for &(offset, len) in data {
            file.write_all_at(&pattern(len, offset), offset)
                .expect("room");
        }
        file.sync_all().expect("a host that can flush");
        path
    }

    /// An empty file to mount on.
    pub fn mountpoint(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, "").expect("a new file");
        path
    }

    /// `diskfuse` with these arguments.
    pub fn tool<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Tool {
        Tool::new(binary::diskfuse())
            .args(arguments)
            .limit(Duration::from_secs(15))
    }

    /// Runs `diskfuse` with these arguments to its end.
    #[track_caller]
    pub fn diskfuse<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Output {
        self.tool(arguments).output()
    }

    /// `diskfuse mount -f` of `image` on `m` in the test's folder, usable when this returns.
    #[track_caller]
    pub fn mount(&self, image: &Path, options: &[&str]) -> Daemon {
        self.mount_on(image, &self.path("m"), options)
    }

    /// The same on another file.
    #[track_caller]
    pub fn mount_on(&self, image: &Path, mountpoint: &Path, options: &[&str]) -> Daemon {
        let mut arguments = vec!["mount", "-f", "--event-loop", self.ground.event_loop.name()];
        // Tests that are about transports name their own.
        if !options.contains(&"--transport") {
            arguments.extend(["--transport", self.ground.transport.name()]);
        }
        let tool = self
            .tool(arguments)
            .args(options)
            .arg(image)
            .arg(mountpoint);
        self.start(tool, vec![mountpoint.to_owned()])
    }

    /// `diskfuse qsd` with these arguments; `mountpoints` are usable when this returns.
    #[track_caller]
    pub fn qsd<A: AsRef<OsStr>>(&self, arguments: &[A], mountpoints: &[&Path]) -> Daemon {
        let arguments = self.with_transport(arguments);
        let tool = self
            .tool(["qsd", "--event-loop", self.ground.event_loop.name()])
            .args(arguments);
        self.start(
            tool,
            mountpoints.iter().map(|&path| path.to_owned()).collect(),
        )
    }

    /// The arguments of `qsd`, with the ground's transport in each export that is not in JSON and does not name one.
    fn with_transport<A: AsRef<OsStr>>(&self, arguments: &[A]) -> Vec<OsString> {
        let mut is_export = false;
        let with = arguments.iter().map(|argument| {
            let mut argument = argument.as_ref().to_owned();
            let text = argument.to_string_lossy();
            let silent = !text.starts_with('{') && !text.contains("transport=");
            if std::mem::replace(&mut is_export, text == "--export") && silent {
                argument.push(format!(",transport={}", self.ground.transport.name()));
            }
            argument
        });
        with.collect()
    }

    /// Waits until what `tool` is to mount is usable.
    #[track_caller]
    pub fn start(&self, tool: Tool, mountpoints: Vec<PathBuf>) -> Daemon {
        self.daemons.set(self.daemons.get() + 1);
        Daemon::start(Launch { tool, mountpoints })
    }

    /// Takes notice of a daemon in the background, so that it does not outlive the test.
    pub fn adopt(&self, pid: u32) {
        self.strays.borrow_mut().push(pid);
    }

    /// Fails if anything is mounted in the test's folder.
    #[track_caller]
    pub fn nothing_mounted(&self) {
        let left = mounts::below(&self.root);
        assert!(left.is_empty(), "still mounted: {left:?}");
    }

    /// The names in the test's folder, sorted.
    pub fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(&self.root).expect("our own folder");
        let mut names: Vec<String> = entries
            .map(|entry| {
                entry
                    .expect("an entry")
                    .file_name()
                    .to_string_lossy()
                    .into_owned()
            })
            .collect();
        names.sort();
        names
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        let strays = self.strays.take();
        for &pid in &strays {
            end(pid);
        }
        mounts::sweep(&self.root);
        if let Some(folder) = self.folder.take()
            && let Err(error) = folder.close()
            && !std::thread::panicking()
        {
            panic!("the test's folder cannot be removed: {error}");
        }
    }
}

/// Ends a process that is not our child: SIGTERM, then SIGKILL.
fn end(pid: u32) {
    let Some(id) = Pid::from_raw(pid.cast_signed()) else {
        return;
    };
    for signal in [Signal::TERM, Signal::KILL] {
        if !process::is_alive(pid) {
            return;
        }
        let _ = kill_process(id, signal);
        let gone = || !process::is_alive(pid);
        let waited = || wait_until("a daemon has ended", Duration::from_secs(5), gone);
        let _ = catch_unwind(waited);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_test_that_hangs_on_a_mount_is_ended_and_leaves_nothing() {
        let root = RefCell::new(PathBuf::new());
        let hang = |bed: &Bed| {
            *root.borrow_mut() = bed.root().to_owned();
            let mountpoint = bed.mountpoint("m");
            let export = format!("fuse,id=e,node-name=n,mountpoint={}", mountpoint.display());
            let node = "null-co,node-name=n,size=1M,latency-ns=1000000000000";
            let daemon = bed.qsd(&["--blockdev", node, "--export", &export], &[&mountpoint]);
            let file = daemon.open_read_only();
            file.read_at(&mut [0; 512], 0)
                .expect("a quarter of an hour is too long");
        };
        assert!(!attempt(Ground::ALL[1], Duration::from_secs(5), &hang));
        assert!(mounts::below(&root.borrow()).is_empty());
        assert!(!root.borrow().exists());
    }

    #[test]
    fn a_test_that_fails_leaves_nothing() {
        let seen = RefCell::new((PathBuf::new(), 0));
        let fail = |bed: &Bed| {
            let daemon = bed.mount(&bed.image("i", 4096), &["-w"]);
            *seen.borrow_mut() = (bed.root().to_owned(), daemon.pid());
            panic!("as tests do");
        };
        assert!(!attempt(Ground::ALL[2], LIMIT, &fail));
        let (root, pid) = seen.take();
        assert!(!process::is_alive(pid));
        assert!(!root.exists() && mounts::below(&root).is_empty());
    }
}
