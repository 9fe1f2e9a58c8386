//! The command lines of what is done with images themselves: what may be written, what it means, what the help says.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use diskfuse_image::resize::NewSize;
use diskfuse_image::{Format, Preallocation, options};

use super::parse_format;

const CREATE_EXAMPLES: &str = "\
Examples:
  diskfuse create vm.qcow2 20G               an empty qcow2 image (the name says so)
  diskfuse create -f raw vm.img 20G          an empty raw image
  diskfuse create -b base.qcow2 vm.qcow2     an overlay: what is not written to it shows base.qcow2
  diskfuse create -o cluster_size=1M,extended_l2=on,preallocation=metadata vm.qcow2 100G
                                             with options of the format

Options (-o) of qcow2: backing_file, backing_fmt, cluster_size, compat, compression_type, data_file,
data_file_raw, extended_l2, lazy_refcounts, preallocation (off, metadata, falloc, full),
refcount_bits, size. Of raw: preallocation (off, falloc, full), size.

Next: `diskfuse mount -w IMAGE` shows its disk as a file, to partition and to fill.";

const INFO_EXAMPLES: &str = "\
Examples:
  diskfuse info vm.qcow2                     its format, sizes, backing file, snapshots
  diskfuse info disk                         of a mountpoint: its image, and who shows it
  diskfuse info --chain --json vm.qcow2      every image of its chain, for programs";

const CHECK_EXAMPLES: &str = "\
Examples:
  diskfuse check vm.qcow2                    looks, and changes nothing
  diskfuse check --repair all vm.qcow2       repairs what can be repaired

Exit codes: 0 nothing is wrong (any more), 1 it could not be checked, 2 it is corrupt, 3 clusters
leak, which harms nothing but takes space, 63 images of this format have nothing to check.";

const SNAPSHOT_EXAMPLES: &str = "\
Examples:
  diskfuse snapshot create vm.qcow2 after    keep the disk as it is, under the name 'after'
  diskfuse snapshot list vm.qcow2            what is kept
  diskfuse snapshot apply vm.qcow2 before
                                             the disk becomes what it was then
  diskfuse mount --snapshot before vm.qcow2
                                             look into it

The image must not be in use.";

const MAP_EXAMPLES: &str = "\
Examples:
  diskfuse map vm.qcow2                      where the data of the disk is
  diskfuse map --json vm.qcow2               everything about every range, for programs";

const RESIZE_EXAMPLES: &str = "\
Examples:
  diskfuse resize vm.qcow2 40G               40 GiB from now on
  diskfuse resize vm.qcow2 +10G              10 GiB more than it is
  diskfuse resize --shrink vm.qcow2 10M      throws away what is behind the first 10 MiB

Shrink what is on the disk (file systems, partitions) first, and enlarge it afterwards.";

const COMMIT_EXAMPLES: &str = "\
Examples:
  diskfuse commit overlay.qcow2              writes what the overlay holds into its backing file,
                                             and empties it

Other overlays on the same backing file are of no use afterwards: their base has changed.";

const DISCARD_EXAMPLES: &str = "\
Examples:
  diskfuse discard overlay.qcow2             throws away what was written to it; its backing file
                                             stays as it is";

const REBASE_EXAMPLES: &str = "\
Examples:
  diskfuse rebase -b new.qcow2 overlay.qcow2
                                             the disk stays as it is: what differs is copied into
                                             the overlay
  diskfuse rebase -b '' overlay.qcow2        it no longer needs a backing file
  diskfuse rebase -u -b moved/base.qcow2 -F qcow2 overlay.qcow2
                                             the backing file has another name now; only the header
                                             is changed";

