//! The runner: one scenario, one chooser, one target, any number of oracles.
//!
//! Rules: a run is a function of (scenario, choices). What can happen next is listed in this order: ready tasks oldest
//! first, storage requests oldest first, actors in the order of their next steps in the file, the clock. So choice 0
//! all along is a fully sequential run. When nothing can happen and the scenario itself is to blame (a paused job, a
//! backup that never ends, an open drained section), the runner clears it away with steps of its own, which are appended to
//! the scenario that oracles see; actors then go on. When that does not help, something hangs.
//! Where the scenario says that the power fails, the run ends there, and what is left of the images is judged.
//! After the last step: every node is read, the layer is shut down, every image is read and checked independently.
//! Everything is reused from run to run.

mod end;
mod jobs;

use blkcheck_impl::event::Event;
use serde_json::{Map, Value};

use crate::choice::{ChoiceKind, Chooser, Key, pick};
use crate::history::{Outcome, Record, StepId};
use crate::oracle::{Oracle, OracleName, View, Violation};
use crate::scenario::{Action, Scenario, Step};
use crate::target::{Alternatives, Move, Steering, Target, Trouble};
use crate::trace::{Fold, Trace};
use jobs::Jobs;

/// Scheduler steps without any storage completion or passing of time, while one was possible, after which the oldest
/// is forced: no chooser may starve the disk for ever.
pub(crate) const PATIENCE: u32 = 20_000;

/// What a run gave.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RunResult {
    /// Folded from every record.
    pub trace_hash: u64,
    /// Operations issued, the runner's own included.
    pub operations: u64,
    /// Scheduler steps.
    pub steps: u64,
    /// What is wrong, if anything.
    pub violation: Option<Violation>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Actor {
    /// Index of its next step; `u32::MAX` at the end.
    next: u32,
    waiting: Option<StepId>,
    in_flight: u32,
}

/// A reusable runner.
#[derive(Debug, Default)]
pub struct Runner {
    /// What oracles see: the scenario plus the runner's own steps.
    scenario: Scenario,
    actors: Vec<Actor>,
    /// The actor whose steps are barriers.
    setup_actor: Option<u32>,
    /// Per step: its actor, and the actor's following step.
    actor_of: Vec<u32>,
    following: Vec<u32>,
    issuable: Vec<(u32, u32)>,
    keys: Vec<Key>,
    jobs: Jobs,
    /// `wait-job` steps that are not over.
    job_waits: Vec<StepId>,
    /// Drained sections that are open: (begun by step).
    sections: Vec<StepId>,
    unfinished: u32,
    /// Storage requests that ended after the setup.
    ended_storage: u32,
    power_failed: bool,
    /// Images on whose files a request failed.
    faulted: Vec<u32>,
    incoming: Vec<Record>,
    batch: Vec<Record>,
    records: Vec<Record>,
    keep_records: bool,
    trace: Trace,
    hash: Fold,
    now: u64,
    steps: u64,
    operations: u64,
}

/// Why the main loop ended early.
enum Stop {
    Violation(Violation),
    Unusable(String),
}

impl From<Violation> for Stop {
    fn from(violation: Violation) -> Stop {
        Stop::Violation(violation)
    }
}

impl Runner {
    /// Keeps nothing but the hash.
    #[must_use]
    pub fn new() -> Runner {
        Runner::default()
    }

    /// Whether [`Runner::records`] are kept.
    pub fn keep_records(&mut self, keep: bool) {
        self.keep_records = keep;
    }

    /// Keeps the last `capacity` records with their hashes in [`Runner::trace`]; 0: none.
    pub fn keep_trace(&mut self, capacity: usize) {
        self.trace = Trace::with_capacity(capacity);
    }

    /// The records of the last run, if kept.
    #[must_use]
    pub fn records(&self) -> &[Record] {
        &self.records
    }

    /// The end of the last run's trace, if kept.
    #[must_use]
    pub fn trace(&self) -> &Trace {
        &self.trace
    }

    /// The scenario of the last run with the runner's own steps at its end: what step ids refer to.
    #[must_use]
    pub fn scenario(&self) -> &Scenario {
        &self.scenario
    }

