//! Opening filters, and what shows what a filter keeps: by `blockdev-add`, or as a job does it.
//!
//! Rules: a filter is as long as what it filters when it is opened; one that fails leaves the graph half changed, like all opening.

use crate::command::open::{Above, ChildRef, assign_name, open_child, options_of};
use crate::copy_before_write::{Manner, named_bitmap};
use crate::graph::{Node, NodeId};
use crate::perm::{Driver, Role};
use crate::refusal::Refusal;
use crate::world::World;

/// Opens a copy-on-read filter over a node, as a job does it.
pub(crate) fn open_job_filter(
    world: &mut World,
    name: Option<&str>,
    file: NodeId,
    bottom: NodeId,
) -> Result<NodeId, Refusal> {
    let node_name = assign_name(world, name)?;
    let id = world.graph.add_node(Node {
        implicit: name.is_none(),
        held_by_jobs: 1,
        options: options_of([("driver", Driver::CopyOnRead.name())]),
        ..Node::new(&node_name, Driver::CopyOnRead)
    });
    let bottom = world.graph.node(bottom).name.clone();
    open_copy_on_read(world, id, file, Some(&bottom))?;
    Ok(id)
}

/// Opens a copy-before-write filter over a source, as a job does it.
pub(crate) fn open_backup_filter(
    world: &mut World,
    name: Option<&str>,
    (source, target): (NodeId, NodeId),
    manner: Manner,
) -> Result<NodeId, Refusal> {
    let node_name = assign_name(world, name)?;
    let graph = &mut world.graph;
    let id = graph.add_node(Node {
        held_by_jobs: 1,
        options: options_of([("driver", Driver::CopyBeforeWrite.name())]),
        ..Node::new(&node_name, Driver::CopyBeforeWrite)
    });
    graph.attach_child(id, source, "file", Role::FILTERED | Role::PRIMARY)?;
    graph.attach_child(id, target, "target", Role::DATA)?;
    world.open_kept(id, (source, target), None, manner)?;
    Ok(id)
}

pub(crate) fn open_throttle(world: &mut World, id: NodeId, file: NodeId) -> Result<(), Refusal> {
    let graph = &mut world.graph;
    graph.attach_child(id, file, "file", Role::FILTERED | Role::PRIMARY)?;
    graph.check_group(&graph.node(id).options)?;
    graph.node_mut(id).length = graph.node(file).length;
    Ok(())
}

/// A filter that keeps in `target` what is written over in `file`.
pub(crate) fn open_copy_before_write(
    world: &mut World,
    id: NodeId,
    file: NodeId,
    target: &ChildRef,
    manner: Manner,
) -> Result<(), Refusal> {
    world
        .graph
        .attach_child(id, file, "file", Role::FILTERED | Role::PRIMARY)?;
    let own = world.graph.node(id).options.clone();
    let below = Above {
        node: Some(id),
        options: &own,
        role: Role::DATA,
        followed: None,
    };
    let target = open_child(world, target, below)?;
    world.graph.attach_child(id, target, "target", Role::DATA)?;
    let bitmap = named_bitmap(&own);
    let bitmap = bitmap.as_ref().map(|(node, name)| (&**node, &**name));
    world.open_kept(id, (file, target), bitmap, manner)
}

pub(crate) fn open_snapshot_access(world: &mut World, id: NodeId, file: NodeId) -> Result<(), Refusal> {
    let graph = &mut world.graph;
    graph.attach_child(id, file, "file", Role::DATA | Role::PRIMARY)?;
    graph.node_mut(id).length = graph.node(file).length;
    Ok(())
}

/// A copy-on-read node over `file`. QEMU 10.0 hangs when `bottom` is not below it; here that is refused.
pub(crate) fn open_copy_on_read(
    world: &mut World,
    id: NodeId,
    file: NodeId,
    bottom: Option<&str>,
) -> Result<(), Refusal> {
    let graph = &mut world.graph;
    graph.attach_child(id, file, "file", Role::FILTERED | Role::PRIMARY)?;
    graph.node_mut(id).length = graph.node(file).length;
    let Some(name) = bottom else { return Ok(()) };
    let Some(bottom) = graph.find(name) else {
        return Err(Refusal::new(format!("Bottom node '{name}' not found")));
    };
    if graph.node(bottom).driver.is_filter() {
        return Err(Refusal::new(format!("Bottom node '{name}' is a filter")));
    }
    if !graph.chain_contains(id, bottom) {
        let filter = graph.name(id);
        return Err(Refusal::new(format!(
            "Bottom node '{name}' is not in the backing chain of '{filter}'"
        )));
    }
    graph.freeze(id, bottom)?;
    graph.node_mut(id).bottom = Some(bottom);
    Ok(())
}
