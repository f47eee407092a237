//! Work in flight of one block-copy call: at most so many pieces, finished in any order.
//!
//! Rules: the pieces go on whenever the call waits for anything at all through [`Pool::beside`]; nothing is dropped midway,
//! so whoever drops a pool has drained it. The first failure is kept, and nothing more should be started then.

use std::future::poll_fn;
use std::pin::pin;
use std::task::{Context, Poll};

use super::Failure;
use crate::env::Fut;

/// Pieces in flight.
pub(super) struct Pool<'a> {
    running: Vec<Fut<'a, Result<(), Failure>>>,
    width: usize,
    failure: Option<Failure>,
}

impl<'a> Pool<'a> {
    pub(super) fn new(width: usize) -> Pool<'a> {
        assert!(width > 0, "a pool has room");
        Pool {
            running: Vec::new(),
            width,
            failure: None,
        }
    }

    /// The first failure of a piece.
    pub(super) fn failure(&self) -> Option<Failure> {
        self.failure
    }

    pub(super) fn is_empty(&self) -> bool {
        self.running.is_empty()
    }

    /// One more piece; there is room.
    pub(super) fn push(&mut self, piece: Fut<'a, Result<(), Failure>>) {
        assert!(self.running.len() < self.width, "the caller waited for room");
        self.running.push(piece);
    }

    fn advance(&mut self, cx: &mut Context<'_>) {
        let failure = &mut self.failure;
        self.running.retain_mut(|piece| match piece.as_mut().poll(cx) {
            Poll::Pending => true,
            Poll::Ready(result) => {
                *failure = failure.or(result.err());
                false
            }
        });
    }

    /// Waits for something while the pieces go on.
    pub(super) async fn beside<T>(&mut self, other: impl Future<Output = T>) -> T {
        let mut other = pin!(other);
        poll_fn(|cx| {
            self.advance(cx);
            other.as_mut().poll(cx)
        })
        .await
    }

    /// Waits until another piece may start.
    pub(super) async fn room(&mut self) {
        self.until_fewer_than(self.width).await;
    }

    /// Waits for all pieces.
    pub(super) async fn drain(&mut self) {
        self.until_fewer_than(1).await;
    }

    async fn until_fewer_than(&mut self, count: usize) {
        poll_fn(|cx| {
            self.advance(cx);
            if self.running.len() < count {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        })
        .await;
    }
}
