//! Commands that change the graph under guests: reopening with other options and other children, snapshots, transactions,
//! other lengths.
//!
//! Rules: a reopen says what the node was opened with and changes a little of it; what it leaves out goes back to its
//! default, which is a change as well. Filters go into backing links and out again. Formats keep their own
//! files: another file under a format would be nobody's fault. Some of it is nonsense, to be refused.

use serde_json::{Map, Value, json};

use super::chain::Chain;
use super::{Swarm, command};
use crate::rng::Rng;
use crate::scenario::Step;

/// Draws changes; remembers the nodes that it made.
#[derive(Default)]
pub(super) struct Changes {
    /// Filters added so far: c0, c1, …
    filters: u32,
    /// A raw node over a format is in some backing link: no header can name it, so no stream may end there.
    pub(super) unnamed: bool,
}

impl Changes {
    pub(super) fn reopen(
        &mut self,
        rng: &mut Rng,
        swarm: &Swarm,
        chain: &Chain,
        streams: bool,
        steps: &mut Vec<Step>,
    ) {
        let actor = super::monitor::MONITOR;
        if rng.chance(1, 5) {
            return self.filter(rng, swarm, chain, streams, steps);
        }
        let mut list = vec![self.entry(rng, swarm, chain, streams)];
        while rng.chance(1, 4) && list.len() < 3 {
            list.push(self.entry(rng, swarm, chain, streams));
        }
        steps.push(command(actor, "blockdev-reopen", json!({"options": list})));
    }

    /// One node with its options.
    fn entry(&self, rng: &mut Rng, swarm: &Swarm, chain: &Chain, streams: bool) -> Value {
        let layers = chain.layers();
        let layer = if rng.chance(1, 2) {
            layers.end - 1
        } else {
            layers.start + rng.below(u32::try_from(layers.len()).expect("few")) as usize
        };
        if rng.chance(1, 8)
            && let Some(mut file) = chain.file_definition(layer, swarm)
        {
            self.common(rng, &mut file);
            return Value::Object(file);
        }
        if rng.chance(1, 24) {
            return json!({"driver": "copy-on-read", "node-name": "cor", "file": format!("n{layer}")});
        }
        let mut node = chain.definition(layer, swarm);
        self.common(rng, &mut node);
        let backing = self.backing(rng, chain, layer, streams);
        match backing {
            Some(backing) if chain.has_backing(layer) => drop(node.insert("backing".to_owned(), backing)),
            _ => {}
        }
        Value::Object(node)
    }

    /// A few options that every node has; some are only left out.
    fn common(&self, rng: &mut Rng, node: &mut Map<String, Value>) {
        match rng.below(8) {
            0 => drop(node.insert("read-only".to_owned(), json!(rng.chance(1, 2)))),
            1 => drop(node.shift_remove("read-only")),
            2 => drop(node.insert("discard".to_owned(), json!(*rng.pick(&["ignore", "unmap"])))),
            3 => {
                let word = *rng.pick(&["off", "on", "unmap"]);
                node.insert("detect-zeroes".to_owned(), json!(word));
                if word == "unmap" {
                    node.insert(
                        "discard".to_owned(),
                        json!(*rng.pick(&["ignore", "unmap", "unmap"])),
                    );
                }
            }
            4 if rng.chance(1, 4) => drop(node.insert("force-share".to_owned(), json!(true))),
            5 if rng.chance(1, 2) => drop(node.insert("auto-read-only".to_owned(), json!(true))),
            _ => {}
        }
    }

    /// What the backing link shall lead to; `None`: nothing is said.
    fn backing(&self, rng: &mut Rng, chain: &Chain, layer: usize, streams: bool) -> Option<Value> {
        let below = layer.checked_sub(1);
        match rng.below(10) {
            0..=3 => Some(chain.below(layer).unwrap_or(Value::Null)),
            4 | 5 => Some(Value::Null),
            6 => Some(json!(rng.pick(&chain.nodes).name)),
            7 if self.filters > 0 && !(self.unnamed && streams) => {
                Some(json!(format!("c{}", rng.below(self.filters))))
            }
            8 if layer > 1 => Some(chain.reference(rng.below(u32::try_from(layer).expect("few")) as usize)),
            9 if rng.chance(1, 4) => None,
            _ => Some(below.map_or(Value::Null, |b| chain.reference(b))),
        }
    }

