//! `file` and `host_device`: parameters of the drivers that stand on a file of the host. Never touches the file.

use std::path::PathBuf;

use super::{BlockDriver, Driver};
use crate::error::Error;
use crate::fields::{Fields, OnOffAuto};

/// Parameters of `file` and `host_device` (`BlockdevOptionsFile` in QEMU's `qapi/block-core.json`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileOptions {
    /// The file, as written: relative to the working directory unless it begins with `/`.
    pub filename: PathBuf,
    /// How requests are to reach the kernel; `None`: the driver chooses (QEMU: threads).
    pub aio: Option<Aio>,
    /// Whether the image is locked against other users. Default: auto, where locks that belong to the open file exist.
    pub locking: OnOffAuto,
    /// Whether the page cache is emptied of the file when another host takes over. Default: on.
    pub drop_cache: bool,
}

/// The kernel interface that a user asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Aio {
    /// Blocking calls on worker threads.
    Threads,
    /// Linux AIO. There is no such engine here: it means io_uring, which serves the same purpose. Kept apart so that
    /// a message can repeat the user's word.
    Native,
    /// io_uring.
    IoUring,
}

impl Aio {
    const WORDS: &[(&str, Self)] = &[
        ("threads", Self::Threads),
        ("native", Self::Native),
        ("io_uring", Self::IoUring),
    ];
}

pub(super) const DRIVERS: &[Driver] = &[
    ("file", |fields, _| {
        FileOptions::read(fields).map(BlockDriver::File)
    }),
    ("host_device", |fields, _| {
        FileOptions::read(fields).map(BlockDriver::HostDevice)
    }),
];

impl FileOptions {
    fn read(fields: &mut Fields<'_>) -> Result<Self, Error> {
        let filename = fields.text("filename")?;
        let filename = PathBuf::from(fields.require("filename", filename)?);
        let locking = fields
            .word("locking", OnOffAuto::WORDS)?
            .unwrap_or_default();
        let aio = fields.word("aio", Aio::WORDS)?;
        let drop_cache = fields.boolean("drop-cache")?.unwrap_or(true);
        fields.not_built(&["pr-manager", "aio-max-batch", "x-check-cache-dropped"])?;
        Ok(Self {
            filename,
            aio,
            locking,
            drop_cache,
        })
    }
}
