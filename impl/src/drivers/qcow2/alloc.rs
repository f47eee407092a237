//! Host clusters: reference counts, the allocator, refcount blocks and the refcount table.
//!
//! Rules: first fit upwards from `free_index`, contiguous, never across a refcount block's region (the run is cut
//! there). A region without a block gets one in its own first cluster. Everything here runs under the image lock.
//! A new count is in the cache before anything refers to the cluster; `commit` orders the rest.

use super::commit::Which;
use super::image::Qcow2;
use super::limits;
use super::overlap::Structure;
use super::refcount;
use super::units::{ClusterIndex, HostOffset, us};
use crate::driver::Cx;
use crate::error::Errno;

/// Bits of a refcount table entry that are the block's offset.
const REFTABLE_OFFSET: u64 = !0x1ff;

/// What memory knows of a cluster's refcount.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Probe {
    Count(u64),
    /// Refcount block of this index has to be loaded.
    Load(usize),
}

/// Outcome of one synchronous search.
enum Scan {
    Found(u64, u64),
    Load(usize),
    NewBlock(usize),
    NewTable(usize),
    TooBig,
}

impl Qcow2 {
    /// Refcount of a cluster, if memory knows it.
    #[inline]
    pub(super) fn probe(&self, cluster: ClusterIndex) -> Probe {
        let meta = self.meta.borrow();
        let index = cluster.0 / self.geometry.rb_entries();
        let Some(&entry) = usize::try_from(index).ok().and_then(|i| meta.reftable.get(i)) else {
            return Probe::Count(0);
        };
        if entry & REFTABLE_OFFSET == 0 {
            return Probe::Count(0);
        }
        match meta.refblocks.find(HostOffset(entry & REFTABLE_OFFSET)) {
            Some(slot) => {
                let within = us(cluster.0 % self.geometry.rb_entries());
                let block = &meta.refblocks.page(slot).data;
                Probe::Count(refcount::get(block, self.geometry.refcount_order, within))
            }
            None => Probe::Load(us(index)),
        }
    }

    /// Refcount of a cluster.
    pub(super) async fn refcount(&self, cx: &Cx, cluster: ClusterIndex) -> Result<u64, Errno> {
        loop {
            match self.probe(cluster) {
                Probe::Count(count) => return Ok(count),
                Probe::Load(index) => self.load_refblock(cx, index).await?,
            }
        }
    }

    /// Makes a cache slot free, writing dirty tables back if it must.
    pub(super) async fn make_room(&self, cx: &Cx, which: Which) -> Result<(), Errno> {
        if !self.meta.borrow_mut().cache(which).make_room() {
            self.commit(cx).await?;
            assert!(
                self.meta.borrow_mut().cache(which).make_room(),
                "a commit cleans every page"
            );
        }
        Ok(())
    }

    async fn load_refblock(&self, cx: &Cx, index: usize) -> Result<(), Errno> {
        let at = self.meta.borrow().reftable[index] & REFTABLE_OFFSET;
        if self.geometry.within(at) != 0 {
            let text = format!("Refblock offset {at:#x} unaligned (reftable index: {index:#x})");
            return Err(self.found_corrupt(cx, &text, Some(at), None));
        }
        if at
            .checked_add(self.geometry.cs())
            .is_none_or(|end| end > self.host_length(cx))
        {
            let text = format!("Refblock offset {at:#x} outside of the file (reftable index: {index:#x})");
            return Err(self.found_corrupt(cx, &text, Some(at), None));
        }
        self.make_room(cx, Which::Refblocks).await?;
        let mut data = self.blank_table();
        self.host_read(cx, HostOffset(at), &mut data).await?;
        self.meta
            .borrow_mut()
            .refblocks
            .insert(HostOffset(at), data, false);
        Ok(())
    }

