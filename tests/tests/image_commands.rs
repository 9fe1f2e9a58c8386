//! The commands for whole images against the tools of QEMU: what one makes the other reads, both say the same of it, and
//! mistakes cost nothing.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use diskfuse_e2e::{Bed, LoopDevice, Output, Tool, everywhere, once, pattern};
use serde_json::Value;

const MIB: usize = 1 << 20;

/// Runs a tool of QEMU, or ours, in the bed's folder.
fn tool(bed: &Bed, program: &str, arguments: &[&str]) -> Tool {
    Tool::new(program).args(arguments).current_dir(bed.root())
}

fn qemu_img(bed: &Bed, arguments: &[&str]) -> Output {
    tool(bed, "qemu-img", arguments).run()
}

fn ours(bed: &Bed, arguments: &[&str]) -> Output {
    bed.tool(arguments).current_dir(bed.root()).run()
}

#[track_caller]
fn refused(bed: &Bed, arguments: &[&str], words: &[&str]) {
    let output = bed.tool(arguments).current_dir(bed.root()).output();
    output.refused(1, words);
}

fn json(output: &Output) -> Value {
    serde_json::from_str(&output.stdout).unwrap_or_else(|error| panic!("{error} in {output}"))
}

/// Nothing at all is wrong, not even a leak, says `qemu-img`; and so do we.
#[track_caller]
fn sound(bed: &Bed, image: &str) {
    qemu_img(bed, &["check", "-q", "-f", "qcow2", image]);
    ours(bed, &["check", image]);
}

#[track_caller]
fn same_disk(bed: &Bed, one: &str, other: &str) {
    qemu_img(bed, &["compare", "-q", one, other]);
}

/// Writes a pattern at a byte offset of an image's disk.
fn write(bed: &Bed, image: &str, offset: usize, len: usize, number: u64) {
    let data = bed.path("data");
    std::fs::write(&data, pattern(len, number)).unwrap();
    let command = format!("write -q -s data {offset} {len}");
    let format = if image.ends_with("raw") {
        "raw"
    } else {
        "qcow2"
    };
    tool(bed, "qemu-io", &["-f", format, "-c", &command, image]).run();
}

/// What both say of an image in JSON.
#[track_caller]
fn same_words(bed: &Bed, ours_says: &[&str], qemu_says: &[&str]) {
    let (ours, qemu) = (json(&ours(bed, ours_says)), json(&qemu_img(bed, qemu_says)));
    assert_eq!(ours, qemu, "{ours_says:?} and qemu-img {qemu_says:?}");
}

#[test]
fn every_kind_of_new_image_is_one_for_qemu_too() {
    let kinds = [
        "compat=0.10",
        "cluster_size=512,refcount_bits=1",
        "cluster_size=2M,refcount_bits=64",
        "extended_l2=on,cluster_size=16k",
        "lazy_refcounts=on",
        "compression_type=zstd",
        "preallocation=metadata",
        "preallocation=metadata,cluster_size=4k,refcount_bits=32",
        "preallocation=falloc",
        "preallocation=full,cluster_size=1M",
        "preallocation=metadata,extended_l2=on",
        "data_file=d.data",
        "data_file=d.data,data_file_raw=on",
        "data_file=d.data,preallocation=full",
    ];
    once(|bed| {
        for kind in kinds {
            ours(bed, &["create", "-o", kind, "i.qcow2", "5M"]);
            sound(bed, "i.qcow2");
            same_words(
                bed,
                &["info", "--json", "i.qcow2"],
                &["info", "--output=json", "i.qcow2"],
            );
            write(bed, "i.qcow2", 3 << 20, 100_352, 1);
            let daemon = bed.mount(&bed.path("i.qcow2"), &["-w"]);
            let mut there = vec![0; 100_352];
            daemon.open().read_exact_at(&mut there, 3 << 20).unwrap();
            assert_eq!(there, pattern(100_352, 1), "{kind}");
            daemon
                .open()
                .write_all_at(&pattern(MIB, 2), 1 << 20)
                .unwrap();
            daemon.stop();
            sound(bed, "i.qcow2");
            for name in bed.names() {
                std::fs::remove_file(bed.path(&name)).unwrap();
            }
        }
    });
}

