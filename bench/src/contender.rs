//! Who takes part: which program with which options stands for one column of the table. Starts nothing itself.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;

use clap::ValueEnum;
use serde::Serialize;

use crate::cli::Transport;
use crate::daemon::Launch;
use crate::image;
use crate::plan::{Target, word};
use crate::qsd11::Chroot;

/// Which side a contender is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// This project's binary.
    Ours,
    /// A daemon to compare with.
    Peer,
    /// A server of ours that does nothing: what a transport costs at least.
    Floor,
    /// No daemon: the image file itself.
    Bare,
}

/// How a program is started and how it sees the work directory.
#[derive(Debug, Clone)]
pub enum Program {
    /// Our binary (`BINARY qsd …`), with options appended to the export.
    Ours {
        /// The binary.
        binary: PathBuf,
        /// `key=value,…` appended to the export's options; may be empty.
        extra: String,
    },
    /// A binary with the command line of `qemu-storage-daemon`.
    Compatible {
        /// The binary.
        binary: PathBuf,
    },
    /// QEMU 11 in its chroot.
    Chroot {
        /// The chroot.
        chroot: Rc<Chroot>,
        /// Whether `FUSE_ASYNC_DIO` is put back.
        async_dio: bool,
    },
    /// This program as bare server; it has null exports only.
    Floor {
        /// This program.
        binary: PathBuf,
        /// How it and the kernel exchange requests.
        transport: Transport,
    },
    /// None: the load runs on the image file.
    None,
}

/// One column of the table.
#[derive(Debug, Clone)]
pub struct Contender {
    /// Name that its configurations with other numbers of queues share.
    pub family: String,
    /// Whose side it is on.
    pub role: Role,
    /// Number of queues (threads that serve the export); 0 for none.
    pub queues: u32,
    /// What is started.
    pub program: Program,
}

/// Where the files of a run are, and what the nodes are made of.
#[derive(Debug, Clone, Copy)]
pub struct Ground<'a> {
    /// The work directory on the host.
    pub work: &'a Path,
    /// Size in bytes of every export whose target does not have a size of its own ([`Target::size`]).
    pub size: u64,
    /// Whether null nodes fill what is read with zeroes.
    pub read_zeroes: bool,
}

impl Contender {
    /// The bare file.
    pub fn bare() -> Self {
        Self {
            family: "bare".to_owned(),
            role: Role::Bare,
            queues: 0,
            program: Program::None,
        }
    }

    /// Unique name, e.g. `diskfuse q4`.
    pub fn label(&self) -> String {
        if self.role == Role::Bare {
            self.family.clone()
        } else {
            format!("{} q{}", self.family, self.queues)
        }
    }

    /// Whether it can run cells on `target`: a null node has no file that could be used bare, a bare server nothing else.
    pub fn runs(&self, target: Target) -> bool {
        match self.role {
            Role::Bare => matches!(target, Target::File | Target::Cached),
            Role::Floor => target == Target::Null,
            Role::Ours | Role::Peer => true,
        }
    }

    /// How it and the kernel exchange requests, where that was asked for.
    pub fn transport(&self) -> Option<Transport> {
        match &self.program {
            Program::Floor { transport, .. } => Some(*transport),
            Program::Ours { extra, .. } => {
                let mut values = extra
                    .rsplit(',')
                    .filter_map(|option| option.split_once('='));
                let (_, value) = values.find(|(key, _)| *key == "transport")?;
                Transport::from_str(value, false).ok()
            }
            _ => None,
        }
    }

    /// The daemon for one export of `target`, `number` making its mountpoint's name unique; nothing for the bare file.
    pub fn launch(&self, target: Target, ground: &Ground<'_>, number: u64) -> Option<Launch> {
        let name = format!("export-{number}");
        if let Program::Floor { binary, transport } = &self.program {
            let point = ground.work.join(name);
            return Some(self.launch_floor(binary, *transport, point, ground.size));
        }
        let (mut command, inside, outside) = self.program.open(ground.work)?;
        command.args(["--blockdev", &node("n0", target, &inside, ground)]);
        self.export(&mut command, "n0", &inside.join(&name));
        Some(Launch {
            name: self.label(),
            command,
            mountpoints: vec![outside.join(name)],
            size: target.size(ground.size),
        })
    }

    /// Adds an export of `node`, with this contender's queues and options, to its `command`.
    pub fn export(&self, command: &mut Command, node: &str, mountpoint: &Path) {
        let mut export = export("e0", node, mountpoint);
        if let Program::Ours { extra, .. } = &self.program {
            let _ = write!(export, ",threads={}", self.queues);
            if !extra.is_empty() {
                let _ = write!(export, ",{extra}");
            }
        } else if self.queues > 1 {
            export.push_str(&iothreads(command, self.queues));
        }
        command.args(["--export", &export]);
    }

    fn launch_floor(
        &self,
        binary: &Path,
        transport: Transport,
        point: PathBuf,
        size: u64,
    ) -> Launch {
        let mut command = Command::new(binary);
        command
            .args(["bare-server", "--transport", &word(transport)])
            .args(["--threads", &self.queues.to_string()])
            .args(["--size", &size.to_string()])
            .arg("--mountpoint")
            .arg(&point);
        Launch {
            name: self.label(),
            command,
            mountpoints: vec![point],
            size,
        }
    }

