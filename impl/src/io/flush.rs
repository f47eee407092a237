//! Flush: driver caches to the file, the file to the medium, then every child that may have been written,
//! unless the driver says that it is none of the node's business.
//!
//! Rules: one flush at a time per node, the others queue. The write generation is taken before queueing: writes
//! that finish later are not promised. The disk flush of a node without new writes is skipped, its children are
//! visited all the same (copy-on-read writes do not count as writes of the overlay, their data is in the children).

use std::rc::Rc;

use crate::Layer;
use crate::error::Errno;
use crate::event::{Event, ReqKind};
use crate::graph::node::Node;
use crate::io::tracked::{InFlightGuard, next_id};
use crate::types::{EdgeId, NodeId, OpenFlags, Perm, ReqFlags};

impl Layer {
    /// Flushes a node and every child it may write to. On a read-only or closed node there is nothing to do.
    ///
    /// # Errors
    /// The first error; the remaining children are flushed nevertheless.
    pub async fn flush(&self, node: NodeId) -> Result<(), Errno> {
        self.flush_through(EdgeId::NONE, node).await
    }

    /// The same for a request that came through `edge`.
    pub(crate) async fn flush_through(&self, edge: EdgeId, node: NodeId) -> Result<(), Errno> {
        let node = self.node(node);
        if node.driver_opt().is_none() || !node.is_writable() {
            return Ok(());
        }
        let _in_flight = InFlightGuard::new(self, &node);
        let (request, id) = (next_id(self), node.id);
        let (kind, flags) = (ReqKind::Flush, ReqFlags::empty());
        self.emit(|| Event::RequestBegin {
            request,
            node: id,
            edge,
            kind,
            offset: 0,
            bytes: 0,
            flags,
        });
        let generation = node.io.write_gen.get();
        while node.io.flush_active.get() {
            let turn = node.io.flush_queue.listen();
            turn.await;
        }
        let active = Active::begin(&node);
        let result = self.flush_node(&node, generation).await;
        if result.is_ok() {
            node.io.flushed_gen.set(generation);
        }
        drop(active);
        self.emit(|| Event::RequestEnd {
            request,
            node: id,
            result,
        });
        result
    }

    async fn flush_node(&self, node: &Rc<Node>, generation: u32) -> Result<(), Errno> {
        let driver = node.driver_opt().ok_or(Errno::ENOMEDIUM)?;
        let cx = self.cx(node);
        driver.flush_to_os(&cx).await?;
        let unsafe_cache = node.flags.get().contains(OpenFlags::NO_FLUSH);
        if !unsafe_cache && node.io.flushed_gen.get() != generation {
            driver.flush_to_disk(&cx).await?;
        }
        self.flush_children(node).await
    }

    async fn flush_children(&self, node: &Rc<Node>) -> Result<(), Errno> {
        let mut result = Ok(());
        let children = node.children.borrow().clone();
        let (cx, driver) = (self.cx(node), node.driver());
        for edge in children.into_iter().filter(|edge| driver.flushes(&cx, *edge)) {
            let (perm, child) = {
                let edge = self.edge(edge);
                (edge.perm.get(), edge.child.get())
            };
            let Some(child) = child else { continue };
            if perm.intersects(Perm::WRITE | Perm::WRITE_UNCHANGED) {
                let flushed = Box::pin(self.flush_through(edge, child)).await;
                result = result.and(flushed);
            }
        }
        result
    }
}

/// The one active flush of a node.
struct Active<'a>(&'a Node);

impl<'a> Active<'a> {
    fn begin(node: &'a Node) -> Active<'a> {
        assert!(
            !node.io.flush_active.replace(true),
            "one flush at a time on {node:?}"
        );
        Active(node)
    }
}

impl Drop for Active<'_> {
    fn drop(&mut self) {
        self.0.io.flush_active.set(false);
        self.0.io.flush_queue.wake_one();
    }
}
