//! Descriptors that clients hand over: by name (`getfd`), and in sets that `/dev/fdset/N` opens (`add-fd`).

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use diskfuse_block::Opener;
use diskfuse_monitor::QmpError;
use diskfuse_monitor::commands::{AddFd, AddfdInfo, FdsetFdInfo, FdsetInfo, RemoveFd};
use parking_lot::Mutex;
use rustix::fs::OFlags;
use rustix::io::Errno;

/// What paths of sets begin with.
const FOLDER: &str = "/dev/fdset/";

/// Sets of descriptors of the same file, opened in different ways. Clones are the same sets.
#[derive(Clone, Default)]
pub struct FdSets(Arc<Mutex<BTreeMap<i64, Set>>>);

#[derive(Default)]
struct Set {
    members: Vec<Member>,
    /// Shared with whoever has opened a file by the set, and may want to open it in another way later.
    in_use: Arc<()>,
}

struct Member {
    fd: OwnedFd,
    opaque: Option<String>,
}

impl FdSets {
    /// A descriptor of its own for whoever opens `/dev/fdset/N` for this access: a duplicate of the first one of the set
    /// that was opened for it. `ENOENT`: no such set; `EACCES`: none that fits.
    ///
    /// It shares its offset and its locks with the one in the set, as every duplicate does. The set is kept for as long as what is
    /// returned with it.
    fn open(&self, set: i64, access: OFlags) -> std::io::Result<(OwnedFd, Arc<()>)> {
        let sets = self.0.lock();
        let fits = |member: &&Member| {
            let flags = rustix::fs::fcntl_getfl(&member.fd);
            flags.is_ok_and(|flags| flags & OFlags::RWMODE == access & OFlags::RWMODE)
        };
        let set = sets.get(&set).ok_or(Errno::NOENT)?;
        let member = set.members.iter().find(fits).ok_or(Errno::ACCESS)?;
        let fd = rustix::io::fcntl_dupfd_cloexec(&member.fd, 0)?;
        Ok((fd, Arc::clone(&set.in_use)))
    }

    /// The number of the set that a path names, if it names one.
    fn number(path: &Path) -> Option<i64> {
        path.to_str()?.strip_prefix(FOLDER)?.parse().ok()
    }

    /// What opens the file of this name, if the name is that of a set.
    pub fn opener(&self, path: &Path) -> Option<Opener> {
        let set = Self::number(path)?;
        let sets = self.clone();
        let used = Mutex::new(None);
        Some(Opener::new(move |writable| {
            let access = match writable {
                true => OFlags::RDWR,
                false => OFlags::RDONLY,
            };
            let (fd, in_use) = sets.open(set, access)?;
            *used.lock() = Some(in_use);
            Ok(fd)
        }))
    }

    /// `add-fd`
    pub fn add(&self, fd: OwnedFd, arguments: AddFd) -> Result<AddfdInfo, QmpError> {
        let mut sets = self.0.lock();
        let set = match arguments.fdset_id {
            Some(set) if set < 0 => {
                let message = "Parameter 'fdset-id' expects a non-negative value";
                return Err(QmpError::generic(message));
            }
            Some(set) => set,
            None => {
                let taken = |set: &i64| sets.contains_key(set);
                // As many numbers as there are sets, and one more, cannot all be taken.
                let mut numbers = (0..).take(sets.len() + 1);
                numbers.find(|set| !taken(set)).unwrap_or_default()
            }
        };
        let number = i64::from(fd.as_raw_fd());
        let opaque = arguments.opaque;
        let members = &mut sets.entry(set).or_default().members;
        members.push(Member { fd, opaque });
        Ok(AddfdInfo {
            fdset_id: set,
            fd: number,
        })
    }

    /// `remove-fd`
    pub fn remove(&self, arguments: &RemoveFd) -> Result<(), QmpError> {
        let set = arguments.fdset_id;
        let missing = || {
            let which = arguments
                .fd
                .map_or(String::new(), |fd| format!(", fd:{fd}"));
            QmpError::generic(format!(
                "File descriptor named 'fdset-id:{set}{which}' not found"
            ))
        };
        let mut sets = self.0.lock();
        let members = &mut sets.get_mut(&set).ok_or_else(missing)?.members;
        if let Some(number) = arguments.fd {
            let is_it = |member: &Member| i64::from(member.fd.as_raw_fd()) == number;
            let place = members.iter().position(is_it).ok_or_else(missing)?;
            members.remove(place);
        } else {
            members.clear();
        }
        if members.is_empty() {
            sets.remove(&set);
        }
        Ok(())
    }

    /// `query-fdsets`
    pub fn list(&self) -> Vec<FdsetInfo> {
        let sets = self.0.lock();
        let info = |(id, set): (&i64, &Set)| FdsetInfo {
            fdset_id: *id,
            fds: set
                .members
                .iter()
                .map(|member| FdsetFdInfo {
                    fd: i64::from(member.fd.as_raw_fd()),
                    opaque: member.opaque.clone(),
                })
                .collect(),
        };
        sets.iter().map(info).collect()
    }

    /// Closes those by which nothing is open: no client is left who could use them.
    pub fn clear(&self) {
        let mut sets = self.0.lock();
        sets.retain(|_, set| Arc::strong_count(&set.in_use) > 1);
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::ErrorKind;

    use diskfuse_block::drivers::{FileConfig, open_file};

    use super::*;

    #[test]
    fn a_set_opens_with_the_access_that_fits() {
        let sets = FdSets::default();
        let fd = File::open("/dev/null").unwrap().into();
        let arguments = AddFd {
            fdset_id: None,
            opaque: Some("r".to_owned()),
        };
        let added = sets.add(fd, arguments).unwrap();
        let open = |set, access| sets.open(set, access).map_err(|error| error.kind());
        assert!(open(added.fdset_id, OFlags::RDONLY).is_ok());
        let (denied, missing) = (ErrorKind::PermissionDenied, ErrorKind::NotFound);
        assert_eq!(open(added.fdset_id, OFlags::RDWR).unwrap_err(), denied);
        assert_eq!(
            open(added.fdset_id + 1, OFlags::RDONLY).unwrap_err(),
            missing
        );
        assert_eq!(sets.list()[0].fds[0].opaque.as_deref(), Some("r"));
        let whole = RemoveFd {
            fdset_id: added.fdset_id,
            fd: None,
        };
        sets.remove(&whole).unwrap();
        assert_eq!(
            sets.remove(&whole).unwrap_err().desc,
            format!(
                "File descriptor named 'fdset-id:{}' not found",
                added.fdset_id
            )
        );
        // What a node was opened by stays, though its client has gone.
        let file = tempfile::NamedTempFile::new().unwrap();
        let fd = File::open(file.path()).unwrap().into();
        let arguments = AddFd {
            fdset_id: Some(3),
            opaque: None,
        };
        sets.add(fd, arguments).unwrap();
        let path = Path::new("/dev/fdset/3");
        let node = open_file(&FileConfig {
            filename: path.to_owned(),
            opener: sets.opener(path),
            read_only: true,
            ..FileConfig::default()
        });
        let node = node.unwrap();
        sets.clear();
        assert_eq!(sets.list().len(), 1);
        drop(node);
        sets.clear();
        assert!(sets.list().is_empty());
        assert_eq!(FdSets::number(Path::new("/dev/fdset/12")), Some(12));
        assert_eq!(FdSets::number(Path::new("/dev/sda")), None);
    }
}
