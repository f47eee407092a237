//! Backing name and format in the header.
//!
//! Rules: everything the image holds is durable before the header names another backing. Only one sector write
//! is assumed atomic: bytes beyond sector 0 that the old header uses stay as they are, new ones go to unused
//! places and are durable first, then sector 0 switches. `ENOSPC` when no such layout exists.

use super::header::{AUTOCLEAR_BITMAPS, FirstCluster, Header};
use super::image::{Meta, Qcow2};
use super::limits;
use super::units::HostOffset;
use crate::driver::Cx;
use crate::error::Errno;

impl Qcow2 {
    /// Replaces backing name and format; `None` removes both.
    pub(super) async fn change_backing(
        &self,
        cx: &Cx,
        backing: Option<(&str, Option<&str>)>,
    ) -> Result<(), Errno> {
        if let Some((name, format)) = backing {
            let format = format.unwrap_or_default();
            let too_long =
                name.len() as u64 > limits::MAX_BACKING_NAME || format.len() > limits::MAX_BACKING_FORMAT;
            if name.is_empty() || too_long || name.contains('\0') || format.contains('\0') {
                return Err(Errno::EINVAL);
            }
        }
        let _guard = self.lock_clear(0, u64::MAX).await;
        self.prepare_writable(cx).await?;
        self.settle(cx).await?;
        self.host_flush(cx).await?;
        let next = {
            let meta = self.meta.borrow();
            meta.first_cluster(backing, meta.bitmaps_extension())?
        };
        self.switch_first_cluster(cx, next).await?;
        let owned = backing.map(|(name, format)| (name.to_owned(), format.map(str::to_owned)));
        self.meta.borrow_mut().backing = owned;
        Ok(())
    }

    /// Clears what a writer must clear (once per open): unknown autoclear bits, and a bitmaps extension that does not
    /// count. Caller holds the image lock.
    pub(super) async fn prepare_writable(&self, cx: &Cx) -> Result<(), Errno> {
        if self.ready_to_write.get() {
            return Ok(());
        }
        self.check_health()?;
        let (clear, keep, drop_bitmaps) = {
            let meta = self.meta.borrow();
            let keep = if meta.stored.is_empty() {
                0
            } else {
                AUTOCLEAR_BITMAPS
            };
            let keep = meta.header.autoclear & keep;
            (
                meta.header.autoclear != keep,
                keep,
                meta.bitmaps && meta.stored.is_empty(),
            )
        };
        if clear {
            // First the bit, which makes every reader ignore the extension.
            self.patch_header(cx, 88, &keep.to_be_bytes()).await?;
            self.meta.borrow_mut().header.autoclear = keep;
        }
        if drop_bitmaps {
            self.rewrite_first_cluster(cx, None).await?;
        }
        self.ready_to_write.set(true);
        Ok(())
    }

    /// Puts this bitmaps extension into the first cluster, or takes it out: where it cannot be dropped safely it stays,
    /// ignored.
    pub(super) async fn rewrite_first_cluster(
        &self,
        cx: &Cx,
        bitmaps: Option<[u8; 24]>,
    ) -> Result<(), Errno> {
        let next = {
            let meta = self.meta.borrow();
            let backing = meta.backing.as_ref().map(|(n, f)| (n.as_str(), f.as_deref()));
            meta.first_cluster(backing, bitmaps)
        };
        if next.is_err() && bitmaps.is_none() {
            return Ok(());
        }
        self.switch_first_cluster(cx, next?).await?;
        self.meta.borrow_mut().bitmaps = bitmaps.is_some();
        Ok(())
    }

    /// Writes a first cluster made by [`Meta::first_cluster`]: unused bytes, flush, sector 0, flush.
    async fn switch_first_cluster(&self, cx: &Cx, next: Layout) -> Result<(), Errno> {
        let changed = next.raw.len() > 512 && {
            let meta = self.meta.borrow();
            meta.raw.get(512..next.raw.len()) != Some(&next.raw[512..])
        };
        if changed {
            self.host_write(cx, HostOffset(512), &next.raw[512..]).await?;
            self.host_flush(cx).await?;
        }
        self.switch_sector(cx, &next.raw[..512]).await?;
        let mut meta = self.meta.borrow_mut();
        meta.header = next.header;
        meta.extensions_end = next.extensions_end;
        meta.feature_table = next.feature_table;
        meta.raw = next.raw;
        Ok(())
    }
}

