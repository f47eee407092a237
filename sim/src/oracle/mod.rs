//! Oracles: each watches one property of a run and says what is wrong, where, and on what evidence.
//!
//! Rules: independent of each other; sound (a verdict is never wrong); incremental; reset in place between runs.
//! Each lives in its own file with tests that show it firing on a deliberately wrong history.

mod bitmap;
pub(crate) mod bottom;
pub(crate) mod data;
mod drain;
mod errors;
mod frozen;
mod graph;
mod jobs;
mod leaks;
mod liveness;
mod mirror;
mod modelled;
mod permissions;
mod point_in_time;
mod refusals;
mod status;
mod throttled;
mod unordered;

pub use drain::Drain;
pub use frozen::Frozen;
pub use jobs::Jobs;
pub use leaks::Leaks;
pub use liveness::Liveness;
pub(crate) use mirror::Mirror;
pub use modelled::Modelled;
pub use permissions::Permissions;
pub use point_in_time::PointInTime;
pub use unordered::Unordered;

use blkcheck_impl::Layer;

use crate::history::{Record, StepId};
use crate::image::bitmaps::Stored;
use crate::scenario::Scenario;

/// Names, as reports and scenario files have them.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub enum OracleName {
    /// Reads are explained by a linearizable register history.
    Data,
    /// Jobs and filters never change what a guest reads; intermediate nodes keep their content.
    Transparency,
    /// Copy-on-read and stream respect `bottom`.
    Bottom,
    /// Frozen edges never change; freezes balance.
    Frozen,
    /// Masks are conflict free and as recomputed from scratch; every I/O had its permission.
    Permissions,
    /// Drained means drained; counters balance.
    Drain,
    /// Block status tells the truth.
    Status,
    /// The graph is well formed and as the model says.
    Graph,
    /// Jobs obey their state machine, events come in order.
    Jobs,
    /// Commands are refused as specified, and then change nothing.
    Refusals,
    /// A guest's request fails for a reason.
    Errors,
    /// Everything finishes.
    Liveness,
    /// Images on disk are sound after a clean close and hold what the guest saw.
    Image,
    /// Dirty bitmaps hold what was written.
    Bitmap,
    /// Backups and snapshots show the source as it was at their instant.
    PointInTime,
    /// Nothing is left behind.
    Leaks,
    /// The subject panicked.
    Panic,
    /// The subject is a process of its own, and it died, hangs or talks nonsense.
    Daemon,
    /// The same choices gave another trace.
    Determinism,
}

impl OracleName {
    /// The name in reports.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            OracleName::Data => "data",
            OracleName::Transparency => "transparency",
            OracleName::Bottom => "bottom",
            OracleName::Frozen => "frozen",
            OracleName::Permissions => "permissions",
            OracleName::Drain => "drain",
            OracleName::Status => "status",
            OracleName::Graph => "graph",
            OracleName::Jobs => "jobs",
            OracleName::Refusals => "refusals",
            OracleName::Errors => "errors",
            OracleName::Liveness => "liveness",
            OracleName::Image => "image",
            OracleName::Bitmap => "bitmap",
            OracleName::PointInTime => "point-in-time",
            OracleName::Leaks => "leaks",
            OracleName::Panic => "panic",
            OracleName::Daemon => "daemon",
            OracleName::Determinism => "determinism",
        }
    }
}

/// A verdict.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Who says so.
    pub oracle: OracleName,
    /// One sentence of what is wrong.
    pub message: String,
    /// The step it concerns, where one does.
    pub step: Option<StepId>,
    /// Further lines: expected and found, who did what when.
    pub evidence: Vec<String>,
}

/// What an oracle may look at besides the record itself.
#[derive(Debug)]
pub struct View<'a> {
    /// The scenario.
    pub scenario: &'a Scenario,
    /// Position in the history: the number of records before this one; serves as time.
    pub now: u64,
    /// The layer, where the target is one in this process.
    pub layer: Option<&'a Layer>,
}

/// Content of a node or an image, read after the actors are done: what each grain holds.
#[derive(Debug)]
pub struct FinalContent<'a> {
    /// node-name (content as read through the node) or file name (as an independent reader of the closed image sees
    /// it through its backing chain).
    pub name: &'a str,
    /// All bytes.
    pub bytes: &'a [u8],
    /// Allocation of this layer alone: runs of (bytes, allocated) covering the length.
    pub allocated: &'a [(u64, bool)],
    /// Ranges (offset, bytes) that the block status of this layer alone calls zeroes, as far as it was asked.
    pub zeroes: &'a [(u64, u64)],
}

