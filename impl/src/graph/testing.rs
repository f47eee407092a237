//! Fixtures for the graph's unit tests: an environment that is never asked, drivers without storage, hooks that count.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use serde_json::Map;

use crate::Layer;
use crate::driver::{Cx, Driver, DriverFacts, Limits};
use crate::env::{Env, Fut, Nanos, OpenStorage, Storage};
use crate::error::{Errno, QmpError};
use crate::event::{Event, Observer, Parent};
use crate::graph::edge::ParentHooks;
use crate::graph::node::Node;
use crate::graph::perm::default_perms;
use crate::types::{EdgeId, JobId, NodeId, OpenFlags, Perm, ReqFlags, Role};

pub(super) const R: Perm = Perm::CONSISTENT_READ;
pub(super) const W: Perm = Perm::WRITE;
pub(super) const U: Perm = Perm::WRITE_UNCHANGED;
pub(super) const Z: Perm = Perm::RESIZE;
pub(super) const NONE: Perm = Perm::empty();
pub(super) const ALL: Perm = Perm::all();
pub(super) const FILTERED: Role = Role::FILTERED.union(Role::PRIMARY);

struct NoEnv;

impl Env for NoEnv {
    fn open(&self, open: &OpenStorage<'_>) -> Result<Rc<dyn Storage>, QmpError> {
        unreachable!("fixtures open no storage: {open:?}")
    }
    fn now(&self) -> Nanos {
        0
    }
    fn sleep_until(&self, _deadline: Nanos) -> Fut<'static, ()> {
        unreachable!("the graph does not sleep")
    }
    fn spawn(&self, name: &'static str, _task: Fut<'static, ()>) {
        unreachable!("the graph spawns nothing: {name}")
    }
}

/// Keeps every event, and checks that the graph may be inspected inside each.
#[derive(Default)]
pub(super) struct Recorder {
    pub(super) events: RefCell<Vec<Event>>,
    layer: RefCell<Option<Layer>>,
}

impl Observer for Recorder {
    fn event(&self, event: &Event) {
        self.events.borrow_mut().push(event.clone());
        if let Some(layer) = &*self.layer.borrow() {
            let view = layer.inspect();
            assert!(view.nodes.len() <= layer.nodes().len() + 1);
        }
    }
}

impl Recorder {
    pub(super) fn take(&self) -> Vec<Event> {
        self.events.take()
    }
}

pub(super) fn layer() -> Layer {
    recorded().0
}

pub(super) fn recorded() -> (Layer, Rc<Recorder>) {
    let recorder = Rc::<Recorder>::default();
    let layer = Layer::new(Rc::new(NoEnv), Some(Rc::clone(&recorder) as Rc<dyn Observer>));
    recorder.layer.replace(Some(layer.clone()));
    (layer, recorder)
}

/// A driver that does nothing but count.
#[derive(Debug, Default)]
pub(super) struct Fixture {
    pub(super) drained: Cell<i32>,
    pub(super) drain_begins: Cell<u32>,
    pub(super) closed: Cell<bool>,
    pub(super) told: Cell<Option<(Perm, Perm)>>,
    /// For `SELECTED`: the role whose edge may write.
    pub(super) selected: Cell<Role>,
    /// Error of the next reopen.
    pub(super) reopen_error: Cell<Option<Errno>>,
    pub(super) reopens: RefCell<Vec<bool>>,
}

impl Driver for Fixture {
    fn length(&self, _cx: &Cx) -> Result<u64, Errno> {
        Ok(65536)
    }
    fn limits(&self, _cx: &Cx) -> Limits {
        Limits {
            request_alignment: 1,
            ..Limits::default()
        }
    }
    fn read<'a>(&'a self, _cx: &'a Cx, _: u64, _: &'a mut [u8], _: ReqFlags) -> Fut<'a, Result<(), Errno>> {
        Box::pin(std::future::ready(Ok(())))
    }
    fn write<'a>(&'a self, _cx: &'a Cx, _: u64, _: &'a [u8], _: ReqFlags) -> Fut<'a, Result<(), Errno>> {
        Box::pin(std::future::ready(Ok(())))
    }
    fn drain_begin(&self, _cx: &Cx) {
        self.drained.set(self.drained.get() + 1);
        self.drain_begins.set(self.drain_begins.get() + 1);
    }
    fn drain_end(&self, _cx: &Cx) {
        self.drained.set(self.drained.get() - 1);
    }
    fn set_perm(&self, _cx: &Cx, perm: Perm, shared: Perm) {
        self.told.set(Some((perm, shared)));
    }
    fn reopen<'a>(&'a self, _cx: &'a Cx, flags: OpenFlags) -> Fut<'a, Result<(), QmpError>> {
        let writable = flags.contains(OpenFlags::RDWR);
        let error = self.reopen_error.take();
        if error.is_none() {
            self.reopens.borrow_mut().push(writable);
        }
        Box::pin(std::future::ready(
            error.map_or(Ok(()), |e| Err(QmpError::errno("reopen", e))),
        ))
    }
    fn close<'a>(&'a self, cx: &'a Cx) -> Fut<'a, Result<(), Errno>> {
        assert!(cx.node.quiesce_counter.get() > 0, "closed while active");
        self.closed.set(true);
        Box::pin(std::future::ready(Ok(())))
    }
    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}

const fn facts(name: &'static str) -> DriverFacts {
    DriverFacts {
        name,
        is_filter: false,
        is_format: true,
        supports_backing: true,
        is_protocol: false,
        has_block_status: false,
        has_write_zeroes: false,
        has_discard: false,
        supported_read_flags: ReqFlags::empty(),
        can_reopen: true,
        mutable_options: &[],
        child_perm: default_perms,
        open: |_, _| Box::pin(std::future::ready(Err(QmpError::generic("fixture")))),
    }
}

