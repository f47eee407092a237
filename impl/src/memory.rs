//! An environment in memory: for tests, fuzzing, and users who want a block layer without files.
//!
//! [`MemoryEnv`] has named files, which grow and have holes, a virtual clock, and a small executor: `block_on` runs
//! spawned tasks until the given future is done, in the order in which they became ready, and moves the clock only
//! when nothing else can run. Deterministic: no threads, no real time.
//! Not here: faults, power loss, chosen interleavings (the simulator has them).
//!
//! ```
//! use blkcheck_impl::env::{Env, OpenStorage, StorageKind};
//! use blkcheck_impl::memory::MemoryEnv;
//!
//! let env = MemoryEnv::new();
//! env.create("disk.img", 1 << 20);
//! let open = OpenStorage { filename: "disk.img", kind: StorageKind::File, writable: true, direct: false };
//! let disk = env.open(&open).expect("it was just created");
//! let mut buf = [1; 3];
//! env.block_on(async {
//!     disk.write(4096, b"abc").await.expect("memory does not fail");
//!     disk.read(4096, &mut buf).await.expect("memory does not fail");
//! });
//! assert_eq!(&buf, b"abc");
//! ```

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

use crate::env::{Env, Extent, Fut, Nanos, OpenStorage, Storage, StorageLimits};
use crate::error::{Errno, QmpError};
use crate::types::MAX_LENGTH;

/// Granularity of holes, bytes.
const PAGE: u64 = 4096;
const PAGE_SIZE: usize = 4096;

/// The environment; clones share everything.
#[derive(Clone, Default)]
pub struct MemoryEnv {
    state: Rc<State>,
}

#[derive(Default)]
struct State {
    files: RefCell<BTreeMap<String, Rc<Content>>>,
    now: Cell<Nanos>,
    latency: Cell<Nanos>,
    alignment: Cell<u64>,
    /// Sleepers by deadline, then by order of going to sleep.
    timers: RefCell<BTreeMap<(Nanos, u64), Waker>>,
    next_timer: Cell<u64>,
    tasks: RefCell<Vec<Option<Fut<'static, ()>>>>,
    ready: Arc<Ready>,
}

/// Tasks to poll, in order. Wakers may be called from anywhere, hence the mutex.
#[derive(Default)]
struct Ready(Mutex<VecDeque<usize>>);

impl Ready {
    fn push(&self, task: usize) {
        let mut queue = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !queue.contains(&task) {
            queue.push_back(task);
        }
    }

    fn pop(&self) -> Option<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }
}

/// Makes one task ready.
struct TaskWaker {
    task: usize,
    ready: Arc<Ready>,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.ready.push(self.task);
    }
}

/// The future of `block_on` itself; spawned tasks count from 0.
const MAIN: usize = usize::MAX;

impl std::fmt::Debug for MemoryEnv {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "MemoryEnv(t={} {:?})",
            self.state.now.get(),
            self.state.files.borrow().keys()
        )
    }
}

impl MemoryEnv {
    /// An empty environment at time 0; its storage takes no time and any alignment.
    #[must_use]
    pub fn new() -> MemoryEnv {
        MemoryEnv::default()
    }

    /// Every storage request from now on takes this long in virtual time.
    pub fn set_latency(&self, latency: Nanos) {
        self.state.latency.set(latency);
    }

    /// Storage opened from now on wants requests aligned to `alignment` bytes.
    ///
    /// # Panics
    /// When it is no power of two.
    pub fn set_alignment(&self, alignment: u64) {
        assert!(
            alignment.is_power_of_two(),
            "alignment {alignment} is a power of two"
        );
        self.state.alignment.set(alignment);
    }

    /// Creates (or empties) a file that reads as `length` bytes of zeroes.
    pub fn create(&self, name: &str, length: u64) {
        let content = Rc::new(Content::default());
        content.length.set(length);
        self.state.files.borrow_mut().insert(name.to_owned(), content);
    }

