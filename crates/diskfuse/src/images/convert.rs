//! `diskfuse convert`: an image copied into a new one, by several threads.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use diskfuse_image::convert::{Conversion, Source, Sparse};
use diskfuse_image::copy::Copy;
use diskfuse_image::create::NewImage;
use diskfuse_image::options::NewImageOptions;
use diskfuse_ring::{Config, Ring};

use super::format_of_new;
use super::progress::Progress;
use crate::cli::ConvertArgs;
use crate::error::{Error, Result};

/// Threads when nothing is said: one per CPU, but more than this seldom pay.
const MOST_BY_DEFAULT: usize = 4;
/// How often the progress bar is told.
const TICK: Duration = Duration::from_millis(100);

/// Carries the command out.
pub fn run(arguments: &ConvertArgs) -> Result<ExitCode> {
    let format = format_of_new(&arguments.target, arguments.output_format);
    let mut options = NewImageOptions::default();
    for text in &arguments.options {
        options.parse(text, format)?;
    }
    let source = Source {
        path: &arguments.source,
        format: arguments.format,
        snapshot: arguments.snapshot.as_deref(),
        share: arguments.force_share,
    };
    let target = NewImage {
        path: arguments.target.clone(),
        format,
        options,
        force: arguments.force,
        unchecked_backing: false,
    };
    let sparse = match arguments.sparse {
        None => Sparse::Auto,
        Some(0) => Sparse::Never,
        Some(unit) => Sparse::Unit(unit),
    };
    let ring = Ring::new(&Config::default())?;
    let start = Conversion::start(&source, &target, arguments.compress, sparse);
    let conversion = ring.block_on(start)?;
    let threads = arguments.threads.map_or_else(default_threads, usize::from);
    carry_out(&conversion.copy, threads, usize::from(arguments.in_flight))?;
    ring.block_on(conversion.finish())?;
    Ok(ExitCode::SUCCESS)
}

/// One per CPU, within reason.
pub fn default_threads() -> usize {
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    cpus.min(MOST_BY_DEFAULT)
}

/// Works on a copy with so many threads until it is done, and shows how far it is.
pub fn carry_out(copy: &Arc<Copy>, threads: usize, in_flight: usize) -> Result<()> {
    let progress = Progress::bytes(copy.total());
    let mut outcome = Ok(());
    let waiting = std::thread::current();
    std::thread::scope(|scope| {
        let work = || -> Result<()> {
            let outcome = Ring::new(&Config::default())
                .map_err(Error::from)
                .and_then(|ring| Ok(ring.block_on(copy.work(in_flight))?));
            waiting.unpark();
            outcome
        };
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        while workers.iter().any(|worker| !worker.is_finished()) {
            progress.set(copy.done(), copy.total());
            std::thread::park_timeout(TICK);
        }
        for worker in workers {
            let ended = worker.join();
            let panicked = |_| Err(Error::refused("a thread that copied has panicked"));
            let result = ended.unwrap_or_else(panicked);
            outcome = std::mem::replace(&mut outcome, Ok(())).and(result);
        }
    });
    outcome
}
