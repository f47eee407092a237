//! Per-node request state: length, limits, tracked requests, flush bookkeeping, block-status cache.
//!
//! Owned by `io`; other modules read `length`, `limits` and `in_flight`. Every cell is touched within one
//! synchronous step, so nothing here is borrowed across an await.
//! Not here: dirty bitmaps (`crate::dirty`), throttling (`crate::throttle`); write thresholds, which this layer does not have.

use std::cell::{Cell, RefCell};

use crate::driver::{Limits, WriteFlags};
use crate::io::tracked::{Tracked, Waiter};
use crate::sync::{InFlight, WaitQueue};

/// Request state of a node.
#[derive(Debug, Default)]
pub struct NodeIo {
    /// Length in bytes, multiple of 512, as of the last refresh or growing write.
    pub length: Cell<u64>,
    /// Merged limits.
    pub limits: Cell<Limits>,
    /// Requests in flight; what drain waits for.
    pub in_flight: InFlight,
    /// The driver's `write_flags`, sampled with the limits so that a write does not ask down the chain.
    pub(crate) write_flags: Cell<WriteFlags>,
    /// The length may change behind our back (`host_device` below, through filters): ask each time.
    pub(crate) variable_length: Cell<bool>,
    /// Requests in progress, oldest first; ids ascend.
    pub(crate) tracked: RefCell<Vec<Tracked>>,
    /// Requests asleep until another one ends, oldest first.
    pub(crate) waiters: RefCell<Vec<Waiter>>,
    /// How many of `tracked` are serialising; 0 lets everyone skip the conflict search.
    pub(crate) serialising: Cell<u32>,
    /// Counts finished writes (wrapping).
    pub(crate) write_gen: Cell<u32>,
    /// `write_gen` that the last successful flush covers.
    pub(crate) flushed_gen: Cell<u32>,
    /// A flush is running; others queue.
    pub(crate) flush_active: Cell<bool>,
    /// Flushes waiting for their turn.
    pub(crate) flush_queue: WaitQueue,
    /// One range `[start, end)` known to be data at identity offsets, for childless nodes.
    pub(crate) status_cache: Cell<Option<(u64, u64)>>,
    /// Nestable count of `enable_copy_on_read`.
    pub(crate) copy_on_read: Cell<u32>,
    /// End of the highest byte ever written through this node (query-blockstats).
    pub(crate) wr_highest_offset: Cell<u64>,
}

impl NodeIo {
    /// End of the highest byte written through this node since it was opened, bytes.
    #[must_use]
    pub fn wr_highest_offset(&self) -> u64 {
        self.wr_highest_offset.get()
    }

    /// Whether no request is tracked, waiting or queued here.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.in_flight.count() == 0
            && self.tracked.borrow().is_empty()
            && self.waiters.borrow().is_empty()
            && self.serialising.get() == 0
            && !self.flush_active.get()
    }
}
