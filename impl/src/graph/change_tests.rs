//! Graph changes: the scenarios of QEMU's test-bdrv-graph-mod, freezing, blockers, references, reopen, and undo.

use super::testing::*;
use crate::event::Event;
use crate::graph::blockers::OpType;
use crate::types::{OpenFlags, Role};

#[test]
fn update_perm_tree_refuses_two_exclusive_links() {
    let layer = layer();
    let node = open(&layer, &PROTO, "node", true);
    backend(&layer, &node, W | R, ALL - W);
    let filter = open(&layer, &PASS, "filter", true);
    // An extra link that shows the content as well; a filter may have storage beside its filtered child.
    attach(&layer, &filter, &node, "child", Role::DATA);
    let before = layer.inspect();
    let error = now(layer.append(filter.id, node.id)).unwrap_err();
    assert!(error.desc.contains("both required by node 'filter'"), "{error}");
    assert!(error.desc.contains("unshared by node 'filter'"), "{error}");
    assert_eq!(layer.inspect(), before);
}

#[test]
fn should_update_child_leaves_links_that_would_loop() {
    let layer = layer();
    let (node, target) = (
        open(&layer, &PROTO, "node", true),
        open(&layer, &PASS, "target", true),
    );
    let filter = open(&layer, &NO_PERM, "filter", true);
    let (root, _) = backend(&layer, &node, R, ALL);
    let to_node = attach(&layer, &target, &node, "backing", FILTERED);
    attach(&layer, &filter, &target, "target", Role::DATA);
    now(layer.replace_node(node.id, filter.id)).unwrap();
    assert_eq!(child_of(&layer, to_node), node.id, "moving it would close a loop");
    assert_eq!(child_of(&layer, root), filter.id);
    assert_eq!(node.refcnt.get(), 2);
    assert_eq!(filter.refcnt.get(), 2);
}

#[test]
fn parallel_exclusive_write_refreshes_both_branches() {
    let layer = layer();
    let top = open(&layer, &EXCLUSIVE, "top", true);
    let (fl1, fl2) = (open(&layer, &PASS, "fl1", true), open(&layer, &PASS, "fl2", true));
    let base = open(&layer, &PROTO, "base", true);
    let e1 = attach(&layer, &fl1, &base, "file", FILTERED);
    let e2 = attach(&layer, &fl2, &base, "file", FILTERED);
    let link = attach(&layer, &top, &fl1, "file", FILTERED);
    now(layer.replace_node(fl1.id, fl2.id)).unwrap();
    assert_eq!(child_of(&layer, link), fl2.id);
    assert_eq!(layer.edge(e1).masks(), (NONE, ALL));
    assert_eq!(layer.edge(e2).masks(), (W, ALL - W));
}

#[test]
fn append_greedy_filter_judges_after_all_links_moved() {
    let layer = layer();
    let (top, base) = (
        open(&layer, &EXCLUSIVE, "top", true),
        open(&layer, &PROTO, "base", true),
    );
    let link = attach(&layer, &top, &base, "file", FILTERED);
    let filter = open(&layer, &EXCLUSIVE, "fl1", true);
    now(layer.append(filter.id, base.id)).unwrap();
    assert_eq!(child_of(&layer, link), filter.id);
    assert_eq!(layer.filter_or_cow(filter.id), Some(base.id));
    assert!(layer.chain_contains(top.id, base.id));
}

#[test]
fn cycles_are_refused() {
    let layer = layer();
    let (a, b) = (open(&layer, &TEST, "a", true), open(&layer, &TEST, "b", true));
    attach(&layer, &a, &b, "backing", Role::COW);
    let before = layer.inspect();
    let error = layer.attach_child(&b, a.id, "backing", Role::COW).unwrap_err();
    assert_eq!(
        error.desc,
        "Making 'a' a backing child of 'b' would create a cycle"
    );
    let error = now(layer.set_backing(b.id, Some(b.id))).unwrap_err();
    assert_eq!(
        error.desc,
        "Making 'b' a backing child of 'b' would create a cycle"
    );
    assert_eq!(layer.inspect(), before);
}

/// top -> mid -> base over backing links, a guest on top.
fn chain(layer: &crate::Layer) -> [std::rc::Rc<super::node::Node>; 3] {
    let [top, mid, base] = ["top", "mid", "base"].map(|name| open(layer, &TEST, name, name == "top"));
    attach(layer, &mid, &base, "backing", Role::COW);
    attach(layer, &top, &mid, "backing", Role::COW);
    [top, mid, base]
}

