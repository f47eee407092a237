//! `transaction`: several actions, all of them or none (graph.md 4.13). A `blockdev-snapshot` alone is one of one action.
//!
//! Rules: a drain of everything first; then actions are prepared in order, in one log of graph changes, each node drained
//! from its action to the end. The first refusal takes everything back; otherwise commits run in reverse order.
//! What a refused transaction leaves is what was there, also where the overlay had parents of its own: QEMU moves those
//! to the node below.
//! Not here: backups and internal snapshots, and so no grouped completion.

use super::DrainGuard;
use super::blockers::OpType;
use super::tran::Tran;
use crate::Layer;
use crate::dirty::commands::{BitmapCommand, Undo};
use crate::error::QmpError;
use crate::event::Parent;
use crate::types::{NodeId, Perm, Role};

/// One action.
#[derive(Clone, Debug)]
pub(crate) enum Action {
    /// Puts an opened image above a node; the node's users move to it.
    Snapshot {
        /// Name of the node.
        node: String,
        /// Name of the image.
        overlay: String,
    },
    /// A command on a dirty bitmap.
    Bitmap(BitmapCommand),
    /// Refuses, for tests.
    Abort,
}

/// What prepared actions need until the end.
#[derive(Debug, Default)]
struct Prepared {
    log: Tran,
    /// Nodes with the overlay that each of them got.
    snapshots: Vec<(NodeId, NodeId)>,
    bitmaps: Vec<Undo>,
    sections: Vec<DrainGuard>,
}

impl Layer {
    /// Executes the actions. Main lock held.
    pub(crate) async fn transaction(&self, actions: &[Action]) -> Result<(), QmpError> {
        self.drain_all_begin().await;
        self.drain_all_end();
        let mut prepared = Prepared::default();
        let mut result = Ok(());
        for action in actions {
            result = match action {
                Action::Snapshot { node, overlay } => {
                    let may_be_taken_back = actions.len() > 1;
                    self.prepare_snapshot(node, overlay, may_be_taken_back, &mut prepared)
                        .await
                }
                Action::Bitmap(command) => self.prepare_bitmap(command, &mut prepared).await,
                Action::Abort => Err(QmpError::generic("Transaction aborted using Abort action")),
            };
            if result.is_err() {
                break;
            }
        }
        let Prepared {
            log,
            snapshots,
            bitmaps,
            sections,
        } = prepared;
        let write = self.graph_write().await;
        let result = log.finish(self, result);
        for done in bitmaps.into_iter().rev() {
            if result.is_ok() {
                done.commit();
            } else {
                done.take_back();
            }
        }
        for (node, overlay) in snapshots.iter().rev() {
            self.refresh_open_limits(&self.node(*overlay));
            self.refresh_open_limits(&self.node(*node));
            // The overlay may be longer or shorter, and it is back where it was after a refusal.
            self.lengths_follow(*overlay);
            self.lengths_follow(*node);
        }
        drop(write);
        if result.is_ok() {
            for (node, _) in snapshots.iter().rev() {
                // It may be needed for writing by somebody else.
                let _stays_writable = self.set_read_only(*node, true).await;
            }
        }
        drop(sections);
        result
    }

    async fn prepare_snapshot(
        &self,
        node: &str,
        overlay: &str,
        may_be_taken_back: bool,
        prepared: &mut Prepared,
    ) -> Result<(), QmpError> {
        let node = self.lookup(node, node)?;
        prepared.sections.push(self.drained(node).await);
        self.op_blocked(node, OpType::ExternalSnapshot)?;
        let below = self.node(node);
        if below.is_writable() {
            self.flush(node)
                .await
                .map_err(|e| QmpError::errno(&format!("Write to node '{}' failed", below.name), e))?;
        }
        let overlay = self.node(self.lookup(overlay, overlay)?);
        self.check_overlay(overlay.id)?;
        prepared.sections.push(self.drained(overlay.id).await);
        if may_be_taken_back {
            self.flush_above(node).await?;
        }
        let _write = self.graph_write().await;
        self.append_in(&overlay, node, &mut prepared.log)?;
        prepared.snapshots.push((node, overlay.id));
        self.refresh_open_limits(&overlay);
        self.lengths_follow(overlay.id);
        Ok(())
    }

    /// What nodes above hold back for this one they store now, the topmost first. Stored after they have moved to the overlay, it
    /// would stay there when the transaction is taken back (QEMU leaves it there).
    async fn flush_above(&self, node: NodeId) -> Result<(), QmpError> {
        let mut above = vec![node];
        let mut at = 0;
        while let Some(below) = above.get(at).copied() {
            for edge in self.node(below).parents.borrow().iter() {
                let edge = self.edge(*edge);
                if let Parent::Node(parent) = edge.parent
                    && !edge.role.contains(Role::COW)
                    && !above.contains(&parent)
                {
                    above.push(parent);
                }
            }
            at += 1;
        }
        for id in above.into_iter().skip(1).rev() {
            let holder = self.node(id);
            if holder.is_writable() {
                self.flush(id)
                    .await
                    .map_err(|e| QmpError::errno(&format!("Write to node '{}' failed", holder.name), e))?;
            }
        }
        Ok(())
    }

    async fn prepare_bitmap(&self, command: &BitmapCommand, prepared: &mut Prepared) -> Result<(), QmpError> {
        if let Some(node) = command.node(self) {
            prepared.sections.push(self.drained(node.id).await);
        }
        prepared.bitmaps.push(command.carry_out(self).await?);
        Ok(())
    }

    fn check_overlay(&self, overlay: NodeId) -> Result<(), QmpError> {
        let node = self.node(overlay);
        let refuse = |text: &str| Err(QmpError::generic(text));
        if self.cumulative(overlay).0.contains(Perm::CONSISTENT_READ) {
            return refuse("The overlay is already in use");
        }
        if node.facts.is_filter {
            return refuse("Filters cannot be used as overlays");
        }
        if node.cow_child_edge().is_some() {
            return refuse("The overlay already has a backing image");
        }
        if !node.facts.supports_backing {
            return refuse("The overlay does not support backing images");
        }
        Ok(())
    }
}
