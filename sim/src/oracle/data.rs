//! What guests read: every grain of every disk is a linearizable register, and jobs and filters are invisible.
//!
//! A *disk* is what an image shows through the chain below it; exports and nodes on the same image (through filters and
//! plain `raw`) share it. Its initial content comes from the scenario's images, its history from guest requests; a
//! stream or copy-on-read has no part in it, so a read of stale, lost or foreign data is unexplained.
//! [`Registers`] of the model judges each grain. Reads by guests are reported as `data`, ranges of block status that say
//! ZERO as `status`, contents of nodes and closed images as `transparency`.
//!
//! Writes to a lower layer under an overlay in use: where the overlay has no data of its own it may show the old content
//! (copied up before) or the new, so any value that the lower layer has had is accepted there, until a guest write
//! to the overlay has ended.
//! A grain of more than 512 bytes may be torn between writes that overlap; its sectors are then judged one by one, by
//! membership only.
//! Unchecked: windows (`raw` with offset or size), `null-co`, the plain bytes of a qcow2 file, disks whose image is open
//! twice or was written below its format (contents then have no meaning), durability.

use blkcheck_model::layer::Format as LayerFormat;
use blkcheck_model::register::{Effect, OpId, Registers, Value, Violation as Unexplained};
use blkcheck_model::{Driver, NodeId, World};

use super::{FinalContent, OracleName, View, Violation, violation};
use crate::follow::Follower;
use crate::history::{Outcome, StatusRun, StepId};
use crate::image::build;
use crate::scenario::{Action, Format, GuestOp, Image, Range, Scenario};
use crate::stamp::{self, Content, Source};

const SECTOR: u64 = 512;

/// A guest request, for evidence and for lower layers.
#[derive(Clone, Copy, Debug)]
struct Logged {
    step: StepId,
    start: u64,
    /// `u64::MAX`: not ended, or failed.
    end: u64,
    first: usize,
    last: usize,
    value: Value,
    what: &'static str,
}

impl Logged {
    fn covers(&self, grain: usize) -> bool {
        (self.first..self.last).contains(&grain)
    }
}

/// One image with what is below it.
#[derive(Debug)]
struct Disk {
    /// Length as nodes have it, bytes.
    length: u64,
    registers: Registers,
    initial: Vec<Value>,
    /// Byte positions inside a grain where content may end: of this image and of those below.
    cuts: Vec<u64>,
    /// Images below, nearest first.
    chain: Vec<usize>,
    /// Per grain: a guest wrote to a lower layer where this one had nothing.
    loose: Vec<bool>,
    /// Per grain: surely decided by this image.
    own: Vec<bool>,
    log: Vec<Logged>,
    /// Nothing can be said.
    unknown: bool,
}

/// A guest request under way.
#[derive(Clone, Copy, Debug)]
struct Open {
    disk: usize,
    op: OpId,
    /// Place in the disk's log, for writes.
    logged: Option<usize>,
    first: usize,
    last: usize,
    start: u64,
}

/// What a grain was seen to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    Value(Value),
    /// Cannot be judged.
    Skip,
    Wrong(Content),
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Data {
    grain: u64,
    disks: Vec<Option<Disk>>,
    open: Vec<Option<Open>>,
    /// Exports that were there once: a request may be issued while one goes.
    exports: Vec<(String, usize)>,
    values: Vec<Option<Value>>,
    buffer: Vec<u8>,
}

fn index(v: u64) -> usize {
    usize::try_from(v).expect("small disks")
}

/// The file whose bytes a leaf or a format node is about.
fn file_of(world: &World, node: NodeId) -> Option<std::rc::Rc<str>> {
    world.graph.node(node).filename.clone().or_else(|| world.image_file(node))
}

/// A stamp as a value of the model; never 0.
fn value_of(source: Source) -> Value {
    match source {
        Source::Fill { image, fill } => 1 << 40 | u64::from(image) << 16 | u64::from(fill),
        Source::Step(step) => 2 << 40 | u64::from(step.0),
    }
}

fn value_text(scenario: &Scenario, value: Value) -> String {
    match value >> 40 {
        0 => "zeroes".to_owned(),
        1 => {
            let (image, fill) = (index(value >> 16 & 0xff_ffff), value & 0xffff);
            let name = scenario.images.get(image).map_or("?", |i| &i.file);
            format!("fill {fill} of image {name}")
        }
        _ => format!("the stamp of step {}", value & 0xff_ffff_ffff),
    }
}

impl Data {
    pub(crate) fn reset(&mut self, scenario: &Scenario) {
        self.grain = u64::from(scenario.grain);
        self.disks.clear();
        self.disks.resize_with(scenario.images.len(), || None);
        self.open.clear();
        self.exports.clear();
    }

    /// Whether the content of an image can be judged.
    pub(crate) fn is_known(&self, disk: usize) -> bool {
        self.disks[disk].as_ref().is_some_and(|d| !d.unknown)
    }

