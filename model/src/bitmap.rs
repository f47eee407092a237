//! A dirty bitmap: which parts of a node were written since it was added or cleared.
//!
//! Rules: one bit stands for `granularity` bytes, and is set when any of them is written; the last one may reach past the
//! end. Ranges that reach past the end are cut there. Merging rounds outwards, whatever the granularities.
//! What was marked can be unknown (`None`): the model does not predict where a qcow2 node writes in its file.
//! Not here: which operations mark which nodes ([`crate::marking`]), commands, how a bitmap is stored.

use std::ops::Range;
use std::rc::Rc;

/// Sorted, disjoint, non-adjacent ranges of numbers.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Spans(Vec<Range<u64>>);

impl Spans {
    /// Adds a range.
    pub fn insert(&mut self, new: Range<u64>) {
        if new.is_empty() {
            return;
        }
        let first = self.0.partition_point(|span| span.end < new.start);
        let past = self.0.partition_point(|span| span.start <= new.end);
        let touched = &self.0[first..past];
        let start = touched
            .first()
            .map_or(new.start, |span| span.start.min(new.start));
        let end = touched.last().map_or(new.end, |span| span.end.max(new.end));
        self.0.splice(first..past, std::iter::once(start..end));
    }

    /// Removes everything from `end` on.
    pub fn truncate(&mut self, end: u64) {
        self.0.retain(|span| span.start < end);
        if let Some(last) = self.0.last_mut() {
            last.end = last.end.min(end);
        }
    }

    /// The ranges, in order.
    pub fn iter(&self) -> impl Iterator<Item = Range<u64>> {
        self.0.iter().cloned()
    }

    /// How many numbers.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.0.iter().map(|span| span.end - span.start).sum()
    }

    /// This number is in it.
    #[must_use]
    pub fn contains(&self, number: u64) -> bool {
        let at = self.0.partition_point(|span| span.end <= number);
        self.0.get(at).is_some_and(|span| span.contains(&number))
    }
}

/// One bitmap of one node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Bitmap {
    /// Its name, unique on its node.
    pub name: Rc<str>,
    /// Bytes per bit: a power of two, at least 512.
    pub granularity: u64,
    /// Length of the node, bytes.
    pub length: u64,
    /// Writes are recorded.
    pub enabled: bool,
    /// It is stored in the image when that is closed.
    pub persistent: bool,
    /// What the image holds of it is not to be changed: the node is read-only.
    pub read_only: bool,
    /// The image was not closed well, so it may have missed writes. Good for nothing but being removed.
    pub inconsistent: bool,
    /// The export that shows it to its clients.
    pub shown_by: Option<Rc<str>>,
    /// A backup uses the bitmap: this one records meanwhile.
    pub successor: Option<Box<Bitmap>>,
    /// Later ones of a layer have larger numbers.
    pub number: u32,
    /// Removed, once the transaction that does so takes effect.
    pub removed: bool,
    /// Its length changed because that of a node below did.
    pub followed: bool,
    /// Dirty bits; none if unknown.
    pub dirty: Option<Spans>,
}

impl Bitmap {
    /// A clean one that records.
    #[must_use]
    pub fn new(name: Rc<str>, granularity: u64, length: u64) -> Bitmap {
        Bitmap {
            name,
            granularity,
            length,
            enabled: true,
            persistent: false,
            read_only: false,
            inconsistent: false,
            shown_by: None,
            successor: None,
            number: 0,
            removed: false,
            followed: false,
            dirty: Some(Spans::default()),
        }
    }

    /// Somebody uses it, so that nobody else may.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.shown_by.is_some() || self.removed || self.successor.is_some()
    }

    /// Writes are recorded, here or by the successor.
    #[must_use]
    pub fn records(&self) -> bool {
        self.enabled || self.successor.as_ref().is_some_and(|successor| successor.enabled)
    }

    /// Bytes were written: who records marks them.
    pub fn record(&mut self, bytes: Range<u64>) {
        if self.enabled {
            self.mark(bytes.clone());
        }
        if let Some(successor) = &mut self.successor {
            successor.record(bytes);
        }
    }

    /// Nobody knows what was written; of those that record, at least.
    pub fn lose_track(&mut self, of_all: bool) {
        if self.enabled || of_all {
            self.dirty = None;
        }
        if let Some(successor) = &mut self.successor {
            successor.lose_track(of_all);
        }
    }

    /// From now on a new one records, if this one did.
    pub fn give_successor(&mut self, number: u32) {
        let mut successor = Bitmap::new(self.name.clone(), self.granularity, self.length);
        successor.enabled = std::mem::take(&mut self.enabled);
        successor.number = number;
        self.successor = Some(Box::new(successor));
    }

    /// What the successor recorded is recorded here, and this one goes on.
    pub fn take_successor_in(&mut self) {
        if let Some(successor) = self.successor.take() {
            self.merge(&successor);
            self.enabled = successor.enabled;
        }
    }

    /// The successor in its place, which is also to be stored if this one was, and as read-only as this one. (QEMU forgets the
    /// latter: its bitmap takes changes that nobody stores.)
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    pub fn into_successor(self) -> Bitmap {
        let mut heir = *self.successor.expect("it is in use");
        heir.persistent = self.persistent;
        heir.read_only = self.read_only;
        heir
    }

    /// How many bits it has.
    #[must_use]
    pub fn bits(&self) -> u64 {
        self.length.div_ceil(self.granularity)
    }

    /// Dirty bytes, in whole granules; none if unknown.
    #[must_use]
    pub fn count(&self) -> Option<u64> {
        Some(self.dirty.as_ref()?.count() * self.granularity)
    }

    /// Marks bytes, whether it records or not.
    pub fn mark(&mut self, bytes: Range<u64>) {
        let end = bytes.end.min(self.length);
        if bytes.start >= end {
            return;
        }
        if let Some(dirty) = &mut self.dirty {
            dirty.insert(bytes.start / self.granularity..end.div_ceil(self.granularity));
        }
    }

    /// Nothing is dirty.
    pub fn clear(&mut self) {
        self.dirty = Some(Spans::default());
    }

    /// Takes in what is dirty in another one of the same length.
    pub fn merge(&mut self, other: &Bitmap) {
        let Some(dirty) = &other.dirty else {
            self.dirty = None;
            return;
        };
        for span in dirty.iter() {
            self.mark(span.start * other.granularity..span.end * other.granularity);
        }
    }

    /// The node has another length: bits that are past it go, new ones are clean.
    pub fn resize(&mut self, length: u64) {
        self.length = length;
        let bits = self.bits();
        if let Some(dirty) = &mut self.dirty {
            dirty.truncate(bits);
        }
        if let Some(successor) = &mut self.successor {
            successor.resize(length);
        }
    }

    /// The bits, the lowest of each byte first, in whole groups of 64, at least one: what its digest is made of. None if
    /// unknown.
    #[must_use]
    pub fn image(&self) -> Option<Vec<u8>> {
        let dirty = self.dirty.as_ref()?;
        let bytes = self.bits().div_ceil(64).max(1) * 8;
        let mut image = vec![0u8; usize::try_from(bytes).ok()?];
        for bit in dirty.iter().flatten() {
            image[usize::try_from(bit / 8).ok()?] |= 1 << (bit % 8);
        }
        Some(image)
    }
}

