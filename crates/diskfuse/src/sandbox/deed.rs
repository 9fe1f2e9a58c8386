//! What a helper does at the end for a process that has given up the right to: each deed is told to it while that process can
//! still be trusted, and afterwards it is only told *when*. It must never do anything else, whatever it is sent.

use std::fs::Metadata;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use diskfuse_fuse::{Manner, Unmounter};
use serde::{Deserialize, Serialize};

use crate::control::protocol::WirePath;

/// The longest line in either direction, in bytes: a path, with each byte as a number.
pub const LONGEST: u64 = 64 << 10;

/// How long the helper may take to understand a deed.
const PATIENCE: Duration = Duration::from_secs(5);

/// What is to be done, as it is told at the beginning.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Deed {
    /// Take the mount away.
    Unmount {
        /// Where, absolute.
        path: WirePath,
        /// Which.
        id: u64,
    },
    /// Remove what we have left.
    Remove(Leftover),
}

/// When it is to be done, and how.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum When {
    UnlessBusy,
    Lazily,
    Forcibly,
    Now,
}

/// How it went.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Outcome {
    removed: bool,
    errno: Option<i32>,
    /// In words, if it failed.
    message: Option<String>,
}

impl Outcome {
    fn of(outcome: io::Result<bool>) -> Self {
        match outcome {
            Ok(removed) => Self {
                removed,
                ..Self::default()
            },
            Err(error) => Self {
                removed: false,
                errno: error.raw_os_error(),
                message: Some(error.to_string()),
            },
        }
    }

    fn into_result(self) -> io::Result<bool> {
        match (self.errno, self.message) {
            (Some(errno), _) => Err(io::Error::from_raw_os_error(errno)),
            (None, Some(message)) => Err(io::Error::other(message)),
            (None, None) => Ok(self.removed),
        }
    }
}

/// Something that we made and that is to be gone after us.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Leftover {
    path: WirePath,
    device: u64,
    inode: u64,
    /// A file is ours only as long as nobody has put something into it.
    only_if_empty: bool,
}

impl Leftover {
    /// What `stat` describes, at `path`, which is absolute.
    pub fn new(path: PathBuf, stat: &Metadata, only_if_empty: bool) -> Self {
        Self {
            path: WirePath(path),
            device: stat.dev(),
            inode: stat.ino(),
            only_if_empty,
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path.0
    }

    /// Removes it; false if somebody has put something into it, or something else in its place, or taken it away. A directory
    /// that is not empty cannot be removed.
    fn remove(&self) -> io::Result<bool> {
        let path = self.path();
        let Ok(now) = path.symlink_metadata() else {
            return Ok(false);
        };
        let is_empty = !self.only_if_empty || now.is_dir() || (now.is_file() && now.len() == 0);
        if !is_empty || now.dev() != self.device || now.ino() != self.inode {
            return Ok(false);
        }
        match now.is_dir() {
            true => std::fs::remove_dir(path),
            false => std::fs::remove_file(path),
        }?;
        Ok(true)
    }
}

/// One deed that the helper knows of. Dropping it is that it will not be wanted.
#[derive(Debug)]
pub struct Order(UnixStream);

impl Order {
    /// For a connection whose other end the helper has been sent, together with the deed. Waits until it has understood.
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_read_timeout(Some(PATIENCE))?;
        let understood: Option<Outcome> = read_line(&mut BufReader::new(&stream))?;
        understood.ok_or(io::Error::from(io::ErrorKind::BrokenPipe))?;
        // The deed itself may take as long as the disk takes.
        stream.set_read_timeout(None)?;
        Ok(Self(stream))
    }

    /// Has it done, and waits for that.
    fn give(mut stream: &UnixStream, when: When) -> io::Result<bool> {
        let asked = write_line(&mut stream, &when);
        let answer = asked.and_then(|()| read_line::<Outcome>(&mut BufReader::new(stream)));
        match answer {
            Ok(Some(outcome)) => outcome.into_result(),
            Ok(None) | Err(_) => Err(io::Error::other("the helper process for the end is gone")),
        }
    }
}

impl Unmounter for Order {
    fn unmount(&self, manner: Manner) -> io::Result<()> {
        let when = match manner {
            Manner::UnlessBusy => When::UnlessBusy,
            Manner::Lazily => When::Lazily,
            Manner::Forcibly => When::Forcibly,
        };
        Self::give(&self.0, when).map(drop)
    }
}

/// A leftover, and who removes it.
#[derive(Debug)]
pub struct Removal {
    leftover: Leftover,
    by: Option<Order>,
}

impl Removal {
    /// By this process.
    pub fn new(leftover: Leftover) -> Self {
        Self { leftover, by: None }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.leftover.path()
    }

    /// From now on by a helper, who is told of it by `tell`.
    pub fn delegate<E>(
        &mut self,
        tell: impl FnOnce(&Leftover) -> Result<Order, E>,
    ) -> Result<(), E> {
        self.by = Some(tell(&self.leftover)?);
        Ok(())
    }

    /// Removes it; false if it is not what we made any more, and was left alone.
    pub fn carry_out(&self) -> io::Result<bool> {
        match &self.by {
            Some(order) => Order::give(&order.0, When::Now),
            None => self.leftover.remove(),
        }
    }
}

/// The helper's end: says that it has understood, and does the deed each time that it is told to, until nobody can tell it any more.
pub fn serve(deed: &Deed, stream: &UnixStream) -> io::Result<()> {
    write_line(&mut { stream }, &Outcome::default())?;
    let mut reader = BufReader::new(stream);
    while let Some(when) = read_line(&mut reader)? {
        let outcome = match (deed, when) {
            (Deed::Remove(leftover), When::Now) => leftover.remove(),
            (Deed::Unmount { path, id }, When::UnlessBusy) => {
                unmount(path, *id, Manner::UnlessBusy)
            }
            (Deed::Unmount { path, id }, When::Lazily) => unmount(path, *id, Manner::Lazily),
            (Deed::Unmount { path, id }, When::Forcibly) => unmount(path, *id, Manner::Forcibly),
            (Deed::Remove(_), _) | (Deed::Unmount { .. }, When::Now) => {
                Err(io::ErrorKind::InvalidInput.into())
            }
        };
        write_line(&mut { stream }, &Outcome::of(outcome))?;
    }
    Ok(())
}

fn unmount(path: &WirePath, id: u64, manner: Manner) -> io::Result<bool> {
    diskfuse_fuse::unmount(&path.0, id, manner).map(|()| true)
}

fn write_line(to: &mut impl Write, value: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    to.write_all(&line)
}

/// `None` at the end.
fn read_line<T: for<'de> Deserialize<'de>>(from: &mut impl BufRead) -> io::Result<Option<T>> {
    let mut line = String::new();
    match io::Read::take(from, LONGEST).read_line(&mut line)? {
        0 => Ok(None),
        _ => Ok(Some(serde_json::from_str(&line)?)),
    }
}
