//! The header: parsing, the checks that need only the header, and laying out a new first cluster.
//!
//! Rules: texts are QEMU's. Stricter than QEMU: header_length is a multiple of 8, the backing name lies behind
//! the header and within the first cluster, the virtual size is a multiple of 512.

use super::ext::{self, Extensions};
use super::limits;
use super::units::Geometry;
use crate::error::{Errno, QmpError};
use crate::types::MAX_LENGTH;

/// "QFI\xfb".
pub(super) const MAGIC: [u8; 4] = [0x51, 0x46, 0x49, 0xfb];
/// Bytes of a version 2 header.
pub(super) const V2_LENGTH: u32 = 72;
/// Bytes of the version 3 header we write.
pub(super) const V3_LENGTH: u32 = 112;
/// Smallest version 3 header.
const V3_MIN_LENGTH: u32 = 104;

/// Incompatible feature: refcounts may be stale.
pub(super) const INCOMPAT_DIRTY: u64 = 1;
/// Incompatible feature: the image is corrupt.
pub(super) const INCOMPAT_CORRUPT: u64 = 2;
/// Incompatible feature: a compression type other than deflate.
const INCOMPAT_COMPRESSION: u64 = 8;
/// Compatible feature: lazy refcounts.
pub(super) const COMPAT_LAZY: u64 = 1;
/// Autoclear feature: the bitmaps extension is consistent.
pub(super) const AUTOCLEAR_BITMAPS: u64 = 1;

/// Names of features: (type, bit, name); written into new images, used for refusals.
pub(super) const FEATURES: [(u8, u8, &str); 8] = [
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
];

/// The fixed fields.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Header {
    pub version: u32,
    pub backing_offset: u64,
    pub backing_len: u32,
    pub cluster_bits: u32,
    pub size: u64,
    pub crypt_method: u32,
    pub l1_size: u32,
    pub l1_offset: u64,
    pub reftable_offset: u64,
    pub reftable_clusters: u32,
    pub nb_snapshots: u32,
    pub snapshots_offset: u64,
    pub incompatible: u64,
    pub compatible: u64,
    pub autoclear: u64,
    pub refcount_order: u32,
    pub length: u32,
    pub compression: u8,
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

fn refuse<T>(text: impl Into<String>) -> Result<T, QmpError> {
    Err(QmpError::generic(text))
}

impl Header {
    /// Reads the fixed fields and makes the checks that precede the extensions.
    pub(super) fn parse(bytes: &[u8; 112]) -> Result<Header, QmpError> {
        if bytes[..4] != MAGIC {
            return refuse("Image is not in qcow2 format");
        }
        let version = be32(bytes, 4);
        if !(2..=3).contains(&version) {
            return refuse(format!("Unsupported qcow2 version {version}"));
        }
        let v3 = version == 3;
        let header = Header {
            version,
            backing_offset: be64(bytes, 8),
            backing_len: be32(bytes, 16),
            cluster_bits: be32(bytes, 20),
            size: be64(bytes, 24),
            crypt_method: be32(bytes, 32),
            l1_size: be32(bytes, 36),
            l1_offset: be64(bytes, 40),
            reftable_offset: be64(bytes, 48),
            reftable_clusters: be32(bytes, 56),
            nb_snapshots: be32(bytes, 60),
            snapshots_offset: be64(bytes, 64),
            incompatible: if v3 { be64(bytes, 72) } else { 0 },
            compatible: if v3 { be64(bytes, 80) } else { 0 },
            autoclear: if v3 { be64(bytes, 88) } else { 0 },
            refcount_order: if v3 { be32(bytes, 96) } else { 4 },
            length: if v3 { be32(bytes, 100) } else { V2_LENGTH },
            compression: if v3 && be32(bytes, 100) > V3_MIN_LENGTH {
                bytes[104]
            } else {
                0
            },
        };
        header.check_layout()?;
        Ok(header)
    }

    fn check_layout(&self) -> Result<(), QmpError> {
        let bits = self.cluster_bits;
        if !(limits::MIN_CLUSTER_BITS..=limits::MAX_CLUSTER_BITS).contains(&bits) {
            return refuse(format!("Unsupported cluster size: 2^{bits}"));
        }
        if self.version == 3 && self.length < V3_MIN_LENGTH {
            return refuse("qcow2 header too short");
        }
        if u64::from(self.length) > 1 << bits {
            return refuse("qcow2 header exceeds cluster size");
        }
        if !self.length.is_multiple_of(8) {
            return refuse("qcow2 header length is not a multiple of 8");
        }
        if self.backing_offset > 1 << bits
            || self.backing_offset != 0 && self.backing_offset < u64::from(self.length)
        {
            return refuse("Invalid backing file offset");
        }
        Ok(())
    }

