//! What guests read: every grain of every disk is a linearizable register, and jobs and filters are invisible.
//!
//! A *disk* is what an image shows through the chain below it; exports and nodes on the same image (through filters and
//! plain `raw`) share it. Its initial content comes from the scenario's images, its history from guest requests; a
//! stream or copy-on-read has no part in it, so a read of stale, lost or foreign data is unexplained.
//! [`Registers`] of the model judges each grain. Reads by guests are reported as `data`, ranges of block status that say
//! ZERO as `status`, contents of nodes and closed images as `transparency`.
//!
//! Writes to a lower layer under an overlay in use: where the overlay has no data of its own it may show the old content
//! (copied up before) or the new, so any value that the lower layer has had is accepted there, for as long as the
//! overlay's initial content would be: until a guest write to the overlay has ended.
//! A grain of more than 512 bytes may be torn between writes that overlap; its sectors are then judged one by one, by
//! membership only.
//! An image whose flush failed may have lost on close what was not flushed before, and only that: a grain then holds
//! what it held at the last flush that succeeded, or what was written since; a FUA write that ended well is never lost.
//! What a power cut leaves is judged alike.
//! Unchecked: windows (`raw` with offset or size), `null-co`, the plain bytes of a qcow2 file, disks whose image is open
//! twice or was written below its format (contents then have no meaning).

use blkcheck_model::register::{self, Effect, OpId, Registers, Value};
use blkcheck_model::{Driver, NodeId, World};

use super::bottom::Bottom;
use super::{FinalContent, OracleName, View, Violation, status, violation};
use crate::follow::Follower;
use crate::history::{Fault, FaultKind, StepId};
use crate::image::build;
use crate::scenario::{Action, Format, GuestOp, Image, Range, Scenario};
use crate::stamp::{Content, Source};

pub(crate) use backup::Copied;
use backup::Copies;
use change::{Other, Window};
use grains::seen;

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
    /// Durable as soon as it has ended well.
    fua: bool,
    /// It may have reached another disk instead: this one need not hold it.
    crossed: bool,
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
    /// Length of its content in bytes as opened or resized. A raw file may have grown to the end of that sector since.
    bytes: u64,
    registers: Registers,
    initial: Vec<Value>,
    /// Byte positions inside a grain where content may end: of this image and of those below.
    cuts: Vec<u64>,
    /// Images below, nearest first.
    chain: Vec<usize>,
    /// Chains that it had before streams took layers out.
    chains: Vec<Vec<usize>>,
    /// Per grain: not decided by this image from the start, and a guest wrote to a lower layer there.
    loose: Vec<bool>,
    /// Per grain: decided by this image from the start.
    own: Vec<bool>,
    /// The first grain that a change of its length cut off or added, and when that was last; `usize::MAX` when there was none.
    cut_off: (usize, u64),
    log: Vec<Logged>,
    /// What grains held by way of layers that are not below any more.
    former: Vec<(usize, Value)>,
    /// When the last flush began that succeeded.
    flushed: u64,
    /// Nothing can be said.
    unknown: bool,
    /// A command has put it on something else since it was opened.
    moved: bool,
    /// Per grain: a backup keeps it as it was, whatever is written below.
    kept: Vec<bool>,
    /// A backup filled it.
    target: bool,
    /// Storage failed under a write, of which it may have done a part: in a layer below, too.
    torn: bool,
    /// Per grain: a backup discards it, or did. That is no entry of the log; none as long as there was no such backup.
    discarded: Vec<bool>,
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
    effect: Effect,
    /// The disk that its export shows since, which it may have reached instead.
    other: Option<Other>,
    /// It may have reached a disk where it cannot be followed: what it says is not judged.
    blind: bool,
    /// A status query: its length, and whether "no layer decides" promises zeroes.
    status: Option<(u64, bool)>,
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
    /// Flushes under way: step, disk, begin.
    flushes: Vec<(StepId, usize, u64)>,
    /// Images a flush of whose file failed.
    lost: Vec<usize>,
    /// Storage failed under a write.
    torn: bool,
    /// Exports that were there once: a request may be issued while one goes.
    exports: Vec<(String, usize)>,
    values: Vec<Option<Value>>,
    buffer: Vec<u8>,
    /// A command that changes what disks show is under way.
    window: Option<Window>,
    /// Writes that may have reached another disk too, not told yet.
    crossed: Vec<(StepId, usize)>,
    /// Requests under way that lie past the end of what their export shows.
    outside: Vec<StepId>,
    /// Backups and snapshots.
    copies: Copies,
}

