//! `block-dirty-bitmap-*`, alone and as actions of a transaction.
//!
//! Rules: refusals in QEMU's order and words. In a transaction every action notes how to take it back; a bitmap that an
//! action removes stays, busy, until everything is prepared.
//!
//! Deviations: merging an empty list changes nothing (QEMU crashes); what is taken back is exactly what was done (QEMU
//! disables a bitmap whose enabling was refused, and crashes when it is not there); the node of a bitmap is drained from
//! its action to the end of the transaction, so that bitmaps that are exchanged in one transaction miss no write.

use std::rc::Rc;

use super::bits::Bits;
use super::{DirtyBitmap, LONGEST_NAME, Use};
use crate::Layer;
use crate::error::QmpError;
use crate::graph::node::Node;
use crate::qmp::args::{Args, StringOr};

/// The commands.
pub(crate) const NAMES: [&str; 6] = [
    "block-dirty-bitmap-add",
    "block-dirty-bitmap-clear",
    "block-dirty-bitmap-disable",
    "block-dirty-bitmap-enable",
    "block-dirty-bitmap-merge",
    "block-dirty-bitmap-remove",
];

/// A bitmap by name, on a node that is said or understood.
#[derive(Clone, Debug)]
pub(crate) enum Source {
    Here(String),
    Of(String, String),
}

/// One command.
#[derive(Clone, Debug)]
pub(crate) struct BitmapCommand {
    node: String,
    name: String,
    what: What,
}

#[derive(Clone, Debug)]
enum What {
    Add {
        granularity: Option<u32>,
        persistent: bool,
        disabled: bool,
    },
    Clear,
    Enable(bool),
    Merge(Vec<Source>),
    Remove,
}

/// How to take an action back.
#[derive(Debug)]
pub(crate) enum Undo {
    Added(Rc<Node>, Rc<DirtyBitmap>),
    Bits(Rc<DirtyBitmap>, Bits),
    Enabled(Rc<DirtyBitmap>, bool),
    /// Commits by taking it off the node.
    Removing(Rc<Node>, Rc<DirtyBitmap>),
}

impl Undo {
    /// The action is taken back.
    pub(crate) fn take_back(self) {
        match self {
            Undo::Added(node, bitmap) => take_off(&node, &bitmap),
            Undo::Bits(bitmap, bits) => {
                bitmap.bits.replace(bits);
            }
            Undo::Enabled(bitmap, was) => bitmap.enabled.set(was),
            Undo::Removing(_, bitmap) => bitmap.busy.set(false),
        }
    }

    /// The action stands.
    pub(crate) fn commit(self) {
        if let Undo::Removing(node, bitmap) = self {
            take_off(&node, &bitmap);
        }
    }
}

fn take_off(node: &Node, bitmap: &Rc<DirtyBitmap>) {
    node.bitmaps.borrow_mut().retain(|b| !Rc::ptr_eq(b, bitmap));
}

impl BitmapCommand {
    /// The arguments of the command of this name, one of [`NAMES`].
    pub(crate) fn read(command: &str, mut args: Args<'_>) -> Result<BitmapCommand, QmpError> {
        let verb = command.rsplit('-').next().unwrap_or_default();
        let node = args.str("node")?.to_owned();
        let name = args
            .str(if verb == "merge" { "target" } else { "name" })?
            .to_owned();
        let what = match verb {
            "add" => What::Add {
                granularity: args.opt_u32("granularity")?,
                persistent: args.opt_bool("persistent")?.unwrap_or(false),
                disabled: args.opt_bool("disabled")?.unwrap_or(false),
            },
            "clear" => What::Clear,
            "disable" => What::Enable(false),
            "enable" => What::Enable(true),
            "merge" => {
                args.require("bitmaps")?;
                What::Merge(sources(&mut args)?)
            }
            _ => What::Remove,
        };
        args.finish()?;
        Ok(BitmapCommand { node, name, what })
    }

    /// The node that it is about, if it is there.
    pub(crate) fn node(&self, layer: &Layer) -> Option<Rc<Node>> {
        let id = layer.lookup(&self.node, &self.node).ok()?;
        Some(layer.node(id))
    }

