//! The course of a scenario with choices: which step was taken when, which storage request of the daemon was carried
//! out between, how everything ended; as it was on the gated daemon, with the scenario's choices.
//!
//! Rules: a request is known by what it is (`read base.img 0x0+0x200`), and of equal ones the oldest goes first. Where all
//! that was held was carried out in the order in which it came, the script says just that.
//! What is right: for commands the daemon's own answer, unless an oracle objects to it; for reads the history of the
//! disk, which the script keeps by itself. What other oracles say is told in the header, and not checked by the script.
//! Not checked at all: targets of backups and copy-before-write filters, and what is above them.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;
use std::rc::Rc;

use blkcheck_impl::Layer;
use blkcheck_impl::error::Errno;
use blkcheck_model::Driver;

use super::ExportError;
use super::script::command;
use super::text::{json as json_text, quoted};
use super::values::Values;
use crate::choice::{Key, Recorded};
use crate::follow::Follower;
use crate::history::{Outcome, Record, StepId};
use crate::oracle::bottom::Bottom;
use crate::oracle::data::{Copied, Data, guest};
use crate::oracle::{self, FinalContent, Oracle, OracleName, View, Violation};
use crate::qemu::names::Names;
use crate::run::Runner;
use crate::scenario::{Action, Format, GuestOp, Range, Scenario};
use crate::target::{
    Alternatives, Capabilities, ClosedFile, Leftovers, Move, NodeContent, QemuTarget, Target, Trouble,
};

/// One thing that happened.
#[derive(Clone, Debug)]
enum Entry {
    /// A step began.
    Begun(StepId),
    /// A storage request was carried out; it was the oldest; so many were held afterwards.
    Released(String, bool, usize),
    /// A storage request was made to fail: with this error, after so many bytes of it.
    Failed(String, Errno, u64),
    /// A step was over; so many requests were held then.
    Over(StepId, Outcome, usize),
}

/// A course.
#[derive(Debug)]
pub(super) struct Course {
    scenario: Scenario,
    entries: Vec<Entry>,
    violation: Option<Violation>,
    version: String,
    watched: Rc<RefCell<Watched>>,
}

/// Runs the scenario on the daemon.
pub(super) fn record(scenario: &Scenario, program: Option<&Path>) -> Result<Course, ExportError> {
    let mut target = QemuTarget::new(program).map_err(|e| {
        ExportError::Unusable(format!(
            "the course of this scenario is decided by its choices: {e}"
        ))
    })?;
    let (major, minor, micro) = target.version();
    let watched = Rc::<RefCell<Watched>>::default();
    let mut oracles: Vec<Box<dyn Oracle>> = vec![Box::new(Watcher(Rc::clone(&watched)))];
    oracles.extend(oracle::outside());
    let mut logged = Logged {
        inner: &mut target,
        entries: Vec::new(),
    };
    let mut runner = Runner::new();
    let result = runner
        .run(
            scenario,
            &mut Recorded::new(&scenario.choices),
            &mut logged,
            &mut oracles,
        )
        .map_err(ExportError::Unusable)?;
    Ok(Course {
        entries: logged.entries,
        scenario: runner.scenario().clone(),
        violation: result.violation,
        version: format!("{major}.{minor}.{micro}"),
        watched,
    })
}

/// The daemon, and what was done with it.
#[derive(Debug)]
struct Logged<'a> {
    inner: &'a mut QemuTarget,
    entries: Vec<Entry>,
}

