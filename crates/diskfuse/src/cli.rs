//! The command line of `diskfuse`, and nothing else: what may be written, what it means, what the help says.

mod images;
mod overview;
mod values;

use std::ffi::OsString;
use std::path::PathBuf;

pub use images::{
    CheckArgs, CommitArgs, ConvertArgs, CreateArgs, DiscardArgs, InfoArgs, MapArgs, RebaseArgs,
    Repair, ResizeArgs, SnapshotArgs, SnapshotCommand,
};
pub use overview::command;
pub(crate) use values::parse_format;
pub use values::{
    Aio, Cache, Discard, EventLoop, Passthrough, Placement, Sandbox, Shell, Transport,
};
use values::{parse_interval, parse_mode, parse_payload, parse_size};

use clap::{ArgGroup, Args, Parser, Subcommand};
use diskfuse_image::Format;

const EXAMPLES: &str = "\
Examples:
  diskfuse mount vm.qcow2                    show its disk, read-only, as vm.qcow2.raw beside it
  diskfuse mount -w vm.qcow2 disk            show it writable, as the file 'disk'
  diskfuse list                              what is shown, and how much goes through it
  diskfuse top                               what goes through just now, live
  diskfuse umount disk                       write everything back and take it away
  diskfuse create new.qcow2 20G              make an empty image
  diskfuse convert vm.img copy.qcow2         copy one into another format
  diskfuse qsd --help                        the command line of qemu-storage-daemon

`diskfuse COMMAND --help` says more about each, with examples; so do the man pages.

Exit codes: 0 done, 1 it failed (a message says why), 2 the command line is wrong.";

const MOUNT_EXAMPLES: &str = "\
Examples:
  diskfuse mount disk.img                    read-only, as disk.img.raw beside it
  diskfuse mount -w disk.img disk.img        writable, over the image itself: its name shows the
                                             disk until `umount`
  diskfuse mount --dir vm.qcow2 vm           the disk, its partitions, snapshots and layers as
                                             files in a directory
  diskfuse mount --overlay vm.img disk       writable, and all that is written is gone at the end
  diskfuse mount --into shown vm.qcow2 disk.img
                                             many images in one daemon: shown/vm.qcow2.raw,
                                             shown/disk.img.raw
  diskfuse mount --offset 1M --size 4M disk.img part1
                                             one partition of the disk
  diskfuse mount -w --threads 1 --cache direct /dev/sdb sdb
                                             a block device, past the page cache, one queue
  diskfuse mount -f --log debug disk.img d   in the foreground until Ctrl-C, telling what happens

The program returns once the file can be used; a daemon goes on behind it until `diskfuse umount`,
or until it gets SIGTERM. Then it writes everything back, unmounts, and removes the mountpoint if it
made it.

Next: use the file with any tool that knows raw disks (`fdisk -l`, `mount -o loop`, `fsck`, `dd`),
and take it away with `diskfuse umount`, by its name or the image's.

Who is not root needs fusermount3 (apt install fuse3) and access to /dev/fuse, or a namespace of his
own (unshare -Urm).";

const UMOUNT_EXAMPLES: &str = "\
Examples:
  diskfuse umount disk                       write everything back and take the file 'disk' away
  diskfuse umount vm.qcow2                   the same, by the image that it shows
  diskfuse umount --wait --timeout 60 disk   wait for those who use it, a minute at most
  diskfuse umount --lazy disk                take the name away now; they may finish

When it returns with success, all that was written is on stable storage (with --lazy: when the last
one who uses it is done). The image can be used by others then.";

const LIST_EXAMPLES: &str = "\
Examples:
  diskfuse list                              a line for each file that is shown
  diskfuse list --json                       everything that is known about them, for programs";

const COMPLETIONS_EXAMPLES: &str = "\
Examples:
  diskfuse completions bash >diskfuse.bash   for ~/.local/share/bash-completion/completions/diskfuse
  diskfuse completions zsh >_diskfuse        for a folder that stands in $fpath
  diskfuse completions fish >diskfuse.fish   for ~/.config/fish/completions

The Debian package has them in place.";

