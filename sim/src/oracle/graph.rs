//! The graph is well formed, and whenever it is settled it is the model's.
//!
//! Settled comparison (no main-context operation under way, the last command answered): nodes by name, every edge with
//! its parent, role, masks and frozen flag, from the *events*; then, where the layer is in this process and its graph
//! changed, its own books: writability, references, ownership, backing strings in headers, and the counter equations
//! of graph.md 5.1. The events themselves must not contradict each other (a removed node is never used again), and the
//! node graph has no cycle.
//! A difference in masks only is reported as `permissions`, in frozen links only as `frozen`.
//! Unchecked: the order of parents and children, op blockers (seen through refusals), node lengths, options.

use blkcheck_impl::event::{Event, Parent};
use blkcheck_impl::graph::inspect::GraphView;
use blkcheck_impl::types::{NodeId, OpenFlags, Role};
use blkcheck_model::{Parent as ModelParent, World};

use super::mirror::Mirror;
use super::{OracleName, Violation, violation};

/// One edge below a node, in numbers: structure, masks, frozen.
type Key = (u64, u16, bool);

/// Compares; keeps its vectors.
#[derive(Debug, Default)]
pub(crate) struct Comparison {
    /// Drivers, frozen links and roles other than backing are not known.
    outside: bool,
    /// Model node by id -> the layer's node.
    ours: Vec<Option<NodeId>>,
    expected: Vec<Key>,
    found: Vec<Key>,
}

/// The events contradict each other, or close a circle.
pub(crate) fn follow(mirror: &mut Mirror, event: &Event) -> Result<(), Violation> {
    if let Event::EdgeSet {
        parent: Parent::Node(parent),
        to: Some(child),
        ..
    } = event
        && mirror.reaches(*child, *parent)
    {
        let (parent, child) = (mirror.name(*parent), mirror.name(*child));
        let message = format!("an edge from node '{parent}' to node '{child}' closes a circle");
        return Err(violation(OracleName::Graph, None, message, Vec::new()));
    }
    if let Event::RequestBegin { node, request, .. } = event
        && !mirror.node(*node).is_some_and(|n| n.live)
    {
        let message = format!(
            "request {request:?} begins on the removed node '{}'",
            mirror.name(*node)
        );
        return Err(violation(OracleName::Graph, None, message, Vec::new()));
    }
    mirror.apply(event).map_err(|wrong| {
        violation(
            OracleName::Graph,
            None,
            wrong.to_owned(),
            vec![format!("at {event:?}")],
        )
    })
}

impl Comparison {
    /// Of a graph seen from outside.
    pub(crate) fn outside() -> Comparison {
        Comparison {
            outside: true,
            ..Comparison::default()
        }
    }

    /// What is compared of a role.
    fn role(&self, kind: u64, role: u8) -> u8 {
        match (kind, self.outside) {
            (0, false) => role,
            (0, true) => role & Role::COW.bits(),
            _ => 0,
        }
    }

    /// Nodes and edges.
    pub(crate) fn compare(&mut self, world: &World, mirror: &Mirror) -> Result<(), Violation> {
        self.match_nodes(world, mirror)?;
        for (model_id, node) in world.graph.nodes() {
            let our_id = self.ours[model_id.0 as usize].expect("matched");
            self.expected.clear();
            for (_, edge) in world.graph.parents(model_id) {
                let (kind, parent) = match &edge.parent {
                    ModelParent::Node(p) => (0, self.ours[p.0 as usize].expect("matched").0),
                    ModelParent::Export(_) | ModelParent::JobBackend(_) => (1, 0),
                    ModelParent::Job(..) => (2, 0),
                };
                let role = self.role(kind, edge.role.bits());
                let masks = masks(edge.masks.perm.bits(), edge.masks.shared.bits());
                self.expected.push((
                    structure(kind, parent, role),
                    masks,
                    !self.outside && edge.frozen_by.is_some(),
                ));
            }
            self.found.clear();
            for &edge in &mirror.node(our_id).expect("matched").parents {
                let e = mirror.edge(edge).expect("listed");
                let (kind, parent) = match e.parent {
                    Some(Parent::Node(p)) => (0, p.0),
                    Some(Parent::Backend(_)) => (1, 0),
                    Some(Parent::Job(_)) | None => (2, 0),
                };
                let role = self.role(kind, e.role.bits());
                self.found.push((
                    structure(kind, parent, role),
                    masks(e.perm.bits(), e.shared.bits()),
                    e.frozen,
                ));
            }
            self.expected.sort_unstable();
            self.found.sort_unstable();
            if self.expected != self.found && !self.refreshed_more(world, model_id) {
                return Err(self.difference(&node.name, mirror));
            }
        }
        Ok(())
    }