impl Target for Logged<'_> {
    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }
    fn adapt(&self, scenario: &Scenario) -> Option<Scenario> {
        self.inner.adapt(scenario)
    }
    fn prepare(&mut self, scenario: &Scenario) -> Result<(), Trouble> {
        self.inner.prepare(scenario)
    }
    fn issue(&mut self, scenario: &Scenario, step: StepId) {
        self.entries.push(Entry::Begun(step));
        self.inner.issue(scenario, step);
    }
    fn step_limit(&self) -> u64 {
        self.inner.step_limit()
    }
    fn alternatives(&mut self) -> Alternatives {
        self.inner.alternatives()
    }
    fn keys(&self, into: &mut Vec<Key>) {
        self.inner.keys(into);
    }
    fn advance(&mut self, next: Move) -> Result<(), Trouble> {
        let held = self.inner.held();
        let moved = self.inner.advance(next);
        if let Move::Storage(at) = next {
            let at = at as usize;
            let left = self.inner.held().len();
            self.entries
                .push(Entry::Released(held[at].clone(), at == 0, left));
        }
        moved
    }
    fn endings(&mut self, storage: u32) -> u32 {
        self.inner.endings(storage)
    }
    fn fail(&mut self, storage: u32, ending: u32) {
        let held = self.inner.held()[storage as usize].clone();
        let bad = self.inner.bad_end(storage, ending);
        self.inner.fail(storage, ending);
        self.entries.push(Entry::Failed(held, bad.errno, bad.done));
    }
    fn take_records(&mut self, into: &mut Vec<Record>) {
        let before = into.len();
        self.inner.take_records(into);
        let held = self.inner.held().len();
        let over = into[before..].iter().filter_map(|record| match record {
            Record::Ended(step, outcome) => Some(Entry::Over(*step, outcome.clone(), held)),
            _ => None,
        });
        self.entries.extend(over);
    }
    fn layer(&self) -> Option<&Layer> {
        None
    }
    fn contents(&mut self) -> Result<Vec<NodeContent>, Trouble> {
        self.inner.contents()
    }
    fn close(&mut self) -> Result<Leftovers, Trouble> {
        self.inner.close()
    }
    fn closed_files(&mut self) -> Vec<ClosedFile> {
        self.inner.closed_files()
    }
    fn describe(&self) -> Vec<String> {
        self.inner.describe()
    }
}

/// Which disk each request and each node is about.
#[derive(Debug, Default)]
struct Watched {
    follower: Follower,
    data: Data,
    bottom: Bottom,
    disks: BTreeMap<StepId, usize>,
    /// At the end: name, length, disk.
    nodes: Vec<(String, u64, Option<usize>)>,
    /// At the end: nodes of qcow2 images, and their files.
    formatted: Vec<(String, String)>,
}

impl Watched {
    /// What copy-before-write filters put into their targets, and when, is not followed here: those are anybody's from now on, and so is
    /// what is above them.
    fn gives_up_targets(&mut self, scenario: &Scenario) {
        let Watched {
            follower,
            data,
            bottom,
            ..
        } = self;
        let graph = &follower.world.graph;
        for (id, _) in graph
            .nodes()
            .filter(|(_, node)| node.driver == Driver::CopyBeforeWrite)
        {
            let target = graph.children(id).find(|(_, edge)| edge.name == "target");
            let target = target.and_then(|(_, edge)| Data::disk_of(scenario, &follower.world, edge.child));
            data.copying_begins(id, (None, target), bottom, (None, |_, _| Copied::Perhaps), 0);
        }
    }
}

/// Follows a run with the books of the data oracle; never has a verdict.
#[derive(Debug)]
struct Watcher(Rc<RefCell<Watched>>);

impl Oracle for Watcher {
    fn name(&self) -> OracleName {
        OracleName::Data
    }
    fn reset(&mut self, scenario: &Scenario) {
        let mut watched = self.0.borrow_mut();
        *watched = Watched::default();
        watched.follower.reset(scenario);
        watched.data.reset(scenario);
        watched.bottom.reset(scenario);
    }
    fn record(&mut self, view: &View<'_>, record: &Record) -> Result<(), Violation> {
        let watched = &mut *self.0.borrow_mut();
        let followed = watched.follower.record(view.scenario, record);
        let bottom = &mut watched.bottom;
        if followed.executed.is_some() && followed.changed {
            bottom.executed(view.scenario, &watched.follower.world);
        }
        watched
            .data
            .follow(view.scenario, &watched.follower, &followed, bottom, view.now);
        if followed.executed.is_some() && followed.changed {
            watched.gives_up_targets(view.scenario);
        }
        let bottom = &mut watched.bottom;
        if followed.settled {
            watched.data.end_change(bottom);
        }
        match record {
            Record::Issued(step) => {
                if let Some((export, op)) = guest(view.scenario, *step) {
                    let beside = (&watched.follower, &watched.bottom);
                    watched.data.issued(view, beside, *step, export, op);
                    if let Some(disk) = watched.data.disk_under(*step) {
                        watched.bottom.issued(*step, disk, op);
                        watched.disks.insert(*step, disk);
                    }
                }
            }
            Record::Ended(step, outcome) => {
                // Its verdict is another's to give.
                watched.bottom.ended(*step, outcome);
                let _ = watched.data.ended(view, *step, outcome);
            }
            Record::Layer(_) | Record::Fault(_) | Record::PowerCut { .. } => {}
        }
        Ok(())
    }
    fn quiescent(&mut self, view: &View<'_>, contents: &[FinalContent<'_>]) -> Result<(), Violation> {
        let watched = &mut *self.0.borrow_mut();
        let world = &watched.follower.world;
        let shown = contents.iter().map(|c| {
            let node = world.graph.find(c.name);
            let disk = node.and_then(|node| Data::disk_of(view.scenario, world, node));
            (c.name.to_owned(), c.bytes.len() as u64, disk)
        });
        watched.nodes = shown.collect();
        let formatted = contents.iter().filter_map(|c| {
            let node = world.graph.find(c.name)?;
            let is_format = world.graph.node(node).driver == Driver::Qcow2;
            let file = world.image_file(node).filter(|_| is_format)?;
            Some((c.name.to_owned(), file.to_string()))
        });
        watched.formatted = formatted.collect();
        Ok(())
    }
}

