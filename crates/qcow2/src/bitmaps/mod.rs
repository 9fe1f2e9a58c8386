//! Persistent bitmaps: loaded when an image is opened, true in memory while it is used, stored when it is closed. It knows no nodes
//! and their names, nor who asks for a bitmap. It must never store what is not true, nor lose a bitmap without leaving it marked as
//! in use. (Specification, "Bitmaps extension" and what follows it.)
//!
//! # Order on disk
//! 1. Before the first change of the disk or of a bitmap, all bitmaps of the directory are marked as in use
//!    ([`Meta::prepare_to_write`](crate::meta::Meta::prepare_to_write)).
//! 2. When they are stored: bits, tables and a new directory to new clusters; a commit, with the data that they speak of; the
//!    header names the new directory; what was there before is free. A crash leaves the one directory or the other.

mod load;
mod store;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use diskfuse_block::{DirtyBitmap, Error, Kind, Result};
use parking_lot::Mutex;

use crate::format::bitmap::{
    DirectoryEntry, GRANULARITY_BITS, LONGEST_NAME, MOST_BITMAPS, MOST_BYTES, MOST_DIRECTORY,
};
pub(crate) use load::{load, read_directory};
pub(crate) use store::{drop_stored, store, write_directory};

/// A bitmap of an image that outlives its being open.
#[derive(Clone, Debug)]
pub struct PersistentBitmap {
    /// Its name, which no other bitmap of the image has.
    pub name: String,
    /// What is in it.
    pub bitmap: Arc<DirtyBitmap>,
    /// What the image file has of it; out of date, and marked so, since the image was changed.
    stored: Option<DirectoryEntry>,
}

impl PersistentBitmap {
    /// One that the image file knows nothing of yet.
    pub fn new(name: String, bitmap: Arc<DirtyBitmap>) -> Self {
        Self {
            name,
            bitmap,
            stored: None,
        }
    }
}

/// The bitmaps of an open image.
#[derive(Default)]
pub(crate) struct Persistent(Mutex<State>, AtomicBool);

#[derive(Default)]
struct State {
    /// In the order of the directory.
    all: Vec<PersistentBitmap>,
    /// What the image file has and nobody wants any more.
    gone: Vec<DirectoryEntry>,
}

/// What the next one to open the image takes over, so that whoever uses a bitmap can go on with it.
pub(crate) struct Inheritance {
    all: Vec<PersistentBitmap>,
    unsaved: bool,
}

impl Persistent {
    pub(crate) fn new(all: Vec<PersistentBitmap>) -> Self {
        let gone = Vec::new();
        Self(Mutex::new(State { all, gone }), AtomicBool::new(false))
    }

    /// Those of an image that was closed, whose directory has these entries now.
    pub(crate) fn inherited(from: Inheritance, mut entries: Vec<DirectoryEntry>) -> Self {
        let mut all = from.all;
        for one in &mut all {
            let is_it = |entry: &DirectoryEntry| entry.name == one.name.as_bytes();
            let place = entries.iter().position(is_it);
            one.stored = place.map(|place| entries.remove(place));
        }
        let unsaved = from.unsaved || !entries.is_empty();
        let state = State { all, gone: entries };
        Self(Mutex::new(state), AtomicBool::new(unsaved))
    }

    pub(crate) fn leave(&self) -> Inheritance {
        Inheritance {
            all: self.all(),
            unsaved: self.is_unsaved(),
        }
    }

    pub(crate) fn all(&self) -> Vec<PersistentBitmap> {
        self.0.lock().all.clone()
    }

    pub(crate) fn gone(&self) -> Vec<DirectoryEntry> {
        self.0.lock().gone.clone()
    }

    /// What the file has of those that are there.
    pub(crate) fn stored(&self) -> Vec<DirectoryEntry> {
        let state = self.0.lock();
        state
            .all
            .iter()
            .filter_map(|one| one.stored.clone())
            .collect()
    }

    /// What the file has of those that are stored anew when the image is closed.
    pub(crate) fn replaced(&self) -> Vec<DirectoryEntry> {
        let state = self.0.lock();
        let of_use = state.all.iter().filter(|one| !is_lost(one));
        of_use.filter_map(|one| one.stored.clone()).collect()
    }

