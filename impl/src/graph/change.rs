//! The operations that change links (graph.md 4): attach, detach, backing, append, replace, drop.
//!
//! Rules: each is all or nothing; a refusal leaves links, masks, blockers, references and list orders as they were. The
//! async ones drain what they move and take the graph write lock themselves, so their caller holds neither a read
//! lock nor a request; all are called by main-context operations only. No one compares sizes or asks op blockers.

use std::rc::Rc;

use super::tran::Tran;
use crate::Layer;
use crate::error::QmpError;
use crate::event::Parent;
use crate::graph::edge::{Edge, ParentHooks};
use crate::graph::node::Node;
use crate::types::{EdgeId, NodeId, Perm, Role};

/// A backing link that was replaced, and can still come back.
#[derive(Debug)]
#[must_use]
pub(crate) struct Replaced {
    node: NodeId,
    link: Tran,
    /// What the old backing node's masks became without it.
    masks: Tran,
}

impl Layer {
    /// Attaches `child` below `parent`. Takes its own reference on the child.
    pub fn attach_child(
        &self,
        parent: &Rc<Node>,
        child: NodeId,
        name: &str,
        role: Role,
    ) -> Result<EdgeId, QmpError> {
        let mut tran = Tran::default();
        let result = self.attach_noperm(parent, child, name, role, &mut tran);
        let result = result.and_then(|edge| self.refresh_perms(&[parent.id], &mut tran).map(|()| edge.id));
        tran.finish(self, result)
    }

    /// Attaches a backend or a job above `child`. Takes its own reference on the child. `hooks` lives as long as the edge.
    pub fn attach_root(
        &self,
        parent: Parent,
        child: NodeId,
        name: &str,
        perm: Perm,
        shared: Perm,
        hooks: Rc<dyn ParentHooks>,
    ) -> Result<EdgeId, QmpError> {
        let role = match parent {
            Parent::Backend(_) => Role::FILTERED | Role::PRIMARY,
            Parent::Job(_) => Role::empty(),
            Parent::Node(_) => panic!("nodes attach children with attach_child"),
        };
        let mut tran = Tran::default();
        let edge = self.create_edge(parent, child, name, role, (perm, shared), Some(hooks), &mut tran);
        let result = self.refresh_perms(&[child], &mut tran);
        tran.finish(self, result).map(|()| edge.id)
    }

    /// Removes an edge and drops its reference. Masks below are refreshed; if they cannot follow they stay stricter.
    ///
    /// # Panics
    /// When the link is frozen.
    pub fn detach(&self, edge: EdgeId) {
        let edge = self.edge(edge);
        let child = edge.child.get().expect("an edge is detached once");
        let mut tran = Tran::default();
        if let Parent::Node(parent) = edge.parent {
            self.unset_inherits_from(parent, &edge, child, &mut tran);
        }
        let Ok(()) = tran.finish(self, Ok(())) else {
            unreachable!("Ok is handed through")
        };
        self.point(&edge, None);
        self.forget_edge(&edge);
        self.loosen(child);
        self.unhold(child);
    }

    /// Refreshes masks below a node that lost a parent. If the graph cannot follow, stricter masks stay.
    fn loosen(&self, node: NodeId) {
        let mut tran = Tran::default();
        let result = self.refresh_perms(&[node], &mut tran);
        let _stricter_masks_stay = tran.finish(self, result);
    }

    /// Attaches without judging masks; they are the driver's for its present users (`bdrv_attach_child_noperm`).
    fn attach_noperm(
        &self,
        parent: &Rc<Node>,
        child: NodeId,
        name: &str,
        role: Role,
        tran: &mut Tran,
    ) -> Result<Rc<Edge>, QmpError> {
        assert!(
            role.intersects(Role::DATA | Role::METADATA | Role::FILTERED | Role::COW),
            "a child has a role"
        );
        let below = self.node(child);
        if self.reachable(child, parent.id) {
            let text = format!(
                "Making '{}' a {name} child of '{}' would create a cycle",
                below.name, parent.name
            );
            return Err(QmpError::generic(text));
        }
        let masks = self.child_perm(parent, &below, role, self.cumulative_of(parent));
        Ok(self.create_edge(Parent::Node(parent.id), child, name, role, masks, None, tran))
    }

