//! Reopening nodes: `blockdev-reopen`, and the switch between read-only and writable that jobs and commands need.
//!
//! Rules (graph.md 4.12): drain, flush, let every driver prepare, judge options, change links, judge masks with the future flags,
//! then switch all or none. Options that are left out go back to their defaults. A child that was opened inline is
//! reopened with its parent and follows it unless its own options say otherwise; a backing file stays read-only.
//! A driver's own preparation waits for storage, so all of them come before the links change: under the graph lock
//! nothing waits. How one went is told at its node's turn.
//! Who does what: `options` names and inheritance; `queue` who takes part; `prepare` checks and links.

mod options;
mod prepare;
mod queue;
#[cfg(test)]
mod tests;

use std::rc::Rc;

use serde_json::{Map, Value};

use super::tran::Tran;
use crate::Layer;
use crate::dirty::DirtyBitmap;
use crate::error::QmpError;
use crate::graph::node::Node;
use crate::types::{NodeId, OpenFlags};
use queue::Entry;

/// A node before it was made writable for a command.
#[derive(Debug)]
pub(crate) struct BeforeWritable {
    /// It followed the one that opened it: no option `read-only` of its own.
    followed: bool,
    /// How it and what follows it are open. A follower that was reopened by itself may be writable, or not even allowed to
    /// become writable.
    flags: Vec<(Rc<Node>, OpenFlags)>,
    /// Bitmaps that were added while their nodes were read-only: no image holds them yet.
    unstored: Vec<Rc<DirtyBitmap>>,
}

impl Layer {
    /// `blockdev-reopen`: all of these nodes, or none. Main lock held, options checked against the schema. An empty list is
    /// nothing to do.
    pub(crate) async fn blockdev_reopen(&self, list: &[&Map<String, Value>]) -> Result<(), QmpError> {
        let mut queue = Vec::new();
        for given in list {
            let Some(name) = given.get("node-name").and_then(Value::as_str) else {
                return Err(QmpError::generic("node-name not specified"));
            };
            let Some(node) = self.find_node(name) else {
                return Err(QmpError::generic(format!(
                    "Failed to find node with node-name='{name}'"
                )));
            };
            self.queue_reopen(&mut queue, self.node(node), options::flatten(given), false);
        }
        self.reopen(&queue).await
    }

    /// Makes a node read-only or writable (`bdrv_reopen_set_read_only`), and with it what follows it.
    pub async fn set_read_only(&self, node: NodeId, read_only: bool) -> Result<(), QmpError> {
        self.reopen(&self.read_only_queue(node, read_only)).await
    }

    fn read_only_queue(&self, node: NodeId, read_only: bool) -> Vec<Entry> {
        // From now on this is an option of its own, and it no longer follows the node that opened it.
        let mut options = options::Flat::new();
        options.insert("read-only".to_owned(), read_only.into());
        let mut queue = Vec::new();
        self.queue_reopen(&mut queue, self.node(node), options, true);
        queue
    }

    /// What [`Layer::undo_writable`] has to know of a node that a command is about to make writable.
    pub(crate) fn before_writable(&self, node: NodeId) -> BeforeWritable {
        let queue = self.read_only_queue(node, false);
        let flags = queue.iter().map(|e| (Rc::clone(&e.node), e.node.flags.get()));
        let read_only = queue.iter().filter(|entry| !entry.node.is_writable());
        let unstored = read_only.flat_map(|entry| entry.node.bitmaps.borrow().clone());
        BeforeWritable {
            followed: !self.node(node).options.borrow().contains_key("read-only"),
            flags: flags.collect(),
            unstored: unstored.filter(|bitmap| bitmap.is_storable()).collect(),
        }
    }

    /// Read-only again after a command. `failed`: it did, and all is as if the node had never been writable. QEMU leaves
    /// the option behind, and that the node may be made writable.
    pub(crate) async fn undo_writable(
        &self,
        node: NodeId,
        failed: Option<BeforeWritable>,
    ) -> Result<(), QmpError> {
        let mut queue = self.read_only_queue(node, true);
        let Some(before) = failed else {
            return self.reopen(&queue).await;
        };
        for entry in &mut queue {
            let was = before.flags.iter().find(|(node, _)| node.id == entry.node.id);
            entry.flags = was.map_or(entry.flags, |(_, flags)| *flags);
        }
        // A node that becomes read-only stores its bitmaps, but for these.
        for bitmap in &before.unstored {
            bitmap.read_only.set(true);
        }
        let result = self.reopen(&queue).await;
        for bitmap in &before.unstored {
            bitmap.read_only.set(false);
        }
        result?;
        if before.followed {
            self.node(node).options.borrow_mut().remove("read-only");
        }
        Ok(())
    }

