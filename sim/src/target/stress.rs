//! The shipping `qemu-storage-daemon` as it comes, for stress: images in real files, I/O threads, timers, and nobody who
//! holds anything. **Not deterministic**: the same seed gives the same requests, and another course every time.
//!
//! Rules: commands go one at a time, guests as many as a scenario has. Everything that comes is told in the order in which
//! it came; a guest's request lasts from before it is sent until after its answer is here, so that what a register
//! history says of it holds whatever the order was. Exports are spread over the I/O threads and the main thread, but not
//! in a scenario with a stream: a stream of a node in an I/O thread aborts the daemon (an assertion in
//! `bdrv_insert_node`), which would hide everything else.
//! Speed limits are raised to what real time can bear.
//! What it cannot do: repeat anything, drained sections, say when what happened inside. Its graph is looked at at the end
//! only. A daemon that does nothing for long, or works for long without an answer, hangs.

mod last;
mod running;

use std::collections::VecDeque;
use std::fs;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use blkcheck_impl::Layer;
use blkcheck_impl::event::Event;
use blkcheck_impl::jobs::JobStatus;
use blkcheck_impl::types::JobId;
use serde_json::{Map, Value, json};

use self::running::Running;
use super::{Alternatives, Capabilities, ClosedFile, Leftovers, Move, NodeContent, Target, Trouble};
use crate::choice::Key;
use crate::clock::Stopwatch;
use crate::finish::STATUSES;
use crate::history::{Outcome, Record, Refusal, StatusRun, StepId};
use crate::image::build::build;
use crate::lack::Share;
use crate::qemu::Broken;
use crate::qemu::nbd::client::{Answer, Ask, Extent};
use crate::qemu::process::{PROGRAM, Unavailable, Version, version};
use crate::qemu::qmp::Message;
use crate::qemu::steps::impossible;
use crate::scenario::{Action, Disk, Format, GuestOp, Range, Scenario};
use crate::stamp::{self, Source};

/// I/O threads of a daemon.
const IO_THREADS: usize = 2;
/// A daemon that says nothing for so long although something is asked hangs, if it had the processor.
const HANGS_AFTER: Duration = Duration::from_secs(20);
/// The same on a machine where it had not.
const GIVES_UP_AFTER: Duration = Duration::from_secs(120);
/// One that says nothing for so long and may open no more files waits for one.
const LACKS_AFTER: Duration = Duration::from_secs(3);
/// Slowest speed limit, bytes per second.
const SLOWEST: i64 = 64 << 10;
/// Nodes longer than this are not read.
const LONGEST_NODE: u64 = 256 << 20;
/// Runs after which a daemon is replaced.
const RUNS: u32 = 500;

/// A command of a scenario.
#[derive(Clone, Debug)]
struct Pending {
    step: StepId,
    execute: String,
    arguments: Map<String, Value>,
}

/// The target.
#[derive(Debug)]
pub struct StressTarget {
    /// Of the files that may be open.
    _share: Share,
    program: PathBuf,
    version: Version,
    running: Option<Running>,
    clean: bool,
    trouble: Option<Broken>,
    records: Vec<Record>,
    files: Vec<(String, Format)>,
    queue: VecDeque<Pending>,
    under_way: Option<(u64, Pending)>,
    in_flight: usize,
    jobs: Vec<(Rc<str>, JobStatus)>,
    exports: Vec<(String, String)>,
    nodes: Vec<String>,
    /// Exports may be in I/O threads.
    threads: bool,
    last: String,
}

/// Nodes by name, and edges: who is above (empty: nobody with a name), who is below.
type Graph = (Vec<String>, Vec<(String, String)>);

fn unusable(reason: impl std::fmt::Display) -> Trouble {
    Trouble::Unusable(format!("qemu-storage-daemon: {reason}"))
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(object) => object,
        _ => unreachable!("written as an object"),
    }
}

fn text<'a>(arguments: &'a Map<String, Value>, key: &str) -> Option<&'a str> {
    arguments.get(key).and_then(Value::as_str)
}

