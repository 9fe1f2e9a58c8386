//! Commands that start and steer jobs.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use diskfuse_block::graph::ChildRole;
use diskfuse_image::name::full_name;
use diskfuse_jobs::{
    BackupConfig, BackupSync, BitmapMode, CommitConfig, CopyMode, Job, JobConfig, MirrorConfig,
    MirrorSync, OnCbwError, OnError, Start, StreamBase, StreamConfig, Transaction,
};
use diskfuse_monitor::blockdev;
use diskfuse_monitor::commands::{
    self, BitmapSyncMode, BlockCommit, BlockJobCancel, BlockJobChange, BlockJobSetSpeed,
    BlockStream, BlockdevBackup, BlockdevMirror, SyncMode,
};

use super::Commands;
use crate::error::{Error, Result};
use crate::overlay;
use crate::qsd::live;

/// What all jobs have in common.
struct Common<'c> {
    id: Option<&'c String>,
    device: &'c str,
    speed: Option<i64>,
    auto_finalize: Option<bool>,
    auto_dismiss: Option<bool>,
}

impl Common<'_> {
    fn config(self, transaction: Option<Arc<Transaction>>) -> Result<JobConfig> {
        let speed = speed(self.speed.unwrap_or(0))?;
        let id = self.id.map_or(self.device, String::as_str);
        Ok(JobConfig {
            id: id.to_owned(),
            speed,
            auto_finalize: self.auto_finalize.unwrap_or(true),
            auto_dismiss: self.auto_dismiss.unwrap_or(true),
            transaction,
        })
    }
}

fn speed(bytes: i64) -> Result<u64> {
    u64::try_from(bytes)
        .map_err(|_| Error::refused("Parameter 'speed' expects a non-negative value"))
}

macro_rules! common {
    ($what:expr) => {
        Common {
            id: $what.job_id.as_ref(),
            device: &$what.device,
            speed: $what.speed,
            auto_finalize: $what.auto_finalize,
            auto_dismiss: $what.auto_dismiss,
        }
    };
}

fn begin(host: &Commands, start: Start) -> Result<()> {
    host.nodes.run(start.begin(&host.jobs))??;
    Ok(())
}

/// `block-stream`. The image is opened for writing if it is not, as one below another.
pub fn stream(host: &mut Commands, what: &BlockStream) -> Result<()> {
    let given = [
        ("base", &what.base),
        ("bottom", &what.bottom),
        ("base-node", &what.base_node),
    ];
    let mut given = given.into_iter().filter(|(_, end)| end.is_some());
    if let (Some((one, _)), Some((other, _))) = (given.next(), given.next()) {
        return Err(Error::Refused(format!(
            "'{one}' and '{other}' cannot be specified at the same time"
        )));
    }
    live::find(&host.nodes, &what.device)?;
    check_filter_name(host, what.filter_node_name.as_ref())?;
    let base = match (&what.base, &what.base_node, &what.bottom) {
        (Some(file), _, _) => StreamBase::Node(in_chain(host, &what.device, file)?),
        (_, Some(node), _) => {
            host.nodes.check_node(node)?;
            StreamBase::Node(node.clone())
        }
        (_, _, Some(node)) => {
            host.nodes.check_node(node)?;
            StreamBase::Bottom(node.clone())
        }
        _ => StreamBase::None,
    };
    let is_all = match &base {
        StreamBase::None => true,
        StreamBase::Node(_) => false,
        StreamBase::Bottom(node) => below(host, node)?.is_none(),
    };
    if is_all && what.backing_file.is_some() {
        return Err(Error::refused(
            "backing file specified, but streaming the entire chain",
        ));
    }
    let config = StreamConfig {
        base,
        backing_file: what.backing_file.clone(),
        on_error: on_error(what.on_error),
        ..StreamConfig::new(common!(what).config(None)?, &what.device)
    };
    with_writable(host, std::slice::from_ref(&what.device), |host| {
        let start = diskfuse_jobs::stream(&host.jobs, &host.nodes.graph, config)?;
        begin(host, start)
    })
}

