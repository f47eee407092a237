//! What image layers hold, and what a read through a chain of them sees.
//!
//! Rules: content is kept per *grain* (a power of two of bytes that every cluster size and length is a multiple of).
//! A qcow2 cluster is allocated as a whole or not at all; a raw layer holds everything. A layer that is shorter than
//! what is asked ends the descent: past its end are zeroes, deeper layers never show through.
//! A chain is a slice of layers, the top first.

use std::ops::Range;

use crate::register::Value;

/// One grain of a layer.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Cell {
    /// The layer below decides.
    Unallocated,
    /// Reads as zeroes, without stored bytes.
    Zero,
    /// Stored bytes: 0 = zeroes, else a stamp.
    Stamp(Value),
}

impl Cell {
    /// What a reader sees, unless the layer below decides.
    #[must_use]
    pub fn value(self) -> Option<Value> {
        match self {
            Cell::Unallocated => None,
            Cell::Zero => Some(0),
            Cell::Stamp(value) => Some(value),
        }
    }
}

/// What kind of image a layer is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Format {
    /// The plain bytes.
    Raw,
    /// qcow2 of this version (2 or 3).
    Qcow2(u8),
}

/// One image.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Layer {
    /// Its format.
    pub format: Format,
    /// Grains per cluster (1 for raw).
    pub cluster: usize,
    /// One cell per grain; as many as the image is long.
    pub cells: Vec<Cell>,
}

impl Layer {
    /// An image without content: unallocated, or zeroes for raw.
    ///
    /// # Panics
    /// When `cluster` is no power of two, or a raw layer has clusters.
    #[must_use]
    pub fn new(format: Format, cluster: usize, grains: usize) -> Layer {
        assert!(cluster.is_power_of_two() && (format != Format::Raw || cluster == 1));
        let empty = if format == Format::Raw {
            Cell::Zero
        } else {
            Cell::Unallocated
        };
        Layer {
            format,
            cluster,
            cells: vec![empty; grains],
        }
    }

    /// Length, grains.
    #[must_use]
    pub fn len(&self) -> usize {
        self.cells.len()
    }

    /// Has no grains at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.cells.is_empty()
    }

    /// The grains of the cluster that this grain is in, as far as the image reaches.
    #[must_use]
    pub fn cluster_of(&self, grain: usize) -> Range<usize> {
        let start = grain / self.cluster * self.cluster;
        start..(start + self.cluster).min(self.len())
    }

    /// Content of this grain is decided here.
    #[must_use]
    pub fn is_allocated(&self, grain: usize) -> bool {
        self.cells
            .get(grain)
            .is_some_and(|cell| *cell != Cell::Unallocated)
    }

    /// Every cluster is allocated as a whole or not at all.
    #[must_use]
    pub fn is_well_formed(&self) -> bool {
        (0..self.len()).step_by(self.cluster).all(|grain| {
            let cells = &self.cells[self.cluster_of(grain)];
            cells
                .iter()
                .all(|cell| (*cell == Cell::Unallocated) == (cells[0] == Cell::Unallocated))
        })
    }
}

/// What a read of this grain through the chain sees.
#[must_use]
pub fn read_through(chain: &[Layer], grain: usize) -> Value {
    for layer in chain {
        match layer.cells.get(grain) {
            None => return 0,
            Some(Cell::Unallocated) => {}
            Some(cell) => return cell.value().expect("allocated"),
        }
    }
    0
}

/// Everything that a read of the whole top sees.
#[must_use]
pub fn view(chain: &[Layer]) -> Vec<Value> {
    chain.first().map_or_else(Vec::new, |top| {
        (0..top.len()).map(|grain| read_through(chain, grain)).collect()
    })
}

/// A guest writes these grains of the top: their clusters become allocated, what was not written keeps its content.
pub fn guest_write(chain: &mut [Layer], grains: Range<usize>, value: Value) {
    populate(chain, grains.clone());
    chain[0].cells[grains].fill(Cell::Stamp(value));
}

/// The clusters of these grains become allocated in the top and keep what they show: copy-on-read, or a write's
/// copy-on-write.
pub fn populate(chain: &mut [Layer], grains: Range<usize>) {
    if grains.is_empty() {
        return;
    }
    let top = &chain[0];
    let around = top.cluster_of(grains.start).start..top.cluster_of(grains.end - 1).end;
    for grain in around {
        if chain[0].cells[grain] == Cell::Unallocated {
            chain[0].cells[grain] = Cell::Stamp(read_through(chain, grain));
        }
    }
}

