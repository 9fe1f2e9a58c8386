//! The references that were counted against the refcounts on disk: what differs is a leak or a corruption, and can be
//! adjusted where there is a refcount block to do it in.

use diskfuse_block::Result;

use super::blocks::{Run, Which, each};
use super::counts::{COPIED_CLEAR, COPIED_SET, Counts, STORED_ONE};
use super::findings::CheckResult;
use super::references::Walk;

/// Which refcounts are set to what was counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Adjust {
    /// None.
    None,
    /// Those that are too high.
    Lower,
    /// All that differ.
    All,
}

/// What comparing has shown.
#[derive(Default)]
pub(super) struct Compared {
    /// Perhaps an entry of the active tables says "refcount exactly one" where that is wrong, or the reverse.
    pub(super) copied_wrong: bool,
    /// A cluster in use has no refcount at all.
    pub(super) missing: bool,
    /// One more than the last cluster in use.
    pub(super) used_end: u64,
}

/// The parts of a comparison that the closure of [`each`] needs.
struct Comparing<'w> {
    found: &'w mut CheckResult,
    overlaps: &'w mut std::collections::HashSet<u64>,
    adjust: Adjust,
    most: u64,
    bits: u32,
    compared: Compared,
}

impl Walk<'_, '_> {
    /// Compares all clusters of the file; afterwards the counts say of every cluster whether its refcount on disk is
    /// one.
    pub(super) async fn compare(
        &mut self,
        adjust: Adjust,
        step: &mut dyn FnMut(u64),
    ) -> Result<Compared> {
        let geometry = self.image.geometry;
        let clusters = self.image.clusters().max(self.counts.used_end());
        let per_block = geometry.refcounts_per_block();
        let mut comparing = Comparing {
            found: &mut self.found,
            overlaps: &mut self.overlaps,
            adjust,
            most: geometry.max_refcount(),
            bits: geometry.cluster_bits(),
            compared: Compared::default(),
        };
        let (image, table) = (self.image, &self.refcount_blocks);
        let counts = &mut self.counts;
        each(image, table, counts, clusters, Which::All, |counts, run| {
            if run.index as u64 + run.len as u64 == per_block {
                step(1);
            }
            comparing.run(counts, run)
        })
        .await?;
        let compared = comparing.compared;
        if adjust == Adjust::None {
            // Where refcount and references agree nothing has been said yet.
            let bits = geometry.cluster_bits();
            for cluster in std::mem::take(&mut self.overlaps) {
                self.found.corruption(|| {
                    format!("Structures overlap in the cluster at {}", cluster << bits)
                });
            }
        }
        Ok(compared)
    }
}

impl Comparing<'_> {
    fn run(&mut self, counts: &Counts, mut run: Run<'_>) -> bool {
        let mut changed = false;
        let mut from = 0;
        while let Some(i) = self.agree(&mut run, from) {
            changed |= self.differ(counts, &mut run, i);
            from = i + 1;
        }
        changed
    }

    /// Goes on from the `from`th cluster while all is as it should be; the first where it may not be.
    fn agree(&mut self, run: &mut Run<'_>, from: usize) -> Option<usize> {
        if from >= run.len {
            return None;
        }
        let Some(counters) = &mut run.counters else {
            return (from..run.len).find(|&i| run.stored(i) != 0);
        };
        match &run.block {
            Some(block) if run.order == 4 => {
                let (stored, _) = block.as_chunks::<2>();
                let stored = stored.get(run.index..run.index + run.len)?;
                let pairs = stored.iter().zip(counters.iter_mut()).skip(from);
                let stop = agreeing(pairs.map(|(s, c)| (u64::from(u16::from_be_bytes(*s)), c)));
                self.used(run, from, stop);
                stop.map(|i| from + i)
            }
            _ => {
                let order = run.order;
                let index = run.index;
                let block = run.block.as_deref();
                let pairs = counters
                    .iter_mut()
                    .enumerate()
                    .skip(from)
                    .map(|(i, counter)| {
                        let stored =
                            block.map_or(0, |b| crate::format::refcount::get(b, order, index + i));
                        (stored, counter)
                    });
                let stop = agreeing(pairs);
                self.used(run, from, stop);
                stop.map(|i| from + i)
            }
        }
    }

    /// Remembers the last cluster in use among those that agree.
    fn used(&mut self, run: &Run<'_>, from: usize, stop: Option<usize>) {
        let end = stop.map_or(run.len, |stop| from + stop);
        let Some(counters) = &run.counters else {
            return;
        };
        let count = |counter: &u16| Counts::small(*counter) != Some(0);
        if let Some(last) = counters[from..end].iter().rposition(count) {
            self.compared.used_end = run.first + (from + last) as u64 + 1;
        }
    }

    /// One cluster where something may be wrong, seen exactly.
    #[cold]
    fn differ(&mut self, counts: &Counts, run: &mut Run<'_>, i: usize) -> bool {
        let cluster = run.first + i as u64;
        let stored = run.stored(i);
        let counted = run.counted(counts, i);
        let mut now = stored;
        if stored != counted {
            let at = cluster << self.bits;
            self.overlaps.remove(&cluster);
            let text = || format!("Cluster at {at}: refcount {stored}, but {counted} references");
            if stored < counted {
                self.found.corruption(text);
                self.compared.missing |= stored == 0;
            } else {
                self.found.leak(text);
            }
            let wanted = match self.adjust {
                Adjust::None => false,
                Adjust::Lower => stored > counted,
                Adjust::All => true,
            };
            let value = counted.min(self.most);
            if wanted && run.store(i, value) {
                now = value;
            }
        }
        if now > 0 || counted > 0 {
            self.compared.used_end = cluster + 1;
        }
        if let Some(counters) = &mut run.counters {
            self.compared.copied_wrong |= mark(&mut counters[i], now);
        }
        now != stored
    }
}

/// Walks pairs of refcount and counter while they agree; marks the counters.
#[inline]
fn agreeing<'c>(pairs: impl Iterator<Item = (u64, &'c mut u16)>) -> Option<usize> {
    for (i, (stored, counter)) in pairs.enumerate() {
        let flags = *counter & (COPIED_SET | COPIED_CLEAR);
        let right = if stored == 1 {
            COPIED_CLEAR
        } else {
            COPIED_SET
        };
        if Counts::small(*counter).map(u64::from) != Some(stored) || flags & right != 0 {
            return Some(i);
        }
        *counter = (*counter & !STORED_ONE) | if stored == 1 { STORED_ONE } else { 0 };
    }
    None
}

/// Marks a counter; whether an entry says something else than its refcount.
fn mark(counter: &mut u16, stored: u64) -> bool {
    *counter &= !STORED_ONE;
    if stored == 1 {
        *counter |= STORED_ONE;
        *counter & COPIED_CLEAR != 0
    } else {
        *counter & COPIED_SET != 0
    }
}
