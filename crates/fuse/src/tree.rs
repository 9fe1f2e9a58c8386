//! A tree of directories, files over nodes, links and short texts: what an export of a directory shows. It changes while it
//! is in use ([`Tree::replace`]): files keep their inode number for as long as the export lives, and a file that somebody has
//! open is never put on another node. The hot path does not come here: each queue keeps what it has found.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use diskfuse_block::{Graph, LocalFuture, RangeQueue};
use parking_lot::Mutex;

use crate::abi::ROOT;
use crate::attributes::Ownership;
use crate::error::{Error, Result};
use crate::file::{File, Use};
use crate::shared::Shared;
use crate::watch::Watch;

/// Files that a tree may have in its life: each takes a few hundred bytes in every queue that serves it.
pub const MOST_FILES: u64 = 1 << 16;

/// The inode numbers of what is not a file begin here, so that those of files are small.
const OTHERS: u64 = 1 << 32;

/// What stands in a directory under one name.
#[derive(Debug)]
pub enum Entry {
    /// A directory with these entries. It stays for ever if it has files in it.
    Directory(Vec<(OsString, Entry)>),
    /// A file over a node.
    Node {
        /// The node's name in the graph.
        node: String,
        /// Whether it can be written; only in a writable export.
        writable: bool,
        /// What writes make the tree look different. It stays what it was when the file was first there.
        watch: Option<Watch>,
    },
    /// A symbolic link to this.
    Link(OsString),
    /// A file with this text, which can only be read.
    Text(Vec<u8>),
    /// What is there under that name already.
    Same,
}

/// Looks at the disk anew when the export thinks that the tree may have to look different.
pub trait Refresh: Send + Sync {
    /// Brings the tree up to date with [`Tree::replace`]. Runs on the ring of a queue; two never run at once for a tree. An
    /// error is for the log: the tree is as it was.
    fn refresh<'a>(&'a self, tree: &'a Tree) -> LocalFuture<'a, Result<()>>;
}

/// What an inode is.
#[derive(Clone)]
pub(crate) enum Inode {
    Directory,
    File(Arc<File>),
    Link(Arc<[u8]>),
    Text(Arc<[u8]>),
}

/// A directory: names and inode numbers, in the order in which they were given.
struct Directory {
    parent: u64,
    entries: Vec<(OsString, u64)>,
    /// Files that were here once, and whose inode numbers are theirs for ever.
    gone: BTreeMap<OsString, u64>,
}

#[derive(Default)]
struct Inodes {
    directories: BTreeMap<u64, Directory>,
    /// Files by their inode number, the first one at [`Inodes::FIRST`].
    files: Vec<Arc<File>>,
    links: BTreeMap<u64, Arc<[u8]>>,
    texts: BTreeMap<u64, Arc<[u8]>>,
    /// Inode numbers given out beyond [`OTHERS`].
    others: u64,
    export: Option<Weak<Shared>>,
}

/// See the module. May be used from any thread.
pub struct Tree {
    graph: Graph,
    /// The export's name, for messages.
    id: String,
    how: Use,
    inodes: Mutex<Inodes>,
    refresh: Option<Arc<dyn Refresh>>,
    turns: RangeQueue,
    /// It is not what it should be, because somebody had a file open.
    behind: AtomicBool,
}

impl Tree {
    /// A tree with these entries in its root. It uses the nodes from now on.
    pub(crate) fn new(
        graph: &Graph,
        id: &str,
        how: Use,
        root: Vec<(OsString, Entry)>,
        refresh: Option<Arc<dyn Refresh>>,
    ) -> Result<Arc<Self>> {
        let mut inodes = Inodes::default();
        inodes.directories.insert(ROOT, Directory::new(ROOT));
        let tree = Arc::new(Self {
            graph: graph.clone(),
            id: id.to_owned(),
            how,
            inodes: Mutex::new(inodes),
            refresh,
            turns: RangeQueue::default(),
            behind: AtomicBool::new(false),
        });
        tree.fill(&mut tree.inodes.lock(), ROOT, root)?;
        Ok(tree)
    }

    /// Whose it is.
    pub(crate) fn ownership(&self) -> Ownership {
        self.how.ownership
    }

    /// The entries of the root are these from now on. A file whose node is another one than before goes over to it unless
    /// somebody has it open; then it stays, also if it is not in the list, and the tree is refreshed again when it is closed.
    ///
    /// # Errors
    /// A node cannot be used as its entry says, or there are too many files. What came before it in the list has been
    /// changed then.
    pub fn replace(&self, root: Vec<(OsString, Entry)>) -> Result<()> {
        self.behind.store(false, Ordering::SeqCst);
        self.fill(&mut self.inodes.lock(), ROOT, root)
    }

