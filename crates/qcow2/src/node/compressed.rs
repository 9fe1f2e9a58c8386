//! Compressed clusters: reading them, with the last few kept as they are, and writing whole clusters compressed. What is
//! kept must never be shown after its place in the file may hold something else.

use std::collections::VecDeque;
use std::sync::Arc;

use diskfuse_block::{Error, Kind, RangeQueue, Result, io};
use diskfuse_ring::{Buf, offload};
use parking_lot::Mutex;

use super::read::read_clipped;
use super::walk::{Place, Run};
use super::write::grow;
use super::{Qcow2Node, scratch};
use crate::format::{CompressedRange, Mapping, compress, decompress};
use crate::meta::Entry;

/// Decompressed clusters that are kept: this many, and this many bytes.
const KEPT: usize = 8;
const KEPT_BYTES: u64 = 2 << 20;
/// Clusters that are compressed at the same time.
const AT_ONCE: u64 = 16;

/// The clusters that were decompressed last. Each is known by the word of its table entry, which names its place and
/// its length in the file.
pub(super) struct Cache {
    limit: usize,
    clusters: Mutex<VecDeque<(u64, Arc<Vec<u8>>)>>,
    /// Who reads a cluster lets others that want the same one wait for it.
    reading: RangeQueue,
}

impl Cache {
    pub(super) fn new(cluster_size: u64) -> Self {
        Self {
            limit: (KEPT_BYTES / cluster_size).clamp(1, KEPT as u64) as usize,
            clusters: Mutex::default(),
            reading: RangeQueue::default(),
        }
    }

    fn get(&self, word: u64) -> Option<Arc<Vec<u8>>> {
        let mut clusters = self.clusters.lock();
        let found = clusters.iter().position(|(w, _)| *w == word)?;
        if found > 0
            && let Some(hit) = clusters.remove(found)
        {
            clusters.push_front(hit);
        }
        clusters.front().map(|(_, bytes)| Arc::clone(bytes))
    }

    /// Keeps a cluster if it is still what the tables name. Who unlinks a cluster does so before it is forgotten here,
    /// so one that is linked now is forgotten in time.
    fn keep(&self, word: u64, bytes: Arc<Vec<u8>>, is_linked: impl FnOnce() -> bool) {
        let mut clusters = self.clusters.lock();
        if is_linked() {
            clusters.truncate(self.limit - 1);
            clusters.push_front((word, bytes));
        }
    }

    /// To be called when compressed clusters were unlinked, before they are freed.
    pub(super) fn forget(&self) {
        self.clusters.lock().clear();
    }
}

impl Qcow2Node {
    /// Fills `out` from byte `skip` of the compressed cluster that holds `guest`. The caller holds the place.
    pub(super) async fn read_compressed(
        &self,
        guest: u64,
        word: u64,
        range: CompressedRange,
        out: &mut [u8],
    ) -> Result<()> {
        let size = self.geometry.cluster_size() as usize;
        let skip = self.geometry.offset_in_cluster(guest) as usize;
        let copy =
            |bytes: &[u8], out: &mut [u8]| out.copy_from_slice(&bytes[skip..skip + out.len()]);
        if let Some(bytes) = self.decompressed.get(word) {
            copy(&bytes, out);
            return Ok(());
        }
        if out.len() == size {
            return self.decompress_into(guest, range, out).await;
        }
        let _turn = self.decompressed.reading.turn(range.offset, 1).await;
        let bytes = match self.decompressed.get(word) {
            Some(bytes) => bytes,
            None => {
                let mut bytes = vec![0; size];
                self.decompress_into(guest, range, &mut bytes).await?;
                let bytes = Arc::new(bytes);
                self.decompressed.keep(word, Arc::clone(&bytes), || {
                    matches!(self.run(guest, 1), Ok(Some(Run { place: Place::Compressed { word: now, .. }, .. })) if now == word)
                });
                bytes
            }
        };
        copy(&bytes, out);
        Ok(())
    }

    async fn decompress_into(
        &self,
        guest: u64,
        range: CompressedRange,
        out: &mut [u8],
    ) -> Result<()> {
        let input = scratch::take(range.len as usize)?;
        let (result, input) = read_clipped(&*self.file, range.offset, input).await;
        let result = result.and_then(|()| {
            decompress(self.compression, input.as_slice(), out).map_err(|why| {
                let (name, at) = (self.name(), range.offset);
                let message = format!(
                    "'{name}': the compressed cluster at byte {at} of the file, byte {guest} of the disk, cannot be read: {why}"
                );
                Error::new(Kind::Corrupt, message)
            })
        });
        scratch::give(input);
        result
    }

