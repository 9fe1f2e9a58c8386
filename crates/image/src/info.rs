//! What is to be said about an image without looking at its disk. It reads headers and tables only, and changes nothing.
//! The fields and their names are those of `qemu-img info --output=json`.

use std::path::Path;

use diskfuse_block::{Node, Result, SECTOR, downcast};
use diskfuse_qcow2::format::{Compression, Encryption, Header};
use diskfuse_qcow2::node::Qcow2Node;
use diskfuse_qcow2::snapshots::SnapshotInfo;
use serde::Serialize;

use crate::bitmaps::{self, BitmapInfo};
use crate::chain::{self, Layer, Walk};
use crate::format::Format;
use crate::name;
use crate::session;

/// One image.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ImageInfo {
    /// The nodes that it stands on.
    pub children: Vec<Child>,
    /// The format of the backing file, as the header says it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing_filename_format: Option<String>,
    /// The snapshots inside, if there are any.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub snapshots: Vec<Snapshot>,
    /// Bytes of the disk.
    pub virtual_size: u64,
    /// The file, as it was named.
    pub filename: String,
    /// Bytes of a cluster.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster_size: Option<u64>,
    /// `qcow2`, `raw`, or `file` and `host_device` for a file itself.
    pub format: String,
    /// Bytes that it takes on the host.
    pub actual_size: u64,
    /// Whether the disk is encrypted; said only if it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub encrypted: Option<bool>,
    /// What only this format has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format_specific: Option<Specific>,
    /// The backing file, relative names resolved.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub full_backing_filename: Option<String>,
    /// The backing file, as the header has it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing_filename: Option<String>,
    /// The image was not closed: its refcounts are to be repaired by the next one who writes it.
    pub dirty_flag: bool,
}

/// A node below an image.
#[derive(Clone, Debug, Serialize)]
pub struct Child {
    /// What it is to the image: `file`.
    pub name: String,
    /// What is to be said about it.
    pub info: Box<ImageInfo>,
}

/// What only one format has.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "type", content = "data", rename_all = "lowercase")]
pub enum Specific {
    /// Of a qcow2 image.
    Qcow2(Qcow2Info),
    /// Of a file.
    File(Nothing),
}

/// An object without fields.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Nothing {}

/// What only a qcow2 image has.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Qcow2Info {
    /// `0.10` for version 2 of the format, `1.1` for version 3.
    pub compat: String,
    /// `zlib` or `zstd`.
    pub compression_type: String,
    /// Refcounts may be updated lazily. Version 3 only, as most of what follows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lazy_refcounts: Option<bool>,
    /// The persistent bitmaps, if there are any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bitmaps: Option<Vec<BitmapInfo>>,
    /// Bits of a refcount.
    pub refcount_bits: u32,
    /// The file that the data is in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_file: Option<String>,
    /// Whether that file is a raw image of the disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_file_raw: Option<bool>,
    /// Somebody found that the image contradicts itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub corrupt: Option<bool>,
    /// Clusters have subclusters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub extended_l2: Option<bool>,
    /// How the disk is encrypted; said only if it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub encrypt: Option<EncryptInfo>,
}

/// How a disk is encrypted.
#[derive(Clone, Debug, Serialize)]
pub struct EncryptInfo {
    /// `aes` or `luks`.
    pub format: String,
}

/// A snapshot inside an image.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Snapshot {
    /// Instructions counted when it was taken; only if that was counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub icount: Option<u64>,
    /// The guest's clock, the part below a second, in nanoseconds.
    pub vm_clock_nsec: u64,
    /// What people call it.
    pub name: String,
    /// When it was taken, in seconds since 1970.
    pub date_sec: u64,
    /// The part of that below a second, in nanoseconds.
    pub date_nsec: u64,
    /// The guest's clock, in seconds.
    pub vm_clock_sec: u64,
    /// Its id.
    pub id: String,
    /// Bytes of the state of the guest's machine that is kept with it.
    pub vm_state_size: u64,
}

impl From<SnapshotInfo> for Snapshot {
    fn from(snapshot: SnapshotInfo) -> Self {
        const SECOND: u64 = 1_000_000_000;
        let clock = snapshot.vm_clock_nanoseconds;
        Self {
            // All ones: not counted.
            icount: snapshot.icount.filter(|&count| count != u64::MAX),
            vm_clock_nsec: clock % SECOND,
            name: snapshot.name,
            date_sec: u64::from(snapshot.date_seconds),
            date_nsec: u64::from(snapshot.date_nanoseconds),
            vm_clock_sec: clock / SECOND,
            id: snapshot.id,
            vm_state_size: snapshot.vm_state_size,
        }
    }
}

/// What to look at.
#[derive(Clone, Copy, Debug, Default)]
pub struct InfoOptions {
    /// What the image is; found out if not given.
    pub format: Option<Format>,
    /// Go on to the backing files.
    pub chain: bool,
    /// Bear with others that write the image; what is said may make no sense then.
    pub share: bool,
}

