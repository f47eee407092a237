//! Tracked requests: who is in progress on a node, and who has to wait for whom.
//!
//! Rules (QEMU's tracked requests): two requests conflict when their overlap ranges intersect and one of them is
//! serialising, unless the other one is itself asleep waiting (that breaks the circle: it looks again when it
//! wakes, and then waits for us). The search is newest first; waiters wake oldest first and search again.
//! A request never waits for one of its own task: the layer has no task identity to check that with, but no path
//! here begins a second request on the same node and range while holding the first.
//! Requests on different nodes are independent.

use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use crate::Layer;
use crate::error::Errno;
use crate::event::{Event, ReqKind};
use crate::graph::node::Node;
use crate::io::{align_down, align_up};
use crate::types::{EdgeId, MAX_LENGTH, ReqFlags, RequestId};

/// One request in progress. Bytes.
#[derive(Debug)]
pub(crate) struct Tracked {
    id: RequestId,
    offset: u64,
    bytes: u64,
    overlap_start: u64,
    overlap_end: u64,
    serialising: bool,
    waiting_for: Option<RequestId>,
}

impl Tracked {
    fn overlaps(&self, other: &Tracked) -> bool {
        self.overlap_start < other.overlap_end && other.overlap_start < self.overlap_end
    }
}

/// A sleeping request.
#[derive(Debug)]
pub(crate) struct Waiter {
    id: RequestId,
    on: RequestId,
    waker: Waker,
}

/// A tracked request in the hands of its task. Ends with [`Request::finish`]; dropping it otherwise happens only
/// when a whole run is torn down, and then only takes it off the list.
#[derive(Debug)]
pub(crate) struct Request<'a> {
    pub(crate) layer: &'a Layer,
    pub(crate) node: &'a Rc<Node>,
    pub(crate) edge: EdgeId,
    pub(crate) kind: ReqKind,
    id: RequestId,
}

impl<'a> Request<'a> {
    /// Begins a request over `[offset, offset + bytes)`, which is the padded range where the request is padded.
    pub(crate) fn begin(
        layer: &'a Layer,
        node: &'a Rc<Node>,
        edge: EdgeId,
        kind: ReqKind,
        (offset, bytes): (u64, u64),
        flags: ReqFlags,
    ) -> Request<'a> {
        debug_assert!(offset <= MAX_LENGTH && bytes <= MAX_LENGTH - offset);
        let id = next_id(layer);
        node.io.in_flight.begin();
        node.io.tracked.borrow_mut().push(Tracked {
            id,
            offset,
            bytes,
            overlap_start: offset,
            overlap_end: offset + bytes,
            serialising: false,
            waiting_for: None,
        });
        layer.emit(|| Event::RequestBegin {
            request: id,
            node: node.id,
            edge,
            kind,
            offset,
            bytes,
            flags,
        });
        Request {
            layer,
            node,
            edge,
            kind,
            id,
        }
    }

    /// Ends it with `result`, which is handed back.
    pub(crate) fn finish(self, result: Result<(), Errno>) -> Result<(), Errno> {
        let (request, node) = (self.id, self.node.id);
        self.layer.emit(|| Event::RequestEnd {
            request,
            node,
            result,
        });
        result
        // Drop takes it off the list, wakes the waiters and leaves in_flight, in this order.
    }

    fn with<R>(&self, f: impl FnOnce(&mut Tracked) -> R) -> R {
        let mut tracked = self.node.io.tracked.borrow_mut();
        let at = position(&tracked, self.id).expect("request is tracked until it ends");
        f(&mut tracked[at])
    }

    /// The overlap range as (start, end).
    pub(crate) fn overlap(&self) -> (u64, u64) {
        self.with(|t| (t.overlap_start, t.overlap_end))
    }

    /// Makes it serialising, its overlap range widened to `align` (a power of two, bytes).
    pub(crate) fn set_serialising(&self, align: u64) {
        let first = self.with(|t| {
            let start = align_down(t.offset, align);
            let end = align_up(t.offset + t.bytes, align);
            // Widens only, as QEMU: start and *length* grow separately.
            let bytes = (t.overlap_end - t.overlap_start).max(end - start);
            t.overlap_start = t.overlap_start.min(start);
            t.overlap_end = t.overlap_end.max(t.overlap_start + bytes);
            !std::mem::replace(&mut t.serialising, true)
        });
        if first {
            self.node.io.serialising.set(self.node.io.serialising.get() + 1);
        }
    }

    /// Lengthens the tracked range to `MAX_LENGTH`: a request that may change the end of the file.
    pub(crate) fn extend_to_max(&self) {
        self.with(|t| {
            t.bytes = MAX_LENGTH - t.offset;
            t.overlap_end = MAX_LENGTH;
        });
    }

    fn conflict(&self) -> Option<RequestId> {
        let tracked = self.node.io.tracked.borrow();
        let mine = &tracked[position(&tracked, self.id).expect("request is tracked until it ends")];
        let conflicts = |r: &&Tracked| {
            r.id != mine.id
                && (r.serialising || mine.serialising)
                && r.overlaps(mine)
                && r.waiting_for.is_none()
        };
        tracked.iter().rev().find(conflicts).map(|r| r.id)
    }

    /// Whether it would have to wait now.
    pub(crate) fn has_conflict(&self) -> bool {
        self.node.io.serialising.get() > 0 && self.conflict().is_some()
    }

    /// Sleeps until nothing conflicts.
    pub(crate) async fn wait_for_conflicts(&self) {
        // Without a serialising request on the node (this one included) nobody conflicts: the fast path.
        while self.node.io.serialising.get() > 0 {
            let Some(on) = self.conflict() else { return };
            self.with(|t| t.waiting_for = Some(on));
            let request = self.id;
            self.layer.emit(|| Event::RequestWaits { request, on });
            Asleep {
                node: self.node,
                id: self.id,
                on,
                registered: false,
            }
            .await;
            self.with(|t| t.waiting_for = None);
        }
    }
}

