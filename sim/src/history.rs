//! What a run produced, record by record: the input of oracles, the timeline, and the trace hash.
//!
//! Rules: records are in program order. Nothing in a record depends on addresses, time of day or thread.

use std::rc::Rc;

use blkcheck_impl::event::Event;
use serde_json::Value;

use crate::scenario::Scenario;

/// Index of a step in the scenario; the identity of the operation it starts.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub struct StepId(pub u32);

/// The errno of a guest's request whose connection was closed under it (ESHUTDOWN).
pub const ESHUTDOWN: i32 = 108;

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

impl Outcome {
    /// With which errno a guest's request failed.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        match self {
            Outcome::Read(Err(errno)) | Outcome::Done(Err(errno)) | Outcome::Status(Err(errno)) => {
                Some(*errno)
            }
            _ => None,
        }
    }
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
    /// Storage failed a request because the run said so. Whoever waits for it is told after this.
    Fault(Fault),
    /// The power failed, and this is how an image's file came out of it. Nothing follows but the same for other images.
    PowerCut {
        /// Its place in the scenario.
        image: u32,
        /// Changes that were not durable.
        volatile: u32,
        /// How many of them are there all the same, as a whole.
        kept: u32,
        /// Sectors of those changes that are there, and that are not; a sector that was changed twice counts twice.
        sectors: [u64; 2],
        /// Tells what the file holds from what else it might have held.
        hash: u64,
    },
}

/// What kind of storage request failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FaultKind {
    /// A read.
    Read,
    /// A write.
    Write,
    /// Zeroing a range.
    WriteZeroes,
    /// Giving a range back.
    Discard,
    /// A flush.
    Flush,
    /// A change of length.
    Truncate,
}

impl FaultKind {
    /// All of them.
    pub const ALL: [FaultKind; 6] = [
        FaultKind::Read,
        FaultKind::Write,
        FaultKind::WriteZeroes,
        FaultKind::Discard,
        FaultKind::Flush,
        FaultKind::Truncate,
    ];
}

/// A storage request that was made to fail.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fault {
    /// The image whose file it was on, by its place in the scenario.
    pub image: u32,
    /// What it was.
    pub kind: FaultKind,
    /// Start, bytes; the new length for a truncate.
    pub offset: u64,
    /// Length, bytes.
    pub bytes: u64,
    /// How much of it reached the file all the same, bytes.
    pub done: u64,
    /// What the layer was told.
    pub errno: i32,
}

impl Fault {
    /// The file that it was on.
    #[must_use]
    pub fn file<'a>(&self, scenario: &'a Scenario) -> Option<&'a str> {
        let image = usize::try_from(self.image).ok()?;
        scenario.images.get(image).map(|image| &*image.file)
    }
}
