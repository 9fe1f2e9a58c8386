//! What the program answers when it is called as `qemu-storage-daemon`, or as `diskfuse qsd`, with what scripts match:
//! the name, the option as typed, the message; exit code 1; nothing on standard output, nothing left behind. Nothing
//! here gets as far as mounting.

mod common;

use common::Place;

const NAME: &str = "qemu-storage-daemon";

/// The option that is wrong, with its argument, comes last.
fn assert_refused(place: &Place, arguments: &[&str], message: &str) {
    let ran = place.run(NAME, arguments);
    assert_eq!((ran.code, ran.out.as_str()), (Some(1), ""), "{ran:?}");
    let [.., option, argument] = arguments else {
        panic!("an option and its argument")
    };
    assert_eq!(ran.err, format!("{NAME}: {option} {argument}: {message}\n"));
    place.assert_nothing_mounted();
}

const NODE: [&str; 2] = ["--blockdev", "null-co,node-name=disk"];

#[test]
fn the_name_is_the_one_it_was_called_by() {
    let place = Place::new();
    let ran = place.run(
        "/some/where/qemu-storage-daemon",
        &["--blockdev", "null-co"],
    );
    assert!(
        ran.err
            .starts_with("qemu-storage-daemon: --blockdev null-co: "),
        "{ran:?}"
    );
    let ran = place.diskfuse(&["qsd", "--blockdev", "null-co"]);
    assert!(
        ran.err.starts_with("diskfuse qsd: --blockdev null-co: "),
        "{ran:?}"
    );
}

#[test]
fn version_and_help_go_to_standard_output() {
    let place = Place::new();
    let ran = place.run(NAME, &["--version"]);
    let version = env!("CARGO_PKG_VERSION");
    assert_eq!(
        ran.out,
        format!("qemu-storage-daemon compatible: diskfuse version {version}\n")
    );
    assert_eq!((ran.code, ran.err.as_str()), (Some(0), ""));
    let ran = place.run(NAME, &["--help"]);
    assert!(
        ran.out.starts_with("Usage: qemu-storage-daemon "),
        "{ran:?}"
    );
    assert_eq!((ran.code, ran.err.as_str()), (Some(0), ""));
}

#[test]
fn mistakes_in_nodes_are_told_with_the_option_as_typed() {
    let place = Place::new();
    assert_refused(
        &place,
        &["--blockdev", "foo"],
        "Parameter 'driver' does not accept value 'foo'",
    );
    let typo = "driver=nul-co,node-name=x";
    let message = "Parameter 'driver' does not accept value 'nul-co' (did you mean 'null-co'?)";
    assert_refused(&place, &["--blockdev", typo], message);
    let twice = [&NODE[..], &NODE[..]].concat();
    assert_refused(&place, &twice, "Duplicate nodes with node-name='disk'");
    let missing = "file,node-name=x,filename=none.img";
    assert_refused(
        &place,
        &["--blockdev", missing],
        "Could not open 'none.img': No such file or directory",
    );
    let json = r#"{"driver": "raw", "node-name": "x", "file": "nowhere"}"#;
    assert_refused(
        &place,
        &["--blockdev", json],
        "Cannot find device='nowhere' nor node-name='nowhere'",
    );
    assert_eq!(place.names(), [""; 0]);
}

#[test]
fn mistakes_in_exports_are_told_with_the_option_as_typed() {
    let place = Place::new();
    place.file("m", 0);
    std::fs::create_dir(place.path("folder")).unwrap();
    let cases = [
        (
            "fuse,id=e,node-name=none,mountpoint=m",
            "Cannot find device='' nor node-name='none'",
        ),
        (
            "fuse,id=e,node-name=dsik,mountpoint=m",
            "Cannot find device='' nor node-name='dsik' (did you mean 'disk'?)",
        ),
        (
            "fuse,id=e,node-name=disk,mountpoint=folder",
            "'folder' is not a regular file",
        ),
        (
            "fuse,id=1,node-name=disk,mountpoint=m",
            "Invalid block export id",
        ),
        (
            "fuse,id=e,node-name=disk,mountpoint=m,iothread=io",
            "iothread \"io\" not found",
        ),
        (
            "fuse,id=e,node-name=disk,mountpoint=m,iothread.0=io",
            "iothread \"io\" not found",
        ),
        (
            "fuse,id=e,node-name=disk",
            "Parameter 'mountpoint' is missing",
        ),
        (
            "fuse,id=e,node-name=disk,mountpoint=m,writeable=on",
            "Parameter 'writeable' is unexpected (did you mean 'writable'?)",
        ),
        (
            "fuse,id=e,node-name=disk,mountpoint=m,threads=0",
            "Parameter 'threads' expects a number from 1 to 64",
        ),
        (
            "fuse,id=e,node-name=disk,mountpoint=m,threads=10000",
            "Parameter 'threads' expects a number from 1 to 64",
        ),
    ];
    for (export, message) in cases {
        assert_refused(&place, &[NODE[0], NODE[1], "--export", export], message);
    }
    let read_only = ["--blockdev", "null-co,node-name=disk,read-only=on"];
    let writable = "fuse,id=e,node-name=disk,mountpoint=m,writable=on";
    let line = [read_only[0], read_only[1], "--export", writable];
    assert_refused(&place, &line, "Cannot export read-only node as writable");
    assert_eq!(place.names(), ["folder", "m"]);
}

#[test]
fn mistakes_in_objects_are_told_with_the_option_as_typed() {
    let place = Place::new();
    let io = ["--object", "iothread,id=io"];
    let message = "attempt to add duplicate property 'io' to object (type 'container')";
    assert_refused(&place, &[&io[..], &io[..]].concat(), message);
}

#[test]
fn mistakes_in_options_have_no_argument_to_be_told_with() {
    let place = Place::new();
    let cases = [
        (
            "--blokdev",
            "unrecognized option '--blokdev' (did you mean '--blockdev'?)",
        ),
        ("image", "image: Unexpected argument"),
        ("--export", "option '--export' requires an argument"),
    ];
    for (word, message) in cases {
        let ran = place.run(NAME, &[word]);
        assert_eq!((ran.code, ran.out.as_str()), (Some(1), ""), "{ran:?}");
        assert_eq!(ran.err, format!("{NAME}: {message}\n"));
    }
}

#[test]
fn a_pidfile_that_cannot_be_ends_the_daemon() {
    let place = Place::new();
    for background in [&[][..], &["--daemonize"]] {
        let ran = place.run(NAME, &[&["--pidfile", "no/pid"], background].concat());
        assert_eq!((ran.code, ran.out.as_str()), (Some(1), ""), "{ran:?}");
        let reason = "cannot create PID file: Could not create 'no/pid': No such file or directory";
        assert_eq!(ran.err, format!("{NAME}: {reason}\n"));
    }
    assert_eq!(place.names(), [""; 0]);
}

#[test]
fn an_error_in_the_background_reaches_the_terminal_and_the_exit_code() {
    let place = Place::new();
    let ran = place.run(
        NAME,
        &[
            "--daemonize",
            "--blockdev",
            "file,node-name=x,filename=none.img",
        ],
    );
    assert_eq!((ran.code, ran.out.as_str()), (Some(1), ""), "{ran:?}");
    let argument = "--blockdev file,node-name=x,filename=none.img";
    assert_eq!(
        ran.err,
        format!("{NAME}: {argument}: Could not open 'none.img': No such file or directory\n")
    );
}
