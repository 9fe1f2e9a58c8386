//! The command line of the tasks. Parses and explains; decides nothing.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum, value_parser};

use crate::jobs::Kind;
use crate::monitor::Beside;
use crate::people::Subject;
use crate::plan::{Direction, Filter, Mode, Pattern, Rows, Target};

/// Tasks of the project.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub task: Task,
}

/// One task.
#[derive(Debug, Subcommand)]
pub enum Task {
    /// Measure exports with fio, paired with peers: text table, JSON and SVG
    Bench(Bench),
    /// Measure many exports in one daemon: start, I/O on all, memory, stop
    Exports(Exports),
    /// Measure what backup, mirror, stream and commit cost a guest, paired with peers
    Jobs(Jobs),
    /// Measure the monitor, paired with peers: its answers, and the time until an export that it adds can be read
    Monitor(Monitor),
    /// Measure `diskfuse mount`: start, partitions beside the whole disk, the sandbox, many images in one process
    People(People),
    /// Serve a file that does nothing: the floor that `bench --floor` measures
    #[command(hide = true)]
    BareServer(BareServer),
}

/// Who takes part.
#[derive(Debug, Args)]
pub struct Select {
    /// Leave our own binary out (and don't build it)
    #[arg(long)]
    pub no_ours: bool,
    /// Options appended to our export, e.g. `transport=uring`
    #[arg(
        long,
        value_name = "KEY=VALUE,...",
        default_value = "",
        hide_default_value = true
    )]
    pub ours: String,
    /// One more contender of ours: `NAME:KEY=VALUE,...` (our binary with these export options) or `NAME=PATH[:KEY=VALUE,...]`
    #[arg(long, value_name = "SPEC")]
    pub variant: Vec<Variant>,
    /// A binary with the command line of qemu-storage-daemon
    #[arg(long, value_name = "NAME=PATH")]
    pub peer: Vec<Peer>,
    /// Script that runs QEMU 11's daemon in its chroot [default: ../shared/peers/qsd11 beside the workspace, if there]
    #[arg(long, value_name = "SCRIPT")]
    pub qsd11: Option<PathBuf>,
    /// Leave QEMU 11 out
    #[arg(long, conflicts_with = "qsd11")]
    pub no_qsd11: bool,
    /// Directory for image and mountpoints [default: a temporary one in the target directory]
    #[arg(long, value_name = "DIR")]
    pub work: Option<PathBuf>,
    /// Where the reports go [default: bench in the target directory]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
}

/// Options of `bench`.
#[derive(Debug, Args)]
pub struct Bench {
    /// Who takes part
    #[command(flatten)]
    pub select: Select,
    /// Sets of rows
    #[arg(long, value_enum, value_delimiter = ',', default_value = "4k")]
    pub rows: Vec<Rows>,
    /// Only these targets
    #[arg(long, value_enum, value_delimiter = ',')]
    pub only: Vec<Target>,
    /// Only these directions
    #[arg(long, value_enum, value_delimiter = ',')]
    pub rw: Vec<Direction>,
    /// Only these patterns
    #[arg(long, value_enum, value_delimiter = ',')]
    pub pattern: Vec<Pattern>,
    /// Only these modes
    #[arg(long, value_enum, value_delimiter = ',')]
    pub mode: Vec<Mode>,
    /// Only these numbers of jobs
    #[arg(long, value_delimiter = ',')]
    pub jobs: Vec<u32>,
    /// Numbers of queues; QEMU 11 takes part with 1 and 4 of them
    #[arg(long, value_delimiter = ',', default_value = "1,2,4", value_parser = value_parser!(u32).range(1..=64))]
    pub queues: Vec<u32>,
    /// Rounds; each measures every contender once in every cell [default: 3, with --quick 1]
    #[arg(long, value_parser = value_parser!(u32).range(1..))]
    pub rounds: Option<u32>,
    /// Seconds of one measurement, after a warm-up of an eighth of it [default: 2, with --quick 0.5]
    #[arg(long, value_parser = seconds)]
    pub seconds: Option<Duration>,
    /// A short look: one round of half a second
    #[arg(long)]
    pub quick: bool,
    /// Size of image and null nodes in MiB
    #[arg(long, value_name = "MIB", default_value_t = 1024, value_parser = value_parser!(u64).range(16..))]
    pub image_size: u64,
    /// Null cells: also measure servers that do nothing, `bare-device` and `bare-uring`
    #[arg(long)]
    pub floor: bool,
    /// Null nodes fill what is read with zeroes
    #[arg(long)]
    pub read_zeroes: bool,
    /// Also write BENCHMARKS.md
    #[arg(long)]
    pub markdown: bool,
}

