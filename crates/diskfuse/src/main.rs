//! The program `diskfuse`: reads the command line and hands over. It must never hold logic that a library should have.

mod background;
mod busy;
mod completions;
mod control;
mod daemon;
mod directory;
mod error;
mod fstab;
mod idle;
mod images;
mod list;
mod logging;
mod metrics;
mod mount;
mod mountpoint;
mod output;
mod overlay;
mod qsd;
mod sandbox;
mod service;
mod top;
mod umount;
mod watchdog;

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::ExitCode;

use clap::FromArgMatches as _;
use diskfuse_cli::cli;

use cli::{Cli, Command};
use error::Error;

fn main() -> ExitCode {
    let mut arguments = std::env::args_os();
    let called = arguments.next().unwrap_or_default();
    let name = base_name(&called);
    if name == "qemu-storage-daemon" {
        return qsd::main("qemu-storage-daemon", arguments.collect());
    }
    if sandbox::is_meant(name) {
        return sandbox::main();
    }
    let arguments: Vec<OsString> = arguments.collect();
    if fstab::is_meant(name, &arguments) {
        return fstab::main(arguments);
    }
    if umount::helper::is_meant(name) {
        return umount::helper::main(arguments);
    }
    let matches = cli::command().get_matches();
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    match cli.command {
        Command::Mount(arguments) => report(mount::run(&arguments)),
        Command::Umount(arguments) => report(umount::run(&arguments)),
        Command::List(arguments) => report(list::run(&arguments)),
        Command::Top(arguments) => report(top::run(&arguments)),
        Command::Create(arguments) => report(images::create::run(&arguments)),
        Command::Info(arguments) => report(images::info::run(&arguments)),
        Command::Check(arguments) => report(images::check::run(&arguments)),
        Command::Snapshot(arguments) => report(images::snapshot::run(&arguments)),
        Command::Map(arguments) => report(images::map::run(&arguments)),
        Command::Resize(arguments) => report(images::resize::run(&arguments)),
        Command::Commit(arguments) => report(images::commit::run(&arguments)),
        Command::Discard(arguments) => report(overlay::discard(&arguments)),
        Command::Rebase(arguments) => report(images::rebase::run(&arguments)),
        Command::Convert(arguments) => report(images::convert::run(&arguments)),
        Command::Completions(arguments) => report(completions::run(&arguments)),
        Command::Qsd(arguments) => qsd::main("diskfuse qsd", arguments.arguments),
    }
}

/// The last part of the name that the program was called by.
fn base_name(called: &OsString) -> &OsStr {
    Path::new(called).file_name().unwrap_or_default()
}

/// Says what went wrong, and makes it the exit code.
fn report(outcome: Result<ExitCode, Error>) -> ExitCode {
    outcome.unwrap_or_else(|error| {
        output::complain("diskfuse", error);
        ExitCode::FAILURE
    })
}
