//! `blockdev-del`.

use serde_json::Value;

use crate::blockers::Op;
use crate::command::args::Args;
use crate::refusal::Refusal;
use crate::world::World;

pub(crate) fn blockdev_del(world: &mut World, arguments: &Value) -> Result<(), Refusal> {
    let args = Args::new(arguments)?;
    let name = args.str("node-name")?;
    args.finish()?;

    let graph = &mut world.graph;
    let Some(id) = graph.find(name) else {
        return Err(Refusal::new(format!(
            "Failed to find node with node-name='{name}'"
        )));
    };
    if graph.has_backend(id) {
        return Err(Refusal::new(format!("Node {name} is in use")));
    }
    graph.check_op(id, Op::DriveDel)?;
    if !graph.node(id).monitor_owned {
        return Err(Refusal::new(format!("Node {name} is not owned by the monitor")));
    }
    if graph.refcount(id) > 1 {
        return Err(Refusal::new(format!("Block device {name} is in use")));
    }
    graph.node_mut(id).monitor_owned = false;
    Ok(())
}
