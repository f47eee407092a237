//! What every image holds, followed step by step, to say what a read must see and which clusters a layer must have.
//!
//! Rules: one value per grain: 0 for zeroes, else who wrote it. One step runs at a time, so that a read has exactly one
//! right answer. What cannot be known from outside is [`UNKNOWN`] and never compared: a file opened twice, discards
//! where nodes pass them on, windows of raw nodes. A cluster that may have been copied by a stream that did not end
//! (`copied`) is not compared for allocation; both ways it reads the same until a layer below changes.
//! Not here: metadata of the images.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range as Span;
use std::rc::Rc;

use blkcheck_model::layer::{Cell, Layer};
use blkcheck_model::perm::Driver;
use blkcheck_model::{NodeId, Outcome, World};
use serde_json::{Map, Value};

use crate::history::StepId;
use crate::image::read::{Mapping, Qcow2};
use crate::qemu::nbd::client::{Answer, Ask};
use crate::scenario::{Format, GuestOp, Image, Range, Scenario, Stored};
use crate::stamp::{self, Source};

/// Nodes longer than this are not read, bytes.
pub(super) const LONGEST: u64 = 16 << 20;
/// A value that nobody can know.
const UNKNOWN: u64 = u64::MAX;

/// One image.
#[derive(Clone, Debug)]
struct File {
    layer: Layer,
    /// Grains of unallocated clusters that may have been copied here, with this value.
    copied: Vec<Option<u64>>,
    /// More than one node has it open, or had.
    lost: bool,
}

/// All images.
#[derive(Clone, Debug, Default)]
pub(super) struct Books {
    grain: u64,
    files: BTreeMap<String, File>,
    /// Nodes of null-co that read as zeroes.
    zeroes: BTreeSet<String>,
    /// The daemon copied what only layers below `bottom` hold, or may have (a known defect).
    copied_below_bottom: bool,
}

/// What differs: as the model has it, as the daemon has it.
type Wrong = (String, String);

impl Books {
    pub(super) fn of(scenario: &Scenario) -> Books {
        let grain = u64::from(scenario.grain);
        let files = (0..).zip(&scenario.images);
        let files = files.map(|(at, image)| (image.file.clone(), laid_out(image, at, grain)));
        Books {
            grain,
            files: files.collect(),
            zeroes: BTreeSet::new(),
            copied_below_bottom: false,
        }
    }

    /// A guest's request as the daemon gets it.
    pub(super) fn ask(scenario: &Scenario, op: GuestOp, step: usize) -> Ask {
        let write = |range: Range, fua| {
            let mut data = vec![0; usize::try_from(range.length).expect("validated")];
            stamp::fill(&mut data, range.offset, scenario.grain, source(step));
            Ask::Write(range.offset, data, fua)
        };
        match op {
            GuestOp::Read(r) => Ask::Read(r.offset, r.length),
            GuestOp::Write(r) => write(r, false),
            GuestOp::WriteFua(r) => write(r, true),
            GuestOp::WriteZeroes(r) => Ask::WriteZeroes(r.offset, r.length, false),
            GuestOp::WriteZeroesUnmap(r) => Ask::WriteZeroes(r.offset, r.length, true),
            GuestOp::Discard(r) => Ask::Discard(r.offset, r.length),
            GuestOp::Flush => Ask::Flush,
            GuestOp::BlockStatus(r) => Ask::Status(r.offset, r.length),
        }
    }

    /// A command was accepted.
    pub(super) fn opened(&mut self, execute: &str, arguments: &Map<String, Value>) {
        if execute == "blockdev-add" {
            self.opened_node(arguments);
        }
    }

    fn opened_node(&mut self, options: &Map<String, Value>) {
        let text = |key: &str| options.get(key).and_then(Value::as_str);
        if let (Some("null-co"), Some(name)) = (text("driver"), text("node-name"))
            && options.get("read-zeroes") == Some(&Value::Bool(true))
        {
            self.zeroes.insert(name.to_owned());
        }
        options
            .values()
            .filter_map(Value::as_object)
            .for_each(|inner| self.opened_node(inner));
    }

    /// Images have got another length, if any have.
    pub(super) fn resized(&mut self, before: &World, after: &World) {
        for (id, node) in after.graph.nodes() {
            let Some(old) = before
                .graph
                .nodes()
                .find(|(was, _)| *was == id)
                .map(|(_, n)| n.length)
            else {
                continue;
            };
            if node.driver == Driver::Qcow2 && node.length != old {
                self.resized_node(before, id, node.length);
            }
        }
    }

