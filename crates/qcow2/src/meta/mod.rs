//! The metadata of an open image: where each guest cluster is, which clusters of the file are used, and in which order
//! changes of that reach the disk. It moves no guest data. It must never let the disk refer to something that is not
//! on stable storage, or that is not counted.
//!
//! # Order on disk
//! Changes gather in memory. A [commit](Meta::commit) brings them to the disk:
//! 1. refcounts (and new blocks, then the table that names them), beside the guest data that was written before;
//! 2. `fdatasync`;
//! 3. L2 slices as they were when the commit began, and L1 entries;
//! 4. `fdatasync`.
//!
//! So at every moment what the tables on disk name is on disk, and counted. What the tables stopped naming is taken
//! from its refcount only after step 4, when nothing in flight can touch it any more (`limbo`); a crash in between
//! leaves clusters that are counted and not used (leaks), never the opposite.
//!
//! # Locks
//! Lookups take none. Each structure has one short lock that is never held across I/O. What must wait for I/O of
//! others waits its turn in a queue of wakers, in this order when there are several: guest clusters (the data path's),
//! `preparing`, `tables`, `packing`, `growing`, `committing`, `superblock`.

mod allocate;
mod bitmaps;
mod commit;
mod l1;
mod layout;
mod limbo;
mod lookups;
mod open;
mod refcounts;
mod slices;
#[cfg(all(test, feature = "loom"))]
mod slices_model;
mod superblock;
mod sync;
mod tables;
mod transfer;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam_utils::CachePadded;
use diskfuse_block::{CacheUse, Error, Hold, Holds, Kind, LANES, Node, RangeQueue, Result};
use parking_lot::Mutex;

use crate::format::{Backing, Geometry, Mapping};
use crate::node::OnCorrupt;
use bitmaps::Bitmaps;
use l1::L1;
use layout::Layout;
use limbo::{Freed, Limbo};
use lookups::Lookups;
pub use open::ActiveTable;
use refcounts::Refcounts;
pub use refcounts::Run;
use slices::Slices;
use superblock::Superblock;

/// What the tables say of one guest cluster: the words of an L2 entry, in the host's byte order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// The entry itself.
    pub word: u64,
    /// The bitmap of subclusters (extended L2), else 0.
    pub subclusters: u64,
}

/// What is known of a guest offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lookup {
    /// Its part of the table is not in memory: [`Meta::load`] it, then look again.
    Missing,
    /// There is no table for it, nor for the `len` bytes from it on.
    Unallocated {
        /// Bytes, up to the end of what the table would map; not clipped to the disk.
        len: u64,
    },
    /// The table says this.
    Entry(Entry),
}

/// The metadata of one open image. May be used from any thread; futures run on the ring of the thread that makes them.
pub struct Meta {
    file: Arc<dyn Node>,
    data_file: Option<Arc<dyn Node>>,
    geometry: Geometry,
    version: u32,
    read_only: bool,
    /// Refcounts reach the disk when the image is closed; the dirty bit says so.
    lazy: bool,
    size: AtomicU64,
    superblock: Superblock,
    /// As the header names it now.
    backing: Mutex<Option<Backing>>,
    l1: L1,
    slices: Slices,
    lookups: Lookups,
    /// log2 of the entries in a slice.
    slice_bits: u32,
    refcounts: Refcounts,
    layout: Layout,
    limbo: Limbo,
    holds: Holds,
    /// Clusters that were allocated ahead, for each few threads.
    reserved: [CachePadded<Mutex<Option<Run>>>; LANES],
    /// Clusters allocated at once, if fewer are asked for.
    reserve: u64,
    tables: RangeQueue,
    growing: RangeQueue,
    packing: RangeQueue,
    preparing: RangeQueue,
    committing: RangeQueue,
    commits_begun: AtomicU64,
    commits_done: AtomicU64,
    /// The image was made ready for changes, and none of them went wrong.
    prepared: AtomicBool,
    closed: AtomicBool,
    /// Closing has begun to leave the image clean, and has not come to its end.
    unsettled: AtomicBool,
    broken: Mutex<Option<String>>,
    /// Who is told of that, and has not been told yet.
    on_corrupt: Mutex<Option<OnCorrupt>>,
    /// A contradiction that was found when the image was opened: reading goes on, the first write meets it.
    found_at_open: Mutex<Option<String>>,
    bitmaps: Bitmaps,
    clean_interval: Duration,
    cleaned: Mutex<Instant>,
}

