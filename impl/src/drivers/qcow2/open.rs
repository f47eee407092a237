//! Opening an image: header, extensions, tables, and the checks that need no walk over the data.
//!
//! Rules: nothing is allocated before the file is known to hold it. A writable open refuses images whose metadata
//! structures collide or lie outside the file; reading such an image stays possible.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;

use serde_json::{Map, Value};

use super::cache::Cache;
use super::epoch::Epochs;
use super::ext::Extensions;
use super::header::{Header, INCOMPAT_CORRUPT, INCOMPAT_DIRTY};
use super::image::{Health, Meta, PassDiscard, Qcow2};
use super::l2::OFFSET;
use super::limits;
use super::lock::{Gate, ImageLock};
use super::overlap::{Overlap, Structure};
use super::snapshot::{self, Snapshot};
use super::units::{ClusterIndex, Geometry, us};
use crate::driver::{Cx, Driver, OpenArgs};
use crate::error::{Errno, QmpError};
use crate::types::{EdgeId, ReqFlags, Role};

/// Opens the image in `args.file`.
pub(super) async fn open(cx: &Cx, args: OpenArgs<'_>) -> Result<Rc<dyn Driver>, QmpError> {
    let options = Options::take(args.options)?;
    let child = args
        .file
        .ok_or_else(|| QmpError::generic("A block device must be specified for \"file\""))?;
    let file = cx.layer.attach_child(&cx.node, child, "file", Role::IMAGE)?;
    let reader = Reader {
        cx,
        file,
        length: cx.layer.node(child).length(),
    };
    let (header, extensions, raw) = reader.header().await?;
    let writable = cx.node.is_writable();
    check_writable_features(&header, writable)?;
    options.check(header.version)?;
    let geometry = header.geometry()?;
    header.check_tables(geometry, reader.length)?;
    let (snapshots, table_bytes) = reader.snapshots(&header, geometry).await?;
    let l1_bytes = u64::from(header.l1_size) * 8;
    let l1 = reader
        .table(header.l1_offset, l1_bytes, "Could not read L1 table")
        .await?;
    let reftable_bytes = u64::from(header.reftable_clusters) << geometry.cluster_bits;
    let text = "Could not initialize refcount handling";
    let reftable = reader.table(header.reftable_offset, reftable_bytes, text).await?;
    let backing = backing_name(&header, &extensions, &raw)?;
    let overlap = fixed_structures(&header, geometry, &snapshots, table_bytes)?;
    let pages = |bytes: u64| us((bytes >> geometry.cluster_bits).max(limits::MIN_CACHE_PAGES));
    let meta = Meta {
        raw,
        backing,
        unknown_extensions: extensions.unknown,
        feature_table: extensions.feature_table,
        extensions_end: extensions.end,
        bitmaps: extensions.any_bitmaps,
        stored: Vec::new(),
        directory: None,
        l1,
        l1_dirty: BTreeSet::new(),
        l2: Cache::new(pages(options.l2_cache.unwrap_or(limits::L2_CACHE_BYTES))),
        reftable,
        reftable_dirty: BTreeSet::new(),
        refblocks: Cache::new(pages(
            options.refcount_cache.unwrap_or(limits::REFBLOCK_CACHE_BYTES),
        )),
        overlap,
        problem: None,
        header_uncertain: false,
        free_index: 0,
        virgin_from: reader.length,
        packed_end: 0,
        freed: Vec::new(),
        freed_clusters: 0,
        durable: Vec::new(),
        in_flight: Vec::new(),
        next_allocation: 0,
        kept_zero: None,
        scratch: Vec::new(),
        header,
    };
    let image = Qcow2 {
        geometry,
        meta: RefCell::new(meta),
        lock: ImageLock::default(),
        epochs: Epochs::default(),
        settled: Gate::default(),
        health: Cell::new(Health::Good),
        ready_to_write: Cell::new(false),
        pass_discard: Cell::new(options.pass_discard()),
        inflated: RefCell::new(None),
    };
    image.check_references(cx, writable).await?;
    if let Some(data) = &extensions.bitmaps {
        image.load_bitmaps(cx, data).await?;
    }
    if writable {
        let prepared = image.thaw_bitmaps(cx).await;
        prepared.map_err(|e| QmpError::errno("Could not update qcow2 header", e))?;
    }
    Ok(Rc::new(image))
}

