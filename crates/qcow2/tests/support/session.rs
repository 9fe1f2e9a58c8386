//! Random requests to an open disk, in rounds: those of one round run at the same time, on several threads and several
//! at once on each, and may overlap; what they read and what is left is checked against a [`Model`].

use std::sync::Arc;

use diskfuse_block::{Kind, Node, Resize, Result, Zeroes};
use diskfuse_ring::{IoThread, Reply};

use super::engine::{self, wait};
use super::image::SECTOR;
use super::model::{Change, FIRST, Model, Tag, write_bytes};
use super::rng::Rng;

/// One request.
#[derive(Clone, Debug)]
pub enum Op {
    Read { offset: u64, len: u64 },
    Write { offset: u64, len: u64, tag: Tag },
    Zero { offset: u64, len: u64, how: Zeroes },
    Discard { offset: u64, len: u64 },
    Flush,
    Resize { size: u64 },
}

impl Op {
    fn change(&self) -> Option<Change> {
        match *self {
            Self::Write { offset, len, tag } => Some(Change::Write { offset, len, tag }),
            Self::Zero { offset, len, .. } => Some(Change::Zero { offset, len }),
            Self::Discard { offset, len } => Some(Change::Discard { offset, len }),
            Self::Read { .. } | Self::Flush | Self::Resize { .. } => None,
        }
    }

    async fn run(self, node: Arc<dyn Node>) -> Result<Vec<u8>> {
        let nothing = |()| Vec::new();
        match self {
            Self::Read { offset, len } => engine::read(&*node, offset, len).await,
            Self::Write { offset, len, tag } => {
                let bytes = write_bytes(tag, offset, len);
                engine::write(&*node, offset, &bytes).await.map(nothing)
            }
            Self::Zero { offset, len, how } => {
                node.write_zeroes(offset, len, how).await.map(nothing)
            }
            Self::Discard { offset, len } => node.discard(offset, len).await.map(nothing),
            Self::Flush => node.flush().await.map(nothing),
            Self::Resize { size } => node.resize(size, Resize::Exactly, false).await.map(nothing),
        }
    }
}

/// What requests are wanted.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Requests of a round at most.
    pub together: u64,
    /// Bytes of a request at most.
    pub most: u64,
    /// The size may change.
    pub resize: bool,
    pub cluster_size: u64,
    /// Sizes stay below this.
    pub largest: u64,
}

/// An open disk, its model, and the threads that use it.
pub struct Session<'a> {
    pub node: Arc<dyn Node>,
    pub model: &'a mut Model,
    pub threads: &'a [IoThread],
    /// All requests so far, for whoever has to find out what went wrong.
    pub journal: Vec<String>,
    next: Tag,
    /// Places that requests gather around.
    places: Vec<u64>,
}

impl<'a> Session<'a> {
    pub fn new(
        node: Arc<dyn Node>,
        model: &'a mut Model,
        threads: &'a [IoThread],
        rng: &mut Rng,
    ) -> Self {
        let places = (0..3)
            .map(|_| rng.below(model.size / SECTOR) * SECTOR)
            .collect();
        Self {
            node,
            model,
            threads,
            journal: Vec::new(),
            next: FIRST,
            places,
        }
    }

    /// Starts a request on a thread.
    fn start(&self, thread: usize, op: Op) -> Reply<Result<Vec<u8>>> {
        let node = Arc::clone(&self.node);
        let thread = &self.threads[thread % self.threads.len()];
        thread.mailbox().call(move || op.run(node))
    }

    /// Runs requests at the same time and checks what they saw.
    pub fn round(&mut self, ops: &[Op]) {
        self.journal.push(format!("{ops:?}"));
        if let [Op::Resize { size }] = *ops {
            return self.resize(size);
        }
        let changes: Vec<Change> = ops.iter().filter_map(Op::change).collect();
        let start = |(n, op): (usize, &Op)| self.start(n, op.clone());
        let replies: Vec<_> = ops.iter().enumerate().map(start).collect();
        for (op, reply) in ops.iter().zip(replies) {
            let found = match wait(reply, op) {
                Ok(found) => found,
                Err(error) => self.fail(&format!("{op:?}: {error}")),
            };
            if let Op::Read { offset, .. } = *op
                && let Err(wrong) = self.model.check(offset, &found, &changes)
            {
                self.fail(&wrong);
            }
        }
        self.model.apply(&changes);
    }

