//! A request that has to be answered. The type sees to it that it is, once: one that is dropped unanswered answers EIO
//! and says so, as it is a bug of ours and must not become a hanging process of somebody else's.

use diskfuse_ring::SharedFd;
use zerocopy::IntoBytes;

use crate::abi::{OUT_HEADER, OutHeader};

pub(super) struct Pending<'a> {
    /// Absent if the request lies in an entry, which cannot be answered without its memory: it stays unanswered until the
    /// export's end, which is near, fails it.
    device: Option<&'a SharedFd>,
    unique: u64,
    answered: bool,
}

impl<'a> Pending<'a> {
    /// A request that came through `device`, or in an entry.
    pub(super) fn new(device: Option<&'a SharedFd>, unique: u64) -> Self {
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

    /// Answers one that came through `device` with an errno (positive) at once.
    pub(super) fn refuse(device: &SharedFd, unique: u64, errno: i32) {
        let (header, _) = Pending::new(Some(device), unique).header(Err(errno));
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
        if let Some(device) = self.device {
            // Nobody is left to hear of a failure.
            let _ = rustix::io::write(device, header.as_bytes());
        }
    }
}
