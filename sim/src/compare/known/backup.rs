//! What the entries about backups look for.

use blkcheck_model::{Command, World};
use serde_json::{Map, Value};

use super::{Around, Case, Kind, What};

/// The backups that a transaction is to make: their arguments.
fn backups<'a>(execute: &str, arguments: &'a Map<String, Value>) -> Vec<&'a Value> {
    if execute != "transaction" {
        return Vec::new();
    }
    let actions = arguments.get("actions").and_then(Value::as_array);
    let actions = actions.into_iter().flatten();
    let backups = actions.filter(|action| action["type"] == "blockdev-backup");
    backups.map(|action| &action["data"]).collect()
}

/// A transaction that is refused, of a backup and another one of the filter of the first.
fn drains_what_goes(world: &World, execute: &str, arguments: &Map<String, Value>) -> bool {
    let all = backups(execute, arguments);
    let names = |at: usize, key: &str| all[at].get(key).and_then(Value::as_str);
    let meets = (1..all.len()).any(|later| {
        let device = names(later, "device");
        device.is_some() && (0..later).any(|first| names(first, "filter-node-name") == device)
    });
    let command = Value::Object(arguments.clone());
    meets && world.check(&Command::new(execute, &command)).is_err()
}

pub(super) fn refused_backup_of_filter(case: &Case<'_>) -> bool {
    case.failed.is_some() && drains_what_goes(case.world, case.execute, case.arguments)
}

pub(super) fn refuses_backup_of_filter(around: &Around<'_>) -> bool {
    drains_what_goes(around.world, around.execute, around.arguments)
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

pub(super) fn backup_ends_in_frozen_chain(case: &Case<'_>) -> bool {
    case.failed == Some(Kind::Assert)
        && case.qemu.contains("bdrv_replace_node_noperm")
        && case.qemu.contains("Cannot change")
}

/// A copy-on-read filter is to freeze a chain with a backup's filter in it.
pub(super) fn freezes_backup_filter(around: &Around<'_>) -> bool {
    if around.execute != "blockdev-add" || around.world.jobs.iter().all(|job| job.backup().is_none()) {
        return false;
    }
    let command = Value::Object(around.arguments.clone());
    let mut after = around.world.clone();
    after.execute(&Command::new(around.execute, &command)).is_ok() && has_frozen_filter(&after)
}

/// A group of at least two backups that are made, and a later action that is refused.
fn gives_up_group(world: &World, execute: &str, arguments: &Map<String, Value>) -> bool {
    let grouped = arguments
        .get("properties")
        .and_then(|all| all.get("completion-mode"));
    if grouped.is_none_or(|mode| mode != "grouped") || backups(execute, arguments).len() < 2 {
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

/// One transaction makes a backup of the upper layer alone and puts an overlay above its source.
pub(super) fn backup_of_overlay(case: &Case<'_>) -> bool {
    let steps = case.scenario.steps.get(..=case.step).unwrap_or_default();
    let mixed = |step: &crate::scenario::Step| match &step.action {
        crate::scenario::Action::Command { execute, arguments } if execute == "transaction" => {
            let actions = arguments.get("actions").and_then(Value::as_array);
            let snapshots = |action: &&Value| action["type"] == "blockdev-snapshot";
            let top = backups(execute, arguments)
                .iter()
                .any(|backup| backup["sync"] == "top");
            top && actions.is_some_and(|actions| actions.iter().any(|action| snapshots(&action)))
        }
        _ => false,
    };
    matches!(case.what, Some(What::Content | What::Allocation)) && steps.iter().any(mixed)
}

/// A transaction that is taken back has a backup that always brings its bitmap up to date.
pub(super) fn fills_bitmap(case: &Case<'_>) -> bool {
    let always = |backup: &&Value| backup["bitmap-mode"] == "always";
    matches!(case.what, Some(What::Bitmaps | What::Refusal))
        && backups(case.execute, case.arguments).iter().any(always)
}