    fn resize(&mut self, size: u64) {
        let op = Op::Resize { size };
        match wait(self.start(0, op.clone()), &op) {
            Ok(_) => self.model.resize(size),
            // An image with snapshots may refuse it.
            Err(error) if error.kind() == Kind::Unsupported => {}
            Err(error) => self.fail(&format!("{op:?}: {error}")),
        }
        let now = self.node.size();
        if now != self.model.size {
            let should = self.model.size;
            self.fail(&format!("{now} bytes after a resize, not {should}"));
        }
    }

    /// One random round.
    pub fn random_round(&mut self, rng: &mut Rng, load: Load) {
        if load.resize && rng.chance(4) {
            let size = self.random_size(rng, load);
            return self.round(&[Op::Resize { size }]);
        }
        let count = if rng.chance(30) {
            1
        } else {
            rng.within(1..load.together + 1)
        };
        let ops: Vec<Op> = (0..count).map(|_| self.random_op(rng, load)).collect();
        self.round(&ops);
    }

    fn random_size(&self, rng: &mut Rng, load: Load) -> u64 {
        let size = self.model.size;
        let by = rng.length(SECTOR, size / 2 + SECTOR);
        let least = 64 << 10;
        let wanted = if rng.chance(60) {
            (size + by).min(load.largest.max(size))
        } else {
            (size - by.min(size / 2)).max(least.min(size))
        };
        wanted / SECTOR * SECTOR
    }

    fn random_op(&mut self, rng: &mut Rng, load: Load) -> Op {
        let (offset, len) = self.random_range(rng, load);
        match rng.below(100) {
            0..30 => Op::Read { offset, len },
            30..34 => Op::Write {
                offset,
                len,
                tag: super::model::ZERO,
            },
            34..68 => {
                self.next += 1;
                let tag = self.next;
                Op::Write { offset, len, tag }
            }
            68..82 => {
                let how = rng.pick(&[Zeroes::Keep, Zeroes::MayUnmap]);
                Op::Zero { offset, len, how }
            }
            82..94 => Op::Discard { offset, len },
            _ => Op::Flush,
        }
    }

    /// Whole clusters as often as parts, small as often as large, gathered as often as scattered.
    fn random_range(&self, rng: &mut Rng, load: Load) -> (u64, u64) {
        let size = self.model.size;
        let unit = if rng.chance(40) {
            load.cluster_size
        } else {
            SECTOR
        };
        let len = rng.length(unit, load.most).min(size);
        let at = if rng.chance(60) || size > load.largest {
            let near = 4 * load.cluster_size.max(64 << 10);
            rng.pick(&self.places) + rng.below(near)
        } else {
            rng.below(size)
        };
        let at = at.min(size - len) / unit * unit;
        (at, len)
    }

    /// Reads all that may be there, and a little around it, on all threads; then it is known exactly.
    pub fn read_all(&mut self) {
        let mut ops = Vec::new();
        let mut end = 0;
        for sector in self.model.interesting() {
            let at = sector * SECTOR;
            if at >= end {
                let start = at.saturating_sub(4096).max(end);
                end = (at + (256 << 10)).min(self.model.size);
                ops.push(Op::Read {
                    offset: start,
                    len: end - start,
                });
            }
        }
        for ops in ops.chunks(16) {
            self.round(ops);
        }
    }

    /// Panics with all that happened.
    pub fn fail(&self, wrong: &str) -> ! {
        let journal = self.journal.join("\n");
        panic!(
            "{wrong}\nafter, on {} threads,\n{journal}",
            self.threads.len()
        );
    }
}
