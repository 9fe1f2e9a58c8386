//! The cache of L2 slices: pieces of L2 tables in memory, found without a lock. It does no I/O. It must never forget a
//! change that is not on disk, and never let a reader take one slice's entries for another's.
//!
//! # How a reader finds an entry
//! `directory[slice]` holds the frame that has the slice, with a number that no other stay of a slice in a frame ever
//! had. A reader takes it, takes the entry out of the frame, and looks at the directory again: if it says the same,
//! the frame held this slice all the time. Entries of two words (extended L2) are read under a sequence number of the
//! frame as well.
//!
//! # The lock
//! One short lock orders everything that changes frames. It is never held across I/O, and readers never take it.

use std::collections::HashMap;
use std::sync::OnceLock;
use std::sync::atomic::Ordering::{Relaxed, Release, SeqCst};
use std::task::Waker;

use diskfuse_block::{Error, Result};

use super::Entry;
use super::sync::{AtomicU8, AtomicU32, AtomicU64, Mutex, Words};

/// Slices of one segment of the directory: a segment is mapped when its first slice is loaded.
const SEGMENT_BITS: u32 = 19;
/// Bits of a directory word that hold the frame's number plus one.
const FRAME_BITS: u32 = 24;
const FRAME_MASK: u64 = (1 << FRAME_BITS) - 1;
/// How often a reader tries again when a two-word entry changes under it.
const TRIES: u32 = 8;

/// L2 slices in memory.
pub(super) struct Slices {
    /// Entries in a slice, and words in an entry.
    entries: usize,
    words_per_entry: usize,
    directory: Box<[OnceLock<Words>]>,
    frames: Words,
    /// Whether a frame was used since the clock's hand last passed.
    referenced: Box<[AtomicU8]>,
    /// Odd while a two-word entry is being stored. Empty where entries are one word.
    sequence: Box<[AtomicU32]>,
    state: Mutex<State>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Use {
    Free,
    Loading,
    Held,
}

#[derive(Clone, Copy)]
struct Frame {
    slice: u64,
    used: Use,
    /// Changed since it was last copied for the disk.
    dirty: bool,
    /// A copy of it is on its way to the disk.
    writing: bool,
}

struct State {
    frames: Vec<Frame>,
    /// Most frames there may be.
    limit: usize,
    free: Vec<usize>,
    hand: usize,
    stays: u64,
    dirty: usize,
    loading: HashMap<u64, Vec<Waker>>,
}

/// What [`Slices::begin_load`] found.
pub(super) enum Begin<'s> {
    /// It is there.
    Present,
    /// Somebody loads it; the waker is called when that is over.
    Wait,
    /// Load it into this.
    Load(Loading<'s>),
    /// Every frame is dirty or busy: write some back first.
    Full,
}

/// A frame that waits for its slice. Dropped before [`Loading::publish`], the load did not happen.
pub(super) struct Loading<'s> {
    slices: &'s Slices,
    slice: u64,
    frame: usize,
}

/// A slice as it was when it was copied.
pub(super) struct Copied {
    pub(super) slice: u64,
    pub(super) words: Vec<u64>,
}

impl Slices {
    /// Room for `limit` slices of `entries` entries, out of `total` that there may ever be.
    pub(super) fn new(
        entries: usize,
        words_per_entry: usize,
        total: u64,
        limit: usize,
    ) -> Result<Self> {
        let limit = limit.clamp(1, FRAME_MASK as usize - 1);
        let words = entries * words_per_entry;
        let segments = (total >> SEGMENT_BITS) + 1;
        Ok(Self {
            entries,
            words_per_entry,
            directory: (0..segments).map(|_| OnceLock::new()).collect(),
            frames: map(limit.saturating_mul(words))?,
            referenced: (0..limit).map(|_| AtomicU8::new(0)).collect(),
            sequence: match words_per_entry {
                1 => Box::default(),
                _ => (0..limit).map(|_| AtomicU32::new(0)).collect(),
            },
            state: Mutex::new(State {
                frames: Vec::new(),
                limit,
                free: Vec::new(),
                hand: 0,
                stays: 0,
                dirty: 0,
                loading: HashMap::new(),
            }),
        })
    }

    /// Entries in a slice.
    pub(super) fn entries(&self) -> u64 {
        self.entries as u64
    }

    fn place(&self, slice: u64) -> Option<&AtomicU64> {
        let segment = self
            .directory
            .get((slice >> SEGMENT_BITS) as usize)?
            .get()?;
        segment.get((slice & ((1 << SEGMENT_BITS) - 1)) as usize)
    }

