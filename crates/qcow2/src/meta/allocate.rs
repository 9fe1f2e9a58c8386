//! Finding free clusters: from what was set aside for this thread, from what the refcount blocks say is free, or by
//! making the file longer. It must never hand out a cluster that holds metadata, nor one whose refcount could be lost
//! while something refers to it.

use std::future::poll_fn;
use std::task::Poll;

use diskfuse_block::{Error, Kind, Resize, Result, lane};

use super::layout::Overlap;
use super::limbo::{Freed, Leaving};
use super::refcounts::{Adopted, Begin, Change, Find};
use super::{Meta, Run, transfer};
use crate::node::OverlapCheck;

/// The file grows by an eighth, but by at least and at most this many bytes.
const LEAST_GROWTH: u64 = 1 << 20;
const MOST_GROWTH: u64 = 64 << 20;
/// Bytes of freed clusters that may wait for a commit before the file is rather made longer.
const LIMBO_BYTES: u64 = 64 << 20;

impl Run {
    /// Cuts the first `clusters` off; `self` keeps the rest.
    fn take(&mut self, clusters: u64, cluster_bits: u32) -> Self {
        let head = Self {
            clusters: clusters.min(self.clusters),
            ..*self
        };
        self.host += head.clusters << cluster_bits;
        self.clusters -= head.clusters;
        head
    }
}

impl Meta {
    /// Allocates up to `clusters` clusters in a row, at least one. Their refcount is one; link them or give them back
    /// ([`Meta::release_unused`]). [`Kind::Os`] ENOSPC when the file cannot grow.
    pub async fn allocate(&self, clusters: u64) -> Result<Run> {
        self.check_writable()?;
        let reserved = &self.reserved[lane()];
        let bits = self.geometry.cluster_bits();
        {
            let mut reserved = reserved.lock();
            if let Some(run) = &mut *reserved {
                let taken = run.take(clusters, bits);
                if run.clusters == 0 {
                    *reserved = None;
                }
                return Ok(taken);
            }
        }
        let mut run = self.find(clusters.max(self.reserve), false).await?;
        let taken = run.take(clusters, bits);
        if run.clusters > 0 {
            let mut reserved = reserved.lock();
            match &*reserved {
                // Others on this thread were faster.
                Some(_) => {
                    drop(reserved);
                    self.release_unused(run);
                }
                None => *reserved = Some(run),
            }
        }
        Ok(taken)
    }

    /// Allocates `len` bytes for compressed data, less than a cluster, behind other compressed data where there is
    /// room. Returns the byte offset; every cluster that the bytes touch has got a reference.
    pub async fn allocate_bytes(&self, len: u64) -> Result<u64> {
        let size = self.geometry.cluster_size();
        if len == 0 || len > size {
            let message = format!("{len} bytes are not the length of a compressed cluster");
            return Err(Error::new(Kind::Invalid, message));
        }
        let _turn = self.packing.turn(0, 1).await;
        if let Some(offset) = self.refcounts.continue_bytes(len)? {
            return Ok(offset);
        }
        let run = self.allocate(1).await?;
        let offset = match self.refcounts.straddle(run.host) {
            Some(cursor) => cursor,
            None => run.host,
        };
        self.refcounts.set_cursor(offset + len);
        Ok(offset)
    }

    /// Gives back what was allocated and never linked.
    pub fn release_unused(&self, run: Run) {
        let first = self.geometry.cluster_of(run.host);
        for cluster in first..first + run.clusters {
            match self.refcounts.change(cluster, -1) {
                Ok(Change::Done(_)) => {}
                // Its block is not in memory any more: later, then.
                Ok(Change::Load(_)) => self.limbo.add(Freed {
                    cluster,
                    count: 1,
                    discard: false,
                }),
                Err(error) => tracing::error!(%error, "a cluster is leaked"),
            }
        }
    }

    /// Gives back what compressed data was to use and does not.
    pub fn release_unused_bytes(&self, offset: u64, len: u64) {
        let first = self.geometry.cluster_of(offset);
        let last = self
            .geometry
            .cluster_of(offset.saturating_add(len.max(1) - 1));
        self.limbo.add(Freed {
            cluster: first,
            count: last - first + 1,
            discard: false,
        });
    }

    /// Clusters that the file has.
    fn file_clusters(&self) -> u64 {
        self.geometry.cluster_of(self.file.size())
    }

