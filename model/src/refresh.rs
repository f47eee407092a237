//! Masks over a whole graph: cumulative masks, conflicts, refresh after a change, recomputation from scratch.
//!
//! Rules: parents are judged before their children, with their new masks ([`Graph::refresh`]); a refused refresh
//! leaves the graph half changed, so callers work on a copy. [`Graph::masks_from_scratch`] never looks at the masks
//! on node-to-node edges, so it can be held against them.

use std::collections::BTreeMap;

use crate::graph::{Edge, EdgeId, Graph, NodeId, Parent};
use crate::perm::{Driver, Masks, Perm, Role, child_masks, kept_masks};
use crate::refusal::Refusal;

impl Graph {
    /// Cumulative masks of a node's parents.
    #[must_use]
    pub fn cumulative(&self, id: NodeId) -> Masks {
        Masks::cumulative(self.parents(id).map(|(_, edge)| edge.masks))
    }

    /// The masks that a node whose parents have `cum` puts on this child edge.
    fn masks_below(&self, parent: NodeId, edge: &Edge, cum: Masks) -> Masks {
        let node = self.node(parent);
        let mut masks = child_masks(node.driver, edge.role, node.writable, cum);
        // A filter that nobody uses keeps nothing.
        let keeps = node.driver == Driver::CopyBeforeWrite && edge.role.contains(Role::FILTERED);
        if keeps && !node.parents.is_empty() {
            masks = kept_masks(masks, node.kept.as_ref().is_some_and(|kept| kept.discards_source));
        }
        if self.node(edge.child).force_share {
            Masks::new(masks.perm, Perm::all())
        } else {
            masks
        }
    }

    /// The first two parents of a node that do not agree, as QEMU says it.
    #[must_use]
    pub fn conflict(&self, id: NodeId) -> Option<String> {
        for (a_id, a) in self.parents(id) {
            for (b_id, b) in self.parents(id) {
                let denied = a.masks.denies(b.masks);
                if a_id != b_id && !denied.is_empty() {
                    let name = self.name(id);
                    return Some(format!(
                        "Permission conflict on node '{name}': permissions '{}' are both required by {} \
                         (uses node '{name}' as '{}' child) and unshared by {} (uses node '{name}' as '{}' child).",
                        denied.names(),
                        self.describe_parent(&b.parent),
                        b.name,
                        self.describe_parent(&a.parent),
                        a.name,
                    ));
                }
            }
        }
        None
    }

    /// Recomputes the masks of everything below the given nodes.
    ///
    /// # Errors
    /// Parents that do not agree, a writer on a read-only node, a writer that may not round the length up. The masks
    /// are then half changed.
    pub fn refresh(&mut self, starts: &[NodeId]) -> Result<(), Refusal> {
        self.refresh_for_reopen(starts, &[])
    }

    /// [`Self::refresh`] while the nodes of `going_read_only`, already marked read-only here, change from read-write.
    pub(crate) fn refresh_for_reopen(
        &mut self,
        starts: &[NodeId],
        going_read_only: &[NodeId],
    ) -> Result<(), Refusal> {
        for id in self.topological(starts.iter().copied()) {
            if let Some(text) = self.conflict(id) {
                return Err(Refusal::new(text));
            }
            let cum = self.cumulative(id);
            self.check_writers(id, cum, going_read_only.contains(&id))?;
            for edge in self.node(id).children.clone() {
                self.edge_mut(edge).masks = self.masks_below(id, self.edge(edge), cum);
            }
        }
        Ok(())
    }

    fn check_writers(&self, id: NodeId, cum: Masks, going_read_only: bool) -> Result<(), Refusal> {
        let node = self.node(id);
        if !cum.writes() {
            return Ok(());
        }
        if !node.writable {
            return Err(Refusal::new(if going_read_only {
                format!(
                    "Read-only block node '{}' cannot support read-write users",
                    node.name
                )
            } else {
                "Block node is read-only".to_owned()
            }));
        }
        if !cum.perm.contains(Perm::RESIZE) && !node.length.is_multiple_of(node.request_alignment) {
            return Err(Refusal::new(
                "Cannot get 'write' permission without 'resize': Image size is not a multiple of request alignment",
            ));
        }
        Ok(())
    }

    /// The masks that every edge ought to have, recomputed from the root edges (exports, jobs) top-down.
    #[must_use]
    pub fn masks_from_scratch(&self) -> BTreeMap<EdgeId, Masks> {
        let mut masks: BTreeMap<EdgeId, Masks> = self
            .edges()
            .filter(|(_, edge)| !matches!(edge.parent, Parent::Node(_)))
            .map(|(id, edge)| (id, edge.masks))
            .collect();
        for node in self.topological(self.nodes().map(|(id, _)| id)) {
            let cum = Masks::cumulative(self.node(node).parents.iter().map(|e| masks[e]));
            for (id, edge) in self.children(node) {
                masks.insert(id, self.masks_below(node, edge, cum));
            }
        }
        masks
    }

    /// The edges whose masks are looser than they ought to be, with what they ought to have. Stricter is legal: a
    /// refresh that was refused while letting go of something may leave it so.
    #[must_use]
    pub fn looser_than_from_scratch(&self) -> Vec<(EdgeId, Masks)> {
        let ought = self.masks_from_scratch();
        let looser = |have: Masks, ought: Masks| {
            !have.perm.contains(ought.perm) || !ought.shared.contains(have.shared)
        };
        ought
            .into_iter()
            .filter(|(id, ought)| looser(self.edge(*id).masks, *ought))
            .collect()
    }
}