    fn frame_of(directory: u64) -> Option<usize> {
        ((directory & FRAME_MASK) as usize).checked_sub(1)
    }

    /// Entry `index` of a slice, if the slice is in memory. Takes no lock.
    pub(super) fn get(&self, slice: u64, index: usize) -> Option<Entry> {
        let place = self.place(slice)?;
        for _ in 0..TRIES {
            let seen = place.load(SeqCst);
            let frame = Self::frame_of(seen)?;
            let entry = self.read(frame, index);
            if place.load(SeqCst) == seen
                && let Some(entry) = entry
            {
                if self.referenced[frame].load(Relaxed) == 0 {
                    self.referenced[frame].store(1, Relaxed);
                }
                return Some(entry);
            }
        }
        None
    }

    /// `None` if a store is under way.
    fn read(&self, frame: usize, index: usize) -> Option<Entry> {
        let at = (frame * self.entries + index) * self.words_per_entry;
        if self.words_per_entry == 1 {
            return Some(Entry {
                word: self.frames[at].load(SeqCst),
                subclusters: 0,
            });
        }
        let before = self.sequence[frame].load(SeqCst);
        let entry = Entry {
            word: self.frames[at].load(SeqCst),
            subclusters: self.frames[at + 1].load(SeqCst),
        };
        (before & 1 == 0 && self.sequence[frame].load(SeqCst) == before).then_some(entry)
    }

    /// Looks whether a slice has to be loaded, and by whom.
    pub(super) fn begin_load(&self, slice: u64, waker: &Waker) -> Result<Begin<'_>> {
        let mut state = self.state.lock();
        if self.place(slice).is_some_and(|p| p.load(Relaxed) != 0) {
            return Ok(Begin::Present);
        }
        if let Some(waiting) = state.loading.get_mut(&slice) {
            waiting.push(waker.clone());
            return Ok(Begin::Wait);
        }
        self.make_segment(slice)?;
        let Some(frame) = self.take_frame(&mut state) else {
            return Ok(Begin::Full);
        };
        state.frames[frame] = Frame {
            slice,
            used: Use::Loading,
            dirty: false,
            writing: false,
        };
        state.loading.insert(slice, Vec::new());
        Ok(Begin::Load(Loading {
            slices: self,
            slice,
            frame,
        }))
    }

    fn make_segment(&self, slice: u64) -> Result<()> {
        let Some(segment) = self.directory.get((slice >> SEGMENT_BITS) as usize) else {
            let message = format!("L2 slice {slice} is past the end of the disk");
            return Err(Error::new(diskfuse_block::Kind::Invalid, message));
        };
        if segment.get().is_none() {
            // Under the lock, so nobody else sets it.
            let _ = segment.set(map(1 << SEGMENT_BITS)?);
        }
        Ok(())
    }

    fn take_frame(&self, state: &mut State) -> Option<usize> {
        if let Some(frame) = state.free.pop() {
            return Some(frame);
        }
        if state.frames.len() < state.limit {
            state.frames.push(Frame {
                slice: 0,
                used: Use::Free,
                dirty: false,
                writing: false,
            });
            return Some(state.frames.len() - 1);
        }
        // Twice around: the first pass may only take the marks away.
        for _ in 0..2 * state.frames.len() {
            let frame = state.hand;
            state.hand = (state.hand + 1) % state.frames.len();
            let Frame {
                slice,
                used,
                dirty,
                writing,
            } = state.frames[frame];
            if used != Use::Held || dirty || writing {
                continue;
            }
            if self.referenced[frame].swap(0, Relaxed) == 0 {
                self.forget(slice);
                return Some(frame);
            }
        }
        None
    }

    fn forget(&self, slice: u64) {
        if let Some(place) = self.place(slice) {
            place.store(0, SeqCst);
        }
    }

    /// Stores consecutive entries of a slice that is in memory and marks it dirty; false if it is not in memory.
    /// What is stored is seen by every lookup that begins afterwards.
    pub(super) fn store(&self, slice: u64, index: usize, entries: &[Entry]) -> bool {
        let mut state = self.state.lock();
        let held = self
            .place(slice)
            .and_then(|p| Self::frame_of(p.load(Relaxed)));
        let Some(frame) = held else {
            return false;
        };
        if let Some(sequence) = self.sequence.get(frame) {
            sequence.fetch_add(1, SeqCst);
        }
        for (n, entry) in entries.iter().enumerate() {
            let at = (frame * self.entries + index + n) * self.words_per_entry;
            self.frames[at].store(entry.word, SeqCst);
            if self.words_per_entry > 1 {
                self.frames[at + 1].store(entry.subclusters, SeqCst);
            }
        }
        if let Some(sequence) = self.sequence.get(frame) {
            sequence.fetch_add(1, SeqCst);
        }
        if !std::mem::replace(&mut state.frames[frame].dirty, true) {
            state.dirty += 1;
        }
        true
    }

    /// How many slices are dirty.
    pub(super) fn dirty(&self) -> usize {
        self.state.lock().dirty
    }

    /// Copies every dirty slice and takes it for clean; each must be given to [`Slices::written`] afterwards. One
    /// caller at a time.
    pub(super) fn copy_dirty(&self) -> Vec<Copied> {
        /// Slices copied in one go, so that nobody waits for the lock for long.
        const PIECE: usize = 64;
        let mut copies = Vec::new();
        let mut from = 0;
        loop {
            let mut state = self.state.lock();
            if state.dirty == 0 {
                break;
            }
            let mut piece = 0;
            while from < state.frames.len() && piece < PIECE {
                if state.frames[from].dirty {
                    copies.push(self.copy(&mut state, from));
                    piece += 1;
                }
                from += 1;
            }
            if from >= state.frames.len() {
                break;
            }
        }
        copies
    }

    fn copy(&self, state: &mut State, frame: usize) -> Copied {
        let count = self.entries * self.words_per_entry;
        let words = &self.frames[frame * count..][..count];
        let held = &mut state.frames[frame];
        held.dirty = false;
        held.writing = true;
        state.dirty -= 1;
        Copied {
            slice: held.slice,
            words: words.iter().map(|w| w.load(Relaxed)).collect(),
        }
    }

    /// The copy of a slice reached the disk, or did not: then the slice is dirty again.
    pub(super) fn written(&self, slice: u64, reached: bool) {
        let mut state = self.state.lock();
        let held = self
            .place(slice)
            .and_then(|p| Self::frame_of(p.load(Relaxed)));
        let Some(frame) = held else { return };
        let held = &mut state.frames[frame];
        held.writing = false;
        if !reached && !std::mem::replace(&mut held.dirty, true) {
            state.dirty += 1;
        }
    }

    /// Gives up the memory of clean slices that were not used since the last call.
    pub(super) fn clean(&self) {
        let mut state = self.state.lock();
        let words = self.entries * self.words_per_entry;
        for frame in 0..state.frames.len() {
            let Frame {
                slice,
                used,
                dirty,
                writing,
            } = state.frames[frame];
            if used != Use::Held || dirty || writing {
                continue;
            }
            if self.referenced[frame].swap(0, Relaxed) == 0 {
                self.forget(slice);
                state.frames[frame].used = Use::Free;
                state.free.push(frame);
                self.frames.release(frame * words..(frame + 1) * words);
            }
        }
    }
}

