//! The exported file as stat(2), chmod(2), chown(2), statfs(2) and other users see it.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs::{File, Permissions};
use std::io::Error;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::{Duration, SystemTime};

use diskfuse_e2e::{Bed, Daemon, Output, Tool, everywhere, mounts, wait_until};
use rustix::fs::{XattrFlags, chmod, chown, setxattr, statvfs};
use rustix::io::Errno;

const SIZE: u64 = 1 << 20;
/// `nobody`: a user who has no rights here.
const NOBODY: u32 = 65_534;

fn set_mode(path: &Path, mode: u32) -> Result<(), Errno> {
    chmod(path, mode.into())
}

fn give_away(path: &Path) -> Result<(), Errno> {
    let to = rustix::fs::Uid::from_raw(NOBODY);
    chown(path, Some(to), None)
}

fn export(bed: &Bed, allow_other: &str) -> Daemon {
    let image = bed.image("i", SIZE as usize);
    let mountpoint = bed.mountpoint("m");
    let node = format!("file,node-name=disk,filename={}", image.display());
    let export = format!(
        "fuse,id=e,node-name=disk,mountpoint={},writable=on{allow_other}",
        mountpoint.display()
    );
    bed.qsd(&["--blockdev", &node, "--export", &export], &[&mountpoint])
}

fn as_nobody(command: &[&str], file: &Path) -> Output {
    let nobody = NOBODY.to_string();
    Tool::new("setpriv")
        .args([
            "--reuid",
            &nobody,
            "--regid",
            &nobody,
            "--clear-groups",
            "--",
        ])
        .args(command)
        .arg(file)
        .output()
}

#[test]
fn stat_shows_a_file_of_the_daemons_user_that_nobody_else_may_open() {
    everywhere(|bed| {
        let image = bed.image("i", SIZE as usize);
        for (options, mode) in [(&[][..], 0o100_400), (&["-w"], 0o100_600)] {
            let daemon = bed.mount(&image, options);
            let stat = daemon.file().metadata().unwrap();
            assert_eq!(stat.mode(), mode);
            assert_eq!(stat.uid(), rustix::process::getuid().as_raw());
            assert_eq!(stat.gid(), rustix::process::getgid().as_raw());
            assert_eq!(stat.nlink(), 1);
            assert_eq!(stat.len(), SIZE);
            daemon.stop();
        }
    });
}

#[test]
fn the_size_is_rounded_up_to_whole_sectors() {
    everywhere(|bed| {
        for (bytes, shown) in [
            (0, 0),
            (1, 512),
            (512, 512),
            (513, 1024),
            (100_000, 100_352),
        ] {
            let daemon = bed.mount(&bed.image("i", bytes), &[]);
            assert_eq!(daemon.file().metadata().unwrap().len(), shown, "{bytes}");
            daemon.stop();
        }
    });
}

#[test]
fn blocks_are_what_the_image_takes_on_the_host() {
    everywhere(|bed| {
        let image = bed.patchy("i", 64 << 20, &[(1 << 20, 1 << 20), (40 << 20, 65_536)]);
        let daemon = bed.mount(&image, &["-w"]);
        assert_eq!(
            daemon.file().metadata().unwrap().blocks(),
            image.metadata().unwrap().blocks()
        );
        let file = daemon.open();
        file.write_all_at(&vec![1; 1 << 20], 10 << 20).unwrap();
        file.sync_all().unwrap();
        // The kernel may show what it knows for a second.
        let (there, host) = (daemon.file(), &image);
        let same = || there.metadata().unwrap().blocks() == host.metadata().unwrap().blocks();
        wait_until(
            "the export shows the new blocks",
            Duration::from_secs(5),
            same,
        );
        assert!(image.metadata().unwrap().blocks() * 512 >= 2 << 20);
    });
}

#[test]
fn mounts_have_the_promised_options() {
    everywhere(|bed| {
        let image = bed.image("i", SIZE as usize);
        let cases = [
            (&[][..], "ro", false),
            (&["-w"], "rw", false),
            (&["-w", "--allow-other"], "rw", true),
        ];
        for (options, access, others) in cases {
            let daemon = bed.mount(&image, options);
            let mount = mounts::at(daemon.file()).unwrap();
            let has = |option| mount.options.split(',').any(|there| there == option);
            for option in [access, "nosuid", "nodev", "noatime", "default_permissions"] {
                assert!(has(option), "no {option} in {mount:?}");
            }
            assert_eq!(has("allow_other"), others, "{mount:?}");
            daemon.stop();
        }
    });
}

