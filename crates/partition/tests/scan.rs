//! Disks that real tools made, damaged ones, and random damage.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};

use diskfuse_block::drivers::{FileConfig, open_file};
use diskfuse_partition::{Contents, Kind, MOST_PARTITIONS, scan};
use diskfuse_ring::{Config, Ring};
use proptest::prelude::*;

const MIB: u64 = 1 << 20;

struct Disk(tempfile::NamedTempFile);

impl Disk {
    fn new(size: u64) -> Self {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(size).unwrap();
        Self(file)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn file(&self) -> &File {
        self.0.as_file()
    }

    /// `sfdisk` with this script; further arguments before the disk.
    fn sfdisk(size: u64, arguments: &[&str], script: &str) -> Self {
        let disk = Self::new(size);
        sfdisk(disk.path(), arguments, script);
        disk
    }

    fn run(&self, tool: &str, arguments: &[&str]) {
        let done = Command::new(tool)
            .args(arguments)
            .arg(self.path())
            .output()
            .unwrap_or_else(|error| panic!("{tool}: {error}"));
        assert!(done.status.success(), "{tool}: {done:?}");
    }

    fn scan(&self) -> Contents {
        let config = FileConfig {
            filename: self.path().to_owned(),
            read_only: true,
            ..FileConfig::default()
        };
        let node = open_file(&config).unwrap();
        let ring = Ring::new(&Config::default()).unwrap();
        ring.block_on(scan(&*node)).unwrap()
    }

    /// Number, offset and size of each partition.
    fn partitions(&self) -> Vec<(u32, u64, u64)> {
        let table = self.scan().table.unwrap();
        let partitions = table.partitions.iter();
        partitions.map(|p| (p.number, p.offset, p.size)).collect()
    }
}

fn sfdisk(path: &Path, arguments: &[&str], script: &str) {
    let mut child = Command::new("sfdisk")
        .args(["--quiet", "--no-reread", "--no-tell-kernel"])
        .args(arguments)
        .arg(path)
        .stdin(Stdio::piped())
        .spawn()
        .expect("sfdisk (apt-get install fdisk)");
    let mut input = child.stdin.take().unwrap();
    std::io::Write::write_all(&mut input, script.as_bytes()).unwrap();
    drop(input);
    assert!(child.wait().unwrap().success());
}

/// A loop device with sectors of 4096 bytes, which is gone when this is dropped.
struct Loop(String);

impl Loop {
    fn new(disk: &Disk) -> Self {
        let done = Command::new("losetup")
            .args(["--sector-size", "4096", "--show", "--find"])
            .arg(disk.path())
            .output()
            .expect("losetup (apt-get install mount), as root");
        assert!(done.status.success(), "{done:?}");
        Self(String::from_utf8(done.stdout).unwrap().trim().to_owned())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

const GPT: &str = "label: gpt\n\
                   size=16MiB, name=\"first\", uuid=11111111-2222-3333-4444-555555555555\n\
                   size=8MiB, name=\"a/../b\"\n\
                   name=\"..\"\n";

const TWO: [(u32, u64, u64); 2] = [(1, MIB, 16 * MIB), (2, 17 * MIB, 8 * MIB)];

#[test]
fn a_gpt_is_read_with_names_and_uuids() {
    let disk = Disk::sfdisk(64 * MIB, &[], GPT);
    let contents = disk.scan();
    assert_eq!(contents.problems, [""; 0]);
    let table = contents.table.unwrap();
    assert_eq!((table.kind, table.sector_size), (Kind::Gpt, 512));
    assert_eq!(disk.partitions()[..2], TWO);
    let first = &table.partitions[0];
    assert_eq!(first.name.as_deref(), Some("first"));
    let uuid = "11111111-2222-3333-4444-555555555555";
    assert_eq!(first.uuid.as_deref(), Some(uuid));
    assert_eq!(table.partitions[1].name.as_deref(), Some("a/../b"));
}

#[test]
fn a_gpt_with_sectors_of_4096_bytes_is_read() {
    let disk = Disk::new(64 * MIB);
    let device = Loop::new(&disk);
    sfdisk(Path::new(&device.0), &[], GPT);
    drop(device);
    let table = disk.scan().table.unwrap();
    assert_eq!((table.kind, table.sector_size), (Kind::Gpt, 4096));
    assert_eq!(disk.partitions()[..2], TWO);
}

#[test]
fn the_backup_serves_when_the_first_header_or_its_table_is_damaged() {
    for at in [512 + 16, 1024 + 40] {
        let disk = Disk::sfdisk(64 * MIB, &[], GPT);
        disk.file().write_all_at(b"damage", at).unwrap();
        assert_eq!(disk.partitions()[..2], TWO, "{at}");
        let problems = disk.scan().problems;
        assert!(
            problems.iter().any(|p| p.contains("the backup at the end")),
            "{problems:?}"
        );
    }
}

#[test]
fn without_a_header_or_without_the_mbr_it_is_said() {
    let disk = Disk::sfdisk(64 * MIB, &[], GPT);
    disk.file().write_all_at(&[0; 512], 0).unwrap();
    assert_eq!(disk.partitions()[..2], TWO);
    assert!(disk.scan().problems[0].contains("protective MBR is missing"));

    let disk = Disk::sfdisk(64 * MIB, &[], GPT);
    disk.file().write_all_at(&[0; 512], 512).unwrap();
    disk.file().write_all_at(&[0; 512], 64 * MIB - 512).unwrap();
    let contents = disk.scan();
    assert_eq!(contents.table, None);
    assert!(
        contents
            .problems
            .last()
            .unwrap()
            .contains("none can be used")
    );
}

#[test]
fn what_reaches_past_the_end_is_not_shown() {
    let disk = Disk::sfdisk(64 * MIB, &[], GPT);
    disk.file().set_len(20 * MIB).unwrap();
    assert_eq!(disk.partitions(), TWO[..1]);
    let problems = disk.scan().problems;
    assert!(
        problems[0].contains("p2 reaches past the end"),
        "{problems:?}"
    );
}

#[test]
fn sizes_in_a_header_are_not_believed() {
    // Without the backup there is nothing but the header with absurd sizes, whose checksum is right for what it says only
    // by accident; it is refused before anybody asks for memory.
    let disk = Disk::sfdisk(64 * MIB, &[], GPT);
    disk.file()
        .write_all_at(&u32::MAX.to_le_bytes(), 512 + 80)
        .unwrap();
    disk.file().write_all_at(&[0; 512], 64 * MIB - 512).unwrap();
    let contents = disk.scan();
    assert_eq!(contents.table, None);
    assert!(
        contents.problems[0].contains("not believed"),
        "{contents:?}"
    );
}

#[test]
fn an_mbr_is_read_with_logical_partitions() {
    let script = "label: dos\nlabel-id: 0x12345678\n\
                  size=8MiB, type=83\nsize=40MiB, type=5\n\
                  5: size=4MiB, type=83\n6: size=4MiB, type=83\n7: size=4MiB, type=82\n";
    let disk = Disk::sfdisk(64 * MIB, &[], script);
    let table = disk.scan().table.unwrap();
    assert_eq!(table.kind, Kind::Mbr);
    let numbers: Vec<u32> = table.partitions.iter().map(|p| p.number).collect();
    assert_eq!(numbers, [1, 5, 6, 7]);
    assert!(table.partitions[1..].iter().all(|p| p.size == 4 * MIB));
    assert_eq!(table.partitions[3].uuid.as_deref(), Some("12345678-07"));
    assert_eq!(table.partitions[3].kind, "82");
    assert_eq!(table.areas.len(), 3);
}

/// Sector 0 with one extended partition, and a boot record that names itself as the next one.
#[test]
fn a_chain_that_is_a_loop_or_leads_elsewhere_ends() {
    for (next, said) in [(0_u32, "a loop"), (u32::MAX, "leaves the extended one")] {
        let disk = Disk::new(8 * MIB);
        let mut boot = [0_u8; 512];
        boot[510..].copy_from_slice(&[0x55, 0xaa]);
        let mut record = boot;
        boot[450] = 5;
        boot[454..458].copy_from_slice(&2048_u32.to_le_bytes());
        boot[458..462].copy_from_slice(&4096_u32.to_le_bytes());
        record[450] = 0x83;
        record[454..458].copy_from_slice(&1_u32.to_le_bytes());
        record[458..462].copy_from_slice(&8_u32.to_le_bytes());
        record[466] = 5;
        record[470..474].copy_from_slice(&next.to_le_bytes());
        record[474..478].copy_from_slice(&1_u32.to_le_bytes());
        disk.file().write_all_at(&boot, 0).unwrap();
        disk.file().write_all_at(&record, 2048 * 512).unwrap();
        let contents = disk.scan();
        assert_eq!(disk.partitions(), [(5, 2049 * 512, 4096)]);
        assert!(contents.problems[0].contains(said), "{contents:?}");
    }
}

#[test]
fn overlapping_partitions_are_shown_and_said() {
    let disk = Disk::new(8 * MIB);
    let mut boot = [0_u8; 512];
    boot[510..].copy_from_slice(&[0x55, 0xaa]);
    for (slot, first) in [(446, 8_u32), (462, 16)] {
        boot[slot + 4] = 0x83;
        boot[slot + 8..slot + 12].copy_from_slice(&first.to_le_bytes());
        boot[slot + 12..slot + 16].copy_from_slice(&64_u32.to_le_bytes());
    }
    disk.file().write_all_at(&boot, 0).unwrap();
    assert_eq!(disk.partitions().len(), 2);
    assert_eq!(disk.scan().problems, ["p1 and p2 overlap"]);
}

#[test]
fn hundreds_of_partitions_are_read_and_thousands_bounded() {
    for (count, shown) in [(300, 300), (1100, MOST_PARTITIONS)] {
        let mut script = format!("label: gpt\ntable-length: {}\n", count.max(128));
        for _ in 0..count {
            script += "size=1MiB\n";
        }
        let disk = Disk::sfdisk(2048 * MIB, &["--wipe=never"], &script);
        let contents = disk.scan();
        assert_eq!(contents.table.unwrap().partitions.len(), shown);
        let said = contents.problems.iter().any(|p| p.contains("not shown"));
        assert_eq!(said, count > shown, "{:?}", contents.problems);
    }
}

#[test]
fn file_systems_say_who_they_are() {
    let uuid = "0b5c5d41-5b1b-4b4e-9d43-9ad3f0b1f9aa";
    // The tool, its arguments, and what is found: kind, label, UUID.
    type Case<'c> = (
        &'c str,
        &'c [&'c str],
        &'c str,
        Option<&'c str>,
        Option<&'c str>,
    );
    let cases: [Case<'_>; 6] = [
        (
            "mkfs.ext4",
            &["-q", "-L", "my root", "-U", uuid],
            "ext4",
            Some("my root"),
            Some(uuid),
        ),
        ("mkfs.ext2", &["-q", "-U", uuid], "ext2", None, Some(uuid)),
        (
            "mkfs.xfs",
            &["-q", "-f", "-L", "data", "-m", &format!("uuid={uuid}")],
            "xfs",
            Some("data"),
            Some(uuid),
        ),
        (
            "mkfs.vfat",
            &["-F", "32", "-n", "EFI", "-i", "DEADBEEF"],
            "vfat",
            Some("EFI"),
            Some("DEAD-BEEF"),
        ),
        (
            "mkfs.vfat",
            &["-F", "16", "-i", "0000BEEF"],
            "vfat",
            None,
            Some("0000-BEEF"),
        ),
        (
            "mkswap",
            &["-L", "sw", "-U", uuid],
            "swap",
            Some("sw"),
            Some(uuid),
        ),
    ];
    for (tool, arguments, kind, label, id) in cases {
        let disk = Disk::new(if kind == "xfs" { 320 * MIB } else { 64 * MIB });
        disk.run(tool, arguments);
        let contents = disk.scan();
        assert_eq!(
            (contents.table, contents.problems.len()),
            (None, 0),
            "{tool}"
        );
        let found = contents.filesystem.unwrap();
        assert_eq!(found.kind, kind);
        let text = found.label.map(|label| String::from_utf8(label).unwrap());
        assert_eq!(
            (text.as_deref(), found.uuid.as_deref()),
            (label, id),
            "{tool}"
        );
    }
}

#[test]
fn disks_with_nothing_on_them_have_nothing() {
    for size in [0, 512, 1024, 4096, 5 * 512, MIB] {
        assert_eq!(Disk::new(size).scan(), Contents::default(), "{size}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn random_damage_is_borne(
        damage in proptest::collection::vec((0_u64..40_960, any::<u64>()), 1..40),
        is_gpt in any::<bool>(),
    ) {
        let script = match is_gpt {
            true => GPT,
            false => "label: dos\nsize=1MiB\nsize=30MiB, type=5\n5: size=4MiB\n6: size=4MiB\n",
        };
        let disk = Disk::sfdisk(64 * MIB, &[], script);
        for (at, bytes) in damage {
            let at = if at % 2 == 0 { at } else { 64 * MIB - at - 8 };
            disk.file().write_all_at(&bytes.to_le_bytes(), at).unwrap();
        }
        let contents = disk.scan();
        for partition in contents.table.iter().flat_map(|table| &table.partitions) {
            prop_assert!(partition.offset + partition.size <= 64 * MIB);
        }
    }
}