    /// Whether the layer only refreshed masks that the model left as they were: not every change refreshes every
    /// edge below it (graph.md 9, quirks 4 and 6). Then each mask is the model's or the one from scratch.
    fn refreshed_more(&self, world: &World, node: blkcheck_model::NodeId) -> bool {
        if self.expected.len() != self.found.len() {
            return false;
        }
        let scratch = world.graph.masks_from_scratch();
        let mut left = self.found.clone();
        world.graph.parents(node).all(|(id, edge)| {
            let (kind, parent, role) = match &edge.parent {
                ModelParent::Node(p) => (0, self.ours[p.0 as usize].expect("matched").0, edge.role.bits()),
                ModelParent::Export(_) | ModelParent::JobBackend(_) => (1, 0, 0),
                ModelParent::Job(..) => (2, 0, 0),
            };
            let either = [Some(&edge.masks), scratch.get(&id)]
                .map(|m| m.map(|m| masks(m.perm.bits(), m.shared.bits())));
            let key = structure(kind, parent, self.role(kind, role));
            let frozen = !self.outside && edge.frozen_by.is_some();
            let found = left
                .iter()
                .position(|k| k.0 == key && k.2 == frozen && either.contains(&Some(k.1)));
            found.map(|at| left.swap_remove(at)).is_some()
        })
    }

    fn match_nodes(&mut self, world: &World, mirror: &Mirror) -> Result<(), Violation> {
        self.ours.clear();
        let mut count = 0usize;
        for (id, node) in world.graph.nodes() {
            let ours = mirror.by_name(&node.name);
            let Some(ours) = ours else {
                let message = format!("node '{}' should exist", node.name);
                return Err(violation(
                    OracleName::Graph,
                    None,
                    message,
                    node_lists(world, mirror),
                ));
            };
            if !self.outside && mirror.node(ours).is_some_and(|n| n.driver != node.driver.name()) {
                let driver = mirror.node(ours).map_or("", |n| n.driver);
                let message = format!(
                    "node '{}' has driver {driver}, expected {}",
                    node.name,
                    node.driver.name()
                );
                return Err(violation(OracleName::Graph, None, message, Vec::new()));
            }
            let i = id.0 as usize;
            if self.ours.len() <= i {
                self.ours.resize(i + 1, None);
            }
            self.ours[i] = Some(ours);
            count += 1;
        }
        if mirror.nodes().count() == count {
            return Ok(());
        }
        let extra = mirror.nodes().find(|(_, n)| world.graph.find(&n.name).is_none());
        let message = format!("node '{}' should not exist", extra.map_or("?", |(_, n)| &n.name));
        Err(violation(
            OracleName::Graph,
            None,
            message,
            node_lists(world, mirror),
        ))
    }

    fn difference(&self, node: &str, mirror: &Mirror) -> Violation {
        let structures = |keys: &[Key]| keys.iter().map(|k| k.0).collect::<Vec<_>>();
        let masks = |keys: &[Key]| keys.iter().map(|k| (k.0, k.1)).collect::<Vec<_>>();
        let (oracle, what) = if structures(&self.expected) != structures(&self.found) {
            (OracleName::Graph, "other parents")
        } else if masks(&self.expected) != masks(&self.found) {
            (OracleName::Permissions, "other permissions")
        } else {
            (OracleName::Frozen, "other frozen links")
        };
        let lines = |what: &str, keys: &[Key]| {
            keys.iter()
                .map(|k| format!("{what}: {}", describe(*k, mirror)))
                .collect::<Vec<_>>()
        };
        let mut evidence = lines("expected", &self.expected);
        evidence.extend(lines("found", &self.found));
        violation(
            oracle,
            None,
            format!("node '{node}' has {what} than it should have"),
            evidence,
        )
    }

