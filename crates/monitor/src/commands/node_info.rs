//! Answers of the queries about nodes (`qapi/block-core.json`).

use serde_json::Value;

use super::kind::{record, words};
use super::node::BlockDirtyInfo;

words! {
    /// What becomes of writes of zeroes.
    enum DetectZeroesMode {
        /// They are writes.
        Off = "off",
        /// They write zeroes.
        On = "on",
        /// They may give the space back.
        Unmap = "unmap",
    }
}

record! {
    /// One of what `query-named-block-nodes` answers (`BlockDeviceInfo`).
    struct BlockDeviceInfo {
        /// The file of the image.
        "file" file: String,
        /// The node.
        "node-name" node_name: Option<String>,
        /// Whether it refuses writes.
        "ro" ro: bool,
        /// Its driver.
        "drv" drv: String,
        /// The image below it.
        "backing_file" backing_file: Option<String>,
        /// How many images are below it.
        "backing_file_depth" backing_file_depth: i64,
        /// Whether it can be used; always.
        "active" active: bool,
        /// Whether it is encrypted.
        "encrypted" encrypted: bool,
        /// The nodes directly below it.
        "children" children: Vec<BlockdevChild>,
        /// What becomes of writes of zeroes.
        "detect_zeroes" detect_zeroes: DetectZeroesMode,
        /// A limit of bytes per second; 0: none, as in the next ones.
        "bps" bps: i64,
        /// Of bytes read.
        "bps_rd" bps_rd: i64,
        /// Of bytes written.
        "bps_wr" bps_wr: i64,
        /// Of requests.
        "iops" iops: i64,
        /// Of read requests.
        "iops_rd" iops_rd: i64,
        /// Of write requests.
        "iops_wr" iops_wr: i64,
        /// The image.
        "image" image: ImageInfo,
        /// How it is cached.
        "cache" cache: BlockdevCacheInfo,
        /// Writes beyond this byte are told of; 0: none.
        "write_threshold" write_threshold: i64,
        /// Its bitmaps.
        "dirty-bitmaps" dirty_bitmaps: Option<Vec<BlockDirtyInfo>>,
    }
}

record! {
    /// How a node is cached.
    struct BlockdevCacheInfo {
        /// Whether writes are answered before they are on stable storage.
        "writeback" writeback: bool,
        /// Whether the page cache is left out.
        "direct" direct: bool,
        /// Whether flushes are left out.
        "no-flush" no_flush: bool,
    }
}

record! {
    /// An internal snapshot (`SnapshotInfo`).
    struct SnapshotInfo {
        /// Its id.
        "id" id: String,
        /// Its name.
        "name" name: String,
        /// Bytes of the state of a machine.
        "vm-state-size" vm_state_size: i64,
        /// When it was made, in seconds since 1970.
        "date-sec" date_sec: i64,
        /// And nanoseconds.
        "date-nsec" date_nsec: i64,
        /// How long the machine had run, in seconds.
        "vm-clock-sec" vm_clock_sec: i64,
        /// And nanoseconds.
        "vm-clock-nsec" vm_clock_nsec: i64,
        /// How many instructions it had run.
        "icount" icount: Option<i64>,
    }
}

record! {
    /// An image (`ImageInfo`).
    struct ImageInfo {
        /// Its file.
        "filename" filename: String,
        /// Its format.
        "format" format: String,
        /// Whether it was left in disorder.
        "dirty-flag" dirty_flag: Option<bool>,
        /// Bytes that it takes on the host.
        "actual-size" actual_size: Option<i64>,
        /// The size of the disk, in bytes.
        "virtual-size" virtual_size: i64,
        /// The size of a cluster, in bytes.
        "cluster-size" cluster_size: Option<i64>,
        /// Whether it is encrypted.
        "encrypted" encrypted: Option<bool>,
        /// Whether it is compressed.
        "compressed" compressed: Option<bool>,
        /// The image below, as the header calls it.
        "backing-filename" backing_filename: Option<String>,
        /// The image below, as it is opened.
        "full-backing-filename" full_backing_filename: Option<String>,
        /// The format of the image below.
        "backing-filename-format" backing_filename_format: Option<String>,
        /// Internal snapshots.
        "snapshots" snapshots: Option<Vec<SnapshotInfo>>,
        /// What only this format has (`ImageInfoSpecific`).
        "format-specific" format_specific: Option<Value>,
        /// What requests it likes.
        "limits" limits: Option<BlockLimitsInfo>,
        /// The image below.
        "backing-image" backing_image: Option<Box<ImageInfo>>,
    }
}

record! {
    /// A node below another one (`BlockdevChild`).
    struct BlockdevChild {
        /// What it is to that one.
        "child" child: String,
        /// The node.
        "node-name" node_name: Option<String>,
    }
}

