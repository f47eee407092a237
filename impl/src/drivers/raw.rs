//! Format driver `raw`: a window (`offset`, `size`) onto its file, or all of it.
//!
//! Rules: it is not a filter, although without options its child has role FILTERED: chain walks stop at it. It asks
//! its child for WRITE and RESIZE only when a parent holds them.
//!
//! Deviation: when the file shrinks below the window, QEMU shortens the window for good. Here the window is
//! shortened only while the file is too short; requests outside of it fail as in QEMU (writes `ENOSPC`, reads
//! `EINVAL`).
//! Not here: probing, so none of its restrictions either.

use std::cell::Cell;
use std::rc::Rc;

use serde_json::{Map, Value};

use crate::driver::{Cx, Driver, DriverFacts, DriverInfo, DriverStatus, Limits, OpenArgs, WriteFlags};
use crate::drivers::{attach_file, take_size};
use crate::env::Fut;
use crate::error::{Errno, QmpError};
use crate::graph::perm::default_perms;
use crate::io::copy_range::{CopySource, CopyTarget};
use crate::types::{MAX_LENGTH, Perm, ReqFlags, Role, SECTOR, StatusFlags};

/// Driver `raw`.
pub static FACTS: DriverFacts = DriverFacts {
    name: "raw",
    is_filter: false,
    is_format: true,
    supports_backing: false,
    is_protocol: false,
    has_block_status: true,
    has_write_zeroes: true,
    has_discard: true,
    supported_read_flags: ReqFlags::empty(),
    can_reopen: true,
    mutable_options: &["offset", "size"],
    child_perm,
    open: |cx, mut args| Box::pin(std::future::ready(open(cx, &mut args))),
};

fn child_perm(cx: &Cx, role: Role, perm: Perm, shared: Perm) -> (Perm, Perm) {
    let (child, child_shared) = default_perms(cx, role, perm, shared);
    let wanted_only = Perm::WRITE | Perm::RESIZE;
    ((child - wanted_only) | (perm & wanted_only), child_shared)
}

/// An open window.
#[derive(Debug)]
struct Raw {
    window: Cell<Window>,
}

#[derive(Clone, Copy, Debug)]
struct Window {
    offset: u64,
    size: Option<u64>,
}

impl Window {
    fn take(options: &mut Map<String, Value>) -> Result<Window, QmpError> {
        let offset = take_size(options, "offset")?.unwrap_or(0);
        let size = take_size(options, "size")?;
        Ok(Window { offset, size })
    }

    /// Whether the window lies within the file.
    fn check(self, cx: &Cx) -> Result<(), QmpError> {
        let Window { offset, size } = self;
        let real = file_length(cx).map_err(|e| QmpError::errno("Could not get image size", e))?;
        if real < offset {
            return Err(QmpError::generic(format!(
                "Offset ({offset}) cannot be greater than size of the containing file ({real})"
            )));
        }
        let Some(size) = size else { return Ok(()) };
        if real - offset < size {
            // Two blanks, as in QEMU.
            return Err(QmpError::generic(format!(
                "The sum of offset ({offset}) and size ({size}) has to be smaller or equal to the  actual size of \
                 the containing file ({real})"
            )));
        }
        if size % SECTOR != 0 {
            return Err(QmpError::generic("Specified size is not multiple of 512"));
        }
        Ok(())
    }
}

fn open(cx: &Cx, args: &mut OpenArgs<'_>) -> Result<Rc<dyn Driver>, QmpError> {
    let window = Window::take(args.options)?;
    let whole = window.offset == 0 && window.size.is_none();
    let role = if whole { Role::FILTERED } else { Role::DATA } | Role::PRIMARY;
    attach_file(cx, args.file, role)?;
    window.check(cx)?;
    Ok(Rc::new(Raw {
        window: Cell::new(window),
    }))
}

fn file_length(cx: &Cx) -> Result<u64, Errno> {
    cx.layer.node_length(&cx.file_node()?)
}

impl Raw {
    /// Where a request goes in the file.
    fn place(&self, cx: &Cx, offset: u64, bytes: u64, outside: Errno) -> Result<u64, Errno> {
        let window = self.window.get();
        if window.size.is_some() {
            let size = self.length(cx)?;
            if offset > size || bytes > size - offset {
                return Err(outside);
            }
        }
        if offset > MAX_LENGTH.saturating_sub(window.offset) {
            return Err(Errno::EINVAL);
        }
        Ok(offset + window.offset)
    }
}

