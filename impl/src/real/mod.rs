//! An environment over the operating system (Linux): files, block devices, timers, tasks.
//!
//! How a request is done, first that applies:
//! 1. *inline*, where it only copies between memory and the page cache: `preadv2(RWF_NOWAIT)`, buffered writes whose
//!    edge pages are resident, everything on file systems that live in memory. With a hot cache this is several times
//!    faster than any ring or thread pool, since nothing is queued and nobody is woken.
//!    Long writes from memory that a job lends (`lent.rs`) take no longer in a worker thread, and the job reads meanwhile.
//! 2. *io_uring*, through owned bounce buffers, when the data has to come from or go to a device, and with O_DIRECT.
//! 3. *threads*, where io_uring is not permitted (seccomp, old kernels), and for calls that a ring does not have.
//!
//! Why compio: the layer is one thread of futures that are not `Send`; compio has exactly this executor, chooses
//! io_uring or poll-and-threads at run time, and its owned buffers make both safe without `unsafe` here. tokio plus the
//! `io-uring` crate needs `unsafe` for every submission. The owned buffers cost a copy on the slow path only.
//!
//! Rules: a request, once polled, runs to its end. Nobody but the kernel owns state that a killed process would lose:
//! worker threads run single system calls. Relative file names are looked up below [`RealOptions::root`]; the process
//! never changes its directory. After a run of inline requests the task yields once, so that one busy job cannot starve
//! the guests.
//!
//! Not here: OS-level image locks (`locking=auto` of QEMU), character devices, systems other than Linux.

mod lent;
mod open;
mod storage;
#[cfg(test)]
mod tests;

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::fmt;
use std::future::{Future, poll_fn};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::PathBuf;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use compio::driver::{DriverType, ProactorBuilder};
use compio::runtime::{Runtime, RuntimeBuilder};

use crate::env::{Env, Fut, Nanos, OpenStorage, Storage};
use crate::error::QmpError;

/// Who does the requests that cannot be done inline.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Engine {
    /// io_uring where the kernel permits it, else threads.
    #[default]
    Auto,
    /// io_uring; [`RealEnv::new`] fails where it is not permitted.
    IoUring,
    /// A pool of threads.
    Threads,
}

/// How a [`RealEnv`] works.
#[derive(Clone, Debug)]
pub struct RealOptions {
    /// Directory for relative file names; `None`: the process's own.
    pub root: Option<PathBuf>,
    /// Who does the requests that cannot be done inline.
    pub engine: Engine,
    /// Do what the page cache can answer at once inline. Off: every request goes through the engine.
    pub inline: bool,
    /// Requests that one job may keep in flight, at least 1.
    pub job_parallelism: usize,
}

impl Default for RealOptions {
    /// Engine from the variable `BLKCHECK_ENGINE` (`io_uring`, `threads`; anything else: chosen at run time).
    fn default() -> RealOptions {
        let engine = match std::env::var("BLKCHECK_ENGINE").as_deref() {
            Ok("io_uring") => Engine::IoUring,
            Ok("threads") => Engine::Threads,
            _ => Engine::Auto,
        };
        RealOptions {
            root: None,
            engine,
            inline: true,
            job_parallelism: 4,
        }
    }
}

/// Inline requests in a row before a task lets the others run.
const INLINE_RUN: u32 = 64;
/// Bounce buffers kept for reuse.
const SPARE_BUFFERS: usize = 8;

/// The operating system as an environment. Clones share the executor.
#[derive(Clone)]
pub struct RealEnv {
    shared: Rc<Shared>,
}

struct Shared {
    runtime: Runtime,
    options: RealOptions,
    start: Instant,
    /// Inline requests since someone yielded.
    inline_run: Cell<u32>,
    /// Bounce buffers of the slow path, all of one size.
    spare: RefCell<Vec<Vec<u8>>>,
    /// What jobs write from; `None` where no second CPU could.
    lent: Option<lent::Shelf>,
    /// A panic of a spawned task, on its way to `block_on`.
    panic: Cell<Option<Box<dyn Any + Send>>>,
}

impl fmt::Debug for RealEnv {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RealEnv({:?})", self.engine())
    }
}

impl RealEnv {
    /// An environment.
    ///
    /// # Errors
    /// When the engine cannot be set up: io_uring asked for and not permitted, or out of descriptors.
    #[expect(clippy::disallowed_methods, reason = "this is where real time comes from")]
    pub fn new(options: RealOptions) -> std::io::Result<RealEnv> {
        let runtime = match options.engine {
            Engine::Threads => runtime(Some(DriverType::Poll)),
            Engine::IoUring => runtime(Some(DriverType::IoUring)),
            // The probe of the library may succeed where setting up the ring itself then fails (locked memory).
            Engine::Auto => runtime(None).or_else(|_| runtime(Some(DriverType::Poll))),
        }?;
        let several = std::thread::available_parallelism().is_ok_and(|cpus| cpus.get() > 1);
        let shared = Shared {
            runtime,
            options,
            start: Instant::now(),
            inline_run: Cell::new(0),
            spare: RefCell::default(),
            lent: several.then(lent::Shelf::default),
            panic: Cell::new(None),
        };
        Ok(RealEnv {
            shared: Rc::new(shared),
        })
    }