    /// Compression type and incompatible features; needs the names in the feature table.
    pub(super) fn check_features(&self, extensions: &Extensions) -> Result<(), QmpError> {
        if self.compression > 1 {
            return refuse(format!("qcow2: unknown compression type: {}", self.compression));
        }
        let bit = self.incompatible & INCOMPAT_COMPRESSION != 0;
        if bit && self.compression == 0 {
            return refuse("qcow2: Compression type incompatible feature bit must not be set");
        }
        if !bit && self.compression != 0 {
            return refuse("qcow2: Compression type incompatible feature bit must be set");
        }
        let unsupported = self.incompatible & !(INCOMPAT_DIRTY | INCOMPAT_CORRUPT);
        if unsupported != 0 {
            let names = feature_names(unsupported, extensions);
            return refuse(format!("Unsupported qcow2 feature(s): {names}"));
        }
        if self.crypt_method != 0 {
            return refuse(format!("Unsupported encryption method {}", self.crypt_method));
        }
        Ok(())
    }

    /// Geometry; refuses refcount widths beyond 64 bits.
    pub(super) fn geometry(&self) -> Result<Geometry, QmpError> {
        if self.refcount_order > 6 {
            return refuse("Reference count entry width too large; may not exceed 64 bits");
        }
        let (cluster_bits, refcount_order) = (self.cluster_bits, self.refcount_order);
        Ok(Geometry {
            cluster_bits,
            refcount_order,
            v3: self.version == 3,
        })
    }

    /// Sizes and places of the tables; `file_length` is the image file's, rounded up to whole sectors.
    pub(super) fn check_tables(&self, geometry: Geometry, file_length: u64) -> Result<(), QmpError> {
        let inside = |offset: u64, bytes: u64| {
            geometry.within(offset) == 0 && offset.checked_add(bytes).is_some_and(|end| end <= file_length)
        };
        if self.reftable_clusters == 0 {
            return refuse("Image does not contain a reference count table");
        }
        let reftable_bytes = u64::from(self.reftable_clusters) << geometry.cluster_bits;
        if reftable_bytes > limits::MAX_REFTABLE_BYTES {
            return refuse("Reference count table too large");
        }
        if self.reftable_offset == 0 || !inside(self.reftable_offset, reftable_bytes) {
            return refuse("Reference count table offset invalid");
        }
        if self.nb_snapshots > limits::MAX_SNAPSHOTS {
            return refuse("Snapshot table too large");
        }
        // 40 bytes is the least that an entry takes.
        if !inside(self.snapshots_offset, u64::from(self.nb_snapshots) * 40) {
            return refuse("Snapshot table offset invalid");
        }
        let l1_bytes = u64::from(self.l1_size) * 8;
        if l1_bytes > limits::MAX_L1_BYTES {
            return refuse("Active L1 table too large");
        }
        if !inside(self.l1_offset, l1_bytes) {
            return refuse("Active L1 table offset invalid");
        }
        if self.size > MAX_LENGTH || geometry.l1_needed(self.size) > i32::MAX as u64 {
            return refuse("Image is too big");
        }
        if !self.size.is_multiple_of(512) {
            return refuse("Image size is not a multiple of 512 bytes");
        }
        if u64::from(self.l1_size) < geometry.l1_needed(self.size) {
            return refuse("L1 table is too small");
        }
        Ok(())
    }

    /// The fixed fields as they are on disk: `length` bytes (72 for version 2), zero beyond what is known.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let mut out = vec![0; self.length as usize];
        let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &MAGIC);
        put(4, &self.version.to_be_bytes());
        put(8, &self.backing_offset.to_be_bytes());
        put(16, &self.backing_len.to_be_bytes());
        put(20, &self.cluster_bits.to_be_bytes());
        put(24, &self.size.to_be_bytes());
        put(32, &self.crypt_method.to_be_bytes());
        put(36, &self.l1_size.to_be_bytes());
        put(40, &self.l1_offset.to_be_bytes());
        put(48, &self.reftable_offset.to_be_bytes());
        put(56, &self.reftable_clusters.to_be_bytes());
        put(60, &self.nb_snapshots.to_be_bytes());
        put(64, &self.snapshots_offset.to_be_bytes());
        if self.version >= 3 {
            put(72, &self.incompatible.to_be_bytes());
            put(80, &self.compatible.to_be_bytes());
            put(88, &self.autoclear.to_be_bytes());
            put(96, &self.refcount_order.to_be_bytes());
            put(100, &self.length.to_be_bytes());
            if self.length > V3_MIN_LENGTH {
                put(104, &[self.compression]);
            }
        }
        out
    }
}

