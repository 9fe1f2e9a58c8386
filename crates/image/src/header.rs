//! Changing what a header says of the file below. The image must be closed and held for writing.

use diskfuse_block::{Error, Node, Resize, Result, io};
use diskfuse_qcow2::format::{Backing, Header};
use diskfuse_ring::Buf;

/// Writes another backing file, or none, into the header of the image `file`.
///
/// # Errors
/// [`Kind::Invalid`](diskfuse_block::Kind::Invalid) if the name does not fit; those of the file.
pub(crate) async fn set_backing(file: &dyn Node, backing: Option<Backing>) -> Result<()> {
    let mut header = Header::read(file).await?;
    header.backing = backing;
    let bytes = header.encode()?;
    let mut buf = Buf::new(bytes.len()).map_err(|error| Error::os("get memory", error))?;
    buf.as_mut_slice().copy_from_slice(&bytes);
    if file.size() < bytes.len() as u64 {
        let end = (bytes.len() as u64).next_multiple_of(diskfuse_block::SECTOR);
        file.resize(end, Resize::AtLeast, false).await?;
    }
    // What the tables refer to is on the disk before the header says something else.
    file.flush().await?;
    let (result, _) = io::write(file, 0, buf).await;
    result?;
    file.flush().await
}
