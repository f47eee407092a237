//! Jobs: the state machine, which verb is admitted when, and how pauses add up.
//!
//! Rules: every observed status change must be in [`JobStatus::may_become`]; verbs are refused by [`check_verb`] with
//! QEMU's text. What a stream does to graph and headers is in [`crate::command::stream`], what a backup does in
//! [`crate::command::backup`].

use std::rc::Rc;

use crate::bitmap::Spans;
use crate::graph::{EdgeId, Graph, NodeId};
use crate::refusal::Refusal;

/// Status of a job; names as in QAPI `JobStatus`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum JobStatus {
    /// Before creation.
    Undefined,
    /// Exists.
    Created,
    /// Runs.
    Running,
    /// Parked while running.
    Paused,
    /// Source and target are in step.
    Ready,
    /// Parked while ready.
    Standby,
    /// Run is over; waits for its group.
    Waiting,
    /// Waits to be finalized.
    Pending,
    /// Failed or cancelled; cleans up.
    Aborting,
    /// Over; waits to be dismissed.
    Concluded,
    /// Gone.
    Null,
}

use JobStatus::{
    Aborting, Concluded, Created, Null, Paused, Pending, Ready, Running, Standby, Undefined, Waiting,
};

impl JobStatus {
    /// All, in order.
    pub const ALL: [JobStatus; 11] = [
        Undefined, Created, Running, Paused, Ready, Standby, Waiting, Pending, Aborting, Concluded, Null,
    ];

    /// QAPI name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Undefined => "undefined",
            Created => "created",
            Running => "running",
            Paused => "paused",
            Ready => "ready",
            Standby => "standby",
            Waiting => "waiting",
            Pending => "pending",
            Aborting => "aborting",
            Concluded => "concluded",
            Null => "null",
        }
    }

    /// The status of this name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<JobStatus> {
        JobStatus::ALL.into_iter().find(|status| status.name() == name)
    }

    /// What a job of this status may become next.
    #[must_use]
    pub fn successors(self) -> &'static [JobStatus] {
        match self {
            Undefined => &[Created],
            Created => &[Running, Aborting, Null],
            Running => &[Paused, Ready, Waiting, Aborting],
            Paused => &[Running],
            Ready => &[Standby, Waiting, Aborting],
            Standby => &[Ready],
            Waiting => &[Pending, Aborting],
            Pending => &[Aborting, Concluded],
            Aborting => &[Aborting, Concluded],
            Concluded => &[Null],
            Null => &[],
        }
    }

    /// `next` may follow directly.
    #[must_use]
    pub fn may_become(self, next: JobStatus) -> bool {
        self.successors().contains(&next)
    }

    /// The run phase is over.
    #[must_use]
    pub fn is_completed(self) -> bool {
        matches!(self, Waiting | Pending | Aborting | Concluded | Null)
    }
}

/// What a user may ask of a job.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Verb {
    /// Give up.
    Cancel,
    /// Stop for a while.
    Pause,
    /// Go on.
    Resume,
    /// Another rate limit.
    SetSpeed,
    /// Come to an end.
    Complete,
    /// Make the result take effect.
    Finalize,
    /// Forget it.
    Dismiss,
    /// Change an option.
    Change,
}

impl Verb {
    /// QAPI name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Verb::Cancel => "cancel",
            Verb::Pause => "pause",
            Verb::Resume => "resume",
            Verb::SetSpeed => "set-speed",
            Verb::Complete => "complete",
            Verb::Finalize => "finalize",
            Verb::Dismiss => "dismiss",
            Verb::Change => "change",
        }
    }

    /// A job of this status takes the verb.
    #[must_use]
    pub fn admitted(self, status: JobStatus) -> bool {
        let alive = matches!(status, Created | Running | Paused | Ready | Standby);
        match self {
            Verb::Cancel => alive || matches!(status, Waiting | Pending),
            Verb::Pause | Verb::Resume | Verb::SetSpeed | Verb::Change => alive,
            Verb::Complete => matches!(status, Ready | Standby),
            Verb::Finalize => status == Pending,
            Verb::Dismiss => status == Concluded,
        }
    }
}

/// Refuses a verb that a job of this status does not take.
///
/// # Errors
/// The refusal.
pub fn check_verb(id: &str, status: JobStatus, verb: Verb) -> Result<(), Refusal> {
    if verb.admitted(status) {
        return Ok(());
    }
    let (status, verb) = (status.name(), verb.name());
    Err(Refusal::new(format!(
        "Job '{id}' in state '{status}' cannot accept command verb '{verb}'"
    )))
}