#[test]
fn what_cannot_be_made_is_refused_and_nothing_is_left() {
    once(|bed| {
        let make = |options: &str, words: &[&str]| {
            refused(bed, &["create", "-o", options, "i.qcow2", "1M"], words);
        };
        make("cluster_size=100", &["power of two"]);
        make("clutser_size=64k", &["clutser_size", "cluster_size"]);
        make("compat=0.10,lazy_refcounts=on", &["compat=1.1"]);
        make("encrypt.format=luks", &["not built"]);
        make("data_file_raw=on", &["data_file"]);
        refused(
            bed,
            &["create", "-b", "missing.qcow2", "i.qcow2"],
            &["missing.qcow2", "No such file"],
        );
        assert_eq!(bed.names(), Vec::<String>::new());
        ours(bed, &["create", "i.qcow2", "1M"]);
        refused(bed, &["create", "i.qcow2", "1M"], &["not empty", "--force"]);
        ours(bed, &["create", "--force", "i.qcow2", "2M"]);
    });
}

/// An overlay of two layers that hold something each, and its disk as `flat.raw`.
fn chain(bed: &Bed) {
    ours(bed, &["create", "base.qcow2", "8M"]);
    write(bed, "base.qcow2", 0, 2 * MIB, 1);
    write(bed, "base.qcow2", 5 * MIB, 70_000 / 512 * 512, 2);
    ours(bed, &["create", "-b", "base.qcow2", "top.qcow2"]);
    write(bed, "top.qcow2", MIB, 2 * MIB, 3);
    ours(bed, &["convert", "top.qcow2", "flat.raw"]);
    same_disk(bed, "top.qcow2", "flat.raw");
}

#[test]
fn a_chain_is_told_mapped_rebased_and_committed_as_qemu_does() {
    once(|bed| {
        chain(bed);
        same_words(
            bed,
            &["map", "--json", "top.qcow2"],
            &["map", "--output=json", "top.qcow2"],
        );
        same_words(
            bed,
            &["info", "--chain", "--json", "top.qcow2"],
            &["info", "--backing-chain", "--output=json", "top.qcow2"],
        );
        std::fs::copy(bed.path("top.qcow2"), bed.path("alone.qcow2")).unwrap();
        ours(bed, &["rebase", "-b", "", "alone.qcow2"]);
        assert!(
            !ours(bed, &["info", "alone.qcow2"])
                .stdout
                .contains("backing")
        );
        same_disk(bed, "alone.qcow2", "flat.raw");
        ours(bed, &["commit", "top.qcow2"]);
        same_disk(bed, "base.qcow2", "flat.raw");
        for image in ["base.qcow2", "top.qcow2", "alone.qcow2"] {
            sound(bed, image);
        }
    });
}

/// Where the old chain shows zeroes and the new one does not, zeroes are kept: whatever it was that showed them.
#[test]
fn zeroes_of_the_old_chain_stay_zeroes_on_the_new_one() {
    once(|bed| {
        std::fs::write(bed.path("new.raw"), pattern(4 * MIB, 5)).unwrap();
        std::fs::write(bed.path("short.raw"), pattern(MIB, 6)).unwrap();
        qemu_img(bed, &["create", "-q", "-f", "qcow2", "empty.qcow2", "4M"]);
        for options in [
            "compat=v3",
            "compat=0.10",
            "extended_l2=on",
            "cluster_size=512",
        ] {
            for old in [
                None,
                Some(["empty.qcow2", "qcow2"]),
                Some(["short.raw", "raw"]),
            ] {
                let backing =
                    old.map_or(Vec::new(), |[name, format]| vec!["-b", name, "-F", format]);
                let create = ["create", "-q", "-f", "qcow2", "-o", options];
                let image = ["over.qcow2", "4M"];
                qemu_img(bed, &[&create[..], &backing, &image].concat());
                // Parts of clusters of it are its own.
                write(bed, "over.qcow2", 2 * MIB + 1536, 3 * 512, 7);
                ours(bed, &["convert", "--force", "over.qcow2", "before.raw"]);
                ours(bed, &["rebase", "-b", "new.raw", "-F", "raw", "over.qcow2"]);
                same_disk(bed, "before.raw", "over.qcow2");
                sound(bed, "over.qcow2");
                assert!(
                    ours(bed, &["info", "over.qcow2"])
                        .stdout
                        .contains("new.raw")
                );
            }
        }
    });
}

