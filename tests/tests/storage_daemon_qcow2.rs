//! qcow2 images on the command line of the storage daemon, in the forms that people write: what is shown is what
//! `qemu-img` reads, what is written is there and sound when the daemon is gone, nobody else gets in between, and mistakes
//! are told in the words of the real daemon.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use diskfuse_e2e::{Bed, Daemon, Output, Tool, await_listed, everywhere, once, pattern};

/// Of the disks.
const SIZE: usize = 4 << 20;
const CLUSTER: usize = 64 << 10;

/// `qemu-img` with these arguments, which must succeed.
#[track_caller]
fn qemu_img<A: AsRef<std::ffi::OsStr>>(arguments: impl IntoIterator<Item = A>) -> Output {
    Tool::new("qemu-img").args(arguments).run()
}

/// An empty image; `more` are further options of `qemu-img create`, the last one the size unless it has a backing file.
fn create(bed: &Bed, name: &str, more: &[&str]) -> PathBuf {
    let path = bed.path(name);
    let tool = Tool::new("qemu-img").current_dir(bed.root());
    tool.args(["create", "-q", "-f", "qcow2", name])
        .args(more)
        .run();
    path
}

/// An image that holds [`pattern`] number 1, all of it.
fn full(bed: &Bed, name: &str) -> PathBuf {
    let raw = bed.image(&format!("{name}.raw"), SIZE);
    let path = bed.path(name);
    qemu_img([
        "convert".as_ref(),
        "-O".as_ref(),
        "qcow2".as_ref(),
        raw.as_os_str(),
        path.as_os_str(),
    ]);
    path
}

/// An image with some clusters of its own: 1 to 3 of [`pattern`] number 2. `backing` as `-b NAME -F FORMAT`.
fn overlay(bed: &Bed, name: &str, backing: &str, format: &str) -> PathBuf {
    let path = create(bed, name, &["-b", backing, "-F", format]);
    let data = bed.path(&format!("{name}.data"));
    std::fs::write(&data, &pattern(SIZE, 2)[CLUSTER..4 * CLUSTER]).unwrap();
    let write = format!("write -q -s {} {CLUSTER} {}", data.display(), 3 * CLUSTER);
    Tool::new("qemu-io")
        .args(["-f", "qcow2", "-c", &write])
        .arg(&path)
        .run();
    path
}

/// What the disk of [`overlay`] holds above `below`.
fn overlaid(below: &[u8]) -> Vec<u8> {
    let mut all = below.to_vec();
    all[CLUSTER..4 * CLUSTER].copy_from_slice(&pattern(SIZE, 2)[CLUSTER..4 * CLUSTER]);
    all
}

/// What `qemu-img` reads from the image.
fn as_qemu_reads(bed: &Bed, image: &Path) -> Vec<u8> {
    let raw = bed.path("read-by-qemu");
    qemu_img([
        "convert".as_ref(),
        "-f".as_ref(),
        "qcow2".as_ref(),
        "-O".as_ref(),
        "raw".as_ref(),
        image.as_os_str(),
        raw.as_os_str(),
    ]);
    std::fs::read(raw).unwrap()
}

/// Fails unless `qemu-img check` finds nothing at all, not even a leak.
#[track_caller]
fn sound(image: &Path) {
    qemu_img(["check".as_ref(), "-q".as_ref(), image.as_os_str()]);
}

/// A storage daemon with these nodes, which shows node `disk`.
#[track_caller]
fn show(bed: &Bed, nodes: &[&str], more: &str) -> Daemon {
    let mountpoint = bed.mountpoint("m");
    let export = format!(
        "fuse,id=e,node-name=disk,mountpoint={}{more}",
        mountpoint.display()
    );
    let mut arguments: Vec<&str> = nodes.iter().flat_map(|node| ["--blockdev", node]).collect();
    arguments.extend(["--export", &export]);
    bed.qsd(&arguments, &[&mountpoint])
}

