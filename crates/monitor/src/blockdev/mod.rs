//! What `--blockdev` says: which node to make, and on top of what.
//!
//! Says only what was asked for; never looks whether a file or a node exists.
//!
//! One driver, one file: a file exports the names it serves with the function that reads their parameters, and
//! [`BlockDriver`] gets a variant. Nothing else knows the drivers.
//!
//! Parameters and defaults are those of `BlockdevOptions` in QEMU's `qapi/block-core.json`. Nodes written inside other
//! nodes take over what the outer one says about caching and writing; a node that is referred to by name does
//! not.

pub mod blkdebug;
mod file;
mod null;
mod qcow2;
mod raw;
mod shape;
mod throttle;

use serde_json::{Map, Value};

use crate::error::Error;
use crate::fields::{self, Fields, NameOrGroup, Tree};
use crate::ident;

pub use blkdebug::BlkdebugOptions;
pub use file::{Aio, FileOptions};
pub use null::NullOptions;
pub use qcow2::{CacheSizes, Metadata, Qcow2Options};
pub use raw::RawOptions;
pub(crate) use shape::shape;
#[cfg(test)]
pub(crate) use shape::tests as shape_tests;
pub use throttle::ThrottleOptions;

/// How many nodes may be written inside each other in one argument. Keeps the reader's recursion small; real chains
/// are a few nodes deep.
pub const MAX_NESTING: usize = 64;

/// The longest node name, in bytes (QEMU keeps names in 32 bytes, the last of them zero).
pub const MAX_NODE_NAME: usize = 31;

/// One block node: the argument of `--blockdev`.
///
/// Every field has its final value: defaults are filled in, and for a node written inside another one also what it
/// takes over from that one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockdevOptions {
    /// The driver and the parameters that only it has.
    pub driver: BlockDriver,
    /// The node's name: an identifier of at most [`MAX_NODE_NAME`] bytes. Always there for the outermost node; a node
    /// without one inside another is to be given a name that no user can write.
    pub node_name: Option<String>,
    /// What a discard request does. Default: ignore; for a node inside another one: unmap, as the outer one decides.
    pub discard: Discard,
    /// What happens to writes of zeroes. [`DetectZeroes::Unmap`] comes only with [`Discard::Unmap`]. Default: off.
    pub detect_zeroes: DetectZeroes,
    /// How the host's page cache is used.
    pub cache: CacheOptions,
    /// Whether the node refuses writes. Default: off, or what the outer node says.
    pub read_only: bool,
    /// Whether the node may fall back to read-only when it cannot be opened for writing, or needs not be yet.
    /// Default: off, or what the outer node says.
    pub auto_read_only: bool,
    /// Whether others may change the image meanwhile: no lock is taken against writers. Default: off, or what the
    /// outer node says.
    pub force_share: bool,
}

/// The drivers that exist, with the parameters of each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BlockDriver {
    /// `null-co`: answers without storing anything.
    NullCo(NullOptions),
    /// `null-aio`: in QEMU the same over another kind of callback; here no different from `null-co`.
    NullAio(NullOptions),
    /// `file`: a regular file.
    File(FileOptions),
    /// `host_device`: a block device of the host.
    HostDevice(FileOptions),
    /// `raw`: a window on another node.
    Raw(RawOptions),
    /// `qcow2`: an image with metadata in another node.
    Qcow2(Qcow2Options),
    /// `throttle`: another node, kept to the limits of a group.
    Throttle(ThrottleOptions),
    /// `blkdebug`: another node, with errors.
    Blkdebug(BlkdebugOptions),
}

/// A node that another node stands on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BlockRef {
    /// A node made before, by its name. Whether it exists is for the graph to say.
    Name(String),
    /// A node written inside this one; it lives and dies with it.
    Inline(Box<BlockdevOptions>),
}

/// What shows where an image itself has nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BackingRef {
    /// What the image says; it was not mentioned.
    Image,
    /// Nothing: zeroes. `null` in JSON, or an empty name.
    Nothing,
    /// This node.
    Node(BlockRef),
}

/// How a node uses the host's page cache.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CacheOptions {
    /// `cache.direct`: go around the page cache (`O_DIRECT`). Default: off, or what the outer node says.
    pub direct: bool,
    /// `cache.no-flush`: never flush to stable storage; data can be lost. Default: off, or what the outer node says.
    pub no_flush: bool,
}

/// What a discard request does to the layer below.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Discard {
    /// Nothing.
    #[default]
    Ignore,
    /// Gives the space back.
    Unmap,
}

