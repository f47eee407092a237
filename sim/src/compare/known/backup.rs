//! What the entries about backups look for.

use blkcheck_model::job::Job;
use blkcheck_model::{Command, Driver, NodeId, Outcome, Parent, Refusal, World};
use serde_json::{Map, Value};

use super::causes::{Given, has_bottom, is_refused, past};
use super::strayed::words;
use super::{Around, Case, Kind, What};
use crate::scenario::actions;

const NO_DRAIN: &str = "bdrv_do_drained_end: Assertion `bs->quiesce_counter > 0'";

/// The backups that a transaction is to make: their arguments.
fn backups<'a>(
    execute: &str,
    arguments: &'a Map<String, Value>,
) -> impl Iterator<Item = &'a Map<String, Value>> + use<'a> {
    let backups = actions(execute, arguments).filter(|(kind, _)| *kind == "blockdev-backup");
    backups.map(|(_, data)| data)
}

/// A transaction that is refused, of a backup and another one of the filter of the first: the refusal, and that filter.
fn drains_what_goes(
    world: &World,
    execute: &str,
    arguments: &Map<String, Value>,
) -> Option<(Refusal, String)> {
    let all: Vec<_> = backups(execute, arguments).collect();
    let names = |at: usize, key: &str| all[at].get(key).and_then(Value::as_str);
    let filter = (1..all.len()).find_map(|later| {
        let device = names(later, "device")?;
        let mut earlier = 0..later;
        earlier
            .any(|first| names(first, "filter-node-name") == Some(device))
            .then_some(device)
    })?;
    let command = Value::Object(arguments.clone());
    let refusal = world.check(&Command::new(execute, &command)).err()?;
    Some((refusal, filter.to_owned()))
}

/// The end of a drain finds none, after the backup of a filter was refused since the job of that filter keeps others from it.
pub(super) fn refused_backup_of_filter(case: &Case<'_>) -> bool {
    let met = || drains_what_goes(case.world, case.execute, case.arguments);
    case.failed == Some(Kind::Assert)
        && case
            .qemu
            .contains("bdrv_do_drained_end: Assertion `bs->quiesce_counter > 0'")
        && met()
            .is_some_and(|(refusal, filter)| refusal.desc.starts_with(&format!("Node '{filter}' is busy")))
}

/// Whatever the refusal: the filter may have been drained before.
pub(super) fn refuses_backup_of_filter(around: &Around<'_>) -> bool {
    drains_what_goes(around.world, around.execute, around.arguments).is_some()
}

/// A filter of a backup is part of a frozen chain.
fn has_frozen_filter(world: &World) -> bool {
    let filters = world.jobs.iter().filter_map(|job| job.backup()?.filter);
    let mut links = filters.flat_map(|filter| {
        let above = world.graph.parents(filter).map(|(_, edge)| edge.frozen_by);
        above.collect::<Vec<_>>()
    });
    links.any(|holder| holder.is_some())
}

/// A job ended that had such a filter, now or before the last command.
pub(super) fn backup_ends_in_frozen_chain(case: &Case<'_>) -> bool {
    let last = case.past.last().map(|past| &past.world);
    case.failed == Some(Kind::Assert)
        && case.qemu.contains("bdrv_replace_node_noperm")
        && case.qemu.contains("Cannot change")
        && (has_frozen_filter(case.world) || last.is_some_and(has_frozen_filter))
}

/// A copy-on-read filter is to freeze a chain with a backup's filter in it.
pub(super) fn freezes_backup_filter(around: &Around<'_>) -> bool {
    let backs_up = || around.world.jobs.iter().any(|job| job.backup().is_some());
    if around.execute != "blockdev-add" || !has_bottom(around.arguments) || !backs_up() {
        return false;
    }
    let command = Value::Object(around.arguments.clone());
    let mut after = around.world.clone();
    after.execute(&Command::new(around.execute, &command)).is_ok() && has_frozen_filter(&after)
}

/// A group of at least two backups that are made, and a later action that is refused.
pub(in crate::compare) fn gives_up_group(
    world: &World,
    execute: &str,
    arguments: &Map<String, Value>,
) -> bool {
    let grouped = arguments
        .get("properties")
        .and_then(|all| all.get("completion-mode"));
    if grouped.is_none_or(|mode| mode != "grouped") || backups(execute, arguments).count() < 2 {
        return false;
    }
    let command = Value::Object(arguments.clone());
    let refusal = world.check(&Command::new(execute, &command)).err();
    refusal.is_some_and(|refusal| refusal.taken_back.len() > 1)
}

