//! The fields of the header that change while an image is open: features, size, places of tables. They lie in the first
//! 512 bytes, which disks write whole, so a change is there or not. It must never change a field that nobody asked
//! to change.

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use diskfuse_block::{Node, RangeQueue, Result};
use parking_lot::Mutex;

use super::{Meta, transfer};
use crate::format::{Backing, Header, features};

/// Bytes that are kept and written.
const SECTOR: usize = 512;
/// Autoclear features that we keep true: bitmaps are in use until they are stored; raw external data stays so.
const KEPT_AUTOCLEAR: u64 = features::BITMAPS | features::RAW_DATA;

/// Byte offsets of fields (specification, "Header").
pub(super) mod field {
    pub(crate) const SIZE: usize = 24;
    pub(crate) const L1_SIZE: usize = 36;
    pub(crate) const L1_OFFSET: usize = 40;
    pub(crate) const REFCOUNT_TABLE_OFFSET: usize = 48;
    pub(crate) const REFCOUNT_TABLE_CLUSTERS: usize = 56;
    pub(crate) const INCOMPATIBLE: usize = 72;
    pub(crate) const AUTOCLEAR: usize = 88;
}

pub(super) struct Superblock {
    /// As it was read, or written and flushed.
    bytes: Mutex<[u8; SECTOR]>,
    /// A change of it failed: on disk it is as it was before, or as it was to be.
    unsure: AtomicBool,
    turn: RangeQueue,
}

/// The first bytes of the file, about to be changed.
pub(super) struct Fields<'f>(&'f mut [u8; SECTOR]);

impl Fields<'_> {
    pub(super) fn set32(&mut self, at: usize, value: u32) {
        self.0[at..at + 4].copy_from_slice(&value.to_be_bytes());
    }

    pub(super) fn set64(&mut self, at: usize, value: u64) {
        self.0[at..at + 8].copy_from_slice(&value.to_be_bytes());
    }

    pub(super) fn get64(&self, at: usize) -> u64 {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&self.0[at..at + 8]);
        u64::from_be_bytes(bytes)
    }
}

impl Superblock {
    pub(super) async fn read(file: &dyn Node) -> Result<Self> {
        let buf = transfer::read(file, 0, SECTOR).await?;
        let mut bytes = [0; SECTOR];
        bytes.copy_from_slice(buf.as_slice());
        Ok(Self {
            bytes: Mutex::new(bytes),
            unsure: AtomicBool::new(false),
            turn: RangeQueue::default(),
        })
    }

    /// Changes fields on disk, if the change changes anything; they are on stable storage when it resolves.
    pub(super) async fn update(
        &self,
        file: &dyn Node,
        change: impl FnOnce(&mut Fields<'_>),
    ) -> Result<()> {
        let _turn = self.turn.turn(0, 1).await;
        let mut bytes = *self.bytes.lock();
        change(&mut Fields(&mut bytes));
        if bytes == *self.bytes.lock() && !self.unsure.load(SeqCst) {
            return Ok(());
        }
        self.write(file, &bytes).await
    }

    /// Makes sure that it is on disk as it is known here, if a change of it has failed. To be called before anything is written
    /// that the disk only finds by it: by the other one of the two it would not be found.
    pub(super) async fn settle(&self, file: &dyn Node) -> Result<()> {
        if !self.unsure.load(SeqCst) {
            return Ok(());
        }
        let _turn = self.turn.turn(0, 1).await;
        let bytes = *self.bytes.lock();
        match self.unsure.load(SeqCst) {
            true => self.write(file, &bytes).await,
            false => Ok(()),
        }
    }

    /// With the turn.
    async fn write(&self, file: &dyn Node, bytes: &[u8; SECTOR]) -> Result<()> {
        self.unsure.store(true, SeqCst);
        transfer::write(file, 0, bytes).await?;
        file.flush().await?;
        *self.bytes.lock() = *bytes;
        self.unsure.store(false, SeqCst);
        Ok(())
    }

    /// Changes what is in the first `len` bytes of the file (at least a sector): what is past the first sector reaches stable
    /// storage before the first sector is written.
    pub(super) async fn rewrite(
        &self,
        file: &dyn Node,
        len: usize,
        change: impl FnOnce(&[u8]) -> Result<Vec<u8>>,
    ) -> Result<()> {
        let _turn = self.turn.turn(0, 1).await;
        let buf = transfer::read(file, 0, len.max(SECTOR)).await?;
        let old = buf.as_slice();
        let new = change(old)?;
        let pairs = old.iter().zip(&new).enumerate().skip(SECTOR);
        let mut differing = pairs.filter(|(_, (a, b))| a != b).map(|(at, _)| at);
        if let Some(first) = differing.next() {
            let last = differing.next_back().unwrap_or(first);
            let part = new.get(first..=last).unwrap_or_default();
            transfer::write(file, first as u64, part).await?;
            file.flush().await?;
        }
        let Some((sector, _)) = new.split_first_chunk::<SECTOR>() else {
            return Ok(());
        };
        self.write(file, sector).await
    }

    /// Changes what is in the first `len` bytes of the file (at least a sector) in several steps, each on stable storage before the
    /// next. After an error some of them were made, and perhaps one more.
    pub(super) async fn step_by_step(
        &self,
        file: &dyn Node,
        len: usize,
        steps: impl FnOnce(&[u8]) -> Result<Vec<Vec<u8>>>,
    ) -> Result<()> {
        let _turn = self.turn.turn(0, 1).await;
        let buf = transfer::read(file, 0, len.max(SECTOR)).await?;
        let mut now = buf.as_slice().to_vec();
        // What is known is newer than what is there if a change of it has failed.
        let known = *self.bytes.lock();
        if let Some((sector, _)) = now.split_first_chunk_mut::<SECTOR>() {
            *sector = known;
        }
        for next in steps(&now)? {
            let pairs = now.iter().zip(&next).enumerate().skip(SECTOR);
            let mut differing = pairs.filter(|(_, (a, b))| a != b).map(|(at, _)| at);
            if let Some(first) = differing.next() {
                let last = differing.next_back().unwrap_or(first);
                let part = next.get(first..=last).unwrap_or_default();
                transfer::write(file, first as u64, part).await?;
                file.flush().await?;
            }
            if let Some((sector, _)) = next.split_first_chunk::<SECTOR>()
                && now.get(..SECTOR) != Some(sector)
            {
                self.write(file, sector).await?;
            }
            now = next;
        }
        Ok(())
    }
}

impl Meta {
    /// The file below, as the header names it.
    pub fn backing(&self) -> Option<Backing> {
        self.backing.lock().clone()
    }