    /// Creates a file with this content.
    pub fn create_with(&self, name: &str, content: &[u8]) {
        self.create(name, 0);
        self.state.files.borrow()[name]
            .write(0, content)
            .expect("a buffer is within the largest length");
    }

    /// The whole content of a file; `None` if there is no such file.
    ///
    /// # Panics
    /// When it does not fit memory.
    #[must_use]
    pub fn content(&self, name: &str) -> Option<Vec<u8>> {
        let file = Rc::clone(self.state.files.borrow().get(name)?);
        let mut all = vec![0; usize::try_from(file.length.get()).expect("the file fits memory")];
        file.read(0, &mut all);
        Some(all)
    }

    /// Runs `future` to its end together with all spawned tasks; these may still run afterwards, in the next call.
    ///
    /// # Panics
    /// When nothing can ever make progress again: a deadlock.
    pub fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        let mut future = std::pin::pin!(future);
        let state = &*self.state;
        let waker = |task| {
            Waker::from(Arc::new(TaskWaker {
                task,
                ready: Arc::clone(&state.ready),
            }))
        };
        let main = waker(MAIN);
        state.ready.push(MAIN);
        loop {
            let Some(task) = state.ready.pop() else {
                assert!(
                    self.advance(),
                    "deadlock: no task is ready and no timer is pending"
                );
                continue;
            };
            if task == MAIN {
                if let Poll::Ready(result) = future.as_mut().poll(&mut Context::from_waker(&main)) {
                    return result;
                }
                continue;
            }
            // Out of the table while it runs: it may spawn others.
            let taken = state.tasks.borrow_mut().get_mut(task).and_then(Option::take);
            if let Some(mut running) = taken
                && running
                    .as_mut()
                    .poll(&mut Context::from_waker(&waker(task)))
                    .is_pending()
            {
                state.tasks.borrow_mut()[task] = Some(running);
            }
        }
    }

    /// Moves the clock to the next deadline and wakes its sleepers.
    fn advance(&self) -> bool {
        let mut timers = self.state.timers.borrow_mut();
        let Some(&(deadline, _)) = timers.keys().next() else {
            return false;
        };
        self.state.now.set(deadline.max(self.state.now.get()));
        while let Some(first) = timers.first_entry().filter(|t| t.key().0 <= deadline) {
            first.remove().wake();
        }
        true
    }
}

impl Env for MemoryEnv {
    fn open(&self, open: &OpenStorage<'_>) -> Result<Rc<dyn Storage>, QmpError> {
        let name = open.filename;
        let Some(content) = self.state.files.borrow().get(name).cloned() else {
            return Err(QmpError::errno(
                &format!("Could not open '{name}'"),
                Errno::ENOENT,
            ));
        };
        let (env, writable) = (self.clone(), Cell::new(open.writable));
        let alignment = self.state.alignment.get().max(1);
        Ok(Rc::new(MemoryFile {
            env,
            content,
            writable,
            alignment,
        }))
    }

    fn now(&self) -> Nanos {
        self.state.now.get()
    }

    fn sleep_until(&self, deadline: Nanos) -> Fut<'static, ()> {
        Box::pin(Sleep {
            env: self.clone(),
            deadline,
            key: None,
        })
    }

    fn spawn(&self, _name: &'static str, task: Fut<'static, ()>) {
        let mut tasks = self.state.tasks.borrow_mut();
        tasks.push(Some(task));
        self.state.ready.push(tasks.len() - 1);
    }
}

struct Sleep {
    env: MemoryEnv,
    deadline: Nanos,
    key: Option<(Nanos, u64)>,
}

impl Future for Sleep {
    type Output = ();
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let state = Rc::clone(&self.env.state);
        if state.now.get() >= self.deadline {
            return Poll::Ready(());
        }
        let deadline = self.deadline;
        let key = *self.key.get_or_insert_with(|| {
            let order = state.next_timer.get();
            state.next_timer.set(order + 1);
            (deadline, order)
        });
        state.timers.borrow_mut().insert(key, cx.waker().clone());
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(key) = self.key {
            self.env.state.timers.borrow_mut().remove(&key);
        }
    }
}

