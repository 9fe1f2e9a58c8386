//! Makes the man pages: `cargo manual FOLDER` writes one file for each command, from the description that the command line is
//! parsed by, and those that are written by hand in `docs/man`. It must never be needed to run the program.

mod markdown;
mod pages;

use std::path::PathBuf;
use std::process::ExitCode;

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    let (Some(folder), None) = (arguments.next().map(PathBuf::from), arguments.next()) else {
        eprintln!("Usage: cargo manual FOLDER    writes the man pages there");
        return ExitCode::from(2);
    };
    match pages::write(&folder) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!(
                "Could not write the man pages to '{}': {error}",
                folder.display()
            );
            ExitCode::FAILURE
        }
    }
}
