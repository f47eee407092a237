//! Persistent bitmaps: read at open, marked as in use while the image may be written, stored when that ends.
//!
//! Rules: the extension counts only while autoclear bit 0 is set, which lies in sector 0 as the only thing that has to be
//! atomic: it is cleared before directory or extension change, and set when everything that they name is durable. Bits,
//! tables and directories are always new clusters; the old ones are freed after the switch. Whatever fails leaves bitmaps
//! that are marked as in use, or none: never one that claims to know writes which it missed.

use std::rc::Rc;

use super::bitmap_dir::{self, Stored};
use super::ext;
use super::header::AUTOCLEAR_BITMAPS;
use super::image::{FreeKind, Qcow2};
use super::limits;
use super::overlap::Structure;
use super::units::{ClusterIndex, HostOffset, us};
use crate::dirty::{DirtyBitmap, LONGEST_NAME, Use};
use crate::driver::Cx;
use crate::error::{Errno, QmpError};

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const ALL_ONES: u64 = 1;

impl Qcow2 {
    /// Takes in what a sound extension names. `data`: the extension.
    pub(super) async fn load_bitmaps(&self, cx: &Cx, data: &[u8]) -> Result<(), QmpError> {
        let be64 = |at: usize| u64::from_be_bytes(data[at..at + 8].try_into().expect("eight bytes"));
        let count = u32::from_be_bytes(data[..4].try_into().expect("four bytes"));
        let (size, offset) = (be64(8), be64(16));
        let length = self.host_length(cx);
        if offset.checked_add(size).is_none_or(|end| end > length) {
            return Err(QmpError::generic("Failed to read bitmap directory"));
        }
        let mut directory = vec![0; us(size)];
        let failed = |text: &str| {
            let text = text.to_owned();
            move |errno| QmpError::errno(&text, errno)
        };
        let read = self.host_read(cx, HostOffset(offset), &mut directory).await;
        read.map_err(failed("Failed to read bitmap directory"))?;
        let virtual_size = self.meta.borrow().header.size;
        let all = bitmap_dir::parse(&directory, count, self.geometry, virtual_size, length)?;
        self.place(offset, size, Structure::BitmapDirectory)?;
        for stored in &all {
            self.place(
                stored.table,
                u64::from(stored.entries) * 8,
                Structure::BitmapTable,
            )?;
        }
        let mut bitmaps = Vec::new();
        for stored in &all {
            let bitmap = self.load_bitmap(cx, stored, virtual_size).await?;
            bitmap.read_only.set(!cx.node.is_writable());
            bitmaps.insert(0, Rc::new(bitmap));
        }
        cx.node.bitmaps.replace(bitmaps);
        let mut meta = self.meta.borrow_mut();
        meta.directory = Some((offset, size));
        meta.stored = all;
        Ok(())
    }

    fn place(&self, at: u64, bytes: u64, kind: Structure) -> Result<(), QmpError> {
        let (first, count) = (at >> self.geometry.cluster_bits, self.geometry.clusters(bytes));
        let added = self.meta.borrow_mut().overlap.insert(first, count, kind);
        added
            .map_err(|hit| QmpError::generic(format!("The {} overlaps with the {}", kind.name(), hit.name())))
    }

    async fn load_bitmap(&self, cx: &Cx, stored: &Stored, size: u64) -> Result<DirtyBitmap, QmpError> {
        let bitmap = DirtyBitmap::new(&stored.name, 1 << stored.granularity_bits, size);
        bitmap.persistent.set(true);
        bitmap.enabled.set(stored.auto && !stored.in_use);
        bitmap.inconsistent.set(stored.in_use);
        if stored.in_use {
            return Ok(bitmap);
        }
        let loaded = self.load_bits(cx, stored, &bitmap).await;
        let text = format!("Could not read bitmap '{}'", stored.name);
        loaded.map_err(|errno| QmpError::errno(&text, errno))?;
        Ok(bitmap)
    }

    async fn load_bits(&self, cx: &Cx, stored: &Stored, bitmap: &DirtyBitmap) -> Result<(), Errno> {
        let (cs, length) = (self.geometry.cs(), self.host_length(cx));
        let table = self.read_bitmap_table(cx, stored).await?;
        let mut bytes = vec![0; us(cs)];
        for (index, entry) in (0u64..).zip(table) {
            let host = entry & OFFSET;
            let sound = entry & !(OFFSET | ALL_ONES) == 0 && (host == 0 || entry & ALL_ONES == 0);
            if !sound || self.geometry.within(host) != 0 || host + cs > length.next_multiple_of(cs) {
                return Err(Errno::EINVAL);
            }
            let first = index * cs;
            match (host, entry) {
                (0, 0) => {}
                (0, _) => bitmap.bits.borrow_mut().set(8 * first..8 * (first + cs)),
                _ => {
                    self.host_read(cx, HostOffset(host), &mut bytes).await?;
                    bitmap.bits.borrow_mut().load(first, &bytes);
                }
            }
        }
        // Bits past the end mean nothing.
        bitmap.bits.borrow_mut().truncate(bitmap.len());
        Ok(())
    }