    /// What is new reads as zeroes; a backing file that is longer must not show there.
    fn resized_node(&mut self, before: &World, id: NodeId, length: u64) {
        let old = before.graph.node(id).length;
        let covered = before
            .graph
            .cow_child(id)
            .is_some_and(|below| before.graph.node(below).length > old);
        let Some(name) = before.image_file(id) else { return };
        let at = |bytes: u64| usize::try_from(bytes / self.grain).unwrap_or(usize::MAX);
        let (from, to) = (at(old), at(length));
        let cluster = self.files.get(&*name).map_or(1, |file| file.layer.cluster);
        let split = from < to && !from.is_multiple_of(cluster);
        if covered && split {
            self.populate(before, id, from - 1..from);
        }
        let Some(file) = self.files.get_mut(&*name) else {
            return;
        };
        let in_half = split && file.layer.is_allocated(from - 1);
        let cells = &mut file.layer.cells;
        cells.resize(to, if covered { Cell::Zero } else { Cell::Unallocated });
        file.copied.resize(to, None);
        if in_half {
            let end = from.next_multiple_of(cluster).min(to);
            cells[from..end].fill(Cell::Stamp(0));
        }
    }

    /// Images whose nodes stand on other storage than before are given up, and so is that storage: what a qcow2 node knows of
    /// its tables is from the old one, and goes into the new one.
    pub(super) fn moved(&mut self, before: &World, after: &World) {
        let mut given_up = BTreeSet::new();
        for (id, node) in after.graph.nodes() {
            let was_open = before.graph.nodes().any(|(was, _)| was == id);
            if node.driver != Driver::Qcow2 || !was_open {
                continue;
            }
            let (old, new) = (storage(before, id), storage(after, id));
            if old != new {
                given_up.extend(old);
                given_up.extend(new);
            }
        }
        for name in given_up {
            if let Some(file) = self.files.get_mut(&*name) {
                file.lost = true;
            }
        }
    }

    /// Files that two nodes have open are given up.
    pub(super) fn check_sharing(&mut self, world: &World) {
        let mut open = BTreeSet::new();
        for (_, node) in world.graph.nodes() {
            if let Some(name) = &node.filename
                && !open.insert(name.clone())
                && let Some(file) = self.files.get_mut(&**name)
            {
                file.lost = true;
            }
        }
    }

    /// Somebody could read it through an export, and we would know what to expect of some of it.
    pub(super) fn readable(&self, world: &World, node: NodeId) -> bool {
        let facts = world.graph.node(node);
        facts.length <= LONGEST && facts.driver != Driver::NullCo && self.view(world, node).is_some()
    }

    /// What reading the node gives, grain by grain; none when nothing is known.
    fn view(&self, world: &World, node: NodeId) -> Option<Vec<u64>> {
        let facts = world.graph.node(node);
        if facts.length > LONGEST {
            return None;
        }
        let grains = usize::try_from(facts.length.div_ceil(self.grain)).ok()?;
        match facts.driver {
            Driver::File | Driver::HostDevice => {
                let name = facts.filename.as_ref()?;
                // The bytes of a qcow2 file are not ours to know.
                if world.files.get(name)?.qcow2.is_some() {
                    return None;
                }
                self.cells(name, grains, &[])
            }
            Driver::NullCo => self.zeroes.contains(&*facts.name).then(|| vec![0; grains]),
            Driver::Raw if facts.windowed => None,
            Driver::Raw | Driver::CopyOnRead => {
                let mut view = self.view(world, world.graph.primary_child(node)?)?;
                view.resize(grains, 0);
                Some(view)
            }
            Driver::Qcow2 => {
                let below = match world.graph.cow_child(node) {
                    None => Vec::new(),
                    Some(below) => self.view(world, below).unwrap_or_else(|| vec![UNKNOWN; grains]),
                };
                self.cells(&world.image_file(node)?, grains, &below)
            }
        }
    }

    fn cells(&self, file: &str, grains: usize, below: &[u64]) -> Option<Vec<u64>> {
        let file = self.files.get(file)?;
        let grain = |at: usize| match file.layer.cells.get(at) {
            _ if file.lost => UNKNOWN,
            None => 0,
            Some(Cell::Unallocated) => {
                let below = below.get(at).copied().unwrap_or(0);
                match file.copied[at] {
                    Some(copied) if copied != below => UNKNOWN,
                    _ => below,
                }
            }
            Some(cell) => cell.value().expect("allocated"),
        };
        Some((0..grains).map(grain).collect())
    }

    /// The qcow2 node that writes to this node reach, if there is one.
    fn top(world: &World, node: NodeId) -> Option<NodeId> {
        let facts = world.graph.node(node);
        match facts.driver {
            Driver::Qcow2 => Some(node),
            Driver::CopyOnRead => Books::top(world, world.graph.filter_child(node)?),
            Driver::Raw if !facts.windowed => Books::top(world, world.graph.primary_child(node)?),
            _ => None,
        }
    }

