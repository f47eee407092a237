//! Every interleaving of the synchronisation protocols, by loom:
//! `RUSTFLAGS="--cfg loom" cargo test -p blkcheck-impl --test loom --release`.
//!
//! Each model asserts its safety property inside, and loom itself reports a deadlock where a wake is lost.
#![cfg(loom)]

use std::future::Future;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use blkcheck_impl::sync::{FreezeCount, Gate, GraphLock, InFlight, MainLock, WaitQueue};
use loom::future::block_on;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use loom::thread;

/// All interleavings with at most `preemptions` forced switches: what is too large to finish without a bound.
fn bounded(preemptions: usize, model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(model);
}

/// What drain and requests share.
#[derive(Default)]
struct Drained {
    gate: Gate,
    idle: WaitQueue,
    /// True between the drainer's return and the end of its section.
    section: AtomicBool,
    served: AtomicU32,
}

impl Drained {
    fn request(&self) {
        block_on(self.gate.enter(&self.idle));
        assert!(
            !self.section.load(Ordering::SeqCst),
            "a request runs inside a drained section"
        );
        self.served.fetch_add(1, Ordering::SeqCst);
        self.gate.exit(&self.idle);
    }

    fn drain(&self) {
        self.gate.close();
        block_on(async {
            while self.gate.in_flight() > 0 {
                let progress = self.idle.listen();
                if self.gate.in_flight() == 0 {
                    break;
                }
                progress.await;
            }
        });
        self.section.store(true, Ordering::SeqCst);
        let served = self.served.load(Ordering::SeqCst);
        thread::yield_now();
        assert_eq!(
            served,
            self.served.load(Ordering::SeqCst),
            "a request was served inside a drained section"
        );
        self.section.store(false, Ordering::SeqCst);
        self.gate.open();
    }
}

#[test]
fn drain_excludes_requests_and_loses_no_wake() {
    bounded(3, || {
        let shared = Arc::new(Drained::default());
        let guest = {
            let shared = Arc::clone(&shared);
            thread::spawn(move || shared.request())
        };
        shared.drain();
        guest.join().unwrap();
        assert_eq!(shared.served.load(Ordering::SeqCst), 1);
        assert_eq!(shared.gate.in_flight(), 0);
    });
}

#[test]
fn drain_against_two_requests() {
    bounded(2, || {
        let shared = Arc::new(Drained::default());
        let guests: Vec<_> = (0..2)
            .map(|_| {
                let shared = Arc::clone(&shared);
                thread::spawn(move || shared.request())
            })
            .collect();
        shared.drain();
        for guest in guests {
            guest.join().unwrap();
        }
        assert_eq!(shared.served.load(Ordering::SeqCst), 2);
    });
}

#[test]
fn back_to_back_sections_let_no_parked_request_slip_in() {
    bounded(3, || {
        let shared = Arc::new(Drained::default());
        let guest = {
            let shared = Arc::clone(&shared);
            thread::spawn(move || shared.request())
        };
        shared.drain();
        shared.drain();
        guest.join().unwrap();
        assert_eq!(shared.served.load(Ordering::SeqCst), 1);
    });
}

/// The count and the queue without a gate, as nodes use them.
#[test]
fn in_flight_handshake_loses_no_wake() {
    bounded(3, || {
        let shared = Arc::new((InFlight::default(), WaitQueue::default()));
        shared.0.begin();
        shared.0.begin();
        let workers: Vec<_> = (0..2)
            .map(|_| {
                let shared = Arc::clone(&shared);
                thread::spawn(move || {
                    shared.0.end();
                    shared.1.wake_all();
                })
            })
            .collect();
        block_on(async {
            while shared.0.count() > 0 {
                let progress = shared.1.listen();
                if shared.0.count() == 0 {
                    break;
                }
                progress.await;
            }
        });
        assert_eq!(shared.0.count(), 0);
        for worker in workers {
            worker.join().unwrap();
        }
    });
}

/// A listener chosen by `wake_one` that goes away at the same moment must hand its wake to the other.
#[test]
fn a_dropped_listener_passes_its_wake_on() {
    loom::model(|| {
        let shared = Arc::new(WaitQueue::default());
        let quitter = {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                let mut listen = pin!(shared.listen());
                // Polled once; whether it was woken by then or not, it goes away without caring.
                listen
                    .as_mut()
                    .poll(&mut Context::from_waker(Waker::noop()))
                    .is_ready()
            })
        };
        let stayer = shared.listen();
        let waker = {
            let shared = Arc::clone(&shared);
            thread::spawn(move || shared.wake_one())
        };
        let used = quitter.join().unwrap();
        waker.join().unwrap();
        if used {
            // The one wake was consumed; the stayer needs its own.
            shared.wake_one();
        }
        block_on(stayer);
    });
}

