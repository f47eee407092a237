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
mod tests {
    use std::cell::RefCell;

    use super::*;
    use crate::env::{Extent, StorageLimits};
    use crate::io::fixture::Bench;
    use serde_json::json;

    /// Storage that only counts, and fails as ordered.
    #[derive(Debug, Default)]
    struct Fake {
        calls: RefCell<Vec<&'static str>>,
        error: Cell<Option<Errno>>,
        extent: Cell<Option<Extent>>,
    }

    impl Fake {
        fn call(&self, name: &'static str) -> Result<(), Errno> {
            self.calls.borrow_mut().push(name);
            self.error.get().map_or(Ok(()), Err)
        }

        fn done(&self, name: &'static str) -> Fut<'_, Result<(), Errno>> {
            Box::pin(std::future::ready(self.call(name)))
        }
    }

    impl Storage for Fake {
        fn read<'a>(&'a self, _: u64, buf: &'a mut [u8]) -> Fut<'a, Result<usize, Errno>> {
            buf[0] = 1;
            Box::pin(std::future::ready(self.call("read").map(|()| 1)))
        }
        fn write<'a>(&'a self, _: u64, _: &'a [u8]) -> Fut<'a, Result<(), Errno>> {
            self.done("write")
        }
        fn flush(&self) -> Fut<'_, Result<(), Errno>> {
            self.done("flush")
        }
        fn write_zeroes(&self, _: u64, _: u64, may_unmap: bool) -> Fut<'_, Result<(), Errno>> {
            self.done(if may_unmap { "punch" } else { "zero" })
        }
        fn discard(&self, _: u64, _: u64) -> Fut<'_, Result<(), Errno>> {
            self.done("discard")
        }
        fn truncate(&self, _: u64) -> Fut<'_, Result<(), Errno>> {
            self.done("truncate")
        }
        fn length(&self) -> Result<u64, Errno> {
            Ok(8192)
        }
        fn extent(&self, _: u64) -> Result<Extent, Errno> {
            self.extent.get().ok_or(Errno::EIO)
        }
        fn limits(&self) -> StorageLimits {
            StorageLimits {
                request_alignment: 512,
                discard_alignment: 0,
                max_transfer: 0,
            }
        }
        fn set_writable(&self, writable: bool) -> Result<(), Errno> {
            self.call(if writable { "rw" } else { "ro" })
        }
        fn as_any(&self) -> &dyn std::any::Any {
            self
        }
    }

    fn driver(kind: StorageKind, writable: bool) -> (Rc<Fake>, File) {
        let fake = Rc::<Fake>::default();
        let storage: Rc<dyn Storage> = Rc::<Fake>::clone(&fake);
        let file = File {
            storage,
            kind,
            filename: "f".to_owned(),
            direct: false,
            writers: Cell::new(false),
            writable: Cell::new(writable),
            switch_failed: Cell::new(None),
            no_zeroes: Default::default(),
            no_discard: Cell::new(false),
            flush_failed: Cell::new(None),
        };
        (fake, file)
    }

    /// A context to call the driver with; it only looks at the node's flags.
    fn cx(bench: &Bench, flags: OpenFlags) -> Cx {
        let node = bench
            .node_of(&crate::io::fixture::FORMAT, "n", 8192, 512, flags)
            .0;
        bench.layer.cx(&node)
    }

    #[test]
    fn writable_only_while_somebody_writes() {
        let bench = Bench::new();
        let cx = cx(&bench, OpenFlags::RDWR | OpenFlags::AUTO_RDONLY);
        let (fake, file) = driver(StorageKind::File, false);
        let write = || bench.run(file.write(&cx, 0, &[0; 512], ReqFlags::empty()));
        file.set_perm(&cx, Perm::CONSISTENT_READ, Perm::all());
        assert_eq!(write(), Err(Errno::EBADF));
        file.set_perm(&cx, Perm::WRITE_UNCHANGED, Perm::all());
        file.set_perm(&cx, Perm::WRITE, Perm::all());
        assert_eq!(write(), Ok(()));
        file.set_perm(&cx, Perm::empty(), Perm::all());
        assert_eq!(
            *fake.calls.borrow(),
            ["rw", "write", "ro"],
            "it switches once each way"
        );
        fake.error.set(Some(Errno::EROFS));
        file.set_perm(&cx, Perm::WRITE, Perm::all());
        assert_eq!(write(), Err(Errno::EACCES), "a failed switch fails the writes");
        assert_eq!(
            bench
                .run(file.reopen(&cx, OpenFlags::RDWR))
                .expect_err("refused")
                .desc,
            "Could not reopen file: Permission denied"
        );
        fake.error.set(None);
        assert_eq!(bench.run(file.reopen(&cx, OpenFlags::RDWR)), Ok(()));
        assert_eq!(write(), Ok(()));
    }

    #[test]
    fn unsupported_is_asked_once() {
        let bench = Bench::new();
        let cx = cx(&bench, OpenFlags::RDWR);
        let (fake, file) = driver(StorageKind::File, true);
        fake.error.set(Some(Errno::ENOTSUP));
        for _ in 0..2 {
            let zero = bench.run(file.write_zeroes(&cx, 0, 512, ReqFlags::empty()));
            let discard = bench.run(file.discard(&cx, 0, 512));
            assert_eq!((zero, discard), (Err(Errno::ENOTSUP), Err(Errno::ENOTSUP)));
        }
        assert_eq!(*fake.calls.borrow(), ["zero", "discard"]);
        fake.error.set(None);
        assert_eq!(
            bench.run(file.write_zeroes(&cx, 0, 512, ReqFlags::MAY_UNMAP)),
            Ok(()),
            "another way to zero"
        );
    }

    #[test]
    fn a_failed_flush_stays_failed() {
        let bench = Bench::new();
        let cx = cx(&bench, OpenFlags::RDWR);
        let (fake, file) = driver(StorageKind::File, true);
        fake.error.set(Some(Errno::EIO));
        assert_eq!(bench.run(file.flush_to_disk(&cx)), Err(Errno::EIO));
        fake.error.set(None);
        assert_eq!(
            bench.run(file.flush_to_disk(&cx)),
            Err(Errno::EIO),
            "the page cache may have lost data"
        );
        assert_eq!(
            bench.run(file.write(&cx, 0, &[0; 512], ReqFlags::FUA)),
            Err(Errno::EIO)
        );
        let (fake, file) = driver(StorageKind::File, true);
        let file = File { direct: true, ..file };
        fake.error.set(Some(Errno::EIO));
        assert_eq!(bench.run(file.flush_to_disk(&cx)), Err(Errno::EIO));
        fake.error.set(None);
        assert_eq!(
            bench.run(file.flush_to_disk(&cx)),
            Ok(()),
            "without page cache it is tried again"
        );
    }

    #[test]
    fn short_reads_are_filled() {
        let bench = Bench::new();
        let cx = cx(&bench, OpenFlags::RDWR);
        let (_, file) = driver(StorageKind::File, true);
        let mut buf = [9; 4];
        assert_eq!(bench.run(file.read(&cx, 0, &mut buf, ReqFlags::empty())), Ok(()));
        assert_eq!(buf, [1, 0, 0, 0]);
    }

    #[test]
    fn devices_do_not_resize() {
        let bench = Bench::new();
        let cx = cx(&bench, OpenFlags::RDWR);
        let (fake, device) = driver(StorageKind::HostDevice, true);
        let resize = |length, exact| {
            bench
                .run(device.truncate(&cx, length, exact, ReqFlags::empty()))
                .map_err(|e| e.desc)
        };
        assert_eq!(resize(4096, true), Err("Cannot resize device files".to_owned()));
        assert_eq!(resize(16384, false), Err("Cannot grow device files".to_owned()));
        assert_eq!((resize(4096, false), resize(8192, true)), (Ok(()), Ok(())));
        assert!(fake.calls.borrow().is_empty());
    }

    #[test]
    fn extents_in_whole_blocks() {
        let fake = Fake::default();
        let ask = |answer: Option<(bool, u64)>| {
            fake.extent
                .set(answer.map(|(data, bytes)| Extent { data, bytes }));
            extent(&fake, 512, 1024, 2048)
        };
        assert_eq!(
            ask(None),
            (StatusFlags::DATA, 2048),
            "what cannot be told is data"
        );
        assert_eq!(ask(Some((true, 700))), (StatusFlags::DATA, 1024));
        assert_eq!(ask(Some((false, 700))), (StatusFlags::ZERO, 512));
        assert_eq!(
            ask(Some((false, 100))),
            (StatusFlags::DATA, 512),
            "a hole only in part"
        );
        assert_eq!(
            ask(Some((false, 8192 - 1024))),
            (StatusFlags::ZERO, 2048),
            "a trailing hole"
        );
        assert_eq!(
            extent(&fake, 512, 8192, 512),
            (StatusFlags::ZERO, 512),
            "past the end"
        );
    }

    #[test]
    fn options() {
        let bench = Bench::new();
        bench.env.create("disk", 4096);
        let refused = |options| bench.open(&FILE, "x", options).expect_err("refused").desc;
        assert_eq!(refused(json!({})), "Parameter 'filename' is missing");
        let bench = Bench::new();
        let gone = bench
            .open(&FILE, "x", json!({"filename": "gone"}))
            .expect_err("refused");
        assert_eq!(gone.desc, "Could not open 'gone': No such file or directory");
    }
}
