//! Backups that copy through storage, and what goes on beside them.
//!
//! Rules: copies made that way wait for others only where they are tracked as others are. What shows whether they do is a target above
//! its source, whose readers must never see half of a cluster, and clusters of which a copy has only a part. A reader has to be slower
//! than a copy and the write that waits for it, which uniform choices make rarely, and priorities (`pct:3`) more often.
//! Not covered: sources whose clusters somebody frees while they are copied: nobody can as long as the filter is there.

use serde_json::json;

use super::backup::{Plan, READER, after_setup, backups_of, insert, place};
use super::command;
use super::monitor::MONITOR;
use crate::rng::Rng;
use crate::scenario::{Action, Fill, Format, GuestOp, Range, Scenario, Step, Stored};

impl Plan {
    /// Has half of the scenarios copy through storage, mostly into a target above its source, and mostly only what guests are about to
    /// overwrite. True if so.
    pub(super) fn offload(&mut self, rng: &mut Rng, scenario: &mut Scenario) -> bool {
        if !rng.chance(1, 2) {
            return false;
        }
        let fleecing = !self.by_hand && rng.chance(2, 3) && self.put_above_source(rng, scenario);
        if fleecing && rng.chance(1, 2) {
            self.keep_what_is_overwritten(rng, scenario);
        }
        let awaited = awaited(scenario);
        for step in &mut scenario.steps {
            let Action::Command { execute, arguments } = &mut step.action else {
                continue;
            };
            for backup in backups_of(execute, arguments) {
                if rng.chance(3, 4) {
                    backup.entry("x-perf").or_insert_with(|| json!({}))["use-copy-range"] = json!(true);
                }
                let id = backup["job-id"].as_str().unwrap_or_default().to_owned();
                if fleecing && !awaited.contains(&id) && rng.chance(1, 2) {
                    backup.insert("sync".to_owned(), json!("none"));
                    backup.remove("bitmap");
                    backup.remove("bitmap-mode");
                    self.endless.push(id);
                }
            }
        }
        fleecing
    }

    /// Starts a backup that copies only what guests are about to overwrite, and has the source hold something everywhere.
    fn keep_what_is_overwritten(&mut self, rng: &mut Rng, scenario: &mut Scenario) {
        let backup = json!({"job-id": "kept", "device": self.devices[0], "target": "t0", "sync": "none",
            "x-perf": {"use-copy-range": true}});
        self.endless.push("kept".to_owned());
        let at = after_setup(scenario);
        let at = insert(scenario, at, vec![command(MONITOR, "blockdev-backup", backup)]);
        if rng.chance(3, 4) {
            // Others want to copy the same node.
            let cancel = command(
                MONITOR,
                "block-job-cancel",
                json!({"device": "kept", "force": true}),
            );
            let at = place(rng, scenario, at);
            insert(scenario, at, vec![cancel]);
        }
        let Some(image) = scenario.images.iter_mut().rev().find(|i| i.file.starts_with('i')) else {
            return;
        };
        let whole = Fill {
            offset: 0,
            length: image.size,
            stored: Stored::Data,
        };
        image.fill = vec![whole];
        if image.format == Format::Raw || image.compat < 3 {
            return;
        }
        // So that not all of a cluster of the target lies in one place of the source.
        let unit = u64::from(image.cluster_size);
        let clusters = u32::try_from(image.size / unit).expect("small images");
        for _ in 0..rng.below(clusters.clamp(1, 16)) {
            image.fill.push(Fill {
                offset: u64::from(rng.below(clusters)) * unit,
                length: unit,
                stored: *rng.pick(&[Stored::Zero, Stored::ZeroAllocated]),
            });
        }
    }

