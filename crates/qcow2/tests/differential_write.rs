//! Random requests through us, one at a time and many at once on four threads, over images of all kinds. What is read
//! agrees with a model at every step; the closed image is clean to `qemu-img check`, leaks included, holds what the model
//! says, and goes on working in the hands of `qemu-io` and then of us again.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::pedantic)]

mod support;

use std::sync::Arc;

use diskfuse_block::Node;
use diskfuse_block::drivers::DetectZeroes;
use diskfuse_qcow2::node::{OverlapCheck, Qcow2Config, Qcow2Node};
use diskfuse_ring::IoThread;
use support::engine::{self, Below, wait};
use support::image::{Image, Snapshot, Wanted};
use support::model::Model;
use support::rng::Rng;
use support::session::{Load, Session};
use support::{cases, tools};

const MIB: u64 = 1 << 20;

const WANTED: Wanted = Wanted {
    depth: 3,
    snapshots: true,
    bitmaps: true,
    compressed: true,
    commands: 12,
    huge: false,
    most: 16 * MIB,
};

#[test]
fn one_thread_agrees_with_the_model_and_with_qemu() {
    cases::run("write on one thread", 75, |seed| case(seed, 1, WANTED));
}

#[test]
fn four_threads_agree_with_the_model_and_with_qemu() {
    cases::run("write on four threads", 75, |seed| case(seed, 4, WANTED));
}

#[test]
fn huge_sparse_disks_agree_with_the_model_and_with_qemu() {
    let wanted = Wanted {
        huge: true,
        ..WANTED
    };
    cases::run("write a huge disk", 4, |seed| case(seed, 4, wanted));
}

fn random_config(rng: &mut Rng, image: &Image) -> Qcow2Config {
    let cluster_size = image.options().cluster_size;
    let may_lazy = image.options().v3;
    let zeroes = [DetectZeroes::Off, DetectZeroes::On, DetectZeroes::Unmap];
    let checks = [OverlapCheck::CACHED, OverlapCheck::ALL, OverlapCheck::NONE];
    Qcow2Config {
        compress: image.options().data_file.is_none() && rng.chance(15),
        discard: rng.chance(75),
        detect_zeroes: rng.pick(&zeroes),
        lazy_refcounts: (may_lazy && rng.chance(20)).then_some(true),
        l2_cache_size: rng.chance(50).then_some(2 * cluster_size),
        refcount_cache_size: rng.chance(50).then_some(4 * cluster_size),
        overlap_check: rng.pick(&checks),
        discard_no_unref: may_lazy && rng.chance(15),
        pass_discard_other: rng.chance(50),
        ..Qcow2Config::default()
    }
}

fn case(seed: u64, count: u64, wanted: Wanted) {
    let mut rng = Rng::new(seed);
    let mut image = Image::random(&mut rng, wanted);
    let mut before = snapshots(&image);
    let threads = engine::threads(engine::random_choice(&mut rng), count);
    let sessions = rng.within(1..4);
    for session in 0..sessions {
        let mut model = Model::of(&image.raw());
        let config = random_config(&mut rng, &image);
        let below = Below {
            direct: rng.chance(20),
            read_only: false,
        };
        image
            .recipe
            .push(format!("session {session}: {config:?}, {below:?}"));
        let node = open(&image, &config, below, &threads[0]);
        one_session(&mut rng, &image, node, &mut model, &threads);
        tools::must_be_clean(image.path(), &image.story());
        tools::convert(image.path(), &image.raw(), None);
        if let Err(wrong) = model.check_raw(&image.raw()) {
            panic!("read by QEMU, {wrong}\n{}", image.story());
        }
        if image.options().data_file == Some(true) {
            let data_file = image.top().data_file.clone().unwrap();
            // QEMU makes it as long as whole clusters are.
            let same = model.check_shown(&data_file);
            assert!(
                same.is_ok(),
                "the raw data file: {same:?}\n{}",
                image.story()
            );
        }
        same_snapshots(&image, &mut before);
        image.layers.last_mut().unwrap().size = model.size;
        if rng.chance(60) {
            image.more(&mut rng, wanted);
            tools::must_be_clean(image.path(), &image.story());
            tools::convert(image.path(), &image.raw(), None);
        }
    }
}

