//! `block-dirty-bitmap-*`, alone or as actions of a transaction.
//!
//! Rules: each names a node and a bitmap of it. A bitmap that somebody uses takes no command; one whose image is
//! read-only may be enabled, disabled and merged from; one that is inconsistent may only be removed. Bitmaps that are
//! merged have one length; their granularities may differ.
//! Differs from QEMU 10.0: merging nothing is no failure.
//! Not here: the limits on how many bitmaps an image holds (65535, and 64 MiB of directory).

use std::rc::Rc;

use serde_json::Value;

use crate::bitmap::Bitmap;
use crate::command::args::{Args, StringOr};
use crate::command::lookup;
use crate::graph::NodeId;
use crate::perm::Driver;
use crate::refusal::Refusal;
use crate::world::World;

/// The commands, without what they have in common in their names.
pub(crate) const NAMES: [&str; 6] = [
    "block-dirty-bitmap-add",
    "block-dirty-bitmap-remove",
    "block-dirty-bitmap-clear",
    "block-dirty-bitmap-enable",
    "block-dirty-bitmap-disable",
    "block-dirty-bitmap-merge",
];

const DEFAULT_GRANULARITY: (u64, u64) = (4096, 65536);
const SMALLEST: u32 = 512;
const LONGEST_NAME: usize = 1023;
/// A stored bitmap has at most so many bytes, and so many clusters.
const STORED_BYTES: u64 = 512 << 20;
const STORED_CLUSTERS: u64 = 0x800_0000;

/// A bitmap by its name, on a node that is said or understood.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Source<'a> {
    Here(&'a str),
    Of(&'a str, &'a str),
}

/// One command.
#[derive(Debug)]
pub(crate) struct BitmapCommand<'a> {
    node: &'a str,
    name: &'a str,
    what: What<'a>,
}

#[derive(Debug)]
enum What<'a> {
    Add {
        granularity: Option<u32>,
        persistent: bool,
        disabled: bool,
    },
    Remove,
    Clear,
    Enable(bool),
    Merge(Vec<Source<'a>>),
}

/// What a bitmap must not be for a command.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Use {
    /// Busy, read-only or inconsistent.
    Change,
    /// Busy or inconsistent.
    Look,
    /// Busy or read-only.
    Remove,
}

