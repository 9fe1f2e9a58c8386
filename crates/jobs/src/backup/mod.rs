//! `blockdev-backup`: a copy of the disk as it was when the job began, while it is written. The source never has to wait
//! for more than the clusters that a write is about to change.

mod before;
mod fleece;

use std::cell::Cell;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use diskfuse_block::graph::Change;
use diskfuse_block::{
    DirtyBitmap, Error, Graph, Kind, LocalFuture, Node, Permissions, Result, Wrap,
};
use parking_lot::Mutex;

use crate::chain;
use crate::copy::{Bounce, Copied, Failure, PIECE, WORKERS, is_zero};
use crate::drive::{Driver, crew};
use crate::event::{ErrorAction, Operation};
use crate::job::{Job, JobConfig};
use crate::policy::OnError;
use crate::registry::{Jobs, Start, Undo};
use crate::seat::{Rights, Seat};
use crate::status::JobType;
pub use before::OnCbwError;
use before::{AroundSource, Before};
use fleece::Fleece;

/// The least that is copied in one piece, in bytes: `BACKUP_CLUSTER_SIZE_DEFAULT`.
const CLUSTER: u64 = 64 << 10;

/// What of the source is copied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BackupSync {
    /// All of it.
    Full,
    /// What the topmost image holds itself; the target has the same backing file.
    Top,
    /// What is overwritten, until the job is cancelled.
    None,
    /// What is dirty in the bitmap of [`BackupConfig::bitmap`] (`incremental`, and `bitmap`).
    Bitmap,
}

/// What becomes of the bitmap (`bitmap-mode`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BitmapMode {
    /// What was copied is clean if the job succeeds; if it does not, all is as if it had not been.
    OnSuccess,
    /// The bitmap is only read.
    Never,
    /// What was copied is clean, however the job ends.
    Always,
}

/// What `blockdev-backup` is told.
#[derive(Clone, Debug)]
pub struct BackupConfig {
    /// What every job is told.
    pub job: JobConfig,
    /// The node to copy (`device`).
    pub source: String,
    /// The node to copy to.
    pub target: String,
    /// What to copy.
    pub sync: BackupSync,
    /// A bitmap of the source, and what becomes of it.
    pub bitmap: Option<(Arc<DirtyBitmap>, BitmapMode)>,
    /// The target keeps it compressed.
    pub compress: bool,
    /// About errors of the source.
    pub on_source_error: OnError,
    /// About errors of the target.
    pub on_target_error: OnError,
    /// About errors in the way of a guest's write.
    pub on_cbw_error: OnCbwError,
}

impl BackupConfig {
    /// A copy of everything.
    pub fn new(job: JobConfig, source: &str, target: &str) -> Self {
        Self {
            job,
            source: source.to_owned(),
            target: target.to_owned(),
            sync: BackupSync::Full,
            bitmap: None,
            compress: false,
            on_source_error: OnError::default(),
            on_target_error: OnError::default(),
            on_cbw_error: OnCbwError::default(),
        }
    }
}

struct Backup {
    graph: Graph,
    source: Seat,
    target: Arc<Seat>,
    /// If the target stands on the source.
    fleece: Option<Fleece>,
    before: Arc<Before>,
    wrap: Arc<dyn Wrap>,
    sync: BackupSync,
    bitmap: Option<Incremental>,
    on_source_error: OnError,
    on_target_error: OnError,
}

/// The user's bitmap and what was in it when the job began.
struct Incremental {
    bitmap: Arc<DirtyBitmap>,
    mode: BitmapMode,
    taken: Mutex<Option<DirtyBitmap>>,
}

