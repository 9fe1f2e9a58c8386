//! A node that lets somebody see every change before it is made, or make it in their own way. Reads pass as they are, and so
//! do writes that the watcher lets through.

use std::ops::Range;
use std::sync::Arc;

use diskfuse_ring::{Buf, SharedFd};

use crate::error::Result;
use crate::io;
use crate::node::{
    Access, Allocation, BackingName, BlockStatus, Extent, Limits, LocalFuture, Node, Resize, Zeroes,
};
use crate::permissions::Permissions;

/// One change of a disk.
#[derive(Debug)]
pub enum Edit {
    /// The window of the buffer is written.
    Write {
        /// Where, in bytes.
        offset: u64,
        /// The data.
        buf: Buf,
    },
    /// A range is made to read as zeroes.
    Zeroes {
        /// Where it begins, in bytes.
        offset: u64,
        /// How many bytes.
        len: u64,
        /// Whether space is kept.
        how: Zeroes,
    },
    /// A range is not needed any more.
    Discard {
        /// Where it begins, in bytes.
        offset: u64,
        /// How many bytes.
        len: u64,
    },
    /// The size changes.
    Resize {
        /// Bytes.
        size: u64,
        /// Whether the disk may stay larger.
        how: Resize,
        /// Whether new space is allocated on the host.
        preallocate: bool,
    },
}

/// What became of an [`Edit`].
#[derive(Debug)]
pub struct Edited {
    /// Whether it was made.
    pub result: Result<()>,
    /// The buffer of a write; nothing for the others.
    pub buf: Option<Buf>,
}

impl Edit {
    /// The bytes, of a disk of `size` bytes, that are not the same afterwards, or may not be.
    pub fn range(&self, size: u64) -> Range<u64> {
        match self {
            Self::Write { offset, buf } => *offset..offset.saturating_add(buf.len() as u64),
            Self::Zeroes { offset, len, .. } | Self::Discard { offset, len } => {
                *offset..offset.saturating_add(*len)
            }
            Self::Resize { size: new, how, .. } => match how {
                Resize::Exactly => (*new).min(size)..size,
                Resize::AtLeast => size..size,
            },
        }
    }

    /// Makes the change.
    pub async fn apply(self, node: &dyn Node) -> Edited {
        let result = match self {
            Self::Write { offset, buf } => {
                let (result, buf) = io::write(node, offset, buf).await;
                return Edited {
                    result,
                    buf: Some(buf),
                };
            }
            Self::Zeroes { offset, len, how } => node.write_zeroes(offset, len, how).await,
            Self::Discard { offset, len } => node.discard(offset, len).await,
            Self::Resize {
                size,
                how,
                preallocate,
            } => node.resize(size, how, preallocate).await,
        };
        Edited { result, buf: None }
    }

    /// The change is not made, because of an error.
    pub fn refuse(self, error: crate::Error) -> Edited {
        let buf = match self {
            Self::Write { buf, .. } => Some(buf),
            _ => None,
        };
        Edited {
            result: Err(error),
            buf,
        }
    }
}

/// Whoever watches the changes of a node. All methods may be called from any thread.
pub trait Watch: Send + Sync {
    /// A range is about to be written by somebody who moves the bytes: whether they may, with nothing said when they are done.
    /// On the way of every write, so as [`Node::resolve`]: no waiting, no lock that is held across I/O.
    fn lets_through(&self, offset: u64, len: u64) -> bool;

    /// Makes a change that `node`'s user asks for, or refuses it.
    fn edit<'a>(&'a self, node: &'a dyn Node, edit: Edit) -> LocalFuture<'a, Edited>;
}

/// A node with somebody who watches its changes.
pub struct Watched {
    node: Arc<dyn Node>,
    watch: Arc<dyn Watch>,
}

impl Watched {
    /// Shows `node`, under the eyes of `watch`.
    pub fn new(node: Arc<dyn Node>, watch: Arc<dyn Watch>) -> Self {
        Self { node, watch }
    }

    fn edit(&self, edit: Edit) -> LocalFuture<'_, Result<()>> {
        let edited = self.watch.edit(&*self.node, edit);
        Box::pin(async move { edited.await.result })
    }
}

impl Node for Watched {
    fn driver(&self) -> &'static str {
        self.node.driver()
    }

    fn size(&self) -> u64 {
        self.node.size()
    }

    fn read_only(&self) -> bool {
        self.node.read_only()
    }

    fn limits(&self) -> Limits {
        self.node.limits()
    }

    fn allocated(&self) -> u64 {
        self.node.allocated()
    }

    fn filename(&self) -> Option<String> {
        self.node.filename()
    }

    fn plain_file(&self, write: bool) -> std::result::Result<SharedFd, String> {
        match write {
            true => Err("its writes are watched by a job or a bitmap".to_owned()),
            false => self.node.plain_file(write),
        }
    }

    fn resolve(&self, access: Access, offset: u64, len: u64) -> Extent<'_> {
        if access == Access::Write && !self.watch.lets_through(offset, len) {
            return Extent::Work { len };
        }
        self.node.resolve(access, offset, len)
    }

    fn read(&self, offset: u64, buf: Buf) -> LocalFuture<'_, (Result<()>, Buf)> {
        self.node.read(offset, buf)
    }

    fn write(&self, offset: u64, buf: Buf) -> LocalFuture<'_, (Result<()>, Buf)> {
        let edited = self.watch.edit(&*self.node, Edit::Write { offset, buf });
        Box::pin(async move {
            let Edited { result, buf } = edited.await;
            // Whatever became of it, a write's buffer comes back: `Edit::apply` and `Edit::refuse` are the only ways.
            let Some(buf) = buf else {
                unreachable!("a write without its buffer")
            };
            (result, buf)
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64, how: Zeroes) -> LocalFuture<'_, Result<()>> {
        self.edit(Edit::Zeroes { offset, len, how })
    }

    fn discard(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<()>> {
        self.edit(Edit::Discard { offset, len })
    }

    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        self.node.flush()
    }

    fn resize(&self, size: u64, how: Resize, preallocate: bool) -> LocalFuture<'_, Result<()>> {
        self.edit(Edit::Resize {
            size,
            how,
            preallocate,
        })
    }

    fn block_status(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<BlockStatus>> {
        self.node.block_status(offset, len)
    }

    fn close(&self) -> LocalFuture<'_, Result<()>> {
        self.node.close()
    }

    fn set_permissions(&self, used: Permissions, shared: Permissions) -> Result<()> {
        self.node.set_permissions(used, shared)
    }

    fn cluster_size(&self) -> Option<u64> {
        self.node.cluster_size()
    }

    fn allocation(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<Allocation>> {
        self.node.allocation(offset, len)
    }

    fn populate(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<()>> {
        self.node.populate(offset, len)
    }

    fn change_backing(&self, backing: Option<BackingName>) -> LocalFuture<'_, Result<()>> {
        self.node.change_backing(backing)
    }
}
