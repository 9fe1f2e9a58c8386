//! `mount`, `umount` and `list` as a person uses them: in the background, with files made and removed, found again by
//! mountpoint or by image.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::{Path, PathBuf};
use std::time::Duration;

use diskfuse_e2e::{Bed, Listed, Tool, everywhere, listed, mounts, pattern, process, wait_until};
use rustix::process::{Pid, Signal, kill_process};

const SIZE: usize = 1 << 20;
const SOON: Duration = Duration::from_secs(20);

/// Mounts in the background and returns what is listed, which must be there at once.
fn mount(bed: &Bed, image: &Path, mountpoint: &Path, options: &[&str]) -> Listed {
    let tool = bed.tool(["mount"]).args(bed.ground.words());
    let output = tool.args(options).arg(image).arg(mountpoint).run();
    assert_eq!(
        (output.stdout.as_str(), output.stderr.as_str()),
        ("", ""),
        "nothing to say"
    );
    let export = listed(bed, mountpoint).expect("it is listed as soon as the command is back");
    bed.adopt(export.number("pid") as u32);
    export
}

fn gone(bed: &Bed, export: &Listed, mountpoint: &Path) {
    assert!(mounts::at(mountpoint).is_none(), "still mounted");
    assert!(listed(bed, mountpoint).is_none(), "still listed");
    let pid = export.number("pid") as u32;
    wait_until("the daemon has ended", SOON, || !process::is_alive(pid));
}

#[test]
fn mount_returns_when_the_file_is_usable_and_a_daemon_goes_on_behind_it() {
    everywhere(|bed| {
        let (image, mountpoint) = (bed.image("i", SIZE), bed.path("m"));
        let export = mount(bed, &image, &mountpoint, &["-w"]);
        assert!(std::fs::read(&mountpoint).unwrap() == pattern(SIZE, 1));
        assert!(process::is_alive(export.number("pid") as u32));
        bed.tool(["umount"]).arg(&mountpoint).run();
        gone(bed, &export, &mountpoint);
        assert!(!mountpoint.exists(), "what `mount` made is removed again");
        assert!(std::fs::read(&image).unwrap() == pattern(SIZE, 1));
    });
}

#[test]
fn a_mountpoint_that_was_there_stays() {
    everywhere(|bed| {
        let (image, mountpoint) = (bed.image("i", SIZE), bed.mountpoint("m"));
        let export = mount(bed, &image, &mountpoint, &[]);
        bed.tool(["umount"]).arg(&mountpoint).run();
        gone(bed, &export, &mountpoint);
        assert_eq!(mountpoint.metadata().unwrap().len(), 0);
    });
}

#[test]
fn without_a_mountpoint_the_file_is_beside_the_image_and_its_name_is_printed() {
    everywhere(|bed| {
        let image = bed.image("i", SIZE);
        let tool = bed.tool(["mount"]).args(bed.ground.words());
        let output = tool.arg(&image).run();
        let shown = bed.path("i.raw");
        assert_eq!(output.stdout, format!("{}\n", shown.display()));
        let export = listed(bed, &shown).unwrap();
        bed.adopt(export.number("pid") as u32);
        assert_eq!(shown.metadata().unwrap().len(), SIZE as u64);
        bed.tool(["umount"]).arg(&image).run();
        gone(bed, &export, &shown);
        assert_eq!(bed.names(), ["i"]);
    });
}

#[test]
fn relative_paths_mean_what_they_say() {
    everywhere(|bed| {
        bed.image("i", SIZE);
        let run = |arguments: &[&str]| bed.tool(arguments).current_dir(bed.root()).run();
        run(&[
            "mount",
            "--event-loop",
            bed.ground.event_loop.name(),
            "--transport",
            bed.ground.transport.name(),
            "i",
            "m",
        ]);
        let export = listed(bed, &bed.path("m")).unwrap();
        bed.adopt(export.number("pid") as u32);
        assert_eq!(export.text("image"), bed.path("i").to_str().unwrap());
        run(&["umount", "./m"]);
        gone(bed, &export, &bed.path("m"));
    });
}

#[test]
fn list_tells_what_is_shown_and_what_went_through_it() {
    everywhere(|bed| {
        let (image, mountpoint) = (bed.image("i", SIZE), bed.path("m"));
        let export = mount(bed, &image, &mountpoint, &["-w", "--threads", "3"]);
        assert_eq!(export.text("image"), image.to_str().unwrap());
        assert_eq!(export.text("mountpoint"), mountpoint.to_str().unwrap());
        assert_eq!(export.text("format"), "raw");
        assert!(export.flag("writable"));
        assert_eq!(export.number("queues"), 3);
        assert_eq!(export.number("in_flight"), 0);
        assert_eq!(
            (export.number("read_bytes"), export.number("written_bytes")),
            (0, 0)
        );
        let dd = |arguments: &[&str]| Tool::new("dd").args(arguments).run();
        let path = mountpoint.display();
        dd(&[&format!("if={path}"), "of=/dev/null", "bs=4k", "count=16"]);
        dd(&[
            "if=/dev/zero",
            &format!("of={path}"),
            "bs=4k",
            "count=3",
            "conv=notrunc",
        ]);
        let export = listed(bed, &mountpoint).unwrap();
        assert_eq!(export.number("read_bytes"), 16 * 4096);
        assert_eq!(export.number("written_bytes"), 3 * 4096);
        assert_eq!(export.number("errors"), 0);
        let table = bed.diskfuse(["list"]).stdout;
        let row = table
            .lines()
            .find(|line| line.contains(mountpoint.to_str().unwrap()))
            .unwrap();
        for word in [
            image.to_str().unwrap(),
            "raw",
            "rw",
            &export.number("pid").to_string(),
        ] {
            assert!(
                row.split_whitespace().any(|there| there == word),
                "no {word} in {row}"
            );
        }
        bed.tool(["umount"]).arg(&mountpoint).run();
        gone(bed, &export, &mountpoint);
    });
}

