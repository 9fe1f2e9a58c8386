//! Zeroes and discards: changes of tables, in pieces that others can get in between. A piece is a few clusters of one L2
//! table; what does not fill a cluster (or a subcluster) is written instead, unless the rest of it is zero anyway.

use std::ops::Range;

use diskfuse_block::{Result, Zeroes};
use diskfuse_ring::yield_now;

use super::walk::{Place, Run};
use super::{Qcow2Node, scratch};
use crate::format::{Mapping, Subclusters};
use crate::meta::{Entry, Lookup};

/// Clusters whose entries are changed in one go.
const AT_ONCE: u64 = 1024;
/// Bytes of zeroes written in one go.
const WRITTEN: u64 = 256 << 10;

/// What a range of whole clusters becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Becomes {
    /// Zeroes that keep their place in the file.
    Zeroes,
    /// Zeroes without a place.
    ZeroesWithoutPlace,
    /// Not needed: zeroes, or with no backing file nothing.
    Discarded,
    /// Past the end of the disk: nothing, whatever is below.
    Gone,
}

/// What is to be done with one cluster.
struct Change {
    entry: Entry,
    /// What is not named any more afterwards.
    dropped: Option<Mapping>,
}

impl Qcow2Node {
    pub(super) async fn write_zeroes_now(&self, offset: u64, len: u64, how: Zeroes) -> Result<()> {
        self.check_write(offset, len).await?;
        self.record(offset, len);
        self.zero(offset, len, how).await
    }

    /// Makes a range read as zeroes, for good.
    pub(super) async fn zero(&self, offset: u64, len: u64, how: Zeroes) -> Result<()> {
        self.zero_for_now(offset, len, how).await?;
        if how == Zeroes::Held || self.stands_on_less_than_named() {
            self.hold_zeroes(offset, len).await?;
        }
        Ok(())
    }

    /// Whether the image names a file below it, but was opened without: what it has nothing of reads as zeroes, but not the next
    /// time.
    pub(super) fn stands_on_less_than_named(&self) -> bool {
        self.backing.is_none() && self.meta.names_backing()
    }

    /// Whether what it has nothing of reads as zeroes, now and later.
    fn stands_alone(&self) -> bool {
        self.backing.is_none() && !self.meta.names_backing()
    }

