//! `null-co` and `null-aio`: parameters of the drivers that store nothing. Says nothing about how they answer.

use super::{BlockDriver, Driver};
use crate::error::Error;
use crate::fields::Fields;

/// Parameters of `null-co` and `null-aio` (`BlockdevOptionsNull` in QEMU's `qapi/block-core.json`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NullOptions {
    /// Size of the disk in bytes, up to `i64::MAX`. Default: 1 GiB.
    pub size: u64,
    /// How long each request takes, in nanoseconds, up to `i64::MAX`. Default: 0, answered at once.
    pub latency_ns: u64,
    /// Whether reads fill the buffer with zeroes. Default: off, reads leave in it whatever was there; what that is must
    /// not come from another process or request.
    pub read_zeroes: bool,
}

/// The size of a disk when nothing is said: 1 GiB.
const DEFAULT_SIZE: u64 = 1 << 30;

pub(super) const DRIVERS: &[Driver] = &[
    ("null-co", |fields, _| {
        NullOptions::read(fields).map(BlockDriver::NullCo)
    }),
    ("null-aio", |fields, _| {
        NullOptions::read(fields).map(BlockDriver::NullAio)
    }),
];

impl NullOptions {
    fn read(fields: &mut Fields<'_>) -> Result<Self, Error> {
        let size = fields.bytes("size")?.unwrap_or(DEFAULT_SIZE);
        let latency = fields.integer("latency-ns")?.unwrap_or(0);
        let latency_ns = u64::try_from(latency).map_err(|_| Error::Invalid {
            name: "latency-ns".to_owned(),
        })?;
        let read_zeroes = fields.boolean("read-zeroes")?.unwrap_or(false);
        Ok(Self {
            size,
            latency_ns,
            read_zeroes,
        })
    }
}
