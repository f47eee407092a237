//! Dirty bitmaps: which parts of a node were written since the bitmap was added or cleared.
//!
//! Rules (io.md 6): a bitmap belongs to one node and marks, in whole granules, what requests wrote, zeroed or discarded on
//! that node, also when they failed, for part may have been done. It marks after the driver is done and before the
//! request is: whoever cleared a bitmap before sees every write that was acknowledged after. A cut that no write in
//! flight blurs needs a drain, which transactions make.
//! A bitmap without a name belongs to whatever made it (a filter's copy bitmap, the successor of a bitmap that a backup
//! uses); no command finds it, queries show it.

pub(crate) mod bits;
pub(crate) mod commands;
mod successor;
#[cfg(test)]
mod tests;

use std::cell::{Cell, RefCell};
use std::fmt;
use std::rc::Rc;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::Layer;
use crate::error::QmpError;
use crate::graph::node::Node;
use bits::Bits;

/// Longest name, bytes.
pub(crate) const LONGEST_NAME: usize = 1023;

/// One bitmap.
pub(crate) struct DirtyBitmap {
    /// Unique on its node; empty: it has none.
    pub(crate) name: Rc<str>,
    /// Bytes per bit: a power of two, at least 512.
    pub(crate) granularity: u64,
    /// Length of the node, bytes.
    pub(crate) length: Cell<u64>,
    pub(crate) bits: RefCell<Bits>,
    /// It records.
    pub(crate) enabled: Cell<bool>,
    /// Some operation uses it.
    pub(crate) busy: Cell<bool>,
    /// The driver stores it.
    pub(crate) persistent: Cell<bool>,
    /// What is stored must stay as it is.
    pub(crate) read_only: Cell<bool>,
    /// It was stored as in use, so that writes may be missing.
    pub(crate) inconsistent: Cell<bool>,
    /// Its length is that of its node.
    follows: bool,
    /// What records in its place while a backup uses it.
    pub(crate) successor: RefCell<Option<Rc<DirtyBitmap>>>,
}

impl fmt::Debug for DirtyBitmap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DirtyBitmap({})", self.name)
    }
}

/// What a bitmap must not be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Use {
    /// Busy, read-only or inconsistent.
    Change,
    /// Busy or inconsistent.
    Look,
    /// Busy or read-only.
    Remove,
}

impl DirtyBitmap {
    /// A clean one that records.
    pub(crate) fn new(name: &str, granularity: u64, length: u64) -> DirtyBitmap {
        DirtyBitmap {
            name: Rc::from(name),
            granularity,
            length: Cell::new(length),
            bits: RefCell::default(),
            enabled: Cell::new(true),
            busy: Cell::new(false),
            persistent: Cell::new(false),
            read_only: Cell::new(false),
            inconsistent: Cell::new(false),
            follows: true,
            successor: RefCell::default(),
        }
    }

    /// A clean one without name that does not record.
    pub(crate) fn anonymous(granularity: u64, length: u64) -> DirtyBitmap {
        let bitmap = DirtyBitmap::new("", granularity, length);
        bitmap.enabled.set(false);
        bitmap
    }

    /// One about a point in time, which stays as long as it was, whatever becomes of the node.
    pub(crate) fn of_instant(granularity: u64, length: u64) -> DirtyBitmap {
        DirtyBitmap {
            follows: false,
            ..DirtyBitmap::anonymous(granularity, length)
        }
    }

    /// Writes to the node are recorded, here or by the successor.
    pub(crate) fn is_recording(&self) -> bool {
        self.enabled.get() || self.successor.borrow().as_ref().is_some_and(|s| s.enabled.get())
    }

    /// All that is recorded, here and by the successor.
    pub(crate) fn recorded(&self) -> Bits {
        let mut bits = self.bits.borrow().clone();
        if let Some(successor) = &*self.successor.borrow() {
            successor.bits.borrow().runs().for_each(|run| bits.set(run));
        }
        bits
    }

