//! What copy-on-read filters copy, and what they may have copied.

use std::ops::Range as Span;

use blkcheck_model::layer::Cell;
use blkcheck_model::perm::Driver;
use blkcheck_model::{NodeId, World};

use super::{Books, File};

impl Books {
    /// As [`Books::populate`], by a job or a copy-on-read filter: what was not held before and shows zeroes may have been stored, or left
    /// out.
    pub(super) fn populate_copied(&mut self, world: &World, top: NodeId, grains: Span<usize>) {
        let Some(name) = world.image_file(top) else { return };
        let Some(layer) = self.files.get(&*name).map(|file| &file.layer) else {
            return;
        };
        let end = grains.end.min(layer.len());
        if grains.start >= end {
            return;
        }
        let all = layer.cluster_of(grains.start).start..layer.cluster_of(end - 1).end;
        let open: Vec<usize> = all.filter(|g| layer.cells[*g] == Cell::Unallocated).collect();
        self.populate(world, top, grains);
        if let Some(file) = self.files.get_mut(&*name) {
            for grain in open {
                file.murky[grain] = file.layer.cells[grain] == Cell::Stamp(0);
            }
        }
    }

    /// What a cluster needs besides these grains is read from below, through whatever filter is there. The grains
    /// themselves are read along with it, or not.
    pub(super) fn reads_the_rest(&mut self, world: &World, top: NodeId, file: &str, grains: Span<usize>) {
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
    pub(super) fn was_read(&mut self, world: &World, node: NodeId, grains: Span<usize>) {
        let facts = world.graph.node(node);
        match facts.driver {
            Driver::CopyOnRead => {
                let Some(child) = world.graph.filter_child(node) else {
                    return;
                };
                if world.graph.node(child).driver == Driver::Qcow2 {
                    match facts.bottom {
                        None => self.populate_copied(world, child, grains),
                        Some(bottom) => {
                            for grain in self.in_range(world, child, bottom, grains.clone()) {
                                self.populate_copied(world, child, grain..grain + 1);
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
            Driver::SnapshotAccess => self.snapshot_was_read(world, node, grains),
            Driver::Throttle | Driver::CopyBeforeWrite | Driver::Raw if !facts.windowed => {
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

    /// They may have been read, or not. A snapshot is read from what is below its filter, and from where that keeps copies.
    pub(super) fn may_be_read(&mut self, world: &World, node: NodeId, grains: Span<usize>) {
        let graph = &world.graph;
        for at in graph.chain(node).collect::<Vec<_>>() {
            let child = graph.filter_child(at);
            match (graph.node(at).driver, child) {
                (Driver::CopyOnRead, Some(child)) => self.may_be_copied(world, child, grains.clone()),
                (Driver::SnapshotAccess, _) => {
                    let filter = graph.primary_child(at);
                    for (_, edge) in filter.into_iter().flat_map(|filter| graph.children(filter)) {
                        self.may_be_read(world, edge.child, grains.clone());
                    }
                }
                _ => {}
            }
        }
    }

    /// Where `bottom` is the node that is filtered, the daemon looks for data from the layer below it on.
    pub(super) fn below_bottom(&mut self, world: &World, child: NodeId, grains: Span<usize>) {
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
    pub(in crate::compare) fn take_copied_below_bottom(&mut self) -> bool {
        std::mem::take(&mut self.copied_below_bottom)
    }

    pub(super) fn may_be_copied(&mut self, world: &World, node: NodeId, grains: Span<usize>) {
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
    pub(super) fn in_range(
        &self,
        world: &World,
        top: NodeId,
        bottom: NodeId,
        grains: Span<usize>,
    ) -> Vec<usize> {
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
}
