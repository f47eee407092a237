//! Permissions (graph.md 2): what parents do through their edges, what they tolerate, and who conflicts.
//!
//! Rules: `cumulative` of a node is the union of what its parents do and the intersection of what they share; a driver
//! derives the masks of its own edges from that. A change refreshes whole subtrees in topological order inside a
//! transaction, so a refusal leaves every mask as it was. Judged with the flags a reopen in preparation will set.

use std::rc::Rc;

use super::tran::Tran;
use crate::Layer;
use crate::driver::Cx;
use crate::error::QmpError;
use crate::event::Parent;
use crate::graph::edge::Edge;
use crate::graph::node::Node;
use crate::types::{EdgeId, NodeId, Perm, Role};

const READ: Perm = Perm::CONSISTENT_READ;
const WRITE: Perm = Perm::WRITE;
const UNCHANGED: Perm = Perm::WRITE_UNCHANGED;
const RESIZE: Perm = Perm::RESIZE;

/// Default child masks by role (QEMU `bdrv_default_perms`).
///
/// # Panics
/// On a role that is none of filtered, COW, data, metadata.
#[must_use]
pub fn default_perms(cx: &Cx, role: Role, perm: Perm, shared: Perm) -> (Perm, Perm) {
    if role.contains(Role::FILTERED) {
        assert!(
            !role.intersects(Role::DATA | Role::METADATA | Role::COW),
            "{role:?}"
        );
        (perm, shared)
    } else if role.contains(Role::COW) {
        assert!(!role.intersects(Role::DATA | Role::METADATA), "{role:?}");
        cow_perms(perm, shared)
    } else {
        assert!(role.intersects(Role::DATA | Role::METADATA), "{role:?}");
        storage_perms(cx.node.is_writable_after_reopen(), role, perm, shared)
    }
}

/// A backing file is only read. Others may write to it where the parent's users could bear that as well.
fn cow_perms(perm: Perm, shared: Perm) -> (Perm, Perm) {
    let tolerated = if shared.contains(WRITE) {
        WRITE | RESIZE
    } else {
        Perm::empty()
    };
    (perm & READ, READ | UNCHANGED | tolerated)
}

/// Storage is the parent's own: metadata is always read, and written by a writable parent, whoever uses it.
fn storage_perms(writable: bool, role: Role, mut perm: Perm, mut shared: Perm) -> (Perm, Perm) {
    if role.contains(Role::METADATA) {
        if writable {
            perm |= WRITE | RESIZE;
        }
        perm |= READ;
        shared -= WRITE | RESIZE;
    }
    if role.contains(Role::DATA) {
        shared -= RESIZE;
        // What is unchanged to users of the format may well change what is stored.
        if perm.contains(UNCHANGED) {
            perm |= WRITE;
        }
        if perm.contains(WRITE) {
            perm |= RESIZE;
        }
    }
    (perm, shared)
}

impl Layer {
    /// What the parents of a node do, and what they all share; `(none, all)` without parents.
    #[must_use]
    pub fn cumulative(&self, node: NodeId) -> (Perm, Perm) {
        self.cumulative_of(&self.node(node))
    }

    pub(super) fn cumulative_of(&self, node: &Node) -> (Perm, Perm) {
        let graph = self.inner.graph.borrow();
        node.parents
            .borrow()
            .iter()
            .fold((Perm::empty(), Perm::all()), |(perm, shared), &e| {
                let edge = graph.edge(e);
                (perm | edge.perm.get(), shared & edge.shared.get())
            })
    }

    /// Masks of an edge with `role` from `parent` to `child`, for these cumulative masks of the parent.
    pub(super) fn child_perm(
        &self,
        parent: &Rc<Node>,
        child: &Node,
        role: Role,
        cum: (Perm, Perm),
    ) -> (Perm, Perm) {
        let (perm, shared) = (parent.facts.child_perm)(&self.cx(parent), role, cum.0, cum.1);
        (
            perm,
            if child.force_share.get() {
                Perm::all()
            } else {
                shared
            },
        )
    }

    /// Changes the masks of a root edge (`bdrv_child_try_set_perm`). Giving something up never fails: if the graph
    /// below cannot follow, the stricter masks stay.
    pub fn set_perm(&self, edge: EdgeId, perm: Perm, shared: Perm) -> Result<(), QmpError> {
        let edge = self.edge(edge);
        let (old_perm, old_shared) = edge.masks();
        let child = edge.child.get().expect("masks are set on an attached edge");
        let mut tran = Tran::default();
        self.set_masks(&edge, perm, shared, &mut tran);
        let result = self.refresh_perms(&[child], &mut tran);
        let result = tran.finish(self, result);
        let asks_more = !(perm - old_perm).is_empty() || !(old_shared - shared).is_empty();
        if asks_more { result } else { Ok(()) }
    }

