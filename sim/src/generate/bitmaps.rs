//! Dirty bitmaps, woven into scenarios when everything else is drawn.
//!
//! Rules: a stream of random numbers of its own, so that the other steps of a scenario do not depend on it. Few names on
//! few nodes. Bitmaps that are exchanged in one transaction, as incremental backups do, are frequent.

use serde_json::{Value, json};

use super::monitor::MONITOR;
use super::{SETUP, command, names};
use crate::rng::{Rng, Stream};
use crate::scenario::{Scenario, Step};

/// Puts commands on bitmaps between the steps behind the setup.
pub(super) fn weave(seed: u64, scenario: &mut Scenario) {
    let rng = &mut Rng::stream(seed, Stream::Bitmaps);
    if !rng.chance(1, 2) {
        return;
    }
    let nodes = names(&scenario.steps);
    let Some(top) = nodes.last() else { return };
    let first = scenario.steps.iter().position(|step| step.actor != SETUP);
    let first = first.unwrap_or(scenario.steps.len());
    for _ in 0..4 + rng.below(10) {
        let room = u32::try_from(scenario.steps.len() - first + 1).expect("few steps");
        let at = first + rng.below(room) as usize;
        let node = if rng.chance(1, 2) { top } else { rng.pick(&nodes) };
        scenario.steps.insert(at, step(rng, node));
    }
    // Somebody to find something on from the start.
    scenario
        .steps
        .insert(first, command(MONITOR, "block-dirty-bitmap-add", add(rng, top)));
}

fn bitmap(rng: &mut Rng, node: &str) -> Value {
    json!({"node": node, "name": format!("b{}", rng.below(3))})
}

fn add(rng: &mut Rng, node: &str) -> Value {
    let mut add = bitmap(rng, node);
    add["granularity"] = json!(*rng.pick(&[512u32, 512, 1024, 4096, 65536]));
    for (key, one_in) in [("persistent", 2), ("disabled", 5)] {
        if rng.one_in(one_in) {
            add[key] = json!(true);
        }
    }
    add
}

fn merge(rng: &mut Rng, node: &str) -> Value {
    let sources: Vec<String> = (0..1 + rng.below(2))
        .map(|_| format!("b{}", rng.below(3)))
        .collect();
    json!({"node": node, "target": format!("b{}", rng.below(3)), "bitmaps": sources})
}

fn step(rng: &mut Rng, node: &str) -> Step {
    if rng.chance(1, 3) {
        return transaction(rng, node);
    }
    let (name, data) = one(rng, node);
    command(MONITOR, name, data)
}

fn one(rng: &mut Rng, node: &str) -> (&'static str, Value) {
    match rng.below(9) {
        0..=2 => ("block-dirty-bitmap-add", add(rng, node)),
        3 => ("block-dirty-bitmap-merge", merge(rng, node)),
        4 => ("block-dirty-bitmap-remove", bitmap(rng, node)),
        5 => ("block-dirty-bitmap-enable", bitmap(rng, node)),
        6 => ("block-dirty-bitmap-disable", bitmap(rng, node)),
        _ => ("block-dirty-bitmap-clear", bitmap(rng, node)),
    }
}

fn transaction(rng: &mut Rng, node: &str) -> Step {
    let mut actions = Vec::new();
    for _ in 0..1 + rng.below(3) {
        let (kind, data) = one(rng, node);
        actions.push(json!({"type": kind, "data": data}));
    }
    if rng.chance(1, 3) {
        actions.push(json!({"type": "abort", "data": {}}));
    }
    command(MONITOR, "transaction", json!({ "actions": actions }))
}
