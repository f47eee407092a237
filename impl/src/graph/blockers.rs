//! Op blockers (graph.md 7): reasons on a node why some operations must not start there.
//!
//! Rules: a blocker belongs to an edge and goes with it. Backing links bring theirs themselves; jobs ask for theirs.
//! Only commands ask; permissions and freezing protect what runs.

use std::rc::Rc;

use crate::Layer;
use crate::error::QmpError;
use crate::graph::edge::Edge;
use crate::graph::node::{Blocker, Node};
use crate::types::{EdgeId, NodeId};

/// Operations that can be blocked (QEMU `BlockOpType`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum OpType {
    /// Source of a backup.
    BackupSource,
    /// Target of a backup.
    BackupTarget,
    /// change-backing-file on the root.
    Change,
    /// Device of a commit.
    CommitSource,
    /// Node in a committed range.
    CommitTarget,
    /// blockdev-del.
    DriveDel,
    /// blockdev-remove-medium and its kin.
    Eject,
    /// blockdev-snapshot.
    ExternalSnapshot,
    /// Internal snapshot.
    InternalSnapshot,
    /// Deletion of an internal snapshot.
    InternalSnapshotDelete,
    /// Source of a mirror.
    MirrorSource,
    /// Target of a mirror.
    MirrorTarget,
    /// block_resize.
    Resize,
    /// Node in a streamed range.
    Stream,
    /// Node that a mirror replaces.
    Replace,
}

impl OpType {
    /// What may be done with a backing file although it is one.
    fn allowed_on_backing(self) -> bool {
        matches!(
            self,
            OpType::CommitTarget | OpType::Stream | OpType::BackupSource | OpType::BackupTarget
        )
    }
}

impl Layer {
    /// Refuses `op` with the newest reason that blocks it.
    pub fn op_blocked(&self, node: NodeId, op: OpType) -> Result<(), QmpError> {
        let node = self.node(node);
        let blockers = node.blockers.borrow();
        let Some(blocker) = blockers
            .iter()
            .find(|b| !(b.backing_link && op.allowed_on_backing()))
        else {
            return Ok(());
        };
        let name = self.device_or_node_name(&node);
        Err(QmpError::generic(format!(
            "Node '{name}' is busy: {}",
            blocker.reason
        )))
    }

    /// Blocks every operation on `node` for as long as `edge` wants it.
    pub fn block_ops(&self, node: NodeId, edge: EdgeId, reason: &str) {
        let blocker = Blocker {
            edge,
            reason: reason.into(),
            backing_link: false,
        };
        self.node(node).blockers.borrow_mut().insert(0, blocker);
    }

    /// Takes back what `edge` blocked on `node`.
    pub fn unblock_ops(&self, node: NodeId, edge: EdgeId) {
        self.node(node).blockers.borrow_mut().retain(|b| b.edge != edge);
    }

    /// The blocker of a backing link from `overlay`, named as it is called now.
    pub(super) fn block_backing(&self, child: &Node, edge: &Edge, overlay: &Node) {
        let reason: Rc<str> = format!(
            "node is used as backing hd of '{}'",
            self.device_or_node_name(overlay)
        )
        .into();
        child.blockers.borrow_mut().insert(
            0,
            Blocker {
                edge: edge.id,
                reason,
                backing_link: true,
            },
        );
    }
}
