//! The log of a run: every storage operation and every guest request with the moments at which it began and ended, on
//! one clock. It must never miss an operation that a disk was told to do.

use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};

use super::model::Model;

/// A moment: one tick for each thing that begins or ends, so that no two are the same.
pub type Time = u64;

/// What a disk was told to do.
#[derive(Clone, Debug)]
pub enum Op {
    /// Put bytes at an offset.
    Write {
        /// Where.
        offset: u64,
        /// What.
        data: Arc<[u8]>,
    },
    /// A range reads as `fill` from now on: zeroes, or what a discard leaves.
    Fill {
        /// Where.
        offset: u64,
        /// How many bytes.
        len: u64,
        /// With what.
        fill: u8,
    },
    /// Another size; new bytes are zero.
    Resize {
        /// Bytes.
        size: u64,
        /// Only if that makes it larger.
        grow: bool,
    },
    /// Everything that ended before is durable when it ends.
    Flush,
}

impl Op {
    /// The bytes that it changes, sizes aside.
    pub fn range(&self) -> std::ops::Range<u64> {
        match self {
            Self::Write { offset, data } => *offset..offset + data.len() as u64,
            Self::Fill { offset, len, .. } => *offset..offset + len,
            Self::Resize { .. } | Self::Flush => 0..0,
        }
    }
}

impl std::fmt::Display for Op {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let range = self.range();
        match self {
            Self::Write { .. } => write!(f, "write {:#x}..{:#x}", range.start, range.end),
            Self::Fill { fill, .. } => {
                write!(f, "fill {:#x}..{:#x} with {fill}", range.start, range.end)
            }
            Self::Resize { size, grow: true } => write!(f, "grow to {size:#x}"),
            Self::Resize { size, .. } => write!(f, "resize to {size:#x}"),
            Self::Flush => f.write_str("flush"),
        }
    }
}

/// One operation of one disk.
#[derive(Clone, Debug)]
pub struct Record {
    /// Which disk.
    pub disk: usize,
    /// What. Of one that failed only the part that was done.
    pub op: Op,
    /// When it began.
    pub began: Time,
    /// When it ended, if it did.
    pub ended: Option<Time>,
    /// Whether it ended well.
    pub ok: bool,
}

/// Everything that happened.
#[derive(Default)]
pub struct Log {
    now: Time,
    /// In the order in which they began.
    pub records: Vec<Record>,
    /// What the guest did.
    pub model: Model,
}

impl Log {
    /// The next moment.
    pub fn tick(&mut self) -> Time {
        self.now += 1;
        self.now
    }

    /// The last moment that something happened at.
    pub fn now(&self) -> Time {
        self.now
    }

    /// An operation begins.
    pub fn begin(&mut self, disk: usize, op: Op) -> usize {
        let began = self.tick();
        self.records.push(Record {
            disk,
            op,
            began,
            ended: None,
            ok: false,
        });
        self.records.len() - 1
    }

    /// An operation ends; `done` replaces it if only a part was done.
    pub fn end(&mut self, record: usize, ok: bool, done: Option<Op>) {
        let now = self.tick();
        let record = &mut self.records[record];
        record.ended = Some(now);
        record.ok = ok;
        if let Some(done) = done {
            record.op = done;
        }
    }

    /// The records of one disk around a moment, for people.
    pub fn show(&self, from: Time, to: Time) -> String {
        let mut lines = Vec::new();
        for record in &self.records {
            if record.began <= to && record.ended.is_none_or(|ended| ended >= from) {
                let ended = record.ended.map_or("…".to_owned(), |t| t.to_string());
                let ok = if record.ok || record.ended.is_none() {
                    ""
                } else {
                    " FAILED"
                };
                lines.push(format!(
                    "  {}–{ended} disk {}: {}{ok}",
                    record.began, record.disk, record.op
                ));
            }
        }
        lines.join("\n")
    }
}

/// A log that disks and guests write to at once.
#[derive(Clone, Default)]
pub struct Recorder(Arc<Mutex<Log>>);

impl Recorder {
    /// Opens the log for one entry.
    pub fn log(&self) -> MutexGuard<'_, Log> {
        self.0.lock()
    }
}
