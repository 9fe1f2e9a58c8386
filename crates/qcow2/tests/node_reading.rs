//! Images that QEMU made, read by us: the same bytes, however they are asked for.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::pedantic)]

mod node_support;

use diskfuse_block::Node;
use diskfuse_qcow2::node::Qcow2Config;
use node_support::*;

/// A mixture of data, zeroes, discards and nothing, made by qemu-io.
fn scribble(path: &std::path::Path, size: u64, seed: u64) {
    let mut random = Random::new(seed);
    let mut commands = Vec::new();
    for n in 0..40 {
        let (offset, len) = random.range(size, 300 * KIB);
        let (offset, len) = (
            offset & !511,
            len.next_multiple_of(512).min(size - (offset & !511)),
        );
        let command = match random.below(8) {
            0 => format!("write -z {offset} {len}"),
            1 => format!("write -zu {offset} {len}"),
            2 => format!("discard {offset} {len}"),
            _ => format!("write -P {} {offset} {len}", n + 1),
        };
        commands.push(command);
    }
    qemu_io(path, "qcow2", &commands);
}

#[test]
fn images_of_all_kinds_read_as_qemu_reads_them() {
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
        "preallocation=full",
        "lazy_refcounts=on",
    ];
    for (seed, options) in (1..).zip(kinds) {
        let size = 4 * MIB + 512 * seed;
        let path = create(&dir, "image.qcow2", options, size);
        scribble(&path, size, seed);
        let theirs = converted(&path);
        run(async {
            let node = open(&path).await;
            assert_eq!(node.size(), size);
            for piece in [4096, 65536, 3 * MIB as usize, 5000] {
                let ours = contents(&*node, piece).await;
                assert_same(&ours, &theirs, &format!("{options} in pieces of {piece}"));
            }
        });
    }
}

#[test]
fn compressed_images_read_as_they_were() {
    let dir = directory();
    let raw = dir.path().join("source.raw");
    let bytes = pattern(5 * MIB as usize + 1536, 3);
    std::fs::write(&raw, &bytes).unwrap();
    for options in [
        "compression_type=zlib",
        "compression_type=zstd",
        "cluster_size=4k",
        "cluster_size=2M",
        "extended_l2=on",
        "compat=0.10",
    ] {
        let path = dir.path().join("packed.qcow2");
        let args = ["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options];
        must(
            "qemu-img",
            &[&args[..], &[text(&raw), text(&path)]].concat(),
        );
        run(async {
            let node = open(&path).await;
            for piece in [4096, MIB as usize, 100_000] {
                let ours = contents(&*node, piece).await;
                assert_same(&ours, &bytes, &format!("{options} in pieces of {piece}"));
            }
        });
    }
}

#[test]
fn what_is_not_allocated_shows_the_backing_file_and_past_its_end_zeroes() {
    let dir = directory();
    let base = dir.path().join("base.raw");
    let short = 2 * MIB as usize + 512;
    std::fs::write(&base, pattern(short, 9)).unwrap();
    for options in ["", "extended_l2=on", "cluster_size=4k"] {
        let backed = format!("backing_file={},backing_fmt=raw,{options}", text(&base));
        let backed = backed.trim_end_matches(',');
        let path = create(&dir, "overlay.qcow2", backed, 5 * MIB);
        scribble(&path, 5 * MIB, 77);
        let theirs = converted(&path);
        run(async {
            let node = open_over(&path, file(&base, false), &Qcow2Config::default()).await;
            for piece in [4096, 70_000, MIB as usize] {
                let ours = contents(&*node, piece).await;
                assert_same(&ours, &theirs, &format!("{options} in pieces of {piece}"));
            }
        });
    }
}

#[test]
fn a_snapshot_is_shown_as_it_was_and_read_only() {
    let dir = directory();
    let path = create(&dir, "image.qcow2", "", 4 * MIB);
    scribble(&path, 4 * MIB, 5);
    let before = converted(&path);
    must("qemu-img", &["snapshot", "-c", "first", text(&path)]);
    scribble(&path, 4 * MIB, 6);
    must("qemu-img", &["snapshot", "-c", "second", text(&path)]);
    let now = converted(&path);
    run(async {
        for name in ["first", "1"] {
            let config = Qcow2Config {
                snapshot: Some(name.to_owned()),
                ..Qcow2Config::default()
            };
            let node = open_with(&path, &config).await;
            assert!(node.read_only());
            assert_same(&contents(&*node, 65536).await, &before, name);
            assert!(write(&*node, 0, &[1; 512]).await.is_err());
        }
        let node = open(&path).await;
        assert_same(&contents(&*node, 65536).await, &now, "the active disk");
    });
    run(async {
        let config = Qcow2Config {
            snapshot: Some("third".to_owned()),
            ..Qcow2Config::default()
        };
        let refused = diskfuse_qcow2::node::Qcow2Node::open(children(&path), &config).await;
        let said = refused.unwrap_err().to_string();
        assert!(said.contains("third"), "{said}");
    });
}

#[test]
fn a_cluster_past_the_end_of_the_file_reads_as_zeroes() {
    let dir = directory();
    let path = create(&dir, "image.qcow2", "", MIB);
    qemu_io(&path, "qcow2", &["write -P 7 0 128k".to_owned()]);
    let whole = std::fs::metadata(&path).unwrap().len();
    let cut = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    cut.set_len(whole - 64 * KIB - 4096).unwrap();
    run(async {
        let node = open(&path).await;
        let mut expected = vec![7; 60 * KIB as usize];
        expected.resize(MIB as usize, 0);
        for piece in [512, 65536, MIB as usize] {
            assert_same(&contents(&*node, piece).await, &expected, "cut off");
        }
    });
}

#[test]
fn block_status_tells_data_zeroes_and_where() {
    let dir = directory();
    let path = create(&dir, "image.qcow2", "", 4 * MIB);
    qemu_io(
        &path,
        "qcow2",
        &["write -P 7 1M 1M".to_owned(), "write -z 2M 64k".to_owned()],
    );
    run(async {
        let node = open(&path).await;
        let nothing = node.block_status(0, 4 * MIB).await.unwrap();
        assert_eq!(
            (nothing.len, nothing.zero, nothing.host_offset),
            (MIB, true, None)
        );
        let data = node.block_status(MIB, 3 * MIB).await.unwrap();
        assert_eq!((data.len, data.zero), (MIB, false));
        let at = data.host_offset.unwrap() as usize;
        assert_eq!(std::fs::read(&path).unwrap()[at..at + 4096], [7; 4096]);
        let zero = node.block_status(2 * MIB, MIB).await.unwrap();
        assert!(zero.zero && zero.host_offset.is_none());
    });
}