    async fn read_bitmap_table(&self, cx: &Cx, stored: &Stored) -> Result<Vec<u64>, Errno> {
        let mut raw = vec![0; us(u64::from(stored.entries) * 8)];
        self.host_read(cx, HostOffset(stored.table), &mut raw).await?;
        let entry = |bytes: &[u8]| u64::from_be_bytes(bytes.try_into().expect("eight bytes"));
        Ok(raw.chunks_exact(8).map(entry).collect())
    }

    /// What is stored is out of date from now on. Caller holds the image lock.
    async fn mark_in_use(&self, cx: &Cx) -> Result<(), Errno> {
        let (mut stored, directory) = {
            let meta = self.meta.borrow();
            (meta.stored.clone(), meta.directory)
        };
        let Some((at, _)) = directory.filter(|_| stored.iter().any(|s| !s.in_use)) else {
            return Ok(());
        };
        stored.iter_mut().for_each(|s| s.in_use = true);
        self.set_autoclear(cx, false).await?;
        self.host_write(cx, HostOffset(at), &bitmap_dir::build(&stored))
            .await?;
        self.host_flush(cx).await?;
        self.set_autoclear(cx, true).await?;
        self.meta.borrow_mut().stored = stored;
        Ok(())
    }

    /// The image may be written from now on: bitmaps mark, and what is stored of them does not count.
    pub(super) async fn thaw_bitmaps(&self, cx: &Cx) -> Result<(), Errno> {
        let guard = self.lock.lock().await;
        self.prepare_writable(cx).await?;
        self.mark_in_use(cx).await?;
        drop(guard);
        set_read_only(cx, false);
        Ok(())
    }

    /// The image becomes read-only: everything is stored and stays as it is.
    pub(super) async fn freeze_bitmaps(&self, cx: &Cx) -> Result<(), QmpError> {
        if !cx.node.is_writable() && cx.node.bitmaps.borrow().iter().any(|bitmap| bitmap.is_storable()) {
            return Err(QmpError::generic("No write access"));
        }
        let stored = self.store_bitmaps(cx).await;
        stored.map_err(|errno| QmpError::errno("Could not store persistent bitmaps", errno))?;
        set_read_only(cx, true);
        Ok(())
    }

    /// Stores every bitmap that is to be.
    pub(super) async fn store_bitmaps(&self, cx: &Cx) -> Result<(), Errno> {
        let due: Vec<Rc<DirtyBitmap>> = {
            let bitmaps = cx.node.bitmaps.borrow();
            bitmaps
                .iter()
                .filter(|bitmap| bitmap.is_storable())
                .cloned()
                .collect()
        };
        if due.is_empty() {
            return Ok(());
        }
        let _guard = self.lock.lock().await;
        self.prepare_writable(cx).await?;
        let mut taken = Vec::new();
        let result = self.store_all(cx, &due, &mut taken).await;
        if result.is_err() {
            for (first, count) in taken {
                self.free_unlinked(cx, first, count).await;
            }
        }
        result
    }

    async fn store_all(
        &self,
        cx: &Cx,
        due: &[Rc<DirtyBitmap>],
        taken: &mut Vec<(ClusterIndex, u64)>,
    ) -> Result<(), Errno> {
        let mut next = self.meta.borrow().stored.clone();
        let mut replaced = Vec::new();
        for bitmap in due {
            let (table, entries) = self.write_bitmap(cx, bitmap, taken).await?;
            let stored = Stored {
                name: bitmap.name.to_string(),
                granularity_bits: u8::try_from(bitmap.granularity.trailing_zeros()).expect("below 32"),
                auto: bitmap.is_recording(),
                in_use: false,
                table,
                entries,
            };
            match next.iter_mut().find(|old| old.name == stored.name) {
                Some(old) => replaced.push(std::mem::replace(old, stored)),
                None => next.push(stored),
            }
        }
        self.switch_directory(cx, next, replaced, taken).await
    }

