//! One thing wrong with an image at a time, each with the answer that it must get: refused with a reason, or an error for
//! the guest and the corrupt bit, and never a harm to what was right.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::pedantic)]

mod support;

use diskfuse_block::{Kind, Node, Resize};
use diskfuse_ring::Choice;
use support::atlas::{self, be32, be64};
use support::bad::{Bad, CLUSTER, COPIED, INCOMPATIBLE, SIZE, all, engine_flush};
use support::engine::{self, run};
use support::image::{Image, Options};
use support::tools;

#[test]
fn a_truncated_header_is_refused() {
    for len in [0, 3, 4, 50, 71, 72, 103] {
        let mut bad = Bad::new();
        bad.bytes.truncate(len);
        for read_only in [true, false] {
            let opened = run(Choice::Auto, async { bad.open(read_only).await.is_ok() });
            assert!(!opened, "{len} bytes of a header were opened");
        }
    }
}

#[test]
fn something_that_is_no_qcow2_is_refused() {
    let mut bad = Bad::new();
    bad.put32(0, 0x5146_49FA);
    bad.refused(Kind::Corrupt, &["qcow2"]);
}

#[test]
fn an_unknown_version_is_refused_by_number() {
    for version in [0, 1, 4, 0xFFFF_FFFF] {
        let mut bad = Bad::new();
        bad.put32(4, version);
        bad.refused(Kind::Unsupported, &["version", &version.to_string()]);
    }
}

#[test]
fn impossible_cluster_sizes_are_refused() {
    for bits in [0, 8, 22, 63, 64, 0xFFFF_FFFF] {
        let mut bad = Bad::new();
        bad.put32(20, bits);
        let Some(error) = run(Choice::Auto, async { bad.open(true).await.err() }) else {
            panic!("cluster_bits {bits} was opened");
        };
        let kind = error.kind();
        assert!(matches!(kind, Kind::Corrupt | Kind::Unsupported), "{error}");
        assert!(error.to_string().contains("cluster"), "{error}");
    }
}

#[test]
fn impossible_refcount_widths_are_refused() {
    for order in [7, 64, 0xFFFF_FFFF] {
        let mut bad = Bad::new();
        bad.put32(96, order);
        assert!(run(Choice::Auto, async { bad.open(true).await.is_err() }));
    }
}

#[test]
fn an_l1_table_that_is_too_big_is_refused() {
    for entries in [0xFFFF_FFFF, 0x7FFF_FFFF, (32 << 20) / 8 + 1] {
        let mut bad = Bad::new();
        bad.put32(36, entries);
        bad.refused(Kind::Corrupt, &["L1"]);
    }
}

#[test]
fn an_l1_table_that_is_too_small_for_the_disk_is_refused() {
    let mut bad = Bad::new();
    bad.put64(24, 1 << 30);
    bad.refused(Kind::Corrupt, &["L1"]);
}

#[test]
fn misaligned_tables_are_refused() {
    for (field, word) in [(40, "L1"), (48, "refcount")] {
        for by in [1, 8, 512, CLUSTER / 2] {
            let mut bad = Bad::new();
            let offset = be64(&bad.bytes, field);
            bad.put64(field, offset + by);
            bad.refused(Kind::Corrupt, &[word]);
        }
    }
}

#[test]
fn tables_at_no_place_in_a_file_are_refused() {
    for field in [40, 48] {
        for offset in [u64::MAX - (CLUSTER - 1), 1 << 63, 1 << 62] {
            let mut bad = Bad::new();
            bad.put64(field, offset);
            bad.refused(Kind::Corrupt, &[]);
        }
    }
}

