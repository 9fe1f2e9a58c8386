//! `blockdev-create`: images made by jobs. What is wrong with the options, or with the nodes that they name, is the job's error, as
//! with QEMU, whose callers look there; so are the words.

use std::path::{Path, PathBuf};

use diskfuse_block::graph::{Attachment, User};
use diskfuse_block::{Error as BlockError, Kind, Permissions, Resize, SECTOR};
use diskfuse_image::{Preallocation, create};
use diskfuse_jobs::{JobConfig, JobType, run as run_job};
use diskfuse_monitor::commands::{
    BlockdevCreate, CompressionType, CreateFile, CreateOptions, CreateQcow2, PreallocMode,
    Qcow2Version,
};
use diskfuse_qcow2::create::CreateOptions as Qcow2Create;
use diskfuse_qcow2::format::{Backing, Compression};
use rustix::io::Errno;

use super::Commands;
use crate::error::{Error, Result};
use crate::qsd::live;

/// The whole command: the job has begun when it returns.
pub fn create(host: &Commands, what: &BlockdevCreate) -> Result<()> {
    let config = JobConfig {
        auto_dismiss: false,
        ..JobConfig::new(what.job_id.clone())
    };
    match &what.options {
        CreateOptions::File(file) => create_file(host, config, file),
        CreateOptions::Qcow2(qcow2) => create_qcow2(host, config, qcow2),
    }
}

fn create_file(host: &Commands, config: JobConfig, file: &CreateFile) -> Result<()> {
    let preallocation = preallocation(file.preallocation);
    let (path, size) = (PathBuf::from(&file.filename), file.size);
    let work = move || async move {
        if preallocation == Preallocation::Metadata {
            return Err(invalid("Unsupported preallocation mode: metadata"));
        }
        let made = create::raw_file(&path, size, preallocation).await;
        made.map_err(|error| of_file(&path, preallocation, &error))
    };
    run_job(&host.jobs, JobType::Create, config, work)?;
    Ok(())
}

/// Why a file could not be made.
fn of_file(path: &Path, preallocation: Preallocation, error: &BlockError) -> BlockError {
    let text = error.to_string();
    let opening = format!("Could not open '{}': ", path.display());
    let of_contents = ["resize ", "write ", "zero "]
        .iter()
        .any(|verb| text.starts_with(verb));
    let failed = match preallocation {
        Preallocation::Falloc => "Could not preallocate new data",
        // The size alone was not too much.
        Preallocation::Full if error.errno() == Errno::NOSPC.raw_os_error() => {
            "Could not write zeros for preallocation"
        }
        _ => "Could not resize file",
    };
    let text = match (text.strip_prefix(&opening), error.kind()) {
        (Some(why), _) => format!("Could not create '{}': {why}", path.display()),
        (None, Kind::Os(_)) if of_contents => format!("{failed}: {}", error.reason_first()),
        _ => text,
    };
    BlockError::new(error.kind(), text)
}

/// What a qcow2 image is made of.
struct Material {
    file: Attachment,
    data_file: Option<Attachment>,
    options: Qcow2Create,
}

fn create_qcow2(host: &Commands, config: JobConfig, what: &CreateQcow2) -> Result<()> {
    let material = match prepare(host, what) {
        // Nobody has seen a job of it yet: it is tried again.
        Err(error) if error.is_drained() => return Err(error),
        Err(Error::Block(error)) => Err(error),
        Err(error) => Err(invalid(error.to_string())),
        Ok(material) => Ok(material),
    };
    let preallocation = preallocation(what.preallocation);
    let work = move || async move {
        let Material {
            file,
            data_file,
            options,
        } = material?;
        if let Some(data) = data_file {
            let size = options.size;
            data.node()?.resize(size, Resize::Exactly, false).await?;
        }
        create::qcow2_on(&*file.node()?, &options, preallocation).await
    };
    run_job(&host.jobs, JobType::Create, config, work)?;
    Ok(())
}

fn prepare(host: &Commands, what: &CreateQcow2) -> Result<Material> {
    let file = to_be_written(host, &what.file.0)?;
    check(what)?;
    let data_file = match &what.data_file {
        None => None,
        Some(data) => Some(to_be_written(host, &data.0)?),
    };
    let name_of_data = match &data_file {
        None => None,
        Some(data) => Some(data.node()?.filename().ok_or_else(|| {
            Error::Refused(format!("Node '{}' has no file name", data.node_name()))
        })?),
    };
    Ok(Material {
        options: qcow2_options(what, name_of_data),
        file,
        data_file,
    })
}

