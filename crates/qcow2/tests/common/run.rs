//! One run of the engine under load on disks that note everything, and the verdict on what a crash leaves of it.

use std::sync::Arc;

use diskfuse_block::{Node, Result, io};
use diskfuse_qcow2::bitmaps::PersistentBitmap;
use diskfuse_qcow2::check::{Repair, check};
use diskfuse_qcow2::node::{Children, Qcow2Config, Qcow2Node};
use diskfuse_ring::{Buf, Config, IoThread, Reply, Ring};
use tempfile::TempDir;

use super::SECTOR;
use super::case::{Case, RECORDING, SNAPSHOT, STILL};
use super::disk::{Disk, Manners};
use super::guest::{FIRST, Guest, LIMIT};
use super::log::{Log, Recorder};
use super::model::{Model, Version};
use super::rng::Rng;
use super::states::State;
use super::tools::{text, try_qemu_img};

/// Bytes read at once when a disk is looked at.
const CHUNK: usize = 256 << 10;

/// Longer than anything here takes.
const RING_LIMIT: std::time::Duration = std::time::Duration::from_secs(300);

/// Runs a future on a ring of its own.
pub fn on_ring<F: Future>(future: F) -> F::Output {
    Ring::new(&Config::default()).unwrap().block_on(async {
        let mut future = std::pin::pin!(future);
        let mut late = std::pin::pin!(diskfuse_ring::sleep(RING_LIMIT));
        std::future::poll_fn(|cx| {
            assert!(late.as_mut().poll(cx).is_pending(), "it takes too long");
            future.as_mut().poll(cx)
        })
        .await
    })
}

/// The disks of a run and what they held in the beginning.
pub struct Stage {
    pub case: Case,
    pub recorder: Recorder,
    pub file: Arc<Disk>,
    pub data_file: Option<Arc<Disk>>,
    pub backing: Option<Vec<u8>>,
    /// Of the file, then of the data file.
    pub initial: Vec<Vec<u8>>,
    /// What the guest saw in the beginning.
    versions: Vec<Version>,
    dir: TempDir,
}

impl Stage {
    /// Nothing has happened on it.
    pub fn new(case: Case) -> Self {
        let start = case.make();
        let recorder = Recorder::default();
        let versions = start.initial.clone();
        recorder.log().model = Model::new(start.initial);
        let manners = Manners {
            patience: case.patience,
            discarded: case.discarded,
            read_only: false,
        };
        let disk = |index, bytes: &Vec<u8>| {
            Disk::new(
                &recorder,
                index,
                bytes.clone(),
                case.seed + index as u64,
                manners,
            )
        };
        let mut initial = vec![start.image];
        let file = disk(0, &initial[0]);
        let data_file = start.data_file.map(|bytes| {
            initial.push(bytes);
            disk(1, &initial[1])
        });
        // As the disks hold them: whole sectors.
        for (bytes, disk) in initial.iter_mut().zip([Some(&file), data_file.as_ref()]) {
            bytes.resize(disk.map_or(0, |disk| disk.size()) as usize, 0);
        }
        Self {
            case,
            recorder,
            file,
            data_file,
            backing: start.backing,
            initial,
            versions,
            dir: start.dir,
        }
    }

    fn children(&self) -> Children {
        Children {
            file: self.file.clone(),
            data_file: self.data_file.clone().map(|disk| disk as Arc<dyn Node>),
            backing: backing(self.backing.as_ref()),
        }
    }

    /// Opens it as the case says.
    pub async fn open(&self) -> Result<Arc<Qcow2Node>> {
        Qcow2Node::open(self.children(), &self.case.config).await
    }

    /// The whole life of an open disk: guests on all threads, to the end, then perhaps closed. `tolerant` guests go on
    /// after errors.
    pub fn live(&self, tolerant: bool) {
        let threads: Vec<IoThread> = (0..self.case.threads)
            .map(|n| IoThread::spawn(&format!("queue-{n}"), Config::default()).unwrap())
            .collect();
        let node = on_ring(self.open()).unwrap();
        let guest = Guest::new(node.clone(), &self.recorder, FIRST);
        // The rest of the disk comes and goes.
        let kept = match self.case.resizes {
            true => (self.case.hot.min(self.case.size / 2) / SECTOR).max(1) * SECTOR,
            false => self.case.hot,
        };
        let mut replies: Vec<Reply<()>> = Vec::new();
        for (number, thread) in (0..).zip(&threads) {
            for each in 0..self.case.guests {
                let (guest, case) = (guest.clone(), self.case.clone());
                let mut rng = Rng::new(case.seed ^ (number * 1000 + each + 1) << 20);
                replies.push(thread.mailbox().call(move || async move {
                    for _ in 0..case.requests {
                        let answer = guest.random(&case, kept, &mut rng).await;
                        assert!(tolerant || answer.is_ok(), "{}", answer.unwrap_err());
                    }
                }));
            }
        }
        if self.case.resizes {
            let (guest, case) = (guest.clone(), self.case.clone());
            let mut rng = Rng::new(case.seed ^ 0xABCD);
            replies.push(threads[0].mailbox().call(move || async move {
                for _ in 0..case.requests / 4 {
                    let size = rng.within(kept / SECTOR..case.size * 3 / 2 / SECTOR) * SECTOR;
                    let answer = guest.resize(size).await;
                    assert!(tolerant || answer.is_ok(), "{}", answer.unwrap_err());
                    let tail = (size - kept) / SECTOR;
                    if tail > 0 {
                        let count = rng.within(1..tail.min(64) + 1);
                        let sector = kept / SECTOR + rng.below(tail - count + 1);
                        let answer = guest.write(sector, count).await;
                        assert!(tolerant || answer.is_ok(), "{}", answer.unwrap_err());
                    }
                }
            }));
        }
        for reply in replies {
            let answer = reply.wait_for(LIMIT);
            let Ok(answer) = answer else {
                let log = self.recorder.log();
                let now = log.now();
                panic!("the engine hangs:\n{}", log.show(now, now));
            };
            answer.unwrap_or_else(|_| panic!("a guest has panicked"));
        }
        if self.case.closes {
            let began = self.recorder.log().tick();
            let closed = on_ring(node.close());
            assert!(tolerant || closed.is_ok(), "{}", closed.unwrap_err());
            if closed.is_ok() {
                guest.promise(began);
            }
        }
    }

