//! The images that cells use: raw and qcow2, fully written, so that no cell measures allocation, and cached or not as a
//! cell wants; or a new qcow2 image for each measurement, where allocation is what is measured.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{Advice, fadvise};

use crate::error::{At, Error, Result};
use crate::plan::Target;
use crate::signals;

const CHUNK: usize = 1 << 20;

/// The name of a target's image; nothing for null nodes.
pub fn name(target: Target) -> Option<&'static str> {
    match target {
        Target::Null => None,
        Target::File | Target::Cached => Some("disk.raw"),
        Target::Qcow2 | Target::Qcow2Cached => Some("disk.qcow2"),
        Target::Qcow2New => Some("new.qcow2"),
    }
}

/// The images of a run.
pub struct Images {
    directory: PathBuf,
    /// Bytes of the disk.
    size: u64,
}

impl Images {
    /// Writes images of disks of `mebibytes` MiB, as far as targets need them, into `directory`.
    pub fn create(directory: &Path, mebibytes: u64, targets: &[Target]) -> Result<Self> {
        let images = Self {
            directory: directory.to_owned(),
            size: mebibytes << 20,
        };
        let raw = directory.join("disk.raw");
        write_raw(&raw, mebibytes)?;
        if targets.contains(&Target::Qcow2) || targets.contains(&Target::Qcow2Cached) {
            let qcow2 = directory.join("disk.qcow2");
            qemu_img(&[
                "convert".as_ref(),
                "-O".as_ref(),
                "qcow2".as_ref(),
                raw.as_ref(),
                qcow2.as_ref(),
            ])?;
        }
        if targets.contains(&Target::Qcow2New) {
            images.settle(Target::Qcow2New)?;
        }
        Ok(images)
    }

    /// Brings the image to rest before a measurement: nothing dirty, and all of it in the page cache or none; a new one
    /// is made anew.
    pub fn settle(&self, target: Target) -> Result<()> {
        let Some(name) = name(target) else {
            return Ok(());
        };
        let path = self.directory.join(name);
        if target == Target::Qcow2New {
            let size = target.size(self.size).to_string();
            qemu_img(&[
                "create".as_ref(),
                "-q".as_ref(),
                "-f".as_ref(),
                "qcow2".as_ref(),
                path.as_ref(),
                size.as_ref(),
            ])?;
        }
        let mut file = File::open(&path).at("open", &path)?;
        file.sync_all().at("sync", &path)?;
        if target.is_direct() {
            return fadvise(file.as_fd(), 0, None, Advice::DontNeed).at("drop the cache of", &path);
        }
        let mut chunk = vec![0u8; CHUNK];
        while file.read(&mut chunk).at("read", &path)? > 0 {}
        Ok(())
    }
}

/// Writes a raw image of `mebibytes` MiB that nothing can be made shorter of.
pub fn write_raw(path: &Path, mebibytes: u64) -> Result<()> {
    let mut file = File::create(path).at("create", path)?;
    let mut chunk = vec![0u8; CHUNK];
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for _ in 0..mebibytes {
        signals::check()?;
        // Not zeroes and not one repeated chunk: nothing below may find a short form for it.
        for word in chunk.chunks_exact_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
        file.write_all(&chunk).at("write", path)?;
    }
    file.sync_all().at("sync", path)
}

/// Runs qemu-img. Not ours: no contender shall have made the image that all are measured on.
pub fn qemu_img(arguments: &[&OsStr]) -> Result<()> {
    let mut command = Command::new("qemu-img");
    command.args(arguments);
    tool("qemu-img", "apt-get install qemu-utils", command)
}

/// Runs the `program` that `command` calls, whose failure is told in its own words; `install` is how one gets it.
pub fn tool(program: &'static str, install: &'static str, mut command: Command) -> Result<()> {
    let missing = |_| Error::Missing { program, install };
    let output = command.output().map_err(missing)?;
    match output.status.success() {
        true => Ok(()),
        false => Err(Error::Usage(format!(
            "{program}: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        ))),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn an_image_is_fully_allocated_and_not_repetitive() {
        let directory = tempfile::tempdir().unwrap();
        let targets = [Target::File, Target::Qcow2, Target::Qcow2New];
        let images = Images::create(directory.path(), 2, &targets).unwrap();
        let raw = directory.path().join("disk.raw");
        let metadata = std::fs::metadata(&raw).unwrap();
        assert_eq!(metadata.len(), 2 << 20);
        assert!(metadata.blocks() * 512 >= 2 << 20);
        let bytes = std::fs::read(&raw).unwrap();
        assert_ne!(bytes[..CHUNK], bytes[CHUNK..]);
        let qcow2 = std::fs::metadata(directory.path().join("disk.qcow2")).unwrap();
        assert!(qcow2.blocks() * 512 >= 2 << 20);
        for target in [
            Target::File,
            Target::Cached,
            Target::Qcow2Cached,
            Target::Qcow2New,
        ] {
            images.settle(target).unwrap();
        }
    }
}
