//! The internal snapshot table, as far as protecting what snapshots hold needs it: their L1 tables.
//!
//! Snapshots are respected (their clusters have refcounts above one, so that writes copy), never made or changed.

use super::limits;
use super::units::{Geometry, HostOffset};
use crate::error::QmpError;

/// What is known of one snapshot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Snapshot {
    pub l1_offset: HostOffset,
    pub l1_bytes: u64,
}

/// Parses `count` entries; `table` holds as much as the file and the limit allow. Returns the table's length too.
pub(super) fn parse(
    table: &[u8],
    count: u32,
    geometry: Geometry,
    file_length: u64,
) -> Result<(Vec<Snapshot>, u64), QmpError> {
    let mut out = Vec::new();
    let mut at = 0usize;
    for index in 0..count {
        at = at.next_multiple_of(8);
        let short = || QmpError::generic("Failed to read snapshot table");
        let entry = table.get(at..at + 40).ok_or_else(short)?;
        let be16 = |i: usize| usize::from(u16::from_be_bytes([entry[i], entry[i + 1]]));
        let be32 = |i: usize| u32::from_be_bytes(entry[i..i + 4].try_into().expect("four bytes"));
        let l1_offset = u64::from_be_bytes(entry[..8].try_into().expect("eight bytes"));
        let l1_bytes = u64::from(be32(8)) * 8;
        let (id, name, extra) = (be16(12), be16(14), be32(36));
        if extra > limits::MAX_SNAPSHOT_EXTRA {
            let text = format!("Too much extra metadata in snapshot table entry {index}");
            return Err(QmpError::generic(text));
        }
        if l1_bytes > limits::MAX_L1_BYTES {
            return Err(QmpError::generic("Snapshot L1 table too large"));
        }
        if geometry.within(l1_offset) != 0
            || l1_offset
                .checked_add(l1_bytes)
                .is_none_or(|end| end > file_length)
        {
            return Err(QmpError::generic("Snapshot L1 table offset invalid"));
        }
        at += 40 + extra as usize + id + name;
        if at > table.len() {
            return Err(short());
        }
        if at as u64 > limits::MAX_SNAPSHOT_TABLE {
            return Err(QmpError::generic("Snapshot table is too big"));
        }
        out.push(Snapshot {
            l1_offset: HostOffset(l1_offset),
            l1_bytes,
        });
    }
    Ok((out, at as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GEOMETRY: Geometry = Geometry {
        cluster_bits: 9,
        refcount_order: 4,
        v3: true,
    };

    fn entry(l1_offset: u64, l1_size: u32, extra: u32) -> Vec<u8> {
        let mut out = vec![0; 40];
        out[..8].copy_from_slice(&l1_offset.to_be_bytes());
        out[8..12].copy_from_slice(&l1_size.to_be_bytes());
        out[13] = 1;
        out[15] = 3;
        out[36..40].copy_from_slice(&extra.to_be_bytes());
        out.extend(vec![0; extra as usize]);
        out.extend_from_slice(b"1one");
        out
    }

    #[test]
    fn two_entries_and_their_refusals() {
        let mut table = entry(512, 4, 24);
        table.resize(table.len().next_multiple_of(8), 0);
        let first = table.len();
        table.extend(entry(1024, 1, 16));
        let (found, length) = parse(&table, 2, GEOMETRY, 4096).unwrap();
        assert_eq!(
            found[1],
            Snapshot {
                l1_offset: HostOffset(1024),
                l1_bytes: 8
            }
        );
        assert_eq!(length, first as u64 + 60);
        let text = |table: &[u8], count| parse(table, count, GEOMETRY, 4096).unwrap_err().desc;
        assert_eq!(text(&table, 3), "Failed to read snapshot table");
        assert_eq!(text(&table[..first + 50], 2), "Failed to read snapshot table");
        assert_eq!(text(&entry(513, 1, 0), 1), "Snapshot L1 table offset invalid");
        assert_eq!(text(&entry(4096, 1, 0), 1), "Snapshot L1 table offset invalid");
        assert_eq!(text(&entry(0, u32::MAX, 0), 1), "Snapshot L1 table too large");
        assert_eq!(
            text(&entry(0, 1, 1025), 1),
            "Too much extra metadata in snapshot table entry 0"
        );
    }
}