    /// Refuses what it is not fit for.
    pub(crate) fn check(&self, wanted: Use) -> Result<(), QmpError> {
        let name = &self.name;
        Err(QmpError::generic(if self.busy.get() {
            format!("Bitmap '{name}' is currently in use by another operation and cannot be used")
        } else if self.read_only.get() && wanted != Use::Look {
            format!("Bitmap '{name}' is readonly and cannot be modified")
        } else if self.inconsistent.get() && wanted != Use::Remove {
            format!("Bitmap '{name}' is inconsistent and cannot be used")
        } else {
            return Ok(());
        }))
    }

    /// Refuses to take another one in, for what that one is.
    pub(crate) fn can_take(&self, source: &DirtyBitmap) -> Result<(), QmpError> {
        source.check(Use::Look)?;
        let (ours, theirs) = (self.length.get(), source.length.get());
        if ours != theirs {
            return Err(QmpError::generic(format!(
                "Bitmaps are of different sizes (destination size is {ours}, source size is {theirs}) and can't be merged"
            )));
        }
        Ok(())
    }

    /// It is to be stored when its image is closed.
    pub(crate) fn is_storable(&self) -> bool {
        self.persistent.get() && !self.inconsistent.get() && !self.read_only.get()
    }

    /// How many bits it has.
    pub(crate) fn len(&self) -> u64 {
        self.length.get().div_ceil(self.granularity)
    }

    /// Marks `[start, end)`, as far as the node reaches.
    pub(crate) fn mark(&self, start: u64, end: u64) {
        let end = end.min(self.length.get());
        if start < end {
            let bits = start / self.granularity..end.div_ceil(self.granularity);
            self.bits.borrow_mut().set(bits);
        }
    }

    /// Unmarks whole granules: those that `[start, end)` touches.
    pub(crate) fn unmark(&self, start: u64, end: u64) {
        if start < end {
            let bits = start / self.granularity..end.div_ceil(self.granularity);
            self.bits.borrow_mut().clear(bits);
        }
    }

    /// The first stretch of `[start, end)` that is marked, in whole granules, no longer than `longest` bytes unless a single
    /// granule is.
    pub(crate) fn next_marked(&self, start: u64, end: u64, longest: u64) -> Option<(u64, u64)> {
        let bits = self.bits.borrow();
        let range = start / self.granularity..end.div_ceil(self.granularity).min(self.len());
        let last = range.end;
        let first = bits.next_set(range)?;
        let most = (longest / self.granularity).max(1);
        let limit = last.min(first.saturating_add(most));
        let to = bits.next_clear(first..limit).unwrap_or(limit);
        Some((first * self.granularity, to * self.granularity))
    }

    /// Whether the granule of `offset` is marked, and up to where the same holds, `end` at most.
    pub(crate) fn run_at(&self, offset: u64, end: u64) -> (bool, u64) {
        let bits = self.bits.borrow();
        let range = offset / self.granularity..end.div_ceil(self.granularity);
        let marked = bits.next_set(range.start..range.start + 1).is_some();
        let other = if marked {
            bits.next_clear(range)
        } else {
            bits.next_set(range)
        };
        (marked, other.map_or(end, |bit| end.min(bit * self.granularity)))
    }

    /// Bytes marked, in whole granules.
    pub(crate) fn marked_bytes(&self) -> u64 {
        self.bits.borrow().count() * self.granularity
    }

    /// Takes in what another one of the same length has marked.
    pub(crate) fn merge(&self, other: &DirtyBitmap) {
        let marks = other.bits.borrow().clone();
        for run in marks.runs() {
            self.mark(run.start * other.granularity, run.end * other.granularity);
        }
    }

    /// Follows its node.
    pub(crate) fn resize(&self, length: u64) {
        if !self.follows {
            return;
        }
        self.length.set(length);
        self.bits.borrow_mut().truncate(self.len());
    }

