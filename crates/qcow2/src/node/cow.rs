//! Writing clusters that have no place of their own yet: a place is found, what the write leaves of a cluster is copied
//! there together with the data, and only then is the cluster linked. What was linked before is given up last. Whatever
//! fails on the way, the disk shows what it showed before.

use std::ops::Range;

use diskfuse_block::Result;
use diskfuse_ring::Buf;

use super::pieces::together;
use super::write::grow;
use super::{Qcow2Node, scratch};
use crate::format::{Mapping, SUBCLUSTERS, Subclusters};
use crate::meta;
use crate::meta::{Entry, Lookup};

/// Bytes up to which data are copied so that they and what surrounds them are one write.
const JOINED: u64 = 256 << 10;
/// Where longer ones are cut.
const CUT: u64 = 64 << 10;

/// Consecutive clusters, of one L2 table, that a write has to give a place to.
struct Group {
    /// The first byte of the first cluster.
    guest: u64,
    /// What they are now.
    old: Vec<(Entry, Mapping)>,
    /// They have a place, without the data; it begins here in the data file.
    reuse: Option<u64>,
}

/// Where the clusters of a group go.
struct Target {
    host: u64,
    /// It reads as zeroes.
    fresh: bool,
    /// What was allocated for it.
    run: Option<meta::Run>,
}

/// How a cluster can be written.
enum Treatment {
    /// It is all there.
    InPlace,
    /// It has a place of its own in the data file, and not all of the data.
    Reuse(u64),
    /// It needs a new place.
    New,
}

impl Qcow2Node {
    /// What the tables say of the cluster at `guest`, loaded if need be.
    pub(super) async fn entry(&self, guest: u64) -> Result<Entry> {
        loop {
            match self.meta.lookup(guest) {
                Lookup::Entry(entry) => return Ok(entry),
                Lookup::Unallocated { .. } => return Ok(Entry::default()),
                Lookup::Missing => self.load(guest).await?,
            }
        }
    }

    /// Clusters from the one that holds `guest` up to the end of their L2 table.
    pub(super) fn clusters_to_border(&self, guest: u64) -> u64 {
        self.geometry.l2_entries() - self.geometry.l2_index(guest)
    }

    /// Writes the beginning of the window, `len` bytes at most, to clusters that need a place; returns how much. That
    /// is nothing if the first of them has got one meanwhile.
    pub(super) async fn store_elsewhere(&self, at: u64, buf: Buf, len: u64) -> (Result<u64>, Buf) {
        let size = self.geometry.cluster_size();
        let first = self.geometry.round_down(at);
        let span = (at - first + len).min(self.clusters_to_border(at) * size);
        let _turn = self.turns.turn(first, span.next_multiple_of(size)).await;
        self.store_with_turn(at, buf, len).await
    }

    /// [`Self::store_elsewhere`] for whoever has the turn on the clusters.
    pub(super) async fn store_with_turn(&self, at: u64, buf: Buf, len: u64) -> (Result<u64>, Buf) {
        let size = self.geometry.cluster_size();
        let (group, target) = match self.prepare(at, at + len).await {
            Ok((group, target)) if !group.old.is_empty() => (group, target),
            Ok(_) => return (Ok(0), buf),
            Err(error) => return (Err(error), buf),
        };
        let end = (at + len).min(group.guest + group.old.len() as u64 * size);
        let (written, buf) = self.write_group(&group, &target, at..end, buf).await;
        let linked = match written {
            Ok(()) => self.link_group(&group, &target, at..end).await,
            Err(error) => {
                if let Some(run) = target.run {
                    self.meta.release_unused(run);
                }
                Err(error)
            }
        };
        (linked.map(|()| end - at), buf)
    }

    async fn prepare(&self, at: u64, end: u64) -> Result<(Group, Target)> {
        let mut group = match self.group(at, end).await {
            Ok(group) => group,
            Err(error) => return Err(self.found(error).await),
        };
        let target = match group.reuse {
            Some(host) => Target {
                host,
                fresh: false,
                run: None,
            },
            None => self.allocate(&mut group).await?,
        };
        Ok((group, target))
    }

