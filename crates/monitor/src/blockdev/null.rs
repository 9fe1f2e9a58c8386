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

pub(super) const DRIVERS: &[Driver] = &[
    ("null-co", |fields, _| {
        NullOptions::read(fields).map(BlockDriver::NullCo)
    }),
    ("null-aio", |fields, _| {
        NullOptions::read(fields).map(BlockDriver::NullAio)
    }),
];

impl Default for NullOptions {
    fn default() -> Self {
        Self {
            size: 1 << 30,
            latency_ns: 0,
            read_zeroes: false,
        }
    }
}

impl NullOptions {
    fn read(fields: &mut Fields<'_>) -> Result<Self, Error> {
        let default = Self::default();
        let size = fields.bytes("size")?.unwrap_or(default.size);
        let latency_ns = match fields.integer("latency-ns")? {
            None => default.latency_ns,
            Some(latency) => u64::try_from(latency).map_err(|_| Error::Invalid {
                name: "latency-ns".to_owned(),
            })?,
        };
        let read_zeroes = fields
            .boolean("read-zeroes")?
            .unwrap_or(default.read_zeroes);
        Ok(Self {
            size,
            latency_ns,
            read_zeroes,
        })
    }
}