impl<'a> BitmapCommand<'a> {
    /// The arguments of the command of this name, one of [`NAMES`].
    pub(crate) fn parse(name: &str, args: Args<'a>) -> Result<BitmapCommand<'a>, Refusal> {
        let node = args.str("node")?;
        let merge = name.ends_with("-merge");
        let bitmap = args.str(if merge { "target" } else { "name" })?;
        let what = match name.rsplit('-').next() {
            Some("add") => What::Add {
                granularity: args.opt_u32("granularity")?,
                persistent: args.opt_bool("persistent")?.unwrap_or(false),
                disabled: args.opt_bool("disabled")?.unwrap_or(false),
            },
            Some("remove") => What::Remove,
            Some("clear") => What::Clear,
            Some("enable") => What::Enable(true),
            Some("disable") => What::Enable(false),
            _ => {
                args.required("bitmaps")?;
                What::Merge(sources(&args)?)
            }
        };
        args.finish()?;
        Ok(BitmapCommand {
            node,
            name: bitmap,
            what,
        })
    }

    /// Does it. A removal in a transaction takes place with [`World::remove_bitmaps`].
    pub(crate) fn carry_out(&self, world: &mut World) -> Result<(), Refusal> {
        if let What::Add { .. } = self.what {
            return self.add(world);
        }
        let (node, at) = world.find_bitmap(self.node, self.name)?;
        let bitmap = &mut world.graph.node_mut(node).bitmaps[at];
        match &self.what {
            What::Add { .. } => unreachable!("done above"),
            What::Remove => {
                check(bitmap, Use::Remove)?;
                bitmap.removed = true;
            }
            What::Clear => {
                check(bitmap, Use::Change)?;
                bitmap.clear();
            }
            What::Enable(on) => {
                check(bitmap, Use::Look)?;
                bitmap.enabled = *on;
            }
            What::Merge(sources) => {
                let merged = world.merged(node, at, sources)?;
                world.graph.node_mut(node).bitmaps[at] = merged;
            }
        }
        Ok(())
    }

    fn add(&self, world: &mut World) -> Result<(), Refusal> {
        let What::Add {
            granularity,
            persistent,
            disabled,
        } = self.what
        else {
            unreachable!("the caller looked")
        };
        if self.name.is_empty() {
            return Err(Refusal::new("Bitmap name cannot be empty"));
        }
        let id = lookup(world, self.node, self.node)?;
        if granularity.is_some_and(|bytes| bytes < SMALLEST || !bytes.is_power_of_two()) {
            return Err(Refusal::new("Granularity must be power of 2 and at least 512"));
        }
        let granularity = granularity.map_or_else(|| world.default_granularity(id), u64::from);
        if persistent {
            world.check_storable(id, self.name, granularity)?;
        }
        let node = world.graph.node_mut(id);
        if node.bitmaps.iter().any(|bitmap| &*bitmap.name == self.name) {
            return Err(Refusal::new(format!("Bitmap already exists: {}", self.name)));
        }
        if self.name.len() > LONGEST_NAME {
            return Err(Refusal::new(format!("Bitmap name too long: {}", self.name)));
        }
        let mut bitmap = Bitmap::new(Rc::from(self.name), granularity, node.length);
        bitmap.enabled = !disabled;
        bitmap.persistent = persistent;
        bitmap.number = world.graph.next_bitmap();
        world.graph.node_mut(id).bitmaps.insert(0, bitmap);
        Ok(())
    }
}

/// The list of bitmaps, if it is there.
pub(crate) fn sources<'a>(args: &Args<'a>) -> Result<Vec<Source<'a>>, Refusal> {
    args.strings_or_objects("bitmaps", "BlockDirtyBitmapOrStr")?
        .map(|item| match item? {
            StringOr::String(name) => Ok(Source::Here(name)),
            StringOr::Object(object) => {
                let source = Source::Of(object.str("node")?, object.str("name")?);
                object.finish()?;
                Ok(source)
            }
        })
        .collect()
}

fn check(bitmap: &Bitmap, wanted: Use) -> Result<(), Refusal> {
    let name = &bitmap.name;
    Err(Refusal::new(if bitmap.is_busy() {
        format!("Bitmap '{name}' is currently in use by another operation and cannot be used")
    } else if bitmap.read_only && wanted != Use::Look {
        format!("Bitmap '{name}' is readonly and cannot be modified")
    } else if bitmap.inconsistent && wanted != Use::Remove {
        format!("Bitmap '{name}' is inconsistent and cannot be used")
    } else {
        return Ok(());
    }))
}

/// May be shown to clients.
pub(crate) fn check_shown(bitmap: &Bitmap) -> Result<(), Refusal> {
    check(bitmap, Use::Look)
}

/// May be changed.
pub(crate) fn check_change(bitmap: &Bitmap) -> Result<(), Refusal> {
    check(bitmap, Use::Change)
}

pub(crate) fn add(world: &mut World, arguments: &Value) -> Result<(), Refusal> {
    run(world, NAMES[0], arguments)
}

pub(crate) fn remove(world: &mut World, arguments: &Value) -> Result<(), Refusal> {
    run(world, NAMES[1], arguments)
}

pub(crate) fn clear(world: &mut World, arguments: &Value) -> Result<(), Refusal> {
    run(world, NAMES[2], arguments)
}

pub(crate) fn enable(world: &mut World, arguments: &Value) -> Result<(), Refusal> {
    run(world, NAMES[3], arguments)
}

pub(crate) fn disable(world: &mut World, arguments: &Value) -> Result<(), Refusal> {
    run(world, NAMES[4], arguments)
}

pub(crate) fn merge(world: &mut World, arguments: &Value) -> Result<(), Refusal> {
    run(world, NAMES[5], arguments)
}

fn run(world: &mut World, name: &str, arguments: &Value) -> Result<(), Refusal> {
    BitmapCommand::parse(name, Args::new(arguments)?)?.carry_out(world)?;
    world.remove_bitmaps();
    Ok(())
}

