//! Internal snapshots of an image that nobody has open: list, create, delete, apply. It must never let a cluster have
//! fewer references on stable storage than there are, nor write to the place of a table that is still referred to.
//!
//! # Order
//! References are counted up before they exist and down after they are gone. The snapshot table and the active L1 table
//! are written to new places, and one write of the header goes over to them. "May be overwritten in place" is taken
//! back before a cluster is shared and said again after it is not. While all that is under way the dirty flag is set
//! (version 3), so that whoever opens the image after a crash counts the references anew.

mod refcounts;
mod table;

use std::time::SystemTime;

use diskfuse_block::{Error, Kind, Node, Result};

use crate::check::copied::{Copied, Flags};
use crate::check::image::Image;
use crate::check::{self, CheckResult, Repair, Tree, are_bitmaps_there, outdate};
use crate::format::{Header, features};
use crate::meta::ActiveTable;

use refcounts::{Change, Refcounts, corrupt};

pub use table::SnapshotInfo;
pub(crate) use table::len as table_len;
pub(crate) use table::read as read_table;

/// The snapshots of an image, in the order of their table.
pub async fn list(file: &dyn Node) -> Result<Vec<SnapshotInfo>> {
    let image = Image::open(file).await?;
    Ok(table::read(&image).await?.0)
}

/// What is wrong with the first of these snapshots whose L1 table cannot be where it is said to be.
pub(crate) fn fault_in(
    file: &dyn Node,
    header: &Header,
    snapshots: &[SnapshotInfo],
) -> Result<Option<String>> {
    let image = Image::with_header(file, header.clone())?;
    Ok(snapshots.iter().find_map(|snapshot| {
        let fault = check::fault_of(&image, snapshot)?;
        Some(format!(
            "the L1 table of snapshot '{}' {fault}",
            snapshot.label()
        ))
    }))
}

/// Takes a snapshot of the disk as it is. Names need not be unique, as with `qemu-img`; ids are given in turn.
///
/// # Errors
/// [`Kind::Unsupported`] with a data file, and if refcounts are too narrow for one more reference;
/// [`Kind::Corrupt`] if the image needs a repair first; [`Kind::Invalid`] if the name is empty or longer than 65535
/// bytes, or there is no room for one more. Then nothing has changed.
pub async fn create(file: &dyn Node, name: &str, when: SystemTime) -> Result<()> {
    if name.is_empty() || name.len() > usize::from(u16::MAX) {
        return Err(Error::new(
            Kind::Invalid,
            format!("A snapshot cannot have a name of {} bytes", name.len()),
        ));
    }
    let mut image = open(file).await?;
    let mut snapshots = table::read(&image).await?.0;
    let (l1_offset, l1_entries) = (image.header.l1_offset, image.header.l1_size);
    let mut tree = tree(&image, l1_offset, l1_entries).await?;
    let mut refcounts = Refcounts::load(&image).await?;
    refcounts
        .verify(&image, &mut tree.counts, Change::Up)
        .await?;
    let since = when
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    snapshots.push(SnapshotInfo {
        id: next_id(&snapshots),
        name: name.to_owned(),
        date_seconds: u32::try_from(since.as_secs()).unwrap_or(u32::MAX),
        date_nanoseconds: since.subsec_nanos(),
        vm_clock_nanoseconds: 0,
        vm_state_size: 0,
        disk_size: Some(image.header.size),
        icount: None,
        l1_offset: 0,
        l1_entries,
        ..SnapshotInfo::default()
    });
    table::encode(&snapshots)?;
    begin(&mut image).await?;
    let done = create_now(&mut image, &mut refcounts, snapshots, &mut tree).await;
    end(&mut image, done).await
}

async fn create_now(
    image: &mut Image<'_>,
    refcounts: &mut Refcounts,
    mut snapshots: Vec<SnapshotInfo>,
    tree: &mut Tree,
) -> Result<()> {
    let (l1_offset, l1_entries) = (image.header.l1_offset, image.header.l1_size);
    // All of it is about to be shared.
    copied(image, tree, Flags::Clear, l1_offset, l1_entries).await?;
    image.flush().await?;
    refcounts
        .change(image, &mut tree.counts, Change::Up)
        .await?;
    let place = copy_l1(image, refcounts, l1_offset, l1_entries, l1_entries).await?;
    if let Some(new) = snapshots.last_mut() {
        new.set_l1(place);
    }
    replace_table(image, refcounts, &snapshots).await
}

