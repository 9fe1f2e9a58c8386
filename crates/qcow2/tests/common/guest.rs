//! Guests: random requests to an open disk, told to the model at their beginning and end, and every read compared with
//! what it may find.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use diskfuse_block::{Node, Resize, Result, Zeroes, io};
use diskfuse_ring::Buf;

use super::SECTOR;
use super::case::Case;
use super::log::Recorder;
use super::model::{Ask, Version, stamp};
use super::rng::Rng;

/// Longer than any run takes.
pub const LIMIT: Duration = Duration::from_secs(60);

/// A disk, with what the guests of one run share.
#[derive(Clone)]
pub struct Guest {
    node: Arc<dyn Node>,
    recorder: Recorder,
    versions: Arc<AtomicU64>,
}

/// Versions below are those of what was there before.
pub const FIRST: Version = 10;

impl Guest {
    /// Guests whose versions begin at `first`.
    pub fn new(node: Arc<dyn Node>, recorder: &Recorder, first: Version) -> Self {
        Self {
            node,
            recorder: recorder.clone(),
            versions: Arc::new(AtomicU64::new(first)),
        }
    }

    /// Tells the model of a request around it.
    async fn ask<T>(
        &self,
        ask: Ask,
        sector: u64,
        count: u64,
        request: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let id = {
            let mut log = self.recorder.log();
            let now = log.tick();
            log.model.begin(now, ask, sector, count)
        };
        let answer = request.await;
        let mut log = self.recorder.log();
        let now = log.tick();
        log.model.end(now, id, answer.is_ok());
        answer
    }

    /// Writes a version of its own.
    pub async fn write(&self, sector: u64, count: u64) -> Result<()> {
        let version = self.versions.fetch_add(1, Ordering::Relaxed);
        let mut buf = Buf::new((count * SECTOR) as usize).unwrap();
        stamp(sector, version, buf.as_mut_slice());
        let request = async { io::write(&*self.node, sector * SECTOR, buf).await.0 };
        self.ask(Ask::Write(version), sector, count, request).await
    }

    /// Writes zeroes.
    pub async fn zero(&self, sector: u64, count: u64, how: Zeroes) -> Result<()> {
        let request = self.node.write_zeroes(sector * SECTOR, count * SECTOR, how);
        self.ask(Ask::Write(0), sector, count, request).await
    }

    /// Discards.
    pub async fn discard(&self, sector: u64, count: u64) -> Result<()> {
        let request = self.node.discard(sector * SECTOR, count * SECTOR);
        self.ask(Ask::Discard, sector, count, request).await
    }

    /// Flushes: from its end on all that had ended before is promised.
    pub async fn flush(&self) -> Result<()> {
        let began = self.recorder.log().tick();
        self.node.flush().await?;
        self.promise(began);
        Ok(())
    }

    /// Something has ended that is as good as a flush which began at `began`.
    pub fn promise(&self, began: u64) {
        let mut log = self.recorder.log();
        let now = log.tick();
        log.model.flushed(now, began);
    }

    /// Changes the size.
    pub async fn resize(&self, size: u64) -> Result<()> {
        let id = {
            let mut log = self.recorder.log();
            let now = log.tick();
            let from = self.node.size();
            log.model.begin_resize(now, from, size)
        };
        let answer = self.node.resize(size, Resize::Exactly, false).await;
        let mut log = self.recorder.log();
        let now = log.tick();
        log.model.end_resize(now, id, answer.is_ok());
        answer
    }

    /// Reads, and panics if it finds what it must not.
    pub async fn read(&self, sector: u64, count: u64) -> Result<()> {
        let began = self.recorder.log().tick();
        let buf = Buf::new((count * SECTOR) as usize).unwrap();
        let (result, buf) = io::read(&*self.node, sector * SECTOR, buf).await;
        result?;
        let mut log = self.recorder.log();
        let now = log.tick();
        if let Err(error) = log.model.compare(sector, buf.as_slice(), began, now) {
            let log = log.show(began, now);
            panic!(
                "read of {count} sectors at {sector}, from {began} to {now}: {error}\nstorage:\n{log}"
            );
        }
        Ok(())
    }

    /// One random request within the first `limit` bytes. What fails is for the caller to judge.
    pub async fn random(&self, case: &Case, limit: u64, rng: &mut Rng) -> Result<()> {
        let sectors = limit / SECTOR;
        let mut count = rng.length(1, case.most / SECTOR).min(sectors);
        let mut sector = rng.below(sectors - count + 1);
        if rng.chance(40) {
            // Whole clusters.
            let cluster = case.cluster_size / SECTOR;
            sector -= sector % cluster;
            count = count.next_multiple_of(cluster).min(sectors - sector);
        }
        if case.backing && rng.chance(15) {
            // Nobody can see it.
            return self.node.populate(sector * SECTOR, count * SECTOR).await;
        }
        let kind = rng.below(100);
        let (flushes, discards) = (case.flushes, case.flushes + case.discards);
        let zeroes = discards + case.zeroes;
        match kind {
            kind if kind < flushes => self.flush().await,
            kind if kind < discards => self.discard(sector, count).await,
            kind if kind < zeroes => {
                let how = rng.pick(&[Zeroes::Keep, Zeroes::MayUnmap]);
                self.zero(sector, count, how).await
            }
            kind if kind < zeroes + 12 => self.read(sector, count).await,
            _ => self.write(sector, count).await,
        }
    }
}