pub(super) fn refused_group_hangs(case: &Case<'_>) -> bool {
    case.failed == Some(Kind::Hang) && gives_up_group(case.world, case.execute, case.arguments)
}

pub(super) fn refuses_group(around: &Around<'_>) -> bool {
    gives_up_group(around.world, around.execute, around.arguments)
}

/// A stream that makes its device writable, where a backup with a speed reads an image that then has to read its tables again. It may
/// be refused later, with its filter.
fn reopens_below_slow_copy(world: &World, execute: &str, arguments: &Map<String, Value>) -> bool {
    let graph = &world.graph;
    let device = arguments.get("device").and_then(Value::as_str);
    let Some(device) = device.and_then(|name| graph.find(name)) else {
        return false;
    };
    let reopened = graph.topological([device]);
    let slow = world
        .jobs
        .iter()
        .filter(|job| job.speed > 0 && job.outcome.is_none());
    let mut sources = slow.filter_map(|job| job.backup().map(|backup| backup.source));
    let reads = |source: NodeId| {
        let mut layers = graph.topological([source]).into_iter();
        layers.any(|node| graph.node(node).driver == Driver::Qcow2 && reopened.contains(&node))
    };
    execute == "block-stream" && !graph.node(graph.skip_filters(device)).writable && sources.any(reads)
}

pub(super) fn slow_copy_misses_pause(case: &Case<'_>) -> bool {
    case.failed == Some(Kind::Hang) && reopens_below_slow_copy(case.world, case.execute, case.arguments)
}

pub(super) fn pauses_slow_copy(around: &Around<'_>) -> bool {
    reopens_below_slow_copy(around.world, around.execute, around.arguments)
}

/// Deletes what a backup is a copy of, and what is no longer below the filter.
fn deletes_source(world: &World, execute: &str, arguments: &Map<String, Value>) -> bool {
    let name = arguments.get("node-name").and_then(Value::as_str);
    let node = name.and_then(|name| world.graph.find(name));
    let held = |id| world.graph.node(id).held_by_jobs > 0 && world.graph.node(id).parents.is_empty();
    execute == "blockdev-del" && node.is_some_and(held)
}

pub(super) fn backup_loses_source(case: &Case<'_>) -> bool {
    deletes_source(case.world, case.execute, case.arguments)
        && (case.failed.is_some() || (case.what == Some(What::Result) && case.qemu == "accepted"))
}

pub(super) fn takes_source(around: &Around<'_>) -> bool {
    deletes_source(around.world, around.execute, around.arguments)
}

/// The filter of a backup is all that holds its source, and nothing is above the filter: when that goes, the source goes with it.
/// `now`: other jobs hold it as well, as long as they are there.
fn holds_alone(world: &World, now: bool) -> bool {
    let graph = &world.graph;
    let backups = world.jobs.iter().filter_map(Job::backup);
    let mut pairs = backups.filter_map(|backup| Some((backup.source, backup.filter?)));
    pairs.any(|(source, filter)| {
        let of_job = |parent: &Parent| matches!(parent, Parent::Job(..));
        let mut above = graph.parents(source);
        let mut users = graph.parents(filter);
        !graph.node(source).monitor_owned
            && above.all(|(_, edge)| edge.parent == Parent::Node(filter) || (!now && of_job(&edge.parent)))
            && users.all(|(_, edge)| of_job(&edge.parent))
    })
}

/// The end of a drain finds none, when the job may have ended: now, or before the last command.
pub(super) fn backup_frees_source(case: &Case<'_>) -> bool {
    let last = case.past.last().map(|past| &past.world);
    case.failed == Some(Kind::Assert)
        && case.qemu.contains(NO_DRAIN)
        && (holds_alone(case.world, true) || last.is_some_and(|last| holds_alone(last, true)))
}