    /// Has the image itself hold what reads as zeroes.
    pub(super) async fn hold_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        // Nothing can be below an image whose data file can be read without it.
        match self.raw_data {
            true => Ok(()),
            false => self.populate_now(offset, len).await,
        }
    }

    /// Makes a range read as zeroes on what is below. Its end may be in the last cluster, past the end of the disk.
    pub(super) async fn zero_for_now(&self, offset: u64, len: u64, how: Zeroes) -> Result<()> {
        let unmap = how != Zeroes::Keep && self.options.discard && !self.keeps_places();
        let becomes = match unmap {
            true => Becomes::ZeroesWithoutPlace,
            false => Becomes::Zeroes,
        };
        let end = offset + len;
        let Some(whole) = self.whole_clusters(offset, end) else {
            return self.zero_parts(offset..end).await;
        };
        self.zero_parts(offset..whole.start).await?;
        if self.version < 3 && !(unmap && self.stands_alone()) {
            // No flag says zero there.
            return self.write_zeroes_to(whole.start..end).await;
        }
        self.change(whole.clone(), becomes).await?;
        if !self.change_last(whole.end..end, becomes).await? {
            self.zero_parts(whole.end..end).await?;
        }
        Ok(())
    }

    pub(super) async fn discard_now(&self, offset: u64, len: u64) -> Result<()> {
        self.check_write(offset, len).await?;
        self.record(offset, len);
        // Without a zero flag, what is discarded would show the backing file.
        let possible = self.version >= 3 || (self.stands_alone() && !self.keeps_places());
        if !self.options.discard || !possible {
            return Ok(());
        }
        // What was never there may show the file below the next time; what was there must not.
        let becomes = match self.stands_on_less_than_named() {
            true => Becomes::ZeroesWithoutPlace,
            false => Becomes::Discarded,
        };
        let end = offset + len;
        if let Some(whole) = self.whole_clusters(offset, end) {
            self.change(whole.clone(), becomes).await?;
            self.change_last(whole.end..end, becomes).await?;
        }
        Ok(())
    }

    /// Takes everything out of the image: it shows what the file below shows, and zeroes past its end. What it held is on no
    /// stable storage any more after the next flush.
    pub async fn make_empty(&self) -> Result<()> {
        self.check_write(0, 0).await?;
        let size = self.meta.size();
        let end = self.geometry.round_up(size).unwrap_or(size);
        self.change(0..end, Becomes::Gone).await
    }

    /// Whether what reads as zeroes keeps its cluster of the file.
    fn keeps_places(&self) -> bool {
        self.options.discard_no_unref || self.raw_data
    }

    /// The clusters that lie within a range, which may be none: then it begins where one begins. `None` if it does not get as far.
    fn whole_clusters(&self, offset: u64, end: u64) -> Option<Range<u64>> {
        let start = self.geometry.round_up(offset)?;
        (start <= end).then(|| start..self.geometry.round_down(end).max(start))
    }

    /// Changes the cluster of which `part` is the beginning, if the disk ends there: then it is all that is used of it. False if it
    /// does not, and nothing is changed.
    async fn change_last(&self, part: Range<u64>, becomes: Becomes) -> Result<bool> {
        if part.is_empty() {
            return Ok(true);
        }
        let size = self.geometry.cluster_size();
        let _turn = self.turns.turn(part.start, size).await;
        // The disk grows with this turn, too.
        if part.end < self.meta.size() {
            return Ok(false);
        }
        self.change_clusters(part.start..part.start + size, becomes)
            .await?;
        Ok(true)
    }

    /// Changes whole clusters, a piece at a time.
    pub(super) async fn change(&self, clusters: Range<u64>, becomes: Becomes) -> Result<()> {
        let size = self.geometry.cluster_size();
        let mut at = clusters.start;
        let mut steps = 0u64;
        while at < clusters.end {
            steps += 1;
            if let Some(end) = self.unchanged(at, clusters.end, becomes) {
                at = end;
                if steps.is_multiple_of(AT_ONCE) {
                    yield_now().await;
                }
                continue;
            }
            let left = (clusters.end - at) / size;
            let count = left.min(AT_ONCE).min(self.clusters_to_border(at)).max(1);
            let piece = at..at + count * size;
            {
                let _turn = self.turns.turn(at, count * size).await;
                self.change_clusters(piece, becomes).await?;
            }
            at += count * size;
            yield_now().await;
        }
        Ok(())
    }

    /// Up to where nothing has to be done because there is no table, and none is needed.
    fn unchanged(&self, at: u64, end: u64, becomes: Becomes) -> Option<u64> {
        let Lookup::Unallocated { len } = self.meta.lookup(at) else {
            return None;
        };
        let end = at.saturating_add(len).min(end);
        let unchanged = becomes == Becomes::Gone || self.backing_reads_zero(at, end);
        (unchanged && !self.raw_data && end > at).then_some(end)
    }

    /// Changes clusters of one L2 table. The caller has their turn.
    async fn change_clusters(&self, piece: Range<u64>, becomes: Becomes) -> Result<()> {
        let size = self.geometry.cluster_size();
        if self.raw_data && becomes != Becomes::Gone {
            // The data say it all: entries that said zero would hide writes in place that are under way from those who
            // read the tables, and not from those who read the data file.
            return self.zero_data(piece, becomes).await;
        }
        let mut changes = Vec::new();
        for n in 0..(piece.end - piece.start) / size {
            let at = piece.start + n * size;
            let old = self.entry(at).await?;
            match self.change_of(at, old, becomes) {
                Ok(change) => changes.push(change),
                Err(error) => return Err(self.found(error).await),
            }
        }
        let mut at = piece.start;
        for row in changes.chunk_by(|a, b| a.is_some() == b.is_some()) {
            let entries: Vec<Entry> = row.iter().flatten().map(|change| change.entry).collect();
            if !entries.is_empty() {
                self.meta.link(at, &entries).await?;
                let dropped = row.iter().flatten().filter_map(|c| c.dropped.as_ref());
                self.give_up(dropped, becomes).await;
            }
            at += row.len() as u64 * size;
        }
        Ok(())
    }

    /// Gives up the places of what was just unlinked.
    async fn give_up<'m>(
        &self,
        dropped: impl Iterator<Item = &'m Mapping> + Clone,
        becomes: Becomes,
    ) {
        let discard = match becomes {
            Becomes::Gone => self.options.pass_discard_other,
            _ => self.options.pass_discard_request,
        };
        self.free(dropped.clone(), discard);
        if !self.external || !discard || self.raw_data {
            return;
        }
        // A place in a data file is used by this cluster only. Reads that are under way, and the tables as they are on
        // disk, may still name it: it must not read as anything but zeroes, which is more than a discard promises.
        let size = self.geometry.cluster_size();
        for mapping in dropped {
            if let Mapping::Normal { host, .. }
            | Mapping::Zero {
                host: Some(host), ..
            } = mapping
            {
                let len = self.data.size().saturating_sub(*host).min(size);
                let given = match len {
                    0 => Ok(()),
                    len => self.data.write_zeroes(*host, len, Zeroes::MayUnmap).await,
                };
                if let Err(error) = given {
                    tracing::debug!(%error, "space of the data file is not given back");
                }
            }
        }
    }

    /// The data file can be read without us: what reads as zeroes here has to be zero there.
    async fn zero_data(&self, piece: Range<u64>, becomes: Becomes) -> Result<()> {
        let len = self.data.size().min(piece.end).saturating_sub(piece.start);
        if len == 0 {
            return Ok(());
        }
        match becomes {
            Becomes::Discarded if self.options.pass_discard_request => {
                self.data
                    .write_zeroes(piece.start, len, Zeroes::MayUnmap)
                    .await
            }
            _ => self.data.write_zeroes(piece.start, len, Zeroes::Keep).await,
        }
    }

    /// `None` if the cluster is as it should be.
    fn change_of(&self, at: u64, old: Entry, becomes: Becomes) -> Result<Option<Change>> {
        let mapping = self.mapping(at, old)?;
        let end = at + self.geometry.cluster_size();
        let is_nothing = mapping == Mapping::Unallocated && old.subclusters == 0;
        if is_nothing && (becomes == Becomes::Gone || self.backing_reads_zero(at, end)) {
            return Ok(None);
        }
        let zero = self.zero_entry(None);
        let entry = match becomes {
            Becomes::Gone => Entry::default(),
            Becomes::Discarded if self.stands_alone() => Entry::default(),
            _ if self.version < 3 => Entry::default(),
            _ => zero,
        };
        let keeps = match becomes {
            Becomes::Zeroes => true,
            Becomes::Discarded => self.keeps_places(),
            Becomes::ZeroesWithoutPlace | Becomes::Gone => false,
        };
        let change = match mapping {
            Mapping::Normal { host, copied: true }
            | Mapping::Zero {
                host: Some(host),
                copied: true,
            } if keeps => Change {
                entry: self.zero_entry(Some(host)),
                dropped: None,
            },
            // What shows zeroes without a place needs nothing else, unless it is to be gone.
            Mapping::Unallocated | Mapping::Zero { host: None, .. } if becomes != Becomes::Gone => {
                let nothing = becomes == Becomes::Discarded && self.stands_alone();
                let entry = match self.version < 3 {
                    true => old,
                    false if nothing => Entry::default(),
                    false => zero,
                };
                Change {
                    entry,
                    dropped: None,
                }
            }
            mapping => Change {
                entry,
                dropped: Some(mapping),
            },
        };
        Ok((change.entry != old).then_some(change))
    }

    /// The entry of a cluster all of which reads as zeroes, with or without a place of its own.
    pub(super) fn zero_entry(&self, host: Option<u64>) -> Entry {
        let copied = host.is_some();
        if !self.geometry.extended_l2() {
            return Entry {
                word: Mapping::Zero { host, copied }.encode(self.geometry),
                subclusters: 0,
            };
        }
        // There the bitmap says so, and the word only where the place is (spec, "Extended L2 Entries").
        let place = match host {
            Some(host) => Mapping::Normal { host, copied },
            None => Mapping::Unallocated,
        };
        Entry {
            word: place.encode(self.geometry),
            subclusters: Subclusters::ALL_ZERO.0,
        }
    }

    /// Zeroes a range that is not whole clusters, at most parts of two.
    async fn zero_parts(&self, range: Range<u64>) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            let next = self.geometry.round_down(at) + self.geometry.cluster_size();
            let end = next.min(range.end);
            self.zero_part(at..end).await?;
            at = end;
        }
        Ok(())
    }

    /// Zeroes a part of one cluster: by the tables as far as that goes, the rest by writing.
    async fn zero_part(&self, part: Range<u64>) -> Result<()> {
        let done = if self.version >= 3 && !self.raw_data {
            self.zero_subclusters(&part).await?
        } else {
            part.start..part.start
        };
        self.write_zeroes_to(part.start..done.start.min(part.end))
            .await?;
        self.write_zeroes_to(done.end.max(part.start)..part.end)
            .await
    }

    /// Sets what whole subclusters lie in a part of a cluster, and those whose rest is zero already, to zero. Returns
    /// the range that reads as zeroes now.
    async fn zero_subclusters(&self, part: &Range<u64>) -> Result<Range<u64>> {
        let size = self.geometry.cluster_size();
        let cluster = self.geometry.round_down(part.start);
        let nothing = part.start..part.start;
        let _turn = self.turns.turn(cluster, size).await;
        let old = self.entry(cluster).await?;
        let mapping = match self.mapping(cluster, old) {
            Ok(mapping) => mapping,
            Err(error) => return Err(self.found(error).await),
        };
        if self.reads_zero(part.start, part.end) {
            return Ok(part.clone());
        }
        let unit = self.geometry.subcluster_size();
        let mut start = part.start / unit * unit;
        if !self.shows_zero(start, part.start) {
            start = start.saturating_add(unit);
        }
        let mut end = part.end.checked_next_multiple_of(unit).unwrap_or(part.end);
        if !self.shows_zero(part.end, end) {
            end = end.saturating_sub(unit);
        }
        if start >= end {
            return Ok(nothing);
        }
        let change = match mapping {
            _ if start == cluster && end == cluster + size => {
                self.change_of(cluster, old, Becomes::Zeroes)?
            }
            Mapping::Compressed(_) => return Ok(nothing),
            _ => {
                let bits = self.subclusters(&(start - cluster..end - cluster));
                let subclusters = Subclusters(old.subclusters).set_zero(bits).0;
                let entry = Entry { subclusters, ..old };
                Some(Change {
                    entry,
                    dropped: None,
                })
            }
        };
        if let Some(change) = change {
            self.meta.link(cluster, &[change.entry]).await?;
            self.free(change.dropped.iter(), self.options.pass_discard_request);
        }
        Ok(start..end)
    }

    /// Writes zeroes where there is no better way.
    pub(super) async fn write_zeroes_to(&self, range: Range<u64>) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            let hold = self.meta.enter();
            let run = match self.run(at, range.end - at) {
                Ok(run) => run,
                Err(error) => return Err(self.found(error).await),
            };
            match run {
                None => {
                    drop(hold);
                    self.load(at).await?;
                }
                Some(Run {
                    place: Place::Data { host, copied: true },
                    len,
                }) => {
                    let there = self.data.size().saturating_sub(host).min(len);
                    if there > 0 {
                        self.check_still_writable()?;
                        self.data.write_zeroes(host, there, Zeroes::Keep).await?;
                    }
                    at += len;
                }
                Some(run) if !self.raw_data && self.reads_zero(at, at + run.len) => at += run.len,
                Some(run) => {
                    drop(hold);
                    let len = run.len.min(WRITTEN);
                    let mut buf = scratch::take(len as usize)?;
                    buf.as_mut_slice().fill(0);
                    let (result, buf) = self.store(at, buf).await;
                    scratch::give(buf);
                    result?;
                    at += len;
                }
            }
        }
        Ok(())
    }
}
