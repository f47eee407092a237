//! What the daemon does, as records: its answers, its events, its graph.

use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::Mutex;

use blkcheck_impl::event::Event;
use blkcheck_impl::jobs::JobStatus;
use serde_json::{Map, Value};

use super::{Pending, QemuTarget};
use crate::finish::STATUSES;
use crate::history::{Outcome, Record, Refusal, StatusRun, StepId};
use crate::qemu::Broken;
use crate::qemu::names::{no_such_file, option_of_file};
use crate::qemu::nbd::client::{Answer, Ask, Extent};
use crate::qemu::qmp::Message;
use crate::scenario::{GuestOp, Range};
use crate::stamp::{self, Source};

/// Looks at the graph, one after the other because of news that came meanwhile, before it is nonsense.
const MOST_LOOKS: u32 = 1000;

/// A name that outlives everything: events have static ones. There are only as many as commands in use.
pub(in crate::target) fn lasting(name: &str) -> &'static str {
    static NAMES: Mutex<BTreeSet<&'static str>> = Mutex::new(BTreeSet::new());
    let mut names = NAMES.lock().expect("nobody panics holding it");
    if let Some(known) = names.get(name) {
        return known;
    }
    let known: &'static str = Box::leak(name.to_owned().into_boxed_str());
    names.insert(known);
    known
}

impl QemuTarget {
    /// Lets the daemon do what it was given, and tells what came of it.
    pub(super) fn act(&mut self) {
        if self.trouble.is_some() {
            return;
        }
        if let Err(broken) = self.try_act() {
            self.trouble = Some(broken);
            self.clean = false;
        }
    }

    pub(super) fn try_act(&mut self) -> Result<(), Broken> {
        let mut looks = 0;
        loop {
            self.running().settle()?;
            self.guests_ended();
            let (mut answer, mut graph, mut events) = (None, None, Vec::new());
            while let Some(message) = self.running().monitor.take() {
                match message {
                    Message::Event(name, data) => events.push((name, data)),
                    Message::Answer(id, result) if Some(id) == self.looking => graph = Some(result),
                    Message::Answer(_, result) => answer = Some(result),
                }
            }
            let news = !events.is_empty();
            if news && self.main.is_none() {
                self.main_begins("job-exit");
            }
            self.events(events);
            if let Some(result) = answer {
                self.answered(result)?;
            }
            if let Some(graph) = graph {
                self.looking = None;
                // What happened since it was asked for is not in it.
                if !news {
                    self.graph(graph)?;
                    self.main_ends();
                }
            }
            // A command under way keeps the monitor: it would not show a graph.
            if self.main.is_some() && self.under_way.is_none() {
                if self.looking.is_some() {
                    return Ok(());
                }
                looks += 1;
                if looks > MOST_LOOKS {
                    return Err(Broken::Nonsense(
                        "it has news whenever it is looked at".to_owned(),
                    ));
                }
                let id = self
                    .running()
                    .monitor
                    .send("x-debug-query-block-graph", &Map::new());
                self.looking = Some(id);
            } else if self.under_way.is_some() || !self.send_next()? {
                return Ok(());
            }
        }
    }

    pub(super) fn main_begins(&mut self, what: &'static str) {
        self.main = Some(what);
        self.tell(Event::MainBegin { what });
    }

    pub(super) fn main_ends(&mut self) {
        if let Some(what) = self.main.take() {
            self.tell(Event::MainEnd { what });
        }
        if let Some((step, outcome)) = self.finished.take() {
            self.records.push(Record::Ended(step, outcome));
        }
    }

    pub(super) fn tell(&mut self, event: Event) {
        self.records.push(Record::Layer(event));
    }

    /// Sends the next command in line. Whether there was one.
    pub(super) fn send_next(&mut self) -> Result<bool, Broken> {
        let Some(pending) = self.queue.pop_front() else {
            return Ok(false);
        };
        if !is_query(&pending.execute) {
            self.main_begins(lasting(&pending.execute));
        }
        let arguments = self.names.to_daemon(&pending.execute, &pending.arguments);
        self.before(&pending)?;
        self.last = format!("{} {}", pending.execute, Value::Object(pending.arguments.clone()));
        self.running().monitor.send(&pending.execute, &arguments);
        self.under_way = Some(pending);
        Ok(true)
    }

    /// A guest that has nothing in flight does not stay connected to an export that goes: elsewhere guests are no
    /// connections, and a safe delete is refused only while requests are.
    pub(super) fn before(&mut self, pending: &Pending) -> Result<(), Broken> {
        if pending.execute != "block-export-del" {
            return Ok(());
        }
        let id = text(&pending.arguments, "id").unwrap_or_default();
        let name = self.export_name(id);
        let running = self.running();
        if running.client.in_flight(&name) == 0 {
            running.client.hang_up(&name);
            running.settle()?;
        }
        Ok(())
    }

    pub(super) fn answered(&mut self, result: Result<Value, (String, String)>) -> Result<(), Broken> {
        let pending = self
            .under_way
            .take()
            .ok_or_else(|| Broken::Nonsense("an answer without a question".to_owned()))?;
        if result.is_ok() {
            self.took_effect(&pending);
        }
        let result = match result {
            Ok(mut value) => {
                self.names.from_daemon(&mut value);
                Ok(value)
            }
            Err((class, desc)) => {
                Broken::unless_lack(&desc)?;
                let desc = self.names.text(&desc).unwrap_or(desc);
                let desc = no_such_file(&desc, self.running().server.missing());
                let desc = option_of_file(&desc).unwrap_or(desc);
                Err(Refusal { class, desc })
            }
        };
        let outcome = Outcome::Command(result);
        if is_query(&pending.execute) {
            self.records.push(Record::Ended(pending.step, outcome));
        } else {
            // Told with the graph.
            self.finished = Some((pending.step, outcome));
        }
        Ok(())
    }

