//! The registers of a disk, one per sector of each grain: a request on a grain may be done by sectors.
//!
//! Rules: nothing that a layer does to a sector is seen by half, so a sector of a large grain has a history of its own; a grain of
//! at most a sector is one. Stamps tell grains apart, not their sectors: a sector holds the stamp of its grain.
//! Not covered: layers that write less than a sector at once, which none of the targets do.

use blkcheck_model::register::{Effect, OpId, Registers, Value, Violation};

use super::{SECTOR, index};

/// See the module. Grains are those of the scenario; a *part* is a sector of a grain, or all of a smaller one.
#[derive(Clone, Debug)]
pub(super) struct Sectors {
    parts: Registers,
    per_grain: usize,
    /// Length of a part, bytes.
    unit: u64,
}

/// Sectors in a grain of so many bytes.
pub(super) fn per_grain(grain: u64) -> usize {
    index(grain.div_ceil(SECTOR))
}

impl Sectors {
    /// A disk with grains that hold this.
    pub(super) fn new(grain: u64, initial: &[Value]) -> Sectors {
        let per_grain = per_grain(grain);
        let parts = initial
            .iter()
            .flat_map(|value| std::iter::repeat_n(*value, per_grain));
        Sectors {
            parts: Registers::new(parts),
            per_grain,
            unit: grain.min(SECTOR),
        }
    }

    fn parts(&self, grains: std::ops::Range<usize>) -> std::ops::Range<usize> {
        grains.start * self.per_grain..grains.end * self.per_grain
    }

    /// The parts of a grain.
    pub(super) fn of(&self, grain: usize) -> std::ops::Range<usize> {
        self.parts(grain..grain + 1)
    }

    /// A request begins on these grains.
    pub(super) fn begin(&mut self, effect: Effect, grains: std::ops::Range<usize>) -> OpId {
        self.parts.begin(effect, self.parts(grains))
    }

    /// A request that changes something ends.
    pub(super) fn end(&mut self, op: OpId, ok: bool) {
        self.parts.end(op, ok);
    }

    /// A read ends and has seen this, by parts. What nothing explains is told with its part.
    pub(super) fn observe(
        &mut self,
        op: OpId,
        values: impl ExactSizeIterator<Item = Option<Value>>,
        unexplained: impl FnMut(Violation),
    ) {
        self.parts.observe(op, values, unexplained);
    }

    /// The values that a part may hold now; empty if it was given up.
    pub(super) fn possible_in(&self, part: usize) -> Vec<Value> {
        self.parts.possible(part)
    }

    /// The values that some part of a grain may hold now; empty if one was given up.
    pub(super) fn possible(&self, grain: usize) -> Vec<Value> {
        let mut all = Vec::new();
        for part in self.of(grain) {
            let values = self.parts.possible(part);
            if values.is_empty() {
                return values;
            }
            all.extend(values);
        }
        all.sort_unstable();
        all.dedup();
        all
    }

    /// Something other than a request changes what all of a grain shows.
    pub(super) fn shift(&mut self, grain: usize, values: &[Value], only: bool) {
        for part in self.of(grain) {
            self.parts.shift(part, values, only);
        }
    }

    /// As [`Self::shift`], to what another disk of this length shows there.
    pub(super) fn shift_to(&mut self, grain: usize, (below, length): (&Sectors, u64), only: bool) {
        for part in self.of(grain) {
            if part as u64 * self.unit < length {
                self.parts.shift(part, &below.parts.possible(part), only);
            } else {
                self.parts.shift(part, &[0], only);
            }
        }
    }

    /// What a part holds at first, where its grain holds more than one thing.
    pub(super) fn start_with(&mut self, part: usize, value: Value) {
        self.parts.shift(part, &[value], true);
    }

    /// Cuts the disk off at a length, and makes it so many grains long; what is new holds zeroes.
    pub(super) fn resize(&mut self, length: u64, grains: usize) {
        self.parts
            .resize(index(length.div_ceil(self.unit)).min(grains * self.per_grain));
        self.parts.resize(grains * self.per_grain);
    }
}

#[cfg(test)]
#[path = "data_sectors_tests.rs"]
mod tests;