/// Refuses to write to images that need repair.
pub(super) fn check_writable_features(header: &Header, writable: bool) -> Result<(), QmpError> {
    if writable && header.incompatible & INCOMPAT_CORRUPT != 0 {
        return Err(QmpError::generic(
            "qcow2: Image is corrupt; cannot be opened read/write",
        ));
    }
    if writable && header.incompatible & INCOMPAT_DIRTY != 0 {
        let text = "qcow2: Image is dirty (its refcounts may be stale); repair it with 'qemu-img check -r all' \
                    or open it read-only";
        return Err(QmpError::generic(text));
    }
    Ok(())
}

/// Driver options.
#[derive(Debug, Default)]
struct Options {
    lazy_refcounts: Option<bool>,
    pass_request: Option<bool>,
    pass_other: bool,
    l2_cache: Option<u64>,
    refcount_cache: Option<u64>,
}

/// What a reopen may change or leave out.
pub(super) const MUTABLE_OPTIONS: [&str; 12] = [
    "cache-clean-interval",
    "cache-size",
    "discard-no-unref",
    "l2-cache-entry-size",
    "l2-cache-size",
    "lazy-refcounts",
    "overlap-check",
    "overlap-check.template",
    "pass-discard-other",
    "pass-discard-request",
    "pass-discard-snapshot",
    "refcount-cache-size",
];

impl Options {
    fn check(&self, version: u32) -> Result<(), QmpError> {
        if self.lazy_refcounts == Some(true) && version < 3 {
            let text = "Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level";
            return Err(QmpError::generic(text));
        }
        Ok(())
    }

    fn pass_discard(&self) -> PassDiscard {
        PassDiscard {
            request: self.pass_request,
            other: self.pass_other,
        }
    }

    /// Removes what qcow2 knows from `options`.
    fn take(options: &mut Map<String, Value>) -> Result<Options, QmpError> {
        let mut out = Options {
            lazy_refcounts: take_bool(options, "lazy-refcounts")?,
            pass_request: take_bool(options, "pass-discard-request")?,
            pass_other: take_bool(options, "pass-discard-other")?.unwrap_or(false),
            l2_cache: take_size(options, "l2-cache-size")?,
            refcount_cache: take_size(options, "refcount-cache-size")?,
        };
        if let Some(both) = take_size(options, "cache-size")? {
            let rest = both.saturating_sub(out.refcount_cache.unwrap_or(0));
            out.l2_cache = out.l2_cache.or(Some(rest));
        }
        // Snapshots are never deleted here, tables are cached whole, unused ones cost nothing to keep, and
        // overlaps are always checked.
        take_bool(options, "pass-discard-snapshot")?;
        take_size(options, "l2-cache-entry-size")?;
        take_size(options, "cache-clean-interval")?;
        options.shift_remove("overlap-check");
        Ok(out)
    }
}

fn take_bool(options: &mut Map<String, Value>, key: &str) -> Result<Option<bool>, QmpError> {
    match options.shift_remove(key) {
        None => Ok(None),
        Some(Value::Bool(value)) => Ok(Some(value)),
        Some(Value::String(text)) if text == "on" || text == "off" => Ok(Some(text == "on")),
        Some(_) => Err(QmpError::generic(format!(
            "Invalid parameter type for '{key}', expected: boolean"
        ))),
    }
}

fn take_size(options: &mut Map<String, Value>, key: &str) -> Result<Option<u64>, QmpError> {
    let Some(value) = options.shift_remove(key) else {
        return Ok(None);
    };
    let size = value.as_u64().or_else(|| value.as_str()?.parse().ok());
    // No cache can use more than the tables of the largest image; the bound keeps the page count small.
    size.map(|s| Some(s.min(1 << 40)))
        .ok_or_else(|| QmpError::generic(format!("Invalid parameter type for '{key}', expected: integer")))
}

/// Reads of an image that is not open yet.
struct Reader<'a> {
    cx: &'a Cx,
    file: EdgeId,
    /// Of the file, whole sectors.
    length: u64,
}

