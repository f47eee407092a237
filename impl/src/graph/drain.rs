//! Drain (graph.md 5): stop everything above a node, wait until it is idle, let it go on.
//!
//! Rules: a section is counted on its node and told once to each parent edge, so it propagates upwards, never down.
//! Beginning and ending never wait and never change the graph; only the top level of a begin waits, on
//! `Layer::inner.idle`, which everybody kicks who ends something. Counters obey, outside of a transition,
//! `quiesce_counter = sections on the node + drain-all sections + child edges that quiesce it`.

use std::rc::Rc;

use crate::Layer;
use crate::event::{Event, Parent};
use crate::graph::edge::Edge;
use crate::graph::node::Node;
use crate::types::NodeId;

/// A drained section that ends on drop. It does not keep the node: closing the node ends its sections.
#[derive(Debug)]
#[must_use]
pub struct DrainGuard {
    layer: Layer,
    node: NodeId,
}

impl Drop for DrainGuard {
    fn drop(&mut self) {
        if self.layer.node_exists(self.node) {
            self.layer.drained_end(self.node);
        }
    }
}

impl Layer {
    /// Begins a drained section: returns once nothing is in flight on the node and above, and nothing starts there
    /// through a parent until the matching [`Layer::drained_end`].
    pub async fn drained_begin(&self, node: NodeId) {
        self.emit(|| Event::DrainBegin { node });
        self.quiesce(&self.node(node));
        self.wait_idle(|| self.node_exists(node) && self.busy(&self.node(node), false))
            .await;
        self.emit(|| Event::Drained { node });
    }

    /// Ends one section.
    ///
    /// # Panics
    /// When none is open.
    pub fn drained_end(&self, node: NodeId) {
        self.emit(|| Event::DrainEnd { node });
        self.unquiesce(&self.node(node));
    }

    /// As [`Layer::drained_begin`], ending with the guard.
    pub async fn drained(&self, node: NodeId) -> DrainGuard {
        self.drained_begin(node).await;
        DrainGuard {
            layer: self.clone(),
            node,
        }
    }

    /// Begins a drained section on every node. New nodes are born drained until the end.
    pub async fn drain_all_begin(&self) {
        for node in self.nodes() {
            self.emit(|| Event::DrainBegin { node: node.id });
        }
        self.drain_all_begin_nopoll();
        self.wait_idle(|| self.any_busy()).await;
        for node in self.nodes() {
            assert_eq!(
                node.io.in_flight.count(),
                0,
                "{node:?} has requests in flight after drain-all"
            );
            self.emit(|| Event::Drained { node: node.id });
        }
    }

    /// Ends a [`Layer::drain_all_begin`].
    pub fn drain_all_end(&self) {
        for node in self.nodes() {
            self.emit(|| Event::DrainEnd { node: node.id });
        }
        self.drain_all_end_quiet();
    }

    /// Begins a section on every node without waiting.
    pub(super) fn drain_all_begin_nopoll(&self) {
        self.inner.graph.borrow_mut().drain_all += 1;
        let mut i = 0;
        while let Some(node) = self.live_node(i) {
            self.quiesce(&node);
            i += 1;
        }
    }

    /// Ends a section on every node.
    pub(super) fn drain_all_end_quiet(&self) {
        let mut i = 0;
        while let Some(node) = self.live_node(i) {
            self.unquiesce(&node);
            i += 1;
        }
        let mut graph = self.inner.graph.borrow_mut();
        assert!(graph.drain_all > 0, "drain-all ended more often than begun");
        graph.drain_all -= 1;
    }

    fn live_node(&self, i: usize) -> Option<Rc<Node>> {
        self.inner.graph.borrow().live.get(i).cloned()
    }

    fn any_busy(&self) -> bool {
        let mut i = 0;
        let mut busy = false;
        while let Some(node) = self.live_node(i) {
            busy |= self.busy(&node, true);
            i += 1;
        }
        busy
    }

    async fn wait_idle(&self, busy: impl Fn() -> bool) {
        while busy() {
            let progress = self.inner.idle.listen();
            if !busy() {
                break;
            }
            progress.await;
        }
    }

    /// Counts one section on a node; the first tells parents, then the driver.
    pub(super) fn quiesce(&self, node: &Rc<Node>) {
        let before = node.quiesce_counter.get();
        node.quiesce_counter.set(before + 1);
        if before > 0 {
            return;
        }
        self.for_parents(node, |edge| self.quiesce_parent(edge));
        if let Some(driver) = node.driver_opt() {
            driver.drain_begin(&self.cx(node));
        }
    }

    /// Uncounts one section; the last tells the driver, then parents.
    pub(super) fn unquiesce(&self, node: &Rc<Node>) {
        let before = node.quiesce_counter.get();
        assert!(
            before > 0,
            "{node:?}: drained section ended more often than begun"
        );
        node.quiesce_counter.set(before - 1);
        if before > 1 {
            return;
        }
        if let Some(driver) = node.driver_opt() {
            driver.drain_end(&self.cx(node));
        }
        self.for_parents(node, |edge| self.unquiesce_parent(edge));
    }

    /// Tells the parent of an edge that the child is drained.
    pub(super) fn quiesce_parent(&self, edge: &Edge) {
        assert!(
            !edge.quiesced_parent.replace(true),
            "{edge:?}: parent is told twice of a drain"
        );
        match edge.parent {
            Parent::Node(parent) => self.quiesce(&self.node(parent)),
            Parent::Backend(_) | Parent::Job(_) => hooks(edge).drained_begin(),
        }
    }

    /// Tells the parent of an edge that the child is no longer drained.
    pub(super) fn unquiesce_parent(&self, edge: &Edge) {
        assert!(
            edge.quiesced_parent.replace(false),
            "{edge:?}: parent was not told of a drain"
        );
        match edge.parent {
            Parent::Node(parent) => self.unquiesce(&self.node(parent)),
            Parent::Backend(_) | Parent::Job(_) => hooks(edge).drained_end(),
        }
    }

    /// Whether something that a drain of `node` waits for goes on. All parents are asked.
    pub(super) fn busy(&self, node: &Rc<Node>, ignore_node_parents: bool) -> bool {
        let mut busy = node.io.in_flight.count() > 0;
        self.for_parents(node, |edge| busy |= self.parent_busy(edge, ignore_node_parents));
        busy
    }

    /// Whether something goes on above an edge.
    pub(super) fn parent_busy(&self, edge: &Edge, ignore_node_parents: bool) -> bool {
        match edge.parent {
            Parent::Node(_) if ignore_node_parents => false,
            Parent::Node(parent) => self.busy(&self.node(parent), false),
            Parent::Backend(_) | Parent::Job(_) => hooks(edge).drained_poll(),
        }
    }

    /// Parent edges, newest first. `f` changes no list.
    fn for_parents(&self, node: &Node, mut f: impl FnMut(&Edge)) {
        let count = node.parents.borrow().len();
        for i in 0..count {
            let edge = node.parents.borrow()[i];
            f(&self.edge(edge));
        }
        assert_eq!(
            node.parents.borrow().len(),
            count,
            "{node:?}: a drain callback changed the graph"
        );
    }
}

fn hooks(edge: &Edge) -> &dyn crate::graph::edge::ParentHooks {
    edge.hooks
        .as_deref()
        .expect("an edge of a backend or a job has hooks")
}