/// An emptied overlay hides nothing of the base, not even by zeroes that it had noted.
#[test]
fn a_committed_overlay_holds_nothing() {
    once(|bed| {
        for options in ["compat=v3", "compat=0.10", "extended_l2=on"] {
            qemu_img(bed, &["create", "-q", "-f", "qcow2", "base.qcow2", "4M"]);
            write(bed, "base.qcow2", 0, 4 * MIB, 3);
            let backing = ["-b", "base.qcow2", "-F", "qcow2", "over.qcow2"];
            qemu_img(
                bed,
                &[
                    &["create", "-q", "-f", "qcow2", "-o", options],
                    &backing[..],
                ]
                .concat(),
            );
            for command in ["write -z 1M 1M", "write -z -u 2560k 4k", "write 3M 64k"] {
                tool(
                    bed,
                    "qemu-io",
                    &["-f", "qcow2", "-c", command, "over.qcow2"],
                )
                .run();
            }
            ours(bed, &["convert", "--force", "over.qcow2", "before.raw"]);
            ours(bed, &["commit", "over.qcow2"]);
            same_disk(bed, "before.raw", "base.qcow2");
            sound(bed, "over.qcow2");
            let map = json(&qemu_img(bed, &["map", "--output=json", "over.qcow2"]));
            let depths = map.as_array().unwrap().iter().map(|part| &part["depth"]);
            assert!(depths.clone().all(|depth| depth == 1), "{options}: {map}");
        }
    });
}

#[test]
fn an_image_is_not_made_over_what_it_would_stand_on() {
    once(|bed| {
        chain(bed);
        std::fs::hard_link(bed.path("base.qcow2"), bed.path("link.qcow2")).unwrap();
        let before = std::fs::read(bed.path("base.qcow2")).unwrap();
        for (backing, image) in [
            ("base.qcow2", "base.qcow2"),
            ("base.qcow2", "link.qcow2"),
            ("top.qcow2", "base.qcow2"),
        ] {
            refused(bed, &["create", "--force", "-b", backing, image], &["loop"]);
            assert!(std::fs::read(bed.path("base.qcow2")).unwrap() == before);
        }
    });
}

/// What was on a device before is not a part of the new disk, though the image names all of its places.
#[test]
fn a_device_as_data_file_shows_nothing_of_what_it_held() {
    once(|bed| {
        let held = bed.path("held");
        std::fs::write(&held, vec![0xaa; 4 * MIB]).unwrap();
        let mut source = vec![0; 4 * MIB];
        source[MIB..MIB + 65536].copy_from_slice(&pattern(65536, 8));
        std::fs::write(bed.path("src.raw"), source).unwrap();
        for more in ["data_file_raw=on", "preallocation=metadata"] {
            let device = LoopDevice::over(&held);
            let options = format!("data_file={},{more}", device.path().display());
            let convert = ["convert", "--force", "-O", "qcow2", "-o", &options];
            ours(bed, &[&convert[..], &["src.raw", "out.qcow2"]].concat());
            same_disk(bed, "src.raw", "out.qcow2");
            std::fs::write(&held, vec![0xaa; 4 * MIB]).unwrap();
        }
    });
}

#[test]
fn an_image_goes_from_any_format_to_any_compressed_or_not() {
    once(|bed| {
        chain(bed);
        for (name, options) in [
            ("plain.qcow2", &["-O", "qcow2"][..]),
            ("deflate.qcow2", &["-c", "-O", "qcow2"]),
            ("zstd.qcow2", &["-c", "-o", "compression_type=zstd"]),
            ("v2.qcow2", &["-o", "compat=0.10"]),
            ("threads.qcow2", &["--threads", "3", "-m", "2"]),
        ] {
            let more = ["top.qcow2", name];
            ours(bed, &[&["convert"], options, &more].concat());
            same_disk(bed, name, "flat.raw");
            sound(bed, name);
        }
        // Space, not length: who writes at the same time may leave holes between their clusters.
        let kept = |name: &str| std::fs::metadata(bed.path(name)).unwrap().blocks() * 512;
        assert!(kept("deflate.qcow2") <= kept("plain.qcow2") + 65536);
        let busy = bed.mount(&bed.path("top.qcow2"), &["-w"]);
        refused(bed, &["convert", "top.qcow2", "no.raw"], &["lock"]);
        busy.stop();
        assert!(!bed.names().contains(&"no.raw".to_owned()));
    });
}

