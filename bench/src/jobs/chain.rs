//! The images that jobs work on and the command lines that show them. All images are made by `qemu-img`.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use serde::Serialize;
use serde_json::{Value, json};

use crate::contender::Contender;
use crate::daemon::Launch;
use crate::error::{At, Error, Result};
use crate::image::{qemu_img, write_raw};

/// The jobs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// No job: what the guest gets when it is alone.
    None,
    /// `blockdev-backup` of the disk into a new image.
    Backup,
    /// `blockdev-mirror` of the disk into a new image, until it is ready.
    Mirror,
    /// `block-stream`: an empty overlay takes all of its base in.
    Stream,
    /// `block-commit` of a full image below the guest's into its empty base.
    Commit,
}

impl Kind {
    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Backup => "backup",
            Self::Mirror => "mirror",
            Self::Stream => "stream",
            Self::Commit => "commit",
        }
    }

    /// The command that begins it. It stays when it is done, until it is dismissed.
    pub fn command(self) -> Option<Value> {
        let arguments = match self {
            Self::None => return None,
            Self::Backup | Self::Mirror => {
                json!({"device": "top", "target": "target", "sync": "full"})
            }
            Self::Stream => json!({"device": "top"}),
            Self::Commit => json!({"device": "top", "top-node": "mid", "base-node": "base"}),
        };
        let name = match self {
            Self::Backup | Self::Mirror => format!("blockdev-{}", self.name()),
            _ => format!("block-{}", self.name()),
        };
        let mut arguments = arguments;
        arguments["job-id"] = json!("job");
        arguments["auto-dismiss"] = json!(false);
        Some(json!({"execute": name, "arguments": arguments}))
    }

    /// The images from the guest's down.
    fn layers(self) -> &'static [&'static str] {
        match self {
            Self::None | Self::Backup | Self::Mirror => &["top"],
            Self::Stream => &["top", "base"],
            Self::Commit => &["top", "mid", "base"],
        }
    }

    /// The one of them that has the data.
    fn full(self) -> &'static str {
        match self {
            Self::None | Self::Backup | Self::Mirror => "top",
            Self::Stream => "base",
            Self::Commit => "mid",
        }
    }
}

/// The work directory with the data that every image is made from.
pub struct Chain {
    folder: PathBuf,
    size: u64,
}

impl Chain {
    /// Writes the data of disks of `mebibytes` MiB.
    pub fn create(folder: &Path, mebibytes: u64) -> Result<Self> {
        write_raw(&folder.join("disk.raw"), mebibytes)?;
        Ok(Self {
            folder: folder.to_owned(),
            size: mebibytes << 20,
        })
    }

    /// Size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Where fio's report goes.
    pub fn report(&self) -> PathBuf {
        self.folder.join("guest.json")
    }

    fn image(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.qcow2"))
    }

    /// Makes the images of a job anew, all on stable storage.
    pub fn lay_out(&self, kind: Kind) -> Result<()> {
        let qcow2: [&OsStr; 2] = ["-O".as_ref(), "qcow2".as_ref()];
        let layers = kind.layers();
        // From the base up, as an overlay is made on what is there.
        for (depth, layer) in layers.iter().enumerate().rev() {
            let image = self.image(layer);
            let below = layers.get(depth + 1).map(|name| format!("{name}.qcow2"));
            if *layer == kind.full() {
                let raw = self.folder.join("disk.raw");
                let source: [&OsStr; 2] = [raw.as_ref(), image.as_ref()];
                qemu_img(&[&["convert".as_ref()], &qcow2[..], &source[..]].concat())?;
                if let Some(below) = &below {
                    let mut rebase = ["rebase", "-u", "-F", "qcow2", "-b", below]
                        .map(OsStr::new)
                        .to_vec();
                    rebase.push(image.as_ref());
                    qemu_img(&rebase)?;
                }
            } else {
                self.empty(&image, below.as_deref())?;
            }
        }
        self.empty(&self.image("target"), None)?;
        for name in layers.iter().chain(&["target"]) {
            let image = self.image(name);
            let file = fs::File::open(&image).at("open", &image)?;
            file.sync_all().at("sync", &image)?;
        }
        Ok(())
    }

    fn empty(&self, image: &Path, below: Option<&str>) -> Result<()> {
        let size = self.size.to_string();
        let mut arguments = ["create", "-q", "-f", "qcow2"].map(OsStr::new).to_vec();
        if let Some(below) = below {
            arguments.extend(["-F", "qcow2", "-b", below].map(OsStr::new));
        }
        arguments.push(image.as_ref());
        arguments.push(size.as_ref());
        qemu_img(&arguments)
    }

    /// The daemon that shows the guest's image, and its monitor's socket as we see it.
    pub fn launch(
        &self,
        contender: &Contender,
        kind: Kind,
        number: u64,
    ) -> Result<(Launch, PathBuf)> {
        let nothing = || Error::Usage(format!("{} is not a daemon", contender.label()));
        let (mut command, inside, outside) =
            contender.program.open(&self.folder).ok_or_else(nothing)?;
        let socket = format!("qmp-{number}.sock");
        let at = inside.join(&socket).display().to_string();
        command
            .args([
                "--chardev",
                &format!("socket,id=qmp,path={at},server=on,wait=off"),
            ])
            .args(["--monitor", "qmp"]);
        let mut node = Value::Null;
        for layer in kind.layers().iter().rev() {
            node = described(layer, &inside, &node);
        }
        command.args(["--blockdev", &node.to_string()]);
        if matches!(kind, Kind::Backup | Kind::Mirror) {
            let target = described("target", &inside, &Value::Null);
            command.args(["--blockdev", &target.to_string()]);
        }
        let name = format!("export-{number}");
        contender.export(&mut command, "top", &inside.join(&name));
        let launch = Launch {
            name: contender.label(),
            command,
            mountpoints: vec![outside.join(name)],
            size: self.size,
        };
        Ok((launch, self.folder.join(socket)))
    }
}

fn described(name: &str, folder: &Path, backing: &Value) -> Value {
    let file = folder.join(format!("{name}.qcow2")).display().to_string();
    json!({
        "driver": "qcow2",
        "node-name": name,
        "backing": backing,
        "file": {
            "driver": "file",
            "filename": file,
            "cache": {"direct": true},
            "aio": "io_uring",
            "discard": "unmap",
        },
    })
}
