//! `diskfuse completions`: prints what makes a shell complete the command line. It comes from the same description that the
//! command line is parsed by, and must never say anything else.

use std::process::ExitCode;

use clap_complete::Shell;
use diskfuse_cli::cli::{self, CompletionsArgs};

use crate::error::Result;
use crate::output;

/// Prints the script of one shell.
pub fn run(arguments: &CompletionsArgs) -> Result<ExitCode> {
    let shell = match arguments.shell {
        cli::Shell::Bash => Shell::Bash,
        cli::Shell::Zsh => Shell::Zsh,
        cli::Shell::Fish => Shell::Fish,
    };
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut cli::command(), "diskfuse", &mut script);
    output::say(&String::from_utf8_lossy(&script))?;
    Ok(ExitCode::SUCCESS)
}