    /// The verdict on one state; what is wrong, in a sentence.
    pub fn judge(
        &self,
        log: &Log,
        state: &State,
        rng: &mut Rng,
    ) -> std::result::Result<(), String> {
        let file = Disk::quiet(state.disks[0].clone());
        let data_file = state.disks.get(1).map(|bytes| Disk::quiet(bytes.clone()));
        on_ring(self.judge_disks(log, state, file, data_file, rng))
    }

    /// That of `qemu-img check`: no corruption, leaks allowed.
    pub fn second_opinion(&self, file: &Disk, when: &str) -> std::result::Result<(), String> {
        let path = self.dir.path().join("state");
        std::fs::write(&path, file.bytes()).unwrap();
        let (clean, said) = try_qemu_img(&["check", "-f", "qcow2", text(&path)]);
        let leaks_only =
            said.contains("leaked clusters were found") && !said.contains("errors were found");
        if clean || leaks_only {
            return Ok(());
        }
        Err(format!("{when}, qemu-img check says: {said}"))
    }

    async fn judge_disks(
        &self,
        log: &Log,
        state: &State,
        file: Arc<Disk>,
        data_file: Option<Arc<Disk>>,
        rng: &mut Rng,
    ) -> std::result::Result<(), String> {
        let dirty = is_dirty(&state.disks[0]);
        if !dirty {
            verdict(&*file, "as the crash left it").await?;
            if rng.chance(self.case.second_opinions) {
                self.second_opinion(&file, "as the crash left it")?;
            }
        }
        let children = Children {
            file: file.clone(),
            data_file: data_file.map(|disk| disk as Arc<dyn Node>),
            backing: backing(self.backing.as_ref()),
        };
        let node = Qcow2Node::open(children.clone(), &self.case.config).await;
        let node = node.map_err(|error| format!("it does not open: {error}"))?;
        let promised = log.model.promised(state.time);
        let size = node.size();
        let sizes = log.model.sizes(promised, state.time);
        if !sizes.contains(&size) {
            return Err(format!("the disk has {size} bytes, but may have {sizes:?}"));
        }
        let bitmaps = self.judge_bitmaps(&node)?;
        look(&*node, |sector, bytes| {
            self.compare_to_bitmaps(sector, bytes, &bitmaps)?;
            log.model.compare(sector, bytes, promised, state.time)
        })
        .await?;
        if rng.chance(25) {
            self.use_again(&node, rng).await?;
        }
        let closed = node.close().await;
        closed.map_err(|error| format!("it opens, but does not close: {error}"))?;
        drop(node);
        verdict(&*file, "after it was opened and closed").await?;
        if dirty && rng.chance(self.case.second_opinions) {
            self.second_opinion(&file, "after it was opened, repaired and closed")?;
        }
        if self.case.snapshot {
            let config = Qcow2Config {
                snapshot: Some(SNAPSHOT.to_owned()),
                read_only: true,
                ..Qcow2Config::default()
            };
            let node = Qcow2Node::open(children, &config).await;
            let node = node.map_err(|error| format!("the snapshot does not open: {error}"))?;
            let what = |error| format!("in the snapshot, {error}");
            look(&*node, |sector, bytes| {
                log.model.compare(sector, bytes, 0, 0).map_err(what)
            })
            .await?;
        }
        Ok(())
    }