/// Everything to be said about an image, and about those below it if asked for: that one first.
///
/// # Errors
/// As those of [`open`](crate::open()).
pub async fn info(name: &Path, options: InfoOptions) -> Result<Vec<ImageInfo>> {
    let file = session::to_read(options.share);
    let how = Walk {
        file: &file,
        writable: false,
        format: options.format,
        down: options.chain,
        data_files: false,
    };
    let layers = chain::walk(name::parse_argument(name)?, &how).await?;
    let _held = match options.share {
        true => Vec::new(),
        false => session::hold_files(&layers)?,
    };
    let mut all = Vec::new();
    for layer in &layers {
        all.push(of_layer(layer).await?);
    }
    Ok(all)
}

async fn of_layer(layer: &Layer) -> Result<ImageInfo> {
    let file = of_file(layer);
    let base = ImageInfo {
        children: vec![Child {
            name: "file".to_owned(),
            info: Box::new(file.clone()),
        }],
        format: layer.format.name().to_owned(),
        format_specific: None,
        ..file
    };
    match &layer.header {
        None => Ok(base),
        Some(header) => of_qcow2(&*layer.file, &layer.filename, header, base).await,
    }
}

/// What is to be said about a node that is open, in the same words.
///
/// # Errors
/// Those of reading what is not kept in memory: the table of snapshots and the bitmaps' directory of a qcow2 image.
pub async fn of_node(node: &dyn Node) -> Result<ImageInfo> {
    let filename = node.filename().unwrap_or_default();
    let base = ImageInfo {
        children: Vec::new(),
        backing_filename_format: None,
        snapshots: Vec::new(),
        virtual_size: node.size(),
        filename: match filename.is_empty() {
            true => format!("{}://", node.driver()),
            false => filename.clone(),
        },
        cluster_size: None,
        format: node.driver().to_owned(),
        actual_size: node.allocated(),
        encrypted: None,
        format_specific: None,
        full_backing_filename: None,
        backing_filename: None,
        dirty_flag: false,
    };
    match downcast::<Qcow2Node>(node) {
        None => Ok(base),
        Some(image) => {
            let (file, header) = (image.children().file, image.header());
            of_qcow2(&*file, Path::new(&filename), &header, base).await
        }
    }
}

/// The file itself.
fn of_file(layer: &Layer) -> ImageInfo {
    ImageInfo {
        children: Vec::new(),
        backing_filename_format: None,
        snapshots: Vec::new(),
        // As QEMU rounds it.
        virtual_size: layer.file.size().next_multiple_of(SECTOR),
        filename: layer.shown(),
        cluster_size: None,
        format: layer.file.driver().to_owned(),
        actual_size: layer.file.allocated(),
        encrypted: None,
        format_specific: match layer.file.driver() {
            "file" => Some(Specific::File(Nothing {})),
            _ => None,
        },
        full_backing_filename: None,
        backing_filename: None,
        dirty_flag: false,
    }
}

async fn of_qcow2(
    file: &dyn Node,
    filename: &Path,
    header: &Header,
    base: ImageInfo,
) -> Result<ImageInfo> {
    let snapshots = diskfuse_qcow2::snapshots::list(file).await?;
    let bitmaps = bitmaps::list(file, header).await?;
    let is_v3 = header.version >= 3;
    let encryption = match header.encryption {
        Encryption::None => None,
        Encryption::Aes => Some("aes"),
        Encryption::Luks => Some("luks"),
    };
    let specific = Qcow2Info {
        compat: match is_v3 {
            true => "1.1".to_owned(),
            false => "0.10".to_owned(),
        },
        compression_type: match header.compression {
            Compression::Zlib => "zlib".to_owned(),
            Compression::Zstd => "zstd".to_owned(),
        },
        lazy_refcounts: is_v3.then(|| header.lazy_refcounts()),
        bitmaps: (!bitmaps.is_empty()).then_some(bitmaps),
        refcount_bits: header.geometry.refcount_bits(),
        data_file: header.data_file.clone(),
        data_file_raw: header.has_data_file().then(|| header.data_file_raw()),
        corrupt: is_v3.then(|| header.is_corrupt()),
        extended_l2: is_v3.then(|| header.geometry.extended_l2()),
        encrypt: encryption.map(|format| EncryptInfo {
            format: format.to_owned(),
        }),
    };
    let backing = header.backing.as_ref();
    Ok(ImageInfo {
        backing_filename_format: backing.and_then(|b| b.format.clone()),
        snapshots: snapshots.into_iter().map(Snapshot::from).collect(),
        virtual_size: header.size.next_multiple_of(SECTOR),
        cluster_size: Some(header.geometry.cluster_size()),
        encrypted: encryption.map(|_| true),
        format_specific: Some(Specific::Qcow2(specific)),
        full_backing_filename: backing.map(|b| name::full_name(filename, &b.name)),
        backing_filename: backing.map(|b| b.name.clone()),
        dirty_flag: header.is_dirty(),
        ..base
    })
}
