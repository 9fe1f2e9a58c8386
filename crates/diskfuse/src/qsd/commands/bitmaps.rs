//! Dirty bitmaps of nodes, by their names, and the commands about them. Those that live in memory only are kept here, and recorded
//! by wraps; those that an image stores are the image's own, and looked up there, as it may be opened anew at any time.

use std::sync::Arc;

use diskfuse_block::graph::Change;
use diskfuse_block::{DirtyBitmap, Node, Recorder, Wrap, downcast};
use diskfuse_monitor::commands::{
    BitmapRef, BlockDirtyBitmap, BlockDirtyBitmapAdd, BlockDirtyBitmapMerge, BlockDirtyInfo,
};
use diskfuse_qcow2::bitmaps::PersistentBitmap;
use diskfuse_qcow2::node::Qcow2Node;

use crate::error::{Error, Result};
use crate::qsd::live;
use crate::qsd::nodes::Nodes;

/// The longest name (QEMU: 1023 bytes).
const LONGEST_NAME: usize = 1023;

/// A bitmap that lives in memory only.
struct Entry {
    node: String,
    name: String,
    bitmap: Arc<DirtyBitmap>,
    /// What marks in it, between the node and its users.
    recorder: Arc<dyn Wrap>,
}

/// A bitmap of a node, whoever keeps it.
struct Found {
    node: String,
    name: String,
    bitmap: Arc<DirtyBitmap>,
    /// Its image stores it.
    persistent: bool,
}

/// The bitmaps of the process.
#[derive(Default)]
pub struct Bitmaps {
    entries: Vec<Entry>,
    /// Nodes and names of those that a job is about to use in the same transaction: until it begins they can be changed.
    lent: Vec<(String, String)>,
}

/// A bitmap taken away, to be put back if the transaction fails.
pub struct Removed(Gone);

enum Gone {
    Entry(Entry),
    OfImage {
        node: String,
        bitmap: PersistentBitmap,
    },
}

impl Removed {
    /// The node that it was taken from.
    pub fn node(&self) -> &str {
        match &self.0 {
            Gone::Entry(entry) => &entry.node,
            Gone::OfImage { node, .. } => node,
        }
    }
}

impl Bitmaps {
    fn find(&self, nodes: &Nodes, node: &str, name: &str) -> Result<Found> {
        let mut of_node = self.all_of(nodes, node).into_iter();
        let found = of_node.find(|found| found.name == name);
        found.ok_or_else(|| not_found(name))
    }

    /// Those of a node, first those that its image stores.
    fn all_of(&self, nodes: &Nodes, node: &str) -> Vec<Found> {
        let stored = of_image(nodes, node, Qcow2Node::bitmaps).unwrap_or_default();
        let stored = stored.into_iter().map(|one| Found {
            node: node.to_owned(),
            name: one.name,
            bitmap: one.bitmap,
            persistent: true,
        });
        let here = self.entries.iter().filter(|entry| entry.node == node);
        let here = here.map(|entry| Found {
            node: entry.node.clone(),
            name: entry.name.clone(),
            bitmap: Arc::clone(&entry.bitmap),
            persistent: false,
        });
        stored.chain(here).collect()
    }

    /// These bitmaps, by node and name, can be changed although a job that has not begun holds them; from now on no others.
    pub fn lend(&mut self, lent: Vec<(String, String)>) {
        self.lent = lent;
    }

    /// One that may be read by a command; it knows its disk's size.
    fn readable(&self, nodes: &Nodes, which: &BlockDirtyBitmap) -> Result<Found> {
        let found = self.unused(nodes, which)?;
        check_consistent(&found)?;
        Ok(found)
    }

    /// One that may be changed: what its image has of it is not taken for true any more.
    fn changeable(&self, nodes: &Nodes, which: &BlockDirtyBitmap) -> Result<Found> {
        let found = self.readable(nodes, which)?;
        prepare(nodes, &found)?;
        Ok(found)
    }

    /// One that there is, which knows its disk's size.
    fn look_up(&self, nodes: &Nodes, which: &BlockDirtyBitmap) -> Result<Found> {
        let node = &which.node;
        live::find(nodes, node).map_err(|_| Error::Refused(format!("Node '{node}' not found")))?;
        let found = self.find(nodes, node, &which.name)?;
        if !found.persistent {
            follow(nodes, &found.node, &found.name, &found.bitmap);
        }
        Ok(found)
    }

