//! One scenario on the daemon, and what must hold at every step.
//!
//! Rules: one step at a time, and after each the daemon comes to rest. A job is not waited for where it goes on by
//! itself (a rate limit, a mirror that is ready); what it shows is judged when it is over.

use serde_json::{Map, Value, json};

use super::cells::{Cell, Disk};
use super::follow::{Export, Job, View};
use crate::compare::What;
use crate::compare::known::{self, Case};
use crate::compare::lockstep::{Finding, Shown, Stop, object};
use crate::compare::peer::Peer;
use crate::compare::state::State;
use crate::compare::{Kind, content};
use crate::history::StepId;
use crate::qemu::Broken;
use crate::qemu::nbd::client::Answer;
use crate::scenario::{Action, GuestOp, Range, Scenario};
use crate::stamp::Source;

const GRAPH: &str = "x-debug-query-block-graph";
/// Looks at a job that is about to end.
const PATIENCE: u32 = 60;

/// A scenario under way.
pub(super) struct Watch<'p> {
    pub(super) peer: &'p mut Peer,
    pub(super) scenario: &'p Scenario,
    pub(super) shown: Shown,
    pub(super) disks: Vec<Disk>,
    /// What each node shows; a node that is not here is not judged.
    pub(super) nodes: std::collections::BTreeMap<String, View>,
    /// The image under each node of a format.
    pub(super) files: std::collections::BTreeMap<String, String>,
    /// Exports by their names.
    pub(super) exports: std::collections::BTreeMap<String, Export>,
    /// Images opened without what their headers name.
    pub(super) detached: std::collections::BTreeSet<String>,
    /// Bitmaps are to be stored, which our check of images does not know.
    pub(super) stored_bitmaps: bool,
    pub(super) jobs: std::collections::BTreeMap<String, Job>,
    /// Groups and the like, to be taken away at the end.
    pub(super) objects: Vec<String>,
    pub(super) state: State,
    /// What `query-named-block-nodes` told, where it is still true.
    flags: Option<Value>,
    /// The headers tell the chain that is in use.
    pub(super) headers_apply: bool,
    /// Something moved by itself during this step.
    stirred: bool,
}

/// Runs it.
pub(super) fn run(peer: &mut Peer, scenario: &Scenario) -> Shown {
    if let Err(broken) = peer.prepare(scenario, true) {
        return crate::compare::lockstep::failed_to_start(&broken);
    }
    let mut watch = Watch {
        peer,
        scenario,
        shown: Shown::default(),
        disks: Vec::new(),
        nodes: std::collections::BTreeMap::new(),
        files: std::collections::BTreeMap::new(),
        exports: std::collections::BTreeMap::new(),
        detached: std::collections::BTreeSet::new(),
        stored_bitmaps: false,
        jobs: std::collections::BTreeMap::new(),
        objects: Vec::new(),
        state: State::default(),
        flags: None,
        headers_apply: true,
        stirred: false,
    };
    let mut at = 0;
    match watch.all(&mut at) {
        Ok(()) => watch.peer.is_clean(),
        Err(stop) => {
            let finding = watch.finding(at, stop);
            watch.shown.finding = Some(finding);
        }
    }
    watch.shown
}

