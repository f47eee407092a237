//! Graph changes that can be taken back: the log of a transaction and the primitives that write it.
//!
//! Rules (graph.md 4.1): commit and abort run the log backwards. An abort restores edges, masks, slots, blockers and the
//! order of every list; only identifiers stay used. Nothing here waits, and no request moves: a link is retargeted
//! only while its parent is quiesced, and the parent is released after the new child is attached.

use std::rc::Rc;

use crate::Layer;
use crate::error::QmpError;
use crate::event::{Event, Parent};
use crate::graph::edge::{Edge, ParentHooks};
use crate::graph::node::{Blocker, Node};
use crate::types::{EdgeId, NodeId, Perm, Role};

/// A graph change in progress. It is finished by [`Tran::finish`] or one of its halves, never dropped.
#[derive(Debug, Default)]
#[must_use]
pub(super) struct Tran {
    log: Vec<Action>,
}

#[derive(Debug)]
enum Action {
    /// Masks were written.
    Masks {
        edge: Rc<Edge>,
        perm: Perm,
        shared: Perm,
    },
    /// On commit the driver learns the cumulative masks of its node.
    TellDriver(Rc<Node>),
    /// An existing edge was pointed elsewhere, or at nothing.
    Retarget {
        edge: Rc<Edge>,
        old: NodeId,
        new: Option<NodeId>,
        before: Vec<Lists>,
    },
    /// An edge was made.
    Create {
        edge: Rc<Edge>,
        child: NodeId,
        before: Vec<Lists>,
    },
    /// `inherits_from` was changed.
    Inherits { node: Rc<Node>, old: Option<NodeId> },
}

/// What linking changes on a node, to put it back exactly.
#[derive(Debug)]
struct Lists {
    node: Rc<Node>,
    parents: Vec<EdgeId>,
    children: Vec<EdgeId>,
    file: Option<EdgeId>,
    backing: Option<EdgeId>,
    blockers: Vec<Blocker>,
}

impl Lists {
    fn save(node: Rc<Node>) -> Lists {
        let (parents, children) = (node.parents.borrow().clone(), node.children.borrow().clone());
        let (file, backing, blockers) = (
            node.file.get(),
            node.backing.get(),
            node.blockers.borrow().clone(),
        );
        Lists {
            node,
            parents,
            children,
            file,
            backing,
            blockers,
        }
    }

    fn restore(self) {
        // The same links, in the order they had.
        assert_eq!(
            self.parents.len(),
            self.node.parents.borrow().len(),
            "{:?}",
            self.node
        );
        assert_eq!(
            self.children.len(),
            self.node.children.borrow().len(),
            "{:?}",
            self.node
        );
        self.node.parents.replace(self.parents);
        self.node.children.replace(self.children);
        self.node.blockers.replace(self.blockers);
        self.node.file.set(self.file);
        self.node.backing.set(self.backing);
    }
}

impl Tran {
    /// Has the driver told of its node's cumulative masks at commit.
    pub(super) fn tell_driver(&mut self, node: &Rc<Node>) {
        self.log.push(Action::TellDriver(Rc::clone(node)));
    }

    /// Commits on success, aborts on failure; hands the result through.
    pub(super) fn finish<T>(self, layer: &Layer, result: Result<T, QmpError>) -> Result<T, QmpError> {
        match result {
            Ok(_) => self.commit(layer),
            Err(_) => self.abort(layer),
        }
        result
    }

    /// What was changed stays.
    pub(super) fn commit(self, layer: &Layer) {
        self.log.into_iter().rev().for_each(|action| layer.commit(action));
    }

    /// Everything is as it was.
    pub(super) fn abort(self, layer: &Layer) {
        self.log.into_iter().rev().for_each(|action| layer.abort(action));
    }
}

impl Layer {
    fn commit(&self, action: Action) {
        match action {
            Action::Masks { .. } | Action::Create { .. } | Action::Inherits { .. } => {}
            Action::TellDriver(node) => {
                if let Some(driver) = node.driver_opt() {
                    let (perm, shared) = self.cumulative_of(&node);
                    driver.set_perm(&self.cx(&node), perm, shared);
                }
            }
            Action::Retarget { edge, old, new, .. } => {
                if new.is_none() {
                    self.forget_edge(&edge);
                }
                self.unhold(old);
            }
        }
    }