/// How a job's completion ended.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Outcome {
    /// It did what it was for.
    Success,
    /// Its run phase failed, or storage failed before it could take effect.
    Failed,
    /// It was cancelled (no prepare).
    Cancelled,
    /// It did, but the flush that was to make it durable failed: graph and header have changed, yet it counts as failed.
    NotFlushed,
}

/// What a stream was asked to do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Stream {
    /// `device`: the node that the filter was put above.
    pub device: NodeId,
    /// The copy-on-read filter; none once it is dropped.
    pub filter: Option<NodeId>,
    /// The last layer that is streamed.
    pub base_overlay: NodeId,
    /// The node directly above base, maybe a filter.
    pub above_base: NodeId,
    /// `backing-file`.
    pub backing_file: Option<Rc<str>>,
    /// `backing-mask-protocol`.
    pub mask_protocol: bool,
    /// The device was made writable for the job.
    pub was_read_only: bool,
}

impl Stream {
    /// Whether somebody gave the last streamed layer another backing node meanwhile, and it stands no longer on the filters
    /// that were between it and the base.
    #[must_use]
    pub fn has_strayed(&self, graph: &Graph) -> bool {
        let mut filters = std::iter::successors(graph.cow_child(self.base_overlay), |node| {
            graph.filter_child(*node)
        });
        self.above_base != self.base_overlay && !filters.any(|node| node == self.above_base)
    }

    /// What is the base now: others may have changed what is below the streamed range.
    pub(crate) fn base(&self, graph: &Graph) -> Option<NodeId> {
        match self.has_strayed(graph) {
            true => graph.cow_child(self.base_overlay),
            false => graph.chain_child(self.above_base),
        }
    }
}

/// What a backup copies.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Sync {
    /// Everything.
    Full,
    /// What the source's own layer holds when it is looked through.
    Top,
    /// What a bitmap says.
    Bitmap,
    /// Only what guests write over.
    None,
}

impl Sync {
    /// QAPI name (`incremental` is a way to say `bitmap`).
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Sync::Full => "full",
            Sync::Top => "top",
            Sync::Bitmap => "bitmap",
            Sync::None => "none",
        }
    }
}

/// What becomes of a backup's bitmap when the backup ends.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum BitmapMode {
    /// Success: what was written since the start. Else: that as well as what it was.
    OnSuccess,
    /// What it was, and what was written since.
    Never,
    /// What was written since the start, and what was not copied.
    Always,
}

impl BitmapMode {
    /// QAPI name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            BitmapMode::OnSuccess => "on-success",
            BitmapMode::Never => "never",
            BitmapMode::Always => "always",
        }
    }
}

/// What a backup was asked to do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Backup {
    /// `device`: the node whose content is kept as it was at the start.
    pub source: NodeId,
    /// `target`.
    pub target: NodeId,
    /// The copy-before-write filter above the source; none once it is dropped.
    pub filter: Option<NodeId>,
    /// Bytes per cluster.
    pub cluster: u64,
    /// Length of source and target, bytes.
    pub length: u64,
    /// Where what is below the filter has ended since, at the earliest, bytes: what lay beyond is lost.
    pub reach: u64,
    /// What is copied.
    pub sync: Sync,
    /// The clusters that are copied, by number, whoever writes: all of them for `full`; for `top` those of these that the
    /// source's layer holds; for `none` those of these that guests write to. None if unknown.
    pub initial: Option<Spans>,
    /// The bitmap on the source that is used up or brought up to date, and how.
    pub bitmap: Option<(Rc<str>, BitmapMode)>,
}

/// What a job is for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum JobKind {
    /// `block-stream`.
    Stream,
    /// `blockdev-backup`.
    Backup,
}

impl JobKind {
    /// QAPI name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            JobKind::Stream => "stream",
            JobKind::Backup => "backup",
        }
    }
}

/// What a job does.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Work {
    /// Copies what layers below hold into an image.
    Stream(Stream),
    /// Copies an image as it was at one moment.
    Backup(Backup),
}

/// A job.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Job {
    /// QAPI id.
    pub id: Rc<str>,
    /// Status as observed.
    pub status: JobStatus,
    /// One of the pauses is the user's (or an error's with action `stop`).
    pub user_paused: bool,
    /// Cancelled; a stream's cancellation and a backup's are always hard.
    pub cancelled: bool,
    /// Rate limit, bytes per second; 0 = none.
    pub speed: i64,
    /// Becomes concluded by itself.
    pub auto_finalize: bool,
    /// Disappears by itself.
    pub auto_dismiss: bool,
    /// The job's own edges, newest first.
    pub edges: Vec<EdgeId>,
    /// The edge of the backend through which it does I/O; none once completed.
    pub backend: Option<EdgeId>,
    /// What it does.
    pub work: Work,
    /// The jobs of one number end together, well or not.
    pub group: u32,
    /// Its run phase went well.
    pub waited: bool,
    /// How it ended.
    pub outcome: Option<Outcome>,
}