#[test]
fn an_image_is_shown_in_every_form_that_people_write() {
    everywhere(|bed| {
        let image = full(bed, "i");
        let i = image.display();
        let inline = format!("driver=qcow2,node-name=disk,file.driver=file,file.filename={i}");
        let forms: [&[String]; 9] = [
            std::slice::from_ref(&inline),
            &[
                format!("driver=file,filename={i},node-name=below"),
                "driver=qcow2,file=below,node-name=disk".to_owned(),
            ],
            &[format!(
                r#"{{"driver": "qcow2", "node-name": "disk", "file": {{"driver": "file", "filename": "{i}"}}}}"#
            )],
            &[format!(
                r#"{{"driver": "qcow2", "node-name": "disk", "backing": null, "read-only": true,
                     "overlap-check": {{"template": "all", "inactive-l2": false}},
                     "file": {{"driver": "file", "filename": "{i}", "aio": "threads"}}}}"#
            )],
            &[format!(
                "{inline},l2-cache-size=65536,refcount-cache-size=1M,l2-cache-entry-size=4k,cache-clean-interval=1"
            )],
            &[format!(
                "{inline},cache-size=128k,read-only=on,overlap-check=none"
            )],
            &[format!(
                "{inline},cache.direct=on,cache.no-flush=on,discard=unmap,detect-zeroes=unmap"
            )],
            &[format!(
                "{inline},lazy-refcounts=on,discard-no-unref=on,pass-discard-request=on,pass-discard-snapshot=off,\
                 pass-discard-other=on,backing="
            )],
            &[format!(
                "raw,node-name=disk,file.driver=qcow2,file.file.driver=file,file.file.filename={i},\
                 file.file.node-name=protocol,read-only=on"
            )],
        ];
        for form in forms {
            let form: Vec<&str> = form.iter().map(String::as_str).collect();
            let daemon = show(bed, &form, "");
            assert!(
                std::fs::read(daemon.file()).unwrap() == pattern(SIZE, 1),
                "{form:?}"
            );
            let format = await_listed(bed, daemon.file()).text("format").to_owned();
            let outermost = if form[0].starts_with("raw") {
                "raw"
            } else {
                "qcow2"
            };
            assert_eq!(format, outermost, "{form:?}");
            daemon.stop();
            sound(&image);
        }
    });
}

#[test]
fn what_an_image_is_backed_by_can_be_said_in_every_way() {
    everywhere(|bed| {
        let base = full(bed, "base");
        let image = overlay(bed, "i", "base", "qcow2");
        let inline = format!(
            "qcow2,node-name=disk,file.driver=file,file.filename={}",
            image.display()
        );
        let base_file = format!("file.driver=file,file.filename={}", base.display());
        let below = pattern(SIZE, 1);
        let named = format!("qcow2,node-name=below,read-only=on,{base_file}");
        let inside = format!(
            "{inline},backing.driver=qcow2,backing.file.driver=file,backing.file.filename={}",
            base.display()
        );
        let raw = format!(
            "{inline},backing.driver=raw,backing.file.driver=file,backing.file.filename={}",
            bed.path("base.raw").display()
        );
        let json = format!(
            r#"{{"driver": "qcow2", "node-name": "disk", "backing": null,
                 "file": {{"driver": "file", "filename": "{}"}}}}"#,
            image.display()
        );
        let cases: [(&[&str], Vec<u8>); 7] = [
            (&[&inline], overlaid(&below)),
            (
                &[&named, &format!("{inline},backing=below")],
                overlaid(&below),
            ),
            (&[&inside], overlaid(&below)),
            (&[&raw], overlaid(&below)),
            (&[&format!("{inline},backing=")], overlaid(&vec![0; SIZE])),
            (&[&json], overlaid(&vec![0; SIZE])),
            (
                &[&format!(
                    "{inline},backing.driver=null-co,backing.read-zeroes=on"
                )],
                overlaid(&vec![0; SIZE]),
            ),
        ];
        for (nodes, expected) in cases {
            for writable in [",writable=on", ""] {
                let daemon = show(bed, nodes, writable);
                assert!(
                    std::fs::read(daemon.file()).unwrap() == expected,
                    "{nodes:?}{writable}"
                );
                daemon.stop();
            }
        }
        sound(&image);
        sound(&base);
    });
}

