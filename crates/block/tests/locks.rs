//! Image locks against the real QEMU, in both directions: of two programs of which one writes, the second is refused.

#![allow(clippy::unwrap_used)]

mod common;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use common::{directory, expect_locked, file_config, image, message, must, open, qemu_io, tool};
use diskfuse_block::drivers::{FileConfig, RawConfig, open_file, open_raw};
use diskfuse_block::graph::{Attachment, User};
use diskfuse_block::{Graph, Kind, Locking, Permissions, Result};

fn user(name: &str, perm: Permissions) -> User {
    User {
        name: name.to_owned(),
        perm,
        shared: Permissions::ALL,
        drain: None,
        follows: true,
    }
}

fn reader() -> User {
    user("a reader", Permissions::READER)
}

fn writer() -> User {
    user("a writer", Permissions::WRITER)
}

/// The image in a graph of its own, with one user.
fn attach(path: &Path, user: User) -> Result<(Graph, Attachment)> {
    let graph = Graph::new();
    graph.insert(Some("disk"), open_file(&file_config(path))?, &[])?;
    let attachment = graph.attach("disk", user)?;
    Ok((graph, attachment))
}

fn an_image() -> (tempfile::TempDir, PathBuf) {
    let dir = directory();
    let path = image(&dir, "disk.raw", &vec![7; 65_536]);
    (dir, path)
}

#[test]
fn the_locked_bytes_are_those_of_the_permissions() {
    let (_dir, path) = an_image();
    let graph = Graph::new();
    graph.insert(Some("disk"), open(&path), &[]).unwrap();
    expect_locked(&path, &[100], "nobody uses it");
    let a = graph.attach("disk", reader()).unwrap();
    expect_locked(&path, &[100, 201, 203], "one reader");
    let b = graph.attach("disk", writer()).unwrap();
    expect_locked(&path, &[100, 101, 103, 201, 203], "and a writer");
    drop(a);
    expect_locked(&path, &[100, 101, 103, 201, 203], "the writer alone");
    drop(b);
    expect_locked(&path, &[100], "nobody again");
    graph.remove("disk").unwrap();
    expect_locked(&path, &[], "closed");
}

#[test]
fn locks_follow_the_users_of_a_raw_node_above() {
    let (_dir, path) = an_image();
    let graph = Graph::new();
    let file = open(&path);
    graph
        .insert(Some("f"), Arc::<_>::clone(&file) as _, &[])
        .unwrap();
    let raw = open_raw(file, &RawConfig::default()).unwrap();
    graph.insert(Some("r"), raw, &["f"]).unwrap();
    let export = graph.attach("r", writer()).unwrap();
    expect_locked(&path, &[100, 101, 103, 201, 203], "held");
    drop(export);
    expect_locked(&path, &[100], "held");
}

#[test]
fn while_we_write_qemu_neither_writes_nor_reads_what_must_not_change() {
    let (dir, path) = an_image();
    let held = attach(&path, writer()).unwrap();
    let (ok, said) = qemu_io(&path, &["-c", "write 0 512"]);
    assert!(
        !ok && said.contains("Failed to get \"write\" lock"),
        "{said}"
    );
    let copy = dir.path().join("copy.raw");
    let convert = ["convert", "-f", "raw", "-O", "raw", path.to_str().unwrap()];
    let convert = [&convert[..], &[copy.to_str().unwrap()]].concat();
    let output = tool("qemu-img", &convert);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let expected = "Failed to get shared \"write\" lock";
    assert!(
        !output.status.success() && said.contains(expected),
        "{said}"
    );
    // Whoever says that a writer does not disturb them may look, as beside a writing QEMU.
    must(
        "qemu-img",
        &["info", "-U", "-f", "raw", path.to_str().unwrap()],
    );
    assert!(qemu_io(&path, &["-r", "-c", "read 0 512"]).0);
    drop(held);
    assert!(qemu_io(&path, &["-c", "write 0 512"]).0);
    must("qemu-img", &convert);
}

#[test]
fn while_we_read_qemu_reads_but_does_not_write() {
    let (_dir, path) = an_image();
    let _held = attach(&path, reader()).unwrap();
    assert!(qemu_io(&path, &["-r", "-c", "read 0 512"]).0);
    must("qemu-img", &["info", path.to_str().unwrap()]);
    let (ok, said) = qemu_io(&path, &["-c", "write 0 512"]);
    assert!(
        !ok && said.contains("Failed to get \"write\" lock"),
        "{said}"
    );
    let resize = ["resize", "-f", "raw", path.to_str().unwrap(), "1M"];
    assert!(!tool("qemu-img", &resize).status.success());
}

#[test]
fn a_node_that_nobody_uses_is_in_nobodys_way() {
    let (_dir, path) = an_image();
    let _node = open(&path);
    assert!(qemu_io(&path, &["-c", "write 0 512"]).0);
}

/// A QEMU that holds an image until it is dropped.
struct Holder(Child);

impl Holder {
    /// qemu-io waits at its prompt with the image open.
    fn qemu_io(path: &Path, args: &[&str], expected: &[u64]) -> Self {
        let mut command = Command::new("qemu-io");
        command.args(args).arg(path);
        Self::start(command, path, expected)
    }

