//! Scenarios of guest I/O, stream and copy-on-read whose end does not depend on the interleaving.
//!
//! Rules: every guest writes to a part of the disk that is its own, and what it has in flight never overlaps with
//! another write of its own; so what is stored at the end, and what a guest reads in its own part behind its own
//! writes, follows from the scenario alone. Guests read everywhere. Jobs end by themselves. Left out is what may be
//! carried out or not (discards, cancelled jobs) and what is known to go wrong (a filter with its own child for
//! `bottom`, which is also what a stream has whose base is right below its device; layers that are shorter than their
//! base under a stream).

use serde_json::{Value, json};

use crate::rng::{Rng, Stream};
use crate::scenario::{Action, Disk, Fill, Format, GuestOp, Image, Range, Scenario, Step, Stored, WaitJob};

const GRAIN: u64 = 512;
/// The export that guests write to.
const DISK: &str = "disk";
/// The copy-on-read filter.
pub(super) const FILTER: &str = "cor";

/// Draws a scenario.
#[must_use]
pub fn scenario(seed: u64) -> Scenario {
    let mut rng = Rng::stream(seed, Stream::Workload);
    let layers = 2 + rng.below(3) as usize;
    let cluster = *rng.pick(&[512u32, 512, 1024, 2048]);
    let clusters = 6 + u64::from(rng.below(10));
    let size = clusters * u64::from(cluster);
    let guests = 1 + rng.below(3) as usize;
    let mut draw = Draw {
        images: Vec::new(),
        steps: Vec::new(),
        rng,
    };
    for layer in 0..layers {
        draw.image(layer, cluster, size);
    }
    let shown = draw.setup(layers);
    for guest in 0..guests {
        let part = |n: usize| size / GRAIN * n as u64 / guests as u64;
        draw.guest(guest, part(guest)..part(guest + 1), size / GRAIN);
    }
    draw.monitor(layers);
    draw.lower_reader(shown, size);
    draw.mixed(seed)
}

struct Draw {
    images: Vec<Image>,
    steps: Vec<Step>,
    rng: Rng,
}

fn step(actor: &str, action: Action, wait: bool) -> Step {
    Step {
        actor: actor.to_owned(),
        action,
        wait,
    }
}

fn command(actor: &str, execute: &str, arguments: Value) -> Step {
    let Value::Object(arguments) = arguments else {
        unreachable!("written as an object")
    };
    let execute = execute.to_owned();
    step(actor, Action::Command { execute, arguments }, true)
}

impl Draw {
    fn image(&mut self, layer: usize, cluster: u32, size: u64) {
        let rng = &mut self.rng;
        let raw = layer == 0 && rng.chance(1, 4);
        let mut fill = Vec::new();
        for at in 0..size / u64::from(cluster) {
            if layer > 0 && !rng.chance(1, 3) {
                continue;
            }
            let stored = match rng.below(8) {
                0 if !raw => Stored::Zero,
                1 if !raw => Stored::Compressed,
                _ => Stored::Data,
            };
            fill.push(Fill {
                offset: at * u64::from(cluster),
                length: u64::from(cluster),
                stored,
            });
        }
        let below = layer.checked_sub(1);
        let below_raw = below.is_some_and(|b| self.images[b].format == Format::Raw);
        self.images.push(Image {
            file: format!("i{layer}.img"),
            format: if raw { Format::Raw } else { Format::Qcow2 },
            size,
            cluster_size: cluster,
            compat: 3,
            refcount_bits: 16,
            backing_file: below.map(|b| format!("i{b}.img")),
            backing_format: below.map(|_| if below_raw { "raw" } else { "qcow2" }.to_owned()),
            free: 0,
            fill,
        });
    }

