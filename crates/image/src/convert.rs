//! One image copied into a new one of any format. Half a copy is never left behind under the name of the target.

use std::path::Path;
use std::sync::Arc;

use diskfuse_block::drivers::FileConfig;
use diskfuse_block::{Error, Kind, Result};
use diskfuse_qcow2::node::Qcow2Config;

use crate::copy::{Copy, Plan, Scope};
use crate::create::{Created, NewImage, create};
use crate::format::Format;
use crate::name::Named;
use crate::open::OpenOptions;
use crate::session::{Session, to_read};

/// What is to be copied.
#[derive(Clone, Debug)]
pub struct Source<'s> {
    /// The image.
    pub path: &'s Path,
    /// What it is; found out if not given.
    pub format: Option<Format>,
    /// A snapshot inside it, by name or id, instead of the disk as it is.
    pub snapshot: Option<&'s str>,
    /// Bear with others that write the image.
    pub share: bool,
}

/// What zeroes among the data become.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sparse {
    /// Not written, in units that suit the target.
    #[default]
    Auto,
    /// Not written, in runs of so many bytes, aligned to as many; a power of two from 512.
    Unit(u64),
    /// Written, as everything is: the target is allocated as a whole.
    Never,
}

/// A conversion under way.
pub struct Conversion {
    /// To be [worked on](Copy::work) until it is done.
    pub copy: Arc<Copy>,
    source: Session,
    target: Session,
    created: Created,
}

/// Units in which zeroes are looked for, and to which reads are widened, in bytes.
const LEAST_UNIT: u64 = 4096;
const MOST_UNIT: u64 = 64 << 10;

impl Conversion {
    /// Opens the source and makes the target, whose size is the source's. `compress` writes compressed clusters. Runs on
    /// a ring.
    ///
    /// # Errors
    /// Those of opening the source and of making the target; [`Kind::Invalid`] for what the target's format does not
    /// have.
    pub async fn start(
        source: &Source<'_>,
        target: &NewImage,
        compress: bool,
        sparse: Sparse,
    ) -> Result<Self> {
        check(target, compress, sparse)?;
        let options = OpenOptions {
            format: source.format,
            file: to_read(source.share),
            qcow2: Qcow2Config {
                snapshot: source.snapshot.map(str::to_owned),
                ..Qcow2Config::default()
            },
            ..OpenOptions::default()
        };
        let source = Session::open(source.path, &options, "convert").await?;
        let mut target = target.clone();
        target.options.size = Some(source.node().size());
        let created = create(&target).await?;
        let options = OpenOptions {
            format: Some(target.format),
            writable: true,
            file: FileConfig::default(),
            qcow2: Qcow2Config {
                compress,
                ..Qcow2Config::default()
            },
            ..OpenOptions::default()
        };
        let named = Named::path(target.path.clone());
        let opened = Session::open_named(named, &options, "convert").await?;
        let cluster = opened
            .opened
            .qcow2
            .as_ref()
            .map(|node| node.header().geometry.cluster_size());
        let unit = cluster.map_or(LEAST_UNIT, |size| size.clamp(LEAST_UNIT, MOST_UNIT));
        let copy = Copy::new(Plan {
            source: Arc::clone(source.node()),
            scope: Scope::Whole,
            target: Arc::clone(opened.node()),
            target_is_zero: is_new_file(&opened),
            sparse: match sparse {
                Sparse::Auto => Some(unit),
                Sparse::Unit(unit) => Some(unit),
                Sparse::Never => None,
            },
            alignment: match (cluster, compress) {
                (Some(size), true) => size,
                (Some(size), false) => size.min(MOST_UNIT),
                (None, _) => 512,
            },
        })?;
        Ok(Self {
            copy,
            source,
            target: opened,
            created,
        })
    }

    /// When all is copied: brings it to stable storage. The target stays only if this succeeds.
    pub async fn finish(self) -> Result<()> {
        self.target.close().await?;
        self.created.keep();
        self.source.close().await
    }
}

fn check(target: &NewImage, compress: bool, sparse: Sparse) -> Result<()> {
    let invalid = |message: &str| Err(Error::new(Kind::Invalid, message));
    if compress && target.format == Format::Raw {
        return invalid("a raw image cannot be compressed; -O qcow2 can");
    }
    if compress && target.options.data_file.is_some() {
        return invalid("an image with a data file cannot be compressed");
    }
    if target.options.backing_file.is_some() {
        return invalid(
            "a conversion makes an image that stands alone; use `diskfuse rebase` afterwards",
        );
    }
    match sparse {
        Sparse::Unit(unit) if !unit.is_power_of_two() || unit < 512 => {
            invalid("the unit of sparse runs must be a power of two, of at least 512 bytes")
        }
        _ => Ok(()),
    }
}

/// A block device keeps what was on it: as a raw image, and as the data file of a qcow2 image that names its places already.
fn is_new_file(target: &Session) -> bool {
    let data = match &target.opened.qcow2 {
        Some(qcow2) => qcow2.children().data_file,
        None => Some(Arc::clone(target.node())),
    };
    data.is_none_or(|data| data.driver() != "host_device")
}
