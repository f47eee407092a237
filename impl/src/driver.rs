//! What a driver is: static facts, and the operations the generic layer calls.
//!
//! Rules: a driver never touches the graph except through the children it was opened with; it gets its
//! node and layer with each call ([`Cx`]) so that it holds no cycle. The generic layer has already checked
//! bounds, alignment (`limits().request_alignment`), permissions and conflicts when it calls a driver.
//! Not here: opening (each driver has its own `open`, listed in `drivers::open`).

use std::fmt;
use std::rc::Rc;

use crate::Layer;
use crate::env::Fut;
use crate::error::{Errno, QmpError};
use crate::graph::node::Node;
use crate::io::copy_range::{CopySource, CopyTarget};
use crate::types::{EdgeId, NodeId, OpenFlags, Perm, ReqFlags, Role, StatusFlags};

/// Static properties of a driver.
#[derive(Debug)]
pub struct DriverFacts {
    /// QAPI name.
    pub name: &'static str,
    /// Presents the content of its filtered child.
    pub is_filter: bool,
    /// An image format.
    pub is_format: bool,
    /// Accepts a backing child.
    pub supports_backing: bool,
    /// Has children that may change by reopen; false for protocol drivers.
    pub is_protocol: bool,
    /// Block status is answered by the driver; false: the generic default (all data, or the filtered child).
    pub has_block_status: bool,
    /// Zero writes are implemented.
    pub has_write_zeroes: bool,
    /// Discards are implemented.
    pub has_discard: bool,
    /// Request flags that `read` understands.
    pub supported_read_flags: ReqFlags,
    /// Can be reopened (blockdev-reopen, read-only switches).
    pub can_reopen: bool,
    /// Its own options that a reopen may leave out, or change.
    pub mutable_options: &'static [&'static str],
    /// Masks this driver puts on a child edge, given the role and the cumulative masks of its own parents
    /// (`bdrv_child_perm`). A function of the driver, not of an opened instance: edges are attached during open.
    pub child_perm: fn(cx: &Cx, role: Role, perm: Perm, shared: Perm) -> (Perm, Perm),
    /// Opens an instance: attaches children, reads headers. The generic layer has filled `node` and consumed the
    /// common options; the driver removes the options it knows from `args.options`.
    pub open: Open,
}

/// How a driver is opened.
pub type Open = for<'a> fn(&'a Cx, OpenArgs<'a>) -> Opening<'a>;

/// An open under way.
pub type Opening<'a> = Fut<'a, Result<Rc<dyn Driver>, QmpError>>;

/// What a driver's `open` gets.
#[derive(Debug)]
pub struct OpenArgs<'a> {
    /// The already opened (or looked up) `file` child, for every driver that has one. The driver attaches it itself
    /// (`Layer::attach_child(&cx.node, file, "file", role)`), because the role is its own business.
    pub file: Option<NodeId>,
    /// Driver options left, dashes as in QAPI, nested ones as objects. What remains afterwards is refused.
    pub options: &'a mut serde_json::Map<String, serde_json::Value>,
}

/// Limits that the generic layer obeys for a node. Bytes; 0: none.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Limits {
    /// Every request is padded to this; a power of two.
    pub request_alignment: u64,
    /// Largest read or write.
    pub max_transfer: u64,
    /// Unit below which discards are useless.
    pub pdiscard_alignment: u64,
    /// Largest discard.
    pub max_pdiscard: u64,
    /// Unit below which zero writes are slow.
    pub pwrite_zeroes_alignment: u64,
    /// Largest zero write.
    pub max_pwrite_zeroes: u64,
}

/// Cluster geometry (QEMU `BlockDriverInfo`), bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DriverInfo {
    /// Allocation unit.
    pub cluster_size: u64,
    /// Smallest unit with its own status.
    pub subcluster_size: u64,
}

/// A driver's raw answer to a block-status query.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DriverStatus {
    /// DATA, ZERO, OFFSET_VALID, RAW, RECURSE, COMPRESSED only.
    pub flags: StatusFlags,
    /// Bytes from the asked offset that share this answer; > 0, may exceed the request.
    pub pnum: u64,
    /// Where the bytes are, with OFFSET_VALID or RAW.
    pub map: u64,
    /// In which node, with OFFSET_VALID or RAW.
    pub file: Option<NodeId>,
}

/// What a driver gets with each call: the layer and its own node.
#[derive(Clone)]
pub struct Cx {
    /// The layer.
    pub layer: Layer,
    /// The driver's node.
    pub node: Rc<Node>,
}

