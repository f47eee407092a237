//! Commands that change the graph: `blockdev-reopen`, snapshots, transactions, `block_resize`.
//!
//! Rules: a node is reopened with the options that it was opened with, but for one or two; what is left out goes back to
//! its default. A qcow2 node never gets another image for its `file` in a command that could be accepted: what it would
//! read there is nobody's business.

use serde_json::{Value, json};

use super::{Cast, OVERLAYS, any, command, throttle};
use crate::rng::Rng;
use crate::scenario::Step;

pub(super) fn reopen(rng: &mut Rng, cast: &mut Cast) -> Step {
    let count = *rng.pick(&[1usize, 1, 1, 1, 2, 2, 3]);
    let options: Vec<Value> = (0..count).map(|_| entry(rng, cast)).collect();
    command("blockdev-reopen", json!({ "options": options }))
}

/// One node.
fn entry(rng: &mut Rng, cast: &Cast) -> Value {
    let mut options = known(rng, cast);
    // In which order a long description is refused is a matter of QEMU's hash.
    let deep = options["backing"].get("backing").is_some();
    if deep || rng.chance(3, 4) {
        by_reference(&mut options);
    }
    for _ in 0..rng.below(3) {
        change(rng, cast, &mut options);
    }
    options
}

fn known(rng: &mut Rng, cast: &Cast) -> Value {
    let (_, mut options) = rng.pick(&cast.options).clone();
    // A chain that was opened by what its headers say, or piece by piece: the layer below is called like this.
    let below = options["node-name"]
        .as_str()
        .and_then(|name| name.strip_prefix('n')?.parse::<usize>().ok())
        .and_then(|layer| layer.checked_sub(1));
    if options["driver"] == "qcow2" && options.get("backing").is_none() && rng.chance(7, 8) {
        options["backing"] = below.map_or(Value::Null, |below| json!(format!("n{below}")));
    }
    options
}

/// Children that were described are named instead, where they have a name.
fn by_reference(options: &mut Value) {
    for child in ["file", "backing"] {
        if let Some(name) = options
            .get(child)
            .and_then(|child| child.get("node-name"))
            .cloned()
        {
            options[child] = name;
        }
    }
}

fn change(rng: &mut Rng, cast: &Cast, options: &mut Value) {
    let qcow2 = options["driver"] == "qcow2";
    let leaf = options.get("file").is_none();
    if options["driver"] == "throttle" && rng.chance(1, 2) {
        options["throttle-group"] = json!(throttle::group(rng, cast));
        return;
    }
    match rng.below(14) {
        0..=4 if qcow2 => {
            options["backing"] = match rng.below(6) {
                0 | 1 => Value::Null,
                2 | 3 => json!("cor"),
                _ => json!(any(rng, cast)),
            }
        }
        0..=2 if options["driver"] == "raw" => {
            options["offset"] = json!(512 * rng.below(4));
            if rng.chance(1, 2) {
                options["size"] = json!(*rng.pick(&[512u32, 1024, 100, 1 << 20]));
            }
        }
        5 if !leaf => {
            options["file"] = json!(other_file(rng, cast, options, qcow2));
        }
        6 if !leaf => {
            // Another file, and something that is never accepted.
            options["file"] = json!(format!("f{}", rng.below(4)));
            options["force-share"] = json!(rng.chance(1, 2));
        }
        7 => options["force-share"] = json!(rng.chance(1, 2)),
        8 => options["detect-zeroes"] = json!(*rng.pick(&["off", "on", "unmap"])),
        9 => options["node-name"] = json!(any(rng, cast)),
        10 => {
            let object = options.as_object_mut().expect("options are an object");
            let keys: Vec<String> = object.keys().cloned().collect();
            object.shift_remove(rng.pick(&keys));
        }
        11 => options["auto-read-only"] = json!(rng.chance(1, 2)),
        _ => options["read-only"] = json!(rng.chance(1, 2)),
    }
}