    /// Recomputes the masks of one edge of a node from the node's users (`bdrv_child_refresh_perms`).
    pub fn refresh_edge_perms(&self, edge: EdgeId) -> Result<(), QmpError> {
        let e = self.edge(edge);
        let Parent::Node(parent) = e.parent else {
            panic!("{e:?} is not the edge of a node")
        };
        let parent = self.node(parent);
        let child = self.child(edge).expect("masks are set on an attached edge");
        let (perm, shared) = self.child_perm(&parent, &child, e.role, self.cumulative_of(&parent));
        self.set_perm(edge, perm, shared)
    }

    /// Recomputes the masks below `starts` and judges them (graph.md 2.4). On an error the caller aborts `tran`.
    pub(super) fn refresh_perms(&self, starts: &[NodeId], tran: &mut Tran) -> Result<(), QmpError> {
        for node in self.topological(starts) {
            self.check_conflicts(&node)?;
            let cum = self.cumulative_of(&node);
            check_writers(&node, cum.0)?;
            tran.tell_driver(&node);
            let children = node.children.borrow().clone();
            for edge in children {
                let edge = self.edge(edge);
                let child = self.node(edge.child.get().expect("a listed child edge has a child"));
                let (perm, shared) = self.child_perm(&node, &child, edge.role, cum);
                self.set_masks(&edge, perm, shared, tran);
            }
        }
        Ok(())
    }

    /// Everything reachable from `starts`, each node before all its descendants.
    fn topological(&self, starts: &[NodeId]) -> Vec<Rc<Node>> {
        let walk = self.new_walk();
        let mut post_order = Vec::new();
        for &start in starts {
            self.visit(self.node(start), walk, &mut post_order);
        }
        post_order.reverse();
        post_order
    }

    fn visit(&self, node: Rc<Node>, walk: u32, post_order: &mut Vec<Rc<Node>>) {
        if node.mark.replace(walk) == walk {
            return;
        }
        for &edge in node.children.borrow().iter() {
            if let Some(child) = self.child(edge) {
                self.visit(child, walk, post_order);
            }
        }
        post_order.push(node);
    }

    /// Refuses if one parent does what another does not share; the first pair in list order.
    fn check_conflicts(&self, node: &Node) -> Result<(), QmpError> {
        let graph = self.inner.graph.borrow();
        let parents = node.parents.borrow();
        for &a in parents.iter() {
            for &b in parents.iter().filter(|&&b| b != a) {
                let (a, b) = (graph.edge(a), graph.edge(b));
                let conflict = b.perm.get() - a.shared.get();
                if !conflict.is_empty() {
                    let (a, b) = (Rc::clone(a), Rc::clone(b));
                    drop(graph);
                    return Err(self.conflict_error(node, &a, &b, conflict));
                }
            }
        }
        Ok(())
    }

    fn conflict_error(&self, node: &Node, a: &Edge, b: &Edge, conflict: Perm) -> QmpError {
        let (name, bits) = (&node.name, conflict.names());
        let (a_who, b_who) = (self.describe_parent(a), self.describe_parent(b));
        QmpError::generic(format!(
            "Permission conflict on node '{name}': permissions '{bits}' are both required by {b_who} \
             (uses node '{name}' as '{}' child) and unshared by {a_who} (uses node '{name}' as '{}' child).",
            b.name, a.name
        ))
    }

    /// Who is above an edge, as error texts say it (graph.md 1.5).
    #[must_use]
    pub fn describe_parent(&self, edge: &Edge) -> String {
        match edge.parent {
            Parent::Node(parent) => format!("node '{}'", self.node(parent).name),
            Parent::Backend(_) | Parent::Job(_) => edge.hooks.as_ref().expect("hooks").describe(),
        }
    }
}

/// Whether the node can bear writers at all (graph.md 2.4, steps 3 and 4).
fn check_writers(node: &Node, perm: Perm) -> Result<(), QmpError> {
    if !perm.intersects(WRITE | UNCHANGED) {
        return Ok(());
    }
    if !node.is_writable_after_reopen() {
        return Err(QmpError::generic(if node.is_writable() {
            format!(
                "Read-only block node '{}' cannot support read-write users",
                node.name
            )
        } else {
            "Block node is read-only".into()
        }));
    }
    let align = node.io.limits.get().request_alignment;
    if !perm.contains(RESIZE) && align > 1 && !node.length().is_multiple_of(align) {
        return Err(QmpError::generic(
            "Cannot get 'write' permission without 'resize': Image size is not a multiple of request alignment",
        ));
    }
    Ok(())
}
