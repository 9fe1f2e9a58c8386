//! L2 tables: bringing slices of them into memory, and changing them. A table that is missing is made, one that a
//! snapshot shares is copied first. It must never change a table that somebody else refers to.

use std::future::poll_fn;
use std::task::Poll;
use std::time::{Duration, Instant};

use diskfuse_block::{Error, Kind, Result};
use diskfuse_ring::sleep;

use super::slices::{Begin, Loading};
use super::{Entry, Meta, transfer};
use crate::format::{L1Entry, Mapping};
use crate::node::OverlapCheck;

impl Meta {
    /// Brings the slice that maps a guest offset into memory, if there is a table for it. Afterwards
    /// [`Meta::lookup`] finds it, unless others needed the room at once: ask in a loop.
    pub async fn load(&self, guest: u64) -> Result<()> {
        let (slice, _) = self.place(guest);
        self.clean_now_and_then();
        let mut missed = false;
        loop {
            let entry = self.l1.get(self.geometry.l1_index(guest));
            if entry.table() == 0 {
                return Ok(());
            }
            let begin = poll_fn(|cx| {
                let begin = self.slices.begin_load(slice, cx.waker());
                if !matches!(begin, Ok(Begin::Present)) && !std::mem::replace(&mut missed, true) {
                    self.lookups.missed();
                }
                match begin {
                    Ok(Begin::Wait) => Poll::Pending,
                    begin => Poll::Ready(begin),
                }
            });
            match begin.await? {
                Begin::Present => return Ok(()),
                Begin::Load(loading) => {
                    if self.fill(loading, slice, entry).await? {
                        return Ok(());
                    }
                }
                Begin::Wait | Begin::Full => self.make_room().await?,
            }
        }
    }

    /// False if the table has moved meanwhile.
    async fn fill(&self, loading: Loading<'_>, slice: u64, table: L1Entry) -> Result<bool> {
        let offset = self.slice_offset(slice, table)?;
        let len = self.slice_bytes();
        let end = offset.checked_add(len as u64);
        if end.is_none_or(|end| end > self.file.size()) {
            let (name, at) = (self.name(), table.table());
            let message =
                format!("'{name}': the L2 table at offset {at:#x} is past the end of the file");
            return Err(Error::new(Kind::Corrupt, message));
        }
        let buf = transfer::read(&*self.file, offset, len).await?;
        let guest = slice << (self.slice_bits + self.geometry.cluster_bits());
        if self.l1.get(self.geometry.l1_index(guest)) != table {
            return Ok(false);
        }
        if !self.read_only {
            self.check_slice(guest, buf.as_slice()).await;
        }
        loading.publish(transfer::words(buf.as_slice()));
        Ok(true)
    }

    /// Entries that name clusters with metadata would let the guest overwrite them: the image takes no more writes.
    async fn check_slice(&self, guest: u64, bytes: &[u8]) {
        if self.data_file.is_some() {
            return;
        }
        let step = self.geometry.words_per_entry();
        let words = transfer::words(bytes).step_by(step);
        let hosts =
            words.filter_map(
                |word| match Mapping::decode(word, self.geometry, self.version) {
                    Ok(
                        Mapping::Normal { host, .. }
                        | Mapping::Zero {
                            host: Some(host), ..
                        },
                    ) => Some(self.geometry.cluster_of(host)),
                    _ => None,
                },
            );
        if let Some(overlap) = self.layout.find(hosts) {
            let at = overlap.cluster << self.geometry.cluster_bits();
            let holds = overlap.holds;
            let why = format!(
                "guest data from {guest:#x} on is said to be at offset {at:#x}, which holds {holds}"
            );
            let _ = self.mark_corrupt(&why).await;
        }
    }

    /// Bytes of a slice on disk.
    fn slice_bytes(&self) -> usize {
        (self.geometry.l2_entry_size() << self.slice_bits) as usize
    }

    /// Where a slice is on disk. [`Kind::Corrupt`] if the L1 entry is not right.
    pub(super) fn slice_offset(&self, slice: u64, table: L1Entry) -> Result<u64> {
        table.check(self.geometry)?;
        let slices = self.geometry.l2_entries() >> self.slice_bits;
        Ok(table.table() + slice % slices * self.slice_bytes() as u64)
    }

    /// Every frame is in use: writes changed slices back, or lets those who load end.
    async fn make_room(&self) -> Result<()> {
        if self.slices.dirty() > 0 {
            return self.commit().await;
        }
        sleep(Duration::from_micros(50)).await;
        Ok(())
    }

    fn clean_now_and_then(&self) {
        if self.clean_interval.is_zero() {
            return;
        }
        let Some(mut last) = self.cleaned.try_lock() else {
            return;
        };
        if last.elapsed() >= self.clean_interval {
            *last = Instant::now();
            drop(last);
            self.slices.clean();
        }
    }

    /// Sets the entries of consecutive guest clusters from `guest` (which begins a cluster) on. The caller has the turn
    /// of these clusters, and what the entries name is written and counted. What was named before is not freed by it.
    /// A lookup that begins after this sees it; it is on disk after the next commit.
    pub async fn link(&self, mut guest: u64, mut entries: &[Entry]) -> Result<()> {
        self.check_writable()?;
        while !entries.is_empty() {
            let (slice, index) = self.place(guest);
            let count = (self.slices.entries() as usize - index).min(entries.len());
            let (now, rest) = entries.split_at(count);
            loop {
                self.own_table(self.geometry.l1_index(guest)).await?;
                self.load(guest).await?;
                if self.slices.store(slice, index, now) {
                    break;
                }
            }
            entries = rest;
            guest += count as u64 * self.geometry.cluster_size();
        }
        Ok(())
    }

    /// Makes sure that there is a table which only the active L1 table refers to.
    async fn own_table(&self, index: u64) -> Result<()> {
        let is_own = |entry: L1Entry| entry.table() != 0 && entry.copied();
        if is_own(self.l1.get(index)) {
            return Ok(());
        }
        let _turn = self.tables.turn(index, 1).await;
        let old = self.l1.get(index);
        if is_own(old) {
            return Ok(());
        }
        if index >= self.l1.len() as u64 {
            let message = format!("'{}': the L1 table has no entry {index}", self.name());
            return Err(Error::new(Kind::Invalid, message));
        }
        old.check(self.geometry)?;
        let run = self.allocate(1).await?;
        let filled = self.fill_table(old, run).await;
        let bits = self.geometry.cluster_bits();
        let checked = filled.map(|()| {
            self.layout
                .add(OverlapCheck::ACTIVE_L2, run.host >> bits, 1)
        });
        match checked {
            Err(error) => {
                self.release_unused(run);
                return Err(error);
            }
            Ok(Some(overlap)) => return Err(self.is_not_free(overlap).await),
            Ok(None) => {}
        }
        self.l1.set(index, L1Entry::new(run.host, true));
        if old.table() != 0 {
            self.layout.remove(old.table() >> bits, 1);
            self.limbo.add(super::Freed {
                cluster: old.table() >> bits,
                count: 1,
                discard: false,
            });
        }
        Ok(())
    }

    /// The content of a new table: that of the one that it replaces, or nothing.
    async fn fill_table(&self, old: L1Entry, run: super::Run) -> Result<()> {
        let size = self.geometry.cluster_size() as usize;
        if old.table() != 0 {
            let table = transfer::read(&*self.file, old.table(), size).await?;
            return transfer::write(&*self.file, run.host, table.as_slice()).await;
        }
        if !run.fresh {
            return transfer::write(&*self.file, run.host, &vec![0; size]).await;
        }
        Ok(())
    }
}
