//! Doing several things at once with one buffer: it is cut into pieces that share nothing, each is moved by a future of
//! its own, and the buffer is put together again. Whatever happens, the whole buffer comes back.

use std::future::{Future, poll_fn};
use std::ops::Range;
use std::pin::Pin;
use std::task::Poll;

use diskfuse_block::Result;
use diskfuse_ring::Buf;

/// Cuts the window of `buf` into consecutive pieces of these lengths, which must be as long as the window together.
pub(super) fn split_pieces(mut buf: Buf, lens: impl Iterator<Item = usize>) -> Vec<Buf> {
    let mut pieces = Vec::new();
    // Where the window of the next piece begins in its bounds: after the first cut at their beginning.
    let mut start = buf.window().start;
    let mut lens = lens.peekable();
    while let Some(len) = lens.next() {
        let window = start..start + len;
        if lens.peek().is_none() {
            pieces.push(buf.with_window(window));
            break;
        }
        let rest = buf.split_off(window.end);
        pieces.push(buf.with_window(window));
        buf = rest;
        start = 0;
    }
    pieces
}

/// Puts the pieces of one buffer, which are in order, together again and opens `window`. The first error counts.
pub(super) fn join_pieces(
    window: Range<usize>,
    pieces: Vec<(Result<()>, Buf)>,
) -> (Result<()>, Buf) {
    let joined = pieces
        .into_iter()
        .reduce(|(outcome, mut buf), (result, piece)| {
            let joined = buf.join(piece);
            debug_assert!(joined.is_ok(), "the pieces are those of one buffer");
            (outcome.and(result), buf)
        });
    // There were pieces: whoever cuts nothing has nothing to put together.
    let Some((outcome, buf)) = joined else {
        unreachable!("no pieces")
    };
    (outcome, buf.with_window(window))
}

/// Runs futures at the same time and returns what they answer, in their order.
pub(super) async fn together<T, F: Future<Output = T>>(futures: impl Iterator<Item = F>) -> Vec<T> {
    enum Stage<T, F> {
        Running(Pin<Box<F>>),
        Done(T),
    }
    let mut stages: Vec<Stage<T, F>> = futures.map(|f| Stage::Running(Box::pin(f))).collect();
    poll_fn(|cx| {
        let mut running = false;
        for stage in &mut stages {
            if let Stage::Running(future) = stage {
                match future.as_mut().poll(cx) {
                    Poll::Ready(output) => *stage = Stage::Done(output),
                    Poll::Pending => running = true,
                }
            }
        }
        if running {
            Poll::Pending
        } else {
            Poll::Ready(())
        }
    })
    .await;
    let outputs = stages.into_iter().filter_map(|stage| match stage {
        Stage::Done(output) => Some(output),
        Stage::Running(_) => None,
    });
    outputs.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_comes_back_whole() {
        let mut buf = Buf::new(10_000).unwrap().with_window(100..9100);
        buf.as_mut_slice().fill(7);
        let mut pieces = split_pieces(buf, [1000, 3000, 5000].into_iter());
        let lens: Vec<_> = pieces.iter().map(Buf::len).collect();
        assert_eq!(lens, [1000, 3000, 5000]);
        pieces[1].as_mut_slice().fill(8);
        let pieces = pieces.into_iter().map(|piece| (Ok(()), piece));
        let (result, buf) = join_pieces(100..9100, pieces.collect());
        result.unwrap();
        assert_eq!(buf.window(), 100..9100);
        let expected = [vec![7; 1000], vec![8; 3000], vec![7; 5000]].concat();
        assert_eq!(buf.as_slice(), expected);
    }
}