impl Bench {
    /// The cells that are asked for.
    pub fn filter(&self) -> Filter {
        Filter {
            rows: self.rows.clone(),
            targets: self.only.clone(),
            directions: self.rw.clone(),
            patterns: self.pattern.clone(),
            modes: self.mode.clone(),
            jobs: self.jobs.clone(),
        }
    }

    /// Number of rounds.
    pub fn rounds(&self) -> u32 {
        self.rounds.unwrap_or(if self.quick { 1 } else { 3 })
    }

    /// Time of one measurement.
    pub fn time(&self) -> Duration {
        self.seconds
            .unwrap_or(Duration::from_millis(if self.quick { 500 } else { 2000 }))
    }
}

/// Options of `exports`.
#[derive(Debug, Args)]
pub struct Exports {
    /// Who takes part
    #[command(flatten)]
    pub select: Select,
    /// Number of exports
    #[arg(long, default_value_t = 200, value_parser = value_parser!(u32).range(2..=10_000))]
    pub count: u32,
    /// Number of iothreads that all exports share
    #[arg(long, default_value_t = 4, value_parser = value_parser!(u32).range(1..=64))]
    pub iothreads: u32,
    /// Rounds
    #[arg(long, default_value_t = 3, value_parser = value_parser!(u32).range(1..))]
    pub rounds: u32,
}

/// Options of `jobs`.
#[derive(Debug, Args)]
pub struct Jobs {
    /// Who takes part
    #[command(flatten)]
    pub select: Select,
    /// Only these jobs
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "none,backup,mirror,stream,commit"
    )]
    pub only: Vec<Kind>,
    /// Number of threads that serve the export
    #[arg(long, default_value_t = 4, value_parser = value_parser!(u32).range(1..=64))]
    pub iothreads: u32,
    /// Size of the disk in MiB
    #[arg(long, value_name = "MIB", default_value_t = 1024, value_parser = value_parser!(u64).range(16..))]
    pub image_size: u64,
    /// Rounds
    #[arg(long, default_value_t = 3, value_parser = value_parser!(u32).range(1..))]
    pub rounds: u32,
}

/// Options of `monitor`.
#[derive(Debug, Args)]
pub struct Monitor {
    /// Who takes part
    #[command(flatten)]
    pub select: Select,
    /// Only with these beside it
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "nobody,guests"
    )]
    pub beside: Vec<Beside>,
    /// Number of threads that serve the export that the guests use
    #[arg(long, default_value_t = 4, value_parser = value_parser!(u32).range(1..=64))]
    pub iothreads: u32,
    /// Answers, and exports added and removed, of one measurement
    #[arg(long, default_value_t = 1000, value_parser = value_parser!(u32).range(10..))]
    pub count: u32,
    /// Rounds
    #[arg(long, default_value_t = 3, value_parser = value_parser!(u32).range(1..))]
    pub rounds: u32,
}

/// Options of `people`.
#[derive(Debug, Args)]
pub struct People {
    /// Who takes part
    #[command(flatten)]
    pub select: Select,
    /// Only these
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "start,partition,sandbox,many"
    )]
    pub only: Vec<Subject>,
    /// Rounds
    #[arg(long, default_value_t = 5, value_parser = value_parser!(u32).range(1..))]
    pub rounds: u32,
    /// Seconds of one measurement by fio, after a warm-up of an eighth of it
    #[arg(long, default_value = "2", value_parser = seconds)]
    pub seconds: Duration,
    /// Size of the disk with a partition in MiB
    #[arg(long, value_name = "MIB", default_value_t = 1024, value_parser = value_parser!(u64).range(16..))]
    pub image_size: u64,
}

/// How a server and the kernel exchange requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Transport {
    /// read(2) and write(2) on `/dev/fuse`.
    Device,
    /// FUSE over io_uring (Linux 6.14, switched on by root).
    Uring,
}

