//! The node: it asks the rules, then does what it was asked on the node below. Transfers that no rule speaks of are
//! handed on without a lock.

use std::io::Error as OsError;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use diskfuse_ring::{Buf, Reason, sleep};
use parking_lot::Mutex;

use super::rules::{Event, InjectError, IoType, Rules, SetState};
use crate::drivers::only_child;
use crate::error::{Error, Kind, Result};
use crate::graph::ChildRole;
use crate::io;
use crate::node::{
    Access, Allocation, BlockStatus, Extent, Limits, LocalFuture, Node, Resize, Zeroes,
};

/// What fails, and what the node is like.
#[derive(Clone, Debug, Default)]
pub struct BlkdebugConfig {
    /// Errors, in their order: of several that speak of a request the first one counts.
    pub errors: Vec<InjectError>,
    /// Changes of the state, in their order: of several that fit an event the first one counts.
    pub changes: Vec<SetState>,
    /// The alignment that the node claims to like, a power of two; 0: the child's.
    pub align: u32,
    /// Refuse writes even if the child takes them.
    pub read_only: bool,
}

/// Another node, with errors.
pub struct BlkdebugNode {
    child: Arc<dyn Node>,
    shared: Arc<Shared>,
}

/// What stays when the node is put on another child.
struct Shared {
    config: BlkdebugConfig,
    rules: Mutex<Rules>,
    /// A bit for each kind of transfer that concerns the rules.
    concerns: AtomicU8,
}

/// Shows `child`, with the errors that the rules bring.
pub fn open_blkdebug(child: Arc<dyn Node>, config: BlkdebugConfig) -> Arc<BlkdebugNode> {
    let rules = Rules::new(&config.errors, &config.changes);
    let shared = Shared {
        concerns: AtomicU8::new(concerns(&rules)),
        rules: Mutex::new(rules),
        config,
    };
    Arc::new(BlkdebugNode {
        child,
        shared: Arc::new(shared),
    })
}

fn bit(access: Access) -> u8 {
    match access {
        Access::Read => 1,
        Access::Write => 2,
    }
}

fn concerns(rules: &Rules) -> u8 {
    let all = [Access::Read, Access::Write].into_iter();
    all.filter(|access| rules.concern(*access))
        .fold(0, |bits, access| bits | bit(access))
}

impl Shared {
    fn concern(&self, access: Access) -> bool {
        self.concerns.load(Ordering::Acquire) & bit(access) != 0
    }

    fn ask<T>(&self, ask: impl FnOnce(&mut Rules) -> T) -> T {
        let mut rules = self.rules.lock();
        let answer = ask(&mut rules);
        self.concerns.store(concerns(&rules), Ordering::Release);
        answer
    }

    fn event(&self, event: Event) {
        self.ask(|rules| rules.event(event));
    }

    /// The events come, then the request: it is failed, or may go on.
    async fn request(&self, events: &[Event], io_type: IoType, range: (u64, u64)) -> Result<()> {
        let (offset, len) = range;
        let hit = self.ask(|rules| {
            for event in events {
                rules.event(*event);
            }
            rules.meet(io_type, offset, len)
        });
        let Some(hit) = hit else {
            return Ok(());
        };
        if !hit.delay.is_zero() {
            sleep(hit.delay).await;
        }
        if hit.errno == 0 {
            return Ok(());
        }
        let reason = OsError::from_raw_os_error(hit.errno);
        let reason = Reason(&reason);
        let message = format!("blkdebug: {io_type:?} of {len} bytes at {offset}: {reason}");
        Err(Error::new(Kind::Injected(hit.errno), message))
    }

    fn writable(&self) -> Result<()> {
        if !self.config.read_only {
            return Ok(());
        }
        Err(Error::new(Kind::ReadOnly, "the blkdebug node is read-only"))
    }
}

impl Node for BlkdebugNode {
    fn driver(&self) -> &'static str {
        "blkdebug"
    }

    fn size(&self) -> u64 {
        self.child.size()
    }

    fn read_only(&self) -> bool {
        self.shared.config.read_only || self.child.read_only()
    }

    fn limits(&self) -> Limits {
        let limits = self.child.limits();
        Limits {
            request_alignment: limits.request_alignment.max(self.shared.config.align),
            ..limits
        }
    }

    fn allocated(&self) -> u64 {
        self.child.allocated()
    }

    fn filename(&self) -> Option<String> {
        self.child.filename()
    }

    fn resolve(&self, access: Access, offset: u64, len: u64) -> Extent<'_> {
        let refused = access == Access::Write && self.shared.config.read_only;
        if refused || self.shared.concern(access) {
            return Extent::Work { len };
        }
        self.child.resolve(access, offset, len)
    }

    fn read(&self, offset: u64, buf: Buf) -> LocalFuture<'_, (Result<()>, Buf)> {
        Box::pin(async move {
            if self.shared.concern(Access::Read) {
                let range = (offset, buf.len() as u64);
                let asked = self.shared.request(&[Event::ReadAio], IoType::Read, range);
                if let Err(error) = asked.await {
                    return (Err(error), buf);
                }
            }
            io::read(&*self.child, offset, buf).await
        })
    }

    fn write(&self, offset: u64, buf: Buf) -> LocalFuture<'_, (Result<()>, Buf)> {
        Box::pin(async move {
            if let Err(error) = self.shared.writable() {
                return (Err(error), buf);
            }
            if !self.shared.concern(Access::Write) {
                return io::write(&*self.child, offset, buf).await;
            }
            let events = [Event::WriteAio, Event::Pwritev];
            let range = (offset, buf.len() as u64);
            let asked = self.shared.request(&events, IoType::Write, range).await;
            let outcome = match asked {
                Ok(()) => io::write(&*self.child, offset, buf).await,
                Err(error) => (Err(error), buf),
            };
            self.shared.event(Event::PwritevDone);
            outcome
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64, how: Zeroes) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            self.shared.writable()?;
            let (events, io_type) = ([Event::PwritevZero], IoType::WriteZeroes);
            let asked = self.shared.request(&events, io_type, (offset, len)).await;
            let outcome = match asked {
                Ok(()) => self.child.write_zeroes(offset, len, how).await,
                failed => failed,
            };
            self.shared.event(Event::PwritevDone);
            outcome
        })
    }

    fn discard(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            self.shared.writable()?;
            let asked = self.shared.request(&[], IoType::Discard, (offset, len));
            asked.await?;
            self.child.discard(offset, len).await
        })
    }

    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            let events = [Event::FlushToOs, Event::FlushToDisk];
            self.shared.request(&events, IoType::Flush, (0, 0)).await?;
            self.child.flush().await
        })
    }

    /// Errors are for those who use the node: whoever takes it down meets none.
    fn close(&self) -> LocalFuture<'_, Result<()>> {
        // Not by way of the rules.
        self.child.flush()
    }

    fn resize(&self, size: u64, how: Resize, preallocate: bool) -> LocalFuture<'_, Result<()>> {
        self.child.resize(size, how, preallocate)
    }

    fn block_status(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<BlockStatus>> {
        Box::pin(async move {
            let asked = self.shared.request(&[], IoType::BlockStatus, (offset, len));
            asked.await?;
            self.child.block_status(offset, len).await
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

    fn on_children(&self, children: &[(ChildRole, Arc<dyn Node>)]) -> Result<Arc<dyn Node>> {
        Ok(Arc::new(Self {
            child: only_child(self.driver(), children)?,
            shared: Arc::clone(&self.shared),
        }))
    }
}
