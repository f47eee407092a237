//! What the layer tells an observer, synchronously, as it happens.
//!
//! Rules: events are plain data in program order; an observer must not call back into the layer except for
//! [`crate::Layer::inspect`]-style read-only views. Without an observer an event costs one branch.
//! Used by: traces, oracles, timelines. Not a QMP event stream (that is [`Event::Qmp`]).

use std::rc::Rc;

use serde_json::Value;

use crate::error::Errno;
use crate::jobs::JobStatus;
use crate::types::{BackendId, EdgeId, JobId, NodeId, Perm, ReqFlags, RequestId, Role};

/// What a tracked request does.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum ReqKind {
    /// Read (also a prefetch).
    Read,
    /// Write.
    Write,
    /// Write zeroes.
    WriteZeroes,
    /// Discard.
    Discard,
    /// Length change.
    Truncate,
    /// Flush.
    Flush,
}

/// Who is above an edge.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub enum Parent {
    /// A node.
    Node(NodeId),
    /// A backend's root edge.
    Backend(BackendId),
    /// A job's edge.
    Job(JobId),
}

/// One thing that happened in the layer.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A node got its name and joined the graph.
    NodeAdded {
        /// The node.
        node: NodeId,
        /// Its node-name.
        name: Rc<str>,
        /// Its driver.
        driver: &'static str,
    },
    /// A node was closed and left the graph.
    NodeRemoved {
        /// The node.
        node: NodeId,
    },
    /// An edge came to be, or now points elsewhere.
    EdgeSet {
        /// The edge.
        edge: EdgeId,
        /// Above.
        parent: Parent,
        /// What the child is to the parent.
        role: Role,
        /// Below before; `None` for a new edge.
        from: Option<NodeId>,
        /// Below now; `None` when detached (the edge is gone).
        to: Option<NodeId>,
    },
    /// An edge's masks changed (also when a failed transaction puts them back).
    EdgePerms {
        /// The edge.
        edge: EdgeId,
        /// What the parent may do.
        perm: Perm,
        /// What it lets others do.
        shared: Perm,
    },
    /// A chain link was frozen.
    Frozen {
        /// The edge.
        edge: EdgeId,
    },
    /// A chain link was thawed.
    Unfrozen {
        /// The edge.
        edge: EdgeId,
    },
    /// Somebody asked for a drained section; the wait begins.
    DrainBegin {
        /// The node.
        node: NodeId,
    },
    /// The wait is over: the node is drained.
    Drained {
        /// The node.
        node: NodeId,
    },
    /// One drained section ended.
    DrainEnd {
        /// The node.
        node: NodeId,
    },
    /// A backend accepted a request (it is in flight there).
    BackendBegin {
        /// The backend.
        backend: BackendId,
    },
    /// A backend parked a request because its root is drained.
    BackendQueued {
        /// The backend.
        backend: BackendId,
    },
    /// A parked request goes on.
    BackendResumed {
        /// The backend.
        backend: BackendId,
    },
    /// A backend's request is done.
    BackendEnd {
        /// The backend.
        backend: BackendId,
    },
    /// A request began on a node.
    RequestBegin {
        /// The request.
        request: RequestId,
        /// The node.
        node: NodeId,
        /// Through which edge it came.
        edge: EdgeId,
        /// What it does.
        kind: ReqKind,
        /// Start, bytes.
        offset: u64,
        /// Length, bytes.
        bytes: u64,
        /// Flags.
        flags: ReqFlags,
    },
    /// A request waits for a conflicting one on its node.
    RequestWaits {
        /// Who waits.
        request: RequestId,
        /// For whom.
        on: RequestId,
    },
    /// A request ended.
    RequestEnd {
        /// The request.
        request: RequestId,
        /// The node.
        node: NodeId,
        /// How.
        result: Result<(), Errno>,
    },
    /// A request waits for the limits of a throttle group.
    ThrottleQueued {
        /// The filter.
        node: NodeId,
        /// The group.
        group: Rc<str>,
    },
    /// A request that waited in a throttle group goes on.
    ThrottleResumed {
        /// The filter.
        node: NodeId,
        /// It did not wait any longer because the filter is drained.
        drained: bool,
    },
    /// Copy-on-read populates a range of a node.
    CopyOnRead {
        /// The node that is written.
        node: NodeId,
        /// Start, bytes.
        offset: u64,
        /// Length, bytes.
        bytes: u64,
        /// Written as zeroes.
        zero: bool,
    },
    /// A copy-before-write filter is open: the point in time of its copy begins with its first parent. Which clusters are
    /// to be copied its bitmaps say, the last of which is the copy bitmap.
    CopyBeforeWrite {
        /// The filter.
        filter: NodeId,
        /// What it keeps from being overwritten.
        source: NodeId,
        /// Where it puts what would be overwritten.
        target: NodeId,
        /// Unit of copying, bytes.
        cluster: u64,
    },
    /// A job's filter was put above a node, which is drained: for a backup, this is the point in time.
    FilterInserted {
        /// The filter.
        filter: NodeId,
        /// The node.
        below: NodeId,
    },
    /// A block-copy task has these clusters for itself and copies them.
    CopyBegin {
        /// The copy-before-write filter.
        filter: NodeId,
        /// The task, by order of begin on this filter.
        task: u64,
        /// Start, bytes.
        offset: u64,
        /// Length in whole clusters, bytes; the last one may reach past the end.
        bytes: u64,
        /// Written as zeroes.
        zero: bool,
        /// For a job, not for a guest's write.
        background: bool,
    },
    /// A block-copy task is over; what failed is to be copied again.
    CopyEnd {
        /// The copy-before-write filter.
        filter: NodeId,
        /// The task.
        task: u64,
        /// How.
        result: Result<(), Errno>,
    },
    /// A task tried to have its data copied by storage, without reading it.
    CopyOffloaded {
        /// The copy-before-write filter.
        filter: NodeId,
        /// The task.
        task: u64,
        /// An error: the task reads and writes, and so do all that come after it.
        result: Result<(), Errno>,
    },
    /// Clusters need no copying after all: the layer does not hold them, or nobody will ask for them.
    CopySkipped {
        /// The copy-before-write filter.
        filter: NodeId,
        /// Start, bytes.
        offset: u64,
        /// Length, bytes.
        bytes: u64,
    },
    /// A guest's write through a copy-before-write filter waits for block-copy tasks of others.
    CopyWaits {
        /// The filter.
        filter: NodeId,
        /// Start, bytes.
        offset: u64,
        /// Length, bytes.
        bytes: u64,
    },
    /// The point in time behind a copy-before-write filter is lost, so that guests may write.
    SnapshotBroken {
        /// The filter.
        filter: NodeId,
        /// Why.
        errno: Errno,
    },
    /// A job changed status.
    JobStatus {
        /// The job.
        job: JobId,
        /// Its QAPI id.
        id: Rc<str>,
        /// From.
        from: JobStatus,
        /// To.
        to: JobStatus,
    },
    /// A job's pause count changed.
    JobPauseCount {
        /// The job.
        job: JobId,
        /// Now.
        count: u32,
    },
    /// A job's run phase handled a chunk.
    JobChunk {
        /// The job.
        job: JobId,
        /// Start, bytes.
        offset: u64,
        /// Length, bytes.
        bytes: u64,
        /// Copied (false: skipped).
        copied: bool,
    },
    /// A main-context operation (a command, a job's completion) took the main lock.
    MainBegin {
        /// What: a QMP command name, `job-exit`, …
        what: &'static str,
    },
    /// The main-context operation is over; the graph is consistent here.
    MainEnd {
        /// As in the matching begin.
        what: &'static str,
    },
    /// A QMP event as a client would see it: name and data.
    Qmp {
        /// `JOB_STATUS_CHANGE`, `BLOCK_JOB_COMPLETED`, …
        name: &'static str,
        /// The event's `data`.
        data: Rc<Value>,
    },
}

/// Receives events.
pub trait Observer {
    /// Called synchronously, in order.
    fn event(&self, event: &Event);
}
