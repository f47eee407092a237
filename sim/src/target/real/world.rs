//! The world of a run over real files: a closed set of names, every request through the engine, every handle counted.

use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::rc::Rc;
use std::time::{Duration, Instant};

use blkcheck_impl::env::{Env, Extent, Fut, Nanos, OpenStorage, Storage, StorageLimits};
use blkcheck_impl::error::{Errno, QmpError};
use blkcheck_impl::real::RealEnv;

use super::super::ranges::Ranges;
use super::super::simulated::Outside;
use super::Medium;
use crate::exec::{Clock, Spawner};
use crate::lack;
use crate::scenario::Format;

/// A single request that takes longer than this never ends.
const REQUEST_LIMIT: Duration = Duration::from_secs(60);

/// What one image file is to the world.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) format: Format,
    /// What to open for it, absolute.
    pub(super) path: String,
    pub(super) writers: Rc<Cell<u32>>,
    /// Two writers at once have been seen.
    pub(super) contested: Rc<Cell<bool>>,
    /// Of all its handles together.
    pub(super) ranges: Ranges,
}

/// Counters shared by everything of one run, and what went wrong that is no doing of the layer.
#[derive(Debug, Default)]
pub(super) struct Traffic {
    pub(super) pending: Cell<u32>,
    pub(super) handles: Cell<u32>,
    pub(super) lack: RefCell<Option<String>>,
}

/// Adds one to a counter for as long as it lives.
pub(super) struct Counted(Rc<Traffic>, fn(&Traffic) -> &Cell<u32>);

impl Counted {
    fn new(traffic: &Rc<Traffic>, of: fn(&Traffic) -> &Cell<u32>) -> Counted {
        of(traffic).update(|n| n + 1);
        Counted(Rc::clone(traffic), of)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.1(&self.0).update(|n| n - 1);
    }
}

pub(super) struct Kernel {
    pub(super) real: RealEnv,
    pub(super) traffic: Rc<Traffic>,
    pub(super) stuck: Rc<Cell<bool>>,
    /// Since when nothing has completed, and how many were pending then.
    pub(super) waiting: Cell<Option<(Instant, u32)>>,
}

impl Outside for Kernel {
    fn pending(&self) -> bool {
        self.traffic.pending.get() > 0 && !self.stuck.get()
    }

    #[expect(clippy::disallowed_methods, reason = "how long the kernel takes is real time")]
    fn wait(&self) {
        self.real.drive(Duration::from_millis(100));
        let pending = self.traffic.pending.get();
        match self.waiting.get() {
            Some((since, before)) if before == pending => self.stuck.set(since.elapsed() > REQUEST_LIMIT),
            _ => self.waiting.set(Some((Instant::now(), pending))),
        }
    }
}

/// The world of one run.
pub(super) struct World {
    pub(super) real: RealEnv,
    pub(super) clock: Clock,
    pub(super) spawner: Spawner,
    pub(super) entries: Rc<RefCell<Vec<Entry>>>,
    pub(super) traffic: Rc<Traffic>,
    pub(super) job_parallelism: usize,
    pub(super) medium: Medium,
}

impl Env for World {
    fn open(&self, open: &OpenStorage<'_>) -> Result<Rc<dyn Storage>, QmpError> {
        let entries = self.entries.borrow();
        let Some(entry) = entries.iter().find(|e| e.name == open.filename) else {
            return Err(QmpError::errno(
                &format!("Could not open '{}'", open.filename),
                Errno::ENOENT,
            ));
        };
        let inner = self
            .real
            .open(&OpenStorage {
                filename: &entry.path,
                ..open.clone()
            })
            .map_err(|refusal| {
                if lack::is_told(&refusal.desc) {
                    let text = format!("{}; raise the limit (ulimit -n)", refusal.desc);
                    self.traffic.lack.replace(Some(text));
                }
                // The user named the image, not what stands for it here.
                QmpError {
                    desc: refusal.desc.replace(&entry.path, &entry.name),
                    ..refusal
                }
            })?;
        let file = Handle {
            inner,
            ranges: entry.ranges.clone(),
            writing: Cell::new(false),
            writers: Rc::clone(&entry.writers),
            contested: Rc::clone(&entry.contested),
            _count: Counted::new(&self.traffic, |t| &t.handles),
            traffic: Rc::clone(&self.traffic),
        };
        file.count_writer(open.writable);
        Ok(Rc::new(file))
    }

