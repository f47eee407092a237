//! The model, run in lock step with a layer: it executes each command when the layer takes its main lock for it,
//! follows each job status change, and completes jobs when the layer says they ended.
//!
//! Rules: commands of one name take the main lock in the order in which they were issued (the lock is FIFO). What
//! the model thinks is comparable with the layer whenever [`Followed::settled`]: no main-context operation is under
//! way and the answer of the last command is known. A command that the layer refuses because storage failed below it
//! is taken back from the model by replaying everything before it.
//! Not here: comparing. [`crate::oracle`] does that.

use std::rc::Rc;

use blkcheck_impl::event::Event;
use blkcheck_impl::jobs::JobStatus as Seen;
use blkcheck_model::graph::BackingHeader;
use blkcheck_model::{Command, FileFacts, FileKind, JobStatus, NodeId, Outcome, Qcow2Facts, Refusal, World};
use serde_json::Value;

use crate::history::{self, Record, StepId};
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
    Status(Rc<str>, JobStatus),
    Completed(Rc<str>, Outcome),
    Stopped(Rc<str>),
}

/// A main-context operation under way, or over but not answered.
#[derive(Debug)]
struct Operation {
    step: Option<StepId>,
    prediction: Option<Result<Value, Refusal>>,
    /// A request failed while it ran.
    failed_io: bool,
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
    /// Commands that let the main lock go but have not answered.
    unanswered: Vec<Operation>,
    /// Jobs that went through pending: their prepare ran.
    prepared: Vec<Rc<str>>,
    off: bool,
}

