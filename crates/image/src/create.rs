//! Making a new image. It never overwrites a file with something in it unless told to, and leaves no half-made file
//! behind.

use std::fs::File;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use diskfuse_block::drivers::FileConfig;
use diskfuse_block::{Error, Kind, Node, Resize, Result, SECTOR};
use diskfuse_qcow2::create::{self, CreateOptions};
use diskfuse_qcow2::format::Backing;

use crate::chain;
use crate::format::Format;
use crate::name::{self, Named};
use crate::open::OpenOptions;
use crate::options::NewImageOptions;
use crate::preallocation::Preallocation;
use crate::resize;
use crate::session::{FileSession, Session, to_read};

/// An image to be made.
#[derive(Clone, Debug)]
pub struct NewImage {
    /// The file or block device.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// Everything else.
    pub options: NewImageOptions,
    /// Overwrite what is there.
    pub force: bool,
    /// Do not open the backing file, which need not be there then; its format and the size have to be given.
    pub unchecked_backing: bool,
}

/// A new image. Its files are removed again unless it is [kept](Created::keep).
pub struct Created {
    /// Bytes of its disk.
    pub size: u64,
    made: Vec<Made>,
}

impl Created {
    /// It is as it should be.
    pub fn keep(mut self) {
        for made in &mut self.made {
            made.0 = None;
        }
    }
}

/// A file that was made for an image, and that nobody needs yet.
struct Made(Option<PathBuf>);

impl Drop for Made {
    fn drop(&mut self) {
        if let Some(path) = &self.0
            && let Err(error) = std::fs::remove_file(path)
        {
            tracing::warn!(path = %path.display(), %error, "a half-made image is left over");
        }
    }
}

/// Makes an image. Runs on a ring.
///
/// # Errors
/// [`Kind::Exists`] if there is something in the file and `force` is not set; [`Kind::Invalid`] for options that do not go
/// together; those of the backing file and of the host. Then nothing is left of it, but that what was to be overwritten
/// may be.
pub async fn create(new: &NewImage) -> Result<Created> {
    let NewImage {
        path,
        format,
        options,
        ..
    } = new;
    options.preallocation.check(*format)?;
    let below = match &options.backing_file {
        Some(name) => Some(look_below(new, name).await?),
        None if options.backing_fmt.is_some() => {
            return Err(invalid(
                "a format of the backing file is given, but no backing file",
            ));
        }
        None => None,
    };
    let size = options
        .size
        .or_else(|| below.as_ref().and_then(|below| below.size))
        .ok_or_else(|| invalid(format!("the size of '{}' is not given", path.display())))?
        .checked_next_multiple_of(SECTOR)
        .filter(|&size| i64::try_from(size).is_ok())
        .ok_or_else(|| invalid("the disk is too large"))?;
    let mut made = Vec::new();
    let file = empty_file(path, new.force, &mut made).await?;
    match format {
        Format::Raw => make_raw(&file, size, options.preallocation).await?,
        Format::Qcow2 => {
            let backing = below.map(|below| below.backing);
            make_qcow2(new, size, backing, &file, &mut made).await?;
        }
    }
    file.node().flush().await?;
    Ok(Created { size, made })
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(Kind::Invalid, message)
}

/// What a new image will stand on.
struct Below {
    backing: Backing,
    /// Unknown if nobody looked.
    size: Option<u64>,
}

async fn look_below(new: &NewImage, name: &str) -> Result<Below> {
    let told = new.options.backing_fmt;
    let backing = |format: Format| Backing {
        name: name.to_owned(),
        format: Some(format.name().to_owned()),
    };
    if new.unchecked_backing {
        let format = told.ok_or_else(|| invalid("the format of the backing file is not given"))?;
        return Ok(Below {
            backing: backing(format),
            size: None,
        });
    }
    let named = name::parse_beside(&new.path, name)?;
    // What is to be overwritten must not be what the new image needs, by whatever name.
    if new.path.exists() {
        chain::refuse_loop(named.clone(), told, &new.path).await?;
    }
    let image = open_backing(named, told, name).await?;
    let (format, size) = (image.format(), image.node().size());
    image.close().await?;
    Ok(Below {
        backing: backing(format),
        size: Some(size),
    })
}

/// Opens what is to be a backing file, for reading. A raw one has to be called raw.
pub(crate) async fn open_backing(
    named: Named,
    format: Option<Format>,
    name: &str,
) -> Result<Session> {
    let said = format.or(named.format);
    let options = OpenOptions {
        format,
        file: to_read(false),
        ..OpenOptions::default()
    };
    let image = Session::open_named(named, &options, "an overlay")
        .await
        .map_err(|error| Error::new(error.kind(), format!("backing file '{name}': {error}")))?;
    if said.is_none() && image.format() == Format::Raw {
        return Err(invalid(format!(
            "backing file '{name}' looks raw; if it is, say so (--backing-format raw), for its guest could have made it \
             look like anything"
        )));
    }
    Ok(image)
}

