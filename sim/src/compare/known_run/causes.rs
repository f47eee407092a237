//! What commands did to the graph that some defect needs: judged by the model, before and after.
//!
//! Rules: everything is told of a command that was carried out, with the graph that it met; a matcher asks for it later.
//! Steering asks the same of a command that is still to be sent, on a copy of the model.

use std::collections::BTreeSet;
use std::rc::Rc;

use blkcheck_impl::event::Event;
use blkcheck_model::copy_before_write::OnError;
use blkcheck_model::graph::{Graph, Parent};
use blkcheck_model::{Command, Driver, NodeId, Outcome, World};
use serde_json::{Map, Value};

use crate::compare::known::{self, Strayed};
use crate::follow::{Follower, stands_on};
use crate::history::{Fault, FaultKind, Record};
use crate::scenario::Scenario;

/// What happened so far in a run.
#[derive(Debug, Default)]
pub(super) struct Causes {
    /// A snapshot made what is under an export shorter.
    pub(super) snapshot_shortens: bool,
    /// A reopen did.
    pub(super) reopen_shortens: bool,
    /// Nodes that have another length since what they stand on has.
    pub(super) relengthed: Vec<Rc<str>>,
    /// A reopen came upon a node more than once.
    pub(super) drained_twice: bool,
    /// A stream began whose chain has a raw node on an overlay.
    pub(super) over_raw: bool,
    /// The base of a running stream has no name that would open it as it is.
    pub(super) described: bool,
    /// Streams that succeeded although their last layer had got another backing node, and there was a filter above the old one.
    pub(super) strayed: Vec<Strayed>,
    /// Images that streams have filled.
    pub(super) streamed: Vec<Rc<str>>,
    /// Images of streams that failed after storage did not write or flush something of that very image.
    pub(super) unwritten: Vec<Rc<str>>,
    /// A node with persistent bitmaps was to become read-only, and did not.
    pub(super) left_frozen: bool,
    /// Storage failed a read of something that a copy-on-read filter with `bottom` stands on.
    pub(super) failed_query: bool,
    /// Storage failed something that a filter stands on which gives its snapshot up then.
    pub(super) broken: bool,
    /// Images, by their place in the scenario, that storage failed to write or to flush.
    lost: Vec<u32>,
    /// A stream looked for its base by a file's name among nodes that have a description for a name.
    pub(super) looked: bool,
    /// Nodes above filters of streams, the filters, and their jobs.
    pub(super) filters: BTreeSet<(Rc<str>, Rc<str>, Rc<str>)>,
    /// Where reads through a copy-on-read filter with `bottom` end early: behind the end of the layer below the one that it filters.
    pub(super) unfilled: BTreeSet<(u64, u64)>,
    /// Images and bitmaps that a backup used while the node was read-only: what is stored is what the backup froze.
    pub(super) halved: BTreeSet<(Rc<str>, Rc<str>)>,
}

impl Causes {
    /// A command was carried out.
    pub(super) fn executed(
        &mut self,
        before: &World,
        after: &World,
        execute: &str,
        arguments: &Map<String, Value>,
    ) {
        match execute {
            "blockdev-reopen" => {
                self.drained_twice |= known::visits_twice(before, arguments);
                self.reopen_shortens |= shortens_an_export(before, after);
            }
            "blockdev-snapshot" | "transaction" => {
                self.snapshot_shortens |= shortens_an_export(before, after);
            }
            "block-stream" => {
                self.over_raw |= streams_over_raw(before, arguments);
                let given = Value::Object(arguments.clone());
                self.looked |= looks_among_descriptions(before, &Command::new(execute, &given));
            }
            _ => {}
        }
        self.left_frozen |= known::fails_to_freeze(before, execute, arguments);
        self.relengthed.extend(relengthed(before, after));
    }

    /// What the model is like now.
    pub(super) fn look(&mut self, follower: &Follower) {
        let world = &follower.world;
        self.described |= has_described_base(world) || has_unsure_base(follower);
        self.filters.extend(filters(world));
        self.unfilled.extend(unfilled(world));
        self.halved.extend(halved(world));
    }

