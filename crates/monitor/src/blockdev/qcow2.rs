//! `qcow2`: parameters of the format with metadata of its own. Says nothing about what is in an image: whether a size of
//! a cache fits its clusters, or whether it has a data file at all, is found out when it is opened.

use super::{BackingRef, BlockDriver, BlockRef, Context, Driver};
use crate::error::Error;
use crate::fields::{Fields, NameOrGroup};

/// Parameters of `qcow2` (`BlockdevOptionsQcow2` in QEMU's `qapi/block-core.json`). `encrypt` is known and refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Qcow2Options {
    /// The node that holds the image file.
    pub file: BlockRef,
    /// What shows where the image itself has nothing.
    pub backing: BackingRef,
    /// The node that holds the data of an image whose header says that they are elsewhere; `None`: the file that the
    /// header names.
    pub data_file: Option<BlockRef>,
    /// Whether refcounts may be written late, at the price of a repair after a crash; `None`: as the image says.
    pub lazy_refcounts: Option<bool>,
    /// Whether guest discards are passed on to the layer below; `None`: if `discard=unmap`.
    pub pass_discard_request: Option<bool>,
    /// Whether space freed by deleting a snapshot is discarded below. Default: on.
    pub pass_discard_snapshot: bool,
    /// Whether other freed space is discarded below. Default: off.
    pub pass_discard_other: bool,
    /// Whether a discarded cluster keeps its place in the image, so that the image does not get fragmented. Default: off.
    pub discard_no_unref: bool,
    /// The metadata that writes are checked not to overwrite, in the order of [`Metadata::ALL`]. Default: that of the
    /// template `cached`.
    pub overlap_check: Vec<Metadata>,
    /// How much metadata is kept in memory.
    pub caches: CacheSizes,
    /// Seconds after which unused cached metadata is dropped; 0: never. Default: 600.
    pub cache_clean_interval: u32,
}

/// Sizes of the metadata caches, in bytes up to `i64::MAX`. `None`: the driver chooses. Neither part is larger than the
/// total, and not all three are given.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CacheSizes {
    /// `cache-size`: of both together.
    pub total: Option<u64>,
    /// `l2-cache-size`: of the L2 tables.
    pub l2: Option<u64>,
    /// `refcount-cache-size`: of the refcount blocks.
    pub refcounts: Option<u64>,
    /// `l2-cache-entry-size`: of one entry of the L2 cache.
    pub l2_entry: Option<u64>,
}

/// One kind of metadata of an image (`Qcow2OverlapCheckFlags` in QEMU's `qapi/block-core.json`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Metadata {
    /// The header.
    MainHeader,
    /// The L1 table in use.
    ActiveL1,
    /// The L2 tables in use.
    ActiveL2,
    /// The refcount table.
    RefcountTable,
    /// The refcount blocks.
    RefcountBlock,
    /// The table of internal snapshots.
    SnapshotTable,
    /// The L1 tables of internal snapshots.
    InactiveL1,
    /// The L2 tables of internal snapshots.
    InactiveL2,
    /// The directory of persistent bitmaps.
    BitmapDirectory,
}

/// How expensive a check may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Template {
    /// No check.
    None,
    /// What takes the same time whatever the image holds.
    Constant,
    /// And what is in memory anyway.
    Cached,
    /// And what has to be read for it.
    All,
}

impl Template {
    const WORDS: &[(&str, Self)] = &[
        ("none", Self::None),
        ("constant", Self::Constant),
        ("cached", Self::Cached),
        ("all", Self::All),
    ];
}

impl Metadata {
    /// Every kind.
    pub const ALL: [Self; 9] = [
        Self::MainHeader,
        Self::ActiveL1,
        Self::ActiveL2,
        Self::RefcountTable,
        Self::RefcountBlock,
        Self::SnapshotTable,
        Self::InactiveL1,
        Self::InactiveL2,
        Self::BitmapDirectory,
    ];

    /// Its name as a parameter.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::MainHeader => "main-header",
            Self::ActiveL1 => "active-l1",
            Self::ActiveL2 => "active-l2",
            Self::RefcountTable => "refcount-table",
            Self::RefcountBlock => "refcount-block",
            Self::SnapshotTable => "snapshot-table",
            Self::InactiveL1 => "inactive-l1",
            Self::InactiveL2 => "inactive-l2",
            Self::BitmapDirectory => "bitmap-directory",
        }
    }

    /// The cheapest template that has it.
    fn template(self) -> Template {
        match self {
            Self::MainHeader
            | Self::ActiveL1
            | Self::RefcountTable
            | Self::SnapshotTable
            | Self::BitmapDirectory => Template::Constant,
            Self::ActiveL2 | Self::RefcountBlock | Self::InactiveL1 => Template::Cached,
            Self::InactiveL2 => Template::All,
        }
    }
}

