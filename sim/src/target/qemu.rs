//! The shipping `qemu-storage-daemon`, gated: the images are in our memory, every storage request of the daemon is held
//! until the choice stream releases it.
//!
//! What it cannot do: drained sections of our own (a monitor has no command for them), events from inside (it is
//! known by its answers, its QMP events and its graph when at rest), time (nothing in a scenario may be rate
//! limited), alignments of storage.
//! Rules: commands go to the daemon one at a time, the next one when the last was answered. After each command and each
//! change of a job's status the graph is asked for, and told as events; where several things happened in one settling,
//! the answer of a command is told after all that came with it, since the graph was looked at last.
//! One daemon serves many runs; one that did not come back to an empty graph is replaced.

use std::collections::{BTreeSet, VecDeque};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Mutex;

use blkcheck_impl::Layer;
use blkcheck_impl::event::Event;
use blkcheck_impl::jobs::JobStatus;
use serde_json::{Map, Value, json};

use super::{Alternatives, Capabilities, ClosedFile, Leftovers, Move, NodeContent, Target, Trouble};
use crate::choice::Key;
use crate::finish::STATUSES;
use crate::history::{Outcome, Record, Refusal, StatusRun, StepId};
use crate::image::build::build;
use crate::qemu::Broken;
use crate::qemu::graph::Snapshot;
use crate::qemu::names::{Names, made_up_number, no_such_file};
use crate::qemu::nbd::client::{Answer, Ask, Client, Extent};
use crate::qemu::nbd::server::Server;
use crate::qemu::process::{Daemon, PROGRAM, Unavailable, Version, version};
use crate::qemu::qmp::{Message, Monitor};
use crate::qemu::settle::Sleepers;
use crate::scenario::{Action, Disk, Format, GuestOp, Image, Range, Scenario};
use crate::stamp::{self, Source};

/// Exports of ours, for the reads at the end.
const OURS: &str = "blkcheck-read-";
/// Most that is read at once.
const PIECE: u64 = 16 << 20;
/// Nodes longer than this are not read (a null-co of a terabyte).
const LONGEST_NODE: u64 = 256 << 20;
/// Runs after which a daemon is replaced, so that what it leaks cannot add up.
const RUNS: u32 = 2000;

/// A daemon and all our ends to it.
#[derive(Debug)]
struct Running {
    // Before the daemon: hanging up is gentler than a kill.
    client: Client,
    monitor: Monitor,
    server: Server,
    sleepers: Sleepers,
    daemon: Daemon,
    runs: u32,
}

/// A command of a scenario.
#[derive(Clone, Debug)]
struct Pending {
    step: StepId,
    execute: String,
    arguments: Map<String, Value>,
}

/// The target.
#[derive(Debug)]
pub struct QemuTarget {
    program: PathBuf,
    version: Version,
    running: Option<Running>,
    /// The daemon's graph is empty and nothing is under way.
    clean: bool,
    trouble: Option<Broken>,
    names: Names,
    snapshot: Snapshot,
    records: Vec<Record>,
    files: Vec<(String, Format)>,
    queue: VecDeque<Pending>,
    under_way: Option<Pending>,
    /// The main-context operation that was told to have begun.
    main: Option<&'static str>,
    /// The command that was answered in it.
    finished: Option<(StepId, Outcome)>,
    /// The graph was asked for, under this number.
    looking: Option<u64>,
    /// Jobs and their last status.
    jobs: Vec<(Rc<str>, JobStatus)>,
    /// Exports that were made: (id, name).
    exports: Vec<(String, String)>,
    /// Nodes that the monitor owns, oldest first.
    nodes: Vec<String>,
    /// What the daemon was last told, for people.
    last: String,
}

impl From<Broken> for Trouble {
    fn from(broken: Broken) -> Trouble {
        Trouble::Lost(broken.to_string())
    }
}