/// `block-commit`. The base, and an image above the top, are opened for writing if they are not.
pub fn commit(host: &mut Commands, what: &BlockCommit) -> Result<()> {
    if what.base.is_some() && what.base_node.is_some() {
        return Err(Error::refused(
            "'base-node' and 'base' are mutually exclusive",
        ));
    }
    if what.top.is_some() && what.top_node.is_some() {
        return Err(Error::refused(
            "'top-node' and 'top' are mutually exclusive",
        ));
    }
    if live::find(&host.nodes, &what.device).is_err() {
        return Err(Error::Refused(format!(
            "Device '{}' not found",
            what.device
        )));
    }
    check_filter_name(host, what.filter_node_name.as_ref())?;
    let device = host.nodes.graph.bare(&what.device)?.filename();
    // The device is the top of its chain.
    let top = what.top.clone().filter(|top| Some(top) != device.as_ref());
    let named = |node: &Option<String>, file: &Option<String>| match (node, file) {
        (Some(node), _) => {
            host.nodes.check_node(node)?;
            Ok(Some(node.clone()))
        }
        (None, Some(file)) => in_chain(host, &what.device, file).map(Some),
        (None, None) => Ok::<_, Error>(None),
    };
    let top = named(&what.top_node, &top).map_err(|error| match (&what.top_node, &top) {
        (None, Some(file)) => Error::Refused(format!("Top image file {file} not found")),
        _ => error,
    })?;
    if what.backing_file.is_some() && top.as_ref().is_none_or(|top| *top == what.device) {
        return Err(Error::Refused(format!(
            "'backing-file' specified, but '{}' is the active layer",
            what.device
        )));
    }
    let config = CommitConfig {
        top,
        base: named(&what.base_node, &what.base)?,
        backing_file: what.backing_file.clone(),
        on_error: on_error(what.on_error),
        ..CommitConfig::new(common!(what).config(None)?, &what.device)
    };
    let writes = diskfuse_jobs::commit_writes(&host.nodes.graph, &config)?;
    let hides = diskfuse_jobs::commit_hides(&host.nodes.graph, &config)?;
    let hides = host.nodes.graph.bare(&hides)?.filename();
    // A relative name may mean another file by now: in the background a daemon goes elsewhere.
    let hides = hides.map(PathBuf::from).filter(|file| file.is_absolute());
    let unsay = hides.map(|file| overlay::block_commit(&file));
    let started = with_writable(host, &writes, |host| {
        let start = diskfuse_jobs::commit(&host.jobs, &host.nodes.graph, config)?;
        begin(host, start)
    });
    if let (Err(_), Some(unsay)) = (&started, unsay) {
        unsay();
    }
    started
}

/// Starts a job on nodes that are opened for writing for it, if they are not, and for reading only again when it is over or did
/// not begin.
fn with_writable(
    host: &mut Commands,
    names: &[String],
    start: impl FnOnce(&Commands) -> Result<()>,
) -> Result<()> {
    let mut opened = Vec::new();
    let open = |name: &String| {
        opened.extend(live::writable::make(&host.nodes, name)?);
        Ok(())
    };
    let started = names.iter().try_for_each(open).and_then(|()| start(host));
    if started.is_err() {
        for opened in opened.iter().rev() {
            live::writable::undo(&host.nodes, opened);
        }
    } else {
        host.opened.extend(opened);
    }
    started
}

/// Some job is over: what was opened for writing for it is opened for reading only, unless it is somebody's disk by now.
pub fn close_opened(host: &mut Commands) {
    let opened = std::mem::take(&mut host.opened);
    for opened in opened {
        let name = opened.node();
        if host.jobs.job_on(name).is_some() {
            // The last one closes it.
            host.opened.push(opened);
        } else if host.nodes.graph.bare(name).is_ok() {
            live::writable::undo(&host.nodes, &opened);
        }
    }
}

/// `blockdev-backup`, ready to begin.
pub fn backup(
    host: &Commands,
    what: &BlockdevBackup,
    transaction: Option<Arc<Transaction>>,
) -> Result<Start> {
    live::find(&host.nodes, &what.device)?;
    live::find(&host.nodes, &what.target)?;
    let bitmap = match &what.bitmap {
        Some(name) => {
            let changes = what.bitmap_mode != Some(BitmapSyncMode::Never);
            let bitmap = host
                .bitmaps
                .usable(&host.nodes, &what.device, name, changes)?;
            Some(bitmap)
        }
        None => None,
    };
    let bitmap = bitmap.zip(bitmap_mode(what)?);
    let of_filter = |error: Error| Error::Refused(format!("Could not create node: {error}"));
    check_filter_name(host, what.filter_node_name.as_ref()).map_err(of_filter)?;
    check_writable(host, &what.target).map_err(of_filter)?;
    let sync = match what.sync {
        SyncMode::Full => BackupSync::Full,
        SyncMode::Top => BackupSync::Top,
        SyncMode::None => BackupSync::None,
        SyncMode::Incremental | SyncMode::Bitmap => BackupSync::Bitmap,
    };
    let config = BackupConfig {
        sync,
        bitmap,
        compress: what.compress.unwrap_or(false),
        on_source_error: on_error(what.on_source_error),
        on_target_error: on_error(what.on_target_error),
        on_cbw_error: match what.on_cbw_error {
            None | Some(commands::OnCbwError::BreakGuestWrite) => OnCbwError::BreakGuestWrite,
            Some(commands::OnCbwError::BreakSnapshot) => OnCbwError::BreakSnapshot,
        },
        ..BackupConfig::new(
            common!(what).config(transaction)?,
            &what.device,
            &what.target,
        )
    };
    Ok(diskfuse_jobs::backup(
        &host.jobs,
        &host.nodes.graph,
        config,
    )?)
}