fn open(image: &Image, config: &Qcow2Config, below: Below, thread: &IoThread) -> Arc<Qcow2Node> {
    let (layers, config) = (image.layers.clone(), config.clone());
    let opened = thread
        .mailbox()
        .call(move || async move { engine::open(&layers, &config, below).await });
    match wait(opened, &"open") {
        Ok(node) => node,
        Err(error) => panic!("open: {error}\n{}", image.story()),
    }
}

fn one_session(
    rng: &mut Rng,
    image: &Image,
    node: Arc<Qcow2Node>,
    model: &mut Model,
    threads: &[IoThread],
) {
    let cluster_size = image.options().cluster_size;
    let largest = 64 * MIB;
    let load = Load {
        together: 4 * threads.len() as u64,
        most: MIB.max(2 * cluster_size).min(model.size),
        resize: model.size <= largest,
        cluster_size,
        largest,
    };
    let disk: Arc<dyn Node> = node.clone();
    let mut session = Session::new(disk, model, threads, rng);
    session.journal.extend(image.recipe.clone());
    for _ in 0..rng.within(4..30) {
        session.random_round(rng, load);
    }
    session.read_all();
    let closed = threads[0]
        .mailbox()
        .call(move || async move { node.close().await });
    if let Err(error) = wait(closed, &"close") {
        session.fail(&format!("close: {error}"));
    }
}

/// What QEMU reads of each snapshot, as models: those of one that was smaller or larger then show the size of now.
fn snapshots(image: &Image) -> Vec<Model> {
    let read = |snapshot: &Snapshot| {
        let name = &snapshot.name;
        let raw = image.file(&format!("{name}.before"));
        tools::convert(image.path(), &raw, Some(name));
        Model::of(&raw)
    };
    image.snapshots.iter().map(read).collect()
}

/// Each snapshot must be what it was, as far as QEMU shows it.
fn same_snapshots(image: &Image, before: &mut [Model]) {
    for (Snapshot { name, .. }, model) in image.snapshots.iter().zip(before) {
        let raw = image.file(&format!("{name}.after"));
        tools::convert(image.path(), &raw, Some(name));
        if let Err(wrong) = model.check_shown(&raw) {
            panic!("snapshot {name} changed: {wrong}\n{}", image.story());
        }
    }
}

/// The model itself, over a disk that is known to be right.
#[test]
fn the_model_agrees_with_a_plain_file() {
    cases::run("plain file", 4, |seed| {
        let mut rng = Rng::new(seed);
        let image = Image::empty();
        let (path, initial) = (image.file("disk"), image.raw());
        let mut bytes = vec![0; MIB as usize];
        rng.fill(&mut bytes[4096..300_000]);
        std::fs::write(&path, &bytes).unwrap();
        std::fs::write(&initial, &bytes).unwrap();
        let threads = engine::threads(engine::random_choice(&mut rng), 4);
        let load = Load {
            together: 8,
            most: MIB / 2,
            resize: true,
            cluster_size: 65536,
            largest: 8 * MIB,
        };
        let mut model = Model::of(&initial);
        let disk = engine::file(&path, Below::default()).unwrap();
        let mut session = Session::new(disk, &mut model, &threads, &mut rng);
        for _ in 0..30 {
            session.random_round(&mut rng, load);
        }
        session.read_all();
        model.check_raw(&path).unwrap();
        let middle = model.interesting()[0];
        let mut wrong = std::fs::read(&path).unwrap();
        wrong[(middle * 512 + 7) as usize] ^= 1;
        std::fs::write(&path, wrong).unwrap();
        assert!(model.check_raw(&path).is_err(), "one wrong bit is not seen");
    });
}
