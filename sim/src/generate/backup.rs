//! Backups, woven into scenarios when everything else is drawn: targets, jobs of every mode, verbs, fleecing.
//!
//! Rules: a stream of random numbers of its own, as for bitmaps. Targets are images of their own beside the chain; some are
//! put above the source, as fleecing does. Sometimes the filter is opened by hand with a snapshot node above it, and the
//! guests of the topmost node go through it. Most commands make sense; some deliberately do not.
//! Jobs that never end by themselves are cancelled last.
//! Not covered: a target inside the source's chain, several backups that change
//! places in one chain.

use serde_json::{Map, Value, json};

use super::monitor::MONITOR;
use super::{Profile, Reach, SETUP, command, jobs, names};
use crate::rng::{Rng, Stream};
use crate::scenario::{Action, Format, GuestOp, Image, Range, Scenario, Step, WaitJob};

/// Guests that look at targets and snapshots.
pub(super) const READER: &str = "reader";

/// What backups are about in one scenario.
pub(super) struct Plan {
    /// Nodes that may be backed up: the topmost one first.
    pub(super) devices: Vec<String>,
    /// Target nodes.
    targets: Vec<String>,
    /// Exports of targets and snapshots, which are only read.
    pub(super) views: Vec<String>,
    pub(super) size: u64,
    /// A filter was opened by hand: its target is taken.
    pub(super) by_hand: bool,
    jobs: u32,
    /// Jobs that only end when they are cancelled: sync none.
    pub(super) endless: Vec<String>,
}

/// Puts backups between the steps behind the setup.
pub(super) fn weave(seed: u64, profile: Profile, reach: Reach, scenario: &mut Scenario) {
    let rng = &mut Rng::stream(seed, Stream::Backups);
    if profile != Profile::Backup && !rng.chance(1, 4) {
        return;
    }
    let devices: Vec<String> = names(&scenario.steps)
        .into_iter()
        .rev()
        .filter(|name| !name.starts_with('o') && !name.starts_with('f') && !name.starts_with("tf"))
        .collect();
    let Some(size) = top_size(scenario) else { return };
    if devices.is_empty() {
        return;
    }
    let mut plan = Plan {
        devices,
        targets: Vec::new(),
        views: Vec::new(),
        size,
        by_hand: false,
        jobs: 0,
        endless: Vec::new(),
    };
    plan.setup(rng, reach, scenario);
    let first = after_setup(scenario);
    if reach.backup {
        plan.backups(rng, first, scenario);
    }
    let rng = &mut Rng::stream(seed, Stream::CopyOffload);
    // What copies do to each other is judged by events, which the gated daemon has none of.
    let told = profile == Profile::Backup && reach.backup && reach.drain;
    let offload = told && plan.offload(rng, scenario);
    // The last word of the monitor, so that everything comes to an end.
    for id in &plan.endless {
        scenario.steps.push(command(
            MONITOR,
            "block-job-cancel",
            json!({"device": id, "force": true}),
        ));
    }
    for _ in 0..rng.below(12) {
        if let Some(read) = plan.look(rng, scenario.grain) {
            let at = place(rng, scenario, first);
            insert(scenario, at, vec![read]);
        }
    }
    if offload {
        let rng = &mut Rng::stream(seed, Stream::CopyOffload);
        plan.look_at_fleecing(rng, scenario);
    }
    let rng = &mut Rng::stream(seed, Stream::DiscardsBesideBackups);
    discards(rng, reach, &mut scenario.steps);
    let rng = &mut Rng::stream(seed, Stream::CopyOnReadAboveFilters);
    copy_on_read_above(rng, reach, &mut scenario.steps);
    let rng = &mut Rng::stream(seed, Stream::UnrestBesideBackups);
    unrest(rng, reach, &mut scenario.steps);
    if reach.compression {
        let rng = &mut Rng::stream(seed, Stream::CompressedBackups);
        compress(rng, &mut scenario.steps);
    }
}

/// Some backups compress what they copy; some targets cannot take that.
fn compress(rng: &mut Rng, steps: &mut [Step]) {
    let often = rng.chance(1, 4);
    for step in steps {
        if let Action::Command { execute, arguments } = &mut step.action {
            for backup in backups_of(execute, arguments) {
                if often && rng.chance(3, 4) {
                    backup.insert("compress".to_owned(), json!(true));
                }
            }
        }
    }
}