    /// Opens the chain and exports it; a lower layer that is exported as well.
    fn setup(&mut self, layers: usize) -> Option<usize> {
        let setup = crate::generate::SETUP;
        for layer in 0..layers {
            let raw = self.images[layer].format == Format::Raw;
            let mut node = json!({"driver": if raw { "raw" } else { "qcow2" }, "node-name": format!("n{layer}"),
                "file": {"driver": "file", "node-name": format!("f{layer}"), "filename": format!("i{layer}.img")}});
            if layer > 0 {
                node["backing"] = json!(format!("n{}", layer - 1));
            }
            if layer + 1 < layers {
                node["read-only"] = json!(true);
            }
            self.steps.push(command(setup, "blockdev-add", node));
        }
        let top = layers - 1;
        let mut root = format!("n{top}");
        if self.rng.chance(1, 2) {
            let mut filter = json!({"driver": "copy-on-read", "node-name": FILTER, "file": root});
            if self.rng.chance(1, 2) {
                filter["bottom"] = json!(format!("n{}", self.rng.below(u32::try_from(top).expect("few"))));
            }
            self.steps.push(command(setup, "blockdev-add", filter));
            FILTER.clone_into(&mut root);
        }
        let export = json!({"type": "nbd", "id": DISK, "name": DISK, "node-name": root, "writable": true});
        self.steps.push(command(setup, "block-export-add", export));
        let lower = self
            .rng
            .chance(1, 3)
            .then(|| self.rng.below(u32::try_from(top).expect("few")) as usize);
        if let Some(lower) = lower {
            let export =
                json!({"type": "nbd", "id": "lower", "name": "lower", "node-name": format!("n{lower}")});
            self.steps.push(command(setup, "block-export-add", export));
        }
        lower
    }

    fn range(&mut self, grains: std::ops::Range<u64>) -> Range {
        let n = u32::try_from(grains.end - grains.start).expect("few grains");
        let (a, b) = (self.rng.below(n), self.rng.below(n.min(6)));
        let first = grains.start + u64::from(a);
        let last = (first + u64::from(b) + 1).min(grains.end);
        Range {
            offset: first * GRAIN,
            length: (last - first) * GRAIN,
        }
    }

    fn guest(&mut self, number: usize, own: std::ops::Range<u64>, all: u64) {
        let actor = format!("guest{number}");
        let mut in_flight: Vec<Range> = Vec::new();
        for _ in 0..3 + self.rng.below(5) {
            let write = !own.is_empty() && self.rng.chance(1, 2);
            let op = if write {
                let range = self.range(own.clone());
                match self.rng.below(4) {
                    0 => GuestOp::WriteZeroes(range),
                    1 => GuestOp::WriteFua(range),
                    _ => GuestOp::Write(range),
                }
            } else if self.rng.one_in(8) {
                GuestOp::Flush
            } else {
                GuestOp::Read(self.range(0..all))
            };
            let wait = self.rng.chance(1, 2);
            if let Some(range) = written(&op) {
                if in_flight.iter().any(|f| overlap(f, &range)) {
                    self.steps.push(step(&actor, settle(), true));
                    in_flight.clear();
                }
                if !wait {
                    in_flight.push(range);
                }
            }
            let export = DISK.to_owned();
            self.steps.push(step(&actor, Action::Guest { export, op }, wait));
        }
        self.steps.push(step(&actor, settle(), true));
        let everything = Range {
            offset: own.start * GRAIN,
            length: (own.end - own.start) * GRAIN,
        };
        if everything.length > 0 {
            let op = GuestOp::Read(everything);
            let export = DISK.to_owned();
            self.steps.push(step(&actor, Action::Guest { export, op }, true));
        }
    }

    /// A stream, sometimes two one after the other.
    fn monitor(&mut self, layers: usize) {
        let top = layers - 1;
        let mut device = top;
        for job in 0..1 + self.rng.below(2) {
            if self.rng.one_in(4) {
                device = (1 + self.rng.below(u32::try_from(top).expect("few")) as usize).min(top);
            }
            let id = format!("j{job}");
            let mut arguments = json!({"job-id": id, "device": format!("n{device}"),
                "filter-node-name": format!("stream{job}"), "auto-dismiss": self.rng.chance(1, 2)});
            // Everything, or down to a layer that is not right below; the layer that a first stream kept is, afterwards.
            if job == 0 && device >= 2 && self.rng.chance(1, 2) {
                let below = self.rng.below(u32::try_from(device - 1).expect("few"));
                if self.rng.chance(1, 2) {
                    arguments["base-node"] = json!(format!("n{below}"));
                } else {
                    arguments["bottom"] = json!(format!("n{}", below + 1));
                }
            }
            let dismissed = arguments["auto-dismiss"] == json!(true);
            self.steps.push(command("monitor", "block-stream", arguments));
            let (status, id) = (if dismissed { "null" } else { "concluded" }.to_owned(), id);
            let job = WaitJob {
                id: id.clone(),
                status,
                offset: None,
            };
            self.steps.push(step("monitor", Action::WaitJob { job }, true));
            if !dismissed {
                self.steps
                    .push(command("monitor", "job-dismiss", json!({ "id": id })));
            }
            // One that a layer was taken from cannot be named again.
            if device != top {
                break;
            }
        }
    }

