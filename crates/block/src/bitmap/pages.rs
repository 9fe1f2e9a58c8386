//! The bits of a bitmap: words in pages that are there from the first mark on, in a directory that grows without moving. No
//! lock is taken; a page that was made is never taken away.

use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// Words of a page.
const WORDS: usize = 512;
/// Bits of a page.
const BITS: u64 = WORDS as u64 * 64;
/// Pages of the first segment of the directory; each next one has twice as many.
const FIRST: u64 = 64;
/// Segments, enough for 2^37 bits.
const SEGMENTS: usize = 17;

type Page = Box<[AtomicU64; WORDS]>;
type Segment = Box<[OnceLock<Page>]>;

#[derive(Default)]
pub(super) struct Pages {
    segments: [OnceLock<Segment>; SEGMENTS],
    count: AtomicU64,
}

/// Where the page of this number is: its segment and its place there.
fn place(page: u64) -> (usize, usize) {
    let segment = (page / FIRST + 1).ilog2();
    let before = FIRST * ((1 << segment) - 1);
    (segment as usize, (page - before) as usize)
}

/// The bits of a word that lie in a range of bits which touches it.
fn mask(word: u64, bits: &Range<u64>) -> u64 {
    let first = bits.start.saturating_sub(word * 64).min(64);
    let last = (bits.end - word * 64).min(64);
    let below = |n: u64| if n >= 64 { u64::MAX } else { (1 << n) - 1 };
    below(last) & !below(first)
}

impl Pages {
    /// Bits that are set.
    pub(super) fn count(&self) -> u64 {
        self.count.load(Ordering::SeqCst)
    }

    fn page(&self, page: u64) -> Option<&Page> {
        let (segment, index) = place(page);
        self.segments.get(segment)?.get()?.get(index)?.get()
    }

    /// `None` beyond what a bitmap may have.
    fn make_page(&self, page: u64) -> Option<&Page> {
        let (segment, index) = place(page);
        let pages = || (0..FIRST << segment).map(|_| OnceLock::new()).collect();
        let segment = self.segments.get(segment)?.get_or_init(pages);
        let page = segment.get(index)?;
        Some(page.get_or_init(|| Box::new([const { AtomicU64::new(0) }; WORDS])))
    }

    fn word(page: &Page, word: u64) -> &AtomicU64 {
        &page[word as usize % WORDS]
    }

    /// The 64 bits of a word, the first of them lowest.
    pub(super) fn get(&self, word: u64) -> u64 {
        let page = self.page(word * 64 / BITS);
        page.map_or(0, |page| Self::word(page, word).load(Ordering::SeqCst))
    }

    /// Sets those of the 64 bits of a word that are set in `bits`.
    pub(super) fn put(&self, word: u64, bits: u64) {
        if bits == 0 {
            return;
        }
        if let Some(page) = self.make_page(word * 64 / BITS) {
            let old = Self::word(page, word).fetch_or(bits, Ordering::SeqCst);
            let fresh = u64::from((bits & !old).count_ones());
            self.count.fetch_add(fresh, Ordering::SeqCst);
        }
    }

    /// Sets bits; whether one of them was not.
    pub(super) fn set(&self, bits: Range<u64>) -> bool {
        let mut fresh = 0;
        let mut word = bits.start / 64;
        while word * 64 < bits.end {
            if let Some(page) = self.make_page(word * 64 / BITS) {
                let mask = mask(word, &bits);
                let cell = Self::word(page, word);
                // Most are set already, and looking costs others less than writing. The order is as if it were written.
                if cell.load(Ordering::SeqCst) & mask != mask {
                    let old = cell.fetch_or(mask, Ordering::SeqCst);
                    fresh += u64::from((mask & !old).count_ones());
                }
            }
            word += 1;
        }
        self.count.fetch_add(fresh, Ordering::SeqCst);
        fresh > 0
    }

    /// Clears bits; whether one of them was set.
    pub(super) fn clear(&self, bits: Range<u64>) -> bool {
        let mut gone = 0;
        let mut word = bits.start / 64;
        while word * 64 < bits.end {
            let Some(page) = self.page(word * 64 / BITS) else {
                word = (word * 64 / BITS + 1) * WORDS as u64;
                continue;
            };
            let mask = mask(word, &bits);
            let old = Self::word(page, word).fetch_and(!mask, Ordering::SeqCst);
            gone += u64::from((mask & old).count_ones());
            word += 1;
        }
        self.count.fetch_sub(gone, Ordering::SeqCst);
        gone > 0
    }

    /// The first set bit of a range.
    pub(super) fn next_set(&self, start: u64, end: u64) -> Option<u64> {
        let bits = start..end;
        let mut word = start / 64;
        while word * 64 < end {
            let Some(page) = self.page(word * 64 / BITS) else {
                word = (word * 64 / BITS + 1) * WORDS as u64;
                continue;
            };
            let found = Self::word(page, word).load(Ordering::SeqCst) & mask(word, &bits);
            if found != 0 {
                return Some(word * 64 + u64::from(found.trailing_zeros()));
            }
            word += 1;
        }
        None
    }

    /// The first clear bit from `start` on, or `end`.
    pub(super) fn next_clear(&self, start: u64, end: u64) -> u64 {
        let bits = start..end;
        let mut word = start / 64;
        while word * 64 < end {
            let Some(page) = self.page(word * 64 / BITS) else {
                return (word * 64).max(start);
            };
            let clear = !Self::word(page, word).load(Ordering::SeqCst) & mask(word, &bits);
            if clear != 0 {
                return word * 64 + u64::from(clear.trailing_zeros());
            }
            word += 1;
        }
        end
    }
}
