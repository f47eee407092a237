//! Scenarios for comparing, from seeds: a chain, and about twenty steps on it, a good part of which are refused.
//! `backup`: backups; `bitmap`: dirty bitmaps; `graph`: commands that change the graph; `kept`:
//! copy-before-write filters; `nodes`: nodes of every driver; `throttle`: throttle
//! groups and their filters; `oddities`: what no program should send.
//!
//! Rules: a function of the seed alone. Every command stays within what the model knows; what it answers is not looked
//! at here. No rates that end by themselves (a speed of 1 stops a job after its first piece, for ever), no file opened
//! twice, nothing discarded on nodes that pass it on.

mod backup;
mod bitmap;
mod graph;
mod kept;
mod nodes;
mod oddities;
mod throttle;

use serde_json::{Value, json};

use crate::rng::{Rng, Stream};
use crate::scenario::{Action, Fill, Format, GuestOp, Image, Range, Scenario, Step, Stored};

/// Unit of requests, bytes.
const GRAIN: u32 = 512;

/// Empty images to put above others.
const OVERLAYS: u32 = 3;

/// What a scenario is about.
struct Cast {
    layers: usize,
    /// Exports made by the setup: (name, length, writable).
    exports: Vec<(String, u64, bool)>,
    images: Vec<Image>,
    jobs: u32,
    added: u32,
    exported: u32,
    /// Names of nodes that exist or might.
    nodes: Vec<String>,
    /// Options of nodes that were added, or opened inline, by name: to be reopened with.
    options: Vec<(String, Value)>,
    /// Children that were described with a name.
    deep: u32,
    /// Throttle groups that were added.
    groups: u32,
    /// Names of overlays that were added for snapshots.
    overlays: u32,
}

/// The scenario of a seed.
#[must_use]
pub fn generate(seed: u64) -> Scenario {
    let mut rng = Rng::stream(seed, Stream::Workload);
    let rng = &mut rng;
    let layers = 1 + rng.below(4) as usize;
    let uneven = rng.chance(1, 12);
    // Names of files are longer on the daemon's side, so that a header needs room.
    let cluster = *rng.pick(&[2048u32, 4096, 65536]);
    let mut cast = Cast {
        layers,
        exports: Vec::new(),
        images: images(rng, layers, cluster, uneven),
        jobs: 0,
        added: 0,
        exported: 0,
        nodes: Vec::new(),
        options: Vec::new(),
        deep: 0,
        groups: 0,
        overlays: 0,
    };
    let mut steps = Vec::new();
    setup(rng, &mut cast, &mut steps);
    steps.iter().for_each(|step| remember(&mut cast, step));
    let opened = steps.len();
    let target = steps.len() + 10 + rng.below(12) as usize;
    while steps.len() < target {
        let step = next(rng, &mut cast);
        remember(&mut cast, &step);
        steps.push(step);
    }
    bitmap::weave(seed, &cast, &mut steps, opened);
    kept::weave(seed, &mut cast, &mut steps, opened);
    backup::weave(seed, &mut cast, &mut steps, opened);
    Scenario {
        seed: Some(seed),
        grain: GRAIN,
        images: cast.images,
        steps,
        ..Scenario::default()
    }
}

/// Keeps the options of nodes that a step opens under a name.
fn remember(cast: &mut Cast, step: &Step) {
    fn note(cast: &mut Cast, options: &Value) {
        let Value::Object(inner) = options else { return };
        inner.values().for_each(|value| note(cast, value));
        if let Some(name) = inner.get("node-name").and_then(Value::as_str) {
            cast.options.push((name.to_owned(), options.clone()));
        }
    }
    if let Action::Command { execute, arguments } = &step.action
        && execute == "blockdev-add"
    {
        note(cast, &Value::Object(arguments.clone()));
    }
}

