//! Arguments and answers of the commands about nodes (`qapi/block-core.json`).

use serde_json::Value;

use super::kind::{Kind, Members, Readable, record, words};
use super::shape::{Definition, MemberShape, Shape};
use crate::blockdev::BlockdevOptions;
use crate::error::Error;
use crate::fields::{self, Item};

record! {
    /// `blockdev-del`.
    args struct BlockdevDel {
        /// The node.
        "node-name" node_name: String,
    }
}

record! {
    /// `blockdev-reopen`.
    args struct BlockdevReopen {
        /// The nodes, and all that is to hold for them from now on.
        "options" options: Vec<BlockdevOptions>,
    }
}

record! {
    /// `block_resize`.
    args struct BlockResize {
        /// A device, which is what QEMU calls a node with a guest; here another word for the node.
        "device" device: Option<String>,
        /// The node.
        "node-name" node_name: Option<String>,
        /// Its new size in bytes. Negative ones are for the handler to refuse.
        "size" size: i64,
    }
}

record! {
    /// `block_set_io_throttle` (`BlockIOThrottle`). All numbers are per second unless said otherwise; 0: no limit.
    args struct BlockSetIoThrottle {
        /// The device.
        "device" device: Option<String>,
        /// The same.
        "id" id: Option<String>,
        /// Bytes.
        "bps" bps: i64,
        /// Bytes read.
        "bps_rd" bps_rd: i64,
        /// Bytes written.
        "bps_wr" bps_wr: i64,
        /// Requests.
        "iops" iops: i64,
        /// Read requests.
        "iops_rd" iops_rd: i64,
        /// Write requests.
        "iops_wr" iops_wr: i64,
        /// Bytes in bursts.
        "bps_max" bps_max: Option<i64>,
        /// Bytes read in bursts.
        "bps_rd_max" bps_rd_max: Option<i64>,
        /// Bytes written in bursts.
        "bps_wr_max" bps_wr_max: Option<i64>,
        /// Requests in bursts.
        "iops_max" iops_max: Option<i64>,
        /// Read requests in bursts.
        "iops_rd_max" iops_rd_max: Option<i64>,
        /// Write requests in bursts.
        "iops_wr_max" iops_wr_max: Option<i64>,
        /// The longest burst in seconds.
        "bps_max_length" bps_max_length: Option<i64>,
        /// The longest burst of reading in seconds.
        "bps_rd_max_length" bps_rd_max_length: Option<i64>,
        /// The longest burst of writing in seconds.
        "bps_wr_max_length" bps_wr_max_length: Option<i64>,
        /// The longest burst of requests in seconds.
        "iops_max_length" iops_max_length: Option<i64>,
        /// The longest burst of read requests in seconds.
        "iops_rd_max_length" iops_rd_max_length: Option<i64>,
        /// The longest burst of write requests in seconds.
        "iops_wr_max_length" iops_wr_max_length: Option<i64>,
        /// Bytes that count as one request.
        "iops_size" iops_size: Option<i64>,
        /// The throttle group.
        "group" group: Option<String>,
    }
}

record! {
    /// `change-backing-file`.
    args struct ChangeBackingFile {
        /// The node at the top of the chain.
        "device" device: String,
        /// The node whose header is changed.
        "image-node-name" image_node_name: String,
        /// What the header says from now on.
        "backing-file" backing_file: String,
    }
}

record! {
    /// `block-set-write-threshold`.
    args struct BlockSetWriteThreshold {
        /// The node.
        "node-name" node_name: String,
        /// Writes that end beyond this byte are told of, once; 0: none.
        "write-threshold" write_threshold: u64,
    }
}

record! {
    /// `query-named-block-nodes`.
    args struct QueryNamedBlockNodes {
        /// Whether the images below are left out of each image; by default not.
        "flat" flat: Option<bool>,
    }
}

record! {
    /// `query-blockstats`.
    args struct QueryBlockstats {
        /// Whether all nodes are told of and not only those with a guest; by default not.
        "query-nodes" query_nodes: Option<bool>,
    }
}

record! {
    /// A bitmap (`BlockDirtyInfo`).
    struct BlockDirtyInfo {
        /// Its name.
        "name" name: Option<String>,
        /// Dirty bytes.
        "count" count: i64,
        /// Bytes that one bit stands for.
        "granularity" granularity: i64,
        /// Whether it records.
        "recording" recording: bool,
        /// Whether a job uses it.
        "busy" busy: bool,
        /// Whether it is kept in the image.
        "persistent" persistent: bool,
        /// Whether it cannot be trusted.
        "inconsistent" inconsistent: Option<bool>,
    }
}

record! {
    /// `blockdev-create`.
    args struct BlockdevCreate {
        /// The job's id.
        "job-id" job_id: String,
        /// What to make.
        "options" options: CreateOptions,
    }
}

words! {
    /// How much of a new image is allocated at once (`PreallocMode`).
    enum PreallocMode {
        /// Nothing.
        Off = "off",
        /// The metadata.
        Metadata = "metadata",
        /// And space for the data.
        Falloc = "falloc",
        /// And zeroes written to it.
        Full = "full",
    }
}

