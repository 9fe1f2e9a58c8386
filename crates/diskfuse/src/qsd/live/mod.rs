//! Changes of nodes that are in use. Each drains whoever is above the node, acts, and lets them go on: nobody's request is
//! lost, doubled, or served by a node that is half changed. All of it runs on the main thread.

pub mod internal;
pub mod reopen;
pub mod resize;
pub mod snapshot;
pub mod writable;

use std::sync::Arc;

use diskfuse_block::graph::{Change, ChildRole};
use diskfuse_block::{Node, downcast};
use diskfuse_qcow2::node::Qcow2Node;

use super::nodes::Nodes;
use super::suggest;
use crate::error::{Error, Result};

/// The node of this name, in the words of QEMU if there is none.
pub(super) fn find(nodes: &Nodes, name: &str) -> Result<Arc<dyn Node>> {
    nodes.check_there(name)?;
    Ok(nodes.graph.bare(name)?)
}

/// The node that is meant by a command that has two words for one. There are no devices, so both take its name.
pub(super) fn named<'w>(
    nodes: &Nodes,
    device: Option<&'w str>,
    node: Option<&'w str>,
) -> Result<&'w str> {
    let names = nodes.graph.names();
    let is_there = |name: &&str| names.iter().any(|there| there == name);
    let found = node.filter(is_there).or_else(|| device.filter(is_there));
    found.ok_or_else(|| {
        let (device, node) = (device.unwrap_or_default(), node.unwrap_or_default());
        let meant = if node.is_empty() { device } else { node };
        let hint = suggest::hint(meant, names.iter().map(String::as_str));
        Error::Refused(format!(
            "Cannot find device='{device}' nor node-name='{node}'{hint}"
        ))
    })
}

/// Refuses if an image stands on the node, whose header would not know of what becomes of it.
pub(super) fn check_not_backing(nodes: &Nodes, name: &str) -> Result<()> {
    for parent in nodes.graph.parents(name) {
        let edges = nodes.graph.edges(&parent)?;
        if edges.contains(&(ChildRole::Backing, name.to_owned())) {
            return Err(Error::Refused(format!(
                "Node '{name}' is busy: node is used as backing hd of '{parent}'"
            )));
        }
    }
    Ok(())
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
