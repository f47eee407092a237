//! Changing the virtual size.
//!
//! Rules: multiples of 512; the rest of the last kept cluster is zeroed when shrinking (so that growing again
//! never shows old data); with ZERO_WRITE a grown area reads as zeroes even over a longer backing, and that is
//! durable before the size is.

use super::image::{FreeKind, Qcow2};
use super::l2::Kind;
use super::limits;
use super::overlap::Structure;
use super::units::{ClusterIndex, GuestOffset, HostOffset, us};
use super::zero::Change;
use crate::driver::Cx;
use crate::error::{Errno, QmpError};
use crate::types::{MAX_LENGTH, ReqFlags};

impl Qcow2 {
    /// Sets the virtual size.
    pub(super) async fn resize(&self, cx: &Cx, new: u64, flags: ReqFlags) -> Result<(), QmpError> {
        let old = self.meta.borrow().header.size;
        if !new.is_multiple_of(512) {
            return Err(QmpError::generic("The new size must be a multiple of 512"));
        }
        if new > MAX_LENGTH {
            return Err(QmpError::generic("Image is too big"));
        }
        if !self.geometry.v3 && self.meta.borrow().header.nb_snapshots != 0 {
            return Err(QmpError::generic("Can't resize a v2 image which has snapshots"));
        }
        self.bitmaps_can_resize(cx)?;
        let failed = |text: &'static str| move |errno| QmpError::errno(text, errno);
        {
            let _guard = self.lock_clear(0, u64::MAX).await;
            self.check_health()
                .map_err(failed("Failed to resize the image"))?;
            self.prepare_writable(cx)
                .await
                .map_err(failed("Failed to resize the image"))?;
        }
        let (kept, top) = (old.min(new), old.max(new));
        self.zero_tail(cx, kept, top, flags)
            .await
            .map_err(failed("Failed to zero out the new area"))?;
        if new < old {
            self.shrink(cx, old, new)
                .await
                .map_err(failed("Failed to discard cropped clusters"))?;
        } else {
            let _guard = self.lock.lock().await;
            self.grow_l1(cx, self.geometry.l1_needed(new))
                .await
                .map_err(failed("Failed to grow the L1 table"))?;
        }
        let from = self.geometry.up(old);
        if new > from && flags.contains(ReqFlags::ZERO_WRITE) {
            let backing = cx.node.backing.get().is_some();
            let zeroed = if self.geometry.v3 {
                self.change_range(cx, from, self.geometry.up(new), Change::ZeroKeep, false)
                    .await
            } else if backing {
                Err(Errno::ENOTSUP)
            } else {
                self.change_range(cx, from, self.geometry.up(new), Change::Discard, false)
                    .await
            };
            zeroed.map_err(failed("Failed to zero out new clusters"))?;
        }
        let _guard = self.lock.lock().await;
        self.switch_size(cx, new)
            .await
            .map_err(failed("Failed to update the image size"))
    }

    /// Everything durable, then the size in the header. Caller holds the image lock.
    async fn switch_size(&self, cx: &Cx, new: u64) -> Result<(), Errno> {
        self.settle(cx).await?;
        self.host_flush(cx).await?;
        self.patch_header(cx, 24, &new.to_be_bytes()).await?;
        self.meta.borrow_mut().header.size = new;
        Ok(())
    }

    /// Zeroes from the end of what is kept to the end of its cluster, as far as something could show there.
    async fn zero_tail(&self, cx: &Cx, kept: u64, top: u64, flags: ReqFlags) -> Result<(), Errno> {
        let end = self.geometry.up(kept).min(self.geometry.up(top));
        if end == kept {
            return Ok(());
        }
        let run = loop {
            match self.lookup(GuestOffset(kept), end - kept) {
                Ok(run) => break run,
                Err(stop) => self.resolve(cx, stop).await?,
            }
        };
        let shows = match run.kind {
            Kind::Normal | Kind::Compressed => true,
            Kind::ZeroPlain | Kind::ZeroAlloc => false,
            // The backing is cut off by the size; only a promise of zeroes needs a copy.
            Kind::Unallocated => flags.contains(ReqFlags::ZERO_WRITE) && cx.node.backing.get().is_some(),
        };
        if !shows {
            return Ok(());
        }
        self.write_at(cx, GuestOffset(kept), &vec![0; us(end - kept)])
            .await
    }

    async fn shrink(&self, cx: &Cx, old: u64, new: u64) -> Result<(), Errno> {
        self.change_range(
            cx,
            self.geometry.up(new),
            self.geometry.up(old),
            Change::Forget,
            false,
        )
        .await?;
        let _guard = self.lock_clear(0, u64::MAX).await;
        self.drop_l2_tables(cx, us(self.geometry.l1_needed(new)));
        Ok(())
    }

    /// Makes the L1 table have at least `needed` entries: a new table, switched to by one header write. Caller
    /// holds the image lock.
    async fn grow_l1(&self, cx: &Cx, needed: u64) -> Result<(), Errno> {
        let bits = self.geometry.cluster_bits;
        let (mut table, old_at) = {
            let meta = self.meta.borrow();
            (meta.l1.clone(), meta.header.l1_offset)
        };
        if needed <= table.len() as u64 {
            return Ok(());
        }
        if needed * 8 > limits::MAX_L1_BYTES {
            return Err(Errno::EFBIG);
        }
        let old_clusters = self.geometry.clusters(table.len() as u64 * 8);
        table.resize(us(needed), 0);
        let clusters = self.geometry.clusters(needed * 8);
        let first = self.allocate_exact(cx, clusters).await?;
        let at = self.geometry.host(first).0;
        // On an error the header may name either table; the new one stays counted, and leaks at worst.
        self.switch_l1(cx, &table, at, clusters).await?;
        {
            let mut meta = self.meta.borrow_mut();
            meta.l1 = table;
            meta.header.l1_offset = at;
            meta.header.l1_size = u32::try_from(needed).expect("limited above");
            meta.overlap.remove(old_at >> bits, Structure::ActiveL1);
            meta.overlap
                .insert(first.0, clusters, Structure::ActiveL1)
                .expect("the allocator has checked");
        }
        if old_clusters != 0 {
            self.free_later(cx, ClusterIndex(old_at >> bits), old_clusters, FreeKind::Other);
        }
        Ok(())
    }

    async fn switch_l1(&self, cx: &Cx, table: &[u64], at: u64, clusters: u64) -> Result<(), Errno> {
        // The refcounts of the new table, and all that the entries name.
        self.commit(cx).await?;
        let mut bytes = vec![0; us(clusters << self.geometry.cluster_bits)];
        for (out, entry) in bytes.chunks_exact_mut(8).zip(table) {
            out.copy_from_slice(&entry.to_be_bytes());
        }
        self.host_write(cx, HostOffset(at), &bytes).await?;
        self.host_flush(cx).await?;
        let entries = u32::try_from(table.len()).map_err(|_| Errno::EFBIG)?;
        let mut fields = [0; 12];
        fields[..4].copy_from_slice(&entries.to_be_bytes());
        fields[4..].copy_from_slice(&at.to_be_bytes());
        self.patch_header(cx, 36, &fields).await
    }
}
