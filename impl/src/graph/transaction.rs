//! `transaction`: several actions, all of them or none (graph.md 4.13). A `blockdev-snapshot` alone is one of one action.
//!
//! Rules: a drain of everything first; then actions are prepared in order, each node drained from its action to the end. The
//! first refusal takes everything back, the newest first; otherwise commits run in the same reverse order. Backups are made in
//! order and started in reverse, while their sources are still drained.
//! What a refused transaction leaves is what was there, also where the overlay had parents of its own: QEMU moves those
//! to the node below.
//! Not here: internal snapshots.

use std::rc::Rc;

use super::DrainGuard;
use super::blockers::OpType;
use super::tran::Tran;
use crate::Layer;
use crate::dirty::DirtyBitmap;
use crate::dirty::bits::Bits;
use crate::dirty::commands::{BitmapCommand, Undo};
use crate::error::QmpError;
use crate::event::Parent;
use crate::jobs::{BackupArgs, Job, JobTxn};
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
    /// Starts a backup job.
    Backup(Box<BackupArgs>),
    /// Refuses, for tests.
    Abort,
}

/// A prepared action.
#[derive(Debug)]
enum Step {
    Snapshot {
        log: Tran,
        node: NodeId,
        overlay: NodeId,
        /// Of nodes above: a shorter overlay cuts them.
        marks: Vec<(Rc<DirtyBitmap>, Bits)>,
    },
    Bitmap(Undo),
    Backup(Rc<Job>),
}

/// What prepared actions need until the end.
#[derive(Debug, Default)]
struct Prepared {
    steps: Vec<Step>,
    sections: Vec<DrainGuard>,
}

impl Layer {
    /// Executes the actions. Main lock held. `grouped`: jobs succeed or fail together.
    pub(crate) async fn transaction(&self, actions: &[Action], grouped: bool) -> Result<(), QmpError> {
        self.drain_all_begin().await;
        self.drain_all_end();
        let group = grouped.then(JobTxn::new);
        let mut prepared = Prepared::default();
        let mut result = Ok(());
        for action in actions {
            let may_be_taken_back = actions.len() > 1;
            result = self
                .prepare(action, may_be_taken_back, group.as_ref(), &mut prepared)
                .await;
            if result.is_err() {
                break;
            }
        }
        let Prepared { steps, mut sections } = prepared;
        let snapshots = self.conclude_steps(steps, &result).await;
        if result.is_ok() {
            for node in snapshots {
                // It may be needed for writing by somebody else.
                let _stays_writable = self.set_read_only(node, true).await;
            }
        }
        while let Some(section) = sections.pop() {
            drop(section);
        }
        result
    }

    async fn prepare(
        &self,
        action: &Action,
        may_be_taken_back: bool,
        group: Option<&Rc<JobTxn>>,
        prepared: &mut Prepared,
    ) -> Result<(), QmpError> {
        match action {
            Action::Snapshot { node, overlay } => {
                self.prepare_snapshot(node, overlay, may_be_taken_back, prepared)
                    .await
            }
            Action::Bitmap(command) => self.prepare_bitmap(command, prepared).await,
            Action::Backup(args) => {
                let txn = group.map_or_else(JobTxn::new, Rc::clone);
                let job = self.prepare_backup(args, &txn, &mut prepared.sections).await?;
                prepared.steps.push(Step::Backup(job));
                Ok(())
            }
            Action::Abort => Err(QmpError::generic("Transaction aborted using Abort action")),
        }
    }

    /// Makes all steps effective, or takes them back, the newest first. Returns the nodes that got an overlay, in this order.
    async fn conclude_steps(&self, steps: Vec<Step>, result: &Result<(), QmpError>) -> Vec<NodeId> {
        let has_jobs = result.is_err() && steps.iter().any(|step| matches!(step, Step::Backup(_)));
        // All snapshots change hands at once where no job's filter has to be taken out in between.
        let whole = if has_jobs {
            None
        } else {
            Some(self.graph_write().await)
        };
        let mut snapshots = Vec::new();
        for step in steps.into_iter().rev() {
            match step {
                Step::Snapshot {
                    log,
                    node,
                    overlay,
                    marks,
                } => {
                    let write = if has_jobs {
                        Some(self.graph_write().await)
                    } else {
                        None
                    };
                    let _handed_through = log.finish(self, result.clone());
                    drop(write);
                    snapshots.push((node, overlay, marks));
                }
                Step::Bitmap(undo) if result.is_ok() => undo.commit(),
                Step::Bitmap(undo) => undo.take_back(),
                Step::Backup(job) if result.is_ok() => job.start(),
                // The end of one of a group is the end of all.
                Step::Backup(job) if job.status().is_completed() => {}
                Step::Backup(job) => job.cancel().await,
            }
        }
        for (node, overlay, marks) in &snapshots {
            self.refresh_open_limits(&self.node(*overlay));
            self.refresh_open_limits(&self.node(*node));
            // The overlay may be longer or shorter, and it is back where it was after a refusal.
            if result.is_ok() {
                self.lengths_follow_for_good(*overlay);
            } else {
                self.lengths_follow(*overlay);
            }
            self.lengths_follow(*node);
            if result.is_err() {
                for (bitmap, bits) in marks {
                    bitmap.bits.replace(bits.clone());
                }
            }
        }
        drop(whole);
        snapshots.into_iter().map(|(node, ..)| node).collect()
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
        let shorter = overlay.io.length.get() < below.io.length.get();
        let marks = if may_be_taken_back && shorter {
            self.marks_above(node)
        } else {
            Vec::new()
        };
        let mut log = Tran::default();
        let appended = self.append_in(&overlay, node, &mut log);
        let overlay_id = overlay.id;
        prepared.steps.push(Step::Snapshot {
            log,
            node,
            overlay: overlay_id,
            marks,
        });
        appended?;
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
        let undo = command.carry_out(self).await?;
        prepared.steps.push(Step::Bitmap(undo));
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