/// Show disk images as plain files.
#[derive(Debug, Parser)]
#[command(name = "diskfuse", version, after_help = EXAMPLES)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show an image as a file
    Mount(Box<MountArgs>),
    /// Write everything back and take a shown file away
    Umount(UmountArgs),
    /// List what is shown by this user's daemons
    List(ListArgs),
    /// Watch what goes through them
    Top(TopArgs),
    /// Make an empty image
    Create(CreateArgs),
    /// Tell about an image
    Info(InfoArgs),
    /// Look whether an image is consistent, and repair it
    Check(CheckArgs),
    /// Snapshots inside an image
    Snapshot(SnapshotArgs),
    /// Tell where the data of a disk is
    Map(MapArgs),
    /// Change the size of a disk
    Resize(ResizeArgs),
    /// Merge an overlay into its backing file
    Commit(CommitArgs),
    /// Empty an overlay: its disk is that of its backing file again
    Discard(DiscardArgs),
    /// Give an overlay another backing file
    Rebase(RebaseArgs),
    /// Copy an image into a new one of any format
    Convert(ConvertArgs),
    /// Understand the command line of qemu-storage-daemon (also when called by that name)
    Qsd(QsdArgs),
    /// Print what makes a shell complete this command line
    Completions(CompletionsArgs),
}

/// `diskfuse mount`
#[derive(Clone, Debug, Args)]
#[command(after_help = MOUNT_EXAMPLES, group = ArgGroup::new("may_write").args(["writable", "overlay"]).multiple(true))]
pub struct MountArgs {
    /// The image: a regular file or a block device
    pub image: PathBuf,

    /// The file to show it as, or with --dir the directory; made if missing, and removed again at the end
    /// [default: IMAGE.raw, with --dir IMAGE.d]
    pub mountpoint: Option<PathBuf>,

    /// More images, with --into
    #[arg(value_name = "IMAGE", requires = "into", hide = true)]
    pub more: Vec<PathBuf>,

    /// Show any number of images in this directory (made if missing, and removed again at the end), each as NAME.raw (with --dir
    /// NAME.d), served by the same threads of one process: diskfuse mount --into DIRECTORY IMAGE...
    #[arg(long, value_name = "DIRECTORY")]
    pub into: Option<PathBuf>,

    /// Show a directory: `disk`, its partitions as p1, p2, …, links to them by label, UUID and name, the snapshots inside the
    /// image, the layers of its chain, and info.json. `sync DIRECTORY` reads the partition table anew
    #[arg(long, conflicts_with_all = ["growable", "offset", "size", "snapshot", "passthrough"])]
    pub dir: bool,

    /// Let the disk be written, but not the image: what is written goes to an overlay. Without a FILE that is thrown away at the
    /// end; a FILE is a qcow2 image that is kept, made if missing, and can be merged with `diskfuse commit` or emptied with
    /// `diskfuse discard`
    #[arg(long, value_name = "FILE", num_args = 0..=1, require_equals = true, conflicts_with = "snapshot")]
    pub overlay: Option<Option<PathBuf>>,

    /// Where an overlay that is thrown away lies, also if that is in memory [default: beside the image, or in $TMPDIR]
    #[arg(long, value_name = "DIRECTORY", requires = "overlay")]
    pub overlay_dir: Option<PathBuf>,

    /// Let the disk be written
    #[arg(short, long)]
    pub writable: bool,

    /// Let writes past the end make the disk larger
    #[arg(long, requires = "may_write")]
    pub growable: bool,

    /// Serve it with N threads, one queue each, 1 to 64 [default: one per CPU, 4 at most]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=64))]
    pub threads: Option<u8>,

    /// What the image is, raw or qcow2 [default: what it looks like; then no write may make a raw one look like
    /// something else]
    #[arg(long, value_name = "FORMAT", value_parser = parse_format)]
    pub format: Option<Format>,

    /// Show a snapshot inside the image, read-only, by its name or id
    #[arg(long, value_name = "NAME", conflicts_with = "writable")]
    pub snapshot: Option<String>,

    /// Begin this many bytes into the image (suffixes k, M, G, T, P, E)
    #[arg(long, value_name = "BYTES", value_parser = parse_size)]
    pub offset: Option<u64>,

