//! Stream and commit shorten chains while the disk is written: nobody sees a difference, the images on disk say what is so, and
//! a crash in the middle leaves what was there.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::sync::Arc;
use std::time::Duration;

use diskfuse_block::drivers::{RawConfig, open_raw};
use diskfuse_block::graph::{ChildRole, User};
use diskfuse_block::{Permissions, Resize};
use diskfuse_jobs::{
    CommitConfig, Job, JobConfig, Start, Status, StreamBase, StreamConfig, commit, commit_writes,
    stream,
};
use diskfuse_ring::sleep;
use support::guest::Guest;
use support::rng::Rng;
use support::{KIB, Lab, MIB, assert_same, cases, must, reaches, run};

async fn busy(guest: &Guest, operations: u64) {
    let until = guest.operations() + operations;
    while guest.operations() < until {
        sleep(Duration::from_millis(1)).await;
    }
}

async fn scatter(lab: &Lab, rng: &mut Rng, name: &str, size: u64) {
    for _ in 0..10 {
        let len = rng.length(512, size / 8);
        let at = rng.below((size - len) / 512 + 1) * 512;
        let mut bytes = vec![0; len as usize];
        if rng.chance(70) {
            rng.fill(&mut bytes);
        }
        lab.fill(name, at, &bytes).await;
    }
}

/// `base` (raw or qcow2), `one`, `two` and `top`, of different sizes and clusters, with data in each.
async fn chain(lab: &Lab, rng: &mut Rng) -> Vec<u8> {
    let size = |rng: &mut Rng| rng.within(4..10) * MIB + rng.below(64) * 4 * KIB;
    let options = [
        "cluster_size=4096",
        "",
        "cluster_size=512",
        "extended_l2=on",
        "lazy_refcounts=on",
    ];
    let bytes = size(rng);
    match rng.chance(50) {
        true => lab.raw("base", bytes),
        false => lab.qcow2("base", bytes, rng.pick(&options), None).await,
    }
    scatter(lab, rng, "base", bytes).await;
    for (name, below) in [("one", "base"), ("two", "one"), ("top", "two")] {
        let bytes = size(rng);
        lab.qcow2(name, bytes, rng.pick(&options), Some(below))
            .await;
        scatter(lab, rng, name, bytes).await;
    }
    lab.contents("top").await
}

async fn begin(lab: &Lab, start: diskfuse_block::Result<Start>) -> Arc<Job> {
    start.unwrap().begin(&lab.jobs).await.unwrap()
}

fn below(lab: &Lab, name: &str) -> Option<String> {
    let edges = lab.graph.edges(name).unwrap();
    let backing = edges
        .into_iter()
        .find(|(role, _)| *role == ChildRole::Backing);
    backing.map(|(_, name)| name)
}

/// The file itself, read by somebody else, is the disk.
async fn assert_on_disk(lab: &Lab, name: &str, expected: &[u8]) {
    for name in lab.graph.names() {
        lab.graph.get(&name).unwrap().flush().await.unwrap();
    }
    lab.assert_sound(name).await;
    let (from, to) = (lab.path(&format!("{name}.qcow2")), lab.path("seen.raw"));
    let (from, to) = (from.to_str().unwrap(), to.to_str().unwrap());
    must(
        "qemu-img",
        &["convert", "-U", "-f", "qcow2", "-O", "raw", from, to],
    );
    assert_same(&std::fs::read(to).unwrap(), expected, "what QEMU sees");
}

#[test]
fn a_stream_shortens_the_chain_under_load() {
    cases::run("stream", 10, |seed| {
        run(async {
            let mut rng = Rng::new(seed);
            let lab = Lab::new();
            let model = chain(&lab, &mut rng).await;
            let mut guest = Guest::start(&lab.graph, "top", model, 2, seed);
            let (base, expected) = match rng.below(4) {
                0 => (StreamBase::None, None),
                1 => (StreamBase::Node("base".to_owned()), Some("base")),
                2 => (StreamBase::Node("one".to_owned()), Some("one")),
                _ => (StreamBase::Bottom("two".to_owned()), Some("one")),
            };
            let mut config = StreamConfig {
                base,
                ..StreamConfig::new(JobConfig::new("s"), "top")
            };
            if rng.chance(30) {
                config.job.speed = 16 * MIB;
            }
            let job = begin(&lab, stream(&lab.jobs, &lab.graph, config)).await;
            busy(&guest, 30).await;
            job.over().await.unwrap();
            assert_eq!(below(&lab, "top").as_deref(), expected);
            busy(&guest, 50).await;
            guest.stop();
            let model = guest.model();
            drop(guest);
            assert_same(&lab.contents("top").await, &model, "the disk");
            for name in ["two", "one"]
                .iter()
                .take_while(|name| Some(**name) != expected)
            {
                lab.graph.remove(name).unwrap();
            }
            assert_on_disk(&lab, "top", &model).await;
        });
    });
}