impl Job {
    /// A new one that was asked for with these arguments, in a group of its own.
    pub(crate) fn new(id: Rc<str>, asked: &Asked<'_>, group: u32, work: Work) -> Job {
        Job {
            id,
            status: JobStatus::Undefined,
            user_paused: false,
            cancelled: false,
            speed: asked.speed,
            auto_finalize: asked.auto_finalize,
            auto_dismiss: asked.auto_dismiss,
            edges: Vec::new(),
            backend: None,
            work,
            group,
            waited: false,
            outcome: None,
        }
    }

    /// What kind of job it is.
    #[must_use]
    pub fn kind(&self) -> JobKind {
        match self.work {
            Work::Stream(_) => JobKind::Stream,
            Work::Backup(_) => JobKind::Backup,
        }
    }

    /// What it streams, if that is what it does.
    #[must_use]
    pub fn stream(&self) -> Option<&Stream> {
        match &self.work {
            Work::Stream(stream) => Some(stream),
            Work::Backup(_) => None,
        }
    }

    /// What it backs up, if that is what it does.
    #[must_use]
    pub fn backup(&self) -> Option<&Backup> {
        match &self.work {
            Work::Backup(backup) => Some(backup),
            Work::Stream(_) => None,
        }
    }

    /// How many pause requests there are, with `drained_edges` of its edges on drained nodes.
    #[must_use]
    pub fn pause_count(&self, drained_edges: usize) -> usize {
        let not_started = matches!(self.status, Undefined | Created);
        usize::from(not_started) + usize::from(self.user_paused) + drained_edges
    }
}

/// What every job can be asked for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asked<'a> {
    pub(crate) id: Option<&'a str>,
    pub(crate) speed: i64,
    pub(crate) auto_finalize: bool,
    pub(crate) auto_dismiss: bool,
}

/// A job that the world has forgotten, but of which a client still sees status changes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Ghost {
    /// QAPI id.
    pub id: Rc<str>,
    /// Last status seen.
    pub status: JobStatus,
    /// It was made, and then taken back with its transaction.
    pub taken_back: bool,
}

impl Ghost {
    /// A client may see this next. A job that could not be made is gone at once; one that was made is given up first.
    #[must_use]
    pub fn may_become(&self, next: JobStatus) -> bool {
        let shown = match (self.status, self.taken_back) {
            (Undefined, _) => Created,
            (Created, true) => Aborting,
            (Aborting, _) => Concluded,
            (Created, false) | (Concluded, _) => Null,
            _ => return false,
        };
        next == shown
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table as the specification draws it: rows from, columns to, in the order of `JobStatus::ALL`.
    #[test]
    fn transitions() {
        let table = [
            ".x.........", // undefined
            "..x.....x.x", // created
            "...xx.x.x..", // running
            "..x........", // paused
            ".....xx.x..", // ready
            "....x......", // standby
            ".......xx..", // waiting
            "........xx.", // pending
            "........xx.", // aborting
            "..........x", // concluded
            "...........", // null
        ];
        for (from, row) in JobStatus::ALL.into_iter().zip(table) {
            for (to, cell) in JobStatus::ALL.into_iter().zip(row.chars()) {
                assert_eq!(from.may_become(to), cell == 'x', "{from:?} -> {to:?}");
            }
        }
    }

    /// The verb table: columns undefined … null.
    #[test]
    fn verbs() {
        let table = [
            (Verb::Cancel, ".xxxxxxx..."),
            (Verb::Pause, ".xxxxx....."),
            (Verb::Resume, ".xxxxx....."),
            (Verb::SetSpeed, ".xxxxx....."),
            (Verb::Complete, "....xx....."),
            (Verb::Finalize, ".......x..."),
            (Verb::Dismiss, ".........x."),
            (Verb::Change, ".xxxxx....."),
        ];
        for (verb, row) in table {
            for (status, cell) in JobStatus::ALL.into_iter().zip(row.chars()) {
                assert_eq!(verb.admitted(status), cell == 'x', "{verb:?} in {status:?}");
            }
        }
        assert_eq!(
            check_verb("j", Paused, Verb::Complete).unwrap_err().desc,
            "Job 'j' in state 'paused' cannot accept command verb 'complete'"
        );
    }
}
