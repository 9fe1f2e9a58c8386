//! `blkdebug`: parameters of the filter that fails requests by rules, and the file that rules may stand in. Reads no
//! file itself.

use std::path::PathBuf;

use serde_json::{Map, Value};

use super::{BlockDriver, BlockRef, Context, Driver};
use crate::error::Error;
use crate::fields::{Fields, Tree};

/// How many rules of each kind a node may have.
pub const MAX_RULES: usize = 1000;

/// Parameters of `blkdebug` (`BlockdevOptionsBlkdebug` in QEMU's `qapi/block-core.json`).
///
/// The sizes `max-transfer`, `opt-write-zero`, `max-write-zero`, `opt-discard` and `max-discard` are checked as QEMU checks
/// them and not kept: they say how QEMU splits requests, and here nothing splits any.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlkdebugOptions {
    /// The node below.
    pub image: BlockRef,
    /// A file with more rules, which come before those given here; see [`BlkdebugRules::parse`].
    pub config: Option<PathBuf>,
    /// The alignment that the node claims to like: a power of two in bytes, or 0 for that of the node below. Default: 0.
    pub align: u32,
    /// The rules.
    pub rules: BlkdebugRules,
}

/// Rules, each kind in its order: the first one that fits counts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BlkdebugRules {
    /// `inject-error`: what fails.
    pub errors: Vec<InjectErrorOptions>,
    /// `set-state`: what changes the state.
    pub changes: Vec<SetStateOptions>,
}

/// A rule that fails requests (`BlkdebugInjectErrorOptions`). `immediately` is taken and says nothing: it is about how a
/// failure is told inside QEMU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InjectErrorOptions {
    /// The event that brings the rule in force; one of [`EVENTS`].
    pub event: &'static str,
    /// The state that it takes for that; 0: any. Default: 0.
    pub state: i64,
    /// Which requests fail. Default: all but block-status.
    pub iotype: Option<BlkdebugIoType>,
    /// What they are answered, as in errno.h, 0 to 4095; 0: they do not fail. Default: 5 (EIO).
    pub errno: i32,
    /// How long it takes until they fail, in nanoseconds. Default: 0.
    pub delay_ns: u64,
    /// Which sector of 512 bytes a request must be about. Default: any (-1 there).
    pub sector: Option<u64>,
    /// Whether the rule goes when one request has failed. Default: off.
    pub once: bool,
}

/// A rule that changes the state (`BlkdebugSetStateOptions`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetStateOptions {
    /// The event; one of [`EVENTS`].
    pub event: &'static str,
    /// The state that it takes; 0: any. Default: 0.
    pub state: i64,
    /// The new state.
    pub new_state: i64,
}

/// Kinds of request (`BlkdebugIOType`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlkdebugIoType {
    /// `read`
    Read,
    /// `write`: of data.
    Write,
    /// `write-zeroes`
    WriteZeroes,
    /// `discard`
    Discard,
    /// `flush`
    Flush,
    /// `block-status`: the question what a range holds.
    BlockStatus,
}

impl BlkdebugIoType {
    pub(super) const WORDS: &[(&str, Self)] = &[
        ("read", Self::Read),
        ("write", Self::Write),
        ("write-zeroes", Self::WriteZeroes),
        ("discard", Self::Discard),
        ("flush", Self::Flush),
        ("block-status", Self::BlockStatus),
    ];

    /// The word.
    pub fn word(self) -> &'static str {
        let mut words = Self::WORDS.iter();
        words
            .find(|(_, kind)| *kind == self)
            .map_or("", |(word, _)| *word)
    }
}

