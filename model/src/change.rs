//! Changes of the graph: attach, detach, set a backing node, replace a node, insert and drop a filter.
//!
//! Rules: every change ends with a refresh of the masks it touches. A refused change leaves the graph half changed
//! unless it says otherwise; callers work on a copy, or through [`Graph::attempt`]. Drain, locks and I/O are no part
//! of the model: a change is one step.

use std::rc::Rc;

use crate::graph::{Edge, EdgeId, Graph, NodeId, Parent};
use crate::perm::{Driver, Masks, Role};
use crate::refusal::Refusal;

impl Graph {
    /// Does all of it, or nothing.
    ///
    /// # Errors
    /// What `change` says; the graph is as before.
    pub fn attempt<T>(
        &mut self,
        change: impl FnOnce(&mut Graph) -> Result<T, Refusal>,
    ) -> Result<T, Refusal> {
        let mut next = self.clone();
        let result = change(&mut next)?;
        *self = next;
        Ok(result)
    }

    pub(crate) fn cycle(&self, child: NodeId, name: &str, parent: NodeId) -> Refusal {
        let (child, parent) = (self.name(child), self.name(parent));
        Refusal::new(format!(
            "Making '{child}' a {name} child of '{parent}' would create a cycle"
        ))
    }

    /// Adds a child edge, without a refresh.
    pub(crate) fn attach_noperm(
        &mut self,
        parent: NodeId,
        child: NodeId,
        name: &'static str,
        role: Role,
    ) -> Result<EdgeId, Refusal> {
        if self.reaches(child, parent) {
            return Err(self.cycle(child, name, parent));
        }
        let edge = Edge {
            name,
            role,
            parent: Parent::Node(parent),
            child,
            masks: Masks::NONE,
            frozen_by: None,
        };
        Ok(self.add_edge(edge))
    }

    /// Adds a child edge.
    ///
    /// # Errors
    /// A cycle, or masks that do not agree.
    pub fn attach_child(
        &mut self,
        parent: NodeId,
        child: NodeId,
        name: &'static str,
        role: Role,
    ) -> Result<EdgeId, Refusal> {
        let edge = self.attach_noperm(parent, child, name, role)?;
        self.refresh(&[parent])?;
        Ok(edge)
    }

    /// Adds the edge of an export or a job.
    ///
    /// # Errors
    /// Masks that do not agree with the other parents'.
    pub fn attach_root(
        &mut self,
        parent: Parent,
        child: NodeId,
        name: &'static str,
        masks: Masks,
    ) -> Result<EdgeId, Refusal> {
        let edge = self.add_edge(Edge {
            name,
            role: Role::empty(),
            parent,
            child,
            masks,
            frozen_by: None,
        });
        self.refresh(&[child])?;
        Ok(edge)
    }

    /// Whether somebody with these masks could use the node for a moment.
    ///
    /// # Errors
    /// Masks that do not agree with the parents'.
    pub fn check_root(&self, child: NodeId, masks: Masks) -> Result<(), Refusal> {
        let nobody = Parent::JobBackend(Rc::from(""));
        self.clone().attach_root(nobody, child, "root", masks).map(drop)
    }

    /// Changes the masks of the edge of an export or a job.
    ///
    /// # Errors
    /// Masks that do not agree with the other parents'.
    pub fn set_root_masks(&mut self, edge: EdgeId, masks: Masks) -> Result<(), Refusal> {
        self.edge_mut(edge).masks = masks;
        self.refresh(&[self.edge(edge).child])
    }

    /// Removes an edge. The node below gets the masks that are left; if those are refused (writers that may not resize, and a length
    /// that is no multiple of the alignment any more), what is below it keeps the old ones.
    pub fn remove_edge_and_refresh(&mut self, edge: EdgeId) {
        let child = self.remove_edge(edge).child;
        // Stale masks are stricter than needed, never looser: nothing else to do about a refusal.
        let _ = self.attempt(|graph| graph.refresh(&[child]));
    }

    /// Makes `backing` the backing node of `parent`. The node let go of is not refreshed, unless
    /// [`Graph::refresh_what_is_let_go`] said so: what is below it may keep masks that are stricter than needed, never looser.
    ///
    /// # Errors
    /// A frozen link, a driver without backing files, a cycle, masks.
    pub fn set_backing(&mut self, parent: NodeId, backing: Option<NodeId>) -> Result<(), Refusal> {
        let before = self.cow_link(parent);
        let let_go = before.map(|link| self.edge(link).child);
        self.replace_link(parent, "backing", Role::COW, before, backing)?;
        self.refresh(&[parent])?;
        if let Some(child) = let_go.filter(|_| self.refreshes_let_go) {
            let _stricter_on_refusal = self.attempt(|graph| graph.refresh(&[child]));
        }
        Ok(())
    }

