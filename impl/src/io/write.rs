//! Writes: checks, padding by read-modify-write, conflict waits, zero detection, driver writes, bookkeeping.
//!
//! Rules: `finish` runs for every aligned write, also a failed or refused one, because part of it may have reached
//! the disk. Padded blocks count as written.
//!
//! Deviation D-1: QEMU ignores the result of the read before a padded write and then writes uninitialised memory
//! over the neighbours. Here a failed pre-read fails the write, and nothing is written.

use std::rc::Rc;

use crate::Layer;
use crate::driver::Cx;
use crate::error::Errno;
use crate::event::ReqKind;
use crate::graph::node::{DetectZeroes, Node};
use crate::io::pad::Pad;
use crate::io::read::read_pieces;
use crate::io::tracked::Request;
use crate::io::{align_up, below, check_request32, is_zero, max_transfer, size, zero};
use crate::types::{EdgeId, OpenFlags, Perm, ReqFlags, SECTOR};

/// What an aligned write puts down.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Payload<'a> {
    /// These bytes.
    Data(&'a [u8]),
    /// So many zeroes.
    Zero(u64),
}

impl Payload<'_> {
    fn bytes(self) -> u64 {
        match self {
            Payload::Data(buf) => buf.len() as u64,
            Payload::Zero(bytes) => bytes,
        }
    }
}

impl Layer {
    /// Writes `buf` at `offset` through `edge`. Flags: FUA, WRITE_UNCHANGED, SERIALISING, NO_WAIT.
    ///
    /// # Errors
    /// `EIO` beyond the largest offset, `EPERM` on a read-only node, `EBUSY` with NO_WAIT, `ENOMEDIUM` without an
    /// open child, or what a driver says.
    ///
    /// # Panics
    /// When the edge lacks the permission: the caller's bug.
    pub async fn write(&self, edge: EdgeId, offset: u64, buf: &[u8], flags: ReqFlags) -> Result<(), Errno> {
        assert!(!flags.intersects(ReqFlags::ZERO_WRITE | ReqFlags::COPY_ON_READ | ReqFlags::PREFETCH));
        let (node, _) = below(self, edge)?;
        let bytes = buf.len() as u64;
        check_request32(offset, bytes)?;
        let align = node.io.limits.get().request_alignment;
        if flags.contains(ReqFlags::NO_FALLBACK) && !(offset | bytes).is_multiple_of(align) {
            return Err(Errno::ENOTSUP);
        }
        if bytes == 0 && !offset.is_multiple_of(align) {
            return Ok(());
        }
        if let Some(pad) = Pad::new(offset, bytes, align) {
            return Box::pin(self.padded_write(edge, &node, pad, buf, flags)).await;
        }
        let req = Request::begin(self, &node, edge, ReqKind::Write, (offset, bytes), flags);
        let result = aligned_write(&req, offset, Payload::Data(buf), flags).await;
        req.finish(result)
    }

    async fn padded_write(
        &self,
        edge: EdgeId,
        node: &Rc<Node>,
        pad: Pad,
        buf: &[u8],
        flags: ReqFlags,
    ) -> Result<(), Errno> {
        assert!(!flags.contains(ReqFlags::NO_WAIT), "a padded write has to wait");
        let req = Request::begin(self, node, edge, ReqKind::Write, (pad.start, pad.bytes), flags);
        let mut bounce = vec![0; size(pad.bytes)];
        let result = match pre_read(&req, pad, &mut bounce).await {
            Ok(()) => {
                bounce[pad.user()].copy_from_slice(buf);
                aligned_write(&req, pad.start, Payload::Data(&bounce), flags).await
            }
            Err(e) => Err(e),
        };
        req.finish(result)
    }
}

/// Gives a padded write its blocks for itself, from the read to the write.
pub(crate) async fn lock_blocks(req: &Request<'_>) {
    req.set_serialising(req.node.io.limits.get().request_alignment);
    req.wait_for_conflicts().await;
}

