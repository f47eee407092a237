//! Persistent bitmaps as a closed qcow2 image stores them.
//!
//! Rules: as everywhere here, numbers in the file are distrusted and shared code would mean shared bugs. Bitmaps count only
//! if the header says that they are consistent; what is marked as in use has no bits that mean anything.

use super::read::{OFFSET, Qcow2, be32, be64};

const EXTENSION: u32 = 0x2385_2875;
const AUTOCLEAR: u64 = 1;
/// Most bytes of bits that are read of one bitmap.
const MAX_BYTES: u64 = 16 << 20;

/// A stored bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// Its name.
    pub name: String,
    /// Bytes per bit.
    pub granularity: u64,
    /// It records once the image is open.
    pub auto: bool,
    /// Nobody vouches for its bits.
    pub in_use: bool,
    /// The bits, the lowest of each byte first; empty when in use.
    pub bits: Vec<u8>,
    /// What it takes of the file: (offset, bytes, what).
    pub places: Vec<(u64, u64, &'static str)>,
}

/// A directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Directory {
    /// Its bitmaps, in order.
    pub bitmaps: Vec<Stored>,
    /// Where it is: offset and bytes.
    pub place: (u64, u64),
}

/// The directory; none if the image has none.
///
/// # Errors
/// What cannot be read.
pub fn stored(image: &Qcow2<'_>) -> Result<Option<Directory>, String> {
    let Some(data) = extension(image)? else {
        return Ok(None);
    };
    let word = |at| be32(image.bytes, at).ok_or("the bitmaps extension is cut off");
    let long = |at| be64(image.bytes, at).ok_or("the bitmaps extension is cut off");
    let (count, size, offset) = (word(data)?, long(data + 8)?, long(data + 16)?);
    if count == 0 || size > image.bytes.len() as u64 {
        return Err(format!("a directory of {count} bitmaps in {size} bytes"));
    }
    let mut found = Vec::new();
    let mut at = offset;
    for _ in 0..count {
        let (bitmap, next) = entry(image, at)?;
        found.push(bitmap);
        at = next;
    }
    if at - offset != size {
        return Err(format!("the directory has {} bytes, not {size}", at - offset));
    }
    Ok(Some(Directory {
        bitmaps: found,
        place: (offset, size),
    }))
}

/// Where the data of the extension is, if there is one and it counts.
fn extension(image: &Qcow2<'_>) -> Result<Option<u64>, String> {
    if image.version < 3 || be64(image.bytes, 88).unwrap_or(0) & AUTOCLEAR == 0 {
        return Ok(None);
    }
    let cut = "header extensions run past the end of the file";
    let mut at = u64::from(be32(image.bytes, 100).ok_or(cut)?);
    loop {
        let (kind, length) = (
            be32(image.bytes, at).ok_or(cut)?,
            be32(image.bytes, at + 4).ok_or(cut)?,
        );
        match kind {
            0 => return Ok(None),
            EXTENSION if length != 24 => return Err(format!("a bitmaps extension of {length} bytes")),
            EXTENSION => return Ok(Some(at + 8)),
            _ => at += 8 + u64::from(length).next_multiple_of(8),
        }
    }
}

fn entry(image: &Qcow2<'_>, at: u64) -> Result<(Stored, u64), String> {
    let cut = "the bitmap directory is cut off";
    let word = |at| be32(image.bytes, at).ok_or(cut);
    let table = be64(image.bytes, at).ok_or(cut)?;
    let (entries, flags, kinds) = (u64::from(word(at + 8)?), word(at + 12)?, word(at + 16)?);
    let extra = word(at + 20)?;
    let (kind, shift, name_length) = (kinds >> 24, kinds >> 16 & 0xff, u64::from(kinds & 0xffff));
    if kind != 1 || !(9..=31).contains(&shift) || flags & !3 != 0 || extra != 0 {
        return Err(format!(
            "a bitmap of type {kind}, shift {shift}, flags {flags:#x}, extra {extra}"
        ));
    }
    let start = usize::try_from(at + 24).map_err(|_| cut)?;
    let name = image
        .bytes
        .get(start..)
        .and_then(|rest| rest.get(..usize::try_from(name_length).ok()?));
    let name = String::from_utf8(name.ok_or(cut)?.to_vec()).map_err(|_| "a bitmap's name is no text")?;
    let granularity = 1u64 << shift;
    let in_use = flags & 1 != 0;
    let mut places = vec![(table, entries * 8, "bitmap table")];
    let bits = bits(image, (table, entries), granularity, in_use, &mut places)?;
    let stored = Stored {
        name,
        granularity,
        auto: flags & 2 != 0,
        in_use,
        bits,
        places,
    };
    Ok((stored, at + (24 + name_length).next_multiple_of(8)))
}

fn bits(
    image: &Qcow2<'_>,
    (table, entries): (u64, u64),
    granularity: u64,
    in_use: bool,
    places: &mut Vec<(u64, u64, &'static str)>,
) -> Result<Vec<u8>, String> {
    let size = image.cluster_size();
    let bytes = image.size.div_ceil(granularity).div_ceil(8);
    if !in_use && (entries != bytes.div_ceil(size).max(1) || bytes > MAX_BYTES) {
        return Err(format!("a bitmap table of {entries} entries for {bytes} bytes"));
    }
    let mut out = Vec::new();
    for index in 0..entries {
        let entry = table.checked_add(index * 8).and_then(|at| be64(image.bytes, at));
        let entry = entry.ok_or("a bitmap table is cut off")?;
        let host = entry & OFFSET;
        if entry & !(OFFSET | 1) != 0 || (host != 0 && entry & 1 != 0) {
            return Err(format!("a bitmap table entry {entry:#x}"));
        }
        if host != 0 {
            places.push((host, size, "bitmap data"));
        }
        if in_use {
            continue;
        }
        let wanted =
            usize::try_from(size.min(bytes.saturating_sub(index * size))).map_err(|_| "a long bitmap")?;
        if host == 0 {
            out.extend(std::iter::repeat_n(if entry & 1 == 1 { 0xff } else { 0 }, wanted));
        } else {
            let start = usize::try_from(host).map_err(|_| "bitmap data out of range")?;
            let data = image.bytes.get(start..).and_then(|rest| rest.get(..wanted));
            out.extend_from_slice(data.ok_or("bitmap data past the end of the file")?);
        }
    }
    Ok(out)
}
