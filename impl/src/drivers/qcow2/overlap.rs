//! Where the image's own metadata lies, so that data is never written over it.
//!
//! Rules: ranges are whole clusters and disjoint; an insertion that collides is a corruption of the image.
//! Known: header, active L1 and L2 tables, refcount table and blocks, snapshot table, L1 tables of snapshots,
//! bitmap directory and tables.
//! Not known: L2 tables of snapshots (their refcounts protect them).

use std::collections::BTreeMap;

/// What kind of metadata.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Structure {
    Header,
    ActiveL1,
    ActiveL2,
    Refblock,
    Reftable,
    SnapshotTable,
    InactiveL1,
    BitmapDirectory,
    BitmapTable,
}

impl Structure {
    /// As messages call it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Structure::Header => "qcow2_header",
            Structure::ActiveL1 => "active L1 table",
            Structure::ActiveL2 => "active L2 table",
            Structure::Refblock => "refcount block",
            Structure::Reftable => "refcount table",
            Structure::SnapshotTable => "snapshot table",
            Structure::InactiveL1 => "inactive L1 table",
            Structure::BitmapDirectory => "bitmap directory",
            Structure::BitmapTable => "bitmap table",
        }
    }
}

/// Disjoint ranges of clusters with their kinds.
#[derive(Debug, Default)]
pub(super) struct Overlap {
    /// First cluster -> (end, kind).
    ranges: BTreeMap<u64, (u64, Structure)>,
}

impl Overlap {
    /// What `count` clusters from `first` on collide with.
    pub(super) fn hit(&self, first: u64, count: u64) -> Option<Structure> {
        let end = first.saturating_add(count);
        let (_, &(last_end, kind)) = self.ranges.range(..end).next_back()?;
        (last_end > first).then_some(kind)
    }

    /// Adds a range; `Err` names what it collides with, nothing is added then.
    pub(super) fn insert(&mut self, first: u64, count: u64, kind: Structure) -> Result<(), Structure> {
        if count == 0 {
            return Ok(());
        }
        if let Some(other) = self.hit(first, count) {
            return Err(other);
        }
        self.ranges.insert(first, (first.saturating_add(count), kind));
        Ok(())
    }

    /// Forgets the range that starts at `first`, if it is of this kind.
    pub(super) fn remove(&mut self, first: u64, kind: Structure) {
        if self.ranges.get(&first).is_some_and(|r| r.1 == kind) {
            self.ranges.remove(&first);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn collisions_are_found_at_every_edge() {
        let mut map = Overlap::default();
        map.insert(10, 5, Structure::ActiveL1).unwrap();
        map.insert(15, 1, Structure::Refblock).unwrap();
        assert_eq!(map.hit(9, 1), None);
        assert_eq!(map.hit(9, 2), Some(Structure::ActiveL1));
        assert_eq!(map.hit(14, 1), Some(Structure::ActiveL1));
        assert_eq!(map.hit(0, 100), Some(Structure::Refblock));
        assert_eq!(map.hit(16, u64::MAX), None);
        assert_eq!(map.insert(12, 1, Structure::ActiveL2), Err(Structure::ActiveL1));
        map.remove(10, Structure::Refblock);
        assert_eq!(
            map.hit(10, 1),
            Some(Structure::ActiveL1),
            "another kind is not removed"
        );
        map.remove(10, Structure::ActiveL1);
        assert_eq!(map.hit(10, 5), None);
    }
}
