//! Backups, verbs on them, and transactions of them, woven into two fifths of all scenarios; the other steps of a scenario stay
//! what they are.
//!
//! Rules: images of their own as targets; guests write between the steps, so that what is kept is exercised; slow ones copy a cluster
//! and then wait for ever. Nothing is compressed. Nothing that goes on for ever without waiting (`ignore` where an error stays).

use serde_json::{Value, json};

use super::{Cast, any, bitmap, command, guest, kept, verb_on};
use crate::rng::{Rng, Stream};
use crate::scenario::{Format, Step};

/// What was made so far.
struct Made {
    backups: u32,
    exports: u32,
}

/// Puts such commands between the steps behind the first `setup`.
pub(super) fn weave(seed: u64, cast: &mut Cast, steps: &mut Vec<Step>, setup: usize) {
    let rng = &mut Rng::stream(seed, Stream::Backups);
    if !rng.chance(2, 5) {
        return;
    }
    let mut made = Made {
        backups: 0,
        exports: 0,
    };
    let mut woven = kept::targets(rng, cast, "backup", "u");
    for number in 0..1 + rng.below(3) {
        let node = if number == 0 {
            format!("n{}", cast.layers - 1)
        } else {
            node(rng, cast)
        };
        let mut add = json!({"node": node, "name": format!("b{number}")});
        if rng.chance(2, 3) {
            add["granularity"] = json!(*rng.pick(&[512u32, 4096, 65536, 1 << 20]));
        }
        if rng.one_in(4) {
            add["persistent"] = json!(true);
        }
        woven.push(command("block-dirty-bitmap-add", add));
    }
    for _ in 0..12 + rng.below(16) {
        let step = step(rng, cast, &mut made);
        woven.push(step);
    }
    kept::spread(rng, woven, steps, setup);
}

/// Mostly the top of the chain.
fn node(rng: &mut Rng, cast: &Cast) -> String {
    if rng.chance(6, 7) {
        format!("n{}", cast.layers - 1)
    } else {
        any(rng, cast)
    }
}

fn target(rng: &mut Rng, cast: &Cast) -> String {
    if rng.chance(9, 10) {
        format!("u{}", rng.below(kept::TARGETS))
    } else {
        any(rng, cast)
    }
}

fn step(rng: &mut Rng, cast: &mut Cast, made: &mut Made) -> Step {
    match rng.weighted(&[6, 6, 9, 3, 3, 1, 1, 1]) {
        0 => command("blockdev-backup", backup(rng, cast, made)),
        1 => {
            let job = job(rng, made);
            verb_on(rng, &job)
        }
        2 => guest(rng, cast),
        3 => transaction(rng, cast, made),
        4 => {
            let node = node(rng, cast);
            bitmap::on(rng, &node)
        }
        5 => {
            let name = format!("u{}", rng.below(kept::TARGETS));
            command("blockdev-del", json!({ "node-name": name }))
        }
        6 => {
            let name = format!("bs{}", made.backups);
            let add = json!({"driver": "snapshot-access", "node-name": name, "file": filter(rng, made)});
            cast.nodes.push(name);
            command("blockdev-add", add)
        }
        _ => export(rng, cast, made),
    }
}

fn job(rng: &mut Rng, made: &Made) -> String {
    let at = if rng.chance(2, 3) {
        made.backups
    } else {
        rng.below(made.backups + 1)
    };
    format!("k{at}")
}

fn filter(rng: &mut Rng, made: &Made) -> String {
    format!("bf{}", rng.below(made.backups + 1))
}

/// Of a source, a target, or a filter.
fn export(rng: &mut Rng, cast: &mut Cast, made: &mut Made) -> Step {
    let name = format!("bx{}", 100 + made.exports);
    made.exports += 1;
    let node = match rng.below(4) {
        0 => target(rng, cast),
        1 => filter(rng, made),
        _ => node(rng, cast),
    };
    let writable = rng.chance(2, 3);
    let size = cast.images[cast.layers - 1].size;
    cast.exports.push((name.clone(), size, writable));
    command(
        "block-export-add",
        json!({"type": "nbd", "id": name, "name": name, "node-name": node, "writable": writable}),
    )
}

