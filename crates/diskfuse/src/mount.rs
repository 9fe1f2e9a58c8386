//! `diskfuse mount`: one image, one file, one process; or with `--into` many images, each its file, served by the same threads of
//! one process. It must leave nothing behind when it fails: no mount, no mountpoint that it made, no daemon.

use std::ffi::OsString;
use std::fs::File;
use std::num::NonZeroU16;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use diskfuse_block::drivers::{self, FileConfig, RawConfig};
use diskfuse_block::{Graph, Kind};
use diskfuse_fuse::{
    AllowOther, DEFAULT_MAX_BACKGROUND, ExportOptions, Ownership, Passthrough, Placement,
    Transport, TransportOptions,
};
use diskfuse_image::{Format, OpenOptions, Opened};
use diskfuse_qcow2::node::Qcow2Config;
use diskfuse_ring::{Choice, Config, IoThread, Polling, Ring};

use crate::background::{self, Role};
use crate::cli::{self, MountArgs};
use crate::control::server::Server;
use crate::daemon::{Daemon, Lifetime, NewExport, Nobody, own_threads};
use crate::directory::{self, Directory};
use crate::error::{Error, Result};
use crate::logging;
use crate::metrics::{Metrics, Served};
use crate::mountpoint::{self, MadeFile};
use crate::output;
use crate::overlay::{self, Overlay};
use crate::sandbox;

/// Queues when nothing is said: one per CPU, but more than this seldom pay.
const MOST_BY_DEFAULT: u8 = 4;

/// Carries the command out; returns when the file is usable (or, in the foreground, when it is gone again).
pub fn run(arguments: &MountArgs) -> Result<ExitCode> {
    let readiness = match (arguments.foreground, background::role()?) {
        (true, _) => None,
        (false, Role::Launcher) => return background::launch(),
        (false, Role::Daemon(readiness)) => Some(readiness),
    };
    logging::start(arguments.log.as_deref(), arguments.log_file.as_deref())?;
    let wanted = each(arguments)?;
    // Before the daemon, so that it is removed when that has ended.
    let folder = arguments.into.as_deref();
    let made = folder.map(MadeFile::make_directory_if_missing);
    let mut made = made.transpose()?.flatten();
    let metrics = arguments
        .metrics
        .as_deref()
        .map(Metrics::listen)
        .transpose()?;
    let mut daemon = Daemon::new(Lifetime::Exports)?;
    let ring = Ring::new(&Config {
        choice: choice(arguments.event_loop),
        polling: Polling::OFF,
    })?;
    let prepare = |(number, one)| Prepared::new(&daemon, &ring, number, one);
    let images = (1..).zip(&wanted).map(prepare);
    let images = images.collect::<Result<Vec<Prepared<'_>>>>()?;
    drop(ring);
    let threads = shared_threads(arguments, images.len())?;
    // Where they are, for those who did not say so themselves.
    let mut news = String::new();
    for image in images {
        let mountpoint = image.start(&mut daemon, &threads)?;
        if arguments.mountpoint.is_none() || arguments.into.is_some() {
            news = format!("{news}{}\n", mountpoint.display());
        }
    }
    let mut control = daemon.listen();
    let mut metrics = metrics
        .map(|metrics| metrics.serve(daemon.asker()))
        .transpose()?;
    let helper = match arguments.sandbox {
        cli::Sandbox::On => {
            let removals = metrics.as_mut().and_then(Served::removal);
            let removals = control
                .as_mut()
                .map(Server::removal)
                .into_iter()
                .chain(removals);
            let removals = removals.chain(made.as_mut().map(MadeFile::removal));
            Some(sandbox::seal(&mut daemon, removals)?)
        }
        cli::Sandbox::Off => None,
    };
    match readiness {
        Some(readiness) => readiness.announce(&news)?,
        None => output::say(&news)?,
    }
    let outcome = daemon.run(&mut Nobody);
    // Everybody who waits is answered before the process ends.
    drop((control, metrics, made));
    if let Some(helper) = helper {
        helper.wait();
    }
    outcome.map(|()| ExitCode::SUCCESS)
}