/// Deletes a snapshot, by its name or else its id.
///
/// # Errors
/// [`Kind::NotFound`] with the names there are, [`Kind::Corrupt`] if the image needs a repair first. Then nothing has
/// changed.
pub async fn delete(file: &dyn Node, id_or_name: &str) -> Result<()> {
    let find = |snapshots: &[SnapshotInfo]| {
        let by_name = snapshots.iter().position(|s| s.name == id_or_name);
        by_name.or_else(|| snapshots.iter().position(|s| s.id == id_or_name))
    };
    delete_found(file, id_or_name, find).await.map(drop)
}

/// Deletes the first snapshot that has this id and this name, as far as they are given, and returns what it was. Errors
/// as [`delete`]'s.
pub async fn delete_exactly(
    file: &dyn Node,
    id: Option<&str>,
    name: Option<&str>,
) -> Result<SnapshotInfo> {
    let find = |snapshots: &[SnapshotInfo]| {
        snapshots
            .iter()
            .position(|s| id.is_none_or(|id| s.id == id) && name.is_none_or(|name| s.name == name))
    };
    delete_found(file, name.or(id).unwrap_or_default(), find).await
}

async fn delete_found(
    file: &dyn Node,
    wanted: &str,
    find: impl FnOnce(&[SnapshotInfo]) -> Option<usize>,
) -> Result<SnapshotInfo> {
    let mut image = open(file).await?;
    let mut snapshots = table::read(&image).await?.0;
    let Some(position) = find(&snapshots) else {
        return Err(not_found(&image, &snapshots, wanted));
    };
    let gone = snapshots.remove(position);
    let mut tree = tree(&image, gone.l1_offset, gone.l1_entries).await?;
    let mut refcounts = Refcounts::load(&image).await?;
    refcounts
        .verify(&image, &mut tree.counts, Change::Down)
        .await?;
    begin(&mut image).await?;
    let done = delete_now(&mut image, &mut refcounts, &snapshots, &gone, &mut tree).await;
    end(&mut image, done).await?;
    Ok(gone)
}

async fn delete_now(
    image: &mut Image<'_>,
    refcounts: &mut Refcounts,
    left: &[SnapshotInfo],
    gone: &SnapshotInfo,
    tree: &mut Tree,
) -> Result<()> {
    replace_table(image, refcounts, left).await?;
    refcounts
        .change(image, &mut tree.counts, Change::Down)
        .await?;
    refcounts
        .free(image, gone.l1_offset, u64::from(gone.l1_entries) * 8)
        .await?;
    image.flush().await?;
    // What was shared with it alone is the disk's own now.
    let (l1_offset, l1_entries) = (image.header.l1_offset, image.header.l1_size);
    let mut active = self::tree(image, l1_offset, l1_entries).await?;
    refcounts.mark(image, &mut active.counts).await?;
    copied(image, &active, Flags::Correct, l1_offset, l1_entries).await
}

/// Makes the disk what it was when a snapshot was taken; by its id or else its name. What is on the disk now is lost
/// unless another snapshot has it. The disk gets the size that it had.
///
/// # Errors
/// As [`delete`]; [`Kind::Unsupported`] if refcounts are too narrow for one more reference.
pub async fn apply(file: &dyn Node, id_or_name: &str) -> Result<()> {
    let mut image = open(file).await?;
    let snapshots = table::read(&image).await?.0;
    let snapshot = find_by_id(&snapshots, id_or_name)
        .ok_or_else(|| not_found(&image, &snapshots, id_or_name))?;
    let resized = snapshot
        .disk_size
        .is_some_and(|size| size != image.header.size);
    if resized && are_bitmaps_there(&image) {
        return Err(Error::new(
            Kind::Unsupported,
            format!(
                "The disk had another size when snapshot '{id_or_name}' was taken, and '{}' has bitmaps of its size now: \
                 remove the bitmaps first",
                image.name()
            ),
        ));
    }
    let mut tree = tree(&image, snapshot.l1_offset, snapshot.l1_entries).await?;
    let (l1_offset, l1_entries) = (image.header.l1_offset, image.header.l1_size);
    let mut old = self::tree(&image, l1_offset, l1_entries).await?;
    let mut refcounts = Refcounts::load(&image).await?;
    refcounts
        .verify(&image, &mut tree.counts, Change::Up)
        .await?;
    refcounts
        .verify(&image, &mut old.counts, Change::Down)
        .await?;
    begin(&mut image).await?;
    let done = apply_now(&mut image, &mut refcounts, snapshot, &mut tree, &mut old).await;
    end(&mut image, done).await
}

