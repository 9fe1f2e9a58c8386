//! The measured floor: a FUSE server that does nothing. One file, reads answered with what lies in a buffer, writes thrown
//! away. It shows what the kernel's side of a transport costs, so it must never grow: no formats, no tasks, no options that
//! are not needed to put it beside `diskfuse`. No data is ever safe in it.

mod device;
mod memory;
mod uring;
mod wire;

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::bare::wire::Answers;
use crate::cli::{BareServer, Transport};
use crate::error::{At, Error, Result};
use crate::{mounts, signals};

/// The file system type of its mounts.
const FS_TYPE: &str = "fuse.bare";
/// How often the main thread looks for signals; the load never waits for it.
const TICK: Duration = Duration::from_millis(10);
/// How long the threads may take to end once the mount is gone.
const END_LIMIT: Duration = Duration::from_secs(2);

/// A thread that serves, and how it ended.
type Server = JoinHandle<Result<()>>;

/// Serves until SIGTERM or SIGINT, or until somebody unmounts the file. Both are a success.
pub fn run(options: &BareServer) -> Result<()> {
    let device = device::open().at("open", Path::new(device::PATH))?;
    let mut mounted = Mounted::new(&options.mountpoint, &device)?;
    device::handshake(&device, options.transport == Transport::Uring)?;
    let mut threads = start(options, device)?;
    let outcome = wait(&mut threads);
    mounted.unmount();
    // Their mount is gone, so they end by themselves; the process must not wait for one that does not.
    let deadline = Instant::now() + END_LIMIT;
    while Instant::now() < deadline && !threads.iter().all(JoinHandle::is_finished) {
        thread::sleep(Duration::from_millis(1));
    }
    outcome
}

/// Starts the threads.
fn start(options: &BareServer, device: OwnedFd) -> Result<Vec<Server>> {
    let answers = Arc::new(Answers::new(options.size));
    let mut threads = Vec::new();
    match options.transport {
        Transport::Device => {
            let mut devices = Vec::new();
            for _ in 1..options.threads {
                devices.push(device::join(&device)?);
            }
            devices.push(device);
            for device in devices {
                let answers = Arc::clone(&answers);
                threads.push(spawn(move || device::serve(&device, &answers))?);
            }
        }
        Transport::Uring => {
            let device = Arc::new(device);
            let cpus = uring::possible_cpus()?;
            let count = options.threads.min(cpus);
            for share in (0..count).map(|number| uring::Share::new(number, count, cpus)) {
                let (device, answers) = (Arc::clone(&device), Arc::clone(&answers));
                threads.push(spawn(move || uring::serve(&device, &share, &answers))?);
            }
        }
    }
    Ok(threads)
}

fn spawn(work: impl FnOnce() -> Result<()> + Send + 'static) -> Result<Server> {
    thread::Builder::new()
        .name("bare".to_owned())
        .spawn(work)
        .at("start a thread of", Path::new("this process"))
}

/// Until a signal arrives, a thread fails or all have ended.
fn wait(threads: &mut Vec<Server>) -> Result<()> {
    // A signal is the ordinary way to end it.
    while !threads.is_empty() && signals::check().is_ok() {
        while let Some(ended) = threads.iter().position(JoinHandle::is_finished) {
            let ending = threads.swap_remove(ended).join();
            ending.unwrap_or_else(|_| Err(Error::Usage("a thread panicked".to_owned())))?;
        }
        thread::sleep(TICK);
    }
    Ok(())
}

/// A mount of this process. Dropping it takes it away.
struct Mounted {
    point: PathBuf,
}

impl Mounted {
    fn new(point: &Path, device: &OwnedFd) -> Result<Self> {
        let point = point.canonicalize().at("find", point)?;
        if !fs::metadata(&point).at("stat", &point)?.is_file() {
            return Err(Error::Usage(format!(
                "{} is not a regular file",
                point.display()
            )));
        }
        let data = wire::mount_options(device.as_raw_fd());
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOATIME;
        mount("bare", &point, FS_TYPE, flags, data.as_c_str()).at("mount on", &point)?;
        Ok(Self { point })
    }

    /// Ends all requests and takes the mount away, unless somebody has done so already.
    fn unmount(&mut self) {
        let top = mounts::all().map(|all| all.into_iter().rfind(|mount| mount.point == self.point));
        if matches!(top, Ok(Some(mount)) if mount.kind == FS_TYPE) {
            let flags = UnmountFlags::FORCE | UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
            let _ = unmount(&self.point, flags);
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        self.unmount();
    }
}
