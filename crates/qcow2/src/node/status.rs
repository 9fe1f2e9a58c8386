//! What a range holds, for those who copy or show an image: the tables' word, without reading data.

use diskfuse_block::{Access, BlockStatus, Extent, Result};

use super::Qcow2Node;
use super::walk::{Place, Run};

/// What one image of a chain says about a range, without those below it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layered {
    /// It holds nothing: the backing file shows.
    Unallocated,
    /// It reads as zeroes.
    Zero,
    /// It holds data.
    Data,
    /// It holds compressed data.
    Compressed,
}

/// What one image of a chain holds at the beginning of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerStatus {
    /// Bytes that this is true of; never zero, never more than was asked for.
    pub len: u64,
    /// What it holds.
    pub layered: Layered,
    /// Where data are in the host file, if they are in one as they are.
    pub host_offset: Option<u64>,
}

impl Qcow2Node {
    /// What this image itself holds from `offset` on, `len` bytes (not 0) at most.
    /// [`Kind::Invalid`](diskfuse_block::Kind::Invalid) if that is not within the disk.
    pub async fn layer_status(&self, offset: u64, len: u64) -> Result<LayerStatus> {
        self.check_range(offset, len)?;
        let mut run = self.loaded_run(offset, len).await?;
        let mut host_offset = None;
        let layered = match run.place {
            Place::Unallocated => Layered::Unallocated,
            Place::Zero => Layered::Zero,
            Place::Data { host, .. } => {
                (run.len, host_offset) = self.host_run(host, run.len);
                Layered::Data
            }
            Place::Compressed { .. } => {
                while run.len < len {
                    match self.run(offset + run.len, len - run.len) {
                        Ok(Some(next)) if matches!(next.place, Place::Compressed { .. }) => {
                            run.len += next.len;
                        }
                        _ => break,
                    }
                }
                Layered::Compressed
            }
        };
        Ok(LayerStatus {
            len: run.len,
            layered,
            host_offset,
        })
    }

    pub(super) async fn status(&self, offset: u64, len: u64) -> Result<BlockStatus> {
        let layer = self.layer_status(offset, len).await?;
        let zero = match layer.layered {
            Layered::Zero => true,
            Layered::Data | Layered::Compressed => false,
            Layered::Unallocated => return self.status_below(offset, layer.len).await,
        };
        Ok(BlockStatus {
            len: layer.len,
            zero,
            host_offset: layer.host_offset,
        })
    }

    async fn status_below(&self, offset: u64, len: u64) -> Result<BlockStatus> {
        let nothing = |len| BlockStatus {
            len,
            zero: true,
            host_offset: None,
        };
        let Some(backing) = &self.backing else {
            return Ok(nothing(len));
        };
        match backing.size().saturating_sub(offset).min(len) {
            0 => Ok(nothing(len)),
            there => backing.block_status(offset, there).await,
        }
    }

    pub(super) async fn loaded_run(&self, offset: u64, len: u64) -> Result<Run> {
        loop {
            match self.run(offset, len) {
                Ok(Some(run)) => return Ok(run),
                Ok(None) => self.load(offset).await?,
                Err(error) => return Err(self.found(error).await),
            }
        }
    }

    /// How far a range of the data file is in one piece in a host file, and where.
    fn host_run(&self, host: u64, len: u64) -> (u64, Option<u64>) {
        let there = self.data.size().saturating_sub(host).min(len);
        if there == 0 {
            return (len, None);
        }
        match self.data.resolve(Access::Read, host, there) {
            Extent::Host { offset, len, .. } => (len, Some(offset)),
            elsewhere => (elsewhere.len(), None),
        }
    }
}
