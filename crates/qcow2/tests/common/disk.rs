//! A disk in memory that tells a log of everything it is told to do. It never says where its bytes are, so that all
//! I/O comes through it; it delays, reorders, holds and fails operations on demand, and it can be full.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Poll, Waker};

use diskfuse_block::{
    Access, BlockStatus, Error, Extent, Kind, Limits, LocalFuture, Node, Resize, Result, Zeroes,
};
use diskfuse_ring::{Buf, yield_now};
use parking_lot::Mutex;

use super::SECTOR;
use super::log::{Op, Recorder};
use super::rng::Rng;

/// The unit of allocation, in bytes.
const BLOCK: u64 = 4096;

/// How a disk behaves.
#[derive(Clone, Copy, Debug)]
pub struct Manners {
    /// Turns of the loop that most operations take at most.
    pub patience: u64,
    /// What a discarded range reads as.
    pub discarded: u8,
    /// Nobody may write.
    pub read_only: bool,
}

impl Default for Manners {
    fn default() -> Self {
        Self {
            patience: 6,
            discarded: 0,
            read_only: false,
        }
    }
}

type Fault = Box<dyn FnMut(&Op) -> Option<i32> + Send>;
type Held = Box<dyn Fn(&Op) -> bool + Send>;

struct State {
    bytes: Vec<u8>,
    /// Blocks that take space.
    blocks: Vec<bool>,
    used: u64,
    /// Blocks that may take space.
    room: Option<u64>,
    rng: Rng,
    fault: Option<Fault>,
    held: Option<Held>,
    waiting: Vec<Waker>,
    /// A flush has failed: all later ones do, as those of a file in the page cache.
    broken: bool,
}

/// The disk.
pub struct Disk {
    recorder: Recorder,
    index: usize,
    manners: Manners,
    size: AtomicU64,
    state: Mutex<State>,
}

impl Disk {
    /// A disk that holds `bytes`, number `index` in the log.
    pub fn new(
        recorder: &Recorder,
        index: usize,
        bytes: Vec<u8>,
        seed: u64,
        manners: Manners,
    ) -> Arc<Self> {
        let mut bytes = bytes;
        bytes.resize(bytes.len().next_multiple_of(SECTOR as usize), 0);
        let blocks: Vec<bool> = bytes
            .chunks(BLOCK as usize)
            .map(|block| block.iter().any(|&byte| byte != 0))
            .collect();
        Arc::new(Self {
            recorder: recorder.clone(),
            index,
            manners,
            size: AtomicU64::new(bytes.len() as u64),
            state: Mutex::new(State {
                used: blocks.iter().filter(|&&used| used).count() as u64,
                blocks,
                bytes,
                room: None,
                rng: Rng::new(seed),
                fault: None,
                held: None,
                waiting: Vec::new(),
                broken: false,
            }),
        })
    }

    /// A disk whose log nobody reads, which answers at once.
    pub fn quiet(bytes: Vec<u8>) -> Arc<Self> {
        let manners = Manners {
            patience: 0,
            ..Manners::default()
        };
        Self::new(&Recorder::default(), 0, bytes, 0, manners)
    }

    /// What it holds now.
    pub fn bytes(&self) -> Vec<u8> {
        self.state.lock().bytes.clone()
    }

    /// Operations for which `fault` knows an errno fail with it, writes perhaps in their midst.
    pub fn fail(&self, fault: impl FnMut(&Op) -> Option<i32> + Send + 'static) {
        self.state.lock().fault = Some(Box::new(fault));
    }

    /// From now on nothing fails by itself.
    pub fn heal(&self) {
        let mut state = self.state.lock();
        state.fault = None;
        state.broken = false;
    }

    /// Operations that match do not end until [`Disk::release`].
    pub fn hold(&self, held: impl Fn(&Op) -> bool + Send + 'static) {
        self.state.lock().held = Some(Box::new(held));
    }

    /// Whatever was held goes on.
    pub fn release(&self) {
        let waiting = {
            let mut state = self.state.lock();
            state.held = None;
            std::mem::take(&mut state.waiting)
        };
        waiting.into_iter().for_each(Waker::wake);
    }

