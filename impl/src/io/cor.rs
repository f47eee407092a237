//! Copy-on-read of one node: what is read and not allocated in the node is also written to it.
//!
//! Rules: the request has its clusters for itself, so no guest write can come between the read and the write. The
//! copied data passes through a private buffer; a guest that scribbles over its own buffer cannot reach the image.
//! Only "allocated in this node?" is asked: ranges that no layer has are copied too, as zeroes. The copy goes
//! straight to the driver and does not count as a write (no generation, no growth), since what can be seen does
//! not change. A failed copy fails the read.
//!
//! Deviation D-17: with an alignment above 512 and a length that is no multiple of it, QEMU's loop meets the end of
//! the image inside the padded request and aborts. Here the loop ends at the node's length.

use std::rc::Rc;
use std::sync::Arc;

use crate::driver::Driver;
use crate::error::Errno;
use crate::event::Event;
use crate::io::read::read_pieces;
use crate::io::tracked::Request;
use crate::io::write::driver_write;
use crate::io::zero::write_zeroes_pieces;
use crate::io::{MAX_BOUNCE, align_down, align_up, is_zero, min_nonzero, size};
use crate::types::{REQUEST_MAX_BYTES, ReqFlags};

/// Reads `[offset, offset + bytes)` (aligned) into `out`, if any, and populates the node with it.
pub(crate) async fn copy_on_read(
    req: &Request<'_>,
    offset: u64,
    bytes: u64,
    mut out: Option<&mut [u8]>,
) -> Result<(), Errno> {
    let (layer, node) = (req.layer, req.node);
    let driver = node.driver_opt().ok_or(Errno::ENOMEDIUM)?;
    let limits = node.io.limits.get();
    let align = limits.request_alignment;
    let unit = driver
        .info(&layer.cx(node))
        .map_or(1, |i| i.subcluster_size.max(1));
    let end = align_up(offset + bytes, unit).min(layer.node_length(node)?);
    let largest = min_nonzero(limits.max_transfer, REQUEST_MAX_BYTES);
    let mut bounce = Vec::new();
    let mut at = align_down(offset, unit);
    while at < end {
        let want = (end - at).min(largest);
        // An error here counts as unallocated: the read that follows reports it.
        let (allocated, mut n) = layer
            .is_allocated(node.id, at, want)
            .await
            .unwrap_or((false, want));
        assert!(n > 0, "status makes progress before the end of {node:?}");
        if !allocated {
            n = n.min(MAX_BOUNCE);
            bounce.resize(size(align_up(n, align)), 0);
            read_pieces(layer, node, &driver, at, &mut bounce, ReqFlags::empty()).await?;
            let lent = Arc::new(bounce);
            layer.env().lend(&lent);
            populate(req, &driver, at, &lent).await?;
            bounce = Arc::try_unwrap(lent).expect("whoever helped has given it back");
        }
        if let Some(out) = out.as_deref_mut() {
            let from = at.max(offset);
            let to = (at + n).min(offset + bytes);
            if from < to && allocated {
                let whole = align_up(to, align).min(offset + bytes);
                let part = &mut out[size(from - offset)..size(whole - offset)];
                read_pieces(layer, node, &driver, from, part, ReqFlags::empty()).await?;
            } else if from < to {
                let part = &mut out[size(from - offset)..size(to - offset)];
                part.copy_from_slice(&bounce[size(from - at)..size(to - at)]);
            }
        }
        at += n;
    }
    if let Some(out) = out {
        let past_end = (offset + bytes).saturating_sub(end.max(offset)).min(bytes);
        let inside = out.len() - size(past_end);
        out[inside..].fill(0);
    }
    Ok(())
}

/// Writes a copied chunk to the node it was read through.
async fn populate(req: &Request<'_>, driver: &Rc<dyn Driver>, offset: u64, data: &[u8]) -> Result<(), Errno> {
    let (layer, node, bytes) = (req.layer, req.node, data.len() as u64);
    debug_assert!(
        Rc::ptr_eq(driver, &node.driver()),
        "nobody closes a node with a request in flight"
    );
    let zero = node.facts.has_write_zeroes && is_zero(data);
    layer.emit(|| Event::CopyOnRead {
        node: node.id,
        offset,
        bytes,
        zero,
    });
    if zero {
        // Never MAY_UNMAP: the copy must stay when the backing file goes.
        write_zeroes_pieces(
            None,
            layer,
            node,
            offset,
            bytes,
            ReqFlags::ZERO_WRITE | ReqFlags::WRITE_UNCHANGED,
        )
        .await
    } else {
        driver_write(layer, node, offset, data, ReqFlags::WRITE_UNCHANGED).await
    }
}
