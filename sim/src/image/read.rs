//! Reads closed images: guest content through the backing chain, and what each layer has allocated.
//!
//! Rules: every number in the file is distrusted; what cannot be read is an error text, never a panic. Supported is what
//! a run can produce: versions 2 and 3, standard L2 entries, deflate, no snapshots.

use miniz_oxide::inflate::core::{DecompressorOxide, decompress, inflate_flags};

use super::to_usize;
use crate::scenario::Format;

/// Offset bits of L1 and L2 entries.
pub(super) const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Images larger than this are not read, bytes.
const MAX_SIZE: u64 = crate::scenario::validate::MAX_SIZE;
/// Longest backing chain followed.
const MAX_DEPTH: u32 = 64;

/// A parsed qcow2 header.
#[derive(Debug)]
pub struct Qcow2<'a> {
    pub(super) bytes: &'a [u8],
    /// 2 or 3.
    pub version: u32,
    /// log2 of the cluster size.
    pub cluster_bits: u32,
    /// Virtual size, bytes.
    pub size: u64,
    /// Incompatible feature bits: dirty 1, corrupt 2.
    pub incompatible: u64,
    pub(super) refcount_order: u32,
    pub(super) l1_offset: u64,
    pub(super) l1_size: u32,
    pub(super) refcount_table: u64,
    pub(super) refcount_table_clusters: u32,
    pub(super) snapshots: u32,
    pub(super) snapshots_offset: u64,
    /// Backing file name in the header.
    pub backing_file: Option<String>,
    /// Backing format in the header.
    pub backing_format: Option<String>,
}

/// What an L2 entry says of a guest cluster.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mapping {
    /// This layer says nothing.
    Unallocated,
    /// Zeroes; the host offset of a reserved cluster, or 0.
    Zero(u64),
    /// Data at this host offset.
    Data(u64),
    /// Compressed data: host offset and space in bytes.
    Compressed(u64, u64),
}

pub(super) fn be32(bytes: &[u8], at: u64) -> Option<u32> {
    let at = usize::try_from(at).ok()?;
    Some(u32::from_be_bytes(
        bytes.get(at..at.checked_add(4)?)?.try_into().ok()?,
    ))
}

pub(super) fn be64(bytes: &[u8], at: u64) -> Option<u64> {
    let at = usize::try_from(at).ok()?;
    Some(u64::from_be_bytes(
        bytes.get(at..at.checked_add(8)?)?.try_into().ok()?,
    ))
}

