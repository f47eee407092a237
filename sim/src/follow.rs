//! The model, run in lock step with a layer: it executes each command when the layer takes its main lock for it,
//! follows each job status change, and completes jobs when the layer says they ended.
//!
//! Rules: commands of one name take the main lock in the order in which they were issued (the lock is FIFO). What
//! the model thinks is comparable with the layer whenever [`Followed::settled`]: no main-context operation is under
//! way and the answer of the last command is known.
//! Failing storage: a command may then be refused, and a job's completion fail, but only if a fault hit storage while
//! it was under way (or a request failed then, after a flush that failed for good). What it may leave behind is a short
//! list: nothing; a node that stays writable; for a stream, everything done but not flushed. The model first assumes
//! the first of these; where the settled layer is not that, [`Follower::reconsider`] replays the run with the next.
//! Everything else about the layer is compared as ever, so a state that is not on the list is a finding.
//! Not here: comparing. [`crate::oracle`] does that.

mod drained;
mod marks;

pub use marks::Marked;

use std::collections::BTreeMap;
use std::rc::Rc;

use blkcheck_impl::error::Errno;
use blkcheck_impl::event::Event;
use blkcheck_impl::jobs::JobStatus as Seen;
use blkcheck_model::command::failing::Left;
use blkcheck_model::graph::BackingHeader;
use blkcheck_model::job::Work;
use blkcheck_model::world::Export;
use blkcheck_model::{Command, FileFacts, FileKind, JobStatus, NodeId, Outcome, Qcow2Facts, Refusal, World};
use serde_json::Value;

use crate::history::{self, FaultKind, Record, StepId};
use crate::scenario::{Action, Format, Scenario};

/// What one record meant to the model.
#[derive(Debug, Default)]
pub struct Followed {
    /// The model executed this command.
    pub executed: Option<StepId>,
    /// A command's answer came; the prediction for it is [`Follower::prediction`].
    pub answered: Option<StepId>,
    /// The world changed.
    pub changed: bool,
    /// A job completed, with this outcome.
    pub completed: Option<Outcome>,
    /// The layer and the model can be compared now.
    pub settled: bool,
    /// The layer did what the model says a job cannot do.
    pub wrong: Option<String>,
}

/// What the model went through, to be able to go back.
#[derive(Clone, Debug)]
enum Entry {
    Command(StepId),
    /// A command that storage failed: names that it used up, and what it left.
    Failed(StepId, u32, Option<Left>),
    Status(Rc<str>, JobStatus),
    /// Last: the node made writable for the job stays so.
    Completed(Rc<str>, Outcome, bool),
    Stopped(Rc<str>),
    Marked(Marked, std::ops::Range<u64>),
}

/// An entry of the journal that may have been another one.
#[derive(Debug)]
struct Doubt {
    at: usize,
    others: Vec<Entry>,
}

/// A main-context operation under way, or over but not answered.
#[derive(Debug, Default)]
struct Operation {
    step: Option<StepId>,
    prediction: Option<Result<Value, Refusal>>,
    /// Storage failed while it ran.
    failed_io: bool,
    /// How often it was made to.
    faults: u32,
    /// Node names that the layer made up meanwhile.
    auto_names: u32,
    /// How often each job went on that it had paused: so many of its drains are over.
    resumed: BTreeMap<Rc<str>, u32>,
    /// Jobs that it has made.
    made: Vec<Rc<str>>,
}

