//! Images that were made by real tools and then damaged, by the thousand: opened, resolved, read, written, checked and
//! repaired. Nothing panics, hangs or allocates without bound, and no guest write lands on what the image on disk says
//! is metadata. `DISKFUSE_SEED` runs one again; `DISKFUSE_CASES` sets how many.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::pedantic)]
#![allow(unsafe_code)]

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fs::File;
use std::io::Read;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use diskfuse_block::drivers::{Discard, FileConfig, open_file};
use diskfuse_block::{Access, Node, Zeroes};
use diskfuse_qcow2::check::{Repair, check};
use diskfuse_qcow2::node::{Children, Qcow2Config, Qcow2Node};
use support::atlas::{Atlas, Kind, Region, be64};
use support::cases::{env_number, seeds};
use support::engine::{self, run};
use support::image::{Image, SECTOR, Snapshot, Wanted};
use support::memory::Memory;
use support::model::{FIRST, Tag, whose, write_bytes};
use support::mutate::mutate;
use support::rng::Rng;

/// No case takes longer.
const LIMIT: Duration = Duration::from_secs(10);
/// Bytes that one case may have allocated at once, beside twice the image: caches and buffers.
const BOUND: usize = 64 << 20;
/// Bytes of a real file that are looked at: a block of refcounts that are all in use makes it as long as the next block
/// reaches, a hole.
const REAL_MOST: u64 = 9 << 20;
/// Good images to begin with.
const SEEDLINGS: u64 = 24;

thread_local! {
    static LIVE: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

struct Counting;

fn count(bytes: isize) {
    let live = LIVE.get() + bytes;
    LIVE.set(live);
    PEAK.set(PEAK.get().max(live));
}

// SAFETY: everything is the system allocator's; the counters are plain cells without destructors.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: as the caller promised.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: as the caller promised.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// A good image, small, and all that is around it.
struct Seedling {
    bytes: Vec<u8>,
    snapshots: Vec<Snapshot>,
}

/// Images of all kinds, and those that have made trouble before.
fn seedlings() -> Vec<Seedling> {
    let wanted = Wanted {
        depth: 1,
        snapshots: true,
        bitmaps: true,
        compressed: true,
        commands: 12,
        huge: false,
        most: 1 << 20,
    };
    let one = |n: u64| {
        let mut rng = Rng::new(0x5EED + n);
        loop {
            let image = Image::random(&mut rng, wanted);
            let bytes = std::fs::read(image.path()).unwrap();
            if image.options().data_file.is_none() && bytes.len() < 6 << 20 {
                let snapshots = image.snapshots.clone();
                return Seedling { bytes, snapshots };
            }
        }
    };
    let mut all: Vec<Seedling> = (0..SEEDLINGS).map(one).collect();
    all.extend(corpus().into_iter().map(|bytes| Seedling {
        bytes,
        snapshots: Vec::new(),
    }));
    all
}

/// The images kept in `tests/corpus`, compressed with zstd.
fn corpus() -> Vec<Vec<u8>> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/corpus");
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "zst"))
        .collect();
    files.sort();
    let unpack = |path: PathBuf| zstd::decode_all(&std::fs::read(path).unwrap()[..]).unwrap();
    files.into_iter().map(unpack).collect()
}

/// The file below: mostly in memory, now and then a real one, where the engine resolves to places in it.
enum Ground {
    Memory(Arc<Memory>),
    Real(Arc<dyn Node>, PathBuf),
}

impl Ground {
    fn node(&self) -> Arc<dyn Node> {
        match self {
            Self::Memory(memory) => memory.clone(),
            Self::Real(node, _) => Arc::clone(node),
        }
    }

    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Memory(memory) => memory.bytes(),
            Self::Real(_, path) => {
                let mut bytes = Vec::new();
                let file = File::open(path).unwrap();
                file.take(REAL_MOST).read_to_end(&mut bytes).unwrap();
                bytes
            }
        }
    }
}

/// What happened in a case, for whoever has to find out.
struct Story {
    seed: u64,
    damage: Vec<String>,
    steps: Vec<String>,
}

impl Story {
    fn fail(&self, wrong: &str) -> ! {
        panic!(
            "{wrong}\nthe damage: {:#?}\nthen: {:#?}\nagain with DISKFUSE_SEED={}",
            self.damage, self.steps, self.seed
        );
    }
}