/// A file's bytes: pages that were written, holes between them.
#[derive(Debug, Default)]
struct Content {
    length: Cell<u64>,
    pages: RefCell<BTreeMap<u64, Box<[u8; PAGE_SIZE]>>>,
}

impl Content {
    fn read(&self, offset: u64, buf: &mut [u8]) -> usize {
        let inside = self.length.get().saturating_sub(offset).min(buf.len() as u64);
        let inside = usize::try_from(inside).expect("no longer than the buffer");
        let pages = self.pages.borrow();
        let mut at = 0;
        while at < inside {
            let (page, start) = locate(offset + at as u64);
            let n = (PAGE_SIZE - start).min(inside - at);
            match pages.get(&page) {
                Some(data) => buf[at..at + n].copy_from_slice(&data[start..start + n]),
                None => buf[at..at + n].fill(0),
            }
            at += n;
        }
        inside
    }

    fn write(&self, offset: u64, buf: &[u8]) -> Result<(), Errno> {
        let end = offset
            .checked_add(buf.len() as u64)
            .filter(|e| *e <= MAX_LENGTH)
            .ok_or(Errno::EFBIG)?;
        let mut pages = self.pages.borrow_mut();
        let mut at = 0;
        while at < buf.len() {
            let (page, start) = locate(offset + at as u64);
            let n = (PAGE_SIZE - start).min(buf.len() - at);
            let data = pages.entry(page).or_insert_with(|| Box::new([0; PAGE_SIZE]));
            data[start..start + n].copy_from_slice(&buf[at..at + n]);
            at += n;
        }
        self.length.set(self.length.get().max(end));
        Ok(())
    }

    /// Zeroes a range within the file: whole pages become holes, unless they are to stay allocated.
    fn clear(&self, offset: u64, end: u64, punch: bool) {
        let end = end.min(self.length.get());
        let mut pages = self.pages.borrow_mut();
        let mut at = offset;
        while at < end {
            let (page, start) = locate(at);
            let n = (PAGE - start as u64).min(end - at);
            if punch && n == PAGE {
                // Whole pages: only those that exist, the range may be huge.
                let last = end / PAGE;
                let gone: Vec<u64> = pages.range(page..last).map(|(p, _)| *p).collect();
                for page in gone {
                    pages.remove(&page);
                }
                at = last * PAGE;
                continue;
            }
            if let Some(data) = pages.get_mut(&page) {
                let n = usize::try_from(n).expect("within a page");
                data[start..start + n].fill(0);
            }
            at += n;
        }
    }

    fn truncate(&self, length: u64) -> Result<(), Errno> {
        if length > MAX_LENGTH {
            return Err(Errno::EFBIG);
        }
        // What lies past the new end must not come back when the file grows again.
        let old = self.length.get();
        if length < old {
            self.clear(length, old, true);
            self.pages.borrow_mut().split_off(&length.div_ceil(PAGE));
        }
        self.length.set(length);
        Ok(())
    }

    fn extent(&self, offset: u64) -> Extent {
        let left = self.length.get() - offset;
        let (first, start) = locate(offset);
        let pages = self.pages.borrow();
        let data = pages.contains_key(&first);
        let end = if data {
            (first..).find(|p| !pages.contains_key(p)).unwrap_or(u64::MAX)
        } else {
            pages.range(first..).next().map_or(u64::MAX, |(p, _)| *p)
        };
        let bytes = (end - first)
            .saturating_mul(PAGE)
            .saturating_sub(start as u64)
            .min(left);
        Extent { data, bytes }
    }
}

/// Page and offset within it.
fn locate(offset: u64) -> (u64, usize) {
    (
        offset / PAGE,
        usize::try_from(offset % PAGE).expect("below the page size"),
    )
}

