//! Changes of nodes that are in use. Each drains whoever is above the node, acts, and lets them go on: nobody's request is
//! lost, doubled, or served by a node that is half changed. All of it runs on the main thread.

pub mod internal;
pub mod reopen;
pub mod resize;
pub mod snapshot;
pub mod writable;

use std::sync::Arc;

use diskfuse_block::graph::Change;
use diskfuse_block::{Node, downcast};
use diskfuse_qcow2::node::Qcow2Node;

use super::nodes::Nodes;
use crate::error::{Error, Result};

/// The node of this name, in the words of QEMU if there is none.
pub(super) fn find(nodes: &Nodes, name: &str) -> Result<Arc<dyn Node>> {
    nodes.check_there(name)?;
    Ok(nodes.graph.bare(name)?)
}

/// Does something to the file of a qcow2 node while nobody uses it and the image is closed.
pub(super) fn while_closed<T>(
    nodes: &Nodes,
    name: &str,
    work: impl AsyncFnOnce(&dyn Node) -> diskfuse_block::Result<T>,
) -> Result<T> {
    let bare = find(nodes, name)?;
    let Some(image) = downcast::<Qcow2Node>(&*bare) else {
        return Err(Error::Refused(format!(
            "Node '{name}' is not a qcow2 image"
        )));
    };
    // Closing flushes; most of it is done before anybody has to wait.
    nodes.run(image.flush())??;
    let _drained = nodes.drain(name)?;
    let (done, opened) = nodes.run(image.while_closed(work))??;
    let with = opened.map_err(|error| {
        Error::Refused(format!(
            "Node '{name}' could not be opened again and takes no writes until it is (by blockdev-reopen): {error}"
        ))
    })?;
    let node = name.to_owned();
    nodes.graph.change(&[Change::Swap { node, with }])?;
    Ok(done?)
}
