//! Copy-before-write filters and snapshots of them, woven into a third of all scenarios; the other steps of a scenario stay
//! what they are.
//!
//! Rules: images of their own as targets, so that most of it is accepted; names that are few, so that commands meet each
//! other. A stream of random numbers of its own. No clusters that abort the daemon but now and then.

use serde_json::{Value, json};

use super::{Cast, GRAIN, any, command, plain};
use crate::rng::{Rng, Stream};
use crate::scenario::{Action, GuestOp, Range, Step};

/// Images to copy to.
pub(super) const TARGETS: u32 = 3;

/// What was made so far.
struct Made {
    filters: u32,
    snapshots: u32,
    exports: u32,
}

/// Puts such nodes, exports of them and requests of guests between the steps behind the first `setup`.
pub(super) fn weave(seed: u64, cast: &mut Cast, steps: &mut Vec<Step>, setup: usize) {
    let rng = &mut Rng::stream(seed, Stream::Kept);
    if !rng.chance(1, 3) {
        return;
    }
    let mut woven = targets(rng, cast, "kept", "t");
    let mut made = Made {
        filters: 0,
        snapshots: 0,
        exports: 0,
    };
    for _ in 0..8 + rng.below(10) {
        woven.push(step(rng, cast, &mut made));
    }
    spread(rng, woven, steps, setup);
}

/// Puts steps between those behind the first `setup`, in their order.
pub(super) fn spread(rng: &mut Rng, woven: Vec<Step>, steps: &mut Vec<Step>, setup: usize) {
    let room = u32::try_from(steps.len() - setup + 1).expect("few steps");
    let mut places: Vec<usize> = woven.iter().map(|_| rng.below(room) as usize).collect();
    places.sort_unstable();
    for (step, place) in woven.into_iter().zip(places).rev() {
        steps.insert(setup + place, step);
    }
}

/// Images of about the length of the top one, called `image` and a number, and nodes that show them, called `prefix` and the
/// same number.
pub(super) fn targets(rng: &mut Rng, cast: &mut Cast, image: &str, prefix: &str) -> Vec<Step> {
    let size = cast.images[cast.layers - 1].size;
    let mut steps = Vec::new();
    for number in 0..TARGETS {
        let raw = rng.one_in(4);
        let cluster = *rng.pick(&[2048u32, 4096, 65536, 131_072]);
        let size = if rng.one_in(20) { 2 * size } else { size };
        let compat = if rng.one_in(6) { 2 } else { 3 };
        let mut target = plain(&format!("{image}{number}.img"), raw, size, cluster, compat);
        if rng.one_in(4) {
            target.fill.push(crate::scenario::Fill {
                offset: 0,
                length: size.min(u64::from(cluster)),
                stored: crate::scenario::Stored::Data,
            });
        }
        let file =
            json!({"driver": "file", "node-name": format!("{prefix}f{number}"), "filename": target.file});
        let mut add = json!({"driver": if raw { "raw" } else { "qcow2" }, "node-name": format!("{prefix}{number}"), "file": file});
        if !raw {
            add["backing"] = if rng.one_in(4) {
                json!(node(rng, cast))
            } else {
                Value::Null
            };
        }
        match rng.below(16) {
            0 => add["read-only"] = json!(true),
            1 => add["discard"] = json!("unmap"),
            2 => add["detect-zeroes"] = json!("on"),
            _ => {}
        }
        cast.images.push(target);
        steps.push(command("blockdev-add", add));
    }
    for number in 0..TARGETS {
        cast.nodes.push(format!("{prefix}{number}"));
    }
    steps
}

/// Mostly the top of the chain.
fn node(rng: &mut Rng, cast: &Cast) -> String {
    if rng.chance(2, 3) {
        format!("n{}", cast.layers - 1)
    } else {
        any(rng, cast)
    }
}

fn step(rng: &mut Rng, cast: &mut Cast, made: &mut Made) -> Step {
    match rng.weighted(&[6, 4, 4, 2, 8]) {
        0 => filter(rng, cast, made),
        1 => snapshot(rng, cast, made),
        2 => export(rng, cast, made),
        3 => {
            let name = match rng.below(3) {
                0 => format!("s{}", rng.below(made.snapshots + 1)),
                1 => format!("c{}", rng.below(made.filters + 1)),
                _ => format!("t{}", rng.below(TARGETS)),
            };
            command("blockdev-del", json!({ "node-name": name }))
        }
        _ => guest(rng, cast, made),
    }
}

