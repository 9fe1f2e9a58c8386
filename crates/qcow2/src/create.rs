//! Making an image in an empty file: its header and tables, laid out in one piece. It must never leave a header that
//! names tables which are not there: the header is written last.
//!
//! The order in the file is header, refcount table, refcount blocks, L1 table, and, if every cluster gets its place at
//! once, L2 tables and data. (Source: QEMU's `docs/interop/qcow2` specification; the limits are those of `qemu-img`.)

use std::ops::Range;

use diskfuse_block::{Error, Kind, Node, Resize, Result, SECTOR, Zeroes, io};
use diskfuse_ring::Buf;

use crate::format::{
    Backing, Compression, Geometry, Header, L1Entry, Mapping, Subclusters, features, refcount,
};

/// Bytes written at once.
const PIECE: usize = 1 << 20;
/// Bytes of the largest L1 and refcount tables (as QEMU bounds them).
const MAX_L1: u64 = 32 << 20;
const MAX_REFCOUNT_TABLE: u64 = 8 << 20;

/// What a new image is to be like.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// Bytes of the disk, a multiple of 512.
    pub size: u64,
    /// 2 or 3.
    pub version: u32,
    /// Bytes of a cluster.
    pub cluster_size: u64,
    /// Bits of a refcount.
    pub refcount_bits: u32,
    /// Subclusters.
    pub extended_l2: bool,
    /// Whoever opens it may keep refcounts behind.
    pub lazy_refcounts: bool,
    /// What shows where nothing was written.
    pub backing: Option<Backing>,
    /// The file for the data, as it is to stand in the header.
    pub data_file: Option<String>,
    /// That file is a raw image of the disk by itself.
    pub data_file_raw: bool,
    /// How clusters are compressed, if they are.
    pub compression: Compression,
    /// Every cluster gets its place now. With a backing file this takes subclusters, as it must go on showing.
    pub mapped: bool,
}

impl Default for CreateOptions {
    fn default() -> Self {
        Self {
            size: 0,
            version: 3,
            cluster_size: 65536,
            refcount_bits: 16,
            extended_l2: false,
            lazy_refcounts: false,
            backing: None,
            data_file: None,
            data_file_raw: false,
            compression: Compression::Zlib,
            mapped: false,
        }
    }
}

/// Where everything goes: numbers of clusters.
#[derive(Debug)]
struct Layout {
    geometry: Geometry,
    refcount_table: Range<u64>,
    refcount_blocks: Range<u64>,
    l1: Range<u64>,
    l1_entries: u64,
    l2: Range<u64>,
    data: Range<u64>,
}

/// Makes the image in `file`, which is empty, or a block device. Returns the bytes of the file that hold the disk's
/// data if every cluster was given a place there, else an empty range; the file ends there or before, and whoever calls
/// makes it as long, allocated or not.
///
/// # Errors
/// [`Kind::Invalid`] for options that do not go together, before anything is written; those of the file.
pub async fn create(file: &dyn Node, options: &CreateOptions) -> Result<Range<u64>> {
    let header = header(options)?;
    let layout = Layout::new(options, header.geometry)?;
    let header = layout.complete(header)?;
    let bytes = header.encode()?;
    let cluster = layout.geometry.cluster_size();
    let end = layout.data.start * cluster;
    let is_new = file.size() == 0;
    if file.size() < end {
        file.resize(end, Resize::AtLeast, false).await?;
    }
    layout.write_tables(file, options).await?;
    let data = end..layout.data.end * cluster;
    if !is_new && !data.is_empty() {
        // A device: it holds what it held.
        if file.size() < data.end {
            let message = format!(
                "the image needs {} bytes, and there are {}",
                data.end,
                file.size()
            );
            return Err(Error::new(Kind::Os(libc::ENOSPC), message));
        }
        file.write_zeroes(data.start, data.end - data.start, Zeroes::MayUnmap)
            .await?;
    }
    file.flush().await?;
    let mut first = buffer(cluster as usize)?;
    first.as_mut_slice()[..bytes.len()].copy_from_slice(&bytes);
    io::write(file, 0, first).await.0?;
    file.flush().await?;
    Ok(data)
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(Kind::Invalid, message)
}

