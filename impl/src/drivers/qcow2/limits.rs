//! Limits on what an image may ask for. Everything that sizes an allocation is checked against these first.

/// Largest cluster_bits (2 MiB).
pub(super) const MAX_CLUSTER_BITS: u32 = 21;
/// Smallest cluster_bits (512 bytes).
pub(super) const MIN_CLUSTER_BITS: u32 = 9;
/// Largest L1 table, bytes.
pub(super) const MAX_L1_BYTES: u64 = 32 << 20;
/// Largest refcount table, bytes.
pub(super) const MAX_REFTABLE_BYTES: u64 = 8 << 20;
/// Most internal snapshots.
pub(super) const MAX_SNAPSHOTS: u32 = 65536;
/// Largest snapshot table, bytes.
pub(super) const MAX_SNAPSHOT_TABLE: u64 = 64 << 20;
/// Most extra data of one snapshot, bytes.
pub(super) const MAX_SNAPSHOT_EXTRA: u32 = 1024;
/// Longest backing file name, bytes.
pub(super) const MAX_BACKING_NAME: u64 = 1023;
/// Longest backing format name, bytes.
pub(super) const MAX_BACKING_FORMAT: usize = 15;
/// Host offsets end here: L1 and L2 entries have bits up to 55.
pub(super) const HOST_END: u64 = 1 << 56;
/// Most bitmaps.
pub(super) const MAX_BITMAPS: u32 = 65535;
/// Most entries of a bitmap's table.
pub(super) const MAX_BITMAP_TABLE: u32 = 0x800_0000;
/// Most bytes of bits of one bitmap.
pub(super) const MAX_BITMAP_BYTES: u64 = 512 << 20;
/// Longest name of a bitmap, bytes.
pub(super) const MAX_BITMAP_NAME: usize = 1023;
/// Largest bitmap directory, bytes.
pub(super) const MAX_BITMAP_DIRECTORY: u64 = 65535 * 1024;

/// Memory for cached L2 tables unless the user says otherwise, bytes.
pub(super) const L2_CACHE_BYTES: u64 = 32 << 20;
/// Memory for cached refcount blocks unless the user says otherwise, bytes.
pub(super) const REFBLOCK_CACHE_BYTES: u64 = 8 << 20;
/// Fewest cached tables: an operation touches at most two of a kind at once.
pub(super) const MIN_CACHE_PAGES: u64 = 4;

/// Freed clusters waiting for a flush at which one is made, bytes.
pub(super) const QUARANTINE_BYTES: u64 = 16 << 20;
/// The same in ranges, whatever their size.
pub(super) const QUARANTINE_RANGES: usize = 4096;
/// Up to this many bytes a write with copy-on-write edges goes out as one write through a bounce buffer.
pub(super) const MERGE_BYTES: u64 = 128 << 10;
