//! Loop devices and small file systems on them, taken away again when dropped.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::mount::{UnmountFlags, unmount};

use crate::bed::Bed;
use crate::tool::Tool;

const LIMIT: Duration = Duration::from_secs(20);

/// A loop device over a file.
pub struct LoopDevice {
    path: PathBuf,
}

impl LoopDevice {
    /// Over the whole of `file`.
    pub fn over(file: &Path) -> Self {
        let tool = Tool::new("losetup").args(["--find", "--show"]).arg(file);
        let path = PathBuf::from(tool.limit(LIMIT).run().stdout.trim());
        Self { path }
    }

    /// `/dev/loopN`.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let output = Tool::new("losetup")
            .arg("--detach")
            .arg(&self.path)
            .limit(LIMIT)
            .output();
        if !output.status.success() {
            eprintln!("a loop device is left: {output}");
        }
    }
}

/// A mounted ext4 file system with little room.
pub struct SmallFs {
    folder: PathBuf,
    #[expect(dead_code, reason = "under the mount, and detached after it")]
    device: LoopDevice,
}

impl SmallFs {
    /// `size` bytes, mounted on folder `name` of the bed.
    pub fn new(bed: &Bed, name: &str, size: u64) -> Self {
        let disk = bed.sparse(&format!("{name}.disk"), size);
        Tool::new("mkfs.ext4")
            .args(["-q", "-m", "0", "-O", "^has_journal"])
            .arg(&disk)
            .run();
        let device = LoopDevice::over(&disk);
        let folder = bed.path(name);
        std::fs::create_dir(&folder).expect("a new folder");
        Tool::new("mount")
            .args(["-t", "ext4"])
            .arg(device.path())
            .arg(&folder)
            .run();
        Self { folder, device }
    }

    /// Where it is mounted.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Waits until it is on its disk, and what was deleted is free.
    pub fn sync(&self) {
        let folder = std::fs::File::open(&self.folder).expect("a mounted folder");
        rustix::fs::syncfs(folder).expect("a file system that can be flushed");
    }

    /// From now on nobody can write to it.
    pub fn make_read_only(&self) {
        Tool::new("mount")
            .args(["-o", "remount,ro"])
            .arg(&self.folder)
            .run();
    }
}

impl Drop for SmallFs {
    fn drop(&mut self) {
        if unmount(&self.folder, UnmountFlags::DETACH).is_err() {
            eprintln!("'{}' cannot be unmounted", self.folder.display());
        }
    }
}
