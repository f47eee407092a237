//! Which bitmaps a guest's request marks, and how bitmaps follow their nodes: images opened, closed and made read-only.
//!
//! Rules: a write or a zeroing request marks its range on the node it is for and, through filters and raw nodes, on what
//! is below, once it is done; so does a discard, but only as far as nodes pass discards on. Copying on read marks
//! nothing, since what a guest sees stays as it is.
//! A bitmap is stored when its node becomes read-only or is closed, and loaded when it is opened; in between the image
//! says that what it holds is out of date.
//! Differs from QEMU 10.0: a bitmap that a backup uses is stored with what was recorded meanwhile.
//! Not predicted: what a qcow2 node writes to its file, what a copy-before-write filter writes to its target, and where a copy-on-read filter that is not directly above an
//! image writes to what is below that. Bitmaps that record there are unknown until they are cleared and at rest.

use std::ops::Range;
use std::rc::Rc;

use crate::bitmap::{Bitmap, StoredBitmap};
use crate::graph::{Graph, NodeId, Parent};
use crate::perm::Driver;
use crate::window::Window;
use crate::world::{Qcow2Facts, World};

impl World {
    /// A guest wrote these bytes of a node, or zeroed them.
    pub fn guest_wrote(&mut self, node: NodeId, bytes: Range<u64>) {
        self.mark_below(node, bytes, |_| true);
    }

    /// A guest discarded these bytes of a node.
    pub fn guest_discarded(&mut self, node: NodeId, bytes: Range<u64>) {
        let passes = |graph: &Graph, id| {
            let node = graph.node(id);
            node.unmap && node.driver != Driver::NullCo
        };
        let graph = self.graph.clone();
        self.mark_below(node, bytes, |id| passes(&graph, id));
    }

    /// A request on this very node ended. Unless all of it was done for `sure`, nobody knows what it marked.
    /// A node that is read-only has become so by a command that is not through yet here: what it stores is not stored yet.
    pub fn node_written(&mut self, node: NodeId, bytes: Range<u64>, sure: bool) {
        if bytes.is_empty() || self.graph.node(node).bitmaps.is_empty() {
            return;
        }
        for bitmap in &mut self.graph.node_mut(node).bitmaps {
            if sure {
                bitmap.record(bytes.clone());
            } else {
                bitmap.lose_track(true);
            }
        }
        if !self.graph.node(node).writable {
            let bitmaps = self.graph.node(node).bitmaps.clone();
            for stored in self.header_mut(node).into_iter().flat_map(|h| &mut h.bitmaps) {
                let kept = |bitmap: &&Bitmap| bitmap.persistent && !bitmap.inconsistent && !stored.in_use;
                if let Some(bitmap) = bitmaps.iter().filter(kept).find(|b| b.name == stored.name) {
                    *stored = as_stored(bitmap);
                }
            }
        }
    }

    fn mark_below(&mut self, node: NodeId, mut bytes: Range<u64>, goes_on: impl Fn(NodeId) -> bool) {
        let mut next = Some(node);
        while let Some(id) = next.filter(|id| !bytes.is_empty() && goes_on(*id)) {
            let node = self.graph.node_mut(id);
            for bitmap in &mut node.bitmaps {
                bitmap.record(bytes.clone());
            }
            let passes_on = node.driver == Driver::Raw || node.driver.is_filter();
            if node.driver == Driver::Raw {
                let offset = Window::at(&node.options).offset();
                bytes = bytes.start.saturating_add(offset)..bytes.end.saturating_add(offset);
            }
            next = self.graph.primary_child(id).filter(|_| passes_on);
        }
    }

    /// Bitmaps that record where the model does not see writes become unknown.
    pub(crate) fn forget_unseen_marks(&mut self) {
        let unseen: Vec<NodeId> = self
            .graph
            .nodes()
            .filter(|(id, node)| !node.bitmaps.is_empty() && self.graph.has_unseen_writer(*id))
            .map(|(id, _)| id)
            .collect();
        for id in unseen {
            for bitmap in &mut self.graph.node_mut(id).bitmaps {
                bitmap.lose_track(false);
            }
        }
    }

    /// A qcow2 node was opened: its bitmaps are what the header says.
    pub(crate) fn load_bitmaps(&mut self, id: NodeId) {
        let (writable, length) = (self.graph.node(id).writable, self.graph.node(id).length);
        let Some(header) = self.header_mut(id) else { return };
        let mut loaded = Vec::new();
        for stored in &mut header.bitmaps {
            let mut bitmap = Bitmap::new(stored.name.clone(), stored.granularity, length);
            bitmap.enabled = stored.auto && !stored.in_use;
            bitmap.persistent = true;
            bitmap.read_only = !writable;
            bitmap.inconsistent = stored.in_use;
            if !stored.in_use {
                bitmap.dirty.clone_from(&stored.dirty);
            }
            stored.in_use |= writable;
            loaded.insert(0, bitmap);
        }
        for bitmap in loaded.iter_mut().rev() {
            bitmap.number = self.graph.next_bitmap();
        }
        self.graph.node_mut(id).bitmaps = loaded;
    }

