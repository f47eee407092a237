//! A stream as conditions: what each step may do, and what must hold when it has ended.
//!
//! Rules: only the top is written, and only by allocating clusters with the content that they show; nothing a guest
//! reads changes, at no time. After success the layers between top and base are not needed: top over base shows what
//! the whole chain showed.
//! Differs from QEMU 10.0: what lies past the end of a dropped layer reads as zeroes afterwards too, although the new
//! base may hold data there.

use std::ops::Range;

use crate::layer::{Cell, CopyRange, Decided, Layer, copy_range, decided, read_through};

/// A chain that is streamed into its first layer.
#[derive(Clone, Debug)]
pub struct Streamed<'a> {
    /// Top first.
    pub chain: &'a [Layer],
    /// Index of the last layer that is streamed; 0 = nothing to do.
    pub bottom: usize,
}

/// What the loop has to do with a run of grains.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// Copy it into the top.
    Copy,
    /// Go on; the top must not change here.
    Skip,
    /// Either: only the end of a short layer decides.
    Either,
}

impl Streamed<'_> {
    /// What to do with one grain.
    #[must_use]
    pub fn step(&self, grain: usize) -> Step {
        match decided(self.chain, self.bottom, grain) {
            Decided::InRange => Step::Copy,
            Decided::CutOff => Step::Either,
            Decided::Top | Decided::Below => Step::Skip,
        }
    }

    /// A copied chunk was allowed: it held something to copy, and was not wholly in the top already.
    ///
    /// # Errors
    /// What was wrong with it.
    pub fn check_copied(&self, grains: Range<usize>) -> Result<(), String> {
        match grains.clone().find(|grain| self.step(*grain) == Step::Skip) {
            Some(grain) => Err(format!(
                "chunk {grains:?} was copied, but at grain {grain} there is nothing to copy"
            )),
            None => Ok(()),
        }
    }

    /// A skipped chunk was allowed.
    ///
    /// # Errors
    /// The grain that ought to have been copied.
    pub fn check_skipped(&self, grains: Range<usize>) -> Result<(), String> {
        match grains.clone().find(|grain| self.step(*grain) == Step::Copy) {
            Some(grain) => Err(format!(
                "chunk {grains:?} was skipped, but grain {grain} has to be copied"
            )),
            None => Ok(()),
        }
    }

    /// At any time: the top shows what it showed, every new cluster had a reason, none went away. Only for chains
    /// without guest writes since `self.chain` was recorded.
    ///
    /// # Errors
    /// The first grain that is wrong.
    pub fn check_progress(&self, top_now: &Layer) -> Result<(), String> {
        let mut now = self.chain.to_vec();
        now[0] = top_now.clone();
        for grain in 0..top_now.len() {
            if read_through(&now, grain) != read_through(self.chain, grain) {
                return Err(format!("grain {grain} changed for the guest"));
            }
            let (before, after) = (self.chain[0].cells[grain], top_now.cells[grain]);
            if before != Cell::Unallocated && after == Cell::Unallocated {
                return Err(format!("grain {grain} is no longer allocated in the top"));
            }
            let copied = before == Cell::Unallocated && after != Cell::Unallocated;
            if copied && copy_range(self.chain, self.bottom, grain) == CopyRange::Nothing {
                return Err(format!(
                    "grain {grain} was copied although no streamed layer holds its cluster"
                ));
            }
        }
        Ok(())
    }

    /// After success, with the base directly below the top.
    ///
    /// # Errors
    /// The first grain that is wrong.
    pub fn check_success(&self, top_now: &Layer) -> Result<(), String> {
        self.check_progress(top_now)?;
        let mut now = vec![top_now.clone()];
        now.extend_from_slice(&self.chain[self.bottom + 1..]);
        for grain in 0..top_now.len() {
            if read_through(&now, grain) != read_through(self.chain, grain) {
                return Err(format!(
                    "grain {grain} shows something else now that the streamed layers are gone"
                ));
            }
            if self.step(grain) == Step::Copy && !top_now.is_allocated(grain) {
                return Err(format!("grain {grain} was never copied"));
            }
        }
        Ok(())
    }

    /// The top after a complete, minimal stream.
    #[must_use]
    pub fn result(&self) -> Layer {
        let mut chain = self.chain.to_vec();
        for grain in 0..chain[0].len() {
            if matches!(
                copy_range(self.chain, self.bottom, grain),
                CopyRange::Wanted | CopyRange::CutOff
            ) && chain[0].cells[grain] == Cell::Unallocated
            {
                chain[0].cells[grain] = Cell::Stamp(read_through(self.chain, grain));
            }
        }
        chain.swap_remove(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::Format;
    use Cell::{Stamp, Unallocated};

    fn layer(cells: &[Cell]) -> Layer {
        Layer {
            format: Format::Qcow2(3),
            cluster: 1,
            cells: cells.to_vec(),
        }
    }

    /// base (long, data) ← mid (short) ← top (long): what lies past mid's end must stay zeroes.
    #[test]
    fn past_the_end_of_a_dropped_layer_stay_zeroes() {
        let chain = [
            layer(&[Unallocated; 3]),
            layer(&[Stamp(5), Unallocated]),
            layer(&[Stamp(1), Stamp(2), Stamp(3)]),
        ];
        let stream = Streamed {
            chain: &chain,
            bottom: 1,
        };
        let top = stream.result();
        assert_eq!(top.cells, [Stamp(5), Unallocated, Stamp(0)]);
        stream.check_success(&top).unwrap();
        let mut as_qemu_leaves_it = top.clone();
        as_qemu_leaves_it.cells[2] = Unallocated;
        stream.check_progress(&as_qemu_leaves_it).unwrap();
        assert!(
            stream
                .check_success(&as_qemu_leaves_it)
                .unwrap_err()
                .contains("grain 2")
        );
    }

    #[test]
    fn copying_what_lies_only_below_bottom_is_seen() {
        let chain = [
            layer(&[Unallocated; 2]),
            layer(&[Stamp(5), Unallocated]),
            layer(&[Stamp(1), Stamp(2)]),
        ];
        let stream = Streamed {
            chain: &chain,
            bottom: 1,
        };
        assert!(stream.check_progress(&layer(&[Unallocated, Stamp(2)])).is_err());
        stream.check_progress(&layer(&[Stamp(5), Unallocated])).unwrap();
        assert!(stream.check_copied(0..2).is_err());
        assert!(stream.check_skipped(0..1).is_err());
        stream.check_skipped(1..2).unwrap();
    }
}