#[test]
fn walks_skip_filters() {
    let layer = layer();
    let [top, mid, base] = chain(&layer);
    let filter = open(&layer, &PASS, "filter", false);
    let link = layer.filter_or_cow_edge(top.id).unwrap();
    attach(&layer, &filter, &mid, "file", FILTERED);
    now(layer.insert_node(filter.id, mid.id)).unwrap();
    assert_eq!(child_of(&layer, link), filter.id);
    assert_eq!(layer.cow(top.id), Some(filter.id));
    assert_eq!(layer.cow(filter.id), None);
    assert_eq!(layer.skip_filters(filter.id), mid.id);
    assert_eq!(layer.skip_implicit_filters(filter.id), filter.id);
    filter.implicit.set(true);
    assert_eq!(layer.skip_implicit_filters(filter.id), mid.id);
    assert_eq!(layer.backing_chain_next(top.id), Some(mid.id));
    assert_eq!(layer.find_overlay(top.id, Some(filter.id)), Some(top.id));
    assert_eq!(layer.find_overlay(top.id, Some(base.id)), Some(mid.id));
    assert_eq!(layer.find_overlay(mid.id, Some(top.id)), None);
    assert_eq!(layer.find_overlay(mid.id, Some(mid.id)), None);
    assert_eq!(layer.find_base(filter.id), base.id);
    assert!(layer.chain_contains(mid.id, mid.id) && !layer.chain_contains(mid.id, top.id));
    assert!(layer.is_root_node(top.id) && !layer.is_root_node(mid.id) && !layer.has_backend(top.id));
    layer.unhold(filter.id);
    now(layer.drop_filter(filter.id)).unwrap();
    assert_eq!(layer.cow(top.id), Some(mid.id));
    assert_eq!(layer.filter_child_edge(filter.id), None);
    now(layer.reap());
    assert_eq!(layer.find_node("filter"), None);
}

#[test]
fn frozen_links_refuse_every_change() {
    let (layer, recorder) = recorded();
    let [top, mid, base] = chain(&layer);
    layer.freeze_chain(top.id, Some(base.id)).unwrap();
    let before = layer.inspect();
    recorder.take();
    let error = layer.freeze_chain(mid.id, None).unwrap_err();
    assert_eq!(error.desc, "Cannot change 'backing' link from 'mid' to 'base'");
    for backing in [None, Some(base.id)] {
        let error = now(layer.set_backing(top.id, backing)).unwrap_err();
        assert_eq!(
            error.desc,
            "Cannot change frozen 'backing' link from 'top' to 'mid'"
        );
    }
    let other = open(&layer, &TEST, "other", false);
    let error = now(layer.replace_node(base.id, other.id)).unwrap_err();
    assert_eq!(error.desc, "Cannot change 'backing' link to 'base'");
    layer.unhold(other.id);
    now(layer.reap());
    assert_eq!(layer.inspect(), before);
    layer.unfreeze_chain(top.id, Some(base.id));
    let frozen = recorder
        .take()
        .iter()
        .filter(|e| matches!(e, Event::Frozen { .. }))
        .count();
    assert_eq!(frozen, 0, "a refused freeze marks nothing");
    mid.never_freeze.set(true);
    let error = layer.freeze_chain(top.id, Some(base.id)).unwrap_err();
    assert_eq!(error.desc, "Cannot freeze 'backing' link to 'mid'");
    layer.freeze_chain(mid.id, Some(mid.id)).unwrap();
    assert!(layer.inspect().edges.iter().all(|e| !e.frozen));
}

#[test]
#[should_panic(expected = "not in the chain")]
fn freezing_needs_a_reachable_base() {
    let layer = layer();
    let [top, mid, _] = chain(&layer);
    let _ = layer.freeze_chain(mid.id, Some(top.id));
}

#[test]
fn backing_link_blocks_most_operations() {
    let layer = layer();
    let [top, mid, base] = chain(&layer);
    let error = layer.op_blocked(mid.id, OpType::Resize).unwrap_err();
    assert_eq!(
        error.desc,
        "Node 'mid' is busy: node is used as backing hd of 'top'"
    );
    layer.op_blocked(mid.id, OpType::Stream).unwrap();
    let (edge, _) = job(&layer, &mid, "intermediate node", NONE, ALL);
    layer.block_ops(mid.id, edge, "block device is in use by block job: stream");
    let error = layer.op_blocked(mid.id, OpType::Stream).unwrap_err();
    assert_eq!(
        error.desc,
        "Node 'mid' is busy: block device is in use by block job: stream"
    );
    layer.unblock_ops(mid.id, edge);
    layer.op_blocked(mid.id, OpType::Stream).unwrap();
    layer.block_ops(mid.id, edge, "goes with the edge");
    layer.detach(edge);
    now(layer.set_backing(top.id, Some(base.id))).unwrap();
    assert!(mid.blockers.borrow().is_empty());
    assert_eq!(base.blockers.borrow().len(), 2);
    layer.op_blocked(top.id, OpType::DriveDel).unwrap();
}

