//! Lays out the images of a scenario, straight as bytes.
//!
//! Rules: the result is what `qemu-img check` calls clean. Fills apply in order. A cluster takes the form of the last
//! fill that touches it, except that a zero fill over a part of a data cluster only zeroes that part. Host clusters of
//! zero-allocated clusters hold garbage, so that a layer which reads them is seen, and so do two of three free ones; the others hold
//! zeroes, which in a lost table are other mistakes.
//! File layout: header, refcount table, refcount blocks, L1, L2 tables, data clusters, compressed data, free clusters.

use super::{bits_of, deflate::deflate, to_usize};
use crate::scenario::{Fill, Format, Image, Stored};
use crate::stamp::{self, Source};

const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
const SECTOR: u64 = 512;
/// What reserved host clusters hold.
const GARBAGE: u8 = 0xa5;

/// How guest clusters of a qcow2 image are stored: (cluster index, form), ascending; the rest is unallocated.
#[must_use]
pub fn forms(image: &Image) -> Vec<(u64, Stored)> {
    let size = u64::from(image.cluster_size);
    // (cluster, fill, covers the whole cluster)
    let mut touched: Vec<(u64, Stored, bool)> = Vec::new();
    for fill in image.fill.iter().filter(|f| f.length > 0) {
        let end = fill.offset + fill.length;
        for cluster in fill.offset / size..end.div_ceil(size) {
            let cluster_end = ((cluster + 1) * size).min(image.size);
            let whole = fill.offset <= cluster * size && end >= cluster_end;
            touched.push((cluster, fill.stored, whole));
        }
    }
    // Stable: fills of one cluster stay in their order.
    touched.sort_by_key(|&(cluster, _, _)| cluster);
    let mut forms: Vec<(u64, Stored)> = Vec::with_capacity(touched.len());
    for (cluster, stored, whole) in touched {
        match forms.last_mut() {
            Some((last, form)) if *last == cluster => {
                let is_zero = |s: Stored| matches!(s, Stored::Zero | Stored::ZeroAllocated);
                if !is_zero(stored) || whole || is_zero(*form) {
                    *form = stored;
                }
            }
            _ => forms.push((cluster, stored)),
        }
    }
    forms
}

/// The guest bytes of one range of the image's own layer: zero where nothing is filled.
pub fn content(image: &Image, index: u16, grain: u32, offset: u64, buf: &mut [u8]) {
    buf.fill(0);
    let end = (offset + buf.len() as u64).min(image.size);
    for (i, fill) in image.fill.iter().enumerate() {
        let (from, to) = (fill.offset.max(offset), (fill.offset + fill.length).min(end));
        if from >= to {
            continue;
        }
        let part = &mut buf[to_usize(from - offset)..to_usize(to - offset)];
        match fill.stored {
            Stored::Zero | Stored::ZeroAllocated => part.fill(0),
            Stored::Data | Stored::Compressed => {
                let fill = u16::try_from(i).expect("validated");
                stamp_range(part, from, grain, Source::Fill { image: index, fill });
            }
        }
    }
}

/// Like [`stamp::fill`] for a range that begins inside a grain (at a multiple of 16).
fn stamp_range(mut buf: &mut [u8], mut offset: u64, grain: u32, source: Source) {
    let head = offset % u64::from(grain);
    if head != 0 {
        let length = to_usize(u64::from(grain) - head).min(buf.len());
        let (first, rest) = buf.split_at_mut(length);
        stamp::fill(first, offset - head, grain, source);
        (buf, offset) = (rest, offset + length as u64);
    }
    stamp::fill(buf, offset, grain, source);
}

/// Appends the image file's bytes to the empty `out`. `index`: position among the scenario's images, for the stamps.
///
/// # Panics
/// On an image that validation refuses.
pub fn build(image: &Image, index: u16, grain: u32, out: &mut Vec<u8>) {
    assert!(out.is_empty(), "an empty buffer");
    match image.format {
        Format::Raw => {
            out.resize(to_usize(image.size), 0);
            content(image, index, grain, 0, out);
        }
        Format::Qcow2 => Layout::new(image, index, grain).write(out),
    }
}

/// The ranges of a raw image's file that are not holes: (offset, bytes).
pub fn raw_data(image: &Image) -> impl Iterator<Item = (u64, u64)> + '_ {
    image
        .fill
        .iter()
        .filter(|f: &&Fill| f.stored == Stored::Data)
        .map(|f| (f.offset, f.length))
}