/// What a request that stores no bytes may leave in a grain, as the guest sees it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Allowed {
    /// The old content.
    pub old: bool,
    /// Zeroes.
    pub zero: bool,
}

/// After write-zeroes the grain reads as zeroes, whatever the format and the flags.
pub const AFTER_WRITE_ZEROES: Allowed = Allowed {
    old: false,
    zero: true,
};

/// What a successful discard of `grains` may leave in this grain of the top.
///
/// `unmap` says that the node passes discards on (`discard=unmap`).
#[must_use]
pub fn after_discard(chain: &[Layer], grain: usize, grains: &Range<usize>, unmap: bool) -> Allowed {
    let top = &chain[0];
    let cluster = top.cluster_of(grain);
    let whole = grains.start <= cluster.start && cluster.end <= grains.end;
    let has_backing = chain.len() > 1;
    let old = Allowed {
        old: true,
        zero: false,
    };
    let zero = Allowed {
        old: false,
        zero: true,
    };
    match top.format {
        _ if !unmap => old,
        // The host may or may not punch a hole, as its blocks happen to lie.
        Format::Raw => Allowed {
            old: true,
            zero: true,
        },
        _ if !whole => old,
        Format::Qcow2(2) if has_backing => old,
        Format::Qcow2(_) if has_backing || top.is_allocated(grain) => zero,
        // Never written, nothing below: zeroes as before.
        Format::Qcow2(_) => zero,
    }
}

/// Whether a cluster of the top has to be allocated.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Expect {
    /// It has to be.
    Must,
    /// It must not be.
    MustNot,
    /// Either way.
    May,
}

/// Whether something happened.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Happened {
    /// No, certainly.
    No,
    /// In flight, or failed.
    Maybe,
    /// Yes, completed.
    Yes,
}

/// Who decides the content of a grain, seen from the top, when the layers up to `bottom` are streamed or copied on
/// read.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Decided {
    /// The top itself.
    Top,
    /// A layer below the top, down to and including bottom.
    InRange,
    /// The end of a short layer between top and bottom: zeroes.
    CutOff,
    /// Something below bottom, or nothing.
    Below,
}

/// Who decides this grain; `bottom` is an index into the chain.
#[must_use]
pub fn decided(chain: &[Layer], bottom: usize, grain: usize) -> Decided {
    for (depth, layer) in chain[..=bottom].iter().enumerate() {
        match layer.cells.get(grain) {
            None => return Decided::CutOff,
            Some(Cell::Unallocated) => {}
            Some(_) if depth == 0 => return Decided::Top,
            Some(_) => return Decided::InRange,
        }
    }
    Decided::Below
}

/// What is known of one cluster of the top.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ClusterHistory {
    /// It was allocated at the start.
    pub initially: bool,
    /// A guest wrote into it (data or zeroes).
    pub written: Happened,
    /// A guest discarded something of it, so it may have been given back.
    pub discarded: Happened,
    /// A stream's loop went over it ([`Happened::Maybe`]: is just there, or skipped an error there).
    pub streamed: Happened,
    /// A guest read it through a copy-on-read filter.
    pub read: Happened,
    /// What a copy would find there, from [`copy_range`].
    pub range: CopyRange,
}

/// What copying a cluster into the top is good for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum CopyRange {
    /// Some of it is held by a layer that is to be copied from.
    Wanted,
    /// Only the end of a short layer decides, and the content below would differ once that layer is gone.
    CutOff,
    /// Nothing to copy; it must stay as it is.
    Nothing,
    /// Nothing to copy, and no harm if it is (only the end of a short layer decides).
    Indifferent,
}

/// What there is to copy in the cluster of this grain, with these layers above and including `bottom`.
#[must_use]
pub fn copy_range(chain: &[Layer], bottom: usize, grain: usize) -> CopyRange {
    let base_len = chain.get(bottom + 1).map_or(0, Layer::len);
    let mut range = CopyRange::Nothing;
    for grain in chain[0].cluster_of(grain) {
        range = match decided(chain, bottom, grain) {
            Decided::InRange => return CopyRange::Wanted,
            Decided::CutOff if grain < base_len => CopyRange::CutOff,
            Decided::CutOff if range == CopyRange::Nothing => CopyRange::Indifferent,
            _ => range,
        };
    }
    range
}