#[test]
fn jobs_stay_when_their_node_is_replaced() {
    let layer = layer();
    let (a, b) = (open(&layer, &TEST, "a", true), open(&layer, &TEST, "b", true));
    let (stays, _) = job(&layer, &a, "main node", NONE, ALL);
    let (first, _) = backend(&layer, &a, R, ALL);
    let (second, _) = backend(&layer, &a, R, ALL);
    now(layer.replace_node(a.id, b.id)).unwrap();
    assert_eq!(*a.parents.borrow(), [stays]);
    assert_eq!(
        *b.parents.borrow(),
        [first, second],
        "moving several parents reverses them"
    );
}

#[test]
fn a_refused_replacement_restores_orders_slots_and_blockers() {
    let (layer, recorder) = recorded();
    let [top, mid, base] = chain(&layer);
    attach(&layer, &top, &base, "data", Role::DATA);
    let (root, hooks) = backend(&layer, &mid, R, R);
    backend(&layer, &mid, R, ALL);
    // Nobody may write beside `root`, and `other` has a writer.
    let other = open(&layer, &TEST, "other", true);
    backend(&layer, &other, W, ALL);
    let before = layer.inspect();
    recorder.take();
    let error = now(layer.replace_node(mid.id, other.id)).unwrap_err();
    assert!(
        error
            .desc
            .starts_with("Permission conflict on node 'other': permissions 'write'"),
        "{error}"
    );
    assert_eq!(layer.inspect(), before);
    assert_eq!(hooks.sections.get(), 0);
    let moves: Vec<_> = recorder
        .take()
        .into_iter()
        .filter(|e| matches!(e, Event::EdgeSet { .. }))
        .collect();
    assert_eq!(moves.len(), 6, "three edges there and back: {moves:?}");
    assert!(matches!(moves[0], Event::EdgeSet { edge, .. } if edge == mid.parents.borrow()[0]));
    assert_eq!(child_of(&layer, root), mid.id);
}

#[test]
fn a_replaced_backing_link_comes_back_as_it_was() {
    let layer = layer();
    let [top, mid, base] = chain(&layer);
    let (_root, _) = backend(&layer, &top, R, ALL);
    // Somebody else is above, older and younger than the link.
    let (_other, _) = backend(&layer, &mid, R, ALL);
    mid.inherits_from.set(Some(top.id));
    base.inherits_from.set(Some(mid.id));
    let books = || {
        let lists = [&top, &mid, &base].map(|node| {
            (
                node.parents.borrow().clone(),
                node.children.borrow().clone(),
                node.inherits_from.get(),
                node.refcnt.get(),
            )
        });
        let links = [top.id, mid.id].map(|node| {
            let edge = layer.filter_or_cow_edge(node).unwrap();
            (edge, layer.edge(edge).masks())
        });
        (lists, links)
    };
    let before = books();
    let drained = (now(layer.drained(top.id)), now(layer.drained(mid.id)));
    let replaced = now(layer.replace_backing(top.id, Some(base.id))).unwrap();
    assert_eq!(layer.cow(top.id), Some(base.id));
    assert_eq!(mid.inherits_from.get(), None, "on its own meanwhile");
    now(layer.put_back_backing(replaced));
    assert_eq!(books(), before);
    let replaced = now(layer.replace_backing(top.id, None)).unwrap();
    layer.keep_backing(replaced);
    drop(drained);
    assert_eq!(layer.cow(top.id), None, "it stays if it is to");
    assert_eq!(mid.refcnt.get(), before.0[1].3 - 1);
    for node in [&top, &mid, &base] {
        assert_eq!(node.quiesce_counter.get(), 0, "{node:?}");
    }
}

#[test]
fn set_backing_replaces_and_removes() {
    let layer = layer();
    let [top, mid, base] = chain(&layer);
    let plain = open(&layer, &PROTO, "plain", true);
    let error = now(layer.set_backing(plain.id, Some(base.id))).unwrap_err();
    assert_eq!(
        error.desc,
        "Driver 'proto' of node 'plain' does not support backing files"
    );
    let (_root, _) = backend(&layer, &top, R, ALL);
    let below_mid = layer.filter_or_cow_edge(mid.id).unwrap();
    assert_eq!(layer.edge(below_mid).masks(), (R, ALL));
    mid.inherits_from.set(Some(top.id));
    base.inherits_from.set(Some(mid.id));
    now(layer.set_backing(top.id, Some(base.id))).unwrap();
    assert_eq!(layer.cow(top.id), Some(base.id));
    assert_eq!(
        layer.edge(below_mid).masks(),
        (NONE, ALL),
        "what lost its users asks for nothing"
    );
    assert_eq!(mid.inherits_from.get(), None, "on its own now");
    assert_eq!(
        base.inherits_from.get(),
        Some(top.id),
        "through mid before, directly now"
    );
    assert_eq!((mid.refcnt.get(), base.refcnt.get()), (1, 3));
    now(layer.set_backing(top.id, None)).unwrap();
    assert_eq!(layer.cow(top.id), None);
    assert_eq!(top.children.borrow().len(), 0);
    for node in [&top, &mid, &base] {
        assert_eq!(
            (node.quiesce_counter.get(), with(node, |f| f.drained.get())),
            (0, 0),
            "{node:?}"
        );
    }
}