/// For qcow2 a node that shows the same file, or nothing that could do; for others whatever there is.
fn other_file(rng: &mut Rng, cast: &Cast, options: &Value, qcow2: bool) -> String {
    if !qcow2 {
        return any(rng, cast);
    }
    let same: Vec<&String> = cast
        .options
        .iter()
        .filter(|(_, other)| other["driver"] == "raw" && other["file"] == options["file"])
        .filter(|(_, other)| other.get("offset").is_none() && other.get("size").is_none())
        .map(|(name, _)| name)
        .collect();
    let own = options["node-name"].as_str().unwrap_or_default();
    match same.first() {
        Some(_) if rng.chance(3, 4) => (*rng.pick(&same)).clone(),
        _ => (*rng.pick(&["nowhere", own])).to_owned(),
    }
}

/// A snapshot, alone or in a transaction, or a node to make one with.
pub(super) fn snapshot(rng: &mut Rng, cast: &mut Cast) -> Step {
    if cast.overlays < OVERLAYS && rng.chance(1, 2) {
        return overlay(rng, cast);
    }
    let actions: Vec<Value> = (0..1 + rng.below(3)).map(|_| action(rng, cast)).collect();
    if rng.chance(1, 2)
        && let Some(first) = actions.first().filter(|a| a["type"] == "blockdev-snapshot")
    {
        return command("blockdev-snapshot", first["data"].clone());
    }
    let mut arguments = json!({ "actions": actions });
    if rng.chance(1, 8) {
        arguments["properties"] =
            json!({"completion-mode": *rng.pick(&["individual", "individual", "grouped"])});
    }
    command("transaction", arguments)
}

fn overlay(rng: &mut Rng, cast: &mut Cast) -> Step {
    let number = cast.overlays;
    cast.overlays += 1;
    let name = format!("o{number}");
    cast.nodes.push(name.clone());
    let mut add = json!({"driver": "qcow2", "node-name": name,
        "file": {"driver": "file", "node-name": format!("of{number}"), "filename": format!("over{number}.img")}});
    if rng.chance(2, 3) {
        add["backing"] = Value::Null;
    }
    if rng.chance(1, 6) {
        add["read-only"] = json!(true);
    }
    command("blockdev-add", add)
}

fn action(rng: &mut Rng, cast: &Cast) -> Value {
    if rng.chance(1, 4) {
        return json!({"type": "abort", "data": {}});
    }
    let overlay = if cast.overlays > 0 && rng.chance(5, 6) {
        format!("o{}", rng.below(cast.overlays))
    } else {
        any(rng, cast)
    };
    let node = if rng.chance(1, 2) {
        format!("n{}", cast.layers - 1)
    } else {
        any(rng, cast)
    };
    json!({"type": "blockdev-snapshot", "data": {"node": node, "overlay": overlay}})
}

/// Another length for a format node or a filter. The files of our server have a fixed length.
pub(super) fn resize(rng: &mut Rng, cast: &Cast) -> Step {
    let node = match rng.below(8) {
        0 => any(rng, cast),
        1 | 2 => "cor".to_owned(),
        3 if cast.overlays > 0 => format!("o{}", rng.below(cast.overlays)),
        _ => format!("n{}", rng.below(u32::try_from(cast.layers).expect("few"))),
    };
    let image = &cast.images[cast.layers - 1];
    let cluster = i64::from(image.cluster_size.min(4096));
    let now = i64::try_from(image.size).expect("a short image");
    let size = match rng.below(10) {
        0 => -1,
        1 => now + 100,
        2 => now,
        3 => now + 512,
        4 => now - 512,
        5 => now - cluster / 2,
        6 => now - cluster,
        7 => now / 2,
        8 => now + cluster,
        _ => 2 * now,
    };
    command("block_resize", json!({"node-name": node, "size": size}))
}
