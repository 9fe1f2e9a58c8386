//! A wrong command line of the storage daemon is refused in the words that scripts match: exit code 1, nothing mounted,
//! no file left behind.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use diskfuse_e2e::{Bed, everywhere};

const SIZE: usize = 1 << 20;

/// That the storage daemon refuses these arguments with these words.
#[track_caller]
fn daemon_refuses(bed: &Bed, arguments: &[&str], words: &[&str]) {
    let root = bed.root().to_str().unwrap();
    let names = bed.names();
    let tool = bed.tool(["qsd", "--event-loop", bed.ground.event_loop.name()]);
    let output = tool
        .args(
            arguments
                .iter()
                .map(|argument| argument.replace("{}", root)),
        )
        .output();
    let words: Vec<String> = words.iter().map(|word| word.replace("{}", root)).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    output.refused(1, &[&["diskfuse qsd: "], &words[..]].concat());
    assert_eq!(output.stdout, "");
    bed.nothing_mounted();
    assert_eq!(bed.names(), names, "no file is left behind");
}

const DISK: [&str; 2] = ["--blockdev", "file,node-name=disk,filename={}/i"];
const SHOWN: [&str; 2] = ["--export", "fuse,id=e,node-name=disk,mountpoint={}/m"];

#[test]
fn wrong_nodes_are_refused_in_the_words_that_scripts_match() {
    everywhere(|bed| {
        bed.image("i", SIZE);
        let cases: [(&str, &str); 12] = [
            (
                "file,node-name=d,filename={}/no",
                "Could not open '{}/no': No such file or directory",
            ),
            (
                "fil,node-name=d,filename={}/i",
                "Parameter 'driver' does not accept value 'fil' (did you mean 'file'?)",
            ),
            (
                "vmdk,node-name=d,file.driver=file,file.filename={}/i",
                "not built into this version",
            ),
            ("file,node-name=d", "Parameter 'filename' is missing"),
            (
                "file,filename={}/i",
                "'node-name' must be specified for the root node",
            ),
            (
                "file,node-name=d,filename={}/i,filname=x",
                "Parameter 'filname' is unexpected (did you mean 'filename'?)",
            ),
            (
                "file,node-name=d,filename={}/i,read-only=maybe",
                "Parameter 'read-only' expects 'on' or 'off'",
            ),
            (
                "file,node-name=d,filename={}/i,discard=often",
                "Parameter 'discard' does not accept value 'often'",
            ),
            (
                "raw,node-name=d,file=strange",
                "Cannot find device='strange' nor node-name='strange'",
            ),
            (
                "file,node-name=disk,filename={}/i",
                "Duplicate nodes with node-name='disk'",
            ),
            ("null-co,node-name=d,size=-1", "size"),
            ("{\"driver\": \"file\"", "JSON parse error"),
        ];
        for (node, words) in cases {
            daemon_refuses(bed, &[&DISK[..], &["--blockdev", node]].concat(), &[words]);
        }
        let slip = [&DISK[..], &["--blockdev", "raw,node-name=d,file=dsk"]].concat();
        let words = [
            "Cannot find device='dsk' nor node-name='dsk'",
            "did you mean 'disk'?",
        ];
        daemon_refuses(bed, &slip, &words);
    });
}

