//! The bitmap directory: its entries, checked and laid out.
//!
//! Rules: texts are QEMU's. What an entry asks for is judged against limits, the virtual size and the file before anything is
//! allocated for it. Entries marked as in use have no bits that count.

use super::limits;
use super::units::Geometry;
use crate::error::QmpError;

const IN_USE: u32 = 1;
const AUTO: u32 = 2;
/// Before the name.
const FIXED: usize = 24;

/// One entry.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Stored {
    pub name: String,
    /// log2 of the bytes per bit.
    pub granularity_bits: u8,
    /// It records once the image is open.
    pub auto: bool,
    pub in_use: bool,
    /// Offset of its table, and how many entries that has.
    pub table: u64,
    pub entries: u32,
}

impl Stored {
    /// Bytes of bits for an image of this size.
    pub(super) fn bytes(granularity_bits: u8, size: u64) -> u64 {
        size.div_ceil(1 << granularity_bits).div_ceil(8)
    }

    fn check(&self, geometry: Geometry, size: u64, length: u64) -> Result<(), QmpError> {
        let table_bytes = u64::from(self.entries) * 8;
        let space = u64::from(self.entries).saturating_mul(geometry.cs());
        let expected = Stored::bytes(self.granularity_bits, size)
            .div_ceil(geometry.cs())
            .max(1);
        let sound = (9..=31).contains(&self.granularity_bits)
            && self.entries != 0
            && self.entries <= limits::MAX_BITMAP_TABLE
            && space <= limits::MAX_BITMAP_BYTES.max(geometry.cs())
            && self.table != 0
            && geometry.within(self.table) == 0
            && self
                .table
                .checked_add(table_bytes)
                .is_some_and(|end| end <= length)
            && (self.in_use || u64::from(self.entries) == expected);
        if sound {
            return Ok(());
        }
        Err(QmpError::generic(format!(
            "Bitmap '{}' doesn't satisfy the constraints",
            self.name
        )))
    }
}

/// The entries of a directory.
pub(super) fn parse(
    directory: &[u8],
    count: u32,
    geometry: Geometry,
    size: u64,
    length: u64,
) -> Result<Vec<Stored>, QmpError> {
    let broken = || QmpError::generic("Broken bitmap directory");
    let mut all: Vec<Stored> = Vec::new();
    let mut at = 0;
    while at < directory.len() {
        if all.len() as u64 == u64::from(count) {
            return Err(QmpError::generic(
                "More bitmaps found than specified in header extension",
            ));
        }
        let entry = directory.get(at..at + FIXED).ok_or_else(broken)?;
        let be32 = |i: usize| u32::from_be_bytes(entry[i..i + 4].try_into().expect("four bytes"));
        let (flags, name_length, extra) = (
            be32(12),
            usize::from(u16::from_be_bytes([entry[18], entry[19]])),
            be32(20),
        );
        if extra != 0 {
            return Err(QmpError::generic("Bitmap extra data is not supported"));
        }
        let name = directory
            .get(at + FIXED..at + FIXED + name_length)
            .ok_or_else(broken)?;
        let name = std::str::from_utf8(name).map_err(|_| broken())?;
        if flags & !(IN_USE | AUTO) != 0
            || entry[16] != 1
            || name.is_empty()
            || name.len() > limits::MAX_BITMAP_NAME
        {
            return Err(QmpError::generic(format!(
                "Bitmap '{name}' doesn't satisfy the constraints"
            )));
        }
        if all.iter().any(|other| other.name == name) {
            return Err(broken());
        }
        let stored = Stored {
            name: name.to_owned(),
            granularity_bits: entry[17],
            auto: flags & AUTO != 0,
            in_use: flags & IN_USE != 0,
            table: u64::from_be_bytes(entry[..8].try_into().expect("eight bytes")),
            entries: be32(8),
        };
        stored.check(geometry, size, length)?;
        all.push(stored);
        at += (FIXED + name_length).next_multiple_of(8);
    }
    if all.len() as u64 != u64::from(count) {
        return Err(QmpError::generic(
            "Less bitmaps found than specified in header extension",
        ));
    }
    Ok(all)
}

/// The bytes of a directory.
pub(super) fn build(all: &[Stored]) -> Vec<u8> {
    let mut out = Vec::new();
    for stored in all {
        let flags = if stored.in_use { IN_USE } else { 0 } | if stored.auto { AUTO } else { 0 };
        out.extend_from_slice(&stored.table.to_be_bytes());
        out.extend_from_slice(&stored.entries.to_be_bytes());
        out.extend_from_slice(&flags.to_be_bytes());
        let name_length = u16::try_from(stored.name.len()).expect("names are short");
        out.extend_from_slice(&[1, stored.granularity_bits]);
        out.extend_from_slice(&name_length.to_be_bytes());
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(stored.name.as_bytes());
        out.resize(out.len().next_multiple_of(8), 0);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const GEOMETRY: Geometry = Geometry {
        cluster_bits: 9,
        refcount_order: 4,
        v3: true,
    };

    fn stored(name: &str) -> Stored {
        Stored {
            name: name.to_owned(),
            granularity_bits: 9,
            auto: true,
            in_use: false,
            table: 1024,
            entries: 1,
        }
    }

    fn refusal(all: &[Stored], count: u32, spoil: impl Fn(&mut Vec<u8>)) -> String {
        let mut bytes = build(all);
        spoil(&mut bytes);
        parse(&bytes, count, GEOMETRY, 1 << 20, 1 << 16).unwrap_err().desc
    }

    #[test]
    fn what_is_built_is_read_back() {
        let mut second = stored("second");
        (second.in_use, second.auto, second.entries) = (true, false, 9);
        let all = [stored("a"), second];
        assert_eq!(
            parse(&build(&all), 2, GEOMETRY, 1 << 20, 1 << 16),
            Ok(all.to_vec())
        );
    }

    #[test]
    fn refusals() {
        let all = [stored("a"), stored("b")];
        let nothing = |_: &mut Vec<u8>| ();
        assert_eq!(
            refusal(&all, 1, nothing),
            "More bitmaps found than specified in header extension"
        );
        assert_eq!(
            refusal(&all, 3, nothing),
            "Less bitmaps found than specified in header extension"
        );
        assert_eq!(
            refusal(&all, 2, |bytes| bytes.truncate(40)),
            "Broken bitmap directory"
        );
        assert_eq!(
            refusal(&all, 2, |bytes| bytes[23] = 1),
            "Bitmap extra data is not supported"
        );
        assert_eq!(
            refusal(&[stored("a"), stored("a")], 2, nothing),
            "Broken bitmap directory"
        );
        // Type, granularity, flags, table offset, entries.
        for (at, byte) in [
            (16, 0),
            (17, 8),
            (17, 32),
            (15, 4),
            (6, 1),
            (0, 1),
            (11, 0),
            (11, 2),
        ] {
            let text = refusal(&all, 2, |bytes| bytes[at] = byte);
            assert_eq!(text, "Bitmap 'a' doesn't satisfy the constraints", "byte {at}");
        }
    }
}
