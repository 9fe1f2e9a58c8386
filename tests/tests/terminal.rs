//! What `top` leaves of the terminal that it has filled: everything as it was, however it ends.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::time::Duration;

use diskfuse_e2e::{Running, Terminal, Tool, diskfuse, once, wait_until};
use rustix::process::Signal;

const LIMIT: Duration = Duration::from_secs(10);

/// A terminal whose owner has settings of his own, with the view on it.
fn viewed() -> (Terminal, Running) {
    let mut terminal = Terminal::open();
    let top = Tool::on_terminal(&terminal, diskfuse()).arg("top").start();
    wait_until("the view is there", LIMIT, || {
        terminal.shown().contains("diskfuse top") && !terminal.is_for_lines()
    });
    (terminal, top)
}

#[test]
fn a_signal_ends_the_view_and_the_terminal_is_as_before() {
    for signal in [Signal::TERM, Signal::HUP, Signal::INT] {
        once(|_| {
            let before = format!("{:?}", Terminal::open().settings());
            let (mut terminal, mut top) = viewed();
            assert_ne!(format!("{:?}", terminal.settings()), before);
            top.signal(signal);
            wait_until("the view has ended", LIMIT, || {
                terminal.shown();
                !top.is_alive()
            });
            assert_eq!(top.finish(LIMIT).code(), 0);
            assert_eq!(format!("{:?}", terminal.settings()), before);
            let shown = terminal.shown();
            let (_, after) = shown.split_once("\u{1b}[?1049h").expect("its own screen");
            let (_, after) = after.split_once("\u{1b}[?1049l").expect("the old screen");
            assert_eq!(after, "\u{1b}[?25h", "the cursor, and nothing else");
        });
    }
}

#[test]
fn a_view_whose_terminal_has_gone_ends() {
    once(|_| {
        let (terminal, top) = viewed();
        drop(terminal);
        // Not by a signal: neither by its own panic nor by one of ours.
        top.finish(LIMIT).code();
    });
}
