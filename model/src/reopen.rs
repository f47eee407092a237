//! Changing options of open nodes, and with them their children: all of the nodes, or none.
//!
//! Rules, in the order of QEMU: first every node is queued with the options that it will have, and after it those of
//! its children that were opened inline with it; then every node of the queue is prepared, in order, and links change at
//! once, so that a later one sees what earlier ones did; then masks are judged together; then everything takes effect,
//! last node first. A refusal leaves the graph half changed; callers work on a copy.
//! An option that is not said: with `keep` it stays, else it gets its default value, or the command is refused.
//! Not here: op blockers, which reopening does not ask for; only frozen links, masks and jobs' own filters stop it.

use serde_json::Value;

use crate::bitmap::Bitmap;
use crate::command::open::check_detect_zeroes;
use crate::graph::{EdgeId, Graph, NodeId};
use crate::options::NodeOptions;
use crate::perm::{Driver, Role};
use crate::refusal::Refusal;
use crate::window::Window;

/// Options that every node may do without; they then have their default value.
const COMMON: [&str; 7] = [
    "node-name",
    "discard",
    "cache.direct",
    "cache.no-flush",
    "read-only",
    "auto-read-only",
    "detect-zeroes",
];
/// What of them may not change; the others are taken in.
const FIXED: [&str; 3] = ["node-name", "driver", "force-share"];
const CHILDREN: [&str; 2] = ["file", "backing"];

/// What a node is to become.
#[derive(Debug)]
struct Entry {
    node: NodeId,
    options: NodeOptions,
    explicit: NodeOptions,
    /// Nothing was said of a backing file, and what was must not be taken for it.
    backing_missing: bool,
    /// Discards are passed on. Said to one node alone, not saying it is no default: it stays as it is.
    unmap: bool,
    /// Children that are no longer, or whose links changed.
    let_go: Vec<NodeId>,
    window: Option<Window>,
}

/// Nodes to reopen together.
#[derive(Debug, Default)]
pub struct Queue {
    entries: Vec<Entry>,
    visits: Vec<NodeId>,
}

impl Queue {
    /// Adds a node, and the children that follow it.
    pub fn push(&mut self, graph: &Graph, node: NodeId, options: NodeOptions, keep: bool) {
        self.push_child(graph, node, options, None, keep);
    }

    /// The nodes in the order in which they are come upon, as often as they are.
    #[must_use]
    pub fn visits(&self) -> &[NodeId] {
        &self.visits
    }

    fn push_child(
        &mut self,
        graph: &Graph,
        node: NodeId,
        mut options: NodeOptions,
        above: Option<(Role, &NodeOptions)>,
        keep: bool,
    ) {
        self.visits.push(node);
        let facts = graph.node(node);
        let queued = self.entries.iter().position(|entry| entry.node == node);
        if let Some(at) = queued {
            options.join(&self.entries[at].explicit);
        } else if keep {
            options.join(&facts.explicit);
        }
        let mut explicit = options.clone();
        if let Some((role, parent)) = above {
            options.inherit(role, parent);
        }
        if keep {
            options.join(&facts.options);
        }
        let backing_missing = if keep {
            queued.is_some_and(|at| self.entries[at].backing_missing)
        } else {
            !options.has("backing") && !options.has("backing.driver")
        };
        let mut below = Vec::new();
        for (_, edge) in graph.children(node) {
            let child = graph.node(edge.child);
            if child.inherits_from != Some(node) {
                continue;
            }
            let (own, keep) = match options.get(edge.name) {
                Some(reference) if *reference != *child.name => continue,
                Some(_) => (NodeOptions::default(), true),
                None => {
                    explicit.take_child(edge.name);
                    (options.take_child(edge.name), keep)
                }
            };
            below.push((edge.child, edge.role, own, keep));
        }
        let entry = Entry {
            node,
            options: options.clone(),
            explicit,
            backing_missing,
            unmap: match options.get("discard") {
                Some(_) => options.unmaps(),
                None => facts.unmap,
            },
            let_go: Vec::new(),
            window: None,
        };
        match queued {
            Some(at) => self.entries[at] = entry,
            None => self.entries.push(entry),
        }
        for (child, role, own, keep) in below {
            self.push_child(graph, child, own, Some((role, &options)), keep);
        }
    }
}

impl Graph {
    /// Reopens everything in the queue.
    ///
    /// # Errors
    /// What cannot be changed or reset, a cycle, a frozen link, masks. The graph is then half changed.
    pub fn reopen(&mut self, mut queue: Queue) -> Result<(), Refusal> {
        for entry in &mut queue.entries {
            self.prepare(entry)?;
        }
        let going_read_only: Vec<NodeId> = queue
            .entries
            .iter()
            .filter(|entry| entry.options.is_on("read-only") && self.node(entry.node).writable)
            .map(|entry| entry.node)
            .collect();
        let mut starts = Vec::new();
        for entry in &queue.entries {
            self.set_writable(entry.node, !entry.options.is_on("read-only"));
            starts.push(entry.node);
            starts.extend(&entry.let_go);
        }
        starts.reverse();
        self.refresh_for_reopen(&starts, &going_read_only)?;
        for entry in queue.entries.into_iter().rev() {
            self.commit(entry);
        }
        Ok(())
    }

    /// Opens a node, and the children that follow it, read-only or read-write, and changes nothing else.
    ///
    /// # Errors
    /// A driver that cannot, `force-share`, a writer on what becomes read-only, a read-only child that does not follow.
    pub fn set_read_only(&mut self, id: NodeId, read_only: bool) -> Result<(), Refusal> {
        let mut options = NodeOptions::default();
        options.set("read-only", Value::Bool(read_only));
        let mut queue = Queue::default();
        queue.push(self, id, options, true);
        self.reopen(queue)
    }

