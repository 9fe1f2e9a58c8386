//! The hot path: where the bytes of a range are, said at once. It takes no lock, waits for nothing and allocates
//! nothing; whatever would need any of it is work.

use std::sync::atomic::Ordering;

use diskfuse_block::drivers::DetectZeroes;
use diskfuse_block::{Access, Extent, Hold};

use super::Qcow2Node;
use super::walk::{Place, Run};

impl Qcow2Node {
    pub(super) fn resolve_read(&self, offset: u64, len: u64) -> Extent<'_> {
        // Before the lookup: what is found stays where it is from then on.
        let hold = self.meta.enter();
        let Ok(Some(run)) = self.run(offset, len) else {
            return Extent::Work { len };
        };
        let extent = match run.place {
            Place::Data { host, .. } => self.in_data(Access::Read, host, run.len, hold),
            Place::Zero => Extent::Void { len: run.len },
            Place::Unallocated => self.in_backing(offset, run.len),
            Place::Compressed { .. } => Extent::Work { len },
        };
        whole(extent, len)
    }

    pub(super) fn resolve_write(&self, offset: u64, len: u64) -> Extent<'_> {
        let options = &self.options;
        let work = options.compress || options.detect_zeroes != DetectZeroes::Off;
        if work || !self.open_for_writing.load(Ordering::Relaxed) {
            return Extent::Work { len };
        }
        let hold = self.meta.enter();
        let run = self.run(offset, len);
        // After the lookup: see `check_still_writable`.
        if !self.meta.is_prepared() {
            return Extent::Work { len };
        }
        self.record(offset, len);
        match run {
            Ok(Some(Run {
                place: Place::Data { host, copied: true },
                len: there,
            })) => whole(self.in_data(Access::Write, host, there, hold), len),
            _ => Extent::Work { len },
        }
    }

    /// A range of the data file, as far as it is there.
    fn in_data<'a>(&'a self, access: Access, host: u64, len: u64, ours: Hold<'a>) -> Extent<'a> {
        let there = self.data.size().saturating_sub(host).min(len);
        if there == 0 {
            return match access {
                Access::Read => Extent::Void { len },
                Access::Write => Extent::Work { len },
            };
        }
        match self.data.resolve(access, host, there) {
            Extent::Host {
                file,
                offset,
                len,
                hold,
            } if hold.is_none() => Extent::Host {
                file,
                offset,
                len,
                hold: ours,
            },
            // An extent keeps one hold, and this one would need two.
            Extent::Host { len, .. } => Extent::Work { len },
            elsewhere => elsewhere,
        }
    }

    /// A range that is not allocated here, as the backing file has it.
    fn in_backing(&self, offset: u64, len: u64) -> Extent<'_> {
        let Some(backing) = &self.backing else {
            return Extent::Void { len };
        };
        match backing.size().saturating_sub(offset).min(len) {
            0 => Extent::Void { len },
            there => backing.resolve(Access::Read, offset, there),
        }
    }
}

/// What is in pieces is work: those are moved at the same time, and whoever resolves would move one after the other.
fn whole(extent: Extent<'_>, len: u64) -> Extent<'_> {
    match extent {
        Extent::Host { len: there, .. } if there < len => Extent::Work { len },
        extent => extent,
    }
}
