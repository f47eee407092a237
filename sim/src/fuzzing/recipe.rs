//! Images of the `qcow2_open` target that start sound: built like a scenario's images, with what the builder does not
//! make (a snapshot, bitmaps, a feature table, unknown extensions and fields) put in, then patched where it hurts.
//!
//! Rules: whatever the bytes, `build` makes an image of at most a few hundred KiB. Without patches it is sound.

use arbitrary::{Arbitrary, Unstructured};

use super::layout::{COPIED, Tables, get32, get64, put32, put64};
use crate::image;
use crate::scenario::{Fill, Format, Image, Stored};

/// What the image is made of. Fields are wrapped into their range, so that every value means something.
#[derive(Clone, Debug, Default)]
pub(super) struct Recipe {
    /// Chooses the cluster size: see [`CLUSTER_BITS`].
    pub(super) bits: u8,
    /// Virtual size, sectors, above one.
    pub(super) sectors: u16,
    /// [`V2`], [`BACKING`], and log2 of the refcount width above bit [`ORDER`].
    pub(super) flags: u8,
    /// [`SNAPSHOT`] and so on.
    pub(super) extras: u8,
    /// How it is stored, from which sector, how many.
    pub(super) fills: Vec<(u8, u16, u16)>,
    pub(super) patches: Vec<Patch>,
}

pub(super) const V2: u8 = 1;
pub(super) const BACKING: u8 = 2;
pub(super) const ORDER: u8 = 4;

pub(super) const SNAPSHOT: u8 = 1;
pub(super) const BITMAPS: u8 = 2;
pub(super) const FEATURE_TABLE: u8 = 4;
pub(super) const UNKNOWN_EXTENSION: u8 = 8;
pub(super) const LAZY: u8 = 16;
pub(super) const UNKNOWN_AUTOCLEAR: u8 = 32;
pub(super) const LONG_HEADER: u8 = 64;

/// A change of one place.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub(super) struct Patch {
    pub(super) target: u8,
    pub(super) index: u16,
    pub(super) how: u8,
    pub(super) operand: u64,
}

/// Cluster sizes by `bits`: the small ones run fast and have many tables, so they come first and often.
pub(super) const CLUSTER_BITS: [u8; 16] = [9, 10, 11, 12, 13, 14, 15, 16, 9, 9, 9, 9, 9, 10, 10, 11];

/// Header fields: (offset, bytes).
const FIELDS: [(usize, usize); 20] = [
    (0, 4),
    (4, 4),
    (8, 8),
    (16, 4),
    (20, 4),
    (24, 8),
    (32, 4),
    (36, 4),
    (40, 8),
    (48, 8),
    (56, 4),
    (60, 4),
    (64, 8),
    (72, 8),
    (80, 8),
    (88, 8),
    (96, 4),
    (100, 4),
    (104, 8),
    (112, 8),
];

impl<'a> Arbitrary<'a> for Recipe {
    fn arbitrary(u: &mut Unstructured<'a>) -> arbitrary::Result<Recipe> {
        let (bits, sectors, flags, extras) = (u.arbitrary()?, u.arbitrary()?, u.arbitrary()?, u.arbitrary()?);
        let fills = (0..u.arbitrary::<u8>()? % 9)
            .map(|_| u.arbitrary())
            .collect::<Result<_, _>>()?;
        let patches = (0..u.arbitrary::<u8>()? % 17)
            .map(|_| u.arbitrary())
            .collect::<Result<_, _>>()?;
        Ok(Recipe {
            bits,
            sectors,
            flags,
            extras,
            fills,
            patches,
        })
    }
}