const CONVERT_EXAMPLES: &str = "\
Examples:
  diskfuse convert vm.img copy.qcow2         from raw to qcow2 (the name's ending says so)
  diskfuse convert -c -o compression_type=zstd vm.qcow2 small.qcow2
                                             compressed
  diskfuse convert -l before vm.qcow2 then.img
                                             a snapshot as a raw image

The target stands alone, whatever the source stands on. It is taken away again if anything fails.
When the command returns, it is on stable storage.";

/// `diskfuse create`
#[derive(Debug, Args)]
#[command(after_help = CREATE_EXAMPLES)]
pub struct CreateArgs {
    /// The new image
    pub image: PathBuf,

    /// Its size, in bytes (suffixes k, M, G, T, P, E) [default: the backing file's]
    #[arg(value_parser = parse_size)]
    pub size: Option<u64>,

    /// raw or qcow2 [default: what the name ends in, else raw]
    #[arg(short, long, value_name = "FORMAT", value_parser = parse_format)]
    pub format: Option<Format>,

    /// Options of the format: KEY=VALUE,KEY=VALUE…
    #[arg(short = 'o', long = "options", value_name = "OPTIONS")]
    pub options: Vec<String>,

    /// Stand on this image, named relative to the new image's folder
    #[arg(short = 'b', long, value_name = "IMAGE")]
    pub backing: Option<String>,

    /// The backing file's format [default: qcow2 if it is; a raw one has to be called raw]
    #[arg(short = 'F', long, value_name = "FORMAT", value_parser = parse_format)]
    pub backing_format: Option<Format>,

    /// Do not open the backing file
    #[arg(short = 'u', long)]
    pub unchecked: bool,

    /// Overwrite what is there
    #[arg(long)]
    pub force: bool,
}

/// `diskfuse info`
#[derive(Debug, Args)]
#[command(after_help = INFO_EXAMPLES)]
pub struct InfoArgs {
    /// The image, or the mountpoint of one that is shown
    #[arg(value_name = "IMAGE|MOUNTPOINT")]
    pub image: PathBuf,

    /// raw or qcow2 [default: what it looks like]
    #[arg(short, long, value_name = "FORMAT", value_parser = parse_format)]
    pub format: Option<Format>,

    /// For programs: a JSON object, or with --chain an array of them; of a mountpoint an object with `images` and `export`
    #[arg(long)]
    pub json: bool,

    /// Also every image below it
    #[arg(long)]
    pub chain: bool,

    /// Even if another process writes it: what is said may make no sense then
    #[arg(short = 'U', long)]
    pub force_share: bool,
}

/// What to repair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Repair {
    /// Give back clusters that nothing refers to.
    Leaks,
    /// Everything that can be.
    All,
}

/// `diskfuse check`
#[derive(Debug, Args)]
#[command(after_help = CHECK_EXAMPLES)]
pub struct CheckArgs {
    /// The image
    pub image: PathBuf,

    /// raw or qcow2 [default: what it looks like]
    #[arg(short, long, value_name = "FORMAT", value_parser = parse_format)]
    pub format: Option<Format>,

    /// Repair it
    #[arg(short, long, value_name = "WHAT")]
    pub repair: Option<Repair>,

    /// For programs: a JSON object
    #[arg(long)]
    pub json: bool,

    /// Even if another process writes it: what is found may make no sense then
    #[arg(short = 'U', long, conflicts_with = "repair")]
    pub force_share: bool,
}

/// `diskfuse snapshot`
#[derive(Debug, Args)]
#[command(after_help = SNAPSHOT_EXAMPLES)]
pub struct SnapshotArgs {
    /// What to do.
    #[command(subcommand)]
    pub command: SnapshotCommand,
}

/// What is done with snapshots.
#[derive(Debug, Subcommand)]
pub enum SnapshotCommand {
    /// List the snapshots inside an image
    List {
        /// The image
        image: PathBuf,
        /// For programs: a JSON array of objects
        #[arg(long)]
        json: bool,
    },
    /// Keep the disk as it is now
    Create {
        /// The image
        image: PathBuf,
        /// What to call it
        name: String,
    },
    /// Forget a snapshot
    Delete {
        /// The image
        image: PathBuf,
        /// Its name or id
        name: String,
    },
    /// Make the disk what it was; what is on it now is lost unless another snapshot has it
    Apply {
        /// The image
        image: PathBuf,
        /// The snapshot's name or id
        name: String,
    },
}

/// `diskfuse map`
#[derive(Debug, Args)]
#[command(after_help = MAP_EXAMPLES)]
pub struct MapArgs {
    /// The image
    pub image: PathBuf,

    /// raw or qcow2 [default: what it looks like]
    #[arg(short, long, value_name = "FORMAT", value_parser = parse_format)]
    pub format: Option<Format>,

    /// For programs: a JSON array of objects
    #[arg(long)]
    pub json: bool,

    /// Begin this many bytes into the disk
    #[arg(short, long, value_name = "BYTES", value_parser = parse_size, default_value = "0")]
    pub start_offset: u64,

    /// Look at this many bytes only
    #[arg(short = 'l', long, value_name = "BYTES", value_parser = parse_size)]
    pub max_length: Option<u64>,

    /// Even if another process writes it: what is said may make no sense then
    #[arg(short = 'U', long)]
    pub force_share: bool,
}

/// `diskfuse resize`
#[derive(Debug, Args)]
#[command(after_help = RESIZE_EXAMPLES)]
pub struct ResizeArgs {
    /// The image
    pub image: PathBuf,

    /// Its new size, in bytes (suffixes k, M, G, T, P, E), or with + or - how much larger or smaller
    #[arg(value_parser = parse_new_size, allow_hyphen_values = true)]
    pub size: NewSize,