fn case(seed: u64, seedlings: &[Seedling], folder: &tempfile::TempDir) {
    let mut rng = Rng::new(seed);
    let seedling = &seedlings[rng.below(seedlings.len() as u64) as usize];
    let mut bytes = seedling.bytes.clone();
    let damage = mutate(&mut rng, &mut bytes);
    let mut story = Story {
        seed,
        damage,
        steps: Vec::new(),
    };
    let image_size = bytes.len();
    let real = rng.chance(25);
    let base = LIVE.get();
    PEAK.set(base);
    look(&mut rng, &bytes, seedling, &mut story);
    let ground = if real {
        let path = folder.path().join(format!("{seed}.qcow2"));
        std::fs::write(&path, &bytes).unwrap();
        let config = FileConfig {
            filename: path.clone(),
            discard: Discard::Unmap,
            ..FileConfig::default()
        };
        Ground::Real(open_file(&config).unwrap(), path)
    } else {
        Ground::Memory(Arc::new(Memory::new(bytes.clone(), false)))
    };
    drop(bytes);
    change(&mut rng, &ground, &mut story);
    mend(&ground, &mut story);
    if let Ground::Real(_, path) = &ground {
        std::fs::remove_file(path).unwrap();
    }
    // The test itself keeps copies of the image: before, after, and what the allocator had to move.
    let used = usize::try_from(PEAK.get() - base).unwrap_or(0);
    if used > BOUND + 8 * image_size {
        story.fail(&format!(
            "{used} bytes allocated for an image of {image_size}"
        ));
    }
}

/// Opens it for reading only and reads here and there, the disk and each snapshot.
fn look(rng: &mut Rng, bytes: &[u8], seedling: &Seedling, story: &mut Story) {
    let file = Arc::new(Memory::new(bytes.to_vec(), true));
    let names = seedling.snapshots.iter().map(|s| Some(s.name.clone()));
    for snapshot in std::iter::once(None).chain(names) {
        let config = Qcow2Config {
            read_only: true,
            snapshot,
            l2_cache_size: rng.chance(50).then_some(4096),
            ..Qcow2Config::default()
        };
        let children = children(file.clone());
        run(diskfuse_ring::Choice::Auto, async {
            match Qcow2Node::open(children, &config).await {
                Ok(node) => {
                    story.steps.push(format!("opened, {} bytes", node.size()));
                    read_about(rng, &node, story).await;
                    let _ = node.close().await;
                }
                Err(error) => story.steps.push(format!("not opened: {error}")),
            }
        });
    }
    if file.bytes()[..bytes.len()] != *bytes {
        story.fail("an image that was opened for reading has changed");
    }
}

fn children(file: Arc<dyn Node>) -> Children {
    Children {
        file,
        data_file: None,
        backing: None,
    }
}

async fn read_about(rng: &mut Rng, node: &Qcow2Node, story: &mut Story) {
    let size = node.size();
    if size < SECTOR {
        return;
    }
    // The seedlings' contents are in the first MiB, whatever the header claims now.
    for n in 0..24 {
        let near = if n < 20 { size.min(1 << 20) } else { size };
        let at = rng.below(near);
        let len = rng.length(1, 64 << 10).min(size - at);
        let extent = node.resolve(Access::Read, at, len);
        if extent.is_empty() || extent.len() > len {
            story.fail(&format!("{len} at {at} resolved to {extent:?}"));
        }
        drop(extent);
        let _ = engine::read(node, at, len).await;
        if let Ok(status) = node.block_status(at, len).await
            && (status.len == 0 || status.len > len)
        {
            story.fail(&format!("status of {len} at {at}: {status:?}"));
        }
    }
}

/// Opens it for writing and changes it; after each step no guest data may be where metadata is.
fn change(rng: &mut Rng, ground: &Ground, story: &mut Story) {
    let config = Qcow2Config {
        discard: rng.chance(50),
        compress: rng.chance(10),
        l2_cache_size: rng.chance(50).then_some(4096),
        refcount_cache_size: rng.chance(50).then_some(4096),
        ..Qcow2Config::default()
    };
    run(diskfuse_ring::Choice::Auto, async {
        let node = match Qcow2Node::open(children(ground.node()), &config).await {
            Ok(node) => node,
            Err(error) => return story.steps.push(format!("not opened to write: {error}")),
        };
        story.steps.push("opened to write".to_owned());
        for step in 0..12 {
            one_change(rng, &node, ground, FIRST + step, story).await;
        }
        let closed = node.close().await;
        story.steps.push(format!("close: {closed:?}"));
    });
}