/// All events of QEMU's schema (`BlkdebugEvent`). Most speak of what happens inside formats of QEMU.
pub const EVENTS: &[&str] = &[
    "l1_update",
    "l1_grow_alloc_table",
    "l1_grow_write_table",
    "l1_grow_activate_table",
    "l2_load",
    "l2_update",
    "l2_update_compressed",
    "l2_alloc_cow_read",
    "l2_alloc_write",
    "read_aio",
    "read_backing_aio",
    "read_compressed",
    "write_aio",
    "write_compressed",
    "vmstate_load",
    "vmstate_save",
    "cow_read",
    "cow_write",
    "reftable_load",
    "reftable_grow",
    "reftable_update",
    "refblock_load",
    "refblock_update",
    "refblock_update_part",
    "refblock_alloc",
    "refblock_alloc_hookup",
    "refblock_alloc_write",
    "refblock_alloc_write_blocks",
    "refblock_alloc_write_table",
    "refblock_alloc_switch_table",
    "cluster_alloc",
    "cluster_alloc_bytes",
    "cluster_free",
    "flush_to_os",
    "flush_to_disk",
    "pwritev_rmw_head",
    "pwritev_rmw_after_head",
    "pwritev_rmw_tail",
    "pwritev_rmw_after_tail",
    "pwritev",
    "pwritev_zero",
    "pwritev_done",
    "empty_image_prepare",
    "l1_shrink_write_table",
    "l1_shrink_free_l2_clusters",
    "cor_write",
    "cluster_alloc_space",
    "none",
];

pub(super) const DRIVERS: &[Driver] = &[("blkdebug", |fields, inside| {
    BlkdebugOptions::read(fields, inside).map(BlockDriver::Blkdebug)
})];

impl BlkdebugOptions {
    fn read(fields: &mut Fields<'_>, inside: &Context) -> Result<Self, Error> {
        let image = BlockRef::read(fields, "image", inside)?;
        let image = fields.require("image", image)?;
        let config = fields.text("config")?.map(PathBuf::from);
        fields.not_built(&["take-child-perms", "unshare-child-perms"])?;
        let rules = BlkdebugRules {
            errors: read_list(fields, "inject-error", InjectErrorOptions::read)?,
            changes: read_list(fields, "set-state", SetStateOptions::read)?,
        };
        Ok(Self {
            image,
            config,
            align: read_sizes(fields)?,
            rules,
        })
    }
}

/// Reads `align` and checks the sizes beside it against it. Returns `align`.
fn read_sizes(fields: &mut Fields<'_>) -> Result<u32, Error> {
    let align = fields.bytes("align")?.unwrap_or(0);
    let kept = u32::try_from(align)
        .ok()
        .filter(|align| *align == 0 || (align.is_power_of_two() && i32::try_from(*align).is_ok()));
    let Some(kept) = kept else {
        return Err(Error::Constraint {
            name: "align",
            value: align,
        });
    };
    let align = align.max(1);
    check_size(fields, "max-transfer", align)?;
    let best = check_size(fields, "opt-write-zero", align)?;
    check_size(fields, "max-write-zero", align.max(best))?;
    let best = check_size(fields, "opt-discard", align)?;
    check_size(fields, "max-discard", align.max(best))?;
    Ok(kept)
}

fn check_size(fields: &mut Fields<'_>, name: &'static str, unit: u64) -> Result<u64, Error> {
    let value = fields.bytes(name)?.unwrap_or(0);
    if i32::try_from(value).is_ok() && value.is_multiple_of(unit) {
        return Ok(value);
    }
    Err(Error::Constraint { name, value })
}

