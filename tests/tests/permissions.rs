//! Who may do what with a shown file: owner, group and mode are what was asked for, and the kernel holds everybody to them.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::os::unix::fs::MetadataExt;

use diskfuse_e2e::{Bed, Daemon, Output, Tool, User, elsewhere, everywhere, once, pattern};

const SIZE: usize = 1 << 20;

/// `cat` of the file by somebody.
fn read_by(daemon: &Daemon, user: u32, group: u32) -> Output {
    let ids = [format!("--reuid={user}"), format!("--regid={group}")];
    let tool = Tool::new("setpriv")
        .args(ids)
        .args(["--clear-groups", "cat"]);
    tool.arg(daemon.file()).output()
}

fn denied(output: &Output) {
    output.refused(1, &["Permission denied"]);
}

#[test]
fn owner_group_and_mode_are_shown_and_enforced() {
    everywhere(|bed| {
        let image = bed.image("i", SIZE);
        let options = [
            "-w",
            "--allow-other",
            "--uid",
            "4711",
            "--gid",
            "4712",
            "--mode",
            "640",
        ];
        let daemon = bed.mount(&image, &options);
        let stat = daemon.file().metadata().unwrap();
        assert_eq!(
            (stat.uid(), stat.gid(), stat.mode() & 0o7777),
            (4711, 4712, 0o640)
        );
        assert_eq!(
            read_by(&daemon, 4711, 1).stdout.len(),
            read_by(&daemon, 9, 4712).stdout.len()
        );
        assert!(read_by(&daemon, 4711, 1).status.success());
        denied(&read_by(&daemon, 9, 9));
        let write = |user: &str, group: &str| {
            let ids = ["--reuid", user, "--regid", group, "--clear-groups", "dd"];
            let tool = Tool::new("setpriv").args(ids).args([
                "if=/dev/zero",
                "bs=512",
                "count=1",
                "conv=notrunc",
            ]);
            tool.arg(format!("of={}", daemon.file().display())).output()
        };
        assert!(write("4711", "1").status.success());
        denied(&write("9", "4712"));
        daemon.stop();
    });
}

#[test]
fn without_others_only_the_one_who_mounts_gets_in_whatever_the_mode() {
    once(|bed| {
        let image = bed.image("i", SIZE);
        let daemon = bed.mount(&image, &[]);
        let stat = daemon.file().metadata().unwrap();
        assert_eq!((stat.uid(), stat.mode() & 0o7777), (0, 0o400));
        denied(&read_by(&daemon, 9, 9));
        daemon.stop();
        for mode in ["600", "200"] {
            let daemon = bed.mount(&image, &["-w", "--mode", mode]);
            let shown = daemon.file().metadata().unwrap().mode() & 0o7777;
            assert_eq!(format!("{shown:o}"), mode);
            daemon.stop();
        }
    });
}

#[test]
fn a_read_only_file_cannot_be_written_whatever_its_mode_says() {
    once(|bed| {
        let image = bed.image("i", SIZE);
        let daemon = bed.mount(&image, &["--allow-other", "--mode", "666"]);
        let opened = std::fs::File::options().write(true).open(daemon.file());
        assert_eq!(
            opened.unwrap_err().kind(),
            std::io::ErrorKind::ReadOnlyFilesystem
        );
        daemon.stop();
        assert!(std::fs::read(&image).unwrap() == pattern(SIZE, 1));
    });
}

#[test]
fn options_that_promise_what_cannot_be_are_refused() {
    once(|bed| {
        let image = bed.image("i", SIZE);
        let cases: [(&[&str], i32, &str); 6] = [
            (&["--uid", "1"], 2, "--allow-other"),
            (&["--gid", "1"], 2, "--allow-other"),
            (&["--mode", "644"], 1, "allow-other"),
            (&["--mode", "888"], 2, "octal"),
            (&["--allow-root", "--allow-other"], 2, "cannot be used with"),
            (&["--allow-root", "--mode", "640"], 1, "lets nobody else in"),
        ];
        for (options, code, words) in cases {
            let tool = bed.tool(["mount"]).args(options).arg(&image);
            tool.arg(bed.path("m")).output().refused(code, &[words]);
            bed.nothing_mounted();
            assert!(!bed.path("m").exists());
        }
    });
}

/// A user mounts in a place where `/etc/fuse.conf` lets him let others in, and `checks` are run there as root.
fn let_in(bed: &Bed, user: &User, options: &str, checks: &str) -> Output {
    let id = user.id;
    let program = user.program().display();
    let words = user.words().join(" ");
    let home = user.path("").display().to_string();
    let script = format!(
        "echo user_allow_other >own/conf; mount --bind own/conf /etc/fuse.conf
        cd {home}
        {words} {program} mount {options} i m
        trap '{words} {program} umount m' EXIT
        by() {{ who=$1; shift; setpriv --reuid $who --regid $who --clear-groups -- \"$@\"; }}
        not() {{ if \"$@\"; then exit 9; fi; }}
        cmp i m
        by {id} cmp i m
        {checks}"
    );
    let output = elsewhere(bed, &script, [""; 0]).run();
    assert!(!user.path("m").exists());
    output
}

#[test]
fn a_user_lets_others_in_where_the_machine_allows_it() {
    once(|bed| {
        let user = User::new(bed);
        user.image("i", SIZE);
        let_in(bed, &user, "--allow-other --mode 444", "by 4711 cmp i m");
        let_in(
            bed,
            &user,
            "--allow-other --mode 440 --gid 4711",
            "by 4711 cmp i m; not by 4712 cat m",
        );
        // The owner may go further, and take it back.
        let id = user.id;
        let checks = format!(
            "not by 4711 cat m; by {id} chmod 444 m; by 4711 cmp i m; by {id} chmod 400 m; not by 4711 cat m"
        );
        let_in(bed, &user, "-w --allow-other", &checks);
    });
}

#[test]
fn a_user_lets_root_in_and_nobody_else() {
    once(|bed| {
        let user = User::new(bed);
        user.image("i", SIZE);
        let id = user.id;
        let checks = format!("not by 4711 cat m; not by {id} chmod 444 m; not by 4711 cat m");
        let output = let_in(bed, &user, "-w --allow-root", &checks);
        assert_eq!(
            output.stderr.matches("Permission denied").count(),
            2,
            "{output}"
        );
    });
}
