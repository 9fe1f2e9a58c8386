//! Images written by us: the bytes that a model says, for us and for QEMU, and nothing wrong with the image.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::pedantic)]

mod node_support;

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use diskfuse_block::drivers::DetectZeroes;
use diskfuse_block::{Access, BlockStatus, Extent, Node, Resize, Zeroes};
use diskfuse_qcow2::node::{Children, Layered, Qcow2Config, Qcow2Node};
use node_support::*;

/// Operations in a row against a model.
const STEPS: u64 = 150;

/// Random operations through the node; `model` is what the disk holds before and after.
async fn exercise(node: &Qcow2Node, model: &mut [u8], random: &mut Random, discards: bool) {
    let size = model.len() as u64;
    for step in 0..STEPS {
        let (offset, len) = random.range(size, 400 * KIB);
        let range = offset as usize..(offset + len) as usize;
        let what = format!("step {step}, {len} bytes at {offset}");
        match random.below(12) {
            0 | 1 => {
                let how = [Zeroes::Keep, Zeroes::MayUnmap][random.below(2) as usize];
                node.write_zeroes(offset, len, how).await.unwrap();
                model[range].fill(0);
            }
            2 => {
                node.discard(offset, len).await.unwrap();
                if discards {
                    // What it reads as afterwards is the node's to say.
                    let now = read(node, offset, len as usize).await.unwrap();
                    for (at, byte) in range.clone().zip(&now) {
                        assert!(*byte == 0 || *byte == model[at], "{what}: byte {at}");
                    }
                    model[range].copy_from_slice(&now);
                }
            }
            3 => node.flush().await.unwrap(),
            4 | 5 => {
                let ours = read(node, offset, len as usize).await.unwrap();
                assert_same(&ours, &model[range], &what);
            }
            _ => {
                let bytes = pattern(len as usize, random.next());
                write(node, offset, &bytes).await.unwrap();
                model[range].copy_from_slice(&bytes);
            }
        }
    }
}

/// Exercises an image, closes it and compares.
fn check_image(
    path: &Path,
    config: &Qcow2Config,
    children: Children,
    mut model: Vec<u8>,
    seed: u64,
) {
    run(async {
        let node = Qcow2Node::open(children, config).await.unwrap();
        let mut random = Random::new(seed);
        exercise(&node, &mut model, &mut random, config.discard).await;
        assert_same(&contents(&*node, 300_000).await, &model, "read by us");
        node.close().await.unwrap();
    });
    assert_clean(path);
    assert_same(&converted(path), &model, "read by QEMU");
}

#[test]
fn images_of_all_kinds_hold_what_was_written() {
    let dir = directory();
    let kinds = [
        "",
        "compat=0.10",
        "cluster_size=512",
        "cluster_size=4096",
        "cluster_size=2M",
        "extended_l2=on",
        "extended_l2=on,cluster_size=16k",
        "extended_l2=on,cluster_size=2M",
        "refcount_bits=1",
        "refcount_bits=64",
        "preallocation=metadata",
        "lazy_refcounts=on",
        "compression_type=zstd",
    ];
    for (seed, options) in (1..).zip(kinds) {
        for discard in [false, true] {
            println!("{options} discard={discard}");
            let size = 6 * MIB + 512 * seed;
            let path = create(&dir, "image.qcow2", options, size);
            let config = Qcow2Config {
                discard,
                ..Qcow2Config::default()
            };
            check_image(
                &path,
                &config,
                children(&path),
                vec![0; size as usize],
                seed,
            );
        }
    }
}

#[test]
fn options_change_how_it_is_written_and_not_what() {
    let dir = directory();
    let base = Qcow2Config {
        discard: true,
        ..Qcow2Config::default()
    };
    let configs = [
        Qcow2Config {
            compress: true,
            ..base.clone()
        },
        Qcow2Config {
            detect_zeroes: DetectZeroes::Unmap,
            ..base.clone()
        },
        Qcow2Config {
            detect_zeroes: DetectZeroes::On,
            ..base.clone()
        },
        Qcow2Config {
            discard_no_unref: true,
            ..base.clone()
        },
        Qcow2Config {
            lazy_refcounts: Some(true),
            ..base.clone()
        },
        Qcow2Config {
            l2_cache_size: Some(65536),
            refcount_cache_size: Some(65536),
            ..base.clone()
        },
    ];
    for (seed, config) in (20..).zip(configs) {
        for options in [
            "",
            "extended_l2=on",
            "cluster_size=4k,compression_type=zstd",
        ] {
            println!("{options} {config:?}");
            let path = create(&dir, "image.qcow2", options, 6 * MIB);
            check_image(
                &path,
                &config,
                children(&path),
                vec![0; 6 * MIB as usize],
                seed,
            );
        }
    }
}

