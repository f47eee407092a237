//! Two images that one transaction backs up: both copies have to show one instant.
//!
//! Rules: a stream of random numbers of its own, added when everything else is drawn. The other image stands beside the chain and has
//! guests of its own; what they and those of the chain write is in an order that everybody can see, so copies of different
//! instants contradict it.
//! Not covered: more than two; a source that is somewhere below the other one.

use serde_json::{Value, json};

use super::backup::{READER, after_setup, insert, place, top_size, wait};
use super::monitor::MONITOR;
use super::{SETUP, command, jobs, names};
use crate::rng::{Rng, Stream};
use crate::scenario::{Action, Fill, Format, GuestOp, Image, Range, Scenario, Step, Stored};

/// The guest of the other image.
const WRITER: &str = "writer";
/// The ids of the jobs.
const IDS: [&str; 2] = ["m0", "m1"];

/// Adds the other image, its guest, and the transaction, to some scenarios.
pub(super) fn weave(seed: u64, scenario: &mut Scenario) {
    let rng = &mut Rng::stream(seed, Stream::OneInstant);
    if !rng.chance(1, 8) {
        return;
    }
    let (Some(top), Some(size)) = (device(scenario), top_size(scenario)) else {
        return;
    };
    for name in ["s1", "ts", "tt"] {
        add_image(rng, scenario, name, size);
    }
    let first = after_setup(scenario);
    // Near the beginning: what has a backup already is refused another one.
    let last = first + rng.below(8) as usize;
    let steps = transaction(rng, &top);
    insert(scenario, last.min(scenario.steps.len()), steps);
    for _ in 0..4 + rng.below(12) {
        let step = request(rng, scenario.grain, size);
        let room = u32::try_from(scenario.steps.len().min(last + 12) - first + 1).expect("few steps");
        insert(scenario, first + rng.below(room) as usize, vec![step]);
    }
    for _ in 0..rng.below(3) {
        let at = place(rng, scenario, last.min(scenario.steps.len()));
        let id = *rng.pick(&IDS);
        let step = if rng.chance(1, 2) {
            jobs::verb(rng, id, MONITOR)
        } else {
            wait(id, "concluded", None)
        };
        insert(scenario, at, vec![step]);
    }
}

/// The topmost node of the chain.
fn device(scenario: &Scenario) -> Option<String> {
    let nodes = names(&scenario.steps).into_iter().rev();
    nodes.into_iter().find(|name| name.starts_with('n'))
}

fn add_image(rng: &mut Rng, scenario: &mut Scenario, name: &str, size: u64) {
    let file = format!("{name}.img");
    let raw = rng.chance(1, 3);
    let format = if raw { Format::Raw } else { Format::Qcow2 };
    let is_source = name == "s1";
    let whole = Fill {
        offset: 0,
        length: size,
        stored: Stored::Data,
    };
    scenario.images.push(Image {
        file: file.clone(),
        format,
        size,
        cluster_size: 65536,
        compat: 3,
        refcount_bits: 16,
        backing_file: None,
        backing_format: None,
        free: 0,
        fill: if is_source { vec![whole] } else { Vec::new() },
    });
    let add = json!({"driver": format.driver(), "node-name": name, "discard": "unmap",
        "file": {"driver": "file", "filename": file, "node-name": format!("f{name}"), "discard": "unmap"}});
    let mut steps = vec![command(SETUP, "blockdev-add", add)];
    let export = json!({"type": "nbd", "id": format!("x-{name}"), "node-name": name, "writable": is_source});
    steps.push(command(SETUP, "block-export-add", export));
    let at = after_setup(scenario);
    insert(scenario, at, steps);
}

fn transaction(rng: &mut Rng, top: &str) -> Vec<Step> {
    let mut actions: Vec<Value> = [(top, "tt"), ("s1", "ts")]
        .into_iter()
        .zip(IDS)
        .map(|((device, target), id)| {
            let sync = *rng.pick(&["full", "full", "top"]);
            json!({"type": "blockdev-backup", "data":
                {"job-id": id, "device": device, "target": target, "sync": sync}})
        })
        .collect();
    if rng.chance(1, 2) {
        actions.reverse();
    }
    if rng.chance(1, 16) {
        actions.push(json!({"type": "abort", "data": {}}));
    }
    let mut arguments = json!({ "actions": actions });
    if rng.chance(2, 3) {
        arguments["properties"] = json!({"completion-mode": *rng.pick(&["grouped", "individual"])});
    }
    vec![command(MONITOR, "transaction", arguments)]
}

fn request(rng: &mut Rng, grain: u32, size: u64) -> Step {
    let grain = u64::from(grain);
    let grains = u32::try_from((size / grain).max(1)).expect("small images");
    let first = rng.below(grains);
    let count = (1 + rng.below(8)).min(grains - first);
    let range = Range {
        offset: u64::from(first) * grain,
        length: u64::from(count) * grain,
    };
    let reads = rng.chance(1, 4);
    let (export, op) = match rng.below(3) {
        _ if !reads => ("x-s1", GuestOp::Write(range)),
        0 => ("x-s1", GuestOp::Read(range)),
        1 => ("x-ts", GuestOp::Read(range)),
        _ => ("x-tt", GuestOp::Read(range)),
    };
    Step {
        actor: if reads { READER } else { WRITER }.to_owned(),
        action: Action::Guest {
            export: export.to_owned(),
            op,
        },
        wait: rng.chance(1, 2),
    }
}
