//! What in a graph or in the commands so far can be the cause of a defect.

use blkcheck_model::{Command, Driver, World};
use serde_json::{Map, Value};

use super::{Case, Past};
use crate::scenario::{Action, Scenario, actions};

pub(in crate::compare) fn has_negative_null_co(options: &Map<String, Value>) -> bool {
    let negative = options.get("driver").is_some_and(|d| d == "null-co")
        && options
            .get("size")
            .and_then(Value::as_i64)
            .is_some_and(|size| size < 0);
    negative
        || options
            .values()
            .filter_map(Value::as_object)
            .any(has_negative_null_co)
}

/// Some copy-on-read filter that is to be added has a `bottom` that exists, is no filter and not below it.
pub(in crate::compare) fn has_bottom_outside(
    world: &World,
    execute: &str,
    options: &Map<String, Value>,
) -> bool {
    let inner = || options.values().filter_map(Value::as_object);
    if execute != "blockdev-add" {
        return false;
    }
    if options.get("driver").is_none_or(|d| d != "copy-on-read") {
        return inner().any(|o| has_bottom_outside(world, execute, o));
    }
    let node = |key: &str| {
        options
            .get(key)
            .and_then(Value::as_str)
            .and_then(|name| world.graph.find(name))
    };
    let Some(bottom) = node("bottom") else {
        return inner().any(|o| has_bottom_outside(world, execute, o));
    };
    match node("file") {
        Some(file) => {
            !world.graph.node(bottom).driver.is_filter() && !world.graph.chain_contains(file, bottom)
        }
        // A node that exists is not below one that is opened now, unless by reference.
        None => options.get("file").is_some_and(Value::is_object),
    }
}

/// Some copy-on-read filter that is to be added has the end of its chain for `bottom`, right below itself.
pub(in crate::compare) fn bottoms_out(world: &World, options: &Map<String, Value>) -> bool {
    let inner = || {
        options
            .values()
            .filter_map(Value::as_object)
            .any(|o| bottoms_out(world, o))
    };
    let text = |key: &str| options.get(key).and_then(Value::as_str);
    let (Some("copy-on-read"), Some(bottom)) = (text("driver"), text("bottom")) else {
        return inner();
    };
    match options.get("file") {
        Some(Value::String(file)) => world.graph.find(file).is_some_and(|file| {
            let graph = &world.graph;
            let first = graph.skip_filters(file);
            graph.name(first) == bottom
        }),
        Some(Value::Object(file)) => file.get("node-name").is_some_and(|n| n == bottom) || inner(),
        _ => false,
    }
}

/// There is a filter whose bottom is the very layer that it filters. A stream's own filter is one, too, when its base is
/// right below its device.
pub(in crate::compare) fn has_bottom_on_top(world: &World) -> bool {
    let graph = &world.graph;
    graph
        .nodes()
        .any(|(id, node)| node.bottom == Some(graph.skip_filters(id)))
}

/// A transaction that the model refuses has a snapshot to this overlay, and goes on after it.
pub(in crate::compare) fn takes_back_a_snapshot(
    (world, execute, arguments): Given<'_>,
    overlay: impl Fn(&str) -> bool,
) -> bool {
    let snapshots = |(kind, data): (&str, &Map<String, Value>)| {
        let to = data.get("overlay").and_then(Value::as_str);
        kind == "blockdev-snapshot" && to.is_some_and(&overlay)
    };
    actions(execute, arguments).rev().skip(1).any(snapshots) && is_refused(world, execute, arguments)
}

/// Some argument names one of these nodes, those of lists of options and of actions, too.
pub(super) fn names_any(arguments: &Map<String, Value>, nodes: &[String]) -> bool {
    fn names(value: &Value, nodes: &[String]) -> bool {
        match value {
            Value::String(s) => nodes.contains(s),
            Value::Array(list) => list.iter().any(|value| names(value, nodes)),
            Value::Object(inner) => inner.values().any(|value| names(value, nodes)),
            _ => false,
        }
    }
    arguments.values().any(|value| names(value, nodes))
}

/// There is a raw node over an image that has a backing file.
pub(in crate::compare) fn has_raw_on_overlay(world: &World) -> bool {
    let graph = &world.graph;
    graph.nodes().any(|(id, node)| {
        let below = graph.primary_child(id).map(|below| graph.skip_filters(below));
        node.driver == Driver::Raw && below.is_some_and(|below| graph.cow_child(below).is_some())
    })
}

pub(in crate::compare) fn is_uneven(scenario: &Scenario) -> bool {
    scenario.images.iter().any(|i| i.size != scenario.images[0].size)
}

pub(super) fn streams(scenario: &Scenario, before: usize) -> bool {
    let is_stream = |step: &crate::scenario::Step| matches!(&step.action, Action::Command { execute, .. } if execute == "block-stream");
    scenario
        .steps
        .iter()
        .take(before.saturating_add(1))
        .any(is_stream)
}

