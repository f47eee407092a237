//! A job's place in the graph: edges, op blockers, drain hooks; its QMP events and error decisions.
//!
//! Rules: a job edge stays at its node when the node is replaced; each brings an op blocker for every operation;
//! while its node is drained it counts as one reason to pause.
//! Edges below the filter stay until the job is dismissed, as in QEMU: the nodes stay busy until then. The edge on
//! the job's own filter goes when the job is over (`remove_edge`), so that no filter without child remains.

use std::rc::{Rc, Weak};

use serde_json::{Value, json};

use crate::Layer;
use crate::error::{Errno, QmpError};
use crate::event::{Event, Parent};
use crate::graph::edge::ParentHooks;
use crate::jobs::error_policy::{ErrorAction, OnError};
use crate::jobs::job::Job;
use crate::jobs::status::JobStatus;
use crate::types::{EdgeId, NodeId, Perm};

/// Drain callbacks of one job edge.
#[derive(Debug)]
struct JobHooks {
    job: Weak<Job>,
    description: Rc<str>,
}

impl ParentHooks for JobHooks {
    fn drained_begin(&self) {
        if let Some(job) = self.job.upgrade() {
            job.pause();
        }
    }

    fn drained_poll(&self) -> bool {
        self.job
            .upgrade()
            .is_some_and(|job| job.busy.get() && !job.status.get().is_completed())
    }

    fn drained_end(&self) {
        if let Some(job) = self.job.upgrade() {
            job.resume();
        }
    }

    fn describe(&self) -> String {
        self.description.to_string()
    }

    fn name(&self) -> Option<Rc<str>> {
        None
    }
}

impl Job {
    /// Attaches an edge to `node` and blocks its operations. Main lock held.
    pub(crate) fn add_edge(
        self: &Rc<Job>,
        name: &str,
        node: NodeId,
        perm: Perm,
        shared: Perm,
    ) -> Result<EdgeId, QmpError> {
        let layer = self.layer();
        let kind = self.driver.kind();
        let hooks = JobHooks {
            job: Rc::downgrade(self),
            description: format!("{kind} job '{}'", self.name).into(),
        };
        let edge = layer.attach_root(Parent::Job(self.id), node, name, perm, shared, Rc::new(hooks))?;
        layer.block_ops(
            node,
            edge,
            &format!("block device is in use by block job: {kind}"),
        );
        self.edges.borrow_mut().insert(0, edge);
        Ok(edge)
    }

    /// Detaches one edge before the job is dismissed. Main lock held.
    pub(crate) fn remove_edge(&self, edge: EdgeId) {
        let at = self.edges.borrow().iter().position(|e| *e == edge);
        if let Some(at) = at {
            self.edges.borrow_mut().remove(at);
            self.detach(&self.layer(), edge);
        }
    }

    /// Detaches all edges, newest first. Main lock held.
    pub(crate) fn remove_edges(&self) {
        let layer = self.layer();
        for edge in self.edges.take() {
            self.detach(&layer, edge);
        }
    }

    fn detach(&self, layer: &Layer, edge: EdgeId) {
        let node = layer.child(edge).expect("a job edge stays at its node");
        layer.unblock_ops(node.id, edge);
        layer.detach(edge);
    }

    /// Edges, newest first.
    #[must_use]
    pub fn edges(&self) -> Vec<EdgeId> {
        self.edges.borrow().clone()
    }

    /// Decides about an I/O error and tells; a stop counts as a pause by the user.
    pub(crate) fn error_action(&self, operation: &'static str, errno: Errno) -> ErrorAction {
        self.error_action_by(self.on_error, operation, errno)
    }

    /// The same by a policy for one side of the job.
    pub(crate) fn error_action_by(
        &self,
        policy: OnError,
        operation: &'static str,
        errno: Errno,
    ) -> ErrorAction {
        let action = policy.action(errno);
        self.qmp(
            "BLOCK_JOB_ERROR",
            || json!({"device": *self.name, "operation": operation, "action": action.name()}),
        );
        if action == ErrorAction::Stop {
            if !self.user_paused.replace(true) {
                // The job itself is here, not yielded: it parks at its next pause point.
                self.pause();
            }
            self.io_status.set(self.io_status.get().after(errno));
        }
        action
    }

    fn qmp(&self, name: &'static str, data: impl FnOnce() -> Value) {
        self.layer().emit(|| Event::Qmp {
            name,
            data: Rc::new(data()),
        });
    }

    pub(crate) fn emit_status_change(&self, status: JobStatus) {
        self.qmp(
            "JOB_STATUS_CHANGE",
            || json!({"status": status.name(), "id": *self.name}),
        );
    }

    /// Waiting for job-finalize.
    pub(crate) fn emit_pending(&self) {
        self.qmp(
            "BLOCK_JOB_PENDING",
            || json!({"type": self.driver.kind(), "id": *self.name}),
        );
    }

    /// Completed (also with an error) or cancelled.
    pub(crate) fn emit_over(&self) {
        let cancelled = self.is_cancelled();
        self.qmp(
            if cancelled {
                "BLOCK_JOB_CANCELLED"
            } else {
                "BLOCK_JOB_COMPLETED"
            },
            || {
                let mut data = json!({
                    "device": *self.name,
                    "len": self.total.get(),
                    "offset": self.progress.get(),
                    "speed": self.speed.get(),
                    "type": self.driver.kind(),
                });
                if let (false, Err(errno)) = (cancelled, self.ret.get()) {
                    data["error"] = json!(errno.text());
                }
                data
            },
        );
    }

    /// The job as `query-jobs` shows it.
    #[must_use]
    pub fn info(&self) -> Value {
        let mut info = json!({
            "id": *self.name,
            "type": self.driver.kind(),
            "status": self.status.get().name(),
            "current-progress": self.progress.get(),
            "total-progress": self.total.get(),
        });
        if let Err(errno) = self.ret.get() {
            info["error"] = json!(errno.text());
        }
        info
    }

    /// The job as `query-block-jobs` shows it.
    #[must_use]
    pub fn block_info(&self) -> Value {
        let mut info = json!({
            "type": self.driver.kind(),
            "device": *self.name,
            "busy": self.busy.get(),
            "paused": self.pause_count.get() > 0,
            "offset": self.progress.get(),
            "len": self.total.get(),
            "speed": self.speed.get(),
            "io-status": self.io_status.get().name(),
            "ready": self.status.get().is_ready(),
            "status": self.status.get().name(),
            "auto-finalize": self.auto_finalize,
            "auto-dismiss": self.auto_dismiss,
        });
        if let Err(errno) = self.ret.get() {
            info["error"] = json!(errno.text());
        }
        info
    }
}
