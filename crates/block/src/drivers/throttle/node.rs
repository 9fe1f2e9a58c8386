//! The node: it waits for the group's leave, then does what it was asked on the node below. Without limits it only hands
//! on where the bytes are, which costs nothing.

use std::sync::Arc;

use diskfuse_ring::Buf;

use super::group::{Member, ThrottleGroup};
use crate::drivers::only_child;
use crate::error::{Error, Kind, Result};
use crate::graph::ChildRole;
use crate::io;
use crate::node::{
    Access, Allocation, BlockStatus, Extent, LetGo, Limits, LocalFuture, Node, Resize, Zeroes,
};

/// Another node, held back by a group's limits.
pub struct ThrottleNode {
    child: Arc<dyn Node>,
    member: Arc<Member>,
    read_only: bool,
}

/// Shows `child`, held back by the limits of `group`, of which it is a member as long as it lives. With `read_only` it
/// refuses writes even if the child takes them.
pub fn open_throttle(
    child: Arc<dyn Node>,
    group: &Arc<ThrottleGroup>,
    read_only: bool,
) -> Arc<ThrottleNode> {
    Arc::new(ThrottleNode {
        child,
        member: Member::join(group),
        read_only,
    })
}

impl ThrottleNode {
    /// Waits for its turn to write.
    async fn write_turn(&self, len: u64) -> Result<()> {
        if self.read_only {
            return Err(Error::new(Kind::ReadOnly, "the throttle node is read-only"));
        }
        self.member.turn(Access::Write, len).await;
        Ok(())
    }
}

impl Node for ThrottleNode {
    fn driver(&self) -> &'static str {
        "throttle"
    }

    fn size(&self) -> u64 {
        self.child.size()
    }

    fn read_only(&self) -> bool {
        self.read_only || self.child.read_only()
    }

    fn limits(&self) -> Limits {
        self.child.limits()
    }

    fn allocated(&self) -> u64 {
        self.child.allocated()
    }

    fn filename(&self) -> Option<String> {
        self.child.filename()
    }

    fn resolve(&self, access: Access, offset: u64, len: u64) -> Extent<'_> {
        let refused = access == Access::Write && self.read_only;
        if refused || self.member.group().is_limited(access) {
            return Extent::Work { len };
        }
        self.child.resolve(access, offset, len)
    }

    fn read(&self, offset: u64, buf: Buf) -> LocalFuture<'_, (Result<()>, Buf)> {
        Box::pin(async move {
            self.member.turn(Access::Read, buf.len() as u64).await;
            io::read(&*self.child, offset, buf).await
        })
    }

    fn write(&self, offset: u64, buf: Buf) -> LocalFuture<'_, (Result<()>, Buf)> {
        Box::pin(async move {
            match self.write_turn(buf.len() as u64).await {
                Ok(()) => io::write(&*self.child, offset, buf).await,
                Err(error) => (Err(error), buf),
            }
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64, how: Zeroes) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            self.write_turn(len).await?;
            self.child.write_zeroes(offset, len, how).await
        })
    }

    fn discard(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            self.write_turn(len).await?;
            self.child.discard(offset, len).await
        })
    }

    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        self.child.flush()
    }

    fn resize(&self, size: u64, how: Resize, preallocate: bool) -> LocalFuture<'_, Result<()>> {
        self.child.resize(size, how, preallocate)
    }

    fn block_status(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<BlockStatus>> {
        self.child.block_status(offset, len)
    }

    fn compresses(&self) -> bool {
        self.child.compresses()
    }

    fn write_compressed(&self, offset: u64, buf: Buf) -> LocalFuture<'_, (Result<()>, Buf)> {
        Box::pin(async move {
            match self.write_turn(buf.len() as u64).await {
                Ok(()) => self.child.write_compressed(offset, buf).await,
                Err(error) => (Err(error), buf),
            }
        })
    }

    fn cluster_size(&self) -> Option<u64> {
        self.child.cluster_size()
    }

    fn allocation(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<Allocation>> {
        self.child.allocation(offset, len)
    }

    fn populate(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<()>> {
        self.child.populate(offset, len)
    }

    fn let_go(&self) -> Option<LetGo> {
        Some(Box::new(self.member.release()))
    }

    fn on_children(&self, children: &[(ChildRole, Arc<dyn Node>)]) -> Result<Arc<dyn Node>> {
        Ok(Arc::new(Self {
            child: only_child(self.driver(), children)?,
            member: Arc::clone(&self.member),
            read_only: self.read_only,
        }))
    }
}
