//! Copy-on-read and stream copy what lies above `bottom`, all of it and nothing else.
//!
//! * Each `CopyOnRead` on a node under copy-on-read filters that all have a `bottom`: every cluster copied must overlap
//!   something that a layer from the node's backing layer down to `bottom` holds, or reach past the end of such a
//!   layer (zeroes that the layer decides). Rounding to the node's clusters is what this leaves room for; with
//!   `bottom` the node itself nothing is ever copied.
//! * At quiescence each qcow2 layer is allocated where it surely must be (initially, by a write that ended, by a
//!   stream that succeeded) and nowhere that nobody wrote or copied.
//!
//! Allocation is followed per cluster as "may" and "must"; a cluster that was discarded or zeroed by a guest is only
//! "may" from then on.
//! Unchecked: filters without `bottom` (they may copy anything), ranges over windows, `null-co`, and `raw` over a format, which part of a
//! cluster was fetched from where, disks whose bytes were written below their format.

use std::rc::Rc;

use blkcheck_impl::event::Event;
use blkcheck_impl::types::{NodeId as LayerNode, Role};
use blkcheck_model::{Driver, NodeId, Outcome as JobOutcome, World};

use super::data::{Data, allocation};
use super::mirror::Mirror;
use super::{FinalContent, OracleName, View, Violation, violation};
use crate::history::{Outcome, StepId};
use crate::scenario::{Format, GuestOp, Scenario};

/// Allocation of one image.
#[derive(Clone, Debug, Default)]
struct Layer {
    format: Option<Format>,
    cluster: u64,
    size: u64,
    may: Vec<bool>,
    must: Vec<bool>,
    /// Discarded or zeroed: nothing is sure.
    wild: Vec<bool>,
}

/// What a stream was to copy: the image it fills, and the layers it empties, nearest first.
#[derive(Debug)]
struct Stream {
    id: Rc<str>,
    top: usize,
    range: Vec<usize>,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Bottom {
    /// Copies are not told.
    outside: bool,
    /// Outside: what may have been copied: the image that is filled, and the layers that it may come from; `None`:
    /// from anywhere.
    copies: Vec<(usize, Option<Vec<usize>>)>,
    layers: Vec<Layer>,
    streams: Vec<Stream>,
    /// Writes under way: step, image, start, end.
    writes: Vec<(StepId, usize, u64, u64)>,
}

fn index(v: u64) -> usize {
    usize::try_from(v).expect("small disks")
}

impl Layer {
    fn new(image: &crate::scenario::Image) -> Layer {
        let cluster = if image.format == Format::Raw {
            image.size.max(1)
        } else {
            u64::from(image.cluster_size)
        };
        let clusters = index(image.size.div_ceil(cluster));
        let may = allocation(image, cluster, clusters);
        let must = may.clone();
        Layer {
            format: Some(image.format),
            cluster,
            size: image.size,
            may,
            must,
            wild: vec![false; clusters],
        }
    }

    fn clusters(&self, start: u64, end: u64) -> std::ops::Range<usize> {
        let last = index(end.div_ceil(self.cluster)).min(self.may.len());
        index(start / self.cluster).min(last)..last
    }

    fn holds(flags: &[bool], clusters: std::ops::Range<usize>) -> bool {
        flags[clusters].contains(&true)
    }
}

impl Bottom {
    /// For a subject that does not tell its copies: whatever a filter that was ever there may copy counts as copied.
    pub(crate) fn outside() -> Bottom {
        Bottom {
            outside: true,
            ..Bottom::default()
        }
    }

    /// Filters that are there now, and what they may copy into which image.
    fn filters(&mut self, scenario: &Scenario, world: &World) {
        let graph = &world.graph;
        for (id, node) in graph.nodes().filter(|(_, n)| n.driver == Driver::CopyOnRead) {
            let Some(disk) = Data::disk_of(scenario, world, id) else {
                continue;
            };
            let below = graph.skip_filters(id);
            let copy = (
                disk,
                node.bottom.and_then(|b| range_of(scenario, world, below, b)),
            );
            if !self.copies.contains(&copy) {
                self.copies.push(copy);
            }
        }
    }

