//! What can go wrong with an export: for the person who starts it. Errors of single requests are errnos for the
//! kernel and never come here.

use std::io;
use std::path::PathBuf;

use diskfuse_ring::Reason;

/// An export could not be started, or could not be ended properly.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The mountpoint is missing or cannot be looked at.
    #[error("Failed to stat '{}': {}", path.display(), Reason(source))]
    Stat {
        /// The mountpoint.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The mountpoint is a directory, a device or something else.
    #[error("'{}' is not a regular file", path.display())]
    NotRegular {
        /// The mountpoint.
        path: PathBuf,
    },
    /// A directory is to be mounted on something else.
    #[error("'{}' is not a directory", path.display())]
    NotDirectory {
        /// The mountpoint.
        path: PathBuf,
    },
    /// A directory is to be mounted where there are files.
    #[error("'{}' is not empty: what is in it would be hidden; name an empty directory, or one that does not exist yet", path.display())]
    NotEmpty {
        /// The mountpoint.
        path: PathBuf,
    },
    /// A directory is to be mounted on somebody else's.
    #[error("'{}' belongs to another user: name a directory of your own", path.display())]
    NotOwned {
        /// The mountpoint.
        path: PathBuf,
    },
    /// Something else is mounted there.
    #[error("Something is mounted on '{}' already: unmount it first, or name another directory", path.display())]
    AlreadyMounted {
        /// The mountpoint.
        path: PathBuf,
    },
    /// Something of ours is mounted there.
    #[error("There already is a FUSE export on '{}'", path.display())]
    AlreadyExported {
        /// The mountpoint.
        path: PathBuf,
    },
    /// `/dev/fuse` cannot be opened.
    #[error(
        "Could not open '/dev/fuse': {}{}",
        Reason(source),
        device_advice(source)
    )]
    Device {
        /// Why.
        source: io::Error,
    },
    /// mount(2) failed.
    #[error("Failed to mount FUSE on '{}': {}{}", path.display(), Reason(source), mount_advice(source))]
    Mount {
        /// The mountpoint.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A further queue cannot be made.
    #[error(
        "Failed to set up queue {queue}: {}{}",
        Reason(source),
        device_advice(source)
    )]
    Queue {
        /// Its number.
        queue: usize,
        /// Why.
        source: io::Error,
    },
    /// The kernel's FUSE is too old, or did not say anything.
    #[error("{0}")]
    Handshake(String),
    /// FUSE over io_uring was asked for by name and cannot be had.
    #[error("transport=uring: {0}")]
    NoRing(String),
    /// Passthrough was asked for by name and cannot be had.
    #[error("passthrough=on: {0}")]
    NoPassthrough(String),
    /// How many CPUs there are cannot be found out.
    #[error("Could not find out how many CPUs there may be: {}", Reason(source))]
    Cpus {
        /// Why.
        source: io::Error,
    },
    /// The disk behind it failed.
    #[error(transparent)]
    Block(#[from] diskfuse_block::Error),
    /// The event loop failed.
    #[error(transparent)]
    Ring(#[from] diskfuse_ring::Error),
    /// Somebody uses the file, and it was to be unmounted only if nobody does.
    #[error("'{}' is in use", path.display())]
    Busy {
        /// The mountpoint.
        path: PathBuf,
    },
    /// The mount could not be taken away.
    #[error("Failed to unmount '{}': {}", path.display(), Reason(source))]
    Unmount {
        /// The mountpoint.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The options contradict each other.
    #[error("{0}")]
    Options(String),
}

fn device_advice(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::ENOENT) => " (load the module: modprobe fuse)",
        Some(libc::EACCES | libc::EPERM) => {
            " (run as root, or give this user access: chmod 666 /dev/fuse, or join its group; in a container: --device /dev/fuse)"
        }
        Some(libc::EMFILE) => " (each queue needs a descriptor: raise the limit with ulimit -n)",
        _ => "",
    }
}

fn mount_advice(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::ENODEV) => " (load the module: modprobe fuse)",
        _ => "",
    }
}

/// What starting an export answers.
pub type Result<T> = std::result::Result<T, Error>;