#[test]
fn tables_past_the_end_of_the_file_are_refused_before_anything_is_written() {
    for field in [40, 48] {
        let mut bad = Bad::new();
        bad.put64(field, 64 << 20);
        run(Choice::Auto, async {
            if let Ok(node) = bad.open(false).await {
                let wrote = engine::write(&*node, 512 << 10, &[1; 4096]).await;
                let flushed = engine_flush(&node).await;
                assert!(
                    wrote.is_err() || flushed.is_err(),
                    "field {field}: it was written"
                );
                let _ = node.close().await;
            }
        });
    }
}

#[test]
fn a_refcount_table_that_is_too_big_is_refused() {
    for clusters in [0xFFFF_FFFF, (8 << 20) / CLUSTER + 1] {
        let mut bad = Bad::new();
        bad.put32(56, clusters);
        bad.refused(Kind::Corrupt, &["refcount"]);
    }
}

#[test]
fn too_many_snapshots_are_refused() {
    let mut bad = Bad::new();
    bad.put32(60, 65537);
    bad.put64(64, CLUSTER);
    bad.refused(Kind::Corrupt, &["snapshot"]);
}

#[test]
fn a_snapshot_table_of_garbage_harms_nothing() {
    for fill in [0, 0x7F, 0xFF] {
        let mut bad = Bad::new();
        let at = bad.bytes.len() as u64;
        bad.bytes.extend(vec![fill; 2 * CLUSTER as usize]);
        bad.put32(60, 3);
        bad.put64(64, at);
        run(Choice::Auto, async {
            let Ok(node) = bad.open(true).await else {
                return;
            };
            let read = engine::read(&*node, 0, CLUSTER).await;
            assert!(read.is_err() || all(&read.unwrap(), 7));
        });
    }
}

#[test]
fn an_unknown_incompatible_feature_is_refused_by_number() {
    let mut bad = Bad::new();
    bad.put64(INCOMPATIBLE, 1 << 40);
    bad.refused(Kind::Unsupported, &["40"]);
}

#[test]
fn an_unknown_incompatible_feature_is_refused_by_its_name() {
    // With small clusters qemu-img leaves the names out.
    let mut bad = Bad::with(&Options::plain(), "");
    let dirty = b"dirty bit";
    let name = bad.bytes.windows(dirty.len()).position(|w| w == dirty);
    let name = name.expect("qemu-img writes the names of features");
    bad.bytes[name..name + 12].copy_from_slice(b"frobnication");
    bad.bytes[name - 1] = 17;
    bad.put64(INCOMPATIBLE, 1 << 17);
    bad.refused(Kind::Unsupported, &["frobnication"]);
}

#[test]
fn encrypted_images_are_refused() {
    for (format, more) in [("luks", ",encrypt.iter-time=10"), ("aes", "")] {
        let image = Image::empty();
        let path = image.file("layer0.qcow2");
        let options = format!("encrypt.format={format},encrypt.key-secret=s{more}");
        tools::qemu_img(&[
            "create",
            "-q",
            "--object",
            "secret,id=s,data=geheim",
            "-f",
            "qcow2",
            "-o",
            &options,
            tools::text(&path),
            "1M",
        ]);
        let mut image = image;
        image.layers.push(support::image::Layer {
            path,
            options: Some(Options::plain()),
            data_file: None,
            size: SIZE,
        });
        Bad::of(image).refused(Kind::Unsupported, &["encrypt"]);
    }
}

#[test]
fn an_image_marked_as_corrupt_opens_for_reading_only() {
    let mut bad = Bad::new();
    bad.put64(INCOMPATIBLE, 2);
    run(Choice::Auto, async {
        let error = bad
            .open(false)
            .await
            .expect_err("it was opened for writing");
        assert_eq!(error.kind(), Kind::Corrupt, "{error}");
        assert!(error.to_string().contains("corrupt"), "{error}");
        let node = bad.open(true).await.unwrap();
        let read = engine::read(&*node, 0, CLUSTER).await.unwrap();
        assert!(all(&read, 7));
        node.close().await.unwrap();
    });
    assert!(bad.on_disk() == bad.bytes, "reading changed it");
}

