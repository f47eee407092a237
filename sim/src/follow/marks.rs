//! Marks in bitmaps: by guests' requests, where only the requests' answers are told, else by every request of the layer.
//!
//! Rules: they are in the journal, so that a run that is gone through again has them too.
//! Not here: which requests mark what (`oracle/bitmap.rs`).

use std::ops::Range;

use blkcheck_model::{NodeId, World};

use super::{Entry, Follower};

/// What a request marked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Marked {
    /// What a write marks that is for this node.
    Written(NodeId),
    /// What a discard marks that is for this node.
    Discarded(NodeId),
    /// What a request marks on this very node, and nowhere else.
    Requested(NodeId),
    /// The same, if it marked anything: it failed, or more than that.
    Unsure(NodeId),
    /// Nobody knows: it may have marked any bitmap.
    Perhaps,
}

impl Follower {
    /// A guest's request was answered, or one of the layer's ended.
    pub fn marked(&mut self, what: Marked, bytes: Range<u64>) {
        mark(&mut self.world, what, bytes.clone());
        self.journal.push(Entry::Marked(what, bytes));
    }
}

pub(super) fn mark(world: &mut World, what: Marked, bytes: Range<u64>) {
    match what {
        Marked::Written(node) if world.graph.get(node).is_some() => world.guest_wrote(node, bytes),
        Marked::Discarded(node) if world.graph.get(node).is_some() => world.guest_discarded(node, bytes),
        Marked::Requested(node) if world.graph.get(node).is_some() => world.node_written(node, bytes, true),
        Marked::Unsure(node) if world.graph.get(node).is_some() => world.node_written(node, bytes, false),
        Marked::Written(_) | Marked::Discarded(_) | Marked::Requested(_) | Marked::Unsure(_) => {}
        Marked::Perhaps => {
            let nodes: Vec<NodeId> = world.graph.nodes().map(|(id, _)| id).collect();
            for node in nodes {
                world.node_written(node, bytes.clone(), false);
            }
        }
    }
}
