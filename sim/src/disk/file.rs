//! A file of the simulated disk: its bytes, and which sectors have space.

use blkcheck_impl::env::Extent;

use super::SECTOR;
use super::volatile::{Change, Volatile};

#[derive(Debug, Default)]
pub(super) struct File {
    pub(super) name: String,
    pub(super) data: Vec<u8>,
    /// One bit per sector: holds data, or at least space.
    pub(super) allocated: Vec<u64>,
    /// Open handles, and how many of them may write.
    pub(super) open: u32,
    pub(super) writers: u32,
    /// Two writers were open at once: its content is nobody's responsibility.
    pub(super) contested: bool,
    pub(super) exists: bool,
    /// What is durable, where the power may fail.
    pub(super) volatile: Option<Volatile>,
}

impl File {
    /// A change was carried out.
    pub(super) fn follow(&mut self, change: Option<Change>) {
        if let (Some(volatile), Some(change)) = (&mut self.volatile, change) {
            volatile.changed(change, false);
        }
    }

    pub(super) fn sectors(&self) -> usize {
        to_usize((self.data.len() as u64).div_ceil(SECTOR))
    }

    pub(super) fn set_length(&mut self, length: usize) {
        self.data.resize(length, 0);
        let words = self.sectors().div_ceil(64);
        // Bits past the end are clear, so that growing makes a hole.
        self.allocated.resize(words, 0);
        if !self.sectors().is_multiple_of(64) {
            let keep = (1 << (self.sectors() % 64)) - 1;
            *self.allocated.last_mut().expect("one word at least") &= keep;
        }
    }

    pub(super) fn mark(&mut self, first: u64, end: u64, allocated: bool) {
        for sector in first..end {
            let (word, bit) = (to_usize(sector / 64), 1u64 << (sector % 64));
            if allocated {
                self.allocated[word] |= bit;
            } else {
                self.allocated[word] &= !bit;
            }
        }
    }

    pub(super) fn write(&mut self, offset: u64, data: &[u8]) {
        let (start, end) = (to_usize(offset), to_usize(offset) + data.len());
        if end > self.data.len() {
            self.set_length(end);
        }
        self.data[start..end].copy_from_slice(data);
        self.mark(offset / SECTOR, (end as u64).div_ceil(SECTOR), true);
    }

    /// Zeroes a range; `grow` as fallocate's zero-range does, a hole where `unmap`.
    pub(super) fn zero(&mut self, offset: u64, bytes: u64, grow: bool, unmap: bool) {
        if grow && to_usize(offset + bytes) > self.data.len() {
            self.set_length(to_usize(offset + bytes));
        }
        let end = (offset + bytes).min(self.data.len() as u64);
        if offset >= end {
            return;
        }
        self.data[to_usize(offset)..to_usize(end)].fill(0);
        if unmap {
            let last = if end == self.data.len() as u64 {
                end.div_ceil(SECTOR)
            } else {
                end / SECTOR
            };
            self.mark(offset.div_ceil(SECTOR), last, false);
        } else {
            self.mark(offset / SECTOR, end.div_ceil(SECTOR), true);
        }
    }

    pub(super) fn extent(&self, offset: u64) -> Extent {
        let bit = |sector: u64| self.allocated[to_usize(sector / 64)] >> (sector % 64) & 1 == 1;
        let first = offset / SECTOR;
        let data = bit(first);
        let mut sector = first + 1;
        let sectors = self.sectors() as u64;
        while sector < sectors {
            // Whole words of one kind are skipped at once.
            let word = self.allocated[to_usize(sector / 64)] ^ if data { u64::MAX } else { 0 };
            let rest = word >> (sector % 64);
            if rest != 0 {
                sector += u64::from(rest.trailing_zeros());
                break;
            }
            sector = (sector / 64 + 1) * 64;
        }
        let end = (sector.min(sectors) * SECTOR).min(self.data.len() as u64);
        Extent {
            data,
            bytes: end - offset,
        }
    }
}

pub(super) fn to_usize(v: u64) -> usize {
    usize::try_from(v).expect("checked against MAX_FILE")
}
