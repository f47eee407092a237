//! What commands that change the graph have to do with known defects.

use blkcheck_model::{Command, Driver, World};
use serde_json::{Map, Value};

use super::{Case, Kind};
use crate::scenario::Action;

/// An empty list.
pub(super) fn reopens_nothing(execute: &str, arguments: &Map<String, Value>) -> bool {
    let options = arguments.get("options").and_then(Value::as_array);
    execute == "blockdev-reopen" && options.is_some_and(Vec::is_empty)
}

/// `blockdev-reopen` would come upon some node more than once.
pub(super) fn visits_twice(world: &World, arguments: &Map<String, Value>) -> bool {
    let visits = world.reopened(&Value::Object(arguments.clone()));
    (1..visits.len()).any(|at| visits[..at].contains(&visits[at]))
}

/// Something does not move, and a reopen before drained some node twice. Judged by who follows whom now.
pub(super) fn after_a_double_visit(case: &Case<'_>) -> bool {
    case.failed == Some(Kind::Hang)
        && commands(case, "blockdev-reopen").any(|arguments| visits_twice(case.world, arguments))
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
    unchangeable && entries(arguments).any(|entry| names_a_file(world, entry))
}

/// The same, before this step; whether the file was another one cannot be seen any more.
pub(super) fn after_a_lost_file(case: &Case<'_>) -> bool {
    commands(case, "blockdev-reopen").any(|arguments| {
        entries(arguments).any(|entry| {
            let other_driver = entry.get("driver").is_some_and(|driver| driver != "qcow2");
            names_a_file(case.world, entry) && (other_driver || entry.contains_key("force-share"))
        })
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

/// A transaction is refused that would put an overlay above a node, and other nodes are above that overlay.
pub(super) fn aborts_a_used_overlay(case: &Case<'_>) -> bool {
    let actions = case.arguments.get("actions").and_then(Value::as_array);
    let overlay = |action: &Value| {
        let name = action.get("data")?.get("overlay")?.as_str()?;
        case.world.graph.find(name)
    };
    case.execute == "transaction"
        && is_refused(case)
        && actions
            .into_iter()
            .flatten()
            .filter_map(overlay)
            .any(|overlay| case.world.graph.parents(overlay).next().is_some())
}

/// The model refuses the command.
pub(super) fn is_refused(case: &Case<'_>) -> bool {
    let command = Value::Object(case.arguments.clone());
    case.world.check(&Command::new(case.execute, &command)).is_err()
}

fn names_a_file(world: &World, entry: &Map<String, Value>) -> bool {
    let node = entry.get("node-name").and_then(Value::as_str);
    let is_qcow2 = |name| {
        let node = world.graph.find(name);
        node.is_some_and(|node| world.graph.node(node).driver == Driver::Qcow2)
    };
    node.is_some_and(is_qcow2) && entry.get("file").is_some_and(Value::is_string)
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
