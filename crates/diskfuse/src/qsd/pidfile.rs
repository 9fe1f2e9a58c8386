//! The file that holds the process id while the daemon runs: locked, so that two daemons never share one, and removed
//! at the end. It must never touch the file of a daemon that runs.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;

use diskfuse_ring::Reason;

use crate::error::{Error, Result};

/// The file; dropping it removes it.
pub struct PidFile {
    /// Absolute: the working directory may change meanwhile.
    path: PathBuf,
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
                .mode(0o644)
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
            let pidfile = Self {
                path: absolute.clone(),
                file,
            };
            // Its last owner may have removed it between our opening and our locking it.
            if !pidfile.is_ours() {
                continue;
            }
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

    /// Whether the path still leads to the file that we locked.
    fn is_ours(&self) -> bool {
        match (self.file.metadata(), self.path.metadata()) {
            (Ok(ours), Ok(there)) => ours.dev() == there.dev() && ours.ino() == there.ino(),
            _ => false,
        }
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        if self.is_ours()
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove the pid file");
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