/// The file for an image: a new one, or an old one without anything in it.
async fn empty_file(path: &Path, force: bool, made: &mut Vec<Made>) -> Result<FileSession> {
    let shown = path.display();
    match path.metadata() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            File::create_new(path)
                .map_err(|error| Error::os(format_args!("Could not create '{shown}'"), error))?;
            made.push(Made(Some(path.to_owned())));
        }
        Ok(there) if !force && (there.len() > 0 || there.file_type().is_block_device()) => {
            return Err(Error::new(
                Kind::Exists,
                format!("'{shown}' exists and is not empty; --force overwrites it"),
            ));
        }
        // Whatever it is, opening it tells.
        _ => {}
    }
    let file = FileSession::open(path, &FileConfig::default(), "a new image")?;
    if !file.node().host().is_device() && file.node().host().size() > 0 {
        file.node().resize(0, Resize::Exactly, false).await?;
    }
    Ok(file)
}

async fn make_raw(file: &FileSession, size: u64, preallocation: Preallocation) -> Result<()> {
    let node = file.node();
    if node.host().is_device() {
        let room = node.size();
        return match size <= room {
            true => Ok(()),
            false => Err(invalid(format!(
                "'{}' has {room} bytes, which is less than {size}",
                node.host().path()
            ))),
        };
    }
    let preallocate = preallocation != Preallocation::Off;
    node.resize(size, Resize::Exactly, preallocate).await?;
    if preallocation == Preallocation::Full {
        resize::write_zeroes(&**node, 0, size).await?;
    }
    Ok(())
}

async fn make_qcow2(
    new: &NewImage,
    size: u64,
    backing: Option<Backing>,
    file: &FileSession,
    made: &mut Vec<Made>,
) -> Result<()> {
    let options = &new.options;
    let preallocation = options.preallocation;
    let data_file = match &options.data_file {
        Some(name) => {
            let named = name::parse_beside(&new.path, name)?;
            let data = empty_file(&named.filename, new.force, made).await?;
            make_raw(&data, size, preallocation.of_space()).await?;
            Some(data)
        }
        None => None,
    };
    let defaults = CreateOptions::default();
    let wanted = CreateOptions {
        size,
        version: options.version.unwrap_or(defaults.version),
        cluster_size: options.cluster_size.unwrap_or(defaults.cluster_size),
        refcount_bits: options.refcount_bits.unwrap_or(defaults.refcount_bits),
        extended_l2: options.extended_l2,
        lazy_refcounts: options.lazy_refcounts,
        backing,
        data_file: options.data_file.clone(),
        data_file_raw: options.data_file_raw,
        compression: options.compression,
        mapped: preallocation != Preallocation::Off,
    };
    if let Some(data) = data_file {
        data.node().flush().await?;
    }
    fill_qcow2(&**file.node(), &wanted, preallocation).await
}

/// Makes the image in a file that is empty, or a device.
async fn fill_qcow2(
    file: &dyn Node,
    wanted: &CreateOptions,
    preallocation: Preallocation,
) -> Result<()> {
    let data = create::create(file, wanted).await?;
    if file.size() < data.end {
        let preallocate = preallocation.of_space() != Preallocation::Off;
        file.resize(data.end, Resize::AtLeast, preallocate).await?;
    }
    match preallocation {
        Preallocation::Full => resize::write_zeroes(file, data.start, data.end).await,
        _ => Ok(()),
    }
}

/// Makes a plain file of `size` bytes, or empties one that is there and makes it so large. Runs on a ring.
///
/// # Errors
/// [`Kind::Busy`] if another process uses the file; those of the host. A file that was not there before is gone then.
pub async fn raw_file(path: &Path, size: u64, preallocation: Preallocation) -> Result<()> {
    preallocation.check(Format::Raw)?;
    let mut made = Vec::new();
    let file = empty_file(path, true, &mut made).await?;
    make_raw(&file, size, preallocation).await?;
    file.node().flush().await?;
    Created { size, made }.keep();
    Ok(())
}

/// Makes a qcow2 image in an open node, whose contents are lost. `options.mapped` follows from `preallocation`. Runs on a ring.
///
/// # Errors
/// [`Kind::Invalid`] for options that do not go together; those of the node.
pub async fn qcow2_on(
    file: &dyn Node,
    options: &CreateOptions,
    preallocation: Preallocation,
) -> Result<()> {
    let wanted = CreateOptions {
        mapped: preallocation != Preallocation::Off,
        ..options.clone()
    };
    if file.driver() != "host_device" {
        file.resize(0, Resize::Exactly, false).await?;
    }
    fill_qcow2(file, &wanted, preallocation).await?;
    file.flush().await
}
