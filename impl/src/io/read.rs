//! Reads and prefetches: checks, padding, copy-on-read decision, zero-fill past the end.
//!
//! Rules: a read past the node's end yields zeroes, never an error; the part past the end never reaches the
//! driver, so a short backing file does not show what lies deeper. `PREFETCH` has no buffer: it only decides
//! whether to copy.

use std::rc::Rc;

use crate::Layer;
use crate::driver::{Cx, Driver};
use crate::error::Errno;
use crate::event::ReqKind;
use crate::graph::node::Node;
use crate::io::pad::Pad;
use crate::io::tracked::Request;
use crate::io::{align_up, below, check_request32, cor, max_transfer, size};
use crate::types::{EdgeId, ReqFlags};

impl Layer {
    /// Reads `buf.len()` bytes at `offset` through `edge`. Past the child's end reads zeroes.
    ///
    /// # Errors
    /// `EIO` beyond the largest offset, `ENOMEDIUM` without an open child, or what the driver says; the buffer's
    /// content is then unspecified.
    ///
    /// # Panics
    /// On flags that the child does not know.
    pub async fn read(
        &self,
        edge: EdgeId,
        offset: u64,
        buf: &mut [u8],
        mut flags: ReqFlags,
    ) -> Result<(), Errno> {
        assert!(!flags.contains(ReqFlags::PREFETCH), "a prefetch has no buffer");
        let (node, driver) = below(self, edge)?;
        let bytes = buf.len() as u64;
        check_request32(offset, bytes)?;
        let align = node.io.limits.get().request_alignment;
        if bytes == 0 && !offset.is_multiple_of(align) {
            return Ok(());
        }
        if node.io.copy_on_read.get() > 0 {
            flags |= ReqFlags::COPY_ON_READ;
        }
        if let Some(pad) = Pad::new(offset, bytes, align) {
            return Box::pin(self.padded_read(edge, &node, pad, buf, flags)).await;
        }
        let req = Request::begin(self, &node, edge, ReqKind::Read, (offset, bytes), flags);
        let result = if copies_here(&node, flags) {
            Box::pin(copying_read(&req, offset, buf, flags)).await
        } else {
            aligned_read(&req, &driver, offset, buf, flags).await
        };
        req.finish(result)
    }

    async fn padded_read(
        &self,
        edge: EdgeId,
        node: &Rc<Node>,
        pad: Pad,
        buf: &mut [u8],
        flags: ReqFlags,
    ) -> Result<(), Errno> {
        let req = Request::begin(self, node, edge, ReqKind::Read, (pad.start, pad.bytes), flags);
        let mut bounce = vec![0; size(pad.bytes)];
        let result = if copies_here(node, flags) {
            copying_read(&req, pad.start, &mut bounce, flags).await
        } else {
            aligned_read(&req, &node.driver(), pad.start, &mut bounce, flags).await
        };
        if result.is_ok() {
            buf.copy_from_slice(&bounce[pad.user()]);
        }
        req.finish(result)
    }

    /// Populates without returning data: `flags` gets PREFETCH, and COPY_ON_READ unless the child is a
    /// copy-on-read filter, which decides that itself.
    ///
    /// # Errors
    /// As [`Layer::read`].
    ///
    /// # Panics
    /// On flags that the child does not know.
    pub async fn prefetch(
        &self,
        edge: EdgeId,
        offset: u64,
        bytes: u64,
        flags: ReqFlags,
    ) -> Result<(), Errno> {
        let (node, driver) = below(self, edge)?;
        check_request32(offset, bytes)?;
        let align = node.io.limits.get().request_alignment;
        if bytes == 0 {
            return Ok(()); // nothing to populate
        }
        let mut flags = flags | ReqFlags::PREFETCH;
        if !node.facts.supported_read_flags.contains(ReqFlags::PREFETCH) || node.io.copy_on_read.get() > 0 {
            flags |= ReqFlags::COPY_ON_READ;
        }
        let (offset, bytes) = Pad::new(offset, bytes, align).map_or((offset, bytes), |p| (p.start, p.bytes));
        let req = Request::begin(self, &node, edge, ReqKind::Read, (offset, bytes), flags);
        let result = if copies_here(&node, flags) {
            Box::pin(copying_prefetch(&req, offset, bytes)).await
        } else {
            req.wait_for_conflicts().await;
            let end = align_up(self.node_length(&node).unwrap_or(0), align);
            let inside = bytes.min(end.saturating_sub(offset));
            match inside {
                0 => Ok(()),
                _ => driver.prefetch(&self.cx(&node), offset, inside, flags).await,
            }
        };
        req.finish(result)
    }
}

