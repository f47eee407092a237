//! Guest writes: in place where the cluster is ours alone, else into new clusters with copy-on-write edges.
//!
//! An allocating write: under the lock, find a run and allocate for it; without the lock, write data and copied
//! edges; under the lock again, link. Meanwhile the run is listed in `in_flight`, and whoever wants to allocate,
//! zero or discard one of its guest clusters waits. On an error before linking the old mapping stands.

use super::alloc::Probe;
use super::image::{FreeKind, Qcow2};
use super::l2::{Entry, Kind, OFFSET};
use super::limits;
use super::map::Stop;
use super::units::{ClusterIndex, GuestOffset, HostOffset, us};
use crate::driver::Cx;
use crate::error::Errno;
use crate::io::copy_range::{CopySource, CopyTarget};
use crate::types::ReqFlags;

/// What is written.
#[derive(Clone, Copy, Debug)]
pub(super) enum Data<'a> {
    /// These bytes.
    Bytes(&'a [u8]),
    /// So many bytes of a file, which are not read.
    Copied(CopySource<'a>, u64),
}

impl<'a> Data<'a> {
    fn len(self) -> u64 {
        match self {
            Data::Bytes(buf) => buf.len() as u64,
            Data::Copied(_, bytes) => bytes,
        }
    }

    fn first(self, bytes: u64) -> Data<'a> {
        match self {
            Data::Bytes(buf) => Data::Bytes(&buf[..us(bytes)]),
            Data::Copied(from, all) => Data::Copied(from, bytes.min(all)),
        }
    }
}

/// What one step of a write does.
enum Plan {
    /// Nothing to change but the data.
    InPlace(HostOffset, u64),
    Allocated(Allocation),
}

/// A run of guest clusters that gets host clusters.
#[derive(Clone, Copy, Debug)]
struct Allocation {
    id: u64,
    /// First byte of the write and how many.
    guest: GuestOffset,
    bytes: u64,
    /// First host cluster and how many.
    host: ClusterIndex,
    clusters: u64,
    /// The clusters are the zero clusters' own: nothing was allocated.
    reused: bool,
    /// The host clusters were never written, they read as zeroes.
    virgin: bool,
    /// What the write leaves of the first and last cluster reads as zeroes now.
    head_zero: bool,
    tail_zero: bool,
}

/// How an entry takes a write.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    InPlace(HostOffset),
    Reuse(HostOffset),
    New,
}

impl Qcow2 {
    /// Writes guest data.
    pub(super) async fn write_at(&self, cx: &Cx, guest: GuestOffset, buf: &[u8]) -> Result<(), Errno> {
        let mut done = 0;
        while done < buf.len() {
            let at = GuestOffset(guest.0 + done as u64);
            let rest = &buf[done..];
            if let Some((host, bytes)) = self.cached_in_place(at, rest.len() as u64) {
                let _writing = self.epochs.enter();
                self.host_write(cx, host, &rest[..us(bytes)]).await?;
                done += us(bytes);
            } else {
                done += us(Box::pin(self.write_step(cx, at, Data::Bytes(rest))).await?);
            }
        }
        Ok(())
    }

    /// A run that memory knows to be writable in place.
    fn cached_in_place(&self, guest: GuestOffset, max: u64) -> Option<(HostOffset, u64)> {
        if !self.ready_to_write.get() || self.check_health().is_err() {
            return None;
        }
        let geometry = self.geometry;
        let meta = self.meta.borrow();
        let l2_at = HostOffset(meta.l1.get(geometry.l1_index(guest))? & OFFSET);
        let slot = meta.l2.find(l2_at).filter(|slot| meta.l2.page(*slot).exclusive)?;
        let first = guest.0 >> geometry.cluster_bits;
        let count = self.entries_in_table(guest, guest.0 + max) as u64;
        if meta.is_busy(first, first + count) {
            return None;
        }
        let index = geometry.l2_index(guest);
        let mut start = None;
        let mut clusters = 0;
        while clusters < count {
            let entry = Entry(meta.l2.entry(slot, index + us(clusters)));
            let host = entry.host();
            let run = *start.get_or_insert(host);
            let fits = entry.kind() == Kind::Normal
                && entry.copied()
                && !entry.has_reserved_bits()
                && geometry.within(host.0) == 0
                && host.0 == run.0 + (clusters << geometry.cluster_bits)
                && self.probe(geometry.cluster(host)) == Probe::Count(1);
            if !fits {
                break;
            }
            clusters += 1;
        }
        let start = start.filter(|_| clusters > 0)?;
        if meta.overlap.hit(geometry.cluster(start).0, clusters).is_some() {
            return None;
        }
        let within = geometry.within(guest.0);
        let bytes = max.min((clusters << geometry.cluster_bits) - within);
        Some((HostOffset(start.0 + within), bytes))
    }

