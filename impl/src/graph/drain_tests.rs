//! Drain: the scenarios of QEMU's test-bdrv-drain that concern the graph, and the counter equations of graph.md 5.1.

use std::rc::Rc;
use std::task::Poll;

use super::node::Node;
use super::testing::*;
use crate::Layer;
use crate::event::{Event, Parent};
use crate::types::Role;

/// Backend -> `test-node` -> `backing`.
fn setup(layer: &Layer) -> (Rc<Node>, Rc<Node>, Rc<Hooks>) {
    let (node, backing) = (
        open(layer, &TEST, "test-node", true),
        open(layer, &TEST, "backing", false),
    );
    attach(layer, &node, &backing, "backing", Role::COW);
    let (_, hooks) = backend(layer, &node, ALL, ALL);
    (node, backing, hooks)
}

/// The counter equations of graph.md 5.1, given explicit sections per node.
fn check_counters(layer: &Layer, sections: &[(&Node, u32)]) {
    let view = layer.inspect();
    for node in &view.nodes {
        let explicit = sections.iter().find(|(n, _)| n.id == node.id).map_or(0, |s| s.1);
        let through = node
            .children
            .iter()
            .filter(|&&e| view.edge(e).unwrap().quiesced_parent)
            .count();
        let expected = explicit + view.drain_all + u32::try_from(through).unwrap();
        assert_eq!(node.quiesce_counter, expected, "{}", node.name);
    }
    for edge in &view.edges {
        let drained = view.node(edge.child.unwrap()).unwrap().quiesce_counter > 0;
        assert_eq!(edge.quiesced_parent, drained, "{edge:?}");
        if let Parent::Backend(id) = edge.parent {
            let backend = view.backends.iter().find(|b| b.id == id).unwrap();
            assert_eq!(backend.quiesce_counter, u32::from(edge.quiesced_parent));
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    All,
    Node,
}

impl Kind {
    fn begin(self, layer: &Layer, node: &Node) {
        match self {
            Kind::All => now(layer.drain_all_begin()),
            Kind::Node => now(layer.drained_begin(node.id)),
        }
    }
    fn end(self, layer: &Layer, node: &Node) {
        match self {
            Kind::All => layer.drain_all_end(),
            Kind::Node => layer.drained_end(node.id),
        }
    }
}

fn counters(node: &Node) -> (u32, i32) {
    (node.quiesce_counter.get(), with(node, |f| f.drained.get()))
}

#[test]
fn quiesce_counters_and_driver_hooks() {
    for (kind, own, below) in [(Kind::All, (2, 1), (1, 1)), (Kind::Node, (1, 1), (0, 0))] {
        let layer = layer();
        let (node, backing, hooks) = setup(&layer);
        let hooks_before = hooks.begins.get();
        kind.begin(&layer, &node);
        assert_eq!((counters(&node), counters(&backing)), (own, below), "{kind:?}");
        assert_eq!((hooks.sections.get(), hooks.begins.get()), (1, hooks_before + 1));
        check_counters(&layer, &[(&node, u32::from(kind == Kind::Node))]);
        kind.end(&layer, &node);
        assert_eq!(
            (counters(&node), counters(&backing), hooks.sections.get()),
            ((0, 0), (0, 0), 0)
        );
    }
}

#[test]
fn nested() {
    for outer in [Kind::All, Kind::Node] {
        for inner in [Kind::All, Kind::Node] {
            let layer = layer();
            let (node, backing, _) = setup(&layer);
            outer.begin(&layer, &node);
            inner.begin(&layer, &node);
            let all = u32::from(outer == Kind::All) + u32::from(inner == Kind::All);
            let any = i32::from(all > 0);
            assert_eq!(
                counters(&node),
                (2 + any.unsigned_abs(), 1),
                "{outer:?} {inner:?}"
            );
            assert_eq!(counters(&backing), (all, any), "{outer:?} {inner:?}");
            check_counters(&layer, &[(&node, 2 - all)]);
            inner.end(&layer, &node);
            outer.end(&layer, &node);
            assert_eq!((counters(&node), counters(&backing)), ((0, 0), (0, 0)));
        }
    }
}

#[test]
fn begin_waits_for_requests_of_the_node_and_above() {
    for kind in [Kind::All, Kind::Node] {
        let (layer, recorder) = recorded();
        let (node, backing, hooks) = setup(&layer);
        begin_request(&node);
        hooks.busy.set(true);
        recorder.take();
        let mut begin = {
            let (layer, backing) = (layer.clone(), backing.id);
            Box::pin(async move {
                match kind {
                    Kind::All => layer.drain_all_begin().await,
                    Kind::Node => layer.drained_begin(backing).await,
                }
            })
        };
        assert!(poll(&mut begin).is_pending());
        assert_eq!(hooks.sections.get(), 1, "told before the wait");
        end_request(&layer, &node);
        assert!(poll(&mut begin).is_pending(), "the backend is still busy");
        hooks.busy.set(false);
        layer.kick();
        assert_eq!(poll(&mut begin), Poll::Ready(()));
        kind.end(&layer, &backing);
        let events = recorder.take();
        assert!(matches!(events.first(), Some(Event::DrainBegin { .. })));
        let drained = events
            .iter()
            .position(|e| *e == Event::Drained { node: backing.id })
            .unwrap();
        assert!(matches!(
            events[drained + 1..].last(),
            Some(Event::DrainEnd { .. })
        ));
        assert_eq!(hooks.sections.get(), 0);
    }
}

#[test]
fn requests_below_or_beside_are_not_waited_for() {
    let layer = layer();
    let (node, backing, _) = setup(&layer);
    begin_request(&backing);
    now(layer.drained_begin(node.id));
    layer.drained_end(node.id);
    end_request(&layer, &backing);
}

#[test]
fn two_edges_to_one_node_count_twice() {
    let layer = layer();
    let (parent, child) = (
        open(&layer, &TEST, "parent", false),
        open(&layer, &TEST, "child", false),
    );
    attach(&layer, &parent, &child, "one", Role::DATA);
    attach(&layer, &parent, &child, "two", Role::DATA);
    let section = now(layer.drained(child.id));
    assert_eq!(counters(&parent), (2, 1));
    drop(section);
    assert_eq!(counters(&parent), (0, 0));
}

#[test]
fn nodes_made_and_deleted_inside_drain_all() {
    let layer = layer();
    let first = open(&layer, &TEST, "first", true);
    let (edge, _) = backend(&layer, &first, R, ALL);
    now(layer.drain_all_begin());
    now(layer.drain_all_begin());
    let second = open(&layer, &TEST, "second", true);
    assert_eq!(
        counters(&second),
        (2, 1),
        "the hook runs once, however many sections"
    );
    let (_, hooks) = backend(&layer, &second, R, ALL);
    assert_eq!(hooks.sections.get(), 1);
    layer.detach(edge);
    layer.unhold(first.id);
    now(layer.reap());
    assert!(!layer.node_exists(first.id));
    check_counters(&layer, &[]);
    layer.drain_all_end();
    layer.drain_all_end();
    assert_eq!((counters(&second), hooks.sections.get()), ((0, 0), 0));
}

#[test]
fn deletion_while_a_drain_waits() {
    let layer = layer();
    let (top, child) = (
        open(&layer, &TEST, "top", true),
        open(&layer, &TEST, "child", true),
    );
    attach(&layer, &top, &child, "child", Role::DATA);
    begin_request(&child);
    let mut begin = Box::pin(layer.drained(child.id));
    assert!(poll(&mut begin).is_pending());
    layer.unhold(top.id);
    let mut reap = Box::pin(layer.reap());
    assert_eq!(poll(&mut reap), Poll::Ready(()), "nothing is in flight on top");
    assert!(child.parents.borrow().is_empty());
    end_request(&layer, &child);
    let Poll::Ready(section) = poll(&mut begin) else {
        panic!("idle")
    };
    check_counters(&layer, &[(&child, 1)]);
    // The section does not keep the node.
    layer.unhold(child.id);
    now(layer.reap());
    drop(section);
    assert!(layer.nodes().is_empty());
}

/// detach/parent_cb: a link moves while several drains wait; parents follow it.
#[test]
fn link_replaced_while_drained() {
    let layer = layer();
    let [pa, pb, a, b, c] = ["PA", "PB", "A", "B", "C"].map(|name| open(&layer, &TEST, name, false));
    attach(&layer, &pa, &a, "PA-A", Role::DATA);
    let pb_b = attach(&layer, &pb, &b, "PB-B", Role::DATA);
    attach(&layer, &pb, &a, "PB-A", Role::DATA);
    let (_, hooks) = backend(&layer, &pa, R, ALL);
    begin_request(&pa);
    for node in [&pb, &b, &c] {
        now(layer.drained_begin(node.id));
    }
    let mut begin = Box::pin(layer.drained_begin(a.id));
    assert!(poll(&mut begin).is_pending());
    layer.detach(pb_b);
    attach(&layer, &pb, &c, "PB-C", Role::DATA);
    end_request(&layer, &pa);
    assert!(poll(&mut begin).is_ready());
    let refs = [&pa, &pb, &a, &b, &c].map(|n| n.refcnt.get());
    assert_eq!(refs, [2, 1, 3, 1, 2]);
    let order: Vec<_> = pb
        .children
        .borrow()
        .iter()
        .map(|&e| child_of(&layer, e))
        .collect();
    assert_eq!(order, [c.id, a.id]);
    let quiesced = [&pa, &pb, &a, &b, &c].map(|n| n.quiesce_counter.get());
    assert_eq!(quiesced, [1, 3, 1, 1, 1]);
    check_counters(&layer, &[(&pb, 1), (&a, 1), (&b, 1), (&c, 1)]);
    for node in [&pb, &a, &b, &c] {
        layer.drained_end(node.id);
    }
    check_counters(&layer, &[]);
    assert_eq!(hooks.sections.get(), 0);
}

#[test]
fn append_above_a_drained_node() {
    let layer = layer();
    let (base, overlay) = (
        open(&layer, &TEST, "base", true),
        open(&layer, &TEST, "overlay", true),
    );
    let (root, hooks) = backend(&layer, &base, R | W, ALL);
    now(layer.drained_begin(base.id));
    now(layer.append(overlay.id, base.id)).unwrap();
    assert_eq!((counters(&base), counters(&overlay)), ((1, 1), (1, 1)));
    assert_eq!(child_of(&layer, root), overlay.id);
    assert_eq!(hooks.sections.get(), 1);
    check_counters(&layer, &[(&base, 1)]);
    layer.drained_end(base.id);
    assert_eq!(
        (counters(&base), counters(&overlay), hooks.sections.get()),
        ((0, 0), (0, 0), 0)
    );
}

/// replace_child/mid-drain: the parent ends in the drain state of the new child, and is never released in between.
#[test]
fn replace_child_mid_drain() {
    for old_drained in [false, true] {
        for new_drained in [false, true] {
            let layer = layer();
            let [parent, old, new] = ["parent", "old", "new"].map(|name| open(&layer, &TEST, name, false));
            let edge = attach(&layer, &parent, &old, "child", FILTERED);
            let begins = with(&parent, |f| f.drain_begins.get());
            for (node, drained) in [(&old, old_drained), (&new, new_drained)] {
                if drained {
                    now(layer.drained_begin(node.id));
                }
            }
            assert_eq!(counters(&parent).0, u32::from(old_drained));
            now(layer.replace_node(old.id, new.id)).unwrap();
            assert_eq!(child_of(&layer, edge), new.id);
            assert_eq!(
                counters(&parent),
                (u32::from(new_drained), i32::from(new_drained))
            );
            // One begin for the section or the operation; the lock's own drain-all falls inside it.
            assert_eq!(
                with(&parent, |f| f.drain_begins.get()),
                begins + 1,
                "{old_drained} {new_drained}"
            );
            check_counters(
                &layer,
                &[(&old, u32::from(old_drained)), (&new, u32::from(new_drained))],
            );
        }
    }
}

#[test]
fn attaching_quiesces_the_parent_for_a_moment_or_for_good() {
    let layer = layer();
    let [parent, idle, drained] = ["parent", "idle", "drained"].map(|name| open(&layer, &TEST, name, false));
    now(layer.drained_begin(drained.id));
    attach(&layer, &parent, &idle, "a", Role::DATA);
    assert_eq!(with(&parent, |f| (f.drained.get(), f.drain_begins.get())), (0, 1));
    let edge = attach(&layer, &parent, &drained, "b", Role::DATA);
    assert_eq!(counters(&parent), (1, 1));
    layer.detach(edge);
    assert_eq!(counters(&parent), (0, 0));
    let (_, hooks) = job(&layer, &drained, "main node", NONE, ALL);
    assert_eq!(hooks.sections.get(), 1);
    layer.drained_end(drained.id);
    assert_eq!(hooks.sections.get(), 0);
}

#[test]
fn write_lock_waits_for_readers_and_only_blips_the_drain() {
    let layer = layer();
    let (node, _, hooks) = setup(&layer);
    let reader = now(layer.graph_read());
    let mut write = Box::pin(layer.graph_write());
    assert!(poll(&mut write).is_pending());
    assert_eq!(
        hooks.sections.get(),
        1,
        "requests are held off while the writer waits"
    );
    assert_eq!(layer.inspect().drain_all, 1);
    let nested = now(layer.graph_read());
    drop(reader);
    assert!(poll(&mut write).is_pending());
    drop(nested);
    let Poll::Ready(guard) = poll(&mut write) else {
        panic!("no readers left")
    };
    assert!(layer.graph_write_held());
    assert_eq!(
        (hooks.sections.get(), counters(&node).0),
        (0, 0),
        "the drain ends with the lock taken"
    );
    let mut read = Box::pin(layer.graph_read());
    assert!(poll(&mut read).is_pending());
    drop(guard);
    assert!(poll(&mut read).is_ready());

    // A writer that gives up takes its drain back.
    let _reader = now(layer.graph_read());
    let mut write = Box::pin(layer.graph_write());
    assert!(poll(&mut write).is_pending());
    drop(write);
    assert_eq!((hooks.sections.get(), layer.inspect().drain_all), (0, 0));
}

#[test]
fn main_operations_are_bracketed_in_order() {
    let (layer, recorder) = recorded();
    let first = now(layer.main("first"));
    let mut second = Box::pin(layer.main("second"));
    assert!(poll(&mut second).is_pending());
    drop(first);
    let Poll::Ready(guard) = poll(&mut second) else {
        panic!("free")
    };
    drop(guard);
    let what = |what| [Event::MainBegin { what }, Event::MainEnd { what }];
    assert_eq!(recorder.take(), [what("first"), what("second")].concat());
}
