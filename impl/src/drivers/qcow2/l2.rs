//! L1 and L2 entries.

use super::units::HostOffset;

/// Bit 63: the refcount is exactly one. A hint for us, verified before every in-place write.
pub(super) const COPIED: u64 = 1 << 63;
/// Bits 9..=55: host offset.
pub(super) const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Reserved bits of an L1 entry.
pub(super) const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
/// Reserved bits of a standard L2 entry.
const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;
/// Bit 62: compressed.
const COMPRESSED: u64 = 1 << 62;
/// Bit 0 of a standard entry, version 3: reads as zeroes.
pub(super) const ZERO: u64 = 1;

/// How a guest cluster is stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    /// Not in this layer.
    Unallocated,
    /// Zeroes without a host cluster.
    ZeroPlain,
    /// Zeroes; a host cluster is reserved.
    ZeroAlloc,
    /// In a host cluster.
    Normal,
    /// Deflated somewhere in the file.
    Compressed,
}

/// An L2 entry in host byte order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Entry(pub u64);

impl Entry {
    /// An exclusively owned data cluster.
    pub(super) fn normal(host: HostOffset) -> Entry {
        debug_assert_eq!(host.0 & !OFFSET, 0);
        Entry(host.0 | COPIED)
    }

    #[inline]
    pub(super) fn kind(self) -> Kind {
        if self.0 & COMPRESSED != 0 {
            Kind::Compressed
        } else if self.0 & ZERO != 0 {
            if self.0 & OFFSET != 0 {
                Kind::ZeroAlloc
            } else {
                Kind::ZeroPlain
            }
        } else if self.0 & OFFSET == 0 {
            Kind::Unallocated
        } else {
            Kind::Normal
        }
    }

    /// Host cluster of `Normal` and `ZeroAlloc`.
    #[inline]
    pub(super) fn host(self) -> HostOffset {
        HostOffset(self.0 & OFFSET)
    }

    #[inline]
    pub(super) fn copied(self) -> bool {
        self.0 & COPIED != 0
    }

    /// Bits that no known feature gives a meaning; also COPIED on a compressed entry.
    pub(super) fn has_reserved_bits(self) -> bool {
        match self.kind() {
            Kind::Compressed => self.copied(),
            _ => self.0 & L2_RESERVED != 0,
        }
    }

    /// A deflate stream of so many bytes (at least one).
    pub(super) fn packed(host: HostOffset, bytes: u64, cluster_bits: u32) -> Entry {
        let offset_bits = 70 - cluster_bits;
        let more_sectors = (host.0 + bytes - 1) / 512 - host.0 / 512;
        assert!(host.0 < 1 << offset_bits && more_sectors < 1 << (cluster_bits - 8));
        Entry(COMPRESSED | more_sectors << offset_bits | host.0)
    }

    /// Byte offset and byte length of the deflate stream (the length is an upper bound).
    pub(super) fn compressed(self, cluster_bits: u32) -> (HostOffset, u64) {
        let offset_bits = 70 - cluster_bits;
        let offset = self.0 & ((1 << offset_bits) - 1);
        let sectors = ((self.0 & !(COPIED | COMPRESSED)) >> offset_bits) + 1;
        (HostOffset(offset), sectors * 512 - (offset & 511))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds() {
        for (raw, kind) in [
            (0, Kind::Unallocated),
            (COPIED, Kind::Unallocated),
            (1, Kind::ZeroPlain),
            (0x10001, Kind::ZeroAlloc),
            (0x10000 | COPIED, Kind::Normal),
            (0x10000, Kind::Normal),
            (COMPRESSED | 1, Kind::Compressed),
        ] {
            assert_eq!(Entry(raw).kind(), kind, "{raw:#x}");
        }
        assert_eq!(Entry(0x10001 | COPIED).host(), HostOffset(0x10000));
    }

    #[test]
    fn reserved_bits() {
        assert!(!Entry(0x10001 | COPIED).has_reserved_bits());
        for bit in [1, 8, 56, 61] {
            assert!(Entry(0x10000 | 1 << bit).has_reserved_bits(), "bit {bit}");
        }
        assert!(
            !Entry(COMPRESSED | 0x1fe).has_reserved_bits(),
            "low bits are an offset there"
        );
        assert!(Entry(COMPRESSED | COPIED).has_reserved_bits());
    }

    #[test]
    fn compressed_fields() {
        // 64 KiB clusters: offset in bits 0..=53, additional sectors in bits 54..=61.
        let entry = Entry(COMPRESSED | 5 << 54 | 0x12345);
        assert_eq!(entry.compressed(16), (HostOffset(0x12345), 6 * 512 - 0x145));
        // Largest possible: 2 MiB clusters have 13 bits for sectors, that is 4 MiB.
        let entry = Entry(COMPRESSED | 0x1fff << 49);
        assert_eq!(entry.compressed(21), (HostOffset(0), 4 << 20));
        // 512-byte clusters have one bit.
        assert_eq!(
            Entry(COMPRESSED | 1 << 61 | 511).compressed(9),
            (HostOffset(511), 1024 - 511)
        );
        for (at, bytes, bits, upper) in [
            (0x10000, 1, 16, 512),
            (0x12345, 700, 16, 3 * 512 - 0x145),
            (511, 2, 9, 513),
        ] {
            let entry = Entry::packed(HostOffset(at), bytes, bits);
            assert_eq!(
                (entry.kind(), entry.has_reserved_bits()),
                (Kind::Compressed, false)
            );
            assert_eq!(
                entry.compressed(bits),
                (HostOffset(at), upper),
                "{bytes} at {at:#x}"
            );
        }
    }
}
