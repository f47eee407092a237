//! Copy-before-write filters: what they have copied to their targets, what they still show, and where nobody can say.
//!
//! Rules: before a write goes on below such a filter, every cluster that it touches and that is still to be kept is
//! copied. Whether zeroes are copied as data or as a flag depends on how block status cuts the source, so they are murky.
//! Unknown, and then never compared: what is kept of the file below a format (its tables), behind a window, of a node
//! that got another length, and from or to a node that refuses requests.

use std::collections::BTreeMap;
use std::ops::Range as Span;

use blkcheck_model::copy_before_write::{Kept, OnError};
use blkcheck_model::layer::Cell;
use blkcheck_model::perm::{Driver, Role};
use blkcheck_model::{NodeId, Parent, World};

use super::{Books, Hole, UNKNOWN};
use crate::scenario::GuestOp;

/// One cluster of the source.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Cluster {
    /// Still to be copied; the snapshot shows the source.
    Waiting,
    /// Copied; the snapshot shows the target.
    Done,
    /// Not kept: it is never copied, and the snapshot does not show it.
    Left,
    /// Not kept, and the snapshot shows it all the same: the source, and once that is written the target, which never had it.
    Through,
    Unknown,
}

/// One filter.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Keeping {
    /// Grains per cluster.
    cluster: usize,
    /// Length of the source, bytes.
    length: u64,
    clusters: Vec<Cluster>,
    breaks_snapshot: bool,
}

/// Filters by the names of their nodes.
pub(super) type All = BTreeMap<String, Keeping>;

/// Whether a request can be carried out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Can {
    Yes,
    No,
    /// It cannot be known from outside.
    Maybe,
}

impl Keeping {
    fn of(kept: &Kept, grain: u64) -> Keeping {
        let at = |n: u64| usize::try_from(n).expect("a short image");
        let count = at(kept.length.div_ceil(kept.cluster));
        let mut clusters = vec![Cluster::Unknown; count];
        if let Some(initial) = &kept.initial {
            clusters.fill(Cluster::Left);
            for cluster in initial.iter().flatten() {
                clusters[at(cluster)] = Cluster::Waiting;
            }
        }
        Keeping {
            cluster: at(kept.cluster / grain),
            length: kept.length,
            clusters,
            breaks_snapshot: kept.on_error == OnError::BreakSnapshot,
        }
    }

    fn at(&self, grain: usize) -> Cluster {
        self.clusters
            .get(grain / self.cluster)
            .copied()
            .unwrap_or(Cluster::Unknown)
    }

    pub(super) fn count(&self) -> usize {
        self.clusters.len()
    }

    pub(super) fn grains_each(&self) -> usize {
        self.cluster
    }

    pub(super) fn state(&self, cluster: usize) -> Cluster {
        self.clusters[cluster]
    }

    /// Of a filter that is new: these are what its clusters are.
    pub(super) fn become_states(&mut self, states: Vec<Cluster>) {
        if !self.clusters.contains(&Cluster::Unknown) {
            self.clusters = states;
        }
    }

    fn touched(&self, grains: &Span<usize>) -> Span<usize> {
        let end = grains.end.div_ceil(self.cluster).min(self.clusters.len());
        (grains.start / self.cluster).min(end)..end
    }
}

/// The two nodes below a filter.
fn ends(world: &World, filter: NodeId) -> Option<(NodeId, NodeId)> {
    let mut children = world.graph.children(filter);
    let target = children.find(|(_, edge)| edge.name == "target")?.1.child;
    Some((world.graph.filter_child(filter)?, target))
}

impl Books {
    /// Filters that came and went, and what can no longer be known of those that are there.
    pub(in crate::compare) fn kept(&mut self, world: &World) {
        let mut now = All::new();
        for (id, node) in world.graph.nodes().filter(|(_, n)| n.length <= super::LONGEST) {
            let (Some(kept), Some((_, target))) = (&node.kept, ends(world, id)) else {
                continue;
            };
            let known = self.kept.remove(&*node.name);
            let mut keeping = known.unwrap_or_else(|| Keeping::of(kept, self.grain));
            if keeping.length != node.length || keeps_tables(world, id) {
                keeping.clusters.fill(Cluster::Unknown);
                self.lose(world, target);
            }
            now.insert(node.name.to_string(), keeping);
        }
        self.kept = now;
    }

