//! A queue of tasks that wait for a condition to become true.
//!
//! Rules: register first ([`WaitQueue::listen`]), then test the condition, then await; whoever makes the condition
//! true wakes afterwards. Both sides pass a sequentially consistent fence, so one of them sees the other and no
//! wake is lost. Wakes go to the oldest first. A listener that is dropped after [`WaitQueue::wake_one`] chose it
//! passes the wake on. Without waiters a wake is a fence and a load; wakers run outside the lock.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use super::prim::{AtomicUsize, Mutex, Ordering, fence, lock};

/// Wakes tasks that wait for a condition. Use: `let l = q.listen(); if ok() { return } l.await;`.
#[derive(Debug, Default)]
pub struct WaitQueue {
    /// Length of `state.queue`, readable without the lock.
    waiting: AtomicUsize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Sorted by ticket.
    queue: VecDeque<Waiter>,
    next_ticket: u64,
}

#[derive(Debug)]
struct Waiter {
    ticket: u64,
    /// Chosen by `wake_one`, has not noticed yet.
    notified: bool,
    /// `None` until first polled, and once notified.
    waker: Option<Waker>,
}

impl State {
    fn position(&self, ticket: u64) -> Option<usize> {
        self.queue.binary_search_by_key(&ticket, |w| w.ticket).ok()
    }
}

impl WaitQueue {
    /// Registers before the condition is tested, so that no wake is lost.
    #[must_use = "register, test the condition, then await"]
    pub fn listen(&self) -> Listen<'_> {
        let ticket = {
            let mut state = lock(&self.state);
            let ticket = state.next_ticket;
            state.next_ticket += 1;
            state.queue.push_back(Waiter {
                ticket,
                notified: false,
                waker: None,
            });
            self.waiting.store(state.queue.len(), Ordering::Relaxed);
            ticket
        };
        fence(Ordering::SeqCst);
        Listen {
            queue: self,
            ticket,
            done: false,
        }
    }

    /// Wakes everyone registered, oldest first.
    #[inline]
    pub fn wake_all(&self) {
        fence(Ordering::SeqCst);
        if self.waiting.load(Ordering::Relaxed) != 0 {
            self.wake_all_slow();
        }
    }

    #[cold]
    fn wake_all_slow(&self) {
        // Whoever registers from now on tests its condition after the change that brought us here.
        let end = lock(&self.state).next_ticket;
        loop {
            let waiter = {
                let mut state = lock(&self.state);
                if state.queue.front().is_none_or(|w| w.ticket >= end) {
                    return;
                }
                let waiter = state.queue.pop_front();
                self.waiting.store(state.queue.len(), Ordering::Relaxed);
                waiter
            };
            if let Some(waker) = waiter.and_then(|w| w.waker) {
                waker.wake();
            }
        }
    }

    /// Wakes the oldest that was not chosen yet; true if there was one.
    #[inline]
    pub fn wake_one(&self) -> bool {
        fence(Ordering::SeqCst);
        self.waiting.load(Ordering::Relaxed) != 0 && self.wake_one_slow()
    }

    #[cold]
    fn wake_one_slow(&self) -> bool {
        let waker = {
            let mut state = lock(&self.state);
            let Some(waiter) = state.queue.iter_mut().find(|w| !w.notified) else {
                return false;
            };
            waiter.notified = true;
            waiter.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
        true
    }

    /// Whether nobody is registered.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) == 0
    }
}

/// One registration; completes when woken.
#[derive(Debug)]
#[must_use = "futures do nothing unless awaited"]
pub struct Listen<'a> {
    queue: &'a WaitQueue,
    ticket: u64,
    done: bool,
}

impl Future for Listen<'_> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let queue = self.queue;
        let mut state = lock(&queue.state);
        if let Some(at) = state.position(self.ticket) {
            if !state.queue[at].notified {
                let waker = &mut state.queue[at].waker;
                if waker.as_ref().is_none_or(|w| !w.will_wake(cx.waker())) {
                    *waker = Some(cx.waker().clone());
                }
                return Poll::Pending;
            }
            state.queue.remove(at);
            queue.waiting.store(state.queue.len(), Ordering::Relaxed);
        }
        drop(state);
        self.done = true;
        Poll::Ready(())
    }
}

impl Drop for Listen<'_> {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        let unused_wake = {
            let mut state = lock(&self.queue.state);
            // Not in the queue: `wake_all` was for everybody, nothing to pass on.
            let Some(at) = state.position(self.ticket) else {
                return;
            };
            let waiter = state.queue.remove(at);
            self.queue.waiting.store(state.queue.len(), Ordering::Relaxed);
            waiter.is_some_and(|w| w.notified)
        };
        if unused_wake {
            self.queue.wake_one();
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::AtomicU32;
    use std::task::Wake;

    #[derive(Default)]
    struct Count(AtomicU32);
    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn poll(listen: &mut Listen<'_>, count: &Arc<Count>) -> bool {
        let waker = Waker::from(Arc::clone(count));
        Pin::new(listen).poll(&mut Context::from_waker(&waker)).is_ready()
    }

    #[test]
    fn wake_one_goes_to_the_oldest_and_survives_its_drop() {
        let queue = WaitQueue::default();
        let counts: [Arc<Count>; 3] = Default::default();
        let (mut a, mut b, mut c) = (queue.listen(), queue.listen(), queue.listen());
        for (listen, count) in [(&mut a, &counts[0]), (&mut b, &counts[1]), (&mut c, &counts[2])] {
            assert!(!poll(listen, count));
        }
        assert!(queue.wake_one());
        assert_eq!(counts[0].0.load(Ordering::SeqCst), 1);
        drop(a);
        assert_eq!(counts[1].0.load(Ordering::SeqCst), 1, "the unused wake moves on");
        assert!(poll(&mut b, &counts[1]));
        assert!(!poll(&mut c, &counts[2]));
        drop(b);
        assert_eq!(counts[2].0.load(Ordering::SeqCst), 0, "a used wake does not");
        drop(c);
        assert!(queue.is_empty());
        assert!(!queue.wake_one());
    }

    #[test]
    fn a_wake_between_listen_and_first_poll_counts() {
        let queue = WaitQueue::default();
        let count = Arc::<Count>::default();
        let mut before = queue.listen();
        queue.wake_all();
        let mut after = queue.listen();
        assert!(poll(&mut before, &count));
        assert!(!poll(&mut after, &count));
    }
}
