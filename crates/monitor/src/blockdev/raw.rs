//! `raw`: parameters of the format that has none: a window on another node.

use super::{BlockDriver, BlockRef, Context, Driver};
use crate::error::Error;
use crate::fields::Fields;

/// Parameters of `raw` (`BlockdevOptionsRaw` in QEMU's `qapi/block-core.json`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawOptions {
    /// Where the window begins in the node below, in bytes, up to `i64::MAX`. Default: 0.
    pub offset: u64,
    /// Its length in bytes, up to `i64::MAX`; `None`: to the end of the node below.
    pub size: Option<u64>,
    /// The node below.
    pub file: BlockRef,
}

pub(super) const DRIVERS: &[Driver] = &[("raw", |fields, inside| {
    RawOptions::read(fields, inside).map(BlockDriver::Raw)
})];

impl RawOptions {
    fn read(fields: &mut Fields<'_>, inside: &Context) -> Result<Self, Error> {
        let file = BlockRef::read(fields, "file", inside)?;
        let file = fields.require("file", file)?;
        let offset = fields.bytes("offset")?.unwrap_or(0);
        let size = fields.bytes("size")?;
        Ok(Self { offset, size, file })
    }
}