/// Lazy refcounts, and a process that was killed: the refcounts of what it wrote are too low.
fn dirty() -> Bad {
    let options = Options {
        cluster_size: CLUSTER,
        lazy_refcounts: true,
        ..Options::plain()
    };
    let bad = Bad::with(
        &options,
        "write -P 7 0 64k\nwrite -P 8 64k 64k\nflush\nsigraise 9\n",
    );
    assert_eq!(be64(&bad.bytes, INCOMPATIBLE) & 1, 1, "it is not dirty");
    bad
}

#[test]
fn a_dirty_image_on_a_read_only_medium_is_read_as_it_is() {
    let bad = dirty();
    run(Choice::Auto, async {
        let node = bad.open(true).await.unwrap();
        let read = engine::read(&*node, 64 << 10, CLUSTER).await.unwrap();
        assert!(all(&read, 8));
        node.close().await.unwrap();
    });
    assert!(bad.on_disk() == bad.bytes, "reading changed it");
}

#[test]
fn a_dirty_image_is_repaired_when_it_is_opened_for_writing() {
    let bad = dirty();
    run(Choice::Auto, async {
        let node = bad.open(false).await.unwrap();
        engine::write(&*node, 512 << 10, &[9; 4096]).await.unwrap();
        let read = engine::read(&*node, 64 << 10, CLUSTER).await.unwrap();
        assert!(all(&read, 8));
        node.close().await.unwrap();
    });
    tools::must_be_clean(bad.image.path(), "repaired and closed");
    assert_eq!(be64(&bad.on_disk(), INCOMPATIBLE), 0);
}

/// What nothing can be done about stays for whoever knows more, and the flag says so to all who open it later.
#[test]
fn a_dirty_image_that_cannot_be_repaired_is_opened_for_reading_only() {
    let mut bad = Bad::with(
        &Options {
            refcount_bits: 1,
            ..Options::plain()
        },
        "write -P 7 0 128k\n",
    );
    // Two clusters of the disk at one place, which one bit cannot count.
    let l2 = bad.first(atlas::Kind::L2);
    let shared = be64(&bad.bytes, l2);
    bad.put64(l2 + 8, shared);
    bad.put64(INCOMPATIBLE, 1);
    run(Choice::Auto, async {
        let error = bad.open(false).await.expect_err("it is opened for writing");
        assert_eq!(error.kind(), Kind::Corrupt, "{error}");
        assert!(error.to_string().contains("diskfuse check"), "{error}");
        assert_eq!(
            be64(&bad.on_disk(), INCOMPATIBLE) & 1,
            1,
            "the flag is gone"
        );
        let node = bad.open(true).await.unwrap();
        assert!(all(&engine::read(&*node, 0, CLUSTER).await.unwrap(), 7));
        node.close().await.unwrap();
    });
}

#[test]
fn a_misaligned_l2_entry_is_an_error_that_names_the_place() {
    let mut bad = Bad::new();
    let wrong = bad.entry(1) + 512;
    bad.set_entry(1, wrong);
    bad.unreadable(CLUSTER, &[&format!("{:x}", wrong & atlas::OFFSET)]);
    run(Choice::Auto, async {
        let node = bad.open(true).await.unwrap();
        let others = engine::read(&*node, 2 * CLUSTER, CLUSTER).await.unwrap();
        assert!(all(&others, 7));
    });
    bad.write_refused(CLUSTER, CLUSTER, &[]);
}

#[test]
fn a_misaligned_l1_entry_is_an_error_that_names_the_place() {
    let mut bad = Bad::new();
    let l1 = bad.first(atlas::Kind::L1);
    let wrong = be64(&bad.bytes, l1) + 512;
    bad.put64(l1, wrong);
    bad.unreadable(0, &[&format!("{:x}", wrong & atlas::OFFSET)]);
    bad.write_refused(0, CLUSTER, &[]);
}