impl Course {
    /// What the daemon did, in a sentence.
    pub(super) fn verdict(&self) -> String {
        match &self.violation {
            None => format!(
                "qemu-storage-daemon {} did nothing wrong in this course when this script was made.",
                self.version
            ),
            Some(v) => {
                let step = v.step.map_or_else(String::new, |s| format!("step {}, ", s.0));
                let seen = matches!(
                    v.oracle,
                    OracleName::Data
                        | OracleName::Transparency
                        | OracleName::Daemon
                        | OracleName::Errors
                        | OracleName::Refusals
                        | OracleName::Liveness
                        | OracleName::Image
                ) || self.ignored().is_some();
                let unchecked = if seen {
                    ""
                } else {
                    "\nThis script repeats the course, but does not check that."
                };
                format!(
                    "What qemu-storage-daemon {} did wrong in this course when this script was made ({step}{}): {}{unchecked}",
                    self.version,
                    v.oracle.as_str(),
                    v.message
                )
            }
        }
    }

    /// The body of `steps`.
    pub(super) fn steps(&self, values: &Values, names: &Names, judged: bool) -> String {
        let mut out = String::new();
        let mut at = 0;
        while at < self.entries.len() {
            at = self.entry(&mut out, at, values, names, judged);
        }
        // A course that a verdict ended is over; what was not over then has to end all the same.
        out.push_str("    run.release_all()\n");
        let begun = self.entries.iter().filter_map(|e| match e {
            Entry::Begun(step) => Some(*step),
            _ => None,
        });
        let is_over = |step: &StepId| {
            self.entries
                .iter()
                .any(|e| matches!(e, Entry::Over(s, ..) if s == step))
        };
        for step in begun.filter(|s| !is_over(s)) {
            let _ = writeln!(out, "    run.over(s{})", step.0);
        }
        let watched = self.watched.borrow();
        if judged {
            for (name, length, disk) in &watched.nodes {
                if let Some(disk) = disk.filter(|d| watched.data.is_known(*d)) {
                    let disk = quoted(&self.scenario.images[disk].file);
                    let _ = writeln!(out, "    run.node_shows({}, {length:#x}, {disk})", quoted(name));
                }
            }
        }
        if let Some((job, most)) = self.ignored() {
            let _ = writeln!(out, "    run.ignores_at_most({}, {most})", quoted(job));
        }
        if let Some(file) = self.misnamed() {
            for (node, _) in watched.formatted.iter().filter(|(_, f)| f == file) {
                let _ = writeln!(
                    out,
                    "    run.linked_as_recorded({}, {})",
                    quoted(node),
                    quoted(file)
                );
            }
        }
        out
    }

    /// The job that ignores more errors than there are sectors, if that is what is wrong, and how many there are.
    fn ignored(&self) -> Option<(&str, &str)> {
        let violation = self.violation.as_ref().filter(|v| v.oracle == OracleName::Jobs)?;
        let (before, after) = violation
            .message
            .split_once(" ignores more errors than there are sectors (")?;
        let job = before.strip_prefix("job '")?.strip_suffix('\'')?;
        Some((job, after.split(')').next()?))
    }

    /// The image whose header is not as its node is, if that is what is wrong.
    fn misnamed(&self) -> Option<&str> {
        let violation = self.violation.as_ref()?;
        let is_header = violation.message.contains("names another backing file");
        let file = violation.message.split('\'').nth(1)?;
        (violation.oracle == OracleName::Image && is_header).then_some(file)
    }

