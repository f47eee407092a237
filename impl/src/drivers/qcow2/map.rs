//! From guest offset to where the bytes are.
//!
//! `lookup` answers from memory in one synchronous step and gathers the longest run of one kind (contiguous in the
//! file where that matters), also across cached L2 tables. What is missing is loaded under the image lock.

use super::commit::Which;
use super::image::{Meta, Qcow2};
use super::l2::{Entry, Kind, OFFSET};
use super::units::{GuestOffset, HostOffset, us};
use crate::driver::Cx;
use crate::error::Errno;

/// A run of guest bytes of one kind.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Run {
    pub kind: Kind,
    /// Host position of the first byte (`Normal`, `ZeroAlloc`).
    pub host: HostOffset,
    /// The L2 entry of the first byte (`Compressed`).
    pub entry: Entry,
    pub bytes: u64,
}

/// Why a lookup stopped.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Stop {
    /// The L2 table of this L1 index is not in memory.
    Load(usize),
    /// The tables are wrong: text and offset.
    Corrupt(String, u64),
}

impl Qcow2 {
    /// The run at `guest`, at most `max` bytes.
    pub(super) fn lookup(&self, guest: GuestOffset, max: u64) -> Result<Run, Stop> {
        let meta = self.meta.borrow();
        let mut run: Option<Run> = None;
        let end = guest.0 + max;
        let mut at = guest;
        while at.0 < end {
            match self.lookup_in_table(&meta, at, end, &mut run) {
                Ok(Some(next)) => at = next,
                Ok(None) => break,
                Err(stop) => match run {
                    // What was gathered so far is good; the caller comes back for the rest.
                    Some(run) => return Ok(run),
                    None => return Err(stop),
                },
            }
        }
        Ok(run.expect("max is not zero"))
    }

    /// Extends `run` within one L2 table; `None`: the run ends.
    fn lookup_in_table(
        &self,
        meta: &Meta,
        mut at: GuestOffset,
        end: u64,
        run: &mut Option<Run>,
    ) -> Result<Option<GuestOffset>, Stop> {
        let geometry = self.geometry;
        let l1_index = geometry.l1_index(at);
        let table_end = (at.0 | (geometry.l2_span() - 1)) + 1;
        let l2_at = meta.l1.get(l1_index).map_or(0, |e| e & OFFSET);
        if l2_at == 0 {
            let piece = Run {
                kind: Kind::Unallocated,
                host: HostOffset(0),
                entry: Entry(0),
                bytes: table_end.min(end) - at.0,
            };
            return Ok(extend(run, piece).then_some(GuestOffset(table_end)));
        }
        let Some(slot) = meta.l2.find(HostOffset(l2_at)) else {
            return Err(Stop::Load(l1_index));
        };
        let end = end.min(table_end);
        let mut index = geometry.l2_index(at);
        while at.0 < end {
            let entry = Entry(meta.l2.entry(slot, index));
            let kind = entry.kind();
            let within = geometry.within(at.0);
            self.check_entry(entry, kind, at)?;
            let host = match kind {
                Kind::Normal | Kind::ZeroAlloc => HostOffset(entry.host().0 + within),
                _ => HostOffset(0),
            };
            let bytes = (geometry.cs() - within).min(end - at.0);
            if !extend(
                run,
                Run {
                    kind,
                    host,
                    entry,
                    bytes,
                },
            ) {
                return Ok(None);
            }
            at.0 += bytes;
            index += 1;
        }
        Ok(Some(at))
    }

    /// Run-time corruption rules of one entry.
    #[inline]
    pub(super) fn check_entry(&self, entry: Entry, kind: Kind, at: GuestOffset) -> Result<(), Stop> {
        match kind {
            Kind::ZeroPlain | Kind::ZeroAlloc if !self.geometry.v3 => {
                let text = format!(
                    "Zero cluster entry found in pre-v3 image (guest offset: {:#x})",
                    at.0
                );
                Err(Stop::Corrupt(text, entry.host().0))
            }
            Kind::Normal | Kind::ZeroAlloc if self.geometry.within(entry.host().0) != 0 => {
                let host = entry.host().0;
                let text = format!(
                    "Cluster allocation offset {host:#x} unaligned (guest offset: {:#x})",
                    at.0
                );
                Err(Stop::Corrupt(text, host))
            }
            _ => Ok(()),
        }
    }

    /// Reacts to a stopped lookup, so that it can be repeated. Takes the image lock.
    pub(super) async fn resolve(&self, cx: &Cx, stop: Stop) -> Result<(), Errno> {
        match stop {
            Stop::Load(index) => {
                let _guard = self.lock.lock().await;
                self.load_l2(cx, index).await
            }
            Stop::Corrupt(text, at) => Err(self.found_corrupt(cx, &text, Some(at), None)),
        }
    }