    /// Writes bits and table of one bitmap to new clusters: offset and entries of the table.
    async fn write_bitmap(
        &self,
        cx: &Cx,
        bitmap: &DirtyBitmap,
        taken: &mut Vec<(ClusterIndex, u64)>,
    ) -> Result<(u64, u32), Errno> {
        let cs = self.geometry.cs();
        let bytes = bitmap.len().div_ceil(8);
        // An image without bytes has a bitmap without bits, whose table has an entry all the same.
        let entries = bytes.div_ceil(cs).max(1);
        let mut table = vec![0u8; us(self.geometry.clusters(entries * 8) * cs)];
        let mut data = vec![0; us(cs)];
        let bits = bitmap.recorded();
        for index in 0..entries {
            bits.bytes(index * cs, &mut data);
            if data.iter().all(|byte| *byte == 0) {
                continue;
            }
            let first = self.allocate_exact(cx, 1).await?;
            taken.push((first, 1));
            let at = self.geometry.host(first);
            self.host_write(cx, at, &data).await?;
            table[us(index * 8)..us(index * 8 + 8)].copy_from_slice(&at.0.to_be_bytes());
        }
        let clusters = self.geometry.clusters(entries * 8);
        let first = self.allocate_exact(cx, clusters).await?;
        taken.push((first, clusters));
        let at = self.geometry.host(first);
        self.host_write(cx, at, &table).await?;
        Ok((at.0, u32::try_from(entries).map_err(|_| Errno::EFBIG)?))
    }

    /// Another directory takes effect. `gone`: what it no longer names. Caller holds the image lock.
    async fn switch_directory(
        &self,
        cx: &Cx,
        next: Vec<Stored>,
        gone: Vec<Stored>,
        taken: &mut Vec<(ClusterIndex, u64)>,
    ) -> Result<(), Errno> {
        let mut old_clusters = Vec::new();
        for stored in &gone {
            self.clusters_of(cx, stored, &mut old_clusters).await?;
        }
        let mut directory = None;
        if !next.is_empty() {
            let mut bytes = bitmap_dir::build(&next);
            let size = bytes.len() as u64;
            if size > limits::MAX_BITMAP_DIRECTORY || next.len() as u64 > u64::from(limits::MAX_BITMAPS) {
                return Err(Errno::EFBIG);
            }
            let clusters = self.geometry.clusters(size);
            let first = self.allocate_exact(cx, clusters).await?;
            taken.push((first, clusters));
            bytes.resize(us(clusters * self.geometry.cs()), 0);
            self.host_write(cx, self.geometry.host(first), &bytes).await?;
            directory = Some((self.geometry.host(first).0, size));
        }
        self.commit(cx).await?;
        self.host_flush(cx).await?;
        self.set_autoclear(cx, false).await?;
        self.name_directory(cx, &next, directory).await?;
        if directory.is_some() {
            self.set_autoclear(cx, true).await?;
        }
        // From here on the new clusters are in use.
        taken.clear();
        self.directory_switched(cx, next, directory, &gone);
        for (first, count) in old_clusters {
            self.free_later(cx, first, count, FreeKind::Other);
        }
        Ok(())
    }

    fn directory_switched(&self, cx: &Cx, next: Vec<Stored>, directory: Option<(u64, u64)>, gone: &[Stored]) {
        let bits = self.geometry.cluster_bits;
        let old = {
            let mut meta = self.meta.borrow_mut();
            for stored in gone {
                meta.overlap.remove(stored.table >> bits, Structure::BitmapTable);
            }
            if let Some((at, _)) = meta.directory {
                meta.overlap.remove(at >> bits, Structure::BitmapDirectory);
            }
            for stored in &next {
                let clusters = self.geometry.clusters(u64::from(stored.entries) * 8);
                // Those that were there before are known.
                let _known = meta
                    .overlap
                    .insert(stored.table >> bits, clusters, Structure::BitmapTable);
            }
            if let Some((at, size)) = directory {
                meta.overlap
                    .insert(
                        at >> bits,
                        self.geometry.clusters(size),
                        Structure::BitmapDirectory,
                    )
                    .expect("the allocator has checked");
            }
            meta.stored = next;
            std::mem::replace(&mut meta.directory, directory)
        };
        if let Some((at, size)) = old {
            let clusters = self.geometry.clusters(size);
            self.free_later(cx, ClusterIndex(at >> bits), clusters, FreeKind::Other);
        }
    }

    /// Clusters of a bitmap that have a reference to lose; an image may say anything of one that is in use.
    async fn clusters_of(
        &self,
        cx: &Cx,
        stored: &Stored,
        out: &mut Vec<(ClusterIndex, u64)>,
    ) -> Result<(), Errno> {
        for entry in self.read_bitmap_table(cx, stored).await? {
            let host = entry & OFFSET;
            let cluster = self.geometry.cluster(HostOffset(host));
            let plain = host != 0
                && self.geometry.within(host) == 0
                && self.meta.borrow().overlap.hit(cluster.0, 1).is_none()
                && !out.contains(&(cluster, 1));
            if plain && self.refcount(cx, cluster).await? > 0 {
                out.push((cluster, 1));
            }
        }
        let table = self.geometry.cluster(HostOffset(stored.table));
        out.push((table, self.geometry.clusters(u64::from(stored.entries) * 8)));
        Ok(())
    }

