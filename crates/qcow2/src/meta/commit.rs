//! Bringing changes to the disk in an order that a crash cannot hurt; see the head of this folder. It must never answer
//! before what it says is true, and never lose a change that it could not write.

use std::sync::atomic::Ordering;
use std::time::Duration;

use diskfuse_block::Result;
use diskfuse_ring::sleep;

use super::limbo::Freed;
use super::refcounts::Taken;
use super::slices::Copied;
use super::superblock::field;
use super::{L1, Meta, transfer};
use crate::node::OverlapCheck;

/// How long closing waits for transfers that are still in flight.
const PATIENCE: u32 = 5000;

/// What one commit brings to the disk. What it does not bring there is put back.
struct Batch<'m> {
    meta: &'m Meta,
    freed: Vec<Freed>,
    slices: Vec<Copied>,
    l1: Vec<usize>,
    l1_sectors: Vec<(u64, Vec<u8>)>,
    refcounts: Option<Taken>,
    durable: bool,
}

impl Meta {
    /// Everything that was changed before this call, and all data that was written before, is on stable storage when
    /// it resolves. Callers that come while one is under way share the next one.
    pub async fn commit(&self) -> Result<()> {
        if self.read_only {
            return Ok(());
        }
        let before = self.commits_begun.load(Ordering::SeqCst);
        {
            let _turn = self.committing.turn(0, 1).await;
            if self.commits_done.load(Ordering::SeqCst) <= before {
                let number = self.commits_begun.fetch_add(1, Ordering::SeqCst) + 1;
                self.commit_now(!self.lazy).await?;
                self.commits_done.store(number, Ordering::SeqCst);
            }
        }
        self.reclaim().await;
        Ok(())
    }

    /// A commit with refcounts, also lazy ones: afterwards blocks of them need not be kept in memory.
    pub(super) async fn write_refcounts_back(&self) -> Result<()> {
        if !self.lazy {
            return self.commit().await;
        }
        let _turn = self.committing.turn(0, 1).await;
        self.commit_now(true).await
    }

    /// With the turn.
    async fn commit_now(&self, refcounts: bool) -> Result<()> {
        self.superblock.settle(&*self.file).await?;
        let mut batch = Batch::begin(self);
        let changes_tables = !batch.slices.is_empty() || !batch.l1.is_empty();
        if let Some(data) = &self.data_file {
            data.flush().await?;
        }
        if refcounts && self.refcounts.is_dirty() {
            self.write_refcounts(&mut batch).await?;
        }
        if changes_tables {
            self.file.flush().await?;
            self.write_tables(&mut batch).await?;
        }
        self.file.flush().await?;
        batch.durable = true;
        Ok(())
    }

    async fn write_refcounts(&self, batch: &mut Batch<'_>) -> Result<()> {
        let taken = batch.refcounts.insert(self.refcounts.take_dirty());
        let pieces = std::mem::take(&mut taken.pieces);
        transfer::write_all(&self.file, pieces).await?;
        if let Some((offset, table)) = self.refcounts.table_to_move(taken) {
            return self.move_refcount_table(offset, table).await;
        }
        if !taken.entries.is_empty() {
            self.file.flush().await?;
            let sectors = self.refcounts.table_sectors(&taken.entries);
            transfer::write_all(&self.file, sectors).await?;
        }
        Ok(())
    }

