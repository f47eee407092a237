//! The graph at any moment of a run, folded from the layer's events; drawn as text.
//!
//! Rules: only what events say; works on a stored history without the layer. Names, not numbers, in the output.

use std::collections::BTreeMap;

use blkcheck_impl::event::{Event, Parent};
use blkcheck_impl::types::{BackendId, EdgeId, JobId, NodeId, Perm, Role};

/// A node as events described it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoldedNode {
    /// node-name.
    pub name: String,
    /// Driver.
    pub driver: &'static str,
    /// Drained sections that are open on it by explicit request.
    pub drained: u32,
}

/// An edge as events described it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoldedEdge {
    /// Above.
    pub parent: Parent,
    /// Below.
    pub child: NodeId,
    /// Role.
    pub role: Role,
    /// Masks.
    pub perm: Perm,
    /// Masks.
    pub shared: Perm,
    /// Frozen.
    pub frozen: bool,
}

/// The graph at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fold {
    /// Live nodes.
    pub nodes: BTreeMap<NodeId, FoldedNode>,
    /// Live edges.
    pub edges: BTreeMap<EdgeId, FoldedEdge>,
    /// Ids of jobs seen so far.
    pub jobs: BTreeMap<JobId, String>,
    /// Names of nodes that are gone, for later mentions.
    gone: BTreeMap<NodeId, String>,
}

impl Fold {
    /// Takes one event in.
    pub fn event(&mut self, event: &Event) {
        match event {
            Event::NodeAdded { node, name, driver } => {
                self.nodes.insert(
                    *node,
                    FoldedNode {
                        name: name.to_string(),
                        driver,
                        drained: 0,
                    },
                );
            }
            Event::NodeRemoved { node } => {
                if let Some(node_gone) = self.nodes.remove(node) {
                    self.gone.insert(*node, node_gone.name);
                }
            }
            Event::EdgeSet {
                edge,
                parent,
                role,
                to,
                ..
            } => match to {
                None => {
                    self.edges.remove(edge);
                }
                Some(child) => {
                    let entry = self.edges.entry(*edge).or_insert_with(|| FoldedEdge {
                        parent: *parent,
                        child: *child,
                        role: *role,
                        perm: Perm::empty(),
                        shared: Perm::all(),
                        frozen: false,
                    });
                    entry.child = *child;
                }
            },
            Event::EdgePerms { edge, perm, shared } => {
                if let Some(e) = self.edges.get_mut(edge) {
                    (e.perm, e.shared) = (*perm, *shared);
                }
            }
            Event::Frozen { edge } => self.freeze(*edge, true),
            Event::Unfrozen { edge } => self.freeze(*edge, false),
            Event::Drained { node } => self.drain(*node, |n| n + 1),
            Event::DrainEnd { node } => self.drain(*node, |n| n.saturating_sub(1)),
            Event::JobStatus { job, id, .. } => {
                self.jobs.entry(*job).or_insert_with(|| id.to_string());
            }
            _ => {}
        }
    }

    fn freeze(&mut self, edge: EdgeId, frozen: bool) {
        if let Some(e) = self.edges.get_mut(&edge) {
            e.frozen = frozen;
        }
    }

    fn drain(&mut self, node: NodeId, change: impl Fn(u32) -> u32) {
        if let Some(n) = self.nodes.get_mut(&node) {
            n.drained = change(n.drained);
        }
    }

    /// A node's name, also after it is gone.
    #[must_use]
    pub fn node_name(&self, node: NodeId) -> String {
        let live = self.nodes.get(&node).map(|n| &n.name);
        live.or_else(|| self.gone.get(&node))
            .cloned()
            .unwrap_or_else(|| format!("{node:?}"))
    }

    /// A job's id.
    #[must_use]
    pub fn job_name(&self, job: JobId) -> String {
        self.jobs.get(&job).cloned().unwrap_or_else(|| format!("{job:?}"))
    }

    /// Who is above an edge.
    #[must_use]
    pub fn parent_name(&self, parent: Parent) -> String {
        match parent {
            Parent::Node(node) => self.node_name(node),
            Parent::Backend(BackendId(n)) => format!("backend {n}"),
            Parent::Job(job) => format!("job {}", self.job_name(job)),
        }
    }