    /// The leading clusters of a range that are to be treated alike; none if the first is in place.
    async fn group(&self, at: u64, end: u64) -> Result<Group> {
        let size = self.geometry.cluster_size();
        let guest = self.geometry.round_down(at);
        let limit = self.clusters_to_border(at);
        let mut group = Group {
            guest,
            old: Vec::new(),
            reuse: None,
        };
        for n in 0..limit {
            let cluster = guest + n * size;
            if cluster >= end {
                break;
            }
            let entry = self.entry(cluster).await?;
            let mapping = self.mapping(cluster, entry)?;
            let part = at.max(cluster) - cluster..(end - cluster).min(size);
            let alike = match self.treatment(entry, &mapping, &part) {
                Treatment::InPlace => false,
                Treatment::New => group.reuse.is_none(),
                Treatment::Reuse(host) if n == 0 => {
                    group.reuse = Some(host);
                    true
                }
                Treatment::Reuse(host) => group.reuse.map(|first| first + n * size) == Some(host),
            };
            if !alike {
                break;
            }
            group.old.push((entry, mapping));
        }
        Ok(group)
    }

    fn treatment(&self, entry: Entry, mapping: &Mapping, part: &Range<u64>) -> Treatment {
        match *mapping {
            Mapping::Normal { host, copied: true } => {
                let bits = Subclusters(entry.subclusters);
                let mut touched = self.subclusters(part);
                let complete =
                    !self.geometry.extended_l2() || touched.all(|bit| bits.allocated(bit));
                if complete {
                    Treatment::InPlace
                } else {
                    Treatment::Reuse(host)
                }
            }
            Mapping::Zero {
                host: Some(host),
                copied: true,
            } => Treatment::Reuse(host),
            _ => Treatment::New,
        }
    }

    /// The subclusters that a part of a cluster touches; all of one cluster if there are none.
    pub(super) fn subclusters(&self, part: &Range<u64>) -> Range<u32> {
        let size = self.geometry.subcluster_size();
        (part.start / size) as u32..part.end.div_ceil(size) as u32
    }

    /// Finds a place for as many clusters of the group as lie together; the group becomes those.
    async fn allocate(&self, group: &mut Group) -> Result<Target> {
        let size = self.geometry.cluster_size();
        if self.external {
            // A cluster of a data file is where it is on the disk, as QEMU writes them.
            let host = group.guest;
            let end = self.end_in_data(host + group.old.len() as u64 * size);
            grow(&*self.data, end).await?;
            return Ok(Target {
                host,
                fresh: false,
                run: None,
            });
        }
        if group.old.is_empty() {
            return Ok(Target {
                host: 0,
                fresh: false,
                run: None,
            });
        }
        let run = self.meta.allocate(group.old.len() as u64).await?;
        group.old.truncate(run.clusters as usize);
        Ok(Target {
            host: run.host,
            fresh: run.fresh,
            run: Some(run),
        })
    }

    /// Where what ends at `end` in the data file ends there: one that is a raw image is no longer than the disk.
    pub(super) fn end_in_data(&self, end: u64) -> u64 {
        match self.raw_data {
            true => end.min(self.meta.size()),
            false => end,
        }
    }

