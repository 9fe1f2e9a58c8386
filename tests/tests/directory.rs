//! `mount --dir`: the disk, its partitions, snapshots and layers as files in a directory, with real tools on real tables.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use diskfuse_e2e::{Bed, Tool, everywhere, once, pattern};
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};

const MIB: u64 = 1 << 20;

/// `sfdisk` with a script, lines divided by `;`.
fn sfdisk(disk: &Path, options: &str, script: &str) {
    let script = script.replace(';', "\n");
    let command = format!(
        "printf '%s\\n' '{script}' | sfdisk --quiet --no-reread --no-tell-kernel {options} '{}'",
        disk.display()
    );
    Tool::new("sh").args(["-c", &command]).run();
}

const TABLE: &str =
    "label: gpt;size=8MiB, name=\"one\";size=16MiB, name=\"a/../b\";size=4MiB, name=\"..\"";

/// A disk of 64 MiB with [`TABLE`] on it.
fn disk(bed: &Bed) -> PathBuf {
    let disk = bed.sparse("disk", 64 * MIB);
    sfdisk(&disk, "", TABLE);
    disk
}

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let name = |entry: std::io::Result<std::fs::DirEntry>| {
        entry.unwrap().file_name().into_string().unwrap()
    };
    let mut names: Vec<String> = entries.map(name).collect();
    names.sort();
    names
}

#[test]
fn partitions_are_files_that_tools_work_on() {
    everywhere(|bed| {
        let image = disk(bed);
        let daemon = bed.mount(&image, &["--dir", "-w", "--format", "raw"]);
        let m = bed.path("m");
        let expected = [
            "by-label",
            "by-name",
            "by-uuid",
            "disk",
            "info.json",
            "layers",
            "p1",
            "p2",
            "p3",
            "snapshots",
        ];
        assert_eq!(names(&m), expected);
        let sizes = ["disk", "p1", "p2", "p3"].map(|f| m.join(f).metadata().unwrap().len() / MIB);
        assert_eq!(sizes, [64, 8, 16, 4]);
        let inodes: std::collections::BTreeSet<u64> = ["disk", "p1", "p2", "p3", "info.json"]
            .map(|f| m.join(f).metadata().unwrap().ino())
            .into();
        assert_eq!(inodes.len(), 5);
        assert_eq!(
            names(&m.join("by-name")),
            ["\\x2e.", "a\\x2f..\\x2fb", "one"]
        );
        assert_eq!(m.join("by-name/one").canonicalize().unwrap(), m.join("p1"));

        Tool::new("mkfs.ext4")
            .args(["-q", "-L", "my root"])
            .arg(m.join("p2"))
            .run();
        assert_eq!(names(&m.join("by-label")), ["my\\x20root"]);
        let labelled = m.join("by-label/my\\x20root");
        Tool::new("fsck.ext4")
            .args(["-f", "-n"])
            .arg(&labelled)
            .run();
        // What one file shows the others show: the file system's magic, seen through the disk.
        let mut magic = [0; 2];
        let whole = File::open(m.join("disk")).unwrap();
        whole
            .read_exact_at(&mut magic, 9 * MIB + 1024 + 56)
            .unwrap();
        assert_eq!(magic, [0x53, 0xef]);
        let info = std::fs::read_to_string(m.join("info.json")).unwrap();
        assert!(info.contains("\"label\": \"my root\""), "{info}");
        assert!(info.contains("\"format\": \"raw\""), "{info}");
        drop(whole);
        daemon.stop();
        assert!(!m.exists(), "a directory that was made is removed");
        Tool::new("sfdisk").arg("--verify").arg(&image).run();
    });
}

#[test]
fn a_partition_ends_at_its_borders() {
    everywhere(|bed| {
        let image = disk(bed);
        let around = [(MIB - 4096, 4096), (9 * MIB, 4096)];
        let file = File::options().write(true).open(&image).unwrap();
        for (at, len) in around {
            file.write_all_at(&pattern(len, at), at).unwrap();
        }
        let daemon = bed.mount(&image, &["--dir", "-w", "--format", "raw"]);
        let p1 = File::options()
            .read(true)
            .write(true)
            .open(bed.path("m/p1"))
            .unwrap();
        p1.write_all_at(&vec![7; 8 << 20], 0).unwrap();
        assert!(
            p1.write_at(&[1], 8 * MIB).is_err(),
            "there is nothing behind it"
        );
        assert_eq!(p1.read_at(&mut [0; 4096], 8 * MIB - 512).unwrap(), 512);
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        // Discards more than it has, and gets what it has.
        fallocate(&p1, punch, 4 * MIB, 64 * MIB).unwrap();
        p1.sync_all().unwrap();
        assert_eq!(seek(&p1, SeekFrom::Hole(0)).unwrap(), 4 * MIB);
        assert!(p1.set_len(9 * MIB).is_err(), "a partition has its size");
        let file = File::open(&image).unwrap();
        for (at, len) in around {
            let mut there = vec![0; len];
            file.read_exact_at(&mut there, at).unwrap();
            assert_eq!(there, pattern(len, at), "{at}");
        }
        drop(p1);
        daemon.stop();
    });
}

