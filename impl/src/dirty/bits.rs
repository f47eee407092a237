//! A long row of bits, most of them clear.
//!
//! Rules: pages of 4 KiB that are there only once a bit in them is set, so that memory follows what was written and not
//! the length of a node. Bit k of a byte is bit k of the row, as in QEMU's files and digests.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::io::size;

const WORDS: usize = 512;
const PAGE_BITS: u64 = 64 * WORDS as u64;
const PAGE_BYTES: u64 = PAGE_BITS / 8;

type Page = Box<[u64; WORDS]>;

/// The bits.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Bits {
    pages: BTreeMap<u64, Page>,
    /// How many are set: asked for with every cluster that is copied.
    ones: u64,
}

impl Bits {
    /// Sets a range.
    pub(crate) fn set(&mut self, bits: Range<u64>) {
        let mut at = bits.start;
        while at < bits.end {
            let index = at / PAGE_BITS;
            let end = bits.end.min((index + 1) * PAGE_BITS);
            let page = self.pages.entry(index).or_insert_with(|| Box::new([0; WORDS]));
            self.ones += set_in(page, size(at % PAGE_BITS)..size(at % PAGE_BITS + (end - at)));
            at = end;
        }
    }

    /// Clears a range.
    pub(crate) fn clear(&mut self, bits: Range<u64>) {
        let mut at = bits.start;
        while at < bits.end {
            let index = at / PAGE_BITS;
            let end = bits.end.min((index + 1) * PAGE_BITS);
            if let Some(page) = self.pages.get_mut(&index) {
                self.ones -= clear_in(page, size(at % PAGE_BITS)..size(at % PAGE_BITS + (end - at)));
                if page.iter().all(|word| *word == 0) {
                    self.pages.remove(&index);
                }
            }
            at = end;
        }
    }

    /// The first bit of a range that is set.
    pub(crate) fn next_set(&self, bits: Range<u64>) -> Option<u64> {
        if bits.is_empty() {
            return None;
        }
        let pages = self
            .pages
            .range(bits.start / PAGE_BITS..=(bits.end - 1) / PAGE_BITS);
        for (index, page) in pages {
            let first = index * PAGE_BITS;
            let from = size(bits.start.saturating_sub(first));
            if let Some(at) = next(page, from, true) {
                let at = first + at as u64;
                return (at < bits.end).then_some(at);
            }
        }
        None
    }

    /// The first bit of a range that is clear.
    pub(crate) fn next_clear(&self, bits: Range<u64>) -> Option<u64> {
        let mut at = bits.start;
        while at < bits.end {
            let first = at - at % PAGE_BITS;
            let Some(page) = self.pages.get(&(at / PAGE_BITS)) else {
                return Some(at);
            };
            if let Some(found) = next(page, size(at - first), false) {
                let found = first + found as u64;
                return (found < bits.end).then_some(found);
            }
            at = first + PAGE_BITS;
        }
        None
    }

    /// Clears everything from `end` on.
    pub(crate) fn truncate(&mut self, end: u64) {
        let gone = self.pages.split_off(&end.div_ceil(PAGE_BITS));
        self.ones -= gone.values().map(ones).sum::<u64>();
        let Some(page) = self.pages.get_mut(&(end / PAGE_BITS)) else {
            return;
        };
        self.ones -= clear_in(page, size(end % PAGE_BITS)..64 * WORDS);
    }

    /// How many are set.
    pub(crate) fn count(&self) -> u64 {
        self.ones
    }

    /// Runs of set bits, in order; one that goes on in the next page is told in two.
    pub(crate) fn runs(&self) -> impl Iterator<Item = Range<u64>> {
        self.pages.iter().flat_map(|(index, page)| {
            let first = index * PAGE_BITS;
            let mut at = 0;
            std::iter::from_fn(move || {
                let start = next(page, at, true)?;
                at = next(page, start, false).unwrap_or(64 * WORDS);
                Some(first + start as u64..first + at as u64)
            })
        })
    }

    /// Bytes from byte `from` on.
    pub(crate) fn bytes(&self, from: u64, out: &mut [u8]) {
        out.fill(0);
        let end = from + out.len() as u64;
        for (index, page) in self.pages.range(from / PAGE_BYTES..end.div_ceil(PAGE_BYTES)) {
            for (word, at) in page.iter().zip((index * PAGE_BYTES..).step_by(8)) {
                for (byte, at) in word.to_le_bytes().into_iter().zip(at..) {
                    if (from..end).contains(&at) {
                        out[size(at - from)] = byte;
                    }
                }
            }
        }
    }

    /// Takes in bytes that begin at byte `from`.
    pub(crate) fn load(&mut self, from: u64, bytes: &[u8]) {
        for (byte, at) in bytes.iter().zip(from..).filter(|(byte, _)| **byte != 0) {
            for bit in (0..8).filter(|bit| byte >> bit & 1 == 1) {
                self.set(8 * at + bit..8 * at + bit + 1);
            }
        }
    }
}