    /// Brings the L2 table of an L1 index to memory, if there is one. Caller holds the image lock.
    pub(super) async fn load_l2(&self, cx: &Cx, index: usize) -> Result<(), Errno> {
        let at = {
            let meta = self.meta.borrow();
            let at = HostOffset(meta.l1.get(index).map_or(0, |e| e & OFFSET));
            if at.0 == 0 || meta.l2.find(at).is_some() {
                return Ok(());
            }
            at
        };
        let cs = self.geometry.cs();
        if self.geometry.within(at.0) != 0 {
            let text = format!("L2 table offset {:#x} unaligned (L1 index: {index:#x})", at.0);
            return Err(self.found_corrupt(cx, &text, Some(at.0), None));
        }
        if at.0 + cs > self.host_length(cx) {
            let text = format!(
                "L2 table offset {:#x} outside of the file (L1 index: {index:#x})",
                at.0
            );
            return Err(self.found_corrupt(cx, &text, Some(at.0), None));
        }
        self.make_room(cx, Which::L2).await?;
        let mut data = self.blank_table();
        self.host_read(cx, at, &mut data).await?;
        self.meta.borrow_mut().l2.insert(at, data, false);
        Ok(())
    }

    /// The slot of an L2 table that may be changed in place: loaded, made, or copied if it is shared. Caller holds
    /// the image lock; the slot is good until the next L2 table is loaded.
    pub(super) async fn l2_for_write(&self, cx: &Cx, index: usize) -> Result<usize, Errno> {
        self.check_health()?;
        let entry = *self.meta.borrow().l1.get(index).ok_or(Errno::EIO)?;
        if entry & super::l2::L1_RESERVED != 0 {
            let text = format!("Reserved bits set in L1 entry {index:#x}: {entry:#x}");
            return Err(self.found_corrupt(cx, &text, None, None));
        }
        let old = HostOffset(entry & OFFSET);
        if old.0 == 0 {
            return self.install_l2(cx, index, None).await;
        }
        self.load_l2(cx, index).await?;
        let cached = |this: &Qcow2| this.meta.borrow().l2.find(old).expect("loaded just now");
        let slot = cached(self);
        if self.meta.borrow().l2.page(slot).exclusive {
            return Ok(slot);
        }
        match self.refcount(cx, self.geometry.cluster(old)).await? {
            0 => {
                let text = format!("L2 table at {:#x} has refcount 0 (L1 index: {index:#x})", old.0);
                Err(self.found_corrupt(cx, &text, Some(old.0), None))
            }
            1 => {
                self.meta.borrow_mut().l2.page_mut(slot).exclusive = true;
                Ok(slot)
            }
            _ => self.install_l2(cx, index, Some(old)).await,
        }
    }

    /// A new L2 table for an L1 index: empty, or a copy of the shared one.
    async fn install_l2(&self, cx: &Cx, index: usize, shared: Option<HostOffset>) -> Result<usize, Errno> {
        let mut data = self.blank_table();
        if let Some(old) = shared {
            let meta = self.meta.borrow();
            let slot = meta.l2.find(old).expect("loaded by the caller");
            data.copy_from_slice(&meta.l2.page(slot).data);
        }
        self.make_room(cx, Which::L2).await?;
        let (cluster, _, _) = self.allocate(cx, 1).await?;
        let at = self.geometry.host(cluster);
        let slot = {
            let mut meta = self.meta.borrow_mut();
            let kind = super::overlap::Structure::ActiveL2;
            meta.overlap
                .insert(cluster.0, 1, kind)
                .expect("the allocator has checked");
            if let Some(old) = shared {
                // A table reached twice is another entry's too; then its protection goes early, its count does not.
                meta.overlap.remove(self.geometry.cluster(old).0, kind);
            }
            meta.set_l1(index, at.0 | super::l2::COPIED);
            // A table that several entries shared stays cached when the last of them has left it; its cluster was
            // free to become this one.
            meta.l2.forget(at);
            meta.l2.insert(at, data, true)
        };
        if let Some(old) = shared {
            self.free_later(cx, self.geometry.cluster(old), 1, super::image::FreeKind::Other);
        }
        Ok(slot)
    }

    /// How many entries from `guest` on its L2 table has for a request that ends at `end`.
    pub(super) fn entries_in_table(&self, guest: GuestOffset, end: u64) -> usize {
        let geometry = self.geometry;
        let last = end.min((guest.0 | (geometry.l2_span() - 1)) + 1);
        us(geometry.clusters(last - geometry.down(guest.0)))
    }
}

/// Appends a piece to a run if it continues it.
#[inline]
fn extend(run: &mut Option<Run>, piece: Run) -> bool {
    match run {
        None => *run = Some(piece),
        Some(run) => {
            let continues = run.kind == piece.kind
                && match run.kind {
                    Kind::Unallocated | Kind::ZeroPlain => true,
                    Kind::Normal | Kind::ZeroAlloc => run.host.0 + run.bytes == piece.host.0,
                    Kind::Compressed => false,
                };
            if !continues {
                return false;
            }
            run.bytes += piece.bytes;
        }
    }
    true
}
