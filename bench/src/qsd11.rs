//! The peer that lives in a chroot: QEMU 11's storage daemon behind a small script (`setup`, `run`, `root`). The work directory
//! is bind-mounted as `/w` in there. Only that bind mount is made and taken away here.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::mount::{UnmountFlags, mount_bind, unmount};

use crate::error::{At, Error, Result};
use crate::mounts;

/// The chroot with our work directory bound into it. Dropping it takes the bind mount away again.
#[derive(Debug)]
pub struct Chroot {
    script: PathBuf,
    bound: PathBuf,
    ours: bool,
}

impl Chroot {
    /// Where the work directory is seen from within.
    pub const INSIDE: &str = "/w";

    /// Binds `work` into the chroot of `script`. Fails when the chroot has not been set up, or serves another run.
    pub fn enter(script: &Path, work: &Path) -> Result<Self> {
        let script = script.canonicalize().at("find", script)?;
        let output = Command::new(&script)
            .arg("root")
            .output()
            .at("run", &script)?;
        let root = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
        if !root.join("usr/bin/qemu-storage-daemon").exists() {
            return Err(Error::Usage(format!(
                "its chroot is not there: run `{} setup` first",
                script.display()
            )));
        }
        let bound = root.join(Self::INSIDE.trim_start_matches('/'));
        fs::create_dir_all(&bound).at("create", &bound)?;
        let ours = bind(work, &bound)?;
        Ok(Self {
            script,
            bound,
            ours,
        })
    }

    /// The work directory as exports appear in it for us.
    pub fn outside(&self) -> &Path {
        &self.bound
    }

    /// The daemon's command; `async_dio` puts back the `FUSE_ASYNC_DIO` that it forgets.
    pub fn command(&self, async_dio: bool) -> Command {
        let mut command = Command::new(&self.script);
        command.arg("run").env_remove("ASYNC_DIO");
        if async_dio {
            command.env("ASYNC_DIO", "1");
        }
        command
    }
}

/// Binds `work` on `point`; false when it is there already.
fn bind(work: &Path, point: &Path) -> Result<bool> {
    let identity = |path: &Path| {
        fs::metadata(path)
            .map(|metadata| (metadata.dev(), metadata.ino()))
            .at("stat", path)
    };
    if mounts::is_mounted(point)? {
        if identity(point)? == identity(work)? {
            return Ok(false);
        }
        if let Some(mount) = mounts::all()?
            .iter()
            .find(|mount| mount.point != point && mount.point.starts_with(point))
        {
            return Err(Error::Usage(format!(
                "its chroot serves another run: {} is mounted",
                mount.point.display()
            )));
        }
        // Left from an earlier run with another work directory; refused by the kernel when a daemon still uses it.
        unmount(point, UnmountFlags::empty()).at("unmount", point)?;
    }
    mount_bind(work, point).at("bind the work directory on", point)?;
    Ok(true)
}

impl Drop for Chroot {
    fn drop(&mut self) {
        if self.ours && unmount(&self.bound, UnmountFlags::empty()).is_err() {
            mounts::detach(&self.bound);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn script(directory: &Path, root: &Path) -> PathBuf {
        use std::os::unix::fs::PermissionsExt;
        let path = directory.join("peer");
        fs::write(&path, format!("#!/bin/sh\necho {}\n", root.display())).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[test]
    fn a_chroot_that_was_not_set_up_is_refused_with_the_command_that_does_it() {
        let directory = tempfile::tempdir().unwrap();
        let script = script(directory.path(), &directory.path().join("none"));
        let error = Chroot::enter(&script, directory.path())
            .unwrap_err()
            .to_string();
        assert!(error.contains("setup"), "{error}");
    }

    #[test]
    fn the_work_directory_is_seen_inside_and_the_bind_mount_ends_with_the_value() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("root");
        let work = directory.path().join("work");
        fs::create_dir_all(root.join("usr/bin")).unwrap();
        fs::write(root.join("usr/bin/qemu-storage-daemon"), b"").unwrap();
        fs::create_dir(&work).unwrap();
        fs::write(work.join("disk.raw"), b"x").unwrap();
        let script = script(directory.path(), &root);
        let chroot = Chroot::enter(&script, &work).unwrap();
        assert!(chroot.outside().join("disk.raw").exists());
        let second = Chroot::enter(&script, &work).unwrap();
        drop(second);
        assert!(
            chroot.outside().join("disk.raw").exists(),
            "only who bound it takes it away"
        );
        let bound = chroot.outside().to_path_buf();
        drop(chroot);
        assert!(!mounts::is_mounted(&bound).unwrap() && !bound.join("disk.raw").exists());
    }
}