impl<'a> Qcow2<'a> {
    /// Reads the header.
    pub fn parse(bytes: &'a [u8]) -> Result<Qcow2<'a>, String> {
        let word = |at| be32(bytes, at).ok_or("the file is shorter than a qcow2 header");
        let long = |at| be64(bytes, at).ok_or("the file is shorter than a qcow2 header");
        if word(0)? != 0x5146_49fb {
            return Err("no qcow2 magic".into());
        }
        let version = word(4)?;
        if !(2..=3).contains(&version) {
            return Err(format!("version {version}"));
        }
        let (incompatible, refcount_order, header_length) = if version == 3 {
            (long(72)?, word(96)?, word(100)?)
        } else {
            (0, 4, 72)
        };
        let image = Qcow2 {
            bytes,
            version,
            cluster_bits: word(20)?,
            size: long(24)?,
            incompatible,
            refcount_order,
            l1_offset: long(40)?,
            l1_size: word(36)?,
            refcount_table: long(48)?,
            refcount_table_clusters: word(56)?,
            snapshots: word(60)?,
            snapshots_offset: long(64)?,
            backing_file: text(bytes, long(8)?, word(16)?)?,
            backing_format: backing_format(bytes, header_length, long(8)?)?,
        };
        if !(9..=21).contains(&image.cluster_bits) {
            return Err(format!("cluster size 2^{}", image.cluster_bits));
        }
        if image.incompatible & !3 != 0 {
            return Err(format!("incompatible features {:#x}", image.incompatible));
        }
        if image.refcount_order > 6 {
            return Err(format!("refcount order {}", image.refcount_order));
        }
        if image.size > MAX_SIZE {
            return Err(format!("virtual size {}", image.size));
        }
        Ok(image)
    }

    /// Cluster size, bytes.
    #[must_use]
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Guest clusters.
    #[must_use]
    pub fn clusters(&self) -> u64 {
        self.size.div_ceil(self.cluster_size())
    }

    pub(super) fn l1_entry(&self, index: u64) -> Result<u64, String> {
        if index >= u64::from(self.l1_size) {
            return Ok(0);
        }
        let at = self
            .l1_offset
            .checked_add(index * 8)
            .ok_or("the L1 table is out of range")?;
        be64(self.bytes, at).ok_or_else(|| format!("L1 entry {index} is past the end of the file"))
    }

    /// What this layer says of a guest cluster.
    pub fn mapping(&self, cluster: u64) -> Result<Mapping, String> {
        let per_table = self.cluster_size() / 8;
        let table = self.l1_entry(cluster / per_table)? & OFFSET;
        if table == 0 {
            return Ok(Mapping::Unallocated);
        }
        let entry = be64(self.bytes, table + cluster % per_table * 8)
            .ok_or_else(|| format!("the L2 table of cluster {cluster} is past the end of the file"))?;
        self.decode(entry)
    }

    pub(super) fn decode(&self, entry: u64) -> Result<Mapping, String> {
        if entry & (1 << 62) != 0 {
            let x = 70 - self.cluster_bits;
            let offset = entry & ((1 << x) - 1);
            let sectors = (entry & ((1 << 62) - 1)) >> x;
            return Ok(Mapping::Compressed(offset, (sectors + 1) * 512 - offset % 512));
        }
        let host = entry & OFFSET;
        Ok(match (entry & 1 == 1, host) {
            (true, _) if self.version < 3 => return Err("a zero cluster in a version 2 image".into()),
            (true, host) => Mapping::Zero(host),
            (false, 0) => Mapping::Unallocated,
            (false, host) => Mapping::Data(host),
        })
    }

    /// Reads one guest cluster that this layer decides into `buf` (a whole cluster, or the last one's part); false
    /// when it does not.
    fn read_cluster(
        &self,
        cluster: u64,
        buf: &mut [u8],
        inflater: &mut DecompressorOxide,
    ) -> Result<bool, String> {
        match self.mapping(cluster)? {
            Mapping::Unallocated => return Ok(false),
            Mapping::Zero(_) => buf.fill(0),
            Mapping::Data(host) => {
                // What is past the end of the file reads as zeroes.
                buf.fill(0);
                let start = to_usize(host).min(self.bytes.len());
                let end = (start + buf.len()).min(self.bytes.len());
                buf[..end - start].copy_from_slice(&self.bytes[start..end]);
            }
            Mapping::Compressed(offset, space) => {
                let start = to_usize(offset).min(self.bytes.len());
                let end = to_usize(offset + space).min(self.bytes.len());
                let mut whole = vec![0; to_usize(self.cluster_size())];
                inflate(inflater, &self.bytes[start..end], &mut whole)
                    .map_err(|e| format!("compressed cluster {cluster}: {e}"))?;
                buf.copy_from_slice(&whole[..buf.len()]);
            }
        }
        Ok(true)
    }
}

fn inflate(state: &mut DecompressorOxide, packed: &[u8], out: &mut [u8]) -> Result<(), String> {
    state.init();
    let flags = inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
    let (status, _, written) = decompress(state, packed, out, 0, flags);
    if written == out.len() {
        Ok(())
    } else {
        Err(format!("{written} bytes, then {status:?}"))
    }
}

fn text(bytes: &[u8], offset: u64, length: u32) -> Result<Option<String>, String> {
    if offset == 0 {
        return Ok(None);
    }
    let start = usize::try_from(offset).map_err(|_| "backing file name out of range")?;
    let end = start
        .checked_add(length as usize)
        .ok_or("backing file name out of range")?;
    let name = bytes
        .get(start..end)
        .ok_or("backing file name past the end of the file")?;
    Ok(Some(String::from_utf8_lossy(name).into_owned()))
}

fn backing_format(bytes: &[u8], header_length: u32, end: u64) -> Result<Option<String>, String> {
    let mut at = u64::from(header_length);
    loop {
        let (Some(kind), Some(length)) = (be32(bytes, at), be32(bytes, at + 4)) else {
            return Err("header extensions run past the end of the file".into());
        };
        if kind == 0 || (end != 0 && at + 8 > end) {
            return Ok(None);
        }
        if kind == 0xe279_2aca {
            return text(bytes, at + 8, length);
        }
        at += 8 + u64::from(length).next_multiple_of(8);
    }
}

/// An image as a guest would see it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Content {
    /// All bytes.
    pub bytes: Vec<u8>,
    /// Runs of (bytes, allocated) of this layer alone, covering its length.
    pub allocated: Vec<(u64, bool)>,
}

