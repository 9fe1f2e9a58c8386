//! Reading and writing a node for callers that do not care where its bytes are: resolve, move, go on until all is
//! done. It never moves a byte that a node did not resolve for exactly this access.

use diskfuse_ring::Buf;

use crate::error::{Error, Kind, Result};
use crate::node::{Access, Extent, Node};

/// Fills the window of `buf` from byte `offset` of the node; the window comes back as it was. [`Kind::Invalid`] if
/// the range is not within the node.
pub async fn read(node: &dyn Node, offset: u64, buf: Buf) -> (Result<()>, Buf) {
    transfer(node, Access::Read, offset, buf).await
}

/// Writes the window of `buf` at byte `offset` of the node; the window comes back as it was. After an error some of
/// the range may have been written.
pub async fn write(node: &dyn Node, offset: u64, buf: Buf) -> (Result<()>, Buf) {
    transfer(node, Access::Write, offset, buf).await
}

async fn transfer(node: &dyn Node, access: Access, offset: u64, mut buf: Buf) -> (Result<()>, Buf) {
    let window = buf.window();
    if let Err(error) = crate::check_range(node.size(), offset, window.len() as u64) {
        return (Err(error), buf);
    }
    let mut done = 0;
    while done < window.len() {
        let at = offset + done as u64;
        let left = window.len() - done;
        let extent = node.resolve(access, at, left as u64);
        let len = usize::try_from(extent.len())
            .unwrap_or(usize::MAX)
            .min(left);
        if len == 0 {
            buf.set_window(window);
            return (Err(resolved_nothing(node, at)), buf);
        }
        let start = window.start + done;
        buf.set_window(start..start + len);
        let result;
        (result, buf) = match (extent, access) {
            (
                Extent::Host {
                    file,
                    offset,
                    hold: _hold,
                    ..
                },
                Access::Read,
            ) => file.read(offset, buf).await,
            (
                Extent::Host {
                    file,
                    offset,
                    hold: _hold,
                    ..
                },
                Access::Write,
            ) => file.write(offset, buf).await,
            (Extent::Void { .. }, Access::Read) => {
                buf.as_mut_slice().fill(0);
                (Ok(()), buf)
            }
            (Extent::Void { .. }, Access::Write) => (Ok(()), buf),
            (Extent::Work { .. }, Access::Read) => node.read(at, buf).await,
            (Extent::Work { .. }, Access::Write) => node.write(at, buf).await,
        };
        if let Err(error) = result {
            buf.set_window(window);
            return (Err(error), buf);
        }
        done += len;
    }
    buf.set_window(window);
    (Ok(()), buf)
}

/// A driver broke the contract; better an error than an endless loop.
fn resolved_nothing(node: &dyn Node, at: u64) -> Error {
    let driver = node.driver();
    Error::new(
        Kind::Corrupt,
        format!("driver '{driver}' resolved nothing at {at}"),
    )
}

/// Whether there is nothing but zeroes in `bytes`. Looks at the ends first: most data differ there at once.
pub fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<64>();
    let ends = [bytes.first(), bytes.last()];
    ends.iter().flatten().all(|&&b| b == 0)
        && words
            .iter()
            .all(|w| w.iter().fold(0, |all, b| all | b) == 0)
        && rest.iter().all(|&b| b == 0)
}

#[cfg(test)]
mod tests {
    use super::is_zero;

    #[test]
    fn one_bit_anywhere_is_not_zero() {
        for len in [1, 63, 64, 65, 4096, 4099] {
            let mut bytes = vec![0; len];
            assert!(is_zero(&bytes));
            for at in [0, len / 2, len - 1] {
                bytes[at] = 0x80;
                assert!(!is_zero(&bytes), "{at} of {len}");
                bytes[at] = 0;
            }
        }
        assert!(is_zero(&[]));
    }
}