#[test]
fn a_table_that_is_rewritten_is_read_anew_but_not_under_those_who_use_it() {
    everywhere(|bed| {
        let image = disk(bed);
        let daemon = bed.mount(&image, &["--dir", "-w", "--format", "raw"]);
        let m = bed.path("m");
        let p1 = File::open(m.join("p1")).unwrap();
        let p3 = File::open(m.join("p3")).unwrap();
        let size = |name: &str| m.join(name).metadata().map(|stat| stat.len() / MIB).ok();
        let ino = p1.metadata().unwrap().ino();
        sfdisk(&m.join("disk"), "", "label: gpt;size=1MiB;size=2MiB");
        // Two are open, and stay what they were; the other one changes at once.
        assert_eq!(
            [size("p1"), size("p2"), size("p3")],
            [Some(8), Some(2), Some(4)]
        );
        assert_eq!(p3.read_at(&mut [1; 512], 4 * MIB - 512).unwrap(), 512);
        drop((p1, p3));
        let end = std::time::Duration::from_secs(10);
        diskfuse_e2e::wait_until("the directory has caught up", end, || {
            [size("p1"), size("p2"), size("p3")] == [Some(1), Some(2), None]
        });
        assert_eq!(m.join("p1").metadata().unwrap().ino(), ino, "p1 is p1");
        assert_eq!(
            names(&m.join("layers/0")),
            ["by-label", "by-name", "by-uuid", "disk", "p1", "p2"]
        );
        // Behind the daemon's back nobody can tell it; `sync` does.
        daemon.stop();

        let daemon = bed.mount(&image, &["--dir", "--format", "raw"]);
        let file = File::options().write(true).open(&image).unwrap();
        // Both copies: one alone would do.
        file.write_all_at(&[0; 4096], 0).unwrap();
        file.write_all_at(&[0; 4096], 64 * MIB - 4096).unwrap();
        assert_eq!(size("p1"), Some(1));
        Tool::new("sync").arg(&m).run();
        assert_eq!(size("p1"), None);
        daemon.stop();
    });
}

#[test]
fn snapshots_and_layers_are_shown_as_they_are() {
    everywhere(|bed| {
        let base = bed.path("base.qcow2");
        let top = bed.path("top.qcow2");
        let qemu_img = |words: &[&str]| Tool::new("qemu-img").args(words).run();
        let raw = disk(bed);
        let (base_name, top_name) = (base.to_str().unwrap(), top.to_str().unwrap());
        qemu_img(&[
            "convert",
            "-f",
            "raw",
            "-O",
            "qcow2",
            raw.to_str().unwrap(),
            base_name,
        ]);
        qemu_img(&[
            "create", "-q", "-f", "qcow2", "-b", base_name, "-F", "qcow2", top_name,
        ]);
        let write = |byte: u8| {
            let command = format!("write -q -P {byte} 1M 64k");
            Tool::new("qemu-io")
                .args(["-f", "qcow2", "-c", &command, top_name])
                .run();
        };
        write(1);
        qemu_img(&["snapshot", "-c", "first/../x", top_name]);
        write(2);
        qemu_img(&["snapshot", "-c", "second", top_name]);
        let daemon = bed.mount(&top, &["--dir", "-w"]);
        let m = bed.path("m");
        let p1 = File::options()
            .read(true)
            .write(true)
            .open(m.join("p1"))
            .unwrap();
        p1.write_all_at(&[3; 4096], 0).unwrap();
        p1.sync_all().unwrap();
        assert_eq!(
            names(&m.join("snapshots")),
            ["first\\x2f..\\x2fx", "second"]
        );
        assert_eq!(names(&m.join("layers")), ["0", "1"]);
        let first = |path: &str| {
            let mut byte = [9];
            File::open(m.join(path))
                .unwrap()
                .read_exact_at(&mut byte, 0)
                .unwrap();
            byte[0]
        };
        let seen = [
            "p1",
            "snapshots/second/p1",
            "snapshots/first\\x2f..\\x2fx/p1",
            "layers/0/p1",
            "layers/1/p1",
        ];
        assert_eq!(seen.map(first), [3, 2, 1, 3, 0]);
        for path in ["snapshots/second/p1", "layers/0/disk", "layers/1/p1"] {
            let opened = File::options().write(true).open(m.join(path));
            assert!(opened.is_err(), "{path} can be written");
        }
        let info = std::fs::read_to_string(m.join("info.json")).unwrap();
        assert!(
            info.contains("first/../x") && info.contains("base.qcow2"),
            "{info}"
        );
        drop(p1);
        daemon.stop();
        qemu_img(&["check", "-q", top_name]);
    });
}