    /// The digest of the bits, in whole words of 64, at least one.
    pub(crate) fn sha256(&self) -> String {
        let mut left = self.len().div_ceil(64).max(1) * 8;
        let bits = self.bits.borrow();
        let mut hash = Sha256::new();
        let mut chunk = [0; 4096];
        let mut at = 0;
        while left > 0 {
            let part = &mut chunk[..crate::io::size(left.min(4096))];
            bits.bytes(at, part);
            hash.update(&*part);
            at += part.len() as u64;
            left -= part.len() as u64;
        }
        hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn view(&self) -> BitmapView {
        let mut bits = vec![0; crate::io::size(self.len().div_ceil(64).max(1) * 8)];
        self.bits.borrow().bytes(0, &mut bits);
        BitmapView {
            name: Rc::clone(&self.name),
            granularity: self.granularity,
            enabled: self.enabled.get(),
            busy: self.busy.get(),
            persistent: self.persistent.get(),
            inconsistent: self.inconsistent.get(),
            bits,
        }
    }

    fn info(&self) -> Value {
        let mut info = json!({
            "recording": self.is_recording(),
            "persistent": self.persistent.get(),
            "busy": self.busy.get(),
            "granularity": self.granularity,
            "count": self.marked_bytes(),
        });
        if !self.name.is_empty() {
            info["name"] = json!(*self.name);
        }
        if self.inconsistent.get() {
            info["inconsistent"] = true.into();
        }
        info
    }
}

/// A bitmap as plain data.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BitmapView {
    /// Its name; empty for one that a filter or a job has made for itself.
    pub name: Rc<str>,
    /// Bytes per bit.
    pub granularity: u64,
    /// It records.
    pub enabled: bool,
    /// Some operation uses it.
    pub busy: bool,
    /// It is stored in the image.
    pub persistent: bool,
    /// Writes may be missing.
    pub inconsistent: bool,
    /// The bits, the lowest of each byte first, in whole words of 64.
    pub bits: Vec<u8>,
}

impl Layer {
    /// Every node that has bitmaps, and these, newest first.
    #[must_use]
    pub fn inspect_bitmaps(&self) -> Vec<(Rc<str>, Vec<BitmapView>)> {
        let nodes = self
            .nodes()
            .into_iter()
            .filter(|node| !node.bitmaps.borrow().is_empty());
        nodes
            .map(|node| {
                let views = node.bitmaps.borrow().iter().map(|bitmap| bitmap.view()).collect();
                (Rc::clone(&node.name), views)
            })
            .collect()
    }
}

impl Node {
    /// The bitmap of this name.
    pub(crate) fn bitmap(&self, name: &str) -> Option<Rc<DirtyBitmap>> {
        if name.is_empty() {
            return None;
        }
        self.bitmaps.borrow().iter().find(|b| *b.name == *name).cloned()
    }

    /// Every enabled bitmap marks `[offset, offset + bytes)`; all of them follow the node's length first.
    pub(crate) fn mark_dirty(&self, offset: u64, bytes: u64) {
        let bitmaps = self.bitmaps.borrow();
        for bitmap in bitmaps.iter().filter(|bitmap| bitmap.enabled.get()) {
            bitmap.mark(offset, offset + bytes);
        }
    }

    /// Bitmaps get the node's length.
    pub(crate) fn resize_bitmaps(&self) {
        let length = self.io.length.get();
        for bitmap in self.bitmaps.borrow().iter().filter(|b| b.length.get() != length) {
            bitmap.resize(length);
        }
    }

    /// Some bitmap must not change, so that nothing may be written.
    pub(crate) fn has_frozen_bitmap(&self) -> bool {
        self.bitmaps.borrow().iter().any(|bitmap| bitmap.read_only.get())
    }

    /// For `query-named-block-nodes`; none without bitmaps.
    pub(crate) fn bitmaps_info(&self) -> Option<Value> {
        let bitmaps = self.bitmaps.borrow();
        (!bitmaps.is_empty()).then(|| bitmaps.iter().map(|bitmap| bitmap.info()).collect())
    }
}
