//! One image of a chain for those who show where its bytes are: as [`layer_status`](Qcow2Node::layer_status), and the
//! places of clusters that read as zeroes as well.

use std::sync::Arc;

use diskfuse_block::{Node, Result};

use super::{LayerStatus, Layered, Qcow2Node};
use crate::format::Mapping;

/// Clusters that are looked at in one go.
const AT_ONCE: u64 = 4096;

impl Qcow2Node {
    /// The node that data are in: the image file, or the data file.
    pub fn data_node(&self) -> &Arc<dyn Node> {
        &self.data
    }

    /// As [`Qcow2Node::layer_status`], but what holds no data and has a place in the file all the same (zero clusters
    /// that were allocated beforehand) is told apart by that place.
    pub async fn map_status(&self, offset: u64, len: u64) -> Result<LayerStatus> {
        let status = self.layer_status(offset, len).await?;
        match status.layered {
            Layered::Zero => {}
            // There a cluster may have a place for those of its subclusters that are allocated.
            Layered::Unallocated if self.geometry.extended_l2() => {}
            _ => return Ok(status),
        }
        let size = self.geometry.cluster_size();
        let end = offset + status.len;
        let first = self.place(offset).await?;
        let mut known = (self.geometry.round_down(offset) + size).min(end);
        for n in 1..AT_ONCE {
            let expected = first.map(|place| place + n * size);
            if known >= end || self.place(known).await? != expected {
                break;
            }
            known = known.saturating_add(size).min(end);
        }
        Ok(LayerStatus {
            len: known - offset,
            host_offset: first.map(|place| place + self.geometry.offset_in_cluster(offset)),
            ..status
        })
    }

    /// Where the cluster is in the file that holds a byte of the disk, if it has a place of its own.
    async fn place(&self, guest: u64) -> Result<Option<u64>> {
        let entry = self.entry(guest).await?;
        Ok(match self.mapping(guest, entry)? {
            Mapping::Normal { host, .. } => Some(host),
            Mapping::Zero { host, .. } => host,
            Mapping::Unallocated | Mapping::Compressed(_) => None,
        })
    }
}