#[test]
fn a_read_only_export_refuses_every_change_with_erofs() {
    everywhere(|bed| {
        let image = bed.image("i", SIZE as usize);
        let before = std::fs::read(&image).unwrap();
        let daemon = bed.mount(&image, &[]);
        let path = daemon.file();
        let errno = |error: Error| Errno::from_io_error(&error).unwrap();
        let open = File::options().write(true).open(path);
        assert_eq!(errno(open.unwrap_err()), Errno::ROFS);
        assert_eq!(set_mode(path, 0o600), Err(Errno::ROFS));
        assert_eq!(give_away(path), Err(Errno::ROFS));
        let truncated = Tool::new("truncate").args(["-s", "0"]).arg(path).output();
        truncated.refused(1, &["Read-only file system"]);
        daemon.stop();
        assert!(std::fs::read(&image).unwrap() == before);
    });
}

#[test]
fn without_allow_other_no_bit_for_others_can_be_set_and_no_owner_changed() {
    everywhere(|bed| {
        let daemon = export(bed, ",allow-other=off");
        let path = daemon.file();
        for mode in [0o604, 0o640, 0o777, 0o610] {
            assert_eq!(set_mode(path, mode), Err(Errno::PERM), "{mode:o}");
        }
        assert_eq!(path.metadata().unwrap().mode(), 0o100_600);
        for mode in [0o400, 0o700, 0o600] {
            set_mode(path, mode).unwrap();
            assert_eq!(path.metadata().unwrap().mode(), 0o100_000 | mode);
        }
        assert_eq!(give_away(path), Err(Errno::OPNOTSUPP));
        daemon.stop();
    });
}

#[test]
fn with_allow_other_mode_and_owner_can_be_changed() {
    everywhere(|bed| {
        let daemon = export(bed, ",allow-other=on");
        let path = daemon.file();
        std::fs::set_permissions(path, Permissions::from_mode(0o644)).unwrap();
        assert_eq!(path.metadata().unwrap().mode(), 0o100_644);
        give_away(path).unwrap();
        let stat = path.metadata().unwrap();
        assert_eq!(
            (stat.uid(), stat.gid()),
            (NOBODY, rustix::process::getgid().as_raw())
        );
        daemon.stop();
    });
}

#[test]
fn without_allow_other_others_can_neither_stat_nor_open_the_file() {
    everywhere(|bed| {
        let daemon = export(bed, ",allow-other=off");
        as_nobody(&["stat"], daemon.file()).refused(1, &["Permission denied"]);
        as_nobody(&["cat"], daemon.file()).refused(1, &["Permission denied"]);
        daemon.stop();
    });
}

#[test]
fn with_allow_other_the_files_mode_decides_who_reads() {
    everywhere(|bed| {
        for allow_other in [",allow-other=on", ",allow-other=auto", ""] {
            let daemon = export(bed, allow_other);
            let path = daemon.file();
            assert_eq!(as_nobody(&["stat"], path).code(), 0, "{allow_other}");
            as_nobody(&["cat"], path).refused(1, &["Permission denied"]);
            set_mode(path, 0o444).unwrap();
            assert_eq!(
                as_nobody(
                    &["cmp", "-n", "1048576", bed.path("i").to_str().unwrap()],
                    path
                )
                .code(),
                0
            );
            daemon.stop();
        }
    });
}

#[test]
fn extended_attributes_are_not_supported_and_times_can_be_set() {
    everywhere(|bed| {
        let daemon = bed.mount(&bed.image("i", SIZE as usize), &["-w"]);
        let set = setxattr(daemon.file(), "user.x", b"1", XattrFlags::empty());
        assert_eq!(set, Err(Errno::OPNOTSUPP));
        let then = SystemTime::UNIX_EPOCH + Duration::new(1_000_000_000, 123_456_789);
        daemon.open().set_modified(then).unwrap();
        assert_eq!(daemon.file().metadata().unwrap().modified().unwrap(), then);
    });
}

#[test]
fn writing_moves_the_time_of_the_last_change() {
    everywhere(|bed| {
        let daemon = bed.mount(&bed.image("i", SIZE as usize), &["-w"]);
        let file = daemon.open();
        let then = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
        file.set_modified(then).unwrap();
        file.write_all_at(&[1; 512], 0).unwrap();
        let newer = || daemon.file().metadata().unwrap().modified().unwrap() > then;
        wait_until("the time has moved", Duration::from_secs(5), newer);
    });
}

#[test]
fn statfs_shows_the_size_of_the_disk() {
    everywhere(|bed| {
        let daemon = bed.mount(&bed.patchy("i", 8 << 20, &[(0, 1 << 20)]), &["-w"]);
        let stat = statvfs(daemon.file()).unwrap();
        assert_eq!(stat.f_blocks * stat.f_frsize, 8 << 20);
        assert!(stat.f_bfree * stat.f_frsize <= 7 << 20);
        assert!(stat.f_bavail <= stat.f_bfree);
    });
}
