//! Targets: what a scenario runs on. One trait for the layer in simulation, the layer over real files and devices, and
//! block layers of others.
//!
//! Rules: [`Target::issue`] starts an operation and returns; whatever the target does then happens inside
//! [`Target::advance`], one thing at a time, in the order that the runner chooses. A target that cannot order something
//! (a real disk) counts it as `external` and blocks in [`Move::External`] until something happened.
//! What a target cannot do it says in its [`Capabilities`]; the generator stays within them.

mod faults;
#[cfg(target_os = "linux")]
pub mod loopdev;
#[cfg(target_os = "linux")]
pub mod qemu;
#[cfg(target_os = "linux")]
mod ranges;
#[cfg(target_os = "linux")]
pub mod real;
pub mod simulated;
#[cfg(target_os = "linux")]
pub mod stress;

use blkcheck_impl::Layer;

use crate::choice::Key;
use crate::disk::Remains;
use crate::history::{Record, StepId};
use crate::oracle::Violation;
use crate::panics::PanicReport;
use crate::scenario::{Format, Scenario};

#[cfg(target_os = "linux")]
pub use qemu::QemuTarget;
#[cfg(target_os = "linux")]
pub use real::RealTarget;
pub use simulated::SimTarget;
#[cfg(target_os = "linux")]
pub use stress::StressTarget;

/// What a target can do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Capabilities {
    /// `drained-begin` and `drained-end` steps.
    pub drain: bool,
    /// Reports [`Record::Layer`] events.
    pub events: bool,
    /// The same choices give the same trace.
    pub deterministic: bool,
    /// Block status requests.
    pub block_status: bool,
    /// Direct I/O with `Disk::alignment`, and disks without cheap zeroes.
    pub disk_options: bool,
    /// [`Target::power_cut`].
    pub power_cut: bool,
}

/// How many things of each kind can happen next.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Alternatives {
    /// Tasks that can go on, oldest first.
    pub ready: u32,
    /// Storage requests that can complete, oldest first.
    pub storage: u32,
    /// Somebody waits for time to pass.
    pub timer: bool,
    /// Things under way that the target cannot order.
    pub external: bool,
}

/// One thing that happens.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Move {
    /// This ready task goes on.
    Ready(u32),
    /// This storage request completes.
    Storage(u32),
    /// Time passes up to the next timer.
    Timer,
    /// Wait for something outside.
    External,
}

/// Why a target cannot go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// The subject panicked.
    Panicked(PanicReport),
    /// The subject is a process of its own, and it died, hangs or talks nonsense.
    Lost(String),
    /// Nothing can happen although something is unfinished.
    Stuck(&'static str),
    /// The environment is unusable.
    Unusable(String),
}

/// How a step goes with the known defects of a subject.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Steering {
    /// It meets none.
    Go,
    /// It would meet one with what is under way now.
    Wait,
    /// It would meet this one.
    PassOver(&'static str),
}

/// Content of an open node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeContent {
    /// node-name.
    pub name: String,
    /// All bytes.
    pub bytes: Vec<u8>,
    /// Runs of (bytes, allocated in this node itself).
    pub allocated: Vec<(u64, bool)>,
    /// Ranges (offset, bytes) that the block status of this layer alone calls zeroes; where the target cannot ask: none.
    pub zeroes: Vec<(u64, u64)>,
}

/// An image file after close.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClosedFile {
    /// File name.
    pub name: String,
    /// What it was created as.
    pub format: Format,
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Two writers had it open at once, so nobody answers for its content.
    pub contested: bool,
}

/// What is left after close; all empty when nothing leaked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Leftovers {
    /// Tasks that did not end.
    pub tasks: Vec<&'static str>,
    /// Storage handles and requests.
    pub storage: Vec<String>,
    /// Nodes, edges and backends.
    pub graph: Vec<String>,
}

/// What a scenario runs on.
pub trait Target: std::fmt::Debug {
    /// What it can do.
    fn capabilities(&self) -> Capabilities;

    /// The scenario as it has to be put for this target; `None`: as it is. Runner and oracles then see that one.
    fn adapt(&self, _scenario: &Scenario) -> Option<Scenario> {
        None
    }

    /// Forgets the last run, lays out the images, starts empty.
    ///
    /// # Errors
    /// When the environment is unusable.
    fn prepare(&mut self, scenario: &Scenario) -> Result<(), Trouble>;

    /// Starts a step's operation. Its [`Record::Ended`] comes through [`Target::take_records`], now or later. Steps
    /// that wait (`wait-job`, `settle`) are the runner's own and never come here.
    fn issue(&mut self, scenario: &Scenario, step: StepId);

    /// Whether a step would meet a known defect if it were started now. Asked only in scenarios that are steered.
    fn steering(&self, _scenario: &Scenario, _step: StepId) -> Steering {
        Steering::Go
    }

    /// From the next [`Target::prepare`] on: collect what helps to understand a failure, at any price.
    fn look_closely(&mut self, _closely: bool) {}

    /// Scheduler steps after which a run counts as a livelock.
    fn step_limit(&self) -> u64 {
        200_000
    }

    /// What can happen next.
    fn alternatives(&mut self) -> Alternatives;

    /// Identities of the ready tasks, then of the storage requests, in the order of [`Target::alternatives`].
    fn keys(&self, into: &mut Vec<Key>);

    /// Lets one thing happen.
    ///
    /// # Errors
    /// A panic of the subject; the target then only takes [`Target::prepare`].
    fn advance(&mut self, next: Move) -> Result<(), Trouble>;

    /// In how many ways this storage request can end by the scenario's `faults`, well included. Asked once for each
    /// request, just before it ends. 1: only well.
    fn endings(&mut self, _storage: u32) -> u32 {
        1
    }

    /// Whether this storage request is a flush; asked where the power may fail.
    fn is_flush(&mut self, _storage: u32) -> bool {
        false
    }

    /// Lets this storage request end badly, in one of those ways (1 on), and records the fault.
    fn fail(&mut self, _storage: u32, _ending: u32) {
        unreachable!("no request of this target can fail");
    }

    /// The power fails: what is left of each image file, by its place in the scenario. `choose` picks one of so many ways, of
    /// which 0 loses nothing. The target then only takes [`Target::prepare`].
    fn power_cut(&mut self, _choose: &mut dyn FnMut(u32) -> u32) -> Vec<(ClosedFile, Remains)> {
        unreachable!("the storage of this target has power");
    }

    /// Moves what happened since the last call to the end of `into`, in order.
    fn take_records(&mut self, into: &mut Vec<Record>);

    /// The layer, when it lives in this process.
    fn layer(&self) -> Option<&Layer>;

    /// Reads every node that somebody could read, in full.
    ///
    /// # Errors
    /// When the subject panics or hangs over it.
    fn contents(&mut self) -> Result<Vec<NodeContent>, Trouble>;

    /// Shuts the subject down in an orderly way.
    ///
    /// # Errors
    /// When the subject panics or hangs over it.
    fn close(&mut self) -> Result<Leftovers, Trouble>;

    /// The image files, after [`Target::close`].
    fn closed_files(&mut self) -> Vec<ClosedFile>;

    /// What judges outside of this program say of the images, after [`Target::closed_files`]. `sound`: names and guest
    /// content, as the independent reader sees it, of those images that the subject answers for.
    ///
    /// # Errors
    /// They cannot be asked.
    fn judge(&mut self, _sound: &[(&str, &[u8])]) -> Result<Option<Violation>, Trouble> {
        Ok(None)
    }

    /// What the subject waits for, for people: tasks and requests.
    fn describe(&self) -> Vec<String>;
}
