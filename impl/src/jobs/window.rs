//! Chunks of a job in flight: issued and settled in order of offset, completed in any order.
//!
//! Rules: the futures run to their end (whoever drops a window has emptied it); bookkeeping sees the chunks in
//! order, so progress is a prefix and the first error is the one with the smallest offset.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::pin::pin;
use std::task::{Context, Poll};

use crate::env::Fut;
use crate::error::Errno;

/// What became of a stretch of the device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Chunk {
    /// Start, bytes.
    pub(crate) offset: u64,
    /// Length, bytes.
    pub(crate) bytes: u64,
    /// Has to be copied; false: there is nothing to do.
    pub(crate) copy: bool,
}

enum State<'a> {
    Running(Fut<'a, Result<(), Errno>>),
    Done(Result<(), Errno>),
}

/// At most `width` chunks in flight.
pub(crate) struct Window<'a> {
    chunks: VecDeque<(Chunk, State<'a>)>,
    width: usize,
}

impl<'a> Window<'a> {
    pub(crate) fn new(width: usize) -> Window<'a> {
        assert!(width > 0);
        Window {
            chunks: VecDeque::with_capacity(width),
            width,
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    pub(crate) fn is_full(&self) -> bool {
        self.chunks.len() >= self.width
    }

    /// A chunk that is already decided.
    pub(crate) fn push_done(&mut self, chunk: Chunk, result: Result<(), Errno>) {
        self.chunks.push_back((chunk, State::Done(result)));
    }

    /// A chunk in flight.
    pub(crate) fn push(&mut self, chunk: Chunk, work: Fut<'a, Result<(), Errno>>) {
        self.chunks.push_back((chunk, State::Running(work)));
    }

    /// Waits for the chunk with the smallest offset, while all make progress.
    pub(crate) async fn settle_first(&mut self) -> Option<(Chunk, Result<(), Errno>)> {
        if self.chunks.is_empty() {
            return None;
        }
        poll_fn(|cx| {
            self.advance(cx);
            if matches!(self.chunks[0].1, State::Done(_)) {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        })
        .await;
        match self.chunks.pop_front() {
            Some((chunk, State::Done(result))) => Some((chunk, result)),
            _ => unreachable!("the first chunk is done"),
        }
    }

    fn advance(&mut self, cx: &mut Context<'_>) {
        for (_, state) in &mut self.chunks {
            if let State::Running(work) = state
                && let Poll::Ready(result) = work.as_mut().poll(cx)
            {
                *state = State::Done(result);
            }
        }
    }

    /// Runs something else to its end while the chunks in flight go on: they may hold what it waits for.
    pub(crate) async fn beside<T>(&mut self, other: impl Future<Output = T>) -> T {
        let mut other = pin!(other);
        poll_fn(|cx| {
            self.advance(cx);
            other.as_mut().poll(cx)
        })
        .await
    }

    /// Waits for all, whatever comes of them.
    pub(crate) async fn drain(&mut self) {
        while self.settle_first().await.is_some() {}
    }
}