    async fn find(&self, want: u64, exact: bool) -> Result<Run> {
        let mut waited_for_frees = false;
        let mut from = 0;
        loop {
            let found = self
                .refcounts
                .find(want, exact, self.file_clusters(), &mut from);
            match found {
                Find::Found(run) => return self.unless_metadata(run).await,
                Find::Load(index) => self.load_block(index).await?,
                Find::Make(cluster) => self.make_block(cluster).await?,
                Find::GrowTable => self.place_behind(0).await.map(drop)?,
                Find::GrowFile(clusters) => {
                    let waiting = self.limbo.clusters() << self.geometry.cluster_bits();
                    if !waited_for_frees && waiting >= LIMBO_BYTES {
                        waited_for_frees = true;
                        self.commit().await?;
                        continue;
                    }
                    match self.grow_file(clusters).await {
                        Ok(()) => {}
                        Err(error) if waited_for_frees || waiting == 0 => return Err(error),
                        Err(_) => {
                            waited_for_frees = true;
                            self.commit().await?;
                        }
                    }
                }
            }
            if self.refcounts.is_crowded() {
                self.write_refcounts_back().await?;
            }
        }
    }

    /// A cluster that was free until it was taken, and holds metadata, must not be written.
    async fn unless_metadata(&self, run: Run) -> Result<Run> {
        let first = self.geometry.cluster_of(run.host);
        match self.layout.find(first..first + run.clusters) {
            None => Ok(run),
            Some(overlap) => Err(self.is_not_free(overlap).await),
        }
    }

    pub(super) async fn is_not_free(&self, overlap: Overlap) -> Error {
        let at = overlap.cluster << self.geometry.cluster_bits();
        let holds = overlap.holds;
        let why = format!("the cluster at offset {at:#x} counts as free but holds {holds}");
        self.mark_corrupt(&why).await
    }

    /// Brings a refcount block into memory.
    pub(super) async fn load_block(&self, index: usize) -> Result<()> {
        let begin = poll_fn(|cx| match self.refcounts.begin_load(index, cx.waker()) {
            Ok(Begin::Wait) => Poll::Pending,
            begin => Poll::Ready(begin),
        });
        let Begin::Load(offset) = begin.await? else {
            return Ok(());
        };
        let loading = BlockLoad { meta: self, index };
        let size = self.geometry.cluster_size();
        if offset
            .checked_add(size)
            .is_none_or(|end| end > self.file.size())
        {
            let name = self.name();
            let message = format!(
                "'{name}': the refcount block at offset {offset:#x} is past the end of the file"
            );
            return Err(Error::new(Kind::Corrupt, message));
        }
        let buf = transfer::read(&*self.file, offset, size as usize).await?;
        loading.end(buf.as_slice().to_vec());
        Ok(())
    }

    async fn make_block(&self, cluster: u64) -> Result<()> {
        if self.file_clusters() <= cluster {
            self.grow_file(cluster + 1).await?;
        }
        let overlap = self.layout.find(std::iter::once(cluster));
        // Asked in this order: who made the block meanwhile, here, put it into the table before the layout. What the
        // layout says of this cluster is then no contradiction.
        if !self.refcounts.lacks_block(cluster) {
            return Ok(());
        }
        if let Some(overlap) = overlap {
            return Err(self.is_not_free(overlap).await);
        }
        if self.refcounts.make(cluster) {
            self.layout.add(OverlapCheck::REFCOUNT_BLOCK, cluster, 1);
        }
        Ok(())
    }

    /// Makes the file at least so long: a good deal longer, so that this happens seldom.
    async fn grow_file(&self, clusters: u64) -> Result<()> {
        let _turn = self.growing.turn(0, 1).await;
        if self.file_clusters() >= clusters {
            return Ok(());
        }
        self.grow_file_now(clusters).await
    }

    async fn grow_file_now(&self, clusters: u64) -> Result<()> {
        let need = clusters
            .checked_mul(self.geometry.cluster_size())
            .filter(|&n| i64::try_from(n).is_ok());
        let need = need.ok_or_else(|| self.is_full())?;
        let size = self.file.size();
        let ahead = size.saturating_add((size / 8).clamp(LEAST_GROWTH, MOST_GROWTH));
        let ahead = self.geometry.round_up(ahead).unwrap_or(need).max(need);
        if self
            .file
            .resize(ahead, Resize::AtLeast, false)
            .await
            .is_ok()
        {
            return Ok(());
        }
        let grown = self.file.resize(need, Resize::AtLeast, false).await;
        grown.map_err(|error| match error.kind() {
            // A block device is as long as it is.
            Kind::Unsupported | Kind::Invalid => self.is_full(),
            _ => error,
        })
    }

    fn is_full(&self) -> Error {
        let message = format!("'{}' is full and cannot grow", self.name());
        Error::new(Kind::Os(libc::ENOSPC), message)
    }