    /// Writes the entry at `at`, and those that belong to it; where it goes on.
    fn entry(&self, out: &mut String, at: usize, values: &Values, names: &Names, judged: bool) -> usize {
        match &self.entries[at] {
            Entry::Begun(step) => {
                let actor = &self.scenario.steps[step.0 as usize].actor;
                let _ = writeln!(out, "\n    # step {}, {actor}", step.0);
                if let Some(next) = self.alone(out, at, *step, names) {
                    return next;
                }
                self.begun(out, *step, values, names, judged);
            }
            Entry::Released(..) => {
                let end = self.releases_end(at);
                if self.in_order(at, end) {
                    out.push_str("    run.release_all()\n");
                    for entry in &self.entries[at..end] {
                        self.over(out, entry);
                    }
                    return end;
                }
                if let Entry::Released(what, _, _) = &self.entries[at] {
                    let _ = writeln!(out, "    run.release({})", quoted(what));
                }
            }
            Entry::Failed(what, errno, done) => {
                let done = match done {
                    0 => String::new(),
                    n => format!(", {n:#x}"),
                };
                let _ = writeln!(
                    out,
                    "    run.fail({}, errno.{}{done})",
                    quoted(what),
                    name(*errno)
                );
            }
            entry @ Entry::Over(..) => self.over(out, entry),
        }
        at + 1
    }

    /// Where releases, and what ended by them, end.
    fn releases_end(&self, at: usize) -> usize {
        let begun = |e: &Entry| matches!(e, Entry::Begun(_));
        let rest = &self.entries[at..];
        at + rest.iter().position(begun).unwrap_or(rest.len())
    }

    /// Everything that was held was carried out, the oldest first.
    fn in_order(&self, at: usize, end: usize) -> bool {
        let mut last = None;
        for entry in &self.entries[at..end] {
            if let Entry::Released(_, oldest, left) = entry {
                if !oldest {
                    return false;
                }
                last = Some(*left);
            }
            if let Entry::Failed(..) = entry {
                return false;
            }
        }
        last == Some(0)
    }

    /// A command that was over before anything else was done takes one line.
    fn alone(&self, out: &mut String, at: usize, step: StepId, names: &Names) -> Option<usize> {
        let end = self.releases_end(at + 1);
        let Action::Command { execute, arguments } = &self.scenario.steps[step.0 as usize].action else {
            return None;
        };
        let released = |e: &Entry| matches!(e, Entry::Released(..) | Entry::Failed(..));
        let untouched = !self.entries[at + 1..end].iter().any(released);
        let in_order = self.in_order(at + 1, end);
        let mut over = None;
        for entry in &self.entries[at + 1..end] {
            if let Entry::Over(other, outcome, held) = entry {
                if *other != step {
                    return None;
                }
                over = Some((outcome, in_order || (untouched && *held == 0)));
            }
        }
        // Alone it takes what it needs: nobody else may be waiting for it.
        let (outcome, _) = over.filter(|(_, quiet)| *quiet)?;
        let text = json_text(&command(execute, arguments, Some(names)), 8);
        match self.right(step, outcome) {
            Some(why) => {
                let _ = writeln!(out, "    run.refused({text},\n                {})", quoted(&why));
            }
            None => {
                let _ = writeln!(out, "    run.accepted({text})");
            }
        }
        Some(end)
    }

    /// Why a command has to be refused; none: it has to be accepted.
    fn right(&self, step: StepId, outcome: &Outcome) -> Option<String> {
        match (outcome, self.objected(OracleName::Refusals, step)) {
            (Outcome::Command(Err(refusal)), None) => Some(refusal.desc.clone()),
            (Outcome::Command(Ok(_)), Some(objection)) => Some(objection.message.clone()),
            _ => None,
        }
    }

    /// What an oracle has against how a step ended.
    fn objected(&self, oracle: OracleName, step: StepId) -> Option<&Violation> {
        let violation = self.violation.as_ref();
        violation.filter(|v| v.oracle == oracle && v.step == Some(step))
    }

    fn begun(&self, out: &mut String, step: StepId, values: &Values, names: &Names, judged: bool) {
        let number = step.0;
        match &self.scenario.steps[number as usize].action {
            Action::Command { execute, arguments } => {
                let text = json_text(&command(execute, arguments, Some(names)), 8);
                let _ = writeln!(out, "    s{number} = run.begin_command({text})");
            }
            Action::Guest { export, op } => {
                let watched = self.watched.borrow();
                let disk = watched
                    .disks
                    .get(&step)
                    .filter(|d| judged && watched.data.is_known(**d));
                let disk = disk.map_or_else(String::new, |d| {
                    format!(", disk={}", quoted(&self.scenario.images[*d].file))
                });
                let (request, flags) = request(*op, step, values);
                let _ = writeln!(
                    out,
                    "    s{number} = run.begin({}, {request}{disk}{flags})",
                    quoted(export)
                );
            }
            // Never given to a target.
            Action::WaitJob { .. }
            | Action::Settle { .. }
            | Action::DrainBegin { .. }
            | Action::DrainEnd { .. } => {}
        }
    }

