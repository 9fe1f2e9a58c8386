//! Opening an image with everything below it: each file of the chain becomes a node of the graph, and so is locked
//! against other processes for what is done with it. It must never leave half a chain in the graph.

use std::path::Path;
use std::sync::Arc;

use diskfuse_block::drivers::{self, FileConfig, RawConfig};
use diskfuse_block::graph::ChildRole;
use diskfuse_block::{Error, Graph, Kind, Node, Result};
use diskfuse_qcow2::node::{Children, Qcow2Config, Qcow2Node};

use crate::chain::{self, Layer, Walk};
use crate::format::Format;
use crate::name::{self, Named};
use crate::probed_raw::ProbedRaw;

/// How to open an image.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// What it is; found out if not given.
    pub format: Option<Format>,
    /// Whether it may be written. Backing files never are.
    pub writable: bool,
    /// How its files are opened; `filename` and `read_only` do not count.
    pub file: FileConfig,
    /// For a qcow2 image; `read_only` does not count. Backing files take the sizes of caches from it, and tell the same one when they are corrupt.
    pub qcow2: Qcow2Config,
    /// Whether to open the backing files; without them, what they hold reads as zeroes.
    pub backing: bool,
    /// The name of the node that shows the disk. Nodes below it have none.
    pub name: Option<String>,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            format: None,
            writable: false,
            file: FileConfig::default(),
            qcow2: Qcow2Config::default(),
            backing: true,
            name: None,
        }
    }
}

/// What was opened.
pub struct Opened {
    /// The name of the node that shows the disk.
    pub name: String,
    /// That node.
    pub node: Arc<dyn Node>,
    /// What the image is.
    pub format: Format,
    /// The same node, if it is a qcow2 image.
    pub qcow2: Option<Arc<Qcow2Node>>,
    /// The same for every image below, the nearest first.
    pub below: Vec<OpenedLayer>,
}

/// An image below the one that was opened.
pub struct OpenedLayer {
    /// Its file, relative names resolved.
    pub filename: String,
    /// The name of its node.
    pub name: String,
    /// Its node.
    pub node: Arc<dyn Node>,
    /// The same, if it is a qcow2 image.
    pub qcow2: Option<Arc<Qcow2Node>>,
}

/// Opens the image called `name` on a command line: a path, or what [`name::parse_argument`] takes. Runs on a ring. On an
/// error the graph is as it was.
///
/// # Errors
/// Those of opening a file; [`Kind::Unsupported`] for a format, feature or protocol that is not built in;
/// [`Kind::Corrupt`] for an image that contradicts itself; [`Kind::Invalid`] for a chain that is a loop, too deep, or
/// whose raw backing file nobody called raw; [`Kind::Busy`] if another process holds one of the files.
pub async fn open(graph: &Graph, name: &Path, options: &OpenOptions) -> Result<Opened> {
    open_named(graph, name::parse_argument(name)?, options).await
}

/// Opens the backing file called `name` in the header of the image `overlay`, with the format that the header says, for
/// reading.
pub async fn open_backing(
    graph: &Graph,
    overlay: &Path,
    name: &str,
    format: Option<&str>,
    options: &OpenOptions,
) -> Result<Opened> {
    let named = name::parse_beside(overlay, name)?;
    let format = format.map(Format::parse).transpose()?;
    let options = OpenOptions {
        format: format.or(options.format),
        writable: false,
        ..options.clone()
    };
    open_named(graph, named, &options).await
}

/// The same for a name that was understood already.
pub async fn open_named(graph: &Graph, named: Named, options: &OpenOptions) -> Result<Opened> {
    let snapshot = options.qcow2.snapshot.as_deref();
    if options.writable && snapshot.is_some() {
        let message = "a snapshot inside an image can only be read";
        return Err(Error::new(Kind::ReadOnly, message));
    }
    let how = Walk {
        file: &options.file,
        writable: options.writable,
        format: options.format,
        down: options.backing,
        data_files: true,
    };
    let layers = chain::walk(named, &how).await?;
    if let (Some(top), Some(snapshot)) = (layers.first(), snapshot)
        && top.format == Format::Raw
    {
        let message = format!(
            "'{}' is a raw image, which has no snapshots: there is no '{snapshot}'",
            top.shown()
        );
        return Err(Error::new(Kind::NotFound, message));
    }
    build(graph, layers, options).await
}

/// What was put into the graph so far; taken away again unless all went well.
struct Inserted<'g> {
    graph: &'g Graph,
    names: Vec<String>,
}

impl Drop for Inserted<'_> {
    fn drop(&mut self) {
        for name in self.names.iter().rev() {
            // It may have gone with the one above it.
            let _ = self.graph.remove(name);
        }
    }
}