    /// Nobody knows what the image holds that this node writes to.
    pub(super) fn lose(&mut self, world: &World, node: NodeId) {
        let mut at = Some(node);
        while let Some(id) = at {
            let facts = world.graph.node(id);
            let name = facts.filename.clone().or_else(|| world.image_file(id));
            if let Some(file) = name.and_then(|name| self.files.get_mut(&*name)) {
                file.lost = true;
            }
            at = world.graph.primary_child(id);
        }
    }

    /// A guest is about to write these grains of a node, or to zero or discard them: what is kept first. Whether the request
    /// can get through.
    pub(super) fn keep_first(
        &mut self,
        world: &World,
        node: NodeId,
        grains: Span<usize>,
        discards: bool,
    ) -> Can {
        let mut can = Can::Yes;
        let (mut at, mut windowed) = (Some(node), false);
        while let Some(id) = at {
            let facts = world.graph.node(id);
            if discards && !facts.unmap {
                break;
            }
            windowed |= facts.windowed;
            match facts.driver {
                Driver::CopyBeforeWrite => {
                    let one = self.keep(world, id, grains.clone(), windowed);
                    can = if one == Can::Yes { can } else { one };
                }
                Driver::SnapshotAccess => return if discards { can } else { Can::No },
                Driver::Qcow2 => {
                    // The rest of a cluster may have to come from a snapshot.
                    let whole = world
                        .graph
                        .chain(id)
                        .all(|n| world.graph.node(n).driver != Driver::SnapshotAccess);
                    return if whole { can } else { Can::Maybe };
                }
                _ => {}
            }
            at = world.graph.primary_child(id);
        }
        can
    }

    fn keep(&mut self, world: &World, filter: NodeId, grains: Span<usize>, windowed: bool) -> Can {
        let Some((source, target)) = ends(world, filter) else {
            return Can::Yes;
        };
        let name = world.graph.name(filter).to_owned();
        let Some(keeping) = self.kept.get(&name).cloned() else {
            return Can::Maybe;
        };
        if windowed {
            self.forget(world, &name, target);
            return Can::Maybe;
        }
        let due = |c: &usize| matches!(keeping.clusters[*c], Cluster::Waiting | Cluster::Unknown);
        let due: Vec<usize> = keeping.touched(&grains).filter(due).collect();
        if due.iter().any(|c| keeping.clusters[*c] == Cluster::Unknown)
            || !copies(world, source, target, &keeping, &due)
        {
            if due.is_empty() {
                return Can::Yes;
            }
            self.forget(world, &name, target);
            return if keeping.breaks_snapshot {
                Can::Yes
            } else {
                Can::Maybe
            };
        }
        self.copy_clusters(world, &name, (source, target), &due);
        Can::Yes
    }

    /// These clusters are copied for the filter of this name.
    pub(super) fn copy_clusters(
        &mut self,
        world: &World,
        filter: &str,
        (source, target): (NodeId, NodeId),
        due: &[usize],
    ) {
        let Some(size) = self
            .kept
            .get(filter)
            .map(Keeping::grains_each)
            .filter(|_| !due.is_empty())
        else {
            return;
        };
        // No copy changes what another one reads.
        let view = self.view(world, source);
        for cluster in due {
            let grains = cluster * size..(cluster + 1) * size;
            self.copy(world, source, target, grains, view.as_deref());
            if let Some(keeping) = self.kept.get_mut(filter) {
                keeping.clusters[*cluster] = Cluster::Done;
            }
        }
    }

    fn forget(&mut self, world: &World, filter: &str, target: NodeId) {
        if let Some(keeping) = self.kept.get_mut(filter) {
            keeping.clusters.fill(Cluster::Unknown);
        }
        self.lose(world, target);
    }