    /// Writes the first run of `data`; returns its length.
    pub(super) async fn write_step(&self, cx: &Cx, guest: GuestOffset, data: Data<'_>) -> Result<u64, Errno> {
        let first = guest.0 >> self.geometry.cluster_bits;
        let guard = self.lock_clear(first, first + 1).await;
        self.prepare_writable(cx).await?;
        match self.plan(cx, guest, data.len()).await? {
            Plan::InPlace(host, bytes) => {
                let _writing = self.epochs.enter();
                drop(guard);
                self.host_put(cx, host, data.first(bytes)).await?;
                Ok(bytes)
            }
            Plan::Allocated(allocation) => {
                drop(guard);
                self.write_allocated(cx, &allocation, data.first(allocation.bytes))
                    .await
            }
        }
    }

    /// Puts data down where it belongs in the image file.
    async fn host_put(&self, cx: &Cx, at: HostOffset, data: Data<'_>) -> Result<(), Errno> {
        match data {
            Data::Bytes(buf) => self.host_write(cx, at, buf).await,
            Data::Copied(from, bytes) => {
                let to = CopyTarget {
                    edge: cx.file()?,
                    offset: at.0,
                    flags: ReqFlags::empty(),
                };
                cx.layer.copy_range_to(to, bytes, from).await
            }
        }
    }

    async fn write_allocated(&self, cx: &Cx, allocation: &Allocation, data: Data<'_>) -> Result<u64, Errno> {
        if allocation.reused {
            self.leave_to_readers().await;
        }
        let written = self.write_data(cx, allocation, data).await;
        let _guard = self.lock.lock().await;
        let result = match written {
            Ok(()) => self.link(cx, allocation).await,
            Err(errno) => Err(errno),
        };
        if result.is_err() && !allocation.reused && self.check_health().is_ok() {
            self.free_unlinked(cx, allocation.host, allocation.clusters).await;
        }
        self.meta.borrow_mut().in_flight.retain(|f| f.0 != allocation.id);
        self.settled.open();
        result.map(|()| allocation.bytes)
    }

    /// A zero cluster that kept its place may still be read by who looked it up when it held data. Who sees our data
    /// there before it is linked would see it vanish again: the next read finds the zero cluster.
    async fn leave_to_readers(&self) {
        let kept_zero = self.meta.borrow().kept_zero;
        if let Some(tag) = kept_zero {
            self.epochs.wait_over(tag).await;
        }
    }