/// Has guests come to a filter that was opened by hand through one that copies on read, whose copies change nothing. What stands
/// in between has to hand that on.
fn copy_on_read_above(rng: &mut Rng, reach: Reach, steps: &mut Vec<Step>) {
    let export = steps.iter().position(|step| match &step.action {
        Action::Command { execute, arguments } => {
            execute == "block-export-add" && arguments.get("node-name") == Some(&json!("cbw"))
        }
        _ => false,
    });
    let Some(at) = export.filter(|_| rng.chance(1, 3)) else {
        return;
    };
    if let Action::Command { arguments, .. } = &mut steps[at].action {
        arguments.insert("node-name".to_owned(), json!("ccbw"));
    }
    let mut below = "cbw";
    let mut between = Vec::new();
    if reach.throttle && rng.chance(1, 3) {
        let group = json!({"qom-type": "throttle-group", "id": "gcbw"});
        let add = json!({"driver": "throttle", "node-name": "tcbw", "throttle-group": "gcbw", "file": below});
        between.push(command(SETUP, "object-add", group));
        between.push(command(SETUP, "blockdev-add", add));
        below = "tcbw";
    }
    // It makes the copies itself. Not under the gated daemon, which loses guests' writes there (docs/deviations.md).
    if reach.throttle && rng.chance(1, 2) {
        let add = json!({"driver": "raw", "node-name": "rcbw", "file": below});
        between.push(command(SETUP, "blockdev-add", add));
        below = "rcbw";
    }
    let add = json!({"driver": "copy-on-read", "node-name": "ccbw", "file": below});
    between.push(command(SETUP, "blockdev-add", add));
    steps.splice(at..at, between);
}

/// Has backups that work by a bitmap take their time, cancels them on the way, and has others ask for the bitmap meanwhile.
fn unrest(rng: &mut Rng, reach: Reach, steps: &mut Vec<Step>) {
    if !rng.chance(1, 2) {
        return;
    }
    let mut at = 0;
    while at < steps.len() {
        let Action::Command { execute, arguments } = &mut steps[at].action else {
            at += 1;
            continue;
        };
        at += 1;
        let text = |key: &str| arguments.get(key).and_then(Value::as_str).map(str::to_owned);
        let (Some(id), Some(node), Some(bitmap)) = (text("job-id"), text("device"), text("bitmap")) else {
            continue;
        };
        if execute != "blockdev-backup" || rng.chance(1, 4) {
            continue;
        }
        if rng.chance(1, 2) && reach.rates {
            arguments.insert("speed".to_owned(), json!(*rng.pick(&[65536u32, 131_072])));
        }
        let mut soon = |step: Step| {
            let to = at + rng.below(8) as usize;
            steps.insert(to.min(steps.len()), step);
        };
        let other = if bitmap == "k0" { "k1" } else { "k0" };
        soon(command(
            MONITOR,
            "block-job-cancel",
            json!({"device": id, "force": true}),
        ));
        soon(command(
            MONITOR,
            "block-dirty-bitmap-merge",
            json!({"node": node, "target": other, "bitmaps": [bitmap]}),
        ));
    }
}

/// Lets guests' discards through a filter that was opened by hand, which keeps them back otherwise, and has some backups discard
/// in their source what they have copied.
fn discards(rng: &mut Rng, reach: Reach, steps: &mut [Step]) {
    let (pass, sources) = (rng.chance(3, 4), rng.chance(1, 4));
    for step in &mut *steps {
        if let Action::Command { execute, arguments } = &mut step.action
            && execute == "blockdev-add"
            && pass
            && arguments
                .get("driver")
                .is_some_and(|driver| driver == "copy-before-write")
        {
            arguments.insert("discard".to_owned(), json!("unmap"));
        }
    }
    if sources && reach.discard_source {
        discard_sources(rng, steps);
    }
}

/// Some backups discard in their source what they have copied.
fn discard_sources(rng: &mut Rng, steps: &mut [Step]) {
    for step in steps {
        if let Action::Command { execute, arguments } = &mut step.action {
            for backup in backups_of(execute, arguments) {
                if rng.chance(3, 4) {
                    backup.insert("discard-source".to_owned(), json!(true));
                }
            }
        }
    }
}

