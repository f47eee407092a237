//! What commands on dirty bitmaps have to do with known defects.

use blkcheck_model::{Bitmap, Command, Node, NodeId, World};
use serde_json::{Map, Value};

use super::causes::{Given, happened, is_refused, past};
use super::{Case, What, graph};
use crate::scenario::actions;

const ENABLE: &str = "block-dirty-bitmap-enable";
const MERGE: &str = "block-dirty-bitmap-merge";

/// What a command does, one by one: itself, or the actions of a transaction.
fn parts<'a>(
    execute: &'a str,
    arguments: &'a Map<String, Value>,
) -> impl Iterator<Item = (&'a str, &'a Map<String, Value>)> {
    std::iter::once((execute, arguments)).chain(actions(execute, arguments))
}

/// Merges an empty list into something.
pub(super) fn merges_nothing(execute: &str, arguments: &Map<String, Value>) -> bool {
    parts(execute, arguments).any(|(kind, data)| {
        kind == MERGE
            && data
                .get("bitmaps")
                .and_then(Value::as_array)
                .is_some_and(Vec::is_empty)
    })
}

/// A transaction that is refused and has an action that enables a bitmap which is not there before.
pub(in crate::compare) fn enables_missing(
    world: &World,
    execute: &str,
    arguments: &Map<String, Value>,
) -> bool {
    enables(world, execute, arguments, |bitmap| bitmap.is_none())
}

/// The same with a bitmap that takes no commands.
pub(super) fn enables_unusable(world: &World, execute: &str, arguments: &Map<String, Value>) -> bool {
    enables(world, execute, arguments, |bitmap| {
        bitmap.is_some_and(|bitmap| bitmap.is_busy() || bitmap.inconsistent)
    }) || enables_removed(execute, arguments)
}

/// An action removes what a later one enables.
fn enables_removed(execute: &str, arguments: &Map<String, Value>) -> bool {
    execute == "transaction"
        && parts(execute, arguments).any(|(kind, removed)| {
            kind == "block-dirty-bitmap-remove"
                && parts(execute, arguments).any(|(kind, data)| kind == ENABLE && data == removed)
        })
}

fn enables(
    world: &World,
    execute: &str,
    arguments: &Map<String, Value>,
    which: impl Fn(Option<&Bitmap>) -> bool,
) -> bool {
    execute == "transaction"
        && is_refused(world, execute, arguments)
        && parts(execute, arguments).any(|(kind, data)| kind == ENABLE && which(bitmap(world, data)))
}

fn bitmap<'a>(world: &'a World, data: &Map<String, Value>) -> Option<&'a Bitmap> {
    let node = world.graph.find(data.get("node")?.as_str()?)?;
    let name = data.get("name")?.as_str()?;
    world
        .graph
        .node(node)
        .bitmaps
        .iter()
        .find(|bitmap| &*bitmap.name == name)
}

/// Takes a node away, or its length, while an export of another node shows one of its bitmaps.
pub(super) fn takes_what_is_shown(world: &World, execute: &str, arguments: &Map<String, Value>) -> bool {
    let any = |id: &NodeId, busy: fn(&Bitmap) -> bool| world.graph.node(*id).bitmaps.iter().any(busy);
    let shown = |bitmap: &Bitmap| bitmap.shown_by.is_some();
    let used = |bitmap: &Bitmap| bitmap.shown_by.is_some() || bitmap.successor.is_some();
    let name = arguments.get("node-name").and_then(Value::as_str);
    let node = name.and_then(|name| world.graph.find(name));
    // Another length is passed on through filters.
    let mut below = std::iter::successors(node, |id| world.graph.filter_child(*id));
    match execute {
        "blockdev-del" => node.is_some_and(|id| any(&id, shown)),
        "block_resize" => below.any(|id| any(&id, used)),
        _ => false,
    }
}

/// Tries to make a writable node with persistent bitmaps read-only, and fails.
pub(in crate::compare) fn fails_to_freeze(
    world: &World,
    execute: &str,
    arguments: &Map<String, Value>,
) -> bool {
    let persistent = |world: &World, id| {
        let node = world.graph.get(id);
        node.is_some_and(|node| node.writable && node.bitmaps.iter().any(|bitmap| bitmap.persistent))
    };
    let value = Value::Object(arguments.clone());
    match execute {
        "blockdev-reopen" => {
            is_refused(world, execute, arguments)
                && world.reopened(&value).into_iter().any(|id| persistent(world, id))
        }
        "blockdev-snapshot" | "transaction" => {
            let mut after = world.clone();
            let accepted = after.execute(&Command::new(execute, &value)).is_ok();
            accepted
                && parts(execute, arguments).any(|(kind, data)| {
                    let node = data.get("node").and_then(Value::as_str);
                    let id = node.and_then(|node| world.graph.find(node));
                    kind == "blockdev-snapshot" && id.is_some_and(|id| persistent(&after, id))
                })
        }
        _ => false,
    }
}