    /// Nodes became read-only or writable, in this order: their images follow.
    pub(crate) fn bitmaps_follow_flags(&mut self) {
        for (id, writable) in self.graph.take_flips() {
            if self.graph.get(id).is_none_or(|node| node.driver != Driver::Qcow2) {
                continue;
            }
            if writable {
                for stored in self.header_mut(id).into_iter().flat_map(|h| &mut h.bitmaps) {
                    stored.in_use = true;
                }
            } else {
                let bitmaps = self.graph.node(id).bitmaps.clone();
                if let Some(header) = self.header_mut(id) {
                    store(header, &bitmaps);
                }
            }
            let bitmaps = &mut self.graph.node_mut(id).bitmaps;
            for bitmap in bitmaps.iter_mut().filter(|bitmap| bitmap.persistent) {
                bitmap.read_only = !writable;
            }
        }
    }

    /// Everything is closed, whoever refers to it: what images hold of bitmaps then.
    pub fn close_all(&mut self) {
        let images: Vec<NodeId> = self
            .graph
            .nodes()
            .filter(|(_, node)| node.driver == Driver::Qcow2 && node.writable)
            .map(|(id, _)| id)
            .collect();
        for id in images {
            let bitmaps = self.graph.node(id).bitmaps.clone();
            if let Some(header) = self.header_mut(id) {
                store(header, &bitmaps);
            }
        }
    }

    /// Closes what nobody refers to any more; bitmaps are stored.
    pub(crate) fn reap(&mut self) {
        self.bitmaps_follow_flags();
        let images: Vec<(NodeId, Option<Rc<str>>, Vec<Bitmap>)> = self
            .graph
            .nodes()
            .filter(|(_, node)| node.driver == Driver::Qcow2 && node.writable)
            .filter(|(_, node)| node.bitmaps.iter().any(|bitmap| bitmap.persistent))
            .map(|(id, node)| (id, self.image_file(id), node.bitmaps.clone()))
            .collect();
        self.graph.reap();
        for (id, file, bitmaps) in images {
            let facts = file.and_then(|file| self.files.get_mut(&file));
            if let (None, Some(facts)) = (self.graph.get(id), facts)
                && let Some(header) = Rc::make_mut(facts).qcow2.as_mut()
            {
                store(header, &bitmaps);
            }
        }
        self.graph.resize_bitmaps(true);
        self.forget_unseen_marks();
    }
}

/// Everything that is to be stored, is. Bitmaps that the image does not hold yet come last, the newest first.
fn store(header: &mut Qcow2Facts, bitmaps: &[Bitmap]) {
    let storable = |bitmap: &&Bitmap| bitmap.persistent && !bitmap.inconsistent && !bitmap.read_only;
    for new in bitmaps.iter().filter(storable).map(as_stored) {
        match header.bitmaps.iter_mut().find(|old| old.name == new.name) {
            Some(old) => *old = new,
            None => header.bitmaps.push(new),
        }
    }
}

/// What an image holds of a bitmap. No change may be forgotten: what its successor has recorded is stored with it.
fn as_stored(bitmap: &Bitmap) -> StoredBitmap {
    let mut bitmap = bitmap.clone();
    bitmap.take_successor_in();
    StoredBitmap {
        name: bitmap.name,
        granularity: bitmap.granularity,
        auto: bitmap.enabled,
        in_use: false,
        dirty: bitmap.dirty,
    }
}

impl Graph {
    /// Somebody may write to the node without the model knowing where.
    fn has_unseen_writer(&self, id: NodeId) -> bool {
        self.parents(id).any(|(_, edge)| match edge.parent {
            // What is kept is written by copies.
            Parent::Node(_) if edge.name == "target" => true,
            Parent::Node(parent) if edge.name == "file" => match self.node(parent).driver {
                Driver::Qcow2 => true,
                _ => self.is_below_copy_on_read(parent) || self.has_unseen_writer(parent),
            },
            _ => false,
        })
    }

    fn is_below_copy_on_read(&self, id: NodeId) -> bool {
        self.parents(id).any(|(_, edge)| {
            matches!(edge.parent, Parent::Node(parent) if self.node(parent).driver == Driver::CopyOnRead)
        })
    }

    /// Bitmaps get the lengths of their nodes. `followed`: those changed because others did.
    pub(crate) fn resize_bitmaps(&mut self, followed: bool) {
        let ids: Vec<NodeId> = self.nodes().map(|(id, _)| id).collect();
        for id in ids {
            let node = self.node_mut(id);
            let length = node.length;
            for bitmap in node.bitmaps.iter_mut().filter(|bitmap| bitmap.length != length) {
                bitmap.resize(length);
                bitmap.followed |= followed;
            }
        }
    }
}
