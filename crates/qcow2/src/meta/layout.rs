//! Which clusters of the file hold metadata, so that nothing else is written there. An image whose tables say otherwise
//! is corrupt; this finds it before the write that would make it worse.

use std::collections::HashMap;

use parking_lot::RwLock;

use crate::node::OverlapCheck;

/// Clusters with metadata and what they hold, of the kinds that are checked.
pub(super) struct Layout {
    checked: OverlapCheck,
    clusters: RwLock<HashMap<u64, OverlapCheck>>,
}

/// Two things in one cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Overlap {
    pub(super) cluster: u64,
    pub(super) holds: &'static str,
}

impl Overlap {
    /// What was there first is an L2 table of the disk.
    pub(super) fn is_active_l2(&self) -> bool {
        self.holds == name(OverlapCheck::ACTIVE_L2)
    }
}

impl Layout {
    pub(super) fn new(checked: OverlapCheck) -> Self {
        Self {
            checked,
            clusters: RwLock::default(),
        }
    }

    /// Notes metadata in `count` clusters from `first` on. The first cluster that holds something else already is told.
    pub(super) fn add(&self, kind: OverlapCheck, first: u64, count: u64) -> Option<Overlap> {
        if !self.checked.contains(kind) {
            return None;
        }
        let mut clusters = self.clusters.write();
        let mut overlap = None;
        for cluster in first..first.saturating_add(count) {
            if let Some(&there) = clusters.get(&cluster) {
                overlap.get_or_insert(Overlap {
                    cluster,
                    holds: name(there),
                });
            } else {
                clusters.insert(cluster, kind);
            }
        }
        overlap
    }

    /// The metadata in these clusters is gone.
    pub(super) fn remove(&self, first: u64, count: u64) {
        let mut clusters = self.clusters.write();
        for cluster in first..first.saturating_add(count) {
            clusters.remove(&cluster);
        }
    }

    /// The first of these clusters that holds metadata.
    pub(super) fn find(&self, clusters: impl Iterator<Item = u64>) -> Option<Overlap> {
        let known = self.clusters.read();
        for cluster in clusters {
            if let Some(&there) = known.get(&cluster) {
                return Some(Overlap {
                    cluster,
                    holds: name(there),
                });
            }
        }
        None
    }
}

fn name(kind: OverlapCheck) -> &'static str {
    match kind {
        OverlapCheck::MAIN_HEADER => "the image header",
        OverlapCheck::ACTIVE_L1 => "the active L1 table",
        OverlapCheck::ACTIVE_L2 => "an active L2 table",
        OverlapCheck::REFCOUNT_TABLE => "the refcount table",
        OverlapCheck::REFCOUNT_BLOCK => "a refcount block",
        OverlapCheck::SNAPSHOT_TABLE => "the snapshot table",
        OverlapCheck::INACTIVE_L1 => "the L1 table of a snapshot",
        OverlapCheck::BITMAP_DIRECTORY => "the bitmap directory",
        _ => "metadata",
    }
}