/// The arguments of every backup that a command starts.
pub(super) fn backups_of<'a>(
    execute: &str,
    arguments: &'a mut Map<String, Value>,
) -> Vec<&'a mut Map<String, Value>> {
    match execute {
        "blockdev-backup" => vec![arguments],
        "transaction" => {
            let actions = arguments.get_mut("actions").and_then(Value::as_array_mut);
            let of_backup = |action: &'a mut Value| {
                let is_one = action["type"] == "blockdev-backup";
                action["data"].as_object_mut().filter(|_| is_one)
            };
            actions.into_iter().flatten().filter_map(of_backup).collect()
        }
        _ => Vec::new(),
    }
}

/// Where the setup ends.
pub(super) fn after_setup(scenario: &Scenario) -> usize {
    let first = scenario.steps.iter().position(|step| step.actor != SETUP);
    first.unwrap_or(scenario.steps.len())
}

/// The length of the topmost image as nodes have it, bytes.
pub(super) fn top_size(scenario: &Scenario) -> Option<u64> {
    let of_chain = |image: &&Image| image.file.starts_with('i');
    let top = scenario.images.iter().rev().find(of_chain)?;
    Some(top.size.next_multiple_of(512))
}

/// Somewhere from `first` on, sooner rather than later.
pub(super) fn place(rng: &mut Rng, scenario: &Scenario, first: usize) -> usize {
    let room = u32::try_from(scenario.steps.len() - first + 1).expect("few steps");
    first + rng.below(room).min(rng.below(room)) as usize
}

pub(super) fn insert(scenario: &mut Scenario, at: usize, steps: Vec<Step>) -> usize {
    let end = at + steps.len();
    scenario.steps.splice(at..at, steps);
    end
}

impl Plan {
    fn setup(&mut self, rng: &mut Rng, reach: Reach, scenario: &mut Scenario) {
        let mut steps = Vec::new();
        let by_hand = rng.chance(1, 4) || !reach.backup;
        // Nobody else may fill the target of a filter that was opened by hand.
        for number in 0..1 + rng.below(2).max(u32::from(by_hand)) {
            let node = self.target(rng, scenario, number, &mut steps);
            if rng.chance(1, 2) {
                self.view(&node, &mut steps);
            }
            self.targets.push(node);
        }
        if by_hand {
            self.filter_by_hand(rng, scenario, &mut steps);
        }
        if rng.chance(1, 2) {
            for name in ["k0", "k1"] {
                let granularity = *rng.pick(&[512u32, 4096, 65536, 131_072]);
                // What failing storage leaves of stored ones is not told by the model.
                let persistent = rng.chance(1, 2) && reach.bitmaps;
                let add = json!({"node": self.devices[0], "name": name, "granularity": granularity,
                    "persistent": persistent});
                steps.push(command(MONITOR, "block-dirty-bitmap-add", add));
            }
        }
        insert(scenario, after_setup(scenario), steps);
    }

    /// Jobs, and what is done to them, from step `first` on.
    fn backups(&mut self, rng: &mut Rng, first: usize, scenario: &mut Scenario) {
        let mut at = first;
        for _ in 0..1 + rng.below(3) {
            at = place(rng, scenario, at);
            let steps = self.start(rng);
            at = insert(scenario, at, steps);
            for _ in 0..rng.below(4) {
                at = place(rng, scenario, at);
                let steps = self.afterwards(rng);
                at = insert(scenario, at, steps);
            }
        }
    }

    /// An image to copy to, and the command that opens it.
    fn target(&self, rng: &mut Rng, scenario: &mut Scenario, number: u32, steps: &mut Vec<Step>) -> String {
        let (file, node) = (format!("t{number}.img"), format!("t{number}"));
        let format = if rng.chance(1, 3) {
            Format::Raw
        } else {
            Format::Qcow2
        };
        // A filter that is opened takes a longer target, a job does not.
        let size = if rng.chance(1, 12) {
            self.size + 512
        } else {
            self.size
        };
        scenario.images.push(Image {
            file: file.clone(),
            format,
            size,
            cluster_size: *rng.pick(&[512, 4096, 65536, 65536, 131_072]),
            compat: 3,
            refcount_bits: 16,
            backing_file: None,
            backing_format: None,
            free: 0,
            fill: Vec::new(),
        });
        let driver = format.driver();
        let mut add = json!({"driver": driver, "node-name": node, "discard": "unmap",
            "file": {"driver": "file", "filename": file, "node-name": format!("f{node}"), "discard": "unmap"}});
        // One at most: which of two is older, as refusals tell, changes when a refused backup moves one and puts it back.
        if number == 0 && format == Format::Qcow2 && rng.chance(1, 3) {
            add["backing"] = json!(self.devices[0]);
        }
        steps.push(command(SETUP, "blockdev-add", add));
        node
    }

