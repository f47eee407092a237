//! block-stream: arguments, refusals, start.
//!
//! Rules: refusals come in QEMU's order with QEMU's texts; a refused command leaves graph, permissions, freezes
//! and read-only flags as they were. The order of a start: reopen the device read-write if need be, insert the
//! copy-on-read filter (its open freezes the chain down to `bottom`), job with its edge on the filter, backend,
//! edges on the device and on every node down to the one above the base.
//! Not here: run phase and completion (`stream_run`).

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use serde_json::{Map, Value};

use crate::Layer;
use crate::error::QmpError;
use crate::graph::blockers::OpType;
use crate::graph::open::combine_filename;
use crate::io::backend::{Backend, BackendRef};
use crate::jobs::error_policy::OnError;
use crate::jobs::job::{Job, JobSpec};
use crate::jobs::txn::JobTxn;
use crate::types::{EdgeId, NodeId, Perm};

/// Arguments of block-stream.
#[derive(Clone, Debug, Default)]
pub struct StreamArgs {
    /// Job id.
    pub job_id: Option<String>,
    /// Node that receives the data.
    pub device: String,
    /// Base by file name.
    pub base: Option<String>,
    /// Base by node-name; not streamed.
    pub base_node: Option<String>,
    /// Last node that is streamed.
    pub bottom: Option<String>,
    /// What to record as backing file.
    pub backing_file: Option<String>,
    /// Record format `raw` for a protocol base.
    pub backing_mask_protocol: bool,
    /// Bytes per second; 0: unlimited.
    pub speed: i64,
    /// What to do with I/O errors.
    pub on_error: OnError,
    /// Name of the inserted filter.
    pub filter_node_name: Option<String>,
    /// Default true.
    pub auto_finalize: bool,
    /// Default true.
    pub auto_dismiss: bool,
}

/// A stream job's own state.
#[derive(Debug)]
pub(super) struct Stream {
    /// The device: receives the data (itself, or the image below it when it is a filter).
    pub(super) bs: NodeId,
    /// The copy-on-read filter above it, with the creation reference, until it is dropped.
    pub(super) filter: Cell<Option<NodeId>>,
    /// Last image that is streamed.
    pub(super) base_overlay: NodeId,
    /// Last node that is streamed: `base_overlay`, or a filter between it and the base.
    pub(super) above_base: NodeId,
    pub(super) backing_file: Option<String>,
    pub(super) backing_mask_protocol: bool,
    /// The device was read-only and becomes so again.
    pub(super) was_read_only: bool,
    pub(super) backend: RefCell<Option<BackendRef>>,
    pub(super) main_edge: Cell<Option<EdgeId>>,
}

/// What the arguments mean on the graph as it is.
struct Plan {
    bs: NodeId,
    base_overlay: NodeId,
    above_base: NodeId,
}

impl Layer {
    /// The node called `name`, in the words of `bdrv_lookup_bs(device, node_name)`.
    pub(crate) fn lookup(&self, device: &str, node_name: &str) -> Result<NodeId, QmpError> {
        self.find_node(node_name).ok_or_else(|| {
            QmpError::generic(format!(
                "Cannot find device='{device}' nor node-name='{node_name}'"
            ))
        })
    }

    /// Starts a stream job. Main lock held.
    pub(crate) async fn block_stream(&self, args: StreamArgs) -> Result<(), QmpError> {
        let plan = self.stream_plan(&args)?;
        let was_read_only = !self.node(plan.bs).is_writable();
        let before = self.before_writable(plan.bs);
        if was_read_only {
            self.freeze_chain(plan.bs, Some(plan.above_base))?;
            let reopened = self.set_read_only(plan.bs, false).await;
            self.unfreeze_chain(plan.bs, Some(plan.above_base));
            reopened?;
        }
        let started = self.stream_start(args, &plan, was_read_only).await;
        if started.is_err() && was_read_only {
            // As it was before; QEMU ignores a failure here as well.
            drop(self.undo_writable(plan.bs, Some(before)).await);
        }
        started
    }

    async fn stream_start(&self, args: StreamArgs, plan: &Plan, was_read_only: bool) -> Result<(), QmpError> {
        let filter = self
            .stream_insert_filter(plan, args.filter_node_name.as_deref())
            .await?;
        let stream = Rc::new(Stream {
            bs: plan.bs,
            filter: Cell::new(Some(filter)),
            base_overlay: plan.base_overlay,
            above_base: plan.above_base,
            backing_file: args.backing_file,
            backing_mask_protocol: args.backing_mask_protocol,
            was_read_only,
            backend: RefCell::new(None),
            main_edge: Cell::new(None),
        });
        let spec = JobSpec {
            id: args.job_id,
            on_error: args.on_error,
            auto_finalize: args.auto_finalize,
            auto_dismiss: args.auto_dismiss,
        };
        let created = Job::create(self, spec, Rc::clone(&stream) as _, &JobTxn::new());
        let attached = match &created {
            Ok(job) => stream.attach(self, job, args.speed),
            Err(refusal) => Err(refusal.clone()),
        };
        if let Err(refusal) = attached {
            if let Ok(job) = &created {
                job.early_fail();
            }
            stream.release_backend().await;
            stream
                .drop_filter(self, None)
                .await
                .expect("a filter that was inserted a moment ago can go");
            return Err(refusal);
        }
        created.expect("attached").start();
        Ok(())
    }