    /// The daemon with `count` exports of as many null nodes, all on the same iothreads (as many as this contender's queues).
    pub fn launch_many(&self, count: u32, ground: &Ground<'_>) -> Option<Launch> {
        let (mut command, inside, outside) = self.program.open(ground.work)?;
        let list = iothreads(&mut command, self.queues);
        let mut mountpoints = Vec::new();
        for number in 0..count {
            let (id, name) = (format!("n{number}"), format!("export-{number}"));
            command.args([
                "--blockdev",
                &node(&id, Target::Null, Path::new(""), ground),
            ]);
            let mut export = export(&format!("e{number}"), &id, &inside.join(&name)) + &list;
            if let Program::Ours { extra, .. } = &self.program
                && !extra.is_empty()
            {
                let _ = write!(export, ",{extra}");
            }
            command.args(["--export", &export]);
            mountpoints.push(outside.join(name));
        }
        Some(Launch {
            name: self.label(),
            command,
            mountpoints,
            size: ground.size,
        })
    }

    /// First line that the program prints about its version.
    pub fn version(&self, work: &Path) -> Option<String> {
        let mut command = match &self.program {
            Program::Ours { binary, .. } => Command::new(binary),
            program => program.open(work)?.0,
        };
        let output = command.arg("--version").output().ok()?;
        String::from_utf8_lossy(&output.stdout)
            .lines()
            .next()
            .map(str::to_owned)
    }

    /// What distinguishes it, for the report: program and appended options.
    pub fn describe(&self) -> String {
        match &self.program {
            Program::Ours { extra, .. } if extra.is_empty() => "qsd, threads=N".to_owned(),
            Program::Ours { extra, .. } => format!("qsd, threads=N,{extra}"),
            Program::Compatible { .. } => "N iothreads".to_owned(),
            Program::Chroot {
                async_dio: true, ..
            } => "N iothreads, FUSE_ASYNC_DIO put back".to_owned(),
            Program::Chroot {
                async_dio: false, ..
            } => "N iothreads, as released".to_owned(),
            Program::Floor { transport, .. } => {
                format!("does nothing, {}, N threads", word(*transport))
            }
            Program::None => "fio on the image file".to_owned(),
        }
    }
}

impl Program {
    /// The command without options, and the work directory as the daemon and as we see its exports in it.
    pub fn open(&self, work: &Path) -> Option<(Command, PathBuf, PathBuf)> {
        let here = work.to_path_buf();
        match self {
            Self::Ours { binary, .. } => {
                let mut command = Command::new(binary);
                command.arg("qsd");
                Some((command, here.clone(), here))
            }
            Self::Compatible { binary } => Some((Command::new(binary), here.clone(), here)),
            Self::Chroot { chroot, async_dio } => Some((
                chroot.command(*async_dio),
                PathBuf::from(Chroot::INSIDE),
                chroot.outside().to_path_buf(),
            )),
            Self::Floor { .. } | Self::None => None,
        }
    }
}

/// Adds `count` iothreads to the command; returns the export's options that name them all.
fn iothreads(command: &mut Command, count: u32) -> String {
    let mut list = String::new();
    for number in 0..count {
        command.args(["--object", &format!("iothread,id=io{number}")]);
        let _ = write!(list, ",iothread.{number}=io{number}");
    }
    list
}

/// A node; `folder` is where the daemon sees the images.
fn node(id: &str, target: Target, folder: &Path, ground: &Ground<'_>) -> String {
    let file = |prefix: &str| {
        let direct = if target.is_direct() { "on" } else { "off" };
        let path = image::name(target).map(|name| comma(&folder.join(name)));
        format!(
            "{prefix}filename={},{prefix}cache.direct={direct},{prefix}aio=io_uring,{prefix}discard=unmap",
            path.unwrap_or_default()
        )
    };
    match target {
        Target::Null => {
            let zeroes = if ground.read_zeroes { "on" } else { "off" };
            format!(
                "null-co,node-name={id},size={},read-zeroes={zeroes}",
                ground.size
            )
        }
        Target::File | Target::Cached => format!("file,node-name={id},{}", file("")),
        Target::Qcow2 | Target::Qcow2Cached | Target::Qcow2New => {
            format!("qcow2,node-name={id},file.driver=file,{}", file("file."))
        }
    }
}

fn export(id: &str, node: &str, mountpoint: &Path) -> String {
    format!(
        "fuse,id={id},node-name={node},mountpoint={},writable=on",
        comma(mountpoint)
    )
}

