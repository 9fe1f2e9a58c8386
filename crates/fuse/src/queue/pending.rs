//! A request that has to be answered. The type sees to it that it is, once: one that is dropped unanswered answers EIO
//! and says so, as it is a bug of ours and must not become a hanging process of somebody else's.

use diskfuse_ring::SharedFd;
use zerocopy::IntoBytes;

use crate::abi::{OUT_HEADER, OutHeader};

pub(super) struct Pending<'a> {
    device: &'a SharedFd,
    unique: u64,
    answered: bool,
}

impl<'a> Pending<'a> {
    pub(super) fn new(device: &'a SharedFd, unique: u64) -> Self {
        Self {
            device,
            unique,
            answered: false,
        }
    }

    /// The header of the answer; whoever takes it sends it.
    pub(super) fn header(mut self, answer: Result<usize, i32>) -> (OutHeader, usize) {
        self.answered = true;
        let (error, len) = match answer {
            Ok(len) => (0, len),
            Err(errno) => (-errno, 0),
        };
        let header = OutHeader {
            len: (OUT_HEADER + len) as u32,
            error,
            unique: self.unique,
        };
        (header, len)
    }

    /// Answers with an errno (positive) at once.
    pub(super) fn refuse(self, errno: i32) {
        let device = self.device;
        let (header, _) = self.header(Err(errno));
        // If the connection is gone, so is whoever waits for this.
        let _ = rustix::io::write(device, header.as_bytes());
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        if self.answered {
            return;
        }
        tracing::error!(
            unique = self.unique,
            "a request was given up without an answer; answering EIO"
        );
        let header = OutHeader {
            len: OUT_HEADER as u32,
            error: -libc::EIO,
            unique: self.unique,
        };
        // Nobody is left to hear of a failure.
        let _ = rustix::io::write(self.device, header.as_bytes());
    }
}
