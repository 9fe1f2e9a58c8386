//! What a node may do with the nodes below it: overlays share what backs them, nobody writes what an image stands on,
//! and a node that is being opened holds its children already. The locks are those of the real QEMU.

#![allow(clippy::unwrap_used)]

mod common;

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use common::{directory, expect_locked, file_config, message, must, open};
use diskfuse_block::drivers::{NullConfig, RawConfig, open_file, open_null, open_raw};
use diskfuse_block::graph::{ChildRole, User};
use diskfuse_block::{Graph, Kind, Node, Permissions};

fn user(name: &str, perm: Permissions) -> User {
    User {
        name: name.to_owned(),
        perm,
        shared: Permissions::ALL,
        drain: None,
        follows: true,
    }
}

fn reader(name: &str) -> User {
    user(name, Permissions::READER)
}

fn writer(name: &str) -> User {
    user(name, Permissions::WRITER)
}

fn null(read_only: bool) -> Arc<dyn Node> {
    let config = NullConfig {
        read_only,
        ..NullConfig::default()
    };
    open_null(&config).unwrap()
}

/// A graph with a node of its own for each of these names.
fn graph(names: &[&str]) -> Graph {
    let graph = Graph::new();
    for name in names {
        graph.insert(Some(name), null(false), &[]).unwrap();
    }
    graph
}

/// `name`, which stands for an image in `file`, perhaps over `backing`.
fn image(
    graph: &Graph,
    name: &str,
    read_only: bool,
    file: &str,
    backing: Option<&str>,
) -> diskfuse_block::Result<String> {
    let children = [(file, ChildRole::File)].into_iter();
    let children: Vec<_> = children
        .chain(backing.map(|name| (name, ChildRole::Backing)))
        .collect();
    graph.insert_above(Some(name), null(read_only), &children)
}

#[test]
fn writers_of_two_overlays_are_readers_of_what_backs_both() {
    let graph = graph(&["f", "f1", "f2"]);
    image(&graph, "base", true, "f", None).unwrap();
    image(&graph, "one", false, "f1", Some("base")).unwrap();
    image(&graph, "two", false, "f2", Some("base")).unwrap();
    let _one = graph.attach("one", writer("export '1'")).unwrap();
    let _two = graph.attach("two", writer("export '2'")).unwrap();
    let _base = graph.attach("base", reader("export '3'")).unwrap();
    assert_eq!(graph.children("two").unwrap(), ["f2", "base"]);
}

#[test]
fn what_is_below_a_backing_node_that_came_after_the_image_s_place_is_not_written_either() {
    let graph = graph(&["f"]);
    let mut place = graph.reserve(Some("overlay"), false).unwrap();
    place.stand_on("f", ChildRole::File).unwrap();
    graph.insert(Some("base"), null(false), &[]).unwrap();
    let filter = open_raw(graph.get("base").unwrap(), &RawConfig::default()).unwrap();
    graph.insert(Some("filter"), filter, &["base"]).unwrap();
    place.stand_on("filter", ChildRole::Backing).unwrap();
    place.fill(null(false)).unwrap();
    let _used = graph.attach("overlay", reader("export 'o'")).unwrap();
    assert_eq!(
        message(graph.attach("base", writer("export 'b'"))),
        "Permission conflict on node 'base': permissions 'write, resize' are both required by export 'b' and unshared by node 'overlay'"
    );
    for name in ["base", "f"] {
        assert_eq!(graph.get(name).unwrap().driver(), "null-co");
    }
}

#[test]
fn what_backs_an_image_in_use_is_not_written_whoever_comes_first() {
    let graph = graph(&["base", "f"]);
    image(&graph, "overlay", false, "f", Some("base")).unwrap();
    let used = graph.attach("overlay", reader("export 'o'")).unwrap();
    assert_eq!(
        message(graph.attach("base", writer("export 'b'"))),
        "Permission conflict on node 'base': permissions 'write, resize' are both required by export 'b' and unshared by node 'overlay'"
    );
    drop(used);
    let _written = graph.attach("base", writer("export 'b'")).unwrap();
    assert_eq!(
        message(graph.attach("overlay", reader("export 'o'"))),
        "Permission conflict on node 'base': permissions 'write, resize' are both required by export 'b' and unshared by node 'overlay'"
    );
}