    pub(super) fn view(&mut self, node: &str, steps: &mut Vec<Step>) {
        let id = format!("x-{node}");
        let add = json!({"type": "nbd", "id": id, "node-name": node, "writable": false});
        steps.push(command(SETUP, "block-export-add", add));
        self.views.push(id);
    }

    /// A copy-before-write filter above the topmost node, below its guests, with the snapshot that it keeps.
    fn filter_by_hand(&mut self, rng: &mut Rng, scenario: &mut Scenario, steps: &mut Vec<Step>) {
        let top = self.devices[0].clone();
        let target = self.targets[0].clone();
        let mut add =
            json!({"driver": "copy-before-write", "node-name": "cbw", "file": top, "target": target});
        if rng.chance(1, 3) {
            add["on-cbw-error"] = json!(*rng.pick(&["break-guest-write", "break-snapshot"]));
        }
        let exports = scenario.steps.iter().position(|step| {
            matches!(&step.action, Action::Command { execute, arguments }
                if execute == "block-export-add" && arguments.get("node-name") == Some(&json!(top)))
        });
        let Some(at) = exports else { return };
        if let Action::Command { arguments, .. } = &mut scenario.steps[at].action {
            arguments.insert("node-name".to_owned(), json!("cbw"));
        }
        // Guests come when the filter is there.
        let export = scenario.steps.remove(at);
        steps.push(command(SETUP, "blockdev-add", add));
        let snapshot = json!({"driver": "snapshot-access", "node-name": "snap", "file": "cbw"});
        steps.push(command(SETUP, "blockdev-add", snapshot));
        steps.push(export);
        self.view("snap", steps);
        self.by_hand = true;
    }

    fn device(&self, rng: &mut Rng) -> &str {
        match rng.below(8) {
            0 => rng.pick(&self.devices).as_str(),
            _ => &self.devices[0],
        }
    }

    fn free_target(&self, rng: &mut Rng) -> String {
        if self.by_hand {
            return self.targets[1].clone();
        }
        rng.pick(&self.targets).clone()
    }

    /// One backup, or several in one transaction.
    fn start(&mut self, rng: &mut Rng) -> Vec<Step> {
        if !rng.chance(1, 4) {
            let arguments = self.backup(rng);
            return vec![command(MONITOR, "blockdev-backup", arguments)];
        }
        let mut actions = Vec::new();
        for _ in 0..1 + rng.below(3) {
            let device = self.device(rng).to_owned();
            let bitmap = json!({"node": device, "name": *rng.pick(&["k0", "k1", "k2"])});
            let (kind, data) = match rng.below(6) {
                0 => ("block-dirty-bitmap-clear", bitmap),
                1 => ("block-dirty-bitmap-add", bitmap),
                _ => ("blockdev-backup", self.backup(rng)),
            };
            actions.push(json!({"type": kind, "data": data}));
        }
        if rng.chance(1, 8) {
            actions.push(json!({"type": "abort", "data": {}}));
        }
        let mut arguments = json!({ "actions": actions });
        if rng.chance(1, 2) {
            arguments["properties"] =
                json!({"completion-mode": *rng.pick(&["grouped", "grouped", "individual"])});
        }
        vec![command(MONITOR, "transaction", arguments)]
    }