/// Gets a backup ready to begin. The disk is copied as it is when [`Start::launch`] is called.
///
/// # Errors
/// In the words of `blockdev-backup`: if the id or a node is in use, the nodes are the same or of different sizes, the
/// bitmap cannot be used, or the target cannot keep anything compressed.
pub fn backup(jobs: &Jobs, graph: &Graph, config: BackupConfig) -> Result<Start> {
    if config.source == config.target {
        return Err(invalid("Source and target cannot be the same"));
    }
    check_sizes(&*graph.get(&config.source)?, &*graph.get(&config.target)?)?;
    let (source, target) = (&config.source, &config.target);
    if let Some(node) = chain::shared_storage(graph, source, target)? {
        return Err(invalid(&format!(
            "Source and target cannot be the same: writes to '{source}' and to '{target}' both come to node '{node}'"
        )));
    }
    let nodes = vec![source.clone(), target.clone()];
    let admission = jobs.admit(JobType::Backup, config.job.clone(), nodes)?;
    let job = Arc::clone(&admission.job);
    let reads = Rights {
        perm: Permissions::CONSISTENT_READ,
        shared: Permissions::ALL,
    };
    let overlay = fleece::overlay(graph, &config)?;
    let writes = Rights {
        // One that stands on the source may be written when the source is guarded.
        perm: match overlay {
            Some(_) => Permissions::NONE,
            None => Permissions::WRITE,
        },
        shared: Permissions::CONSISTENT_READ | Permissions::WRITE_UNCHANGED,
    };
    let source_seat = Seat::take(graph, &job, source, reads, None)?;
    let target_seat = Arc::new(Seat::take(graph, &job, target, writes, Some(source))?);
    let cluster = target_seat.node().cluster_size().unwrap_or(CLUSTER);
    if config.compress && !target_seat.node().compresses() {
        let message = format!("Compression is not supported for this drive {target}");
        return Err(Error::new(Kind::Unsupported, message));
    }
    let left = DirtyBitmap::new(source_seat.node().size(), cluster.max(CLUSTER))?;
    let compressed = config.compress.then_some(cluster);
    let on_error = config.on_cbw_error;
    let before = Before::new(Arc::clone(&job), &target_seat, left, compressed, on_error);
    let wrap: Arc<dyn Wrap> = Arc::new(AroundSource(Arc::clone(&before)));
    let bitmap = config
        .bitmap
        .clone()
        .map(Incremental::take_over)
        .transpose()?;
    if matches!(config.sync, BackupSync::Bitmap) && bitmap.is_none() {
        let message = "must provide a valid bitmap name for 'bitmap' sync mode";
        return Err(invalid(message));
    }
    let (node, around) = (source.clone(), || Arc::clone(&wrap));
    let mut changes = vec![Change::Wrap {
        node: node.clone(),
        wrap: around(),
    }];
    let mut undo = vec![Change::Unwrap {
        node: node.clone(),
        wrap: around(),
    }];
    let fleece = overlay.map(|overlay| Fleece::new(overlay, &before));
    if let Some(fleece) = &fleece {
        changes.extend(fleece.begins());
        undo.extend(fleece.ends());
    }
    let driver = Backup {
        graph: graph.clone(),
        source: source_seat,
        target: target_seat,
        fleece,
        before,
        wrap,
        sync: config.sync,
        bitmap,
        on_source_error: config.on_source_error,
        on_target_error: config.on_target_error,
    };
    Ok(Start {
        graph: graph.clone(),
        admission,
        driver: Box::new(driver),
        nodes: vec![node],
        changes,
        undo: Undo::new(graph, undo),
    })
}

/// Refuses nodes that cannot be copies of each other.
pub(crate) fn check_sizes(source: &dyn Node, target: &dyn Node) -> Result<()> {
    if source.size() == target.size() {
        return Ok(());
    }
    Err(invalid("Source and target image have different sizes"))
}

fn invalid(message: &str) -> Error {
    Error::new(Kind::Invalid, message)
}

impl Incremental {
    fn take_over((bitmap, mode): (Arc<DirtyBitmap>, BitmapMode)) -> Result<Self> {
        if !bitmap.set_busy(true) {
            let message = "Bitmap is currently in use by another operation and cannot be used";
            return Err(Error::new(Kind::Busy, message));
        }
        Ok(Self {
            bitmap,
            mode,
            taken: Mutex::default(),
        })
    }

    /// Puts back what the job did not copy, as the mode has it.
    fn settle(&self, before: &Before, succeeded: bool) {
        let Some(taken) = self.taken.lock().take() else {
            return;
        };
        match self.mode {
            BitmapMode::OnSuccess | BitmapMode::Always if succeeded => {}
            BitmapMode::Always if !before.is_over() => self.bitmap.absorb(&before.left),
            _ => self.bitmap.absorb(&taken),
        }
    }
}

impl Drop for Incremental {
    fn drop(&mut self) {
        // Of a job that never ran.
        if let Some(taken) = self.taken.lock().take() {
            self.bitmap.absorb(&taken);
        }
        self.bitmap.set_busy(false);
    }
}

