//! What can go wrong with a command, for the person who gave it.

use std::fmt;
use std::io;

use diskfuse_ring::Reason;
use rustix::io::Errno;

/// A command failed. `Display` is a whole message, without the program's name in front.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A disk could not be opened or used.
    #[error(transparent)]
    Block(#[from] diskfuse_block::Error),
    /// An export could not be started or ended.
    #[error(transparent)]
    Fuse(#[from] diskfuse_fuse::Error),
    /// An event loop could not be made.
    #[error(transparent)]
    Ring(#[from] diskfuse_ring::Error),
    /// An option of the storage daemon's command line is wrong.
    #[error(transparent)]
    Options(#[from] diskfuse_monitor::Error),
    /// The system refused something.
    #[error("{what}: {}{}", Reason(source), remedy(source))]
    System {
        /// What was to be done, and with which file.
        what: String,
        /// The system's answer.
        source: io::Error,
    },
    /// What was asked for cannot be, in a sentence of its own.
    #[error("{0}")]
    Refused(String),
}

/// What commands answer.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// For `map_err`: `what` could not be done.
    pub fn system<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> Self {
        let what = what.into();
        move |source| Self::System {
            what,
            source: source.into(),
        }
    }

    /// Whether somebody drains the node that it is about, so that what was refused may go a moment later.
    pub fn is_drained(&self) -> bool {
        let (Self::Block(error) | Self::Fuse(diskfuse_fuse::Error::Block(error))) = self else {
            return false;
        };
        error.kind() == diskfuse_block::Kind::Drained
    }

    /// A sentence.
    pub fn refused(message: impl Into<String>) -> Self {
        Self::Refused(message.into())
    }
}

/// What to do about it, where that is known.
fn remedy(error: &io::Error) -> &'static str {
    match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::MFILE) => " (raise the limit of open files: ulimit -n)",
        _ => "",
    }
}

/// A user's text as a terminal can take it: control characters escaped.
pub struct Plain<'a>(pub &'a str);

impl fmt::Display for Plain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for letter in self.0.chars() {
            if letter.is_control() {
                write!(f, "{}", letter.escape_default())?;
            } else {
                write!(f, "{letter}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_descriptor_limit_is_named_with_what_to_do() {
        let error = Error::from(diskfuse_ring::Error::Setup {
            what: "eventfd",
            source: rustix::io::Errno::MFILE.into(),
        });
        assert!(error.to_string().contains("ulimit -n"), "{error}");
    }

    #[test]
    fn control_characters_never_reach_the_terminal() {
        assert_eq!(Plain("a\x1b[2Jé\n").to_string(), "a\\u{1b}[2Jé\\n");
    }
}
