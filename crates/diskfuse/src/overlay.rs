//! Overlays: a disk that can be written while its image stays as it is. What is written goes to a qcow2 image above it, which
//! is thrown away at the end or kept. It must never write the image below, never keep what is written in memory unless told
//! to, and never put a kept overlay on a base that is not what it was.
//!
//! **What the base was** is noted with the overlay in the extended attribute `user.diskfuse.base`, as `SIZE SECONDS.NANOSECONDS`
//! of the base's size and time of change: a header extension of ours would have to survive every other program that writes the
//! overlay, and a file beside it gets lost. An overlay without the attribute (made by another program, or copied without it)
//! is taken if its base has not been changed since the overlay was.

use std::fs::{File, OpenOptions as HostOptions};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use diskfuse_image::create::{NewImage, create};
use diskfuse_image::info::{ImageInfo, InfoOptions, info};
use diskfuse_image::options::NewImageOptions;
use diskfuse_image::{Format, name};
use diskfuse_ring::{Config, Reason, Ring};
use rustix::fs::XattrFlags;
use rustix::io::Errno;

use crate::cli::{DiscardArgs, MountArgs};
use crate::error::{Error, Result};
use crate::mount::absolute;

/// See the module.
const NOTE: &str = "user.diskfuse.base";

/// File systems in memory: tmpfs, ramfs (`include/uapi/linux/magic.h`).
const IN_MEMORY: [u64; 2] = [0x0102_1994, 0x8584_58f6];

/// An overlay that is there. One that is to be thrown away loses its name when this is dropped; whoever has it open by then
/// keeps it, and it is gone when they are, however they end.
pub struct Overlay {
    path: PathBuf,
    is_kept: bool,
}

impl Overlay {
    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        if !self.is_kept
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "an overlay is left over");
        }
    }
}

/// Makes or finds the overlay that the command line asks for. Runs on a ring.
///
/// # Errors
/// There is no place for it that is not in memory; it stands on another image, or on one that has changed; those of making an
/// image. Then nothing is left of one that was made.
pub async fn prepare(arguments: &MountArgs) -> Result<Option<Overlay>> {
    let base = absolute(&arguments.image);
    match &arguments.overlay {
        None => Ok(None),
        Some(None) => temporary(&base, arguments).await.map(Some),
        Some(Some(path)) => {
            let path = std::path::absolute(path).map_err(Error::system(format!(
                "Could not find '{}'",
                path.display()
            )))?;
            let is_there = path.metadata().is_ok_and(|stat| stat.len() > 0);
            match is_there {
                true => check(&path, &base).await?,
                false => make(&path, &base, arguments.format, false).await?,
            }
            let is_kept = true;
            Ok(Some(Overlay { path, is_kept }))
        }
    }
}

/// An overlay to be thrown away, in the first place that does.
async fn temporary(base: &Path, arguments: &MountArgs) -> Result<Overlay> {
    let mut tried = Vec::new();
    let places = match &arguments.overlay_dir {
        Some(told) => vec![told.clone()],
        None => {
            let beside = base.parent().map(Path::to_owned);
            let temporary = std::env::var_os("TMPDIR").map(PathBuf::from);
            let temporary = temporary.or_else(|| Some("/var/tmp".into()));
            beside.into_iter().chain(temporary).collect()
        }
    };
    for place in places {
        let shown = place.display();
        if arguments.overlay_dir.is_none() && is_in_memory(&place) {
            tried.push(format!("'{shown}' is in memory"));
            continue;
        }
        match new_file(&place, base) {
            Ok(path) => {
                let is_kept = false;
                let overlay = Overlay { path, is_kept };
                make(&overlay.path, base, arguments.format, true).await?;
                return Ok(overlay);
            }
            Err(error) => tried.push(format!("'{shown}': {}", Reason(&error))),
        }
    }
    Err(Error::Refused(format!(
        "There is no place for an overlay: {}; name one with --overlay-dir",
        tried.join("; ")
    )))
}

fn is_in_memory(place: &Path) -> bool {
    // What cannot be looked at cannot be written to either.
    rustix::fs::statfs(place)
        .is_ok_and(|stat| u64::try_from(stat.f_type).is_ok_and(|kind| IN_MEMORY.contains(&kind)))
}

/// An empty file that nobody else can open.
fn new_file(place: &Path, base: &Path) -> std::io::Result<PathBuf> {
    let image = base.file_name().unwrap_or_default().to_string_lossy();
    let name = format!(".{image}.overlay-{}", std::process::id());
    let path = std::path::absolute(place)?.join(name);
    let mut new = HostOptions::new();
    new.write(true).create_new(true).mode(0o600).open(&path)?;
    Ok(path)
}

/// Makes an empty overlay above `base`, in a file that is missing or, if `there`, empty.
async fn make(path: &Path, base: &Path, format: Option<Format>, there: bool) -> Result<()> {
    let text = base.to_str().ok_or_else(|| {
        Error::refused(format!(
            "'{}' is no UTF-8, which the name of a backing file has to be",
            base.display()
        ))
    })?;
    let looked = InfoOptions {
        format,
        ..InfoOptions::default()
    };
    let format = match format {
        Some(format) => format,
        None => format_of(&info(base, looked).await?)?,
    };
    let new = NewImage {
        path: path.to_owned(),
        format: Format::Qcow2,
        options: NewImageOptions {
            backing_file: Some(text.to_owned()),
            backing_fmt: Some(format),
            ..NewImageOptions::default()
        },
        force: false,
        unchecked_backing: false,
    };
    create(&new).await?.keep();
    if !there {
        note(path, base);
    }
    Ok(())
}