#[test]
fn an_image_that_can_be_written_keeps_others_from_its_file_also_without_a_user() {
    let graph = graph(&["f"]);
    image(&graph, "q", false, "f", None).unwrap();
    let said = message(image(&graph, "q2", true, "f", None));
    let expected = "Permission conflict on node 'f': permissions 'write, resize' are both required by node 'q' and unshared by node 'q2'";
    assert_eq!(said, expected);
    assert_eq!(graph.names(), ["f", "q"]);
    let said = message(graph.attach("f", writer("export 'e'")));
    let expected = "Permission conflict on node 'f': permissions 'write, resize' are both required by export 'e' and unshared by node 'q'";
    assert_eq!(said, expected);
    let _reader = graph.attach("f", reader("export 'e'")).unwrap();
    graph.remove("q").unwrap();
    image(&graph, "q2", true, "f", None).unwrap();
    image(&graph, "q3", true, "f", None).unwrap();
    assert_eq!(
        image(&graph, "q4", false, "f", None).unwrap_err().kind(),
        Kind::Busy
    );
}

#[test]
fn two_users_of_one_image_do_not_stand_in_each_others_way_below_it() {
    let graph = graph(&["f", "d", "base"]);
    let children = [
        ("f", ChildRole::File),
        ("d", ChildRole::Data),
        ("base", ChildRole::Backing),
    ];
    graph
        .insert_above(Some("q"), null(false), &children)
        .unwrap();
    let _a = graph.attach("q", writer("export 'a'")).unwrap();
    let _b = graph.attach("q", writer("export 'b'")).unwrap();
    let said = message(graph.attach("d", writer("export 'c'")));
    let expected = "Permission conflict on node 'd': permissions 'resize' are both required by export 'c' and unshared by node 'q'";
    assert_eq!(said, expected);
}

#[test]
fn an_image_that_is_to_be_written_needs_a_file_that_can_be() {
    let graph = Graph::new();
    graph.insert(Some("f"), null(true), &[]).unwrap();
    let error = image(&graph, "q", false, "f", None).unwrap_err();
    assert_eq!(error.kind(), Kind::ReadOnly);
    let expected = "Block node is read-only ('f', which node 'q' needs to write)";
    assert_eq!(error.to_string(), expected);
    assert_eq!(graph.names(), ["f"]);
    image(&graph, "q", true, "f", None).unwrap();
}

#[test]
fn a_node_that_is_being_opened_has_its_name_and_its_children() {
    let graph = graph(&["base"]);
    let file = graph.insert(None, null(false), &[]).unwrap();
    let mut place = graph.reserve(Some("q"), false).unwrap();
    place.stand_on(&file, ChildRole::File).unwrap();
    assert_eq!(graph.get("q").err().unwrap().kind(), Kind::Busy);
    let early = graph.attach("q", reader("export 'e'")).unwrap_err();
    assert_eq!(early.to_string(), "Node 'q' is being opened");
    let taken = graph.insert(Some("q"), null(false), &[]).unwrap_err();
    assert_eq!(taken.kind(), Kind::Exists);
    assert!(image(&graph, "q2", true, &file, None).is_err());
    // A child that cannot be had leaves the place as it was.
    graph.insert(Some("o"), null(true), &[]).unwrap();
    assert!(place.stand_on("o", ChildRole::File).is_err());
    place.stand_on("base", ChildRole::Backing).unwrap();
    assert_eq!(place.fill(null(false)).unwrap(), "q");
    assert_eq!(graph.children("q").unwrap(), [file.as_str(), "base"]);
    graph.remove("q").unwrap();
    assert_eq!(graph.names(), ["base", "o"]);
    let file = graph.insert(None, null(false), &[]).unwrap();
    let mut place = graph.reserve(Some("q"), false).unwrap();
    place.stand_on(&file, ChildRole::File).unwrap();
    drop(place);
    assert_eq!(graph.names(), ["base", "o"], "given up");
}

