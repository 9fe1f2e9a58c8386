//! `transaction`: several actions at one moment, all or none. Every node that takes part is drained for as long as they are
//! carried out; what was done is undone, the last first, if a later one fails.

use std::sync::Arc;

use diskfuse_block::DirtyBitmap;
use diskfuse_block::graph::{Change, ChildRole, Drained};
use diskfuse_jobs::{Start, Transaction as JobTransaction};
use diskfuse_monitor::commands::{
    Action, BlockDirtyBitmap, BlockdevSnapshot, CompletionMode, Transaction,
};

use super::bitmaps::{Removed, forget_removed};
use super::snapshot_sync::{self, Overlay};
use super::{Commands, jobs, nodes};
use crate::daemon::Daemon;
use crate::error::{Error, Result};
use crate::qsd::live;

/// What takes an action back.
enum Undo {
    RemoveBitmap(BlockDirtyBitmap),
    PutBack(Removed),
    Mark(BlockDirtyBitmap, DirtyBitmap),
    Unmerge(BlockDirtyBitmap, DirtyBitmap),
    Record(BlockDirtyBitmap, bool),
    Snapshot(BlockdevSnapshot),
    Overlay(Overlay),
    DeleteSnapshot { device: String, name: String },
}

/// Only jobs can end together.
fn check_mode(actions: &[Action], mode: Option<CompletionMode>) -> Result<()> {
    if mode != Some(CompletionMode::Grouped) {
        return Ok(());
    }
    let mut others = actions
        .iter()
        .filter(|action| !matches!(action, Action::Backup(_)));
    others.next().map_or(Ok(()), |action| {
        let word = action.word();
        Err(Error::Refused(format!(
            "Action '{word}' does not support transaction property completion-mode = grouped"
        )))
    })
}

/// The backups of a transaction.
#[derive(Default)]
struct Backups {
    /// Those that can begin, in the order of their actions.
    starts: Vec<Start>,
    /// How many of them have had their turn among the actions.
    turns: usize,
}

impl Backups {
    /// None begins. Clients hear of those that have had their turn, if they are to: as with QEMU, that each was there, and
    /// then that it came to nothing, the last first.
    fn give_up(mut self, tell: bool) {
        let turns = if tell { self.turns } else { 0 };
        self.starts.truncate(turns);
        self.starts.iter().for_each(Start::announce);
        self.starts.into_iter().rev().for_each(Start::give_up);
    }
}

/// Carries all of the actions out, or none.
pub fn run(host: &mut Commands, daemon: &Daemon, what: &Transaction) -> Result<()> {
    let mode = what.properties.as_ref().and_then(|p| p.completion_mode);
    check_mode(&what.actions, mode)?;
    let group = (mode == Some(CompletionMode::Grouped)).then(JobTransaction::new);
    let mut undo = Vec::new();
    // Until all is done, or undone.
    let mut drained = Vec::new();
    let mut backups = Backups::default();
    let outcome = carry_out(
        host,
        &what.actions,
        group.as_ref(),
        &mut backups,
        &mut drained,
        &mut undo,
    );
    host.bitmaps.lend(Vec::new());
    daemon.sizes_changed();
    if let Err(error) = &outcome {
        // Of one that is tried again nothing is to be seen.
        backups.give_up(!error.is_drained());
        for step in undo.into_iter().rev() {
            if let Err(error) = take_back(host, step) {
                tracing::error!("a transaction that failed could not be undone whole: {error}");
            }
        }
        return outcome;
    }
    for step in undo {
        match step {
            Undo::PutBack(removed) => {
                let node = removed.node();
                if let Err(error) = forget_removed(&host.nodes, node) {
                    // It is tried again when the image is closed.
                    tracing::error!(
                        node,
                        "a bitmap that was removed is still in the image: {error}"
                    );
                }
            }
            Undo::Snapshot(snapshot) => live::writable::seal(&host.nodes, &snapshot.node),
            Undo::Overlay(overlay) => overlay.keep(),
            _ => {}
        }
    }
    outcome
}

