//! `blockdev-mirror`, and the commit of an active image: a copy that is kept the same as a disk that is written, and at last
//! takes its place, or is left as it is at one moment. The guest stands still only for what was dirty last.

mod config;
mod tracker;

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use diskfuse_block::graph::Change;
use diskfuse_block::{
    DirtyBitmap, Error, Graph, Kind, LocalFuture, Permissions, Resize, Result, Wrap,
};

use crate::backup::{check_sizes, unwrap};
use crate::chain::{self, held_above};
use crate::copy::{Bounce, Failure, PIECE, WORKERS, is_zero, stretch};
use crate::drive::{Driver, crew};
use crate::event::{ErrorAction, Operation};
use crate::job::{Ending, Job};
use crate::registry::{Jobs, Start, Undo};
use crate::seat::{Rights, Seat};
use crate::status::JobType;
pub use config::{CopyMode, MirrorConfig, MirrorSync};
use config::{check_apart, check_replaces, lowest};
use tracker::{AroundSource, Tracker};

/// What may be dirty when the guest is stopped for the last time: as many bytes as any disk writes in some tens of milliseconds,
const LAST: u64 = 4 << 20;
/// or as many as this one seems to copy in this time.
const SHORT: Duration = Duration::from_millis(100);
/// A sweep that leaves more than this part of what it began with (one of so many) is outrun by the guest, who waits for the target
/// then until the job is ready, and once more when it is completed.
const NEARER: u64 = 2;
/// Sweeps that try to get below that before the guest is stopped anyway.
const SWEEPS: usize = 16;
/// How long a job that is ready lets dirt gather.
const GATHER: Duration = Duration::from_millis(50);

/// Gets a mirror ready to begin.
///
/// # Errors
/// In the words of `blockdev-mirror`: if the id or a node is in use, the nodes are the same or of different sizes, or the node
/// to replace does not show what the source does.
pub fn mirror(jobs: &Jobs, graph: &Graph, config: MirrorConfig) -> Result<Start> {
    check_apart(graph, &config)?;
    check_sizes(&*graph.get(&config.source)?, &*graph.get(&config.target)?)?;
    check_replaces(graph, &config)?;
    let scope = match config.sync {
        MirrorSync::Full => Scope::All,
        MirrorSync::Top => Scope::Layers(vec![config.source.clone()]),
        MirrorSync::None => Scope::Nothing,
    };
    let nodes = vec![config.source.clone(), config.target.clone()];
    let target = Rights {
        perm: Permissions::WRITE,
        shared: Permissions::CONSISTENT_READ | Permissions::WRITE_UNCHANGED,
    };
    let what = What {
        kind: JobType::Mirror,
        scope,
        nodes,
        target,
        hidden: false,
    };
    start(jobs, graph, config, what)
}

/// What is different in a mirror and in a commit.
pub(crate) struct What {
    pub(crate) kind: JobType,
    pub(crate) scope: Scope,
    /// All that it works on.
    pub(crate) nodes: Vec<String>,
    pub(crate) target: Rights,
    /// Whether the target is below the source, so that nobody but the chain between them may see what is written.
    pub(crate) hidden: bool,
}

/// Bytes that are copied in `time`, if `bytes` were in `took`.
fn dirty_in(time: Duration, bytes: u64, took: Duration) -> u64 {
    let rate = u128::from(bytes) * time.as_nanos() / took.as_nanos().max(1);
    u64::try_from(rate).unwrap_or(u64::MAX)
}

/// What is dirty when the job begins.
pub(crate) enum Scope {
    All,
    Nothing,
    /// What these hold, from above to below.
    Layers(Vec<String>),
}

