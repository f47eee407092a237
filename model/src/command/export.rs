//! `block-export-add` and `block-export-del` for NBD exports.
//!
//! An NBD server is taken to be running. Deletion takes effect at once.

use std::rc::Rc;

use serde_json::Value;

use crate::command::args::Args;
use crate::command::bitmap::{self, Source, check_shown};
use crate::command::{is_well_formed, lookup};
use crate::graph::{Graph, NodeId, Parent};
use crate::perm::{Masks, Perm};
use crate::refusal::Refusal;
use crate::world::{Export, World};

pub(crate) fn add(world: &mut World, arguments: &Value) -> Result<(), Refusal> {
    let args = Args::new(arguments)?;
    args.one_of("type", &["nbd"])?;
    let id = args.str("id")?;
    args.opt_bool("fixed-iothread")?;
    args.opt_str("iothread")?;
    let node_name = args.str("node-name")?;
    let writable = args.opt_bool("writable")?.unwrap_or(false);
    args.opt_bool("writethrough")?;
    args.opt_bool("allow-inactive")?;
    let name = args.opt_str("name")?.unwrap_or(node_name);
    args.opt_str("description")?;
    let bitmaps = bitmap::sources(&args)?;
    args.opt_bool("allocation-depth")?;
    args.finish()?;

    if !is_well_formed(id) {
        return Err(Refusal::new("Invalid block export id"));
    }
    if world.export(id).is_some() {
        return Err(Refusal::new(format!("Block export id '{id}' is already in use")));
    }
    let node = lookup(world, "", node_name)?;
    if writable && !world.graph.node(node).writable {
        return Err(Refusal::new("Cannot export read-only node as writable"));
    }
    let mut perm = Perm::CONSISTENT_READ;
    perm.set(Perm::WRITE, writable);
    let id: Rc<str> = Rc::from(id);
    let root = world.graph.attach_root(
        Parent::Export(id.clone()),
        node,
        "root",
        Masks::new(perm, Perm::all()),
    )?;
    if world.exports.iter().any(|export| &*export.name == name) {
        return Err(Refusal::new(format!(
            "NBD server already has export named '{name}'"
        )));
    }
    // Clients are told the length once, so nobody may change it.
    world
        .graph
        .set_root_masks(root, Masks::new(perm, Perm::all() - Perm::RESIZE))?;
    let shown = find_shown(world, node, &bitmaps, writable)?;
    for (node, at) in shown {
        world.graph.node_mut(node).bitmaps[at].shown_by = Some(id.clone());
    }
    world.exports.push(Export {
        id,
        name: Rc::from(name),
        writable,
        root,
        clients: 0,
    });
    Ok(())
}

pub(crate) fn del(world: &mut World, arguments: &Value) -> Result<(), Refusal> {
    let args = Args::new(arguments)?;
    let id = args.str("id")?;
    let mode = args.opt_enum("mode", &["safe", "hard"])?.unwrap_or("safe");
    args.finish()?;

    let Some(at) = world.exports.iter().position(|export| &*export.id == id) else {
        return Err(Refusal::new(format!("Export '{id}' is not found")));
    };
    if mode == "safe" && world.exports[at].clients > 0 {
        return Err(Refusal::new(format!("export '{id}' still in use")));
    }
    let export = world.exports.remove(at);
    world.graph.no_longer_shown(&export.id);
    world.graph.remove_edge_and_refresh(export.root);
    Ok(())
}

/// The bitmaps that clients are to see: by name alone on the node or the first one below it in its chain that has such a
/// one.
fn find_shown(
    world: &World,
    node: NodeId,
    bitmaps: &[Source<'_>],
    writable: bool,
) -> Result<Vec<(NodeId, usize)>, Refusal> {
    let find = |source: &Source<'_>| {
        let found = match *source {
            Source::Of(node, name) => world.find_bitmap(node, name)?,
            Source::Here(name) => world
                .graph
                .find_in_chain(node, name)
                .ok_or_else(|| Refusal::new(format!("Bitmap '{name}' is not found")))?,
        };
        let owner = world.graph.node(found.0);
        let bitmap = &owner.bitmaps[found.1];
        check_shown(bitmap)?;
        // Only a bitmap of the export's own chain is held to record what its clients see.
        let own = matches!(source, Source::Here(_));
        if own && !writable && owner.writable && bitmap.enabled {
            return Err(Refusal::new(format!(
                "Enabled bitmap '{}' incompatible with readonly export",
                bitmap.name
            )));
        }
        Ok(found)
    };
    bitmaps.iter().map(find).collect()
}

impl Graph {
    fn find_in_chain(&self, top: NodeId, name: &str) -> Option<(NodeId, usize)> {
        let mut chain = std::iter::successors(Some(top), |id| {
            self.filter_child(*id).or_else(|| self.cow_child(*id))
        });
        chain.find_map(|id| {
            let bitmaps = &self.node(id).bitmaps;
            let at = bitmaps.iter().position(|bitmap| &*bitmap.name == name)?;
            Some((id, at))
        })
    }

    fn no_longer_shown(&mut self, export: &str) {
        let ids: Vec<NodeId> = self.nodes().map(|(id, _)| id).collect();
        for id in ids {
            for bitmap in &mut self.node_mut(id).bitmaps {
                if bitmap.shown_by.as_deref() == Some(export) {
                    bitmap.shown_by = None;
                }
            }
        }
    }
}
