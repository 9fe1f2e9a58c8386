//! Dirty bitmaps of nodes, by their names, and the commands about them.

use std::sync::Arc;

use diskfuse_block::graph::Change;
use diskfuse_block::{DirtyBitmap, Recorder, Wrap};
use diskfuse_monitor::commands::{
    BitmapRef, BlockDirtyBitmap, BlockDirtyBitmapAdd, BlockDirtyBitmapMerge, BlockDirtyInfo,
};

use crate::error::{Error, Result};
use crate::qsd::live;
use crate::qsd::nodes::Nodes;

/// The longest name (QEMU: 1023 bytes).
const LONGEST_NAME: usize = 1023;

struct Entry {
    node: String,
    name: String,
    bitmap: Arc<DirtyBitmap>,
    /// What marks in it, between the node and its users.
    recorder: Arc<dyn Wrap>,
}

/// All bitmaps of the process. They live in memory only.
#[derive(Default)]
pub struct Bitmaps {
    entries: Vec<Entry>,
    /// Nodes and names of those that a job is about to use in the same transaction: until it begins they can be changed.
    lent: Vec<(String, String)>,
}

/// A bitmap taken away, to be put back if the transaction fails.
pub struct Removed(Entry);

impl Bitmaps {
    fn entry(&self, node: &str, name: &str) -> Result<&Entry> {
        let mut entries = self.entries.iter();
        let found = entries.find(|entry| entry.node == node && entry.name == name);
        found.ok_or_else(|| Error::Refused(format!("Dirty bitmap '{name}' not found")))
    }

    fn find(&self, nodes: &Nodes, which: &BlockDirtyBitmap) -> Result<&Entry> {
        check_node(nodes, &which.node)?;
        self.entry(&which.node, &which.name)
    }

    /// These bitmaps, by node and name, can be changed although a job that has not begun holds them; from now on no others.
    pub fn lend(&mut self, lent: Vec<(String, String)>) {
        self.lent = lent;
    }

    /// One that may be changed, or read by a command; it knows its disk's size.
    fn free(&self, nodes: &Nodes, which: &BlockDirtyBitmap) -> Result<&Entry> {
        let entry = self.unused(nodes, which)?;
        check_consistent(entry)?;
        Ok(entry)
    }

    /// One that no job uses; whether it is of any use is another matter.
    fn unused(&self, nodes: &Nodes, which: &BlockDirtyBitmap) -> Result<&Entry> {
        let entry = self.find(nodes, which)?;
        follow(nodes, entry);
        let is_it = |(node, name): &(String, String)| *node == entry.node && *name == entry.name;
        if !self.lent.iter().any(is_it) {
            check_unused(entry)?;
        }
        Ok(entry)
    }

    /// The bitmap, for a job.
    pub fn usable(&self, node: &str, name: &str) -> Result<Arc<DirtyBitmap>> {
        let found = self
            .entry(node, name)
            .map_err(|_| Error::Refused(format!("Bitmap '{name}' could not be found")))?;
        check_unused(found)?;
        check_consistent(found)?;
        Ok(Arc::clone(&found.bitmap))
    }

    /// `block-dirty-bitmap-add`.
    pub fn add(&mut self, nodes: &Nodes, what: &BlockDirtyBitmapAdd) -> Result<()> {
        check_node(nodes, &what.node)?;
        let name = &what.name;
        if name.is_empty() {
            return Err(Error::refused("Bitmap name cannot be empty"));
        }
        if name.len() > LONGEST_NAME {
            return Err(Error::refused("Bitmap name too long"));
        }
        if what.persistent == Some(true) {
            return Err(Error::refused(
                "Parameter 'persistent' is not built into this version yet: bitmaps are kept in memory only",
            ));
        }
        if self.entry(&what.node, name).is_ok() {
            return Err(Error::Refused(format!("Bitmap already exists: {name}")));
        }
        let node = nodes.graph.bare(&what.node)?;
        let granularity = match what.granularity {
            None => DirtyBitmap::default_granularity(&*node),
            Some(bytes) if bytes.is_power_of_two() && bytes >= 512 => bytes,
            Some(bytes) if bytes.is_power_of_two() => {
                return Err(Error::Refused(format!(
                    "Granularity must be at least 512 (it is {bytes})"
                )));
            }
            Some(_) => return Err(Error::refused("Granularity must be power of 2")),
        };
        let bitmap = Arc::new(DirtyBitmap::new(node.size(), granularity)?);
        bitmap.set_recording(what.disabled != Some(true));
        let recorder: Arc<dyn Wrap> = Arc::new(Recorder(Arc::clone(&bitmap)));
        self.put(
            nodes,
            Entry {
                node: what.node.clone(),
                name: name.clone(),
                bitmap,
                recorder,
            },
        )
    }