pub(crate) fn start(jobs: &Jobs, graph: &Graph, config: MirrorConfig, what: What) -> Result<Start> {
    let chain = what.nodes.clone();
    let admission = jobs.admit(what.kind, config.job.clone(), what.nodes)?;
    let job = Arc::clone(&admission.job);
    let reads = Rights {
        perm: Permissions::CONSISTENT_READ,
        shared: Permissions::ALL,
    };
    // The guest may write to the target as well.
    let along = Some(&*config.source);
    let source = Seat::take(graph, &job, &config.source, reads, None)?;
    let target = Arc::new(Seat::take(graph, &job, &config.target, what.target, along)?);
    let between = match what.hidden {
        true => hide(graph, &job, &chain, &target)?,
        false => Vec::new(),
    };
    let node = source.node();
    let granularity = match config.granularity {
        Some(granularity) => granularity,
        None => DirtyBitmap::default_granularity(&*target.node()),
    };
    let tracker = Tracker::new(
        job,
        Arc::clone(&target),
        node.size(),
        granularity,
        config.on_target_error,
    )?;
    let wrap: Arc<dyn Wrap> = Arc::new(AroundSource(Arc::clone(&tracker)));
    let around = || Arc::clone(&wrap);
    let name = config.source.clone();
    let changes = vec![Change::Wrap {
        node: name.clone(),
        wrap: around(),
    }];
    let undo = vec![Change::Unwrap {
        node: name.clone(),
        wrap: around(),
    }];
    let driver = Mirror {
        graph: graph.clone(),
        source,
        target,
        between,
        tracker,
        wrap,
        scope: what.scope,
        config,
        pivoted: AtomicBool::new(false),
    };
    Ok(Start {
        graph: graph.clone(),
        admission,
        driver: Box::new(driver),
        nodes: vec![name],
        changes,
        undo: Undo::new(graph, undo),
    })
}

/// Lets nobody else see what the nodes below the first of a chain show.
fn hide(graph: &Graph, job: &Arc<Job>, chain: &[String], target: &Seat) -> Result<Vec<Seat>> {
    let readers = chain::readers(graph, chain)?;
    target.show_only_to(&readers)?;
    let rights = Rights {
        perm: Permissions::NONE,
        shared: Permissions::ALL,
    };
    let between = chain.iter().skip(1).filter(|name| *name != target.name());
    let seats = between.map(|name| {
        let seat = Seat::take(graph, job, name, rights, None)?;
        seat.show_only_to(&readers)?;
        Ok(seat)
    });
    seats.collect()
}

struct Mirror {
    graph: Graph,
    source: Seat,
    target: Arc<Seat>,
    /// At the images between them, if the target is below.
    between: Vec<Seat>,
    tracker: Arc<Tracker>,
    wrap: Arc<dyn Wrap>,
    scope: Scope,
    config: MirrorConfig,
    pivoted: AtomicBool,
}

/// One walk over what is dirty, by several at a time.
#[derive(Default)]
struct Sweep {
    /// The guest stands still.
    still: bool,
    cursor: Cell<u64>,
    /// It has failed.
    stop: Cell<bool>,
    /// Something met an error and is still dirty.
    missed: Cell<bool>,
}

impl Mirror {
    /// Finds out what must be copied at all.
    async fn look_around(&self, job: &Arc<Job>) -> Result<()> {
        match &self.scope {
            Scope::All => self.skip_zeroes(job).await,
            Scope::Nothing => Ok(()),
            Scope::Layers(layers) => {
                self.make_room(job).await?;
                self.find_layers(job, layers).await
            }
        }
    }

    /// The base of a commit may be the smaller one.
    async fn make_room(&self, job: &Arc<Job>) -> Result<()> {
        let Some(_pass) = job.pass(0).await else {
            return Ok(());
        };
        let (target, size) = (self.target.node(), self.tracker.dirty.size());
        match target.size() < size {
            true => target.resize(size, Resize::AtLeast, false).await,
            false => Ok(()),
        }
    }

    /// What both show as zeroes need not be copied.
    async fn skip_zeroes(&self, job: &Arc<Job>) -> Result<()> {
        {
            let Some(_pass) = job.pass(0).await else {
                return Ok(());
            };
            // In blocking mode the guest may be writing there: that is marked by whoever writes.
            if !is_zero(&*self.target.node()).await? {
                return Ok(());
            }
            self.tracker.fresh.store(true, Ordering::SeqCst);
        }
        let dirty = &self.tracker.dirty;
        let (mut at, size, unit) = (0, dirty.size(), dirty.granularity());
        while at < size {
            let Some(_pass) = job.pass(0).await else {
                return Ok(());
            };
            let source = self.source.node();
            let (len, zero) = stretch(&*source, at, size - at).await?;
            // Whole units; nobody needs to know of smaller ones, as they are looked at when they are copied.
            let start = at.next_multiple_of(unit);
            let end = match at + len >= size {
                true => size,
                false => (at + len) / unit * unit,
            };
            if zero && start < end {
                self.skip(start, end, &*source).await?;
            }
            at += len;
        }
        Ok(())
    }

