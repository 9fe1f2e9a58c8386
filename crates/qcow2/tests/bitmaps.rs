//! Persistent bitmaps: what QEMU has recorded is known here, what is recorded here is known to QEMU, and an image that was not
//! closed has none that says it is true.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::pedantic)]

mod node_support;

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use diskfuse_block::{DirtyBitmap, Kind, Node, Resize, Zeroes};
use diskfuse_qcow2::bitmaps::PersistentBitmap;
use diskfuse_qcow2::node::{Qcow2Config, Qcow2Node};
use diskfuse_qcow2::snapshots;
use node_support::*;
use serde_json::Value;

fn bitmap(args: &[&str], path: &Path, name: &str) {
    must(
        "qemu-img",
        &[&["bitmap"], args, &[text(path), name]].concat(),
    );
}

/// Ended, whatever happens.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The dirty units of a bitmap, as QEMU finds them in the image.
fn seen_by_qemu(path: &Path, name: &str, granularity: u64) -> BTreeSet<u64> {
    let socket = path.with_extension("sock");
    let _ = std::fs::remove_file(&socket);
    let server = Command::new("timeout")
        .args(["60", "qemu-nbd", "-r", "-f", "qcow2", "-B", name, "-k"])
        .args([&socket, path])
        .stderr(Stdio::inherit())
        .spawn();
    let server = Server(server.unwrap());
    let end = Instant::now() + LIMIT;
    while !socket.exists() {
        assert!(Instant::now() < end, "qemu-nbd does not listen");
        std::thread::sleep(Duration::from_millis(5));
    }
    let options = format!(
        "driver=nbd,server.type=unix,server.path={},x-dirty-bitmap=qemu:dirty-bitmap:{name}",
        text(&socket)
    );
    let map = must(
        "qemu-img",
        &["map", "--output=json", "--image-opts", &options],
    );
    drop(server);
    let map: Vec<Value> = serde_json::from_str(&map).unwrap();
    let dirty = map.iter().filter(|extent| extent["data"] == false);
    let units = dirty.flat_map(|extent| {
        let number = |field: &str| extent[field].as_u64().unwrap();
        let (start, len) = (number("start"), number("length"));
        start / granularity..(start + len).div_ceil(granularity)
    });
    units.collect()
}

/// Those of ours.
fn units(bitmap: &DirtyBitmap) -> BTreeSet<u64> {
    let granularity = bitmap.granularity();
    let all = 0..bitmap.bits_of_disk();
    all.filter(|unit| bitmap.is_dirty(unit * granularity, 1))
        .collect()
}

fn named(node: &Qcow2Node, name: &str) -> Arc<DirtyBitmap> {
    let all = node.bitmaps();
    let found = all.iter().find(|one| one.name == name);
    Arc::clone(&found.expect("the bitmap is there").bitmap)
}

/// Names and flags of the bitmaps, as `qemu-img info` has them.
fn flags(path: &Path) -> Vec<(String, Vec<String>)> {
    let info = must("qemu-img", &["info", "-U", "--output=json", text(path)]);
    let info: Value = serde_json::from_str(&info).unwrap();
    let all = &info["format-specific"]["data"]["bitmaps"];
    let all = all.as_array().cloned().unwrap_or_default();
    let word = |value: &Value| value.as_str().unwrap().to_owned();
    let one = |one: &Value| {
        let flags = one["flags"].as_array().unwrap().iter();
        (word(&one["name"]), flags.map(word).collect())
    };
    all.iter().map(one).collect()
}

fn owned(all: &[(&str, &[&str])]) -> Vec<(String, Vec<String>)> {
    let one = |(name, flags): &(&str, &[&str])| {
        let flags = flags.iter().map(|&flag| flag.to_owned()).collect();
        ((*name).to_owned(), flags)
    };
    all.iter().map(one).collect()
}