fn images(rng: &mut Rng, layers: usize, cluster: u32, uneven: bool) -> Vec<Image> {
    let size = u64::from(cluster) * u64::from(*rng.pick(&[4u32, 8, 16]));
    let raw_base = rng.chance(1, 5);
    let mut images: Vec<Image> = Vec::new();
    for layer in 0..layers {
        let raw = layer == 0 && raw_base;
        let mut size = size;
        if uneven && rng.chance(1, 2) {
            size = u64::from(cluster) * u64::from(1 + rng.below(16));
        }
        let compat = if rng.chance(1, 6) { 2 } else { 3 };
        let mut image = plain(&format!("i{layer}.img"), raw, size, cluster, compat);
        if let Some(below) = images.last()
            && rng.chance(4, 5)
        {
            image.backing_file = Some(below.file.clone());
            image.backing_format = Some(
                if below.format == Format::Raw {
                    "raw"
                } else {
                    "qcow2"
                }
                .to_owned(),
            );
        }
        for _ in 0..rng.below(4) {
            let clusters = u32::try_from(size / u64::from(cluster)).expect("small");
            let offset = u64::from(rng.below(clusters)) * u64::from(cluster);
            let length = (u64::from(1 + rng.below(3)) * u64::from(cluster)).min(size - offset);
            let stored = if !raw && compat == 3 && rng.chance(1, 4) {
                Stored::Zero
            } else {
                Stored::Data
            };
            image.fill.push(Fill {
                offset,
                length,
                stored,
            });
        }
        images.push(image);
    }
    images.push(plain("spare.img", false, size, cluster, 3));
    images.push(plain("flat.img", true, size, cluster, 3));
    for n in 0..OVERLAYS {
        images.push(plain(&format!("over{n}.img"), false, size, cluster, 3));
    }
    images
}

fn plain(file: &str, raw: bool, size: u64, cluster: u32, compat: u32) -> Image {
    Image {
        file: file.to_owned(),
        format: if raw { Format::Raw } else { Format::Qcow2 },
        size,
        cluster_size: if raw { 65536 } else { cluster },
        compat: if raw { 3 } else { compat },
        refcount_bits: 16,
        backing_file: None,
        backing_format: None,
        free: 0,
        fill: Vec::new(),
    }
}

fn command(execute: &str, arguments: Value) -> Step {
    let Value::Object(arguments) = arguments else {
        unreachable!("arguments are an object")
    };
    Step {
        actor: "monitor".to_owned(),
        action: Action::Command {
            execute: execute.to_owned(),
            arguments,
        },
        wait: true,
    }
}

/// Opens the chain in one of several ways.
fn setup(rng: &mut Rng, cast: &mut Cast, steps: &mut Vec<Step>) {
    let top = cast.layers - 1;
    let read_only_top = rng.chance(1, 6);
    let read_only_below = rng.chance(1, 3);
    let unnamed = rng.chance(1, 6);
    match rng.below(if cast.images[top].backing_file.is_some() {
        4
    } else {
        3
    }) {
        // Everything below as the header says.
        3 => {
            let mut add = format_node(cast, top, unnamed);
            if read_only_top {
                add["read-only"] = json!(true);
            }
            steps.push(command("blockdev-add", add));
        }
        // All in one.
        2 => {
            // What the header names gets in the way of options for a backing file that is no local one.
            for image in &mut cast.images {
                (image.backing_file, image.backing_format) = (None, None);
            }
            let mut add = format_node(cast, 0, unnamed);
            for layer in 1..=top {
                let mut node = format_node(cast, layer, unnamed);
                node["backing"] = add;
                add = node;
            }
            if read_only_top {
                add["read-only"] = json!(true);
            }
            steps.push(command("blockdev-add", add));
        }
        // One by one, files apart or not.
        way => {
            for layer in 0..=top {
                let mut node = format_node(cast, layer, unnamed);
                if way == 1 {
                    let mut file = node["file"].clone();
                    file["node-name"] = json!(format!("f{layer}"));
                    if rng.chance(1, 12) {
                        file["read-only"] = json!(true);
                    }
                    steps.push(command("blockdev-add", file));
                    node["file"] = json!(format!("f{layer}"));
                }
                if layer > 0 {
                    node["backing"] = json!(format!("n{}", layer - 1));
                } else if cast.images[0].format == Format::Qcow2 {
                    node["backing"] = Value::Null;
                }
                let read_only = if layer == top {
                    read_only_top
                } else {
                    read_only_below
                };
                if read_only {
                    node["read-only"] = json!(true);
                }
                steps.push(command("blockdev-add", node));
            }
        }
    }
    for layer in 0..cast.layers {
        cast.nodes.push(format!("n{layer}"));
        cast.nodes.push(format!("n{layer}"));
        cast.nodes.push(format!("f{layer}"));
    }
    if rng.chance(1, 3) {
        let below = rng.below(u32::try_from(cast.layers).expect("few"));
        let mut add = json!({"driver": "copy-on-read", "node-name": "cor", "file": format!("n{below}")});
        if rng.chance(1, 2) {
            add["bottom"] = json!(format!("n{}", rng.below(below + 1)));
        }
        steps.push(command("blockdev-add", add));
        cast.nodes.push("cor".to_owned());
        cast.nodes.push("cor".to_owned());
    }
    for node in [format!("n{top}"), "cor".to_owned()] {
        if rng.chance(2, 3) && (node != "cor" || cast.nodes.contains(&node)) {
            export(rng, cast, &node, steps);
        }
    }
}