    fn fill(&self, inodes: &mut Inodes, ino: u64, wanted: Vec<(OsString, Entry)>) -> Result<()> {
        let before = inodes.names_of(ino);
        let mut entries = Vec::with_capacity(wanted.len());
        for (name, entry) in wanted {
            let there = before.get(&name).copied();
            if let Some(found) = self.place(inodes, ino, &name, there, entry)? {
                entries.push((name, found));
            }
        }
        for (name, old) in before {
            if entries.iter().any(|(kept, _)| *kept == name) {
                continue;
            }
            if self.leaves(inodes, ino, &name, old)? {
                inodes.forget(old);
            } else {
                entries.push((name, old));
            }
        }
        if let Some(directory) = inodes.directories.get_mut(&ino) {
            directory.entries = entries;
        }
        Ok(())
    }

    /// Makes an entry; its inode number. `None` for one that is to stay and is not there.
    fn place(
        &self,
        inodes: &mut Inodes,
        parent: u64,
        name: &OsStr,
        there: Option<u64>,
        entry: Entry,
    ) -> Result<Option<u64>> {
        let new = match entry {
            Entry::Same => return Ok(there),
            Entry::Directory(entries) => {
                let old = there.filter(|ino| inodes.directories.contains_key(ino));
                let ino = old.unwrap_or_else(|| inodes.next_other());
                let directory = || Directory::new(parent);
                inodes.directories.entry(ino).or_insert_with(directory);
                self.fill(inodes, ino, entries)?;
                ino
            }
            Entry::Link(target) => {
                let ino = inodes.next_other();
                let target = target.into_encoded_bytes();
                inodes.links.insert(ino, target.into());
                ino
            }
            Entry::Text(text) => {
                let ino = inodes.next_other();
                inodes.texts.insert(ino, text.into());
                ino
            }
            Entry::Node {
                node,
                writable,
                watch,
            } => {
                let old = inodes.file_named(parent, name, there);
                self.place_file(inodes, old, name, &node, writable, watch)?
            }
        };
        if let Some(old) = there.filter(|old| *old != new) {
            inodes.forget(old);
        }
        Ok(Some(new))
    }

    fn place_file(
        &self,
        inodes: &mut Inodes,
        old: Option<Arc<File>>,
        name: &OsStr,
        node: &str,
        writable: bool,
        watch: Option<Watch>,
    ) -> Result<u64> {
        let user = format!("export '{}', file '{}'", self.id, name.display());
        let Some(file) = old else {
            let ino = Inodes::FIRST + inodes.files.len() as u64;
            if ino >= MOST_FILES {
                let message = format!("more than {MOST_FILES} files in a directory export");
                return Err(Error::Options(message));
            }
            let how = Use {
                writable: writable && self.how.writable,
                ..self.how
            };
            let file = File::attach(&self.graph, node, user, ino, how, watch)?;
            if let Some(export) = inodes.export.as_ref().and_then(Weak::upgrade) {
                file.belongs_to(&export);
            }
            inodes.files.push(file);
            return Ok(ino);
        };
        if file.right.node_name() != node
            && !self.unless_open(&file, || file.show(&self.graph, node, user.clone()))?
        {
            tracing::warn!(export = %self.id, file = %name.display(), "it is open, and stays what it was until it is closed");
        }
        Ok(file.ino)
    }

