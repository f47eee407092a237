//! Offsets, cluster numbers and the geometry that converts between them.
//!
//! Rules: a guest offset is never used where a host offset is meant, hence the newtypes. Offsets on disk are
//! below 2^56, so that sums of two of them cannot overflow a `u64`.

/// A byte offset in the virtual disk.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct GuestOffset(pub u64);

/// A byte offset in the image file.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct HostOffset(pub u64);

/// A cluster of the image file: host offset / cluster size.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct ClusterIndex(pub u64);

/// `usize` of a value that is bounded by a buffer or table in memory.
///
/// # Panics
/// When it does not fit: a bug of ours, every such value is validated against `limits` first.
#[inline]
pub(super) fn us(value: u64) -> usize {
    usize::try_from(value).expect("bounded by a validated limit")
}

/// What follows from the header's geometry fields. Constant while the image is open.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Geometry {
    pub cluster_bits: u32,
    /// log2 of the refcount width in bits, 0..=6.
    pub refcount_order: u32,
    /// Version 3: zero clusters exist.
    pub v3: bool,
}

impl Geometry {
    /// Cluster size in bytes.
    #[inline]
    pub(super) fn cs(self) -> u64 {
        1 << self.cluster_bits
    }

    /// Offset within a cluster.
    #[inline]
    pub(super) fn within(self, offset: u64) -> u64 {
        offset & (self.cs() - 1)
    }

    /// Start of the cluster that holds `offset`.
    #[inline]
    pub(super) fn down(self, offset: u64) -> u64 {
        offset & !(self.cs() - 1)
    }

    /// First cluster boundary at or after `offset` (which is at most 2^63).
    #[inline]
    pub(super) fn up(self, offset: u64) -> u64 {
        self.down(offset + self.cs() - 1)
    }

    /// How many clusters hold `bytes`.
    #[inline]
    pub(super) fn clusters(self, bytes: u64) -> u64 {
        self.up(bytes) >> self.cluster_bits
    }

    /// Entries of one L2 table.
    #[inline]
    pub(super) fn l2_entries(self) -> u64 {
        1 << (self.cluster_bits - 3)
    }

    /// Guest bytes that one L2 table maps.
    #[inline]
    pub(super) fn l2_span(self) -> u64 {
        1 << (2 * self.cluster_bits - 3)
    }

    /// Index into the L1 table.
    #[inline]
    pub(super) fn l1_index(self, guest: GuestOffset) -> usize {
        us(guest.0 >> (2 * self.cluster_bits - 3))
    }

    /// Index into the L2 table.
    #[inline]
    pub(super) fn l2_index(self, guest: GuestOffset) -> usize {
        us((guest.0 >> self.cluster_bits) & (self.l2_entries() - 1))
    }

    /// L1 entries that a virtual disk of `size` bytes needs.
    pub(super) fn l1_needed(self, size: u64) -> u64 {
        size.div_ceil(self.l2_span())
    }

    /// Refcounts in one refcount block.
    #[inline]
    pub(super) fn rb_entries(self) -> u64 {
        1 << (self.cluster_bits + 3 - self.refcount_order)
    }

    /// Cluster that holds a host offset.
    #[inline]
    pub(super) fn cluster(self, host: HostOffset) -> ClusterIndex {
        ClusterIndex(host.0 >> self.cluster_bits)
    }

    /// Start of a host cluster.
    #[inline]
    pub(super) fn host(self, cluster: ClusterIndex) -> HostOffset {
        HostOffset(cluster.0 << self.cluster_bits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn geometry_of_the_extremes() {
        let small = Geometry {
            cluster_bits: 9,
            refcount_order: 6,
            v3: true,
        };
        assert_eq!(
            (
                small.cs(),
                small.l2_entries(),
                small.l2_span(),
                small.rb_entries()
            ),
            (512, 64, 32768, 64)
        );
        let large = Geometry {
            cluster_bits: 21,
            refcount_order: 0,
            v3: true,
        };
        assert_eq!((large.l2_entries(), large.rb_entries()), (262_144, 16_777_216));
        let guest = GuestOffset(32768 + 3 * 512 + 7);
        assert_eq!(
            (
                small.l1_index(guest),
                small.l2_index(guest),
                small.within(guest.0)
            ),
            (1, 3, 7)
        );
        assert_eq!(
            (small.up(513), small.down(513), small.clusters(0)),
            (1024, 512, 0)
        );
    }
}