    /// Sets, replaces or removes the backing node. Drains what changes; the new node need not be drained.
    pub async fn set_backing(&self, node: NodeId, backing: Option<NodeId>) -> Result<(), QmpError> {
        let drained = self.drained(self.below_slot(node).unwrap_or(node)).await;
        let write = self.graph_write().await;
        let result = self.set_backing_drained(node, backing);
        drop(write);
        drop(drained);
        result
    }

    fn below_slot(&self, node: NodeId) -> Option<NodeId> {
        let backing = self.node(node).backing.get()?;
        self.edge(backing).child.get()
    }

    /// As [`Layer::set_backing`], for a caller that has drained the node (and its old backing node, if any) and holds
    /// the graph write lock.
    pub fn set_backing_drained(&self, node: NodeId, backing: Option<NodeId>) -> Result<(), QmpError> {
        self.replace_backing_drained(&self.node(node), backing)
            .map(|replaced| self.keep_backing(replaced))
    }

    fn replace_backing_drained(
        &self,
        node: &Rc<Node>,
        backing: Option<NodeId>,
    ) -> Result<Replaced, QmpError> {
        assert!(
            self.graph_write_held(),
            "a backing link is changed without the graph lock"
        );
        assert!(
            node.quiesce_counter.get() > 0,
            "{node:?} gets a backing file while active"
        );
        let old = self.below_slot(node.id);
        let mut link = Tran::default();
        let result = self.set_slot_noperm(node, backing, true, &mut link);
        let result = result.and_then(|()| self.refresh_perms(&[node.id], &mut link));
        if let Err(refused) = result {
            return link.finish(self, Err(refused));
        }
        let mut masks = Tran::default();
        if let Some(old) = old
            && self.refresh_perms(&[old], &mut masks).is_err()
        {
            // Stricter masks stay.
            std::mem::take(&mut masks).abort(self);
        }
        self.refresh_open_limits(node);
        Ok(Replaced {
            node: node.id,
            link,
            masks,
        })
    }

    /// As [`Layer::set_backing`], and the old link can come back: exactly, with whom each node was opened by, and the order of every
    /// list. Until that is decided the caller keeps the node and its old backing node drained, and the main lock.
    pub(crate) async fn replace_backing(
        &self,
        node: NodeId,
        backing: Option<NodeId>,
    ) -> Result<Replaced, QmpError> {
        let drained = self.drained(self.below_slot(node).unwrap_or(node)).await;
        let write = self.graph_write().await;
        let result = self.replace_backing_drained(&self.node(node), backing);
        drop(write);
        drop(drained);
        result
    }

    /// The new link stays.
    pub(crate) fn keep_backing(&self, replaced: Replaced) {
        replaced.link.commit(self);
        replaced.masks.commit(self);
    }

    /// The old link comes back.
    pub(crate) async fn put_back_backing(&self, replaced: Replaced) {
        let Replaced { node, link, masks } = replaced;
        let drained = self.drained(self.below_slot(node).unwrap_or(node)).await;
        let write = self.graph_write().await;
        masks.abort(self);
        link.abort(self);
        self.refresh_open_limits(&self.node(node));
        drop(write);
        drop(drained);
    }