    /// This is about to be followed.
    pub(super) fn told(&mut self, scenario: &Scenario, world: &World, record: &Record) {
        if let Record::Fault(fault) = record {
            self.failed(scenario, world, fault);
        }
        match record {
            Record::Fault(fault) if matches!(fault.kind, FaultKind::Write | FaultKind::Flush) => {
                self.lost.push(fault.image);
            }
            Record::Layer(Event::Qmp { name, data }) if *name == "BLOCK_JOB_COMPLETED" => {
                let text = |key: &str| data.get(key).and_then(Value::as_str);
                let failed = text("error").is_some() && text("type") == Some("stream");
                let job = text("device").filter(|_| failed).and_then(|id| world.job(id));
                if let Some(stream) = job.and_then(|job| job.stream()) {
                    let device = world.graph.skip_filters(stream.device);
                    let image = |at: &u32| scenario.images.get(*at as usize).map(|image| &*image.file);
                    let mut lost = self.lost.iter().filter_map(image);
                    let own = world.image_file(device);
                    self.unwritten
                        .extend(own.filter(|own| lost.any(|file| *file == **own)));
                }
            }
            _ => {}
        }
    }

    /// Storage fails a request.
    fn failed(&mut self, scenario: &Scenario, world: &World, fault: &Fault) {
        let Some(file) = fault.file(scenario) else { return };
        let is_below = |id| stands_on(world, id, file);
        for (id, node) in world.graph.nodes() {
            let kept = node.kept.as_ref();
            self.failed_query |= fault.kind == FaultKind::Read && node.bottom.is_some() && is_below(id);
            self.broken |= kept.is_some_and(|kept| kept.on_error == OnError::BreakSnapshot) && is_below(id);
        }
    }

    /// Some job succeeded.
    pub(super) fn succeeded(&mut self, before: &World, after: &World) {
        for job in before.jobs.iter().filter(|job| job.outcome.is_none()) {
            let now = after.job(&job.id).map(|job| job.outcome);
            if now.is_none_or(|outcome| outcome == Some(Outcome::Success)) {
                self.strayed.extend(Strayed::of(before, &job.id));
                let device = job
                    .stream()
                    .map(|stream| before.graph.skip_filters(stream.device));
                self.streamed
                    .extend(device.and_then(|device| before.image_file(device)));
            }
        }
    }
}

