//! The graph as the events tell it: nodes, edges, masks, frozen links. Oracles keep one each, so that none of them
//! trusts the layer's own introspection for what it checks.
//!
//! Rules: fed with every event, in order; flat vectors by identifier, kept between runs. A contradiction in the
//! events themselves (an edge that leaves a node it never pointed to, a node that appears twice) is returned by
//! [`Mirror::apply`]; only the `graph` oracle reports it.
//! Not here: lengths, counters, op blockers, headers (events do not carry them).

use std::rc::Rc;

use blkcheck_impl::event::{Event, Parent};
use blkcheck_impl::types::{BackendId, EdgeId, NodeId, Perm, Role};

/// A node.
#[derive(Clone, Debug)]
pub(crate) struct MirrorNode {
    /// node-name.
    pub(crate) name: Rc<str>,
    /// Driver.
    pub(crate) driver: &'static str,
    /// Between NodeAdded and NodeRemoved.
    pub(crate) live: bool,
    /// Edges above, oldest first.
    pub(crate) parents: Vec<EdgeId>,
    /// Edges below, oldest first.
    pub(crate) children: Vec<EdgeId>,
}

/// An edge.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MirrorEdge {
    /// Above; `None` before the first EdgeSet.
    pub(crate) parent: Option<Parent>,
    /// Role.
    pub(crate) role: Role,
    /// Below.
    pub(crate) child: Option<NodeId>,
    /// Masks.
    pub(crate) perm: Perm,
    /// Masks.
    pub(crate) shared: Perm,
    /// Frozen.
    pub(crate) frozen: bool,
}

const NO_EDGE: MirrorEdge = MirrorEdge {
    parent: None,
    role: Role::empty(),
    child: None,
    perm: Perm::empty(),
    shared: Perm::all(),
    frozen: false,
};

/// The graph as the events tell it.
#[derive(Debug, Default)]
pub(crate) struct Mirror {
    nodes: Vec<Option<MirrorNode>>,
    edges: Vec<MirrorEdge>,
    scratch: Vec<NodeId>,
    seen: Vec<bool>,
}

impl Mirror {
    /// Forgets the run.
    pub(crate) fn reset(&mut self) {
        self.nodes.clear();
        self.edges.clear();
    }

    /// A node that was added, live or not.
    pub(crate) fn node(&self, node: NodeId) -> Option<&MirrorNode> {
        self.nodes.get(node.0 as usize)?.as_ref()
    }

    /// An edge that was heard of.
    pub(crate) fn edge(&self, edge: EdgeId) -> Option<&MirrorEdge> {
        self.edges.get(edge.0 as usize)
    }

    /// All live nodes.
    pub(crate) fn nodes(&self) -> impl Iterator<Item = (NodeId, &MirrorNode)> {
        self.nodes
            .iter()
            .zip(0u32..)
            .filter_map(|(n, i)| n.as_ref().filter(|n| n.live).map(|n| (NodeId(i), n)))
    }

    /// All edges that point somewhere.
    pub(crate) fn edges(&self) -> impl Iterator<Item = (EdgeId, &MirrorEdge)> {
        self.edges
            .iter()
            .zip(0u32..)
            .filter(|(e, _)| e.child.is_some())
            .map(|(e, i)| (EdgeId(i), e))
    }

    /// The node of that name.
    pub(crate) fn by_name(&self, name: &str) -> Option<NodeId> {
        self.nodes().find(|(_, n)| &*n.name == name).map(|(id, _)| id)
    }

    /// Whether a node of that name was there and went.
    pub(crate) fn was_used(&self, name: &str) -> bool {
        self.nodes.iter().flatten().any(|n| !n.live && &*n.name == name)
    }

    /// Name for messages.
    pub(crate) fn name(&self, node: NodeId) -> &str {
        self.node(node).map_or("?", |n| &n.name)
    }

