//! Padding arithmetic: what an unaligned request needs around it.
//!
//! A request is widened to the node's request alignment. A read then goes through a bounce buffer of the widened
//! range; a write first reads the blocks it covers only in part (read-modify-write).

use crate::io::{align_down, align_up};

/// The widening of one unaligned request. Bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Pad {
    /// Start of the widened range.
    pub(crate) start: u64,
    /// Length of the widened range.
    pub(crate) bytes: u64,
    /// Bytes before the request.
    pub(crate) head: u64,
    /// Bytes after it.
    pub(crate) tail: u64,
    align: u64,
}

impl Pad {
    /// The padding of `[offset, offset + bytes)`; `None` when it is aligned already.
    pub(crate) fn new(offset: u64, bytes: u64, align: u64) -> Option<Pad> {
        assert!(
            align.is_power_of_two(),
            "request alignment {align} is a power of two"
        );
        let head = offset % align;
        let end = align_up(offset + bytes, align);
        let tail = end - (offset + bytes);
        if head == 0 && tail == 0 {
            return None;
        }
        assert!(bytes > 0, "an empty unaligned request is answered before padding");
        let start = align_down(offset, align);
        Some(Pad {
            start,
            bytes: end - start,
            head,
            tail,
            align,
        })
    }

    /// Where the request's own bytes are in a buffer over the widened range.
    pub(crate) fn user(&self) -> std::ops::Range<usize> {
        crate::io::size(self.head)..crate::io::size(self.bytes - self.tail)
    }

    /// Whether the whole widened range is read at once before a write: it is one block, or two that are both
    /// covered in part.
    pub(crate) fn merge(&self) -> bool {
        let both = self.bytes > self.align && self.head > 0 && self.tail > 0;
        self.bytes == if both { 2 * self.align } else { self.align }
    }

    /// Ranges of the widened buffer to read before a write: the merged range, or the head and the tail block.
    pub(crate) fn pre_reads(&self) -> [Option<(u64, u64)>; 2] {
        if self.merge() {
            return [Some((0, self.bytes)), None];
        }
        [
            (self.head > 0).then_some((0, self.align)),
            (self.tail > 0).then_some((self.bytes - self.align, self.align)),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aligned_needs_nothing() {
        assert_eq!(Pad::new(1024, 512, 512), None);
        assert_eq!(Pad::new(7, 13, 1), None);
        assert_eq!(Pad::new(512, 0, 512), None);
    }

    #[test]
    fn one_block() {
        let pad = Pad::new(513, 10, 512).expect("unaligned");
        assert_eq!((pad.start, pad.bytes, pad.head, pad.tail), (512, 512, 1, 501));
        assert!(pad.merge());
        assert_eq!(pad.pre_reads(), [Some((0, 512)), None]);
        assert_eq!(pad.user(), 1..11);
    }

    #[test]
    fn two_blocks_merge_only_when_both_are_partial() {
        let both = Pad::new(511, 2, 512).expect("unaligned");
        assert!(both.merge());
        assert_eq!(both.pre_reads(), [Some((0, 1024)), None]);
        let head = Pad::new(511, 513, 512).expect("unaligned");
        assert!(!head.merge());
        assert_eq!(head.pre_reads(), [Some((0, 512)), None]);
        let tail = Pad::new(0, 513, 512).expect("unaligned");
        assert!(!tail.merge());
        assert_eq!(tail.pre_reads(), [None, Some((512, 512))]);
    }

    #[test]
    fn three_blocks_read_both_ends() {
        let pad = Pad::new(100, 4096 * 2, 4096).expect("unaligned");
        assert!(!pad.merge());
        assert_eq!(pad.pre_reads(), [Some((0, 4096)), Some((8192, 4096))]);
    }

    /// Against the definition: the smallest aligned range that holds the request.
    #[test]
    fn exhaustive_small() {
        for align in [1u64, 2, 4, 8] {
            for offset in 0..20 {
                for bytes in 1..20 {
                    let start = (0..=offset).rev().find(|s| s % align == 0).expect("0 is aligned");
                    let end = (offset + bytes..).find(|e| e % align == 0).expect("exists");
                    match Pad::new(offset, bytes, align) {
                        None => assert_eq!((start, end), (offset, offset + bytes)),
                        Some(pad) => {
                            assert_eq!((pad.start, pad.start + pad.bytes), (start, end));
                            assert_eq!(pad.start + pad.head, offset);
                            let partial = |block: u64| {
                                let (from, to) = (start + block * align, start + (block + 1) * align);
                                offset > from || offset + bytes < to
                            };
                            let covered = |block: u64| {
                                pad.pre_reads()
                                    .iter()
                                    .flatten()
                                    .any(|(o, n)| *o <= block * align && (block + 1) * align <= o + n)
                            };
                            for block in 0..pad.bytes / align {
                                assert_eq!(
                                    partial(block),
                                    covered(block),
                                    "{offset}+{bytes}/{align} {block}"
                                );
                            }
                        }
                    }
                }
            }
        }
    }
}
