//! What commands did to the graph that some defect needs: judged by the model, before and after.
//!
//! Rules: everything is told of a command that was carried out, with the graph that it met; a matcher asks for it later.
//! Steering asks the same of a command that is still to be sent, on a copy of the model.

use std::rc::Rc;

use blkcheck_model::graph::Graph;
use blkcheck_model::{Command, Driver, NodeId, World};
use serde_json::{Map, Value};

use crate::compare::known;

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
            "block-stream" => self.over_raw |= streams_over_raw(before, arguments),
            _ => {}
        }
        self.relengthed.extend(relengthed(before, after));
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
    relengthed(world, &after).next().map(|_| "filter-keeps-length")
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

fn chain(graph: &Graph, top: NodeId) -> impl Iterator<Item = NodeId> + '_ {
    std::iter::successors(Some(top), |node| {
        graph.cow_child(*node).or_else(|| graph.primary_child(*node))
    })
}
