//! What `diskfuse mount`, `umount` and `list` answer to bad input: a clear message, the right exit code, and nothing
//! left behind. Nothing here gets as far as mounting.

mod common;

use common::{Place, Ran};
use rustix::fs::{CWD, FileType, Mode};

/// It failed with `code`, said something that contains `message` on stderr only, and left no trace.
fn assert_refused(place: &Place, ran: &Ran, code: i32, message: &str) {
    assert_eq!(ran.code, Some(code), "{ran:?}");
    assert!(ran.err.contains(message), "{ran:?}");
    assert_eq!(ran.out, "", "{ran:?}");
    place.assert_nothing_mounted();
}

#[test]
fn the_version_is_one_line() {
    let ran = Place::new().diskfuse(&["--version"]);
    assert_eq!(ran.code, Some(0));
    assert_eq!(ran.out, format!("diskfuse {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn every_help_has_text_and_succeeds() {
    let place = Place::new();
    for command in [
        &["--help"][..],
        &["mount", "--help"],
        &["umount", "--help"],
        &["list", "--help"],
        &["qsd", "--help"],
    ] {
        let ran = place.diskfuse(command);
        assert_eq!((ran.code, ran.err.as_str()), (Some(0), ""), "{command:?}");
        assert!(ran.out.contains("Usage: "), "{command:?}: {}", ran.out);
    }
}

#[test]
fn a_wrong_command_line_exits_with_2() {
    let place = Place::new();
    place.file("i", 4096);
    let cases: [(&[&str], &str); 10] = [
        (&["mout", "i"], "'mount'"),
        (&["mount"], "<IMAGE>"),
        (&["mount", "--writeable", "i"], "--writable"),
        (&["mount", "--threads", "0", "i"], "1..=64"),
        (&["mount", "--threads", "10000", "i"], "1..=64"),
        (&["mount", "--growable", "i"], "--writable"),
        (
            &["mount", "--format", "vmdk", "i"],
            "not built into this version",
        ),
        (&["mount", "--size", "1.5G", "i"], "whole number of bytes"),
        (&["mount", "--cache", "writeback", "i"], "direct, page"),
        (&["mount", "--max-background", "0", "i"], "1.."),
    ];
    for (arguments, message) in cases {
        assert_refused(&place, &place.diskfuse(arguments), 2, message);
    }
    assert_eq!(place.names(), ["i"]);
}

#[test]
fn an_image_that_cannot_be_had_is_named_with_the_reason() {
    let place = Place::new();
    std::fs::create_dir(place.path("folder")).unwrap();
    let mode = Mode::RUSR | Mode::WUSR;
    rustix::fs::mknodat(CWD, place.path("fifo"), FileType::Fifo, mode, 0).unwrap();
    place.file("short", 4096);
    let cases: [(&[&str], &str); 4] = [
        (
            &["mount", "missing"],
            "Could not open 'missing': No such file or directory",
        ),
        (&["mount", "folder"], "Is a directory"),
        (&["mount", "fifo"], "fifo"),
        (
            &["mount", "--offset", "1M", "short"],
            "cannot be greater than size of the containing file",
        ),
    ];
    for (arguments, message) in cases {
        assert_refused(&place, &place.diskfuse(arguments), 1, message);
        let mut foreground = arguments.to_vec();
        foreground.push("--foreground");
        assert_refused(&place, &place.diskfuse(&foreground), 1, message);
    }
    assert_eq!(place.names(), ["fifo", "folder", "short"]);
}

#[test]
fn an_image_of_another_format_is_not_taken_for_raw() {
    let place = Place::new();
    std::fs::write(place.path("i.vmdk"), b"KDMV\x01\0\0\0and so on").unwrap();
    assert_refused(
        &place,
        &place.diskfuse(&["mount", "i.vmdk"]),
        1,
        "looks like a VMDK image",
    );
    // What says that it is qcow2 and is not is refused as such.
    std::fs::write(place.path("i.qcow2"), b"QFI\xfb\0\0\0\x03and so on").unwrap();
    assert_refused(&place, &place.diskfuse(&["mount", "i.qcow2"]), 1, "i.qcow2");
    assert_eq!(place.names(), ["i.qcow2", "i.vmdk"]);
}

#[test]
fn a_mountpoint_that_cannot_be_is_refused() {
    let place = Place::new();
    place.file("i", 4096);
    place.file("i.raw", 512);
    std::fs::create_dir(place.path("folder")).unwrap();
    let cases: [(&[&str], &str); 3] = [
        (
            &["mount", "i", "folder"],
            "'folder' is not a regular file (it is a folder",
        ),
        (&["mount", "i", "no/m"], "its folder does not exist"),
        (&["mount", "i"], "'i.raw' exists and is not empty"),
    ];
    for (arguments, message) in cases {
        assert_refused(&place, &place.diskfuse(arguments), 1, message);
    }
    assert_eq!(place.names(), ["folder", "i", "i.raw"]);
}

#[test]
fn a_log_level_or_file_that_cannot_be_is_refused() {
    let place = Place::new();
    place.file("i", 4096);
    let ran = place.diskfuse(&["mount", "--log", "verbose", "i"]);
    assert_refused(&place, &ran, 1, "log level 'verbose' is not one of");
    let ran = place.diskfuse(&["mount", "--log-file", "no/log", "i"]);
    assert_refused(
        &place,
        &ran,
        1,
        "Could not open the log file 'no/log': No such file or directory\n",
    );
    assert_eq!(place.names(), ["i"]);
}

#[test]
fn what_is_not_ours_is_never_unmounted() {
    let place = Place::new();
    place.file("i", 4096);
    let cases: [(&[&str], &str); 4] = [
        (&["umount", "i"], "neither shown nor a mountpoint"),
        (&["umount", "--all", "i"], "neither shown nor a mountpoint"),
        (&["umount", "no/such"], "No such file or directory"),
        (&["umount", "/proc"], "a mount of type proc"),
    ];
    for (arguments, message) in cases {
        assert_refused(&place, &place.diskfuse(arguments), 1, message);
    }
    assert!(std::path::Path::new("/proc/self").exists());
}

#[test]
fn the_list_for_programs_is_always_an_array() {
    let ran = Place::new().diskfuse(&["list", "--json"]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(
        ran.out.starts_with('[') && ran.out.ends_with("]\n"),
        "{ran:?}"
    );
}