/// Options of `bare-server`.
#[derive(Debug, Args)]
pub struct BareServer {
    /// How requests are exchanged
    #[arg(long, value_enum)]
    pub transport: Transport,
    /// Number of threads; with uring at most one per CPU
    #[arg(long, default_value_t = 1, value_parser = value_parser!(u32).range(1..=1024))]
    pub threads: u32,
    /// Size of the file
    #[arg(long, value_name = "BYTES", value_parser = value_parser!(u64).range(1..=1 << 62))]
    pub size: u64,
    /// The regular file that is mounted on
    #[arg(long, value_name = "FILE")]
    pub mountpoint: PathBuf,
}

/// `NAME=PATH`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Name in the table.
    pub name: String,
    /// The binary.
    pub path: PathBuf,
}

impl FromStr for Peer {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((name, path)) if !name.is_empty() && !path.is_empty() => Ok(Self {
                name: name.to_owned(),
                path: path.into(),
            }),
            _ => Err("expected NAME=PATH".to_owned()),
        }
    }
}

/// `NAME:OPTIONS` or `NAME=PATH[:OPTIONS]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Variant {
    /// Name in the table.
    pub name: String,
    /// The binary, if not the one that was just built.
    pub path: Option<PathBuf>,
    /// Options appended to the export; may be empty.
    pub extra: String,
}

impl FromStr for Variant {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let usage = || "expected NAME:KEY=VALUE,... or NAME=PATH[:KEY=VALUE,...]".to_owned();
        let split = text
            .find([':', '='])
            .filter(|split| *split > 0)
            .ok_or_else(usage)?;
        let (name, rest) = (text[..split].to_owned(), &text[split + 1..]);
        if rest.is_empty() {
            return Err(usage());
        }
        if text.as_bytes()[split] == b':' {
            return Ok(Self {
                name,
                path: None,
                extra: rest.to_owned(),
            });
        }
        let (path, extra) = rest.split_once(':').unwrap_or((rest, ""));
        Ok(Self {
            name,
            path: Some(path.into()),
            extra: extra.to_owned(),
        })
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text
        .parse()
        .map_err(|_| "expected seconds, e.g. 0.5".to_owned())?;
    if (0.05..=3600.0).contains(&seconds) {
        Ok(Duration::from_secs_f64(seconds))
    } else {
        Err("expected 0.05 to 3600 seconds".to_owned())
    }
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
    fn a_variant_is_options_or_another_binary_or_both() {
        let variant = |text: &str| text.parse::<Variant>();
        let options = variant("ring:transport=uring,threads=2").unwrap();
        assert_eq!(
            (options.path, options.extra.as_str()),
            (None, "transport=uring,threads=2")
        );
        let binary = variant("old=/tmp/diskfuse").unwrap();
        assert_eq!(
            (binary.path, binary.extra.as_str()),
            (Some("/tmp/diskfuse".into()), "")
        );
        let both = variant("old=/tmp/diskfuse:growable=on").unwrap();
        assert_eq!(
            (both.name.as_str(), both.extra.as_str()),
            ("old", "growable=on")
        );
        for wrong in ["", "name", ":a=b", "=path", "name=", "name:"] {
            assert!(variant(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_peer_needs_a_name_and_a_path() {
        assert_eq!(
            "q=/bin/q".parse(),
            Ok(Peer {
                name: "q".to_owned(),
                path: "/bin/q".into()
            })
        );
        for wrong in ["q", "=x", "q="] {
            assert!(wrong.parse::<Peer>().is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn lists_are_separated_by_commas_and_quick_is_only_a_default() {
        let parse = |arguments: &[&str]| match Cli::try_parse_from(arguments).unwrap().task {
            Task::Bench(bench) => bench,
            _ => unreachable!("the arguments say bench"),
        };
        let bench = parse(&[
            "xtask", "bench", "--quick", "--rounds", "5", "--only", "null", "--mode", "aio,sync",
            "--queues", "1,4",
        ]);
        assert_eq!(
            (bench.rounds(), bench.time()),
            (5, Duration::from_millis(500))
        );
        assert_eq!(
            (bench.queues.as_slice(), bench.mode.len()),
            ([1, 4].as_slice(), 2)
        );
        assert_eq!(parse(&["xtask", "bench"]).rounds(), 3);
    }
}