/// What happens to a write whose data is all zeroes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum DetectZeroes {
    /// It is a write like any other.
    #[default]
    Off,
    /// It becomes a write-zeroes request that keeps the space.
    On,
    /// It becomes a write-zeroes request that may give the space back.
    Unmap,
}

impl Discard {
    const WORDS: &[(&str, Self)] = &[("ignore", Self::Ignore), ("unmap", Self::Unmap)];
}

impl DetectZeroes {
    const WORDS: &[(&str, Self)] = &[("off", Self::Off), ("on", Self::On), ("unmap", Self::Unmap)];
}

impl BlockDriver {
    /// What the driver is called in `driver=…`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::NullCo(_) => "null-co",
            Self::NullAio(_) => "null-aio",
            Self::File(_) => "file",
            Self::HostDevice(_) => "host_device",
            Self::Raw(_) => "raw",
            Self::Qcow2(_) => "qcow2",
            Self::Throttle(_) => "throttle",
            Self::Blkdebug(_) => "blkdebug",
        }
    }
}

/// Reads the parameters that only one driver has. The context is for nodes written inside.
type ReadDriver = fn(&mut Fields<'_>, &Context) -> Result<BlockDriver, Error>;

/// A driver's name, and what reads its parameters.
type Driver = (&'static str, ReadDriver);

/// What each driver's file serves.
const DRIVERS: &[&[Driver]] = &[
    null::DRIVERS,
    file::DRIVERS,
    raw::DRIVERS,
    qcow2::DRIVERS,
    throttle::DRIVERS,
    blkdebug::DRIVERS,
];

/// Drivers that `qemu-storage-daemon` 10.0 and 11.1 know (`BlockdevDriver` in `qapi/block-core.json`). Those that are
/// served here need not be taken out.
const KNOWN_TO_QEMU: &[&str] = &[
    "blkdebug",
    "blklogwrites",
    "blkreplay",
    "blkverify",
    "bochs",
    "cloop",
    "compress",
    "copy-before-write",
    "copy-on-read",
    "dmg",
    "file",
    "ftp",
    "ftps",
    "gluster",
    "host_cdrom",
    "host_device",
    "http",
    "https",
    "io_uring",
    "iscsi",
    "luks",
    "nbd",
    "nfs",
    "null-aio",
    "null-co",
    "nvme",
    "nvme-io_uring",
    "parallels",
    "preallocate",
    "qcow",
    "qcow2",
    "qed",
    "quorum",
    "raw",
    "rbd",
    "replication",
    "snapshot-access",
    "ssh",
    "throttle",
    "vdi",
    "vhdx",
    "virtio-blk-vfio-pci",
    "virtio-blk-vhost-user",
    "virtio-blk-vhost-vdpa",
    "vmdk",
    "vpc",
    "vvfat",
];

/// Where in the nest a node stands, and what the nodes written inside it take over from it.
#[derive(Debug)]
struct Context {
    /// How many nodes are around it.
    depth: usize,
    discard: Discard,
    cache: CacheOptions,
    read_only: bool,
    auto_read_only: bool,
    force_share: bool,
}

impl Context {
    /// For the outermost node.
    const OUTERMOST: Self = Self {
        depth: 0,
        discard: Discard::Ignore,
        cache: CacheOptions {
            direct: false,
            no_flush: false,
        },
        read_only: false,
        auto_read_only: false,
        force_share: false,
    };
}

impl BlockdevOptions {
    /// Reads the argument of `--blockdev`, in either syntax.
    ///
    /// # Errors
    /// The first mistake, in the words of `qemu-storage-daemon`.
    pub fn parse(argument: &str) -> Result<Self, Error> {
        let tree = Tree::read(argument, "driver")?;
        Self::from_fields(tree.fields()?)
    }

    /// Reads the arguments of `blockdev-add`, which are those of `--blockdev` in JSON.
    ///
    /// # Errors
    /// The first mistake, in the words of `qemu-storage-daemon`.
    pub fn from_json(members: Map<String, Value>) -> Result<Self, Error> {
        Self::from_fields(Tree::of_json(members).fields()?)
    }

    /// Reads an outermost node.
    pub(crate) fn from_fields(fields: Fields<'_>) -> Result<Self, Error> {
        let node = Self::read(fields, &Context::OUTERMOST)?;
        if node.node_name.is_none() {
            return Err(Error::NodeNameMissing);
        }
        Ok(node)
    }

    /// The drivers that are served.
    pub(crate) fn driver_names() -> impl Iterator<Item = &'static str> {
        DRIVERS.iter().copied().flatten().map(|(name, _)| *name)
    }

    /// Reads one node, and with it the nodes written inside it. `around` is what it takes over.
    fn read(mut fields: Fields<'_>, around: &Context) -> Result<Self, Error> {
        let driver = fields.text("driver")?;
        let read_driver = find_driver(fields.require("driver", driver)?)?;
        let node_name = fields.text("node-name")?;
        let discard = fields
            .word("discard", Discard::WORDS)?
            .unwrap_or(around.discard);
        let cache = read_cache(&mut fields, around.cache)?;
        let read_only = fields.boolean("read-only")?.unwrap_or(around.read_only);
        let auto_read_only = fields
            .boolean("auto-read-only")?
            .unwrap_or(around.auto_read_only);
        let force_share = fields.boolean("force-share")?.unwrap_or(around.force_share);
        let detect_zeroes = fields
            .word("detect-zeroes", DetectZeroes::WORDS)?
            .unwrap_or_default();
        let inside = Context {
            depth: around.depth + 1,
            discard: Discard::Unmap,
            cache,
            read_only,
            auto_read_only,
            force_share,
        };
        let driver = read_driver(&mut fields, &inside)?;
        fields.finish()?;

        node_name.map_or(Ok(()), check_node_name)?;
        if detect_zeroes == DetectZeroes::Unmap && discard != Discard::Unmap {
            return Err(Error::DetectZeroesNeedsDiscard);
        }
        let node_name = node_name.map(str::to_owned);
        Ok(Self {
            driver,
            node_name,
            discard,
            detect_zeroes,
            cache,
            read_only,
            auto_read_only,
            force_share,
        })
    }
}

impl BlockRef {
    /// Reads a member that names a node or holds one. `inside` is what a node takes over that is written there.
    fn read(
        fields: &mut Fields<'_>,
        name: &'static str,
        inside: &Context,
    ) -> Result<Option<Self>, Error> {
        let found = fields.name_or_group(name, "BlockdevRef")?;
        found.map(|found| Self::of(found, inside)).transpose()
    }

    fn of(found: NameOrGroup<'_>, inside: &Context) -> Result<Self, Error> {
        match found {
            NameOrGroup::Name(node) => Ok(Self::Name(node.to_owned())),
            NameOrGroup::Group(_) if inside.depth >= MAX_NESTING => Err(Error::TooDeep {
                what: "Nodes",
                limit: MAX_NESTING,
            }),
            NameOrGroup::Group(fields) => {
                BlockdevOptions::read(fields, inside).map(|node| Self::Inline(Box::new(node)))
            }
        }
    }
}

impl BackingRef {
    /// Reads a member that names a node, holds one, or says that there is none. A node that is written there is
    /// read-only unless it says otherwise.
    fn read(fields: &mut Fields<'_>, name: &'static str, inside: &Context) -> Result<Self, Error> {
        if fields.is_null(name) {
            return Ok(Self::Nothing);
        }
        let inside = Context {
            read_only: true,
            auto_read_only: false,
            ..*inside
        };
        match fields.name_or_group(name, "BlockdevRefOrNull")? {
            None => Ok(Self::Image),
            // As QEMU has it, which calls it out of date.
            Some(NameOrGroup::Name("")) => Ok(Self::Nothing),
            Some(found) => BlockRef::of(found, &inside).map(Self::Node),
        }
    }
}

/// The function that reads the parameters of the driver `name`.
fn find_driver(name: &str) -> Result<ReadDriver, Error> {
    let mut served = DRIVERS.iter().copied().flatten();
    if let Some((_, read)) = served.find(|(served, _)| *served == name) {
        return Ok(*read);
    }
    if KNOWN_TO_QEMU.contains(&name) {
        return Err(Error::NotBuilt {
            what: format!("driver '{name}'"),
        });
    }
    Err(fields::bad_value(
        "driver",
        name,
        KNOWN_TO_QEMU.iter().copied(),
    ))
}

fn read_cache(fields: &mut Fields<'_>, around: CacheOptions) -> Result<CacheOptions, Error> {
    let Some(mut cache) = fields.group("cache")? else {
        return Ok(around);
    };
    let direct = cache.boolean("direct")?.unwrap_or(around.direct);
    let no_flush = cache.boolean("no-flush")?.unwrap_or(around.no_flush);
    cache.finish()?;
    Ok(CacheOptions { direct, no_flush })
}

/// Whether a node could have this name.
///
/// # Errors
/// [`Error::InvalidNodeName`], [`Error::NodeNameTooLong`].
pub fn check_node_name(name: &str) -> Result<(), Error> {
    if !ident::well_formed(name) {
        return Err(Error::InvalidNodeName {
            name: name.to_owned(),
        });
    }
    if name.len() > MAX_NODE_NAME {
        return Err(Error::NodeNameTooLong);
    }
    Ok(())
}

#[cfg(test)]
mod tests;