#[test]
fn a_disk_that_is_a_file_system_has_links_to_itself() {
    once(|bed| {
        let image = bed.sparse("i", 64 * MIB);
        Tool::new("mkfs.vfat")
            .args(["-F", "32", "-n", "ESP", "-i", "DEADBEEF"])
            .arg(&image)
            .run();
        let daemon = bed.mount(&image, &["--dir", "--format", "raw"]);
        let m = bed.path("m");
        for link in ["by-label/ESP", "by-uuid/DEAD-BEEF"] {
            assert_eq!(m.join(link).canonicalize().unwrap(), m.join("disk"));
        }
        assert!(
            File::options().write(true).open(m.join("disk")).is_err(),
            "read-only by default"
        );
        daemon.stop();
    });
}

#[test]
fn hundreds_of_partitions_and_problems_are_shown() {
    everywhere(|bed| {
        let image = bed.sparse("i", 1024 * MIB);
        let mut script = "label: gpt;table-length: 300".to_owned();
        for _ in 0..300 {
            script += ";size=1MiB";
        }
        sfdisk(&image, "", &script);
        // The last ones are cut off.
        File::options()
            .write(true)
            .open(&image)
            .unwrap()
            .set_len(300 * MIB)
            .unwrap();
        let daemon = bed.mount(&image, &["--dir", "--format", "raw"]);
        let m = bed.path("m");
        let shown = names(&m);
        assert_eq!(
            shown.iter().filter(|name| name.starts_with('p')).count(),
            299
        );
        let info = std::fs::read_to_string(m.join("info.json")).unwrap();
        assert!(info.contains("p300 reaches past the end"), "{info}");
        let sizes = (1..300).map(|n| m.join(format!("p{n}")).metadata().unwrap().len());
        assert!(sizes.into_iter().all(|size| size == MIB));
        daemon.stop();
    });
}

#[test]
fn what_cannot_be_a_directory_is_refused() {
    everywhere(|bed| {
        let image = disk(bed);
        let refused = |on: &Path, code: i32, words: &[&str]| {
            let before = (bed.names(), diskfuse_e2e::mounts::below(bed.root()).len());
            let tool = bed.tool(["mount", "--dir"]).args(bed.ground.words());
            tool.arg(&image).arg(on).output().refused(code, words);
            let after = (bed.names(), diskfuse_e2e::mounts::below(bed.root()).len());
            assert_eq!(after, before);
        };
        let file = bed.mountpoint("file");
        refused(&file, 1, &["/file' is not a directory"]);
        std::fs::create_dir(bed.path("full")).unwrap();
        std::fs::write(bed.path("full/x"), "").unwrap();
        refused(&bed.path("full"), 1, &["/full' is not empty"]);
        refused(&bed.path("no/d"), 1, &["its folder does not exist"]);
        let daemon = bed.mount(&image, &["--dir"]);
        refused(&bed.path("m"), 1, &["There already is a FUSE export on"]);
        daemon.stop();
        std::fs::create_dir(bed.path("there")).unwrap();
        let other = diskfuse_e2e::SmallFs::new(bed, "small", 8 << 20);
        refused(other.folder(), 1, &["Something is mounted on"]);
    });
}

#[test]
fn somebody_elses_directory_is_not_mounted_on() {
    once(|bed| {
        let image = disk(bed);
        Tool::new("chmod").arg("a+r").arg(&image).run();
        std::fs::create_dir(bed.path("theirs")).unwrap();
        let program = bed.path("diskfuse");
        // Not copied here: what other tests start at this moment would inherit a descriptor that is open for writing, and the
        // kernel runs nothing that somebody can write to.
        Tool::new("cp")
            .args([diskfuse_e2e::diskfuse(), &program])
            .run();
        let tool = Tool::new("setpriv").args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
        let tool = tool.arg(&program).args(["mount", "--dir"]);
        let output = tool.arg(&image).arg(bed.path("theirs")).output();
        output.refused(1, &["/theirs' belongs to another user"]);
        bed.nothing_mounted();
    });
}

#[test]
fn an_empty_directory_of_ours_is_used_and_stays() {
    once(|bed| {
        let image = disk(bed);
        std::fs::create_dir(bed.path("m")).unwrap();
        let daemon = bed.mount(&image, &["--dir"]);
        let output = bed.diskfuse([Path::new("umount"), &bed.path("m")]);
        assert!(output.status.success(), "{output}");
        assert!(daemon.ends().status().success());
        assert!(names(&bed.path("m")).is_empty());
        // A killed daemon leaves a mount that the next command takes away.
        let daemon = bed.mount(&image, &["--dir"]);
        daemon.end_by(rustix::process::Signal::KILL);
        diskfuse_e2e::await_let_go(&image);
        let again = bed.tool(["mount", "--dir"]).arg(&image);
        again.arg(bed.path("m")).run();
        assert!(names(&bed.path("m")).contains(&"p3".to_owned()));
        bed.tool(["umount"]).arg(bed.path("m")).run();
    });
}
