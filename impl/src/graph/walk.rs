//! Walks along chains and over the graph (graph.md 1.9), and the names error texts use.
//!
//! Rules: a walk never waits and never changes anything; on a quiet graph its answer is stable, otherwise the caller
//! holds the graph read lock or the main lock. `raw` and formats end a walk over filters, whatever they forward.

use std::rc::Rc;

use crate::Layer;
use crate::event::Parent;
use crate::graph::node::Node;
use crate::types::{EdgeId, NodeId};

impl Node {
    /// The backing link of a node that is not a filter.
    #[must_use]
    pub fn cow_child_edge(&self) -> Option<EdgeId> {
        if self.facts.is_filter {
            None
        } else {
            self.backing.get()
        }
    }

    /// The link of a filter to the node whose content it presents.
    #[must_use]
    pub fn filter_child_edge(&self) -> Option<EdgeId> {
        if !self.facts.is_filter {
            return None;
        }
        let (file, backing) = (self.file.get(), self.backing.get());
        assert!(
            file.is_none() || backing.is_none(),
            "{self:?} has two filtered children"
        );
        backing.or(file)
    }

    /// The link along the chain: a filter's child or a backing file.
    #[must_use]
    pub fn filter_or_cow_edge(&self) -> Option<EdgeId> {
        if self.facts.is_filter {
            self.filter_child_edge()
        } else {
            self.backing.get()
        }
    }
}

impl Layer {
    /// The backing link of a node that is not a filter.
    #[must_use]
    pub fn cow_child_edge(&self, node: NodeId) -> Option<EdgeId> {
        self.node(node).cow_child_edge()
    }

    /// The link of a filter to its filtered child.
    #[must_use]
    pub fn filter_child_edge(&self, node: NodeId) -> Option<EdgeId> {
        self.node(node).filter_child_edge()
    }

    /// The link along the chain: a filter's child or a backing file.
    #[must_use]
    pub fn filter_or_cow_edge(&self, node: NodeId) -> Option<EdgeId> {
        self.node(node).filter_or_cow_edge()
    }

    fn below(&self, edge: Option<EdgeId>) -> Option<NodeId> {
        edge.and_then(|e| self.inner.graph.borrow().edge(e).child.get())
    }

    /// The backing node.
    #[must_use]
    pub fn cow(&self, node: NodeId) -> Option<NodeId> {
        self.below(self.cow_child_edge(node))
    }

    /// The next node along the chain, filters included.
    #[must_use]
    pub fn filter_or_cow(&self, node: NodeId) -> Option<NodeId> {
        self.below(self.filter_or_cow_edge(node))
    }

    /// The first node from here down that is not a filter.
    ///
    /// # Panics
    /// On a filter that lost its child: only its dropper may hold it.
    #[must_use]
    pub fn skip_filters(&self, node: NodeId) -> NodeId {
        self.skip(node, |_| true)
    }

    /// As `skip_filters`, but stops at filters a user asked for.
    #[must_use]
    pub fn skip_implicit_filters(&self, node: NodeId) -> NodeId {
        self.skip(node, |n| n.implicit.get())
    }

    fn skip(&self, mut node: NodeId, which: impl Fn(&Node) -> bool) -> NodeId {
        loop {
            let n = self.node(node);
            if !n.facts.is_filter || !which(&n) {
                return node;
            }
            node = self
                .below(n.filter_child_edge())
                .unwrap_or_else(|| panic!("{n:?} is a filter without child"));
        }
    }

    /// The next image below, filters skipped on both sides.
    #[must_use]
    pub fn backing_chain_next(&self, node: NodeId) -> Option<NodeId> {
        self.cow(self.skip_filters(node)).map(|n| self.skip_filters(n))
    }

    /// Whether `base` is met on the chain from `top` down, `top` included.
    #[must_use]
    pub fn chain_contains(&self, top: NodeId, base: NodeId) -> bool {
        let mut at = Some(top);
        while let Some(node) = at {
            if node == base {
                return true;
            }
            at = self.filter_or_cow(node);
        }
        false
    }

    /// The image right above `node`'s image in the chain of `active`. `None` for `node` finds the bottommost image.
    #[must_use]
    pub fn find_overlay(&self, active: NodeId, node: Option<NodeId>) -> Option<NodeId> {
        let wanted = node.map(|n| self.skip_filters(n));
        let mut at = Some(self.skip_filters(active));
        while let Some(image) = at {
            let next = self.backing_chain_next(image);
            if next == wanted {
                return Some(image);
            }
            at = next;
        }
        None
    }

    /// The bottommost image of the chain.
    #[must_use]
    pub fn find_base(&self, node: NodeId) -> NodeId {
        self.find_overlay(node, None).expect("a chain has an end")
    }

    /// Whether `to` can be reached from `from` over any children, including `from == to`.
    #[must_use]
    pub fn reachable(&self, from: NodeId, to: NodeId) -> bool {
        let walk = self.new_walk();
        self.reachable_in(walk, from, to)
    }

    fn reachable_in(&self, walk: u32, from: NodeId, to: NodeId) -> bool {
        if from == to {
            return true;
        }
        let node = self.node(from);
        if node.mark.replace(walk) == walk {
            return false;
        }
        node.children.borrow().iter().any(|&e| {
            self.below(Some(e))
                .is_some_and(|c| self.reachable_in(walk, c, to))
        })
    }

    /// A number no node is marked with yet.
    pub(crate) fn new_walk(&self) -> u32 {
        let graph = self.inner.graph.borrow();
        graph.walk.set(graph.walk.get() + 1);
        graph.walk.get()
    }

    /// Whether only backends are above (nobody counts as well).
    #[must_use]
    pub fn is_root_node(&self, node: NodeId) -> bool {
        let node = self.node(node);
        let graph = self.inner.graph.borrow();
        node.parents
            .borrow()
            .iter()
            .all(|&e| matches!(graph.edge(e).parent, Parent::Backend(_)))
    }

    /// Whether a backend is attached directly.
    #[must_use]
    pub fn has_backend(&self, node: NodeId) -> bool {
        let node = self.node(node);
        let graph = self.inner.graph.borrow();
        node.parents
            .borrow()
            .iter()
            .any(|&e| matches!(graph.edge(e).parent, Parent::Backend(_)))
    }

    /// What error texts call a node: the name of the first named backend above, else its node-name.
    #[must_use]
    pub fn device_or_node_name(&self, node: &Node) -> Rc<str> {
        for &edge in node.parents.borrow().iter() {
            let name = self.edge(edge).hooks.as_ref().and_then(|h| h.name());
            if let Some(name) = name.filter(|n| !n.is_empty()) {
                return name;
            }
        }
        Rc::clone(&node.name)
    }
}
