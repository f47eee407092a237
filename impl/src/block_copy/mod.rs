//! Copying of clusters from one node to another behind a copy-before-write filter, each exactly once, by a job and by guests
//! at the same time.
//!
//! Rules (io.md 5). A bitmap of the filter says which clusters are still to be copied. A *call* copies what is marked in a
//! range; its *tasks* each take a stretch for themselves: the marks go at once, and come back if the task fails. Calls share
//! bitmap and tasks, so whoever needs a cluster that another call copies waits for it. A call ends well only once nothing in
//! its range is marked or under way. Every cluster is in exactly one state: marked, taken by a task, done.
//! Memory is bounded over all calls. The last cluster may be short; alone it is copied as data.
//! Copy offload is tried when asked for, with longer tasks once it has worked; the first failure ends it for good, and the
//! task it happened to goes on by reading and writing.

mod call;
mod pool;
mod task;
#[cfg(test)]
mod tests;

use std::cell::{Cell, RefCell};
use std::fmt;
use std::ops::Range;
use std::rc::Rc;

pub(crate) use call::{Call, Outcome};
use task::Task;

use crate::Layer;
use crate::dirty::DirtyBitmap;
use crate::driver::Cx;
use crate::env::Nanos;
use crate::error::{Errno, QmpError};
use crate::event::Event;
use crate::graph::node::Node;
use crate::io::{align_down, min_nonzero};
use crate::sync::WaitQueue;
use crate::types::{EdgeId, NodeId, ReqFlags};

/// Smallest unit of copying, bytes.
pub(crate) const SMALLEST_CLUSTER: u64 = 64 * 1024;
/// Most bytes in flight over all calls; no cluster is larger.
pub(crate) const MEMORY: u64 = 128 * 1024 * 1024;
/// Largest stretch of one task, unless a cluster is larger, bytes.
const LARGEST_TASK: u64 = 1024 * 1024;
/// Largest stretch of one task that has no data to copy: zeroes, or what is left out; bytes.
const LARGEST_BLANK: u64 = 16 * LARGEST_TASK;
/// Largest stretch of one task once offload has worked, bytes.
const LARGEST_OFFLOADED: u64 = 16 * 1024 * 1024;
/// Buffers kept for the next tasks, each of [`LARGEST_TASK`] at most: a new one costs as much as a copy.
const SPARE_BUFFERS: usize = 8;

/// An error, and on which side it happened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Failure {
    /// What.
    pub(crate) errno: Errno,
    /// The source failed, not the target.
    pub(crate) read: bool,
}

/// Who wants to know how a copy goes, and says how fast it may: a job.
pub(crate) trait Watcher {
    /// So many bytes were copied.
    fn copied(&self, bytes: u64);
    /// So many bytes are marked or under way.
    fn remaining(&self, bytes: u64);
    /// Charges a task; the answer is how long the next one of a background call should wait.
    fn charge(&self, bytes: u64) -> Nanos;
}

/// Whether data is copied without passing through here.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Offload {
    /// Not asked for, or it failed.
    Off,
    Untried,
    Works,
}

/// The state that all calls share.
pub(crate) struct BlockCopy {
    /// The filter, for events.
    filter: NodeId,
    source: EdgeId,
    target: EdgeId,
    /// The source at the point in time: the layer that is asked what it holds.
    top: NodeId,
    cluster: u64,
    /// Of both nodes at the point in time, bytes.
    length: u64,
    /// As much of it as commands have not cut off since.
    reach: Cell<u64>,
    /// What they cut off was still to be copied, in part at least.
    lost: Cell<bool>,
    /// Marked: still to be copied.
    dirty: Rc<DirtyBitmap>,
    /// Marked: what the cluster held at the point in time can be had, from target or source.
    access: Rc<DirtyBitmap>,
    max_transfer: u64,
    write_flags: Cell<ReqFlags>,
    discard_source: bool,
    offload: Cell<Offload>,
    tasks: RefCell<Vec<Task>>,
    next_task: Cell<u64>,
    /// Bytes taken by tasks.
    in_flight: Cell<u64>,
    memory: Cell<u64>,
    spare: RefCell<Vec<Vec<u8>>>,
    /// A task ended or became shorter, or memory came back.
    changed: WaitQueue,
    /// What the source node itself does not hold is not copied.
    skip_unallocated: Cell<bool>,
    watcher: RefCell<Option<Rc<dyn Watcher>>>,
}

impl fmt::Debug for BlockCopy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BlockCopy({:?})", self.filter)
    }
}

/// Refuses what is no size at all.
pub(crate) fn check_smallest_cluster(smallest: u64) -> Result<(), QmpError> {
    let largest = i64::MAX.unsigned_abs();
    if smallest > largest {
        return Err(too_large(smallest, largest));
    }
    Ok(())
}