    /// Runs a scenario once.
    ///
    /// # Errors
    /// When the environment is unusable; whatever the subject does is a result.
    pub fn run(
        &mut self,
        scenario: &Scenario,
        chooser: &mut dyn Chooser,
        target: &mut dyn Target,
        oracles: &mut [Box<dyn Oracle>],
    ) -> Result<RunResult, String> {
        let adapted = target.adapt(scenario);
        let scenario = adapted.as_ref().unwrap_or(scenario);
        if scenario.disk.power_cut.is_some() && !target.capabilities().power_cut {
            let text =
                "the scenario has a power cut, and this storage has power: use --on memory, or --on qemu";
            return Err(text.to_owned());
        }
        self.reset(scenario);
        chooser.begin(64 + 16 * u32::try_from(scenario.steps.len()).expect("validated"));
        for oracle in &mut *oracles {
            oracle.reset(scenario);
        }
        let outcome = target
            .prepare(scenario)
            .map_err(|t| Runner::trouble(t, target, None))
            .and_then(|()| {
                self.actors_act(chooser, target, oracles)?;
                if self.power_failed {
                    return Ok(self.after_power_cut(chooser, target, oracles)?);
                }
                self.finish(target, oracles)
            });
        let violation = match outcome {
            Ok(()) => None,
            Err(Stop::Violation(violation)) => Some(violation),
            Err(Stop::Unusable(text)) => return Err(text),
        };
        Ok(RunResult {
            trace_hash: self.hash.value(),
            operations: self.operations,
            steps: self.steps,
            violation,
        })
    }

    fn reset(&mut self, scenario: &Scenario) {
        self.scenario.clone_from(scenario);
        self.actors.clear();
        self.actor_of.clear();
        self.following.clear();
        let mut names: Vec<(&str, u32)> = Vec::new();
        for (at, step) in (0u32..).zip(&scenario.steps) {
            let actor = match names.iter().position(|(name, _)| *name == step.actor) {
                Some(actor) => {
                    self.following[names[actor].1 as usize] = at;
                    names[actor].1 = at;
                    actor
                }
                None => {
                    names.push((&step.actor, at));
                    self.actors.push(Actor {
                        next: at,
                        ..Actor::default()
                    });
                    names.len() - 1
                }
            };
            self.actor_of.push(u32::try_from(actor).expect("few actors"));
            self.following.push(u32::MAX);
        }
        let setup = names.iter().position(|(name, _)| *name == crate::generate::SETUP);
        self.setup_actor = setup.map(|at| u32::try_from(at).expect("few actors"));
        self.jobs.clear();
        self.job_waits.clear();
        self.sections.clear();
        self.faulted.clear();
        self.incoming.clear();
        self.records.clear();
        self.trace.clear();
        (self.unfinished, self.ended_storage, self.power_failed) = (0, 0, false);
        self.hash = Fold::default();
        (self.now, self.steps, self.operations) = (0, 0, 0);
    }

    /// A trouble as the verdict that it is.
    fn trouble(trouble: Trouble, target: &dyn Target, step: Option<StepId>) -> Stop {
        let (oracle, message) = match trouble {
            Trouble::Unusable(text) => return Stop::Unusable(text),
            Trouble::Panicked(report) => (
                OracleName::Panic,
                format!("{} ({})", report.message, report.location),
            ),
            Trouble::Lost(text) => (OracleName::Daemon, text),
            Trouble::Stuck(what) => (OracleName::Liveness, format!("{what} did not finish")),
        };
        Stop::Violation(Violation {
            oracle,
            message,
            step,
            evidence: target.describe(),
        })
    }