    /// `child_of(parent)` for messages.
    pub(crate) fn describe(&self, edge: EdgeId) -> String {
        let Some(e) = self.edge(edge) else {
            return format!("{edge:?}");
        };
        let above = match e.parent {
            Some(Parent::Node(n)) => format!("node '{}'", self.name(n)),
            Some(Parent::Backend(b)) => format!("backend {b:?}"),
            Some(Parent::Job(j)) => format!("job {j:?}"),
            None => "nobody".to_owned(),
        };
        match e.child {
            Some(c) => format!("link from {above} to node '{}'", self.name(c)),
            None => format!("cut link of {above}"),
        }
    }

    /// The one next edge of a chain: a filter's child, or a backing link.
    pub(crate) fn chain_edge(&self, node: NodeId) -> Option<EdgeId> {
        let n = self.node(node)?;
        let filter = matches!(n.driver, "copy-on-read" | "throttle" | "copy-before-write");
        n.children.iter().copied().find(|&e| {
            self.edge(e)
                .is_some_and(|e| e.role.contains(Role::COW) || filter && e.role.contains(Role::FILTERED))
        })
    }

    /// Root node of a backend.
    pub(crate) fn root_of(&self, backend: BackendId) -> Option<NodeId> {
        self.edges
            .iter()
            .rev()
            .find(|e| e.parent == Some(Parent::Backend(backend)) && e.child.is_some())?
            .child
    }

    /// Calls `visit` for `node` and every node above it, each once; stops when it answers false.
    pub(crate) fn up(&mut self, node: NodeId, mut visit: impl FnMut(&Mirror, NodeId) -> bool) -> bool {
        let mut stack = std::mem::take(&mut self.scratch);
        let mut seen = std::mem::take(&mut self.seen);
        seen.clear();
        seen.resize(self.nodes.len(), false);
        stack.clear();
        stack.push(node);
        let mut all = true;
        while let Some(n) = stack.pop() {
            let Some(seen) = seen.get_mut(n.0 as usize) else {
                continue;
            };
            if std::mem::replace(seen, true) {
                continue;
            }
            if !visit(self, n) {
                all = false;
                break;
            }
            let Some(n) = self.node(n) else { continue };
            for &e in &n.parents {
                if let Some(Parent::Node(above)) = self.edge(e).and_then(|e| e.parent) {
                    stack.push(above);
                }
            }
        }
        self.scratch = stack;
        self.seen = seen;
        all
    }

    /// Whether `to` is `from` or below it.
    pub(crate) fn reaches(&mut self, from: NodeId, to: NodeId) -> bool {
        !self.up(to, |_, n| n != from)
    }

    fn edge_slot(&mut self, edge: EdgeId) -> &mut MirrorEdge {
        let i = edge.0 as usize;
        if self.edges.len() <= i {
            self.edges.resize(i + 1, NO_EDGE);
        }
        &mut self.edges[i]
    }