    /// Show this many bytes of it, a multiple of 512 [default: up to the end]
    #[arg(long, value_name = "BYTES", value_parser = parse_size)]
    pub size: Option<u64>,

    /// Let other users open the file, as far as its owner, group and mode let them; whoever is not root needs
    /// user_allow_other in /etc/fuse.conf for it
    #[arg(long)]
    pub allow_other: bool,

    /// Let root open the file, and nobody else; needs what --allow-other needs
    #[arg(long, conflicts_with_all = ["allow_other", "uid", "gid"])]
    pub allow_root: bool,

    /// Show the file as this user's, by number [default: who mounts it]
    #[arg(long, value_name = "ID", requires = "allow_other")]
    pub uid: Option<u32>,

    /// Show it as this group's, by number
    #[arg(long, value_name = "ID", requires = "allow_other")]
    pub gid: Option<u32>,

    /// Its permission bits in octal [default: 600, and 400 if it is read-only]
    #[arg(long, value_name = "BITS", value_parser = parse_mode)]
    pub mode: Option<u32>,

    /// Use the host's page cache, or go around it (O_DIRECT)
    #[arg(long, value_name = "HOW", default_value = "page")]
    pub cache: Cache,

    /// Who moves the image's bytes
    #[arg(long, value_name = "HOW", default_value = "io_uring")]
    pub aio: Aio,

    /// What to do with space that the disk's user gives up: give it back to the host, or keep it
    #[arg(long, value_name = "HOW", default_value = "unmap")]
    pub discard: Discard,

    /// What to wait for events with
    #[arg(long, value_name = "HOW", default_value = "auto")]
    pub event_loop: EventLoop,

    /// Asynchronous requests that the kernel may have waiting
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub max_background: Option<u16>,

    /// How requests come from the kernel: through /dev/fuse, or by FUSE over io_uring
    #[arg(long, value_name = "HOW", default_value = "auto")]
    pub transport: Transport,

    /// With --transport uring: requests that each CPU's queue hands out at once, 1 to 1024
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub depth: Option<u16>,

    /// The largest request (suffixes k, M) [default: what the kernel allows, up to 4M]
    #[arg(long, value_name = "BYTES", value_parser = parse_payload)]
    pub max_payload: Option<u32>,

    /// With --transport uring: where the threads run
    #[arg(long, value_name = "WHERE", default_value = "auto")]
    pub placement: Placement,

    /// With --transport uring: one thread after the other runs on these CPUs, such as 0-3 or 0,2
    #[arg(
        long,
        value_name = "CPUS",
        value_delimiter = ',',
        conflicts_with = "placement"
    )]
    pub cpus: Vec<String>,

    /// Let the kernel read and write a raw image file itself: at the speed of the file, but unseen by `list`; a writable
    /// one must be growable
    #[arg(long, value_name = "WHEN", default_value = "off")]
    pub passthrough: Passthrough,

    /// Take it away when nobody has used it for so many seconds
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..))]
    pub idle_timeout: Option<u32>,

    /// Show what is counted to Prometheus over HTTP, under /metrics. Whoever reaches the address may read it: names, sizes and
    /// times, no data
    #[arg(long, value_name = "HOST:PORT|unix:PATH")]
    pub metrics: Option<String>,

    /// Give up what serving does not take: files and sockets by name, other programs, privileges
    #[arg(long, value_name = "WHEN", default_value = "on")]
    pub sandbox: Sandbox,

    /// Stay in the foreground until Ctrl-C, SIGTERM or `diskfuse umount`
    #[arg(short, long)]
    pub foreground: bool,

    /// What to tell: off, error, warn, info, debug, trace, or a filter such as diskfuse_fuse=debug
    /// [default: $DISKFUSE_LOG, else warn]
    #[arg(long, value_name = "LEVEL")]
    pub log: Option<String>,

    /// Tell it to this file, also from the background, where nothing else is left to tell it to
    #[arg(long, value_name = "PATH")]
    pub log_file: Option<PathBuf>,
}

