//! The file that holds the process id while the daemon runs: locked, so that two daemons never share one, and removed
//! at the end. It must never touch the file of a daemon that runs.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::FlockOperation;

use diskfuse_ring::Reason;

use crate::error::{Error, Result};
use crate::sandbox::{Leftover, Removal};

/// The file; dropping it removes it.
pub struct PidFile {
    /// Its path is absolute: the working directory may change meanwhile.
    removal: Removal,
    /// Open for as long as the lock is to be held.
    file: File,
}

impl PidFile {
    /// Writes this process's id, with a newline, to `path`. The lock is a POSIX record lock on the whole file, as
    /// QEMU's is, so that the two respect each other.
    pub fn write(path: &Path) -> Result<Self> {
        let failed = |what: String| Error::Refused(format!("cannot create PID file: {what}"));
        let shown = path.display();
        let absolute = std::path::absolute(path)
            .map_err(|error| failed(format!("Could not create '{shown}': {}", Reason(&error))))?;
        loop {
            let file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(&absolute);
            let file = file.map_err(|error| {
                failed(format!("Could not create '{shown}': {}", Reason(&error)))
            })?;
            if let Err(errno) =
                rustix::fs::fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive)
            {
                let hint = match errno {
                    rustix::io::Errno::AGAIN | rustix::io::Errno::ACCESS => {
                        format!(" ('{shown}' belongs to a daemon that runs)")
                    }
                    _ => String::new(),
                };
                let reason = io::Error::from(errno);
                return Err(failed(format!(
                    "Cannot lock pid file: {}{hint}",
                    Reason(&reason)
                )));
            }
            // Its last owner may have removed it between our opening and our locking it.
            let Some(stat) = stat_if_at(&file, &absolute) else {
                continue;
            };
            let pidfile = Self {
                removal: Removal::new(Leftover::new(absolute.clone(), &stat, false)),
                file,
            };
            return match pidfile.fill() {
                Ok(()) => Ok(pidfile),
                Err(error) => Err(failed(format!(
                    "Could not write '{shown}': {}",
                    Reason(&error)
                ))),
            };
        }
    }

    fn fill(&self) -> io::Result<()> {
        self.file.set_len(0)?;
        (&self.file).write_all(format!("{}\n", std::process::id()).as_bytes())
    }

    /// What removes it.
    pub fn removal(&mut self) -> &mut Removal {
        &mut self.removal
    }
}

/// What kind of file it is, if `path` still leads to it.
fn stat_if_at(file: &File, path: &Path) -> Option<Metadata> {
    let (ours, there) = (file.metadata().ok()?, path.metadata().ok()?);
    (ours.dev() == there.dev() && ours.ino() == there.ino()).then_some(ours)
}

impl Drop for PidFile {
    fn drop(&mut self) {
        if let Err(error) = self.removal.carry_out() {
            let path = self.removal.path().display();
            tracing::warn!(%path, %error, "cannot remove the pid file");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_holds_the_process_id_while_it_lives() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pid");
        std::fs::write(&path, "a longer text of a daemon that is dead").unwrap();
        let pidfile = PidFile::write(&path).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text, format!("{}\n", std::process::id()));
        drop(pidfile);
        assert!(!path.exists());
    }

    #[test]
    fn a_file_that_took_its_place_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pid");
        let pidfile = PidFile::write(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "other").unwrap();
        drop(pidfile);
        assert!(path.exists());
    }

    #[test]
    fn a_missing_folder_is_an_error_in_known_words() {
        let error = PidFile::write(Path::new("/no/such/pid"))
            .err()
            .unwrap()
            .to_string();
        let expected =
            "cannot create PID file: Could not create '/no/such/pid': No such file or directory";
        assert_eq!(error, expected);
    }
}