/// Files by name.
pub trait Files {
    /// The bytes and the format of a file.
    fn file(&self, name: &str) -> Option<(&[u8], Format)>;
}

/// Reads images, each one once however many chains it is in.
pub struct Reader<'a> {
    files: &'a dyn Files,
    done: Vec<(String, Result<Content, String>)>,
    inflater: Box<DecompressorOxide>,
}

impl std::fmt::Debug for Reader<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Reader({} files read)", self.done.len())
    }
}

impl<'a> Reader<'a> {
    /// Over these files, which do not change meanwhile.
    #[must_use]
    pub fn new(files: &'a dyn Files) -> Reader<'a> {
        Reader {
            files,
            done: Vec::new(),
            inflater: Box::default(),
        }
    }

    /// Content of the image file `name` through its backing chain. Backing files that cannot be found are an error.
    ///
    /// # Errors
    /// What is wrong with the image or one below it.
    pub fn content(&mut self, name: &str) -> Result<&Content, String> {
        let at = self.layer(name, 0);
        self.done[at].1.as_ref().map_err(Clone::clone)
    }

    fn layer(&mut self, name: &str, depth: u32) -> usize {
        if let Some(at) = self.done.iter().position(|(done, _)| done == name) {
            return at;
        }
        let content = self.read(name, depth);
        self.done.push((name.to_owned(), content));
        self.done.len() - 1
    }

    fn read(&mut self, name: &str, depth: u32) -> Result<Content, String> {
        if depth > MAX_DEPTH {
            return Err(format!("'{name}': the backing chain is a circle"));
        }
        let (bytes, format) = self.files.file(name).ok_or_else(|| format!("no file '{name}'"))?;
        let mut content = Content::default();
        if format == Format::Raw {
            content.bytes.extend_from_slice(bytes);
            if !bytes.is_empty() {
                content.allocated.push((bytes.len() as u64, true));
            }
            return Ok(content);
        }
        let image = Qcow2::parse(bytes).map_err(|e| format!("'{name}': {e}"))?;
        // Zero pages cost nothing until they are written, however large the header says that the image is.
        content.bytes = vec![0; to_usize(image.size)];
        if let Some(backing) = &image.backing_file {
            let below = self.layer(&backing_name(backing), depth + 1);
            let below = &self.done[below].1.as_ref().map_err(Clone::clone)?.bytes;
            let shared = below.len().min(content.bytes.len());
            content.bytes[..shared].copy_from_slice(&below[..shared]);
        }
        let size = to_usize(image.cluster_size());
        for (cluster, part) in content.bytes.chunks_mut(size).enumerate() {
            let allocated = image
                .read_cluster(cluster as u64, part, &mut self.inflater)
                .map_err(|e| format!("'{name}': {e}"))?;
            let length = part.len() as u64;
            match content.allocated.last_mut() {
                Some((run, same)) if *same == allocated => *run += length,
                _ => content.allocated.push((length, allocated)),
            }
        }
        Ok(content)
    }
}

/// Content of one image file through its backing chain; see [`Reader::content`].
///
/// # Errors
/// What is wrong with the image or one below it.
pub fn content(files: &dyn Files, name: &str) -> Result<Content, String> {
    Reader::new(files).content(name).cloned()
}

/// The file name in a backing file string, which may be a `json:` description of a node.
fn backing_name(backing: &str) -> String {
    let Some(json) = backing.strip_prefix("json:") else {
        return backing.to_owned();
    };
    let Ok(mut value) = serde_json::from_str::<serde_json::Value>(json) else {
        return backing.to_owned();
    };
    loop {
        for key in ["filename", "file.filename"] {
            if let Some(name) = value.get(key).and_then(serde_json::Value::as_str) {
                return name.to_owned();
            }
        }
        match value.get_mut("file").map(serde_json::Value::take) {
            Some(inner) => value = inner,
            None => return backing.to_owned(),
        }
    }
}
