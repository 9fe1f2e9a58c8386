//! `block-set-write-threshold`: bytes of nodes that the first write beyond is told of. Decides nothing.

use std::collections::BTreeMap;
use std::sync::Arc;

use diskfuse_block::drivers::FileNode;
use diskfuse_block::graph::Change;
use diskfuse_block::{Error as BlockError, Exceeded, Kind, Threshold, WriteThreshold, downcast};
use diskfuse_monitor::commands::BlockSetWriteThreshold;
use diskfuse_monitor::qmp::event::BlockWriteThreshold;

use crate::error::{Error, Result};
use crate::qsd::nodes::Nodes;

/// The thresholds of nodes around which one was put, by their names: it stays there, as it costs one load for each write.
#[derive(Default)]
pub struct Thresholds {
    around: BTreeMap<String, Arc<WriteThreshold>>,
}

impl Thresholds {
    /// `block-set-write-threshold`.
    pub fn set(&mut self, nodes: &Nodes, what: &BlockSetWriteThreshold) -> Result<()> {
        let name = &what.node_name;
        if !nodes.graph.names().contains(name) {
            let message = format!("Device '{name}' not found");
            return Err(Error::Block(BlockError::new(Kind::NotFound, message)));
        }
        let threshold = match downcast::<FileNode>(&*nodes.graph.bare(name)?) {
            Some(file) => Arc::clone(file.write_threshold()?),
            None => self.around(nodes, name)?,
        };
        let (monitors, node) = (nodes.monitors.clone(), name.clone());
        threshold.set(what.write_threshold, move |exceeded: Exceeded| {
            monitors.emit(BlockWriteThreshold {
                node_name: node.clone(),
                amount_exceeded: exceeded.amount,
                write_threshold: exceeded.threshold,
            });
        });
        Ok(())
    }

    fn around(&mut self, nodes: &Nodes, name: &str) -> Result<Arc<WriteThreshold>> {
        if let Some(there) = self.around.get(name) {
            return Ok(Arc::clone(there));
        }
        let threshold = Arc::new(WriteThreshold::default());
        let _drained = nodes.drain(name)?;
        nodes.graph.change(&[Change::Wrap {
            node: name.to_owned(),
            wrap: Arc::new(Threshold(Arc::clone(&threshold))),
        }])?;
        self.around.insert(name.to_owned(), Arc::clone(&threshold));
        Ok(threshold)
    }

    /// The byte of a node; 0 if it has none.
    pub fn of(&self, nodes: &Nodes, name: &str) -> Result<u64> {
        let bare = nodes.graph.bare(name)?;
        let own = downcast::<FileNode>(&*bare).and_then(|file| file.write_threshold().ok());
        Ok(own
            .or_else(|| self.around.get(name))
            .map_or(0, |threshold| threshold.get()))
    }

    /// A node has been taken away, and its threshold with it.
    pub fn forget(&mut self, nodes: &Nodes) {
        let there = nodes.graph.names();
        self.around.retain(|name, _| there.contains(name));
    }
}
