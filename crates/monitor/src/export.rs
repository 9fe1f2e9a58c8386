//! What `--export` says: which node to show to whom. Knows no node and no mountpoint.

use std::num::{NonZeroU8, NonZeroU16};
use std::path::PathBuf;

use serde_json::{Map, Value};

use crate::error::Error;
use crate::fields::{self, Fields, OnOffAuto, Tree};
use crate::ident;

mod shape;
mod transport;

pub(crate) use shape::shape;

pub use transport::{Placement, Transport, TransportOptions, parse_cpus};

/// The greatest number of queues of one export, and so of its own threads and of the iothreads in its list.
pub const MAX_QUEUES: usize = 64;

/// One export: the argument of `--export` (`BlockExportOptions` in QEMU's `qapi/block-export.json`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportOptions {
    /// The export's name: a letter, then letters, digits, `-`, `.` and `_`.
    pub id: String,
    /// The node to show, as written. Whether it exists is for the graph to say.
    pub node_name: String,
    /// Whether others may write to it. Default: off.
    pub writable: bool,
    /// Whose threads serve it.
    pub threads: ExportThreads,
    /// `fixed-iothread`: when the node cannot be brought into the export's iothread, fail instead of serving from where
    /// the node is. Default: off.
    pub fixed_iothread: bool,
    /// The type of the export and the parameters that only it has.
    pub kind: ExportKind,
}

/// Which threads serve an export; as many queues as threads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExportThreads {
    /// Nothing was said: one queue, served wherever the node lives.
    Node,
    /// `iothread=NAME`: one queue on this iothread. Whether it exists is for the caller to say.
    Iothread(String),
    /// `iothread.0=NAME,…`: one queue on each of these, 1 to [`MAX_QUEUES`] of them; a name may come twice.
    Iothreads(Vec<String>),
    /// `threads=N`, not known to QEMU: the export makes its own threads, 1 to [`MAX_QUEUES`], and ends them with itself.
    Own(NonZeroU8),
}

/// The types of export that exist.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExportKind {
    /// `fuse`: a plain file.
    Fuse(FuseExportOptions),
}

/// Parameters of a FUSE export (`BlockExportOptionsFuse` in QEMU's `qapi/block-export.json`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FuseExportOptions {
    /// The file over which the export is mounted, as written.
    pub mountpoint: PathBuf,
    /// Whether writes past the end make the disk larger. Default: off.
    pub growable: bool,
    /// Whether other users may open the file; auto tries on and falls back to off. Default: auto.
    pub allow_other: OnOffAuto,
    /// `max-background`, not known to QEMU: how many asynchronous requests the kernel may have outstanding
    /// (`max_background` of `FUSE_INIT`). Default: the export chooses.
    pub max_background: Option<NonZeroU16>,
    /// How requests come and answers go.
    pub transport: TransportOptions,
}

/// Types of export that `qemu-storage-daemon` knows (`BlockExportType` in `qapi/block-export.json`).
const KNOWN_TO_QEMU: &[&str] = &["nbd", "vhost-user-blk", "fuse", "vduse-blk"];

impl ExportOptions {
    /// Reads the argument of `--export`, in either syntax.
    ///
    /// # Errors
    /// The first mistake, in the words of `qemu-storage-daemon`.
    pub fn parse(argument: &str) -> Result<Self, Error> {
        let tree = Tree::read(argument, "type")?;
        Self::from_fields(tree.fields()?)
    }

    /// Reads the arguments of `block-export-add`, which are those of `--export` in JSON.
    ///
    /// # Errors
    /// The first mistake, in the words of `qemu-storage-daemon`.
    pub fn from_json(members: Map<String, Value>) -> Result<Self, Error> {
        Self::from_fields(Tree::of_json(members).fields()?)
    }