impl Backup {
    /// Whether the target shows zeroes, so that these need not be written. What is not the whole disk is put on something else
    /// later, and what stands on the source shows what is written there.
    async fn look_at_target(&self, job: &Arc<Job>) -> Result<()> {
        if self.sync != BackupSync::Full || self.fleece.is_some() {
            return Ok(());
        }
        let Some(_pass) = job.pass(0).await else {
            return Ok(());
        };
        // What guests made it copy since the job began may be in it already, and only makes it less zero.
        let fresh = is_zero(&*self.target.node()).await?;
        self.before.fresh.store(fresh, Ordering::SeqCst);
        Ok(())
    }

    /// What the topmost image does not hold is left out at once, so that how much there is to do is known early. What cannot be
    /// looked at is met once more when it is copied.
    async fn look_at_source(&self, job: &Arc<Job>) {
        if self.sync != BackupSync::Top || self.fleece.is_some() {
            return;
        }
        let (size, cluster) = (self.before.left.size(), self.before.left.granularity());
        let mut at = 0;
        while at < size && !self.before.is_over() {
            let Some(_pass) = job.pass(0).await else {
                return;
            };
            let Ok(status) = self.source.node().allocation(at, size - at).await else {
                return;
            };
            let end = at + status.len;
            let whole = match end >= size {
                true => size,
                false => end / cluster * cluster,
            };
            let start = at.next_multiple_of(cluster);
            if !status.allocated && start < whole {
                self.before.skip(start..whole).await;
            }
            at = end;
        }
    }

    /// One of those who copy what is left, in order.
    async fn work(&self, job: &Arc<Job>, cursor: &Cell<u64>, stop: &Cell<bool>) -> Result<()> {
        let mut bounce = Bounce::default();
        while !stop.get() && !self.before.is_over() {
            let piece = job.piece(PIECE);
            let Some(area) = self.before.left.next_dirty(cursor.get(), u64::MAX, piece) else {
                return Ok(());
            };
            cursor.set(area.end);
            let Some(_pass) = job.pass(area.end - area.start).await else {
                return Ok(());
            };
            if let Err(failure) = self.copy(area, &mut bounce).await {
                let action = self.decide(job, &failure);
                if action == ErrorAction::Report {
                    stop.set(true);
                    return Err(failure.error);
                }
                // It is still left, and comes again when the others are done.
            }
        }
        Ok(())
    }

    async fn copy(&self, area: Range<u64>, bounce: &mut Bounce) -> Copied {
        let source = self.source.node();
        if self.sync != BackupSync::Top || self.fleece.is_some() {
            return self.before.save(&*source, area, bounce).await;
        }
        let cluster = self.before.left.granularity();
        let mut at = area.start;
        while at < area.end {
            let status = source.allocation(at, area.end - at).await;
            let status = status.map_err(Failure::read)?;
            let known = at + status.len;
            // Up to where there are whole clusters of the target.
            let whole = match known >= area.end {
                true => area.end,
                false => known / cluster * cluster,
            };
            if !status.allocated && whole > at {
                self.before.skip(at..whole).await;
                at = whole;
                continue;
            }
            let end = known.next_multiple_of(cluster).min(area.end);
            self.before.save(&*source, at..end, bounce).await?;
            at = end;
        }
        Ok(())
    }

    fn decide(&self, job: &Arc<Job>, failure: &Failure) -> ErrorAction {
        let on = match failure.operation {
            Operation::Read => self.on_source_error,
            Operation::Write => self.on_target_error,
        };
        job.on_error(on, failure.operation, &failure.error)
    }