/// The arguments of one.
fn backup(rng: &mut Rng, cast: &mut Cast, made: &mut Made) -> Value {
    made.backups += 1;
    let number = made.backups;
    let sync = *rng.pick(&[
        "full",
        "full",
        "full",
        "top",
        "top",
        "none",
        "none",
        "bitmap",
        "bitmap",
        "incremental",
    ]);
    let device = if rng.one_in(20) {
        filter(rng, made)
    } else {
        node(rng, cast)
    };
    let mut all =
        json!({"job-id": format!("k{number}"), "device": device, "target": target(rng, cast), "sync": sync});
    bitmaps(rng, sync, &mut all);
    tune(rng, &mut all);
    if rng.chance(5, 6) {
        let name = match rng.below(24) {
            0 => any(rng, cast),
            1 => "#bad".to_owned(),
            _ => format!("bf{number}"),
        };
        cast.nodes.push(name.clone());
        all["filter-node-name"] = json!(name);
    }
    for (key, one_in) in [("auto-finalize", 4), ("auto-dismiss", 4)] {
        if rng.one_in(one_in) {
            all[key] = json!(false);
        }
    }
    odd(rng, cast, &mut all);
    all
}

fn bitmaps(rng: &mut Rng, sync: &str, all: &mut Value) {
    let by_bitmap = matches!(sync, "bitmap" | "incremental");
    let names = if by_bitmap {
        rng.chance(19, 20)
    } else {
        rng.one_in(5)
    };
    if names {
        all["bitmap"] = json!(*rng.pick(&["b0", "b0", "b0", "b0", "b1", "b2"]));
    }
    let says_mode = match sync {
        "incremental" => rng.one_in(5),
        _ if names => rng.chance(14, 15),
        _ => rng.one_in(40),
    };
    if says_mode {
        all["bitmap-mode"] = json!(*rng.pick(&["on-success", "on-success", "never", "always", "always"]));
    }
}

/// Rates, sizes and the like.
fn tune(rng: &mut Rng, all: &mut Value) {
    let mut perf = json!({});
    if rng.one_in(3) {
        all["speed"] = json!(*rng.pick(&[1i64, 1, 1, 1, 1, 1, 1, 0, 0, -1]));
        perf["max-chunk"] = json!(*rng.pick(&[65536i64, 65536, 131_072]));
    }
    if rng.one_in(16) {
        perf["max-chunk"] = json!(*rng.pick(&[0i64, 65536, 1 << 20, 512, -1]));
    }
    if rng.one_in(12) {
        perf["min-cluster-size"] = json!(*rng.pick(&[0i64, 512, 65536, 131_072, 3, -1]));
    }
    if rng.one_in(12) {
        perf["max-workers"] = json!(*rng.pick(&[1i64, 2, 64, 0, 1 << 31]));
    }
    if rng.one_in(12) {
        perf["use-copy-range"] = json!(rng.chance(1, 2));
    }
    if perf.as_object().is_some_and(|perf| !perf.is_empty()) {
        all["x-perf"] = perf;
    }
    if rng.one_in(12) {
        all["compress"] = json!(false);
    }
    if rng.one_in(20) {
        all["discard-source"] = json!(rng.chance(3, 4));
    }
    for key in ["on-source-error", "on-target-error"] {
        if rng.one_in(8) {
            all[key] = json!(*rng.pick(&[
                "report", "report", "stop", "stop", "enospc", "enospc", "auto", "auto", "maybe"
            ]));
        }
    }
}

/// What is wrong with some.
fn odd(rng: &mut Rng, cast: &Cast, all: &mut Value) {
    match rng.below(90) {
        0 => all["target"] = all["device"].clone(),
        1 => all["job-id"] = json!("1k"),
        2 => {
            all.as_object_mut().expect("an object").shift_remove("job-id");
        }
        3 => all["job-id"] = json!("k1"),
        4 => all["sync"] = json!("some"),
        5 => all["x-perf"] = json!(1),
        6 => all["more"] = json!(1),
        7 => all["device"] = json!(any(rng, cast)),
        8 => all["bitmap"] = json!(""),
        // Only where it is refused: an image of ours has no room for clusters of any length.
        9 | 10 => {
            all["compress"] = json!(true);
            let raw = |n: &u32| {
                cast.images
                    .iter()
                    .any(|i| i.file == format!("backup{n}.img") && i.format == Format::Raw)
            };
            all["target"] = match (0..kept::TARGETS).find(raw) {
                Some(number) => json!(format!("u{number}")),
                None => json!("nowhere"),
            };
        }
        _ => {}
    }
}

fn transaction(rng: &mut Rng, cast: &mut Cast, made: &mut Made) -> Step {
    let grouped = rng.chance(1, 2);
    let mut actions = Vec::new();
    for _ in 0..1 + rng.below(3) {
        let other = if grouped { rng.one_in(16) } else { rng.one_in(3) };
        actions.push(if other {
            bitmap::action(rng, cast)
        } else {
            json!({"type": "blockdev-backup", "data": backup(rng, cast, made)})
        });
    }
    if rng.one_in(8) {
        actions.push(json!({"type": "abort", "data": {}}));
    }
    let mut arguments = json!({ "actions": actions });
    if grouped {
        arguments["properties"] = json!({"completion-mode": "grouped"});
    }
    command("transaction", arguments)
}
