//! One scenario, on the model and on the daemon, a step at a time.
//!
//! After each step everything that can be seen is compared: the answer (class and text), events one by one, graph and
//! masks, jobs, headers as stored; read-only flags where asking for them is safe. A refused command must leave the
//! daemon exactly as it was, also where the model does not look. At the end every node is read.
//! Rules: the first difference ends a scenario, since what follows from it says nothing new.

mod events;
mod guest;
mod last;

use std::collections::BTreeMap;
use std::rc::Rc;

use blkcheck_model::blockers::Op;
use blkcheck_model::{Command, Driver, World};
use serde_json::{Map, Value, json};

use super::bitmaps;
use super::content::Books;
use super::known::{self, Case, Defect, Past, Strayed};
use super::peer::Peer;
use super::state::State;
use super::{Kind, What};
use crate::follow::world_of;
use crate::qemu::Broken;
use crate::scenario::{Action, Scenario, actions};

/// Commands that may make a node read-only, or writable.
const CHANGES_FLAGS: [&str; 5] = [
    "change-backing-file",
    "block-stream",
    "blockdev-reopen",
    "blockdev-snapshot",
    "transaction",
];
/// Commands that move links and, when they are refused after that, move them back.
const REORDERS: [&str; 3] = ["blockdev-reopen", "blockdev-backup", "transaction"];
const GRAPH: &str = "x-debug-query-block-graph";

/// How careful to be.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Manner {
    /// Leaves out what is known to kill or to hang the daemon.
    pub steer: bool,
    /// Asks for read-only flags after each step, not only at the end and after what may change them.
    pub flags_always: bool,
    /// Reads every node at the end, not only what is exported.
    pub read_all: bool,
}

/// Something that is not as the model says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The step.
    pub step: usize,
    /// What differs; none for a failure.
    pub what: Option<What>,
    /// How the daemon failed.
    pub failed: Option<Kind>,
    /// What the model says.
    pub model: String,
    /// What the daemon does.
    pub qemu: String,
    /// The known defect that explains it.
    pub known: Option<&'static str>,
}

/// What a scenario showed.
#[derive(Clone, Debug, Default)]
pub struct Shown {
    /// Steps carried out.
    pub steps: u64,
    /// Steps left out because of known defects.
    pub steered: u64,
    /// Commands left out because the model does not know what they do.
    pub left_out: Vec<usize>,
    /// The first difference, or how the daemon failed.
    pub finding: Option<Finding>,
    /// Known defects seen on the way that end nothing, and the step.
    pub aside: Vec<(&'static str, usize)>,
    /// Refusals that agreed.
    pub refusals: Vec<(String, String)>,
}

/// A step's end other than a good one.
pub(super) enum Stop {
    Differs(What, String, String),
    Broke(Broken),
}

impl From<Broken> for Stop {
    fn from(broken: Broken) -> Stop {
        Stop::Broke(broken)
    }
}

/// Model and daemon side by side.
#[derive(Debug)]
pub struct Lockstep {
    pub(super) peer: Peer,
    manner: Manner,
}

/// One scenario under way.
pub(super) struct Run<'a> {
    pub(super) peer: &'a mut Peer,
    manner: Manner,
    pub(super) world: World,
    /// The daemon, last time we looked.
    pub(super) seen: State,
    pub(super) books: Books,
    pub(super) shown: Shown,
    /// Jobs that went through pending.
    prepared: Vec<String>,
    /// The beginning of each image, as it was last read.
    heads: Vec<Vec<u8>>,
    /// How long exports are: as long as their nodes were when they were made.
    lengths: BTreeMap<String, u64>,
    /// A command was refused that takes links away and puts them back: they are newer than the model has them, so that among
    /// several reasons for a refusal the daemon names another one.
    reordered: bool,
    /// The world before everything was taken down.
    last: Option<World>,
    /// The world before each command.
    past: Vec<Past>,
    /// Streams that succeeded although their last layer had got another backing node.
    strayed: Vec<Strayed>,
}

