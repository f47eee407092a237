//! Ways through the graph: filters, chains, what is below what.
//!
//! Rules: a chain is followed through filter children and backing children only; the `raw` format forwards but is no
//! filter, so a chain ends there. A filter that lost its child (a finished stream's) is the end of its chain.

use crate::graph::{EdgeId, Graph, NodeId, Parent};
use crate::perm::Role;

impl Graph {
    fn child_with(&self, id: NodeId, role: Role) -> Option<EdgeId> {
        self.children(id)
            .find(|(_, edge)| edge.role.contains(role))
            .map(|(id, _)| id)
    }

    /// The main child.
    #[must_use]
    pub fn primary_child(&self, id: NodeId) -> Option<NodeId> {
        self.child_with(id, Role::PRIMARY).map(|e| self.edge(e).child)
    }

    /// The link to the backing node.
    #[must_use]
    pub fn cow_link(&self, id: NodeId) -> Option<EdgeId> {
        self.child_with(id, Role::COW)
    }

    /// The backing node.
    #[must_use]
    pub fn cow_child(&self, id: NodeId) -> Option<NodeId> {
        self.cow_link(id).map(|e| self.edge(e).child)
    }

    /// The node that a filter filters.
    #[must_use]
    pub fn filter_child(&self, id: NodeId) -> Option<NodeId> {
        self.chain_link(id)
            .filter(|_| self.node(id).driver.is_filter())
            .map(|e| self.edge(e).child)
    }

    /// The one link by which a chain goes on below a node.
    #[must_use]
    pub fn chain_link(&self, id: NodeId) -> Option<EdgeId> {
        if self.node(id).driver.is_filter() {
            self.child_with(id, Role::FILTERED)
        } else {
            self.cow_link(id)
        }
    }

    /// The next node of the chain, filter or not.
    #[must_use]
    pub fn chain_child(&self, id: NodeId) -> Option<NodeId> {
        self.chain_link(id).map(|e| self.edge(e).child)
    }

    /// The node itself and everything below it in its chain, filters included.
    pub fn chain(&self, top: NodeId) -> impl Iterator<Item = NodeId> {
        std::iter::successors(Some(top), |id| self.chain_child(*id))
    }

    /// The first node at or below that is no filter.
    #[must_use]
    pub fn skip_filters(&self, id: NodeId) -> NodeId {
        std::iter::successors(Some(id), |id| self.filter_child(*id))
            .last()
            .expect("starts with the node itself")
    }

    /// The next layer below: past filters, down one backing link, past filters.
    #[must_use]
    pub fn backing_chain_next(&self, id: NodeId) -> Option<NodeId> {
        self.cow_child(self.skip_filters(id))
            .map(|below| self.skip_filters(below))
    }

    /// `base` is in the chain of `top`, or is `top`.
    #[must_use]
    pub fn chain_contains(&self, top: NodeId, base: NodeId) -> bool {
        self.chain(top).any(|id| id == base)
    }

    /// The layer directly above `below` in the chain of `active`; the last layer when `below` is none.
    #[must_use]
    pub fn find_overlay(&self, active: NodeId, below: Option<NodeId>) -> Option<NodeId> {
        let below = below.map(|id| self.skip_filters(id));
        std::iter::successors(Some(self.skip_filters(active)), |id| self.backing_chain_next(*id))
            .find(|id| self.backing_chain_next(*id) == below)
    }

    /// The last layer of a chain.
    #[must_use]
    pub fn find_base(&self, id: NodeId) -> NodeId {
        self.find_overlay(id, None).expect("every chain ends")
    }

    /// `below` can be reached from `from` over any children, or is it.
    #[must_use]
    pub fn reaches(&self, from: NodeId, below: NodeId) -> bool {
        from == below
            || self
                .children(from)
                .any(|(_, edge)| self.reaches(edge.child, below))
    }

    /// The edge belongs to the node or to something below it.
    #[must_use]
    pub fn edge_is_below(&self, edge: EdgeId, id: NodeId) -> bool {
        matches!(self.edge(edge).parent, Parent::Node(parent) if self.reaches(id, parent))
    }

    /// The given nodes and everything below them, parents always before their children.
    #[must_use]
    pub fn topological(&self, starts: impl IntoIterator<Item = NodeId>) -> Vec<NodeId> {
        fn visit(graph: &Graph, id: NodeId, children_first: &mut Vec<NodeId>) {
            if children_first.contains(&id) {
                return;
            }
            for (_, edge) in graph.children(id) {
                visit(graph, edge.child, children_first);
            }
            children_first.push(id);
        }
        let mut order = Vec::new();
        for start in starts {
            visit(self, start, &mut order);
        }
        order.reverse();
        order
    }
}