impl ClusterHistory {
    /// Whether the cluster has to be allocated now; `finished` if a stream over it has succeeded.
    #[must_use]
    pub fn expect(self, finished: bool) -> Expect {
        if self.discarded != Happened::No {
            return Expect::May;
        }
        if self.initially || self.written == Happened::Yes {
            return Expect::Must;
        }
        let copied = self.streamed.max(self.read);
        match self.range {
            CopyRange::Wanted if finished || copied == Happened::Yes => Expect::Must,
            CopyRange::CutOff if finished => Expect::Must,
            CopyRange::Nothing if self.written == Happened::No => Expect::MustNot,
            _ if copied == Happened::No && self.written == Happened::No && !finished => Expect::MustNot,
            _ => Expect::May,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Cell::{Stamp, Unallocated, Zero};

    fn qcow2(cluster: usize, cells: &[Cell]) -> Layer {
        Layer {
            format: Format::Qcow2(3),
            cluster,
            cells: cells.to_vec(),
        }
    }

    #[test]
    fn a_short_layer_hides_what_is_below() {
        let chain = [
            qcow2(1, &[Unallocated; 4]),
            qcow2(1, &[Unallocated, Zero]),
            qcow2(1, &[Stamp(1), Stamp(2), Stamp(3), Stamp(4)]),
        ];
        assert_eq!(view(&chain), [1, 0, 0, 0]);
        assert_eq!(decided(&chain, 1, 0), Decided::Below);
        assert_eq!(decided(&chain, 1, 1), Decided::InRange);
        assert_eq!(decided(&chain, 1, 2), Decided::CutOff);
        assert_eq!(
            copy_range(&chain, 1, 2),
            CopyRange::CutOff,
            "the base would show through"
        );
    }

    #[test]
    fn a_write_takes_the_rest_of_its_clusters_along() {
        let mut chain = [
            qcow2(2, &[Unallocated; 5]),
            qcow2(1, &[Stamp(1), Stamp(2), Stamp(3), Stamp(4), Stamp(5)]),
        ];
        guest_write(&mut chain, 1..3, 9);
        assert_eq!(
            chain[0].cells,
            [Stamp(1), Stamp(9), Stamp(9), Stamp(4), Unallocated]
        );
        assert!(chain[0].is_well_formed());
        guest_write(&mut chain, 4..5, 8);
        assert_eq!(
            view(&chain),
            [1, 9, 9, 4, 8],
            "the last cluster ends with the image"
        );
    }

    #[test]
    fn discards() {
        let allowed = |format, unmap, grains: Range<usize>| {
            let chain = [
                Layer {
                    format,
                    ..qcow2(2, &[Stamp(1); 4])
                },
                qcow2(1, &[Stamp(2); 4]),
            ];
            after_discard(&chain, 0, &grains, unmap)
        };
        let (old, zero) = (
            Allowed {
                old: true,
                zero: false,
            },
            Allowed {
                old: false,
                zero: true,
            },
        );
        assert_eq!(allowed(Format::Qcow2(3), true, 0..2), zero);
        assert_eq!(allowed(Format::Qcow2(3), false, 0..2), old);
        assert_eq!(allowed(Format::Qcow2(3), true, 0..1), old, "not a whole cluster");
        assert_eq!(
            allowed(Format::Qcow2(2), true, 0..2),
            old,
            "version 2 has no zero clusters"
        );
    }

    #[test]
    fn allocation_that_is_expected() {
        let nothing = ClusterHistory {
            initially: false,
            written: Happened::No,
            discarded: Happened::No,
            streamed: Happened::No,
            read: Happened::No,
            range: CopyRange::Wanted,
        };
        assert_eq!(nothing.expect(false), Expect::MustNot);
        assert_eq!(
            ClusterHistory {
                written: Happened::Maybe,
                ..nothing
            }
            .expect(false),
            Expect::May
        );
        assert_eq!(
            ClusterHistory {
                streamed: Happened::Maybe,
                ..nothing
            }
            .expect(false),
            Expect::May
        );
        assert_eq!(
            ClusterHistory {
                streamed: Happened::Yes,
                ..nothing
            }
            .expect(false),
            Expect::Must
        );
        assert_eq!(
            ClusterHistory {
                read: Happened::Yes,
                ..nothing
            }
            .expect(false),
            Expect::Must
        );
        let below_bottom = ClusterHistory {
            range: CopyRange::Nothing,
            read: Happened::Yes,
            ..nothing
        };
        assert_eq!(
            below_bottom.expect(true),
            Expect::MustNot,
            "only below bottom: never copied"
        );
        let cut_off = ClusterHistory {
            range: CopyRange::CutOff,
            ..nothing
        };
        assert_eq!(cut_off.expect(true), Expect::Must);
    }
}