    pub(crate) fn from_fields(mut fields: Fields<'_>) -> Result<Self, Error> {
        let kind = fields.text("type")?;
        check_type(fields.require("type", kind)?)?;
        let id = fields.text("id")?;
        let id = fields.require("id", id)?;
        let fixed_iothread = fields.boolean("fixed-iothread")?.unwrap_or(false);
        let iothread = fields.name_or_list("iothread", "BlockExportIothreads")?;
        let node_name = fields.text("node-name")?;
        let node_name = fields.require("node-name", node_name)?.to_owned();
        let writable = fields.boolean("writable")?.unwrap_or(false);
        fields.not_built(&["writethrough", "allow-inactive"])?;
        let fuse = FuseExportOptions::read(&mut fields)?;
        let own = read_own_threads(&mut fields)?;
        fields.finish()?;

        if !ident::well_formed(id) {
            return Err(Error::InvalidExportId);
        }
        let threads = choose_threads(iothread, own)?;
        Ok(Self {
            id: id.to_owned(),
            node_name,
            writable,
            threads,
            fixed_iothread,
            kind: ExportKind::Fuse(fuse),
        })
    }
}

impl FuseExportOptions {
    fn read(fields: &mut Fields<'_>) -> Result<Self, Error> {
        let mountpoint = fields.text("mountpoint")?;
        let mountpoint = PathBuf::from(fields.require("mountpoint", mountpoint)?);
        let growable = fields.boolean("growable")?.unwrap_or(false);
        let allow_other = fields
            .word("allow-other", OnOffAuto::WORDS)?
            .unwrap_or_default();
        let max_background =
            match fields.integer("max-background")? {
                None => None,
                Some(number) => {
                    let number = u16::try_from(number).ok().and_then(NonZeroU16::new);
                    Some(number.ok_or_else(|| {
                        fields.expects("max-background", "a number from 1 to 65535")
                    })?)
                }
            };
        Ok(Self {
            mountpoint,
            growable,
            allow_other,
            max_background,
            transport: TransportOptions::read(fields)?,
        })
    }
}

fn check_type(kind: &str) -> Result<(), Error> {
    match kind {
        "fuse" => Ok(()),
        _ if KNOWN_TO_QEMU.contains(&kind) => Err(Error::NotBuilt {
            what: format!("export type '{kind}'"),
        }),
        _ => Err(fields::bad_value(
            "type",
            kind,
            KNOWN_TO_QEMU.iter().copied(),
        )),
    }
}

fn read_own_threads(fields: &mut Fields<'_>) -> Result<Option<NonZeroU8>, Error> {
    let Some(number) = fields.integer("threads")? else {
        return Ok(None);
    };
    let in_range = usize::try_from(number)
        .ok()
        .filter(|number| *number <= MAX_QUEUES);
    let number = in_range
        .and_then(|number| u8::try_from(number).ok())
        .and_then(NonZeroU8::new);
    number
        .map(Some)
        .ok_or_else(|| fields.expects("threads", &format!("a number from 1 to {MAX_QUEUES}")))
}

fn choose_threads(
    iothread: Option<Result<Vec<String>, String>>,
    own: Option<NonZeroU8>,
) -> Result<ExportThreads, Error> {
    match (iothread, own) {
        (None, None) => Ok(ExportThreads::Node),
        (None, Some(number)) => Ok(ExportThreads::Own(number)),
        (Some(_), Some(_)) => Err(Error::Conflict {
            first: "iothread",
            second: "threads",
            reason: "an export is served by iothreads, or by threads of its own",
        }),
        (Some(Err(name)), None) => Ok(ExportThreads::Iothread(name)),
        (Some(Ok(names)), None) if names.is_empty() => Err(Error::NoIothreads),
        (Some(Ok(names)), None) if names.len() > MAX_QUEUES => Err(Error::Expects {
            name: "iothread".to_owned(),
            expected: format!("1 to {MAX_QUEUES} names"),
        }),
        (Some(Ok(names)), None) => Ok(ExportThreads::Iothreads(names)),
    }
}

#[cfg(test)]
mod tests;
