//! The kernel's side of the wire, as plain structs. Only layouts and numbers live here, no meaning.
//!
//! Source: `include/uapi/linux/fuse.h` of Linux, protocol 7.31 to 7.45. All fields are in the machine's byte order.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The protocol that this crate speaks.
pub const MAJOR: u32 = 7;
/// The newest minor version whose changes were looked at.
pub const MINOR: u32 = 45;
/// The oldest minor version that has everything used here (7.31, Linux 5.4).
pub const OLDEST_MINOR: u32 = 31;

/// The node id of the mount's root.
pub const ROOT: u64 = 1;

macro_rules! wire {
    ($(#[$doc:meta])* $name:ident { $($(#[$fdoc:meta])* $field:ident : $type:ty,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
        #[repr(C)]
        #[allow(missing_docs)]
        pub struct $name { $($(#[$fdoc])* pub $field: $type,)* }
    };
}

wire!(/// `struct fuse_in_header`
InHeader {
    /// Bytes of the whole request.
    len: u32,
    opcode: u32,
    unique: u64,
    nodeid: u64,
    uid: u32,
    gid: u32,
    pid: u32,
    total_extlen: u16,
    padding: u16,
});

wire!(/// `struct fuse_out_header`
OutHeader {
    /// Bytes of the whole reply.
    len: u32,
    /// 0 or a negative errno.
    error: i32,
    unique: u64,
});

/// In `error` of a header without `unique`: the kernel is told to forget an inode's attributes
/// (`FUSE_NOTIFY_INVAL_INODE`).
pub const NOTIFY_INVAL_INODE: i32 = 2;

wire!(/// `struct fuse_notify_inval_inode_out`
NotifyInvalInodeOut {
    ino: u64,
    /// Where cached data is to be forgotten; negative: nowhere.
    off: i64,
    len: i64,
});

wire!(/// `struct fuse_init_in`
InitIn {
    major: u32,
    minor: u32,
    max_readahead: u32,
    flags: u32,
    flags2: u32,
    unused: [u32; 11],
});

wire!(/// `struct fuse_init_out`
InitOut {
    major: u32,
    minor: u32,
    max_readahead: u32,
    flags: u32,
    max_background: u16,
    congestion_threshold: u16,
    /// Bytes.
    max_write: u32,
    /// Nanoseconds.
    time_gran: u32,
    max_pages: u16,
    map_alignment: u16,
    flags2: u32,
    max_stack_depth: u32,
    request_timeout: u16,
    unused: [u16; 11],
});

wire!(/// `struct fuse_attr`
Attr {
    ino: u64,
    /// Bytes.
    size: u64,
    /// Units of 512 bytes.
    blocks: u64,
    atime: u64,
    mtime: u64,
    ctime: u64,
    atimensec: u32,
    mtimensec: u32,
    ctimensec: u32,
    mode: u32,
    nlink: u32,
    uid: u32,
    gid: u32,
    rdev: u32,
    blksize: u32,
    flags: u32,
});

wire!(/// `struct fuse_attr_out`
AttrOut {
    /// Seconds.
    attr_valid: u64,
    attr_valid_nsec: u32,
    dummy: u32,
    attr: Attr,
});

wire!(/// `struct fuse_entry_out`
EntryOut {
    nodeid: u64,
    generation: u64,
    /// Seconds for which the name may be believed.
    entry_valid: u64,
    /// Seconds.
    attr_valid: u64,
    entry_valid_nsec: u32,
    attr_valid_nsec: u32,
    attr: Attr,
});

wire!(/// `struct fuse_dirent`, without the name that follows it.
Dirent {
    ino: u64,
    /// Where to go on after it.
    off: u64,
    namelen: u32,
    /// The type bits of the mode, shifted down by 12.
    kind: u32,
});

wire!(/// `struct fuse_setattr_in`
SetattrIn {
    valid: u32,
    padding: u32,
    fh: u64,
    size: u64,
    lock_owner: u64,
    atime: u64,
    mtime: u64,
    ctime: u64,
    atimensec: u32,
    mtimensec: u32,
    ctimensec: u32,
    mode: u32,
    unused4: u32,
    uid: u32,
    gid: u32,
    unused5: u32,
});

wire!(/// `struct fuse_open_in`
OpenIn {
    /// As in open(2).
    flags: u32,
    open_flags: u32,
});

wire!(/// `struct fuse_open_out`
OpenOut {
    fh: u64,
    open_flags: u32,
    backing_id: i32,
});

wire!(/// `struct fuse_backing_map`
BackingMap {
    fd: i32,
    flags: u32,
    padding: u64,
});

wire!(/// `struct fuse_read_in`
ReadIn {
    fh: u64,
    offset: u64,
    size: u32,
    read_flags: u32,
    lock_owner: u64,
    flags: u32,
    padding: u32,
});

wire!(/// `struct fuse_write_in`
WriteIn {
    fh: u64,
    offset: u64,
    size: u32,
    write_flags: u32,
    lock_owner: u64,
    flags: u32,
    padding: u32,
});

wire!(/// `struct fuse_write_out`
WriteOut {
    size: u32,
    padding: u32,
});

wire!(/// `struct fuse_fallocate_in`
FallocateIn {
    fh: u64,
    offset: u64,
    length: u64,
    mode: u32,
    padding: u32,
});

wire!(/// `struct fuse_lseek_in`
LseekIn {
    fh: u64,
    offset: u64,
    whence: u32,
    padding: u32,
});

wire!(/// `struct fuse_lseek_out`
LseekOut {
    offset: u64,
});

wire!(/// `struct fuse_statfs_out` (`struct fuse_kstatfs`)
StatfsOut {
    blocks: u64,
    bfree: u64,
    bavail: u64,
    files: u64,
    ffree: u64,
    bsize: u32,
    namelen: u32,
    frsize: u32,
    padding: u32,
    spare: [u32; 6],
});

wire!(/// `struct fuse_uring_ent_in_out`
RingEntry {
    flags: u64,
    /// The kernel's name for the request in the entry: the answer carries it.
    commit_id: u64,
    /// Bytes in the payload, of the request and then of the answer.
    payload_size: u32,
    padding: u32,
    reserved: u64,
});

wire!(/// `struct fuse_uring_cmd_req`
RingCommand {
    flags: u64,
    /// Of the request that is answered; nothing for a registration.
    commit_id: u64,
    /// The kernel's queue: the number of the CPU whose requests it holds.
    queue: u16,
    padding: [u8; 6],
});

/// `struct fuse_uring_req_header`: where in the headers of a ring entry what lies, in bytes.
#[allow(missing_docs)]
pub mod ring_header {
    /// `struct fuse_in_header`, then `struct fuse_out_header`.
    pub const IN_OUT: usize = 0;
    /// The struct that belongs to the opcode, 128 bytes at most.
    pub const OPERATION: usize = 128;
    /// [`RingEntry`](super::RingEntry).
    pub const ENTRY: usize = 256;
    pub const SIZE: usize = 288;
}

/// `enum fuse_uring_cmd`
#[allow(missing_docs)]
pub mod ring_command {
    pub const REGISTER: u32 = 1;
    pub const COMMIT_AND_FETCH: u32 = 2;
}

/// `enum fuse_opcode`, as far as it means something here.
#[allow(missing_docs)]
pub mod opcode {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const FLUSH: u32 = 25;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const FSYNCDIR: u32 = 30;
    pub const CREATE: u32 = 35;
    pub const INTERRUPT: u32 = 36;
    pub const DESTROY: u32 = 38;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const RENAME2: u32 = 45;
    pub const LSEEK: u32 = 46;
}

/// Flags of INIT; those from bit 32 on travel in `flags2`.
#[allow(missing_docs)]
pub mod init {
    pub const ASYNC_READ: u64 = 1 << 0;
    pub const ATOMIC_O_TRUNC: u64 = 1 << 3;
    pub const BIG_WRITES: u64 = 1 << 5;
    pub const ASYNC_DIO: u64 = 1 << 15;
    pub const MAX_PAGES: u64 = 1 << 22;
    pub const INIT_EXT: u64 = 1 << 30;
    pub const DIRECT_IO_ALLOW_MMAP: u64 = 1 << 36;
    pub const PASSTHROUGH: u64 = 1 << 37;
    pub const OVER_IO_URING: u64 = 1 << 41;
}

/// Flags of an OPEN reply.
#[allow(missing_docs)]
pub mod fopen {
    pub const DIRECT_IO: u32 = 1 << 0;
    pub const PARALLEL_DIRECT_WRITES: u32 = 1 << 6;
    pub const PASSTHROUGH: u32 = 1 << 7;
}

/// Bits of `valid` in SETATTR.
#[allow(missing_docs)]
pub mod fattr {
    pub const MODE: u32 = 1 << 0;
    pub const UID: u32 = 1 << 1;
    pub const GID: u32 = 1 << 2;
    pub const SIZE: u32 = 1 << 3;
    pub const ATIME: u32 = 1 << 4;
    pub const MTIME: u32 = 1 << 5;
    pub const FH: u32 = 1 << 6;
    pub const ATIME_NOW: u32 = 1 << 7;
    pub const MTIME_NOW: u32 = 1 << 8;
    pub const LOCKOWNER: u32 = 1 << 9;
    pub const CTIME: u32 = 1 << 10;
    pub const KILL_SUIDGID: u32 = 1 << 11;
}

/// Bytes of the request header.
pub const IN_HEADER: usize = size_of::<InHeader>();
/// Bytes of the reply header.
pub const OUT_HEADER: usize = size_of::<OutHeader>();

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_those_of_the_kernel_header() {
        // From a C program that printed sizeof() of each struct.
        assert_eq!(size_of::<InHeader>(), 40);
        assert_eq!(size_of::<OutHeader>(), 16);
        assert_eq!(size_of::<NotifyInvalInodeOut>(), 24);
        assert_eq!(size_of::<InitIn>(), 64);
        assert_eq!(size_of::<InitOut>(), 64);
        assert_eq!(size_of::<Attr>(), 88);
        assert_eq!(size_of::<AttrOut>(), 104);
        assert_eq!(size_of::<EntryOut>(), 128);
        assert_eq!(size_of::<Dirent>(), 24);
        assert_eq!(size_of::<SetattrIn>(), 88);
        assert_eq!(size_of::<ReadIn>(), 40);
        assert_eq!(size_of::<WriteIn>(), 40);
        assert_eq!(size_of::<FallocateIn>(), 32);
        assert_eq!(size_of::<LseekIn>(), 24);
        assert_eq!(size_of::<StatfsOut>(), 80);
        assert_eq!(size_of::<RingEntry>(), 32);
        assert_eq!(size_of::<RingCommand>(), 24);
        assert_eq!(
            ring_header::ENTRY + size_of::<RingEntry>(),
            ring_header::SIZE
        );
    }
}