    /// Lowers a refcount by one; returns what is left.
    pub(super) async fn drop_reference(&self, cx: &Cx, cluster: ClusterIndex) -> Result<u64, Errno> {
        let count = self.refcount(cx, cluster).await?;
        if count == 0 {
            let at = self.geometry.host(cluster).0;
            return Err(self.found_corrupt(
                cx,
                "Refcount of a freed cluster is already zero",
                Some(at),
                None,
            ));
        }
        self.set_cached_refcount(cluster, count - 1);
        if count == 1 {
            let mut meta = self.meta.borrow_mut();
            meta.free_index = meta.free_index.min(cluster.0);
            if self.geometry.cluster(HostOffset(meta.packed_end)) == cluster {
                // It may become anything now.
                meta.packed_end = 0;
            }
        }
        Ok(count - 1)
    }

    /// One more reference to the cluster of compressed data that ends here. Whether it could be counted.
    pub(super) async fn share(&self, cx: &Cx, end: HostOffset) -> Result<bool, Errno> {
        let cluster = self.geometry.cluster(end);
        let count = self.refcount(cx, cluster).await?;
        let most = u64::MAX >> (64 - (1_u32 << self.geometry.refcount_order));
        let counts = count > 0 && count < most;
        if counts {
            self.set_cached_refcount(cluster, count + 1);
        }
        Ok(counts)
    }

    /// Gives clusters back that nothing has ever referred to.
    pub(super) async fn free_unlinked(&self, cx: &Cx, first: ClusterIndex, count: u64) {
        for cluster in first.0..first.0 + count {
            // On an error they leak, which is harmless.
            if self.drop_reference(cx, ClusterIndex(cluster)).await.is_err() {
                return;
            }
        }
    }

    /// Sets a refcount whose block was cached by the step before.
    fn set_cached_refcount(&self, cluster: ClusterIndex, count: u64) {
        let mut meta = self.meta.borrow_mut();
        let entries = self.geometry.rb_entries();
        let at = HostOffset(meta.reftable[us(cluster.0 / entries)] & REFTABLE_OFFSET);
        let slot = meta.refblocks.find(at).expect("cached by the step before");
        let block = &mut meta.refblocks.page_mut(slot).data;
        let (from, to) = refcount::set(
            block,
            self.geometry.refcount_order,
            us(cluster.0 % entries),
            count,
        );
        meta.refblocks.touch(slot, from, to);
    }

    /// Allocates 1 to `want` contiguous clusters with refcount 1. Returns also whether they were never written.
    pub(super) async fn allocate(&self, cx: &Cx, want: u64) -> Result<(ClusterIndex, u64, bool), Errno> {
        self.check_health()?;
        self.relieve(cx).await;
        self.allocate_run(cx, want, false).await
    }

    /// Allocates exactly `count` contiguous clusters.
    pub(super) async fn allocate_exact(&self, cx: &Cx, count: u64) -> Result<ClusterIndex, Errno> {
        self.check_health()?;
        if count >= self.geometry.rb_entries() {
            return self.place_at_end(cx, count).await;
        }
        Ok(self.allocate_run(cx, count, true).await?.0)
    }

    async fn allocate_run(
        &self,
        cx: &Cx,
        want: u64,
        exact: bool,
    ) -> Result<(ClusterIndex, u64, bool), Errno> {
        loop {
            let scan = self.scan(want, exact);
            match scan {
                Scan::Found(first, count) => return self.take(cx, first, count),
                Scan::Load(index) => self.load_refblock(cx, index).await?,
                Scan::NewBlock(index) => self.new_refblock(cx, index).await?,
                Scan::NewTable(index) => self.grow_reftable(cx, index as u64 + 1).await?,
                Scan::TooBig => return Err(Errno::EFBIG),
            }
        }
    }