/// A path as a value of an option list, where a comma is written twice.
fn comma(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ground() -> Ground<'static> {
        Ground {
            work: Path::new("/tmp/a,b"),
            size: 1 << 30,
            read_zeroes: false,
        }
    }

    fn arguments(contender: &Contender, target: Target) -> Vec<String> {
        let launch = contender.launch(target, &ground(), 7).unwrap();
        assert_eq!(launch.mountpoints, [PathBuf::from("/tmp/a,b/export-7")]);
        launch
            .command
            .get_args()
            .map(|argument| argument.to_str().unwrap().to_owned())
            .collect()
    }

    fn ours(queues: u32, extra: &str) -> Contender {
        let program = Program::Ours {
            binary: "diskfuse".into(),
            extra: extra.to_owned(),
        };
        Contender {
            family: "diskfuse".to_owned(),
            role: Role::Ours,
            queues,
            program,
        }
    }

    fn peer(queues: u32) -> Contender {
        let program = Program::Compatible {
            binary: "qemu-storage-daemon".into(),
        };
        Contender {
            family: "qemu".to_owned(),
            role: Role::Peer,
            queues,
            program,
        }
    }

    #[test]
    fn ours_is_told_its_threads_and_the_appended_options() {
        assert_eq!(
            arguments(&ours(2, "transport=uring"), Target::Null),
            [
                "qsd",
                "--blockdev",
                "null-co,node-name=n0,size=1073741824,read-zeroes=off",
                "--export",
                "fuse,id=e0,node-name=n0,mountpoint=/tmp/a,,b/export-7,writable=on,threads=2,transport=uring",
            ]
        );
    }

    #[test]
    fn a_peer_with_one_queue_has_no_iothread_and_with_two_has_two() {
        let one = arguments(&peer(1), Target::File);
        assert_eq!(
            one,
            [
                "--blockdev",
                "file,node-name=n0,filename=/tmp/a,,b/disk.raw,cache.direct=on,aio=io_uring,discard=unmap",
                "--export",
                "fuse,id=e0,node-name=n0,mountpoint=/tmp/a,,b/export-7,writable=on",
            ]
        );
        let two = arguments(&peer(2), Target::Cached);
        assert!(two[1].contains("cache.direct=off"));
        assert_eq!(
            two[2..6],
            ["--object", "iothread,id=io0", "--object", "iothread,id=io1"]
        );
        assert!(two[7].ends_with(",iothread.0=io0,iothread.1=io1"));
    }

    #[test]
    fn a_qcow2_node_names_its_file_and_a_new_one_is_larger() {
        let old = arguments(&peer(1), Target::Qcow2Cached);
        assert_eq!(
            old[1],
            "qcow2,node-name=n0,file.driver=file,file.filename=/tmp/a,,b/disk.qcow2,file.cache.direct=off,\
             file.aio=io_uring,file.discard=unmap"
        );
        let launch = peer(1).launch(Target::Qcow2New, &ground(), 7).unwrap();
        assert!(launch.size > ground().size);
    }

    #[test]
    fn many_exports_share_the_iothreads() {
        let launch = peer(4).launch_many(3, &ground()).unwrap();
        assert_eq!(launch.mountpoints.len(), 3);
        let arguments: Vec<&str> = launch
            .command
            .get_args()
            .map(|argument| argument.to_str().unwrap())
            .collect();
        assert_eq!(
            arguments
                .iter()
                .filter(|argument| argument.starts_with("iothread,id="))
                .count(),
            4
        );
        assert_eq!(
            arguments
                .iter()
                .filter(|argument| argument.ends_with("iothread.3=io3"))
                .count(),
            3
        );
    }

    fn floor(transport: Transport, queues: u32) -> Contender {
        let program = Program::Floor {
            binary: "xtask".into(),
            transport,
        };
        Contender {
            family: format!("bare-{}", word(transport)),
            role: Role::Floor,
            queues,
            program,
        }
    }

    #[test]
    fn the_floor_is_this_program_and_has_only_null_cells() {
        let uring = floor(Transport::Uring, 4);
        assert_eq!(
            arguments(&uring, Target::Null),
            [
                "bare-server",
                "--transport",
                "uring",
                "--threads",
                "4",
                "--size",
                "1073741824",
                "--mountpoint",
                "/tmp/a,b/export-7",
            ]
        );
        assert!(uring.runs(Target::Null) && !uring.runs(Target::File));
        assert_eq!(uring.label(), "bare-uring q4");
        assert!(uring.launch_many(2, &ground()).is_none());
    }

    #[test]
    fn a_transport_is_known_where_it_was_asked_for_and_the_last_word_counts() {
        let extra = "transport=device,growable=on,transport=uring";
        assert_eq!(ours(1, extra).transport(), Some(Transport::Uring));
        assert_eq!(ours(1, "transport=auto").transport(), None);
        assert_eq!(ours(1, "").transport(), None);
        let device = floor(Transport::Device, 1);
        assert_eq!(device.transport(), Some(Transport::Device));
        assert_eq!(peer(1).transport(), None);
    }

    #[test]
    fn the_bare_file_needs_no_daemon_and_has_no_null_cells() {
        let bare = Contender::bare();
        assert!(bare.launch(Target::File, &ground(), 0).is_none());
        assert!(bare.runs(Target::File) && bare.runs(Target::Cached) && !bare.runs(Target::Null));
        assert!(!bare.runs(Target::Qcow2));
        assert_eq!(bare.label(), "bare");
        assert_eq!(ours(4, "").label(), "diskfuse q4");
    }
}