#[test]
fn what_qemu_has_recorded_is_known_and_what_is_recorded_here_is_known_to_qemu() {
    let mut random = Random::new(7);
    for (options, granularity, size) in [
        ("", 65536, 32 * MIB),
        ("cluster_size=512", 512, 8 * MIB + 512),
        ("cluster_size=4k,refcount_bits=64", 4096, 64 * MIB),
        ("lazy_refcounts=on", 65536, 16 * MIB),
        ("cluster_size=2M,extended_l2=on", 1024, 24 * MIB + 1024),
    ] {
        let dir = directory();
        let path = create(&dir, "image.qcow2", options, size);
        let g = granularity.to_string();
        for name in ["on", "off", "empty"] {
            bitmap(&["--add", "-g", &g], &path, name);
        }
        let some = |random: &mut Random| random.range(size, 300 * KIB);
        let theirs: Vec<_> = (0..12).map(|_| some(&mut random)).collect();
        let command = |(at, len): &(u64, u64)| format!("write {at} {len}");
        let commands: Vec<String> = theirs.iter().map(command).collect();
        qemu_io(&path, "qcow2", &commands);
        bitmap(&["--disable"], &path, "off");
        bitmap(&["--clear"], &path, "empty");
        let touched = |ranges: &[(u64, u64)]| -> BTreeSet<u64> {
            let units = ranges.iter().filter(|(_, len)| *len > 0);
            let units =
                units.flat_map(|(at, len)| at / granularity..(at + len).div_ceil(granularity));
            units.collect()
        };
        let before = touched(&theirs);
        let ours: Vec<_> = (0..12).map(|_| some(&mut random)).collect();
        run(async {
            let node = open(&path).await;
            assert_eq!(units(&named(&node, "on")), before, "{options}");
            assert_eq!(units(&named(&node, "off")), before, "{options}");
            assert!(!named(&node, "off").is_recording());
            for (n, (at, len)) in ours.iter().enumerate() {
                match n % 4 {
                    0 => node
                        .write_zeroes(*at, *len, Zeroes::MayUnmap)
                        .await
                        .unwrap(),
                    1 => node.discard(*at, *len).await.unwrap(),
                    _ => write(&*node, *at, &vec![n as u8; *len as usize])
                        .await
                        .unwrap(),
                }
            }
            node.close().await.unwrap();
        });
        assert_clean(&path);
        let now = touched(&[theirs, ours.clone()].concat());
        assert_eq!(seen_by_qemu(&path, "on", granularity), now, "{options}");
        assert_eq!(seen_by_qemu(&path, "off", granularity), before, "{options}");
        assert_eq!(
            seen_by_qemu(&path, "empty", granularity),
            touched(&ours),
            "{options}"
        );
        let all = owned(&[("on", &["auto"]), ("off", &[]), ("empty", &["auto"])]);
        assert_eq!(flags(&path), all, "{options}");
        // And back: what was written here is read here.
        run(async {
            let node = open(&path).await;
            assert_eq!(units(&named(&node, "on")), now, "{options}");
            node.close().await.unwrap();
        });
        assert_eq!(flags(&path), all, "{options}");
    }
}

#[test]
fn writes_in_place_are_recorded() {
    let dir = directory();
    let path = create(&dir, "image.qcow2", "preallocation=metadata", 16 * MIB);
    bitmap(&["--add"], &path, "b");
    run(async {
        let node = open(&path).await;
        write(&*node, MIB, &[1; 512]).await.unwrap();
        // Its table is in memory, and it has its place.
        let place = node.resolve(diskfuse_block::Access::Write, MIB + 65536, 4096);
        assert!(matches!(
            place,
            diskfuse_block::Extent::Host { .. } | diskfuse_block::Extent::Work { .. }
        ));
        let before = units(&named(&node, "b"));
        assert!(before.contains(&16));
        write(&*node, 3 * MIB, &[1; 512]).await.unwrap();
        let extent = node.resolve(diskfuse_block::Access::Write, 3 * MIB, 512);
        assert!(
            matches!(extent, diskfuse_block::Extent::Host { .. }),
            "it is in place"
        );
        drop(extent);
        named(&node, "b").clear(0, 16 * MIB);
        let extent = node.resolve(diskfuse_block::Access::Write, 3 * MIB, 512);
        assert!(
            matches!(extent, diskfuse_block::Extent::Host { .. }),
            "it is in place"
        );
        drop(extent);
        assert_eq!(units(&named(&node, "b")), BTreeSet::from([48]));
        node.close().await.unwrap();
    });
    assert_eq!(seen_by_qemu(&path, "b", 65536), BTreeSet::from([48]));
}

