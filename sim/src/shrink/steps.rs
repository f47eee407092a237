//! Shrinking the steps: fewer of them, then simpler ones.

use serde_json::Value;

use super::Search;
use crate::scenario::{Action, GuestOp, Range, Scenario, Step};

/// Bytes a step touches.
pub(super) fn weight(step: &Step) -> u64 {
    match &step.action {
        Action::Guest { op, .. } => range(op).map_or(0, |r| r.length + r.offset / 16),
        _ => 0,
    }
}

/// How much there is to read in a step.
pub(super) fn words(step: &Step) -> usize {
    let own = match &step.action {
        Action::Command { arguments, .. } => arguments.values().map(depth).sum::<usize>() + arguments.len(),
        _ => 1,
    };
    own + usize::from(!step.wait)
}

fn depth(value: &Value) -> usize {
    match value {
        Value::Object(map) => 1 + map.values().map(depth).sum::<usize>(),
        _ => 1,
    }
}

fn range(op: &GuestOp) -> Option<Range> {
    match *op {
        GuestOp::Read(r)
        | GuestOp::Write(r)
        | GuestOp::WriteFua(r)
        | GuestOp::WriteZeroes(r)
        | GuestOp::WriteZeroesUnmap(r)
        | GuestOp::Discard(r)
        | GuestOp::BlockStatus(r) => Some(r),
        GuestOp::Flush => None,
    }
}

fn with_range(op: GuestOp, r: Range) -> GuestOp {
    match op {
        GuestOp::Read(_) => GuestOp::Read(r),
        GuestOp::Write(_) => GuestOp::Write(r),
        GuestOp::WriteFua(_) => GuestOp::WriteFua(r),
        GuestOp::WriteZeroes(_) => GuestOp::WriteZeroes(r),
        GuestOp::WriteZeroesUnmap(_) => GuestOp::WriteZeroesUnmap(r),
        GuestOp::Discard(_) => GuestOp::Discard(r),
        GuestOp::BlockStatus(_) => GuestOp::BlockStatus(r),
        GuestOp::Flush => GuestOp::Flush,
    }
}

pub(super) fn pass(search: &mut Search<'_>) {
    drop_steps(search);
    inline_children(search);
    simplify_arguments(search);
    simplify_guests(search);
    merge_actors(search);
}

/// Removes ever smaller stretches of steps, from the end, until no single step can go.
fn drop_steps(search: &mut Search<'_>) {
    let mut width = (search.best.steps.len() / 2).max(1);
    loop {
        let mut end = search.best.steps.len();
        let mut any = false;
        while end > 0 && !search.spent() {
            let start = end.saturating_sub(width);
            let mut candidate = search.best.clone();
            candidate.steps.drain(start..end.min(candidate.steps.len()));
            any |= search.offer(candidate);
            end = start.min(search.best.steps.len());
        }
        if width == 1 && !any {
            break;
        }
        width = if any && width == 1 { 1 } else { (width / 2).max(1) };
    }
}

/// `"file": "f0"` becomes the node itself, so that the step which added `f0` can go; the same for `backing`.
fn inline_children(search: &mut Search<'_>) {
    let mut at = 0;
    while at < search.best.steps.len() && !search.spent() {
        let moved = inlined(&search.best, at).is_some_and(|candidate| search.offer(candidate));
        at += usize::from(!moved);
    }
}

/// The scenario with the blockdev-add at `at` moved into the one later blockdev-add that refers to it.
fn inlined(scenario: &Scenario, at: usize) -> Option<Scenario> {
    let Action::Command { execute, arguments } = &scenario.steps[at].action else {
        return None;
    };
    let name = arguments
        .get("node-name")
        .filter(|_| execute == "blockdev-add")?
        .clone();
    let mut candidate = scenario.clone();
    let node = Value::Object(arguments.clone());
    for step in &mut candidate.steps[at + 1..] {
        let Action::Command { execute, arguments } = &mut step.action else {
            continue;
        };
        if execute != "blockdev-add" {
            continue;
        }
        if replace_reference(arguments, &name, &node) {
            candidate.steps.remove(at);
            return Some(candidate);
        }
    }
    None
}

fn replace_reference(arguments: &mut serde_json::Map<String, Value>, name: &Value, node: &Value) -> bool {
    let mut found = false;
    for key in ["file", "backing"] {
        match arguments.get_mut(key) {
            Some(slot) if slot == name => {
                *slot = node.clone();
                return true;
            }
            Some(slot) => {
                let inner = slot.as_object_mut();
                found |= inner.is_some_and(|inner| replace_reference(inner, name, node));
            }
            None => {}
        }
    }
    found
}

/// Drops optional arguments.
fn simplify_arguments(search: &mut Search<'_>) {
    const NEEDED: [&str; 9] = [
        "driver",
        "node-name",
        "file",
        "filename",
        "device",
        "job-id",
        "id",
        "type",
        "backing",
    ];
    for at in 0..search.best.steps.len() {
        let Some(Step {
            action: Action::Command { arguments, .. },
            ..
        }) = search.best.steps.get(at)
        else {
            continue;
        };
        let optional: Vec<String> = arguments
            .keys()
            .filter(|k| !NEEDED.contains(&k.as_str()))
            .cloned()
            .collect();
        for key in optional {
            let mut candidate = search.best.clone();
            if let Some(Step {
                action: Action::Command { arguments, .. },
                ..
            }) = candidate.steps.get_mut(at)
            {
                arguments.shift_remove(&key);
            }
            search.offer(candidate);
        }
    }
}

/// Shorter ranges, nearer to 0, waiting instead of in flight.
fn simplify_guests(search: &mut Search<'_>) {
    let grain = u64::from(search.best.grain);
    for at in 0..search.best.steps.len() {
        if !search.best.steps[at].wait {
            let mut candidate = search.best.clone();
            candidate.steps[at].wait = true;
            search.offer(candidate);
        }
        while let Action::Guest { op, .. } = &search.best.steps[at].action {
            let Some(r) = range(op) else { break };
            let half = (r.length / 2) / grain * grain;
            let tries = [
                Range {
                    offset: r.offset,
                    length: grain,
                },
                Range {
                    offset: r.offset,
                    length: half,
                },
                Range {
                    offset: r.offset + half,
                    length: r.length - half,
                },
                Range {
                    offset: 0,
                    length: r.length,
                },
                Range {
                    offset: (r.offset / 2) / grain * grain,
                    length: r.length,
                },
            ];
            let better = tries.into_iter().filter(|t| *t != r && t.length > 0).any(|t| {
                let mut candidate = search.best.clone();
                if let Action::Guest { op, .. } = &mut candidate.steps[at].action {
                    *op = with_range(*op, t);
                }
                search.offer(candidate)
            });
            if !better || search.spent() {
                break;
            }
        }
    }
}

/// Fewer actors read better; kept only when it also spares a switch.
fn merge_actors(search: &mut Search<'_>) {
    for at in 0..search.best.steps.len() {
        if search.best.steps[at].actor.starts_with("guest") && search.best.steps[at].actor != "guest0" {
            let mut candidate = search.best.clone();
            candidate.steps[at].actor = "guest0".to_owned();
            search.offer(candidate);
        }
    }
}
