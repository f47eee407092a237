//! Making new images.
//!
//! Layout: header, refcount table, refcount blocks, L1 table; with the usual geometry these are clusters 0, 1, 2
//! and 3, as in images that QEMU makes. The header is written last.

use super::header::{COMPAT_LAZY, FirstCluster, Header, V2_LENGTH, V3_LENGTH};
use super::limits;
use super::refcount;
use super::units::{Geometry, us};
use crate::env::Storage;
use crate::error::QmpError;
use crate::types::MAX_LENGTH;

/// What a new image is like.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CreateOptions<'a> {
    /// Virtual size in bytes, a multiple of 512.
    pub size: u64,
    /// 2 or 3.
    pub version: u32,
    /// Bytes, a power of two, 512 to 2 MiB.
    pub cluster_size: u64,
    /// Width of a refcount, a power of two up to 64; 16 for version 2.
    pub refcount_bits: u32,
    /// Sets the compatible feature bit lazy-refcounts (this driver keeps refcounts exact all the same).
    pub lazy_refcounts: bool,
    /// Backing name as the header shall have it.
    pub backing_file: Option<&'a str>,
    /// Its format.
    pub backing_format: Option<&'a str>,
}

impl Default for CreateOptions<'_> {
    fn default() -> Self {
        CreateOptions {
            size: 0,
            version: 3,
            cluster_size: 65536,
            refcount_bits: 16,
            lazy_refcounts: false,
            backing_file: None,
            backing_format: None,
        }
    }
}

impl CreateOptions<'_> {
    fn check(&self) -> Result<Geometry, QmpError> {
        let refuse = |text: &str| Err(QmpError::generic(text));
        if !self.size.is_multiple_of(512) {
            return refuse("Image size must be a multiple of 512 bytes");
        }
        let cs = self.cluster_size;
        if !cs.is_power_of_two() || !(512..=2 << 20).contains(&cs) {
            return refuse("Cluster size must be a power of two between 512 and 2048k");
        }
        if !(2..=3).contains(&self.version) {
            return refuse("Unsupported qcow2 version");
        }
        if !self.refcount_bits.is_power_of_two() || self.refcount_bits > 64 {
            return refuse("Refcount width must be a power of two and may not exceed 64 bits");
        }
        if self.version < 3 && self.refcount_bits != 16 {
            return refuse(
                "Different refcount widths than 16 bits require compatibility level 1.1 or above \
                 (use version=v3 or greater)",
            );
        }
        if self.version < 3 && self.lazy_refcounts {
            return refuse(
                "Lazy refcounts only supported with compatibility level 1.1 and above \
                 (use version=v3 or greater)",
            );
        }
        if self.backing_format.is_some() && self.backing_file.is_none() {
            return refuse("Backing format cannot be used without backing file");
        }
        let name = self.backing_file.unwrap_or("x");
        let format = self.backing_format.unwrap_or_default();
        if name.is_empty() || name.len() as u64 > limits::MAX_BACKING_NAME || name.contains('\0') {
            return refuse("Backing file name is not usable");
        }
        if format.len() > limits::MAX_BACKING_FORMAT || format.contains('\0') {
            return refuse("Backing format name is not usable");
        }
        let geometry = Geometry {
            cluster_bits: cs.trailing_zeros(),
            refcount_order: self.refcount_bits.trailing_zeros(),
            v3: self.version == 3,
        };
        if self.size > MAX_LENGTH || geometry.l1_needed(self.size) * 8 > limits::MAX_L1_BYTES {
            return refuse("Image is too big");
        }
        Ok(geometry)
    }
}

/// Where things go, in clusters.
struct Plan {
    reftable: u64,
    blocks: u64,
    l1: u64,
    l1_entries: u64,
}

fn plan(geometry: Geometry, size: u64) -> Plan {
    let l1_entries = geometry.l1_needed(size);
    // An empty disk has an L1 table of one cluster too, so that the file's end is that of a structure.
    let l1 = geometry.clusters(l1_entries * 8).max(1);
    let (mut reftable, mut blocks) = (1, 1);
    loop {
        let total = 1 + reftable + blocks + l1;
        let more = total.div_ceil(geometry.rb_entries());
        let table = geometry.clusters(more * 8);
        if more <= blocks && table <= reftable {
            return Plan {
                reftable,
                blocks,
                l1,
                l1_entries,
            };
        }
        (blocks, reftable) = (blocks.max(more), reftable.max(table));
    }
}

/// Makes an image in `storage`, whose old content is discarded.
pub async fn create(storage: &dyn Storage, options: &CreateOptions<'_>) -> Result<(), QmpError> {
    let geometry = options.check()?;
    let plan = plan(geometry, options.size);
    let cs = geometry.cs();
    let l1_at = (1 + plan.reftable + plan.blocks) * cs;
    let narrow = |value: u64| u32::try_from(value).expect("limited by the checks");
    let header = Header {
        version: options.version,
        backing_offset: 0,
        backing_len: 0,
        cluster_bits: geometry.cluster_bits,
        size: options.size,
        crypt_method: 0,
        l1_size: narrow(plan.l1_entries),
        l1_offset: l1_at,
        reftable_offset: cs,
        reftable_clusters: narrow(plan.reftable),
        nb_snapshots: 0,
        snapshots_offset: 0,
        incompatible: 0,
        compatible: if options.lazy_refcounts { COMPAT_LAZY } else { 0 },
        autoclear: 0,
        refcount_order: geometry.refcount_order,
        length: if geometry.v3 { V3_LENGTH } else { V2_LENGTH },
        compression: 0,
    };
    let cluster = FirstCluster {
        header: &header,
        unknown_fields: &[],
        backing: options.backing_file.map(|name| (name, options.backing_format)),
        unknown_extensions: &[],
        feature_table: geometry.v3 && cs > 4096,
        bitmaps: None,
    };
    let failed = |e| QmpError::errno("Could not write qcow2 header", e);
    let mut first = cluster.build(0).map_err(failed)?;
    first.resize(us(cs), 0);
    let total = 1 + plan.reftable + plan.blocks + plan.l1;

    let failed = |e| QmpError::errno("Could not create image", e);
    storage.truncate(0).await.map_err(failed)?;
    let mut reftable = vec![0; us(plan.reftable * cs)];
    for (block, entry) in (0..plan.blocks).zip(reftable.chunks_exact_mut(8)) {
        entry.copy_from_slice(&((1 + plan.reftable + block) * cs).to_be_bytes());
    }
    storage.write(cs, &reftable).await.map_err(failed)?;
    for block in 0..plan.blocks {
        let mut data = vec![0; us(cs)];
        let counted = total
            .saturating_sub(block * geometry.rb_entries())
            .min(geometry.rb_entries());
        for index in 0..us(counted) {
            refcount::set(&mut data, geometry.refcount_order, index, 1);
        }
        storage
            .write((1 + plan.reftable + block) * cs, &data)
            .await
            .map_err(failed)?;
    }
    storage
        .write(l1_at, &vec![0; us(plan.l1 * cs)])
        .await
        .map_err(failed)?;
    storage.flush().await.map_err(failed)?;
    storage.write(0, &first).await.map_err(failed)?;
    storage.flush().await.map_err(failed)
}
