//! A format driver for tests: content and allocation map in memory, backing support, a log of what reached the
//! driver, failures to order, and a gate that holds requests. Not a stand-in for a real format: no file below.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use serde_json::{Map, Value};

use crate::Layer;
use crate::driver::{Cx, Driver, DriverFacts, DriverInfo, DriverStatus, Limits, OpenArgs, WriteFlags};
use crate::env::Fut;
use crate::error::{Errno, QmpError};
use crate::event::{Event, Observer};
use crate::graph::node::Node;
use crate::graph::perm::default_perms;
use crate::io::backend::Backend;
use crate::memory::MemoryEnv;
use crate::sync::WaitQueue;
use crate::types::{EdgeId, NodeId, OpenFlags, Perm, ReqFlags, Role, StatusFlags};

pub(crate) static FORMAT: DriverFacts = DriverFacts {
    name: "test-format",
    ..COPY
};
/// The same without zero writes.
pub(crate) static NO_ZERO: DriverFacts = DriverFacts {
    name: "test-no-zero",
    has_write_zeroes: false,
    ..COPY
};
/// The same without an own block status, backing or not.
pub(crate) static NO_STATUS: DriverFacts = DriverFacts {
    name: "test-no-status",
    has_block_status: false,
    ..COPY
};
/// The same without backing support.
pub(crate) static NO_BACKING: DriverFacts = DriverFacts {
    name: "test-no-backing",
    supports_backing: false,
    ..COPY
};

const COPY: DriverFacts = DriverFacts {
    name: "",
    is_filter: false,
    is_format: true,
    supports_backing: true,
    is_protocol: false,
    has_block_status: true,
    has_write_zeroes: true,
    has_discard: true,
    supported_read_flags: ReqFlags::empty(),
    can_reopen: true,
    mutable_options: &[],
    child_perm: default_perms,
    open: |_, _| {
        Box::pin(std::future::ready(Err(QmpError::generic(
            "opened by hand in tests",
        ))))
    },
};

/// What reached the driver.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Op {
    Read,
    Write,
    Zero,
    Discard,
    FlushOs,
    FlushDisk,
    Truncate,
}

/// The driver.
#[derive(Debug)]
pub(crate) struct Fixture {
    content: RefCell<Vec<u8>>,
    allocated: RefCell<Vec<bool>>,
    cluster: u64,
    pub(crate) limits: Cell<Limits>,
    pub(crate) write_flags: Cell<WriteFlags>,
    pub(crate) log: RefCell<Vec<(Op, u64, u64, ReqFlags)>>,
    failures: RefCell<VecDeque<(Op, Result<(), Errno>)>>,
    /// Answers every status query, when set.
    pub(crate) status: Cell<Option<DriverStatus>>,
    /// Why status queries fail, when set.
    pub(crate) status_error: Cell<Option<Errno>>,
    held: Cell<Option<Op>>,
    released: WaitQueue,
}

impl Fixture {
    /// Requests of this kind wait until [`Fixture::release`].
    pub(crate) fn hold(&self, op: Op) {
        self.held.set(Some(op));
    }

    pub(crate) fn release(&self) {
        self.held.set(None);
        self.released.wake_all();
    }

    pub(crate) fn fail(&self, op: Op, errno: Errno) {
        self.fail_after(op, 0, errno);
    }

    /// The next but `good` request of this kind fails.
    pub(crate) fn fail_after(&self, op: Op, good: usize, errno: Errno) {
        let mut failures = self.failures.borrow_mut();
        failures.extend(std::iter::repeat_n((op, Ok(())), good));
        failures.push_back((op, Err(errno)));
    }

    /// Puts content in place without any request.
    pub(crate) fn put(&self, offset: u64, data: &[u8]) {
        let from = crate::io::size(offset);
        self.content.borrow_mut()[from..from + data.len()].copy_from_slice(data);
        self.mark(offset, data.len() as u64, true);
    }

