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

mod finish;
mod images;
mod limit;
mod link;
mod steer;
mod tell;

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use blkcheck_impl::Layer;
use blkcheck_impl::event::Event;
use blkcheck_impl::jobs::JobStatus;
use serde_json::{Map, Value};

use super::faults::{Ordered, failed};
use super::{
    Alternatives, Capabilities, ClosedFile, Leftovers, Move, NodeContent, Steering, Target, Trouble,
};
use crate::choice::Key;
use crate::disk::{BadEnd, Op, Remains};
use crate::history::{Outcome, Record, StepId};
use crate::image::build::build;
use crate::lack::Share;
use crate::qemu::Broken;
use crate::qemu::graph::Snapshot;
use crate::qemu::names::Names;
use crate::qemu::nbd::server::Held;
use crate::qemu::nbd::wire::{Command, flag};
use crate::qemu::process::{Daemon, PROGRAM, Unavailable, Version, version};
use crate::qemu::steps::impossible;
use crate::scenario::{Action, Disk, Format, Scenario};
use images::{name_backing, room};
use limit::limit;
use link::Running;
use steer::Steerer;
pub(super) use tell::lasting;

/// Runs after which a daemon is replaced, so that what it leaks cannot add up.
const RUNS: u32 = 2000;

/// A command of a scenario.
#[derive(Clone, Debug)]
struct Pending {
    step: StepId,
    execute: String,
    arguments: Map<String, Value>,
}

impl From<Broken> for Trouble {
    fn from(broken: Broken) -> Trouble {
        match broken {
            Broken::Unusable(text) => Trouble::Unusable(format!("qemu-storage-daemon: {text}")),
            broken => Trouble::Lost(broken.to_string()),
        }
    }
}

/// The target.
#[derive(Debug)]
pub struct QemuTarget {
    /// Of the files that may be open.
    _share: Share,
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
    steering: Option<Steerer>,
    ordered: Ordered,
    /// Scheduler steps that the run may take.
    limit: u64,
    /// The next daemon is started under a debugger.
    closely: bool,
}

impl QemuTarget {
    /// Runs on this daemon; `None`: the one in PATH.
    ///
    /// # Errors
    /// When there is none of version 10.
    pub fn new(program: Option<&Path>) -> Result<QemuTarget, Unavailable> {
        let program = program.unwrap_or(Path::new(PROGRAM)).to_owned();
        let share = Share::take()?;
        let version = version(&program)?;
        Ok(QemuTarget {
            _share: share,
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
            steering: None,
            ordered: Ordered::default(),
            limit: 0,
            closely: false,
        })
    }

    /// The daemon's version.
    #[must_use]
    pub fn version(&self) -> Version {
        self.version
    }

    /// The storage requests that the daemon waits for, oldest first: what, of which image, where.
    #[must_use]
    pub fn held(&self) -> Vec<String> {
        let Some(running) = &self.running else {
            return Vec::new();
        };
        let word = |held: &Held| {
            let (r, disk) = (held.request, running.server.disks()[held.disk].name());
            let what = match r.command {
                Command::Read => "read",
                Command::Write => "write",
                Command::WriteZeroes => "zero",
                Command::Trim => "discard",
                Command::Flush => return format!("flush {disk}"),
                Command::Disconnect | Command::Status => "other",
            };
            format!("{what} {disk} {:#x}+{:#x}", r.offset, r.length)
        };
        running.server.held().iter().map(word).collect()
    }

    /// The daemon waits for no storage.
    fn is_idle(&self) -> bool {
        self.running.as_ref().is_none_or(|r| r.server.held().is_empty())
    }

    /// How a held request ends if it ends badly in this way.
    pub(crate) fn bad_end(&self, storage: u32, ending: u32) -> BadEnd {
        let running = self.running.as_ref().expect("prepared");
        asked(&running.server.held()[storage as usize]).1.bad_end(ending)
    }

    fn running(&mut self) -> &mut Running {
        self.running.as_mut().expect("prepared")
    }
}

