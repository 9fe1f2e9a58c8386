//! The contract of a disk. A node *resolves* a range of itself to where the bytes are; whoever asked then moves them
//! with its own ring. A node never answers before what it says is true, and never trusts what an image says.

use std::any::Any;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use diskfuse_ring::{Buf, SharedFd};

use crate::error::{Error, Kind, Result};
use crate::graph::ChildRole;
use crate::hold::Hold;
use crate::host::HostFile;
use crate::permissions::Permissions;

/// A future that stays on its thread.
pub type LocalFuture<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// As long as it is kept, a node holds nothing back: see [`Node::let_go`].
pub type LetGo = Box<dyn Any + Send + Sync>;

/// What is about to be done with a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read it.
    Read,
    /// Write it.
    Write,
}

/// Where the first bytes of a range are. Lengths are bytes, never zero, never more than was asked for.
#[derive(Debug)]
pub enum Extent<'a> {
    /// Byte for byte in a host file: move them with [`HostFile::read`] or [`HostFile::write`], which cope with
    /// alignment and short transfers.
    Host {
        /// The file.
        file: &'a HostFile,
        /// Where in it, in bytes.
        offset: u64,
        /// How many bytes.
        len: u64,
        /// To be kept until the transfer is over.
        hold: Hold<'a>,
    },
    /// Nothing is there: reads are zeroes, writes go nowhere.
    Void {
        /// How many bytes.
        len: u64,
    },
    /// It takes more than moving bytes: call [`Node::read`] or [`Node::write`] for this much.
    Work {
        /// How many bytes.
        len: u64,
    },
}

impl Extent<'_> {
    /// How many bytes it is about.
    pub fn len(&self) -> u64 {
        let (Extent::Host { len, .. } | Extent::Void { len } | Extent::Work { len }) = self;
        *len
    }

    /// A node must not resolve nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What a range holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockStatus {
    /// Bytes, from the offset asked for, that this is true of; never zero, never more than was asked for.
    pub len: u64,
    /// It reads as zeroes, and that is known without reading.
    pub zero: bool,
    /// Where it is in the host file, if it is in one as it is.
    pub host_offset: Option<u64>,
}

/// Whether a range is held by a node itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allocation {
    /// Bytes, from the offset asked for, that this is true of; never zero, never more than was asked for.
    pub len: u64,
    /// The node itself says what is there, data or zeroes; else it shows what its backing has.
    pub allocated: bool,
}

/// The file below, as the header of an image names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackingName {
    /// Its name, as it is to stand in the header.
    pub name: String,
    /// Its format (`raw`, `qcow2`), if it is to be said.
    pub format: Option<String>,
}

/// How often a node found the metadata that it needed in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheUse {
    /// Lookups that found it there.
    pub hits: u64,
    /// Lookups that had to wait until it was read.
    pub misses: u64,
}

/// How to change a size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resize {
    /// To exactly this.
    Exactly,
    /// To this unless it is larger already. Two that grow at once end at the larger of both.
    AtLeast,
}

/// How to write zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zeroes {
    /// Keep the space allocated.
    Keep,
    /// Give the space back if the node discards (`discard=unmap`), else as [`Zeroes::Keep`].
    MayUnmap,
    /// As [`Zeroes::MayUnmap`], and the node itself holds them: also where it has nothing and reads as zeroes because of what it
    /// stands on, or because it stands on nothing. That may be another node the next time.
    Held,
}

/// What requests a node likes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Requests aligned to this many bytes are served without copying; a power of two, 1 if it does not matter.
    /// Others work all the same.
    pub request_alignment: u32,
    /// Sizes must be a multiple of this many bytes ([`Node::resize`] answers EINVAL else); a power of two.
    pub size_alignment: u32,
}

/// A disk: an array of bytes from 0 to [`Node::size`].
///
/// All methods may be called from any thread; the futures run on the thread that made them, which must run a ring.
/// Several may be under way at once; overlapping ones come in some order, each whole with regard to sectors.
/// Offsets and lengths are bytes. Whoever calls has clipped the range to [`Node::size`]; a range past it is an error
/// ([`Kind::Invalid`](crate::Kind::Invalid)), never a panic.
pub trait Node: Any + Send + Sync {
    /// The driver's name, as in `--blockdev driver=…`.
    fn driver(&self) -> &'static str;

    /// Bytes of the disk. A multiple of 512. May change between calls.
    fn size(&self) -> u64;

    /// Whether writing is refused.
    fn read_only(&self) -> bool;

    /// What requests it likes.
    fn limits(&self) -> Limits;

    /// Bytes that it takes on the host (what `du` would show).
    fn allocated(&self) -> u64;

    /// The host file behind it, for messages; `None` if there is none.
    fn filename(&self) -> Option<String>;

    /// How its metadata cache does since the node was opened; `None` if it has none. Any thread may call it; waits for nothing.
    fn cache_use(&self) -> Option<CacheUse> {
        None
    }

    /// The host file that this node is, byte for byte and with nothing in between, opened once more: for the kernel to read
    /// and (if `write`) write by itself, unseen by the node. It carries image locks of its own, as long as somebody has it.
    /// The error says why it cannot be had.
    fn plain_file(&self, write: bool) -> std::result::Result<SharedFd, String> {
        let _ = write;
        Err(format!(
            "a node of driver '{}' is not a plain file",
            self.driver()
        ))
    }

    /// Where the bytes from `offset` on are: the hot path. Takes no lock that is held across I/O, waits for nothing,
    /// allocates nothing.
    fn resolve(&self, access: Access, offset: u64, len: u64) -> Extent<'_>;

