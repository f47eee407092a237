//! Zero writes and discards: changes of L2 entries without data.
//!
//! Both wait for allocations in flight in their range. Freed clusters go through the quarantine, so a read that
//! looked them up before still gets their old content, never someone else's.

use super::image::{FreeKind, Qcow2};
use super::l2::{Entry, Kind, OFFSET, ZERO};
use super::map::Stop;
use super::units::{GuestOffset, HostOffset};
use crate::driver::Cx;
use crate::error::Errno;
use crate::types::{ReqFlags, StatusFlags};

/// What becomes of an entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Change {
    /// Reads as zeroes; an allocated cluster is kept.
    ZeroKeep,
    /// Reads as zeroes; an allocated cluster is freed.
    ZeroUnmap,
    /// Unimportant to the guest: zeroes that hide the backing, or nothing where there is no backing.
    Discard,
    /// Not in this layer any more.
    Forget,
}

impl Qcow2 {
    /// A zero write.
    pub(super) async fn zero_at(
        &self,
        cx: &Cx,
        guest: GuestOffset,
        bytes: u64,
        flags: ReqFlags,
    ) -> Result<(), Errno> {
        let geometry = self.geometry;
        let backing = cx.node.backing.get().is_some();
        if !geometry.v3 && backing {
            return Err(Errno::ENOTSUP);
        }
        let size = self.meta.borrow().header.size;
        let end = guest.0 + bytes;
        let head = geometry.within(guest.0);
        let tail = if end == size { 0 } else { geometry.up(end) - end };
        let (from, to) = (geometry.down(guest.0), geometry.up(end));
        if head + tail != 0 {
            if to - from > geometry.cs() {
                return Err(Errno::ENOTSUP);
            }
            self.check_rest_is_zero(cx, from, guest.0, end).await?;
        }
        let change = match (geometry.v3, flags.contains(ReqFlags::MAY_UNMAP)) {
            (false, _) => Change::Discard,
            (true, true) => Change::ZeroUnmap,
            (true, false) => Change::ZeroKeep,
        };
        self.change_range(cx, from, to, change, head + tail != 0).await
    }

    /// `ENOTSUP` unless the cluster at `from` reads as zeroes outside of [start, end).
    async fn check_rest_is_zero(&self, cx: &Cx, from: u64, start: u64, end: u64) -> Result<(), Errno> {
        let to = from + self.geometry.cs();
        let run = loop {
            match self.lookup(GuestOffset(from), self.geometry.cs()) {
                Ok(run) => break run,
                Err(stop) => self.resolve(cx, stop).await?,
            }
        };
        match run.kind {
            Kind::ZeroPlain | Kind::ZeroAlloc => return Ok(()),
            Kind::Normal | Kind::Compressed => return Err(Errno::ENOTSUP),
            Kind::Unallocated => {}
        }
        let Some(backing) = cx.node.backing.get().and_then(|edge| cx.layer.child(edge)) else {
            return Ok(());
        };
        for (mut at, end) in [(from, start), (end, to)] {
            while at < end {
                let status = cx
                    .layer
                    .block_status_above(backing.id, None, at, end - at)
                    .await?;
                if status.pnum == 0 {
                    // Past the end of the backing: zeroes.
                    break;
                }
                if !status.flags.contains(StatusFlags::ZERO) {
                    return Err(Errno::ENOTSUP);
                }
                at += status.pnum;
            }
        }
        Ok(())
    }

    /// A discard.
    pub(super) async fn discard_at(&self, cx: &Cx, guest: GuestOffset, bytes: u64) -> Result<(), Errno> {
        let geometry = self.geometry;
        if !geometry.v3 && cx.node.backing.get().is_some() {
            return Err(Errno::ENOTSUP);
        }
        let end = guest.0 + bytes;
        let aligned_end = geometry.within(end) == 0 || end == self.meta.borrow().header.size;
        if geometry.within(guest.0) != 0 || !aligned_end {
            return Err(Errno::ENOTSUP);
        }
        self.change_range(cx, guest.0, geometry.up(end), Change::Discard, false)
            .await
    }

