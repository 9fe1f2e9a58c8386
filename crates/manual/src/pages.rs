//! Which pages there are, and what each is made of.

use std::error::Error;
use std::fmt::Write as _;
use std::path::Path;

use clap::Command;
use clap_mangen::Man;
use diskfuse_cli::cli;

use crate::markdown::to_roff;

/// Follows what the description of the command line says about `diskfuse` itself.
const OF_THE_PROGRAM: &str = include_str!("../../../docs/man/diskfuse.1.md");

/// Pages that are written as a whole: name, section, text.
const WRITTEN: [(&str, &str, &str); 3] = [
    (
        "diskfuse-qsd",
        "1",
        include_str!("../../../docs/man/diskfuse-qsd.1.md"),
    ),
    (
        "diskfuse-formats",
        "7",
        include_str!("../../../docs/man/diskfuse-formats.7.md"),
    ),
    (
        "mount.diskfuse",
        "8",
        include_str!("../../../docs/man/mount.diskfuse.8.md"),
    ),
];

/// Further names of pages: name, section, and the page that is shown by it.
const NAMES: [(&str, &str, &str); 2] = [
    ("mount.fuse.diskfuse", "8", "mount.diskfuse"),
    ("umount.fuse.diskfuse", "8", "mount.diskfuse"),
];

const EXIT_STATUS: &str = "## EXIT STATUS\n\n0 when it is done, 1 when it failed (a message says why), 2 when the command line is wrong.\n";

/// Writes all pages to `folder`, which is made if missing.
pub fn write(folder: &Path) -> Result<(), Box<dyn Error>> {
    std::fs::create_dir_all(folder)?;
    let mut program = cli::command().disable_help_subcommand(true);
    program.build();
    write_command(folder, "diskfuse", &program)?;
    for (name, section, text) in WRITTEN {
        let mut page = title(name, section).into_bytes();
        to_roff(text)?.to_writer(&mut page)?;
        std::fs::write(folder.join(format!("{name}.{section}")), page)?;
    }
    for (name, section, shown) in NAMES {
        // A copy: a link or a request for the other file would break where pages are compressed.
        let shown = folder.join(format!("{shown}.{section}"));
        std::fs::copy(shown, folder.join(format!("{name}.{section}")))?;
    }
    Ok(())
}

/// The page of a command, and those of its commands, unless they are written.
fn write_command(folder: &Path, name: &str, command: &Command) -> Result<(), Box<dyn Error>> {
    let man = Man::new(command.clone());
    let mut page = title(name, "1").into_bytes();
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    if command.has_subcommands() {
        man.render_subcommands_section(&mut page)?;
    }
    let text = match name {
        "diskfuse" => OF_THE_PROGRAM.to_owned(),
        _ => sections_of_help(command),
    };
    to_roff(&text)?.to_writer(&mut page)?;
    std::fs::write(folder.join(format!("{name}.1")), page)?;
    for below in command.get_subcommands() {
        let name = format!("{name}-{}", below.get_name());
        if !WRITTEN.iter().any(|(written, ..)| *written == name) {
            write_command(folder, &name, below)?;
        }
    }
    Ok(())
}

/// The macro that begins a page. It has no date. The crate roff would leave an empty argument out.
fn title(name: &str, section: &str) -> String {
    let version = concat!("diskfuse ", env!("CARGO_PKG_VERSION"));
    format!(".TH {name} {section} \"\" \"{version}\" \"diskfuse\"\n")
}

/// What follows the options in a command's help, as sections: its examples, what there is to know, the exit status.
fn sections_of_help(command: &Command) -> String {
    let help = command.get_after_help().map(ToString::to_string);
    let mut text = String::new();
    let mut has_status = false;
    let mut has_notes = false;
    for paragraph in help.unwrap_or_default().split("\n\n") {
        if let Some(examples) = paragraph.strip_prefix("Examples:\n") {
            let _ = write!(
                text,
                "## EXAMPLES\n\n```console\n{}\n```\n\n",
                without_margin(examples)
            );
        } else if let Some(codes) = paragraph.strip_prefix("Exit codes: ") {
            has_status = true;
            let _ = write!(text, "## EXIT STATUS\n\n{codes}\n\n");
        } else if !paragraph.is_empty() {
            if !std::mem::replace(&mut has_notes, true) {
                text += "## NOTES\n\n";
            }
            let _ = write!(text, "{paragraph}\n\n");
        }
    }
    if !has_status {
        text += EXIT_STATUS;
    }
    text + "\n## SEE ALSO\n\n`diskfuse`(1), `diskfuse-formats`(7)\n"
}

fn without_margin(examples: &str) -> String {
    let lines = examples
        .lines()
        .map(|line| line.strip_prefix("  ").unwrap_or(line));
    lines.collect::<Vec<_>>().join("\n")
}