words! {
    /// The version of a qcow2 image (`BlockdevQcow2Version`).
    enum Qcow2Version {
        /// `compat=0.10`.
        V2 = "v2",
        /// `compat=1.1`.
        V3 = "v3",
    }
}

words! {
    /// How a qcow2 image compresses (`Qcow2CompressionType`).
    enum CompressionType {
        /// zlib.
        Zlib = "zlib",
        /// zstd.
        Zstd = "zstd",
    }
}

record! {
    /// A new file (`BlockdevCreateOptionsFile`).
    args struct CreateFile {
        /// Its path.
        "filename" filename: String,
        /// Its size in bytes.
        "size" size: u64,
        /// How much of it is allocated; metadata does not exist here.
        "preallocation" preallocation: Option<PreallocMode>,
        /// Whether copy-on-write is switched off (btrfs).
        "nocow" nocow: Option<bool>,
        /// A hint for the size of its extents, in bytes (XFS).
        "extent-size-hint" extent_size_hint: Option<u64>,
    }
}

record! {
    /// A new qcow2 image in a node (`BlockdevCreateOptionsQcow2`).
    args struct CreateQcow2 {
        /// The node that holds it.
        "file" file: NodeRef,
        /// The node that holds its data.
        "data-file" data_file: Option<NodeRef>,
        /// Whether that can be read as a raw image.
        "data-file-raw" data_file_raw: Option<bool>,
        /// Whether clusters have subclusters.
        "extended-l2" extended_l2: Option<bool>,
        /// The size of the disk in bytes.
        "size" size: u64,
        /// The version; by default v3.
        "version" version: Option<Qcow2Version>,
        /// The image below.
        "backing-file" backing_file: Option<String>,
        /// Its format.
        "backing-fmt" backing_fmt: Option<String>,
        /// Bytes of a cluster: a power of two from 512 to 2 MiB; by default 64 KiB.
        "cluster-size" cluster_size: Option<u64>,
        /// How much of it is allocated.
        "preallocation" preallocation: Option<PreallocMode>,
        /// Whether refcounts may be written late.
        "lazy-refcounts" lazy_refcounts: Option<bool>,
        /// Bits of a refcount; by default 16.
        "refcount-bits" refcount_bits: Option<i64>,
        /// How it compresses; by default zlib.
        "compression-type" compression_type: Option<CompressionType>,
    }
}

/// What `blockdev-create` makes (`BlockdevCreateOptions`).
#[derive(Debug, Clone, PartialEq)]
pub enum CreateOptions {
    /// A file.
    File(CreateFile),
    /// A qcow2 image.
    Qcow2(CreateQcow2),
}

impl Kind for CreateOptions {
    fn shape() -> Shape {
        Shape::Named("CreateOptions", || Definition::Object {
            members: vec![MemberShape {
                name: "driver",
                optional: false,
                shape: Shape::Named("CreateDriver", || Definition::Enum(vec!["file", "qcow2"])),
            }],
            variants: Some((
                "driver",
                vec![
                    ("file", CreateFile::shape()),
                    ("qcow2", CreateQcow2::shape()),
                ],
            )),
        })
    }

    fn to_value(&self) -> Value {
        let (driver, mut value) = match self {
            Self::File(file) => ("file", file.to_value()),
            Self::Qcow2(qcow2) => ("qcow2", qcow2.to_value()),
        };
        if let Some(members) = value.as_object_mut() {
            members.insert("driver".to_owned(), Value::from(driver));
        }
        value
    }
}

impl Readable for CreateOptions {
    fn from_item(item: &Item<'_>) -> Result<Self, Error> {
        let mut fields = item.group()?;
        let driver = fields.text("driver")?;
        let options = match fields.require("driver", driver)? {
            "file" => CreateFile::read(&mut fields).map(Self::File)?,
            "qcow2" => {
                fields.not_built(&["encrypt"])?;
                CreateQcow2::read(&mut fields).map(Self::Qcow2)?
            }
            driver => return Err(refuse_driver(driver)),
        };
        fields.finish()?;
        Ok(options)
    }
}

/// A driver that makes nothing, or does not exist.
fn refuse_driver(driver: &str) -> Error {
    if BlockdevOptions::driver_names().any(|name| name == driver) {
        return Error::DriverMakesNothing;
    }
    fields::bad_value("driver", driver, BlockdevOptions::driver_names())
}

/// A node that another one is made in. Only names are taken: what is written inside could not be named afterwards.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeRef(pub String);

impl Kind for NodeRef {
    fn shape() -> Shape {
        Shape::Builtin("str")
    }

    fn to_value(&self) -> Value {
        Value::from(self.0.as_str())
    }
}

impl Readable for NodeRef {
    fn from_item(item: &Item<'_>) -> Result<Self, Error> {
        match item.value {
            Value::String(name) => Ok(Self(name.clone())),
            Value::Object(_) => Err(Error::NotBuilt {
                what: format!(
                    "a node inside '{}' (make it by blockdev-add first)",
                    item.name
                ),
            }),
            _ => Err(item.wrong_type("BlockdevRef")),
        }
    }
}