fn read_list<T>(
    fields: &mut Fields<'_>,
    name: &'static str,
    read: impl Fn(Fields<'_>) -> Result<T, Error>,
) -> Result<Vec<T>, Error> {
    let list = fields.groups(name)?;
    if list.len() > MAX_RULES {
        return Err(Error::TooMany { limit: MAX_RULES });
    }
    list.into_iter().map(read).collect()
}

fn read_event(fields: &mut Fields<'_>) -> Result<&'static str, Error> {
    let words: Vec<(&str, &'static str)> = EVENTS.iter().map(|event| (*event, *event)).collect();
    let event = fields.word("event", &words)?;
    fields.require("event", event)
}

impl InjectErrorOptions {
    fn read(mut fields: Fields<'_>) -> Result<Self, Error> {
        let out_of_range = |name: &str, value| Error::OutOfRange {
            name: name.to_owned(),
            value,
        };
        let event = read_event(&mut fields)?;
        let state = fields.integer("state")?.unwrap_or(0);
        let iotype = fields.word("iotype", BlkdebugIoType::WORDS)?;
        let errno = fields.integer("errno")?.unwrap_or(5);
        let delay = fields.integer("delay-ns")?.unwrap_or(0);
        let sector = fields.integer("sector")?.unwrap_or(-1);
        let once = fields.boolean("once")?.unwrap_or(false);
        fields.boolean("immediately")?;
        fields.finish()?;
        Ok(Self {
            event,
            state,
            iotype,
            errno: i32::try_from(errno)
                .ok()
                .filter(|errno| (0..=4095).contains(errno))
                .ok_or_else(|| out_of_range("errno", errno))?,
            delay_ns: u64::try_from(delay).map_err(|_| out_of_range("delay-ns", delay))?,
            sector: match sector {
                -1 => None,
                _ => Some(u64::try_from(sector).map_err(|_| out_of_range("sector", sector))?),
            },
            once,
        })
    }
}

impl SetStateOptions {
    fn read(mut fields: Fields<'_>) -> Result<Self, Error> {
        let event = read_event(&mut fields)?;
        let state = fields.integer("state")?.unwrap_or(0);
        let new_state = fields.integer("new_state")?;
        let new_state = fields.require("new_state", new_state)?;
        fields.finish()?;
        Ok(Self {
            event,
            state,
            new_state,
        })
    }
}

impl BlkdebugRules {
    /// Reads the text of a file of rules. Each is a section, `[inject-error]` or `[set-state]`, of lines `KEY = "VALUE"`;
    /// empty lines and those that begin with `#` say nothing (the file of QEMU's `-readconfig`).
    ///
    /// # Errors
    /// The first mistake, with the number of its line, or of the line where its rule ends.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let mut rules = Self::default();
        let mut section: Option<(&str, Map<String, Value>)> = None;
        let mut count = 0;
        for (number, line) in (1..).zip(text.lines()) {
            count = number;
            let line = line.trim();
            let wrong = |error| Error::ConfigLine {
                line: number,
                error: Box::new(error),
            };
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            if let Some(name) = line.strip_prefix('[').and_then(|l| l.strip_suffix(']')) {
                if let Some(before) = section.replace((name.trim(), Map::new())) {
                    rules.add(before).map_err(wrong)?;
                }
                continue;
            }
            let pair = line.split_once('=').and_then(|(key, value)| {
                let value = value.trim().strip_prefix('"')?.strip_suffix('"')?;
                Some((key.trim().to_owned(), Value::from(value)))
            });
            match (pair, &mut section) {
                (Some((key, value)), Some((_, members))) => members.insert(key, value),
                _ => {
                    return Err(wrong(Error::Object(
                        "expected [inject-error], [set-state] or KEY = \"VALUE\"",
                    )));
                }
            };
        }
        if let Some(last) = section {
            rules.add(last).map_err(|error| Error::ConfigLine {
                line: count,
                error: Box::new(error),
            })?;
        }
        Ok(rules)
    }

    fn add(&mut self, (name, members): (&str, Map<String, Value>)) -> Result<(), Error> {
        let tree = Tree::of_texts(members);
        let fields = tree.fields_despite_help();
        match name {
            "inject-error" => self.errors.push(InjectErrorOptions::read(fields)?),
            "set-state" => self.changes.push(SetStateOptions::read(fields)?),
            _ => {
                return Err(Error::Object(
                    "sections are called [inject-error] or [set-state]",
                ));
            }
        }
        if self.errors.len().max(self.changes.len()) > MAX_RULES {
            return Err(Error::TooMany { limit: MAX_RULES });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