    /// Reads of the target beside writes to the source, at the same place.
    fn race(&self, rng: &mut Rng, scenario: &Scenario, top: &str, number: u32) -> Vec<Step> {
        let grain = u64::from(scenario.grain);
        let clusters = u32::try_from(self.size / 65536).expect("small images");
        let start = u64::from(rng.below(clusters.max(1))) * 65536;
        let grains = u32::try_from((self.size - start).min(65536) / grain).expect("a cluster has few");
        let mut part = |most: u32| {
            let first = rng.below(grains.max(1));
            Range {
                offset: start + u64::from(first) * grain,
                length: u64::from((1 + rng.below(most)).min(grains.saturating_sub(first).max(1))) * grain,
            }
        };
        let (seen, written) = (part(16), part(4));
        let step = |actor: String, export: &str, op| Step {
            actor,
            action: Action::Guest {
                export: export.to_owned(),
                op,
            },
            wait: false,
        };
        vec![
            step(format!("{READER}{}", number % 3), "x-t0", GuestOp::Read(seen)),
            step(format!("racer{}", number % 2), top, GuestOp::Write(written)),
        ]
    }

    /// Has guests look at the target above the source, or write to it.
    pub(super) fn look_at_fleecing(&mut self, rng: &mut Rng, scenario: &mut Scenario) {
        let export = "x-t0".to_owned();
        if !self.views.contains(&export) {
            let mut steps = Vec::new();
            self.view("t0", &mut steps);
            let setup = after_setup(scenario);
            insert(scenario, setup, steps);
        }
        let writes = rng.chance(1, 4) && make_writable(scenario);
        let views = std::mem::replace(&mut self.views, vec![export]);
        let first = after_setup(scenario);
        for number in 0..6 + rng.below(16) {
            let Some(mut step) = self.look(rng, scenario.grain) else {
                break;
            };
            step.actor = format!("{}{}", step.actor, number % 3);
            if let Action::Guest { op, .. } = &mut step.action
                && writes
                && rng.chance(1, 3)
                && let GuestOp::Read(range) = *op
            {
                *op = GuestOp::Write(range);
            }
            let at = place(rng, scenario, first);
            insert(scenario, at, vec![step]);
        }
        self.views = views;
        let Some(top) = writable_export(scenario) else {
            return;
        };
        for number in 0..2 + rng.below(6) {
            let steps = self.race(rng, scenario, &top, number);
            let at = place(rng, scenario, first + 1);
            insert(scenario, at, steps);
        }
    }

    /// Puts the first target above the source, if it can be.
    fn put_above_source(&self, rng: &mut Rng, scenario: &mut Scenario) -> bool {
        let Some(image) = scenario.images.iter_mut().find(|image| image.file == "t0.img") else {
            return false;
        };
        if image.format != Format::Qcow2 {
            return false;
        }
        image.cluster_size = *rng.pick(&[4096, 65536, 65536, 131_072]);
        image.free = rng.below(8);
        for step in &mut scenario.steps {
            if let Action::Command { execute, arguments } = &mut step.action
                && execute == "blockdev-add"
                && arguments.get("node-name") == Some(&json!("t0"))
            {
                arguments.insert("backing".to_owned(), json!(self.devices[0]));
            }
        }
        true
    }
}

/// The last export of the chain that guests may write to.
fn writable_export(scenario: &Scenario) -> Option<String> {
    let of_chain = |step: &Step| match &step.action {
        Action::Command { execute, arguments } if execute == "block-export-add" => {
            let id = arguments.get("id")?.as_str()?;
            let writable = arguments.get("writable") == Some(&json!(true));
            (writable && id != "x-t0").then(|| id.to_owned())
        }
        _ => None,
    };
    scenario.steps.iter().rev().find_map(of_chain)
}

/// Jobs for which somebody waits.
fn awaited(scenario: &Scenario) -> Vec<String> {
    let job = |step: &Step| match &step.action {
        Action::WaitJob { job } => Some(job.id.clone()),
        _ => None,
    };
    scenario.steps.iter().filter_map(job).collect()
}

/// Lets guests write to the first target.
fn make_writable(scenario: &mut Scenario) -> bool {
    let add = scenario.steps.iter_mut().find_map(|step| match &mut step.action {
        Action::Command { execute, arguments }
            if execute == "block-export-add" && arguments.get("id") == Some(&json!("x-t0")) =>
        {
            Some(arguments)
        }
        _ => None,
    });
    add.is_some_and(|add| add.insert("writable".to_owned(), json!(true)).is_some())
}
