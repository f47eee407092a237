//! The qcow2 format, versions 2 and 3.
//!
//! Reads everything but external data files, encryption, extended L2 entries and zstd, which are refused at open.
//! Internal snapshots are respected, not managed; persistent bitmaps (`bitmaps`) are loaded, kept and stored.
//!
//! How it is built: tables are cached whole (`cache`) and changed in memory under the image lock (`lock`);
//! `commit` writes them in an order that survives power loss; freed clusters stay untouched until their removal is
//! durable and nobody reads them any more (`epoch`, `commit`). `map` finds where guest bytes are, `read`, `write`
//! and `zero` are the guest's requests, `alloc` finds host clusters.
//! Not here: repair.

mod alloc;
mod backing;
mod bitmap_dir;
mod bitmaps;
mod cache;
mod commit;
mod compress;
mod copy;
#[cfg(test)]
mod crash_tests;
mod create;
mod epoch;
mod ext;
mod header;
mod image;
mod l2;
mod limits;
mod lock;
mod map;
mod open;
mod overlap;
mod packed;
mod read;
mod refcount;
mod resize;
mod snapshot;
mod status;
#[cfg(test)]
mod tests;
mod units;
mod write;
mod zero;

use std::any::Any;

use serde_json::{Map, Value};

pub use create::{CreateOptions, create};
pub(crate) use image::Qcow2;

use crate::driver::{Cx, Driver, DriverFacts, DriverInfo, DriverStatus, Limits, WriteFlags};
use crate::env::Fut;
use crate::error::{Errno, QmpError};
use crate::graph::perm::default_perms;
use crate::io::copy_range::{CopySource, CopyTarget};
use crate::types::{OpenFlags, ReqFlags, SECTOR};
use units::GuestOffset;

/// Static properties of `qcow2`.
pub static FACTS: DriverFacts = DriverFacts {
    name: "qcow2",
    is_filter: false,
    is_format: true,
    supports_backing: true,
    is_protocol: false,
    has_block_status: true,
    has_write_zeroes: true,
    has_discard: true,
    supported_read_flags: ReqFlags::empty(),
    can_reopen: true,
    mutable_options: &open::MUTABLE_OPTIONS,
    child_perm: default_perms,
    open: |cx, args| Box::pin(open::open(cx, args)),
};

impl Driver for Qcow2 {
    fn length(&self, _cx: &Cx) -> Result<u64, Errno> {
        Ok(self.meta.borrow().header.size / SECTOR * SECTOR)
    }

    fn limits(&self, _cx: &Cx) -> Limits {
        let cs = self.geometry.cs();
        Limits {
            request_alignment: 1,
            pwrite_zeroes_alignment: cs,
            pdiscard_alignment: cs,
            ..Limits::default()
        }
    }

    fn write_flags(&self, _cx: &Cx) -> WriteFlags {
        let zero = if self.geometry.v3 {
            ReqFlags::MAY_UNMAP | ReqFlags::NO_FALLBACK
        } else {
            ReqFlags::empty()
        };
        WriteFlags {
            write: ReqFlags::WRITE_COMPRESSED,
            zero,
            truncate: ReqFlags::ZERO_WRITE,
        }
    }

    fn info(&self, _cx: &Cx) -> Option<DriverInfo> {
        let cluster_size = self.geometry.cs();
        Some(DriverInfo {
            cluster_size,
            subcluster_size: cluster_size,
        })
    }

