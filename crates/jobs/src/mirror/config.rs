//! What a mirror is told, and whether that can be. It only looks.

use diskfuse_block::{Error, Graph, Kind, Result};

use crate::chain;
use crate::job::JobConfig;
use crate::policy::OnError;

/// What of the source is copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MirrorSync {
    /// All of it.
    Full,
    /// What the topmost image holds itself; the target has the same backing file.
    Top,
    /// What is written from now on.
    None,
}

/// When writes reach the target (`MirrorCopyMode`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CopyMode {
    /// Some time later.
    #[default]
    Background,
    /// Before they are answered.
    WriteBlocking,
}

/// What `blockdev-mirror` is told.
#[derive(Clone, Debug)]
pub struct MirrorConfig {
    /// What every job is told.
    pub job: JobConfig,
    /// The node to copy (`device`).
    pub source: String,
    /// The node to copy to.
    pub target: String,
    /// The node whose place the target takes when the job is completed; the source if none is said.
    pub replaces: Option<String>,
    /// What to copy.
    pub sync: MirrorSync,
    /// When writes reach the target.
    pub copy_mode: CopyMode,
    /// Bytes that are copied together, a power of two; chosen if none is said.
    pub granularity: Option<u64>,
    /// About errors of the source.
    pub on_source_error: OnError,
    /// About errors of the target.
    pub on_target_error: OnError,
}

impl MirrorConfig {
    /// A copy of everything.
    pub fn new(job: JobConfig, source: &str, target: &str) -> Self {
        Self {
            job,
            source: source.to_owned(),
            target: target.to_owned(),
            replaces: None,
            sync: MirrorSync::Full,
            copy_mode: CopyMode::default(),
            granularity: None,
            on_source_error: OnError::default(),
            on_target_error: OnError::default(),
        }
    }
}

/// Refuses a target that cannot take the place of the source, as it stands on it, and one whose writes come to the source or the
/// other way round: what is copied would overwrite what a guest has written since. The words are those of QEMU, which
/// wants a source that nothing stands on.
pub(super) fn check_apart(graph: &Graph, config: &MirrorConfig) -> Result<()> {
    let (source, target) = (&config.source, &config.target);
    let message = if source == target {
        "Can't mirror node into itself"
    } else if graph.stands_on(target, source)? {
        "Need a root block node"
    } else if chain::shared_storage(graph, source, target)?.is_some() {
        "Can't mirror node into itself"
    } else {
        return Ok(());
    };
    Err(Error::new(Kind::Invalid, message))
}

/// Refuses to replace a node that does not show the very disk that is copied: those above it would see another one at once.
/// The words are those of QEMU, which wants the source or a node that it shows through filters; a filter above the source
/// is as good.
pub(super) fn check_replaces(graph: &Graph, config: &MirrorConfig) -> Result<()> {
    let (Some(replaces), source) = (&config.replaces, &config.source) else {
        return Ok(());
    };
    let replaced = graph.get(replaces).map_err(|error| match error.kind() {
        Kind::NotFound => {
            let message = format!("Failed to find node with node-name='{replaces}'");
            Error::new(Kind::NotFound, message)
        }
        _ => error,
    })?;
    if !chain::shows(graph, source, replaces)? && !chain::shows(graph, replaces, source)? {
        let message = format!(
            "Cannot replace '{replaces}' by a node mirrored from '{source}', because it cannot be guaranteed that doing so would not lead to an abrupt change of visible data"
        );
        return Err(Error::new(Kind::Invalid, message));
    }
    if graph.stands_on(&config.target, replaces)? {
        let message = format!(
            "Cannot replace '{replaces}' by node '{}', which stands on it",
            config.target
        );
        return Err(Error::new(Kind::Invalid, message));
    }
    if replaced.size() != graph.get(source)?.size() {
        let message = "cannot replace image with a mirror image of different size";
        return Err(Error::new(Kind::Invalid, message));
    }
    Ok(())
}

/// The lowest node whose users must stand still when the target takes over.
pub(super) fn lowest(graph: &Graph, config: &MirrorConfig) -> Result<String> {
    let source = &config.source;
    let Some(replaces) = &config.replaces else {
        return Ok(source.clone());
    };
    let is_below = chain::shows(graph, source, replaces)?;
    Ok(if is_below { replaces } else { source }.clone())
}