#[test]
fn a_chain_is_found_by_the_names_in_its_headers() {
    everywhere(|bed| {
        bed.image("lowest.raw", SIZE);
        overlay(bed, "low", "lowest.raw", "raw");
        create(bed, "middle", &["-b", "low", "-F", "qcow2"]);
        let image = create(bed, "i", &["-b", "middle", "-F", "qcow2"]);
        let node = format!(
            "qcow2,node-name=disk,cache.direct=on,file.driver=file,file.filename={}",
            image.display()
        );
        let daemon = show(bed, &[&node], ",writable=on,threads=2");
        let mut expected = overlaid(&pattern(SIZE, 1));
        assert!(std::fs::read(daemon.file()).unwrap() == expected);
        let below: Vec<Vec<u8>> = ["lowest.raw", "low", "middle"]
            .map(|name| std::fs::read(bed.path(name)).unwrap())
            .into();
        let data = pattern(3000, 5);
        daemon.open().write_all_at(&data, 2 << 20).unwrap();
        expected[2 << 20..][..3000].copy_from_slice(&data);
        daemon.stop();
        sound(&image);
        assert!(as_qemu_reads(bed, &image) == expected);
        for (name, before) in ["lowest.raw", "low", "middle"].iter().zip(below) {
            assert!(
                std::fs::read(bed.path(name)).unwrap() == before,
                "{name} was changed"
            );
        }
    });
}

/// Writes here and there: whole clusters, parts, and over the end of what is there; and notes it in `disk`.
fn write_all_over(daemon: &Daemon, disk: &mut [u8]) {
    let file = daemon.open();
    let places = [
        (0, 512),
        (CLUSTER - 512, 1024),
        (10 * CLUSTER, CLUSTER),
        (12 * CLUSTER + 4096, 3 * CLUSTER),
        (20 * CLUSTER + 100, 7),
        (disk.len() - 4096, 4096),
    ];
    for (number, (offset, len)) in places.into_iter().enumerate() {
        let data = pattern(len, 100 + number as u64);
        file.write_all_at(&data, offset as u64).unwrap();
        disk[offset..offset + len].copy_from_slice(&data);
    }
    file.sync_all().unwrap();
}

#[test]
fn what_is_written_is_there_and_sound_when_the_daemon_is_gone() {
    everywhere(|bed| {
        let kinds: [&[&str]; 5] = [
            &["4M"],
            &["-o", "compat=0.10", "4M"],
            &["-o", "cluster_size=4k,refcount_bits=1", "4M"],
            &["-o", "extended_l2=on,cluster_size=128k", "4M"],
            &["-o", "lazy_refcounts=on,preallocation=metadata", "4M"],
        ];
        for kind in kinds {
            let image = create(bed, "i", kind);
            let node = format!(
                "qcow2,node-name=disk,file.driver=file,file.filename={}",
                image.display()
            );
            let mut disk = vec![0; SIZE];
            // The second daemon finds what the first one left.
            for threads in [1, 4] {
                let more = format!(",writable=on,threads={threads}");
                let daemon = show(bed, &[&node], &more);
                assert!(std::fs::read(daemon.file()).unwrap() == disk, "{kind:?}");
                write_all_over(&daemon, &mut disk);
                assert!(std::fs::read(daemon.file()).unwrap() == disk, "{kind:?}");
                daemon.stop();
                sound(&image);
                assert!(as_qemu_reads(bed, &image) == disk, "{kind:?}");
            }
        }
    });
}

#[test]
fn an_image_that_is_only_read_is_not_changed() {
    everywhere(|bed| {
        let image = full(bed, "i");
        let before = std::fs::read(&image).unwrap();
        for read_only in ["on", "off"] {
            let node = format!(
                "qcow2,node-name=disk,read-only={read_only},file.driver=file,file.filename={}",
                image.display()
            );
            let daemon = show(bed, &[&node], "");
            assert!(std::fs::read(daemon.file()).unwrap() == pattern(SIZE, 1));
            daemon.stop();
            assert!(
                std::fs::read(&image).unwrap() == before,
                "read-only={read_only}"
            );
        }
    });
}

#[test]
fn an_external_data_file_is_found_or_given() {
    everywhere(|bed| {
        let image = bed.path("i");
        let data = bed.path("elsewhere");
        let option = format!("data_file={},data_file_raw=on", data.display());
        create(bed, "i", &["-o", &option, "4M"]);
        let inline = format!(
            "qcow2,node-name=disk,file.driver=file,file.filename={}",
            image.display()
        );
        let mut disk = vec![0; SIZE];
        let daemon = show(bed, &[&inline], ",writable=on");
        write_all_over(&daemon, &mut disk);
        daemon.stop();
        sound(&image);
        assert!(std::fs::read(&data).unwrap() == disk);
        let moved = bed.path("moved");
        std::fs::rename(&data, &moved).unwrap();
        let forms: [&[String]; 2] = [
            &[format!(
                "{inline},data-file.driver=file,data-file.filename={}",
                moved.display()
            )],
            &[
                format!("file,node-name=data,filename={}", moved.display()),
                format!("{inline},data-file=data"),
            ],
        ];
        for form in forms {
            let form: Vec<&str> = form.iter().map(String::as_str).collect();
            let daemon = show(bed, &form, ",writable=on");
            assert!(std::fs::read(daemon.file()).unwrap() == disk);
            write_all_over(&daemon, &mut disk);
            daemon.stop();
            assert!(std::fs::read(&moved).unwrap() == disk);
        }
    });
}

