//! Limits and lengths of nodes: merging limits over children, refreshing and querying lengths.
//!
//! Rules: the request alignment, the largest discard and zero write, and the zero-write alignment are a driver's
//! own and not inherited: an overlay does not take over its backing file's alignment, unaligned reads of a backing
//! node are padded at that node. Everything here is synchronous.

use std::rc::Rc;

use crate::Layer;
use crate::dirty::DirtyBitmap;
use crate::dirty::bits::Bits;
use crate::driver::{DriverInfo, Limits};
use crate::drivers::copy_before_write::block_copy;
use crate::error::{Errno, QmpError};
use crate::event::Parent;
use crate::graph::node::Node;
use crate::io::{align_up, min_nonzero};
use crate::types::{MAX_LENGTH, NodeId, Role, SECTOR};

/// Largest request alignment (and cluster size) that is not refused, bytes.
pub const MAX_ALIGNMENT: u64 = 1 << 30;

impl Layer {
    /// Re-queries the driver's length into `node.io.length` (rounded up to 512).
    ///
    /// # Errors
    /// The driver's error, or `File too large`, as `Could not refresh total sector count`.
    pub fn refresh_length(&self, node: NodeId) -> Result<(), QmpError> {
        self.query_length(&self.node(node))
            .map(|_| ())
            .map_err(|e| QmpError::errno("Could not refresh total sector count", e))
    }

    /// A node has another length: filters and windows above it follow. QEMU leaves them with the old one.
    pub(crate) fn lengths_follow(&self, node: NodeId) {
        for above in self.showing(node) {
            let _unchanged_on_error = self.refresh_length(above.id);
        }
    }

    /// The same, and it stays so: what filters keep of what was cut off is gone.
    pub(crate) fn lengths_follow_for_good(&self, node: NodeId) {
        self.lengths_follow(node);
        for above in self.showing(node) {
            if let Some(copy) = block_copy(&above) {
                copy.cut(self, above.io.length.get());
            }
        }
    }

    /// What bitmaps of nodes above mark, for whoever may have to put it back.
    pub(crate) fn marks_above(&self, node: NodeId) -> Vec<(Rc<DirtyBitmap>, Bits)> {
        let bitmaps = |node: Rc<Node>| node.bitmaps.borrow().clone();
        let all = self.showing(node).into_iter().flat_map(bitmaps);
        all.map(|bitmap| (Rc::clone(&bitmap), bitmap.bits.borrow().clone()))
            .collect()
    }

    /// Open nodes above that show this one's content, each before what is above it.
    fn showing(&self, node: NodeId) -> Vec<Rc<Node>> {
        let mut all = Vec::new();
        let parents = self.node(node).parents.borrow().clone();
        for edge in parents.into_iter().map(|e| self.edge(e)) {
            let Parent::Node(parent) = edge.parent else {
                continue;
            };
            let shows = edge.role.contains(Role::PRIMARY) && !edge.role.contains(Role::METADATA);
            if shows && self.node(parent).driver_opt().is_some() {
                all.push(self.node(parent));
                all.extend(self.showing(parent));
            }
        }
        all
    }

    /// The length of a node, bytes, a multiple of 512; asked anew where it may change behind our back.
    ///
    /// # Errors
    /// `ENOMEDIUM` on a closed node, or the driver's error.
    pub fn node_length(&self, node: &std::rc::Rc<Node>) -> Result<u64, Errno> {
        if node.io.variable_length.get() {
            return self.query_length(node);
        }
        Ok(node.io.length.get())
    }

    fn query_length(&self, node: &std::rc::Rc<Node>) -> Result<u64, Errno> {
        let driver = node.driver_opt().ok_or(Errno::ENOMEDIUM)?;
        let length = driver.length(&self.cx(node))?;
        // Anything above MAX_LENGTH is refused before it is rounded: rounding could overflow.
        if length > MAX_LENGTH {
            return Err(Errno::EFBIG);
        }
        let length = align_up(length, SECTOR);
        node.io.length.set(length);
        node.resize_bitmaps();
        Ok(length)
    }

    /// Recomputes `node.io.limits` from the driver and the DATA, FILTERED and COW children.
    ///
    /// # Errors
    /// `Driver requires too large request alignment`.
    pub fn refresh_limits(&self, node: NodeId) -> Result<(), QmpError> {
        let node = self.node(node);
        let Some(driver) = node.driver_opt() else {
            return Ok(());
        };
        let cx = self.cx(&node);
        let own = driver.limits(&cx);
        let mut merged = Limits {
            request_alignment: own.request_alignment.max(1),
            max_pdiscard: own.max_pdiscard,
            max_pwrite_zeroes: own.max_pwrite_zeroes,
            pwrite_zeroes_alignment: own.pwrite_zeroes_alignment,
            max_transfer: own.max_transfer,
            pdiscard_alignment: own.pdiscard_alignment,
        };
        // QEMU lets a driver override what it inherited; a driver here only states its own needs, so both hold.
        let mut variable = node.facts.name == "host_device";
        let children = node.children.borrow().clone();
        for edge in children.into_iter().map(|e| self.edge(e)) {
            let Some(child) = edge.child.get().map(|id| self.node(id)) else {
                continue;
            };
            if !edge.role.intersects(Role::DATA | Role::FILTERED | Role::COW) {
                continue;
            }
            let limits = child.io.limits.get();
            merged.max_transfer = min_nonzero(merged.max_transfer, limits.max_transfer);
            merged.pdiscard_alignment = merged.pdiscard_alignment.max(limits.pdiscard_alignment);
            variable |= edge.role.contains(Role::FILTERED) && child.io.variable_length.get();
        }
        if merged.request_alignment > MAX_ALIGNMENT {
            return Err(QmpError::generic("Driver requires too large request alignment"));
        }
        assert!(
            merged.request_alignment.is_power_of_two(),
            "alignment of {node:?} is a power of two"
        );
        if merged.max_transfer > 0 {
            // A child's limit below our alignment could never be obeyed; the child splits it itself.
            merged.max_transfer = merged.max_transfer.max(merged.request_alignment);
        }
        node.io.limits.set(merged);
        node.io.write_flags.set(driver.write_flags(&cx));
        node.io.variable_length.set(variable);
        Ok(())
    }

    /// Cluster geometry of what a node shows: its own, or that below a filter or `raw`.
    pub(crate) fn driver_info(&self, node: &std::rc::Rc<Node>) -> Option<DriverInfo> {
        let own = node.driver_opt()?.info(&self.cx(node));
        if let Some(info) = own.filter(|info| info.cluster_size > 0) {
            return Some(info);
        }
        let shows_below = node.facts.is_filter || node.facts.name == "raw";
        let below = node.primary_edge().filter(|_| shows_below)?;
        self.driver_info(&self.child(below)?)
    }

    /// Alignment for a request that has to have its clusters for itself: the cluster size, or the request
    /// alignment where the driver has no clusters.
    pub(crate) fn cluster_alignment(&self, node: &std::rc::Rc<Node>) -> u64 {
        let ra = node.io.limits.get().request_alignment;
        let info = node.driver_opt().and_then(|d| d.info(&self.cx(node)));
        info.map_or(ra, |i| {
            if i.cluster_size == 0 {
                ra
            } else {
                i.cluster_size.max(ra)
            }
        })
    }
}
