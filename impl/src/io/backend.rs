//! A backend (QEMU `BlockBackend`): the user side of a node. Guests, exports and jobs do their I/O through one.
//!
//! Rules: it checks bounds; while its root is drained it parks new requests in FIFO order (unless queuing is
//! disabled, for jobs and some exports, whose owners stop by themselves); it looks at its root only after parking,
//! so a parked request goes to the new root after a replacement. Every request holds the graph read lock for its
//! whole length, taken after parking.
//! Not here: throttling, error policies (jobs), the device a guest sees.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use crate::Layer;
use crate::error::{Errno, QmpError};
use crate::event::{Event, Parent};
use crate::graph::GraphReadGuard;
use crate::graph::edge::ParentHooks;
use crate::io::status::BlockStatus;
use crate::sync::Gate;
use crate::types::{BackendId, EdgeId, NodeId, Perm, ReqFlags};

/// What the device above a backend does when its node is drained (QEMU `BlockDevOps`). Called in the middle of graph
/// work: must not wait, nor change the graph.
pub trait DeviceHooks {
    /// Fetch no more requests.
    fn drained_begin(&self) {}
    /// Whether requests of its own are still going on; whoever ends the last one calls [`Backend::kick`].
    fn drained_poll(&self) -> bool {
        false
    }
    /// Go on.
    fn drained_end(&self) {}
}

/// The part of a backend that its root edge knows too. It holds no layer: the layer holds it.
struct State {
    id: BackendId,
    name: Option<Rc<str>>,
    edge: Cell<Option<EdgeId>>,
    gate: Gate,
    queue_when_drained: bool,
    write_cache: Cell<bool>,
    device: RefCell<Option<Rc<dyn DeviceHooks>>>,
}

impl State {
    fn device(&self) -> Option<Rc<dyn DeviceHooks>> {
        self.device.borrow().clone()
    }
}

impl ParentHooks for State {
    fn drained_begin(&self) {
        if self.gate.close()
            && let Some(device) = self.device()
        {
            device.drained_begin();
        }
    }

    fn drained_poll(&self) -> bool {
        self.device().is_some_and(|d| d.drained_poll()) || self.gate.in_flight() > 0
    }

    fn drained_end(&self) {
        // The parked requests are only made ready here, so the device hears of it before any of them runs.
        if self.gate.open()
            && let Some(device) = self.device()
        {
            device.drained_end();
        }
    }

    fn describe(&self) -> String {
        match &self.name {
            Some(name) => format!("block device '{name}'"),
            None => "an unnamed block device".to_owned(),
        }
    }

    fn name(&self) -> Option<Rc<str>> {
        self.name.clone()
    }

    fn counters(&self) -> (u32, u32) {
        (self.gate.closed(), self.gate.in_flight())
    }
}

/// A handle; clones share the backend. Dropping the last handle does NOT detach it: call [`Backend::remove`].
#[derive(Clone)]
pub struct Backend {
    layer: Layer,
    state: Rc<State>,
}

/// A handle for what the layer itself owns (exports, jobs): it does not keep the layer alive.
#[derive(Clone)]
pub(crate) struct BackendRef {
    layer: std::rc::Weak<crate::layer::Inner>,
    state: Rc<State>,
}

impl BackendRef {
    /// The backend. Whoever reaches the handle holds the layer.
    pub(crate) fn backend(&self) -> Backend {
        let inner = self
            .layer
            .upgrade()
            .expect("a backend does not outlive its layer");
        Backend {
            layer: Layer { inner },
            state: Rc::clone(&self.state),
        }
    }
}

impl std::fmt::Debug for BackendRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.state.id)
    }
}

impl std::fmt::Debug for Backend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.state.id)
    }
}

/// One request inside a backend: counted, and holding the graph read lock.
struct Inside<'a> {
    backend: &'a Backend,
    lock: Option<GraphReadGuard>,
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        drop(self.lock.take()); // first: whoever waits for the backend may want to change the graph
        let Backend { layer, state } = self.backend;
        layer.emit(|| Event::BackendEnd { backend: state.id });
        state.gate.exit(&layer.inner.idle);
    }
}

