//! Bringing metadata to the file, in an order that survives power loss at any point.
//!
//! | step | written | before it, durable |
//! |---|---|---|
//! | 1 | refcount blocks | nothing: the cached counts are never too low for what the file refers to |
//! | 2 | refcount table | the blocks it names |
//! | 3 | L2 tables | guest data, copied data, and refcounts of all they name |
//! | 4 | L1 table | the L2 tables it names |
//! | 5 | (memory) counts of freed clusters go down | the removal of the references |
//!
//! Counts go up in memory before a reference exists and go down only in step 5: that is why step 1 is always safe.
//! An error leaves everything that was not written dirty; the next commit tries again.

use super::cache::Cache;
use super::image::{Freed, Meta, Qcow2};
use super::limits;
use super::units::{ClusterIndex, HostOffset};
use crate::driver::Cx;
use crate::error::Errno;

/// A cache of tables.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Which {
    L2,
    Refblocks,
}

impl Meta {
    pub(super) fn cache(&mut self, which: Which) -> &mut Cache {
        match which {
            Which::L2 => &mut self.l2,
            Which::Refblocks => &mut self.refblocks,
        }
    }
}

impl Qcow2 {
    /// Steps 1 to 4. The last one written is not flushed. Caller holds the image lock.
    pub(super) async fn commit(&self, cx: &Cx) -> Result<(), Errno> {
        self.check_health()?;
        self.restore_header(cx).await?;
        let dirty = |f: fn(&Meta) -> bool| f(&self.meta.borrow());
        self.write_cache(cx, Which::Refblocks).await?;
        if dirty(|m| !m.reftable_dirty.is_empty()) {
            self.host_flush(cx).await?;
            self.write_reftable(cx).await?;
        }
        if dirty(|m| m.l2.is_dirty()) {
            self.host_flush(cx).await?;
            self.write_cache(cx, Which::L2).await?;
        }
        if dirty(|m| !m.l1_dirty.is_empty()) {
            self.host_flush(cx).await?;
            self.write_l1(cx).await?;
        }
        Ok(())
    }

    /// All steps: afterwards the file holds everything and what was freed is free, except clusters that requests
    /// in flight may still touch. Caller holds the image lock.
    pub(super) async fn settle(&self, cx: &Cx) -> Result<(), Errno> {
        self.commit(cx).await?;
        if !self.meta.borrow().freed.is_empty() {
            self.host_flush(cx).await?;
            let mut meta = self.meta.borrow_mut();
            let meta = &mut *meta;
            meta.durable.append(&mut meta.freed);
            meta.freed_clusters = 0;
        }
        self.release(cx).await
    }

    /// A guest's flush: everything to the file; the caller flushes the file.
    pub(super) async fn flush_metadata(&self, cx: &Cx) -> Result<(), Errno> {
        let _guard = self.lock.lock().await;
        self.settle(cx).await
    }

    /// Everything durable and every refcount exact; nothing is in flight.
    pub(super) async fn write_back(&self, cx: &Cx) -> Result<(), Errno> {
        let _guard = self.lock.lock().await;
        self.settle(cx).await?;
        self.commit(cx).await?;
        self.host_flush(cx).await
    }

    /// Settles when freed clusters pile up. An error is not the caller's: everything stays as it was.
    pub(super) async fn relieve(&self, cx: &Cx) {
        let full = {
            let meta = self.meta.borrow();
            meta.freed.len() >= limits::QUARANTINE_RANGES
                || meta.freed_clusters << self.geometry.cluster_bits >= limits::QUARANTINE_BYTES
        };
        if full {
            let _ = self.settle(cx).await;
        }
    }

    async fn write_cache(&self, cx: &Cx, which: Which) -> Result<(), Errno> {
        let mut scratch = std::mem::take(&mut self.meta.borrow_mut().scratch);
        let mut result = Ok(());
        loop {
            let next = self.meta.borrow_mut().cache(which).next_dirty(&mut scratch);
            let Some((at, slot)) = next else { break };
            result = self.host_write(cx, at, &scratch).await;
            if result.is_err() {
                break;
            }
            self.meta.borrow_mut().cache(which).cleaned(slot);
        }
        self.meta.borrow_mut().scratch = scratch;
        result
    }