    /// A discard gets to a node that stores something.
    fn discards(world: &World, node: NodeId) -> bool {
        let facts = world.graph.node(node);
        let ends = matches!(facts.driver, Driver::Qcow2) || facts.driver.is_protocol();
        let below = || world.graph.primary_child(node);
        facts.unmap && (ends || below().is_some_and(|below| Books::discards(world, below)))
    }

    /// A guest's request ended this way. `shown`: how long the guest takes the node to be.
    pub(super) fn guest(
        &mut self,
        world: &World,
        node: NodeId,
        (writable, shown): (bool, Option<u64>),
        op: GuestOp,
        step: usize,
        answer: &Answer,
    ) -> Result<(), Wrong> {
        let length = shown.unwrap_or(u64::MAX).min(world.graph.node(node).length);
        let error = match answer {
            Answer::Read(Err(e)) | Answer::Done(Err(e)) | Answer::Status(Err(e)) => Some(*e),
            _ => None,
        };
        let range = match op {
            GuestOp::Read(r)
            | GuestOp::Write(r)
            | GuestOp::WriteFua(r)
            | GuestOp::WriteZeroes(r)
            | GuestOp::WriteZeroesUnmap(r)
            | GuestOp::Discard(r)
            | GuestOp::BlockStatus(r) => r,
            GuestOp::Flush => Range { offset: 0, length: 0 },
        };
        let writes = !matches!(op, GuestOp::Read(_) | GuestOp::BlockStatus(_) | GuestOp::Flush);
        let outside = range
            .offset
            .checked_add(range.length)
            .is_none_or(|end| end > length);
        let refused = range.length > 0 && (outside || (writes && !writable));
        match (refused, error) {
            (true, Some(_)) => return Ok(()),
            (true, None) => return Err(("an error".to_owned(), format!("{op:?} succeeds"))),
            (false, Some(e)) => return Err(("success".to_owned(), format!("{op:?} fails with errno {e}"))),
            (false, None) => {}
        }
        let grains = self.grains(range);
        match op {
            GuestOp::Read(_) => {
                if let Answer::Read(Ok(bytes)) = answer {
                    self.compare(world, node, range, bytes)?;
                }
                self.guest_read(world, node, grains);
            }
            GuestOp::Write(_) | GuestOp::WriteFua(_) => {
                self.write(world, node, grains, Cell::Stamp(code(source(step))));
            }
            GuestOp::WriteZeroes(_) | GuestOp::WriteZeroesUnmap(_) => {
                self.write(world, node, grains.clone(), Cell::Zero);
                self.zeroed_old(world, node, grains);
            }
            GuestOp::Discard(_) if Books::discards(world, node) => {
                self.write(world, node, grains, Cell::Stamp(UNKNOWN));
            }
            GuestOp::Discard(_) | GuestOp::Flush => {}
            GuestOp::BlockStatus(_) => {
                if let Answer::Status(Ok(extents)) = answer {
                    self.status(world, node, range, extents)?;
                }
            }
        }
        Ok(())
    }

    fn grains(&self, range: Range) -> Span<usize> {
        let at = |byte: u64| usize::try_from(byte).expect("a short image");
        at(range.offset / self.grain)..at((range.offset + range.length).div_ceil(self.grain))
    }

    fn compare(&self, world: &World, node: NodeId, range: Range, bytes: &[u8]) -> Result<(), Wrong> {
        let Some(view) = self.view(world, node) else {
            return Ok(());
        };
        let first = usize::try_from(range.offset / self.grain).expect("a short image");
        for (at, grain) in bytes
            .chunks(usize::try_from(self.grain).expect("small"))
            .enumerate()
        {
            let offset = range.offset + at as u64 * self.grain;
            let expected = view.get(first + at).copied().unwrap_or(0);
            let got = stamp::read(grain, offset);
            let agrees = match got {
                _ if expected == UNKNOWN => true,
                stamp::Content::Zero => expected == 0,
                stamp::Content::Stamp(source) => expected == code(source),
                stamp::Content::Misplaced(..) | stamp::Content::Torn => false,
            };
            if !agrees {
                return Err((
                    format!(
                        "at {offset:#x} of node '{}': {}",
                        world.graph.name(node),
                        said(expected)
                    ),
                    format!("{got:?}"),
                ));
            }
        }
        Ok(())
    }

    fn status(
        &self,
        world: &World,
        node: NodeId,
        range: Range,
        extents: &[crate::qemu::nbd::client::Extent],
    ) -> Result<(), Wrong> {
        let Some(view) = self.view(world, node) else {
            return Ok(());
        };
        let mut offset = range.offset;
        for extent in extents {
            let grains = self.grains(Range {
                offset,
                length: extent.bytes,
            });
            let wrong = view
                .get(grains)
                .and_then(|values| values.iter().find(|v| extent.zero && **v != 0 && **v != UNKNOWN));
            if let Some(value) = wrong {
                let ours = format!("{} within {:#x} bytes at {offset:#x}", said(*value), extent.bytes);
                return Err((ours, "block status says zeroes".to_owned()));
            }
            offset += extent.bytes;
        }
        Ok(())
    }

