//! A file descriptor that operations in flight keep open. Never a bare integer: a number that was closed and used
//! again would send a write to the wrong file.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;

/// An open file, shared by its owners and by every operation in flight on it; closed when the last one lets go.
#[derive(Clone, Debug)]
pub struct SharedFd(Arc<OwnedFd>);

impl SharedFd {
    /// Shares an owned descriptor.
    pub fn new(fd: OwnedFd) -> Self {
        Self(Arc::new(fd))
    }
}

impl From<std::fs::File> for SharedFd {
    fn from(file: std::fs::File) -> Self {
        Self::new(file.into())
    }
}

impl AsFd for SharedFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for SharedFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