impl Meta {
    /// The numbers of the format.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// The version of the format, 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// Bytes of the disk, as the header says.
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::SeqCst)
    }

    /// Whether changes are refused.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Keeps every place that is looked up from now on from being used for anything else. Take it before
    /// [`Meta::lookup`]; drop it when the transfer is over.
    pub fn enter(&self) -> Hold<'_> {
        match self.read_only {
            true => Hold::none(),
            false => self.holds.enter(),
        }
    }

    /// What the tables say of a guest offset: takes no lock, allocates nothing, waits for nothing.
    pub fn lookup(&self, guest: u64) -> Lookup {
        let (slice, index) = self.place(guest);
        if let Some(entry) = self.slices.get(slice, index) {
            self.lookups.found();
            return Lookup::Entry(entry);
        }
        let table = self.geometry.l1_index(guest);
        if self.l1.get(table).table() != 0 {
            return Lookup::Missing;
        }
        let coverage = self.geometry.l2_coverage();
        Lookup::Unallocated {
            len: coverage - guest % coverage,
        }
    }

    /// How often lookups found what they needed in memory.
    pub fn cache_use(&self) -> CacheUse {
        self.lookups.read()
    }

    /// The slice of an offset and the entry's index in it.
    fn place(&self, guest: u64) -> (u64, usize) {
        let cluster = self.geometry.cluster_of(guest);
        let index = cluster & ((1 << self.slice_bits) - 1);
        (cluster >> self.slice_bits, index as usize)
    }

    /// Whether changes may go on without [`Meta::prepare_to_write`].
    pub fn is_prepared(&self) -> bool {
        self.prepared.load(Ordering::Relaxed)
    }

    /// The error for a change that must not be, if it must not.
    pub(crate) fn check_writable(&self) -> Result<()> {
        if self.read_only {
            let message = format!("'{}' is open for reading only", self.name());
            return Err(Error::new(Kind::ReadOnly, message));
        }
        if let Some(why) = &*self.broken.lock() {
            let message = format!(
                "'{}' is corrupt ({why}): nothing is written to it any more; repair it with `diskfuse check --repair all`",
                self.name()
            );
            return Err(Error::new(Kind::Corrupt, message));
        }
        if self.closed.load(Ordering::SeqCst) {
            let message = format!("'{}' is closed", self.name());
            return Err(Error::new(Kind::Ended, message));
        }
        Ok(())
    }

    /// The image's name, for messages.
    pub fn name(&self) -> String {
        self.file.filename().unwrap_or_else(|| "qcow2".to_owned())
    }

    /// The tables do not name this any more: the caller has just linked something else, or nothing, in its place. Its
    /// clusters lose a reference when that is on stable storage and nothing in flight can touch them; with `discard`
    /// their space is then given back to the host.
    pub fn free(&self, mapping: &Mapping, discard: bool) {
        let bits = self.geometry.cluster_bits();
        let (cluster, count) = match *mapping {
            // Clusters of a data file are not counted.
            Mapping::Normal { .. } | Mapping::Zero { .. } if self.data_file.is_some() => return,
            Mapping::Unallocated | Mapping::Zero { host: None, .. } => return,
            Mapping::Normal { host, .. }
            | Mapping::Zero {
                host: Some(host), ..
            } => (host >> bits, 1),
            Mapping::Compressed(range) => {
                let last = range.offset.saturating_add(range.len.max(1) - 1) >> bits;
                let first = range.offset >> bits;
                (first, last - first + 1)
            }
        };
        self.limbo.add(Freed {
            cluster,
            count,
            discard,
        });
    }
}

impl std::fmt::Debug for Meta {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Meta")
            .field("image", &self.name())
            .field("size", &self.size())
            .finish_non_exhaustive()
    }
}
