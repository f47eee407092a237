//! Monitor commands beside the guests: streams and their verbs, nodes and exports that come and go.
//!
//! Most commands make sense; some deliberately do not, since refusals are behaviour too.

use serde_json::json;

use super::chain::Chain;
use super::graph::Changes;
use super::jobs::{self, Jobs, job_verb};
use super::throttle::Throttling;
use super::{Swarm, command};
use crate::rng::Rng;
use crate::scenario::{Action, Step, WaitJob};

pub(super) const MONITOR: &str = "monitor";

pub(super) struct Monitor {
    jobs: Jobs,
    changes: Changes,
    throttling: Throttling,
    added: u32,
}

impl Monitor {
    pub(super) fn new(_rng: &mut Rng, _swarm: &Swarm, _chain: &Chain) -> Monitor {
        Monitor {
            jobs: Jobs::default(),
            changes: Changes::default(),
            throttling: Throttling::default(),
            added: 0,
        }
    }

    /// One of the chain's nodes; now and then one that does not exist.
    pub(super) fn any_node(&self, rng: &mut Rng, chain: &Chain) -> String {
        if rng.chance(1, 40) {
            return "nowhere".to_owned();
        }
        rng.pick(&chain.nodes).name.clone()
    }

    pub(super) fn next(&mut self, rng: &mut Rng, swarm: &Swarm, chain: &Chain, steps: &mut Vec<Step>) {
        let mut weights = swarm.monitor_weights;
        if self.jobs.started == 0 {
            // Verbs and waits without a job are refusals; keep them rare.
            (weights[1], weights[2]) = (u32::from(rng.chance(1, 16)), 0);
        }
        match rng.weighted(&weights) {
            1 => steps.push(job_verb(rng, &self.jobs, MONITOR)),
            2 if rng.chance(1, 4) => self.interfere(rng, chain, steps),
            2 => steps.push(self.wait(rng)),
            3 => self.node(rng, chain, steps),
            4 => self.export(rng, chain, steps),
            5 => steps.push(self.change_backing_file(rng, chain)),
            6 => steps.push(query(rng)),
            7 => {
                let streams = self.jobs.started > 0;
                self.changes.reopen(rng, swarm, chain, streams, steps);
            }
            8 => steps.push(self.changes.snapshot(rng, chain, MONITOR)),
            9 => steps.push(self.changes.resize(rng, swarm, chain, MONITOR)),
            10 => self.throttling.next(rng, swarm, chain, steps),
            _ => {
                let mut stream = self.jobs.stream(rng, swarm, chain, MONITOR);
                if self.changes.unnamed {
                    jobs::to_the_end(&mut stream);
                }
                steps.push(stream);
            }
        }
    }

    fn wait(&self, rng: &mut Rng) -> Step {
        let status = *rng.pick(&["concluded", "concluded", "running", "pending", "null"]);
        let job = WaitJob {
            id: self.jobs.any(rng),
            status: status.to_owned(),
            offset: None,
        };
        wait_for(job)
    }

    /// Lets a job come to some point, often its very end, and does something to it there.
    fn interfere(&self, rng: &mut Rng, chain: &Chain, steps: &mut Vec<Step>) {
        let length = chain.images.last().map_or(0, |image| image.size);
        let offset = if rng.chance(1, 2) {
            length
        } else {
            u64::from(rng.below(8)) * length / 8
        };
        let id = self.jobs.any(rng);
        steps.push(wait_for(WaitJob {
            id: id.clone(),
            status: "running".to_owned(),
            offset: Some(offset),
        }));
        let verb = *rng.pick(&["block-job-cancel", "block-job-cancel", "block-job-pause"]);
        steps.push(command(MONITOR, verb, json!({"device": id})));
    }

    fn node(&mut self, rng: &mut Rng, chain: &Chain, steps: &mut Vec<Step>) {
        if self.added > 0 && rng.chance(1, 2) {
            let name = if rng.chance(1, 4) {
                self.any_node(rng, chain)
            } else {
                format!("extra{}", rng.below(self.added))
            };
            steps.push(command(MONITOR, "blockdev-del", json!({"node-name": name})));
            return;
        }
        let name = if rng.chance(1, 16) {
            self.any_node(rng, chain)
        } else if self.added > 0 && rng.chance(1, 3) {
            // Free again if it was deleted meanwhile, else refused.
            format!("extra{}", rng.below(self.added))
        } else {
            self.added += 1;
            format!("extra{}", self.added - 1)
        };
        let below = self.any_node(rng, chain);
        let mut add = match rng.below(5) {
            0 => json!({"driver": "null-co", "size": 65536, "read-zeroes": true}),
            1 => json!({"driver": "raw", "file": below, "read-only": rng.chance(1, 2)}),
            2 => {
                json!({"driver": "raw", "file": below, "offset": 512 * rng.below(4), "size": 512 * (1 + rng.below(4))})
            }
            3 => json!({"driver": "copy-on-read", "file": below}),
            _ => json!({"driver": "copy-on-read", "file": below, "bottom": self.any_node(rng, chain)}),
        };
        add["node-name"] = json!(name);
        steps.push(command(MONITOR, "blockdev-add", add));
    }

    fn export(&self, rng: &mut Rng, chain: &Chain, steps: &mut Vec<Step>) {
        let node = self.any_node(rng, chain);
        let id = format!("y-{node}");
        if rng.chance(1, 3) {
            let mode = *rng.pick(&["safe", "hard"]);
            steps.push(command(
                MONITOR,
                "block-export-del",
                json!({"id": id, "mode": mode}),
            ));
        } else {
            let add =
                json!({"type": "nbd", "id": id, "name": id, "node-name": node, "writable": rng.chance(1, 3)});
            steps.push(command(MONITOR, "block-export-add", add));
        }
    }

    fn change_backing_file(&self, rng: &mut Rng, chain: &Chain) -> Step {
        let image = self.any_node(rng, chain);
        let device = chain.nodes.last().expect("a chain has nodes").name.clone();
        let arguments = json!({"device": device, "image-node-name": image, "backing-file": "renamed.img"});
        command(MONITOR, "change-backing-file", arguments)
    }
}

fn wait_for(job: WaitJob) -> Step {
    Step {
        actor: MONITOR.to_owned(),
        action: Action::WaitJob { job },
        wait: true,
    }
}

fn query(rng: &mut Rng) -> Step {
    let name = *rng.pick(&["query-jobs", "query-block-jobs", "query-block-exports"]);
    command(MONITOR, name, json!({}))
}