    fn actors_act(
        &mut self,
        chooser: &mut dyn Chooser,
        target: &mut dyn Target,
        oracles: &mut [Box<dyn Oracle>],
    ) -> Result<(), Stop> {
        let mut waited = 0;
        loop {
            self.find_issuable(target);
            let can = target.alternatives();
            let actors = u32::try_from(self.issuable.len()).expect("few actors");
            let total = can.ready + can.storage + actors + u32::from(can.timer);
            if total == 0 {
                if can.external {
                    self.happen(Move::External, target, oracles)?;
                } else if !self.clear_away(target, oracles)? {
                    return self.at_rest(target, oracles);
                }
                continue;
            }
            if can.timer && total == 1 && !can.external {
                oracles.iter_mut().try_for_each(|oracle| oracle.only_time())?;
            }
            if self.steps >= target.step_limit() {
                return Err(self.hangs("still busy after the step limit", target, oracles));
            }
            self.steps += 1;
            let starving = can.storage > 0 || can.timer;
            waited = if starving { waited + 1 } else { 0 };
            let chosen = if waited > PATIENCE {
                if can.storage > 0 { can.ready } else { total - 1 }
            } else if chooser.wants_keys() {
                self.keyed(chooser, target, can)
            } else {
                pick(chooser, ChoiceKind::Next, total)
            };
            let next = if chosen < can.ready {
                Move::Ready(chosen)
            } else if chosen < can.ready + can.storage {
                waited = 0;
                let storage = chosen - can.ready;
                if self.power_fails(storage, target) {
                    return Ok(());
                }
                if self.fails(storage, chooser, target) {
                    self.digest(target, oracles)?;
                    continue;
                }
                Move::Storage(storage)
            } else if chosen < can.ready + can.storage + actors {
                let (step, actor) = self.issuable[(chosen - can.ready - can.storage) as usize];
                if self.scenario.steer
                    && matches!(
                        target.steering(&self.scenario, StepId(step)),
                        Steering::PassOver(_)
                    )
                {
                    self.actors[actor as usize].next = self.following[step as usize];
                    continue;
                }
                self.issue(StepId(step), target);
                self.digest(target, oracles)?;
                continue;
            } else {
                waited = 0;
                Move::Timer
            };
            self.happen(next, target, oracles)?;
        }
    }

    /// Whether the power fails instead of this storage request's end. It does not during the setup.
    fn power_fails(&mut self, storage: u32, target: &mut dyn Target) -> bool {
        let disk = self.scenario.disk;
        let Some(after) = disk.power_cut else {
            return false;
        };
        if self.barrier() == u32::MAX && (!disk.cut_at_flush || target.is_flush(storage)) {
            self.power_failed = self.ended_storage == after;
            self.ended_storage += 1;
        }
        self.power_failed
    }

    /// Whether this storage request ends badly; it then has.
    fn fails(&self, storage: u32, chooser: &mut dyn Chooser, target: &mut dyn Target) -> bool {
        let Some(faults) = self.scenario.disk.faults else {
            return false;
        };
        if !faults.setup && self.barrier() != u32::MAX {
            return false;
        }
        let endings = target.endings(storage);
        if endings == 1 {
            return false;
        }
        let ending = chooser.ending(endings, faults.one_in);
        assert!(ending < endings, "{ending} of {endings}");
        if ending > 0 {
            target.fail(storage, ending);
        }
        ending > 0
    }

    fn keyed(&mut self, chooser: &mut dyn Chooser, target: &dyn Target, can: Alternatives) -> u32 {
        self.keys.clear();
        target.keys(&mut self.keys);
        self.keys
            .extend(self.issuable.iter().map(|&(step, actor)| Key::actor(actor, step)));
        if can.timer {
            self.keys.push(Key::CLOCK);
        }
        if let &[only] = &self.keys[..] {
            chooser.passed(only);
            return 0;
        }
        chooser.choose_among(ChoiceKind::Next, &self.keys)
    }

    fn happen(
        &mut self,
        next: Move,
        target: &mut dyn Target,
        oracles: &mut [Box<dyn Oracle>],
    ) -> Result<(), Stop> {
        let moved = target.advance(next);
        if let Err(trouble @ Trouble::Unusable(_)) = moved {
            // It may have been told as a refusal.
            return Err(Runner::trouble(trouble, target, None));
        }
        // What happened up to a panic is told first: an oracle may know better.
        self.digest(target, oracles)?;
        moved.map_err(|trouble| Runner::trouble(trouble, target, None))
    }