/// What becomes of the bitmap; the rules and words are those of QEMU's `do_backup_common`.
fn bitmap_mode(what: &BlockdevBackup) -> Result<Option<BitmapMode>> {
    let given = what.bitmap_mode;
    match (what.sync, &what.bitmap) {
        (SyncMode::Incremental | SyncMode::Bitmap, None) => Err(Error::Refused(format!(
            "must provide a valid bitmap name for '{}' sync mode",
            match what.sync {
                SyncMode::Incremental => "incremental",
                _ => "bitmap",
            }
        ))),
        (_, None) if given.is_some() => Err(Error::refused(
            "Cannot specify bitmap sync mode without a bitmap",
        )),
        (_, None) => Ok(None),
        (SyncMode::None, Some(_)) => Err(Error::refused(
            "sync mode 'none' does not produce meaningful bitmap outputs",
        )),
        (SyncMode::Full | SyncMode::Top, Some(_)) if given == Some(BitmapSyncMode::Never) => {
            Err(Error::Refused(format!(
                "Bitmap sync mode 'never' has no meaningful effect when combined with sync mode '{}'",
                match what.sync {
                    SyncMode::Full => "full",
                    _ => "top",
                }
            )))
        }
        (SyncMode::Incremental, Some(_)) => match given {
            None | Some(BitmapSyncMode::OnSuccess) => Ok(Some(BitmapMode::OnSuccess)),
            Some(_) => Err(Error::refused(
                "Bitmap sync mode must be 'on-success' when using sync mode 'incremental'",
            )),
        },
        (_, Some(_)) => match given {
            None => Err(Error::refused(
                "Bitmap sync mode must be given when providing a bitmap",
            )),
            Some(BitmapSyncMode::OnSuccess) => Ok(Some(BitmapMode::OnSuccess)),
            Some(BitmapSyncMode::Never) => Ok(Some(BitmapMode::Never)),
            Some(BitmapSyncMode::Always) => Ok(Some(BitmapMode::Always)),
        },
    }
}

/// `blockdev-backup` by itself.
pub fn start_backup(host: &Commands, what: &BlockdevBackup) -> Result<()> {
    begin(host, backup(host, what, None)?)
}

/// `blockdev-mirror`.
pub fn mirror(host: &Commands, what: &BlockdevMirror) -> Result<()> {
    live::find(&host.nodes, &what.device)?;
    live::find(&host.nodes, &what.target)?;
    let sync = match what.sync {
        SyncMode::Full => MirrorSync::Full,
        SyncMode::Top => MirrorSync::Top,
        SyncMode::None => MirrorSync::None,
        mode @ (SyncMode::Incremental | SyncMode::Bitmap) => {
            return Err(Error::Refused(format!(
                "Sync mode '{}' not supported",
                mode.word()
            )));
        }
    };
    if what.buf_size.is_some_and(|bytes| bytes < 0) {
        return Err(Error::refused("Invalid parameter 'buf-size'"));
    }
    check_filter_name(host, what.filter_node_name.as_ref())?;
    check_writable(host, &what.target)?;
    if let Some(granularity) = what.granularity
        && granularity != 0
    {
        if !(512..=64 << 20).contains(&granularity) {
            return Err(Error::refused(
                "Parameter 'granularity' expects a value in range [512B, 64MB]",
            ));
        }
        if !granularity.is_power_of_two() {
            return Err(Error::refused(
                "Parameter 'granularity' expects a power of 2",
            ));
        }
    }
    let config = MirrorConfig {
        replaces: what.replaces.clone(),
        sync,
        copy_mode: what.copy_mode.map_or(CopyMode::Background, copy_mode),
        granularity: what.granularity.filter(|bytes| *bytes != 0).map(u64::from),
        on_source_error: on_error(what.on_source_error),
        on_target_error: on_error(what.on_target_error),
        ..MirrorConfig::new(common!(what).config(None)?, &what.device, &what.target)
    };
    begin(
        host,
        diskfuse_jobs::mirror(&host.jobs, &host.nodes.graph, config)?,
    )
}

