//! Block status of this layer.

use super::image::Qcow2;
use super::l2::Kind;
use super::units::GuestOffset;
use crate::driver::{Cx, DriverStatus};
use crate::error::Errno;
use crate::types::StatusFlags;

impl Qcow2 {
    /// Status of the run at `guest`; the generic layer adds ALLOCATED and what the backing says.
    pub(super) async fn status_at(
        &self,
        cx: &Cx,
        guest: GuestOffset,
        bytes: u64,
    ) -> Result<DriverStatus, Errno> {
        let run = loop {
            match self.lookup(guest, bytes) {
                Ok(run) => break run,
                Err(stop) => Box::pin(self.resolve(cx, stop)).await?,
            }
        };
        let flags = match run.kind {
            Kind::Unallocated => StatusFlags::empty(),
            Kind::ZeroPlain => StatusFlags::ZERO,
            Kind::ZeroAlloc => StatusFlags::ZERO | StatusFlags::OFFSET_VALID,
            Kind::Normal => StatusFlags::DATA | StatusFlags::OFFSET_VALID,
            Kind::Compressed => StatusFlags::DATA | StatusFlags::COMPRESSED,
        };
        let located = flags.contains(StatusFlags::OFFSET_VALID);
        let file = located.then(|| cx.file_node().ok()).flatten().map(|node| node.id);
        Ok(DriverStatus {
            flags,
            pnum: run.bytes,
            map: run.host.0,
            file,
        })
    }
}