record! {
    /// What requests a node likes (`BlockLimitsInfo`); all of it in bytes, but for the pieces of memory of one request.
    struct BlockLimitsInfo {
        /// Requests are multiples of this.
        "request-alignment" request_alignment: i64,
        /// Discards are best multiples of this.
        "discard-alignment" discard_alignment: Option<i64>,
        /// Writes of zeroes are best multiples of this.
        "write-zeroes-alignment" write_zeroes_alignment: Option<i64>,
        /// The most that the device moves at once.
        "max-hw-transfer" max_hw_transfer: Option<i64>,
        /// Pieces of memory that one request may have.
        "max-iov" max_iov: i64,
        /// Memory must be aligned to this,
        "min-mem-alignment" min_mem_alignment: i64,
        /// and is best aligned to this.
        "opt-mem-alignment" opt_mem_alignment: i64,
    }
}

record! {
    /// One of what `query-block` answers (`BlockInfo`): a device, of which a storage daemon has none.
    struct BlockInfo {
        /// Its name.
        "device" device: String,
        /// What it is.
        "type" kind: String,
        /// Whether its medium can be taken out.
        "removable" removable: bool,
        /// Whether the guest keeps it from being taken out.
        "locked" locked: bool,
    }
}

record! {
    /// One of what `query-blockstats` answers (`BlockStats`).
    struct BlockStats {
        /// The device.
        "device" device: Option<String>,
        /// The node.
        "node-name" node_name: Option<String>,
        /// The counts.
        "stats" stats: BlockDeviceStats,
        /// The node that holds the image file.
        "parent" parent: Option<Box<BlockStats>>,
        /// The image below.
        "backing" backing: Option<Box<BlockStats>>,
    }
}

record! {
    /// Counts of a node (`BlockDeviceStats`).
    #[derive(Default)]
    struct BlockDeviceStats {
        /// Bytes read.
        "rd_bytes" rd_bytes: u64,
        /// Bytes written.
        "wr_bytes" wr_bytes: u64,
        /// Bytes appended to zones.
        "zone_append_bytes" zone_append_bytes: u64,
        /// Bytes discarded.
        "unmap_bytes" unmap_bytes: u64,
        /// Reads.
        "rd_operations" rd_operations: u64,
        /// Writes.
        "wr_operations" wr_operations: u64,
        /// Appends to zones.
        "zone_append_operations" zone_append_operations: u64,
        /// Flushes.
        "flush_operations" flush_operations: u64,
        /// Discards.
        "unmap_operations" unmap_operations: u64,
        /// Nanoseconds of all reads.
        "rd_total_time_ns" rd_total_time_ns: u64,
        /// Nanoseconds of all writes.
        "wr_total_time_ns" wr_total_time_ns: u64,
        /// Nanoseconds of all appends.
        "zone_append_total_time_ns" zone_append_total_time_ns: u64,
        /// Nanoseconds of all flushes.
        "flush_total_time_ns" flush_total_time_ns: u64,
        /// Nanoseconds of all discards.
        "unmap_total_time_ns" unmap_total_time_ns: u64,
        /// The end of the highest write, in bytes.
        "wr_highest_offset" wr_highest_offset: u64,
        /// Reads that were merged with others.
        "rd_merged" rd_merged: u64,
        /// Writes that were merged with others.
        "wr_merged" wr_merged: u64,
        /// Appends that were merged with others.
        "zone_append_merged" zone_append_merged: u64,
        /// Discards that were merged with others.
        "unmap_merged" unmap_merged: u64,
        /// Nanoseconds since the last request.
        "idle_time_ns" idle_time_ns: Option<u64>,
        /// Reads that failed.
        "failed_rd_operations" failed_rd_operations: u64,
        /// Writes that failed.
        "failed_wr_operations" failed_wr_operations: u64,
        /// Appends that failed.
        "failed_zone_append_operations" failed_zone_append_operations: u64,
        /// Flushes that failed.
        "failed_flush_operations" failed_flush_operations: u64,
        /// Discards that failed.
        "failed_unmap_operations" failed_unmap_operations: u64,
        /// Reads that could not be.
        "invalid_rd_operations" invalid_rd_operations: u64,
        /// Writes that could not be.
        "invalid_wr_operations" invalid_wr_operations: u64,
        /// Appends that could not be.
        "invalid_zone_append_operations" invalid_zone_append_operations: u64,
        /// Flushes that could not be.
        "invalid_flush_operations" invalid_flush_operations: u64,
        /// Discards that could not be.
        "invalid_unmap_operations" invalid_unmap_operations: u64,
        /// Whether those that could not be count for the time since the last request.
        "account_invalid" account_invalid: bool,
        /// Whether those that failed do.
        "account_failed" account_failed: bool,
        /// Statistics of intervals; always empty.
        "timed_stats" timed_stats: Vec<Value>,
    }
}