/// A job puts no node into the graph, but what it is to be called must be a name that one could have.
fn check_filter_name(host: &Commands, name: Option<&String>) -> Result<()> {
    let Some(name) = name else { return Ok(()) };
    if host.nodes.graph.names().contains(name) {
        return Err(Error::Refused(format!(
            "Duplicate nodes with node-name='{name}'"
        )));
    }
    Ok(blockdev::check_node_name(name)?)
}

fn check_writable(host: &Commands, target: &str) -> Result<()> {
    if host.nodes.graph.bare(target)?.read_only() {
        return Err(Error::Refused(format!(
            "Block node is read-only ('{target}', which the job needs to write)"
        )));
    }
    Ok(())
}

fn copy_mode(mode: commands::CopyMode) -> CopyMode {
    match mode {
        commands::CopyMode::WriteBlocking => CopyMode::WriteBlocking,
        commands::CopyMode::Background => CopyMode::Background,
    }
}

fn on_error(policy: Option<commands::OnError>) -> OnError {
    match policy {
        None | Some(commands::OnError::Report) => OnError::Report,
        Some(commands::OnError::Ignore) => OnError::Ignore,
        Some(commands::OnError::Enospc) => OnError::Enospc,
        Some(commands::OnError::Stop) => OnError::Stop,
        Some(commands::OnError::Auto) => OnError::Auto,
    }
}

fn below(host: &Commands, name: &str) -> Result<Option<String>> {
    let edges = host.nodes.graph.edges(name)?;
    let shown = |role| matches!(role, ChildRole::Backing | ChildRole::Filtered);
    let mut of_role = edges.into_iter().filter(|(role, _)| shown(*role));
    Ok(of_role.next().map(|(_, child)| child))
}

/// The image of this file name in the chain below a node: as it was opened, or as the image above it calls it.
fn in_chain(host: &Commands, device: &str, file: &str) -> Result<String> {
    let mut above = host.nodes.graph.bare(device)?.filename();
    let mut at = below(host, device)?;
    while let Some(name) = at {
        let own = host.nodes.graph.bare(&name)?.filename();
        let beside = above.map(|above| full_name(Path::new(&above), file));
        if own.is_some() && (own.as_deref() == Some(file) || own == beside) {
            return Ok(name);
        }
        above = own;
        at = below(host, &name)?;
    }
    Err(Error::Refused(format!(
        "Can't find '{file}' in the backing chain"
    )))
}

/// What is asked of a job by its id.
#[derive(Clone, Copy, Debug)]
pub enum Ask {
    /// `-pause`.
    Pause,
    /// `-resume`.
    Resume,
    /// `job-cancel`.
    Cancel,
    /// `-complete`.
    Complete,
    /// `-dismiss`.
    Dismiss,
    /// `-finalize`.
    Finalize,
}

impl Ask {
    /// Asks it.
    pub fn of(self, job: &Job) -> Result<()> {
        Ok(match self {
            Self::Pause => job.pause(),
            Self::Resume => job.resume(),
            Self::Cancel => job.cancel(true),
            Self::Complete => job.complete(),
            Self::Dismiss => job.dismiss(),
            Self::Finalize => job.finalize(),
        }?)
    }
}

/// `block-job-cancel`.
pub fn cancel(host: &Commands, what: &BlockJobCancel) -> Result<()> {
    let job = host.jobs.find_block_job(&what.device)?;
    Ok(job.cancel(what.force.unwrap_or(false))?)
}

/// `block-job-set-speed`.
pub fn set_speed(host: &Commands, what: &BlockJobSetSpeed) -> Result<()> {
    let job = host.jobs.find_block_job(&what.device)?;
    Ok(job.set_speed(speed(what.speed)?)?)
}

/// `block-job-change`.
pub fn change(host: &Commands, what: &BlockJobChange) -> Result<()> {
    let job = host.jobs.find_block_job(&what.id)?;
    let change = what.mirror.as_ref();
    let change = change.ok_or_else(|| Error::refused("Job type does not support change"))?;
    Ok(job.change_copy_mode(copy_mode(change.copy_mode))?)
}