#[test]
fn an_overlay_takes_what_is_written_and_shows_the_rest_of_its_backing_file() {
    let dir = directory();
    let base = dir.path().join("base.raw");
    let below = pattern(3 * MIB as usize + 1024, 8);
    std::fs::write(&base, &below).unwrap();
    for (seed, options) in (30..).zip([
        "",
        "extended_l2=on",
        "cluster_size=4k",
        "compat=0.10",
        "cluster_size=1M",
    ]) {
        println!("{options}");
        let backed = format!("backing_file={},backing_fmt=raw,{options}", text(&base));
        let path = create(&dir, "overlay.qcow2", backed.trim_end_matches(','), 6 * MIB);
        let children = Children {
            backing: Some(file(&base, false)),
            ..children(&path)
        };
        let config = Qcow2Config {
            discard: true,
            ..Qcow2Config::default()
        };
        let mut model = below.clone();
        model.resize(6 * MIB as usize, 0);
        let mut shown = model.clone();
        run(async {
            let node = Qcow2Node::open(children, &config).await.unwrap();
            let mut random = Random::new(seed);
            exercise(&node, &mut shown, &mut random, true).await;
            assert_same(&contents(&*node, 300_000).await, &shown, "read by us");
            node.close().await.unwrap();
        });
        assert_clean(&path);
        assert_same(&converted(&path), &shown, "read by QEMU");
        assert_same(&std::fs::read(&base).unwrap(), &below, "the backing file");
    }
}

#[test]
fn what_a_snapshot_shares_is_not_written() {
    let dir = directory();
    for (seed, options) in (40..).zip(["", "extended_l2=on", "cluster_size=4k"]) {
        let path = create(&dir, "image.qcow2", options, 6 * MIB);
        let mut random = Random::new(seed);
        let mut model = vec![0; 6 * MIB as usize];
        run(async {
            let node = open(&path).await;
            exercise(&node, &mut model, &mut random, false).await;
            node.close().await.unwrap();
        });
        let before = model.clone();
        must("qemu-img", &["snapshot", "-c", "kept", text(&path)]);
        let config = Qcow2Config {
            discard: true,
            ..Qcow2Config::default()
        };
        run(async {
            let node = open_with(&path, &config).await;
            exercise(&node, &mut model, &mut random, true).await;
            node.close().await.unwrap();
        });
        assert_clean(&path);
        assert_same(&converted(&path), &model, "the disk");
        must("qemu-img", &["snapshot", "-a", "kept", text(&path)]);
        assert_same(&converted(&path), &before, "the snapshot");
        assert_clean(&path);
    }
}

#[test]
fn compressed_clusters_are_replaced() {
    let dir = directory();
    let raw = dir.path().join("source.raw");
    let bytes = pattern(4 * MIB as usize, 3);
    std::fs::write(&raw, &bytes).unwrap();
    for (seed, options) in (50..).zip([
        "",
        "extended_l2=on",
        "cluster_size=4k",
        "compression_type=zstd",
    ]) {
        let path = dir.path().join("packed.qcow2");
        let mut args = vec!["convert", "-c", "-f", "raw", "-O", "qcow2"];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        must(
            "qemu-img",
            &[&args[..], &[text(&raw), text(&path)]].concat(),
        );
        for compress in [false, true] {
            let config = Qcow2Config {
                compress,
                discard: true,
                ..Qcow2Config::default()
            };
            check_image(&path, &config, children(&path), converted(&path), seed);
        }
    }
}

#[test]
fn whole_clusters_are_compressed_when_told_so() {
    let dir = directory();
    let path = create(&dir, "packed.qcow2", "", 8 * MIB);
    let config = Qcow2Config {
        compress: true,
        ..Qcow2Config::default()
    };
    run(async {
        let node = open_with(&path, &config).await;
        write(&*node, 0, &vec![0x5A; 4 * MIB as usize])
            .await
            .unwrap();
        let status = node.layer_status(0, 8 * MIB).await.unwrap();
        assert_eq!((status.len, status.layered), (4 * MIB, Layered::Compressed));
        // Part of a cluster takes the cluster out of it.
        write(&*node, 65536, &[1; 512]).await.unwrap();
        let status = node.layer_status(65536, 65536).await.unwrap();
        assert_eq!(status.layered, Layered::Data);
        node.close().await.unwrap();
    });
    assert_clean(&path);
    assert!(std::fs::metadata(&path).unwrap().len() < 512 * KIB);
    let mut expected = vec![0x5A; 4 * MIB as usize];
    expected.resize(8 * MIB as usize, 0);
    expected[65536..66048].fill(1);
    assert_same(&converted(&path), &expected, "compressed");
}

