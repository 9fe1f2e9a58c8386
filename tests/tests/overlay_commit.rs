//! An overlay that is kept, and commits of it that do not get to their end: what the disk shows stays what it is, and no advice
//! leads to its loss.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use diskfuse_e2e::{
    Bed, Output, SmallFs, Stage, Tool, await_let_go, everywhere, once, pattern, wait_until,
};
use rustix::process::Signal;
use serde_json::json;

const NOTE: &str = "user.diskfuse.base";
const LEN: usize = 12 << 20;

fn kept(overlay: &Path) -> String {
    format!("--overlay={}", overlay.display())
}

/// Puts data into an overlay above `image`, which is made.
fn write(bed: &Bed, image: &Path, overlay: &Path) {
    let daemon = bed.mount(image, &[&kept(overlay)]);
    daemon.open().write_all_at(&pattern(LEN, 7), 4096).unwrap();
    daemon.stop();
}

/// Mounts the overlay again, and looks whether the data are there.
#[track_caller]
fn shows(bed: &Bed, image: &Path, overlay: &Path) {
    let daemon = bed.mount(image, &[&kept(overlay)]);
    let mut there = vec![0; LEN];
    daemon.open().read_exact_at(&mut there, 4096).unwrap();
    daemon.stop();
    assert!(there == pattern(LEN, 7), "the disk shows something else");
}

fn refused(bed: &Bed, image: &Path, overlay: &Path) -> Output {
    let tool = bed.tool(["mount"]).args(bed.ground.words());
    let tool = tool.arg(kept(overlay)).arg(image).arg(bed.path("m"));
    tool.output()
}

fn commit(bed: &Bed, overlay: &Path) -> Output {
    bed.diskfuse([Path::new("commit"), overlay])
}

fn note(overlay: &Path) -> Option<String> {
    let mut bytes = [0; 128];
    let len = rustix::fs::getxattr(overlay, NOTE, &mut bytes).ok()?;
    Some(String::from_utf8(bytes[..len].to_vec()).unwrap())
}

fn bytes(path: &Path) -> Vec<u8> {
    let mut there = vec![0; LEN];
    let file = File::open(path).unwrap();
    file.read_exact_at(&mut there, 4096).unwrap();
    there
}

#[test]
fn after_a_commit_that_found_no_room_the_overlay_goes_on() {
    everywhere(|bed| {
        let small = SmallFs::new(bed, "small", 16 << 20);
        let image = small.folder().join("i");
        File::create(&image).unwrap().set_len(64 << 20).unwrap();
        let ballast = small.folder().join("ballast");
        std::fs::write(&ballast, pattern(10 << 20, 1)).unwrap();
        for noted in [true, false] {
            let overlay = bed.path(&format!("o{noted}"));
            write(bed, &image, &overlay);
            if !noted {
                rustix::fs::removexattr(&overlay, NOTE).unwrap();
            }
            commit(bed, &overlay).refused(1, &["No space left", "Nothing is lost"]);
            assert_eq!(note(&overlay).is_some(), noted);
            shows(bed, &image, &overlay);
            // A change by somebody else is noticed as before.
            Tool::new("touch")
                .args(["-d", "2100-01-01"])
                .arg(&image)
                .run();
            refused(bed, &image, &overlay).refused(1, &["has changed since"]);
            commit(bed, &overlay).refused(1, &["No space left"]);
            refused(bed, &image, &overlay).refused(1, &["has changed since"]);
        }
        std::fs::remove_file(&ballast).unwrap();
        small.sync();
        let overlay = bed.path("otrue");
        let done = commit(bed, &overlay);
        assert!(done.status.success(), "{done}");
        assert!(bytes(&image) == pattern(LEN, 7));
        shows(bed, &image, &overlay);
    });
}