    /// Everything that may be allocated by copies, to the end: one layer's copies may be copied by another.
    fn copy_all(&mut self) {
        loop {
            let mut grew = false;
            for (disk, range) in &self.copies {
                for c in 0..self.layers[*disk].may.len() {
                    let layer = &self.layers[*disk];
                    let (from, to) = (
                        c as u64 * layer.cluster,
                        ((c as u64 + 1) * layer.cluster).min(layer.size),
                    );
                    let held = |lower: &usize| {
                        let layer = &self.layers[*lower];
                        to > layer.size || Layer::holds(&layer.may, layer.clusters(from, to))
                    };
                    if !layer.may[c] && range.as_ref().is_none_or(|r| r.iter().any(held)) {
                        self.layers[*disk].may[c] = true;
                        grew = true;
                    }
                }
            }
            if !grew {
                return;
            }
        }
    }

    pub(crate) fn reset(&mut self, scenario: &Scenario) {
        self.copies.clear();
        self.layers.clear();
        self.layers.extend(scenario.images.iter().map(Layer::new));
        self.streams.clear();
        self.writes.clear();
    }

    /// Whether a layer surely holds all of [start, end) itself, and whether it may hold any of it.
    pub(crate) fn holds(&self, disk: usize, start: u64, end: u64) -> (bool, bool) {
        let layer = &self.layers[disk];
        if layer.format == Some(Format::Raw) {
            return (true, true);
        }
        let clusters = layer.clusters(start, end);
        let surely = clusters.clone().all(|c| layer.must[c] && !layer.wild[c]);
        let copied = self.outside && self.copies.iter().any(|(to, _)| *to == disk);
        (surely, copied || Layer::holds(&layer.may, clusters))
    }

    /// Whether a layer surely holds some of [start, end) itself.
    pub(crate) fn holds_any(&self, disk: usize, start: u64, end: u64) -> bool {
        let layer = &self.layers[disk];
        let held = |c: usize| layer.must[c] && !layer.wild[c];
        layer.format == Some(Format::Raw) || layer.clusters(start, end).any(held)
    }

    /// Something is copied into an image, as data, as zeroes, or it fails on the way.
    pub(crate) fn filled(&mut self, disk: usize, offset: u64, bytes: u64) {
        let layer = &mut self.layers[disk];
        let clusters = layer.clusters(offset, offset.saturating_add(bytes));
        layer.may[clusters.clone()].fill(true);
        layer.wild[clusters].fill(true);
    }

    /// Something is discarded in an image behind a copy, or not.
    pub(crate) fn discarded(&mut self, disk: usize, offset: u64, bytes: u64) {
        self.filled(disk, offset, bytes);
        let layer = &mut self.layers[disk];
        let clusters = layer.clusters(offset, offset.saturating_add(bytes));
        layer.must[clusters].fill(false);
    }

    /// A write under way may have reached this image as well, or instead.
    pub(crate) fn crossed(&mut self, step: StepId, disk: usize, range: crate::scenario::Range) {
        self.writes.retain(|w| w.0 != step);
        let layer = &mut self.layers[disk];
        let clusters = layer.clusters(range.offset, range.offset.saturating_add(range.length));
        layer.may[clusters].fill(true);
    }

    /// An image was given another length. What grows may be zeroed by the layer, and so is the rest of the last cluster.
    pub(crate) fn resized(&mut self, disk: usize, length: u64) {
        let layer = &mut self.layers[disk];
        let old = std::mem::replace(&mut layer.size, length);
        if layer.format == Some(Format::Raw) {
            layer.cluster = length.max(1);
            return;
        }
        let clusters = index(length.div_ceil(layer.cluster));
        let seam = index(old.min(length) / layer.cluster);
        for flags in [&mut layer.may, &mut layer.wild] {
            flags.resize(clusters, true);
            flags[seam.min(clusters)..].fill(true);
        }
        layer.must.resize(clusters, false);
        layer.must[seam.min(clusters)..].fill(false);
    }

    /// A command was executed by the model; a stream may be new.
    pub(crate) fn executed(&mut self, scenario: &Scenario, world: &World) {
        if self.outside {
            self.filters(scenario, world);
        }
        let Some(job) = world.jobs.first() else { return };
        if self.streams.iter().any(|s| s.id == job.id) {
            return;
        }
        let graph = &world.graph;
        let Some(stream) = job.stream() else { return };
        let node = graph.skip_filters(stream.device);
        let Some(top) = Data::disk_of(scenario, world, node) else {
            return;
        };
        if let Some(range) = range_of(scenario, world, node, stream.base_overlay) {
            self.streams.push(Stream {
                id: Rc::clone(&job.id),
                top,
                range,
            });
        }
    }

