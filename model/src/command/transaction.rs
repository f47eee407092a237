//! `transaction`, and `blockdev-snapshot`, which is a transaction of one action.
//!
//! Rules: actions are prepared in order, each on what those before it made; the first that is refused takes all back.
//! When all are prepared they take effect, last one first. A snapshot's old node then becomes read-only, if nobody
//! minds.
//! Differs from QEMU 10.0: an action that is taken back leaves the overlay's own parents where they were.

use serde_json::Value;

use crate::blockers::Op;
use crate::command::args::Args;
use crate::command::bitmap::{self, BitmapCommand};
use crate::command::lookup;
use crate::graph::{Graph, NodeId};
use crate::perm::{Perm, Role};
use crate::refusal::Refusal;
use crate::world::World;

/// One action.
enum Action<'a> {
    Abort,
    Snapshot(Snapshot<'a>),
    Bitmap(&'a str, BitmapCommand<'a>),
}

/// `blockdev-snapshot`.
struct Snapshot<'a> {
    node: &'a str,
    overlay: &'a str,
}

impl<'a> Snapshot<'a> {
    fn parse(args: Args<'a>) -> Result<Snapshot<'a>, Refusal> {
        let snapshot = Snapshot {
            node: args.str("node")?,
            overlay: args.str("overlay")?,
        };
        args.finish()?;
        Ok(snapshot)
    }
}

impl<'a> Action<'a> {
    fn parse(args: Args<'a>) -> Result<Action<'a>, Refusal> {
        let kinds = [&["abort", "blockdev-snapshot"][..], &bitmap::NAMES].concat();
        let kind = args.one_of("type", &kinds)?;
        let data = args.object("data")?;
        let action = if kind == "abort" {
            data.finish()?;
            Action::Abort
        } else if bitmap::NAMES.contains(&kind) {
            Action::Bitmap(kind, BitmapCommand::parse(kind, data)?)
        } else {
            Action::Snapshot(Snapshot::parse(data)?)
        };
        args.finish()?;
        Ok(action)
    }

    fn name(&self) -> &'a str {
        match self {
            Action::Abort => "abort",
            Action::Snapshot(_) => "blockdev-snapshot",
            Action::Bitmap(name, _) => name,
        }
    }
}

pub(crate) fn transaction(world: &mut World, arguments: &Value) -> Result<(), Refusal> {
    let args = Args::new(arguments)?;
    let actions: Result<Vec<Action<'_>>, Refusal> = args
        .objects("actions")?
        .map(|action| Action::parse(action?))
        .collect();
    let actions = actions?;
    let mut grouped = false;
    if let Some(properties) = args.opt_object("properties")? {
        grouped = properties.opt_enum("completion-mode", &["individual", "grouped"])? == Some("grouped");
        properties.finish()?;
    }
    args.finish()?;
    // Only jobs can wait for one another.
    if let Some(action) = actions.first().filter(|_| grouped) {
        return Err(Refusal::new(format!(
            "Action '{}' does not support transaction property completion-mode = grouped",
            action.name()
        )));
    }
    carry_out(world, &actions)
}

pub(crate) fn blockdev_snapshot(world: &mut World, arguments: &Value) -> Result<(), Refusal> {
    let snapshot = Snapshot::parse(Args::new(arguments)?)?;
    carry_out(world, &[Action::Snapshot(snapshot)])
}

/// The world is a copy, so that a refusal need not take anything back.
fn carry_out(world: &mut World, actions: &[Action<'_>]) -> Result<(), Refusal> {
    let mut snapshotted = Vec::new();
    for action in actions {
        match action {
            Action::Abort => return Err(Refusal::new("Transaction aborted using Abort action")),
            Action::Snapshot(snapshot) => snapshotted.push(prepare(world, snapshot)?),
            Action::Bitmap(_, command) => command.carry_out(world)?,
        }
    }
    world.remove_bitmaps();
    // An overlay may be longer or shorter than what it is put on.
    world.graph.lengths_follow();
    for node in snapshotted.into_iter().rev() {
        let _ = world.graph.attempt(|graph| graph.set_read_only(node, true));
    }
    Ok(())
}

/// Puts the overlay above the node; the node.
fn prepare(world: &mut World, snapshot: &Snapshot<'_>) -> Result<NodeId, Refusal> {
    let node = lookup(world, snapshot.node, snapshot.node)?;
    world.graph.check_op(node, Op::ExternalSnapshot)?;
    let overlay = lookup(world, snapshot.overlay, snapshot.overlay)?;
    let graph = &mut world.graph;
    check_overlay(graph, overlay)?;
    graph.append(overlay, node)?;
    Ok(node)
}

fn check_overlay(graph: &Graph, overlay: NodeId) -> Result<(), Refusal> {
    let driver = graph.node(overlay).driver;
    let text = if graph.cumulative(overlay).perm.contains(Perm::CONSISTENT_READ) {
        "The overlay is already in use"
    } else if driver.is_filter() {
        "Filters cannot be used as overlays"
    } else if graph.cow_child(overlay).is_some() {
        "The overlay already has a backing image"
    } else if !driver.supports_backing() {
        "The overlay does not support backing images"
    } else {
        return Ok(());
    };
    Err(Refusal::new(text))
}

impl Graph {
    /// Puts `new`, which has no backing node, above `top`, and moves what is above `top` to it.
    ///
    /// # Errors
    /// A cycle, a frozen link, masks.
    pub fn append(&mut self, new: NodeId, top: NodeId) -> Result<(), Refusal> {
        self.attach_noperm(new, top, "backing", Role::COW)?;
        self.move_parents(top, new)?;
        self.refresh(&[new])
    }
}