/// The model beside a run.
#[derive(Debug, Default)]
pub struct Follower {
    /// What should be.
    pub world: World,
    prediction: Option<Result<Value, Refusal>>,
    journal: Vec<Entry>,
    queue: Vec<StepId>,
    operation: Option<Operation>,
    /// The command under way, to be executed when no more jobs end.
    postponed: Option<StepId>,
    /// Commands that let the main lock go but have not answered.
    unanswered: Vec<Operation>,
    /// Jobs that went through pending: their prepare ran.
    prepared: Vec<Rc<str>>,
    /// Storage fails by order of the scenario: what fails without an order is the layer's fault.
    ordered: bool,
    /// A flush failed: the layer gives such a file up, and every later flush fails without storage being asked.
    flush_lost: bool,
    doubts: Vec<Doubt>,
    /// What headers may say instead of what the model has: (file, backing file), where storage failed under the write of a
    /// header. Such a write may have reached the file all the same.
    headers: Vec<(Rc<str>, Option<BackingHeader>)>,
    off: bool,
    /// The layer is followed, which refreshes what it lets go of, not the daemon.
    layered: bool,
}

/// How a backup ends whose source became shorter before all of it was copied.
const CUT: &str = "Input/output error";

impl Follower {
    /// One that follows the layer where it differs from the daemon on purpose.
    #[must_use]
    pub fn of_layer() -> Follower {
        Follower {
            layered: true,
            ..Follower::default()
        }
    }

    /// Starts over with the files of this scenario.
    pub fn reset(&mut self, scenario: &Scenario) {
        self.world = self.start(scenario);
        self.prediction = None;
        self.journal.clear();
        self.queue.clear();
        self.operation = None;
        self.postponed = None;
        self.unanswered.clear();
        self.prepared.clear();
        self.ordered = scenario.disk.faults.is_some();
        self.flush_lost = false;
        self.doubts.clear();
        self.headers.clear();
        self.off = false;
    }

    /// Whether failing storage left it open what the layer is like now.
    #[must_use]
    pub fn in_doubt(&self) -> bool {
        !self.doubts.is_empty()
    }

    /// What was in doubt turned out to be as the model has it.
    pub fn sure(&mut self) {
        self.doubts.clear();
    }

    /// The layer is not what the model assumed after storage failed: replays the run with the next assumption. False
    /// when there is none left.
    pub fn reconsider(&mut self, scenario: &Scenario) -> bool {
        while let Some(doubt) = self.doubts.last_mut() {
            let Some(other) = doubt.others.pop() else {
                self.doubts.pop();
                continue;
            };
            self.journal[doubt.at] = other;
            self.replay(scenario);
            return true;
        }
        false
    }

    /// Whether the header of a file may name this backing file although the model has another one, because storage failed
    /// when it was written. Of use where nobody can look at headers before the end.
    #[must_use]
    pub fn header_may_name(&self, file: &str, backing: Option<(&str, Option<&str>)>) -> bool {
        self.headers.iter().any(|(f, header)| {
            let named = header.as_ref().map(|h| (&*h.file, h.format.as_deref()));
            **f == *file && named == backing
        })
    }

    /// Whether storage failed when this file's header was written, so that nobody knows what it says, nor what the daemon takes it for.
    #[must_use]
    pub fn is_header_unsure(&self, file: &str) -> bool {
        self.headers.iter().any(|(f, _)| **f == *file)
    }

    /// Headers that differ from those in `other` may be as they are there.
    fn doubt_headers(&mut self, other: &World) {
        for (file, facts) in &other.files {
            let header = |facts: &FileFacts| facts.qcow2.as_ref().map(|q| q.backing.clone());
            let (there, here) = (header(facts), self.world.files.get(file).and_then(|f| header(f)));
            if let Some(there) = there.filter(|_| header(facts) != here) {
                self.headers.push((Rc::clone(file), there));
            }
        }
    }

    /// The shutdown has begun: the model no longer follows.
    #[must_use]
    pub fn is_off(&self) -> bool {
        self.off
    }

    /// What the command answered last ought to have answered; `None` for commands outside the model.
    #[must_use]
    pub fn prediction(&self) -> Option<&Result<Value, Refusal>> {
        self.prediction.as_ref()
    }

