//! `change-backing-file`, and the rules of writing a backing file into a header.
//!
//! Rule that differs from QEMU 10.0: the format recorded is the backing node's, not the overlay's own.

use std::rc::Rc;

use serde_json::Value;

use crate::blockers::Op;
use crate::command::args::Args;
use crate::command::lookup;
use crate::graph::{BackingHeader, NodeId};
use crate::perm::Driver;
use crate::refusal::Refusal;
use crate::world::{Qcow2Facts, World};

/// Longest backing file name, bytes.
const MAX_BACKING_NAME: usize = 1023;

pub(crate) fn change_backing_file(world: &mut World, arguments: &Value) -> Result<(), Refusal> {
    let args = Args::new(arguments)?;
    let device = args.str("device")?;
    let image_name = args.str("image-node-name")?;
    let backing_file = args.str("backing-file")?;
    args.finish()?;

    let root = lookup(world, device, device)?;
    if !world.graph.is_root(root) {
        return Err(Refusal::new("Need a root block node"));
    }
    let image = lookup(world, "", image_name)?;
    let graph = &mut world.graph;
    if graph.find_base(image) == image {
        return Err(Refusal::new(
            "not allowing backing file change on an image without a backing file",
        ));
    }
    graph.check_op(root, Op::Change)?;
    if !graph.chain_contains(root, image) {
        return Err(Refusal::new(format!(
            "'{device}' and image file are not in the same chain"
        )));
    }
    let was_read_only = !graph.node(image).writable;
    if was_read_only {
        graph.set_read_only(image, false)?;
    }
    let format = graph
        .backing_chain_next(image)
        .map(|id| Rc::from(graph.node(id).driver.name()));
    let header = BackingHeader {
        file: Rc::from(backing_file),
        format,
    };
    write_header(world, image, Some(header)).map_err(|errno| {
        Refusal::new(format!(
            "Could not change backing file to '{backing_file}': {errno}"
        ))
    })?;
    if was_read_only {
        world.graph.set_read_only(image, true)?;
    }
    Ok(())
}

/// Records a backing file (or none) in the header of a node; errors are the text of the errno.
pub(crate) fn write_header(
    world: &mut World,
    node: NodeId,
    backing: Option<BackingHeader>,
) -> Result<(), &'static str> {
    if world.graph.node(node).driver != Driver::Qcow2 {
        return Err("Operation not supported");
    }
    if let Some(backing) = &backing {
        if backing.file.len() > MAX_BACKING_NAME {
            return Err("Invalid argument");
        }
        // A node that was given another file may have none there.
        let fits = |facts: &Qcow2Facts| {
            header_bytes(facts.version, facts.cluster_size, backing) <= facts.cluster_size
        };
        if !world.header(node).is_none_or(fits) {
            return Err("No space left on device");
        }
    }
    world.set_header(node, backing);
    Ok(())
}

/// Bytes that a header with this backing file takes, of the one cluster that it has.
fn header_bytes(version: u8, cluster_size: u64, backing: &BackingHeader) -> u64 {
    let fixed = if version >= 3 { 112 } else { 72 };
    let extension = |bytes: usize| 8 + u64::try_from(bytes.next_multiple_of(8)).expect("a short string");
    let format = backing
        .format
        .as_ref()
        .map_or(0, |format| extension(format.len()));
    let feature_table = if version >= 3 && cluster_size > 4096 {
        extension(8 * 48)
    } else {
        0
    };
    let end = extension(0);
    fixed + format + feature_table + end + u64::try_from(backing.file.len()).expect("a short string")
}
