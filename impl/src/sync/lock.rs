//! The two locks of a layer: the graph lock (readers and writers) and the FIFO mutex of the main context.
//!
//! Rules (graph.md 6): a writer gets in when nobody reads, and lets readers in as long as it waits, since it may depend
//! on them. Both locks are async, allocate nothing when uncontended, and are released by plain calls; the layer wraps
//! them in guards.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use super::prim::{AtomicU32, Mutex, Ordering, lock};
use super::wait::WaitQueue;

/// The graph lock: many readers (requests, walks), one writer (graph change). A writer lets readers in while it waits,
/// and none once it has the lock; that new requests do not starve it is the job of the drain around it.
#[derive(Debug, Default)]
pub struct GraphLock {
    /// How many read, or [`WRITER`].
    state: AtomicU32,
    /// Readers that found a writer.
    readers_waiting: WaitQueue,
    /// The writer that found readers.
    writer_waiting: WaitQueue,
    /// Writers take turns.
    writers: MainLock,
}

/// A writer has the lock.
const WRITER: u32 = u32::MAX;

impl GraphLock {
    /// Takes the lock for reading if no writer has it. Read locks nest.
    #[inline]
    pub fn try_read(&self) -> bool {
        let mut now = self.state.load(Ordering::SeqCst);
        while now != WRITER {
            match self
                .state
                .compare_exchange(now, now + 1, Ordering::SeqCst, Ordering::SeqCst)
            {
                Ok(_) => return true,
                Err(seen) => now = seen,
            }
        }
        false
    }

    /// Takes the lock for reading.
    pub async fn read(&self) {
        while !self.try_read() {
            let released = self.readers_waiting.listen();
            if self.try_read() {
                break;
            }
            released.await;
        }
    }

    /// Gives one read lock back.
    ///
    /// # Panics
    /// When nobody reads.
    #[inline]
    pub fn end_read(&self) {
        let before = self.state.fetch_sub(1, Ordering::SeqCst);
        assert!(before != 0 && before != WRITER, "read lock released twice");
        if before == 1 {
            self.writer_waiting.wake_all();
        }
    }

    /// Takes the lock for writing, once all readers are gone.
    pub async fn write(&self) {
        self.writers.lock().await;
        // Gives the turn to the next writer, should this future be dropped before it has the lock.
        let mut turn = Turn {
            lock: self,
            taken: false,
        };
        while !self.try_write() {
            let fewer = self.writer_waiting.listen();
            if self.try_write() {
                break;
            }
            fewer.await;
        }
        turn.taken = true;
    }

    fn try_write(&self) -> bool {
        self.state
            .compare_exchange(0, WRITER, Ordering::SeqCst, Ordering::SeqCst)
            .is_ok()
    }

    /// Gives the write lock back: wakes all readers, oldest first, then the next writer.
    ///
    /// # Panics
    /// When nobody has it.
    pub fn end_write(&self) {
        let before = self.state.swap(0, Ordering::SeqCst);
        assert_eq!(before, WRITER, "write lock is not held");
        self.readers_waiting.wake_all();
        self.writers.unlock();
    }

    /// Whether a writer has the lock.
    #[must_use]
    pub fn write_held(&self) -> bool {
        self.state.load(Ordering::SeqCst) == WRITER
    }

    /// Read locks held.
    #[must_use]
    pub fn readers(&self) -> u32 {
        match self.state.load(Ordering::SeqCst) {
            WRITER => 0,
            readers => readers,
        }
    }
}

struct Turn<'a> {
    lock: &'a GraphLock,
    taken: bool,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if !self.taken {
            self.lock.writers.unlock();
        }
    }
}

/// FIFO mutex of the main context: handed directly to the oldest waiter, never snatched.
#[derive(Debug, Default)]
pub struct MainLock {
    state: Mutex<Turns>,
}

#[derive(Debug, Default)]
struct Turns {
    held: bool,
    /// Sorted by ticket; the first may have been granted the lock without having noticed.
    queue: VecDeque<Waiting>,
    next_ticket: u64,
}

#[derive(Debug)]
struct Waiting {
    ticket: u64,
    granted: bool,
    waker: Option<Waker>,
}