impl Loading<'_> {
    /// The slice's words, as they are on disk but in the host's byte order, can be found from now on.
    pub(super) fn publish(self, words: impl Iterator<Item = u64>) {
        let slices = self.slices;
        let count = slices.entries * slices.words_per_entry;
        let room = &slices.frames[self.frame * count..][..count];
        for (place, word) in room.iter().zip(words) {
            place.store(word, Release);
        }
        let mut state = slices.state.lock();
        state.stays += 1;
        state.frames[self.frame].used = Use::Held;
        slices.referenced[self.frame].store(1, Relaxed);
        if let Some(place) = slices.place(self.slice) {
            place.store(state.stays << FRAME_BITS | (self.frame as u64 + 1), SeqCst);
        }
        let waiting = state.loading.remove(&self.slice);
        drop(state);
        // It is over, and not to be dropped: from here on the frame may be another slice's, and the slice somebody else's to load.
        std::mem::forget(self);
        waiting.into_iter().flatten().for_each(Waker::wake);
    }
}

impl Drop for Loading<'_> {
    fn drop(&mut self) {
        let waiting = {
            let mut state = self.slices.state.lock();
            state.frames[self.frame].used = Use::Free;
            state.free.push(self.frame);
            state.loading.remove(&self.slice)
        };
        waiting.into_iter().flatten().for_each(Waker::wake);
    }
}

fn map(words: usize) -> Result<Words> {
    Words::new(words).map_err(|e| Error::os("map memory for the L2 cache", e))
}