/// Names of a set of incompatible features.
fn feature_names(mut bits: u64, extensions: &Extensions) -> String {
    let mut names: Vec<String> = Vec::new();
    let from_image = extensions
        .features
        .iter()
        .map(|(kind, bit, name)| (*kind, *bit, name.as_str()));
    for (kind, bit, name) in from_image.chain(FEATURES) {
        if kind == 0 && bit < 64 && bits & 1 << bit != 0 {
            bits &= !(1 << bit);
            names.push(name.to_owned());
        }
    }
    if bits != 0 {
        names.push(format!("Unknown incompatible feature: {bits:x}"));
    }
    names.join(", ")
}

/// What the first cluster is made of.
#[derive(Clone, Debug)]
pub(super) struct FirstCluster<'a> {
    pub header: &'a Header,
    /// Header bytes behind those we know (from 112 on).
    pub unknown_fields: &'a [u8],
    /// Backing name and format.
    pub backing: Option<(&'a str, Option<&'a str>)>,
    pub unknown_extensions: &'a [(u32, Vec<u8>)],
    pub feature_table: bool,
    /// Data of the bitmaps extension.
    pub bitmaps: Option<[u8; 24]>,
}

impl FirstCluster<'_> {
    /// The bytes up to the last one used. The backing name goes behind the extensions, at `name_at` or later.
    /// `ENOSPC` when it does not fit.
    pub(super) fn build(&self, name_at: usize) -> Result<Vec<u8>, Errno> {
        let mut header = self.header.clone();
        let (name, format) = self.backing.map_or((None, None), |(n, f)| (Some(n), f));
        let mut body = Vec::new();
        if let Some(format) = format {
            ext::put(&mut body, ext::BACKING_FORMAT, format.as_bytes());
        }
        if self.feature_table {
            ext::put(&mut body, ext::FEATURE_TABLE, &ext::feature_table());
        }
        if let Some(data) = &self.bitmaps {
            ext::put(&mut body, ext::BITMAPS, data);
        }
        for (kind, data) in self.unknown_extensions {
            ext::put(&mut body, *kind, data);
        }
        ext::put(&mut body, ext::END, &[]);
        let end = header.length as usize + body.len();
        let at = name_at.max(end);
        // Said before anything is laid out: where the old name was need not be sound when it is empty.
        if at as u64 + name.map_or(0, |n| n.len() as u64) > 1 << header.cluster_bits {
            return Err(Errno::ENOSPC);
        }
        header.backing_offset = name.map_or(0, |_| at as u64);
        header.backing_len = name
            .map_or(Ok(0), |n| u32::try_from(n.len()))
            .map_err(|_| Errno::EINVAL)?;
        let mut out = header.to_bytes();
        let known = out.len() - self.unknown_fields.len();
        out[known..].copy_from_slice(self.unknown_fields);
        out.extend_from_slice(&body);
        if let Some(name) = name {
            out.resize(at, 0);
            out.extend_from_slice(name.as_bytes());
        }
        if out.len() as u64 > 1 << header.cluster_bits {
            return Err(Errno::ENOSPC);
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Header {
        Header {
            version: 3,
            backing_offset: 0,
            backing_len: 0,
            cluster_bits: 16,
            size: 1 << 30,
            crypt_method: 0,
            l1_size: 2,
            l1_offset: 0x30000,
            reftable_offset: 0x10000,
            reftable_clusters: 1,
            nb_snapshots: 0,
            snapshots_offset: 0,
            incompatible: 0,
            compatible: 0,
            autoclear: 0,
            refcount_order: 4,
            length: 112,
            compression: 0,
        }
    }

    /// Everything that opening does with the header alone.
    fn judge(header: &Header) -> Result<(), String> {
        let mut bytes = header.to_bytes();
        bytes.resize(112, 0);
        let bytes: [u8; 112] = bytes[..112].try_into().unwrap();
        let parsed = Header::parse(&bytes).map_err(|e| e.desc)?;
        assert_eq!(&parsed, header);
        let run = || {
            parsed.check_features(&Extensions::default())?;
            let geometry = parsed.geometry()?;
            parsed.check_tables(geometry, 0x40000)
        };
        run().map_err(|e: QmpError| e.desc)
    }

    #[test]
    fn a_good_header_passes_in_both_versions() {
        assert_eq!(judge(&good()), Ok(()));
        assert_eq!(
            judge(&Header {
                version: 2,
                length: 72,
                ..good()
            }),
            Ok(())
        );
    }

    type Case = (&'static str, fn(&mut Header));

    #[test]
    fn each_refusal_has_its_text() {
        let cases: &[Case] = &[
            ("Unsupported qcow2 version 4", |h| h.version = 4),
            ("Unsupported cluster size: 2^8", |h| h.cluster_bits = 8),
            ("Unsupported cluster size: 2^22", |h| h.cluster_bits = 22),
            ("Unsupported cluster size: 2^4294967295", |h| {
                h.cluster_bits = u32::MAX;
            }),
            ("qcow2 header length is not a multiple of 8", |h| h.length = 108),
            ("Invalid backing file offset", |h| h.backing_offset = 0x10001),
            ("Invalid backing file offset", |h| h.backing_offset = 24),
            ("qcow2: unknown compression type: 2", |h| h.compression = 2),
            (
                "qcow2: Compression type incompatible feature bit must not be set",
                |h| h.incompatible = 8,
            ),
            (
                "qcow2: Compression type incompatible feature bit must be set",
                |h| h.compression = 1,
            ),
            ("Unsupported qcow2 feature(s): external data file", |h| {
                h.incompatible = 4;
            }),
            ("Unsupported qcow2 feature(s): compression type", |h| {
                (h.incompatible, h.compression) = (8, 1);
            }),
            (
                "Unsupported qcow2 feature(s): extended L2 entries, Unknown incompatible feature: 8000000000000020",
                |h| h.incompatible = 1 << 63 | 0x30,
            ),
            ("Unsupported encryption method 2", |h| h.crypt_method = 2),
            (
                "Reference count entry width too large; may not exceed 64 bits",
                |h| h.refcount_order = 7,
            ),
            ("Image does not contain a reference count table", |h| {
                h.reftable_clusters = 0;
            }),
            ("Reference count table too large", |h| {
                h.reftable_clusters = u32::MAX;
            }),
            ("Reference count table offset invalid", |h| {
                h.reftable_offset = 0x10200;
            }),
            ("Reference count table offset invalid", |h| {
                h.reftable_offset = !0xffff;
            }),
            ("Snapshot table too large", |h| h.nb_snapshots = 65537),
            ("Snapshot table offset invalid", |h| h.snapshots_offset = 8),
            ("Active L1 table too large", |h| h.l1_size = 4_194_305),
            ("Active L1 table offset invalid", |h| h.l1_offset = 0x40000),
            ("Image is too big", |h| h.size = !511),
            ("Image size is not a multiple of 512 bytes", |h| h.size -= 1),
            ("L1 table is too small", |h| h.size += 512),
        ];
        for (text, spoil) in cases {
            let mut header = good();
            spoil(&mut header);
            assert_eq!(judge(&header), Err((*text).to_owned()));
        }
        let mut bytes: [u8; 112] = good().to_bytes().try_into().unwrap();
        let mut with_length = |length: u32| {
            bytes[100..104].copy_from_slice(&length.to_be_bytes());
            Header::parse(&bytes).unwrap_err().desc
        };
        assert_eq!(with_length(96), "qcow2 header too short");
        assert_eq!(with_length(0x10008), "qcow2 header exceeds cluster size");
        assert_eq!(
            Header::parse(&[0; 112]).unwrap_err().desc,
            "Image is not in qcow2 format"
        );
    }

    #[test]
    fn first_cluster_round_trip() {
        let unknown = vec![(0x1234, b"abc".to_vec()), (0x99, Vec::new())];
        let header = Header {
            cluster_bits: 12,
            ..good()
        };
        let cluster = FirstCluster {
            header: &header,
            unknown_fields: &[],
            backing: Some(("base.img", Some("raw"))),
            unknown_extensions: &unknown,
            feature_table: true,
            bitmaps: None,
        };
        let bytes = cluster.build(0).unwrap();
        let parsed = Header::parse(bytes[..112].try_into().unwrap()).unwrap();
        let read = Extensions::parse(&bytes, &parsed).unwrap();
        assert_eq!(read.backing_format.as_deref(), Some("raw"));
        assert_eq!(read.unknown, unknown);
        assert_eq!(read.features.len(), 8);
        let at = usize::try_from(parsed.backing_offset).unwrap();
        assert_eq!(&bytes[at..at + parsed.backing_len as usize], b"base.img");
        let long = "x".repeat(1023);
        let small = Header {
            cluster_bits: 9,
            ..good()
        };
        let full = FirstCluster {
            header: &small,
            backing: Some((&long, None)),
            feature_table: false,
            ..cluster
        };
        assert_eq!(full.build(0), Err(Errno::ENOSPC));
    }
}