    /// One that no job uses; whether it is of any use is another matter.
    fn unused(&self, nodes: &Nodes, which: &BlockDirtyBitmap) -> Result<Found> {
        let found = self.look_up(nodes, which)?;
        let is_it = |(node, name): &(String, String)| *node == found.node && *name == found.name;
        if !self.lent.iter().any(is_it) {
            check_unused(&found)?;
        }
        Ok(found)
    }

    /// The bitmap, for a job, which changes it or not.
    pub fn usable(
        &self,
        nodes: &Nodes,
        node: &str,
        name: &str,
        changes: bool,
    ) -> Result<Arc<DirtyBitmap>> {
        let found = self
            .find(nodes, node, name)
            .map_err(|_| Error::Refused(format!("Bitmap '{name}' could not be found")))?;
        check_unused(&found)?;
        check_consistent(&found)?;
        if changes {
            prepare(nodes, &found)?;
        }
        Ok(found.bitmap)
    }

    /// `block-dirty-bitmap-add`.
    pub fn add(&mut self, nodes: &Nodes, what: &BlockDirtyBitmapAdd) -> Result<()> {
        let (node, name) = (&what.node, &what.name);
        let persistent = what.persistent == Some(true);
        if name.is_empty() {
            return Err(Error::refused("Bitmap name cannot be empty"));
        }
        live::find(nodes, node).map_err(|_| {
            Error::Refused(format!(
                "Cannot find device='{node}' nor node-name='{node}'"
            ))
        })?;
        let node = nodes.graph.bare(node)?;
        let granularity = granularity(&*node, what.granularity)?;
        if name.len() > LONGEST_NAME {
            let why = match persistent {
                true => format!(
                    "Can't make bitmap '{name}' persistent in '{}': Name length exceeds maximum ({LONGEST_NAME} characters)",
                    what.node
                ),
                false => format!("Bitmap name too long: {name}"),
            };
            return Err(Error::Refused(why));
        }
        if self.find(nodes, &what.node, name).is_ok() {
            return Err(Error::Refused(format!("Bitmap already exists: {name}")));
        }
        if persistent {
            check_can_store(nodes, what, granularity)?;
        }
        let bitmap = Arc::new(DirtyBitmap::new(node.size(), granularity)?);
        bitmap.set_recording(what.disabled != Some(true));
        if persistent {
            let bitmap = PersistentBitmap::new(name.clone(), bitmap);
            return put_into_image(nodes, &what.node, bitmap);
        }
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

    /// `block-dirty-bitmap-remove`, which is what can be done with an inconsistent one. What an image has of it goes when that is
    /// closed, or by [`forget_removed`].
    pub fn remove(&mut self, nodes: &Nodes, which: &BlockDirtyBitmap) -> Result<Removed> {
        let found = self.unused(nodes, which)?;
        if found.persistent {
            check_can_change(nodes, &found)?;
            return take_from_image(nodes, &found).map(Removed);
        }
        let is_it = |entry: &Entry| entry.node == which.node && entry.name == which.name;
        let Some(place) = self.entries.iter().position(is_it) else {
            return Err(not_found(&which.name));
        };
        let _drained = nodes.drain(&which.node)?;
        let unwrap = Change::Unwrap {
            node: which.node.clone(),
            wrap: Arc::clone(&self.entries[place].recorder),
        };
        nodes.graph.change(&[unwrap])?;
        Ok(Removed(Gone::Entry(self.entries.remove(place))))
    }

    /// The same, for good: an image that stores it has nothing of it any more. If that cannot be, it stays.
    pub fn remove_for_good(&mut self, nodes: &Nodes, which: &BlockDirtyBitmap) -> Result<()> {
        let removed = self.remove(nodes, which)?;
        if let Err(error) = forget_removed(nodes, &which.node) {
            self.put_back(nodes, removed)?;
            return Err(error);
        }
        Ok(())
    }

    /// Undoes a removal.
    pub fn put_back(&mut self, nodes: &Nodes, removed: Removed) -> Result<()> {
        match removed.0 {
            Gone::Entry(entry) => self.put(nodes, entry),
            Gone::OfImage { node, bitmap } => put_into_image(nodes, &node, bitmap),
        }
    }

    /// `block-dirty-bitmap-clear`. Returns what was in it.
    pub fn clear(&self, nodes: &Nodes, which: &BlockDirtyBitmap) -> Result<DirtyBitmap> {
        let found = self.changeable(nodes, which)?;
        let _drained = nodes.drain(&which.node)?;
        Ok(found.bitmap.take()?)
    }

    /// Marks what `other` has; undoes a clear.
    pub fn mark(&self, nodes: &Nodes, which: &BlockDirtyBitmap, other: &DirtyBitmap) -> Result<()> {
        let found = self.find(nodes, &which.node, &which.name)?;
        Ok(found.bitmap.merge(other)?)
    }

    /// `block-dirty-bitmap-enable` and `-disable`. Returns whether it recorded before.
    pub fn record(&self, nodes: &Nodes, which: &BlockDirtyBitmap, record: bool) -> Result<bool> {
        let found = self.readable(nodes, which)?;
        // As with QEMU one of an image that is only read can be, as long as that is open.
        if check_can_change(nodes, &found).is_ok() {
            prepare(nodes, &found)?;
        }
        let before = found.bitmap.info().recording;
        let _drained = nodes.drain(&which.node)?;
        found.bitmap.set_recording(record);
        Ok(before)
    }

    /// `block-dirty-bitmap-merge`: all or none. Returns what was in the target before.
    pub fn merge(&self, nodes: &Nodes, what: &BlockDirtyBitmapMerge) -> Result<DirtyBitmap> {
        let target = BlockDirtyBitmap {
            node: what.node.clone(),
            name: what.target.clone(),
        };
        let found = self.look_up(nodes, &target)?;
        let scratch = DirtyBitmap::new(found.bitmap.size(), found.bitmap.granularity())?;
        for source in &what.bitmaps {
            let source = match source {
                BitmapRef::Name(name) => BlockDirtyBitmap {
                    node: what.node.clone(),
                    name: name.clone(),
                },
                BitmapRef::Elsewhere(bitmap) => bitmap.clone(),
            };
            // Of one that a job uses, the job has the marks.
            scratch.merge(&self.readable(nodes, &source)?.bitmap)?;
        }
        // Last, as with QEMU, whose clients read the first error.
        let found = self.changeable(nodes, &target)?;
        let before = DirtyBitmap::new(found.bitmap.size(), found.bitmap.granularity())?;
        before.merge(&found.bitmap)?;
        found.bitmap.merge(&scratch)?;
        Ok(before)
    }

    /// Undoes a merge: the bitmap holds what it held, and what was written since.
    pub fn unmerge(
        &self,
        nodes: &Nodes,
        target: &BlockDirtyBitmap,
        before: &DirtyBitmap,
    ) -> Result<()> {
        let found = self.find(nodes, &target.node, &target.name)?;
        let _drained = nodes.drain(&target.node)?;
        drop(found.bitmap.take()?);
        Ok(found.bitmap.merge(before)?)
    }

    /// What is said of a node's bitmaps; `None` if it has none.
    pub fn of(&self, nodes: &Nodes, node: &str) -> Option<Vec<BlockDirtyInfo>> {
        let all: Vec<_> = self.all_of(nodes, node).iter().map(info).collect();
        (!all.is_empty()).then_some(all)
    }

    /// A node has been taken away, and its bitmaps with it.
    pub fn forget(&mut self, nodes: &Nodes) {
        let there = nodes.graph.names();
        self.entries.retain(|entry| there.contains(&entry.node));
    }

    /// A node has another size.
    pub fn resized(&self, nodes: &Nodes) {
        for entry in &self.entries {
            follow(nodes, &entry.node, &entry.name, &entry.bitmap);
        }
    }
}

/// The disk may have another size: not all who change it do so through the node that has the bitmap.
fn follow(nodes: &Nodes, node: &str, name: &str, bitmap: &DirtyBitmap) {
    if let Ok(node) = nodes.graph.bare(node)
        && let Err(error) = bitmap.follow(|| node.size())
    {
        tracing::warn!(name, %error, "a bitmap could not follow its disk's size");
        bitmap.set_inconsistent();
    }
}

/// Asks the image of a node, if it is one that may store bitmaps.
fn of_image<T>(nodes: &Nodes, node: &str, ask: impl FnOnce(&Qcow2Node) -> T) -> Option<T> {
    let bare = nodes.graph.bare(node).ok()?;
    downcast::<Qcow2Node>(&*bare).map(ask)
}

/// Has the node's image have one bitmap more.
fn put_into_image(nodes: &Nodes, node: &str, bitmap: PersistentBitmap) -> Result<()> {
    let _drained = nodes.drain(node)?;
    let name = bitmap.name.clone();
    let renewed = of_image(nodes, node, |image| {
        // Until everybody stood still somebody may have changed the size.
        bitmap.bitmap.follow(|| image.size())?;
        image.add_bitmap(bitmap);
        Ok::<_, Error>(image.renewed())
    });
    let renewed = renewed.ok_or_else(|| not_found(&name))??;
    swap(nodes, node, renewed).inspect_err(|_| {
        of_image(nodes, node, |image| image.remove_bitmap(&name));
    })
}

fn take_from_image(nodes: &Nodes, found: &Found) -> Result<Gone> {
    let (node, name) = (&found.node, &found.name);
    let _drained = nodes.drain(node)?;
    let taken = of_image(nodes, node, |image| {
        let bitmap = image.remove_bitmap(name)?;
        Some((bitmap, image.renewed()))
    });
    let (bitmap, renewed) = taken.flatten().ok_or_else(|| not_found(name))?;
    if let Err(error) = swap(nodes, node, renewed) {
        of_image(nodes, node, |image| image.add_bitmap(bitmap));
        return Err(error);
    }
    let node = node.clone();
    Ok(Gone::OfImage { node, bitmap })
}

fn swap(nodes: &Nodes, node: &str, with: Arc<Qcow2Node>) -> Result<()> {
    let node = node.to_owned();
    nodes.graph.change(&[Change::Swap { node, with }])?;
    Ok(())
}

/// What was removed of a node's bitmaps goes from its image.
pub fn forget_removed(nodes: &Nodes, node: &str) -> Result<()> {
    match of_image(nodes, node, |image| {
        nodes.run(image.forget_removed_bitmaps())
    }) {
        None => Ok(()),
        Some(forgotten) => Ok(forgotten??),
    }
}

/// Before a bitmap is changed: an image that stores it may be written, and says that what it has of it is out of date.
fn prepare(nodes: &Nodes, found: &Found) -> Result<()> {
    if !found.persistent {
        return Ok(());
    }
    check_can_change(nodes, found)?;
    match of_image(nodes, &found.node, |image| {
        nodes.run(image.prepare_bitmaps())
    }) {
        None => Ok(()),
        Some(prepared) => Ok(prepared??),
    }
}

fn check_can_change(nodes: &Nodes, found: &Found) -> Result<()> {
    let name = &found.name;
    if found.persistent && nodes.graph.bare(&found.node)?.read_only() {
        return Err(Error::Refused(format!(
            "Bitmap '{name}' is readonly and cannot be modified"
        )));
    }
    Ok(())
}

fn check_can_store(nodes: &Nodes, what: &BlockDirtyBitmapAdd, granularity: u64) -> Result<()> {
    let (node, name) = (&what.node, &what.name);
    match of_image(nodes, node, |image| {
        image.check_new_bitmap(name, granularity)
    }) {
        None => Err(Error::Refused(format!(
            "Can't store persistent bitmaps to {node}: Operation not supported"
        ))),
        Some(checked) => checked.map_err(|error| {
            Error::Refused(format!(
                "Can't make bitmap '{name}' persistent in '{node}': {error}"
            ))
        }),
    }
}

/// Bytes of one bit, as they were asked for.
fn granularity(node: &dyn Node, wanted: Option<u32>) -> Result<u64> {
    match wanted {
        None => Ok(DirtyBitmap::default_granularity(node)),
        Some(bytes) if bytes.is_power_of_two() && bytes >= 512 => Ok(bytes.into()),
        Some(_) => Err(Error::refused(
            "Granularity must be power of 2 and at least 512",
        )),
    }
}

fn info(found: &Found) -> BlockDirtyInfo {
    let info = found.bitmap.info();
    let signed = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
    BlockDirtyInfo {
        name: Some(found.name.clone()),
        count: signed(info.count),
        granularity: signed(info.granularity),
        recording: info.recording,
        busy: info.busy,
        persistent: found.persistent,
        inconsistent: info.inconsistent.then_some(true),
    }
}

fn not_found(name: &str) -> Error {
    Error::Refused(format!("Dirty bitmap '{name}' not found"))
}

fn check_unused(entry: &Found) -> Result<()> {
    if !entry.bitmap.is_busy() {
        return Ok(());
    }
    let name = &entry.name;
    Err(Error::Refused(format!(
        "Bitmap '{name}' is currently in use by another operation and cannot be used"
    )))
}

fn check_consistent(entry: &Found) -> Result<()> {
    if !entry.bitmap.info().inconsistent {
        return Ok(());
    }
    let name = &entry.name;
    Err(Error::Refused(format!(
        "Bitmap '{name}' is inconsistent and cannot be used (remove it, and make a new one)"
    )))
}

#[cfg(test)]
mod tests;