    /// Searches as far as memory knows.
    fn scan(&self, want: u64, exact: bool) -> Scan {
        let mut meta = self.meta.borrow_mut();
        let entries = self.geometry.rb_entries();
        let order = self.geometry.refcount_order;
        let mut at = meta.free_index;
        loop {
            if at >= limits::HOST_END >> self.geometry.cluster_bits {
                return Scan::TooBig;
            }
            let index = us(at / entries);
            let Some(&entry) = meta.reftable.get(index) else {
                return Scan::NewTable(index);
            };
            if entry & REFTABLE_OFFSET == 0 {
                return Scan::NewBlock(index);
            }
            let Some(slot) = meta.refblocks.find(HostOffset(entry & REFTABLE_OFFSET)) else {
                return Scan::Load(index);
            };
            let block = &meta.refblocks.page(slot).data;
            let end = (index as u64 + 1) * entries;
            let mut run = 0;
            while at < end && run < want {
                run = if refcount::get(block, order, us(at % entries)) == 0 {
                    run + 1
                } else {
                    0
                };
                at += 1;
            }
            if run == want || run > 0 && !exact {
                if !exact {
                    meta.free_index = at;
                }
                return Scan::Found(at - run, run);
            }
            if !exact {
                meta.free_index = at;
            }
        }
    }

    /// Counts the clusters of a run found by `scan`.
    fn take(&self, cx: &Cx, first: u64, count: u64) -> Result<(ClusterIndex, u64, bool), Errno> {
        let cs = self.geometry.cs();
        if first + count > limits::HOST_END >> self.geometry.cluster_bits {
            return Err(Errno::EFBIG);
        }
        self.check_overlap(cx, self.geometry.host(ClusterIndex(first)), count * cs)?;
        for cluster in first..first + count {
            self.set_cached_refcount(ClusterIndex(cluster), 1);
        }
        let mut meta = self.meta.borrow_mut();
        let virgin = first * cs >= meta.virgin_from;
        meta.virgin_from = meta.virgin_from.max((first + count) * cs);
        Ok((ClusterIndex(first), count, virgin))
    }

    /// Gives region `index`, in which nothing is counted, a block in its first cluster.
    async fn new_refblock(&self, cx: &Cx, index: usize) -> Result<(), Errno> {
        let first = index as u64 * self.geometry.rb_entries();
        let at = self.geometry.host(ClusterIndex(first));
        if first == 0 {
            let text = "Preventing invalid allocation of refcount block at offset 0";
            return Err(self.found_corrupt(cx, text, None, None));
        }
        if at.0 >= limits::HOST_END {
            return Err(Errno::EFBIG);
        }
        self.make_room(cx, Which::Refblocks).await?;
        let inserted = self
            .meta
            .borrow_mut()
            .overlap
            .insert(first, 1, Structure::Refblock);
        inserted.map_err(|hit| self.overlaps(cx, at.0, self.geometry.cs(), hit))?;
        let mut data = self.blank_table();
        refcount::set(&mut data, self.geometry.refcount_order, 0, 1);
        let mut meta = self.meta.borrow_mut();
        meta.refblocks.insert(at, data, true);
        meta.set_reftable(index, at.0);
        meta.virgin_from = meta.virgin_from.max(at.0 + self.geometry.cs());
        Ok(())
    }

    /// How many refcount blocks a stretch needs that holds these blocks first and then `clusters` more.
    fn blocks_for(&self, clusters: u64) -> u64 {
        let entries = self.geometry.rb_entries();
        // entries >= 64, so each block leaves room for at least 63 others.
        clusters.div_ceil(entries - 1).max(1)
    }

    /// Writes the `blocks` refcount blocks of regions from `region` on, which count themselves and `clusters` more.
    async fn write_blocks(&self, cx: &Cx, region: u64, blocks: u64, clusters: u64) -> Result<(), Errno> {
        let entries = self.geometry.rb_entries();
        let start = region * entries;
        let end = start + blocks + clusters;
        let bits = self.geometry.cluster_bits;
        if end > limits::HOST_END >> bits {
            return Err(Errno::EFBIG);
        }
        self.check_overlap(cx, HostOffset(start << bits), (blocks + clusters) << bits)?;
        for block in 0..blocks {
            let mut data = self.blank_table();
            let counted = end.saturating_sub((region + block) * entries).min(entries);
            for index in 0..us(counted) {
                refcount::set(&mut data, self.geometry.refcount_order, index, 1);
            }
            self.host_write(cx, HostOffset((start + block) << bits), &data)
                .await?;
        }
        let mut meta = self.meta.borrow_mut();
        meta.virgin_from = meta.virgin_from.max(end << bits);
        Ok(())
    }

