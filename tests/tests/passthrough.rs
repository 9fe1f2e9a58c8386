//! Passthrough: the kernel reads and writes the image itself. What it does is right for every kind of access; what it could not
//! do right is refused with the reason.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use diskfuse_e2e::{Aligned, Bed, Daemon, Fio, Tool, await_listed, everywhere, once, pattern};

const SIZE: usize = 4 << 20;
const RAW: [&str; 4] = ["--format", "raw", "--passthrough", "on"];
const WRITABLE: [&str; 2] = ["-w", "--growable"];

fn mount(bed: &Bed, image: &Path, more: &[&str]) -> Daemon {
    bed.mount(image, &[RAW.as_slice(), more].concat())
}

/// Whether the kernel does the work, and how many reads and writes the export has seen.
fn seen(bed: &Bed, daemon: &Daemon) -> (bool, u64) {
    let listed = await_listed(bed, daemon.file());
    let requests = listed.number("reads") + listed.number("writes");
    (listed.flag("passthrough"), requests)
}

#[test]
fn what_is_read_and_written_is_the_image_and_the_export_does_not_see_it() {
    everywhere(|bed| {
        let image = bed.image("i", SIZE);
        let daemon = mount(bed, &image, &WRITABLE);
        assert!(std::fs::read(daemon.file()).unwrap() == pattern(SIZE, 1));
        let file = daemon.open();
        let bytes = pattern(100_000, 2);
        file.write_all_at(&bytes, 12_345).unwrap();
        file.sync_all().unwrap();
        let mut direct = Aligned::zeroes(8192);
        let again = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::DIRECT;
        let raw = rustix::fs::open(daemon.file(), again, rustix::fs::Mode::empty()).unwrap();
        assert_eq!(
            rustix::io::pread(&raw, direct.bytes_mut(), 16384).unwrap(),
            8192
        );
        assert!(direct.bytes() == &bytes[16384 - 12_345..][..8192]);
        let page = Aligned::copy_of(&pattern(4096, 3));
        assert_eq!(rustix::io::pwrite(&raw, page.bytes(), 8192).unwrap(), 4096);
        let mut expected = pattern(SIZE, 1);
        expected[12_345..112_345].copy_from_slice(&bytes);
        expected[8192..12_288].copy_from_slice(page.bytes());
        assert!(std::fs::read(&image).unwrap() == expected);
        assert_eq!(seen(bed, &daemon), (true, 0));
        drop((file, raw));
        daemon.stop();
        assert!(std::fs::read(&image).unwrap() == expected);
    });
}

#[test]
fn a_map_is_the_image() {
    everywhere(|bed| {
        let image = bed.image("i", SIZE);
        let daemon = mount(bed, &image, &WRITABLE);
        let options = [
            "--rw=randrw",
            "--ioengine=mmap",
            "--bs=4k",
            "--size=4m",
            "--verify=crc32c",
        ];
        Fio::new("map", daemon.file(), &options).run();
        assert!(std::fs::read(daemon.file()).unwrap() == std::fs::read(&image).unwrap());
        assert!(seen(bed, &daemon).0);
        daemon.stop();
    });
}

#[test]
fn it_grows_by_writing_and_by_truncating_and_a_second_export_sees_it() {
    everywhere(|bed| {
        let image = bed.image("i", SIZE);
        let (first, second) = (bed.mountpoint("a"), bed.mountpoint("b"));
        let node = format!("file,node-name=n,filename={}", image.display());
        let export = |id: &str, path: &Path, more: &str| {
            let path = path.display();
            format!("fuse,id={id},node-name=n,mountpoint={path},writable=on,growable=on{more}")
        };
        let (a, b) = (
            export("a", &first, ",passthrough=on"),
            export("b", &second, ""),
        );
        let arguments = ["--blockdev", &node, "--export", &a, "--export", &b];
        let daemon = bed.qsd(&arguments, &[&first, &second]);
        let file = daemon.open();
        let beside = File::options()
            .read(true)
            .write(true)
            .open(&second)
            .unwrap();
        file.write_all_at(&pattern(4096, 5), SIZE as u64 + 8192)
            .unwrap();
        let size = |path: &Path| path.metadata().unwrap().len();
        assert_eq!(size(&first), SIZE as u64 + 12_288);
        // The second one's size is asked for once its second is over.
        std::thread::sleep(std::time::Duration::from_millis(1100));
        assert_eq!(size(&second), SIZE as u64 + 12_288);
        let mut back = vec![0; 4096];
        beside.read_exact_at(&mut back, SIZE as u64 + 8192).unwrap();
        assert!(back == pattern(4096, 5));
        beside.write_all_at(&pattern(4096, 6), 4096).unwrap();
        file.read_exact_at(&mut back, 4096).unwrap();
        assert!(back == pattern(4096, 6));
        file.set_len(8192).unwrap();
        assert_eq!(size(&image), 8192);
        assert_eq!(file.read_at(&mut back, 8192).unwrap(), 0);
        drop((file, beside));
        daemon.stop();
    });
}