pub(super) const DRIVERS: &[Driver] = &[("qcow2", |fields, inside| {
    Qcow2Options::read(fields, inside).map(BlockDriver::Qcow2)
})];

impl Qcow2Options {
    /// In the order in which QEMU reads them, so that of two mistakes the same one is told.
    fn read(fields: &mut Fields<'_>, inside: &Context) -> Result<Self, Error> {
        let file = BlockRef::read(fields, "file", inside)?;
        let file = fields.require("file", file)?;
        let backing = BackingRef::read(fields, "backing", inside)?;
        let lazy_refcounts = fields.boolean("lazy-refcounts")?;
        let pass_discard_request = fields.boolean("pass-discard-request")?;
        let pass_discard_snapshot = fields.boolean("pass-discard-snapshot")?.unwrap_or(true);
        let pass_discard_other = fields.boolean("pass-discard-other")?.unwrap_or(false);
        let discard_no_unref = fields.boolean("discard-no-unref")?.unwrap_or(false);
        let overlap_check = read_overlap_check(fields)?;
        let caches = CacheSizes::read(fields)?;
        let cache_clean_interval = fields.integer("cache-clean-interval")?.unwrap_or(600);
        let cache_clean_interval = u32::try_from(cache_clean_interval);
        refuse_encryption(fields)?;
        let data_file = BlockRef::read(fields, "data-file", inside)?;
        Ok(Self {
            file,
            backing,
            data_file,
            lazy_refcounts,
            pass_discard_request,
            pass_discard_snapshot,
            pass_discard_other,
            discard_no_unref,
            overlap_check,
            caches: caches.check()?,
            cache_clean_interval: cache_clean_interval
                .map_err(|_| Error::Caches("Cache clean interval too big"))?,
        })
    }
}

impl CacheSizes {
    fn read(fields: &mut Fields<'_>) -> Result<Self, Error> {
        let total = fields.bytes("cache-size")?;
        let l2 = fields.bytes("l2-cache-size")?;
        let l2_entry = fields.bytes("l2-cache-entry-size")?;
        let refcounts = fields.bytes("refcount-cache-size")?;
        Ok(Self {
            total,
            l2,
            refcounts,
            l2_entry,
        })
    }

    fn check(self) -> Result<Self, Error> {
        let problem = match (self.total, self.l2, self.refcounts) {
            (Some(_), Some(_), Some(_)) => {
                "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time"
            }
            (Some(total), Some(l2), _) if l2 > total => "l2-cache-size may not exceed cache-size",
            (Some(total), _, Some(refcounts)) if refcounts > total => {
                "refcount-cache-size may not exceed cache-size"
            }
            _ => return Ok(self),
        };
        Err(Error::Caches(problem))
    }
}

/// A template, or a template with exceptions.
fn read_overlap_check(fields: &mut Fields<'_>) -> Result<Vec<Metadata>, Error> {
    let template = |metadata: &Metadata, template| metadata.template() <= template;
    let of = |name| {
        let all = Metadata::ALL.into_iter();
        all.filter(|metadata| template(metadata, name)).collect()
    };
    let mut group = match fields.name_or_group("overlap-check", "Qcow2OverlapChecks")? {
        None => return Ok(of(Template::Cached)),
        Some(NameOrGroup::Name(_)) => {
            let name = fields.word("overlap-check", Template::WORDS)?;
            return Ok(of(name.unwrap_or(Template::Cached)));
        }
        Some(NameOrGroup::Group(group)) => group,
    };
    let name = group.word("template", Template::WORDS)?;
    let name = name.unwrap_or(Template::Cached);
    let mut checked = Vec::new();
    for metadata in Metadata::ALL {
        let wanted = group.boolean(metadata.name())?;
        if wanted.unwrap_or_else(|| template(&metadata, name)) {
            checked.push(metadata);
        }
    }
    group.finish()?;
    Ok(checked)
}

fn refuse_encryption(fields: &mut Fields<'_>) -> Result<(), Error> {
    let Some(mut group) = fields.group("encrypt")? else {
        return Ok(());
    };
    let format = group.word("format", &[("aes", "aes"), ("luks", "luks")])?;
    let format = group.require("format", format)?;
    group.text("key-secret")?;
    group.finish()?;
    Err(Error::NotBuilt {
        what: format!("encryption (encrypt.format={format})"),
    })
}

#[cfg(test)]
mod tests;