/// `diskfuse umount`
#[derive(Debug, Args)]
#[command(after_help = UMOUNT_EXAMPLES)]
pub struct UmountArgs {
    /// The mountpoint, or the image if it is shown once
    #[arg(value_name = "MOUNTPOINT|IMAGE")]
    pub path: PathBuf,

    /// Take all files away that show this image
    #[arg(long)]
    pub all: bool,

    /// If somebody uses the file, wait until nobody does [default: say who it is, and leave it as it is]
    #[arg(long, conflicts_with_all = ["lazy", "force"])]
    pub wait: bool,

    /// If somebody uses the file, take its name away at once and let him finish; the image is in use until then
    #[arg(long, conflicts_with = "force")]
    pub lazy: bool,

    /// If somebody uses the file, do what he has asked for and let all that he asks for afterwards fail; if its daemon does
    /// not answer, cut the file off from it
    #[arg(long)]
    pub force: bool,

    /// Give up after so many seconds; what has begun goes on [default: wait for as long as it takes]
    #[arg(long, value_name = "SECONDS")]
    pub timeout: Option<u32>,
}

/// `diskfuse list`
#[derive(Debug, Args)]
#[command(after_help = LIST_EXAMPLES)]
pub struct ListArgs {
    /// For programs: a JSON array of objects
    #[arg(long)]
    pub json: bool,
}

const TOP_HELP: &str = "\
Examples:
  diskfuse top                               until q is pressed; e shows the queues
  diskfuse top --batch -n 1                  one table, for scripts

Columns: reads and writes a second; MiB a second; what half and 99 % (wide: 99.9 %) of them took at
most; requests in flight; metadata lookups that needed no reading (qcow2); time that threads polled;
wide: polling that found something; errors.
`-` there was nothing to measure, `?` the daemon is older than the counter.";

/// `diskfuse top`
#[derive(Debug, Args)]
#[command(after_help = TOP_HELP)]
pub struct TopArgs {
    /// Look once in so many seconds, 0.1 to 3600
    #[arg(short, long, value_name = "SECONDS", default_value = "1", value_parser = parse_interval)]
    pub interval: f64,

    /// Show each queue as well
    #[arg(long)]
    pub queues: bool,

    /// Print tables instead of filling the terminal
    #[arg(short, long)]
    pub batch: bool,

    /// Print N tables, then end [default: go on]
    #[arg(short = 'n', long, value_name = "N", requires = "batch", value_parser = clap::value_parser!(u32).range(1..))]
    pub count: Option<u32>,
}

/// `diskfuse qsd`
#[derive(Debug, Args)]
#[command(disable_help_flag = true, disable_version_flag = true)]
pub struct QsdArgs {
    /// As for qemu-storage-daemon; `diskfuse qsd --help` explains them
    #[arg(
        value_name = "OPTION",
        trailing_var_arg = true,
        allow_hyphen_values = true
    )]
    pub arguments: Vec<OsString>,
}

/// `diskfuse completions`
#[derive(Debug, Args)]
#[command(after_help = COMPLETIONS_EXAMPLES)]
pub struct CompletionsArgs {
    /// The shell
    pub shell: Shell,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn examples_are_not_wider_than_a_terminal_of_100_columns() {
        fn look(command: &clap::Command) {
            let help = command.get_after_help().map(ToString::to_string);
            for line in help.unwrap_or_default().lines() {
                assert!(
                    line.chars().count() <= 100,
                    "{}: {line}",
                    command.get_name()
                );
            }
            command.get_subcommands().for_each(look);
        }
        look(&command());
    }

    #[test]
    fn every_command_has_examples() {
        for command in command().get_subcommands() {
            let help = command.get_after_help().map(ToString::to_string);
            let has_own_help = command.get_name() == "qsd";
            let has_examples = help.is_some_and(|help| help.starts_with("Examples:"));
            assert!(has_examples || has_own_help, "{}", command.get_name());
        }
    }

    #[test]
    fn options_of_the_storage_daemon_are_handed_over_untouched() {
        let words = ["diskfuse", "qsd", "--help", "--log", "debug", "-x", "y"];
        let Command::Qsd(qsd) = Cli::parse_from(words).command else {
            panic!("not qsd")
        };
        assert_eq!(qsd.arguments, words[2..]);
    }
}