    /// Our own books of what has to be taken down at the end.
    pub(super) fn took_effect(&mut self, pending: &Pending) {
        let of = |key: &str| text(&pending.arguments, key).map(str::to_owned);
        match &*pending.execute {
            "blockdev-add" => self.nodes.extend(of("node-name")),
            "blockdev-del" => {
                let name = of("node-name");
                self.nodes.retain(|n| Some(n) != name.as_ref());
            }
            "block-export-add" => {
                let id = of("id").unwrap_or_default();
                let name = of("name").or_else(|| of("node-name")).unwrap_or_default();
                self.exports.retain(|(i, _)| *i != id);
                self.exports.push((id, name));
            }
            _ => {}
        }
    }

    pub(super) fn export_name(&self, export: &str) -> String {
        let by_name = self.exports.iter().find(|(_, name)| name == export);
        let found = by_name.or_else(|| self.exports.iter().find(|(id, _)| id == export));
        found.map_or_else(|| export.to_owned(), |(_, name)| name.clone())
    }

    /// The graph as it is now: tells what changed.
    pub(super) fn graph(&mut self, answer: Result<Value, (String, String)>) -> Result<(), Broken> {
        let mut graph = answer.map_err(|e| Broken::Nonsense(format!("no graph: {}", e.1)))?;
        self.names.from_daemon(&mut graph);
        let QemuTarget {
            snapshot, records, ..
        } = self;
        snapshot
            .next(&graph, |event| records.push(Record::Layer(event)))
            .map_err(Broken::Nonsense)
    }

    /// Asks for the graph when nothing is under way any more.
    pub(super) fn look(&mut self) -> Result<(), Broken> {
        let answer = self.running().ask("x-debug-query-block-graph", &Map::new())?;
        self.graph(answer)
    }

    pub(super) fn guests_ended(&mut self) {
        let running = self.running.as_mut().expect("prepared");
        let mut answers: Vec<_> = running.client.answers().collect();
        // What came in one settling came together.
        answers.sort_by_key(|(token, _)| *token);
        for (token, answer) in answers {
            let outcome = match answer {
                Answer::Read(result) => Outcome::Read(result.map(Rc::from)),
                Answer::Done(result) => Outcome::Done(result),
                Answer::Status(result) => Outcome::Status(result.map(|e| e.iter().map(run).collect())),
                Answer::NoExport => Outcome::NoExport,
            };
            self.records.push(Record::Ended(StepId(token), outcome));
        }
    }

    pub(super) fn events(&mut self, events: Vec<(String, Value)>) {
        for (name, mut data) in events {
            self.names.from_daemon(&mut data);
            if name == "JOB_STATUS_CHANGE" {
                self.job_status(&data);
            }
            let (name, data) = (lasting(&name), Rc::new(data));
            self.tell(Event::Qmp { name, data });
        }
    }

    pub(super) fn job_status(&mut self, data: &Value) {
        let (Some(id), Some(status)) = (data["id"].as_str(), data["status"].as_str()) else {
            return;
        };
        let Some(&(to, _)) = STATUSES.iter().find(|(_, name)| *name == status) else {
            return;
        };
        let id: Rc<str> = Rc::from(id);
        let is_new = to == JobStatus::Created;
        let job = self.snapshot.job(&id, is_new);
        self.jobs.retain(|(i, _)| !is_new || *i != id);
        let from = match self.jobs.iter_mut().find(|(i, _)| *i == id) {
            Some((_, status)) => std::mem::replace(status, to),
            None => {
                self.jobs.push((Rc::clone(&id), to));
                JobStatus::Undefined
            }
        };
        self.tell(Event::JobStatus { job, id, from, to });
    }

    pub(super) fn guest(&mut self, export: &str, op: GuestOp, grain: u32, step: StepId) {
        let write = |range: Range, fua| {
            let length = usize::try_from(range.length).expect("validated");
            let mut data = vec![0; length];
            stamp::fill(&mut data, range.offset, grain, Source::Step(step));
            Ask::Write(range.offset, data, fua)
        };
        let ask = match op {
            GuestOp::Read(r) => Ask::Read(r.offset, r.length),
            GuestOp::Write(r) => write(r, false),
            GuestOp::WriteFua(r) => write(r, true),
            GuestOp::WriteZeroes(r) => Ask::WriteZeroes(r.offset, r.length, false),
            GuestOp::WriteZeroesUnmap(r) => Ask::WriteZeroes(r.offset, r.length, true),
            GuestOp::Discard(r) => Ask::Discard(r.offset, r.length),
            GuestOp::Flush => Ask::Flush,
            GuestOp::BlockStatus(r) => Ask::Status(r.offset, r.length),
        };
        let name = self.export_name(export);
        self.last = format!("step {}: {op:?} on {name}", step.0);
        if let Err(error) = self.running().client.submit(&name, step.0, ask) {
            let broken = Broken::by("the daemon does not take connections", &error);
            self.trouble.get_or_insert(broken);
        }
    }
}

fn is_query(execute: &str) -> bool {
    execute.starts_with("query-")
}

fn text<'a>(arguments: &'a Map<String, Value>, key: &str) -> Option<&'a str> {
    arguments.get(key).and_then(Value::as_str)
}

/// Block status with the flags that the layer has.
fn run(extent: &Extent) -> StatusRun {
    StatusRun {
        flags: u8::from(extent.data) | u8::from(extent.zero) << 1 | u8::from(extent.depth > 0) << 4,
        bytes: extent.bytes,
        depth: extent.depth,
    }
}
