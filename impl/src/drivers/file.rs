//! Drivers `file` and `host_device`: a node over one storage object of the environment.
//!
//! Rules: with auto-read-only the object is writable only while a parent may write. A short read at the end of a
//! file is zero-filled. What the object cannot do (`ENOTSUP`) is remembered and not tried again. After a failed
//! flush through the page cache every later flush fails the same way: the kernel may have dropped dirty pages.
//!
//! Deviation: QEMU switches to writable while a permission change can still be refused; here the switch comes after
//! it, and a failed one makes every write fail with its errno.
//! Not here: host files themselves (`env::Storage`), OS-level image locks.

use std::cell::Cell;
use std::rc::Rc;

use serde_json::{Map, Value};

use crate::driver::{Cx, Driver, DriverFacts, DriverStatus, Limits, OpenArgs, WriteFlags};
use crate::drivers::{no_children, required_str, take_bool, take_enum, take_int};
use crate::env::{Fut, OpenStorage, Storage, StorageKind};
use crate::error::{Errno, QmpError};
use crate::io::copy_range::{CopySource, CopyTarget};
use crate::io::{align_down, align_up};
use crate::types::{OpenFlags, Perm, ReqFlags, StatusFlags};

/// Driver `file`.
pub static FILE: DriverFacts = facts("file", |cx, args| open(cx, args, StorageKind::File));
/// Driver `host_device`.
pub static HOST_DEVICE: DriverFacts =
    facts("host_device", |cx, args| open(cx, args, StorageKind::HostDevice));

type Open = for<'a> fn(&'a Cx, OpenArgs<'a>) -> Fut<'a, Result<Rc<dyn Driver>, QmpError>>;

const fn facts(name: &'static str, open: Open) -> DriverFacts {
    DriverFacts {
        name,
        is_filter: false,
        is_format: false,
        supports_backing: false,
        is_protocol: true,
        has_block_status: true,
        has_write_zeroes: true,
        has_discard: true,
        supported_read_flags: ReqFlags::empty(),
        can_reopen: true,
        mutable_options: &["x-check-cache-dropped"],
        child_perm: no_children,
        open,
    }
}

/// Permissions that make a parent a writer.
const WRITER: Perm = Perm::WRITE.union(Perm::WRITE_UNCHANGED).union(Perm::RESIZE);

/// An open file or device.
#[derive(Debug)]
pub struct File {
    storage: Rc<dyn Storage>,
    kind: StorageKind,
    filename: String,
    direct: bool,
    /// Some parent may write.
    writers: Cell<bool>,
    /// The object is open for writing.
    writable: Cell<bool>,
    /// Why it is not writable although it should be.
    switch_failed: Cell<Option<Errno>>,
    /// `write_zeroes` is not supported; by `may_unmap`.
    no_zeroes: [Cell<bool>; 2],
    no_discard: Cell<bool>,
    flush_failed: Cell<Option<Errno>>,
}

fn open<'a>(cx: &'a Cx, args: OpenArgs<'a>, kind: StorageKind) -> Fut<'a, Result<Rc<dyn Driver>, QmpError>> {
    Box::pin(async move {
        let filename = required_str(args.options, "filename")?;
        take_host_options(args.options)?;
        let flags = cx.node.flags.get();
        let writable = flags.contains(OpenFlags::RDWR) && !flags.contains(OpenFlags::AUTO_RDONLY);
        let direct = flags.contains(OpenFlags::NOCACHE);
        let storage = cx.layer.env().open(&OpenStorage {
            filename: &filename,
            kind,
            writable,
            direct,
        })?;
        let driver: Rc<dyn Driver> = Rc::new(File {
            storage,
            kind,
            filename,
            direct,
            writers: Cell::new(false),
            writable: Cell::new(writable),
            switch_failed: Cell::new(None),
            no_zeroes: Default::default(),
            no_discard: Cell::new(false),
            flush_failed: Cell::new(None),
        });
        Ok(driver)
    })
}

/// Options that say how the host does its part. They are the environment's business and cannot change a result.
fn take_host_options(options: &mut Map<String, Value>) -> Result<(), QmpError> {
    take_enum(options, "aio", &["threads", "native", "io_uring"])?;
    take_enum(options, "locking", &["auto", "on", "off"])?;
    take_int(options, "aio-max-batch")?;
    take_bool(options, "drop-cache")?;
    Ok(())
}

