//! Everything one worker needs to run scenarios: target, runner, oracles, chooser; made once, reused for every seed.

use std::cell::RefCell;
use std::rc::Rc;

use crate::choice::{Chooser, Pct, Random, Recorded, Recording};
use crate::cli::{CliError, Faults, On, Scheduler, Tier};
use crate::compare::known::Defect;
use crate::compare::known_run;
use crate::generate::{Profile, Reach, add_faults, add_power_cut, generate, without_compression};
use crate::guide::{Path, Tracking};
use crate::history::Record;
use crate::marks::{Counts, Detector};
use crate::oracle::{self, FinalContent, Oracle, OracleName, View, Violation};
use crate::run::{RunResult, Runner};
use crate::scenario::Scenario;
use crate::shrink::{Execute, Limits, Trial};
use crate::target::real::{Medium, RealTarget};
use crate::target::{QemuTarget, SimTarget, StressTarget, Target};

/// Records compared when a seed runs twice.
const TRACE_KEPT: usize = 1 << 16;

/// One seed in this many is not steered around the known defects of the daemon.
const UNSTEERED: u64 = 16;

/// What a worker runs and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Setup {
    /// Target.
    pub on: On,
    /// How choices are made.
    pub scheduler: Scheduler,
    /// Which scenarios.
    pub profile: Profile,
    /// Which faults.
    pub faults: Faults,
    /// The daemon to run on; `None`: the one in PATH.
    pub qemu: Option<&'static std::path::Path>,
    /// How that daemon is run.
    pub tier: Tier,
}

impl Default for Setup {
    fn default() -> Setup {
        Setup {
            on: On::Memory,
            scheduler: Scheduler::Random,
            profile: Profile::Mixed,
            faults: Faults::None,
            qemu: None,
            tier: Tier::Gated,
        }
    }
}

impl Setup {
    /// The daemon as it comes: what it does is not a function of the seed.
    #[must_use]
    pub fn is_stress(&self) -> bool {
        self.on == On::Qemu && self.tier == Tier::Stress
    }

    /// Whether runs are deterministic and every event is seen.
    #[must_use]
    pub fn is_simulated(&self) -> bool {
        self.on == On::Memory
    }

