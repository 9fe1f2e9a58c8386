//! Keeps a mounted directory up to date with what is written to its disk. What a snapshot or a layer below holds does not
//! change, so only the disk itself and the top layer are looked at again.

use diskfuse_block::{Graph, LocalFuture};
use diskfuse_fuse::{Entry, Refresh, Tree};
use diskfuse_image::info::ImageInfo;
use parking_lot::Mutex;

use super::branch::Branch;
use super::info_text;

/// See the module.
pub struct Refresher {
    graph: Graph,
    images: Vec<ImageInfo>,
    /// Images of the chain.
    layers: usize,
    /// The disk itself, then the top layer. Taken out as a copy and put back: two never refresh at once.
    live: Mutex<[Branch; 2]>,
}

impl Refresher {
    /// For a directory that shows `disk` in its root and `top` as the first of `layers`.
    pub fn new(
        graph: &Graph,
        images: Vec<ImageInfo>,
        layers: usize,
        disk: Branch,
        top: Branch,
    ) -> Self {
        Self {
            graph: graph.clone(),
            images,
            layers,
            live: Mutex::new([disk, top]),
        }
    }

    async fn look_again(&self, tree: &Tree) -> diskfuse_fuse::Result<()> {
        let [mut disk, mut top] = self.live.lock().clone();
        let looked = match disk.look(&self.graph).await {
            Ok(contents) => top.look(&self.graph).await.map(|_| contents),
            Err(error) => Err(error),
        };
        let replaced = match looked {
            Ok(contents) => {
                let mut root = disk.entries();
                let mut layers = vec![("0".into(), Entry::Directory(top.entries()))];
                layers.extend((1..self.layers).map(|n| (n.to_string().into(), Entry::Same)));
                root.extend([
                    ("snapshots".into(), Entry::Same),
                    ("layers".into(), Entry::Directory(layers)),
                    (
                        "info.json".into(),
                        Entry::Text(info_text(&self.images, &contents)),
                    ),
                ]);
                tree.replace(root)
            }
            Err(error) => Err(error.into()),
        };
        disk.tidy(&self.graph);
        top.tidy(&self.graph);
        *self.live.lock() = [disk, top];
        replaced
    }
}

impl Refresh for Refresher {
    fn refresh<'a>(&'a self, tree: &'a Tree) -> LocalFuture<'a, diskfuse_fuse::Result<()>> {
        Box::pin(self.look_again(tree))
    }
}