/// The known defect that a command which changes the graph would meet.
pub(super) fn met_by_change(world: &World, command: &Command<'_>) -> Option<&'static str> {
    let execute = command.execute;
    let mut after = world.clone();
    after.execute(command).ok()?;
    let arguments = command.arguments.as_object()?;
    if execute == "block-stream" && streams_over_raw(world, arguments) {
        return Some("stream-over-raw-loses-data");
    }
    if shortens_an_export(world, &after) {
        return Some(match execute {
            "blockdev-reopen" => "reopen-shortens-export",
            _ => "snapshot-over-shorter-overlay",
        });
    }
    if relengthed(world, &after).next().is_some() {
        return Some("filter-keeps-length");
    }
    has_described_base(&after).then_some("stream-records-description")
}

/// A stream looks for its base by a file's name, and some node of the chain has a description for a name: over NBD the daemon then
/// goes by what headers say.
pub(super) fn looks_among_descriptions(world: &World, command: &Command<'_>) -> bool {
    let text = |key: &str| command.arguments.get(key).and_then(Value::as_str);
    let device = text("device").and_then(|name| world.graph.find(name));
    command.execute == "block-stream"
        && text("base").is_some()
        && device.is_some_and(|device| {
            let mut nodes = chain(&world.graph, device);
            nodes.any(|node| world.graph.node(node).driver == Driver::Qcow2 && is_described(world, node))
        })
}

/// What some export shows is shorter now. Filters follow in the model, not in the daemon.
fn shortens_an_export(before: &World, after: &World) -> bool {
    let length = |world: &World, root| {
        let graph = &world.graph;
        graph.node(graph.skip_filters(graph.edge(root).child)).length
    };
    after.exports.iter().any(|export| {
        let was = before.export(&export.id).map(|e| length(before, e.root));
        was.is_some_and(|was| length(after, export.root) < was)
    })
}

/// Nodes that stand on others and follow them in the model: those that have another length.
fn relengthed<'a>(before: &'a World, after: &'a World) -> impl Iterator<Item = Rc<str>> + 'a {
    let follows = |driver: Driver| driver.is_filter() || driver == Driver::Raw;
    let nodes = after.graph.nodes().filter(move |(_, node)| follows(node.driver));
    nodes.filter_map(|(_, node)| {
        let was = before.graph.find(&node.name)?;
        (before.graph.node(was).length != node.length).then(|| Rc::clone(&node.name))
    })
}

/// The chain of the stream's device has a raw node on an overlay.
fn streams_over_raw(world: &World, arguments: &Map<String, Value>) -> bool {
    let graph = &world.graph;
    let device = arguments.get("device").and_then(Value::as_str);
    let is_over = |node: &NodeId| {
        let below = graph.primary_child(*node).map(|below| graph.skip_filters(below));
        graph.node(*node).driver == Driver::Raw && below.is_some_and(|below| graph.cow_child(below).is_some())
    };
    device
        .and_then(|name| graph.find(name))
        .is_some_and(|device| chain(graph, device).any(|node| is_over(&node)))
}

pub(super) fn chain(graph: &Graph, top: NodeId) -> impl Iterator<Item = NodeId> + '_ {
    std::iter::successors(Some(top), |node| {
        graph.cow_child(*node).or_else(|| graph.primary_child(*node))
    })
}

/// Nodes above filters of streams, the filters, and their jobs.
fn filters(world: &World) -> impl Iterator<Item = (Rc<str>, Rc<str>, Rc<str>)> + '_ {
    let graph = &world.graph;
    let name = |id: NodeId| Rc::clone(&graph.node(id).name);
    let at_work = world
        .jobs
        .iter()
        .filter_map(|job| Some((job, job.stream()?.filter?)));
    at_work.flat_map(move |(job, filter)| {
        let above = graph.parents(filter).filter_map(|(_, edge)| match edge.parent {
            Parent::Node(above) => Some(above),
            _ => None,
        });
        above.map(move |above| (name(above), name(filter), Rc::clone(&job.id)))
    })
}

/// From where to where reads through copy-on-read filters with `bottom` end early.
fn unfilled(world: &World) -> impl Iterator<Item = (u64, u64)> + '_ {
    let graph = &world.graph;
    let filters = graph.nodes().filter(|(_, node)| node.bottom.is_some());
    filters.filter_map(|(id, _)| {
        let first = graph.skip_filters(id);
        let next = graph.skip_filters(graph.cow_child(first)?);
        let (short, long) = (graph.node(next).length, graph.node(first).length);
        (short < long).then_some((short, long))
    })
}

/// Images, and persistent bitmaps of theirs that a backup uses although the node is read-only.
fn halved(world: &World) -> impl Iterator<Item = (Rc<str>, Rc<str>)> + '_ {
    let frozen = world.graph.nodes().filter(|(_, node)| !node.writable);
    frozen
        .filter_map(|(id, node)| Some((world.image_file(id)?, node)))
        .flat_map(|(file, node)| {
            let used = node
                .bitmaps
                .iter()
                .filter(|bitmap| bitmap.persistent && bitmap.successor.is_some());
            used.map(move |bitmap| (Rc::clone(&file), Rc::clone(&bitmap.name)))
        })
}

/// Some running stream has a base that opens otherwise by its name: below it is not what its header says.
fn has_described_base(world: &World) -> bool {
    let graph = &world.graph;
    world.jobs.iter().any(|job| {
        let base = job
            .stream()
            .and_then(|stream| graph.cow_child(stream.base_overlay));
        base.is_some_and(|base| is_described(world, graph.skip_filters(base)))
    })
}