    /// Does something to a file that can be done while nobody has it open. If somebody has, the last who closes it finds the tree
    /// to be behind.
    fn unless_open(&self, file: &File, mut act: impl FnMut() -> Result<bool>) -> Result<bool> {
        while !act()? {
            self.behind.store(true, Ordering::SeqCst);
            // Who closed it before that has not seen it.
            if file.is_open() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Whether what stood under a name can go: not a file that somebody has open.
    fn leaves(&self, inodes: &mut Inodes, parent: u64, name: &OsStr, ino: u64) -> Result<bool> {
        let Some(file) = inodes.file(ino) else {
            return Ok(!inodes.has_files(ino));
        };
        if !self.unless_open(&file, || Ok(file.right.take_back_unless(|| file.is_open())))? {
            tracing::warn!(export = %self.id, file = %name.display(), "it is gone from the disk, and stays until it is closed");
            return Ok(false);
        }
        if let Some(directory) = inodes.directories.get_mut(&parent) {
            directory.gone.insert(name.to_owned(), ino);
        }
        Ok(true)
    }

    /// Looks at the disk anew, alone.
    pub(crate) async fn refresh(&self) {
        let Some(refresh) = &self.refresh else {
            return;
        };
        let _turn = self.turns.turn(0, 1).await;
        if let Err(error) = refresh.refresh(self).await {
            tracing::warn!(export = %self.id, %error, "the directory stays as it was");
            // Whoever closes a file gives it another try.
            self.behind.store(true, Ordering::SeqCst);
        }
    }

    /// Whether it is behind, because a file was open or looking anew failed; once.
    pub(crate) fn take_behind(&self) -> bool {
        self.behind.load(Ordering::SeqCst) && self.behind.swap(false, Ordering::SeqCst)
    }

    pub(crate) fn belongs_to(&self, export: &Arc<Shared>) {
        let mut inodes = self.inodes.lock();
        inodes.export = Some(Arc::downgrade(export));
        for file in &inodes.files {
            file.belongs_to(export);
        }
    }

    /// All files there ever were, in the order of their inode numbers.
    pub(crate) fn files(&self) -> Vec<Arc<File>> {
        self.inodes.lock().files.clone()
    }

    /// The file of this inode number.
    pub(crate) fn file(&self, ino: u64) -> Option<Arc<File>> {
        self.inodes.lock().file(ino)
    }

    /// What an inode number stands for.
    pub(crate) fn inode(&self, ino: u64) -> Option<Inode> {
        self.inodes.lock().inode(ino)
    }

    /// What is called `name` in directory `ino`; the error is an errno.
    pub(crate) fn lookup(&self, ino: u64, name: &[u8]) -> std::result::Result<(u64, Inode), i32> {
        let inodes = self.inodes.lock();
        let directory = inodes.directories.get(&ino).ok_or(libc::ENOTDIR)?;
        let mut entries = directory.entries.iter();
        let found = entries.find(|(entry, _)| entry.as_encoded_bytes() == name);
        let (_, found) = found.ok_or(libc::ENOENT)?;
        let inode = inodes.inode(*found).ok_or(libc::ENOENT)?;
        Ok((*found, inode))
    }

    /// Shows the entries of directory `ino` to `take`, from number `from` on, with their inode numbers and what they are,
    /// until it answers false. The first two are `.` and `..`.
    pub(crate) fn list(
        &self,
        ino: u64,
        from: usize,
        mut take: impl FnMut(usize, &[u8], u64, &Inode) -> bool,
    ) -> std::result::Result<(), i32> {
        let inodes = self.inodes.lock();
        let directory = inodes.directories.get(&ino).ok_or(libc::ENOTDIR)?;
        let dots = [(&b"."[..], ino), (&b".."[..], directory.parent)];
        let entries = directory.entries.iter();
        let entries = entries.map(|(name, ino)| (name.as_encoded_bytes(), *ino));
        for (number, (name, ino)) in dots.into_iter().chain(entries).enumerate().skip(from) {
            if let Some(inode) = inodes.inode(ino)
                && !take(number, name, ino, &inode)
            {
                break;
            }
        }
        Ok(())
    }
}

impl Directory {
    fn new(parent: u64) -> Self {
        Self {
            parent,
            entries: Vec::new(),
            gone: BTreeMap::new(),
        }
    }
}

impl Inodes {
    /// The inode number of the first file; the root has the one before.
    const FIRST: u64 = ROOT + 1;

    fn next_other(&mut self) -> u64 {
        self.others += 1;
        OTHERS + self.others
    }

    fn names_of(&self, ino: u64) -> BTreeMap<OsString, u64> {
        let directory = self.directories.get(&ino);
        directory.map_or_else(BTreeMap::new, |d| d.entries.iter().cloned().collect())
    }

    fn file(&self, ino: u64) -> Option<Arc<File>> {
        let index = usize::try_from(ino.checked_sub(Self::FIRST)?).ok()?;
        self.files.get(index).cloned()
    }

    /// The file that is called `name` in a directory, with the number `there`, or that was once.
    fn file_named(&self, parent: u64, name: &OsStr, there: Option<u64>) -> Option<Arc<File>> {
        let gone = || self.directories.get(&parent)?.gone.get(name).copied();
        self.file(there.or_else(gone)?)
    }

    fn inode(&self, ino: u64) -> Option<Inode> {
        if let Some(file) = self.file(ino) {
            return Some(Inode::File(file));
        }
        if self.directories.contains_key(&ino) {
            return Some(Inode::Directory);
        }
        let link = self.links.get(&ino).cloned().map(Inode::Link);
        link.or_else(|| self.texts.get(&ino).cloned().map(Inode::Text))
    }

    /// Whether there is a file in a directory or below it.
    fn has_files(&self, ino: u64) -> bool {
        let Some(directory) = self.directories.get(&ino) else {
            return false;
        };
        let mut inside = directory.entries.iter().map(|(_, ino)| *ino);
        inside.any(|ino| self.file(ino).is_some() || self.has_files(ino))
    }

    /// Drops what is not a file, with everything in it.
    fn forget(&mut self, ino: u64) {
        self.links.remove(&ino);
        self.texts.remove(&ino);
        if let Some(directory) = self.directories.remove(&ino) {
            for (_, inside) in directory.entries {
                self.forget(inside);
            }
        }
    }
}
