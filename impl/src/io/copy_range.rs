//! Copy offload: bytes go from one node to another without passing through this process, as far as drivers can take them
//! down to two files of the operating system.
//!
//! Rules (QEMU `bdrv_co_copy_range`): the request goes down from the source first, node by node, until a protocol driver has
//! the bytes; from there up to the target and down again. It is tracked as a read of every node of the source and as a write
//! of every node of the target, all of them until the end. Nothing is padded and nothing split by limits: what does not fit
//! is `ENOTSUP`, as is a driver on the way that cannot pass it on (filters; compressed clusters). After any error the range
//! of the target may hold some of the new bytes already, and the caller copies it by reading and writing.
//! Past the end of a source there are zeroes, as for reads.
//!
//! Not here: copy-on-read (the caller reads instead), zero detection.

use crate::Layer;
use crate::env::Storage;
use crate::error::Errno;
use crate::event::ReqKind;
use crate::io::tracked::Request;
use crate::io::write::{finish, prepare};
use crate::io::{below, check_request32};
use crate::types::{EdgeId, ReqFlags};

/// Where copied bytes go.
#[derive(Clone, Copy, Debug)]
pub struct CopyTarget {
    /// The target is the node below.
    pub edge: EdgeId,
    /// First byte there.
    pub offset: u64,
    /// `SERIALISING` at most.
    pub flags: ReqFlags,
}

impl CopyTarget {
    /// The place so many bytes further on.
    #[must_use]
    pub fn after(self, bytes: u64) -> CopyTarget {
        CopyTarget {
            offset: self.offset + bytes,
            ..self
        }
    }
}

/// Where copied bytes lie, once a protocol driver has been found.
#[derive(Clone, Copy, Debug)]
pub struct CopySource<'a> {
    /// The file.
    pub storage: &'a dyn Storage,
    /// First byte there.
    pub offset: u64,
}

impl CopySource<'_> {
    /// The place so many bytes further on.
    #[must_use]
    pub fn after(self, bytes: u64) -> Self {
        CopySource {
            offset: self.offset + bytes,
            ..self
        }
    }
}

impl Layer {
    /// Copies `bytes` at `offset` below `source` to a target.
    ///
    /// # Errors
    /// `ENOTSUP` where it cannot be done this way, `ENOMEDIUM` without open children, or what storage says.
    pub(crate) async fn copy_range(
        &self,
        source: EdgeId,
        offset: u64,
        bytes: u64,
        to: CopyTarget,
    ) -> Result<(), Errno> {
        assert!(to.flags.difference(ReqFlags::SERIALISING).is_empty());
        let (node, driver) = below(self, source)?;
        check_request32(offset, bytes)?;
        let align = node.io.limits.get().request_alignment;
        if !(offset | bytes).is_multiple_of(align) || node.io.copy_on_read.get() > 0 {
            return Err(Errno::ENOTSUP);
        }
        let req = Request::begin(
            self,
            &node,
            source,
            ReqKind::Read,
            (offset, bytes),
            ReqFlags::empty(),
        );
        req.wait_for_conflicts().await;
        let result = async {
            let inside = bytes.min(self.node_length(&node)?.saturating_sub(offset));
            if inside > 0 {
                driver
                    .copy_range_from(&self.cx(&node), offset, inside, to)
                    .await?;
            }
            if inside < bytes {
                let rest = to.after(inside);
                self.write_zeroes(rest.edge, rest.offset, bytes - inside, rest.flags)
                    .await?;
            }
            Ok(())
        };
        let result = Box::pin(result).await;
        req.finish(result)
    }

    /// The second half, for protocol drivers: the bytes lie at `from`.
    ///
    /// # Errors
    /// As for the whole.
    pub(crate) async fn copy_range_to(
        &self,
        to: CopyTarget,
        bytes: u64,
        from: CopySource<'_>,
    ) -> Result<(), Errno> {
        let (node, driver) = below(self, to.edge)?;
        let CopyTarget { edge, offset, flags } = to;
        check_request32(offset, bytes)?;
        if !(offset | bytes).is_multiple_of(node.io.limits.get().request_alignment) {
            return Err(Errno::ENOTSUP);
        }
        let req = Request::begin(self, &node, edge, ReqKind::Write, (offset, bytes), flags);
        let result = match prepare(&req, offset, bytes, flags).await {
            Ok(()) => driver.copy_range_to(&self.cx(&node), offset, bytes, from).await,
            Err(errno) => Err(errno),
        };
        finish(&node, req.kind, offset, bytes, result);
        req.finish(result)
    }
}