/// One property.
pub trait Oracle: std::fmt::Debug {
    /// Its name.
    fn name(&self) -> OracleName;
    /// Forget the last run, prepare for this one.
    fn reset(&mut self, scenario: &Scenario);
    /// Something happened.
    fn record(&mut self, view: &View<'_>, record: &Record) -> Result<(), Violation>;
    /// Nothing can go on before time passes.
    fn only_time(&mut self) -> Result<(), Violation> {
        Ok(())
    }
    /// The actors are done, nothing is in flight, jobs that end by themselves have ended; nodes are still open.
    /// `contents`: every node, read in full.
    fn quiescent(&mut self, _view: &View<'_>, _contents: &[FinalContent<'_>]) -> Result<(), Violation> {
        Ok(())
    }
    /// Nothing can run any more although actors are not done. Only `liveness` has something to say.
    fn stuck(&mut self, _view: &View<'_>) -> Result<(), Violation> {
        Ok(())
    }
    /// The layer was shut down; this is what the header of a qcow2 image names as its backing file, and its format.
    fn header(
        &mut self,
        _view: &View<'_>,
        _file: &str,
        _backing: Option<(&str, Option<&str>)>,
    ) -> Result<(), Violation> {
        Ok(())
    }
    /// The layer was shut down; these bitmaps a qcow2 image stores.
    fn bitmaps(&mut self, _view: &View<'_>, _file: &str, _stored: &[Stored]) -> Result<(), Violation> {
        Ok(())
    }
    /// The power failed; these bitmaps are left in a qcow2 image.
    fn bitmaps_left(&mut self, _view: &View<'_>, _file: &str, _stored: &[Stored]) -> Result<(), Violation> {
        Ok(())
    }
    /// The power failed. `contents`: every image file that is left and can be read, with the images below it by its header,
    /// by their places in the scenario.
    fn after_power_cut(
        &mut self,
        _view: &View<'_>,
        _contents: &[(FinalContent<'_>, Vec<usize>)],
    ) -> Result<(), Violation> {
        Ok(())
    }
    /// The layer was shut down. `contents`: every image file, read independently.
    fn closed(&mut self, _view: &View<'_>, _contents: &[FinalContent<'_>]) -> Result<(), Violation> {
        Ok(())
    }
}

/// Shorthand.
pub(crate) fn violation(
    oracle: OracleName,
    step: Option<StepId>,
    message: impl Into<String>,
    evidence: Vec<String>,
) -> Violation {
    Violation {
        oracle,
        message: message.into(),
        step,
        evidence,
    }
}

/// Every oracle, in the order in which they are asked: cheap and sharp ones first, so that a finding names the cause
/// rather than a consequence.
#[must_use]
pub fn all() -> Vec<Box<dyn Oracle>> {
    vec![
        Box::new(Frozen::default()),
        Box::new(Permissions::default()),
        Box::new(Drain::default()),
        Box::new(PointInTime::default()),
        Box::new(Jobs::default()),
        Box::new(Liveness::default()),
        Box::new(Modelled::layer()),
        Box::new(Leaks::default()),
    ]
}

/// Those that need no look inside: for subjects that are known by their answers, their job events and the graph they
/// show when at rest.
#[must_use]
pub fn outside() -> Vec<Box<dyn Oracle>> {
    vec![
        Box::new(Jobs::default()),
        Box::new(Modelled::outside()),
        Box::new(Leaks::default()),
    ]
}

/// Those that need no order: for a subject that nobody schedules and nobody looks into.
#[must_use]
pub fn unordered() -> Vec<Box<dyn Oracle>> {
    vec![
        Box::new(Jobs::default()),
        Box::new(Unordered::default()),
        Box::new(Leaks::default()),
    ]
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A scenario with one step of each kind that the tests need.
    pub(crate) fn scenario_of(json: &str) -> Scenario {
        serde_json::from_str(json).expect("test scenario")
    }

    /// An empty scenario.
    pub(crate) fn scenario() -> Scenario {
        scenario_of(r#"{"version":1,"grain":64,"images":[],"steps":[]}"#)
    }

    /// Feeds a history by hand.
    pub(crate) fn feed(
        oracle: &mut dyn Oracle,
        records: impl IntoIterator<Item = Record>,
    ) -> Result<(), Violation> {
        feed_on(oracle, &scenario(), records)
    }

    /// Feeds a history of this scenario.
    pub(crate) fn feed_on(
        oracle: &mut dyn Oracle,
        scenario: &Scenario,
        records: impl IntoIterator<Item = Record>,
    ) -> Result<(), Violation> {
        for (now, record) in (0..).zip(records) {
            oracle.record(
                &View {
                    scenario,
                    now,
                    layer: None,
                },
                &record,
            )?;
        }
        Ok(())
    }

    #[test]
    fn each_oracle_is_there_once_and_survives_an_empty_run() {
        let scenario = scenario();
        let view = View {
            scenario: &scenario,
            now: 0,
            layer: None,
        };
        let mut names = Vec::new();
        for mut oracle in all() {
            oracle.reset(&scenario);
            assert_eq!(oracle.quiescent(&view, &[]), Ok(()));
            assert_eq!(oracle.closed(&view, &[]), Ok(()));
            names.push(oracle.name());
        }
        let count = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), count);
    }
}