#[test]
fn a_stream_that_is_given_up_changes_nothing_that_is_seen() {
    cases::run("stream given up", 4, |seed| {
        run(async {
            let mut rng = Rng::new(seed);
            let lab = Lab::new();
            let model = chain(&lab, &mut rng).await;
            let mut guest = Guest::start(&lab.graph, "top", model, 2, seed);
            let mut config = StreamConfig::new(JobConfig::new("s"), "top");
            config.job.speed = MIB;
            let job = begin(&lab, stream(&lab.jobs, &lab.graph, config)).await;
            busy(&guest, 50).await;
            job.cancel(true).unwrap();
            job.over().await.unwrap_err();
            guest.stop();
            assert_eq!(below(&lab, "top").as_deref(), Some("two"));
            assert_on_disk(&lab, "top", &guest.model()).await;
        });
    });
}

#[test]
fn an_active_commit_ends_on_the_base_under_load() {
    cases::run("active commit", 8, |seed| {
        run(async {
            let mut rng = Rng::new(seed);
            let lab = Lab::new();
            let model = chain(&lab, &mut rng).await;
            let mut guest = Guest::start(&lab.graph, "top", model, 2, seed);
            let base = rng.pick(&["base", "one"]);
            let config = CommitConfig {
                base: Some(base.to_owned()),
                ..CommitConfig::new(JobConfig::new("c"), "top")
            };
            let job = begin(&lab, commit(&lab.jobs, &lab.graph, config)).await;
            busy(&guest, 30).await;
            reaches(&job, &[Status::Ready]).await;
            busy(&guest, 50).await;
            let completes = rng.chance(70);
            match completes {
                true => job.complete().unwrap(),
                false => job.cancel(rng.chance(50)).unwrap(),
            }
            let outcome = job.over().await;
            busy(&guest, 50).await;
            guest.stop();
            let now = guest.node();
            if completes {
                outcome.unwrap();
                assert_eq!(now, base);
            } else {
                assert_eq!(now, "top");
            }
            // The base may be longer than the overlay was.
            let model = guest.model();
            let shown = lab.contents(&now).await;
            assert_same(&shown[..model.len()], &model, "the disk");
            drop(guest);
            if completes {
                for name in ["top", "two"] {
                    lab.graph.remove(name).unwrap();
                }
            }
        });
    });
}

#[test]
fn what_grows_before_an_active_commit_begins_is_committed() {
    run(async {
        let lab = Lab::new();
        lab.raw("base", MIB);
        lab.qcow2("top", MIB, "", Some("base")).await;
        let config = CommitConfig::new(JobConfig::new("c"), "top");
        let start = commit(&lab.jobs, &lab.graph, config).unwrap();
        let node = lab.graph.get("top").unwrap();
        node.resize(2 * MIB, Resize::AtLeast, false).await.unwrap();
        lab.fill("top", 2 * MIB - 8 * KIB, &[1; 4096]).await;
        let job = start.begin(&lab.jobs).await.unwrap();
        lab.fill("top", 2 * MIB - 4 * KIB, &[2; 4096]).await;
        reaches(&job, &[Status::Ready]).await;
        lab.fill("top", MIB, &[3; 4096]).await;
        let model = lab.contents("top").await;
        job.complete().unwrap();
        job.over().await.unwrap();
        assert_same(&lab.contents("base").await, &model, "the base");
    });
}

#[test]
fn a_commit_in_the_middle_shortens_the_chain_under_load() {
    cases::run("commit", 8, |seed| {
        run(async {
            let mut rng = Rng::new(seed);
            let lab = Lab::new();
            let model = chain(&lab, &mut rng).await;
            let mut guest = Guest::start(&lab.graph, "top", model, 2, seed);
            let (top, base, above) = rng.pick(&[
                ("two", "base", "top"),
                ("two", "one", "top"),
                ("one", "base", "two"),
            ]);
            let config = CommitConfig {
                top: Some(top.to_owned()),
                base: Some(base.to_owned()),
                ..CommitConfig::new(JobConfig::new("c"), "top")
            };
            let job = begin(&lab, commit(&lab.jobs, &lab.graph, config)).await;
            busy(&guest, 30).await;
            job.over().await.unwrap();
            assert_eq!(below(&lab, above).as_deref(), Some(base));
            busy(&guest, 50).await;
            guest.stop();
            let model = guest.model();
            drop(guest);
            assert_same(&lab.contents("top").await, &model, "the disk");
            lab.graph.remove(top).unwrap();
            let file = match std::fs::exists(lab.path(&format!("{base}.img"))).unwrap() {
                true => format!("{base}.img"),
                false => format!("{base}.qcow2"),
            };
            assert!(lab.info(above).contains(&file), "{}", lab.info(above));
            assert_on_disk(&lab, "top", &model).await;
        });
    });
}