impl Cx {
    /// The link to the `file` child, which a reopen may have replaced since the driver was opened.
    ///
    /// # Errors
    /// `ENOMEDIUM` when it is gone: the node is on its way out.
    #[inline]
    pub fn file(&self) -> Result<EdgeId, Errno> {
        self.node.file.get().ok_or(Errno::ENOMEDIUM)
    }

    /// The `file` child.
    ///
    /// # Errors
    /// As [`Cx::file`].
    #[inline]
    pub fn file_node(&self) -> Result<Rc<Node>, Errno> {
        self.layer.child(self.file()?).ok_or(Errno::ENOMEDIUM)
    }
}

impl fmt::Debug for Cx {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Cx({:?})", self.node.id)
    }
}

/// Which write flags the driver takes itself; the rest is emulated or dropped by the generic layer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct WriteFlags {
    /// For writes.
    pub write: ReqFlags,
    /// For zero writes.
    pub zero: ReqFlags,
    /// For truncate.
    pub truncate: ReqFlags,
}

/// One opened driver. All offsets and lengths in bytes.
pub trait Driver: fmt::Debug {
    /// Current length before rounding to sectors.
    fn length(&self, cx: &Cx) -> Result<u64, Errno>;

    /// Limits of this driver alone; the generic layer merges the children's.
    fn limits(&self, cx: &Cx) -> Limits;

    /// Flags that writes may carry down to this driver.
    fn write_flags(&self, _cx: &Cx) -> WriteFlags {
        WriteFlags::default()
    }

    /// Cluster geometry, where there is one.
    fn info(&self, _cx: &Cx) -> Option<DriverInfo> {
        None
    }