    /// All blocks that the new table names are written, but for a flush.
    async fn move_refcount_table(&self, offset: u64, table: Vec<u64>) -> Result<()> {
        let bytes: Vec<u8> = table.iter().flat_map(|e| e.to_be_bytes()).collect();
        let clusters = self.refcounts.table_clusters(table.len());
        transfer::write(&*self.file, offset, &bytes).await?;
        self.file.flush().await?;
        let change = |fields: &mut super::superblock::Fields<'_>| {
            fields.set64(field::REFCOUNT_TABLE_OFFSET, offset);
            fields.set32(field::REFCOUNT_TABLE_CLUSTERS, clusters as u32);
        };
        self.superblock.update(&*self.file, change).await?;
        let (old, count) = self.refcounts.table_moved(offset, table);
        let first = self.geometry.cluster_of(old);
        self.layout.remove(first, count);
        self.limbo.add(Freed {
            cluster: first,
            count,
            discard: false,
        });
        Ok(())
    }

    async fn write_tables(&self, batch: &mut Batch<'_>) -> Result<()> {
        let mut pieces = std::mem::take(&mut batch.l1_sectors);
        for copied in &batch.slices {
            let guest = copied.slice << (self.slice_bits + self.geometry.cluster_bits());
            let table = self.l1.get(self.geometry.l1_index(guest));
            let offset = self.slice_offset(copied.slice, table)?;
            let bytes = copied.words.iter().flat_map(|w| w.to_be_bytes());
            pieces.push((offset, bytes.collect()));
        }
        transfer::write_all(&self.file, pieces).await
    }

    /// Makes the L1 table long enough for a disk of `size` bytes; it is on stable storage when it resolves.
    /// [`Kind::Invalid`](diskfuse_block::Kind::Invalid) if the format has no such disk.
    pub async fn make_room_for(&self, size: u64) -> Result<()> {
        self.check_writable()?;
        let needed = self.geometry.l1_entries_for(size);
        if needed > super::l1::MAX_ENTRIES as u64 {
            let cluster = self.geometry.cluster_size();
            let message = format!(
                "a disk of {size} bytes is too large for clusters of {cluster} bytes: its L1 table would be larger than 32 MiB"
            );
            return Err(diskfuse_block::Error::new(
                diskfuse_block::Kind::Invalid,
                message,
            ));
        }
        if needed > self.l1.len() as u64 {
            self.grow_l1(needed as usize).await?;
        }
        Ok(())
    }

    /// Says in the header that the disk has `size` bytes, which the L1 table is long enough for; that is on stable
    /// storage when it resolves. The tables may name clusters past the end.
    pub async fn set_size(&self, size: u64) -> Result<()> {
        self.check_writable()?;
        let change = |fields: &mut super::superblock::Fields<'_>| fields.set64(field::SIZE, size);
        self.superblock.update(&*self.file, change).await?;
        self.size.store(size, Ordering::SeqCst);
        Ok(())
    }

    async fn grow_l1(&self, entries: usize) -> Result<()> {
        let cluster = self.geometry.cluster_size();
        let clusters = (entries as u64 * 8).div_ceil(cluster);
        // The rest of the last cluster is room for growth that costs nothing.
        let entries = ((clusters * cluster / 8) as usize).min(super::l1::MAX_ENTRIES);
        let offset = self.allocate_row(clusters).await?;
        let _turn = self.committing.turn(0, 1).await;
        if self.l1.len() >= entries {
            // Somebody else was faster.
            self.limbo.add(self.row(offset, clusters));
            return Ok(());
        }
        // The refcounts of the new place, and everything that the table names.
        self.commit_now(!self.lazy).await?;
        if self.lazy {
            self.file.flush().await?;
        }
        let (old, old_len) = (self.l1.offset(), self.l1.len());
        transfer::write(
            &*self.file,
            offset,
            &self.l1.enlarged(clusters as usize * cluster as usize / 8),
        )
        .await?;
        self.file.flush().await?;
        let change = |fields: &mut super::superblock::Fields<'_>| {
            fields.set32(field::L1_SIZE, entries as u32);
            fields.set64(field::L1_OFFSET, offset);
        };
        self.superblock.update(&*self.file, change).await?;
        self.l1.moved(offset, entries);
        let row = self.row(offset, clusters);
        self.layout
            .add(OverlapCheck::ACTIVE_L1, row.cluster, row.count);
        if old_len > 0 {
            let row = self.row(old, (old_len as u64 * 8).div_ceil(cluster));
            self.layout.remove(row.cluster, row.count);
            self.limbo.add(row);
        }
        Ok(())
    }

    /// Clusters of metadata in a row that lose their reference.
    pub(super) fn row(&self, offset: u64, count: u64) -> Freed {
        Freed {
            cluster: self.geometry.cluster_of(offset),
            count,
            discard: false,
        }
    }

    /// Commits, gives back what was set aside, cuts off what the file is too long, and leaves the image clean. Nothing
    /// may be changed afterwards, unless [`Meta::go_on`] is called. After an error the image is as consistent as after a crash, and
    /// it may be tried again.
    pub async fn close(&self) -> Result<()> {
        if self.read_only || self.closed.swap(true, Ordering::SeqCst) {
            return Ok(());
        }
        let closed = self.close_now().await;
        if closed.is_err() {
            self.closed.store(false, Ordering::SeqCst);
        }
        closed
    }

    async fn close_now(&self) -> Result<()> {
        if self.prepared.swap(false, Ordering::SeqCst) {
            self.unsettled.store(true, Ordering::SeqCst);
        }
        self.commit().await?;
        if !self.unsettled.load(Ordering::SeqCst) {
            return Ok(());
        }
        self.release_reservations();
        self.empty_limbo().await?;
        self.write_all_refcounts().await?;
        // A refcount table that was lazy until now may have moved, and its old place is free.
        if self.limbo.needs_commit() {
            self.empty_limbo().await?;
            self.write_all_refcounts().await?;
        }
        self.trim().await?;
        self.clear_dirty_bit().await?;
        self.unsettled.store(false, Ordering::SeqCst);
        Ok(())
    }

    /// Takes [`Meta::close`] back, however it went: changes are let in again, and the first of them makes the image ready for it
    /// once more. What is in memory must still be what the file has: only for a file that nobody has changed since.
    pub fn go_on(&self) {
        self.closed.store(false, Ordering::SeqCst);
    }

    /// Frees what has lost its reference. What a transfer is in flight to for longer than anybody should wait stays leaked.
    async fn empty_limbo(&self) -> Result<()> {
        for _ in 0..PATIENCE {
            if self.limbo.needs_commit() {
                self.commit().await?;
            }
            self.reclaim().await;
            if self.limbo.clusters() == 0 {
                break;
            }
            sleep(Duration::from_millis(1)).await;
        }
        Ok(())
    }

    /// Also the lazy ones.
    async fn write_all_refcounts(&self) -> Result<()> {
        let _turn = self.committing.turn(0, 1).await;
        self.commit_now(true).await
    }
}

impl<'m> Batch<'m> {
    /// In this order: what was freed was taken out of the slices before, and the L1 entries of slices that are copied
    /// are at least as new as the slices.
    fn begin(meta: &'m Meta) -> Self {
        let freed = meta.limbo.begin_commit();
        let slices = meta.slices.copy_dirty();
        let (l1, l1_sectors) = L1::take_dirty(&meta.l1);
        Self {
            meta,
            freed,
            slices,
            l1,
            l1_sectors,
            refcounts: None,
            durable: false,
        }
    }
}

impl Drop for Batch<'_> {
    fn drop(&mut self) {
        let (meta, durable) = (self.meta, self.durable);
        for copied in &self.slices {
            meta.slices.written(copied.slice, durable);
        }
        if !durable {
            meta.l1.not_written(std::mem::take(&mut self.l1));
        }
        if let Some(taken) = &self.refcounts {
            meta.refcounts.written(taken, durable);
        }
        meta.limbo
            .end_commit(std::mem::take(&mut self.freed), durable);
    }
}