    /// Opens the copy-on-read filter and moves the parents of the device above it.
    async fn stream_insert_filter(&self, plan: &Plan, name: Option<&str>) -> Result<NodeId, QmpError> {
        let mut options = Map::new();
        options.insert("driver".into(), Value::from("copy-on-read"));
        options.insert("file".into(), Value::from(&*self.node(plan.bs).name));
        options.insert("bottom".into(), Value::from(&*self.node(plan.base_overlay).name));
        if let Some(name) = name {
            options.insert("node-name".into(), Value::from(name));
        }
        let filter = self
            .open_node(options)
            .await
            .map_err(|refusal| refusal.prefixed("Could not create node: "))?;
        self.node(filter).implicit.set(name.is_none());
        if let Err(refusal) = self.replace_node(plan.bs, filter).await {
            self.unhold(filter);
            // It still may write to the device, which could not become read-only again.
            self.reap().await;
            return Err(refusal.prefixed("Could not replace node: "));
        }
        Ok(filter)
    }

    /// Refusals that depend on the arguments and the graph only, in QEMU's order.
    fn stream_plan(&self, args: &StreamArgs) -> Result<Plan, QmpError> {
        let exclusive = |a: &Option<String>, b: &Option<String>, names: (&str, &str)| match (a, b) {
            (Some(_), Some(_)) => Err(QmpError::generic(format!(
                "'{}' and '{}' cannot be specified at the same time",
                names.0, names.1
            ))),
            _ => Ok(()),
        };
        exclusive(&args.base, &args.base_node, ("base", "base-node"))?;
        exclusive(&args.base, &args.bottom, ("base", "bottom"))?;
        exclusive(&args.bottom, &args.base_node, ("bottom", "base-node"))?;
        let bs = self.lookup(&args.device, &args.device)?;
        let base = match (&args.base, &args.base_node) {
            (Some(base), _) => Some(
                self.find_backing_image(bs, base)
                    .ok_or_else(|| QmpError::generic(format!("Can't find '{base}' in the backing chain")))?,
            ),
            (None, Some(name)) => {
                let base = self.lookup("", name)?;
                if base == bs || !self.chain_contains(bs, base) {
                    let text = format!("Node '{name}' is not a backing image of '{}'", args.device);
                    return Err(QmpError::generic(text));
                }
                Some(base)
            }
            (None, None) => None,
        };
        let bottom = args
            .bottom
            .as_ref()
            .map(|name| self.stream_bottom(bs, name, &args.device))
            .transpose()?;
        self.stream_check_blockers(bs, bottom.map_or(base, |bottom| self.filter_or_cow(bottom)))?;
        if args.backing_file.is_some() && base.is_none() {
            return Err(QmpError::generic(
                "backing file specified, but streaming the entire chain",
            ));
        }
        let (base_overlay, above_base) = match bottom {
            Some(bottom) => (bottom, bottom),
            None => self.stream_overlay_of(bs, base)?,
        };
        Ok(Plan {
            bs,
            base_overlay,
            above_base,
        })
    }

    fn stream_bottom(&self, bs: NodeId, name: &str, device: &str) -> Result<NodeId, QmpError> {
        let bottom = self.lookup("", name)?;
        let node = self.node(bottom);
        let text = if node.driver_opt().is_none() {
            format!("Node '{name}' is not open")
        } else if node.facts.is_filter {
            format!("Node '{name}' is a filter, use a non-filter node as 'bottom'")
        } else if !self.chain_contains(bs, bottom) {
            format!("Node '{name}' is not in a chain starting from '{device}'")
        } else {
            return Ok(bottom);
        };
        Err(QmpError::generic(text))
    }

    /// Every node from the device down to `end` exclusive must allow streaming.
    fn stream_check_blockers(&self, bs: NodeId, end: Option<NodeId>) -> Result<(), QmpError> {
        let mut at = Some(bs);
        while let Some(node) = at
            && at != end
        {
            self.op_blocked(node, OpType::Stream)?;
            at = self.filter_or_cow(node);
        }
        Ok(())
    }