fn export(rng: &mut Rng, cast: &mut Cast, node: &str, steps: &mut Vec<Step>) {
    let name = format!("x-{node}");
    let writable = rng.chance(2, 3);
    let size = cast.images[cast.layers - 1].size;
    let add = json!({"type": "nbd", "id": name, "name": name, "node-name": node, "writable": writable});
    steps.push(command("block-export-add", add));
    cast.exports.push((name, size, writable));
}

fn format_node(cast: &Cast, layer: usize, unnamed: bool) -> Value {
    let image = &cast.images[layer];
    let driver = if image.format == Format::Raw {
        "raw"
    } else {
        "qcow2"
    };
    let mut file = json!({"driver": "file", "filename": image.file});
    if !unnamed {
        file["node-name"] = json!(format!("f{layer}"));
    }
    json!({"driver": driver, "node-name": format!("n{layer}"), "file": file})
}

/// A node; now and then one that is not there.
fn any(rng: &mut Rng, cast: &Cast) -> String {
    match rng.below(24) {
        0 => "nowhere".to_owned(),
        1 => "filter1".to_owned(),
        2 if cast.added > 0 => format!("extra{}", rng.below(cast.added)),
        _ => rng.pick(&cast.nodes).clone(),
    }
}

fn layer(rng: &mut Rng, cast: &Cast) -> String {
    format!("n{}", rng.below(u32::try_from(cast.layers).expect("few")))
}

fn next(rng: &mut Rng, cast: &mut Cast) -> Step {
    match rng.weighted(&[6, 5, 5, 4, 2, 6, 3, 1, 6, 3, 4, 3]) {
        0 => stream(rng, cast),
        1 => verb(rng, cast),
        2 => node(rng, cast),
        3 => exporting(rng, cast),
        4 => change_backing_file(rng, cast),
        5 => guest(rng, cast),
        6 => oddities::oddity(rng, cast),
        8 => graph::reopen(rng, cast),
        9 => graph::snapshot(rng, cast),
        10 => graph::resize(rng, cast),
        11 => throttle::step(rng, cast),
        _ => command(
            rng.pick::<&str>(&["query-jobs", "query-block-jobs", "query-block-exports"]),
            json!({}),
        ),
    }
}

