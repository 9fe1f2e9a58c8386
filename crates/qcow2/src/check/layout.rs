//! New refcount blocks, and a new refcount table if the old one is too small or unusable, at the end of the file. What
//! is new is on stable storage before anything refers to it.

use std::collections::BTreeSet;

use diskfuse_block::{Error, Kind, Result};
use diskfuse_ring::Buf;

use crate::format::refcount;

use super::image::Image;

/// Bytes of the largest refcount table.
const MOST_TABLE: u64 = 8 << 20;

/// What to lay out.
pub(crate) struct Plan {
    /// The first cluster of a free stretch that ends nowhere: neither used nor covered by a block that is kept.
    pub(crate) first: u64,
    /// Clusters at its beginning that are for the caller.
    pub(crate) payload: u64,
    /// The table entries that are kept, 0 for none.
    pub(crate) kept: Vec<u64>,
    /// Blocks to make in any case, by number.
    pub(crate) wanted: BTreeSet<u64>,
    /// Never write the table in place.
    pub(crate) move_table: bool,
}

/// Where it all went.
pub(crate) struct Laid {
    /// The table entries now.
    pub(crate) table: Vec<u64>,
    /// The table was moved away from here: offset and bytes.
    pub(crate) old_table: Option<(u64, u64)>,
}

impl Plan {
    /// Writes the blocks, with `refcount(cluster)` for clusters before [`Plan::first`] and 1 for the new ones; then the
    /// table; flushed in between.
    pub(crate) async fn carry_out(
        mut self,
        image: &mut Image<'_>,
        refcount: impl Fn(u64) -> u64,
    ) -> Result<Laid> {
        let geometry = image.geometry;
        let size = geometry.cluster_size();
        let table_clusters = self.settle(image)?;
        let blocks_at = self.first + self.payload;
        let table_at = blocks_at + self.wanted.len() as u64;
        let end = table_at + table_clusters;
        let per_block = geometry.refcounts_per_block();
        let order = geometry.refcount_order();
        for (place, number) in (blocks_at..).zip(&self.wanted) {
            let mut buf = new_buf(size)?;
            let start = number * per_block;
            for i in 0..per_block {
                let cluster = start + i;
                let value = match cluster {
                    _ if cluster >= end => break,
                    _ if cluster >= self.first => 1,
                    _ => refcount(cluster).min(geometry.max_refcount()),
                };
                if value != 0 {
                    refcount::set(buf.as_mut_slice(), order, i as usize, value);
                }
            }
            image.write_buf(place * size, buf).await?;
        }
        image.flush().await?;
        let last = self.wanted.last().map_or(0, |last| *last as usize + 1);
        if self.kept.len() < last {
            self.kept.resize(last, 0);
        }
        for (place, number) in (blocks_at..).zip(&self.wanted) {
            self.kept[*number as usize] = place * size;
        }
        let old_table = self.write_table(image, table_at, table_clusters).await?;
        Ok(Laid {
            table: self.kept,
            old_table,
        })
    }

    /// Finds out which blocks and how many table clusters it takes: they need refcounts themselves.
    fn settle(&mut self, image: &Image<'_>) -> Result<u64> {
        let geometry = image.geometry;
        let (size, per_block) = (geometry.cluster_size(), geometry.refcounts_per_block());
        let capacity = u64::from(image.header.refcount_table_clusters) * size / 8;
        let mut table_clusters = 0;
        loop {
            let end = self.first + self.payload + self.wanted.len() as u64 + table_clusters;
            let before = self.wanted.len();
            for number in self.first / per_block..=end.saturating_sub(1) / per_block {
                let kept = self.kept.get(number as usize).copied().unwrap_or(0);
                if kept == 0 {
                    self.wanted.insert(number);
                }
            }
            let last = self.wanted.last().map_or(0, |last| last + 1);
            let entries = last.max(self.kept.len() as u64);
            let moves = self.move_table || entries > capacity;
            let needed = if moves {
                (entries * 8).div_ceil(size)
            } else {
                0
            };
            if needed * size > MOST_TABLE || end > u64::MAX / size / 2 {
                return Err(Error::new(
                    Kind::Unsupported,
                    format!("'{}' is too large for its refcount table", image.name()),
                ));
            }
            if self.wanted.len() == before && needed <= table_clusters {
                return Ok(table_clusters);
            }
            table_clusters = table_clusters.max(needed);
        }
    }

    async fn write_table(
        &self,
        image: &mut Image<'_>,
        place: u64,
        clusters: u64,
    ) -> Result<Option<(u64, u64)>> {
        let size = image.geometry.cluster_size();
        let header = &image.header;
        let old = (
            header.refcount_table_offset,
            u64::from(header.refcount_table_clusters) * size,
        );
        if clusters == 0 {
            for number in &self.wanted {
                let entry = self.kept[*number as usize].to_be_bytes();
                image.write(old.0 + number * 8, &entry).await?;
            }
            image.flush().await?;
            return Ok(None);
        }
        let mut buf = new_buf(clusters * size)?;
        let (words, _) = buf.as_mut_slice().as_chunks_mut::<8>();
        for (word, entry) in words.iter_mut().zip(&self.kept) {
            *word = entry.to_be_bytes();
        }
        image.write_buf(place * size, buf).await?;
        image.flush().await?;
        image
            .set_refcount_table(place * size, clusters as u32)
            .await?;
        Ok(Some(old))
    }
}

fn new_buf(len: u64) -> Result<Buf> {
    Buf::new(len as usize).map_err(|e| Error::os(format!("{len} bytes of memory"), e))
}