    async fn copy_all(&self, job: &Arc<Job>) -> Result<()> {
        loop {
            let (cursor, stop) = (Cell::new(0), Cell::new(false));
            let workers = (0..WORKERS).map(|_| -> LocalFuture<'_, Result<()>> {
                Box::pin(self.work(job, &cursor, &stop))
            });
            crew(workers.collect()).await?;
            let done = self.before.is_over() || self.before.left.dirty_bytes() == 0;
            if done || job.is_cancelled() {
                return Ok(());
            }
            job.breathe().await;
        }
    }

    /// Whoever still reads the target while the source is written goes on to see what was saved, and errors instead of what was not.
    async fn stop_fleecing(&self, fleece: &Fleece) {
        let source = self.source.name();
        let drained = match self.graph.drain(source).await {
            Ok(drained) => drained,
            Err(error) => return still_there(source, &error),
        };
        self.target.leave();
        let is_whole = !self.before.is_over();
        self.before.let_everything_through();
        let unwrap = || Change::Unwrap {
            node: source.to_owned(),
            wrap: Arc::clone(&self.wrap),
        };
        let all: Vec<_> = std::iter::once(unwrap()).chain(fleece.ends()).collect();
        let all = is_whole.then(|| self.graph.change(&all));
        let changed = match all {
            Some(Err(error)) if error.kind() != Kind::Busy => Err(error),
            Some(Ok(orphans)) => Ok(orphans),
            _ => self.graph.change(&[unwrap()]),
        };
        if let Err(error) = changed {
            still_there(source, &error);
        }
        drop(drained);
    }

    async fn run_now(&self, job: &Arc<Job>) -> Result<()> {
        self.look_at_target(job).await?;
        self.look_at_source(job).await;
        match self.sync {
            BackupSync::None => {
                let over = || (job.is_cancelled() || self.before.is_over()).then_some(());
                job.until(over).await;
            }
            _ => self.copy_all(job).await?,
        }
        match self.before.take_broken() {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }
}

impl Driver for Backup {
    fn begin(&self) -> Result<()> {
        let (source, left) = (self.source.node(), &self.before.left);
        // Until everybody stood still, which is now, somebody may have changed the size.
        check_sizes(&*source, &*self.target.node())?;
        if self.fleece.is_some() {
            self.target.use_for(Permissions::WRITE)?;
        }
        left.follow(|| source.size())?;
        let taken = match &self.bitmap {
            Some(incremental) => {
                // It may have changed further down, where the bitmap is not told of it.
                incremental.bitmap.follow(|| source.size())?;
                incremental.bitmap.keep_count();
                Some(incremental.bitmap.take()?)
            }
            None => None,
        };
        match (&self.sync, &taken) {
            (BackupSync::Bitmap, Some(taken)) => left.absorb(taken),
            _ => drop(left.mark(0, left.size())),
        }
        let job = &self.before.job;
        job.progress(|_, total| *total = left.dirty_bytes());
        if let Some(incremental) = &self.bitmap {
            *incremental.taken.lock() = taken;
        }
        Ok(())
    }

    fn run<'a>(&'a self, job: &'a Arc<Job>) -> LocalFuture<'a, Result<()>> {
        Box::pin(self.run_now(job))
    }

    fn prepare<'a>(&'a self, job: &'a Arc<Job>) -> LocalFuture<'a, Result<()>> {
        Box::pin(async {
            let _pass = job.settling_pass().await?;
            // Nobody is told of a success that a power cut could take back.
            self.target.node().flush().await?;
            // A guest's write may have been given the way over the backup since the work was done.
            self.before.take_broken().map_or(Ok(()), Err)
        })
    }

    fn finish<'a>(&'a self, _job: &'a Arc<Job>, succeeded: bool) -> LocalFuture<'a, ()> {
        Box::pin(async move {
            match &self.fleece {
                Some(fleece) => self.stop_fleecing(fleece).await,
                None => unwrap(&self.graph, self.source.name(), &self.wrap).await,
            }
            if let Some(incremental) = &self.bitmap {
                incremental.settle(&self.before, succeeded);
            }
            self.before.let_everything_through();
            // Whoever was above the wrap may hold on to it for a while; the target is free all the same.
            self.target.leave();
        })
    }
}

/// Takes a job's wrap away from its source.
pub(crate) async fn unwrap(graph: &Graph, node: &str, wrap: &Arc<dyn Wrap>) {
    let undo = [Change::Unwrap {
        node: node.to_owned(),
        wrap: Arc::clone(wrap),
    }];
    let gone = match graph.drain(node).await {
        Ok(_drained) => graph.change(&undo).map(drop),
        Err(error) => Err(error),
    };
    if let Err(error) = gone {
        still_there(node, &error);
    }
}

/// Only somebody who cannot be stopped is in the way; the wrap lets everything through from now on.
fn still_there(node: &str, error: &Error) {
    tracing::error!(node, %error, "a job that is over is still in the way of its node");
}
