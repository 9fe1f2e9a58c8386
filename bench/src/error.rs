//! What can go wrong in a task, in words for a person. Never carries a figure: a failed measurement has none.

use std::io;
use std::path::{Path, PathBuf};

/// The one error of this crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An operation on a file, directory or program failed.
    #[error("{what} {}: {source}", path.display())]
    Io {
        /// The operation, as a verb phrase ("create", "run").
        what: &'static str,
        /// What it was done to.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A program that the measurement needs is not installed.
    #[error("{program} is not installed: {install}")]
    Missing {
        /// Name of the program.
        program: &'static str,
        /// The command that installs it.
        install: &'static str,
    },
    /// A daemon did not come up, or did not answer.
    #[error("{name}: {reason}")]
    Daemon {
        /// Label of the contender.
        name: String,
        /// What happened, with what the daemon printed if that is known.
        reason: String,
    },
    /// fio failed, ran over its time limit or printed something unexpected.
    #[error("fio: {0}")]
    Fio(String),
    /// The command line asks for something that cannot be done.
    #[error("{0}")]
    Usage(String),
    /// SIGINT or SIGTERM arrived.
    #[error("interrupted")]
    Interrupted,
}

/// Shorthand for this crate's results.
pub type Result<T> = std::result::Result<T, Error>;

/// Adds the operation and its object to an I/O error.
pub trait At<T> {
    /// `what` is a verb phrase, `path` its object.
    fn at(self, what: &'static str, path: &Path) -> Result<T>;
}

impl<T, E: Into<io::Error>> At<T> for std::result::Result<T, E> {
    fn at(self, what: &'static str, path: &Path) -> Result<T> {
        self.map_err(|source| Error::Io {
            what,
            path: path.to_path_buf(),
            source: source.into(),
        })
    }
}
