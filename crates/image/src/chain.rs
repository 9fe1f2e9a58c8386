//! Finding the files of a chain: from an image down through its backing files, opening each and reading its header. It
//! changes nothing, and never goes on for ever: a chain that comes back to a file of its own is refused, and so is one
//! that is deeper than anybody means.

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use diskfuse_block::drivers::{self, FileConfig, FileNode};
use diskfuse_block::{Error, Kind, Result};
use diskfuse_qcow2::format::Header;

use crate::format::{self, Format, Probed};
use crate::name::{self, Named, NamedBacking, Part};

/// Images of a chain at most. QEMU has no limit, and no chain that is of any use gets near.
pub const DEEPEST: usize = 200;

/// One image of a chain: its file is open, its header is read, and nothing is locked but for reading.
pub(crate) struct Layer {
    /// The file as it was named, relative names resolved.
    pub(crate) filename: PathBuf,
    pub(crate) file: Arc<FileNode>,
    pub(crate) format: Format,
    /// Nobody said the format.
    pub(crate) probed: bool,
    /// Of a raw image: only this part of it.
    pub(crate) part: Option<Part>,
    /// Of a qcow2 image.
    pub(crate) header: Option<Header>,
    /// The external data file.
    pub(crate) data_file: Option<Arc<FileNode>>,
    /// What a `json:` name said of what is below.
    backing: NamedBacking,
}

/// How to open the files.
#[derive(Clone, Debug)]
pub(crate) struct Walk<'o> {
    /// For the image itself; `filename` and `read_only` do not count.
    pub(crate) file: &'o FileConfig,
    /// Open the image itself, and its data file, for writing.
    pub(crate) writable: bool,
    /// What the image itself is.
    pub(crate) format: Option<Format>,
    /// Whether to go on to the backing files.
    pub(crate) down: bool,
    /// Whether to open external data files.
    pub(crate) data_files: bool,
}

impl Layer {
    /// The file's name, for messages.
    pub(crate) fn shown(&self) -> String {
        self.filename.display().to_string()
    }
}

/// The images from `top` down, that one first. There is one at least.
pub(crate) async fn walk(top: Named, how: &Walk<'_>) -> Result<Vec<Layer>> {
    let mut seen = Seen::default();
    let config = FileConfig {
        read_only: !how.writable,
        ..how.file.clone()
    };
    let first = open_layer(top, how.format, &config, how.data_files, &mut seen).await?;
    let mut layers = vec![first];
    while how.down
        && let Some(last) = layers.last()
        && let Some((named, told)) = below(last)?
    {
        if layers.len() >= DEEPEST {
            return Err(Error::new(
                Kind::Invalid,
                format!(
                    "'{}' stands on more than {DEEPEST} backing files; shorten the chain with `diskfuse commit` or \
                     `diskfuse convert`",
                    layers.first().map(Layer::shown).unwrap_or_default()
                ),
            ));
        }
        let layer = open_backing_layer(named, told, last, how, &mut seen).await?;
        layers.push(layer);
    }
    Ok(layers)
}

/// [`Kind::Invalid`] if the chain that begins with `named` holds the file `overlay`, which is to stand on it.
pub(crate) async fn refuse_loop(
    named: Named,
    format: Option<Format>,
    overlay: &Path,
) -> Result<()> {
    let file = FileConfig {
        read_only: true,
        ..FileConfig::default()
    };
    let how = Walk {
        file: &file,
        writable: false,
        format,
        down: true,
        data_files: true,
    };
    let layers = walk(named, &how).await?;
    let above = open_host(overlay, &file)?;
    let above = Seen::identity(&above)?;
    for layer in layers {
        let files = [Some(&layer.file), layer.data_file.as_ref()];
        for file in files.into_iter().flatten() {
            if Seen::identity(file)? == above {
                return Err(Error::new(
                    Kind::Invalid,
                    format!(
                        "'{}' stands on '{}' itself: the chain would be a loop",
                        layer.shown(),
                        overlay.display()
                    ),
                ));
            }
        }
    }
    Ok(())
}

async fn open_backing_layer(
    named: Named,
    told: Option<Format>,
    overlay: &Layer,
    how: &Walk<'_>,
    seen: &mut Seen,
) -> Result<Layer> {
    let config = read_only(how.file);
    let (filename, wanted) = (named.filename.clone(), told.or(named.format));
    let layer = open_layer(named, told, &config, how.data_files, seen)
        .await
        .map_err(|error| in_backing(&error, &filename, overlay, wanted))?;
    if layer.probed && layer.format == Format::Raw {
        return Err(Error::new(
            Kind::Invalid,
            format!(
                "backing file '{}' of '{}': the header does not say its format and it looks raw, so its guest could \
                 have made it look like anything; if it is raw, say so once: diskfuse rebase -u -b '{}' -F raw '{}'",
                filename.display(),
                overlay.shown(),
                backing_name(overlay),
                overlay.shown(),
            ),
        ));
    }
    Ok(layer)
}

/// For files that are only read.
pub(crate) fn read_only(file: &FileConfig) -> FileConfig {
    FileConfig {
        read_only: true,
        auto_read_only: false,
        discard: drivers::Discard::Ignore,
        detect_zeroes: drivers::DetectZeroes::Off,
        ..file.clone()
    }
}