    /// These grains of one node, which shows this, are copied to another, as far as the first one reaches.
    fn copy(
        &mut self,
        world: &World,
        source: NodeId,
        target: NodeId,
        grains: Span<usize>,
        view: Option<&[u64]>,
    ) {
        let length = usize::try_from(world.graph.node(source).length.div_ceil(self.grain)).expect("short");
        let grains = grains.start..grains.end.min(length);
        let holes: Vec<Hole> = grains.clone().map(|g| self.hole(world, source, g)).collect();
        if holes.contains(&Hole::No) {
            self.was_read(world, source, grains.clone());
            // What is zero and copied into an old image on the way may be there or not.
            self.zeroed_old(world, source, grains.clone());
        } else {
            self.may_be_read(world, source, grains.clone());
        }
        // Somebody may keep what the target has.
        self.keep_first(world, target, grains.clone(), false);
        let value = |g: usize| match view {
            None => UNKNOWN,
            Some(view) => view.get(g).copied().unwrap_or(0),
        };
        let zeroes = grains.clone().all(|g| value(g) == 0);
        // In one request, which takes from below only what it does not cover itself.
        self.write(world, target, grains.clone(), Cell::Stamp(UNKNOWN));
        for grain in grains.clone() {
            self.write(world, target, grain..grain + 1, Cell::Stamp(value(grain)));
        }
        if let Some(top) = Books::top(world, target).filter(|_| zeroes) {
            let file = world.image_file(top);
            let end = file
                .as_ref()
                .and_then(|f| self.files.get(&**f))
                .map_or(0, |f| f.layer.len());
            self.blur(file.as_deref(), grains.start.min(end)..grains.end.min(end), true);
            self.zeroed_old(world, top, grains);
        }
    }

    /// What the snapshot of a filter shows, grain by grain.
    pub(super) fn snapshot(&self, world: &World, access: NodeId) -> Option<Vec<u64>> {
        let filter = world.graph.primary_child(access)?;
        let (source, target) = ends(world, filter)?;
        let keeping = self.kept.get(world.graph.name(filter))?;
        let grains = usize::try_from(world.graph.node(access).length.div_ceil(self.grain)).ok()?;
        let (now, copied) = (self.view(world, source), self.view(world, target));
        let of = |view: &Option<Vec<u64>>, grain: usize| {
            view.as_ref()
                .and_then(|v| v.get(grain))
                .copied()
                .unwrap_or(UNKNOWN)
        };
        let shown = |grain: usize| match keeping.at(grain) {
            Cluster::Waiting => of(&now, grain),
            Cluster::Done => of(&copied, grain),
            Cluster::Left | Cluster::Through | Cluster::Unknown => UNKNOWN,
        };
        Some((0..grains).map(shown).collect())
    }

    /// Whether these grains of a node can be read.
    pub(super) fn can_read(&self, world: &World, node: NodeId, grains: Span<usize>) -> Can {
        let facts = world.graph.node(node);
        let below = |child: Option<NodeId>, grains: Span<usize>| {
            child.map_or(Can::Yes, |child| self.can_read(world, child, grains))
        };
        match facts.driver {
            Driver::SnapshotAccess => self.can_access(world, node, grains),
            Driver::Raw if facts.windowed => match below(world.graph.primary_child(node), grains) {
                Can::Yes => Can::Yes,
                _ => Can::Maybe,
            },
            Driver::Qcow2 => {
                let open = |g: &usize| self.is_open(world, node, *g);
                let all = grains.clone().all(|g| open(&g));
                let none = !grains.clone().any(|g| open(&g));
                let file = below(world.graph.primary_child(node), 0..1);
                match below(world.graph.cow_child(node), grains) {
                    _ if file != Can::Yes => Can::Maybe,
                    Can::Yes => Can::Yes,
                    _ if none && world.image_file(node).is_some() => Can::Yes,
                    other if all => other,
                    _ => Can::Maybe,
                }
            }
            _ => below(world.graph.primary_child(node), grains),
        }
    }

    /// Block status of what is asked for here is said for sure.
    pub(in crate::compare) fn can_tell(&self, world: &World, node: NodeId, op: GuestOp) -> bool {
        match op {
            GuestOp::BlockStatus(range) => self.can_read(world, node, self.grains(range)) == Can::Yes,
            _ => true,
        }
    }