fn too_large(smallest: u64, largest: u64) -> QmpError {
    QmpError::generic(format!("min-cluster-size too large: {smallest} > {largest}"))
}

/// Unit of copying to a target, bytes.
fn cluster_size(layer: &Layer, target: &Rc<Node>, smallest: u64) -> Result<u64, QmpError> {
    check_smallest_cluster(smallest)?;
    if smallest != 0 && !smallest.is_power_of_two() {
        return Err(QmpError::generic("min-cluster-size needs to be a power of 2"));
    }
    if smallest > MEMORY {
        return Err(too_large(smallest, MEMORY));
    }
    let own = layer.driver_info(target).map_or(0, |info| info.cluster_size);
    Ok(SMALLEST_CLUSTER.max(smallest).max(own))
}

impl BlockCopy {
    /// Everything is marked; whoever wants less says so before the first request. The bitmaps belong to the filter `cx.node`,
    /// which drops them with itself.
    pub(crate) fn new(
        cx: &Cx,
        (source, target): (EdgeId, EdgeId),
        smallest: u64,
        discard_source: bool,
    ) -> Result<BlockCopy, QmpError> {
        let layer = &cx.layer;
        let (from, to) = (attached(layer, source), attached(layer, target));
        let cluster = cluster_size(layer, &to, smallest)?;
        let length = from.length();
        let whole = || {
            let bitmap = DirtyBitmap::of_instant(cluster, length);
            bitmap.mark(0, length);
            Rc::new(bitmap)
        };
        let (from_limit, to_limit) = (from.io.limits.get().max_transfer, to.io.limits.get().max_transfer);
        let max = min_nonzero(min_nonzero(from_limit, to_limit), i32::MAX.unsigned_abs().into());
        // Whoever reads a target that is backed by the source must never see half of a cluster.
        let fleecing = layer.chain_contains(to.id, from.id);
        Ok(BlockCopy {
            filter: cx.node.id,
            source,
            target,
            top: from.id,
            cluster,
            length,
            reach: Cell::new(length),
            lost: Cell::new(false),
            dirty: whole(),
            access: whole(),
            max_transfer: align_down(max, cluster),
            write_flags: Cell::new(if fleecing {
                ReqFlags::SERIALISING
            } else {
                ReqFlags::empty()
            }),
            discard_source,
            offload: Cell::new(Offload::Off),
            tasks: RefCell::default(),
            next_task: Cell::new(0),
            in_flight: Cell::new(0),
            memory: Cell::new(0),
            spare: RefCell::default(),
            changed: WaitQueue::default(),
            skip_unallocated: Cell::new(false),
            watcher: RefCell::default(),
        })
    }

    /// Unit of copying, bytes.
    pub(crate) fn cluster(&self) -> u64 {
        self.cluster
    }

    /// Up to where there is a point in time, bytes: less than there was, once the source was cut.
    pub(crate) fn reach(&self) -> u64 {
        self.reach.get()
    }

    /// Something that was to be copied was cut off before.
    pub(crate) fn lost_some(&self) -> bool {
        self.lost.get()
    }

    /// The source ends here by a command: what lay beyond is lost, also if it grows again. Nobody copies now.
    pub(crate) fn cut(&self, layer: &Layer, length: u64) {
        assert!(self.tasks.borrow().is_empty(), "a command drains what it changes");
        let old = self.reach.replace(self.reach.get().min(length));
        let reach = self.reach.get();
        if reach == old {
            return;
        }
        let from = align_down(reach, self.cluster);
        if self.dirty.next_marked(from, old, u64::MAX).is_some() {
            self.lost.set(true);
        }
        self.forget(layer, self.round_up(reach)..old);
    }

    /// What is still to be copied.
    pub(crate) fn dirty(&self) -> &Rc<DirtyBitmap> {
        &self.dirty
    }

    /// Of what the point in time can be had.
    pub(crate) fn access(&self) -> &Rc<DirtyBitmap> {
        &self.access
    }

    pub(crate) fn source(&self) -> EdgeId {
        self.source
    }

    pub(crate) fn target(&self) -> EdgeId {
        self.target
    }

    /// Only what `bitmap` marks, rounded to clusters, is to be copied.
    pub(crate) fn restrict_to(&self, bitmap: &DirtyBitmap) {
        for ours in [&self.dirty, &self.access] {
            ours.bits.take();
            ours.merge(bitmap);
        }
    }

    /// Whether from now on what the source node itself does not hold is left out.
    pub(crate) fn set_skip_unallocated(&self, skip: bool) {
        self.skip_unallocated.set(skip);
    }

    /// Copies are compressed from now on, one cluster at a time. The target takes that.
    pub(crate) fn compress(&self) {
        self.write_flags
            .set(self.write_flags.get() | ReqFlags::WRITE_COMPRESSED);
    }

