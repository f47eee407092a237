//! The node graph: nodes, edges, who owns whom, and the invariants that always hold.
//!
//! Rules: identifiers are handed out in order and never reused; a node lists its parents and its children newest
//! edge first, because that order is visible in error texts; a retargeted edge counts as new. A node lives as long
//! as somebody refers to it ([`Graph::refcount`], [`Graph::reap`]).
//! Walks are in [`crate::walk`], masks in [`crate::refresh`], changes in [`crate::change`], frozen links in
//! [`crate::freeze`], op blockers in [`crate::blockers`].

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::rc::Rc;

use crate::bitmap::Bitmap;
use crate::copy_before_write::Kept;
use crate::job::JobKind;
use crate::options::NodeOptions;
use crate::perm::{Driver, Masks, Role};
use crate::refusal::Refusal;

/// A node of the graph.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub u32);

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "n{}", self.0)
    }
}

/// An edge of the graph.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EdgeId(pub u32);

impl fmt::Debug for EdgeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "e{}", self.0)
    }
}

/// Who is above an edge.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Parent {
    /// A node.
    Node(NodeId),
    /// An export's backend; its export id.
    Export(Rc<str>),
    /// The backend through which a job does its I/O; the job's id.
    JobBackend(Rc<str>),
    /// A job's edge; the job's id. It stays at its node when parents are moved, and blocks operations there.
    Job(Rc<str>, JobKind),
}

impl Parent {
    /// A backend (QEMU `BlockBackend`), whoever owns it.
    #[must_use]
    pub fn is_backend(&self) -> bool {
        matches!(self, Parent::Export(_) | Parent::JobBackend(_))
    }
}

/// One parent's use of one node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Edge {
    /// `file`, `backing`, `root`, `main node`, …
    pub name: &'static str,
    /// What the child is to the parent; empty for exports and jobs.
    pub role: Role,
    /// Above.
    pub parent: Parent,
    /// Below.
    pub child: NodeId,
    /// What the parent may do and lets others do.
    pub masks: Masks,
    /// The filter that froze this link, if any.
    pub frozen_by: Option<NodeId>,
}

/// What an image header says about its backing file.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct BackingHeader {
    /// Name as recorded.
    pub file: Rc<str>,
    /// Format as recorded.
    pub format: Option<Rc<str>>,
}

/// A node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Node {
    /// Its node-name.
    pub name: Rc<str>,
    /// Its driver.
    pub driver: Driver,
    /// Open read-write.
    pub writable: bool,
    /// `force-share=on`: parents above it share everything.
    pub force_share: bool,
    /// Discards are passed on to what is below.
    pub unmap: bool,
    /// Its options as they hold, without those of its children.
    pub options: NodeOptions,
    /// The ones that were said for this very node, so that they do not follow its parent.
    pub explicit: NodeOptions,
    /// Length, bytes; a multiple of 512.
    pub length: u64,
    /// Smallest request, bytes (1 except for unbuffered leaves).
    pub request_alignment: u64,
    /// Leaves: the file name.
    pub filename: Option<Rc<str>>,
    /// Formats with `offset` or `size`: not the plain bytes of the file below.
    pub windowed: bool,
    /// The name that the backing node must have to be the one on record (qcow2).
    pub recorded_backing: Option<Rc<str>>,
    /// Its header names a backing file (qcow2).
    pub names_backing: bool,
    /// Added by `blockdev-add` and not yet deleted.
    pub monitor_owned: bool,
    /// Inserted by a job for which the user named no filter.
    pub implicit: bool,
    /// Opened inline as a child of this node; options follow that parent.
    pub inherits_from: Option<NodeId>,
    /// copy-on-read: the last node whose content is copied. The filter holds a reference on it.
    pub bottom: Option<NodeId>,
    /// copy-before-write: what it keeps.
    pub kept: Option<Kept>,
    /// How many jobs refer to it: to the filter that they made, or to the source of a backup.
    pub held_by_jobs: usize,
    /// Dirty bitmaps, newest first.
    pub bitmaps: Vec<Bitmap>,
    /// Edges from above, newest first.
    pub parents: Vec<EdgeId>,
    /// Edges to below, newest first.
    pub children: Vec<EdgeId>,
}

