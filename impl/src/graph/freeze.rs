//! Freezing chain links (graph.md 3): a frozen link can be neither moved nor removed.
//!
//! Rules: a range [top, base) covers the links *from* its nodes, the one into base included. All or nothing. Whoever
//! froze a range thaws the same range; the freeze itself guarantees that it is still the same chain.

use std::rc::Rc;

use crate::Layer;
use crate::error::QmpError;
use crate::event::Event;
use crate::graph::edge::Edge;
use crate::graph::node::Node;
use crate::types::NodeId;

impl Layer {
    /// The links from every node of [top, base), from the top; `None` as base: to the end of the chain.
    ///
    /// # Panics
    /// When base is not below top: a bug of the caller (QEMU would loop forever).
    fn chain_links(&self, top: NodeId, base: Option<NodeId>) -> Vec<(Rc<Node>, Rc<Edge>)> {
        let mut links = Vec::new();
        let mut at = top;
        while Some(at) != base {
            let node = self.node(at);
            let Some(edge) = node.filter_or_cow_edge() else {
                assert!(base.is_none(), "{base:?} is not in the chain of {top:?}");
                break;
            };
            let edge = self.edge(edge);
            at = edge.child.get().expect("a chain link has a child");
            links.push((node, edge));
        }
        links
    }

    /// Freezes the links of [top, base).
    pub fn freeze_chain(&self, top: NodeId, base: Option<NodeId>) -> Result<(), QmpError> {
        let links = self.chain_links(top, base);
        let child = |edge: &Edge| self.node(edge.child.get().expect("a chain link has a child"));
        for (node, edge) in &links {
            if edge.frozen.get() {
                let (link, to) = (&edge.name, child(edge));
                let text = format!(
                    "Cannot change '{link}' link from '{}' to '{}'",
                    node.name, to.name
                );
                return Err(QmpError::generic(text));
            }
        }
        for (_, edge) in &links {
            let to = child(edge);
            if to.never_freeze.get() {
                return Err(QmpError::generic(format!(
                    "Cannot freeze '{}' link to '{}'",
                    edge.name, to.name
                )));
            }
        }
        for (_, edge) in &links {
            assert!(
                edge.frozen.try_freeze(),
                "freeze in the middle of a change of {edge:?}"
            );
            self.emit(|| Event::Frozen { edge: edge.id });
        }
        Ok(())
    }

    /// Thaws the links of [top, base).
    ///
    /// # Panics
    /// When one of them is not frozen.
    pub fn unfreeze_chain(&self, top: NodeId, base: Option<NodeId>) {
        for (_, edge) in self.chain_links(top, base) {
            assert!(edge.frozen.get(), "{edge:?} is not frozen");
            edge.frozen.thaw();
            self.emit(|| Event::Unfrozen { edge: edge.id });
        }
    }
}
