//! One node of a reopen is judged and its links are changed, all of it in a transaction (graph.md 4.12).
//!
//! Rules: the order of checks is QEMU's: common options, the driver, a backing file that was forgotten, `backing`, `file`,
//! and at last every option that is left must be what it was. Links change at once, so that later nodes of the queue see them;
//! permissions are judged when all are done.

use serde_json::Value;

use super::options::COMMON;
use super::queue::Entry;
use crate::Layer;
use crate::error::QmpError;
use crate::graph::node::{DetectZeroes, Node};
use crate::graph::reopen::options;
use crate::graph::tran::Tran;
use crate::types::{NodeId, OpenFlags};

/// The slots that reopening can fill anew.
const SLOTS: [&str; 2] = ["backing", "file"];

fn refuse<T>(text: String) -> Result<T, QmpError> {
    Err(QmpError::generic(text))
}

impl Layer {
    /// Judges one entry and changes its links. `driver`: how its driver's own preparation went. Nodes that lost a parent
    /// are added to `starts`.
    pub(super) fn prepare_entry(
        &self,
        entry: &Entry,
        driver: Result<(), QmpError>,
        starts: &mut Vec<NodeId>,
        tran: &mut Tran,
    ) -> Result<(), QmpError> {
        let node = &entry.node;
        starts.push(node.id);
        if entry.detect_zeroes == DetectZeroes::Unmap && !entry.flags.contains(OpenFlags::UNMAP) {
            return Err(QmpError::generic(
                "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap",
            ));
        }
        if !node.facts.can_reopen {
            let (format, name) = (node.facts.name, self.device_or_node_name(node));
            return refuse(format!(
                "Block format '{format}' used by node '{name}' does not support reopening files"
            ));
        }
        self.check_omitted(entry)?;
        let mut left = entry.all.clone();
        node.driver().reopen_options(&self.cx(node), &mut left)?;
        driver?;
        let has_backing = || node.backing.get().is_some() || node.driver().backing_header().is_some();
        if node.facts.supports_backing && entry.backing_missing && has_backing() {
            return refuse(format!("backing is missing for '{}'", node.name));
        }
        for slot in SLOTS {
            if let Some(value) = left.remove(slot) {
                self.fill_slot(node, slot, &value, starts, tran)?;
            }
        }
        self.check_unchanged(node, &left)
    }

    /// Options that were given before and are left out now go back to their defaults, where they can.
    fn check_omitted(&self, entry: &Entry) -> Result<(), QmpError> {
        let node = &entry.node;
        let mut before = options::held(node);
        if node.force_share.get() {
            before.entry("force-share").or_insert(true.into());
        }
        let pinned = |key: &&String| {
            !entry.all.contains_key(key.as_str())
                && !COMMON.contains(&key.as_str())
                && !node.facts.mutable_options.contains(&key.as_str())
        };
        match before.keys().filter(pinned).min_by_key(|key| options::place(key)) {
            None => Ok(()),
            Some(key) => refuse(format!("Option '{key}' cannot be reset to its default value")),
        }
    }

    /// The node that a slot shall lead to.
    fn slot_value(&self, node: &Node, slot: &str, value: &Value) -> Result<Option<NodeId>, QmpError> {
        let Value::String(name) = value else {
            return Ok(None);
        };
        let new = self.lookup("", name)?;
        if self.reachable(new, node.id) {
            return refuse(format!(
                "Making '{name}' a {slot} child of '{}' would create a cycle",
                node.name
            ));
        }
        Ok(Some(new))
    }

    fn slot_child(&self, node: &Node, slot: &str) -> Option<NodeId> {
        let edge = if slot == "backing" {
            node.backing.get()
        } else {
            node.file.get()
        };
        edge.and_then(|e| self.child(e)).map(|child| child.id)
    }

    /// Children whose links an entry may change: they have to be drained before.
    pub(super) fn children_to_leave(&self, entry: &Entry) -> Vec<NodeId> {
        let leaves = |slot: &&str| {
            let old = self.slot_child(&entry.node, slot)?;
            let stays = match entry.all.get(*slot)? {
                Value::String(name) => *name == *self.node(old).name,
                _ => false,
            };
            (!stays).then_some(old)
        };
        SLOTS.iter().filter_map(leaves).collect()
    }

    /// `bdrv_reopen_parse_file_or_backing`.
    fn fill_slot(
        &self,
        node: &std::rc::Rc<Node>,
        slot: &str,
        value: &Value,
        starts: &mut Vec<NodeId>,
        tran: &mut Tran,
    ) -> Result<(), QmpError> {
        let new = self.slot_value(node, slot, value)?;
        let old = self.slot_child(node, slot);
        if new == old {
            return Ok(());
        }
        if let Some(old) = old {
            // A job's own filter stays where it is.
            if Some(self.skip_implicit_filters(old)) == new {
                return Ok(());
            }
            if self.node(old).implicit.get() {
                return refuse(format!("Cannot replace implicit {slot} child of {}", node.name));
            }
        } else if node.facts.is_filter {
            return refuse(format!(
                "'{}' is a {} filter node that does not support a {slot} child",
                node.name, node.facts.name
            ));
        }
        starts.extend(old);
        self.set_slot_noperm(node, new, slot == "backing", tran)
    }

    /// Options that nobody took must be what they were; a name may say who the child is anyway.
    fn check_unchanged(&self, node: &Node, left: &options::Flat) -> Result<(), QmpError> {
        let before = options::held(node);
        let children = node.children.borrow();
        let is_child = |key: &str, value: &Value| {
            children.iter().any(|&e| {
                *self.edge(e).name == *key && self.child(e).is_some_and(|c| value.as_str() == Some(&*c.name))
            })
        };
        let mut left: Vec<_> = left.iter().collect();
        left.sort_by_key(|(key, _)| options::place(key));
        for (key, value) in left {
            let same = match key.as_str() {
                key if COMMON[1..].contains(&key) => true,
                // Compared with itself in another type there, so it never is what it was.
                "force-share" | "active" => false,
                key => before.get(key) == Some(value) || is_child(key, value),
            };
            if !same {
                return refuse(format!("Cannot change the option '{key}'"));
            }
        }
        Ok(())
    }
}
