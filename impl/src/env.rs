//! The seam between the block layer and the world: storage, time, task spawning.
//!
//! Rules: the layer reaches storage, the clock and the executor through [`Env`] and in no other way, so the
//! same code runs under a simulator and over real files. One layer is driven by one thread; futures are not
//! `Send`, but wakers may be called from any thread. A started storage request runs to its end: the layer
//! never drops its future midway.
//! Not here: any implementation (`memory` has one in memory, `real` the one over the operating system).

use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;

use crate::error::{Errno, QmpError};

/// A boxed future bound to one thread.
pub type Fut<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// Virtual or real monotonic time, nanoseconds since an arbitrary start.
pub type Nanos = u64;

/// What kind of protocol node is asking.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StorageKind {
    /// Driver `file`: a regular file.
    File,
    /// Driver `host_device`: a block device.
    HostDevice,
}

/// How to open a storage object.
#[derive(Clone, Debug)]
pub struct OpenStorage<'a> {
    /// Path as the user gave it.
    pub filename: &'a str,
    /// Driver that asks.
    pub kind: StorageKind,
    /// Open for writing.
    pub writable: bool,
    /// Bypass the page cache (cache.direct).
    pub direct: bool,
}

/// What a storage object needs and can do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StorageLimits {
    /// Requests must be multiples of this, bytes; a power of two, 1 for buffered files.
    pub request_alignment: u64,
    /// Discards are honoured in multiples of this, bytes; 0: no preference.
    pub discard_alignment: u64,
    /// Largest read or write, bytes; 0: no limit.
    pub max_transfer: u64,
}

/// One stretch of a storage object, from SEEK_DATA / SEEK_HOLE.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// False: a hole that reads as zeroes.
    pub data: bool,
    /// Bytes from the asked offset, > 0; may exceed the file's length only in the last sector.
    pub bytes: u64,
}

/// One open file or device. All offsets and lengths in bytes.
pub trait Storage: std::fmt::Debug {
    /// Reads up to `buf.len()`; returns how much was there (short only at the end of the object).
    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> Fut<'a, Result<usize, Errno>>;
    /// Writes all of `buf`, growing a file as needed.
    fn write<'a>(&'a self, offset: u64, buf: &'a [u8]) -> Fut<'a, Result<(), Errno>>;
    /// Makes completed writes durable.
    fn flush(&self) -> Fut<'_, Result<(), Errno>>;
    /// Zeroes a range, deallocating it when `may_unmap`; `ENOTSUP` when that is not cheap here.
    fn write_zeroes(&self, offset: u64, bytes: u64, may_unmap: bool) -> Fut<'_, Result<(), Errno>>;
    /// Deallocates a range; `ENOTSUP` when impossible.
    fn discard(&self, offset: u64, bytes: u64) -> Fut<'_, Result<(), Errno>>;
    /// Sets the length of a file.
    fn truncate(&self, length: u64) -> Fut<'_, Result<(), Errno>>;
    /// Current length.
    fn length(&self) -> Result<u64, Errno>;
    /// Data or hole at `offset` (< length). An object that cannot tell answers data to its end.
    fn extent(&self, offset: u64) -> Result<Extent, Errno>;
    /// Alignment and size limits; constant while open.
    fn limits(&self) -> StorageLimits;
    /// Switches between read-only and writable (reopen); the old state stays on error.
    fn set_writable(&self, writable: bool) -> Result<(), Errno>;
    /// Copies within or between objects without passing the data through the layer; `ENOTSUP` when it can't.
    fn copy_from<'a>(
        &'a self,
        _source: &'a dyn Storage,
        _source_offset: u64,
        _offset: u64,
        _bytes: u64,
    ) -> Fut<'a, Result<(), Errno>> {
        Box::pin(std::future::ready(Err(Errno::ENOTSUP)))
    }
    /// For `copy_from` between two objects of one environment.
    fn as_any(&self) -> &dyn std::any::Any;
}

/// The world as the block layer sees it.
pub trait Env {
    /// Opens a storage object. The texts of errors are those of QEMU's drivers.
    fn open(&self, open: &OpenStorage<'_>) -> Result<Rc<dyn Storage>, QmpError>;
    /// Whether a file name from an image header leads to a device, which needs another driver than a file.
    fn is_device(&self, filename: &str) -> bool {
        filename.starts_with("/dev/")
    }
    /// Monotonic time.
    fn now(&self) -> Nanos;
    /// Completes at `deadline` or later. Dropping it forgets the timer.
    fn sleep_until(&self, deadline: Nanos) -> Fut<'static, ()>;
    /// Runs a task to its end. `name` is for people and traces.
    fn spawn(&self, name: &'static str, task: Fut<'static, ()>);
    /// Announces writes from `memory`, which stays as it is while it is shared, so that another thread may help with them. It
    /// is not shared any more when the write is over.
    fn lend(&self, _memory: &Arc<Vec<u8>>) {}
    /// How many copies a backup may usefully have in flight, whatever it is allowed: at least 1.
    fn copies_in_flight(&self) -> usize {
        usize::MAX
    }
    /// How many storage requests one job may usefully keep in flight (1: strictly one after another).
    fn job_parallelism(&self) -> usize {
        1
    }
}