/// Compressed clusters, one after another, relative to the start of their area.
#[derive(Default)]
struct Packed {
    bytes: Vec<u8>,
    /// (start, length) per compressed cluster.
    blobs: Vec<(u64, u64)>,
    /// How many blobs touch each host cluster.
    counts: Vec<u64>,
}

impl Packed {
    fn add(&mut self, data: &[u8], cluster_size: u64, max_refcount: u64) {
        let mut blob = Vec::with_capacity(data.len());
        deflate(data, &mut blob);
        let length = blob.len() as u64;
        assert!(length < cluster_size, "stamps compress");
        let mut start = self.bytes.len() as u64;
        if !start.is_multiple_of(cluster_size) && self.counts.last().is_some_and(|&n| n >= max_refcount) {
            start = start.next_multiple_of(cluster_size);
        }
        let (first, end) = (start / cluster_size, (start + length).div_ceil(cluster_size));
        self.counts.resize(to_usize(end).max(self.counts.len()), 0);
        for cluster in first..end {
            self.counts[to_usize(cluster)] += 1;
        }
        self.bytes.resize(to_usize(start), 0);
        self.bytes.extend_from_slice(&blob);
        self.blobs.push((start, length));
    }
}

/// Where everything goes; in clusters unless said otherwise.
struct Layout<'a> {
    image: &'a Image,
    index: u16,
    grain: u32,
    bits: u32,
    forms: Vec<(u64, Stored)>,
    packed: Packed,
    l1_entries: u64,
    /// L1 indices that have a table, ascending.
    tables: Vec<u64>,
    refcount_blocks: u64,
    refcount_table: u64,
    l1: u64,
    l2: u64,
    data: u64,
    compressed: u64,
    used: u64,
    total: u64,
}

