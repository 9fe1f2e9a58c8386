//! The few structs of the FUSE protocol that the bare server reads and writes, as bytes at offsets, and its answers. No I/O.
//!
//! Source: `include/uapi/linux/fuse.h` of Linux, protocol 7.45. All fields are in the machine's byte order.

use std::ffi::CString;
use std::os::fd::RawFd;

/// Bytes of `struct fuse_in_header`.
pub const IN_HEADER: usize = 40;
/// Bytes of `struct fuse_out_header`.
pub const OUT_HEADER: usize = 16;
/// The largest READ and WRITE in bytes, in pages 256.
pub const MAX_REQUEST: usize = 1 << 20;

const MAJOR: u32 = 7;
const MINOR: u32 = 45;
/// Requests that the kernel may have in flight in the background.
const MAX_BACKGROUND: u16 = 256;

const OP_FORGET: u32 = 2;
const OP_GETATTR: u32 = 3;
const OP_OPEN: u32 = 14;
const OP_READ: u32 = 15;
const OP_WRITE: u32 = 16;
const OP_STATFS: u32 = 17;
const OP_RELEASE: u32 = 18;
const OP_FSYNC: u32 = 20;
const OP_FLUSH: u32 = 25;
const OP_INIT: u32 = 26;
const OP_INTERRUPT: u32 = 36;
const OP_BATCH_FORGET: u32 = 42;

const ASYNC_READ: u64 = 1 << 0;
const BIG_WRITES: u64 = 1 << 5;
const ASYNC_DIO: u64 = 1 << 15;
const PARALLEL_DIROPS: u64 = 1 << 18;
const MAX_PAGES: u64 = 1 << 22;
const INIT_EXT: u64 = 1 << 30;
const OVER_IO_URING: u64 = 1 << 41;
const WANTED: u64 = ASYNC_READ | BIG_WRITES | ASYNC_DIO | PARALLEL_DIROPS | MAX_PAGES | INIT_EXT;

const FOPEN_DIRECT_IO: u32 = 1 << 0;
const FOPEN_PARALLEL_DIRECT_WRITES: u32 = 1 << 6;

/// A regular file that its owner may read and write.
const MODE: u32 = 0o100_600;
/// How long the kernel may keep the attributes, in seconds: they never change.
const ATTR_VALID: u64 = 3600;
const ENOSYS: i32 = 38;

/// What mount(2) is told; `fd` is the number of an open `/dev/fuse`.
pub fn mount_options(fd: RawFd) -> CString {
    let text = format!(
        "fd={fd},rootmode=100000,user_id=0,group_id=0,max_read={MAX_REQUEST},default_permissions,allow_other"
    );
    // There is no NUL in it.
    CString::new(text).unwrap_or_default()
}

/// The field of `N` bytes at `offset`; zeroes beyond the end, which no request of a kernel has.
fn field<const N: usize>(bytes: &[u8], offset: usize) -> [u8; N] {
    bytes
        .get(offset..)
        .and_then(<[u8]>::first_chunk)
        .copied()
        .unwrap_or([0; N])
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_ne_bytes(field(bytes, offset))
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_ne_bytes(field(bytes, offset))
}

/// What counts in a request's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    opcode: u32,
    /// The number under which it is answered.
    pub unique: u64,
}

impl Request {
    /// Reads `struct fuse_in_header`.
    pub fn parse(header: &[u8]) -> Self {
        Self {
            opcode: u32_at(header, 4),
            unique: u64_at(header, 8),
        }
    }
}

/// An answer's body.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer<'a> {
    /// None is expected.
    Silence,
    /// A positive errno.
    Error(i32),
    /// One of the constant structs, or nothing at all.
    Body(&'a [u8]),
    /// `struct fuse_write_out`.
    Written([u8; 8]),
    /// So many bytes of a file, of no particular content.
    Data(usize),
}

/// `struct fuse_out_header` for a body of `length` bytes; `errno` is positive or 0.
pub fn out_header(unique: u64, errno: i32, length: usize) -> [u8; OUT_HEADER] {
    let mut header = [0; OUT_HEADER];
    header[..4].copy_from_slice(&((OUT_HEADER + length) as u32).to_ne_bytes());
    header[4..8].copy_from_slice(&(-errno).to_ne_bytes());
    header[8..].copy_from_slice(&unique.to_ne_bytes());
    header
}

/// All that is ever answered, made once.
#[derive(Debug)]
pub struct Answers {
    /// Bytes of the file.
    size: u64,
    attributes: [u8; 104],
    open: [u8; 16],
    statfs: [u8; 80],
}

