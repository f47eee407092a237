//! The request path. Entry points are methods of [`crate::Layer`]; each takes the *edge* it goes through, since
//! permissions belong to edges.
//!
//! Rules: what a driver gets is checked, aligned and free of conflicts. The permission an edge lacks is a bug of
//! the caller and asserted, everything a guest or a disk can cause is an [`Errno`]. The caller holds the graph
//! read lock (a [`backend::Backend`] takes it for each of its requests).
//! Not here: what marks dirty bitmaps (`crate::dirty`), throttling (`crate::throttle`).

pub mod backend;
pub mod copy_range;
pub(crate) mod cor;
mod discard;
mod flush;
pub mod limits;
pub(crate) mod pad;
mod read;
pub mod state;
pub mod status;
pub(crate) mod tracked;
mod truncate;
mod write;
mod zero;

#[cfg(test)]
pub(crate) mod fixture;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_backend;
#[cfg(test)]
mod tests_status;

use std::rc::Rc;

use crate::Layer;
use crate::driver::Driver;
use crate::error::Errno;
use crate::graph::node::Node;
use crate::types::{EdgeId, MAX_LENGTH, REQUEST_MAX_BYTES, SECTOR};

/// Largest bounce buffer, bytes: one copy-on-read chunk, or one piece of a zero write done by hand.
pub(crate) const MAX_BOUNCE: u64 = 32768 * SECTOR;
/// Largest request a driver gets when it has no limit of its own, bytes.
const INT_MAX: u64 = i32::MAX as u64;

pub(crate) fn align_down(x: u64, align: u64) -> u64 {
    debug_assert!(align.is_power_of_two());
    x & !(align - 1)
}

pub(crate) fn align_up(x: u64, align: u64) -> u64 {
    debug_assert!(align.is_power_of_two());
    x.checked_add(align - 1).expect("offsets are far below 2^64") & !(align - 1)
}

/// The smaller one, 0 meaning "no limit".
pub(crate) fn min_nonzero(a: u64, b: u64) -> u64 {
    match (a, b) {
        (0, x) | (x, 0) => x,
        _ => a.min(b),
    }
}

/// A length that is known to fit memory.
pub(crate) fn size(bytes: u64) -> usize {
    usize::try_from(bytes).expect("lengths of buffers fit memory")
}

/// Whether every byte is zero.
#[must_use]
pub fn is_zero(buf: &[u8]) -> bool {
    // Word-wise over the aligned middle; the compiler vectorises it.
    let (chunks, rest) = buf.as_chunks::<32>();
    chunks.iter().all(|c| *c == [0; 32]) && rest.iter().all(|b| *b == 0)
}

/// `bdrv_check_qiov_request`: what no request may exceed.
fn check_request(offset: u64, bytes: u64) -> Result<(), Errno> {
    if bytes > MAX_LENGTH || offset > MAX_LENGTH || offset > MAX_LENGTH - bytes {
        return Err(Errno::EIO);
    }
    Ok(())
}

/// The same for everything but zero writes and discards.
fn check_request32(offset: u64, bytes: u64) -> Result<(), Errno> {
    check_request(offset, bytes)?;
    if bytes > REQUEST_MAX_BYTES {
        Err(Errno::EIO)
    } else {
        Ok(())
    }
}

/// The open node below an edge; a childless edge or a closed node has no medium.
fn below(layer: &Layer, edge: EdgeId) -> Result<(Rc<Node>, Rc<dyn Driver>), Errno> {
    let node = layer.child(edge).ok_or(Errno::ENOMEDIUM)?;
    let driver = node.driver_opt().ok_or(Errno::ENOMEDIUM)?;
    Ok((node, driver))
}

/// Largest piece of a read or write that the driver takes, a multiple of the alignment.
fn max_transfer(node: &Node) -> u64 {
    let limits = node.io.limits.get();
    let max = align_down(
        min_nonzero(limits.max_transfer, INT_MAX),
        limits.request_alignment,
    );
    assert!(max > 0, "max_transfer of {node:?} holds at least one block");
    max
}