    /// The checks and link changes of `bdrv_set_file_or_backing_noperm` (graph.md 4.2), in its order.
    pub(super) fn set_slot_noperm(
        &self,
        parent: &Rc<Node>,
        child: Option<NodeId>,
        is_backing: bool,
        tran: &mut Tran,
    ) -> Result<(), QmpError> {
        let (name, slot) = if is_backing {
            ("backing", &parent.backing)
        } else {
            ("file", &parent.file)
        };
        let old = slot.get().map(|e| self.edge(e));
        if let Some(old) = old.as_ref().filter(|e| e.frozen.get()) {
            let below = self.child(old.id).expect("a slot has a child");
            let text = format!(
                "Cannot change frozen '{}' link from '{}' to '{}'",
                old.name, parent.name, below.name
            );
            return Err(QmpError::generic(text));
        }
        let facts = parent.facts;
        if is_backing && !facts.is_filter && !facts.supports_backing {
            let text = format!(
                "Driver '{}' of node '{}' does not support backing files",
                facts.name, parent.name
            );
            return Err(QmpError::generic(text));
        }
        let role = match &old {
            _ if facts.is_filter => Role::FILTERED | Role::PRIMARY,
            _ if is_backing => Role::COW,
            Some(old) => old.role,
            None => {
                return Err(QmpError::generic(
                    "Cannot set file child to format node without file child",
                ));
            }
        };
        // Asked before the old link goes: the same child may come back, and still inherits then.
        let heir = child.filter(|child| self.is_heir(parent, *child));
        if let Some(old) = old {
            let below = self.child(old.id).expect("a slot has a child");
            assert!(
                below.quiesce_counter.get() > 0,
                "{old:?} is removed while its child is active"
            );
            self.unset_inherits_from(parent.id, &old, below.id, tran);
            self.remove_edge(&old, tran);
        }
        if let Some(child) = child {
            self.attach_noperm(parent, child, name, role, tran)?;
        }
        if let Some(heir) = heir {
            // From now on it inherits directly.
            self.set_inherits_from(&self.node(heir), Some(parent.id), tran);
        }
        Ok(())
    }

    /// Puts `new` between `top` and the parents of `top`: its backing file, or a filter's child, becomes `top`.
    ///
    /// # Panics
    /// When `new` has a backing file already: its caller checks.
    pub async fn append(&self, new: NodeId, top: NodeId) -> Result<(), QmpError> {
        assert!(
            self.node(new).backing.get().is_none(),
            "an appended node has no backing file"
        );
        let drained = (self.drained(top).await, self.drained(new).await);
        let write = self.graph_write().await;
        let result = self.append_drained(&self.node(new), top);
        self.refresh_open_limits(&self.node(top));
        drop(write);
        drop(drained);
        result
    }

    fn append_drained(&self, new: &Rc<Node>, top: NodeId) -> Result<(), QmpError> {
        let mut tran = Tran::default();
        let result = self.append_in(new, top, &mut tran);
        tran.finish(self, result)?;
        self.refresh_open_limits(new);
        Ok(())
    }

    /// As [`Layer::append`], in a transaction of the caller, who has drained both and holds the graph write lock.
    pub(super) fn append_in(&self, new: &Rc<Node>, top: NodeId, tran: &mut Tran) -> Result<(), QmpError> {
        let role = if new.facts.is_filter {
            Role::FILTERED | Role::PRIMARY
        } else {
            Role::COW
        };
        self.attach_noperm(new, top, "backing", role, tran)?;
        self.replace_noperm(top, new.id, true, tran)?;
        // Only after both: a greedy filter would conflict as a side branch but not in line.
        self.refresh_perms(&[new.id], tran)
    }

    /// Moves the parents of `from` to `to`, except jobs and links that would close a loop (`bdrv_replace_node`).
    pub async fn replace_node(&self, from: NodeId, to: NodeId) -> Result<(), QmpError> {
        let drained = (self.drained(from).await, self.drained(to).await);
        let write = self.graph_write().await;
        let result = self.replace_node_drained(from, to);
        drop(write);
        drop(drained);
        result
    }

    /// As [`Layer::replace_node`], for a caller that has drained both and holds the graph write lock.
    pub fn replace_node_drained(&self, from: NodeId, to: NodeId) -> Result<(), QmpError> {
        self.replace_common(from, to, true, false)
    }

    /// Puts an opened filter whose child is `below` into the chain above it (`bdrv_insert_node`, second half).
    pub async fn insert_node(&self, filter: NodeId, below: NodeId) -> Result<(), QmpError> {
        self.replace_node(below, filter)
            .await
            .map_err(|e| e.prefixed("Could not replace node: "))
    }

    /// Takes a node out of its chain: its parents move to its child, and it loses the link to it. The link must
    /// not be frozen; the caller drops its reference afterwards.
    pub async fn drop_filter(&self, filter: NodeId) -> Result<(), QmpError> {
        let child = self
            .filter_or_cow(filter)
            .expect("a filter that is dropped has a child");
        let drained = self.drained(child).await;
        let write = self.graph_write().await;
        let result = self.replace_common(filter, child, true, true);
        drop(write);
        drop(drained);
        result
    }