    /// All of the queue, or nothing of it (`bdrv_reopen_multiple`).
    async fn reopen(&self, queue: &[Entry]) -> Result<(), QmpError> {
        let mut sections = Vec::with_capacity(queue.len());
        for entry in queue {
            sections.push(self.drained(entry.node.id).await);
        }
        for entry in queue {
            self.flush(entry.node.id)
                .await
                .map_err(|e| QmpError::errno("Error flushing drive", e))?;
        }
        for child in queue.iter().flat_map(|entry| self.children_to_leave(entry)) {
            sections.push(self.drained(child).await);
        }
        let (prepared, failed) = self.prepare_drivers(queue).await;
        let write = self.graph_write().await;
        let result = self.switch(queue, failed);
        drop(write);
        if result.is_ok() {
            // From below: a format may write to its file.
            for entry in queue.iter().rev() {
                entry.node.driver().reopened(&self.cx(&entry.node)).await;
            }
        }
        if result.is_err() {
            for node in prepared.into_iter().rev() {
                // Back to what it was; the driver did that before, and the first error is the one to report.
                let _ = node.driver().reopen(&self.cx(node), node.flags.get()).await;
            }
        }
        result
    }

    /// Lets the drivers get ready. A format may need its file writable for that, and flushes into it before it becomes
    /// read-only: first what becomes writable, from below, then the rest from above. Nodes that did, and the place of the one
    /// that could not.
    async fn prepare_drivers<'a>(
        &self,
        queue: &'a [Entry],
    ) -> (Vec<&'a Rc<Node>>, Option<(usize, QmpError)>) {
        let order = || queue.iter().enumerate();
        let gains = |e: &Entry| e.flags.contains(OpenFlags::RDWR) && !e.node.is_writable();
        let first = order().rev().filter(|(_, e)| gains(e));
        let rest = order().filter(|(_, e)| !gains(e));
        let mut prepared = Vec::with_capacity(queue.len());
        for (at, entry) in first.chain(rest) {
            // What cannot be reopened at all is refused at its turn.
            if !entry.node.facts.can_reopen {
                continue;
            }
            let cx = self.cx(&entry.node);
            match entry.node.driver().reopen(&cx, entry.flags).await {
                Ok(()) => prepared.push(&entry.node),
                Err(refusal) => return (prepared, Some((at, refusal))),
            }
        }
        (prepared, None)
    }

    /// Judges everything and switches all nodes, or none. Nothing waits here.
    fn switch(&self, queue: &[Entry], mut failed: Option<(usize, QmpError)>) -> Result<(), QmpError> {
        for entry in queue {
            entry.node.reopen_flags.set(Some(entry.flags));
        }
        let mut tran = Tran::default();
        let mut starts = Vec::with_capacity(queue.len());
        let mut result = Ok(());
        for (at, entry) in queue.iter().enumerate() {
            let driver = match failed.take_if(|f| f.0 == at) {
                Some((_, refusal)) => Err(refusal),
                None => Ok(()),
            };
            result = self.prepare_entry(entry, driver, &mut starts, &mut tran);
            if result.is_err() {
                break;
            }
        }
        if result.is_ok() {
            starts.reverse();
            result = self.refresh_perms(&starts, &mut tran);
        }
        for entry in queue.iter().rev() {
            entry.node.reopen_flags.set(None);
            if result.is_ok() {
                self.take_over(entry);
            }
        }
        tran.finish(self, result)?;
        for entry in queue.iter().rev() {
            let _unchanged_on_error = self.refresh_limits(entry.node.id);
            let _unchanged_on_error = self.refresh_length(entry.node.id);
            self.lengths_follow_for_good(entry.node.id);
        }
        Ok(())
    }

    /// Nothing can fail any more: the node is what was wanted.
    fn take_over(&self, entry: &Entry) {
        let node = &entry.node;
        node.flags.set(entry.flags);
        node.detect_zeroes.set(entry.detect_zeroes);
        node.driver().take_options(&self.cx(node), &entry.all);
        let mut given = entry.given.clone();
        given.retain(|key, _| key != "file" && key != "backing");
        node.options.replace(given);
        node.opened.replace(entry.all.clone());
    }
}
