//! Op blockers: why a command may not touch a node that is in use.
//!
//! Rules: they need no state of their own. A job's edge blocks every operation on its node; a backing link blocks all
//! but a few on the backing node. The reason given is the newest, i.e. that of the first such parent.

use crate::graph::{Graph, NodeId, Parent};
use crate::perm::Role;
use crate::refusal::Refusal;

/// Operations that ask before they touch a node.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Op {
    /// Streaming through the node (block-stream).
    Stream,
    /// Deleting it (blockdev-del).
    DriveDel,
    /// Putting an overlay above it (blockdev-snapshot).
    ExternalSnapshot,
    /// Another length (block_resize).
    Resize,
    /// Changing what its chain is recorded to be (change-backing-file).
    Change,
    /// Copying its content elsewhere (blockdev-backup).
    BackupSource,
    /// Copying into it.
    BackupTarget,
}

impl Op {
    /// It may touch a node that is the backing node of another.
    fn is_free_to_overlays(self) -> bool {
        matches!(self, Op::Stream | Op::BackupSource | Op::BackupTarget)
    }
}

impl Graph {
    /// Whether `op` may touch the node.
    ///
    /// # Errors
    /// The node is busy, and with what.
    pub fn check_op(&self, id: NodeId, op: Op) -> Result<(), Refusal> {
        match self.busy(id, op).into_iter().next() {
            Some(reason) => Err(reason),
            None => Ok(()),
        }
    }

    /// Everything that keeps `op` from touching the node, the newest first.
    #[must_use]
    pub fn busy(&self, id: NodeId, op: Op) -> Vec<Refusal> {
        let reason = |parent: &Parent, role: Role| match parent {
            Parent::Job(_, kind) => Some(format!("block device is in use by block job: {}", kind.name())),
            Parent::Node(overlay) if role.contains(Role::COW) && !op.is_free_to_overlays() => {
                Some(format!("node is used as backing hd of '{}'", self.name(*overlay)))
            }
            Parent::Node(_) | Parent::Export(_) | Parent::JobBackend(_) => None,
        };
        let name = self.name(id);
        self.parents(id)
            .filter_map(|(_, edge)| reason(&edge.parent, edge.role))
            .map(|reason| Refusal::new(format!("Node '{name}' is busy: {reason}")))
            .collect()
    }
}