    /// The first sector was read, to learn the length.
    pub(super) fn probed(&mut self, world: &World, node: NodeId, grain: u32) {
        let last = usize::try_from(512u32.div_ceil(grain)).expect("few");
        self.guest_read(world, node, 0..last);
    }

    /// A guest read these. The server asks for block status first and does not read what it says is zero, so that
    /// filters see less than was asked for.
    fn guest_read(&mut self, world: &World, node: NodeId, grains: Span<usize>) {
        for grain in grains {
            if !self.is_hole(world, node, grain) {
                self.was_read(world, node, grain..grain + 1);
            }
        }
    }

    /// Block status says that the grain reads as zeroes.
    fn is_hole(&self, world: &World, node: NodeId, grain: usize) -> bool {
        let facts = world.graph.node(node);
        let below = || world.graph.chain_child(node);
        match facts.driver {
            _ if grain as u64 * self.grain >= facts.length => true,
            Driver::CopyOnRead => below().is_some_and(|child| self.is_hole(world, child, grain)),
            // It is asked what its file alone says.
            Driver::Raw if !facts.windowed => world
                .graph
                .primary_child(node)
                .is_some_and(|child| self.is_hole_alone(world, child, grain)),
            Driver::Qcow2 => {
                self.is_hole_alone(world, node, grain)
                    || (self.is_open(world, node, grain)
                        && below().is_some_and(|child| self.is_hole(world, child, grain)))
            }
            _ => false,
        }
    }

    /// The same, of the node alone, as seen through a node that is no filter.
    fn is_hole_alone(&self, world: &World, node: NodeId, grain: usize) -> bool {
        let facts = world.graph.node(node);
        match facts.driver {
            Driver::Qcow2 if self.is_open(world, node, grain) => world
                .graph
                .cow_child(node)
                .is_none_or(|below| grain as u64 * self.grain >= world.graph.node(below).length),
            Driver::Qcow2 => {
                let file = world.image_file(node).and_then(|f| self.files.get(&*f));
                file.and_then(|f| f.layer.cells.get(grain)) == Some(&Cell::Zero)
            }
            Driver::CopyOnRead | Driver::Raw if !facts.windowed => world
                .graph
                .primary_child(node)
                .is_some_and(|child| self.is_hole_alone(world, child, grain)),
            _ => false,
        }
    }

    /// The image of this qcow2 node leaves the grain to the layer below.
    fn is_open(&self, world: &World, node: NodeId, grain: usize) -> bool {
        let file = world.image_file(node).and_then(|f| self.files.get(&*f));
        file.and_then(|f| f.layer.cells.get(grain)) == Some(&Cell::Unallocated)
    }

    fn write(&mut self, world: &World, node: NodeId, grains: Span<usize>, cell: Cell) {
        if let Some(top) = Books::top(world, node) {
            self.populate(world, top, grains.clone());
            // A part of a file is no image of ours.
            if let Some(file) = world.image_file(top) {
                self.set(&file, grains, cell);
            }
            return;
        }
        let (mut at, mut windowed) = (node, false);
        while let Some(below) = world.graph.primary_child(at) {
            windowed |= world.graph.node(at).windowed;
            at = below;
        }
        let Some(name) = world.graph.node(at).filename.clone() else {
            return;
        };
        if let Some(file) = self.files.get_mut(&*name)
            && (windowed || file.layer.format != blkcheck_model::layer::Format::Raw)
        {
            // At another place, or metadata.
            file.lost = true;
            return;
        }
        self.set(&name, grains, cell);
    }

    /// Version 2 has no zero clusters: without a backing file a cluster of zeroes may as well be none.
    fn zeroed_old(&mut self, world: &World, node: NodeId, grains: Span<usize>) {
        let Some(top) = Books::top(world, node).filter(|top| world.graph.cow_child(*top).is_none()) else {
            return;
        };
        let Some(name) = world.image_file(top) else { return };
        let Some(file) = self.files.get_mut(&*name) else {
            return;
        };
        if file.layer.format != blkcheck_model::layer::Format::Qcow2(2) {
            return;
        }
        for at in grains {
            if at < file.layer.cells.len() {
                let cluster = file.layer.cluster_of(at);
                if file.layer.cells[cluster.clone()]
                    .iter()
                    .all(|c| c.value() == Some(0))
                {
                    file.layer.cells[cluster.clone()].fill(Cell::Unallocated);
                    file.copied[cluster].fill(Some(0));
                }
            }
        }
    }

    fn set(&mut self, file: &str, grains: Span<usize>, cell: Cell) {
        if let Some(file) = self.files.get_mut(file) {
            let end = grains.end.min(file.layer.cells.len());
            let start = grains.start.min(end);
            file.layer.cells[start..end].fill(cell);
            file.copied[start..end].fill(None);
        }
    }