    /// The image on which a request of this step is under way.
    pub(crate) fn disk_under(&self, step: StepId) -> Option<usize> {
        self.open.get(step.0 as usize)?.map(|o| o.disk)
    }

    /// The disk that a node shows, by image.
    pub(crate) fn disk_of(scenario: &Scenario, world: &World, node: NodeId) -> Option<usize> {
        let facts = world.graph.node(node);
        let leaf = |format| {
            let file = file_of(world, node)?;
            scenario.images.iter().position(|i| *i.file == *file && i.format == format)
        };
        match facts.driver {
            Driver::CopyOnRead => Self::disk_of(scenario, world, world.graph.filter_child(node)?),
            Driver::Raw if facts.windowed => None,
            Driver::Raw => Self::disk_of(scenario, world, world.graph.primary_child(node)?),
            Driver::Qcow2 => leaf(Format::Qcow2),
            Driver::File | Driver::HostDevice => leaf(Format::Raw),
            Driver::NullCo => None,
        }
    }

    /// Images below the one that `node` shows, nearest first; `None` where one of them cannot be judged.
    fn chain_of(scenario: &Scenario, world: &World, mut node: NodeId) -> Option<Vec<usize>> {
        let mut chain = Vec::new();
        loop {
            let facts = world.graph.node(node);
            node = match facts.driver {
                Driver::CopyOnRead => world.graph.filter_child(node)?,
                Driver::Raw => world.graph.primary_child(node)?,
                Driver::Qcow2 => match world.graph.cow_child(node) {
                    None => return Some(chain),
                    Some(below) => {
                        chain.push(Self::disk_of(scenario, world, below)?);
                        below
                    }
                },
                Driver::File | Driver::HostDevice | Driver::NullCo => return Some(chain),
            };
        }
    }

    /// The graph of the model changed: disks appear, chains get shorter.
    pub(crate) fn sync(&mut self, scenario: &Scenario, world: &World) {
        for (id, node) in world.graph.nodes() {
            if !matches!(node.driver, Driver::Qcow2 | Driver::File | Driver::HostDevice) {
                continue;
            }
            let Some(disk) = Self::disk_of(scenario, world, id) else { continue };
            let chain = Self::chain_of(scenario, world, id);
            let twice = node.driver == Driver::Qcow2
                && world.graph.nodes().any(|(other, n)| {
                    other > id && n.driver == Driver::Qcow2 && Self::disk_of(scenario, world, other) == Some(disk)
                });
            match (&mut self.disks[disk], chain) {
                (None, Some(chain)) => {
                    // Lower layers first: an overlay shows them. A layer opened inline is younger than its overlay.
                    for at in (0..chain.len()).rev().filter(|at| self.disks[chain[*at]].is_none()).collect::<Vec<_>>() {
                        let opened = self.opened(scenario, chain[at], chain[at + 1..].to_vec());
                        self.disks[chain[at]] = Some(opened);
                    }
                    let opened = self.opened(scenario, disk, chain);
                    self.disks[disk] = Some(opened);
                }
                (None, None) => {
                    let mut opened = self.opened(scenario, disk, Vec::new());
                    opened.unknown = true;
                    self.disks[disk] = Some(opened);
                }
                // A stream leaves layers out; anything else shows another content.
                (Some(d), Some(chain)) => {
                    let mut old = d.chain.iter();
                    d.unknown |= !chain.iter().all(|c| old.any(|o| o == c));
                    d.chain = chain;
                }
                (Some(d), None) => d.unknown = true,
            }
            if let (true, Some(d)) = (twice, &mut self.disks[disk]) {
                d.unknown = true;
            }
        }
        for export in &world.exports {
            if let Some(disk) = Self::disk_of(scenario, world, world.graph.edge(export.root).child)
                && !self.exports.iter().any(|(name, d)| *name == *export.name && *d == disk)
            {
                self.exports.push((export.name.to_string(), disk));
            }
        }
    }