    fn lower_reader(&mut self, shown: Option<usize>, size: u64) {
        if shown.is_none() {
            return;
        }
        for _ in 0..2 {
            let op = GuestOp::Read(self.range(0..size / GRAIN));
            let export = "lower".to_owned();
            self.steps
                .push(step("reader", Action::Guest { export, op }, true));
        }
    }

    fn mixed(self, seed: u64) -> Scenario {
        Scenario {
            title: Some("guest I/O, stream and copy-on-read".to_owned()),
            seed: Some(seed),
            grain: u32::try_from(GRAIN).expect("small"),
            disk: Disk::default(),
            images: self.images,
            steps: self.steps,
            ..Scenario::default()
        }
    }
}

fn settle() -> Action {
    Action::Settle {
        settle: serde_json::Map::new(),
    }
}

fn overlap(a: &Range, b: &Range) -> bool {
    a.offset < b.offset + b.length && b.offset < a.offset + a.length
}

/// What a request changes.
fn written(op: &GuestOp) -> Option<Range> {
    match op {
        GuestOp::Write(r) | GuestOp::WriteFua(r) | GuestOp::WriteZeroes(r) | GuestOp::WriteZeroesUnmap(r) => {
            Some(*r)
        }
        GuestOp::Discard(r) => Some(*r),
        GuestOp::Read(_) | GuestOp::Flush | GuestOp::BlockStatus(_) => None,
    }
}

/// Which grains of a read follow from the scenario alone: nobody writes to them but the same guest, and none of its
/// writes there can be in flight together with the read.
#[must_use]
pub fn determined(scenario: &Scenario, read: usize) -> Vec<bool> {
    let Action::Guest {
        export,
        op: GuestOp::Read(range),
    } = &scenario.steps[read].action
    else {
        return Vec::new();
    };
    let grain = u64::from(scenario.grain);
    let actor = &scenario.steps[read].actor;
    let mut out = vec![true; usize::try_from(range.length / grain).expect("validated")];
    for (at, other) in scenario.steps.iter().enumerate() {
        let Action::Guest { export: to, op } = &other.action else {
            continue;
        };
        let Some(write) = written(op).filter(|_| to == export) else {
            continue;
        };
        let (first, last) = (at.min(read), at.max(read));
        // Of two steps of one guest the first is over when it is waited for, or all are.
        let apart = other.actor == *actor
            && (scenario.steps[first].wait
                || scenario.steps[first..last]
                    .iter()
                    .any(|s| s.actor == *actor && matches!(s.action, Action::Settle { .. })));
        if !apart {
            for (n, known) in (0u64..).zip(&mut out) {
                let here = range.offset + n * grain;
                *known &= here + grain <= write.offset || write.offset + write.length <= here;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scenarios_are_valid_and_what_is_determined_is_what_it_says() {
        let (mut streams, mut filters, mut free, mut bound) = (0, 0, 0, 0);
        for seed in 0..300 {
            let scenario = scenario(seed);
            crate::scenario::validate::validate(&scenario).unwrap_or_else(|e| panic!("seed {seed}: {e:?}"));
            for (at, step) in scenario.steps.iter().enumerate() {
                if let Action::Command { execute, arguments } = &step.action {
                    streams += u32::from(execute == "block-stream");
                    filters += u32::from(arguments.get("driver").is_some_and(|d| d == "copy-on-read"));
                }
                let known = determined(&scenario, at);
                bound += known.iter().filter(|k| **k).count();
                free += known.iter().filter(|k| !**k).count();
            }
        }
        assert!(streams >= 300 && filters > 100, "{streams} {filters}");
        assert!(bound > 4000 && free > 1000, "{bound} {free}");
    }

    #[test]
    fn a_write_in_flight_and_another_guest_make_a_read_free() {
        let steps = json!([
            {"actor": "a", "export": "x", "do": {"write": {"offset": 0, "length": 512}}, "wait": false},
            {"actor": "a", "export": "x", "do": {"read": {"offset": 0, "length": 2048}}},
            {"actor": "a", "settle": {}},
            {"actor": "a", "export": "x", "do": {"read": {"offset": 0, "length": 2048}}},
            {"actor": "b", "export": "x", "do": {"write": {"offset": 1024, "length": 512}}}]);
        let scenario = Scenario {
            steps: serde_json::from_value(steps).expect("steps"),
            ..Scenario::default()
        };
        assert_eq!(determined(&scenario, 1), [false, true, false, true]);
        assert_eq!(determined(&scenario, 3), [true, true, false, true]);
    }
}
