//! What can go wrong with a disk. For a person: what failed, on which file and where, and what to do. For the kernel:
//! the errno that belongs to it.

use std::io;

use diskfuse_ring::Reason;

/// The stable part of an error: what callers decide by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The host's answer, as it was.
    Os(i32),
    /// A filter failed the request because it was told to, with this errno: nothing is wrong.
    Injected(i32),
    /// The image holds something that it must not; it is kept as it is.
    Corrupt,
    /// The node, or what is below it, cannot be written.
    ReadOnly,
    /// An argument that this node can never serve (a size, an offset).
    Invalid,
    /// This node has no such operation.
    Unsupported,
    /// Somebody else holds it.
    Busy,
    /// Somebody drains the node for a moment: what was refused for it can be tried again.
    Drained,
    /// There is no such node.
    NotFound,
    /// There is one by that name already.
    Exists,
    /// The loop that should do the work is gone.
    Ended,
}

/// One error type for all disks: a kind for programs, a sentence for people, and the source.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    kind: Kind,
    message: String,
    source: Option<io::Error>,
}

impl Error {
    /// An error with a sentence of its own.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            source: None,
        }
    }

    /// The host refused something: `what` names the operation, the file and the place, for example
    /// `read 4096 bytes at 8192 of 'vm.raw'`.
    pub fn os(what: impl std::fmt::Display, source: io::Error) -> Self {
        Self {
            kind: Kind::Os(source.raw_os_error().unwrap_or(libc::EIO)),
            message: format!("{what}: {}", Reason(&source)),
            source: Some(source),
        }
    }

    /// Its text for clients that know QEMU's, which is the system's words for such an error and no more: these first, and
    /// behind them what failed, as in `No space left on device (write 4096 bytes at 0 of 'vm.raw')`. What the host has not
    /// refused stays as it is.
    pub fn reason_first(&self) -> String {
        if !matches!(self.kind, Kind::Os(_) | Kind::Injected(_) | Kind::Corrupt) {
            return self.message.clone();
        }
        let reason = Reason(&io::Error::from_raw_os_error(self.errno())).to_string();
        if self.message.starts_with(&reason) {
            return self.message.clone();
        }
        let what = self.message.strip_suffix(&reason);
        let what = what.and_then(|what| what.strip_suffix(": "));
        format!("{reason} ({})", what.unwrap_or(&self.message))
    }

    /// What kind of error it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The number for the kernel (positive, as in errno.h).
    pub fn errno(&self) -> i32 {
        match self.kind {
            Kind::Os(errno) | Kind::Injected(errno) => errno,
            Kind::Corrupt | Kind::Ended => libc::EIO,
            Kind::ReadOnly => libc::EROFS,
            Kind::Invalid => libc::EINVAL,
            Kind::Unsupported => libc::EOPNOTSUPP,
            Kind::Busy | Kind::Drained => libc::EBUSY,
            Kind::NotFound => libc::ENOENT,
            Kind::Exists => libc::EEXIST,
        }
    }
}

/// What disks answer.
pub type Result<T> = std::result::Result<T, Error>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_systems_words_come_first_for_clients_that_look_for_them() {
        let full = io::Error::from_raw_os_error(libc::ENOSPC);
        let error = Error::os("write 512 bytes at 0 of 't'", full);
        let expected = "No space left on device (write 512 bytes at 0 of 't')";
        assert_eq!(error.reason_first(), expected);

        let corrupt = Error::new(Kind::Corrupt, "'t' is broken at 4");
        let expected = "Input/output error ('t' is broken at 4)";
        assert_eq!(corrupt.reason_first(), expected);

        let said = Error::new(Kind::Os(libc::ECANCELED), "Operation canceled");
        assert_eq!(said.reason_first(), "Operation canceled");
        let refused = Error::new(Kind::Invalid, "no such size");
        assert_eq!(refused.reason_first(), "no such size");
    }
}
