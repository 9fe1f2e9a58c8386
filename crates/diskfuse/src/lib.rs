//! The command line of the program, as a library: the program parses it, and `crates/manual` makes the man pages of it. It
//! must never hold anything else.

pub mod cli;