    fn read<'a>(
        &'a self,
        cx: &'a Cx,
        offset: u64,
        buf: &'a mut [u8],
        _flags: ReqFlags,
    ) -> Fut<'a, Result<(), Errno>> {
        Box::pin(async move {
            let result = self.read_at(cx, GuestOffset(offset), buf).await;
            self.end(cx, result).await
        })
    }

    fn write<'a>(
        &'a self,
        cx: &'a Cx,
        offset: u64,
        buf: &'a [u8],
        flags: ReqFlags,
    ) -> Fut<'a, Result<(), Errno>> {
        Box::pin(async move {
            let result = if flags.contains(ReqFlags::WRITE_COMPRESSED) {
                Box::pin(self.write_compressed(cx, GuestOffset(offset), buf)).await
            } else {
                self.write_at(cx, GuestOffset(offset), buf).await
            };
            self.end(cx, result).await
        })
    }

    fn write_zeroes<'a>(
        &'a self,
        cx: &'a Cx,
        offset: u64,
        bytes: u64,
        flags: ReqFlags,
    ) -> Fut<'a, Result<(), Errno>> {
        Box::pin(async move {
            let result = self.zero_at(cx, GuestOffset(offset), bytes, flags).await;
            self.end(cx, result).await
        })
    }

    fn discard<'a>(&'a self, cx: &'a Cx, offset: u64, bytes: u64) -> Fut<'a, Result<(), Errno>> {
        Box::pin(async move {
            let result = self.discard_at(cx, GuestOffset(offset), bytes).await;
            self.end(cx, result).await
        })
    }

    fn copy_range_from<'a>(
        &'a self,
        cx: &'a Cx,
        offset: u64,
        bytes: u64,
        to: CopyTarget,
    ) -> Fut<'a, Result<(), Errno>> {
        Box::pin(async move {
            let result = self.copy_out(cx, GuestOffset(offset), bytes, to).await;
            self.end(cx, result).await
        })
    }

    fn copy_range_to<'a>(
        &'a self,
        cx: &'a Cx,
        offset: u64,
        bytes: u64,
        from: CopySource<'a>,
    ) -> Fut<'a, Result<(), Errno>> {
        Box::pin(async move {
            let result = self.copy_in(cx, GuestOffset(offset), bytes, from).await;
            self.end(cx, result).await
        })
    }

    fn flush_to_os<'a>(&'a self, cx: &'a Cx) -> Fut<'a, Result<(), Errno>> {
        Box::pin(async move {
            let result = self.flush_metadata(cx).await;
            self.end(cx, result).await
        })
    }

    fn block_status<'a>(
        &'a self,
        cx: &'a Cx,
        _want_zero: bool,
        offset: u64,
        bytes: u64,
    ) -> Fut<'a, Result<DriverStatus, Errno>> {
        Box::pin(async move {
            let result = self.status_at(cx, GuestOffset(offset), bytes).await;
            self.end(cx, result).await
        })
    }

    fn truncate<'a>(
        &'a self,
        cx: &'a Cx,
        length: u64,
        _exact: bool,
        flags: ReqFlags,
    ) -> Fut<'a, Result<(), QmpError>> {
        Box::pin(async move {
            let result = self.resize(cx, length, flags).await;
            let _ = self.finish(cx, Ok(())).await;
            result
        })
    }

    fn reopen<'a>(&'a self, cx: &'a Cx, flags: OpenFlags) -> Fut<'a, Result<(), QmpError>> {
        Box::pin(self.switch_writable(cx, flags.contains(OpenFlags::RDWR)))
    }

    fn reopen_options(&self, _cx: &Cx, options: &mut Map<String, Value>) -> Result<(), QmpError> {
        self.judge_options(options)
    }

    fn take_options(&self, _cx: &Cx, options: &Map<String, Value>) {
        self.follow_options(options);
    }

    fn change_backing_file<'a>(
        &'a self,
        cx: &'a Cx,
        backing: Option<(&'a str, Option<&'a str>)>,
    ) -> Fut<'a, Result<(), Errno>> {
        Box::pin(async move {
            let result = self.change_backing(cx, backing).await;
            self.finish(cx, result).await
        })
    }

    fn check_bitmap(&self, cx: &Cx, name: &str, granularity: u64) -> Result<(), QmpError> {
        self.judge_bitmap(cx, name, granularity)
    }

    fn remove_bitmap<'a>(&'a self, cx: &'a Cx, name: &'a str) -> Fut<'a, Result<(), QmpError>> {
        Box::pin(async move {
            let result = self.forget_bitmap(cx, name).await;
            let result = self.finish(cx, result).await;
            result.map_err(|errno| QmpError::errno("Failed to update bitmap extension", errno))
        })
    }

    fn reopened<'a>(&'a self, cx: &'a Cx) -> Fut<'a, ()> {
        Box::pin(async move {
            if cx.node.is_writable() {
                // On an error bitmaps stay read-only, and nothing can be written that they would miss.
                let _ = self.thaw_bitmaps(cx).await;
            }
        })
    }

    fn backing_header(&self) -> Option<(String, Option<String>)> {
        self.meta.borrow().backing.clone()
    }

    fn close<'a>(&'a self, cx: &'a Cx) -> Fut<'a, Result<(), Errno>> {
        Box::pin(async move {
            // A corrupt image is not written to any more.
            if !cx.node.is_writable() || self.check_health().is_err() {
                return Ok(());
            }
            // What could not be stored is marked as in use.
            let stored = self.store_bitmaps(cx).await;
            self.write_back(cx).await.and(stored)
        })
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Qcow2 {
    /// End of a guest request: the rare work after a corruption is boxed away from the hot futures.
    #[inline]
    async fn end<T>(&self, cx: &Cx, result: Result<T, Errno>) -> Result<T, Errno> {
        if result.is_err() {
            Box::pin(self.finish(cx, result)).await
        } else {
            result
        }
    }
}
