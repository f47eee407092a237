//! The registers of a disk, one per sector of each grain: a request on a grain may be done by sectors.
//!
//! Rules: nothing that a layer does to a sector is seen by half, so a sector of a large grain has a history of its own; a grain of
//! at most a sector is one. Stamps tell grains apart, not their sectors: a sector holds the stamp of its grain.
//! As long as nobody has seen the sectors of a grain differ they have one history, and one register does for all of them.
//! Not covered: layers that write less than a sector at once, which none of the targets do.

use std::collections::BTreeMap;
use std::ops::Range;

use blkcheck_model::register::{Effect, OpId, Registers, Value, Violation};

use super::{SECTOR, index};

/// See the module. Grains are those of the scenario; a *part* is a sector of a grain, or all of a smaller one.
#[derive(Clone, Debug)]
pub(super) struct Sectors {
    /// One per grain; of no meaning where it was split.
    whole: Registers,
    /// The parts of grains that were seen to differ.
    split: BTreeMap<usize, Registers>,
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
        Sectors {
            whole: Registers::new(initial.iter().copied()),
            split: BTreeMap::new(),
            per_grain: per_grain(grain),
            unit: grain.min(SECTOR),
        }
    }

    /// The parts of a grain.
    pub(super) fn of(&self, grain: usize) -> Range<usize> {
        grain * self.per_grain..(grain + 1) * self.per_grain
    }

    /// The parts of a grain, from now on each for itself.
    fn parts(&mut self, grain: usize) -> &mut Registers {
        let Sectors {
            whole,
            split,
            per_grain,
            ..
        } = self;
        split
            .entry(grain)
            .or_insert_with(|| whole.split(grain, *per_grain))
    }

    /// A request begins on these grains.
    pub(super) fn begin(&mut self, effect: Effect, grains: Range<usize>) -> OpId {
        let op = self.whole.begin(effect, grains.clone());
        for parts in self.split.range_mut(grains).map(|(_, parts)| parts) {
            parts.begin_as(op, effect);
        }
        op
    }

    /// A request that changes something ends.
    pub(super) fn end(&mut self, op: OpId, ok: bool) {
        self.whole.end(op, ok);
        for parts in self.split.values_mut() {
            if parts.grains_of(op).is_some() {
                parts.end(op, ok);
            }
        }
    }

    /// A read ends and has seen this, by parts. What nothing explains is told with its part.
    pub(super) fn observe(
        &mut self,
        op: OpId,
        values: &[Option<Value>],
        mut unexplained: impl FnMut(Violation),
    ) {
        let (per_grain, grains) = (
            self.per_grain,
            self.whole.grains_of(op).expect("the read is open"),
        );
        let mut seen = Vec::with_capacity(grains.len());
        for (grain, values) in grains.zip(values.chunks(per_grain)) {
            if values.iter().any(|value| *value != values[0]) {
                self.parts(grain);
            }
            seen.push(values[0].filter(|_| !self.split.contains_key(&grain)));
            let Some(parts) = self.split.get_mut(&grain).filter(|s| s.grains_of(op).is_some()) else {
                continue;
            };
            parts.observe(op, values.iter().copied(), |mut v| {
                v.grain += grain * per_grain;
                unexplained(v);
            });
        }
        self.whole.observe(op, seen.into_iter(), |mut v| {
            v.grain *= per_grain;
            unexplained(v);
        });
    }

    /// The values that a part may hold now; empty if it was given up.
    pub(super) fn possible_in(&self, part: usize) -> Vec<Value> {
        let (grain, at) = (part / self.per_grain, part % self.per_grain);
        match self.split.get(&grain) {
            Some(parts) => parts.possible(at),
            None => self.whole.possible(grain),
        }
    }

    /// The values that some part of a grain may hold now; empty if one was given up.
    pub(super) fn possible(&self, grain: usize) -> Vec<Value> {
        if !self.split.contains_key(&grain) {
            return self.whole.possible(grain);
        }
        let mut all = Vec::new();
        for part in self.of(grain) {
            let values = self.possible_in(part);
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
        match self.split.get_mut(&grain) {
            Some(parts) => (0..self.per_grain).for_each(|part| parts.shift(part, values, only)),
            None => self.whole.shift(grain, values, only),
        }
    }

    /// As [`Self::shift`], to what another disk of this length shows there.
    pub(super) fn shift_to(&mut self, grain: usize, (below, length): (&Sectors, u64), only: bool) {
        let ends = length.div_ceil(self.unit) < self.of(grain).end as u64;
        if !ends && !below.split.contains_key(&grain) {
            return self.shift(grain, &below.whole.possible(grain), only);
        }
        for (at, part) in self.of(grain).enumerate() {
            let values = if part as u64 * self.unit < length {
                below.possible_in(part)
            } else {
                vec![0]
            };
            self.parts(grain).shift(at, &values, only);
        }
    }

    /// What a part holds at first, where its grain holds more than one thing.
    pub(super) fn start_with(&mut self, part: usize, value: Value) {
        if self.possible_in(part) != [value] {
            let at = part % self.per_grain;
            self.parts(part / self.per_grain).shift(at, &[value], true);
        }
    }

    /// Cuts the disk off at a length, and makes it so many grains long; what is new holds zeroes.
    pub(super) fn resize(&mut self, length: u64, grains: usize) {
        let kept = index(length.div_ceil(self.unit));
        let (full, rest) = (kept / self.per_grain, kept % self.per_grain);
        let whole = (full + usize::from(rest > 0)).min(grains);
        if rest > 0 && whole > full {
            let per_grain = self.per_grain;
            let parts = self.parts(full);
            parts.resize(rest);
            parts.resize(per_grain);
        }
        self.split.split_off(&whole);
        self.whole.resize(whole);
        self.whole.resize(grains);
    }
}

#[cfg(test)]
#[path = "data_sectors_tests.rs"]
mod tests;
