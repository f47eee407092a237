//! The image lock (a FIFO async mutex) and a broadcast gate, for one thread.
//!
//! Rules: whoever changes metadata holds the image lock, also over awaits; data I/O goes without it. The lock is
//! handed over to the oldest waiter, so nobody is overtaken. Dropping a waiting future leaves the queue.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

#[derive(Debug, Default)]
struct LockState {
    held: bool,
    next_ticket: u64,
    /// The lock was handed to this waiter, which has not run yet; `held` stays true meanwhile.
    granted: Option<u64>,
    queue: VecDeque<(u64, Waker)>,
}

/// FIFO async mutex without content.
#[derive(Debug, Default)]
pub(super) struct ImageLock {
    state: RefCell<LockState>,
}

impl ImageLock {
    /// Waits for the lock.
    pub(super) fn lock(&self) -> Acquire<'_> {
        Acquire {
            lock: self,
            ticket: None,
        }
    }

    fn release(&self) {
        let next = {
            let mut state = self.state.borrow_mut();
            assert!(
                state.held && state.granted.is_none(),
                "release of a lock that is not held"
            );
            match state.queue.pop_front() {
                Some((ticket, waker)) => {
                    state.granted = Some(ticket);
                    Some(waker)
                }
                None => {
                    state.held = false;
                    None
                }
            }
        };
        if let Some(waker) = next {
            waker.wake();
        }
    }
}

/// Held image lock.
#[derive(Debug)]
pub(super) struct ImageGuard<'a> {
    lock: &'a ImageLock,
}

impl Drop for ImageGuard<'_> {
    fn drop(&mut self) {
        self.lock.release();
    }
}

/// Future of [`ImageLock::lock`].
#[derive(Debug)]
pub(super) struct Acquire<'a> {
    lock: &'a ImageLock,
    ticket: Option<u64>,
}

impl<'a> Future for Acquire<'a> {
    type Output = ImageGuard<'a>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<ImageGuard<'a>> {
        let lock = self.lock;
        let mut state = lock.state.borrow_mut();
        match self.ticket {
            None if !state.held => {
                state.held = true;
                Poll::Ready(ImageGuard { lock })
            }
            None => {
                let ticket = state.next_ticket;
                state.next_ticket += 1;
                state.queue.push_back((ticket, cx.waker().clone()));
                self.ticket = Some(ticket);
                Poll::Pending
            }
            Some(ticket) if state.granted == Some(ticket) => {
                state.granted = None;
                self.ticket = None;
                Poll::Ready(ImageGuard { lock })
            }
            Some(ticket) => {
                let mine = state
                    .queue
                    .iter_mut()
                    .find(|(t, _)| *t == ticket)
                    .expect("a waiter is queued");
                mine.1.clone_from(cx.waker());
                Poll::Pending
            }
        }
    }
}

impl Drop for Acquire<'_> {
    fn drop(&mut self) {
        let Some(ticket) = self.ticket else { return };
        let granted = {
            let mut state = self.lock.state.borrow_mut();
            if state.granted == Some(ticket) {
                state.granted = None;
                true
            } else {
                state.queue.retain(|(t, _)| *t != ticket);
                false
            }
        };
        if granted {
            self.lock.release();
        }
    }
}

/// Lets everybody through who waited before it was opened.
#[derive(Debug, Default)]
pub(super) struct Gate {
    generation: Cell<u64>,
    waiting: RefCell<Vec<Waker>>,
}

impl Gate {
    /// Waits for the next [`Gate::open`] from now on.
    pub(super) fn wait(&self) -> Wait<'_> {
        Wait {
            gate: self,
            generation: self.generation.get(),
        }
    }

    /// Wakes all that wait.
    pub(super) fn open(&self) {
        self.generation.set(self.generation.get() + 1);
        for waker in self.waiting.take() {
            waker.wake();
        }
    }
}

/// Future of [`Gate::wait`].
#[derive(Debug)]
pub(super) struct Wait<'a> {
    gate: &'a Gate,
    generation: u64,
}

impl Future for Wait<'_> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.gate.generation.get() != self.generation {
            return Poll::Ready(());
        }
        let mut waiting = self.gate.waiting.borrow_mut();
        if !waiting.iter().any(|w| w.will_wake(cx.waker())) {
            waiting.push(cx.waker().clone());
        }
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn poll<F: Future + Unpin>(future: &mut F) -> Poll<F::Output> {
        Pin::new(future).poll(&mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn lock_is_fifo_and_survives_cancelled_waiters() {
        let lock = ImageLock::default();
        let Poll::Ready(first) = poll(&mut lock.lock()) else {
            panic!("free lock")
        };
        let (mut a, mut b, mut c) = (lock.lock(), lock.lock(), lock.lock());
        assert!(poll(&mut a).is_pending() && poll(&mut b).is_pending() && poll(&mut c).is_pending());
        drop(b);
        drop(first);
        assert!(poll(&mut c).is_pending(), "a is before c");
        assert!(
            poll(&mut lock.lock()).is_pending(),
            "a newcomer does not overtake"
        );
        drop(a); // granted but never polled again
        let Poll::Ready(guard) = poll(&mut c) else {
            panic!("handed on to c")
        };
        drop(guard);
        assert!(poll(&mut lock.lock()).is_ready());
    }

    #[test]
    fn gate_opens_for_those_before_it() {
        let gate = Gate::default();
        let mut before = gate.wait();
        assert!(poll(&mut before).is_pending());
        gate.open();
        assert!(poll(&mut before).is_ready());
        assert!(poll(&mut gate.wait()).is_pending());
    }
}