    /// Not dirty any more, and then looked at once more: whoever wrote in between has marked it, or shows.
    async fn skip(&self, start: u64, end: u64, source: &dyn diskfuse_block::Node) -> Result<()> {
        let dirty = &self.tracker.dirty;
        dirty.clear(start, end - start);
        let mut at = start;
        while at < end {
            let (len, zero) = stretch(source, at, end - at).await?;
            if !zero {
                dirty.mark(at, len);
            }
            at += len;
        }
        Ok(())
    }

    async fn find_layers(&self, job: &Arc<Job>, names: &[String]) -> Result<()> {
        let dirty = &self.tracker.dirty;
        let (mut at, size) = (0, dirty.size());
        while at < size {
            let Some(_pass) = job.pass(0).await else {
                return Ok(());
            };
            let layers = chain::nodes(&self.graph, names)?;
            let held = held_above(&layers, at, size - at).await?;
            if held.allocated {
                dirty.mark(at, held.len);
            }
            at += held.len;
        }
        Ok(())
    }

    /// Copies what is dirty, each place once. With `still`, the guest stands still and the gate is shut. True if all of it
    /// could be copied.
    async fn sweep(&self, job: &Arc<Job>, still: bool) -> Result<bool> {
        let sweep = Sweep {
            still,
            ..Sweep::default()
        };
        let workers = (0..WORKERS)
            .map(|_| -> LocalFuture<'_, Result<()>> { Box::pin(self.work(job, &sweep)) });
        crew(workers.collect()).await?;
        Ok(!sweep.missed.get())
    }

    async fn work(&self, job: &Arc<Job>, sweep: &Sweep) -> Result<()> {
        let mut bounce = Bounce::default();
        let (dirty, still) = (&self.tracker.dirty, sweep.still);
        while !sweep.stop.get() {
            let piece = if still { PIECE } else { job.piece(PIECE) };
            let Some(area) = dirty.next_dirty(sweep.cursor.get(), u64::MAX, piece) else {
                return Ok(());
            };
            sweep.cursor.set(area.end);
            let len = area.end - area.start;
            let _pass = match still {
                true => job.force_pass(),
                false => match job.pass(len).await {
                    Some(pass) => pass,
                    None => return Ok(()),
                },
            };
            let source = self.source.node();
            self.tracker.check_size(&*source)?;
            match self.tracker.copy(&*source, area, &mut bounce).await {
                Ok(()) => Self::progress(job, len),
                Err(failure) => {
                    let action = self.decide(job, &failure);
                    // The guest, which stands still, cannot wait for another try.
                    if action == ErrorAction::Report || still {
                        sweep.stop.set(true);
                        return Err(failure.error);
                    }
                    sweep.missed.set(true);
                    job.breathe().await;
                }
            }
        }
        Ok(())
    }

    fn decide(&self, job: &Arc<Job>, failure: &Failure) -> ErrorAction {
        let on = match failure.operation {
            Operation::Read => self.config.on_source_error,
            Operation::Write => self.config.on_target_error,
        };
        job.on_error(on, failure.operation, &failure.error)
    }

    fn progress(job: &Arc<Job>, len: u64) {
        job.progress(|done, total| {
            *done += len;
            *total = (*total).max(*done);
        });
    }

    /// Tells how much there is to do, now that all of it is known.
    fn count(&self, job: &Arc<Job>) {
        let left = self.tracker.dirty.dirty_bytes();
        job.progress(|done, total| *total = *done + left);
    }

    async fn run_now(&self, job: &Arc<Job>) -> Result<()> {
        self.look_around(job).await?;
        let mut is_ready = false;
        while !job.is_cancelled() {
            self.tracker.check_size(&*self.source.node())?;
            self.count(job);
            let (begun, dirty) = (Instant::now(), self.tracker.dirty.dirty_bytes());
            let all = self.sweep(job, false).await?;
            self.count(job);
            // What met an error is tried again first: until it is copied, the copy is not as good as done.
            if !all && !is_ready {
                continue;
            }
            let last = dirty_in(SHORT, dirty, begun.elapsed());
            let left = self.tracker.dirty.dirty_bytes();
            if left > last.max(LAST) && !is_ready {
                if left > dirty / NEARER {
                    self.tracker.keep_up(true);
                }
                continue;
            }
            self.tracker.keep_up(false);
            if !is_ready {
                let Some(pass) = job.pass(0).await else {
                    break;
                };
                job.ready(&pass);
                is_ready = true;
            }
            let wanted = || (job.ending().is_some() || job.is_cancelled()).then_some(());
            job.until_or(GATHER, wanted).await;
            if job.ending().is_some() {
                break;
            }
        }
        Ok(())
    }

    /// The guest stands still; the target becomes the same, to the last byte, on stable storage.
    async fn settle(&self, job: &Arc<Job>) -> Result<()> {
        self.tracker.keep_up(true);
        for _ in 0..SWEEPS {
            if self.tracker.dirty.dirty_bytes() <= LAST {
                break;
            }
            self.sweep(job, false).await?;
        }
        // What is on its way to the disk need not be waited for with the guest standing still.
        {
            let _pass = job.settling_pass().await?;
            self.target.node().flush().await?;
        }
        let lowest = lowest(&self.graph, &self.config)?;
        let (_pass, _drained) = self.source.hold_still(job, &lowest).await?;
        self.sweep(job, true).await?;
        self.tracker.check_size(&*self.source.node())?;
        let left = self.tracker.dirty.dirty_bytes();
        if left > 0 {
            let id = job.id();
            let message = format!("{left} bytes of block job '{id}' could not be copied");
            return Err(Error::new(Kind::Os(libc::EIO), message));
        }
        self.count(job);
        self.target.node().flush().await?;
        if job.is_cancelled() {
            return Ok(());
        }
        match job.ending() {
            Some(Ending::Leave) => self.take_away(),
            _ => self.pivot().await,
        }
    }

    /// The wrap goes while the guest stands still, so that the target is what the source was at one moment.
    fn take_away(&self) -> Result<()> {
        self.graph.change(&[self.unwrapping()])?;
        self.pivoted.store(true, Ordering::SeqCst);
        Ok(())
    }

    async fn pivot(&self) -> Result<()> {
        // What the job itself does with the nodes must not be in its users' way.
        self.source.leave();
        self.target.leave();
        self.between.iter().for_each(Seat::leave);
        let from = self.config.replaces.as_ref();
        let replace = Change::Replace {
            from: from.unwrap_or(&self.config.source).clone(),
            to: self.config.target.clone(),
        };
        let orphans = self.graph.change(&[self.unwrapping(), replace])?;
        self.pivoted.store(true, Ordering::SeqCst);
        for orphan in orphans {
            if let Err(error) = orphan.close().await {
                tracing::warn!(%error, "a node that nothing stands on any more was not closed well");
            }
        }
        Ok(())
    }

    fn unwrapping(&self) -> Change {
        Change::Unwrap {
            node: self.config.source.clone(),
            wrap: Arc::clone(&self.wrap),
        }
    }
}

impl Driver for Mirror {
    fn begin(&self) -> Result<()> {
        let (source, job) = (self.source.node(), self.tracker.job());
        // Until everybody stood still, which is now, somebody may have changed the size.
        if job.kind() == JobType::Mirror {
            check_sizes(&*source, &*self.target.node())?;
        }
        let all = matches!(self.scope, Scope::All);
        self.tracker.begin(source.size(), all)?;
        if job.kind() == JobType::Mirror && self.config.copy_mode == CopyMode::WriteBlocking {
            job.begin_write_blocking();
        }
        Ok(())
    }

    fn run<'a>(&'a self, job: &'a Arc<Job>) -> LocalFuture<'a, Result<()>> {
        Box::pin(self.run_now(job))
    }

    fn prepare<'a>(&'a self, job: &'a Arc<Job>) -> LocalFuture<'a, Result<()>> {
        Box::pin(self.settle(job))
    }

    fn finish<'a>(&'a self, _job: &'a Arc<Job>, _succeeded: bool) -> LocalFuture<'a, ()> {
        Box::pin(async {
            self.tracker.end();
            if !self.pivoted.load(Ordering::SeqCst) {
                unwrap(&self.graph, &self.config.source, &self.wrap).await;
            }
            // Whoever was above the wrap may hold on to it for a while; the target is free all the same.
            self.target.leave();
        })
    }

    fn completes(&self) -> bool {
        true
    }
}
