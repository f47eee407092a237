//! Reopening nodes: the switch between read-only and writable.
//!
//! Rules (graph.md 4.12): drain, flush, let every driver prepare, judge masks with the future flags, then switch all or
//! none. A child that was opened inline follows its parent unless its own options say otherwise; a backing file does not.
//! Not here: other options of blockdev-reopen, and links (`set_slot_noperm` is ready for them).

use std::rc::Rc;

use super::tran::Tran;
use crate::Layer;
use crate::error::QmpError;
use crate::graph::node::Node;
use crate::types::{NodeId, OpenFlags, Role};

impl Layer {
    /// Makes a node read-only or writable (`bdrv_reopen_set_read_only`). No change if it already is.
    pub async fn set_read_only(&self, node: NodeId, read_only: bool) -> Result<(), QmpError> {
        let writable = !read_only;
        if self.node(node).is_writable() == writable {
            return Ok(());
        }
        let mut queue = Vec::new();
        self.queue_reopen(self.node(node), writable, &mut queue);
        let mut sections = Vec::with_capacity(queue.len());
        for node in &queue {
            sections.push(self.drained(node.id).await);
        }
        for node in &queue {
            self.flush(node.id)
                .await
                .map_err(|e| QmpError::errno("Error flushing drive", e))?;
        }
        // A format may need its file writable to prepare, and flushes into it before it becomes read-only.
        if writable {
            queue.reverse();
        }
        self.reopen_drained(&queue, writable).await?;
        // From now on this is an option of its own, and it no longer follows the node that opened it.
        let options = &self.node(node).options;
        options
            .borrow_mut()
            .insert("read-only".to_owned(), read_only.into());
        Ok(())
    }

    /// The node follows the one that opened it: no option `read-only` of its own.
    pub(crate) fn follows_read_only(&self, node: NodeId) -> bool {
        !self.node(node).options.borrow().contains_key("read-only")
    }

    /// Read-only again after a command that failed: as if it had never been writable. `followed`: what
    /// [`Layer::follows_read_only`] said before. QEMU leaves the option behind.
    pub(crate) async fn undo_writable(&self, node: NodeId, followed: bool) -> Result<(), QmpError> {
        self.set_read_only(node, true).await?;
        if followed {
            self.node(node).options.borrow_mut().remove("read-only");
        }
        Ok(())
    }

    /// The node, then what follows it below.
    fn queue_reopen(&self, node: Rc<Node>, writable: bool, queue: &mut Vec<Rc<Node>>) {
        let children = node.children.borrow().clone();
        let parent = node.id;
        queue.push(node);
        for edge in children {
            let (role, child) = (
                self.edge(edge).role,
                self.child(edge).expect("a listed child edge has a child"),
            );
            let follows = child.inherits_from.get() == Some(parent)
                && !role.contains(Role::COW)
                && self.follows_read_only(child.id)
                && child.is_writable() != writable
                && !queue.iter().any(|n| n.id == child.id);
            if follows {
                self.queue_reopen(child, writable, queue);
            }
        }
    }

    async fn reopen_drained(&self, queue: &[Rc<Node>], writable: bool) -> Result<(), QmpError> {
        let mut prepared = 0;
        let mut result = Ok(());
        for node in queue {
            result = self.prepare_reopen(node, writable).await;
            if result.is_err() {
                break;
            }
            prepared += 1;
        }
        if result.is_ok() {
            result = self.switch_writable(queue, writable);
        }
        if result.is_err() {
            for node in queue[..prepared].iter().rev() {
                // Back to what it was; the driver did that before, and the first error is the one to report.
                let _ = node.driver().reopen(&self.cx(node), !writable).await;
            }
        }
        result
    }

    async fn prepare_reopen(&self, node: &Rc<Node>, writable: bool) -> Result<(), QmpError> {
        if !node.facts.can_reopen {
            let (format, name) = (node.facts.name, &node.name);
            let text =
                format!("Block format '{format}' used by node '{name}' does not support reopening files");
            return Err(QmpError::generic(text));
        }
        // It goes with read-only only, and cannot be changed together.
        if node.force_share.get() {
            return Err(QmpError::generic("Cannot change the option 'force-share'"));
        }
        node.driver().reopen(&self.cx(node), writable).await
    }

    /// Judges masks with the future flags and switches all nodes, or none.
    fn switch_writable(&self, queue: &[Rc<Node>], writable: bool) -> Result<(), QmpError> {
        for node in queue {
            let mut flags = node.flags.get();
            flags.set(OpenFlags::RDWR, writable);
            node.reopen_flags.set(Some(flags));
        }
        let starts: Vec<NodeId> = queue.iter().map(|n| n.id).collect();
        let mut tran = Tran::default();
        let result = self.refresh_perms(&starts, &mut tran);
        for node in queue {
            let flags = node.reopen_flags.take().expect("set above");
            if result.is_ok() {
                node.flags.set(flags);
            }
        }
        tran.finish(self, result)?;
        for node in queue {
            let _unchanged_on_error = self.refresh_limits(node.id);
        }
        Ok(())
    }
}