#[test]
fn an_image_that_is_only_looked_at_is_not_changed() {
    let dir = directory();
    let path = create(&dir, "image.qcow2", "", 16 * MIB);
    bitmap(&["--add"], &path, "b");
    qemu_io(&path, "qcow2", &["write 1M 64k".to_owned()]);
    let before = std::fs::read(&path).unwrap();
    for read_only in [false, true] {
        let config = Qcow2Config {
            read_only,
            read_bitmaps: true,
            ..Qcow2Config::default()
        };
        run(async {
            let node = open_with(&path, &config).await;
            assert_eq!(units(&named(&node, "b")), BTreeSet::from([16]));
            read(&*node, 0, 4096).await.unwrap();
            node.close().await.unwrap();
        });
        assert!(
            before == std::fs::read(&path).unwrap(),
            "read_only={read_only}"
        );
    }
}

#[test]
fn what_was_not_closed_is_inconsistent_and_can_be_removed() {
    let dir = directory();
    let path = create(&dir, "image.qcow2", "", 16 * MIB);
    bitmap(&["--add"], &path, "b");
    bitmap(&["--add"], &path, "other");
    let copy = dir.path().join("after the crash");
    run(async {
        let node = open(&path).await;
        write(&*node, MIB, &[1; 512]).await.unwrap();
        node.flush().await.unwrap();
        std::fs::copy(&path, &copy).unwrap();
        node.close().await.unwrap();
    });
    assert_eq!(flags(&copy)[0].1, ["in-use", "auto"]);
    run(async {
        let node = open(&copy).await;
        assert!(named(&node, "b").info().inconsistent);
        let error = node
            .resize(32 * MIB, Resize::Exactly, false)
            .await
            .unwrap_err();
        assert!(
            error.to_string().contains("Bitmap 'b' is inconsistent"),
            "{error}"
        );
        // Whatever else is done, it stays what it is.
        write(&*node, 2 * MIB, &[1; 512]).await.unwrap();
        node.close().await.unwrap();
    });
    assert_eq!(flags(&copy)[0].1, ["in-use", "auto"]);
    assert_clean(&copy);
    run(async {
        let node = open(&copy).await;
        for name in ["b", "other"] {
            let removed = node.remove_bitmap(name).unwrap();
            assert_eq!(removed.name, name);
            let node = node.renewed();
            node.forget_removed_bitmaps().await.unwrap();
            // At once, and not when it is closed.
            assert_eq!(flags(&copy).len(), usize::from(name == "b"));
            write(&*node, 0, &[1; 512]).await.unwrap();
        }
        node.close().await.unwrap();
    });
    assert_eq!(flags(&copy), []);
    assert_clean(&copy);
    // A removal that nobody forgot is carried out by closing.
    run(async {
        let node = open(&path).await;
        node.remove_bitmap("b").unwrap();
        node.close().await.unwrap();
    });
    assert_eq!(flags(&path), owned(&[("other", &["auto"])]));
    assert_clean(&path);
}

#[test]
fn a_new_bitmap_is_stored_where_there_was_none() {
    let long = "n".repeat(1023);
    for options in [
        "",
        "cluster_size=512",
        "backing_file=base.raw,backing_fmt=raw",
    ] {
        let dir = directory();
        std::fs::write(dir.path().join("base.raw"), vec![1; MIB as usize]).unwrap();
        let path = create(&dir, "image.qcow2", options, 64 * MIB);
        run(async {
            let mut node = open(&path).await;
            for (name, granularity) in [("b", 65536), (long.as_str(), 512)] {
                node.check_new_bitmap(name, granularity).unwrap();
                let new = DirtyBitmap::new(node.size(), granularity).unwrap();
                node.add_bitmap(PersistentBitmap::new(name.to_owned(), Arc::new(new)));
                node = node.renewed();
            }
            let error = node
                .check_new_bitmap(&format!("{long}n"), 65536)
                .unwrap_err();
            assert_eq!(error.kind(), Kind::Invalid);
            write(&*node, 5 * MIB, &[1; 512]).await.unwrap();
            node.close().await.unwrap();
        });
        assert_clean(&path);
        assert_eq!(
            seen_by_qemu(&path, "b", 65536),
            BTreeSet::from([80]),
            "{options}"
        );
        let unit = 5 * MIB / 512;
        assert_eq!(
            seen_by_qemu(&path, &long, 512),
            BTreeSet::from([unit]),
            "{options}"
        );
        if options.contains("base") {
            let info = must("qemu-img", &["info", "--output=json", text(&path)]);
            let info: Value = serde_json::from_str(&info).unwrap();
            assert_eq!(info["backing-filename"], "base.raw");
        }
    }
}

