//! Writing what takes more than moving bytes: the first change of an image, tables that are not in memory, clusters
//! that have to be found a place. Data that have a place of their own are written there, everything else is left to
//! `cow`. A range that cannot be written in place is written by one request at a time.

use diskfuse_block::drivers::DetectZeroes;
use diskfuse_block::{Error, Kind, Node, Resize, Result, SECTOR, Zeroes, io};
use diskfuse_ring::Buf;

use super::Qcow2Node;
use super::pieces::{join_pieces, split_pieces, together};
use super::walk::{Place, Run};

impl Qcow2Node {
    pub(super) async fn write_now(&self, offset: u64, buf: Buf) -> (Result<()>, Buf) {
        let len = buf.len() as u64;
        if let Err(error) = self.check_write(offset, len).await {
            return (Err(error), buf);
        }
        self.record(offset, len);
        let how = match self.options.detect_zeroes {
            DetectZeroes::Off => None,
            DetectZeroes::On => Some(Zeroes::Keep),
            DetectZeroes::Unmap => Some(Zeroes::MayUnmap),
        };
        match how {
            Some(how) if io::is_zero(buf.as_slice()) => (self.zero(offset, len, how).await, buf),
            _ => self.store(offset, buf).await,
        }
    }

    pub(super) async fn write_compressed_now(&self, offset: u64, buf: Buf) -> (Result<()>, Buf) {
        let len = buf.len() as u64;
        if let Err(error) = self.check_write(offset, len).await {
            return (Err(error), buf);
        }
        self.record(offset, len);
        self.store_as(offset, buf, self.can_compress()).await
    }

    /// Compressed clusters lie in the image file, so there can be none where the data are in another one.
    pub(super) fn can_compress(&self) -> bool {
        !self.external && !self.read_only
    }

    /// Writes the window of `buf` at `offset`, whatever is there.
    pub(super) async fn store(&self, offset: u64, buf: Buf) -> (Result<()>, Buf) {
        self.store_as(offset, buf, self.options.compress).await
    }

    async fn store_as(&self, offset: u64, mut buf: Buf, compress: bool) -> (Result<()>, Buf) {
        let window = buf.window();
        let mut done = 0;
        let mut outcome = Ok(());
        while done < window.len() && outcome.is_ok() {
            buf.set_window(window.start + done..window.end);
            let stored;
            (stored, buf) = self.store_some(offset + done as u64, buf, compress).await;
            match stored {
                Ok(bytes) => done += bytes as usize,
                Err(error) => outcome = Err(error),
            }
        }
        buf.set_window(window);
        (outcome, buf)
    }

    /// Writes the beginning of the window; returns how much, which may be nothing if it is worth another try.
    async fn store_some(&self, at: u64, buf: Buf, compress: bool) -> (Result<u64>, Buf) {
        let len = buf.len() as u64;
        if !compress {
            return self.store_plain(at, len, buf).await;
        }
        let size = self.geometry.cluster_size();
        match self.geometry.offset_in_cluster(at) {
            0 if len >= size => self.store_compressed(at, buf).await,
            skip => self.store_plain(at, len.min(size - skip), buf).await,
        }
    }

    /// Writes the beginning of the window, `len` bytes at most, uncompressed.
    pub(super) async fn store_plain(&self, at: u64, len: u64, mut buf: Buf) -> (Result<u64>, Buf) {
        let hold = self.meta.enter();
        let in_place = |run: Run| matches!(run.place, Place::Data { copied: true, .. });
        let plan = match self.plan(at, len, in_place) {
            Ok(plan) => plan,
            Err(error) => return (Err(self.found(error).await), buf),
        };
        if let Err(error) = self.check_still_writable() {
            return (Err(error), buf);
        }
        if plan.len > 0 {
            let start = buf.window().start;
            buf.set_window(start..start + plan.len as usize);
            let (result, buf) = self.write_runs(&plan.runs, buf).await;
            drop(hold);
            return (result.map(|()| plan.len), buf);
        }
        // A hold must not be kept while waiting for a table or a turn.
        drop(hold);
        if plan.missing {
            return (self.load(at).await.map(|()| 0), buf);
        }
        self.store_elsewhere(at, buf, len).await
    }

    /// Writes runs that have their place, all at once, from the window of `buf`, which is just as long.
    async fn write_runs(&self, runs: &[Run], buf: Buf) -> (Result<()>, Buf) {
        if let [run] = runs {
            return self.write_run(*run, buf).await;
        }
        let window = buf.window();
        let pieces = split_pieces(buf, runs.iter().map(|run| run.len as usize));
        let writes = runs.iter().zip(pieces);
        let writes = writes.map(|(run, piece)| self.write_run(*run, piece));
        join_pieces(window, together(writes).await)
    }

    async fn write_run(&self, run: Run, buf: Buf) -> (Result<()>, Buf) {
        match run.place {
            Place::Data { host, copied: true } => self.write_data(host, buf).await,
            _ => {
                let message = format!(
                    "'{}': {:?} cannot be written in place",
                    self.name(),
                    run.place
                );
                (Err(Error::new(Kind::Invalid, message)), buf)
            }
        }
    }

    /// Writes to the data file, which grows if need be.
    pub(super) async fn write_data(&self, host: u64, buf: Buf) -> (Result<()>, Buf) {
        if let Err(error) = grow(&*self.data, host + buf.len() as u64).await {
            return (Err(error), buf);
        }
        io::write(&*self.data, host, buf).await
    }
}

/// Makes a node at least `end` bytes long.
pub(super) async fn grow(node: &dyn Node, end: u64) -> Result<()> {
    if end <= node.size() {
        return Ok(());
    }
    let end = end.checked_next_multiple_of(SECTOR).unwrap_or(end);
    node.resize(end, Resize::AtLeast, false).await
}
