//! The state of one open image, and its plain host I/O.
//!
//! Rules: `meta` is borrowed for one synchronous step only. Metadata changes under the image lock, in memory
//! first; `commit` brings it to the file in an order that survives power loss. Lookups of cached tables need no
//! lock.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;

use super::bitmap_dir::Stored;
use super::cache::Cache;
use super::epoch::Epochs;
use super::header::Header;
use super::lock::{Gate, ImageGuard, ImageLock};
use super::overlap::{Overlap, Structure};
use super::units::{ClusterIndex, Geometry, HostOffset, us};
use crate::driver::Cx;
use crate::error::Errno;
use crate::event::Event;
use crate::types::{OpenFlags, ReqFlags};

/// One open qcow2 image.
#[derive(Debug)]
pub(crate) struct Qcow2 {
    pub(super) geometry: Geometry,
    pub(super) meta: RefCell<Meta>,
    /// Held by whoever changes metadata.
    pub(super) lock: ImageLock,
    pub(super) epochs: Epochs,
    /// Opened whenever an allocation in flight ends.
    pub(super) settled: Gate,
    pub(super) health: Cell<Health>,
    /// The header says what a writable image's header must (autoclear bits).
    pub(super) ready_to_write: Cell<bool>,
    pub(super) pass_discard: Cell<PassDiscard>,
    /// The last inflated cluster: (L2 entry, content). Forgotten when a compressed cluster is written: until then an entry's
    /// meaning is fixed.
    pub(super) inflated: RefCell<Option<(u64, Box<[u8]>)>>,
}

/// Whether the image was found corrupt while open.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Health {
    Good,
    /// Found corrupt; the header does not say so yet.
    Unmarked,
    /// Found corrupt: no more writes.
    Corrupt,
}

/// Which freed clusters are discarded in the image file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct PassDiscard {
    /// Freed by a discard or zero request; `None`: as the node's discard option says.
    pub request: Option<bool>,
    /// Freed by anything else.
    pub other: bool,
}

/// Metadata in memory.
#[derive(Debug)]
pub(super) struct Meta {
    pub header: Header,
    /// The used part of the first cluster as it is on disk, at least one sector.
    pub raw: Vec<u8>,
    pub backing: Option<(String, Option<String>)>,
    pub unknown_extensions: Vec<(u32, Vec<u8>)>,
    pub feature_table: bool,
    pub extensions_end: usize,
    /// There is a bitmaps extension in `raw`.
    pub bitmaps: bool,
    /// The bitmap directory, as the file has it; empty if there is none that counts.
    pub stored: Vec<Stored>,
    /// Offset and bytes of the directory.
    pub directory: Option<(u64, u64)>,
    /// Active L1 table.
    pub l1: Vec<u64>,
    /// Sectors of it to be written.
    pub l1_dirty: BTreeSet<usize>,
    pub l2: Cache,
    pub reftable: Vec<u64>,
    /// Sectors of it to be written.
    pub reftable_dirty: BTreeSet<usize>,
    pub refblocks: Cache,
    pub overlap: Overlap,
    /// Why this image must not be written to, found at open.
    pub problem: Option<String>,
    /// A write of sector 0 failed: the file may have the old or the new one.
    pub header_uncertain: bool,
    /// No cluster below is known to be free.
    pub free_index: u64,
    /// Host bytes from here on were never written: they read as zeroes.
    pub virgin_from: u64,
    /// Behind the compressed cluster that was written last; at the end of a host cluster, 0 for instance, there is no room.
    pub packed_end: u64,
    /// Clusters whose last reference from some entry is gone in memory.
    pub freed: Vec<Freed>,
    /// How many clusters `freed` has.
    pub freed_clusters: u64,
    /// The same, gone durably; not released yet because of requests in flight.
    pub durable: Vec<Freed>,
    /// Guest clusters being allocated: (id, first, end).
    pub in_flight: Vec<(u64, u64, u64)>,
    pub next_allocation: u64,
    /// Epoch in which a data cluster last became a zero cluster and kept its place in the file.
    pub kept_zero: Option<u64>,
    /// For copies of dirty ranges on their way out.
    pub scratch: Vec<u8>,
}