/// The arguments for each image: those that were given, and with `--into` a mountpoint in that directory for each.
fn each(arguments: &MountArgs) -> Result<Vec<MountArgs>> {
    let Some(folder) = &arguments.into else {
        return Ok(vec![arguments.clone()]);
    };
    if let Some(Some(file)) = &arguments.overlay {
        return Err(Error::Refused(format!(
            "--overlay={} stands on one image: with --into use --overlay, or mount that image by itself",
            file.display()
        )));
    }
    let images = [&arguments.image];
    let images = images.into_iter().chain(&arguments.mountpoint);
    let mut wanted: Vec<MountArgs> = Vec::new();
    for image in images.chain(&arguments.more) {
        let name = image.file_name().ok_or_else(|| {
            Error::Refused(format!(
                "'{}' has no file name to show it by",
                image.display()
            ))
        })?;
        let mountpoint = beside(&folder.join(name), arguments.dir);
        if let Some(other) = wanted
            .iter()
            .find(|other| other.mountpoint.as_ref() == Some(&mountpoint))
        {
            return Err(Error::Refused(format!(
                "'{}' and '{}' would both be shown as '{}': mount one of them by itself",
                other.image.display(),
                image.display(),
                mountpoint.display()
            )));
        }
        wanted.push(MountArgs {
            image: image.clone(),
            mountpoint: Some(mountpoint),
            ..arguments.clone()
        });
    }
    Ok(wanted)
}

/// An image that is open, and is to be shown.
struct Prepared<'a> {
    arguments: &'a MountArgs,
    /// Counts from 1; the first one's names have no number.
    number: usize,
    node: String,
    directory: Option<Directory>,
}

impl<'a> Prepared<'a> {
    fn new(daemon: &Daemon, ring: &Ring, number: usize, arguments: &'a MountArgs) -> Result<Self> {
        // A killed daemon may have shown the image over itself.
        mountpoint::heal(&arguments.image)?;
        let graph = daemon.graph();
        let overlay = ring.block_on(overlay::prepare(arguments))?;
        let image = absolute(&arguments.image);
        let path = overlay.as_ref().map_or(&*image, Overlay::path);
        let opened = open_image(graph, ring, path, number, arguments)?;
        let directory = arguments.dir.then(|| {
            let plan = directory::plan(graph, path, &opened, is_writable(arguments));
            ring.block_on(plan)
        });
        // From here on an overlay that is thrown away has no name.
        drop(overlay);
        Ok(Self {
            arguments,
            number,
            directory: directory.transpose()?,
            node: part_of(graph, opened, number, arguments)?,
        })
    }
}

/// A name for the image of this number, counted from 1.
fn numbered(name: &str, number: usize) -> String {
    match number {
        1 => name.to_owned(),
        _ => format!("{name}{number}"),
    }
}

/// Threads for all images, if there are several; one image has its own.
fn shared_threads(arguments: &MountArgs, images: usize) -> Result<Vec<Arc<IoThread>>> {
    match images {
        1 => Ok(Vec::new()),
        _ => Ok(threads(arguments)?.into_iter().map(Arc::new).collect()),
    }
}

fn threads(arguments: &MountArgs) -> Result<Vec<IoThread>> {
    let count = arguments.threads.unwrap_or_else(default_threads);
    own_threads(count, choice(arguments.event_loop))
}

/// Whether the disk can be written, be it in an overlay.
fn is_writable(arguments: &MountArgs) -> bool {
    arguments.writable || arguments.overlay.is_some()
}

/// Opens the image, whatever its format, or the overlay above it, which is at `path`.
fn open_image(
    graph: &Graph,
    ring: &Ring,
    path: &Path,
    number: usize,
    arguments: &MountArgs,
) -> Result<Opened> {
    let mut options = open_options(arguments);
    options.name = Some(numbered("disk", number));
    if arguments.overlay.is_some() {
        options.format = Some(Format::Qcow2);
    }
    let opened = || ring.block_on(diskfuse_image::open(graph, path, &options));
    let opened = unless_held(opened);
    opened.map_err(|error| {
        let refused = arguments.writable && is_about_writing(&error);
        match refused && File::open(path).is_ok() {
            true => Error::Refused(format!(
                "{error}\nIt can be shown read-only: leave --writable out."
            )),
            false => error.into(),
        }
    })
}