    /// A job completed.
    pub(crate) fn completed(&mut self, id: &str, outcome: JobOutcome) {
        let Some(at) = self.streams.iter().position(|s| &*s.id == id) else {
            return;
        };
        let Stream { top, range, .. } = self.streams.remove(at);
        if outcome != JobOutcome::Success || self.layers[top].format != Some(Format::Qcow2) {
            return;
        }
        let cluster = self.layers[top].cluster;
        for c in 0..self.layers[top].may.len() {
            let (start, end) = (
                c as u64 * cluster,
                ((c as u64 + 1) * cluster).min(self.layers[top].size),
            );
            let mut end_seen = end;
            for &lower in &range {
                let layer = &self.layers[lower];
                // Past the end of a layer the deeper ones do not show.
                end_seen = end_seen.min(layer.size);
                if start >= end_seen {
                    break;
                }
                let clusters = layer.clusters(start, end_seen);
                let sure = clusters.clone().any(|l| layer.must[l] && !layer.wild[l]);
                if sure {
                    let top = &mut self.layers[top];
                    top.must[c] |= !top.wild[c];
                    break;
                }
            }
        }
    }

    /// A guest request is issued on an image.
    pub(crate) fn issued(&mut self, step: StepId, disk: usize, op: &GuestOp) {
        let (range, wild) = match op {
            GuestOp::Write(r) | GuestOp::WriteFua(r) => (r, false),
            GuestOp::WriteZeroes(r) | GuestOp::WriteZeroesUnmap(r) | GuestOp::Discard(r) => (r, true),
            GuestOp::Read(_) | GuestOp::Flush | GuestOp::BlockStatus(_) => return,
        };
        let layer = &mut self.layers[disk];
        let end = range.offset.saturating_add(range.length);
        let clusters = layer.clusters(range.offset, end);
        layer.may[clusters.clone()].fill(true);
        if wild {
            layer.wild[clusters.clone()].fill(true);
            layer.must[clusters].fill(false);
        } else {
            self.writes.push((step, disk, range.offset, end));
        }
    }

    /// A guest request is over.
    pub(crate) fn ended(&mut self, step: StepId, outcome: &Outcome) {
        let Some(at) = self.writes.iter().position(|w| w.0 == step) else {
            return;
        };
        let (_, disk, start, end) = self.writes.swap_remove(at);
        if matches!(outcome, Outcome::Done(Ok(()))) {
            let layer = &mut self.layers[disk];
            for c in layer.clusters(start, end) {
                layer.must[c] |= !layer.wild[c];
            }
        }
    }

    /// A node is populated.
    pub(crate) fn event(
        &mut self,
        scenario: &Scenario,
        world: &World,
        mirror: &Mirror,
        event: &Event,
    ) -> Result<(), Violation> {
        let Event::CopyOnRead {
            node, offset, bytes, ..
        } = event
        else {
            return Ok(());
        };
        let Some(below) = world.graph.find(mirror.name(below_filters(mirror, *node))) else {
            return Ok(());
        };
        let Some(node) = world.graph.find(mirror.name(*node)) else {
            return Ok(());
        };
        let Some(disk) = Data::disk_of(scenario, world, below) else {
            return Ok(());
        };
        let end = offset + bytes;
        let verdict = self.allowed(scenario, world, node, disk, *offset, end);
        let layer = &mut self.layers[disk];
        let clusters = layer.clusters(*offset, end);
        layer.may[clusters].fill(true);
        verdict
    }

