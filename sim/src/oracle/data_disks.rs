//! Which image a node shows, what is below that, and what it holds at first.
//!
//! Rules: filters and plain `raw` show what is below them. A disk is there from the moment on at which its image is first opened;
//! its initial content is laid out from the scenario, lower layers first.
//! Not covered: what [`super`] does not cover.

use blkcheck_model::{Driver, NodeId, World};

use super::grains::{parts, seen};
use super::{Data, Disk, Format, SECTOR, Scenario, Sectors, Seen, index};
use crate::image::build;
use crate::scenario::Image;

/// The file whose bytes a leaf or a format node is about.
pub(super) fn file_of(world: &World, node: NodeId) -> Option<std::rc::Rc<str>> {
    world
        .graph
        .node(node)
        .filename
        .clone()
        .or_else(|| world.image_file(node))
}

impl Data {
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
                        d.chains.clear();
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
        let mut registers = Sectors::new(self.grain, &initial);
        for g in 0..grains {
            let at = g as u64 * self.grain;
            if own[g] {
                let end = index(at + self.grain).min(self.buffer.len());
                let seen = parts(&self.buffer[index(at)..end], at, &cuts, self.grain);
                for (part, seen) in registers.of(g).zip(seen) {
                    if let Seen::Value(value) = seen {
                        registers.start_with(part, value);
                    }
                }
                continue;
            }
            // What a lower layer holds by now, where that was changed since.
            let known = |b: &&Disk| at < b.length && !b.registers.possible(g).is_empty();
            if let Some(below) = below.filter(known) {
                registers.shift_to(g, (&below.registers, below.length), !loose[g]);
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
            grown: None,
            log: Vec::new(),
            former: Vec::new(),
            flushed: 0,
            unknown,
            moved: false,
            kept: vec![false; grains],
            target: false,
            filled: vec![false; grains],
            fills: Vec::new(),
            discarded: Vec::new(),
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