    /// The image above the base, and the lowest node above the base.
    fn stream_overlay_of(&self, bs: NodeId, base: Option<NodeId>) -> Result<(NodeId, NodeId), QmpError> {
        let Some(base_overlay) = self.find_overlay(bs, base) else {
            let name =
                |node: Option<NodeId>| node.map_or_else(String::new, |n| self.node(n).name.to_string());
            return Err(QmpError::generic(format!(
                "'{}' is not in the backing chain of '{}'",
                name(base),
                name(Some(bs))
            )));
        };
        let mut above_base = base_overlay;
        while self.filter_or_cow(above_base) != base {
            above_base = self
                .filter_or_cow(above_base)
                .expect("the base is below its overlay");
        }
        Ok((base_overlay, above_base))
    }

    /// The image below `bs` that a header or a user calls `name`.
    fn find_backing_image(&self, bs: NodeId, name: &str) -> Option<NodeId> {
        let mut at = self.skip_filters(bs);
        while let Some(below) = self.backing_chain_next(at) {
            let exact = self.exact_filename(below);
            let found = if self.backing_overridden(at) {
                exact.as_deref() == Some(name)
            } else {
                // Relative names count from the directory of the overlay, as in its header.
                exact.is_some_and(|exact| exact == combine_filename(&self.node_filename(at), name))
            };
            if found {
                return Some(below);
            }
            at = below;
        }
        None
    }

    /// The name by which opening gives this very node with all that is below it; `None` where there is no such name,
    /// since the node has options or a backing node that no header names (QEMU shows such nodes as `json:`).
    fn exact_filename(&self, node: NodeId) -> Option<String> {
        let subject = self.node(node);
        if subject.facts.is_filter {
            // That of a backup goes by its file's name although a user can see it.
            let named = subject.implicit.get() || subject.facts.name == "copy-before-write";
            let child = self.filter_or_cow(node).filter(|_| named)?;
            return self.exact_filename(child);
        }
        let windowed = |key| subject.facts.name == "raw" && subject.options.borrow().contains_key(key);
        if windowed("offset") || windowed("size") {
            return None;
        }
        // A raw node over anything but a file is more than its name says.
        let over_file = || {
            let file = subject.file.get().and_then(|e| self.child(e));
            file.is_some_and(|file| file.facts.is_protocol)
        };
        (!self.backing_overridden(node) && (subject.facts.is_protocol || over_file()))
            .then(|| self.node_filename(node))
            .filter(|name| !name.is_empty())
    }

    /// Whether the backing node is another one than the header names.
    fn backing_overridden(&self, node: NodeId) -> bool {
        let header = self.node(node).driver().backing_header();
        let named = header.map(|(file, _)| combine_filename(&self.node_filename(node), &file));
        match self.cow(node) {
            None => named.is_some(),
            Some(backing) => named.is_none() || self.exact_filename(backing) != named,
        }
    }

    /// The name by which a header would refer to the node's content.
    pub(crate) fn node_filename(&self, node: NodeId) -> String {
        let node = self.node(node);
        node.driver().filename(&self.cx(&node))
    }
}

impl Stream {
    /// The job's edges, backend and speed.
    fn attach(&self, layer: &Layer, job: &Rc<Job>, speed: i64) -> Result<(), QmpError> {
        let filter = self.filter.get().expect("the filter was just inserted");
        self.main_edge.set(Some(job.add_edge(
            "main node",
            filter,
            Perm::empty(),
            Perm::all(),
        )?));
        job.set_speed(speed)?;
        // The job's requests must reach the node while it is being drained: the drain waits for the job.
        let shared = Perm::all() - Perm::RESIZE;
        let backend = Backend::new(layer, filter, None, Perm::CONSISTENT_READ, shared, false)?;
        self.backend.replace(Some(backend.downgrade()));
        job.add_edge("active node", self.bs, Perm::empty(), shared)?;
        // Nobody may write to what is being streamed away.
        let base = layer.filter_or_cow(self.above_base);
        let mut at = layer.filter_or_cow(self.bs);
        while let Some(node) = at
            && at != base
        {
            let shared = Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED;
            job.add_edge("intermediate node", node, Perm::empty(), shared)?;
            at = layer.filter_or_cow(node);
        }
        Ok(())
    }

    /// Takes the filter out of the graph, if it still is there. On failure it stays, not frozen any more.
    pub(super) async fn drop_filter(&self, layer: &Layer, job: Option<&Job>) -> Result<(), QmpError> {
        let Some(filter) = self.filter.get() else {
            return Ok(());
        };
        let node = layer.node(filter);
        node.driver().unfreeze(&layer.cx(&node));
        layer.drop_filter(filter).await?;
        self.filter.set(None);
        if let (Some(job), Some(edge)) = (job, self.main_edge.take()) {
            job.remove_edge(edge);
        }
        layer.unhold(filter);
        Ok(())
    }

    /// Gives the job's backend back.
    pub(super) async fn release_backend(&self) {
        let backend = self.backend.borrow_mut().take();
        if let Some(backend) = backend {
            backend.backend().remove().await;
        }
    }
}