    fn start(mut command: Command, path: &Path, expected: &[u64]) -> Self {
        let quiet = command
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let holder = Self(quiet.spawn().unwrap());
        expect_locked(path, expected, "QEMU");
        holder
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn refusal(path: &Path, user: User) -> String {
    let result = attach(path, user);
    assert_eq!(
        result.as_ref().err().map(diskfuse_block::Error::kind),
        Some(Kind::Busy)
    );
    message(result)
}

#[test]
fn while_qemu_writes_we_neither_read_nor_write() {
    let (dir, raw) = an_image();
    let qcow2 = dir.path().join("disk.qcow2");
    must(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", qcow2.to_str().unwrap(), "1M"],
    );
    // A raw image leaves writing to others; a qcow2 image does not. We refuse either way.
    let refused = "Failed to get shared \"write\" lock";
    let raw = (raw, ["-f", "raw"], &[100, 101][..], refused);
    let all = &[100, 101, 103, 201, 203][..];
    let qcow2 = (qcow2, ["-f", "qcow2"], all, "Failed to get \"write\" lock");
    for (path, args, held, to_writers) in [raw, qcow2] {
        let _qemu = Holder::qemu_io(&path, &args, held);
        let hint = format!("Is another process using the image [{}]?", path.display());
        let said = refusal(&path, writer());
        assert!(said.contains(to_writers) && said.contains(&hint), "{said}");
        let said = refusal(&path, reader());
        assert!(said.contains(refused) && said.contains(&hint), "{said}");
        expect_locked(&path, held, "refused");
        let off = FileConfig {
            locking: Locking::Off,
            ..file_config(&path)
        };
        let graph = Graph::new();
        graph
            .insert(Some("disk"), open_file(&off).unwrap(), &[])
            .unwrap();
        let _forced = graph.attach("disk", writer()).unwrap();
    }
}

#[test]
fn while_qemu_reads_what_must_not_change_we_read_but_do_not_write() {
    let (dir, raw) = an_image();
    let path = dir.path().join("disk.qcow2");
    must(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", path.to_str().unwrap(), "1M"],
    );
    let qemu = Holder::qemu_io(&path, &["-r", "-f", "qcow2"], &[100, 201, 203]);
    let said = refusal(&path, writer());
    assert!(said.contains("Failed to get \"write\" lock"), "{said}");
    drop(attach(&path, reader()).unwrap());
    // Nor does one who reads already become a writer.
    let (graph, _reads) = attach(&path, reader()).unwrap();
    let kind = graph.attach("disk", writer()).unwrap_err().kind();
    assert_eq!(kind, Kind::Busy);
    assert_eq!(graph.users("disk").unwrap(), ["a reader"]);
    expect_locked(&path, &[100, 100, 201, 201, 203, 203], "held");
    drop(qemu);
    drop(graph.attach("disk", writer()).unwrap());
    // A QEMU that lets others write is not in our way.
    let _qemu = Holder::qemu_io(&raw, &["-r", "-f", "raw"], &[100]);
    drop(attach(&raw, writer()).unwrap());
}

/// Unmounts when it goes, also if nothing is mounted.
struct Unmount<'p>(&'p Path);

impl Drop for Unmount<'_> {
    fn drop(&mut self) {
        let quiet = Command::new("umount")
            .arg("-l")
            .arg(self.0)
            .stderr(Stdio::null())
            .status();
        drop(quiet);
    }
}

#[test]
fn qemus_writable_fuse_export_and_ours_exclude_each_other() {
    let (dir, path) = an_image();
    let mountpoint = image(&dir, "export", &[]);
    let daemon = |writable: &str| {
        let export = format!(
            "type=fuse,id=e,node-name=f,mountpoint={},writable={writable}",
            mountpoint.display()
        );
        let node = format!("file,node-name=f,filename={}", path.display());
        let mut command = Command::new("qemu-storage-daemon");
        command.args(["--blockdev", &node, "--export", &export]);
        command
    };
    let _unmount = Unmount(&mountpoint);
    {
        let _qemu = Holder::start(daemon("on"), &path, &[100, 101, 103]);
        refusal(&path, reader());
        refusal(&path, writer());
    }
    drop(Unmount(&mountpoint));
    let _held = attach(&path, reader()).unwrap();
    let output = daemon("on").output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        !output.status.success() && said.contains("Failed to get \"write\" lock"),
        "{said}"
    );
}

#[test]
fn one_process_cannot_write_one_image_through_two_nodes() {
    let (_dir, path) = an_image();
    let (_graph, _held) = attach(&path, writer()).unwrap();
    let said = refusal(&path, reader());
    assert!(
        said.contains("Failed to get shared \"write\" lock"),
        "{said}"
    );
    refusal(&path, writer());
}

#[test]
fn two_readers_in_one_process_are_fine_until_one_writes() {
    let (_dir, path) = an_image();
    let _a = attach(&path, reader()).unwrap();
    let _b = attach(&path, reader()).unwrap();
    expect_locked(&path, &[100, 100, 201, 201, 203, 203], "held");
    let said = refusal(&path, writer());
    assert!(said.contains("Failed to get \"write\" lock"), "{said}");
}
