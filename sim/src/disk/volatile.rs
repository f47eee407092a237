//! What a file holds after a power cut.
//!
//! Rules: what was carried out before a flush was asked for is durable once that flush has ended well, and so is a write that
//! forces its way (FUA) once it has. Everything else may survive as a whole, not at all, or with only the first or the last
//! half of its sectors, each change for itself; changes that survive are in their order. A request that was under way may
//! have come as far as any other. Choice 0 is always what happens if the power stays: what was carried out is there, what
//! was not is not.
//! Not covered: sectors that hold neither the old nor the new bytes; more than two pieces of one change.

use std::collections::VecDeque;

use super::SECTOR;

/// A change of a file. Bytes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Change {
    /// These bytes.
    Write { offset: u64, data: Box<[u8]> },
    /// Zeroes; past the end only if they make the file longer.
    Zero { offset: u64, bytes: u64, grow: bool },
    /// Another length.
    Length(u64),
}

/// How much of a change survives.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Part {
    All,
    Nothing,
    First,
    Last,
}

/// A file that is followed.
#[derive(Clone, Debug)]
pub(crate) struct Volatile {
    durable: Vec<u8>,
    /// The oldest first; those that force their way are sure.
    changes: VecDeque<(Change, bool)>,
    /// How many changes have become durable.
    settled: u64,
}

/// What a power cut left of one file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Remains {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Changes that were not durable, those under way included.
    pub volatile: u32,
    /// How many of them are there, as a whole.
    pub kept: u32,
    /// Sectors of those changes that are there, and that are not.
    pub sectors: [u64; 2],
}

impl Volatile {
    /// A file that holds this for good.
    pub(crate) fn new(durable: &[u8]) -> Volatile {
        Volatile {
            durable: durable.to_vec(),
            changes: VecDeque::new(),
            settled: 0,
        }
    }

    /// A change was carried out. `forced`: it is durable now, whatever becomes of those before.
    pub(crate) fn changed(&mut self, change: Change, forced: bool) {
        self.changes.push_back((change, forced));
    }

    /// How many changes there were; asked when a flush comes.
    pub(crate) fn so_far(&self) -> u64 {
        self.settled + self.changes.len() as u64
    }

    /// A flush ended well that came when there were so many changes.
    pub(crate) fn flushed(&mut self, so_far: u64) {
        while self.settled < so_far {
            let (change, _) = self.changes.pop_front().expect("they were counted");
            change.apply(&mut self.durable, Part::All);
            self.settled += 1;
        }
    }

    /// The power fails while these requests are `under_way`. `choose` picks one of so many.
    pub(crate) fn power_cut(
        &self,
        under_way: impl Iterator<Item = Change>,
        choose: &mut dyn FnMut(u32) -> u32,
    ) -> Remains {
        let mut remains = Remains {
            bytes: self.durable.clone(),
            volatile: 0,
            kept: 0,
            sectors: [0; 2],
        };
        let mut one = |change: &Change, order: [Part; 4]| {
            let part = order[choose(if change.is_long() { 4 } else { 2 }) as usize];
            change.apply(&mut remains.bytes, part);
            remains.volatile += 1;
            remains.kept += u32::from(part == Part::All);
            let (all, there) = (sectors(change.range()), sectors(change.part(part)));
            remains.sectors[0] += there;
            remains.sectors[1] += all - there;
        };
        for (change, forced) in &self.changes {
            if *forced {
                one(change, [Part::All; 4]);
            } else {
                one(change, [Part::All, Part::Nothing, Part::First, Part::Last]);
            }
        }
        for change in under_way {
            one(&change, [Part::Nothing, Part::All, Part::First, Part::Last]);
        }
        remains
    }
}

impl Change {
    fn range(&self) -> (u64, u64) {
        match self {
            Change::Write { offset, data } => (*offset, offset + data.len() as u64),
            Change::Zero { offset, bytes, .. } => (*offset, offset + bytes),
            Change::Length(_) => (0, 0),
        }
    }

    /// It touches several sectors.
    fn is_long(&self) -> bool {
        let (start, end) = self.range();
        end > start && start / SECTOR < (end - 1) / SECTOR
    }

    /// The range that a part of it changes.
    fn part(&self, part: Part) -> (u64, u64) {
        let (start, end) = self.range();
        let middle = (start.midpoint(end) / SECTOR * SECTOR).clamp(start, end);
        match part {
            Part::All => (start, end),
            Part::Nothing => (start, start),
            Part::First => (start, middle),
            Part::Last => (middle, end),
        }
    }