    /// The layer's own books.
    pub(crate) fn books(&self, world: &World, view: &GraphView) -> Result<(), Violation> {
        for (id, node) in world.graph.nodes() {
            let Some(ours) = self
                .ours
                .get(id.0 as usize)
                .copied()
                .flatten()
                .and_then(|o| view.node(o))
            else {
                continue;
            };
            let wrong = |what: &str, expected: String, found: String| {
                let message = format!("node '{}': {what} is {found}, expected {expected}", node.name);
                Err(violation(OracleName::Graph, None, message, Vec::new()))
            };
            let writable = ours.flags.contains(OpenFlags::RDWR);
            if writable != node.writable {
                return wrong("writable", node.writable.to_string(), writable.to_string());
            }
            if ours.monitor_owned != node.monitor_owned {
                return wrong(
                    "monitor ownership",
                    node.monitor_owned.to_string(),
                    ours.monitor_owned.to_string(),
                );
            }
            if ours.implicit != node.implicit {
                return wrong("implicit", node.implicit.to_string(), ours.implicit.to_string());
            }
            let references = world.graph.refcount(id);
            if ours.refcnt as usize != references {
                return wrong(
                    "the reference count",
                    references.to_string(),
                    ours.refcnt.to_string(),
                );
            }
            if node.driver == blkcheck_model::Driver::Qcow2
                && let Some(header) = world.header(id)
            {
                let expected = header.backing.as_ref().map(|b| (&*b.file, b.format.as_deref()));
                let found = ours
                    .backing_header
                    .as_ref()
                    .map(|b| (b.0.as_str(), b.1.as_deref()));
                if expected != found {
                    return wrong(
                        "the backing file on record",
                        format!("{expected:?}"),
                        format!("{found:?}"),
                    );
                }
            }
        }
        counters(view)
    }
}

/// The equations of graph.md 5.1 that one view can show, and the slots of each node.
pub(crate) fn counters(view: &GraphView) -> Result<(), Violation> {
    let wrong = |message: String| Err(violation(OracleName::Drain, None, message, Vec::new()));
    for edge in &view.edges {
        let Some(child) = edge.child.and_then(|c| view.node(c)) else {
            let message = format!("edge {:?} '{}' leads to no node", edge.id, edge.name);
            return Err(violation(OracleName::Graph, None, message, Vec::new()));
        };
        if edge.quiesced_parent != (child.quiesce_counter > 0) {
            return wrong(format!(
                "the parent of edge '{}' to node '{}' was told {}, but the node's counter is {}",
                edge.name,
                child.name,
                if edge.quiesced_parent {
                    "to be quiet"
                } else {
                    "nothing"
                },
                child.quiesce_counter
            ));
        }
    }
    for node in &view.nodes {
        let below = node
            .children
            .iter()
            .filter_map(|e| view.edge(*e))
            .filter(|e| e.quiesced_parent)
            .count();
        let least = below + view.drain_all as usize;
        if (node.quiesce_counter as usize) < least {
            let message = format!(
                "node '{}' has drain counter {}, at least {least} are due",
                node.name, node.quiesce_counter
            );
            return wrong(message);
        }
        let slots = [node.file, node.backing].into_iter().flatten();
        if slots.clone().any(|s| !node.children.contains(&s))
            || node.file.is_some() && node.file == node.backing
        {
            let message = format!("the slots of node '{}' are not its children", node.name);
            return Err(violation(
                OracleName::Graph,
                None,
                message,
                vec![format!("{node:?}")],
            ));
        }
    }
    for backend in &view.backends {
        let quiet = view.edge(backend.root).is_some_and(|e| e.quiesced_parent);
        if backend.quiesce_counter != u32::from(quiet) {
            let (id, count) = (backend.id, backend.quiesce_counter);
            return wrong(format!(
                "backend {id:?} has drain counter {count}, expected {}",
                u32::from(quiet)
            ));
        }
    }
    Ok(())
}

fn structure(kind: u64, parent: u32, role: u8) -> u64 {
    kind << 48 | u64::from(parent) << 8 | u64::from(role)
}

fn masks(perm: u8, shared: u8) -> u16 {
    u16::from(perm) << 8 | u16::from(shared)
}

fn describe((structure, masks, frozen): Key, mirror: &Mirror) -> String {
    use blkcheck_impl::types::{Perm, Role};
    let parent = NodeId(u32::try_from(structure >> 8 & 0xffff_ffff).expect("masked"));
    let who = match structure >> 48 {
        0 => format!("node '{}'", mirror.name(parent)),
        1 => "a backend".to_owned(),
        _ => "a job".to_owned(),
    };
    let role = Role::from_bits_truncate(u8::try_from(structure & 0xff).expect("masked"));
    let perm = |bits: u16| Perm::from_bits_truncate(u8::try_from(bits & 0xff).expect("masked")).names();
    let frozen = if frozen { ", frozen" } else { "" };
    format!(
        "{who} ({role:?}) may '{}', shares '{}'{frozen}",
        perm(masks >> 8),
        perm(masks)
    )
}

