//! `io::read` and `io::write` over a node whose bytes are here, there and nowhere.

#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;

use common::{BACKENDS, buffer, directory, image, open, pattern, read, run, write};
use diskfuse_block::drivers::FileNode;
use diskfuse_block::{
    Access, BlockStatus, Error, Extent, Hold, Kind, Limits, LocalFuture, Node, Resize, Result,
    Zeroes, io,
};
use diskfuse_ring::Buf;

const PIECE: u64 = 700;
const SIZE: u64 = 20 * PIECE;

/// Pieces of 700 bytes: one in a host file, one nowhere, one that takes work, and so on. The host file holds them in
/// reverse order. Reading at `broken` fails.
struct Patchwork {
    file: Arc<FileNode>,
    broken: u64,
}

impl Patchwork {
    fn host_offset(at: u64) -> u64 {
        SIZE - PIECE - at / PIECE * PIECE + at % PIECE
    }
}

type Answer<'a, T> = LocalFuture<'a, Result<T>>;

impl Node for Patchwork {
    fn driver(&self) -> &'static str {
        "patchwork"
    }
    fn size(&self) -> u64 {
        SIZE
    }
    fn read_only(&self) -> bool {
        false
    }
    fn limits(&self) -> Limits {
        self.file.limits()
    }
    fn allocated(&self) -> u64 {
        0
    }
    fn filename(&self) -> Option<String> {
        None
    }
    fn resolve(&self, _: Access, offset: u64, len: u64) -> Extent<'_> {
        let len = len.min(PIECE - offset % PIECE);
        if offset == self.broken {
            return Extent::Void { len: 0 };
        }
        match offset / PIECE % 3 {
            0 => Extent::Host {
                file: self.file.host(),
                offset: Self::host_offset(offset),
                len,
                hold: Hold::none(),
            },
            1 => Extent::Void { len },
            _ => Extent::Work { len },
        }
    }
    fn read(&self, offset: u64, mut buf: Buf) -> LocalFuture<'_, (Result<()>, Buf)> {
        Box::pin(async move {
            assert!(buf.len() as u64 <= PIECE, "more than was called work");
            let result;
            (result, buf) = self.file.read(Self::host_offset(offset), buf).await;
            buf.as_mut_slice().iter_mut().for_each(|b| *b ^= 0xFF);
            (result, buf)
        })
    }
    fn write(&self, offset: u64, buf: Buf) -> LocalFuture<'_, (Result<()>, Buf)> {
        Box::pin(async move {
            let flipped: Vec<u8> = buf.as_slice().iter().map(|b| b ^ 0xFF).collect();
            let mine = buffer(&flipped, 0);
            let (result, _) = self.file.write(Self::host_offset(offset), mine).await;
            (result, buf)
        })
    }
    fn write_zeroes(&self, _: u64, _: u64, _: Zeroes) -> Answer<'_, ()> {
        unsupported()
    }
    fn discard(&self, _: u64, _: u64) -> Answer<'_, ()> {
        unsupported()
    }
    fn flush(&self) -> Answer<'_, ()> {
        self.file.flush()
    }
    fn resize(&self, _: u64, _: Resize, _: bool) -> Answer<'_, ()> {
        unsupported()
    }
    fn block_status(&self, _: u64, _: u64) -> Answer<'_, BlockStatus> {
        unsupported()
    }
}

fn unsupported<'a, T: 'a>() -> Answer<'a, T> {
    let error = Error::new(Kind::Unsupported, "not here");
    Box::pin(std::future::ready(Err(error)))
}

fn patchwork(dir: &tempfile::TempDir, broken: u64) -> Patchwork {
    let file = open(&image(dir, "pieces.raw", &vec![0xFF; SIZE as usize]));
    Patchwork { file, broken }
}

#[test]
fn a_range_of_many_extents_is_moved_piece_by_piece() {
    for choice in BACKENDS {
        let dir = directory();
        let node = patchwork(&dir, u64::MAX);
        run(choice, async {
            let bytes = pattern(9 * PIECE as usize, 1);
            // Not at the border of a piece, nor at the beginning of the buffer.
            let (result, buf) = io::write(&node, 350, buffer(&bytes, 123)).await;
            result.unwrap();
            assert_eq!(buf.window(), 123..123 + bytes.len());
            assert_eq!(buf.as_slice(), bytes);
            let found = read(&node, 350, bytes.len()).await.unwrap();
            for (n, (found, wrote)) in found.iter().zip(&bytes).enumerate() {
                let nowhere = (n as u64 + 350) / PIECE % 3 == 1;
                assert_eq!(*found, if nowhere { 0 } else { *wrote }, "byte {n}");
            }
        });
        let outside = std::fs::read(node.file.host().path()).unwrap();
        let wrote = pattern(9 * PIECE as usize, 1)[0];
        assert_eq!(outside[Patchwork::host_offset(350) as usize], wrote);
    }
}

#[test]
fn an_error_in_the_middle_gives_the_whole_window_back() {
    for choice in BACKENDS {
        let dir = directory();
        let node = patchwork(&dir, 3 * PIECE);
        run(choice, async {
            for access in [Access::Read, Access::Write] {
                let buf = buffer(&[1; 5000], 77);
                let (result, buf) = match access {
                    Access::Read => io::read(&node, 0, buf).await,
                    Access::Write => io::write(&node, 0, buf).await,
                };
                // A driver that resolves nothing is told so rather than asked for ever.
                assert_eq!(result.unwrap_err().kind(), Kind::Corrupt);
                assert_eq!(buf.window(), 77..5077);
            }
        });
    }
}

#[test]
fn a_range_past_the_end_is_refused_before_anything_moves() {
    for choice in BACKENDS {
        let dir = directory();
        let node = patchwork(&dir, u64::MAX);
        run(choice, async {
            for (at, len) in [
                (SIZE, 1),
                (SIZE - 10, 11),
                (u64::MAX, 1),
                (0, SIZE as usize + 1),
            ] {
                let wrote = write(&node, at, &vec![0; len]).await;
                assert_eq!(wrote.unwrap_err().kind(), Kind::Invalid);
            }
        });
        let outside = std::fs::read(node.file.host().path()).unwrap();
        assert!(outside.iter().all(|&b| b == 0xFF));
    }
}
