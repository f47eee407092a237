//! Dirty bitmaps, woven into a third of all scenarios; the other steps of a scenario stay what they are.
//!
//! Rules: few names on few nodes, so that commands meet each other. A stream of random numbers of its own.

use serde_json::{Value, json};

use super::{Cast, any, command, guest};
use crate::rng::{Rng, Stream};
use crate::scenario::Step;

/// Puts commands on bitmaps, and requests of guests, between the steps behind the first `setup`.
pub(super) fn weave(seed: u64, cast: &Cast, steps: &mut Vec<Step>, setup: usize) {
    let rng = &mut Rng::stream(seed, Stream::Bitmaps);
    if !rng.chance(1, 3) {
        return;
    }
    let mut exports = 0;
    // Some bitmaps from the start.
    let mut at = setup;
    for _ in 0..1 + rng.below(3) {
        steps.insert(at, command("block-dirty-bitmap-add", add(rng, cast)));
        at += 1;
    }
    for _ in 0..6 + rng.below(10) {
        let room = u32::try_from(steps.len() - at + 1).expect("few steps");
        let place = at + rng.below(room) as usize;
        let step = if rng.chance(1, 3) {
            guest(rng, cast)
        } else {
            step(rng, cast, &mut exports)
        };
        steps.insert(place, step);
    }
}

fn step(rng: &mut Rng, cast: &Cast, exports: &mut u32) -> Step {
    match rng.weighted(&[6, 8, 3, 4, 1, 1, 1]) {
        0 => command("block-dirty-bitmap-add", add(rng, cast)),
        1 => {
            let verb = verb(rng);
            command(&format!("block-dirty-bitmap-{verb}"), bitmap(rng, cast))
        }
        2 => command("block-dirty-bitmap-merge", merge(rng, cast)),
        3 => transaction(rng, cast),
        4 => {
            *exports += 1;
            let id = format!("bx{exports}");
            let bitmaps: Vec<Value> = (0..1 + rng.below(2)).map(|_| source(rng, cast)).collect();
            let node = node(rng, cast);
            command(
                "block-export-add",
                json!({"type": "nbd", "id": id, "name": id, "node-name": node, "writable": rng.chance(1, 2), "bitmaps": bitmaps}),
            )
        }
        5 => {
            let id = format!("bx{}", rng.below(*exports + 1));
            command("block-export-del", json!({"id": id, "mode": "hard"}))
        }
        _ => command("x-debug-block-dirty-bitmap-sha256", bitmap(rng, cast)),
    }
}

/// A verb on some bitmap of this node.
pub(super) fn on(rng: &mut Rng, node: &str) -> Step {
    let verb = verb(rng);
    command(
        &format!("block-dirty-bitmap-{verb}"),
        json!({"node": node, "name": name(rng)}),
    )
}

fn verb(rng: &mut Rng) -> &'static str {
    rng.pick::<&str>(&["remove", "clear", "clear", "enable", "disable"])
}

fn node(rng: &mut Rng, cast: &Cast) -> String {
    match rng.below(8) {
        0..=4 => format!("n{}", cast.layers - 1),
        5 if cast.overlays > 0 => format!("o{}", rng.below(cast.overlays)),
        _ => any(rng, cast),
    }
}

fn name(rng: &mut Rng) -> String {
    match rng.below(40) {
        0 => String::new(),
        1 => "b".repeat(*rng.pick(&[1023usize, 1024])),
        2 => "nothing".to_owned(),
        _ => format!("b{}", rng.below(3)),
    }
}

fn bitmap(rng: &mut Rng, cast: &Cast) -> Value {
    json!({"node": node(rng, cast), "name": name(rng)})
}

fn add(rng: &mut Rng, cast: &Cast) -> Value {
    let mut add = bitmap(rng, cast);
    if rng.chance(2, 3) {
        let granularity = *rng.pick(&[512i64, 512, 1024, 4096, 4096, 65536, 1 << 31, 1 << 32, 100, -1, 0]);
        add["granularity"] = json!(granularity);
    }
    for (key, one_in) in [("persistent", 3), ("disabled", 4)] {
        if rng.one_in(one_in) {
            add[key] = json!(true);
        }
    }
    match rng.below(40) {
        0 => add["granularity"] = json!("large"),
        1 => add["persistent"] = json!(1),
        2 => add["more"] = json!(1),
        3 => {
            add.as_object_mut().expect("an object").shift_remove("name");
        }
        _ => {}
    }
    add
}

fn source(rng: &mut Rng, cast: &Cast) -> Value {
    match rng.below(30) {
        0 => json!(1),
        1 => json!({"node": node(rng, cast)}),
        2..=20 => json!(name(rng)),
        _ => bitmap(rng, cast),
    }
}

fn merge(rng: &mut Rng, cast: &Cast) -> Value {
    let bitmaps: Vec<Value> = (0..1 + rng.below(3)).map(|_| source(rng, cast)).collect();
    let mut merge = json!({"node": node(rng, cast), "target": name(rng), "bitmaps": bitmaps});
    if rng.one_in(40) {
        merge["bitmaps"] = json!([]);
    }
    merge
}

fn transaction(rng: &mut Rng, cast: &Cast) -> Step {
    let mut actions: Vec<Value> = (0..1 + rng.below(4)).map(|_| action(rng, cast)).collect();
    if rng.chance(1, 4) {
        actions.push(json!({"type": "abort", "data": {}}));
    }
    let mut arguments = json!({ "actions": actions });
    if rng.one_in(16) {
        arguments["properties"] = json!({"completion-mode": "grouped"});
    }
    command("transaction", arguments)
}

pub(super) fn action(rng: &mut Rng, cast: &Cast) -> Value {
    let (kind, data) = match rng.below(10) {
        0..=2 => ("block-dirty-bitmap-add".to_owned(), add(rng, cast)),
        3 | 4 => ("block-dirty-bitmap-merge".to_owned(), merge(rng, cast)),
        5 if cast.overlays > 0 => {
            let overlay = format!("o{}", rng.below(cast.overlays));
            (
                "blockdev-snapshot".to_owned(),
                json!({"node": node(rng, cast), "overlay": overlay}),
            )
        }
        _ => (format!("block-dirty-bitmap-{}", verb(rng)), bitmap(rng, cast)),
    };
    json!({"type": kind, "data": data})
}