    fn put(&mut self, nodes: &Nodes, entry: Entry) -> Result<()> {
        let _drained = nodes.drain(&entry.node)?;
        let node = nodes.graph.bare(&entry.node)?;
        // Until everybody stood still somebody may have changed the size.
        entry.bitmap.follow(|| node.size())?;
        let wrap = Change::Wrap {
            node: entry.node.clone(),
            wrap: Arc::clone(&entry.recorder),
        };
        nodes.graph.change(&[wrap])?;
        self.entries.push(entry);
        Ok(())
    }

    /// `block-dirty-bitmap-remove`, which is what can be done with an inconsistent one.
    pub fn remove(&mut self, nodes: &Nodes, which: &BlockDirtyBitmap) -> Result<Removed> {
        self.unused(nodes, which)?;
        let place = self
            .entries
            .iter()
            .position(|entry| entry.node == which.node && entry.name == which.name);
        let Some(place) = place else {
            return Err(Error::Refused(format!(
                "Dirty bitmap '{}' not found",
                which.name
            )));
        };
        let _drained = nodes.drain(&which.node)?;
        let unwrap = Change::Unwrap {
            node: which.node.clone(),
            wrap: Arc::clone(&self.entries[place].recorder),
        };
        nodes.graph.change(&[unwrap])?;
        Ok(Removed(self.entries.remove(place)))
    }

    /// Undoes a removal.
    pub fn put_back(&mut self, nodes: &Nodes, removed: Removed) -> Result<()> {
        self.put(nodes, removed.0)
    }

    /// `block-dirty-bitmap-clear`. Returns what was in it.
    pub fn clear(&self, nodes: &Nodes, which: &BlockDirtyBitmap) -> Result<DirtyBitmap> {
        let entry = self.free(nodes, which)?;
        let _drained = nodes.drain(&which.node)?;
        Ok(entry.bitmap.take()?)
    }

    /// Marks what `other` has; undoes a clear.
    pub fn mark(&self, which: &BlockDirtyBitmap, other: &DirtyBitmap) -> Result<()> {
        Ok(self.entry(&which.node, &which.name)?.bitmap.merge(other)?)
    }

    /// `block-dirty-bitmap-enable` and `-disable`. Returns whether it recorded before.
    pub fn record(&self, nodes: &Nodes, which: &BlockDirtyBitmap, record: bool) -> Result<bool> {
        let entry = self.free(nodes, which)?;
        let before = entry.bitmap.info().recording;
        let _drained = nodes.drain(&which.node)?;
        entry.bitmap.set_recording(record);
        Ok(before)
    }

    /// `block-dirty-bitmap-merge`: all or none. Returns what was in the target before.
    pub fn merge(&self, nodes: &Nodes, what: &BlockDirtyBitmapMerge) -> Result<DirtyBitmap> {
        let target = BlockDirtyBitmap {
            node: what.node.clone(),
            name: what.target.clone(),
        };
        let entry = self.free(nodes, &target)?;
        let scratch = DirtyBitmap::new(entry.bitmap.size(), entry.bitmap.granularity())?;
        for source in &what.bitmaps {
            let source = match source {
                BitmapRef::Name(name) => BlockDirtyBitmap {
                    node: what.node.clone(),
                    name: name.clone(),
                },
                BitmapRef::Elsewhere(bitmap) => bitmap.clone(),
            };
            // Of one that a job uses, the job has the marks.
            scratch.merge(&self.free(nodes, &source)?.bitmap)?;
        }
        let before = DirtyBitmap::new(entry.bitmap.size(), entry.bitmap.granularity())?;
        before.merge(&entry.bitmap)?;
        entry.bitmap.merge(&scratch)?;
        Ok(before)
    }

    /// Undoes a merge: the bitmap holds what it held, and what was written since.
    pub fn unmerge(
        &self,
        nodes: &Nodes,
        target: &BlockDirtyBitmap,
        before: &DirtyBitmap,
    ) -> Result<()> {
        let entry = self.entry(&target.node, &target.name)?;
        let _drained = nodes.drain(&target.node)?;
        drop(entry.bitmap.take()?);
        Ok(entry.bitmap.merge(before)?)
    }