fn node_lists(world: &World, mirror: &Mirror) -> Vec<String> {
    let expected: Vec<&str> = world.graph.nodes().map(|(_, n)| &*n.name).collect();
    let found: Vec<&str> = mirror.nodes().map(|(_, n)| &*n.name).collect();
    vec![
        format!("expected: {}", expected.join(" ")),
        format!("found: {}", found.join(" ")),
    ]
}

#[cfg(test)]
mod tests {
    use blkcheck_impl::types::{EdgeId, Perm, Role};
    use blkcheck_model::{Driver, Masks, Node};

    use super::super::mirror::tests::{added, chain, linked};
    use super::*;

    /// The model of `mirror::tests::chain`: top over base, nothing permitted.
    fn model() -> World {
        let mut world = World::default();
        let base = world.graph.add_node(Node::new("base", Driver::Qcow2));
        let top = world.graph.add_node(Node::new("top", Driver::Qcow2));
        world.graph.add_edge(blkcheck_model::graph::Edge {
            name: "backing",
            role: blkcheck_model::Role::COW,
            parent: ModelParent::Node(top),
            child: base,
            masks: Masks::NONE,
            frozen_by: None,
        });
        world
    }

    fn compare(events: &[Event]) -> Result<(), Violation> {
        let mut mirror = Mirror::default();
        for event in events {
            follow(&mut mirror, event)?;
        }
        Comparison::default().compare(&model(), &mirror)
    }

    #[test]
    fn equal_graphs_are_equal_and_each_difference_has_its_oracle() {
        assert_eq!(compare(&chain()), Ok(()));
        let with = |event| {
            let mut events = chain();
            events.push(event);
            compare(&events).expect_err("differs")
        };
        assert_eq!(
            with(added(2, "extra", "raw")).message,
            "node 'extra' should not exist"
        );
        let edge = EdgeId(0);
        let perms = Event::EdgePerms {
            edge,
            perm: Perm::WRITE,
            shared: Perm::all(),
        };
        assert_eq!(with(perms).oracle, OracleName::Permissions);
        assert_eq!(with(Event::Frozen { edge }).oracle, OracleName::Frozen);
        let backend = linked(
            1,
            Parent::Backend(blkcheck_impl::types::BackendId(0)),
            Role::FILTERED,
            1,
        );
        assert_eq!(with(backend).oracle, OracleName::Graph);
        assert_eq!(
            compare(&[added(0, "base", "qcow2")])
                .expect_err("missing")
                .message,
            "node 'top' should exist"
        );
    }

    #[test]
    fn circles_and_ghosts_are_reported() {
        let mut events = chain();
        events.push(linked(1, Parent::Node(NodeId(0)), Role::COW, 1));
        assert!(
            compare(&events)
                .expect_err("circle")
                .message
                .contains("closes a circle")
        );
        let begin = Event::RequestBegin {
            request: blkcheck_impl::types::RequestId(0),
            node: NodeId(0),
            edge: EdgeId(0),
            kind: blkcheck_impl::event::ReqKind::Read,
            offset: 0,
            bytes: 1,
            flags: blkcheck_impl::types::ReqFlags::empty(),
        };
        let events = vec![
            added(0, "base", "raw"),
            Event::NodeRemoved { node: NodeId(0) },
            begin,
        ];
        assert!(
            compare(&events)
                .expect_err("ghost")
                .message
                .contains("removed node 'base'")
        );
    }

    #[test]
    fn a_stale_counter_is_reported() {
        use blkcheck_impl::graph::inspect::EdgeView;
        let mut view = GraphView::default();
        view.edges.push(EdgeView {
            id: EdgeId(0),
            name: "root".into(),
            parent: Parent::Backend(blkcheck_impl::types::BackendId(0)),
            role: Role::FILTERED,
            child: None,
            perm: Perm::empty(),
            shared: Perm::all(),
            frozen: false,
            quiesced_parent: false,
        });
        assert!(
            counters(&view)
                .expect_err("stale edge")
                .message
                .contains("leads to no node")
        );
        view.edges.clear();
        assert_eq!(counters(&view), Ok(()));
    }
}
