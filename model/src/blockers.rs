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
}

impl Graph {
    /// Whether `op` may touch the node.
    ///
    /// # Errors
    /// The node is busy, and with what.
    pub fn check_op(&self, id: NodeId, op: Op) -> Result<(), Refusal> {
        let reason = self.parents(id).find_map(|(_, edge)| match &edge.parent {
            Parent::Job(_) => Some("block device is in use by block job: stream".to_owned()),
            Parent::Node(overlay) if edge.role.contains(Role::COW) && op != Op::Stream => {
                Some(format!("node is used as backing hd of '{}'", self.name(*overlay)))
            }
            Parent::Node(_) | Parent::Export(_) | Parent::JobBackend(_) => None,
        });
        match reason {
            Some(reason) => Err(Refusal::new(format!(
                "Node '{}' is busy: {reason}",
                self.name(id)
            ))),
            None => Ok(()),
        }
    }
}
