//! Reading what takes more than moving bytes: tables that are not in memory, compressed clusters, a backing file that is
//! shorter than the disk, and any mixture. It must never keep a hold while it waits for a table.

use diskfuse_block::{Node, Result, io};
use diskfuse_ring::Buf;

use super::Qcow2Node;
use super::pieces::{join_pieces, split_pieces, together};
use super::walk::{Place, Run};

/// Runs that are read at the same time.
const AT_ONCE: usize = 16;

/// Consecutive runs, and why there are no more of them.
pub(super) struct Plan {
    pub(super) runs: Vec<Run>,
    /// Bytes of all of them.
    pub(super) len: u64,
    /// The table of what follows is not in memory.
    pub(super) missing: bool,
}

impl Qcow2Node {
    /// Fills the window of `buf` with what the disk holds from `offset` on; past its end that is what the tables say.
    pub(super) async fn fill(&self, offset: u64, mut buf: Buf) -> (Result<()>, Buf) {
        let window = buf.window();
        let mut done = 0;
        let mut outcome = Ok(());
        while done < window.len() {
            let at = offset + done as u64;
            let left = (window.len() - done) as u64;
            let hold = self.meta.enter();
            let plan = match self.plan(at, left, |_| true) {
                Ok(plan) => plan,
                Err(error) => {
                    outcome = Err(self.found(error).await);
                    break;
                }
            };
            let start = window.start + done;
            done += plan.len as usize;
            buf.set_window(start..window.start + done);
            (outcome, buf) = self.read_runs(at, &plan.runs, buf).await;
            drop(hold);
            if outcome.is_ok() && plan.missing {
                outcome = self.load(at + plan.len).await;
            }
            if outcome.is_err() {
                break;
            }
        }
        buf.set_window(window);
        (outcome, buf)
    }

    /// The runs from `at` on, as long as they are wanted and their tables are in memory.
    pub(super) fn plan(&self, at: u64, len: u64, wanted: impl Fn(Run) -> bool) -> Result<Plan> {
        let mut plan = Plan {
            runs: Vec::new(),
            len: 0,
            missing: false,
        };
        while plan.len < len && plan.runs.len() < AT_ONCE {
            match self.run(at + plan.len, len - plan.len) {
                Ok(Some(run)) if wanted(run) => {
                    plan.len += run.len;
                    plan.runs.push(run);
                }
                Ok(Some(_)) => break,
                Ok(None) => {
                    plan.missing = true;
                    break;
                }
                // What comes before it is not to blame.
                Err(_) if plan.len > 0 => break,
                Err(error) => return Err(error),
            }
        }
        Ok(plan)
    }

    /// Reads consecutive runs, all at once, into the window of `buf`, which is just as long.
    async fn read_runs(&self, at: u64, runs: &[Run], buf: Buf) -> (Result<()>, Buf) {
        match runs {
            [] => (Ok(()), buf),
            [run] => self.read_run(at, *run, buf).await,
            runs => {
                let window = buf.window();
                let pieces = split_pieces(buf, runs.iter().map(|run| run.len as usize));
                let mut from = at;
                let reads = runs.iter().zip(pieces).map(|(run, piece)| {
                    let start = from;
                    from += run.len;
                    self.read_run(start, *run, piece)
                });
                join_pieces(window, together(reads).await)
            }
        }
    }

    /// Reads one run into the window of `buf`, which is just as long.
    async fn read_run(&self, at: u64, run: Run, mut buf: Buf) -> (Result<()>, Buf) {
        match run.place {
            Place::Data { host, .. } => read_clipped(&*self.data, host, buf).await,
            Place::Compressed { word, range } => {
                let result = self
                    .read_compressed(at, word, range, buf.as_mut_slice())
                    .await;
                (result, buf)
            }
            Place::Unallocated => match &self.backing {
                Some(backing) => read_clipped(&**backing, at, buf).await,
                None => zeroed(buf),
            },
            Place::Zero => zeroed(buf),
        }
    }
}

fn zeroed(mut buf: Buf) -> (Result<()>, Buf) {
    buf.as_mut_slice().fill(0);
    (Ok(()), buf)
}

/// Reads from a node; what is past its end reads as zeroes.
pub(super) async fn read_clipped(node: &dyn Node, offset: u64, mut buf: Buf) -> (Result<()>, Buf) {
    let window = buf.window();
    let there = node.size().saturating_sub(offset);
    let there = usize::try_from(there).map_or(window.len(), |n| n.min(window.len()));
    buf.as_mut_slice()[there..].fill(0);
    if there == 0 {
        return (Ok(()), buf);
    }
    buf.set_window(window.start..window.start + there);
    let (result, mut buf) = io::read(node, offset, buf).await;
    buf.set_window(window);
    (result, buf)
}
