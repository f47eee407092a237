//! The layer: one block graph with its jobs, driven by one thread.
//!
//! [`Layer`] is a cheap handle. Its state is split by owner: `graph` (nodes, edges, backends), `jobs`, and the
//! two locks. Every multi-step operation of the main context (a command, the end of a job) holds the main lock
//! from its first step to its last, so that commands and job completions are totally ordered; guest requests,
//! job I/O and drained sections go on beside it.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::rc::Rc;

use crate::driver::Cx;
use crate::env::Env;
use crate::event::{Event, Observer};
use crate::graph::Graph;
use crate::graph::node::Node;
use crate::jobs::Jobs;
use crate::qmp::Exports;
use crate::sync::{GraphLock, MainLock, WaitQueue};
use crate::throttle::Groups;
use crate::types::{EdgeId, NodeId};

/// A handle to one block layer.
#[derive(Clone)]
pub struct Layer {
    pub(crate) inner: Rc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) env: Rc<dyn Env>,
    pub(crate) observer: Option<Rc<dyn Observer>>,
    /// Nodes, edges, backends. Borrowed for the length of one synchronous step only.
    pub(crate) graph: RefCell<Graph>,
    /// Jobs, newest first where listed.
    pub(crate) jobs: RefCell<Jobs>,
    /// Exports, oldest first.
    pub(crate) exports: RefCell<Exports>,
    /// Throttle groups.
    pub(crate) throttle: Groups,
    /// Readers: requests in flight and walks of jobs. Writer: a graph change.
    pub(crate) graph_lock: GraphLock,
    /// Held by one main-context operation at a time.
    pub(crate) main_lock: MainLock,
    /// Kicked whenever something that a drain may wait for made progress.
    pub(crate) idle: WaitQueue,
    /// For request ids.
    pub(crate) next_request: Cell<u64>,
}

impl fmt::Debug for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Layer")
    }
}

impl Layer {
    /// An empty layer over `env`, observed by `observer`.
    #[must_use]
    pub fn new(env: Rc<dyn Env>, observer: Option<Rc<dyn Observer>>) -> Layer {
        Layer {
            inner: Rc::new(Inner {
                env,
                observer,
                graph: RefCell::default(),
                jobs: RefCell::default(),
                exports: RefCell::default(),
                throttle: Groups::default(),
                graph_lock: GraphLock::default(),
                main_lock: MainLock::default(),
                idle: WaitQueue::default(),
                next_request: Cell::new(0),
            }),
        }
    }

    /// The environment.
    #[must_use]
    pub fn env(&self) -> &dyn Env {
        &*self.inner.env
    }

    /// Tells the observer.
    #[inline]
    pub(crate) fn emit(&self, event: impl FnOnce() -> Event) {
        if let Some(observer) = &self.inner.observer {
            observer.event(&event());
        }
    }

    /// A node that is known to exist.
    ///
    /// # Panics
    /// On an unknown id: a bug of ours.
    #[must_use]
    pub fn node(&self, id: NodeId) -> Rc<Node> {
        self.inner.graph.borrow().node(id)
    }

    /// A driver's context for a node.
    #[must_use]
    pub fn cx(&self, node: &Rc<Node>) -> Cx {
        Cx {
            layer: self.clone(),
            node: Rc::clone(node),
        }
    }

    /// The node below an edge.
    #[must_use]
    pub fn child(&self, edge: EdgeId) -> Option<Rc<Node>> {
        let graph = self.inner.graph.borrow();
        graph.edge(edge).child.get().map(|id| graph.node(id))
    }

    /// The `filename` of an edge's child; empty without one.
    #[must_use]
    pub fn child_filename(&self, edge: Option<EdgeId>) -> String {
        let Some(child) = edge.and_then(|e| self.child(e)) else {
            return String::new();
        };
        let driver = child.driver_opt();
        driver.map_or_else(String::new, |d| d.filename(&self.cx(&child)))
    }

    /// Something a drain may wait for made progress.
    #[inline]
    pub(crate) fn kick(&self) {
        self.inner.idle.wake_all();
    }
}
