//! The commands of the monitor as typed data. One table says what there is: from it come the reading of arguments,
//! `query-commands` and `query-qmp-schema`, so that these cannot disagree.
//!
//! Names, members and types are those of QEMU's QAPI schema (`qapi/*.json`). Carries nothing out.

mod bitmap;
mod export;
mod job;
pub(crate) mod kind;
mod node;
mod node_info;
mod object;
mod options;
mod process;
pub mod schema;
pub(crate) mod shape;
mod snapshot;

use serde_json::{Map, Value};

use crate::error::Error;
use crate::fields::Tree;
use crate::{BlockdevOptions, ExportOptions, ObjectOptions};
use kind::Arguments;

pub use bitmap::*;
pub use export::*;
pub use job::*;
pub use kind::Kind;
pub use node::*;
pub use node_info::*;
pub use object::*;
pub use process::*;
pub use snapshot::*;

/// One row of the table.
#[derive(Debug, Clone, Copy)]
pub struct Row {
    /// The command's name.
    pub name: &'static str,
    /// Whether it may overtake others (`exec-oob`): it touches nothing that another command could wait for.
    pub allow_oob: bool,
    read: fn(&Tree) -> Result<Command, Error>,
    arguments: fn() -> shape::Shape,
    answer: fn() -> shape::Shape,
}

