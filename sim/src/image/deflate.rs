//! A tiny raw-deflate writer for stamped clusters: one block with the fixed code, matches at distance 16 only, which
//! is the period of a stamp. Well within the 4 KiB window that qcow2 readers have.

/// Bits, least significant first.
struct Bits<'a> {
    out: &'a mut Vec<u8>,
    word: u64,
    count: u32,
}

impl Bits<'_> {
    fn put(&mut self, value: u32, bits: u32) {
        self.word |= u64::from(value) << self.count;
        self.count += bits;
        while self.count >= 8 {
            self.out.push(self.word.to_le_bytes()[0]);
            self.word >>= 8;
            self.count -= 8;
        }
    }

    /// A Huffman code: its bits come most significant first.
    fn code(&mut self, value: u32, bits: u32) {
        self.put(value.reverse_bits() >> (32 - bits), bits);
    }

    fn literal_or_length(&mut self, symbol: u32) {
        match symbol {
            0..=143 => self.code(0x30 + symbol, 8),
            144..=255 => self.code(0x190 + symbol - 144, 9),
            256..=279 => self.code(symbol - 256, 7),
            _ => self.code(0xc0 + symbol - 280, 8),
        }
    }

    fn length(&mut self, length: u32) {
        // (first length, extra bits) of symbols 257 ...
        const LENGTHS: [(u32, u32); 29] = [
            (3, 0),
            (4, 0),
            (5, 0),
            (6, 0),
            (7, 0),
            (8, 0),
            (9, 0),
            (10, 0),
            (11, 1),
            (13, 1),
            (15, 1),
            (17, 1),
            (19, 2),
            (23, 2),
            (27, 2),
            (31, 2),
            (35, 3),
            (43, 3),
            (51, 3),
            (59, 3),
            (67, 4),
            (83, 4),
            (99, 4),
            (115, 4),
            (131, 5),
            (163, 5),
            (195, 5),
            (227, 5),
            (258, 0),
        ];
        let at = LENGTHS.partition_point(|&(first, _)| first <= length) - 1;
        let (first, extra) = LENGTHS[at];
        self.literal_or_length(257 + u32::try_from(at).expect("29 symbols"));
        self.put(length - first, extra);
    }

    /// Distance 16: symbol 7 (13 ..= 16), 2 extra bits, value 3.
    fn distance_16(&mut self) {
        self.code(7, 5);
        self.put(3, 2);
    }
}

/// Appends `data`, compressed, to `out`.
pub(super) fn deflate(data: &[u8], out: &mut Vec<u8>) {
    let mut bits = Bits {
        out,
        word: 0,
        count: 0,
    };
    bits.put(1, 1);
    bits.put(1, 2);
    let mut at = 0;
    while at < data.len() {
        let longest = if at < 16 { 0 } else { (data.len() - at).min(258) };
        let length = (0..longest)
            .take_while(|&i| data[at + i] == data[at + i - 16])
            .count();
        if length >= 3 {
            bits.length(u32::try_from(length).expect("at most 258"));
            bits.distance_16();
            at += length;
        } else {
            bits.literal_or_length(u32::from(data[at]));
            at += 1;
        }
    }
    bits.literal_or_length(256);
    bits.put(0, 7);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::StepId;
    use crate::stamp::{Source, fill};

    #[test]
    fn an_independent_inflater_reads_it_back() {
        let mut cases: Vec<Vec<u8>> = vec![
            vec![0; 512],
            (0..=255).cycle().take(4096).collect(),
            vec![200; 275],
        ];
        for grain in [16, 64, 512] {
            let mut stamped = vec![0; 65536];
            fill(&mut stamped[512..], 512, grain, Source::Step(StepId(77)));
            cases.push(stamped);
        }
        for data in cases {
            let mut packed = Vec::new();
            deflate(&data, &mut packed);
            assert_eq!(
                miniz_oxide::inflate::decompress_to_vec(&packed).expect("valid"),
                data
            );
        }
    }

    #[test]
    fn stamps_shrink_at_every_grain() {
        for grain in [16, 32, 64, 512] {
            let mut data = vec![0; 512];
            fill(&mut data, 1024, grain, Source::Fill { image: 3, fill: 1 });
            let mut packed = Vec::new();
            deflate(&data, &mut packed);
            assert!(packed.len() < 400, "grain {grain}: {}", packed.len());
        }
    }
}