#[test]
fn a_read_only_export_is_listed_as_such() {
    everywhere(|bed| {
        let mountpoint = bed.path("m");
        let export = mount(bed, &bed.image("i", SIZE), &mountpoint, &["--threads", "1"]);
        assert!(!export.flag("writable"));
        assert_eq!(export.number("queues"), 1);
        bed.tool(["umount"]).arg(&mountpoint).run();
    });
}

#[test]
fn an_image_that_is_shown_twice_is_taken_away_by_mountpoint_or_as_a_whole() {
    everywhere(|bed| {
        let image = bed.image("i", SIZE);
        let paths: Vec<PathBuf> = ["a", "b", "c"].map(|name| bed.path(name)).into();
        let exports: Vec<Listed> = paths
            .iter()
            .map(|path| mount(bed, &image, path, &[]))
            .collect();
        let output = bed.tool(["umount"]).arg(&image).output();
        let names: Vec<&str> = paths.iter().map(|path| path.to_str().unwrap()).collect();
        output.refused(1, &[&["--all"], &names[..]].concat());
        bed.tool(["umount"]).arg(&paths[1]).run();
        gone(bed, &exports[1], &paths[1]);
        assert!(listed(bed, &paths[0]).is_some() && listed(bed, &paths[2]).is_some());
        bed.tool(["umount", "--all"]).arg(&image).run();
        gone(bed, &exports[0], &paths[0]);
        gone(bed, &exports[2], &paths[2]);
        bed.nothing_mounted();
    });
}

#[test]
fn umount_of_what_is_not_shown_says_so() {
    everywhere(|bed| {
        let image = bed.image("i", SIZE);
        let output = bed.tool(["umount"]).arg(&image).output();
        output.refused(
            1,
            &[
                image.to_str().unwrap(),
                "neither shown nor a mountpoint of ours",
            ],
        );
        let output = bed.tool(["umount"]).arg(bed.path("no/such/file")).output();
        output.refused(1, &["no/such/file", "No such file or directory"]);
    });
}

#[test]
fn a_daemon_in_the_background_lets_go_of_whoever_started_it() {
    everywhere(|bed| {
        let image = bed.image("i", SIZE);
        // `cat` ends only when nobody holds its end of the pipe any more.
        let script = r#""$0" mount --event-loop "$1" "$2" "$3" 2>&1 | cat"#;
        let tool = Tool::new("sh")
            .args(["-c", script])
            .arg(diskfuse_e2e::diskfuse());
        let tool = tool
            .arg(bed.ground.event_loop.name())
            .arg(&image)
            .arg(bed.path("m"));
        tool.limit(SOON).run();
        let export = listed(bed, &bed.path("m")).unwrap();
        let pid = export.number("pid");
        bed.adopt(pid as u32);
        let link = |name: &str| std::fs::read_link(format!("/proc/{pid}/{name}")).unwrap();
        assert_eq!(link("cwd"), Path::new("/"), "it holds no folder");
        for stream in ["fd/0", "fd/1", "fd/2"] {
            assert_eq!(link(stream), Path::new("/dev/null"), "{stream}");
        }
    });
}

#[test]
fn a_daemon_in_the_background_ends_cleanly_by_sigterm() {
    everywhere(|bed| {
        let mountpoint = bed.path("m");
        let export = mount(bed, &bed.image("i", SIZE), &mountpoint, &["-w"]);
        let pid = Pid::from_raw(export.number("pid") as i32).unwrap();
        kill_process(pid, Signal::TERM).unwrap();
        wait_until("the daemon has ended", SOON, || {
            listed(bed, &mountpoint).is_none()
        });
        wait_until("the mountpoint is removed", SOON, || !mountpoint.exists());
        bed.nothing_mounted();
    });
}

#[test]
fn a_daemon_in_the_background_tells_its_log_file_what_happened() {
    everywhere(|bed| {
        let (mountpoint, log) = (bed.path("m"), bed.path("log"));
        let options = ["--log", "info", "--log-file", log.to_str().unwrap()];
        let export = mount(bed, &bed.image("i", SIZE), &mountpoint, &options);
        Tool::new("umount").arg(&mountpoint).run();
        wait_until("the export has ended", SOON, || {
            listed(bed, &mountpoint).is_none()
        });
        gone(bed, &export, &mountpoint);
        let said = std::fs::read_to_string(log).unwrap();
        assert!(said.contains("unmounted from outside"), "{said}");
    });
}

#[test]
fn a_file_under_a_name_with_blanks_and_letters_of_all_sorts_works() {
    everywhere(|bed| {
        let image = bed.image("ein Bild, groß\\=x", SIZE);
        let mountpoint = bed.path("da hin\tü");
        let export = mount(bed, &image, &mountpoint, &["-w"]);
        assert_eq!(export.text("image"), image.to_str().unwrap());
        assert!(std::fs::read(&mountpoint).unwrap() == pattern(SIZE, 1));
        bed.tool(["umount"]).arg(&image).run();
        assert!(listed(bed, &mountpoint).is_none());
        assert!(!mountpoint.exists());
    });
}