    /// Allocates `payload` clusters in a row behind everything else, with the refcount blocks that they need, and a
    /// longer refcount table if they need that; returns the byte offset. A payload of nothing makes the table longer.
    async fn place_behind(&self, payload: u64) -> Result<u64> {
        let _turn = self.growing.turn(0, 1).await;
        let (plan, outgrown) = loop {
            let plan = self.refcounts.plan(payload)?;
            let end = plan.start + plan.blocks + plan.table + plan.payload;
            if self.file_clusters() < end {
                self.grow_file_now(end).await?;
            }
            // Others may have made a block there meanwhile, and clusters may have been taken.
            if let Adopted::Yes { outgrown } = self.refcounts.adopt(&plan)? {
                break (plan, outgrown);
            }
        };
        if let Some((offset, clusters)) = outgrown {
            let outgrown = self.row(offset, clusters);
            self.layout.remove(outgrown.cluster, outgrown.count);
            self.limbo.add(outgrown);
        }
        let (blocks, table) = (plan.start, plan.start + plan.blocks);
        self.layout
            .add(OverlapCheck::REFCOUNT_BLOCK, blocks, plan.blocks);
        self.layout
            .add(OverlapCheck::REFCOUNT_TABLE, table, plan.table);
        Ok((table + plan.table) << self.geometry.cluster_bits())
    }

    /// Allocates `clusters` clusters, all in a row.
    pub(super) async fn allocate_row(&self, clusters: u64) -> Result<u64> {
        if clusters < self.geometry.refcounts_per_block() {
            return self.find(clusters, true).await.map(|run| run.host);
        }
        self.place_behind(clusters).await
    }

    /// Gives clusters back that nothing can touch any more. What cannot be given back is leaked, and told.
    pub(super) async fn reclaim(&self) {
        while let Some(mut leaving) = self.limbo.next(&self.holds) {
            if let Err(error) = self.drop_references(&mut leaving).await {
                tracing::error!(image = self.name(), %error, "clusters are leaked");
                leaving.leak();
            }
        }
    }

    async fn drop_references(&self, leaving: &mut Leaving<'_>) -> Result<()> {
        if leaving.left().discard {
            self.discard_alone(leaving.left()).await?;
        }
        while leaving.left().count > 0 {
            let cluster = leaving.left().cluster;
            while let Change::Load(index) = self.refcounts.change(cluster, -1)? {
                self.load_block(index).await?;
            }
            leaving.one_is_free();
        }
        Ok(())
    }

    /// Discards those of the clusters that nobody else refers to: while they still count as used, so that nobody
    /// writes to them meanwhile, not even compressed data into what room they have.
    async fn discard_alone(&self, freed: Freed) -> Result<()> {
        let bits = self.geometry.cluster_bits();
        let end = freed.cluster + freed.count;
        let mut from = freed.cluster;
        for cluster in freed.cluster..=end {
            let alone = cluster < end && self.refcount_to_free(cluster).await? == 1;
            if alone {
                continue;
            }
            if from < cluster {
                let len = (cluster - from) << bits;
                if let Err(error) = self.file.discard(from << bits, len).await {
                    tracing::debug!(%error, "space is not given back");
                }
            }
            from = cluster + 1;
        }
        Ok(())
    }

    async fn refcount_to_free(&self, cluster: u64) -> Result<u64> {
        loop {
            match self.refcounts.get_to_free(cluster) {
                Change::Done(count) => return Ok(count),
                Change::Load(index) => self.load_block(index).await?,
            }
        }
    }

    /// Everything that is set aside and was not used is free again.
    pub(super) fn release_reservations(&self) {
        for reserved in &self.reserved {
            if let Some(run) = reserved.lock().take() {
                self.release_unused(run);
            }
        }
    }

    /// Cuts off what the file was made longer and does not need. What it had when it was opened stays: in a damaged image it may be
    /// in use though it counts as free, and can be saved.
    pub(super) async fn trim(&self) -> Result<()> {
        let (opened, mut end) = self.refcounts.grown();
        loop {
            match self.refcounts.used_end(end) {
                Ok(used) => {
                    end = used;
                    break;
                }
                Err((from, index)) => {
                    end = from;
                    self.load_block(index).await?;
                }
            }
        }
        let needed = end.max(opened) << self.geometry.cluster_bits();
        if end == 0 || needed >= self.file.size() {
            return Ok(());
        }
        match self.file.resize(needed, Resize::Exactly, false).await {
            Err(error) if error.kind() == Kind::Unsupported => Ok(()),
            answer => answer,
        }
    }
}

/// A block that is being loaded: whatever happens, those who wait for it are told.
struct BlockLoad<'m> {
    meta: &'m Meta,
    index: usize,
}

impl BlockLoad<'_> {
    fn end(self, bytes: Vec<u8>) {
        self.meta.refcounts.loaded(self.index, Some(bytes));
        // It is over: from here on it may be somebody else's to load.
        std::mem::forget(self);
    }
}

impl Drop for BlockLoad<'_> {
    fn drop(&mut self) {
        self.meta.refcounts.loaded(self.index, None);
    }
}
