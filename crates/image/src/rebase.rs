//! Another backing file for an overlay: *safely*, so that the disk shows what it showed before, or by changing the header
//! only. It never changes a backing file, and the header only when the data is safe.

use std::path::Path;
use std::sync::Arc;

use diskfuse_block::drivers::FileConfig;
use diskfuse_block::{Error, Kind, Node, Result, io};
use diskfuse_qcow2::format::Backing;
use diskfuse_qcow2::node::{Layered, Qcow2Config, Qcow2Node};
use diskfuse_ring::Buf;

use crate::chain;
use crate::create::open_backing;
use crate::format::Format;
use crate::header;
use crate::name;
use crate::open::OpenOptions;
use crate::session::{FileSession, Session};

/// Bytes that are compared at a time.
const CHUNK: u64 = 1 << 20;
/// Bytes of zeroes that are kept between two calls for progress.
const ZEROES: u64 = 256 << 20;

/// What is to be changed.
#[derive(Clone, Debug)]
pub struct Rebase<'r> {
    /// The overlay.
    pub image: &'r Path,
    /// What it is; found out if not given. Only qcow2 images have backing files.
    pub format: Option<Format>,
    /// The new backing file as it is to stand in the header; none, so that the image stands alone.
    pub backing: Option<&'r str>,
    /// Its format; found out if it is qcow2.
    pub backing_format: Option<Format>,
    /// Only change the header: the disk may then show something else. The new backing file need not be there.
    pub header_only: bool,
}

/// Carries it out, and calls `progress` with the bytes that are done and their total. Runs on a ring.
///
/// # Errors
/// [`Kind::Invalid`] if the new chain would be a loop, or a format has to be said; those of opening the images.
pub async fn rebase(what: &Rebase<'_>, progress: &mut dyn FnMut(u64, u64)) -> Result<()> {
    let backing = match what.header_only {
        true => header_only_backing(what)?,
        false => copy_differences(what, progress).await?,
    };
    let named = name::parse_argument(what.image)?;
    let file = FileSession::open(&named.filename, &FileConfig::default(), "rebase")?;
    header::set_backing(&**file.node(), backing).await
}

fn header_only_backing(what: &Rebase<'_>) -> Result<Option<Backing>> {
    let Some(name) = what.backing else {
        return Ok(None);
    };
    let said = name::parse_beside(what.image, name).ok();
    let format = what.backing_format.or(said.and_then(|named| named.format));
    let Some(format) = format else {
        let message = format!("say the format of '{name}' (--backing-format): nobody looks at it");
        return Err(Error::new(Kind::Invalid, message));
    };
    Ok(Some(Backing {
        name: name.to_owned(),
        format: Some(format.name().to_owned()),
    }))
}

/// Writes into the overlay what the old chain shows and the new one would not.
async fn copy_differences(
    what: &Rebase<'_>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Option<Backing>> {
    let options = OpenOptions {
        format: what.format,
        writable: true,
        qcow2: Qcow2Config {
            discard: true,
            ..Qcow2Config::default()
        },
        ..OpenOptions::default()
    };
    let overlay = Session::open(what.image, &options, "rebase").await?;
    let Some(node) = overlay.opened.qcow2.clone() else {
        let message = format!(
            "'{}' is a raw image, which cannot have a backing file",
            what.image.display()
        );
        return Err(Error::new(Kind::Invalid, message));
    };
    let new = match what.backing {
        None => None,
        Some(name) => {
            let named = name::parse_beside(what.image, name)?;
            let overlay_file = name::parse_argument(what.image)?.filename;
            chain::refuse_loop(named.clone(), what.backing_format, &overlay_file).await?;
            Some(open_backing(named, what.backing_format, name).await?)
        }
    };
    let old = overlay.opened.below.first().map(|layer| &layer.node);
    let compare = Compare {
        overlay: node,
        old: old.cloned(),
        new: new.as_ref().map(|new| Arc::clone(new.node())),
    };
    compare.run(progress).await?;
    let backing = what.backing.zip(new.as_ref()).map(|(name, new)| Backing {
        name: name.to_owned(),
        format: Some(new.format().name().to_owned()),
    });
    overlay.close().await?;
    if let Some(new) = new {
        new.close().await?;
    }
    Ok(backing)
}

