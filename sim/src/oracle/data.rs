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
//! A grain of more than 512 bytes may be torn: each of its sectors is a register.
//! An image whose flush failed, or that could not be written when it was closed, may have lost what was not flushed before,
//! and only that: a grain then holds what it held at the last flush that succeeded, or what was written since; a FUA write
//! that ended well is never lost.
//! What a power cut leaves is judged alike.
//! Unchecked: windows (`raw` with offset or size), `null-co`, the plain bytes of a qcow2 file, disks whose image is open
//! twice or was written below its format (contents then have no meaning).

use blkcheck_model::register::{self, Effect, OpId, Value};
use blkcheck_model::{Driver, NodeId, World};

use super::bottom::Bottom;
use super::{FinalContent, OracleName, View, Violation, status, violation};
use crate::follow::Follower;
use crate::history::{Fault, FaultKind, StepId};
use crate::scenario::{Action, Format, GuestOp, Range, Scenario};
use crate::stamp::{Content, Source};

pub(crate) use backup::Copied;
use backup::Copies;
use change::{Other, Window};
pub(crate) use disks::allocation;
use disks::file_of;
use fill::{Closing, Fill};
pub(crate) use lost::LEFT_OUT;
use sectors::Sectors;

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
    registers: Sectors,
    initial: Vec<Value>,
    /// Byte positions inside a grain where content may end: of this image and of those below.
    cuts: Vec<u64>,
    /// Images below, nearest first.
    chain: Vec<usize>,
    /// Chains that it had before streams took layers out, the longest first; none from before a command put it on something else.
    chains: Vec<Vec<usize>>,
    /// Per grain: not decided by this image from the start, and a guest wrote to a lower layer there.
    loose: Vec<bool>,
    /// Per grain: decided by this image from the start.
    own: Vec<bool>,
    /// The first grain that a change of its length cut off or added, and when that was last; `usize::MAX` when there was none.
    cut_off: (usize, u64),
    /// The first grain that a command added, and when; it shows zeroes, whatever is below, from the moment at which the image is that long.
    grown: Option<(usize, u64)>,
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
    /// Per grain: a backup that ended well has put something there.
    filled: Vec<bool>,
    /// By whom it is filled, and was.
    fills: Vec<Fill>,
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
    /// How often storage failed.
    faults: u64,
    /// Commands under way that close images.
    closing: Vec<Closing>,
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
    /// Steps under way that change lengths.
    resizing: Vec<StepId>,
}

/// A part of a grain, by its place among all parts of the disk, that nothing explains: what the register says of its grain, or content that
/// is none.
type Unexplained = (usize, Result<register::Violation, Content>);

fn index(v: u64) -> usize {
    usize::try_from(v).expect("small disks")
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
        self.faults = 0;
        self.closing.clear();
        self.exports.clear();
        self.window = None;
        self.crossed.clear();
        self.outside.clear();
        self.copies = Copies::default();
        self.resizing.clear();
    }

    /// Storage failed a request.
    pub(crate) fn fault(&mut self, fault: &Fault) {
        let image = fault.image as usize;
        self.faults += 1;
        // Nobody hears of what could not be flushed when an image is closed.
        let unflushed = fault.kind == FaultKind::Flush || !self.closing.is_empty();
        if unflushed && !self.lost.contains(&image) {
            self.lost.push(image);
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
                let disk = disk.filter(|_| Data::flush_arrives(follower, export));
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
                d.loose[g] |= !d.own[g] && !d.filled[g] && !d.kept[g];
            }
        }
    }
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
#[path = "data_disks.rs"]
mod disks;
#[path = "data_end.rs"]
mod end;
#[path = "data_fill.rs"]
mod fill;
#[path = "data_grains.rs"]
mod grains;
#[path = "data_final.rs"]
mod last;
#[path = "data_lost.rs"]
mod lost;
#[path = "data_sectors.rs"]
mod sectors;
#[cfg(test)]
#[path = "data_tests.rs"]
mod tests;