    fn is_device(&self, filename: &str) -> bool {
        self.medium == Medium::Loop && self.entries.borrow().iter().any(|e| e.name == filename)
    }

    fn now(&self) -> Nanos {
        self.clock.now()
    }

    fn sleep_until(&self, deadline: Nanos) -> Fut<'static, ()> {
        Box::pin(self.clock.sleep_until(deadline))
    }

    fn spawn(&self, name: &'static str, task: Fut<'static, ()>) {
        self.spawner.spawn(name, task);
    }

    fn job_parallelism(&self) -> usize {
        self.job_parallelism
    }
}

/// An open image that counts what is under way.
struct Handle {
    inner: Rc<dyn Storage>,
    ranges: Ranges,
    writing: Cell<bool>,
    writers: Rc<Cell<u32>>,
    contested: Rc<Cell<bool>>,
    _count: Counted,
    traffic: Rc<Traffic>,
}

impl std::fmt::Debug for Handle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.inner.fmt(f)
    }
}

impl Handle {
    fn count_writer(&self, writing: bool) {
        match (self.writing.replace(writing), writing) {
            (false, true) => self.writers.update(|n| n + 1),
            (true, false) => self.writers.update(|n| n - 1),
            _ => {}
        }
        if self.writers.get() > 1 {
            self.contested.set(true);
        }
    }

    fn counted<'a, T: 'a>(&'a self, bytes: Range<u64>, write: bool, request: Fut<'a, T>) -> Fut<'a, T> {
        Box::pin(async move {
            let _in_use = self.ranges.take(bytes, write).await;
            let _under_way = Counted::new(&self.traffic, |t| &t.pending);
            request.await
        })
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.count_writer(false);
    }
}

impl Storage for Handle {
    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> Fut<'a, Result<usize, Errno>> {
        self.counted(
            offset..offset + buf.len() as u64,
            false,
            self.inner.read(offset, buf),
        )
    }
    fn write<'a>(&'a self, offset: u64, buf: &'a [u8]) -> Fut<'a, Result<(), Errno>> {
        self.counted(
            offset..offset + buf.len() as u64,
            true,
            self.inner.write(offset, buf),
        )
    }
    fn flush(&self) -> Fut<'_, Result<(), Errno>> {
        self.counted(0..0, false, self.inner.flush())
    }
    fn write_zeroes(&self, offset: u64, bytes: u64, may_unmap: bool) -> Fut<'_, Result<(), Errno>> {
        self.counted(
            offset..offset + bytes,
            true,
            self.inner.write_zeroes(offset, bytes, may_unmap),
        )
    }
    fn discard(&self, offset: u64, bytes: u64) -> Fut<'_, Result<(), Errno>> {
        self.counted(offset..offset + bytes, true, self.inner.discard(offset, bytes))
    }
    fn truncate(&self, length: u64) -> Fut<'_, Result<(), Errno>> {
        self.counted(0..u64::MAX, true, self.inner.truncate(length))
    }
    fn length(&self) -> Result<u64, Errno> {
        self.inner.length()
    }
    fn extent(&self, offset: u64) -> Result<Extent, Errno> {
        self.inner.extent(offset)
    }
    fn limits(&self) -> StorageLimits {
        self.inner.limits()
    }
    fn set_writable(&self, writable: bool) -> Result<(), Errno> {
        self.inner.set_writable(writable)?;
        self.count_writer(writable);
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
            let source = source.as_any().downcast_ref::<Handle>().ok_or(Errno::ENOTSUP)?;
            let (from, to) = (source_offset..source_offset + bytes, offset..offset + bytes);
            // Source first, always: a source is below its target, so no two copies wait for each other.
            let _read = source.ranges.take(from, false).await;
            self.counted(
                to,
                true,
                self.inner.copy_from(&*source.inner, source_offset, offset, bytes),
            )
            .await
        })
    }
    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}