/// The image below one, by its name and its header, with the format that is told.
fn below(layer: &Layer) -> Result<Option<(Named, Option<Format>)>> {
    match &layer.backing {
        NamedBacking::None => return Ok(None),
        NamedBacking::Instead(named) => return Ok(Some(((**named).clone(), named.format))),
        NamedBacking::AsInHeader => {}
    }
    let backing = layer.header.as_ref().and_then(|h| h.backing.as_ref());
    let Some(backing) = backing else {
        return Ok(None);
    };
    let within = |error: Error| {
        Error::new(
            error.kind(),
            format!(
                "backing file '{}' of '{}': {error}{}",
                backing.name,
                layer.shown(),
                remedy(layer)
            ),
        )
    };
    let named = name::parse_beside(&layer.filename, &backing.name).map_err(within)?;
    let told = backing.format.as_deref();
    let told = told.map(Format::parse).transpose().map_err(within)?;
    Ok(Some((named, told)))
}

fn backing_name(overlay: &Layer) -> &str {
    let backing = overlay.header.as_ref().and_then(|h| h.backing.as_ref());
    backing.map_or("BACKING", |backing| backing.name.as_str())
}

fn remedy(overlay: &Layer) -> String {
    format!(
        "; to name another one: diskfuse rebase -u -b BACKING -F FORMAT '{}'",
        overlay.shown()
    )
}

fn in_backing(error: &Error, filename: &Path, overlay: &Layer, told: Option<Format>) -> Error {
    let as_format = told.map_or(String::new(), |format| format!(" ({format})"));
    Error::new(
        error.kind(),
        format!(
            "backing file '{}'{as_format} of '{}': {error}{}",
            filename.display(),
            overlay.shown(),
            remedy(overlay)
        ),
    )
}

async fn open_layer(
    named: Named,
    told: Option<Format>,
    config: &FileConfig,
    data_files: bool,
    seen: &mut Seen,
) -> Result<Layer> {
    let file = open_host(&named.filename, config)?;
    seen.note(&file)?;
    let said = told.or(named.format);
    let format = match said {
        Some(format) => format,
        None => match format::probe(&*file).await? {
            Probed::Raw => Format::Raw,
            Probed::Qcow2 => Format::Qcow2,
            Probed::Other(format) => return Err(format::cannot_be_read(&named.filename, format)),
        },
    };
    let mut layer = Layer {
        filename: named.filename,
        file,
        format,
        probed: said.is_none(),
        part: named.part,
        header: None,
        data_file: None,
        backing: named.backing,
    };
    if format == Format::Qcow2 {
        let header = Header::read(&*layer.file).await?;
        if data_files && header.has_data_file() {
            layer.data_file = Some(open_data_file(&layer.filename, &header, config, seen)?);
        }
        layer.header = Some(header);
    }
    Ok(layer)
}

fn open_data_file(
    image: &Path,
    header: &Header,
    config: &FileConfig,
    seen: &mut Seen,
) -> Result<Arc<FileNode>> {
    let shown = image.display();
    let Some(name) = &header.data_file else {
        return Err(Error::new(
            Kind::Invalid,
            format!(
                "'{shown}' keeps its data in another file, and its header does not say in which"
            ),
        ));
    };
    let within = |error: Error| {
        Error::new(
            error.kind(),
            format!(
                "data file '{name}' of '{shown}': {error} (the disk's contents are in that file; bring it back to where \
                 the image looks for it, relative to the image's folder)"
            ),
        )
    };
    let named = name::parse_beside(image, name).map_err(within)?;
    let file = open_host(&named.filename, config).map_err(within)?;
    seen.note(&file).map_err(within)?;
    Ok(file)
}

/// Opens a regular file or a block device.
pub(crate) fn open_host(filename: &Path, config: &FileConfig) -> Result<Arc<FileNode>> {
    let is_device = filename
        .metadata()
        .is_ok_and(|stat| stat.file_type().is_block_device());
    let config = FileConfig {
        filename: filename.to_owned(),
        ..config.clone()
    };
    match is_device {
        true => drivers::open_host_device(&config),
        false => drivers::open_file(&config),
    }
}

/// The files of a chain so far, by what they are and not by their names.
#[derive(Default)]
struct Seen(Vec<(u64, u64)>);

impl Seen {
    /// What a file is, whatever it is called.
    fn identity(file: &FileNode) -> Result<(u64, u64)> {
        let host = file.host();
        let stat = rustix::fs::fstat(host)
            .map_err(|e| Error::os(format!("query '{}'", host.path()), e.into()))?;
        // No file lies on device 0.
        Ok(match host.is_device() {
            true => (0, stat.st_rdev),
            false => (stat.st_dev, stat.st_ino),
        })
    }

    /// [`Kind::Invalid`] if it is there already.
    fn note(&mut self, file: &FileNode) -> Result<()> {
        let identity = Self::identity(file)?;
        if self.0.contains(&identity) {
            return Err(Error::new(
                Kind::Invalid,
                format!(
                    "'{}' is in its own chain of backing files: the chain is a loop",
                    file.host().path()
                ),
            ));
        }
        self.0.push(identity);
        Ok(())
    }
}