fn format_of(images: &[ImageInfo]) -> Result<Format> {
    let format = images.first().map_or("raw", |image| &image.format);
    Ok(Format::parse(format)?)
}

/// What there is to be noted of a base.
fn state_of(base: &Path) -> std::io::Result<String> {
    let stat = base.metadata()?;
    let (seconds, nanoseconds) = (stat.mtime(), stat.mtime_nsec());
    Ok(format!("{} {seconds}.{nanoseconds:09}", stat.len()))
}

/// Notes with an overlay what its base is now. A host file system without extended attributes is all right.
fn note(path: &Path, base: &Path) {
    let noted = state_of(base).and_then(|state| {
        let flags = XattrFlags::empty();
        Ok(rustix::fs::setxattr(path, NOTE, state.as_bytes(), flags)?)
    });
    if let Err(error) = noted {
        tracing::debug!(path = %path.display(), %error, "cannot note what the base is");
    }
}

/// What was noted.
fn noted(path: &Path) -> Result<Option<String>> {
    let mut bytes = [0; 128];
    let len = match rustix::fs::getxattr(path, NOTE, &mut bytes) {
        Ok(len) => len,
        Err(Errno::NODATA | Errno::OPNOTSUPP) => return Ok(None),
        // Nothing that we wrote is as long.
        Err(Errno::RANGE) => 0,
        Err(error) => {
            let what = format!("Could not read {NOTE} of '{}'", path.display());
            return Err(Error::system(what)(error));
        }
    };
    let text = bytes.get(..len).unwrap_or_default();
    Ok(Some(String::from_utf8_lossy(text).into_owned()))
}

/// Looks whether the overlay at `path` stands on `base`, and whether that is what it was.
async fn check(path: &Path, base: &Path) -> Result<()> {
    let shown = path.display();
    let below = base_of(path).await?;
    let same = |a: &Path, b: &Path| match (a.metadata(), b.metadata()) {
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        _ => false,
    };
    if !same(&below, base) {
        return Err(Error::Refused(format!(
            "'{shown}' stands on '{}', not on '{}'",
            below.display(),
            base.display()
        )));
    }
    let failed = || format!("Could not look at '{}'", base.display());
    let state = state_of(base).map_err(Error::system(failed()))?;
    let is_same = match noted(path)? {
        Some(noted) => noted == state,
        None => {
            let changed = |path: &Path| path.metadata()?.modified();
            let base = changed(base).map_err(Error::system(failed()))?;
            let overlay = changed(path);
            let what = format!("Could not look at '{shown}'");
            base <= overlay.map_err(Error::system(what))?
        }
    };
    match is_same {
        true => Ok(()),
        false => Err(Error::Refused(format!(
            "'{}' has changed since '{shown}' was put on it, so what the two show together may make no sense. \
             `diskfuse discard '{shown}'` empties the overlay; if the change was meant, \
             `setfattr -x {NOTE} '{shown}'; touch '{shown}'` says so",
            base.display()
        ))),
    }
}

/// The image that an overlay stands on.
async fn base_of(path: &Path) -> Result<PathBuf> {
    let looked = InfoOptions {
        format: Some(Format::Qcow2),
        ..InfoOptions::default()
    };
    let images = info(path, looked).await?;
    let below = images
        .first()
        .and_then(|image| image.backing_filename.as_deref());
    let below = below.ok_or_else(|| {
        Error::refused(format!(
            "'{}' is a whole image, with no backing file",
            path.display()
        ))
    })?;
    Ok(name::parse_beside(path, below)?.filename)
}

/// `diskfuse discard`: makes the overlay anew, as it was when it was made. It must not be in use.
pub fn discard(arguments: &DiscardArgs) -> Result<ExitCode> {
    let path = absolute(&arguments.image);
    let ring = Ring::new(&Config::default())?;
    ring.block_on(empty(&path))?;
    Ok(ExitCode::SUCCESS)
}

async fn empty(path: &Path) -> Result<()> {
    // A file that is not there is named as what is missing.
    File::open(path).map_err(Error::system(format!(
        "Could not open '{}'",
        path.display()
    )))?;
    let base = base_of(path).await?;
    let looked = InfoOptions {
        format: Some(Format::Qcow2),
        ..InfoOptions::default()
    };
    let images = info(path, looked).await?;
    let image = images.first();
    let told = image.and_then(|image| image.backing_filename_format.as_deref());
    let new = NewImage {
        path: path.to_owned(),
        format: Format::Qcow2,
        options: NewImageOptions {
            backing_file: image.and_then(|image| image.backing_filename.clone()),
            backing_fmt: told.map(Format::parse).transpose()?,
            cluster_size: image.and_then(|image| image.cluster_size),
            ..NewImageOptions::default()
        },
        force: true,
        unchecked_backing: false,
    };
    create(&new).await?.keep();
    note(path, &base);
    Ok(())
}

/// The overlay has been merged into its base, which it stands on as that is now.
pub async fn committed(path: &Path) -> Result<()> {
    let path = absolute(path);
    if noted(&path)?.is_some() {
        note(&path, &base_of(&path).await?);
    }
    Ok(())
}