impl StressTarget {
    /// Runs on this daemon; `None`: the one in PATH.
    ///
    /// # Errors
    /// When there is none of version 10.
    pub fn new(program: Option<&Path>) -> Result<StressTarget, Unavailable> {
        let program = program.unwrap_or(Path::new(PROGRAM)).to_owned();
        let share = Share::take()?;
        let version = version(&program)?;
        Ok(StressTarget {
            _share: share,
            program,
            version,
            running: None,
            clean: false,
            trouble: None,
            records: Vec::new(),
            files: Vec::new(),
            queue: VecDeque::new(),
            under_way: None,
            in_flight: 0,
            jobs: Vec::new(),
            exports: Vec::new(),
            nodes: Vec::new(),
            threads: false,
            last: String::new(),
        })
    }

    /// The daemon's version.
    #[must_use]
    pub fn version(&self) -> Version {
        self.version
    }

    fn running(&mut self) -> &mut Running {
        self.running.as_mut().expect("prepared")
    }

    fn failed(&mut self, broken: Broken) {
        self.trouble.get_or_insert(broken);
    }

    fn tell(&mut self, event: Event) {
        self.records.push(Record::Layer(event));
    }

    fn main(&mut self, what: &'static str, begins: bool) {
        self.tell(if begins {
            Event::MainBegin { what }
        } else {
            Event::MainEnd { what }
        });
    }

    /// Tells what came.
    fn take_in(&mut self) {
        let answers: Vec<_> = self.running().client.answers().collect();
        for (token, answer) in answers {
            self.in_flight -= 1;
            let outcome = match answer {
                Answer::Read(result) => Outcome::Read(result.map(Rc::from)),
                Answer::Done(result) => Outcome::Done(result),
                Answer::Status(result) => Outcome::Status(result.map(|e| e.iter().map(run).collect())),
                Answer::NoExport => Outcome::NoExport,
            };
            self.records.push(Record::Ended(StepId(token), outcome));
        }
        while let Some(message) = self.running().monitor.take() {
            match message {
                Message::Event(name, data) => self.event(&name, data),
                Message::Answer(id, result) => self.answered(id, result),
            }
        }
        self.send_next();
    }

    fn event(&mut self, name: &str, data: Value) {
        let between = self.under_way.is_none();
        if between {
            self.main("job-exit", true);
        }
        if name == "JOB_STATUS_CHANGE" {
            self.job_status(&data);
        }
        self.tell(Event::Qmp {
            name: super::qemu::lasting(name),
            data: Rc::new(data),
        });
        if between {
            self.main("job-exit", false);
        }
    }

    fn job_status(&mut self, data: &Value) {
        let (Some(id), Some(status)) = (data["id"].as_str(), data["status"].as_str()) else {
            return;
        };
        let Some(&(to, _)) = STATUSES.iter().find(|(_, name)| *name == status) else {
            return;
        };
        let at = self.jobs.iter().rposition(|(i, _)| **i == *id);
        let at = at.filter(|_| to != JobStatus::Created).unwrap_or_else(|| {
            self.jobs.push((Rc::from(id), JobStatus::Undefined));
            self.jobs.len() - 1
        });
        let job = JobId(u32::try_from(at).expect("few jobs"));
        let (id, status) = &mut self.jobs[at];
        let (id, from) = (Rc::clone(id), std::mem::replace(status, to));
        self.tell(Event::JobStatus { job, id, from, to });
    }

    fn answered(&mut self, id: u64, result: Result<Value, (String, String)>) {
        let Some((_, pending)) = self.under_way.take_if(|(number, _)| *number == id) else {
            return self.failed(Broken::Nonsense("an answer without a question".to_owned()));
        };
        match &result {
            Ok(_) => self.took_effect(&pending),
            Err((_, desc)) => {
                if let Err(broken) = Broken::unless_lack(desc) {
                    return self.failed(broken);
                }
            }
        }
        self.main(super::qemu::lasting(&pending.execute), false);
        let result = result.map_err(|(class, desc)| Refusal { class, desc });
        self.records
            .push(Record::Ended(pending.step, Outcome::Command(result)));
    }

