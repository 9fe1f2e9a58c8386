//! The `qcow2` driver of the storage daemon's command line: finds out what an image stands on, by the options first and
//! by its header then, and opens it. It reads nothing of an image but its header, and that only when nobody else can
//! change it any more.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use diskfuse_block::drivers;
use diskfuse_block::graph::{ChildRole, Place};
use diskfuse_block::{Locking, Node};
use diskfuse_image::format::{self, Probed};
use diskfuse_image::name;
use diskfuse_image::open::{OpenOptions, open_backing};
use diskfuse_monitor::blockdev::{BackingRef, DetectZeroes, Discard, Metadata};
use diskfuse_monitor::{
    BlockDriver, BlockdevOptions, CacheSizes, FileOptions, OnOffAuto, Qcow2Options,
};
use diskfuse_qcow2::format::Header;
use diskfuse_qcow2::node::{self, OverlapCheck, Qcow2Config, Qcow2Node};

use super::children::{Child, Children};
use super::nodes::{self, Nodes};
use super::trouble;
use crate::error::{Error, Result};

/// Makes the node, with what is written inside it and what its header names, and returns its name.
pub(super) fn add(
    nodes: &Nodes,
    qcow2: &Qcow2Options,
    options: &BlockdevOptions,
) -> Result<String> {
    // Given up in the opposite order: what stands above goes before what is below.
    let mut children = Children::new(nodes);
    let file = children.get(&qcow2.file)?;
    let name = options.node_name.as_deref();
    let mut place = nodes.graph.reserve(name, options.read_only)?;
    place.stand_on(&file.name, ChildRole::File)?;
    let header = nodes.run(read_header(&*file.node))??;
    check_caches(qcow2.caches, &header)?;
    let mut opening = Opening {
        nodes,
        options,
        file: &file,
        header: &header,
    };
    let data_file = opening.data_file(qcow2, &mut children, &mut place)?;
    let backing = opening.backing(&qcow2.backing, &mut children, &mut place)?;
    let below = node::Children {
        file: Arc::clone(&file.node),
        data_file,
        backing,
    };
    let config = Qcow2Config {
        on_corrupt: Some(trouble::on_corrupt(&nodes.monitors, Some(place.name()))),
        ..config(qcow2, options)
    };
    let node = nodes.run(Qcow2Node::open(below, &config))??;
    let name = place.fill(node)?;
    children.keep();
    Ok(name)
}

async fn read_header(file: &dyn Node) -> Result<Header> {
    let hint = match format::probe(file).await? {
        Probed::Qcow2 => return Ok(Header::read(file).await?),
        Probed::Raw => "nor in any that is known; for a raw image use driver=raw".to_owned(),
        Probed::Other(format) => format!("it looks like {format}"),
    };
    Err(Error::Refused(format!(
        "Image is not in qcow2 format ({hint})"
    )))
}

/// An image whose header is known, and whose other children are not.
struct Opening<'o> {
    nodes: &'o Nodes,
    options: &'o BlockdevOptions,
    file: &'o Child,
    header: &'o Header,
}

