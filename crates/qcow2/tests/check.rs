//! A check finds what `qemu-img check` finds, a repair ends with both content, and neither is led astray by an image
//! that lies.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::pedantic)]

mod offline;

use diskfuse_qcow2::check::{Repair, rebuild_refcounts_of_dirty_image};
use offline::{Image, Qemu, Random, assert_same, must, run, tool};

const SHAPES: &[&str] = &[
    "",
    "cluster_size=512",
    "cluster_size=512,refcount_bits=64",
    "cluster_size=4k,refcount_bits=8",
    "cluster_size=2M,refcount_bits=32",
    "compat=0.10",
    "extended_l2=on,cluster_size=16k",
    "extended_l2=on",
    "compression_type=zstd",
    "preallocation=metadata",
    "preallocation=metadata,extended_l2=on,cluster_size=32k",
    "lazy_refcounts=on,refcount_bits=4",
    "refcount_bits=2",
];

/// What is done to the image, and doing it.
type Wrong = (&'static str, fn(&Image, u64));

/// Data, zeroes, holes, compressed clusters, a snapshot in the midst of it.
fn fill(image: &Image, snapshots: bool) {
    image.io(&[
        "write -P 1 0 300k",
        "write -P 2 3M 70k",
        "write -c -P 3 1M 64k",
        "write -c -P 4 6M 128k",
        "write -z 512k 128k",
        "write -z -u 3M 32k",
    ]);
    if snapshots {
        image.snapshot("-c", "first");
        image.io(&["write -P 5 64k 200k", "discard 4M 1M", "write -P 6 7M 512k"]);
    }
}

fn has_room_for_snapshots(options: &str) -> bool {
    !options.contains("refcount_bits=2")
}

fn compressible(options: &str) -> bool {
    !options.contains("cluster_size=2M")
}

fn shape(options: &str) -> Image {
    let image = Image::new(options, "8M");
    if compressible(options) && !options.contains("preallocation") {
        fill(&image, has_room_for_snapshots(options));
    } else {
        image.io(&[
            "write -P 1 0 300k",
            "write -P 2 3M 70k",
            "write -z 512k 128k",
        ]);
        image.snapshot("-c", "first");
        image.io(&["write -P 5 64k 200k", "discard 4M 1M"]);
    }
    image
}

#[test]
fn images_of_every_shape_are_clean_and_counted_alike() {
    for options in SHAPES {
        shape(options).assert_clean(options);
    }
}

#[test]
fn bitmaps_are_counted_and_leak_when_they_are_void() {
    let image = Image::new("cluster_size=4k", "64M");
    must(
        "qemu-img",
        &["bitmap", "--add", "-g", "512", image.name(), "one"],
    );
    must(
        "qemu-img",
        &["bitmap", "--add", "--enable", image.name(), "two"],
    );
    image.io(&["write 1M 2M", "write 60M 1M"]);
    image.assert_clean("bitmaps");
    // The header says no longer that they are true.
    image.put_u64(88, 0);
    let (ours, qemu) = (image.check(Repair::None).unwrap(), image.qemu_check());
    assert!(ours.leaks > 0);
    assert_same(&ours, &qemu, "void bitmaps");
    repaired(&image, Repair::Leaks, "void bitmaps");
}

#[test]
fn an_image_with_a_data_file_is_clean() {
    for options in [
        "data_file=DIR/data.raw",
        "data_file=DIR/data.raw,data_file_raw=on",
        "data_file=DIR/data.raw,extended_l2=on",
    ] {
        let image = Image::new(options, "8M");
        image.io(&["write 0 300k", "write -z 1M 100k", "write 7M 64k"]);
        image.assert_clean(options);
    }
}

/// After a repair both checks are content.
fn repaired(image: &Image, repair: Repair, what: &str) {
    let result = image.check(repair).unwrap();
    assert!(result.is_clean(), "{what}: {:#?}", result.messages);
    let qemu = image.qemu_check();
    assert_eq!(
        qemu.code,
        Some(0),
        "{what}: {}\n{:#?}",
        qemu.said,
        result.messages
    );
    image.assert_clean(what);
}

#[test]
fn a_leak_is_found_and_given_back() {
    let image = shape("");
    let end = image.qemu_check().number("image-end-offset");
    let block = image.refcount_block(0);
    image.put(block + 2 * (end / 65536), &[0, 3]);
    // Leaked clusters must be in the file.
    std::fs::File::options()
        .write(true)
        .open(&image.path)
        .unwrap()
        .set_len(end + 65536)
        .unwrap();
    let ours = image.check(Repair::None).unwrap();
    assert_eq!((ours.leaks, ours.corruptions), (1, 0));
    assert_same(&ours, &image.qemu_check(), "one leak");
    let fixed = image.check(Repair::Leaks).unwrap();
    assert_eq!((fixed.leaks, fixed.leaks_fixed), (0, 1));
    image.assert_clean("after the repair");
}

#[test]
fn a_cluster_in_use_with_too_low_a_refcount_is_a_corruption() {
    for options in SHAPES {
        let image = shape(options);
        let contents = image.contents(None);
        let block = image.refcount_block(0);
        // All refcounts gone.
        image.put(block, &[0; 512]);
        let ours = image.check(Repair::None).unwrap();
        let qemu = image.qemu_check();
        assert_eq!(qemu.code, Some(2), "{options}: {}", qemu.said);
        assert_same(&ours, &qemu, options);
        repaired(&image, Repair::All, options);
        assert!(contents == image.contents(None), "{options}");
    }
}

#[test]
fn refcount_structures_that_are_no_use_are_made_anew() {
    let wrong: &[fn(&Image)] = &[
        |image| image.put_u64(image.u64(48), 0),
        |image| image.put_u64(image.u64(48), 0x12345),
        |image| image.put_u64(image.u64(48), 1 << 40),
        |image| image.put_u64(image.u64(48), image.l1()),
        |image| image.put_u64(image.u64(48) + 8, image.refcount_block(0)),
        |image| image.put_u64(image.u64(48) + 64, 3),
    ];
    for options in [
        "",
        "cluster_size=512,refcount_bits=64",
        "extended_l2=on",
        "compat=0.10",
    ] {
        for (number, wrong) in wrong.iter().enumerate() {
            let what = format!("{options} {number}");
            let image = shape(options);
            let contents = (image.contents(None), image.contents(Some("first")));
            wrong(&image);
            let ours = image.check(Repair::None).unwrap();
            assert!(ours.corruptions > 0, "{what}");
            repaired(&image, Repair::All, &what);
            assert!(
                contents == (image.contents(None), image.contents(Some("first"))),
                "{what}"
            );
            image.io(&["write -P 9 0 8M"]);
            image.assert_clean(&what);
        }
    }
}

#[test]
fn entries_that_cannot_be_right_become_zeroes() {
    let wrong: &[Wrong] = &[
        ("misaligned", |i, e| i.put_u64(e, i.u64(e) | 0x200)),
        ("reserved", |i, e| i.put_u64(e, i.u64(e) | 0x10)),
        ("beyond the file", |i, e| {
            i.put_u64(e, 0x8000_00f0_0000_0000)
        }),
        ("on the header", |i, e| i.put_u64(e, 1 << 63 | 1)),
        ("on the L1 table", |i, e| i.put_u64(e, i.l1() | 1 << 63)),
        ("on its own table", |i, e| i.put_u64(e, i.l2(0) | 1 << 63)),
        ("on a refcount block", |i, e| {
            i.put_u64(e, i.refcount_block(0) | 1 << 63)
        }),
        ("not copied", |i, e| i.put_u64(e, i.u64(e) & !(1 << 63))),
        ("shared", |i, e| i.put_u64(e, i.u64(e + 8))),
    ];
    for (what, wrong) in wrong {
        let image = Image::new("", "8M");
        image.io(&["write -P 1 0 1M"]);
        let before = image.contents(None);
        wrong(&image, image.l2(0) + 8 * 4);
        let (ours, qemu) = (image.check(Repair::None).unwrap(), image.qemu_check());
        let harmless = *what == "on the header";
        assert!(ours.corruptions > 0 || harmless, "{what}: {}", qemu.said);
        assert!(qemu.code == Some(2) || harmless, "{what}: {}", qemu.said);
        // QEMU finds a second fault with a cluster that the file does not have: that its refcount is not one.
        let twice = u64::from(*what == "beyond the file");
        assert_eq!(
            ours.corruptions + twice,
            qemu.number("corruptions"),
            "{what}: {}\n{:#?}",
            qemu.said,
            ours.messages
        );
        assert_eq!(
            ours.leaks,
            qemu.number("leaks"),
            "{what}: {}\n{:#?}",
            qemu.said,
            ours.messages
        );
        if ours.is_clean() {
            continue;
        }
        repaired(&image, Repair::All, what);
        let after = image.contents(None);
        assert!(before[..256 << 10] == after[..256 << 10], "{what}");
        assert!(before[320 << 10..] == after[320 << 10..], "{what}");
    }
}

#[test]
fn an_l1_entry_that_cannot_be_right_is_given_up() {
    let wrong: &[Wrong] = &[
        ("misaligned", |i, e| i.put_u64(e, i.u64(e) | 0x200)),
        ("reserved", |i, e| i.put_u64(e, i.u64(e) | 0x10)),
        ("beyond the file", |i, e| {
            i.put_u64(e, 0x8000_00f0_0000_0000)
        }),
        ("on the L1 table", |i, e| i.put_u64(e, i.l1() | 1 << 63)),
        ("on the refcounts", |i, e| {
            i.put_u64(e, i.refcount_block(0) | 1 << 63)
        }),
        ("not copied", |i, e| i.put_u64(e, i.u64(e) & !(1 << 63))),
        ("shared", |i, e| i.put_u64(e, i.u64(e + 8))),
    ];
    for (what, wrong) in wrong {
        let image = Image::new("cluster_size=4k", "8M");
        image.io(&["write -P 1 0 1M", "write -P 2 2M 2M"]);
        wrong(&image, image.l1());
        let (ours, qemu) = (image.check(Repair::None).unwrap(), image.qemu_check());
        assert!(ours.corruptions > 0, "{what}: {}", qemu.said);
        assert_eq!(qemu.code, Some(2), "{what}: {}", qemu.said);
        repaired(&image, Repair::All, what);
    }
}

#[test]
fn structures_that_share_a_cluster_are_found_though_refcounts_allow_it() {
    let image = Image::new("", "8M");
    image.io(&["write -P 1 0 1M"]);
    let (entry, l1) = (image.l2(0) + 32, image.l1());
    let old = image.u64(entry) & !(1 << 63);
    let block = image.refcount_block(0);
    image.put_u64(entry, l1);
    image.put(block + 2 * (l1 >> 16), &[0, 2]);
    image.put(block + 2 * (old >> 16), &[0, 0]);
    assert_eq!(image.qemu_check().code, Some(0), "QEMU does not see it");
    let ours = image.check(Repair::None).unwrap();
    assert_eq!(
        (ours.corruptions, ours.leaks),
        (1, 0),
        "{:?}",
        ours.messages
    );
    repaired(&image, Repair::All, "overlap");
}

#[test]
fn a_dirty_image_is_repaired_and_clean_afterwards() {
    let image = Image::new("lazy_refcounts=on", "8M");
    let killed = tool(
        "qemu-io",
        &[
            "-f",
            "qcow2",
            "-c",
            "write -P 7 0 1M",
            "-c",
            "abort",
            image.name(),
        ],
    );
    assert!(!killed.status.success());
    assert_eq!(image.u64(72) & 1, 1, "the dirty bit");
    let ours = image.check(Repair::None).unwrap();
    assert!(ours.corruptions > 0);
    assert_same(&ours, &image.qemu_check(), "dirty");
    run(rebuild_refcounts_of_dirty_image(&*image.node())).unwrap();
    assert_eq!(image.u64(72) & 1, 0);
    image.assert_clean("not dirty any more");
    assert!(image.contents(None)[..1 << 20].iter().all(|b| *b == 7));
}

#[test]
fn the_corrupt_bit_goes_when_nothing_corrupt_is_left() {
    let image = shape("");
    image.put_u64(72, 2);
    let ours = image.check(Repair::None).unwrap();
    assert!(
        ours.is_clean() && ours.messages.len() == 1,
        "{:?}",
        ours.messages
    );
    assert_eq!(image.u64(72), 2);
    repaired(&image, Repair::All, "corrupt bit");
    assert_eq!(image.u64(72), 0);
}

#[test]
fn a_check_writes_nothing() {
    let image = shape("");
    image.put(image.refcount_block(0), &[0; 64]);
    image.put_u64(image.l2(0) + 16, 0x1234_5678_9abc_def0);
    let before = image.bytes();
    image.check(Repair::None).unwrap();
    assert!(before == image.bytes());
}

/// What both say, in a word.
fn verdict(errors: bool, corruptions: u64, leaks: u64) -> &'static str {
    match (errors, corruptions, leaks) {
        (true, ..) => "error",
        (_, 1.., _) => "corrupt",
        (_, 0, 1..) => "leaks",
        _ => "clean",
    }
}