    /// `parent -> child`.
    #[must_use]
    pub fn edge_name(&self, edge: EdgeId) -> String {
        match self.edges.get(&edge) {
            Some(e) => format!("{} -> {}", self.parent_name(e.parent), self.node_name(e.child)),
            None => format!("{edge:?}"),
        }
    }

    /// One line per node, below it one line per edge to its children; then backends and jobs.
    #[must_use]
    pub fn draw(&self) -> String {
        use std::fmt::Write;
        let mut out = String::new();
        let mut roots: Vec<&FoldedEdge> = self
            .edges
            .values()
            .filter(|e| !matches!(e.parent, Parent::Node(_)))
            .collect();
        roots.sort_by_key(|e| (e.parent, e.child));
        for edge in roots {
            let _ = writeln!(
                out,
                "{} -> {}  {}",
                self.parent_name(edge.parent),
                self.node_name(edge.child),
                masks(edge)
            );
        }
        for (id, node) in self.nodes.iter().rev() {
            let drained = if node.drained > 0 { "  drained" } else { "" };
            let _ = writeln!(out, "{} ({}){drained}", node.name, node.driver);
            for edge in self.edges.values().filter(|e| e.parent == Parent::Node(*id)) {
                let role = role_name(edge.role);
                let _ = writeln!(
                    out,
                    "    {role:<8} -> {}  {}",
                    self.node_name(edge.child),
                    masks(edge)
                );
            }
        }
        out
    }
}

fn masks(edge: &FoldedEdge) -> String {
    let frozen = if edge.frozen { "  FROZEN" } else { "" };
    format!("[{} / {}]{frozen}", short(edge.perm), short(edge.shared))
}

/// `r w u z` for consistent read, write, write unchanged, resize; `-` for none.
#[must_use]
pub fn short(perm: Perm) -> String {
    const LETTERS: [(Perm, char); 4] = [
        (Perm::CONSISTENT_READ, 'r'),
        (Perm::WRITE, 'w'),
        (Perm::WRITE_UNCHANGED, 'u'),
        (Perm::RESIZE, 'z'),
    ];
    let letters: String = LETTERS
        .iter()
        .filter(|(bit, _)| perm.contains(*bit))
        .map(|(_, c)| *c)
        .collect();
    if letters.is_empty() {
        "-".to_owned()
    } else {
        letters
    }
}

fn role_name(role: Role) -> &'static str {
    if role.contains(Role::COW) {
        "backing"
    } else if role.contains(Role::FILTERED) {
        "filtered"
    } else if role.contains(Role::PRIMARY) {
        "file"
    } else {
        "child"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_is_drawn_with_masks_and_frozen_links() {
        let mut fold = Fold::default();
        for (i, name) in ["base", "top"].iter().enumerate() {
            let node = NodeId(u32::try_from(i).expect("small"));
            fold.event(&Event::NodeAdded {
                node,
                name: (*name).into(),
                driver: "qcow2",
            });
        }
        let edge = EdgeId(0);
        let parent = Parent::Node(NodeId(1));
        fold.event(&Event::EdgeSet {
            edge,
            parent,
            role: Role::COW,
            from: None,
            to: Some(NodeId(0)),
        });
        fold.event(&Event::EdgePerms {
            edge,
            perm: Perm::CONSISTENT_READ,
            shared: Perm::CONSISTENT_READ,
        });
        fold.event(&Event::Frozen { edge });
        assert_eq!(
            fold.draw(),
            "top (qcow2)\n    backing  -> base  [r / r]  FROZEN\nbase (qcow2)\n"
        );
        fold.event(&Event::EdgeSet {
            edge,
            parent,
            role: Role::COW,
            from: Some(NodeId(0)),
            to: None,
        });
        fold.event(&Event::NodeRemoved { node: NodeId(0) });
        assert_eq!(fold.draw(), "top (qcow2)\n");
        assert_eq!(fold.node_name(NodeId(0)), "base");
    }
}
