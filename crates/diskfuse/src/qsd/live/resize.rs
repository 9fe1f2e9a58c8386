//! Another size for a disk that is in use (`block_resize`).

use diskfuse_block::graph::User;
use diskfuse_block::{Error, Kind, Permissions, Resize};

use super::find;
use crate::error::Result;
use crate::qsd::nodes::Nodes;

/// Makes the disk exactly `size` bytes, if nobody who uses it objects. What is new reads as zeroes.
pub fn resize(nodes: &Nodes, name: &str, size: u64) -> Result<()> {
    find(nodes, name)?;
    let user = User {
        name: "block_resize".to_owned(),
        perm: Permissions::RESIZE,
        shared: Permissions::ALL,
        drain: None,
        follows: false,
    };
    let right = nodes.graph.attach(name, user)?;
    let _drained = nodes.drain(name)?;
    let node = right.node()?;
    let resized = nodes.run(node.resize(size, Resize::Exactly, false))?;
    Ok(resized.map_err(in_words)?)
}

/// QEMU's words for what the host refuses of a file.
fn in_words(error: Error) -> Error {
    match error.kind() {
        Kind::Os(_) => {
            let text = format!("Could not resize file: {}", error.reason_first());
            Error::new(error.kind(), text)
        }
        _ => error,
    }
}