async fn apply_now(
    image: &mut Image<'_>,
    refcounts: &mut Refcounts,
    snapshot: &SnapshotInfo,
    tree: &mut Tree,
    old: &mut Tree,
) -> Result<()> {
    let size = snapshot.disk_size.unwrap_or(image.header.size);
    let (old_offset, old_entries) = (image.header.l1_offset, image.header.l1_size);
    let needed = image.geometry.l1_entries_for(size);
    let entries = u64::from(snapshot.l1_entries).max(needed);
    let entries = u32::try_from(entries)
        .map_err(|_| corrupt(image, &format!("a disk cannot have {size} bytes")))?;
    outdate(image).await?;
    refcounts
        .change(image, &mut tree.counts, Change::Up)
        .await?;
    // The flags of tables that were not active need not be right.
    copied_l2(image, tree, Flags::Clear).await?;
    let place = copy_l1(
        image,
        refcounts,
        snapshot.l1_offset,
        snapshot.l1_entries,
        entries,
    )
    .await?;
    image.flush().await?;
    image.set_l1(place, entries, size).await?;
    refcounts
        .change(image, &mut old.counts, Change::Down)
        .await?;
    refcounts
        .free(image, old_offset, u64::from(old_entries) * 8)
        .await
}

/// Opens an image for a change. One that was not closed properly is repaired first.
async fn open(file: &dyn Node) -> Result<Image<'_>> {
    let mut image = Image::open(file).await?;
    if image.header.has_data_file() {
        return Err(Error::new(
            Kind::Unsupported,
            format!(
                "'{}' keeps its data in another file: such an image cannot have snapshots",
                image.name()
            ),
        ));
    }
    if image.header.is_corrupt() {
        return Err(corrupt(&image, "it is marked as corrupt"));
    }
    image.prepare_to_write().await?;
    if image.header.is_dirty() {
        check::rebuild_refcounts_of_dirty_image(file).await?;
        image = Image::open(file).await?;
    }
    Ok(image)
}

/// From here on references and refcounts may differ.
async fn begin(image: &mut Image<'_>) -> Result<()> {
    image.set_incompatible(features::DIRTY, 0).await
}

/// They are the same again; or, after an error, are made so.
async fn end(image: &mut Image<'_>, done: Result<()>) -> Result<()> {
    match done {
        Ok(()) => {
            image.flush().await?;
            image.set_incompatible(0, features::DIRTY).await
        }
        Err(error) => {
            // It may be the disk that is full or broken; then the dirty flag stays, and the next to open repairs.
            if let Err(also) = check::check(image.file, Repair::All, &mut |_, _| {}).await {
                tracing::warn!("after a failed change of snapshots: {also}");
            }
            Err(error)
        }
    }
}

/// Drops the snapshots that cannot be, and completes entries that version 3 finds incomplete. The new table is at the end
/// of the file and not counted: for a repair that counts everything anew.
pub(crate) async fn mend_table(image: &mut Image<'_>) -> Result<()> {
    let (before, _) = table::read(image).await?;
    let complete = image.header.version < 3 || before.iter().all(|s| !s.is_incomplete());
    let mut after = before.clone();
    after.retain(|snapshot| check::fault_of(image, snapshot).is_none());
    if complete && after.len() == before.len() {
        return Ok(());
    }
    let size = image.header.size;
    for snapshot in after.iter_mut().filter(|s| s.is_incomplete()) {
        snapshot.complete(size);
    }
    let mut bytes = table::encode(&after)?;
    let mut place = 0;
    if !after.is_empty() {
        let cluster = image.geometry.cluster_size();
        place = image.clusters() * cluster;
        bytes.resize(bytes.len().next_multiple_of(cluster as usize), 0);
        image.write(place, &bytes).await?;
        image.flush().await?;
    }
    image.set_snapshots(place, after.len() as u32).await
}

/// Where the disk of a snapshot is, by its id or else its name, for whoever shows it.
///
/// # Errors
/// [`Kind::NotFound`] with the names there are; [`Kind::Corrupt`] if its L1 table cannot be where it is said to be.
pub async fn table_of(file: &dyn Node, header: &Header, wanted: &str) -> Result<ActiveTable> {
    let image = Image::with_header(file, header.clone())?;
    let snapshots = table::read(&image).await?.0;
    let snapshot =
        find_by_id(&snapshots, wanted).ok_or_else(|| not_found(&image, &snapshots, wanted))?;
    if check::fault_of(&image, snapshot).is_some() {
        let what = format!("snapshot '{}' has no L1 table", snapshot.label());
        return Err(corrupt(&image, &what));
    }
    Ok(ActiveTable {
        l1_offset: snapshot.l1_offset,
        l1_entries: snapshot.l1_entries,
        size: snapshot.disk_size.unwrap_or(image.header.size),
    })
}