impl Drop for Request<'_> {
    fn drop(&mut self) {
        let io = &self.node.io;
        {
            let mut tracked = io.tracked.borrow_mut();
            let at = position(&tracked, self.id).expect("request is tracked until it ends");
            if tracked.remove(at).serialising {
                io.serialising.set(io.serialising.get() - 1);
            }
        }
        loop {
            let mut waiters = io.waiters.borrow_mut();
            let Some(at) = waiters.iter().position(|w| w.on == self.id) else {
                break;
            };
            let waiter = waiters.remove(at);
            drop(waiters);
            waiter.waker.wake();
        }
        io.in_flight.end();
        self.layer.kick();
    }
}

fn position(tracked: &[Tracked], id: RequestId) -> Option<usize> {
    tracked.binary_search_by_key(&id, |t| t.id).ok()
}

/// The next request id of the layer.
pub(crate) fn next_id(layer: &Layer) -> RequestId {
    let id = layer.inner.next_request.get();
    layer.inner.next_request.set(id + 1);
    RequestId(id)
}

/// Sleeps in the waiter list until the request waited for ends.
struct Asleep<'a> {
    node: &'a Node,
    id: RequestId,
    on: RequestId,
    registered: bool,
}

impl Future for Asleep<'_> {
    type Output = ();
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut waiters = self.node.io.waiters.borrow_mut();
        if let Some(mine) = waiters.iter_mut().find(|w| w.id == self.id) {
            mine.waker.clone_from(cx.waker());
            return Poll::Pending;
        }
        if self.registered {
            return Poll::Ready(()); // taken off the list by whoever ended
        }
        waiters.push(Waiter {
            id: self.id,
            on: self.on,
            waker: cx.waker().clone(),
        });
        drop(waiters);
        self.registered = true;
        Poll::Pending
    }
}

impl Drop for Asleep<'_> {
    fn drop(&mut self) {
        self.node.io.waiters.borrow_mut().retain(|w| w.id != self.id);
    }
}

/// Counts something in flight on a node that is not a tracked request (a status query, a flush, a copy that outlives the
/// request that began it).
pub(crate) struct InFlightGuard {
    layer: Layer,
    node: Rc<Node>,
}

impl InFlightGuard {
    pub(crate) fn new(layer: &Layer, node: &Rc<Node>) -> InFlightGuard {
        node.io.in_flight.begin();
        InFlightGuard {
            layer: layer.clone(),
            node: Rc::clone(node),
        }
    }
}

impl Drop for InFlightGuard {
    fn drop(&mut self) {
        self.node.io.in_flight.end();
        self.layer.kick();
    }
}