/// umount(8) is done before the daemon whose mount it was: for a moment that one still holds the image. Somebody who mounts
/// again at once is not to be refused for it.
fn unless_held<T>(
    mut open: impl FnMut() -> diskfuse_block::Result<T>,
) -> diskfuse_block::Result<T> {
    const PATIENCE: Duration = Duration::from_secs(1);
    const TICK: Duration = Duration::from_millis(20);
    let end = Instant::now() + PATIENCE;
    loop {
        match open() {
            Err(error) if error.kind() == Kind::Busy && Instant::now() < end => {
                std::thread::sleep(TICK);
            }
            outcome => return outcome,
        }
    }
}

/// The absolute path of an image, as it is shown to others and the working directory changes. What cannot be found is opened
/// by the name that was typed, which gives the proper error.
pub fn absolute(image: &Path) -> PathBuf {
    match image.metadata() {
        Ok(_) => std::path::absolute(image).unwrap_or_else(|_| image.to_owned()),
        Err(_) => image.to_owned(),
    }
}

/// The name of the node that shows what was asked for of the image.
fn part_of(graph: &Graph, opened: Opened, number: usize, arguments: &MountArgs) -> Result<String> {
    if arguments.offset.is_none() && arguments.size.is_none() {
        return Ok(opened.name);
    }
    let part = RawConfig {
        offset: arguments.offset.unwrap_or(0),
        size: arguments.size,
        read_only: false,
    };
    let raw = drivers::open_raw(opened.node, &part)?;
    Ok(graph.insert(Some(&numbered("part", number)), raw, &[&opened.name])?)
}

fn open_options(arguments: &MountArgs) -> OpenOptions {
    let discard = arguments.discard == cli::Discard::Unmap;
    OpenOptions {
        format: arguments.format,
        writable: is_writable(arguments),
        file: FileConfig {
            aio: match arguments.aio {
                cli::Aio::IoUring => diskfuse_block::Aio::IoUring,
                cli::Aio::Threads => diskfuse_block::Aio::Threads,
            },
            direct: arguments.cache == cli::Cache::Direct,
            discard: match discard {
                true => drivers::Discard::Unmap,
                false => drivers::Discard::Ignore,
            },
            ..FileConfig::default()
        },
        qcow2: Qcow2Config {
            discard,
            snapshot: arguments.snapshot.clone(),
            ..Qcow2Config::default()
        },
        backing: true,
        name: None,
    }
}

impl Prepared<'_> {
    /// Shows it, served by `shared` threads, or by its own if there are none; where it is.
    fn start(self, daemon: &mut Daemon, shared: &[Arc<IoThread>]) -> Result<PathBuf> {
        let Self {
            arguments,
            number,
            node,
            directory,
        } = self;
        let path = mountpoint_of(arguments);
        // A mount that a killed daemon left behind hides whether there is a file.
        mountpoint::heal(&path)?;
        if arguments.mountpoint.is_none() {
            refuse_to_hide(&path)?;
        }
        let own_threads = match shared {
            [] => threads(arguments)?,
            _ => Vec::new(),
        };
        let made = match arguments.dir {
            true => MadeFile::make_directory_if_missing(&path)?,
            false => MadeFile::make_if_missing(&path)?,
        };
        let options = ExportOptions {
            id: numbered("mount", number),
            mountpoint: path.clone(),
            writable: is_writable(arguments),
            growable: arguments.growable,
            allow_other: match (arguments.allow_other, arguments.allow_root) {
                (true, _) => AllowOther::On,
                (false, true) => AllowOther::Root,
                (false, false) => AllowOther::Off,
            },
            ownership: Ownership {
                uid: arguments.uid,
                gid: arguments.gid,
                mode: arguments.mode,
            },
            max_background: arguments.max_background.unwrap_or(DEFAULT_MAX_BACKGROUND),
            transport: transport(arguments)?,
            passthrough: match arguments.passthrough {
                cli::Passthrough::Off => Passthrough::Off,
                cli::Passthrough::Auto => Passthrough::Auto,
                cli::Passthrough::On => Passthrough::On,
            },
            on_error: None,
        };
        let export = NewExport {
            directory,
            // An overlay is not what people know the disk by.
            image: arguments
                .overlay
                .is_some()
                .then(|| absolute(&arguments.image)),
            options,
            node,
            iothreads: shared.to_vec(),
            own_threads,
            made,
            idle_timeout: arguments
                .idle_timeout
                .map(|seconds| Duration::from_secs(seconds.into())),
        };
        daemon.start_export(export).map_err(|error| match error {
            Error::Fuse(diskfuse_fuse::Error::NotRegular { .. }) if path.is_dir() => {
                Error::Refused(format!(
                    "{error} (it is a folder: name a file in it, which need not exist)"
                ))
            }
            error => error,
        })
    }
}

