//! Commands that open nodes, or change on what they stand and how long they are.

use std::collections::BTreeSet;
use std::rc::Rc;

use blkcheck_model::layer::Cell;
use blkcheck_model::perm::Driver;
use blkcheck_model::{NodeId, World};
use serde_json::{Map, Value};

use super::{Books, UNKNOWN};

impl Books {
    /// A node was opened, or could not be. The format driver reads the head of its file to see whether it can; what stands
    /// between copies what is read.
    pub(in crate::compare) fn looked_into(
        &mut self,
        world: &World,
        execute: &str,
        arguments: &Map<String, Value>,
    ) {
        if execute == "blockdev-add" {
            self.looked_into_file(world, arguments);
        }
    }

    pub(super) fn looked_into_file(&mut self, world: &World, options: &Map<String, Value>) {
        let is_format = options.get("driver").is_some_and(|driver| driver == "qcow2");
        if is_format && let Some(file) = options.get("file") {
            self.head_was_read(world, file);
        }
        let inner = options.values().filter_map(Value::as_object);
        inner.for_each(|inner| self.looked_into_file(world, inner));
    }

    /// Of a node that is named, or described.
    pub(super) fn head_was_read(&mut self, world: &World, node: &Value) {
        let (mut at, mut copies) = match node {
            Value::String(name) => (world.graph.find(name), false),
            Value::Object(inner) => {
                self.inline_was_read(inner);
                let file = inner.get("file").and_then(Value::as_str);
                let copies = inner.get("driver").is_some_and(|driver| driver == "copy-on-read");
                (file.and_then(|name| world.graph.find(name)), copies)
            }
            _ => (None, false),
        };
        while let Some(id) = at {
            if copies {
                self.may_be_copied(world, id, 0..1);
            }
            copies = world.graph.node(id).driver == Driver::CopyOnRead;
            at = world
                .graph
                .primary_child(id)
                .filter(|_| world.graph.node(id).driver != Driver::Qcow2)
                .or_else(|| world.graph.chain_child(id));
        }
    }

    /// All of it was described in the command, and may be gone again.
    pub(super) fn inline_was_read(&mut self, options: &Map<String, Value>) {
        let mut at = options;
        let mut copies = false;
        while let Some(file) = at.get("file").and_then(Value::as_object) {
            copies |= at.get("driver").is_some_and(|driver| driver == "copy-on-read");
            at = file;
        }
        let name = at.get("filename").and_then(Value::as_str);
        if copies && let Some(file) = name.and_then(|name| self.files.get_mut(name)) {
            for grain in file.layer.cluster_of(0) {
                file.copied[grain].get_or_insert(UNKNOWN);
            }
        }
    }

    /// A command was accepted.
    pub(in crate::compare) fn opened(&mut self, execute: &str, arguments: &Map<String, Value>) {
        if execute == "blockdev-add" {
            self.opened_node(arguments);
        }
    }

    pub(super) fn opened_node(&mut self, options: &Map<String, Value>) {
        let text = |key: &str| options.get(key).and_then(Value::as_str);
        if let (Some("null-co"), Some(name)) = (text("driver"), text("node-name")) {
            // The name may have been another node's.
            if options.get("read-zeroes") == Some(&Value::Bool(true)) {
                self.zeroes.insert(name.to_owned());
            } else {
                self.zeroes.remove(name);
            }
        }
        options
            .values()
            .filter_map(Value::as_object)
            .for_each(|inner| self.opened_node(inner));
    }

    /// Images have got another length, if any have.
    pub(in crate::compare) fn resized(&mut self, before: &World, after: &World) {
        for (id, node) in after.graph.nodes() {
            let Some(old) = before
                .graph
                .nodes()
                .find(|(was, _)| *was == id)
                .map(|(_, n)| n.length)
            else {
                continue;
            };
            if node.driver == Driver::Qcow2 && node.length != old {
                self.resized_node(before, id, node.length);
            }
        }
    }

    /// What is new reads as zeroes; a backing file that is longer must not show there.
    pub(super) fn resized_node(&mut self, before: &World, id: NodeId, length: u64) {
        let old = before.graph.node(id).length;
        let covered = before
            .graph
            .cow_child(id)
            .is_some_and(|below| before.graph.node(below).length > old);
        let Some(name) = before.image_file(id) else { return };
        let at = |bytes: u64| usize::try_from(bytes / self.grain).unwrap_or(usize::MAX);
        let (from, to) = (at(old), at(length));
        let cluster = self.files.get(&*name).map_or(1, |file| file.layer.cluster);
        let split = from < to && !from.is_multiple_of(cluster);
        if covered && split {
            self.populate(before, id, from - 1..from);
        }
        let Some(file) = self.files.get_mut(&*name) else {
            return;
        };
        let in_half = split && file.layer.is_allocated(from - 1);
        let cells = &mut file.layer.cells;
        cells.resize(to, if covered { Cell::Zero } else { Cell::Unallocated });
        file.copied.resize(to, None);
        file.murky.resize(to, false);
        if in_half {
            let end = from.next_multiple_of(cluster).min(to);
            cells[from..end].fill(Cell::Stamp(0));
        }
    }

    /// Images whose nodes stand on other storage than before are given up, and so is that storage: what a qcow2 node knows of
    /// its tables is from the old one, and goes into the new one.
    pub(in crate::compare) fn moved(&mut self, before: &World, after: &World) {
        let mut given_up = BTreeSet::new();
        for (id, node) in after.graph.nodes() {
            let was_open = before.graph.nodes().any(|(was, _)| was == id);
            if node.driver != Driver::Qcow2 || !was_open {
                continue;
            }
            let (old, new) = (storage(before, id), storage(after, id));
            if old != new {
                given_up.extend(old);
                given_up.extend(new);
            }
        }
        for name in given_up {
            if let Some(file) = self.files.get_mut(&*name) {
                file.lost = true;
            }
        }
    }
}

/// The files that a node stands on, from above; through formats as well.
fn storage(world: &World, id: NodeId) -> Vec<Rc<str>> {
    let mut names = Vec::new();
    let mut at = world.graph.primary_child(id);
    while let Some(node) = at {
        names.extend(world.graph.node(node).filename.clone());
        // An overlay that was put below leaves to its backing file what it does not hold.
        if let Some(backing) = world.graph.cow_child(node) {
            names.extend(storage_or_own(world, backing));
        }
        at = world.graph.primary_child(node);
    }
    names
}

fn storage_or_own(world: &World, id: NodeId) -> Vec<Rc<str>> {
    let mut names: Vec<Rc<str>> = world.graph.node(id).filename.iter().cloned().collect();
    names.extend(storage(world, id));
    names
}