impl<'a> Layout<'a> {
    fn new(image: &'a Image, index: u16, grain: u32) -> Layout<'a> {
        let bits = bits_of(image.cluster_size);
        let size = u64::from(image.cluster_size);
        let l2_entries = size / 8;
        let forms = forms(image);
        let mut packed = Packed::default();
        let mut scratch = Vec::new();
        let max_refcount = u64::MAX >> (64 - image.refcount_bits);
        for &(cluster, _) in forms.iter().filter(|f| f.1 == Stored::Compressed) {
            scratch.resize(to_usize(size), 0);
            content(image, index, grain, cluster * size, &mut scratch);
            packed.add(&scratch, size, max_refcount);
        }
        let mut tables: Vec<u64> = forms.iter().map(|(cluster, _)| cluster / l2_entries).collect();
        tables.dedup();
        let l1_entries = image.size.div_ceil(size * l2_entries).max(1);
        let l1_clusters = (l1_entries * 8).div_ceil(size);
        let hosts = forms
            .iter()
            .filter(|f| matches!(f.1, Stored::Data | Stored::ZeroAllocated))
            .count() as u64;
        let free = u64::from(image.free);
        let payload = 1 + l1_clusters + tables.len() as u64 + hosts + packed.counts.len() as u64 + free;
        let per_block = size * 8 / u64::from(image.refcount_bits);
        // Refcount blocks count themselves and the table, so their number is a fixed point.
        let (mut blocks, mut table) = (1, 1);
        loop {
            let needed = (payload + blocks + table).div_ceil(per_block);
            let needed_table = (needed * 8).div_ceil(size);
            if needed <= blocks && needed_table <= table {
                break;
            }
            (blocks, table) = (needed.max(blocks), needed_table.max(table));
        }
        let l1 = 1 + table + blocks;
        let l2 = l1 + l1_clusters;
        let data = l2 + tables.len() as u64;
        let compressed = data + hosts;
        let used = compressed + packed.counts.len() as u64;
        let total = used + free;
        Layout {
            image,
            index,
            grain,
            bits,
            forms,
            packed,
            l1_entries,
            tables,
            refcount_blocks: blocks,
            refcount_table: table,
            l1,
            l2,
            data,
            compressed,
            used,
            total,
        }
    }

    fn write(&self, out: &mut Vec<u8>) {
        out.resize(to_usize(self.total << self.bits), 0);
        self.header(out);
        self.refcounts(out);
        self.mappings(out);
        let start = to_usize(self.compressed << self.bits);
        out[start..start + self.packed.bytes.len()].copy_from_slice(&self.packed.bytes);
        for cluster in (self.used..self.total).filter(|cluster| !cluster.is_multiple_of(3)) {
            out[to_usize(cluster << self.bits)..to_usize((cluster + 1) << self.bits)].fill(GARBAGE);
        }
    }

    fn header(&self, out: &mut [u8]) {
        let v3 = self.image.compat == 3;
        let header_length: u32 = if v3 { 112 } else { 72 };
        put32(out, 0, 0x5146_49fb);
        put32(out, 4, self.image.compat);
        put32(out, 20, self.bits);
        put64(out, 24, self.image.size);
        put32(out, 36, u32::try_from(self.l1_entries).expect("validated"));
        put64(out, 40, self.l1 << self.bits);
        put64(out, 48, 1 << self.bits);
        put32(out, 56, u32::try_from(self.refcount_table).expect("validated"));
        if v3 {
            put32(out, 96, self.image.refcount_bits.trailing_zeros());
            put32(out, 100, header_length);
        }
        let mut at = header_length as usize;
        if let Some(format) = &self.image.backing_format {
            put32(out, at, 0xe279_2aca);
            put32(out, at + 4, u32::try_from(format.len()).expect("validated"));
            out[at + 8..at + 8 + format.len()].copy_from_slice(format.as_bytes());
            at += 8 + format.len().next_multiple_of(8);
        }
        // The end mark is eight zero bytes.
        at += 8;
        if let Some(backing) = &self.image.backing_file {
            assert!(
                at + backing.len() <= 1 << self.bits,
                "validated: the header fits its cluster"
            );
            put64(out, 8, at as u64);
            put32(out, 16, u32::try_from(backing.len()).expect("validated"));
            out[at..at + backing.len()].copy_from_slice(backing.as_bytes());
        }
    }

    fn refcounts(&self, out: &mut [u8]) {
        let size = 1u64 << self.bits;
        let first_block = 1 + self.refcount_table;
        for i in 0..self.refcount_blocks {
            put64(out, to_usize(size + i * 8), (first_block + i) << self.bits);
        }
        // Blocks lie side by side, so the entries of all of them form one array.
        let base = to_usize(first_block << self.bits);
        let width = self.image.refcount_bits;
        for cluster in 0..self.used {
            let count = if cluster < self.compressed {
                1
            } else {
                self.packed.counts[to_usize(cluster - self.compressed)]
            };
            put_refcount(&mut out[base..], width, cluster, count);
        }
    }

    fn mappings(&self, out: &mut [u8]) {
        let size = 1u64 << self.bits;
        let per_table = size / 8;
        for (i, &table) in self.tables.iter().enumerate() {
            let offset = (self.l2 + i as u64) << self.bits;
            put64(out, to_usize((self.l1 << self.bits) + table * 8), offset | COPIED);
        }
        let (mut host, mut blob, mut table) = (self.data, 0, 0);
        for &(cluster, stored) in &self.forms {
            while self.tables[table] != cluster / per_table {
                table += 1;
            }
            let entry_at = ((self.l2 + table as u64) << self.bits) + cluster % per_table * 8;
            let entry = match stored {
                Stored::Zero => ZERO,
                Stored::Data | Stored::ZeroAllocated => {
                    let offset = host << self.bits;
                    host += 1;
                    let bytes = &mut out[to_usize(offset)..to_usize(offset + size)];
                    if stored == Stored::Data {
                        content(self.image, self.index, self.grain, cluster * size, bytes);
                        offset | COPIED
                    } else {
                        bytes.fill(GARBAGE);
                        offset | COPIED | ZERO
                    }
                }
                Stored::Compressed => {
                    let (start, length) = self.packed.blobs[blob];
                    blob += 1;
                    let start = (self.compressed << self.bits) + start;
                    let sectors = (start + length - 1) / SECTOR - start / SECTOR;
                    COMPRESSED | sectors << (70 - self.bits) | start
                }
            };
            put64(out, to_usize(entry_at), entry);
        }
    }
}

fn put32(out: &mut [u8], at: usize, value: u32) {
    out[at..at + 4].copy_from_slice(&value.to_be_bytes());
}

fn put64(out: &mut [u8], at: usize, value: u64) {
    out[at..at + 8].copy_from_slice(&value.to_be_bytes());
}

/// Entry `index` of an array of refcounts `width` bits wide.
fn put_refcount(array: &mut [u8], width: u32, index: u64, value: u64) {
    if width < 8 {
        let bit = index * u64::from(width);
        array[to_usize(bit / 8)] |= u8::try_from(value << (bit % 8)).expect("within the width");
    } else {
        let bytes = (width / 8) as usize;
        let at = to_usize(index) * bytes;
        array[at..at + bytes].copy_from_slice(&value.to_be_bytes()[8 - bytes..]);
    }
}