/// A format with backing files.
pub(super) static TEST: DriverFacts = facts("test");
/// A filter with default masks.
pub(super) static PASS: DriverFacts = DriverFacts {
    is_filter: true,
    supports_backing: false,
    ..facts("pass-through")
};
/// Asks nothing, shares everything.
pub(super) static NO_PERM: DriverFacts = DriverFacts {
    supports_backing: false,
    child_perm: |_, _, _, _| (NONE, ALL),
    ..facts("no-perm")
};
/// A filter that is the only writer.
pub(super) static EXCLUSIVE: DriverFacts = DriverFacts {
    is_filter: true,
    child_perm: |_, _, _, _| (W, ALL.difference(W)),
    ..facts("exclusive-writer")
};
/// Writes exclusively through the edge whose role is selected.
pub(super) static SELECTED: DriverFacts = DriverFacts {
    child_perm: |cx, role, _, _| {
        let selected = with(&cx.node, |f| f.selected.get());
        if role == selected {
            (W, ALL.difference(W))
        } else {
            (NONE, ALL)
        }
    },
    ..facts("write-to-selected")
};
/// No children, cannot be reopened.
pub(super) static PROTO: DriverFacts = DriverFacts {
    is_protocol: true,
    is_format: false,
    supports_backing: false,
    can_reopen: false,
    ..facts("proto")
};

pub(super) fn open(layer: &Layer, facts: &'static DriverFacts, name: &str, writable: bool) -> Rc<Node> {
    let flags = if writable {
        OpenFlags::RDWR
    } else {
        OpenFlags::empty()
    };
    let node = layer.new_node(facts, Some(name), flags, Map::new()).unwrap();
    layer.set_driver(&node, Rc::<Fixture>::default());
    node
}

/// A look at the driver's own state.
pub(super) fn with<T>(node: &Node, look: impl FnOnce(&Fixture) -> T) -> T {
    look(node.driver().as_any().downcast_ref().expect("a fixture"))
}

/// A backend or a job that counts what it is told.
#[derive(Debug, Default)]
pub(super) struct Hooks {
    pub(super) sections: Cell<u32>,
    pub(super) begins: Cell<u32>,
    pub(super) busy: Cell<bool>,
    pub(super) who: RefCell<String>,
    pub(super) device: RefCell<Option<Rc<str>>>,
}

impl ParentHooks for Hooks {
    fn drained_begin(&self) {
        self.sections.set(self.sections.get() + 1);
        self.begins.set(self.begins.get() + 1);
    }
    fn drained_poll(&self) -> bool {
        self.busy.get()
    }
    fn drained_end(&self) {
        self.sections.set(self.sections.get() - 1);
    }
    fn describe(&self) -> String {
        self.who.borrow().clone()
    }
    fn name(&self) -> Option<Rc<str>> {
        self.device.borrow().clone()
    }
    fn counters(&self) -> (u32, u32) {
        (self.sections.get(), u32::from(self.busy.get()))
    }
}

pub(super) fn try_backend(
    layer: &Layer,
    node: &Node,
    perm: Perm,
    shared: Perm,
) -> Result<(EdgeId, Rc<Hooks>), QmpError> {
    let hooks = Rc::<Hooks>::default();
    hooks.who.replace("an unnamed block device".into());
    let parent = Parent::Backend(layer.new_backend_id());
    let edge = layer.attach_root(
        parent,
        node.id,
        "root",
        perm,
        shared,
        Rc::clone(&hooks) as Rc<dyn ParentHooks>,
    )?;
    Ok((edge, hooks))
}

pub(super) fn backend(layer: &Layer, node: &Node, perm: Perm, shared: Perm) -> (EdgeId, Rc<Hooks>) {
    try_backend(layer, node, perm, shared).unwrap()
}

pub(super) fn job(layer: &Layer, node: &Node, name: &str, perm: Perm, shared: Perm) -> (EdgeId, Rc<Hooks>) {
    let hooks = Rc::<Hooks>::default();
    hooks.who.replace("stream job 'job0'".into());
    let parent = Parent::Job(JobId(0));
    let edge = layer.attach_root(
        parent,
        node.id,
        name,
        perm,
        shared,
        Rc::clone(&hooks) as Rc<dyn ParentHooks>,
    );
    (edge.unwrap(), hooks)
}

pub(super) fn attach(layer: &Layer, parent: &Rc<Node>, child: &Node, name: &str, role: Role) -> EdgeId {
    layer.attach_child(parent, child.id, name, role).unwrap()
}

/// One poll.
pub(super) fn poll<F: Future>(future: &mut Pin<Box<F>>) -> Poll<F::Output> {
    future.as_mut().poll(&mut Context::from_waker(Waker::noop()))
}

/// Runs something that has nothing to wait for.
pub(super) fn now<T>(future: impl Future<Output = T>) -> T {
    match poll(&mut Box::pin(future)) {
        Poll::Ready(value) => value,
        Poll::Pending => panic!("would wait"),
    }
}

pub(super) fn begin_request(node: &Node) {
    node.io.in_flight.begin();
}

pub(super) fn end_request(layer: &Layer, node: &Node) {
    node.io.in_flight.end();
    layer.kick();
}

pub(super) fn child_of(layer: &Layer, edge: EdgeId) -> NodeId {
    layer.edge(edge).child.get().unwrap()
}