#[test]
fn a_kept_overlay_goes_on_above_the_base_that_it_is_rebased_to() {
    once(|bed| {
        let (old, new, overlay) = (bed.path("old"), bed.path("new"), bed.path("o.qcow2"));
        std::fs::write(&old, vec![1; 2 * LEN]).unwrap();
        std::fs::write(&new, vec![2; 2 * LEN]).unwrap();
        write(bed, &old, &overlay);
        let rebase = |options: &[&str], base: &Path| {
            let base = base.to_str().unwrap();
            let words = ["rebase", "-b", base, "-F", "raw", overlay.to_str().unwrap()];
            let output = bed.diskfuse(words.iter().chain(options));
            assert!(output.status.success(), "{output}");
        };
        rebase(&[], &new);
        refused(bed, &old, &overlay).refused(1, &["stands on"]);
        shows(bed, &new, &overlay);
        // Renamed, with the time of a copy.
        let moved = bed.path("moved");
        std::fs::copy(&new, &moved).unwrap();
        rebase(&["-u"], &moved);
        shows(bed, &moved, &overlay);
        // Of a base that has changed nobody knows what it goes with.
        std::fs::write(&moved, vec![3; 2 * LEN]).unwrap();
        rebase(&[], &new);
        refused(bed, &new, &overlay).refused(1, &["has changed since"]);
    });
}

#[test]
fn a_commit_that_was_killed_is_finished_not_thrown_away() {
    once(|bed| {
        let small = SmallFs::new(bed, "small", 32 << 20);
        let image = small.folder().join("i");
        File::create(&image).unwrap().set_len(64 << 20).unwrap();
        let overlay = bed.path("o");
        write(bed, &image, &overlay);
        // Whoever writes to the file system of the image waits, and cannot end.
        let thaw = Frozen::new(&small);
        let mut running = bed.tool(["commit"]).arg(&overlay).start();
        wait_until("the commit is noted", Duration::from_secs(10), || {
            note(&overlay).as_deref() == Some("commit")
        });
        running.signal(Signal::KILL);
        drop(thaw);
        assert!(running.wait(Duration::from_secs(10)).is_some());
        for file in [&image, &overlay] {
            await_let_go(file);
        }
        // As far as it may have come.
        let base = File::options().write(true).open(&image).unwrap();
        base.write_all_at(&pattern(LEN, 7)[..1 << 20], 4096)
            .unwrap();
        drop(base);
        let output = refused(bed, &image, &overlay);
        output.refused(1, &["was broken off", "diskfuse commit"]);
        assert!(!output.stderr.contains("discard"), "{output}");
        let done = commit(bed, &overlay);
        assert!(done.status.success(), "{done}");
        assert!(bytes(&image) == pattern(LEN, 7));
        shows(bed, &image, &overlay);
    });
}

/// Lets the file system go on when it is dropped.
struct Frozen(PathBuf);

impl Frozen {
    fn new(system: &SmallFs) -> Self {
        let folder = system.folder().to_owned();
        Tool::new("fsfreeze").arg("-f").arg(&folder).run();
        Self(folder)
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        Tool::new("fsfreeze").arg("-u").arg(&self.0).run();
    }
}

#[test]
fn a_block_commit_that_did_not_end_is_finished_by_hand() {
    everywhere(|bed| {
        let image = bed.sparse("i", 64 << 20);
        let overlay = bed.path("o");
        write(bed, &image, &overlay);
        let before = note(&overlay);
        let mut stage = Stage::start(bed);
        let base = json!({"driver": "file", "node-name": "base", "filename": &image});
        stage.run("blockdev-add", base);
        stage.run(
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": "top", "backing": "base",
            "file": {"driver": "file", "filename": &overlay}}),
        );
        // One that does not begin leaves no trace.
        stage.refused(
            "block-commit",
            json!({"job-id": "?", "device": "top"}),
            "Invalid job ID",
        );
        assert_eq!(note(&overlay), before);
        stage.run("block-commit", json!({"job-id": "j", "device": "top"}));
        stage.qmp.job_is("j", "ready");
        let Stage { daemon, .. } = stage;
        daemon.end_by(Signal::KILL);
        for file in [&image, &overlay] {
            await_let_go(file);
        }
        assert_eq!(note(&overlay).as_deref(), Some("block-commit"));
        let output = refused(bed, &image, &overlay);
        output.refused(1, &["began to commit", "diskfuse commit"]);
        let done = commit(bed, &overlay);
        assert!(done.status.success(), "{done}");
        assert!(bytes(&image) == pattern(LEN, 7));
        shows(bed, &image, &overlay);
    });
}