fn buffer(len: usize) -> Result<Buf> {
    Buf::new(len).map_err(|e| Error::os(format!("allocate {len} bytes"), e))
}

/// The header, without the places of tables.
fn header(options: &CreateOptions) -> Result<Header> {
    check(options)?;
    let power = |what: &str, value: u64| match value.is_power_of_two() {
        true => Ok(value.trailing_zeros()),
        false => Err(invalid(format!(
            "{what} must be a power of two, not {value}"
        ))),
    };
    let cluster_bits = power("the cluster size", options.cluster_size)?;
    let refcount_order = power("the number of refcount bits", options.refcount_bits.into())?;
    let geometry = Geometry::new(cluster_bits, refcount_order, options.extended_l2)
        .map_err(|error| invalid(error.to_string()))?
        .with_external_data(options.data_file.is_some());
    let mut header = Header::new(options.version, geometry, options.size);
    let mut set = |feature, is_set| header.incompatible |= if is_set { feature } else { 0 };
    set(features::EXTENDED_L2, options.extended_l2);
    set(features::DATA_FILE, options.data_file.is_some());
    set(
        features::COMPRESSION,
        options.compression != Compression::Zlib,
    );
    if options.lazy_refcounts {
        header.compatible |= features::LAZY_REFCOUNTS;
    }
    if options.data_file_raw {
        header.autoclear |= features::RAW_DATA;
    }
    header.compression = options.compression;
    header.backing.clone_from(&options.backing);
    header.data_file.clone_from(&options.data_file);
    Ok(header)
}

/// What goes together, and what does not.
fn check(options: &CreateOptions) -> Result<()> {
    let refuse = |message: &str| Err(invalid(message));
    if !options.size.is_multiple_of(SECTOR) || i64::try_from(options.size).is_err() {
        return refuse("the size of a disk is a multiple of 512 bytes, below 8 EiB");
    }
    match options.version {
        3 => {}
        2 => {
            let newer = [
                (
                    options.refcount_bits != 16,
                    "refcounts of other than 16 bits",
                ),
                (options.extended_l2, "extended_l2"),
                (options.lazy_refcounts, "lazy_refcounts"),
                (options.data_file.is_some(), "a data file"),
                (
                    options.compression != Compression::Zlib,
                    "another compression than zlib",
                ),
            ];
            if let Some((_, what)) = newer.iter().find(|(is_set, _)| *is_set) {
                return refuse(&format!(
                    "version 2 (compat=0.10) has no {what}: use compat=1.1"
                ));
            }
        }
        other => return refuse(&format!("there is no version {other} of qcow2")),
    }
    if options.data_file_raw && options.data_file.is_none() {
        return refuse("data_file_raw needs a data_file");
    }
    if options.data_file_raw && options.backing.is_some() {
        return refuse("a raw data file shows all of the disk, so there can be no backing file");
    }
    if options.mapped && options.backing.is_some() && !options.extended_l2 {
        return refuse("with a backing file, preallocation needs extended_l2=on");
    }
    Ok(())
}

impl Layout {
    fn new(options: &CreateOptions, geometry: Geometry) -> Result<Self> {
        let size = geometry.cluster_size();
        let l1_entries = geometry.l1_entries_for(options.size);
        let is_external = options.data_file.is_some();
        // A raw data file must be usable without the image, now and later: every cluster has its place at once.
        let is_mapped = options.mapped || options.data_file_raw;
        let l1 = (l1_entries * 8).div_ceil(size);
        let l2 = if is_mapped { l1_entries } else { 0 };
        let data = match is_mapped && !is_external {
            true => options.size.div_ceil(size),
            false => 0,
        };
        let (table, blocks) = Self::refcounts(geometry, 1 + l1 + l2 + data);
        if l1_entries * 8 > MAX_L1 || table * size > MAX_REFCOUNT_TABLE.max(size) {
            return Err(invalid(format!(
                "a disk of {} bytes is too large for clusters of {size} bytes: use a larger cluster_size",
                options.size
            )));
        }
        let mut at = 1;
        let mut take = |clusters| {
            at += clusters;
            at - clusters..at
        };
        Ok(Self {
            geometry,
            refcount_table: take(table),
            refcount_blocks: take(blocks),
            l1: take(l1),
            l1_entries,
            l2: take(l2),
            data: take(data),
        })
    }