impl Node {
    /// A writable node with nothing special about it, for graphs built by hand (oracles, tests).
    #[must_use]
    pub fn new(name: &str, driver: Driver) -> Node {
        Node {
            name: Rc::from(name),
            driver,
            writable: true,
            unmap: false,
            options: NodeOptions::default(),
            explicit: NodeOptions::default(),
            names_backing: false,
            force_share: false,
            length: 0,
            request_alignment: 1,
            filename: None,
            windowed: false,
            recorded_backing: None,
            monitor_owned: false,
            implicit: false,
            inherits_from: None,
            bottom: None,
            kept: None,
            held_by_jobs: 0,
            bitmaps: Vec::new(),
            parents: Vec::new(),
            children: Vec::new(),
        }
    }
}

/// All nodes and edges.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Graph {
    nodes: BTreeMap<NodeId, Node>,
    edges: BTreeMap<EdgeId, Edge>,
    next_node: u32,
    next_edge: u32,
    /// Throttle groups, by name.
    pub(crate) groups: BTreeSet<Rc<str>>,
    /// How many bitmaps were made.
    bitmaps: u32,
    /// Nodes that became writable (or read-only), in order; what follows from it is yet to be done.
    flips: Vec<(NodeId, bool)>,
    /// A backing node that is let go of gets the masks that are left to it, which the daemon forgets.
    pub(crate) refreshes_let_go: bool,
}

impl Graph {
    /// From now on a backing node that is let go of is refreshed: this is how the layer does it, not the daemon, whose
    /// masks below such a node stay as they were (docs/deviations.md, G1).
    pub fn refresh_what_is_let_go(&mut self) {
        self.refreshes_let_go = true;
    }

    /// There is a throttle group of this name.
    #[must_use]
    pub fn has_group(&self, name: &str) -> bool {
        self.groups.contains(name)
    }

    /// Throttle groups, by name.
    pub fn groups(&self) -> impl Iterator<Item = &str> {
        self.groups.iter().map(|name| &**name)
    }

    /// Some node is throttled by this group.
    #[must_use]
    pub fn group_is_in_use(&self, name: &str) -> bool {
        self.nodes.values().any(|node| {
            node.options
                .get("throttle-group")
                .is_some_and(|group| group == name)
        })
    }

    /// Fails when a node is to be throttled by a group that there is not.
    pub(crate) fn check_group(&self, options: &NodeOptions) -> Result<(), Refusal> {
        match options.get("throttle-group").and_then(|group| group.as_str()) {
            Some(group) if !self.has_group(group) => {
                Err(Refusal::new(format!("Throttle group '{group}' does not exist")))
            }
            _ => Ok(()),
        }
    }

    /// A number for a new bitmap: later ones are larger.
    pub(crate) fn next_bitmap(&mut self) -> u32 {
        self.bitmaps += 1;
        self.bitmaps
    }

    /// No nodes.
    #[must_use]
    pub fn new() -> Graph {
        Graph::default()
    }

    /// The node.
    ///
    /// # Panics
    /// When there is none: identifiers never outlive their node inside the model.
    #[must_use]
    pub fn node(&self, id: NodeId) -> &Node {
        self.nodes.get(&id).unwrap_or_else(|| panic!("no node {id:?}"))
    }

    /// The node, if it is still there.
    #[must_use]
    pub fn get(&self, id: NodeId) -> Option<&Node> {
        self.nodes.get(&id)
    }

    /// The node is writable from now on, or read-only.
    pub(crate) fn set_writable(&mut self, id: NodeId, writable: bool) {
        if std::mem::replace(&mut self.node_mut(id).writable, writable) != writable {
            self.flips.push((id, writable));
        }
    }

    /// Nodes that became writable or read-only since the last call.
    pub(crate) fn take_flips(&mut self) -> Vec<(NodeId, bool)> {
        std::mem::take(&mut self.flips)
    }

    /// The node, to change it.
    ///
    /// # Panics
    /// When there is none.
    pub fn node_mut(&mut self, id: NodeId) -> &mut Node {
        self.nodes
            .get_mut(&id)
            .unwrap_or_else(|| panic!("no node {id:?}"))
    }