/// Somebody else lets go of the source: at once, or at the end of a stream that is to begin.
pub(super) fn leaves_source_alone(around: &Around<'_>) -> bool {
    let backs_up = || around.world.jobs.iter().any(|job| job.backup().is_some());
    if !LETS_GO.contains(&around.execute) || !backs_up() {
        return false;
    }
    let command = Value::Object(around.arguments.clone());
    let mut after = around.world.clone();
    if after.execute(&Command::new(around.execute, &command)).is_err() {
        return false;
    }
    let streams = after
        .jobs
        .iter()
        .filter(|job| job.stream().is_some() && job.outcome.is_none());
    let streams: Vec<_> = streams.map(|job| job.id.clone()).collect();
    let at_once = holds_alone(&after, false);
    for id in streams {
        let _ = after.job_completed(&id, Outcome::Success);
    }
    at_once || holds_alone(&after, false)
}

/// Commands that take somebody from above a node.
const LETS_GO: [&str; 6] = [
    "block-stream",
    "blockdev-reopen",
    "blockdev-del",
    "block-export-del",
    "blockdev-backup",
    "transaction",
];

/// One transaction makes a backup of the upper layer alone and then puts an overlay above that layer. The target lacks what the
/// layer held: it holds nothing there, or what it held before.
pub(super) fn backup_of_overlay(case: &Case<'_>) -> bool {
    let mut past = past(case).zip(steps(case));
    matches!(case.what, Some(What::Content | What::Allocation))
        && past.any(|(given, step)| {
            let mut targets = emptied_targets(given).into_iter();
            targets.any(|target| lacks(case, given.0, target, step))
        })
}

/// The steps of what `past` gives.
fn steps(case: &Case<'_>) -> impl Iterator<Item = usize> {
    case.past.iter().map(|past| past.step).chain([case.step])
}

/// The targets of a transaction's backups that ask an overlay what the layer below holds.
fn emptied_targets((world, execute, arguments): Given<'_>) -> Vec<NodeId> {
    let graph = &world.graph;
    let node = |data: &Map<String, Value>, key: &str| graph.find(data.get(key)?.as_str()?);
    let all: Vec<_> = actions(execute, arguments).collect();
    let targets = (0..all.len()).filter_map(|at| {
        let (kind, backup) = all[at];
        let device = node(backup, "device").filter(|_| kind == "blockdev-backup")?;
        let top = backup.get("sync").is_some_and(|sync| sync == "top");
        let layer = graph.skip_filters(device);
        let covers = |(kind, data): &(&str, &Map<String, Value>)| {
            let covered = node(data, "node").filter(|_| *kind == "blockdev-snapshot");
            covered.is_some_and(|covered| covered == device || covered == layer)
        };
        (top && all[at + 1..].iter().any(covers)).then(|| node(backup, "target"))?
    });
    let targets: Vec<NodeId> = targets.collect();
    if targets.is_empty() || is_refused(world, execute, arguments) {
        return Vec::new();
    }
    targets
}

/// The difference is about this target or its image, and about what was there when that step was carried out; and the daemon has
/// nothing there, or what was there before that step.
fn lacks(case: &Case<'_>, before: &World, target: NodeId, step: usize) -> bool {
    let name = before.graph.name(target);
    let file = before.image_file(before.graph.skip_filters(target));
    let now = &case.world.graph;
    let shows = |word: &str| {
        let node = now.find(word);
        node.is_some_and(|node| {
            now.topological([node])
                .iter()
                .any(|below| now.name(*below) == name)
        })
    };
    let about = match case.what {
        Some(What::Allocation) => words(case.model).any(|word| file.as_deref() == Some(word)),
        _ => words(case.model).any(shows) || case.asked().is_some_and(shows),
    };
    about
        && !is_newer(case.model, step)
        && (NOTHING.contains(&case.qemu) || was_there(case, before, target, step))
}

/// What the model has there was written by a later step.
fn is_newer(model: &str, step: usize) -> bool {
    let writer = model.split("the write of step ").nth(1);
    let digits = writer.map(|text| {
        text.split(|c: char| !c.is_ascii_digit())
            .next()
            .unwrap_or_default()
    });
    digits.is_some_and(|digits| digits.parse().is_ok_and(|writer: usize| writer >= step))
}

/// How the daemon shows a cluster that holds no data.
const NOTHING: [&str; 3] = ["not allocated", "Zero", "block status says zeroes"];