    /// None may be lost, and those that do not record must be as they were. Returns those that record, and say that they are true.
    fn judge_bitmaps(
        &self,
        node: &Qcow2Node,
    ) -> std::result::Result<Vec<PersistentBitmap>, String> {
        let mut all = node.bitmaps();
        if !self.case.bitmaps {
            return Ok(all);
        }
        let names: Vec<_> = all.iter().map(|one| one.name.as_str()).collect();
        // The name of a data file may put what is said of bitmaps across two sectors.
        let may_be_none = self.case.data_file && names.is_empty();
        if names != [RECORDING, STILL] && !may_be_none {
            return Err(format!("the bitmaps are {names:?}"));
        }
        all.retain(|one| !one.bitmap.info().inconsistent);
        for one in &all {
            let (is_recording, is_still) = (one.bitmap.is_recording(), one.name == STILL);
            if is_recording == is_still || (is_still && one.bitmap.dirty_bytes() > 0) {
                return Err(format!("bitmap '{}' is {:?}", one.name, one.bitmap));
            }
        }
        all.retain(|one| one.name == RECORDING);
        Ok(all)
    }

    /// What is not as it was in the beginning is dirty.
    fn compare_to_bitmaps(
        &self,
        sector: u64,
        bytes: &[u8],
        bitmaps: &[PersistentBitmap],
    ) -> std::result::Result<(), String> {
        for one in bitmaps {
            for (number, sector) in (sector..).zip(bytes.chunks(SECTOR as usize)) {
                let was = self.versions.get(number as usize).copied().unwrap_or(0);
                let is = super::model::version_of(number, sector)?;
                if is != was && !one.bitmap.is_dirty(number * SECTOR, SECTOR) {
                    return Err(format!(
                        "sector {number} was {was} and is {is}, and bitmap '{}' says that it was not changed",
                        one.name
                    ));
                }
            }
        }
        Ok(())
    }

    /// Life goes on after a crash: new requests find what they must, and leave a sound image.
    async fn use_again(
        &self,
        node: &Arc<Qcow2Node>,
        rng: &mut Rng,
    ) -> std::result::Result<(), String> {
        let recorder = Recorder::default();
        let mut there = Vec::new();
        look(&**node, |sector, bytes| {
            for (number, one) in (sector..).zip(bytes.chunks(SECTOR as usize)) {
                there.push(super::model::version_of(number, one)?);
            }
            Ok(())
        })
        .await?;
        recorder.log().model = Model::new(there);
        let guest = Guest::new(node.clone(), &recorder, 1 << 20);
        // Whoever has lost a bitmap removes it, and can go on.
        let lost = node.bitmaps().into_iter();
        let lost: Vec<_> = lost.filter(|one| one.bitmap.info().inconsistent).collect();
        for one in &lost {
            node.remove_bitmap(&one.name);
        }
        let forgotten = node.forget_removed_bitmaps().await;
        forgotten.map_err(|error| format!("bitmaps cannot be removed: {error}"))?;
        if self.case.resizes {
            // What a larger disk had there must not come back.
            let answer = guest.resize(node.size() + rng.below(256) * SECTOR).await;
            answer.map_err(|error| format!("growing after the crash fails: {error}"))?;
        }
        for _ in 0..12 {
            let answer = guest
                .random(&self.case, node.size().min(self.case.hot), rng)
                .await;
            answer.map_err(|error| format!("a request after the crash fails: {error}"))?;
        }
        let (model, now) = {
            let mut log = recorder.log();
            let now = log.tick();
            (std::mem::take(&mut log.model), now)
        };
        let what = |error| format!("used again after the crash, {error}");
        look(&**node, |sector, bytes| {
            model.compare(sector, bytes, now, now).map_err(what)
        })
        .await
    }
}

fn backing(bytes: Option<&Vec<u8>>) -> Option<Arc<dyn Node>> {
    bytes.map(|bytes| Disk::quiet(bytes.clone()) as Arc<dyn Node>)
}

/// The lowest bit of the incompatible features (specification, "Header": byte 72, version 3 only).
fn is_dirty(image: &[u8]) -> bool {
    image[7] == 3 && image[79] & 1 == 1
}

/// Our own check: no corruption, leaks allowed.
async fn verdict(file: &dyn Node, when: &str) -> std::result::Result<(), String> {
    let result = check(file, Repair::None, &mut |_, _| {}).await;
    let result = result.map_err(|error| format!("{when}, the check fails: {error}"))?;
    if result.corruptions == 0 && result.check_errors == 0 {
        return Ok(());
    }
    let messages: Vec<_> = result.messages.iter().take(8).cloned().collect();
    Err(format!(
        "{when}, the check finds {} corruptions and {} errors: {}",
        result.corruptions,
        result.check_errors,
        messages.join("; ")
    ))
}

/// Reads the whole disk and shows every piece.
async fn look(
    node: &dyn Node,
    mut see: impl FnMut(u64, &[u8]) -> std::result::Result<(), String>,
) -> std::result::Result<(), String> {
    let mut buf = Buf::new(CHUNK).unwrap();
    let (mut at, size) = (0, node.size());
    while at < size {
        buf.set_window(0..CHUNK.min((size - at) as usize));
        let result;
        (result, buf) = io::read(node, at, buf).await;
        result.map_err(|error| format!("read of {} bytes at {at} fails: {error}", buf.len()))?;
        see(at / SECTOR, buf.as_slice())?;
        at += buf.len() as u64;
    }
    Ok(())
}