/// What the graph lock protects.
#[derive(Default)]
struct Graph {
    lock: GraphLock,
    readers: AtomicU32,
    writing: AtomicBool,
}

impl Graph {
    fn read(&self) {
        block_on(self.lock.read());
        self.readers.fetch_add(1, Ordering::SeqCst);
        assert!(!self.writing.load(Ordering::SeqCst), "a reader beside a writer");
        self.readers.fetch_sub(1, Ordering::SeqCst);
        self.lock.end_read();
    }

    fn write(&self) {
        block_on(self.lock.write());
        assert!(!self.writing.swap(true, Ordering::SeqCst), "two writers");
        assert_eq!(self.readers.load(Ordering::SeqCst), 0, "a writer beside a reader");
        self.writing.store(false, Ordering::SeqCst);
        self.lock.end_write();
    }
}

#[test]
fn graph_lock_reader_against_writer() {
    loom::model(|| {
        let graph = Arc::new(Graph::default());
        let reader = {
            let graph = Arc::clone(&graph);
            thread::spawn(move || graph.read())
        };
        graph.write();
        reader.join().unwrap();
        assert_eq!(graph.lock.readers(), 0);
        assert!(!graph.lock.write_held());
    });
}

#[test]
fn graph_lock_two_readers_against_writer() {
    bounded(2, || {
        let graph = Arc::new(Graph::default());
        let readers: Vec<_> = (0..2)
            .map(|_| {
                let graph = Arc::clone(&graph);
                thread::spawn(move || graph.read())
            })
            .collect();
        graph.write();
        for reader in readers {
            reader.join().unwrap();
        }
    });
}

#[test]
fn graph_lock_two_writers_take_turns() {
    bounded(2, || {
        let graph = Arc::new(Graph::default());
        let other = {
            let graph = Arc::clone(&graph);
            thread::spawn(move || graph.write())
        };
        graph.write();
        graph.read();
        other.join().unwrap();
        assert!(!graph.lock.write_held());
    });
}

#[test]
fn main_lock_excludes_and_hands_over() {
    loom::model(|| {
        let shared = Arc::new((MainLock::default(), AtomicBool::new(false)));
        let section = |shared: &(MainLock, AtomicBool)| {
            block_on(shared.0.lock());
            assert!(!shared.1.swap(true, Ordering::SeqCst), "two holders");
            shared.1.store(false, Ordering::SeqCst);
            shared.0.unlock();
        };
        let other = {
            let shared = Arc::clone(&shared);
            thread::spawn(move || section(&shared))
        };
        section(&shared);
        other.join().unwrap();
        assert!(!shared.0.held());
    });
}

/// A waiter that gives up while the lock is being handed to it must hand it on.
#[test]
fn main_lock_survives_a_waiter_that_gives_up() {
    loom::model(|| {
        let main = Arc::new(MainLock::default());
        block_on(main.lock());
        let quitter = {
            let main = Arc::clone(&main);
            thread::spawn(move || {
                let mut lock = pin!(main.lock());
                if lock.as_mut().poll(&mut Context::from_waker(Waker::noop())) == Poll::Ready(()) {
                    main.unlock();
                }
            })
        };
        main.unlock();
        quitter.join().unwrap();
        assert!(!main.held());
        block_on(main.lock());
    });
}

#[test]
fn a_link_is_never_changed_while_frozen() {
    loom::model(|| {
        let shared = Arc::new((FreezeCount::default(), AtomicU32::new(0)));
        let freezers: Vec<_> = (0..2)
            .map(|_| {
                let shared = Arc::clone(&shared);
                thread::spawn(move || {
                    if shared.0.try_freeze() {
                        let link = shared.1.load(Ordering::SeqCst);
                        assert_eq!(link % 2, 0, "frozen in the middle of a change");
                        assert_eq!(link, shared.1.load(Ordering::SeqCst), "a frozen link changed");
                        shared.0.thaw();
                    }
                })
            })
            .collect();
        if shared.0.try_change() {
            shared.1.fetch_add(1, Ordering::SeqCst);
            shared.1.fetch_add(1, Ordering::SeqCst);
            shared.0.changed();
        }
        for freezer in freezers {
            freezer.join().unwrap();
        }
        assert!(!shared.0.get());
    });
}
