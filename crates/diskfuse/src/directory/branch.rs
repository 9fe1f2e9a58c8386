//! One disk as files: `disk`, its partitions, and links to them by what is written on them. Each partition is a `raw` node
//! over the disk's, which only shifts offsets.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;

use diskfuse_block::drivers::{RawConfig, open_raw};
use diskfuse_block::{Graph, Result};
use diskfuse_fuse::{Entry, Watch, When};
use diskfuse_partition::{Contents, FileSystem, Partition, file_name};

/// Bytes at the beginning of a disk where tables of the usual size are.
const HEAD: u64 = 32 << 10;

/// Bytes at the beginning of a partition where its file system says what it is.
const FRONT: u64 = 128 << 10;

/// See the module.
#[derive(Clone)]
pub struct Branch {
    /// The node of the whole disk.
    disk: String,
    writable: bool,
    contents: Contents,
    /// The node of each partition.
    nodes: BTreeMap<u32, Part>,
    /// Nodes that are not needed any more, but were in use when that was found.
    left: Vec<String>,
}

/// A partition's node, and what part of the disk it is.
#[derive(Clone)]
struct Part {
    offset: u64,
    size: u64,
    node: String,
}

impl Branch {
    /// Shows node `disk`, of which nothing is known yet.
    pub fn new(disk: &str, writable: bool) -> Self {
        Self {
            disk: disk.to_owned(),
            writable,
            contents: Contents::default(),
            nodes: BTreeMap::new(),
            left: Vec::new(),
        }
    }

    /// Looks at the disk, and makes the nodes of partitions that are new; the answer is what is there. Those of partitions
    /// that are gone stay until [`Branch::tidy`]. Runs on a ring.
    pub async fn look(&mut self, graph: &Graph) -> Result<Contents> {
        let disk = graph.get(&self.disk)?;
        self.contents = diskfuse_partition::scan(&*disk).await?;
        let mut before = std::mem::take(&mut self.nodes);
        let partitions = self.contents.table.iter().flat_map(|t| &t.partitions);
        for partition in partitions {
            let &Partition {
                number,
                offset,
                size,
                ..
            } = partition;
            let same = |part: &Part| (part.offset, part.size) == (offset, size);
            let part = match before.remove(&number) {
                Some(part) if same(&part) => part,
                other => {
                    self.left.extend(other.map(|part| part.node));
                    let config = RawConfig {
                        offset,
                        size: Some(size),
                        read_only: !self.writable,
                    };
                    let node = open_raw(graph.get(&self.disk)?, &config)?;
                    let node = graph.insert(None, node, &[&self.disk])?;
                    Part { offset, size, node }
                }
            };
            self.nodes.insert(number, part);
        }
        self.left.extend(before.into_values().map(|part| part.node));
        Ok(self.contents.clone())
    }

    /// Removes nodes that are not needed any more. To be called when the export does not show them any more.
    pub fn tidy(&mut self, graph: &Graph) {
        // Those that somebody still has open are in use, and tried again the next time.
        self.left.retain(|node| graph.remove(node).is_err());
    }

    /// Its files and links.
    pub fn entries(&self) -> Vec<(OsString, Entry)> {
        let disk = Entry::Node {
            node: self.disk.clone(),
            writable: self.writable,
            watch: self.writable.then(|| self.watch_of_disk()),
        };
        let mut entries = vec![("disk".into(), disk)];
        for (number, part) in &self.nodes {
            let front = || Watch::new(When::Closed, std::iter::once(0..FRONT).collect());
            let entry = Entry::Node {
                node: part.node.clone(),
                writable: self.writable,
                watch: self.writable.then(front),
            };
            entries.push((format!("p{number}").into(), entry));
        }
        entries.extend(self.links());
        entries
    }

    fn watch_of_disk(&self) -> Watch {
        let table = self.contents.table.as_ref();
        let mut ranges = table.map_or_else(Vec::new, |table| table.areas.clone());
        ranges.push(0..HEAD);
        // Behind the last partition there is what a GPT keeps twice.
        let partitions = table.iter().flat_map(|table| &table.partitions);
        let end = partitions.map(|p| p.offset.saturating_add(p.size)).max();
        ranges.extend(end.map(|end| end..u64::MAX));
        Watch::new(When::Synced, ranges)
    }

    /// The directories of links.
    fn links(&self) -> Vec<(OsString, Entry)> {
        let mut labels = Links::default();
        let mut uuids = Links::default();
        let mut names = Links::default();
        let mut of_filesystem = |found: &Option<FileSystem>, target: &str| {
            let Some(found) = found else { return };
            labels.add(found.label.as_deref(), target);
            uuids.add(found.uuid.as_deref().map(str::as_bytes), target);
        };
        of_filesystem(&self.contents.filesystem, "disk");
        let partitions = self.contents.table.iter().flat_map(|t| &t.partitions);
        for partition in partitions.clone() {
            of_filesystem(&partition.filesystem, &format!("p{}", partition.number));
        }
        for partition in partitions {
            let target = format!("p{}", partition.number);
            uuids.add(partition.uuid.as_deref().map(str::as_bytes), &target);
            names.add(partition.name.as_deref().map(str::as_bytes), &target);
        }
        [("by-label", labels), ("by-uuid", uuids), ("by-name", names)]
            .map(|(name, links)| (name.into(), Entry::Directory(links.entries)))
            .into()
    }
}

/// Links of one kind; the first one of a name counts.
#[derive(Default)]
struct Links {
    taken: BTreeSet<String>,
    entries: Vec<(OsString, Entry)>,
}

impl Links {
    fn add(&mut self, label: Option<&[u8]>, target: &str) {
        let Some(name) = label.and_then(file_name) else {
            return;
        };
        if self.taken.insert(name.clone()) {
            let link = Entry::Link(format!("../{target}").into());
            self.entries.push((name.into(), link));
        }
    }
}