    /// What is said of a node's bitmaps; `None` if it has none.
    pub fn of(&self, node: &str) -> Option<Vec<BlockDirtyInfo>> {
        let of_node = self.entries.iter().filter(|entry| entry.node == node);
        let all: Vec<_> = of_node.map(info).collect();
        (!all.is_empty()).then_some(all)
    }

    /// A node has been taken away, and its bitmaps with it.
    pub fn forget(&mut self, nodes: &Nodes) {
        let there = nodes.graph.names();
        self.entries.retain(|entry| there.contains(&entry.node));
    }

    /// A node has another size.
    pub fn resized(&self, nodes: &Nodes) {
        self.entries.iter().for_each(|entry| follow(nodes, entry));
    }
}

/// The disk may have another size: not all who change it do so through the node that has the bitmap.
fn follow(nodes: &Nodes, entry: &Entry) {
    if let Ok(node) = nodes.graph.bare(&entry.node)
        && let Err(error) = entry.bitmap.follow(|| node.size())
    {
        let name = &entry.name;
        tracing::warn!(name, %error, "a bitmap could not follow its disk's size");
        entry.bitmap.set_inconsistent();
    }
}

fn info(entry: &Entry) -> BlockDirtyInfo {
    let info = entry.bitmap.info();
    let signed = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
    BlockDirtyInfo {
        name: Some(entry.name.clone()),
        count: signed(info.count),
        granularity: signed(info.granularity),
        recording: info.recording,
        busy: info.busy,
        persistent: false,
        inconsistent: info.inconsistent.then_some(true),
    }
}

fn check_node(nodes: &Nodes, node: &str) -> Result<()> {
    live::find(nodes, node).map(drop).map_err(|_| {
        Error::Refused(format!(
            "Cannot find device='{node}' nor node-name='{node}'"
        ))
    })
}

fn check_unused(entry: &Entry) -> Result<()> {
    if !entry.bitmap.is_busy() {
        return Ok(());
    }
    let name = &entry.name;
    Err(Error::Refused(format!(
        "Bitmap '{name}' is currently in use by another operation and cannot be used"
    )))
}

fn check_consistent(entry: &Entry) -> Result<()> {
    if !entry.bitmap.info().inconsistent {
        return Ok(());
    }
    let name = &entry.name;
    Err(Error::Refused(format!(
        "Bitmap '{name}' is inconsistent and cannot be used (remove it, and make a new one)"
    )))
}

#[cfg(test)]
mod tests {
    use diskfuse_block::Graph;
    use diskfuse_monitor::BlockdevOptions;
    use diskfuse_ring::Choice;

    use super::*;
    use crate::qsd::monitor::Monitors;
    use crate::qsd::objects::Objects;

    #[test]
    fn an_inconsistent_bitmap_can_be_removed_and_nothing_else() {
        let objects = Objects::new(Choice::Auto);
        let nodes = Nodes::new(Graph::new(), objects, Monitors::new(drop));
        let disk = BlockdevOptions::parse("null-co,node-name=disk,size=1M").unwrap();
        nodes.add(&disk).unwrap();
        let mut bitmaps = Bitmaps::default();
        let add = BlockDirtyBitmapAdd {
            node: "disk".to_owned(),
            name: "b".to_owned(),
            granularity: None,
            persistent: None,
            disabled: None,
        };
        bitmaps.add(&nodes, &add).unwrap();
        let which = BlockDirtyBitmap {
            node: "disk".to_owned(),
            name: "b".to_owned(),
        };
        let entry = bitmaps.entry("disk", "b").unwrap();
        entry.bitmap.set_inconsistent();
        let words = "Bitmap 'b' is inconsistent and cannot be used";
        let refused = [
            bitmaps.clear(&nodes, &which).map(drop),
            bitmaps.record(&nodes, &which, false).map(drop),
            bitmaps.usable("disk", "b").map(drop),
        ];
        for outcome in refused {
            let error = outcome.unwrap_err().to_string();
            assert!(error.starts_with(words), "{error}");
        }
        let removed = bitmaps.remove(&nodes, &which).unwrap();
        assert!(bitmaps.of("disk").is_none());
        // A transaction that fails has it as it was.
        bitmaps.put_back(&nodes, removed).unwrap();
        let there = bitmaps.of("disk").unwrap();
        assert_eq!(there[0].inconsistent, Some(true));
        bitmaps.remove(&nodes, &which).unwrap();
        bitmaps.add(&nodes, &add).unwrap();
        bitmaps.clear(&nodes, &which).unwrap();
    }
}