    /// The engine in use, never `Auto`.
    #[must_use]
    pub fn engine(&self) -> Engine {
        if self.shared.runtime.driver_type().is_iouring() {
            Engine::IoUring
        } else {
            Engine::Threads
        }
    }

    /// Runs `future`, and the tasks spawned meanwhile, until `future` is done.
    ///
    /// # Panics
    /// With the panic of a spawned task, should one panic.
    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        let shared = &self.shared;
        shared.runtime.block_on(async {
            let mut future = pin!(future);
            poll_fn(|cx| {
                if let Some(payload) = shared.panic.take() {
                    resume_unwind(payload);
                }
                future.as_mut().poll(cx)
            })
            .await
        })
    }

    /// Waits up to `timeout` for storage requests, and wakes whoever waits for those that are done. For callers who poll
    /// tasks with an executor of their own instead of [`RealEnv::block_on`].
    pub fn drive(&self, timeout: Duration) {
        let runtime = &self.shared.runtime;
        runtime.enter(|| {
            let more = runtime.run();
            runtime.poll_with(Some(if more { Duration::ZERO } else { timeout }));
            runtime.run();
        });
    }
}

fn runtime(driver: Option<DriverType>) -> std::io::Result<Runtime> {
    let mut proactor = ProactorBuilder::new();
    if let Some(driver) = driver {
        proactor.driver_type(driver);
    }
    let mut builder = RuntimeBuilder::new();
    builder.with_proactor(proactor);
    builder.build()
}

impl Env for RealEnv {
    fn open(&self, open: &OpenStorage<'_>) -> Result<Rc<dyn Storage>, QmpError> {
        Ok(Rc::new(storage::RealStorage::open(
            Rc::clone(&self.shared),
            open,
        )?))
    }

    fn is_device(&self, filename: &str) -> bool {
        use std::os::unix::fs::FileTypeExt;
        let found = std::fs::metadata(open::resolve(self.shared.options.root.as_deref(), filename));
        found.is_ok_and(|m| m.file_type().is_block_device() || m.file_type().is_char_device())
    }

    fn now(&self) -> Nanos {
        let nanos = self.shared.start.elapsed().as_nanos();
        Nanos::try_from(nanos).expect("a process lives less than five hundred years")
    }

    fn sleep_until(&self, deadline: Nanos) -> Fut<'static, ()> {
        let at = self.shared.start + Duration::from_nanos(deadline);
        Box::pin(compio::time::sleep_until(at))
    }

    fn spawn(&self, _name: &'static str, task: Fut<'static, ()>) {
        let weak = Rc::downgrade(&self.shared);
        let mut task = task;
        let guarded = poll_fn(
            move |cx| match catch_unwind(AssertUnwindSafe(|| task.as_mut().poll(cx))) {
                Ok(poll) => poll,
                Err(payload) => {
                    // The executor would swallow it; the run must not go on as if nothing had happened.
                    if let Some(shared) = weak.upgrade() {
                        shared.panic.set(Some(payload));
                        shared.runtime.waker().wake();
                    }
                    Poll::Ready(())
                }
            },
        );
        self.shared.runtime.spawn(guarded).detach();
    }

    fn lend(&self, memory: &Arc<Vec<u8>>) {
        if let Some(shelf) = &self.shared.lent {
            shelf.add(memory);
        }
    }

    /// A copy in the hands of a worker, one that is being read, and some to choose from: more of them only take memory.
    fn copies_in_flight(&self) -> usize {
        self.job_parallelism()
    }

    fn job_parallelism(&self) -> usize {
        self.shared.options.job_parallelism.max(1)
    }
}

impl Shared {
    /// Counts an inline request; lets other tasks run when there were many in a row.
    async fn breathe(&self) {
        let run = self.inline_run.get() + 1;
        self.inline_run.set(run % INLINE_RUN);
        if run == INLINE_RUN {
            let mut yielded = false;
            poll_fn(|cx| {
                if std::mem::replace(&mut yielded, true) {
                    return Poll::Ready(());
                }
                cx.waker().wake_by_ref();
                Poll::Pending
            })
            .await;
        }
    }

    /// A bounce buffer of [`storage::BOUNCE`] bytes plus room to align it.
    fn take_bounce(&self) -> Vec<u8> {
        self.spare
            .borrow_mut()
            .pop()
            .unwrap_or_else(|| vec![0; storage::BOUNCE + open::MEMORY_ALIGN])
    }

    fn give_bounce(&self, buffer: Vec<u8>) {
        let mut spare = self.spare.borrow_mut();
        if spare.len() < SPARE_BUFFERS {
            spare.push(buffer);
        }
    }
}
