//! What the base of an overlay was, noted with the overlay in the extended attribute `user.diskfuse.base`: a header extension of
//! ours would have to survive every other program that writes the overlay, and a file beside it gets lost. It must never say
//! that a base is what it was when that is not known.
//!
//! * `SIZE SECONDS.NANOSECONDS`: the base's size and time of change.
//! * `commit`: `diskfuse commit` is writing the base, or was broken off while it did. Until it has ended the overlay hides all that it
//!   has written, so the two show what they showed before.
//! * `block-commit`: a storage daemon was told to write the base. It may have ended well, and then the base has been used since, or not;
//!   nobody says which, as a daemon can be killed at any moment.
//!
//! An overlay without the attribute (made by another program, or copied without it) fits if its base has not been changed since the
//! overlay was.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::XattrFlags;
use rustix::io::Errno;

use crate::error::{Error, Result};

/// The attribute.
pub const NAME: &str = "user.diskfuse.base";

const COMMIT: &str = "commit";
const BLOCK_COMMIT: &str = "block-commit";

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Note {
    /// What the base was.
    Base(String),
    /// `diskfuse commit` has begun.
    Commit,
    /// `block-commit` has begun.
    BlockCommit,
}

impl Note {
    fn of(base: &Path) -> std::io::Result<Self> {
        let stat = base.metadata()?;
        if !stat.is_file() {
            // The time of a device's node says nothing of what was written to the device.
            return Err(std::io::ErrorKind::Unsupported.into());
        }
        let (seconds, nanoseconds) = (stat.mtime(), stat.mtime_nsec());
        let text = format!("{} {seconds}.{nanoseconds:09}", stat.len());
        Ok(Self::Base(text))
    }

    fn parse(text: &str) -> Self {
        match text {
            COMMIT => Self::Commit,
            BLOCK_COMMIT => Self::BlockCommit,
            state => Self::Base(state.to_owned()),
        }
    }

    fn text(&self) -> &str {
        match self {
            Self::Base(state) => state,
            Self::Commit => COMMIT,
            Self::BlockCommit => BLOCK_COMMIT,
        }
    }

    fn write(&self, path: &Path) -> std::io::Result<()> {
        let flags = XattrFlags::empty();
        Ok(rustix::fs::setxattr(
            path,
            NAME,
            self.text().as_bytes(),
            flags,
        )?)
    }
}

/// What is noted with the overlay at `path`; `None` if nothing is.
pub fn read(path: &Path) -> Result<Option<Note>> {
    let mut bytes = [0; 128];
    let len = match rustix::fs::getxattr(path, NAME, &mut bytes) {
        Ok(len) => len,
        Err(Errno::NODATA | Errno::OPNOTSUPP) => return Ok(None),
        // Nothing that we wrote is as long.
        Err(Errno::RANGE) => 0,
        Err(error) => {
            let what = format!("Could not read {NAME} of '{}'", path.display());
            return Err(Error::system(what)(error));
        }
    };
    let text = String::from_utf8_lossy(bytes.get(..len).unwrap_or_default());
    Ok(Some(Note::parse(&text)))
}

/// Notes what the base is now. A host file system without extended attributes is all right.
pub fn renew(path: &Path, base: &Path) {
    let noted = Note::of(base).and_then(|note| note.write(path));
    if let Err(error) = noted {
        tracing::debug!(path = %path.display(), %error, "cannot note what the base is");
    }
}

/// There is no base any more, or nothing is known of it but by the times.
pub fn forget(path: &Path) {
    // There may have been no note.
    let _ = rustix::fs::removexattr(path, NAME);
}

/// Whether the base is known to be what it was, by what is `said`.
///
/// # Errors
/// One of the files cannot be looked at.
pub fn fits(path: &Path, base: &Path, said: Option<&Note>) -> Result<bool> {
    let failed = |path: &Path| format!("Could not look at '{}'", path.display());
    let now = Note::of(base).map_err(Error::system(failed(base)))?;
    match said {
        Some(said) => Ok(*said == now),
        None => {
            let changed = |path: &Path| {
                let time = path.metadata().and_then(|stat| stat.modified());
                time.map_err(Error::system(failed(path)))
            };
            Ok(changed(base)? <= changed(path)?)
        }
    }
}

/// `diskfuse commit` while it writes the base: noted before it does, so that whoever kills it leaves an overlay of which it is
/// known that nothing is wrong.
#[must_use = "the note is to be put right when it is over"]
pub struct Committing {
    overlay: PathBuf,
    base: PathBuf,
    before: Option<Note>,
    /// The two belonged together, but for what a commit may have written.
    fitted: bool,
}

impl Committing {
    /// To be called with the overlay open and locked, so that no other commit is under way, and nothing written to the base
    /// yet.
    ///
    /// # Errors
    /// The note cannot be read.
    pub fn begin(overlay: &Path, base: &Path) -> Result<Self> {
        let before = read(overlay)?;
        // A base that is no file is opened later, and gives its own error.
        let fitted = before == Some(Note::Commit)
            || fits(overlay, base, before.as_ref()).unwrap_or_default();
        if fitted && let Err(error) = Note::Commit.write(overlay) {
            tracing::debug!(path = %overlay.display(), %error, "cannot note that a commit begins");
        }
        Ok(Self {
            overlay: overlay.to_owned(),
            base: base.to_owned(),
            before,
            fitted,
        })
    }

    /// To be called when both images are closed. After a commit that failed the overlay goes on as before, if it could before: it
    /// hides what was written below it.
    pub fn over(self, succeeded: bool) {
        let path = &self.overlay;
        match self.before {
            _ if !self.fitted && !succeeded => {}
            Some(_) => renew(path, &self.base),
            // There the times tell.
            None => {
                forget(path);
                let now = SystemTime::now();
                let touched = File::open(path).and_then(|file| file.set_modified(now));
                if let Err(error) = touched {
                    tracing::debug!(path = %path.display(), %error, "cannot note that the base is older");
                }
            }
        }
    }
}

/// Notes that a storage daemon is about to commit the overlay at `path` into what it stands on; returns what undoes that, if nothing
/// comes of it.
pub fn block_commit(path: &Path) -> impl FnOnce() + use<> {
    let before = read(path).ok().flatten();
    let noted = Note::BlockCommit.write(path);
    if let Err(error) = &noted {
        tracing::debug!(path = %path.display(), %error, "cannot note that a commit begins");
    }
    let path = path.to_owned();
    move || {
        let undone = match (noted, before) {
            (Err(_), _) => Ok(()),
            (Ok(()), Some(before)) => before.write(&path),
            (Ok(()), None) => rustix::fs::removexattr(&path, NAME).map_err(Into::into),
        };
        if let Err(error) = undone {
            tracing::warn!(path = %path.display(), %error, "it stays noted that a commit has begun");
        }
    }
}