fn stream(rng: &mut Rng, cast: &mut Cast) -> Step {
    cast.jobs += 1;
    let mut arguments = json!({"job-id": format!("j{}", cast.jobs)});
    let device = if rng.chance(2, 3) {
        format!("n{}", cast.layers - 1)
    } else {
        any(rng, cast)
    };
    arguments["device"] = json!(device);
    match rng.below(8) {
        0..=2 => {}
        3 | 4 => arguments["base-node"] = json!(any(rng, cast)),
        5 => arguments["bottom"] = json!(any(rng, cast)),
        6 => arguments["base"] = json!(rng.pick(&cast.images).file),
        _ => {
            let keys = [("base", "i0.img"), ("base-node", "n0"), ("bottom", "n0")];
            let left_out = rng.below(3) as usize;
            for (at, (key, value)) in keys.iter().enumerate() {
                if at != left_out {
                    arguments[*key] = json!(value);
                }
            }
        }
    }
    if rng.chance(1, 6) {
        arguments["backing-file"] = json!(*rng.pick(&["other.img", "i0.img", "", "with space"]));
    }
    if rng.chance(1, 10) {
        arguments["backing-mask-protocol"] = json!(rng.chance(1, 2));
    }
    if rng.chance(1, 3) {
        arguments["speed"] = json!(*rng.pick(&[0i64, 1, 1, 1, -1]));
    }
    if rng.chance(1, 8) {
        arguments["on-error"] = json!(*rng.pick(&["report", "ignore", "stop", "enospc", "auto", "maybe"]));
    }
    if rng.chance(5, 6) {
        let name = match rng.below(16) {
            0 => any(rng, cast),
            1 => "#bad".to_owned(),
            2 => "a-name-that-is-much-too-long-for-a-node".to_owned(),
            _ => format!("filter{}", cast.jobs),
        };
        arguments["filter-node-name"] = json!(name);
    }
    for (key, one_in) in [("auto-finalize", 4), ("auto-dismiss", 3)] {
        if rng.one_in(one_in) {
            arguments[key] = json!(false);
        }
    }
    match rng.below(24) {
        0 => arguments["job-id"] = json!("1j"),
        1 => {
            arguments
                .as_object_mut()
                .expect("an object")
                .shift_remove("job-id");
        }
        2 | 3 => arguments["job-id"] = json!(format!("j{}", rng.below(cast.jobs + 1))),
        _ => {}
    }
    command("block-stream", arguments)
}

fn verb(rng: &mut Rng, cast: &Cast) -> Step {
    let at = if rng.chance(3, 4) {
        cast.jobs
    } else {
        rng.below(cast.jobs + 2)
    };
    verb_on(rng, &format!("j{at}"))
}

fn verb_on(rng: &mut Rng, id: &str) -> Step {
    let device = json!({"device": id});
    let by_id = json!({"id": id});
    let (name, arguments) = match rng.below(16) {
        0 => ("block-job-pause", device),
        1 => ("job-pause", by_id),
        2 => ("block-job-resume", device),
        3 => ("job-resume", by_id),
        4 => (
            "block-job-cancel",
            json!({"device": id, "force": rng.chance(1, 2)}),
        ),
        5 => ("job-cancel", by_id),
        6 => ("block-job-finalize", by_id),
        7 => ("job-finalize", by_id),
        8 => ("block-job-dismiss", by_id),
        9 | 10 => ("job-dismiss", by_id),
        11 => ("job-complete", by_id),
        12 => ("block-job-complete", device),
        13 => (
            "block-job-change",
            json!({"id": id, "type": "mirror", "copy-mode": *rng.pick(&["background", "write-blocking"])}),
        ),
        _ => {
            let speed = *rng.pick(&[0i64, 0, 1, -1]);
            ("block-job-set-speed", json!({"device": id, "speed": speed}))
        }
    };
    command(name, arguments)
}

fn node(rng: &mut Rng, cast: &mut Cast) -> Step {
    if rng.chance(1, 3) {
        let name = if cast.added > 0 && rng.chance(1, 2) {
            format!("extra{}", rng.below(cast.added))
        } else {
            any(rng, cast)
        };
        return command("blockdev-del", json!({"node-name": name}));
    }
    if rng.chance(1, 3) {
        return nodes::add(rng, cast);
    }
    let name = match rng.below(16) {
        0 => any(rng, cast),
        1 => "0bad".to_owned(),
        2 => "a-name-that-is-much-too-long-for-a-node".to_owned(),
        _ => format!("extra{}", cast.added),
    };
    cast.added += 1;
    let below = any(rng, cast);
    let mut add = match rng.below(11) {
        0 => json!({"driver": "null-co", "size": *rng.pick(&[65536u32, 1000, 0, 512]), "read-zeroes": true}),
        1 | 2 => json!({"driver": "raw", "file": below, "read-only": rng.chance(2, 3)}),
        3 => {
            let (offset, size) = (512 * rng.below(6), *rng.pick(&[512u32, 1024, 100, 1 << 20]));
            let mut add = json!({"driver": "raw", "file": below, "read-only": rng.chance(2, 3)});
            if rng.chance(3, 4) {
                add["offset"] = json!(if rng.chance(1, 8) { 1 << 24 } else { offset });
            }
            if rng.chance(3, 4) {
                add["size"] = json!(size);
            }
            add
        }
        4 | 5 => json!({"driver": "copy-on-read", "file": below}),
        6 | 7 => json!({"driver": "copy-on-read", "file": below, "bottom": any(rng, cast)}),
        8 => json!({"driver": "qcow2", "backing": any(rng, cast),
            "file": {"driver": "file", "node-name": format!("spare{}", cast.added), "filename": "spare.img"}}),
        9 => json!({"driver": *rng.pick(&["qcow2", "raw"]), "read-only": rng.chance(1, 2),
            "file": {"driver": "file", "node-name": format!("flat{}", cast.added), "filename": "flat.img"}}),
        _ => json!({"driver": "qcow2", "file": below, "backing": null, "read-only": rng.chance(2, 3)}),
    };
    if rng.chance(1, 24) {
        add["force-share"] = json!(true);
    }
    add["node-name"] = json!(name);
    cast.nodes.push(name);
    command("blockdev-add", add)
}