    /// Writes the data, and what the clusters need around them, to the target.
    async fn write_group(
        &self,
        group: &Group,
        target: &Target,
        data: Range<u64>,
        mut buf: Buf,
    ) -> (Result<()>, Buf) {
        let host = |guest: u64| target.host + (guest - group.guest);
        let mut whole = self.whole(group, &data);
        whole.end = self.end_in_data(whole.end).max(data.end);
        if target.fresh && self.shows_zero(whole.start, data.start) {
            whole.start = data.start;
        }
        if target.fresh && self.shows_zero(data.end, whole.end) {
            whole.end = data.end;
        }
        let direct = direct_part(&whole, &data);
        let window = buf.window();
        let mut writes = Vec::new();
        for part in [whole.start..direct.start, direct.end..whole.end] {
            if part.is_empty() {
                continue;
            }
            match self.joined(&part, data.start, buf.as_slice()).await {
                Ok(joined) => writes.push((host(part.start), joined)),
                Err(error) => return (Err(error), buf),
            }
        }
        let place = |guest: u64| window.start + (guest - data.start) as usize;
        buf.set_window(place(direct.start.min(data.end))..place(direct.end.min(data.end)));
        if writes.is_empty() {
            let (result, buf) = self.write_data(host(direct.start), buf).await;
            return (result, buf.with_window(window));
        }
        writes.push((host(direct.start), buf));
        let writes = writes.into_iter();
        let writes = writes.map(|(host, buf)| self.write_data(host, buf));
        let mut outcome = Ok(());
        let mut last = None;
        for (result, buf) in together(writes).await {
            outcome = outcome.and(result);
            last.replace(buf).into_iter().for_each(scratch::give);
        }
        // The request's own buffer was the last of them.
        let Some(buf) = last else {
            unreachable!("nothing was written")
        };
        (outcome, buf.with_window(window))
    }

    /// A buffer with a part of what is to be written: data (which begin at guest byte `start`) and what surrounds them.
    async fn joined(&self, part: &Range<u64>, start: u64, data: &[u8]) -> Result<Buf> {
        let end = start + data.len() as u64;
        let ours = start.clamp(part.start, part.end)..end.clamp(part.start, part.end);
        let (before, after) = (part.start..ours.start, ours.end..part.end);
        let mut buf = scratch::take((part.end - part.start) as usize)?;
        let around = if before.is_empty() || after.is_empty() || ours.end - ours.start > CUT {
            [before, after]
        } else {
            // One read costs less than two.
            [part.clone(), part.end..part.end]
        };
        for range in around {
            if !range.is_empty() {
                let at = |guest: u64| (guest - part.start) as usize;
                buf.set_window(at(range.start)..at(range.end));
                let result;
                (result, buf) = self.fill_to_end(range.start, buf).await;
                result?;
            }
        }
        buf.set_window(0..(part.end - part.start) as usize);
        let from = (ours.start - part.start) as usize;
        let data = &data[(ours.start - start) as usize..(ours.end - start) as usize];
        buf.as_mut_slice()[from..from + data.len()].copy_from_slice(data);
        Ok(buf)
    }

    /// Fills the window with what the disk holds; past its end that is nothing, whatever the backing file has there.
    async fn fill_to_end(&self, offset: u64, mut buf: Buf) -> (Result<()>, Buf) {
        let window = buf.window();
        let left = self.meta.size().saturating_sub(offset);
        let there = usize::try_from(left).map_or(window.len(), |n| n.min(window.len()));
        buf.as_mut_slice()[there..].fill(0);
        buf.set_window(window.start..window.start + there);
        let (result, buf) = self.fill(offset, buf).await;
        (result, buf.with_window(window))
    }

    /// The data of a group and what has to be written around them.
    fn whole(&self, group: &Group, data: &Range<u64>) -> Range<u64> {
        let size = self.geometry.cluster_size();
        let last = group.old.len().saturating_sub(1);
        let (Some(head), Some(tail)) = (group.old.first(), group.old.get(last)) else {
            return data.clone();
        };
        let last = group.guest + last as u64 * size;
        let first_part = data.start - group.guest..(data.end - group.guest).min(size);
        let last_part = data.start.max(last) - last..data.end - last;
        group.guest + self.needed(*head, &first_part).start
            ..last + self.needed(*tail, &last_part).end
    }

    /// What has to be written of a cluster so that a part of it can be, in bytes from its beginning.
    fn needed(&self, (entry, mapping): (Entry, Mapping), part: &Range<u64>) -> Range<u64> {
        if !self.geometry.extended_l2() {
            return 0..self.geometry.cluster_size();
        }
        let size = self.geometry.subcluster_size();
        let bits = Subclusters(entry.subclusters);
        let touched = self.subclusters(part);
        let bytes = |bits: &Range<u32>| u64::from(bits.start) * size..u64::from(bits.end) * size;
        match mapping {
            // Subclusters that are there already are not written again: others may be writing them in place.
            Mapping::Normal { copied: true, .. } => {
                let whole = bytes(&touched);
                let head = bits.allocated(touched.start);
                let tail = bits.allocated(touched.end.saturating_sub(1));
                let start = if head { part.start } else { whole.start };
                start..if tail { part.end } else { whole.end }
            }
            Mapping::Normal { .. } | Mapping::Compressed(_) => {
                bytes(&moved(entry, &mapping, touched))
            }
            Mapping::Unallocated | Mapping::Zero { .. } => bytes(&touched),
        }
    }