    /// Autoclear bit 0.
    async fn set_autoclear(&self, cx: &Cx, on: bool) -> Result<(), Errno> {
        let was = self.meta.borrow().header.autoclear;
        let bits = if on {
            was | AUTOCLEAR_BITMAPS
        } else {
            was & !AUTOCLEAR_BITMAPS
        };
        if bits == was {
            return Ok(());
        }
        self.patch_header(cx, 88, &bits.to_be_bytes()).await?;
        self.meta.borrow_mut().header.autoclear = bits;
        Ok(())
    }

    /// Brings the extension up to date, which nobody looks at meanwhile.
    async fn name_directory(
        &self,
        cx: &Cx,
        next: &[Stored],
        directory: Option<(u64, u64)>,
    ) -> Result<(), Errno> {
        let data = directory.map(|(at, size)| {
            let count = u32::try_from(next.len()).expect("limited above");
            let mut data = [0; 24];
            data[..4].copy_from_slice(&count.to_be_bytes());
            data[8..16].copy_from_slice(&size.to_be_bytes());
            data[16..].copy_from_slice(&at.to_be_bytes());
            data
        });
        let place = {
            let meta = self.meta.borrow();
            ext::place_of_bitmaps(&meta.raw, &meta.header)
        };
        match (data, place) {
            (Some(data), Some(at)) => {
                let (from, to) = (at / 512 * 512, at + data.len());
                let bytes = {
                    let mut raw = self.meta.borrow().raw[from..to].to_vec();
                    raw[at - from..].copy_from_slice(&data);
                    raw
                };
                self.host_write(cx, HostOffset(from as u64), &bytes).await?;
                self.host_flush(cx).await?;
                self.meta.borrow_mut().raw[from..to].copy_from_slice(&bytes);
                Ok(())
            }
            (data, _) => self.rewrite_first_cluster(cx, data).await,
        }
    }

    /// Nothing is stored of this bitmap any more.
    pub(super) async fn forget_bitmap(&self, cx: &Cx, name: &str) -> Result<(), Errno> {
        let _guard = self.lock.lock().await;
        let mut next = self.meta.borrow().stored.clone();
        let Some(at) = next.iter().position(|stored| stored.name == name) else {
            return Ok(());
        };
        let gone = vec![next.remove(at)];
        let mut taken = Vec::new();
        let result = self.switch_directory(cx, next, gone, &mut taken).await;
        if result.is_err() {
            for (first, count) in taken {
                self.free_unlinked(cx, first, count).await;
            }
        }
        result
    }

    /// Whether a bitmap like this can be stored.
    pub(super) fn judge_bitmap(&self, cx: &Cx, name: &str, granularity: u64) -> Result<(), QmpError> {
        if cx.node.bitmap(name).is_some() {
            return Err(QmpError::generic(format!("Bitmap already exists: {name}")));
        }
        let bytes = cx.node.length().div_ceil(granularity).div_ceil(8);
        let count = cx
            .node
            .bitmaps
            .borrow()
            .iter()
            .filter(|b| b.persistent.get())
            .count() as u64;
        let why = if !self.geometry.v3 {
            "Cannot store dirty bitmaps in qcow2 v2 files"
        } else if bytes > limits::MAX_BITMAP_BYTES
            || bytes > u64::from(limits::MAX_BITMAP_TABLE) * self.geometry.cs()
        {
            "Too much space will be occupied by the bitmap. Use larger granularity"
        } else if name.len() > LONGEST_NAME {
            "Name length exceeds maximum (1023 characters)"
        } else if count >= u64::from(limits::MAX_BITMAPS) {
            "Maximum number of persistent bitmaps is already reached"
        } else {
            return Ok(());
        };
        Err(QmpError::generic(format!(
            "Can't make bitmap '{name}' persistent in '{}': {why}",
            cx.node.name
        )))
    }

    /// Refuses another size while a stored bitmap could not follow.
    pub(super) fn bitmaps_can_resize(&self, cx: &Cx) -> Result<(), QmpError> {
        for stored in &self.meta.borrow().stored {
            match cx.node.bitmap(&stored.name) {
                Some(bitmap) => bitmap.check(Use::Change)?,
                None => {
                    return Err(QmpError::generic(
                        "Cannot resize qcow2 with persistent bitmaps that were not loaded into memory",
                    ));
                }
            }
        }
        Ok(())
    }
}

fn set_read_only(cx: &Cx, read_only: bool) {
    for bitmap in cx
        .node
        .bitmaps
        .borrow()
        .iter()
        .filter(|bitmap| bitmap.persistent.get())
    {
        bitmap.read_only.set(read_only);
    }
}
