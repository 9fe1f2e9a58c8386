//! What is said on standard output and standard error. A reader that has gone away is never a reason to fail: the
//! work is done whether or not somebody reads about it.

use std::io::Write;

use crate::error::{Error, Result};

/// Writes `text` to standard output.
///
/// # Errors
/// It could not be written, for any other reason than that the reader has gone away (`| head -1`).
pub fn say(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Error::system("Could not write to standard output")(error))
        }
        _ => Ok(()),
    }
}

/// Writes a line to standard error, after the name of the program.
pub fn complain(name: &str, line: impl std::fmt::Display) {
    // There is nowhere left to say that it failed.
    let _ = writeln!(std::io::stderr(), "{name}: {line}");
}