    /// Makes the target the place of the group's clusters and gives up what they were before.
    async fn link_group(&self, group: &Group, target: &Target, data: Range<u64>) -> Result<()> {
        let size = self.geometry.cluster_size();
        let mut entries = Vec::with_capacity(group.old.len());
        for (n, (entry, mapping)) in (0..).zip(&group.old) {
            let cluster = group.guest + n * size;
            let part = data.start.max(cluster) - cluster..(data.end - cluster).min(size);
            let host = target.host + n * size;
            let word = Mapping::Normal { host, copied: true }.encode(self.geometry);
            let mut subclusters = 0;
            if self.geometry.extended_l2() {
                let old = match mapping {
                    Mapping::Compressed(_) => 0,
                    _ => entry.subclusters,
                };
                let now = moved(*entry, mapping, self.subclusters(&part));
                subclusters = Subclusters(old).set_allocated(now).0;
            }
            entries.push(Entry { word, subclusters });
        }
        if let Err(error) = self.meta.link(group.guest, &entries).await {
            if let Some(run) = target.run {
                self.give_back(group.guest, &entries, run).await;
            }
            return Err(error);
        }
        if target.run.is_some() {
            self.free(group.old.iter().map(|(_, mapping)| mapping), false);
        }
        Ok(())
    }

    /// Gives back what could not be linked. If some of it was, it is kept: rather a leak than one cluster in two places.
    pub(super) async fn give_back(&self, guest: u64, entries: &[Entry], run: meta::Run) {
        let size = self.geometry.cluster_size();
        for (n, entry) in (0..).zip(entries) {
            let now = self.entry(guest + n * size).await;
            if now.is_err() || now.is_ok_and(|now| now.word == entry.word) {
                let name = self.name();
                tracing::warn!(image = name, "clusters that could not be linked are leaked");
                return;
            }
        }
        self.meta.release_unused(run);
    }

    /// Gives up what was just unlinked.
    pub(super) fn free<'m>(&self, old: impl Iterator<Item = &'m Mapping> + Clone, discard: bool) {
        if old
            .clone()
            .any(|mapping| matches!(mapping, Mapping::Compressed(_)))
        {
            self.decompressed.forget();
        }
        for mapping in old {
            self.meta.free(mapping, discard);
        }
    }
}

/// The part of the data that is written from where it is; the rest of `whole`, on both sides, is put together first.
fn direct_part(whole: &Range<u64>, data: &Range<u64>) -> Range<u64> {
    let (head, tail) = (whole.start < data.start, data.end < whole.end);
    if !head && !tail {
        return data.clone();
    }
    if whole.end - whole.start <= JOINED {
        return whole.end..whole.end;
    }
    let up = data.start.checked_next_multiple_of(CUT);
    let first = match (head, up) {
        (true, Some(up)) => up.min(data.end),
        _ => data.start,
    };
    let last = match tail {
        true => (data.end / CUT * CUT).max(first),
        false => data.end,
    };
    first..last
}

/// The subclusters that have data after `touched` were written to a new place: what was elsewhere moves along.
fn moved(entry: Entry, mapping: &Mapping, touched: Range<u32>) -> Range<u32> {
    match mapping {
        Mapping::Compressed(_) => 0..SUBCLUSTERS,
        Mapping::Normal { copied: false, .. } => {
            let bits = Subclusters(entry.subclusters);
            let mut there = (0..SUBCLUSTERS).filter(|&bit| bits.allocated(bit));
            let first = there.next().unwrap_or(touched.start);
            let last = there.next_back().unwrap_or(first);
            first.min(touched.start)..(last + 1).max(touched.end)
        }
        _ => touched,
    }
}
