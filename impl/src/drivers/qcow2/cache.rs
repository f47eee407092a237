//! A write-back cache of tables of one kind (L2 tables, or refcount blocks): whole clusters, raw big endian.
//!
//! Rules: bounded; a dirty page is never evicted (the caller commits first, see `commit`); eviction is by clock.
//! The dirty part of a page is one range of whole sectors, so that little changes cost little writes.
//! Pages change only under the image lock; they may be read without it.

use std::cell::Cell;
use std::collections::BTreeMap;

use super::units::HostOffset;

const SECTOR: usize = 512;

/// One cached table.
#[derive(Debug)]
pub(super) struct Page {
    pub at: HostOffset,
    pub data: Box<[u8]>,
    /// Dirty bytes [from, to), whole sectors.
    dirty: Option<(usize, usize)>,
    /// Second chance of the clock.
    referenced: Cell<bool>,
    /// L2 tables: the refcount was verified to be one, so the table may be changed in place.
    pub exclusive: bool,
}

/// The cache.
#[derive(Debug)]
pub(super) struct Cache {
    pages: Vec<Page>,
    index: BTreeMap<HostOffset, usize>,
    /// Slot of the last hit.
    last: Cell<usize>,
    hand: usize,
    capacity: usize,
    /// Slots with a dirty range.
    dirty: Vec<usize>,
}

impl Cache {
    /// At most `capacity` pages; they are allocated as they are needed.
    pub(super) fn new(capacity: usize) -> Cache {
        assert!(capacity >= 2);
        Cache {
            pages: Vec::new(),
            index: BTreeMap::new(),
            last: Cell::new(0),
            hand: 0,
            capacity,
            dirty: Vec::new(),
        }
    }

    /// Slot of the table at `at`.
    #[inline]
    pub(super) fn find(&self, at: HostOffset) -> Option<usize> {
        let last = self.last.get();
        let slot = match self.pages.get(last) {
            Some(page) if page.at == at => last,
            _ => *self.index.get(&at)?,
        };
        self.last.set(slot);
        self.pages[slot].referenced.set(true);
        Some(slot)
    }

    #[inline]
    pub(super) fn page(&self, slot: usize) -> &Page {
        &self.pages[slot]
    }

    /// The bytes of a page, to be changed; the caller reports the change with [`Cache::touch`].
    pub(super) fn page_mut(&mut self, slot: usize) -> &mut Page {
        &mut self.pages[slot]
    }

    /// Big-endian entry `index` of 8 bytes.
    #[inline]
    pub(super) fn entry(&self, slot: usize, index: usize) -> u64 {
        let data = &self.pages[slot].data;
        u64::from_be_bytes(data[8 * index..8 * index + 8].try_into().expect("eight bytes"))
    }

    /// Sets entry `index` of 8 bytes.
    pub(super) fn set_entry(&mut self, slot: usize, index: usize, value: u64) {
        self.pages[slot].data[8 * index..8 * index + 8].copy_from_slice(&value.to_be_bytes());
        self.touch(slot, 8 * index, 8 * index + 8);
    }

    /// Bytes [from, to) of a page changed.
    pub(super) fn touch(&mut self, slot: usize, from: usize, to: usize) {
        let page = &mut self.pages[slot];
        let from = from & !(SECTOR - 1);
        let to = to.next_multiple_of(SECTOR).min(page.data.len());
        page.dirty = Some(match page.dirty {
            Some((a, b)) => (a.min(from), b.max(to)),
            None => {
                self.dirty.push(slot);
                (from, to)
            }
        });
    }

    /// Makes a free slot exist, evicting a clean page if need be; false: every page is dirty.
    pub(super) fn make_room(&mut self) -> bool {
        if self.pages.len() < self.capacity {
            return true;
        }
        self.victim().is_some()
    }

    fn victim(&mut self) -> Option<usize> {
        for _ in 0..2 * self.pages.len() {
            let slot = self.hand;
            self.hand = (self.hand + 1) % self.pages.len();
            let page = &self.pages[slot];
            if page.dirty.is_none() && !page.referenced.replace(false) {
                // Stop here next time too: `insert` asks again.
                self.hand = slot;
                return Some(slot);
            }
        }
        None
    }

