//! What cannot be done is refused with a reason: exit code not 0, nothing mounted, no file left behind, nothing lost.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::os::unix::fs::PermissionsExt;

use diskfuse_e2e::{Bed, Output, SmallFs, Tool, diskfuse, everywhere};

const SIZE: usize = 1 << 20;

/// `mount` in the background with these arguments; `{}` stands for the test's folder.
fn mount(bed: &Bed, arguments: &[&str]) -> Output {
    let root = bed.root().to_str().unwrap();
    let tool = bed.tool(["mount"]).args(bed.ground.words());
    tool.args(
        arguments
            .iter()
            .map(|argument| argument.replace("{}", root)),
    )
    .output()
}

/// That `mount` refuses these arguments with exit code `code` and with each of `words`, and leaves no trace.
#[track_caller]
fn refused(bed: &Bed, arguments: &[&str], code: i32, words: &[&str]) {
    let (names, mounted) = (bed.names(), diskfuse_e2e::mounts::below(bed.root()).len());
    let output = mount(bed, arguments);
    let root = bed.root().to_str().unwrap();
    let words: Vec<String> = words.iter().map(|word| word.replace("{}", root)).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    output.refused(code, &words);
    assert_eq!(output.stdout, "", "errors go to standard error");
    assert_eq!(bed.names(), names, "no file is left behind");
    assert_eq!(
        diskfuse_e2e::mounts::below(bed.root()).len(),
        mounted,
        "nothing is left mounted"
    );
}

#[test]
fn an_image_that_is_missing_a_folder_or_a_fifo_is_refused() {
    everywhere(|bed| {
        std::fs::create_dir(bed.path("folder")).unwrap();
        Tool::new("mkfifo").arg(bed.path("fifo")).run();
        refused(
            bed,
            &["{}/no", "{}/m"],
            1,
            &["diskfuse: Could not open '{}/no': No such file or directory"],
        );
        refused(
            bed,
            &["{}/folder", "{}/m"],
            1,
            &["Could not open '{}/folder': Is a directory"],
        );
        refused(
            bed,
            &["{}/fifo", "{}/m"],
            1,
            &["'{}/fifo' to be a regular file", "it is a fifo"],
        );
        refused(
            bed,
            &["-w", "{}/fifo", "{}/m"],
            1,
            &["'{}/fifo' to be a regular file", "it is a fifo"],
        );
        refused(
            bed,
            &["/dev/null", "{}/m"],
            1,
            &[
                "'/dev/null' to be a regular file",
                "it is a character device",
            ],
        );
    });
}

/// The program where everybody may start it.
fn as_nobody(bed: &Bed, arguments: &[&str]) -> Output {
    let program = bed.path("program");
    // By another process: a descriptor of ours that is open for writing would live on in what other tests start, and
    // nobody can start a file that is.
    Tool::new("cp").arg(diskfuse()).arg(&program).run();
    let root = bed.root().to_str().unwrap();
    let ids = [
        "--reuid",
        "65534",
        "--regid",
        "65534",
        "--clear-groups",
        "--",
    ];
    let tool = Tool::new("setpriv").args(ids).arg(&program);
    tool.args(
        arguments
            .iter()
            .map(|argument| argument.replace("{}", root)),
    )
    .output()
}

#[test]
fn an_image_that_may_not_be_read_or_written_is_refused() {
    everywhere(|bed| {
        let image = bed.image("i", SIZE);
        std::fs::set_permissions(&image, std::fs::Permissions::from_mode(0o600)).unwrap();
        let path = image.display();
        let output = as_nobody(bed, &["mount", "{}/i", "{}/m"]);
        output.refused(1, &[&format!("Could not open '{path}': Permission denied")]);
        std::fs::set_permissions(&image, std::fs::Permissions::from_mode(0o644)).unwrap();
        let output = as_nobody(bed, &["mount", "-w", "{}/i", "{}/m"]);
        output.refused(1, &[&format!("Could not open '{path}': Permission denied")]);
        bed.nothing_mounted();
        assert_eq!(bed.names(), ["i", "program"]);
    });
}

#[test]
fn a_writable_export_of_what_cannot_be_written_is_refused() {
    everywhere(|bed| {
        let small = SmallFs::new(bed, "small", 8 << 20);
        std::fs::write(small.folder().join("i"), [1; 4096]).unwrap();
        small.make_read_only();
        refused(
            bed,
            &["-w", "{}/small/i", "{}/m"],
            1,
            &["Could not open '{}/small/i'", "Read-only file system"],
        );
        bed.mount(&small.folder().join("i"), &[]).stop();
    });
}