#[test]
fn bitmaps_that_are_all_dirty_take_no_clusters() {
    let dir = directory();
    let path = create(&dir, "image.qcow2", "cluster_size=512", 4 * MIB);
    bitmap(&["--add", "-g", "512"], &path, "b");
    run(async {
        let node = open(&path).await;
        named(&node, "b").mark(0, 4 * MIB);
        node.prepare_bitmaps().await.unwrap();
        node.close().await.unwrap();
    });
    // 8192 bits in two clusters of 512 bytes, of which there are none.
    let all = (0..8192).collect();
    assert_eq!(seen_by_qemu(&path, "b", 512), all);
    assert_clean(&path);
    run(async {
        let node = open(&path).await;
        assert_eq!(units(&named(&node, "b")), all);
        node.close().await.unwrap();
    });
}

#[test]
fn bitmaps_follow_the_size_of_their_disk() {
    let dir = directory();
    let path = create(&dir, "image.qcow2", "", 16 * MIB);
    bitmap(&["--add"], &path, "on");
    bitmap(&["--add", "--disable"], &path, "off");
    run(async {
        let node = open(&path).await;
        write(&*node, 15 * MIB, &[1; 512]).await.unwrap();
        write(&*node, MIB, &[1; 512]).await.unwrap();
        node.resize(8 * MIB, Resize::Exactly, false).await.unwrap();
        assert_eq!(units(&named(&node, "on")), BTreeSet::from([16]));
        node.resize(32 * MIB + 512, Resize::Exactly, false)
            .await
            .unwrap();
        node.close().await.unwrap();
    });
    assert_clean(&path);
    // What a disk grows by was not there before.
    let expected: BTreeSet<u64> = (128..=512).chain([16]).collect();
    assert_eq!(seen_by_qemu(&path, "on", 65536), expected);
    assert_eq!(seen_by_qemu(&path, "off", 65536), BTreeSet::new());
}

#[test]
fn who_uses_a_bitmap_goes_on_with_it_when_the_image_is_opened_anew() {
    let dir = directory();
    let path = create(&dir, "image.qcow2", "", 16 * MIB);
    bitmap(&["--add"], &path, "b");
    run(async {
        let node = open(&path).await;
        write(&*node, MIB, &[1; 512]).await.unwrap();
        let held = named(&node, "b");
        let snapshot = async |file: &dyn Node| {
            // Nothing is open: the file has all of it.
            assert_eq!(flags(&path), owned(&[("b", &["auto"])]));
            snapshots::create(file, "s", std::time::SystemTime::now()).await
        };
        let (done, opened) = node.while_closed(snapshot).await.unwrap();
        done.unwrap();
        let node = opened.unwrap();
        assert!(Arc::ptr_eq(&held, &named(&node, "b")));
        write(&*node, 2 * MIB, &[1; 512]).await.unwrap();
        assert_eq!(flags(&path), owned(&[("b", &["in-use", "auto"])]));
        assert_eq!(units(&held), BTreeSet::from([16, 32]));
        let read_only = Qcow2Config {
            read_only: true,
            read_bitmaps: true,
            ..Qcow2Config::default()
        };
        let anew = node.open_anew(&read_only, node.children()).await.unwrap();
        let sealed = anew.node();
        anew.keep();
        assert!(Arc::ptr_eq(&held, &named(&sealed, "b")));
        assert_eq!(flags(&path), owned(&[("b", &["auto"])]));
        let anew = sealed
            .open_anew(&Qcow2Config::default(), sealed.children())
            .await
            .unwrap();
        let node = anew.node();
        anew.keep();
        write(&*node, 3 * MIB, &[1; 512]).await.unwrap();
        // While a job has taken its marks nothing that is stored of it is true.
        assert!(held.set_busy(true));
        node.close().await.unwrap();
        assert_eq!(flags(&path), owned(&[("b", &["in-use", "auto"])]));
    });
    assert_clean(&path);
}