impl Follower {
    /// Starts over with the files of this scenario.
    pub fn reset(&mut self, scenario: &Scenario) {
        self.world = world_of(scenario);
        self.prediction = None;
        self.journal.clear();
        self.queue.clear();
        self.operation = None;
        self.unanswered.clear();
        self.prepared.clear();
        self.off = false;
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

    /// The node that an export of this name or id shows now.
    #[must_use]
    pub fn export_node(&self, export: &str) -> Option<NodeId> {
        let found = self
            .world
            .exports
            .iter()
            .find(|e| &*e.name == export || &*e.id == export)?;
        Some(self.world.graph.edge(found.root).child)
    }

    /// Whether guests may write through an export.
    #[must_use]
    pub fn export_writable(&self, export: &str) -> bool {
        self.world
            .exports
            .iter()
            .any(|e| (&*e.name == export || &*e.id == export) && e.writable)
    }

    /// Follows one record.
    pub fn record(&mut self, scenario: &Scenario, record: &Record) -> Followed {
        let mut followed = Followed::default();
        if self.off {
            return followed;
        }
        match record {
            Record::Issued(step) => {
                if let Action::Command { .. } = action(scenario, *step) {
                    self.queue.push(*step);
                }
            }
            Record::Ended(step, history::Outcome::Command(result)) => {
                self.answered(scenario, *step, result.is_err(), &mut followed);
            }
            Record::Layer(event) => self.event(scenario, event, &mut followed),
            Record::Ended(..) => {}
        }
        followed
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
            Event::RequestEnd { result: Err(_), .. } => {
                if let Some(operation) = &mut self.operation {
                    operation.failed_io = true;
                }
            }
            Event::JobStatus { id, to, .. } => self.status(id, *to, followed),
            Event::Qmp { name, data } => self.qmp(name, data, followed),
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
            failed_io: false,
        });
    }

    fn answered(&mut self, scenario: &Scenario, step: StepId, refused: bool, followed: &mut Followed) {
        match self.unanswered.iter().position(|o| o.step == Some(step)) {
            Some(at) => {
                let operation = self.unanswered.remove(at);
                self.prediction = operation.prediction;
                if refused && operation.failed_io && matches!(self.prediction, Some(Ok(_))) {
                    self.take_back(scenario, step);
                    self.prediction = None;
                    followed.changed = true;
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

    fn status(&mut self, id: &Rc<str>, to: Seen, followed: &mut Followed) {
        let to = model_status(to);
        followed.changed = true;
        if to == JobStatus::Pending {
            self.prepared.push(Rc::clone(id));
        }
        followed.wrong = self.world.job_status(id, to).err();
        self.journal.push(Entry::Status(Rc::clone(id), to));
    }

    fn qmp(&mut self, name: &str, data: &Value, followed: &mut Followed) {
        let Some(id) = data.get("device").and_then(Value::as_str) else {
            return;
        };
        match name {
            "BLOCK_JOB_ERROR" if data.get("action").and_then(Value::as_str) == Some("stop") => {
                followed.wrong = self.world.job_stopped_on_error(id).err();
                self.journal.push(Entry::Stopped(id.into()));
            }
            "BLOCK_JOB_CANCELLED" => self.completed(id, Outcome::Cancelled, None, followed),
            "BLOCK_JOB_COMPLETED" => {
                let error = data.get("error").and_then(Value::as_str);
                let prepared = self.prepared.iter().any(|p| &**p == id);
                let outcome = match error {
                    None => Outcome::Success,
                    Some(_) if !prepared => Outcome::Failed,
                    // The effect failed: either it is refused, as the model then says too, or the header was not
                    // written, which only failing storage does.
                    Some(_) => match self.world.clone().job_completed(id, Outcome::Success) {
                        Ok(Some(_)) => Outcome::Success,
                        _ => Outcome::HeaderNotWritten,
                    },
                };
                self.completed(id, outcome, error, followed);
            }
            _ => {}
        }
    }

    fn completed(&mut self, id: &str, outcome: Outcome, error: Option<&str>, followed: &mut Followed) {
        self.prepared.retain(|p| &**p != id);
        self.journal.push(Entry::Completed(id.into(), outcome));
        followed.changed = true;
        followed.completed = Some(outcome);
        match self.world.job_completed(id, outcome) {
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

    /// Everything again but for the command of `step`.
    fn take_back(&mut self, scenario: &Scenario, step: StepId) {
        self.world = world_of(scenario);
        self.journal
            .retain(|e| !matches!(e, Entry::Command(s) if *s == step));
        for entry in &self.journal {
            // What went wrong was told when it happened first.
            match entry {
                Entry::Command(step) => drop(execute(&mut self.world, scenario, *step)),
                Entry::Status(id, to) => drop(self.world.job_status(id, *to)),
                Entry::Completed(id, outcome) => drop(self.world.job_completed(id, *outcome)),
                Entry::Stopped(id) => drop(self.world.job_stopped_on_error(id)),
            }
        }
    }
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

fn world_of(scenario: &Scenario) -> World {
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
mod tests {
    use blkcheck_impl::error::Errno;
    use blkcheck_impl::types::{NodeId as Node, RequestId};
    use serde_json::json;

    use super::*;
    use crate::oracle::tests::scenario_of;

    fn scenario() -> Scenario {
        scenario_of(
            r#"{"version":1,"grain":512,"images":[{"file":"a.img","format":"raw","size":4096}],"steps":[
            {"actor":"m","execute":"blockdev-add","arguments":{"driver":"file","node-name":"f","filename":"a.img"}},
            {"actor":"m","execute":"block-export-add","arguments":{"type":"nbd","id":"e","node-name":"f"}}]}"#,
        )
    }

    fn main(what: &'static str, end: bool) -> Record {
        Record::Layer(if end {
            Event::MainEnd { what }
        } else {
            Event::MainBegin { what }
        })
    }

    #[test]
    fn commands_take_effect_at_the_main_lock_and_settle_with_their_answer() {
        let scenario = scenario();
        let mut follower = Follower::default();
        follower.reset(&scenario);
        follower.record(&scenario, &Record::Issued(StepId(0)));
        assert_eq!(follower.world.graph.find("f"), None);
        assert_eq!(
            follower.record(&scenario, &main("blockdev-add", false)).executed,
            Some(StepId(0))
        );
        assert!(follower.world.graph.find("f").is_some());
        assert!(!follower.record(&scenario, &main("blockdev-add", true)).settled);
        let ended = Record::Ended(StepId(0), history::Outcome::Command(Ok(json!({}))));
        let followed = follower.record(&scenario, &ended);
        assert!(followed.settled && followed.answered == Some(StepId(0)));
        assert!(matches!(follower.prediction(), Some(Ok(_))));
    }

    #[test]
    fn a_refusal_by_failing_storage_is_taken_back() {
        let scenario = scenario();
        let mut follower = Follower::default();
        follower.reset(&scenario);
        let refusal = history::Refusal {
            class: "GenericError".into(),
            desc: "Input/output error".into(),
        };
        for record in [
            Record::Issued(StepId(0)),
            main("blockdev-add", false),
            Record::Layer(Event::RequestEnd {
                request: RequestId(0),
                node: Node(0),
                result: Err(Errno::EIO),
            }),
            main("blockdev-add", true),
            Record::Ended(StepId(0), history::Outcome::Command(Err(refusal))),
        ] {
            assert!(follower.record(&scenario, &record).wrong.is_none());
        }
        assert_eq!(follower.world.graph.find("f"), None);
        assert_eq!(follower.prediction(), None);
    }

    #[test]
    fn an_unknown_job_is_wrong() {
        let scenario = scenario();
        let mut follower = Follower::default();
        follower.reset(&scenario);
        let status = Event::JobStatus {
            job: blkcheck_impl::types::JobId(0),
            id: "j".into(),
            from: Seen::Undefined,
            to: Seen::Created,
        };
        assert!(
            follower
                .record(&scenario, &Record::Layer(status))
                .wrong
                .expect("wrong")
                .contains("no such job")
        );
    }
}
