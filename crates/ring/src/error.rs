//! What can go wrong when a loop is set up. Errors of single operations are plain [`std::io::Error`]s, as the kernel
//! gave them, so that their errno reaches whoever asked.

use std::fmt;
use std::io;

/// A loop could not be made, or could not go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// io_uring was asked for by name and the kernel refused it.
    #[error(
        "io_uring is refused here ({}){}",
        Reason(source),
        uring_advice(source)
    )]
    UringRefused {
        /// What `io_uring_setup(2)` answered.
        source: io::Error,
    },
    /// A descriptor or thread that every loop needs could not be made.
    #[error(
        "cannot set up the event loop: {what}: {}{}",
        Reason(source),
        limit_advice(source)
    )]
    Setup {
        /// The thing that could not be made.
        what: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The thread of the loop is gone, so what was asked of it cannot happen any more.
    #[error("the event loop has ended")]
    Ended,
}

/// What to do when descriptors have run out.
fn limit_advice(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::EMFILE) => {
            " (each event loop needs descriptors: raise the limit with ulimit -n, or use fewer threads)"
        }
        Some(libc::ENFILE) => " (the whole system has run out of open files: sysctl fs.file-max)",
        _ => "",
    }
}

fn uring_advice(source: &io::Error) -> &'static str {
    match limit_advice(source) {
        "" => "; containers and kernel.io_uring_disabled do that: use the epoll event loop instead",
        limits => limits,
    }
}

/// The system's reason in words only, for messages: the number that Rust puts behind them helps nobody, and scripts
/// match the end of a line.
pub struct Reason<'a>(pub &'a io::Error);

impl fmt::Display for Reason<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = self.0.to_string();
        f.write_str(text.split(" (os error").next().unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_words_without_the_number() {
        let error = io::Error::from_raw_os_error(libc::ENOENT);
        assert_eq!(Reason(&error).to_string(), "No such file or directory");
    }
}