    /// Finds the run that starts at `guest` and allocates for it. Caller holds the image lock; no allocation in
    /// flight touches the first cluster.
    async fn plan(&self, cx: &Cx, guest: GuestOffset, max: u64) -> Result<Plan, Errno> {
        let geometry = self.geometry;
        let slot = self.l2_for_write(cx, geometry.l1_index(guest)).await?;
        let first = guest.0 >> geometry.cluster_bits;
        let mut count = self.entries_in_table(guest, guest.0 + max) as u64;
        for &(_, start, _) in &self.meta.borrow().in_flight {
            if start > first {
                count = count.min(start - first);
            }
        }
        let base = geometry.l2_index(guest);
        let entry = |i: u64| Entry(self.meta.borrow().l2.entry(slot, base + us(i)));
        let class = self.classify(cx, entry(0), guest).await?;
        let mut clusters = 1;
        while clusters < count {
            let shift = clusters << geometry.cluster_bits;
            let next = self
                .classify(cx, entry(clusters), GuestOffset(geometry.down(guest.0) + shift))
                .await?;
            let same = match (class, next) {
                (Class::New, Class::New) => true,
                (Class::InPlace(a), Class::InPlace(b)) | (Class::Reuse(a), Class::Reuse(b)) => {
                    a.0 + shift == b.0
                }
                _ => false,
            };
            if !same {
                break;
            }
            clusters += 1;
        }
        let within = geometry.within(guest.0);
        let (host, virgin) = match class {
            Class::InPlace(host) | Class::Reuse(host) => {
                self.check_overlap(cx, host, clusters << geometry.cluster_bits)?;
                (geometry.cluster(host), false)
            }
            Class::New => {
                let (host, got, virgin) = self.allocate(cx, clusters).await?;
                clusters = got;
                (host, virgin)
            }
        };
        let bytes = max.min((clusters << geometry.cluster_bits) - within);
        if let Class::InPlace(host) = class {
            return Ok(Plan::InPlace(HostOffset(host.0 + within), bytes));
        }
        let zero = |entry: Entry| match entry.kind() {
            Kind::ZeroPlain | Kind::ZeroAlloc => true,
            Kind::Unallocated => cx.node.backing.get().is_none(),
            Kind::Normal | Kind::Compressed => false,
        };
        let (head_zero, tail_zero) = (zero(entry(0)), zero(entry(clusters - 1)));
        let mut meta = self.meta.borrow_mut();
        let id = meta.next_allocation;
        meta.next_allocation += 1;
        meta.in_flight.push((id, first, first + clusters));
        let reused = matches!(class, Class::Reuse(_));
        Ok(Plan::Allocated(Allocation {
            id,
            guest,
            bytes,
            host,
            clusters,
            reused,
            virgin,
            head_zero,
            tail_zero,
        }))
    }

    async fn classify(&self, cx: &Cx, entry: Entry, guest: GuestOffset) -> Result<Class, Errno> {
        let kind = entry.kind();
        if let Err(Stop::Corrupt(text, at)) = self.check_entry(entry, kind, guest) {
            return Err(self.found_corrupt(cx, &text, Some(at), None));
        }
        self.check_reserved(cx, entry, guest)?;
        if !matches!(kind, Kind::Normal | Kind::ZeroAlloc) || !entry.copied() {
            return Ok(Class::New);
        }
        let host = entry.host();
        match self.refcount(cx, self.geometry.cluster(host)).await? {
            0 => {
                let text = format!("Cluster at {:#x} is in use with refcount 0", host.0);
                Err(self.found_corrupt(cx, &text, Some(host.0), None))
            }
            1 if kind == Kind::Normal => Ok(Class::InPlace(host)),
            1 => Ok(Class::Reuse(host)),
            // COPIED is a hint only, and it is wrong here: copy.
            _ => Ok(Class::New),
        }
    }

    /// An entry with reserved bits is not changed: what they mean would be lost.
    pub(super) fn check_reserved(&self, cx: &Cx, entry: Entry, guest: GuestOffset) -> Result<(), Errno> {
        if entry.has_reserved_bits() {
            let text = format!(
                "Reserved bits set in L2 entry {:#x} (guest offset: {:#x})",
                entry.0, guest.0
            );
            return Err(self.found_corrupt(cx, &text, None, None));
        }
        Ok(())
    }

