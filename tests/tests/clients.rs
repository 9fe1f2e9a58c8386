//! Programs that live with a storage daemon, tried for real: a host manager's script, and swtpm with its state on an export.
//! And what such callers rely on of the process itself.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use diskfuse_e2e::{
    Bed, Daemon, Running, Tool, diskfuse, everywhere, mounts, once, process, wait_until,
};
use rustix::process::Signal;

const SIZE: usize = 1 << 20;
const SOON: Duration = Duration::from_secs(5);
/// For what nobody promises to be quick.
const PATIENCE: Duration = Duration::from_secs(20);

/// The program under the name that its callers know.
fn program(bed: &Bed) -> PathBuf {
    let program = bed.path("qemu-storage-daemon");
    if !program.exists() {
        std::os::unix::fs::symlink(diskfuse(), &program).unwrap();
    }
    program
}

#[test]
fn a_host_manager_starts_uses_and_ends_it() {
    once(|bed| {
        let image = bed.image("i", SIZE);
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/host-manager");
        let mut manager = Command::new("timeout")
            .arg("40")
            .arg(script)
            .arg(program(bed))
            .arg(bed.root())
            .arg(&image)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("timeout(1)");
        let mut line = String::new();
        let mut told = BufReader::new(manager.stdout.take().unwrap());
        told.read_line(&mut line).unwrap();
        let pid = std::fs::read_to_string(bed.path("pid")).unwrap_or_default();
        let pid: Option<u32> = pid.trim_end().parse().ok();
        if let Some(pid) = pid {
            bed.adopt(pid);
        }
        if line == "ready\n" {
            std::fs::write(bed.path("export"), [7; 4096]).unwrap();
            manager.stdin.take().unwrap().write_all(b"\n").unwrap();
        }
        let output = manager.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{line}{said}");
        assert_eq!(said, "");
        assert!(!process::is_alive(pid.unwrap()));
        assert_eq!(std::fs::read(&image).unwrap()[..4096], [7; 4096]);
        bed.nothing_mounted();
    });
}

/// A daemon that shows `state.raw` as `state`.
fn show_state(bed: &Bed) -> Daemon {
    let mountpoint = bed.path("state");
    let node = format!(
        "file,node-name=n,filename={}",
        bed.path("state.raw").display()
    );
    let export = format!(
        "fuse,id=e,node-name=n,writable=on,growable=on,mountpoint={}",
        mountpoint.display()
    );
    bed.qsd(&["--blockdev", &node, "--export", &export], &[&mountpoint])
}

/// A TPM whose state is the exported file, and its socket.
struct Tpm {
    running: Running,
    server: PathBuf,
}

impl Tpm {
    fn start(bed: &Bed) -> Self {
        let server = bed.path("tpm");
        // The name that clients look for it under.
        let control = bed.path("tpm.ctrl");
        let running = Tool::new("swtpm")
            .args(["socket", "--tpm2", "--flags", "startup-clear", "--tpmstate"])
            .arg(format!(
                "backend-uri=file://{}",
                bed.path("state").display()
            ))
            .arg("--server")
            .arg(format!("type=unixio,path={}", server.display()))
            .arg("--ctrl")
            .arg(format!("type=unixio,path={}", control.display()))
            .start();
        wait_until("the TPM listens", PATIENCE, || {
            control.exists() && server.exists()
        });
        Self { running, server }
    }

    fn run(&self, tool: &str, arguments: &[&str]) -> String {
        let tcti = format!("swtpm:path={}", self.server.display());
        let command = Tool::new(tool).args(["--tcti", &tcti]).args(arguments);
        command.limit(PATIENCE).run().stdout
    }

    /// Shuts it down as its manager does.
    fn stop(self, bed: &Bed) {
        let control = bed.path("tpm.ctrl");
        let shut_down = Tool::new("swtpm_ioctl")
            .arg("--unix")
            .arg(&control)
            .arg("-s");
        shut_down.limit(PATIENCE).run();
        let output = self.running.finish(PATIENCE);
        assert!(output.status.success(), "{output}");
        for path in [&self.server, &control] {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// What the TPM was told outlives it, and the daemon below it, which is replaced by another one in between.
#[test]
fn a_tpm_keeps_its_state_on_an_export() {
    const PLACE: &str = "0x1500001";
    everywhere(|bed| {
        bed.sparse("state.raw", 64 << 10);
        bed.mountpoint("state");
        let words = bed.path("words");
        std::fs::write(&words, "first").unwrap();
        let words = words.to_str().unwrap();

        let daemon = show_state(bed);
        let tpm = Tpm::start(bed);
        let rights = "ownerread|ownerwrite";
        tpm.run(
            "tpm2_nvdefine",
            &["-C", "o", "-s", "5", "-a", rights, PLACE],
        );
        tpm.run("tpm2_nvwrite", &["-C", "o", "-i", words, PLACE]);
        tpm.stop(bed);
        // Started again on the same export.
        let tpm = Tpm::start(bed);
        assert_eq!(
            tpm.run("tpm2_nvread", &["-C", "o", "-s", "5", PLACE]),
            "first"
        );
        std::fs::write(words, "later").unwrap();
        tpm.run("tpm2_nvwrite", &["-C", "o", "-i", words, PLACE]);
        tpm.stop(bed);
        daemon.stop();

        // An upgrade: another process on the same image.
        let daemon = show_state(bed);
        let tpm = Tpm::start(bed);
        assert_eq!(
            tpm.run("tpm2_nvread", &["-C", "o", "-s", "5", PLACE]),
            "later"
        );
        tpm.stop(bed);
        daemon.stop();
    });
}

#[test]
fn signals_end_it_in_silence_and_with_success() {
    everywhere(|bed| {
        bed.image("state.raw", SIZE);
        bed.mountpoint("state");
        for signal in [Signal::TERM, Signal::INT] {
            let daemon = show_state(bed);
            let file = daemon.open();
            let ended = daemon.end_by(signal);
            assert!(ended.status().success(), "{}", ended.output);
            assert!(ended.time < SOON, "{:?}", ended.time);
            let said = (ended.output.stdout.as_str(), ended.output.stderr.as_str());
            assert_eq!(said, ("", ""), "nothing was wrong");
            bed.nothing_mounted();
            drop(file);
        }
    });
}

#[test]
fn where_a_pidfile_is_there_is_an_export() {
    once(|bed| {
        let (image, mountpoint) = (bed.image("i", SIZE), bed.mountpoint("m"));
        let pidfile = bed.path("pid");
        let node = format!("file,node-name=n,filename={}", image.display());
        let export = format!("fuse,id=e,node-name=n,mountpoint={}", mountpoint.display());
        let tool = Tool::new(program(bed))
            .arg("--pidfile")
            .arg(&pidfile)
            .args(["--blockdev", &node, "--export", &export]);
        let daemon = bed.start(tool, Vec::new());
        let looked = || {
            let written = std::fs::read_to_string(&pidfile).is_ok_and(|text| text.ends_with('\n'));
            // The other way round would find an export that came in between.
            written.then(|| mounts::at(&mountpoint).is_some())
        };
        let mut found = None;
        wait_until("the pidfile is there", PATIENCE, || {
            found = looked();
            found.is_some()
        });
        assert_eq!(found, Some(true), "the pidfile came before the export");
        let text = std::fs::read_to_string(&pidfile).unwrap();
        assert_eq!(text.trim_end(), daemon.pid().to_string());
        daemon.stop();
        assert!(!pidfile.exists());
        bed.nothing_mounted();
    });
}
