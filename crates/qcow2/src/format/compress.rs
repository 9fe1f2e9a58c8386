//! Compressed clusters: one cluster in, fewer bytes out, and back. Never more memory than a cluster, whatever the bytes
//! say. (Specification, "Compressed Clusters Descriptor"; deflate has no header and, as QEMU writes it, a window of
//! 4 KiB.)

use diskfuse_block::{Error, Kind, Result};
use flate2::{Compress, Decompress, FlushCompress, FlushDecompress, Status};

use super::Compression;

/// log2 of the window for deflate: what other readers expect at most when we write, and the format's largest when we
/// read.
const WRITE_WINDOW: u8 = 12;
const READ_WINDOW: u8 = 15;

/// Fills `cluster` from compressed bytes; what follows them in `input` is ignored. [`Kind::Corrupt`] if they are not
/// exactly a cluster.
pub fn decompress(kind: Compression, input: &[u8], cluster: &mut [u8]) -> Result<()> {
    let got = match kind {
        Compression::Zlib => inflate(input, cluster),
        Compression::Zstd => zstd_decode(input, cluster),
    };
    match got {
        Ok(len) if len == cluster.len() => Ok(()),
        Ok(len) => {
            let whole = cluster.len();
            Err(corrupt(&format!("it holds {len} bytes instead of {whole}")))
        }
        Err(why) => Err(corrupt(&why)),
    }
}

fn corrupt(why: &str) -> Error {
    Error::new(
        Kind::Corrupt,
        format!("the compressed data is damaged: {why}"),
    )
}

fn inflate(input: &[u8], cluster: &mut [u8]) -> std::result::Result<usize, String> {
    let mut stream = Decompress::new_with_window_bits(false, READ_WINDOW);
    loop {
        let (read, written) = (stream.total_in() as usize, stream.total_out() as usize);
        let (rest, room) = (&input[read.min(input.len())..], &mut cluster[written..]);
        let status = stream.decompress(rest, room, FlushDecompress::Finish);
        let status = status.map_err(|error| error.to_string())?;
        let moved = stream.total_in() as usize > read || stream.total_out() as usize > written;
        // A stream may go on past the cluster; only the cluster is wanted.
        if status == Status::StreamEnd || !moved || stream.total_out() as usize == cluster.len() {
            return Ok(stream.total_out() as usize);
        }
    }
}

/// A frame, or several, up to a whole cluster; rubbish may follow.
fn zstd_decode(input: &[u8], cluster: &mut [u8]) -> std::result::Result<usize, String> {
    use zstd::stream::raw::{Decoder, InBuffer, Operation, OutBuffer};
    let mut decoder = Decoder::new().map_err(|e| e.to_string())?;
    let mut from = InBuffer::around(input);
    let mut to = OutBuffer::around(cluster);
    loop {
        let before = (from.pos(), to.pos());
        let left = decoder.run(&mut from, &mut to).map_err(|e| e.to_string())?;
        if to.pos() == to.capacity() || (from.pos(), to.pos()) == before {
            return Ok(to.pos());
        }
        if left == 0 && from.pos() == input.len() {
            return Ok(to.pos());
        }
    }
}

/// Compresses a cluster; `None` if that makes it no smaller.
pub fn compress(kind: Compression, cluster: &[u8]) -> Option<Vec<u8>> {
    // Room for less than a cluster: what does not fit is not worth it.
    let mut out = vec![0; cluster.len().checked_sub(1)?];
    let len = match kind {
        Compression::Zlib => {
            let level = flate2::Compression::default();
            let mut stream = Compress::new_with_window_bits(level, false, WRITE_WINDOW);
            let status = stream
                .compress(cluster, &mut out, FlushCompress::Finish)
                .ok()?;
            (status == Status::StreamEnd).then_some(stream.total_out() as usize)
        }
        Compression::Zstd => zstd::bulk::compress_to_buffer(cluster, &mut out, 0).ok(),
    };
    out.truncate(len?);
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KINDS: [Compression; 2] = [Compression::Zlib, Compression::Zstd];

    #[test]
    fn a_cluster_comes_back_as_it_was() {
        for kind in KINDS {
            for size in [512, 65536, 2 << 20] {
                let cluster: Vec<u8> = (0..size).map(|n| (n / 7 % 251) as u8).collect();
                let mut packed = compress(kind, &cluster).unwrap();
                assert!(packed.len() < size);
                packed.resize(packed.len().next_multiple_of(512), 0xab);
                let mut back = vec![1; size];
                decompress(kind, &packed, &mut back).unwrap();
                assert!(back == cluster, "{kind:?} {size}");
            }
        }
    }

    #[test]
    fn what_does_not_shrink_is_not_compressed() {
        let mut state = 1u64;
        let noise: Vec<u8> = std::iter::repeat_with(|| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 56) as u8
        })
        .take(4096)
        .collect();
        assert!(KINDS.iter().all(|&kind| compress(kind, &noise).is_none()));
    }

    #[test]
    fn damaged_and_short_data_is_an_error() {
        for kind in KINDS {
            let packed = compress(kind, &[7; 4096]).unwrap();
            let mut cluster = [0; 8192];
            assert!(
                decompress(kind, &packed, &mut cluster).is_err(),
                "too short"
            );
            let mut cluster = [0; 4096];
            assert!(decompress(kind, &[], &mut cluster).is_err());
            assert!(decompress(kind, &[0xff; 512], &mut cluster).is_err());
            assert!(decompress(kind, &packed[..packed.len() / 2], &mut cluster).is_err());
        }
    }
}