impl File {
    /// Opens the object for writing or not, as flags and parents want it.
    fn switch(&self, allowed: bool, auto: bool) -> Result<(), Errno> {
        let want = allowed && (!auto || self.writers.get());
        if want == self.writable.get() {
            self.switch_failed.set(None);
            return Ok(());
        }
        // A read-only file system refuses access rather than the operation, as the drivers of QEMU put it.
        self.storage
            .set_writable(want)
            .map_err(|e| if e == Errno::EROFS { Errno::EACCES } else { e })?;
        self.writable.set(want);
        self.switch_failed.set(None);
        Ok(())
    }

    fn check_writable(&self) -> Result<(), Errno> {
        match self.switch_failed.get() {
            Some(e) => Err(e),
            None if self.writable.get() => Ok(()),
            None => Err(Errno::EBADF),
        }
    }

    async fn flush(&self) -> Result<(), Errno> {
        if let Some(e) = self.flush_failed.get() {
            return Err(e);
        }
        let result = self.storage.flush().await;
        if let (Err(e), false) = (result, self.direct) {
            self.flush_failed.set(Some(e));
        }
        result
    }
}

/// Remembers that something is not supported.
fn remember(result: Result<(), Errno>, unsupported: &Cell<bool>) -> Result<(), Errno> {
    if result == Err(Errno::ENOTSUP) {
        unsupported.set(true);
    }
    result
}

impl Driver for File {
    fn length(&self, _cx: &Cx) -> Result<u64, Errno> {
        self.storage.length()
    }

    fn limits(&self, _cx: &Cx) -> Limits {
        let storage = self.storage.limits();
        Limits {
            request_alignment: storage.request_alignment,
            max_transfer: storage.max_transfer,
            pdiscard_alignment: storage.discard_alignment,
            ..Limits::default()
        }
    }

    fn write_flags(&self, _cx: &Cx) -> WriteFlags {
        let regular = self.kind == StorageKind::File;
        WriteFlags {
            write: ReqFlags::FUA,
            zero: ReqFlags::MAY_UNMAP | ReqFlags::NO_FALLBACK,
            truncate: if regular {
                ReqFlags::ZERO_WRITE
            } else {
                ReqFlags::empty()
            },
        }
    }