    fn backup(&mut self, rng: &mut Rng) -> Value {
        let id = format!("k{}", self.jobs);
        self.jobs += 1;
        let sync = *rng.pick(&[
            "full",
            "full",
            "full",
            "top",
            "none",
            "bitmap",
            "bitmap",
            "incremental",
        ]);
        if sync == "none" {
            self.endless.push(id.clone());
        }
        let mut arguments = json!({"job-id": id, "device": self.device(rng), "target": self.free_target(rng),
            "sync": sync});
        if rng.chance(1, 24) {
            arguments["target"] = json!(self.device(rng));
        }
        self.bitmap(rng, sync, &mut arguments);
        if rng.chance(1, 6) {
            arguments["speed"] = json!(*rng.pick(&[0u32, 65536, 131_072, 1 << 20]));
        }
        if rng.chance(1, 4) {
            arguments["x-perf"] = json!({"max-workers": *rng.pick(&[1u32, 1, 2, 64]),
                "max-chunk": *rng.pick(&[0u32, 65536, 131_072, 1024]), "use-copy-range": rng.chance(1, 2)});
        }
        for key in ["on-source-error", "on-target-error"] {
            if rng.chance(1, 4) {
                arguments[key] = json!(*rng.pick(&["report", "ignore", "stop", "enospc"]));
            }
        }
        if rng.chance(1, 3) {
            arguments["filter-node-name"] = json!(format!("cbw{}", self.jobs));
        }
        for key in ["auto-finalize", "auto-dismiss"] {
            if rng.chance(1, 4) {
                arguments[key] = json!(false);
            }
        }
        arguments
    }

    fn bitmap(&self, rng: &mut Rng, sync: &str, arguments: &mut Value) {
        let needs = matches!(sync, "bitmap" | "incremental");
        if needs != rng.chance(1, 16) {
            arguments["bitmap"] = json!(*rng.pick(&["k0", "k0", "k1"]));
        }
        if (needs && sync == "bitmap") != rng.chance(1, 16) {
            arguments["bitmap-mode"] = json!(*rng.pick(&["on-success", "never", "always"]));
        }
    }

    /// What comes after a backup was started: verbs, waits, commands on its bitmap.
    fn afterwards(&self, rng: &mut Rng) -> Vec<Step> {
        let id = format!("k{}", rng.below(self.jobs.max(1)));
        let turn = if self.endless.contains(&id) {
            [0, 1, 4, 5][rng.below(4) as usize]
        } else {
            rng.below(6)
        };
        match turn {
            0 | 1 => vec![jobs::verb(rng, &id, MONITOR)],
            2 => {
                let status = *rng.pick(&["concluded", "concluded", "pending", "null"]);
                vec![wait(&id, status, None)]
            }
            3 => {
                let offset = u64::from(rng.below(5)) * self.size / 4;
                vec![wait(&id, "running", Some(offset)), jobs::verb(rng, &id, MONITOR)]
            }
            4 => {
                let bitmap = json!({"node": self.devices[0], "name": *rng.pick(&["k0", "k1"])});
                let verb = *rng.pick(&[
                    "block-dirty-bitmap-clear",
                    "block-dirty-bitmap-disable",
                    "block-dirty-bitmap-remove",
                    "block-dirty-bitmap-enable",
                ]);
                vec![command(MONITOR, verb, bitmap)]
            }
            _ => vec![command(MONITOR, "query-jobs", json!({}))],
        }
    }

    /// Reads of a target or a snapshot.
    pub(super) fn look(&self, rng: &mut Rng, grain: u32) -> Option<Step> {
        let grain = u64::from(grain);
        let count = u32::try_from(self.size / grain).ok().filter(|count| *count > 0)?;
        if self.views.is_empty() {
            return None;
        }
        let first = u64::from(rng.below(count));
        let grains = (1 + u64::from(rng.below(32))).min(u64::from(count) - first);
        let range = Range {
            offset: first * grain,
            length: grains * grain,
        };
        Some(Step {
            actor: READER.to_owned(),
            action: Action::Guest {
                export: rng.pick(&self.views).clone(),
                op: if rng.chance(1, 6) {
                    GuestOp::BlockStatus(range)
                } else {
                    GuestOp::Read(range)
                },
            },
            wait: rng.chance(1, 2),
        })
    }
}

pub(super) fn wait(id: &str, status: &str, offset: Option<u64>) -> Step {
    Step {
        actor: MONITOR.to_owned(),
        action: Action::WaitJob {
            job: WaitJob {
                id: id.to_owned(),
                status: status.to_owned(),
                offset,
            },
        },
        wait: true,
    }
}