/// References that were removed and are still counted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Freed {
    pub first: u64,
    pub count: u64,
    /// Epoch of the removal.
    pub epoch: u64,
    /// Discard it in the file if nothing else refers to it.
    pub discard: bool,
}

/// Why clusters are freed, for the pass-discard options.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum FreeKind {
    Request,
    Other,
}

impl Meta {
    /// Changes an L1 entry.
    pub(super) fn set_l1(&mut self, index: usize, value: u64) {
        self.l1[index] = value;
        self.l1_dirty.insert(index / 64);
    }

    /// Changes a refcount table entry.
    pub(super) fn set_reftable(&mut self, index: usize, value: u64) {
        self.reftable[index] = value;
        self.reftable_dirty.insert(index / 64);
    }

    /// Whether an allocation in flight touches guest clusters [first, end).
    pub(super) fn is_busy(&self, first: u64, end: u64) -> bool {
        self.in_flight.iter().any(|&(_, a, b)| a < end && first < b)
    }
}

impl Qcow2 {
    /// Reads host bytes; what lies past the end of the file reads as zeroes.
    pub(super) async fn host_read(&self, cx: &Cx, at: HostOffset, buf: &mut [u8]) -> Result<(), Errno> {
        cx.layer.read(cx.file()?, at.0, buf, ReqFlags::empty()).await
    }

    /// Writes host bytes.
    pub(super) async fn host_write(&self, cx: &Cx, at: HostOffset, buf: &[u8]) -> Result<(), Errno> {
        cx.layer.write(cx.file()?, at.0, buf, ReqFlags::empty()).await
    }

    /// Makes what was written to the image file durable.
    pub(super) async fn host_flush(&self, cx: &Cx) -> Result<(), Errno> {
        let file = cx.file_node()?.id;
        cx.layer.flush(file).await
    }

    /// Length of the image file, whole sectors.
    pub(super) fn host_length(&self, cx: &Cx) -> u64 {
        cx.file_node().map_or(0, |node| node.length())
    }