#[test]
fn two_overlays_of_one_base_are_written_at_once() {
    everywhere(|bed| {
        let base = full(bed, "base");
        let before = std::fs::read(&base).unwrap();
        let images = ["a", "b"].map(|name| create(bed, name, &["-b", "base", "-F", "qcow2"]));
        let base_node = format!(
            "qcow2,node-name=base,read-only=on,file.driver=file,file.filename={}",
            base.display()
        );
        let mut arguments = vec!["--blockdev".to_owned(), base_node];
        let mountpoints = ["ma", "mb"].map(|name| bed.mountpoint(name));
        for (name, (image, mountpoint)) in ["a", "b"].iter().zip(images.iter().zip(&mountpoints)) {
            let node = format!(
                "qcow2,node-name={name},backing=base,file.driver=file,file.filename={}",
                image.display()
            );
            let export = format!(
                "fuse,id={name},node-name={name},mountpoint={},writable=on",
                mountpoint.display()
            );
            arguments.extend(["--blockdev".to_owned(), node, "--export".to_owned(), export]);
        }
        let paths: Vec<&Path> = mountpoints.iter().map(PathBuf::as_path).collect();
        let daemon = bed.qsd(&arguments, &paths);
        for (seed, path) in [(50, paths[0]), (51, paths[1])] {
            let file = std::fs::File::options().write(true).open(path).unwrap();
            file.write_all_at(&pattern(CLUSTER, seed), 1 << 20).unwrap();
        }
        daemon.stop();
        for (seed, image) in [(50, &images[0]), (51, &images[1])] {
            sound(image);
            let mut disk = pattern(SIZE, 1);
            disk[1 << 20..][..CLUSTER].copy_from_slice(&pattern(CLUSTER, seed));
            assert!(as_qemu_reads(bed, image) == disk);
        }
        assert!(std::fs::read(&base).unwrap() == before);
    });
}

#[test]
fn qemu_keeps_out_of_what_we_hold_and_we_of_what_it_holds() {
    everywhere(|bed| {
        full(bed, "base");
        let image = overlay(bed, "i", "base", "qcow2");
        let node = |options: &str| {
            let file = format!("file.driver=file,file.filename={}", image.display());
            format!("qcow2,node-name=disk,{file}{options}")
        };
        let info = |name: &str| {
            let tool = Tool::new("qemu-img").args(["info", "-f", "qcow2"]);
            tool.arg(bed.path(name)).output()
        };
        let writes = |name: &str| {
            let tool = Tool::new("qemu-io").args(["-f", "qcow2", "-c", "write -q 0 512"]);
            tool.arg(bed.path(name)).output()
        };
        let daemon = show(bed, &[&node("")], "");
        info("i").refused(1, &["Failed to get shared \"write\" lock"]);
        writes("i").refused(1, &["Failed to get \"write\" lock"]);
        assert_eq!(info("base").code(), 0, "what is only read may be read");
        writes("base").refused(1, &["Failed to get \"write\" lock"]);
        daemon.stop();

        let daemon = show(bed, &[&node(",read-only=on")], "");
        assert_eq!(info("i").code(), 0, "two readers");
        writes("i").refused(1, &["Failed to get \"write\" lock"]);
        daemon.stop();
        assert_eq!(writes("i").code(), 0, "free again");

        // A second one of ours is refused as QEMU is.
        let _first = show(bed, &[&node("")], "");
        let second = bed.tool(["qsd", "--blockdev", &node(",read-only=on")]);
        second
            .output()
            .refused(1, &["Failed to get shared \"write\" lock"]);
    });
}