/// A command, and the model before it.
pub(in crate::compare) type Given<'a> = (&'a World, &'a str, &'a Map<String, Value>);

/// The commands so far with the model that they met, and that of this step.
pub(super) fn past<'a>(case: &'a Case<'_>) -> impl Iterator<Item = Given<'a>> {
    let command = |past: &'a Past| match &case.scenario.steps.get(past.step)?.action {
        Action::Command { execute, arguments } => Some((&past.world, execute.as_str(), arguments)),
        _ => None,
    };
    // It was not answered, or not as the model says.
    let is_open = case.past.iter().all(|past| past.step < case.step);
    let open = is_open.then_some((case.world, case.execute, case.arguments));
    case.past.iter().filter_map(command).chain(open)
}

/// Some command so far had this cause.
pub(super) fn happened(case: &Case<'_>, what: fn(&World, &str, &Map<String, Value>) -> bool) -> bool {
    past(case).any(|(world, execute, arguments)| what(world, execute, arguments))
}

/// The model refuses the command.
pub(super) fn is_refused(world: &World, execute: &str, arguments: &Map<String, Value>) -> bool {
    let arguments = Value::Object(arguments.clone());
    world.check(&Command::new(execute, &arguments)).is_err()
}

/// The commands so far, those of transactions one by one, with their arguments.
pub(super) fn commands<'a>(case: &'a Case<'_>) -> impl Iterator<Item = (&'a str, &'a Map<String, Value>)> {
    let last = case.step.min(case.scenario.steps.len().saturating_sub(1));
    let steps = case.scenario.steps.iter().take(last + 1);
    steps.flat_map(|step| {
        let Action::Command { execute, arguments } = &step.action else {
            return Vec::new();
        };
        let itself = [(execute.as_str(), arguments)];
        actions(execute, arguments).chain(itself).collect()
    })
}

pub(super) fn has_step(case: &Case<'_>, name: &str) -> bool {
    commands(case).any(|(execute, _)| execute == name)
}

/// Some blockdev-reopen names a node twice.
pub(super) fn reopens_twice(case: &Case<'_>) -> bool {
    commands(case)
        .filter(|(execute, _)| *execute == "blockdev-reopen")
        .any(|(_, arguments)| {
            let options = arguments.get("options").and_then(Value::as_array);
            let names: Vec<&Value> = options
                .into_iter()
                .flatten()
                .filter_map(|o| o.get("node-name"))
                .collect();
            names
                .iter()
                .enumerate()
                .any(|(at, name)| names[..at].contains(name))
        })
}

/// Some snapshot put an image on top that is shorter than another one, or may have been made so.
pub(super) fn has_shorter_overlay(case: &Case<'_>) -> bool {
    let size = |file: &str| {
        case.scenario
            .images
            .iter()
            .find(|i| i.file == file)
            .map(|i| i.size)
    };
    let longest = case.scenario.images.iter().map(|i| i.size).max();
    commands(case)
        .filter(|(execute, _)| *execute == "blockdev-snapshot")
        .any(|(_, arguments)| {
            let overlay = arguments.get("overlay").and_then(Value::as_str);
            let resized = commands(case).any(|(execute, resize)| {
                execute == "block_resize"
                    && overlay.is_some()
                    && resize.get("node-name").and_then(Value::as_str) == overlay
            });
            let file = overlay.and_then(|node| commands(case).find_map(|(_, add)| file_of(add, node)));
            resized || file.and_then(size).is_some_and(|size| Some(size) < longest)
        })
}

/// The image that these options open under this node name.
fn file_of<'a>(options: &'a Map<String, Value>, node: &str) -> Option<&'a str> {
    if options.get("node-name").is_some_and(|n| n == node) {
        let mut at = options;
        while let Some(below) = at
            .get("file")
            .or_else(|| at.get("image"))
            .and_then(Value::as_object)
        {
            at = below;
        }
        return at.get("filename").and_then(Value::as_str);
    }
    options
        .values()
        .filter_map(Value::as_object)
        .find_map(|inner| file_of(inner, node))
}

/// Some raw node is described that stands on something else than a file, or may do so later.
pub(super) fn has_raw(options: &Map<String, Value>, later: bool) -> bool {
    let is_raw = options.get("driver").is_some_and(|driver| driver == "raw");
    let on_image =
        |file: &Value| file.get("driver").is_some_and(|driver| driver == "qcow2") || file.is_string();
    let inner = || options.values().filter_map(Value::as_object);
    (is_raw && (later || options.get("file").is_some_and(on_image))) || inner().any(|o| has_raw(o, later))
}

/// Some copy-on-read filter has a `bottom`.
pub(super) fn has_bottom(options: &Map<String, Value>) -> bool {
    options.contains_key("bottom") || options.values().filter_map(Value::as_object).any(has_bottom)
}