fn exporting(rng: &mut Rng, cast: &mut Cast) -> Step {
    if rng.chance(1, 3) {
        let id = match rng.below(4) {
            0 => "nobody".to_owned(),
            1 if !cast.exports.is_empty() => rng.pick(&cast.exports).0.clone(),
            _ => format!("y{}", rng.below(cast.exported + 1)),
        };
        let mode = *rng.pick(&["safe", "hard", "hard"]);
        return command("block-export-del", json!({"id": id, "mode": mode}));
    }
    let node = any(rng, cast);
    let id = match rng.below(12) {
        0 => "0".to_owned(),
        1 => format!("y{}", rng.below(cast.exported + 1)),
        _ => format!("y{}", cast.exported),
    };
    cast.exported += 1;
    let name = if rng.chance(1, 10) {
        "x-cor".to_owned()
    } else {
        id.clone()
    };
    let writable = rng.chance(1, 2);
    let size = cast.images[cast.layers - 1].size;
    cast.exports.push((name.clone(), size, writable));
    command(
        "block-export-add",
        json!({"type": "nbd", "id": id, "name": name, "node-name": node, "writable": writable}),
    )
}

fn change_backing_file(rng: &mut Rng, cast: &Cast) -> Step {
    // Not plain, so that it has this length on both sides.
    let long = "/".repeat(*rng.pick(&[1023usize, 1024, 400]));
    let file = match rng.below(8) {
        0 => long.as_str(),
        1 => "",
        2 => "with space",
        _ => "renamed.img",
    };
    let device = if rng.chance(2, 3) {
        format!("n{}", cast.layers - 1)
    } else {
        any(rng, cast)
    };
    command(
        "change-backing-file",
        json!({"device": device, "image-node-name": any(rng, cast), "backing-file": file}),
    )
}

fn guest(rng: &mut Rng, cast: &Cast) -> Step {
    if cast.exports.is_empty() {
        return command("query-block-exports", json!({}));
    }
    let (export, size, writable) = rng.pick(&cast.exports).clone();
    let grains = u32::try_from(size / u64::from(GRAIN)).expect("small");
    let range = |rng: &mut Rng| {
        let start = rng.below(grains);
        let length = 1 + rng.below((grains - start).min(24));
        Range {
            offset: u64::from(start) * u64::from(GRAIN),
            length: u64::from(length) * u64::from(GRAIN),
        }
    };
    let op = match rng.below(if writable { 10 } else { 4 }) {
        0..=2 => GuestOp::Read(range(rng)),
        3 => GuestOp::BlockStatus(range(rng)),
        4 => GuestOp::Flush,
        5 | 6 => GuestOp::WriteZeroes(range(rng)),
        7 => GuestOp::Discard(range(rng)),
        _ => GuestOp::Write(range(rng)),
    };
    Step {
        actor: "guest".to_owned(),
        action: Action::Guest { export, op },
        wait: true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenario::validate::validate;

    #[test]
    fn every_seed_gives_a_valid_scenario_and_always_the_same() {
        for seed in 0..300 {
            let scenario = generate(seed);
            assert_eq!(validate(&scenario), Ok(()), "seed {seed}");
            assert_eq!(scenario, generate(seed));
            assert!(
                (11..=120).contains(&scenario.steps.len()),
                "{}",
                scenario.steps.len()
            );
        }
    }
}