    /// Why the command under way ought to be refused, if it ought.
    #[must_use]
    pub fn refusal_under_way(&self) -> Option<&Refusal> {
        self.operation.as_ref()?.prediction.as_ref()?.as_ref().err()
    }

    fn export(&self, export: &str) -> Option<&Export> {
        let mut exports = self.world.exports.iter();
        exports.find(|e| &*e.name == export || &*e.id == export)
    }

    /// The node that an export of this name or id shows now.
    #[must_use]
    pub fn export_node(&self, export: &str) -> Option<NodeId> {
        let found = self.export(export)?;
        Some(self.world.graph.edge(found.root).child)
    }

    /// The id of an export of this name or id.
    #[must_use]
    pub fn export_id(&self, export: &str) -> Option<Rc<str>> {
        Some(Rc::clone(&self.export(export)?.id))
    }

    /// Whether guests may write through an export.
    #[must_use]
    pub fn export_writable(&self, export: &str) -> bool {
        let mut exports = self.world.exports.iter();
        exports.any(|e| (&*e.name == export || &*e.id == export) && e.writable)
    }

    /// Follows one record.
    pub fn record(&mut self, scenario: &Scenario, record: &Record) -> Followed {
        let mut followed = Followed::default();
        if self.off {
            return followed;
        }
        self.catch_up(scenario, record, &mut followed);
        match record {
            Record::Issued(step) => {
                if let Action::Command { .. } = action(scenario, *step) {
                    self.queue.push(*step);
                }
            }
            Record::Ended(step, history::Outcome::Command(result)) => {
                self.answered(scenario, *step, result.as_ref().err(), &mut followed);
            }
            Record::Layer(event) => self.event(scenario, event, &mut followed),
            Record::Fault(fault) => self.fault(fault),
            Record::Ended(..) | Record::PowerCut { .. } => {}
        }
        followed
    }

    fn fault(&mut self, fault: &history::Fault) {
        self.flush_lost |= fault.kind == FaultKind::Flush;
        if let Some(operation) = &mut self.operation {
            operation.failed_io = true;
            operation.faults += 1;
        }
    }

    fn event(&mut self, scenario: &Scenario, event: &Event, followed: &mut Followed) {
        match event {
            Event::MainBegin { what } => self.begin(scenario, what, followed),
            Event::MainEnd { .. } => {
                let Some(operation) = self.operation.take() else {
                    return;
                };
                if operation.step.is_some() {
                    self.unanswered.push(operation);
                }
                followed.settled = self.unanswered.is_empty();
            }
            Event::RequestEnd { result: Err(_), .. } if self.flush_lost || !self.ordered => {
                if let Some(operation) = &mut self.operation {
                    operation.failed_io = true;
                }
            }
            Event::NodeAdded { name, .. } if name.starts_with('#') => {
                if let Some(operation) = &mut self.operation {
                    operation.auto_names += 1;
                }
            }
            Event::JobStatus { id, from, to, .. } => self.status(id, *from, *to, followed),
            Event::Qmp { name, data } => self.qmp(scenario, name, data, followed),
            _ => {}
        }
    }

    fn begin(&mut self, scenario: &Scenario, what: &str, followed: &mut Followed) {
        if what == "shutdown" {
            self.off = true;
            return;
        }
        let at = self
            .queue
            .iter()
            .position(|s| command_name(scenario, *s) == Some(what));
        let step = at.map(|at| self.queue.remove(at));
        let prediction = step.and_then(|step| execute(&mut self.world, scenario, step));
        if let (Some(step), Some(prediction)) = (step, &prediction) {
            self.journal.push(Entry::Command(step));
            followed.executed = Some(step);
            followed.changed = prediction.is_ok();
        }
        self.operation = Some(Operation {
            step,
            prediction,
            ..Operation::default()
        });
    }

