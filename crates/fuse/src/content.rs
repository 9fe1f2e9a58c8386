//! What an export shows: one file, or a tree of them.

use std::sync::Arc;

use diskfuse_block::{LetGo, Node};

use crate::file::File;
use crate::shared::Shared;
use crate::tree::Tree;

/// See the module.
pub(crate) enum Content {
    /// The mount is this file.
    File(Arc<File>),
    /// The mount is the root of this tree.
    Tree(Arc<Tree>),
}

impl Content {
    /// The file that stands for the export: the only one, or the tree's first.
    pub(crate) fn main(&self) -> Option<Arc<File>> {
        match self {
            Self::File(file) => Some(Arc::clone(file)),
            Self::Tree(tree) => tree.files().into_iter().next(),
        }
    }

    /// The tree, if it is one.
    pub(crate) fn tree(&self) -> Option<&Arc<Tree>> {
        match self {
            Self::File(_) => None,
            Self::Tree(tree) => Some(tree),
        }
    }

    /// The mount's root as a file, if it is one.
    pub(crate) fn root_file(&self) -> Option<&Arc<File>> {
        match self {
            Self::File(file) => Some(file),
            Self::Tree(_) => None,
        }
    }

    /// All files.
    pub(crate) fn files(&self) -> Vec<Arc<File>> {
        match self {
            Self::File(file) => vec![Arc::clone(file)],
            Self::Tree(tree) => tree.files(),
        }
    }

    /// The nodes of all files that can be written.
    pub(crate) fn written(&self) -> Vec<Arc<dyn Node>> {
        let files = self.files().into_iter();
        let writable = files.filter(|file| file.writable && file.right.is_there());
        writable.map(|file| file.node.get().1).collect()
    }

    /// The host file behind it, for the source of the mount.
    pub(crate) fn filename(&self) -> Option<String> {
        self.main()?.node.get().1.filename()
    }

    /// The export that it belongs to.
    pub(crate) fn belongs_to(&self, export: &Arc<Shared>) {
        match self {
            Self::File(file) => file.belongs_to(export),
            Self::Tree(tree) => tree.belongs_to(export),
        }
    }

    /// Whether anything was ever written.
    pub(crate) fn ever_written(&self) -> bool {
        let files = self.files();
        files.iter().any(|file| file.attributes.ever_written())
    }

    /// Nodes hold back no requests of this export until it is dropped.
    pub(crate) fn let_go(&self) -> Vec<LetGo> {
        let files = self.files();
        files.iter().flat_map(|file| file.right.let_go()).collect()
    }

    /// The export uses no node any more.
    pub(crate) fn take_back(&self) {
        for file in self.files() {
            file.right.take_back();
        }
    }
}
