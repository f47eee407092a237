//! `block_resize`: another length for a node whose users all allow it.
//!
//! Rules: a filter and a raw node pass the length on; qcow2 records it. Whoever shows the whole of a node that gets
//! another length has that length, too.
//! Differs from QEMU 10.0: there what is above the node keeps its old length.

use std::rc::Rc;

use serde_json::Value;

use crate::blockers::Op;
use crate::command::args::Args;
use crate::command::bitmap::check_change;
use crate::graph::{NodeId, Parent};
use crate::perm::{Driver, Masks, Perm};
use crate::refusal::Refusal;
use crate::window::Window;
use crate::world::{Qcow2Facts, World};

const SECTOR: u64 = 512;

pub(crate) fn block_resize(world: &mut World, arguments: &Value) -> Result<(), Refusal> {
    let args = Args::new(arguments)?;
    let device = args.opt_str("device")?.unwrap_or("");
    let name = args.opt_str("node-name")?.unwrap_or("");
    let size = args.int("size")?;
    args.finish()?;

    let node = world
        .graph
        .find(name)
        .ok_or_else(|| Refusal::new(format!("Cannot find device='{device}' nor node-name='{name}'")))?;
    let size = u64::try_from(size).map_err(|_| Refusal::new("Parameter 'size' expects a >0 size"))?;
    world.graph.check_op(node, Op::Resize)?;
    let nobody = Parent::JobBackend(Rc::from(""));
    let backend = world
        .graph
        .attach_root(nobody, node, "root", Masks::new(Perm::RESIZE, Perm::all()))?;
    truncate(world, node, size)?;
    world.graph.resize_bitmaps(false);
    world.graph.lengths_follow();
    // Where the new length does not suit writers that may not resize, what is below keeps the masks of this moment.
    world.graph.remove_edge_and_refresh(backend);
    Ok(())
}

fn truncate(world: &mut World, id: NodeId, size: u64) -> Result<(), Refusal> {
    let node = world.graph.node(id);
    if !node.writable {
        return Err(Refusal::new("Image is read-only"));
    }
    let (driver, below) = (node.driver, world.graph.primary_child(id));
    match driver {
        Driver::CopyOnRead | Driver::Throttle | Driver::CopyBeforeWrite => {
            truncate(world, below.expect("a filter has a child"), size)
        }
        Driver::Raw => {
            let options = node.options.clone();
            if options.has("size") {
                return Err(Refusal::new("Cannot resize fixed-size raw disks"));
            }
            let offset = options.get("offset").and_then(Value::as_u64).unwrap_or(0);
            let end = size
                .checked_add(offset)
                .filter(|end| i64::try_from(*end).is_ok())
                .ok_or_else(|| Refusal::new("Disk size too large for the chosen offset"))?;
            truncate(world, below.expect("raw has a file"), end)
        }
        Driver::Qcow2 => truncate_qcow2(world, id, size),
        Driver::File => {
            let name = node.filename.clone().expect("a file has a name");
            let facts = world.files.get_mut(&name).expect("an open file exists");
            Rc::make_mut(facts).length = size;
            world.graph.node_mut(id).length = size.next_multiple_of(SECTOR);
            Ok(())
        }
        Driver::HostDevice if size > node.length => Err(Refusal::new("Cannot grow device files")),
        // Said to be shorter, it is as long as ever.
        Driver::HostDevice => Ok(()),
        Driver::NullCo | Driver::SnapshotAccess => {
            Err(Refusal::new("Image format driver does not support resize"))
        }
    }
}

fn truncate_qcow2(world: &mut World, id: NodeId, size: u64) -> Result<(), Refusal> {
    let graph = &world.graph;
    if !size.is_multiple_of(SECTOR) {
        return Err(Refusal::new("The new size must be a multiple of 512"));
    }
    let old = graph.node(id).length;
    let covers = |backing| graph.node(backing).length > old;
    let hides = size > old && graph.cow_child(id).is_some_and(covers);
    // The rest of the last cluster is written; flags are for the clusters behind it.
    let flags_zeroes =
        |header: &Qcow2Facts| header.version < 3 && size > old.next_multiple_of(header.cluster_size);
    if hides && world.header(id).is_some_and(flags_zeroes) {
        return Err(Refusal::new(
            "Failed to zero out new clusters: Operation not supported",
        ));
    }
    for stored in world.header(id).into_iter().flat_map(|header| &header.bitmaps) {
        let bitmaps = &world.graph.node(id).bitmaps;
        if let Some(bitmap) = bitmaps.iter().find(|bitmap| bitmap.name == stored.name) {
            check_change(bitmap)?;
        }
    }
    if let Some(header) = world.header_mut(id) {
        header.virtual_size = size;
    }
    world.graph.node_mut(id).length = size;
    Ok(())
}

impl crate::Graph {
    /// Nodes that show the whole of another have its length.
    pub(crate) fn lengths_follow(&mut self) {
        let all: Vec<NodeId> = self.nodes().map(|(id, _)| id).collect();
        for id in self.topological(all).into_iter().rev() {
            let node = self.node(id);
            let Some(below) = self.primary_child(id).map(|below| self.node(below).length) else {
                continue;
            };
            let length = match node.driver {
                Driver::CopyOnRead | Driver::Throttle | Driver::CopyBeforeWrite => below,
                Driver::Raw => Window::at(&node.options).length(below),
                _ => continue,
            };
            self.node_mut(id).length = length;
        }
    }
}