impl Recipe {
    /// The bytes that `arbitrary` reads this recipe from.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let mut out = vec![self.bits];
        out.extend(self.sectors.to_le_bytes());
        out.extend([self.flags, self.extras]);
        out.push(u8::try_from(self.fills.len()).expect("few"));
        for (kind, from, length) in &self.fills {
            out.push(*kind);
            out.extend(from.to_le_bytes());
            out.extend(length.to_le_bytes());
        }
        out.push(u8::try_from(self.patches.len()).expect("few"));
        for patch in &self.patches {
            out.push(patch.target);
            out.extend(patch.index.to_le_bytes());
            out.push(patch.how);
            out.extend(patch.operand.to_le_bytes());
        }
        out
    }

    /// The image file.
    pub(super) fn build(&self) -> Vec<u8> {
        let mut out = Vec::new();
        image::build::build(&self.image(), 0, 512, &mut out);
        self.extend_header(&mut out);
        if self.extras & SNAPSHOT != 0
            && let Some(with) = with_snapshot(&out)
        {
            out = with;
        }
        let tables = Tables::of(&out);
        for patch in &self.patches {
            patch.apply(&mut out, &tables);
        }
        out
    }

    fn image(&self) -> Image {
        let bits = CLUSTER_BITS[usize::from(self.bits) % CLUSTER_BITS.len()];
        // At least a few clusters, at most 512 KiB.
        let sectors = u64::from(self.sectors) % (256 << ((bits - 9) / 2)) % 1024 + 1;
        let v2 = self.flags & V2 != 0;
        let fill = |&(kind, from, length): &(u8, u16, u16)| {
            let from = u64::from(from) % sectors;
            let stored = match kind % 4 {
                1 => Stored::Compressed,
                2 if !v2 => Stored::Zero,
                3 if !v2 => Stored::ZeroAllocated,
                _ => Stored::Data,
            };
            Fill {
                offset: from * 512,
                length: (u64::from(length) % (sectors - from) + 1) * 512,
                stored,
            }
        };
        let backed = self.flags & BACKING != 0;
        Image {
            file: "image".to_owned(),
            format: Format::Qcow2,
            size: sectors * 512,
            cluster_size: 1 << bits,
            compat: if v2 { 2 } else { 3 },
            refcount_bits: if v2 { 16 } else { 1 << (self.flags / ORDER % 7) },
            backing_file: backed.then(|| "base".to_owned()),
            backing_format: backed.then(|| "raw".to_owned()),
            free: 0,
            fill: self.fills.iter().map(fill).collect(),
        }
    }

    /// Puts extensions and unknown fields into the header, as many as the first cluster has room for.
    fn extend_header(&self, out: &mut Vec<u8>) {
        let cluster = 1usize << get32(out, 20);
        let v3 = get32(out, 4) == 3;
        let mut fixed = out[..if v3 { 112 } else { 72 }].to_vec();
        let mut wanted: Vec<(u32, Vec<u8>)> = Vec::new();
        let mut name: Vec<u8> = Vec::new();
        if self.flags & BACKING != 0 {
            wanted.push((0xe279_2aca, b"raw".to_vec()));
            name.extend(b"base");
        }
        if v3 {
            if self.extras & LAZY != 0 {
                fixed[87] |= 1;
            }
            if self.extras & UNKNOWN_AUTOCLEAR != 0 {
                fixed[88] |= 0x40;
            }
            if self.extras & LONG_HEADER != 0 {
                fixed.extend(b"more\0\0\0\0");
                put32(&mut fixed, 100, 120);
            }
        }
        if self.extras & FEATURE_TABLE != 0 {
            let mut entry = vec![0, 5];
            entry.extend(b"a feature of the future");
            entry.resize(48, 0);
            wanted.push((0x6803_f857, entry));
        }
        if self.extras & UNKNOWN_EXTENSION != 0 {
            wanted.push((0x1234_5678, b"kept as it is".to_vec()));
        }
        let mut cluster_of_bitmaps = None;
        if v3 && self.extras & BITMAPS != 0 {
            let at = out.len();
            // A directory with one bitmap, and its table, which says that nothing is dirty.
            let tables = Tables::of(out);
            if tables.add_refcount(out, at / cluster, 1) && tables.add_refcount(out, at / cluster + 1, 1) {
                fixed[95] |= 1;
                let mut body = vec![0, 0, 0, 1, 0, 0, 0, 0];
                body.extend(32u64.to_be_bytes());
                body.extend((at as u64).to_be_bytes());
                wanted.push((0x2385_2875, body));
                cluster_of_bitmaps = Some(at);
            }
        }
        let mut first = fixed;
        for (kind, body) in wanted {
            let size = 8 + body.len().next_multiple_of(8);
            if first.len() + size + 8 + name.len() <= cluster {
                first.extend(kind.to_be_bytes());
                first.extend(u32::try_from(body.len()).expect("short").to_be_bytes());
                first.extend(&body);
                first.resize(first.len().next_multiple_of(8), 0);
            }
        }
        first.resize(first.len() + 8, 0);
        let name_at = if name.is_empty() { 0 } else { first.len() as u64 };
        put64(&mut first, 8, name_at);
        put32(&mut first, 16, u32::try_from(name.len()).expect("short"));
        first.extend(name);
        first.resize(cluster, 0);
        out[..cluster].copy_from_slice(&first);
        if let Some(at) = cluster_of_bitmaps {
            out.resize(at + 2 * cluster, 0);
            put64(out, at, (at + cluster) as u64);
            // One entry; records at once; 2 GiB a bit.
            out[at + 8..at + 16].copy_from_slice(&[0, 0, 0, 1, 0, 0, 0, 2]);
            out[at + 16..at + 25].copy_from_slice(&[1, 31, 0, 1, 0, 0, 0, 0, b'b']);
        }
    }
}