/// The snapshot with that id, or else the first with that name.
fn find_by_id<'s>(snapshots: &'s [SnapshotInfo], wanted: &str) -> Option<&'s SnapshotInfo> {
    let by_id = snapshots.iter().find(|s| s.id == wanted);
    by_id.or_else(|| snapshots.iter().find(|s| s.name == wanted))
}

/// What an L1 table refers to; refused if anything in it cannot be right.
async fn tree(image: &Image<'_>, l1_offset: u64, l1_entries: u32) -> Result<Tree> {
    let tree = check::tree(image, l1_offset, l1_entries.into()).await?;
    match tree.found.messages.first() {
        Some(first) => Err(corrupt(image, first)),
        None => Ok(tree),
    }
}

async fn copied(
    image: &Image<'_>,
    tree: &Tree,
    flags: Flags,
    l1_offset: u64,
    l1_entries: u32,
) -> Result<()> {
    let mut found = CheckResult::default();
    let mut copied = Copied {
        image,
        counts: &tree.counts,
        flags,
        found: &mut found,
    };
    copied.l1(l1_offset, l1_entries.into()).await?;
    copied.l2(&tree.tables).await
}

async fn copied_l2(image: &Image<'_>, tree: &Tree, flags: Flags) -> Result<()> {
    let mut found = CheckResult::default();
    let mut copied = Copied {
        image,
        counts: &tree.counts,
        flags,
        found: &mut found,
    };
    copied.l2(&tree.tables).await
}

/// Copies an L1 table, all flags cleared, to a new place with room for `entries`; not flushed.
async fn copy_l1(
    image: &mut Image<'_>,
    refcounts: &mut Refcounts,
    from: u64,
    from_entries: u32,
    entries: u32,
) -> Result<u64> {
    let len = u64::from(entries) * 8;
    let place = refcounts.allocate(image, len).await?;
    let whole = len.next_multiple_of(image.geometry.cluster_size());
    let mut buf = image
        .read(from, whole.max(image.geometry.cluster_size()))
        .await?;
    let (words, _) = buf.as_mut_slice().as_chunks_mut::<8>();
    for (index, bytes) in words.iter_mut().enumerate() {
        let word = u64::from_be_bytes(*bytes) & !crate::format::COPIED;
        let is_copied = index < from_entries as usize;
        *bytes = if is_copied {
            word.to_be_bytes()
        } else {
            [0; 8]
        };
    }
    image.write_buf(place, buf).await?;
    Ok(place)
}

/// Writes the snapshot table to a new place, goes over to it, and frees the old one.
async fn replace_table(
    image: &mut Image<'_>,
    refcounts: &mut Refcounts,
    snapshots: &[SnapshotInfo],
) -> Result<()> {
    let old = image.header.snapshots_offset;
    let old_len = table::read(image).await?.1;
    let mut bytes = table::encode(snapshots)?;
    let mut place = 0;
    if !snapshots.is_empty() {
        place = refcounts.allocate(image, bytes.len() as u64).await?;
        let whole = bytes
            .len()
            .next_multiple_of(image.geometry.cluster_size() as usize);
        bytes.resize(whole, 0);
        image.write(place, &bytes).await?;
    }
    image.flush().await?;
    image.set_snapshots(place, snapshots.len() as u32).await?;
    refcounts.free(image, old, old_len).await
}

/// One more than the highest id that is a number.
fn next_id(snapshots: &[SnapshotInfo]) -> String {
    let ids = snapshots.iter().filter_map(|s| s.id.parse::<u64>().ok());
    ids.max().unwrap_or(0).saturating_add(1).to_string()
}

/// Snapshots that a message names at most.
const NAMED: usize = 20;

fn not_found(image: &Image<'_>, snapshots: &[SnapshotInfo], wanted: &str) -> Error {
    let name = image.name();
    let names: Vec<String> = snapshots
        .iter()
        .take(NAMED)
        .map(|s| format!("'{}'", s.label()))
        .collect();
    let there = if names.is_empty() {
        "it has none".into()
    } else {
        let more = if snapshots.len() > NAMED { ", …" } else { "" };
        format!("it has {}{more}", names.join(", "))
    };
    Error::new(
        Kind::NotFound,
        format!("'{name}' has no snapshot '{wanted}': {there}"),
    )
}
