//! The node graph: structure, walks, permissions, freezing, drain, transactional change, open and close.
//!
//! Rules: identifiers are dense, never reused, and ordered by creation, so walking by identifier is walking QEMU's lists
//! from head to tail. The `RefCell` around [`Graph`] is borrowed inside single statements of this module tree only:
//! never while calling a driver, a hook or an observer. Every structural change goes through `tran`, which can undo it.
//!
//! Who does what: `tran` primitives with undo; `change` the operations; `perm` masks; `drain`; `freeze`; `walk`;
//! `blockers`; `refs` references and close; `reopen` options; `resize`; `transaction` snapshots, all or none; `lock`; `inspect` for oracles; `open`.

pub mod blockers;
mod change;
#[cfg(test)]
mod change_tests;
mod drain;
#[cfg(test)]
mod drain_tests;
pub mod edge;
mod freeze;
pub mod inspect;
mod lock;
pub mod node;
pub mod open;
pub mod perm;
#[cfg(test)]
mod perm_tests;
mod refs;
mod reopen;
mod resize;
#[cfg(test)]
mod testing;
mod tran;
pub(crate) mod transaction;
#[cfg(test)]
mod transaction_tests;
mod walk;

pub use drain::DrainGuard;
pub use edge::ParentHooks;
pub use lock::{GraphReadGuard, GraphWriteGuard, MainGuard};

use std::cell::Cell;
use std::rc::Rc;

use serde_json::{Map, Value};

use crate::Layer;
use crate::driver::{Driver, DriverFacts};
use crate::error::QmpError;
use crate::event::{Event, Parent};
use crate::types::{BackendId, EdgeId, NodeId, OpenFlags};
use edge::Edge;
use node::Node;

/// Longest node-name, bytes.
const NODE_NAME_MAX: usize = 31;

/// Nodes, edges and backends of one layer.
#[derive(Debug, Default)]
pub struct Graph {
    /// By id; `None` once removed.
    nodes: Vec<Option<Rc<Node>>>,
    /// By id; `None` once detached.
    edges: Vec<Option<Rc<Edge>>>,
    /// Nodes that can be found by name and that drain-all sees, in creation order. A node being closed has left.
    live: Vec<Rc<Node>>,
    /// Nodes whose last reference went, in that order; `reap` closes them.
    dead: Vec<NodeId>,
    /// Open drain-all sections.
    drain_all: u32,
    /// For generated node names.
    auto_names: u32,
    next_backend: u32,
    /// Current walk, see `Node::mark`.
    walk: Cell<u32>,
}

impl Graph {
    /// A node that is known to exist.
    pub(crate) fn node(&self, id: NodeId) -> Rc<Node> {
        Rc::clone(self.nodes[id.0 as usize].as_ref().expect("node id is live"))
    }

    /// A node, if it still exists.
    pub(crate) fn try_node(&self, id: NodeId) -> Option<&Rc<Node>> {
        self.nodes.get(id.0 as usize).and_then(Option::as_ref)
    }

    /// An edge that is known to exist.
    pub(crate) fn edge(&self, id: EdgeId) -> &Rc<Edge> {
        self.edges[id.0 as usize].as_ref().expect("edge id is live")
    }

    /// Edges that exist, oldest first.
    fn edges(&self) -> impl Iterator<Item = &Rc<Edge>> {
        self.edges.iter().flatten()
    }

    fn next_edge_id(&self) -> EdgeId {
        EdgeId(u32::try_from(self.edges.len()).expect("fewer than 2^32 edges"))
    }

    fn next_node_id(&self) -> NodeId {
        NodeId(u32::try_from(self.nodes.len()).expect("fewer than 2^32 nodes"))
    }
}

impl Layer {
    /// An edge that is known to exist.
    ///
    /// # Panics
    /// On an unknown or detached edge: a bug of ours.
    #[inline]
    #[must_use]
    pub fn edge(&self, edge: EdgeId) -> Rc<Edge> {
        Rc::clone(self.inner.graph.borrow().edge(edge))
    }