    /// The driver's own bytes (zero where unallocated).
    pub(crate) fn own(&self, offset: u64, bytes: u64) -> Vec<u8> {
        let from = crate::io::size(offset);
        self.content.borrow()[from..from + crate::io::size(bytes)].to_vec()
    }

    pub(crate) fn is_allocated(&self, offset: u64) -> bool {
        self.allocated.borrow()[crate::io::size(offset / self.cluster)]
    }

    /// Kinds of what was logged, and forgets it.
    pub(crate) fn take_ops(&self) -> Vec<(Op, u64, u64)> {
        self.log
            .take()
            .into_iter()
            .map(|(op, o, n, _)| (op, o, n))
            .collect()
    }

    fn mark(&self, offset: u64, bytes: u64, allocated: bool) {
        let (from, to) = (offset / self.cluster, (offset + bytes).div_ceil(self.cluster));
        let mut map = self.allocated.borrow_mut();
        let to = crate::io::size(to).min(map.len());
        map[crate::io::size(from)..to].fill(allocated);
    }

    async fn begin(&self, op: Op, offset: u64, bytes: u64, flags: ReqFlags) -> Result<(), Errno> {
        self.log.borrow_mut().push((op, offset, bytes, flags));
        while self.held.get() == Some(op) {
            let released = self.released.listen();
            released.await;
        }
        let mut failures = self.failures.borrow_mut();
        match failures.iter().position(|(o, _)| *o == op) {
            Some(at) => failures.remove(at).expect("found").1,
            None => Ok(()),
        }
    }

    /// Allocates the clusters of a range, filling them from below.
    async fn allocate(&self, cx: &Cx, offset: u64, bytes: u64) -> Result<(), Errno> {
        let (from, to) = (offset / self.cluster, (offset + bytes).div_ceil(self.cluster));
        for at in (from..to).map(|c| c * self.cluster) {
            if !self.is_allocated(at) {
                let mut old =
                    vec![0; crate::io::size(self.cluster.min(self.content.borrow().len() as u64 - at))];
                if let Some(backing) = cx.node.backing.get() {
                    cx.layer.read(backing, at, &mut old, ReqFlags::empty()).await?;
                }
                self.put(at, &old);
            }
        }
        Ok(())
    }
}

impl Driver for Fixture {
    fn length(&self, _cx: &Cx) -> Result<u64, Errno> {
        Ok(self.content.borrow().len() as u64)
    }

    fn limits(&self, _cx: &Cx) -> Limits {
        self.limits.get()
    }

    fn write_flags(&self, _cx: &Cx) -> WriteFlags {
        self.write_flags.get()
    }

    fn info(&self, _cx: &Cx) -> Option<DriverInfo> {
        Some(DriverInfo {
            cluster_size: self.cluster,
            subcluster_size: self.cluster,
        })
    }