/// A guest wrote it before the step, or it was in the image, or in one below, from the beginning.
fn was_there(case: &Case<'_>, before: &World, target: NodeId, step: usize) -> bool {
    let number = |before: &str, behind: &str| -> Option<usize> {
        let rest = case.qemu.strip_prefix(before)?;
        rest[..rest.find(behind)?].parse().ok()
    };
    if let Some(writer) = number("Stamp(Step(StepId(", ")") {
        return writer < step;
    }
    let file = number("Stamp(Fill { image: ", ",").and_then(|image| case.scenario.images.get(image));
    let chain = before.graph.topological([target]);
    let mut names = chain.iter().filter_map(|node| before.image_file(*node));
    file.is_some_and(|image| names.any(|name| *name == *image.file))
}

/// A transaction is taken back after it has made a backup that always brings its bitmap up to date, and the daemon has all of
/// that very bitmap set.
pub(super) fn fills_bitmap(case: &Case<'_>) -> bool {
    if case.what != Some(What::Bitmaps) {
        return false;
    }
    let command = Value::Object(case.arguments.clone());
    let refusal = case.world.check(&Command::new(case.execute, &command)).err();
    let made = refusal.map_or(0, |refusal| refusal.taken_back.len());
    let mut made = backups(case.execute, case.arguments).take(made);
    made.any(|backup| {
        backup.get("bitmap-mode").is_some_and(|mode| mode == "always") && is_all_set(case, backup)
    })
}

/// Both tell of the bitmap of this backup, and in the daemon all of it is dirty, in the model not.
fn is_all_set(case: &Case<'_>, backup: &Map<String, Value>) -> bool {
    let text = |key: &str| backup.get(key).and_then(Value::as_str);
    let (Some(device), Some(name)) = (text("device"), text("bitmap")) else {
        return false;
    };
    let graph = &case.world.graph;
    let Some(node) = graph.find(device).map(|id| graph.node(id)) else {
        return false;
    };
    let Some(bitmap) = node.bitmaps.iter().find(|bitmap| &*bitmap.name == name) else {
        return false;
    };
    let whole = format!(
        "count: Some({})",
        node.length.next_multiple_of(bitmap.granularity)
    );
    let named = format!("bitmap '{name}' of node '{device}': ");
    case.model.starts_with(&named)
        && case.qemu.starts_with(&named)
        && !case.model.contains(&whole)
        && case.qemu.contains(&whole)
}

/// A transaction that is taken back after it has made a backup which always brings its bitmap up to date, and after an earlier action
/// that is taken back by doing something to that very bitmap.
pub(in crate::compare) fn frees_bitmap(world: &World, execute: &str, arguments: &Map<String, Value>) -> bool {
    const UNDONE: [&str; 5] = [
        "block-dirty-bitmap-add",
        "block-dirty-bitmap-clear",
        "block-dirty-bitmap-enable",
        "block-dirty-bitmap-disable",
        "block-dirty-bitmap-merge",
    ];
    let command = Value::Object(arguments.clone());
    let refusal = world.check(&Command::new(execute, &command)).err();
    let made = refusal.map_or(0, |refusal| refusal.taken_back.len());
    let all: Vec<_> = actions(execute, arguments).collect();
    let node = |data: &Map<String, Value>, key: &str| world.graph.find(data.get(key)?.as_str()?);
    let is_backup = |at: &usize| all[*at].0 == "blockdev-backup";
    let mut made = (0..all.len()).filter(is_backup).take(made);
    made.any(|at| {
        let backup = all[at].1;
        let undone = |(kind, data): &(&str, &Map<String, Value>)| {
            let name = data.get(match *kind {
                "block-dirty-bitmap-merge" => "target",
                _ => "name",
            });
            UNDONE.contains(kind)
                && name == backup.get("bitmap")
                && node(data, "node") == node(backup, "device")
        };
        backup.get("bitmap-mode").is_some_and(|mode| mode == "always") && all[..at].iter().any(undone)
    })
}

pub(super) fn aborted_backup_frees_bitmap(case: &Case<'_>) -> bool {
    matches!(case.failed, Some(Kind::Assert | Kind::Crash))
        && frees_bitmap(case.world, case.execute, case.arguments)
}

pub(super) fn frees_bitmap_in_use(around: &Around<'_>) -> bool {
    frees_bitmap(around.world, around.execute, around.arguments)
}