    fn opened(&mut self, scenario: &Scenario, disk: usize, chain: Vec<usize>) -> Disk {
        let image = &scenario.images[disk];
        let length = image.size.next_multiple_of(SECTOR);
        let grains = index(length.div_ceil(self.grain));
        let mut own = allocation(image, self.grain, grains);
        own.resize(grains, image.format == Format::Raw);
        let mut loose = vec![false; grains];
        self.buffer.clear();
        self.buffer.resize(index(length), 0);
        let number = u16::try_from(disk).expect("few images");
        build::content(image, number, scenario.grain, 0, &mut self.buffer);
        let mut cuts: Vec<u64> = chain.iter().map(|c| scenario.images[*c].size).chain([image.size]).collect();
        cuts.retain(|c| c % self.grain != 0);
        let below = chain.first().and_then(|b| self.disks[*b].as_ref());
        let mut unknown = below.is_some_and(|b| b.unknown);
        let mut initial = Vec::with_capacity(grains);
        for (g, bytes) in self.buffer.chunks(index(self.grain)).enumerate() {
            let at = g as u64 * self.grain;
            let value = if own[g] {
                match seen(bytes, at, &cuts, self.grain) {
                    Seen::Value(v) => v,
                    Seen::Skip | Seen::Wrong(_) => {
                        unknown |= !cuts.iter().any(|c| (at..at + self.grain).contains(c));
                        0
                    }
                }
            } else {
                match below.filter(|b| at < b.length) {
                    None => 0,
                    Some(b) => {
                        loose[g] = b.loose[g] || b.log.iter().any(|l| l.covers(g));
                        b.initial[g]
                    }
                }
            };
            initial.push(value);
        }
        let registers = Registers::new(initial.iter().copied());
        Disk { length, registers, initial, cuts, chain, loose, own, log: Vec::new(), unknown }
    }

    /// A guest request is issued.
    pub(crate) fn issued(&mut self, view: &View<'_>, follower: &Follower, step: StepId, export: &str, op: &GuestOp) {
        let node = follower.export_node(export);
        let disk = match node {
            Some(node) => {
                let disk = Self::disk_of(view.scenario, &follower.world, node);
                if disk.is_none() {
                    self.written_below(view.scenario, &follower.world, node, op);
                }
                disk
            }
            None => self.exports.iter().rev().find(|(name, _)| name == export).map(|(_, d)| *d),
        };
        let (effect, value, what, range) = match *op {
            GuestOp::Read(range) | GuestOp::BlockStatus(range) => (Effect::Read, 0, "read", range),
            GuestOp::Write(range) | GuestOp::WriteFua(range) => {
                let value = value_of(Source::Step(step));
                (Effect::Write(value), value, "write", range)
            }
            GuestOp::WriteZeroes(range) | GuestOp::WriteZeroesUnmap(range) => {
                (Effect::Write(0), 0, "write-zeroes", range)
            }
            GuestOp::Discard(range) => (Effect::Discard, 0, "discard", range),
            GuestOp::Flush => return,
        };
        // What an export does not let through has no effect.
        if effect != Effect::Read && node.is_some() && !follower.export_writable(export) {
            return;
        }
        let Some(disk) = disk else { return };
        let Some(d) = self.disks[disk].as_mut().filter(|d| !d.unknown) else { return };
        let Range { offset, length } = range;
        if offset.checked_add(length).is_none_or(|end| end > d.length) {
            return;
        }
        let (first, last) = (index(offset / self.grain), index((offset + length).div_ceil(self.grain)));
        let op = d.registers.begin(effect, first..last);
        let start = view.now;
        let logged = (effect != Effect::Read).then(|| {
            d.log.push(Logged { step, start, end: u64::MAX, first, last, value, what });
            d.log.len() - 1
        });
        let i = step.0 as usize;
        if self.open.len() <= i {
            self.open.resize(i + 1, None);
        }
        self.open[i] = Some(Open { disk, op, logged, first, last, start });
        if logged.is_some() {
            self.loosen(disk, first, last);
        }
    }

    /// Somebody writes the bytes below a format: its content has no meaning any more.
    fn written_below(&mut self, scenario: &Scenario, world: &World, node: NodeId, op: &GuestOp) {
        if matches!(op, GuestOp::Read(_) | GuestOp::BlockStatus(_) | GuestOp::Flush) {
            return;
        }
        let file = file_of(world, node);
        for (i, image) in scenario.images.iter().enumerate() {
            let touched = file.as_deref() == Some(&*image.file);
            for d in self.disks.iter_mut().enumerate().filter_map(|(j, d)| d.as_mut().map(|d| (j, d))) {
                d.1.unknown |= touched && (d.0 == i || d.1.chain.contains(&i));
            }
        }
    }

    /// Overlays of `disk` may show what is written to it now.
    fn loosen(&mut self, disk: usize, first: usize, last: usize) {
        for d in self.disks.iter_mut().flatten().filter(|d| d.chain.contains(&disk)) {
            for g in first..last.min(d.own.len()) {
                if !d.own[g] {
                    d.loose[g] = true;
                }
            }
        }
    }