    /// Copies without reading, as long as that works; compressed copies are made here.
    pub(crate) fn offload(&self) {
        let compresses = self.write_flags.get().contains(ReqFlags::WRITE_COMPRESSED);
        if !compresses && self.max_transfer >= self.cluster {
            self.offload.set(Offload::Untried);
        }
    }

    /// Has a job follow, or nobody any more.
    pub(crate) fn watch(&self, watcher: Option<Rc<dyn Watcher>>) {
        self.watcher.replace(watcher);
    }

    /// Clusters that are not to be copied any more.
    pub(crate) fn forget(&self, layer: &Layer, range: Range<u64>) {
        let (start, end) = (range.start, range.end.min(self.length));
        if start >= end {
            return;
        }
        self.dirty.unmark(start, end);
        self.access.unmark(start, end);
        let filter = self.filter;
        layer.emit(|| Event::CopySkipped {
            filter,
            offset: start,
            bytes: end - start,
        });
        self.tell_remaining();
    }

    /// What is not copied: marked, or taken by a task that is not over.
    pub(crate) fn merge_uncopied_into(&self, bitmap: &DirtyBitmap) {
        bitmap.merge(&self.dirty);
        for task in self.tasks.borrow().iter() {
            bitmap.mark(task.start, task.end);
        }
        bitmap.mark(self.reach.get(), self.length);
    }

    /// Asks whether the source node itself holds the cluster at `offset`; what it does not hold is forgotten. Returns where
    /// to ask next. The caller holds off graph changes.
    pub(crate) async fn look_at(&self, layer: &Layer, offset: u64) -> Result<u64, Errno> {
        let source = self.layer_asked(layer);
        let length = self.reach();
        let mut at = offset;
        // It may have been cut since the caller looked.
        if at >= length {
            return Ok(length);
        }
        loop {
            let (allocated, bytes) = layer.is_allocated(source, at, length - at).await?;
            let to = at + bytes;
            if allocated {
                // A cluster that is held in part is held.
                return Ok(self.round_up(to).min(length));
            }
            // The tail of the last cluster counts as a whole.
            let whole = if to >= length {
                length
            } else {
                align_down(to, self.cluster)
            };
            if whole > offset {
                self.forget(layer, offset..whole);
                return Ok(whole);
            }
            if bytes == 0 {
                return Ok(length);
            }
            at = to;
        }
    }

    /// The node that held the point in time, also where a snapshot has put an overlay above it since (QEMU asks the overlay,
    /// which holds nothing). Once a stream has taken it out of the chain its data is in the node above.
    fn layer_asked(&self, layer: &Layer) -> NodeId {
        let source = attached(layer, self.source).id;
        if layer.node_exists(self.top) && layer.chain_contains(source, self.top) {
            self.top
        } else {
            source
        }
    }

    fn round_up(&self, offset: u64) -> u64 {
        offset.next_multiple_of(self.cluster)
    }

    /// How much one task may take.
    fn longest_task(&self, max_chunk: u64) -> u64 {
        let compresses = self.write_flags.get().contains(ReqFlags::WRITE_COMPRESSED);
        let own = if compresses || self.max_transfer < self.cluster {
            self.cluster
        } else {
            let most = match self.offload.get() {
                Offload::Works => LARGEST_OFFLOADED,
                Offload::Off | Offload::Untried => LARGEST_TASK,
            };
            self.cluster.max(most).min(self.max_transfer)
        };
        align_down(min_nonzero(own, max_chunk), self.cluster).max(self.cluster)
    }

    /// How much the task after a blank one may take, which took up to `last`: no data is transferred, so that only what
    /// the job asks for is a limit, and how long others may have to wait.
    fn longer_task(&self, last: u64, max_chunk: u64) -> u64 {
        let most = align_down(min_nonzero(LARGEST_BLANK, max_chunk), self.cluster);
        (2 * last).min(most).max(last)
    }

    /// Bytes marked or under way.
    pub(crate) fn remaining(&self) -> u64 {
        self.dirty.marked_bytes() + self.in_flight.get()
    }

    fn tell_remaining(&self) {
        if let Some(watcher) = &*self.watcher.borrow() {
            watcher.remaining(self.remaining());
        }
    }
}

/// `EIO` where the node below an edge ends before `end`.
pub(crate) fn ends_within(layer: &Layer, edge: EdgeId, end: u64) -> Result<(), Errno> {
    let node = layer.child(edge).ok_or(Errno::ENOMEDIUM)?;
    if layer.node_length(&node)? < end {
        return Err(Errno::EIO);
    }
    Ok(())
}

/// The node below an edge of the filter, which has both as long as somebody copies.
fn attached(layer: &Layer, edge: EdgeId) -> Rc<Node> {
    layer.child(edge).expect("a filter in use has its children")
}
