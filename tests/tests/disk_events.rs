//! What clients are told of disks that go wrong: `BLOCK_IO_ERROR` and `BLOCK_IMAGE_CORRUPTED`.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use diskfuse_e2e::{Bed, Daemon, Qmp, Tool, everywhere};
use serde_json::{Value, json};

const SIZE: u64 = 1 << 20;

/// A daemon that shows `node`, the last of `nodes`, as `m`.
fn serve(bed: &Bed, nodes: &[Value], node: &str, writable: bool) -> (Daemon, Qmp) {
    let (socket, mountpoint) = (bed.path("qmp"), bed.mountpoint("m"));
    let chardev = format!("socket,id=c,path={},server=on,wait=off", socket.display());
    let mut arguments = vec![
        "--chardev".to_owned(),
        chardev,
        "--monitor".to_owned(),
        "c".to_owned(),
    ];
    for options in nodes {
        arguments.extend(["--blockdev".to_owned(), options.to_string()]);
    }
    let writable = if writable { "on" } else { "off" };
    let at = mountpoint.display();
    let export = format!("fuse,id=e,node-name={node},mountpoint={at},writable={writable}");
    arguments.extend(["--export".to_owned(), export]);
    let daemon = bed.qsd(&arguments, &[&mountpoint]);
    (daemon, Qmp::connect(&socket))
}

/// The events of this name that have come when a command is answered.
fn told(qmp: &mut Qmp, name: &str) -> Vec<Value> {
    qmp.run("query-version", json!({}));
    let all = std::mem::take(&mut qmp.events).into_iter();
    let of_name = all.filter(|event| event["event"] == name);
    of_name.map(|event| event["data"].clone()).collect()
}

#[test]
fn errors_of_requests_are_told_a_few_at_a_time() {
    everywhere(|bed| {
        let null = json!({"driver": "null-co", "node-name": "null", "size": SIZE});
        let errors = json!([
            {"event": "none", "iotype": "read"},
            {"event": "none", "iotype": "write", "errno": 28},
        ]);
        let bad = json!({"driver": "blkdebug", "node-name": "bad", "image": "null", "inject-error": errors});
        let (daemon, mut qmp) = serve(bed, &[null, bad], "bad", true);
        let file = daemon.open();
        file.write_at(&[1; 512], 0).unwrap_err();
        let mut told_of = qmp.event("BLOCK_IO_ERROR")["data"].take();
        let reason = told_of["reason"].take();
        assert!(
            reason.as_str().unwrap().contains("No space left"),
            "{reason}"
        );
        let expected = json!({
            "qom-path": "", "device": "", "node-name": "bad", "operation": "write", "action": "report",
            "nospace": true, "reason": null,
        });
        assert_eq!(told_of, expected);

        std::thread::sleep(Duration::from_millis(1100));
        let began = std::time::Instant::now();
        for _ in 0..300 {
            file.read_at(&mut [0; 512], 0).unwrap_err();
        }
        let seconds = began.elapsed().as_secs() as usize + 2;
        let told = told(&mut qmp, "BLOCK_IO_ERROR");
        assert!((1..=4 * seconds).contains(&told.len()), "{}", told.len());
        assert!(
            told.iter()
                .all(|data| data["operation"] == "read" && data["nospace"] == false)
        );
        drop(file);
        daemon.stop();
    });
}

/// An image whose first cluster is said to lie at this offset in the file, or at that of its L1 table.
fn damaged(bed: &Bed, host: Option<u64>) -> std::path::PathBuf {
    let path = bed.path("i.qcow2");
    let create = Tool::new("qemu-img").args(["create", "-q", "-f", "qcow2"]);
    create.arg(&path).arg(SIZE.to_string()).run();
    let fill = Tool::new("qemu-io").args(["-f", "qcow2", "-c", "write 0 64k"]);
    fill.arg(&path).run();
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let word = |at: u64| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, at).unwrap();
        u64::from_be_bytes(bytes)
    };
    // The header's l1_table_offset; entries have their offset in bits 9 to 55 and "copied" in bit 63.
    let l1 = word(40);
    let l2 = word(l1) & 0x00ff_ffff_ffff_fe00;
    let entry = host.unwrap_or(l1) | 1 << 63;
    file.write_all_at(&entry.to_be_bytes(), l2).unwrap();
    path
}

fn qcow2(image: &Path, read_only: bool) -> Value {
    json!({
        "driver": "qcow2", "node-name": "disk", "read-only": read_only,
        "file": {"driver": "file", "filename": image, "read-only": read_only},
    })
}

#[test]
fn a_corrupt_image_is_told_of_once() {
    everywhere(|bed| {
        let image = damaged(bed, None);
        let (daemon, mut qmp) = serve(bed, &[qcow2(&image, false)], "disk", true);
        let file = daemon.open();
        file.write_at(&[1; 4096], 0).unwrap_err();
        file.write_at(&[1; 4096], 0).unwrap_err();
        let event = qmp.event("BLOCK_IMAGE_CORRUPTED")["data"].take();
        assert_eq!(event["node-name"], "disk");
        assert_eq!(event["device"], "");
        assert_eq!(event["fatal"], true);
        assert_ne!(event["msg"], "");
        assert_eq!(told(&mut qmp, "BLOCK_IMAGE_CORRUPTED"), [json!(null); 0]);
        drop(file);
        let _ = daemon.end_by(rustix::process::Signal::TERM);
        // incompatible_features, bit 1: the image says so itself from now on.
        assert_eq!(std::fs::read(&image).unwrap()[79] & 2, 2);
    });
}

#[test]
fn one_that_is_only_read_is_told_of_as_well_and_left_alone() {
    everywhere(|bed| {
        let image = damaged(bed, Some(0x5_0200));
        let before = std::fs::read(&image).unwrap();
        let (daemon, mut qmp) = serve(bed, &[qcow2(&image, true)], "disk", false);
        let file = daemon.open_read_only();
        file.read_at(&mut [0; 4096], 0).unwrap_err();
        let event = qmp.event("BLOCK_IMAGE_CORRUPTED")["data"].take();
        assert_eq!(event["node-name"], "disk");
        assert_eq!(event["fatal"], false);
        drop(file);
        daemon.stop();
        assert!(std::fs::read(&image).unwrap() == before);
    });
}