    /// The edge.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    pub fn edge(&self, id: EdgeId) -> &Edge {
        self.edges.get(&id).unwrap_or_else(|| panic!("no edge {id:?}"))
    }

    /// The edge, to change it.
    ///
    /// # Panics
    /// When there is none.
    pub fn edge_mut(&mut self, id: EdgeId) -> &mut Edge {
        self.edges
            .get_mut(&id)
            .unwrap_or_else(|| panic!("no edge {id:?}"))
    }

    /// Every node, oldest first.
    pub fn nodes(&self) -> impl Iterator<Item = (NodeId, &Node)> {
        self.nodes.iter().map(|(id, node)| (*id, node))
    }

    /// Every edge, oldest first.
    pub fn edges(&self) -> impl Iterator<Item = (EdgeId, &Edge)> {
        self.edges.iter().map(|(id, edge)| (*id, edge))
    }

    /// The node of this name.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<NodeId> {
        self.nodes()
            .find(|(_, node)| &*node.name == name)
            .map(|(id, _)| id)
    }

    /// The name of a node.
    #[must_use]
    pub fn name(&self, id: NodeId) -> &str {
        &self.node(id).name
    }

    /// The identifier that the next node will get.
    #[must_use]
    pub fn next_node_id(&self) -> NodeId {
        NodeId(self.next_node)
    }

    /// Adds a node without edges.
    pub fn add_node(&mut self, node: Node) -> NodeId {
        assert!(
            node.parents.is_empty() && node.children.is_empty(),
            "edges come with add_edge"
        );
        let id = NodeId(self.next_node);
        self.next_node += 1;
        self.nodes.insert(id, node);
        id
    }

    /// Adds an edge at the head of its lists, exactly as given: no check, no refresh of masks.
    pub fn add_edge(&mut self, edge: Edge) -> EdgeId {
        let id = EdgeId(self.next_edge);
        self.next_edge += 1;
        self.link(id, &edge);
        self.edges.insert(id, edge);
        id
    }

    /// Removes an edge; no refresh of masks.
    pub fn remove_edge(&mut self, id: EdgeId) -> Edge {
        let edge = self.edge(id).clone();
        assert!(edge.frozen_by.is_none(), "a frozen link never changes");
        self.unlink(id, &edge);
        self.edges.remove(&id);
        edge
    }

    /// Points an edge elsewhere; no refresh of masks.
    pub fn retarget(&mut self, id: EdgeId, child: NodeId) {
        let mut edge = self.edge(id).clone();
        assert!(edge.frozen_by.is_none(), "a frozen link never changes");
        self.unlink(id, &edge);
        edge.child = child;
        self.link(id, &edge);
        self.edges.insert(id, edge);
    }

    fn link(&mut self, id: EdgeId, edge: &Edge) {
        self.node_mut(edge.child).parents.insert(0, id);
        if let Parent::Node(parent) = edge.parent {
            self.node_mut(parent).children.insert(0, id);
        }
    }

    fn unlink(&mut self, id: EdgeId, edge: &Edge) {
        self.node_mut(edge.child).parents.retain(|e| *e != id);
        if let Parent::Node(parent) = edge.parent {
            self.node_mut(parent).children.retain(|e| *e != id);
        }
    }

    /// The edges from above, newest first.
    pub fn parents(&self, id: NodeId) -> impl Iterator<Item = (EdgeId, &Edge)> {
        self.node(id).parents.iter().map(|e| (*e, self.edge(*e)))
    }

    /// The edges to below, newest first.
    pub fn children(&self, id: NodeId) -> impl Iterator<Item = (EdgeId, &Edge)> {
        self.node(id).children.iter().map(|e| (*e, self.edge(*e)))
    }

    /// Some parent is a backend.
    #[must_use]
    pub fn has_backend(&self, id: NodeId) -> bool {
        self.parents(id).any(|(_, edge)| edge.parent.is_backend())
    }

    /// Every parent is a backend (a node without parents counts).
    #[must_use]
    pub fn is_root(&self, id: NodeId) -> bool {
        self.parents(id).all(|(_, edge)| edge.parent.is_backend())
    }

    /// How many refer to the node: its parents, the monitor, a filter whose `bottom` it is, the job that made it,
    /// exports that show its bitmaps.
    #[must_use]
    pub fn refcount(&self, id: NodeId) -> usize {
        let node = self.node(id);
        let as_bottom = self
            .nodes
            .values()
            .filter(|other| other.bottom == Some(id))
            .count();
        let shown = node.bitmaps.iter().filter(|b| b.shown_by.is_some()).count();
        node.parents.len() + as_bottom + shown + usize::from(node.monitor_owned) + node.held_by_jobs
    }

    /// Closes every node that nobody refers to, and then those that only it referred to.
    pub fn reap(&mut self) {
        while let Some(id) = self.nodes.keys().copied().find(|id| self.refcount(*id) == 0) {
            if self.node(id).bottom.is_some() {
                self.unfreeze(id);
            }
            for edge in self.node(id).children.clone() {
                self.remove_edge_and_refresh(edge);
            }
            self.nodes.remove(&id);
            for other in self
                .nodes
                .values_mut()
                .filter(|other| other.inherits_from == Some(id))
            {
                other.inherits_from = None;
            }
        }
    }

    /// Who is above, in error texts.
    #[must_use]
    pub fn describe_parent(&self, parent: &Parent) -> String {
        match parent {
            Parent::Node(node) => format!("node '{}'", self.name(*node)),
            Parent::Export(_) | Parent::JobBackend(_) => "an unnamed block device".to_owned(),
            Parent::Job(id, kind) => format!("{} job '{id}'", kind.name()),
        }
    }

    /// How deep each node is drained, given the open sections on nodes and the open drain-all sections: a node's
    /// counter is its own sections, plus one for every child edge whose node is drained.
    #[must_use]
    pub fn quiesce_counters(
        &self,
        sections: &BTreeMap<NodeId, u32>,
        drain_all: u32,
    ) -> BTreeMap<NodeId, u32> {
        let mut counters = BTreeMap::new();
        for id in self.topological(self.nodes.keys().copied()).into_iter().rev() {
            let below = self
                .children(id)
                .filter(|(_, edge)| counters[&edge.child] > 0)
                .count();
            let below = u32::try_from(below).expect("fewer than 2^32 edges");
            counters.insert(id, sections.get(&id).copied().unwrap_or(0) + drain_all + below);
        }
        counters
    }

    /// Every invariant of the graph; the first violation as a sentence.
    ///
    /// # Errors
    /// A sentence that names the nodes and what is wrong with them.
    pub fn check(&self) -> Result<(), String> {
        self.check_structure()?;
        self.check_roles()?;
        self.check_frozen()?;
        self.check_masks()
    }

    fn check_structure(&self) -> Result<(), String> {
        for (id, edge) in self.edges() {
            let child = self
                .nodes
                .get(&edge.child)
                .ok_or_else(|| format!("{id:?} points to a removed node"))?;
            if child.parents.iter().filter(|e| **e == id).count() != 1 {
                return Err(format!(
                    "edge '{}' is not once among the parents of '{}'",
                    edge.name, child.name
                ));
            }
            if let Parent::Node(parent) = edge.parent {
                let parent = self
                    .nodes
                    .get(&parent)
                    .ok_or_else(|| format!("{id:?} has a removed parent"))?;
                if parent.children.iter().filter(|e| **e == id).count() != 1 {
                    return Err(format!(
                        "edge '{}' is not once among the children of '{}'",
                        edge.name, parent.name
                    ));
                }
            }
        }
        for (id, node) in self.nodes() {
            if self.children(id).any(|(_, edge)| self.reaches(edge.child, id)) {
                return Err(format!("node '{}' is below itself", node.name));
            }
            if self.refcount(id) == 0 {
                return Err(format!("node '{}' lives though nobody refers to it", node.name));
            }
        }
        Ok(())
    }

    fn check_roles(&self) -> Result<(), String> {
        for (id, node) in self.nodes() {
            for role in [Role::FILTERED, Role::COW, Role::PRIMARY] {
                if self
                    .children(id)
                    .filter(|(_, edge)| edge.role.contains(role))
                    .count()
                    > 1
                {
                    return Err(format!("node '{}' has two children of role {role:?}", node.name));
                }
            }
            for (_, edge) in self.children(id) {
                let chain = edge.role & (Role::FILTERED | Role::COW);
                let storage = edge.role & (Role::DATA | Role::METADATA);
                let exclusive = chain.iter().count() + usize::from(!storage.is_empty()) == 1;
                if !exclusive || edge.role.contains(Role::COW | Role::PRIMARY) {
                    return Err(format!(
                        "node '{}' has a child of impossible role {:?}",
                        node.name, edge.role
                    ));
                }
            }
        }
        Ok(())
    }

    fn check_frozen(&self) -> Result<(), String> {
        for (_, edge) in self.edges() {
            let Some(holder) = edge.frozen_by else { continue };
            let in_range = self.nodes.get(&holder).is_some_and(|filter| {
                filter.bottom.is_some_and(|bottom| {
                    self.links(holder, Some(bottom))
                        .iter()
                        .any(|e| self.edge(*e) == edge)
                })
            });
            if !in_range {
                return Err(format!(
                    "the link '{}' to '{}' is frozen by nobody",
                    edge.name,
                    self.name(edge.child)
                ));
            }
        }
        Ok(())
    }

    fn check_masks(&self) -> Result<(), String> {
        for (id, node) in self.nodes() {
            if let Some(text) = self.conflict(id) {
                return Err(text);
            }
            if self.cumulative(id).writes() && !node.writable {
                return Err(format!("read-only node '{}' has a writer", node.name));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "graph_tests.rs"]
mod tests;