    fn allowed(
        &self,
        scenario: &Scenario,
        world: &World,
        node: NodeId,
        disk: usize,
        start: u64,
        end: u64,
    ) -> Result<(), Violation> {
        // A filter that is copied into passes it on as a plain write: its node is not the one that is limited.
        if world.graph.node(node).driver.is_filter() || self.layers[disk].format != Some(Format::Qcow2) {
            return Ok(());
        }
        let mut bottoms = Vec::new();
        filters_above(world, node, &mut bottoms);
        // No filter: one of a command that is being refused.
        if bottoms.is_empty() || bottoms.contains(&None) {
            return Ok(());
        }
        let mut ranges = Vec::new();
        for bottom in bottoms.into_iter().flatten() {
            match range_of(scenario, world, node, bottom) {
                Some(range) => ranges.push(range),
                None => return Ok(()),
            }
        }
        let top = &self.layers[disk];
        for c in top.clusters(start, end) {
            let (from, to) = (
                c as u64 * top.cluster,
                ((c as u64 + 1) * top.cluster).min(top.size),
            );
            let held = |lower: &usize| {
                let layer = &self.layers[*lower];
                to > layer.size || Layer::holds(&layer.may, layer.clusters(from, to))
            };
            if !ranges.iter().flatten().any(held) {
                let name = world.graph.name(node);
                let message = format!(
                    "copy-on-read copies {from:#x}..{to:#x} into node '{name}', which no layer down to bottom holds"
                );
                let layers = ranges
                    .iter()
                    .flatten()
                    .map(|l| format!("down to bottom: image {}", scenario.images[*l].file));
                return Err(violation(OracleName::Bottom, None, message, layers.collect()));
            }
        }
        Ok(())
    }

    pub(crate) fn quiescent(
        &mut self,
        view: &View<'_>,
        world: &World,
        data: &Data,
        contents: &[FinalContent<'_>],
    ) -> Result<(), Violation> {
        self.copy_all();
        for content in contents {
            let Some(node) = world.graph.find(content.name) else {
                continue;
            };
            if world.graph.node(node).driver != Driver::Qcow2 {
                continue;
            }
            let Some(disk) = Data::disk_of(view.scenario, world, node).filter(|d| data.is_known(*d)) else {
                continue;
            };
            self.final_allocation(disk, content)?;
        }
        Ok(())
    }

    fn final_allocation(&self, disk: usize, content: &FinalContent<'_>) -> Result<(), Violation> {
        let layer = &self.layers[disk];
        let mut at = 0;
        for (bytes, allocated) in content.allocated {
            let clusters = layer.clusters(at, at + bytes);
            at += bytes;
            let flags = if *allocated { &layer.may } else { &layer.must };
            let Some(c) = clusters.clone().find(|c| flags[*c] != *allocated) else {
                continue;
            };
            let place = c as u64 * layer.cluster;
            let message = if *allocated {
                format!(
                    "node '{}' holds {place:#x}, which nobody wrote or had to copy there",
                    content.name
                )
            } else {
                format!(
                    "node '{}' does not hold {place:#x}, which it must hold by now",
                    content.name
                )
            };
            return Err(violation(OracleName::Bottom, None, message, Vec::new()));
        }
        Ok(())
    }
}

/// The node that a request for this one comes to through filters, in the layer: the model may be ahead of it.
fn below_filters(mirror: &Mirror, node: LayerNode) -> LayerNode {
    let below = |node: &LayerNode| {
        let edge = mirror.edge(mirror.chain_edge(*node)?)?;
        edge.child.filter(|_| edge.role.contains(Role::FILTERED))
    };
    std::iter::successors(Some(node), below).last().unwrap_or(node)
}

/// `bottom` of every copy-on-read filter above `node`, directly or through other filters.
fn filters_above(world: &World, node: NodeId, bottoms: &mut Vec<Option<NodeId>>) {
    for (_, edge) in world.graph.parents(node) {
        if let blkcheck_model::Parent::Node(above) = edge.parent
            && world.graph.node(above).driver.is_filter()
        {
            bottoms.push(world.graph.node(above).bottom);
            filters_above(world, above, bottoms);
        }
    }
}

/// Images below `node` down to `bottom`, nearest first; `None` where one of them has no allocation that is followed.
fn range_of(scenario: &Scenario, world: &World, node: NodeId, bottom: NodeId) -> Option<Vec<usize>> {
    let graph = &world.graph;
    let bottom = graph.skip_filters(bottom);
    let mut range = Vec::new();
    let mut at = node;
    while at != bottom {
        at = graph.backing_chain_next(at)?;
        let is_format = |node| !graph.node(node).driver.is_protocol();
        if graph.node(at).driver == Driver::Raw && graph.primary_child(at).is_some_and(is_format) {
            // For those above it holds everything itself.
            return None;
        }
        range.push(Data::disk_of(scenario, world, at)?);
    }
    Some(range)
}

#[cfg(test)]
mod tests {
    use blkcheck_impl::types::NodeId as Id;
    use blkcheck_model::{Command, Role};
    use serde_json::json;

