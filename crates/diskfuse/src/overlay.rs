//! Overlays: a disk that can be written while its image stays as it is. What is written goes to a qcow2 image above it, which
//! is thrown away at the end or kept. It must never write the image below, never keep what is written in memory unless told
//! to, and never put a kept overlay on a base that is not what it was.
//!
//! What the base was is noted with the overlay (`note.rs`).

mod note;

use std::fs::{File, OpenOptions as HostOptions};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use crate::cli::{DiscardArgs, MountArgs};
use crate::error::{Error, Result};
use crate::mount::absolute;
use diskfuse_image::create::{NewImage, create};
use diskfuse_image::info::{ImageInfo, InfoOptions, info};
use diskfuse_image::options::NewImageOptions;
use diskfuse_image::{Format, name};
use diskfuse_ring::{Config, Reason, Ring};
use note::Note;
pub use note::{Committing, block_commit};

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
            // One that is missing is named by whoever opens it.
            if base.metadata().is_ok_and(|stat| !stat.is_file()) {
                return Err(Error::Refused(nobody_would_know(&path, &base)));
            }
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

/// Why there are no kept overlays on block devices: neither their size nor a time says whether they were written, and a look at
/// some sectors would miss most changes.
fn nobody_would_know(path: &Path, base: &Path) -> String {
    let (path, base) = (path.display(), base.display());
    format!(
        "'{base}' is no regular file, so nobody would know whether it was changed between two mounts, after which what the two show \
         together makes no sense. If you see to it that it is not, put an overlay on it by yourself and mount that: \
         `diskfuse create -f qcow2 -b '{base}' -F FORMAT '{path}'`, `diskfuse mount --writable '{path}'`. An overlay that is \
         thrown away needs none of it: `--overlay`"
    )
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
        note::renew(path, base);
    }
    Ok(())
}

fn format_of(images: &[ImageInfo]) -> Result<Format> {
    let format = images.first().map_or("raw", |image| &image.format);
    Ok(Format::parse(format)?)
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
    let said = note::read(path)?;
    if note::fits(path, base, said.as_ref())? {
        return Ok(());
    }
    Err(Error::Refused(why_not(path, base, said.as_ref())))
}

/// Why an overlay is not taken, and the ways out. Emptying it comes last, as what was written may be nowhere else.
fn why_not(path: &Path, base: &Path, said: Option<&Note>) -> String {
    let (shown, base) = (path.display(), base.display());
    match said {
        Some(Note::Commit) => format!(
            "a commit of '{shown}' into '{base}' was broken off. Nothing is lost: the overlay still has all of it, and \
             `diskfuse commit '{shown}'` finishes it"
        ),
        Some(Note::BlockCommit) => format!(
            "a storage daemon began to commit '{shown}' into '{base}'. If that did not end well, '{shown}' has what '{base}' \
             lacks: `diskfuse commit '{shown}'` finishes it. If it did, '{base}' is the disk, and may be newer than the \
             overlay: `diskfuse discard '{shown}'` empties that"
        ),
        Some(Note::Base(_)) | None => format!(
            "'{base}' has changed since '{shown}' was put on it, so what the two show together may make no sense. If that was a \
             commit of this overlay which was broken off, `diskfuse commit '{shown}'` finishes it; if the change was meant \
             otherwise, `setfattr -x {} '{shown}'; touch '{shown}'` says so. `diskfuse discard '{shown}'` empties the overlay: \
             what was written to it is lost",
            note::NAME
        ),
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

/// `diskfuse rebase` of an overlay that was kept: afterwards it is noted what the new base is, if it was known to go with the old one.
#[must_use = "the note is to be put right when it is over"]
pub struct Rebasing<'p> {
    overlay: &'p Path,
    fitted: bool,
}

impl<'p> Rebasing<'p> {
    /// Before anything is changed. Whoever changes only the header vouches for the new base.
    pub async fn begin(overlay: &'p Path, header_only: bool) -> Self {
        // An image that cannot be looked at is an error of the rebase itself.
        let fitted = match note::read(overlay) {
            // What a broken commit has written is hidden below the overlay, and so it is from the comparison of the bases.
            Ok(Some(Note::Commit)) => true,
            Ok(Some(said @ Note::Base(_))) => {
                header_only
                    || match base_of(overlay).await {
                        Ok(base) => note::fits(overlay, &base, Some(&said)).unwrap_or_default(),
                        Err(_) => false,
                    }
            }
            _ => false,
        };
        Self { overlay, fitted }
    }

    /// It has succeeded.
    pub async fn done(self) {
        if !self.fitted {
            return;
        }
        match base_of(self.overlay).await {
            Ok(base) => note::renew(self.overlay, &base),
            // It stands on nothing any more.
            Err(_) => note::forget(self.overlay),
        }
    }
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
    note::renew(path, &base);
    Ok(())
}