/// The right to write a whole image to a node, which nobody else may be using for something that this would spoil.
fn to_be_written(host: &Commands, name: &str) -> Result<Attachment> {
    live::find(&host.nodes, name)?;
    let user = User {
        name: "blockdev-create".to_owned(),
        perm: Permissions::WRITER,
        // Whoever writes there would lose it.
        shared: Permissions::CONSISTENT_READ,
        drain: None,
        follows: false,
    };
    Ok(host.nodes.graph.attach(name, user)?)
}

/// The rules of QEMU for the options of a qcow2 image, in its order (`qcow2_co_create` in `block/qcow2.c`).
fn check(what: &CreateQcow2) -> Result<()> {
    let is_old = what.version == Some(Qcow2Version::V2);
    let extended = what.extended_l2 == Some(true);
    let backing = what.backing_file.is_some();
    let cluster = what
        .cluster_size
        .unwrap_or(Qcow2Create::default().cluster_size);
    let bits = what.refcount_bits.unwrap_or(16);
    let needs = |what: &str, level: &str| {
        format!("{what} compatibility level 1.1 {level} above (use version=v3 or greater)")
    };
    let only = |what: &str| needs(&format!("{what} only supported with"), "and");
    let has_bits = (1..=64).contains(&bits) && bits.cast_unsigned().is_power_of_two();
    let preallocated = !matches!(what.preallocation, None | Some(PreallocMode::Off));
    let rules = [
        (
            !what.size.is_multiple_of(SECTOR),
            "Image size must be a multiple of 512 bytes".to_owned(),
        ),
        (is_old && extended, only("Extended L2 entries are")),
        (
            !cluster.is_power_of_two() || !(512..=2 << 20).contains(&cluster),
            "Cluster size must be a power of two between 512 and 2048k".to_owned(),
        ),
        (
            extended && cluster < 16384,
            "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes"
                .to_owned(),
        ),
        (
            backing && preallocated && !extended,
            "Backing file and preallocation can only be used at the same time if extended_l2 is on"
                .to_owned(),
        ),
        (
            what.backing_fmt.is_some() && !backing,
            "Backing format cannot be used without backing file".to_owned(),
        ),
        (
            is_old && what.lazy_refcounts == Some(true),
            only("Lazy refcounts"),
        ),
        (
            !has_bits,
            "Refcount width must be a power of two and may not exceed 64 bits".to_owned(),
        ),
        (
            is_old && bits != 16,
            needs("Different refcount widths than 16 bits require", "or"),
        ),
        (
            what.data_file_raw == Some(true) && what.data_file.is_none(),
            "data-file-raw requires data-file".to_owned(),
        ),
        (
            what.data_file_raw == Some(true) && backing,
            "Backing file and data-file-raw cannot be used at the same time".to_owned(),
        ),
        (
            is_old && what.data_file.is_some(),
            only("External data files are"),
        ),
        (
            is_old && !matches!(what.compression_type, None | Some(CompressionType::Zlib)),
            only("Non-zlib compression type is"),
        ),
    ];
    let broken = rules.into_iter().find(|(is_broken, _)| *is_broken);
    broken.map_or(Ok(()), |(_, message)| Err(Error::Refused(message)))
}

/// Options that were checked.
fn qcow2_options(what: &CreateQcow2, data_file: Option<String>) -> Qcow2Create {
    let defaults = Qcow2Create::default();
    let refcount_bits = what.refcount_bits.and_then(|bits| u32::try_from(bits).ok());
    Qcow2Create {
        size: what.size,
        version: match what.version {
            Some(Qcow2Version::V2) => 2,
            Some(Qcow2Version::V3) | None => 3,
        },
        cluster_size: what.cluster_size.unwrap_or(defaults.cluster_size),
        refcount_bits: refcount_bits.unwrap_or(defaults.refcount_bits),
        extended_l2: what.extended_l2.unwrap_or(false),
        lazy_refcounts: what.lazy_refcounts.unwrap_or(false),
        backing: what.backing_file.clone().map(|name| Backing {
            name,
            format: what.backing_fmt.clone(),
        }),
        data_file,
        data_file_raw: what.data_file_raw.unwrap_or(false),
        compression: match what.compression_type {
            Some(CompressionType::Zstd) => Compression::Zstd,
            Some(CompressionType::Zlib) | None => Compression::Zlib,
        },
        ..defaults
    }
}

fn invalid(message: impl Into<String>) -> BlockError {
    BlockError::new(Kind::Invalid, message)
}

fn preallocation(mode: Option<PreallocMode>) -> Preallocation {
    match mode {
        None | Some(PreallocMode::Off) => Preallocation::Off,
        Some(PreallocMode::Metadata) => Preallocation::Metadata,
        Some(PreallocMode::Falloc) => Preallocation::Falloc,
        Some(PreallocMode::Full) => Preallocation::Full,
    }
}
