//! Mountpoints: taking away what a killed daemon left mounted on one, and making one that is missing (a file, or a directory),
//! which is gone again when we are. It must never remove a file that it did not make, or that somebody has put something into, nor
//! wait for a daemon that does not answer.

use std::fs::{DirBuilder, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;
use std::time::Duration;

use diskfuse_fuse::{FS_TYPE, MountEntry};
use diskfuse_ring::Reason;

use crate::error::{Error, Result};
use crate::sandbox::{Leftover, Removal};

/// How long a file may take to say whether somebody still shows it.
const PATIENCE: Duration = Duration::from_secs(2);

/// How long it may take to find out whether a file is one of ours: the disk below it may have to spin up, or a server to answer.
const SLOW: Duration = Duration::from_secs(60);

/// Takes a dead mount of ours away from `path`; true if there was one. Nothing else is ever touched.
///
/// # Errors
/// The mount cannot be taken away, or its daemon is there and does not answer; nor does the file system that `path` is on.
pub fn heal(path: &Path) -> Result<bool> {
    // As it was typed, as nothing that may be stuck is to be asked yet.
    let typed = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let in_ours = is_there(|there| typed.starts_with(there));
    let looks = Looks {
        patience: PATIENCE,
        slow: if in_ours { PATIENCE } else { SLOW },
        in_ours,
    };
    let (found, dead) = (path.to_owned(), path.to_owned());
    looks.heal(
        path,
        move || diskfuse_fuse::absolute(&found).is_ok_and(|path| is_there(|there| path == *there)),
        move || diskfuse_fuse::heal(&dead),
    )
}

/// Whether there is a mount of ours at such a place.
fn is_there(place: impl Fn(&PathBuf) -> bool) -> bool {
    let ours = |mount: &MountEntry| mount.fs_type == FS_TYPE && place(&mount.mountpoint);
    diskfuse_fuse::mounts().is_ok_and(|all| all.iter().any(ours))
}

/// How long it is waited for what is looked at.
struct Looks {
    /// For a daemon of ours.
    patience: Duration,
    /// For whatever else the path leads through.
    slow: Duration,
    /// The path leads through a mount of ours, if to none.
    in_ours: bool,
}

impl Looks {
    /// Looks by `is_ours` whether the path is a mount of ours, and if so calls `take_away`. Both may be stuck, so another thread
    /// does it.
    fn heal(
        self,
        path: &Path,
        is_ours: impl FnOnce() -> bool + Send + 'static,
        take_away: impl FnOnce() -> diskfuse_fuse::Result<bool> + Send + 'static,
    ) -> Result<bool> {
        let (found, is_found) = channel();
        let (sender, outcome) = channel();
        let work = move || {
            let ours = is_ours();
            // Fails if nobody waits any more.
            let _ = found.send(ours);
            if ours {
                let _ = sender.send(take_away());
            }
        };
        std::thread::Builder::new()
            .name("heal".to_owned())
            .spawn(work)
            .map_err(Error::system("Could not start a thread"))?;
        let path = path.display();
        let stopped = || {
            Error::Refused(format!(
                "'{path}' does not answer: the daemon that shows it is stopped, or stuck"
            ))
        };
        match is_found.recv_timeout(self.slow) {
            Ok(false) => Ok(false),
            Ok(true) => match outcome.recv_timeout(self.patience) {
                Ok(outcome) => Ok(outcome?),
                Err(_) => Err(stopped()),
            },
            Err(_) if self.in_ours => Err(stopped()),
            Err(_) => Err(Error::Refused(format!(
                "'{path}' could not be looked at: the file system that it is on has not answered for {} seconds",
                self.slow.as_secs()
            ))),
        }
    }
}

/// An empty file or directory that we made. Dropping it removes it, so drop it when nothing is mounted on it any more.
#[derive(Debug)]
pub struct MadeFile {
    /// Its path is absolute: the working directory may change meanwhile.
    removal: Removal,
}

impl MadeFile {
    /// Makes `path` an empty file that only its owner may open, if there is nothing yet. `None` if there is something,
    /// whatever it is.
    pub fn make_if_missing(path: &Path) -> Result<Option<Self>> {
        Self::make(path, |path| {
            let mut new = OpenOptions::new();
            new.write(true).create_new(true).mode(0o600);
            new.open(path)?.metadata()
        })
    }

    /// The same for a directory.
    pub fn make_directory_if_missing(path: &Path) -> Result<Option<Self>> {
        Self::make(path, |path| {
            DirBuilder::new().mode(0o700).create(path)?;
            path.symlink_metadata()
        })
    }

    fn make(path: &Path, make: impl FnOnce(&Path) -> io::Result<Metadata>) -> Result<Option<Self>> {
        match path.symlink_metadata() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            _ => return Ok(None),
        }
        let failed = |source: io::Error| {
            let path = path.display();
            Error::refused(match source.kind() {
                io::ErrorKind::NotFound => format!(
                    "Could not make the mountpoint '{path}': its folder does not exist (make it first)"
                ),
                _ => format!(
                    "Could not make the mountpoint '{path}': {}",
                    Reason(&source)
                ),
            })
        };
        let absolute = diskfuse_fuse::absolute(path).map_err(failed)?;
        let stat = make(&absolute).map_err(failed)?;
        Ok(Some(Self {
            removal: Removal::new(Leftover::new(absolute, &stat, true)),
        }))
    }

    /// What removes it.
    pub fn removal(&mut self) -> &mut Removal {
        &mut self.removal
    }
}