/// A bitmap as an image holds it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StoredBitmap {
    /// Its name.
    pub name: Rc<str>,
    /// Bytes per bit.
    pub granularity: u64,
    /// It records as soon as the image is open.
    pub auto: bool,
    /// Some layer has the image open for writing, or did not close it: what is stored here is out of date.
    pub in_use: bool,
    /// Dirty bits; none if unknown.
    pub dirty: Option<Spans>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_grow_together() {
        let mut spans = Spans::default();
        for new in [4..5, 8..9, 5..6, 0..1, 7..8, 20..20] {
            spans.insert(new);
        }
        assert_eq!(spans.iter().collect::<Vec<_>>(), [0..1, 4..6, 7..9]);
        spans.insert(1..7);
        assert_eq!((spans.count(), spans.iter().count()), (9, 1));
        spans.truncate(3);
        assert_eq!(
            (spans.count(), spans.contains(2), spans.contains(3)),
            (3, true, false)
        );
    }

    #[test]
    fn marks_round_outwards_and_end_with_the_node() {
        let mut bitmap = Bitmap::new(Rc::from("b"), 1024, 10 * 1024 + 512);
        bitmap.mark(1023..1025);
        bitmap.mark(10 * 1024..1 << 40);
        bitmap.mark(1 << 41..1 << 42);
        assert_eq!(bitmap.count(), Some(3 * 1024), "the last one counts as whole");
        assert_eq!(bitmap.image().unwrap(), [3, 4, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn another_granularity_merges_outwards() {
        let mut fine = Bitmap::new(Rc::from("fine"), 512, 8192 + 512);
        let mut coarse = Bitmap::new(Rc::from("coarse"), 4096, 8192 + 512);
        fine.mark(4096..4097);
        coarse.merge(&fine);
        assert_eq!(coarse.count(), Some(4096));
        coarse.mark(8192..8193);
        fine.merge(&coarse);
        assert_eq!(fine.count(), Some(4096 + 512), "no bit past the end");
        coarse.dirty = None;
        fine.merge(&coarse);
        assert_eq!(fine.count(), None, "nobody knows");
    }

    #[test]
    fn a_successor_records_and_is_taken_in_or_takes_over() {
        let mut bitmap = Bitmap::new(Rc::from("b"), 4096, 65536);
        bitmap.persistent = true;
        bitmap.mark(0..1);
        bitmap.give_successor(7);
        bitmap.read_only = true;
        assert!(bitmap.is_busy() && bitmap.records() && !bitmap.enabled);
        bitmap.record(8192..8193);
        assert_eq!(bitmap.count(), Some(4096), "what is copied stays what it was");
        let heir = bitmap.clone().into_successor();
        assert_eq!(
            (heir.count(), heir.enabled, heir.persistent, heir.read_only),
            (Some(4096), true, true, true)
        );
        assert!(heir.dirty.as_ref().unwrap().contains(2) && !heir.is_busy());
        bitmap.take_successor_in();
        assert_eq!(
            (bitmap.count(), bitmap.enabled, bitmap.is_busy()),
            (Some(8192), true, false)
        );
    }

    #[test]
    fn a_shorter_node_keeps_the_bit_of_its_end() {
        let mut bitmap = Bitmap::new(Rc::from("b"), 4096, 65536);
        bitmap.mark(0..65536);
        bitmap.resize(4096 + 512);
        assert_eq!(bitmap.count(), Some(8192));
        bitmap.resize(65536);
        assert_eq!(bitmap.count(), Some(8192), "what is new is clean");
    }
}
