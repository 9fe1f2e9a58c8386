//! The tools of QEMU, which must be there. Each run has a time limit; many commands of qemu-io share one process.

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde::Deserialize;

/// One line of `qemu-img map --output=json`.
#[derive(Clone, Debug, Deserialize)]
pub struct MapEntry {
    pub start: u64,
    pub length: u64,
    /// How many files below the top.
    pub depth: u64,
    pub present: bool,
    pub zero: bool,
    pub data: bool,
    pub compressed: bool,
    pub offset: Option<u64>,
}

/// Seconds that one run may take: disks of machines that run tests are slow at times.
const TIME_LIMIT: u64 = 180;

fn start(program: &str, args: &[&str], input: &str) -> Output {
    let began = std::time::Instant::now();
    let mut child = Command::new("timeout")
        .arg("--signal=KILL")
        .arg(TIME_LIMIT.to_string())
        .arg(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| panic!("cannot run timeout(1): {e}"));
    // A tool that ends early does not read it all.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    let output = child.wait_with_output().unwrap();
    let missing = output.status.code() == Some(127);
    assert!(!missing, "{program} is missing: install it, see the README");
    assert!(
        began.elapsed().as_secs() < TIME_LIMIT,
        "{program} {args:?}: not done after {TIME_LIMIT} s"
    );
    output
}

/// Runs qemu-img: whether it worked, and all that it said.
pub fn try_qemu_img(args: &[&str]) -> (bool, String) {
    let output = start("qemu-img", args, "");
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    (output.status.success(), said)
}

/// Runs qemu-img, which must succeed.
pub fn qemu_img(args: &[&str]) -> String {
    let (worked, said) = try_qemu_img(args);
    assert!(worked, "qemu-img {args:?}: {said}");
    said
}

/// Runs a script of qemu-io on an image with discard=unmap: all that it said. Some commands may fail.
pub fn try_qemu_io(path: &Path, script: &str) -> String {
    let output = start(
        "qemu-io",
        &["-d", "unmap", "-f", "qcow2", text(path)],
        script,
    );
    let said = [output.stdout, output.stderr].concat();
    String::from_utf8_lossy(&said).into_owned()
}

/// The same; no command may fail.
pub fn qemu_io(path: &Path, script: &str) {
    let said = try_qemu_io(path, script);
    let bad =
        |line: &&str| line.contains("failed") || line.contains("rror") || line.contains("an't");
    if let Some(line) = said.lines().find(bad) {
        panic!("qemu-io {}: {line}\n{script}", path.display());
    }
}

/// The whole disk, or that of a snapshot, as a raw file; else what was said.
pub fn try_convert(from: &Path, to: &Path, snapshot: Option<&str>) -> Result<(), String> {
    let name = snapshot.map(|s| format!("snapshot.name={s}"));
    let mut args = vec!["convert", "-f", "qcow2", "-O", "raw"];
    if let Some(name) = &name {
        args.extend(["-l", name]);
    }
    args.extend([text(from), text(to)]);
    let (worked, said) = try_qemu_img(&args);
    if worked { Ok(()) } else { Err(said) }
}

/// The same; it must work.
pub fn convert(from: &Path, to: &Path, snapshot: Option<&str>) {
    if let Err(said) = try_convert(from, to, snapshot) {
        panic!("qemu-img convert {}: {said}", from.display());
    }
}

pub fn map(path: &Path) -> Vec<MapEntry> {
    let json = qemu_img(&["map", "--output=json", "-f", "qcow2", text(path)]);
    serde_json::from_str(&json).unwrap_or_else(|e| panic!("{e} in {json}"))
}

/// The check must find nothing at all, not even a leak.
pub fn must_be_clean(path: &Path, when: &str) {
    let (clean, said) = try_qemu_img(&["check", "-f", "qcow2", text(path)]);
    assert!(clean, "{when}, qemu-img check {}: {said}", path.display());
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}