impl Reader<'_> {
    async fn read(&self, at: u64, buf: &mut [u8]) -> Result<(), Errno> {
        self.cx.layer.read(self.file, at, buf, ReqFlags::empty()).await
    }

    /// Header, extensions and the used part of the first cluster.
    async fn header(&self) -> Result<(Header, Extensions, Vec<u8>), QmpError> {
        let unreadable = |e| QmpError::errno("Could not read qcow2 header", e);
        let mut fixed = [0; 112];
        self.read(0, &mut fixed).await.map_err(unreadable)?;
        let header = Header::parse(&fixed)?;
        let mut raw = vec![0; us(self.length.min(1 << header.cluster_bits)).max(512)];
        self.read(0, &mut raw).await.map_err(unreadable)?;
        let extensions = Extensions::parse(&raw, &header)?;
        header.check_features(&extensions)?;
        let name_end = us(header.backing_offset).saturating_add(header.backing_len as usize);
        let used = extensions.end.max(name_end).max(512);
        raw.truncate(used);
        raw.shrink_to_fit();
        Ok((header, extensions, raw))
    }

    /// A table of 64-bit entries that the caller has checked to lie in the file.
    async fn table(&self, at: u64, bytes: u64, text: &str) -> Result<Vec<u64>, QmpError> {
        let mut raw = vec![0; us(bytes)];
        if !raw.is_empty() {
            self.read(at, &mut raw)
                .await
                .map_err(|e| QmpError::errno(text, e))?;
        }
        let entry = |b: &[u8]| u64::from_be_bytes(b.try_into().expect("eight bytes"));
        Ok(raw.chunks_exact(8).map(entry).collect())
    }

    /// Snapshots and the length of their table.
    async fn snapshots(&self, header: &Header, geometry: Geometry) -> Result<(Vec<Snapshot>, u64), QmpError> {
        if header.nb_snapshots == 0 {
            return Ok((Vec::new(), 0));
        }
        // An entry has at most 40 + 1024 + 2 * 65535 + 7 bytes.
        let most = u64::from(header.nb_snapshots) * 132_141;
        let room = self.length.saturating_sub(header.snapshots_offset);
        let mut raw = vec![0; us(most.min(room).min(limits::MAX_SNAPSHOT_TABLE))];
        let read = self.read(header.snapshots_offset, &mut raw).await;
        read.map_err(|e| QmpError::errno("Could not read snapshots", e))?;
        snapshot::parse(&raw, header.nb_snapshots, geometry, self.length)
    }
}

/// Backing name and format.
fn backing_name(
    header: &Header,
    extensions: &Extensions,
    raw: &[u8],
) -> Result<Option<(String, Option<String>)>, QmpError> {
    if header.backing_offset == 0 || header.backing_len == 0 {
        return Ok(None);
    }
    let (at, len) = (header.backing_offset, u64::from(header.backing_len));
    if len > limits::MAX_BACKING_NAME || len > (1 << header.cluster_bits) - at {
        return Err(QmpError::generic("Backing file name too long"));
    }
    let bytes = raw
        .get(us(at)..us(at + len))
        .ok_or_else(|| QmpError::generic("Could not read backing file name"))?;
    match std::str::from_utf8(bytes) {
        Ok(name) if !name.contains('\0') => Ok(Some((name.to_owned(), extensions.backing_format.clone()))),
        _ => Err(QmpError::generic("Backing file name is not valid text")),
    }
}

/// The structures that the header places; they must not collide.
fn fixed_structures(
    header: &Header,
    geometry: Geometry,
    snapshots: &[Snapshot],
    snapshot_bytes: u64,
) -> Result<Overlap, QmpError> {
    let mut overlap = Overlap::default();
    let cluster = |at: u64| at >> geometry.cluster_bits;
    let mut add = |at: u64, bytes: u64, kind: Structure| {
        let added = overlap.insert(cluster(at), geometry.clusters(bytes), kind);
        added
            .map_err(|hit| QmpError::generic(format!("The {} overlaps with the {}", kind.name(), hit.name())))
    };
    add(0, 1, Structure::Header)?;
    add(
        header.reftable_offset,
        u64::from(header.reftable_clusters) << geometry.cluster_bits,
        Structure::Reftable,
    )?;
    add(
        header.l1_offset,
        u64::from(header.l1_size) * 8,
        Structure::ActiveL1,
    )?;
    add(header.snapshots_offset, snapshot_bytes, Structure::SnapshotTable)?;
    for snapshot in snapshots {
        add(snapshot.l1_offset.0, snapshot.l1_bytes, Structure::InactiveL1)?;
    }
    Ok(overlap)
}