    /// The actors that can take a step, by that step's place in the file. A step of the actor `setup` is a barrier: it
    /// starts when every earlier step has started and nothing later starts before it is done.
    fn find_issuable(&mut self, target: &dyn Target) {
        self.issuable.clear();
        let barrier = self.barrier();
        let steer = self.scenario.steer;
        let waits = |step| steer && target.steering(&self.scenario, StepId(step)) == Steering::Wait;
        for (actor, state) in (0..).zip(&self.actors) {
            if state.waiting.is_none() && state.next < barrier && !waits(state.next) {
                self.issuable.push((state.next, actor));
            }
        }
        if let (true, Some(setup)) = (self.issuable.is_empty(), self.setup_actor)
            && self.actors[setup as usize].waiting.is_none()
            && barrier != u32::MAX
        {
            self.issuable.push((barrier, setup));
        }
        self.issuable.sort_unstable();
    }

    /// The step of `setup` that is under way or comes next; `u32::MAX` when there is none.
    fn barrier(&self) -> u32 {
        self.setup_actor.map_or(u32::MAX, |setup| {
            let state = &self.actors[setup as usize];
            state.waiting.map_or(state.next, |step| step.0)
        })
    }

    fn issue(&mut self, step: StepId, target: &mut dyn Target) {
        let at = step.0 as usize;
        self.operations += 1;
        self.unfinished += 1;
        self.incoming.push(Record::Issued(step));
        let entry = &self.scenario.steps[at];
        if let Some(actor) = self.actor_of.get(at) {
            let state = &mut self.actors[*actor as usize];
            state.next = self.following[at];
            if entry.wait {
                state.waiting = Some(step);
            } else {
                state.in_flight += 1;
            }
        }
        match &entry.action {
            Action::Settle { .. } => {
                let state = &self.actors[self.actor_of[at] as usize];
                // A settle that is itself in flight does not wait for itself.
                if state.in_flight == 0 || !entry.wait {
                    self.incoming.push(Record::Ended(step, Outcome::Passed));
                }
            }
            Action::WaitJob { job } => {
                if self.jobs.reached(job) {
                    self.incoming.push(Record::Ended(step, Outcome::Passed));
                } else {
                    self.job_waits.push(step);
                }
            }
            Action::Command { .. }
            | Action::Guest { .. }
            | Action::DrainBegin { .. }
            | Action::DrainEnd { .. } => target.issue(&self.scenario, step),
        }
    }

    /// Takes in what happened: hash, own books, oracles.
    fn digest(&mut self, target: &mut dyn Target, oracles: &mut [Box<dyn Oracle>]) -> Result<(), Violation> {
        loop {
            target.take_records(&mut self.incoming);
            if self.incoming.is_empty() {
                return Ok(());
            }
            let mut batch = std::mem::replace(&mut self.incoming, std::mem::take(&mut self.batch));
            let mut verdict = Ok(());
            for record in batch.drain(..) {
                verdict = verdict.and_then(|()| self.one(&record, target, oracles));
                if self.keep_records {
                    self.records.push(record);
                }
            }
            self.batch = batch;
            verdict?;
        }
    }

    #[inline]
    fn one(
        &mut self,
        record: &Record,
        target: &dyn Target,
        oracles: &mut [Box<dyn Oracle>],
    ) -> Result<(), Violation> {
        self.hash.record(record);
        self.trace.push(self.now, self.hash, self.steps, record);
        self.note(record);
        let view = View {
            scenario: &self.scenario,
            now: self.now,
            layer: target.layer(),
        };
        self.now += 1;
        for oracle in oracles {
            oracle.record(&view, record)?;
        }
        Ok(())
    }

    fn note(&mut self, record: &Record) {
        match record {
            Record::Issued(_) => {}
            Record::Ended(step, outcome) => self.ended(*step, outcome),
            Record::Layer(Event::JobStatus { job, id, to, .. }) => {
                self.jobs.status(*job, id, *to);
                self.end_job_waits();
            }
            Record::Layer(Event::JobChunk {
                job, offset, bytes, ..
            }) => {
                self.jobs.chunk(*job, offset + bytes);
                self.end_job_waits();
            }
            Record::Layer(_) | Record::PowerCut { .. } => {}
            Record::Fault(fault) => {
                if !self.faulted.contains(&fault.image) {
                    self.faulted.push(fault.image);
                }
            }
        }
    }

