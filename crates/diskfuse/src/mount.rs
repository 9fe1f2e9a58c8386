//! `diskfuse mount`: one image, one file, one process. It must leave nothing behind when it fails: no mount, no
//! mountpoint that it made, no daemon.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use diskfuse_block::drivers::{self, FileConfig, RawConfig};
use diskfuse_block::{Graph, Locking};
use diskfuse_fuse::{AllowOther, DEFAULT_MAX_BACKGROUND, ExportOptions};
use diskfuse_ring::Choice;

use crate::background::{self, Role};
use crate::cli::{self, MountArgs};
use crate::daemon::{Daemon, Lifetime, NewExport, own_threads};
use crate::error::{Error, Result};
use crate::logging;
use crate::mountpoint::{self, MadeFile};
use crate::output;

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
    let mut daemon = Daemon::new(Lifetime::Exports)?;
    // A killed daemon may have shown the image over itself.
    mountpoint::heal(&arguments.image)?;
    let node = open_image(daemon.graph(), arguments)?;
    let mountpoint = start_export(&mut daemon, node, arguments)?;
    let control = daemon.listen()?;
    // Where it is, for those who did not say so themselves.
    let news = match arguments.mountpoint {
        Some(_) => String::new(),
        None => format!("{}\n", mountpoint.display()),
    };
    match readiness {
        Some(readiness) => readiness.announce(&news)?,
        None => output::say(&news)?,
    }
    let outcome = daemon.run();
    // Everybody who waits is answered before the process ends.
    drop(control);
    outcome.map(|()| ExitCode::SUCCESS)
}

/// Opens the image and returns the name of the node that shows it.
fn open_image(graph: &Graph, arguments: &MountArgs) -> Result<String> {
    // Absolute, because it is shown to others and the working directory changes. What cannot be found is opened by the
    // name that was typed, which gives the proper error.
    let image = &arguments.image;
    let filename = image.canonicalize().unwrap_or_else(|_| image.clone());
    let config = FileConfig {
        aio: match arguments.aio {
            cli::Aio::IoUring => diskfuse_block::Aio::IoUring,
            cli::Aio::Threads => diskfuse_block::Aio::Threads,
        },
        direct: arguments.cache == cli::Cache::Direct,
        no_flush: false,
        read_only: !arguments.writable,
        auto_read_only: false,
        discard: match arguments.discard {
            cli::Discard::Ignore => drivers::Discard::Ignore,
            cli::Discard::Unmap => drivers::Discard::Unmap,
        },
        detect_zeroes: drivers::DetectZeroes::Off,
        locking: Locking::Auto,
        filename,
    };
    let is_device = image
        .metadata()
        .is_ok_and(|stat| stat.file_type().is_block_device());
    let opened = match is_device {
        true => drivers::open_host_device(&config),
        false => drivers::open_file(&config),
    };
    let file = opened.map_err(|error| {
        let refused = arguments.writable && is_about_writing(&error);
        match refused && File::open(&config.filename).is_ok() {
            true => Error::Refused(format!(
                "{error}\nIt can be shown read-only: leave --writable out."
            )),
            false => error.into(),
        }
    })?;
    if arguments.format.is_none() {
        refuse_other_formats(&config.filename)?;
    }
    graph.insert(Some("file"), Arc::clone(&file) as _, &[])?;
    if arguments.offset.is_none() && arguments.size.is_none() {
        return Ok("file".to_owned());
    }
    let part = RawConfig {
        offset: arguments.offset.unwrap_or(0),
        size: arguments.size,
        read_only: false,
    };
    let raw = drivers::open_raw(file, &part)?;
    Ok(graph.insert(Some("raw"), raw, &["file"])?)
}

fn start_export(daemon: &mut Daemon, node: String, arguments: &MountArgs) -> Result<PathBuf> {
    let path = mountpoint_of(arguments);
    // A mount that a killed daemon left behind hides whether there is a file.
    mountpoint::heal(&path)?;
    if arguments.mountpoint.is_none() {
        refuse_to_hide(&path)?;
    }
    let own_threads = own_threads(
        arguments.threads.unwrap_or_else(default_threads),
        choice(arguments.event_loop),
    )?;
    let made = MadeFile::make_if_missing(&path)?;
    let options = ExportOptions {
        id: "mount".to_owned(),
        mountpoint: path.clone(),
        writable: arguments.writable,
        growable: arguments.growable,
        allow_other: match arguments.allow_other {
            true => AllowOther::On,
            false => AllowOther::Off,
        },
        max_background: arguments.max_background.unwrap_or(DEFAULT_MAX_BACKGROUND),
    };
    let export = NewExport {
        options,
        node,
        mailboxes: Vec::new(),
        own_threads,
        made,
    };
    daemon.start_export(export).map_err(|error| match error {
        Error::Fuse(diskfuse_fuse::Error::NotRegular { .. }) if path.is_dir() => Error::Refused(
            format!("{error} (it is a folder: name a file in it, which need not exist)"),
        ),
        error => error,
    })
}

/// The mountpoint that was named, or a new file beside the image.
fn mountpoint_of(arguments: &MountArgs) -> PathBuf {
    arguments.mountpoint.clone().unwrap_or_else(|| {
        let mut name: OsString = arguments.image.clone().into();
        name.push(".raw");
        name.into()
    })
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

/// How images of formats begin that this version cannot read.
const BEGINNINGS: &[(&[u8], &str)] = &[
    (b"QFI\xfb", "qcow2"),
    (b"KDMV", "VMDK"),
    (b"vhdxfile", "VHDX"),
    (b"conectix", "VPC"),
    (b"LUKS\xba\xbe", "LUKS"),
];

/// Showing the bytes of, say, a qcow2 image instead of its disk is never what is meant, unless somebody says so.
fn refuse_other_formats(image: &Path) -> Result<()> {
    let mut head = [0; 8];
    // The image has been opened already; whatever this cannot read is as good as raw.
    let read = File::open(image).and_then(|mut file| file.read_exact(&mut head));
    let known = BEGINNINGS
        .iter()
        .find(|(begins, _)| head.starts_with(begins));
    match known {
        Some((_, format)) if read.is_ok() => Err(Error::Refused(format!(
            "'{}' looks like a {format} image, and that format is not built into this version yet \
             (--format raw shows its bytes as they are)",
            image.display()
        ))),
        _ => Ok(()),
    }
}
