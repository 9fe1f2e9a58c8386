//! What `diskfuse mount --dir` shows of an image: the whole disk, its partitions, its internal snapshots, the layers of its
//! chain, each as files, and a text that tells what is there. It must never show anything but a part of the image it was
//! opened for, whatever names are written on the disk.
//!
//! ```text
//!   disk  p1 … pN  by-label/  by-uuid/  by-name/       the disk as it is now
//!   snapshots/NAME/…                                   the same of each internal snapshot, read-only
//!   layers/N/…                                         the same of each image of the chain, 0 being the top one, read-only
//!   info.json
//! ```

mod branch;
mod refresher;

use std::ffi::OsString;
use std::path::Path;
use std::sync::Arc;

use diskfuse_block::graph::ChildRole;
use diskfuse_block::{Graph, Result};
use diskfuse_fuse::{Entry, Refresh};
use diskfuse_image::Opened;
use diskfuse_image::info::{ImageInfo, InfoOptions, info};
use diskfuse_partition::{Contents, file_name};
use diskfuse_qcow2::node::{Qcow2Config, Qcow2Node};
use diskfuse_qcow2::snapshots::{self, SnapshotInfo};
use serde::Serialize;

use branch::Branch;
use refresher::Refresher;

/// Snapshots that are shown; each is an open image. `--snapshot` shows any.
const MOST_SNAPSHOTS: usize = 64;

/// What to mount, and who keeps it up to date.
pub struct Directory {
    /// The entries of the root.
    pub root: Vec<(OsString, Entry)>,
    /// See [`Refresh`].
    pub refresh: Arc<dyn Refresh>,
}

/// What is in `info.json`.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Info<'i> {
    /// As `diskfuse info --chain` has it.
    images: &'i [ImageInfo],
    #[serde(flatten)]
    contents: &'i Contents,
}

/// Its text; an empty object if there is none, which cannot be.
fn info_text(images: &[ImageInfo], contents: &Contents) -> Vec<u8> {
    let info = Info { images, contents };
    let text = serde_json::to_string_pretty(&info);
    let text = text.unwrap_or_else(|_| "{}".to_owned());
    format!("{text}\n").into_bytes()
}

/// Looks at the image `path`, which is open, and makes the nodes that its directory shows. Runs on a ring.
pub async fn plan(
    graph: &Graph,
    path: &Path,
    opened: &Opened,
    writable: bool,
) -> Result<Directory> {
    let looked = InfoOptions {
        format: Some(opened.format),
        chain: true,
        // It is this process that may write it, and has not begun to.
        share: true,
    };
    let images = info(path, looked).await?;
    let mut disk = Branch::new(&opened.name, writable);
    let mut contents = disk.look(graph).await?;
    let snapshots = snapshots_of(graph, opened, &mut contents.problems).await?;
    let mut top = Branch::new(&opened.name, false);
    top.look(graph).await?;
    let mut layers = vec![(OsString::from("0"), Entry::Directory(top.entries()))];
    for (number, layer) in (1..).zip(&opened.below) {
        let mut branch = Branch::new(&layer.name, false);
        branch.look(graph).await?;
        let number: usize = number;
        layers.push((
            number.to_string().into(),
            Entry::Directory(branch.entries()),
        ));
    }
    let mut root = disk.entries();
    root.extend([
        ("snapshots".into(), Entry::Directory(snapshots)),
        ("layers".into(), Entry::Directory(layers)),
        (
            "info.json".into(),
            Entry::Text(info_text(&images, &contents)),
        ),
    ]);
    let layers = opened.below.len() + 1;
    let refresh = Refresher::new(graph, images, layers, disk, top);
    Ok(Directory {
        root,
        refresh: Arc::new(refresh),
    })
}

/// A directory for each internal snapshot. One that cannot be shown is a problem of its own, and of no other.
async fn snapshots_of(
    graph: &Graph,
    opened: &Opened,
    problems: &mut Vec<String>,
) -> Result<Vec<(OsString, Entry)>> {
    let Some(image) = &opened.qcow2 else {
        return Ok(Vec::new());
    };
    let all = snapshots::list(&*image.children().file).await?;
    if all.len() > MOST_SNAPSHOTS {
        problems.push(format!(
            "of {} snapshots the first {MOST_SNAPSHOTS} are shown; --snapshot NAME shows any",
            all.len()
        ));
    }
    let mut shown: Vec<(OsString, Entry)> = Vec::new();
    for snapshot in all.iter().take(MOST_SNAPSHOTS) {
        match show_snapshot(graph, opened, image, snapshot).await {
            Ok(entries) => {
                let name = snapshot_name(snapshot, &shown);
                shown.push((name, Entry::Directory(entries)));
            }
            Err(error) => problems.push(format!("snapshot '{}': {error}", snapshot.name)),
        }
    }
    Ok(shown)
}

/// A name for its directory that no other has.
fn snapshot_name(snapshot: &SnapshotInfo, taken: &[(OsString, Entry)]) -> OsString {
    let is_free = |name: &String| taken.iter().all(|(other, _)| other != name.as_str());
    let with_id = || file_name(format!("{}@{}", snapshot.name, snapshot.id).as_bytes());
    let name = file_name(snapshot.name.as_bytes()).filter(is_free);
    let name = name.or_else(|| with_id().filter(is_free));
    name.unwrap_or_else(|| format!("@{}", taken.len())).into()
}

/// Opens a snapshot on the children of the image, and looks at it. What an image has in its snapshots is not changed by writing
/// its disk; so whoever reads them is in nobody's way.
async fn show_snapshot(
    graph: &Graph,
    opened: &Opened,
    image: &Qcow2Node,
    snapshot: &SnapshotInfo,
) -> Result<Vec<(OsString, Entry)>> {
    let config = Qcow2Config {
        read_only: true,
        snapshot: Some(snapshot.id.clone()),
        ..Qcow2Config::default()
    };
    let node = Qcow2Node::open(image.children(), &config).await?;
    let edges = graph.edges(&opened.name)?;
    let children: Vec<(&str, ChildRole)> = edges
        .iter()
        .map(|(role, child)| match role {
            ChildRole::Backing => (child.as_str(), ChildRole::Backing),
            _ => (child.as_str(), ChildRole::Filtered),
        })
        .collect();
    let name = graph.insert_above(None, node, &children)?;
    let mut branch = Branch::new(&name, false);
    branch.look(graph).await?;
    Ok(branch.entries())
}