impl MainLock {
    /// Waits for the lock; the order is that of the first polls.
    pub fn lock(&self) -> Acquire<'_> {
        Acquire {
            lock: self,
            ticket: None,
        }
    }

    /// Hands the lock to the oldest waiter.
    ///
    /// # Panics
    /// When it is not held.
    pub fn unlock(&self) {
        let waker = {
            let mut turns = lock(&self.state);
            assert!(turns.held, "main lock is not held");
            let Some(next) = turns.queue.front_mut() else {
                turns.held = false;
                return;
            };
            assert!(!next.granted, "main lock released twice");
            next.granted = true;
            next.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Whether somebody has it.
    #[must_use]
    pub fn held(&self) -> bool {
        lock(&self.state).held
    }
}

/// A place in the queue for the main lock.
#[derive(Debug)]
#[must_use = "futures do nothing unless awaited"]
pub struct Acquire<'a> {
    lock: &'a MainLock,
    /// `None` before the first poll and once acquired.
    ticket: Option<u64>,
}

impl Future for Acquire<'_> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let main = self.lock;
        let mut turns = lock(&main.state);
        let Some(ticket) = self.ticket else {
            if !turns.held {
                turns.held = true;
                return Poll::Ready(());
            }
            let ticket = turns.next_ticket;
            turns.next_ticket += 1;
            turns.queue.push_back(Waiting {
                ticket,
                granted: false,
                waker: Some(cx.waker().clone()),
            });
            self.ticket = Some(ticket);
            return Poll::Pending;
        };
        let at = turns
            .queue
            .iter()
            .position(|w| w.ticket == ticket)
            .expect("a waiter stays queued until granted");
        if turns.queue[at].granted {
            turns.queue.remove(at);
            self.ticket = None;
            return Poll::Ready(());
        }
        turns.queue[at].waker = Some(cx.waker().clone());
        Poll::Pending
    }
}

impl Drop for Acquire<'_> {
    fn drop(&mut self) {
        let Some(ticket) = self.ticket else { return };
        let granted = {
            let mut turns = lock(&self.lock.state);
            let at = turns.queue.iter().position(|w| w.ticket == ticket);
            at.and_then(|at| turns.queue.remove(at))
                .is_some_and(|w| w.granted)
        };
        if granted {
            self.lock.unlock();
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn poll<F: Future + Unpin>(future: &mut F) -> bool {
        Pin::new(future)
            .poll(&mut Context::from_waker(Waker::noop()))
            .is_ready()
    }

    #[test]
    fn main_lock_is_fifo_and_survives_dropped_waiters() {
        let main = MainLock::default();
        assert!(poll(&mut main.lock()));
        let (mut a, mut b, mut c) = (main.lock(), main.lock(), main.lock());
        assert!(
            !poll(&mut b) && !poll(&mut a) && !poll(&mut c),
            "order of first polls: b, a, c"
        );
        main.unlock();
        assert!(!poll(&mut main.lock()), "handed over, not free");
        assert!(!poll(&mut a));
        drop(b);
        assert!(poll(&mut a), "a granted turn that is dropped goes to the next");
        drop(c);
        main.unlock();
        assert!(!main.held());
    }

    #[test]
    fn writer_waits_for_readers_and_lets_them_nest_meanwhile() {
        let graph = GraphLock::default();
        assert!(graph.try_read());
        let mut write = Box::pin(graph.write());
        assert!(!poll(&mut write));
        assert!(
            graph.try_read(),
            "a waiting writer does not block a nested read lock"
        );
        graph.end_read();
        assert!(!poll(&mut write));
        graph.end_read();
        assert!(poll(&mut write));
        let mut read = Box::pin(graph.read());
        assert!(!poll(&mut read));
        graph.end_write();
        assert!(poll(&mut read));
        assert_eq!(graph.readers(), 1);
    }

    #[test]
    fn a_dropped_writer_gives_its_turn_back() {
        let graph = GraphLock::default();
        assert!(graph.try_read());
        let mut first = Box::pin(graph.write());
        assert!(!poll(&mut first));
        let mut second = Box::pin(graph.write());
        assert!(!poll(&mut second));
        drop(first);
        graph.end_read();
        assert!(poll(&mut second));
    }
}