    async fn write_l1(&self, cx: &Cx) -> Result<(), Errno> {
        loop {
            let (at, sector, bytes, used) = {
                let meta = self.meta.borrow();
                let Some(&sector) = meta.l1_dirty.first() else {
                    return Ok(());
                };
                let (bytes, used) = table_sector(&meta.l1, sector);
                (meta.header.l1_offset, sector, bytes, used)
            };
            self.host_write(cx, HostOffset(at + 512 * sector as u64), &bytes[..used])
                .await?;
            self.meta.borrow_mut().l1_dirty.remove(&sector);
        }
    }

    async fn write_reftable(&self, cx: &Cx) -> Result<(), Errno> {
        loop {
            let (at, sector, bytes, used) = {
                let meta = self.meta.borrow();
                let Some(&sector) = meta.reftable_dirty.first() else {
                    return Ok(());
                };
                let (bytes, used) = table_sector(&meta.reftable, sector);
                (meta.header.reftable_offset, sector, bytes, used)
            };
            self.host_write(cx, HostOffset(at + 512 * sector as u64), &bytes[..used])
                .await?;
            self.meta.borrow_mut().reftable_dirty.remove(&sector);
        }
    }

    /// Step 5, for the clusters that no request in flight may touch.
    async fn release(&self, cx: &Cx) -> Result<(), Errno> {
        let mut discards: Vec<(u64, u64)> = Vec::new();
        let mut result = Ok(());
        let mut waiting = std::mem::take(&mut self.meta.borrow_mut().durable);
        let mut kept = Vec::new();
        while let Some(freed) = waiting.pop() {
            if result.is_err() || !self.epochs.is_over(freed.epoch) {
                kept.push(freed);
            } else if let Err((rest, errno)) = self.release_one(cx, freed, &mut discards).await {
                kept.extend(rest);
                result = Err(errno);
            }
        }
        self.meta.borrow_mut().durable.append(&mut kept);
        discards.sort_unstable();
        for (first, count) in merge(&discards) {
            let bits = self.geometry.cluster_bits;
            // Only an optimisation; the image lock keeps the clusters from being allocated meanwhile.
            if let Ok(file) = cx.file() {
                let _ = cx.layer.discard(file, first << bits, count << bits).await;
            }
        }
        result
    }

    async fn release_one(
        &self,
        cx: &Cx,
        freed: Freed,
        discards: &mut Vec<(u64, u64)>,
    ) -> Result<(), (Option<Freed>, Errno)> {
        for done in 0..freed.count {
            let cluster = ClusterIndex(freed.first + done);
            match self.drop_reference(cx, cluster).await {
                Ok(0) if freed.discard => discards.push((cluster.0, 1)),
                Ok(_) => {}
                Err(errno) => {
                    let rest = Freed {
                        first: cluster.0,
                        count: freed.count - done,
                        ..freed
                    };
                    return Err((Some(rest), errno));
                }
            }
        }
        Ok(())
    }
}

/// Sector `sector` of a table of 64-bit entries, and how much of it the table has.
fn table_sector(table: &[u64], sector: usize) -> ([u8; 512], usize) {
    let mut out = [0; 512];
    let entries = &table[64 * sector..table.len().min(64 * sector + 64)];
    for (bytes, entry) in out.chunks_exact_mut(8).zip(entries) {
        bytes.copy_from_slice(&entry.to_be_bytes());
    }
    (out, 8 * entries.len())
}

/// Joins adjacent (first, count) ranges of a sorted list.
fn merge(ranges: &[(u64, u64)]) -> Vec<(u64, u64)> {
    let mut out: Vec<(u64, u64)> = Vec::new();
    for &(first, count) in ranges {
        match out.last_mut() {
            Some(last) if last.0 + last.1 == first => last.1 += count,
            _ => out.push((first, count)),
        }
    }
    out
}
