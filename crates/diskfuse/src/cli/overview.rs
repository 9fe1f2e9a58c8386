//! What `diskfuse --help` shows first: the commands in groups, by what they are for. A command that stands in no group is shown
//! in the last one, so that none is ever missing.

use std::fmt::Write as _;

use clap::{Command, CommandFactory as _};

use super::Cli;

const GROUPS: [(&str, &[&str]); 3] = [
    ("Disks as files", &["mount", "umount", "list", "top"]),
    (
        "Images",
        &["create", "info", "check", "map", "resize", "convert"],
    ),
    (
        "Snapshots and overlays",
        &["snapshot", "commit", "discard", "rebase"],
    ),
];

/// The command line of `diskfuse`, as it is parsed and explained.
pub fn command() -> Command {
    let command = Cli::command();
    let template = format!(
        "{{about}}\n\n{{usage-heading}} {{usage}}\n{}\n\x1b[1m\x1b[4mOptions:\x1b[0m\n{{options}}{{after-help}}",
        groups(&command)
    );
    command.help_template(template)
}

fn groups(command: &Command) -> String {
    let shown: Vec<&Command> = command
        .get_subcommands()
        .filter(|command| !command.is_hide_set())
        .collect();
    let width = shown.iter().map(|command| command.get_name().len()).max();
    let width = width.unwrap_or_default();
    let is_grouped = |name: &str| GROUPS.iter().any(|(_, names)| names.contains(&name));
    let mut text = String::new();
    let mut add = |title: &str, belongs: &dyn Fn(&str) -> bool| {
        let _ = write!(text, "\n\x1b[1m\x1b[4m{title}:\x1b[0m\n");
        for command in shown.iter().filter(|command| belongs(command.get_name())) {
            let (name, about) = (command.get_name(), command.get_about());
            let about = about.cloned().unwrap_or_default();
            let _ = writeln!(text, "  \x1b[1m{name:width$}\x1b[0m  {about}");
        }
    };
    for (title, names) in GROUPS {
        add(title, &|name| names.contains(&name));
    }
    add("More", &|name| !is_grouped(name));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_is_shown_once_and_every_group_names_commands_that_there_are() {
        let command = command();
        let text = groups(&command);
        for command in command.get_subcommands() {
            let line = format!("\x1b[1m{:10}", command.get_name());
            let shown = text.matches(line.trim_end()).count();
            assert!(shown >= 1, "{} in {text}", command.get_name());
        }
        let lines = text.lines().filter(|line| line.starts_with("  ")).count();
        assert_eq!(lines, command.get_subcommands().count(), "{text}");
        for name in GROUPS.iter().flat_map(|(_, names)| *names) {
            assert!(command.find_subcommand(name).is_some(), "{name}");
        }
    }
}