    /// Adds a table. `fresh`: it is not on disk yet, all of it is dirty.
    ///
    /// # Panics
    /// Without a preceding successful [`Cache::make_room`], or if the table is already here.
    pub(super) fn insert(&mut self, at: HostOffset, data: Box<[u8]>, fresh: bool) -> usize {
        let len = data.len();
        let page = Page {
            at,
            data,
            dirty: None,
            referenced: Cell::new(true),
            exclusive: fresh,
        };
        let slot = if self.pages.len() < self.capacity {
            self.pages.push(page);
            self.pages.len() - 1
        } else {
            let slot = self.victim().expect("make_room came first");
            self.index.remove(&self.pages[slot].at);
            self.pages[slot] = page;
            slot
        };
        assert!(self.index.insert(at, slot).is_none(), "a table is cached once");
        self.last.set(slot);
        if fresh {
            self.touch(slot, 0, len);
        }
        slot
    }

    /// Forgets a table without writing it: it is no longer part of the image.
    pub(super) fn forget(&mut self, at: HostOffset) {
        let Some(slot) = self.index.remove(&at) else {
            return;
        };
        self.pages[slot].dirty = None;
        self.dirty.retain(|s| *s != slot);
        let moved = self.pages.len() - 1;
        self.pages.swap_remove(slot);
        if slot != moved {
            *self.index.get_mut(&self.pages[slot].at).expect("indexed") = slot;
            if let Some(listed) = self.dirty.iter_mut().find(|s| **s == moved) {
                *listed = slot;
            }
        }
        self.last.set(0);
        self.hand = 0;
    }

    /// Whether anything is to be written.
    #[inline]
    pub(super) fn is_dirty(&self) -> bool {
        !self.dirty.is_empty()
    }

    /// Copies the next thing to write into `out`; the write is reported with [`Cache::cleaned`].
    pub(super) fn next_dirty(&self, out: &mut Vec<u8>) -> Option<(HostOffset, usize)> {
        let slot = *self.dirty.last()?;
        let page = &self.pages[slot];
        let (from, to) = page.dirty.expect("listed as dirty");
        out.clear();
        out.extend_from_slice(&page.data[from..to]);
        Some((HostOffset(page.at.0 + from as u64), slot))
    }

    /// What [`Cache::next_dirty`] gave is written.
    pub(super) fn cleaned(&mut self, slot: usize) {
        assert_eq!(self.dirty.pop(), Some(slot), "nothing changes during a commit");
        self.pages[slot].dirty = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(byte: u8) -> Box<[u8]> {
        vec![byte; 1024].into_boxed_slice()
    }

    #[test]
    fn dirty_pages_are_never_evicted() {
        let mut cache = Cache::new(2);
        for (at, fresh) in [(0, true), (1024, false)] {
            assert!(cache.make_room());
            cache.insert(HostOffset(at), page(1), fresh);
        }
        assert!(cache.make_room());
        cache.insert(HostOffset(2048), page(2), true);
        assert!(cache.find(HostOffset(1024)).is_none(), "the clean one went");
        assert!(cache.find(HostOffset(0)).is_some());
        assert!(!cache.make_room(), "all are dirty");
        let mut out = Vec::new();
        let (_, slot) = cache.next_dirty(&mut out).unwrap();
        assert_eq!(out.len(), 1024);
        cache.cleaned(slot);
        assert!(cache.make_room());
    }

    #[test]
    fn only_dirty_sectors_are_written() {
        let mut cache = Cache::new(2);
        assert!(cache.make_room());
        let slot = cache.insert(HostOffset(4096), page(0), false);
        assert!(!cache.is_dirty());
        cache.set_entry(slot, 64, 0x0102);
        let mut out = Vec::new();
        assert_eq!(cache.next_dirty(&mut out), Some((HostOffset(4096 + 512), slot)));
        assert_eq!(out[..8], [0, 0, 0, 0, 0, 0, 1, 2]);
        assert_eq!(out.len(), 512);
        cache.cleaned(slot);
        assert!(!cache.is_dirty());
        assert_eq!(cache.entry(slot, 64), 0x0102);
    }

    #[test]
    fn forgetting_keeps_the_others_straight() {
        let mut cache = Cache::new(4);
        for at in 0..4 {
            assert!(cache.make_room());
            cache.insert(HostOffset(at * 1024), page(u8::try_from(at).unwrap()), true);
        }
        cache.forget(HostOffset(1024));
        assert!(cache.find(HostOffset(1024)).is_none());
        let mut out = Vec::new();
        let mut seen = Vec::new();
        while let Some((at, slot)) = cache.next_dirty(&mut out) {
            assert_eq!(u64::from(out[0]) * 1024, at.0);
            seen.push(at.0);
            cache.cleaned(slot);
        }
        seen.sort_unstable();
        assert_eq!(seen, [0, 2048, 3072]);
    }
}
