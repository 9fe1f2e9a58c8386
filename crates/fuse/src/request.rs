//! From bytes to meaning. Whatever the bytes are, parsing answers: it never panics, never reads past them and never
//! lets a length that the kernel did not back up get further.

use zerocopy::FromBytes;

use crate::abi::{self, IN_HEADER, InHeader, RingEntry, opcode, ring_header};

/// What the kernel asks for. Offsets and lengths are bytes of the disk, as they came: not clipped to anything.
#[derive(Clone, Copy, Debug, PartialEq)]
#[allow(missing_docs)]
pub enum Operation {
    Init {
        major: u32,
        minor: u32,
        max_readahead: u32,
        flags: u64,
    },
    Destroy,
    Lookup {
        name: Name,
    },
    Readlink,
    Getattr,
    Setattr(Setattr),
    Open {
        flags: u32,
    },
    Release,
    Opendir,
    Readdir {
        offset: u64,
        size: u32,
    },
    Fsyncdir,
    Releasedir,
    Read {
        offset: u64,
        size: u32,
    },
    /// The bytes to write follow at `WRITE_PAYLOAD` in the request.
    Write {
        offset: u64,
        size: u32,
    },
    Flush,
    Fsync,
    Statfs,
    Fallocate {
        mode: u32,
        offset: u64,
        length: u64,
    },
    Lseek {
        offset: u64,
        whence: u32,
    },
    /// FORGET, BATCH_FORGET, INTERRUPT: the kernel waits for no answer.
    Silent,
    /// Another name in a directory, or none: nothing that is done to a directory of ours.
    Rename,
    /// Nothing of ours.
    Unknown {
        opcode: u32,
    },
}

/// Where the name of a LOOKUP is in the memory that the request was read to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Name {
    /// In the payload; else right behind the request's header.
    pub in_payload: bool,
    /// Bytes, with the zero at the end.
    pub len: u32,
}

/// What SETATTR wants to change.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[allow(missing_docs)]
pub struct Setattr {
    /// Everything that was asked for: bits of [`abi::fattr`].
    pub valid: u32,
    pub size: u64,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub atime: (u64, u32),
    pub mtime: (u64, u32),
}

/// Where the data of a WRITE request begins, in bytes from its start.
pub const WRITE_PAYLOAD: usize = IN_HEADER + size_of::<abi::WriteIn>();

/// Why a request was not understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Malformed {
    /// Its length disagrees with what was read: nothing from this connection can be trusted any more.
    Length {
        /// Bytes that were read.
        read: usize,
        /// Bytes that the header speaks of, if there was a header.
        said: Option<u32>,
    },
    /// Its body is too short for its opcode, or speaks of more data than came.
    Body {
        /// Whom to answer (EINVAL).
        unique: u64,
    },
}

/// A request, understood.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Request {
    /// The kernel's name for it: 64 bits, all of them meant.
    pub unique: u64,
    /// What it is about: an inode number.
    pub nodeid: u64,
    /// What it asks for.
    pub operation: Operation,
}

/// Reads the front of `body` as a struct.
fn body<T: FromBytes>(body: &[u8], unique: u64) -> Result<T, Malformed> {
    match T::read_from_prefix(body) {
        Ok((value, _)) => Ok(value),
        Err(_) => Err(Malformed::Body { unique }),
    }
}

/// Understands the headers of a ring entry. The answer has the kernel's name for the request, and how many bytes of
/// payload came with it. `room` is what the entry's memory has for payload, in bytes: more is not believed.
pub fn parse_ring(
    headers: &[u8; ring_header::SIZE],
    room: usize,
) -> (RingEntry, Result<Request, Malformed>) {
    let (in_out, rest) = headers.split_at(ring_header::OPERATION);
    let (body, entry) = rest.split_at(ring_header::ENTRY - ring_header::OPERATION);
    // Each piece is larger than its struct.
    let entry =
        RingEntry::read_from_prefix(entry).map_or_else(|_| RingEntry::default(), |(e, _)| e);
    let header =
        InHeader::read_from_prefix(in_out).map_or_else(|_| InHeader::default(), |(h, _)| h);
    let payload = usize::try_from(entry.payload_size).unwrap_or(usize::MAX);
    let payload = payload.min(room);
    let name = Name {
        in_payload: true,
        len: payload as u32,
    };
    (entry, understand(&header, body, payload, name))
}