    /// Puts `new` into the place of `old`, without a refresh.
    pub(crate) fn replace_link(
        &mut self,
        parent: NodeId,
        slot: &'static str,
        role: Role,
        old: Option<EdgeId>,
        new: Option<NodeId>,
    ) -> Result<(), Refusal> {
        if let Some(edge) = old
            .map(|link| self.edge(link))
            .filter(|edge| edge.frozen_by.is_some())
        {
            let (from, to) = (self.name(parent), self.name(edge.child));
            return Err(Refusal::new(format!(
                "Cannot change frozen '{}' link from '{from}' to '{to}'",
                edge.name
            )));
        }
        let node = self.node(parent);
        if slot == "backing" && !node.driver.supports_backing() {
            let (driver, name) = (node.driver.name(), &node.name);
            return Err(Refusal::new(format!(
                "Driver '{driver}' of node '{name}' does not support backing files"
            )));
        }
        let inherits = new.is_some_and(|new| self.inherits_from(new, parent));
        if let Some(old) = old {
            self.no_longer_inherits(parent, old);
            self.remove_edge(old);
        }
        if let Some(new) = new {
            self.attach_noperm(parent, new, slot, role)?;
            if inherits {
                self.node_mut(new).inherits_from = Some(parent);
            }
        }
        Ok(())
    }

    /// `parent` opened the node inline, or the one that did, and so on.
    fn inherits_from(&self, id: NodeId, parent: NodeId) -> bool {
        std::iter::successors(self.node(id).inherits_from, |id| self.node(*id).inherits_from)
            .any(|above| above == parent)
    }

    /// The link goes, and what is below follows `root` only if there is another direct link to it.
    fn no_longer_inherits(&mut self, root: NodeId, link: EdgeId) {
        let child = self.edge(link).child;
        let other = |graph: &Graph| {
            graph
                .children(root)
                .any(|(id, edge)| id != link && edge.child == child)
        };
        if self.node(child).inherits_from == Some(root) && !other(self) {
            self.node_mut(child).inherits_from = None;
        }
        for link in self.node(child).children.clone() {
            self.no_longer_inherits(root, link);
        }
    }

    /// Moves every movable parent of `from` to `to`: jobs stay, and so do edges below `to`.
    ///
    /// # Errors
    /// A frozen link, or masks.
    pub fn replace_node(&mut self, from: NodeId, to: NodeId) -> Result<(), Refusal> {
        self.move_parents(from, to)?;
        self.refresh(&[from, to])
    }

    pub(crate) fn move_parents(&mut self, from: NodeId, to: NodeId) -> Result<(), Refusal> {
        for id in self.node(from).parents.clone() {
            let edge = self.edge(id);
            if matches!(edge.parent, Parent::Job(..)) || self.edge_is_below(id, to) {
                continue;
            }
            if edge.frozen_by.is_some() {
                let text = format!("Cannot change '{}' link to '{}'", edge.name, self.name(from));
                return Err(Refusal::new(text));
            }
            self.retarget(id, to);
        }
        Ok(())
    }

    /// Takes a job's filter out of its chain: its parents go to its child, and it loses that child.
    ///
    /// # Errors
    /// A link that somebody else has frozen, or masks.
    pub fn drop_filter(&mut self, filter: NodeId) -> Result<(), Refusal> {
        self.unfreeze(filter);
        let link = self.chain_link(filter).expect("a filter is dropped once");
        let child = self.edge(link).child;
        self.move_parents(filter, child)?;
        self.remove_edge(link);
        self.refresh(&[filter, child])
    }

    /// The file name of a node: its own, or that of the file it is the format of.
    #[must_use]
    pub fn filename(&self, id: NodeId) -> Option<Rc<str>> {
        let node = self.node(id);
        // These two go by the name of what is below them.
        if matches!(node.driver, Driver::CopyBeforeWrite | Driver::SnapshotAccess) {
            return self.full_name(self.primary_child(id)?);
        }
        if node.filename.is_some() || node.windowed || node.driver.is_filter() {
            return node.filename.clone();
        }
        self.primary_child(id)
            .filter(|file| self.node(*file).driver.is_protocol())
            .and_then(|file| self.filename(file))
    }

    /// What a header records of a node: its file name or, where only a description gives this very node (a window of a file,
    /// say), the name of the file that the description ends in. The daemon records the description as a whole (`json:`).
    #[must_use]
    pub fn name_on_record(&self, id: NodeId) -> Option<Rc<str>> {
        let described = || {
            let mut below = std::iter::successors(Some(id), |id| self.primary_child(*id));
            below.find_map(|id| self.node(id).filename.clone())
        };
        self.filename(id).or_else(described)
    }

    /// The backing node is another one than the header says, or there is one and the header names none, or none
    /// though it names one. Such a node is not what opening its file by name gives, so it has no name of its own.
    #[must_use]
    pub fn backing_overridden(&self, id: NodeId) -> bool {
        self.cow_child(id).map(|backing| self.full_name(backing))
            != self.node(id).recorded_backing.clone().map(Some)
    }

    /// The name by which opening gives this very node with all that is below it, if there is one.
    #[must_use]
    pub fn full_name(&self, id: NodeId) -> Option<Rc<str>> {
        // A job's own filter goes by the name of what it filters.
        if let (true, Some(below)) = (self.node(id).implicit, self.filter_child(id)) {
            return self.full_name(below);
        }
        self.filename(id).filter(|_| !self.backing_overridden(id))
    }
}
