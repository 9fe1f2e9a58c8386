//! `diskfuse top`: what goes through this user's exports just now, live in a terminal or as text. It asks the daemons from a thread
//! of its own, with a limit: one that does not answer must never stop the view, and nothing that a daemon says may do harm to
//! the terminal.

mod figures;
mod live;
mod table;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use crate::cli::TopArgs;
use crate::control::protocol::ExportStatus;
use crate::control::{self, client};
use crate::error::{Error, Result};
use crate::output;
use figures::{Order, Row, rows, sort};

/// The longest that daemons are waited for.
const PATIENCE: Duration = Duration::from_secs(2);

/// What all daemons said at one moment.
struct Look {
    /// Each with the moment when its daemon spoke, as another one may have taken longer.
    exports: Vec<(Instant, ExportStatus)>,
    /// A sentence about each daemon that did not answer, or why nobody could be asked.
    silent: Vec<String>,
}

/// What is to be shown.
struct News {
    rows: Vec<Row>,
    silent: Vec<String>,
}

/// Carries the command out; returns when the user has had enough, or when as many tables were printed as were asked for.
pub fn run(arguments: &TopArgs) -> Result<ExitCode> {
    let interval = Duration::from_millis((arguments.interval * 1000.0) as u64);
    let news = watch(control::folder(), interval)
        .map_err(Error::system("Could not start asking the daemons"))?;
    match arguments.batch {
        true => print(&news, arguments)?,
        false => live::run(&news, arguments.queues)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Looks once in an interval, for as long as somebody listens.
fn watch(folder: PathBuf, interval: Duration) -> std::io::Result<Receiver<News>> {
    let (sender, news) = channel();
    let thread = std::thread::Builder::new().name("looks".to_owned());
    thread.spawn(move || {
        let patience = (interval / 2).min(PATIENCE);
        let mut before: Option<Look> = None;
        loop {
            let began = Instant::now();
            let now = look(&folder, patience);
            // The first look has nothing to compare with, but who does not answer is known.
            let rows = before.as_ref().map(|before| rows(before, &now));
            let news = News {
                rows: rows.unwrap_or_default(),
                silent: now.silent.clone(),
            };
            if before.is_some() && sender.send(news).is_err() {
                return;
            }
            // The first figures come soon.
            let pause = if before.is_some() {
                interval
            } else {
                interval.min(Duration::from_secs(1))
            };
            before = Some(now);
            std::thread::sleep(pause.saturating_sub(began.elapsed()));
        }
    })?;
    Ok(news)
}

fn look(folder: &Path, patience: Duration) -> Look {
    let found = match client::find_within(folder, patience) {
        Ok(found) => found,
        Err(error) => {
            return Look {
                exports: Vec::new(),
                silent: vec![error.to_string()],
            };
        }
    };
    let exports = found.answering.into_iter().flat_map(|daemon| {
        let answered = daemon.answered;
        daemon
            .exports
            .into_iter()
            .map(move |export| (answered, export))
    });
    Look {
        exports: exports.collect(),
        silent: found.silent,
    }
}

/// `--batch`: a table for each look.
fn print(news: &Receiver<News>, arguments: &TopArgs) -> Result<()> {
    let count = arguments.count.unwrap_or(u32::MAX);
    for (number, mut news) in (0..count).zip(news) {
        for sentence in &news.silent {
            output::complain("diskfuse", sentence);
        }
        sort(&mut news.rows, Order::Name);
        let separator = if number > 0 { "\n" } else { "" };
        output::say(&format!(
            "{separator}{}",
            table::text(&news.rows, arguments.queues)
        ))?;
    }
    Ok(())
}