    /// The nodes that [`Graph::set_read_only`] comes upon, in order and as often as it does.
    #[must_use]
    pub fn reopened_with(&self, id: NodeId) -> Vec<NodeId> {
        let mut options = NodeOptions::default();
        options.set("read-only", Value::Bool(true));
        let mut queue = Queue::default();
        queue.push(self, id, options, true);
        queue.visits
    }

    fn prepare(&mut self, entry: &mut Entry) -> Result<(), Refusal> {
        check_detect_zeroes(&entry.options, entry.unmap)?;
        let node = self.node(entry.node);
        let (name, driver) = (node.name.clone(), node.driver);
        if !driver.supports_reopen() {
            return Err(Refusal::new(format!(
                "Block format '{}' used by node '{name}' does not support reopening files",
                driver.name()
            )));
        }
        for (option, _) in node.options.in_order() {
            let may_go = COMMON.contains(&option) || driver.mutable_options().contains(&option);
            if !may_go && !entry.options.has(option) {
                return Err(Refusal::new(format!(
                    "Option '{option}' cannot be reset to its default value"
                )));
            }
        }
        if driver == Driver::Throttle {
            self.check_group(&entry.options)?;
        }
        let unstored = |bitmap: &Bitmap| bitmap.persistent && !bitmap.read_only && !bitmap.inconsistent;
        if entry.options.is_on("read-only") && !node.writable && node.bitmaps.iter().any(unstored) {
            return Err(Refusal::new("No write access"));
        }
        if driver == Driver::Raw {
            let file = self.primary_child(entry.node).expect("raw has a file");
            entry.window = Some(Window::of(&entry.options, self.node(file).length)?);
        }
        if driver.supports_backing()
            && entry.backing_missing
            && (self.cow_link(entry.node).is_some() || self.node(entry.node).names_backing)
        {
            return Err(Refusal::new(format!("backing is missing for '{name}'")));
        }
        self.change_child(entry, "backing")?;
        self.change_child(entry, "file")?;
        self.check_unchanged(entry)
    }

    /// Whatever has not been taken in must be as it was.
    fn check_unchanged(&self, entry: &Entry) -> Result<(), Refusal> {
        let node = self.node(entry.node);
        for (option, value) in entry.options.in_order() {
            let taken_in = COMMON.contains(&option) && !FIXED.contains(&option)
                || node.driver.mutable_options().contains(&option)
                || node.driver.lasting_options().contains(&option)
                || CHILDREN.contains(&option);
            // A switch that is said again is not told from one that changes.
            let same = node.options.get(option) == Some(value) && option != "force-share";
            if !taken_in && !same {
                return Err(Refusal::new(format!("Cannot change the option '{option}'")));
            }
        }
        Ok(())
    }

    /// `backing` or `file` names a node, or no node.
    fn change_child(&mut self, entry: &mut Entry, slot: &'static str) -> Result<(), Refusal> {
        let id = entry.node;
        let new = match entry.options.get(slot) {
            None => return Ok(()),
            Some(Value::String(name)) => {
                let new = self
                    .find(name)
                    .ok_or_else(|| Refusal::new(format!("Cannot find device='' nor node-name='{name}'")))?;
                if self.reaches(new, id) {
                    return Err(self.cycle(new, slot, id));
                }
                Some(new)
            }
            Some(_) => None,
        };
        let old_link = self
            .children(id)
            .find(|(_, edge)| edge.name == slot)
            .map(|(link, _)| link);
        let old = old_link.map(|link| self.edge(link).child);
        if let Some(old) = old {
            let past_implicit = std::iter::successors(Some(old), |id| {
                self.filter_child(*id).filter(|_| self.node(*id).implicit)
            });
            if Some(old) == new || past_implicit.last() == new {
                return Ok(());
            }
            if self.node(old).implicit {
                return Err(Refusal::new(format!(
                    "Cannot replace implicit {slot} child of {}",
                    self.name(id)
                )));
            }
        } else if new.is_none() {
            return Ok(());
        } else if slot == "file" {
            // What an earlier entry for the same node asked for, as one of another driver.
            return Err(Refusal::new(
                "Cannot set file child to format node without file child",
            ));
        }
        entry.let_go.extend(old);
        self.replace_child(id, slot, old_link, new)
    }

    fn replace_child(
        &mut self,
        parent: NodeId,
        slot: &'static str,
        old: Option<EdgeId>,
        new: Option<NodeId>,
    ) -> Result<(), Refusal> {
        let role = old.map_or(Role::COW, |link| self.edge(link).role);
        self.replace_link(parent, slot, role, old, new)
    }

    fn commit(&mut self, entry: Entry) {
        let names: Vec<&str> = self.children(entry.node).map(|(_, edge)| edge.name).collect();
        let Entry {
            node,
            mut options,
            mut explicit,
            window,
            unmap,
            ..
        } = entry;
        for name in names.into_iter().chain(["backing"]) {
            options.remove(name);
            explicit.remove(name);
        }
        let below = self.primary_child(node).map(|file| self.node(file).length);
        let facts = self.node_mut(node);
        facts.options = options;
        facts.explicit = explicit;
        facts.unmap = unmap;
        match (facts.driver, window, below) {
            (Driver::Raw, Some(window), Some(below)) => {
                facts.windowed = window.is_part();
                facts.length = window.length(below);
            }
            (driver, _, Some(below)) if driver.is_filter() => facts.length = below,
            _ => {}
        }
    }
}