    /// raw or qcow2 [default: what it looks like]
    #[arg(short, long, value_name = "FORMAT", value_parser = parse_format)]
    pub format: Option<Format>,

    /// Let it become smaller, which deletes what was behind the new end
    #[arg(long)]
    pub shrink: bool,

    /// What of the new space to allocate at once: off, metadata, falloc, full
    #[arg(long, value_name = "HOW", value_parser = parse_preallocation, default_value = "off")]
    pub preallocation: Preallocation,
}

/// `diskfuse commit`
#[derive(Debug, Args)]
#[command(after_help = COMMIT_EXAMPLES)]
pub struct CommitArgs {
    /// The overlay
    pub image: PathBuf,

    /// What it is: qcow2 [default: what it looks like]
    #[arg(short, long, value_name = "FORMAT", value_parser = parse_format)]
    pub format: Option<Format>,

    /// Do not empty the overlay afterwards: it is not going to be used any more
    #[arg(short = 'd', long)]
    pub keep: bool,
}

/// `diskfuse discard`
#[derive(Debug, Args)]
#[command(after_help = DISCARD_EXAMPLES)]
pub struct DiscardArgs {
    /// The overlay: a qcow2 image with a backing file
    pub image: PathBuf,
}

/// `diskfuse rebase`
#[derive(Debug, Args)]
#[command(after_help = REBASE_EXAMPLES)]
pub struct RebaseArgs {
    /// The overlay
    pub image: PathBuf,

    /// The image to stand on, named relative to the overlay's folder; '' for none
    #[arg(short = 'b', long, value_name = "IMAGE")]
    pub backing: String,

    /// Its format [default: qcow2 if it is; a raw one has to be called raw]
    #[arg(short = 'F', long, value_name = "FORMAT", value_parser = parse_format)]
    pub backing_format: Option<Format>,

    /// What the overlay is: qcow2 [default: what it looks like]
    #[arg(short, long, value_name = "FORMAT", value_parser = parse_format)]
    pub format: Option<Format>,

    /// Only change the header: for a backing file that has been renamed, or another one with the same contents
    #[arg(short = 'u', long)]
    pub header_only: bool,
}

/// `diskfuse convert`
#[derive(Debug, Args)]
#[command(after_help = CONVERT_EXAMPLES)]
pub struct ConvertArgs {
    /// The image to copy
    pub source: PathBuf,

    /// The new image
    pub target: PathBuf,

    /// What the source is, raw or qcow2 [default: what it looks like]
    #[arg(short, long, value_name = "FORMAT", value_parser = parse_format)]
    pub format: Option<Format>,

    /// The new image's format, raw or qcow2 [default: what its name ends in, else raw]
    #[arg(short = 'O', long, value_name = "FORMAT", value_parser = parse_format)]
    pub output_format: Option<Format>,

    /// Options of the new image: KEY=VALUE,KEY=VALUE…; see `diskfuse create --help`
    #[arg(short = 'o', long = "options", value_name = "OPTIONS")]
    pub options: Vec<String>,

    /// Compress the new image
    #[arg(short, long)]
    pub compress: bool,

    /// Copy a snapshot inside the source, by its name or id
    #[arg(short = 'l', long, value_name = "NAME")]
    pub snapshot: Option<String>,

    /// Leave zeroes out in runs of so many bytes, a power of two; 0 writes them, so that the new image is allocated as a
    /// whole [default: what suits the new image]
    #[arg(short = 'S', long, value_name = "BYTES", value_parser = parse_size)]
    pub sparse: Option<u64>,

    /// Copy with N threads, 1 to 64 [default: one per CPU, 4 at most]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=64))]
    pub threads: Option<u8>,

    /// Keep M transfers in flight per thread, 1 to 64
    #[arg(short = 'm', long, value_name = "M", default_value = "8", value_parser = clap::value_parser!(u8).range(1..=64))]
    pub in_flight: u8,

    /// Overwrite what is there
    #[arg(long)]
    pub force: bool,

    /// Even if another process writes the source: what is copied may make no sense then
    #[arg(short = 'U', long)]
    pub force_share: bool,
}

fn parse_size(text: &str) -> Result<u64, String> {
    options::parse_size(text).map_err(|error| error.to_string())
}

fn parse_preallocation(word: &str) -> Result<Preallocation, String> {
    Preallocation::parse(word).map_err(|error| error.to_string())
}

fn parse_new_size(text: &str) -> Result<NewSize, String> {
    if let Some(more) = text.strip_prefix('+') {
        return parse_size(more).map(NewSize::More);
    }
    match text.strip_prefix('-') {
        Some(less) => parse_size(less).map(NewSize::Less),
        None => parse_size(text).map(NewSize::Exactly),
    }
}
