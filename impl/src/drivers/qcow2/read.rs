//! Guest reads.
//!
//! One child read per run that is contiguous in the file. A read of mapped clusters holds an epoch guard from the
//! lookup to the end, so that a concurrent discard cannot give its clusters to someone else meanwhile.

use super::image::Qcow2;
use super::l2::Kind;
use super::units::{GuestOffset, us};
use crate::driver::Cx;
use crate::error::Errno;
use crate::types::ReqFlags;

impl Qcow2 {
    /// Reads what the guest sees, without bounds check.
    pub(super) async fn read_at(&self, cx: &Cx, guest: GuestOffset, buf: &mut [u8]) -> Result<(), Errno> {
        let mut done = 0;
        while done < buf.len() {
            let at = GuestOffset(guest.0 + done as u64);
            let run = match self.lookup(at, (buf.len() - done) as u64) {
                Ok(run) => run,
                Err(stop) => {
                    // Rare and large: boxed, so that the future of a cached read stays small.
                    Box::pin(self.resolve(cx, stop)).await?;
                    continue;
                }
            };
            let piece = &mut buf[done..done + us(run.bytes)];
            done += piece.len();
            match run.kind {
                Kind::Normal => {
                    let _reading = self.epochs.enter();
                    self.host_read(cx, run.host, piece).await?;
                }
                Kind::ZeroPlain | Kind::ZeroAlloc => piece.fill(0),
                Kind::Unallocated => match cx.node.backing.get() {
                    Some(backing) => cx.layer.read(backing, at.0, piece, ReqFlags::empty()).await?,
                    None => piece.fill(0),
                },
                Kind::Compressed => {
                    let _reading = self.epochs.enter();
                    Box::pin(self.read_compressed(cx, run.entry, self.geometry.within(at.0), piece)).await?;
                }
            }
        }
        Ok(())
    }
}