#[test]
fn data_in_a_file_of_their_own_are_there() {
    let dir = directory();
    for (seed, raw) in [(60, "off"), (61, "on")] {
        let data = dir.path().join(format!("data-{raw}.raw"));
        let options = format!("data_file={},data_file_raw={raw}", text(&data));
        let path = create(&dir, "image.qcow2", &options, 6 * MIB);
        let children = Children {
            data_file: Some(file(&data, false)),
            ..children(&path)
        };
        let config = Qcow2Config {
            discard: true,
            ..Qcow2Config::default()
        };
        check_image(&path, &config, children, vec![0; 6 * MIB as usize], seed);
        if raw == "on" {
            let bytes = std::fs::read(&data).unwrap();
            assert_same(&bytes, &converted(&path), "the data file by itself");
        }
        let missing = run(Qcow2Node::open(node_support::children(&path), &config));
        let said = missing.unwrap_err().to_string();
        assert!(said.contains("data-file"), "{said}");
    }
}

#[test]
fn whole_zero_clusters_need_no_data() {
    let dir = directory();
    let path = create(&dir, "image.qcow2", "", 4 * MIB);
    let config = Qcow2Config {
        discard: true,
        ..Qcow2Config::default()
    };
    run(async {
        let node = open_with(&path, &config).await;
        write(&*node, 0, &vec![7; 2 * MIB as usize]).await.unwrap();
        let used = std::fs::metadata(&path).unwrap().len();
        node.write_zeroes(0, MIB, Zeroes::Keep).await.unwrap();
        let zero = BlockStatus {
            len: MIB,
            zero: true,
            host_offset: None,
        };
        assert_eq!(node.block_status(0, 2 * MIB).await.unwrap(), zero);
        // The clusters were kept: writing them again takes nothing new.
        write(&*node, 0, &vec![8; MIB as usize]).await.unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().len(), used);
        node.discard(0, 4 * MIB).await.unwrap();
        let status = node.layer_status(0, 4 * MIB).await.unwrap();
        assert_eq!(
            (status.len, status.layered),
            (4 * MIB, Layered::Unallocated)
        );
        node.close().await.unwrap();
    });
    assert_clean(&path);
    let left = std::fs::metadata(&path).unwrap().blocks() * 512;
    assert!(left <= 8 * 65536, "{left} bytes are left");
}

#[test]
fn a_disk_grows_and_shrinks() {
    let dir = directory();
    let base = dir.path().join("base.raw");
    std::fs::write(&base, pattern(8 * MIB as usize, 8)).unwrap();
    for options in ["", "extended_l2=on", "cluster_size=512"] {
        let backed = format!("backing_file={},backing_fmt=raw,{options}", text(&base));
        let small = 3 * MIB + 1536;
        let path = create(&dir, "overlay.qcow2", backed.trim_end_matches(','), small);
        let mut model = pattern(8 * MIB as usize, 8);
        run(async {
            let node = open_over(&path, file(&base, false), &Qcow2Config::default()).await;
            write(&*node, small - 512, &[1; 512]).await.unwrap();
            model.truncate(small as usize);
            model[small as usize - 512..].fill(1);
            // What the backing file has behind the old end is not shown.
            for size in [small + 512, 4 * MIB, 7 * MIB] {
                node.resize(size, Resize::Exactly, false).await.unwrap();
                model.resize(size as usize, 0);
                assert_same(&contents(&*node, 100_000).await, &model, "grown");
            }
            write(&*node, 6 * MIB, &[9; 4096]).await.unwrap();
            node.resize(5 * MIB, Resize::AtLeast, false).await.unwrap();
            assert_eq!(node.size(), 7 * MIB);
            node.resize(2 * MIB + 512, Resize::Exactly, false)
                .await
                .unwrap();
            model.truncate(2 * MIB as usize + 512);
            node.resize(8 * MIB, Resize::Exactly, true).await.unwrap();
            model.resize(8 * MIB as usize, 0);
            assert_same(&contents(&*node, 100_000).await, &model, "shrunk and grown");
            assert!(node.resize(1000, Resize::Exactly, false).await.is_err());
            node.close().await.unwrap();
        });
        assert_clean(&path);
        assert_same(&converted(&path), &model, "read by QEMU");
    }
}

#[test]
fn a_closed_image_takes_no_writes() {
    let dir = directory();
    let path = create(&dir, "image.qcow2", "", MIB);
    run(async {
        let node = open(&path).await;
        write(&*node, 0, &[7; 4096]).await.unwrap();
        assert!(matches!(
            node.resolve(Access::Write, 0, 4096),
            Extent::Host { .. }
        ));
        node.close().await.unwrap();
        assert!(matches!(
            node.resolve(Access::Write, 0, 4096),
            Extent::Work { .. }
        ));
        assert!(write(&*node, 0, &[8; 4096]).await.is_err());
        assert_eq!(read(&*node, 0, 4096).await.unwrap(), [7; 4096]);
    });
    assert_clean(&path);
}