/// A name that outlives everything: events have static ones. There are only as many as commands in use.
fn lasting(name: &str) -> &'static str {
    static NAMES: Mutex<BTreeSet<&'static str>> = Mutex::new(BTreeSet::new());
    let mut names = NAMES.lock().expect("nobody panics holding it");
    if let Some(known) = names.get(name) {
        return known;
    }
    let known: &'static str = Box::leak(name.to_owned().into_boxed_str());
    names.insert(known);
    known
}

fn unusable(reason: impl std::fmt::Display) -> Trouble {
    Trouble::Unusable(format!("qemu-storage-daemon: {reason}"))
}

impl Running {
    fn start(program: &Path) -> Result<Running, Trouble> {
        let directory = Daemon::directory().map_err(unusable)?;
        let server = Server::listen(&Daemon::storage_socket(directory.path())).map_err(unusable)?;
        let client = Client::new(&Daemon::export_socket(directory.path()));
        let (ours, theirs) = UnixStream::pair().map_err(unusable)?;
        let monitor = Monitor::new(ours).map_err(unusable)?;
        let daemon = Daemon::start(program, directory, theirs).map_err(unusable)?;
        let mut running = Running {
            client,
            monitor,
            server,
            sleepers: Sleepers::of(daemon.pid()),
            daemon,
            runs: 0,
        };
        // It sleeps now and then while it starts: what counts is that it greets.
        while running.monitor.greeting().is_none() {
            running.settle().map_err(unusable)?;
            std::thread::yield_now();
        }
        let agreed = running.ask("qmp_capabilities", &Map::new()).map_err(unusable)?;
        agreed.map_err(|(_, refusal)| unusable(refusal))?;
        Ok(running)
    }

    /// Waits until the daemon rests and everything it said is here.
    fn settle(&mut self) -> Result<(), Broken> {
        loop {
            let alive = self.sleepers.wait()?;
            // One after the other: what is sent at the same time may be seen in either order.
            let stirred = self.monitor.pump()?
                || self.server.pump().map_err(Broken::Nonsense)?
                || self.client.pump().map_err(Broken::Nonsense)?;
            if !alive || self.monitor.is_gone() {
                return Err(self.daemon.ended());
            }
            if !stirred {
                return Ok(());
            }
        }
    }

    /// Carries out a command of ours to its end, releasing whatever it waits for. What else is said meanwhile is
    /// dropped.
    fn ask(
        &mut self,
        execute: &str,
        arguments: &Map<String, Value>,
    ) -> Result<Result<Value, (String, String)>, Broken> {
        let id = self.monitor.send(execute, arguments);
        let mut answer = None;
        self.until(&format!("{execute} is not answered"), |running| {
            while let Some(message) = running.monitor.take() {
                if let Message::Answer(number, result) = message
                    && number == id
                {
                    answer = Some(result);
                }
            }
            answer.is_some()
        })?;
        Ok(answer.expect("just came"))
    }

    /// Releases requests in order until `done`.
    fn until(&mut self, what: &str, mut done: impl FnMut(&mut Running) -> bool) -> Result<(), Broken> {
        loop {
            self.settle()?;
            if done(self) {
                return Ok(());
            }
            if self.server.held().is_empty() {
                return Err(Broken::Hangs(format!("{what}, and nothing is held")));
            }
            self.server.release(0);
        }
    }

    /// The number of the next name that the daemon makes up.
    fn next_made_up(&mut self) -> Result<u64, Broken> {
        let object = |value: Value| match value {
            Value::Object(object) => object,
            _ => unreachable!("written as an object"),
        };
        let probe = json!({"driver": "raw", "node-name": "blkcheck-probe",
            "file": {"driver": "null-co", "size": 512, "read-zeroes": true}});
        let nonsense = |what: &str| Broken::Nonsense(format!("the daemon {what}"));
        self.ask("blockdev-add", &object(probe))?
            .map_err(|e| nonsense(&format!("refuses a node: {}", e.1)))?;
        let graph = self
            .ask("x-debug-query-block-graph", &Map::new())?
            .map_err(|e| nonsense(&format!("shows no graph: {}", e.1)))?;
        let number = graph["nodes"]
            .as_array()
            .and_then(|nodes| nodes.iter().find_map(|n| made_up_number(n["name"].as_str()?)))
            .ok_or_else(|| nonsense("makes up no name"))?;
        self.ask("blockdev-del", &object(json!({"node-name": "blkcheck-probe"})))?
            .map_err(|e| nonsense(&format!("keeps a node: {}", e.1)))?;
        Ok(number + 1)
    }
}

