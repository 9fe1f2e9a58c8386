//! The pages as man(1) and mandoc(1) see them: no warning by either, and what has to be in them is.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn make(folder: &Path) -> Vec<PathBuf> {
    let program = env!("CARGO_BIN_EXE_diskfuse-manual");
    assert!(
        Command::new(program)
            .arg(folder)
            .status()
            .unwrap()
            .success()
    );
    let entries = std::fs::read_dir(folder).unwrap();
    let mut pages: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    pages.sort();
    pages
}

fn run(command: &mut Command) -> Output {
    let output = command.output();
    output.unwrap_or_else(|error| panic!("{command:?}: {error}; apt-get install man-db mandoc"))
}

#[test]
fn no_page_makes_man_or_mandoc_complain() {
    let folder = tempfile::tempdir().unwrap();
    let mut complaints = String::new();
    for page in make(folder.path()) {
        let mut man = Command::new("man");
        man.args(["--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z"])
            .arg(&page);
        let output = run(man.env("LC_ALL", "C.UTF-8").env("MANROFFSEQ", ""));
        assert!(output.status.success(), "{}", page.display());
        complaints += &String::from_utf8_lossy(&output.stderr);
        // What is left out: pages have no date, so that they are the same whenever they are made, and clap_mangen asks for a
        // new line where there is one.
        let output = run(Command::new("mandoc")
            .args(["-T", "lint", "-W", "warning"])
            .arg(&page));
        let lines = String::from_utf8_lossy(&output.stdout).into_owned();
        let lines = lines
            .lines()
            .filter(|line| !line.contains("missing date") && !line.contains("paragraph macro: br"));
        lines.for_each(|line| complaints.extend([line, "\n"]));
    }
    assert_eq!(complaints, "");
}

#[test]
fn every_command_has_a_page_with_its_examples() {
    let folder = tempfile::tempdir().unwrap();
    let pages = make(folder.path());
    for name in [
        "diskfuse.1",
        "diskfuse-mount.1",
        "diskfuse-convert.1",
        "diskfuse-qsd.1",
        "diskfuse-formats.7",
        "mount.diskfuse.8",
    ] {
        let page = pages.iter().find(|page| page.ends_with(name));
        let text = std::fs::read_to_string(page.unwrap_or_else(|| panic!("no {name}"))).unwrap();
        for part in [".SH NAME", ".SH EXAMPLES", ".SH \"SEE ALSO\""] {
            assert!(text.contains(part), "{part} in {name}:\n{text}");
        }
    }
}

#[test]
fn a_wrong_command_line_is_answered_with_how_it_goes() {
    let output = run(&mut Command::new(env!("CARGO_BIN_EXE_diskfuse-manual")));
    assert_eq!(output.status.code(), Some(2));
}
