//! Notices writes to a few ranges of a file. The hot path pays for a walk over the ranges of a file that is watched, and
//! nothing for others.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

/// When a write to a watched range is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// When the file is synchronised, or closed.
    Synced,
    /// When it is closed.
    Closed,
}

/// See the module.
#[derive(Debug)]
pub struct Watch {
    when: When,
    /// In bytes.
    ranges: Vec<Range<u64>>,
    touched: AtomicBool,
}

impl Watch {
    /// Watches `ranges`, in bytes; a few at most.
    pub fn new(when: When, ranges: Vec<Range<u64>>) -> Self {
        Self {
            when,
            ranges,
            touched: AtomicBool::new(false),
        }
    }

    /// `len` bytes at `offset` have been written.
    pub(crate) fn wrote(&self, offset: u64, len: u64) {
        let end = offset.saturating_add(len);
        let touches = |range: &Range<u64>| offset < range.end && range.start < end;
        if self.ranges.iter().any(touches) {
            self.touched.store(true, Ordering::SeqCst);
        }
    }

    /// The file was closed (`closed`) or else synchronised: whether it is time to look, which it is once.
    pub(crate) fn is_due(&self, closed: bool) -> bool {
        (closed || self.when == When::Synced) && self.touched.swap(false, Ordering::SeqCst)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_to_a_watched_range_is_told_once() {
        let watch = Watch::new(When::Synced, vec![0..512, 4096..8192]);
        watch.wrote(512, 3584);
        assert!(!watch.is_due(true));
        watch.wrote(4000, 97);
        assert!(watch.is_due(false));
        assert!(!watch.is_due(false));
        watch.wrote(u64::MAX, u64::MAX);
        assert!(!watch.is_due(false));
    }

    #[test]
    fn some_writes_wait_for_the_end() {
        let watch = Watch::new(When::Closed, Vec::from([Range { start: 0, end: 1 }]));
        watch.wrote(0, 1);
        assert!(!watch.is_due(false));
        assert!(watch.is_due(true));
    }
}