#[test]
fn bitmaps_that_another_program_has_outdated_are_left_alone() {
    let dir = directory();
    let path = create(&dir, "image.qcow2", "", 16 * MIB);
    bitmap(&["--add"], &path, "b");
    let mut bytes = std::fs::read(&path).unwrap();
    // The autoclear features (specification, "Header").
    bytes[88..96].fill(0);
    std::fs::write(&path, &bytes).unwrap();
    // What the directory had is free, and used by the guest.
    must("qemu-img", &["check", "-q", "-r", "leaks", text(&path)]);
    run(async {
        let node = open(&path).await;
        assert!(node.bitmaps().is_empty());
        write(&*node, 0, &vec![7; MIB as usize]).await.unwrap();
        node.close().await.unwrap();
    });
    assert_clean(&path);
    assert!(
        converted(&path)[..MIB as usize]
            .iter()
            .all(|&byte| byte == 7)
    );
    // And there is room for new ones.
    run(async {
        let node = open(&path).await;
        let new = Arc::new(DirtyBitmap::new(node.size(), 65536).unwrap());
        node.add_bitmap(PersistentBitmap::new("new".to_owned(), new));
        write(&*node.renewed(), 0, &[1; 512]).await.unwrap();
        node.close().await.unwrap();
    });
    assert_clean(&path);
    assert_eq!(flags(&path), owned(&[("new", &["auto"])]));
}

#[test]
fn directories_that_cannot_be_are_refused() {
    let dir = directory();
    let path = create(&dir, "image.qcow2", "", 16 * MIB);
    for name in ["one", "two"] {
        bitmap(&["--add"], &path, name);
    }
    let good = std::fs::read(&path).unwrap();
    let kind = 0x2385_2875u32.to_be_bytes();
    let extension = good.windows(4).position(|four| four == kind).unwrap();
    let word = |at: usize| u64::from_be_bytes(good[at..at + 8].try_into().unwrap()) as usize;
    let directory = word(extension + 24);
    let table = word(directory);
    let cases: [(usize, &[u8], &str); 12] = [
        (
            directory + 16,
            &[2],
            "'one' doesn't satisfy the constraints",
        ),
        (
            directory + 12,
            &[0, 0, 0, 6],
            "'one' doesn't satisfy the constraints",
        ),
        (
            directory + 17,
            &[8],
            "'one' doesn't satisfy the constraints",
        ),
        (directory + 20, &[0, 0, 0, 1], "constraints"),
        (directory + 20, &[0xff; 4], "truncated"),
        // Of one that is not loaded the size is checked all the same.
        (directory + 8, &[0, 0x10, 0, 0, 0, 0, 0, 3], "constraints"),
        (directory + 8, &[0, 0, 0, 2], "Could not read bitmap 'one'"),
        (directory, &[0xff; 8], "Could not read bitmap 'one'"),
        (directory + 32 + 24, b"one", "Bitmap already exists: one"),
        (extension + 8, &[0, 0, 0, 3], "truncated"),
        (extension + 24, &[0x7f; 8], "not within the file"),
        (table, &[0x80; 8], "Could not read bitmap 'one'"),
    ];
    for (at, bytes, words) in cases {
        let mut bad = good.clone();
        bad[at..at + bytes.len()].copy_from_slice(bytes);
        std::fs::write(&path, &bad).unwrap();
        run(async {
            let opened = Qcow2Node::open(children(&path), &Qcow2Config::default()).await;
            let error = opened.unwrap_err();
            assert_eq!(error.kind(), Kind::Corrupt, "{error}");
            assert!(
                error.to_string().contains(words),
                "no '{words}' in: {error}"
            );
            // Whoever only wants to read it is not in the way of what he does not see.
            let config = Qcow2Config {
                read_only: true,
                ..Qcow2Config::default()
            };
            open_with(&path, &config).await;
        });
        let after = std::fs::read(&path).unwrap();
        assert!(after == bad, "{words}: the image was changed");
    }
}