/// A grain that nothing explains: what the register says, or content that is none.
type Unexplained = (usize, Result<register::Violation, Content>);

fn index(v: u64) -> usize {
    usize::try_from(v).expect("small disks")
}

/// The file whose bytes a leaf or a format node is about.
fn file_of(world: &World, node: NodeId) -> Option<std::rc::Rc<str>> {
    world
        .graph
        .node(node)
        .filename
        .clone()
        .or_else(|| world.image_file(node))
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
        self.flushes.clear();
        self.lost.clear();
        self.torn = false;
        self.exports.clear();
        self.window = None;
        self.crossed.clear();
        self.outside.clear();
        self.copies = Copies::default();
    }

    /// Storage failed a request.
    pub(crate) fn fault(&mut self, fault: &Fault) {
        let image = fault.image as usize;
        if fault.kind == FaultKind::Flush && !self.lost.contains(&image) {
            self.lost.push(image);
        }
        if matches!(
            fault.kind,
            FaultKind::Write | FaultKind::WriteZeroes | FaultKind::Discard
        ) {
            self.torn = true;
            self.disks.iter_mut().flatten().for_each(|d| d.torn = true);
        }
    }

    /// Whether the content of an image can be judged.
    pub(crate) fn is_known(&self, disk: usize) -> bool {
        self.disks[disk].as_ref().is_some_and(|d| !d.unknown)
    }

    /// What each image shows at the start, grain by grain; none where nothing can be said.
    pub(crate) fn initially(&self) -> Vec<Option<Vec<Option<Value>>>> {
        let grain = |d: &Disk, g: usize| {
            let at = g as u64 * self.grain;
            let cut = d.cuts.iter().any(|c| (at..at + self.grain).contains(c));
            (!d.loose[g] && !cut).then_some(d.initial[g])
        };
        let known = |d: &Disk| (0..d.initial.len()).map(|g| grain(d, g)).collect();
        self.disks
            .iter()
            .map(|d| d.as_ref().filter(|d| !d.unknown).map(known))
            .collect()
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
            scenario
                .images
                .iter()
                .position(|i| *i.file == *file && i.format == format)
        };
        match facts.driver {
            Driver::CopyOnRead | Driver::Throttle | Driver::CopyBeforeWrite => {
                Self::disk_of(scenario, world, world.graph.filter_child(node)?)
            }
            Driver::Raw if facts.windowed => None,
            Driver::Raw => Self::disk_of(scenario, world, world.graph.primary_child(node)?),
            Driver::Qcow2 => leaf(Format::Qcow2),
            Driver::File | Driver::HostDevice => leaf(Format::Raw),
            Driver::NullCo | Driver::SnapshotAccess => None,
        }
    }

    /// Images below the one that `node` shows, nearest first; `None` where one of them cannot be judged.
    fn chain_of(scenario: &Scenario, world: &World, mut node: NodeId) -> Option<Vec<usize>> {
        let mut chain = Vec::new();
        loop {
            let facts = world.graph.node(node);
            node = match facts.driver {
                Driver::CopyOnRead | Driver::Throttle | Driver::CopyBeforeWrite => {
                    world.graph.filter_child(node)?
                }
                Driver::Raw => world.graph.primary_child(node)?,
                Driver::Qcow2 => match world.graph.cow_child(node) {
                    None => return Some(chain),
                    Some(below) => {
                        chain.push(Self::disk_of(scenario, world, below)?);
                        below
                    }
                },
                Driver::File | Driver::HostDevice | Driver::NullCo | Driver::SnapshotAccess => {
                    return Some(chain);
                }
            };
        }
    }

    /// The graph of the model changed: disks appear, chains change. Of a `command` that may be the purpose; otherwise
    /// chains get shorter, and nobody may notice. Disks whose content changed, lower ones first.
    pub(crate) fn sync(&mut self, scenario: &Scenario, world: &World, command: bool) -> Vec<usize> {
        let mut changed: Vec<usize> = Vec::new();
        for (id, node) in world.graph.nodes() {
            if !matches!(node.driver, Driver::Qcow2 | Driver::File | Driver::HostDevice) {
                continue;
            }
            let Some(disk) = Self::disk_of(scenario, world, id) else {
                continue;
            };
            let chain = Self::chain_of(scenario, world, id);
            let twice = node.driver == Driver::Qcow2
                && world.graph.nodes().any(|(other, n)| {
                    other > id
                        && n.driver == Driver::Qcow2
                        && Self::disk_of(scenario, world, other) == Some(disk)
                });
            let tails = self.tails(scenario, chain.iter().flatten());
            match (&mut self.disks[disk], chain) {
                (None, Some(chain)) => {
                    // Lower layers first: an overlay shows them. A layer opened inline is younger than its overlay.
                    for at in (0..chain.len())
                        .rev()
                        .filter(|at| self.disks[chain[*at]].is_none())
                        .collect::<Vec<_>>()
                    {
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
                (Some(d), Some(chain)) if d.chain != chain => {
                    if command {
                        changed.push(disk);
                        d.cuts.extend(tails);
                        d.moved = true;
                    } else {
                        // A stream leaves layers out; anything else shows another content.
                        let mut old = d.chain.iter();
                        d.unknown |= !chain.iter().all(|c| old.any(|o| o == c));
                        d.chains.push(d.chain.clone());
                    }
                    d.chain = chain;
                }
                (Some(_), Some(_)) => {}
                (Some(d), None) => d.unknown = true,
            }
            if let (true, Some(d)) = (twice, &mut self.disks[disk]) {
                d.unknown = true;
            }
        }
        for export in &world.exports {
            if let Some(disk) = Self::disk_of(scenario, world, world.graph.edge(export.root).child)
                && !self
                    .exports
                    .iter()
                    .any(|(name, d)| *name == *export.name && *d == disk)
            {
                self.exports.retain(|(name, _)| *name != *export.name);
                self.exports.push((export.name.to_string(), disk));
            }
        }
        let depth = |disk: &usize| self.disks[*disk].as_ref().map_or(0, |d| d.chain.len());
        changed.sort_by_key(depth);
        changed.dedup();
        changed
    }

    /// Where these disks end, or did, within a grain.
    fn tails<'a>(&self, scenario: &Scenario, disks: impl Iterator<Item = &'a usize>) -> Vec<u64> {
        let mut tails = Vec::new();
        for disk in disks {
            tails.push(scenario.images[*disk].size);
            tails.extend(self.disks[*disk].iter().flat_map(|d| &d.cuts));
        }
        tails.retain(|tail| tail % self.grain != 0);
        tails.sort_unstable();
        tails.dedup();
        tails
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
        let cuts = self.tails(scenario, chain.iter().chain([&disk]));
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
        let mut registers = Registers::new(initial.iter().copied());
        // What a lower layer holds by now, where that was changed since.
        for g in (0..grains).filter(|g| loose[*g]) {
            let now = below.map_or(Vec::new(), |b| b.registers.possible(g));
            if !now.is_empty() && now != [initial[g]] {
                registers.shift(g, &now, false);
            }
        }
        Disk {
            length,
            bytes: image.size,
            registers,
            initial,
            cuts,
            chain,
            chains: Vec::new(),
            loose,
            own,
            cut_off: (usize::MAX, 0),
            log: Vec::new(),
            former: Vec::new(),
            flushed: 0,
            unknown,
            moved: false,
            kept: vec![false; grains],
            target: false,
            torn: self.torn,
            discarded: Vec::new(),
        }
    }

    /// A guest request is issued.
    pub(crate) fn issued(
        &mut self,
        view: &View<'_>,
        (follower, bottom): (&Follower, &Bottom),
        step: StepId,
        export: &str,
        request: &GuestOp,
    ) {
        let node = follower.export_node(export);
        if node.is_some_and(|node| self.looks(&follower.world, node, step, request)) {
            return;
        }
        let disk = match node {
            Some(node) => {
                let disk = Self::disk_of(view.scenario, &follower.world, node);
                if disk.is_none() {
                    self.written_below(view.scenario, &follower.world, node, request);
                }
                disk
            }
            None => self
                .exports
                .iter()
                .rev()
                .find(|(name, _)| name == export)
                .map(|(_, d)| *d),
        };
        let (effect, value, what, range) = match *request {
            GuestOp::Read(range) | GuestOp::BlockStatus(range) => (Effect::Read, 0, "read", range),
            GuestOp::Write(range) | GuestOp::WriteFua(range) => {
                let value = value_of(Source::Step(step));
                (Effect::Write(value), value, "write", range)
            }
            GuestOp::WriteZeroes(range) | GuestOp::WriteZeroesUnmap(range) => {
                (Effect::Write(0), 0, "write-zeroes", range)
            }
            GuestOp::Discard(range) => (Effect::Discard, 0, "discard", range),
            GuestOp::Flush => {
                self.flushes.extend(disk.map(|disk| (step, disk, view.now)));
                return;
            }
        };
        if let Some(node) = node.filter(|_| effect != Effect::Read) {
            self.written_beside(&follower.world, node, disk);
        }
        // What an export does not let through has no effect.
        if effect != Effect::Read && node.is_some() && !follower.export_writable(export) {
            return;
        }
        let Some(disk) = disk else { return };
        let Some(d) = self.disks[disk].as_mut().filter(|d| !d.unknown) else {
            return;
        };
        let Range { offset, length } = range;
        if offset.checked_add(length).is_none_or(|end| end > d.length) {
            self.outside.push(step);
            return;
        }
        let (first, last) = (
            index(offset / self.grain),
            index((offset + length).div_ceil(self.grain)),
        );
        if effect != Effect::Read {
            self.copies.meet_write(disk, d, first..last);
        }
        let op = d.registers.begin(effect, first..last);
        let start = view.now;
        let logged = (effect != Effect::Read).then(|| {
            d.log.push(Logged {
                step,
                start,
                end: u64::MAX,
                first,
                last,
                value,
                what,
                fua: matches!(request, GuestOp::WriteFua(_)),
                crossed: false,
            });
            d.log.len() - 1
        });
        let i = step.0 as usize;
        if self.open.len() <= i {
            self.open.resize(i + 1, None);
        }
        self.open[i] = Some(Open {
            disk,
            op,
            logged,
            first,
            last,
            start,
            effect,
            other: None,
            blind: false,
            status: matches!(request, GuestOp::BlockStatus(_)).then(|| {
                (
                    length,
                    node.is_some_and(|node| walks_to_the_end(&follower.world, node)),
                )
            }),
        });
        if logged.is_some() {
            self.loosen(disk, first, last);
        }
        if let Some(before) = self.shown_before(export, disk) {
            self.issued_in_window(step, before, bottom, view.now);
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
            for d in self
                .disks
                .iter_mut()
                .enumerate()
                .filter_map(|(j, d)| d.as_mut().map(|d| (j, d)))
            {
                d.1.unknown |= touched && (d.0 == i || d.1.chain.contains(&i));
            }
        }
    }

    /// Overlays of `disk` may show what is written to it now.
    fn loosen(&mut self, disk: usize, first: usize, last: usize) {
        for d in self
            .disks
            .iter_mut()
            .flatten()
            .filter(|d| d.chain.contains(&disk))
        {
            for g in first..last.min(d.own.len()) {
                d.loose[g] |= !d.own[g] && !d.kept[g];
            }
        }
    }
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

/// Whether a block-status walk from this node meets every layer.
fn walks_to_the_end(world: &World, node: NodeId) -> bool {
    let graph = &world.graph;
    match graph.node(node).driver {
        Driver::CopyOnRead | Driver::Throttle | Driver::CopyBeforeWrite => graph
            .filter_child(node)
            .is_some_and(|n| walks_to_the_end(world, n)),
        Driver::Raw => graph
            .primary_child(node)
            .is_some_and(|n| walks_to_the_end(world, n)),
        Driver::Qcow2 => graph.cow_child(node).is_none_or(|n| walks_to_the_end(world, n)),
        Driver::File | Driver::HostDevice => true,
        Driver::NullCo | Driver::SnapshotAccess => false,
    }
}

/// The guest request of a step.
pub(crate) fn guest(scenario: &Scenario, step: StepId) -> Option<(&str, &GuestOp)> {
    match &scenario.steps.get(step.0 as usize)?.action {
        Action::Guest { export, op } => Some((export, op)),
        _ => None,
    }
}

#[path = "data_backup.rs"]
mod backup;
#[path = "data_change.rs"]
mod change;
#[path = "data_end.rs"]
mod end;
#[path = "data_grains.rs"]
mod grains;
#[path = "data_final.rs"]
mod last;
#[path = "data_lost.rs"]
mod lost;
#[cfg(test)]
#[path = "data_tests.rs"]
mod tests;