async fn one_change(rng: &mut Rng, node: &Qcow2Node, ground: &Ground, tag: Tag, story: &mut Story) {
    let before = ground.bytes();
    let size = node.size().min(1 << 20);
    if size < SECTOR {
        return;
    }
    let len = rng.length(SECTOR, 128 << 10).min(size / SECTOR * SECTOR);
    let at = rng.below(size - len + 1) / SECTOR * SECTOR;
    let (what, result) = match rng.below(10) {
        0..6 => (
            "write",
            engine::write(node, at, &write_bytes(tag, at, len)).await,
        ),
        6 => ("zero", node.write_zeroes(at, len, Zeroes::Keep).await),
        7 => ("unmap", node.write_zeroes(at, len, Zeroes::MayUnmap).await),
        8 => ("discard", node.discard(at, len).await),
        _ => ("flush", node.flush().await),
    };
    let said = match &result {
        Ok(()) => "done".to_owned(),
        Err(error) => error.to_string(),
    };
    story
        .steps
        .push(format!("{what} {len} at {at} as {tag}: {said}"));
    let after = ground.bytes();
    if let Some((kind, at)) = trespass(&before, &after, tag) {
        story.fail(&format!(
            "write {tag} is on metadata: {kind:?}, byte {at} of the file"
        ));
    }
}

/// Where the data of a write lie on what is metadata before and after it.
fn trespass(before: &[u8], after: &[u8], tag: Tag) -> Option<(Kind, u64)> {
    let still = Atlas::of(after).regions;
    let kept = |region: &Region| still.contains(region);
    for (kind, range) in Atlas::of(before).regions.into_iter().filter(kept) {
        let mut at = range.start.next_multiple_of(SECTOR);
        while at + SECTOR <= range.end.min(after.len() as u64) {
            let sector = &after[at as usize..(at + SECTOR) as usize];
            if be64(sector, 0) >> 56 == 0xD1 && whose(sector).is_some_and(|(t, _)| t == tag) {
                return Some((kind, at));
            }
            at += SECTOR;
        }
    }
    None
}

/// Checks it, repairs it, and checks it again: the repair must have found all that it can.
fn mend(ground: &Ground, story: &mut Story) {
    let file = ground.node();
    run(diskfuse_ring::Choice::Auto, async {
        let found = check(&*file, Repair::None, &mut |_, _| {}).await;
        story.steps.push(format!(
            "check: {:?}",
            found.map(|f| (f.corruptions, f.leaks))
        ));
        let repaired = check(&*file, Repair::All, &mut |_, _| {}).await;
        story.steps.push(format!(
            "repair: {:?}",
            repaired.map(|f| (f.corruptions, f.leaks))
        ));
    });
}

/// Ends the program if a case hangs: nothing else can be done about it.
fn watch(started: &[Mutex<Option<(u64, Instant)>>], over: &AtomicBool) {
    while !over.load(Ordering::Relaxed) {
        std::thread::sleep(Duration::from_millis(50));
        for slot in started {
            let slot = *slot.lock().unwrap();
            if let Some((seed, since)) = slot
                && since.elapsed() > LIMIT
            {
                eprintln!("a hostile image hangs us; again with DISKFUSE_SEED={seed}");
                std::process::exit(101);
            }
        }
    }
}

#[test]
fn damaged_images_do_no_harm() {
    let seedlings = seedlings();
    let seeds = seeds(3000);
    // With a limit on time as well, as machines differ.
    let until = Instant::now() + Duration::from_secs(env_number("DISKFUSE_SECONDS").unwrap_or(20));
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (next, over) = (AtomicU64::new(0), AtomicBool::new(false));
    let started = [Mutex::new(None), Mutex::new(None)];
    let failed = Mutex::new(Vec::new());
    let work = |slot: &Mutex<Option<(u64, Instant)>>| {
        while let Some(&seed) = seeds.get(next.fetch_add(1, Ordering::Relaxed) as usize) {
            *slot.lock().unwrap() = Some((seed, Instant::now()));
            let ended = catch_unwind(AssertUnwindSafe(|| case(seed, &seedlings, &folder)));
            *slot.lock().unwrap() = None;
            if ended.is_err() {
                failed.lock().unwrap().push(seed);
            }
            if Instant::now() > until || failed.lock().unwrap().len() >= 8 {
                break;
            }
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(|| watch(&started, &over));
        let workers: Vec<_> = started
            .iter()
            .map(|slot| scope.spawn(|| work(slot)))
            .collect();
        for worker in workers {
            worker.join().unwrap();
        }
        over.store(true, Ordering::Relaxed);
    });
    let done = next.load(Ordering::Relaxed).min(seeds.len() as u64);
    eprintln!("{done} damaged images from DISKFUSE_SEED={}", seeds[0]);
    let failed = failed.into_inner().unwrap();
    assert!(failed.is_empty(), "again with DISKFUSE_SEED={failed:?}");
}