    fn abort(&self, action: Action) {
        match action {
            Action::TellDriver(_) => {}
            Action::Masks { edge, perm, shared } => self.write_masks(&edge, perm, shared),
            Action::Inherits { node, old } => node.inherits_from.set(old),
            Action::Retarget {
                edge,
                old,
                new,
                before,
            } => {
                if edge.child.get().is_none() && !edge.quiesced_parent.get() {
                    // Detaching released the parent; through an empty edge it cannot have begun anything.
                    self.quiesce_parent(&edge);
                }
                self.point(&edge, Some(old));
                before.into_iter().for_each(Lists::restore);
                if let Some(new) = new {
                    self.unhold(new);
                }
            }
            Action::Create { edge, child, before } => {
                self.point(&edge, None);
                before.into_iter().for_each(Lists::restore);
                self.forget_edge(&edge);
                self.unhold(child);
            }
        }
    }

    /// Writes masks, remembering the old ones.
    pub(super) fn set_masks(&self, edge: &Rc<Edge>, perm: Perm, shared: Perm, tran: &mut Tran) {
        let (old_perm, old_shared) = edge.masks();
        if (old_perm, old_shared) != (perm, shared) {
            tran.log.push(Action::Masks {
                edge: Rc::clone(edge),
                perm: old_perm,
                shared: old_shared,
            });
            self.write_masks(edge, perm, shared);
        }
    }

    fn write_masks(&self, edge: &Edge, perm: Perm, shared: Perm) {
        edge.perm.set(perm);
        edge.shared.set(shared);
        self.emit(|| Event::EdgePerms {
            edge: edge.id,
            perm,
            shared,
        });
    }

    /// Points an edge at another node, both drained (`bdrv_replace_child_tran`).
    pub(super) fn retarget(&self, edge: &Rc<Edge>, new: NodeId, tran: &mut Tran) {
        let to = self.node(new);
        assert!(
            edge.quiesced_parent.get(),
            "{edge:?} is moved while its parent is active"
        );
        assert!(
            to.quiesce_counter.get() > 0,
            "{edge:?} is moved to {to:?}, which is not drained"
        );
        let old = edge.child.get().expect("only attached edges are moved");
        let before = self.save_around(edge, &[old, new]);
        self.hold(new);
        self.point(edge, Some(new));
        tran.log.push(Action::Retarget {
            edge: Rc::clone(edge),
            old,
            new: Some(new),
            before,
        });
    }

    /// Removes an edge whose child is drained (`bdrv_remove_child`); it is gone at commit.
    pub(super) fn remove_edge(&self, edge: &Rc<Edge>, tran: &mut Tran) {
        assert!(
            edge.quiesced_parent.get(),
            "{edge:?} is removed while its parent is active"
        );
        let old = edge.child.get().expect("only attached edges are removed");
        let before = self.save_around(edge, &[old]);
        self.point(edge, None);
        tran.log.push(Action::Retarget {
            edge: Rc::clone(edge),
            old,
            new: None,
            before,
        });
    }

    /// Makes an edge with these masks (`bdrv_attach_child_common`). The parent is quiesced for a moment, and stays so
    /// if the child is drained. Takes a reference on the child.
    #[expect(clippy::too_many_arguments, reason = "an edge has this many properties")]
    pub(super) fn create_edge(
        &self,
        parent: Parent,
        child: NodeId,
        name: &str,
        role: Role,
        (perm, shared): (Perm, Perm),
        hooks: Option<Rc<dyn ParentHooks>>,
        tran: &mut Tran,
    ) -> Rc<Edge> {
        assert_eq!(
            hooks.is_none(),
            matches!(parent, Parent::Node(_)),
            "nodes have no hooks, all others do"
        );
        let edge = {
            let mut graph = self.inner.graph.borrow_mut();
            let edge = Rc::new(Edge {
                id: graph.next_edge_id(),
                name: name.into(),
                parent,
                role,
                child: None.into(),
                perm: perm.into(),
                shared: shared.into(),
                frozen: Default::default(),
                quiesced_parent: false.into(),
                hooks,
            });
            graph.edges.push(Some(Rc::clone(&edge)));
            edge
        };
        let before = self.save_around(&edge, &[child]);
        self.hold(child);
        self.quiesce_parent(&edge);
        self.point(&edge, Some(child));
        self.emit(|| Event::EdgePerms {
            edge: edge.id,
            perm,
            shared,
        });
        tran.log.push(Action::Create {
            edge: Rc::clone(&edge),
            child,
            before,
        });
        edge
    }