/// Reads whole blocks for a padded write: straight through the driver, so that this read never copies on read.
pub(crate) async fn read_blocks(req: &Request<'_>, offset: u64, blocks: &mut [u8]) -> Result<(), Errno> {
    let driver = req.node.driver();
    read_pieces(req.layer, req.node, &driver, offset, blocks, ReqFlags::empty()).await
}

/// Locks and reads the partial blocks of `pad` into `bounce`, which spans the padded range.
async fn pre_read(req: &Request<'_>, pad: Pad, bounce: &mut [u8]) -> Result<(), Errno> {
    lock_blocks(req).await;
    for (start, bytes) in pad.pre_reads().into_iter().flatten() {
        read_blocks(
            req,
            pad.start + start,
            &mut bounce[size(start)..size(start + bytes)],
        )
        .await?;
    }
    Ok(())
}

/// One aligned write with its bookkeeping; `req` may cover more than this part.
pub(crate) async fn aligned_write(
    req: &Request<'_>,
    offset: u64,
    payload: Payload<'_>,
    mut flags: ReqFlags,
) -> Result<(), Errno> {
    let node = req.node;
    let bytes = payload.bytes();
    let prepared = prepare(req, offset, bytes, flags).await;
    let result = match (prepared, payload) {
        (Err(e), _) => Err(e),
        (Ok(()), Payload::Zero(_)) => {
            zero::write_zeroes_pieces(Some(req), req.layer, node, offset, bytes, flags).await
        }
        (Ok(()), Payload::Data(buf)) => {
            if let Some(zero_flags) = detected_zeroes(node, buf) {
                flags |= zero_flags;
                zero::write_zeroes_pieces(Some(req), req.layer, node, offset, bytes, flags).await
            } else if (flags - node.io.write_flags.get().write).contains(ReqFlags::WRITE_COMPRESSED) {
                Err(Errno::ENOTSUP)
            } else {
                write_pieces(req.layer, node, offset, buf, flags).await
            }
        }
    };
    finish(node, req.kind, offset, bytes, result);
    result
}

/// `detect-zeroes`: the flags that turn an all-zero write into a zero write.
fn detected_zeroes(node: &Node, buf: &[u8]) -> Option<ReqFlags> {
    let flags = match node.detect_zeroes.get() {
        DetectZeroes::Off => return None,
        DetectZeroes::On => ReqFlags::ZERO_WRITE,
        DetectZeroes::Unmap => ReqFlags::ZERO_WRITE | ReqFlags::MAY_UNMAP,
    };
    (node.facts.has_write_zeroes && !buf.is_empty() && is_zero(buf)).then_some(flags)
}

/// Refuses, waits and asserts before anything changes (QEMU `bdrv_co_write_req_prepare`).
pub(crate) async fn prepare(
    req: &Request<'_>,
    offset: u64,
    bytes: u64,
    flags: ReqFlags,
) -> Result<(), Errno> {
    // A bitmap that cannot mark what is written would claim that it was not.
    if !req.node.is_writable() || req.node.has_frozen_bitmap() {
        return Err(Errno::EPERM);
    }
    if flags.contains(ReqFlags::SERIALISING) {
        req.set_serialising(req.layer.cluster_alignment(req.node));
        if flags.contains(ReqFlags::NO_WAIT) && req.has_conflict() {
            return Err(Errno::EBUSY);
        }
    } else {
        assert!(
            !flags.contains(ReqFlags::NO_WAIT),
            "NO_WAIT goes with SERIALISING"
        );
    }
    req.wait_for_conflicts().await;
    assert_permitted(req, offset, bytes, flags);
    Ok(())
}