    fn apply(&self, bytes: &mut Vec<u8>, part: Part) {
        if part == Part::Nothing {
            return;
        }
        let (start, _) = self.range();
        let (from, to) = self.part(part);
        let (from, mut to) = (size(from), size(to));
        let grows = match self {
            Change::Length(length) => return bytes.resize(size(*length), 0),
            Change::Zero { grow, .. } => *grow,
            Change::Write { .. } => true,
        };
        if to > bytes.len() && from < to {
            if grows {
                bytes.resize(to, 0);
            } else {
                to = bytes.len();
            }
        }
        if from >= to {
            return;
        }
        match self {
            Change::Write { data, .. } => {
                let start = size(start);
                bytes[from..to].copy_from_slice(&data[from - start..to - start]);
            }
            _ => bytes[from..to].fill(0),
        }
    }
}

/// Sectors that a range touches.
fn sectors((start, end): (u64, u64)) -> u64 {
    if start < end {
        end.div_ceil(SECTOR) - start / SECTOR
    } else {
        0
    }
}

fn size(v: u64) -> usize {
    usize::try_from(v).expect("files fit into memory")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(offset: u64, byte: u8, bytes: usize) -> Change {
        Change::Write {
            offset,
            data: vec![byte; bytes].into(),
        }
    }

    fn cut(file: &Volatile, choices: &[u32]) -> Remains {
        let mut choices = choices.iter().copied();
        let remains = file.power_cut(std::iter::empty(), &mut |n| {
            let choice = choices.next().expect("one choice for each change");
            assert!(choice < n, "{choice} of {n}");
            choice
        });
        assert_eq!(choices.next(), None);
        remains
    }

    #[test]
    fn what_a_flush_found_is_durable_and_nothing_else() {
        let mut file = Volatile::new(&[0; 1024]);
        file.changed(write(0, 1, 512), false);
        let flush = file.so_far();
        file.changed(write(512, 2, 512), false);
        assert_eq!(cut(&file, &[1, 1]).bytes, [0; 1024], "it has not ended");
        file.flushed(flush);
        let lost = cut(&file, &[1]);
        assert_eq!(lost.bytes, [[1; 512], [0; 512]].concat());
        assert_eq!((lost.volatile, lost.kept, lost.sectors), (1, 0, [0, 1]));
        assert_eq!(cut(&file, &[0]).bytes, [[1; 512], [2; 512]].concat());
        file.flushed(flush);
        assert_eq!(
            file.so_far(),
            2,
            "an old flush that ends late settles nothing more"
        );
    }

    #[test]
    fn pieces_survive_by_sectors_and_what_is_forced_as_a_whole() {
        let mut file = Volatile::new(&[0; 1024]);
        file.changed(write(0, 1, 1024), false);
        assert_eq!(cut(&file, &[2]).bytes, [[1; 512], [0; 512]].concat());
        assert_eq!(cut(&file, &[3]).bytes, [[0; 512], [1; 512]].concat());
        file.changed(write(512, 2, 512), true);
        assert_eq!(cut(&file, &[1, 1]).bytes, [[0; 512], [2; 512]].concat());
        file.changed(write(512, 3, 512), false);
        let all = cut(&file, &[0, 0, 0]);
        assert_eq!(all.bytes, [[1; 512], [3; 512]].concat());
        assert_eq!(all.sectors, [4, 0]);
        assert_eq!(cut(&file, &[3, 0, 1]).sectors, [2, 2]);
    }

    #[test]
    fn lengths_and_zeroes() {
        let mut file = Volatile::new(&[7; 512]);
        let zero = |grow| Change::Zero {
            offset: 0,
            bytes: 1024,
            grow,
        };
        file.changed(zero(false), false);
        file.changed(Change::Length(2048), false);
        assert_eq!(cut(&file, &[0, 1]).bytes, [0; 512]);
        assert_eq!(cut(&file, &[1, 0]).bytes.len(), 2048);
        let mut file = Volatile::new(&[7; 512]);
        file.changed(zero(true), false);
        assert_eq!(cut(&file, &[0]).bytes, [0; 1024]);
        assert_eq!(cut(&file, &[2]).bytes, [0; 512], "the first half");
    }

    #[test]
    fn what_is_under_way_is_lost_by_default() {
        let file = Volatile::new(&[0; 512]);
        let under_way = |choice| {
            file.power_cut(std::iter::once(write(0, 1, 512)), &mut |_| choice)
                .bytes
        };
        assert_eq!(under_way(0), [0; 512]);
        assert_eq!(under_way(1), [1; 512]);
    }
}