    fn answered(
        &mut self,
        scenario: &Scenario,
        step: StepId,
        refused: Option<&history::Refusal>,
        followed: &mut Followed,
    ) {
        match self.unanswered.iter().position(|o| o.step == Some(step)) {
            Some(at) => {
                let operation = self.unanswered.remove(at);
                if let Some(refusal) = refused
                    && operation.failed_io
                    && !is_predicted(operation.prediction.as_ref(), refusal)
                    && self.speaks_of_storage(&refusal.desc)
                {
                    self.take_back(scenario, step, &operation);
                    followed.changed = true;
                } else {
                    self.prediction = operation.prediction;
                }
                followed.settled = self.operation.is_none() && self.unanswered.is_empty();
            }
            None => {
                // It never took the main lock: refused before, or a query.
                self.queue.retain(|s| *s != step);
                let mut copy = self.world.clone();
                self.prediction = execute(&mut copy, scenario, step);
            }
        }
        followed.answered = Some(step);
    }

    fn status(&mut self, id: &Rc<str>, from: Seen, to: Seen, followed: &mut Followed) {
        if let Some(operation) = &mut self.operation {
            match (from, to) {
                (Seen::Paused, Seen::Running) => *operation.resumed.entry(Rc::clone(id)).or_default() += 1,
                (_, Seen::Created) => operation.made.push(Rc::clone(id)),
                _ => {}
            }
        }
        let to = model_status(to);
        followed.changed = true;
        if to == JobStatus::Pending {
            self.prepared.push(Rc::clone(id));
        }
        followed.wrong = self.world.job_status(id, to).err();
        self.journal.push(Entry::Status(Rc::clone(id), to));
    }

    fn qmp(&mut self, scenario: &Scenario, name: &str, data: &Value, followed: &mut Followed) {
        let Some(id) = data.get("device").and_then(Value::as_str) else {
            return;
        };
        match name {
            "BLOCK_JOB_ERROR" if data.get("action").and_then(Value::as_str) == Some("stop") => {
                followed.wrong = self.world.job_stopped_on_error(id).err();
                self.journal.push(Entry::Stopped(id.into()));
            }
            "BLOCK_JOB_CANCELLED" | "BLOCK_JOB_COMPLETED" => {
                self.postpone(scenario, id);
                let error = data.get("error").and_then(Value::as_str);
                let outcome = match name {
                    "BLOCK_JOB_CANCELLED" => Outcome::Cancelled,
                    _ => self.outcome(id, error),
                };
                let error = error.filter(|_| outcome != Outcome::Cancelled);
                self.completed(id, outcome, error, followed);
            }
            _ => {}
        }
    }

    /// How a job ended that was not cancelled.
    fn outcome(&self, id: &str, error: Option<&str>) -> Outcome {
        let Some(error) = error else {
            return Outcome::Success;
        };
        if !self.prepared.iter().any(|p| &**p == id) {
            return Outcome::Failed;
        }
        let work = self.world.job(id).map(|job| &job.work);
        if error == CUT && matches!(work, Some(Work::Backup(backup)) if backup.reach < backup.length) {
            return Outcome::Failed;
        }
        // The effect is refused, as the model then says too, or storage failed.
        let expected = self.world.clone().job_completed(id, Outcome::Success);
        let refused = matches!(&expected, Ok(Some(e)) if e == error);
        if !refused && self.storage_failed() && self.speaks_of_storage(error) {
            Outcome::Failed
        } else {
            Outcome::Success
        }
    }

    /// Whether a text names an errno that failing storage gives, or is the daemon's for a reopen that a format refuses without
    /// saying why: qcow2 then could not store what it held back.
    fn speaks_of_storage(&self, text: &str) -> bool {
        let reopen = "failed while preparing to reopen image ";
        names_storage(text) || (!self.layered && text.starts_with(reopen))
    }

    /// Whether storage failed under the operation that is under way.
    fn storage_failed(&self) -> bool {
        self.operation.as_ref().is_some_and(|o| o.failed_io)
    }

