//! Tests of the executor.

use super::*;

type Log = Rc<RefCell<Vec<u32>>>;

/// A log, and a maker of tasks that write their name into it before each yield.
fn trace() -> (Log, impl Fn(u32, u32) -> Fut<'static, ()>) {
    let log = Rc::new(RefCell::new(Vec::new()));
    let shared = Rc::clone(&log);
    let task = move |name: u32, yields: u32| -> Fut<'static, ()> {
        let log = Rc::clone(&shared);
        Box::pin(async move {
            for _ in 0..yields {
                log.borrow_mut().push(name);
                yield_now().await;
            }
        })
    };
    (log, task)
}

#[test]
fn choice_zero_is_fair_round_robin() {
    let mut exec = Executor::new();
    let (log, task) = trace();
    for name in 0..3 {
        exec.spawn("t", task(name, 3));
    }
    while exec.ready() > 0 {
        exec.poll(0);
    }
    assert_eq!(*log.borrow(), [0, 1, 2, 0, 1, 2, 0, 1, 2]);
    assert_eq!(exec.live(), 0);
}

#[test]
fn picking_keeps_the_order_of_the_rest() {
    let mut exec = Executor::new();
    let (log, task) = trace();
    for name in 0..5 {
        exec.spawn("t", task(name, 1));
    }
    assert_eq!(exec.ready(), 5);
    exec.poll(2);
    exec.poll(0);
    // 2 and 0 yielded and are now behind 1, 3, 4.
    let keys: Vec<Key> = (0..exec.ready()).map(|i| exec.ready_key(i)).collect();
    assert_eq!(keys, [1, 3, 4, 2, 0].map(|n| Key::task(0, n)));
    assert_eq!(*log.borrow(), [2, 0]);
}

#[test]
fn a_waker_kept_from_an_old_task_does_not_wake_its_successor() {
    let mut exec = Executor::new();
    let kept: Rc<RefCell<Option<Waker>>> = Rc::default();
    let keep = Rc::clone(&kept);
    exec.spawn(
        "old",
        Box::pin(std::future::poll_fn(move |cx| {
            *keep.borrow_mut() = Some(cx.waker().clone());
            Poll::Ready(())
        })),
    );
    assert!(matches!(exec.poll(0), Polled::Done));
    exec.spawn("new", Box::pin(std::future::pending()));
    exec.poll(0);
    kept.borrow().as_ref().expect("kept").wake_by_ref();
    assert_eq!(exec.ready(), 0);
    assert_eq!(exec.tasks(), [(1, "new")]);
}

#[test]
fn wakes_from_other_threads_arrive() {
    let mut exec = Executor::new();
    let (sender, receiver) = std::sync::mpsc::channel::<Waker>();
    let flag = Arc::new(AtomicBool::new(false));
    let (seen, sent) = (Arc::clone(&flag), Arc::clone(&flag));
    exec.spawn(
        "waits",
        Box::pin(std::future::poll_fn(move |cx| {
            if seen.load(Ordering::Acquire) {
                return Poll::Ready(());
            }
            sender.send(cx.waker().clone()).expect("receiver lives");
            Poll::Pending
        })),
    );
    assert!(matches!(exec.poll(0), Polled::Pending));
    assert_eq!(exec.ready(), 0);
    std::thread::spawn(move || {
        let waker = receiver.recv().expect("a waker");
        sent.store(true, Ordering::Release);
        waker.wake();
    })
    .join()
    .expect("no panic");
    assert_eq!(exec.ready(), 1);
    assert!(matches!(exec.poll(0), Polled::Done));
}

#[test]
fn timers_fire_in_order_and_dropped_ones_never() {
    let mut exec = Executor::new();
    let clock = exec.clock();
    let log: Rc<RefCell<Vec<u64>>> = Rc::default();
    for deadline in [30, 10, 20, 10] {
        let (clock, log) = (clock.clone(), Rc::clone(&log));
        let sleep = async move {
            clock.sleep_until(deadline).await;
            log.borrow_mut().push(clock.now());
        };
        exec.spawn("sleep", Box::pin(sleep));
    }
    let forgotten = clock.sleep_until(5);
    drop(forgotten);
    while exec.ready() > 0 || exec.advance_time() {
        while exec.ready() > 0 {
            exec.poll(0);
        }
    }
    assert_eq!(*log.borrow(), [10, 10, 20, 30]);
    assert!(!clock.has_timers());
}

#[test]
fn tasks_spawn_tasks_and_a_panic_is_an_answer() {
    crate::panics::silence();
    let mut exec = Executor::new();
    let spawner = exec.spawner();
    exec.spawn(
        "parent",
        Box::pin(async move {
            spawner.spawn("child", Box::pin(async { panic!("child fell") }));
        }),
    );
    assert!(matches!(exec.poll(0), Polled::Done));
    assert_eq!(exec.ready(), 1);
    let (polled, report) = crate::panics::catch(|| exec.poll(0));
    let Polled::Panicked(panic) = polled else {
        panic!("{polled:?}")
    };
    assert_eq!(panic.downcast_ref::<&str>(), Some(&"child fell"));
    assert!(report.expect("reported").location.contains("exec_tests.rs"));
    assert_eq!(exec.live(), 0);
    exec.spawn("next", Box::pin(async {}));
    assert!(matches!(exec.poll(0), Polled::Done));
}

#[test]
fn reset_forgets_tasks_time_and_late_wakes() {
    let mut exec = Executor::new();
    let clock = exec.clock();
    let sleeper = clock.clone();
    exec.spawn("sleep", Box::pin(async move { sleeper.sleep_until(9).await }));
    exec.poll(0);
    exec.advance_time();
    exec.reset();
    assert_eq!(
        (exec.ready(), exec.live(), clock.now(), clock.has_timers()),
        (0, 0, 0, false)
    );
    exec.spawn("again", Box::pin(async {}));
    assert_eq!(exec.ready_key(0), Key::task(0, 0));
}