/// Makes the nodes, from the lowest image to the highest.
async fn build(graph: &Graph, layers: Vec<Layer>, options: &OpenOptions) -> Result<Opened> {
    let mut inserted = Inserted {
        graph,
        names: Vec::new(),
    };
    let mut below: Vec<OpenedLayer> = Vec::new();
    let last = layers.len().saturating_sub(1);
    for (depth, layer) in layers.into_iter().enumerate().rev() {
        let is_top = depth == 0;
        let (filename, format) = (layer.shown(), layer.format);
        let name = options.name.as_deref().filter(|_| is_top);
        let config = Qcow2Config {
            read_only: !(is_top && options.writable),
            ..match is_top {
                true => options.qcow2.clone(),
                false => of_backing(&options.qcow2),
            }
        };
        let backing = (depth < last).then(|| below.last()).flatten();
        let (name, node, qcow2) =
            insert_layer(graph, layer, name, backing, &config, &mut inserted.names).await?;
        if is_top {
            below.reverse();
            inserted.names.clear();
            return Ok(Opened {
                name,
                node,
                format,
                qcow2,
                below,
            });
        }
        below.push(OpenedLayer {
            filename,
            name,
            node,
            qcow2,
        });
    }
    Err(Error::new(Kind::Invalid, "there is no image to open"))
}

/// What of the options of an image holds for those below it.
fn of_backing(top: &Qcow2Config) -> Qcow2Config {
    Qcow2Config {
        l2_cache_size: top.l2_cache_size,
        refcount_cache_size: top.refcount_cache_size,
        cache_size: top.cache_size,
        cache_clean_interval: top.cache_clean_interval,
        on_corrupt: top.on_corrupt.clone(),
        read_bitmaps: top.read_bitmaps,
        ..Qcow2Config::default()
    }
}

type Made = (String, Arc<dyn Node>, Option<Arc<Qcow2Node>>);

async fn insert_layer(
    graph: &Graph,
    layer: Layer,
    name: Option<&str>,
    backing: Option<&OpenedLayer>,
    config: &Qcow2Config,
    inserted: &mut Vec<String>,
) -> Result<Made> {
    let mut put = |name: Option<&str>, node: Arc<dyn Node>, children: &[&str]| {
        let name = graph.insert(name, node, children)?;
        inserted.push(name.clone());
        Result::Ok(name)
    };
    let file: Arc<dyn Node> = Arc::clone(&layer.file) as _;
    if layer.format == Format::Raw {
        let shown: Arc<dyn Node> = match (layer.part, layer.probed && !config.read_only) {
            (Some(part), _) => {
                let below = Arc::clone(&file);
                let part = RawConfig {
                    offset: part.offset,
                    size: part.size,
                    read_only: config.read_only,
                };
                drivers::open_raw(below, &part)?
            }
            (None, true) => ProbedRaw::new(Arc::clone(&file)),
            (None, false) => return Ok((put(name, Arc::clone(&file), &[])?, file, None)),
        };
        let below = put(None, file, &[])?;
        return Ok((put(name, Arc::clone(&shown), &[&below])?, shown, None));
    }
    let file_name = put(None, Arc::clone(&file), &[])?;
    let mut place = graph.reserve(name, config.read_only)?;
    place.stand_on(&file_name, ChildRole::File)?;
    let mut children = Children {
        file,
        data_file: None,
        backing: None,
    };
    if let Some(data) = layer.data_file.clone() {
        let data_name = put(None, Arc::clone(&data) as _, &[])?;
        place.stand_on(&data_name, ChildRole::Data)?;
        children.data_file = Some(data);
    }
    if let Some(backing) = backing {
        place.stand_on(&backing.name, ChildRole::Backing)?;
        children.backing = Some(Arc::clone(&backing.node));
    }
    let node = Qcow2Node::open(children, config).await?;
    check_unchanged(&layer, &node)?;
    let name = place.fill(Arc::clone(&node) as _)?;
    inserted.push(name.clone());
    Ok((name, Arc::clone(&node) as _, Some(node)))
}

/// The header was first read when another process could still change it.
fn check_unchanged(layer: &Layer, node: &Qcow2Node) -> Result<()> {
    let now = node.header();
    let same = layer
        .header
        .as_ref()
        .is_some_and(|then| then.backing == now.backing && then.data_file == now.data_file);
    if same {
        return Ok(());
    }
    Err(Error::new(
        Kind::Busy,
        format!(
            "'{}' was changed by somebody else while it was being opened; try again",
            layer.shown()
        ),
    ))
}
