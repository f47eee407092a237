//! Throttle groups and filters: above the chain, in it, below it; and commands that change them under guests.
//!
//! Rules: limits are low enough that requests wait; the time they wait is virtual. A filter below a format stays over that
//! format's own file. Groups come and go, most of them while they are in use, which is refused.

use serde_json::{Map, Value, json};

use super::chain::Chain;
use super::monitor::MONITOR;
use super::{SETUP, Swarm, command};
use crate::rng::Rng;
use crate::scenario::Step;

/// Which groups the filters of a chain belong to, by place; `None`: no filter there.
#[derive(Clone, Debug, Default)]
pub(super) struct Layout {
    groups: u32,
    /// Above everything.
    pub(super) top: Option<u32>,
    /// Between the topmost image and the copy-on-read filter above it.
    pub(super) under_filter: Option<u32>,
    /// In the backing link of a layer.
    pub(super) backing: Vec<Option<u32>>,
    /// Between a layer and its file.
    pub(super) file: Vec<Option<u32>>,
}

impl Layout {
    pub(super) fn draw(rng: &mut Rng, swarm: &Swarm, named_lower: bool) -> Layout {
        let groups = swarm.throttle_groups;
        let layers = swarm.layers as usize;
        if groups == 0 {
            return Layout {
                backing: vec![None; layers],
                file: vec![None; layers],
                ..Layout::default()
            };
        }
        let mut some = |chance: u32| rng.chance(chance, 6).then(|| rng.below(groups));
        let mut layout = Layout {
            groups,
            top: some(3),
            under_filter: some(2).filter(|_| swarm.cor_node),
            backing: Vec::new(),
            file: Vec::new(),
        };
        for layer in 0..layers {
            layout.backing.push(some(2).filter(|_| layer > 0 && named_lower));
            layout
                .file
                .push(some(1).filter(|_| layer + 1 == layers || named_lower));
        }
        layout
    }

    /// The groups of the setup.
    pub(super) fn setup(&self, rng: &mut Rng, swarm: &Swarm, steps: &mut Vec<Step>) {
        for number in 0..self.groups {
            let mut add = json!({"qom-type": "throttle-group", "id": name(number)});
            if rng.chance(7, 8) {
                add["limits"] = limits(rng, swarm);
            }
            steps.push(command(SETUP, "object-add", add));
        }
    }
}

fn name(group: u32) -> String {
    format!("g{group}")
}

/// A filter's options.
pub(super) fn filter(node: &str, group: u32, file: Value) -> Map<String, Value> {
    let mut options = Map::new();
    options.insert("driver".to_owned(), json!("throttle"));
    options.insert("node-name".to_owned(), json!(node));
    options.insert("throttle-group".to_owned(), json!(name(group)));
    options.insert("file".to_owned(), file);
    options
}

fn limits(rng: &mut Rng, swarm: &Swarm) -> Value {
    let requests = *rng.pick(&[1u32, 5, 20, 20, 100, 1000]);
    let bytes = swarm.cluster * *rng.pick(&[1u32, 4, 16, 64]);
    match rng.below(8) {
        0 => json!({"iops-write": requests}),
        1 => json!({"iops-read": requests, "bps-write": bytes}),
        2 => json!({"bps-total": bytes}),
        3 => json!({"iops-total": requests, "iops-size": swarm.cluster}),
        4 => {
            json!({"bps-total": bytes, "bps-total-max": 2 * bytes, "bps-total-max-length": 1 + rng.below(3)})
        }
        _ => json!({"iops-total": requests}),
    }
}

/// Draws commands about groups and filters; remembers what it made.
#[derive(Default)]
pub(super) struct Throttling {
    /// Groups added since the setup.
    groups: u32,
    /// Filters added since: thr0, thr1, …
    filters: u32,
}

impl Throttling {
    fn group(&self, rng: &mut Rng, swarm: &Swarm) -> String {
        name(rng.below(swarm.throttle_groups + self.groups))
    }

    /// A command or two.
    pub(super) fn next(&mut self, rng: &mut Rng, swarm: &Swarm, chain: &Chain, steps: &mut Vec<Step>) {
        match rng.below(8) {
            0 => {
                let id = name(swarm.throttle_groups + self.groups);
                self.groups += 1;
                let add = json!({"qom-type": "throttle-group", "id": id, "limits": limits(rng, swarm)});
                steps.push(command(MONITOR, "object-add", add));
            }
            1 => steps.push(command(
                MONITOR,
                "object-del",
                json!({"id": self.group(rng, swarm)}),
            )),
            2 => self.add(rng, swarm, chain, steps),
            3 if self.filters > 0 => {
                let name = format!("thr{}", rng.below(self.filters));
                steps.push(command(MONITOR, "blockdev-del", json!({"node-name": name})));
            }
            _ => match rng.below(16) {
                0 => self.add(rng, swarm, chain, steps),
                _ => self.regroup(rng, swarm, chain, steps),
            },
        }
    }

    /// A filter over some node, which nobody uses, or which goes into the backing link above.
    fn add(&mut self, rng: &mut Rng, swarm: &Swarm, chain: &Chain, steps: &mut Vec<Step>) {
        let filter = format!("thr{}", self.filters);
        self.filters += 1;
        let below = rng.pick(&chain.nodes).clone();
        let group = self.group(rng, swarm);
        let add =
            json!({"driver": "throttle", "node-name": filter, "throttle-group": group, "file": below.name});
        steps.push(command(MONITOR, "blockdev-add", add));
        let above = below.layer + 1;
        if chain.layers().contains(&above) && rng.chance(2, 3) {
            let mut node = chain.definition(above, swarm);
            node.insert("backing".to_owned(), json!(filter));
            steps.push(command(MONITOR, "blockdev-reopen", json!({"options": [node]})));
        }
    }

    /// Filters move to other groups, all or none.
    fn regroup(&self, rng: &mut Rng, swarm: &Swarm, chain: &Chain, steps: &mut Vec<Step>) {
        if chain.throttles.is_empty() {
            return steps.push(command(
                MONITOR,
                "object-del",
                json!({"id": self.group(rng, swarm)}),
            ));
        }
        let mut list = Vec::new();
        for _ in 0..=rng.below(2) {
            let mut node = rng.pick(&chain.throttles).clone();
            let group = if rng.chance(1, 12) {
                "nobody".to_owned()
            } else {
                self.group(rng, swarm)
            };
            node.insert("throttle-group".to_owned(), json!(group));
            if list
                .iter()
                .all(|other: &Map<String, Value>| other["node-name"] != node["node-name"])
            {
                list.push(node);
            }
        }
        steps.push(command(MONITOR, "blockdev-reopen", json!({"options": list})));
    }
}
