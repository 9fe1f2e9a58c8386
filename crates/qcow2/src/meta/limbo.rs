//! Clusters that were taken away from the disk and are not free yet. A cluster waits here until the table that no longer
//! names it is on stable storage, and until nothing in flight can touch it. It does no I/O.

use diskfuse_block::{Grace, Holds};
use parking_lot::Mutex;

/// Clusters in a row, each of which lost one reference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Freed {
    /// The first one's number.
    pub(super) cluster: u64,
    pub(super) count: u64,
    /// Their space may be given back to the host when nobody refers to them any more.
    pub(super) discard: bool,
}

#[derive(Default)]
pub(super) struct Limbo(Mutex<State>);

#[derive(Default)]
struct State {
    /// The change is in memory only.
    uncommitted: Vec<Freed>,
    /// The change is on disk.
    durable: Vec<Freed>,
    /// These wait for the holds that exist.
    waiting: Option<(Grace, Vec<Freed>)>,
    /// Nothing can touch these any more.
    ready: Vec<Freed>,
    clusters: u64,
}

impl Limbo {
    /// A reference to each of these clusters was just taken away, in memory.
    pub(super) fn add(&self, freed: Freed) {
        let mut state = self.0.lock();
        state.clusters += freed.count;
        if let Some(last) = state.uncommitted.last_mut()
            && last.discard == freed.discard
            && last.cluster + last.count == freed.cluster
        {
            last.count += freed.count;
            return;
        }
        state.uncommitted.push(freed);
    }

    /// Takes what a commit that begins now will make durable.
    pub(super) fn begin_commit(&self) -> Vec<Freed> {
        std::mem::take(&mut self.0.lock().uncommitted)
    }

    /// That commit has ended.
    pub(super) fn end_commit(&self, freed: Vec<Freed>, durable: bool) {
        let mut state = self.0.lock();
        match durable {
            true => state.durable.extend(freed),
            false => state.uncommitted.extend(freed),
        }
    }

    /// One run that may be freed now, if there is one. Never waits for holds.
    pub(super) fn next(&self, holds: &Holds) -> Option<Leaving<'_>> {
        let mut state = self.0.lock();
        if state.ready.is_empty() {
            if state.waiting.is_none() && !state.durable.is_empty() {
                let batch = std::mem::take(&mut state.durable);
                state.waiting = Some((holds.begin(), batch));
            }
            let (grace, _) = state.waiting.as_mut()?;
            if !holds.is_over(grace) {
                return None;
            }
            state.ready = state.waiting.take()?.1;
        }
        let left = state.ready.pop()?;
        Some(Leaving {
            limbo: self,
            left,
            gone: 0,
        })
    }

    /// Clusters in it, those included that somebody is freeing.
    pub(super) fn clusters(&self) -> u64 {
        self.0.lock().clusters
    }

    /// Whether a commit would bring anything nearer to being free.
    pub(super) fn needs_commit(&self) -> bool {
        !self.0.lock().uncommitted.is_empty()
    }
}

/// A run that is being freed, one cluster after the other. Dropping it puts back what is left of it.
pub(super) struct Leaving<'l> {
    limbo: &'l Limbo,
    left: Freed,
    gone: u64,
}

impl Leaving<'_> {
    /// What is still to be freed.
    pub(super) fn left(&self) -> Freed {
        self.left
    }

    /// The first of what is left is free.
    pub(super) fn one_is_free(&mut self) {
        self.left.cluster += 1;
        self.left.count -= 1;
        self.gone += 1;
    }

    /// What is left cannot be freed: nobody is to try again.
    pub(super) fn leak(mut self) {
        self.gone += std::mem::take(&mut self.left.count);
    }
}

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        let mut state = self.limbo.0.lock();
        state.clusters -= self.gone;
        if self.left.count > 0 {
            state.ready.push(self.left);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(cluster: u64) -> Freed {
        Freed {
            cluster,
            count: 1,
            discard: false,
        }
    }

    #[test]
    fn a_cluster_is_not_free_before_its_commit_and_the_end_of_older_holds() {
        let (limbo, holds) = (Limbo::default(), Holds::default());
        let hold = holds.enter();
        limbo.add(run(7));
        assert!(limbo.next(&holds).is_none(), "not committed");
        let batch = limbo.begin_commit();
        limbo.add(run(9));
        limbo.end_commit(batch, true);
        assert!(limbo.next(&holds).is_none(), "in flight");
        drop(hold);
        let mut leaving = limbo.next(&holds).unwrap();
        assert_eq!(leaving.left(), run(7));
        leaving.one_is_free();
        assert!(limbo.next(&holds).is_none(), "freed after the commit began");
        assert_eq!(limbo.clusters(), 2, "somebody is at it");
        drop(leaving);
        assert!(limbo.needs_commit());
        assert_eq!(limbo.clusters(), 1);
    }

    #[test]
    fn a_failed_commit_frees_nothing() {
        let (limbo, holds) = (Limbo::default(), Holds::default());
        limbo.add(run(7));
        let batch = limbo.begin_commit();
        limbo.end_commit(batch, false);
        assert!(limbo.next(&holds).is_none());
        assert!(limbo.needs_commit());
    }

    #[test]
    fn what_was_not_freed_is_freed_later_unless_it_is_leaked() {
        let (limbo, holds) = (Limbo::default(), Holds::default());
        for cluster in 7..10 {
            limbo.add(run(cluster));
        }
        limbo.end_commit(limbo.begin_commit(), true);
        let mut leaving = limbo.next(&holds).unwrap();
        leaving.one_is_free();
        drop(leaving);
        assert_eq!(limbo.clusters(), 2);
        let leaving = limbo.next(&holds).unwrap();
        assert_eq!((leaving.left().cluster, leaving.left().count), (8, 2));
        leaving.leak();
        assert_eq!(limbo.clusters(), 0);
        assert!(limbo.next(&holds).is_none());
    }

    #[test]
    fn neighbours_are_one_run() {
        let limbo = Limbo::default();
        limbo.add(run(7));
        limbo.add(run(8));
        assert_eq!(limbo.begin_commit().len(), 1);
    }
}
