//! How often each cluster of a file is referred to, two bytes per cluster, allocated where the file is used only. It
//! must never allocate for a cluster that the file does not have.

use std::collections::HashMap;

use diskfuse_block::{Error, Kind, Result};

/// Counters per allocation: 8 KiB. A power of two.
pub(crate) const CHUNK: usize = 4096;

/// The cluster belongs to a structure of the format. While references are counted.
pub(crate) const METADATA: u16 = 1 << 15;
/// The refcount on disk is 1. After the counts were compared; takes the place of [`METADATA`].
pub(crate) const STORED_ONE: u16 = 1 << 15;
/// An entry of the active tables refers to it and says that its refcount is exactly one.
pub(crate) const COPIED_SET: u16 = 1 << 14;
/// An entry of the active tables refers to it and does not say so.
pub(crate) const COPIED_CLEAR: u16 = 1 << 13;

/// The rest is the count; this one says that it is in `large`.
const LARGE: u16 = COPIED_CLEAR - 1;

/// More clusters than this are not counted: the counters would need gigabytes. QEMU draws the line here as well.
const MOST_CLUSTERS: u64 = 1 << 31;

/// Counts and flags of the clusters of one file.
#[derive(Default)]
pub(crate) struct Counts {
    chunks: Vec<Option<Box<[u16; CHUNK]>>>,
    large: HashMap<u64, u64>,
}

impl Counts {
    /// For a file of that many clusters; [`Kind::Unsupported`] if they are too many.
    pub(crate) fn new(clusters: u64) -> Result<Self> {
        if clusters > MOST_CLUSTERS {
            return Err(Error::new(
                Kind::Unsupported,
                format!(
                    "The file has {clusters} clusters, and no more than {MOST_CLUSTERS} can be checked: \
                     copy it to an image with larger clusters"
                ),
            ));
        }
        Ok(Self::default())
    }

    fn slot(&mut self, cluster: u64) -> &mut u16 {
        let (chunk, index) = place(cluster);
        if chunk >= self.chunks.len() {
            self.chunks.resize_with(chunk + 1, || None);
        }
        let chunk = self.chunks[chunk].get_or_insert_with(|| Box::new([0; CHUNK]));
        &mut chunk[index]
    }

    /// Counts `more` references to a cluster of the file, sets `flags`, and returns the flags that it had.
    #[inline]
    pub(crate) fn add(&mut self, cluster: u64, more: u64, flags: u16) -> u16 {
        let slot = self.slot(cluster);
        let before = *slot;
        let count = u64::from(before & LARGE) + more;
        if count < u64::from(LARGE) {
            *slot = (before & !LARGE) | flags | count as u16;
            return before & !LARGE;
        }
        *slot = before | flags | LARGE;
        self.add_large(cluster, before & LARGE, more);
        before & !LARGE
    }

    #[cold]
    fn add_large(&mut self, cluster: u64, before: u16, more: u64) {
        let large = self.large.entry(cluster).or_default();
        if before != LARGE {
            *large = u64::from(before);
        }
        *large = large.saturating_add(more);
    }

    /// Takes references back.
    pub(crate) fn remove(&mut self, cluster: u64, less: u64) {
        let slot = self.slot(cluster);
        let small = *slot & LARGE;
        if small == LARGE {
            let large = self.large.entry(cluster).or_default();
            *large = large.saturating_sub(less);
        } else {
            let left = u64::from(small).saturating_sub(less);
            *slot = (*slot & !LARGE) | left as u16;
        }
    }

    /// How often it is referred to.
    pub(crate) fn get(&self, cluster: u64) -> u64 {
        let (chunk, index) = place(cluster);
        match self.chunks.get(chunk) {
            Some(Some(chunk)) => self.decode(cluster, chunk[index]),
            _ => 0,
        }
    }

    /// The flags of a cluster.
    pub(crate) fn flags(&self, cluster: u64) -> u16 {
        let (chunk, index) = place(cluster);
        match self.chunks.get(chunk) {
            Some(Some(chunk)) => chunk[index] & !LARGE,
            _ => 0,
        }
    }

    /// The count in a counter of a chunk.
    pub(crate) fn decode(&self, cluster: u64, counter: u16) -> u64 {
        match counter & LARGE {
            LARGE => self.large.get(&cluster).copied().unwrap_or(0),
            small => u64::from(small),
        }
    }

    /// The counter as it is, if it needs no [`Counts::decode`].
    #[inline]
    pub(crate) fn small(counter: u16) -> Option<u16> {
        let count = counter & LARGE;
        (count != LARGE).then_some(count)
    }

    /// Takes a chunk (by cluster number / [`CHUNK`]) out to work on it, while the counts can still be read; `None` if
    /// nothing refers to any cluster of it.
    pub(crate) fn take(&mut self, chunk: usize) -> Option<Box<[u16; CHUNK]>> {
        self.chunks.get_mut(chunk)?.take()
    }

    /// Puts back what [`Counts::take`] took.
    pub(crate) fn put(&mut self, chunk: usize, counters: Option<Box<[u16; CHUNK]>>) {
        if let Some(place) = self.chunks.get_mut(chunk) {
            *place = counters;
        }
    }

    /// One more than the highest cluster that has a counter.
    pub(crate) fn end(&self) -> u64 {
        (self.chunks.len() * CHUNK) as u64
    }

    /// Whether any of the clusters `start..end` is referred to.
    pub(crate) fn any(&self, start: u64, end: u64) -> bool {
        let mut at = start;
        while at < end.min(self.end()) {
            let (chunk, index) = place(at);
            let next = (at - index as u64 + CHUNK as u64).min(end);
            if let Some(Some(counters)) = self.chunks.get(chunk) {
                let here = &counters[index..index + (next - at) as usize];
                if here.iter().any(|counter| counter & LARGE != 0) {
                    return true;
                }
            }
            at = next;
        }
        false
    }

    /// One more than the highest cluster that is referred to.
    pub(crate) fn used_end(&self) -> u64 {
        for (number, chunk) in self.chunks.iter().enumerate().rev() {
            let Some(counters) = chunk else { continue };
            if let Some(index) = counters.iter().rposition(|counter| counter & LARGE != 0) {
                return (number * CHUNK + index + 1) as u64;
            }
        }
        0
    }
}

fn place(cluster: u64) -> (usize, usize) {
    let chunk = usize::try_from(cluster / CHUNK as u64).unwrap_or(usize::MAX - 1);
    (chunk, (cluster % CHUNK as u64) as usize)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_count_is_exact_however_large() {
        let mut counts = Counts::new(1 << 20).unwrap();
        for more in [1, 8000, 180, 9, 1, 100_000] {
            counts.add(70_000, more, 0);
        }
        assert_eq!(counts.get(70_000), 108_191);
        counts.remove(70_000, 1);
        assert_eq!(counts.get(70_000), 108_190);
        assert_eq!(counts.get(69_999), 0);
        assert_eq!(counts.used_end(), 70_001);
        assert!(counts.any(0, 70_001) && !counts.any(0, 70_000) && !counts.any(70_001, 1 << 20));
    }

    #[test]
    fn flags_do_not_disturb_counts() {
        let mut counts = Counts::new(100).unwrap();
        assert_eq!(counts.add(3, 0, METADATA), 0);
        assert_eq!(counts.add(3, 8190, COPIED_SET), METADATA);
        assert_eq!(counts.add(3, 1, COPIED_CLEAR), METADATA | COPIED_SET);
        assert_eq!(counts.get(3), 8191);
        assert_eq!(counts.flags(3), METADATA | COPIED_SET | COPIED_CLEAR);
    }
}
