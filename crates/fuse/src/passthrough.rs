//! Passthrough: the kernel reads and writes the image file itself, without asking. Only for a node that is a plain file
//! from its first byte to its last, and only as root. It must never be used where the kernel could do what the export may
//! not: a file that the kernel writes grows when it is written past its end, so a writable export must be growable.
//!
//! What the export still does: opening, attributes, truncating, allocating, flushing. Its counters do not see what the kernel
//! does, and a drain does not stop it.
//!
//! Source: `Documentation/filesystems/fuse/fuse-passthrough.rst`, `fs/fuse/passthrough.c` and `fs/fuse/backing.c` of Linux.

use std::os::fd::AsFd;
use std::sync::OnceLock;

use diskfuse_block::Node;
use diskfuse_ring::SharedFd;

use crate::error::{Error, Result};
use crate::shared::ExportOptions;
use crate::transport::device;

/// Whether the kernel is to do the reading and writing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Passthrough {
    /// No.
    #[default]
    Off,
    /// If it can be had.
    Auto,
    /// Yes, or fail.
    On,
}

/// An export's passthrough.
pub(crate) struct Backing {
    insist: bool,
    /// The image file, as long as the kernel does not have it.
    file: parking_lot::Mutex<Option<SharedFd>>,
    /// The kernel's name for it.
    id: OnceLock<i32>,
}

impl Backing {
    /// Looks whether the node can be passed through, before anything is mounted and after the export has got its
    /// permissions; `None` if not, and that is all right.
    pub(crate) fn prepare(options: &ExportOptions, node: &dyn Node) -> Result<Option<Self>> {
        if options.passthrough == Passthrough::Off {
            return Ok(None);
        }
        let insist = options.passthrough == Passthrough::On;
        let file = match options.writable && !options.growable {
            true => Err(
                "the kernel would let a write past the end make the file larger, \
                 which a writable export may only if it is growable"
                    .to_owned(),
            ),
            false => node.plain_file(options.writable),
        };
        match file {
            Ok(file) => Ok(Some(Self {
                insist,
                file: parking_lot::Mutex::new(Some(file)),
                id: OnceLock::new(),
            })),
            Err(why) if insist => Err(Error::NoPassthrough(why)),
            Err(why) => {
                tracing::info!("no passthrough: {why}");
                Ok(None)
            }
        }
    }

    /// Gives the file to the kernel, which has agreed to passthrough or not. The error is for people: it had to work.
    pub(crate) fn hand_over(
        &self,
        agreed: bool,
        connection: &SharedFd,
    ) -> std::result::Result<(), String> {
        let Some(file) = self.file.lock().take() else {
            return Ok(());
        };
        let handed = match agreed {
            false => Err("this kernel has no passthrough (Linux 6.9 has it)".to_owned()),
            true => device::open_backing(connection, file.as_fd()).map_err(|error| explain(&error)),
        };
        match handed {
            Ok(id) => {
                // Set once: the file is taken once.
                let _ = self.id.set(id);
                Ok(())
            }
            Err(why) if self.insist => Err(format!("passthrough=on: {why}")),
            Err(why) => {
                tracing::warn!("no passthrough: {why}");
                Ok(())
            }
        }
    }

    /// What to answer to an OPEN: the kernel's name for the file, if it has it.
    pub(crate) fn id(&self) -> Option<i32> {
        self.id.get().copied()
    }
}

fn explain(error: &std::io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::EPERM) => "the kernel allows it to root only (CAP_SYS_ADMIN)".to_owned(),
        Some(libc::ELOOP) => "the image lies on a file system that itself stands on another (an export with passthrough, overlayfs), and the kernel stacks no further".to_owned(),
        Some(libc::EOPNOTSUPP) => "the kernel cannot pass such a file through".to_owned(),
        _ => error.to_string(),
    }
}