#[test]
fn a_commit_in_the_middle_stands_still_while_the_image_above_is_drained() {
    run(async {
        let lab = Lab::new();
        let model = chain(&lab, &mut Rng::new(7)).await;
        let mut config = CommitConfig {
            top: Some("two".to_owned()),
            base: Some("base".to_owned()),
            ..CommitConfig::new(JobConfig::new("c"), "top")
        };
        let writes = commit_writes(&lab.graph, &config).unwrap();
        assert_eq!(writes, ["base", "top"]);
        config.job.speed = MIB;
        let job = begin(&lab, commit(&lab.jobs, &lab.graph, config)).await;
        reaches(&job, &[Status::Running]).await;
        let drained = lab.graph.drain("top").await.unwrap();
        job.set_speed(0).unwrap();
        sleep(Duration::from_millis(500)).await;
        assert_eq!(job.status(), Status::Running);
        assert_eq!(below(&lab, "top").as_deref(), Some("two"));
        drop(drained);
        job.over().await.unwrap();
        assert_eq!(below(&lab, "top").as_deref(), Some("base"));
        assert_on_disk(&lab, "top", &model).await;
        let config = CommitConfig::new(JobConfig::new("c"), "top");
        assert_eq!(commit_writes(&lab.graph, &config).unwrap(), ["base"]);
    });
}

#[test]
fn what_cannot_be_is_refused_in_the_words_of_qemu() {
    run(async {
        let lab = Lab::new();
        let mut rng = Rng::new(1);
        chain(&lab, &mut rng).await;
        lab.raw("other", MIB);
        let said = |start: diskfuse_block::Result<Start>| start.unwrap_err().to_string();
        let streamed = |base: &str| {
            let config = StreamConfig {
                base: StreamBase::Node(base.to_owned()),
                ..StreamConfig::new(JobConfig::new("j"), "top")
            };
            said(stream(&lab.jobs, &lab.graph, config))
        };
        assert_eq!(
            streamed("other"),
            "Node 'other' is not a backing image of 'top'"
        );
        let committed = |node: &str, top: Option<&str>, base: Option<&str>| {
            let config = CommitConfig {
                top: top.map(str::to_owned),
                base: base.map(str::to_owned),
                ..CommitConfig::new(JobConfig::new("j"), node)
            };
            said(commit(&lab.jobs, &lab.graph, config))
        };
        assert_eq!(
            committed("top", Some("other"), None),
            "'other' is not in this backing file chain"
        );
        assert_eq!(
            committed("other", None, None),
            "cannot commit an image into itself"
        );
        // What it grew by meanwhile would show what the base has there.
        let grower = User {
            name: "grower".to_owned(),
            perm: Permissions::WRITER,
            shared: Permissions::ALL,
            drain: None,
            follows: true,
        };
        let grower = lab.graph.attach("top", grower).unwrap();
        assert_eq!(
            streamed("base"),
            "Permission conflict on node 'top': permissions 'resize' are both required by grower and unshared by block job 'j'"
        );
        drop(grower);
        lab.qcow2("stranger", MIB, "", Some("one")).await;
        assert_eq!(
            committed("top", None, Some("base")),
            "Node 'one' is in use by node 'stranger', who would see the commit"
        );
        assert!(lab.jobs.list().is_empty());
    });
}

/// What a commit writes is for the chain above only: it would be a mixture to anybody else, who may come later than the job.
#[test]
fn nobody_sees_the_images_that_a_commit_changes() {
    run(async {
        for top in ["top", "two"] {
            let lab = Lab::new();
            lab.raw("base", 4 * MIB);
            for (name, below) in [("one", "base"), ("two", "one"), ("top", "two")] {
                lab.qcow2(name, 4 * MIB, "", Some(below)).await;
            }
            lab.fill("two", 0, &vec![1; 2 << 20]).await;
            let model = lab.contents("top").await;
            let mut guest = Guest::start(&lab.graph, "top", model, 1, 1);
            let mut config = CommitConfig::new(JobConfig::new("c"), "top");
            config.top = Some(top.to_owned());
            config.job.speed = 64 * KIB;
            let job = begin(&lab, commit(&lab.jobs, &lab.graph, config)).await;
            let look = |name: &str| {
                let user = User {
                    name: "export 'late'".to_owned(),
                    perm: Permissions::READER,
                    shared: Permissions::ALL,
                    drain: None,
                    follows: true,
                };
                lab.graph.attach(name, user)
            };
            let node = lab.graph.get("base").unwrap();
            let filter = open_raw(node, &RawConfig::default()).unwrap();
            lab.graph.insert(Some("filter"), filter, &["base"]).unwrap();
            for name in ["base", "one", "two", "filter"] {
                let error = look(name).map(drop).unwrap_err().to_string();
                let words = "permissions 'consistent read' are both required by export 'late' and unshared by block job 'c'";
                assert!(error.contains(words), "{name}: {error}");
            }
            drop(look("top").unwrap());
            lab.graph.remove("filter").unwrap();
            job.set_speed(0).unwrap();
            if top == "top" {
                reaches(&job, &[Status::Ready]).await;
                job.complete().unwrap();
            }
            job.over().await.unwrap();
            drop(look("base"));
            guest.stop();
            assert_same(&lab.contents(&guest.node()).await, &guest.model(), top);
        }
    });
}
