//! Reading the point in time behind an open filter.
//!
//! Rules: what a guest may have overwritten comes from the target, everything else from the source, under a range that guests'
//! writes wait for. What was not to be kept, or was given up by a discard, cannot be had: `EACCES`, as everything once the
//! point in time is lost. A discard gives whole clusters up: they are neither copied any more nor readable.

use std::rc::Rc;

use super::{CopyBeforeWrite, state};
use crate::Layer;
use crate::block_copy::ends_within;
use crate::driver::{Driver, DriverStatus};
use crate::error::Errno;
use crate::graph::node::Node;
use crate::io::tracked::InFlightGuard;
use crate::io::{align_down, size};
use crate::types::{EdgeId, ReqFlags, StatusFlags};

/// A stretch that one side has.
struct Piece<'a> {
    child: EdgeId,
    bytes: u64,
    _frozen: Option<Frozen<'a>>,
}

impl Piece<'_> {
    /// Refuses what lies past the end of the node that should have it, which would read as zeroes.
    fn is_there(&self, layer: &Layer, at: u64) -> Result<(), Errno> {
        ends_within(layer, self.child, at + self.bytes)
    }
}

/// A range that guests' writes wait for while it lives.
struct Frozen<'a> {
    filter: &'a CopyBeforeWrite,
    id: u64,
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        self.filter.frozen.borrow_mut().retain(|(id, ..)| *id != self.id);
        self.filter.thawed.wake_all();
    }
}

impl CopyBeforeWrite {
    fn freeze(&self, start: u64, end: u64) -> Frozen<'_> {
        let id = self.next_read.replace(self.next_read.get() + 1);
        self.frozen.borrow_mut().push((id, start, end));
        Frozen { filter: self, id }
    }

    fn is_whole(&self) -> Result<(), Errno> {
        self.broken.get().map_or(Ok(()), |_| Err(Errno::EACCES))
    }

    /// Where the start of `[start, end)` is to be read.
    fn piece(&self, start: u64, end: u64) -> Result<Piece<'_>, Errno> {
        self.is_whole()?;
        let (readable, to) = self.copy.access().run_at(start, end);
        // What the source got since was not there then, what it lost since is gone.
        if !readable || to < end || end > self.copy.reach() {
            return Err(Errno::EACCES);
        }
        let (done, to) = self.done.run_at(start, end);
        Ok(Piece {
            child: if done {
                self.copy.target()
            } else {
                self.copy.source()
            },
            bytes: to - start,
            // The whole rest, not only this piece: a reader is to come to its end.
            _frozen: (!done).then(|| self.freeze(start, end)),
        })
    }

    async fn read(&self, layer: &Layer, offset: u64, buf: &mut [u8]) -> Result<(), Errno> {
        let end = offset + buf.len() as u64;
        let mut at = offset;
        while at < end {
            let piece = self.piece(at, end)?;
            piece.is_there(layer, at)?;
            let part = &mut buf[size(at - offset)..size(at - offset + piece.bytes)];
            layer.read(piece.child, at, part, ReqFlags::empty()).await?;
            // Lost meanwhile: guests no longer waited for this read.
            self.is_whole()?;
            at += piece.bytes;
        }
        Ok(())
    }

    async fn status(&self, layer: &Layer, offset: u64, bytes: u64) -> Result<DriverStatus, Errno> {
        let piece = self.piece(offset, offset + bytes)?;
        let child = layer.child(piece.child).ok_or(Errno::ENOMEDIUM)?;
        let status = layer
            .block_status_above(child.id, None, offset, piece.bytes)
            .await?;
        if status.pnum == 0 {
            // It ends before, since commands gave it another length.
            return Err(Errno::EIO);
        }
        let own = StatusFlags::DATA | StatusFlags::ZERO | StatusFlags::OFFSET_VALID;
        let mut flags = status.flags & own;
        if !flags.intersects(StatusFlags::DATA | StatusFlags::ZERO) {
            flags |= StatusFlags::DATA;
        }
        Ok(DriverStatus {
            flags,
            pnum: status.pnum,
            map: status.map,
            file: status.file,
        })
    }

    async fn discard(&self, layer: &Layer, offset: u64, bytes: u64) -> Result<(), Errno> {
        if self.retired.get() {
            return Err(Errno::EACCES);
        }
        let (cluster, length) = (self.copy.cluster(), self.copy.reach());
        let start = offset.next_multiple_of(cluster);
        let end = align_down(offset + bytes, cluster);
        if start >= end.min(length) {
            return Ok(());
        }
        self.copy.forget(layer, start..end);
        ends_within(layer, self.copy.target(), end)?;
        layer.discard(self.copy.target(), start, end - start).await
    }
}

/// The filter below, if it is one.
fn with(driver: Option<&Rc<dyn Driver>>) -> Result<&CopyBeforeWrite, Errno> {
    let filter = driver.and_then(|driver| driver.as_any().downcast_ref());
    filter.ok_or(Errno::ENOTSUP)
}

/// Reads the point in time behind a filter; `ENOTSUP` for a node that is none.
pub(in crate::drivers) async fn read(
    layer: &Layer,
    node: &Rc<Node>,
    offset: u64,
    buf: &mut [u8],
) -> Result<(), Errno> {
    let driver = state(node);
    let _in_flight = InFlightGuard::new(layer, node);
    with(driver.as_ref())?.read(layer, offset, buf).await
}

/// What block status says of it.
pub(in crate::drivers) async fn status(
    layer: &Layer,
    node: &Rc<Node>,
    offset: u64,
    bytes: u64,
) -> Result<DriverStatus, Errno> {
    let driver = state(node);
    let _in_flight = InFlightGuard::new(layer, node);
    with(driver.as_ref())?.status(layer, offset, bytes).await
}

/// Gives whole clusters of it up.
pub(in crate::drivers) async fn discard(
    layer: &Layer,
    node: &Rc<Node>,
    offset: u64,
    bytes: u64,
) -> Result<(), Errno> {
    let driver = state(node);
    let _in_flight = InFlightGuard::new(layer, node);
    with(driver.as_ref())?.discard(layer, offset, bytes).await
}
