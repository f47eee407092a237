//! `blockdev-reopen`: other options, and other children, for any number of nodes at once.

use serde_json::Value;

use crate::command::args::Args;
use crate::command::open::Options;
use crate::options::NodeOptions;
use crate::refusal::Refusal;
use crate::reopen::Queue;
use crate::world::World;

pub(crate) fn blockdev_reopen(world: &mut World, arguments: &Value) -> Result<(), Refusal> {
    let args = Args::new(arguments)?;
    let mut all: Vec<NodeOptions> = Vec::new();
    for item in args.objects("options")? {
        all.push(Options::parse(item)?.explicit);
    }
    args.finish()?;

    let graph = &mut world.graph;
    let mut queue = Queue::default();
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
    graph.reopen(queue)?;
    graph.lengths_follow();
    Ok(())
}
