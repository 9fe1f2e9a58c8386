//! Requests about a tree: LOOKUP, READDIR, READLINK, and everything that is asked of directories, links and texts. Not the
//! hot path: it takes the tree's lock.

use std::sync::Arc;
use std::sync::OnceLock;
use std::time::{SystemTime, UNIX_EPOCH};

use zerocopy::IntoBytes;

use super::Answer;
use super::attr::ATTRIBUTES_VALID;
use crate::abi::{Attr, AttrOut, Dirent, EntryOut, OpenOut};
use crate::file::Local;
use crate::queue::Queue;
use crate::request::{Name, Operation};
use crate::slot::SlotBuf;
use crate::tree::{Inode, Tree};

/// The longest name, in bytes.
const LONGEST_NAME: usize = 255;

/// Does what was asked of inode number `ino`, which is not a file.
pub(super) async fn perform(
    tree: &Tree,
    ino: u64,
    slot: &mut SlotBuf,
    operation: Operation,
) -> Answer {
    match operation {
        Operation::Lookup { name } => lookup(tree, ino, slot, name),
        Operation::Getattr => getattr(tree, ino, slot),
        Operation::Opendir => match tree.inode(ino).ok_or(libc::ESTALE)? {
            Inode::Directory => Ok(slot.put_struct(&OpenOut::default())),
            _ => Err(libc::ENOTDIR),
        },
        Operation::Readdir { offset, size } => list(tree, ino, slot, offset, size),
        Operation::Fsyncdir => {
            tree.refresh().await;
            Ok(0)
        }
        Operation::Readlink => match tree.inode(ino).ok_or(libc::ESTALE)? {
            Inode::Link(target) if slot.put_bytes(0, &target) => Ok(target.len()),
            Inode::Link(_) => Err(libc::ENAMETOOLONG),
            _ => Err(libc::EINVAL),
        },
        Operation::Open { flags } => open_text(tree, ino, slot, flags),
        Operation::Read { offset, size } => read_text(tree, ino, slot, offset, size),
        Operation::Flush | Operation::Fsync | Operation::Release | Operation::Releasedir => Ok(0),
        Operation::Setattr(_) | Operation::Rename => Err(libc::EPERM),
        Operation::Write { .. } | Operation::Fallocate { .. } => Err(libc::EROFS),
        // The kernel does it by itself for what has no holes.
        _ => Err(libc::ENOSYS),
    }
}

/// A file was closed by one of those who had it open. If that was what the tree waited for, it catches up.
pub(super) async fn release(queue: &Queue, file: &Local) {
    let last = file.file.released();
    if let Some(tree) = queue.shared.content.tree()
        && last
        && tree.take_behind()
    {
        tree.refresh().await;
    }
}

fn lookup(tree: &Tree, ino: u64, slot: &mut SlotBuf, name: Name) -> Answer {
    let name = slot.name(name);
    if name.len() > LONGEST_NAME {
        return Err(libc::ENAMETOOLONG);
    }
    let (found, inode) = tree.lookup(ino, name)?;
    Ok(slot.put_struct(&EntryOut {
        nodeid: found,
        // Looked up each time, so that a name that is gone is gone at once.
        entry_valid: 0,
        attr_valid: ATTRIBUTES_VALID,
        attr: attr_of(tree, found, &inode),
        ..EntryOut::default()
    }))
}

fn getattr(tree: &Tree, ino: u64, slot: &mut SlotBuf) -> Answer {
    let inode = tree.inode(ino).ok_or(libc::ESTALE)?;
    Ok(slot.put_struct(&AttrOut {
        attr_valid: ATTRIBUTES_VALID,
        attr: attr_of(tree, ino, &inode),
        ..AttrOut::default()
    }))
}

/// Seconds since the epoch, when somebody first asked.
fn begun() -> u64 {
    static BEGUN: OnceLock<u64> = OnceLock::new();
    *BEGUN.get_or_init(|| {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        since.unwrap_or_default().as_secs()
    })
}

fn attr_of(tree: &Tree, ino: u64, inode: &Inode) -> Attr {
    let (mode, size, nlink) = match inode {
        Inode::File(file) => {
            let node = file.node.get().1;
            let size = node.size();
            return file.attributes.attr(size, node.allocated());
        }
        Inode::Directory => (libc::S_IFDIR | tree.ownership().folder_mode(), 0, 2),
        Inode::Link(target) => (libc::S_IFLNK | 0o777, target.len() as u64, 1),
        Inode::Text(text) => (
            libc::S_IFREG | tree.ownership().folder_mode() & 0o444,
            text.len() as u64,
            1,
        ),
    };
    let begun = begun();
    Attr {
        ino,
        size,
        blocks: size.div_ceil(512),
        atime: begun,
        mtime: begun,
        ctime: begun,
        mode,
        nlink,
        uid: tree.ownership().uid(),
        gid: tree.ownership().gid(),
        blksize: 4096,
        ..Attr::default()
    }
}

/// READDIR. Where to go on is the number of the entry; when the directory has changed since, an entry may be seen twice, or
/// not at all.
fn list(tree: &Tree, ino: u64, slot: &mut SlotBuf, offset: u64, size: u32) -> Answer {
    let room = (size as usize).min(slot.size());
    let from = usize::try_from(offset).map_err(|_| libc::EINVAL)?;
    let mut len = 0;
    tree.list(ino, from, |number, name, ino, inode| {
        let entry = Dirent {
            ino,
            off: number as u64 + 1,
            namelen: name.len() as u32,
            kind: kind_of(inode) >> 12,
        };
        let end = (len + size_of::<Dirent>() + name.len()).next_multiple_of(8);
        if end > room {
            return false;
        }
        let mut bytes = Vec::with_capacity(end - len);
        bytes.extend_from_slice(entry.as_bytes());
        bytes.extend_from_slice(name);
        bytes.resize(end - len, 0);
        let put = slot.put_bytes(len, &bytes);
        len = end;
        put
    })?;
    Ok(len)
}

fn kind_of(inode: &Inode) -> u32 {
    match inode {
        Inode::Directory => libc::S_IFDIR,
        Inode::Link(_) => libc::S_IFLNK,
        Inode::File(_) | Inode::Text(_) => libc::S_IFREG,
    }
}

fn text_of(tree: &Tree, ino: u64) -> Result<Arc<[u8]>, i32> {
    match tree.inode(ino).ok_or(libc::ESTALE)? {
        Inode::Text(text) => Ok(text),
        Inode::Directory => Err(libc::EISDIR),
        _ => Err(libc::EINVAL),
    }
}

fn open_text(tree: &Tree, ino: u64, slot: &mut SlotBuf, flags: u32) -> Answer {
    text_of(tree, ino)?;
    if flags & libc::O_ACCMODE as u32 != libc::O_RDONLY as u32 {
        return Err(libc::EACCES);
    }
    Ok(slot.put_struct(&OpenOut::default()))
}

fn read_text(tree: &Tree, ino: u64, slot: &mut SlotBuf, offset: u64, size: u32) -> Answer {
    let text = text_of(tree, ino)?;
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    let rest = text.get(start..).unwrap_or_default();
    let part = rest.get(..size as usize).unwrap_or(rest);
    match slot.put_bytes(0, part) {
        true => Ok(part.len()),
        false => Err(libc::EINVAL),
    }
}