/// A storage request of the daemon: the image that it is on, and what it does. Disks are in the order of the images.
fn asked(held: &Held) -> (u32, Op) {
    let (offset, bytes) = (held.request.offset, u64::from(held.request.length));
    let op = match held.request.command {
        Command::Read => Op::Read { offset, bytes },
        Command::Write => Op::Write { offset, bytes },
        Command::WriteZeroes => Op::WriteZeroes {
            offset,
            bytes,
            may_unmap: held.request.flags & flag::NO_HOLE == 0,
        },
        Command::Trim => Op::Discard { offset, bytes },
        Command::Flush => Op::Flush,
        Command::Disconnect | Command::Status => unreachable!("never held"),
    };
    (u32::try_from(held.disk).expect("few images"), op)
}

impl Target for QemuTarget {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            drain: false,
            events: false,
            deterministic: true,
            block_status: true,
            disk_options: false,
            power_cut: true,
        }
    }

    fn adapt(&self, scenario: &Scenario) -> Option<Scenario> {
        let mut scenario = scenario.clone();
        scenario.disk = Disk {
            faults: scenario.disk.faults,
            power_cut: scenario.disk.power_cut,
            ..Disk::default()
        };
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
        self.ordered = Ordered::new(scenario.disk.faults);
        self.limit = limit(scenario);
        self.steering = scenario.steer.then(|| Steerer::new(scenario));
        let used_up = |r: &Running| r.runs >= RUNS;
        if self.closely || !self.clean || self.running.as_ref().is_none_or(used_up) {
            self.running = None;
            let running = self.running.insert(Running::start(&self.program)?);
            if self.closely {
                running.look_closely();
            }
        }
        // Clean again only when this run was taken down.
        self.clean = false;
        let running = self.running.as_mut().expect("just started");
        running.runs += 1;
        running.client.reset();
        running.client.forgive(scenario.steer);
        running.server.reset(scenario.disk.power_cut.is_some());
        running.settle()?;
        running.daemon.forget_words();
        let before = running.next_made_up()?;
        self.names.reset(Daemon::STORAGE, before);
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

    fn steering(&self, scenario: &Scenario, step: StepId) -> Steering {
        let steerer = self.steering.as_ref();
        steerer.map_or(Steering::Go, |s| s.steering(scenario, step, self.is_idle()))
    }

    fn look_closely(&mut self, closely: bool) {
        self.closely = closely;
    }

    fn issue(&mut self, scenario: &Scenario, step: StepId) {
        if self.trouble.is_some() {
            return;
        }
        let idle = self.is_idle();
        if let Some(steerer) = &mut self.steering {
            steerer.issued(scenario, step, idle);
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

    fn step_limit(&self) -> u64 {
        self.limit
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

    fn endings(&mut self, storage: u32) -> u32 {
        let server = &self.running().server;
        // Ends badly as it is.
        if !server.is_inside(storage as usize) {
            return 1;
        }
        let (image, op) = asked(&server.held()[storage as usize]);
        self.ordered.endings(image, op)
    }

    fn is_flush(&mut self, storage: u32) -> bool {
        let held = self.running().server.held();
        asked(&held[storage as usize]).1 == Op::Flush
    }

    fn fail(&mut self, storage: u32, ending: u32) {
        let (image, op) = asked(&self.running().server.held()[storage as usize]);
        let bad = op.bad_end(ending);
        self.records.push(Record::Fault(failed(image, op, bad)));
        // Numbers of errors are the same on the wire.
        let errno = bad.errno.0.cast_unsigned();
        self.running().server.fail(storage as usize, errno, bad.done);
        self.act();
    }

    fn power_cut(&mut self, choose: &mut dyn FnMut(u32) -> u32) -> Vec<(ClosedFile, Remains)> {
        // Nobody tells the daemon; it is never clean again, and so the next run has another one.
        let left = self.running().server.power_cut(choose);
        let mut files: Vec<_> = self.closed_files().into_iter().zip(left).collect();
        for (file, remains) in &mut files {
            file.bytes = std::mem::take(&mut remains.bytes);
            if file.format == Format::Qcow2 {
                name_backing(&mut file.bytes, &mut self.names);
            }
        }
        files
    }

    fn take_records(&mut self, into: &mut Vec<Record>) {
        if let Some(steerer) = &mut self.steering {
            steerer.follow(&self.records);
        }
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
        let words = running.daemon.last_words();
        lines.extend(words.into_iter().map(|l| format!("the daemon said: {l}")));
        lines.extend(running.backtrace.iter().map(|l| format!("backtrace: {l}")));
        lines
    }
}