    /// Whether the header names a file below.
    pub fn names_backing(&self) -> bool {
        self.backing.lock().is_some()
    }

    /// Names another file below, or none, in the header. Everything that the image must have before was committed.
    pub async fn change_backing(&self, backing: Option<Backing>) -> Result<()> {
        self.check_writable()?;
        let size = self.file.size();
        let len = self.geometry.cluster_size().min(size);
        let change = |old: &[u8]| Header::with_backing(old, size, backing.as_ref());
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        self.superblock.rewrite(&*self.file, len, change).await?;
        *self.backing.lock() = backing;
        Ok(())
    }

    /// Before the first change: tells those who read the image later what we do not keep true (unknown autoclear
    /// features) or only bring to the disk when it is closed (bitmaps), and that refcounts may be behind if they are lazy. Costs
    /// nothing afterwards.
    pub async fn prepare_to_write(&self) -> Result<()> {
        if self.is_prepared() {
            return Ok(());
        }
        self.check_writable()?;
        let found = self.found_at_open.lock().clone();
        if let Some(why) = found {
            return Err(self.mark_corrupt(&why).await);
        }
        let _turn = self.preparing.turn(0, 1).await;
        if self.is_prepared() {
            return Ok(());
        }
        self.mark_bitmaps_in_use().await?;
        if self.version >= 3 {
            let change = |fields: &mut Fields<'_>| {
                let autoclear = fields.get64(field::AUTOCLEAR) & KEPT_AUTOCLEAR;
                fields.set64(field::AUTOCLEAR, autoclear);
                if self.lazy {
                    let features = fields.get64(field::INCOMPATIBLE) | features::DIRTY;
                    fields.set64(field::INCOMPATIBLE, features);
                }
            };
            self.superblock.update(&*self.file, change).await?;
        }
        self.prepared.store(true, SeqCst);
        // Looked at in this order: whoever finds a contradiction says so before he takes it back.
        self.check_writable().inspect_err(|_| {
            self.prepared.store(false, SeqCst);
        })
    }

    /// The image contradicts itself: sets the corrupt bit and refuses every change from now on. Returns the error for
    /// whoever found it.
    pub async fn mark_corrupt(&self, why: &str) -> diskfuse_block::Error {
        {
            let mut broken = self.broken.lock();
            if broken.is_none() {
                tracing::error!(image = self.name(), why, "the image is corrupt");
            }
            broken.get_or_insert_with(|| why.to_owned());
        }
        for state in [&self.prepared, &self.unsettled] {
            state.store(false, SeqCst);
        }
        if !self.read_only && self.version >= 3 {
            let change = |fields: &mut Fields<'_>| {
                let features = fields.get64(field::INCOMPATIBLE) | features::CORRUPT;
                fields.set64(field::INCOMPATIBLE, features);
            };
            if let Err(error) = self.superblock.update(&*self.file, change).await {
                tracing::error!(%error, "cannot set the corrupt bit");
            }
        }
        self.tell_corrupt(why);
        let message = format!("'{}' is corrupt: {why}", self.name());
        diskfuse_block::Error::new(diskfuse_block::Kind::Corrupt, message)
    }

    /// Tells whoever wants to know that the image contradicts itself; the first time only.
    pub(crate) fn tell_corrupt(&self, why: &str) {
        let to = self.on_corrupt.lock().take();
        if let Some(to) = to {
            to.tell(why, !self.read_only);
        }
    }

    /// The refcounts on disk are right again.
    pub(super) async fn clear_dirty_bit(&self) -> Result<()> {
        if self.version < 3 {
            return Ok(());
        }
        let change = |fields: &mut Fields<'_>| {
            let features = fields.get64(field::INCOMPATIBLE) & !features::DIRTY;
            fields.set64(field::INCOMPATIBLE, features);
        };
        self.superblock.update(&*self.file, change).await
    }
}
