//! What commands that change the graph have to do with known defects.

use blkcheck_model::command::failing::Left;
use blkcheck_model::{Command, Driver, NodeId, World};
use serde_json::{Map, Value};

use super::causes::{happened, is_refused};
use super::{Case, Kind, What};
use crate::scenario::{Action, GuestOp, actions};

/// An empty list.
pub(super) fn reopens_nothing(execute: &str, arguments: &Map<String, Value>) -> bool {
    let options = arguments.get("options").and_then(Value::as_array);
    execute == "blockdev-reopen" && options.is_some_and(Vec::is_empty)
}

/// `blockdev-reopen` would come upon some node more than once.
pub(in crate::compare) fn visits_twice(world: &World, arguments: &Map<String, Value>) -> bool {
    has_double(&world.reopened(&Value::Object(arguments.clone())))
}

/// The same, of any command that reopens: a stream makes its device writable, and a change of what is recorded its image.
pub(super) fn comes_upon_twice(world: &World, execute: &str, arguments: &Map<String, Value>) -> bool {
    match execute {
        "blockdev-reopen" => visits_twice(world, arguments),
        _ => made_writable(world, execute, arguments)
            .is_some_and(|node| !world.graph.node(node).writable && follows_twice(world, node)),
    }
}

/// The node that the command makes writable when it is not.
fn made_writable(world: &World, execute: &str, arguments: &Map<String, Value>) -> Option<NodeId> {
    let name = match execute {
        "block-stream" => "device",
        "change-backing-file" => "image-node-name",
        _ => return None,
    };
    world.graph.find(arguments.get(name)?.as_str()?)
}

/// Some node follows this one by two ways.
fn follows_twice(world: &World, node: NodeId) -> bool {
    has_double(&world.graph.reopened_with(node))
}

fn has_double(visits: &[NodeId]) -> bool {
    (1..visits.len()).any(|at| visits[..at].contains(&visits[at]))
}

/// Something does not move, and a reopen before drained some node twice.
pub(super) fn after_a_double_visit(case: &Case<'_>) -> bool {
    stands_still(case) && happened(case, comes_upon_twice)
}

/// A node is made writable for the command, which is then refused, so that it becomes read-only again.
pub(super) fn reopens_in_vain(world: &World, execute: &str, arguments: &Map<String, Value>) -> bool {
    let value = Value::Object(arguments.clone());
    let command = Command::new(execute, &value);
    let Err(refusal) = world.check(&command) else {
        return false;
    };
    let begins = |words: &[&str]| words.iter().any(|word| refusal.desc.starts_with(word));
    let late = match execute {
        "block-stream" => {
            refusal.early_failed_job.is_some()
                || begins(&[
                    "Could not create node: ",
                    "Could not replace node: ",
                    "Invalid job ID ",
                    "Job ID ",
                ])
        }
        "change-backing-file" => begins(&["Could not change backing file to "]),
        _ => false,
    };
    late && world.clone().command_left(&command, Left::Writable)
}

/// A guest waits, or a job is paused that nobody paused.
pub(super) fn stands_still(case: &Case<'_>) -> bool {
    case.failed == Some(Kind::Hang)
        || (case.what == Some(What::Jobs) && case.model.contains("does not stay paused"))
}

/// A node was made shorter under an export, and the guest asks for the status of what is gone.
pub(super) fn asks_past_the_end(case: &Case<'_>) -> bool {
    let Some(Action::Guest {
        export,
        op: GuestOp::BlockStatus(range),
    }) = case.scenario.steps.get(case.step).map(|step| &step.action)
    else {
        return false;
    };
    let graph = &case.world.graph;
    let export = case
        .world
        .exports
        .iter()
        .find(|e| &*e.name == export || &*e.id == export);
    let length = export.map(|e| graph.node(graph.edge(e.root).child).length);
    length.is_some_and(|length| range.offset + range.length > length)
}

/// Some raw node was given another window.
pub(super) fn reopens_a_window(case: &Case<'_>) -> bool {
    commands(case, "blockdev-reopen").any(|arguments| {
        entries(arguments).any(|entry| {
            let window = entry.contains_key("offset") || entry.contains_key("size");
            window && entry.get("driver").is_some_and(|driver| driver == "raw")
        })
    })
}

/// A qcow2 node's file changes, and then something in the same description cannot.
pub(super) fn loses_file(world: &World, arguments: &Map<String, Value>) -> bool {
    let command = Value::Object(arguments.clone());
    let refused = world.check(&Command::new("blockdev-reopen", &command));
    let unchangeable = refused.is_err_and(|refusal| refusal.desc.starts_with("Cannot change the option"));
    unchangeable && entries(arguments).any(|entry| changes_file(world, entry))
}

/// The same, in this step or before it.
pub(super) fn after_a_lost_file(case: &Case<'_>) -> bool {
    happened(case, |world, execute, arguments| {
        execute == "blockdev-reopen" && loses_file(world, arguments)
    })
}

/// A node that the command comes upon is gone afterwards.
pub(super) fn lets_go_of_listed(world: &World, arguments: &Map<String, Value>) -> bool {
    let command = Value::Object(arguments.clone());
    let listed = world.reopened(&command);
    let mut after = world.clone();
    let done = after.execute(&Command::new("blockdev-reopen", &command)).is_ok();
    done && listed
        .iter()
        .any(|id| after.graph.nodes().all(|(left, _)| left != *id))
}

/// A transaction is refused that would put an overlay above a node, and other nodes are above that overlay. `are_these`: overlay and node.
pub(in crate::compare) fn aborts_a_used_overlay(
    world: &World,
    execute: &str,
    arguments: &Map<String, Value>,
    are_these: impl Fn(&str, &str) -> bool,
) -> bool {
    let used = |(_, data): (&str, &Map<String, Value>)| {
        let (overlay, node) = (data.get("overlay")?.as_str()?, data.get("node")?.as_str()?);
        let mut above = world.graph.parents(world.graph.find(overlay)?);
        Some(above.next().is_some() && are_these(overlay, node))
    };
    is_refused(world, execute, arguments) && actions(execute, arguments).filter_map(used).any(|used| used)
}

/// Of a qcow2 node, to another node.
fn changes_file(world: &World, entry: &Map<String, Value>) -> bool {
    let graph = &world.graph;
    let find = |key: &str| graph.find(entry.get(key)?.as_str()?);
    let node = find("node-name").filter(|node| graph.node(*node).driver == Driver::Qcow2);
    node.zip(find("file")).is_some_and(|(node, file)| {
        // A filter that nobody asked for is passed over.
        let mut has = std::iter::successors(graph.primary_child(node), |below| {
            graph.filter_child(*below).filter(|_| graph.node(*below).implicit)
        });
        has.all(|below| below != file)
    })
}

fn entries(arguments: &Map<String, Value>) -> impl Iterator<Item = &Map<String, Value>> {
    let options = arguments.get("options").and_then(Value::as_array);
    options.into_iter().flatten().filter_map(Value::as_object)
}

/// The commands of this name up to the step.
fn commands<'a>(case: &Case<'a>, name: &'a str) -> impl Iterator<Item = &'a Map<String, Value>> {
    let upto = case.step.saturating_add(1);
    case.scenario
        .steps
        .iter()
        .take(upto)
        .filter_map(move |step| match &step.action {
            Action::Command { execute, arguments } if execute == name => Some(arguments),
            _ => None,
        })
}