    /// Whether the node still exists (it may be closing).
    #[must_use]
    pub fn node_exists(&self, node: NodeId) -> bool {
        self.inner.graph.borrow().try_node(node).is_some()
    }

    /// A node by its node-name (graph.md 1.8 `bdrv_find_node`).
    #[must_use]
    pub fn find_node(&self, name: &str) -> Option<NodeId> {
        self.inner
            .graph
            .borrow()
            .live
            .iter()
            .find(|n| &*n.name == name)
            .map(|n| n.id)
    }

    /// All nodes that are not being closed, in creation order.
    #[must_use]
    pub fn nodes(&self) -> Vec<Rc<Node>> {
        self.inner.graph.borrow().live.clone()
    }

    /// A fresh backend identity.
    pub(crate) fn new_backend_id(&self) -> BackendId {
        let mut graph = self.inner.graph.borrow_mut();
        let id = BackendId(graph.next_backend);
        graph.next_backend += 1;
        id
    }

    /// A new node without driver and children; the caller owns its one reference. `None` as name generates one.
    ///
    /// Inside drain-all sections it starts drained, once per section.
    pub fn new_node(
        &self,
        facts: &'static DriverFacts,
        name: Option<&str>,
        flags: OpenFlags,
        options: Map<String, Value>,
    ) -> Result<Rc<Node>, QmpError> {
        let name: Rc<str> = match name {
            Some(name) => {
                self.check_node_name(name)?;
                name.into()
            }
            None => self.generate_node_name(),
        };
        let (node, sections) = {
            let mut graph = self.inner.graph.borrow_mut();
            let node = Rc::new(Node::new(graph.next_node_id(), name, facts, flags, options));
            graph.nodes.push(Some(Rc::clone(&node)));
            graph.live.push(Rc::clone(&node));
            (node, graph.drain_all)
        };
        self.emit(|| Event::NodeAdded {
            node: node.id,
            name: Rc::clone(&node.name),
            driver: facts.name,
        });
        for _ in 0..sections {
            self.quiesce(&node);
        }
        Ok(node)
    }

    /// Installs an opened driver. A node that became drained while it was opened tells the driver now, once.
    ///
    /// # Panics
    /// When the node already has a driver.
    pub fn set_driver(&self, node: &Rc<Node>, driver: Rc<dyn Driver>) {
        let before = node.driver.replace(Some(driver));
        assert!(before.is_none(), "{node:?} is opened twice");
        if node.quiesce_counter.get() > 0 {
            node.driver().drain_begin(&self.cx(node));
        }
    }

    /// The checks of graph.md 1.7.1, in its order.
    fn check_node_name(&self, name: &str) -> Result<(), QmpError> {
        let mut chars = name.bytes();
        let well_formed = chars.next().is_some_and(|c| c.is_ascii_alphabetic())
            && chars.all(|c| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'.' | b'_'));
        if !well_formed {
            return Err(QmpError::generic(format!("Invalid node-name: '{name}'")));
        }
        let graph = self.inner.graph.borrow();
        let is_backend = |e: &Rc<Edge>| {
            matches!(e.parent, Parent::Backend(_))
                && e.hooks
                    .as_ref()
                    .and_then(|h| h.name())
                    .is_some_and(|n| &*n == name)
        };
        if graph.edges().any(is_backend) {
            return Err(QmpError::generic(format!(
                "node-name={name} is conflicting with a device id"
            )));
        }
        if graph.live.iter().any(|n| &*n.name == name) {
            return Err(QmpError::generic(format!(
                "Duplicate nodes with node-name='{name}'"
            )));
        }
        if name.len() > NODE_NAME_MAX {
            return Err(QmpError::generic("Node name too long"));
        }
        Ok(())
    }

    /// `#block`, a counter, and QEMU's two random digits, which are always 00 here.
    fn generate_node_name(&self) -> Rc<str> {
        let mut graph = self.inner.graph.borrow_mut();
        let n = graph.auto_names;
        graph.auto_names += 1;
        format!("#block{n}00").into()
    }
}