    /// Changes `inherits_from`.
    pub(super) fn set_inherits_from(&self, node: &Rc<Node>, from: Option<NodeId>, tran: &mut Tran) {
        let old = node.inherits_from.replace(from);
        tran.log.push(Action::Inherits {
            node: Rc::clone(node),
            old,
        });
    }

    fn save_around(&self, edge: &Edge, children: &[NodeId]) -> Vec<Lists> {
        let parent = match edge.parent {
            Parent::Node(parent) => Some(parent),
            Parent::Backend(_) | Parent::Job(_) => None,
        };
        children
            .iter()
            .copied()
            .chain(parent)
            .map(|n| Lists::save(self.node(n)))
            .collect()
    }

    /// The end of an edge's identity.
    pub(super) fn forget_edge(&self, edge: &Edge) {
        assert!(
            edge.child.get().is_none() && !edge.frozen.get(),
            "{edge:?} is still in use"
        );
        self.inner.graph.borrow_mut().edges[edge.id.0 as usize] = None;
    }

    /// Points an edge at `new`, or at nothing (`bdrv_replace_child_noperm`): no masks, no references, no undo.
    ///
    /// # Panics
    /// When the link is frozen, or when it gets a child while its parent is active.
    pub(super) fn point(&self, edge: &Rc<Edge>, new: Option<NodeId>) {
        assert!(edge.frozen.try_change(), "{edge:?} is frozen");
        assert!(
            new.is_none() || edge.quiesced_parent.get(),
            "{edge:?} gets a child while its parent is active"
        );
        let from = edge.child.get();
        assert_ne!(from, new, "{edge:?}");
        if let Some(old) = from {
            self.unlink(edge, &self.node(old));
        }
        edge.child.set(new);
        let now = new.map(|n| self.node(n));
        if let Some(now) = &now {
            self.link(edge, now);
        }
        edge.frozen.changed();
        self.emit(|| Event::EdgeSet {
            edge: edge.id,
            parent: edge.parent,
            role: edge.role,
            from,
            to: new,
        });
        // Only now: the parent may go on at once, and must then see the new child.
        if edge.quiesced_parent.get() && now.is_none_or(|n| n.quiesce_counter.get() == 0) {
            self.unquiesce_parent(edge);
        }
    }

    fn unlink(&self, edge: &Edge, child: &Node) {
        child.parents.borrow_mut().retain(|&e| e != edge.id);
        child.blockers.borrow_mut().retain(|b| b.edge != edge.id);
        let Parent::Node(parent) = edge.parent else { return };
        let parent = self.node(parent);
        parent.children.borrow_mut().retain(|&e| e != edge.id);
        for slot in [&parent.file, &parent.backing] {
            if slot.get() == Some(edge.id) {
                slot.set(None);
            }
        }
    }

    /// Lists grow at the head; the slot follows from driver and role (graph.md 1.4).
    fn link(&self, edge: &Edge, child: &Node) {
        child.parents.borrow_mut().insert(0, edge.id);
        let Parent::Node(parent) = edge.parent else { return };
        let parent = self.node(parent);
        parent.children.borrow_mut().insert(0, edge.id);
        let (role, primary) = (edge.role, edge.role.contains(Role::PRIMARY));
        if parent.facts.is_filter || role.contains(Role::FILTERED) {
            assert!(!role.contains(Role::COW), "a filter has no backing file");
            assert_eq!(primary, role.contains(Role::FILTERED), "{edge:?}: {role:?}");
            if primary {
                assert!(
                    parent.file.get().is_none() && parent.backing.get().is_none(),
                    "{parent:?} has a child already"
                );
                parent.file.set(Some(edge.id));
            }
        } else if role.contains(Role::COW) {
            assert!(parent.facts.supports_backing && !primary, "{edge:?}: {role:?}");
            assert!(
                parent.backing.get().is_none(),
                "{parent:?} has a backing file already"
            );
            parent.backing.set(Some(edge.id));
            self.block_backing(child, edge, &parent);
        } else if primary {
            assert!(parent.file.get().is_none(), "{parent:?} has a file already");
            parent.file.set(Some(edge.id));
        }
    }
}
