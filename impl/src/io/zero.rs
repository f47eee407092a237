//! Zero writes: unaligned ends as data, the middle through the driver's zero write or, failing that, as a buffer.
//!
//! Rules: with NO_FALLBACK a driver's `ENOTSUP` goes to the caller (earlier pieces may be zeroed already); without
//! it, it means "write a buffer of zeroes". The block-status cache forgets the range first.

use std::rc::Rc;

use crate::Layer;
use crate::driver::Cx;
use crate::error::Errno;
use crate::event::ReqKind;
use crate::graph::node::Node;
use crate::io::pad::Pad;
use crate::io::status::forget_cached;
use crate::io::tracked::Request;
use crate::io::write::{Payload, aligned_write, driver_write, lock_blocks, read_blocks};
use crate::io::{MAX_BOUNCE, align_down, below, check_request, min_nonzero, size};
use crate::types::{EdgeId, OpenFlags, ReqFlags};

impl Layer {
    /// Writes zeroes. Flags: MAY_UNMAP, NO_FALLBACK, and those of [`Layer::write`].
    ///
    /// # Errors
    /// As [`Layer::write`]; `ENOTSUP` with NO_FALLBACK where zeroing is not cheap.
    ///
    /// # Panics
    /// When the edge lacks the permission: the caller's bug.
    pub async fn write_zeroes(
        &self,
        edge: EdgeId,
        offset: u64,
        bytes: u64,
        flags: ReqFlags,
    ) -> Result<(), Errno> {
        let flags = flags | ReqFlags::ZERO_WRITE;
        let (node, _) = below(self, edge)?;
        check_request(offset, bytes)?;
        let align = node.io.limits.get().request_alignment;
        if flags.contains(ReqFlags::NO_FALLBACK) && !(offset | bytes).is_multiple_of(align) {
            return Err(Errno::ENOTSUP);
        }
        if bytes == 0 && !offset.is_multiple_of(align) {
            return Ok(());
        }
        let req = Request::begin(self, &node, edge, ReqKind::WriteZeroes, (offset, bytes), flags);
        let result = match Pad::new(offset, bytes, align) {
            None if bytes == 0 => Ok(()),
            None => aligned_write(&req, offset, Payload::Zero(bytes), flags).await,
            Some(pad) => Box::pin(padded_zeroes(&req, pad, align, flags)).await,
        };
        req.finish(result)
    }
}

/// An unaligned zero write: each partial end block is written as data, the aligned middle as zeroes.
async fn padded_zeroes(req: &Request<'_>, pad: Pad, align: u64, flags: ReqFlags) -> Result<(), Errno> {
    assert!(!flags.contains(ReqFlags::NO_WAIT), "a padded write has to wait");
    let data_flags = flags - ReqFlags::ZERO_WRITE;
    lock_blocks(req).await;
    if pad.merge() {
        let mut block = vec![0; size(pad.bytes)];
        read_blocks(req, pad.start, &mut block).await?;
        block[pad.user()].fill(0);
        return aligned_write(req, pad.start, Payload::Data(&block), data_flags).await;
    }
    // Only the end blocks are ever in memory: the request itself may be huge. Both are read before anything is
    // written, so that a failed read leaves the image as it was.
    let end = pad.start + pad.bytes;
    let mut head = vec![0; if pad.head > 0 { size(align) } else { 0 }];
    if !head.is_empty() {
        read_blocks(req, pad.start, &mut head).await?;
        head[size(pad.head)..].fill(0);
    }
    let mut tail = vec![0; if pad.tail > 0 { size(align) } else { 0 }];
    if !tail.is_empty() {
        read_blocks(req, end - align, &mut tail).await?;
        tail[..size(align - pad.tail)].fill(0);
    }
    if !head.is_empty() {
        aligned_write(req, pad.start, Payload::Data(&head), data_flags).await?;
    }
    let middle = pad.start + head.len() as u64;
    let middle_end = end - tail.len() as u64;
    if middle < middle_end {
        aligned_write(req, middle, Payload::Zero(middle_end - middle), flags).await?;
    }
    if !tail.is_empty() {
        aligned_write(req, middle_end, Payload::Data(&tail), data_flags).await?;
    }
    Ok(())
}

