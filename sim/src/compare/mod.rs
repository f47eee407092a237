//! `compare`: the model against the shipping `qemu-storage-daemon`, in lock step and strictly one step at a time.
//!
//! * [`peer`]: the daemon, with the images in our memory and nothing ever held;
//! * `state`: what can be seen of either, and where they differ;
//! * `content`: what every image holds, step by step;
//! * [`lockstep`]: one scenario;
//! * [`generate`]: scenarios from seeds, made of refusals as much as of successes;
//! * [`exhaustive`]: every sequence of a fixed set of commands up to a length;
//! * [`beyond`]: scenarios of commands that the model does not know, judged by what holds whatever they mean;
//! * [`known`]: defects of the daemon that were reviewed and are held to be its own;
//! * [`cost`]: what comparing costs, beside what the daemon costs;
//! * [`campaign`]: many scenarios; what is found is shrunk and saved.
//!
//! Not here: interleavings, which `run --on qemu` judges and [`crate::agree`] compares; failing storage; timers.

pub mod beyond;
mod bitmaps;
pub mod campaign;
mod content;
pub mod cost;
pub mod exhaustive;
pub mod generate;
pub mod known;
pub mod known_run;
pub mod lockstep;
pub mod peer;
mod state;
mod unsettled;

use crate::oracle::OracleName;
use crate::qemu::Broken;

/// What differs.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum What {
    /// A command's answer.
    Result,
    /// Events of a job, or their order.
    Events,
    /// Nodes.
    Nodes,
    /// Edges.
    Edges,
    /// Permission masks.
    Masks,
    /// Read-only flags.
    ReadOnly,
    /// The backing file on record.
    Backing,
    /// Jobs, or the status they rest in.
    Jobs,
    /// What a node reads as.
    Content,
    /// What a layer holds itself.
    Allocation,
    /// Dirty bitmaps.
    Bitmaps,
    /// A refused command changed something.
    Refusal,
}

impl What {
    /// The name in reports.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            What::Result => "result",
            What::Events => "events",
            What::Nodes => "nodes",
            What::Edges => "edges",
            What::Masks => "permissions",
            What::ReadOnly => "read-only",
            What::Backing => "backing file",
            What::Jobs => "jobs",
            What::Content => "content",
            What::Allocation => "allocation",
            What::Bitmaps => "bitmaps",
            What::Refusal => "state after refusal",
        }
    }

    /// The oracle that watches over the same thing; shrinking keeps to it.
    fn oracle(self) -> OracleName {
        match self {
            What::Result | What::Refusal => OracleName::Refusals,
            What::Events | What::Jobs => OracleName::Jobs,
            What::Nodes | What::Edges => OracleName::Graph,
            What::Masks | What::ReadOnly => OracleName::Permissions,
            What::Content | What::Bitmaps => OracleName::Data,
            What::Backing | What::Allocation => OracleName::Image,
        }
    }
}

/// How a daemon failed.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Kind {
    /// It died.
    Crash,
    /// It does not answer.
    Hang,
    /// It gave up on itself.
    Assert,
    /// We are short of something ourselves: it says nothing about the daemon.
    Unusable,
}

impl Kind {
    /// The name in reports.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::Crash => "crash",
            Kind::Hang => "hang",
            Kind::Assert => "assert",
            Kind::Unusable => "unusable",
        }
    }

    fn of(broken: &Broken, words: &[String]) -> Kind {
        match broken {
            Broken::Hangs(_) => Kind::Hang,
            Broken::Died(how) if how.contains("SIGABRT") || words.iter().any(|w| w.contains("Assertion")) => {
                Kind::Assert
            }
            Broken::Died(_) | Broken::Nonsense(_) => Kind::Crash,
            Broken::Unusable(_) => Kind::Unusable,
        }
    }
}
