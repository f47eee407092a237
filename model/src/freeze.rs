//! Frozen links: parts of a chain that nobody may change while a filter relies on them.
//!
//! Rules: a link has at most one freezer, and here a freezer is always a copy-on-read filter with a `bottom`: it
//! freezes every link from itself down to and including the one into `bottom`, from its opening until it is dropped
//! or closed. Freezing is all or nothing.

use crate::graph::{EdgeId, Graph, NodeId};
use crate::refusal::Refusal;

impl Graph {
    /// The chain links from `top` down to the one into `base`, or to the end of the chain.
    #[must_use]
    pub fn links(&self, top: NodeId, base: Option<NodeId>) -> Vec<EdgeId> {
        self.chain(top)
            .take_while(|id| Some(*id) != base)
            .filter_map(|id| self.chain_link(id))
            .collect()
    }

    /// Whether the links from `top` to `base` may be frozen.
    ///
    /// # Errors
    /// The first one that is frozen already.
    pub fn check_freezable(&self, top: NodeId, base: Option<NodeId>) -> Result<(), Refusal> {
        for id in self.chain(top).take_while(|id| Some(*id) != base) {
            let Some(link) = self.chain_link(id) else { break };
            let edge = self.edge(link);
            if edge.frozen_by.is_some() {
                let (parent, child) = (self.name(id), self.name(edge.child));
                return Err(Refusal::new(format!(
                    "Cannot change '{}' link from '{parent}' to '{child}'",
                    edge.name
                )));
            }
        }
        Ok(())
    }

    /// Freezes the chain from a filter down to its bottom.
    ///
    /// # Errors
    /// A link is frozen already; nothing has been frozen.
    pub fn freeze(&mut self, filter: NodeId, bottom: NodeId) -> Result<(), Refusal> {
        assert!(
            self.chain_contains(filter, bottom),
            "a frozen range is a part of a chain"
        );
        self.check_freezable(filter, Some(bottom))?;
        for link in self.links(filter, Some(bottom)) {
            self.edge_mut(link).frozen_by = Some(filter);
        }
        Ok(())
    }

    /// Thaws everything that a filter froze; nothing if it froze nothing.
    pub fn unfreeze(&mut self, filter: NodeId) {
        let links: Vec<EdgeId> = self
            .edges()
            .filter(|(_, edge)| edge.frozen_by == Some(filter))
            .map(|(id, _)| id)
            .collect();
        for link in links {
            self.edge_mut(link).frozen_by = None;
        }
    }
}
