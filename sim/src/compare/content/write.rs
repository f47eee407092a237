//! Writes: what becomes allocated, and how.
//!
//! Rules: a cluster that is written in part takes the rest from below; zeroes are recorded without data only where a whole cluster
//! is zero.

use std::ops::Range as Span;

use blkcheck_model::layer::Cell;
use blkcheck_model::{NodeId, World};

use super::{Books, Hole};

impl Books {
    pub(super) fn write(&mut self, world: &World, node: NodeId, grains: Span<usize>, cell: Cell) {
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

    /// Zeroes, recorded as such for whole clusters. The rest of a cluster that is asked for in part may have to be zero already,
    /// and hold no data; else zeroes are written like other data.
    pub(super) fn write_zeroes(&mut self, world: &World, node: NodeId, grains: Span<usize>) {
        let top = Books::top(world, node);
        let name = top.and_then(|top| world.image_file(top));
        let (Some(top), Some(file)) = (top, name.as_ref().and_then(|name| self.files.get(&**name))) else {
            return self.write(world, node, grains, Cell::Zero);
        };
        let old = file.layer.format == blkcheck_model::layer::Format::Qcow2(2);
        let end = grains.end.min(file.layer.len());
        let mut at = grains.start;
        while at < end {
            let Some(file) = name.as_ref().and_then(|name| self.files.get(&**name)) else {
                return;
            };
            let cluster = file.layer.cluster_of(at);
            let part = at..end.min(cluster.end);
            let stores = cluster
                .clone()
                .any(|g| matches!(file.layer.cells[g], Cell::Stamp(_)) && !file.murky[g]);
            let rest = cluster.clone().filter(|g| !part.contains(g));
            let holes: Vec<Hole> = rest.map(|g| self.hole(world, top, g)).collect();
            let murky = cluster.clone().any(|g| file.murky[g]) || holes.contains(&Hole::Maybe);
            at = part.end;
            if part == cluster {
                self.write(
                    world,
                    node,
                    part.clone(),
                    if old { Cell::Stamp(0) } else { Cell::Zero },
                );
                self.blur(name.as_deref(), part, old);
            } else if old || stores || holes.contains(&Hole::No) {
                self.write(world, node, part, Cell::Stamp(0));
            } else if murky {
                self.write(world, node, part, Cell::Stamp(0));
                self.blur(name.as_deref(), cluster, true);
            } else {
                self.write(world, node, cluster, Cell::Zero);
            }
        }
    }

    /// These grains are zeroes of a kind that cannot be known.
    pub(super) fn blur(&mut self, file: Option<&str>, grains: Span<usize>, murky: bool) {
        if let Some(file) = file.and_then(|name| self.files.get_mut(name)) {
            file.murky[grains].fill(murky);
        }
    }

    /// Version 2 has no zero clusters: without a backing file a cluster of zeroes may as well be none.
    pub(super) fn zeroed_old(&mut self, world: &World, node: NodeId, grains: Span<usize>) {
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

    pub(super) fn set(&mut self, file: &str, grains: Span<usize>, cell: Cell) {
        if let Some(file) = self.files.get_mut(file) {
            let end = grains.end.min(file.layer.cells.len());
            let start = grains.start.min(end);
            file.layer.cells[start..end].fill(cell);
            file.copied[start..end].fill(None);
            file.murky[start..end].fill(false);
        }
    }

    /// The clusters of these grains become allocated in the file of this qcow2 node and keep what they show.
    pub(super) fn populate(&mut self, world: &World, top: NodeId, grains: Span<usize>) {
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
}