/// One open file.
#[derive(Debug)]
struct MemoryFile {
    env: MemoryEnv,
    content: Rc<Content>,
    writable: Cell<bool>,
    alignment: u64,
}

impl MemoryFile {
    /// A request takes its time, then happens at once.
    async fn take_time(&self) {
        let latency = self.env.state.latency.get();
        if latency > 0 {
            self.env.sleep_until(self.env.now() + latency).await;
        }
    }

    fn check(&self, offset: u64, bytes: u64, write: bool) -> Result<(), Errno> {
        if !(offset | bytes).is_multiple_of(self.alignment) {
            return Err(Errno::EINVAL);
        }
        if write && !self.writable.get() {
            Err(Errno::EBADF)
        } else {
            Ok(())
        }
    }
}

impl Storage for MemoryFile {
    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> Fut<'a, Result<usize, Errno>> {
        Box::pin(async move {
            self.check(offset, buf.len() as u64, false)?;
            self.take_time().await;
            Ok(self.content.read(offset, buf))
        })
    }

    fn write<'a>(&'a self, offset: u64, buf: &'a [u8]) -> Fut<'a, Result<(), Errno>> {
        Box::pin(async move {
            self.check(offset, buf.len() as u64, true)?;
            self.take_time().await;
            self.content.write(offset, buf)
        })
    }

    fn flush(&self) -> Fut<'_, Result<(), Errno>> {
        Box::pin(async move {
            self.take_time().await;
            Ok(())
        })
    }

    fn write_zeroes(&self, offset: u64, bytes: u64, may_unmap: bool) -> Fut<'_, Result<(), Errno>> {
        Box::pin(async move {
            self.check(offset, 0, true)?;
            self.take_time().await;
            let end = offset
                .checked_add(bytes)
                .filter(|e| *e <= MAX_LENGTH)
                .ok_or(Errno::EFBIG)?;
            self.content.length.set(self.content.length.get().max(end));
            self.content.clear(offset, end, may_unmap);
            Ok(())
        })
    }

    fn discard(&self, offset: u64, bytes: u64) -> Fut<'_, Result<(), Errno>> {
        Box::pin(async move {
            self.check(offset, 0, true)?;
            self.take_time().await;
            self.content.clear(offset, offset.saturating_add(bytes), true);
            Ok(())
        })
    }

    fn truncate(&self, length: u64) -> Fut<'_, Result<(), Errno>> {
        Box::pin(async move {
            self.check(0, 0, true)?;
            self.take_time().await;
            self.content.truncate(length)
        })
    }

    fn length(&self) -> Result<u64, Errno> {
        Ok(self.content.length.get())
    }

    fn extent(&self, offset: u64) -> Result<Extent, Errno> {
        if offset >= self.content.length.get() {
            return Err(Errno::ENXIO);
        }
        Ok(self.content.extent(offset))
    }

    fn limits(&self) -> StorageLimits {
        StorageLimits {
            request_alignment: self.alignment,
            discard_alignment: 0,
            max_transfer: 0,
        }
    }

    fn set_writable(&self, writable: bool) -> Result<(), Errno> {
        self.writable.set(writable);
        Ok(())
    }

    fn copy_from<'a>(
        &'a self,
        source: &'a dyn Storage,
        source_offset: u64,
        offset: u64,
        bytes: u64,
    ) -> Fut<'a, Result<(), Errno>> {
        Box::pin(async move {
            let source = source
                .as_any()
                .downcast_ref::<MemoryFile>()
                .ok_or(Errno::ENOTSUP)?;
            let mut data = vec![0; usize::try_from(bytes).map_err(|_| Errno::ENOMEM)?];
            if source.read(source_offset, &mut data).await? < data.len() {
                return Err(Errno::EINVAL);
            }
            self.write(offset, &data).await
        })
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}

#[cfg(test)]
mod tests;