/// The image with one internal snapshot of what it holds; `None` when its refcounts have no room for that.
fn with_snapshot(image: &[u8]) -> Option<Vec<u8>> {
    let tables = Tables::of(image);
    let cluster = tables.cluster;
    let mut out = image.to_vec();
    let l1_bytes = tables.l1.len() * 8;
    let (list_at, l1_at) = (out.len(), out.len() + cluster);
    let count = |out: &mut Vec<u8>, host: usize| tables.add_refcount(out, host, 1).then_some(());
    for host in 0..1 + l1_bytes.div_ceil(cluster) {
        count(&mut out, list_at / cluster + host)?;
    }
    for &table in &tables.l2 {
        count(&mut out, table / cluster)?;
        for at in tables.entries(table) {
            let entry = get64(&out, at);
            put64(&mut out, at, entry & !COPIED);
            if let Some((first, last)) = tables.clusters_of(entry) {
                for host in first..=last {
                    count(&mut out, host)?;
                }
            }
        }
    }
    for &at in &tables.l1 {
        let entry = get64(&out, at);
        put64(&mut out, at, entry & !COPIED);
    }
    let mut list = Vec::new();
    list.extend((l1_at as u64).to_be_bytes());
    list.extend(u32::try_from(tables.l1.len()).ok()?.to_be_bytes());
    list.extend([0, 1, 0, 1]);
    // Date, nanoseconds, clock, and size of the machine's state: none. Then 16 bytes of extra data.
    list.resize(36, 0);
    list.extend(16u32.to_be_bytes());
    list.resize(48, 0);
    list.extend(get64(&out, 24).to_be_bytes());
    list.extend(b"1s");
    list.resize(cluster, 0);
    out.extend(list);
    let l1: Vec<u8> = tables
        .l1
        .iter()
        .flat_map(|at| out[*at..*at + 8].to_vec())
        .collect();
    out.extend(l1);
    out.resize(out.len().next_multiple_of(cluster), 0);
    put32(&mut out, 60, 1);
    put64(&mut out, 64, list_at as u64);
    Some(out)
}

impl Patch {
    fn apply(self, out: &mut Vec<u8>, tables: &Tables) {
        let index = usize::from(self.index);
        let pick = |list: &[usize], n: usize| {
            if list.is_empty() {
                None
            } else {
                Some(list[n % list.len()])
            }
        };
        let entry = |table: Option<usize>, n: usize| table.map(|t| t + 8 * (n % (tables.cluster / 8)));
        let place = match self.target % 8 {
            0 => {
                let (at, bytes) = FIELDS[index % FIELDS.len()];
                if bytes == 4 {
                    let old = u64::from(get32(out, at));
                    let low = self.value(old, out, tables) & 0xffff_ffff;
                    put32(out, at, u32::try_from(low).expect("masked"));
                    return;
                }
                Some(at)
            }
            1 => pick(&tables.reftable, index),
            2 => entry(pick(&tables.refblocks, index / 256), index % 256),
            3 => pick(&tables.l1, index),
            4 | 5 => entry(pick(&tables.l2, index / 64), index % 64),
            6 => Some(index * 8),
            _ => {
                let length = usize::try_from(self.operand % (out.len() as u64 + 1)).expect("of the file");
                out.truncate(length);
                return;
            }
        };
        let Some(at) = place else { return };
        let value = self.value(get64(out, at), out, tables);
        put64(out, at, value);
    }

    /// The new value of a word.
    fn value(self, old: u64, out: &[u8], tables: &Tables) -> u64 {
        let n = usize::from(self.index);
        match self.how % 6 {
            0 => self.operand,
            1 => old ^ 1 << (self.operand % 64),
            2 => old.wrapping_add(self.operand),
            // Something that is there already, so that two things share it.
            3 | 4 => {
                let all = [&tables.reftable, &tables.refblocks, &tables.l1, &tables.l2];
                let list = all[n % 4];
                let at = list.get(usize::try_from(self.operand % 16).expect("small"));
                let at = at.map_or(0, |at| *at as u64) & !(tables.cluster as u64).wrapping_sub(1);
                if self.how % 6 == 3 { at | COPIED } else { at }
            }
            // Another word of the file, counted from its end.
            _ => {
                let words = (out.len() as u64 / 8).max(1);
                let at = usize::try_from(self.operand % words).expect("of the file");
                get64(out, out.len().saturating_sub(8 * (at + 1)))
            }
        }
    }
}
