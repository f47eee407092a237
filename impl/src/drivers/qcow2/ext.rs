//! Header extensions.
//!
//! Rules: the area ends at the backing name if there is one, else with the first cluster; unknown extensions
//! are kept in their order; a duplicate is refused.

use super::header::{AUTOCLEAR_BITMAPS, FEATURES, Header};
use super::limits;
use crate::error::QmpError;

/// End marker.
pub(super) const END: u32 = 0;
/// Backing file format name.
pub(super) const BACKING_FORMAT: u32 = 0xe279_2aca;
/// Names of feature bits.
pub(super) const FEATURE_TABLE: u32 = 0x6803_f857;
/// Full disk encryption header pointer.
const CRYPTO: u32 = 0x0537_be77;
/// Persistent bitmaps.
pub(super) const BITMAPS: u32 = 0x2385_2875;

/// What the extensions say.
#[derive(Clone, Debug, Default)]
pub(super) struct Extensions {
    pub backing_format: Option<String>,
    /// (type, bit, name).
    pub features: Vec<(u8, u8, String)>,
    /// There was a feature name table.
    pub feature_table: bool,
    /// A consistent bitmaps extension, verbatim.
    pub bitmaps: Option<Vec<u8>>,
    /// There was a bitmaps extension, consistent or not.
    pub any_bitmaps: bool,
    /// (type, data), in order.
    pub unknown: Vec<(u32, Vec<u8>)>,
    /// Where the extensions end, bytes from the start of the file.
    pub end: usize,
}

fn refuse<T>(text: impl Into<String>) -> Result<T, QmpError> {
    Err(QmpError::generic(text))
}

impl Extensions {
    /// Parses the area behind the header; `cluster` holds the first cluster as far as the file has it.
    pub(super) fn parse(cluster: &[u8], header: &Header) -> Result<Extensions, QmpError> {
        let mut out = Extensions::default();
        let mut seen = Vec::new();
        let limit = match header.backing_offset {
            0 => 1usize << header.cluster_bits,
            at => usize::try_from(at).expect("checked to lie in the first cluster"),
        };
        let mut at = header.length as usize;
        while at < limit {
            let Some(head) = cluster.get(at..at + 8).filter(|_| at + 8 <= limit) else {
                // Nothing but the end of the file: what is not there is zero, an end marker.
                if at >= cluster.len() {
                    break;
                }
                return refuse("Header extension too large");
            };
            let kind = u32::from_be_bytes(head[..4].try_into().expect("four bytes"));
            let len = u32::from_be_bytes(head[4..].try_into().expect("four bytes")) as usize;
            at += 8;
            if kind == END {
                break;
            }
            if len > limit - at || at + len > cluster.len() {
                return refuse("Header extension too large");
            }
            if seen.contains(&kind) {
                return refuse(format!("Duplicate header extension {kind:x}"));
            }
            seen.push(kind);
            out.take(kind, &cluster[at..at + len], header)?;
            at += len.next_multiple_of(8);
        }
        out.end = at.min(limit);
        Ok(out)
    }

    fn take(&mut self, kind: u32, data: &[u8], header: &Header) -> Result<(), QmpError> {
        match kind {
            BACKING_FORMAT => {
                let len = data.len();
                if len > limits::MAX_BACKING_FORMAT {
                    return refuse(format!("ERROR: ext_backing_format: len={len} too large (>=16)"));
                }
                let Ok(name) = std::str::from_utf8(data) else {
                    return refuse("Backing file format is not valid UTF-8");
                };
                self.backing_format = Some(name.to_owned());
            }
            FEATURE_TABLE => {
                self.feature_table = true;
                self.features.extend(data.chunks_exact(48).map(|entry| {
                    let name = entry[2..].split(|b| *b == 0).next().unwrap_or_default();
                    (entry[0], entry[1], String::from_utf8_lossy(name).into_owned())
                }));
            }
            CRYPTO if header.crypt_method != 2 => {
                return refuse("CRYPTO header extension only expected with LUKS encryption method");
            }
            BITMAPS => {
                self.any_bitmaps = true;
                if header.autoclear & AUTOCLEAR_BITMAPS != 0 {
                    check_bitmaps(data, header)?;
                    self.bitmaps = Some(data.to_vec());
                }
            }
            _ => self.unknown.push((kind, data.to_vec())),
        }
        Ok(())
    }
}

fn check_bitmaps(data: &[u8], header: &Header) -> Result<(), QmpError> {
    if data.len() != 24 {
        return refuse("bitmaps_ext: Invalid extension length");
    }
    let be32 = |at: usize| u32::from_be_bytes(data[at..at + 4].try_into().expect("four bytes"));
    let be64 = |at: usize| u64::from_be_bytes(data[at..at + 8].try_into().expect("eight bytes"));
    let (count, reserved, size, offset) = (be32(0), be32(4), be64(8), be64(16));
    if reserved != 0 {
        return refuse("bitmaps_ext: Reserved field is not zero");
    }
    if count > limits::MAX_BITMAPS {
        return refuse(format!(
            "bitmaps_ext: Image has {count} bitmaps, exceeding the QEMU supported maximum of {}",
            limits::MAX_BITMAPS
        ));
    }
    if count == 0 {
        return refuse("found bitmaps extension with zero bitmaps");
    }
    if offset & ((1 << header.cluster_bits) - 1) != 0 {
        return refuse("bitmaps_ext: invalid bitmap directory offset");
    }
    if size > limits::MAX_BITMAP_DIRECTORY {
        return refuse(format!(
            "bitmaps_ext: bitmap directory size ({size}) exceeds the maximum supported size ({})",
            limits::MAX_BITMAP_DIRECTORY
        ));
    }
    Ok(())
}