    /// How many operations are held.
    pub fn holding(&self) -> usize {
        self.state.lock().waiting.len()
    }

    /// Leaves room for so many bytes more than it holds, or as many as anybody wants.
    pub fn set_room(&self, bytes: Option<u64>) {
        let mut state = self.state.lock();
        state.room = bytes.map(|bytes| state.used + bytes / BLOCK);
    }

    fn check(&self, offset: u64, len: u64) -> Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.size() => Ok(()),
            _ => Err(Error::new(
                Kind::Invalid,
                format!("{len} bytes at {offset} are past the end of the test's disk"),
            )),
        }
    }

    /// Takes a while, and longer if it is held.
    async fn linger(&self, op: Option<&Op>) {
        let turns = match self.manners.patience {
            0 => 0,
            patience => {
                let rng = &mut self.state.lock().rng;
                // Now and then one takes so long that much is done meanwhile.
                let most = if rng.chance(4) {
                    patience * 40
                } else {
                    patience
                };
                rng.below(most)
            }
        };
        for _ in 0..turns {
            yield_now().await;
        }
        let Some(op) = op else { return };
        std::future::poll_fn(|cx| {
            let mut state = self.state.lock();
            if !state.held.as_ref().is_some_and(|held| held(op)) {
                return Poll::Ready(());
            }
            state.waiting.retain(|waker| !waker.will_wake(cx.waker()));
            state.waiting.push(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// Begins, takes a while, is done or fails, and all of it is in the log.
    async fn perform(&self, op: Op) -> Result<()> {
        if self.manners.read_only {
            return Err(Error::new(Kind::ReadOnly, "the test's disk is read-only"));
        }
        let id = self.recorder.log().begin(self.index, op.clone());
        self.linger(Some(&op)).await;
        let mut state = self.state.lock();
        let errno = state.refuses(&op);
        let done = match errno {
            Some(_) => state.part_of(&op),
            None => op.clone(),
        };
        state.apply(&done);
        self.size.store(state.bytes.len() as u64, Ordering::SeqCst);
        // While the state is locked, so that the log has the order in which bytes replaced each other.
        let part = errno.is_some().then_some(done);
        self.recorder.log().end(id, errno.is_none(), part);
        drop(state);
        match errno {
            None => Ok(()),
            Some(errno) => {
                let source = std::io::Error::from_raw_os_error(errno);
                Err(Error::os(format!("{op} of the test's disk"), source))
            }
        }
    }
}

impl State {
    fn refuses(&mut self, op: &Op) -> Option<i32> {
        let mut errno = self.fault.as_mut().and_then(|fault| fault(op));
        if matches!(op, Op::Flush) {
            self.broken |= errno.is_some();
            return self.broken.then_some(errno.unwrap_or(libc_errno::EIO));
        }
        if errno.is_none()
            && let Op::Write { .. } = op
            && let Some(room) = self.room
        {
            let range = op.range();
            let blocks = range.start / BLOCK..range.end.div_ceil(BLOCK);
            let new = blocks.filter(|&b| self.blocks.get(b as usize) != Some(&true));
            let full = self.used + new.count() as u64 > room;
            errno = full.then_some(libc_errno::ENOSPC);
        }
        errno
    }

    /// As much of a failed operation as is done all the same: the first sectors of a write.
    fn part_of(&mut self, op: &Op) -> Op {
        match op {
            Op::Write { offset, data } => {
                let keep = (self.rng.below(data.len() as u64 / SECTOR + 1) * SECTOR) as usize;
                Op::Write {
                    offset: *offset,
                    data: data[..keep].into(),
                }
            }
            Op::Fill { offset, fill, .. } => Op::Fill {
                offset: *offset,
                len: 0,
                fill: *fill,
            },
            Op::Resize { .. } => Op::Resize {
                size: 0,
                grow: true,
            },
            Op::Flush => Op::Flush,
        }
    }

    fn resize(&mut self, size: u64) {
        self.bytes.resize(size as usize, 0);
        self.blocks.resize(size.div_ceil(BLOCK) as usize, false);
        self.used = self.blocks.iter().filter(|&&used| used).count() as u64;
    }

    fn apply(&mut self, op: &Op) {
        let range = op.range();
        let size = self.bytes.len() as u64;
        match op {
            Op::Write { data, .. } => {
                // As a file does whose end was cut off meanwhile.
                if range.end > size {
                    self.resize(range.end);
                }
                self.bytes[range.start as usize..range.end as usize].copy_from_slice(data);
                for block in range.start / BLOCK..range.end.div_ceil(BLOCK) {
                    let used = &mut self.blocks[block as usize];
                    self.used += u64::from(!*used);
                    *used = true;
                }
            }
            Op::Fill { fill, .. } => {
                let end = range.end.min(size).max(range.start);
                self.bytes[range.start as usize..end as usize].fill(*fill);
                for block in range.start.div_ceil(BLOCK)..end / BLOCK {
                    let used = &mut self.blocks[block as usize];
                    self.used -= u64::from(*used);
                    *used = false;
                }
            }
            Op::Resize { size: wanted, grow } => {
                if !grow || *wanted > size {
                    self.resize(*wanted);
                }
            }
            Op::Flush => {}
        }
    }
}

/// The two numbers of errno.h that disks like.
pub mod libc_errno {
    /// Input/output error.
    pub const EIO: i32 = 5;
    /// No space left on device.
    pub const ENOSPC: i32 = 28;
}

impl Node for Disk {
    fn driver(&self) -> &'static str {
        "test"
    }

    fn size(&self) -> u64 {
        self.size.load(Ordering::SeqCst)
    }

    fn read_only(&self) -> bool {
        self.manners.read_only
    }

    fn limits(&self) -> Limits {
        Limits {
            request_alignment: 1,
            size_alignment: SECTOR as u32,
        }
    }

    fn allocated(&self) -> u64 {
        self.state.lock().used * BLOCK
    }

    fn filename(&self) -> Option<String> {
        Some(format!("test disk {}", self.index))
    }

    fn resolve(&self, _access: Access, _offset: u64, len: u64) -> Extent<'_> {
        Extent::Work { len }
    }

    fn read(&self, offset: u64, mut buf: Buf) -> LocalFuture<'_, (Result<()>, Buf)> {
        Box::pin(async move {
            self.linger(None).await;
            let result = self.check(offset, buf.len() as u64);
            if result.is_ok() {
                let state = self.state.lock();
                let len = buf.len();
                let there = &state.bytes[offset as usize..][..len];
                buf.as_mut_slice().copy_from_slice(there);
            }
            (result, buf)
        })
    }

    fn write(&self, offset: u64, buf: Buf) -> LocalFuture<'_, (Result<()>, Buf)> {
        Box::pin(async move {
            if let Err(error) = self.check(offset, buf.len() as u64) {
                return (Err(error), buf);
            }
            let data = buf.as_slice().into();
            (self.perform(Op::Write { offset, data }).await, buf)
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64, _how: Zeroes) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            self.check(offset, len)?;
            self.perform(Op::Fill {
                offset,
                len,
                fill: 0,
            })
            .await
        })
    }

    fn discard(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            self.check(offset, len)?;
            let fill = self.manners.discarded;
            self.perform(Op::Fill { offset, len, fill }).await
        })
    }

    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.perform(Op::Flush))
    }

    fn resize(&self, size: u64, how: Resize, _preallocate: bool) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            if how == Resize::AtLeast && size <= self.size() {
                return Ok(());
            }
            let grow = how == Resize::AtLeast;
            self.perform(Op::Resize { size, grow }).await
        })
    }

    fn block_status(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<BlockStatus>> {
        Box::pin(async move {
            self.check(offset, len)?;
            let state = self.state.lock();
            let used = |at: u64| state.blocks.get((at / BLOCK) as usize) == Some(&true);
            let first = used(offset);
            let mut end = (offset / BLOCK + 1) * BLOCK;
            while end < offset + len && used(end) == first {
                end += BLOCK;
            }
            Ok(BlockStatus {
                len: end.min(offset + len) - offset,
                zero: !first,
                host_offset: first.then_some(offset),
            })
        })
    }
}