/// A storage daemon that is ended when it goes.
struct Qemu(Child);

impl Qemu {
    fn with(node: &str) -> Self {
        let mut command = Command::new("qemu-storage-daemon");
        let quiet = command.args(["--blockdev", node]).stdin(Stdio::null());
        Self(quiet.stdout(Stdio::null()).spawn().unwrap())
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// An overlay and what backs it.
fn chain(dir: &tempfile::TempDir) -> (PathBuf, PathBuf) {
    let (base, overlay) = (dir.path().join("base"), dir.path().join("overlay"));
    let create = ["create", "-q", "-f", "qcow2"];
    let base_name = base.to_str().unwrap();
    must("qemu-img", &[&create[..], &[base_name, "1M"]].concat());
    let over = ["-b", base_name, "-F", "qcow2", overlay.to_str().unwrap()];
    must("qemu-img", &[&create[..], &over].concat());
    (base, overlay)
}

#[test]
fn the_locks_of_an_image_and_of_what_backs_it_are_those_of_qemu() {
    let dir = directory();
    let (base, overlay) = chain(&dir);
    for (read_only, on_overlay) in [
        (false, &[100, 101, 103, 201, 203][..]),
        (true, &[100, 201, 203]),
    ] {
        let on_base = [100, 201, 203];
        let qemu = Qemu::with(&format!(
            "qcow2,node-name=q,read-only={},file.driver=file,file.filename={}",
            if read_only { "on" } else { "off" },
            overlay.display()
        ));
        expect_locked(&overlay, on_overlay, "QEMU, overlay");
        expect_locked(&base, &on_base, "QEMU, base");
        drop(qemu);
        expect_locked(&overlay, &[], "QEMU is gone");

        let graph = Graph::new();
        graph.insert(Some("f"), open(&overlay), &[]).unwrap();
        graph.insert(Some("b"), open(&base), &[]).unwrap();
        image(&graph, "base", true, "b", None).unwrap();
        image(&graph, "q", read_only, "f", Some("base")).unwrap();
        for who in ["nobody", "a reader"] {
            let _user = (who != "nobody").then(|| graph.attach("q", reader(who)).unwrap());
            expect_locked(&overlay, on_overlay, who);
            expect_locked(&base, &on_base, who);
        }
        graph.remove("q").unwrap();
        expect_locked(&overlay, &[100], "removed");
        expect_locked(&base, &on_base, "removed");
    }
}

#[test]
fn an_image_that_is_being_opened_is_locked_already() {
    let dir = directory();
    let (base, _overlay) = chain(&dir);
    let graph = Graph::new();
    let config = file_config(&base);
    graph
        .insert(Some("f"), open_file(&config).unwrap(), &[])
        .unwrap();
    let mut place = graph.reserve(Some("q"), false).unwrap();
    place.stand_on("f", ChildRole::File).unwrap();
    let info = ["info", "-f", "qcow2", base.to_str().unwrap()];
    let refused = common::tool("qemu-img", &info);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    let expected = "Failed to get shared \"write\" lock";
    assert!(said.contains(expected), "{said}");
    drop(place);
    must("qemu-img", &info);
}

#[test]
fn a_user_that_reaches_a_node_by_two_ways_is_one_user() {
    let graph = graph(&["f"]);
    let file = graph.get("f").unwrap();
    for name in ["a", "b"] {
        let raw = open_raw(Arc::clone(&file), &RawConfig::default()).unwrap();
        graph.insert(Some(name), raw, &["f"]).unwrap();
    }
    graph
        .insert(Some("both"), null(false), &["a", "b"])
        .unwrap();
    let alone = User {
        shared: Permissions::READER,
        ..writer("job 'alone'")
    };
    let _alone = graph.attach("both", alone).unwrap();
    assert!(graph.attach("f", writer("export 'e'")).is_err());
}