fn filter(rng: &mut Rng, cast: &mut Cast, made: &mut Made) -> Step {
    let target = if rng.chance(7, 8) {
        json!(format!("t{}", rng.below(TARGETS)))
    } else {
        json!(any(rng, cast))
    };
    let mut add = json!({"driver": "copy-before-write", "file": node(rng, cast), "target": target});
    if rng.one_in(3) {
        add["min-cluster-size"] =
            json!(*rng.pick(&[0i64, 1, 3, 65536, 65536, 131_072, 1 << 20, 1 << 27, -1]));
    }
    if rng.one_in(200) {
        add["min-cluster-size"] = json!(1i64 << 32);
    }
    if rng.one_in(4) {
        add["bitmap"] = json!({"node": node(rng, cast), "name": format!("b{}", rng.below(3))});
    }
    if rng.one_in(4) {
        add["on-cbw-error"] = json!(*rng.pick(&["break-guest-write", "break-snapshot", "break-everything"]));
    }
    if rng.one_in(8) {
        add["cbw-timeout"] = json!(*rng.pick(&[0i64, 1000, -1, 1 << 32]));
    }
    if rng.one_in(8) {
        add["read-only"] = json!(rng.chance(1, 2));
    }
    match rng.below(30) {
        0 => add["target"] = json!(5),
        1 => {
            add.as_object_mut().expect("an object").shift_remove("target");
        }
        2 => add["bitmap"] = json!({"node": "n0"}),
        3 => add["more"] = json!(1),
        4 => add["cbw-timeout"] = json!("soon"),
        _ => {}
    }
    named(rng, cast, &mut made.filters, "c", add)
}

fn snapshot(rng: &mut Rng, cast: &mut Cast, made: &mut Made) -> Step {
    let file = if rng.chance(4, 5) {
        format!("c{}", rng.below(made.filters + 1))
    } else {
        any(rng, cast)
    };
    let mut add = json!({"driver": "snapshot-access", "file": file});
    if rng.one_in(3) {
        add["discard"] = json!("unmap");
    }
    if rng.one_in(6) {
        add["read-only"] = json!(true);
    }
    if rng.one_in(30) {
        add["target"] = json!("t0");
    }
    named(rng, cast, &mut made.snapshots, "s", add)
}

fn named(rng: &mut Rng, cast: &mut Cast, count: &mut u32, prefix: &str, mut add: Value) -> Step {
    let name = if rng.one_in(24) {
        any(rng, cast)
    } else {
        format!("{prefix}{count}")
    };
    *count += 1;
    add["node-name"] = json!(name);
    cast.nodes.push(name);
    command("blockdev-add", add)
}

fn export(rng: &mut Rng, cast: &mut Cast, made: &mut Made) -> Step {
    let node = match rng.below(5) {
        0 | 1 => format!("c{}", rng.below(made.filters + 1)),
        2 | 3 => format!("s{}", rng.below(made.snapshots + 1)),
        _ => format!("t{}", rng.below(TARGETS)),
    };
    let name = format!("kx{}", made.exports);
    made.exports += 1;
    let writable = rng.chance(2, 3);
    let size = cast.images[cast.layers - 1].size;
    cast.exports.push((name.clone(), size, writable));
    command(
        "block-export-add",
        json!({"type": "nbd", "id": name, "name": name, "node-name": node, "writable": writable}),
    )
}

/// A request on an export that was made here, or another one; about as large as what is copied at once, now and then.
fn guest(rng: &mut Rng, cast: &Cast, made: &Made) -> Step {
    let own = (made.exports > 0).then(|| format!("kx{}", rng.below(made.exports)));
    let found = own.and_then(|own| cast.exports.iter().find(|(name, ..)| *name == own));
    let Some((export, size, writable)) = found.filter(|_| rng.chance(3, 4)).cloned() else {
        return super::guest(rng, cast);
    };
    let grains = u32::try_from(size / u64::from(GRAIN)).expect("small");
    let start = rng.below(grains);
    let most = if rng.one_in(3) { grains } else { 24 };
    let length = 1 + rng.below((grains - start).min(most));
    let range = Range {
        offset: u64::from(start) * u64::from(GRAIN),
        length: u64::from(length) * u64::from(GRAIN),
    };
    let op = match rng.below(if writable { 9 } else { 4 }) {
        0..=2 => GuestOp::Read(range),
        3 => GuestOp::BlockStatus(range),
        4 => GuestOp::WriteZeroes(range),
        5 => GuestOp::Discard(range),
        _ => GuestOp::Write(range),
    };
    Step {
        actor: "guest".to_owned(),
        action: Action::Guest { export, op },
        wait: true,
    }
}