    /// Follows one event; `Err` says what in it contradicts what came before.
    pub(crate) fn apply(&mut self, event: &Event) -> Result<(), &'static str> {
        match event {
            Event::NodeAdded { node, name, driver } => {
                let i = node.0 as usize;
                if self.nodes.len() <= i {
                    self.nodes.resize(i + 1, None);
                }
                if self.nodes[i].is_some() {
                    return Err("a node identifier is used twice");
                }
                let twice = self.by_name(name).is_some();
                self.nodes[i] = Some(MirrorNode {
                    name: Rc::clone(name),
                    driver,
                    live: true,
                    parents: Vec::new(),
                    children: Vec::new(),
                });
                if twice {
                    Err("two live nodes have one name")
                } else {
                    Ok(())
                }
            }
            Event::NodeRemoved { node } => match self.nodes.get_mut(node.0 as usize) {
                Some(Some(n)) if n.live => {
                    n.live = false;
                    let idle = n.parents.is_empty() && n.children.is_empty();
                    if idle {
                        Ok(())
                    } else {
                        Err("a removed node still has edges")
                    }
                }
                _ => Err("a node that does not exist is removed"),
            },
            Event::EdgeSet {
                edge,
                parent,
                role,
                from,
                to,
            } => self.edge_set(*edge, *parent, *role, *from, *to),
            Event::EdgePerms { edge, perm, shared } => {
                let slot = self.edge_slot(*edge);
                (slot.perm, slot.shared) = (*perm, *shared);
                Ok(())
            }
            Event::Frozen { edge } => {
                self.edge_slot(*edge).frozen = true;
                Ok(())
            }
            Event::Unfrozen { edge } => {
                self.edge_slot(*edge).frozen = false;
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn edge_set(
        &mut self,
        edge: EdgeId,
        parent: Parent,
        role: Role,
        from: Option<NodeId>,
        to: Option<NodeId>,
    ) -> Result<(), &'static str> {
        let slot = self.edge_slot(edge);
        let before = slot.child;
        let other_parent = slot.parent.is_some_and(|p| p != parent);
        (slot.parent, slot.role, slot.child) = (Some(parent), role, to);
        if let Some(n) = before {
            self.unlink(edge, n, parent);
        }
        let mut dead = false;
        if let Some(n) = to {
            match self.nodes.get_mut(n.0 as usize) {
                Some(Some(node)) => {
                    node.parents.push(edge);
                    dead |= !node.live;
                }
                _ => dead = true,
            }
            if let Parent::Node(p) = parent {
                match self.nodes.get_mut(p.0 as usize) {
                    Some(Some(node)) => {
                        node.children.push(edge);
                        dead |= !node.live;
                    }
                    _ => dead = true,
                }
            }
        }
        if dead {
            Err("an edge is set on a node that does not exist")
        } else if before != from {
            Err("an edge moves away from a node it did not point to")
        } else if other_parent {
            Err("an edge changes its parent")
        } else {
            Ok(())
        }
    }

    fn unlink(&mut self, edge: EdgeId, child: NodeId, parent: Parent) {
        if let Some(Some(n)) = self.nodes.get_mut(child.0 as usize) {
            n.parents.retain(|&e| e != edge);
        }
        if let Parent::Node(p) = parent
            && let Some(Some(n)) = self.nodes.get_mut(p.0 as usize)
        {
            n.children.retain(|&e| e != edge);
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Events of a small graph: file0 <- top -> backing base, by identifiers 0 (base), 1 (top); edge 0 = backing.
    pub(crate) fn chain() -> Vec<Event> {
        vec![
            added(0, "base", "qcow2"),
            added(1, "top", "qcow2"),
            linked(0, Parent::Node(NodeId(1)), Role::COW, 0),
        ]
    }

    pub(crate) fn added(node: u32, name: &str, driver: &'static str) -> Event {
        Event::NodeAdded {
            node: NodeId(node),
            name: name.into(),
            driver,
        }
    }

    pub(crate) fn linked(edge: u32, parent: Parent, role: Role, to: u32) -> Event {
        Event::EdgeSet {
            edge: EdgeId(edge),
            parent,
            role,
            from: None,
            to: Some(NodeId(to)),
        }
    }

    #[test]
    fn the_mirror_follows_and_notices_contradictions() {
        let mut m = Mirror::default();
        for e in chain() {
            m.apply(&e).expect("consistent");
        }
        assert_eq!(m.chain_edge(NodeId(1)), Some(EdgeId(0)));
        assert!(m.reaches(NodeId(1), NodeId(0)));
        assert!(!m.reaches(NodeId(0), NodeId(1)));
        assert_eq!(m.by_name("top"), Some(NodeId(1)));
        let e = m.apply(&Event::NodeRemoved { node: NodeId(0) });
        assert_eq!(e, Err("a removed node still has edges"));
        let e = m.apply(&linked(1, Parent::Backend(BackendId(0)), Role::FILTERED, 9));
        assert_eq!(e, Err("an edge is set on a node that does not exist"));
        let e = m.apply(&added(2, "top", "raw"));
        assert_eq!(e, Err("two live nodes have one name"));
    }
}
