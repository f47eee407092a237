//! Copy offload of a qcow2 image: which bytes of its file a guest range is, and which the copy of another file becomes.
//!
//! Rules: as a source, runs of plain clusters are copied, zero clusters become zero writes, and what the image does not
//! hold comes from its backing file. A compressed cluster ends it with `ENOTSUP`. The epoch guard of a run is held until its
//! copy is over. As a target it allocates like a write ([`super::write`]).

use super::image::Qcow2;
use super::l2::Kind;
use super::units::GuestOffset;
use super::write::Data;
use crate::driver::Cx;
use crate::error::Errno;
use crate::io::copy_range::{CopySource, CopyTarget};

impl Qcow2 {
    /// What the guest sees at `guest` goes to a target.
    pub(super) async fn copy_out(
        &self,
        cx: &Cx,
        guest: GuestOffset,
        bytes: u64,
        to: CopyTarget,
    ) -> Result<(), Errno> {
        let mut done = 0;
        while done < bytes {
            let at = GuestOffset(guest.0 + done);
            let run = match self.lookup(at, bytes - done) {
                Ok(run) => run,
                Err(stop) => {
                    Box::pin(self.resolve(cx, stop)).await?;
                    continue;
                }
            };
            let next = to.after(done);
            done += run.bytes;
            match run.kind {
                Kind::Normal => {
                    let _reading = self.epochs.enter();
                    let file = cx.file()?;
                    cx.layer.copy_range(file, run.host.0, run.bytes, next).await?;
                }
                Kind::Unallocated if let Some(backing) = cx.node.backing.get() => {
                    cx.layer.copy_range(backing, at.0, run.bytes, next).await?;
                }
                Kind::ZeroPlain | Kind::ZeroAlloc | Kind::Unallocated => {
                    let zeroed = cx
                        .layer
                        .write_zeroes(next.edge, next.offset, run.bytes, next.flags);
                    zeroed.await?;
                }
                Kind::Compressed => return Err(Errno::ENOTSUP),
            }
        }
        Ok(())
    }

    /// Writes guest data that lies in another file.
    pub(super) async fn copy_in(
        &self,
        cx: &Cx,
        guest: GuestOffset,
        bytes: u64,
        from: CopySource<'_>,
    ) -> Result<(), Errno> {
        let mut done = 0;
        while done < bytes {
            let at = GuestOffset(guest.0 + done);
            let rest = Data::Copied(from.after(done), bytes - done);
            done += Box::pin(self.write_step(cx, at, rest)).await?;
        }
        Ok(())
    }
}