#[test]
fn the_last_reference_closes_the_chain_below() {
    let (layer, recorder) = recorded();
    let [top, mid, base] = chain(&layer);
    let ids = [top.id, mid.id];
    layer.hold(base.id);
    for node in [&top, &mid, &base] {
        layer.unhold(node.id);
    }
    assert_eq!(
        layer.find_node("top"),
        Some(top.id),
        "closed at the end of the operation, not before"
    );
    let close = |node: &super::node::Node| node.driver_opt().is_none();
    recorder.take();
    now(layer.reap());
    assert!(close(&top) && close(&mid) && !close(&base));
    let removed: Vec<_> = recorder
        .take()
        .into_iter()
        .filter_map(|e| {
            if let Event::NodeRemoved { node } = e {
                Some(node)
            } else {
                None
            }
        })
        .collect();
    assert_eq!(removed, ids);
    assert_eq!(layer.find_node("mid"), None);
    let view = layer.inspect();
    assert_eq!((view.nodes.len(), view.edges.len()), (1, 0));
    assert_eq!(base.refcnt.get(), 1);
    // The name is free again.
    open(&layer, &TEST, "mid", true);
}

#[test]
fn node_names() {
    let layer = layer();
    let node = open(&layer, &TEST, "a", true);
    let new = |name: &str| {
        layer
            .new_node(&TEST, Some(name), OpenFlags::RDWR, serde_json::Map::new())
            .map(|n| n.name.to_string())
    };
    let refuse = |name: &str| new(name).unwrap_err().desc;
    assert_eq!(refuse("1a"), "Invalid node-name: '1a'");
    assert_eq!(refuse(""), "Invalid node-name: ''");
    assert_eq!(refuse("a#b"), "Invalid node-name: 'a#b'");
    assert_eq!(refuse("a"), "Duplicate nodes with node-name='a'");
    assert_eq!(refuse(&"a".repeat(32)), "Node name too long");
    assert_eq!(new(&"a".repeat(31)).unwrap().len(), 31);
    let (_, hooks) = backend(&layer, &node, R, ALL);
    hooks.device.replace(Some("disk0".into()));
    assert_eq!(refuse("disk0"), "node-name=disk0 is conflicting with a device id");
    assert_eq!(&*layer.device_or_node_name(&node), "disk0");
    for expected in ["#block000", "#block100"] {
        assert_eq!(
            &*layer
                .new_node(&TEST, None, OpenFlags::RDWR, serde_json::Map::new())
                .unwrap()
                .name,
            expected
        );
    }
}

#[test]
fn read_only_switch_follows_inline_children_and_is_undone() {
    let layer = layer();
    let (file, image) = (
        open(&layer, &TEST, "file", false),
        open(&layer, &TEST, "image", false),
    );
    attach(&layer, &image, &file, "file", Role::IMAGE);
    let error = now(layer.set_read_only(image.id, false)).unwrap_err();
    assert_eq!(
        error.desc, "Block node is read-only",
        "the file does not follow: it was not opened inline"
    );
    assert_eq!(
        with(&image, |f| f.reopens.take()),
        [true, false],
        "prepared, and put back"
    );
    assert!(!image.is_writable());

    file.inherits_from.set(Some(image.id));
    now(layer.set_read_only(image.id, false)).unwrap();
    assert!(image.is_writable() && file.is_writable());
    assert_eq!(layer.cumulative(file.id).0, R | W | Z);
    backend(&layer, &image, R | W, ALL);
    let before = layer.inspect();
    let error = now(layer.set_read_only(image.id, true)).unwrap_err();
    assert_eq!(
        error.desc,
        "Read-only block node 'image' cannot support read-write users"
    );
    assert_eq!(layer.inspect(), before);

    let proto = open(&layer, &PROTO, "p", true);
    let error = now(layer.set_read_only(proto.id, true)).unwrap_err();
    assert_eq!(
        error.desc,
        "Block format 'proto' used by node 'p' does not support reopening files"
    );
    with(&file, |f| f.reopen_error.set(Some(crate::error::Errno::EIO)));
    assert_eq!(
        now(layer.set_read_only(file.id, true)).unwrap_err().desc,
        "reopen: Input/output error"
    );
    assert_eq!(layer.node(file.id).quiesce_counter.get(), 0);
}