/// That both daemons refuse these nodes: ours with the words of the real one, and then at most a hint in parentheses.
#[track_caller]
fn same_refusal(bed: &Bed, nodes: &[&str]) {
    let arguments: Vec<String> = nodes
        .iter()
        .flat_map(|node| ["--blockdev", node])
        .map(|word| word.replace("{}", bed.root().to_str().unwrap()))
        .collect();
    let first_line = |output: &Output, name: &str| {
        assert_eq!(output.code(), 1, "{output}");
        let line = output.stderr.lines().next().unwrap_or_default();
        let line = line
            .strip_prefix(name)
            .unwrap_or_else(|| panic!("{output}"));
        line.to_owned()
    };
    let real = Tool::new("qemu-storage-daemon").args(&arguments).output();
    let real = first_line(&real, "qemu-storage-daemon: ");
    let ours = bed.tool(["qsd"]).args(&arguments).output();
    let ours = first_line(&ours, "diskfuse qsd: ");
    let hint = ours
        .strip_prefix(&real)
        .unwrap_or_else(|| panic!("\n real: {real}\n ours: {ours}"));
    assert!(
        hint.is_empty() || (hint.starts_with(" (") && hint.ends_with(')')),
        "{ours}"
    );
}

#[test]
fn mistakes_about_images_have_the_words_of_qemu() {
    once(|bed| {
        let image = full(bed, "i");
        bed.image("raw", SIZE);
        create(
            bed,
            "homeless",
            &["-u", "-b", "missing", "-F", "qcow2", "4M"],
        );
        let elsewhere = format!("data_file={}", bed.path("data").display());
        create(bed, "split", &["-o", &elsewhere, "4M"]);
        std::fs::remove_file(bed.path("data")).unwrap();
        let i = "qcow2,node-name=q,file.driver=file,file.filename={}/i";
        let with = |more: &str| format!("{i},{more}");
        let file = "file,node-name=f,filename={}/i";
        let cases: Vec<Vec<String>> = vec![
            vec!["qcow2,node-name=q,file.driver=file,file.filename={}/raw".into()],
            vec!["qcow2,node-name=q,file.driver=file,file.filename={}/none".into()],
            vec!["qcow2,node-name=q,file=none".into()],
            vec!["raw,node-name=q,file=none".into()],
            vec!["qcow2,node-name=q,file.driver=file,file.filename={}/homeless".into()],
            vec!["qcow2,node-name=q,file.driver=file,file.filename={}/split".into()],
            vec!["qcow2,node-name=q,data-file=d,file.driver=file,file.filename={}/split".into()],
            vec![with("backing=none")],
            vec![with("backing.driver=file,backing.filename={}/none")],
            vec![with("data-file=none")],
            vec![with("data-file.driver=null-co")],
            vec![with("l2-cache-entry-size=5")],
            vec![with("l2-cache-entry-size=256")],
            vec![with("l2-cache-entry-size=131072")],
            vec![with("refcount-cache-size=9223372036854775807")],
            vec![with("force-share=on")],
            vec![
                format!("{file},read-only=on"),
                "qcow2,node-name=q,file=f".into(),
            ],
            vec![i.into(), i.into()],
            vec![i.into(), i.replace("node-name=q", "node-name=p")],
        ];
        for nodes in &cases {
            let nodes: Vec<&str> = nodes.iter().map(String::as_str).collect();
            same_refusal(bed, &nodes);
        }
        sound(&image);
        bed.nothing_mounted();
    });
}

#[test]
fn one_image_is_not_written_by_one_and_shown_by_another() {
    once(|bed| {
        full(bed, "base");
        let image = create(bed, "i", &["-b", "base", "-F", "qcow2"]);
        let (a, b) = (bed.mountpoint("a"), bed.mountpoint("b"));
        let base = format!(
            "qcow2,node-name=base,file.driver=file,file.filename={}",
            bed.path("base").display()
        );
        let over = format!(
            "qcow2,node-name=over,backing=base,file.driver=file,file.filename={}",
            image.display()
        );
        let export = |id: &str, at: &Path, writable: &str| {
            let at = at.display();
            format!("fuse,id={id},node-name={id},mountpoint={at},writable={writable}")
        };
        let refused = bed.tool(["qsd", "--blockdev", &base, "--blockdev", &over]);
        let refused = refused.args(["--export", &export("over", &a, "on")]);
        let refused = refused.args(["--export", &export("base", &b, "on")]);
        let words = ["node 'base'", "export 'base'", "node 'over'"];
        refused.output().refused(1, &words);
        bed.nothing_mounted();
        sound(&image);
    });
}
