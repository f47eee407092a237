//! Scenarios beyond the model, from seeds: a chain with filters, guests on it, and every job and change of the graph that
//! the daemon has.
//!
//! Rules: a function of the seed alone. What a command names is mostly there, so that most commands are accepted; what
//! the daemon answers is not looked at here.

use serde_json::{Map, Value, json};

use super::setup::{self, GRAIN};
use crate::rng::{Rng, Stream, mix};
use crate::scenario::{Action, Format, GuestOp, Image, Range, Scenario, Step, WaitJob};

/// What a scenario is about.
pub(super) struct Cast {
    pub(super) layers: usize,
    pub(super) images: Vec<Image>,
    /// Nodes of formats, base first.
    pub(super) chain: Vec<String>,
    /// What guests are on, and jobs of.
    pub(super) top: String,
    pub(super) throttle: bool,
    /// Options of nodes, with children by name.
    options: Vec<(String, Value)>,
    /// (name, writable).
    exports: Vec<(String, bool)>,
    filters: Vec<String>,
    jobs: u32,
    mirrors: Vec<String>,
    overlays: usize,
    targets: usize,
    bitmaps: u32,
    made: u32,
    /// Some node of `raw` is between others: a chain ends there.
    cut: bool,
}

/// A step of the monitor.
pub(super) fn command(execute: &str, arguments: Value) -> Step {
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

/// The scenario of a seed.
#[must_use]
pub fn generate(seed: u64) -> Scenario {
    // Not the workload of the same seed in another profile.
    let mut rng = Rng::stream(mix(seed), Stream::Workload);
    let rng = &mut rng;
    let layers = 1 + rng.below(4) as usize;
    let mut cast = Cast {
        layers,
        images: setup::images(rng, layers),
        chain: Vec::new(),
        top: String::new(),
        throttle: false,
        options: Vec::new(),
        exports: Vec::new(),
        filters: Vec::new(),
        jobs: 0,
        mirrors: Vec::new(),
        overlays: 0,
        targets: 0,
        bitmaps: 0,
        made: 0,
        cut: false,
    };
    let mut steps = Vec::new();
    setup::setup(rng, &mut cast, &mut steps);
    let target = steps.len() + 8 + rng.below(16) as usize;
    while steps.len() < target {
        cast.next(rng, &mut steps);
    }
    Scenario {
        seed: Some(seed),
        grain: u32::try_from(GRAIN).expect("small"),
        beyond_model: true,
        images: cast.images,
        steps,
        ..Scenario::default()
    }
}

impl Cast {
    /// Opens a node and remembers how.
    pub(super) fn add(&mut self, add: Value, steps: &mut Vec<Step>) {
        let mut options = add.clone();
        for key in ["file", "image"] {
            if let Some(name) = options.get(key).and_then(|child| child.get("node-name")).cloned() {
                options[key] = name;
            }
        }
        let name = add["node-name"].as_str().unwrap_or_default().to_owned();
        self.options.push((name, options));
        steps.push(command("blockdev-add", add));
    }

    /// A filter over this node.
    pub(super) fn filter(&mut self, rng: &mut Rng, below: &str, steps: &mut Vec<Step>) -> Option<String> {
        let name = format!("flt{}", self.made);
        self.made += 1;
        let add = match rng.below(9) {
            0 | 1 => json!({"driver": "copy-on-read", "node-name": name, "file": below}),
            2 | 3 => {
                let mut add = json!({"driver": "copy-on-read", "node-name": name, "file": below});
                // The filtered node itself for bottom ends the daemon (known).
                let top = self
                    .chain
                    .iter()
                    .position(|n| n == below)
                    .unwrap_or(self.chain.len() - 1);
                if !self.cut && (top > 0 || rng.chance(1, 24)) {
                    add["bottom"] = json!(rng.pick(&self.chain[..top.max(1)]));
                }
                add
            }
            4 if self.throttle => {
                json!({"driver": "throttle", "node-name": name, "throttle-group": "tg", "file": below})
            }
            5 => json!({"driver": "blkdebug", "node-name": name, "image": below,
                "align": *rng.pick(&[512u32, 4096, 65536])}),
            6 | 7 => json!({"driver": "preallocate", "node-name": name, "file": below}),
            8 => {
                self.cut = true;
                json!({"driver": "raw", "node-name": name, "file": below})
            }
            _ => json!({"driver": "copy-on-read", "node-name": name, "file": below}),
        };
        self.add(add, steps);
        self.filters.push(name.clone());
        Some(name)
    }

    pub(super) fn export(&mut self, node: &str, writable: bool, steps: &mut Vec<Step>) {
        let id = format!("x{}", self.exports.len());
        steps.push(command(
            "block-export-add",
            json!({"type": "nbd", "id": id, "name": id, "node-name": node, "writable": writable}),
        ));
        self.exports.push((id, writable));
    }

    fn next(&mut self, rng: &mut Rng, steps: &mut Vec<Step>) {
        match rng.weighted(&[14, 6, 3, 3, 3, 4, 2, 3, 2, 2]) {
            0 => steps.push(self.guest(rng)),
            1 => self.job(rng, steps),
            2 => self.verb(rng, steps),
            3 => self.snapshot(rng, steps),
            4 => steps.push(self.resize(rng)),
            5 => self.reopen(rng, steps),
            6 => {
                let node = self.any(rng);
                self.filter(rng, &node, steps);
                if rng.chance(1, 2) {
                    let name = format!("flt{}", self.made - 1);
                    let writable = rng.chance(1, 2);
                    self.export(&name, writable, steps);
                }
            }
            7 => steps.push(self.smaller(rng)),
            8 => self.bitmap(rng, steps),
            _ => self.window(rng, steps),
        }
    }

    fn any(&self, rng: &mut Rng) -> String {
        match rng.below(6) {
            0 if !self.filters.is_empty() => rng.pick(&self.filters).clone(),
            1 | 2 => rng.pick(&self.chain).clone(),
            _ => self.top.clone(),
        }
    }

    fn size(&self) -> u64 {
        self.images[self.layers - 1].size
    }

    fn guest(&self, rng: &mut Rng) -> Step {
        let (export, writable) = rng.pick(&self.exports).clone();
        let grains = u32::try_from(self.size() / GRAIN).expect("small");
        let start = rng.below(grains);
        let most = *rng.pick(&[1u32, 4, 24, 160]);
        let length = 1 + rng.below((grains - start).min(most));
        let range = Range {
            offset: u64::from(start) * GRAIN,
            length: u64::from(length) * GRAIN,
        };
        let op = match rng.below(if writable { 14 } else { 4 }) {
            0..=2 => GuestOp::Read(range),
            3 => GuestOp::BlockStatus(range),
            4 => GuestOp::Flush,
            5 | 6 => GuestOp::WriteZeroes(range),
            7 => GuestOp::WriteZeroesUnmap(range),
            8 | 9 => GuestOp::Discard(range),
            _ => GuestOp::Write(range),
        };
        Step {
            actor: "guest".to_owned(),
            action: Action::Guest { export, op },
            wait: true,
        }
    }

    fn job(&mut self, rng: &mut Rng, steps: &mut Vec<Step>) {
        self.jobs += 1;
        let id = format!("j{}", self.jobs);
        let top = if rng.chance(4, 5) {
            self.top.clone()
        } else {
            self.any(rng)
        };
        let mut arguments = json!({"job-id": id, "device": top});
        let execute = match rng.below(8) {
            0 | 1 => {
                arguments["filter-node-name"] = json!(format!("filter{}", self.jobs));
                match rng.below(4) {
                    0 => arguments["base-node"] = json!(rng.pick(&self.chain)),
                    1 => arguments["bottom"] = json!(rng.pick(&self.chain)),
                    _ => {}
                }
                "block-stream"
            }
            2..=4 => {
                arguments["filter-node-name"] = json!(format!("filter{}", self.jobs));
                if rng.chance(2, 3) {
                    arguments["top-node"] = json!(rng.pick(&self.chain));
                }
                if rng.chance(2, 3) {
                    arguments["base-node"] = json!(rng.pick(&self.chain));
                }
                self.mirrors.push(id);
                "block-commit"
            }
            5 | 6 => {
                arguments["filter-node-name"] = json!(format!("filter{}", self.jobs));
                arguments["target"] = json!(self.target(rng, steps));
                arguments["sync"] = json!(*rng.pick(&["full", "full", "full", "top", "none"]));
                if rng.chance(1, 3) {
                    arguments["copy-mode"] = json!("write-blocking");
                }
                if rng.chance(1, 6) {
                    arguments["granularity"] = json!(*rng.pick(&[512u32, 4096, 65536]));
                }
                self.mirrors.push(id);
                "blockdev-mirror"
            }
            _ => {
                arguments["filter-node-name"] = json!(format!("filter{}", self.jobs));
                arguments["target"] = json!(self.target(rng, steps));
                arguments["sync"] = json!(*rng.pick(&["full", "full", "full", "top", "none"]));
                "blockdev-backup"
            }
        };
        if rng.chance(1, 2) {
            arguments["speed"] = json!(1);
        }
        if rng.chance(1, 8) {
            arguments["auto-finalize"] = json!(false);
        }
        if rng.chance(1, 8) {
            arguments["auto-dismiss"] = json!(false);
        }
        steps.push(command(execute, arguments));
    }

    /// A node to copy to, opened now.
    fn target(&mut self, rng: &mut Rng, steps: &mut Vec<Step>) -> String {
        let at = self.layers + 2 + self.targets;
        let Some(image) = self.images.get(at).cloned() else {
            return format!("t{}", rng.below(2));
        };
        let name = format!("t{}", self.targets);
        self.targets += 1;
        let mut add = setup::over_image(rng, &image, &name);
        if image.format == Format::Qcow2 {
            add["backing"] = Value::Null;
        }
        self.add(add, steps);
        name
    }

    fn verb(&mut self, rng: &mut Rng, steps: &mut Vec<Step>) {
        let id = if !self.mirrors.is_empty() && rng.chance(1, 2) {
            rng.pick(&self.mirrors).clone()
        } else {
            format!("j{}", 1 + rng.below(self.jobs.max(1)))
        };
        let unbound = command("block-job-set-speed", json!({"device": id, "speed": 0}));
        match rng.below(10) {
            0 => steps.push(command("job-pause", json!({"id": id}))),
            1 => steps.push(command("job-resume", json!({"id": id}))),
            2 => steps.push(command(
                "block-job-cancel",
                json!({"device": id, "force": rng.chance(1, 2)}),
            )),
            3 => steps.push(command("job-finalize", json!({"id": id}))),
            4 => steps.push(command("job-dismiss", json!({"id": id}))),
            5 => steps.push(unbound),
            6 => steps.push(command("job-cancel", json!({"id": id}))),
            _ => {
                steps.push(unbound);
                steps.push(Step {
                    actor: "monitor".to_owned(),
                    action: Action::WaitJob {
                        job: WaitJob {
                            id: id.clone(),
                            status: "ready".to_owned(),
                            offset: None,
                        },
                    },
                    wait: true,
                });
                steps.push(command("job-complete", json!({"id": id})));
            }
        }
    }

    fn snapshot(&mut self, rng: &mut Rng, steps: &mut Vec<Step>) {
        if rng.chance(1, 3) {
            let (execute, name) = (
                *rng.pick(&[
                    "blockdev-snapshot-internal-sync",
                    "blockdev-snapshot-internal-sync",
                    "blockdev-snapshot-delete-internal-sync",
                ]),
                format!("s{}", rng.below(2)),
            );
            let device = self.chain.last().expect("a layer").clone();
            steps.push(command(execute, json!({"device": device, "name": name})));
            return;
        }
        if self.overlays >= 2 {
            return;
        }
        let image = self.images[self.layers + self.overlays].clone();
        let name = format!("o{}", self.overlays);
        self.overlays += 1;
        let mut add = setup::over_image(rng, &image, &name);
        add["backing"] = Value::Null;
        self.add(add, steps);
        let node = self.chain.last().expect("a layer").clone();
        let snapshot = json!({"node": node, "overlay": name});
        match rng.below(4) {
            0 => {
                let mut actions = vec![json!({"type": "blockdev-snapshot", "data": snapshot})];
                if rng.chance(1, 2) {
                    actions.push(json!({"type": "abort", "data": {}}));
                } else {
                    self.bitmaps += 1;
                    actions.push(json!({"type": "block-dirty-bitmap-add",
                        "data": {"node": name, "name": format!("b{}", self.bitmaps)}}));
                    self.taken(&node, name);
                }
                steps.push(command("transaction", json!({"actions": actions})));
            }
            _ => {
                steps.push(command("blockdev-snapshot", snapshot));
                self.taken(&node, name);
            }
        }
    }

    fn taken(&mut self, node: &str, overlay: String) {
        if self.top == node {
            self.top.clone_from(&overlay);
        }
        for (name, options) in &mut self.options {
            if *name == overlay {
                options["backing"] = json!(node);
            }
        }
        self.chain.push(overlay);
    }

    fn resize(&self, rng: &mut Rng) -> Step {
        let grains = u32::try_from(self.size() / GRAIN).expect("small");
        let size = match rng.below(3) {
            0 => u64::from(1 + rng.below(grains)) * GRAIN,
            1 => u64::from(grains + rng.below(grains)) * GRAIN,
            _ => self.size(),
        };
        let node = if rng.chance(3, 4) {
            self.chain.last().expect("a layer").clone()
        } else {
            self.any(rng)
        };
        command("block_resize", json!({"node-name": node, "size": size}))
    }

    /// Other options, or other filters.
    fn reopen(&mut self, rng: &mut Rng, steps: &mut Vec<Step>) {
        if self.options.is_empty() {
            return;
        }
        let mut options: Vec<Value> = Vec::new();
        for _ in 0..1 + rng.below(2) {
            let at = rng.below(u32::try_from(self.options.len()).expect("few")) as usize;
            let (name, mut node) = self.options[at].clone();
            match rng.below(8) {
                0 => node["detect-zeroes"] = json!(*rng.pick(&["on", "off", "unmap"])),
                1 => node["discard"] = json!(*rng.pick(&["unmap", "ignore"])),
                2 => node["read-only"] = json!(rng.chance(1, 2)),
                3 if node.get("backing").is_some_and(Value::is_string) => {
                    let below = node["backing"].as_str().expect("just seen").to_owned();
                    if let Some(filter) = self.filter(rng, &below, steps) {
                        node["backing"] = json!(filter);
                    }
                }
                4 if node.get("backing").is_some_and(Value::is_string) => {
                    node["backing"] = json!(rng.pick(&self.chain));
                }
                5 => node["cache"] = json!({"direct": rng.chance(1, 2), "no-flush": rng.chance(1, 2)}),
                6 if node["driver"] == "qcow2" => {
                    let (key, value) = rng
                        .pick(&[
                            ("lazy-refcounts", json!(true)),
                            ("l2-cache-size", json!(512)),
                            ("cache-clean-interval", json!(1)),
                            ("discard-no-unref", json!(true)),
                            ("overlap-check", json!("all")),
                            ("nonsense", json!(1)),
                        ])
                        .clone();
                    node[key] = value;
                }
                _ => {}
            }
            // The same node twice in one command leaves it drained for ever (known).
            if options.iter().any(|o| o["node-name"] == node["node-name"]) && !rng.chance(1, 16) {
                continue;
            }
            self.options[at] = (name, node.clone());
            options.push(node);
        }
        steps.push(command("blockdev-reopen", json!({"options": options})));
    }

    fn smaller(&mut self, rng: &mut Rng) -> Step {
        match rng.below(6) {
            0 | 1 => command("blockdev-del", json!({"node-name": self.any(rng)})),
            2 => {
                let id = format!(
                    "x{}",
                    rng.below(u32::try_from(self.exports.len()).expect("few") + 1)
                );
                command("block-export-del", json!({"id": id, "mode": "hard"}))
            }
            3 => {
                let node = self.any(rng);
                command(
                    "blockdev-set-active",
                    json!({"node-name": node, "active": rng.chance(1, 2)}),
                )
            }
            4 => {
                let file = rng.pick(&self.images).file.clone();
                let (device, image) = (self.top.clone(), rng.pick(&self.chain).clone());
                command(
                    "change-backing-file",
                    json!({"device": device, "image-node-name": image, "backing-file": file}),
                )
            }
            _ => {
                let threshold = *rng.pick(&[0u32, 4096]);
                let node = self.any(rng);
                command(
                    "block-set-write-threshold",
                    json!({"node-name": node, "write-threshold": threshold}),
                )
            }
        }
    }

    fn bitmap(&mut self, rng: &mut Rng, steps: &mut Vec<Step>) {
        let node = self.any(rng);
        let name = format!("b{}", rng.below(self.bitmaps + 1));
        let on = json!({"node": node, "name": name});
        let (execute, arguments) = match rng.below(8) {
            0..=2 => {
                self.bitmaps += 1;
                let mut add = json!({"node": node, "name": format!("b{}", self.bitmaps)});
                if rng.chance(1, 2) {
                    add["persistent"] = json!(true);
                }
                if rng.chance(1, 2) {
                    add["granularity"] = json!(*rng.pick(&[512u32, 4096, 65536]));
                }
                ("block-dirty-bitmap-add", add)
            }
            3 => ("block-dirty-bitmap-remove", on),
            4 => ("block-dirty-bitmap-clear", on),
            5 => ("block-dirty-bitmap-disable", on),
            6 => ("block-dirty-bitmap-enable", on),
            _ => {
                let merge = json!({"node": node, "target": name, "bitmaps": ["b1", "b2"]});
                ("block-dirty-bitmap-merge", merge)
            }
        };
        steps.push(command(execute, arguments));
    }

    /// A part of a node, for guests of its own.
    fn window(&mut self, rng: &mut Rng, steps: &mut Vec<Step>) {
        let name = format!("win{}", self.made);
        self.made += 1;
        let grains = u32::try_from(self.size() / GRAIN).expect("small");
        let offset = rng.below(grains);
        let mut add = Map::new();
        add.insert("driver".to_owned(), json!("raw"));
        add.insert("node-name".to_owned(), json!(name));
        add.insert("file".to_owned(), json!(self.top));
        add.insert("offset".to_owned(), json!(u64::from(offset) * GRAIN));
        if rng.chance(2, 3) {
            let size = u64::from(1 + rng.below(grains - offset)) * GRAIN;
            add.insert("size".to_owned(), json!(size));
        }
        self.add(Value::Object(add), steps);
        let writable = rng.chance(1, 2);
        self.export(&name, writable, steps);
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
        }
    }
}