/// A header ends here: its own fields, a few extensions, and a name of up to 1023 bytes.
const HEAD: usize = 4096;

impl Lockstep {
    /// With this daemon.
    #[must_use]
    pub fn new(peer: Peer, manner: Manner) -> Lockstep {
        Lockstep { peer, manner }
    }

    /// The daemon.
    #[must_use]
    pub fn peer(&self) -> &Peer {
        &self.peer
    }

    /// Runs a scenario.
    pub fn run(&mut self, scenario: &Scenario) -> Shown {
        if scenario.beyond_model {
            return super::beyond::run(&mut self.peer, scenario);
        }
        let mut run = match Run::start(&mut self.peer, self.manner, scenario) {
            Ok(run) => run,
            Err(broken) => return failed_to_start(&broken),
        };
        let mut at = 0;
        let result = run.all(scenario, &mut at);
        run.finish(scenario, at, result).0
    }
}

pub(super) fn failed_to_start(broken: &Broken) -> Shown {
    Shown {
        finding: Some(Finding {
            step: 0,
            what: None,
            failed: Some(Kind::of(broken, &[])),
            model: "starts".to_owned(),
            qemu: broken.to_string(),
            known: None,
        }),
        ..Shown::default()
    }
}

impl<'a> Run<'a> {
    pub(super) fn start(peer: &'a mut Peer, manner: Manner, scenario: &Scenario) -> Result<Run<'a>, Broken> {
        peer.prepare(scenario, makes_up_names(scenario))?;
        let mut run = Run {
            peer,
            manner,
            world: world_of(scenario),
            seen: State::default(),
            books: Books::of(scenario),
            shown: Shown::default(),
            prepared: Vec::new(),
            heads: Vec::new(),
            lengths: BTreeMap::new(),
            reordered: false,
            last: None,
            past: Vec::new(),
            strayed: Vec::new(),
        };
        // What is behind an image belongs to it as well: whoever opens the file sees it.
        for (name, length) in run.peer.lengths() {
            if let Some(facts) = run.world.files.get_mut(name) {
                Rc::make_mut(facts).length = length;
            }
        }
        run.read_headers();
        Ok(run)
    }

    fn all(&mut self, scenario: &Scenario, at: &mut usize) -> Result<(), Stop> {
        for step in 0..scenario.steps.len() {
            *at = step;
            self.step(scenario, step)?;
        }
        self.look(true)?;
        self.read_back(scenario)?;
        Ok(())
    }

    /// Takes everything down, and says what came of it.
    pub(super) fn finish(
        mut self,
        scenario: &Scenario,
        at: usize,
        result: Result<(), Stop>,
    ) -> (Shown, &'a mut Peer) {
        let result = result.and_then(|()| self.take_down(scenario));
        match result {
            Ok(()) => self.peer.is_clean(),
            Err(stop) => {
                let finding = self.finding(scenario, at, stop);
                self.shown.finding = Some(finding);
            }
        }
        (self.shown, self.peer)
    }

    fn finding(&mut self, scenario: &Scenario, at: usize, stop: Stop) -> Finding {
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
        let (execute, arguments) = match scenario.steps.get(at).map(|s| &s.action) {
            Some(Action::Command { execute, arguments }) => (execute.as_str(), arguments),
            _ => ("", &none),
        };
        let known = known::explain(&Case {
            scenario,
            step: at,
            execute,
            arguments,
            world: self.last.as_ref().unwrap_or(&self.world),
            past: &self.past,
            strayed: &self.strayed,
            leftovers: &self.seen.leftovers,
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

    /// A known defect that was seen and ends nothing.
    fn aside(&mut self, defect: &'static Defect, step: usize) {
        if self.shown.aside.iter().all(|(id, _)| *id != defect.id) {
            self.shown.aside.push((defect.id, step));
        }
    }

    pub(super) fn step(&mut self, scenario: &Scenario, at: usize) -> Result<(), Stop> {
        match &scenario.steps[at].action {
            Action::Command { execute, arguments } => {
                // The files of our server have one length for good.
                let is_fixed = execute == "block_resize" && names_a_file(&self.world, arguments);
                if is_fixed || self.is_unsettled(execute, arguments) {
                    self.shown.left_out.push(at);
                    return Ok(());
                }
                let around = self.manner.steer
                    && known::steers_around(&self.world, &self.seen.leftovers, execute, arguments).is_some();
                if around {
                    self.shown.steered += 1;
                    return Ok(());
                }
                self.shown.steps += 1;
                self.command(execute, arguments, at)?;
            }
            Action::Guest { export, op } => {
                self.shown.steps += 1;
                self.guest(scenario, export, *op, at)?;
            }
            // Everything is at rest after every step.
            Action::WaitJob { .. } | Action::Settle { .. } => {}
            // Nothing to see from outside, and nothing that the daemon could be told.
            Action::DrainBegin { .. } | Action::DrainEnd { .. } => {}
        }
        Ok(())
    }

    /// One command on both; whether it was accepted.
    pub(super) fn command(
        &mut self,
        execute: &str,
        arguments: &Map<String, Value>,
        at: usize,
    ) -> Result<bool, Stop> {
        if is_query(execute) {
            // Not modelled: it has to be answered, and to change nothing.
            let answer = self.peer.ask(execute, arguments)?;
            if let Err((class, desc)) = answer {
                return Err(Stop::Differs(
                    What::Result,
                    "an answer".to_owned(),
                    format!("{class}: {desc}"),
                ));
            }
            return Ok(true);
        }
        let before = self.seen.clone();
        let had_jobs = !self.world.jobs.is_empty();
        if execute == "block-export-del" {
            self.before_export_del(arguments)?;
        }
        let value = Value::Object(arguments.clone());
        let mut world = self.world.clone();
        let predicted = world.execute(&Command::new(execute, &value));
        let alone = !had_jobs && world.jobs.is_empty() && execute != "block-export-del";
        let id = self.peer.send(execute, arguments);
        // Without jobs nothing moves by itself: the graph can be asked for at once.
        let graph = alone.then(|| self.peer.send(GRAPH, &Map::new()));
        let answer = self.peer.answer(id, execute)?;
        let model = predicted
            .as_ref()
            .map_err(|r| (r.class.name().to_owned(), r.desc.clone()));
        let said = |r: &Result<&Value, (String, String)>| match r {
            Ok(_) => "accepted".to_owned(),
            Err((class, desc)) => format!("{class}: {desc}"),
        };
        let qemu = answer.as_ref().map_err(Clone::clone);
        let agree = match (&model, &qemu) {
            (Ok(_), Ok(_)) => true,
            (Err(ours), Err(theirs)) => {
                ours == theirs || (self.reordered && self.is_also_busy(&ours.1, &theirs.1))
            }
            _ => false,
        };
        if !agree {
            // The world stays as it was before the command: that is what explains a difference.
            return Err(Stop::Differs(What::Result, said(&model), said(&qemu)));
        }
        let before_world = std::mem::replace(&mut self.world, world);
        self.books.looked_into(&before_world, execute, arguments);
        self.reordered |= REORDERS.contains(&execute)
            && predicted.is_err()
            && before_world.moves_links(&Command::new(execute, &value));
        if predicted.is_ok() {
            self.books.opened(execute, arguments);
            self.books.resized(&before_world, &self.world);
            self.books.moved(&before_world, &self.world);
            self.books.kept(&self.world);
            self.books.backups_started(&before_world, &self.world);
            self.note_lengths();
            self.books.check_sharing(&self.world);
        }
        self.remember(before_world, at);
        let under_way = self.under_way();
        self.events()?;
        if !alone {
            self.peer.rest()?;
            self.events()?;
            self.jobs_rest()?;
        }
        let flags = self.manner.flags_always || CHANGES_FLAGS.contains(&execute) || bitmaps::any(&self.world);
        self.look_at(graph, flags)?;
        if let Some((what, model, qemu)) = self.differences().into_iter().next() {
            return Err(Stop::Differs(what, model, qemu));
        }
        if !self.seen.leftovers.is_empty() {
            self.aside(known::filter_outlives_job(), at);
        }
        if let Err(refusal) = model {
            // A slow job for which guests have copied everything ends as soon as it is woken, be it by the drain of such a command.
            // What it changed then has just been compared with what the model makes of its end.
            if self.under_way() == under_way {
                self.unchanged(&before)?;
            }
            self.shown.refusals.push(refusal);
        }
        Ok(answer.is_ok())
    }

    /// How many jobs have not ended yet.
    fn under_way(&self) -> usize {
        let jobs = self.world.jobs.iter();
        jobs.filter(|job| !job.status.is_completed()).count()
    }

    /// A walk that goes another way comes by the same step again.
    fn remember(&mut self, world: World, step: usize) {
        self.past.retain(|past| past.step < step);
        self.past.push(Past { step, world });
    }

    /// Both say that a node is busy, with other things that it is busy with.
    fn is_also_busy(&self, ours: &str, theirs: &str) -> bool {
        let graph = &self.world.graph;
        let reasons = |id| graph.busy(id, Op::Resize).into_iter().map(|reason| reason.desc);
        let mut all = graph.nodes().map(|(id, _)| reasons(id).collect::<Vec<_>>());
        all.any(|reasons| {
            [ours, theirs]
                .iter()
                .all(|text| reasons.iter().any(|r| r == text))
        })
    }

    /// Exports that are new have the length of their nodes, for good.
    fn note_lengths(&mut self) {
        let exports = &self.world.exports;
        self.lengths
            .retain(|name, _| exports.iter().any(|e| *e.name == **name));
        for export in exports {
            let node = self.world.graph.edge(export.root).child;
            let length = self.world.graph.node(node).length;
            self.lengths.entry(export.name.to_string()).or_insert(length);
        }
    }

    /// A refused command changed nothing, modelled or not.
    fn unchanged(&mut self, before: &State) -> Result<(), Stop> {
        let flags = |s: &State| s.read_only.clone();
        let same = State {
            read_only: flags(&self.seen),
            bitmaps: self.seen.bitmaps.clone(),
            ..before.clone()
        } == self.seen;
        let same_flags =
            before.read_only.is_none() || self.seen.read_only.is_none() || flags(before) == flags(&self.seen);
        let same_bitmaps =
            before.bitmaps.is_none() || self.seen.bitmaps.is_none() || before.bitmaps == self.seen.bitmaps;
        if same && same_flags && same_bitmaps {
            return Ok(());
        }
        Err(Stop::Differs(
            What::Refusal,
            "the state before".to_owned(),
            format!("{:?} instead of {before:?}", self.seen),
        ))
    }

    /// No guest is connected to an export that goes: a safe delete is refused only while requests are in flight.
    fn before_export_del(&mut self, arguments: &Map<String, Value>) -> Result<(), Stop> {
        let id = arguments.get("id").and_then(Value::as_str).unwrap_or_default();
        let name = self.world.export(id).map(|e| e.name.to_string());
        if let Some(name) = name {
            self.peer.hang_up(&name);
            self.peer.rest()?;
        }
        Ok(())
    }

    fn read_headers(&mut self) {
        let mut changed = Vec::new();
        for (at, (name, bytes)) in self.peer.disks().enumerate() {
            let head = &bytes[..bytes.len().min(HEAD)];
            if self.heads.len() <= at {
                self.heads.push(Vec::new());
            }
            if self.heads[at] != head {
                head.clone_into(&mut self.heads[at]);
                changed.push((name.to_owned(), head.to_vec()));
            }
        }
        for (name, bytes) in changed {
            let peer = std::cell::RefCell::new(&mut *self.peer);
            let ours = |text: &str| {
                peer.borrow_mut()
                    .our_name(text)
                    .unwrap_or_else(|| text.to_owned())
            };
            self.seen.read_header(&name, &bytes, ours);
        }
    }

    /// Looks at everything. `flags`: also at read-only flags, unless asking for them kills the daemon.
    pub(super) fn look(&mut self, flags: bool) -> Result<(), Stop> {
        self.look_at(None, flags)
    }

    /// The same; the graph was asked for with this number.
    fn look_at(&mut self, graph: Option<u64>, flags: bool) -> Result<(), Stop> {
        let nonsense = |what: String| Stop::Broke(Broken::Nonsense(what));
        let none = Map::new();
        let refused = |e: (String, String)| nonsense(format!("a query is refused: {}", e.1));
        let id = graph.unwrap_or_else(|| self.peer.send(GRAPH, &none));
        let graph = self.peer.answer(id, GRAPH)?.map_err(refused)?;
        self.seen.read_graph(&graph).map_err(nonsense)?;
        if self.world.jobs.is_empty() && self.seen.jobs.is_empty() {
            // A job that nobody knows of would be in the graph.
        } else {
            let jobs = self.peer.ask("query-jobs", &none)?.map_err(refused)?;
            self.seen.read_jobs(&jobs).map_err(nonsense)?;
        }
        (self.seen.read_only, self.seen.bitmaps) = (None, None);
        if flags && self.seen.leftovers.is_empty() {
            let Value::Object(flat) = json!({"flat": true}) else {
                unreachable!("an object")
            };
            let nodes = self
                .peer
                .ask("query-named-block-nodes", &flat)?
                .map_err(refused)?;
            self.seen.read_nodes(&nodes).map_err(nonsense)?;
            if let Some(seen) = &mut self.seen.bitmaps {
                bitmaps::ask_digests(self.peer, &bitmaps::of_model(&self.world), seen)?;
            }
        }
        self.read_headers();
        self.events()
    }

    pub(super) fn differences(&self) -> Vec<(What, String, String)> {
        let model = State::of_model(&self.world);
        let found = self.seen.against(&model);
        found.into_iter().map(|d| (d.what, d.model, d.qemu)).collect()
    }
}

pub(super) fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(object) => object,
        _ => unreachable!("written as an object"),
    }
}

/// `block_resize` of a node whose length is that of a file.
fn names_a_file(world: &World, arguments: &Map<String, Value>) -> bool {
    let name = arguments
        .get("node-name")
        .and_then(Value::as_str)
        .unwrap_or_default();
    let mut node = world.graph.find(name);
    while let Some(id) = node {
        match world.graph.node(id).driver {
            Driver::File | Driver::HostDevice => return true,
            Driver::Qcow2 => return false,
            _ => node = world.graph.primary_child(id),
        }
    }
    false
}

fn is_query(execute: &str) -> bool {
    execute.starts_with("query-") || execute.starts_with("x-debug-query-")
}

/// Whether some command of the scenario opens a node without saying its name.
pub(super) fn makes_up_names(scenario: &Scenario) -> bool {
    fn unnamed(options: &Map<String, Value>) -> bool {
        let children = options.values().filter_map(Value::as_object);
        (options.contains_key("driver") && !options.contains_key("node-name"))
            || children.into_iter().any(unnamed)
    }
    let from_header = scenario.images.iter().any(|i| i.backing_file.is_some());
    scenario.steps.iter().any(|step| match &step.action {
        Action::Command { execute, arguments } => match execute.as_str() {
            "blockdev-add" => {
                let follows_header = from_header
                    && arguments.get("driver").is_some_and(|d| d == "qcow2")
                    && !arguments.contains_key("backing");
                unnamed(arguments) || follows_header
            }
            "block-stream" | "blockdev-backup" => !arguments.contains_key("filter-node-name"),
            "transaction" => actions(execute, arguments)
                .any(|(kind, data)| kind == "blockdev-backup" && !data.contains_key("filter-node-name")),
            _ => false,
        },
        _ => false,
    })
}
