//! The deterministic executor: one thread, virtual time, and the caller decides which ready task goes next.
//!
//! Rules: ready tasks are kept oldest first; picking one keeps the order of the rest. Tasks, wakers and queues are
//! reused from run to run. A waker may be called from any thread; calls from the executor's own thread during a poll
//! cost no lock. Nothing here looks at a clock, a thread id or an address.
//! Not here: what else can happen besides tasks (storage, actors): that is `run`.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

use blkcheck_impl::env::{Fut, Nanos};

use crate::choice::Key;
use crate::owner::Owners;

/// Wakes made during a poll on the executor's own thread.
struct Local {
    /// Identity of the executor that polls on this thread now; 0 for none.
    executor: Cell<u64>,
    woken: RefCell<Vec<TaskRef>>,
}

thread_local! {
    static LOCAL: Local = const { Local { executor: Cell::new(0), woken: RefCell::new(Vec::new()) } };
}

/// Tells executors of one process apart, so that a wake never lands in another one's queue. Never visible in a run.
static NEXT_EXECUTOR: AtomicU64 = AtomicU64::new(1);

/// A place in the slab and how often its waker was replaced.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct TaskRef {
    slot: u32,
    generation: u32,
}

/// Wakes made anywhere else.
#[derive(Debug, Default)]
struct Remote {
    any: AtomicBool,
    woken: Mutex<Vec<TaskRef>>,
}

struct SlotWaker {
    task: TaskRef,
    executor: u64,
    remote: Arc<Remote>,
}

impl Wake for SlotWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    #[inline]
    fn wake_by_ref(self: &Arc<Self>) {
        let here = LOCAL.try_with(|local| {
            let here = local.executor.get() == self.executor;
            if here {
                local.woken.borrow_mut().push(self.task);
            }
            here
        });
        if here != Ok(true) {
            // A poisoned list is still a list: the panic that poisoned it is reported elsewhere.
            self.remote
                .woken
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(self.task);
            self.remote.any.store(true, Ordering::Release);
        }
    }
}

struct Slot {
    future: Option<Fut<'static, ()>>,
    waker: Waker,
    /// Second handle on what is in `waker`, to see whether someone else still holds it.
    shared: Arc<SlotWaker>,
    name: &'static str,
    /// Number of this task in the run, from 0.
    number: u32,
    key: Key,
    queued: bool,
}

/// Tasks that were started and are not in the slab yet, with their names and identities.
type NewTasks = Vec<(&'static str, Key, Fut<'static, ()>)>;

/// Where tasks come from while the executor itself is borrowed. Cheap to clone.
#[derive(Clone, Default)]
pub struct Spawner {
    new: Rc<RefCell<NewTasks>>,
    owners: Owners,
}

impl Spawner {
    /// A task that becomes ready after the current poll.
    pub fn spawn(&self, name: &'static str, task: Fut<'static, ()>) {
        self.new.borrow_mut().push((name, self.owners.task(), task));
    }
}

impl fmt::Debug for Spawner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Spawner({} new)", self.new.borrow().len())
    }
}

/// How a poll ended.
#[derive(Debug)]
pub enum Polled {
    /// The task waits.
    Pending,
    /// The task is over.
    Done,
    /// The task panicked; it is gone, and what it held may be broken.
    Panicked(Box<dyn Any + Send>),
}

/// The executor.
pub struct Executor {
    id: u64,
    slots: Vec<Slot>,
    free: Vec<u32>,
    ready: VecDeque<u32>,
    remote: Arc<Remote>,
    spawner: Spawner,
    clock: Clock,
    live: u32,
    spawned: u32,
    scratch: Vec<TaskRef>,
}

impl fmt::Debug for Executor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Executor({} tasks, {} ready)", self.live, self.ready.len())
    }
}

impl Default for Executor {
    fn default() -> Executor {
        Executor::new()
    }
}

impl Executor {
    /// No tasks, time 0.
    #[must_use]
    pub fn new() -> Executor {
        Executor {
            id: NEXT_EXECUTOR.fetch_add(1, Ordering::Relaxed),
            slots: Vec::new(),
            free: Vec::new(),
            ready: VecDeque::new(),
            remote: Arc::default(),
            spawner: Spawner::default(),
            clock: Clock::default(),
            live: 0,
            spawned: 0,
            scratch: Vec::new(),
        }
    }

    /// For whoever starts tasks.
    #[must_use]
    pub fn spawner(&self) -> Spawner {
        self.spawner.clone()
    }

    /// Virtual time.
    #[must_use]
    pub fn clock(&self) -> Clock {
        self.clock.clone()
    }

    /// Starts a task; it is ready, after all that are.
    pub fn spawn(&mut self, name: &'static str, future: Fut<'static, ()>) {
        let key = self.spawner.owners.task();
        self.start(name, key, future);
    }