    /// A filter is put into a backing link, or taken out of one.
    fn filter(&mut self, rng: &mut Rng, swarm: &Swarm, chain: &Chain, streams: bool, steps: &mut Vec<Step>) {
        let actor = super::monitor::MONITOR;
        let layers = chain.layers();
        let layer = layers.start + rng.below(u32::try_from(layers.len()).expect("few")) as usize;
        let greedy = swarm.writable_backing && rng.chance(2, 3);
        let may_add = greedy || !streams;
        let below = layer.checked_sub(1).filter(|b| layers.contains(b) && may_add);
        let Some(below) = below else {
            return steps.push(command(
                actor,
                "blockdev-reopen",
                json!({"options": [self.entry(rng, swarm, chain, streams)]}),
            ));
        };
        let mut node = chain.definition(layer, swarm);
        if self.filters > 0 && rng.chance(1, 2) {
            let filter = rng.below(self.filters);
            node.insert("backing".to_owned(), chain.reference(below));
            steps.push(command(actor, "blockdev-reopen", json!({"options": [node]})));
            if rng.chance(1, 2) {
                let name = format!("c{filter}");
                steps.push(command(actor, "blockdev-del", json!({"node-name": name})));
            }
            return;
        }
        let name = format!("c{}", self.filters);
        self.filters += 1;
        let add = if greedy {
            json!({"driver": "copy-on-read", "node-name": name, "file": format!("n{below}")})
        } else {
            self.unnamed = true;
            json!({"driver": "raw", "node-name": name, "file": format!("n{below}"), "read-only": true})
        };
        steps.push(command(actor, "blockdev-add", add));
        node.insert("backing".to_owned(), json!(name));
        steps.push(command(actor, "blockdev-reopen", json!({"options": [node]})));
    }

    /// An overlay for some node, mostly the one that guests use.
    fn snapshot_data(&self, rng: &mut Rng, chain: &Chain) -> Value {
        let mut candidates: Vec<String> = chain.nodes.iter().map(|n| n.name.clone()).collect();
        candidates.extend(chain.overlay_names());
        let node = if rng.chance(2, 3) {
            chain.nodes.last().expect("a chain has nodes").name.clone()
        } else {
            rng.pick(&candidates).clone()
        };
        let overlays = chain.overlay_names();
        let overlay = if overlays.is_empty() || rng.chance(1, 10) {
            rng.pick(&candidates).clone()
        } else {
            rng.pick(&overlays).clone()
        };
        json!({"node": node, "overlay": overlay})
    }

    pub(super) fn snapshot(&self, rng: &mut Rng, chain: &Chain, actor: &str) -> Step {
        if rng.chance(1, 2) {
            return command(actor, "blockdev-snapshot", self.snapshot_data(rng, chain));
        }
        let mut actions = Vec::new();
        for _ in 0..=rng.below(3) {
            actions.push(if rng.chance(1, 4) {
                json!({"type": "abort", "data": {}})
            } else {
                json!({"type": "blockdev-snapshot", "data": self.snapshot_data(rng, chain)})
            });
        }
        command(actor, "transaction", json!({"actions": actions}))
    }

    /// Another length for some node, now and then one that is refused.
    pub(super) fn resize(&self, rng: &mut Rng, swarm: &Swarm, chain: &Chain, actor: &str) -> Step {
        let overlays = chain.overlay_names();
        let node = if !overlays.is_empty() && rng.chance(1, 2) {
            rng.pick(&overlays).clone()
        } else {
            rng.pick(&chain.nodes).name.clone()
        };
        let unit = if rng.chance(1, 2) { swarm.cluster } else { 512 };
        let size = u64::from(unit) * u64::from(rng.below(2 * swarm.clusters));
        let size = match rng.below(12) {
            0 => json!(-1),
            1 => json!(size + 1),
            _ => json!(size.max(512)),
        };
        command(actor, "block_resize", json!({"node-name": node, "size": size}))
    }
}
