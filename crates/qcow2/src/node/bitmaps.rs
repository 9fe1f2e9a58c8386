//! The bitmaps of an open image: recorded by the image itself, whoever writes it and on what way. A node knows from the beginning
//! which bitmaps it records in; another one takes its place when there is one more, or one less.

use std::sync::Arc;

use diskfuse_block::{Error, Kind, Result};

use super::Qcow2Node;
use crate::bitmaps::{self, PersistentBitmap};
use crate::format::bitmap::IN_USE;

impl Qcow2Node {
    /// The persistent bitmaps, in the order of their directory. Of an image that is only read there are some only if
    /// [`Qcow2Config::read_bitmaps`](super::Qcow2Config::read_bitmaps) says so.
    pub fn bitmaps(&self) -> Vec<PersistentBitmap> {
        self.persistent.all()
    }

    /// Whether a new bitmap can be stored: one bit for each `granularity` bytes.
    ///
    /// # Errors
    /// [`Kind::ReadOnly`] if the image is only read, [`Kind::Unsupported`] in version 2, and [`Kind::Invalid`] for what the
    /// format has no place for.
    pub fn check_new_bitmap(&self, name: &str, granularity: u64) -> Result<()> {
        if self.read_only {
            let message = format!("'{}' is open for reading only", self.name());
            return Err(Error::new(Kind::ReadOnly, message));
        }
        if self.version < 3 {
            let message = "Cannot store dirty bitmaps in qcow2 v2 files";
            return Err(Error::new(Kind::Unsupported, message));
        }
        let size = self.meta.size();
        self.persistent.check_new(name, granularity, size)
    }

    /// The image has one bitmap more from now on, which is stored when it is closed. Records in it: [`Qcow2Node::renewed`].
    pub fn add_bitmap(&self, bitmap: PersistentBitmap) {
        self.persistent.add(bitmap);
    }

    /// The image has one bitmap less from now on. The file has something of it until the image is closed, or
    /// [`Qcow2Node::forget_removed_bitmaps`].
    pub fn remove_bitmap(&self, name: &str) -> Option<PersistentBitmap> {
        self.persistent.remove(name)
    }

    /// The same open image, which records in the bitmaps that it has now. To take the place of this node.
    pub fn renewed(&self) -> Arc<Self> {
        Arc::new(Self {
            image: Arc::clone(&self.image),
            backing: self.backing.clone(),
            recorded: self.persistent.to_record().into(),
        })
    }

    /// Before bitmaps are changed: those of the file are marked as in use, on stable storage.
    pub async fn prepare_bitmaps(&self) -> Result<()> {
        self.check_write(0, 0).await
    }

    /// Takes what was removed out of the file.
    ///
    /// # Errors
    /// The disk is full or fails; it is tried again when the image is closed.
    pub async fn forget_removed_bitmaps(&self) -> Result<()> {
        let gone = self.persistent.gone();
        if gone.is_empty() {
            return Ok(());
        }
        self.check_write(0, 0).await?;
        let mut left = self.persistent.stored();
        for entry in &mut left {
            entry.flags |= IN_USE;
        }
        bitmaps::write_directory(&self.meta, &left).await?;
        bitmaps::drop_stored(&self.meta, &*self.file, &gone).await;
        self.persistent.dropped();
        Ok(())
    }

    /// A range is about to be changed.
    pub(super) fn record(&self, offset: u64, len: u64) {
        for bitmap in &*self.recorded {
            if bitmap.is_recording() {
                bitmap.mark(offset, len);
            }
        }
    }

    /// The disk may have another size.
    pub(super) fn resize_bitmaps(&self) {
        for one in self.persistent.all() {
            if let Err(error) = one.bitmap.follow(|| self.meta.size()) {
                tracing::warn!(name = one.name, %error, "a bitmap could not follow its disk's size");
                one.bitmap.set_inconsistent();
            }
        }
    }

    /// Before the image is closed: has the file have what is in memory. What cannot be stored stays marked as in use, and that is
    /// said; the image is closed all the same.
    pub(super) async fn store_bitmaps(&self) {
        let is_changed = self.meta.is_prepared() || self.persistent.is_unsaved();
        if self.read_only || self.meta.is_closed() || !is_changed {
            return;
        }
        if let Err(error) = self.store_bitmaps_now().await {
            self.persistent.set_unsaved();
            tracing::error!(
                image = self.name(),
                "its dirty bitmaps could not be stored; what the image has of them is marked as inconsistent: {error}"
            );
        }
    }

    async fn store_bitmaps_now(&self) -> Result<()> {
        let (all, gone) = (self.persistent.all(), self.persistent.gone());
        if all.is_empty() && self.meta.bitmaps().is_none() {
            return Ok(());
        }
        self.meta.prepare_to_write().await?;
        let replaced = self.persistent.replaced();
        let entries = bitmaps::store(&self.meta, &all).await?;
        let replaced = [replaced, gone].concat();
        bitmaps::drop_stored(&self.meta, &*self.file, &replaced).await;
        self.persistent.saved(entries);
        Ok(())
    }
}