    /// The clusters of these grains become allocated in the file of this qcow2 node and keep what they show.
    fn populate(&mut self, world: &World, top: NodeId, grains: Span<usize>) {
        let (Some(view), Some(name)) = (self.view(world, top), world.image_file(top)) else {
            return;
        };
        self.reads_the_rest(world, top, &name, grains.clone());
        let Some(file) = self.files.get_mut(&*name) else {
            return;
        };
        let layer = &mut file.layer;
        let end = grains.end.min(layer.cells.len());
        for at in grains.start..end {
            for grain in layer.cluster_of(at) {
                if layer.cells[grain] == Cell::Unallocated {
                    layer.cells[grain] = Cell::Stamp(view.get(grain).copied().unwrap_or(0));
                    file.copied[grain] = None;
                }
            }
        }
    }

    /// What a cluster needs besides these grains is read from below, through whatever filter is there. The grains
    /// themselves are read along with it, or not.
    fn reads_the_rest(&mut self, world: &World, top: NodeId, file: &str, grains: Span<usize>) {
        let Some(below) = world.graph.cow_child(top) else {
            return;
        };
        let Some(filtered) = world.graph.filter_child(below) else {
            return;
        };
        let Some(file) = self.files.get(file) else { return };
        let layer = &file.layer;
        let covered = grains.start..grains.end.min(layer.cells.len());
        if covered.is_empty() {
            return;
        }
        let all = layer.cluster_of(covered.start).start..layer.cluster_of(covered.end - 1).end;
        let open: Vec<usize> = all.filter(|at| layer.cells[*at] == Cell::Unallocated).collect();
        for at in open {
            if covered.contains(&at) {
                self.may_be_copied(world, filtered, at..at + 1);
            } else {
                self.was_read(world, below, at..at + 1);
            }
        }
    }

    /// Copy-on-read filters copy what is read through them.
    fn was_read(&mut self, world: &World, node: NodeId, grains: Span<usize>) {
        let facts = world.graph.node(node);
        match facts.driver {
            Driver::CopyOnRead => {
                let Some(child) = world.graph.filter_child(node) else {
                    return;
                };
                if world.graph.node(child).driver == Driver::Qcow2 {
                    match facts.bottom {
                        None => self.populate(world, child, grains),
                        Some(bottom) => {
                            for grain in self.in_range(world, child, bottom, grains.clone()) {
                                self.populate(world, child, grain..grain + 1);
                            }
                            for grain in grains.clone() {
                                if self.is_cut_off(world, child, bottom, grain) {
                                    self.may_be_copied(world, child, grain..grain + 1);
                                }
                            }
                            if bottom == child {
                                self.below_bottom(world, child, grains);
                            }
                        }
                    }
                } else {
                    self.may_be_copied(world, child, grains.clone());
                    self.was_read(world, child, grains);
                }
            }
            Driver::Raw if !facts.windowed => {
                if let Some(child) = world.graph.primary_child(node) {
                    self.was_read(world, child, grains);
                }
            }
            Driver::Qcow2 => {
                if let Some(below) = world.graph.cow_child(node) {
                    let name = world.image_file(node).unwrap_or_else(|| "".into());
                    // What is read from below goes through filters there.
                    let open: Vec<usize> = self.files.get(&*name).map_or_else(Vec::new, |file| {
                        let cells = &file.layer.cells;
                        grains
                            .filter(|g| cells.get(*g) == Some(&Cell::Unallocated))
                            .collect()
                    });
                    for grain in open {
                        self.was_read(world, below, grain..grain + 1);
                    }
                }
            }
            _ => {}
        }
    }

    /// Where `bottom` is the node that is filtered, the daemon looks for data from the layer below it on.
    fn below_bottom(&mut self, world: &World, child: NodeId, grains: Span<usize>) {
        let Some(name) = world.image_file(child) else {
            return;
        };
        for grain in grains {
            let open = |file: &File| file.layer.cells.get(grain) == Some(&Cell::Unallocated);
            if self.files.get(&*name).is_some_and(open) && world.graph.chain_child(child).is_some() {
                self.copied_below_bottom = true;
                self.may_be_copied(world, child, grain..grain + 1);
            }
        }
    }

    /// Whether the daemon may have copied more than it should; told once.
    pub(super) fn take_copied_below_bottom(&mut self) -> bool {
        std::mem::take(&mut self.copied_below_bottom)
    }

    fn may_be_copied(&mut self, world: &World, node: NodeId, grains: Span<usize>) {
        let Some(top) = Books::top(world, node) else {
            return;
        };
        let (Some(view), Some(name)) = (self.view(world, top), world.image_file(top)) else {
            return;
        };
        let Some(file) = self.files.get_mut(&*name) else {
            return;
        };
        for at in grains {
            if at < file.layer.cells.len() {
                for grain in file.layer.cluster_of(at) {
                    if file.layer.cells[grain] == Cell::Unallocated {
                        file.copied[grain].get_or_insert(view.get(grain).copied().unwrap_or(0));
                    }
                }
            }
        }
    }