    /// A guest request is over.
    pub(crate) fn ended(&mut self, view: &View<'_>, step: StepId, outcome: &Outcome) -> Result<(), Violation> {
        let Some(open) = self.open.get_mut(step.0 as usize).and_then(Option::take) else { return Ok(()) };
        let grain = self.grain;
        let Some(disk) = &mut self.disks[open.disk] else { return Ok(()) };
        if let Some(logged) = open.logged {
            let ok = matches!(outcome, Outcome::Done(Ok(())));
            disk.registers.end(open.op, ok);
            if ok {
                disk.log[logged].end = view.now;
                if disk.log[logged].what != "discard" {
                    disk.own[open.first..open.last].fill(true);
                }
            }
            return Ok(());
        }
        self.values.clear();
        let (mut wrong, offset) = (None, open.first as u64 * grain);
        match outcome {
            Outcome::Read(Ok(bytes)) => {
                let disk = &*disk;
                wrong = collect(bytes, offset, disk, grain, &mut self.values, &open, view);
            }
            Outcome::Status(Ok(runs)) => zeroes(runs, &open, grain, &mut self.values),
            _ => {}
        }
        // A failed read says nothing; nor does a grain that was not returned.
        self.values.resize(open.last - open.first, None);
        let is_status = matches!(outcome, Outcome::Status(_));
        let verdict = self.judge(open, view.now);
        let (verdict, saw) = match (wrong, verdict) {
            (Some((g, content)), _) => (Some(g), Err(content)),
            (None, Err(v)) => (Some(v.grain), Ok(v)),
            (None, Ok(())) => return Ok(()),
        };
        let g = verdict.expect("just set");
        let disk = self.disks[open.disk].as_ref().expect("judged");
        let who = super::liveness::step_text(view.scenario, step);
        let at = g as u64 * grain;
        let (oracle, message) = match saw {
            Err(content) => (OracleName::Data, format!("{who}: grain {at:#x} holds {}", content_text(view.scenario, content))),
            Ok(v) if is_status => (
                OracleName::Status,
                format!("{who}: block status says ZERO at {at:#x}, which holds {}", texts(view.scenario, &v.allowed)),
            ),
            Ok(v) => (OracleName::Data, format!("{who}: grain {at:#x} {}", explain(view.scenario, disk, &v, open.start))),
        };
        Err(violation(oracle, Some(step), message, history(view.scenario, disk, g)))
    }

    /// Puts the collected values to the registers. On a loose grain a value of a lower layer passes as well, as long as
    /// the initial content would.
    fn judge(&mut self, open: Open, now: u64) -> Result<(), Unexplained> {
        let Data { disks, values, .. } = self;
        let (before, rest) = disks.split_at_mut(open.disk);
        let (disk, after) = rest.split_first_mut().expect("in range");
        let Disk { registers, initial, loose, chain, .. } = disk.as_mut().expect("open requests have a disk");
        let lower = |g: usize, value: Value| {
            let holds = |c: &usize| {
                let d = if *c < open.disk { &before[*c] } else { &after[*c - open.disk - 1] };
                d.as_ref().is_some_and(|d| {
                    d.initial.get(g) == Some(&value)
                        || d.log.iter().any(|l| l.covers(g) && l.value == value && l.start <= now)
                })
            };
            is_streamed_away(value) || chain.iter().any(holds)
        };
        let mut first = None;
        registers.observe(open.op, values.iter().copied(), |v| {
            if !(loose[v.grain] && v.allowed.contains(&initial[v.grain]) && lower(v.grain, v.saw)) {
                first.get_or_insert(v);
            }
        });
        first.map_or(Ok(()), Err)
    }

    /// All of a node or a closed image was read, with nothing under way.
    fn whole(&mut self, view: &View<'_>, disk: usize, content: &FinalContent<'_>) -> Result<(), Violation> {
        let grain = self.grain;
        let Some(d) = self.disks[disk].as_mut().filter(|d| !d.unknown) else { return Ok(()) };
        let (first, last) = (0, d.initial.len());
        // A raw image's file may not be a whole number of sectors long.
        let shortest = d.length.min(view.scenario.images[disk].size);
        let length = content.bytes.len() as u64;
        if length < shortest || length > d.length {
            let message = format!("{} is {length} bytes long, expected {}", content.name, d.length);
            return Err(violation(OracleName::Transparency, None, message, Vec::new()));
        }
        let op = d.registers.begin(Effect::Read, first..last);
        let open = Open { disk, op, logged: None, first, last, start: view.now };
        self.values.clear();
        let wrong = collect(content.bytes, 0, d, grain, &mut self.values, &open, view);
        self.values.resize(last, None);
        let verdict = self.judge(open, view.now);
        let d = self.disks[disk].as_ref().expect("judged");
        let (g, what) = match (wrong, verdict) {
            (Some((g, content)), _) => (g, format!("holds {}", content_text(view.scenario, content))),
            (None, Err(v)) => (v.grain, explain(view.scenario, d, &v, view.now)),
            (None, Ok(())) => return Ok(()),
        };
        let message = format!("at the end, {} at {:#x} {what}", content.name, g as u64 * grain);
        Err(violation(OracleName::Transparency, None, message, history(view.scenario, d, g)))
    }