impl Backend {
    /// A backend with these permissions on `node` (attaches a `root` edge). Caller holds the main lock. `name`:
    /// shown in error texts as `block device '<name>'`; `None`: an unnamed block device. `queue_when_drained`:
    /// false for users that stop by themselves when drained (jobs, exports).
    ///
    /// # Errors
    /// A permission conflict.
    pub fn new(
        layer: &Layer,
        node: NodeId,
        name: Option<Rc<str>>,
        perm: Perm,
        shared: Perm,
        queue_when_drained: bool,
    ) -> Result<Backend, QmpError> {
        let state = Rc::new(State {
            id: layer.new_backend_id(),
            name,
            edge: Cell::new(None),
            gate: Gate::default(),
            queue_when_drained,
            write_cache: Cell::new(true),
            device: RefCell::new(None),
        });
        let hooks: Rc<dyn ParentHooks> = Rc::<State>::clone(&state);
        let edge = layer.attach_root(Parent::Backend(state.id), node, "root", perm, shared, hooks)?;
        state.edge.set(Some(edge));
        Ok(Backend {
            layer: layer.clone(),
            state,
        })
    }

    /// Waits for its requests, then detaches it. Requests parked meanwhile fail with `ENOMEDIUM`. Caller holds the
    /// main lock and reaps afterwards.
    pub async fn remove(self) {
        let Some(root) = self.root() else { return };
        let drained = self.layer.drained(root).await;
        if let Some(edge) = self.state.edge.take() {
            self.layer.detach(edge);
        }
        drop(drained);
    }

    /// A handle that does not keep the layer alive.
    pub(crate) fn downgrade(&self) -> BackendRef {
        BackendRef {
            layer: Rc::downgrade(&self.layer.inner),
            state: Rc::clone(&self.state),
        }
    }

    /// Identity.
    #[must_use]
    pub fn id(&self) -> BackendId {
        self.state.id
    }

    /// The name it was given.
    #[must_use]
    pub fn name(&self) -> Option<Rc<str>> {
        self.state.name.clone()
    }

    /// The node below now.
    #[must_use]
    pub fn root(&self) -> Option<NodeId> {
        self.state.edge.get().and_then(|e| self.layer.edge(e).child.get())
    }

    /// The root edge.
    #[must_use]
    pub fn root_edge(&self) -> Option<EdgeId> {
        self.state.edge.get()
    }

    /// Drained sections open on it, and requests inside.
    #[must_use]
    pub fn counters(&self) -> (u32, u32) {
        self.state.counters()
    }

    /// Installs the device's drain hooks; on a drained backend `drained_begin` is called at once.
    pub fn set_device(&self, device: Rc<dyn DeviceHooks>) {
        if self.state.gate.closed() > 0 {
            device.drained_begin();
        }
        *self.state.device.borrow_mut() = Some(device);
    }

    /// With the write cache off every write is durable on completion (FUA). On by default.
    pub fn set_write_cache(&self, enabled: bool) {
        self.state.write_cache.set(enabled);
    }

    /// The device made progress that a drained section may wait for.
    pub fn kick(&self) {
        self.layer.kick();
    }

    /// Length of the root in bytes.
    ///
    /// # Errors
    /// `ENOMEDIUM` without a root.
    pub fn length(&self) -> Result<u64, Errno> {
        let root = self.root().ok_or(Errno::ENOMEDIUM)?;
        self.layer.node_length(&self.layer.node(root))
    }