    /// Writes the leading whole clusters of the window, compressed if that makes them smaller. Returns how many bytes
    /// that were.
    pub(super) async fn store_compressed(&self, at: u64, buf: Buf) -> (Result<u64>, Buf) {
        let size = self.geometry.cluster_size();
        let count = (buf.len() as u64 / size)
            .min(AT_ONCE)
            .min(self.clusters_to_border(at));
        let packed = match self
            .compress_clusters(&buf.as_slice()[..(count * size) as usize])
            .await
        {
            Ok(packed) => packed,
            Err(error) => return (Err(error), buf),
        };
        let is_smaller = packed[0].is_some();
        let alike = packed.iter().take_while(|p| p.is_some() == is_smaller);
        let len = alike.count() as u64 * size;
        if is_smaller {
            let packed: Vec<_> = packed.into_iter().map_while(|p| p).collect();
            let stored = self.link_compressed(at, &packed).await;
            return (stored.map(|()| len), buf);
        }
        let (stored, buf) = self.store_plain(at, len, buf).await;
        (stored, buf)
    }

    /// Each cluster compressed, or `None` where that does not make it smaller. By worker threads: it takes longer than
    /// all else that a request does.
    async fn compress_clusters(&self, clusters: &[u8]) -> Result<Vec<Option<Vec<u8>>>> {
        let kind = self.compression;
        let started = clusters
            .chunks(self.geometry.cluster_size() as usize)
            .map(|cluster| {
                let cluster = cluster.to_vec();
                offload(move || compress(kind, &cluster))
            });
        let mut packed = Vec::new();
        for cluster in started.collect::<Vec<_>>() {
            let ended = |_| Error::new(Kind::Ended, "the worker threads have ended");
            packed.push(cluster.await.map_err(ended)?);
        }
        Ok(packed)
    }

    async fn link_compressed(&self, at: u64, packed: &[Vec<u8>]) -> Result<()> {
        let size = self.geometry.cluster_size();
        let _turn = self.turns.turn(at, packed.len() as u64 * size).await;
        let mut old = Vec::new();
        for n in 0..packed.len() as u64 {
            let entry = self.entry(at + n * size).await?;
            match self.mapping(at + n * size, entry) {
                Ok(mapping) => old.push(mapping),
                Err(error) => return Err(self.found(error).await),
            }
        }
        let mut places = Vec::new();
        let stored = self.place_compressed(at, packed, &mut places).await;
        if let Err(error) = stored {
            self.give_back_compressed(at, &places).await;
            return Err(error);
        }
        self.free(old.iter(), false);
        Ok(())
    }

    /// Gives back what could not be linked. If some of it was, it is kept: rather a leak than one place used twice.
    async fn give_back_compressed(&self, at: u64, places: &[CompressedRange]) {
        let size = self.geometry.cluster_size();
        for (n, range) in (0..).zip(places) {
            let word = Mapping::Compressed(*range).encode(self.geometry);
            match self.entry(at + n * size).await {
                Ok(now) if now.word != word => {
                    self.meta.release_unused_bytes(range.offset, range.len);
                }
                _ => tracing::warn!(
                    image = self.name(),
                    "compressed data that could not be linked are leaked"
                ),
            }
        }
    }

    /// Takes room, writes and links; what was taken is in `places` also after an error.
    async fn place_compressed(
        &self,
        at: u64,
        packed: &[Vec<u8>],
        places: &mut Vec<CompressedRange>,
    ) -> Result<()> {
        for bytes in packed {
            let len = bytes.len() as u64;
            let offset = self.meta.allocate_bytes(len).await?;
            places.push(CompressedRange { offset, len });
        }
        let mut next = 0;
        while next < packed.len() {
            // What lies together is written together.
            let start = places[next].offset;
            let mut joined: Vec<u8> = Vec::new();
            while next < packed.len() && places[next].offset == start + joined.len() as u64 {
                joined.extend_from_slice(&packed[next]);
                next += 1;
            }
            let mut buf = scratch::take(joined.len())?;
            buf.as_mut_slice().copy_from_slice(&joined);
            let (written, buf) = self.write_file(start, buf).await;
            scratch::give(buf);
            written?;
        }
        let entry = |range: &CompressedRange| Entry {
            word: Mapping::Compressed(*range).encode(self.geometry),
            subclusters: 0,
        };
        let entries: Vec<_> = places.iter().map(entry).collect();
        self.meta.link(at, &entries).await
    }

    /// Compressed clusters lie in the image file, never in a data file.
    async fn write_file(&self, offset: u64, buf: Buf) -> (Result<()>, Buf) {
        let end = offset + buf.len() as u64;
        if let Err(error) = grow(&*self.file, end).await {
            return (Err(error), buf);
        }
        io::write(&*self.file, offset, buf).await
    }
}