    fn read<'a>(
        &'a self,
        cx: &'a Cx,
        offset: u64,
        buf: &'a mut [u8],
        flags: ReqFlags,
    ) -> Fut<'a, Result<(), Errno>> {
        Box::pin(async move {
            self.begin(Op::Read, offset, buf.len() as u64, flags).await?;
            let mut at = 0;
            while at < buf.len() {
                let from = offset + at as u64;
                let n = crate::io::size(self.cluster - from % self.cluster).min(buf.len() - at);
                let part = &mut buf[at..at + n];
                let inside = from < self.content.borrow().len() as u64;
                if inside && self.is_allocated(from) {
                    let have = (self.content.borrow().len() as u64 - from).min(n as u64);
                    part.fill(0);
                    part[..crate::io::size(have)].copy_from_slice(&self.own(from, have));
                } else if let Some(backing) = cx.node.backing.get() {
                    cx.layer.read(backing, from, part, ReqFlags::empty()).await?;
                } else {
                    part.fill(0);
                }
                at += n;
            }
            Ok(())
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
            self.begin(Op::Write, offset, buf.len() as u64, flags).await?;
            let end = crate::io::size(offset) + buf.len();
            if end > self.content.borrow().len() {
                self.content.borrow_mut().resize(end, 0);
                self.allocated
                    .borrow_mut()
                    .resize(end.div_ceil(crate::io::size(self.cluster)), false);
            }
            self.allocate(cx, offset, buf.len() as u64).await?;
            self.put(offset, buf);
            Ok(())
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
            self.begin(Op::Zero, offset, bytes, flags).await?;
            self.allocate(cx, offset, bytes).await?;
            let inside = bytes.min(self.content.borrow().len() as u64 - offset);
            self.put(offset, &vec![0; crate::io::size(inside)]);
            Ok(())
        })
    }

    fn discard<'a>(&'a self, _cx: &'a Cx, offset: u64, bytes: u64) -> Fut<'a, Result<(), Errno>> {
        Box::pin(self.begin(Op::Discard, offset, bytes, ReqFlags::empty()))
    }

    fn flush_to_os<'a>(&'a self, _cx: &'a Cx) -> Fut<'a, Result<(), Errno>> {
        Box::pin(self.begin(Op::FlushOs, 0, 0, ReqFlags::empty()))
    }

    fn flush_to_disk<'a>(&'a self, _cx: &'a Cx) -> Fut<'a, Result<(), Errno>> {
        Box::pin(self.begin(Op::FlushDisk, 0, 0, ReqFlags::empty()))
    }

    fn truncate<'a>(
        &'a self,
        _cx: &'a Cx,
        length: u64,
        _: bool,
        flags: ReqFlags,
    ) -> Fut<'a, Result<(), QmpError>> {
        Box::pin(async move {
            let result = self.begin(Op::Truncate, length, 0, flags).await;
            result.map_err(|e| QmpError::errno("Failed to resize", e))?;
            let old = self.content.borrow().len() as u64;
            self.content.borrow_mut().resize(crate::io::size(length), 0);
            self.allocated
                .borrow_mut()
                .resize(crate::io::size(length.div_ceil(self.cluster)), false);
            if flags.contains(ReqFlags::ZERO_WRITE) && length > old {
                self.mark(old, length - old, true);
            }
            Ok(())
        })
    }

    fn block_status<'a>(
        &'a self,
        _cx: &'a Cx,
        _want_zero: bool,
        offset: u64,
        bytes: u64,
    ) -> Fut<'a, Result<DriverStatus, Errno>> {
        let answer = if let Some(e) = self.status_error.get() {
            Err(e)
        } else if let Some(status) = self.status.get() {
            Ok(status)
        } else {
            let allocated = self.is_allocated(offset);
            let end = offset + bytes;
            let mut to = offset - offset % self.cluster + self.cluster;
            let length = self.content.borrow().len() as u64;
            while to < end.min(length) && self.is_allocated(to) == allocated {
                to += self.cluster;
            }
            let flags = if allocated {
                StatusFlags::DATA
            } else {
                StatusFlags::empty()
            };
            // In blocks, as a driver must.
            let pnum = crate::io::align_up(to - offset, self.limits.get().request_alignment);
            Ok(DriverStatus {
                flags,
                pnum,
                map: 0,
                file: None,
            })
        };
        Box::pin(std::future::ready(answer))
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}

/// Everything the layer reports.
#[derive(Default)]
pub(crate) struct Events(pub(crate) RefCell<Vec<Event>>);

impl Observer for Events {
    fn event(&self, event: &Event) {
        self.0.borrow_mut().push(event.clone());
    }
}

/// A layer over memory, with its events.
pub(crate) struct Bench {
    pub(crate) env: MemoryEnv,
    pub(crate) layer: Layer,
    pub(crate) events: Rc<Events>,
}

impl Bench {
    pub(crate) fn new() -> Bench {
        let (env, events) = (MemoryEnv::new(), Rc::<Events>::default());
        let observer: Rc<dyn Observer> = Rc::<Events>::clone(&events);
        let layer = Layer::new(Rc::new(env.clone()), Some(observer));
        Bench { env, layer, events }
    }