/// `x-debug-block-dirty-bitmap-sha256`: what is left of it here is whether there is such a bitmap.
pub(crate) fn sha256(world: &mut World, arguments: &Value) -> Result<(), Refusal> {
    let args = Args::new(arguments)?;
    let (node, name) = (args.str("node")?, args.str("name")?);
    args.finish()?;
    world.find_bitmap(node, name).map(drop)
}

impl World {
    /// The node and the bitmap's place on it.
    pub(crate) fn find_bitmap(&self, node: &str, name: &str) -> Result<(NodeId, usize), Refusal> {
        let id = self
            .graph
            .find(node)
            .ok_or_else(|| Refusal::new(format!("Node '{node}' not found")))?;
        let bitmaps = &self.graph.node(id).bitmaps;
        let at = bitmaps
            .iter()
            .position(|bitmap| &*bitmap.name == name)
            .ok_or_else(|| Refusal::new(format!("Dirty bitmap '{name}' not found")))?;
        Ok((id, at))
    }

    /// Removals take place, also in images.
    pub(crate) fn remove_bitmaps(&mut self) {
        let ids: Vec<NodeId> = self.graph.nodes().map(|(id, _)| id).collect();
        for id in ids {
            let node = self.graph.node_mut(id);
            let (gone, kept) = std::mem::take(&mut node.bitmaps)
                .into_iter()
                .partition::<Vec<Bitmap>, _>(|bitmap| bitmap.removed);
            node.bitmaps = kept;
            if gone.is_empty() {
                continue;
            }
            if let Some(header) = self.header_mut(id) {
                let goes = |name: &str| gone.iter().any(|b| b.persistent && &*b.name == name);
                header.bitmaps.retain(|stored| !goes(&stored.name));
            }
        }
    }

    fn merged(&self, node: NodeId, at: usize, sources: &[Source<'_>]) -> Result<Bitmap, Refusal> {
        let mut target = self.graph.node(node).bitmaps[at].clone();
        if sources.is_empty() {
            check(&target, Use::Change)?;
        }
        for source in sources {
            let (of, source) = match *source {
                Source::Here(name) => self.find_bitmap(self.graph.name(node), name)?,
                Source::Of(node, name) => self.find_bitmap(node, name)?,
            };
            let source = &self.graph.node(of).bitmaps[source];
            check(&target, Use::Change)?;
            check(source, Use::Look)?;
            if source.length != target.length {
                return Err(Refusal::new(format!(
                    "Bitmaps are of different sizes (destination size is {}, source size is {}) and can't be merged",
                    target.length, source.length
                )));
            }
            target.merge(source);
        }
        Ok(target)
    }

    /// The size of the image's clusters, within bounds.
    fn default_granularity(&self, id: NodeId) -> u64 {
        let (least, most) = DEFAULT_GRANULARITY;
        self.cluster_size(id).map_or(most, |size| size.clamp(least, most))
    }

    fn check_storable(&self, id: NodeId, name: &str, granularity: u64) -> Result<(), Refusal> {
        let node = self.graph.node(id);
        let header = self.header(id).filter(|_| node.driver == Driver::Qcow2);
        let Some(header) = header else {
            return Err(Refusal::new(format!(
                "Can't store persistent bitmaps to {}: Operation not supported",
                node.name
            )));
        };
        if node.bitmaps.iter().any(|bitmap| &*bitmap.name == name) {
            return Err(Refusal::new(format!("Bitmap already exists: {name}")));
        }
        let bytes = node.length.div_ceil(granularity).div_ceil(8);
        let why = if header.version < 3 {
            "Cannot store dirty bitmaps in qcow2 v2 files"
        } else if bytes > STORED_BYTES || bytes > STORED_CLUSTERS * header.cluster_size {
            "Too much space will be occupied by the bitmap. Use larger granularity"
        } else if name.len() > LONGEST_NAME {
            "Name length exceeds maximum (1023 characters)"
        } else {
            return Ok(());
        };
        Err(Refusal::new(format!(
            "Can't make bitmap '{name}' persistent in '{}': {why}",
            node.name
        )))
    }
}
