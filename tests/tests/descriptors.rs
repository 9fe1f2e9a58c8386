//! Files that clients hand over as descriptors: `/dev/fdset/N` as the name of an image.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs::File;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use diskfuse_e2e::{Bed, Daemon, Qmp, everywhere, pattern};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};

const SIZE: usize = 1 << 20;

fn start(bed: &Bed) -> (Daemon, Qmp) {
    let socket = bed.path("qmp");
    let chardev = format!("socket,id=c,path={},server=on,wait=off", socket.display());
    let daemon = bed.qsd(&["--chardev", &chardev, "--monitor", "c"], &[]);
    (daemon, Qmp::connect(&socket))
}

/// Puts a descriptor into a set, and returns the name of the set as a file.
fn add_fd(qmp: &mut Qmp, file: &File, set: Option<i64>) -> String {
    let arguments = set.map_or(json!({}), |set| json!({"fdset-id": set}));
    let command = json!({"execute": "add-fd", "arguments": arguments}).to_string();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [file.as_fd()];
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    let bytes = [IoSlice::new(command.as_bytes())];
    sendmsg(qmp.socket(), &bytes, &mut control, SendFlags::empty()).unwrap();
    let answer = qmp.answer();
    format!("/dev/fdset/{}", answer["return"]["fdset-id"])
}

fn node(name: &str, filename: &str) -> Value {
    json!({"driver": "file", "node-name": name, "filename": filename})
}

#[test]
fn an_image_that_has_no_name_any_more_is_shown_from_its_descriptor() {
    everywhere(|bed| {
        let (path, mountpoint) = (bed.image("i", SIZE), bed.mountpoint("m"));
        let mut options = File::options();
        // As callers open files for other purposes: writes must go where they are meant to go all the same.
        let image = options.read(true).append(true).open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let (daemon, mut qmp) = start(bed);
        let name = add_fd(&mut qmp, &image, None);
        qmp.run("blockdev-add", node("disk", &name));
        // The node has one of its own.
        qmp.run("remove-fd", json!({"fdset-id": 0}));
        let export = json!({"type": "fuse", "id": "e", "node-name": "disk", "writable": true, "mountpoint": mountpoint});
        qmp.run("block-export-add", export);
        let file = File::options()
            .read(true)
            .write(true)
            .open(&mountpoint)
            .unwrap();
        file.write_all_at(&[9; 4096], 8192).unwrap();
        file.sync_all().unwrap();
        let mut expected = pattern(SIZE, 1);
        expected[8192..12_288].fill(9);
        assert!(std::fs::read(&mountpoint).unwrap() == expected);
        let mut there = vec![0; SIZE];
        image.read_exact_at(&mut there, 0).unwrap();
        assert!(there == expected);
        assert_eq!(image.metadata().unwrap().len(), SIZE as u64);
        drop(file);
        qmp.run("quit", json!({}));
        assert!(daemon.ends().status().success());
    });
}

#[test]
fn the_access_of_a_descriptor_has_to_fit() {
    everywhere(|bed| {
        let path = bed.image("i", SIZE);
        let (daemon, mut qmp) = start(bed);
        let words = "Could not open '/dev/fdset/3': No such file or directory";
        let said = qmp.refused("blockdev-add", node("a", "/dev/fdset/3"));
        assert!(said.starts_with(words), "{said}");
        let name = add_fd(&mut qmp, &File::open(&path).unwrap(), Some(3));
        assert_eq!(name, "/dev/fdset/3");
        let said = qmp.refused("blockdev-add", node("a", &name));
        let words = "Could not open '/dev/fdset/3': Permission denied";
        assert!(said.starts_with(words), "{said}");
        let mut read_only = node("a", &name);
        read_only["read-only"] = json!(true);
        qmp.run("blockdev-add", read_only);
        // One for writing is found beside it, and is the same file, so that the two share it.
        let both = File::options().read(true).write(true).open(&path).unwrap();
        add_fd(&mut qmp, &both, Some(3));
        qmp.run("blockdev-add", node("b", &name));
        // What cannot hold an image is no image under this name either.
        let (end, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let name = add_fd(&mut qmp, &File::from(std::os::fd::OwnedFd::from(end)), None);
        let said = qmp.refused("blockdev-add", node("c", &name));
        assert!(said.contains("socket"), "{said}");
        qmp.run("quit", json!({}));
        assert!(daemon.ends().status().success());
    });
}