    /// Changes the entries of whole clusters [from, to). `widened`: allocated clusters must not be there any more
    /// than when the caller looked; `ENOTSUP` if they are.
    pub(super) async fn change_range(
        &self,
        cx: &Cx,
        from: u64,
        to: u64,
        change: Change,
        widened: bool,
    ) -> Result<(), Errno> {
        let geometry = self.geometry;
        let mut at = GuestOffset(from);
        while at.0 < to {
            let end = to.min((at.0 | (geometry.l2_span() - 1)) + 1);
            let _guard = self
                .lock_clear(at.0 >> geometry.cluster_bits, end >> geometry.cluster_bits)
                .await;
            self.prepare_writable(cx).await?;
            self.change_in_table(cx, at, end, change, widened).await?;
            self.relieve(cx).await;
            at = GuestOffset(end);
        }
        Ok(())
    }

    /// The part of `change_range` within one L2 table. Caller holds the image lock.
    async fn change_in_table(
        &self,
        cx: &Cx,
        at: GuestOffset,
        end: u64,
        change: Change,
        widened: bool,
    ) -> Result<(), Errno> {
        let l1_index = self.geometry.l1_index(at);
        let backing = cx.node.backing.get().is_some();
        let mapped = self
            .meta
            .borrow()
            .l1
            .get(l1_index)
            .is_some_and(|e| e & OFFSET != 0);
        let nothing_to_do = match change {
            Change::ZeroKeep | Change::ZeroUnmap => false,
            Change::Discard => !backing,
            Change::Forget => true,
        };
        if !mapped && nothing_to_do {
            return Ok(());
        }
        let slot = self.l2_for_write(cx, l1_index).await?;
        let base = self.geometry.l2_index(at);
        for i in 0..self.entries_in_table(at, end) {
            let guest = GuestOffset(at.0 + ((i as u64) << self.geometry.cluster_bits));
            let old = Entry(self.meta.borrow().l2.entry(slot, base + i));
            let kind = old.kind();
            if let Err(Stop::Corrupt(text, at)) = self.check_entry(old, kind, guest) {
                return Err(self.found_corrupt(cx, &text, Some(at), None));
            }
            if widened && matches!(kind, Kind::Normal | Kind::Compressed) {
                return Err(Errno::ENOTSUP);
            }
            let new = self.changed(old, kind, change, backing);
            if new == old {
                continue;
            }
            self.check_reserved(cx, old, guest)?;
            self.meta.borrow_mut().l2.set_entry(slot, base + i, new.0);
            if new.kind() == Kind::ZeroAlloc {
                let tag = self.epochs.retire();
                self.meta.borrow_mut().kept_zero = Some(tag);
            } else {
                let why = if change == Change::Forget {
                    FreeKind::Other
                } else {
                    FreeKind::Request
                };
                self.free_entry(cx, old, why);
            }
        }
        Ok(())
    }

    fn changed(&self, old: Entry, kind: Kind, change: Change, backing: bool) -> Entry {
        let zero = Entry(ZERO);
        match change {
            Change::Forget => Entry(0),
            Change::ZeroUnmap => zero,
            Change::ZeroKeep => match kind {
                Kind::Compressed | Kind::Unallocated | Kind::ZeroPlain => zero,
                Kind::Normal | Kind::ZeroAlloc => Entry(old.0 | ZERO),
            },
            Change::Discard if !backing && kind == Kind::Unallocated => old,
            Change::Discard if self.geometry.v3 => zero,
            Change::Discard => Entry(0),
        }
    }

    /// Drops the L2 tables from L1 index `first` on; their entries are empty. Caller holds the image lock.
    pub(super) fn drop_l2_tables(&self, cx: &Cx, first: usize) {
        let geometry = self.geometry;
        let len = self.meta.borrow().l1.len();
        for index in first..len {
            let at = HostOffset(self.meta.borrow().l1[index] & OFFSET);
            if at.0 == 0 {
                continue;
            }
            {
                let mut meta = self.meta.borrow_mut();
                meta.set_l1(index, 0);
                meta.l2.forget(at);
                meta.overlap
                    .remove(geometry.cluster(at).0, super::overlap::Structure::ActiveL2);
            }
            self.free_later(cx, geometry.cluster(at), 1, FreeKind::Other);
        }
    }
}