    /// Writes the data of a run and the edges of its first and last cluster.
    async fn write_data(&self, cx: &Cx, run: &Allocation, data: Data<'_>) -> Result<(), Errno> {
        let geometry = self.geometry;
        let host = geometry.host(run.host);
        let end = run.guest.0 + run.bytes;
        let head = us(geometry.within(run.guest.0));
        let tail = us(geometry.up(end) - end);
        let data_at = HostOffset(host.0 + head as u64);
        let zero = (head == 0 || run.head_zero) && (tail == 0 || run.tail_zero);
        if head + tail == 0 || run.virgin && zero {
            return self.host_put(cx, data_at, data).await;
        }
        let mut before = vec![0; head];
        let mut after = vec![0; tail];
        if !run.head_zero {
            self.read_old(cx, geometry.down(run.guest.0), &mut before).await?;
        }
        if !run.tail_zero {
            self.read_old(cx, end, &mut after).await?;
        }
        let blank = |bytes: &[u8]| bytes.iter().all(|b| *b == 0);
        if run.virgin && blank(&before) && blank(&after) {
            return self.host_put(cx, data_at, data).await;
        }
        let Data::Bytes(buf) = data else {
            // Nobody here has the bytes between the edges.
            if head != 0 {
                self.host_write(cx, host, &before).await?;
            }
            self.host_put(cx, data_at, data).await?;
            if tail != 0 {
                let at = HostOffset(data_at.0 + data.len());
                self.host_write(cx, at, &after).await?;
            }
            return Ok(());
        };
        let cs = us(geometry.cs());
        if run.clusters == 1 || run.clusters << geometry.cluster_bits <= limits::MERGE_BYTES {
            before.reserve_exact(buf.len() + tail);
            before.extend_from_slice(buf);
            before.append(&mut after);
            return self.host_write(cx, host, &before).await;
        }
        // First cluster, whole clusters between straight from the caller's buffer, last cluster.
        let first = if head == 0 { 0 } else { cs - head };
        let last = if tail == 0 {
            buf.len()
        } else {
            buf.len() - (cs - tail)
        };
        if head != 0 {
            before.extend_from_slice(&buf[..first]);
            self.host_write(cx, host, &before).await?;
        }
        if first < last {
            self.host_write(cx, HostOffset(data_at.0 + first as u64), &buf[first..last])
                .await?;
        }
        if tail != 0 {
            let mut piece = buf[last..].to_vec();
            piece.append(&mut after);
            self.host_write(cx, HostOffset(data_at.0 + last as u64), &piece)
                .await?;
        }
        Ok(())
    }

    /// What the guest sees now; zeroes past the end of the disk, so that a longer backing never leaks in there.
    async fn read_old(&self, cx: &Cx, at: u64, out: &mut [u8]) -> Result<(), Errno> {
        let size = self.meta.borrow().header.size;
        let inside = us(size.saturating_sub(at).min(out.len() as u64));
        self.read_at(cx, GuestOffset(at), &mut out[..inside]).await
    }

    /// Points the L2 entries of a run to its clusters and frees what they named. Caller holds the image lock.
    async fn link(&self, cx: &Cx, run: &Allocation) -> Result<(), Errno> {
        let slot = self.l2_for_write(cx, self.geometry.l1_index(run.guest)).await?;
        let base = self.geometry.l2_index(run.guest);
        let old: Vec<Entry> = {
            let meta = self.meta.borrow();
            (0..us(run.clusters))
                .map(|i| Entry(meta.l2.entry(slot, base + i)))
                .collect()
        };
        for (i, old) in old.into_iter().enumerate() {
            let host = self.geometry.host(ClusterIndex(run.host.0 + i as u64));
            assert!(
                !run.reused || old.host() == host,
                "an allocation in flight protects its entries"
            );
            self.meta
                .borrow_mut()
                .l2
                .set_entry(slot, base + i, Entry::normal(host).0);
            if !run.reused {
                self.free_entry(cx, old, FreeKind::Other);
            }
        }
        Ok(())
    }

    /// Frees what a replaced entry named.
    pub(super) fn free_entry(&self, cx: &Cx, old: Entry, kind: FreeKind) {
        let geometry = self.geometry;
        match old.kind() {
            Kind::Unallocated | Kind::ZeroPlain => {}
            Kind::Normal | Kind::ZeroAlloc => self.free_later(cx, geometry.cluster(old.host()), 1, kind),
            Kind::Compressed => {
                let (at, bytes) = old.compressed(geometry.cluster_bits);
                let first = geometry.cluster(at);
                let last = geometry.cluster(HostOffset(at.0 + bytes - 1));
                self.free_later(cx, first, last.0 - first.0 + 1, kind);
            }
        }
    }
}
