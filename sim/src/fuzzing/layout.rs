//! Where the tables of an image lie, so that a recipe can put snapshots into a sound image and patch single entries.
//!
//! Rules: reads the bytes as they are; on a hostile image everything is simply absent.

/// Offsets of the tables of one image, in bytes. Tables past the end of the file are left out.
#[derive(Clone, Debug, Default)]
pub(super) struct Tables {
    pub(super) cluster: usize,
    pub(super) order: u32,
    pub(super) reftable: Vec<usize>,
    pub(super) l1: Vec<usize>,
    /// Every L2 table, then every entry of each.
    pub(super) l2: Vec<usize>,
    pub(super) refblocks: Vec<usize>,
}

pub(super) const COPIED: u64 = 1 << 63;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COMPRESSED: u64 = 1 << 62;

pub(super) fn get64(bytes: &[u8], at: usize) -> u64 {
    let word = bytes
        .get(at..at.saturating_add(8))
        .and_then(|b| b.try_into().ok());
    word.map_or(0, u64::from_be_bytes)
}

pub(super) fn get32(bytes: &[u8], at: usize) -> u32 {
    let word = bytes
        .get(at..at.saturating_add(4))
        .and_then(|b| b.try_into().ok());
    word.map_or(0, u32::from_be_bytes)
}

pub(super) fn put64(bytes: &mut [u8], at: usize, value: u64) {
    if let Some(slot) = bytes.get_mut(at..at.saturating_add(8)) {
        slot.copy_from_slice(&value.to_be_bytes());
    }
}

pub(super) fn put32(bytes: &mut [u8], at: usize, value: u32) {
    if let Some(slot) = bytes.get_mut(at..at.saturating_add(4)) {
        slot.copy_from_slice(&value.to_be_bytes());
    }
}

fn index(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

impl Tables {
    /// The tables that the header in `bytes` names.
    pub(super) fn of(bytes: &[u8]) -> Tables {
        let bits = get32(bytes, 20);
        if !(9..=21).contains(&bits) {
            return Tables::default();
        }
        let cluster = 1usize << bits;
        let order = if get32(bytes, 4) == 3 { get32(bytes, 96) } else { 4 };
        let words = |at: u64, count: usize| -> Vec<usize> {
            let at = index(at);
            let room = bytes.len().saturating_sub(at) / 8;
            (0..count.min(room)).map(|i| at + 8 * i).collect()
        };
        let used = |list: &[usize]| -> Vec<usize> {
            let entries = list.iter().map(|at| get64(bytes, *at) & OFFSET);
            entries
                .filter(|e| *e != 0)
                .map(index)
                .filter(|at| *at < bytes.len())
                .collect()
        };
        let reftable = words(
            get64(bytes, 48),
            (get32(bytes, 56) as usize).saturating_mul(cluster / 8),
        );
        let l1 = words(get64(bytes, 40), get32(bytes, 36) as usize);
        let (l2, refblocks) = (used(&l1), used(&reftable));
        Tables {
            cluster,
            order: order.min(6),
            reftable,
            l1,
            l2,
            refblocks,
        }
    }

    /// Places of the entries of one L2 table.
    pub(super) fn entries(&self, table: usize) -> impl Iterator<Item = usize> + use<> {
        let count = self.cluster / 8;
        (0..count).map(move |i| table + 8 * i)
    }

    /// Changes the refcount of a host cluster; false when no block counts it, or the result has no room.
    pub(super) fn add_refcount(&self, bytes: &mut [u8], cluster: usize, by: i64) -> bool {
        let per_block = (self.cluster * 8) >> self.order;
        let Some(&entry) = self.reftable.get(cluster / per_block) else {
            return false;
        };
        let block = index(get64(bytes, entry) & OFFSET);
        if block == 0 || block + self.cluster > bytes.len() {
            return false;
        }
        let bit = (cluster % per_block) << self.order;
        let width = 1u32 << self.order;
        let max = u64::MAX >> (64 - width);
        let (start, shift, length) = if width < 8 {
            (block + bit / 8, bit % 8, 1)
        } else {
            (block + bit / 8, 0, width as usize / 8)
        };
        let mut word = 0u64;
        for byte in &bytes[start..start + length] {
            word = word << 8 | u64::from(*byte);
        }
        let old = word >> shift & max;
        let Some(new) = old.checked_add_signed(by).filter(|new| *new <= max) else {
            return false;
        };
        let word = word & !(max << shift) | new << shift;
        let raw = word.to_be_bytes();
        bytes[start..start + length].copy_from_slice(&raw[8 - length..]);
        true
    }

    /// First and last host cluster of an L2 entry; `None` for one without.
    pub(super) fn clusters_of(&self, entry: u64) -> Option<(usize, usize)> {
        if entry & COMPRESSED == 0 {
            let host = index(entry & OFFSET) / self.cluster;
            return (host != 0).then_some((host, host));
        }
        let bits = 70 - self.cluster.trailing_zeros();
        let at = entry & ((1 << bits) - 1);
        let sectors = (entry & (COMPRESSED - 1)) >> bits;
        let end = at + (sectors + 1) * 512 - at % 512;
        Some((index(at) / self.cluster, index(end - 1) / self.cluster))
    }
}