    /// `bdrv_replace_node_common` (graph.md 4.4). `detach_subchain`: also cut the last link of `from`'s chain to `to`.
    pub(super) fn replace_common(
        &self,
        from: NodeId,
        to: NodeId,
        auto_skip: bool,
        detach_subchain: bool,
    ) -> Result<(), QmpError> {
        assert!(
            self.graph_write_held(),
            "nodes are replaced without the graph lock"
        );
        for node in [self.node(from), self.node(to)] {
            assert!(
                node.quiesce_counter.get() > 0,
                "{node:?} is replaced while active"
            );
        }
        let last_link = detach_subchain.then(|| self.link_into(from, to));
        let mut tran = Tran::default();
        let mut result = self.replace_noperm(from, to, auto_skip, &mut tran);
        if result.is_ok() {
            if let Some(link) = last_link {
                self.remove_edge(&link, &mut tran);
            }
            result = self.refresh_perms(&[from, to], &mut tran);
        }
        tran.finish(self, result)
    }

    /// The chain link below `top` that points to `to`.
    fn link_into(&self, top: NodeId, to: NodeId) -> Rc<Edge> {
        let mut at = top;
        loop {
            let link = self
                .filter_or_cow_edge(at)
                .unwrap_or_else(|| panic!("{to:?} is not in the chain of {top:?}"));
            let link = self.edge(link);
            at = link.child.get().expect("a chain link has a child");
            if at == to {
                return link;
            }
        }
    }

    fn replace_noperm(
        &self,
        from: NodeId,
        to: NodeId,
        auto_skip: bool,
        tran: &mut Tran,
    ) -> Result<(), QmpError> {
        let old = self.node(from);
        let parents = old.parents.borrow().clone();
        for edge in parents {
            let edge = self.edge(edge);
            if !self.should_update(&edge, to) {
                if auto_skip {
                    continue;
                }
                return Err(QmpError::generic(format!(
                    "Should not change '{}' link to '{}'",
                    edge.name, old.name
                )));
            }
            if edge.frozen.get() {
                return Err(QmpError::generic(format!(
                    "Cannot change '{}' link to '{}'",
                    edge.name, old.name
                )));
            }
            self.retarget(&edge, to, tran);
        }
        Ok(())
    }

    /// Whether a parent link follows its node to `to`. Jobs never do; a link of `to` or of one of its descendants
    /// would close a loop.
    fn should_update(&self, edge: &Edge, to: NodeId) -> bool {
        match edge.parent {
            Parent::Job(_) => false,
            Parent::Backend(_) => true,
            Parent::Node(parent) => !self.reachable(to, parent),
        }
    }

    /// Limits follow the children; a node that is not open yet gets its limits at the end of open.
    pub(super) fn refresh_open_limits(&self, node: &Node) {
        if node.driver_opt().is_some() {
            let _unchanged_on_error = self.refresh_limits(node.id);
        }
    }

    /// `root` loses `edge` to `child`: what was opened inline below it is on its own now (graph.md 1.11).
    fn unset_inherits_from(&self, root: NodeId, edge: &Edge, child: NodeId, tran: &mut Tran) {
        let below = self.node(child);
        if below.inherits_from.get() == Some(root) {
            let root = self.node(root);
            let other = root
                .children
                .borrow()
                .iter()
                .any(|&e| e != edge.id && self.edge(e).child.get() == Some(child));
            if !other {
                self.set_inherits_from(&below, None, tran);
            }
        }
        let children = below.children.borrow().clone();
        for child in children.into_iter().filter_map(|e| self.child(e)) {
            self.unset_inherits_from(root, edge, child.id, tran);
        }
    }

    /// Whether a node inherits from `parent`, directly or over others.
    fn is_heir(&self, parent: &Node, child: NodeId) -> bool {
        let mut at = Some(self.node(child));
        while let Some(node) = at {
            let Some(from) = node.inherits_from.get() else {
                return false;
            };
            if from == parent.id {
                return true;
            }
            at = self.inner.graph.borrow().try_node(from).cloned();
        }
        false
    }
}