fn carry_out(
    host: &mut Commands,
    actions: &[Action],
    group: Option<&Arc<JobTransaction>>,
    backups: &mut Backups,
    drained: &mut Vec<Drained>,
    undo: &mut Vec<Undo>,
) -> Result<()> {
    // A backup may be of a bitmap that is new. What is written from here on until all stand still is marked there although
    // the backup has it: that is too much, never too little.
    // And images of snapshots are made while the guests go on.
    for action in actions {
        match action {
            Action::BitmapAdd(_) => undo.extend(one(host, action)?),
            Action::SnapshotSync(what) => {
                undo.push(Undo::Overlay(snapshot_sync::make(&host.nodes, what)?));
            }
            _ => {}
        }
    }
    // Before anything is drained: nobody gets the right to use a node that is.
    for action in actions {
        if let Action::Backup(backup) = action {
            let start = jobs::backup(host, backup, group.cloned())?;
            backups.starts.push(start);
            backups.turns += 1;
        }
    }
    let of_backup = |action: &Action| match action {
        Action::Backup(backup) => backup
            .bitmap
            .clone()
            .map(|name| (backup.device.clone(), name)),
        _ => None,
    };
    host.bitmaps
        .lend(actions.iter().filter_map(of_backup).collect());
    drained.extend(drain(host, actions, &backups.starts)?);
    fit_overlays(host, actions, undo)?;
    act(host, actions, backups, undo)
}

/// What was made while the guests went on fits the disks that stand still now.
fn fit_overlays(host: &Commands, actions: &[Action], undo: &mut Vec<Undo>) -> Result<()> {
    for action in actions {
        let Action::SnapshotSync(what) = action else {
            continue;
        };
        let made = |step: &mut Undo| match step {
            Undo::Overlay(overlay) => {
                Some(&overlay.what.overlay) == what.snapshot_node_name.as_ref()
            }
            _ => false,
        };
        for step in undo.extract_if(.., made).collect::<Vec<_>>() {
            if let Undo::Overlay(overlay) = step {
                let overlay = overlay.fit(&host.nodes, what)?;
                undo.insert(0, Undo::Overlay(overlay));
            }
        }
    }
    Ok(())
}

/// Whether the node was made for a snapshot of this transaction: nobody uses it yet, and it could not be taken away again while it
/// is drained.
fn is_new(actions: &[Action], node: &str) -> bool {
    let mut overlays = actions.iter().filter_map(|action| match action {
        Action::SnapshotSync(what) => what.snapshot_node_name.as_deref(),
        _ => None,
    });
    overlays.any(|overlay| overlay == node)
}

/// Drains every node that an action names, or that a job is about to use.
fn drain(host: &Commands, actions: &[Action], starts: &[Start]) -> Result<Vec<Drained>> {
    let mut drained = Vec::new();
    for node in starts.iter().flat_map(Start::nodes) {
        drained.push(host.nodes.drain(node)?);
    }
    for action in actions {
        let node = match action {
            Action::Abort(_) | Action::Backup(_) => continue,
            Action::BitmapAdd(bitmap) => &bitmap.node,
            Action::BitmapRemove(bitmap)
            | Action::BitmapClear(bitmap)
            | Action::BitmapEnable(bitmap)
            | Action::BitmapDisable(bitmap) => &bitmap.node,
            Action::BitmapMerge(merge) => &merge.node,
            Action::Snapshot(snapshot) => &snapshot.node,
            Action::SnapshotSync(snapshot) => snapshot_sync::node(&host.nodes, snapshot)?,
            Action::InternalSnapshot(snapshot) => &snapshot.device,
        };
        // One that is not there is the action's own error.
        if host.nodes.graph.get(node).is_ok() && !is_new(actions, node) {
            drained.push(host.nodes.drain(node)?);
        }
    }
    Ok(drained)
}