/// A parent may only do what it asked for; anything else is a bug of ours, and data would be at stake.
fn assert_permitted(req: &Request<'_>, offset: u64, bytes: u64, flags: ReqFlags) {
    use crate::event::ReqKind::{Discard, Flush, Read, Truncate, Write, WriteZeroes};
    let (start, end) = req.overlap();
    assert!(
        start <= offset && offset + bytes <= end,
        "the tracked range covers the write"
    );
    let edge = req.layer.edge(req.edge);
    let perm = edge.perm.get();
    let needed = match req.kind {
        Write | WriteZeroes | Discard if flags.contains(ReqFlags::WRITE_UNCHANGED) => {
            Perm::WRITE | Perm::WRITE_UNCHANGED
        }
        Write | WriteZeroes | Discard => Perm::WRITE,
        Truncate => Perm::RESIZE,
        Read | Flush => unreachable!("{:?} is not a write", req.kind),
    };
    assert!(
        perm.intersects(needed),
        "{:?} to {:?} through {edge:?} needs {needed:?}",
        req.kind,
        req.node
    );
    assert!(
        offset + bytes <= req.node.length() || perm.contains(Perm::RESIZE),
        "{:?} past the end of {:?} through {edge:?} needs RESIZE",
        req.kind,
        req.node
    );
}

/// What every aligned write leaves behind, however it ended (QEMU `bdrv_co_write_req_finish`).
pub(crate) fn finish(node: &Node, kind: ReqKind, offset: u64, bytes: u64, result: Result<(), Errno>) {
    let io = &node.io;
    io.write_gen.set(io.write_gen.get().wrapping_add(1));
    let end = offset + bytes;
    let grows = kind == ReqKind::Truncate || (kind != ReqKind::Discard && end > io.length.get());
    if result.is_ok() && grows {
        io.length.set(align_up(end, SECTOR));
    }
    if bytes > 0 && matches!(kind, ReqKind::Write | ReqKind::WriteZeroes) {
        io.wr_highest_offset.set(io.wr_highest_offset.get().max(end));
    }
    if node.bitmaps.borrow().is_empty() {
        return;
    }
    node.resize_bitmaps();
    if kind != ReqKind::Truncate {
        node.mark_dirty(offset, bytes);
    }
}

/// Writes an aligned range in pieces the driver can take.
pub(crate) async fn write_pieces(
    layer: &Layer,
    node: &Rc<Node>,
    offset: u64,
    buf: &[u8],
    flags: ReqFlags,
) -> Result<(), Errno> {
    let max = size(max_transfer(node));
    if buf.len() <= max {
        return driver_write(layer, node, offset, buf, flags).await;
    }
    // An emulated FUA is a flush: once, after the last piece, it covers them all.
    let emulated = flags & (ReqFlags::FUA - node.io.write_flags.get().write);
    let mut at = offset;
    let mut pieces = buf.chunks(max).peekable();
    while let Some(piece) = pieces.next() {
        let flags = if pieces.peek().is_some() {
            flags - emulated
        } else {
            flags
        };
        driver_write(layer, node, at, piece, flags).await?;
        at += piece.len() as u64;
    }
    Ok(())
}

/// One write by the driver; FUA that it does not know becomes a flush of the node afterwards.
pub(crate) async fn driver_write(
    layer: &Layer,
    node: &Rc<Node>,
    offset: u64,
    buf: &[u8],
    mut flags: ReqFlags,
) -> Result<(), Errno> {
    let supported = node.io.write_flags.get().write;
    if node.flags.get().contains(OpenFlags::NO_FLUSH) {
        flags.remove(ReqFlags::FUA);
    }
    let emulate_fua = (flags - supported).contains(ReqFlags::FUA);
    let driver = node.driver_opt().ok_or(Errno::ENOMEDIUM)?;
    let cx = Cx {
        layer: layer.clone(),
        node: Rc::clone(node),
    };
    driver.write(&cx, offset, buf, flags & supported).await?;
    if emulate_fua {
        Box::pin(layer.flush(node.id)).await
    } else {
        Ok(())
    }
}