/// Copying is this node's business, not that of its filtered child.
fn copies_here(node: &Node, flags: ReqFlags) -> bool {
    flags.contains(ReqFlags::COPY_ON_READ)
        && !node.facts.supported_read_flags.contains(ReqFlags::COPY_ON_READ)
}

/// An aligned read that copies what is not allocated in the node itself.
async fn copying_read(req: &Request<'_>, offset: u64, buf: &mut [u8], flags: ReqFlags) -> Result<(), Errno> {
    let bytes = buf.len() as u64;
    if whole_is_allocated(req, offset, bytes).await? {
        let driver = req.node.driver();
        return read_pieces(
            req.layer,
            req.node,
            &driver,
            offset,
            buf,
            flags - ReqFlags::COPY_ON_READ,
        )
        .await;
    }
    cor::copy_on_read(req, offset, bytes, Some(buf)).await
}

async fn copying_prefetch(req: &Request<'_>, offset: u64, bytes: u64) -> Result<(), Errno> {
    if whole_is_allocated(req, offset, bytes).await? {
        return Ok(());
    }
    cor::copy_on_read(req, offset, bytes, None).await
}

/// Gives a copy-on-read request its clusters for itself, then looks whether there is anything to copy.
async fn whole_is_allocated(req: &Request<'_>, offset: u64, bytes: u64) -> Result<bool, Errno> {
    req.set_serialising(req.layer.cluster_alignment(req.node));
    req.wait_for_conflicts().await;
    let (allocated, pnum) = req.layer.is_allocated(req.node.id, offset, bytes).await?;
    Ok(allocated && pnum == bytes)
}

/// An aligned read without copying: waits for conflicts, then reads.
async fn aligned_read(
    req: &Request<'_>,
    driver: &Rc<dyn Driver>,
    offset: u64,
    buf: &mut [u8],
    flags: ReqFlags,
) -> Result<(), Errno> {
    req.wait_for_conflicts().await;
    read_pieces(req.layer, req.node, driver, offset, buf, flags).await
}

/// Hands an aligned range to the driver in pieces it can take; what is past the end is zero-filled here.
pub(crate) async fn read_pieces(
    layer: &Layer,
    node: &Rc<Node>,
    driver: &Rc<dyn Driver>,
    offset: u64,
    buf: &mut [u8],
    flags: ReqFlags,
) -> Result<(), Errno> {
    assert!(
        node.facts.supported_read_flags.contains(flags),
        "{node:?} ({}) does not know {flags:?}",
        node.facts.name
    );
    let align = node.io.limits.get().request_alignment;
    debug_assert!(offset.is_multiple_of(align) && (buf.len() as u64).is_multiple_of(align));
    let end = align_up(layer.node_length(node)?, align);
    let inside = size((buf.len() as u64).min(end.saturating_sub(offset)));
    let (buf, past_end) = buf.split_at_mut(inside);
    past_end.fill(0);
    if buf.is_empty() && !past_end.is_empty() {
        return Ok(());
    }
    let cx = Cx {
        layer: layer.clone(),
        node: Rc::clone(node),
    };
    let max = size(max_transfer(node));
    if buf.len() <= max {
        return driver.read(&cx, offset, buf, flags).await; // also the empty aligned request
    }
    let mut at = offset;
    for piece in buf.chunks_mut(max) {
        driver.read(&cx, at, piece, flags).await?;
        at += piece.len() as u64;
    }
    Ok(())
}