    pub(crate) fn node(&self, name: &str, bytes: u64, cluster: u64) -> (Rc<Node>, Rc<Fixture>) {
        self.node_of(&FORMAT, name, bytes, cluster, OpenFlags::RDWR | OpenFlags::UNMAP)
    }

    pub(crate) fn node_of(
        &self,
        facts: &'static DriverFacts,
        name: &str,
        bytes: u64,
        cluster: u64,
        flags: OpenFlags,
    ) -> (Rc<Node>, Rc<Fixture>) {
        let node = self
            .layer
            .new_node(facts, Some(name), flags, Map::new())
            .expect("a fresh name");
        let driver = Rc::new(Fixture {
            content: RefCell::new(vec![0; crate::io::size(bytes)]),
            allocated: RefCell::new(vec![false; crate::io::size(bytes.div_ceil(cluster))]),
            cluster,
            limits: Cell::new(Limits {
                request_alignment: 1,
                ..Limits::default()
            }),
            write_flags: Cell::default(),
            log: RefCell::default(),
            failures: RefCell::default(),
            status: Cell::new(None),
            status_error: Cell::new(None),
            held: Cell::new(None),
            released: WaitQueue::default(),
        });
        let erased: Rc<dyn Driver> = Rc::<Fixture>::clone(&driver);
        self.layer.set_driver(&node, erased);
        self.refresh(&node);
        (node, driver)
    }

    pub(crate) fn refresh(&self, node: &Rc<Node>) {
        self.layer.refresh_length(node.id).expect("has a length");
        self.layer.refresh_limits(node.id).expect("sane limits");
    }

    pub(crate) fn back(&self, top: &Rc<Node>, base: &Rc<Node>) -> EdgeId {
        self.layer
            .attach_child(top, base.id, "backing", Role::COW)
            .expect("no conflict")
    }

    /// A guest that may write, and lets others write too, so that tests can have several.
    pub(crate) fn guest(&self, node: &Rc<Node>) -> Backend {
        let perm = Perm::CONSISTENT_READ | Perm::WRITE;
        Backend::new(&self.layer, node.id, None, perm, Perm::all(), true).expect("no conflict")
    }

    /// Opens a node of a real driver.
    pub(crate) fn open(
        &self,
        facts: &'static DriverFacts,
        name: &str,
        options: Value,
    ) -> Result<Rc<Node>, QmpError> {
        let Value::Object(mut options) = options else {
            panic!("options are an object")
        };
        let file = options
            .remove("file")
            .map(|f| self.named(f.as_str().expect("a node-name")));
        let node = self
            .layer
            .new_node(facts, Some(name), OpenFlags::RDWR | OpenFlags::UNMAP, Map::new())?;
        let cx = self.layer.cx(&node);
        let args = OpenArgs {
            file,
            options: &mut options,
        };
        let driver = self.env.block_on((facts.open)(&cx, args))?;
        self.layer.set_driver(&node, driver);
        assert!(options.is_empty(), "the driver took its options: {options:?}");
        self.refresh(&node);
        Ok(node)
    }

    pub(crate) fn named(&self, name: &str) -> NodeId {
        self.layer.find_node(name).expect("a known node")
    }

    pub(crate) fn run<T>(&self, future: impl Future<Output = T>) -> T {
        self.env.block_on(future)
    }

    pub(crate) fn read(&self, guest: &Backend, offset: u64, bytes: usize) -> Result<Vec<u8>, Errno> {
        let mut buf = vec![0xee; bytes];
        self.run(guest.read(offset, &mut buf)).map(|()| buf)
    }

    pub(crate) fn count(&self, what: impl Fn(&Event) -> bool) -> usize {
        self.events.0.borrow().iter().filter(|e| what(e)).count()
    }
}

/// Polls once, with a waker that does nothing.
pub(crate) fn poll_once<F: Future>(future: Pin<&mut F>) -> Poll<F::Output> {
    future.poll(&mut Context::from_waker(Waker::noop()))
}