    /// The target's name on the command line.
    #[must_use]
    pub fn on_name(&self) -> &'static str {
        match self.on {
            On::Memory => "memory",
            On::File => "file",
            On::Loop => "loop",
            On::Qemu if self.is_stress() => "qemu --tier stress",
            On::Qemu => "qemu",
        }
    }

    /// The scheduler's name on the command line.
    #[must_use]
    pub fn scheduler_name(&self) -> String {
        match self.scheduler {
            Scheduler::Random => "random".to_owned(),
            Scheduler::Pct(depth) => format!("pct:{depth}"),
        }
    }

    /// The faults' name on the command line.
    #[must_use]
    pub fn faults_name(&self) -> &'static str {
        match self.faults {
            Faults::None => "none",
            Faults::Errors => "errors",
            Faults::Crash => "crash",
            Faults::All => "all",
        }
    }

    fn loses_power(&self) -> bool {
        matches!(self.faults, Faults::Crash | Faults::All)
    }

    /// Whether backups are generated: where storage fails, only for those who ask for them.
    fn backs_up(&self) -> bool {
        match self.faults {
            Faults::None => true,
            Faults::Errors | Faults::Crash | Faults::All => self.profile == Profile::Backup,
        }
    }

    fn reach(&self) -> Reach {
        let backups = self.profile == Profile::Backup;
        match self.on {
            On::Memory => Reach {
                // What a snapshot leaves behind that storage failed is not told by the model.
                snapshots: matches!(self.faults, Faults::None),
                // The same of what is stored of bitmaps; that the power fails is told.
                bitmaps: matches!(self.faults, Faults::None | Faults::Crash),
                snapshot_access: self.backs_up(),
                backup: self.backs_up(),
                // A command that storage fails on the way leaves a length that nobody knows; then the power fails.
                resize: self.faults != Faults::All,
                ..Reach::all()
            },
            On::File => Reach {
                drain: true,
                alignment: false,
                fine_grain: true,
                raw_tails: true,
                rates: true,
                inline_backing: true,
                reopen: true,
                snapshots: true,
                resize: true,
                throttle: true,
                bitmaps: true,
                snapshot_access: true,
                backup: true,
                discard_source: true,
                compression: true,
            },
            On::Loop => Reach {
                drain: true,
                alignment: false,
                fine_grain: true,
                raw_tails: false,
                rates: true,
                inline_backing: true,
                reopen: true,
                snapshots: true,
                resize: false,
                throttle: true,
                bitmaps: true,
                snapshot_access: true,
                backup: true,
                discard_source: true,
                compression: true,
            },
            On::Qemu if self.is_stress() => Reach {
                drain: false,
                alignment: false,
                fine_grain: true,
                raw_tails: true,
                rates: true,
                inline_backing: true,
                reopen: false,
                snapshots: false,
                resize: false,
                // The daemon throttles by the real clock.
                throttle: false,
                bitmaps: false,
                snapshot_access: false,
                backup: false,
                discard_source: false,
                compression: false,
            },
            On::Qemu => Reach {
                drain: false,
                alignment: false,
                fine_grain: true,
                raw_tails: false,
                rates: false,
                inline_backing: false,
                reopen: true,
                // As in memory.
                snapshots: matches!(self.faults, Faults::None),
                resize: !self.loses_power(),
                // The daemon throttles by the real clock.
                throttle: false,
                bitmaps: backups && matches!(self.faults, Faults::None | Faults::Crash),
                snapshot_access: backups,
                backup: backups,
                // Nobody tells of the discards, which mark bitmaps.
                discard_source: false,
                compression: false,
            },
        }
    }

    /// What shrinking one finding may cost: a daemon is some thousand times slower than a simulation, and one that
    /// hangs, or goes on for ever, has to be waited for.
    #[must_use]
    pub fn limits(&self, oracle: OracleName) -> Limits {
        match (self.on, oracle) {
            (On::Memory | On::File | On::Loop, _) => Limits::default(),
            // Whether it happens again says nothing there, and one that hangs takes minutes.
            (On::Qemu, OracleName::Daemon | OracleName::Liveness) if self.is_stress() => Limits {
                executions: 0,
                schedules: 0,
            },
            (On::Qemu, OracleName::Daemon | OracleName::Liveness) => Limits {
                executions: 12,
                schedules: 0,
            },
            (On::Qemu, _) => Limits {
                executions: 120,
                schedules: 0,
            },
        }
    }

    /// The scenario of a seed.
    #[must_use]
    pub fn scenario(&self, seed: u64) -> Scenario {
        let mut scenario = generate(seed, self.profile, self.reach());
        if matches!(self.faults, Faults::Errors | Faults::All) {
            add_faults(&mut scenario, seed);
        }
        if self.on == On::Qemu && !self.is_stress() {
            // QEMU unpacks in threads, and which of two is done first is nobody's choice.
            without_compression(&mut scenario);
        }
        if self.loses_power() {
            add_power_cut(&mut scenario, seed, self.reach().resize);
        }
        // Some meet the known defects all the same: they should still be there.
        scenario.steer = self.on == On::Qemu && !self.is_stress() && !seed.is_multiple_of(UNSTEERED);
        scenario
    }

    fn chooser(&self, seed: u64) -> Box<dyn Chooser> {
        match self.scheduler {
            Scheduler::Random => Box::new(Random::new(seed)),
            Scheduler::Pct(depth) => Box::new(Pct::new(depth, seed)),
        }
    }
}

/// What a seed gave.
#[derive(Clone, Debug)]
pub struct SeedRun {
    /// Folded from every record.
    pub trace_hash: u64,
    /// Operations carried out.
    pub operations: u64,
    /// Scheduling steps.
    pub steps: u64,
    /// What failed.
    pub violation: Option<Violation>,
    /// The reviewed defect of the subject that explains it.
    pub known: Option<&'static Defect>,
}

/// What a replay gave.
#[derive(Clone, Debug)]
pub struct Replayed {
    /// Folded from every record.
    pub trace_hash: u64,
    /// What failed.
    pub violation: Option<Violation>,
    /// The reviewed defect of the subject that explains it.
    pub known: Option<&'static Defect>,
    /// Everything that happened.
    pub records: Vec<Record>,
    /// The scenario with the runner's own steps at its end.
    pub scenario: Scenario,
    /// Every node before the shutdown, by name; empty when the run failed before.
    pub allocation: Vec<NodeAllocation>,
}

/// Which bytes a node itself decides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeAllocation {
    /// node-name.
    pub node: String,
    /// Runs of (bytes, allocated in this node itself), covering its length.
    pub runs: Vec<(u64, bool)>,
}