    /// Clusters of the refcount table and blocks that count themselves and `others`.
    fn refcounts(geometry: Geometry, others: u64) -> (u64, u64) {
        let (mut table, mut blocks) = (1, 1);
        loop {
            let needed = (others + table + blocks).div_ceil(geometry.refcounts_per_block());
            let needed_table = (needed * 8).div_ceil(geometry.cluster_size());
            if needed <= blocks && needed_table <= table {
                return (table, blocks);
            }
            (table, blocks) = (needed_table.max(table), needed.max(blocks));
        }
    }

    /// The header with the places of the tables.
    fn complete(&self, mut header: Header) -> Result<Header> {
        let bits = self.geometry.cluster_bits();
        let too_large = |_| invalid("the disk is too large");
        header.l1_size = u32::try_from(self.l1_entries).map_err(too_large)?;
        header.l1_offset = if self.l1.is_empty() {
            0
        } else {
            self.l1.start << bits
        };
        header.refcount_table_offset = self.refcount_table.start << bits;
        let clusters = self.refcount_table.end - self.refcount_table.start;
        header.refcount_table_clusters = u32::try_from(clusters).map_err(too_large)?;
        Ok(header)
    }

    async fn write_tables(&self, file: &dyn Node, options: &CreateOptions) -> Result<()> {
        let size = self.geometry.cluster_size();
        let mut out = Writer::new(file, size);
        self.write_refcounts(&mut out).await?;
        let l1_entry = |index: u64| match self.l2.start + index {
            table if table < self.l2.end => L1Entry::new(table * size, true).0,
            _ => 0,
        };
        for cluster in 0..self.l1.end - self.l1.start {
            let first = cluster * size / 8;
            out.words(|n| l1_entry(first + n)).await?;
        }
        let count = options.size.div_ceil(size);
        let per_table = self.geometry.l2_entries();
        let step = self.geometry.words_per_entry() as u64;
        let subclusters = match options.backing {
            Some(_) => Subclusters(0).0,
            None => Subclusters::ALL_ALLOCATED.0,
        };
        for table in 0..self.l2.end - self.l2.start {
            out.words(|n| match table * per_table + n / step {
                guest if guest >= count => 0,
                guest if n % step == 0 => self.entry(guest),
                _ => subclusters,
            })
            .await?;
        }
        out.finish().await
    }

    /// The refcount table, and its blocks: everything that there is is used once.
    async fn write_refcounts(&self, out: &mut Writer<'_>) -> Result<()> {
        let geometry = self.geometry;
        let size = geometry.cluster_size();
        for cluster in 0..self.refcount_table.end - self.refcount_table.start {
            let first = self.refcount_blocks.start + cluster * size / 8;
            out.words(|n| match first + n {
                block if block < self.refcount_blocks.end => block * size,
                _ => 0,
            })
            .await?;
        }
        let per_block = geometry.refcounts_per_block();
        for block in 0..self.refcount_blocks.end - self.refcount_blocks.start {
            let used = (self.data.end - block * per_block).min(per_block);
            let bytes = out.cluster().await?;
            for n in 0..used as usize {
                refcount::set(bytes, geometry.refcount_order(), n, 1);
            }
        }
        Ok(())
    }

    /// The word for a guest cluster that has its place from the beginning.
    fn entry(&self, guest: u64) -> u64 {
        let cluster = match self.geometry.external_data() {
            true => guest,
            false => self.data.start + guest,
        };
        let host = cluster * self.geometry.cluster_size();
        Mapping::Normal { host, copied: true }.encode(self.geometry)
    }
}

/// Writes consecutive clusters from the second one on, many at once.
struct Writer<'f> {
    file: &'f dyn Node,
    cluster_size: usize,
    buf: Option<Buf>,
    filled: usize,
    at: u64,
}

