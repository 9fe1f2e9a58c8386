//! Opening and closing an image. Opening refuses what cannot be served whole; closing leaves an image that needs no
//! repair.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use diskfuse_block::graph::ChildRole;
use diskfuse_block::{Error, Kind, Node, RangeQueue, Result};

use super::compressed::Cache;
use super::config::{Children, Qcow2Config};
use super::{OpenImage, Options, Qcow2Node};
use crate::bitmaps::{self, Inheritance, Persistent};
use crate::check::rebuild_refcounts_of_dirty_image;
use crate::format::{Header, features};
use crate::meta::{ActiveTable, Meta};
use crate::snapshots;

impl Qcow2Node {
    /// Opens an image, with its persistent bitmaps if it may be written. One that a crash left with refcounts that are behind
    /// (lazy refcounts) is repaired first, unless it is only read.
    ///
    /// # Errors
    /// [`Kind::Corrupt`] for an image that contradicts itself or has bitmaps that cannot be, and for writing to one whose corrupt
    /// bit is set, or that was not closed and cannot be repaired whole;
    /// [`Kind::Unsupported`] for features that are not known, and for encrypted images; [`Kind::Invalid`] for children
    /// or options that do not go with the image; [`Kind::NotFound`] if there is no such snapshot.
    pub async fn open(children: Children, config: &Qcow2Config) -> Result<Arc<Self>> {
        Box::pin(Self::open_after(None, children, config)).await
    }

    /// Opens an image that was closed a moment ago, or not: with the bitmaps that whoever had it open leaves.
    pub(super) async fn open_after(
        left: Option<Inheritance>,
        children: Children,
        config: &Qcow2Config,
    ) -> Result<Arc<Self>> {
        let Children {
            file,
            data_file,
            backing,
        } = children;
        let name = file.filename().unwrap_or_else(|| "qcow2".to_owned());
        let mut header = Header::read(&*file).await?;
        check_children(&name, &header, data_file.as_ref(), config)?;
        let read_only = config.read_only || file.read_only() || config.snapshot.is_some();
        if header.is_dirty() && !read_only {
            tracing::info!(
                image = name,
                "it was not closed; its refcounts are repaired"
            );
            rebuild_refcounts_of_dirty_image(&*file).await?;
            header = Header::read(&*file).await?;
        }
        let table = match &config.snapshot {
            None => ActiveTable {
                l1_offset: header.l1_offset,
                l1_entries: header.l1_size,
                size: header.size,
            },
            Some(wanted) => snapshots::table_of(&*file, &header, wanted).await?,
        };
        let data_in = data_file.clone();
        let meta = Meta::open(Arc::clone(&file), data_in, &header, table, config).await?;
        let data = data_file.unwrap_or_else(|| Arc::clone(&file));
        let read_only = meta.read_only() || data.read_only();
        let geometry = header.geometry;
        let persistent = match config.loads_bitmaps(read_only) {
            true => bitmaps_of(&*file, &header, left).await?,
            false => Persistent::default(),
        };
        let recorded = persistent.to_record().into();
        let image = OpenImage {
            persistent,
            config: config.clone(),
            external: geometry.external_data(),
            raw_data: header.data_file_raw(),
            version: header.version,
            compression: header.compression,
            meta,
            file,
            data,
            options: Options::new(config),
            read_only,
            open_for_writing: AtomicBool::new(!read_only),
            turns: RangeQueue::default(),
            resizing: RangeQueue::default(),
            decompressed: Cache::new(geometry.cluster_size()),
            geometry,
            header,
        };
        Ok(Arc::new(Self {
            image: Arc::new(image),
            backing,
            recorded,
        }))
    }

    /// The configuration that it was opened with.
    pub fn config(&self) -> &Qcow2Config {
        &self.image.config
    }

    /// The nodes that it stands on.
    pub fn children(&self) -> Children {
        Children {
            file: Arc::clone(&self.file),
            data_file: self.external.then(|| Arc::clone(&self.data)),
            backing: self.backing.clone(),
        }
    }

    /// The same open image above another backing node, or none. What it keeps of the image file in memory it cannot bring to
    /// another file.
    pub(super) fn above(&self, children: &[(ChildRole, Arc<dyn Node>)]) -> Result<Arc<dyn Node>> {
        let child = |wanted| {
            let mut of_role = children.iter().filter(|(role, _)| *role == wanted);
            of_role.next().map(|(_, child)| child)
        };
        let is = |wanted, has: &Arc<dyn Node>| child(wanted).is_some_and(|c| Arc::ptr_eq(c, has));
        let same_data = !self.external || is(ChildRole::Data, &self.data);
        if !is(ChildRole::File, &self.file) || !same_data {
            let message = format!(
                "'{}' is open and cannot be put on another file",
                self.name()
            );
            return Err(Error::new(Kind::Unsupported, message));
        }
        Ok(Arc::new(Self {
            image: Arc::clone(&self.image),
            backing: child(ChildRole::Backing).cloned(),
            recorded: Arc::clone(&self.recorded),
        }))
    }

    /// Brings everything to stable storage and leaves the image clean. Later writes are refused
    /// ([`Kind::Ended`]). After an error the image is as after a crash: consistent.
    pub(super) async fn close_now(&self) -> Result<()> {
        self.open_for_writing.store(false, Ordering::SeqCst);
        // Requests that change tables and were let in before.
        let _last = self.turns.turn(0, u64::MAX).await;
        self.store_bitmaps().await;
        self.meta.close().await
    }

    /// The header as it was when the image was opened, with the size, the name of the backing file and the bitmaps of now.
    pub fn header(&self) -> Header {
        let mut header = self.header.clone();
        header.size = self.meta.size();
        header.backing = self.meta.backing();
        header.bitmaps = self.meta.bitmaps();
        header.autoclear &= !features::BITMAPS;
        if header.bitmaps.is_some() {
            header.autoclear |= features::BITMAPS;
        }
        header
    }
}

/// The persistent bitmaps that somebody leaves, or those of the file.
async fn bitmaps_of(
    file: &dyn Node,
    header: &Header,
    left: Option<Inheritance>,
) -> Result<Persistent> {
    let entries = bitmaps::read_directory(file, header).await?;
    Ok(match left {
        Some(left) => Persistent::inherited(left, entries),
        None => Persistent::new(bitmaps::load(file, header, entries).await?),
    })
}

fn check_children(
    name: &str,
    header: &Header,
    data_file: Option<&Arc<dyn Node>>,
    config: &Qcow2Config,
) -> Result<()> {
    let invalid = |why: &str| Err(Error::new(Kind::Invalid, format!("'{name}': {why}")));
    match (header.has_data_file(), data_file) {
        (true, None) => {
            return invalid("its data are in a file of their own, which was not given (data-file)");
        }
        (false, Some(_)) => {
            return invalid("it has no data file of its own, but one was given (data-file)");
        }
        _ => {}
    }
    if config.compress && header.has_data_file() {
        return invalid("an image with a data file cannot be written compressed");
    }
    if header.incompatible & features::DATA_FILE == 0 && header.data_file_raw() {
        return invalid("it says that its data file is raw, but it has none");
    }
    Ok(())
}
