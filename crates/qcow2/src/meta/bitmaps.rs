//! The persistent bitmaps as far as the order on disk goes: marked as in use before anything is changed, and replaced as a whole
//! when they are stored. What is in them is known to [`crate::bitmaps`]. A directory that the header may name must never say
//! that its bitmaps are true while something is changed.

use diskfuse_block::Result;
use parking_lot::Mutex;

use super::{Meta, transfer};
use crate::format::{BitmapsExtension, Header, bitmap};
use crate::node::OverlapCheck;

/// The directories of an open image.
pub(super) struct Bitmaps(Mutex<State>);

struct State {
    /// What the header names.
    named: Option<BitmapsExtension>,
    /// What it may name as well, since a change of it has failed.
    perhaps: Vec<BitmapsExtension>,
}

impl Bitmaps {
    pub(super) fn new(named: Option<&BitmapsExtension>) -> Self {
        Self(Mutex::new(State {
            named: named.cloned(),
            perhaps: Vec::new(),
        }))
    }

    fn all(&self) -> Vec<BitmapsExtension> {
        let state = self.0.lock();
        state.named.iter().chain(&state.perhaps).cloned().collect()
    }
}

impl Meta {
    /// Where the directory of the bitmaps is now.
    pub(crate) fn bitmaps(&self) -> Option<BitmapsExtension> {
        self.bitmaps.0.lock().named.clone()
    }

    /// Until they are stored nobody may take the bitmaps of the file for true.
    pub(super) async fn mark_bitmaps_in_use(&self) -> Result<()> {
        for place in self.bitmaps.all() {
            let size = usize::try_from(place.directory_size).unwrap_or(usize::MAX);
            let buf = transfer::read(&*self.file, place.directory_offset, size).await?;
            let mut bytes = buf.as_slice().to_vec();
            if bitmap::mark_in_use(&mut bytes, place.count, 0)? {
                transfer::write(&*self.file, place.directory_offset, &bytes).await?;
                self.file.flush().await?;
            }
        }
        Ok(())
    }

    /// Clusters for what belongs to bitmaps, `len` bytes in a row; their byte offset. Give them back by
    /// [`Meta::drop_row_of_bitmaps`].
    pub(crate) async fn allocate_for_bitmaps(&self, len: u64) -> Result<u64> {
        self.check_writable()?;
        let clusters = len.div_ceil(self.geometry.cluster_size());
        self.allocate_row(clusters).await
    }

    /// What was allocated for bitmaps and is not named any more, nor will be, loses its reference. What holds other metadata as
    /// well cannot have been a bitmap's, and stays.
    pub(crate) fn drop_row_of_bitmaps(&self, offset: u64, len: u64) {
        let row = self.row(offset, len.div_ceil(self.geometry.cluster_size()));
        let found = self.layout.find(row.cluster..row.cluster + row.count);
        match found {
            None => self.limbo.add(row),
            Some(overlap) => tracing::warn!(
                image = self.name(),
                offset,
                "what a bitmap says is its own holds {}: the clusters stay",
                overlap.holds
            ),
        }
    }

    /// Whether the header names this directory, or may do so.
    pub(crate) fn may_name_bitmaps(&self, place: &BitmapsExtension) -> bool {
        self.bitmaps.all().contains(place)
    }

    /// Writes what belongs to bitmaps, to clusters that nobody names yet.
    pub(crate) async fn write_of_bitmaps(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        transfer::write(&*self.file, offset, bytes).await
    }

    /// The header names another directory from now on, or none, and the old one's clusters are dropped. Everything that the new one
    /// names is written. All of it is on stable storage when it resolves.
    ///
    /// # Errors
    /// Then the header names the old one or the new one, which must both stay.
    pub(crate) async fn name_bitmaps(&self, new: Option<BitmapsExtension>) -> Result<()> {
        self.check_writable()?;
        // With it the refcounts of what is new, and the data that the bitmaps are true for.
        self.commit().await?;
        let size = self.file.size();
        let len = usize::try_from(self.geometry.cluster_size().min(size)).unwrap_or(usize::MAX);
        let mut begun = false;
        let steps = |old: &[u8]| {
            let steps = Header::with_bitmaps(old, size, new.as_ref())?;
            begun = true;
            Ok(steps)
        };
        let file = &*self.file;
        let changed = self.superblock.step_by_step(file, len, steps).await;
        if let Err(error) = changed {
            let perhaps = new.filter(|_| begun);
            self.bitmaps.0.lock().perhaps.extend(perhaps);
            return Err(error);
        }
        let (old, perhaps) = {
            let mut state = self.bitmaps.0.lock();
            let old = std::mem::replace(&mut state.named, new.clone());
            (old, std::mem::take(&mut state.perhaps))
        };
        for gone in old.into_iter().chain(perhaps) {
            let (at, len) = (gone.directory_offset, gone.directory_size);
            let clusters = len.div_ceil(self.geometry.cluster_size());
            self.layout.remove(self.geometry.cluster_of(at), clusters);
            self.drop_row_of_bitmaps(at, len);
        }
        if let Some(new) = new {
            let row = self.row(
                new.directory_offset,
                new.directory_size.div_ceil(self.geometry.cluster_size()),
            );
            self.layout
                .add(OverlapCheck::BITMAP_DIRECTORY, row.cluster, row.count);
        }
        Ok(())
    }

    /// Whether nothing may be changed any more.
    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(std::sync::atomic::Ordering::SeqCst)
    }
}
