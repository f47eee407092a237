//! Stamps: every grain that anybody writes says who wrote it and where, so that one look at the bytes tells whose
//! write a read saw, and whether it was misplaced or torn.
//!
//! A grain is filled with one 16-byte pattern over and over: the source (8 bytes) and the offset of the grain
//! (8 bytes), both mixed so that neither is ever all zero.

use crate::history::StepId;

/// Who wrote a grain.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub enum Source {
    /// The fill at this index of the image at this index.
    Fill {
        /// Index in `Scenario::images`.
        image: u16,
        /// Index in `Image::fill`.
        fill: u16,
    },
    /// A guest write.
    Step(StepId),
}

/// What a grain holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Content {
    /// All zero.
    Zero,
    /// Written by this source at this very offset.
    Stamp(Source),
    /// Written by this source, but at another offset.
    Misplaced(Source, u64),
    /// Neither zero nor one whole stamp (torn, or garbage).
    Torn,
}

const TAG: u64 = 0xb10c_0000_0000_0000;
const OFFSET_MASK: u64 = 0x5eed_5eed_5eed_5eed;

impl Source {
    fn encode(self) -> u64 {
        TAG | match self {
            Source::Fill { image, fill } => 1 << 40 | u64::from(image) << 16 | u64::from(fill),
            Source::Step(step) => 2 << 40 | u64::from(step.0),
        }
    }

    fn decode(word: u64) -> Option<Source> {
        if word & 0xffff_0000_0000_0000 != TAG {
            return None;
        }
        let low = word & 0xff_ffff_ffff;
        match (word >> 40) & 0xff {
            1 => Some(Source::Fill {
                image: u16::try_from(low >> 16).ok()?,
                fill: u16::try_from(low & 0xffff).ok()?,
            }),
            2 => Some(Source::Step(StepId(u32::try_from(low).ok()?))),
            _ => None,
        }
    }
}

/// Fills `buf`, which starts at `offset` (both multiples of `grain`, the last grain may be short), with `source`'s stamps.
pub fn fill(buf: &mut [u8], offset: u64, grain: u32, source: Source) {
    assert!(grain.is_power_of_two() && grain >= 16, "grain {grain}");
    let word = source.encode().to_le_bytes();
    for (i, chunk) in buf.chunks_mut(grain as usize).enumerate() {
        let at = offset + i as u64 * u64::from(grain);
        let mut pattern = [0; 16];
        pattern[..8].copy_from_slice(&word);
        pattern[8..].copy_from_slice(&(at ^ OFFSET_MASK).to_le_bytes());
        for piece in chunk.chunks_mut(16) {
            piece.copy_from_slice(&pattern[..piece.len()]);
        }
    }
}

/// What one grain (or the short last one) at `offset` holds.
#[must_use]
pub fn read(grain: &[u8], offset: u64) -> Content {
    let Some(first) = grain.get(..16) else {
        return if grain.iter().all(|&b| b == 0) {
            Content::Zero
        } else {
            Content::Torn
        };
    };
    // The same pattern over and over: equal to itself, moved on by one pattern.
    if grain[16..] != grain[..grain.len() - 16] {
        return Content::Torn;
    }
    let word = |at: usize| u64::from_le_bytes(first[at..at + 8].try_into().expect("8 bytes"));
    if word(0) == 0 && word(8) == 0 {
        return Content::Zero;
    }
    match Source::decode(word(0)) {
        None => Content::Torn,
        Some(source) if word(8) ^ OFFSET_MASK == offset => Content::Stamp(source),
        Some(source) => Content::Misplaced(source, word(8) ^ OFFSET_MASK),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_tells_source_place_and_tearing() {
        let source = Source::Step(StepId(7));
        let mut buf = vec![0; 128];
        assert_eq!(read(&buf[..64], 0), Content::Zero);
        fill(&mut buf, 512, 64, source);
        assert_eq!(read(&buf[64..], 576), Content::Stamp(source));
        assert_eq!(read(&buf[64..], 512), Content::Misplaced(source, 576));
        buf[100] ^= 1;
        assert_eq!(read(&buf[64..], 576), Content::Torn);
        let fill_source = Source::Fill { image: 2, fill: 9 };
        fill(&mut buf, 0, 64, fill_source);
        assert_eq!(read(&buf[..64], 0), Content::Stamp(fill_source));
    }
}