/// Zeroes an aligned range piece by piece. `req`: the tracked request behind it, if there is one of type write.
pub(crate) async fn write_zeroes_pieces(
    req: Option<&Request<'_>>,
    layer: &Layer,
    node: &Rc<Node>,
    mut offset: u64,
    bytes: u64,
    mut flags: ReqFlags,
) -> Result<(), Errno> {
    let supported = node.io.write_flags.get();
    if (flags - supported.zero).contains(ReqFlags::NO_FALLBACK) {
        return Err(Errno::ENOTSUP);
    }
    if !node.flags.get().contains(OpenFlags::UNMAP) {
        flags.remove(ReqFlags::MAY_UNMAP);
    }
    forget_cached(node, offset, bytes);
    if let Some(req) = req {
        lock_end_of_file(req, offset, bytes).await;
    }
    let limits = node.io.limits.get();
    let align = limits.pwrite_zeroes_alignment.max(limits.request_alignment);
    let max_zero = align_down(
        min_nonzero(limits.max_pwrite_zeroes, i64::MAX.unsigned_abs()),
        align,
    );
    let max_bounce = align_down(
        min_nonzero(limits.max_transfer, MAX_BOUNCE),
        limits.request_alignment,
    )
    .max(limits.request_alignment);
    assert!(
        max_zero > 0,
        "max_pwrite_zeroes of {node:?} holds at least one unit"
    );
    let mut zeroes = Vec::new();
    let mut flush = false;
    let end = offset + bytes;
    while offset < end {
        let mut n = zero_piece(offset, end, align, max_zero, max_bounce);
        let mut result = Err(Errno::ENOTSUP);
        if node.facts.has_write_zeroes {
            let driver = node.driver_opt().ok_or(Errno::ENOMEDIUM)?;
            let cx = Cx {
                layer: layer.clone(),
                node: Rc::clone(node),
            };
            result = driver.write_zeroes(&cx, offset, n, flags & supported.zero).await;
        }
        if result != Err(Errno::ENOTSUP) {
            flush |= (flags - supported.zero).contains(ReqFlags::FUA);
        } else if !flags.contains(ReqFlags::NO_FALLBACK) {
            n = n.min(max_bounce);
            zeroes.resize(size(max_bounce.min(bytes)), 0);
            // An emulated FUA is one flush at the very end.
            let emulated = (flags - supported.write) & ReqFlags::FUA;
            flush |= !emulated.is_empty();
            let data_flags = flags - ReqFlags::ZERO_WRITE - emulated;
            result = driver_write(layer, node, offset, &zeroes[..size(n)], data_flags).await;
        }
        result?;
        offset += n;
    }
    if flush {
        Box::pin(layer.flush(node.id)).await
    } else {
        Ok(())
    }
}

/// Length of the next piece of `[offset, end)`: up to the first unit boundary, then whole units, then the rest.
fn zero_piece(offset: u64, end: u64, align: u64, max_zero: u64, max_bounce: u64) -> u64 {
    let bytes = end - offset;
    let (head, tail) = (offset % align, end % align);
    let n = if head != 0 {
        bytes.min(max_bounce).min(align - head)
    } else if tail != 0 && bytes > align {
        bytes - tail
    } else {
        bytes
    };
    n.min(max_zero)
}

/// A zero write that may move the end of a host file keeps every later request past that point waiting: XFS can
/// lose writes beyond the end that run beside an fallocate which moves it.
async fn lock_end_of_file(req: &Request<'_>, offset: u64, bytes: u64) {
    let node = req.node;
    let host_file = node.facts.is_protocol && node.facts.has_write_zeroes;
    if host_file && req.kind != ReqKind::Read && offset + bytes > node.length() {
        req.extend_to_max();
        req.set_serialising(node.io.limits.get().request_alignment);
        req.wait_for_conflicts().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(mut offset: u64, end: u64, align: u64, max: u64) -> Vec<(u64, u64)> {
        let mut all = Vec::new();
        while offset < end {
            let n = zero_piece(offset, end, align, max, MAX_BOUNCE);
            all.push((offset, n));
            offset += n;
        }
        all
    }

    #[test]
    fn head_units_tail() {
        assert_eq!(
            pieces(100, 1100, 512, 1 << 40),
            [(100, 412), (512, 512), (1024, 76)]
        );
        assert_eq!(pieces(512, 1536, 512, 512), [(512, 512), (1024, 512)]);
        assert_eq!(pieces(512, 700, 512, 1 << 40), [(512, 188)]);
        assert_eq!(pieces(10, 20, 512, 1 << 40), [(10, 10)]);
    }
}