#[test]
fn a_mountpoint_that_cannot_be_one_is_refused() {
    everywhere(|bed| {
        let image = bed.image("i", SIZE);
        std::fs::create_dir(bed.path("folder")).unwrap();
        refused(
            bed,
            &["{}/i", "{}/folder"],
            1,
            &["'{}/folder' is not a regular file", "folder"],
        );
        refused(
            bed,
            &["{}/i", "{}/no/m"],
            1,
            &["{}/no/m", "folder does not exist"],
        );
        refused(bed, &["{}/i", "{}/i/m"], 1, &["{}/i/m", "Not a directory"]);
        refused(
            bed,
            &["{}/i", "/dev/null"],
            1,
            &["'/dev/null' is not a regular file"],
        );
        std::os::unix::fs::symlink("nowhere", bed.path("link")).unwrap();
        refused(
            bed,
            &["{}/i", "{}/link"],
            1,
            &["Failed to stat '{}/link': No such file or directory"],
        );

        let small = SmallFs::new(bed, "small", 8 << 20);
        small.make_read_only();
        refused(
            bed,
            &["{}/i", "{}/small/m"],
            1,
            &["{}/small/m", "Read-only file system"],
        );
        drop(small);

        let daemon = bed.mount(&image, &[]);
        refused(
            bed,
            &["{}/i", "{}/m"],
            1,
            &["There already is a FUSE export on '{}/m'"],
        );
        assert_eq!(
            std::fs::read(daemon.file()).unwrap().len(),
            SIZE,
            "the first one goes on"
        );
        daemon.stop();
    });
}

#[test]
fn a_file_of_somebody_beside_the_image_is_not_hidden_without_being_asked_to() {
    everywhere(|bed| {
        bed.image("i", SIZE);
        std::fs::write(bed.path("i.raw"), "mine").unwrap();
        refused(bed, &["{}/i"], 1, &["'{}/i.raw' exists and is not empty"]);
        assert_eq!(std::fs::read(bed.path("i.raw")).unwrap(), b"mine");
    });
}

#[test]
fn options_that_make_no_sense_are_refused_with_the_nearest_that_do() {
    everywhere(|bed| {
        bed.image("i", SIZE);
        refused(
            bed,
            &["--threads", "0", "{}/i", "{}/m"],
            2,
            &["'0'", "--threads", "1..=64"],
        );
        refused(
            bed,
            &["--threads", "10000", "{}/i", "{}/m"],
            2,
            &["'10000'", "--threads"],
        );
        refused(
            bed,
            &["--treads", "2", "{}/i", "{}/m"],
            2,
            &["--treads", "'--threads'"],
        );
        refused(
            bed,
            &["--cache", "dircet", "{}/i", "{}/m"],
            2,
            &["dircet", "direct"],
        );
        refused(
            bed,
            &["--format", "vmdk", "{}/i", "{}/m"],
            2,
            &["vmdk", "not built"],
        );
        refused(
            bed,
            &["--size", "12x", "{}/i", "{}/m"],
            2,
            &["12x", "not a unit"],
        );
        refused(bed, &["--growable", "{}/i", "{}/m"], 2, &["--writable"]);
        refused(
            bed,
            &["--log", "loud", "{}/i", "{}/m"],
            1,
            &["log level 'loud'", "debug"],
        );
        refused(bed, &[], 2, &["IMAGE"]);
        bed.tool(["muont"])
            .output()
            .refused(2, &["muont", "'mount'"]);
    });
}

#[test]
fn a_part_that_is_not_in_the_image_is_refused() {
    everywhere(|bed| {
        bed.image("i", SIZE);
        let past = ["--offset", "2M", "{}/i", "{}/m"];
        refused(
            bed,
            &past,
            1,
            &["Offset (2097152)", "containing file (1048576)"],
        );
        let over = ["--offset", "512k", "--size", "1M", "{}/i", "{}/m"];
        refused(bed, &over, 1, &["size (1048576)", "containing file"]);
        refused(
            bed,
            &["--size", "1000", "{}/i", "{}/m"],
            1,
            &["size is not multiple of 512 (it is 1000)"],
        );
    });
}

#[test]
fn an_image_of_another_format_is_not_shown_as_raw_by_accident() {
    everywhere(|bed| {
        let image = bed.path("i");
        Tool::new("qemu-img")
            .args(["create", "-q", "-f", "vmdk"])
            .arg(&image)
            .arg("1M")
            .run();
        refused(
            bed,
            &["{}/i", "{}/m"],
            1,
            &["looks like a VMDK image", "--format raw"],
        );
        bed.mount(&image, &["--format", "raw"]).stop();
    });
}

#[test]
fn when_there_are_no_descriptors_left_the_daemon_says_so_and_undoes_everything() {
    everywhere(|bed| {
        bed.image("i", SIZE);
        let limited = |limit: u32| {
            let root = bed.root().to_str().unwrap();
            let tool = Tool::new("prlimit").arg(format!("--nofile={limit}:{limit}"));
            let tool = tool.arg(diskfuse()).arg("mount").args(bed.ground.words());
            tool.args([
                "--threads",
                "32",
                &format!("{root}/i"),
                &format!("{root}/m"),
            ])
            .output()
        };
        // From too few for anything to too few for the last queues.
        for limit in [6, 8, 10, 12, 16, 24, 32, 48] {
            let output = limited(limit);
            output.refused(1, &["Too many open files"]);
            bed.nothing_mounted();
            assert_eq!(bed.names(), ["i"], "with {limit} descriptors");
            let says_what_to_do = output.stderr.contains("ulimit -n");
            assert!(says_what_to_do, "with {limit} descriptors: {output}");
        }
    });
}

#[test]
fn what_has_failed_can_be_done_right_afterwards() {
    everywhere(|bed| {
        let image = bed.image("i", SIZE);
        refused(
            bed,
            &["-w", "{}/i", "{}/no/m"],
            1,
            &["folder does not exist"],
        );
        bed.mount(&image, &["-w"]).stop();
    });
}
