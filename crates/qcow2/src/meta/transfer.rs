//! Metadata to and from the file. It must never move bytes that somebody else may be moving: callers see to the order.

use std::sync::Arc;

use diskfuse_block::{Error, Node, Result, io};
use diskfuse_ring::{Buf, spawn};

/// Most bytes written at once, and most writes under way.
const PIECE: usize = 1 << 20;
const IN_FLIGHT: usize = 16;

/// A buffer of `len` bytes.
pub(super) fn buffer(len: usize) -> Result<Buf> {
    Buf::new(len).map_err(|e| Error::os(format!("allocate {len} bytes"), e))
}

/// `len` bytes of the file from `offset`.
pub(super) async fn read(node: &dyn Node, offset: u64, len: usize) -> Result<Buf> {
    let (result, buf) = io::read(node, offset, buffer(len)?).await;
    result.map(|()| buf)
}

/// Big-endian words from `offset`.
pub(super) async fn read_words(node: &dyn Node, offset: u64, count: usize) -> Result<Vec<u64>> {
    let buf = read(node, offset, count * 8).await?;
    Ok(words(buf.as_slice()).collect())
}

/// Big-endian words in the host's order.
pub(super) fn words(bytes: &[u8]) -> impl Iterator<Item = u64> {
    bytes.as_chunks().0.iter().map(|b| u64::from_be_bytes(*b))
}

/// Writes bytes at `offset`.
pub(super) async fn write(node: &dyn Node, offset: u64, bytes: &[u8]) -> Result<()> {
    let mut buf = buffer(bytes.len())?;
    buf.as_mut_slice().copy_from_slice(bytes);
    io::write(node, offset, buf).await.0
}

/// Writes many pieces, which must not overlap, in no particular order: neighbours in one write, several writes at once.
/// After an error some were written and some not; none is under way any more.
pub(super) async fn write_all(node: &Arc<dyn Node>, mut pieces: Vec<(u64, Vec<u8>)>) -> Result<()> {
    pieces.sort_unstable_by_key(|(offset, _)| *offset);
    let mut runs: Vec<(u64, Vec<u8>)> = Vec::new();
    for (offset, bytes) in pieces {
        match runs.last_mut() {
            Some((start, run))
                if *start + run.len() as u64 == offset && run.len() + bytes.len() <= PIECE =>
            {
                run.extend_from_slice(&bytes);
            }
            _ => runs.push((offset, bytes)),
        }
    }
    let mut runs = runs.into_iter();
    loop {
        let mut outcome = Ok(());
        let batch: Vec<_> = runs.by_ref().take(IN_FLIGHT).collect();
        if batch.is_empty() {
            return Ok(());
        }
        let started = batch.into_iter().map(|(offset, bytes)| {
            let node = Arc::clone(node);
            spawn(async move { write(&*node, offset, &bytes).await })
        });
        for written in started.collect::<Vec<_>>() {
            let written = written.await;
            outcome = outcome.and(written);
        }
        outcome?;
    }
}