    /// The grains that the top leaves open and a layer below it, down to `bottom`, holds.
    fn in_range(&self, world: &World, top: NodeId, bottom: NodeId, grains: Span<usize>) -> Vec<usize> {
        let mut layers = Vec::new();
        let mut node = Some(top);
        while let Some(at) = node {
            if !world.graph.node(at).driver.is_filter() {
                layers.push(world.image_file(at).and_then(|f| self.files.get(&*f)));
            }
            node = if at == bottom {
                None
            } else {
                world.graph.chain_child(at)
            };
        }
        let held = |grain: &usize| {
            let open = |file: &Option<&File>| {
                file.and_then(|f| f.layer.cells.get(*grain)) == Some(&Cell::Unallocated)
            };
            if !layers.first().is_some_and(open) {
                return false;
            }
            // A layer that nobody can look into (raw) holds everything; one that is too short nothing.
            for file in &layers[1..] {
                match file {
                    None => return true,
                    Some(file) => match file.layer.cells.get(*grain) {
                        None => return false,
                        Some(Cell::Unallocated) => {}
                        Some(_) => return true,
                    },
                }
            }
            false
        };
        grains.filter(held).collect()
    }

    /// A job is about to complete in the world.
    pub(super) fn completed(&mut self, world: &World, id: &str, outcome: Outcome) {
        let Some(job) = world.job(id) else { return };
        let device = world.graph.skip_filters(job.stream.device);
        let bottom = job.stream.base_overlay;
        let Some(grains) = world
            .image_file(device)
            .and_then(|f| Some(self.files.get(&*f)?.layer.len()))
        else {
            return;
        };
        let wanted = self.in_range(world, device, bottom, 0..grains);
        for grain in wanted {
            if outcome == Outcome::Success {
                self.populate(world, device, grain..grain + 1);
            } else {
                self.may_be_copied(world, device, grain..grain + 1);
            }
        }
        if outcome == Outcome::Success {
            self.fill_cut_off(world, device, bottom, grains);
            return;
        }
        // Zeroes behind the end of a short layer may have been copied as well.
        for grain in 0..grains {
            if self.is_cut_off(world, device, bottom, grain) {
                self.may_be_copied(world, device, grain..grain + 1);
            }
        }
    }

    /// Where a dropped layer was too short, zeroes must stay zeroes; with no base there is nothing to show through.
    fn fill_cut_off(&mut self, world: &World, device: NodeId, bottom: NodeId, grains: usize) {
        let Some(view) = self.view(world, device) else {
            return;
        };
        let base = world
            .graph
            .chain_child(bottom)
            .and_then(|base| self.view(world, base));
        let Some(name) = world.image_file(device) else {
            return;
        };
        let Some(file) = self.files.get(&*name) else {
            return;
        };
        let open: Vec<usize> = (0..grains)
            .filter(|g| file.layer.cells[*g] == Cell::Unallocated)
            .collect();
        for grain in open {
            let shows = base.as_ref().and_then(|b| b.get(grain)).copied().unwrap_or(0);
            if view.get(grain).copied().unwrap_or(0) != shows {
                self.populate(world, device, grain..grain + 1);
            } else if self.is_cut_off(world, device, bottom, grain) {
                // Copied or not, it reads the same.
                self.may_be_copied(world, device, grain..grain + 1);
            }
        }
    }

    /// Some layer below the top, down to `bottom`, is too short for the grain.
    fn is_cut_off(&self, world: &World, top: NodeId, bottom: NodeId, grain: usize) -> bool {
        let below = world.graph.chain(top).skip(1);
        let mut past = top == bottom;
        for node in below {
            if past {
                return false;
            }
            if grain as u64 * self.grain >= world.graph.node(node).length {
                return true;
            }
            past = node == bottom;
        }
        false
    }

    /// Every job that did not end may have copied something.
    pub(super) fn jobs_given_up(&mut self, world: &World) {
        for job in world.jobs.iter().filter(|j| j.outcome.is_none()) {
            self.completed(world, &job.id, Outcome::Cancelled);
        }
    }