impl<'f> Writer<'f> {
    fn new(file: &'f dyn Node, cluster_size: u64) -> Self {
        Self {
            file,
            cluster_size: cluster_size as usize,
            buf: None,
            filled: 0,
            at: cluster_size,
        }
    }

    /// The next cluster's bytes, all zero.
    async fn cluster(&mut self) -> Result<&mut [u8]> {
        let room = PIECE.max(self.cluster_size);
        if self.filled + self.cluster_size > room {
            self.write().await?;
        }
        let buf = match self.buf.take() {
            Some(buf) => buf,
            None => buffer(room)?,
        };
        let start = self.filled;
        self.filled += self.cluster_size;
        let bytes = &mut self.buf.insert(buf).as_mut_slice()[start..self.filled];
        bytes.fill(0);
        Ok(bytes)
    }

    /// A cluster of big-endian words.
    async fn words(&mut self, word: impl Fn(u64) -> u64) -> Result<()> {
        let (words, _) = self.cluster().await?.as_chunks_mut::<8>();
        for (n, place) in (0..).zip(words) {
            *place = word(n).to_be_bytes();
        }
        Ok(())
    }

    async fn write(&mut self) -> Result<()> {
        let Some(mut buf) = self.buf.take() else {
            return Ok(());
        };
        let room = buf.len();
        buf.set_window(0..self.filled);
        let (result, mut buf) = io::write(self.file, self.at, buf).await;
        result?;
        buf.set_window(0..room);
        self.buf = Some(buf);
        self.at += self.filled as u64;
        self.filled = 0;
        Ok(())
    }

    async fn finish(mut self) -> Result<()> {
        self.write().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An option, and words of the refusal.
    type Case<'c> = (&'c dyn Fn(&mut CreateOptions), &'c str);

    #[test]
    fn every_option_that_cannot_be_is_refused_with_a_reason() {
        let base = CreateOptions {
            size: 1 << 30,
            ..CreateOptions::default()
        };
        let with = |change: &dyn Fn(&mut CreateOptions)| {
            let mut options = base.clone();
            change(&mut options);
            let geometry = header(&options).map(|header| header.geometry);
            let outcome = geometry.and_then(|geometry| Layout::new(&options, geometry));
            outcome.unwrap_err().to_string()
        };
        let backing = Some(Backing {
            name: "base".into(),
            format: Some("raw".into()),
        });
        let cases: &[Case<'_>] = &[
            (&|o| o.size = 1000, "multiple of 512"),
            (&|o| o.version = 4, "version 4"),
            (&|o| o.cluster_size = 3000, "power of two"),
            (&|o| o.cluster_size = 256, "2^8"),
            (&|o| o.cluster_size = 4 << 20, "2^22"),
            (&|o| o.refcount_bits = 128, "64 bits"),
            (&|o| o.refcount_bits = 0, "power of two"),
            (
                &|o| (o.version, o.lazy_refcounts) = (2, true),
                "lazy_refcounts",
            ),
            (&|o| (o.version, o.refcount_bits) = (2, 8), "16 bits"),
            (
                &|o| (o.extended_l2, o.cluster_size) = (true, 4096),
                "16 KiB",
            ),
            (&|o| o.data_file_raw = true, "data_file"),
            (
                &|o| (o.size, o.cluster_size) = (1 << 40, 512),
                "larger cluster_size",
            ),
            (
                &|o| (o.backing, o.mapped) = (backing.clone(), true),
                "extended_l2",
            ),
        ];
        for (change, words) in cases {
            let message = with(change);
            assert!(message.contains(words), "{message}");
        }
    }

    #[test]
    fn refcounts_count_themselves() {
        for cluster_bits in [9, 12, 16, 21] {
            for order in 0..=6 {
                let geometry = Geometry::new(cluster_bits, order, false).unwrap();
                for others in [1, 100, 65_536, 10_000_000] {
                    let (table, blocks) = Layout::refcounts(geometry, others);
                    let all = others + table + blocks;
                    assert!(blocks * geometry.refcounts_per_block() >= all);
                    assert!(table * geometry.cluster_size() >= blocks * 8);
                }
            }
        }
    }
}