/// Where the data of a bitmaps extension of the right length is, whether it counts or not; for a first cluster that was
/// parsed.
pub(super) fn place_of_bitmaps(raw: &[u8], header: &Header) -> Option<usize> {
    let mut at = header.length as usize;
    let word = |at: usize| Some(u32::from_be_bytes(raw.get(at..at + 4)?.try_into().ok()?));
    loop {
        match (word(at)?, word(at + 4)? as usize) {
            (END, _) => return None,
            (BITMAPS, 24) => return raw.get(at + 8..at + 32).map(|_| at + 8),
            (_, len) => at += 8 + len.next_multiple_of(8),
        }
    }
}

/// Appends an extension, padded to 8 bytes.
pub(super) fn put(out: &mut Vec<u8>, kind: u32, data: &[u8]) {
    let len = u32::try_from(data.len()).expect("an extension fits the first cluster");
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&len.to_be_bytes());
    out.extend_from_slice(data);
    out.resize(out.len().next_multiple_of(8), 0);
}

/// The feature name table of new images.
pub(super) fn feature_table() -> Vec<u8> {
    let mut out = Vec::with_capacity(48 * FEATURES.len());
    for (kind, bit, name) in FEATURES {
        let end = out.len() + 48;
        out.extend_from_slice(&[kind, bit]);
        out.extend_from_slice(name.as_bytes());
        out.resize(end, 0);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(autoclear: u64) -> Header {
        let mut raw = [0u8; 112];
        raw[..4].copy_from_slice(&super::super::header::MAGIC);
        raw[7] = 3;
        raw[23] = 9;
        raw[88..96].copy_from_slice(&autoclear.to_be_bytes());
        raw[103] = 104;
        Header::parse(&raw).unwrap()
    }

    fn parse(autoclear: u64, items: &[(u32, &[u8])]) -> Result<Extensions, String> {
        let mut cluster = vec![0; 104];
        for (kind, data) in items {
            put(&mut cluster, *kind, data);
        }
        cluster.resize(512, 0);
        Extensions::parse(&cluster, &header(autoclear)).map_err(|e| e.desc)
    }

    #[test]
    fn refusals() {
        let refused = |autoclear, items: &[(u32, &[u8])], text: &str| {
            assert_eq!(parse(autoclear, items).unwrap_err(), text);
        };
        refused(
            0,
            &[(BACKING_FORMAT, &[b'x'; 16])],
            "ERROR: ext_backing_format: len=16 too large (>=16)",
        );
        refused(
            0,
            &[(CRYPTO, &[0; 16])],
            "CRYPTO header extension only expected with LUKS encryption method",
        );
        refused(0, &[(7, &[]), (7, &[])], "Duplicate header extension 7");
        refused(1, &[(BITMAPS, &[0; 23])], "bitmaps_ext: Invalid extension length");
        refused(
            1,
            &[(BITMAPS, &[0; 24])],
            "found bitmaps extension with zero bitmaps",
        );
        let bitmaps = |spoil: fn(&mut [u8; 24])| {
            let mut data = [0; 24];
            data[3] = 1;
            spoil(&mut data);
            parse(1, &[(BITMAPS, &data)]).map(|e| e.bitmaps.is_some())
        };
        assert_eq!(bitmaps(|_| ()), Ok(true));
        assert_eq!(
            bitmaps(|d| d[7] = 1),
            Err("bitmaps_ext: Reserved field is not zero".to_owned())
        );
        assert!(
            bitmaps(|d| d[0] = 1)
                .unwrap_err()
                .contains("exceeding the QEMU supported maximum")
        );
        assert_eq!(
            bitmaps(|d| d[23] = 1),
            Err("bitmaps_ext: invalid bitmap directory offset".to_owned())
        );
        assert!(
            bitmaps(|d| d[8] = 1)
                .unwrap_err()
                .contains("exceeds the maximum supported size")
        );
        assert!(
            parse(0, &[(BITMAPS, &[0; 3])]).unwrap().bitmaps.is_none(),
            "inconsistent ones are ignored"
        );
    }

    #[test]
    fn an_item_past_the_end_is_refused() {
        let mut cluster = vec![0; 512];
        cluster[104..112].copy_from_slice(&[0, 0, 0, 9, 0xff, 0xff, 0xff, 0xff]);
        let text = Extensions::parse(&cluster, &header(0)).unwrap_err().desc;
        assert_eq!(text, "Header extension too large");
        assert!(
            parse(0, &[(9, &[0; 400])]).is_ok(),
            "filling the cluster exactly needs no end marker"
        );
    }
}
