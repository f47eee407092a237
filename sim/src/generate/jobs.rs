//! block-stream with every argument, and the verbs for the jobs it starts.

use serde_json::{Value, json};

use super::chain::Chain;
use super::{Swarm, command};
use crate::rng::Rng;
use crate::scenario::{Action, Step};

#[derive(Default)]
pub(super) struct Jobs {
    /// Jobs asked for so far; their ids are j0, j1, …
    pub(super) started: u32,
}

impl Jobs {
    /// One of the ids, mostly the newest.
    pub(super) fn any(&self, rng: &mut Rng) -> String {
        let newest = self.started.saturating_sub(1);
        let at = if rng.chance(3, 4) {
            newest
        } else {
            rng.below(self.started.max(1))
        };
        format!("j{at}")
    }

    pub(super) fn stream(&mut self, rng: &mut Rng, swarm: &Swarm, chain: &Chain, actor: &str) -> Step {
        let id = if rng.chance(1, 32) {
            self.any(rng)
        } else {
            format!("j{}", self.started)
        };
        self.started += 1;
        let layered: Vec<&str> = chain.nodes.iter().map(|n| n.name.as_str()).collect();
        let device = if rng.chance(3, 4) {
            layered.len() - 1
        } else {
            rng.below(count(&layered)) as usize
        };
        let mut arguments = json!({"job-id": id, "device": layered[device]});
        self.range(rng, chain, &layered, &mut arguments);
        if rng.chance(1, 6) {
            arguments["backing-file"] = json!("other.img");
        }
        if rng.chance(1, 8) {
            arguments["backing-mask-protocol"] = json!(rng.chance(1, 2));
        }
        if rng.chance(1, 5) {
            arguments["speed"] = json!(*rng.pick(&[0u32, 1, 4096, 65536, 1 << 20, 1 << 30]));
        }
        if rng.chance(1, 4) {
            arguments["on-error"] = json!(*rng.pick(&["report", "ignore", "stop", "enospc", "auto"]));
        }
        if rng.chance(1, 4) {
            arguments["filter-node-name"] = json!(format!("filter{}", self.started));
        }
        for (key, one_in) in [("auto-finalize", 4), ("auto-dismiss", 4)] {
            if swarm.monitor_ops > 2 && rng.chance(1, one_in) {
                arguments[key] = json!(false);
            }
        }
        command(actor, "block-stream", arguments)
    }

    /// How far down: to the end, to a base by name or file, or with `bottom`; rarely two of them, which is refused.
    fn range(&self, rng: &mut Rng, chain: &Chain, nodes: &[&str], arguments: &mut Value) {
        let below = nodes[rng.below(count(nodes)) as usize];
        match rng.below(6) {
            0 | 1 => {}
            2 | 3 => arguments["base-node"] = json!(below),
            4 => arguments["bottom"] = json!(below),
            _ => arguments["base"] = json!(rng.pick(&chain.images).file),
        }
        if rng.chance(1, 48) {
            arguments["bottom"] = json!(below);
        }
    }
}

/// A stream of everything that is below.
pub(super) fn to_the_end(stream: &mut Step) {
    if let Action::Command { arguments, .. } = &mut stream.action {
        for key in ["base", "base-node", "bottom"] {
            arguments.shift_remove(key);
        }
    }
}

fn count(nodes: &[&str]) -> u32 {
    u32::try_from(nodes.len()).expect("few nodes")
}

/// A verb for some job.
pub(super) fn job_verb(rng: &mut Rng, jobs: &Jobs, actor: &str) -> Step {
    let id = jobs.any(rng);
    verb(rng, &id, actor)
}

/// A verb for this job; both families of commands.
pub(super) fn verb(rng: &mut Rng, id: &str, actor: &str) -> Step {
    let device = json!({"device": id});
    let by_id = json!({"id": id});
    let (name, arguments) = match rng.below(12) {
        0 => ("block-job-pause", device),
        1 => ("job-pause", by_id),
        2 => ("block-job-resume", device),
        3 => ("job-resume", by_id),
        4 => (
            "block-job-cancel",
            json!({"device": id, "force": rng.chance(1, 2)}),
        ),
        5 => ("job-cancel", by_id),
        6 => ("block-job-finalize", by_id),
        7 => ("job-finalize", by_id),
        8 => ("block-job-dismiss", by_id),
        9 => ("job-dismiss", by_id),
        10 => ("job-complete", by_id),
        _ => {
            let speed = *rng.pick(&[0i64, 1, 65536, 1 << 20, -1]);
            ("block-job-set-speed", json!({"device": id, "speed": speed}))
        }
    };
    command(actor, name, arguments)
}