/// A worker's equipment.
#[derive(Debug)]
pub struct Harness {
    setup: Setup,
    target: Box<dyn Target>,
    runner: Runner,
    oracles: Vec<Box<dyn Oracle>>,
    marks: Rc<RefCell<Detector>>,
    allocation: Rc<RefCell<Vec<NodeAllocation>>>,
    choices: Vec<u32>,
}

impl Harness {
    /// Equipment for this setup.
    ///
    /// # Errors
    /// When the environment cannot run the target.
    pub fn new(setup: &Setup) -> Result<Harness, CliError> {
        let target: Box<dyn Target> = match setup.on {
            On::Memory => Box::new(SimTarget::new()),
            On::File => Box::new(RealTarget::new(Medium::File).map_err(environment)?),
            On::Loop => Box::new(RealTarget::new(Medium::Loop).map_err(environment)?),
            On::Qemu if setup.is_stress() => Box::new(StressTarget::new(setup.qemu).map_err(environment)?),
            On::Qemu => Box::new(QemuTarget::new(setup.qemu).map_err(environment)?),
        };
        let marks = Rc::<RefCell<Detector>>::default();
        let mut oracles = if target.capabilities().events {
            oracle::all()
        } else if setup.is_stress() {
            oracle::unordered()
        } else {
            oracle::outside()
        };
        // Last, so that a run that fails counts only what it did.
        let allocation = Rc::<RefCell<Vec<NodeAllocation>>>::default();
        oracles.push(Box::new(Watcher {
            marks: Rc::clone(&marks),
            allocation: Rc::clone(&allocation),
        }));
        let mut runner = Runner::new();
        // What a finding is known for can be seen in what happened.
        runner.keep_records(setup.on == On::Qemu);
        Ok(Harness {
            setup: *setup,
            target,
            runner,
            oracles,
            marks,
            allocation,
            choices: Vec::new(),
        })
    }

    /// Runs the scenario of a seed; `twice` also checks that a second run is the same.
    ///
    /// # Errors
    /// When the environment fails.
    pub fn seed(&mut self, seed: u64, twice: bool) -> Result<SeedRun, CliError> {
        let scenario = self.setup.scenario(seed);
        let mut chooser = self.setup.chooser(seed);
        let deterministic = self.target.capabilities().deterministic;
        let result = self.once(&scenario, &mut *chooser)?;
        let mut violation = result.violation.clone();
        let known = self.known(violation.as_ref());
        if twice && violation.is_none() && deterministic {
            let mut again = self.setup.chooser(seed);
            let second = self.once(&scenario, &mut *again)?;
            if second.trace_hash != result.trace_hash {
                violation = Some(self.difference(seed, &scenario)?);
            }
        }
        Ok(SeedRun {
            trace_hash: result.trace_hash,
            operations: result.operations,
            steps: result.steps,
            violation,
            known,
        })
    }