    /// Fills the window of `buf` from `offset`. For what [`Node::resolve`] calls work; right for everything.
    fn read(&self, offset: u64, buf: Buf) -> LocalFuture<'_, (Result<()>, Buf)>;

    /// Writes the window of `buf` at `offset`. For what [`Node::resolve`] calls work; right for everything.
    fn write(&self, offset: u64, buf: Buf) -> LocalFuture<'_, (Result<()>, Buf)>;

    /// Whether [`Node::write_compressed`] can make data smaller.
    fn compresses(&self) -> bool {
        false
    }

    /// [`Node::write`], with those units of [`Node::cluster_size`] that are written as a whole kept compressed where that makes
    /// them smaller. Nobody else may be writing the range.
    fn write_compressed(&self, offset: u64, buf: Buf) -> LocalFuture<'_, (Result<()>, Buf)> {
        self.write(offset, buf)
    }

    /// Makes a range read as zeroes.
    fn write_zeroes(&self, offset: u64, len: u64, how: Zeroes) -> LocalFuture<'_, Result<()>>;

    /// Says that a range is not needed any more. What it reads as afterwards is up to the node; with
    /// `discard=ignore` nothing happens.
    fn discard(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<()>>;

    /// Everything written before this call is on stable storage when it resolves, in dependency order.
    fn flush(&self) -> LocalFuture<'_, Result<()>>;

    /// Changes the size. New bytes read as zeroes. With `preallocate` new space is allocated on the host.
    fn resize(&self, size: u64, how: Resize, preallocate: bool) -> LocalFuture<'_, Result<()>>;

    /// What the range from `offset` on holds, `len` bytes at most.
    fn block_status(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<BlockStatus>>;

    /// The node is not going to be used any more, and nothing is in flight: everything written is on stable storage when
    /// it resolves, and what is kept for speed while the node is in use is put in order. What it stands on is not closed, as
    /// others may use that. Whoever owns the node calls it
    /// before it drops it, those above first; it may be called again, but the node need not serve anything afterwards. A
    /// node that is dropped without it, as in a crash, has lost nothing that was flushed.
    fn close(&self) -> LocalFuture<'_, Result<()>> {
        self.flush()
    }

    /// For a node that holds requests back of its own accord, for example to keep to a rate: it lets those go that it holds
    /// back, and holds back no others until what it returns is dropped. The graph calls it, as somebody waits for the end of
    /// what is in flight. From any thread; must not block.
    fn let_go(&self) -> Option<LetGo> {
        None
    }

    /// The same disk on other children, which are given in the order of the graph's edges: it shares everything else with
    /// this node, which is not used any more when the new one is. The graph calls it while nothing is in flight.
    ///
    /// [`Kind::Unsupported`](crate::Kind::Unsupported) if it cannot be put on them.
    fn on_children(&self, children: &[(ChildRole, Arc<dyn Node>)]) -> Result<Arc<dyn Node>> {
        let _ = children;
        let message = format!(
            "a node of driver '{}' cannot be put on another",
            self.driver()
        );
        Err(Error::new(Kind::Unsupported, message))
    }

    /// Bytes of the unit in which it allocates space, for those who copy to it; a power of two. `None` if it has none.
    fn cluster_size(&self) -> Option<u64> {
        None
    }

    /// Whether the range from `offset` on, `len` bytes at most, is held by this node itself. Whoever stands on no backing node
    /// holds everything.
    fn allocation(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<Allocation>> {
        let _ = offset;
        let allocated = true;
        Box::pin(std::future::ready(Ok(Allocation { len, allocated })))
    }

    /// Makes this node hold a range itself: what it shows of its backing node there is copied into it. What others write
    /// meanwhile stays. Nobody can see a difference.
    fn populate(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<()>> {
        let _ = (offset, len);
        Box::pin(std::future::ready(Ok(())))
    }

    /// Writes another name of the file below into the image, or none: it is on stable storage when it resolves, after everything
    /// that was written before. After a crash the image names the one or the other. The node that this one stands on in
    /// memory stays the same: that is the graph's business.
    fn change_backing(&self, backing: Option<BackingName>) -> LocalFuture<'_, Result<()>> {
        let _ = backing;
        let message = format!("a node of driver '{}' names no backing file", self.driver());
        let error = Error::new(Kind::Unsupported, message);
        Box::pin(std::future::ready(Err(error)))
    }

    /// The graph says what the users of this node, and of all nodes above it, do (`used`) and let others do beside
    /// them (`shared`); nobody else may call it. A node that holds something that other processes could hold as well
    /// tells them here, and answers [`Kind::Busy`](crate::Kind::Busy), with nothing changed, if one of them objects.
    /// Blocks for a few system calls at most; never called for I/O.
    fn set_permissions(&self, used: Permissions, shared: Permissions) -> Result<()> {
        let _ = (used, shared);
        Ok(())
    }
}

/// What a node is, for callers that need more of it than the contract; wraps hide it.
pub fn downcast<T: Node>(node: &dyn Node) -> Option<&T> {
    let any: &dyn Any = node;
    any.downcast_ref()
}

/// Something that sits between a node and everyone who uses it, for a while: it watches writes, or holds them back. It has
/// no name in the graph; see [`Graph::change`](crate::Graph::change).
pub trait Wrap: Send + Sync {
    /// The disk that users of `node` see from now on. Called again, with another node, when the graph changes below; what
    /// it keeps of its own belongs to the wrap. It must not do I/O.
    fn over(&self, node: Arc<dyn Node>) -> Arc<dyn Node>;
}