#[test]
fn what_the_kernel_could_not_do_right_is_refused_with_the_reason_or_done_without_it() {
    once(|bed| {
        let whole = bed.image("i", SIZE);
        let odd = bed.image("odd", SIZE + 100);
        let qcow2 = bed.path("q");
        Tool::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2"])
            .arg(&qcow2)
            .arg("1M")
            .run();
        let cases: [(&Path, &[&str], &str); 5] = [
            (&whole, &["--format", "raw", "-w"], "growable"),
            (&whole, &["-w", "--growable"], "--format raw"),
            (&whole, &["--offset", "1M"], "part of a file"),
            (&odd, &["--format", "raw"], "whole sector"),
            (&qcow2, &[], "qcow2"),
        ];
        for (image, options, reason) in cases {
            let tool = bed.tool(["mount", "--passthrough", "on"]).args(options);
            let output = tool.arg(image).arg(bed.path("m")).output();
            output.refused(1, &["passthrough=on", reason]);
            bed.nothing_mounted();
            let auto = [&["--passthrough", "auto"], options].concat();
            let daemon = bed.mount(image, &auto);
            let (passed, _) = seen(bed, &daemon);
            assert!(!passed, "{options:?}");
            daemon.stop();
        }
    });
}

#[test]
fn an_export_on_top_of_an_export_is_served_without_it() {
    everywhere(|bed| {
        let image = bed.image("i", SIZE);
        let below = mount(bed, &image, &WRITABLE);
        let top = bed.path("top");
        let tool = bed.tool(["mount"]).args(RAW).args(WRITABLE);
        let output = tool.arg(below.file()).arg(&top).output();
        output.refused(1, &["passthrough=on", "stacks no further"]);
        let options = [
            "--format",
            "raw",
            "--passthrough",
            "auto",
            "-w",
            "--growable",
        ];
        let above = bed.mount_on(below.file(), &top, &options);
        assert!(!seen(bed, &above).0);
        above.open().write_all_at(&pattern(4096, 8), 4096).unwrap();
        above.stop();
        below.stop();
        assert!(std::fs::read(&image).unwrap()[4096..8192] == pattern(4096, 8));
    });
}

#[test]
fn who_keeps_the_file_open_beyond_the_end_keeps_others_from_writing_the_image() {
    everywhere(|bed| {
        let image = bed.image("i", SIZE);
        let daemon = mount(bed, &image, &WRITABLE);
        let file = daemon.open();
        daemon.stop();
        let tool = bed.tool(["mount", "-w"]).arg(&image).arg(bed.path("m"));
        tool.output()
            .refused(1, &["Is another process using the image"]);
        drop(file);
        bed.mount(&image, &["-w"]).stop();
    });
}

#[test]
fn an_image_that_is_truncated_or_replaced_under_it_is_what_the_host_makes_of_it() {
    everywhere(|bed| {
        let image = bed.image("i", SIZE);
        let mut daemon = mount(bed, &image, &[]);
        let file = daemon.open_read_only();
        let host = File::options().write(true).open(&image).unwrap();
        host.set_len(1 << 20).unwrap();
        let mut page = [7; 4096];
        assert_eq!(file.read_at(&mut page, 2 << 20).unwrap(), 0, "past its end");
        assert_eq!(file.read_at(&mut page, 0).unwrap(), 4096);
        let other = bed.image("other", SIZE);
        std::fs::write(&other, pattern(SIZE, 9)).unwrap();
        std::fs::rename(&other, &image).unwrap();
        file.read_exact_at(&mut page, 0).unwrap();
        assert!(
            page[..] == pattern(SIZE, 1)[..4096],
            "the file that was opened"
        );
        assert!(daemon.is_alive());
        drop(file);
        daemon.stop();
    });
}