/// Some running stream has a base with an image in its chain whose header was not written as it should have been: the daemon takes the
/// name that it was to get for what it says.
fn has_unsure_base(follower: &Follower) -> bool {
    let world = &follower.world;
    let unsure = |node| {
        let file = world.image_file(node);
        file.is_some_and(|file| follower.is_header_unsure(&file))
    };
    let streams = world.jobs.iter().filter_map(|job| job.stream());
    let mut bases = streams.filter_map(|stream| world.graph.cow_child(stream.base_overlay));
    bases.any(|base| chain(&world.graph, base).any(unsure))
}

/// Below a node is not what its header says, or a filter that somebody asked for.
fn is_described(world: &World, node: NodeId) -> bool {
    let graph = &world.graph;
    let linked = graph.cow_child(node);
    let below = linked.map(|below| graph.skip_filters(below));
    let mut between = std::iter::successors(linked, |node| graph.filter_child(*node));
    if between.any(|node| graph.node(node).driver.is_filter() && !graph.node(node).implicit) {
        return true;
    }
    let recorded = world.header(node).and_then(|header| header.backing.as_ref());
    match (recorded, below) {
        (None, None) => false,
        (Some(recorded), Some(below)) => {
            world.image_file(below).as_deref() != Some(&*recorded.file) || is_described(world, below)
        }
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::follow::world_of;
    use crate::oracle::tests::scenario_of;

    /// Three images in a row, the topmost exported, and an overlay that is shorter; `c` with this backing option.
    fn world(below: &Value) -> World {
        let scenario = scenario_of(
            r#"{"version":1,"grain":512,"images":[
            {"file":"b","format":"qcow2","size":4096},
            {"file":"c","format":"qcow2","size":4096,"backing-file":"b","backing-format":"qcow2"},
            {"file":"d","format":"qcow2","size":4096,"backing-file":"c","backing-format":"qcow2"},
            {"file":"o","format":"qcow2","size":2048}],"steps":[]}"#,
        );
        let mut world = world_of(&scenario);
        let add = |name: &str, backing: &Value| {
            json!({"driver": "qcow2", "node-name": name, "backing": backing,
                "file": {"driver": "file", "filename": name}})
        };
        let nodes = [
            add("b", &Value::Null),
            add("c", below),
            add("d", &json!("c")),
            add("o", &Value::Null),
        ];
        for node in &nodes {
            let added = world.execute(&Command::new("blockdev-add", node));
            assert!(added.is_ok(), "{added:?}");
        }
        let export = json!({"type": "nbd", "id": "x", "node-name": "d"});
        let added = world.execute(&Command::new("block-export-add", &export));
        assert!(added.is_ok(), "{added:?}");
        world
    }

    fn met(below: &Value, execute: &str, arguments: &Value) -> Option<&'static str> {
        met_by_change(&world(below), &Command::new(execute, arguments))
    }

    #[test]
    fn a_base_that_its_header_does_not_open_as_it_is_is_described() {
        let to_c = json!({"job-id": "j", "device": "d", "base-node": "c"});
        assert_eq!(met(&json!("b"), "block-stream", &to_c), None);
        assert_eq!(
            met(&Value::Null, "block-stream", &to_c),
            Some("stream-records-description")
        );
        let all = json!({"job-id": "j", "device": "d"});
        assert_eq!(met(&Value::Null, "block-stream", &all), None, "there is no base");
    }

    #[test]
    fn only_a_shorter_overlay_under_an_export_is_met() {
        let snapshot = |node| json!({"node": node, "overlay": "o"});
        let below = json!("b");
        assert_eq!(
            met(&below, "blockdev-snapshot", &snapshot("d")),
            Some("snapshot-over-shorter-overlay")
        );
        assert_eq!(met(&below, "blockdev-snapshot", &snapshot("b")), None);
    }
}