    /// Reads exactly `buf`; the range is within the driver's aligned length.
    fn read<'a>(
        &'a self,
        cx: &'a Cx,
        offset: u64,
        buf: &'a mut [u8],
        flags: ReqFlags,
    ) -> Fut<'a, Result<(), Errno>>;

    /// A read that populates without returning data (`PREFETCH`); only copy-on-read has one.
    fn prefetch<'a>(
        &'a self,
        _cx: &'a Cx,
        _offset: u64,
        _bytes: u64,
        _flags: ReqFlags,
    ) -> Fut<'a, Result<(), Errno>> {
        Box::pin(std::future::ready(Err(Errno::ENOTSUP)))
    }

    /// Writes `buf`. `flags` is a subset of `write_flags().write`.
    fn write<'a>(
        &'a self,
        cx: &'a Cx,
        offset: u64,
        buf: &'a [u8],
        flags: ReqFlags,
    ) -> Fut<'a, Result<(), Errno>>;

    /// Writes zeroes; `ENOTSUP` makes the generic layer write a buffer.
    fn write_zeroes<'a>(
        &'a self,
        _cx: &'a Cx,
        _offset: u64,
        _bytes: u64,
        _flags: ReqFlags,
    ) -> Fut<'a, Result<(), Errno>> {
        Box::pin(std::future::ready(Err(Errno::ENOTSUP)))
    }

    /// Discards; `ENOTSUP` pieces are skipped silently by the generic layer.
    fn discard<'a>(&'a self, _cx: &'a Cx, _offset: u64, _bytes: u64) -> Fut<'a, Result<(), Errno>> {
        Box::pin(std::future::ready(Err(Errno::ENOTSUP)))
    }

    /// Copy offload, from here on its way down to the file: passes the places of the bytes on to the layer. The range is
    /// within the driver's length.
    fn copy_range_from<'a>(
        &'a self,
        _cx: &'a Cx,
        _offset: u64,
        _bytes: u64,
        _to: CopyTarget,
    ) -> Fut<'a, Result<(), Errno>> {
        Box::pin(std::future::ready(Err(Errno::ENOTSUP)))
    }

    /// Copy offload, to here: a write of bytes that lie in a file. On an error some may have come.
    fn copy_range_to<'a>(
        &'a self,
        _cx: &'a Cx,
        _offset: u64,
        _bytes: u64,
        _from: CopySource<'a>,
    ) -> Fut<'a, Result<(), Errno>> {
        Box::pin(std::future::ready(Err(Errno::ENOTSUP)))
    }

    /// First half of a flush: caches of the driver to its file (QEMU `flush_to_os`).
    fn flush_to_os<'a>(&'a self, _cx: &'a Cx) -> Fut<'a, Result<(), Errno>> {
        Box::pin(std::future::ready(Ok(())))
    }

    /// Second half: to the medium (QEMU `flush_to_disk`). Children are flushed by the generic layer.
    fn flush_to_disk<'a>(&'a self, _cx: &'a Cx) -> Fut<'a, Result<(), Errno>> {
        Box::pin(std::future::ready(Ok(())))
    }

    /// Whether a flush of the node goes on to this child of it, which it may write to.
    fn flushes(&self, _cx: &Cx, _child: EdgeId) -> bool {
        true
    }

    /// Block status of this layer; see `DriverFacts::has_block_status`.
    fn block_status<'a>(
        &'a self,
        _cx: &'a Cx,
        _want_zero: bool,
        _offset: u64,
        _bytes: u64,
    ) -> Fut<'a, Result<DriverStatus, Errno>> {
        Box::pin(std::future::ready(Err(Errno::ENOTSUP)))
    }

    /// Changes the length. `flags`: ZERO_WRITE asks that a grown area reads as zeroes.
    fn truncate<'a>(
        &'a self,
        _cx: &'a Cx,
        _length: u64,
        _exact: bool,
        _flags: ReqFlags,
    ) -> Fut<'a, Result<(), QmpError>> {
        Box::pin(std::future::ready(Err(QmpError::generic(
            "Image format driver does not support resize",
        ))))
    }

    /// The node's quiesce counter went 0 -> 1.
    fn drain_begin(&self, _cx: &Cx) {}

    /// The node's quiesce counter went 1 -> 0.
    fn drain_end(&self, _cx: &Cx) {}

    /// Cumulative permissions of the node changed to these (protocol drivers with auto-read-only switch here).
    fn set_perm(&self, _cx: &Cx, _perm: Perm, _shared: Perm) {}

    /// Gets ready for other flags, mostly a switch between read-only and writable; called before they change, node
    /// drained. Called again with the old ones when the reopen is refused after all.
    fn reopen<'a>(&'a self, _cx: &'a Cx, _flags: OpenFlags) -> Fut<'a, Result<(), QmpError>> {
        Box::pin(std::future::ready(Ok(())))
    }

    /// Judges new values of its own options, by flat name, and takes out those that it can change. Changes nothing yet.
    fn reopen_options(
        &self,
        _cx: &Cx,
        _options: &mut serde_json::Map<String, serde_json::Value>,
    ) -> Result<(), QmpError> {
        Ok(())
    }

    /// From now on these options hold, which [`Driver::reopen_options`] found good.
    fn take_options(&self, _cx: &Cx, _options: &serde_json::Map<String, serde_json::Value>) {}

    /// Rewrites backing name and format in the image header; `None` removes both.
    fn change_backing_file<'a>(
        &'a self,
        _cx: &'a Cx,
        _backing: Option<(&'a str, Option<&'a str>)>,
    ) -> Fut<'a, Result<(), Errno>> {
        Box::pin(std::future::ready(Err(Errno::ENOTSUP)))
    }

    /// Backing name and format as the image header has them now.
    fn backing_header(&self) -> Option<(String, Option<String>)> {
        None
    }

    /// Whether a bitmap can be stored.
    fn check_bitmap(&self, cx: &Cx, _name: &str, _granularity: u64) -> Result<(), QmpError> {
        let text = format!("Can't store persistent bitmaps to {}", cx.node.name);
        Err(QmpError::errno(&text, Errno::ENOTSUP))
    }

    /// What is stored of a bitmap goes, if anything is.
    fn remove_bitmap<'a>(&'a self, _cx: &'a Cx, _name: &'a str) -> Fut<'a, Result<(), QmpError>> {
        Box::pin(std::future::ready(Ok(())))
    }

    /// The node is open with other flags now, and may write if they say so. It is drained.
    fn reopened<'a>(&'a self, _cx: &'a Cx) -> Fut<'a, ()> {
        Box::pin(std::future::ready(()))
    }

    /// Name by which a header would refer to this node's content (file name for protocol drivers, that of the
    /// primary child otherwise).
    fn filename(&self, cx: &Cx) -> String {
        cx.layer.child_filename(cx.node.primary_edge())
    }

    /// Unfreezes what this driver froze (copy-on-read); called before its own links go.
    fn unfreeze(&self, _cx: &Cx) {}

    /// Last call: flush caches, release what is held. The children are still attached, the node is drained.
    fn close<'a>(&'a self, _cx: &'a Cx) -> Fut<'a, Result<(), Errno>> {
        Box::pin(std::future::ready(Ok(())))
    }

    /// For a driver's own helpers (`node.driver().as_any()`).
    fn as_any(&self) -> &dyn std::any::Any;
}