    fn can_access(&self, world: &World, access: NodeId, grains: Span<usize>) -> Can {
        let filter = world
            .graph
            .primary_child(access)
            .filter(|f| world.graph.node(*f).kept.is_some());
        let Some(filter) = filter else {
            return Can::No;
        };
        let Some(keeping) = self.kept.get(world.graph.name(filter)) else {
            return Can::Maybe;
        };
        let clusters: Vec<Cluster> = keeping.touched(&grains).map(|c| keeping.clusters[c]).collect();
        if clusters.contains(&Cluster::Left) {
            Can::No
        } else if clusters.contains(&Cluster::Unknown)
            || clusters.contains(&Cluster::Through)
            || world.graph.node(access).length != keeping.length
        {
            Can::Maybe
        } else {
            let Some((source, target)) = ends(world, filter) else {
                return Can::Maybe;
            };
            let both = [
                self.can_read(world, source, grains.clone()),
                self.can_read(world, target, grains),
            ];
            if both == [Can::Yes; 2] {
                Can::Yes
            } else {
                Can::Maybe
            }
        }
    }

    /// Filters below copy what is read through a snapshot.
    pub(super) fn snapshot_was_read(&mut self, world: &World, access: NodeId, grains: Span<usize>) {
        let filter = world.graph.primary_child(access);
        let Some((filter, (source, target))) = filter.and_then(|f| Some((f, ends(world, f)?))) else {
            return;
        };
        let Some(keeping) = self.kept.get(world.graph.name(filter)).cloned() else {
            return;
        };
        for grain in grains {
            match keeping.at(grain) {
                Cluster::Waiting => self.was_read(world, source, grain..grain + 1),
                Cluster::Done => self.was_read(world, target, grain..grain + 1),
                Cluster::Left => {}
                Cluster::Through | Cluster::Unknown => {
                    self.may_be_read(world, source, grain..grain + 1);
                    self.may_be_read(world, target, grain..grain + 1);
                }
            }
        }
    }

    /// Whole clusters of a snapshot were discarded: they are kept no longer.
    pub(super) fn snapshot_discarded(&mut self, world: &World, node: NodeId, grains: Span<usize>) {
        let mut at = Some(node);
        while let Some(id) = at.filter(|id| world.graph.node(*id).unmap) {
            at = world.graph.primary_child(id);
            if world.graph.node(id).driver != Driver::SnapshotAccess {
                continue;
            }
            let filter = at.and_then(|f| Some((f, ends(world, f)?.1)));
            let Some((filter, target)) = filter else { return };
            let Some(keeping) = self.kept.get_mut(world.graph.name(filter)) else {
                return;
            };
            let end = if grains.end as u64 * self.grain >= keeping.length {
                keeping.clusters.len()
            } else {
                grains.end / keeping.cluster
            };
            for cluster in grains.start.div_ceil(keeping.cluster)..end {
                keeping.clusters[cluster] = Cluster::Left;
            }
            if Books::discards(world, target) {
                self.lose(world, target);
            }
            return;
        }
    }
}

/// Something in these clusters can be copied for sure.
fn copies(world: &World, source: NodeId, target: NodeId, keeping: &Keeping, due: &[usize]) -> bool {
    let sound = |node: NodeId| {
        let mut all = world.graph.topological([node]).into_iter();
        all.all(|id| world.graph.node(id).driver != Driver::SnapshotAccess)
    };
    let reaches = world.graph.node(target).length >= keeping.length;
    due.is_empty() || (reaches && sound(source) && sound(target))
}

/// The source is where a format stores its image, so that its tables are kept as well.
fn keeps_tables(world: &World, filter: NodeId) -> bool {
    world.graph.parents(filter).any(|(_, edge)| match edge.parent {
        Parent::Node(above) if edge.role.contains(Role::METADATA) => {
            world.graph.node(above).driver != Driver::SnapshotAccess
        }
        Parent::Node(above) if world.graph.node(above).driver != Driver::Qcow2 => keeps_tables(world, above),
        _ => false,
    })
}