#[test]
fn wrong_exports_are_refused_in_the_words_that_scripts_match() {
    everywhere(|bed| {
        bed.image("i", SIZE);
        bed.mountpoint("m");
        bed.mountpoint("n");
        std::fs::create_dir(bed.path("folder")).unwrap();
        let cases: [(&str, &str); 14] = [
            (
                "fuse,id=f,node-name=disk,mountpoint={}/no",
                "Failed to stat '{}/no': No such file or directory",
            ),
            (
                "fuse,id=f,node-name=disk,mountpoint={}/folder",
                "'{}/folder' is not a regular file",
            ),
            (
                "fuse,id=f,node-name=disk,mountpoint={}/m",
                "There already is a FUSE export on '{}/m'",
            ),
            (
                "fuse,id=e,node-name=disk,mountpoint={}/n",
                "Block export id 'e' is already in use",
            ),
            (
                "fuse,id=+,node-name=disk,mountpoint={}/n",
                "Invalid block export id",
            ),
            (
                "fuse,id=f,node-name=disc,mountpoint={}/n",
                "Cannot find device='' nor node-name='disc' (did you mean 'disk'?)",
            ),
            (
                "fuse,id=f,node-name=disk",
                "Parameter 'mountpoint' is missing",
            ),
            (
                "fuse,node-name=disk,mountpoint={}/n",
                "Parameter 'id' is missing",
            ),
            (
                "fuse,id=f,node-name=disk,mountpoint={}/n,threads=0",
                "Parameter 'threads' expects a number from 1 to 64",
            ),
            (
                "fuse,id=f,node-name=disk,mountpoint={}/n,threads=10000",
                "Parameter 'threads' expects",
            ),
            (
                "fuse,id=f,node-name=disk,mountpoint={}/n,iothread=t",
                "iothread \"t\" not found",
            ),
            (
                "fuse,id=f,node-name=disk,mountpoint={}/n,writable=perhaps",
                "Parameter 'writable' expects 'on' or 'off'",
            ),
            (
                "fuse,id=f,node-name=disk,mountpoint={}/n,allow-others=on",
                "'allow-others' is unexpected (did you mean 'allow-other'?)",
            ),
            (
                "fuze,id=f,node-name=disk,mountpoint={}/n",
                "'type' does not accept value 'fuze' (did you mean 'fuse'?)",
            ),
        ];
        for (export, words) in cases {
            let arguments = [&DISK[..], &SHOWN, &["--export", export]].concat();
            // The message begins with the option as it was typed.
            daemon_refuses(bed, &arguments, &[&format!("--export {export}: "), words]);
        }
        let read_only = [
            "--blockdev",
            "file,node-name=disk,filename={}/i,read-only=on",
        ];
        let writable = [
            "--export",
            "fuse,id=e,node-name=disk,mountpoint={}/m,writable=on",
        ];
        daemon_refuses(
            bed,
            &[read_only, writable].concat(),
            &["Cannot export read-only node as writable"],
        );
    });
}

#[test]
fn wrong_words_on_the_storage_daemons_command_line_are_refused() {
    everywhere(|bed| {
        bed.image("i", SIZE);
        bed.mountpoint("m");
        let both = [DISK, SHOWN].concat();
        let cases: [(&[&str], &str); 9] = [
            (
                &["--blockdv", "x"],
                "unrecognized option '--blockdv' (did you mean '--blockdev'?)",
            ),
            (&["--export"], "option '--export' requires an argument"),
            (&["image"], "image: Unexpected argument"),
            (&["--object", "iothread"], "Parameter 'id' is missing"),
            (
                &["--object", "iotread,id=t"],
                "'iotread' (did you mean 'iothread'?)",
            ),
            (
                &["--object", "iothread,id=t", "--object", "iothread,id=t"],
                "t",
            ),
            (&["--pidfile", "{}/no/pid"], "cannot create PID file"),
            (&["--monitor", "x"], "chardev \"x\" not found"),
            (&["--nbd-server", "x"], "not built into this version"),
        ];
        for (more, words) in cases {
            daemon_refuses(bed, &[&both[..], more].concat(), &[words]);
        }
    });
}

#[test]
fn what_was_refused_can_be_done_right_afterwards() {
    everywhere(|bed| {
        let image = bed.image("i", SIZE);
        bed.mountpoint("m");
        let wrong = [&DISK[..], &SHOWN, &["--export", "fuse,id=e"]].concat();
        daemon_refuses(bed, &wrong, &["missing"]);
        std::fs::remove_file(bed.path("m")).unwrap();
        bed.mount(&image, &["-w"]).stop();
    });
}