    /// Counts a request, parking it while the root is drained.
    async fn enter(&self) -> Inside<'_> {
        let Backend { layer, state } = self;
        let (idle, backend) = (&layer.inner.idle, state.id);
        if !state.queue_when_drained {
            state.gate.enter_closed();
        } else if !state.gate.try_enter(idle) {
            layer.emit(|| Event::BackendQueued { backend });
            state.gate.enter(idle).await;
            layer.emit(|| Event::BackendResumed { backend });
        }
        layer.emit(|| Event::BackendBegin { backend });
        let mut inside = Inside {
            backend: self,
            lock: None,
        };
        inside.lock = Some(layer.graph_read().await);
        inside
    }

    /// The root edge of a request within the medium.
    fn checked(&self, offset: u64, bytes: u64) -> Result<EdgeId, Errno> {
        let length = self.length()?;
        if offset > length || bytes > length - offset {
            return Err(Errno::EIO);
        }
        self.state.edge.get().ok_or(Errno::ENOMEDIUM)
    }

    /// The root edge of a write within the medium; `EPERM` when this backend may not write, as a guest's request on a
    /// read-only export is answered.
    fn checked_write(&self, offset: u64, bytes: u64, flags: ReqFlags) -> Result<EdgeId, Errno> {
        let edge = self.checked(offset, bytes)?;
        let mut enough = Perm::WRITE;
        if flags.contains(ReqFlags::WRITE_UNCHANGED) {
            enough |= Perm::WRITE_UNCHANGED;
        }
        if self.layer.edge(edge).perm.get().intersects(enough) {
            Ok(edge)
        } else {
            Err(Errno::EPERM)
        }
    }

    fn write_flags(&self, flags: ReqFlags) -> ReqFlags {
        if self.state.write_cache.get() {
            flags
        } else {
            flags | ReqFlags::FUA
        }
    }

    /// Reads.
    ///
    /// # Errors
    /// `EIO` beyond the end, `ENOMEDIUM` without a root, or what the layers below say.
    pub async fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), Errno> {
        let _inside = self.enter().await;
        let edge = self.checked(offset, buf.len() as u64)?;
        self.layer.read(edge, offset, buf, ReqFlags::empty()).await
    }

    /// Populates copy-on-read nodes without returning data.
    ///
    /// # Errors
    /// As [`Backend::read`].
    pub async fn prefetch(&self, offset: u64, bytes: u64) -> Result<(), Errno> {
        let _inside = self.enter().await;
        let edge = self.checked(offset, bytes)?;
        self.layer.prefetch(edge, offset, bytes, ReqFlags::empty()).await
    }

    /// Writes. Flags: FUA, WRITE_UNCHANGED, SERIALISING, NO_WAIT.
    ///
    /// # Errors
    /// As [`Backend::read`]; `EPERM` on a read-only node, or when the backend was opened without the permission.
    pub async fn write(&self, offset: u64, buf: &[u8], flags: ReqFlags) -> Result<(), Errno> {
        let _inside = self.enter().await;
        let edge = self.checked_write(offset, buf.len() as u64, flags)?;
        self.layer.write(edge, offset, buf, self.write_flags(flags)).await
    }

    /// Writes zeroes. Flags: MAY_UNMAP, NO_FALLBACK, and those of [`Backend::write`].
    ///
    /// # Errors
    /// As [`Backend::write`]; `ENOTSUP` with NO_FALLBACK where zeroing is not cheap.
    pub async fn write_zeroes(&self, offset: u64, bytes: u64, flags: ReqFlags) -> Result<(), Errno> {
        let _inside = self.enter().await;
        let edge = self.checked_write(offset, bytes, flags)?;
        self.layer
            .write_zeroes(edge, offset, bytes, self.write_flags(flags))
            .await
    }

    /// Discards.
    ///
    /// # Errors
    /// As [`Backend::write`].
    pub async fn discard(&self, offset: u64, bytes: u64) -> Result<(), Errno> {
        let _inside = self.enter().await;
        let edge = self.checked_write(offset, bytes, ReqFlags::empty())?;
        self.layer.discard(edge, offset, bytes).await
    }

    /// Flushes.
    ///
    /// # Errors
    /// `ENOMEDIUM` without a root, or what the layers below say.
    pub async fn flush(&self) -> Result<(), Errno> {
        let _inside = self.enter().await;
        let edge = self.state.edge.get().ok_or(Errno::ENOMEDIUM)?;
        let root = self.root().ok_or(Errno::ENOMEDIUM)?;
        self.layer.flush_through(edge, root).await
    }

    /// Status of the chain below (`block_status_above` to the end). Not counted by the backend, only by the nodes.
    ///
    /// # Errors
    /// As [`Backend::read`].
    pub async fn block_status(&self, offset: u64, bytes: u64) -> Result<BlockStatus, Errno> {
        let _lock = self.layer.graph_read().await;
        self.checked(offset, bytes)?;
        let root = self.root().ok_or(Errno::ENOMEDIUM)?;
        self.layer.block_status_above(root, None, offset, bytes).await
    }
}