    /// Allocates `count` clusters behind all regions in use, with the refcount blocks that they need.
    async fn place_at_end(&self, cx: &Cx, count: u64) -> Result<ClusterIndex, Errno> {
        let blocks = self.blocks_for(count);
        let region = loop {
            let (region, len) = {
                let meta = self.meta.borrow();
                let used = meta.reftable.iter().rposition(|e| e & REFTABLE_OFFSET != 0);
                (used.map_or(0, |i| i as u64 + 1), meta.reftable.len() as u64)
            };
            if region + blocks <= len {
                break region;
            }
            self.grow_reftable(cx, region + blocks).await?;
        };
        self.write_blocks(cx, region, blocks, count).await?;
        let start = region * self.geometry.rb_entries();
        let mut meta = self.meta.borrow_mut();
        for block in 0..blocks {
            let at = self.geometry.host(ClusterIndex(start + block)).0;
            meta.set_reftable(us(region + block), at);
            meta.overlap
                .insert(start + block, 1, Structure::Refblock)
                .expect("checked before");
        }
        Ok(ClusterIndex(start + blocks))
    }

    /// Replaces the refcount table by one of at least `needed` entries, placed behind what the old one can count.
    async fn grow_reftable(&self, cx: &Cx, needed: u64) -> Result<(), Errno> {
        self.commit(cx).await?;
        let bits = self.geometry.cluster_bits;
        let (mut table, old) = {
            let meta = self.meta.borrow();
            (
                meta.reftable.clone(),
                (meta.header.reftable_offset, meta.header.reftable_clusters),
            )
        };
        let region = table.len() as u64;
        let mut entries = needed.max(region + region / 2);
        let (clusters, blocks) = loop {
            let clusters = self.geometry.clusters(entries * 8);
            let blocks = self.blocks_for(clusters);
            if region + blocks <= clusters << (bits - 3) {
                break (clusters, blocks);
            }
            entries = region + blocks;
        };
        if clusters << bits > limits::MAX_REFTABLE_BYTES {
            return Err(Errno::EFBIG);
        }
        self.write_blocks(cx, region, blocks, clusters).await?;
        let start = region * self.geometry.rb_entries();
        table.resize(us(clusters << (bits - 3)), 0);
        for block in 0..blocks {
            table[us(region + block)] = (start + block) << bits;
        }
        let at = (start + blocks) << bits;
        let bytes: Vec<u8> = table.iter().flat_map(|e| e.to_be_bytes()).collect();
        self.host_write(cx, HostOffset(at), &bytes).await?;
        self.host_flush(cx).await?;
        let table_clusters = u32::try_from(clusters).map_err(|_| Errno::EFBIG)?;
        let mut fields = [0; 12];
        fields[..8].copy_from_slice(&at.to_be_bytes());
        fields[8..].copy_from_slice(&table_clusters.to_be_bytes());
        self.patch_header(cx, 48, &fields).await?;
        {
            let mut meta = self.meta.borrow_mut();
            meta.reftable = table;
            meta.header.reftable_offset = at;
            meta.header.reftable_clusters = table_clusters;
            meta.overlap.remove(old.0 >> bits, Structure::Reftable);
            for block in 0..blocks {
                meta.overlap
                    .insert(start + block, 1, Structure::Refblock)
                    .expect("checked before");
            }
            meta.overlap
                .insert(start + blocks, clusters, Structure::Reftable)
                .expect("checked before");
        }
        let kind = super::image::FreeKind::Other;
        self.free_later(cx, ClusterIndex(old.0 >> bits), u64::from(old.1), kind);
        Ok(())
    }
}