/// Declares the table: a variant, its name, its arguments, its answer.
macro_rules! commands {
    ($($(#[$about:meta])* $variant:ident $(($arguments:ty))? = $name:literal -> $answer:ty $(, $oob:ident)?;)*) => {
        /// A command with its arguments.
        #[derive(Debug, Clone, PartialEq)]
        pub enum Command { $($(#[$about])* $variant $(($arguments))?,)* }

        impl Command {
            /// Its name.
            pub fn name(&self) -> &'static str {
                match self { $(commands!(@pattern $variant $($arguments)?) => $name,)* }
            }
        }

        /// Every command that can be told, whether it is built or not.
        const TABLE: &[Row] = &[$(Row {
            name: $name,
            allow_oob: commands!(@oob $($oob)?),
            read: |tree| commands!(@read tree $variant $($arguments)?),
            arguments: commands!(@shape $($arguments)?),
            answer: <$answer as Kind>::shape,
        },)*];
    };
    (@pattern $variant:ident) => { Command::$variant };
    (@pattern $variant:ident $arguments:ty) => { Command::$variant(_) };
    (@oob) => { false };
    (@oob oob) => { true };
    (@read $tree:ident $variant:ident) => {
        <()>::read_all($tree.fields()?).map(|()| Command::$variant)
    };
    (@read $tree:ident $variant:ident $arguments:ty) => {
        <$arguments>::read_all($tree.fields()?).map(Command::$variant)
    };
    (@shape) => { <() as Arguments>::arguments_shape };
    (@shape $arguments:ty) => { <$arguments as Arguments>::arguments_shape };
}

commands! {
    /// What the other side can do; the first command of a session.
    QmpCapabilities(QmpCapabilities) = "qmp_capabilities" -> ();
    /// The version.
    QueryVersion = "query-version" -> VersionInfo, oob;
    /// All commands.
    QueryCommands = "query-commands" -> Vec<CommandInfo>, oob;
    /// All commands and events with their types.
    QueryQmpSchema = "query-qmp-schema" -> Vec<SchemaInfo>, oob;
    /// Ends the process.
    Quit = "quit" -> ();

    /// Keeps a descriptor that came with the command, under a name.
    Getfd(FdName) = "getfd" -> ();
    /// Closes such a descriptor.
    Closefd(FdName) = "closefd" -> ();
    /// Puts a descriptor that came with the command into a set.
    AddFd(AddFd) = "add-fd" -> AddfdInfo;
    /// Takes descriptors out of a set.
    RemoveFd(RemoveFd) = "remove-fd" -> ();
    /// All sets.
    QueryFdsets = "query-fdsets" -> Vec<FdsetInfo>;
    /// All chardevs.
    QueryChardev = "query-chardev" -> Vec<ChardevInfo>, oob;
    /// The kinds of chardev that there are.
    QueryChardevBackends = "query-chardev-backends" -> Vec<ChardevBackendInfo>, oob;

    /// Makes an object.
    ObjectAdd(Box<ObjectOptions>) = "object-add" -> ();
    /// Deletes an object.
    ObjectDel(Id) = "object-del" -> ();
    /// The properties of an object.
    QomList(QomList) = "qom-list" -> Vec<ObjectPropertyInfo>;
    /// One property.
    QomGet(QomGet) = "qom-get" -> Value;
    /// Changes a property.
    QomSet(QomSet) = "qom-set" -> ();
    /// All iothreads.
    QueryIothreads = "query-iothreads" -> Vec<IothreadInfo>;

    /// Makes a node.
    BlockdevAdd(Box<BlockdevOptions>) = "blockdev-add" -> ();
    /// Deletes a node.
    BlockdevDel(BlockdevDel) = "blockdev-del" -> ();
    /// Changes what holds for nodes.
    BlockdevReopen(BlockdevReopen) = "blockdev-reopen" -> ();
    /// Makes an image.
    BlockdevCreate(Box<BlockdevCreate>) = "blockdev-create" -> ();
    /// All nodes.
    QueryNamedBlockNodes(QueryNamedBlockNodes) = "query-named-block-nodes" -> Vec<BlockDeviceInfo>;
    /// All devices, of which there are none.
    QueryBlock = "query-block" -> Vec<BlockInfo>;
    /// Counts of requests.
    QueryBlockstats(QueryBlockstats) = "query-blockstats" -> Vec<BlockStats>;
    /// Changes the size of a node.
    BlockResize(BlockResize) = "block_resize" -> ();
    /// Changes limits.
    BlockSetIoThrottle(Box<BlockSetIoThrottle>) = "block_set_io_throttle" -> ();
    /// Asks to be told of writes beyond a byte.
    BlockSetWriteThreshold(BlockSetWriteThreshold) = "block-set-write-threshold" -> ();
    /// Changes what an image says is below it.
    ChangeBackingFile(ChangeBackingFile) = "change-backing-file" -> ();

    /// Shows a node.
    BlockExportAdd(Box<ExportOptions>) = "block-export-add" -> ();
    /// Takes an export away.
    BlockExportDel(BlockExportDel) = "block-export-del" -> ();
    /// All exports.
    QueryBlockExports = "query-block-exports" -> Vec<BlockExportInfo>;

    /// Puts an overlay over a node.
    BlockdevSnapshot(BlockdevSnapshot) = "blockdev-snapshot" -> ();
    /// Makes an overlay and puts it over a node.
    BlockdevSnapshotSync(BlockdevSnapshotSync) = "blockdev-snapshot-sync" -> ();
    /// Makes an internal snapshot.
    BlockdevSnapshotInternalSync(BlockdevSnapshotInternal) = "blockdev-snapshot-internal-sync" -> ();
    /// Deletes an internal snapshot.
    BlockdevSnapshotDeleteInternalSync(BlockdevSnapshotDeleteInternal)
        = "blockdev-snapshot-delete-internal-sync" -> SnapshotInfo;
    /// All or nothing.
    Transaction(Transaction) = "transaction" -> ();

    /// Makes a bitmap.
    BlockDirtyBitmapAdd(BlockDirtyBitmapAdd) = "block-dirty-bitmap-add" -> ();
    /// Deletes a bitmap.
    BlockDirtyBitmapRemove(BlockDirtyBitmap) = "block-dirty-bitmap-remove" -> ();
    /// Empties a bitmap.
    BlockDirtyBitmapClear(BlockDirtyBitmap) = "block-dirty-bitmap-clear" -> ();
    /// Lets a bitmap record.
    BlockDirtyBitmapEnable(BlockDirtyBitmap) = "block-dirty-bitmap-enable" -> ();
    /// Stops its recording.
    BlockDirtyBitmapDisable(BlockDirtyBitmap) = "block-dirty-bitmap-disable" -> ();
    /// Adds bitmaps to another one.
    BlockDirtyBitmapMerge(BlockDirtyBitmapMerge) = "block-dirty-bitmap-merge" -> ();

    /// Copies what is below an image into it.
    BlockStream(Box<BlockStream>) = "block-stream" -> ();
    /// Writes what an image has into the one below it.
    BlockCommit(Box<BlockCommit>) = "block-commit" -> ();
    /// Copies what a node is at this moment.
    BlockdevBackup(Box<BlockdevBackup>) = "blockdev-backup" -> ();
    /// Makes another node a copy, and keeps it one.
    BlockdevMirror(Box<BlockdevMirror>) = "blockdev-mirror" -> ();

    /// Pauses a job.
    JobPause(Id) = "job-pause" -> ();
    /// Lets it go on.
    JobResume(Id) = "job-resume" -> ();
    /// Gives it up.
    JobCancel(Id) = "job-cancel" -> ();
    /// Brings one that is ready to its end.
    JobComplete(Id) = "job-complete" -> ();
    /// Forgets one that has ended.
    JobDismiss(Id) = "job-dismiss" -> ();
    /// Lets one take effect that waits for it.
    JobFinalize(Id) = "job-finalize" -> ();
    /// All jobs.
    QueryJobs = "query-jobs" -> Vec<JobInfo>;
    /// All jobs, as they were told before `query-jobs`.
    QueryBlockJobs = "query-block-jobs" -> Vec<BlockJobInfo>;
    /// Gives a job up.
    BlockJobCancel(BlockJobCancel) = "block-job-cancel" -> ();
    /// Pauses a job.
    BlockJobPause(BlockJobDevice) = "block-job-pause" -> ();
    /// Lets it go on.
    BlockJobResume(BlockJobDevice) = "block-job-resume" -> ();
    /// Brings one that is ready to its end.
    BlockJobComplete(BlockJobDevice) = "block-job-complete" -> ();
    /// Changes how fast it may be.
    BlockJobSetSpeed(BlockJobSetSpeed) = "block-job-set-speed" -> ();
    /// Changes how a mirror works.
    BlockJobChange(BlockJobChange) = "block-job-change" -> ();
    /// Forgets one that has ended.
    BlockJobDismiss(Id) = "block-job-dismiss" -> ();
    /// Lets one take effect that waits for it.
    BlockJobFinalize(Id) = "block-job-finalize" -> ();
}

/// All commands, in the order of the table.
pub fn built() -> impl Iterator<Item = &'static Row> {
    TABLE.iter()
}

/// The row of a command that exists.
pub fn find(name: &str) -> Option<&'static Row> {
    built().find(|row| row.name == name)
}

impl Row {
    /// Reads the command's arguments.
    ///
    /// # Errors
    /// The first mistake, in QEMU's words.
    pub fn read(&self, arguments: Map<String, Value>) -> Result<Command, Error> {
        (self.read)(&Tree::of_json(arguments))
    }
}

#[cfg(test)]
mod tests;
