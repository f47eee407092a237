//! What a run produced, record by record: the input of oracles, the timeline, and the trace hash.
//!
//! Rules: records are in program order. Nothing in a record depends on addresses, time of day or thread.

use std::rc::Rc;

use blkcheck_impl::event::Event;
use serde_json::Value;

/// Index of a step in the scenario; the identity of the operation it starts.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub struct StepId(pub u32);

/// How an operation ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// A command: its return value, or class and description of the refusal.
    Command(Result<Value, Refusal>),
    /// A read: the bytes, or errno.
    Read(Result<Rc<[u8]>, i32>),
    /// Write, write-zeroes, discard, flush: done, or errno.
    Done(Result<(), i32>),
    /// Block status answers that cover the range: (flags, bytes) in order, or errno.
    Status(Result<Vec<StatusRun>, i32>),
    /// A guest request on an export that does not exist.
    NoExport,
    /// drained-begin returned, drained-end done, wait-job over, settle over.
    Passed,
    /// A drained section was asked on a node that does not exist.
    NoNode,
}

/// One run of equal block status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusRun {
    /// DATA 1, ZERO 2, OFFSET_VALID 4, ALLOCATED 16, COMPRESSED 128 (QEMU's bits).
    pub flags: u8,
    /// Length, bytes.
    pub bytes: u64,
    /// Depth of the deciding layer, 0 when none.
    pub depth: u32,
}

/// A refused command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// QAPI class.
    pub class: String,
    /// Text.
    pub desc: String,
}

/// One record.
#[derive(Clone, Debug, PartialEq)]
pub enum Record {
    /// A step was issued (its request or command is now in the target).
    Issued(StepId),
    /// A step's operation is over.
    Ended(StepId, Outcome),
    /// The layer told something (targets that can be observed).
    Layer(Event),
}