fn act(
    host: &mut Commands,
    actions: &[Action],
    backups: &mut Backups,
    undo: &mut Vec<Undo>,
) -> Result<()> {
    backups.turns = 0;
    for action in actions {
        match action {
            Action::BitmapAdd(_) => {}
            Action::Backup(_) => backups.turns += 1,
            _ => undo.extend(one(host, action)?),
        }
    }
    // Jobs come last: once they run they are not taken back.
    let starts = &mut backups.starts;
    let changes: Vec<Change> = starts.iter_mut().flat_map(Start::changes).collect();
    if !changes.is_empty() {
        host.nodes.graph.change(&changes)?;
    }
    starts.iter().for_each(Start::announce);
    let mut launched = Vec::new();
    for start in starts.drain(..) {
        match start.launch(&host.jobs) {
            Ok(job) => launched.push(job),
            Err(error) => {
                for job in launched {
                    // It has only begun, and nobody has seen anything of it.
                    let _ = job.cancel(true);
                }
                return Err(error.into());
            }
        }
    }
    Ok(())
}

fn one(host: &mut Commands, action: &Action) -> Result<Option<Undo>> {
    match action {
        Action::Snapshot(what) => nodes::check_free(host, &what.node)?,
        Action::SnapshotSync(what) => {
            nodes::check_free(host, snapshot_sync::node(&host.nodes, what)?)?;
        }
        Action::InternalSnapshot(what) => nodes::check_free(host, &what.device)?,
        _ => {}
    }
    let Commands { nodes, bitmaps, .. } = host;
    Ok(Some(match action {
        Action::Abort(_) => {
            return Err(Error::refused("Transaction aborted using Abort action"));
        }
        Action::Backup(_) => return Ok(None),
        Action::BitmapAdd(what) => {
            bitmaps.add(nodes, what)?;
            Undo::RemoveBitmap(BlockDirtyBitmap {
                node: what.node.clone(),
                name: what.name.clone(),
            })
        }
        Action::BitmapRemove(which) => Undo::PutBack(bitmaps.remove(nodes, which)?),
        Action::BitmapClear(which) => Undo::Mark(which.clone(), bitmaps.clear(nodes, which)?),
        Action::BitmapEnable(which) => {
            Undo::Record(which.clone(), bitmaps.record(nodes, which, true)?)
        }
        Action::BitmapDisable(which) => {
            Undo::Record(which.clone(), bitmaps.record(nodes, which, false)?)
        }
        Action::BitmapMerge(what) => {
            let before = bitmaps.merge(nodes, what)?;
            let target = BlockDirtyBitmap {
                node: what.node.clone(),
                name: what.target.clone(),
            };
            Undo::Unmerge(target, before)
        }
        Action::Snapshot(what) => {
            live::snapshot::snapshot(nodes, &what.node, &what.overlay)?;
            Undo::Snapshot(what.clone())
        }
        Action::SnapshotSync(what) => {
            let what = BlockdevSnapshot {
                node: snapshot_sync::node(nodes, what)?.to_owned(),
                overlay: what.snapshot_node_name.clone().unwrap_or_default(),
            };
            live::snapshot::snapshot(nodes, &what.node, &what.overlay)?;
            Undo::Snapshot(what)
        }
        Action::InternalSnapshot(what) => {
            live::internal::create(nodes, &what.device, &what.name)?;
            Undo::DeleteSnapshot {
                device: what.device.clone(),
                name: what.name.clone(),
            }
        }
    }))
}

fn take_back(host: &mut Commands, step: Undo) -> Result<()> {
    let Commands { nodes, bitmaps, .. } = host;
    match step {
        Undo::RemoveBitmap(which) => bitmaps.remove(nodes, &which).map(drop),
        Undo::PutBack(removed) => bitmaps.put_back(nodes, removed),
        Undo::Mark(which, marks) => bitmaps.mark(nodes, &which, &marks),
        Undo::Unmerge(target, before) => bitmaps.unmerge(nodes, &target, &before),
        Undo::Record(which, record) => bitmaps.record(nodes, &which, record).map(drop),
        Undo::Snapshot(what) => {
            let changes = [
                Change::SetChild {
                    parent: what.overlay.clone(),
                    role: ChildRole::Backing,
                    child: None,
                },
                Change::Replace {
                    from: what.overlay.clone(),
                    to: what.node.clone(),
                },
            ];
            nodes.graph.change(&changes)?;
            Ok(())
        }
        Undo::Overlay(overlay) => overlay.discard(nodes),
        Undo::DeleteSnapshot { device, name } => {
            live::internal::delete(nodes, &device, None, Some(&name)).map(drop)
        }
    }
}