    fn completed(&mut self, id: &str, outcome: Outcome, error: Option<&str>, followed: &mut Followed) {
        let prepared = self.prepared.iter().any(|p| &**p == id);
        self.prepared.retain(|p| &**p != id);
        if self.storage_failed() {
            self.doubt_completion(id, outcome, prepared);
        }
        self.journal.push(Entry::Completed(id.into(), outcome, false));
        followed.changed = true;
        followed.completed = Some(outcome);
        let failed_late = self.storage_failed() && prepared && outcome == Outcome::Failed;
        let mut carried_out = failed_late.then(|| self.world.clone());
        let completed = self.world.job_completed(id, outcome);
        if let Some(world) = &mut carried_out {
            drop(world.job_completed_leaving(id, Outcome::NotFlushed, false));
            self.doubt_headers(world);
        }
        match completed {
            Err(wrong) => followed.wrong = Some(wrong),
            Ok(expected) if outcome == Outcome::Success && expected.as_deref() != error => {
                let said = |e: Option<&str>| e.map_or("no error".to_owned(), |e| format!("'{e}'"));
                followed.wrong = Some(format!(
                    "job '{id}' ends with {}, expected {}",
                    said(error),
                    said(expected.as_deref())
                ));
            }
            Ok(_) => {}
        }
    }

    /// How else a completion may have ended, the likelier last.
    fn doubt_completion(&mut self, id: &str, outcome: Outcome, prepared: bool) {
        let entry = |outcome, writable| Entry::Completed(id.into(), outcome, writable);
        let was_read_only = self
            .world
            .job(id)
            .and_then(|job| job.stream())
            .is_some_and(|stream| stream.was_read_only);
        let not_flushed = prepared && outcome == Outcome::Failed;
        // After a prepare that failed, becoming read-only again must have failed as well.
        let twice = self.operation.as_ref().is_some_and(|o| o.faults > 1) || self.flush_lost || !self.ordered;
        let was_read_only = was_read_only && (twice || !not_flushed);
        let mut others = Vec::new();
        if not_flushed && was_read_only {
            others.push(entry(Outcome::NotFlushed, true));
        }
        if was_read_only {
            others.push(entry(outcome, true));
        }
        if not_flushed {
            others.push(entry(Outcome::NotFlushed, false));
        }
        let at = self.journal.len();
        self.doubts.push(Doubt { at, others });
    }

    /// Storage failed this command: as if it had changed nothing, or what else it may have left.
    fn take_back(&mut self, scenario: &Scenario, step: StepId, operation: &Operation) {
        let auto_names = operation.auto_names;
        let at = self
            .journal
            .iter()
            .rposition(|e| matches!(e, Entry::Command(s) if *s == step))
            .expect("an executed command is in the journal");
        self.journal[at] = Entry::Failed(step, auto_names, None);
        // Where the command itself failed, becoming read-only again must have failed as well.
        let twice = operation.faults > 1 || self.flush_lost || !self.ordered;
        let left = Left::ALL
            .iter()
            .rev()
            .filter(|left| twice || **left == Left::WritableAndRecorded);
        let others = left
            .map(|left| Entry::Failed(step, auto_names, Some(*left)))
            .collect();
        self.doubts.push(Doubt { at, others });
        self.prediction = None;
        let carried_out = self.world.clone();
        self.replay(scenario);
        self.doubt_headers(&carried_out);
    }

    fn start(&self, scenario: &Scenario) -> World {
        let mut world = world_of(scenario);
        if self.layered {
            world.graph.refresh_what_is_let_go();
        }
        world
    }

