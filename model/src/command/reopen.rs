//! `blockdev-reopen`: other options, and other children, for any number of nodes at once.

use serde_json::Value;

use crate::command::args::Args;
use crate::command::open::Options;
use crate::graph::{Graph, NodeId};
use crate::options::NodeOptions;
use crate::refusal::Refusal;
use crate::reopen::Queue;
use crate::world::World;

pub(crate) fn blockdev_reopen(world: &mut World, arguments: &Value) -> Result<(), Refusal> {
    let all = parse(arguments)?;
    let mut queue = Queue::default();
    fill(&world.graph, &mut queue, all)?;
    world.graph.reopen(queue)?;
    world.graph.lengths_follow();
    Ok(())
}

fn parse(arguments: &Value) -> Result<Vec<NodeOptions>, Refusal> {
    let args = Args::new(arguments)?;
    let mut all: Vec<NodeOptions> = Vec::new();
    for item in args.objects("options")? {
        all.push(Options::parse(item?)?.explicit);
    }
    args.finish()?;
    Ok(all)
}

fn fill(graph: &Graph, queue: &mut Queue, all: Vec<NodeOptions>) -> Result<(), Refusal> {
    for options in all {
        let Some(name) = options.get("node-name").and_then(Value::as_str) else {
            return Err(Refusal::new("node-name not specified"));
        };
        let Some(node) = graph.find(name) else {
            return Err(Refusal::new(format!(
                "Failed to find node with node-name='{name}'"
            )));
        };
        queue.push(graph, node, options, false);
    }
    Ok(())
}

impl World {
    /// The nodes that a `blockdev-reopen` comes upon, named or following those, in order and as often as it does; up to
    /// the first that is not there.
    #[must_use]
    pub fn reopened(&self, arguments: &Value) -> Vec<NodeId> {
        let mut queue = Queue::default();
        if let Ok(all) = parse(arguments) {
            // What is missing stops the command here, too.
            let _ = fill(&self.graph, &mut queue, all);
        }
        queue.visits().to_vec()
    }
}