    pub(crate) fn quiescent(
        &mut self,
        view: &View<'_>,
        follower: &Follower,
        contents: &[FinalContent<'_>],
    ) -> Result<(), Violation> {
        for content in contents {
            let Some(node) = follower.world.graph.find(content.name) else { continue };
            if let Some(disk) = Self::disk_of(view.scenario, &follower.world, node) {
                self.whole(view, disk, content)?;
            }
        }
        Ok(())
    }

    pub(crate) fn closed(
        &mut self,
        view: &View<'_>,
        follower: &Follower,
        contents: &[FinalContent<'_>],
    ) -> Result<(), Violation> {
        for content in contents {
            let Some(disk) = view.scenario.images.iter().position(|i| i.file == content.name) else { continue };
            // The independent reader goes by the headers; a chain that was put together otherwise reads otherwise.
            let recorded = recorded_chain(view.scenario, &follower.world, disk);
            if self.disks[disk].as_ref().is_some_and(|d| Some(&d.chain) == recorded.as_ref()) {
                self.whole(view, disk, content)?;
            }
        }
        Ok(())
    }
}

/// A stamp of an image or step that a chain may have lost by a stream: its disk is not below any more, but its content
/// may have been copied. Which of its values cannot be told, so every guest stamp passes on a loose grain.
fn is_streamed_away(value: Value) -> bool {
    value >> 40 == 2
}

/// Images below by their headers; `None` when a name leads out of the scenario or the chain is a circle.
fn recorded_chain(scenario: &Scenario, world: &World, disk: usize) -> Option<Vec<usize>> {
    let mut chain = Vec::new();
    let mut at = disk;
    while scenario.images[at].format == Format::Qcow2 {
        let facts = world.files.get(scenario.images[at].file.as_str())?.qcow2.as_ref()?;
        let Some(backing) = &facts.backing else { break };
        let below = scenario.images.iter().position(|i| *i.file == *backing.file)?;
        let format = if scenario.images[below].format == Format::Raw { LayerFormat::Raw } else { LayerFormat::Qcow2(3) };
        let recorded_raw = !matches!(backing.format.as_deref(), Some("qcow2"));
        if recorded_raw != (format == LayerFormat::Raw) || chain.len() > scenario.images.len() {
            return None;
        }
        chain.push(below);
        at = below;
    }
    Some(chain)
}

/// Which grains an image decides from the start.
pub(crate) fn allocation(image: &Image, grain: u64, grains: usize) -> Vec<bool> {
    let mut own = vec![image.format == Format::Raw; grains];
    if image.format == Format::Qcow2 {
        let cluster = u64::from(image.cluster_size);
        for (c, _) in build::forms(image) {
            let end = index(((c + 1) * cluster).div_ceil(grain)).min(grains);
            own[index(c * cluster / grain).min(end)..end].fill(true);
        }
    }
    own
}

/// Turns bytes into values. The first grain that nothing can explain is returned.
fn collect(
    bytes: &[u8],
    offset: u64,
    disk: &Disk,
    grain: u64,
    values: &mut Vec<Option<Value>>,
    open: &Open,
    view: &View<'_>,
) -> Option<(usize, Content)> {
    let mut wrong = None;
    for (i, piece) in bytes.chunks(index(grain)).enumerate() {
        let g = open.first + i;
        let at = offset + i as u64 * grain;
        let value = match seen(piece, at, &disk.cuts, grain) {
            Seen::Value(value) => Some(value),
            Seen::Wrong(content) => {
                if wrong.is_none() && !(content == Content::Torn && torn_between_writes(disk, piece, at, g, view.now)) {
                    wrong = Some((g, content));
                }
                None
            }
            Seen::Skip => None,
        };
        values.push(value);
    }
    wrong
}

/// What one grain holds, knowing that content may end within it.
fn seen(piece: &[u8], at: u64, cuts: &[u64], grain: u64) -> Seen {
    match stamp::read(piece, at) {
        Content::Zero => Seen::Value(0),
        Content::Stamp(source) => Seen::Value(value_of(source)),
        content => {
            for cut in cuts.iter().filter(|c| (at..at + grain).contains(c)) {
                let (head, tail) = piece.split_at(index(cut - at).min(piece.len()));
                if tail.iter().any(|b| *b != 0) {
                    continue;
                }
                // Too short for a whole stamp: nobody can tell.
                if head.len() < 16 {
                    return Seen::Skip;
                }
                if let Content::Stamp(source) = stamp::read(head, at) {
                    return Seen::Value(value_of(source));
                }
            }
            Seen::Wrong(content)
        }
    }
}

/// Whether each sector of a large grain is one of its values, and writes to it did overlap.
fn torn_between_writes(disk: &Disk, piece: &[u8], at: u64, grain: usize, now: u64) -> bool {
    if piece.len() as u64 <= SECTOR {
        return false;
    }
    piece.chunks(index(SECTOR)).all(|sector| match stamp::read(sector, at) {
        Content::Zero => {
            disk.initial[grain] == 0 || disk.log.iter().any(|l| l.covers(grain) && l.value == 0) || disk.loose[grain]
        }
        Content::Stamp(source) => {
            let value = value_of(source);
            value == disk.initial[grain]
                || disk.loose[grain]
                || disk.log.iter().any(|l| l.covers(grain) && l.value == value && l.start <= now)
        }
        Content::Misplaced(..) | Content::Torn => false,
    }) && disk.log.iter().any(|l| l.covers(grain))
}

/// A block-status answer as values: 0 where it says ZERO, nothing elsewhere.
fn zeroes(runs: &[StatusRun], open: &Open, grain: u64, values: &mut Vec<Option<Value>>) {
    const ZERO: u8 = 2;
    values.resize(open.last - open.first, None);
    let mut at = 0;
    for run in runs {
        if run.flags & ZERO != 0 {
            let to = index((at + run.bytes).div_ceil(grain)).min(values.len());
            values[index(at / grain).min(to)..to].fill(Some(0));
        }
        at += run.bytes;
    }
}

fn content_text(scenario: &Scenario, content: Content) -> String {
    match content {
        Content::Zero => "zeroes".to_owned(),
        Content::Stamp(source) => value_text(scenario, value_of(source)),
        Content::Misplaced(source, at) => {
            format!("{}, which belongs to {at:#x}", value_text(scenario, value_of(source)))
        }
        Content::Torn => "neither zeroes nor one whole stamp".to_owned(),
    }
}

fn texts(scenario: &Scenario, values: &[Value]) -> String {
    let texts: Vec<String> = values.iter().map(|v| value_text(scenario, *v)).collect();
    texts.join(" or ")
}

fn explain(scenario: &Scenario, disk: &Disk, v: &Unexplained, start: u64) -> String {
    let saw = value_text(scenario, v.saw);
    let writer = disk.log.iter().find(|l| l.covers(v.grain) && l.value == v.saw && l.value != 0);
    let since = disk.log.iter().rev().find(|l| {
        l.covers(v.grain) && l.end < start && l.value != v.saw && writer.is_none_or(|w| w.end < l.start)
    });
    let why = match (since, v.saw >> 40 == 2 && writer.is_none()) {
        (Some(l), _) => format!(" (overwritten by step {}, which ended before this read began)", l.step.0),
        (None, true) => " (never written here)".to_owned(),
        (None, false) => String::new(),
    };
    format!("holds {saw}{why}, expected {}", texts(scenario, &v.allowed))
}

/// Who wrote a grain, when.
fn history(scenario: &Scenario, disk: &Disk, grain: usize) -> Vec<String> {
    let mut lines = vec![format!("initially: {}", value_text(scenario, disk.initial[grain]))];
    for l in disk.log.iter().filter(|l| l.covers(grain)) {
        let end = if l.end == u64::MAX { "not ended or failed".to_owned() } else { format!("ended at {}", l.end) };
        lines.push(format!("step {}: {} of this grain, begun at {}, {end}", l.step.0, l.what, l.start));
    }
    if disk.loose[grain] {
        lines.push("a layer below was written here as well".to_owned());
    }
    lines
}

/// The guest request of a step.
pub(crate) fn guest(scenario: &Scenario, step: StepId) -> Option<(&str, &GuestOp)> {
    match &scenario.steps.get(step.0 as usize)?.action {
        Action::Guest { export, op } => Some((export, op)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use blkcheck_impl::event::Event;
    use serde_json::json;

    use super::super::modelled::Modelled;
    use super::super::tests::scenario_of;
    use super::super::{FinalContent, Oracle, OracleName, View, Violation};
    use super::*;
    use crate::history::Record;

    /// base (raw, filled in its first half, 1000 bytes) under top (qcow2 with its second cluster of 512 filled); exports
    /// `x` on top and `b` on base; then the given guest steps.
    fn scenario(guests: &[&str]) -> Scenario {
        let guests: String = guests.iter().map(|g| format!(",{g}")).collect();
        scenario_of(&format!(
            r#"{{"version":1,"grain":64,"images":[
            {{"file":"base","format":"raw","size":1000,"fill":[{{"offset":0,"length":1000,"stored":"data"}}]}},
            {{"file":"top","format":"qcow2","size":2048,"cluster-size":512,"backing-file":"base","backing-format":"raw",
              "fill":[{{"offset":512,"length":64,"stored":"data"}}]}}],"steps":[
            {{"actor":"m","execute":"blockdev-add","arguments":{{"driver":"file","node-name":"fb","filename":"base"}}}},
            {{"actor":"m","execute":"blockdev-add","arguments":{{"driver":"raw","node-name":"b","file":"fb"}}}},
            {{"actor":"m","execute":"blockdev-add","arguments":{{"driver":"file","node-name":"ft","filename":"top"}}}},
            {{"actor":"m","execute":"blockdev-add","arguments":{{"driver":"qcow2","node-name":"t","file":"ft","backing":"b"}}}},
            {{"actor":"m","execute":"block-export-add","arguments":{{"type":"nbd","id":"b","node-name":"b","writable":true}}}},
            {{"actor":"m","execute":"block-export-add","arguments":{{"type":"nbd","id":"x","name":"x","node-name":"t","writable":true}}}}
            {guests}]}}"#
        ))
    }

    fn guest_step(op: &str, offset: u64, length: u64, export: &str) -> String {
        format!(r#"{{"actor":"g","export":"{export}","do":{{"{op}":{{"offset":{offset},"length":{length}}}}}}}"#)
    }

    struct Run {
        scenario: Scenario,
        oracle: Modelled,
        now: u64,
    }

    impl Run {
        /// Everything opened; the graph's events are left out, since only content is looked at here.
        fn new(guests: &[(&str, u64, u64, &str)]) -> Run {
            let steps: Vec<String> = guests.iter().map(|g| guest_step(g.0, g.1, g.2, g.3)).collect();
            let scenario = scenario(&steps.iter().map(String::as_str).collect::<Vec<_>>());
            let mut run = Run { oracle: Modelled::default(), scenario, now: 0 };
            run.oracle.reset(&run.scenario);
            for step in 0..6 {
                run.record(Record::Issued(StepId(step))).expect("opens");
                let what = if step < 4 { "blockdev-add" } else { "block-export-add" };
                run.record(Record::Layer(Event::MainBegin { what })).expect("opens");
                assert!(run.oracle.accepts(), "step {step}");
            }
            run
        }

        fn record(&mut self, record: Record) -> Result<(), Violation> {
            let view = View { scenario: &self.scenario, now: self.now, layer: None };
            self.now += 1;
            self.oracle.record(&view, &record)
        }

        /// Guest step `n` (from 0) begins, or ends.
        fn begin(&mut self, n: u32) {
            self.record(Record::Issued(StepId(6 + n))).expect("begins");
        }
        fn done(&mut self, n: u32) {
            self.record(Record::Ended(StepId(6 + n), Outcome::Done(Ok(())))).expect("ends");
        }
        fn read(&mut self, n: u32, bytes: &[u8]) -> Result<(), Violation> {
            self.record(Record::Ended(StepId(6 + n), Outcome::Read(Ok(bytes.into()))))
        }
    }

    fn stamped(offset: u64, length: usize, source: Source) -> Vec<u8> {
        let mut bytes = vec![0; length];
        stamp::fill(&mut bytes, offset, 64, source);
        bytes
    }
    const BASE: Source = Source::Fill { image: 0, fill: 0 };
    const TOP: Source = Source::Fill { image: 1, fill: 0 };
    fn step(n: u32) -> Source {
        Source::Step(StepId(6 + n))
    }

    /// What top shows at first.
    fn initial() -> Vec<u8> {
        let mut bytes = stamped(0, 512, BASE);
        bytes.extend(stamped(512, 64, TOP));
        bytes.resize(2048, 0);
        bytes
    }

    #[test]
    fn the_initial_view_goes_through_the_chain() {
        let mut run = Run::new(&[("read", 0, 2048, "x"), ("read", 512, 64, "x"), ("read", 960, 64, "b")]);
        run.begin(0);
        assert_eq!(run.read(0, &initial()), Ok(()));
        run.begin(1);
        let v = run.read(1, &stamped(512, 64, BASE)).expect_err("the overlay decides");
        assert_eq!(v.oracle, OracleName::Data);
        assert!(v.message.ends_with("holds fill 0 of image base, expected fill 0 of image top"), "{}", v.message);
        // The base's last grain ends after 40 bytes.
        run.begin(2);
        let mut tail = stamped(960, 40, BASE);
        tail.resize(64, 0);
        assert_eq!(run.read(2, &tail), Ok(()));
    }

    #[test]
    fn a_stale_read_names_who_overwrote_it() {
        let mut run = Run::new(&[("write", 0, 64, "x"), ("write", 0, 64, "x"), ("read", 0, 64, "x")]);
        for n in 0..2 {
            run.begin(n);
            run.done(n);
        }
        run.begin(2);
        let v = run.read(2, &stamped(0, 64, step(0))).expect_err("stale");
        assert_eq!(v.step, Some(StepId(8)));
        let text = "holds the stamp of step 6 (overwritten by step 7, which ended before this read began)";
        assert!(v.message.contains(text), "{}", v.message);
        assert_eq!(v.evidence.len(), 3);
    }

    #[test]
    fn concurrent_and_failed_writes_allow_both_but_no_way_back() {
        let mut run = Run::new(&[
            ("write", 0, 64, "x"),
            ("read", 0, 64, "x"),
            ("read", 0, 64, "x"),
            ("read", 0, 64, "x"),
        ]);
        run.begin(0);
        run.begin(1);
        assert_eq!(run.read(1, &stamped(0, 64, BASE)), Ok(()));
        run.begin(2);
        assert_eq!(run.read(2, &stamped(0, 64, step(0))), Ok(()));
        run.begin(3);
        assert!(run.read(3, &stamped(0, 64, BASE)).is_err(), "new, then old again");
    }

    #[test]
    fn torn_misplaced_and_foreign_content_is_reported() {
        let reads = [("write", 0, 64, "x"), ("read", 0, 64, "x"), ("read", 0, 64, "x"), ("read", 0, 64, "x")];
        let mut run = Run::new(&reads);
        run.begin(0);
        run.begin(1);
        let mut torn = stamped(0, 64, step(0));
        torn[32..].copy_from_slice(&stamped(0, 64, BASE)[32..]);
        assert!(run.read(1, &torn).expect_err("torn").message.contains("neither zeroes nor one whole stamp"));
        run.begin(2);
        let v = run.read(2, &stamped(128, 64, BASE)).expect_err("misplaced");
        assert!(v.message.contains("which belongs to 0x80"), "{}", v.message);
        run.begin(3);
        let v = run.read(3, &stamped(0, 64, step(40))).expect_err("foreign");
        assert!(v.message.contains("(never written here)"), "{}", v.message);
    }

    #[test]
    fn a_lower_write_may_show_until_the_overlay_is_written() {
        let mut run = Run::new(&[
            ("write", 0, 64, "b"),
            ("read", 0, 64, "x"),
            ("read", 0, 64, "x"),
            ("write", 0, 64, "x"),
            ("read", 0, 64, "x"),
            ("read", 512, 64, "x"),
        ]);
        run.begin(0);
        run.done(0);
        run.begin(1);
        assert_eq!(run.read(1, &stamped(0, 64, step(0))), Ok(()));
        run.begin(2);
        assert_eq!(run.read(2, &stamped(0, 64, BASE)), Ok(()), "copied up before");
        run.begin(3);
        run.done(3);
        run.begin(4);
        assert!(run.read(4, &stamped(0, 64, step(0))).is_err(), "the overlay decides now");
        run.begin(5);
        assert!(run.read(5, &stamped(512, 64, step(0))).is_err(), "never below this grain");
    }

    #[test]
    fn zero_status_must_be_true() {
        let mut run = Run::new(&[("block-status", 0, 2048, "x"), ("block-status", 0, 2048, "x")]);
        let end = |run: &mut Run, n, runs: Vec<StatusRun>| {
            run.begin(n);
            run.record(Record::Ended(StepId(6 + n), Outcome::Status(Ok(runs))))
        };
        let zero = |flags, bytes| StatusRun { flags, bytes, depth: 1 };
        assert_eq!(end(&mut run, 0, vec![zero(17, 1024), zero(2, 1024)]), Ok(()));
        let v = end(&mut run, 1, vec![zero(17, 512), zero(2, 1536)]).expect_err("data called zero");
        assert_eq!(v.oracle, OracleName::Status);
        assert!(v.message.contains("says ZERO at 0x200"), "{}", v.message);
    }

    #[test]
    fn whole_contents_are_judged_at_the_end() {
        let mut run = Run::new(&[("write", 64, 64, "x")]);
        run.begin(0);
        run.done(0);
        let mut right = initial();
        right[64..128].copy_from_slice(&stamped(64, 64, step(0)));
        let closed = |run: &mut Run, bytes: &[u8]| {
            let view = View { scenario: &run.scenario, now: run.now, layer: None };
            run.oracle.closed(&view, &[FinalContent { name: "top", bytes, allocated: &[] }])
        };
        assert_eq!(closed(&mut run, &right), Ok(()));
        let v = closed(&mut run, &initial()).expect_err("a lost write");
        assert_eq!(v.oracle, OracleName::Transparency);
        assert_eq!(v.message, "at the end, top at 0x40 holds fill 0 of image base (overwritten by step 6, which ended before this read began), expected the stamp of step 6");
    }

    #[test]
    fn a_refusal_that_should_not_be_is_reported() {
        let mut run = Run::new(&[]);
        let refusal = crate::history::Refusal { class: "GenericError".into(), desc: "no".into() };
        run.record(Record::Layer(Event::MainEnd { what: "block-export-add" })).expect("ends");
        let v = run.record(Record::Ended(StepId(5), Outcome::Command(Err(refusal)))).expect_err("refused");
        assert_eq!(v.oracle, OracleName::Refusals);
        let mut run = Run::new(&[]);
        run.record(Record::Layer(Event::MainEnd { what: "block-export-add" })).expect("ends");
        let v = run.record(Record::Ended(StepId(5), Outcome::Command(Ok(json!({}))))).expect_err("no events came");
        assert_eq!((v.oracle, v.message.as_str()), (OracleName::Graph, "node 'fb' should exist"));
    }
}