    /// Every closed image against the books.
    pub(super) fn stored<'a>(
        &self,
        scenario: &Scenario,
        disks: impl Iterator<Item = (&'a str, &'a [u8])>,
    ) -> Result<(), Wrong> {
        for (name, bytes) in disks {
            let (Some(file), Some(image)) = (
                self.files.get(name),
                scenario.images.iter().find(|i| i.file == name),
            ) else {
                continue;
            };
            if !file.lost && image.format == Format::Qcow2 {
                self.stored_qcow2(name, file, bytes)?;
            }
        }
        Ok(())
    }

    fn stored_qcow2(&self, name: &str, file: &File, bytes: &[u8]) -> Result<(), Wrong> {
        let unreadable = |e: String| (format!("{name} is an image"), e);
        let image = Qcow2::parse(bytes).map_err(unreadable)?;
        let per_cluster = file.layer.cluster;
        for (cluster, first) in (0u64..).zip((0..file.layer.len()).step_by(per_cluster)) {
            let mapping = image.mapping(cluster).map_err(unreadable)?;
            let cells = &file.layer.cells[file.layer.cluster_of(first)];
            let doubtful = file.copied[file.layer.cluster_of(first)]
                .iter()
                .any(Option::is_some)
                || cells.contains(&Cell::Stamp(UNKNOWN));
            let ours = cells.iter().any(|c| *c != Cell::Unallocated);
            let theirs = mapping != Mapping::Unallocated;
            if ours != theirs && !doubtful {
                let say = |allocated| if allocated { "allocated" } else { "not allocated" };
                return Err((
                    format!("cluster {cluster} of {name} is {}", say(ours)),
                    say(theirs).to_owned(),
                ));
            }
            if let Mapping::Data(host) = mapping
                && !doubtful
            {
                self.stored_cluster(
                    name,
                    first,
                    cells,
                    bytes.get(usize::try_from(host).unwrap_or(usize::MAX)..),
                )?;
            }
        }
        Ok(())
    }

    fn stored_cluster(
        &self,
        name: &str,
        first: usize,
        cells: &[Cell],
        bytes: Option<&[u8]>,
    ) -> Result<(), Wrong> {
        let start = first as u64 * self.grain;
        let bytes = bytes.unwrap_or_default();
        let chunks = bytes.chunks_exact(usize::try_from(self.grain).expect("small"));
        for (at, (cell, grain)) in (0u64..).zip(cells.iter().zip(chunks)) {
            let expected = cell.value().unwrap_or(UNKNOWN);
            let offset = start + at * self.grain;
            let got = stamp::read(grain, offset);
            let agrees = match got {
                _ if expected == UNKNOWN => true,
                stamp::Content::Zero => expected == 0,
                stamp::Content::Stamp(source) => expected == code(source),
                stamp::Content::Misplaced(..) | stamp::Content::Torn => false,
            };
            if !agrees {
                return Err((
                    format!("{name} stores {} at {offset:#x}", said(expected)),
                    format!("{got:?}"),
                ));
            }
        }
        Ok(())
    }
}

fn laid_out(image: &Image, index: u16, grain: u64) -> File {
    use blkcheck_model::layer::Format as Kind;
    let grains = usize::try_from(image.size.div_ceil(grain)).expect("validated");
    let (format, cluster) = match image.format {
        Format::Raw => (Kind::Raw, 1),
        Format::Qcow2 => {
            let cluster = (u64::from(image.cluster_size) / grain).max(1);
            (
                Kind::Qcow2(u8::try_from(image.compat).unwrap_or(3)),
                usize::try_from(cluster).expect("small"),
            )
        }
    };
    let mut layer = Layer::new(format, cluster, grains);
    for (number, fill) in (0..).zip(&image.fill) {
        let at = |byte: u64| usize::try_from(byte / grain).expect("validated");
        let range = at(fill.offset)..at((fill.offset + fill.length).next_multiple_of(grain)).min(grains);
        for grain in range.clone() {
            for other in layer.cluster_of(grain) {
                if layer.cells[other] == Cell::Unallocated {
                    layer.cells[other] = Cell::Stamp(0);
                }
            }
        }
        let cell = match fill.stored {
            Stored::Data | Stored::Compressed => Cell::Stamp(code(Source::Fill {
                image: index,
                fill: number,
            })),
            Stored::Zero | Stored::ZeroAllocated => Cell::Zero,
        };
        layer.cells[range].fill(cell);
    }
    let grains = layer.len();
    File {
        layer,
        copied: vec![None; grains],
        lost: false,
    }
}

/// The files that a node stands on, from above; through formats as well.
fn storage(world: &World, id: NodeId) -> Vec<Rc<str>> {
    let mut names = Vec::new();
    let mut at = world.graph.primary_child(id);
    while let Some(node) = at {
        names.extend(world.graph.node(node).filename.clone());
        // An overlay that was put below leaves to its backing file what it does not hold.
        if let Some(backing) = world.graph.cow_child(node) {
            names.extend(storage_or_own(world, backing));
        }
        at = world.graph.primary_child(node);
    }
    names
}

fn storage_or_own(world: &World, id: NodeId) -> Vec<Rc<str>> {
    let mut names: Vec<Rc<str>> = world.graph.node(id).filename.iter().cloned().collect();
    names.extend(storage(world, id));
    names
}

