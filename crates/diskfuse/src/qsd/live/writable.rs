//! An image at the bottom of a chain opened for writing while it is in use (`block-commit`), and with it what holds it.

use std::sync::Arc;

use diskfuse_block::drivers::{FileConfig, FileNode};
use diskfuse_block::graph::{Change, ChildRole};
use diskfuse_block::{Node, downcast};
use diskfuse_qcow2::node::{Children, Qcow2Config, Qcow2Node};

use super::find;
use crate::error::{Error, Result};
use crate::qsd::nodes::Nodes;

/// Opens the node for writing, if it is not. Returns whether something was changed.
pub fn make(nodes: &Nodes, name: &str) -> Result<bool> {
    set(nodes, name, false)
}

/// Opens it for reading only again; what goes wrong is written to the log.
pub fn undo(nodes: &Nodes, name: &str) {
    if let Err(error) = set(nodes, name, true) {
        tracing::warn!("node '{name}' stays open for writing: {error}");
    }
}

fn set(nodes: &Nodes, name: &str, read_only: bool) -> Result<bool> {
    let there = find(nodes, name)?;
    if there.read_only() == read_only {
        return Ok(false);
    }
    let graph = &nodes.graph;
    let file = graph.edges(name)?;
    let file = file.into_iter().find(|(role, _)| *role == ChildRole::File);
    let lowest = file.as_ref().map_or(name, |(_, file)| file);
    let _drained = nodes.drain(lowest)?;
    let mut changes = Vec::new();
    let file = match file {
        None => None,
        Some((_, name)) => {
            let bare = graph.bare(&name)?;
            Some(match bare.read_only() == read_only {
                true => graph.get(&name)?,
                false => {
                    let with = reopen_file(&name, &*bare, read_only)?;
                    changes.push(Change::Swap {
                        node: name,
                        with: Arc::clone(&with),
                    });
                    with
                }
            })
        }
    };
    let with = match (downcast::<Qcow2Node>(&*there), file) {
        (Some(image), Some(file)) => {
            let config = Qcow2Config {
                read_only,
                ..image.config().clone()
            };
            let children = Children {
                file,
                ..image.children()
            };
            let nothing = async |_: &dyn Node| Ok(());
            let (done, opened) = nodes.run(image.while_closed(&config, children, nothing))??;
            done?;
            opened?
        }
        _ => reopen_file(name, &*there, read_only)?,
    };
    if with.read_only() != read_only {
        return Err(Error::Refused(format!(
            "Block node is read-only: '{name}' cannot be written, as something that it stands on cannot"
        )));
    }
    changes.push(Change::Swap {
        node: name.to_owned(),
        with,
    });
    graph.change(&changes)?;
    Ok(true)
}

fn reopen_file(name: &str, node: &dyn Node, read_only: bool) -> Result<Arc<dyn Node>> {
    let Some(file) = downcast::<FileNode>(node) else {
        let driver = node.driver();
        return Err(Error::Refused(format!(
            "Block node is read-only: '{name}' of driver '{driver}' (open it with read-only=off)"
        )));
    };
    let config = FileConfig {
        read_only,
        auto_read_only: false,
        ..file.config().clone()
    };
    Ok(file.reopen(&config)?)
}
