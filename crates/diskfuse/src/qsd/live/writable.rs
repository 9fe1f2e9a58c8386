//! Images below others: opened for writing while they are in use (`block-commit`), and for reading only when nobody writes them any
//! more (`blockdev-snapshot`), with the file that holds them. Whoever writes a node keeps it as it is.

use std::sync::Arc;

use diskfuse_block::drivers::{FileConfig, FileNode, RawConfig, RawNode, open_raw};
use diskfuse_block::graph::{Change, ChildRole};
use diskfuse_block::{Node, downcast};
use diskfuse_qcow2::node::{Anew, Children, Qcow2Config, Qcow2Node};

use super::find;
use crate::error::{Error, Result};
use crate::qsd::nodes::Nodes;

/// What was opened for writing, or is not to be written any more.
pub struct Opened {
    node: String,
    /// The file that it stands on, if that is opened along with it.
    file: Option<String>,
}

impl Opened {
    /// The node.
    pub fn node(&self) -> &str {
        &self.node
    }
}

/// Opens the node for writing, and the file that it stands on. `None`: it is open for writing already.
pub fn make(nodes: &Nodes, name: &str) -> Result<Option<Opened>> {
    let there = find(nodes, name)?;
    if !there.read_only() {
        return Ok(None);
    }
    let file = below(nodes, name, &*there)?;
    let file = match file {
        Some(file) if nodes.graph.bare(&file)?.read_only() => Some(file),
        _ => None,
    };
    let opened = Opened {
        node: name.to_owned(),
        file,
    };
    set(nodes, &opened, false)?;
    Ok(Some(opened))
}

/// Opens a node for reading only that nobody writes any more, so that other processes may read it: an image, or a file. As with
/// QEMU, a file that somebody has named is left to them. What goes wrong is written to the log.
pub fn seal(nodes: &Nodes, name: &str) {
    let file = file_of(nodes, name).ok().flatten();
    let file = file.filter(|file| nodes.graph.is_nameless(file));
    let node = name.to_owned();
    undo(nodes, &Opened { node, file });
}

/// Opens for reading only again what was opened for writing, unless somebody writes it; what goes wrong is written to the log.
pub fn undo(nodes: &Nodes, opened: &Opened) {
    if let Err(error) = set(nodes, opened, true) {
        tracing::warn!("node '{}' stays open for writing: {error}", opened.node);
    }
}

fn file_of(nodes: &Nodes, name: &str) -> Result<Option<String>> {
    child(nodes, name, ChildRole::File)
}

/// What a node stands on that is written when the node is: an image's file, or what a raw node is a part of.
fn below(nodes: &Nodes, name: &str, node: &dyn Node) -> Result<Option<String>> {
    match downcast::<RawNode>(node) {
        Some(_) => child(nodes, name, ChildRole::Filtered),
        None => file_of(nodes, name),
    }
}

fn child(nodes: &Nodes, name: &str, of: ChildRole) -> Result<Option<String>> {
    let edges = nodes.graph.edges(name)?;
    let mut fitting = edges.into_iter().filter(|(role, _)| *role == of);
    Ok(fitting.next().map(|(_, child)| child))
}

fn set(nodes: &Nodes, what: &Opened, read_only: bool) -> Result<()> {
    let (name, graph) = (&what.node, &nodes.graph);
    let there = find(nodes, name)?;
    if there.read_only() == read_only {
        return Ok(());
    }
    let is_image = downcast::<Qcow2Node>(&*there).is_some();
    let is_file = downcast::<FileNode>(&*there).is_some();
    if read_only && !is_image && !is_file && what.file.is_none() {
        // A filter holds nothing of its own.
        return Ok(());
    }
    if read_only && !there.read_only() {
        // Most of it before anybody has to wait.
        nodes.run(there.flush())??;
    }
    let file = below(nodes, name, &*there)?;
    let _drained = nodes.drain(file.as_ref().unwrap_or(name))?;
    // Nobody comes from here on.
    if read_only && graph.is_written(name)? {
        return Ok(());
    }
    let mut changes = Vec::new();
    let file = match file {
        None => None,
        Some(file) if what.file.as_ref() != Some(&file) => Some(graph.get(&file)?),
        Some(file) => {
            let with = reopen_file(&file, &*graph.bare(&file)?, read_only)?;
            changes.push(Change::Swap {
                node: file,
                with: Arc::clone(&with),
            });
            Some(with)
        }
    };
    // From here on, whatever goes wrong, the image goes on as it was.
    let mut anew = None;
    let with: Arc<dyn Node> = match (
        downcast::<Qcow2Node>(&*there),
        downcast::<RawNode>(&*there),
        file,
    ) {
        (Some(image), _, Some(file)) => anew
            .insert(open_again(nodes, image, file, read_only)?)
            .node(),
        (_, Some(raw), Some(file)) => {
            let config = RawConfig {
                read_only,
                ..*raw.config()
            };
            open_raw(file, &config)?
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
    if let Some(anew) = anew {
        anew.keep();
    }
    Ok(())
}

fn open_again(
    nodes: &Nodes,
    image: &Qcow2Node,
    file: Arc<dyn Node>,
    read_only: bool,
) -> Result<Anew> {
    let config = Qcow2Config {
        read_only,
        ..image.config().clone()
    };
    let children = Children {
        file,
        ..image.children()
    };
    Ok(nodes.run(image.open_anew(&config, children))??)
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