    fn start(&mut self, name: &'static str, key: Key, future: Fut<'static, ()>) {
        let slot = self.free.pop().unwrap_or_else(|| self.grow());
        let remote = &self.remote;
        let entry = &mut self.slots[slot as usize];
        // Someone kept a waker of the task that was here before: it must not wake this one.
        if Arc::strong_count(&entry.shared) > 2 {
            let TaskRef { slot, generation } = entry.shared.task;
            let task = TaskRef {
                slot,
                generation: generation + 1,
            };
            entry.shared = Arc::new(SlotWaker {
                task,
                executor: self.id,
                remote: Arc::clone(remote),
            });
            entry.waker = Waker::from(Arc::clone(&entry.shared));
        }
        entry.future = Some(future);
        entry.name = name;
        entry.number = self.spawned;
        entry.key = key;
        entry.queued = true;
        self.spawned += 1;
        self.live += 1;
        self.ready.push_back(slot);
    }

    fn grow(&mut self) -> u32 {
        let slot = u32::try_from(self.slots.len()).expect("fewer than 2^32 tasks");
        let task = TaskRef { slot, generation: 0 };
        let shared = Arc::new(SlotWaker {
            task,
            executor: self.id,
            remote: Arc::clone(&self.remote),
        });
        let waker = Waker::from(Arc::clone(&shared));
        self.slots.push(Slot {
            future: None,
            waker,
            shared,
            name: "",
            number: 0,
            key: Key::task(0, 0),
            queued: false,
        });
        slot
    }

    /// How many tasks can go on now. Takes in what was woken or spawned outside of a poll.
    #[inline]
    pub fn ready(&mut self) -> usize {
        if self.remote.any.load(Ordering::Acquire) {
            self.take_remote();
        }
        self.take_spawned();
        self.ready.len()
    }

    /// How many tasks were ready at the last [`Executor::ready`].
    #[must_use]
    pub fn ready_len(&self) -> usize {
        self.ready.len()
    }

    /// Tasks that are not over.
    #[must_use]
    pub fn live(&self) -> u32 {
        self.live
    }

    /// The i-th ready task's identity.
    #[must_use]
    pub fn ready_key(&self, i: usize) -> Key {
        self.slots[self.ready[i] as usize].key
    }

    /// Who starts tasks, and storage requests, of this run.
    #[must_use]
    pub fn owners(&self) -> Owners {
        self.spawner.owners.clone()
    }

    /// Names and numbers of the tasks that are not over, by number.
    #[must_use]
    pub fn tasks(&self) -> Vec<(u32, &'static str)> {
        let live = self.slots.iter().filter(|s| s.future.is_some());
        let mut tasks: Vec<_> = live.map(|s| (s.number, s.name)).collect();
        tasks.sort_unstable();
        tasks
    }

    /// Polls the i-th ready task (0: the oldest).
    ///
    /// # Panics
    /// When there is none: a bug of the caller.
    #[inline]
    pub fn poll(&mut self, i: usize) -> Polled {
        let slot = self.ready.remove(i).expect("a ready task");
        let entry = &mut self.slots[slot as usize];
        entry.queued = false;
        let future = entry.future.as_mut().expect("ready tasks live");
        let mut cx = Context::from_waker(&entry.waker);
        self.spawner.owners.enter_task(entry.key);
        LOCAL.with(|local| local.executor.set(self.id));
        let polled = catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(&mut cx)));
        LOCAL.with(|local| local.executor.set(0));
        let result = match polled {
            Ok(Poll::Pending) => Polled::Pending,
            Ok(Poll::Ready(())) => {
                self.finish(slot);
                Polled::Done
            }
            Err(panic) => {
                self.finish(slot);
                Polled::Panicked(panic)
            }
        };
        self.take_local();
        self.take_spawned();
        result
    }

    fn finish(&mut self, slot: u32) {
        // The task's own destructors run here; a panic in them after a panic in the task must not kill the process.
        let future = self.slots[slot as usize].future.take();
        drop(catch_unwind(AssertUnwindSafe(|| drop(future))));
        self.live -= 1;
        self.free.push(slot);
    }

    #[inline]
    fn make_ready(slots: &mut [Slot], ready: &mut VecDeque<u32>, task: TaskRef) {
        let entry = &mut slots[task.slot as usize];
        if !entry.queued && entry.future.is_some() && entry.shared.task.generation == task.generation {
            entry.queued = true;
            ready.push_back(task.slot);
        }
    }

    #[inline]
    fn take_local(&mut self) {
        LOCAL.with(|local| {
            let mut woken = local.woken.borrow_mut();
            for task in woken.drain(..) {
                Executor::make_ready(&mut self.slots, &mut self.ready, task);
            }
        });
    }

    #[cold]
    fn take_remote(&mut self) {
        self.remote.any.store(false, Ordering::Release);
        {
            let mut woken = self.remote.woken.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::swap(&mut *woken, &mut self.scratch);
        }
        for task in self.scratch.drain(..) {
            Executor::make_ready(&mut self.slots, &mut self.ready, task);
        }
    }

    #[inline]
    fn take_spawned(&mut self) {
        while !self.spawner.new.borrow().is_empty() {
            let new = std::mem::take(&mut *self.spawner.new.borrow_mut());
            for (name, key, future) in new {
                self.start(name, key, future);
            }
        }
    }

    /// Runs `f` as if inside a poll: wakes cost no lock. For storage completions and timers.
    pub fn enter<R>(&mut self, f: impl FnOnce() -> R) -> R {
        LOCAL.with(|local| local.executor.set(self.id));
        let result = f();
        LOCAL.with(|local| local.executor.set(0));
        self.take_local();
        self.take_spawned();
        result
    }

    /// Fires the timers of the next deadline; false when there is none.
    pub fn advance_time(&mut self) -> bool {
        let clock = self.clock.clone();
        self.enter(|| clock.fire_next())
    }

    /// Forgets every task and the time, keeps the memory. Destructors of tasks may panic; that is swallowed, since
    /// it can only follow a panic that was reported.
    pub fn reset(&mut self) {
        self.spawner.owners.reset();
        self.spawner.new.borrow_mut().clear();
        for slot in 0..self.slots.len() {
            let future = self.slots[slot].future.take();
            drop(catch_unwind(AssertUnwindSafe(|| drop(future))));
            self.slots[slot].queued = false;
        }
        self.spawner.new.borrow_mut().clear();
        self.take_remote();
        self.ready.clear();
        self.free.clear();
        self.free
            .extend((0..u32::try_from(self.slots.len()).expect("few tasks")).rev());
        self.live = 0;
        self.spawned = 0;
        self.clock.reset();
    }
}

