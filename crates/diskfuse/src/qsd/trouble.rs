//! What goes wrong with disks, told to the monitors' clients: `BLOCK_IO_ERROR` and `BLOCK_IMAGE_CORRUPTED`. Decides nothing.
//! It is called on the threads that serve requests, so it never waits.

use diskfuse_block::Access;
use diskfuse_fuse::OnError;
use diskfuse_monitor::qmp::event::{BlockImageCorrupted, BlockIoError, ErrorAction, IoOperation};
use diskfuse_qcow2::node::OnCorrupt;

use super::monitor::Monitors;

/// Tells of requests of an export that the disk failed.
pub fn on_error(monitors: &Monitors) -> OnError {
    let monitors = monitors.clone();
    OnError::new(move |node, access, error| {
        monitors.emit(BlockIoError {
            qom_path: String::new(),
            device: String::new(),
            node_name: Some(node.to_owned()),
            operation: match access {
                Access::Read => IoOperation::Read,
                Access::Write => IoOperation::Write,
            },
            action: ErrorAction::Report,
            nospace: Some(error.errno() == rustix::io::Errno::NOSPC.raw_os_error()),
            reason: error.to_string(),
        });
    })
}

/// Tells, once, that an image is corrupt. `node`: `None` if the image was opened for the one above it, and has no name that
/// anybody gave it.
pub fn on_corrupt(monitors: &Monitors, node: Option<&str>) -> OnCorrupt {
    let (monitors, node) = (monitors.clone(), node.map(str::to_owned));
    OnCorrupt::new(move |why, fatal| {
        monitors.emit(BlockImageCorrupted {
            device: String::new(),
            node_name: node.clone(),
            msg: why.to_owned(),
            offset: None,
            size: None,
            fatal,
        });
    })
}