struct Compare {
    overlay: Arc<Qcow2Node>,
    old: Option<Arc<dyn Node>>,
    new: Option<Arc<dyn Node>>,
}

impl Compare {
    async fn run(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<()> {
        let size = self.overlay.size();
        let memory = |error| Error::os("get memory", error);
        let room = usize::try_from(CHUNK).unwrap_or(usize::MAX);
        let mut old_buf = Buf::new(room).map_err(memory)?;
        let mut new_buf = Buf::new(room).map_err(memory)?;
        let mut at = 0;
        while at < size {
            progress(at, size);
            let status = self.overlay.layer_status(at, size - at).await?;
            let mut len = status.len;
            if status.layered == Layered::Unallocated {
                let (old_len, old_zero) = known_zero(self.old.as_ref(), at, len).await?;
                let (new_len, new_zero) = known_zero(self.new.as_ref(), at, len).await?;
                len = old_len.min(new_len);
                match (old_zero, new_zero) {
                    (true, true) => {}
                    (true, false) => {
                        len = len.min(ZEROES);
                        self.keep(at, len).await?;
                    }
                    _ => {
                        len = len.min(CHUNK - at % CHUNK);
                        let window = 0..usize::try_from(len).unwrap_or(room);
                        old_buf.set_window(window.clone());
                        new_buf.set_window(window);
                        old_buf = show(self.old.as_ref(), at, old_buf).await?;
                        new_buf = show(self.new.as_ref(), at, new_buf).await?;
                        self.keep_differences(at, old_buf.as_slice(), new_buf.as_slice())
                            .await?;
                    }
                }
            }
            at += len;
        }
        progress(size, size);
        self.overlay.flush().await
    }

    /// Has the overlay hold what it shows of the old chain. A write of zeroes would not do: they need not be noted where the
    /// old chain, on which the overlay still stands, has none but zeroes.
    async fn keep(&self, at: u64, len: u64) -> Result<()> {
        self.overlay.populate(at, len).await
    }

    /// Keeps the clusters that differ.
    async fn keep_differences(&self, start: u64, old: &[u8], new: &[u8]) -> Result<()> {
        let unit = self.overlay.header().geometry.subcluster_size().min(CHUNK);
        let unit = usize::try_from(unit).unwrap_or(usize::MAX);
        let mut at = start;
        for (then, now) in old.chunks(unit).zip(new.chunks(unit)) {
            let len = then.len() as u64;
            if then != now {
                self.keep(at, len).await?;
            }
            at += len;
        }
        Ok(())
    }
}

/// How far from `at`, `len` bytes at most, an image is known to be all zero, or is not.
async fn known_zero(image: Option<&Arc<dyn Node>>, at: u64, len: u64) -> Result<(u64, bool)> {
    let Some(image) = image else {
        return Ok((len, true));
    };
    match image.size().saturating_sub(at).min(len) {
        0 => Ok((len, true)),
        there => {
            let status = image.block_status(at, there).await?;
            Ok((status.len.clamp(1, there), status.zero))
        }
    }
}

/// What an image shows; zeroes past its end.
async fn show(image: Option<&Arc<dyn Node>>, at: u64, mut buf: Buf) -> Result<Buf> {
    let window = buf.window();
    let there = image.map_or(0, |image| image.size().saturating_sub(at));
    let there = usize::try_from(there).unwrap_or(usize::MAX).min(buf.len());
    if let Some(rest) = buf.as_mut_slice().get_mut(there..) {
        rest.fill(0);
    }
    if let Some(image) = image.filter(|_| there > 0) {
        buf.set_window(window.start..window.start + there);
        let result;
        (result, buf) = io::read(&**image, at, buf).await;
        result?;
        buf.set_window(window);
    }
    Ok(buf)
}