/// Makes a node read-only while a backup uses one of its persistent bitmaps.
pub(super) fn freezes_in_use(world: &World, execute: &str, arguments: &Map<String, Value>) -> bool {
    let in_use = |bitmap: &Bitmap| bitmap.persistent && bitmap.successor.is_some();
    let used = |(_, node): &(NodeId, &Node)| node.writable && node.bitmaps.iter().any(in_use);
    let mut nodes = world.graph.nodes().filter(used).peekable();
    if nodes.peek().is_none() || !matches!(execute, "blockdev-reopen" | "blockdev-snapshot" | "transaction") {
        return false;
    }
    let mut after = world.clone();
    let accepted = after.execute(&Command::new(execute, &Value::Object(arguments.clone())));
    let freezes = |(id, _)| after.graph.get(id).is_some_and(|node| !node.writable);
    accepted.is_ok() && nodes.any(freezes)
}

/// What the backup leaves of its bitmap takes changes, although its node is read-only; or the image holds the frozen half of it.
pub(super) fn after_a_freeze_in_use(case: &Case<'_>) -> bool {
    match case.what {
        Some(What::Result) => {
            case.qemu == "accepted"
                && case.model.contains("is readonly and cannot be modified")
                && happened(case, freezes_in_use)
        }
        Some(What::Bitmaps) => holds_half(case),
        _ => false,
    }
}

/// What an image is said to hold is a bitmap of a read-only node that a backup uses. How it came to be stored does not matter:
/// a stream that ends makes its read-only device read-only again, too.
fn holds_half(case: &Case<'_>) -> bool {
    let in_use = |bitmap: &&Bitmap| bitmap.persistent && bitmap.successor.is_some();
    let frozen = case.world.graph.nodes().filter(|(_, node)| !node.writable);
    frozen.into_iter().any(|(id, node)| {
        let stored = case.world.header(id).map_or(&[][..], |header| &header.bitmaps);
        node.bitmaps.iter().filter(in_use).any(|bitmap| {
            let whole = stored.iter().find(|stored| stored.name == bitmap.name);
            whole.is_some_and(|whole| case.model.ends_with(&format!("holds {whole:?}")))
        })
    })
}

/// Bitmaps are frozen by something that failed before, and so are guests' writes.
pub(super) fn after_a_failed_freeze(case: &Case<'_>) -> bool {
    let shows = match case.what {
        Some(What::Content) => case.qemu.contains("fails with errno 1"),
        Some(What::Result) => case.qemu.contains("is readonly and cannot be modified"),
        Some(What::Bitmaps) => true,
        _ => false,
    };
    shows && happened(case, fails_to_freeze)
}

/// A refused stream made its read-only device writable and read-only again, which stored its new bitmaps. What differs is about
/// one of these.
pub(super) fn after_a_refused_stream(case: &Case<'_>) -> bool {
    let stored: Vec<(String, String)> = past(case).flat_map(stored_in_vain).collect();
    let named = |text: &str, name: &str| {
        text.contains(&format!("itmap '{name}'")) || text.contains(&format!("name: \"{name}\""))
    };
    stored.iter().any(|(node, name)| match case.what {
        Some(What::Result) => {
            let read_only = format!("Bitmap '{name}' is readonly and cannot be modified");
            // The daemon goes on, and may meet another refusal.
            let unstored = || has_new(case.world, node, name) && case.model.ends_with("No write access");
            case.qemu.contains(&read_only) || unstored()
        }
        Some(What::Bitmaps) => named(case.model, name) || named(case.qemu, name),
        _ => false,
    })
}

/// Nodes and bitmaps.
fn stored_in_vain((world, execute, arguments): Given<'_>) -> Vec<(String, String)> {
    let device = arguments.get("device").and_then(Value::as_str);
    let device = device.and_then(|name| world.graph.find(name));
    let Some(device) = device.filter(|_| execute == "block-stream") else {
        return Vec::new();
    };
    let node = world.graph.node(device);
    let new = node.bitmaps.iter().filter(|bitmap| is_new(bitmap));
    let new: Vec<_> = new
        .map(|bitmap| (node.name.to_string(), bitmap.name.to_string()))
        .collect();
    if new.is_empty() || !graph::reopens_in_vain(world, execute, arguments) {
        return Vec::new();
    }
    new
}

/// Of a read-only node: it was added there.
fn is_new(bitmap: &Bitmap) -> bool {
    bitmap.persistent && !bitmap.read_only
}

fn has_new(world: &World, node: &str, name: &str) -> bool {
    let node = world.graph.find(node).map(|id| world.graph.node(id));
    node.is_some_and(|node| node.bitmaps.iter().any(|b| &*b.name == name && is_new(b)))
}
