//! Discards: dropped unless the node was opened with `discard=unmap`; split at the discard unit.
//!
//! Rules: partial units are handed to the driver too (it may know better), in pieces of their own, so that a
//! driver which ignores them does not ignore the whole. `ENOTSUP` of a piece is not an error, any other is.

use std::rc::Rc;

use crate::Layer;
use crate::driver::{Cx, Driver};
use crate::error::Errno;
use crate::event::ReqKind;
use crate::graph::node::Node;
use crate::io::status::forget_cached;
use crate::io::tracked::Request;
use crate::io::write::{finish, prepare};
use crate::io::{align_down, below, check_request, min_nonzero};
use crate::types::{EdgeId, OpenFlags, ReqFlags};

impl Layer {
    /// Discards. What the range reads as afterwards is the driver's choice (old content or zeroes).
    ///
    /// # Errors
    /// `EIO` beyond the largest offset, `EPERM` on a read-only node, `ENOMEDIUM` without an open child, or what
    /// the driver says.
    ///
    /// # Panics
    /// When the edge lacks the permission: the caller's bug.
    pub async fn discard(&self, edge: EdgeId, offset: u64, bytes: u64) -> Result<(), Errno> {
        let (node, driver) = below(self, edge)?;
        check_request(offset, bytes)?;
        if !node.flags.get().contains(OpenFlags::UNMAP) || !node.facts.has_discard {
            return Ok(());
        }
        forget_cached(&node, offset, bytes);
        let req = Request::begin(
            self,
            &node,
            edge,
            ReqKind::Discard,
            (offset, bytes),
            ReqFlags::empty(),
        );
        let result = match prepare(&req, offset, bytes, ReqFlags::empty()).await {
            Ok(()) => discard_pieces(self, &node, &driver, offset, bytes).await,
            Err(e) => Err(e),
        };
        finish(&node, ReqKind::Discard, offset, bytes, result);
        req.finish(result)
    }
}

async fn discard_pieces(
    layer: &Layer,
    node: &Rc<Node>,
    driver: &Rc<dyn Driver>,
    mut offset: u64,
    bytes: u64,
) -> Result<(), Errno> {
    let limits = node.io.limits.get();
    let unit = limits.pdiscard_alignment.max(limits.request_alignment);
    let max = align_down(min_nonzero(limits.max_pdiscard, i64::MAX.unsigned_abs()), unit);
    assert!(max > 0, "max_pdiscard of {node:?} holds at least one unit");
    let cx = Cx {
        layer: layer.clone(),
        node: Rc::clone(node),
    };
    let end = offset + bytes;
    while offset < end {
        let n = piece(offset, end, unit, limits.request_alignment, max);
        match driver.discard(&cx, offset, n).await {
            Ok(()) | Err(Errno::ENOTSUP) => offset += n,
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Length of the next piece of `[offset, end)`: first to the next block, then to the next unit, whole units, the
/// blocks of the last unit, and what is left of the last block.
fn piece(offset: u64, end: u64, unit: u64, align: u64, max: u64) -> u64 {
    let bytes = end - offset;
    let (head, tail) = (offset % unit, end % unit);
    let n = if head != 0 {
        let n = bytes.min(unit - head);
        if n.is_multiple_of(align) { n } else { n % align }
    } else if tail != 0 {
        if bytes > unit {
            bytes - tail
        } else if !tail.is_multiple_of(align) && tail > align {
            bytes - tail % align
        } else {
            bytes
        }
    } else {
        bytes
    };
    n.min(max)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(mut offset: u64, end: u64, unit: u64, align: u64, max: u64) -> Vec<(u64, u64)> {
        let mut all = Vec::new();
        while offset < end {
            let n = piece(offset, end, unit, align, max);
            assert!(n > 0 && n <= max, "{offset}..{end}");
            all.push((offset, n));
            offset += n;
        }
        all
    }

    #[test]
    fn whole_units_stay_together() {
        assert_eq!(pieces(4096, 16384, 4096, 512, 1 << 40), [(4096, 12288)]);
        assert_eq!(
            pieces(4096, 16384, 4096, 512, 4096),
            [(4096, 4096), (8192, 4096), (12288, 4096)]
        );
    }

    #[test]
    fn partial_units_get_pieces_of_their_own() {
        assert_eq!(
            pieces(3584, 12800, 4096, 512, 1 << 40),
            [(3584, 512), (4096, 8192), (12288, 512)],
            "block-aligned ends"
        );
        assert_eq!(
            pieces(3500, 12900, 4096, 512, 1 << 40),
            [(3500, 84), (3584, 512), (4096, 8192), (12288, 512), (12800, 100)],
            "unaligned ends"
        );
    }

    #[test]
    fn inside_one_block() {
        assert_eq!(pieces(10, 20, 4096, 512, 1 << 40), [(10, 10)]);
        assert_eq!(pieces(0, 20, 4096, 512, 1 << 40), [(0, 20)]);
    }
}
