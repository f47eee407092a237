//! Writing compressed clusters: raw deflate, packed one behind the other.
//!
//! Rules: whole guest clusters only; the last one may end with the disk. What does not become smaller, and what lies on a cluster that
//! has data of its own already, is written like any other data (QEMU 10.0 fails such a write with `EIO`). Deflated clusters share a
//! host cluster, each with a reference to it, as long as there is room in it and its counter can count them; none lies across two.
//! Order as for allocating writes: data, then the entry, in memory; meanwhile the guest cluster counts as being allocated.
//! Not here: threads that deflate.

use miniz_oxide::deflate::core::{
    CompressorOxide, TDEFLFlush, TDEFLStatus, compress, create_comp_flags_from_zip_params,
};

use super::image::{FreeKind, Qcow2};
use super::l2::{Entry, Kind};
use super::units::{GuestOffset, HostOffset, us};
use crate::driver::Cx;
use crate::error::Errno;

/// As hard as zlib tries by itself.
const LEVEL: i32 = 6;
/// Window bits of a stream without a zlib header.
const RAW: i32 = -15;

impl Qcow2 {
    /// Writes guest data, deflated where that helps.
    ///
    /// # Errors
    /// `EINVAL` for parts of clusters; those of writes.
    pub(super) async fn write_compressed(
        &self,
        cx: &Cx,
        guest: GuestOffset,
        buf: &[u8],
    ) -> Result<(), Errno> {
        let geometry = self.geometry;
        let (size, end) = (self.meta.borrow().header.size, guest.0 + buf.len() as u64);
        if geometry.within(guest.0) != 0 || (geometry.within(end) != 0 && end < size) {
            return Err(Errno::EINVAL);
        }
        let mut at = guest;
        for piece in buf.chunks(us(geometry.cs())) {
            let mut content = self.blank_table();
            content[..piece.len()].copy_from_slice(piece);
            let packed = match deflate(&content) {
                Some(packed) => Box::pin(self.write_packed(cx, at, &packed)).await?,
                None => false,
            };
            if !packed {
                self.write_at(cx, at, piece).await?;
            }
            at = GuestOffset(at.0 + geometry.cs());
        }
        Ok(())
    }

    /// Whether this became the content of the guest cluster; not where that has data of its own.
    async fn write_packed(&self, cx: &Cx, guest: GuestOffset, packed: &[u8]) -> Result<bool, Errno> {
        let first = guest.0 >> self.geometry.cluster_bits;
        let guard = self.lock_clear(first, first + 1).await;
        self.prepare_writable(cx).await?;
        let slot = self.l2_for_write(cx, self.geometry.l1_index(guest)).await?;
        let entry = Entry(self.meta.borrow().l2.entry(slot, self.geometry.l2_index(guest)));
        if matches!(entry.kind(), Kind::Normal | Kind::ZeroAlloc) {
            return Ok(false);
        }
        self.check_reserved(cx, entry, guest)?;
        let host = self.place_packed(cx, packed.len() as u64).await?;
        let id = {
            let mut meta = self.meta.borrow_mut();
            let id = meta.next_allocation;
            meta.next_allocation += 1;
            meta.in_flight.push((id, first, first + 1));
            id
        };
        drop(guard);
        let written = self.host_write(cx, host, packed).await;
        let _guard = self.lock.lock().await;
        let result = match written {
            Ok(()) => self.link_packed(cx, guest, host, packed.len() as u64).await,
            Err(errno) => Err(errno),
        };
        if result.is_err() && self.check_health().is_ok() {
            self.free_unlinked(cx, self.geometry.cluster(host), 1).await;
        }
        self.meta.borrow_mut().in_flight.retain(|f| f.0 != id);
        self.settled.open();
        result.map(|()| true)
    }

    /// Room for `bytes`, with a reference for them. Caller holds the image lock.
    async fn place_packed(&self, cx: &Cx, bytes: u64) -> Result<HostOffset, Errno> {
        self.check_health()?;
        let next = self.meta.borrow().packed_end;
        let room = self.geometry.up(next) - next;
        let at = if bytes <= room && self.share(cx, HostOffset(next)).await? {
            self.check_overlap(cx, HostOffset(next), bytes)?;
            HostOffset(next)
        } else {
            let (cluster, _, _) = self.allocate(cx, 1).await?;
            self.geometry.host(cluster)
        };
        self.meta.borrow_mut().packed_end = at.0 + bytes;
        Ok(at)
    }

    async fn link_packed(
        &self,
        cx: &Cx,
        guest: GuestOffset,
        host: HostOffset,
        bytes: u64,
    ) -> Result<(), Errno> {
        let slot = self.l2_for_write(cx, self.geometry.l1_index(guest)).await?;
        let index = self.geometry.l2_index(guest);
        let new = Entry::packed(host, bytes, self.geometry.cluster_bits);
        let old = {
            let mut meta = self.meta.borrow_mut();
            let old = Entry(meta.l2.entry(slot, index));
            meta.l2.set_entry(slot, index, new.0);
            old
        };
        // The same entry may have named something else before.
        self.inflated.take();
        self.free_entry(cx, old, FreeKind::Other);
        Ok(())
    }
}

/// A raw deflate stream that is shorter than the cluster; none when there is none.
fn deflate(content: &[u8]) -> Option<Vec<u8>> {
    let flags = create_comp_flags_from_zip_params(LEVEL, RAW, 0);
    let mut state = CompressorOxide::new(flags);
    let mut out = vec![0; content.len() - 1];
    let (status, _, written) = compress(&mut state, content, &mut out, TDEFLFlush::Finish);
    out.truncate(written);
    (status == TDEFLStatus::Done).then_some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_become_smaller_is_not_deflated() {
        let flat = [7; 4096];
        let packed = deflate(&flat).expect("it shrinks");
        assert!(packed.len() < 100);
        assert_eq!(miniz_oxide::inflate::decompress_to_vec(&packed).unwrap(), flat);
        let mut seed = 1_u32;
        let noise: Vec<u8> = std::iter::repeat_with(|| {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            seed.to_be_bytes()[0]
        })
        .take(4096)
        .collect();
        assert_eq!(deflate(&noise), None);
        assert_eq!(deflate(&noise[..512]), None);
    }
}
