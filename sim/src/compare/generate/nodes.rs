//! Nodes of every driver with every common option, their children named or described, some levels deep.
//!
//! Rules: nothing that the model does not know; files are those that no chain uses. Most of it is refused for one reason or
//! another, and which is told first is the point.

use serde_json::{Value, json};

use super::{Cast, any, command, throttle};
use crate::rng::Rng;
use crate::scenario::Step;

/// How many levels are described in one command.
const DEEPEST: u32 = 3;

pub(super) fn add(rng: &mut Rng, cast: &mut Cast) -> Step {
    let name = format!("extra{}", cast.added);
    cast.added += 1;
    let mut node = describe(rng, cast, DEEPEST);
    node["node-name"] = json!(name);
    cast.nodes.push(name);
    command("blockdev-add", node)
}

fn describe(rng: &mut Rng, cast: &mut Cast, levels: u32) -> Value {
    let drivers: &[&str] = if levels > 1 {
        &["file", "null-co", "raw", "qcow2", "copy-on-read", "throttle"]
    } else {
        &["file", "null-co"]
    };
    let driver = *rng.pick(drivers);
    let mut node = json!({"driver": driver});
    match driver {
        "file" => node["filename"] = json!(*rng.pick(&["spare.img", "flat.img", "spare.img", "missing.img"])),
        "null-co" => {
            node["size"] = json!(*rng.pick(&[65536u32, 512, 1000]));
            node["read-zeroes"] = json!(true);
        }
        _ => node["file"] = child(rng, cast, levels),
    }
    match driver {
        "qcow2" if rng.chance(2, 3) => {
            node["backing"] = if rng.chance(1, 2) {
                Value::Null
            } else {
                child(rng, cast, levels)
            }
        }
        "throttle" => node["throttle-group"] = json!(throttle::group(rng, cast)),
        "raw" if rng.chance(1, 4) => node["size"] = json!(512 * (1 + rng.below(4))),
        _ => {}
    }
    common(rng, &mut node);
    node
}

fn child(rng: &mut Rng, cast: &mut Cast, levels: u32) -> Value {
    if rng.chance(1, 3) {
        return json!(any(rng, cast));
    }
    let mut node = describe(rng, cast, levels - 1);
    if rng.chance(2, 3) {
        let name = format!("deep{}", cast.deep);
        cast.deep += 1;
        node["node-name"] = json!(name);
        cast.nodes.push(name);
    }
    node
}

/// Options that every driver has.
fn common(rng: &mut Rng, node: &mut Value) {
    let switches = [("read-only", 4), ("auto-read-only", 8), ("force-share", 12)];
    for (switch, one_in) in switches {
        if rng.one_in(one_in) {
            node[switch] = json!(rng.chance(2, 3));
        }
    }
    if rng.chance(1, 6) {
        node["discard"] = json!(*rng.pick(&["unmap", "ignore"]));
    }
    if rng.chance(1, 6) {
        node["detect-zeroes"] = json!(*rng.pick(&["on", "off", "unmap"]));
    }
    if rng.chance(1, 8) {
        node["cache"] = json!({"no-flush": rng.chance(1, 2)});
    }
}