    /// The reviewed defect that explains what the last run found.
    fn known(&self, violation: Option<&Violation>) -> Option<&'static Defect> {
        if self.setup.on != On::Qemu {
            return None;
        }
        let stress = violation.filter(|_| self.setup.is_stress());
        stress
            .and_then(known_run::explain_stress)
            .or_else(|| known_run::explain(self.runner.scenario(), violation?, self.runner.records()))
    }

    /// The scenario of a seed with the choices that its run makes.
    ///
    /// # Errors
    /// When the environment fails.
    pub fn recorded(&mut self, seed: u64) -> Result<Scenario, CliError> {
        let mut scenario = self.setup.scenario(seed);
        if self.setup.is_stress() {
            // Another run makes other choices.
            return Ok(scenario);
        }
        let mut chooser = self.setup.chooser(seed);
        let mut choices = Vec::new();
        self.once(&scenario, &mut Recording::new(&mut *chooser, &mut choices))?;
        trim(&mut choices);
        scenario.choices = choices;
        Ok(scenario)
    }

    /// Runs a scenario with its recorded choices and keeps everything that happened.
    ///
    /// # Errors
    /// When the environment fails.
    pub fn replay(&mut self, scenario: &Scenario) -> Result<Replayed, CliError> {
        self.runner.keep_records(true);
        let result = self.once(scenario, &mut Recorded::new(&scenario.choices));
        self.runner.keep_records(self.setup.on == On::Qemu);
        let mut result = result?;
        let known = self.known(result.violation.as_ref());
        // What is seen below comes from another run.
        let (records, as_run) = (self.runner.records().to_vec(), self.runner.scenario().clone());
        let allocation = self.allocation.borrow().clone();
        if let Some(violation) = &mut result.violation {
            self.look_closely(scenario, violation)?;
        }
        Ok(Replayed {
            trace_hash: result.trace_hash,
            known,
            violation: result.violation,
            records,
            scenario: as_run,
            allocation,
        })
    }

    /// Finds out more about a subject that died or hangs, by another run with everything watched.
    ///
    /// # Errors
    /// When the environment fails.
    pub fn look_closely(&mut self, scenario: &Scenario, violation: &mut Violation) -> Result<(), CliError> {
        if violation.oracle != OracleName::Daemon || self.setup.is_stress() {
            return Ok(());
        }
        self.target.look_closely(true);
        let again = self.once(scenario, &mut Recorded::new(&scenario.choices));
        self.target.look_closely(false);
        if let Some(seen) = again?.violation.filter(|v| v.message == violation.message) {
            violation.evidence = seen.evidence;
        }
        Ok(())
    }

    /// Runs a scenario under any chooser.
    ///
    /// # Errors
    /// When the environment fails.
    pub fn once(&mut self, scenario: &Scenario, chooser: &mut dyn Chooser) -> Result<RunResult, CliError> {
        self.runner
            .run(scenario, chooser, &mut *self.target, &mut self.oracles)
            .map_err(CliError::Environment)
    }

    /// Where two runs of one seed part.
    fn difference(&mut self, seed: u64, scenario: &Scenario) -> Result<Violation, CliError> {
        self.runner.keep_trace(TRACE_KEPT);
        let mut traces = Vec::new();
        for _ in 0..2 {
            let mut chooser = self.setup.chooser(seed);
            self.once(scenario, &mut *chooser)?;
            traces.push(self.runner.trace().clone());
        }
        self.runner.keep_trace(0);
        let first = crate::trace::first_difference(&traces[0], &traces[1]);
        Ok(Violation {
            oracle: OracleName::Determinism,
            message: "the same choices gave another trace".to_owned(),
            step: None,
            evidence: vec![
                first.map_or_else(|| "not in a third and fourth run".to_owned(), |d| d.to_string()),
            ],
        })
    }

    /// How often each situation and each (operation, state) pair occurred so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.marks.borrow().counts().clone()
    }
}

/// Shows every record to the marks and keeps the allocation at the end; never has a verdict.
#[derive(Debug)]
struct Watcher {
    marks: Rc<RefCell<Detector>>,
    allocation: Rc<RefCell<Vec<NodeAllocation>>>,
}

impl Oracle for Watcher {
    fn name(&self) -> OracleName {
        OracleName::Liveness
    }
    fn reset(&mut self, scenario: &Scenario) {
        self.marks.borrow_mut().reset(scenario);
        self.allocation.borrow_mut().clear();
    }
    fn record(&mut self, view: &View<'_>, record: &Record) -> Result<(), Violation> {
        self.marks.borrow_mut().record(view.scenario, record);
        Ok(())
    }
    fn quiescent(&mut self, _view: &View<'_>, contents: &[FinalContent<'_>]) -> Result<(), Violation> {
        let nodes = contents.iter();
        self.allocation.borrow_mut().extend(nodes.map(|c| NodeAllocation {
            node: c.name.to_owned(),
            runs: c.allocated.to_vec(),
        }));
        Ok(())
    }
}

/// Everything that happens in one replay in memory; `None` when the environment fails.
#[must_use]
pub fn records_of(scenario: &Scenario) -> Option<(Scenario, Vec<Record>)> {
    let mut harness = Harness::new(&Setup::default()).ok()?;
    harness.replay(scenario).ok().map(|r| (r.scenario, r.records))
}

impl Execute for Harness {
    fn execute(&mut self, scenario: &Scenario, chooser: &mut dyn Chooser) -> Trial {
        let mut choices = std::mem::take(&mut self.choices);
        let mut path = Path::default();
        let tracking = Tracking::new(chooser, &mut path);
        let result = self.once(scenario, &mut Recording::new(tracking, &mut choices));
        let mut made = choices.clone();
        self.choices = choices;
        trim(&mut made);
        // An environment that fails while shrinking shows nothing about the subject.
        Trial {
            violation: result.ok().and_then(|r| r.violation),
            choices: made,
            path,
        }
    }
}

fn trim(choices: &mut Vec<u32>) {
    let used = choices.iter().rposition(|&c| c != 0).map_or(0, |last| last + 1);
    choices.truncate(used);
}

fn environment(error: impl std::fmt::Display) -> CliError {
    CliError::Environment(error.to_string())
}
