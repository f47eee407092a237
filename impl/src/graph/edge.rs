//! An edge: who uses which node, as what, with which permissions.

use std::cell::Cell;
use std::fmt;
use std::rc::Rc;

use crate::event::Parent;
use crate::sync::FreezeCount;
use crate::types::{EdgeId, NodeId, Perm, Role};

/// What a parent that is not a node (a backend, a job) does for its edges (QEMU `BdrvChildClass`).
///
/// No method may wait, or change the graph: they run in the middle of drained sections and graph changes.
pub trait ParentHooks {
    /// The child became drained: start no more requests through the edge.
    fn drained_begin(&self);
    /// Whether something is still going on above the edge. Whoever ends it must kick the layer.
    fn drained_poll(&self) -> bool;
    /// The child is no longer drained.
    fn drained_end(&self);
    /// Who this is, for error texts: `block device 'x'`, `an unnamed block device`, `stream job 'j'`.
    fn describe(&self) -> String;
    /// The monitor's name of a named backend; `None` for jobs, exports and anonymous backends.
    fn name(&self) -> Option<Rc<str>>;
    /// For [`inspect`](crate::graph::inspect): open drained sections and requests in flight, as the parent counts them.
    fn counters(&self) -> (u32, u32) {
        (0, 0)
    }
}

/// An edge of the graph (QEMU `BdrvChild`).
pub struct Edge {
    /// Identity.
    pub id: EdgeId,
    /// Child name: `file`, `backing`, `root`, `main node`, …
    pub name: Rc<str>,
    /// Who is above.
    pub parent: Parent,
    /// What the child is to the parent; empty for job edges.
    pub role: Role,
    /// Who is below. `None` only inside a graph change.
    pub child: Cell<Option<NodeId>>,
    /// What the parent may do.
    pub perm: Cell<Perm>,
    /// What the parent lets others do.
    pub shared: Cell<Perm>,
    /// The link must not change while frozen.
    pub frozen: FreezeCount,
    /// The parent was told that the child is drained.
    pub quiesced_parent: Cell<bool>,
    /// The parent's hooks; `None` exactly when the parent is a node.
    pub(crate) hooks: Option<Rc<dyn ParentHooks>>,
}

impl Edge {
    /// Whether the edge never follows a node replacement (jobs).
    #[must_use]
    pub fn stays_at_node(&self) -> bool {
        matches!(self.parent, Parent::Job(_))
    }

    /// Both masks.
    #[must_use]
    pub fn masks(&self) -> (Perm, Perm) {
        (self.perm.get(), self.shared.get())
    }
}

impl fmt::Debug for Edge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:?}: {:?} -{}-> {:?}",
            self.id,
            self.parent,
            self.name,
            self.child.get()
        )
    }
}