impl Answers {
    /// For a file of `size` bytes.
    pub fn new(size: u64) -> Self {
        // `struct fuse_attr_out`: how long it holds, then `struct fuse_attr`.
        let mut attributes = [0; 104];
        attributes[..8].copy_from_slice(&ATTR_VALID.to_ne_bytes());
        let attr = &mut attributes[16..];
        attr[..8].copy_from_slice(&1u64.to_ne_bytes());
        attr[8..16].copy_from_slice(&size.to_ne_bytes());
        attr[16..24].copy_from_slice(&size.div_ceil(512).to_ne_bytes());
        attr[60..64].copy_from_slice(&MODE.to_ne_bytes());
        attr[64..68].copy_from_slice(&1u32.to_ne_bytes());
        attr[80..84].copy_from_slice(&4096u32.to_ne_bytes());
        // `struct fuse_open_out`: a handle, then flags.
        let mut open = [0; 16];
        let flags = FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES;
        open[8..12].copy_from_slice(&flags.to_ne_bytes());
        // `struct fuse_kstatfs`: blocks, size of a block, length of names.
        let mut statfs = [0; 80];
        statfs[..8].copy_from_slice(&size.div_ceil(4096).to_ne_bytes());
        statfs[40..44].copy_from_slice(&4096u32.to_ne_bytes());
        statfs[44..48].copy_from_slice(&255u32.to_ne_bytes());
        Self {
            size,
            attributes,
            open,
            statfs,
        }
    }

    /// The answer to `request`, whose operation's struct begins `body`.
    pub fn to(&self, request: Request, body: &[u8]) -> Answer<'_> {
        match request.opcode {
            // `struct fuse_read_in` and `struct fuse_write_in`: offset at 8, size at 16.
            OP_READ => {
                let left = self.size.saturating_sub(u64_at(body, 8));
                let wanted = (u32_at(body, 16) as usize).min(MAX_REQUEST);
                Answer::Data(usize::try_from(left).map_or(wanted, |left| left.min(wanted)))
            }
            OP_WRITE => {
                let mut written = [0; 8];
                written[..4].copy_from_slice(&field::<4>(body, 16));
                Answer::Written(written)
            }
            OP_GETATTR => Answer::Body(&self.attributes),
            OP_OPEN => Answer::Body(&self.open),
            OP_STATFS => Answer::Body(&self.statfs),
            OP_RELEASE | OP_FSYNC | OP_FLUSH => Answer::Body(&[]),
            OP_FORGET | OP_BATCH_FORGET | OP_INTERRUPT => Answer::Silence,
            _ => Answer::Error(ENOSYS),
        }
    }
}