#[test]
fn a_misaligned_refcount_block_is_found_before_anything_is_allocated() {
    let mut bad = Bad::new();
    let table = bad.first(atlas::Kind::RefcountTable);
    let wrong = be64(&bad.bytes, table) + 512;
    bad.put64(table, wrong);
    bad.write_refused(512 << 10, CLUSTER, &[]);
}

#[test]
fn a_guest_write_onto_metadata_is_refused_and_the_image_marked() {
    use atlas::Kind::{L1, L2, RefcountBlock, RefcountTable};
    for kind in [L1, L2, RefcountTable, RefcountBlock] {
        let mut bad = Bad::new();
        let target = bad.first(kind);
        bad.set_entry(3, target | COPIED);
        bad.write_refused(3 * CLUSTER, 512, &[&format!("{target:#x}")]);
    }
}

#[test]
fn a_guest_write_onto_the_snapshots_is_refused_and_the_image_marked() {
    let image = Bad::new().image;
    // So many that their table is longer than a cluster.
    for n in 0..=CLUSTER / 256 {
        let name = format!("{n:0200}");
        tools::qemu_img(&["snapshot", "-c", &name, tools::text(image.path())]);
    }
    let good = std::fs::read(image.path()).unwrap();
    let mut bad = Bad::of(image);
    let (table, l1) = (atlas::Kind::Snapshots, atlas::Kind::InactiveL1);
    let mut regions = bad.atlas.regions.iter();
    let (_, table_range) = regions.find(|(kind, _)| *kind == table).unwrap();
    assert!(table_range.end - table_range.start > CLUSTER);
    let its_end = (table_range.end - 1) / CLUSTER * CLUSTER;
    for target in [bad.first(table), its_end, bad.first(l1)] {
        bad.bytes.clone_from(&good);
        bad.set_entry(3, target | COPIED);
        bad.write_refused(3 * CLUSTER, 512, &[&format!("{target:#x}")]);
    }
}

#[test]
fn clusters_of_metadata_with_refcount_zero_are_not_given_to_the_guest() {
    use atlas::Kind::{Header, L1, L2, RefcountBlock, RefcountTable};
    for kind in [Header, L1, L2, RefcountTable, RefcountBlock] {
        let mut bad = Bad::new();
        let target = bad.first(kind);
        bad.set_refcount(target, 0);
        run(Choice::Auto, async {
            let node = bad.open(false).await.unwrap();
            for n in 0..40 {
                let at = (512 << 10) + n * CLUSTER;
                if engine::write(&*node, at, &[0xAA; 4096]).await.is_err() {
                    break;
                }
            }
            let _ = engine_flush(&node).await;
            let _ = node.close().await;
        });
        let now = bad.on_disk();
        for (of, range) in &bad.atlas.regions {
            let range = range.start as usize..range.end as usize;
            let overwritten = now[range].windows(512).any(|w| w == [0xAA; 512]);
            assert!(
                !overwritten,
                "{of:?} was given to the guest, as {kind:?} was free"
            );
        }
    }
}

#[test]
fn a_data_cluster_with_refcount_zero_is_never_freed_below_zero() {
    let mut bad = Bad::new();
    let host = bad.entry(3) & atlas::OFFSET;
    bad.set_refcount(host, 0);
    run(Choice::Auto, async {
        use diskfuse_block::Node as _;
        let node = bad.open(false).await.unwrap();
        let discarded = node.discard(3 * CLUSTER, CLUSTER).await;
        let flushed = node.flush().await;
        let closed = node.close().await;
        let _ = (discarded, flushed, closed);
        let node = bad.open_as_is(true).await.unwrap();
        let others = engine::read(&*node, 4 * CLUSTER, CLUSTER).await.unwrap();
        assert!(all(&others, 7));
    });
    let block = bad.first(atlas::Kind::RefcountBlock);
    let refcount = be32(&bad.on_disk(), block + host / CLUSTER * 2) >> 16;
    assert!(refcount < 2, "the refcount wrapped around to {refcount}");
}