fn ones(page: &Page) -> u64 {
    page.iter().map(|word| u64::from(word.count_ones())).sum()
}

/// How many were clear.
fn set_in(page: &mut Page, bits: Range<usize>) -> u64 {
    let mut new = 0;
    for (word, mask) in masked(page, bits) {
        new += u64::from((mask & !*word).count_ones());
        *word |= mask;
    }
    new
}

/// How many were set.
fn clear_in(page: &mut Page, bits: Range<usize>) -> u64 {
    let mut old = 0;
    for (word, mask) in masked(page, bits) {
        old += u64::from((mask & *word).count_ones());
        *word &= !mask;
    }
    old
}

/// The words that a range touches, each with the bits of the range in it.
fn masked(page: &mut Page, bits: Range<usize>) -> impl Iterator<Item = (&mut u64, u64)> {
    let words = page
        .iter_mut()
        .enumerate()
        .take(bits.end.div_ceil(64))
        .skip(bits.start / 64);
    words.map(move |(at, word)| {
        let from = bits.start.saturating_sub(64 * at);
        let to = (bits.end - 64 * at).min(64);
        let below = |bit: usize| if bit == 64 { u64::MAX } else { (1 << bit) - 1 };
        (word, below(to) & !below(from))
    })
}

/// The next bit from `at` on that is set, or clear.
fn next(page: &Page, at: usize, set: bool) -> Option<usize> {
    let mut at = at;
    while let Some(word) = page.get(at / 64) {
        let word = if set { *word } else { !*word } >> (at % 64);
        if word != 0 {
            return Some(at + word.trailing_zeros() as usize);
        }
        at = (at / 64 + 1) * 64;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_across_words_and_pages() {
        let mut bits = Bits::default();
        bits.set(3..5);
        bits.set(60..130);
        bits.set(PAGE_BITS - 1..PAGE_BITS + 1);
        bits.set(7..7);
        assert_eq!(
            bits.runs().collect::<Vec<_>>(),
            [3..5, 60..130, PAGE_BITS - 1..PAGE_BITS, PAGE_BITS..PAGE_BITS + 1]
        );
        assert_eq!(bits.count(), 74);
        let mut bytes = [0; 18];
        bits.bytes(0, &mut bytes);
        let mut back = Bits::default();
        back.load(0, &bytes);
        assert_eq!(back.runs().collect::<Vec<_>>(), [3..5, 60..130]);
        bits.bytes(PAGE_BYTES - 1, &mut bytes[..2]);
        assert_eq!(bytes[..2], [0x80, 1]);
    }

    #[test]
    fn searching_and_clearing() {
        let mut bits = Bits::default();
        assert_eq!(bits.next_set(0..u64::MAX), None);
        assert_eq!(bits.next_clear(7..9), Some(7));
        bits.set(3..2 * PAGE_BITS + 70);
        assert_eq!(bits.next_set(0..3), None, "the end is not part of the range");
        assert_eq!(bits.next_set(0..4), Some(3));
        assert_eq!(bits.next_set(5..6), Some(5));
        assert_eq!(bits.next_clear(3..2 * PAGE_BITS + 70), None);
        assert_eq!(bits.next_clear(3..3 * PAGE_BITS), Some(2 * PAGE_BITS + 70));
        bits.clear(60..PAGE_BITS + 1);
        assert_eq!(bits.next_clear(3..PAGE_BITS), Some(60));
        assert_eq!(bits.next_set(60..3 * PAGE_BITS), Some(PAGE_BITS + 1));
        assert_eq!(bits.count(), 57 + PAGE_BITS - 1 + 70);
        bits.clear(0..3 * PAGE_BITS);
        assert_eq!(bits, Bits::default(), "empty pages go");
        assert_eq!((bits.next_set(5..5), bits.next_clear(5..5)), (None, None));
    }

    #[test]
    fn what_is_past_the_end_goes() {
        let mut bits = Bits::default();
        bits.set(0..3 * PAGE_BITS);
        bits.truncate(PAGE_BITS + 65);
        assert_eq!(bits.count(), PAGE_BITS + 65);
        bits.truncate(PAGE_BITS);
        assert_eq!(bits.count(), PAGE_BITS);
        bits.truncate(1);
        assert_eq!(bits.count(), 1);
        bits.set(0..70);
        bits.clear(60..80);
        assert_eq!(
            bits.count(),
            60,
            "what was set or clear before does not count twice"
        );
        bits.truncate(1);
        assert_eq!(
            bits.runs().collect::<Vec<_>>(),
            std::iter::once(0..1).collect::<Vec<_>>()
        );
    }
}