/// The answer to the first message, `struct fuse_init_out` with its header; an error in words when it is not an INIT of
/// which use can be made.
pub fn answer_init(message: &[u8], uring: bool) -> Result<[u8; OUT_HEADER + 64], &'static str> {
    let request = Request::parse(message);
    let body = message.get(IN_HEADER..).unwrap_or_default();
    if request.opcode != OP_INIT || u32_at(body, 0) != MAJOR {
        return Err("the kernel does not begin with an INIT of protocol 7");
    }
    let offered = u64::from(u32_at(body, 12)) | u64::from(u32_at(body, 16)) << 32;
    if offered & (MAX_PAGES | INIT_EXT) != MAX_PAGES | INIT_EXT {
        return Err("the kernel is too old: it offers no requests of 1 MiB");
    }
    if uring && offered & OVER_IO_URING == 0 {
        return Err(
            "the kernel does not offer FUSE over io_uring: it needs Linux 6.14 and, as root, \
             `echo Y > /sys/module/fuse/parameters/enable_uring`",
        );
    }
    let wanted = WANTED | if uring { OVER_IO_URING } else { 0 };
    let flags = wanted & offered;
    let mut answer = [0; OUT_HEADER + 64];
    answer[..OUT_HEADER].copy_from_slice(&out_header(request.unique, 0, 64));
    let mut put = |offset: usize, bytes: &[u8]| {
        answer[OUT_HEADER + offset..][..bytes.len()].copy_from_slice(bytes);
    };
    put(0, &MAJOR.to_ne_bytes());
    put(4, &u32_at(body, 4).min(MINOR).to_ne_bytes());
    put(8, &field::<4>(body, 8));
    put(12, &(flags as u32).to_ne_bytes());
    put(16, &MAX_BACKGROUND.to_ne_bytes());
    put(18, &(MAX_BACKGROUND / 4 * 3).to_ne_bytes());
    put(20, &(MAX_REQUEST as u32).to_ne_bytes());
    put(24, &1u32.to_ne_bytes());
    put(28, &((MAX_REQUEST / 4096) as u16).to_ne_bytes());
    put(32, &((flags >> 32) as u32).to_ne_bytes());
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(opcode: u32) -> Request {
        let mut header = [0; IN_HEADER];
        header[4..8].copy_from_slice(&opcode.to_ne_bytes());
        header[8..16].copy_from_slice(&77u64.to_ne_bytes());
        Request::parse(&header)
    }

    fn transfer(offset: u64, size: u32) -> [u8; 40] {
        let mut body = [0; 40];
        body[8..16].copy_from_slice(&offset.to_ne_bytes());
        body[16..20].copy_from_slice(&size.to_ne_bytes());
        body
    }

    fn init(major: u32, offered: u64) -> Vec<u8> {
        let mut message = vec![0; IN_HEADER + 64];
        message[4..8].copy_from_slice(&OP_INIT.to_ne_bytes());
        message[8..16].copy_from_slice(&9u64.to_ne_bytes());
        let body = &mut message[IN_HEADER..];
        body[..4].copy_from_slice(&major.to_ne_bytes());
        body[4..8].copy_from_slice(&99u32.to_ne_bytes());
        body[12..16].copy_from_slice(&(offered as u32).to_ne_bytes());
        body[16..20].copy_from_slice(&((offered >> 32) as u32).to_ne_bytes());
        message
    }

    #[test]
    fn reads_end_at_the_size_and_are_never_larger_than_the_buffer() {
        let answers = Answers::new(10_000);
        let read = |offset, size| answers.to(request(OP_READ), &transfer(offset, size));
        assert_eq!(read(0, 4096), Answer::Data(4096));
        assert_eq!(read(8192, 4096), Answer::Data(1808));
        assert_eq!(read(u64::MAX, 4096), Answer::Data(0));
        let large = Answers::new(u64::MAX);
        assert_eq!(
            large.to(request(OP_READ), &transfer(0, u32::MAX)),
            Answer::Data(MAX_REQUEST)
        );
        assert_eq!(large.to(request(OP_READ), &[]), Answer::Data(0));
    }

    #[test]
    fn a_write_is_answered_with_its_size_and_what_is_unknown_with_enosys() {
        let answers = Answers::new(4096);
        let Answer::Written(written) = answers.to(request(OP_WRITE), &transfer(0, 512)) else {
            panic!("not an answer to a write");
        };
        assert_eq!(u32_at(&written, 0), 512);
        assert_eq!(answers.to(request(4711), &[]), Answer::Error(ENOSYS));
        assert_eq!(answers.to(request(OP_FORGET), &[]), Answer::Silence);
        assert_eq!(answers.to(request(OP_FSYNC), &[]), Answer::Body(&[]));
    }

    #[test]
    fn a_header_counts_itself_and_carries_a_negative_errno() {
        let header = out_header(7, ENOSYS, 100);
        assert_eq!(u32_at(&header, 0), 116);
        assert_eq!(u32_at(&header, 4) as i32, -38);
        assert_eq!(u64_at(&header, 8), 7);
    }

    #[test]
    fn only_what_is_offered_is_asked_for_and_io_uring_only_when_wanted() {
        let least = MAX_PAGES | INIT_EXT;
        let flags = |answer: [u8; 80]| {
            u64::from(u32_at(&answer, OUT_HEADER + 12))
                | u64::from(u32_at(&answer, OUT_HEADER + 32)) << 32
        };
        let answer = answer_init(&init(7, least | ASYNC_DIO), false).unwrap();
        assert_eq!(flags(answer), least | ASYNC_DIO);
        assert_eq!(u32_at(&answer, OUT_HEADER + 4), MINOR);
        assert_eq!(
            flags(answer_init(&init(7, u64::MAX), false).unwrap()),
            WANTED
        );
        assert_eq!(
            flags(answer_init(&init(7, u64::MAX), true).unwrap()),
            WANTED | OVER_IO_URING
        );
    }

    #[test]
    fn a_kernel_without_io_uring_is_refused_with_the_remedy() {
        let message = init(7, !OVER_IO_URING);
        assert!(answer_init(&message, false).is_ok());
        let reason = answer_init(&message, true).unwrap_err();
        assert!(reason.contains("echo Y > /sys/module/fuse/parameters/enable_uring"));
        assert!(answer_init(&init(8, u64::MAX), false).is_err());
        assert!(answer_init(&[], false).is_err());
    }
}