#[test]
fn past_the_page_cache_it_is_the_same() {
    let dir = directory();
    for (seed, options) in (70..).zip(["", "cluster_size=512", "extended_l2=on"]) {
        for compress in [false, true] {
            let path = create(&dir, "image.qcow2", options, 5 * MIB);
            let config = Qcow2Config {
                compress,
                discard: true,
                ..Qcow2Config::default()
            };
            let children = Children {
                file: file(&path, true),
                data_file: None,
                backing: None,
            };
            check_image(&path, &config, children, vec![0; 5 * MIB as usize], seed);
        }
    }
}

#[test]
fn what_was_flushed_is_there_without_closing() {
    let dir = directory();
    for (seed, options) in (80..).zip(["", "lazy_refcounts=on", "extended_l2=on,lazy_refcounts=on"])
    {
        let path = create(&dir, "image.qcow2", options, 6 * MIB);
        let mut random = Random::new(seed);
        let mut model = vec![0; 6 * MIB as usize];
        let lazy = options.contains("lazy");
        for round in 0..3 {
            run(async {
                let node = open(&path).await;
                assert_same(
                    &contents(&*node, 65536).await,
                    &model,
                    &format!("round {round}"),
                );
                exercise(&node, &mut model, &mut random, false).await;
                node.flush().await.unwrap();
                // As after a crash: nobody closes it.
            });
            let said = must("qemu-img", &["info", "-U", text(&path)]);
            assert!(!said.contains("corrupt: true"), "{said}");
        }
        let said = tool("qemu-img", &["check", text(&path)]);
        // 3: leaks only. With lazy refcounts QEMU repairs as well when it opens it for writing.
        let fine = [Some(0), Some(3)].contains(&said.status.code());
        assert!(fine || lazy, "{said:?}");
        run(async {
            let node = open(&path).await;
            write(&*node, 0, &[5; 512]).await.unwrap();
            model[..512].fill(5);
            node.close().await.unwrap();
        });
        must("qemu-img", &["check", "-r", "leaks", text(&path)]);
        assert_clean(&path);
        assert_same(&converted(&path), &model, "read by QEMU");
    }
}

#[test]
fn a_chain_of_images_is_read_through_and_written_on_top() {
    let dir = directory();
    let size = 4 * MIB;
    let mut model = vec![0; size as usize];
    let mut below: Option<std::sync::Arc<dyn Node>> = None;
    let mut random = Random::new(90);
    let mut path = dir.path().join("none");
    run(async {
        for layer in 0..6 {
            let name = format!("layer-{layer}.qcow2");
            let options = match layer {
                0 => String::new(),
                n => format!(
                    "backing_file={},backing_fmt=qcow2,cluster_size={}",
                    text(&path),
                    [65536, 4096][n % 2]
                ),
            };
            path = create(&dir, &name, &options, size);
            let children = Children {
                backing: below.take(),
                ..children(&path)
            };
            let node = Qcow2Node::open(children, &Qcow2Config::default())
                .await
                .unwrap();
            for _ in 0..10 {
                let (offset, len) = random.range(size, 200 * KIB);
                let bytes = pattern(len as usize, random.next());
                write(&*node, offset, &bytes).await.unwrap();
                model[offset as usize..(offset + len) as usize].copy_from_slice(&bytes);
            }
            let (offset, len) = random.range(size, MIB);
            node.write_zeroes(offset, len, Zeroes::MayUnmap)
                .await
                .unwrap();
            model[offset as usize..(offset + len) as usize].fill(0);
            assert_same(&contents(&*node, 100_000).await, &model, &name);
            node.flush().await.unwrap();
            node.close().await.unwrap();
            below = Some(node);
        }
    });
    assert_clean(&path);
    assert_same(&converted(&path), &model, "read by QEMU");
}

/// The table of refcounts is made longer while refcounts are lazy, so that it moves when the image is closed.
#[test]
fn a_refcount_table_that_moves_at_the_end_leaves_nothing_behind() {
    let dir = directory();
    // A cluster of its table names blocks for 64 * 64 clusters: 2 MiB.
    let options = "cluster_size=512,refcount_bits=64,lazy_refcounts=on";
    let path = create(&dir, "image.qcow2", options, 6 * MIB);
    run(async {
        let node = open(&path).await;
        for offset in (0..5 * MIB).step_by(64 << 10) {
            write(&*node, offset, &[7; 64 << 10]).await.unwrap();
        }
        node.close().await.unwrap();
    });
    assert_clean(&path);
    let mut model = vec![0; 6 * MIB as usize];
    model[..5 * MIB as usize].fill(7);
    assert_same(&converted(&path), &model, "read by QEMU");
}
