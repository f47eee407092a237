//! The graph as plain data, for oracles, snapshots in tests and debug output.
//!
//! Rules: read-only and synchronous, so an observer may call it inside an event. Two views are equal exactly when the
//! graph is in the same state, list orders included; a refused command leaves an equal view. Jobs have their own view.

use std::rc::Rc;

pub use crate::dirty::BitmapView;

use crate::Layer;
use crate::event::Parent;
use crate::graph::edge::Edge;
use crate::graph::node::{Blocker, Node};
use crate::types::{BackendId, EdgeId, NodeId, OpenFlags, Perm, Role};

/// All of a layer's graph.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct GraphView {
    /// Nodes in creation order, closing ones included.
    pub nodes: Vec<NodeView>,
    /// Edges in creation order.
    pub edges: Vec<EdgeView>,
    /// Backends with a root, in order of their root edges.
    pub backends: Vec<BackendView>,
    /// Open drain-all sections.
    pub drain_all: u32,
    /// Read locks held on the graph.
    pub readers: u32,
    /// Whether the graph write lock is held.
    pub writer: bool,
}

/// One node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NodeView {
    /// Identity.
    pub id: NodeId,
    /// node-name.
    pub name: Rc<str>,
    /// Driver name.
    pub driver: &'static str,
    /// Whether the driver is a filter.
    pub is_filter: bool,
    /// Has its driver (neither opening nor closed).
    pub open: bool,
    /// How it is open.
    pub flags: OpenFlags,
    /// Inserted by a job.
    pub implicit: bool,
    /// Links into it are never frozen.
    pub never_freeze: bool,
    /// force-share=on.
    pub force_share: bool,
    /// References.
    pub refcnt: u32,
    /// Owned by the monitor.
    pub monitor_owned: bool,
    /// Opened inline as a child of this node.
    pub inherits_from: Option<NodeId>,
    /// Drained sections.
    pub quiesce_counter: u32,
    /// Requests in flight.
    pub in_flight: u32,
    /// Edges above, newest first.
    pub parents: Vec<EdgeId>,
    /// Edges below, newest first.
    pub children: Vec<EdgeId>,
    /// Slot `file`.
    pub file: Option<EdgeId>,
    /// Slot `backing`.
    pub backing: Option<EdgeId>,
    /// Op blockers, newest first.
    pub blockers: Vec<Blocker>,
    /// Length, bytes.
    pub length: u64,
    /// Backing name and format in the image header.
    pub backing_header: Option<(String, Option<String>)>,
}

/// One edge.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct EdgeView {
    /// Identity.
    pub id: EdgeId,
    /// Child name.
    pub name: Rc<str>,
    /// Above.
    pub parent: Parent,
    /// What the child is to the parent.
    pub role: Role,
    /// Below.
    pub child: Option<NodeId>,
    /// What the parent may do.
    pub perm: Perm,
    /// What it lets others do.
    pub shared: Perm,
    /// Frozen.
    pub frozen: bool,
    /// The parent was told of a drain.
    pub quiesced_parent: bool,
}

/// One backend.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BackendView {
    /// Identity.
    pub id: BackendId,
    /// Monitor name.
    pub name: Option<Rc<str>>,
    /// Its root edge (node and masks are there).
    pub root: EdgeId,
    /// Drained sections it was told of.
    pub quiesce_counter: u32,
    /// Requests in flight, parked ones excluded.
    pub in_flight: u32,
}

impl GraphView {
    /// A node by name.
    #[must_use]
    pub fn node_named(&self, name: &str) -> Option<&NodeView> {
        self.nodes.iter().find(|n| &*n.name == name)
    }

    /// A node by id.
    #[must_use]
    pub fn node(&self, id: NodeId) -> Option<&NodeView> {
        self.nodes
            .binary_search_by_key(&id, |n| n.id)
            .ok()
            .map(|i| &self.nodes[i])
    }

    /// An edge by id.
    #[must_use]
    pub fn edge(&self, id: EdgeId) -> Option<&EdgeView> {
        self.edges
            .binary_search_by_key(&id, |e| e.id)
            .ok()
            .map(|i| &self.edges[i])
    }
}

impl Layer {
    /// The graph as it is now.
    #[must_use]
    pub fn inspect(&self) -> GraphView {
        let graph = self.inner.graph.borrow();
        GraphView {
            nodes: graph.nodes.iter().flatten().map(|n| view_node(n)).collect(),
            edges: graph.edges().map(|e| view_edge(e)).collect(),
            backends: graph.edges().filter_map(|e| view_backend(e)).collect(),
            drain_all: graph.drain_all,
            readers: self.inner.graph_lock.readers(),
            writer: self.inner.graph_lock.write_held(),
        }
    }
}

fn view_node(node: &Node) -> NodeView {
    let driver = node.driver_opt();
    NodeView {
        id: node.id,
        name: Rc::clone(&node.name),
        driver: node.facts.name,
        is_filter: node.facts.is_filter,
        open: driver.is_some(),
        flags: node.flags.get(),
        implicit: node.implicit.get(),
        never_freeze: node.never_freeze.get(),
        force_share: node.force_share.get(),
        refcnt: node.refcnt.get(),
        monitor_owned: node.monitor_owned.get(),
        inherits_from: node.inherits_from.get(),
        quiesce_counter: node.quiesce_counter.get(),
        in_flight: node.io.in_flight.count(),
        parents: node.parents.borrow().clone(),
        children: node.children.borrow().clone(),
        file: node.file.get(),
        backing: node.backing.get(),
        blockers: node.blockers.borrow().clone(),
        length: node.length(),
        backing_header: driver.and_then(|d| d.backing_header()),
    }
}

fn view_edge(edge: &Edge) -> EdgeView {
    EdgeView {
        id: edge.id,
        name: Rc::clone(&edge.name),
        parent: edge.parent,
        role: edge.role,
        child: edge.child.get(),
        perm: edge.perm.get(),
        shared: edge.shared.get(),
        frozen: edge.frozen.get(),
        quiesced_parent: edge.quiesced_parent.get(),
    }
}

fn view_backend(edge: &Edge) -> Option<BackendView> {
    let (Parent::Backend(id), Some(hooks)) = (edge.parent, &edge.hooks) else {
        return None;
    };
    let (quiesce_counter, in_flight) = hooks.counters();
    Some(BackendView {
        id,
        name: hooks.name(),
        root: edge.id,
        quiesce_counter,
        in_flight,
    })
}