/// Understands the bytes of one read from the device.
pub fn parse(bytes: &[u8]) -> Result<Request, Malformed> {
    let Ok((header, rest)) = InHeader::read_from_prefix(bytes) else {
        return Err(Malformed::Length {
            read: bytes.len(),
            said: None,
        });
    };
    if usize::try_from(header.len) != Ok(bytes.len()) {
        return Err(Malformed::Length {
            read: bytes.len(),
            said: Some(header.len),
        });
    }
    let payload = bytes.len().saturating_sub(WRITE_PAYLOAD);
    let name = Name {
        in_payload: false,
        len: rest.len() as u32,
    };
    understand(&header, rest, payload, name)
}

/// Understands a request whose header is that, whose struct begins `rest`, and with which `payload` bytes of data came; a
/// name in it would be `name`.
fn understand(
    header: &InHeader,
    rest: &[u8],
    payload: usize,
    name: Name,
) -> Result<Request, Malformed> {
    let unique = header.unique;
    let operation = match header.opcode {
        opcode::READ => {
            let r: abi::ReadIn = body(rest, unique)?;
            Operation::Read {
                offset: r.offset,
                size: r.size,
            }
        }
        opcode::WRITE => {
            let w: abi::WriteIn = body(rest, unique)?;
            if usize::try_from(w.size).is_ok_and(|size| size > payload) {
                return Err(Malformed::Body { unique });
            }
            Operation::Write {
                offset: w.offset,
                size: w.size,
            }
        }
        opcode::INIT => init(rest, unique)?,
        opcode::SETATTR => {
            let s: abi::SetattrIn = body(rest, unique)?;
            Operation::Setattr(Setattr {
                valid: s.valid,
                size: s.size,
                mode: s.mode,
                uid: s.uid,
                gid: s.gid,
                atime: (s.atime, s.atimensec),
                mtime: (s.mtime, s.mtimensec),
            })
        }
        opcode::OPEN => {
            let o: abi::OpenIn = body(rest, unique)?;
            Operation::Open { flags: o.flags }
        }
        opcode::FALLOCATE => {
            let f: abi::FallocateIn = body(rest, unique)?;
            Operation::Fallocate {
                mode: f.mode,
                offset: f.offset,
                length: f.length,
            }
        }
        opcode::LSEEK => {
            let l: abi::LseekIn = body(rest, unique)?;
            Operation::Lseek {
                offset: l.offset,
                whence: l.whence,
            }
        }
        opcode::GETATTR => Operation::Getattr,
        opcode::LOOKUP => Operation::Lookup { name },
        opcode::READLINK => Operation::Readlink,
        opcode::OPENDIR => Operation::Opendir,
        opcode::READDIR => {
            let r: abi::ReadIn = body(rest, unique)?;
            Operation::Readdir {
                offset: r.offset,
                size: r.size,
            }
        }
        opcode::FSYNCDIR => Operation::Fsyncdir,
        opcode::SYMLINK
        | opcode::MKNOD
        | opcode::MKDIR
        | opcode::UNLINK
        | opcode::RMDIR
        | opcode::RENAME
        | opcode::LINK
        | opcode::CREATE
        | opcode::RENAME2 => Operation::Rename,
        opcode::RELEASE => Operation::Release,
        opcode::RELEASEDIR => Operation::Releasedir,
        opcode::FLUSH => Operation::Flush,
        opcode::FSYNC => Operation::Fsync,
        opcode::STATFS => Operation::Statfs,
        opcode::DESTROY => Operation::Destroy,
        opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT => Operation::Silent,
        opcode => Operation::Unknown { opcode },
    };
    Ok(Request {
        unique,
        nodeid: header.nodeid,
        operation,
    })
}