impl QemuTarget {
    /// Runs on this daemon; `None`: the one in PATH.
    ///
    /// # Errors
    /// When there is none of version 10.
    pub fn new(program: Option<&Path>) -> Result<QemuTarget, Unavailable> {
        let program = program.unwrap_or(Path::new(PROGRAM)).to_owned();
        let version = version(&program)?;
        Ok(QemuTarget {
            program,
            version,
            running: None,
            clean: false,
            trouble: None,
            names: Names::default(),
            snapshot: Snapshot::default(),
            records: Vec::new(),
            files: Vec::new(),
            queue: VecDeque::new(),
            under_way: None,
            main: None,
            finished: None,
            looking: None,
            jobs: Vec::new(),
            exports: Vec::new(),
            nodes: Vec::new(),
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

    /// Lets the daemon do what it was given, and tells what came of it.
    fn act(&mut self) {
        if self.trouble.is_some() {
            return;
        }
        if let Err(broken) = self.try_act() {
            self.trouble = Some(broken);
            self.clean = false;
        }
    }

    fn try_act(&mut self) -> Result<(), Broken> {
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

    fn main_begins(&mut self, what: &'static str) {
        self.main = Some(what);
        self.tell(Event::MainBegin { what });
    }

    fn main_ends(&mut self) {
        if let Some(what) = self.main.take() {
            self.tell(Event::MainEnd { what });
        }
        if let Some((step, outcome)) = self.finished.take() {
            self.records.push(Record::Ended(step, outcome));
        }
    }

    fn tell(&mut self, event: Event) {
        self.records.push(Record::Layer(event));
    }

    /// Sends the next command in line. Whether there was one.
    fn send_next(&mut self) -> Result<bool, Broken> {
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
    fn before(&mut self, pending: &Pending) -> Result<(), Broken> {
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

    fn answered(&mut self, result: Result<Value, (String, String)>) -> Result<(), Broken> {
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
                let desc = self.names.text(&desc).unwrap_or(desc);
                let desc = no_such_file(&desc, self.running().server.missing());
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

    /// The graph as it is now: tells what changed.
    fn graph(&mut self, answer: Result<Value, (String, String)>) -> Result<(), Broken> {
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
    fn look(&mut self) -> Result<(), Broken> {
        let answer = self.running().ask("x-debug-query-block-graph", &Map::new())?;
        self.graph(answer)
    }

    fn guests_ended(&mut self) {
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

    fn events(&mut self, events: Vec<(String, Value)>) {
        for (name, mut data) in events {
            self.names.from_daemon(&mut data);
            if name == "JOB_STATUS_CHANGE" {
                self.job_status(&data);
            }
            let (name, data) = (lasting(&name), Rc::new(data));
            self.tell(Event::Qmp { name, data });
        }
    }

    fn job_status(&mut self, data: &Value) {
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

    fn guest(&mut self, export: &str, op: GuestOp, grain: u32, step: StepId) {
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
            let broken = Broken::Nonsense(format!("the daemon does not take connections: {error}"));
            self.trouble.get_or_insert(broken);
        }
    }

    /// Exports every node that somebody could read, and reads it. Allocation comes first: reading through copy-on-read
    /// changes it.
    fn read_all(&mut self) -> Result<Vec<NodeContent>, Broken> {
        self.look_quietly()?;
        let names: Vec<String> = self.snapshot.nodes().map(str::to_owned).collect();
        let mut found: Vec<(String, NodeContent)> = Vec::new();
        for name in names {
            if !self.snapshot.has_children(&name) && !self.snapshot.is_alone(&name) {
                continue;
            }
            let export = format!("{OURS}{}", found.len());
            let add = json!({"type": "nbd", "id": export, "name": export, "node-name": name});
            if self.own("block-export-add", &add)?.is_err() {
                continue;
            }
            let running = self.running();
            running
                .client
                .connect(&export)
                .map_err(|e| Broken::Nonsense(e.to_string()))?;
            running.until("an export does not open", |r| r.client.size(&export).is_some())?;
            let size = running.client.size(&export).expect("just opened");
            let answer = running.request(&export, Ask::Status(0, size.min(LONGEST_NODE)))?;
            let allocated = match answer {
                Answer::Status(Ok(extents)) => extents.iter().map(|e| (e.bytes, e.depth == 1)).collect(),
                _ => Vec::new(),
            };
            found.push((
                export,
                NodeContent {
                    name,
                    bytes: Vec::new(),
                    allocated: joined(allocated),
                    zeroes: Vec::new(),
                },
            ));
        }
        for (export, content) in &mut found {
            content.bytes = self.running().read_whole(export)?;
        }
        for (export, _) in &found {
            let running = self.running();
            running.client.hang_up(export);
            running.settle()?;
            let delete = json!({"id": export, "mode": "hard"});
            self.own("block-export-del", &delete)?
                .map_err(|e| Broken::Nonsense(format!("an export stays: {}", e.1)))?;
        }
        Ok(found
            .into_iter()
            .map(|(_, content)| content)
            .filter(|c| !c.bytes.is_empty())
            .collect())
    }

    /// A command of ours, in a scenario's words.
    fn own(&mut self, execute: &str, arguments: &Value) -> Result<Result<Value, (String, String)>, Broken> {
        let Value::Object(arguments) = arguments else {
            unreachable!("arguments are an object")
        };
        let arguments = self.names.to_daemon(execute, arguments);
        self.running().ask(execute, &arguments)
    }

    /// The graph as it is, without telling.
    fn look_quietly(&mut self) -> Result<(), Broken> {
        let told = self.records.len();
        self.look()?;
        self.records.truncate(told);
        Ok(())
    }

    fn take_down(&mut self) -> Result<Leftovers, Broken> {
        let running = self.running();
        running.client.reset();
        running.settle()?;
        for (id, _) in std::mem::take(&mut self.exports) {
            // Some are gone already.
            let _ = self.own("block-export-del", &json!({"id": id, "mode": "hard"}))?;
        }
        loop {
            let before = self.nodes.len();
            for name in std::mem::take(&mut self.nodes).into_iter().rev() {
                if self.own("blockdev-del", &json!({"node-name": name}))?.is_err() {
                    self.nodes.insert(0, name);
                }
            }
            if self.nodes.is_empty() || self.nodes.len() == before {
                break;
            }
        }
        let running = self.running();
        running.until("requests do not end", |r| r.server.held().is_empty())?;
        self.look()?;
        let graph: Vec<String> = self.snapshot.nodes().map(|n| format!("node {n}")).collect();
        let mut tasks = Vec::new();
        let jobs = self.own("query-jobs", &json!({}))?;
        if !matches!(&jobs, Ok(Value::Array(jobs)) if jobs.is_empty()) {
            tasks.push("a job");
        }
        let mut storage = Vec::new();
        let open = self.running().server.connections();
        if open > 0 {
            storage.push(format!("{open} open images"));
        }
        Ok(Leftovers {
            tasks,
            storage,
            graph,
        })
    }
}

impl Running {
    /// A request of ours, to its end.
    fn request(&mut self, export: &str, ask: Ask) -> Result<Answer, Broken> {
        const TOKEN: u32 = u32::MAX;
        self.client
            .submit(export, TOKEN, ask)
            .map_err(|e| Broken::Nonsense(e.to_string()))?;
        let mut answer = None;
        self.until("a request is not answered", |running| {
            answer = running.client.answers().find(|(token, _)| *token == TOKEN);
            answer.is_some()
        })?;
        Ok(answer.expect("just came").1)
    }

    /// All bytes of an export; none when one cannot be read.
    fn read_whole(&mut self, export: &str) -> Result<Vec<u8>, Broken> {
        let size = self.client.size(export).unwrap_or(0);
        let mut bytes = Vec::new();
        while size <= LONGEST_NODE && (bytes.len() as u64) < size {
            let at = bytes.len() as u64;
            match self.request(export, Ask::Read(at, PIECE.min(size - at)))? {
                Answer::Read(Ok(piece)) => bytes.extend_from_slice(&piece),
                _ => return Ok(Vec::new()),
            }
        }
        Ok(bytes)
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

fn joined(runs: Vec<(u64, bool)>) -> Vec<(u64, bool)> {
    let mut out: Vec<(u64, bool)> = Vec::with_capacity(runs.len());
    for (bytes, allocated) in runs {
        match out.last_mut() {
            Some((last, same)) if *same == allocated => *last += bytes,
            _ => out.push((bytes, allocated)),
        }
    }
    out
}

/// Room behind an image for whatever a format may append.
fn room(image: &Image) -> u64 {
    match image.format {
        Format::Raw => 0,
        Format::Qcow2 => 3 * image.size + 32 * u64::from(image.cluster_size) + 65536,
    }
}

/// Puts the backing file's name in a scenario's words. The name never gets longer.
fn name_backing(bytes: &mut [u8], names: &mut Names) {
    let field = |bytes: &[u8], at: usize, n: usize| {
        bytes
            .get(at..at + n)
            .map_or(0, |b| b.iter().fold(0u64, |v, b| v << 8 | u64::from(*b)))
    };
    let (Ok(at), Ok(length)) = (
        usize::try_from(field(bytes, 8, 8)),
        usize::try_from(field(bytes, 16, 4)),
    ) else {
        return;
    };
    let Some(range) = at.checked_add(length).and_then(|end| bytes.get(at..end)) else {
        return;
    };
    let Some(ours) = std::str::from_utf8(range).ok().and_then(|name| names.text(name)) else {
        return;
    };
    if at == 0 || ours.len() > length {
        return;
    }
    bytes[at..at + length].fill(0);
    bytes[at..at + ours.len()].copy_from_slice(ours.as_bytes());
    let length = u32::try_from(ours.len()).expect("shorter than before");
    bytes[16..20].copy_from_slice(&length.to_be_bytes());
}

/// The first step that this target cannot take.
fn impossible(scenario: &Scenario) -> Option<String> {
    let drained = |action: &Action| matches!(action, Action::DrainBegin { .. } | Action::DrainEnd { .. });
    let at = scenario.steps.iter().position(|s| drained(&s.action))?;
    Some(format!(
        "step {at}: qemu-storage-daemon has no command for drained sections; --on qemu cannot run this scenario"
    ))
}

impl Target for QemuTarget {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            drain: false,
            events: false,
            deterministic: true,
            block_status: true,
            disk_options: false,
        }
    }

    fn adapt(&self, scenario: &Scenario) -> Option<Scenario> {
        let mut scenario = scenario.clone();
        scenario.disk = Disk::default();
        crate::generate::without_rates(&mut scenario.steps);
        crate::generate::without_inline_backing(&mut scenario.steps);
        Some(scenario)
    }

    fn prepare(&mut self, scenario: &Scenario) -> Result<(), Trouble> {
        if let Some(why) = impossible(scenario) {
            return Err(Trouble::Unusable(why));
        }
        self.trouble = None;
        self.queue.clear();
        (self.under_way, self.main, self.finished, self.looking) = (None, None, None, None);
        self.records.clear();
        self.snapshot.reset();
        self.jobs.clear();
        self.exports.clear();
        self.nodes.clear();
        self.last = "nothing yet".to_owned();
        let used_up = |r: &Running| r.runs >= RUNS;
        if !self.clean || self.running.as_ref().is_none_or(used_up) {
            self.running = None;
            self.running = Some(Running::start(&self.program)?);
        }
        // Clean again only when this run was taken down.
        self.clean = false;
        let running = self.running.as_mut().expect("just started");
        running.runs += 1;
        running.client.reset();
        running.server.reset();
        running.settle()?;
        let before = running.next_made_up()?;
        let socket = Daemon::storage_socket(running.daemon.path());
        self.names.reset(&socket.to_string_lossy(), before);
        self.files.clear();
        for (index, image) in (0..).zip(&scenario.images) {
            let mut image = image.clone();
            image.backing_file = image.backing_file.map(|name| self.names.on_record(&name));
            let mut bytes = Vec::new();
            build(&image, index, scenario.grain, &mut bytes);
            running.server.add(&image.file, bytes, room(&image));
            self.files.push((image.file, image.format));
        }
        Ok(())
    }

    fn issue(&mut self, scenario: &Scenario, step: StepId) {
        if self.trouble.is_some() {
            return;
        }
        match &scenario.steps[step.0 as usize].action {
            Action::Command { execute, arguments } => {
                self.queue.push_back(Pending {
                    step,
                    execute: execute.clone(),
                    arguments: arguments.clone(),
                });
                if self.under_way.is_none()
                    && self.main.is_none()
                    && let Err(broken) = self.send_next()
                {
                    self.trouble = Some(broken);
                    return;
                }
            }
            Action::Guest { export, op } => self.guest(export, *op, scenario.grain, step),
            Action::DrainBegin { .. } | Action::DrainEnd { .. } => {
                unreachable!("prepare refuses these scenarios")
            }
            Action::WaitJob { .. } | Action::Settle { .. } => {
                unreachable!("steps that wait are the runner's own")
            }
        }
        self.act();
    }

    fn alternatives(&mut self) -> Alternatives {
        let held = match (&self.trouble, &self.running) {
            (None, Some(running)) => running.server.held().len(),
            _ => 0,
        };
        Alternatives {
            // Trouble comes out as something that happens.
            ready: u32::from(self.trouble.is_some()),
            storage: u32::try_from(held).expect("few requests"),
            timer: false,
            external: false,
        }
    }

    fn keys(&self, into: &mut Vec<Key>) {
        if self.trouble.is_some() {
            return into.push(Key::task(0, 0));
        }
        let held = self.running.as_ref().map_or(&[][..], |r| r.server.held());
        into.extend(held.iter().map(|h| Key::request(0, h.identity)));
    }

    fn advance(&mut self, next: Move) -> Result<(), Trouble> {
        match next {
            Move::Storage(at) => {
                self.running().server.release(at as usize);
                self.act();
            }
            Move::Ready(_) | Move::Timer | Move::External => {}
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
        self.tell(Event::MainBegin { what: "shutdown" });
        let left = self.take_down()?;
        self.tell(Event::MainEnd { what: "shutdown" });
        self.clean = left == Leftovers::default();
        Ok(left)
    }

    fn closed_files(&mut self) -> Vec<ClosedFile> {
        let running = self.running.as_ref().expect("prepared");
        let names = &mut self.names;
        let disks = running.server.disks().iter().zip(&self.files);
        disks
            .map(|(disk, (name, format))| {
                let mut bytes = disk.file().to_vec();
                if *format == Format::Qcow2 {
                    name_backing(&mut bytes, names);
                }
                ClosedFile {
                    name: name.clone(),
                    format: *format,
                    bytes,
                    contested: disk.contested(),
                }
            })
            .collect()
    }

    fn describe(&self) -> Vec<String> {
        let mut lines = vec![format!("last given to the daemon: {}", self.last)];
        if let Some(pending) = &self.under_way {
            lines.push(format!("not answered: {}", pending.execute));
        }
        lines.extend(self.queue.iter().map(|p| format!("not sent yet: {}", p.execute)));
        let Some(running) = &self.running else {
            return lines;
        };
        lines.extend(running.server.held().iter().map(|h| {
            let (r, disk) = (h.request, running.server.disks()[h.disk].name());
            format!("held: {:?} {:#x}+{:#x} of {disk}", r.command, r.offset, r.length)
        }));
        if self.trouble.is_some() {
            let words = running.daemon.last_words();
            lines.extend(words.into_iter().map(|l| format!("the daemon said: {l}")));
        }
        lines
    }
}