    fn read<'a>(
        &'a self,
        _cx: &'a Cx,
        offset: u64,
        buf: &'a mut [u8],
        _: ReqFlags,
    ) -> Fut<'a, Result<(), Errno>> {
        Box::pin(async move {
            let got = self.storage.read(offset, buf).await?;
            buf[got..].fill(0);
            Ok(())
        })
    }

    fn write<'a>(
        &'a self,
        _cx: &'a Cx,
        offset: u64,
        buf: &'a [u8],
        flags: ReqFlags,
    ) -> Fut<'a, Result<(), Errno>> {
        Box::pin(async move {
            self.check_writable()?;
            self.storage.write(offset, buf).await?;
            if flags.contains(ReqFlags::FUA) {
                self.flush().await
            } else {
                Ok(())
            }
        })
    }

    fn write_zeroes<'a>(
        &'a self,
        _cx: &'a Cx,
        offset: u64,
        bytes: u64,
        flags: ReqFlags,
    ) -> Fut<'a, Result<(), Errno>> {
        Box::pin(async move {
            self.check_writable()?;
            let may_unmap = flags.contains(ReqFlags::MAY_UNMAP);
            let unsupported = &self.no_zeroes[usize::from(may_unmap)];
            if unsupported.get() {
                return Err(Errno::ENOTSUP);
            }
            remember(
                self.storage.write_zeroes(offset, bytes, may_unmap).await,
                unsupported,
            )
        })
    }

    fn discard<'a>(&'a self, _cx: &'a Cx, offset: u64, bytes: u64) -> Fut<'a, Result<(), Errno>> {
        Box::pin(async move {
            self.check_writable()?;
            if self.no_discard.get() {
                return Err(Errno::ENOTSUP);
            }
            remember(self.storage.discard(offset, bytes).await, &self.no_discard)
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
            let from = CopySource {
                storage: &*self.storage,
                offset,
            };
            // The file may end within its last sector.
            let inside = bytes.min(self.storage.length()?.saturating_sub(offset));
            if inside > 0 {
                cx.layer.copy_range_to(to, inside, from).await?;
            }
            if inside == bytes {
                return Ok(());
            }
            let CopyTarget { edge, offset, flags } = to.after(inside);
            cx.layer.write_zeroes(edge, offset, bytes - inside, flags).await
        })
    }

    fn copy_range_to<'a>(
        &'a self,
        _cx: &'a Cx,
        offset: u64,
        bytes: u64,
        from: CopySource<'a>,
    ) -> Fut<'a, Result<(), Errno>> {
        Box::pin(async move {
            self.check_writable()?;
            self.storage
                .copy_from(from.storage, from.offset, offset, bytes)
                .await
        })
    }

    fn flush_to_disk<'a>(&'a self, _cx: &'a Cx) -> Fut<'a, Result<(), Errno>> {
        Box::pin(self.flush())
    }

    fn block_status<'a>(
        &'a self,
        cx: &'a Cx,
        want_zero: bool,
        offset: u64,
        bytes: u64,
    ) -> Fut<'a, Result<DriverStatus, Errno>> {
        let align = cx.node.io.limits.get().request_alignment;
        let (kind, pnum) = if want_zero {
            extent(&*self.storage, align, offset, bytes)
        } else {
            (StatusFlags::DATA, bytes)
        };
        let flags = kind | StatusFlags::OFFSET_VALID;
        let status = DriverStatus {
            flags,
            pnum,
            map: offset,
            file: Some(cx.node.id),
        };
        Box::pin(std::future::ready(Ok(status)))
    }

    fn truncate<'a>(
        &'a self,
        cx: &'a Cx,
        length: u64,
        exact: bool,
        _: ReqFlags,
    ) -> Fut<'a, Result<(), QmpError>> {
        Box::pin(async move {
            if self.kind == StorageKind::File {
                let result = match self.check_writable() {
                    Ok(()) => self.storage.truncate(length).await,
                    Err(e) => Err(e),
                };
                return result.map_err(|e| QmpError::errno("Failed to resize file", e));
            }
            let now = self
                .length(cx)
                .map_err(|e| QmpError::errno("Failed to determine device size", e))?;
            if exact && length != now {
                return Err(QmpError::generic("Cannot resize device files"));
            }
            if length > now {
                return Err(QmpError::generic("Cannot grow device files"));
            }
            Ok(())
        })
    }

    fn set_perm(&self, cx: &Cx, perm: Perm, _shared: Perm) {
        self.writers.set(perm.intersects(WRITER));
        let flags = cx.node.flags.get();
        if flags.contains(OpenFlags::AUTO_RDONLY)
            && let Err(e) = self.switch(flags.contains(OpenFlags::RDWR), true)
        {
            self.switch_failed.set(Some(e));
        }
    }

    fn reopen<'a>(&'a self, _cx: &'a Cx, flags: OpenFlags) -> Fut<'a, Result<(), QmpError>> {
        if flags.contains(OpenFlags::NOCACHE) != self.direct {
            let text = "Cannot change the option 'cache.direct'";
            return Box::pin(std::future::ready(Err(QmpError::generic(text))));
        }
        let result = self
            .switch(
                flags.contains(OpenFlags::RDWR),
                flags.contains(OpenFlags::AUTO_RDONLY),
            )
            .map_err(|e| QmpError::errno("Could not reopen file", e));
        Box::pin(std::future::ready(result))
    }

    fn filename(&self, _cx: &Cx) -> String {
        self.filename.clone()
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}

/// Data or zeroes at `offset`, and for how long, in whole blocks; what cannot be told is data.
fn extent(storage: &dyn Storage, align: u64, offset: u64, bytes: u64) -> (StatusFlags, u64) {
    let Ok(length) = storage.length() else {
        return (StatusFlags::DATA, bytes);
    };
    if offset >= length {
        return (StatusFlags::ZERO, bytes); // between the end of the file and that of its last sector
    }
    match storage.extent(offset) {
        Err(_) => (StatusFlags::DATA, bytes),
        Ok(e) if e.data => (StatusFlags::DATA, align_up(e.bytes, align)),
        Ok(e) if offset + e.bytes >= length => (StatusFlags::ZERO, bytes),
        // A block that is a hole only in part is data.
        Ok(e) if e.bytes < align => (StatusFlags::DATA, align),
        Ok(e) => (StatusFlags::ZERO, align_down(e.bytes, align)),
    }
}

#[cfg(test)]
mod tests;