/// A first cluster to switch to.
#[derive(Debug)]
pub(super) struct Layout {
    raw: Vec<u8>,
    header: Header,
    extensions_end: usize,
    feature_table: bool,
}

impl Meta {
    /// A layout for these contents that can be switched to by one sector write.
    pub(super) fn first_cluster(
        &self,
        backing: Option<(&str, Option<&str>)>,
        bitmaps: Option<[u8; 24]>,
    ) -> Result<Layout, Errno> {
        let header = &self.header;
        let cs = 1usize << header.cluster_bits;
        let old_name = usize::try_from(header.backing_offset).expect("in the first cluster");
        let old_end = self.extensions_end.max(old_name + header.backing_len as usize);
        let known = 112.min(header.length as usize);
        let unknown_fields = &self.raw[known..header.length as usize];
        for feature_table in [true, false] {
            if feature_table && !self.feature_table {
                continue;
            }
            let parts = FirstCluster {
                header,
                unknown_fields,
                backing,
                unknown_extensions: &self.unknown_extensions,
                feature_table,
                bitmaps,
            };
            for name_at in [0, self.extensions_end, 512, old_end.next_multiple_of(8)] {
                let Ok(mut raw) = parts.build(name_at) else {
                    continue;
                };
                let parsed = parse_back(&raw);
                let used = raw.len();
                raw.resize(used.max(self.raw.len()).max(512), 0);
                if raw.len() > cs {
                    continue;
                }
                self.keep_unused(&mut raw, used, &parsed);
                if self
                    .old_uses(header)
                    .all(|(from, to)| same_beyond_sector(&raw, &self.raw, from, to))
                {
                    let extensions_end = extensions_end(&raw, &parsed);
                    return Ok(Layout {
                        raw,
                        header: parsed,
                        extensions_end,
                        feature_table,
                    });
                }
            }
        }
        Err(Errno::ENOSPC)
    }

    /// The data of the bitmaps extension, if there is one that counts.
    fn bitmaps_extension(&self) -> Option<[u8; 24]> {
        let at = super::ext::place_of_bitmaps(&self.raw, &self.header).filter(|_| !self.stored.is_empty())?;
        self.raw[at..at + 24].try_into().ok()
    }

    /// What the old header uses of the first cluster: extensions, and the name.
    fn old_uses(&self, header: &Header) -> impl Iterator<Item = (usize, usize)> {
        let name = usize::try_from(header.backing_offset).expect("in the first cluster");
        [
            (0, self.extensions_end),
            (name, name + header.backing_len as usize),
        ]
        .into_iter()
    }

    /// Bytes that the new layout does not use keep their old value: the old header may still need them.
    fn keep_unused(&self, raw: &mut [u8], used: usize, parsed: &Header) {
        let extensions = extensions_end(raw, parsed);
        let name = usize::try_from(parsed.backing_offset).expect("in the first cluster");
        let gap_end = if name == 0 { used } else { name };
        for at in 512..raw.len().min(self.raw.len()) {
            if at >= used || at >= extensions && at < gap_end {
                raw[at] = self.raw[at];
            }
        }
    }
}

fn parse_back(raw: &[u8]) -> Header {
    let mut fixed = [0; 112];
    let len = raw.len().min(112);
    fixed[..len].copy_from_slice(&raw[..len]);
    Header::parse(&fixed).expect("our own header is valid")
}

fn extensions_end(raw: &[u8], header: &Header) -> usize {
    super::ext::Extensions::parse(raw, header)
        .expect("our own extensions are valid")
        .end
}

fn same_beyond_sector(new: &[u8], old: &[u8], from: usize, to: usize) -> bool {
    let from = from.max(512);
    from >= to || new.get(from..to) == old.get(from..to)
}