    /// What follows the disk: not those that are of no use any more.
    pub(crate) fn to_record(&self) -> Vec<Arc<DirtyBitmap>> {
        let state = self.0.lock();
        let of_use = state.all.iter().filter(|one| !is_lost(one));
        of_use.map(|one| Arc::clone(&one.bitmap)).collect()
    }

    /// Whether there is something that the file does not have, whatever became of the disk.
    pub(crate) fn is_unsaved(&self) -> bool {
        self.1.load(SeqCst)
    }

    pub(crate) fn set_unsaved(&self) {
        self.1.store(true, SeqCst);
    }

    /// One more, which may have been taken out before.
    pub(crate) fn add(&self, mut one: PersistentBitmap) {
        self.set_unsaved();
        let mut state = self.0.lock();
        let is_it = |gone: &DirectoryEntry| Some(gone) == one.stored.as_ref();
        match state.gone.iter().position(is_it) {
            Some(place) => drop(state.gone.remove(place)),
            // The others have been stored since: what the file had of it is free, and may be somebody else's.
            None => one.stored = None,
        }
        state.all.push(one);
    }

    pub(crate) fn remove(&self, name: &str) -> Option<PersistentBitmap> {
        let mut state = self.0.lock();
        let place = state.all.iter().position(|one| one.name == name)?;
        let one = state.all.remove(place);
        state.gone.extend(one.stored.clone());
        self.set_unsaved();
        Some(one)
    }

    /// The file has these entries for all of them, in their order, and nothing of others.
    pub(crate) fn saved(&self, entries: Vec<DirectoryEntry>) {
        let mut state = self.0.lock();
        for (one, entry) in state.all.iter_mut().zip(entries) {
            one.stored = Some(entry);
        }
        state.gone.clear();
        self.1.store(false, SeqCst);
    }

    /// The file has nothing of those any more that nobody wants.
    pub(crate) fn dropped(&self) {
        self.0.lock().gone.clear();
    }

    /// Refuses a new one that the format has no place for.
    pub(crate) fn check_new(&self, name: &str, granularity: u64, size: u64) -> Result<()> {
        let refuse = |why: &str| Err(Error::new(Kind::Invalid, why));
        let all = self.0.lock();
        let count = all.all.len() as u64 + 1;
        if name.is_empty() || name.len() > LONGEST_NAME {
            return refuse("Bitmap name is too long");
        }
        if count > u64::from(MOST_BITMAPS) {
            return refuse("Maximum number of persistent bitmaps is already reached");
        }
        let lens = all.all.iter().map(|one| entry_len(&one.name)).sum::<u64>();
        if lens + entry_len(name) > MOST_DIRECTORY {
            return refuse("Not enough space in the bitmap directory");
        }
        let bits = granularity.trailing_zeros();
        if !GRANULARITY_BITS.contains(&(bits as u8)) {
            return refuse("Granularity is not one that can be stored");
        }
        check_bytes(size, granularity)
    }

    /// Refuses another size of the disk that one of them cannot follow.
    pub(crate) fn check_size(&self, size: u64) -> Result<()> {
        for one in &self.0.lock().all {
            if is_lost(one) {
                let name = &one.name;
                let message = format!(
                    "Bitmap '{name}' is inconsistent and cannot be used: remove it before the disk gets another size"
                );
                return Err(Error::new(Kind::Unsupported, message));
            }
            check_bytes(size, one.bitmap.granularity())?;
        }
        Ok(())
    }
}

/// Whether it was not stored when it should have been.
fn is_lost(one: &PersistentBitmap) -> bool {
    one.bitmap.info().inconsistent
}

/// Bytes of its entry in the directory.
fn entry_len(name: &str) -> u64 {
    (24 + name.len() as u64).next_multiple_of(8)
}

/// Bytes that the bits for a disk of `size` bytes take.
fn bytes_of(size: u64, granularity: u64) -> u64 {
    size.div_ceil(granularity).div_ceil(8)
}

fn check_bytes(size: u64, granularity: u64) -> Result<()> {
    if bytes_of(size, granularity) <= MOST_BYTES {
        return Ok(());
    }
    let message = "Too much space will be occupied by the bitmap. Use larger granularity";
    Err(Error::new(Kind::Invalid, message))
}