    /// The whole run so far again.
    fn replay(&mut self, scenario: &Scenario) {
        self.world = self.start(scenario);
        for entry in &self.journal {
            // What went wrong was told when it happened first.
            match entry {
                Entry::Command(step) => drop(execute(&mut self.world, scenario, *step)),
                Entry::Failed(step, auto_names, left) => {
                    self.world.auto_names += auto_names;
                    if let (Some(left), Action::Command { execute, arguments }) =
                        (left, action(scenario, *step))
                    {
                        let arguments = Value::Object(arguments.clone());
                        self.world.command_left(&Command::new(execute, &arguments), *left);
                    }
                }
                Entry::Status(id, to) => drop(self.world.job_status(id, *to)),
                Entry::Completed(id, outcome, writable) => {
                    drop(self.world.job_completed_leaving(id, *outcome, *writable));
                }
                Entry::Stopped(id) => drop(self.world.job_stopped_on_error(id)),
                Entry::Marked(what, bytes) => marks::mark(&mut self.world, *what, bytes.clone()),
            }
        }
    }
}

/// Whether a refusal is the predicted one.
fn is_predicted(prediction: Option<&Result<Value, Refusal>>, got: &history::Refusal) -> bool {
    matches!(prediction, Some(Err(p)) if p.class.name() == got.class && p.desc == got.desc)
}

/// Whether a text names an errno that failing storage gives.
fn names_storage(text: &str) -> bool {
    let mut errors = [Errno::EIO, Errno::ENOSPC].iter();
    errors.any(|errno| text.contains(errno.text()))
}

fn action(scenario: &Scenario, step: StepId) -> &Action {
    &scenario.steps[step.0 as usize].action
}

fn command_name(scenario: &Scenario, step: StepId) -> Option<&str> {
    match action(scenario, step) {
        Action::Command { execute, .. } => Some(execute),
        _ => None,
    }
}

fn execute(world: &mut World, scenario: &Scenario, step: StepId) -> Option<Result<Value, Refusal>> {
    let Action::Command { execute, arguments } = action(scenario, step) else {
        return None;
    };
    // Queries change nothing and their answers are not modelled.
    if execute.starts_with("query-") {
        return None;
    }
    let arguments = Value::Object(arguments.clone());
    Some(world.execute(&Command::new(execute, &arguments)))
}

/// Whether a node is, or stands on, one that opens this file.
pub(crate) fn stands_on(world: &World, node: NodeId, file: &str) -> bool {
    let below = world.graph.topological([node]);
    below
        .iter()
        .any(|node| world.graph.node(*node).filename.as_deref() == Some(file))
}

/// The files of a scenario, and nothing open.
pub(crate) fn world_of(scenario: &Scenario) -> World {
    World::new(scenario.images.iter().map(|image| {
        let backing = image.backing_file.as_ref().map(|file| BackingHeader {
            file: file.as_str().into(),
            format: image.backing_format.as_deref().map(Rc::from),
        });
        let qcow2 = (image.format == Format::Qcow2).then(|| Qcow2Facts {
            virtual_size: image.size,
            cluster_size: u64::from(image.cluster_size),
            version: if image.compat == 2 { 2 } else { 3 },
            backing,
            bitmaps: Vec::new(),
        });
        let facts = FileFacts {
            kind: if scenario.disk.devices {
                FileKind::Device
            } else {
                FileKind::Regular
            },
            length: image.size,
            request_alignment: u64::from(scenario.disk.alignment),
            qcow2,
        };
        (image.file.as_str().into(), facts)
    }))
}

fn model_status(status: Seen) -> JobStatus {
    match status {
        Seen::Undefined => JobStatus::Undefined,
        Seen::Created => JobStatus::Created,
        Seen::Running => JobStatus::Running,
        Seen::Paused => JobStatus::Paused,
        Seen::Ready => JobStatus::Ready,
        Seen::Standby => JobStatus::Standby,
        Seen::Waiting => JobStatus::Waiting,
        Seen::Pending => JobStatus::Pending,
        Seen::Aborting => JobStatus::Aborting,
        Seen::Concluded => JobStatus::Concluded,
        Seen::Null => JobStatus::Null,
    }
}

#[cfg(test)]
mod tests;