impl Driver for Raw {
    fn length(&self, cx: &Cx) -> Result<u64, Errno> {
        let Window { offset, size } = self.window.get();
        let room = file_length(cx)?.saturating_sub(offset);
        Ok(size.map_or(room, |size| size.min(room)))
    }

    fn limits(&self, _cx: &Cx) -> Limits {
        Limits {
            request_alignment: 1,
            ..Limits::default()
        }
    }

    fn write_flags(&self, cx: &Cx) -> WriteFlags {
        let below = cx.file_node().map(|c| c.io.write_flags.get()).unwrap_or_default();
        let zero = ReqFlags::FUA | ReqFlags::MAY_UNMAP | ReqFlags::NO_FALLBACK;
        WriteFlags {
            write: ReqFlags::WRITE_UNCHANGED | (ReqFlags::FUA & below.write),
            zero: ReqFlags::WRITE_UNCHANGED | (zero & below.zero),
            truncate: ReqFlags::ZERO_WRITE & below.truncate,
        }
    }

    fn info(&self, cx: &Cx) -> Option<DriverInfo> {
        let child = cx.file_node().ok()?;
        child.driver_opt()?.info(&cx.layer.cx(&child))
    }

    fn read<'a>(
        &'a self,
        cx: &'a Cx,
        offset: u64,
        buf: &'a mut [u8],
        flags: ReqFlags,
    ) -> Fut<'a, Result<(), Errno>> {
        Box::pin(async move {
            let at = self.place(cx, offset, buf.len() as u64, Errno::EINVAL)?;
            cx.layer.read(cx.file()?, at, buf, flags).await
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
            let at = self.place(cx, offset, buf.len() as u64, Errno::ENOSPC)?;
            cx.layer.write(cx.file()?, at, buf, flags).await
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
            let at = self.place(cx, offset, bytes, Errno::ENOSPC)?;
            cx.layer.write_zeroes(cx.file()?, at, bytes, flags).await
        })
    }

    fn discard<'a>(&'a self, cx: &'a Cx, offset: u64, bytes: u64) -> Fut<'a, Result<(), Errno>> {
        Box::pin(async move {
            let at = self.place(cx, offset, bytes, Errno::ENOSPC)?;
            cx.layer.discard(cx.file()?, at, bytes).await
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
            let at = self.place(cx, offset, bytes, Errno::EINVAL)?;
            cx.layer.copy_range(cx.file()?, at, bytes, to).await
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
            let to = CopyTarget {
                edge: cx.file()?,
                offset: self.place(cx, offset, bytes, Errno::ENOSPC)?,
                flags: ReqFlags::empty(),
            };
            cx.layer.copy_range_to(to, bytes, from).await
        })
    }

    fn block_status<'a>(
        &'a self,
        cx: &'a Cx,
        _want_zero: bool,
        offset: u64,
        bytes: u64,
    ) -> Fut<'a, Result<DriverStatus, Errno>> {
        let status = cx.file_node().map(|child| DriverStatus {
            flags: StatusFlags::RAW | StatusFlags::OFFSET_VALID,
            pnum: bytes,
            map: offset + self.window.get().offset,
            file: Some(child.id),
        });
        Box::pin(std::future::ready(status))
    }

    fn truncate<'a>(
        &'a self,
        cx: &'a Cx,
        length: u64,
        exact: bool,
        flags: ReqFlags,
    ) -> Fut<'a, Result<(), QmpError>> {
        Box::pin(async move {
            let Window { offset, size } = self.window.get();
            if size.is_some() {
                return Err(QmpError::generic("Cannot resize fixed-size raw disks"));
            }
            if length > MAX_LENGTH.saturating_sub(offset) {
                return Err(QmpError::generic("Disk size too large for the chosen offset"));
            }
            let file = cx.file().map_err(|_| QmpError::generic("No medium inserted"))?;
            cx.layer.truncate(file, offset + length, exact, flags).await
        })
    }

    fn reopen_options(&self, cx: &Cx, options: &mut Map<String, Value>) -> Result<(), QmpError> {
        // Judged against the present file, even where the file changes as well.
        Window::take(options)?.check(cx)
    }

    fn take_options(&self, _cx: &Cx, options: &Map<String, Value>) {
        let window = Window::take(&mut options.clone());
        self.window.set(window.expect("found good before"));
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::io::backend::Backend;
    use crate::io::fixture::{Bench, Op};

    const NONE: ReqFlags = ReqFlags::empty();

    #[test]
    fn refusals() {
        let cases: [(Value, &str); 5] = [
            (
                json!({"offset": 4097}),
                "Offset (4097) cannot be greater than size of the containing file (4096)",
            ),
            (
                json!({"offset": 512, "size": 4096}),
                "The sum of offset (512) and size (4096) has to be smaller or equal to the  actual size of the \
                 containing file (4096)",
            ),
            (json!({"size": 1000}), "Specified size is not multiple of 512"),
            (
                json!({"size": -512}),
                "Parameter 'size' expects a non-negative number below 2^64",
            ),
            (
                json!({"offset": "0"}),
                "Invalid parameter type for 'offset', expected: integer",
            ),
        ];
        for (mut options, text) in cases {
            let bench = Bench::new();
            bench.node("f", 4096, 512);
            options["file"] = json!("f");
            assert_eq!(
                bench.open(&FACTS, "raw", options).expect_err("refused").desc,
                text
            );
        }
        let bench = Bench::new();
        let missing = bench.open(&FACTS, "raw", json!({})).expect_err("refused");
        assert_eq!(missing.desc, "Parameter 'file' is missing");
    }

    #[test]
    fn requests_move_into_the_window() {
        let bench = Bench::new();
        let (_, file) = bench.node("f", 8192, 512);
        let raw = bench
            .open(&FACTS, "raw", json!({"file": "f", "offset": 1024, "size": 2048}))
            .expect("opens");
        assert_eq!(raw.length(), 2048);
        let guest = bench.guest(&raw);
        bench.run(guest.write(512, &[7; 512], NONE)).expect("writes");
        bench.run(guest.write_zeroes(1024, 512, NONE)).expect("zeroes");
        bench.run(guest.discard(0, 512)).expect("discards");
        assert_eq!(bench.read(&guest, 512, 512), Ok(vec![7; 512]));
        let ops = [
            (Op::Write, 1536, 512),
            (Op::Zero, 2048, 512),
            (Op::Discard, 1024, 512),
            (Op::Read, 1536, 512),
        ];
        assert_eq!(file.take_ops(), ops);
        let cx = bench.layer.cx(&raw);
        let refused = bench.run(raw.driver().truncate(&cx, 4096, true, NONE));
        assert_eq!(
            refused.expect_err("refused").desc,
            "Cannot resize fixed-size raw disks"
        );
    }

    #[test]
    fn asks_for_write_only_when_a_parent_does() {
        let bench = Bench::new();
        bench.node("f", 8192, 512);
        let raw = bench
            .open(&FACTS, "raw", json!({"file": "f", "offset": 512}))
            .expect("opens");
        let edge = bench.layer.edge(raw.file.get().expect("attached"));
        assert_eq!(edge.role, Role::DATA | Role::PRIMARY);
        assert!(!edge.perm.get().intersects(Perm::WRITE | Perm::RESIZE));
        let perm = Perm::CONSISTENT_READ | Perm::WRITE;
        let guest = Backend::new(&bench.layer, raw.id, None, perm, Perm::all(), true).expect("no conflict");
        assert_eq!(edge.perm.get(), perm, "the default would add RESIZE");
        bench.run(guest.remove());
        assert!(!edge.perm.get().contains(Perm::WRITE));
    }

    #[test]
    fn a_file_that_shrinks_and_comes_back() {
        let bench = Bench::new();
        let (file, driver) = bench.node("f", 8192, 512);
        driver.put(0, &[5; 8192]);
        let raw = bench
            .open(&FACTS, "raw", json!({"file": "f", "offset": 1024, "size": 4096}))
            .expect("opens");
        let guest = bench.guest(&raw);
        let cx = bench.layer.cx(&raw);
        file.io.length.set(2048);
        assert_eq!(raw.driver().length(&cx), Ok(1024));
        assert_eq!(bench.read(&guest, 1024, 512), Err(Errno::EINVAL));
        assert_eq!(bench.run(guest.write(1024, &[1; 512], NONE)), Err(Errno::ENOSPC));
        file.io.length.set(512);
        assert_eq!(raw.driver().length(&cx), Ok(0), "the window lies past the end");
        file.io.length.set(8192);
        assert_eq!(
            raw.driver().length(&cx),
            Ok(4096),
            "unlike in QEMU it is whole again"
        );
        assert_eq!(bench.read(&guest, 1024, 512), Ok(vec![5; 512]));
    }
}
