//! Random streams: everything random of a seed comes from one of these, and each purpose has a stream of its own, so
//! that drawing more of one thing never shifts another.
//!
//! Rules: the numbers are a function of the seed alone, on every machine, for ever: recorded findings name seeds.

/// SplitMix64 (Steele, Lea, Flood 2014): one add and two multiplications per number, any seed is a good one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rng {
    state: u64,
    /// A fuzzer's bytes, before the generator's own numbers.
    tape: Option<Tape>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Tape {
    bytes: Vec<u8>,
    at: usize,
}

impl Tape {
    fn byte(&mut self) -> u32 {
        let byte = self.bytes.get(self.at).copied().unwrap_or(0);
        self.at += 1;
        u32::from(byte)
    }

    fn is_over(&self) -> bool {
        self.at >= self.bytes.len()
    }
}

/// The purposes that have a stream of their own.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stream {
    /// What the generator makes.
    Workload,
    /// Who goes next.
    Schedule,
    /// What fails.
    Faults,
    /// What may fail at all.
    FaultPlan,
    /// When the power fails.
    PowerCut,
    /// Dirty bitmaps between the other steps.
    Bitmaps,
    /// Copy-before-write filters between them.
    Kept,
    /// Backups between them.
    Backups,
    /// What discards get through filters, and which backups discard what they have copied.
    DiscardsBesideBackups,
    /// Which filters opened by hand have one above that copies on read.
    CopyOnReadAboveFilters,
    /// Which backups are disturbed that work by a bitmap.
    UnrestBesideBackups,
    /// Which backups compress.
    CompressedBackups,
    /// Which targets of backups are flushed or closed before the power fails.
    DurableBackups,
    /// Which images get another length before the power fails.
    LengthsBeforePowerCut,
    /// Which names in headers are long.
    LongNames,
    /// Which backups copy through storage, and who looks at their targets meanwhile.
    CopyOffload,
    /// Backups of several images at one instant.
    OneInstant,
}

impl Rng {
    /// The stream for one purpose of one seed.
    #[must_use]
    pub fn stream(seed: u64, stream: Stream) -> Rng {
        let salt = match stream {
            Stream::Workload => 0x776f_726b_6c6f_6164,
            Stream::Schedule => 0x7363_6865_6475_6c65,
            Stream::Faults => 0x6661_756c_7473_0000,
            Stream::FaultPlan => 0x6661_756c_7470_6c61,
            Stream::PowerCut => 0x706f_7765_7200_0000,
            Stream::Bitmaps => 0x6269_746d_6170_7300,
            Stream::Kept => 0x6b65_7074_0000_0000,
            Stream::Backups => 0x6261_636b_7570_7300,
            Stream::DiscardsBesideBackups => 0x6469_7363_6172_6473,
            Stream::CopyOnReadAboveFilters => 0x636f_7261_626f_7665,
            Stream::UnrestBesideBackups => 0x756e_7265_7374_0000,
            Stream::CompressedBackups => 0x636f_6d70_7265_7373,
            Stream::DurableBackups => 0x6475_7261_626c_6500,
            Stream::LengthsBeforePowerCut => 0x6c65_6e67_7468_7300,
            Stream::LongNames => 0x6c6f_6e67_6e61_6d65,
            Stream::CopyOffload => 0x6f66_666c_6f61_6400,
            Stream::OneInstant => 0x696e_7374_616e_7400,
        };
        // Mixed before use: seeds that follow each other must not give shifted copies of one stream.
        let mut rng = Rng {
            state: seed ^ salt,
            tape: None,
        };
        let a = rng.next_u64();
        Rng {
            state: a ^ seed.rotate_left(32),
            tape: None,
        }
    }

    /// Numbers from a fuzzer's bytes, then those of `self`. Small ones take one byte, so that a changed byte changes
    /// one decision.
    #[must_use]
    pub fn after(self, bytes: &[u8]) -> Rng {
        Rng {
            state: self.state,
            tape: Some(Tape {
                bytes: bytes.to_vec(),
                at: 0,
            }),
        }
    }

    /// The next 64 bits.
    #[inline]
    pub fn next_u64(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`. The bias of the multiplication is below 2^-32 for every `n` used here.
    ///
    /// # Panics
    /// When `n` is 0.
    #[inline]
    pub fn below(&mut self, n: u32) -> u32 {
        assert!(n > 0, "nothing to choose from");
        if let Some(tape) = self.tape.as_mut().filter(|tape| !tape.is_over()) {
            let mut value = tape.byte();
            if n > 1 << 8 {
                value |= tape.byte() << 8;
            }
            if n > 1 << 16 {
                value |= tape.byte() << 16;
            }
            return value % n;
        }
        let wide = (self.next_u64() >> 32) * u64::from(n);
        u32::try_from(wide >> 32).expect("below n")
    }

    /// True `times` times in `of`.
    #[inline]
    pub fn chance(&mut self, times: u32, of: u32) -> bool {
        self.below(of) < times
    }

    /// One of `items`, all equally likely.
    ///
    /// # Panics
    /// When there is none.
    pub fn pick<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        let n = u32::try_from(items.len()).expect("few items");
        &items[self.below(n) as usize]
    }

    /// An index into `weights`, as likely as its weight; 0 when all are 0.
    pub fn weighted(&mut self, weights: &[u32]) -> usize {
        let total: u32 = weights.iter().sum();
        if total == 0 {
            return 0;
        }
        let mut at = self.below(total);
        for (i, &weight) in weights.iter().enumerate() {
            if at < weight {
                return i;
            }
            at -= weight;
        }
        unreachable!("below the total")
    }

    /// True once in `n` times.
    #[inline]
    pub fn one_in(&mut self, n: u32) -> bool {
        self.below(n) == 0
    }
}

/// Mixes 64 bits: a bijection without visible structure, for folding hashes.
#[inline]
#[must_use]
pub fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_never_change() {
        let mut rng = Rng { state: 0, tape: None };
        // The published first outputs of SplitMix64 for state 0.
        assert_eq!(rng.next_u64(), 0xe220_a839_7b1d_cdaf);
        assert_eq!(rng.next_u64(), 0x6e78_9e6a_a1b9_65f4);
        assert_eq!(rng.next_u64(), 0x06c4_5d18_8009_454f);
    }

    #[test]
    fn a_tape_comes_first() {
        let plain = Rng::stream(3, Stream::Workload);
        let mut taped = plain.clone().after(&[7, 1, 2]);
        assert_eq!((taped.below(5), taped.below(1000)), (2, 513));
        let (mut plain, mut rest) = (plain, [0; 8]);
        for slot in &mut rest {
            *slot = plain.below(1000);
        }
        assert_eq!(rest.map(|_| taped.below(1000)), rest, "the stream from its start");
    }

    #[test]
    fn streams_of_one_seed_differ_and_cover_their_range() {
        let draw = |s| {
            let mut rng = Rng::stream(7, s);
            std::iter::repeat_with(move || rng.below(6))
                .take(200)
                .collect::<Vec<_>>()
        };
        let (a, b, c) = (
            draw(Stream::Workload),
            draw(Stream::Schedule),
            draw(Stream::Faults),
        );
        assert!(a != b && b != c && a != c);
        for n in 0..6 {
            assert!(
                a.contains(&n) && b.contains(&n) && c.contains(&n),
                "{n} never drawn in 200"
            );
        }
    }
}
