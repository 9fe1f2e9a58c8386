//! Changing the size of the disk. What is new reads as zeroes, whatever the backing file has there or an earlier, larger
//! disk left: the disk says that it is larger when that is so. What is cut off gives its clusters back when the disk says
//! that it is smaller: a crash in between leaves the disk as it was, or clusters past its end that nobody sees.

use diskfuse_block::{Error, Kind, Resize, Result, SECTOR, Zeroes};

use super::Qcow2Node;
use super::write::grow;
use super::zeroes::Becomes;
use crate::format::{Mapping, SUBCLUSTERS, Subclusters};
use crate::meta::Entry;

impl Qcow2Node {
    pub(super) async fn resize_now(&self, size: u64, how: Resize, preallocate: bool) -> Result<()> {
        let _turn = self.resizing.turn(0, 1).await;
        let old = self.meta.size();
        if size == old || (how == Resize::AtLeast && size < old) {
            return Ok(());
        }
        self.check_resize(size)?;
        self.check_write(0, 0).await?;
        let changed = match size < old {
            true => self.shrink(old, size).await,
            false => self.grow(old, size).await,
        };
        // Whatever came after the size.
        self.resize_bitmaps();
        changed?;
        if preallocate && size > old {
            self.preallocate(old, size).await?;
        }
        Ok(())
    }

    fn check_resize(&self, size: u64) -> Result<()> {
        let name = self.name();
        let refuse = |kind, why: &str| Err(Error::new(kind, format!("'{name}': {why}")));
        if !size.is_multiple_of(SECTOR) || i64::try_from(size).is_err() {
            let why = format!(
                "a disk of {size} bytes cannot be: sizes are multiples of {SECTOR}, below 8 EiB"
            );
            return refuse(Kind::Invalid, &why);
        }
        let header = self.header();
        if header.snapshot_count > 0 && header.version < 3 {
            let why = "a version 2 image with internal snapshots cannot be resized, as those do not remember their size; delete them first";
            return refuse(Kind::Unsupported, why);
        }
        let followed = self.persistent.check_size(size);
        followed.map_err(|error| Error::new(error.kind(), format!("'{name}': {error}")))
    }

    async fn shrink(&self, old: u64, size: u64) -> Result<()> {
        let end = |size| self.geometry.round_up(size).unwrap_or(u64::MAX);
        self.meta.set_size(size).await?;
        self.change(end(size)..end(old), Becomes::Gone).await?;
        if self.raw_data {
            self.data.resize(size, Resize::Exactly, false).await?;
        }
        Ok(())
    }

    async fn grow(&self, old: u64, size: u64) -> Result<()> {
        // What the last cluster has past the end was never anybody's: the rest of a larger disk, or the backing file's.
        let last = self.geometry.round_up(old).unwrap_or(size).min(size);
        self.write_zeroes_to(old..last).await?;
        self.meta.make_room_for(size).await?;
        if self.external {
            grow(&*self.data, size).await?;
        }
        if size > last {
            self.zero_for_now(last, size - last, Zeroes::MayUnmap)
                .await?;
        }
        self.meta.commit().await?;
        {
            // Whoever zeroes the last cluster as a whole, because nothing of it is used past the end, has done so or sees the new end.
            let cluster = self.geometry.round_down(old);
            let _turn = self.turns.turn(cluster, last.max(old + 1) - cluster).await;
            self.meta.set_size(size).await?;
        }
        // Without a flag for it only data could do that, and nobody has asked for so many.
        if self.version >= 3 && self.stands_on_less_than_named() {
            self.hold_zeroes(old, size - old).await?;
            self.meta.commit().await?;
        }
        Ok(())
    }

    /// Gives clusters to the disk from `old` on that has none there.
    async fn preallocate(&self, old: u64, size: u64) -> Result<()> {
        let cluster_size = self.geometry.cluster_size();
        let mut at = self.geometry.round_up(old).unwrap_or(size);
        while at < size {
            let left = (size - at).div_ceil(cluster_size);
            let count = left.min(self.clusters_to_border(at));
            let _turn = self.turns.turn(at, count * cluster_size).await;
            let mut free = 0;
            while free < count && self.is_bare(at + free * cluster_size).await? {
                free += 1;
            }
            at += match free {
                0 => cluster_size,
                free => self.preallocate_run(at, free).await? * cluster_size,
            };
        }
        Ok(())
    }

    /// Whether a cluster has no place yet, and shows nothing but zeroes.
    async fn is_bare(&self, guest: u64) -> Result<bool> {
        let entry = self.entry(guest).await?;
        let mapping = self.mapping(guest, entry)?;
        let has_place = !matches!(
            mapping,
            Mapping::Unallocated | Mapping::Zero { host: None, .. }
        );
        Ok(!has_place && self.reads_zero(guest, guest + self.geometry.cluster_size()))
    }

    /// Gives up to `count` clusters a place, as many as lie together; returns how many.
    async fn preallocate_run(&self, guest: u64, count: u64) -> Result<u64> {
        let size = self.geometry.cluster_size();
        let run = match self.external {
            true => None,
            false => Some(self.meta.allocate(count).await?),
        };
        let (host, count) = run.map_or((guest, count), |run| (run.host, run.clusters));
        let entries = (0..count).map(|n| {
            let host = host + n * size;
            let subclusters = match self.geometry.extended_l2() {
                true => Subclusters(0).set_allocated(0..SUBCLUSTERS).0,
                false => 0,
            };
            let word = Mapping::Normal { host, copied: true }.encode(self.geometry);
            Entry { word, subclusters }
        });
        let entries: Vec<_> = entries.collect();
        let filled = async {
            let end = self.end_in_data(host + count * size);
            grow(&*self.data, end).await?;
            self.data.write_zeroes(host, end - host, Zeroes::Keep).await
        };
        let linked = match filled.await {
            Ok(()) => self.meta.link(guest, &entries).await,
            Err(error) => Err(error),
        };
        if let (Err(_), Some(run)) = (&linked, run) {
            self.give_back(guest, &entries, run).await;
        }
        linked.map(|()| count)
    }
}