    use super::super::mirror::tests::added;
    use super::super::tests::scenario_of;
    use super::*;

    /// base (all data) ← mid (first cluster of 512) ← top (empty, clusters of 1024); `cor` above top with bottom mid.
    fn scenario() -> Scenario {
        scenario_of(
            r#"{"version":1,"grain":64,"steps":[],"images":[
            {"file":"base","format":"qcow2","size":4096,"cluster-size":512,
             "fill":[{"offset":0,"length":4096,"stored":"data"}]},
            {"file":"mid","format":"qcow2","size":4096,"cluster-size":512,
             "fill":[{"offset":0,"length":512,"stored":"data"}]},
            {"file":"top","format":"qcow2","size":4096,"cluster-size":1024}]}"#,
        )
    }

    fn world(scenario: &Scenario, bottom: &str) -> World {
        let mut follower = crate::follow::Follower::default();
        follower.reset(scenario);
        let mut world = follower.world;
        let mut below = serde_json::Value::Null;
        for file in ["base", "mid", "top"] {
            let leaf = json!({"driver": "file", "filename": file});
            let node = json!({"driver": "qcow2", "node-name": file, "file": leaf, "backing": below});
            world
                .execute(&Command::new("blockdev-add", &node))
                .expect("opens");
            below = json!(file);
        }
        let cor = json!({"driver": "copy-on-read", "node-name": "cor", "file": "top", "bottom": bottom});
        world.execute(&Command::new("blockdev-add", &cor)).expect("opens");
        assert!(world.graph.edges().any(|(_, e)| e.role == Role::COW));
        world
    }

    fn copy(bottom: &str, offset: u64, bytes: u64) -> Result<(), Violation> {
        let scenario = scenario();
        let world = world(&scenario, bottom);
        let mut mirror = Mirror::default();
        mirror.apply(&added(0, "top", "qcow2")).expect("added");
        let mut oracle = Bottom::default();
        oracle.reset(&scenario);
        let event = Event::CopyOnRead {
            node: Id(0),
            offset,
            bytes,
            zero: false,
        };
        oracle.event(&scenario, &world, &mirror, &event)
    }

    #[test]
    fn the_rest_of_a_cluster_may_be_copied_but_nothing_from_below_bottom() {
        assert_eq!(copy("mid", 0, 1024), Ok(()));
        let v = copy("mid", 0, 2048).expect_err("the second cluster is in base only");
        assert!(
            v.message
                .starts_with("copy-on-read copies 0x400..0x800 into node 'top'"),
            "{}",
            v.message
        );
        assert_eq!(copy("base", 0, 4096), Ok(()));
        assert!(
            copy("top", 0, 1024).is_err(),
            "with bottom the node itself nothing is copied"
        );
    }

    #[test]
    fn final_allocation_is_what_was_written_and_streamed() {
        let scenario = scenario();
        let mut oracle = Bottom::default();
        let judge = |oracle: &Bottom, allocated: &[(u64, bool)]| {
            oracle.final_allocation(
                2,
                &FinalContent {
                    name: "top",
                    bytes: &[],
                    allocated,
                    zeroes: &[],
                },
            )
        };
        oracle.reset(&scenario);
        assert_eq!(judge(&oracle, &[(4096, false)]), Ok(()));
        assert!(
            judge(&oracle, &[(1024, true), (3072, false)])
                .expect_err("from nowhere")
                .message
                .contains("nobody")
        );
        let write = GuestOp::Write(crate::scenario::Range {
            offset: 1024,
            length: 64,
        });
        oracle.issued(StepId(0), 2, &write);
        assert_eq!(judge(&oracle, &[(4096, false)]), Ok(()), "not ended yet");
        oracle.ended(StepId(0), &Outcome::Done(Ok(())));
        assert!(
            judge(&oracle, &[(4096, false)])
                .expect_err("lost")
                .message
                .contains("must hold")
        );
        oracle.streams.push(Stream {
            id: "j".into(),
            top: 2,
            range: vec![1],
        });
        oracle.completed("j", JobOutcome::Success);
        oracle.layers[2].may[0] = true;
        assert!(
            judge(&oracle, &[(1024, false), (1024, true), (2048, false)]).is_err(),
            "mid's cluster is missing"
        );
        assert_eq!(judge(&oracle, &[(2048, true), (2048, false)]), Ok(()));
    }
}