    /// Our own books of what has to be taken down at the end.
    fn took_effect(&mut self, pending: &Pending) {
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

    fn export_name(&self, export: &str) -> String {
        let by_name = self.exports.iter().find(|(_, name)| name == export);
        let found = by_name.or_else(|| self.exports.iter().find(|(id, _)| id == export));
        found.map_or_else(|| export.to_owned(), |(_, name)| name.clone())
    }

    /// Sends the next command in line, if none is under way.
    fn send_next(&mut self) {
        if self.under_way.is_some() || self.trouble.is_some() {
            return;
        }
        let Some(pending) = self.queue.pop_front() else {
            return;
        };
        let mut arguments = pending.arguments.clone();
        match &*pending.execute {
            "block-export-add" => self.spread(&mut arguments),
            // A guest that has nothing in flight does not stay connected to an export that goes.
            "block-export-del" => {
                let name = self.export_name(text(&arguments, "id").unwrap_or_default());
                let client = &mut self.running().client;
                if client.in_flight(&name) == 0 {
                    client.hang_up(&name);
                }
            }
            _ => {}
        }
        self.last = format!("{} {}", pending.execute, Value::Object(pending.arguments.clone()));
        self.main(super::qemu::lasting(&pending.execute), true);
        let id = self.running().monitor.send(&pending.execute, &arguments);
        self.under_way = Some((id, pending));
    }

    /// Exports take the I/O threads in turn, then the main thread.
    fn spread(&self, arguments: &mut Map<String, Value>) {
        arguments.entry("allocation-depth").or_insert(Value::Bool(true));
        let at = self.exports.len() % (IO_THREADS + 1);
        if self.threads && at < IO_THREADS && !arguments.contains_key("iothread") {
            arguments.insert("iothread".to_owned(), json!(format!("io{at}")));
            // Not where another export has its node: then it stays there.
            arguments.insert("fixed-iothread".to_owned(), json!(false));
        }
    }

    fn guest(&mut self, export: &str, op: GuestOp, grain: u32, step: StepId) {
        let write = |range: Range, fua| {
            let mut data = vec![0; usize::try_from(range.length).expect("validated")];
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
        self.in_flight += 1;
        if let Err(error) = self.running().client.submit(&name, step.0, ask) {
            self.failed(Broken::by("the daemon takes no connection", &error));
        }
    }

    /// Jobs that the daemon still works on by itself.
    fn is_busy(&self) -> bool {
        let works = |s: JobStatus| {
            !matches!(
                s,
                JobStatus::Paused
                    | JobStatus::Pending
                    | JobStatus::Concluded
                    | JobStatus::Null
                    | JobStatus::Ready
                    | JobStatus::Standby
            )
        };
        self.in_flight > 0 || self.under_way.is_some() || self.jobs.iter().any(|(_, s)| works(*s))
    }

    /// Waits until something came.
    fn wait(&mut self) -> Result<(), Broken> {
        let told = self.records.len();
        let watch = Stopwatch::start();
        while self.records.len() == told {
            self.running().pump()?;
            self.take_in();
            if let Some(broken) = self.trouble.clone() {
                return Err(broken);
            }
            if self.records.len() > told {
                break;
            }
            let running = self.running();
            running.doze();
            let waited = watch.elapsed();
            if running.is_overdue(waited) {
                let hangs = Broken::Hangs(format!("nothing comes in {} s", waited.as_secs()));
                return Err(running.daemon.judge(hangs));
            }
        }
        Ok(())
    }
}

/// Block status with the flags that the layer has.
fn run(extent: &Extent) -> StatusRun {
    StatusRun {
        flags: u8::from(extent.data) | u8::from(extent.zero) << 1 | u8::from(extent.depth > 0) << 4,
        bytes: extent.bytes,
        depth: extent.depth,
    }
}

impl Target for StressTarget {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            drain: false,
            events: false,
            deterministic: false,
            block_status: true,
            disk_options: false,
            power_cut: false,
        }
    }

    fn adapt(&self, scenario: &Scenario) -> Option<Scenario> {
        let mut scenario = scenario.clone();
        scenario.disk = Disk::default();
        for step in &mut scenario.steps {
            if let Action::Command { arguments, .. } = &mut step.action
                && let Some(speed) = arguments.get_mut("speed")
                && speed.as_i64().is_some_and(|s| s > 0 && s < SLOWEST)
            {
                *speed = json!(SLOWEST);
            }
        }
        Some(scenario)
    }

