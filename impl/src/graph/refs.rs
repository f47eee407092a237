//! References and the end of nodes (graph.md 1.6).
//!
//! Rules: whoever keeps a node over time holds a reference; edges do. At zero the node is queued; the main operation
//! that is under way closes the queue at its end with [`Layer::reap`], so nothing disappears in the middle of it.

use std::rc::Rc;

use crate::Layer;
use crate::event::Event;
use crate::graph::node::Node;
use crate::types::NodeId;

impl Layer {
    /// One more reference.
    ///
    /// # Panics
    /// On a node that already lost its last one.
    pub fn hold(&self, node: NodeId) {
        let node = self.node(node);
        assert!(node.refcnt.get() > 0, "{node:?} is held after its end");
        node.refcnt.set(node.refcnt.get() + 1);
    }

    /// One reference less; at zero the node waits to be reaped.
    ///
    /// # Panics
    /// When there is none left, or when the last goes while the node is in use.
    pub fn unhold(&self, node: NodeId) {
        let node = self.node(node);
        let left = node
            .refcnt
            .get()
            .checked_sub(1)
            .expect("a reference is dropped once");
        node.refcnt.set(left);
        if left == 0 {
            assert!(
                node.parents.borrow().is_empty(),
                "{node:?} has parents but no references"
            );
            self.inner.graph.borrow_mut().dead.push(node.id);
        }
    }

    /// Closes all nodes without references, and what that leaves without references. The caller holds no lock but the
    /// main lock.
    pub async fn reap(&self) {
        while let Some(node) = self.next_dead() {
            self.close_node(&node).await;
        }
    }

    fn next_dead(&self) -> Option<Rc<Node>> {
        let mut graph = self.inner.graph.borrow_mut();
        if graph.dead.is_empty() {
            return None;
        }
        let id = graph.dead.remove(0);
        graph.live.retain(|n| n.id != id);
        Some(graph.node(id))
    }

    /// `bdrv_close` and `bdrv_delete`. Lookups and drain-all no longer see the node.
    async fn close_node(&self, node: &Rc<Node>) {
        assert_eq!(node.refcnt.get(), 0, "{node:?}");
        assert!(
            node.parents.borrow().is_empty(),
            "{node:?} is closed with parents"
        );
        assert!(
            node.blockers.borrow().is_empty(),
            "{node:?} is closed with op blockers"
        );
        self.drained_begin(node.id).await;
        if let Some(driver) = node.driver_opt() {
            // Errors have nobody to go to: whoever cared for the data has flushed it.
            let _ = self.flush(node.id).await;
            let cx = self.cx(node);
            driver.unfreeze(&cx);
            let _ = driver.close(&cx).await;
            node.driver.replace(None);
        }
        if !node.children.borrow().is_empty() {
            let _write = self.graph_write().await;
            self.detach_children(node);
        }
        self.drained_end(node.id);
        // What is left are drain-all sections: their end will not find this node.
        while node.quiesce_counter.get() > 0 {
            self.unquiesce(node);
        }
        self.inner.graph.borrow_mut().nodes[node.id.0 as usize] = None;
        self.emit(|| Event::NodeRemoved { node: node.id });
    }

    fn detach_children(&self, node: &Node) {
        loop {
            let first = node.children.borrow().first().copied();
            let Some(edge) = first else { return };
            self.detach(edge);
        }
    }
}