    /// The image lock, at a moment when no allocation in flight touches guest clusters [first, end).
    pub(super) async fn lock_clear(&self, first: u64, end: u64) -> ImageGuard<'_> {
        loop {
            let guard = self.lock.lock().await;
            if !self.meta.borrow().is_busy(first, end) {
                return guard;
            }
            let settled = self.settled.wait();
            drop(guard);
            settled.await;
        }
    }

    /// Puts clusters aside whose reference was removed just now.
    pub(super) fn free_later(&self, cx: &Cx, first: ClusterIndex, count: u64, kind: FreeKind) {
        let discard = match kind {
            FreeKind::Request => self
                .pass_discard
                .get()
                .request
                .unwrap_or_else(|| cx.node.flags.get().contains(OpenFlags::UNMAP)),
            FreeKind::Other => self.pass_discard.get().other,
        };
        let epoch = self.epochs.retire();
        let mut meta = self.meta.borrow_mut();
        meta.freed_clusters += count;
        match meta.freed.last_mut() {
            Some(last) if last.first + last.count == first.0 && last.discard == discard => {
                last.count += count;
                last.epoch = last.epoch.max(epoch);
            }
            _ => meta.freed.push(Freed {
                first: first.0,
                count,
                epoch,
                discard,
            }),
        }
    }

    /// Refuses to write over the image's own metadata.
    pub(super) fn check_overlap(&self, cx: &Cx, at: HostOffset, bytes: u64) -> Result<(), Errno> {
        let first = self.geometry.cluster(at).0;
        let count = self.geometry.cluster(HostOffset(at.0 + bytes - 1)).0 - first + 1;
        let Some(hit) = self.meta.borrow().overlap.hit(first, count) else {
            return Ok(());
        };
        Err(self.overlaps(cx, at.0, bytes, hit))
    }

    /// The corruption of an overlap.
    pub(super) fn overlaps(&self, cx: &Cx, at: u64, bytes: u64, hit: Structure) -> Errno {
        let text = format!(
            "Preventing invalid write on metadata (overlaps with {})",
            hit.name()
        );
        self.found_corrupt(cx, &text, Some(at), Some(bytes))
    }

    /// Reports a corruption. On a writable image it stops all writes; the header is marked by [`Self::finish`].
    pub(super) fn found_corrupt(&self, cx: &Cx, text: &str, at: Option<u64>, bytes: Option<u64>) -> Errno {
        let fatal = cx.node.is_writable();
        let first = self.health.get() == Health::Good;
        if first {
            self.health
                .set(if fatal { Health::Unmarked } else { Health::Corrupt });
            cx.layer.emit(|| {
                let mut data = serde_json::json!({
                    "device": "", "node-name": &*cx.node.name, "msg": text, "fatal": fatal,
                });
                for (key, value) in [("offset", at), ("size", bytes)] {
                    if let Some(value) = value {
                        data[key] = value.into();
                    }
                }
                Event::Qmp {
                    name: "BLOCK_IMAGE_CORRUPTED",
                    data: std::rc::Rc::new(data),
                }
            });
        }
        Errno::EIO
    }

    /// `EIO` once the image was found corrupt.
    pub(super) fn check_health(&self) -> Result<(), Errno> {
        if self.health.get() == Health::Good {
            Ok(())
        } else {
            Err(Errno::EIO)
        }
    }

    /// End of every operation: marks the header if the operation found the image corrupt.
    pub(super) async fn finish<T>(&self, cx: &Cx, result: Result<T, Errno>) -> Result<T, Errno> {
        if self.health.get() == Health::Unmarked {
            self.health.set(Health::Corrupt);
            if self.geometry.v3 {
                let _guard = self.lock.lock().await;
                let features = self.meta.borrow().header.incompatible | super::header::INCOMPAT_CORRUPT;
                // Best effort: the writes have stopped already.
                if self.patch_header(cx, 72, &features.to_be_bytes()).await.is_ok() {
                    self.meta.borrow_mut().header.incompatible = features;
                }
            }
        }
        result
    }

    /// Replaces bytes of the header in one write of the first sector, and flushes.
    pub(super) async fn patch_header(&self, cx: &Cx, at: usize, bytes: &[u8]) -> Result<(), Errno> {
        let mut sector = [0; 512];
        sector.copy_from_slice(&self.meta.borrow().raw[..512]);
        sector[at..at + bytes.len()].copy_from_slice(bytes);
        self.switch_sector(cx, &sector).await?;
        self.meta.borrow_mut().raw[..512].copy_from_slice(&sector);
        Ok(())
    }

    /// Writes sector 0 and flushes. After an error nothing else is written before the old one is back
    /// ([`Self::restore_header`]): the file may name tables that memory does not know.
    pub(super) async fn switch_sector(&self, cx: &Cx, sector: &[u8]) -> Result<(), Errno> {
        self.meta.borrow_mut().header_uncertain = true;
        self.host_write(cx, HostOffset(0), sector).await?;
        self.host_flush(cx).await?;
        self.meta.borrow_mut().header_uncertain = false;
        Ok(())
    }

    /// Makes sure that the file has the header that memory has.
    pub(super) async fn restore_header(&self, cx: &Cx) -> Result<(), Errno> {
        if !self.meta.borrow().header_uncertain {
            return Ok(());
        }
        let mut sector = [0; 512];
        sector.copy_from_slice(&self.meta.borrow().raw[..512]);
        self.switch_sector(cx, &sector).await
    }

    /// Zeroed memory for one table.
    pub(super) fn blank_table(&self) -> Box<[u8]> {
        vec![0; us(self.geometry.cs())].into_boxed_slice()
    }
}