impl Opening<'_> {
    /// Where the data are, if they are not in the image file.
    fn data_file(
        &mut self,
        qcow2: &Qcow2Options,
        children: &mut Children<'_>,
        place: &mut Place,
    ) -> Result<Option<Arc<dyn Node>>> {
        let given = qcow2.data_file.as_ref();
        let given = given.map(|data| children.get(data)).transpose()?;
        let child = match (self.header.has_data_file(), given) {
            (false, None) => return Ok(None),
            (false, Some(_)) => {
                let message = "'data-file' can only be set for images with an external data file";
                return Err(Error::refused(message));
            }
            (true, Some(child)) => child,
            (true, None) => match &self.header.data_file {
                Some(name) => children.make(&self.data_file_options(name)?)?,
                None => return Err(Error::refused("'data-file' is required for this image")),
            },
        };
        place.stand_on(&child.name, ChildRole::Data)?;
        Ok(Some(child.node))
    }

    /// The file that the header names, opened as one written inside the node would be.
    fn data_file_options(&self, name: &str) -> Result<BlockdevOptions> {
        let named = name::parse_beside(&self.image_path(), name)?;
        let is_device = std::fs::metadata(&named.filename)
            .is_ok_and(|stat| std::os::unix::fs::FileTypeExt::is_block_device(&stat.file_type()));
        let file = FileOptions {
            filename: named.filename,
            aio: None,
            locking: OnOffAuto::Auto,
            drop_cache: true,
        };
        Ok(BlockdevOptions {
            driver: match is_device {
                true => BlockDriver::HostDevice(file),
                false => BlockDriver::File(file),
            },
            node_name: None,
            discard: Discard::Unmap,
            detect_zeroes: DetectZeroes::Off,
            ..self.options.clone()
        })
    }

    /// What shows where the image has nothing.
    fn backing(
        &mut self,
        given: &BackingRef,
        children: &mut Children<'_>,
        place: &mut Place,
    ) -> Result<Option<Arc<dyn Node>>> {
        let child = match given {
            BackingRef::Nothing => return Ok(None),
            BackingRef::Node(reference) => children.get(reference),
            BackingRef::Image => match &self.header.backing {
                None => return Ok(None),
                Some(named) => self
                    .backing_of_header(&named.name, named.format.as_deref())
                    .and_then(|name| children.adopt(name)),
            },
        };
        let child = child
            .map_err(|error| Error::Refused(format!("Could not open backing file: {error}")))?;
        place.stand_on(&child.name, ChildRole::Backing)?;
        Ok(Some(child.node))
    }

    /// The chain that the header names, opened with what the node takes over to it, and the name of its first node.
    fn backing_of_header(&self, name: &str, format: Option<&str>) -> Result<String> {
        let options = OpenOptions {
            file: drivers::FileConfig {
                direct: self.options.cache.direct,
                no_flush: self.options.cache.no_flush,
                locking: match self.options.force_share {
                    true => Locking::Off,
                    false => Locking::Auto,
                },
                ..drivers::FileConfig::default()
            },
            qcow2: Qcow2Config {
                read_bitmaps: true,
                on_corrupt: Some(trouble::on_corrupt(&self.nodes.monitors, None)),
                ..Qcow2Config::default()
            },
            ..OpenOptions::default()
        };
        let (graph, image) = (&self.nodes.graph, self.image_path());
        let opened = self
            .nodes
            .run(open_backing(graph, &image, name, format, &options))??;
        Ok(opened.name)
    }

    /// Where relative names in the header begin: at the folder of the image file, if it is one.
    fn image_path(&self) -> std::path::PathBuf {
        let filename = self.file.node.filename().unwrap_or_default();
        Path::new(&filename).to_owned()
    }
}

pub(super) fn config(qcow2: &Qcow2Options, options: &BlockdevOptions) -> Qcow2Config {
    Qcow2Config {
        read_only: options.read_only,
        discard: options.discard == Discard::Unmap,
        detect_zeroes: nodes::detect_zeroes(options.detect_zeroes),
        lazy_refcounts: qcow2.lazy_refcounts,
        l2_cache_size: qcow2.caches.l2,
        refcount_cache_size: qcow2.caches.refcounts,
        cache_size: qcow2.caches.total,
        cache_clean_interval: Duration::from_secs(qcow2.cache_clean_interval.into()),
        overlap_check: overlap_check(&qcow2.overlap_check),
        discard_no_unref: qcow2.discard_no_unref,
        pass_discard_request: qcow2.pass_discard_request,
        pass_discard_snapshot: qcow2.pass_discard_snapshot,
        pass_discard_other: qcow2.pass_discard_other,
        read_bitmaps: true,
        ..Qcow2Config::default()
    }
}

fn overlap_check(checked: &[Metadata]) -> OverlapCheck {
    let one = |metadata: &Metadata| match metadata {
        Metadata::MainHeader => OverlapCheck::MAIN_HEADER,
        Metadata::ActiveL1 => OverlapCheck::ACTIVE_L1,
        Metadata::ActiveL2 => OverlapCheck::ACTIVE_L2,
        Metadata::RefcountTable => OverlapCheck::REFCOUNT_TABLE,
        Metadata::RefcountBlock => OverlapCheck::REFCOUNT_BLOCK,
        Metadata::SnapshotTable => OverlapCheck::SNAPSHOT_TABLE,
        Metadata::InactiveL1 => OverlapCheck::INACTIVE_L1,
        Metadata::InactiveL2 => OverlapCheck::INACTIVE_L2,
        Metadata::BitmapDirectory => OverlapCheck::BITMAP_DIRECTORY,
    };
    let checked = checked.iter().map(one);
    checked.fold(OverlapCheck::NONE, |all, one| all | one)
}

/// Entries of at most this many bytes fit an L2 cache in QEMU, and so many blocks a refcount cache.
const MOST_ENTRIES: u64 = i32::MAX as u64;

/// What of the caches' sizes depends on the image. An entry's size is checked and has no effect: the cache here loads
/// parts of tables of a size of its own.
fn check_caches(caches: CacheSizes, header: &Header) -> Result<()> {
    let cluster = header.geometry.cluster_size();
    let entry = caches.l2_entry.unwrap_or(cluster);
    if !(512..=cluster).contains(&entry) || !entry.is_power_of_two() {
        return Err(Error::Refused(format!(
            "L2 cache entry size must be a power of two between 512 and the cluster size ({cluster})"
        )));
    }
    if caches
        .refcounts
        .is_some_and(|size| size / cluster > MOST_ENTRIES)
    {
        return Err(Error::refused("Refcount cache size too big"));
    }
    Ok(())
}