fn transport(arguments: &MountArgs) -> Result<TransportOptions> {
    let placement = match arguments.placement {
        cli::Placement::Auto => Placement::Auto,
        cli::Placement::Free => Placement::Free,
        cli::Placement::Pinned => Placement::Pinned,
        cli::Placement::Spread => Placement::Spread,
    };
    let wrong = || {
        let words = arguments.cpus.join(",");
        Error::Refused(format!("--cpus {words}: not CPUs such as 0-3 or 0,2"))
    };
    Ok(TransportOptions {
        transport: match arguments.transport {
            cli::Transport::Auto => Transport::Auto,
            cli::Transport::Device => Transport::Device,
            cli::Transport::Uring => Transport::Uring,
        },
        depth: arguments.depth.and_then(NonZeroU16::new),
        max_payload: arguments.max_payload,
        placement: match arguments.cpus.is_empty() {
            true => placement,
            false => {
                Placement::Cpus(diskfuse_monitor::parse_cpus(&arguments.cpus).ok_or_else(wrong)?)
            }
        },
    })
}

/// The mountpoint that was named, or a new file or directory beside the image.
fn mountpoint_of(arguments: &MountArgs) -> PathBuf {
    let named = arguments.mountpoint.clone();
    named.unwrap_or_else(|| beside(&arguments.image, arguments.dir))
}

/// The path with what a file, or a directory, is called that shows it.
fn beside(path: &Path, dir: bool) -> PathBuf {
    let mut name: OsString = path.into();
    name.push(if dir { ".d" } else { ".raw" });
    name.into()
}

/// Nobody asked for a file of his to be hidden. That something is mounted there is for the export to say.
fn refuse_to_hide(path: &Path) -> Result<()> {
    let is_theirs = path
        .metadata()
        .is_ok_and(|stat| stat.is_file() && stat.len() > 0);
    if !is_theirs || is_mounted(path) {
        return Ok(());
    }
    let path = path.display();
    Err(Error::Refused(format!(
        "'{path}' exists and is not empty: name the mountpoint if it is to be mounted over"
    )))
}

fn is_mounted(path: &Path) -> bool {
    let Ok(path) = diskfuse_fuse::absolute(path) else {
        return false;
    };
    diskfuse_fuse::mounts().is_ok_and(|all| all.iter().any(|mount| mount.mountpoint == path))
}

fn default_threads() -> u8 {
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    u8::try_from(cpus)
        .unwrap_or(MOST_BY_DEFAULT)
        .min(MOST_BY_DEFAULT)
}

fn choice(event_loop: cli::EventLoop) -> Choice {
    match event_loop {
        cli::EventLoop::Auto => Choice::Auto,
        cli::EventLoop::IoUring => Choice::Uring,
        cli::EventLoop::Epoll => Choice::Epoll,
    }
}

/// Whether the host does not let the image be written; so it is known to be a file.
fn is_about_writing(error: &diskfuse_block::Error) -> bool {
    use rustix::io::Errno;
    let reasons = [Errno::ACCESS, Errno::PERM, Errno::ROFS];
    reasons
        .iter()
        .any(|reason| reason.raw_os_error() == error.errno())
}