fn source(step: usize) -> Source {
    Source::Step(StepId(u32::try_from(step).expect("few steps")))
}

/// One number per writer; never 0 and never [`UNKNOWN`].
fn code(source: Source) -> u64 {
    match source {
        Source::Fill { image, fill } => 1 << 40 | u64::from(image) << 16 | u64::from(fill),
        Source::Step(step) => 2 << 40 | u64::from(step.0),
    }
}

fn said(value: u64) -> String {
    match (value, value >> 40) {
        (0, _) => "zeroes".to_owned(),
        (_, 1) => format!("fill {} of image {}", value & 0xffff, value >> 16 & 0xffff),
        _ => format!("the write of step {}", value & 0xffff_ffff),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle::tests::scenario_of;

    fn chain() -> (Scenario, World, Books) {
        let scenario = scenario_of(
            r#"{"version":1,"grain":512,"images":[
            {"file":"b","format":"qcow2","size":4096,"cluster-size":512,
                "fill":[{"offset":0,"length":1024,"stored":"data"}]},
            {"file":"t","format":"qcow2","size":4096,"cluster-size":1024},
            {"file":"o","format":"qcow2","size":4096,"cluster-size":1024}],"steps":[]}"#,
        );
        let mut world = crate::follow::world_of(&scenario);
        for add in [
            serde_json::json!({"driver":"qcow2","node-name":"b","file":{"driver":"file","filename":"b"}}),
            serde_json::json!({"driver":"qcow2","node-name":"t","backing":"b",
                "file":{"driver":"file","filename":"t"}}),
            serde_json::json!({"driver":"copy-on-read","node-name":"c","file":"t","bottom":"b"}),
            serde_json::json!({"driver":"qcow2","node-name":"o","backing":"c","file":{"driver":"file","filename":"o"}}),
        ] {
            let command = blkcheck_model::Command::new("blockdev-add", &add);
            world.execute(&command).expect("a chain");
        }
        let books = Books::of(&scenario);
        (scenario, world, books)
    }

    #[test]
    fn a_write_takes_the_rest_of_its_cluster_and_a_read_through_the_filter_copies() {
        let (scenario, world, mut books) = chain();
        let node = |name: &str| world.graph.find(name).expect("open");
        let fill = code(Source::Fill { image: 0, fill: 0 });
        assert_eq!(
            books.view(&world, node("c")).expect("known")[..3],
            [fill, fill, 0]
        );
        let range = Range {
            offset: 512,
            length: 512,
        };
        let done = Answer::Done(Ok(()));
        books
            .guest(&world, node("c"), (true, None), GuestOp::Write(range), 7, &done)
            .expect("fine");
        assert_eq!(
            books.view(&world, node("c")).expect("known")[..3],
            [fill, code(source(7)), 0]
        );
        assert!(books.files["t"].layer.is_allocated(0) && !books.files["t"].layer.is_allocated(2));
        assert_eq!(books.view(&world, node("b")).expect("known")[..2], [fill, fill]);
        let _ = scenario;
    }

    #[test]
    fn only_what_a_layer_in_range_holds_is_copied() {
        let (_, world, mut books) = chain();
        let node = |name: &str| world.graph.find(name).expect("open");
        books.was_read(&world, node("c"), 0..8);
        let allocated: Vec<bool> = (0..8).map(|g| books.files["t"].layer.is_allocated(g)).collect();
        assert_eq!(allocated, [true, true, false, false, false, false, false, false]);
    }

    #[test]
    fn what_a_write_needs_from_below_is_read_through_the_filter_there() {
        let (_, world, mut books) = chain();
        let node = world.graph.find("o").expect("open");
        let range = Range {
            offset: 0,
            length: 512,
        };
        let (op, done) = (GuestOp::Write(range), Answer::Done(Ok(())));
        books
            .guest(&world, node, (true, None), op, 7, &done)
            .expect("fine");
        let allocated = |file: &str, grain| books.files[file].layer.is_allocated(grain);
        assert!(
            allocated("o", 1) && allocated("t", 1),
            "the other half of the cluster"
        );
        assert!(!allocated("o", 2) && !allocated("t", 2));
    }

    #[test]
    fn a_read_of_something_else_is_told() {
        let (_, world, mut books) = chain();
        let node = world.graph.find("c").expect("open");
        let range = Range {
            offset: 0,
            length: 512,
        };
        let zeroes = Answer::Read(Ok(vec![0; 512]));
        let wrong = books.guest(&world, node, (false, None), GuestOp::Read(range), 0, &zeroes);
        assert!(wrong.expect_err("differs").0.contains("fill 0 of image 0"));
        let write = books.guest(
            &world,
            node,
            (false, None),
            GuestOp::Write(range),
            0,
            &Answer::Done(Ok(())),
        );
        assert!(write.is_err(), "a read-only export takes no writes");
    }
}