#[test]
fn an_l2_table_past_the_end_of_the_file_harms_nothing() {
    let mut bad = Bad::new();
    let l1 = bad.first(atlas::Kind::L1);
    bad.put64(l1, 64 << 20 | COPIED);
    run(Choice::Auto, async {
        let node = bad.open(true).await.unwrap();
        if let Ok(bytes) = engine::read(&*node, 0, CLUSTER).await {
            assert!(all(&bytes, 0), "bytes out of nowhere");
        }
        node.close().await.unwrap();
    });
}

#[test]
fn data_past_the_end_of_the_file_read_as_zeroes() {
    let mut bad = Bad::new();
    bad.set_entry(3, 64 << 20 | COPIED);
    run(Choice::Auto, async {
        let node = bad.open(true).await.unwrap();
        let bytes = engine::read(&*node, 2 * CLUSTER, 2 * CLUSTER)
            .await
            .unwrap();
        assert!(all(&bytes[..CLUSTER as usize], 7));
        assert!(all(&bytes[CLUSTER as usize..], 0));
        node.close().await.unwrap();
    });
}

#[test]
fn compressed_garbage_is_an_error() {
    let options = Options {
        cluster_size: CLUSTER,
        ..Options::plain()
    };
    let mut bad = Bad::with(&options, "write -c -P 7 0 4k\nwrite -c -P 8 4k 4k\n");
    let at = bad.entry(0) & ((1 << 58) - 1);
    bad.bytes[at as usize..at as usize + 8].fill(0xFF);
    bad.unreadable(0, &[]);
    // And one that lies outside of the file.
    let mut bad = Bad::with(&options, "write -c -P 7 0 4k\n");
    bad.set_entry(0, 1 << 62 | 1 << 40);
    bad.unreadable(0, &[]);
}

#[test]
fn sizes_that_no_disk_has_are_refused() {
    for size in [u64::MAX, 1 << 63, u64::MAX - 511] {
        let mut bad = Bad::new();
        bad.put64(24, size);
        bad.refused(Kind::Corrupt, &[]);
    }
    let bad = Bad::new();
    run(Choice::Auto, async {
        use diskfuse_block::Node as _;
        let node = bad.open(false).await.unwrap();
        for size in [u64::MAX, u64::MAX - 511, 1 << 62] {
            let resized = node.resize(size, Resize::Exactly, false).await;
            assert!(resized.is_err(), "resized to {size}");
        }
        assert_eq!(node.size(), SIZE);
        node.close().await.unwrap();
    });
    tools::must_be_clean(bad.image.path(), "after impossible sizes");
}

#[test]
fn a_backing_name_outside_of_the_header_is_refused() {
    for (at, len) in [
        (CLUSTER - 4, 16),
        (u64::MAX - 7, 16),
        (200, 1024),
        (1 << 40, 8),
    ] {
        let mut bad = Bad::new();
        bad.put64(8, at);
        bad.put32(16, len);
        bad.refused(Kind::Corrupt, &["header"]);
    }
}

#[test]
fn a_header_that_claims_an_impossible_length_is_refused() {
    for len in [0, 72, 103, 105, CLUSTER + 8, 0xFFFF_FFF8] {
        let mut bad = Bad::new();
        bad.put32(100, len);
        let opened = run(Choice::Auto, async { bad.open(true).await.err() });
        assert!(opened.is_some(), "a header of {len} bytes was opened");
    }
}

#[test]
fn a_header_extension_longer_than_the_header_is_refused() {
    for len in [0xFFFF_FFFF, CLUSTER, 0x7FFF_FFF8] {
        let mut bad = Bad::new();
        let at = be32(&bad.bytes, 100);
        bad.put32(at, 0x1234_5678);
        bad.put32(at + 4, len);
        bad.refused(Kind::Corrupt, &["extension"]);
    }
}