    fn ended(&mut self, step: StepId, outcome: &Outcome) {
        self.unfinished -= 1;
        let entry = &self.scenario.steps[step.0 as usize];
        match &entry.action {
            Action::DrainBegin { .. } if *outcome == Outcome::Passed => self.sections.push(step),
            Action::DrainEnd { node } if *outcome == Outcome::Passed => {
                let same = |begun: &StepId| {
                    let begun = &self.scenario.steps[begun.0 as usize];
                    begun.actor == entry.actor
                        && matches!(&begun.action, Action::DrainBegin { node: n } if n == node)
                };
                let at = self
                    .sections
                    .iter()
                    .rposition(same)
                    .expect("the target ends open sections only");
                self.sections.remove(at);
            }
            _ => {}
        }
        let Some(&actor) = self.actor_of.get(step.0 as usize) else {
            return;
        };
        let state = &mut self.actors[actor as usize];
        if state.waiting == Some(step) {
            state.waiting = None;
        } else {
            state.in_flight -= 1;
        }
        if let (Some(waiting), 0) = (state.waiting, state.in_flight)
            && matches!(
                self.scenario.steps[waiting.0 as usize].action,
                Action::Settle { .. }
            )
        {
            self.incoming.push(Record::Ended(waiting, Outcome::Passed));
        }
    }

    fn end_job_waits(&mut self) {
        let mut waits = std::mem::take(&mut self.job_waits);
        waits.retain(|&step| {
            let Action::WaitJob { job } = &self.scenario.steps[step.0 as usize].action else {
                unreachable!("only wait-job steps are here")
            };
            let over = self.jobs.reached(job);
            if over {
                self.incoming.push(Record::Ended(step, Outcome::Passed));
            }
            !over
        });
        self.job_waits = waits;
    }

    /// Nothing can happen: removes what the scenario left standing. False when there is nothing (more) to remove.
    fn clear_away(&mut self, target: &mut dyn Target, oracles: &mut [Box<dyn Oracle>]) -> Result<bool, Stop> {
        if let Some(&begun) = self.sections.last() {
            let Step { actor, action, .. } = &self.scenario.steps[begun.0 as usize];
            let Action::DrainBegin { node } = action else {
                unreachable!("a section is begun by drained-begin")
            };
            let (actor, action) = (actor.clone(), Action::DrainEnd { node: node.clone() });
            self.extra(actor, action, target, oracles)?;
            return Ok(true);
        }
        // A runner's command that does not return is a hang of the subject; more of them would only queue up.
        let last = self.scenario.steps.len();
        if last > self.actor_of.len() && self.unfinished > 0 && self.waits_for_extra() {
            return Ok(false);
        }
        let scenario = &self.scenario;
        if let Some((id, command)) = self.jobs.push_on(|id| jobs::is_endless(scenario, id)) {
            let mut arguments = Map::new();
            arguments.insert("id".into(), Value::String(id.to_string()));
            let action = Action::Command {
                execute: command.into(),
                arguments,
            };
            self.extra("runner".into(), action, target, oracles)?;
            return Ok(true);
        }
        Ok(false)
    }

    fn waits_for_extra(&self) -> bool {
        let in_file: u32 = self
            .actors
            .iter()
            .map(|a| a.in_flight + u32::from(a.waiting.is_some()))
            .sum();
        self.unfinished > in_file
    }

    fn extra(
        &mut self,
        actor: String,
        action: Action,
        target: &mut dyn Target,
        oracles: &mut [Box<dyn Oracle>],
    ) -> Result<(), Stop> {
        let step = StepId(u32::try_from(self.scenario.steps.len()).expect("few steps"));
        self.scenario.steps.push(Step {
            actor,
            action,
            wait: true,
        });
        self.issue(step, target);
        Ok(self.digest(target, oracles)?)
    }
}

#[cfg(test)]
#[path = "run_tests.rs"]
mod tests;