/// INIT grew with the protocol: kernels before 7.36 send 16 bytes, later ones 64.
fn init(rest: &[u8], unique: u64) -> Result<Operation, Malformed> {
    let mut whole = [0u8; size_of::<abi::InitIn>()];
    if rest.len() < 16 {
        return Err(Malformed::Body { unique });
    }
    let len = rest.len().min(whole.len());
    whole[..len].copy_from_slice(&rest[..len]);
    let i: abi::InitIn = body(&whole, unique)?;
    let mut flags = u64::from(i.flags);
    if flags & abi::init::INIT_EXT != 0 {
        flags |= u64::from(i.flags2) << 32;
    }
    Ok(Operation::Init {
        major: i.major,
        minor: i.minor,
        max_readahead: i.max_readahead,
        flags,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use zerocopy::IntoBytes;

    use super::*;

    fn request(opcode: u32, body: &[u8]) -> Vec<u8> {
        let header = InHeader {
            len: (IN_HEADER + body.len()) as u32,
            opcode,
            unique: 0xdead_beef_0000_0001,
            ..InHeader::default()
        };
        [header.as_bytes(), body].concat()
    }

    #[test]
    fn unique_keeps_its_64_bits() {
        let parsed = parse(&request(opcode::GETATTR, &[])).unwrap();
        assert_eq!(parsed.unique, 0xdead_beef_0000_0001);
    }

    #[test]
    fn a_length_that_disagrees_is_told_from_a_short_body() {
        let mut bytes = request(opcode::READ, &[0; 40]);
        bytes.push(0);
        assert_eq!(
            parse(&bytes),
            Err(Malformed::Length {
                read: 81,
                said: Some(80)
            })
        );
        assert!(matches!(
            parse(&bytes[..39]),
            Err(Malformed::Length { said: None, .. })
        ));
        let short = request(opcode::READ, &[0; 39]);
        assert_eq!(
            parse(&short),
            Err(Malformed::Body {
                unique: 0xdead_beef_0000_0001
            })
        );
    }

    #[test]
    fn a_write_with_less_data_than_it_says_is_refused() {
        let w = abi::WriteIn {
            size: 4096,
            ..abi::WriteIn::default()
        };
        let whole = [w.as_bytes(), &[0; 4096]].concat();
        assert!(parse(&request(opcode::WRITE, &whole)).is_ok());
        let short = request(opcode::WRITE, &whole[..whole.len() - 1]);
        assert!(matches!(parse(&short), Err(Malformed::Body { .. })));
    }

    #[test]
    fn an_old_short_init_is_understood() {
        let body: Vec<u8> = [7u32, 31, 65536, 1 << 22]
            .iter()
            .flat_map(|w| w.to_ne_bytes())
            .collect();
        let Operation::Init { minor, flags, .. } =
            parse(&request(opcode::INIT, &body)).unwrap().operation
        else {
            panic!("not an INIT")
        };
        assert_eq!((minor, flags), (31, abi::init::MAX_PAGES));
    }

    #[test]
    fn a_ring_entry_is_understood_and_its_payload_believed() {
        let w = abi::WriteIn {
            size: 4096,
            offset: 8192,
            ..abi::WriteIn::default()
        };
        let header = InHeader {
            opcode: opcode::WRITE,
            unique: 7,
            nodeid: 5,
            ..InHeader::default()
        };
        let entry = |payload_size| RingEntry {
            commit_id: 9,
            payload_size,
            ..RingEntry::default()
        };
        let headers = |entry: RingEntry| {
            let mut headers = [0; ring_header::SIZE];
            headers[..IN_HEADER].copy_from_slice(header.as_bytes());
            headers[ring_header::OPERATION..][..40].copy_from_slice(w.as_bytes());
            headers[ring_header::ENTRY..].copy_from_slice(entry.as_bytes());
            headers
        };
        let (got, request) = parse_ring(&headers(entry(4096)), 1 << 20);
        assert_eq!(got.commit_id, 9);
        let operation = Operation::Write {
            offset: 8192,
            size: 4096,
        };
        assert_eq!(
            request,
            Ok(Request {
                unique: 7,
                nodeid: 5,
                operation
            })
        );
        let (_, short) = parse_ring(&headers(entry(4095)), 1 << 20);
        assert_eq!(short, Err(Malformed::Body { unique: 7 }));
        let (_, too_much) = parse_ring(&headers(entry(4096)), 4095);
        assert_eq!(too_much, Err(Malformed::Body { unique: 7 }));
    }

    proptest! {
        #[test]
        fn arbitrary_headers_of_a_ring_entry_never_panic(bytes in proptest::collection::vec(any::<u8>(), ring_header::SIZE)) {
            let headers: [u8; ring_header::SIZE] = bytes.try_into().unwrap();
            let _ = parse_ring(&headers, 4096);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse(&bytes);
        }

        #[test]
        fn arbitrary_bodies_never_panic_and_keep_their_name(op in 0u32..60, body in proptest::collection::vec(any::<u8>(), 0..200)) {
            let unique = match parse(&request(op, &body)) {
                Ok(r) => r.unique,
                Err(Malformed::Body { unique }) => unique,
                Err(Malformed::Length { .. }) => panic!("the length is right"),
            };
            prop_assert_eq!(unique, 0xdead_beef_0000_0001);
        }
    }
}