    fn prepare(&mut self, scenario: &Scenario) -> Result<(), Trouble> {
        if let Some(why) = impossible(scenario) {
            return Err(Trouble::Unusable(why));
        }
        self.trouble = None;
        self.queue.clear();
        (self.under_way, self.in_flight) = (None, 0);
        self.records.clear();
        self.jobs.clear();
        self.exports.clear();
        self.nodes.clear();
        self.last = "nothing yet".to_owned();
        self.threads = !scenario.steps.iter().any(|s| {
            let streams = |execute: &str| execute == "block-stream" || execute == "transaction";
            matches!(&s.action, Action::Command { execute, .. } if streams(execute))
        });
        let used_up = |r: &Running| r.runs >= RUNS;
        if !self.clean || self.running.as_ref().is_none_or(used_up) {
            self.running = None;
            self.running = Some(Running::start(&self.program)?);
        }
        // Clean again only when this run was taken down.
        self.clean = false;
        let earlier = std::mem::take(&mut self.files);
        let running = self.running.as_mut().expect("just started");
        // A scenario that lacks an image is not to find that of another one. A daemon that is new has a new directory.
        for (name, _) in earlier {
            match fs::remove_file(running.daemon.path().join(name)) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(unusable(error)),
                _ => {}
            }
        }
        running.runs += 1;
        running.client.reset();
        for (index, image) in (0..).zip(&scenario.images) {
            let mut bytes = Vec::new();
            build(image, index, scenario.grain, &mut bytes);
            fs::write(running.daemon.path().join(&image.file), bytes).map_err(unusable)?;
            self.files.push((image.file.clone(), image.format));
        }
        Ok(())
    }

    fn issue(&mut self, scenario: &Scenario, step: StepId) {
        if self.trouble.is_some() {
            return;
        }
        match &scenario.steps[step.0 as usize].action {
            Action::Command { execute, arguments } => {
                let pending = Pending {
                    step,
                    execute: execute.clone(),
                    arguments: arguments.clone(),
                };
                self.queue.push_back(pending);
                self.send_next();
            }
            Action::Guest { export, op } => self.guest(export, *op, scenario.grain, step),
            Action::DrainBegin { .. } | Action::DrainEnd { .. } => {
                unreachable!("prepare refuses these scenarios")
            }
            Action::WaitJob { .. } | Action::Settle { .. } => {
                unreachable!("steps that wait are the runner's own")
            }
        }
    }

    fn alternatives(&mut self) -> Alternatives {
        let broken = self.trouble.is_some();
        Alternatives {
            // Trouble comes out as something that happens.
            ready: u32::from(broken),
            storage: 0,
            timer: false,
            external: !broken && self.is_busy(),
        }
    }

    fn keys(&self, into: &mut Vec<Key>) {
        if self.trouble.is_some() {
            into.push(Key::task(0, 0));
        }
    }

    fn advance(&mut self, next: Move) -> Result<(), Trouble> {
        if let (Move::External, None) = (next, &self.trouble)
            && let Err(broken) = self.wait()
        {
            self.failed(broken);
        }
        match &self.trouble {
            None => Ok(()),
            Some(broken) => Err(broken.clone().into()),
        }
    }

    fn take_records(&mut self, into: &mut Vec<Record>) {
        into.append(&mut self.records);
    }

    fn layer(&self) -> Option<&Layer> {
        None
    }

    fn contents(&mut self) -> Result<Vec<NodeContent>, Trouble> {
        "the final reads".clone_into(&mut self.last);
        Ok(self.read_all()?)
    }

    fn close(&mut self) -> Result<Leftovers, Trouble> {
        "the shutdown".clone_into(&mut self.last);
        let left = self.take_down()?;
        self.clean = left == Leftovers::default();
        Ok(left)
    }

    fn closed_files(&mut self) -> Vec<ClosedFile> {
        let path = self.running.as_ref().expect("prepared").daemon.path();
        let files = self.files.iter().map(|(name, format)| ClosedFile {
            name: name.clone(),
            format: *format,
            bytes: fs::read(path.join(name)).expect("a file of our own"),
            contested: false,
        });
        files.collect()
    }

    fn describe(&self) -> Vec<String> {
        let mut lines = vec![format!("last given to the daemon: {}", self.last)];
        lines.extend(
            self.under_way
                .iter()
                .map(|(_, p)| format!("not answered: {}", p.execute)),
        );
        lines.extend(self.queue.iter().map(|p| format!("not sent yet: {}", p.execute)));
        if let (Some(running), true) = (&self.running, self.trouble.is_some()) {
            let words = running.daemon.last_words();
            lines.extend(words.into_iter().map(|l| format!("the daemon said: {l}")));
        }
        lines
    }
}
