//! Truncate: changes a node's length with the new area locked.
//!
//! Rules: a node that grows over a longer backing file gets its new area zeroed, so that the backing file does not
//! show. Growing without ZERO_WRITE promises nothing else about the content.

use std::rc::Rc;

use crate::Layer;
use crate::driver::Driver;
use crate::error::{Errno, QmpError};
use crate::event::ReqKind;
use crate::graph::node::Node;
use crate::io::status::forget_cached;
use crate::io::tracked::Request;
use crate::io::write::{finish, prepare};
use crate::io::{below, check_request};
use crate::types::{EdgeId, ReqFlags};

impl Layer {
    /// Changes the length of the child to `length` bytes. `exact`: a device may not stay larger.
    ///
    /// # Errors
    /// `No medium inserted`, `Image is read-only`, and the driver's refusals.
    ///
    /// # Panics
    /// When the edge lacks RESIZE: the caller's bug.
    pub async fn truncate(
        &self,
        edge: EdgeId,
        length: u64,
        exact: bool,
        flags: ReqFlags,
    ) -> Result<(), QmpError> {
        let (node, driver) = below(self, edge).map_err(|_| QmpError::generic("No medium inserted"))?;
        check_request(length, 0).map_err(|e| QmpError::errno("Image size is too large", e))?;
        let old = self
            .node_length(&node)
            .map_err(|e| QmpError::errno("Failed to get old image size", e))?;
        if !node.is_writable() {
            return Err(QmpError::generic("Image is read-only"));
        }
        let grown = length.saturating_sub(old);
        let req = Request::begin(
            self,
            &node,
            edge,
            ReqKind::Truncate,
            (length - grown, grown),
            flags,
        );
        if grown > 0 {
            req.set_serialising(1);
        }
        if let Err(e) = prepare(&req, length - grown, grown, ReqFlags::empty()).await {
            let _: Result<(), Errno> = req.finish(Err(e));
            return Err(QmpError::errno("Failed to prepare request for truncation", e));
        }
        let result = self
            .truncate_node(&node, &driver, old, length, exact, flags)
            .await;
        // A driver that fails has changed nothing that the node's length would have to follow.
        if result.is_ok() {
            finish(&node, ReqKind::Truncate, length - grown, grown, Ok(()));
            self.refresh_length(node.id)?;
        }
        let _: Result<(), Errno> = req.finish(result.as_ref().copied().map_err(|_| Errno::EIO));
        result
    }

    async fn truncate_node(
        &self,
        node: &Rc<Node>,
        driver: &Rc<dyn Driver>,
        old: u64,
        length: u64,
        exact: bool,
        mut flags: ReqFlags,
    ) -> Result<(), QmpError> {
        if length > old && self.backing_shows(node, old)? {
            flags |= ReqFlags::ZERO_WRITE;
        }
        if length < old {
            forget_cached(node, length, old - length);
        }
        let cx = self.cx(node);
        if node.facts.is_filter {
            // Filters forward; each says so by not implementing it.
            let child = node
                .primary_edge()
                .ok_or_else(|| QmpError::generic("No medium inserted"))?;
            return Box::pin(self.truncate(child, length, exact, flags)).await;
        }
        if !node.io.write_flags.get().truncate.contains(flags) {
            return Err(QmpError::generic("Block driver does not support requested flags"));
        }
        driver.truncate(&cx, length, exact, flags).await
    }

    /// Whether the backing file reaches beyond `old`.
    fn backing_shows(&self, node: &Rc<Node>, old: u64) -> Result<bool, QmpError> {
        let Some(backing) = node
            .backing
            .get()
            .filter(|_| !node.facts.is_filter)
            .and_then(|e| self.child(e))
        else {
            return Ok(false);
        };
        let length = self
            .node_length(&backing)
            .map_err(|e| QmpError::errno("Could not get backing file size", e))?;
        Ok(length > old)
    }
}
