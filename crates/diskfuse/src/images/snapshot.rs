//! `diskfuse snapshot`: the snapshots inside an image.

use std::path::Path;
use std::process::ExitCode;
use std::time::SystemTime;

use diskfuse_block::drivers::FileConfig;
use diskfuse_block::{Error, Kind, Node};
use diskfuse_image::info::Snapshot;
use diskfuse_image::session::{FileSession, to_read};
use diskfuse_image::{Probed, format, name};
use diskfuse_qcow2::snapshots;

use super::text::snapshot_table;
use super::{on_ring, say_json};
use crate::cli::{SnapshotArgs, SnapshotCommand};
use crate::error::Result;
use crate::output;

/// Carries the command out.
pub fn run(arguments: &SnapshotArgs) -> Result<ExitCode> {
    match &arguments.command {
        SnapshotCommand::List { image, json } => list(image, *json)?,
        SnapshotCommand::Create { image, name } => on_ring(async {
            let file = open(image, FileConfig::default()).await?;
            snapshots::create(&**file.node(), name, SystemTime::now()).await?;
            file.node().flush().await
        })?,
        SnapshotCommand::Delete { image, name } => on_ring(async {
            let file = open(image, FileConfig::default()).await?;
            snapshots::delete(&**file.node(), name).await?;
            file.node().flush().await
        })?,
        SnapshotCommand::Apply { image, name } => on_ring(async {
            let file = open(image, FileConfig::default()).await?;
            snapshots::apply(&**file.node(), name).await?;
            file.node().flush().await
        })?,
    }
    Ok(ExitCode::SUCCESS)
}

async fn open(image: &Path, config: FileConfig) -> diskfuse_block::Result<FileSession> {
    let named = name::parse_argument(image)?;
    let file = FileSession::open(&named.filename, &config, "snapshot")?;
    match format::probe(&**file.node()).await? {
        Probed::Qcow2 => Ok(file),
        Probed::Raw => Err(Error::new(
            Kind::Unsupported,
            format!(
                "'{}' is a raw image, which has no snapshots inside",
                image.display()
            ),
        )),
        Probed::Other(format) => Err(format::cannot_be_read(image, format)),
    }
}

fn list(image: &Path, json: bool) -> Result<()> {
    let all = on_ring(async {
        let file = open(image, to_read(false)).await?;
        snapshots::list(&**file.node()).await
    })?;
    let all: Vec<Snapshot> = all.into_iter().map(Snapshot::from).collect();
    match json {
        true => say_json(&all),
        false if all.is_empty() => Ok(()),
        false => output::say(&format!("{}\n", snapshot_table(&all))),
    }
}