impl Watch<'_> {
    fn all(&mut self, at: &mut usize) -> Result<(), Stop> {
        for step in 0..self.scenario.steps.len() {
            *at = step;
            self.stirred = false;
            self.step(step)?;
        }
        self.last()
    }

    fn step(&mut self, at: usize) -> Result<(), Stop> {
        match &self.scenario.steps[at].action {
            Action::Command { execute, arguments } => {
                self.shown.steps += 1;
                self.command(execute, arguments)
            }
            Action::Guest { export, op } => {
                self.shown.steps += 1;
                self.flags = None;
                self.guest(export, *op, at)
            }
            Action::WaitJob { job } => self.wait_for(&job.id, &job.status),
            Action::Settle { .. } | Action::DrainBegin { .. } | Action::DrainEnd { .. } => Ok(()),
        }
    }

    fn finding(&mut self, at: usize, stop: Stop) -> Finding {
        let (what, failed, model, qemu) = match stop {
            Stop::Differs(what, model, qemu) => (Some(what), None, model, qemu),
            Stop::Broke(broken) => {
                let words = self.peer.last_words();
                let kind = Kind::of(&broken, &words);
                let detail = [vec![broken.to_string()], words].concat().join("\n");
                (None, Some(kind), "answers".to_owned(), detail)
            }
        };
        let none = Map::new();
        let (execute, arguments) = match self.scenario.steps.get(at).map(|s| &s.action) {
            Some(Action::Command { execute, arguments }) => (execute.as_str(), arguments),
            _ => ("", &none),
        };
        let past = known::replayed(self.scenario, at);
        let known = known::explain(&Case {
            scenario: self.scenario,
            step: at,
            execute,
            arguments,
            world: &blkcheck_model::World::default(),
            past: &past,
            // Nobody follows what becomes of jobs here.
            strayed: &[],
            leftovers: &self.state.leftovers,
            what,
            failed,
            model: &model,
            qemu: &qemu,
        });
        Finding {
            step: at,
            what,
            failed,
            model,
            qemu,
            known: known.map(|d| d.id),
        }
    }

    fn command(&mut self, execute: &str, arguments: &Map<String, Value>) -> Result<(), Stop> {
        if self.flags.is_none() {
            self.flags = self.look_at_flags()?;
        }
        if execute == "block-export-del"
            && let Some(id) = arguments.get("id").and_then(Value::as_str)
            && let Some(name) = self
                .exports
                .iter()
                .find(|(_, e)| e.id == id)
                .map(|(name, _)| name.clone())
        {
            self.peer.hang_up(&name);
            self.peer.rest()?;
        }
        let chain = self.chain(execute, arguments);
        let answer = self.peer.ask(execute, arguments)?;
        self.peer.rest()?;
        if answer.is_ok() {
            self.accepted(execute, arguments, &chain);
        }
        self.events(false)?;
        if answer.is_ok()
            && matches!(
                execute,
                "job-complete" | "block-job-complete" | "job-cancel" | "block-job-cancel" | "job-finalize"
            )
        {
            let id = arguments.get("id").or_else(|| arguments.get("device"));
            if let Some(id) = id.and_then(Value::as_str) {
                self.wait_for(id, "concluded")?;
            }
        }
        let before = std::mem::take(&mut self.state);
        let flags = self.flags.take();
        self.look()?;
        self.flags = self.look_at_flags()?;
        if let Err((class, desc)) = answer {
            if !self.stirred {
                self.unchanged(&before, flags.as_ref())?;
            }
            self.shown.refusals.push((class, desc));
        }
        Ok(())
    }

    fn unchanged(&self, before: &State, flags: Option<&Value>) -> Result<(), Stop> {
        if self.state != *before {
            let differences = self.state.against(before);
            let (ours, theirs) = match differences.first() {
                Some(d) => (d.model.clone(), d.qemu.clone()),
                None => (format!("{before:?}"), format!("{:?}", self.state)),
            };
            return Err(Stop::Differs(What::Refusal, ours, theirs));
        }
        if let (Some(before), Some(now)) = (flags, &self.flags)
            && before != now
        {
            let (ours, theirs) = first_difference(before, now);
            return Err(Stop::Differs(What::Refusal, ours, theirs));
        }
        Ok(())
    }

    /// Looks at graph and jobs.
    pub(super) fn look(&mut self) -> Result<(), Stop> {
        let refused = |e: (String, String)| Broken::Nonsense(format!("a query is refused: {}", e.1));
        let none = Map::new();
        let graph = self.peer.ask(GRAPH, &none)?.map_err(refused)?;
        self.state.read_graph(&graph).map_err(Broken::Nonsense)?;
        let jobs = self.peer.ask("query-jobs", &none)?.map_err(refused)?;
        self.state.read_jobs(&jobs).map_err(Broken::Nonsense)?;
        Ok(())
    }

    /// What is told of every node, where asking does not kill.
    fn look_at_flags(&mut self) -> Result<Option<Value>, Stop> {
        if self.has_orphans() {
            return Ok(None);
        }
        let answer = self
            .peer
            .ask("query-named-block-nodes", &object(json!({"flat": true})))?;
        let mut nodes = answer.map_err(|e| Broken::Nonsense(format!("a query is refused: {}", e.1)))?;
        let mut by_name = Map::new();
        for node in nodes.as_array_mut().into_iter().flatten() {
            let name = node["node-name"].as_str().unwrap_or_default().to_owned();
            if let Some(image) = node.get_mut("image").and_then(Value::as_object_mut) {
                image.shift_remove("actual-size");
                // A flush clears it, whoever asked for it.
                image.shift_remove("dirty-flag");
            }
            by_name.insert(name, node.take());
        }
        Ok(Some(Value::Object(by_name)))
    }

    /// Some job keeps a filter that has nothing below it any more.
    fn has_orphans(&self) -> bool {
        let state = &self.state;
        let orphan = |name: &String| {
            let above = format!("node '{name}'");
            let mut parents = state.links.iter().filter(|l| l.2 == *name).peekable();
            parents.peek().is_some()
                && parents.all(|l| l.0.starts_with("job '"))
                && !state.links.iter().any(|l| l.0 == above)
        };
        !state.leftovers.is_empty() || state.nodes.iter().any(orphan)
    }

    /// Takes in the events that came.
    pub(super) fn events(&mut self, quietly: bool) -> Result<(), Stop> {
        for (name, data) in self.peer.take_events() {
            match name.as_str() {
                "BLOCK_JOB_COMPLETED" | "BLOCK_JOB_CANCELLED" => {
                    self.stirred = true;
                    let id = data["device"].as_str().unwrap_or_default().to_owned();
                    let well = name == "BLOCK_JOB_COMPLETED" && data.get("error").is_none();
                    self.job_over(&id, well);
                }
                "BLOCK_JOB_READY" => self.stirred = true,
                "BLOCK_JOB_ERROR" | "BLOCK_IMAGE_CORRUPTED" if !quietly => {
                    return Err(Stop::Differs(
                        What::Events,
                        "no storage failed".to_owned(),
                        format!("{name} {data}"),
                    ));
                }
                "JOB_STATUS_CHANGE" => {
                    let (id, to) = (data["id"].as_str().unwrap_or_default(), data["status"].as_str());
                    if self.jobs.contains_key(id) && to != Some("created") {
                        self.stirred = true;
                    }
                    if to == Some("null") {
                        self.jobs.remove(id);
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Waits until a job has come to that status, or is gone; not for ever.
    fn wait_for(&mut self, id: &str, status: &str) -> Result<(), Stop> {
        for _ in 0..PATIENCE {
            self.events(false)?;
            if !self.jobs.contains_key(id) {
                return Ok(());
            }
            let none = Map::new();
            let jobs = self.peer.ask("query-jobs", &none)?;
            let jobs = jobs.map_err(|e| Broken::Nonsense(e.1))?;
            let now = jobs
                .as_array()
                .and_then(|jobs| jobs.iter().find(|j| j["id"] == id));
            let Some(now) = now.and_then(|j| j["status"].as_str()) else {
                self.jobs.remove(id);
                return self.events(false);
            };
            if now == status || matches!(now, "concluded" | "pending" | "paused" | "standby") {
                break;
            }
            if now == "running" && self.jobs.get(id).is_some_and(Job::is_slow) {
                break;
            }
            self.peer.pass_time();
            self.peer.rest()?;
        }
        self.peer.rest()?;
        self.events(false)
    }

    fn guest(&mut self, export: &str, op: GuestOp, at: usize) -> Result<(), Stop> {
        let Some(Export {
            view,
            writable,
            length,
            ..
        }) = self.exports.get(export).cloned()
        else {
            return Ok(());
        };
        let answer = self
            .peer
            .request(export, content::Books::ask(self.scenario, op, at))?;
        self.peer.rest()?;
        self.events(false)?;
        self.is_alive(&answer)?;
        if answer == Answer::NoExport {
            // Whoever took it away did not say so: that is seen in the graph.
            self.look()?;
            return Err(Stop::Differs(
                What::Content,
                format!("export {export}"),
                "none".to_owned(),
            ));
        }
        let range = match op {
            GuestOp::Read(r)
            | GuestOp::Write(r)
            | GuestOp::WriteFua(r)
            | GuestOp::WriteZeroes(r)
            | GuestOp::WriteZeroesUnmap(r)
            | GuestOp::Discard(r)
            | GuestOp::BlockStatus(r) => r,
            GuestOp::Flush => return Ok(()),
        };
        let outside = range.offset + range.length > length.min(self.length(&view));
        let error = match &answer {
            Answer::Read(Err(e)) | Answer::Done(Err(e)) | Answer::Status(Err(e)) => Some(*e),
            _ => None,
        };
        let writes = !matches!(op, GuestOp::Read(_) | GuestOp::BlockStatus(_));
        if let Some(error) = error {
            if outside || (writes && !writable) || range.length == 0 {
                return Ok(());
            }
            return Err(Stop::Differs(
                What::Content,
                "success".to_owned(),
                format!("{op:?} fails with errno {error}"),
            ));
        }
        let source = Source::Step(StepId(u32::try_from(at).expect("few steps")));
        match op {
            GuestOp::Read(_) => {
                if let Answer::Read(Ok(bytes)) = answer {
                    self.compare(&view, range, &bytes, export)?;
                }
            }
            GuestOp::Write(_) | GuestOp::WriteFua(_) => self.put(&view, range, Some(source)),
            GuestOp::WriteZeroes(_) | GuestOp::WriteZeroesUnmap(_) => self.put(&view, range, None),
            GuestOp::Discard(_) => self.discarded(&view, range, export)?,
            GuestOp::BlockStatus(_) => {
                if let Answer::Status(Ok(extents)) = answer {
                    self.status(&view, range, &extents)?;
                }
            }
            GuestOp::Flush => {}
        }
        Ok(())
    }

    /// A connection that was lost may be that of a daemon that died.
    pub(super) fn is_alive(&mut self, answer: &Answer) -> Result<(), Stop> {
        if answer.is_lost() {
            self.peer.rest()?;
            let answer = self.peer.ask("query-jobs", &Map::new())?;
            answer.map_err(|e| Broken::Nonsense(e.1))?;
        }
        Ok(())
    }

    fn status(
        &mut self,
        view: &View,
        range: Range,
        extents: &[crate::qemu::nbd::client::Extent],
    ) -> Result<(), Stop> {
        let grain = u64::from(self.scenario.grain);
        let mut offset = range.offset;
        for extent in extents {
            let mut at = offset;
            while at < offset + extent.bytes {
                let cell = self.cell(view, at);
                if extent.zero
                    && let Some(Cell::Stamp(..)) = cell
                {
                    let ours = format!("{} at {at:#x}", cell.expect("just seen").said());
                    return Err(Stop::Differs(
                        What::Content,
                        ours,
                        "block status says zeroes".to_owned(),
                    ));
                }
                at += grain;
            }
            offset += extent.bytes;
        }
        Ok(())
    }

    /// What was discarded reads as before or as zeroes.
    fn discarded(&mut self, view: &View, range: Range, export: &str) -> Result<(), Stop> {
        let ask = content::Books::ask(self.scenario, GuestOp::Read(range), 0);
        let Answer::Read(Ok(bytes)) = self.peer.request(export, ask)? else {
            return Ok(());
        };
        let grain = self.scenario.grain as usize;
        for (at, chunk) in bytes.chunks(grain).enumerate() {
            let offset = range.offset + (at * grain) as u64;
            if Cell::Zero.is(chunk) {
                let range = Range {
                    offset,
                    length: grain as u64,
                };
                self.put(view, range, None);
            }
        }
        self.compare(view, range, &bytes, export)
    }

    /// These bytes were read there.
    pub(super) fn compare(&mut self, view: &View, range: Range, bytes: &[u8], who: &str) -> Result<(), Stop> {
        let grain = self.scenario.grain as usize;
        for (at, chunk) in bytes.chunks(grain).enumerate() {
            let offset = range.offset + (at * grain) as u64;
            if let Some(cell) = self.cell(view, offset)
                && !cell.is(chunk)
            {
                let ours = format!("{who} at {offset:#x}: {}", cell.said());
                let at = match cell {
                    Cell::Stamp(_, at) => at,
                    _ => offset,
                };
                return Err(Stop::Differs(
                    What::Content,
                    ours,
                    format!("{:?}", crate::stamp::read(chunk, at)),
                ));
            }
        }
        Ok(())
    }
}

/// The first node of which something else is told.
fn first_difference(before: &Value, now: &Value) -> (String, String) {
    let (Value::Object(before), Value::Object(now)) = (before, now) else {
        return (before.to_string(), now.to_string());
    };
    for (key, value) in before {
        let other = now.get(key).unwrap_or(&Value::Null);
        if value != other {
            let (ours, theirs) = first_difference(value, other);
            return (format!("{key}: {ours}"), format!("{key}: {theirs}"));
        }
    }
    let new = now.iter().find(|(key, _)| !before.contains_key(*key));
    let new = new.map_or_else(String::new, |(key, value)| format!("{key}: {value}"));
    ("nothing more".to_owned(), new)
}