impl Drop for MadeFile {
    fn drop(&mut self) {
        let path = self.removal.path().display();
        match self.removal.carry_out() {
            Ok(true) => {}
            Ok(false) => tracing::info!(%path, "the mountpoint has changed; it is left alone"),
            Err(error) => tracing::warn!(%path, %error, "cannot remove the mountpoint"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_mountpoint_is_made_and_removed_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m");
        let made = MadeFile::make_if_missing(&path).unwrap().unwrap();
        assert_eq!(path.metadata().unwrap().len(), 0);
        drop(made);
        assert!(!path.exists());
    }

    #[test]
    fn what_is_there_already_is_not_ours() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m");
        std::fs::write(&path, "").unwrap();
        assert!(MadeFile::make_if_missing(&path).unwrap().is_none());
        assert!(MadeFile::make_if_missing(folder.path()).unwrap().is_none());
        let dangling = folder.path().join("l");
        std::os::unix::fs::symlink("/no/such/file", &dangling).unwrap();
        assert!(MadeFile::make_if_missing(&dangling).unwrap().is_none());
    }

    #[test]
    fn a_file_that_somebody_filled_or_replaced_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m");
        let made = MadeFile::make_if_missing(&path).unwrap().unwrap();
        std::fs::write(&path, "x").unwrap();
        drop(made);
        assert_eq!(std::fs::read(&path).unwrap(), b"x");

        let path = folder.path().join("n");
        let made = MadeFile::make_if_missing(&path).unwrap().unwrap();
        std::fs::write(folder.path().join("other"), "").unwrap();
        std::fs::rename(folder.path().join("other"), &path).unwrap();
        drop(made);
        assert!(path.exists());
    }

    #[test]
    fn a_missing_folder_is_named_as_the_reason() {
        let error = MadeFile::make_if_missing(Path::new("/no/such/folder/m")).unwrap_err();
        assert!(
            error.to_string().contains("its folder does not exist"),
            "{error}"
        );
    }

    /// What becomes of a path that takes `finding` to be found, and whose daemon takes `answering`.
    fn looked(in_ours: bool, finding: Option<u64>, answering: Option<u64>) -> Result<bool> {
        let (short, long) = (Duration::from_millis(100), Duration::from_secs(10));
        let looks = Looks {
            patience: short,
            slow: if in_ours { short } else { long },
            in_ours,
        };
        let wait =
            move |time: Option<u64>| std::thread::sleep(time.map_or(long, Duration::from_millis));
        let ours = answering != Some(u64::MAX);
        looks.heal(
            Path::new("/m"),
            move || {
                wait(finding);
                ours
            },
            move || {
                wait(answering);
                Ok(true)
            },
        )
    }

    #[test]
    fn a_slow_file_system_is_waited_for_and_a_stopped_daemon_is_not() {
        const NONE: Option<u64> = Some(u64::MAX);
        // Longer than a daemon of ours may take.
        assert!(!looked(false, Some(500), NONE).unwrap());
        assert!(looked(false, Some(500), Some(0)).unwrap());
        for (in_ours, finding) in [(false, Some(0)), (true, None)] {
            let error = looked(in_ours, finding, None).unwrap_err().to_string();
            assert!(
                error.contains("the daemon that shows it is stopped"),
                "{error}"
            );
        }
        let looks = Looks {
            patience: PATIENCE,
            slow: Duration::from_millis(50),
            in_ours: false,
        };
        let stuck = || {
            std::thread::sleep(Duration::from_secs(10));
            false
        };
        let error = looks.heal(Path::new("/m"), stuck, || Ok(true)).unwrap_err();
        let error = error.to_string();
        assert!(error.contains("the file system that it is on"), "{error}");
    }
}