fn theirs(qemu: &Qemu) -> &'static str {
    let errors = !matches!(qemu.code, Some(0 | 2 | 3));
    verdict(errors, qemu.number("corruptions"), qemu.number("leaks"))
}

/// Changes a few bytes of the metadata.
fn damage(image: &Image, random: &mut Random, size: u64) -> String {
    let len = std::fs::metadata(&image.path).unwrap().len();
    let snapshots = image.u64(64);
    let places = [
        image.refcount_block(0),
        image.u64(48),
        image.l1(),
        image.l2(0),
        image.l2(0),
        image.u64(snapshots) & !(size - 1),
        snapshots,
    ];
    let mut said = String::new();
    for _ in 0..=random.below(3) {
        let place = *random.pick(&places);
        let reach = *random.pick(&[16, 64, size]);
        let at = place + random.below(reach.min(size));
        if place == 0 || at >= len {
            continue;
        }
        let byte = random.next() as u8;
        said += &format!("{at}={byte:#x} ");
        image.put(at, &[byte]);
    }
    said
}

#[test]
fn damaged_images_get_the_verdict_of_qemu_and_can_be_repaired() {
    let seed = std::env::var("SEED").ok().and_then(|s| s.parse().ok());
    let shapes = [
        ("", 65536),
        ("cluster_size=4k", 4096),
        ("extended_l2=on,cluster_size=16k", 16384),
        ("cluster_size=1k,refcount_bits=8", 1024),
    ];
    for round in 0..60 {
        let start = seed.unwrap_or(round);
        let mut random = Random(start);
        let (options, size) = *random.pick(&shapes);
        let image = Image::new(options, "8M");
        image.io(&[
            "write -P 1 0 300k",
            "write -c -P 3 1M 64k",
            "write -z 512k 128k",
        ]);
        image.snapshot("-c", "first");
        image.io(&["write -P 5 64k 200k"]);
        let said = damage(&image, &mut random, size);
        let what = format!("SEED={start} {options} {said}");
        let qemu = image.qemu_check();
        let ours = image.check(Repair::None);
        let (our_verdict, messages) = match &ours {
            Ok(r) => (
                verdict(r.check_errors > 0, r.corruptions, r.leaks),
                r.messages.join("\n"),
            ),
            Err(error) => ("error", error.to_string()),
        };
        let stricter = our_verdict == "corrupt" && theirs(&qemu) != "error";
        if theirs(&qemu) != "error" && !stricter {
            assert_eq!(
                our_verdict,
                theirs(&qemu),
                "{what}: {}\n{messages}",
                qemu.said
            );
        }
        if stricter && theirs(&qemu) != "corrupt" {
            println!("{what}: stricter than QEMU:\n{messages}");
        }
        if our_verdict != "error" {
            let after = image.check(Repair::All).unwrap();
            let now = image.qemu_check();
            assert!(
                after.corruptions == 0 || now.code != Some(0),
                "{what}: {:#?}",
                after.messages
            );
            if after.is_clean() {
                assert_eq!(now.code, Some(0), "{what}: {}\n{messages}", now.said);
            } else {
                println!("{what}: not repaired: {:#?}", after.messages);
            }
        }
        if seed.is_some() {
            break;
        }
    }
}

#[test]
fn an_image_that_claims_more_than_its_file_needs_no_memory() {
    let image = Image::new("cluster_size=512", "8M");
    image.io(&["write 0 4k"]);
    let l2 = image.l2(0);
    for n in 0..64 {
        image.put_u64(l2 + 8 * n, 1 << 63 | (n + 1) << 48);
    }
    let ours = image.check(Repair::None).unwrap();
    assert!(ours.corruptions >= 64);
    repaired(&image, Repair::All, "claims");
}
