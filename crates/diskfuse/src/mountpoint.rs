//! Mountpoints: taking away what a killed daemon left mounted on one, and making one that is missing (a file, or a directory),
//! which is gone again when we are. It must never remove a file that it did not make, or that somebody has put something into, nor
//! wait for a daemon that does not answer.

use std::fs::{DirBuilder, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::sync::mpsc::channel;
use std::time::Duration;

use diskfuse_ring::Reason;

use crate::error::{Error, Result};
use crate::sandbox::{Leftover, Removal};

/// How long a file may take to say whether somebody still shows it.
const PATIENCE: Duration = Duration::from_secs(2);

/// Takes a dead mount of ours away from `path`; true if there was one. Nothing else is ever touched.
///
/// # Errors
/// The mount cannot be taken away, or its daemon is there and does not answer.
pub fn heal(path: &Path) -> Result<bool> {
    let (sender, outcome) = channel();
    let mount = path.to_owned();
    // A look at a file whose daemon is stopped takes until that goes on; so another thread looks.
    std::thread::Builder::new()
        .name("heal".to_owned())
        .spawn(move || sender.send(diskfuse_fuse::heal(&mount)))
        .map_err(Error::system("Could not start a thread"))?;
    match outcome.recv_timeout(PATIENCE) {
        Ok(outcome) => Ok(outcome?),
        Err(_) => Err(Error::Refused(format!(
            "'{}' does not answer: the daemon that shows it is stopped, or stuck",
            path.display()
        ))),
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
}