#[test]
fn snapshots_keep_the_disk_as_it_was() {
    everywhere(|bed| {
        chain(bed);
        let (image, top) = (bed.path("top.qcow2"), "top.qcow2");
        ours(bed, &["snapshot", "create", top, "before"]);
        let daemon = bed.mount(&image, &["-w"]);
        daemon.open().write_all_at(&pattern(4 * MIB, 9), 0).unwrap();
        daemon.stop();
        sound(bed, top);
        let old = std::fs::read(bed.path("flat.raw")).unwrap();
        let daemon = bed.mount(&image, &["--snapshot", "before"]);
        assert!(std::fs::read(daemon.file()).unwrap() == old, "shown");
        daemon.stop();
        let listed = qemu_img(bed, &["snapshot", "-l", top]);
        assert!(listed.stdout.contains("before"), "{listed}");
        refused(
            bed,
            &["snapshot", "apply", top, "after"],
            &["'after'", "'before'"],
        );
        ours(bed, &["snapshot", "apply", top, "before"]);
        same_disk(bed, top, "flat.raw");
        ours(bed, &["snapshot", "delete", top, "before"]);
        same_disk(bed, top, "flat.raw");
        sound(bed, top);
    });
}

#[test]
fn a_disk_grows_and_shrinks_only_when_told_so() {
    once(|bed| {
        chain(bed);
        ours(bed, &["resize", "top.qcow2", "+8M"]);
        refused(bed, &["resize", "top.qcow2", "1M"], &["--shrink"]);
        let info = json(&qemu_img(bed, &["info", "--output=json", "top.qcow2"]));
        assert_eq!(info["virtual-size"], 16 * MIB);
        ours(bed, &["resize", "--shrink", "top.qcow2", "8M"]);
        same_disk(bed, "top.qcow2", "flat.raw");
        sound(bed, "top.qcow2");
    });
}

/// Damages the refcounts: the first block's first kilobyte.
fn damage(image: &Path) {
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(image)
        .unwrap();
    let word = |at| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, at).unwrap();
        u64::from_be_bytes(bytes)
    };
    let block = word(word(48));
    file.write_all_at(&[0; 1024], block).unwrap();
}

#[test]
fn a_damaged_image_is_told_and_repaired() {
    once(|bed| {
        chain(bed);
        damage(&bed.path("base.qcow2"));
        let output = bed
            .tool(["check", "base.qcow2"])
            .current_dir(bed.root())
            .output();
        assert_eq!(output.code(), 2, "{output}");
        let output = bed
            .tool(["check", "--json", "base.qcow2"])
            .current_dir(bed.root());
        assert!(json(&output.output())["corruptions"].as_u64() > Some(0));
        ours(bed, &["check", "--repair", "all", "base.qcow2"]);
        sound(bed, "base.qcow2");
        same_disk(bed, "top.qcow2", "flat.raw");
    });
}

#[test]
fn a_raw_image_that_was_not_called_raw_cannot_be_made_to_look_like_qcow2() {
    everywhere(|bed| {
        ours(bed, &["create", "q.qcow2", "1M"]);
        let head = std::fs::read(bed.path("q.qcow2")).unwrap();
        let image = bed.image("i", MIB);
        let daemon = bed.mount(&image, &["-w"]);
        assert!(daemon.open().write_all_at(&head[..512], 0).is_err());
        daemon.open().write_all_at(&head[..512], 512).unwrap();
        daemon.stop();
        assert_eq!(
            std::fs::read(&image).unwrap()[..512],
            pattern(MIB, 1)[..512]
        );
        let daemon = bed.mount(&image, &["-w", "--format", "raw"]);
        daemon.open().write_all_at(&head[..512], 0).unwrap();
        daemon.stop();
    });
}

#[test]
fn what_cannot_be_opened_says_why() {
    once(|bed| {
        ours(
            bed,
            &[
                "create",
                "-u",
                "-F",
                "qcow2",
                "-b",
                "loop.qcow2",
                "loop.qcow2",
                "1M",
            ],
        );
        refused(bed, &["mount", "loop.qcow2"], &["loop"]);
        ours(
            bed,
            &[
                "create",
                "-u",
                "-F",
                "raw",
                "-b",
                "gone",
                "orphan.qcow2",
                "1M",
            ],
        );
        refused(bed, &["mount", "orphan.qcow2"], &["gone", "No such file"]);
        ours(bed, &["create", "-o", "data_file=d", "split.qcow2", "1M"]);
        std::fs::remove_file(bed.path("d")).unwrap();
        refused(bed, &["mount", "split.qcow2"], &["'d'", "No such file"]);
        let luks = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
        let secret = "secret,id=s,data=abc";
        let make = [
            "create", "-q", "-f", "qcow2", "--object", secret, "-o", luks,
        ];
        qemu_img(bed, &[&make[..], &["enc.qcow2", "1M"]].concat());
        refused(bed, &["mount", "enc.qcow2"], &["encrypted"]);
        bed.nothing_mounted();
    });
}