    /// Does it. Main lock held.
    pub(crate) async fn carry_out(&self, layer: &Layer) -> Result<Undo, QmpError> {
        if let What::Add { .. } = self.what {
            return self.add(layer);
        }
        let (node, bitmap) = layer.find_bitmap(&self.node, &self.name)?;
        match &self.what {
            What::Add { .. } => unreachable!("done above"),
            What::Clear => {
                bitmap.check(Use::Change)?;
                let old = bitmap.bits.take();
                Ok(Undo::Bits(bitmap, old))
            }
            What::Enable(on) => {
                bitmap.check(Use::Look)?;
                let was = bitmap.enabled.replace(*on);
                Ok(Undo::Enabled(bitmap, was))
            }
            What::Merge(sources) => merge(layer, &node, bitmap, sources),
            What::Remove => {
                bitmap.check(Use::Remove)?;
                if bitmap.persistent.get() {
                    let driver = node.driver();
                    driver.remove_bitmap(&layer.cx(&node), &bitmap.name).await?;
                }
                bitmap.busy.set(true);
                Ok(Undo::Removing(node, bitmap))
            }
        }
    }

    fn add(&self, layer: &Layer) -> Result<Undo, QmpError> {
        let What::Add {
            granularity,
            persistent,
            disabled,
        } = self.what
        else {
            unreachable!("the caller looked")
        };
        if self.name.is_empty() {
            return Err(QmpError::generic("Bitmap name cannot be empty"));
        }
        let node = layer.node(layer.lookup(&self.node, &self.node)?);
        if granularity.is_some_and(|bytes| bytes < 512 || !bytes.is_power_of_two()) {
            return Err(QmpError::generic(
                "Granularity must be power of 2 and at least 512",
            ));
        }
        let granularity = granularity.map_or_else(|| default_granularity(layer, &node), u64::from);
        if persistent {
            node.driver()
                .check_bitmap(&layer.cx(&node), &self.name, granularity)?;
        }
        if node.bitmap(&self.name).is_some() {
            return Err(QmpError::generic(format!("Bitmap already exists: {}", self.name)));
        }
        if self.name.len() > LONGEST_NAME {
            return Err(QmpError::generic(format!("Bitmap name too long: {}", self.name)));
        }
        let bitmap = DirtyBitmap::new(&self.name, granularity, node.length());
        bitmap.enabled.set(!disabled);
        bitmap.persistent.set(persistent);
        let bitmap = Rc::new(bitmap);
        node.bitmaps.borrow_mut().insert(0, Rc::clone(&bitmap));
        Ok(Undo::Added(node, bitmap))
    }
}

/// The members of `bitmaps`, if it is there.
pub(crate) fn sources(args: &mut Args<'_>) -> Result<Vec<Source>, QmpError> {
    let mut all = Vec::new();
    for item in args.strings_or_objects("bitmaps", "BlockDirtyBitmapOrStr")? {
        all.push(match item? {
            StringOr::String(name) => Source::Here(name.to_owned()),
            StringOr::Object(mut object) => {
                let source = Source::Of(object.str("node")?.to_owned(), object.str("name")?.to_owned());
                object.finish()?;
                source
            }
        });
    }
    Ok(all)
}

/// Nothing of it, or all.
fn merge(
    layer: &Layer,
    node: &Rc<Node>,
    target: Rc<DirtyBitmap>,
    sources: &[Source],
) -> Result<Undo, QmpError> {
    let old = target.bits.borrow().clone();
    let all = || {
        if sources.is_empty() {
            target.check(Use::Change)?;
        }
        for source in sources {
            let source = match source {
                Source::Here(name) => layer.find_bitmap(&node.name, name)?.1,
                Source::Of(node, name) => layer.find_bitmap(node, name)?.1,
            };
            target.check(Use::Change)?;
            target.can_take(&source)?;
            target.merge(&source);
        }
        Ok(())
    };
    let result = all();
    let undo = Undo::Bits(target, old);
    match result {
        Ok(()) => Ok(undo),
        Err(refusal) => {
            undo.take_back();
            Err(refusal)
        }
    }
}

/// The size of the image's clusters, within bounds.
fn default_granularity(layer: &Layer, node: &Rc<Node>) -> u64 {
    layer
        .driver_info(node)
        .map_or(65536, |info| info.cluster_size.clamp(4096, 65536))
}

impl Layer {
    /// A bitmap by node and name.
    pub(crate) fn find_bitmap(
        &self,
        node: &str,
        name: &str,
    ) -> Result<(Rc<Node>, Rc<DirtyBitmap>), QmpError> {
        let id = self
            .lookup(node, node)
            .map_err(|_| QmpError::generic(format!("Node '{node}' not found")))?;
        let node = self.node(id);
        let bitmap = node
            .bitmap(name)
            .ok_or_else(|| QmpError::generic(format!("Dirty bitmap '{name}' not found")))?;
        Ok((node, bitmap))
    }

    /// A command alone. Main lock held.
    pub(crate) async fn bitmap_command(&self, command: &BitmapCommand) -> Result<(), QmpError> {
        command.carry_out(self).await.map(Undo::commit)
    }
}
