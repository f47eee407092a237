//! After how many releases of storage requests a daemon is taken to be busy for ever.
//!
//! Rules: a function of the scenario, so that long ones have their time and short ones show it soon. Every step may take some
//! requests, one that goes over data a few for every sector of it, since no cluster is smaller. Each step of a scenario
//! counts once more for being given, so that the runner's patience, which is about many steps given in a row, comes first.
//! Not covered: lengths that no image and no resize names (a null-co), which ask nothing of storage.

use serde_json::Value;

use crate::scenario::{Action, Scenario};

/// For the end of a run: everything is read, flushed and taken down.
const LEAST: u64 = 2_000;
/// For one step: tables and headers on its way, and the drains that make a job ask again.
const PER_STEP: u64 = 64;
/// At most, which is what a daemon does in the better part of an hour. Images may have any length.
const MOST: u64 = 4_000_000;
/// For one sector that is gone over: read, written, and its tables.
const PER_SECTOR: u64 = 2;
const SECTOR: u64 = 512;

/// The limit of a scenario.
pub(super) fn limit(scenario: &Scenario) -> u64 {
    let resized = scenario.steps.iter().filter_map(|step| match &step.action {
        Action::Command { execute, arguments } if execute == "block_resize" => {
            arguments.get("size").and_then(Value::as_u64)
        }
        _ => None,
    });
    let all = scenario.images.iter().map(|image| image.size).chain(resized);
    let all = all.fold(0, u64::saturating_add);
    let steps = scenario.steps.iter().map(|step| {
        let bytes = match &step.action {
            Action::Command { execute, .. } if goes_over_images(execute) => all,
            Action::Guest { op, .. } => op.range().map_or(0, |range| range.length.min(all)),
            _ => 0,
        };
        requests(bytes).saturating_add(1 + PER_STEP)
    });
    let sum = steps.fold(LEAST.saturating_add(requests(all)), u64::saturating_add);
    sum.min(MOST)
}

fn requests(bytes: u64) -> u64 {
    bytes.div_ceil(SECTOR).saturating_mul(PER_SECTOR)
}

fn goes_over_images(execute: &str) -> bool {
    matches!(
        execute,
        "block-stream"
            | "block-commit"
            | "blockdev-backup"
            | "blockdev-mirror"
            | "block_resize"
            | "transaction"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle::tests::scenario_of;
    use crate::run::PATIENCE;

    /// So many steps like this on an image of 1 MiB.
    fn of(count: usize, step: &str) -> u64 {
        let steps = vec![step; count].join(",");
        limit(&scenario_of(&format!(
            r#"{{"version":1,"grain":512,"images":[{{"file":"a","format":"qcow2","size":1048576}}],"steps":[{steps}]}}"#
        )))
    }

    #[test]
    fn whoever_has_more_to_do_has_more_time() {
        let flush = r#"{"actor":"g","export":"x","do":"flush"}"#;
        let write = r#"{"actor":"g","export":"x","do":{"write":{"offset":0,"length":1048576}}}"#;
        let stream = r#"{"actor":"m","execute":"block-stream","arguments":{"device":"n"}}"#;
        assert!(of(1, flush) < 10_000);
        // Each of them asks for something, and none has to wait for the last one.
        let many = 30_000;
        assert!(of(many, flush) > 2 * many as u64 && many > PATIENCE as usize);
        let sectors = 2048;
        for step in [write, stream] {
            assert!(of(8, step) > 8 * 2 * sectors, "each sector is read and written");
        }
        assert!(of(8, flush) < 8 * sectors);
    }
}
