//! `throttle`: parameters of the filter that keeps a node to the limits of a group. Does not know whether there is such a
//! group.

use super::{BlockDriver, BlockRef, Context, Driver};
use crate::error::Error;
use crate::fields::Fields;

/// Parameters of `throttle` (`BlockdevOptionsThrottle` in QEMU's `qapi/block-core.json`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ThrottleOptions {
    /// The id of the object of type `throttle-group` that has the limits.
    pub throttle_group: String,
    /// The node below.
    pub file: BlockRef,
}

pub(super) const DRIVERS: &[Driver] = &[("throttle", |fields, inside| {
    ThrottleOptions::read(fields, inside).map(BlockDriver::Throttle)
})];

impl ThrottleOptions {
    fn read(fields: &mut Fields<'_>, inside: &Context) -> Result<Self, Error> {
        let throttle_group = fields.text("throttle-group")?;
        let throttle_group = fields.require("throttle-group", throttle_group)?.to_owned();
        let file = BlockRef::read(fields, "file", inside)?;
        let file = fields.require("file", file)?;
        Ok(Self {
            throttle_group,
            file,
        })
    }
}