/// Gives way once.
#[derive(Debug, Default)]
pub struct YieldNow(bool);

/// Lets every other ready task that comes first go before this one.
#[must_use]
pub fn yield_now() -> YieldNow {
    YieldNow(false)
}

impl Future for YieldNow {
    type Output = ();
    #[inline]
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.0 {
            return Poll::Ready(());
        }
        self.0 = true;
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

/// Virtual time and its timers. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Clock {
    inner: Rc<ClockInner>,
}

#[derive(Debug, Default)]
struct ClockInner {
    now: Cell<Nanos>,
    next_timer: Cell<u64>,
    /// By (deadline, order of registration).
    timers: RefCell<std::collections::BTreeMap<(Nanos, u64), Waker>>,
}

impl Clock {
    /// Now.
    #[must_use]
    pub fn now(&self) -> Nanos {
        self.inner.now.get()
    }

    /// Whether anyone waits for time to pass.
    #[must_use]
    pub fn has_timers(&self) -> bool {
        !self.inner.timers.borrow().is_empty()
    }

    /// Completes at `deadline`; dropping it forgets the timer.
    #[must_use]
    pub fn sleep_until(&self, deadline: Nanos) -> Sleep {
        Sleep {
            clock: self.clone(),
            deadline,
            timer: None,
        }
    }

    /// Jumps to the next deadline and wakes all who wait for it, oldest first; false when nobody waits.
    pub fn fire_next(&self) -> bool {
        let Some((&(deadline, _), _)) = self.inner.timers.borrow().first_key_value() else {
            return false;
        };
        self.inner.now.set(self.now().max(deadline));
        loop {
            let mut timers = self.inner.timers.borrow_mut();
            if timers.first_key_value().is_none_or(|((at, _), _)| *at > deadline) {
                return true;
            }
            let (_, waker) = timers.pop_first().expect("just seen");
            drop(timers);
            waker.wake();
        }
    }

    fn reset(&self) {
        self.inner.now.set(0);
        self.inner.next_timer.set(0);
        let timers = std::mem::take(&mut *self.inner.timers.borrow_mut());
        drop(timers);
    }
}

/// A sleep in virtual time.
#[derive(Debug)]
pub struct Sleep {
    clock: Clock,
    deadline: Nanos,
    timer: Option<u64>,
}

impl Future for Sleep {
    type Output = ();
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.clock.now() >= self.deadline {
            self.forget();
            return Poll::Ready(());
        }
        let timer = self.timer.unwrap_or_else(|| {
            let timer = self.clock.inner.next_timer.get();
            self.clock.inner.next_timer.set(timer + 1);
            timer
        });
        self.timer = Some(timer);
        self.clock
            .inner
            .timers
            .borrow_mut()
            .insert((self.deadline, timer), cx.waker().clone());
        Poll::Pending
    }
}

impl Sleep {
    fn forget(&mut self) {
        if let Some(timer) = self.timer.take() {
            let waker = self
                .clock
                .inner
                .timers
                .borrow_mut()
                .remove(&(self.deadline, timer));
            drop(waker);
        }
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        self.forget();
    }
}

#[cfg(test)]
#[path = "exec_tests.rs"]
mod tests;
