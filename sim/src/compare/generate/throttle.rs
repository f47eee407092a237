//! Throttle groups and the filters that belong to them.
//!
//! Rules: no limit that holds anything back: a group has none, or is refused for what it has. Time is not compared.

use serde_json::{Value, json};

use super::{Cast, any, command};
use crate::rng::Rng;
use crate::scenario::Step;

/// A group, or one less, or a filter.
pub(super) fn step(rng: &mut Rng, cast: &mut Cast) -> Step {
    if cast.groups == 0 {
        return add_group(rng, cast);
    }
    match rng.below(6) {
        0 | 1 => add_group(rng, cast),
        2 => command("object-del", json!({"id": group(rng, cast)})),
        _ => filter(rng, cast),
    }
}

/// The name of a group that there is, or was, or never will be.
pub(super) fn group(rng: &mut Rng, cast: &Cast) -> String {
    if rng.chance(1, 8) {
        return "nobody".to_owned();
    }
    format!("tg{}", rng.below(cast.groups.max(1)))
}

fn add_group(rng: &mut Rng, cast: &mut Cast) -> Step {
    let id = match rng.below(10) {
        0 => group(rng, cast),
        1 => "0bad".to_owned(),
        _ => format!("tg{}", cast.groups),
    };
    let mut add = json!({"qom-type": "throttle-group", "id": id});
    match rng.below(8) {
        0..=2 => {}
        3 => add["limits"] = json!({}),
        4 => add["limits"] = json!({"iops-total": 0, "bps-read": 0, "bps-read-max": 0}),
        5 => add["x-iops-read"] = json!(*rng.pick(&[0i64, 0, -1])),
        6 => add["limits"] = never(rng),
        _ => add["x-bps-write-max"] = json!(*rng.pick(&[0i64, 7, -1])),
    }
    if add["id"] == json!(format!("tg{}", cast.groups)) {
        cast.groups += 1;
    }
    command("object-add", add)
}

/// Limits that no group can have.
fn never(rng: &mut Rng) -> Value {
    let all = [
        json!({"iops-total": 5, "iops-read": 5}),
        json!({"bps-total": 5, "bps-total-max": 9, "bps-write-max": 9}),
        json!({"iops-total-max": 5}),
        json!({"bps-read": 6, "bps-read-max": 5}),
        json!({"iops-write": 6, "iops-write-max-length": 0}),
        json!({"iops-write": 6, "iops-write-max-length": 2}),
        json!({"iops-write": 1, "iops-write-max": 1i64 << 49, "iops-write-max-length": 1i64 << 31}),
        json!({"bps-total-max-length": 1i64 << 32}),
        json!({"bps-total": -1}),
        json!({"bps-total": 1i64 << 50}),
        json!({"iops-size": 512}),
        json!({"iops-total": "many"}),
        json!({"iops": 1}),
    ];
    rng.pick(&all).clone()
}

fn filter(rng: &mut Rng, cast: &mut Cast) -> Step {
    let name = format!("thr{}", cast.added);
    cast.added += 1;
    let mut add = json!({"driver": "throttle", "node-name": name,
        "throttle-group": group(rng, cast), "file": any(rng, cast)});
    match rng.below(12) {
        0 => add["read-only"] = json!(true),
        1 => add["detect-zeroes"] = json!("on"),
        2 => add["force-share"] = json!(true),
        _ => {}
    }
    cast.nodes.push(name);
    command("blockdev-add", add)
}
