//! `transaction`, and `blockdev-snapshot` and `blockdev-backup`, which are transactions of one action.
//!
//! Rules: actions are prepared in order, each on what those before it made; the first that is refused takes all back.
//! When all are prepared they take effect, last one first. A snapshot's old node then becomes read-only, if nobody
//! minds. Backups of one transaction may be told to end together.
//! Differs from QEMU 10.0: an action that is taken back leaves the overlay's own parents where they were.

use serde_json::Value;

use crate::blockers::Op;
use crate::command::args::Args;
use crate::command::bitmap::{self, BitmapCommand};
use crate::command::{backup, lookup};
use crate::graph::{Graph, NodeId};
use crate::perm::{Perm, Role};
use crate::refusal::Refusal;
use crate::world::World;

/// One action.
enum Action<'a> {
    Abort,
    Snapshot(Snapshot<'a>),
    Backup(backup::Request<'a>),
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
        let kinds = [
            &["abort", "blockdev-snapshot", "blockdev-backup"][..],
            &bitmap::NAMES,
        ]
        .concat();
        let kind = args.one_of("type", &kinds)?;
        let data = args.object("data")?;
        let action = if kind == "abort" {
            data.finish()?;
            Action::Abort
        } else if kind == "blockdev-backup" {
            Action::Backup(backup::Request::parse(data)?)
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
            Action::Backup(_) => "blockdev-backup",
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
    let waits = |action: &&Action<'_>| !matches!(action, Action::Backup(_));
    if let Some(action) = actions.iter().find(waits).filter(|_| grouped) {
        return Err(Refusal::new(format!(
            "Action '{}' does not support transaction property completion-mode = grouped",
            action.name()
        )));
    }
    let group = grouped.then(|| world.new_group());
    carry_out(world, &actions, group)
}

pub(crate) fn blockdev_snapshot(world: &mut World, arguments: &Value) -> Result<(), Refusal> {
    let snapshot = Snapshot::parse(Args::new(arguments)?)?;
    carry_out(world, &[Action::Snapshot(snapshot)], None)
}

pub(crate) fn blockdev_backup(world: &mut World, arguments: &Value) -> Result<(), Refusal> {
    let backup = backup::Request::parse(Args::new(arguments)?)?;
    carry_out(world, &[Action::Backup(backup)], None)
}

/// The world is a copy, so that a refusal need not take anything back; but clients see jobs that were made and given up.
fn carry_out(world: &mut World, actions: &[Action<'_>], group: Option<u32>) -> Result<(), Refusal> {
    let (mut snapshotted, mut made) = (Vec::new(), Vec::new());
    for action in actions {
        let done = match action {
            Action::Abort => Err(Refusal::new("Transaction aborted using Abort action")),
            Action::Snapshot(snapshot) => prepare(world, snapshot).map(|node| snapshotted.push(node)),
            Action::Backup(backup) => backup.carry_out(world, group).map(|id| made.push(id)),
            Action::Bitmap(_, command) => command.carry_out(world),
        };
        done.map_err(|refusal| Refusal {
            taken_back: made.clone(),
            ..refusal
        })?;
    }
    world.start_in_turn(made);
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
