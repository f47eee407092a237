//! The driver over storage that fails, is short, or cannot.

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
