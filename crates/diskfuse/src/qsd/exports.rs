//! Exports of the storage daemon's command line: which node, on which threads.

use diskfuse_fuse::{AllowOther, DEFAULT_MAX_BACKGROUND, Ownership, Passthrough};
use diskfuse_monitor::{
    ExportKind, ExportOptions, ExportThreads, OnOffAuto, Placement, Transport, TransportOptions,
};

use super::commands::Commands;
use super::trouble;
use crate::daemon::{Daemon, NewExport, own_threads};
use crate::error::{Error, Result};

/// Starts the export; its file is usable when this returns. `fixed-iothread` asks for what is always so: an export's
/// queues stay on the threads they were given, and every node serves every thread.
pub fn add(daemon: &mut Daemon, host: &Commands, options: &ExportOptions) -> Result<()> {
    let objects = &host.objects;
    let id = &options.id;
    if daemon.has_export(id) {
        return Err(Error::Refused(format!(
            "Block export id '{id}' is already in use"
        )));
    }
    host.nodes.check_node(&options.node_name)?;
    let mut own = Vec::new();
    let iothreads = match &options.threads {
        ExportThreads::Node => vec![objects.main()?],
        ExportThreads::Iothread(name) => vec![objects.iothread(name)?],
        ExportThreads::Iothreads(names) => names
            .iter()
            .map(|name| objects.iothread(name))
            .collect::<Result<_>>()?,
        ExportThreads::Own(count) => {
            own = own_threads(count.get(), objects.choice())?;
            Vec::new()
        }
    };
    let ExportKind::Fuse(fuse) = &options.kind;
    let new = NewExport {
        directory: None,
        image: None,
        options: diskfuse_fuse::ExportOptions {
            id: id.clone(),
            mountpoint: fuse.mountpoint.clone(),
            writable: options.writable,
            growable: fuse.growable,
            allow_other: match fuse.allow_other {
                OnOffAuto::Auto => AllowOther::Auto,
                OnOffAuto::On => AllowOther::On,
                OnOffAuto::Off => AllowOther::Off,
            },
            ownership: Ownership::default(),
            max_background: fuse
                .max_background
                .map_or(DEFAULT_MAX_BACKGROUND, std::num::NonZero::get),
            transport: transport(&fuse.transport),
            passthrough: match fuse.transport.passthrough {
                OnOffAuto::Auto => Passthrough::Auto,
                OnOffAuto::On => Passthrough::On,
                OnOffAuto::Off => Passthrough::Off,
            },
            on_error: Some(trouble::on_error(&host.monitors)),
        },
        node: options.node_name.clone(),
        iothreads,
        own_threads: own,
        made: None,
        idle_timeout: None,
    };
    daemon.start_export(new).map(drop)
}

/// How requests come, in the terms of the export.
fn transport(options: &TransportOptions) -> diskfuse_fuse::TransportOptions {
    diskfuse_fuse::TransportOptions {
        transport: match options.transport {
            Transport::Auto => diskfuse_fuse::Transport::Auto,
            Transport::Device => diskfuse_fuse::Transport::Device,
            Transport::Uring => diskfuse_fuse::Transport::Uring,
        },
        depth: options.depth,
        max_payload: options.max_payload,
        placement: match &options.placement {
            Placement::Auto => diskfuse_fuse::Placement::Auto,
            Placement::Free => diskfuse_fuse::Placement::Free,
            Placement::Pinned => diskfuse_fuse::Placement::Pinned,
            Placement::Spread => diskfuse_fuse::Placement::Spread,
            Placement::Cpus(cpus) => diskfuse_fuse::Placement::Cpus(cpus.clone()),
        },
    }
}
