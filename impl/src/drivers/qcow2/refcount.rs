//! Refcounts in a refcount block: widths of 1 to 64 bits.

/// Refcount `index` of a block with entries of 2^`order` bits. Sub-byte widths count from the low bits.
#[inline]
pub(super) fn get(block: &[u8], order: u32, index: usize) -> u64 {
    match order {
        0..=2 => {
            let bits = 1 << order;
            let at = index << order;
            u64::from(block[at / 8] >> (at % 8)) & ((1 << bits) - 1)
        }
        3 => u64::from(block[index]),
        4 => u64::from(u16::from_be_bytes([block[2 * index], block[2 * index + 1]])),
        5 => {
            let raw = block[4 * index..4 * index + 4].try_into().expect("four bytes");
            u64::from(u32::from_be_bytes(raw))
        }
        6 => u64::from_be_bytes(block[8 * index..8 * index + 8].try_into().expect("eight bytes")),
        _ => unreachable!("refcount order is validated at open"),
    }
}

/// Sets refcount `index`; returns the bytes that changed as (start, end).
///
/// # Panics
/// When `value` does not fit the width; the driver only ever sets one, or less than before.
pub(super) fn set(block: &mut [u8], order: u32, index: usize, value: u64) -> (usize, usize) {
    const FITS: &str = "refcount fits its width";
    match order {
        0..=2 => {
            let bits = 1u32 << order;
            let at = index << order;
            let mask = u8::try_from((1u32 << bits) - 1).expect("at most four bits");
            let value = u8::try_from(value).expect(FITS);
            assert!(value <= mask, "{FITS}");
            let byte = &mut block[at / 8];
            *byte = *byte & !(mask << (at % 8)) | value << (at % 8);
            (at / 8, at / 8 + 1)
        }
        3 => {
            block[index] = u8::try_from(value).expect(FITS);
            (index, index + 1)
        }
        4 => {
            let at = 2 * index;
            block[at..at + 2].copy_from_slice(&u16::try_from(value).expect(FITS).to_be_bytes());
            (at, at + 2)
        }
        5 => {
            let at = 4 * index;
            block[at..at + 4].copy_from_slice(&u32::try_from(value).expect(FITS).to_be_bytes());
            (at, at + 4)
        }
        6 => {
            let at = 8 * index;
            block[at..at + 8].copy_from_slice(&value.to_be_bytes());
            (at, at + 8)
        }
        _ => unreachable!("refcount order is validated at open"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_width_keeps_its_neighbours() {
        for order in 0..=6 {
            let mut block = vec![0; 512];
            let entries = (512 * 8) >> order;
            let max = u64::MAX >> (64 - (1u32 << order));
            for index in 0..entries {
                set(
                    &mut block,
                    order,
                    index,
                    (index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) & max,
                );
            }
            let (from, to) = set(&mut block, order, 5, max);
            assert!(from < to && to <= 512);
            for index in (0..entries).filter(|i| *i != 5) {
                let expected = (index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) & max;
                assert_eq!(get(&block, order, index), expected, "order {order} index {index}");
            }
            assert_eq!(get(&block, order, 5), max);
        }
    }

    #[test]
    fn layout_on_disk() {
        let mut block = vec![0; 512];
        set(&mut block, 0, 1, 1);
        assert_eq!(block[0], 0b10);
        set(&mut block, 2, 3, 0xa);
        assert_eq!(block[1], 0xa0);
        set(&mut block, 4, 4, 0x0102);
        assert_eq!(block[8..10], [1, 2]);
        set(&mut block, 5, 8, 7);
        assert_eq!(block[32..36], [0, 0, 0, 7]);
    }
}