impl Qcow2 {
    /// Looks at every L2 table and refcount block named: aligned, inside the file, disjoint from everything. An L2
    /// table named twice needs a refcount of two, and so on: each use that goes lowers it. Violations refuse a
    /// writable open; metadata past the end of the file (a truncated image) refuses any.
    pub(super) async fn check_references(&self, cx: &Cx, writable: bool) -> Result<(), QmpError> {
        let geometry = self.geometry;
        let length = self.host_length(cx);
        let mut problem: Option<String> = None;
        // L2 tables once more for each use after the first.
        let mut again = Vec::new();
        {
            let mut meta = self.meta.borrow_mut();
            let meta = &mut *meta;
            let blocks = meta.reftable.iter().map(|e| (e & !0x1ff, Structure::Refblock));
            let tables = meta.l1.iter().map(|e| (e & OFFSET, Structure::ActiveL2));
            for (at, kind) in blocks.chain(tables).filter(|(at, _)| *at != 0) {
                let name = kind.name();
                if at.checked_add(geometry.cs()).is_none_or(|end| end > length) {
                    let text = format!("Image is truncated: {name} at {at:#x} is outside of the file");
                    return Err(QmpError::generic(text));
                }
                if geometry.within(at) != 0 {
                    problem.get_or_insert_with(|| format!("{name} offset {at:#x} unaligned"));
                    continue;
                }
                let cluster = at >> geometry.cluster_bits;
                match meta.overlap.insert(cluster, 1, kind) {
                    Err(Structure::ActiveL2) if kind == Structure::ActiveL2 => {
                        again.push(cluster);
                    }
                    Err(hit) => {
                        let text = || format!("The {name} at {at:#x} overlaps with the {}", hit.name());
                        problem.get_or_insert_with(text);
                    }
                    Ok(()) => {}
                }
            }
        }
        // Also for a reader, which may become a writer later.
        let _guard = self.lock.lock().await;
        again.sort_unstable();
        for same in again.chunk_by(|a, b| a == b) {
            let (cluster, uses) = (ClusterIndex(same[0]), same.len() as u64 + 1);
            // An unreadable refcount is as bad as a low one, for a writer.
            if self.refcount(cx, cluster).await.unwrap_or(0) < uses {
                let at = geometry.host(cluster).0;
                let times = if uses == 2 {
                    "twice".to_owned()
                } else {
                    format!("{uses} times")
                };
                problem.get_or_insert_with(|| format!("L2 table at {at:#x} is used {times}"));
            }
        }
        let problem = problem.map(|text| format!("qcow2: Image is corrupt: {text}"));
        match problem {
            Some(text) if writable => Err(QmpError::generic(text)),
            problem => {
                self.meta.borrow_mut().problem = problem;
                Ok(())
            }
        }
    }

    /// Judges options of a reopen and takes out what is ours.
    pub(super) fn judge_options(&self, options: &mut Map<String, Value>) -> Result<(), QmpError> {
        Options::take(options)?.check(self.meta.borrow().header.version)?;
        options.shift_remove("discard-no-unref");
        options.retain(|key, _| !key.starts_with("overlap-check."));
        Ok(())
    }

    /// Goes by options that were judged.
    pub(super) fn follow_options(&self, options: &Map<String, Value>) {
        let options = Options::take(&mut options.clone()).expect("judged before");
        self.pass_discard.set(options.pass_discard());
    }

    /// Prepares a switch between read-only and writable.
    pub(super) async fn switch_writable(&self, cx: &Cx, writable: bool) -> Result<(), QmpError> {
        if !writable {
            self.freeze_bitmaps(cx).await?;
            let failed = |e| QmpError::errno("Could not write back metadata", e);
            return self.write_back(cx).await.map_err(failed);
        }
        check_writable_features(&self.meta.borrow().header, true)?;
        // What was not looked at for a reader: see `check_references`.
        if let Some(text) = self.meta.borrow().problem.clone() {
            return Err(QmpError::generic(text));
        }
        if self.health.get() != Health::Good {
            return Err(QmpError::generic(
                "qcow2: Image is corrupt; cannot be opened read/write",
            ));
        }
        if cx.node.is_writable() {
            // It was to become read-only, and stays as it is.
            let failed = |e| QmpError::errno("Failed to make dirty bitmaps writable", e);
            return self.thaw_bitmaps(cx).await.map_err(failed);
        }
        // The header itself is prepared when the node may write.
        Ok(())
    }
}