    fn over(&self, out: &mut String, entry: &Entry) {
        let Entry::Over(step, outcome, _) = entry else {
            return;
        };
        let number = step.0;
        let _ = match outcome {
            Outcome::Command(_) => match self.right(*step, outcome) {
                Some(why) => writeln!(out, "    run.over_refused(s{number}, {})", quoted(&why)),
                None => writeln!(out, "    run.over_accepted(s{number})"),
            },
            Outcome::Read(Ok(_)) | Outcome::Done(Ok(())) | Outcome::Status(Ok(_)) => {
                writeln!(out, "    run.over_done(s{number})")
            }
            Outcome::Read(Err(_)) | Outcome::Done(Err(_)) | Outcome::Status(Err(_))
                if self.objected(OracleName::Errors, *step).is_some() =>
            {
                writeln!(out, "    run.over_in_order(s{number})")
            }
            Outcome::Read(Err(_)) | Outcome::Done(Err(_)) | Outcome::Status(Err(_)) | Outcome::NoExport => {
                writeln!(out, "    run.over_fails(s{number})")
            }
            Outcome::Passed | Outcome::NoNode => Ok(()),
        };
    }

    /// What is looked at once the daemon is gone.
    pub(super) fn afterwards(&self, sound: &[&str]) -> String {
        let mut out = String::new();
        for image in &self.scenario.images {
            if image.format == Format::Qcow2 && sound.contains(&image.file.as_str()) {
                let _ = writeln!(out, "    sound({})", quoted(&image.file));
            }
        }
        if out.is_empty() {
            out.push_str("    pass\n");
        }
        out
    }

    /// What every disk shows at the start.
    pub(super) fn initial(&self, values: &Values, judged: bool) -> String {
        let mut out = String::from(
            "\n\ndef initial():\n    \"\"\"What every disk shows at the start: (offset, bytes, whose); None: anything.\"\"\"\n    \
             return {\n",
        );
        let watched = self.watched.borrow();
        for (disk, grains) in watched
            .data
            .initially()
            .into_iter()
            .enumerate()
            .filter(|_| judged)
        {
            let Some(grains) = grains else { continue };
            let grain = u64::from(self.scenario.grain);
            let mut runs: Vec<(u64, u64, Option<u64>)> = Vec::new();
            for (at, value) in (0u64..).zip(grains) {
                match runs.last_mut() {
                    Some((_, length, same)) if *same == value => *length += grain,
                    _ => runs.push((at * grain, grain, value)),
                }
            }
            let runs: Vec<String> = runs
                .iter()
                .map(|(at, length, value)| format!("({at:#x}, {length:#x}, {})", values.of_number(*value)))
                .collect();
            let _ = writeln!(
                out,
                "        {}: [{}],",
                quoted(&self.scenario.images[disk].file),
                runs.join(", ")
            );
        }
        out.push_str("    }\n");
        out
    }
}

/// An error of storage, as Python has it.
fn name(errno: Errno) -> &'static str {
    match errno {
        Errno::ENOSPC => "ENOSPC",
        _ => "EIO",
    }
}

/// A guest's request, and its flags.
fn request(op: GuestOp, step: StepId, values: &Values) -> (String, &'static str) {
    let plain = |kind: &str, r: Range| format!("Request(\"{kind}\", {:#x}, {:#x})", r.offset, r.length);
    let write = |r: Range| {
        format!(
            "Request(\"write\", {:#x}, {:#x}, {})",
            r.offset,
            r.length,
            values.of_step(step)
        )
    };
    match op {
        GuestOp::Read(r) => (plain("read", r), ""),
        GuestOp::Write(r) => (write(r), ""),
        GuestOp::WriteFua(r) => (write(r), ", flags=Guest.FUA"),
        GuestOp::WriteZeroes(r) => (plain("write-zeroes", r), ", flags=Guest.NO_HOLE"),
        GuestOp::WriteZeroesUnmap(r) => (plain("write-zeroes", r), ""),
        GuestOp::Discard(r) => (plain("discard", r), ""),
        GuestOp::Flush => ("Request(\"flush\", 0, 0)".to_owned(), ""),
        GuestOp::BlockStatus(r) => (plain("status", r), ""),
    }
}
